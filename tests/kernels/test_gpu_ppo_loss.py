"""`ppo_loss` in Triton: every objective, aggregation and optional tensor against float64; masked entries."""

from functools import partial

import pytest
import torch

from rlhf_kernels import METRICS, _native, ppo_loss, reference
from rlhf_kernels._options import PPOArguments
from rlhf_kernels._triton.ppo_loss import _add_up
from rlhf_kernels.backend import kernels
from rlhf_kernels.launch_args import Sequences, flatten
from rlhf_kernels.ops.objective import ObjectiveTerms
from rlhf_kernels.ops.ppo_loss import Inputs

from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device
from .helpers.objective import OPTIONS, case, run

triton_loss = partial(ppo_loss, backend="triton")
LENGTHS = (1100, 1, 0, 1024, 700)  # more than a tile, one token, none, exactly a tile, less than a tile
NAMES = ("logprobs", "old_logprobs", "advantages", "mask")

MORE = [
    {"objective": "policy_gradient", "aggregation": "seq_mean_token_sum", "entropy_coef": -0.2, "vf_coef": 0.7},
    {"objective": "kl_penalty", "old_kl_coef": 0.3, "log_ratio_clamp": 0.2, "kl_coef": -0.1, "kl_estimator": "k3"},
    {"objective": "ratio", "ratio_level": "sequence", "log_ratio_clamp": 0.004, "aggregation": "seq_mean_token_sum"},
    {"ratio_level": "sequence", "cliprange": 0.003, "dual_clip": 1.01, "kl_coef": 0.1, "kl_estimator": "k2"},
    {"aggregation": "seq_mean_token_mean", "entropy_coef": 0.5, "kl_coef": 0.5, "cliprange_high": 0.1},
    {"cliprange": 0.0, "cliprange_value": 0.0, "aggregation": "token_sum"},
]


def packed(seed: int):
    """Return a padded case as packed sequences of LENGTHS."""
    inputs, constants = case(seed, b=5, t=1100)
    constants["mask"][0] = constants["mask"][4]
    inside = torch.arange(1100) < torch.tensor(LENGTHS)[:, None]
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    constants = {k: v[inside] for k, v in constants.items()} | {"cu_seqlens": ends}
    return {k: v[inside] for k, v in inputs.items()}, constants


def on_device(inputs, constants, options, **keywords):
    """Return result and gradients of the Triton kernels, on the CPU."""
    result, gradients = run(triton_loss, *map(to_device, (inputs, constants, options)), **keywords)
    result = type(result)(result.loss.cpu(), {k: v.cpu() for k, v in result.metrics.items()})
    return result, {k: v.cpu() for k, v in gradients.items()}


def check(inputs, constants, options):
    got, gradients = on_device(inputs, constants, options)
    eager, eager_gradients = run(reference.ppo_loss, inputs, constants, options)
    exact, exact_gradients = run(reference.ppo_loss, inputs, constants, options, torch.float64)
    check_error("loss", got.loss, eager.loss, exact.loss)
    for name, gradient in gradients.items():
        check_error(f"gradient of {name}", gradient, eager_gradients[name], exact_gradients[name])
    for name in METRICS:
        torch.testing.assert_close(
            got.metrics[name], exact.metrics[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS + MORE, ids=str)
def test_matches_float64(options, layout):
    inputs, constants = case(0, b=3, t=700) if layout == "padded" else packed(1)
    constants["value_mask"] = torch.rand(constants["mask"].shape, generator=torch.Generator().manual_seed(5)) > 0.4
    got = check(inputs, constants, options)
    assert got.metrics["num_tokens"] != got.metrics["num_value_tokens"]


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize(
    "absent",
    [
        ("weights",),
        ("ref_logprobs",),
        ("old_values",),
        ("entropy",),
        ("values", "old_values", "returns"),
        ("weights", "ref_logprobs", "old_values", "entropy", "values", "returns"),
    ],
    ids="-".join,
)
def test_absent_tensors(absent, ratio_level):
    inputs, constants = ({k: v for k, v in x.items() if k not in absent} for x in case(2))
    options = {"ratio_level": ratio_level}
    options |= {"entropy_coef": 0.1} if "entropy" in inputs else {}
    options |= {"kl_coef": 0.1} if "ref_logprobs" in constants else {}
    check(inputs, constants, options)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (30, 1)])
def test_small_batches(shape, ratio_level):
    inputs, constants = case(3, *shape)
    constants["mask"][:] = True
    check(inputs, constants, {"ratio_level": ratio_level, "kl_coef": 0.1})


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_masked_entries_have_no_effect(ratio_level):
    inputs, constants = packed(4)
    options = {"ratio_level": ratio_level, "kl_coef": 0.1, "entropy_coef": 0.1, "aggregation": "seq_mean_token_mean"}
    clean, gradients = on_device(inputs, constants, options)
    mask = constants["mask"]
    for tensors in (inputs, constants):
        for name, x in tensors.items():
            if name not in ("mask", "cu_seqlens"):
                tensors[name] = torch.where(mask, x, torch.nan)
    dirty, dirty_gradients = on_device(inputs, constants, options)
    assert torch.equal(clean.loss, dirty.loss)
    assert all(torch.equal(clean.metrics[name], dirty.metrics[name]) for name in METRICS)
    for name, gradient in dirty_gradients.items():
        assert torch.equal(gradient, gradients[name]) and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"])
def test_no_token_counts(aggregation, ratio_level):
    """If all tokens are masked, or there is no token, the loss and the gradients are 0, not NaN."""
    inputs, constants = case(4)
    constants["mask"][:] = False
    for rows, size in ((5, 40), (5, 0), (0, 40)):
        some = ({k: v[:rows, :size] for k, v in tensors.items()} for tensors in (inputs, constants))
        options = {"aggregation": aggregation, "ratio_level": ratio_level, "entropy_coef": 0.1}
        result, gradients = on_device(*some, options)
        assert result.loss == 0
        assert all((g == 0).all() for g in gradients.values())
        assert all(result.metrics[name] == 0 for name in METRICS)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_the_same_bits_twice(ratio_level):
    inputs, constants = packed(5)
    (a, gradients), (b, again) = (on_device(inputs, constants, {"ratio_level": ratio_level}) for _ in range(2))
    assert torch.equal(a.loss, b.loss) and all(torch.equal(a.metrics[k], b.metrics[k]) for k in METRICS)
    assert all(torch.equal(gradients[k], again[k]) for k in gradients)


@pytest.mark.parametrize("segments", [0, 1, 1024, 3000])
def test_any_number_of_partial_sums(segments):
    """The last result is a maximum instead of a sum, and a NaN at any index must reach it."""
    partials = torch.rand(_native.NUM_SUMS, segments, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def add_up(x):
        sums = torch.empty(_native.NUM_SUMS, dtype=torch.float64, device=DEVICE)
        _add_up[(_native.NUM_SUMS,)](x.to(DEVICE), sums, segments)
        return sums.cpu()

    expected = partials.sum(1)
    expected[-1] = partials[-1].max() if segments else 0
    torch.testing.assert_close(add_up(partials), expected, rtol=1e-14, atol=0)
    for place in {0, segments // 2, segments - 1} if segments else ():
        partials[:] = 1.0
        partials[-1, place] = torch.nan
        sums = add_up(partials)
        assert sums[-1].isnan() and (sums[:-1] == segments).all()


@pytest.mark.parametrize("place", [0, 1023, 1024, 2099])
def test_a_nan_is_propagated(place):
    """A NaN reaches the loss, the largest and the mean ratio, and only the gradient of its token."""
    inputs, constants = case(6, b=3, t=700)
    constants["mask"][:] = True
    inputs["logprobs"].view(-1)[place] = torch.nan
    result, gradients = on_device(inputs, constants, {"objective": "ratio"})
    assert result.loss.isnan() and result.metrics["ratio_max"].isnan() and result.metrics["ratio_mean"].isnan()
    assert gradients["logprobs"].isnan().view(-1).nonzero().tolist() == [[place]]


def test_a_ratio_that_overflows_is_infinite():
    inputs, constants = case(7, b=1, t=3)
    constants["mask"][:] = True
    constants["old_logprobs"][0, 1] = inputs["logprobs"][0, 1] - 200
    constants["advantages"][:] = 1.0
    result, gradients = on_device(inputs, constants, {})
    assert result.metrics["ratio_max"] == torch.inf and result.metrics["clipfrac"] > 0
    assert gradients["logprobs"][0, 1] == 0  # clipped


def test_two_losses_in_one_backward_and_no_gradient_under_no_grad():
    inputs, constants = to_device(case(8))
    x = inputs["logprobs"].clone().requires_grad_()
    rest = [constants[k] for k in NAMES[1:]]
    apart = [torch.autograd.grad(triton_loss(x, *rest, objective=o).loss, x)[0] for o in ("clip", "ratio")]
    (2 * triton_loss(x, *rest).loss + 3 * triton_loss(x, *rest, objective="ratio").loss).backward()
    torch.testing.assert_close(x.grad, 2 * apart[0] + 3 * apart[1])
    with torch.no_grad():
        assert not triton_loss(x, *rest).loss.requires_grad


def test_strides_and_dtypes():
    inputs, constants = case(9)
    options = {"kl_coef": 0.1}
    expected, gradients = on_device(inputs, constants, options)
    apart = [{k: v.t().contiguous().t() for k, v in tensors.items()} for tensors in (inputs, constants)]
    got, again = on_device(*apart, options)
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(gradients[k], again[k]) for k in gradients)
    half = run(triton_loss, to_device(inputs), to_device(constants), options, torch.bfloat16)[1]
    assert all(g.dtype == torch.bfloat16 for g in half.values())


@pytest.mark.parametrize("ends", [[0, 8], [-9, 4, 4], [2, 1 << 30], [3, 1, 2, -4]])
def test_invalid_cu_seqlens_do_not_read_outside_the_tokens(ends, monkeypatch):
    """The host does not read values on a device, so the kernel must not read outside the tokens for any `cu_seqlens`."""
    x = torch.full((2000,), torch.nan, device=DEVICE)
    x[:4] = 0.5
    mask = torch.ones(2000, dtype=torch.bool, device=DEVICE)
    ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    args = PPOArguments(ratio_level="sequence", cu_seqlens=ends, values=x[:4], returns=x[:4])
    terms = ObjectiveTerms.of(args, x[:4], x[:4], mask[:4])
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            terms.sums(kernels("triton"), x[:4], None, x[:4], None, x[:4])
    monkeypatch.setattr(Sequences, "check", lambda *_: None)
    slope, value_slope, sums = terms.sums(kernels("triton"), x[:4], None, x[:4], None, x[:4])
    assert slope.shape == value_slope.shape == (4,) and sums.isfinite().all()


def test_registered_op():
    n = 9
    values = to_device([torch.randn(n) for _ in range(5)])
    args = PPOArguments(
        returns=values[0],
        values=values[1],
        entropy_coef=0.1,
        kl_coef=0.1,
        ref_logprobs=values[2],
        aggregation="token_sum",
    )
    terms = ObjectiveTerms.of(args, values[3] - 3, values[4], torch.rand(n, device=DEVICE) > 0.3)
    leaves = [torch.randn(n, device=DEVICE, requires_grad=True) for _ in range(3)]
    op = torch.ops.rlhf_kernels.ppo_loss
    result = torch.library.opcheck(op, flatten(Inputs(*leaves, None, args.returns, terms, "triton")))
    assert set(result.values()) == {"SUCCESS"}

"""`token_logprobs` on a GPU against float64, and uses of the row launchers that no public op reaches directly."""

import math
from functools import partial

import pytest
import torch

from rlhf_kernels import reference, token_logprobs
from rlhf_kernels._options import PPOArguments
from rlhf_kernels._triton import compaction
from rlhf_kernels.backend import kernels
from rlhf_kernels.launch_args import LogitRows, PpoRows, PpoScalars, RowStats, Transform
from rlhf_kernels.ops.head import front_of

from .helpers.bounds import (
    TEMPERATURES,
    check_error,
    check_softcap_slope,
    check_temperature_costs_nothing,
    temperature_scene,
)
from .helpers.gpu import DEVICE, to_device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]


def compare(logits, ids, upstream=(0.37, -0.11), **options):
    """Check outputs and gradient of the kernel against eager and float64; return those of the kernel.

    The loss is a weighted sum of log-probs and entropies.
    """
    logits, ids, options = to_device((logits, ids, options))
    results = []
    for function, dtype in (
        (token_logprobs, logits.dtype),
        (reference.token_logprobs, logits.dtype),
        (reference.token_logprobs, torch.float64),
    ):
        x = logits.detach().to(dtype).requires_grad_()
        given = {"backend": "triton"} if function is token_logprobs else {}
        for k, v in options.items():
            given[k] = (
                v.to(torch.promote_types(dtype, torch.float32)) if k == "temperature" and torch.is_tensor(v) else v
            )
        out = function(x, ids, entropy=True, **given)
        weights = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64, device=DEVICE).view(ids.shape)
        loss = (upstream[0] * out.logprobs * weights).sum() + (upstream[1] * out.entropy * weights).sum()
        results.append((out.logprobs, out.entropy, torch.autograd.grad(loss, x)[0]))
    for name, *triple in zip(("logprobs", "entropy", "gradient"), *results, strict=True):
        check_error(name, *triple)
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 203, 17003])  # the last one has several blocks
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"temperature": 0.7, "logit_scale": 0.5},
        {"softcap": 2.0, "logit_scale": 0.7, "temperature": "row"},
        {"temperature": "row"},
    ],
    ids=str,
)
def test_matches_float64(dtype, vocabulary, options):
    torch.manual_seed(vocabulary)
    rows = 7
    if options.get("temperature") == "row":
        options = options | {"temperature": torch.rand(rows) + 0.5}
    compare((3 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,)), **options)


def test_hand_computed():
    """For p = (1/2, 1/4, 1/4): log p = -log 2, H = 1.5 log 2, and the gradient of log p is onehot - p."""
    logits = torch.tensor([[0.0, -math.log(2), -math.log(2)]], device=DEVICE, requires_grad=True)
    out = token_logprobs(logits, torch.tensor([0], device=DEVICE), entropy=True, backend="triton")
    torch.testing.assert_close(out.logprobs.cpu(), torch.tensor([-math.log(2)]))
    torch.testing.assert_close(out.entropy.cpu(), torch.tensor([1.5 * math.log(2)]))
    out.logprobs.backward()
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[0.5, -0.25, -0.25]]))


@pytest.mark.parametrize("kind", TEMPERATURES)
def test_a_temperature_costs_no_accuracy(kind):
    """The rounding of 1 / T would shift a log-prob of -15 as a whole, and ratios and k3 amplify such an error."""
    logits, ids, options = to_device(temperature_scene(kind))
    check_temperature_costs_nothing(
        token_logprobs(logits, ids, **options, backend="triton").logprobs, logits, ids, options
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slope_of_the_softcap_does_not_cancel(dtype):
    check_softcap_slope(partial(token_logprobs, backend="triton"), dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_all_negative_logits_and_odd_vocabulary(dtype, softcap):
    """Columns past V would dominate logits near -50 if they were 0, and count like one of them if they were -softcap."""
    logits = (-50 + torch.randn(5, 1001)).to(dtype)
    logprobs, _, _ = compare(logits, torch.randint(0, 1001, (5,)), softcap=softcap)
    assert (logprobs < 0).all()


def test_common_offset():
    compare(1e4 + torch.randn(5, 9001), torch.randint(0, 9001, (5,)))


def test_logsumexp_near_zero():
    """The log-prob of a normalised logit is the logit, also where it is nearly 0."""
    logits = torch.randn(9, 333)
    logits[:, 0] += torch.arange(0.0, 36, 4)
    logits = logits.log_softmax(-1)
    logprobs, _, _ = compare(logits, torch.zeros(9, dtype=torch.long))
    torch.testing.assert_close(logprobs.cpu(), logits[:, 0], atol=5e-7, rtol=1e-6)


def test_rising_maximum():
    """The running maximum changes in every block."""
    compare(torch.linspace(-80, 80, 20000).repeat(3, 1), torch.tensor([0, 10000, 19999]))
    compare(torch.randn(3, 20000) + torch.linspace(0, 4, 20000), torch.tensor([0, 10000, 19999]))


def test_small_logits_under_a_wide_softcap():
    """Near 0 the kernel's tanh keeps its relative accuracy."""
    compare(1e-3 * torch.randn(5, 77), torch.randint(0, 77, (5,)), softcap=1000.0)


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_columns(lowest):
    """A logit of -inf has probability 0 and gradient 0; 0 * inf must not become NaN."""
    logits = torch.randn(3, 20000, device=DEVICE)
    logits[:, :9000] = lowest  # a whole block and a part of the next
    logits.requires_grad_()
    out = token_logprobs(logits, torch.full((3,), 12000, device=DEVICE), entropy=True, backend="triton")
    cut = logits.detach()[:, 9000:].double().requires_grad_()
    expected = reference.token_logprobs(cut, torch.full((3,), 3000, device=DEVICE), entropy=True)
    torch.testing.assert_close(out.logprobs, expected.logprobs.float())
    torch.testing.assert_close(out.entropy, expected.entropy.float())
    (out.logprobs + out.entropy).sum().backward()
    (expected.logprobs + expected.entropy).sum().backward()
    assert (logits.grad[:, :9000] == 0).all()
    torch.testing.assert_close(logits.grad[:, 9000:], cut.grad.float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 8190, 9000])
def test_non_finite_logits_give_a_non_finite_row(bad, at):
    logits = torch.randn(3, 10000, device=DEVICE)
    logits[1, at] = bad
    logits.requires_grad_()
    out = token_logprobs(logits, torch.zeros(3, dtype=torch.long, device=DEVICE), entropy=True, backend="triton")
    assert out.logprobs.isfinite().tolist() == [True, False, True]
    assert out.entropy.isfinite().tolist() == [True, False, True]
    out.logprobs.sum().backward()
    assert logits.grad.isfinite().all(1).tolist() == [True, False, True]


def test_a_row_of_minus_infinity_is_not_finite():
    logits = torch.full((1, 9000), -torch.inf, device=DEVICE)
    out = token_logprobs(logits, torch.zeros(1, dtype=torch.long, device=DEVICE), entropy=True, backend="triton")
    assert not out.logprobs.isfinite().any() and not out.entropy.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_zero_for_any_content(dtype):
    logits, ids = torch.randn(2, 3, 50).to(dtype), torch.randint(0, 50, (2, 3))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    temperature = torch.ones(2, 3)
    for x, value in ((logits, torch.nan), (ids, -100), (temperature, 1e-30)):
        x[~mask] = value
    logits, ids, mask, temperature = to_device((logits, ids, mask, temperature))
    logits.requires_grad_()
    out = token_logprobs(logits, ids, mask=mask, entropy=True, temperature=temperature, backend="triton")
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert (out.logprobs[~mask] == 0).all() and (out.entropy[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all() and logits.grad[mask].isfinite().all()


def test_all_masked_and_empty():
    for n in (4, 0):
        logits = torch.randn(n, 50, device=DEVICE, requires_grad=True)
        ids, mask = (torch.zeros(n, dtype=d, device=DEVICE) for d in (torch.long, torch.bool))
        out = token_logprobs(logits, ids, mask=mask, entropy=True, backend="triton")
        (out.logprobs + out.entropy).sum().backward()
        assert (out.logprobs == 0).all() and (out.entropy == 0).all() and (logits.grad == 0).all()
        assert out.logprobs.shape == (n,) and logits.grad.shape == (n, 50)


def test_strides_are_respected():
    """Slices that trainers pass: shifted logits, a transpose, every second row, one sequence, one position."""
    base, ids = torch.randn(4, 9, 130), torch.randint(0, 130, (4, 8))
    compare(base[:, :-1], ids)
    compare(base[:, 1:].transpose(0, 1), ids.t())
    compare(base[:, ::2], ids[:, :5])
    compare(base[1:2, :-1], ids[:1])
    compare(base[:, 3:4], ids[:, :1])
    compare(base[:, 3], ids[:, 0])
    compare(torch.randn(130, 12).t(), torch.randint(0, 130, (12,)))


def test_the_bits_repeat_and_do_not_depend_on_other_rows():
    logits, ids = to_device((torch.randn(12, 9001), torch.randint(0, 9001, (12,))))

    def run(rows):
        x = logits[rows].clone().requires_grad_()
        out = token_logprobs(x, ids[rows], entropy=True, backend="triton")
        (out.logprobs - 0.3 * out.entropy).sum().backward()
        return out.logprobs, out.entropy, x.grad

    whole = run(slice(None))
    for rows in (slice(None), slice(7, 9), slice(3, 4)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows), strict=True)), rows


# ---- arguments that only the launchers have --------------------------------------------------------------------------

SCALARS = PpoScalars.of(PPOArguments())


def rows_of(n, vocabulary, dtype=torch.float32, transform=None, mask=None):
    logits, ids = (2 * torch.randn(n, vocabulary)).to(dtype), torch.randint(0, vocabulary, (n,))
    return LogitRows(*to_device((logits, ids)), transform or Transform(), to_device(mask))


def stats_of(x):
    stats = RowStats.empty(x.ids.numel(), DEVICE)
    kernels("triton").token_logprobs_forward(x, stats)
    return stats


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("transform", [Transform(), Transform.of(0.7, 5.0, 0.5)], ids=["plain", "softcap"])
def test_a_narrow_gradient_in_the_front_of_each_row(dtype, transform):
    """The bits are the same as in a separate tensor. A block of logits that is read too late would contain gradients."""
    launch, n = kernels("triton"), 5
    x = rows_of(n, 20001, transform=transform)
    stats = stats_of(x)
    g, h = to_device((torch.tensor([1.0, -0.5, 0.0, 2.0, 0.3]), torch.tensor([0.1, 0.0, 0.0, -0.2, 0.3])))
    own = torch.empty(n, 20001, dtype=dtype, device=DEVICE)
    launch.token_logprobs_backward(x, stats, own, g, h)
    packed = torch.empty(n, 20001, dtype=torch.float32, device=DEVICE)
    launch.token_logprobs_backward(x, stats, packed, g, h)
    front = front_of(x.logits, dtype)
    launch.token_logprobs_backward(x, stats, front, g, h)
    assert torch.equal(own, front)
    eps = torch.finfo(dtype).eps  # one unit: the interpreter truncates to bfloat16, a GPU rounds
    torch.testing.assert_close(own.float(), packed, rtol=eps, atol=eps * torch.finfo(dtype).tiny)
    assert (own[2] == 0).all() and (own[[0, 1, 3, 4]] != 0).any(1).all()


def test_a_gradient_over_the_logits():
    launch = kernels("triton")
    x = rows_of(4, 9001)
    stats, g = stats_of(x), torch.ones(4, device=DEVICE)
    own = torch.empty_like(x.logits)
    launch.token_logprobs_backward(x, stats, own, g, None)
    launch.token_logprobs_backward(x, stats, x.logits, g, None)
    assert torch.equal(own, x.logits)


def test_statistics_reproduce_the_probabilities():
    """`p_j = exp((w_j - shift) * factor) * inv_sum`, csrc/args.h."""
    x = rows_of(3, 9001, transform=Transform.of(0.7, None, 0.5))
    _, _, shift, inv_sum = (s[:, None] for s in stats_of(x).buffer)
    p = ((x.logits - shift).double() * 0.5 / 0.7).exp() * inv_sum
    torch.testing.assert_close(p, (x.logits.double() * 0.5 / 0.7).softmax(-1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bad", [-1, -100, 300, 2**40])
def test_an_id_outside_the_vocabulary_gives_nan(bad):
    launch = kernels("triton")
    x = rows_of(3, 300)
    x.ids[1] = bad
    stats = stats_of(x)
    assert stats.logprobs.isnan().tolist() == [False, True, False]
    out = torch.empty_like(x.logits)
    launch.token_logprobs_backward(x, stats, out, torch.ones(3, device=DEVICE), None)
    assert out.isnan().all(1).tolist() == [False, True, False] and out[[0, 2]].isfinite().all()


def epilogue(x, constants, scalars=SCALARS, out=None, **optional):
    fields = dict.fromkeys(("weights", "ref_logprobs", "row_weight")) | optional
    stats = RowStats.empty(x.ids.numel(), DEVICE)
    out = torch.empty_like(x.logits) if out is None else out
    active = kernels("triton").ppo_epilogue(x, stats, PpoRows(scalars, *constants, *fields.values()), out)
    return stats, out, active


def test_an_invalid_id_with_a_zero_advantage_gives_nan():
    """The slope of a policy gradient does not depend on the log-prob, so the NaN must come from the id."""
    x = rows_of(2, 300)
    x.ids[1] = 300
    zeros = torch.zeros(2, device=DEVICE)
    scalars = PpoScalars.of(PPOArguments(objective="policy_gradient"))
    _, out, active = epilogue(x, (zeros, zeros), scalars)
    assert active.tolist() == [False, True] and out.isnan().all(1).tolist() == [False, True]


def test_the_epilogue_equals_forward_and_backward():
    """Masked rows and rows without a gradient are zeros for any content; other rows equal the two launchers' results."""
    mask = torch.tensor([True, True, False, True, True])
    x = rows_of(
        5, 9001, mask=mask, transform=Transform.of(torch.tensor([1.0, 0.5, torch.nan, 2.0, 1.5], device=DEVICE))
    )
    plain = stats_of(x)
    assert (plain.buffer[:, 2] == 0).all()
    x.logits[2], x.ids[2] = torch.nan, -7
    old = plain.logprobs - torch.tensor([0.0, 1.0, torch.nan, 0.0, 0.1], device=DEVICE)  # row 1 is clipped
    a = torch.tensor([1.0, 1.0, torch.nan, 0.0, -2.0], device=DEVICE)  # row 3 has no advantage
    expected = torch.empty_like(x.logits)
    g = torch.where(a.isnan() | (torch.arange(5, device=DEVICE) == 1), 0, -a * (plain.logprobs - old).exp())
    kernels("triton").token_logprobs_backward(x, plain, expected, g, None)
    for out in (None, front_of(x.logits, torch.float16), x.logits):
        kept = x.logits.clone()
        stats, gradient, active = epilogue(x, (old, a), out=out)
        assert torch.equal(stats.buffer, plain.buffer)
        assert active.tolist() == [True, False, False, False, True]
        torch.testing.assert_close(gradient, expected.to(gradient.dtype), rtol=1e-5, atol=1e-7)
        assert (gradient[1:4] == 0).all()
        x.logits.copy_(kept)


def test_an_entropy_term_without_an_advantage_keeps_a_row_active():
    x = rows_of(3, 203)
    zero = torch.zeros(3, device=DEVICE)
    weight = torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
    scalars = PpoScalars.of(PPOArguments(entropy_coef=0.05))
    stats, out, active = epilogue(x, (stats_of(x).logprobs, zero), scalars, row_weight=weight)
    expected = torch.empty_like(x.logits)
    kernels("triton").token_logprobs_backward(x, stats, expected, None, -0.05 * weight)
    assert active.tolist() == [True, False, True] and torch.equal(out, expected)


@pytest.mark.parametrize("marks", ["", "0", "1", "0001", "1000", "0110100", "1111", "0000", "010101010101"])
@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_marked_rows_move_to_the_front(monkeypatch, marks, tile, dtype):
    """Each front place holds the row that `source` names, every marked row is there once, and rows that stay are unchanged."""
    monkeypatch.setattr(compaction, "TILE", tile)
    n = len(marks)
    buffer = torch.randn(n, 5001, device=DEVICE)
    x = front_of(buffer, dtype)
    before = x.clone()
    active = torch.tensor([m == "1" for m in marks], dtype=torch.bool, device=DEVICE)
    source = kernels("triton").compact_rows(x, active)
    assert sorted(source.tolist()) == active.nonzero().flatten().tolist()
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(x[: len(source)].view(bits), before[source].view(bits))
    assert all(origin == place for place, origin in enumerate(source.tolist()) if marks[place] == "1")

"""A function as objective: agreement with the named objectives and float64, rows in the products, errors by name."""

from functools import partial

import pytest
import torch

from rlhf_kernels import METRICS, linear_ppo_loss, linear_token_logprobs, logits_ppo_loss, ppo_loss, reference

from .helpers.bounds import check_error
from .helpers.gpu import to_device
from .helpers.head_loss import FLAGS, check_loss
from .helpers.head_loss import run as run_head
from .helpers.heads import differentiate, make
from .helpers.objective import case, run


def clip(logprobs, old_logprobs, advantages):
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def sequence_ratio(logprobs, old_logprobs, advantages, *, sequence, counts):
    """Return `-r A` with one ratio per sequence, the mean of the log-ratios over the tokens that count."""
    counts = counts.to(logprobs.dtype)
    totals, lengths = (x.new_zeros(8).index_add(0, sequence, x) for x in ((logprobs - old_logprobs) * counts, counts))
    return -(totals / lengths.clamp(min=1))[sequence].exp() * advantages


def scaled(logprobs, old_logprobs, advantages, *, scale):
    """Return a loss that no named objective has, and whose derivative is 0 for some tokens."""
    return (scale * (logprobs - old_logprobs).clamp(-0.2, 0.3)).sinh() * advantages - 0.1 * logprobs * (scale > 0.5)


SETTINGS = [
    {},
    {"entropy_coef": 0.02},
    {"aggregation": "seq_mean_token_mean", "entropy_coef": 0.02, "kl_coef": 0.1, "kl_weighting": "ratio"},
    {"aggregation": "seq_mean_token_sum", "kl_coef": 0.1, "num_sequences": 7, "vf_coef": 0.5},
    {"aggregation": "token_sum", "num_tokens": 100},
]


def agree(got, expected, gradients, expected_gradients):
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=1e-7)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=2e-6 * scale, msg=name)
    for name in set(METRICS) - {"clipfrac"}:
        torch.testing.assert_close(got.metrics[name], expected.metrics[name], rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_clip_written_as_a_function_is_clip(options, backend):
    """All terms, weights and metrics are those of the named objective."""
    loss = partial(ppo_loss, backend=backend)
    inputs, constants = map(to_device, case(0))
    expected = run(loss, inputs, constants, options)
    got = run(loss, inputs, constants, options | {"objective": clip})
    agree(got[0], expected[0], got[1], expected[1])


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("options", SETTINGS[:3], ids=str)
@pytest.mark.parametrize(("backend", "compact"), [("auto", None), ("triton", None), ("triton", True)])
def test_clip_written_as_a_function_is_clip_in_the_head(flags, options, backend, compact):
    leaves, constants, extra = map(to_device, make(0, t=20))
    constants["advantages"][:, ::3] = 0
    options = options | {k: extra[k] for k in FLAGS[flags]} | {"ref_logprobs": extra["ref_logprobs"]}
    loss = partial(linear_ppo_loss, backend=backend, compact=compact)
    expected = run_head(loss, leaves, constants, options, torch.float32)
    got = run_head(loss, leaves, constants, options | {"objective": clip}, torch.float32)
    agree(got[0], expected[0], got[1], expected[1])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_logits(backend):
    leaves, constants, extra = map(to_device, make(1, t=20))
    logits, results = leaves["hidden"] @ leaves["weight"].t(), []
    options = {"entropy_coef": 0.05, "softcap": 3.0, "temperature": extra["temperature"], "backend": backend}
    for objective in ("clip", clip):
        leaf = {"logits": logits.clone().requires_grad_()}
        result = logits_ppo_loss(**leaf, **constants, **options, objective=objective)
        results.append((result, differentiate(result.loss, leaf, 0.37)))
    (expected, gradients), (got, got_gradients) = results
    agree(got, expected, got_gradients, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [None, 33])
def test_head_matches_float64(dtype, chunk_tokens):
    leaves, constants, extra = make(2, dtype, b=8, t=40)
    scale = torch.linspace(0, 1, 320).view(8, 40)
    options = {k: extra[k] for k in FLAGS["everything"]} | {"kl_coef": 0.1, "aggregation": "seq_mean_token_mean"}
    options |= {"objective": scaled, "objective_inputs": {"scale": scale}}
    # The eager results are for several orders of the vocabulary, and each needs its own dtype of the inputs.
    check_loss(linear_ppo_loss, leaves, constants, options, dtype, {"chunk_tokens": chunk_tokens})


def test_matches_float64():
    inputs, constants = case(3)
    scale = torch.linspace(0, 1, 200).view(5, 40)
    options = {"objective": scaled, "aggregation": "seq_mean_token_mean", "kl_coef": 0.1}
    results = [
        run(function, inputs, constants, options | {"objective_inputs": {"scale": scale.to(dtype)}}, dtype)
        for function, dtype in (
            (ppo_loss, torch.float32),
            (reference.ppo_loss, torch.float32),
            (reference.ppo_loss, torch.float64),
        )
    ]
    (got, gradients), (eager, eager_gradients), (exact, exact_gradients) = results
    check_error("loss", got.loss, eager.loss, exact.loss)
    for name, gradient in gradients.items():
        check_error(name, gradient, eager_gradients[name], exact_gradients[name])
    for name in METRICS:
        torch.testing.assert_close(got.metrics[name], exact.metrics[name], rtol=2e-5, atol=2e-6)
    assert 0 < got.metrics["active_fraction"] <= 1


def packed_case():
    """Return a padded batch, the same batch packed, and where its tokens are in the padded one."""
    inputs, constants = case(4)
    lengths = torch.tensor([40, 1, 0, 17, 40])
    inside = torch.arange(40) < lengths[:, None]
    constants["mask"] &= inside
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    short = [{k: v[inside] for k, v in tensors.items()} for tensors in (inputs, constants)]
    return (inputs, constants), (short[0], short[1] | {"cu_seqlens": cu}), inside


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_a_loss_that_combines_tokens(aggregation):
    """The coefficient of a token includes the losses of other tokens, with their weights; packed equals padded."""
    padded, packed, inside = packed_case()
    sequence = torch.arange(5)[:, None].expand(5, 40)
    shared = {"aggregation": aggregation, "kl_coef": 0.1}
    expected = run(ppo_loss, *padded, shared | {"objective": "ratio", "ratio_level": "sequence"})
    for (inputs, constants), where in ((padded, ...), (packed, inside)):
        extra = {"sequence": sequence[where], "counts": constants["mask"]}
        options = shared | {"objective": sequence_ratio, "objective_inputs": extra}
        got, gradients = run(ppo_loss, inputs, constants, options)
        torch.testing.assert_close(got.loss, expected[0].loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[1][name][where], rtol=1e-5, atol=1e-8)


def test_masked_tokens_do_not_matter():
    """Their tensors may be NaN, and an infinite derivative there is not used."""
    inputs, constants = case(5)

    def root(logprobs, old_logprobs, advantages, *, floor):
        return (-logprobs - floor).sqrt() * advantages

    options = {"objective": root, "objective_inputs": {"floor": torch.full((5, 40), 0.5)}}
    clean = run(ppo_loss, inputs, constants, options)
    dirty = []
    for tensors in (inputs, constants, options["objective_inputs"]):
        dirty.append(
            {k: v if k == "mask" else torch.where(constants["mask"], v, torch.nan) for k, v in tensors.items()}
        )
    got = run(ppo_loss, *dirty[:2], options | {"objective_inputs": dirty[2]})
    assert torch.equal(clean[0].loss, got[0].loss)
    for name, gradient in got[1].items():
        assert torch.equal(gradient, clean[1][name]) and (gradient[~constants["mask"]] == 0).all()


def test_rows_in_the_products(monkeypatch):
    """The log-prob pass has the unmasked rows, and the other three products only the rows with a coefficient."""
    leaves, constants, _ = make(6, b=8, t=40)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    seen, mm = [], torch.mm

    def counted(a, b, **kwargs):
        seen.append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)

    def sparse(logprobs, old_logprobs, advantages, *, keep):
        return torch.where(keep, -logprobs * advantages, 0)

    keep = torch.arange(40).expand(8, 40) % 4 == 0
    constants["advantages"] = torch.ones(8, 40)
    options = {"objective": sparse, "objective_inputs": {"keep": keep}, "chunk_tokens": 32}
    result, gradients = run_head(linear_ppo_loss, leaves, constants, options, torch.float32)
    count, active = int(constants["mask"].sum()), int((constants["mask"] & keep).sum())
    vocabulary, hidden = leaves["weight"].shape
    forward = sum(a[0] for a, b in seen if b == (hidden, vocabulary))
    assert count + active <= forward < count + active + 32  # the last chunk of each pass is padded to 16 rows
    assert sum(a[0] for a, b in seen if b == (vocabulary, hidden)) == active
    assert all(max(a[0], 1) <= 32 or a[0] == vocabulary for a, b in seen)
    assert result.metrics["active_fraction"].item() == pytest.approx(active / count)
    assert (gradients["hidden"][~(constants["mask"] & keep)] == 0).all()


def test_clipped_tokens_of_gmpo_are_in_no_backward_product(monkeypatch):
    leaves, constants, _ = make(6, b=8, t=40)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    logprobs = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    far = torch.arange(40) % 4 > 0
    constants |= {"old_logprobs": torch.where(far, logprobs - 1, logprobs), "advantages": torch.ones(8, 40)}
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: (seen.append((a.shape, b.shape)), mm(a, b, **k))[1])
    options = {"objective": "gmpo", "aggregation": "seq_mean_token_mean"}
    result, gradients = run_head(linear_ppo_loss, leaves, constants, options, torch.float32)
    active, (vocabulary, hidden) = constants["mask"] & ~far, leaves["weight"].shape
    assert [a[0] for a, b in seen if b == (hidden, vocabulary)] == [int(constants["mask"].sum())]
    assert [a[0] for a, b in seen if b == (vocabulary, hidden)] == [int(active.sum())]
    assert (gradients["hidden"][~active] == 0).all() and (gradients["hidden"][active] != 0).any(-1).all()
    assert result.metrics["clipfrac"].item() == pytest.approx(1 - active.sum().item() / constants["mask"].sum().item())


def test_gradient_modes():
    """The function is differentiated under no_grad and inference_mode too, where the loss has no gradient."""
    inputs, constants = case(7)
    rest = {k: constants[k] for k in ("old_logprobs", "advantages", "mask")}
    expected = ppo_loss(inputs["logprobs"], **rest, objective=clip)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = ppo_loss(inputs["logprobs"] * 1, **rest, objective=clip)
            assert torch.equal(got.loss, expected.loss) and not got.loss.requires_grad


def test_compiles_with_a_break():
    """A compiler does not trace the function; the rest of the call is compiled."""
    inputs, constants = case(8)
    rest = {k: constants[k] for k in ("old_logprobs", "advantages", "mask")}
    traced = []

    def eager_clip(*tensors):
        traced.append(torch.compiler.is_compiling())
        return clip(*tensors)

    def loss(x):
        return ppo_loss(x, **rest, objective=eager_clip).loss

    x = inputs["logprobs"].requires_grad_()
    expected, got = loss(x), torch.compile(loss, backend="aot_eager")(x)
    assert torch.equal(got, expected) and traced == [False, False]
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (expected, got)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda p, q, a: (-a * p).mean(),
            r"<lambda> returned a scalar, expected one loss per token, \(6\); leave out the reduction",
        ),
        (lambda p, q, a: (-a * p)[1:], r"<lambda> returned shape \(5\), expected one loss per token, \(6\)"),
        (lambda p, q, a: (-a * p).view(2, 3), r"<lambda> returned shape \(2, 3\), expected one loss per token, \(6\)"),
        (lambda p, q, a: ((-a * p), {}), r"<lambda> returned tuple, expected one loss per token, \(6\)"),
        (lambda p, q, a: a > 0, r"<lambda> returned torch.bool, expected a floating point tensor"),
        (lambda p, q, a: -a * p.detach(), "the result of <lambda> does not depend on logprobs"),
        (lambda p, q, a: -a, "the result of <lambda> does not depend on logprobs"),
        (lambda p, q, a: -a * torch.log(p), "<lambda> returned nan for token 1, expected finite numbers"),
        (lambda p, q, a: (p - q).sqrt(), "<lambda> has the derivative inf for token 1, expected finite numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", ["ppo_loss", "linear_ppo_loss", "logits_ppo_loss"])
def test_mistakes_in_the_function_are_named(function, message, backend, op):
    mask = torch.tensor([[False, True, True]] * 2)
    x = torch.full((2, 3), -1.0).requires_grad_()
    arguments = {"advantages": torch.ones(2, 3), "mask": mask, "objective": function, "backend": backend}
    hidden = torch.zeros(2, 3, 4, requires_grad=True)
    ids, uniform = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -1.0)
    with pytest.raises(ValueError, match=f"^objective: .*{message}"):
        if op == "ppo_loss":
            ppo_loss(x, old_logprobs=uniform, **arguments).loss.backward()
        elif op == "linear_ppo_loss":
            old = torch.full((2, 3), 0.2).log()
            linear_ppo_loss(hidden, torch.zeros(5, 4), ids, old, **arguments).loss.backward()
        else:
            logits_ppo_loss(hidden, ids, torch.full((2, 3), 0.25).log(), **arguments).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective_inputs": {"x": torch.zeros(2, 3)}}, "objective_inputs is set, but objective='clip' reads none"),
        ({"objective": clip, "objective_inputs": [1]}, "objective_inputs: got list, expected a dict of tensors"),
        ({"objective": clip, "objective_inputs": {"x": 0.5}}, r"objective_inputs\['x'\]: got float, expected a tensor"),
        (
            {"objective": clip, "objective_inputs": {"x": torch.zeros(3)}},
            r"objective_inputs\['x'\]: got shape \(3\), expected \(2, 3\)",
        ),
        ({"objective": clip, "cliprange": 0.3}, "cliprange: got 0.3 with objective=clip; only 'clip', 'cispo'"),
        ({"objective": clip, "ratio_level": "sequence"}, "ratio_level: got 'sequence' with objective=clip; only"),
        ({"objective": clip, "log_ratio_clamp": 3.0}, "log_ratio_clamp: got 3.0 with objective=clip; only"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_in_the_call_are_named(options, message):
    zero = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        ppo_loss(zero, zero, zero, torch.ones(2, 3, dtype=torch.bool), **options)


def test_an_input_that_the_function_does_not_take():
    zero = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"clip\(\) got an unexpected keyword argument 'x'"):
        ppo_loss(
            zero,
            zero,
            zero,
            torch.ones(2, 3, dtype=torch.bool),
            objective=clip,
            objective_inputs={"x": torch.zeros(2, 3)},
        )

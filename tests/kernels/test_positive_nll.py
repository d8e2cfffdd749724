"""Minus the log-prob of positive examples next to the objective: numbers by hand, float64, separate calls, mistakes."""

import math

import pytest
import torch

from rlhf_kernels import NLL_METRICS, TERM_METRICS, linear_ppo_loss, logits_ppo_loss, ppo_loss
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.ops.fused_logits_loss import why_two_passes

from .helpers.gpu import to_device
from .helpers.head_loss import check_loss, chosen_of, run
from .helpers.heads import make

BACKENDS = ["reference", "cpu", "triton"]


def positive(seed=0, **sizes):
    """Return a batch with positive tokens inside and outside of the mask; outside, what only the objective reads is NaN."""
    leaves, constants, extra = make(seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    mask = constants["mask"]
    for name in ("old_logprobs", "advantages"):
        constants[name] = constants[name].masked_fill(~mask, torch.nan)
    for name in ("weights", "returns", "old_values", "ref_logprobs"):
        extra[name] = extra[name].masked_fill(~mask, torch.nan)
    nll_mask = (torch.rand(mask.shape, generator=g) < 0.4) & (torch.arange(len(mask)) % 3 > 0)[:, None]
    return leaves, constants, extra, {"nll_mask": nll_mask, "nll_coef": 0.25}


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_by_hand(backend):
    """Ratio e^.1 and positive, ratio 1, only positive, neither; the mean of -log π over two tokens is 3/2."""
    nan = math.nan
    logprobs = torch.tensor([-1.0, -1.5, -2.0, nan], requires_grad=True)
    result = ppo_loss(
        logprobs,
        torch.tensor([-1.1, -1.5, nan, nan]),
        torch.tensor([2.0, -1.0, nan, nan]),
        torch.tensor([True, True, False, False]),
        nll_mask=torch.tensor([True, False, True, False]),
        nll_coef=0.1,
        backend=backend,
    )
    result.loss.backward()
    policy = (-2 * math.exp(0.1) + 1) / 2
    assert result.loss.item() == pytest.approx(policy + 0.1 * 1.5, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1) - 0.05, 0.5, -0.05, 0], rel=1e-5)
    expected = {"policy_loss": policy, "nll_loss": 1.5, "num_nll_tokens": 2, "num_tokens": 2, "active_fraction": 1}
    assert {name: result.metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not result.metrics.keys() & set(TERM_METRICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["clip_higher_dual", "entropy_kl", "k2", "policy_gradient", "sequence", "gmpo"])
def test_matches_float64(options, dtype):
    leaves, constants, extra, nll = positive(3, dtype=dtype, b=6, t=20)
    chosen = chosen_of("everything", options, extra) | nll
    check_loss(linear_ppo_loss, leaves, constants, chosen, dtype, {"chunk_tokens": 32})


@pytest.mark.parametrize(("options", "compact"), [("clip_higher_dual", None), ("sequence", True)])
def test_matches_float64_on_a_gpu(options, compact):
    leaves, constants, extra, nll = map(to_device, positive(4, t=10))
    chosen = chosen_of("everything", options, extra) | nll
    how = {"chunk_tokens": 16, "compact": compact, "backend": "triton"}
    check_loss(linear_ppo_loss, leaves, constants, chosen, torch.float32, how)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_second_call(packed, aggregation, backend):
    """The loss and the gradients are those of the objective and of REINFORCE with advantage `nll_coef` in separate calls."""
    leaves, constants, extra, nll = positive(5, b=5, t=12)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    shape = {"aggregation": aggregation}
    g = torch.Generator().manual_seed(0)
    terms = {
        "term": torch.randint(0, 3, constants["mask"].shape, generator=g),
        "term_weights": torch.rand(constants["mask"].shape, generator=g),
        "ref_logprobs": extra["ref_logprobs"],
    }
    if packed:
        leaves["hidden"] = leaves["hidden"].flatten(0, 1)
        constants, nll, terms = (
            {k: x.flatten(0, 1) if torch.is_tensor(x) else x for k, x in y.items()} for y in (constants, nll, terms)
        )
        shape["cu_seqlens"] = torch.tensor([0, 5, 5, 31, 60], dtype=torch.int32)
    dtype = torch.float64 if backend == "reference" else torch.float32
    factor = {"advantages": torch.full_like(constants["advantages"], nll["nll_coef"]), "mask": nll["nll_mask"]}
    second = {"objective": "policy_gradient", "weights": terms["term_weights"]}
    first, gradients = run(linear_ppo_loss, leaves, constants, shape | terms, torch.float64)
    more, others = run(linear_ppo_loss, leaves, constants | factor, shape | second, torch.float64)
    got, found = run(linear_ppo_loss, leaves, constants, shape | terms | nll | {"backend": backend}, dtype)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    assert got.loss.item() == pytest.approx((first.loss + more.loss).item(), rel=bound)
    for name, x in found.items():
        expected = gradients[name] + others[name]
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=bound * expected.abs().max().item(), msg=name)
    for name in first.metrics:
        torch.testing.assert_close(got.metrics[name], first.metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    assert got.metrics.keys() - first.metrics.keys() == set(NLL_METRICS)
    assert got.metrics["nll_loss"].item() * nll["nll_coef"] == pytest.approx(more.loss.item(), rel=1e-5)


def test_micro_batches_add_up():
    leaves, constants, _, nll = positive(6, b=6, t=12)
    whole, gradients = run(linear_ppo_loss, leaves, constants, nll, torch.float32)
    nll |= {name: whole.metrics[name].item() for name in ("num_tokens", "num_nll_tokens")}
    parts = []
    for rows in (slice(0, 1), slice(1, 6)):  # the first sequence has no positive token
        cut = [{k: x[rows] if torch.is_tensor(x) else x for k, x in y.items()} for y in (constants, nll)]
        parts.append(run(linear_ppo_loss, leaves | {"hidden": leaves["hidden"][rows]}, *cut, torch.float32))
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    torch.testing.assert_close(sum(found["weight"] for _, found in parts), gradients["weight"], rtol=1e-4, atol=1e-6)
    for name in NLL_METRICS:
        torch.testing.assert_close(sum(part.metrics[name] for part, _ in parts), whole.metrics[name])


@pytest.mark.parametrize("coef", [0.0, 0.2])
def test_rows_in_the_products(coef, monkeypatch):
    """A positive token outside of the mask has a gradient; with coefficient 0, or an advantage of 0, a token has none."""
    leaves, constants, _, nll = positive(7, b=8, t=40)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    constants["advantages"] = (torch.arange(40) % 2).float().expand(8, 40).clone()
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: (seen.append((a.shape, b.shape)), mm(a, b, **k))[1])
    options = nll | {"objective": "policy_gradient", "nll_coef": coef}
    result, gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    (v, h), mask = leaves["weight"].shape, constants["mask"]
    active = mask & (constants["advantages"] != 0)
    if coef:
        active |= nll["nll_mask"]
    assert [a[0] for a, b in seen if b == (h, v)] == [int((mask | nll["nll_mask"]).sum())]
    assert [a[0] for a, b in seen if b == (v, h)] == [int(active.sum())]
    assert (gradients["hidden"][~active] == 0).all() and (gradients["hidden"][active] != 0).any(-1).all()
    assert result.metrics["nll_loss"] > 1


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("objective", ["clip", "function"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_logits_and_a_function(op, objective, backend):
    leaves, constants, _, nll = positive(8, t=8)

    def squared(logprobs, old_logprobs, advantages):
        return (logprobs - old_logprobs).square() * advantages

    options = nll | {"objective": squared if objective == "function" else objective, "entropy_coef": 0.02}
    found = []
    for chosen, dtype in (("reference", torch.float64), (backend, torch.float32)):
        x = [leaves[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight")]
        arguments = {k: y.to(dtype) if y.is_floating_point() else y for k, y in constants.items()} | options
        if op == "linear":
            result = linear_ppo_loss(*x, **arguments, backend=chosen)
        else:
            result = logits_ppo_loss(x[0] @ x[1].T, **arguments, backend=chosen)
        result.loss.backward()
        found.append((result, x[0].grad.double()))
    (exact, gradient), (got, approximate) = found
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(approximate, gradient, rtol=1e-4, atol=1e-6)
    for name in ("active_fraction", "policy_loss", "nll_loss"):
        torch.testing.assert_close(got.metrics[name], exact.metrics[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("advantage", "coef"), [(0.0, 1e-6), (1e-6, 1e-6), (1e5, 1.0)], ids=str)
def test_half_precision(advantage, coef):
    """Small coefficients do not underflow, and advantages that float16 does not hold change no positive token."""
    leaves, constants, _, nll = positive(9, dtype=torch.float16)
    advantages = torch.full_like(constants["advantages"], advantage)
    options = nll | {"nll_coef": coef, "objective": "policy_gradient"}
    found = []
    for dtype in (torch.float16, torch.float64):
        x = leaves["hidden"].to(dtype).clone().requires_grad_()
        wide = {k: y.double() if y.is_floating_point() else y for k, y in constants.items()}
        loss = linear_ppo_loss(x, leaves["weight"].to(dtype), **wide | {"advantages": advantages}, **options).loss
        found.append(torch.autograd.grad(loss * 1e6 / max(advantage, 1), x)[0].double())
    half, exact = (x[nll["nll_mask"]] for x in found)
    assert ((half - exact).norm(dim=-1) <= 0.05 * exact.norm(dim=-1)).all()


def test_no_positive_token_gives_the_loss_without():
    leaves, constants, _, nll = positive(12, t=8)
    nll["nll_mask"] = torch.zeros_like(nll["nll_mask"])
    (got, found), (expected, gradients) = (
        run(linear_ppo_loss, leaves, constants, options, torch.float32) for options in (nll, {})
    )
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(found["weight"], gradients["weight"])
    assert got.metrics["nll_loss"] == 0 and got.metrics["num_nll_tokens"] == 0


def test_the_cuda_kernel_of_logits_leaves_positive_examples_to_triton():
    args = PPOArguments(nll_mask=torch.ones(2, dtype=torch.bool))
    assert why_two_passes(args, torch.zeros(2, 3), False) == (
        "got nll_mask, expected None, because the kernel computes the objective only"
    )


ON, HALVES = torch.ones(4, dtype=torch.bool), torch.full((4,), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nll_mask": HALVES}, r"nll_mask: got dtype torch.float32, expected torch.bool"),
        ({"nll_mask": ON[:2]}, r"nll_mask: got shape \(2\), expected \(4,\) = the token shape of logprobs"),
        ({"nll_coef": 0.1}, r"nll_mask is not set, but nll_coef=0.1 needs it"),
        ({"num_nll_tokens": 3}, r"num_nll_tokens is set, but nll_mask is not"),
        ({"nll_mask": ON, "nll_coef": -0.1}, r"nll_coef: got -0.1, expected at least 0"),
        ({"nll_mask": ON, "num_nll_tokens": -1}, r"num_nll_tokens: got -1, expected at least 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(options, message):
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=message):
        ppo_loss(-ones, -ones, ones, ones.bool(), **options)


def test_mistakes_of_the_head_are_named():
    leaves, constants, _, nll = positive(13, t=8)
    head = leaves["hidden"], leaves["weight"]
    with pytest.raises(ValueError, match=r"nll_mask: got shape \(4, 7\), expected \(4, 8\) = the shape of mask"):
        linear_ppo_loss(*head, **constants, nll_mask=nll["nll_mask"][:, :7])
    outside = nll["nll_mask"] & ~constants["mask"]
    constants["ids"] = constants["ids"].masked_fill(outside, 500)
    linear_ppo_loss(*head, **constants)
    with pytest.raises(ValueError, match=r"ids: got 500, expected ids in \[0, 203\) wherever the mask is True"):
        linear_ppo_loss(*head, **constants, **nll)

"""Tokens with different terms in one batch: against separate calls, float64 and numbers by hand; metrics, mistakes."""

import math

import pytest
import torch

from rlhf_kernels import TERM_METRICS, Term, linear_ppo_loss, logits_ppo_loss, ppo_loss
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.ops.fused_logits_loss import why_two_passes

from .helpers.compiled import compile_whole
from .helpers.gpu import to_device
from .helpers.head_loss import OPTIONS, check_loss, chosen_of, run
from .helpers.heads import make

BACKENDS = ["reference", "cpu", "triton"]
SOME = (
    "clip_higher_dual",
    "entropy_kl",
    "kl_penalty",
    "policy_gradient",
    "k2",
    "sequence",
    "weighted_kl",
    "gmpo",
    "softcap",
)


def mixed(seed=0, **sizes):
    """Return a batch and options: three terms, one factor per token, and NaN where a token's term does not read a number."""
    leaves, constants, extra = make(seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    shape = constants["mask"].shape
    term = torch.randint(0, 3, shape, generator=g)
    for name in ("old_logprobs", "advantages"):
        constants[name] = constants[name].masked_fill(term != Term.RL, torch.nan)
    for name in ("weights", "returns", "old_values"):
        extra[name] = extra[name].masked_fill(term != Term.RL, torch.nan)
    extra["ref_logprobs"] = extra["ref_logprobs"].masked_fill(term == Term.CROSS_ENTROPY, torch.nan)
    return leaves, constants, extra, {"term": term, "term_weights": torch.rand(shape, generator=g) + 0.5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_by_hand(backend):
    """An RL token with ratio e^.1, a cross-entropy of 2, a KL (k3) with log-ratio .2, and an RL token with ratio 1."""
    nan = math.nan
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -1.5], requires_grad=True)
    old_logprobs, advantages = torch.tensor([-1.1, nan, nan, -1.5]), torch.tensor([2.0, nan, nan, -1.0])
    term = torch.tensor([Term.RL, Term.CROSS_ENTROPY, Term.KL, Term.RL])
    result = ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        torch.ones(4, dtype=torch.bool),
        term=term,
        term_weights=torch.tensor([1.0, 0.5, 1.0, 1.0]),
        ref_logprobs=torch.tensor([-1.1, nan, -0.7, -1.5]),
        backend=backend,
    )
    result.loss.backward()
    policy, kl = (-2 * math.exp(0.1) + 1) / 2, math.exp(-0.2) - 0.8
    assert result.loss.item() == pytest.approx(policy + 0.5 * 2 + kl, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1), -0.5, 1 - math.exp(-0.2), 0.5], rel=1e-5)
    expected = {
        "policy_loss": policy,
        "cross_entropy_loss": 1.0,
        "kl_loss": kl,
        "ratio_mean": (math.exp(0.1) + 1) / 2,
        "approx_kl": -0.05,
        "num_tokens": 2,
        "num_cross_entropy_tokens": 1,
        "num_kl_tokens": 1,
        "active_fraction": 1,
    }
    assert {name: result.metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_matches_float64(options, dtype, chunk_tokens):
    leaves, constants, extra, terms = mixed(sorted(OPTIONS).index(options), dtype=dtype, b=6, t=40)
    chosen = chosen_of("everything", options, extra) | terms
    check_loss(linear_ppo_loss, leaves, constants, chosen, dtype, {"chunk_tokens": chunk_tokens})


@pytest.mark.parametrize("options", ["clip_higher_dual", "sequence"])
@pytest.mark.parametrize("compact", [True, None])
def test_matches_float64_on_a_gpu(options, compact):
    leaves, constants, extra, terms = map(to_device, mixed(3, t=10))
    chosen = chosen_of("everything", options, extra) | terms
    how = {"chunk_tokens": 16, "compact": compact, "backend": "triton"}
    check_loss(linear_ppo_loss, leaves, constants, chosen, torch.float32, how)


def separate(leaves, constants, chosen, term, weights, kl_estimator="k3"):
    """Return loss and gradients of three calls, each with the mask of its tokens and its own weights."""
    mask, ones = constants["mask"], torch.ones_like(constants["old_logprobs"])
    own = {k: x for k, x in chosen.items() if k in ("aggregation", "cu_seqlens", "num_sequences")}
    plain = {"old_logprobs": ones, "objective": "policy_gradient", "weights": weights}
    calls = {
        Term.RL: chosen | {k: constants[k] for k in ("old_logprobs", "advantages")} | {"term_weights": weights},
        Term.CROSS_ENTROPY: own | plain | {"advantages": ones},
        Term.KL: own
        | {"old_logprobs": ones, "advantages": 0 * ones, "objective": "policy_gradient", "kl_coef": 1.0}
        | {"kl_estimator": kl_estimator, "ref_logprobs": chosen["ref_logprobs"], "term_weights": weights},
    }
    total, gradients = 0, {}
    for code, options in calls.items():
        arguments = {"ids": constants["ids"], "mask": mask & (term == code)}
        arguments |= {k: options.pop(k) for k in ("old_logprobs", "advantages")}
        leaves_of = leaves if code == Term.RL else {k: x for k, x in leaves.items() if not k.startswith("value")}
        result, found = run(linear_ppo_loss, leaves_of, arguments, options, torch.float64)
        total = total + result.loss
        gradients = {k: gradients.get(k, 0) + x for k, x in found.items()} | {
            k: x for k, x in gradients.items() if k not in found
        }
    return total, gradients


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"])
@pytest.mark.parametrize(
    "options", [{}, {"ratio_level": "sequence"}, {"objective": "gmpo", "kl_estimator": "k1"}], ids=str
)
def test_equals_separate_calls(options, aggregation, backend):
    """One call has the loss and the gradients of an RL loss, a cross-entropy and a KL on their own tokens."""
    leaves, constants, extra, terms = mixed(8, b=5, t=24)
    chosen = {k: extra[k] for k in ("returns", "old_values", "ref_logprobs", "weights")} | options
    chosen |= {"aggregation": aggregation, "entropy_coef": 0.02, "kl_coef": 0.1}
    exact, gradients = separate(leaves, constants, chosen, *terms.values(), options.get("kl_estimator", "k3"))
    dtype = torch.float64 if backend == "reference" else torch.float32
    got, found = run(linear_ppo_loss, leaves, constants, chosen | terms | {"backend": backend}, dtype)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    assert got.loss.item() == pytest.approx(exact.item(), rel=bound, abs=bound)
    for name, x in found.items():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(x.double(), gradients[name], rtol=0, atol=bound * scale, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_metrics_count_rl_tokens_only(backend, packed):
    """Other tokens change no metric of the objective, and their own metrics are the other parts of the loss."""
    leaves, constants, extra, terms = mixed(9, t=12)
    options = {"ratio_level": "sequence", "aggregation": "seq_mean_token_mean", "ref_logprobs": extra["ref_logprobs"]}
    if packed:
        leaves = leaves | {"hidden": leaves["hidden"].flatten(0, 1)}
        constants, options, terms = (
            {k: x.flatten(0, 1) if torch.is_tensor(x) else x for k, x in y.items()} for y in (constants, options, terms)
        )
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 30, 48], dtype=torch.int32)
    head = {k: leaves[k] for k in ("hidden", "weight")}
    got = linear_ppo_loss(**head, **constants, **options, **terms, backend=backend)
    rl = constants | {"mask": constants["mask"] & (terms["term"] == Term.RL)}
    options["term_weights"] = terms["term_weights"]
    expected = linear_ppo_loss(**head, **rl, **options, backend=backend)
    assert got.metrics.keys() - expected.metrics.keys() == set(TERM_METRICS)
    for name in expected.metrics:
        torch.testing.assert_close(got.metrics[name], expected.metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    parts = sum(got.metrics[name] for name in ("policy_loss", "cross_entropy_loss", "kl_loss"))
    torch.testing.assert_close(got.loss, parts)
    for code, name in ((Term.CROSS_ENTROPY, "num_cross_entropy_tokens"), (Term.KL, "num_kl_tokens")):
        assert got.metrics[name] == (constants["mask"] & (terms["term"] == code)).sum()


def test_micro_batches_add_up():
    leaves, constants, extra, terms = mixed(10, b=6, t=20)
    chosen = {"ref_logprobs": extra["ref_logprobs"], "kl_coef": 0.1} | terms
    whole, gradients = run(linear_ppo_loss, leaves, constants, chosen, torch.float32)
    totals = ("num_tokens", "num_cross_entropy_tokens", "num_kl_tokens")
    chosen |= {name: whole.metrics[name].item() for name in totals}
    parts = []
    for rows in (slice(0, 1), slice(1, 6)):
        cut = [{k: x[rows] if torch.is_tensor(x) else x for k, x in y.items()} for y in (constants, chosen)]
        parts.append(run(linear_ppo_loss, leaves | {"hidden": leaves["hidden"][rows]}, *cut, torch.float32))
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    torch.testing.assert_close(sum(found["weight"] for _, found in parts), gradients["weight"], rtol=1e-4, atol=1e-6)
    for name in whole.metrics.keys() - {"ratio_max"}:
        total = sum(part.metrics[name] for part, _ in parts)
        torch.testing.assert_close(total, whole.metrics[name], rtol=1e-4, atol=1e-6, msg=name)


def test_rows_in_the_products(monkeypatch):
    """Three products; a token of any term whose weight is 0 is in no backward product."""
    leaves, constants, extra, terms = mixed(11, b=8, t=40)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    constants["advantages"] = torch.ones(8, 40)
    terms["term_weights"][:, ::2] = 0
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: (seen.append((a.shape, b.shape)), mm(a, b, **k))[1])
    options = terms | {"objective": "policy_gradient", "ref_logprobs": extra["ref_logprobs"]}
    _, gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    (v, h), mask = leaves["weight"].shape, constants["mask"]
    active = mask & (terms["term_weights"] != 0)
    assert [a[0] for a, b in seen if b == (h, v)] == [int(mask.sum())]
    assert [a[0] for a, b in seen if b == (v, h)] == [int(active.sum())]
    assert (gradients["hidden"][~active] == 0).all() and (gradients["hidden"][active] != 0).any(-1).all()


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_function_and_tokens_of_other_terms(op, backend):
    """Every loss of a sequence depends on all log-probs, so tokens with weight 0 have a gradient as well."""
    leaves, constants, extra, terms = mixed(12, t=8)
    terms["term_weights"][:, ::2] = 0

    def together(logprobs, old_logprobs, advantages):
        return -(logprobs - old_logprobs).mean() * advantages

    head = leaves["hidden"], leaves["weight"]
    options = {"objective": together, "ref_logprobs": extra["ref_logprobs"], "kl_coef": 0.1, "entropy_coef": 0.02}
    found = []
    for chosen, dtype in (("reference", torch.float64), (backend, torch.float32)):
        x = [y.to(dtype).clone().requires_grad_() for y in head]
        arguments = {k: y.to(dtype) if y.is_floating_point() else y for k, y in constants.items()}
        if op == "linear":
            result = linear_ppo_loss(*x, **arguments, **options, **terms, backend=chosen)
        else:
            result = logits_ppo_loss(x[0] @ x[1].T, **arguments, **options, **terms, backend=chosen)
        result.loss.backward()
        found.append((result, x[0].grad.double()))
    (exact, gradient), (got, approximate) = found
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(approximate, gradient, rtol=1e-4, atol=1e-6)
    for name in ("active_fraction", "policy_loss", "cross_entropy_loss", "kl_loss"):
        torch.testing.assert_close(got.metrics[name], exact.metrics[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("code", Term)
def test_small_weights_do_not_underflow_in_half_precision(code):
    leaves, constants, extra, terms = mixed(13, dtype=torch.float16)
    constants = {k: torch.nan_to_num(x, 1.0) for k, x in constants.items() if k != "mask"} | {"mask": constants["mask"]}
    term, small = torch.full_like(terms["term"], code), torch.full_like(terms["term_weights"], 1e-6)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        x = leaves["hidden"].to(dtype).clone().requires_grad_()
        ref = torch.nan_to_num(extra["ref_logprobs"], -3.0)
        wide = {k: y.double() if y.is_floating_point() else y for k, y in constants.items()}
        options = {"term": term, "term_weights": small, "ref_logprobs": ref, "objective": "policy_gradient"}
        loss = linear_ppo_loss(x, leaves["weight"].to(dtype), **wide, **options).loss
        gradients.append(torch.autograd.grad(1e6 * loss, x)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 0.01 * gradients[1].norm()


def scaled_terms(advantage, rl):
    """Return hidden states, a weight, and the arguments of six tokens: RL, one cross-entropy, and KL far from the reference."""
    g = torch.Generator().manual_seed(0)
    leaves = torch.randn(6, 16, generator=g).half(), (0.3 * torch.randn(23, 16, generator=g)).half()
    term = torch.tensor([0, 0, 0, 1, 1, 2]) if rl else torch.tensor([1, 1, 1, 1, 1, 2])
    constants = {
        "ids": torch.tensor([3, 1, 4, 1, 5, 9]),
        "old_logprobs": torch.full((6,), -3.0),
        "advantages": torch.full((6,), advantage),
        "mask": torch.ones(6, dtype=torch.bool),
        "objective": "policy_gradient",
        "term": term,
        "term_weights": torch.full((6,), 1.0 if rl else min(advantage, 1e4)),
        "ref_logprobs": torch.full((6,), -2.0),
    }
    return leaves, constants


@pytest.mark.parametrize("advantage", [1e-3, 1e5], ids=["small", "large"])
@pytest.mark.parametrize("rl", [True, False], ids=["next to RL", "no RL"])
def test_coefficients_outside_of_half_precision_change_no_other_term(advantage, rl):
    """The pass relative to the largest coefficient has the tokens of every term."""
    leaves, constants = scaled_terms(advantage, rl)
    found = {}
    for dtype in (torch.float16, torch.float32):
        hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_() for x in leaves)
        result = linear_ppo_loss(hidden, weight, **constants)
        result.loss.backward()
        found[dtype] = hidden.grad.float()
    for half, single in zip(found[torch.float16], found[torch.float32], strict=True):  # of each token
        assert 0 < (half - single).norm() < 0.03 * single.norm()


def test_codes_that_the_host_does_not_see_give_nan(monkeypatch):
    """On a GPU a check would wait for the device, so an unknown code, or a KL without reference, gives NaN."""
    monkeypatch.setattr("rlhf_kernels.ops.checks.values_visible", lambda x: False)
    logprobs, zeros = torch.full((3,), -1.0, requires_grad=True), torch.zeros(3)
    for code in (3, -1, Term.KL):
        term = torch.tensor([Term.RL, code, Term.CROSS_ENTROPY])
        result = ppo_loss(logprobs, zeros - 1, zeros + 1, torch.ones(3, dtype=torch.bool), term=term)
        (gradient,) = torch.autograd.grad(result.loss, logprobs)
        assert result.loss.isnan() and gradient.isnan().tolist() == [False, True, False]


def test_compiles_as_one_graph():
    leaves, constants, extra, terms = mixed(14, t=8)
    options = {"ref_logprobs": extra["ref_logprobs"]} | terms | {"nll_mask": terms["term"] > 0, "nll_coef": 0.1}

    def loss(hidden, weight):
        return linear_ppo_loss(hidden, weight, **constants, **options).loss

    x = [leaves[k].clone().requires_grad_() for k in ("hidden", "weight")]
    expected, got = (torch.autograd.grad(function(*x), x) for function in (loss, compile_whole(loss)))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cuda_kernel_of_logits_leaves_terms_to_triton():
    args = PPOArguments(term=torch.zeros(2, dtype=torch.int64))
    assert why_two_passes(args, torch.zeros(2, 3), False) == (
        "got term, expected None, because the kernel computes the objective only"
    )


LONG, HALVES = torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"term": LONG + 3}, r"term: got 3 for a token, expected 0 = RL, 1 = CROSS_ENTROPY, 2 = KL"),
        ({"term": LONG - 1}, r"term: got -1 for a token"),
        ({"term": LONG[:3]}, r"term: got shape \(3\), expected \(4,\) = the token shape of logprobs"),
        ({"term": HALVES}, r"term: got dtype torch.float32, expected torch.int64 or torch.int32"),
        ({"term": LONG + 2}, r"ref_logprobs is not set, but tokens with Term.KL need it"),
        ({"term_weights": HALVES[:2]}, r"term_weights: got shape \(2\), expected \(4,\)"),
        ({"term_weights": LONG}, r"term_weights: got dtype torch.int64"),
        ({"num_kl_tokens": 3}, r"num_kl_tokens is set, but term is not"),
        ({"num_cross_entropy_tokens": 3}, r"num_cross_entropy_tokens is set, but term is not"),
        ({"term": LONG, "num_kl_tokens": -1}, r"num_kl_tokens: got -1, expected at least 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(options, message, backend):
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=message):
        ppo_loss(-ones, -ones, ones, ones.bool(), **options, backend=backend)


def test_a_masked_token_may_have_any_code():
    ones, mask = torch.ones(4), torch.tensor([True, False, True, True])
    term = torch.tensor([Term.RL, 7, Term.CROSS_ENTROPY, Term.RL])
    assert ppo_loss(-ones, -ones, ones, mask, term=term).loss.item() == pytest.approx(-1 + 1)

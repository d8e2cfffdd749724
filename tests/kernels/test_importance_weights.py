"""`importance_weights` and `off_policy_sequence_mask`: by hand, float64, packed batches, the losses that use them, errors."""

import math

import pytest
import torch

from rlhf_kernels import (
    IMPORTANCE_METRICS,
    importance_weights,
    linear_ppo_loss,
    linear_token_logprobs,
    off_policy_sequence_mask,
    ppo_loss,
    reference,
)

from .helpers.bounds import check_error
from .helpers.heads import make
from .helpers.selections import LEVELS, RULES, batch, packed

BACKENDS = ("reference", "cpu")
# Ratios 2 and 1/4 of the first sequence, 1 and 1/2 (a third token is masked) of the second.
RATIOS = torch.tensor([[2.0, 0.25, 1.0], [1.0, 0.5, 9.0]])
MASK = torch.tensor([[True, True, False], [True, True, False]])


def weigh(backend, **options):
    sampler = torch.full((2, 3), -1.5)
    return importance_weights(RATIOS.log() + sampler, sampler, MASK, **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "weights", "kept"),
    [
        ({"high": 1.5}, [[1.5, 0.25, 0], [1, 0.5, 0]], None),
        ({"high": None}, [[2, 0.25, 0], [1, 0.5, 0]], None),
        ({"action": "clip", "low": 0.4, "high": 1.5}, [[1.5, 0.4, 0], [1, 0.5, 0]], None),
        ({"action": "mask", "low": 0.4, "high": 1.5}, [[0, 0, 0], [1, 0.5, 0]], [[0, 0, 0], [1, 1, 0]]),
        ({"action": "mask", "low": 0.4, "high": None}, [[2, 0, 0], [1, 0.5, 0]], [[1, 0, 0], [1, 1, 0]]),
        # k1 = -log r: -0.69, 1.39, 0, 0.69
        ({"action": "mask", "metric": "k1", "low": -1, "high": 1}, [[2, 0, 0], [1, 0.5, 0]], [[1, 0, 0], [1, 1, 0]]),
        # k2 = 0.24, 0.96, 0, 0.24
        ({"action": "mask", "metric": "k2", "high": 0.5}, [[2, 0, 0], [1, 0.5, 0]], [[1, 0, 0], [1, 1, 0]]),
        # k3 = r - 1 - log r: 0.307, 0.636, 0, 0.193
        ({"action": "mask", "metric": "k3", "high": 0.25}, [[0, 0, 0], [1, 0.5, 0]], [[0, 0, 0], [1, 1, 0]]),
        ({"level": "sequence", "high": None}, [[0.5, 0.5, 0], [0.5, 0.5, 0]], None),
        ({"level": "geometric", "high": None}, [[0.5**0.5] * 2 + [0], [0.5**0.5] * 2 + [0]], None),
        ({"level": "sequence", "action": "clip", "low": 0.6, "high": 2}, [[0.6, 0.6, 0], [0.6, 0.6, 0]], None),
        # sums of k3: 0.943, 0.193; their means: 0.472, 0.097
        (
            {"level": "sequence", "action": "mask", "metric": "k3", "high": 0.8},
            [[0, 0, 0], [0.5, 0.5, 0]],
            [[0, 0, 0], [1, 1, 0]],
        ),
        (
            {"level": "geometric", "action": "mask", "metric": "k3", "high": 0.3},
            [[0, 0, 0], [0.5**0.5] * 2 + [0]],
            [[0, 0, 0], [1, 1, 0]],
        ),
    ],
)
def test_by_hand(isa, backend, options, weights, kept):
    got = weigh(backend, **options)
    torch.testing.assert_close(got.weights, torch.tensor(weights, dtype=torch.float32))
    assert torch.equal(got.mask, MASK if kept is None else torch.tensor(kept).bool())
    assert got.weights.dtype == torch.float32 and not got.weights.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_are_inclusive(isa, backend):
    """A ratio of exactly 1 is within [1, 1]."""
    x = torch.tensor([[-0.5, -2.0]])
    got = importance_weights(x, x, torch.tensor([[True, True]]), action="mask", low=1, high=1, backend=backend)
    assert got.mask.all() and got.metrics["rejected_share"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_by_hand(isa, backend):
    """Ratios 2, 1/4, 1, 1/2; the weights of "mask" are 0, 0, 1, 1/2."""
    got = weigh(backend, action="mask", low=0.4, high=1.5).metrics
    expected = {
        "ess": 1.5**2 / (4 * 1.25),
        "chi2": (4 + 1 / 16 + 1 + 1 / 4) / 4 - 1,
        "mismatch_kl": 2 * math.log(2) / 4,
        "mismatch_k3": (2 + 0.25 + 1 + 0.5 - 4 + 2 * math.log(2)) / 4,
        "mismatch_max": math.log(4),
        "rejected_share": 0.5,
        "below_share": 0.25,
        "above_share": 0.25,
        "weight_mean": 1.5 / 4,
        "weight_max": 1.0,
        "num_tokens": 4,
    }
    assert tuple(got) == IMPORTANCE_METRICS
    assert {k: float(x) for k, x in got.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_sequences_by_hand(isa, backend):
    """At the level of sequences, a sequence is one unit: 1/2 and 4 here, of three tokens and of one."""
    logprobs = torch.tensor([[0.5, 2.0, 0.5], [4.0, 1.0, 1.0]]).log()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros = torch.zeros(2, 3)
    got = importance_weights(logprobs, zeros, mask, level="sequence", action="mask", low=1, high=8, backend=backend)
    expected = {"ess": 0.5, "chi2": (0.25 + 16) / 2 - 1, "below_share": 0.5, "above_share": 0.0, "rejected_share": 0.75}
    expected |= {"weight_mean": 2.0, "weight_max": 4.0, "num_tokens": 4}
    assert {k: float(got.metrics[k]) for k in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (5, 40), (3, 3000)])
def test_against_float64(isa, level, rule, b, t):
    data = batch(b, t, seed=t)
    got = importance_weights(**data, level=level, **rule, backend="cpu")
    eager = importance_weights(**data, level=level, **rule, backend="reference")
    wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
    exact = importance_weights(**wide, level=level, **rule)
    assert torch.equal(got.mask, exact.mask)
    check_error("weights", got.weights, eager.weights, exact.weights)
    for name in IMPORTANCE_METRICS:
        assert float(got.metrics[name]) == pytest.approx(float(exact.metrics[name]), rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_gives_the_results_of_padded(isa, level, backend):
    lengths, data = torch.tensor([0, 1, 40, 17, 0, 23]), batch(6, 40)
    data["mask"] = data["mask"] & (torch.arange(40) < lengths[:, None])
    rule = {"action": "mask", "low": 0.9, "high": 1.1, "level": level, "backend": backend}
    padded, (tokens, ends) = importance_weights(**data, **rule), packed(data, lengths)
    got = importance_weights(**tokens, **rule, cu_seqlens=ends)
    inside = torch.arange(40) < lengths[:, None]
    torch.testing.assert_close(got.weights, padded.weights[inside])
    assert torch.equal(got.mask, padded.mask[inside])
    for name in IMPORTANCE_METRICS:
        torch.testing.assert_close(got.metrics[name], padded.metrics[name])
    if level == "token":
        whole = importance_weights(**tokens, **rule)
        assert torch.equal(whole.weights, got.weights)


def test_repeated_calls_give_the_same_bits(isa):
    data = batch(9, 2000)
    first = importance_weights(**data, high=1.1, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    second = importance_weights(**data, high=1.1, backend="cpu")
    torch.set_num_threads(before)
    assert torch.equal(first.weights, second.weights)
    assert all(torch.equal(first.metrics[k], second.metrics[k]) for k in IMPORTANCE_METRICS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_and_nonfinite_log_probs(isa, backend, level):
    """Ratios are limited to exp(±20). A NaN fails the bounds and shows in the metrics."""
    logprobs, mask = torch.tensor([[0.0], [-100.0], [-math.inf]]), torch.ones(3, 1, dtype=torch.bool)
    sampler = torch.tensor([[-100.0], [0.0], [0.0]])
    got = importance_weights(logprobs, sampler, mask, level=level, high=None, backend=backend)
    expected = torch.tensor([20.0, -20.0, -20.0]).exp()[:, None]
    torch.testing.assert_close(got.weights, expected, rtol=1e-5, atol=0)
    bad = torch.tensor([[math.nan], [0.0], [0.0]])
    got = importance_weights(bad, torch.zeros(3, 1), mask, level=level, action="mask", high=2, backend=backend)
    assert got.mask.flatten().tolist() == [False, True, True]
    assert got.weights.flatten().tolist() == [0, 1, 1]
    assert got.metrics["mismatch_kl"].isnan() and got.metrics["rejected_share"].item() == pytest.approx(1 / 3)
    got = importance_weights(bad, torch.zeros(3, 1), mask, level=level, high=2, backend=backend)
    assert got.weights[0].isnan() and got.metrics["weight_max"].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(isa, backend):
    for shape in ((0, 3), (3, 0), (2, 3)):
        x, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for level in LEVELS:
            got = importance_weights(x, x, mask, level=level, high=2, backend=backend)
            assert got.weights.shape == shape and not got.weights.any() and not got.mask.any()
            assert all(value == 0 for value in got.metrics.values())


def test_strides_and_half_precision(isa):
    data = batch(4, 10)
    moved = {k: x.T.contiguous().T for k, x in data.items()}
    expected = importance_weights(**data, high=1.1)
    assert torch.equal(importance_weights(**moved, high=1.1).weights, expected.weights)
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in data.items()}
    wide = {k: x.float() if x.is_floating_point() else x for k, x in half.items()}
    got = importance_weights(**half, high=1.1)
    assert got.weights.dtype == torch.float32
    assert torch.equal(got.weights, importance_weights(**wide, high=1.1).weights)


# ---- with the losses ----


@pytest.fixture
def products(monkeypatch):
    """Shapes of the operands of every matrix product of the head."""
    seen = []
    mm = torch.mm

    def counted(a, b, **kwargs):
        seen.append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    return seen


@pytest.mark.parametrize("by", ["weights", "mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_rejected_rows_are_free_in_the_fused_head(products, by, level):
    """Rows with weight 0 are in no backward product; rows outside the mask are in no product at all."""
    leaves, constants, _ = make(5, b=16, t=40, drift=0.0)
    hidden, weight = (leaves[k].requires_grad_() for k in ("hidden", "weight"))
    old = linear_token_logprobs(hidden, weight, constants["ids"]).logprobs.detach()
    sampler = old + 0.05 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    width = {"token": 0.02, "sequence": 0.1, "geometric": 0.005}[level]
    bounds = {"low": 1 - width, "high": 1 + width}
    found = importance_weights(old, sampler, constants["mask"], level=level, action="mask", **bounds)
    kept, counted = int(found.mask.sum()), int(constants["mask"].sum())
    assert 0 < kept < 0.7 * counted
    constants |= {"old_logprobs": old, "advantages": torch.ones_like(old)}
    constants |= {"weights": found.weights} if by == "weights" else {"mask": found.mask}
    products.clear()
    linear_ppo_loss(hidden, weight, **constants, chunk_tokens=32).loss.backward()
    vocabulary, width = weight.shape
    forward = sum(a[0] for a, b in products if b == (width, vocabulary))
    assert sum(a[0] for a, b in products if b == (vocabulary, width)) == kept
    most = counted if by == "weights" else kept
    assert most <= forward < most + 16  # the last chunk is padded up to 16 rows


@pytest.mark.parametrize("by", ["weights", "mask"])
@pytest.mark.parametrize("head", [False, True])
def test_bounds_that_exclude_everything(products, by, head):
    """The weights are 0, the metrics report it, and loss and gradients are 0."""
    leaves, constants, _ = make(6)
    hidden, weight = (leaves[k].requires_grad_() for k in ("hidden", "weight"))
    logprobs = linear_token_logprobs(hidden, weight, constants["ids"]).logprobs
    old = constants["old_logprobs"]
    found = importance_weights(old, old, constants["mask"], action="mask", low=5, high=6)
    assert not found.weights.any() and not found.mask.any()
    assert found.metrics["rejected_share"] == 1 and found.metrics["ess"] == 0
    constants |= {"weights": found.weights} if by == "weights" else {"mask": found.mask}
    products.clear()
    if head:
        loss = linear_ppo_loss(hidden, weight, **constants).loss
    else:
        constants.pop("ids")
        loss = ppo_loss(logprobs, **constants).loss
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and not any(x.any() for x in gradients)
    if head:  # no product for the mask, one to find the log-probs for the weights
        assert len(products) == (by == "weights")


def test_the_mask_of_one_call_is_the_mask_of_the_next():
    """The "seq-mask-tis" of NeMo-RL and OpenRLHF: token weights without bounds, for sequences whose mean is in bounds."""
    data = batch(30, 20, drift=0.2)
    kept = importance_weights(**data, level="geometric", action="mask", low=0.95, high=1.05).mask
    got = importance_weights(**data | {"mask": kept}, high=None)
    d = torch.where(data["mask"], data["logprobs"] - data["sampler_logprobs"], 0)
    mean = (d.sum(1) / data["mask"].sum(1).clamp(min=1)).exp()
    inside = ((mean >= 0.95) & (mean <= 1.05))[:, None] & data["mask"]
    assert 0 < inside.any(1).sum() < 29
    assert torch.equal(got.mask, inside)
    torch.testing.assert_close(got.weights, torch.where(inside, d.exp(), 0))


# ---- off_policy_sequence_mask ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_off_policy_mask_by_hand(isa, backend):
    """Mean KL 0.3, 0.3 and 0.1: only a sequence above 0.2 is dropped, where its advantage is negative."""
    logprobs = torch.tensor([[-1.2, -1.4, -9.0], [-1.6, -1.0, -9.0], [-1.1, -1.1, -1.1]])
    mask = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
    advantages = torch.tensor([[-1.0, -1.0, -1.0], [2.0, -0.5, -1.0], [-1.0, -1.0, -1.0]])
    sampler = torch.full((3, 3), -1.0)
    got = off_policy_sequence_mask(logprobs, sampler, advantages, mask, max_kl=0.2, backend=backend)
    assert got.mask.tolist() == [[False, False, False], [True, False, False], [True, True, True]]
    expected = {"mismatch_kl": 1.5 / 7, "rejected_share": 3 / 7, "above_share": 2 / 3, "num_tokens": 7}
    assert {k: float(got.metrics[k]) for k in expected} == pytest.approx(expected, rel=1e-5)
    everything = off_policy_sequence_mask(logprobs, sampler, advantages, mask, max_kl=0.31, backend=backend)
    assert torch.equal(everything.mask, mask) and everything.metrics["rejected_share"] == 0


def test_off_policy_mask_against_the_formula(isa):
    data = batch(20, 30)
    advantages = torch.randn(20, 1, generator=torch.Generator().manual_seed(3)).expand(20, 30)
    got = off_policy_sequence_mask(**data, advantages=advantages, max_kl=0.01)
    apart = torch.where(data["mask"], data["sampler_logprobs"] - data["logprobs"], 0).double()
    far = apart.sum(1, keepdim=True) / data["mask"].sum(1, keepdim=True).clamp(min=1) > 0.01
    expected = data["mask"] & ~(far & (advantages < 0))
    assert torch.equal(got.mask, expected) and 0 < expected.sum() < data["mask"].sum()
    tokens, ends = packed(data | {"advantages": advantages}, torch.full((20,), 30))
    assert torch.equal(off_policy_sequence_mask(**tokens, max_kl=0.01, cu_seqlens=ends).mask, expected.flatten())


# ---- errors ----


def call(function=importance_weights, **change):
    x = torch.zeros(2, 3)
    given = {"logprobs": x, "sampler_logprobs": x, "mask": x.bool()}
    given |= {"high": 2.0} if function is importance_weights else {"advantages": x, "max_kl": 0.1}
    return function(**given | change)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("sampler_logprobs is not set; pass", {"sampler_logprobs": None}),
        (r"sampler_logprobs: got shape \(2, 2\), expected \(2, 3\)", {"sampler_logprobs": torch.zeros(2, 2)}),
        ("logprobs: got list", {"logprobs": [0.0]}),
        ("mask: got dtype torch.float32", {"mask": torch.zeros(2, 3)}),
        ("low: got 3.0 with high=2.0, expected at most high", {"action": "clip", "low": 3.0}),
        ("level: got 'sequences', expected one of .*; did you mean 'sequence'?", {"level": "sequences"}),
        ("action: got 'truncated', expected one of .*; did you mean 'truncate'?", {"action": "truncated"}),
        ("metric: got 'k4', expected one of", {"metric": "k4"}),
        ("metric: got 'k3' with action='truncate', expected 'ratio'", {"metric": "k3"}),
        ("low: got 0.5 with action='truncate', which has no lower bound", {"low": 0.5}),
        ("low and high are not set, but action='mask' needs", {"action": "mask", "high": None}),
        ("high: got -1.0, expected at least 0", {"high": -1.0}),
        ("high: got inf, expected a finite number", {"high": math.inf}),
        ("backend: got 'fast'", {"backend": "fast"}),
        (r"cu_seqlens: got \[0, 5\]", {k: torch.zeros(6) for k in ("logprobs", "sampler_logprobs")}
            | {"mask": torch.zeros(6).bool(), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}),
        (r"logprobs: got shape \(6\), expected \[B, T\], or \[N\] together with cu_seqlens",
            {k: torch.zeros(6) for k in ("logprobs", "sampler_logprobs")}
            | {"mask": torch.zeros(6).bool(), "level": "sequence"}),
    ],
)  # fmt: skip
def test_mistakes_are_named(message, change):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**change)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("sampler_logprobs is not set", {"sampler_logprobs": None}),
        (r"advantages: got shape \(2\)", {"advantages": torch.zeros(2)}),
        ("max_kl: got -0.1, expected at least 0", {"max_kl": -0.1}),
        ("max_kl: got nan, expected a finite number", {"max_kl": math.nan}),
    ],
)
def test_mistakes_of_the_off_policy_mask_are_named(message, change):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(off_policy_sequence_mask, **change)


def test_registered_op_and_compile():
    data = batch(4, 9)
    tensors = (*data.values(), torch.randn(4, 9), None)
    torch.library.opcheck(
        torch.ops.rlhf_kernels.importance_weights.default, (*tensors, 1, 1, 0, 0.5, 2.0, "cpu"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    rule = {"level": "geometric", "action": "mask", "low": 0.9, "high": 1.1}
    compiled = torch.compile(lambda a, b, m: importance_weights(a, b, m, **rule), fullgraph=True, backend="aot_eager")
    got, expected = compiled(*data.values()), importance_weights(**data, **rule)
    assert torch.equal(got.weights, expected.weights) and torch.equal(got.mask, expected.mask)


def test_no_gradient():
    data = batch(2, 5)
    got = importance_weights(**data | {"logprobs": data["logprobs"].requires_grad_()}, high=2)
    assert not got.weights.requires_grad
    exact = reference.importance_weights(**batch(2, 5), high=2.0)
    torch.testing.assert_close(got.weights, exact.weights)

"""verl's registered policy losses against their formulas in float64: loss, gradient, metrics and options by name.

B sequences, T positions. `make test-peers` compares them with the originals.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_kernels.integrations import verl

LOW, HIGH, LIMIT = 0.1, 0.3, 1.2
CLIPFRAC, KL, LOWER = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"


class ActorConfig(SimpleNamespace):
    """The fields of verl's ActorConfig that a policy loss reads."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def config(policy_loss: dict | None = None, **changes: Any) -> ActorConfig:
    chosen = {
        "clip_cov_ratio": 0.2,
        "clip_cov_lb": 0.05,
        "clip_cov_ub": 3.0,
        "kl_cov_ratio": 0.2,
        "ppo_kl_coef": 0.7,
        "dro_beta": 0.3,
    } | (policy_loss or {})
    fields = {
        "clip_ratio": 0.2,
        "clip_ratio_low": LOW,
        "clip_ratio_high": HIGH,
        "clip_ratio_c": LIMIT,
        "tau_pos": 0.7,
        "tau_neg": 1.4,
        "global_batch_info": {},
        "policy_loss": SimpleNamespace(**chosen),
    }
    return ActorConfig(**fields | changes)


def batch(b: int = 6, t: int = 9):
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(b, t, generator=g) - 0.05
    new = (old + 0.4 * torch.randn(b, t, generator=g)).clamp(max=-1e-3)
    advantages = torch.randn(b, t, generator=g) + 0.5
    advantages[0, 0] = 0
    mask = torch.rand(b, t, generator=g) < 0.7
    mask[:, 0] = True
    mask[1] = False  # a response without an action
    return old, new, advantages, mask.float(), torch.rand(b, t, generator=g) + 0.5


def per_row(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def clipped(r, a, low=LOW, high=HIGH):
    return torch.maximum(-r * a, -r.clamp(1 - low, 1 + high) * a)


def largest(a, new, mask, count):
    """Return which `count` tokens have the largest covariance of advantage and log-prob."""
    mean = [(x * mask).sum() / mask.sum() for x in (a, new)]
    covariance = ((a - mean[0]) * (new - mean[1])).masked_fill(mask == 0, -math.inf)
    return torch.zeros_like(a).view(-1).index_fill(0, covariance.view(-1).topk(count).indices, 1.0).view_as(a)


def binary(name, new, old):
    p, q = new.exp(), old.exp()
    return (p - q).abs() if name == "tv" else q * (old - new) + (1 - q) * ((1 - q) / (1 - p)).log()


def dppo(name):
    def formula(new, old, a, mask):
        moved = new.detach() - old
        bound = torch.where(a > 0, HIGH / 10, LOW / 10)
        towards = torch.where(a > 0, moved > 0, moved < 0)
        kept = ~(towards & (binary(name, new.detach(), old) > bound))
        r = moved.exp()
        loss = -a * r.clamp(max=LIMIT) * new * kept
        return loss, {CLIPFRAC: ~kept, KL: -moved, LOWER: (r > LIMIT) & kept}

    return formula


def vanilla(new, old, a, mask):
    r = (new - old).exp()
    loss = clipped(r, a)
    dual = (a < 0) & (loss > -LIMIT * a)
    outside = torch.where(a > 0, r > 1 + HIGH, (a < 0) & (r < 1 - LOW))
    return torch.where(dual, -LIMIT * a, loss), {CLIPFRAC: outside, KL: old - new, LOWER: dual}


def gspo(new, old, a, mask):
    s = per_row(new.detach() - old, mask).exp() * (new - new.detach()).exp()
    outside = torch.where(a > 0, s > 1 + HIGH, (a < 0) & (s < 1 - LOW))
    return clipped(s, a), {CLIPFRAC: outside, KL: old - new, LOWER: 0 * new}


def sapo(new, old, a, mask):
    tau = torch.where(a > 0, 0.7, 1.4)
    gate = 4 / tau * torch.sigmoid(tau * ((new - old).exp() - 1))
    return -gate * a, {CLIPFRAC: 0 * new, KL: old - new, LOWER: 0 * new}


def gpg(new, old, a, mask):
    return -a * new, {}


def kl_cov(new, old, a, mask):
    chosen = largest(a, new.detach(), mask, int(mask.sum().item() * 0.2))
    return -a * (new - old).exp() + 0.7 * chosen * (new - old).abs(), {KL: (new - old).abs()}


def geo_mean(new, old, a, mask):
    d = new - old
    held = torch.where(a > 0, d.clamp(max=HIGH), torch.where(a < 0, d.clamp(min=-LOW), 0 * d))
    outside = (d > HIGH) | (d < -LOW)
    ratio = per_row(held, mask).exp()
    return -ratio * per_row(a, mask) + 0 * d, {CLIPFRAC: outside & (a > 0), KL: -d, LOWER: outside & (a < 0)}


def dro(new, old, a, mask):
    return -(a * new - 0.3 / 2 * (new - old) ** 2), {KL: old - new}


def cispo(new, old, a, mask):
    r = (new.detach() - old).exp()
    held = r.clamp(1 - LOW, 1 + HIGH)
    return -held * a * new, {CLIPFRAC: held != r, KL: old - new, LOWER: 0 * new}


FORMULAS = {
    "vanilla": vanilla,
    "dppo_tv": dppo("tv"),
    "dppo_kl": dppo("kl"),
    "gspo": gspo,
    "sapo": sapo,
    "gpg": gpg,
    "kl_cov": kl_cov,
    "geo_mean": geo_mean,
    "dro": dro,
    "cispo": cispo,
}
BY_SEQUENCE = ("gspo", "sapo")
"""Losses that are aggregated by sequence if `loss_agg_mode` is not passed; for `sapo` also if it is."""


def settings(name: str, **changes) -> ActorConfig:
    divergences = {"clip_ratio_low": LOW / 10, "clip_ratio_high": HIGH / 10} if name.startswith("dppo") else {}
    return config(**divergences | changes)


def aggregate(name, loss, mask, weights, counts):
    if name == "geo_mean":
        factor = per_row((weights + 1e-10).log(), mask).exp()
        return per_row(loss * factor, mask).mean()
    if name in BY_SEQUENCE:
        rows = counts.get("global_batch_size", (mask.sum(-1) > 0).sum())
        return per_row(loss * weights, mask).sum() / rows * counts.get("dp_size", 1)
    return (loss * weights * mask).sum() / counts.get("batch_num_tokens", mask.sum()) * counts.get("dp_size", 1)


def test_every_loss_of_verl_has_a_formula_here():
    """`clip_cov`, which draws tokens at random, has its own test."""
    assert set(verl.LOSSES) == set(FORMULAS) | {"clip_cov"}


@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9}])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_gradient_and_metrics(name, counts):
    old, new, a, mask, weights = batch()
    new = new.requires_grad_()
    loss, metrics = verl.LOSSES[name](
        old, new, a, mask, config=settings(name, global_batch_info=counts), rollout_is_weights=weights
    )
    (gradient,) = torch.autograd.grad(loss, new)
    wide = new.detach().double().requires_grad_()
    mask, weights = mask.double(), weights.double()
    terms, expected = FORMULAS[name](wide, old.double(), a.double(), mask)
    total = aggregate(name, terms, mask, weights, counts)
    (slope,) = torch.autograd.grad(total, wide)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=1e-6 * slope.abs().max().item())
    assert list(metrics) == list(expected)
    for key, x in expected.items():
        mean = ((x.double() * mask).sum() / mask.sum()).item()
        assert metrics[key] == pytest.approx(mean, rel=2e-6, abs=1e-7), key
    assert name in ("sapo", "gpg", "kl_cov", "dro") or metrics[CLIPFRAC] > 0


def test_clip_cov_drops_tokens_that_torch_draws():
    """One of the candidates, which the generator of torch draws, has no loss and no gradient."""
    old, new, a, mask, weights = batch()
    new = new.requires_grad_()
    chosen = config({"clip_cov_ratio": 0.03})  # int(0.03 * 35) = 1 token
    torch.manual_seed(5)
    loss, metrics = verl.compute_policy_loss_clip_cov(old, new, a, mask, config=chosen, rollout_is_weights=weights)
    (gradient,) = torch.autograd.grad(loss, new)
    r = (new.detach() - old).exp()
    mean = [(x * mask).sum() / mask.sum() for x in (a, new.detach())]
    covariance = (a - mean[0]) * (new.detach() - mean[1])
    free = ~torch.where(a > 0, r > 1 + HIGH, (a < 0) & (r < 1 - LOW)) & (mask > 0)
    found = torch.nonzero(free & (covariance > 0.05) & (covariance < 3))
    torch.manual_seed(5)
    row, column = found[torch.randperm(len(found))[0]]
    kept = mask.clone()
    kept[row, column] = 0
    assert len(found) > 3 and gradient[row, column] == 0
    assert loss.item() == pytest.approx(((clipped(r, a) * kept * weights).sum() / mask.sum()).item(), rel=1e-6)
    assert metrics == {
        CLIPFRAC: pytest.approx(1 / 35),
        KL: pytest.approx((-(r.log()) * mask).sum().item() / 35, rel=1e-5),
    }


def test_dppo_loss_by_hand():
    """π from .5 to .55, A = 1: inside a TV bound of .06, the loss is -1.1 log .55; outside a bound of .04 it is 0."""
    old, new = torch.tensor([[0.5]]).log(), torch.tensor([[0.55]]).log()
    one = torch.ones(1, 1)
    loss, metrics = verl.compute_policy_loss_dppo_tv(
        old, new, one, one, config=config(clip_ratio_high=0.06, clip_ratio_c=20.0)
    )
    assert loss.item() == pytest.approx(-1.1 * math.log(0.55)) and metrics[CLIPFRAC] == 0
    loss, metrics = verl.compute_policy_loss_dppo_tv(
        old, new, one, one, config=config(clip_ratio_high=0.04, clip_ratio_c=20.0)
    )
    assert loss.item() == 0 and metrics[CLIPFRAC] == 1
    limited, metrics = verl.compute_policy_loss_dppo_tv(
        old, new, one, one, config=config(clip_ratio_high=0.06, clip_ratio_c=1.05)
    )
    assert limited.item() == pytest.approx(-1.05 * math.log(0.55)) and metrics[LOWER] == 1


def test_gspo_limits_the_ratio_of_a_sequence_at_e_to_the_10():
    """With A = -1 and a mean log-ratio of 12, verl's loss is e^10 and has no gradient."""
    new = torch.tensor([[12.0, 12.0]], requires_grad=True)
    loss, _ = verl.compute_policy_loss_gspo(
        torch.zeros(1, 2), new, -torch.ones(1, 2), torch.ones(1, 2), config=config()
    )
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(10)) and not new.grad.any()


def test_aggregation_of_losses_by_sequence():
    """Log-probs are the old ones, and A is 1 in a response of one token, 4 in one of three. `gspo` can average over tokens."""
    zero = torch.zeros(2, 3)
    mask, a = torch.tensor([[1.0, 0, 0], [1, 1, 1]]), torch.tensor([[1.0], [4]]).expand(2, 3)
    for name, by_token in (("gspo", -13 / 4), ("sapo", None)):
        loss = verl.LOSSES[name]
        scale = 2 if name == "sapo" else 1  # the gate of a ratio of 1 is 2 with `tau_pos` 1
        by_row = pytest.approx(-2.5 * scale)
        assert loss(zero, zero, a, mask, config=config(tau_pos=1.0))[0].item() == by_row
        passed = loss(zero, zero, a, mask, "token-mean", config(tau_pos=1.0))[0].item()
        assert passed == (by_row if by_token is None else pytest.approx(by_token))


def test_geo_mean_counts_sequences_without_an_action():
    """Two sequences, one of them empty: the loss of the other, -A, is divided by 2."""
    zero, mask = torch.zeros(2, 3), torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    loss, _ = verl.compute_policy_loss_geo_mean(zero, zero, torch.full((2, 3), 4.0), mask, config=config())
    assert loss.item() == -2


@pytest.mark.parametrize("name", verl.LOSSES)
def test_half_precision(name):
    """Log-probs in bfloat16 give the loss and the metrics of the same numbers in float32."""
    old, new, a, mask, weights = batch()
    rounded = old.bfloat16(), new.bfloat16()
    results = []
    for pair in (rounded, (rounded[0].float(), rounded[1].float())):
        torch.manual_seed(0)
        found = verl.LOSSES[name](*pair, a, mask, config=settings(name), rollout_is_weights=weights)
        results.append((found[0].item(), *found[1].values()))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_an_empty_mask():
    """The loss is 0, and with `faithful` NaN as in verl, except for `geo_mean`, whose count is that of the rows."""
    x = torch.zeros(2, 3)
    for name, loss in verl.LOSSES.items():
        assert loss(x, x, x + 1, x, config=config())[0] == 0, name
        assert loss(x, x, x + 1, x, config=config(), faithful=True)[0].isnan() == (name != "geo_mean"), name


def test_a_loss_that_is_not_supported_is_refused_by_name():
    with pytest.raises(ValueError, match=r"loss: got 'bypass_mode', which verl supports .*importance_weights"):
        verl.register("bypass_mode", loss="bypass_mode")
    with pytest.raises(ValueError, match=r"loss: got 'cipso', expected one of .*'cispo'"):
        verl.register(loss="cipso")
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="config is not set; pass verl's ActorConfig"):
        verl.compute_policy_loss_cispo(x, x, x, x)
    with pytest.raises(ValueError, match=r"config\.policy_loss\.dro_beta is not set"):
        verl.compute_policy_loss_dro(x, x, x, x, config=config({"dro_beta": None}))
    with pytest.raises(ValueError, match=r"config\.policy_loss\.kl_cov_ratio: got 0"):
        verl.compute_policy_loss_kl_cov(x, x, x, x, config=config({"kl_cov_ratio": 0}))
    with pytest.raises(ValueError, match=r"advantages: got shape \(1, 1\), expected \(1, 2\)"):
        verl.compute_policy_loss_kl_cov(x, x, x[:, :1], x, config=config())
    with pytest.raises(ValueError, match="loss_agg_mode: got 'mean'"):
        verl.compute_policy_loss_gpg(x, x, x, x, "mean", config())

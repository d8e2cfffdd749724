"""The policy term of each token, for every objective of `ppo_loss`, in eager PyTorch; all tensors are (N,)."""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from .._options import Objective, ObjectiveFunction


class SurrogateOptions(TypedDict, total=False):
    """Keywords of `surrogate`."""

    objective: Objective | ObjectiveFunction
    cliprange: float
    cliprange_high: float | None
    dual_clip: float | None
    log_ratio_clamp: float | None
    old_kl_coef: float
    tau_pos: float
    tau_neg: float
    divergence: float | None
    divergence_high: float | None
    ratio_limit: float | None
    log_ratio_coef: float | None


class Surrogate(NamedTuple):
    """The policy term of each token with its derivatives. Only `loss` and `ratio` are differentiable.

    The derivatives are for the metric `active_fraction`, and for the ratio-weighted KL; autograd computes the gradient.
    """

    loss: Tensor
    slope: Tensor  # d loss / d log-ratio
    own: Tensor  # d loss / d log-prob except through the log-ratio
    ratio: Tensor
    live: Tensor  # d ratio / d log-ratio: 0 outside the clamp
    clipped: Tensor
    dual_clipped: Tensor


def surrogate(
    log_ratio: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    a: Tensor,
    *,
    objective: str | ObjectiveFunction = "clip",
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    old_kl_coef: float = 0.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    divergence: float | None = None,
    divergence_high: float | None = None,
    ratio_limit: float | None = None,
    log_ratio_coef: float | None = None,
) -> Surrogate:
    """Return the policy term of a named objective; the docstring of `ppo_loss` has the formulas."""
    assert isinstance(objective, str)
    never = torch.zeros_like(a, dtype=torch.bool)
    frozen = never
    if log_ratio_clamp is not None:
        frozen = log_ratio.abs() > log_ratio_clamp
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    r = log_ratio.exp()
    live = torch.where(frozen, 0, r.detach())
    ratio = Surrogate(-r * a, -live * a, torch.zeros_like(a), r, live, never, never)
    high = cliprange if cliprange_high is None else cliprange_high
    if objective in ("ratio", "gmpo"):
        return ratio
    if objective == "policy_gradient":
        return ratio._replace(loss=-a * logprobs, slope=torch.zeros_like(a), own=-a)
    if objective == "kl_penalty":
        old_kl = torch.expm1(log_ratio) - log_ratio
        slope = ratio.slope + old_kl_coef * torch.where(frozen, 0, live - 1)
        return ratio._replace(loss=ratio.loss + old_kl_coef * old_kl, slope=slope)
    if objective in ("clip", "gspo_token"):
        return _clip(ratio, a, 1 - cliprange, 1 + high, dual_clip)
    if objective == "cispo":
        factor = r.detach().clamp(1 - cliprange, 1 + high)
        own = -a * factor
        return ratio._replace(loss=own * logprobs, slope=torch.zeros_like(a), own=own, clipped=factor != r)
    if objective == "sapo":
        tau = torch.full_like(a, tau_neg).masked_fill(a > 0, tau_pos)
        gate = torch.sigmoid(tau * (r - 1))
        slope = -a * 4 * (gate * (1 - gate)).detach() * live
        return ratio._replace(loss=-a * gate * 4 / tau, slope=slope)
    bounds = {"ipo": 0.1, "dppo_tv": 0.2, "dppo_kl": 0.05}
    low = bounds[objective] if divergence is None else divergence
    limits = low, low if divergence_high is None else divergence_high
    outside = _is_outside(objective, logprobs.detach(), old_logprobs, a, *limits)
    factor = r if ratio_limit is None else r * (r.clamp(max=ratio_limit) / r).detach()
    coef = log_ratio_coef if log_ratio_coef is not None else 1e-3 if objective == "ipo" else 0.0
    policy = torch.where(outside, 0, -a * factor)
    slope = torch.where(frozen, 0, policy + 2 * coef * log_ratio).detach()
    return ratio._replace(loss=policy + coef * log_ratio.square(), slope=slope, clipped=outside)


def sequence_parts(
    log_ratio: Tensor,
    a: Tensor,
    *,
    objective: str | ObjectiveFunction = "clip",
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Return what each token contributes to the mean log-ratio of its sequence, and which tokens GMPO clips."""
    if objective != "gmpo":
        return log_ratio, torch.zeros_like(a, dtype=torch.bool)
    high = cliprange if cliprange_high is None else cliprange_high
    clipped = torch.where(a > 0, log_ratio > high, log_ratio < -cliprange)
    return torch.where(clipped, torch.full_like(a, -cliprange).masked_fill(a > 0, high), log_ratio), clipped


def _clip(ratio: Surrogate, a: Tensor, low: float, high: float, dual_clip: float | None) -> Surrogate:
    """Return `max(-r A, -clip(r, low, high) A)`, limited to `-dual_clip A` where A < 0."""
    clip = -a * ratio.ratio.clamp(low, high)
    clipped = clip > ratio.loss
    loss = torch.where(clipped, clip, ratio.loss)
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        dual_clipped = (a < 0) & (-a * dual_clip < loss)
        loss = torch.where(dual_clipped, -a * dual_clip, loss)
    slope = torch.where(clipped | dual_clipped, 0, ratio.slope)
    return ratio._replace(loss=loss, slope=slope, clipped=clipped, dual_clipped=dual_clipped)


def _is_outside(objective: str, new: Tensor, old: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    """Return which tokens are outside the trust region: the probability moved too far (ipo), or too far along A (dppo)."""
    moved = new.exp() - old.exp()
    if objective == "ipo":
        return moved.abs() > low
    limit = torch.full_like(a, low).masked_fill(a > 0, high)
    away = torch.where(a > 0, moved, -moved)
    if objective == "dppo_tv":
        return away > limit
    rest, old_rest = -torch.expm1(new), -torch.expm1(old)
    binary_kl = old.exp() * (old - new) + old_rest * torch.log((old_rest + 1e-8) / (rest + 1e-8))
    return (away > 0) & (binary_kl > limit)

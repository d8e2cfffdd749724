# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.tolist`.
"""The policy losses that verl registers, with verl's signature, names of options and metrics.

`LOSSES` has them by verl's `loss_mode`; `verl.register` registers one. B sequences, T positions. r is the ratio of new to
old probabilities, d the log-ratio, A the advantage. The docstring of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from .._options import Aggregation, PPOOptions
from ..ops import checks, kl_penalty, ppo_loss
from .conventions import AggregationOptions, counted, local_fraction, mean

_AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}
BY_SEQUENCE = "seq-mean-token-mean"
CLIPFRAC, KL, LOWER = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
Result = tuple[Tensor, dict[str, Tensor]]


class PolicyLoss(Protocol):
    """A policy loss of verl."""

    __name__: str

    def __call__(
        self,
        old_log_prob: Tensor,  # (B, T)
        log_prob: Tensor,  # (B, T), differentiable
        advantages: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T)
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, T)
        *,
        faithful: bool = False,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and the metrics that verl logs.

        `config` is verl's ActorConfig, which has the global counts in `global_batch_info`. The metrics are Python numbers,
        as in verl. On a GPU they cost one synchronization per call.
        """
        ...


LOSSES: dict[str, PolicyLoss] = {}
"""verl's `loss_mode` -> the policy loss."""

NOT_SERVED = {
    "bypass_mode": "compute weights and mask with rlhf_kernels.importance_weights(log_prob, rollout_log_prob, ...), and pass "
    "them as rollout_is_weights and response_mask of 'gpg' (loss_type reinforce), or the mask only of 'vanilla' "
    "(loss_type ppo_clip)"
}
"""verl's `loss_mode` without an adapter -> what to do instead."""


def policy_loss_of(loss_mode: str) -> PolicyLoss:
    """Return the policy loss with verl's name `loss_mode`.

    Raises:
        ValueError: the loss is not supported, with what to do instead.
    """
    if loss_mode in NOT_SERVED:
        raise ValueError(
            f"loss: got {loss_mode!r}, which verl supports and this adapter does not; {NOT_SERVED[loss_mode]}"
        )
    checks.choice("loss", loss_mode, tuple(LOSSES))
    return LOSSES[loss_mode]


@dataclass(frozen=True)
class Call:
    """The arguments of a policy loss; half precision is widened to float32."""

    old: Tensor  # (B, T)
    new: Tensor  # (B, T), differentiable
    advantages: Tensor  # (B, T)
    mask: Tensor  # (B, T), bool
    mode: str
    config: Any
    weights: Tensor | None  # (B, T)
    faithful: bool

    @property
    def moved(self) -> Tensor:
        """The log-ratio as a constant."""
        return self.new.detach() - self.old

    def setting(self, name: str, default: float) -> float:
        """Return an option of `config.policy_loss`, or the default if it is None."""
        value = getattr(self.config.policy_loss, name)
        return default if value is None else value

    def low_high(self) -> tuple[float, float]:
        """Return `clip_ratio_low` and `clip_ratio_high`, which are `clip_ratio` if they are None."""
        config = self.config
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        return low, config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high

    def kl(self, clamp: float = math.inf) -> dict[str, Tensor]:
        """Return the mean of -d, limited to ± `clamp`."""
        return {KL: mean((-self.moved).clamp(-clamp, clamp), self.mask)}

    def loss(self, *, mode: str | None = None, **options: Unpack[PPOOptions]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the aggregated loss of an objective, its clip fraction and its dual-clip fraction."""
        aggregation, factor = aggregation_of(self.mask, mode or self.mode, **self.config.global_batch_info)
        given: PPOOptions = {"weights": self.weights, **aggregation, **options}
        loss, metrics = ppo_loss(self.new, self.old, self.advantages, self.mask, **given)
        count = aggregation.get("num_tokens")
        clipped, dual = (local_fraction(metrics[name], count, self.mask) for name in ("clipfrac", "dual_clipfrac"))
        return nothing_true(loss, aggregation, self.mask, self.faithful) * factor, clipped, dual


def _registered(mode: str, aggregation: str = "token-mean") -> Callable[[Callable[[Call], Result]], PolicyLoss]:
    """Add a function of a `Call` to `LOSSES`, with verl's signature and its default of `loss_agg_mode`."""

    def decorate(formula: Callable[[Call], Result]) -> PolicyLoss:
        def policy_loss(
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = aggregation,
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
            *,
            faithful: bool = False,
        ) -> tuple[Tensor, dict[str, float]]:
            if config is None:
                raise ValueError("config is not set; pass verl's ActorConfig")
            mask = counted("response_mask", response_mask, log_prob, from_start=not faithful)
            like: checks.Like = {"like": log_prob, "expected": log_prob.shape, "what": "the shape of log_prob"}
            for name, x in (("old_log_prob", old_log_prob), ("advantages", advantages)):
                checks.tensor(name, x, **like)
            weights = None if rollout_is_weights is None else checks.widen(rollout_is_weights.detach())
            old, new, a = (checks.widen(x) for x in (old_log_prob, log_prob, advantages))
            loss, metrics = formula(Call(old, new, a, mask, loss_agg_mode, config, weights, faithful))
            numbers = torch.stack(list(metrics.values())).tolist() if metrics else []
            return loss, dict(zip(metrics, numbers, strict=True))

        policy_loss.__name__ = policy_loss.__qualname__ = formula.__name__
        policy_loss.__doc__ = formula.__doc__
        LOSSES[mode] = policy_loss
        return policy_loss

    return decorate


@_registered("vanilla")
def compute_policy_loss_vanilla(x: Call) -> Result:
    """Return PPO's clipped loss with a dual clip at `clip_ratio_c`; log-ratios are limited to ±20."""
    low, high = x.low_high()
    dual = x.config.get("clip_ratio_c", 3.0)
    loss, clipped, lower = x.loss(cliprange=low, cliprange_high=high, dual_clip=dual, log_ratio_clamp=20.0)
    return loss, {CLIPFRAC: clipped} | x.kl(20) | {LOWER: lower}


@_registered("dppo_tv")
def compute_policy_loss_dppo_tv(x: Call) -> Result:
    """Return the loss of DPPO with the binary TV divergence, bounded by `clip_ratio_low` and `clip_ratio_high`."""
    return _dppo(x, {"objective": "dppo_tv"})


@_registered("dppo_kl")
def compute_policy_loss_dppo_kl(x: Call) -> Result:
    """Return the loss of DPPO with the binary KL divergence, bounded by `clip_ratio_low` and `clip_ratio_high`."""
    return _dppo(x, {"objective": "dppo_kl"})


def _dppo(x: Call, objective: PPOOptions) -> Result:
    """Return `-A m sg(min(r, clip_ratio_c)) log π`.

    Our objective is `-A m min(r, clip_ratio_c)`, which has the same gradient. With the weights `log π` it has the same value.
    """
    low, high = x.low_high()
    limit = x.config.get("clip_ratio_c", 20.0)
    options: PPOOptions = {"divergence": low, "divergence_high": high, "ratio_limit": limit, **objective}
    slope, clipped, _ = x.loss(**options)
    logprobs = x.new.detach()
    value, *_ = x.loss(**options | {"weights": logprobs if x.weights is None else x.weights * logprobs})
    limited = x.mask & (x.moved.clamp(-20, 20).exp() > limit)  # of these, those that are in the trust region count
    options["num_tokens"] = x.mask.sum()
    rejected = ppo_loss(logprobs, x.old, x.advantages, limited, **options).metrics["clipfrac"]
    lower = mean(limited.float(), x.mask) - rejected
    return value.detach() + (slope - slope.detach()), {CLIPFRAC: clipped} | x.kl(20) | {LOWER: lower}


@_registered("gspo", BY_SEQUENCE)
def compute_policy_loss_gspo(x: Call) -> Result:
    """Return the clipped loss of sequence ratios (GSPO-token); verl 0.9.0 does not read `loss_agg_mode`.

    verl limits the log-ratio of a sequence to 10 from above. That matters only where A < 0, where it is a dual clip at e^10.
    """
    low, high = x.low_high()
    loss, clipped, _ = x.loss(
        objective="gspo_token",
        cliprange=low,
        cliprange_high=high,
        dual_clip=math.exp(10),
        log_ratio_clamp=80.0,
    )
    return loss, {CLIPFRAC: clipped} | x.kl() | {LOWER: torch.zeros_like(clipped)}


@_registered("sapo", BY_SEQUENCE)
def compute_policy_loss_sapo(x: Call) -> Result:
    """Return the loss of SAPO with `tau_pos` and `tau_neg`; `loss_agg_mode` is not read, as in verl."""
    positive, negative = float(x.config.tau_pos), float(x.config.tau_neg)
    loss, *_ = x.loss(mode=BY_SEQUENCE, objective="sapo", tau_pos=positive, tau_neg=negative, log_ratio_clamp=20.0)
    zero = loss.new_zeros(())
    return loss, {CLIPFRAC: zero} | x.kl(20) | {LOWER: zero}


@_registered("gpg")
def compute_policy_loss_gpg(x: Call) -> Result:
    """Return the policy gradient loss `-A log π`; there are no metrics."""
    return x.loss(objective="policy_gradient")[0], {}


@_registered("clip_cov")
def compute_policy_loss_clip_cov(x: Call) -> Result:
    """Return PPO's clipped loss without some tokens of large covariance of A and log π (`policy_loss.clip_cov_*`).

    The tokens are drawn by `torch.randperm` from torch's generator of the CPU, so that with the same seed they are verl's.
    """
    low, high = x.low_high()
    a, ratio = x.advantages, x.moved.exp()
    unclipped = x.mask & ~(a * ratio > a * ratio.clamp(1 - low, 1 + high))
    covariance = (a - mean(a, x.mask)) * (x.new.detach() - mean(x.new.detach(), x.mask))
    bounds = x.setting("clip_cov_lb", 1.0), x.setting("clip_cov_ub", 5.0)
    found = torch.nonzero(unclipped & (covariance > bounds[0]) & (covariance < bounds[1]))
    share = x.setting("clip_cov_ratio", 0.0002)
    checks.number("config.policy_loss.clip_cov_ratio", share, above=0)
    drawn = found[torch.randperm(len(found))[: max(int(share * int(x.mask.sum())), 1)]]
    kept = torch.ones_like(ratio)
    kept[drawn[:, 0], drawn[:, 1]] = 0
    weights = kept if x.weights is None else kept * x.weights
    loss, *_ = x.loss(cliprange=low, cliprange_high=high, weights=weights)
    return loss, {CLIPFRAC: mean(1 - kept, x.mask)} | x.kl()


def _kl_cov(logprobs: Tensor, old_logprobs: Tensor, a: Tensor, *, coefficient: Tensor) -> Tensor:
    moved = logprobs - old_logprobs
    return coefficient * moved.abs() - a * moved.exp()


@_registered("kl_cov")
def compute_policy_loss_kl_cov(x: Call) -> Result:
    """Return `-r A`, and `ppo_kl_coef |d|` for the tokens with the largest covariance of A and log π.

    These tokens are the share `policy_loss.kl_cov_ratio` of the tokens that count, and at least one.
    """
    share = x.setting("kl_cov_ratio", 0.0002)
    checks.number("config.policy_loss.kl_cov_ratio", share, above=0)
    a, logprobs = x.advantages[x.mask], x.new.detach()[x.mask]
    covariance = (a - a.mean()) * (logprobs - logprobs.mean())
    largest = covariance.topk(min(len(a), max(1, int(len(a) * share)))).indices
    chosen = torch.zeros_like(a, dtype=x.new.dtype).index_fill(0, largest, x.setting("ppo_kl_coef", 1.0))
    coefficient = torch.zeros_like(x.new.detach()).masked_scatter(x.mask, chosen)
    loss, *_ = x.loss(objective=_kl_cov, objective_inputs={"coefficient": coefficient})
    return loss, {KL: mean(x.moved.abs(), x.mask)}


@_registered("geo_mean")
def compute_policy_loss_geo_mean(x: Call) -> Result:
    """Return the loss of GMPO as the mean over all B sequences; `loss_agg_mode` and the global counts are not read.

    The weight of a sequence is the geometric mean of its `rollout_is_weights`.
    """
    low, high = x.low_high()
    without = x.mask & (x.advantages == 0)  # contributes no log-ratio in verl
    constant = x.new.detach()
    new, old = torch.where(without, constant, x.new), torch.where(without, constant, x.old)
    weights = x.weights
    if weights is not None:
        logs = torch.where(x.mask, (weights + 1e-10).log(), 0).sum(-1, keepdim=True)
        weights = (logs / x.mask.sum(-1, keepdim=True).clamp(min=1)).exp().expand_as(weights)
    loss, _ = ppo_loss(
        new, old, x.advantages, x.mask, objective="gmpo", cliprange=low, cliprange_high=high, weights=weights,
        aggregation="seq_mean_token_mean", num_sequences=len(x.mask),
    )  # fmt: skip
    outside = (x.moved < -low) | (x.moved > high)
    up, down = (mean((outside & side).float(), x.mask) for side in (x.advantages > 0, x.advantages < 0))
    return loss, {CLIPFRAC: up} | x.kl() | {LOWER: down}


def _dro(logprobs: Tensor, old_logprobs: Tensor, a: Tensor, *, beta: Tensor) -> Tensor:
    return beta * kl_penalty(logprobs, old_logprobs, estimator="k2") - a * logprobs


@_registered("dro")
def compute_policy_loss_dro(x: Call) -> Result:
    """Return `-A log π + policy_loss.dro_beta d² / 2`."""
    beta = x.config.policy_loss.dro_beta
    if beta is None:
        raise ValueError("config.policy_loss.dro_beta is not set; pass a number above 0")
    checks.number("config.policy_loss.dro_beta", beta, above=0)
    loss, *_ = x.loss(objective=_dro, objective_inputs={"beta": torch.full_like(x.new.detach(), beta)})
    return loss, x.kl()


@_registered("cispo")
def compute_policy_loss_cispo(x: Call) -> Result:
    """Return the loss of CISPO: `-sg(clip(r)) A log π`; log-ratios are limited to ±20."""
    low, high = x.low_high()
    loss, clipped, _ = x.loss(objective="cispo", cliprange=low, cliprange_high=high, log_ratio_clamp=20.0)
    return loss, {CLIPFRAC: clipped} | x.kl(20) | {LOWER: torch.zeros_like(clipped)}


def nothing_true(loss: Tensor, aggregation: AggregationOptions, mask: Tensor, faithful: bool) -> Tensor:
    """Return the loss, or NaN as in verl if `faithful`, the mask is empty and there is no global count."""
    own = aggregation["aggregation"] != "token_sum" and not {"num_tokens", "num_sequences"} & set(aggregation)
    return loss / mask.any() if faithful and own else loss


def aggregation_of(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[AggregationOptions, float]:
    """Return verl's `agg_loss` as options of `ppo_loss` and a factor."""
    checks.choice("loss_agg_mode", loss_agg_mode, tuple(_AGGREGATIONS))
    options: AggregationOptions = {"aggregation": _AGGREGATIONS[loss_agg_mode]}
    if loss_agg_mode == "token-sum":
        return options, dp_size
    name, count = (
        ("num_tokens", batch_num_tokens) if loss_agg_mode == "token-mean" else ("num_sequences", global_batch_size)
    )
    if count is not None:
        options[name] = count
    elif dp_size > 1:
        peers = {"num_tokens": "batch_num_tokens", "num_sequences": "global_batch_size"}[name]
        raise ValueError(f"{peers} is not set, but dp_size={dp_size} needs it; pass the count of the global batch")
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return options, dp_size / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return options, dp_size

"""OpenRLHF 0.11 and 0.7: its loss modules and the functions between rollout and loss, with the same signatures.

B sequences, T positions, V vocabulary. The names are those of 0.11.2; `for_version` returns those of the other
releases. The docstring of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._options import PPOOptions
from ..ops import checks, gae, ppo_loss, token_logprobs
from ..ops import kl_penalty as estimate_kl
from .conventions import AggregationOptions, counted, local_fraction, mean, refuse, release, value_loss

KL_IS_WEIGHT_CLIP = 10.0
"""Largest importance weight of `compute_approx_kl(unbiased_gradient=True)`."""


class PolicyLoss(nn.Module):
    """The policy loss of 0.11.2. "ppo" clamps the log-ratios of tokens to ±20; "gspo" uses ratios and means of sequences.

    The importance correction compares the ratio old / rollout of the log-probs of trainer and sampler, or a divergence
    of the two, with `is_correction_threshold`, per token or per sequence ("seq"). Mode "mask" weights the loss of a token
    by the ratio, and by 0 outside the threshold; mode "clip" weights it by the clipped ratio.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
        *,
        faithful: bool = False,
    ):
        super().__init__()
        checks.choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        checks.choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        checks.choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        checks.choice("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        by_token_ratio = is_correction_level != "seq" and is_correction_gating == "ratio"
        if is_correction_mode == "clip" and not by_token_ratio:
            raise ValueError(
                f"is_correction_mode: got 'clip' with is_correction_level={is_correction_level!r} and is_correction_gating="
                f"{is_correction_gating!r}, expected 'token' and 'ratio'"
            )
        if is_correction_level != "off" and is_correction_gating != "ratio" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold: got {tuple(is_correction_threshold)} with is_correction_gating="
                f"{is_correction_gating!r}, expected a lower bound of 0: a divergence is bounded from above"
            )
        self.clip_eps_low: float = clip_eps_low
        self.clip_eps_high: float = clip_eps_high
        self.dual_clip: float | None = dual_clip
        self.token_level_loss: bool = token_level_loss and policy_loss_type == "ppo"
        self.policy_loss_type: str = policy_loss_type
        self.is_correction_level: str = is_correction_level
        self.is_correction_mode: str = is_correction_mode
        self.is_correction_gating: str = is_correction_gating
        self.is_correction_threshold: Sequence[float] = is_correction_threshold
        self.faithful: bool = faithful

    def forward(
        self,
        log_probs: Tensor,  # (B, T), differentiable
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
        rollout_log_probs: Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return loss, clip fraction, KL(old || new) by k1, mean log(rollout / old), and fraction outside the threshold."""
        corrects = self.is_correction_level != "off"
        if corrects and rollout_log_probs is None:
            raise ValueError(f"rollout_log_probs is not set; is_correction_level={self.is_correction_level!r} needs it")
        rollout = rollout_log_probs if corrects else None
        mask = counted("action_mask", action_mask, log_probs)
        weights = rollout_kl = filtered = None
        base, gspo = old_log_probs, self.policy_loss_type == "gspo"
        if gspo:
            base = old_log_probs if rollout is None else rollout
        elif rollout is not None:
            weights, filtered = self._correction(old_log_probs.detach(), rollout, mask)
            rollout_kl = mean(rollout - old_log_probs, mask)
        aggregation, factor = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        options: PPOOptions = {
            "cliprange": self.clip_eps_low,
            "cliprange_high": self.clip_eps_high,
            "dual_clip": self.dual_clip,
            "ratio_level": "sequence" if gspo else "token",
            "log_ratio_clamp": None if gspo else 20.0,
            "weights": weights,
            **aggregation,
        }
        loss, metrics = ppo_loss(log_probs, base, advantages, mask, **options)
        ppo_kl = mean(old_log_probs - log_probs.detach(), mask)
        clip_ratio = local_fraction(metrics["clipfrac"], aggregation.get("num_tokens"), mask)
        return _nothing_true(loss, aggregation, mask, self.faithful) * factor, clip_ratio, ppo_kl, rollout_kl, filtered

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each token's loss, and the fraction of tokens, or sequences, outside the threshold."""
        low, high = self.is_correction_threshold
        by_sequence = self.is_correction_level == "seq"
        log_ratio = old - rollout
        statistic = log_ratio if self.is_correction_gating == "ratio" else self._divergence(old, rollout)
        if by_sequence:
            count = mask.sum(-1, keepdim=True)
            statistic = torch.where(mask, statistic, 0).sum(-1, keepdim=True) / count  # empty row: NaN, outside
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        outside = ~((statistic >= low) & (statistic <= high))
        if self.is_correction_mode == "clip":
            weights = statistic.clamp(low, high)
        else:
            weights = torch.where(outside, 0, log_ratio.exp())
        return weights, outside.float().mean() if by_sequence else mean(outside.float(), mask)

    def _divergence(self, old: Tensor, rollout: Tensor) -> Tensor:
        """Return the divergence of the two Bernoulli distributions of sampling this token or a different one."""
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        if self.is_correction_gating == "tv":
            return (p - q).abs()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


class PolicyLoss0110(PolicyLoss):
    """`PolicyLoss` of 0.11.0 and 0.11.1, with different names for the importance correction and four results."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Sequence[float] | None = None,
        vllm_is_correction_type: str = "tis",
        *,
        faithful: bool = False,
    ):
        kinds = {"tis": ("token", "clip"), "icepop": ("token", "mask"), "seq-mask-tis": ("seq", "mask")}
        checks.choice("vllm_is_correction_type", vllm_is_correction_type, tuple(kinds))
        if enable_vllm_is_correction and vllm_is_truncated_threshold is None:
            raise ValueError("vllm_is_truncated_threshold is not set; pass a lower and an upper bound")
        level, mode = kinds[vllm_is_correction_type] if enable_vllm_is_correction else ("off", "mask")
        clip = (clip_eps_low, clip_eps_high, dual_clip, token_level_loss, policy_loss_type)
        super().__init__(*clip, level, mode, "ratio", vllm_is_truncated_threshold or (0.5, 5.0), faithful=faithful)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # this release has fewer results
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the results of `PolicyLoss.forward` except the last."""
        return super().forward(*args, **kwargs)[:4]


class PolicyLoss07(nn.Module):
    """`PolicyLoss` of 0.7: one clip range, no clamp of the log-ratio, and the loss as the only result."""

    def __init__(self, clip_eps: float = 0.2, token_level_loss: bool = True, *, faithful: bool = False):
        super().__init__()
        self.clip_eps: float = clip_eps
        self.token_level_loss: bool = token_level_loss
        self.faithful: bool = faithful

    def forward(
        self,
        log_probs: Tensor,  # (B, T), differentiable
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Return the loss."""
        mask = counted("action_mask", action_mask, log_probs)
        aggregation, _ = _aggregation(self.token_level_loss, 1, None, None)
        loss, _ = ppo_loss(log_probs, old_log_probs, advantages, mask, cliprange=self.clip_eps, **aggregation)
        return _any_empty(loss, mask, self.token_level_loss) if self.faithful else loss


class ValueLoss(nn.Module):
    """Half the squared error; with `clip_eps`, half the larger of the squared errors of the value and the clipped value."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True, *, faithful: bool = False):
        super().__init__()
        self.clip_eps: float | None = clip_eps
        self.token_level_loss: bool = token_level_loss
        self.faithful: bool = faithful

    def forward(
        self,
        values: Tensor,  # (B, T), differentiable
        old_values: Tensor,  # (B, T)
        returns: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Return the loss."""
        mask = counted("action_mask", action_mask, values)
        aggregation, factor = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        loss, _ = value_loss(values, old_values, returns, mask, self.clip_eps, **aggregation)
        return _nothing_true(loss, aggregation, mask, self.faithful) * factor


class ValueLoss07(ValueLoss):
    """`ValueLoss` of 0.7, without the counts of the global batch."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # this release has fewer arguments
        self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss."""
        loss = super().forward(values, old_values, returns, action_mask)
        mask = counted("action_mask", action_mask, values)
        return _any_empty(loss, mask, self.token_level_loss) if self.faithful else loss


def _aggregation(
    token_level: bool, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None
) -> tuple[AggregationOptions, float]:
    """Return OpenRLHF's `aggregate_loss` as options of `ppo_loss` and a factor, which is 1 without a global count."""
    options: AggregationOptions = {"aggregation": "token_mean" if token_level else "seq_mean_token_mean"}
    count = batch_num_tokens if token_level else global_batch_size
    if count is None:
        return options, 1
    options["num_tokens" if token_level else "num_sequences"] = count
    return options, dp_size


def _nothing_true(loss: Tensor, aggregation: AggregationOptions, mask: Tensor, faithful: bool) -> Tensor:
    """Return the loss, or NaN as in OpenRLHF if `faithful`, the mask is empty and there is no global count."""
    return loss / mask.any() if faithful and len(aggregation) == 1 else loss


def _any_empty(loss: Tensor, mask: Tensor, token_level: bool) -> Tensor:
    """Return the loss, or NaN as in 0.7 if the mask is empty; for means by sequence, if any row of it is empty."""
    fine = mask.any() if token_level else mask.any(-1).all()
    return torch.where(fine, loss, torch.nan)


class PairWiseLoss(nn.Module):
    """The mean of `-log σ(chosen - rejected - margin)`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Return the loss."""
        apart = chosen_reward - reject_reward
        return -F.logsigmoid(apart if margin is None else apart - margin).mean()


class LogExpLoss(nn.Module):
    """The mean of `log(1 + exp(rejected - chosen))`.

    OpenRLHF ignores `margin`, so passing it raises ValueError unless `faithful`. The loss is computed as a softplus,
    which does not overflow. With `faithful` it is computed as written, which gives inf for differences of 89 and more.
    """

    def __init__(self, *, faithful: bool = False):
        super().__init__()
        self.faithful = faithful

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Return the loss."""
        if margin is not None and not self.faithful:
            raise ValueError("margin: got a tensor, expected None: OpenRLHF accepts the margin but ignores it")
        apart = reject_reward - chosen_reward
        return torch.log(1 + torch.exp(apart)).mean() if self.faithful else F.softplus(apart).mean()


class GPTLMLoss(nn.Module):
    """The mean negative log-likelihood of next tokens whose label is not -100; ring attention is not supported."""

    def __init__(self, ring_attn_group: Any = None, *, faithful: bool = False):
        super().__init__()
        refuse("OpenRLHF", ring_attn_group=ring_attn_group)
        self.IGNORE_INDEX: int = -100
        self.faithful: bool = faithful

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T)
        """Return the loss."""
        labels = labels[..., 1:]
        mask = labels != self.IGNORE_INDEX
        return -mean(token_logprobs(logits[..., :-1, :], labels, mask=mask).logprobs, mask, faithful=self.faithful)


def compute_approx_kl(
    log_probs: Tensor,  # any shape, differentiable
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Return KL(policy || base) per token in float32, within ±10; `unbiased_gradient` gives it weighted k2's gradient."""
    checks.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    d = log_probs.float() - log_probs_base.float()
    nothing = torch.zeros_like(d)
    # Below d = -10, k3 is clamped to 10 anyway, and the gradient of its exp would be inf.
    value = estimate_kl(d.clamp(min=-10) if kl_estimator == "k3" else d, nothing, estimator=kl_estimator).clamp(-10, 10)
    if not unbiased_gradient:
        return value
    weight = 1.0
    if log_probs_old is not None:
        weight = (log_probs.float() - log_probs_old.float()).exp().clamp(max=KL_IS_WEIGHT_CLIP).detach()
    straight = weight * estimate_kl(d, nothing, estimator="k2")
    return value.detach() + straight - straight.detach()


def compute_approx_kl07(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """Return `compute_approx_kl` of 0.7, which is not clamped."""
    checks.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    return estimate_kl(log_probs.float(), log_probs_base.float(), estimator=kl_estimator)


def compute_approx_kl0110(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """Return `compute_approx_kl` of 0.11.0 and 0.11.1, whose third argument is the estimator."""
    return compute_approx_kl(log_probs, log_probs_base, kl_estimator=kl_estimator)


def compute_reward(
    r: Tensor,  # (B,)
    kl_coef: float,
    kl: Tensor,  # (B, T)
    action_mask: Tensor | None = None,  # (B, T)
    reward_clip_range: tuple[float, float] | None = None,
    *,
    faithful: bool = False,
) -> Tensor:
    """Return the rewards `-kl_coef kl`, plus the clipped score `r` at the last action, (B, T).

    A negative `kl_coef` is treated as 0. The score of a row without an action is dropped, or with `faithful` is at its end.
    """
    checks.floating("kl", kl, dims=(2,), what="[B, T]")
    checks.tensor("r", r, like=kl, expected=kl.shape[:1], what="one score per sequence")
    mask = counted("action_mask", action_mask, kl)
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    position = torch.arange(kl.shape[1], device=kl.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True)
    if faithful:
        last = torch.where(last < 0, kl.shape[1] - 1, last)
    return -max(kl_coef, 0.0) * kl + torch.where(position == last, r[:, None].to(kl.dtype), 0)


def get_advantages_and_returns(
    values: Tensor,  # (B, T)
    rewards: Tensor,  # (B, T)
    action_mask: Tensor | None,  # (B, T)
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by GAE over all positions; masked positions are steps with value and reward 0."""
    checks.floating("rewards", rewards, dims=(2,), what="[B, T]")
    mask = counted("action_mask", action_mask, rewards)
    values, rewards = (torch.where(mask, x, 0) for x in (values, rewards))
    advantages, returns = gae(rewards, values, torch.ones_like(mask), gamma=gamma, lam=lambd)
    return advantages, returns


def normalize_advantages(
    advantages: Sequence[Tensor],  # one (B, T) per experience
    action_masks: Sequence[Tensor],  # one (B, T) per experience
    no_std_norm: bool = False,
) -> list[Tensor]:
    """Return a step's advantages with mean 0 and, unless `no_std_norm`, biased variance 1 (divided by at least 1e-4)."""
    masks = [counted("action_masks", m, a) for m, a in zip(action_masks, advantages, strict=True)]
    flat, flags = (torch.cat([x.flatten() for x in xs]) for xs in (advantages, masks))
    centre = mean(flat, flags)
    scale = 1 if no_std_norm else mean((flat - centre).square(), flags).clamp(min=1e-8).rsqrt()
    return [(a - centre) * scale for a in advantages]


def for_version(version: str | None = None) -> SimpleNamespace:
    """Return the names of a release (None: the installed one); raise ValueError for a release that is not known."""
    shared = {
        f.__name__: f
        for f in (PairWiseLoss, LogExpLoss, GPTLMLoss, compute_reward, get_advantages_and_returns, normalize_advantages)
    }
    return SimpleNamespace(**shared, **release("openrlhf", version, _KNOWN))


_KNOWN = {
    "0.11.2": {"PolicyLoss": PolicyLoss, "ValueLoss": ValueLoss, "compute_approx_kl": compute_approx_kl},
    "0.11.1": {"PolicyLoss": PolicyLoss0110, "ValueLoss": ValueLoss, "compute_approx_kl": compute_approx_kl0110},
    "0.11.0": {"PolicyLoss": PolicyLoss0110, "ValueLoss": ValueLoss, "compute_approx_kl": compute_approx_kl0110},
    "0.7": {"PolicyLoss": PolicyLoss07, "ValueLoss": ValueLoss07, "compute_approx_kl": compute_approx_kl07},
}

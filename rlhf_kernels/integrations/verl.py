# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.tolist`.
"""verl 0.9: the functions of its `core_algos` and `linear_cross_entropy`, with the same signatures.

B sequences, T positions. Note verl's order of arguments: old log-probs come first in the policy loss, and the value
loss has predictions, returns, old values. The docstring of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import checks, gae, group_advantages, linear_token_logprobs, masked_whiten, ppo_loss
from ..ops import kl_penalty as estimate_kl
from .conventions import counted, mean, refuse, release, value_loss, whiten_everywhere
from .verl_losses import (
    LOSSES,
    aggregation_of,
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_dppo_kl,
    compute_policy_loss_dppo_tv,
    compute_policy_loss_dro,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
    nothing_true,
    policy_loss_of,
)

__all__ = [
    "LOSSES",
    "compute_gae_advantage_return",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_dppo_kl",
    "compute_policy_loss_dppo_tv",
    "compute_policy_loss_dro",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_sapo",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "kl_penalty",
    "linear_cross_entropy",
    "register",
]

KNOWN = {"0.9": "0.9"}
_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def register(name: str = "rlhf_kernels", *, loss: str = "vanilla", version: str | None = None) -> None:
    """Register a policy loss in verl under `name`, the value to set `actor.policy_loss.loss_mode` to.

    `loss` is verl's name of the loss. With `name` equal to it, the loss replaces verl's own.

    Raises:
        ValueError: the release `version` (None: the installed release) is not known, or the loss is not supported.
    """
    chosen = policy_loss_of(loss)
    release("verl", version, KNOWN)
    from verl.trainer.ppo.core_algos import register_policy_loss  # pyright: ignore[reportMissingImports]  # a peer

    register_policy_loss(name)(chosen)


def compute_gae_advantage_return(
    token_level_rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    gamma: float,
    lam: float,
    *,
    faithful: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return advantages by GAE, whitened over the mask, and returns; masked tokens inside a response are skipped.

    By default both are 0 where the mask is False, and the advantages are 0 if there are fewer than two actions. With
    `faithful` the masked entries are verl's: the whitened advantage of the next action, and that advantage before
    whitening plus the value. One action then gives NaN advantages, and no action raises ValueError.
    """
    checks.floating("token_level_rewards", token_level_rewards, dims=(2,), what="[B, T]")
    mask = counted("response_mask", response_mask, token_level_rewards, from_start=not faithful)
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam), holes="skip")
    if not faithful:
        return masked_whiten(advantages, mask), returns
    carried = _from_next_action(advantages, mask)
    return whiten_everywhere(carried, mask), carried + values


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    index: Any,  # (B,), one key per prompt: an array of numbers or strings, as verl's uids
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the advantages (B, T) of each response relative to its group, twice, as advantages and as returns.

    The score of a response is the sum of its rewards. A group of one keeps its score, divided by `1 + epsilon` if the
    deviation is normalized, as in verl. `config` is ignored, as in verl.
    """
    mask = counted("response_mask", response_mask, token_level_rewards)
    scores = token_level_rewards.sum(-1).float()
    number: dict[Any, int] = {}
    ids = [number.setdefault(key, len(number)) for key in (index.tolist() if hasattr(index, "tolist") else index)]
    groups = torch.tensor(ids, dtype=torch.int64, device=scores.device)
    checks.integers("index", groups, like=scores, expected=scores.shape, what="one key per row of the rewards")
    how: dict[str, Any] = {"kind": "grpo", "eps": epsilon} if norm_adv_by_std_in_grpo else {"kind": "dr_grpo"}
    advantages = group_advantages(scores, groups, **how)
    lonely = groups.bincount(minlength=1)[groups] == 1
    advantages = torch.where(lonely, scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores, advantages)
    advantages = torch.where(mask, advantages[:, None], 0)
    return advantages, advantages


def _from_next_action(x: Tensor, mask: Tensor) -> Tensor:
    """Return for each position the entry of `x` at the first True position from it on; 0 after the last True."""
    t = x.shape[1]
    position = torch.where(mask, torch.arange(t, device=x.device), t)
    following = position.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(x, (0, 1)).gather(1, following)


def compute_policy_loss(
    old_log_prob: Tensor,  # (B, T)
    log_prob: Tensor,  # (B, T), differentiable
    advantages: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    *,
    faithful: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, the clip fraction, KL(old || new) by k1 and the dual-clip fraction.

    Log-ratios are clamped to ±20. `clip_ratio_c` is the bound of the dual clip.
    """
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise ValueError("cliprange is not set; pass it, or both cliprange_low and cliprange_high")
    mask = counted("response_mask", response_mask, log_prob, from_start=not faithful)
    aggregation, factor = aggregation_of(mask, loss_agg_mode)
    loss, metrics = ppo_loss(
        log_prob, old_log_prob, advantages, mask, cliprange=low, cliprange_high=high, dual_clip=clip_ratio_c,
        log_ratio_clamp=20.0, **aggregation,
    )  # fmt: skip
    kl = mean((old_log_prob - log_prob.detach()).clamp(-20, 20), mask)
    loss = nothing_true(loss, aggregation, mask, faithful) * factor
    return loss, metrics["clipfrac"], kl, metrics["dual_clipfrac"]


def compute_value_loss(
    vpreds: Tensor,  # (B, T), differentiable
    returns: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    faithful: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the clipped value loss, and the fraction of tokens whose clipped error is larger.

    The loss is half the larger of the squared errors of the value and of the clipped value, aggregated by
    `loss_agg_mode`.
    """
    mask = counted("response_mask", response_mask, vpreds, from_start=not faithful)
    numbers = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    aggregation, factor = aggregation_of(mask, loss_agg_mode, *numbers)
    loss, clipfrac = value_loss(vpreds, values, returns, mask, cliprange_value, **aggregation)
    return nothing_true(loss, aggregation, mask, faithful) * factor, clipfrac


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Return an estimate of KL(policy || reference) per token: kl (k1), abs, mse (k2) or low_var_kl (k3).

    The log-ratio of k3 is clamped to ±20 and k3 itself to ±10. A name with a "+" at its end gives the same value with
    the gradient of k2.
    """
    base = kl_penalty.removesuffix("+")
    checks.choice("kl_penalty", base, tuple(_ESTIMATORS))
    estimator = _ESTIMATORS[base]
    checks.floating("logprob", logprob, dims=tuple(range(8)), what="any shape")
    checks.tensor("ref_logprob", ref_logprob, like=logprob, expected=logprob.shape, what="the shape of logprob")
    if estimator == "k3":
        d = (logprob - ref_logprob).clamp(-20, 20)  # passed to the op as log-probs d and 0, whose difference is d
        value = estimate_kl(d, torch.zeros_like(d), estimator=estimator).clamp(-10, 10)
    else:
        value = estimate_kl(logprob, ref_logprob, estimator=estimator)
    if base == kl_penalty or kl_penalty in ("mse", "k2"):
        return value
    straight = estimate_kl(logprob, ref_logprob, estimator="k2")
    return straight - straight.detach() + value.detach()


def linear_cross_entropy(
    hidden: Tensor,  # (..., H), differentiable
    weight: Tensor,  # (V, H), differentiable
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the labels (N,) and the entropies (N,) from hidden states, without an [N, V] tensor.

    N is the number of labels; the results are flat, as in verl. `reduction` "sum" or "mean" reduces the log-probs to a
    scalar. `dist_process_group` is not supported and raises ValueError.
    """
    refuse("verl", dist_process_group=dist_process_group)
    checks.choice("reduction", reduction.lower(), ("none", "sum", "mean"))
    taken = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, entropy=True
    )
    assert taken.entropy is not None
    if reduction.lower() == "none":
        return taken.logprobs, taken.entropy
    return taken.logprobs.sum() if reduction.lower() == "sum" else taken.logprobs.mean(), taken.entropy

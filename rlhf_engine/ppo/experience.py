"""From a rollout to an `Experience`: scores, log-probs, values and advantages. B sequences, T response width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_engine.config import ImportanceConfig, PPOConfig
from rlhf_engine.memory.passes import MicrobatchSize, Passes
from rlhf_engine.model import Policy, Reference
from rlhf_engine.rewards.scaling import RewardFunction, ScoreScale, score_answers
from rlhf_engine.rollout import Rollout, recompute, reference_logprobs
from rlhf_kernels import importance_weights, length_adaptive_lam, rollout_advantages


def experience_bytes(actions: int) -> int:
    """Return the bytes that scoring adds to a rollout of `actions` = B T actions.

    They hold the reference log-probs, advantages, returns, rewards and KL.
    """
    return 5 * actions * torch.float32.itemsize


@dataclass(frozen=True)
class Scored:
    """A rollout with the terms of its reward. Log-probs and values are (B, T), float32, 0 where the mask is False."""

    rollout: Rollout
    scores: Tensor  # (B,)
    raw_scores: Tensor  # (B,), before scaling and penalties
    old_logprobs: Tensor
    old_values: Tensor
    ref_logprobs: Tensor


@dataclass(frozen=True)
class Experience:
    """The training data of one update. Tensors of float32 are (B, T), 0 where the mask is False."""

    rollout: Rollout
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None
    kept: Tensor | None = None  # (B, T), bool: the actions of the policy term; None: all
    positive: Tensor | None = None  # (B,), bool: the sequences of `positive_nll_coef`; None: it is 0


class Step(NamedTuple):
    """The current update, as an argument of the update rule."""

    number: int
    """Number of updates done before this one."""
    old_kl_coef: float
    """Weight of KL(old || new) in the objective `kl_penalty`."""
    on_change: Callable[[], object]
    """Must be called before a weight is changed by anything but the optimizer."""
    passes: Passes
    """Size of the forward and backward passes."""
    report: Callable[[Any], object]
    """Receives a `NonFinite` before it is handled."""


def microbatch_size(config: PPOConfig) -> MicrobatchSize:
    """Return the size of a micro-batch, as arguments of `Rollout.batches`."""
    return {"microbatch": config.microbatch, "microbatch_tokens": config.microbatch_tokens}


def score(
    rollout: Rollout,
    policy: Policy,
    reference: Reference,
    reward_fn: RewardFunction,
    config: PPOConfig,
    temperature: float,
    scale: ScoreScale | None = None,
    first: int = 0,
    transients: Callable[[], AbstractContextManager[None]] = nullcontext,
    passes: Passes | None = None,
) -> Scored:
    """Score every response (see `score_answers`) and compute the log-probs of the old policy and of the reference.

    If policy and reference share their lower layers, these run here, and all passes of the update begin with their output.
    Forward passes of the policy and the reference run inside `transients()`, which provides their memory. After a lack of
    memory in them, `passes` repeats them in smaller passes; the reward function is called once.
    """
    scale = scale or ScoreScale(config.score_scale)
    rollout, scores, raw_scores = score_answers(rollout, reward_fn, config, scale, first)

    def run(size: MicrobatchSize) -> tuple[Rollout, tuple[Tensor, ...]]:
        return _log_probs(rollout, policy, reference, config, temperature, transients, size)

    rollout, terms = run(microbatch_size(config)) if passes is None else passes.fitting(run)
    return Scored(rollout, scores, raw_scores, *terms)


def _log_probs(
    rollout: Rollout,
    policy: Policy,
    reference: Reference,
    config: PPOConfig,
    temperature: float,
    transients: Callable[[], AbstractContextManager[None]],
    size: MicrobatchSize,
) -> tuple[Rollout, tuple[Tensor, ...]]:
    """Return the rollout with its shared states, and the old log-probs, the old values and the reference's log-probs."""
    rollout = rollout.starting_from(reference, **size, transients=transients)
    with transients():
        ref_logprobs = reference_logprobs(reference, rollout, temperature=temperature, **size)
        old_logprobs, old_values = rollout.logprobs, rollout.values
        if config.old_logprobs == "rescored":
            again = recompute(policy, rollout, ("logprobs", "values"), temperature=temperature, **size)
            old_logprobs, old_values = again["logprobs"], again["values"]
        elif policy.value is not None and not policy.value.shares_trunk:
            old_values = recompute(policy, rollout, ("values",), **size)["values"]
        if config.baseline == "none":
            old_values = torch.zeros_like(old_values)
    # Copied, because the next phase reuses the memory of this one.
    return rollout, (old_logprobs.clone(), old_values.clone(), ref_logprobs.clone())


def advantages(
    scored: Scored, config: PPOConfig, kl_coef: float, backend: str = "auto"
) -> tuple[Experience, dict[str, float]]:
    """Return the experience with the advantages of a scored rollout, and the metrics to log.

    The advantages are GAE of the reward `-kl_coef * KL_t + [t is last] score`, whitened over the batch if configured.
    """
    rollout = scored.rollout
    result = rollout_advantages(
        scored.scores,
        scored.old_logprobs,
        scored.ref_logprobs,
        scored.old_values,
        rollout.mask,
        kl_coef=kl_coef,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam if config.lam_alpha is None else length_adaptive_lam(rollout.mask, alpha=config.lam_alpha),
        value_lam=config.value_lam,
        score_clip=config.score_clip,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages and config.whiten_scope == "batch",
        backend=backend,
    )
    weights, kept, mismatch = correction(scored, config, backend)
    if config.discount_gradient:
        discounts = gradient_discounts(rollout.mask, config.gamma)
        weights = discounts if weights is None else weights * discounts
    positive = scored.raw_scores > config.positive_score if config.positive_nll_coef else None
    if positive is not None:
        mismatch = mismatch | {"positive_share": positive.float().mean()}
    lengths = rollout.response_lengths.float()
    log = {
        "score_mean": scored.raw_scores.mean(),
        "score_std": scored.raw_scores.std(correction=0),
        "scaled_score_mean": scored.scores.mean(),
        "kl": result.kl.sum(1).mean(),
        "kl_per_token": result.kl.sum() / lengths.sum(),
        "reward_mean": result.rewards.sum(1).mean(),
        "return_mean": result.returns.sum() / lengths.sum(),
        "value_mean": scored.old_values.sum() / lengths.sum(),
        "response_length": lengths.mean(),
        "ended": rollout.ended.float().mean(),
    }
    tokens = scored.old_logprobs, scored.old_values, result.advantages, result.returns
    found = Experience(rollout, *tokens, weights, kept, positive)
    return found, {name: float(value) for name, value in (log | mismatch).items()}


def correction(
    scored: Scored, config: PPOConfig, backend: str = "auto"
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Return the weights of `importance` or `importance_cap`, the actions that it keeps, and the metrics to log.

    The weights are None without a correction, and the actions None unless it masks some.
    """
    rule, rollout = config.importance, scored.rollout
    if config.importance_cap is not None:
        rule = ImportanceConfig(level="token", high=config.importance_cap)
    if rule.level == "none":
        return None, None, {}
    tokens = scored.old_logprobs, rollout.sampling_logprobs, rollout.mask
    found = importance_weights(
        *tokens, **{item.name: getattr(rule, item.name) for item in fields(rule)}, backend=backend
    )
    metrics = {f"importance_{name}": value for name, value in found.metrics.items() if name != "num_tokens"}
    return found.weights, found.mask if rule.action == "mask" else None, metrics


def gradient_discounts(mask: Tensor, gamma: float) -> Tensor:  # (B, T) -> (B, T)
    """Return gamma^t for action number t of each sequence (Sutton & Barto 2018, section 13.3)."""
    return gamma ** (mask.cumsum(1) - 1).clamp(min=0).float()

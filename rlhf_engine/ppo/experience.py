"""From a rollout to what an update learns from: scores, log-probs, values, advantages. B sequences, T response width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import Policy, Reference
from rlhf_engine.rewards.scaling import RewardFunction, ScoreScale, score_answers
from rlhf_engine.rollout import Rollout, recompute, reference_logprobs
from rlhf_kernels import rollout_advantages


def experience_bytes(actions: int) -> int:
    """Return the bytes that scoring adds to a rollout of B T actions.

    They are those of reference log-probs, advantages, returns, rewards and KL.
    """
    return 5 * actions * torch.float32.itemsize


@dataclass(frozen=True)
class Scored:
    """A rollout with what its reward is made of. All but scores are (B, T), float32, 0 where the mask is False."""

    rollout: Rollout
    scores: Tensor  # (B,)
    raw_scores: Tensor  # (B,), before any scale or penalty
    old_logprobs: Tensor
    old_values: Tensor
    ref_logprobs: Tensor


@dataclass(frozen=True)
class Experience:
    """What an update learns from. All but `rollout` are (B, T), float32, 0 where the mask is False."""

    rollout: Rollout
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None


class Step(NamedTuple):
    """What an update rule is told of the update that it is part of."""

    number: int
    """Updates done before it."""
    old_kl_coef: float
    """Weight of KL(old || new) in the objective `kl_penalty`."""
    on_change: Callable[[], object]
    """Called before a weight changes other than by the optimizer."""


class MicrobatchSize(TypedDict):
    """How much goes through a trunk at a time, as arguments of `Rollout.batches`."""

    microbatch: int
    microbatch_tokens: int | None


def microbatch_size(config: PPOConfig) -> MicrobatchSize:
    """Return how much goes through a trunk at a time."""
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
) -> Scored:
    """Score every response (see `score_answers`) and get the log-probs of the old policy and of the reference.

    `transients` is where forward passes of the models find memory.
    """
    scale = scale or ScoreScale(config.score_scale)
    rollout, scores, raw_scores = score_answers(rollout, reward_fn, config, scale, first)
    size = microbatch_size(config)
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
    # Copied, because the memory of the phase is reused by the next one.
    kept = (old_logprobs.clone(), old_values.clone(), ref_logprobs.clone())
    return Scored(rollout, scores, raw_scores, *kept)


def advantages(
    scored: Scored, config: PPOConfig, kl_coef: float, backend: str = "auto"
) -> tuple[Experience, dict[str, float]]:
    """GAE of `-kl_coef * KL_t + [t is last] score`, whitened over the batch, and the numbers worth logging."""
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
        lam=config.lam,
        score_clip=config.score_clip,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages and config.whiten_scope == "batch",
        backend=backend,
    )
    weights = None
    if config.importance_cap is not None:
        weights = (scored.old_logprobs - rollout.sampling_logprobs).exp().clamp(max=config.importance_cap)
    if config.discount_gradient:
        discounts = gradient_discounts(rollout.mask, config.gamma)
        weights = discounts if weights is None else weights * discounts
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
    experience = Experience(rollout, scored.old_logprobs, scored.old_values, result.advantages, result.returns, weights)
    return experience, {name: float(value) for name, value in log.items()}


def gradient_discounts(mask: Tensor, gamma: float) -> Tensor:  # (B, T) -> (B, T)
    """gamma^t of action number t of its sequence (Sutton & Barto 2018, section 13.3)."""
    return gamma ** (mask.cumsum(1) - 1).clamp(min=0).float()

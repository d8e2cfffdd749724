"""Correction for a sampler whose probabilities differ from those of the policy: weights and masks of tokens."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from ..launch_args import Sequences
from ..token_args import (
    IMPORTANCE_ACTIONS,
    IMPORTANCE_LEVELS,
    IMPORTANCE_METRICS,
    IMPORTANCE_STATISTICS,
    ImportanceWeights,
    TokenSelection,
)
from . import checks

INF = float("inf")
OFF_POLICY_METRICS = ("mismatch_kl", "mismatch_k3", "mismatch_max", "rejected_share", "above_share", "num_tokens")
"""Keys of the metrics of `off_policy_sequence_mask`."""


def importance_weights(
    logprobs: Tensor,  # (B, T) or (N,)
    sampler_logprobs: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    level: str = "token",
    action: str = "truncate",
    metric: str = "ratio",
    low: float | None = None,
    high: float | None,
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
    backend: str = "auto",
) -> ImportanceWeights:
    """Return weights that correct for tokens from a sampler whose probabilities differ from the policy's.

        token:      ρ_t = exp(d_t)
        sequence:   ρ_t = exp(Σ d)        (the ratio of the probabilities of the whole sequence)
        geometric:  ρ_t = exp(Σ d / n)    (the geometric mean of the sequence's ratios)

    where `d = logprobs - sampler_logprobs` and the sums are over the n actions of the token's sequence. `logprobs` are
    those of the policy before its update, `sampler_logprobs` those that the sampler recorded. Log-ratios are limited to
    ±20.

        truncate:  w = min(ρ, high)
        clip:      w = clip(ρ, low, high)
        mask:      w = ρ, and 0 unless low <= x <= high

    x is ρ, or with `metric` an estimate of KL(sampler || policy), k1 = -d, k2 = d² / 2, k3 = exp(d) - 1 - d, of the
    token, summed over the sequence, or averaged over it, depending on the level. A bound that is None does not apply. A
    NaN fails the bounds.

    The result has the weights, the mask of the tokens that remain (all but those that `mask` rejects) and metrics. Pass
    `weights=` to `ppo_loss` or `linear_ppo_loss`: the policy term of a rejected token is 0, and the token stays in the
    denominators. Pass the mask instead of the original mask, and it leaves them. In both cases a rejected row of
    `linear_ppo_loss` needs no backward product, with the mask no product at all. Calls combine: the mask of one call
    can be the mask of the next.

    `metrics`, where units are tokens or, at the other levels, sequences with an action: `ess`, the effective sample
    size (Σ w)² / Σ w² as a share of the units; `chi2`, the mean of ρ² - 1; `mismatch_kl`, `mismatch_k3` and
    `mismatch_max`, the means of -d and of k3, and the largest |d|, over tokens; `rejected_share` of the tokens;
    `below_share` and `above_share`, units with x < low and x > high; `weight_mean` and `weight_max` over units;
    `num_tokens` of `mask`. If the bounds reject everything, the weights are 0, `ess` is 0 and `rejected_share` 1.

    There is no gradient. Results are float32.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (truncated
    weights); Liu et al. 2025, "When Speed Kills Stability" (sequence and geometric levels, masks); Kish 1965 (effective
    sample size).

    Raises:
        ValueError: a shape, dtype, device, range or choice that does not fit; `low` above `high`; a bound that the
            action does not read; a `metric` other than "ratio" with an action other than "mask".
    """
    _check_tokens(logprobs, sampler_logprobs, mask)
    checks.choice("level", level, IMPORTANCE_LEVELS)
    checks.sequences(logprobs, cu_seqlens, name="logprobs", needed=level != "token")
    check_rule(action, metric, low, high)
    rule = level, action, metric, -INF if low is None else low, INF if high is None else high
    return _weights(logprobs, sampler_logprobs, mask, None, cu_seqlens, rule, backend)


def off_policy_sequence_mask(
    logprobs: Tensor,  # (B, T) or (N,)
    sampler_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    max_kl: float,
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
    backend: str = "auto",
) -> TokenSelection:
    """Return the mask without the negative examples of sequences that have moved far from the sampler.

        kept_t = mask_t and (A_t >= 0 or Σ (sampler_logprobs - logprobs) / n <= max_kl)

    where the sum is over the n actions of the token's sequence and A are `advantages`. Pass the log-probs of the
    current policy: the mean then measures both the sampler's mismatch and the updates since. `metrics` are those of
    `importance_weights` named in `OFF_POLICY_METRICS`; `above_share` is the share of sequences above the bound, with any
    advantages. There is no gradient.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), eq. 9.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or `max_kl` that is not a number of at least 0.
    """
    _check_tokens(logprobs, sampler_logprobs, mask)
    checks.sequences(logprobs, cu_seqlens, name="logprobs")
    checks.tensor("advantages", advantages, like=logprobs, expected=logprobs.shape, what="the shape of logprobs")
    checks.number("max_kl", max_kl, least=0)
    rule = "geometric", "mask", "k1", -INF, max_kl
    found = _weights(logprobs, sampler_logprobs, mask, advantages, cu_seqlens, rule, backend)
    return TokenSelection(found.mask, {name: found.metrics[name] for name in OFF_POLICY_METRICS})


def _check_tokens(logprobs: Tensor, sampler_logprobs: Tensor | None, mask: Tensor) -> None:
    checks.floating("logprobs", logprobs, dims=(1, 2), what="[B, T] or [N]")
    like: checks.Like = {"like": logprobs, "expected": logprobs.shape, "what": "the shape of logprobs"}
    if sampler_logprobs is None:
        raise ValueError("sampler_logprobs is not set; pass the log-probs that the sampler recorded for its tokens")
    checks.tensor("sampler_logprobs", sampler_logprobs, **like)
    checks.mask("mask", mask, **like)


def check_rule(action: str, metric: str, low: float | None, high: float | None) -> None:
    """Raise ValueError for bounds and choices that do not fit together."""
    checks.choice("action", action, IMPORTANCE_ACTIONS)
    checks.choice("metric", metric, IMPORTANCE_STATISTICS)
    for name, bound in (("low", low), ("high", high)):
        checks.number(name, bound, least=None if metric == "k1" else 0, optional=True)
    if metric != "ratio" and action != "mask":
        raise ValueError(
            f"metric: got {metric!r} with action={action!r}, expected 'ratio': a divergence does not bound a weight; use "
            "action='mask'"
        )
    if action == "truncate" and low is not None:
        raise ValueError(
            f"low: got {low} with action='truncate', which has no lower bound; use action='clip' or 'mask'"
        )
    if action != "truncate" and low is None and high is None:
        raise ValueError(f"low and high are not set, but action={action!r} needs at least one of them")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low: got {low} with high={high}, expected at most high")


def _weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: tuple[str, str, str, float, float],
    backend: str,
) -> ImportanceWeights:
    level, action, metric, low, high = rule
    logprobs, sampler_logprobs = checks.wide(logprobs), checks.wide(sampler_logprobs)
    advantages = checks.wide(advantages)
    chosen = resolve("importance_weights", backend, logprobs)
    if chosen == "reference":
        from .. import reference

        return reference.importance_weights(
            logprobs, sampler_logprobs, mask, level=level, action=action, metric=metric, low=low, high=high,
            advantages=advantages, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    choices = IMPORTANCE_LEVELS.index(level), IMPORTANCE_ACTIONS.index(action), IMPORTANCE_STATISTICS.index(metric)
    run = _run if checks.is_eager(logprobs) else _op
    weights, kept, metrics = run(
        logprobs, sampler_logprobs, mask, advantages, cu_seqlens, *choices, float(low), float(high), chosen
    )
    return ImportanceWeights(weights, kept, dict(zip(IMPORTANCE_METRICS, metrics.unbind(), strict=True)))


def _run(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor | None, cu_seqlens: Tensor | None,
    level: int, action: int, statistic: int, low: float, high: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return kernels(backend).importance_weights(
        checks.dense(logprobs),
        checks.dense(sampler_logprobs),
        mask.contiguous(),
        None if advantages is None else checks.dense(advantages),
        Sequences.of(logprobs, cu_seqlens),
        level,
        action,
        statistic,
        low,
        high,
    )


def _fake(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *_: object) -> tuple[Tensor, ...]:
    weights = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    return weights, mask.new_empty(mask.shape), weights.new_empty(len(IMPORTANCE_METRICS))


_op = define(
    "importance_weights(Tensor logprobs, Tensor sampler_logprobs, Tensor mask, Tensor? advantages, Tensor? cu_seqlens,"
    " int level, int action, int statistic, float low, float high, str backend)"
    " -> (Tensor weights, Tensor kept, Tensor metrics)",
    run=_run,
    fake=_fake,
)

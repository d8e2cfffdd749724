"""The definitions of `importance_weights` and `off_policy_sequence_mask` in eager PyTorch."""

import torch
from torch import Tensor

from ..token_args import IMPORTANCE_METRICS, LOG_RATIO_BOUND, ImportanceWeights, TokenSelection
from .kl_penalty import kl_penalty
from .segments import segment_ids


def importance_weights(
    logprobs: Tensor,  # (B, T) or (N,)
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    action: str = "truncate",
    metric: str = "ratio",
    low: float = -torch.inf,
    high: float = torch.inf,
    advantages: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> ImportanceWeights:
    """Return `exp(log-ratio)` at the level, bounded or masked. With `advantages`, only negative ones are masked."""
    on = mask.reshape(-1)
    d = torch.where(on, (logprobs - sampler_logprobs).reshape(-1), 0)
    limited = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    k3 = kl_penalty(-limited, torch.zeros_like(d), estimator="k3")
    kl = torch.zeros_like(d) if metric == "ratio" else kl_penalty(-limited, torch.zeros_like(d), estimator=metric)
    log_ratio, counts = d, on.to(d.dtype)
    if level != "token":
        sequence, b = segment_ids(mask, cu_seqlens)
        lengths = d.new_zeros(b).index_add(0, sequence, counts)
        divisor = lengths.clamp(min=1) if level == "geometric" else 1
        log_ratio, kl = ((x.new_zeros(b).index_add(0, sequence, x) / divisor)[sequence] for x in (d, kl))
        counts = torch.where(on, 1 / lengths[sequence], 0)  # the tokens of a sequence are one unit
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    found = ratio if metric == "ratio" else kl
    outside = ~((found >= low) & (found <= high)) & (action == "mask")
    drops = outside if advantages is None else outside & (advantages.reshape(-1) < 0)
    kept = on & ~drops
    bounded = ratio if action == "mask" else ratio.clamp(low, high)
    weights, of_unit = (torch.where(on & ~x, bounded, 0) for x in (drops, drops if level == "token" else outside))
    metrics = _metrics(d, k3, on, drops, ratio, of_unit, (found < low, found > high), counts)
    shaped = weights.view(mask.shape), kept.view(mask.shape)
    return ImportanceWeights(*shaped, dict(zip(IMPORTANCE_METRICS, metrics, strict=True)))


def _metrics(
    d: Tensor, k3: Tensor, on: Tensor, drops: Tensor, ratio: Tensor, weights: Tensor, beyond: tuple[Tensor, Tensor],
    counts: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the metrics; a token counts `counts` units, which add up to 1 per token or per sequence."""
    units, tokens = counts.sum().clamp(min=1), on.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return (torch.where(on, x, 0) * counts).sum() / units

    def largest(x: Tensor) -> Tensor:
        return torch.where(on, x, 0).amax() if x.numel() else x.new_zeros(())

    total, squares = mean(weights), mean(weights.square())
    return (
        torch.where(squares == 0, 0, total.square() / squares),
        mean(ratio.square() - 1),
        -d.sum() / tokens,
        torch.where(on, k3, 0).sum() / tokens,
        largest(d.abs()),
        (on & drops).sum() / tokens,
        mean(beyond[0].to(d.dtype)),
        mean(beyond[1].to(d.dtype)),
        total,
        largest(weights),
        on.sum().to(d.dtype),
    )


def off_policy_sequence_mask(
    logprobs: Tensor,  # (B, T) or (N,)
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    max_kl: float,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> TokenSelection:
    """Return the mask without the tokens with A < 0 of sequences whose mean k1 exceeds `max_kl`."""
    _, kept, metrics = importance_weights(
        logprobs, sampler_logprobs, mask, level="geometric", action="mask", metric="k1", high=max_kl,
        advantages=advantages, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return TokenSelection(kept, metrics)

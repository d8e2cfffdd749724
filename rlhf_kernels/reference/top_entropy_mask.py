"""The definition of `top_entropy_mask` in eager PyTorch."""

import torch
from torch import Tensor

from ..token_args import ENTROPY_METRICS, TokenSelection


def top_entropy_mask(
    entropy: Tensor,  # any shape
    mask: Tensor,  # same shape, bool
    *,
    entropy_quantile: float,
) -> TokenSelection:
    """Return the tokens whose entropy is at least the (1 - entropy_quantile)-quantile of the True tokens."""
    found = torch.where(mask, entropy.double(), torch.inf).flatten().sort().values  # NaN is last, after the padding
    last = (mask.sum() - 1).clamp(min=0)
    place = last - entropy_quantile * last.double()
    low = place.floor().long()
    ends = found[torch.stack((low, torch.minimum(low + 1, last)))] if found.numel() else found.new_zeros(2)
    threshold = ends[0] + (place - low) * (ends[1] - ends[0])
    threshold = torch.where(mask.any(), threshold, 0)
    threshold = torch.where((mask & entropy.isnan()).any(), torch.nan, threshold)
    kept = mask & (entropy.double() >= threshold)
    tokens = mask.sum()
    rejected = 1 - kept.sum() / tokens.clamp(min=1)
    metrics = threshold, torch.where(tokens > 0, rejected, 0), tokens
    return TokenSelection(kept, {k: x.to(entropy.dtype) for k, x in zip(ENTROPY_METRICS, metrics, strict=True)})

"""Selection of the tokens with the highest entropy by torch's radix sort; a Triton kernel would not sort faster."""

import torch
from torch import Tensor


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sort the entropies of the True tokens; the host does not wait for their number."""
    count = mask.sum()
    found = torch.where(mask, entropy, torch.inf).flatten().sort().values  # NaN is last, after the padding
    last = (count - 1).clamp(min=0)
    place = last - share * last.double()
    low = place.floor().long()
    ends = torch.stack((low, torch.minimum(low + 1, last)))
    ends = found[ends].double() if found.numel() else found.new_zeros(2, dtype=torch.float64)
    threshold = torch.where(count > 0, ends[0] + (place - low) * (ends[1] - ends[0]), 0)
    threshold = torch.where((mask & entropy.isnan()).any(), torch.nan, threshold)
    kept = mask & (entropy.double() >= threshold)
    rejected = torch.where(count > 0, 1 - kept.sum() / count.clamp(min=1), 0)
    return kept, torch.stack((threshold, rejected, count)).float()

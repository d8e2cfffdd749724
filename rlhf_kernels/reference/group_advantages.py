"""The definition of `group_advantages` in eager PyTorch."""

import torch
from torch import Tensor


def group_advantages(
    scores: Tensor,  # (B,)
    groups: Tensor,  # (B,)
    *,
    kind: str = "rloo",
    eps: float = 1e-4,
    std: str = "sample",
) -> Tensor:  # (B,)
    """Return the advantage of each response relative to its group (the responses to one prompt)."""
    _, index = groups.unique(return_inverse=True)
    zeros = scores.new_zeros(int(index.max()) + 1 if index.numel() else 0)
    count = zeros.index_add(0, index, torch.ones_like(scores))[index]
    centred = scores - (zeros.index_add(0, index, scores)[index] / count)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0)
    degrees = count if std == "population" else count - 1
    variance = zeros.index_add(0, index, centred.square())[index] / degrees.clamp(min=1)
    return centred / (variance.sqrt() + eps)

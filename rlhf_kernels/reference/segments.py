"""Conversion between padded `[B, T]` and packed `[N]` batches, and the sequence of each token."""

import torch
from torch import Tensor


def segment_ids(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Return the index of the sequence of each token, (N,), and the number of sequences.

    (N,) tokens without `cu_seqlens` are one sequence; the public functions raise ValueError for them where sequences
    matter.
    """
    if cu_seqlens is None:
        b, t = mask.shape if mask.dim() == 2 else (1, mask.numel())
        return torch.arange(b, device=mask.device).repeat_interleave(t), b
    lengths = cu_seqlens.diff().long()
    b = lengths.numel()
    return torch.repeat_interleave(torch.arange(b, device=mask.device), lengths, output_size=mask.numel()), b


def pad(x: Tensor, cu_seqlens: Tensor | None, fill: float = 0) -> Tensor:
    """Return a packed (N,) tensor as (B, T) with `fill` after each sequence; return a padded tensor unchanged."""
    if cu_seqlens is None:
        return x
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    t = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=x.device)
    inside = t < lengths[:, None]
    index = torch.where(inside, starts[:, None] + t, 0)
    padded = x[index] if x.numel() else x.new_zeros(index.shape)
    return torch.where(inside, padded, torch.full_like(padded, fill))


def unpad(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return a (B, T) tensor as packed (N,), the inverse of `pad`."""
    if cu_seqlens is None:
        return x
    inside = torch.arange(x.shape[1], device=x.device) < cu_seqlens.diff()[:, None]
    return x[inside]

"""Padded `[B, T]` and packed `[N]` batches seen as one: flat tokens and the sequence that each belongs to."""

import torch
from torch import Tensor


def segment_ids(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence of every flat token, shape (N,), and the number of sequences.

    Flat tokens without `cu_seqlens` are one sequence; the public functions refuse them where sequences matter.
    """
    if cu_seqlens is None:
        b, t = mask.shape if mask.dim() == 2 else (1, mask.numel())
        return torch.arange(b, device=mask.device).repeat_interleave(t), b
    lengths = cu_seqlens.diff().long()
    b = lengths.numel()
    return torch.repeat_interleave(torch.arange(b, device=mask.device), lengths, output_size=mask.numel()), b


def pad(x: Tensor, cu_seqlens: Tensor | None, fill: float = 0) -> Tensor:
    """Packed (N,) to (B, T) with `fill` behind each sequence; a padded tensor passes through."""
    if cu_seqlens is None:
        return x
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    t = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=x.device)
    inside = t < lengths[:, None]
    index = torch.where(inside, starts[:, None] + t, 0)
    padded = x[index] if x.numel() else x.new_zeros(index.shape)
    return torch.where(inside, padded, torch.full_like(padded, fill))


def unpad(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The inverse of `pad`: (B, T) back to packed (N,)."""
    if cu_seqlens is None:
        return x
    inside = torch.arange(x.shape[1], device=x.device) < cu_seqlens.diff()[:, None]
    return x[inside]

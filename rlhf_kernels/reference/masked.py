"""The definitions of `masked_mean` and `masked_whiten` in eager PyTorch."""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` over the True entries of `mask`; 0 if there are none."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True) -> Tensor:
    """Return `(x - mean) * rsqrt(var + 1e-8)` where `mask` is True, else 0; `shift_mean=False` adds the mean back."""
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0)
    count = mask.sum()
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    white = centred * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0)

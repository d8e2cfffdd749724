import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask`; 0 when nothing is."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True) -> Tensor:
    """`(x - mean) * rsqrt(var + 1e-8)` where `mask`, 0 elsewhere; without `shift_mean` the mean is added back."""
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0)
    count = mask.sum()
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    white = centred * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0)

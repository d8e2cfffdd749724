"""Masked statistics."""

from torch import Tensor

from .. import reference
from . import checks


def masked_mean(x: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean of `x` over the True entries of `mask` (same shape), a float32 scalar; 0 when nothing is True.

    Raises:
        ValueError: shapes or devices that differ, a mask that is not bool.
    """
    _check(x, mask)
    return reference.masked_mean(checks.widen(x), mask)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, backend: str = "auto"
) -> Tensor:
    """`(x - mean) / sqrt(var + 1e-8)` over the True entries, 0 elsewhere, float32.

    `shift_mean=False` adds the mean back (only the scale changes); `unbiased` divides the sum of squares by n - 1. One
    True entry, or none, has variance 0 and is not divided by 0.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (its code's `whiten`).

    Raises:
        ValueError: shapes or devices that differ, a mask that is not bool.
    """
    _check(x, mask)
    return reference.masked_whiten(checks.widen(x), mask, shift_mean=shift_mean, unbiased=unbiased)


def _check(x: Tensor, mask: Tensor) -> None:
    checks.floating("x", x, dims=tuple(range(8)), what="any shape")
    checks.mask("mask", mask, like=x, expected=x.shape, what="the shape of x")

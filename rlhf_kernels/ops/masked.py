# pyright: reportUnknownMemberType=false
# torch does not declare the type of `Function.apply`.
"""Mean and whitening over the True entries of a mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks


def masked_mean(x: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the mean of `x` over the True entries of `mask`, which has the same shape.

    The result is a float32 scalar, differentiable in `x`. It is 0 if no entry is True.

    Raises:
        ValueError: a shape or device that does not fit, or a mask that is not bool.
    """
    _check(x, mask)
    chosen = resolve("masked_mean", backend, x)
    if chosen == "reference":
        from .. import reference

        return reference.masked_mean(checks.widen(x), mask)
    return _run(Mean, _mean, _mean_run, checks.widen(x), mask, chosen)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, backend: str = "auto"
) -> Tensor:
    """Return `x` with mean 0 and variance 1 over the True entries of `mask`, which has the same shape.

        (x - mean) / sqrt(var + 1e-8)

    where mean and variance are over the n True entries, and `var` divides the sum of squares by n - 1 (`unbiased=True`)
    or n, and by at least 1. `shift_mean=False` adds the mean back, so that only the scale changes. The result is 0
    where the mask is False. It is float32 and differentiable in `x`.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (`whiten` in its code).

    Raises:
        ValueError: a shape or device that does not fit, or a mask that is not bool.
    """
    _check(x, mask)
    chosen = resolve("masked_whiten", backend, x)
    if chosen == "reference":
        from .. import reference

        return reference.masked_whiten(checks.widen(x), mask, shift_mean=shift_mean, unbiased=unbiased)
    return _run(Whiten, _whiten, _whiten_run, checks.widen(x), mask, shift_mean, unbiased, chosen)


def _run(function: Any, op: Any, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call the registered op for a tensor that a compiler traces, otherwise what it runs, at a third of the overhead."""
    if not checks.is_eager(x):
        return op(x, *rest)
    return function.apply(x, *rest) if torch.is_grad_enabled() and x.requires_grad else run(x, *rest)


def _check(x: Tensor, mask: Tensor) -> None:
    checks.floating("x", x, dims=tuple(range(8)), what="any shape")
    checks.mask("mask", mask, like=x, expected=x.shape, what="the shape of x")


def _mean_run(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    return kernels(backend).masked_mean(checks.dense(x), mask.contiguous())


def _mean_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _mean_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, mask, _ = inputs
    ctx.save_for_backward(mask)


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad / mask.sum().clamp(min=1), 0), None, None


def _whiten_run(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, backend: str) -> Tensor:
    return kernels(backend).masked_whiten(checks.dense(x), mask.contiguous(), shift_mean, unbiased)


def _whiten_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _whiten_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, mask, ctx.shift_mean, ctx.unbiased, _ = inputs
    ctx.save_for_backward(x, mask)


def _whiten_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Return `s (g - mean g) - s³ c Σ g c / (n - 1)`, plus mean g if the mean is added back.

    where c = x - mean and s = (var + 1e-8)^-1/2. It is computed in float64, like the statistics of the forward pass,
    because the rounding error of a large mean would be an error of every c.
    """
    x, mask = ctx.saved_tensors
    x, g = x.double(), torch.where(mask, grad, 0).double()
    n = mask.sum()
    degrees = (n - int(ctx.unbiased)).clamp(min=1)
    mean = torch.where(mask, x, 0).sum() / n.clamp(min=1)
    centred = torch.where(mask, x - mean, 0)
    s = torch.rsqrt(centred.square().sum() / degrees + 1e-8)
    mean_g = g.sum() / n.clamp(min=1)
    dx = s * (g - mean_g) - s**3 * centred * (g * centred).sum() / degrees
    dx = torch.where(mask, dx if ctx.shift_mean else dx + mean_g, 0)
    return dx.to(grad.dtype), None, None, None, None


class Mean(torch.autograd.Function):
    """The differentiable mean for tensors with data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, backend: str) -> Tensor:
        """Return the mean."""
        _mean_save(ctx, (x, mask, backend), None)
        return _mean_run(x, mask, backend)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of `x` from that of the mean."""
        return _mean_backward(ctx, grad)


class Whiten(torch.autograd.Function):
    """The differentiable whitening for tensors with data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, backend: str) -> Tensor:
        """Return the whitened tensor."""
        _whiten_save(ctx, (x, mask, shift_mean, unbiased, backend), None)
        return _whiten_run(x, mask, shift_mean, unbiased, backend)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of `x` from that of the whitened tensor."""
        return _whiten_backward(ctx, grad)


_mean = define(
    "masked_mean(Tensor x, Tensor mask, str backend) -> Tensor",
    run=_mean_run,
    fake=_mean_fake,
    save=_mean_save,
    backward=_mean_backward,
)
_whiten = define(
    "masked_whiten(Tensor x, Tensor mask, bool shift_mean, bool unbiased, str backend) -> Tensor",
    run=_whiten_run,
    fake=_whiten_fake,
    save=_whiten_save,
    backward=_whiten_backward,
)

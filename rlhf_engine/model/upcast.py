"""Linear layers in half precision on a processor that has no instructions for it.

torch leaves such a product to loops that take several times as long as float32's. Here its factors are rounded as they would
be, multiplied as float32, and the result is rounded once: the same numbers but for the order of their sums, in about the time
of float32's where there are hundreds of rows. With few, as in a decode step, widening the weight takes as long as the product.
Biases are added before the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_kernels import has_products

_HALF = (torch.bfloat16, torch.float16)
_PART = 2**22
"""Numbers of a weight that are float32 at a time."""


def upcast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Make `model`'s linear layers `UpcastLinear`s, for good, where products of `dtype` are to be and its device has none."""
    if has_products(dtype, next(model.parameters()).device.type):
        return
    for module in model.modules():
        if type(module) is nn.Linear:  # an adapter's layer is its own affair
            module.__class__ = UpcastLinear


class UpcastLinear(nn.Linear):
    """`nn.Linear` whose half-precision product, autocast's or its own, has float32 factors. It is differentiated once."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        if dtype not in _HALF:
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias, dtype)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` of the three rounded to a dtype. It keeps the rounded `x`, and rounds the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rounded = x.to(dtype)
        ctx.save_for_backward(rounded if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype, ctx.shape = dtype, x.shape
        ctx.kinds = [None if one is None else _gradient_dtype(one) for one in (x, weight, bias)]
        out = rounded.new_empty(*x.shape[:-1], len(weight))
        with torch.autocast("cpu", enabled=False):
            wide = rounded.float()
            for rows in _parts(weight):
                product = wide @ weight[rows].to(dtype).float().t()
                out[..., rows] = product if bias is None else product.add_(bias[rows].to(dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rounded, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        with torch.autocast("cpu", enabled=False):
            slope = slope.flatten(0, -2).float()
            if ctx.needs_input_grad[0]:
                to_x = sum(slope[:, rows] @ weight[rows].to(ctx.dtype).float() for rows in _parts(weight))
                to_x = to_x.to(ctx.kinds[0]).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                to_weight = (slope.t() @ rounded.flatten(0, -2).float()).to(ctx.kinds[1])
            if ctx.needs_input_grad[2]:
                to_bias = slope.sum(0).to(ctx.kinds[2])
        return to_x, to_weight, to_bias, None


def _parts(weight: Tensor) -> list[slice]:
    """Rows of a weight, some at a time."""
    size = max(1, _PART // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _gradient_dtype(x: Tensor) -> torch.dtype:
    return (x.grad_dtype if x.is_leaf else None) or x.dtype

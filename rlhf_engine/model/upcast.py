"""Linear layers in half precision on a processor that has no instructions for it.

torch leaves such a product to loops that are ten to fifty times as slow as float32's. Here its factors are rounded as they
would be, multiplied as float32, and the result is rounded once: the same numbers but for the order of their sums, about as fast
as float32. Biases are added before the rounding; a weight's gradient is not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels import has_products


def upcast_products(trunk: nn.Module, dtype: torch.dtype) -> None:
    """From now on `trunk`'s linear layers multiply `dtype` so, where its device has no products of that type."""
    if has_products(dtype, next(trunk.parameters()).device.type):
        return
    for module in trunk.modules():
        if type(module) is nn.Linear:  # an adapter's layer is its own affair
            module.__class__ = UpcastLinear


class UpcastLinear(nn.Linear):
    """`nn.Linear` whose half-precision product, autocast's or its own, has float32 factors."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        if dtype == torch.float32:
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias, dtype)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` of the three rounded to a dtype. It keeps the rounded `x`, and rounds the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rounded = x.to(dtype)
        ctx.save_for_backward(rounded, weight)
        ctx.kinds = x.dtype, bias is not None and bias.dtype
        with torch.autocast("cpu", enabled=False):
            product = rounded.float() @ weight.to(dtype).float().t()
            if bias is not None:
                product += bias.to(dtype)
            return product.to(dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rounded, weight = ctx.saved_tensors
        (x_dtype, bias_dtype), wanted = ctx.kinds, ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            slope = slope.float()
            to_x = (slope @ weight.to(rounded.dtype).float()).to(x_dtype) if wanted[0] else None
            rows, columns = slope.flatten(0, -2), rounded.flatten(0, -2).float()
            to_weight = (rows.t() @ columns).to(weight.dtype) if wanted[1] else None
            to_bias = rows.sum(0).to(bias_dtype) if wanted[2] else None
        return to_x, to_weight, to_bias, None

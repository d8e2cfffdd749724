"""The product of a frozen linear layer with an adapter, in six matrix products and no elementwise pass over (N, O) or (N, I).

    y  = x W^T + b + s u B^T       u  = x A^T
    dx = dy W + du A               du = s dy B
    dA = du^T x                    dB = s dy^T u

peft computes `s u B^T` and the sum with three passes over (N, O), and autograd adds the two parts of dx. On a CPU these
passes take about as long as the products with A and B.

Source: Hu et al. 2021, "LoRA", equation 3. Legend: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LowRankLinear(Linear):
    """A layer of peft that computes as above if its frozen layer is an `nn.Linear` whose dtype is that of the product.

    Layers of other kinds, autocast and several active adapters are computed by peft.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:  # (..., I) -> (..., O)
        """Return the product with the active adapter."""
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not names and not self.merged and not options:
            return self.base_layer(x)
        if len(names) != 1 or self.merged or options or not self._computes(names[0], x):
            return super().forward(x, *args, **options)
        (name,) = names
        layer: Any = self
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        if torch.is_grad_enabled():
            return _Product.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return _multiply(x, base.weight, base.bias, a, b, self.scaling[name])[0]

    def _computes(self, name: str, x: Tensor) -> bool:
        """Return whether all factors have the dtype of the product, and the weight is frozen."""
        base, kind = self.base_layer, x.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if type(base) is not nn.Linear or cast:
            return False
        return x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype and not base.weight.requires_grad


def fuse_products(layers: Iterable[nn.Module]) -> None:
    """Turn the linear layers of peft into `LowRankLinear`s, permanently."""
    for layer in layers:
        if type(layer) is Linear:  # not a subclass, such as a layer of a quantisation package
            layer.__class__ = LowRankLinear


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return y (..., O) and u (N, R)."""
    rows = _rows(x)
    y, u = nn.functional.linear(rows, weight, bias), rows @ a.t()
    return y.addmm_(u, b.t(), alpha=scale).view(*x.shape[:-1], len(weight)), u


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


class _Product(torch.autograd.Function):
    """The product above, with gradients for x, A and B of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, u = _multiply(x, weight, bias, a, b, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, u)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, a, b, u = ctx.saved_tensors
        rows, dy = _rows(x), _rows(dy)
        twice = torch.is_grad_enabled()
        if twice:  # u was computed outside of the graph
            u = rows @ a.t()
        du, dx = (dy @ b) * ctx.scale, None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx = (torch.addmm(dx, du, a) if twice else dx.addmm_(du, a)).view(x.shape)
        da = du.t() @ rows if ctx.needs_input_grad[3] else None
        db = (dy.t() @ u) * ctx.scale if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None

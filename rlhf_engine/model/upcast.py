"""Linear layers and attention in half precision on a processor without half-precision instructions.

On such a processor torch computes these products in loops that take several times as long as in float32. Here the
factors are rounded to half precision as usual, multiplied in float32, and the result is rounded once. The numbers are
the same except for the order of the sums. With hundreds of rows it takes about as long as a float32 product. With few
rows, as in a decode step, the conversion of the weight to float32 takes as long as the product. Biases are added before
the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from rlhf_kernels import has_products

_HALF = (torch.bfloat16, torch.float16)
_PART = 2**22
"""Elements of a weight that are converted to float32 at a time."""
_rounded_weights: ContextVar[dict[tuple[Tensor, torch.dtype], Tensor] | None] = ContextVar(
    "rounded_weights", default=None
)


def upcasts(dtype: torch.dtype, device: str) -> bool:
    """Return whether this module computes the products of `dtype` on devices of type `device`."""
    return dtype in _HALF and not has_products(dtype, device)


def upcast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the linear layers of `model` into `UpcastLinear`s, permanently, if its device has no products of `dtype`."""
    if not upcasts(dtype, next(model.parameters()).device.type):
        return
    for module in model.modules():
        if type(module) is nn.Linear:  # not a subclass, such as an adapter's layer
            module.__class__ = UpcastLinear


@contextmanager
def weights_rounded_once() -> Iterator[None]:
    """Round each weight that requires a gradient once for all passes without gradient in the context, as autocast does.

    The rounded copies do not follow a weight that changes inside the context.
    """
    if _rounded_weights.get() is not None:
        yield
        return
    token = _rounded_weights.set({})
    try:
        yield
    finally:
        _rounded_weights.reset(token)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kept, learns = _rounded_weights.get(), weight.is_leaf and weight.requires_grad
    if kept is None or not learns or torch.is_grad_enabled():
        return weight.detach().to(dtype)
    if (weight, dtype) not in kept:
        kept[weight, dtype] = weight.detach().to(dtype)
    return kept[weight, dtype]


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with the factor `x`: autocast's if that is on, otherwise the factor's."""
    kind = x.device.type  # such as meta, which has no autocast
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


class UpcastLinear(nn.Linear):
    """`nn.Linear` that computes half-precision products, autocast's or its own, in float32. It has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """Return `x @ weight.T + bias`."""
        dtype = product_dtype(self.weight)
        if dtype not in _HALF:
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias, _rounded(self.weight, dtype))


class _Product(torch.autograd.Function):
    """`x @ half.T + bias` of factors rounded to the dtype of `half`. The rounded factors are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, half: Tensor) -> Tensor:
        rounded = x.to(half.dtype)
        ctx.save_for_backward(rounded if ctx.needs_input_grad[1] else None, half)
        ctx.shape, ctx.kinds = x.shape, [None if one is None else _gradient_dtype(one) for one in (x, weight, bias)]
        with torch.autocast("cpu", enabled=False):
            wide, biases = rounded.float(), None if bias is None else bias.to(half.dtype)
            outputs = []
            for rows in _parts(half):
                product = wide @ half[rows].float().t()
                outputs.append((product if biases is None else product.add_(biases[rows])).to(half.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rounded, half = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        with torch.autocast("cpu", enabled=False):
            slope = slope.flatten(0, -2).float()
            if ctx.needs_input_grad[0]:
                first, *others = _parts(half)
                to_x = slope[:, first] @ half[first].float()
                for rows in others:
                    to_x.addmm_(slope[:, rows], half[rows].float())
                to_x = to_x.to(ctx.kinds[0]).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                to_weight = (slope.t() @ rounded.flatten(0, -2).float()).to(ctx.kinds[1])
            if ctx.needs_input_grad[2]:
                to_bias = slope.sum(0).to(ctx.kinds[2])
        return to_x, to_weight, to_bias, None


def _parts(weight: Tensor) -> list[slice]:
    """Return slices of a weight's rows, of at most `_PART` elements or one row each."""
    size = max(1, _PART // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _gradient_dtype(x: Tensor) -> torch.dtype:
    return (x.grad_dtype if x.is_leaf else None) or x.dtype


# ---- attention; shapes: B sequences, S queries, D head size ----


class UpcastAttention(TorchFunctionMode):
    """`with UpcastAttention():` computes torch's half-precision attention, autocast's or its own, with float32 products.

    It replaces `scaled_dot_product_attention` itself, so it applies to all callers and all masks.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            func = _attention
        return func(*args, **kwargs or {})


def _attention(
    query: Tensor,  # (B, heads, S, D)
    key: Tensor,  # (B, groups, columns, D)
    value: Tensor,  # (B, groups, columns, D)
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:  # (B, heads, S, D)
    """Return `scaled_dot_product_attention` of the rounded factors, computed in float32; with dropout, call the original."""
    attend, dtype = nn.functional.scaled_dot_product_attention, product_dtype(query)
    if dtype not in _HALF or dropout_p:
        return attend(query, key, value, attn_mask, dropout_p, **options)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    return _Attention.apply(partial(attend, attn_mask=attn_mask, **options), dtype, query, key, value)


class _Attention(torch.autograd.Function):
    """`attend(query, key, value)` of the rounded tensors. It saves only these and recomputes attention in the backward pass."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], dtype: torch.dtype, *factors: Tensor) -> Tensor:
        rounded = [factor.to(dtype) for factor in factors]
        ctx.save_for_backward(*rounded)
        ctx.attend, ctx.kinds = attend, [factor.dtype for factor in factors]
        with torch.autocast("cpu", enabled=False):
            return attend(*(factor.float() for factor in rounded)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            factors = [factor.float().requires_grad_() for factor in ctx.saved_tensors]
            gradients = torch.autograd.grad(ctx.attend(*factors), factors, slope.float())
        return None, None, *(one.to(kind) for one, kind in zip(gradients, ctx.kinds, strict=True))

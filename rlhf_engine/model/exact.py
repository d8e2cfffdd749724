"""Layers on the CPU whose bits depend on neither the batch nor the pass: activations, and attention row by row.

Decode steps always use them. With `rollout.exact` all passes do (`make_exact`), so that scoring and training compute the
log-probs of the sampler bit for bit. The other operations of a trunk have this property without a replacement, if products
have at least `MIN_ROWS` rows: BLAS sums a row in the same order for any larger number of rows.

Shapes: B sequences, S positions, D and E head sizes of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from rlhf_kernels import decode_attention

ATTENTION = "rlhf_exact"
_EXACT = "rlhf_is_exact"
"""Attribute of a trunk and of its activations that `make_exact` has replaced."""
MIN_ROWS = 16
"""Minimum number of rows of a product. BLAS sums the rows of smaller products in a different order."""


def make_exact(trunk: PreTrainedModel) -> None:
    """Let all later passes of a trunk use the layers of this module.

    Raises:
        ValueError: the trunk is not on the CPU, or its attention is not "sdpa".
    """
    name, device = type(trunk).__name__, trunk.device
    if device.type != "cpu":
        raise ValueError(f"rollout.exact: got True on {device}, expected False: only passes on a CPU can be exact")
    if (kind := trunk.config.get_text_config()._attn_implementation) != "sdpa":
        raise ValueError(f"rollout.exact: got True for {name} with attention {kind!r}, expected False; it needs 'sdpa'")
    trunk.__dict__[_EXACT] = True
    for module in trunk.modules():
        formula = invariant_activation(module)
        if formula is not None and not is_exact(module):
            module.__dict__[_EXACT] = True
            module.forward = partial(_apply, formula, _DERIVATIVES[formula])


def is_exact(module: nn.Module) -> bool:
    """Return whether `make_exact` was called for a trunk, or has replaced an activation."""
    return bool(module.__dict__.get(_EXACT))


# ---- activations ----

_CHUNK = 2**16
"""Elements per block of a chain of element-wise operations. A block stays in the CPU cache and needs no large temporary."""


def exact_silu(x: Tensor) -> Tensor:
    """Return `x / (1 + e^-x)`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    for part, result in zip(x.view(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
        wide = part.float()
        result.copy_(torch.div(wide, torch.neg(wide).exp_().add_(1)))
    return out


def exact_gelu(x: Tensor) -> Tensor:
    """Return `x (1 + erf(x / sqrt 2)) / 2`."""
    wide = x.float()
    return (wide * math.sqrt(0.5)).erf_().add_(1).mul_(wide).mul_(0.5).to(x.dtype)


def exact_gelu_tanh(x: Tensor) -> Tensor:
    """Return `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`."""
    wide = x.float()
    inner = (wide * wide).mul_(0.044715).add_(1).mul_(wide).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(wide).mul_(0.5).to(x.dtype)


def invariant_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the formula of an activation whose CPU kernel ends in scalar code, or None for other modules."""
    if isinstance(module, (nn.SiLU, SiLUActivation)):
        return exact_silu
    if isinstance(module, nn.GELU):
        return exact_gelu if module.approximate == "none" else exact_gelu_tanh
    return {GELUActivation: exact_gelu, GELUTanh: exact_gelu_tanh}.get(type(module))


_DERIVATIVES: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    exact_silu: torch.ops.aten.silu_backward.default,
    exact_gelu: torch.ops.aten.gelu_backward.default,
    exact_gelu_tanh: partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
}
"""Formula -> function of the gradient of its result and of `x`, which returns the gradient of `x`."""


def _apply(formula: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    return _Activation.apply(x, formula, derivative) if torch.is_grad_enabled() and x.requires_grad else formula(x)


class _Activation(torch.autograd.Function):
    """A formula in the forward pass, and torch's derivative in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, formula: Callable[..., Tensor], derivative: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative = derivative
        return formula(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.derivative(gradient, x), None, None


# ---- attention ----


def row_attention(
    query: Tensor,  # (R, heads, D)
    key: Tensor,  # (R, groups, W, D)
    value: Tensor,  # (R, groups, W, E)
    mask: Tensor,  # (R, W), bool
    scaling: float | None = None,  # default: D ** -0.5
) -> Tensor:  # (R, heads, E)
    """Return `decode_attention` for keys and values of any head sizes."""
    size, scale = value.shape[-1], query.shape[-1] ** -0.5 if scaling is None else scaling
    wide = max(query.shape[-1], size)  # the kernel has one head size for keys and values
    query, key, value = (
        x if x.shape[-1] == wide else nn.functional.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value)
    )
    return decode_attention(query.to(key.dtype), key, value, mask, scale=scale)[..., :size]


def exact_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, S, D)
    key: Tensor,  # (B, groups, S, D)
    value: Tensor,  # (B, groups, S, E)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,  # arguments of other implementations: dropout, is_causal
) -> tuple[Tensor, None]:  # (B, S, heads, E)
    """Return causal attention through transformers' interface, each row with the bits of its decode step."""
    assert attention_mask is None, "sequences begin at column 0 and are padded on the right"
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a cache has the dtype of the values
    return _CausalAttention.apply(query, key, value, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, exact_attention)


@lru_cache(maxsize=4)  # all layers of a pass have the same one
def _reachable(length: int, window: int | None) -> Tensor:  # (S, S), bool
    position = torch.arange(length)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < (length if window is None else window))


class _CausalAttention(torch.autograd.Function):
    """Attention row by row in the forward pass; the gradients are those of torch's attention."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:  # (B, S, heads, E)
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.window = scaling, window
        batch, heads, length, _ = query.shape
        mask = _reachable(length, window)
        out = value.new_empty(batch, length, heads, value.shape[-1])
        for row in range(batch):
            keys, values = (x[row].expand(length, -1, -1, -1) for x in (key, value))
            out[row] = row_attention(query[row].transpose(0, 1), keys, values, mask, scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dtype, window, length = gradient.dtype, ctx.window, gradient.shape[1]
        leaves = [x.detach().float().requires_grad_() for x in ctx.saved_tensors]
        mask = None if window is None or window >= length else _reachable(length, window)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            query, key, value = leaves
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=ctx.scaling, enable_gqa=True
            )
        found = torch.autograd.grad(out, leaves, gradient.transpose(1, 2).float())
        return *(x.to(dtype) for x in found), None, None

"""Layers whose bits do not depend on the batch, put in place of torch's while a trunk decodes.

Attention: torch's fused kernel on CPU hands each thread a scratch block whose alignment depends on the thread, and BLAS
rounds by alignment: with one query a sequence the bits depend on which thread took it. `decode_attention` reads the columns of
a row's own sequence and nothing else.

Activations: torch's loops for SiLU, GELU and sigmoid on CPU end in scalar code, which rounds differently from the vector
code, wherever a thread's share of the tensor ends. exp, erf and tanh do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from rlhf_engine.model import ActorCritic
from rlhf_engine.model.trunk import attention
from rlhf_kernels import decode_attention

ATTENTION = "rlhf_slots"
REPLACED = ("sdpa", "flash_attention_2")
"""Implementations in whose place it decodes."""


def slot_attention(
    module: nn.Module,
    query: Tensor,  # (R, heads, 1, D)
    key: Tensor,  # (slots, groups, W, D), slots <= R
    value: Tensor,  # (slots, groups, W, D)
    attention_mask: Tensor,  # (R, 1, 1, W), bool
    scaling: float | None = None,  # default: D ** -0.5
    **unused: object,  # what other implementations are told too: dropout, sliding_window, is_causal
) -> tuple[Tensor, None]:  # (R, 1, heads, D)
    """`decode_attention` in transformers' attention interface; rows without a slot get zeros."""
    slots = len(key)
    out = decode_attention(query[:slots, :, 0].to(key.dtype), key, value, attention_mask[:slots, 0, 0], scale=scaling)
    if slots < len(query):
        out = nn.functional.pad(out, (0, 0, 0, 0, 0, len(query) - slots))
    return out[:, None], None


AttentionInterface.register(ATTENTION, slot_attention)


_CHUNK = 2**16
"""Elements that a chain of element-wise operations takes at a time: they stay in the cache, and no large temporary is made."""


def _silu(x: Tensor) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    for part, result in zip(x.view(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
        torch.neg(part, out=result)
        torch.div(part, result.exp_().add_(1), out=result)
    return out


def _gelu(x: Tensor) -> Tensor:
    return (x * math.sqrt(0.5)).erf_().add_(1).mul_(x).mul_(0.5)


def _gelu_tanh(x: Tensor) -> Tensor:
    return (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi)).tanh_().add_(1).mul_(x).mul_(0.5)


def _invariant_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The formula of an activation that ends in scalar code; None for every other module."""
    if isinstance(module, (nn.SiLU, SiLUActivation)):
        return _silu
    if isinstance(module, nn.GELU):
        return _gelu if module.approximate == "none" else _gelu_tanh
    return {GELUActivation: _gelu, GELUTanh: _gelu_tanh}.get(type(module))


class InvariantLayers:
    """`with layers.prefill():` and `with layers.decode():` run the policy's trunk so. Eager attention stays eager."""

    def __init__(self, policy: ActorCritic) -> None:
        self.config = policy.model.config.get_text_config()
        found = ((module, _invariant_activation(module)) for module in policy.trunk.modules())
        on_cpu = policy.device.type == "cpu"
        self.activations = [(module, formula) for module, formula in found if on_cpu and formula is not None]

    @contextmanager
    def prefill(self) -> Iterator[None]:
        for module, formula in self.activations:
            module.forward = formula
        try:
            yield
        finally:
            for module, _ in self.activations:
                del module.forward

    @contextmanager
    def decode(self) -> Iterator[None]:
        kept = self.config._attn_implementation
        with attention(self.config, ATTENTION if kept in REPLACED else kept), self.prefill():
            yield


# ---- the language-model head ----
# The weight of the language-model head is reordered once into oneDNN's layout, for the matrix product of every step.
# A weight of [V, H] has more bytes than the processor's cache, so a product with few rows reads it at the speed of memory and
# out of order. One reordered copy, for the lifetime of a decoder, gives logits in about two thirds of the time. The operations
# are private ones of torch, looked up by name; without them the weight is used as it is.


_ROWS = 64
"""Rows that the layout is made for; a product with another number of them reads the same layout."""


def reorders(device: str, dtype: torch.dtype) -> bool:
    """Return whether torch has oneDNN's packed product for weights of `dtype` on a device of type `device`."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    here = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return here and device == "cpu" and dtype == torch.float32


def can_reorder(weight: Tensor) -> bool:
    """Return `reorders` of this weight."""
    return reorders(weight.device.type, weight.dtype)


def head_product(policy: ActorCritic) -> ReorderedHead | None:
    """Return the output layer's product for the decode steps of one rollout; None where the layer's own is used."""
    return ReorderedHead() if policy.compute_dtype is None and can_reorder(policy.lm_weight) else None


class ReorderedHead:
    """`hidden @ weight.T + bias` with the weight of the first call, which is reordered then."""

    def __init__(self) -> None:
        self.reordered: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (rows, H) -> (rows, V)
        if self.reordered is None:
            self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.reordered, bias, "none", [], "")

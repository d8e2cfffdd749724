"""The language-model head with its weight laid out once for the matrix product of every step.

A weight of [V, H] has more bytes than the processor's cache, so a product with few rows reads it at the speed of memory, and in
an order that is not the product's. oneDNN's layout is: one copy of the weight, while a `Decoder` lives, for logits in about
two thirds of the time. The operations are private ones of torch, asked for by name; without them the weight stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.model import ActorCritic

_ROWS = 64
"""Rows that the layout is made for; a product with another number of them reads the same layout."""


def can_pack(weight: Tensor) -> bool:
    """Whether torch has oneDNN's packed product for this weight."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    here = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return here and weight.device.type == "cpu" and weight.dtype == torch.float32


class PackedHead:
    """`head(hidden)` are the policy's logits with the weight of the first call."""

    def __init__(self, policy: ActorCritic) -> None:
        self.policy, self.bias = policy, policy.lm_bias
        self.packed: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:  # (rows, H) -> (rows, V)
        weight = self.policy.lm_weight
        if self.policy.compute_dtype is not None or not can_pack(weight):
            return self.policy.logits(hidden)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        product = torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")
        return self.policy.transform(product)

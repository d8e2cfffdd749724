# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of peft.
"""The operands of an output layer's product: weight, bias, and the term of its active adapters.

Legend: V vocabulary, H hidden, R rank of all active adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops.weights import LowRank, QuantisedWeight, unmasked
from .output_layer import applies_adapters, is_lora, is_quantised, saved_layer, stored_weight, whole


class Matrices(NamedTuple):
    """The operands of the head's product `hidden @ weight.T + bias + low_rank.states @ low_rank.weight.T`."""

    hidden: Tensor  # (..., H)
    weight: Tensor | QuantisedWeight  # (V, H)
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None  # (..., R) and (V, R)

    def product(self, project: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear) -> Tensor:  # (..., V)
        """Return the product; `project` computes `hidden @ weight.T + bias` unless the weight is quantised."""
        hidden, weight, bias, low_rank = self
        if isinstance(weight, QuantisedWeight):
            logits = torch.cat([F.linear(hidden, rows) for _, rows in weight.tiles(hidden.dtype)], -1)
            logits = logits if bias is None else logits + bias
        else:
            logits = project(hidden, weight, bias)
        return logits if low_rank is None else logits + F.linear(*low_rank)

    def first(self, rows: int) -> Matrices:
        """Return the operands for the first `rows` ids."""
        weight, low = self.weight, self.low_rank
        return Matrices(
            self.hidden,
            weight[:rows] if isinstance(weight, Tensor) else weight.first(rows),
            None if self.bias is None else self.bias[:rows],
            None if low is None else low._replace(weight=low.weight[:rows]),
        )

    def float(self) -> Matrices:
        """Return the operands in float32."""
        hidden, weight, bias, low = self
        return Matrices(
            hidden.float(),
            weight.float() if isinstance(weight, Tensor) else weight,
            None if bias is None else bias.float(),
            None if low is None else LowRank(low.states.float(), low.weight.float()),
        )


def operands(
    layer: Any,
    hidden: Tensor,  # (..., H)
    mask: Tensor | None = None,  # (...)
    *,
    sharded: bool = False,
) -> Matrices:
    """Return the operands whose product is the layer's result; the layer's active adapters count.

    For LoRA the low-rank term is `s A h` and `B`, where s is an adapter's scale; several adapters are concatenated along
    R. Hidden states may be NaN where `mask` is False. The weight can be a DTensor only if `sharded`.

    Raises:
        ValueError: the weight is sharded without `sharded`, or in an unknown format; the adapters are both merged and disabled;
            an adapter is a LoRA variant.
    """
    if is_lora(layer):
        base = layer.base_layer
        return Matrices(hidden, _weight(base, sharded), base.bias, _low_rank(layer, hidden, mask))
    if hasattr(layer, "modules_to_save"):
        layer = saved_layer(layer)
    elif hasattr(layer, "token_adapter"):
        return Matrices(hidden, _with_trained_tokens(layer.token_adapter), layer.original_module.bias, None)
    return Matrices(hidden, _weight(layer, sharded), layer.bias, None)


def _weight(layer: Any, sharded: bool) -> Tensor | QuantisedWeight:
    """Return the weight of a linear layer."""
    weight = layer.weight if sharded else whole(layer.weight)
    return stored_weight(layer) if is_quantised(layer) else weight


def _low_rank(layer: Any, hidden: Tensor, mask: Tensor | None) -> LowRank | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A] if applies_adapters(layer) else []
    states: list[Tensor] = []
    weights: list[Tensor] = []
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if getattr(layer, "lora_variant", {}).get(name) is not None or b.bias is not None:
            raise ValueError(f"head: got a variant of LoRA in adapter {name!r}, expected plain A and B without a bias")
        low = a(layer.lora_dropout[name](unmasked(hidden, mask).to(a.weight.dtype))) * layer.scaling[name]
        states.append(low.to(hidden.dtype))
        weights.append(whole(b.weight).to(hidden.dtype))
    if not names:
        return None
    return LowRank(states[0], weights[0]) if len(names) == 1 else LowRank(torch.cat(states, -1), torch.cat(weights, 1))


def _with_trained_tokens(adapter: Any) -> Tensor:
    """Return the weight with the rows of the active adapters in `trainable_token_indices`."""
    if not applies_adapters(adapter) or not adapter.active_adapters:
        return whole(adapter.base_layer.weight)
    return adapter.get_merged_weights(adapter.active_adapters)

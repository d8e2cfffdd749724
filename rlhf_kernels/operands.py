# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# The attributes of layers of peft, bitsandbytes and torchao, which this module does not import.
"""The operands of an output layer's product, read from the layer: weight, bias, and the active adapters.

Legend: V vocabulary, H hidden, R rank of all active adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops.head_inputs import LowRank, unmasked
from .ops.quantised_weight import QuantisedWeight


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


def is_lora(layer: nn.Module) -> bool:
    """Return whether `layer` is a LoRA layer around a linear layer."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def is_wrapper(layer: nn.Module) -> bool:
    """Return whether `layer` is peft's wrapper of a linear layer under `modules_to_save` or `trainable_token_indices`."""
    trained = hasattr(layer, "modules_to_save") or hasattr(layer, "token_adapter")
    return trained and isinstance(getattr(layer, "original_module", None), nn.Linear)


def operands(layer: Any, hidden: Tensor, mask: Tensor | None = None) -> Matrices:  # hidden: (..., H), mask: (...)
    """Return the operands whose product is the layer's result; the layer's active adapters count.

    For LoRA the low-rank term is `s A h` and `B`, where s is an adapter's scale; several adapters are concatenated along
    R. Hidden states may be NaN where `mask` is False.

    Raises:
        ValueError: the weight is sharded or in an unknown format, the adapters are both merged and disabled, or an
            adapter is a LoRA variant.
    """
    if is_lora(layer):
        base = layer.base_layer
        return Matrices(hidden, stored_weight(base), base.bias, _low_rank(layer, hidden, mask))
    if hasattr(layer, "modules_to_save"):
        layer = _saved(layer)
    elif hasattr(layer, "token_adapter"):
        return Matrices(hidden, _with_trained_tokens(layer.token_adapter), layer.original_module.bias, None)
    return Matrices(hidden, stored_weight(layer), layer.bias, None)


def _whole(weight: Tensor) -> Tensor:
    """Return `weight`; raise ValueError if it is sharded."""
    if hasattr(weight, "placements") or not weight.numel():
        raise ValueError(
            "head: got a sharded weight; run the head inside the model's forward, which gathers the weight"
        )
    return weight


def _applies(adapter: Any) -> bool:
    """Return whether active adapters have to be added to the weight."""
    if adapter.disable_adapters and adapter.merged:
        raise ValueError("head: the adapters are merged and disabled; unmerge them first")
    return not (adapter.disable_adapters or adapter.merged)


def _low_rank(layer: Any, hidden: Tensor, mask: Tensor | None) -> LowRank | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A] if _applies(layer) else []
    states: list[Tensor] = []
    weights: list[Tensor] = []
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if getattr(layer, "lora_variant", {}).get(name) is not None or b.bias is not None:
            raise ValueError(f"head: got a variant of LoRA in adapter {name!r}, expected plain A and B without a bias")
        low = a(layer.lora_dropout[name](unmasked(hidden, mask).to(a.weight.dtype))) * layer.scaling[name]
        states.append(low.to(hidden.dtype))
        weights.append(_whole(b.weight).to(hidden.dtype))
    if not names:
        return None
    return LowRank(states[0], weights[0]) if len(names) == 1 else LowRank(torch.cat(states, -1), torch.cat(weights, 1))


def _saved(wrapper: Any) -> nn.Module:
    """Return the layer that a wrapper under `modules_to_save` uses: the active adapter's copy, or the original."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def _with_trained_tokens(adapter: Any) -> Tensor:
    """Return the weight with the rows of the active adapters in `trainable_token_indices`."""
    if not _applies(adapter) or not adapter.active_adapters:
        return _whole(adapter.base_layer.weight)
    return adapter.get_merged_weights(adapter.active_adapters)


# ---- quantised layers ----


def is_quantised(layer: Any) -> bool:
    """Return whether the weight of a linear layer is not stored in floating point."""
    weight = layer.weight
    return (
        getattr(weight, "quant_state", None) is not None or hasattr(weight, "qdata") or not weight.is_floating_point()
    )


def stored_weight(layer: Any) -> Tensor | QuantisedWeight:
    """Return the weight of a linear layer: the parameter, or the 4-bit weight of bitsandbytes or the int8 one of torchao.

    Raises:
        ValueError: the weight is sharded, or quantised in a different way.
    """
    weight = _whole(layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return _of_bitsandbytes(weight, state)
    if hasattr(weight, "qdata"):
        return _of_torchao(weight)
    if not weight.is_floating_point():
        raise _unknown(f"{type(layer).__name__} with a weight of {weight.dtype}")
    return weight


def _unknown(got: str) -> ValueError:
    return ValueError(
        f"head: got {got}, expected a floating point weight, NF4 of bitsandbytes, or int8 weights of torchao with one scale "
        "per row; leave the output layer out of the quantisation"
    )


def _of_bitsandbytes(weight: Any, state: Any) -> QuantisedWeight:
    """Return the weight of a `Linear4bit`: two codes per byte in row-major order, with one absmax per block.

    With nested statistics, `absmax` holds codes of a second quantisation.
    """
    if state.quant_type != "nf4":
        raise _unknown(f"bitsandbytes' {state.quant_type!r}")
    packed, absmax, (v, h) = weight.data.reshape(-1).view(torch.uint8), state.absmax, state.shape
    if state.nested:
        second = state.state2
        scales = second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()]
        absmax = second.code.index_select(0, absmax.int()) * scales + state.offset
    if getattr(state, "packing_format_for_cpu", False):
        packed, absmax = _row_major(packed, v, h), absmax.t().reshape(-1)
    return QuantisedWeight.nf4(packed, absmax, v, h, block=state.blocksize)


def _row_major(packed: Tensor, v: int, h: int) -> Tensor:
    """Return the codes in row-major order from the layout of bitsandbytes for CPUs with AVX512-BF16.

    There, 32 rows are stored together: for each pair of columns, 32 bytes whose low halves are the codes of the first 16
    rows and whose high halves are those of the last 16.
    """
    columns = packed.view(v // 32, h // 2, 32)
    codes = torch.cat((columns & 15, columns >> 4), -1).view(v // 32, h // 2, 32, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).transpose(1, 2).reshape(-1)


def _of_torchao(weight: Any) -> QuantisedWeight:
    """Return the weight of torchao's `Int8WeightOnlyConfig`, with one scale per row."""
    values, scale = weight.qdata, weight.scale
    if values.dtype != torch.int8 or values.dim() != 2 or scale.numel() != len(values):
        raise _unknown(f"{type(weight).__name__} with {values.dtype} and scales of shape {tuple(scale.shape)}")
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise _unknown(f"{type(weight).__name__} that quantises or scales its input")
    return QuantisedWeight.int8(values, scale.reshape(-1))


def check_symmetric(layer: Any) -> None:
    """Raise ValueError for an int8 weight of torchao with zero points. This reads the tensor's values."""
    zero = getattr(getattr(layer, "weight", None), "zero_point", None)
    if zero is not None and bool(zero.any()):
        raise _unknown("an int8 weight with zero points")

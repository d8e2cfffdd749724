"""Keys and values of the sequences that are being decoded, one preallocated slot each.

In a slot a token's column is its position, so a sequence's attention reads the same columns whatever its neighbours; a
finished sequence's slot is overwritten by the next one, and nothing is ever concatenated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.model import ActorCritic


def kv_shape(policy: ActorCritic) -> tuple[int, int, int]:
    """(layers, heads, size of a head) of a policy's keys, and so of its values."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def kv_bytes(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of `tokens` tokens in all layers; `shape` is that of `kv_shape`."""
    return 2 * math.prod(shape) * tokens * dtype.itemsize


Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""`allocate(shape, dtype, device)` gives memory that may hold anything, such as an arena's."""


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of its own."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass
class _Step:
    """What the layers need to know about the forward pass under way."""

    first: int = 0  # prefill writes slots first, first + 1, ...
    source: Tensor | None = None  # (rows,), prefill: the row that each of them copies
    positions: Tensor | None = None  # (R,), decode: the column that each of the first R slots writes; None in prefill
    rows: Tensor | None = None  # (R,), decode: 0, 1, ... R - 1
    width: int = 0  # decode: columns that attention reads


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, columns, head size]."""

    is_sliding = False

    def __init__(self, slots: int, columns: int, step: _Step, allocate: Allocate) -> None:
        super().__init__()
        self.slots, self.columns, self.step, self.allocate = slots, columns, step, allocate

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            shape = (self.slots, states.shape[1], self.columns, states.shape[3])
            # Autocast turns keys in float32, and attention then reads them in the type of values. Zeros: attention that
            # multiplies hidden columns by 0 instead of leaving them out makes NaN of a NaN.
            return self.allocate(shape, value_states.dtype, states.device).zero_()

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new columns; return what attention reads: in prefill the new columns, in decode all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step
        if step.positions is None:
            length = min(key_states.shape[2], self.columns)  # padding may go further than the longest sequence
            rows = slice(step.first, step.first + len(step.source))
            self.keys[rows, :, :length] = key_states[:, :, :length][step.source]
            self.values[rows, :, :length] = value_states[:, :, :length][step.source]
            return key_states, value_states
        rows = len(step.positions)  # those behind them keep a matrix product on its path, and have no slot
        self.keys[step.rows, :, step.positions] = key_states[:rows, :, 0].to(self.keys.dtype)
        self.values[step.rows, :, step.positions] = value_states[:rows, :, 0]
        return self.keys[:rows, :, : step.width], self.values[:rows, :, : step.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Asked in prefill alone, where attention reads the new columns; decode brings its own mask.
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.columns


class SlotCache(Cache):
    """A transformers cache in which every sequence has its own length. `prefill` or `decode` comes before each forward."""

    def __init__(self, layers: int, slots: int, columns: int, allocate: Allocate = new_memory) -> None:
        self.step = _Step()
        super().__init__(layers=[SlotLayer(slots, columns, self.step, allocate) for _ in range(layers)])

    def tensors(self) -> list[Tensor]:
        """Keys and values of the layers that have been used."""
        return [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]

    def prefill(self, first: int, source: Tensor) -> None:
        """The next forward pass brings whole prompts; slots `first`, `first + 1`, ... take its rows `source`."""
        self.step.first, self.step.source, self.step.positions = first, source, None

    def decode(self, positions: Tensor, width: int) -> None:
        """The next forward pass brings one token for each of the first slots, at `positions` [R], and reads `width` columns."""
        self.step.positions = positions
        self.step.rows = torch.arange(len(positions), device=positions.device)
        self.step.width = width

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of slots `source` over those of slots `target`; the two must not overlap."""
        for layer in self.layers:
            layer.keys[target, :, :width] = layer.keys[source, :, :width]
            layer.values[target, :, :width] = layer.values[source, :, :width]


def same_as(prompts: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """(index of the first prompt of each kind, the kind of each prompt): prompts with the same ids are of one kind."""
    kinds: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    source = []
    for index, prompt in enumerate(prompts):
        key = tuple(prompt.tolist())
        if key not in kinds:
            kinds[key] = len(firsts)
            firsts.append(index)
        source.append(kinds[key])
    return firsts, source

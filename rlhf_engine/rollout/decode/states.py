"""The cache of a model whose layers keep a recurrent state per sequence, in slots.

transformers' cache of such a model has layers with keys and values, with recurrent states, or with both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils

from rlhf_engine.memory.arena import room_for
from rlhf_engine.rollout.decode.protocol import MIN_ROWS, Allocate, new_memory
from rlhf_engine.rollout.decode.slots import MovableCache, SlotCache, SlotLayer, slot_columns

_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Layers of transformers' cache whose tensors are copied into slots."""
# ---- the tensors of transformers' cache ----


def _states(layer: Any) -> dict[tuple[str, int], Tensor]:
    """Return the recurrent states of a layer of transformers' cache, each (sequences, ...)."""
    found = {}
    for name in ("conv_states", "recurrent_states"):
        for index, state in (getattr(layer, name, None) or {}).items():
            if state is not None:
                found[name, index] = state
    return found


def _keys(layer: Any) -> tuple[Tensor, ...]:
    """Return the keys and values of a layer of transformers' cache, each (sequences, heads, columns, head size), or nothing."""
    return (layer.keys, layer.values) if getattr(layer, "keys", None) is not None else ()


@dataclass(frozen=True)
class CacheShape:
    """Shapes of the tensors that one sequence has in a cache."""

    keys: tuple[tuple[int, int, torch.dtype], ...]
    """(heads, head size, dtype) of the keys and of the values of each layer with attention."""
    states: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """(shape, dtype) of each recurrent state."""

    @classmethod
    def of(cls, cache: Cache) -> CacheShape:
        """Return the shapes in a cache of transformers that holds at least one token."""
        keys = [(x.shape[1], x.shape[3], x.dtype) for layer in cache.layers for x in _keys(layer)]
        states = [(tuple(x.shape[1:]), x.dtype) for layer in cache.layers for x in _states(layer).values()]
        return cls(tuple(keys), tuple(states))

    def slot_bytes(self, slots: int, columns: int, *, eager: bool) -> int:
        """Return the bytes of `slots` slots for sequences of at most `columns` tokens.

        A step has at least `MIN_ROWS` rows, and every row has states. Eager attention needs keys for every row too.
        """
        rows = max(slots, MIN_ROWS)
        slots, columns = rows if eager else slots, slot_columns(columns)
        keys = [room_for((slots, heads, columns, size), dtype) for heads, size, dtype in self.keys]
        return sum(keys) + sum(room_for((rows, *shape), dtype) for shape, dtype in self.states)

    def largest_state(self, rows: int) -> int:
        """Return the bytes of the largest recurrent state of `rows` sequences."""
        return max(room_for((rows, *shape), dtype) for shape, dtype in self.states)


def new_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache as the model's `forward` creates it.

    Raises:
        ValueError: this release of transformers has no cache layers for the model's kinds of layers.
    """
    missing = [name for name in _LAYERS if not hasattr(cache_utils, name)]
    if missing:
        raise ValueError(
            f"policy: {type(model).__name__} has recurrent states, and this release of transformers has no {missing[0]}; "
            "install transformers 5.23 to sample from it"
        )
    return DynamicCache(config=model.config)


def check_cache(model: PreTrainedModel, cache: Cache) -> None:
    """Raise ValueError unless all states of the model after one token are in tensors of `cache` that slots can hold."""
    name = type(model).__name__
    for layer in cache.layers:
        kind = type(layer)
        if kind not in [getattr(cache_utils, known) for known in _LAYERS]:
            raise ValueError(
                f"policy: {name} keeps a {kind.__name__}, which cannot be sampled; expected {', '.join(_LAYERS)}"
            )
        empty = kind.__name__ != "DummyLayer" and not _keys(layer) and not _states(layer)
        if empty or not isinstance(getattr(layer, "conv_states", {}), dict):
            raise ValueError(
                f"policy: {name} keeps its recurrent state outside of transformers' cache ({kind.__name__}), so it cannot be "
                "sampled with several sequences at a time; it can be scored and trained"
            )


# ---- slots ----


class _LayerSlots:
    """The slots of one layer; `layer` is the layer of transformers' cache that a decode step updates."""

    def __init__(self, prefilled: Any, rows: int, attention: SlotLayer | None, allocate: Allocate) -> None:
        self.layer = copy.copy(prefilled)
        self.attention = attention
        if attention is not None:
            attention.lazy_initialization(*_keys(prefilled))
            self.layer.update = attention.update
        self.states = {
            key: allocate((rows, *state.shape[1:]), state.dtype, state.device).zero_()
            for key, state in _states(prefilled).items()
        }

    def use(self, rows: int) -> None:
        """Let `layer` update the states of the first `rows` slots."""
        for (name, index), state in self.states.items():
            # The dict is replaced and not changed, because the prefilled layer shares it.
            setattr(self.layer, name, {**getattr(self.layer, name), index: state[:rows]})

    def store(self, prefilled: Any, source: Tensor, slots: Tensor, length: int) -> None:
        """Copy the sequences `source`, of `length` tokens, from a prefilled layer to `slots`."""
        if self.attention is not None:
            keys, values = _keys(prefilled)
            columns = slice(length - keys.shape[2], length)  # a layer with a window has only the last columns
            self.attention.keys[slots, :, columns] = keys[source]
            self.attention.values[slots, :, columns] = values[source]
        for key, state in _states(prefilled).items():
            self.states[key][slots] = state[source]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the states of slots `source` to slots `target`; the two must not overlap."""
        for state in self.states.values():
            state[target] = state[source]


class RecurrentCache(MovableCache):
    """A transformers cache of slots. Call `decode` before each forward pass over one token per slot."""

    def __init__(self, prefilled: Cache, slots: int, rows: int, columns: int, allocate: Allocate = new_memory) -> None:
        with_keys = [bool(_keys(layer)) for layer in prefilled.layers]
        self.attention = SlotCache(sum(with_keys), slots, columns, allocate)
        spare = iter(self.attention.layers)
        self.slots = [
            _LayerSlots(layer, rows, next(spare) if keyed else None, allocate)
            for layer, keyed in zip(prefilled.layers, with_keys, strict=True)
        ]
        super().__init__(layers=[one.layer for one in self.slots])

    def store(self, prefilled: Cache, source: Tensor, slots: Tensor, length: int) -> None:
        """Copy the sequences `source`, of `length` tokens, from a prefilled cache to `slots`."""
        for one, layer in zip(self.slots, prefilled.layers, strict=True):
            one.store(layer, source, slots, length)

    def decode(self, positions: Tensor, width: int, rows: int) -> None:
        """Set up a pass of `rows` rows. The first R write keys at `positions` [R], and attention reads `width` columns."""
        self.attention.decode(positions, width)
        for one in self.slots:
            one.use(rows)

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the states and the first `width` columns of slots `source` to slots `target`; the two must not overlap."""
        self.attention.move(source, target, width)
        for one in self.slots:
            one.move(source, target)

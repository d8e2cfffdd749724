"""Decoding with keys and values in slots: one preallocated slot per sequence.

A token's column in its slot is its position, so the columns that a sequence's attention reads do not depend on the other slots.
The next sequence overwrites the slot of a finished one, and no tensor is concatenated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.memory.arena import room_for
from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.model.roles import Want
from rlhf_engine.rollout.decode.cpu import InvariantLayers, ReorderedHead, head_product
from rlhf_engine.rollout.decode.probe import probe
from rlhf_engine.rollout.decode.protocol import (
    MIN_ROWS,
    Act,
    Allocate,
    attention_kinds,
    check_decoding,
    check_kv_bytes,
    column_masks,
    kv_bytes,
    new_memory,
    prefill_batch,
    read_columns,
    same_as,
    sampled_outputs,
)


def slot_columns(tokens: int) -> int:
    """Return the columns of a slot for sequences of at most `tokens` tokens."""
    return -(-tokens // MIN_ROWS) * MIN_ROWS


def slot_bytes(policy: LanguageModel, tokens: int) -> int:
    """Return the bytes of the keys and values of one slot for sequences of at most `tokens` tokens."""
    return kv_bytes(probe(policy).numbers, slot_columns(tokens), policy.product_dtype)


def slots_per_step(*, eager: bool) -> int:
    """Return the number that the slots are a multiple of. Attention of the model itself needs keys for every row of a step."""
    return MIN_ROWS if eager else 1


@dataclass
class _Pass:
    """Arguments of the current forward pass, which the layers of the cache read."""

    first: int = 0  # prefill writes slots first, first + 1, ...
    source: Tensor | None = None  # (rows,), prefill: the prompt that each of these slots copies
    positions: Tensor | None = None  # (R,), decode: the column that each of the first R slots writes; None in prefill
    rows: Tensor | None = None  # (R,), decode: 0, 1, ... R - 1
    width: int = 0  # decode: columns that attention reads
    contiguous: bool = False  # decode: some models call `view` on keys


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, columns, head size]."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, columns: int, now: _Pass, allocate: Allocate) -> None:
        super().__init__()
        self.slots, self.columns, self.now, self.allocate = slots, columns, now, allocate

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the layer's slots in the first forward pass."""

        def zeros(states: Tensor) -> Tensor:
            shape = (self.slots, states.shape[1], self.columns, states.shape[3])
            # The dtype is that of values, because under autocast keys are float32. The slots begin as zeros, because attention
            # multiplies masked columns by 0, and 0 times a NaN in uninitialized memory is NaN.
            return self.allocate(shape, value_states.dtype, states.device).zero_()

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new columns; return what attention reads: in prefill the new columns, in decode all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.now
        if now.positions is None:
            assert now.source is not None
            length = min(key_states.shape[2], self.columns)  # the padded prompt may be wider than a slot
            slots = slice(now.first, now.first + len(now.source))
            self.keys[slots, :, :length] = key_states[:, :, :length][now.source]
            self.values[slots, :, :length] = value_states[:, :, :length][now.source]
            return key_states, value_states
        rows = len(now.positions)  # the other rows pad the matrix products and have no slot
        self.keys[now.rows, :, now.positions] = key_states[:rows, :, 0].to(self.keys.dtype)
        self.values[now.rows, :, now.positions] = value_states[:rows, :, 0]
        keys, values = self.keys[:rows, :, : now.width], self.values[:rows, :, : now.width]
        return (keys.contiguous(), values.contiguous()) if now.contiguous else (keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys in prefill, where attention reads the new columns.

        A decode step does not call this, because it passes its mask.
        """
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: prefill begins at position 0, and decode steps pass their positions."""
        return 0

    def get_max_length(self) -> int:
        """Return the columns of a slot."""
        return self.columns


class MovableCache(Cache, ABC):
    """A transformers cache of slots whose contents can be copied from slot to slot."""

    @abstractmethod
    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy sequences of at most `width` tokens from slots `source` to slots `target`; the two must not overlap."""


SlotsT = TypeVar("SlotsT", bound=MovableCache)


class SlotCache(MovableCache):
    """A transformers cache in which every sequence has its own length. Call `prefill` or `decode` before each forward pass."""

    layers: list[SlotLayer]

    def __init__(
        self, layers: int, slots: int, columns: int, allocate: Allocate = new_memory, *, contiguous: bool = False
    ) -> None:
        self.now = _Pass(contiguous=contiguous)
        super().__init__(layers=[SlotLayer(slots, columns, self.now, allocate) for _ in range(layers)])

    def prefill(self, first: int, source: Tensor) -> None:
        """Set up a forward pass over whole prompts; slots `first`, `first + 1`, ... store its rows `source`."""
        self.now.first, self.now.source, self.now.positions = first, source, None

    def decode(self, positions: Tensor, width: int) -> None:
        """Set up a forward pass over one token per slot, at `positions` [R], whose attention reads `width` columns."""
        self.now.positions = positions
        self.now.rows = torch.arange(len(positions), device=positions.device)
        self.now.width = width

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of slots `source` to slots `target`; the two must not overlap."""
        for layer in (layer for layer in self.layers if layer.is_initialized):
            layer.keys[target, :, :width] = layer.keys[source, :, :width]
            layer.values[target, :, :width] = layer.values[source, :, :width]


class WholeSequenceSlots(ABC, Generic[SlotsT]):
    """Common part of decoders whose slots have space for a whole sequence, so that no sequence is preempted."""

    policy: LanguageModel
    columns: int
    eager: bool
    """Whether decode steps use the model's own attention, which adds a mask to the scores."""
    want: tuple[Want, ...]
    cache: SlotsT | None
    project: ReorderedHead | None

    @abstractmethod
    def decoding(self, positions: Tensor, width: int, rows: int) -> AbstractContextManager[object]:
        """Return the context of a decode step of `rows` rows, whose slots write `positions` and read `width` columns."""

    @abstractmethod
    def mask(self, positions: Tensor, width: int) -> Tensor | Mapping[str, Tensor | None] | None:
        """Return the attention mask of a decode step."""

    def decode(
        self,
        tokens: Tensor,  # (rows,), the last token of each sequence; slots from `count` on are empty
        positions: Tensor,  # (rows,), the position of that token
        count: int,
        want: Collection[Want] | None = None,
    ) -> Outputs:  # rows >= MIN_ROWS
        """Feed one token to each of the first `count` slots; return the outputs in the states after them."""
        spare = max(0, MIN_ROWS - count)
        tokens, positions = (pad(x[:count], (0, spare)) for x in (tokens, positions))
        width = self.columns
        if width > read_columns(1, width):
            width = read_columns(int(positions[:count].max()) + 1, width)
        batch = TokenBatch(
            input_ids=tokens[:, None],
            attention_mask=self.mask(positions, width),
            position_ids=positions[:, None],
            cache=self.cache,
        )
        with self.decoding(positions if self.eager else positions[:count], width, len(tokens)):
            return self.policy(batch, want or self.want, project=self.project)

    def step(
        self,
        tokens: Tensor,  # (rows,)
        positions: Tensor,  # (rows,)
        count: int,
        act: Act,
        idle: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Call `act(outputs, slots)` on the outputs of `decode` for the first `count` slots."""
        act(self.decode(tokens, positions, count), slice(0, count))

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy sequences of at most `width` tokens from slots `source` to slots `target`; the two must not overlap."""
        assert self.cache is not None
        self.cache.move(source, target, width)

    def keep(self, count: int) -> None:
        """Do nothing: the next sequence replaces a slot's content."""

    def admissible(self, prompts: list[Tensor], count: int) -> int:
        """Return the number of prompts, because every slot has space for a whole sequence."""
        return len(prompts)

    def preempt(self, count: int) -> list[int]:
        """Return no slots, because every slot has space for a whole sequence."""
        return []

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


class SlotDecoder(WholeSequenceSlots[SlotCache]):
    """`Decoder` with `slots` slots for sequences of up to `columns` tokens, or fewer slots to fit into `kv_bytes`.

    Raises:
        ValueError: for a model without a cache, or with a kind of attention that is not supported, and for `kv_bytes` that
            are too few.
    """

    def __init__(self, policy: LanguageModel, slots: int, columns: int, kv_bytes: int | None = None) -> None:
        self.policy, self.columns = policy, slot_columns(columns)
        self.text_config = policy.model.config.get_text_config()
        self.kinds = attention_kinds(policy, columns)
        self.probe = probe(policy)
        self.eager = self.text_config._attn_implementation == "eager" or not self.probe.routed
        self.slots = slots if kv_bytes is None else min(slots, self._slots_within(kv_bytes, columns))
        self.rows = self.slots
        self.layers = InvariantLayers(policy)
        self.want = sampled_outputs(policy)
        self.max_position = max_positions(policy.model)
        self.cache = None
        self.project = None

    def _slots_within(self, kv_bytes: int, columns: int) -> int:
        step = slots_per_step(eager=self.eager)
        few = "one sequence" if step == 1 else f"{step} sequences, the minimum for eager attention,"
        check_kv_bytes(kv_bytes, self._bytes(step), f"{few} of {columns} tokens")
        return kv_bytes // self._bytes(step) * step

    def _bytes(self, slots: int) -> int:
        """Return the bytes of the tensors of keys and values, which an arena aligns."""
        shapes = [(layer.key_heads, layer.key_size) for layer in self.probe.layers]
        shapes += [(layer.value_heads, layer.value_size) for layer in self.probe.layers]
        rows = self._allocated(slots) * self.columns
        return sum(room_for((rows, *shape), self.policy.product_dtype) for shape in shapes)

    def _allocated(self, slots: int) -> int:
        return slots + -slots % slots_per_step(eager=self.eager)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in all slots."""
        return self._bytes(self.slots)

    def check(self) -> None:
        """Raise ValueError if decoding differs from one forward pass over the whole sequence."""
        check_decoding(self, self.policy, self.slots)

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout with at most `sequences` slots. Each layer allocates its slots in its first forward pass."""
        slots = self._allocated(min(self.slots, sequences))
        layers, contiguous = len(self.probe.layers), not self.probe.routed
        self.cache = SlotCache(layers, slots, self.columns, allocate, contiguous=contiguous)
        # With the current weights. A reordered weight may give sums of a different order.
        self.project = None if self.policy.exact else head_product(self.policy)

    def close(self) -> None:
        """Drop the cache and the reordered weight."""
        self.cache = self.project = None

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Prefill prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt."""
        assert self.cache is not None
        firsts, source = same_as(prompts)
        distinct = [prompts[index] for index in firsts]
        batch = prefill_batch(self.policy, distinct, source, self.cache, self.max_position)
        self.cache.prefill(first, torch.tensor(source, device=self.policy.device))
        with self.layers.prefill():
            return self.policy(batch, self.want, project=self.project)

    @contextmanager
    def decoding(self, positions: Tensor, width: int, rows: int) -> Iterator[None]:
        """Set up the cache and the layers for one decode step."""
        assert self.cache is not None
        self.cache.decode(positions, width)
        with self.layers.decode(eager=self.eager):
            yield

    def mask(self, positions: Tensor, width: int) -> Tensor | Mapping[str, Tensor | None] | None:
        """Return the mask of the columns that each sequence has."""
        additive = self.policy.lm_weight.dtype if self.eager else None
        return column_masks(self.text_config, self.kinds, positions, width, additive)

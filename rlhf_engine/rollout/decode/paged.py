"""Decoding with keys and values in pages: a sequence has only the pages that it fills, in any order.

The pages of all layers are one allocation, dropped between rollouts. Samples of one prompt share its pages. Each sample copies
a partly filled last page before it writes there, except the last one to write. A causal LM can decode with pages if it calls
its attention through transformers' interface: `PagedLayer.update` returns pages instead of keys, and `attend` reads them.

On a GPU a step with its sampling is a CUDA graph, and its rows are padded to a power of two. A row's bits may then depend on
the number of rows, which selects the kernel of a matrix product. On CPU they do not depend on other rows.
Page 0 is scratch: rows without a sequence write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.model.roles import Want
from rlhf_engine.model.trunk import attention
from rlhf_engine.rollout.decode.cpu import InvariantLayers, ReorderedHead, head_product
from rlhf_engine.rollout.decode.gpu import CompiledLayers, GraphedStep, ladder, why_not
from rlhf_engine.rollout.decode.pages import PAGE_SIZE, Pages, Sequences, pages_of, pool_bytes
from rlhf_engine.rollout.decode.protocol import (
    CHECKED_TOKENS,
    MIN_ROWS,
    Act,
    Allocate,
    attention_kinds,
    check_decoding,
    check_kv_bytes,
    kv_shape,
    new_memory,
    prefill_batch,
    prompt_width,
    same_as,
    sampled_outputs,
)
from rlhf_kernels import paged_attention

ATTENTION = "rlhf_pages"
_POSITION_COUNTING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that read the largest position on the host, which a CUDA graph cannot capture."""


class PagedKeys(NamedTuple):
    """The keys argument of attention in decode steps."""

    pages: Tensor  # (P, page size, groups, D)
    table: Tensor  # (R, M), int32
    lengths: Tensor  # (R,), int32, the new token included
    window: int | None


def attend(
    module: nn.Module,
    query: Tensor,  # (R, heads, 1, D)
    key: PagedKeys,
    value: Tensor,  # (P, page size, groups, D)
    attention_mask: Tensor,  # not read: a row attends to the tokens given by its pages and its length
    scaling: float | None = None,  # default: D ** -0.5
    softcap: float | None = None,
    **unused: object,  # arguments of other implementations: dropout, sliding_window, is_causal
) -> tuple[Tensor, None]:  # (R, 1, heads, D)
    """Compute `paged_attention` in transformers' attention interface."""
    options = {"scale": scaling, "window": key.window, "softcap": softcap}
    found = paged_attention(query[:, :, 0].to(value.dtype), key.pages, value, key.table, key.lengths, **options)
    return found[:, None], None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class _Pass:
    """Arguments of the current forward pass, which the layers of the cache read. It writes N tokens."""

    page: Tensor | None = None  # (N,)
    within: Tensor | None = None  # (N,), the index in the page
    source: Tensor | None = None  # (N,), prefill: the index in the flattened prompts; None in decode
    table: Tensor | None = None  # (R, M), decode
    lengths: Tensor | None = None  # (R,), decode


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer: views of the pool, [pages, page size, groups, D]."""

    is_sliding = False

    def __init__(self, now: _Pass, window: int | None) -> None:
        super().__init__()
        self.now, self.window = now, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise AssertionError: the pool is allocated in `PagedDecoder.open`."""
        raise AssertionError("the pool is allocated before the first forward pass")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor | PagedKeys, Tensor]:
        """Write the new tokens; return the keys and values for attention: the new ones in prefill, the pages in decode."""
        now = self.now
        for states, pages in ((key_states, self.keys), (value_states, self.values)):
            assert pages is not None
            if states.shape[1::2] != pages.shape[2:]:
                got, expected = tuple(states.shape[1::2]), tuple(pages.shape[2:])
                raise ValueError(
                    f"policy: got keys or values of (heads, size) {got}, expected {expected} by its config"
                )
            tokens = states.transpose(1, 2).flatten(0, 1).to(pages.dtype)  # (rows * tokens, groups, D)
            pages[now.page, now.within] = tokens if now.source is None else tokens[now.source]
        if now.source is not None:
            return key_states, value_states
        assert self.keys is not None and self.values is not None and now.table is not None and now.lengths is not None
        return PagedKeys(self.keys, now.table, now.lengths, self.window), self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys in prefill; decode steps do not call this."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: prefill begins at position 0, and decode steps pass their positions."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1


def pool_shape(policy: LanguageModel, pages: int, page_size: int) -> tuple[int, ...]:
    """Return the pool's shape for a policy: (layers, 2 for keys and values, pages, page size, groups, D)."""
    layers, groups, size = kv_shape(policy)
    return layers, 2, pages, page_size, groups, size


def kv_bytes_of(policy: LanguageModel, pages: int, page_size: int = PAGE_SIZE) -> int:
    """Return `pool_bytes` for the keys and values of a policy."""
    return pool_bytes(kv_shape(policy), pages, policy.product_dtype, page_size)


def pages_within(policy: LanguageModel, kv_bytes: int, page_size: int = PAGE_SIZE) -> int:
    """Return how many pages fit into `kv_bytes` in addition to page 0."""
    return kv_bytes // kv_bytes_of(policy, 0, page_size) - 1


class PagedDecoder:
    """`Decoder` with pages for `slots` sequences of up to `columns` tokens, or as many pages as fit into `kv_bytes`.

    `compiles` is `rollout.compile`. Raises ValueError for a model whose attention is neither full nor sliding-window, for
    `kv_bytes` too small for one sequence, and for `compiles` True where steps cannot be compiled.
    """

    def __init__(
        self,
        policy: LanguageModel,
        slots: int,
        columns: int,
        *,
        kv_bytes: int | None = None,
        page_size: int = PAGE_SIZE,
        compiles: bool | None = None,
    ) -> None:
        self.policy, self.slots, self.page_size = policy, slots, page_size
        self.rows = ladder(slots, MIN_ROWS)
        self.text_config = policy.model.config.get_text_config()
        kinds = attention_kinds(policy)
        places = pages_of(max(columns, CHECKED_TOKENS), page_size)
        self.page_count = slots * places
        if kv_bytes is not None:
            check_kv_bytes(kv_bytes, kv_bytes_of(policy, places, page_size), f"one sequence of {columns} tokens")
            self.page_count = min(self.page_count, pages_within(policy, kv_bytes, page_size))
        self.table = torch.zeros(self.rows, places, dtype=torch.int32, device=policy.device)
        self.layers = InvariantLayers(policy)
        self.want = sampled_outputs(policy)
        self.max_position, self.now = max_positions(policy.model), _Pass()
        windows = {"sliding_attention": getattr(self.text_config, "sliding_window", None), "full_attention": None}
        by_layer = getattr(self.text_config, "layer_types", None) or kinds * self.text_config.num_hidden_layers
        self.paged = [PagedLayer(self.now, windows[kind]) for kind in by_layer]
        self.cache = Cache(layers=[*self.paged])
        self.pool: Tensor | None = None
        self.project: ReorderedHead | None = None
        self.captures = self._can_capture()
        self.compiles = self._decide_compile(compiles)
        self.compiled = CompiledLayers(policy, self.cache) if self.compiles else nullcontext
        self._graphed: tuple[Act, GraphedStep] | None = None
        self.ample = False
        """Whether the pool has pages for all sequences of the rollout at their maximum length."""
        self.restarted = 0
        """Sequences preempted since `open`."""

    def _can_capture(self) -> bool:
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        nested = [rope, *(x for x in rope.values() if isinstance(x, dict))]
        waits = any(x.get("rope_type") in _POSITION_COUNTING_ROPE for x in nested)
        return self.policy.device.type == "cuda" and not waits

    def _decide_compile(self, compiles: bool | None) -> bool:
        # Under autocast, a compiled layer would round its weights in every step.
        can = self.captures and self.policy.compute_dtype is None
        if compiles and not can:
            raise ValueError(
                f"rollout.compile: got True for {type(self.policy.model).__name__} on {self.policy.device}, expected None or "
                "False: compiled steps need CUDA graphs and do not support compute_dtype"
            )
        return can and (bool(compiles) or (compiles is None and not why_not(self.policy, self.cache)))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pages, including page 0."""
        return kv_bytes_of(self.policy, self.page_count, self.page_size)

    def check(self) -> None:
        """Raise ValueError if decoding differs from one forward pass over the whole sequence."""
        most = self.page_count // pages_of(CHECKED_TOKENS, self.page_size)
        check_decoding(self, self.policy, min(self.slots, most))

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout: allocate pages, at most as many as `sequences` sequences can fill, all of them free."""
        filled = min(self.slots, sequences) * self.table.shape[1]
        opened = min(self.page_count, filled)
        self.ample = opened == filled
        shape = pool_shape(self.policy, 1 + opened, self.page_size)
        self.pool = allocate(shape, self.policy.product_dtype, self.policy.device)
        for layer, (keys, values) in zip(self.paged, self.pool, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            for pages in (keys, values) if self.compiles else ():
                torch._dynamo.mark_dynamic(pages, 0)  # a new pool size causes no recompilation
        self.sequences = Sequences(Pages(opened, first=1), self.page_size, self.slots)
        self.table.zero_()
        self.restarted = 0
        self.project = head_product(self.policy)  # with the current weights
        # The addresses that a captured graph reads, and the pool's size, which determines the offset of a layer's pages.
        self._key = (self.pool.data_ptr(), opened, *(weight.data_ptr() for weight in self.policy.parameters()))

    def close(self) -> None:
        """Drop the pages. With autocast also drop the graphs, because they read copies of weights that end with the rollout."""
        self.pool = self.project = None
        if self.policy.compute_dtype is not None:
            self._graphed = None
        for layer in self.paged:
            layer.keys = layer.values = None

    def admissible(self, prompts: list[Tensor], count: int) -> int:
        """Return how many of the prompts, in order, fit into the free pages in addition to `count` active sequences.

        One more page per sequence stays free; otherwise a sequence could be preempted directly after its prefill.
        """
        if self.ample:
            return len(prompts)
        free, seen = self.sequences.pages.free, set()
        for index, prompt in enumerate(prompts):
            ids = tuple(prompt.tolist())
            free -= 0 if ids in seen else self.sequences.pages_of(len(prompt))
            seen.add(ids)
            if free < count + index + 1 and count + index > 0:
                return index
        return len(prompts)

    def preempt(self, count: int) -> list[int]:
        """Preempt the youngest of the first `count` sequences until the others have pages for a token; return the slots."""
        dropped = self.sequences.preempt(count)
        self.restarted += len(dropped)
        return dropped

    def metrics(self) -> dict[str, float]:
        """Return how often sequences were preempted and regenerated since `open`."""
        return {"restarted_sequences": self.restarted}

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Prefill prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt.

        Prompts with the same ids share their pages.
        """
        firsts, source = same_as(prompts)
        for index, (prompt, group) in enumerate(zip(prompts, source, strict=True)):
            like = None if firsts[group] == index else first + firsts[group]
            self.sequences.admit(first + index, len(prompt), like)
        self._write_table(range(first, first + len(prompts)))
        distinct = [prompts[index] for index in firsts]
        self._begin_prefill(distinct, [first + index for index in firsts])
        batch = prefill_batch(self.policy, distinct, source, self.cache, self.max_position)
        with self.layers.prefill():
            return self.policy(batch, self.want, project=self.project)

    def _begin_prefill(self, prompts: list[Tensor], slots: list[int]) -> None:
        """Set the pages to which the layers write the keys and values of the next pass."""
        device, width = self.policy.device, prompt_width(len(prompts[0]))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        row, token = (torch.arange(width, device=device) < lengths[:, None]).nonzero(as_tuple=True)
        slot = torch.tensor(slots, device=device)
        self.now.page = self.table[slot[row], token // self.page_size].long()
        self.now.within, self.now.source = token % self.page_size, row * width + token

    def decode(
        self,
        tokens: Tensor,  # (rows,), the last token of each sequence; slots from `count` on are empty
        positions: Tensor,  # (rows,), the position of that token
        count: int,
        want: Collection[Want] | None = None,
    ) -> Outputs:  # rows >= MIN_ROWS
        """Feed one token to each of the first `count` slots; return the outputs in the states after them."""
        self._grow(count)
        rows = max(count, MIN_ROWS)
        tokens, positions = (pad(x[:count], (0, rows - count)) for x in (tokens, positions))
        # Rows without a sequence read and write page 0.
        empty = torch.arange(rows, device=self.table.device)[:, None] >= count
        return self._forward(tokens, positions, self.table[:rows].masked_fill(empty, 0), want or self.want)

    def step(
        self,
        tokens: Tensor,  # (rows,)
        positions: Tensor,  # (rows,)
        count: int,
        act: Act,
        idle: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Call `act(outputs, slots)` on the outputs of `decode`; on a GPU decode and `act` are one CUDA graph."""
        if not self.captures:
            act(self.decode(tokens, positions, count), slice(0, count))
            return
        key = (*self._key, tokens.data_ptr(), positions.data_ptr())
        if self._graphed is None or self._graphed[0] is not act:
            self._graphed = act, GraphedStep(partial(self._act, act, tokens, positions))
        self._grow(count)
        self._graphed[1](key, ladder(count, MIN_ROWS), partial(self._idle, idle))

    def _act(self, act: Act, tokens: Tensor, positions: Tensor, rows: int) -> None:
        """Run the part of a step that a graph captures."""
        with self.compiled():
            outputs = self._forward(tokens[:rows], positions[:rows], self.table[:rows], self.want)
        act(outputs, slice(0, rows))

    @contextmanager
    def _idle(self, idle: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        table = self.table.clone()
        self.table.zero_()
        try:
            with idle():
                yield
        finally:
            self.table.copy_(table)

    def _forward(
        self,
        tokens: Tensor,  # (rows,)
        positions: Tensor,  # (rows,)
        table: Tensor,  # (rows, M)
        want: Collection[Want],
    ) -> Outputs:
        now = self.now
        now.page = table.gather(1, (positions // self.page_size)[:, None])[:, 0].long()
        now.within, now.source = positions % self.page_size, None
        now.table, now.lengths = table, (positions + 1).int()
        # `attend` does not read the mask. Without one, some models search the tokens for padding and wait for the device.
        mask = torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=tokens.device)
        batch = TokenBatch(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None], cache=self.cache
        )
        # `attend` replaces the attention of every layer; models with a softcap pass it as an argument.
        with attention(self.text_config, ATTENTION), self.layers.prefill():
            return self.policy(batch, want, project=self.project)

    def _grow(self, count: int) -> None:
        """Make space for one more token in each of the first `count` slots."""
        grown = [(slot, self.sequences.grow(slot)) for slot in range(count)]
        changes = [(slot, *change) for slot, change in grown if change is not None]
        copies = [(page, source) for _, _, page, source in changes if source is not None]
        if copies:
            assert self.pool is not None
            page, source = torch.tensor(copies, device=self.table.device).T
            self.pool[:, :, page] = self.pool[:, :, source]
        if changes:
            slot, place, page = torch.tensor([change[:3] for change in changes], device=self.table.device).T
            self.table[slot, place] = page.int()

    def _write_table(self, slots: range | list[int]) -> None:
        places, held = self.table.shape[1], [self.sequences.held[slot] for slot in slots]
        rows = torch.tensor([pages + [0] * (places - len(pages)) for pages in held], dtype=torch.int32)
        self.table[torch.tensor(list(slots))] = rows.to(self.table.device)

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Move sequences from slots `source` to slots `target`, whose sequences are dropped; no page is copied."""
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            self.sequences.move(old, new)
        self._write_table(target.tolist())

    def keep(self, count: int) -> None:
        """Drop the sequences in slots from `count` on and release their pages."""
        for slot in range(count, self.slots):
            self.sequences.drop(slot)
        self.table[count:] = 0

"""Decoding with keys and values in pages: a sequence has the pages that it fills, wherever they lie.

The pages of all layers are one allocation, dropped between rollouts. Samples of one prompt share its pages; the last one, which
is full in part, is copied for all of them but the last to write to it. Any causal LM decodes so that calls its attention by way
of transformers' interface: `PagedLayer.update` hands over pages in place of keys, and `paged_attention` reads them.

On a GPU a step, sampling included, is a CUDA graph, its rows padded to a power of two. There a row's bits may depend on the
number it is padded to, since a matrix product picks its kernel by its rows; on CPU they depend on nothing but the row's own, as
in `Decoder`. Page 0 belongs to nobody: rows without a sequence write to it.
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

from rlhf_engine.model import ActorCritic, Outputs, TokenBatch
from rlhf_engine.model.roles import Want
from rlhf_engine.model.trunk import attention
from rlhf_engine.rollout.decode.cache import Allocate, kv_bytes, kv_shape, new_memory, same_as
from rlhf_engine.rollout.decode.cpu import head_product
from rlhf_engine.rollout.decode.gpu import CompiledLayers, GraphedStep, ladder, why_not
from rlhf_engine.rollout.decode.pages import Pages, Sequences, pages_of
from rlhf_engine.rollout.decode.slots import MIN_ROWS, Act, Decoder, prefill_batch, prompt_width
from rlhf_kernels import paged_attention

ATTENTION = "rlhf_pages"
PAGE_SIZE = 64
"""Tokens of a page: a sequence leaves half a page unused on average, and a tile of the kernel lies in one or two."""
_POSITION_COUNTING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that look at the largest position on the host, which a graph cannot."""


class PagedKeys(NamedTuple):
    """What attention finds in place of keys while it decodes."""

    pages: Tensor  # (P, page size, groups, D)
    table: Tensor  # (R, M), int32
    lengths: Tensor  # (R,), int32, the new token counted
    window: int | None


def attend(
    module: nn.Module,
    query: Tensor,  # (R, heads, 1, D)
    key: PagedKeys,
    value: Tensor,  # (P, page size, groups, D)
    attention_mask: Tensor,  # not read: a row's pages and length say what it sees
    scaling: float | None = None,  # default: D ** -0.5
    softcap: float | None = None,
    **unused: object,  # what other implementations are told too: dropout, sliding_window, is_causal
) -> tuple[Tensor, None]:  # (R, 1, heads, D)
    """`paged_attention` in transformers' attention interface."""
    options = {"scale": scaling, "window": key.window, "softcap": softcap}
    return paged_attention(query[:, :, 0].to(value.dtype), key.pages, value, key.table, key.lengths, **options)[
        :, None
    ], None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class _Step:
    """What the layers need to know about the forward pass under way. N tokens are written."""

    page: Tensor | None = None  # (N,)
    within: Tensor | None = None  # (N,), the place in the page
    source: Tensor | None = None  # (N,), prefill: their places in the flattened prompts; None in decode
    table: Tensor | None = None  # (R, M), decode
    lengths: Tensor | None = None  # (R,), decode


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer: views of the pool, [pages, page size, groups, D]."""

    is_sliding = False

    def __init__(self, step: _Step, window: int | None) -> None:
        super().__init__()
        self.step, self.window = step, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the pool is there before the first forward pass")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor | PagedKeys, Tensor]:
        """Write the new tokens; return what attention reads: in prefill their keys and values, in decode the pages."""
        step = self.step
        for states, pages in ((key_states, self.keys), (value_states, self.values)):
            if states.shape[1::2] != pages.shape[2:]:
                got, expected = tuple(states.shape[1::2]), tuple(pages.shape[2:])
                raise ValueError(
                    f"policy: got keys or values of (heads, size) {got}, expected {expected} by its config"
                )
            tokens = states.transpose(1, 2).flatten(0, 1).to(pages.dtype)  # (rows * tokens, groups, D)
            pages[step.page, step.within] = tokens if step.source is None else tokens[step.source]
        if step.source is not None:
            return key_states, value_states
        return PagedKeys(self.keys, step.table, step.lengths, self.window), self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Asked in prefill alone, where attention reads the new columns; decode has no mask.
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def pool_shape(policy: ActorCritic, pages: int, page_size: int) -> tuple[int, ...]:
    """(layers, keys and values, pages, page size, groups, D) of a policy."""
    layers, groups, size = kv_shape(policy)
    return layers, 2, pages, page_size, groups, size


def is_paged(cache: str, device: str) -> bool:
    """Return whether `rollout.cache` asks for pages on a device of type `device`."""
    return cache == "paged" or (cache == "auto" and device == "cuda")


def pool_bytes(shape: tuple[int, int, int], pages: int, dtype: torch.dtype, page_size: int = PAGE_SIZE) -> int:
    """Return the bytes of `pages` pages and of page 0, which no sequence has; `shape` is that of `kv_shape`."""
    return kv_bytes(shape, (1 + pages) * page_size, dtype)


def kv_bytes_of(policy: ActorCritic, pages: int, page_size: int = PAGE_SIZE) -> int:
    """Return `pool_bytes` of a policy's keys and values."""
    return pool_bytes(kv_shape(policy), pages, policy.product_dtype, page_size)


def pages_within(policy: ActorCritic, kv_bytes: int, page_size: int = PAGE_SIZE) -> int:
    """How many pages fit into `kv_bytes`, beside page 0."""
    return kv_bytes // kv_bytes_of(policy, 0, page_size) - 1


class PagedDecoder(Decoder):
    """`Decoder` on at most `pages` pages, by default as many as the longest sequence in every slot fills.

    It decodes between `open` and `close`. `compiles` as `rollout.compile` says it.

    Raises ValueError as `Decoder` does, and for fewer pages than one sequence of `columns` tokens may fill.
    """

    def __init__(
        self,
        policy: ActorCritic,
        slots: int,
        columns: int,
        *,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        compiles: bool | None = None,
    ) -> None:
        super().__init__(policy, slots, columns)
        self.page_size = page_size
        places = pages_of(self.columns, page_size)
        self.page_count = self.slots * places if pages is None else min(pages, self.slots * places)
        if self.page_count < places:
            raise ValueError(
                f"pages: got {self.page_count} of {page_size} tokens, expected at least {places}, those of one sequence of "
                f"{columns} tokens"
            )
        self.table = torch.zeros(ladder(self.slots, MIN_ROWS), places, dtype=torch.int32, device=policy.device)
        kinds = getattr(self.text_config, "layer_types", None) or self.attention * self.text_config.num_hidden_layers
        windows = {"sliding_attention": getattr(self.text_config, "sliding_window", None), "full_attention": None}
        self.now = _Step()
        self.cache = Cache(layers=[PagedLayer(self.now, windows[kind]) for kind in kinds])
        self.pool: Tensor | None = None
        self.captures = self._can_capture()
        # Under autocast a compiled layer would round its weights anew in every step.
        can = self.captures and policy.compute_dtype is None
        self.compiles = can and (compiles or (compiles is None and not why_not(policy, self.cache)))
        self.compiled = CompiledLayers(policy, self.cache) if self.compiles else nullcontext
        self.cuda = torch.cuda
        self._graphed: tuple[Act, GraphedStep] | None = None
        self.roomy = False
        """Whether all that `open` was told of fits to its end."""
        self.restarted = 0
        """Sequences that had to leave since then."""

    @property
    def pool_bytes(self) -> int:
        """Memory of the pages."""
        return kv_bytes_of(self.policy, self.page_count, self.page_size)

    def _can_capture(self) -> bool:
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        nested = [rope, *(x for x in rope.values() if isinstance(x, dict))]
        waits = any(x.get("rope_type") in _POSITION_COUNTING_ROPE for x in nested)
        return self.policy.device.type == "cuda" and not waits

    def open(self, allocate: Allocate = new_memory, sequences: int | None = None) -> None:
        """Take the memory of the pages, all of them free; of no more than `sequences` fill. It may hold anything."""
        most = self.slots if sequences is None else min(self.slots, sequences)
        filled = most * self.table.shape[1]
        opened = min(self.page_count, filled)
        self.roomy = opened == filled
        shape = pool_shape(self.policy, 1 + opened, self.page_size)
        self.pool = allocate(shape, self.policy.product_dtype, self.policy.device)
        for layer, (keys, values) in zip(self.cache.layers, self.pool, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            for pages in (keys, values) if self.compiles else ():
                torch._dynamo.mark_dynamic(pages, 0)  # a pool of another size is not compiled for again
        self.sequences = Sequences(Pages(opened, first=1), self.page_size, self.slots)
        self.table.zero_()
        self.restarted = 0
        self.project = head_product(self.policy)  # the weights may have changed
        # What a captured graph reads by its address, and the size that says where a layer's pages begin.
        self._key = (self.pool.data_ptr(), opened, *(weight.data_ptr() for weight in self.policy.parameters()))

    def close(self) -> None:
        """Give the memory of the pages back. A graph that read autocast's copies of weights, which end here, is no more use."""
        self.pool = self.project = None
        if self.policy.compute_dtype is not None:
            self._graphed = None
        for layer in self.cache.layers:
            layer.keys = layer.values = None

    def room(self, prompts: list[Tensor], count: int) -> int:
        """How many of these prompts, in their order, there are pages for beside `count` running sequences.

        Each that runs then finds one more page free, or a prompt would be read for a sequence that has to leave at once.
        """
        if self.roomy:
            return len(prompts)
        free, seen = self.sequences.pages.free, set()
        for index, prompt in enumerate(prompts):
            ids = tuple(prompt.tolist())
            free -= 0 if ids in seen else self.sequences.pages_of(len(prompt))
            seen.add(ids)
            if free < count + index + 1 and count + index > 0:
                return index
        return len(prompts)

    def room_of(self, length: int) -> int:
        """How many sequences of `length` tokens there are slots and pages for at a time."""
        return min(self.slots, self.page_count // -(-length // self.page_size))

    def make_room(self, count: int) -> list[int]:
        """The slots whose sequences had to leave, so that all others of the first `count` can take one more token."""
        left = self.sequences.make_room(count)
        self.restarted += len(left)
        return left

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Read prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt.

        Prompts with the same ids are read once and share their pages. Rows beyond the prompts repeat the first one.
        """
        firsts, kinds = same_as(prompts)
        for index, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            like = None if firsts[kind] == index else first + firsts[kind]
            self.sequences.admit(first + index, len(prompt), like)
        self._write_table(range(first, first + len(prompts)))
        read = [prompts[index] for index in firsts]
        self._write_prefill(read, [first + index for index in firsts])
        with self.layers.prefill():
            return self.policy(prefill_batch(self.policy, read, kinds, self.cache), self.want, project=self.project)

    def _write_prefill(self, prompts: list[Tensor], slots: list[int]) -> None:
        """Set where the layers write the keys and values of the next pass."""
        device, width = self.policy.device, prompt_width(len(prompts[0]))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        row, token = (torch.arange(width, device=device) < lengths[:, None]).nonzero(as_tuple=True)
        step, slot = self.now, torch.tensor(slots, device=device)
        step.page = self.table[slot[row], token // self.page_size].long()
        step.within, step.source = token % self.page_size, row * width + token

    def decode(
        self,
        tokens: Tensor,  # (slots,), the last token of each sequence; slots at `count` and beyond hold none
        positions: Tensor,  # (slots,), its position
        count: int,
        want: Collection[Want] | None = None,
    ) -> Outputs:  # rows >= MIN_ROWS
        """Feed one token to each of the first `count` slots; return the outputs in the states after them."""
        self._grow(count)
        rows = max(count, MIN_ROWS)
        tokens, positions = (_padded(x[:count], rows) for x in (tokens, positions))
        return self._forward(tokens, positions, self._rows(rows, count), want or self.want)

    def step(
        self,
        tokens: Tensor,  # (slots,)
        positions: Tensor,  # (slots,)
        count: int,
        act: Act,
        idle: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Call `act(outputs, here)` in the states after `decode`: all of it one graph on a GPU."""
        if not self.captures:
            super().step(tokens, positions, count, act, idle)
            return
        # Rows without a sequence are on page 0 in the table, and so are those of a warm-up.
        key = (*self._key, tokens.data_ptr(), positions.data_ptr())
        if self._graphed is None or self._graphed[0] is not act:
            self._graphed = act, GraphedStep(partial(self._act, act, tokens, positions), self.cuda)
        self._grow(count)
        self._graphed[1](key, ladder(count, MIN_ROWS), partial(self._idle, idle))

    def _act(self, act: Act, tokens: Tensor, positions: Tensor, rows: int) -> None:
        """What a graph captures."""
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

    def _rows(self, rows: int, count: int) -> Tensor:  # (rows, M)
        """The table with rows beyond the sequences on page 0."""
        return self.table[:rows].masked_fill(torch.arange(rows, device=self.table.device)[:, None] >= count, 0)

    def _forward(
        self,
        tokens: Tensor,  # (rows,)
        positions: Tensor,  # (rows,)
        table: Tensor,  # (rows, M)
        want: Collection[Want],
    ) -> Outputs:
        step = self.now
        step.page = table.gather(1, (positions // self.page_size)[:, None])[:, 0].long()
        step.within, step.source = positions % self.page_size, None
        step.table, step.lengths = table, (positions + 1).int()
        # Nobody reads the mask; without one some models look for padding among the tokens, and wait for the device.
        mask = torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=tokens.device)
        with self._attending():
            batch = TokenBatch(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None], cache=self.cache
            )
            return self.policy(batch, want, project=self.project)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Every layer's attention reads pages, eager ones too, which hand over their softcap."""
        with attention(self.text_config, ATTENTION), self.layers.prefill():
            yield

    def _grow(self, count: int) -> None:
        grown = [(slot, self.sequences.grow(slot)) for slot in range(count)]
        changes = [(slot, *change) for slot, change in grown if change is not None]
        copies = [(page, source) for _, _, page, source in changes if source is not None]
        if copies:
            page, source = torch.tensor(copies, device=self.table.device).T
            self.pool[:, :, page] = self.pool[:, :, source]
        if changes:
            slot, place, page = torch.tensor([change[:3] for change in changes], device=self.table.device).T
            self.table[slot, place] = page.int()

    def _write_table(self, slots: range | list[int]) -> None:
        places = self.table.shape[1]
        held = [self.sequences.held[slot] for slot in slots]
        rows = torch.tensor([pages + [0] * (places - len(pages)) for pages in held], dtype=torch.int32)
        self.table[torch.tensor(list(slots))] = rows.to(self.table.device)

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Sequences in slots `source` go on in slots `target`, whose own are gone: their pages stay where they are."""
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            self.sequences.move(here, there)
        self._write_table(target.tolist())

    def keep(self, count: int) -> None:
        """The sequences in slots at `count` and beyond are gone; their pages are free."""
        for slot in range(count, self.slots):
            self.sequences.drop(slot)
        self.table[count:] = 0

    @torch.no_grad()
    def check(self) -> None:
        """`Decoder.check` in memory of its own, which is given back."""
        self.open()
        try:
            super().check()
        finally:
            self.close()


def _padded(x: Tensor, rows: int) -> Tensor:
    """Zeros behind the last row."""
    return pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))

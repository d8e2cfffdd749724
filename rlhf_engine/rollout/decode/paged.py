"""Decoding with keys and values in pages: a sequence has only the pages that it fills, in any order.

The pages of all layers are one allocation, dropped between rollouts. Samples of one prompt share its pages. Each sample copies
a partly filled last page before it writes there, except the last one to write. If a model passes what a cache returns to
transformers' attention interface, `PagedLayer.update` returns pages and `attend` reads them. For other models, such as those
with latent attention, it copies the pages of each sequence into one tensor per layer and step, which takes time.

On a GPU a step with its sampling is a CUDA graph, and its rows are padded to a power of two. A row's bits may then depend on
the number of rows, which selects the kernel of a matrix product. On CPU they do not depend on other rows.
Page 0 is scratch: rows without a sequence write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.model.roles import Want
from rlhf_engine.model.trunk import attention
from rlhf_engine.rollout.decode.cpu import InvariantLayers, ReorderedHead, head_product
from rlhf_engine.rollout.decode.gpu import CompiledLayers, GraphedStep, ladder, why_not
from rlhf_engine.rollout.decode.pages import PAGE_SIZE, Pages, Sequences, pages_of
from rlhf_engine.rollout.decode.pool import (
    ATTENTION,
    PagedLayer,
    Pass,
    check_config_heads,
    kv_bytes_of,
    layers_of_pool,
    pages_within,
    pool_shape,
    reads_pages,
)
from rlhf_engine.rollout.decode.probe import probe
from rlhf_engine.rollout.decode.protocol import (
    CHECKED_TOKENS,
    MIN_ROWS,
    Act,
    Allocate,
    attention_kinds,
    check_decoding,
    check_kv_bytes,
    column_masks,
    new_memory,
    prefill_batch,
    prompt_width,
    read_columns,
    same_as,
    sampled_outputs,
)

_POSITION_COUNTING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that read the largest position on the host, which a CUDA graph cannot capture."""


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
        self.kinds = attention_kinds(policy, columns)
        found = probe(policy)
        self.gathers = not reads_pages(policy)
        """Whether a step copies the pages of a sequence into one tensor, for attention that cannot read pages."""
        self.eager = self.gathers and (self.text_config._attn_implementation == "eager" or not found.routed)
        places = pages_of(max(columns, CHECKED_TOKENS), page_size)
        self.page_count = slots * places
        if kv_bytes is not None:
            check_kv_bytes(kv_bytes, kv_bytes_of(policy, places, page_size), f"one sequence of {columns} tokens")
            self.page_count = min(self.page_count, pages_within(policy, kv_bytes, page_size))
        self.table = torch.zeros(self.rows, places, dtype=torch.int32, device=policy.device)
        self.layers = InvariantLayers(policy)
        self.want = sampled_outputs(policy)
        self.max_position, self.now = max_positions(policy.model), Pass(gathers=self.gathers)
        windows = {"sliding_attention": getattr(self.text_config, "sliding_window", None)}
        by_layer = getattr(self.text_config, "layer_types", None) or self.kinds * self.text_config.num_hidden_layers
        shapes = zip(by_layer, found.layers, strict=True)
        self.paged = [PagedLayer(self.now, windows.get(kind), shape) for kind, shape in shapes]
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
        return self.policy.device.type == "cuda" and not waits and not self.gathers

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
        check_config_heads(self.policy)
        most = self.page_count // pages_of(CHECKED_TOKENS, self.page_size)
        try:
            check_decoding(self, self.policy, min(self.slots, most))
        except ValueError as error:
            raise ValueError(f"{error}; set rollout.cache=slots") from None

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout: allocate pages, at most as many as `sequences` sequences can fill, all of them free."""
        filled = min(self.slots, sequences) * self.table.shape[1]
        opened = min(self.page_count, filled)
        self.ample = opened == filled
        shape = pool_shape(self.policy, 1 + opened, self.page_size)
        self.pool = allocate(shape, self.policy.product_dtype, self.policy.device)
        views = layers_of_pool(self.pool, self.policy, self.page_size)
        for layer, (keys, values) in zip(self.paged, views, strict=True):
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
        if self.gathers:
            return self._forward_gathered(tokens, positions, want)
        # `attend` does not read the mask. Without one, some models search the tokens for padding and wait for the device.
        mask = torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=tokens.device)
        batch = TokenBatch(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None], cache=self.cache
        )
        # `attend` replaces the attention of every layer; models with a softcap pass it as an argument.
        with attention(self.text_config, ATTENTION), self.layers.prefill():
            return self.policy(batch, want, project=self.project)

    def _forward_gathered(self, tokens: Tensor, positions: Tensor, want: Collection[Want]) -> Outputs:
        assert self.now.table is not None
        longest = read_columns(int(positions.max()) + 1, self.table.shape[1] * self.page_size)
        self.now.table = self.now.table[:, : pages_of(longest, self.page_size)]
        width = self.now.table.shape[1] * self.page_size
        additive = self.policy.lm_weight.dtype if self.eager else None
        mask = column_masks(self.text_config, self.kinds, positions, width, additive)
        batch = TokenBatch(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None], cache=self.cache
        )
        with self.layers.decode(eager=self.eager):
            return self.policy(batch, want, project=self.project)

    def _grow(self, count: int) -> None:
        """Make space for one more token in each of the first `count` slots."""
        grown = [(slot, self.sequences.grow(slot)) for slot in range(count)]
        changes = [(slot, *change) for slot, change in grown if change is not None]
        copies = [(page, source) for _, _, page, source in changes if source is not None]
        if copies:
            page, source = torch.tensor(copies, device=self.table.device).T
            self._copy(page, source)
        if changes:
            slot, place, page = torch.tensor([change[:3] for change in changes], device=self.table.device).T
            self.table[slot, place] = page.int()

    def _copy(self, page: Tensor, source: Tensor) -> None:
        """Copy pages `source` to `page` in all layers."""
        assert self.pool is not None
        if self.pool.dim() > 1:
            self.pool[:, :, page] = self.pool[:, :, source]
            return
        for layer in self.paged:
            for pages in (layer.keys, layer.values):
                assert pages is not None
                pages[page] = pages[source]

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

"""The decoder of a rollout: the protocol, and what its implementations share.

A row's hidden state has the same bits whatever the other rows are, so that a sample does not depend on its batch. On CPU this
takes four measures: a matrix product has at least `MIN_ROWS` rows (BLAS computes fewer differently), a prompt is padded to a
width that depends only on its own length, attention reads only the columns of its own sequence (eager attention: a width that
the configuration fixes), and activations whose kernels round by position are replaced (`InvariantLayers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache

from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.model.roles import Want

MIN_ROWS = 16
"""Fewest rows of a forward pass."""
CHECKED_TOKENS = 10
"""Tokens of the longest sequence that `check_decoding` decodes."""
_ATTENTION = ("sdpa", "flash_attention_2", "eager")
_KINDS = ("full_attention", "sliding_attention")

Act = Callable[[Outputs, slice], None]
"""`act(outputs, slots)` samples in the states of a step. A graph may hold it, so that it must not wait for the device."""

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""`allocate(shape, dtype, device)` returns memory with any content, such as an arena's."""


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor with any content."""
    return torch.empty(shape, dtype=dtype, device=device)


class Decoder(Protocol):
    """A policy's trunk with a cache of keys and values, which decodes the sequences in slots 0, 1, ... together.

    Calls other than `check` come between `open` and `close`.
    """

    slots: int
    """Most sequences that are decoded together."""
    rows: int
    """Most rows of a step, at least `slots`: rows beyond the sequences are padding."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which `open` allocates at most."""
        ...

    def check(self) -> None:
        """Raise ValueError where decoding differs from one forward pass over the whole sequence (`check_decoding`)."""

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout of `sequences` sequences with the weights as they are now; `allocate` gives the cache its memory."""

    def close(self) -> None:
        """End a rollout and drop the cache."""

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Read prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt.

        Prompts with the same ids are read once. Rows beyond the prompts repeat the first one.
        """
        ...

    def decode(
        self,
        tokens: Tensor,  # (rows,), the last token of each sequence; slots from `count` on are empty
        positions: Tensor,  # (rows,), the position of that token
        count: int,
        want: Collection[Want] | None = None,  # default: those that sampling reads
    ) -> Outputs:  # rows >= MIN_ROWS
        """Feed one token to each of the first `count` slots; return the outputs in the states after them."""
        ...

    def step(
        self,
        tokens: Tensor,  # (rows,)
        positions: Tensor,  # (rows,)
        count: int,
        act: Act,
        idle: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Call `act(outputs, slots)` on the outputs of `decode`.

        A decoder that captures the step as a graph passes more slots than `count`, the last ones empty, and runs the step in
        `idle()` to warm up, where all slots are empty.
        """

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Move sequences of at most `width` tokens from slots `source` to slots `target`; the two must not overlap."""

    def keep(self, count: int) -> None:
        """Drop the sequences in slots from `count` on."""

    def admissible(self, prompts: list[Tensor], count: int) -> int:
        """Return how many of these prompts, in order, fit into the cache in addition to `count` active sequences."""
        ...

    def preempt(self, count: int) -> list[int]:
        """Drop sequences until all others of the first `count` have space for one more token; return the slots of those."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return counts of the last rollout for the log."""
        ...


# ---- shared by the implementations ----


def kv_shape(policy: LanguageModel) -> tuple[int, int, int]:
    """Return (layers, heads, head size) of a policy's keys and values."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def kv_bytes(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of `tokens` tokens in all layers; `shape` is that of `kv_shape`."""
    return 2 * math.prod(shape) * tokens * dtype.itemsize


def check_kv_bytes(given: int, least: int, what: str) -> None:
    """Raise ValueError if `given` bytes are fewer than the `least` that the keys and values of `what` take."""
    if given < least:
        raise ValueError(
            f"kv_bytes: got {given}, expected at least {least}, the keys and values of {what} "
            "(rollout.max_prompt_tokens and rollout.max_response_tokens together)"
        )


def prompt_width(length: int) -> int:
    """Return the columns of a prompt's prefill: they depend only on its length, with at most a quarter of padding beyond 64."""
    step = MIN_ROWS
    while step * 4 < length:
        step *= 2
    return -(-length // step) * step


def attention_kinds(policy: LanguageModel) -> list[str]:
    """Return the kinds of attention layers, which need a mask each; raise ValueError for those that no decoder supports."""
    model, text = policy.model, policy.model.config.get_text_config()
    if text._attn_implementation not in _ATTENTION:
        raise ValueError(
            f"policy: got attention {text._attn_implementation!r}, expected one of {', '.join(map(repr, _ATTENTION))}"
        )
    default = "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"
    kinds = sorted(set(getattr(text, "layer_types", None) or [default]))
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if getattr(model, "_is_stateful", False):
        unknown.append("a recurrent state")
    if getattr(text, "alibi", False) or hasattr(policy.trunk, "build_alibi_tensor"):
        unknown.append("ALiBi biases computed from the padding mask")
    if unknown:
        got = ", ".join(unknown)
        raise ValueError(f"policy: {type(model).__name__} has {got}, expected full or sliding-window attention")
    return kinds


def sampled_outputs(policy: LanguageModel) -> tuple[Want, ...]:
    """Return what a decode step asks the policy for: values too, where they come from the same hidden states."""
    return ("logits", "values") if policy.value is not None and policy.value.shares_trunk else ("logits",)


def same_as(prompts: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return the index of the first prompt of each group with the same ids, and the group of each prompt."""
    groups: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    group_of = []
    for index, prompt in enumerate(prompts):
        key = tuple(prompt.tolist())
        if key not in groups:
            groups[key] = len(firsts)
            firsts.append(index)
        group_of.append(groups[key])
    return firsts, group_of


def prefill_batch(
    policy: LanguageModel, prompts: list[Tensor], source: list[int], cache: Cache, max_position: int | None
) -> TokenBatch:
    """Return the input of one pass over prompts of one `prompt_width`; row r is the state after prompt `source[r]`.

    There are at least `MIN_ROWS` rows; those beyond `source` repeat the first prompt's. Columns beyond a prompt's end repeat
    its last token: no real token sees them, and no key or value of theirs is used. Positions stay below `max_position`.
    """
    device, width = policy.device, prompt_width(len(prompts[0]))
    inputs = torch.stack([torch.cat([p, p[-1:].expand(width - len(p))]) for p in prompts])
    last = torch.tensor([row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
    rows = last[torch.tensor(source + [0] * (MIN_ROWS - len(source)), device=device)]
    positions = None
    if max_position is not None and width > max_position:
        positions = torch.arange(width, device=device).clamp(max=max_position - 1).expand_as(inputs)
    return TokenBatch(input_ids=inputs, rows=rows, position_ids=positions, cache=cache)


@torch.no_grad()
def check_decoding(decoder: Decoder, policy: LanguageModel, most: int) -> None:
    """Compare two decoded sequences of different lengths with one forward pass over each; ValueError where they differ.

    At most `most` sequences are compared.
    """
    ids = torch.arange(1, CHECKED_TOKENS + 1, device=policy.device).remainder(policy.lm_weight.shape[0])
    compared, decoded_tokens = (ids, ids.flip(0)[: CHECKED_TOKENS - 3])[:most], 2
    try:
        decoder.open(len(compared))
        decoder.prefill([sequence[:-decoded_tokens] for sequence in compared], 0)
        for left in range(decoded_tokens, 0, -1):
            positions = torch.tensor([len(sequence) - left for sequence in compared], device=ids.device)
            tokens = torch.stack([sequence[-left] for sequence in compared])
            decoded = decoder.decode(tokens, positions, len(compared), ("hidden",)).hidden
    finally:
        decoder.close()
    for row, sequence in enumerate(compared):
        expected = policy(TokenBatch(input_ids=sequence[None]), ("hidden",)).hidden
        assert decoded is not None and expected is not None
        expected = expected[-1]
        # Scores near a softcap c round to c eps, and the softmax makes that a relative error, in every layer.
        softcap = getattr(policy.model.config.get_text_config(), "attn_logit_softcapping", None) or 0
        allowed = (64 + 4 * softcap) * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        difference = float((decoded[row].float() - expected.float()).abs().max())
        if not difference <= allowed:
            raise ValueError(
                f"policy: {type(policy.model).__name__} decoded token by token differs from its own forward pass by "
                f"{difference:.3g} (at most {allowed:.3g} expected); its attention does not read a plain 4D mask"
            )

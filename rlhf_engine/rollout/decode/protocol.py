"""The `Decoder` protocol of a rollout, and helpers that its implementations share.

The bits of a row's hidden state do not depend on the other rows, so a sample does not depend on its batch. On CPU this requires
four measures. A matrix product has at least `MIN_ROWS` rows, because BLAS computes smaller products differently. The padded
width of a prompt depends only on the prompt's length. Attention reads only the columns of the row's sequence (eager attention
reads a width that the configuration fixes). Activations whose kernels round by position are replaced (`InvariantLayers`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.model.exact import MIN_ROWS
from rlhf_engine.model.roles import Want
from rlhf_engine.model.trunk import input_layer

CHECKED_TOKENS = 10
"""Tokens of the longest sequence that `check_decoding` decodes."""
_BLOCK = 512
"""Columns per block of a decode step's attention: it reads whole blocks up to the longest sequence."""
_ATTENTION = ("sdpa", "flash_attention_2", "eager")
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")

Act = Callable[[Outputs, slice], None]
"""`act(outputs, slots)` samples an action per slot. A CUDA graph may capture it, so it must not wait for the device."""

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""`allocate(shape, dtype, device)` returns an uninitialized tensor, for example from an arena."""


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new uninitialized tensor."""
    return torch.empty(shape, dtype=dtype, device=device)


class Decoder(Protocol):
    """A policy's trunk with a cache of keys and values, which decodes the sequences in slots 0, 1, ... together.

    All methods except `check` must be called between `open` and `close`.
    """

    slots: int
    """Maximum number of sequences that are decoded together."""
    rows: int
    """Maximum number of rows of a step, at least `slots`. Rows without a sequence are padding."""

    @property
    def cache_bytes(self) -> int:
        """Upper bound of the bytes of keys and values that `open` allocates."""
        ...

    def check(self) -> None:
        """Raise ValueError if decoding differs from one forward pass over the whole sequence (see `check_decoding`)."""

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout of `sequences` sequences with the current weights; `allocate` provides the memory of the cache."""

    def close(self) -> None:
        """End the rollout and drop the cache."""

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Prefill prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt.

        Prompts with the same ids are prefilled once. Rows beyond the prompts repeat the first one.
        """
        ...

    def decode(
        self,
        tokens: Tensor,  # (rows,), the last token of each sequence; slots from `count` on are empty
        positions: Tensor,  # (rows,), the position of that token
        count: int,
        want: Collection[Want] | None = None,  # default: the outputs that sampling reads
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

        A decoder that captures the step as a CUDA graph passes more slots than `count`; the additional slots are empty. It runs
        its warm-up steps inside `idle()`, where all slots are empty.
        """

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Move sequences of at most `width` tokens from slots `source` to slots `target`; the two must not overlap."""

    def keep(self, count: int) -> None:
        """Drop the sequences in slots from `count` on."""

    def admissible(self, prompts: list[Tensor], count: int) -> int:
        """Return how many of the prompts, in order, fit into the cache in addition to `count` active sequences."""
        ...

    def preempt(self, count: int) -> list[int]:
        """Preempt sequences until all others of the first `count` have space for one more token; return the preempted slots."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return the decoder's counters of the last rollout for the log."""
        ...


# ---- helpers of the implementations ----


def kv_bytes(numbers: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of `tokens` tokens, of which each has `numbers` numbers in all layers."""
    return numbers * tokens * dtype.itemsize


def check_kv_bytes(given: int, least: int, what: str) -> None:
    """Raise ValueError if `given` bytes are fewer than the `least` bytes that the keys and values of `what` need."""
    if given < least:
        raise ValueError(
            f"kv_bytes: got {given}, expected at least {least}, the keys and values of {what} "
            "(rollout.max_prompt_tokens + rollout.max_response_tokens)"
        )


def prompt_width(length: int) -> int:
    """Return the padded width of a prompt of `length` tokens; beyond 32 tokens the padding is less than half of `length`."""
    step = MIN_ROWS
    while step * 4 < length:
        step *= 2
    return -(-length // step) * step


def read_columns(longest: int, columns: int) -> int:
    """Return the columns that attention reads in a step whose longest sequence has `longest` of at most `columns` tokens."""
    return min(columns, -(-longest // _BLOCK) * _BLOCK)


def check_attention(name: str | None) -> None:
    """Raise ValueError for an attention implementation that no decoder supports."""
    if name not in _ATTENTION:
        raise ValueError(f"policy: got attention {name!r}, expected one of {', '.join(map(repr, _ATTENTION))}")


def attention_kinds(policy: LanguageModel, columns: int) -> list[str]:
    """Return the kinds of attention layers, each of which needs its mask, for sequences of at most `columns` tokens.

    Raises:
        ValueError: for an attention implementation or a kind of layer that no decoder supports.
    """
    model, text = policy.model, policy.model.config.get_text_config()
    check_attention(text._attn_implementation)
    default = "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"
    kinds = sorted(set(getattr(text, "layer_types", None) or [default]))
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if getattr(model, "_is_stateful", False):
        unknown.append("a recurrent state")
    if getattr(text, "alibi", False) or hasattr(policy.trunk, "build_alibi_tensor"):
        unknown.append("ALiBi biases computed from the padding mask")
    if "local" in (getattr(text, "attention_layers", None) or ()):
        unknown.append("local attention layers that count from the end of the cache")
    floor = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    if floor is not None and columns >= floor:
        raise ValueError(
            f"policy: {type(model).__name__} scales its queries from position {floor} (floor_scale) on by the length of its "
            f"cache, expected sequences of less than {floor} tokens; set rollout.max_prompt_tokens and "
            "rollout.max_response_tokens to less together"
        )
    if unknown:
        got = ", ".join(unknown)
        raise ValueError(
            f"policy: {type(model).__name__} has {got}, expected full, sliding-window or chunked attention: it cannot be "
            "sampled; it can be scored and fine-tuned"
        )
    return kinds


def column_masks(
    config: PreTrainedConfig,
    kinds: Sequence[str],
    positions: Tensor,  # (R,)
    width: int,
    additive: torch.dtype | None = None,
) -> Tensor | dict[str, Tensor]:  # (R, 1, 1, W)
    """Return the masks of the columns that a decode step at `positions` reads, for each kind of layer if there are several.

    They are bool, True for a column that is read, or `additive`: 0 for such a column and the lowest number for the others.
    """
    column, position = torch.arange(width, device=positions.device), positions[:, None, None, None]
    full = column <= position
    masks = {"full_attention": full}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = full & (column > position - config.sliding_window)
    if "chunked_attention" in kinds:
        size = config.attention_chunk_size
        masks["chunked_attention"] = full & (column >= position // size * size)
    if additive is not None:
        zero = torch.zeros((), dtype=additive, device=positions.device)
        masks = {kind: torch.where(mask, zero, torch.finfo(additive).min) for kind, mask in masks.items()}
    return masks if len(kinds) > 1 else masks[kinds[0]]


def sampled_outputs(policy: LanguageModel) -> tuple[Want, ...]:
    """Return the outputs of a decode step: logits, and values if the value function reads the same hidden states."""
    return ("logits", "values") if policy.value is not None and policy.value.shares_trunk else ("logits",)


def same_as(prompts: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Group prompts with equal ids; return the index of the first prompt of each group, and the group of each prompt."""
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

    There are at least `MIN_ROWS` rows; rows beyond `source` repeat that of the first prompt. Columns after a prompt's end
    repeat its last token. No real token attends to them, and their keys and values are not used. Positions stay below
    `max_position`.
    """
    device, width = policy.device, prompt_width(len(prompts[0]))
    inputs = torch.stack([torch.cat([p, p[-1:].expand(width - len(p))]) for p in prompts])
    last = torch.tensor([row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
    rows = last[torch.tensor(source + [0] * (MIN_ROWS - len(source)), device=device)]
    positions = None
    if max_position is not None and width > max_position:
        positions = torch.arange(width, device=device).clamp(max=max_position - 1).expand_as(inputs)
    return TokenBatch(input_ids=inputs, rows=rows, position_ids=positions, cache=cache)


def _change_by_rounding(policy: LanguageModel, sequence: Tensor, expected: Tensor) -> float:  # (S,), (H,)
    """Return the largest change of the last hidden state `expected` if each input embedding changes by rounding.

    Some layers amplify rounding, for example the norm of a vector that is nearly zero.
    """
    stream = torch.Generator().manual_seed(0)

    def round_differently(module: nn.Module, args: object, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=stream).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handle = input_layer(policy.model).register_forward_hook(round_differently)
    try:
        found = policy(TokenBatch(input_ids=sequence[None]), ("hidden",)).hidden
    finally:
        handle.remove()
    assert found is not None
    return float((found[-1].float() - expected.float()).abs().max())


@torch.no_grad()
def check_decoding(decoder: Decoder, policy: LanguageModel, most: int) -> None:
    """Compare two decoded sequences of different lengths with one forward pass over each.

    At most `most` sequences are compared.

    Raises:
        ValueError: if the hidden states after the last token differ by more than rounding.
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
        # Scores near a softcap c have a rounding error of c eps, which the softmax turns into a relative error, in every layer.
        softcap = getattr(policy.model.config.get_text_config(), "attn_logit_softcapping", None) or 0
        allowed = (64 + 4 * softcap) * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        difference = float((decoded[row].float() - expected.float()).abs().max())
        if not difference <= allowed:
            allowed = max(allowed, 16 * _change_by_rounding(policy, sequence, expected))
        if not difference <= allowed:
            raise ValueError(
                f"policy: the hidden states of {type(policy.model).__name__} decoded token by token differ from those of one "
                f"forward pass by {difference:.3g}, expected at most {allowed:.3g}; its attention does not read a plain 4D mask"
            )

"""The layout of prompts and responses in the tensors of a forward pass. Tokens are shifted only here.

Shapes: B sequences, S input positions, N actions.

Padded sequences start at column 0 and are padded on the right. A causal trunk then needs neither an attention mask nor
position ids, because no real token can see a pad. Packed sequences follow each other in a single row, and `cu_inputs`
holds the start of each.

The action `a_t` is chosen in the state whose last token is the one before it. Row t of the selected hidden states is
therefore column `prompt_length - 1 + t`. The last action is never an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences as the input of one forward pass, and the states of their actions."""

    input_ids: Tensor  # (B, S), int64, padded on the right; (1, sum of lengths) packed
    rows: Tensor | None = None  # (N,), int64, index of each action's state in the flattened positions; None: all
    ids: Tensor | None = None  # (N,), int64, the actions
    source: Tensor | None = None  # (N,), int64, index of each action in flattened (all sequences * T) responses
    cu_seqlens: Tensor | None = None  # (B + 1,), int32, start of each sequence's actions in N
    cu_inputs: Tensor | None = None  # (B + 1,), int32, start of each packed sequence; None: padded
    attention_mask: Tensor | Mapping[str, Tensor | None] | None = None  # (B, S), or masks prepared for transformers
    position_ids: Tensor | None = None  # (B, S); None: counted from the mask, or from column 0
    real: Tensor | None = None  # (B, S), bool, False on padding; None: no padding, or nothing reads it
    states: Tensor | None = (
        None  # (B, S, H), input of the first trained layer, where the pass begins; None: at the tokens
    )
    cache: Cache | None = None  # keys and values of earlier tokens, updated in place
    counts: bool = (
        True  # False: a pass that a rank runs only because the other ranks run one more; its results are not used
    )


def token_batch(
    prompt_ids: Tensor,  # (M, P), padded on the right
    prompt_lengths: Tensor,  # (M,), at least 1
    response_ids: Tensor,  # (M, T), padded on the right
    response_lengths: Tensor,  # (M,), at least 1
    sequences: Tensor,  # (B,), indices of the sequences to use
    *,
    packed: bool = False,
) -> TokenBatch:
    """Return the batch of `sequences`, packed or padded to the longest of them, with the state of every action."""
    device, (_, prompt_width), (_, response_width) = prompt_ids.device, prompt_ids.shape, response_ids.shape
    prompt, response = prompt_lengths[sequences], response_lengths[sequences]
    lengths = prompt + response - 1
    width = int(lengths.max())
    # Columns past a sequence's end repeat its last token, because transformers warns about pad ids.
    column = torch.minimum(torch.arange(width, device=device), lengths[:, None])
    column += (column >= prompt[:, None]) * (prompt_width - prompt)[:, None]  # skips the prompt's padding
    inputs = torch.cat([prompt_ids[sequences], response_ids[sequences]], 1).gather(1, column)
    steps = torch.arange(int(response.max()), device=device)
    taken = steps < response[:, None]  # (B, longest response)
    begins, cu_inputs = torch.arange(len(sequences), device=device) * width, None
    real = torch.arange(width, device=device) < lengths[:, None]
    if packed:
        inputs, cu_inputs = inputs[real][None], cumulated(lengths)
        begins = cu_inputs[:-1].long()
    states = (begins + prompt - 1)[:, None] + steps
    source = (sequences * response_width)[:, None] + steps
    return TokenBatch(
        input_ids=inputs,
        rows=states[taken],
        ids=response_ids.reshape(-1)[source[taken]],
        source=source[taken],
        cu_seqlens=cumulated(response),
        cu_inputs=cu_inputs,
        real=None if packed else real,
    )


def input_places(
    lengths: Tensor,  # (M,), inputs of each sequence
    sequences: Tensor,  # (B,), indices of the sequences to use
    *,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:  # (B, S) or (1, N), int64 and bool
    """Return the index of each input of `token_batch` among the inputs of all M sequences, and whether it is no padding."""
    starts, ours = lengths.cumsum(0) - lengths, lengths[sequences]
    column = torch.arange(int(ours.max()), device=lengths.device)
    places, real = starts[sequences][:, None] + torch.minimum(column, ours[:, None] - 1), column < ours[:, None]
    return (places[real][None], real[real][None]) if packed else (places, real)


def cumulated(lengths: Tensor) -> Tensor:  # (B,) -> (B + 1,), int32
    """Return the start of each sequence in their concatenation, and the end of the last one."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def token_cuts(lengths: Sequence[int], budget: int, *, packed: bool = False) -> list[int]:
    """Return the number of sequences in each micro-batch of at most `budget` tokens.

    `lengths` are sorted from long to short. Padding counts unless sequences are packed. A sequence longer than the
    budget is a micro-batch by itself, because sequences are never split.
    """
    cuts, tokens, width = [], 0, 0
    for length in lengths:
        # A padded row is as wide as the first row of its micro-batch, which is the longest.
        tokens += length if packed else width
        if not cuts or tokens > budget:
            cuts.append(0)
            tokens = width = length
        cuts[-1] += 1
    return cuts

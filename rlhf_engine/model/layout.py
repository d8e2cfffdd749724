"""The layout of prompts and responses in the tensors of a forward pass, and the one place where tokens are shifted.

B sequences, S input positions, N actions. Sequences start at column 0 and are padded on the right: a causal trunk then needs
neither an attention mask nor position ids, because no real token can see a pad. Or they are packed, one after the other
in a single row, and `cu_inputs` is where each begins. The action `a_t` is taken in the state
whose last token is the one before it, so row t of the selected hidden states is column `prompt_length - 1 + t`. The
last action is never an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Some sequences as one forward pass reads them, and the states in which their actions are taken."""

    input_ids: Tensor  # (B, S), int64, padded on the right; (1, sum of lengths) packed
    rows: Tensor | None = (
        None  # (N,), int64, into the flattened positions: the state of every action; None: all positions
    )
    ids: Tensor | None = None  # (N,), int64, the actions
    source: Tensor | None = None  # (N,), int64, into flattened (all sequences * T) response tensors
    cu_seqlens: Tensor | None = None  # (B + 1,), int32, where each sequence's actions begin in N
    cu_inputs: Tensor | None = None  # (B + 1,), int32, where each packed sequence begins; None: padded
    attention_mask: Tensor | dict[str, Tensor] | None = None  # (B, S), or prepared as transformers takes it
    position_ids: Tensor | None = None  # (B, S); None: counted from the mask, or from column 0
    cache: Cache | None = None  # keys and values of earlier tokens, updated in place


def token_batch(
    prompt_ids: Tensor,  # (M, P), padded on the right
    prompt_lengths: Tensor,  # (M,), at least 1
    response_ids: Tensor,  # (M, T), padded on the right
    response_lengths: Tensor,  # (M,), at least 1
    sequences: Tensor,  # (B,), which of the M to take
    *,
    packed: bool = False,
) -> TokenBatch:
    """Take `sequences`, packed or without padding beyond the longest of them, and find the state of every action."""
    device, (_, prompt_width), (_, response_width) = prompt_ids.device, prompt_ids.shape, response_ids.shape
    prompt, response = prompt_lengths[sequences], response_lengths[sequences]
    lengths = prompt + response - 1
    width = int(lengths.max())
    # Columns past a sequence's end repeat its last token: a pad id there would make transformers warn.
    column = torch.minimum(torch.arange(width, device=device), lengths[:, None])
    column += (column >= prompt[:, None]) * (prompt_width - prompt)[:, None]  # skips the prompt's padding
    inputs = torch.cat([prompt_ids[sequences], response_ids[sequences]], 1).gather(1, column)
    steps = torch.arange(int(response.max()), device=device)
    taken = steps < response[:, None]  # (B, longest response)
    begins, cu_inputs = torch.arange(len(sequences), device=device) * width, None
    if packed:
        real = torch.arange(width, device=device) < lengths[:, None]
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
    )


def cumulated(lengths: Tensor) -> Tensor:  # (B,) -> (B + 1,), int32
    """Where each of some sequences begins when they lie one behind the other, and where the last one ends."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def token_cuts(lengths: Sequence[int], budget: int, *, packed: bool = False) -> list[int]:
    """How many of some sequences, sorted from long to short, make each micro-batch of at most `budget` tokens.

    Padding counts where they are not packed. A sequence that is longer than the budget is a micro-batch of its own: none is
    ever split.
    """
    cuts, tokens, width = [], 0, 0
    for length in lengths:
        # A padded row is as wide as the first of its micro-batch, the longest.
        tokens += length if packed else width
        if not cuts or tokens > budget:
            cuts.append(0)
            tokens = width = length
        cuts[-1] += 1
    return cuts

"""How prompts and responses lie in the tensors of a forward pass, and the one place where tokens are shifted.

B sequences, S input positions, N actions. Sequences start at column 0 and are padded on the right: a causal trunk then needs
neither an attention mask nor position ids, because no real token can see a pad. The action `a_t` is taken in the state
whose last token is the one before it, so row t of the selected hidden states is column `prompt_length - 1 + t`. The
last action is never an input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Some sequences as one forward pass reads them, and where its actions lie."""

    input_ids: Tensor  # (B, S), int64, padded on the right
    rows: Tensor  # (N,), int64, into the flattened (B * S) hidden states: the state of every action
    ids: Tensor  # (N,), int64, the actions
    source: Tensor  # (N,), int64, into flattened (all sequences * T) response tensors
    cu_seqlens: Tensor  # (B + 1,), int32, where each sequence's actions begin in N


def token_batch(
    input_ids: Tensor,  # (M, P + T), prompts padded on the left, responses on the right
    prompt_lengths: Tensor,  # (M,)
    response_lengths: Tensor,  # (M,), at least 1
    response_width: int,  # T
    sequences: Tensor,  # (B,), which of the M to take
) -> TokenBatch:
    """Take `sequences`, without padding beyond the longest of them, and find the state of every action."""
    device = input_ids.device
    prompt, response = prompt_lengths[sequences], response_lengths[sequences]
    width = int((prompt + response).max()) - 1
    start = input_ids.shape[1] - response_width - prompt
    # Columns past a sequence's end repeat its last token: a pad id there would make transformers warn.
    last = (prompt + response - 1)[:, None]
    column = start[:, None] + torch.minimum(torch.arange(width, device=device), last)
    inputs = input_ids[sequences[:, None], column]
    steps = torch.arange(int(response.max()), device=device)
    taken = steps < response[:, None]  # (B, longest response)
    states = torch.arange(len(sequences), device=device)[:, None] * width + prompt[:, None] - 1 + steps
    source = (sequences * response_width)[:, None] + steps
    actions = input_ids[:, input_ids.shape[1] - response_width :].reshape(-1)[source[taken]]
    ends = response.cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return TokenBatch(inputs, states[taken], actions, source[taken], cu_seqlens)

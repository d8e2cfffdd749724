"""Shared code of the loops: a small recurrent language model with a value head, and a reward for one of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kernels import sample_tokens

VOCABULARY, HIDDEN, RESPONSE, BATCH = 32, 48, 12, 64
END, LIKED = 0, 7


class Policy(nn.Module):
    """A recurrent policy. The head and the value head read its states: row t is the state from which token t is sampled."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.trunk = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.value_head = nn.Linear(HIDDEN, 1)

    def states(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        before = torch.cat([torch.full_like(ids[:, :1], END), ids[:, :-1]], 1)
        return self.trunk(self.embedding(before))[0]


class Responses(NamedTuple):
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), bool: up to the end token, which counts
    scores: Tensor  # (B,)


@torch.no_grad()
def respond(policy: Policy, update: int) -> Responses:
    """Sample responses and score them by the number of their tokens that are `LIKED`."""
    ids = torch.full((BATCH, RESPONSE), END)
    sequence = torch.arange(BATCH) + update * BATCH
    for t in range(RESPONSE):
        logits = policy.head(policy.states(ids[:, : t + 1])[:, -1])
        ids[:, t] = sample_tokens(logits, seed=0, sequence=sequence, position=torch.full_like(sequence, t)).ids
    ended = (ids == END).long().cumsum(1)
    mask = (ended - (ids == END).long()) == 0
    return Responses(ids, mask, ((ids == LIKED) & mask).sum(1).float())

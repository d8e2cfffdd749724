"""Padded batches of token lists, and batches of rows with similar lengths, which need little padding.

Legend: B sequences, S tokens per row (prompt and response), P pairs.
"""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """Token ids of one prompt and one response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    context: tuple[tuple[int, int], ...] = ()
    """Ranges of `response` that are not trained: the turns of others between those of the assistant."""
    origin: tuple[int, ...] = ()
    """Prompt of the first row of the conversation; empty in that row."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class LanguageBatch:
    """A batch of rows that are padded on the right."""

    ids: Tensor
    """[B, S] int64."""
    attention_mask: Tensor
    """[B, S] bool, False on padding."""
    response_mask: Tensor
    """[B, S] bool, True on the tokens of the response, EOS included, without `Example.context`."""


@dataclass(frozen=True)
class RankedBatch:
    """The completions of several prompts, each once, and the pairs of completions that a ranking orders."""

    batch: LanguageBatch
    """All completions; B is the sum of the numbers of completions of the prompts."""
    better: Tensor
    """[P] int64, row of the preferred completion of each pair."""
    worse: Tensor
    """[P] int64, row of the other completion of each pair."""
    weights: Tensor
    """[P] float32, 1 / (pairs of its prompt * prompts), so that all prompts have the same weight."""


def pad_sequences(examples: Sequence[Example], pad_id: int) -> LanguageBatch:
    """Return a batch of prompts with their responses, padded on the right with `pad_id`."""
    width = max(len(example) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    response_mask = torch.zeros_like(attention_mask)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.prompt + example.response, dtype=torch.int64)
        attention_mask[row, : len(example)] = True
        response_mask[row, len(example.prompt) : len(example)] = True
        for start, end in example.context:
            response_mask[row, len(example.prompt) + start : len(example.prompt) + end] = False
    return LanguageBatch(ids, attention_mask, response_mask)


def rank_batch(groups: Sequence[tuple[Sequence[Example], Sequence[tuple[int, int]]]], pad_id: int) -> RankedBatch:
    """Return the batch of prompts that are given as (completions, pairs (better, worse) of completion indices)."""
    examples: list[Example] = []
    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    for completions, pairs in groups:
        better += [len(examples) + winner for winner, _ in pairs]
        worse += [len(examples) + loser for _, loser in pairs]
        weights += [1.0 / (len(pairs) * len(groups))] * len(pairs)
        examples += completions
    return RankedBatch(
        pad_sequences(examples, pad_id), torch.tensor(better), torch.tensor(worse), torch.tensor(weights)
    )


def lengths_of(rows: Sequence[Sized]) -> NDArray[np.int64]:  # (len(rows),)
    """Return the length of each row, in an array of 8 bytes per row; a list would need a pointer and an object."""
    return np.fromiter(map(len, rows), np.int64, len(rows))


def length_batches(
    lengths: Sequence[int] | NDArray[np.int64], batch_size: int, rng: Random | None = None, *, pool: int = 16
) -> Iterator[list[int]]:
    """Yield lists of the indices of `batch_size` rows with similar lengths; every index appears once.

    With `rng` the order is random: pools of `pool * batch_size` random rows are sorted by length and cut into batches, and the
    batches are shuffled. Without `rng`, rows are ordered from the shortest to the longest.
    """
    sizes, order = np.asarray(lengths), np.arange(len(lengths))
    if rng is not None:
        rng.shuffle(order)  # pyright: ignore[reportArgumentType]  # an array is shuffled in place like a list
    span = pool * batch_size if rng is not None else max(1, len(order))
    for start in range(0, len(order), span):
        chunk = order[start : start + span]
        order[start : start + span] = chunk[np.argsort(sizes[chunk], kind="stable")]
    batches = np.arange(0, len(order), batch_size)
    if rng is not None:
        rng.shuffle(batches)  # pyright: ignore[reportArgumentType]  # see above
    for at in batches:
        yield order[at : at + batch_size].tolist()

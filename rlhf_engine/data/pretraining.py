"""Pretraining text to rows of equal length: documents in a row, EOS behind each, cut where a row is full."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rlhf_engine.data.loading import read_texts
from rlhf_engine.data.records import PretrainingText
from rlhf_engine.data.tokenize import Codec

_BATCH = 1024
"""Documents that are tokenized together: enough for a tokenizer's threads, and all that exists as Python integers at a time."""


def packed_sequences(path: str | Path, codec: Codec, length: int) -> Tensor:  # (M, length), int64
    """Rows of token ids from the documents of `read_texts`; what does not fill the last row is left out.

    Raises:
        ValueError: as `read_texts`; no text for one row, named with the file.
    """
    blocks, waiting = [], torch.empty(0, dtype=torch.int64)
    for tokens in _token_blocks(read_texts(path), codec):
        waiting = torch.cat([waiting, tokens])
        full = len(waiting) - len(waiting) % length
        blocks.append(waiting[:full].view(-1, length))
        waiting = waiting[full:]
    if not any(map(len, blocks)):
        raise ValueError(f"{path}: got {len(waiting)} tokens, expected at least {length}, one sequence")
    return torch.cat(blocks)


def _token_blocks(texts: Iterator[PretrainingText], codec: Codec) -> Iterator[Tensor]:
    """The ids of `_BATCH` documents at a time, EOS behind each document."""
    while batch := [record.text for record in islice(texts, _BATCH)]:
        yield torch.tensor([token for ids in codec.encode_texts(batch) for token in (*ids, codec.eos_id)])

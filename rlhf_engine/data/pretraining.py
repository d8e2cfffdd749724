"""Pretraining text as rows of equal length on disk: documents are joined, with EOS after each, and cut into rows.

Every row begins as a prompt does, with the tokens that the tokenizer prepends to a text, such as BOS. Models that were
pretrained with BOS predict badly without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_engine.data.loading import read_texts
from rlhf_engine.data.records import PretrainingText
from rlhf_engine.data.store import mapped
from rlhf_engine.data.tokenize import Codec

_BATCH, _CHARACTERS = 1024, 2**22
"""Maximum documents and characters that are tokenized together: enough to use the threads of a tokenizer, and few
enough that their token ids fit into memory as Python integers."""


def token_rows(path: str | Path, codec: Codec, length: int, near: str | Path) -> Tensor:  # (M, length), int32
    """Return rows of token ids of the documents of `read_texts`; tokens that do not fill the last row are dropped.

    The rows are a memory map of a temporary file on the disk of `near`.

    Raises:
        ValueError: as `read_texts`; or the file has too little text for one row.
    """
    tokens = torch.from_numpy(mapped(_rows(_token_blocks(read_texts(path), codec), codec.prefix, length), near))
    if len(tokens) < length:
        raise ValueError(f"{path}: got {len(tokens)} tokens, expected at least {length}, one sequence")
    return tokens[: len(tokens) - len(tokens) % length].view(-1, length)


def _rows(blocks: Iterator[NDArray[np.int32]], prefix: tuple[int, ...], length: int) -> Iterator[NDArray[np.int32]]:
    """Yield the tokens of `blocks` with `prefix` at the start of every row of `length` tokens, unless it is there."""
    if not prefix:
        yield from blocks
        return
    start, rest = np.array(prefix, np.int32), np.empty(0, np.int32)
    for block in blocks:
        rest, at, rows = np.concatenate([rest, block]), 0, []
        while len(rest) - at >= length:
            begins = np.array_equal(rest[at : at + len(start)], start)
            size = length if begins else length - len(start)
            rows += [rest[at : at + size]] if begins else [start, rest[at : at + size]]
            at += size
        rest = rest[at:]
        yield np.concatenate(rows) if rows else rest[:0]
    yield rest if np.array_equal(rest[: len(start)], start) else np.concatenate([start, rest])[:length]


def _token_blocks(texts: Iterator[PretrainingText], codec: Codec) -> Iterator[NDArray[np.int32]]:
    """Yield the token ids of one batch of documents at a time."""
    for batch in _batches(texts):
        yield np.array([token for ids in codec.encode_documents(batch) for token in ids], np.int32)


def _batches(texts: Iterator[PretrainingText]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for record in texts:
        batch.append(record.text)
        characters += len(record.text)
        if len(batch) == _BATCH or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

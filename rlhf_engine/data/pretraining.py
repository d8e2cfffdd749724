"""Pretraining text to rows of equal length: documents in a row, EOS behind each, cut where a row is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_engine.data.loading import read_texts
from rlhf_engine.data.records import PretrainingText
from rlhf_engine.data.tokenize import Codec


def packed_sequences(path: str | Path, codec: Codec, length: int) -> Iterator[tuple[int, ...]]:
    """Rows of `length` token ids from the documents of `read_texts`; what does not fill the last row is left out.

    Raises:
        ValueError: as `read_texts`; no text for one row, named with the file.
    """
    return _pack(Path(path), read_texts(path), codec, length)


def _pack(path: Path, texts: Iterator[PretrainingText], codec: Codec, length: int) -> Iterator[tuple[int, ...]]:
    waiting: list[int] = []
    rows = 0
    for record in texts:
        waiting += [*codec.tokenizer(record.text, add_special_tokens=False)["input_ids"], codec.eos_id]
        full = len(waiting) - len(waiting) % length
        for start in range(0, full, length):
            rows += 1
            yield tuple(waiting[start : start + length])
        del waiting[:full]
    if not rows:
        raise ValueError(f"{path}: got {len(waiting)} tokens, expected at least {length}, one sequence")

"""Rows of a data set, one at a time, from a JSONL, CSV or Parquet file, or a folder that `save_to_disk` of `datasets` wrote.

Rows are numbered from 1: by the line of a file (blank lines are counted, but not yielded) or the row of a folder. Earlier rows
are not kept, so that memory does not grow with the data.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_engine.data.tables import TABLES, Row
from rlhf_engine.files import parse_json

_GZIP = b"\x1f\x8b"


def read_rows(path: str | Path) -> Iterator[Row]:
    """Return an iterator over the rows of a file or of a data set's folder; a file is JSONL unless its name is in `TABLES`.

    Raises:
        ValueError: the path does not exist, a folder contains no data set or several, or a package that reads it is missing.
    """
    # Not a generator, so that a missing file is reported by this call and not by the first `next`.
    path = Path(path)
    if path.is_dir():
        return _dataset_rows(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return TABLES.get(path.suffix.lower(), _json_rows)(path)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        rows = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for index, (number, line) in enumerate(rows):
            if index == 0 and line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                yield number, ValueError("the file is one JSON array; write one object per line")
            else:
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line, _object)
    except ValueError as error:  # also for bytes that are not UTF-8 and integers with too many digits
        if line.startswith(_GZIP):
            return ValueError("the file is compressed with gzip; decompress it to text with one JSON object per line")
        # The parser's own line and column are those within the line.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        return ValueError(f"not valid JSON: {reason}; expected one object per line")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} appears twice; remove one")
    return found


def _dataset_rows(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise ValueError(
            f"{folder}: contains several data sets; give one of {', '.join(str(folder / p) for p in parts)}"
        )
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"{folder}: a folder without state.json is not a data set; give a JSONL file or a folder written by save_to_disk"
        )
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(
            f"{folder}: reading a data set's folder needs `pip install datasets`; or give a JSONL file"
        ) from None
    try:
        # The arrow files are memory-mapped, so that the operating system can free pages that were read.
        dataset: Any = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a complete data set: {error}") from None
    # A field that is absent from a row is null in a data set's folder.
    return (
        (number, {name: value for name, value in row.items() if value is not None})
        for number, row in enumerate(dataset, start=1)
    )

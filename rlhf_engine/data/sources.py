"""Rows of a data set, one at a time: JSONL files, and folders that `save_to_disk` of Hugging Face `datasets` wrote.

A row comes with its number, from 1: the line of a file (blank lines count and are skipped) or the row of a folder.
Nothing of the rows before is kept, so memory does not grow with the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[int, Any]
"""A number and what stands there; a ValueError that says what is wrong with it where it cannot be read."""

_GZIP = b"\x1f\x8b"


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a JSONL file or of a data set's folder.

    Raises:
        ValueError: nothing there, a folder that holds no data set or several, or `datasets` is not installed.
    """
    # Not a generator itself, so that a missing file is reported by the call and not by the first `next`.
    path = Path(path)
    if path.is_dir():
        return _dataset_rows(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except ValueError as error:  # bytes that are not UTF-8 and integers of too many digits among them
        if line.startswith(_GZIP):
            return ValueError("got a file that gzip compressed, expected text, an object of JSON a line")
        return ValueError(f"not valid JSON: {error}; expected an object a line")
    except RecursionError:
        return ValueError("not valid JSON: nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"got the field {twice!r} twice")
    return made


def _dataset_rows(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise ValueError(
            f"{folder}: got several data sets, expected one of {', '.join(str(folder / p) for p in parts)}"
        )
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder}: got a folder without state.json, expected a JSONL file or a data set's folder")
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(
            f"{folder}: reading a data set's folder needs `pip install datasets`; JSONL does not"
        ) from None
    try:
        # The arrow files are mapped, not loaded: pages that were read are the operating system's to take back.
        dataset: Any = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a whole data set: {error}") from None
    # A column that a row does not fill is null there, where a line of JSON would leave the field out.
    return (
        (number, {name: value for name, value in row.items() if value is not None})
        for number, row in enumerate(dataset, start=1)
    )

"""Rows of CSV, TSV and Parquet files. A cell that is empty or null is an absent column.

A cell of CSV is text. Lists, such as the messages of a conversation, are JSON in a cell.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_engine.files import parse_json

Row = tuple[int, Any]
"""A number and the content of the row, or a ValueError that describes why the row cannot be read."""

_LISTS = ("messages", "conversations", "completions", "history", "preferred_output", "non_preferred_output")
"""Columns that are lists in every format."""
_LONGEST_CELL = 2**27
"""Characters of a cell; the limit of the standard library is 131,072."""
_BATCH = 256
"""Rows of a Parquet file that are converted to Python objects at a time."""


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file whose first line names the columns, by the line on which they begin."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            names = next(reader, [])
            yield from _header_errors(names)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield line, _csv_row(names, cells)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            yield line, ValueError(f"not valid UTF-8: {error}; convert the file to UTF-8")
        except csv.Error as error:
            yield line, ValueError(f"not valid CSV: {error}")


def _header_errors(names: list[str]) -> Iterator[Row]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        yield 1, ValueError(f"the column {twice!r} appears twice; remove one")


def _csv_row(names: list[str], cells: list[str]) -> dict[str, Any] | ValueError:
    if len(cells) != len(names):
        return ValueError(f"got {len(cells)} cells, expected {len(names)}, as in the first line: {', '.join(names)}")
    try:
        return {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if text != ""}
    except ValueError as error:
        return error


def _cell(name: str, text: str) -> Any:
    """Return the value of a cell: JSON where a format has no text."""
    if name in _LISTS:
        try:
            return parse_json(text)
        except ValueError as error:
            raise ValueError(f"{name}: not valid JSON: {error}; expected a list, as JSON") from None
    if name == "label" and text.strip().lower() in ("true", "false", "1", "0"):
        return text.strip().lower() in ("true", "1")
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    # A prompt or a response may be a text that is valid JSON; messages and ranks are recognized by their form.
    try:
        value = parse_json(text)
    except ValueError:
        return text
    ranks = name == "ranking" and isinstance(value, list)
    return value if ranks or _is_messages(value) or (isinstance(value, dict) and "messages" in value) else text


def _is_messages(value: object) -> bool:
    parts = [value] if isinstance(value, dict) else value
    return isinstance(parts, list) and bool(parts) and all(_is_message(part) for part in parts)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def parquet_rows(path: Path) -> Iterator[Row]:
    """Return an iterator over the rows of a Parquet file.

    Raises:
        ValueError: it is not a Parquet file, or `pyarrow` is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow; pip install 'rlhf-kernels[datasets]', or give a JSONL file"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a complete Parquet file: {error}") from None
    return _parquet_rows(path, file, pyarrow.ArrowException)


def _parquet_rows(path: Path, file: Any, failure: type[Exception]) -> Iterator[Row]:
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (failure, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: not a complete Parquet file: {error}") from None


TABLES: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": lambda path: csv_rows(path, ","),
    ".tsv": lambda path: csv_rows(path, "\t"),
    ".parquet": parquet_rows,
}
"""Ending of a file's name -> reader of its rows."""

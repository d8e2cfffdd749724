"""Readers of data files and folders: they yield records one at a time and report errors with file and line."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_engine.data.formats import Columns, comparison, demonstration, pretraining_text, prompt_record
from rlhf_engine.data.recognise import (
    COMPARISONS,
    DEMONSTRATIONS,
    FORMATS,
    OURS,
    PRETRAINING,
    PROMPTS,
    check_format,
    in_format,
)
from rlhf_engine.data.records import Comparison, Demonstration, PretrainingText, PromptRecord, check_split
from rlhf_engine.data.sources import read_rows
from rlhf_engine.data.tables import TABLES

Record = TypeVar("Record")
OnBad = Callable[[ValueError], None]

_FIELDS = {
    DEMONSTRATIONS: ("prompt", "response"),
    COMPARISONS: ("prompt", "completions", "ranking"),
    PROMPTS: ("prompt",),
    PRETRAINING: ("text",),
}
"""Columns of our format of each kind, for errors."""
_LONGEST = 2**20
"""Maximum characters of a document in a text file, and bytes of a line, in memory; longer ones are yielded in parts."""


class Reading(Iterator[Record], Generic[Record]):
    """The records of a file, one at a time, and the names of the columns that no record has used so far.

    `make` returns the record of a row of `kind`, or None to leave the row out, and the columns that it did not read. A row with
    such a column is invalid unless its name is in `allow`, or `allow` is None. The format of a row is recognized by its
    columns, or is `form` (`data.recognise`). With `on_bad`, invalid rows are skipped, and `on_bad` is called with the error.

    Raises:
        ValueError: no such file or format, or an invalid row, named as `file:line`.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        make: Callable[[Columns, int], tuple[Record | None, Columns]],
        *,
        form: str | None = None,
        allow: Collection[str] | None = None,
        on_bad: OnBad | None = None,
        keep: Callable[[Record], bool] = lambda record: True,
    ) -> None:
        check_format(kind, form)
        self.path, self.columns, self.left_out = Path(path), dict[str, None](), 0
        self.formats = Counter[str]()
        """Number of rows by the name of their format, for those of other tools."""
        self._rows, self._kind, self._make, self._form = read_rows(path), kind, make, form
        self._allow, self._on_bad, self._keep = allow, on_bad, keep

    def __next__(self) -> Record:
        for number, given in self._rows:
            try:
                record = self._record(given, number)
            except ValueError as error:
                named = ValueError(f"{self.path}:{number}: {error}")
                if self._on_bad is None:
                    raise named from None
                self._on_bad(named)
                continue
            if record is None:
                self.left_out += 1
            elif self._keep(record):
                return record
        raise StopIteration

    def notes(self, read: Collection[str] = ()) -> list[str]:
        """Return lines about the formats, the columns that are ignored, which are those not in `read`, and rows left out."""
        ignored = [name for name in self.columns if name not in read]
        found = [
            f"{self.path}: {count:,} rows in the format {name} ({FORMATS[self._kind][name].title})"
            for name, count in self.formats.items()
        ]
        found += [f"{self.path}: ignored columns: {', '.join(ignored)}"] if ignored else []
        return found + [f"{self.path}: left out {self.left_out:,} responses with label false"] * bool(self.left_out)

    def _record(self, given: Any, number: int) -> Record | None:
        if isinstance(given, ValueError):
            raise given
        if not isinstance(given, dict):
            raise ValueError(f"got {type(given).__name__}, expected an object with {', '.join(_FIELDS[self._kind])}")
        filled = {name: value for name, value in given.items() if value is not None}
        try:
            row, form = in_format(self._kind, filled, self._form)
            record, rest = self._make(row, number)
        except ValueError as error:
            nulls = [name for name in given if name not in filled]
            raise ValueError(f"{error} (null: {', '.join(nulls)})" if nulls else str(error)) from None
        for name in (name for name in filled if name in rest or name not in row):
            if self._allow is not None and name not in self._allow:
                raise ValueError(f"unknown field {name!r}; remove it, or set data.unknown_columns to 'ignore'")
            self.columns[name] = None
        if form not in (None, OURS):
            self.formats[form] += 1
        return record


def read_demonstrations(
    path: str | Path, *, allow: Collection[str] | None = None, form: str | None = None
) -> Reading[Demonstration]:
    """Read lines such as `{"prompt": "...", "response": "..."}`, a table or a data set's folder with these columns.

    Conversations and the formats of other tools are recognized by their columns, or `form` names the format
    (`data.recognise`). Further columns are ignored, unless `allow` is given and does not list them.

    Raises:
        ValueError: no such file, or an invalid line, named as `file:line`.
    """
    return Reading(path, DEMONSTRATIONS, demonstration, allow=allow, form=form)


def read_comparisons(
    path: str | Path, *, allow: Collection[str] | None = None, form: str | None = None
) -> Reading[Comparison]:
    """Read lines such as `{"prompt": "...", "completions": ["...", ...], "ranking": "D > C > A = B"}`, or with a pair.

    A pair has the fields `chosen` and `rejected`. Files, formats and errors are as in `read_demonstrations`.
    """
    return Reading(path, COMPARISONS, comparison, allow=allow, form=form)


def read_prompts(
    path: str | Path,
    split: str | None = None,
    on_bad: OnBad | None = None,
    *,
    allow: Collection[str] | None = None,
    form: str | None = None,
) -> Reading[PromptRecord]:
    """Read lines such as `{"prompt": "...", "user_id": "...", "split": "test"}`, optionally only those of one `split`.

    Each record has the further columns of its line. With `on_bad`, an invalid line is skipped, and `on_bad` is called with the
    error instead of raising it. Files, formats and errors are as in `read_demonstrations`.
    """
    if split is not None:
        check_split(split)
    return Reading(
        path,
        PROMPTS,
        prompt_record,
        allow=allow,
        form=form,
        on_bad=on_bad,
        keep=lambda record: split is None or record.split == split,
    )


def read_texts(path: str | Path, *, allow: Collection[str] | None = None) -> Iterator[PretrainingText]:
    """Yield documents of a text file with blank lines between them, or the field `text` of JSONL, a table or a folder.

    A text file without blank lines is not read as a whole: a document of more than 2^20 characters is split at the end of a
    line, or within a line of more than 2^20 bytes, and each part is yielded as a document. `allow` is as in
    `read_demonstrations`.

    Raises:
        ValueError: no such file, or an invalid line, named as `file:line`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in (".jsonl", ".json", *TABLES):
        return Reading(path, PRETRAINING, pretraining_text, allow=allow)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _documents(path)


def _documents(path: Path) -> Iterator[PretrainingText]:
    first, pieces, length = 0, [], 0
    for number, piece, whole in _pieces(path):
        blank = whole and not piece.strip()
        if not blank:
            first = first or number
            pieces.append(piece)
            length += len(piece)
        if blank or length >= _LONGEST:
            yield from _document(pieces, first)
            first, pieces, length = 0, [], 0
    yield from _document(pieces, first)


def _document(pieces: list[str], first: int) -> Iterator[PretrainingText]:
    """Yield the document, or nothing if it is blank, such as the line break of a line that was yielded in parts."""
    text = "".join(pieces).rstrip("\r\n")
    if text.strip():
        yield PretrainingText(text, line=first)


def _pieces(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number, text, whether it is a whole line) of a text file; a very long line is yielded in several pieces."""
    # "utf-8-sig" drops a byte order mark at the start of the file.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        number, starts, raw = 1, True, file.readline(_LONGEST)
        while raw:
            after = file.readline(_LONGEST)
            try:
                text = decoder.decode(raw, final=not after)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid UTF-8: {error}") from None
            ends = raw.endswith(b"\n")
            yield number, text, starts and (ends or not after)
            number, starts, raw = number + ends, ends, after

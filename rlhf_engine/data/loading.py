"""Readers of data files and folders: they yield records one at a time and report errors with file and line."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf_engine.data.records import (
    Comparison,
    Demonstration,
    PretrainingText,
    PromptRecord,
    check_split,
    parse_messages,
    parse_ranking,
)
from rlhf_engine.data.sources import Row, read_rows

Record = TypeVar("Record")
OnBad = Callable[[ValueError], None]

_LONGEST = 2**20
"""Maximum characters of a document in a text file, and bytes of a line, in memory; longer ones are yielded in parts."""


def read_demonstrations(path: str | Path) -> Iterator[Demonstration]:
    """Yield the records of lines such as `{"prompt": "...", "response": "..."}`, or of a data set's folder with these columns.

    `"messages": [{"role": "user", "content": "..."}, ...]` may replace the prompt. It may also replace the response if the last
    message is the assistant's.

    Raises:
        ValueError: no such file, or an invalid line, named as `file:line`.
    """
    return _read(path, ("prompt", "response"), (), lambda given, line: Demonstration(**given, line=line))


def read_comparisons(path: str | Path) -> Iterator[Comparison]:
    """Yield the records of lines such as `{"prompt": "...", "completions": ["...", ...], "ranking": "D > C > A = B"}`.

    `messages` may replace the prompt, and a data set's folder with these columns the file.

    Raises:
        ValueError: no such file, or an invalid line, named as `file:line`.
    """
    return _read(path, ("prompt", "completions", "ranking"), (), _comparison)


def read_prompts(path: str | Path, split: str | None = None, on_bad: OnBad | None = None) -> Iterator[PromptRecord]:
    """Yield the records of lines such as `{"prompt": "...", "user_id": "...", "split": "test"}`, optionally of one `split`.

    `messages` may replace the prompt, and a data set's folder with these columns the file. With `on_bad`, an invalid line is
    skipped, and `on_bad` is called with the error instead of raising it.

    Raises:
        ValueError: no such split, no such file, or an invalid line, named as `file:line`.
    """
    if split is not None:
        check_split(split)
    records = _read(
        path, ("prompt", "user_id"), ("split",), lambda given, line: PromptRecord(**given, line=line), on_bad
    )
    return (record for record in records if split is None or record.split == split)


def read_texts(path: str | Path) -> Iterator[PretrainingText]:
    """Yield documents of a text file with blank lines between them, of JSONL with a field `text`, or of a data set's folder.

    A text file without blank lines is not read as a whole: a document of more than 2^20 characters is split at the end of a
    line, or within a line of more than 2^20 bytes, and each part is yielded as a document.

    Raises:
        ValueError: no such file, or an invalid line, named as `file:line`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".jsonl", ".json"):
        return _read(path, ("text",), (), lambda given, line: PretrainingText(**given, line=line))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _documents(path)


def _comparison(given: dict[str, Any], line: int) -> Comparison:
    completions = given["completions"]
    if not isinstance(completions, list):
        raise ValueError(f"completions: got {type(completions).__name__}, expected a list of strings")
    if len(completions) < 2:
        raise ValueError(f"completions: got {len(completions)}, expected at least 2 to compare")
    ranks = parse_ranking(given["ranking"], len(completions))
    return Comparison(given["prompt"], tuple(completions), ranks, line=line)


def _read(
    path: str | Path,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    make: Callable[[dict[str, Any], int], Record],
    on_bad: OnBad | None = None,
) -> Iterator[Record]:
    # Not a generator, so that a missing file is reported by this call and not by the first `next`.
    return _records(Path(path), read_rows(path), required, optional, make, on_bad)


def _records(
    path: Path,
    rows: Iterator[Row],
    required: tuple[str, ...],
    optional: tuple[str, ...],
    make: Callable[[dict[str, Any], int], Record],
    on_bad: OnBad | None,
) -> Iterator[Record]:
    for number, given in rows:
        try:
            record = make(_fields(given, required, optional), number)
        except ValueError as error:
            named = ValueError(f"{path}:{number}: {error}")
            if on_bad is None:
                raise named from None
            on_bad(named)
        else:
            yield record


def _fields(given: object, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(given, ValueError):
        raise given
    if not isinstance(given, dict):
        raise ValueError(f"got {type(given).__name__}, expected an object with {', '.join(required)}")
    if "messages" in given and "prompt" in required:
        given = _with_prompt(given, "response" in required)
    for name in required:
        if name not in given:
            raise ValueError(f"no field {name!r}, expected {', '.join(required)}")
    unknown = [name for name in given if name not in required + optional]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}, expected {', '.join(required + optional)}")
    return given


def _with_prompt(given: dict[str, Any], answered: bool) -> dict[str, Any]:
    """Return the row with its messages as the prompt, and the last as the response if `answered` and the row has none."""
    if "prompt" in given:
        raise ValueError("the fields prompt and messages exclude each other; remove one")
    messages = parse_messages(given["messages"])
    others = {name: value for name, value in given.items() if name != "messages"}
    if answered and "response" not in given:
        if messages[-1].role != "assistant":
            raise ValueError(
                f"messages: got {messages[-1].role!r} as the last role, expected 'assistant', as there is no response"
            )
        return {"prompt": messages[:-1], "response": messages[-1].content, **others}
    return {"prompt": messages, **others}


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

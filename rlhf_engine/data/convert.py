"""Conversion of a data file in any format to ours, for `rlhf data convert`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_engine.data.loading import read_comparisons, read_demonstrations, read_prompts, read_texts
from rlhf_engine.data.recognise import (
    COMPARISONS,
    DEMONSTRATIONS,
    FORMATS,
    KINDS,
    PRETRAINING,
    PROMPTS,
    check_format,
    kind_of,
)
from rlhf_engine.data.records import Comparison, Demonstration, Prompt, PromptRecord, prompt_field
from rlhf_engine.data.sources import read_rows
from rlhf_engine.files import with_new_file
from rlhf_engine.notices import notice


def convert(source: Path, output: Path, *, kind: str | None = None, form: str | None = None) -> tuple[str, int]:
    """Write the records of `source` to the JSONL file `output` in our format; return their kind and number.

    The kind and the format are recognized by the columns of the first row, if they are not given. Columns that are no part of
    the format are left out and listed in a notice, except those of prompts, which a reward function can read.

    Raises:
        ValueError: an unknown kind or format, columns that fit two formats or none, an invalid row (named as `file:line`), or
            no records. `output` is not written then.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if output.suffix != ".jsonl":
        raise ValueError(
            f"{output}: got a name that ends in {output.suffix!r}, expected '.jsonl', which is what is written"
        )
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"{output}: is the file that is read; give a different name")
    kind = kind or _kind(source, form)
    check_format(kind, form)
    count = 0

    def write(new: Path) -> None:
        nonlocal count
        with new.open("w", encoding="utf-8") as file:
            for line in _lines(kind, source, form):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise ValueError(f"{source}: contains no {kind}; give a file with at least one record")

    with_new_file(output, write)
    return kind, count


def _kind(source: Path, form: str | None) -> str:
    """Return the kind of the records of a file by its first row."""
    every = {name for formats in FORMATS.values() for name in formats}
    if form is not None and form not in every:
        raise ValueError(f"--format: got {form!r}, expected one of {', '.join(sorted(every))}")
    if source.suffix.lower() == ".txt":
        return PRETRAINING
    for number, row in read_rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"got {type(row).__name__}, expected an object")
            return kind_of([name for name, value in row.items() if value is not None], form)
        except ValueError as error:
            raise ValueError(f"{source}:{number}: {error}") from None
    raise ValueError(f"{source}: contains no rows; give a file with at least one record")


def _lines(kind: str, source: Path, form: str | None) -> Iterator[dict[str, Any]]:
    """Yield the lines of our format, then log the formats and the columns that are left out."""
    if kind == PRETRAINING:
        yield from ({"text": text.text} for text in read_texts(source))
        return
    if kind == PROMPTS:
        prompts = read_prompts(source, form=form)
        yield from map(_prompt_line, prompts)
        notice(*prompts.notes(read=prompts.columns))
        return
    readers = {DEMONSTRATIONS: read_demonstrations, COMPARISONS: read_comparisons}
    reading = readers[kind](source, form=form)
    for record in reading:
        yield _line(record)
    notice(*reading.notes())


def _line(record: Demonstration | Comparison) -> dict[str, Any]:
    if isinstance(record, Demonstration):
        return {**_weighted(record.prompt), "response": record.response}
    return {**prompt_field(record.prompt), "completions": list(record.completions), "ranking": list(record.ranks)}


def _weighted(prompt: Prompt) -> dict[str, Any]:
    """Return the field of a prompt, with weight 0 for the messages that are not trained."""
    if isinstance(prompt, str):
        return prompt_field(prompt)
    return {"messages": [turn.plain() | ({} if turn.trained else {"weight": 0}) for turn in prompt]}


def _prompt_line(record: PromptRecord) -> dict[str, Any]:
    line = {**record.columns, **prompt_field(record.prompt)}
    if record.user_id is not None:
        line["user_id"] = record.user_id
    return line if record.split == "train" else line | {"split": record.split}

"""JSONL files to records, a line at a time; whatever is wrong is said with its file and line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf_engine.data.records import Comparison, Demonstration, PromptRecord, parse_ranking

Record = TypeVar("Record")


def read_demonstrations(path: str | Path) -> Iterator[Demonstration]:
    """Records of lines such as `{"prompt": "...", "response": "..."}`.

    Raises:
        ValueError: no such file, or a bad line, named as `file:line`.
    """
    return _read(Path(path), ("prompt", "response"), (), lambda given, line: Demonstration(**given, line=line))


def read_comparisons(path: str | Path) -> Iterator[Comparison]:
    """Records of lines such as `{"prompt": "...", "completions": ["...", ...], "ranking": "D > C > A = B"}`.

    Raises:
        ValueError: no such file, or a bad line, named as `file:line`.
    """
    return _read(Path(path), ("prompt", "completions", "ranking"), (), _comparison)


def read_prompts(path: str | Path, split: str | None = None) -> Iterator[PromptRecord]:
    """Records of lines such as `{"prompt": "...", "user_id": "...", "split": "test"}`; `split` keeps one split only.

    Raises:
        ValueError: no such file, or a bad line, named as `file:line`.
    """
    records = _read(Path(path), ("prompt", "user_id"), ("split",), lambda given, line: PromptRecord(**given, line=line))
    return (record for record in records if split is None or record.split == split)


def _comparison(given: dict[str, Any], line: int) -> Comparison:
    completions = given["completions"]
    if not isinstance(completions, list):
        raise ValueError(f"completions: got {type(completions).__name__}, expected a list of strings")
    ranks = parse_ranking(given["ranking"], len(completions))
    return Comparison(given["prompt"], tuple(completions), ranks, line=line)


def _read(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], make: Callable[[dict[str, Any], int], Record]
) -> Iterator[Record]:
    # Not a generator itself, so that a missing file is reported by the call and not by the first `next`.
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _records(path, required, optional, make)


def _records(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], make: Callable[[dict[str, Any], int], Record]
) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = make(_fields(line, required, optional), number)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            yield record


def _fields(line: bytes, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"got {type(given).__name__}, expected an object with {', '.join(required)}")
    for name in required:
        if name not in given:
            raise ValueError(f"no field {name!r}, expected {', '.join(required)}")
    unknown = [name for name in given if name not in required + optional]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}, expected {', '.join(required + optional)}")
    return given

"""Files of answer pairs for people, or an external program, to judge. They do not show which model wrote which answer.

A line is `{"id": 3, "prompt": ..., "A": ..., "B": ..., "preference": null}`. A judge replaces null by "A", "B" or "tie". Which
model is A is drawn at random for each pair, from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.data.records import Prompt, prompt_field
from rlhf_engine.data.sources import read_rows
from rlhf_engine.files import with_new_file

_PREFERENCES = ("A", "B", "tie")


@dataclass(frozen=True)
class Pair:
    """A prompt and two models' answers to it."""

    prompt: Prompt
    first: str
    second: str


def write_pairs(path: Path, pairs: Sequence[Pair], seed: int) -> None:
    """Write the file of pairs to be judged, which is complete or absent."""
    lines = [
        json.dumps(_line(index, pair, seed) | {"preference": None}, ensure_ascii=False) + "\n"
        for index, pair in enumerate(pairs)
    ]
    with_new_file(path, lambda new: new.write_text("".join(lines), encoding="utf-8"))


def read_preferences(path: Path, pairs: Sequence[Pair], seed: int) -> Tensor:
    """Return preferences, (M,) float64 in the order of `pairs`: 1 for the first answer, 0 for the second, 1/2 for a tie.

    Lines may be in any order.

    Raises:
        ValueError: a line differs from the written one, is not judged or is judged twice (named as `file:line`), or a pair
            is missing.
    """
    found: dict[int, float] = {}
    for number, given in read_rows(path):
        try:
            index, preference = _judged(given, pairs, seed)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if index in found:
            raise ValueError(f"{path}:{number}: got id {index} a second time, expected every pair once")
        found[index] = preference
    missing = [index for index in range(len(pairs)) if index not in found]
    if missing:
        raise ValueError(f"{path}: id {missing[0]} is missing ({len(missing)} missing in all)")
    return torch.tensor([found[index] for index in range(len(pairs))], dtype=torch.float64)


def _judged(given: Any, pairs: Sequence[Pair], seed: int) -> tuple[int, float]:
    """Return the index of a judged line's pair and the preference for its first answer."""
    if isinstance(given, ValueError):
        raise given
    index = given.get("id") if isinstance(given, dict) else None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(pairs):
        raise ValueError(f"id: got {index!r}, expected one of 0 to {len(pairs) - 1}")
    for name, written in _line(index, pairs[index], seed).items():
        if given.get(name) != written:
            raise ValueError(f"{name}: got {given.get(name)!r}, expected {written!r}, as it was written for id {index}")
    answer = given.get("preference")
    if answer not in _PREFERENCES:
        raise ValueError(f"preference: got {answer!r}, expected 'A', 'B' or 'tie'")
    if answer == "tie":
        return index, 0.5
    return index, float((answer == "A") != _swapped(index, seed))


def _line(index: int, pair: Pair, seed: int) -> dict[str, Any]:
    a, b = (pair.second, pair.first) if _swapped(index, seed) else (pair.first, pair.second)
    return {"id": index, **prompt_field(pair.prompt), "A": a, "B": b}


def _swapped(index: int, seed: int) -> bool:
    return Random(f"{seed} {index}").random() < 0.5

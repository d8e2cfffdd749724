"""Encoded records on disk: numbers in a temporary file that is mapped into memory, any record of them made when asked for.

What stays in memory is 8 bytes a record, where it ends; pages of the file that were read are the operating system's to take
back. The file has no name, so that nothing is left of it after a crash either.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_engine.data.batching import Example

Made = TypeVar("Made")


@dataclass(frozen=True)
class RecordCodec(Generic[Made]):
    """How a record becomes numbers and a record again."""

    encode: Callable[[Made], Sequence[int]]
    """Numbers that fit 32 bits."""
    decode: Callable[[NDArray[np.int32]], Made]
    """The record of these numbers."""


def _example(row: NDArray[np.int32]) -> Example:
    count, *ids = row.tolist()
    return Example(tuple(ids[:count]), tuple(ids[count:]))


EXAMPLES: RecordCodec[Example] = RecordCodec(
    lambda example: (len(example.prompt), *example.prompt, *example.response), _example
)
"""Prompts with their responses."""


class Records(Sequence[Made]):
    """A sequence that makes its records when they are asked for."""

    def __getitem__(self, index: Any) -> Any:
        """One record of an integer, a list of a slice."""
        place = range(len(self))[index]
        return self.record(place) if isinstance(place, int) else [self.record(number) for number in place]

    def record(self, number: int) -> Made:
        """Record `number`, from 0."""
        raise NotImplementedError


class Stored(Records[Made]):
    """Records in a file; record i is made of `numbers[ends[i - 1]:ends[i]]`."""

    def __init__(
        self,
        numbers: NDArray[np.int32],  # (all numbers,)
        ends: NDArray[np.int64],  # (records,)
        decode: Callable[[NDArray[np.int32]], Made],
    ) -> None:
        self.numbers, self.ends, self.decode = numbers, ends, decode

    def __len__(self) -> int:
        return len(self.ends)

    def record(self, number: int) -> Made:
        """Record `number`, read from the file."""
        start = self.ends[number - 1] if number else 0
        return self.decode(self.numbers[start : self.ends[number]])


class Selection(Records[Made]):
    """Some records of `items`, in the order of their `numbers`."""

    def __init__(self, items: Sequence[Made], numbers: NDArray[np.int64]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def record(self, number: int) -> Made:
        """The record of `items` that comes as number `number`."""
        return self.items[int(self.numbers[number])]


def stored(records: Iterable[Made], codec: RecordCodec[Made], near: str | Path) -> Stored[Made]:
    """All of `records`, taken one at a time and kept in a file (see `mapped`)."""
    ends, total = array("q"), 0

    def rows() -> Iterator[NDArray[np.int32]]:
        nonlocal total
        for record in records:
            row = np.array(codec.encode(record), dtype=np.int32)
            total += len(row)
            ends.append(total)
            yield row

    numbers = mapped(rows(), near)
    return Stored(numbers, np.frombuffer(ends, dtype=np.int64), codec.decode)


def mapped(blocks: Iterable[NDArray[np.int32]], near: str | Path) -> NDArray[np.int32]:
    """The blocks' numbers in a row, as a map of a file on the disk that `near`, which need not be there yet, will be on.

    Not in the system's folder for temporary files, which on many machines is memory.
    """
    folder = Path(near).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(block.tobytes())
        file.flush()
        # An empty file cannot be mapped.
        return np.memmap(file, dtype=np.int32) if file.tell() else np.empty(0, dtype=np.int32)

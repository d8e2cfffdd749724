"""Encoded records on disk: numbers in a memory-mapped temporary file, from which records are decoded on access.

Memory holds 8 bytes per record, the position of its end; the operating system can free pages of the file that were read. The
file has no name, so that a crash leaves no file.
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
    """Conversion of records to numbers and back."""

    encode: Callable[[Made], Sequence[int]]
    """Returns the numbers of a record; each fits into 32 bits."""
    decode: Callable[[NDArray[np.int32]], Made]
    """Returns the record of these numbers."""


def _numbers(example: Example) -> Sequence[int]:
    plain = (len(example.prompt), *example.prompt, *example.response)
    if not example.context and not example.origin:
        return plain
    # A negative count distinguishes rows of several turns.
    context = [place for span in example.context for place in span]
    return (-1 - len(context), *context, len(example.origin), *example.origin, *plain)


def _example(row: NDArray[np.int32]) -> Example:
    count, *ids = row.tolist()
    context: tuple[tuple[int, int], ...] = ()
    origin: tuple[int, ...] = ()
    if count < 0:
        size = -1 - count
        context = tuple(zip(ids[:size:2], ids[1:size:2], strict=True))
        first, ids = ids[size], ids[size + 1 :]
        origin, count, ids = tuple(ids[:first]), ids[first], ids[first + 1 :]
    return Example(tuple(ids[:count]), tuple(ids[count:]), context, origin)


EXAMPLES: RecordCodec[Example] = RecordCodec(_numbers, _example)
"""Codec of prompts with their responses."""


class Records(Sequence[Made]):
    """A sequence that creates its records on access."""

    def __getitem__(self, index: Any) -> Any:
        """Return the record of an integer index, or the list of records of a slice."""
        place = range(len(self))[index]
        return self.record(place) if isinstance(place, int) else [self.record(number) for number in place]

    def record(self, number: int) -> Made:
        """Return record `number`, counted from 0."""
        raise NotImplementedError


class Stored(Records[Made]):
    """Records in a file; record i is decoded from `numbers[ends[i - 1]:ends[i]]`."""

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
        """Return record `number`, read from the file."""
        start = self.ends[number - 1] if number else 0
        return self.decode(self.numbers[start : self.ends[number]])


class Selection(Records[Made]):
    """The records of `items` with these `numbers`, in this order."""

    def __init__(self, items: Sequence[Made], numbers: NDArray[np.int64]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def record(self, number: int) -> Made:
        """Return record `number` of the selection."""
        return self.items[int(self.numbers[number])]


def stored(records: Iterable[Made], codec: RecordCodec[Made], near: str | Path) -> Stored[Made]:
    """Encode `records` one at a time into a file and return them as a sequence (see `mapped`)."""
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
    """Return the concatenated blocks as a memory map of a temporary file on the disk of `near`, which need not exist.

    The system's folder for temporary files is not used, because on many machines it is in memory.
    """
    folder = Path(near).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(block.tobytes())
        file.flush()
        # An empty file cannot be mapped.
        return np.memmap(file, dtype=np.int32) if file.tell() else np.empty(0, dtype=np.int32)

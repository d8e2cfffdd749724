"""The boundary to other libraries: their exceptions become errors of one line, with the original as the cause."""

from __future__ import annotations

import re
from types import TracebackType

import torch

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Exceptions for a lack of memory, which is not a mistake in a file."""

_LONGEST = 300
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception is a lack of memory: torch's allocator of the CPU raises a RuntimeError for it."""
    return isinstance(error, OUT_OF_MEMORY) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


class foreign_errors:
    """A context manager that converts any exception of a library into a ValueError of one line that begins with `what`.

    The original is the cause, which `rlhf --traceback` prints. Exceptions of the types in `keep` and a lack of memory pass
    unchanged.
    """

    def __init__(self, what: str, *keep: type[BaseException]) -> None:
        self.what, self.keep = what, keep

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A panic of a library in Rust (tokenizers, safetensors) is not an Exception.
        foreign = isinstance(error, Exception) or (kind is not None and kind.__module__ == "pyo3_runtime")
        if error is not None and foreign and not isinstance(error, (*self.keep, *OUT_OF_MEMORY)):
            raise ValueError(f"{self.what}: {described(error)}") from error


def described(error: BaseException) -> str:
    """Return the type of an exception and the first two lines of its text, as one line of limited length."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""A JSONL file that is written in chunks over a long time, so that a killed run continues after its last complete chunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfileobj
from types import TracebackType
from typing import Any, Self

from rlhf_engine import files
from rlhf_engine.config.schema import shortened
from rlhf_engine.files import LOCK, FolderLock, parse_json, with_new_file

SUFFIX = ".partial"

_BEGIN, _SETTINGS = b'{"settings": ', "settings"
"""Beginning of the first line, and its key."""


class PartialFile:
    """The lines of `target` so far, in `target.partial`, whose first line has the settings on which they depend.

    `kept` is the number of lines of complete chunks that an earlier call with the same settings wrote. Use it as a context
    manager, which lets one process at a time write into the folder.

    Raises:
        ValueError: with `resume`, the earlier call had a different setting. Without it, its lines are dropped. Or the file
            `target.partial` has no settings in its first line.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], *, chunk: int, resume: bool) -> None:
        self.target, self.path = target, target.with_name(target.name + SUFFIX)
        self.settings = json.loads(json.dumps(settings))
        self.chunk, self.resume, self.kept = chunk, resume, 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(FolderLock(self.target.parent, self.path.name + LOCK))
            self.kept, size = self._earlier()
            self.file = stack.enter_context(self.path.open("r+b" if self.kept else "wb"))
            if self.kept:
                self.file.truncate(size)
                self.file.seek(size)
            else:
                self.file.write(_line({_SETTINGS: self.settings}))
            self.held = stack.pop_all()
        self.count = self.kept
        return self

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; sync the file to disk after the last line of a chunk."""
        self.file.write(_line(line))
        self.count += 1
        if self.count % self.chunk == 0:
            self.file.flush()
            files.disk.sync(self.path)

    def finish(self) -> None:
        """Write the lines to `target`, which is complete or absent, and delete the partial file."""
        self.file.flush()

        def write(new: Path) -> None:
            with self.path.open("rb") as lines, new.open("wb") as whole:
                lines.readline()
                copyfileobj(lines, whole)

        with_new_file(self.target, write)
        self.path.unlink()

    @staticmethod
    def finished(target: Path) -> bool:
        """Return whether no lines but those of `target` are in `target.partial`.

        The files that a killed call has left, `target.partial` and its lock, are then deleted.

        Raises:
            ValueError: a different process is writing `target.partial`.
        """
        path = target.with_name(target.name + SUFFIX)
        if not path.is_file() and not path.with_name(path.name + LOCK).exists():
            return True
        with FolderLock(target.parent, path.name + LOCK):
            if path.is_file():
                with path.open("rb") as lines, target.open("rb") as whole:
                    lines.readline()
                    if hashlib.file_digest(lines, "sha256").digest() != hashlib.file_digest(whole, "sha256").digest():
                        return False
                path.unlink()
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()  # before the lock is released
        if kind is not None and self.count < self.chunk:
            self.path.unlink(missing_ok=True)  # nothing to continue from
        self.held.close()

    def _earlier(self) -> tuple[int, int]:
        """Return the number of lines in complete chunks of an earlier call with the same settings, and their end in bytes."""
        if not self.path.is_file():
            return 0, 0
        with self.path.open("rb") as file:
            first = file.readline()
            # A process that is killed while it writes the first line leaves a part of it; after a power cut, zeros may follow.
            begin = first.rstrip(b"\0")[: len(_BEGIN)]
            cut_off = not first.endswith(b"\n") and begin == _BEGIN[: len(begin)]
            if cut_off or not self._same(self._settings(first)):
                return 0, 0
            kept, end, size = 0, len(first), len(first)
            for number, line in enumerate(file, start=1):
                if not _complete(line):
                    break
                size += len(line)
                if number % self.chunk == 0:
                    kept, end = number, size
        return kept, end

    def _settings(self, line: bytes) -> dict[str, Any]:
        try:
            found = parse_json(line)
        except ValueError:
            found = None
        settings = found.get(_SETTINGS) if isinstance(found, dict) else None
        if not isinstance(settings, dict):
            raise ValueError(
                f"{self.path}:1: not the settings of an interrupted call; move the file away, or delete it"
            )
        return settings

    def _same(self, before: Mapping[str, Any]) -> bool:
        for key, value in self.settings.items():
            if before.get(key) != value:
                if self.resume:
                    got = shortened(repr(value), 200)
                    raise ValueError(
                        f"{key}: got {got}, which differs from that of {self.path}; restore it, or call again without --resume"
                    )
                return False
        return True


def _complete(line: bytes) -> bool:
    """Return whether a line was written as a whole: a kill may cut it off, and a power cut may leave zeros in its middle."""
    try:
        parse_json(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()

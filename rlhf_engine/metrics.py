"""Metrics of a run, written to a JSONL file and to trackers such as TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rlhf_engine import files
from rlhf_engine.config.schema import shortened
from rlhf_engine.config.tracking import TrackingConfig
from rlhf_engine.files import parse_json, with_new_file
from rlhf_engine.trackers import Rows, RunOf, Trackers

METRICS = "metrics.jsonl"
SYNC_SECONDS = 1.0
"""Seconds of metrics that a power cut may lose at most."""


class LinesFile:
    """A JSONL file to which a run appends. The file never holds a part of a line that could not be written.

    Such a line, for example on a full disk, is kept in `waiting` and written before the next one. The first line that is
    written replaces the earlier content of the file by what `start` returns.
    """

    def __init__(self, path: Path, start: Callable[[], bytes]) -> None:
        self.path, self.start = path, start
        self.waiting: list[bytes] = []
        self.file: BinaryIO | None = None
        self.end = 0
        """Bytes of the file that are whole lines."""

    def add(self, lines: bytes) -> None:
        """Append lines."""
        self.waiting.append(lines)
        self._write()

    def sync(self) -> None:
        """Write the lines that could not be written before, and sync the file to disk."""
        if self.waiting:
            self._write()
        if self.file is not None:
            files.disk.sync(self.path)

    def content(self) -> bytes:
        """Return what the file contains when all lines are written."""
        if self.file is None:
            return b"".join((self.start(), *self.waiting))
        return b"".join((self.path.read_bytes()[: self.end], *self.waiting))

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def _write(self) -> None:
        if self.file is None:
            self.file = self._open()
        if os.fstat(self.file.fileno()).st_size > self.end:
            self.file.truncate(self.end)  # a part of a line
        rest = b"".join(self.waiting)
        size = len(rest)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self.file.truncate(self.end)  # if this fails too, the next write begins with it
            raise
        self.end += size
        self.waiting.clear()

    def _open(self) -> BinaryIO:
        content = self.start()
        with_new_file(self.path, lambda new: new.write_bytes(content))
        file = self.path.open("ab", buffering=0)
        self.end = len(content)
        return file


class MetricsWriter:
    """Writer of each step's metrics as one line of `metrics.jsonl` and as scalars `<stage>/<name>` of the trackers.

    `tracking` are the settings of the trackers, by default those of TensorBoard.

    A resumed run drops the lines of the steps that it will repeat, and appends. It drops them when it writes its first line,
    so that a run that fails earlier removes nothing. `history` is a checkpoint with the lines until step `resume_after`, which
    are restored if the file has lost some, for example in a power cut, or is that of a different folder; with it, lines that
    are not valid JSON are dropped. Use the writer as a context manager.

    Raises:
        ValueError: as `read_metrics` does, for an existing file that is broken, or as `Trackers`.
    """

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        *,
        resume_after: int | None = None,
        history: Path | None = None,
        tracking: TrackingConfig | None = None,
        clock: Callable[[], float] = files.now,
    ) -> None:
        self.stage, self.folder, self.resume_after = stage, Path(folder), resume_after
        self.clock, self.synced = clock, clock()
        self.history = None if history is None or not (history / METRICS).is_file() else read_metrics(history)
        self.log = LinesFile(self.folder / METRICS, self._start)
        self._earlier()
        self.trackers = Trackers(RunOf(self.folder, stage, tracking or TrackingConfig(), resume_after))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of `step`."""
        # JSON has no NaN and no infinity; they become null.
        clean = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        line = json.dumps({"stage": self.stage, "step": step, **clean}, allow_nan=False) + "\n"
        self.log.add(line.encode())
        if self.clock() - self.synced >= SYNC_SECONDS:
            self.sync()
        self.trackers.scalars(step, metrics)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table of `step`, such as sampled responses, to the trackers."""
        self.trackers.table(step, name, rows)

    def sync(self) -> None:
        """Write the lines that could not be written before, and sync the file to disk."""
        self.log.sync()
        self.synced = self.clock()

    def lines(self) -> bytes:
        """Return this stage's lines."""
        return _joined(row for row in _rows(self.log.content(), self.log.path) if row["stage"] == self.stage)

    def close(self) -> None:
        """Close the file and end the runs of the trackers."""
        self.log.close()
        self.trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> bytes:
        """Return the file's lines without this stage's after step `resume_after` (None: with all), and those of the history."""
        step = self.resume_after
        kept = [row for row in self._earlier() if row["stage"] != self.stage or step is None or row["step"] <= step]
        if self.history is not None and self.history != [row for row in kept if row["stage"] == self.stage]:
            kept = [row for row in kept if row["stage"] != self.stage] + self.history
        return _joined(kept)

    def _earlier(self) -> list[dict[str, Any]]:
        # A power cut may leave zeros in the middle of a line; the history has the lines of this stage.
        return read_metrics(self.folder, drop_damaged=self.history is not None)


def read_metrics(folder: str | Path, *, drop_damaged: bool = False) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` in `folder`, without an incomplete last line; empty if there is no file.

    With `drop_damaged`, every line that is not valid JSON is left out.

    Raises:
        ValueError: with file and line, for any other line that is not an object with a stage and a step.
    """
    path = Path(folder) / METRICS
    return _rows(path.read_bytes() if path.is_file() else b"", path, drop_damaged=drop_damaged)


def _joined(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _rows(content: bytes, path: Path, *, drop_damaged: bool = False) -> list[dict[str, Any]]:
    rows, lines = [], content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            if drop_damaged or number == len(lines):
                continue
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "stage" not in row:
            shown = shortened(line.decode(errors="replace"), 200)
            raise ValueError(f"{path}:{number}: got {shown}, expected an object with a stage and a step")
        rows.append(row)
    return rows

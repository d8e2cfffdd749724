"""Metrics of a run, written to a JSONL file and to TensorBoard, and progress bars."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlhf_engine import files
from rlhf_engine.config.schema import shortened
from rlhf_engine.files import with_new_file

METRICS = "metrics.jsonl"
SYNC_SECONDS = 1.0
"""Seconds of metrics that a power cut may lose at most."""
LINE_SECONDS = 20.0
"""Seconds between two progress lines where stderr is not a terminal."""


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
    """Writer of each step's metrics as one line of `metrics.jsonl` and as TensorBoard scalars `<stage>/<name>`.

    Each stage has a separate TensorBoard folder, `tensorboard/<stage>`, because a TensorBoard log that restarts at a step hides
    the later steps of all scalars in its folder. A resumed run drops the lines of the steps that it will repeat, and appends.
    It drops them when it writes its first line, so that a run that fails earlier removes nothing. `history` is a checkpoint
    with the lines until step `resume_after`, which are restored if the file has lost some, for example in a power cut, or is
    that of a different folder; with it, lines that are not valid JSON are dropped. Use the writer as a context manager.

    Raises:
        ValueError: as `read_metrics` does, for an existing file that is broken.
    """

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        *,
        resume_after: int | None = None,
        history: Path | None = None,
        clock: Callable[[], float] = files.now,
    ) -> None:
        self.stage, self.folder, self.resume_after = stage, Path(folder), resume_after
        self.clock, self.synced = clock, clock()
        self.history = None if history is None or not (history / METRICS).is_file() else read_metrics(history)
        self.log = LinesFile(self.folder / METRICS, self._start)
        self.board: SummaryWriter | None = None
        self._earlier()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of `step`."""
        # JSON has no NaN and no infinity; they become null.
        clean = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        line = json.dumps({"stage": self.stage, "step": step, **clean}, allow_nan=False) + "\n"
        self.log.add(line.encode())
        if self.clock() - self.synced >= SYNC_SECONDS:
            self.sync()
        if self.board is None:
            purge = None if self.resume_after is None else self.resume_after + 1
            self.board = SummaryWriter(str(self.folder / "tensorboard" / self.stage), purge_step=purge)
        for name, value in metrics.items():
            self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def sync(self) -> None:
        """Write the lines that could not be written before, and sync the file to disk."""
        self.log.sync()
        self.synced = self.clock()

    def lines(self) -> bytes:
        """Return this stage's lines."""
        return _joined(row for row in _rows(self.log.content(), self.log.path) if row["stage"] == self.stage)

    def close(self) -> None:
        """Close the file and the TensorBoard log."""
        self.log.close()
        if self.board is not None:
            self.board.close()

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
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if drop_damaged or number == len(lines):
                continue
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "stage" not in row:
            shown = shortened(line.decode(errors="replace"), 200)
            raise ValueError(f"{path}:{number}: got {shown}, expected an object with a stage and a step")
        rows.append(row)
    return rows


class ProgressLines(tqdm):
    """Progress as log lines, one every `LINE_SECONDS`. A task that takes less time writes none."""

    def __init__(self, **options: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left{postfix}"
        seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS}
        super().__init__(bar_format=form, leave=False, **seconds, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the progress line; ignore the empty `msg` with which tqdm clears a bar."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **values: Any) -> None:
        """Set the values that the next line shows, without writing a line now."""
        super().set_postfix(ordered_dict, refresh=False, **values)


def progress(total: int, what: str, *, unit: str = "it", done: int = 0) -> tqdm:
    """Return a progress display on stderr with the remaining time: a bar on a terminal, log lines otherwise."""
    options: dict[str, Any] = {"total": total, "initial": done, "desc": what, "unit": unit}
    return tqdm(dynamic_ncols=True, **options) if sys.stderr.isatty() else ProgressLines(**options)

"""Numbers of a run: summed on the device, written to a JSONL file and TensorBoard."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlhf_engine.files import with_new_file

METRICS = "metrics.jsonl"
LINE_SECONDS = 20.0
"""Seconds between two progress lines where stderr is not a terminal."""


class MetricsWriter:
    """Writes each step's numbers as one line of `metrics.jsonl` and as TensorBoard scalars `<stage>/<name>`.

    Each stage has its own board, `tensorboard/<stage>`: where a board begins again it hides all later steps, whatever their
    names. A resumed run appends, after dropping the lines of steps that it is going to repeat: when it has its first number, so
    that a run that fails before takes nothing away. A line that could not be written, on a full disk, is kept and written
    before the next one; the file never holds a part of it. Use it as a context manager.

    Raises ValueError, as `read_metrics` does, for a file that is there and broken.
    """

    def __init__(self, folder: str | Path, stage: str, *, resume_after: int | None = None) -> None:
        self.stage, self.folder, self.resume_after = stage, Path(folder), resume_after
        self.path = self.folder / METRICS
        self.file: BinaryIO | None = None
        self.board: SummaryWriter | None = None
        self.waiting: list[bytes] = []
        read_metrics(self.folder)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the numbers of `step`."""
        # JSON has no NaN: a number that is not one becomes null.
        clean = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        line = json.dumps({"stage": self.stage, "step": step, **clean}, allow_nan=False) + "\n"
        self.waiting.append(line.encode())
        self._flush()
        assert self.board is not None
        for name, value in metrics.items():
            self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def sync(self) -> None:
        """Write the lines that could not be written before, and wait until the disk has all of them."""
        self._flush()
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close both."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def _flush(self) -> None:
        if not self.waiting:
            return
        if self.file is None or self.board is None:
            self.file, self.board = self._open()
        size, rest = self.file.seek(0, os.SEEK_END), b"".join(self.waiting)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError:
            self.file.truncate(size)
            raise
        self.waiting.clear()

    def _open(self) -> tuple[BinaryIO, SummaryWriter]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._drop_after(self.resume_after)
        purge = None if self.resume_after is None else self.resume_after + 1
        board = self.board or SummaryWriter(str(self.folder / "tensorboard" / self.stage), purge_step=purge)
        return self.path.open("ab", buffering=0), board

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_after(self, step: int | None) -> None:
        """Keep what other stages wrote and this one up to `step` (None keeps all), and no half line at the end."""
        kept = [
            row
            for row in read_metrics(self.folder)
            if row["stage"] != self.stage or step is None or row["step"] <= step
        ]
        content = "".join(json.dumps(row) + "\n" for row in kept)
        with_new_file(self.path, lambda new: new.write_text(content, encoding="utf-8"))


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `folder`'s `metrics.jsonl`, without a last one that a kill left half-written; none where there is no file.

    Raises ValueError naming file and line for any other that is not an object with a stage and a step.
    """
    path = Path(folder) / METRICS
    rows, lines = [], path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "stage" not in row:
            raise ValueError(f"{path}:{number}: got {line.decode()}, expected an object with a stage and a step")
        rows.append(row)
    return rows


class ProgressLines(tqdm):
    """A progress bar for logs: one line every `LINE_SECONDS`, and none for what takes less."""

    def __init__(self, **options: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left{postfix}"
        seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS}
        super().__init__(bar_format=form, leave=False, **seconds, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line; tqdm clears a bar with an empty `msg`, for which there is nothing to do."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **values: Any) -> None:
        """Set the values that the next line shows; do not write one now."""
        super().set_postfix(ordered_dict, refresh=False, **values)


def progress(total: int, what: str, *, unit: str = "it", done: int = 0) -> tqdm:
    """Return a progress bar on stderr, with the time that is left: a bar on a terminal, lines in a log."""
    options: dict[str, Any] = {"total": total, "initial": done, "desc": what, "unit": unit}
    return tqdm(dynamic_ncols=True, **options) if sys.stderr.isatty() else ProgressLines(**options)

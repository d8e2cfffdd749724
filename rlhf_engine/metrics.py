"""Numbers of a run: summed on the device, written to a JSONL file and TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlhf_kernels import explained_variance

METRICS = "metrics.jsonl"


class _PeakRss:
    """The system's mark of the largest resident set, which a phase moves down to measure itself, and where it stood before."""

    def __init__(self) -> None:
        self.before, self.moves = 0.0, False

    def so_far(self) -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self.before, peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)

    def restart(self) -> None:
        self.before = self.so_far()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.moves = True
        except OSError:
            self.moves = False

    def since_restart(self) -> float | None:
        return _of_status("VmHWM:" if self.moves else "VmRSS:")


def _of_status(key: str) -> float | None:
    """A size of this process as Linux tells it, in 10^6 bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


_PEAK = _PeakRss()


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in 10^6 bytes."""
    return _PEAK.so_far()


def resident_mb() -> float:
    """What is resident now, in 10^6 bytes; the largest so far on systems that do not say."""
    now = _of_status("VmRSS:")
    return peak_rss_mb() if now is None else now


def start_phase_peak() -> None:
    """Let `phase_peak_mb` count from here. Whoever reads VmHWM or ru_maxrss of this process from outside sees them fall."""
    _PEAK.restart()


def phase_peak_mb() -> float | None:
    """Largest resident set since `start_phase_peak`, in 10^6 bytes; None on systems that do not say.

    Linux moves the mark. Where a sandbox forbids that, this is what is resident now.
    """
    return _PEAK.since_restart()


class MetricSum:
    """Sums dictionaries of device scalars without a host sync; keys that end in `_max` keep the largest."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one dictionary; all must have the same keys."""
        self.count += 1
        for name, value in metrics.items():
            before = self.sums.get(name)
            if before is None:
                self.sums[name] = value.clone()
            else:
                self.sums[name] = torch.maximum(before, value) if name.endswith("_max") else before + value

    def total(self) -> dict[str, Tensor]:
        """The sums, on the device: micro-batches that were given global denominators add up to their minibatch."""
        return self.sums

    def mean(self) -> dict[str, float]:
        """Means over the dictionaries (largest for `_max`) as floats, explained variance from its sums."""
        log = {name: float(value) / (1 if name.endswith("_max") else self.count) for name, value in self.sums.items()}
        if "num_value_tokens" in self.sums:
            log["explained_variance"] = float(explained_variance(self.sums))
        parts = ("returns_sum", "returns_sq_sum", "residual_sum", "residual_sq_sum", "num_value_tokens")
        return {name: value for name, value in log.items() if name not in parts}


class MetricsWriter:
    """Writes each step's numbers as one line of `metrics.jsonl` and as TensorBoard scalars `<stage>/<name>`.

    Every stage has a board of its own, `tensorboard/<stage>`: where a board begins again it hides all later steps, whatever
    their names. A resumed run appends, after dropping the lines of steps that it is going to repeat: when it has the first
    number of its own, so that a run that fails before takes nothing away. Use it as a context manager.

    Raises ValueError, as `read_metrics` does, for a file that is there and broken.
    """

    def __init__(self, folder: str | Path, stage: str, *, resume_after: int | None = None) -> None:
        self.stage, self.folder, self.resume_after = stage, Path(folder), resume_after
        self.path = self.folder / METRICS
        self.file: IO[str] | None = None
        self.board: SummaryWriter | None = None
        read_metrics(self.folder)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the numbers of `step`."""
        if self.file is None or self.board is None:
            self.file, self.board = self._open()
        # JSON has no NaN: a number that is not one becomes null.
        clean = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        self.file.write(json.dumps({"stage": self.stage, "step": step, **clean}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()

    def _open(self) -> tuple[IO[str], SummaryWriter]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._drop_after(self.resume_after)
        purge = None if self.resume_after is None else self.resume_after + 1
        return self.path.open("a", encoding="utf-8"), SummaryWriter(
            str(self.folder / "tensorboard" / self.stage), purge_step=purge
        )

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
        aside = self.path.with_name(self.path.name + ".new")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(self.path)


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


def progress(total: int, what: str, *, unit: str = "it", done: int = 0) -> tqdm:
    """A progress bar on stderr; none where stderr is not a terminal."""
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None, dynamic_ncols=True)

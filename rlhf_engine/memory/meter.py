"""The most memory that each phase of an update took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PeakMeter:
    """`with meter.phase("train"):` measures; `log()` gives `peak_train_mb` and forgets it. Phases of one name count together.

    On CUDA it is what the allocator had handed out; on the CPU the resident set, with all that the process holds besides (see
    `phase_peak_mb`). No entry where a system has neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; not nested."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            start_phase_peak()
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if cuda else phase_peak_mb()
            if peak is not None:
                self._peaks[name] = max(peak, self._peaks.get(name, 0.0))

    def log(self) -> dict[str, float]:
        """The peaks since the last call, in 10^6 bytes."""
        found, self._peaks = self._peaks, {}
        return {f"peak_{name}_mb": peak for name, peak in found.items()}


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

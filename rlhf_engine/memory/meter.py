"""The most memory that each phase of an update took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf_engine.metrics import phase_peak_mb, start_phase_peak


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

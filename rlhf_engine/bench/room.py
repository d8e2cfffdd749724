"""Memory of a benchmark: what a device has free, and the peak of a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_engine.memory.arena import phase_peak_mb, resident_mb, start_phase_peak
from rlhf_engine.memory.malloc import return_free_pages

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the free bytes of a device; on a CPU those of the machine, or of the process's control group if that has fewer."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of bytes during `call` above what was in use before.

    On a CPU this is resident memory, so blocks that malloc kept from earlier calls do not count; None on systems that do not
    report it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return_free_pages()
    start_phase_peak()
    before_mb = resident_mb()
    call()
    peak_mb = phase_peak_mb()
    return None if peak_mb is None else max(0, round((peak_mb - before_mb) * 1e6))

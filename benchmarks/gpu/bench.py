"""Context of the suite's parts that run kernels: the device, a timer and the measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.gpu.entries import Entry
from benchmarks.gpu.timing import Timer
from rlhf_kernels.backend import CUDA_OPS, why_no_cuda

Value = TypeVar("Value")
Part = Callable[["Bench"], Iterator[Entry]]


@dataclass(frozen=True)
class Bench:
    """Context of a part. In a dry run, parts run on the CPU in Triton's interpreter, at tiny shapes, and measure nothing."""

    device: torch.device
    dry_run: bool
    timer: Timer
    copy_rate: float | None = None
    """Bytes per second, read and written; None if not measured."""
    matmul_rate: float | None = None
    """bf16 FLOPs per second; None if not measured."""

    def size(self, full: Value, tiny: Value) -> Value:
        return tiny if self.dry_run else full

    def backends(self, op: str) -> Iterator[str]:
        yield "triton"
        if op in CUDA_OPS and not self.why_no_cuda(op):
            yield "cuda"

    def why_no_cuda(self, op: str) -> str:
        """Return why the CUDA C++ kernel of `op` cannot run here; empty if it can."""
        return "a dry run has no device" if self.dry_run else why_no_cuda(op, self.device)

    def moved(self, count: float, seconds: float | None) -> str:
        """Return as a note the bytes per second of moving `count` bytes in `seconds`, and their share of the copy's rate."""
        if seconds is None:
            return ""
        rate = count / seconds
        share = f", {rate / self.copy_rate:.3f} of the copy's rate" if self.copy_rate else ""
        return f"; {rate / 1e9:.0f} GB/s of {count / 1e6:.1f} MB{share}"

    def multiplied(self, count: float, seconds: float | None) -> str:
        """Return as a note the FLOPs per second of `count` FLOPs in `seconds`, and their share of the matrix products' rate."""
        if seconds is None:
            return ""
        rate = count / seconds
        share = f", {rate / self.matmul_rate:.3f} of the ceiling" if self.matmul_rate else ""
        return f"; {rate / 1e12:.0f} TFLOP/s{share}"

    def copy_seconds(self, count: float) -> float | None:
        """Return the seconds of moving `count` bytes at the copy's rate; None if the rate was not measured."""
        return None if self.copy_rate is None else count / self.copy_rate

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Return the peak of allocated bytes during `call` above what was allocated before; None in a dry run."""
        if self.dry_run:
            call()
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def milliseconds(name: str, seconds: float | None, note: str = "", **options) -> Entry:
    return Entry(name, None if seconds is None else seconds * 1e3, "ms", note=note, **options)


def microseconds(name: str, seconds: float | None, note: str = "", **options) -> Entry:
    return Entry(name, None if seconds is None else seconds * 1e6, "us", note=note, **options)

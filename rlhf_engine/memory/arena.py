"""A memory block that the phases of an update use in turn, on the CPU.

Sampling stores keys and values in it. Training stores gradients, the head's logits and optimizer state in transit.
Nothing that outlives a phase is stored in the block. The memory of a run is therefore that of its largest phase, not
the sum of its phases. A phase that needs less than the whole block returns the rest to the operating system before it
begins.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_engine.distributed.ranks import is_sharded
from rlhf_kernels import lend_workspace

if TYPE_CHECKING:
    from rlhf_engine.memory.pool import AnyArena

ALIGNMENT = 64
"""Alignment of torch's CPU tensors, in bytes."""


def has_streams(device: torch.device) -> bool:
    """Return whether copies to a device can run while it computes."""
    return device.type == "cuda"


def room_for(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes that a tensor takes in an arena, alignment included."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def refuse_outside(phase: str | None) -> str:
    """Return the open phase.

    Raises:
        RuntimeError: no phase is open.
    """
    if phase is None:
        raise RuntimeError("arena: memory was requested outside of a phase; open one with `with arena.phase(name):`")
    return phase


def refuse_beyond(sizes: Mapping[str, int], phase: str, start: int, size: int, what: str) -> None:
    """Raise ValueError if `size` bytes from offset `start` exceed the bytes of the phase."""
    planned = sizes[phase]
    if start + size > planned:
        raise ValueError(
            f"arena: cannot allocate {size} bytes for {what}: {planned - start} of the {planned} bytes planned for phase "
            f"{phase!r} are free; plan more bytes for the phase"
        )


def _trim() -> None:
    """Release memory that glibc's malloc retains from the previous phase.

    It retains up to 64 MB of free memory at the end of its heap, and the holes between live blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class _Loan:
    """A range of the block that a tensor uses. It is free once `view` is dead, because the tensor keeps `view` alive."""

    end: int
    view: weakref.ref[memoryview]
    what: str


class Arena:
    """Allocator of a CPU memory block that phases use in turn.

        with arena.phase("train"):
            tensor = arena.take(shape, dtype)

    At most `sizes["train"]` bytes are in use at a time. A tensor must not outlive its phase: the end of a phase raises
    RuntimeError if tensors of it are still referenced. If an exception ended the phase, its traceback may reference
    tensors. Their memory is then left untouched and the next phase maps a new block, so that no readable tensor is
    overwritten.

    Args:
        sizes: phase name -> most bytes of the phase.
        head_bytes: bytes of the fused head's logits, which `transients` provides.
        poison: fill allocated tensors with NaN, for tests.
    """

    def __init__(self, sizes: Mapping[str, int], *, head_bytes: int = 0, poison: bool = False) -> None:
        self.sizes, self.head_bytes, self.poison = dict(sizes), head_bytes, poison
        self.open: str | None = None
        self._block: mmap.mmap | None = None
        self._loans: list[_Loan] = []

    @property
    def bytes(self) -> int:
        """Size of the block: the bytes of the largest phase."""
        return max(self.sizes.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give the block to phase `name`, one of `sizes`. Only one phase can be open at a time.

        Raises:
            RuntimeError: a phase is open already, or tensors of this phase are still referenced at its end.
        """
        if self.open is not None:
            raise RuntimeError(
                f"arena: cannot begin phase {name!r} while phase {self.open!r} is open; end that phase first"
            )
        whole = False
        try:
            self._begin(name)
            yield
            whole = True
        finally:
            self.open = None
        if whole:
            self._refuse_held(name)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous, uninitialised tensor in the block.

        Memory is allocated as on a stack: the bytes of a deleted tensor are free once all tensors allocated after it
        are deleted too.

        Raises:
            RuntimeError: no phase is open.
            ValueError: the phase has fewer bytes left.
        """
        phase = refuse_outside(self.open)
        while self._loans and self._loans[-1].view() is None:
            self._loans.pop()
        start = -(-self._loans[-1].end // ALIGNMENT) * ALIGNMENT if self._loans else 0
        size = math.prod(shape) * dtype.itemsize
        refuse_beyond(self.sizes, phase, start, size, f"{dtype} of shape {tuple(shape)}")
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        assert self._block is not None
        view = memoryview(self._block)[start : start + size]
        self._loans.append(_Loan(start + size, weakref.ref(view), f"{dtype} {tuple(shape)}"))
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        if self.poison:
            tensor.fill_(255)  # NaN in every floating type
        return tensor.view(dtype).view(shape)

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return `take(shape, dtype)`; the signature is that of a cache's allocator."""
        assert device.type == "cpu"
        return self.take(shape, dtype)

    @contextmanager
    def transients(self) -> Iterator[None]:
        """Provide the memory that forward and backward passes use internally: here the logits of the fused head."""
        with lend_workspace(self.take((self.head_bytes,), torch.uint8)):
            yield

    def metrics(self) -> dict[str, float]:
        """Return the metrics that an update logs: none."""
        return {}

    def reset(self) -> None:
        """Close a phase that an interrupt left open."""
        self.open = None

    def _begin(self, name: str) -> None:
        if self._held():
            self._block = None
        self._loans.clear()
        size = self.sizes[name]
        if self._block is None and self.bytes:
            self._block = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _trim()
        used = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if used < self.bytes and hasattr(mmap, "MADV_DONTNEED"):
            assert self._block is not None
            self._block.madvise(mmap.MADV_DONTNEED, used, self.bytes - used)
        self.open = name

    def _held(self) -> list[str]:
        return [loan.what for loan in self._loans if loan.view() is not None]

    def _refuse_held(self, name: str) -> None:
        if self._held():
            gc.collect()  # deletes tensors that only a reference cycle keeps alive
        held = self._held()
        if held:
            raise RuntimeError(
                f"arena: {len(held)} tensors of phase {name!r} are still referenced at its end, such as {held[0]}; copy "
                "tensors that must outlive the phase"
            )


# ---- gradients ----


SUM_DTYPE = torch.float32
"""Dtype in which gradients are summed, also those of half-precision weights."""


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's gradients are summed."""
    return parameter.grad_dtype or parameter.dtype


def gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes that the gradients of `parameters` take in an arena; FSDP2 allocates those of sharded ones."""
    return sum(room_for(tuple(p.shape), gradient_dtype(p)) for p in parameters if not is_sharded(p))


@contextmanager
def gradients_in(arena: AnyArena, parameters: Iterable[nn.Parameter]) -> Iterator[Mapping[nn.Parameter, Tensor]]:
    """Store the gradients of `parameters` in the arena inside the context; drop them at its end. Return their places.

    A gradient is moved into the arena after the first backward pass has computed it, and later gradients are added to
    it there. As without an arena, a parameter that no backward pass reaches has no gradient, and
    `zero_grad(set_to_none=True)` starts a new sum. FSDP2 stores the gradients of sharded parameters.
    """
    places: dict[nn.Parameter, Tensor] = {}
    hooks = []

    def move(parameter: nn.Parameter) -> None:
        place = places[parameter]
        assert parameter.grad is not None
        if parameter.grad.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(parameter.grad)

    try:
        for parameter in (one for one in parameters if not is_sharded(one)):
            room = arena.take((parameter.numel(),), gradient_dtype(parameter))
            # The strides of the parameter, which a gradient allocated by autograd has too.
            places[parameter] = room.as_strided(parameter.shape, parameter.stride())
            hooks.append(parameter.register_post_accumulate_grad_hook(move))
        room = None
        yield places
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in places:
            parameter.grad = None
        places.clear()


# ---- measured peaks ----


class PeakMeter:
    """Peak memory of each phase.

    `with meter.phase("train"):` measures a phase. `log()` returns its peak as `peak_train_mb` and resets it. If several
    phases have the same name, their largest peak counts.

    On CUDA the peak is that of the memory allocated by torch. On the CPU it is that of the resident set of the whole
    process (see `phase_peak_mb`). There is no entry where the system reports neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the peak inside the context. Phases cannot be nested."""
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
        """Return the peaks since the last call, in 10^6 bytes, and reset them."""
        found, self._peaks = self._peaks, {}
        return {f"peak_{name}_mb": peak for name, peak in found.items()}


class _PeakRss:
    """The system's high-water mark of the resident set, which a phase resets to measure itself.

    `before` is the largest value before the last reset, in 10^6 bytes. `moves` is whether the system allowed the reset.
    """

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
    """Return a size of this process from /proc/self/status, in 10^6 bytes; None on systems without that file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key)), None)


_PEAK = _PeakRss()


def peak_rss_mb() -> float:
    """Return the largest resident set of this process so far, in 10^6 bytes."""
    return _PEAK.so_far()


def resident_mb() -> float:
    """Return the current resident set in 10^6 bytes; the largest so far on systems that do not report it."""
    now = _of_status("VmRSS:")
    return peak_rss_mb() if now is None else now


def start_phase_peak() -> None:
    """Start the measurement of `phase_peak_mb`.

    This resets VmHWM and ru_maxrss of the process, so an external monitor sees these values fall.
    """
    _PEAK.restart()


def phase_peak_mb() -> float | None:
    """Return the largest resident set since `start_phase_peak`, in 10^6 bytes; None on systems that do not report it.

    Linux allows a process to reset its high-water mark. Where a sandbox forbids the reset, this is the current resident
    set.
    """
    return _PEAK.since_restart()

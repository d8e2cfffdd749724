"""One block of bytes that the phases of an update take in turns, on the CPU.

Keys and values while the policy samples; gradients, the head's logits and optimiser state in transit while it learns. What an
update keeps is never in here. A run pays the largest of its phases and not their sum: a phase that needs less gives the rest of
the block back to the system before it begins.
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

from rlhf_kernels import lend_workspace

if TYPE_CHECKING:
    from rlhf_engine.memory.pool import AnyArena

ALIGNMENT = 64
"""Bytes to which torch aligns a tensor on the CPU."""


def room_for(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in an arena, alignment included."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def refuse_outside(phase: str | None) -> str:
    """Return the open phase; RuntimeError for a request while there is none."""
    if phase is None:
        raise RuntimeError("arena: got a request outside of a phase, expected one inside")
    return phase


def refuse_beyond(sizes: Mapping[str, int], phase: str, start: int, size: int, what: str) -> None:
    """ValueError for `size` bytes from `start` on that end beyond those of the phase."""
    planned = sizes[phase]
    if start + size > planned:
        raise ValueError(
            f"arena: got a request for {size} bytes, {what}, with {planned - start} of the {planned} planned for phase "
            f"{phase!r} left, expected no more"
        )


def _trim() -> None:
    """Give back what glibc's malloc keeps of the phase before: up to 64 MB that was free at the end of its heap, and holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class _Loan:
    """Bytes handed out. They are free again when no tensor lies in them: a tensor keeps the memoryview alive, and views it."""

    end: int
    view: weakref.ref[memoryview]
    what: str


class Arena:
    """`with arena.phase("train"): tensor = arena.take(shape, dtype)`, at most `sizes["train"]` bytes at a time.

    A tensor may not outlive its phase: RuntimeError, naming those that are still held, where the phase ends. Where an exception
    ended it, its traceback may hold some; their bytes are then left to them and the next phase maps others, so that nothing is
    ever written under a tensor that somebody can read. `head_bytes` are those of the fused head's logits (see `transients`).
    `poison` fills what is handed out with NaN, for tests.
    """

    def __init__(self, sizes: Mapping[str, int], *, head_bytes: int = 0, poison: bool = False) -> None:
        self.sizes, self.head_bytes, self.poison = dict(sizes), head_bytes, poison
        self.open: str | None = None
        self._block: mmap.mmap | None = None
        self._loans: list[_Loan] = []

    @property
    def bytes(self) -> int:
        """Of the block: those of the largest phase."""
        return max(self.sizes.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Hand the block to `name`, one of `sizes`; one phase at a time."""
        if self.open is not None:
            raise RuntimeError(f"arena: got phase {name!r} while {self.open!r} is open, expected one at a time")
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
        """A contiguous tensor in the block, its content anything.

        Bytes come back in the order of a stack: those of a tensor that is gone are free once all taken after it are gone too.
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
        """`take` with the signature that a cache asks for its memory with."""
        assert device.type == "cpu"
        return self.take(shape, dtype)

    @contextmanager
    def transients(self) -> Iterator[None]:
        """What forward and backward passes need besides tensors that are taken by name: here the logits of the fused head."""
        with lend_workspace(self.take((self.head_bytes,), torch.uint8)):
            yield

    def metrics(self) -> dict[str, float]:
        """Return what an update logs of it: nothing."""
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
            gc.collect()  # a cycle is nobody's
        held = self._held()
        if held:
            raise RuntimeError(
                f"arena: {len(held)} tensors of phase {name!r} are held at its end, such as {held[0]}, expected none"
            )


# ---- gradients ----


SUM_DTYPE = torch.float32
"""Type in which gradients are summed, of half-precision weights too."""


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What a parameter's gradients are summed in."""
    return parameter.grad_dtype or parameter.dtype


def gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that the gradients of `parameters` take in an arena."""
    return sum(room_for(tuple(p.shape), gradient_dtype(p)) for p in parameters)


@contextmanager
def gradients_in(arena: AnyArena, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While the context is open, gradients of `parameters` lie in the arena; after it there are none.

    A gradient is moved to its place when the first backward pass has made it, and later ones are added to it there. So a
    parameter that no backward pass reaches has none, as without an arena, and `zero_grad(set_to_none=True)` begins anew.
    """
    places: dict[nn.Parameter, Tensor] = {}
    hooks = []

    def move(parameter: nn.Parameter) -> None:
        place = places[parameter]
        assert parameter.grad is not None
        if parameter.grad.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(parameter.grad)

    try:
        for parameter in parameters:
            room = arena.take((parameter.numel(),), gradient_dtype(parameter))
            # Strides as the parameter has them, as autograd gives them to a gradient of its own.
            places[parameter] = room.as_strided(parameter.shape, parameter.stride())
            hooks.append(parameter.register_post_accumulate_grad_hook(move))
        room = None
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in places:
            parameter.grad = None
        places.clear()


# ---- measured peaks ----


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

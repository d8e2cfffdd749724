"""The same arena on a CUDA device: one memory pool of the caching allocator.

While the policy samples, its keys and values are slices of one allocation in the pool, dropped at the phase change. While it
scores and learns, all that forward and backward passes allocate comes from the pool (`transients`), so from the bytes that the
keys and values had, and so do gradients and optimiser state in transit, which are taken by name. Whatever is to survive a phase
is made outside of `transients` or copied there: moments, sums of metrics, what a user's reward function keeps.

Routing is per thread, and backward passes have threads of their own: `transients` turns those off
(`set_multithreading_enabled(False)`: "the backward pass runs on the calling thread instead").

A library that keeps a workspace from its first call on, as cuBLAS does, has made it by then, outside of the pool, since
sampling comes first. A phase that leaves bytes behind all the same is no error: the allocator never hands out bytes twice. It
is counted in `held_bytes`, since the pool then has to grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, cuda

from rlhf_engine.memory.arena import Arena, refuse_beyond, refuse_outside, room_for


class PoolArena:
    """`Arena` on a CUDA device. `sizes` bounds the phase "generate" alone: the others take what their operations need."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self.sizes, self.device = dict(sizes), device
        self.open: str | None = None
        self.held_bytes = 0
        """Most that a phase has left in the pool."""
        cuda.empty_cache()  # what checks and loading left behind is not paid beside the pool
        self._pool = cuda.MemPool()
        self._routed = False
        self._block: Tensor | None = None
        self._used = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Hand the pool to `name`, one of `sizes`; one phase at a time."""
        if self.open is not None:
            raise RuntimeError(f"arena: got phase {name!r} while {self.open!r} is open, expected one at a time")
        whole = False
        try:
            if name == "generate":
                with self._route():
                    self._block = torch.empty(self.sizes[name], dtype=torch.uint8, device=self.device)
                self._used = 0
            self.open = name
            yield
            whole = True
        finally:
            self.reset()
        held = sum(segment["allocated_size"] for segment in self._pool.snapshot())
        self.held_bytes = max(self.held_bytes, held)
        if whole and name == "generate" and held >= max(self.sizes[name], 1):
            raise RuntimeError(
                f"arena: {held} bytes of phase 'generate' are held at its end, expected no keys and values"
            )

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the pool, its content anything."""
        phase = refuse_outside(self.open)
        if self._block is None:
            with nullcontext() if self._routed else self._route():
                return torch.empty(shape, dtype=dtype, device=self.device)
        start, size = self._used, room_for(shape, dtype)
        refuse_beyond(self.sizes, phase, start, size, f"{dtype} of shape {tuple(shape)}")
        self._used = start + size
        count = torch.Size(shape).numel() * dtype.itemsize
        return self._block[start : start + count].view(dtype).view(shape)

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`take` with the signature that a cache asks for its memory with."""
        return self.take(shape, dtype)

    @contextmanager
    def transients(self) -> Iterator[None]:
        """Everything that this thread and the backward passes it starts allocate comes from the pool."""
        with torch.autograd.set_multithreading_enabled(False), self._route():
            yield

    def metrics(self) -> dict[str, float]:
        """Return what an update logs of it: the most that a phase has left in the pool, in 10^6 bytes."""
        return {"pool_held_mb": self.held_bytes / 1e6}

    def reset(self) -> None:
        """Close a phase that an interrupt left open."""
        self.open, self._block = None, None

    @contextmanager
    def _route(self) -> Iterator[None]:
        # The allocator refuses a pool that the thread allocates from already.
        assert not self._routed
        self._routed = True
        try:
            with cuda.use_mem_pool(self._pool, self.device):
                yield
        finally:
            self._routed = False


AnyArena = Arena | PoolArena


def open_arena(device: torch.device, sizes: Mapping[str, int], head_bytes: int) -> AnyArena:
    """An arena on `device` whose phases, by name, take at most `sizes` bytes; ValueError for a device that has none.

    `head_bytes` of them are the fused head's logits, which the allocator of a GPU provides by itself.
    """
    if device.type == "cpu":
        return Arena(sizes, head_bytes=head_bytes)
    if device.type == "cuda":
        return PoolArena(sizes, device)
    raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda: there is no arena on another one")

"""The arena on a CUDA device: one memory pool of the caching allocator.

During sampling, keys and values are slices of one allocation in the pool, which is freed when the phase ends. During
scoring and training, everything that forward and backward passes allocate comes from the pool (`transients`) and reuses
the memory of the keys and values. Gradients and optimizer state in transit, which are allocated with `take`, reuse it
too. Tensors that must outlive a phase are allocated outside of `transients` or copied: moments, sums of metrics, what a
user's reward function keeps.

Routing to the pool is per thread, and backward passes run in separate threads by default. `transients` turns that off
(`set_multithreading_enabled(False)`: "the backward pass runs on the calling thread instead").

A library such as cuBLAS keeps a workspace from its first call on. Sampling comes first, so the workspace is allocated
by then, outside of the pool. If a phase leaves allocations in the pool, that is not an error, because the allocator
never hands out memory that is in use. The bytes are counted in `held_bytes`, since the pool then has to grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, cuda

from rlhf_engine.memory.arena import Arena, refuse_beyond, refuse_outside, room_for


class PoolArena:
    """`Arena` on a CUDA device. `sizes` limits only the phase "generate"; the others allocate what their operations need."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self.sizes, self.device = dict(sizes), device
        self.open: str | None = None
        self.held_bytes = 0
        """Most bytes that a phase has left in the pool."""
        cuda.empty_cache()  # memory cached by checks and loading would be reserved in addition to the pool
        self._pool = cuda.MemPool()
        self._routed = False
        self._block: Tensor | None = None
        self._used = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give the pool to phase `name`, one of `sizes`. Only one phase can be open at a time.

        Raises:
            RuntimeError: a phase is open already, or keys and values are still allocated at the end of "generate".
        """
        if self.open is not None:
            raise RuntimeError(
                f"arena: cannot begin phase {name!r} while phase {self.open!r} is open; end that phase first"
            )
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
                f"arena: {held} bytes of phase 'generate' are still allocated at its end; delete the keys and values first"
            )

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous, uninitialised tensor in the pool.

        Raises:
            RuntimeError: no phase is open.
            ValueError: the phase "generate" has fewer bytes left.
        """
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
        """Return `take(shape, dtype)`; the signature is that of a cache's allocator."""
        return self.take(shape, dtype)

    @contextmanager
    def transients(self) -> Iterator[None]:
        """Route all allocations of this thread, and of backward passes that it starts, to the pool."""
        with torch.autograd.set_multithreading_enabled(False), self._route():
            yield

    def metrics(self) -> dict[str, float]:
        """Return the metrics that an update logs: the most that a phase has left in the pool, in 10^6 bytes."""
        return {"pool_held_mb": self.held_bytes / 1e6}

    def reset(self) -> None:
        """Close a phase that an interrupt left open."""
        self.open, self._block = None, None

    @contextmanager
    def _route(self) -> Iterator[None]:
        # The allocator rejects a pool that this thread already allocates from.
        assert not self._routed
        self._routed = True
        try:
            with cuda.use_mem_pool(self._pool, self.device):
                yield
        finally:
            self._routed = False


AnyArena = Arena | PoolArena


def open_arena(device: torch.device, sizes: Mapping[str, int], head_bytes: int) -> AnyArena:
    """Return an arena on `device`.

    Args:
        device: a CPU or CUDA device.
        sizes: phase name -> most bytes of the phase.
        head_bytes: the part of them that the fused head's logits take; on a GPU the caching allocator provides it.

    Raises:
        ValueError: a device of a different type.
    """
    if device.type == "cpu":
        return Arena(sizes, head_bytes=head_bytes)
    if device.type == "cuda":
        return PoolArena(sizes, device)
    raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda, the devices that have an arena")

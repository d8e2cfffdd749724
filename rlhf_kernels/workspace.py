"""The block in which chunks of logits are made, kept from call to call.

A fresh block is zeroed by the system page by page, which for a chunk of logits costs a quarter of its matrix product's time.
The block is each thread's own, as large as its largest chunk so far, and holds nothing between calls.
"""

import math
import threading

import torch

from . import _native


class Workspace(threading.local):
    """One reusable block a thread."""

    def __init__(self):
        self._block: torch.Tensor | None = None  # bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised room of `shape`, valid until the next call."""
        if device.type != "cpu":  # whose allocator keeps blocks, and knows the stream
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        block = self._block
        if block is None or block.device != device or block.numel() < size:
            self._block = None  # before the new one: their sum is never paid
            self._block = block = _native.empty((size,), torch.uint8, device)
        return block[:size].view(dtype).view(shape)

    def release(self) -> None:
        """Gives the bytes back to the system."""
        self._block = None


WORKSPACE = Workspace()


def release_workspace() -> None:
    """Frees the block that the fused head keeps between calls (of this thread); the next call makes a new one."""
    WORKSPACE.release()

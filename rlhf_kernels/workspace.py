"""The block in which chunks of logits are made, kept from call to call.

A fresh block is zeroed by the system page by page, which for a chunk of logits costs a quarter of its matrix product's time.
The block is each thread's own, as large as its largest chunk so far, and holds nothing between calls; a caller with bytes to
spare lends them instead.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _native

ALIGNMENT = 64
"""Bytes to which torch aligns a tensor on the CPU, and matrix libraries like them."""


class Workspace(threading.local):
    """One reusable block a thread."""

    def __init__(self):
        self._block: torch.Tensor | None = None  # bytes
        self._lent: torch.Tensor | None = None  # bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised room of `shape`, valid until the next call."""
        if device.type != "cpu":  # whose allocator keeps blocks, and knows the stream
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        if self._lent is not None:
            if self._lent.numel() < size:
                raise ValueError(
                    f"block: got {self._lent.numel()} bytes lent, expected at least {size} for logits of shape {shape}, "
                    "see head_workspace_bytes"
                )
            return self._lent[:size].view(dtype).view(shape)
        block = self._block
        if block is None or block.device != device or block.numel() < size:
            self._block = None  # before the new one: their sum is never paid
            self._block = block = _native.empty((size,), torch.uint8, device)
        return block[:size].view(dtype).view(shape)

    @contextmanager
    def lend(self, block: torch.Tensor) -> Iterator[None]:
        """Takes everything from `block` while the context is open."""
        self.release()
        before, self._lent = self._lent, block
        try:
            yield
        finally:
            self._lent = before

    def release(self) -> None:
        """Gives the bytes back to the system."""
        self._block = None


WORKSPACE = Workspace()


@contextmanager
def lend_workspace(
    block: torch.Tensor,  # (bytes,), uint8, on the CPU
) -> Iterator[None]:
    """While the context is open, the fused head of this thread makes its chunks of logits in `block` and keeps none of its own.

    What the block held is overwritten, and nothing of the head is in it between calls. `head_workspace_bytes` says how large it
    has to be. On a GPU the caching allocator is the lender.

    Raises:
        ValueError: a block that is not contiguous bytes on the CPU or not aligned to 64 of them; in a call, one too small.
    """
    if block.dtype != torch.uint8 or block.dim() != 1 or block.device.type != "cpu" or not block.is_contiguous():
        got = f"{block.dtype} of shape {tuple(block.shape)} on {block.device}"
        raise ValueError(f"block: got {got}, expected contiguous uint8 [bytes] on cpu")
    if block.data_ptr() % ALIGNMENT:
        raise ValueError(f"block: got the address {block.data_ptr():#x}, expected a multiple of {ALIGNMENT}")
    with WORKSPACE.lend(block):
        yield


def release_workspace() -> None:
    """Frees the block that the fused head keeps between calls (of this thread); the next call makes a new one."""
    WORKSPACE.release()

"""What a phase leaves behind on the CPU, given back to the system before the next one begins.

PyTorch's CPU allocator is the C library's. glibc keeps freed blocks of up to 32 MB in its heap, where holes between live ones
are resident but fit no later tensor: without this, a run pays part of every phase at once. On a GPU the caching allocator
hands a phase's blocks to the next one.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from rlhf_kernels import release_workspace


def free_phase(device: torch.device) -> None:
    """Release the head's block of logits and the pages of freed blocks; a page costs its fault again when it is next used."""
    if device.type != "cpu":
        return
    release_workspace()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none and need none
        if trim is not None:
            trim(0)

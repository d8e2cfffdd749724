"""Freed blocks on the CPU: given back to the system at once, so that a peak is what the plan says.

PyTorch's CPU allocator is the C library's. glibc maps large blocks one by one and returns each when it is freed, but its notion
of large grows with the blocks that a program frees, up to 32 MB, and what is smaller stays in its heap: between blocks that
live on, resident holes that fit no later tensor. They came to a fifth of a train phase's activations.
"""

from __future__ import annotations

import ctypes
import platform

RETURNED_FROM = 2**17
"""Bytes from which a block is returned: the value that glibc begins with. At 2**20 holes still came to a tenth."""
_M_MMAP_THRESHOLD = -3
"""Its number in malloc.h."""


def return_freed_blocks() -> bool:
    """From now on, and in this whole process, a block of `RETURNED_FROM` bytes or more goes back to the system when freed.

    Each such block then costs the faults of its pages anew. False, and nothing changed, where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED_FROM))

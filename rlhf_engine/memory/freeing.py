"""Freed blocks on the CPU: given back to the system at once, so that a peak is what the plan says.

PyTorch's CPU allocator is the C library's, and glibc keeps freed blocks of up to 32 MB in its heap. Between blocks that live
on they are resident holes that fit no later tensor: a fifth of a train phase's activations, measured.
"""

from __future__ import annotations

import ctypes
import platform

RETURNED_FROM = 2**20
"""Bytes from which a block is returned; smaller ones are too many to be worth a call to the system each."""
_M_MMAP_THRESHOLD = -3
"""Its number in malloc.h."""


def return_freed_blocks() -> bool:
    """From now on, and in this whole process, a block of `RETURNED_FROM` bytes or more goes back to the system when freed.

    Each such block then costs the faults of its pages anew. False, and nothing changed, where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED_FROM))

"""A malloc setting that returns freed CPU memory to the system at once, so that peaks match the memory plan.

PyTorch's CPU allocator is the C library's. glibc maps large blocks one by one and returns each when it is freed.
However, its threshold for large blocks grows with the blocks that a program frees, up to 32 MB. Smaller blocks stay in
its heap when freed, where they form resident holes between live blocks that fit no later tensor. Such holes amounted to
a fifth of a train phase's activations.
"""

from __future__ import annotations

import ctypes
import platform

RETURNED_FROM = 2**17
"""Smallest block that is returned, in bytes: glibc's initial threshold. With 2**20, holes still amounted to a tenth."""
_M_MMAP_THRESHOLD = -3
"""Number of the option in malloc.h."""


def return_freed_blocks() -> bool:
    """Make malloc return freed blocks of at least `RETURNED_FROM` bytes to the system, in the whole process.

    Every allocation of such a block then causes page faults again.

    Returns:
        Whether the setting was changed; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED_FROM))


def return_free_pages() -> None:
    """Return the pages that are free now to the system, once. Does nothing where the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

"""Kernels that look at one element at a time, or at one small batch.

Legend: N elements, B samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 elements a thread: two 16-byte loads of a half-precision input, four of float32, are under way at once.
BLOCK, WARPS = 4096, 8


def blocks(n: int) -> tuple[int]:
    """Axis 0 alone: it goes to 2^31 - 1, the others to 65,535."""
    return (triton.cdiv(n, BLOCK),)


@triton.jit(do_not_specialize=["n"])
def _scale_cast(x, scale, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    scaled = tl.load(x + at, live, other=0).to(tl.float32) * tl.load(scale).to(tl.float32)
    tl.store(out + at, scaled.to(out.dtype.element_ty), live)


def scale_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale is read on the device."""
    assert x.is_contiguous() and scale.numel() == 1
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        _scale_cast[blocks(x.numel())](x, scale, out, x.numel(), BLOCK, num_warps=WARPS)
    return out

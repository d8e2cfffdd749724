# pyright: reportCallIssue=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Compaction: rows with a gradient are moved to the front, so that the backward products contain only these rows.

Legend: N rows, V vocabulary, K marked rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Rows that the counting program reads at a time; it is a single program."""


@triton.jit
def _marked(active, start, n, TILE: tl.constexpr):
    """Return the row indices of a tile, and 1 for each marked row."""
    i = start + tl.arange(0, TILE)
    return i, tl.load(active + i, mask=i < n, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["active"])
def _places_kernel(active, source, movers, count, n, TILE: tl.constexpr):
    """Store K in `count`, and in `source` the index of the row that each of the first K places receives.

    A marked row among the first K stays. The k-th unmarked place receives the k-th marked row whose index is at least K.
    """
    kept = 0
    for start in range(0, n, TILE):
        _, marked = _marked(active, start, n, TILE)
        kept += tl.sum(marked, 0)
    tl.store(count, kept)
    before = 0
    for start in range(0, n, TILE):
        i, marked = _marked(active, start, n, TILE)
        moves = tl.where(i >= kept, marked, 0)
        tl.store(movers + before + tl.cumsum(moves, 0) - 1, i, mask=moves > 0)
        before += tl.sum(moves, 0)
    tl.debug_barrier()  # otherwise a warp could read an entry of `movers` before it is written
    before = 0
    for start in range(0, kept, TILE):
        i, marked = _marked(active, start, n, TILE)
        holes = tl.where(i < kept, 1 - marked, 0)
        mover = tl.load(movers + before + tl.cumsum(holes, 0) - 1, mask=holes > 0, other=0)
        tl.store(source + i, tl.where(holes > 0, mover, i), mask=i < kept)
        before += tl.sum(holes, 0)


@triton.jit
def _move_kernel(x, source, count, vocab, row_stride, BLOCK: tl.constexpr):
    """Copy row `source[i]` to place i. Rows that move have an index of at least K, so no row is both read and written."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count):
        origin = tl.load(source + row)
        if origin != row:
            for start in range(0, vocab, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                part = tl.load(x + origin * row_stride + cols, mask=cols < vocab)
                tl.store(x + row * row_stride + cols, part, mask=cols < vocab)


def compact_rows(x: Tensor, active: Tensor) -> Tensor:
    """Launch both kernels before the host waits for K, because the device is idle from then until the next product."""
    n, vocab = x.shape
    source, movers = (torch.empty(n, dtype=torch.int64, device=x.device) for _ in range(2))
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    # A copy is bound by memory: at most 8 warps, with 32 bytes per thread in half precision.
    block = max(128, min(4096, triton.next_power_of_2(vocab)))
    with torch.cuda.device_of(x):
        _places_kernel[(1,)](active.contiguous(), source, movers, count, n, TILE=TILE, num_warps=4)
        if n:
            _move_kernel[(n,)](x, source, count, vocab, x.stride(0), BLOCK=block, num_warps=max(1, block // 512))
    return source[: count.item()]

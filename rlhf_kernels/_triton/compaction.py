# pyright: reportCallIssue=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Rows that have a gradient move to the front, so that the backward products run over them alone.

Legend: N rows, V vocabulary, K marked rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Rows that the one program which counts them looks at together."""


@triton.jit
def _marked(active, start, n, TILE: tl.constexpr):
    """The places of a tile, and 1 where its rows are marked."""
    i = start + tl.arange(0, TILE)
    return i, tl.load(active + i, mask=i < n, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["active"])
def _places_kernel(active, source, movers, count, n, TILE: tl.constexpr):
    """K, and the row that comes to each of the first K places: its own where that is marked, else the k-th unmarked place
    takes the k-th marked row behind them all."""
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
    tl.debug_barrier()  # or a warp would read a mover that another one has not written
    before = 0
    for start in range(0, kept, TILE):
        i, marked = _marked(active, start, n, TILE)
        holes = tl.where(i < kept, 1 - marked, 0)
        mover = tl.load(movers + before + tl.cumsum(holes, 0) - 1, mask=holes > 0, other=0)
        tl.store(source + i, tl.where(holes > 0, mover, i), mask=i < kept)
        before += tl.sum(holes, 0)


@triton.jit
def _move_kernel(x, source, count, vocab, row_stride, BLOCK: tl.constexpr):
    """Row `source[i]` into place i: those that move come from behind all places, so that none is read and written."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count):
        origin = tl.load(source + row)
        if origin != row:
            for start in range(0, vocab, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                part = tl.load(x + origin * row_stride + cols, mask=cols < vocab)
                tl.store(x + row * row_stride + cols, part, mask=cols < vocab)


def compact_rows(x: Tensor, active: Tensor) -> Tensor:
    """All is launched before the host waits for K: the device has nothing to do from then on until the next product."""
    n, vocab = x.shape
    source, movers = (torch.empty(n, dtype=torch.int64, device=x.device) for _ in range(2))
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    # A copy is bound by memory: 8 warps, 32 bytes a thread.
    block = max(128, min(4096, triton.next_power_of_2(vocab)))
    with torch.cuda.device_of(x):
        _places_kernel[(1,)](active.contiguous(), source, movers, count, n, TILE=TILE, num_warps=4)
        if n:
            _move_kernel[(n,)](x, source, count, vocab, x.stride(0), BLOCK=block, num_warps=max(1, block // 512))
    return source[: count.item()]

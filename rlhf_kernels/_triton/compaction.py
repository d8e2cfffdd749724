"""Rows that have a gradient move to the front, so that the backward products run over them alone.

Legend: N rows, V vocabulary, K marked rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move_kernel(x, source, vocab, row_stride, BLOCK: tl.constexpr):
    """Row `source[i]` into place i: those that move come from behind all places, so that none is read and written."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(source + row)
    if origin != row:
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            part = tl.load(x + origin * row_stride + cols, mask=cols < vocab)
            tl.store(x + row * row_stride + cols, part, mask=cols < vocab)


def compact_rows(x: Tensor, active: Tensor) -> Tensor:
    order = active.nonzero().squeeze(1)  # the one wait: how many there are
    kept = order.numel()
    if kept == 0:
        return order
    # The k-th unmarked place of the first K takes the k-th marked row behind them.
    front = active[:kept]
    behind = front.sum() + (~front).cumsum(0) - 1
    source = torch.where(front, torch.arange(kept, device=x.device), order[behind.clamp(max=kept - 1)])
    # A copy is bound by memory: 8 warps, 32 bytes a thread.
    block = max(128, min(4096, triton.next_power_of_2(x.shape[1])))
    with torch.cuda.device_of(x):
        _move_kernel[(kept,)](x, source, x.shape[1], x.stride(0), BLOCK=block, num_warps=max(1, block // 512))
    return source

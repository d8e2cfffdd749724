# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Masked mean and whitening, and the statistics with which `rollout_advantages` whitens.

Each tile of fixed size, or each sequence, stores count, sum and sum of squares of its True entries in float64. One program
adds them in a fixed order, so that results are bitwise reproducible. Squares are summed in float64, because float32 loses a
standard deviation of 1 at a mean of 4096.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 1024, 8
"""4 entries per thread: one wide load of floats, contiguous across lanes, and one load of mask bytes. With 16 entries per
thread the mask would be one 16-byte load, but the floats would need four loads with 64 bytes from lane to lane."""

RUNS = 8
"""Blocks per tile: 8 loads in flight, and an eighth of the partial results."""

TOTAL_BLOCK, TOTAL_WARPS = 1024, 8
"""Partial results that the summing program reads at a time. It is a single program, bound by latency, not by bandwidth."""


@triton.jit
def moments(x, mask):
    """Return count, sum and sum of squares of the True entries of a block, in float64."""
    wide = tl.where(mask, x, 0.0).to(tl.float64)
    return tl.sum(mask.to(tl.int32), 0).to(tl.float64), tl.sum(wide, 0), tl.sum(wide * wide, 0)


@triton.jit
def store_moments(parts, i, n, count, total, squares):
    """Store the moments in column i of `parts` (3, n)."""
    tl.store(parts + i, count)
    tl.store(parts + n + i, total)
    tl.store(parts + 2 * n + i, squares)


@triton.jit
def add_moments(parts, n, BLOCK: tl.constexpr):
    """Return count, sum and sum of squares, added over the columns of `parts` (3, n)."""
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += tl.load(parts + i, mask=i < n, other=0.0)
        total += tl.load(parts + n + i, mask=i < n, other=0.0)
        squares += tl.load(parts + 2 * n + i, mask=i < n, other=0.0)
    return tl.sum(count, 0), tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit
def whitened(x, mask, statistics):
    """Return the True entries of a block whitened with `statistics` (mean, scale, offset), zeros elsewhere."""
    mean, scale, offset = tl.load(statistics), tl.load(statistics + 1), tl.load(statistics + 2)
    return tl.where(mask, (x - mean) * scale + offset, 0.0)


@triton.jit
def _load(x, mask, at, n, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Load entries and mask of a block.

    The bound n has no known divisor, so a bounded load is not a wide one. A WHOLE block is loaded without a bound.
    """
    i = tl.arange(0, BLOCK)
    if WHOLE:
        v, m = tl.load(x + at + i), tl.load(mask + at + i)
    else:
        inside = i < n - at
        v, m = tl.load(x + at + i, mask=inside, other=0.0), tl.load(mask + at + i, mask=inside, other=0)
    return v, m


@triton.jit
def _tile_moments(x, mask, at, n, WHOLE: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for run in tl.static_range(RUNS):
        v, m = _load(x, mask, at + run * BLOCK, n, WHOLE, BLOCK)
        wide = tl.where(m, v, 0.0).to(tl.float64)
        count, total, squares = count + m.to(tl.int32), total + wide, squares + wide * wide
    return tl.sum(count, 0).to(tl.float64), tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit(do_not_specialize=["n"])
def _moments_kernel(x, mask, parts, n, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    at = tile * (RUNS * BLOCK)
    if at + RUNS * BLOCK <= n:
        count, total, squares = _tile_moments(x, mask, at, n, True, RUNS, BLOCK)
    else:
        count, total, squares = _tile_moments(x, mask, at, n, False, RUNS, BLOCK)
    store_moments(parts, tile, tl.num_programs(0).to(tl.int64), count, total, squares)


@triton.jit(do_not_specialize=["n"])
def _mean_kernel(parts, out, n, BLOCK: tl.constexpr):
    count, total, _ = add_moments(parts, n, BLOCK)
    tl.store(out, (total / tl.maximum(count, 1.0)).to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _statistics_kernel(parts, out, n, SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr):
    """Compute mean, scale and offset of the whitening; with one entry, or none, the variance is 0."""
    count, total, squares = add_moments(parts, n, BLOCK)
    mean = total / tl.maximum(count, 1.0)
    degrees = tl.maximum(count - 1.0 if UNBIASED else count, 1.0)
    residual = squares - mean * total
    variance = tl.where(residual < 0, 0.0, residual) / degrees
    tl.store(out, mean.to(tl.float32))
    tl.store(out + 1, (1.0 / tl.sqrt(variance + 1e-8)).to(tl.float32))
    tl.store(out + 2, 0.0 if SHIFT_MEAN else mean.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _whiten_kernel(x, mask, statistics, out, n, BLOCK: tl.constexpr):
    at, i = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    if at + BLOCK <= n:
        v, m = _load(x, mask, at, n, True, BLOCK)
        tl.store(out + at + i, whitened(v, m, statistics))
    else:
        v, m = _load(x, mask, at, n, False, BLOCK)
        tl.store(out + at + i, whitened(v, m, statistics), mask=i < n - at)


def new_parts(count: int, like: Tensor) -> Tensor:
    """Return an uninitialised tensor for the moments of `count` tiles or sequences."""
    return torch.empty(3, count, dtype=torch.float64, device=like.device)


def statistics_of(
    parts: Tensor,  # (3, n), float64
    shift_mean: bool,
    unbiased: bool,
) -> Tensor:
    """Return mean, scale and offset of the whitening, (3,), float32."""
    out = torch.empty(3, dtype=torch.float32, device=parts.device)
    with torch.cuda.device_of(parts):
        _statistics_kernel[(1,)](
            parts,
            out,
            parts.shape[1],
            SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased,
            BLOCK=TOTAL_BLOCK,
            num_warps=TOTAL_WARPS,
        )
    return out


def whiten(
    x: Tensor,  # any shape
    mask: Tensor,  # as x, bool
    statistics: Tensor,  # (3,)
    out: Tensor,  # as x; may be x
) -> Tensor:
    """Write the whitened entries to `out`, zeros where the mask is False, and return it."""
    n = x.numel()
    with torch.cuda.device_of(x):
        _whiten_kernel[(triton.cdiv(n, BLOCK),)](x, mask, statistics, out, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def _moments_of(x: Tensor, mask: Tensor) -> Tensor:
    n = x.numel()
    tiles = triton.cdiv(n, RUNS * BLOCK)
    parts = new_parts(tiles, x)
    with torch.cuda.device_of(x):
        _moments_kernel[(tiles,)](x, mask, parts, n, RUNS=RUNS, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return parts


def masked_mean(
    x: Tensor,  # any shape
    mask: Tensor,  # as x, bool
) -> Tensor:
    """Return the mean of the True entries, in two launches."""
    parts = _moments_of(x, mask)
    out = torch.empty((), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _mean_kernel[(1,)](parts, out, parts.shape[1], BLOCK=TOTAL_BLOCK, num_warps=TOTAL_WARPS)
    return out


def masked_whiten(
    x: Tensor,  # any shape
    mask: Tensor,  # as x, bool
    shift_mean: bool,
    unbiased: bool,
) -> Tensor:
    """Return the True entries whitened, zeros elsewhere, in three launches."""
    statistics = statistics_of(_moments_of(x, mask), shift_mean, unbiased)
    return whiten(x, mask, statistics, torch.empty_like(x))

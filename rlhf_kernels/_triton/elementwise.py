# pyright: reportCallIssue=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Elementwise kernels, and group advantages over one batch of scores.

Legend: N elements, B samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import kl_slope, kl_value

RLOO, GRPO = tl.constexpr(0), tl.constexpr(1)  # indices in KINDS of ops/group_advantages.py

# 16 elements per thread: two 16-byte loads of a half-precision input, or four of float32, are in flight at once.
BLOCK, WARPS = 4096, 8
# Each program reads the whole batch, some thousands of samples: 8 samples per thread and iteration.
GROUP_BLOCK, GROUP_WARPS = 1024, 4


def blocks(n: int) -> tuple[int]:
    """Return the grid for n elements. It uses axis 0, which allows 2^31 - 1 programs; the other axes allow 65,535."""
    return (triton.cdiv(n, BLOCK),)


@triton.jit(do_not_specialize=["n"])
def _scale_cast(x, scale, out, n, BLOCK: tl.constexpr):
    start, i = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    factor = tl.load(scale).to(tl.float32)
    # The bound n has no known divisor, so a bounded load is not a wide one.
    if start + BLOCK <= n:
        tl.store(out + start + i, (tl.load(x + start + i).to(tl.float32) * factor).to(out.dtype.element_ty))
    else:
        live = i < n - start
        scaled = tl.load(x + start + i, live, other=0).to(tl.float32) * factor
        tl.store(out + start + i, scaled.to(out.dtype.element_ty), live)


def accumulate(total: Tensor, part: Tensor, *, first: bool) -> None:
    """Call torch's kernel, which is bound by memory, as a Triton kernel would be."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def scale_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale and cast; the scale is read on the device, so the host does not wait."""
    assert x.is_contiguous() and scale.numel() == 1
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            _scale_cast[blocks(x.numel())](x, scale, out, x.numel(), BLOCK, num_warps=WARPS)
    return out


@triton.jit(do_not_specialize=["n"])
def _kl_penalty(
    grad, logprobs, ref_logprobs, out, n, ESTIMATOR: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    d = tl.load(logprobs + at, live, other=0) - tl.load(ref_logprobs + at, live, other=0)
    if BACKWARD:
        result = tl.load(grad + at, live, other=0) * kl_slope(d, ESTIMATOR)
    else:
        result = kl_value(d, ESTIMATOR)
    tl.store(out + at, result, live)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """Return the KL estimate of each element."""
    return _kl_terms(None, logprobs, ref_logprobs, estimator)


def kl_penalty_backward(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """Return `grad` times d KL / d logprobs."""
    return _kl_terms(grad, logprobs, ref_logprobs, estimator)


def _kl_terms(grad: Tensor | None, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    out, n = torch.empty_like(logprobs), logprobs.numel()
    if n:
        with torch.cuda.device_of(logprobs):
            _kl_penalty[blocks(n)](
                grad, logprobs, ref_logprobs, out, n, estimator, grad is not None, BLOCK, num_warps=WARPS
            )
    return out


@triton.jit(do_not_specialize=["b", "eps"])
def _group_advantages(scores, groups, out, b, eps, KIND: tl.constexpr, POPULATION: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one sample per program, which reads all samples."""
    i = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + i)
    sums, counts, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, b, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (at < b) & (tl.load(groups + at, at < b, other=0) == group)
        sums += tl.load(scores + at, mine, other=0).to(tl.float64)
        counts += mine.to(tl.float64)
    count = tl.sum(counts)
    mean = tl.sum(sums) / count
    centred = tl.load(scores + i).to(tl.float64) - mean
    if KIND == RLOO:
        centred = tl.where(count > 1, centred * count / tl.maximum(count - 1, 1), 0)
    elif KIND == GRPO:
        for start in range(0, b, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mine = (at < b) & (tl.load(groups + at, at < b, other=0) == group)
            apart = tl.load(scores + at, mine, other=0).to(tl.float64) - mean
            squares += tl.where(mine, apart * apart, 0)
        degrees = count if POPULATION else count - 1
        centred = centred / (tl.sqrt(tl.sum(squares) / tl.maximum(degrees, 1)) + eps)
    tl.store(out + i, centred.to(tl.float32))


def group_advantages(scores: Tensor, groups: Tensor, kind: int, eps: float, population: bool) -> Tensor:
    """Return one advantage per score, one program per score."""
    out, b = torch.empty_like(scores), scores.numel()
    if b:
        with torch.cuda.device_of(scores):
            _group_advantages[(b,)](
                scores, groups, out, b, eps, kind, population, BLOCK=GROUP_BLOCK, num_warps=GROUP_WARPS
            )
    return out

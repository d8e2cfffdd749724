# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Kernels over rows of logits: one read gives log-sum-exp, log-prob and entropy; a second read gives the gradient.

One program processes one row, so the bits of a row do not depend on other rows. Both passes are bound by memory. A row is
not kept on chip: its size, for example 256 KB, exceeds the memory of one program.
Legend: N tokens, V vocabulary; u raw logit, w logit before the temperature, p probability.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_args import LogitRows, PpoRows, RowStats
from .math import EXP2_LOW, LN2, LOG2E, cap_of, capped_logit, capped_logit_slope, factor_of, objective_term, scalars_of


@triton.jit
def _row_start(row, row_stride, inner, outer_stride, NESTED: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the offset of a row in elements; see LogitRows.layout."""
    if NESTED:
        if ALIGNED:
            outer_stride = tl.multiple_of(outer_stride, 16)
        start = row // inner * outer_stride + row % inner * row_stride
    else:
        start = row * row_stride
    return start


@triton.jit
def _id(ids, row, vocab):
    """Return the token id of a row; -1 if it is outside the vocabulary, so that it is not used as an address."""
    id = tl.load(ids + row)
    return tl.where((id >= 0) & (id < vocab), id, -1).to(tl.int32)


@triton.jit
def _load(u, start, vocab, other: tl.constexpr, BLOCK: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    return tl.load(u + cols, mask=cols < vocab, other=other)


@triton.jit
def _stats(u, vocab, id, temperature, softcap, logit_scale, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return (log-prob, entropy, shift, 1 / sum) of the row at `u`, from one read with a running maximum.

    Exponentials are powers of 2, the hardware's instruction, which saves one multiplication and one rounding per element.
    """
    taken = tl.load(u + tl.maximum(id, 0)).to(tl.float32)
    factor = factor_of(temperature, logit_scale, HAS_CAP)
    rate = tl.cast(factor * LOG2E, tl.float32)
    softcap, inner = cap_of(softcap, logit_scale, HAS_CAP)
    # Sums of 2^t and t 2^t, t = (w - shift) * rate.
    shift, total, weighted = float("-inf"), 0.0, 0.0
    # The next block is loaded while the warps synchronise in the reductions of the current one.
    ahead = _load(u, 0, vocab, float("-inf"), BLOCK)
    for start in tl.range(0, vocab, BLOCK, num_stages=1):
        w = capped_logit(ahead.to(tl.float32), softcap, inner, HAS_CAP)
        ahead = _load(u, start + BLOCK, vocab, float("-inf"), BLOCK)
        if HAS_CAP:
            w = tl.where(start + tl.arange(0, BLOCK) < vocab, w, float("-inf"))  # the fill value is -softcap after tanh
        high = tl.maximum(shift, tl.max(w, 0))
        # If all logits so far are -inf, `shift - high` would be NaN. A total of NaN stays NaN.
        # The bound prevents 0 * -inf where logits are masked with the lowest float, which is extremely far below `high`.
        move = tl.where(total > 0, tl.maximum((shift - high) * rate, -1000.0), 0.0)
        scale = tl.exp2(move)
        weighted = scale * (weighted + move * total)
        total = scale * total
        shift = high
        t = (w - tl.where(high == float("-inf"), 0.0, high)) * rate
        e = tl.exp2(t)
        total += tl.sum(e, 0)
        weighted += tl.sum(e * tl.maximum(t, EXP2_LOW), 0)  # 0 * -inf must be 0
    taken = tl.where(id >= 0, capped_logit(taken, softcap, inner, HAS_CAP), float("nan"))
    # float64: near 0 the hardware's float32 logarithm has an absolute error of 2^-22.
    log_sum = tl.log(total.to(tl.float64))
    mean = weighted.to(tl.float64) / total * LN2
    # Every exponent contains the rounding error of `rate`. To first order, the log-sum changes by this error times the mean.
    logprob = (taken.to(tl.float64) - shift) * factor - log_sum - (factor * LOG2E / rate - 1.0) * mean
    return logprob.to(tl.float32), (log_sum - mean).to(tl.float32), shift, tl.div_rn(1.0, total)


@triton.jit
def _write_gradient(
    u, out, vocab, id, temperature, softcap, logit_scale, g, h, entropy, shift, inv_sum,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr = False,
):  # fmt: skip
    """Write `out_j = (g ([j = id] - p_j) - h p_j (log p_j + H)) dz_j/du_j`; `out` can be `u`, or the front of its memory.

    If the logits are a part of the vocabulary (PART), an id outside of it is in a different part.
    """
    factor = factor_of(temperature, logit_scale, HAS_CAP)
    outer = tl.cast(factor * logit_scale if HAS_CAP else factor, tl.float32)
    rate = tl.cast(factor * LOG2E, tl.float32)
    softcap, inner = cap_of(softcap, logit_scale, HAS_CAP)
    if not PART:
        g = tl.where(id >= 0, g, float("nan"))
    level = 0.0  # log p + H = t ln 2 + level
    if ENTROPY:
        level = (entropy + tl.log(inv_sum.to(tl.float64))).to(tl.float32)
    # Blocks are in increasing order, and each is read before the previous one is written. A block writes at or before its
    # position in `u`, so it never overwrites a block that is still to be read.
    ahead = _load(u, 0, vocab, 0.0, BLOCK)
    for start in tl.range(0, vocab, BLOCK, num_stages=1):
        cols = start + tl.arange(0, BLOCK)
        raw = ahead.to(tl.float32)
        w = capped_logit(raw, softcap, inner, HAS_CAP)
        ahead = _load(u, start + BLOCK, vocab, 0.0, BLOCK)
        # A narrower `out` overlaps memory that other warps read. Without the barrier a warp could write before they have
        # read, and they would use gradients as logits.
        tl.debug_barrier()
        t = (w - shift) * rate
        p = tl.exp2(t) * inv_sum  # not 2^(t - log2 sum): a large p has a small t, whose power of 2 is accurate
        slope = g
        if ENTROPY:
            slope = g + h * (tl.maximum(t, EXP2_LOW) * LN2 + level)
        dz = tl.where(cols == id, g, 0.0) - p * slope
        du = dz * capped_logit_slope(raw, inner, outer, HAS_CAP)
        tl.store(out + cols, du.to(out.dtype.element_ty), mask=cols < vocab)


@triton.jit
def _write_zeros(out, vocab, BLOCK: tl.constexpr):
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(out + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < vocab)


@triton.jit
def _put(stats, row, n, logprob, entropy, shift, inv_sum):
    tl.store(stats + row, logprob)
    tl.store(stats + n.to(tl.int64) + row, entropy)
    tl.store(stats + n.to(tl.int64) * 2 + row, shift)
    tl.store(stats + n.to(tl.int64) * 3 + row, inv_sum)


# N, T and the coefficients change from call to call, and must not compile a kernel again. Per-row tensors can be views with
# any offset; a program reads one number of each, so their alignment does not matter.
_PER_ROW = ["ids", "mask", "temperatures", "stats"]
_VARYING = ["n", "inner", "outer_stride", "temperature", "softcap", "logit_scale"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PER_ROW)
def _forward_kernel(
    logits, ids, mask, temperatures, stats, n, vocab, row_stride, inner, outer_stride,
    temperature: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    NESTED: tl.constexpr, ALIGNED: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if mask is not None:
        counts = tl.load(mask + row)
    if counts:
        if temperatures is not None:
            temperature = tl.load(temperatures + row).to(tl.float64)
        u = logits + _row_start(row, row_stride, inner, outer_stride, NESTED, ALIGNED)
        logprob, entropy, shift, inv_sum = _stats(
            u, vocab, _id(ids, row, vocab), temperature, softcap, logit_scale, HAS_CAP, BLOCK
        )
        _put(stats, row, n, logprob, entropy, shift, inv_sum)
    else:
        _put(stats, row, n, 0.0, 0.0, 0.0, 0.0)


@triton.jit(
    do_not_specialize=[*_VARYING, "out_inner", "out_outer_stride"],
    do_not_specialize_on_alignment=[*_PER_ROW, "grad_logprobs", "grad_entropy"],
)
def _backward_kernel(
    logits, ids, mask, temperatures, stats, grad_logprobs, grad_entropy, out, n, vocab, row_stride, inner, outer_stride,
    out_row_stride, out_inner, out_outer_stride, temperature: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    NESTED: tl.constexpr, OUT_NESTED: tl.constexpr, ALIGNED: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr = False,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g, h = 0.0, 0.0
    counts = True
    if mask is not None:
        counts = tl.load(mask + row)
    if counts:
        if grad_logprobs is not None:
            g = tl.load(grad_logprobs + row)
        if grad_entropy is not None:
            h = tl.load(grad_entropy + row)
    out += _row_start(row, out_row_stride, out_inner, out_outer_stride, OUT_NESTED, ALIGNED)
    if (g != 0) | (h != 0):
        if temperatures is not None:
            temperature = tl.load(temperatures + row).to(tl.float64)
        u = logits + _row_start(row, row_stride, inner, outer_stride, NESTED, ALIGNED)
        entropy = tl.load(stats + n.to(tl.int64) + row)
        shift = tl.load(stats + n.to(tl.int64) * 2 + row)
        inv_sum = tl.load(stats + n.to(tl.int64) * 3 + row)
        _write_gradient(
            u, out, vocab, _id(ids, row, vocab), temperature, softcap, logit_scale, g, h, entropy, shift, inv_sum,
            HAS_CAP, grad_entropy is not None, BLOCK, PART,
        )  # fmt: skip
    else:
        _write_zeros(out, vocab, BLOCK)


_PPO_ROWS = ["old_logprobs", "advantages", "weights", "ref_logprobs", "row_weight"]


@triton.jit(
    do_not_specialize=[*_VARYING, "out_inner", "out_outer_stride"],
    do_not_specialize_on_alignment=[*_PER_ROW, *_PPO_ROWS, "active"],
)
def _ppo_kernel(
    logits, ids, mask, temperatures, stats, old_logprobs, advantages, weights, ref_logprobs, row_weight, out, active,
    n, vocab, row_stride, inner, outer_stride, out_row_stride, out_inner, out_outer_stride,
    temperature: tl.float64, softcap: tl.float64, logit_scale: tl.float64, scalars,
    ENTROPY: tl.constexpr, NESTED: tl.constexpr, OUT_NESTED: tl.constexpr, ALIGNED: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out += _row_start(row, out_row_stride, out_inner, out_outer_stride, OUT_NESTED, ALIGNED)
    live = False
    counts = True
    if mask is not None:
        counts = tl.load(mask + row)
    if counts:
        if temperatures is not None:
            temperature = tl.load(temperatures + row).to(tl.float64)
        u = logits + _row_start(row, row_stride, inner, outer_stride, NESTED, ALIGNED)
        id = _id(ids, row, vocab)
        logprob, entropy, shift, inv_sum = _stats(u, vocab, id, temperature, softcap, logit_scale, HAS_CAP, BLOCK)
        _put(stats, row, n, logprob, entropy, shift, inv_sum)
        # d L / d logprob and d L / d H, each times the denominator.
        importance, ref_logprob = 1.0, 0.0
        if weights is not None:
            importance = tl.load(weights + row)
        if ref_logprobs is not None:
            ref_logprob = tl.load(ref_logprobs + row)
        old = tl.load(old_logprobs + row)
        _, _, _, _, _, _, ratio_slope, own_slope = objective_term(
            logprob - old, logprob, old, tl.load(advantages + row), importance, ref_logprob, scalars,
            ref_logprobs is not None,
        )  # fmt: skip
        g = ratio_slope + own_slope
        g = tl.where(logprob == logprob, g, float("nan"))  # an invalid id gives NaN with every objective
        h = -scalars.entropy_coef
        if row_weight is not None:
            weight = tl.load(row_weight + row)
            g *= weight
            h *= weight
        live = (g != 0) | (h != 0)
        if live:
            _write_gradient(
                u, out, vocab, id, temperature, softcap, logit_scale, g, h, entropy, shift, inv_sum,
                HAS_CAP, ENTROPY, BLOCK,
            )  # fmt: skip
    else:
        _put(stats, row, n, 0.0, 0.0, 0.0, 0.0)
    tl.store(active + row, live)
    if not live:
        # A warp must not write zeros to memory that a different warp has not read yet.
        tl.debug_barrier()
        _write_zeros(out, vocab, BLOCK)


def _launch_shape(x: LogitRows) -> dict[str, int]:
    """Return the block size and warps of a launch (measured on an H200: benchmarks/results/notes.md).

    A program has 4 warps. A thread has 64 bytes of logits and loads as many ahead. That keeps enough loads in flight, uses
    few enough registers that several programs share a multiprocessor (some read while others reduce or write), and reduces
    across few warps. tanh needs extra registers, and so do the addresses of rows that cannot be read with wide loads. Each of
    these halves the logits per thread; otherwise registers would spill.
    """
    vocab = x.logits.shape[-1]
    narrower = (x.transform.softcap is not None) + (vocab % 16 != 0)
    most = (2048 if x.logits.dtype == torch.float32 else 4096) >> narrower
    block = max(128, min(most, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, 4 * block // most), "num_stages": 1}


def _layout(x: LogitRows) -> tuple[tuple[int, int, int], bool]:
    """Return (row, inner, outer) of `LogitRows.layout`, and whether inner and outer are needed."""
    n, _, row_stride, inner, outer_stride = x.layout()
    if n <= inner or outer_stride == inner * row_stride:
        return (row_stride, inner, 0), False
    return (row_stride, inner, outer_stride), True


def _flags(x: LogitRows, nested: bool) -> dict[str, bool]:
    # Both strides must be multiples of 16, so that ALIGNED depends on the vocabulary only. With an odd vocabulary the outer
    # stride is such a multiple for some T, which would compile a second kernel.
    (row_stride, _, outer_stride), _ = _layout(x)
    aligned = row_stride % 16 == 0 and outer_stride % 16 == 0
    return {"NESTED": nested, "ALIGNED": aligned, "HAS_CAP": x.transform.softcap is not None}


def _transform(x: LogitRows) -> tuple[Tensor | None, tuple[float, float, float]]:
    """Return the temperatures of the rows, or None, and (temperature, softcap, logit scale)."""
    t = x.transform
    return t.temperatures, (float(t.temperature), float(t.softcap or 0.0), float(t.logit_scale))


def token_logprobs_forward(x: LogitRows, stats: RowStats) -> None:
    """Compute the statistics of each row, one program per row."""
    n, vocab, *_ = x.layout()
    strides, nested = _layout(x)
    temperatures, transform = _transform(x)
    if n == 0:
        return
    with torch.cuda.device_of(x.logits):
        _forward_kernel[(n,)](
            x.logits, x.ids, x.mask, temperatures, stats.buffer, n, vocab, *strides, *transform,
            **_flags(x, nested), **_launch_shape(x),
        )  # fmt: skip


def token_logprobs_backward(
    x: LogitRows, stats: RowStats, out: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    """Write the gradient of the logits to `out`, one program per row."""
    n, vocab, *_ = x.layout()
    strides, nested = _layout(x)
    out_strides, out_nested = _layout(replace(x, logits=out))
    temperatures, transform = _transform(x)
    if n == 0:
        return
    with torch.cuda.device_of(x.logits):
        _backward_kernel[(n,)](
            x.logits, x.ids, x.mask, temperatures, stats.buffer, grad_logprobs, grad_entropy, out, n, vocab, *strides,
            *out_strides, *transform, OUT_NESTED=out_nested, PART=x.part, **_flags(x, nested), **_launch_shape(x),
        )  # fmt: skip


def ppo_epilogue(x: LogitRows, stats: RowStats, ppo: PpoRows, out: Tensor) -> Tensor:
    """Compute the statistics and write the gradient to `out`, one program per row; return which rows have one."""
    n, vocab, *_ = x.layout()
    strides, nested = _layout(x)
    out_strides, out_nested = _layout(replace(x, logits=out))
    temperatures, transform = _transform(x)
    active = torch.empty(n, dtype=torch.bool, device=x.logits.device)
    if n == 0:
        return active
    with torch.cuda.device_of(x.logits):
        _ppo_kernel[(n,)](
            x.logits, x.ids, x.mask, temperatures, stats.buffer, ppo.old_logprobs, ppo.advantages, ppo.weights,
            ppo.ref_logprobs, ppo.row_weight, out, active, n, vocab, *strides, *out_strides, *transform,
            scalars_of(ppo.scalars), ENTROPY=ppo.scalars.entropy_coef != 0,
            OUT_NESTED=out_nested, **_flags(x, nested), **_launch_shape(x),
        )  # fmt: skip
    return active

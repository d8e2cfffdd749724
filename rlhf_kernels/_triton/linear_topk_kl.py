# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportPrivateUsage=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""The epilogue of the distillation loss for a chunk of rows: divergence from the listed tokens, and gradient of the logits.

One program processes one row, as in `rows`, whose passes over the row it shares.
Legend: N rows, V vocabulary, K listed tokens; s and t are log-probs of the student and the teacher, q and p probabilities.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_args import LogitRows
from ..token_args import DIRECTIONS, TAIL_FLOOR, TopkRows
from .math import LOG2E, cap_of, capped_logit, capped_logit_slope, factor_of
from .rows import _flags, _launch_shape, _layout, _row_start, _stats, _transform, _write_gradient, _write_zeros

_FORWARD, _REVERSE, _ = (tl.constexpr(i) for i in range(len(DIRECTIONS)))
_FLOOR = tl.constexpr(TAIL_FLOOR)


@triton.jit
def _times(x, y):
    """Return x * y, where 0 * inf is 0: a token of probability 0 adds nothing."""
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def _term(s, t, beta, log_student, log_teacher, DIRECTION: tl.constexpr):
    """Return the term of a token and d term / d s; see csrc/math/topk.h."""
    q, p = tl.exp(s), tl.exp(t)
    if DIRECTION == _FORWARD:
        value, slope = _times(p, t - s), -p
    elif DIRECTION == _REVERSE:
        value = _times(q, s - t)
        slope = q + value
    else:
        a, b = s + log_student, t + log_teacher
        high = tl.maximum(a, b)
        mixture = high + tl.log(1 + tl.exp(tl.minimum(a, b) - high))
        slope = (1 - beta) * _times(q, s - mixture)
        value = beta * _times(p, t - mixture) + slope
    return value, slope


@triton.jit
def _floored(x):
    """Return a mass that is at least the floor; NaN stays NaN."""
    return tl.where(x <= _FLOOR, _FLOOR, x)


@triton.jit
def _row_terms(s, t, used, beta, log_student, log_teacher, DIRECTION: tl.constexpr, LUMP: tl.constexpr):
    """Return the divergence of a row, the masses of student and teacher, and d divergence / d s of each listed token."""
    value, slope = _term(s, t, beta, log_student, log_teacher, DIRECTION)
    divergence = tl.sum(tl.where(used, value, 0))
    q = tl.where(used, tl.exp(s), 0)
    student, teacher = tl.sum(q), tl.sum(tl.where(used, tl.exp(t), 0))
    if LUMP:
        rest = _floored(1 - student)
        other, tail = _term(tl.log(rest), tl.log(_floored(1 - teacher)), beta, log_student, log_teacher, DIRECTION)
        divergence += other
        slope -= _times(q, tl.where(1 - student <= _FLOOR, 0.0, tail / rest))
    return divergence, student, teacher, tl.where(used, slope, 0)


@triton.jit
def _of_ids(id, slope, used, place, k):
    """Return for each entry the sum of the slopes of all entries with its id."""
    total = tl.zeros_like(slope)
    for i in range(0, k):
        one = (place == i) & used
        same = (id == tl.sum(tl.where(one, id, 0))) & (tl.sum(one.to(tl.int32)) > 0)
        total += tl.where(same, tl.sum(tl.where(one, slope, 0)), 0)
    return total


@triton.jit(
    do_not_specialize=["n", "inner", "outer_stride", "out_inner", "out_outer_stride", "k"],
    do_not_specialize_on_alignment=["mask", "temperatures", "ids", "logprobs", "row_weight", "found", "active"],
)
def _topk_kernel(
    logits, mask, temperatures, ids, logprobs, row_weight, found, out, active,
    n, vocab, row_stride, inner, outer_stride, out_row_stride, out_inner, out_outer_stride, k,
    temperature: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    beta: tl.float64, log_student: tl.float64, log_teacher: tl.float64,
    DIRECTION: tl.constexpr, LUMP: tl.constexpr, NESTED: tl.constexpr, OUT_NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out += _row_start(row, out_row_stride, out_inner, out_outer_stride, OUT_NESTED, ALIGNED)
    live, counts = False, True
    divergence, student, teacher = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    if mask is not None:
        counts = tl.load(mask + row)
    if counts:
        if temperatures is not None:
            temperature = tl.load(temperatures + row).to(tl.float64)
        u = logits + _row_start(row, row_stride, inner, outer_stride, NESTED, ALIGNED)
        none = (row * 0).to(tl.int32) + vocab  # an id that no column has
        _, entropy, shift, inv_sum = _stats(u, vocab, none * 0, temperature, softcap, logit_scale, HAS_CAP, BLOCK)
        place = tl.arange(0, ENTRIES)
        t = tl.load(logprobs + row * k + place, place < k, other=float("-inf")).to(tl.float64)
        used = (place < k) & (t != float("-inf"))
        id = tl.load(ids + row * k + place, used, other=0)
        known = (id >= 0) & (id < vocab)
        raw = tl.load(u + tl.where(known, id, 0)).to(tl.float32)
        factor = factor_of(temperature, logit_scale, HAS_CAP)
        rate = tl.cast(factor * LOG2E, tl.float32)
        cap, slant = cap_of(softcap, logit_scale, HAS_CAP)
        w = capped_logit(raw, cap, slant, HAS_CAP)
        log_sum = -tl.log(inv_sum.to(tl.float64))
        s = (w.to(tl.float64) - shift) * factor - log_sum - (factor * LOG2E / rate - 1.0) * (log_sum - entropy)
        s = tl.where(used, tl.where(known, s, float("nan")), 0.0)
        divergence, student, teacher, slope = _row_terms(
            s, tl.where(used, t, 0.0), used, beta, log_student, log_teacher, DIRECTION, LUMP
        )
        if row_weight is not None:
            slope = slope * tl.load(row_weight + row)
        live = tl.max((slope != 0).to(tl.int32)) > 0
        if live:
            g = tl.sum(slope).to(tl.float32)
            own = _of_ids(id, slope.to(tl.float32), used, place, k)
            outer = tl.cast(factor * logit_scale if HAS_CAP else factor, tl.float32)
            dz = own - g * (tl.exp2((w - shift) * rate) * inv_sum)
            du = dz * capped_logit_slope(raw, slant, outer, HAS_CAP)
            _write_gradient(
                u, out, vocab, none, temperature, softcap, logit_scale, g, 0.0, entropy, shift, inv_sum,
                HAS_CAP, False, BLOCK,
            )  # fmt: skip
            # Without the barrier, a different warp could write the gradient of a column after that of its listed token.
            tl.debug_barrier()
            tl.store(out + tl.where(known, id, 0), du.to(out.dtype.element_ty), used & known)
    tl.store(found + row, divergence.to(tl.float32))
    tl.store(found + n.to(tl.int64) + row, student.to(tl.float32))
    tl.store(found + n.to(tl.int64) * 2 + row, teacher.to(tl.float32))
    tl.store(active + row, live)
    if not live:
        # A warp must not write zeros to memory that a different warp has not read yet.
        tl.debug_barrier()
        _write_zeros(out, vocab, BLOCK)


def topk_epilogue(x: LogitRows, topk: TopkRows, found: Tensor, out: Tensor) -> Tensor:
    """Compute `found` and write the gradient to `out`, one program per row; return which rows have one."""
    n, vocab, *_ = x.layout()
    strides, nested = _layout(x)
    out_strides, out_nested = _layout(replace(x, logits=out))
    temperatures, transform = _transform(x)
    active = torch.empty(n, dtype=torch.bool, device=x.logits.device)
    if n == 0:
        return active
    rule, k = topk.rule, topk.ids.shape[1]
    with torch.cuda.device_of(x.logits):
        _topk_kernel[(n,)](
            x.logits, x.mask, temperatures, topk.ids, topk.logprobs, topk.row_weight, found, out, active,
            n, vocab, *strides, *out_strides, k, *transform, rule.beta, math.log1p(-rule.beta), math.log(rule.beta),
            DIRECTION=rule.direction, LUMP=rule.lump, OUT_NESTED=out_nested, ENTRIES=max(16, triton.next_power_of_2(k)),
            **_flags(x, nested), **_launch_shape(x),
        )  # fmt: skip
    return active

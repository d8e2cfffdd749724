# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Sampling of one token per row: the filters give one lower limit on the logits, then the distribution function is inverted.

A program reads its row several times, after the first time from the cache. A limit is found by a search over integers that
are ordered like the floats: in a fixed number of passes, of which each determines two bits. Masses are summed in float64.

Legend: B rows, V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan import registers

# A batch has few rows, often fewer than there are multiprocessors, so a program has 16 warps. It has 4 elements per thread:
# with 8, the three float64 sums of the search would spill, as they do with the registers that ptxas chooses by default.
LAUNCH = {"BLOCK": 2048, "num_warps": 16, **registers(128)}


@triton.jit
def uniform(seed, sequence, position):
    """Return a float64 in [0, 1): 53 bits of the first two words of Philox4x32-10 (csrc/math/philox.h).

    The key is the seed, the counter is (position, sequence).
    """
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, sequence.to(tl.uint32), (sequence >> 32).to(tl.uint32))
    return (((w0.to(tl.uint64) << 32) | w1.to(tl.uint64)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _ordered(x):
    """Return an int64 that increases with the float."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64)
        rest = 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int64)
        rest = 0x7FFF
    return tl.where(bits < 0, bits ^ rest, bits)


@triton.jit
def _float_of(ordered, DTYPE: tl.constexpr):
    """Return the float of DTYPE with this `_ordered` value, as float32."""
    if DTYPE.primitive_bitwidth == 32:
        x = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        x = tl.where(ordered < 0, ordered ^ 0x7FFF, ordered).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _logits(row, at, vocab):
    return tl.load(row + at, at < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _mass(row, vocab, top, factor, limit, BLOCK: tl.constexpr):
    """Return the sum of e^((u - top) factor) over the logits not below the limit; a NaN logit makes it NaN."""
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        u = _logits(row, start + tl.arange(0, BLOCK), vocab)
        mass += tl.where(u < limit, 0, tl.exp((u - top) * factor)).to(tl.float64)
    return tl.sum(mass)


@triton.jit
def _search(row, vocab, top, factor, limit, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest x for which the logits >= x have a total weight of at least `target`; `limit` if there is none above.

    The weight of a logit is 1 (COUNT) or e^((u - top) factor).
    """
    DTYPE: tl.constexpr = row.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if COUNT else tl.float64
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    found, above = _ordered(limit.to(DTYPE)), _ordered(top.to(DTYPE)) + 1
    for step in range(0, BITS, 2):
        stride = tl.full((), 1, tl.int64) << (BITS - 2 - step)
        a = _float_of(tl.minimum(found + stride, above), DTYPE)
        b = _float_of(tl.minimum(found + 2 * stride, above), DTYPE)
        c = _float_of(tl.minimum(found + 3 * stride, above), DTYPE)
        mass_a, mass_b, mass_c = tl.zeros([BLOCK], SUM), tl.zeros([BLOCK], SUM), tl.zeros([BLOCK], SUM)
        for start in range(0, vocab, BLOCK):
            u = _logits(row, start + tl.arange(0, BLOCK), vocab)
            weight = (tl.full([BLOCK], 1, SUM) if COUNT else tl.exp((u - top) * factor)).to(SUM)
            mass_a += tl.where(u >= a, weight, 0)
            mass_b += tl.where(u >= b, weight, 0)
            mass_c += tl.where(u >= c, weight, 0)
        reached = (tl.sum(mass_a) >= target).to(tl.int64) + (tl.sum(mass_b) >= target) + (tl.sum(mass_c) >= target)
        found += stride * reached
    return _float_of(found, DTYPE)


@triton.jit
def look_up(row, vocab, top, factor, limit, target, BLOCK: tl.constexpr):
    """Return the first kept token at which the cumulative mass exceeds `target`.

    If rounding makes `target` at least the total mass, return the last token with a positive mass.
    """
    before = tl.zeros_like(target)
    before_hit, hit, passed = before, 0, before > target
    for start in range(0, vocab, BLOCK):
        u = _logits(row, start + tl.arange(0, BLOCK), vocab)
        mass = tl.sum(tl.where(u < limit, 0, tl.exp((u - top) * factor)).to(tl.float64))
        closer = (mass > 0) & (passed == 0)
        hit, before_hit = tl.where(closer, start, hit), tl.where(closer, before, before_hit)
        before += mass
        passed = passed | (before > target)
    at = hit + tl.arange(0, BLOCK)
    u = _logits(row, at, vocab)
    weight = tl.where(u < limit, 0, tl.exp((u - top) * factor)).to(tl.float64)
    beyond = (weight > 0) & (before_hit + tl.cumsum(weight) > target)
    first, last = tl.min(tl.where(beyond, at, vocab)), tl.max(tl.where(weight > 0, at, 0))
    return tl.where(first < vocab, first, last)


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "log_min_p", "seed"])
def _sample(
    logits, temperatures, sequence, position,  # (B, V), (B,) or None, (B,), (B,)
    ids, logprobs, sampling_logprobs,  # (B,)
    vocab, row_stride, temperature, top_k, top_p: tl.float64, log_min_p, seed: tl.int64,
    HAS_TEMPERATURES: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    factor = tl.div_rn(1.0, tl.load(temperatures + r) if HAS_TEMPERATURES else tl.cast(temperature, tl.float32))
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        tops = tl.maximum(tops, _logits(row, start + tl.arange(0, BLOCK), vocab))
    top = tl.max(tops)
    limit = tl.zeros_like(top) + float("-inf")
    total = _mass(row, vocab, top, factor, limit, BLOCK)
    kept = total
    if HAS_TOP_K:
        limit = _search(row, vocab, top, factor, limit, top_k, True, BLOCK)
    if HAS_TOP_P:
        largest = _mass(row, vocab, top, factor, limit, BLOCK) if HAS_TOP_K else total
        limit = _search(row, vocab, top, factor, limit, top_p * largest, False, BLOCK)
    if HAS_MIN_P:
        limit = tl.maximum(limit, top + tl.div_rn(log_min_p, factor))
    if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
        kept = _mass(row, vocab, top, factor, limit, BLOCK)
    number = uniform(seed, tl.load(sequence + r), tl.load(position + r))
    id = look_up(row, vocab, top, factor, limit, number * kept, BLOCK)
    # Without a positive and finite mass there is no distribution to sample from.
    sound = (total > 0) & (total < float("inf"))
    log_weight = (tl.load(row + id).to(tl.float64) - top) * factor
    tl.store(ids + r, tl.where(sound, id, 0).to(tl.int64))
    tl.store(logprobs + r, tl.where(sound, log_weight - tl.log(total), float("nan")).to(tl.float32))
    tl.store(sampling_logprobs + r, tl.where(sound, log_weight - tl.log(kept), float("nan")).to(tl.float32))


def sample_tokens(
    logits: Tensor,  # (B, V), unit stride along V
    temperature: float,
    temperatures: Tensor | None,  # (B,), float32
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor,  # (B,), int64
    position: Tensor,  # (B,), int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probs and sampling log-probs, one program per row."""
    b, v = logits.shape
    out = [torch.empty(b, dtype=dtype, device=logits.device) for dtype in (torch.int64, torch.float32, torch.float32)]
    if b:
        with torch.cuda.device_of(logits):
            _sample[(b,)](
                logits, temperatures, sequence, position, *out, v, logits.stride(0),
                temperature, top_k, top_p, math.log(min_p) if min_p else 0.0, seed,
                HAS_TEMPERATURES=temperatures is not None, HAS_TOP_K=0 < top_k < v, HAS_TOP_P=top_p < 1, HAS_MIN_P=min_p > 0,
                **LAUNCH,
            )  # fmt: skip
    ids, logprobs, sampling_logprobs = out
    return ids, logprobs, sampling_logprobs

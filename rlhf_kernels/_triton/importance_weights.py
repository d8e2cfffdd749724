# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Importance weights, the tokens that remain, and the metrics, in one pass over the tokens.

One program processes a segment: a tile of tokens, or a whole sequence where the ratio is one number per sequence. It stores
partial sums, from which a second launch of one program computes the metrics. The order of all sums is fixed.

Legend: N tokens, B sequences, S segments.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_args import Sequences
from ..token_args import (
    IMPORTANCE_ACTIONS,
    IMPORTANCE_LEVELS,
    IMPORTANCE_METRICS,
    IMPORTANCE_STATISTICS,
    LOG_RATIO_BOUND,
)
from .math import exp, expm1_minus_x, kl_value
from .scan import span

TILE, WARPS = 1024, 4
_TOKEN, _, _GEOMETRIC = (tl.constexpr(i) for i in range(len(IMPORTANCE_LEVELS)))
_MASK = tl.constexpr(IMPORTANCE_ACTIONS.index("mask"))
_RATIO = tl.constexpr(IMPORTANCE_STATISTICS.index("ratio"))
_LIMIT, _TILE = tl.constexpr(LOG_RATIO_BOUND), tl.constexpr(TILE)

# Rows of the partial sums: over units (tokens or sequences), over tokens, and maxima.
(
    _WEIGHT, _WEIGHT_SQ, _CHI2, _BELOW, _ABOVE, _UNITS, _REJECTED, _MISMATCH_KL, _MISMATCH_K3, _TOKENS, _WEIGHT_MAX,
    _MISMATCH_MAX,
) = map(tl.constexpr, range(12))  # fmt: skip
NUM_SUMS = 12


@triton.jit
def _limited(d):
    """Return the log-ratio within the limits that keep its exponential finite. NaN stays NaN."""
    return tl.where(d > _LIMIT, _LIMIT, tl.where(d < -_LIMIT, -_LIMIT, d))


@triton.jit
def _kl(d, STATISTIC: tl.constexpr):
    """Return the estimate of KL(sampler || policy) for d = logprob - sampler logprob; 0 for `ratio`, which needs none."""
    value = tl.zeros_like(d)
    if STATISTIC != _RATIO:
        value = kl_value(-_limited(d), STATISTIC - 1)
    return value


@triton.jit
def _unit(log_ratio, kl, low, high, ACTION: tl.constexpr, STATISTIC: tl.constexpr):
    """Return (ratio, bounded ratio, below, above, outside) of a token or of a sequence."""
    ratio = exp(_limited(log_ratio))
    found = kl
    if STATISTIC == _RATIO:
        found = ratio
    weight = ratio
    if ACTION != _MASK:
        weight = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    inside = (found >= low) & (found <= high)
    return ratio, weight, found < low, found > high, inside == 0


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers, or NaN if one of them is NaN."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _largest(x):
    """Return the largest of non-negative numbers, or NaN if one is NaN, which a plain reduction does not guarantee."""
    nan = x != x
    return tl.where(tl.max(nan.to(tl.int32)) > 0, float("nan"), tl.max(tl.where(nan, 0, x))).to(tl.float64)


@triton.jit
def _store_units(parts, i, segments, ratio, weight, below, above, on):
    """Store the sums over the units of a segment, which are the places where `on`."""
    ratio, weight = tl.where(on, ratio, 1).to(tl.float64), tl.where(on, weight, 0).to(tl.float64)
    tl.store(parts + _WEIGHT * segments + i, tl.sum(weight))
    tl.store(parts + _WEIGHT_SQ * segments + i, tl.sum(weight * weight))
    tl.store(parts + _CHI2 * segments + i, tl.sum(ratio * ratio - 1))
    tl.store(parts + _BELOW * segments + i, tl.sum((below & on).to(tl.float64)))
    tl.store(parts + _ABOVE * segments + i, tl.sum((above & on).to(tl.float64)))
    tl.store(parts + _UNITS * segments + i, tl.sum(on.to(tl.float64)))
    tl.store(parts + _WEIGHT_MAX * segments + i, _largest(weight))


@triton.jit
def _load(logprobs, sampler_logprobs, mask, start, end):
    """Return (places, which exist, which are unmasked, log-ratios) of a tile; a masked log-ratio is 0."""
    at = start + tl.arange(0, _TILE)
    live = at < end
    on = live & tl.load(mask + at, live, other=0)
    return at, live, on, tl.load(logprobs + at, on, other=0) - tl.load(sampler_logprobs + at, on, other=0)


@triton.jit
def _of_sequence(logprobs, sampler_logprobs, mask, begin, end, LEVEL: tl.constexpr, STATISTIC: tl.constexpr):
    """Return the log-ratio, the KL and the number of unmasked tokens of a sequence."""
    log_ratio, kl, count = tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64)
    for start in range(begin, end, _TILE):
        _, _, on, d = _load(logprobs, sampler_logprobs, mask, start, end)
        log_ratio += d.to(tl.float64)
        kl += tl.where(on, _kl(d, STATISTIC), 0).to(tl.float64)
        count += on.to(tl.float64)
    actions = tl.sum(count)
    divisor = tl.maximum(actions, 1) if LEVEL == _GEOMETRIC else 1
    return (tl.sum(log_ratio) / divisor).to(tl.float32), (tl.sum(kl) / divisor).to(tl.float32), actions


@triton.jit
def _rejects(advantages, at, on, outside, ACTION: tl.constexpr):
    """Return which tokens are rejected; with advantages, only those with a negative one."""
    rejected = outside & on
    if ACTION != _MASK:
        rejected = rejected & (at < 0)  # none
    elif advantages is not None:
        rejected = rejected & (tl.load(advantages + at, on, other=0) < 0)
    return rejected


@triton.jit(
    do_not_specialize=["n", "length", "segments", "low", "high"],
    do_not_specialize_on_alignment=["logprobs", "sampler_logprobs", "mask", "advantages"],
)
def _kernel(
    logprobs, sampler_logprobs, mask, advantages, cu_seqlens, weights, kept, parts, n, length, segments, low, high,
    LEVEL: tl.constexpr, ACTION: tl.constexpr, STATISTIC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    if LEVEL == _TOKEN:
        begin, end = i * _TILE, tl.minimum(i * _TILE + _TILE, n)
    else:
        begin, size = span(cu_seqlens, n, length, i)
        end = begin + size
        log_ratio, kl, actions = _of_sequence(logprobs, sampler_logprobs, mask, begin, end, LEVEL, STATISTIC)
        same = tl.zeros([_TILE], tl.float32)
        ratio, weight, below, above, outside = _unit(log_ratio + same, kl + same, low, high, ACTION, STATISTIC)
        counted = tl.where(outside, 0, weight) if ACTION == _MASK else weight
        first = tl.where(tl.arange(0, _TILE) == 0, actions, 0) > 0
        _store_units(parts, i, segments, ratio, counted, below, above, first)
    rejections, k1, k3 = tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64)
    tokens, apart = tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float32)
    for start in range(begin, end, _TILE):
        at, live, on, d = _load(logprobs, sampler_logprobs, mask, start, end)
        if LEVEL == _TOKEN:
            ratio, weight, below, above, outside = _unit(d, _kl(d, STATISTIC), low, high, ACTION, STATISTIC)
        rejected = _rejects(advantages, at, on, outside, ACTION)
        remaining = tl.where(rejected, 0, weight)
        tl.store(weights + at, tl.where(on, remaining, 0), live)
        tl.store(kept + at, on & (rejected == 0), live)
        if LEVEL == _TOKEN:
            _store_units(parts, i, segments, ratio, remaining, below, above, on)
        rejections += rejected.to(tl.float64)
        k1 -= d.to(tl.float64)
        k3 += tl.where(on, expm1_minus_x(_limited(d)), 0).to(tl.float64)
        tokens += on.to(tl.float64)
        apart = _larger(apart, tl.abs(d))
    tl.store(parts + _REJECTED * segments + i, tl.sum(rejections))
    tl.store(parts + _MISMATCH_KL * segments + i, tl.sum(k1))
    tl.store(parts + _MISMATCH_K3 * segments + i, tl.sum(k3))
    tl.store(parts + _TOKENS * segments + i, tl.sum(tokens))
    tl.store(parts + _MISMATCH_MAX * segments + i, _largest(apart))


@triton.jit
def _add_up(parts, k, segments):
    total = tl.zeros([_TILE], tl.float64)
    for start in range(0, segments, _TILE):
        at = start + tl.arange(0, _TILE)
        total += tl.load(parts + k * segments + at, at < segments, other=0)
    return tl.sum(total)


@triton.jit
def _maximum(parts, k, segments):
    total = tl.zeros([_TILE], tl.float64)
    for start in range(0, segments, _TILE):
        at = start + tl.arange(0, _TILE)
        total = _larger(total, tl.load(parts + k * segments + at, at < segments, other=0))
    return _largest(total)


@triton.jit(do_not_specialize=["segments"])
def _metrics_kernel(parts, metrics, segments):
    """Store the metrics in the order of `IMPORTANCE_METRICS`; without tokens all are 0."""
    counted, tokens = _add_up(parts, _UNITS, segments), _add_up(parts, _TOKENS, segments)
    units, of_tokens = tl.maximum(counted, 1), tl.maximum(tokens, 1)
    weight, squares = _add_up(parts, _WEIGHT, segments), _add_up(parts, _WEIGHT_SQ, segments)
    tl.store(metrics, tl.where(squares == 0, 0, weight * weight / tl.where(squares == 0, 1, squares * units)))
    tl.store(metrics + 1, _add_up(parts, _CHI2, segments) / units)
    tl.store(metrics + 2, _add_up(parts, _MISMATCH_KL, segments) / of_tokens)
    tl.store(metrics + 3, _add_up(parts, _MISMATCH_K3, segments) / of_tokens)
    tl.store(metrics + 4, _maximum(parts, _MISMATCH_MAX, segments))
    tl.store(metrics + 5, _add_up(parts, _REJECTED, segments) / of_tokens)
    tl.store(metrics + 6, _add_up(parts, _BELOW, segments) / units)
    tl.store(metrics + 7, _add_up(parts, _ABOVE, segments) / units)
    tl.store(metrics + 8, weight / units)
    tl.store(metrics + 9, _maximum(parts, _WEIGHT_MAX, segments))
    tl.store(metrics + 10, tokens)


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    sequences: Sequences,
    level: int,
    action: int,
    statistic: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check `cu_seqlens` on a CPU only; on a GPU, at the levels of sequences, a token of no sequence gets a NaN weight."""
    sequences.check_on_cpu(logprobs)
    packed, tiles = sequences.cu_seqlens is not None, level == _TOKEN.value
    weights, kept = torch.empty_like(logprobs), torch.empty_like(mask)
    if packed and not tiles:
        weights.fill_(math.nan)
        kept.copy_(mask)
    n = logprobs.numel()
    segments = triton.cdiv(n, TILE) if tiles else sequences.count
    parts = torch.empty(NUM_SUMS, segments, dtype=torch.float64, device=logprobs.device)
    metrics = torch.empty(len(IMPORTANCE_METRICS), dtype=torch.float32, device=logprobs.device)
    with torch.cuda.device_of(logprobs):
        if segments:
            _kernel[(segments,)](
                logprobs, sampler_logprobs, mask, advantages, sequences.cu_seqlens, weights, kept, parts,
                n, sequences.length, segments, float(low), float(high),
                LEVEL=level, ACTION=action, STATISTIC=statistic, num_warps=WARPS,
            )  # fmt: skip
        _metrics_kernel[(1,)](parts, metrics, segments, num_warps=WARPS)
    return weights, kept, metrics

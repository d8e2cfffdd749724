# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""The PPO objective on per-token arrays: sums for the loss and the metrics, slopes for the gradients.

One program processes a segment: a tile of tokens, or a whole sequence where the ratio is one number per sequence. It stores
partial sums, which a second launch adds in a fixed order, so that the bits do not depend on the order of the programs.

Legend: N tokens, B sequences, S segments.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._native import NUM_SUMS
from ..launch_args import SUMS, PpoRows, Sequences
from .math import expm1_minus_x, objective_term, scalars_of, sequence_part, value_term
from .scan import registers

# A thread has 2 tokens with about twenty live numbers each. Without a limit, ptxas spills a few to fit one more program.
TILE, WARPS = 1024, 16
LAUNCH = {"num_warps": WARPS, **registers(128)}
(
    _POLICY, _REF_KL_TERM, _ENTROPY_TERM, _VALUE_TERM, _ENTROPY, _CLIPPED, _DUAL_CLIPPED, _APPROX_KL, _K3, _RATIO, _REF_KL,
    _ACTIVE, _NUM_TOKENS, _VALUE_CLIPPED, _NUM_VALUE_TOKENS, _RETURNS, _RETURNS_SQ, _RESIDUAL, _RESIDUAL_SQ, _RATIO_MAX,
) = map(tl.constexpr, range(len(SUMS)))  # fmt: skip
_LANES, _NUM_SUMS, _TILE = tl.constexpr(32), tl.constexpr(NUM_SUMS), tl.constexpr(TILE)


@triton.jit
def _add(sums, k: tl.constexpr, x):
    """Return `sums` with the float64 sum of `x` added to the k-th of them."""
    return tl.where(tl.arange(0, _LANES) == k, sums + tl.sum(x.to(tl.float64)), sums)


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers, or NaN if one of them is NaN."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _largest(x):
    """Return the largest of non-negative numbers, or NaN if one is NaN, which a plain reduction does not guarantee."""
    nan = x != x
    return tl.where(tl.max(nan.to(tl.int32)) > 0, float("nan"), tl.max(tl.where(nan, 0, x)))


@triton.jit
def _optional(x, at, on, HAS: tl.constexpr):
    """Load `x` at `at`; 1 where the tensor is absent."""
    return tl.load(x + at, on, other=0) if HAS else tl.full(at.shape, 1, tl.float32)


@triton.jit
def _segment(i, n, length, cu_seqlens, PACKED: tl.constexpr, SEQUENCE_LEVEL: tl.constexpr):
    """Return the bounds [begin, end) of a program's tokens, clamped to [0, n] in case `cu_seqlens` is wrong."""
    if not SEQUENCE_LEVEL:
        begin, end = i * _TILE, i * _TILE + _TILE
    elif PACKED:
        begin, end = tl.load(cu_seqlens + i).to(tl.int64), tl.load(cu_seqlens + i + 1).to(tl.int64)
    else:
        begin, end = i * length, i * length + length
    return tl.maximum(begin, 0), tl.minimum(end, n)


@triton.jit
def _sequence_ratio(
    begin, end, mask, logprobs, old_logprobs, advantages, weights, ref_logprobs, row_weight, scalars,
    HAS_WEIGHTS: tl.constexpr, HAS_REF: tl.constexpr, HAS_ROW_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Return the log-ratio of a sequence (the mean over its actions) and each action's slope through it (GSPO eq. 7)."""
    total, count = tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64)
    for start in range(begin, end, _TILE):
        at = start + tl.arange(0, _TILE)
        live = at < end
        on = live & tl.load(mask + at, live, other=0)
        d = tl.load(logprobs + at, on, other=0) - tl.load(old_logprobs + at, on, other=0)
        part, _ = sequence_part(d, tl.load(advantages + at, on, other=0), scalars)
        total += tl.where(on, part.to(tl.float64), 0)
        count += on.to(tl.float64)
    actions = tl.maximum(tl.sum(count), 1)
    mean = (tl.sum(total) / actions).to(tl.float32)
    slopes = tl.zeros([_TILE], tl.float64)
    for start in range(begin, end, _TILE):
        at = start + tl.arange(0, _TILE)
        live = at < end
        on = live & tl.load(mask + at, live, other=0)
        weight = _optional(row_weight, at, on, HAS_ROW_WEIGHT).to(tl.float64)
        logprob, old = tl.load(logprobs + at, on, other=0), tl.load(old_logprobs + at, on, other=0)
        _, _, _, _, _, _, slope, _ = objective_term(
            mean + tl.zeros_like(logprob), logprob, old, tl.load(advantages + at, on, other=0),
            _optional(weights, at, on, HAS_WEIGHTS), _optional(ref_logprobs, at, on, HAS_REF), scalars, HAS_REF,
        )  # fmt: skip
        slopes += tl.where(on, weight * slope, 0)
    return mean, tl.sum(slopes) / actions


@triton.jit
def _values(
    sums, begin, end, value_mask, values, old_values, returns, value_row_weight, value_slope, scalars,
    HAS_OLD_VALUES: tl.constexpr, HAS_VALUE_ROW_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Write the value slopes of a segment's tokens; return the sums with its value terms."""
    for start in range(begin, end, _TILE):
        at = start + tl.arange(0, _TILE)
        live = at < end
        on = live & tl.load(value_mask + at, live, other=0)
        value, target = tl.load(values + at, on, other=0), tl.load(returns + at, on, other=0)
        # Without old values nothing is clipped: the range is infinite.
        old = tl.load(old_values + at, on, other=0) if HAS_OLD_VALUES else tl.zeros_like(value)
        cliprange_value = scalars.cliprange_value if HAS_OLD_VALUES else float("inf")
        weight = _optional(value_row_weight, at, on, HAS_VALUE_ROW_WEIGHT).to(tl.float64)
        loss, slope, clipped = value_term(value, old, target, cliprange_value)
        tl.store(value_slope + at, tl.where(on, (weight * slope).to(tl.float32), 0), live)
        target = target.to(tl.float64)
        error = target - value
        sums = _add(sums, _VALUE_TERM, tl.where(on, weight * loss, 0))
        sums = _add(sums, _VALUE_CLIPPED, clipped & on)
        sums = _add(sums, _NUM_VALUE_TOKENS, on)
        sums = _add(sums, _RETURNS, tl.where(on, target, 0))
        sums = _add(sums, _RETURNS_SQ, tl.where(on, target * target, 0))
        sums = _add(sums, _RESIDUAL, tl.where(on, error, 0))
        sums = _add(sums, _RESIDUAL_SQ, tl.where(on, error * error, 0))
    return sums


# Some of these are rows of `RowStats.buffer`, which start at any multiple of N, so their alignment varies.
_TOKENS = [
    "mask", "logprobs", "old_logprobs", "advantages", "weights", "ref_logprobs", "row_weight", "entropy", "value_mask",
    "values", "old_values", "returns", "value_row_weight",
]  # fmt: skip


@triton.jit(
    do_not_specialize=["n", "length", "segments"],
    do_not_specialize_on_alignment=_TOKENS,
)
def _partials(
    mask, logprobs, old_logprobs, advantages, weights, ref_logprobs, row_weight, entropy,
    value_mask, values, old_values, returns, value_row_weight, cu_seqlens,
    slope_out, value_slope_out, partials,  # (N,), (N,), (NUM_SUMS, S)
    n, length, segments, scalars,
    SEQUENCE_LEVEL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_REF: tl.constexpr, HAS_ROW_WEIGHT: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_OLD_VALUES: tl.constexpr, HAS_VALUE_ROW_WEIGHT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    begin, end = _segment(i, n, length, cu_seqlens, PACKED, SEQUENCE_LEVEL)
    if SEQUENCE_LEVEL:
        mean, spread = _sequence_ratio(
            begin, end, mask, logprobs, old_logprobs, advantages, weights, ref_logprobs, row_weight, scalars,
            HAS_WEIGHTS, HAS_REF, HAS_ROW_WEIGHT,
        )  # fmt: skip
    sums, ratio_max = tl.zeros([_LANES], tl.float64), tl.zeros([_TILE], tl.float32)
    for start in range(begin, end, _TILE):
        at = start + tl.arange(0, _TILE)
        live = at < end
        on = live & tl.load(mask + at, live, other=0)
        logprob, old = tl.load(logprobs + at, on, other=0), tl.load(old_logprobs + at, on, other=0)
        advantage, d = tl.load(advantages + at, on, other=0), logprob - old
        weight = _optional(row_weight, at, on, HAS_ROW_WEIGHT)
        importance = _optional(weights, at, on, HAS_WEIGHTS)
        loss, ratio, clipped, dual_clipped, kl, kl_term, ratio_slope, own_slope = objective_term(
            mean + tl.zeros_like(d) if SEQUENCE_LEVEL else d, logprob, old, advantage, importance,
            _optional(ref_logprobs, at, on, HAS_REF), scalars, HAS_REF,
        )  # fmt: skip
        wide = weight.to(tl.float64)
        through_ratio = (weight * ratio_slope).to(tl.float64)
        if SEQUENCE_LEVEL:
            _, apart = sequence_part(d, advantage, scalars)
            through_ratio, clipped = tl.where(apart, 0.0, spread), clipped | apart
        slope = through_ratio + wide * own_slope
        if HAS_REF:
            sums = _add(sums, _REF_KL, tl.where(on, kl, 0))
            sums = _add(sums, _REF_KL_TERM, tl.where(on, wide * kl_term, 0))
        slope = tl.where(on, slope.to(tl.float32), 0)
        tl.store(slope_out + at, slope, live)
        active = slope != 0
        if HAS_ENTROPY:
            h = tl.load(entropy + at, on, other=0).to(tl.float64)
            sums = _add(sums, _ENTROPY, tl.where(on, h, 0))
            sums = _add(sums, _ENTROPY_TERM, tl.where(on, wide * h, 0))
            active = active | (scalars.entropy_coef * weight != 0)
        sums = _add(sums, _ACTIVE, active & on)
        sums = _add(sums, _POLICY, tl.where(on, wide * importance * loss, 0))
        sums = _add(sums, _CLIPPED, clipped & on)
        sums = _add(sums, _DUAL_CLIPPED, dual_clipped & on)
        sums = _add(sums, _APPROX_KL, tl.where(on, -d, 0))
        sums = _add(sums, _K3, tl.where(on, expm1_minus_x(d), 0))
        sums = _add(sums, _RATIO, tl.where(on, ratio, 0))
        sums = _add(sums, _NUM_TOKENS, on)
        ratio_max = _larger(ratio_max, tl.where(on, ratio, 0))
    if HAS_VALUES:
        sums = _values(
            sums, begin, end, value_mask, values, old_values, returns, value_row_weight, value_slope_out, scalars,
            HAS_OLD_VALUES, HAS_VALUE_ROW_WEIGHT,
        )  # fmt: skip
    sums = tl.where(tl.arange(0, _LANES) == _RATIO_MAX, _largest(ratio_max).to(tl.float64), sums)
    lane = tl.arange(0, _LANES)
    tl.store(partials + lane * segments + i, sums, lane < _NUM_SUMS)


@triton.jit(do_not_specialize=["segments"])
def _add_up(partials, sums, segments):
    """Add the partials of one sum per program in a fixed order."""
    k = tl.program_id(0).to(tl.int64)
    total = tl.zeros([_TILE], tl.float64)
    for start in range(0, segments, _TILE):
        at = start + tl.arange(0, _TILE)
        part = tl.load(partials + k * segments + at, at < segments, other=0)
        total = tl.where(k == _RATIO_MAX, _larger(total, part), total + part)
    tl.store(sums + k, tl.where(k == _RATIO_MAX, _largest(total), tl.sum(total)))


def ppo_loss(
    ppo: PpoRows,
    sequences: Sequences,
    sequence_level: bool,
    mask: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_mask: Tensor,
    value_row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check `cu_seqlens` on a CPU only; on a GPU with sequence-level ratios, a token of no sequence gets a NaN slope."""
    n, packed = logprobs.numel(), sequences.cu_seqlens is not None
    sequences.check_on_cpu(logprobs)
    slope = torch.empty_like(logprobs)
    value_slope = torch.empty_like(logprobs if values is not None else logprobs[:0])
    if sequence_level and packed:
        slope.fill_(math.nan)
        value_slope.fill_(math.nan)
    segments = sequences.count if sequence_level else triton.cdiv(n, TILE)
    partials = torch.empty(NUM_SUMS, segments, dtype=torch.float64, device=logprobs.device)
    sums = torch.empty(NUM_SUMS, dtype=torch.float64, device=logprobs.device)
    if segments:
        with torch.cuda.device_of(logprobs):
            _partials[(segments,)](
                mask, logprobs, ppo.old_logprobs, ppo.advantages, ppo.weights, ppo.ref_logprobs, ppo.row_weight, entropy,
                value_mask, values, old_values, returns, value_row_weight, sequences.cu_seqlens,
                slope, value_slope, partials, n, sequences.length, segments, scalars_of(ppo.scalars),
                SEQUENCE_LEVEL=sequence_level, PACKED=packed,
                HAS_WEIGHTS=ppo.weights is not None, HAS_REF=ppo.ref_logprobs is not None,
                HAS_ROW_WEIGHT=ppo.row_weight is not None, HAS_ENTROPY=entropy is not None,
                HAS_VALUES=values is not None, HAS_OLD_VALUES=old_values is not None,
                HAS_VALUE_ROW_WEIGHT=value_row_weight is not None, **LAUNCH,
            )  # fmt: skip
    with torch.cuda.device_of(logprobs):
        _add_up[(NUM_SUMS,)](partials, sums, segments, num_warps=WARPS)
    return slope, value_slope, sums

"""Formulas of the kernels and their derivatives, used by all Triton kernels; csrc/math has the same formulas in C++.

The kernels receive the objective's scalars as one named tuple, see `scalars_of`. All formulas are elementwise and apply to
scalars and blocks. Legend: u raw logit, w logit before the temperature, z logit.
"""

import triton
import triton.language as tl

from .._options import KL_ESTIMATORS, KL_WEIGHTINGS, OBJECTIVES
from ..launch_args import CHOICES, KernelScalars, PpoScalars

CLIP, KL_PENALTY, RATIO, POLICY_GRADIENT, CISPO, SAPO, IPO, DPPO_TV, DPPO_KL, GSPO_TOKEN, GMPO = map(
    tl.constexpr, range(len(OBJECTIVES))
)
BY_RATIO = tl.constexpr(KL_WEIGHTINGS.index("ratio"))
K1, K2, K3 = (tl.constexpr(KL_ESTIMATORS.index(name)) for name in ("k1", "k2", "k3"))

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
EXP2_LOW = tl.constexpr(-126.0)
"""Below this exponent 2^t is subnormal. `2^t * max(t, EXP2_LOW)` is 0 where t is -inf, and `2^t * t` would be NaN."""


@triton.jit
def exp(x):
    """Return e^x of a per-token number, computed in float64 and rounded once.

    The hardware's float32 exp rounds x log2(e) first, which is a relative error of |x| eps.
    """
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, by a polynomial near 0, where `1 - 2 e^-2x / (1 + e^-2x)` would cancel.

    The interpreter has no tanh.
    """
    x2 = x * x
    p = x2 * -5.70498872745e-3 + 2.06390887954e-2
    p = p * x2 - 5.37397155531e-2
    p = p * x2 + 1.33314422036e-1
    p = p * x2 - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    big = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, p * x2 * x + x, tl.where(x < 0, -big, big))


# ---- the logit transform: z = softcap * tanh(logit_scale * u / softcap) / temperature -------------------------------


@triton.jit
def capped_logit(u, softcap, inner, HAS_CAP: tl.constexpr):
    """Return w: `softcap * tanh(inner * u)`, or u without a softcap; z = w * factor."""
    w = u
    if HAS_CAP:
        w = softcap * tanh(u * inner)
    return w


@triton.jit
def wide(x):
    """Return a scalar in float64. In the interpreter it is a plain Python number, which a cast would round to float32 first."""
    return x + tl.zeros([], tl.float64)


@triton.jit
def factor_of(temperature, logit_scale, HAS_CAP: tl.constexpr):
    """Return z / w in float64."""
    scale = 1.0 if HAS_CAP else logit_scale
    return wide(scale) / wide(temperature)


@triton.jit
def cap_of(softcap, logit_scale, HAS_CAP: tl.constexpr):
    """Return the softcap and `logit_scale / softcap`, in float32."""
    inner = 0.0
    if HAS_CAP:
        inner = (wide(logit_scale) / wide(softcap)).to(tl.float32)
    return tl.cast(softcap, tl.float32), inner


@triton.jit
def capped_logit_slope(u, inner, outer, HAS_CAP: tl.constexpr):
    """Return dz / du, where `outer` is its value at tanh' = 1. `1 - tanh^2` would cancel where tanh is near 1."""
    slope = outer
    if HAS_CAP:
        e = tl.exp(-2.0 * tl.abs(u * inner))
        slope = outer * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return slope


# ---- KL of one token (Schulman 2020, "Approximating KL divergence") --------------------------------------------------


@triton.jit
def expm1_minus_x(x):
    """Return `e^x - 1 - x` without cancellation near 0: up to |x| = 1 by the series x^k / k!, k from 12 down to 2."""
    p = x * 2.0876757e-9 + 2.5052108e-8
    p = p * x + 2.7557319e-7
    p = p * x + 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    p = p * x + 0.5
    return tl.where(tl.abs(x) <= 1.0, p * x * x, exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """Return `e^x - 1` without cancellation near 0."""
    return tl.where(tl.abs(x) <= 1.0, expm1_minus_x(x) + x, exp(x) - 1.0)


@triton.jit
def kl_value(d, KL: tl.constexpr):
    """Return the estimate of KL(policy || reference) from d = logprob - ref_logprob."""
    if KL == K1:
        value = d
    elif KL == K2:
        value = 0.5 * d * d
    elif KL == K3:
        value = expm1_minus_x(-d)
    else:
        value = tl.abs(d)
    return value


@triton.jit
def kl_slope(d, KL: tl.constexpr):
    """Return d KL / d logprob."""
    if KL == K1:
        slope = tl.where(d == d, 1.0, d)
    elif KL == K2:
        slope = d
    elif KL == K3:
        slope = -expm1(-d)
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    return slope


# ---- the objective of one token --------------------------------------------------------------------------------------


def scalars_of(scalars: PpoScalars) -> KernelScalars:
    """Return the scalars as a kernel argument: the kernel is compiled for these choices and for any numbers.

    The result is a plain `KernelScalars`, because Triton does not know the fields of a class that inherits from a named tuple.
    """
    choices = {name: tl.constexpr(getattr(scalars, name)) for name in CHOICES}
    return KernelScalars(**(scalars._asdict() | choices))


@triton.jit
def bounded(x, low, high):
    """Return `x` limited to [low, high]. A NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def binary_kl(old_logprob, logprob):
    """Return KL(old || new) of the choice between the sampled token and any other (DPPO, eq. 14).

    1e-8 keeps it finite for a probability of 1.
    """
    old_rest, rest = -expm1(old_logprob), -expm1(logprob)
    others = old_rest * tl.log((old_rest + 1e-8).to(tl.float64) / (rest + 1e-8)).to(tl.float32)
    return exp(old_logprob) * (old_logprob - logprob) + others


@triton.jit
def is_outside(logprob, old_logprob, a, p):
    """Return whether the token is outside the trust region of ipo or dppo."""
    moved = exp(logprob) - exp(old_logprob)
    if p.objective == IPO:
        outside = tl.abs(moved) > p.divergence
    else:
        limit, away = tl.where(a > 0, p.divergence_high, p.divergence), tl.where(a > 0, moved, -moved)
        if p.objective == DPPO_TV:
            outside = away > limit
        else:
            outside = (away > 0) & (binary_kl(old_logprob, logprob) > limit)
    return outside


@triton.jit
def surrogate(log_ratio, logprob, old_logprob, a, p):
    """Return (loss, slope, own, ratio, live, clipped, dual clipped) of the policy term; `p` are the scalars.

    The slope is d loss / d log-ratio; own is d loss / d logprob apart from the ratio; live is d ratio / d log-ratio.
    docs/reference/objectives.md has the sources of the formulas.
    """
    # The gradient is 0 outside the clamp, but not at its limits. A NaN stays NaN.
    frozen = tl.abs(log_ratio) > p.log_ratio_clamp
    log_ratio = tl.where(frozen, tl.where(log_ratio < 0, -p.log_ratio_clamp, p.log_ratio_clamp), log_ratio)
    ratio = exp(log_ratio)
    live = tl.where(frozen, 0.0, ratio)
    clipped = ratio < 0  # all False
    dual_clipped = clipped
    loss = -a * ratio
    slope = tl.where(frozen, 0.0, loss)
    own = tl.zeros_like(loss)
    if p.objective == POLICY_GRADIENT:
        loss, slope, own = -a * logprob, own, -a
    elif p.objective == KL_PENALTY:
        loss += p.old_kl_coef * expm1_minus_x(log_ratio)
        slope += tl.where(frozen, 0.0, p.old_kl_coef * expm1(log_ratio))
    elif p.objective == CLIP or p.objective == GSPO_TOKEN:
        clip = -a * bounded(ratio, 1.0 - p.cliprange, 1.0 + p.cliprange_high)
        clipped = clip > loss
        loss = tl.where(clipped, clip, loss)
        dual_clipped = (a < 0) & (-a * p.dual_clip < loss)
        loss = tl.where(dual_clipped, -a * p.dual_clip, loss)
        slope = tl.where(clipped | dual_clipped, 0.0, slope)
    elif p.objective == CISPO:
        factor = bounded(ratio, 1.0 - p.cliprange, 1.0 + p.cliprange_high)
        clipped = factor != ratio
        loss, slope, own = -a * factor * logprob, own, -a * factor
    elif p.objective == SAPO:
        tau = tl.where(a > 0, p.tau_pos, p.tau_neg)
        x = tau * (ratio - 1.0)
        e = exp(-tl.abs(x))
        loss = -a * tl.where(x < 0, e, 1.0) / (1.0 + e) * (4.0 / tau)
        slope = -a * 4.0 * e / ((1.0 + e) * (1.0 + e)) * live
    elif p.objective != RATIO and p.objective != GMPO:  # IPO, DPPO_TV, DPPO_KL
        clipped = is_outside(logprob, old_logprob, a, p)
        loss = tl.where(clipped, 0.0, -a * tl.where(ratio > p.ratio_limit, p.ratio_limit, ratio))
        slope = tl.where(frozen, 0.0, loss + 2.0 * p.log_ratio_coef * log_ratio)
        loss += p.log_ratio_coef * log_ratio * log_ratio
    return loss, slope, own, ratio, live, clipped, dual_clipped


@triton.jit
def sequence_part(log_ratio, a, p):
    """Return what a token contributes to the mean log-ratio of its sequence, and whether it is clipped.

    GMPO limits the log-ratio of each token from above if its advantage is positive, from below otherwise. The sequence's ratio
    does not depend on a clipped token.
    """
    clipped = log_ratio < log_ratio  # all False
    if p.objective == GMPO:
        clipped = tl.where(a > 0, log_ratio > p.cliprange_high, log_ratio < -p.cliprange)
        log_ratio = tl.where(clipped, tl.where(a > 0, p.cliprange_high, -p.cliprange), log_ratio)
    return log_ratio, clipped


@triton.jit
def objective_term(log_ratio, logprob, old_logprob, a, importance, ref_logprob, p, HAS_REF: tl.constexpr):
    """Return (loss, ratio, clipped, dual clipped, KL, KL term, ratio slope, own slope) of one token.

    Nothing is multiplied by the aggregation's weight. The policy loss is not yet multiplied by the importance weight, nor the
    KL term by kl_coef. The ratio slope is d L / d log-ratio, which a sequence-level ratio distributes over its sequence. The
    own slope is d L / d logprob apart from the ratio.
    """
    loss, slope, own, ratio, live, clipped, dual_clipped = surrogate(log_ratio, logprob, old_logprob, a, p)
    ratio_slope, own_slope = importance * slope, importance * own
    kl = tl.zeros_like(loss)
    kl_term = kl
    if HAS_REF:
        apart = logprob - ref_logprob
        kl = kl_value(apart, p.kl_estimator)
        kl_term, of_kl = kl, kl_slope(apart, p.kl_estimator)
        if p.kl_weighting == BY_RATIO:  # DeepSeek-V3.2 (2025), "Unbiased KL Estimate": r KL
            kl_term, of_kl = ratio * kl, ratio * of_kl
            ratio_slope += p.kl_coef * kl * live
        own_slope += p.kl_coef * of_kl
    if p.objective == GSPO_TOKEN:  # the ratio is the sequence's, its gradient the token's
        own_slope, ratio_slope = own_slope + ratio_slope, tl.zeros_like(loss)
    return loss, ratio, clipped, dual_clipped, kl, kl_term, ratio_slope, own_slope


@triton.jit
def value_term(v, old_value, target, cliprange):
    """Return (loss, slope, clipped) of `1/2 max((v - R)^2, (clip(v, old ± range) - R)^2)`; the slope is d loss / d v."""
    error = v - target
    limited = bounded(v, old_value - cliprange, old_value + cliprange) - target
    # A clipped v is outside the range, where the loss does not depend on it.
    clipped = limited * limited > error * error
    worst = tl.where(clipped, limited, error)
    return 0.5 * worst * worst, tl.where(clipped, 0.0, error), clipped

"""Scalar formulas of the kernels and their derivatives; every kernel takes them from here (csrc/math is the C++ twin).

Choices are constexpr numbers: the place in OBJECTIVES and KL_ESTIMATORS of rows.py. Limits that are off come as inf. All
work elementwise, on scalars and blocks. Legend: u raw logit, w logit before the temperature, z logit.
"""

import triton
import triton.language as tl

CLIP, KL_PENALTY, POLICY_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
K1, K2, K3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
EXP2_LOW = tl.constexpr(-126.0)
"""2^t below is subnormal; products of 2^t with max(t, EXP2_LOW) are 0 where t is -inf."""


@triton.jit
def exp(x):
    """e^x of a per-token number, rounded once: the hardware's float32 exp rounds x log2(e), which costs |x| eps."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def tanh(x):
    """Accurate near 0, where `1 - 2 e^-2x / (1 + e^-2x)` would cancel; written out, for the interpreter has no tanh."""
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
    """w: `softcap * tanh(inner * u)`, or u itself without a softcap; z = w * factor."""
    w = u
    if HAS_CAP:
        w = softcap * tanh(u * inner)
    return w


@triton.jit
def wide(x):
    """A scalar in float64. The interpreter has plain numbers, which a cast would round to float32 on their way."""
    return x + tl.zeros([], tl.float64)


@triton.jit
def factor_of(temperature, logit_scale, HAS_CAP: tl.constexpr):
    """z / w, float64."""
    scale = 1.0 if HAS_CAP else logit_scale
    return wide(scale) / wide(temperature)


@triton.jit
def cap_of(softcap, logit_scale, HAS_CAP: tl.constexpr):
    """The softcap and `logit_scale / softcap`, float32."""
    inner = 0.0
    if HAS_CAP:
        inner = (wide(logit_scale) / wide(softcap)).to(tl.float32)
    return tl.cast(softcap, tl.float32), inner


@triton.jit
def capped_logit_slope(u, inner, outer, HAS_CAP: tl.constexpr):
    """dz / du, `outer` where tanh' is 1; `1 - tanh^2` would cancel where tanh is near 1."""
    slope = outer
    if HAS_CAP:
        e = tl.exp(-2.0 * tl.abs(u * inner))
        slope = outer * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return slope


# ---- KL of one token (Schulman 2020, "Approximating KL divergence") --------------------------------------------------


@triton.jit
def expm1_minus_x(x):
    """`e^x - 1 - x` without the cancellation near 0: up to |x| = 1 by the series 1 / k!, k from 12 down to 2."""
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
    return tl.where(tl.abs(x) <= 1.0, expm1_minus_x(x) + x, exp(x) - 1.0)


@triton.jit
def kl_value(d, KL: tl.constexpr):
    """KL(policy || reference) estimated from d = logprob - ref_logprob."""
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
    """d KL / d logprob."""
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


@triton.jit
def surrogate(
    log_ratio,
    logprob,
    a,
    cliprange,
    cliprange_high,
    dual_clip,
    log_ratio_clamp,
    old_kl_coef,
    OBJECTIVE: tl.constexpr,
):
    """(loss, slope, ratio, clipped, dual clipped) of the policy term; the slope is d loss / d log-ratio, that of
    `policy_gradient` d loss / d logprob.

    PPO (2017) eq. 7 with the limits apart (DAPO, eq. 10) and the dual clip (Ye et al. 2020, eq. 5); eq. 8 with the penalty
    estimated by k3 of old against new; TRPO's surrogate; the plain policy gradient.
    """
    # No gradient outside the clamp; its limits themselves still carry one. A NaN stays a NaN.
    frozen = tl.abs(log_ratio) > log_ratio_clamp
    log_ratio = tl.where(frozen, tl.where(log_ratio < 0, -log_ratio_clamp, log_ratio_clamp), log_ratio)
    ratio = exp(log_ratio)
    clipped = ratio < 0  # never
    dual_clipped = clipped
    if OBJECTIVE == POLICY_GRADIENT:
        loss = -a * logprob
        slope = -a
    else:
        loss = -a * ratio
        slope = tl.where(frozen, 0.0, loss)
        if OBJECTIVE == KL_PENALTY:
            loss += old_kl_coef * expm1_minus_x(log_ratio)
            slope += tl.where(frozen, 0.0, old_kl_coef * expm1(log_ratio))
        elif OBJECTIVE == CLIP:
            low, high = 1.0 - cliprange, 1.0 + cliprange_high
            clip = -a * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
            clipped = clip > loss
            loss = tl.where(clipped, clip, loss)
            dual_clipped = (a < 0) & (-a * dual_clip < loss)
            loss = tl.where(dual_clipped, -a * dual_clip, loss)
            slope = tl.where(clipped | dual_clipped, 0.0, slope)
    return loss, slope, ratio, clipped, dual_clipped


@triton.jit
def value_term(v, old_value, target, cliprange):
    """(loss, slope, clipped) of `1/2 max((v - R)^2, (clip(v, old ± range) - R)^2)`; the slope is d loss / d v."""
    error = v - target
    low, high = old_value - cliprange, old_value + cliprange
    bounded = tl.where(v < low, low, tl.where(v > high, high, v)) - target
    # Clipped, v lies outside the range, so it has no gradient.
    clipped = bounded * bounded > error * error
    worst = tl.where(clipped, bounded, error)
    return 0.5 * worst * worst, tl.where(clipped, 0.0, error), clipped

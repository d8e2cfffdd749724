// Estimators of KL(policy || reference) for a vector of tokens; math/ppo.h has them for one, with their derivatives.
#pragma once
#include "../math/ppo.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

// e^x - 1 - x without the cancellation near 0.
RLHF_HD vf expm1_minus_x(vf x) {
    vf p = splat(2.0876757e-9f);  // 1 / k!, k from 12 down to 2: the remainder is below 1e-8 of the value for |x| <= 1
    p = p * x + 2.5052108e-8f;
    p = p * x + 2.7557319e-7f;
    p = p * x + 2.7557319e-6f;
    p = p * x + 2.4801587e-5f;
    p = p * x + 1.9841270e-4f;
    p = p * x + 1.3888889e-3f;
    p = p * x + 8.3333333e-3f;
    p = p * x + 4.1666667e-2f;
    p = p * x + 1.6666667e-1f;
    p = p * x + 0.5f;
    const vf large = vexp(x) - 1.f - x;
    return x > 1.f ? large : x < -1.f ? large : p * x * x;
}

template <KlEstimator E>
RLHF_HD vf kl_value(vf d) {
    if (E == KlEstimator::k1) return d;
    if (E == KlEstimator::k2) return 0.5f * d * d;
    if (E == KlEstimator::k3) return expm1_minus_x(-d);
    return d < 0.f ? -d : d;
}

RLHF_HD vf vexpm1(vf x) {
    const vf small = x + expm1_minus_x(x), large = vexp(x) - 1.f;
    return x > 1.f ? large : x < -1.f ? large : small;
}

// d KL / d logprob
template <KlEstimator E>
RLHF_HD vf kl_slope(vf d) {
    if (E == KlEstimator::k1) return splat(1.f);
    if (E == KlEstimator::k2) return d;
    if (E == KlEstimator::k3) return -vexpm1(-d);
    return d > 0.f ? splat(1.f) : d < 0.f ? splat(-1.f) : d;
}

// Runs `code` with E bound to the estimator.
#define RLHF_DISPATCH_KL(estimator, E, code)                                          \
    switch (estimator) {                                                              \
        case KlEstimator::k1: { constexpr auto E = KlEstimator::k1; code; break; }    \
        case KlEstimator::k2: { constexpr auto E = KlEstimator::k2; code; break; }    \
        case KlEstimator::k3: { constexpr auto E = KlEstimator::k3; code; break; }    \
        default: { constexpr auto E = KlEstimator::abs; code; break; }                \
    }

}  // namespace RLHF_ISA
}  // namespace rlhf

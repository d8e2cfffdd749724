// The estimators of math/kl.h for a vector of tokens.
#pragma once
#include "../math/kl.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

RLHF_HD vf expm1_minus_x(vf x) {
    const vf large = vexp_any(x) - 1.f - x;
    return x > 1.f ? large : x < -1.f ? large : expm1_minus_x_series(x);
}

template <KlEstimator E>
RLHF_HD vf kl_value(vf d) {
    if (E == KlEstimator::k1) return d;
    if (E == KlEstimator::k2) return 0.5f * d * d;
    if (E == KlEstimator::k3) return expm1_minus_x(-d);
    return d < 0.f ? -d : d;
}

RLHF_HD vf vexpm1(vf x) {
    const vf small = x + expm1_minus_x(x), large = vexp_any(x) - 1.f;
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

// Run `code` with E bound to the estimator.
#define RLHF_DISPATCH_KL(estimator, E, code)                                          \
    switch (estimator) {                                                              \
        case KlEstimator::k1: { constexpr auto E = KlEstimator::k1; code; break; }    \
        case KlEstimator::k2: { constexpr auto E = KlEstimator::k2; code; break; }    \
        case KlEstimator::k3: { constexpr auto E = KlEstimator::k3; code; break; }    \
        default: { constexpr auto E = KlEstimator::abs; code; break; }                \
    }

}  // namespace RLHF_ISA
}  // namespace rlhf

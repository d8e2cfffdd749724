// Estimators of KL(policy || reference) for one token (Schulman 2020, "Approximating KL divergence").
#pragma once
#include "common.h"

namespace rlhf {

enum class KlEstimator : int { k1 = 0, k2 = 1, k3 = 2, abs = 3 };

// Return e^x - 1 - x for |x| <= 1, without cancellation near 0, for a float or a vector of floats: the Taylor series with
// coefficients 1 / k! for k from 12 down to 2. The remainder is below 1e-8 of the value.
template <class V>
RLHF_HD V expm1_minus_x_series(V x) {
    V p = x * 2.0876757e-9f + 2.5052108e-8f;
    p = p * x + 2.7557319e-7f;
    p = p * x + 2.7557319e-6f;
    p = p * x + 2.4801587e-5f;
    p = p * x + 1.9841270e-4f;
    p = p * x + 1.3888889e-3f;
    p = p * x + 8.3333333e-3f;
    p = p * x + 4.1666667e-2f;
    p = p * x + 1.6666667e-1f;
    p = p * x + 0.5f;
    return p * x * x;
}

RLHF_HD float expm1_minus_x(float x) { return fabsf(x) <= 1.f ? expm1_minus_x_series(x) : expm1f(x) - x; }

struct Term {
    float value;
    float slope;
};

// Return the estimate for d = logprob - ref_logprob, and its slope d KL / d logprob.
RLHF_HD Term kl_term(float d, KlEstimator estimator) {
    switch (estimator) {
        case KlEstimator::k1: return {d, 1.f};
        case KlEstimator::k2: return {0.5f * d * d, d};
        case KlEstimator::k3: return {expm1_minus_x(-d), -expm1f(-d)};
        default: return {fabsf(d), d > 0.f ? 1.f : d < 0.f ? -1.f : d};
    }
}

}  // namespace rlhf

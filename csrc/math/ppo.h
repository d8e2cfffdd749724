// The PPO objective for one token: the loss, its derivative with respect to the log-prob, and the quantities of the metrics.
#pragma once
#include "kl.h"

namespace rlhf {

enum class Objective : int { clip = 0, kl_penalty = 1, ratio = 2, policy_gradient = 3 };
enum class KlWeighting : int { none = 0, ratio = 1 };

// The options of rlhf_kernels/_options.py that the kernels receive, under the same names. A limit that is off is inf.
#define RLHF_PPO_SCALARS(CHOICE, NUMBER) \
    CHOICE(Objective, objective)         \
    NUMBER(cliprange)                    \
    NUMBER(cliprange_high)               \
    NUMBER(dual_clip)                    \
    NUMBER(log_ratio_clamp)              \
    NUMBER(old_kl_coef)                  \
    NUMBER(cliprange_value)              \
    NUMBER(entropy_coef)                 \
    NUMBER(kl_coef)                      \
    CHOICE(KlEstimator, kl_estimator)    \
    CHOICE(KlWeighting, kl_weighting)

struct PpoScalars {
#define RLHF_CHOICE(Type, name) Type name{};
#define RLHF_NUMBER(name) float name = 0.f;
    RLHF_PPO_SCALARS(RLHF_CHOICE, RLHF_NUMBER)
#undef RLHF_CHOICE
#undef RLHF_NUMBER
};

struct SurrogateTerm {
    float loss;   // of the policy term
    float slope;  // d loss / d log-ratio (policy_gradient: d loss / d log-prob)
    float ratio;
    float live;  // d ratio / d log-ratio: 0 outside the clamp
    bool clipped;
    bool dual_clipped;
};

// Return the policy term. clip: PPO (2017) eq. 7 with separate limits (DAPO, eq. 10) and the dual clip (Ye et al. 2020, eq. 5).
// kl_penalty: PPO eq. 8 with the k3 estimate of KL(old || new). ratio: the surrogate of TRPO. policy_gradient: the plain policy
// gradient.
RLHF_HD SurrogateTerm surrogate(float log_ratio, float logprob, float a, const PpoScalars& p) {
    SurrogateTerm s{0.f, 0.f, 0.f, 0.f, false, false};
    // Outside the clamp the gradient is 0; at the limits it is not. NaN stays NaN.
    const bool frozen = fabsf(log_ratio) > p.log_ratio_clamp;
    if (frozen) log_ratio = copysignf(p.log_ratio_clamp, log_ratio);
    s.ratio = expf(log_ratio);
    s.live = frozen ? 0.f : s.ratio;
    if (p.objective == Objective::policy_gradient) {
        s.loss = -a * logprob;
        s.slope = -a;
        return s;
    }
    s.loss = -a * s.ratio;
    s.slope = -a * s.live;
    if (p.objective == Objective::kl_penalty) {
        s.loss += p.old_kl_coef * expm1_minus_x(log_ratio);
        if (!frozen) s.slope += p.old_kl_coef * expm1f(log_ratio);
    } else if (p.objective == Objective::clip) {
        const float low = 1.f - p.cliprange, high = 1.f + p.cliprange_high;
        const float bounded = s.ratio < low ? low : s.ratio > high ? high : s.ratio;
        const float clip = -a * bounded;
        s.clipped = clip > s.loss;
        if (s.clipped) s.loss = clip;
        s.dual_clipped = a < 0.f && -a * p.dual_clip < s.loss;
        if (s.dual_clipped) s.loss = -a * p.dual_clip;
        if (s.clipped || s.dual_clipped) s.slope = 0.f;
    }
    return s;
}

// The policy term and the KL to the reference of one token, before the aggregation's weight.
struct ObjectiveTerm {
    SurrogateTerm policy;  // before the importance weight
    float ref_kl;          // the estimate, for the metrics
    float ref_kl_term;     // its term of the loss, before kl_coef
    float ratio_slope;     // d L / d log-ratio; a sequence-level ratio distributes it over the sequence
    float own_slope;       // d L / d logprob except through the log-ratio
};

RLHF_HD ObjectiveTerm objective_term(float log_ratio, float logprob, float a, float importance, const float* ref_logprob,
                                     const PpoScalars& p) {
    ObjectiveTerm t{surrogate(log_ratio, logprob, a, p), 0.f, 0.f, 0.f, 0.f};
    t.ratio_slope = importance * t.policy.slope;
    if (ref_logprob) {
        const Term kl = kl_term(logprob - *ref_logprob, p.kl_estimator);
        t.ref_kl = t.ref_kl_term = kl.value;
        t.own_slope = p.kl_coef * kl.slope;
        if (p.kl_weighting == KlWeighting::ratio) {  // DeepSeek-V3.2 (2025), "Unbiased KL Estimate": r KL
            t.ref_kl_term *= t.policy.ratio;
            t.own_slope *= t.policy.ratio;
            t.ratio_slope += p.kl_coef * kl.value * t.policy.live;
        }
    }
    return t;
}

// Return d L / d logprob of one token for a token-level ratio.
RLHF_HD float logprob_slope(
    float logprob, float old_logprob, float a, float importance, const float* ref_logprob, const PpoScalars& p) {
    const ObjectiveTerm t = objective_term(logprob - old_logprob, logprob, a, importance, ref_logprob, p);
    return t.ratio_slope + t.own_slope;
}

struct ValueTerm {
    float loss;   // 1/2 max((v - R)^2, (clip(v, old ± range) - R)^2)
    float slope;  // d loss / d v
    bool clipped;
};

RLHF_HD ValueTerm value_term(float v, float old_value, float target, float cliprange) {
    const float error = v - target;
    ValueTerm t{0.5f * error * error, error, false};
    const float low = old_value - cliprange, high = old_value + cliprange;
    const float bounded = (v < low ? low : v > high ? high : v) - target;
    if (bounded * bounded > error * error) {  // then v is outside the range, so the clipped value has no gradient
        t = {0.5f * bounded * bounded, 0.f, true};
    }
    return t;
}

}  // namespace rlhf

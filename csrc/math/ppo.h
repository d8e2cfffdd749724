// The PPO objective for one token: the loss, its derivative with respect to the log-prob, and the quantities of the metrics.
#pragma once
#include "kl.h"

namespace rlhf {

// The order of OBJECTIVES in rlhf_kernels/_options.py.
enum class Objective : int { clip, kl_penalty, ratio, policy_gradient, cispo, sapo, ipo, dppo_tv, dppo_kl, gspo_token, gmpo };
enum class KlWeighting : int { none = 0, ratio = 1 };

// The options of rlhf_kernels/_options.py that the kernels receive, under the same names. A limit that is off is inf.
#define RLHF_PPO_SCALARS(CHOICE, NUMBER) \
    CHOICE(Objective, objective)         \
    NUMBER(cliprange)                    \
    NUMBER(cliprange_high)               \
    NUMBER(dual_clip)                    \
    NUMBER(log_ratio_clamp)              \
    NUMBER(old_kl_coef)                  \
    NUMBER(tau_pos)                      \
    NUMBER(tau_neg)                      \
    NUMBER(divergence)                   \
    NUMBER(divergence_high)              \
    NUMBER(ratio_limit)                  \
    NUMBER(log_ratio_coef)               \
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
    float slope;  // d loss / d log-ratio
    float own;    // d loss / d log-prob except through the log-ratio
    float ratio;
    float live;  // d ratio / d log-ratio: 0 outside the clamp
    bool clipped;
    bool dual_clipped;
};

// NaN stays NaN.
RLHF_HD float bounded(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// PPO (2017) eq. 7 with separate limits (DAPO, eq. 10) and the dual clip (Ye et al. 2020, eq. 5).
RLHF_HD void clip_ratio(SurrogateTerm& s, float a, const PpoScalars& p) {
    const float clip = -a * bounded(s.ratio, 1.f - p.cliprange, 1.f + p.cliprange_high);
    s.clipped = clip > s.loss;
    if (s.clipped) s.loss = clip;
    s.dual_clipped = a < 0.f && -a * p.dual_clip < s.loss;
    if (s.dual_clipped) s.loss = -a * p.dual_clip;
    if (s.clipped || s.dual_clipped) s.slope = 0.f;
}

// Return KL(old || new) of the choice between the sampled token and any other (DPPO, eq. 14). 1e-8 keeps it finite for a
// probability of 1.
RLHF_HD float binary_kl(float old_logprob, float logprob) {
    const float old_rest = -expm1f(old_logprob), rest = -expm1f(logprob);
    return expf(old_logprob) * (old_logprob - logprob) + old_rest * logf((old_rest + 1e-8f) / (rest + 1e-8f));
}

// Return whether the token is outside the trust region of ipo or dppo.
RLHF_HD bool is_outside(float logprob, float old_logprob, float a, const PpoScalars& p) {
    const float moved = expf(logprob) - expf(old_logprob);
    if (p.objective == Objective::ipo) return fabsf(moved) > p.divergence;
    const float limit = a > 0.f ? p.divergence_high : p.divergence, away = a > 0.f ? moved : -moved;
    if (p.objective == Objective::dppo_tv) return away > limit;
    return away > 0.f && binary_kl(old_logprob, logprob) > limit;
}

// Return the policy term. clip: see clip_ratio. kl_penalty: PPO (2017) eq. 8 with the k3 estimate of KL(old || new). ratio: the
// surrogate of TRPO. policy_gradient: the plain policy gradient. cispo: MiniMax-M1 (2025) eq. 4. sapo: SAPO (2025), section 3.
// ipo: prime-rl. dppo_tv and dppo_kl: DPPO (2026) eq. 13 and 14. gmpo: GMPO (2025), whose clip is in sequence_part. gspo_token:
// GSPO (2025), GSPO-token; objective_term gives the slope of the sequence's ratio to the token.
RLHF_HD SurrogateTerm surrogate(float log_ratio, float logprob, float old_logprob, float a, const PpoScalars& p) {
    SurrogateTerm s{0.f, 0.f, 0.f, 0.f, 0.f, false, false};
    // Outside the clamp the gradient is 0; at the limits it is not. NaN stays NaN.
    const bool frozen = fabsf(log_ratio) > p.log_ratio_clamp;
    if (frozen) log_ratio = copysignf(p.log_ratio_clamp, log_ratio);
    s.ratio = expf(log_ratio);
    s.live = frozen ? 0.f : s.ratio;
    s.loss = -a * s.ratio;
    s.slope = -a * s.live;
    switch (p.objective) {
        case Objective::ratio:
        case Objective::gmpo: break;
        case Objective::clip:
        case Objective::gspo_token: clip_ratio(s, a, p); break;
        case Objective::kl_penalty:
            s.loss += p.old_kl_coef * expm1_minus_x(log_ratio);
            if (!frozen) s.slope += p.old_kl_coef * expm1f(log_ratio);
            break;
        case Objective::policy_gradient:
            s.loss = -a * logprob;
            s.slope = 0.f;
            s.own = -a;
            break;
        case Objective::cispo: {
            const float factor = bounded(s.ratio, 1.f - p.cliprange, 1.f + p.cliprange_high);
            s.clipped = factor != s.ratio;
            s.loss = -a * factor * logprob;
            s.slope = 0.f;
            s.own = -a * factor;
            break;
        }
        case Objective::sapo: {
            const float tau = a > 0.f ? p.tau_pos : p.tau_neg, x = tau * (s.ratio - 1.f), e = expf(-fabsf(x));
            s.loss = -a * (x < 0.f ? e : 1.f) / (1.f + e) * (4.f / tau);
            s.slope = -a * 4.f * e / ((1.f + e) * (1.f + e)) * s.live;
            break;
        }
        default: {  // ipo, dppo_tv, dppo_kl
            s.clipped = is_outside(logprob, old_logprob, a, p);
            const float factor = s.ratio > p.ratio_limit ? p.ratio_limit : s.ratio;
            s.loss = s.clipped ? 0.f : -a * factor;
            s.slope = s.clipped || frozen ? 0.f : s.loss;
            s.loss += p.log_ratio_coef * log_ratio * log_ratio;
            if (!frozen) s.slope += 2.f * p.log_ratio_coef * log_ratio;
        }
    }
    return s;
}

// What a token contributes to the mean log-ratio of its sequence.
struct SequencePart {
    float log_ratio;
    bool clipped;  // then the sequence's ratio does not depend on the token
};

// GMPO limits the log-ratio of each token from above if its advantage is positive, from below otherwise.
RLHF_HD SequencePart sequence_part(float log_ratio, float a, const PpoScalars& p) {
    if (p.objective != Objective::gmpo) return {log_ratio, false};
    if (a > 0.f) return log_ratio > p.cliprange_high ? SequencePart{p.cliprange_high, true} : SequencePart{log_ratio, false};
    return log_ratio < -p.cliprange ? SequencePart{-p.cliprange, true} : SequencePart{log_ratio, false};
}

// The policy term and the KL to the reference of one token, before the aggregation's weight.
struct ObjectiveTerm {
    SurrogateTerm policy;  // before the importance weight
    float ref_kl;          // the estimate, for the metrics
    float ref_kl_term;     // its term of the loss, before kl_coef
    float ratio_slope;     // d L / d log-ratio; a sequence-level ratio distributes it over the sequence
    float own_slope;       // d L / d logprob except through the log-ratio
};

RLHF_HD ObjectiveTerm objective_term(float log_ratio, float logprob, float old_logprob, float a, float importance,
                                     const float* ref_logprob, const PpoScalars& p) {
    ObjectiveTerm t{surrogate(log_ratio, logprob, old_logprob, a, p), 0.f, 0.f, 0.f, 0.f};
    t.ratio_slope = importance * t.policy.slope;
    t.own_slope = importance * t.policy.own;
    if (ref_logprob) {
        const Term kl = kl_term(logprob - *ref_logprob, p.kl_estimator);
        t.ref_kl = t.ref_kl_term = kl.value;
        float weight = 1.f;
        if (p.kl_weighting == KlWeighting::ratio) {  // DeepSeek-V3.2 (2025), "Unbiased KL Estimate": r KL
            weight = t.policy.ratio;
            t.ref_kl_term *= weight;
            t.ratio_slope += p.kl_coef * kl.value * t.policy.live;
        }
        t.own_slope += p.kl_coef * kl.slope * weight;
    }
    if (p.objective == Objective::gspo_token) {
        t.own_slope += t.ratio_slope;
        t.ratio_slope = 0.f;
    }
    return t;
}

// Return d L / d logprob of one token for a token-level ratio.
RLHF_HD float logprob_slope(
    float logprob, float old_logprob, float a, float importance, const float* ref_logprob, const PpoScalars& p) {
    const ObjectiveTerm t = objective_term(logprob - old_logprob, logprob, old_logprob, a, importance, ref_logprob, p);
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
    const float clipped = bounded(v, old_value - cliprange, old_value + cliprange) - target;
    if (clipped * clipped > error * error) {  // then v is outside the range, so the clipped value has no gradient
        t = {0.5f * clipped * clipped, 0.f, true};
    }
    return t;
}

}  // namespace rlhf

// Importance weights of sampled tokens: probability ratios of policy to sampler per token or per sequence, their bounds, and the
// metrics of the mismatch.
#pragma once
#include "kl.h"

namespace rlhf {

// The choices of rlhf_kernels/token_args.py, in the same order.
enum class ImportanceLevel : int { token = 0, sequence = 1, geometric = 2 };
enum class ImportanceAction : int { truncate = 0, mask = 1, clip = 2 };
enum class Statistic : int { ratio = 0, k1 = 1, k2 = 2, k3 = 3 };

struct ImportanceRule {
    ImportanceLevel level;
    ImportanceAction action;
    Statistic statistic;  // what `low` and `high` bound
    float low, high;  // off: -inf, inf
};

// Return the log-ratio within the limits that keep its exponential finite. NaN stays NaN.
RLHF_HD float bounded_log_ratio(float d) { return d > 20.f ? 20.f : d < -20.f ? -20.f : d; }

// Return the estimate of KL(sampler || policy) for d = logprob - sampler_logprob; for `ratio`, which needs none, return 0.
RLHF_HD float sampler_kl(float d, Statistic kind) {
    return kind == Statistic::ratio ? 0.f : kl_term(-bounded_log_ratio(d), KlEstimator(int(kind) - 1)).value;
}

// A token, or a sequence if the level is not `token`.
struct ImportanceUnit {
    float ratio, weight;  // the weight is bounded by truncate and clip
    bool below, above, outside;
};

RLHF_HD ImportanceUnit importance_unit(float log_ratio, float kl, const ImportanceRule& rule) {
    const float ratio = expf(bounded_log_ratio(log_ratio)), found = rule.statistic == Statistic::ratio ? ratio : kl;
    ImportanceUnit u{ratio, ratio, found < rule.low, found > rule.high, !(found >= rule.low && found <= rule.high)};
    if (rule.action != ImportanceAction::mask) u.weight = ratio > rule.high ? rule.high : ratio < rule.low ? rule.low : ratio;
    return u;
}

// Indices of the sums over the units and the tokens of one call.
enum ImportanceSum : int {
    kWeight, kWeightSq, kChi2, kBelow, kAbove, kUnits,  // over units
    kRejected, kMismatchKl, kMismatchK3, kImportanceTokens,  // over tokens
    kWeightMax, kMismatchMax,  // maxima
    kNumImportanceSums
};
constexpr int kNumImportanceMetrics = 11;

RLHF_HD void add_importance_unit(const ImportanceUnit& u, bool rejected, double* sum) {
    const double weight = rejected ? 0.0 : double(u.weight);
    sum[kWeight] += weight;
    sum[kWeightSq] += weight * weight;
    sum[kChi2] += double(u.ratio) * u.ratio - 1;
    sum[kBelow] += u.below;
    sum[kAbove] += u.above;
    sum[kUnits] += 1;
    sum[kWeightMax] = weight > sum[kWeightMax] || weight != weight ? weight : sum[kWeightMax];
}

RLHF_HD void add_importance_token(float d, bool rejected, double* sum) {
    const double apart = fabsf(d);
    sum[kRejected] += rejected;
    sum[kMismatchKl] -= d;
    sum[kMismatchK3] += expm1_minus_x(bounded_log_ratio(d));
    sum[kImportanceTokens] += 1;
    sum[kMismatchMax] = apart > sum[kMismatchMax] || apart != apart ? apart : sum[kMismatchMax];
}

RLHF_HD void add_importance_sums(const double* part, double* sum) {
    for (int k = 0; k < kWeightMax; k++) sum[k] += part[k];
    for (int k = kWeightMax; k < kNumImportanceSums; k++) sum[k] = part[k] > sum[k] || part[k] != part[k] ? part[k] : sum[k];
}

// Write the metrics in the order of token_args.IMPORTANCE_METRICS. Without tokens all are 0.
RLHF_HD void importance_metrics(const double* sum, float* out) {
    const double units = sum[kUnits] > 0 ? sum[kUnits] : 1, tokens = sum[kImportanceTokens] > 0 ? sum[kImportanceTokens] : 1;
    // The effective sample size (Kish 1965) as a share of the units; 0 if all weights are 0.
    out[0] = float(sum[kWeightSq] == 0 ? 0 : sum[kWeight] * sum[kWeight] / (sum[kWeightSq] * units));
    out[1] = float(sum[kChi2] / units);
    out[2] = float(sum[kMismatchKl] / tokens);
    out[3] = float(sum[kMismatchK3] / tokens);
    out[4] = float(sum[kMismatchMax]);
    out[5] = float(sum[kRejected] / tokens);
    out[6] = float(sum[kBelow] / units);
    out[7] = float(sum[kAbove] / units);
    out[8] = float(sum[kWeight] / units);
    out[9] = float(sum[kWeightMax]);
    out[10] = float(sum[kImportanceTokens]);
}

}  // namespace rlhf

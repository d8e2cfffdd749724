// The PPO objective on per-token arrays: sums for the loss and the metrics, slopes for the gradients.
//
// Tokens are processed in segments: tiles of fixed size, or whole sequences for a sequence-level ratio. The partial sums of the
// segments are added in order, so the bits do not depend on the number of threads.
#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int64_t kTile = 1024;

struct Segment {
    int64_t begin, end;
};

Segment segment_of(const PpoLossArgs& a, int64_t i) {
    if (!a.sequence_level) return {i * kTile, (i + 1) * kTile < a.n ? (i + 1) * kTile : a.n};
    const Sequences& s = a.sequences;
    if (s.cu_seqlens) return {s.cu_seqlens[i], s.cu_seqlens[i + 1]};
    return {i * s.length, (i + 1) * s.length};
}

double weight_of(const PpoLossArgs& a, int64_t t) { return a.ppo.row_weight ? a.ppo.row_weight[t] : 1.0; }
float importance_of(const PpoLossArgs& a, int64_t t) { return a.ppo.weights ? a.ppo.weights[t] : 1.f; }

// Return the objective of token t; `log_ratio` is the token's or its sequence's.
ObjectiveTerm term_of(const PpoLossArgs& a, int64_t t, float log_ratio) {
    const float* ref = a.ppo.ref_logprobs ? a.ppo.ref_logprobs + t : nullptr;
    return objective_term(log_ratio, a.logprobs[t], a.ppo.old_logprobs[t], a.ppo.advantages[t], importance_of(a, t), ref,
                          a.ppo.scalars);
}

void add_policy(const PpoLossArgs& a, int64_t t, const ObjectiveTerm& term, double* sum) {
    const double w = weight_of(a, t);
    const float d = a.logprobs[t] - a.ppo.old_logprobs[t];
    const SurrogateTerm& s = term.policy;
    sum[kPolicy] += w * importance_of(a, t) * s.loss;
    sum[kClipped] += s.clipped;
    sum[kDualClipped] += s.dual_clipped;
    sum[kApproxKl] -= d;
    sum[kK3] += expm1_minus_x(d);
    sum[kRatio] += s.ratio;
    sum[kRatioMax] = s.ratio > sum[kRatioMax] || s.ratio != s.ratio ? s.ratio : sum[kRatioMax];
    sum[kActive] += a.slope[t] != 0.f || (a.entropy && a.ppo.scalars.entropy_coef * float(w) != 0.f);
    sum[kNumTokens] += 1;
    if (a.entropy) {
        sum[kEntropy] += a.entropy[t];
        sum[kEntropyTerm] += w * a.entropy[t];
    }
    if (a.ppo.ref_logprobs) {
        sum[kRefKl] += term.ref_kl;
        sum[kRefKlTerm] += w * term.ref_kl_term;
    }
}

void add_value(const PpoLossArgs& a, int64_t t, double* sum) {
    const float range = a.old_values ? a.ppo.scalars.cliprange_value : kInf;
    const ValueTerm v = value_term(a.values[t], a.old_values ? a.old_values[t] : 0.f, a.returns[t], range);
    const double w = a.value_row_weight ? a.value_row_weight[t] : 1.0, target = a.returns[t], error = target - a.values[t];
    a.value_slope[t] = float(w * v.slope);
    sum[kValueTerm] += w * v.loss;
    sum[kValueClipped] += v.clipped;
    sum[kNumValueTokens] += 1;
    sum[kReturns] += target;
    sum[kReturnsSq] += target * target;
    sum[kResidual] += error;
    sum[kResidualSq] += error * error;
}

void by_token(const PpoLossArgs& a, Segment seg, double* sum) {
    for (int64_t t = seg.begin; t < seg.end; t++) {
        a.slope[t] = 0.f;
        if (!a.mask[t]) continue;
        const ObjectiveTerm term = term_of(a, t, a.logprobs[t] - a.ppo.old_logprobs[t]);
        a.slope[t] = float(weight_of(a, t)) * (term.ratio_slope + term.own_slope);
        add_policy(a, t, term, sum);
    }
}

SequencePart part_of(const PpoLossArgs& a, int64_t t) {
    return sequence_part(a.logprobs[t] - a.ppo.old_logprobs[t], a.ppo.advantages[t], a.ppo.scalars);
}

// GSPO eq. 7: one log-ratio per sequence, the mean over its actions. Its derivative with respect to each log-prob is 1 / count,
// or 0 where the token is clipped.
void by_sequence(const PpoLossArgs& a, Segment seg, double* sum) {
    double log_ratio = 0, count = 0, slope = 0;
    for (int64_t t = seg.begin; t < seg.end; t++) {
        a.slope[t] = 0.f;
        if (!a.mask[t]) continue;
        log_ratio += part_of(a, t).log_ratio;
        count += 1;
    }
    const float mean = float(log_ratio / (count > 0 ? count : 1));
    for (int64_t t = seg.begin; t < seg.end; t++) {
        if (a.mask[t]) slope += weight_of(a, t) * term_of(a, t, mean).ratio_slope / count;
    }
    for (int64_t t = seg.begin; t < seg.end; t++) {
        if (!a.mask[t]) continue;
        ObjectiveTerm term = term_of(a, t, mean);
        const bool clipped = part_of(a, t).clipped;
        a.slope[t] = float((clipped ? 0 : slope) + weight_of(a, t) * term.own_slope);
        term.policy.clipped = term.policy.clipped || clipped;
        add_policy(a, t, term, sum);
    }
}

}  // namespace

void ppo_loss(const PpoLossArgs& a) {
    const int64_t segments = a.sequence_level ? a.sequences.count : (a.n + kTile - 1) / kTile;
    double* partial = new double[size_t(segments) * kNumSums]();
#pragma omp parallel for schedule(static) if (a.n > kTile)
    for (int64_t i = 0; i < segments; i++) {
        const Segment seg = segment_of(a, i);
        double* sum = partial + i * kNumSums;
        if (a.logprobs) a.sequence_level ? by_sequence(a, seg, sum) : by_token(a, seg, sum);
        if (!a.values) continue;
        for (int64_t t = seg.begin; t < seg.end; t++) {
            a.value_slope[t] = 0.f;
            if (a.value_mask[t]) add_value(a, t, sum);
        }
    }
    for (int k = 0; k < kNumSums; k++) a.sums[k] = 0;
    for (int64_t i = 0; i < segments; i++) {
        const double* sum = partial + i * kNumSums;
        for (int k = 0; k < kRatioMax; k++) a.sums[k] += sum[k];
        const bool larger = sum[kRatioMax] > a.sums[kRatioMax] || sum[kRatioMax] != sum[kRatioMax];
        if (larger) a.sums[kRatioMax] = sum[kRatioMax];
    }
    delete[] partial;
}

// The loss and the metrics have the operations and the precision of ObjectiveTerms.loss and .metrics in ops/objective.py, and
// the slopes those of ops/ppo_loss.py, so that both paths give the same bits.
void ppo_loss_call(const PpoCallArgs& a) {
    double sums[kNumSums];
    PpoLossArgs loss = a.loss;
    loss.sums = sums;
    ppo_loss(loss);
    const auto counted = [](double n) { return n > 1 ? float(n) : 1.f; };
    float d[5];
    d[2] = a.denominators[2] < 0 ? counted(sums[kNumTokens]) : a.denominators[2];
    d[3] = a.denominators[3] < 0 ? counted(sums[kNumValueTokens]) : a.denominators[3];
    d[0] = a.denominators[0] < 0 ? d[2] : a.denominators[0];
    d[1] = a.denominators[1] < 0 ? d[3] : a.denominators[1];
    d[4] = 1.f;
    double total = sums[kPolicy];
    if (a.kl_coef != 0) total += a.kl_coef * sums[kRefKlTerm];
    if (a.entropy_coef != 0) total -= a.entropy_coef * sums[kEntropyTerm];
    total /= d[0];
    if (loss.values) total += a.vf_coef * sums[kValueTerm] / d[1];
    *a.result = float(total);
    for (int64_t k = 0; k < a.num_metrics; k++) a.metrics[k] = float(sums[a.source[k]] / d[a.divisor[k]]);
    const float of_value = (1.f / d[1]) * float(a.vf_coef), of_entropy = float(-a.entropy_coef);
    for (int64_t t = 0; t < loss.n; t++) {
        if (loss.logprobs) loss.slope[t] /= d[0];
        if (loss.values) loss.value_slope[t] *= of_value;
        if (!a.entropy_slope) continue;
        const float weight = loss.mask[t] ? (loss.ppo.row_weight ? loss.ppo.row_weight[t] : 1.f) : 0.f;
        a.entropy_slope[t] = of_entropy * weight / d[0];
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// Importance weights, the tokens that remain, and the metrics, in one pass over the tokens.
//
// Tokens are processed in segments: tiles of fixed size, or whole sequences if the ratio is one number per sequence. The partial
// sums of the segments are added in order, so the bits do not depend on the number of threads.
#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int64_t kTile = 1024;

struct Segment {
    int64_t begin, end;
};

Segment segment_of(const ImportanceArgs& a, int64_t i) {
    if (a.rule.level == ImportanceLevel::token) return {i * kTile, (i + 1) * kTile < a.n ? (i + 1) * kTile : a.n};
    const Sequences& s = a.sequences;
    if (s.cu_seqlens) return {s.cu_seqlens[i], s.cu_seqlens[i + 1]};
    return {i * s.length, (i + 1) * s.length};
}

float log_ratio_of(const ImportanceArgs& a, int64_t t) { return a.logprobs[t] - a.sampler_logprobs[t]; }

// With advantages, only tokens whose advantage is negative are rejected.
bool rejects(const ImportanceArgs& a, int64_t t, const ImportanceUnit& u) {
    return a.rule.action == ImportanceAction::mask && u.outside && (!a.advantages || a.advantages[t] < 0.f);
}

void write(const ImportanceArgs& a, int64_t t, const ImportanceUnit& u, double* sum) {
    const bool rejected = rejects(a, t, u);
    a.weights[t] = rejected ? 0.f : u.weight;
    a.kept[t] = !rejected;
    add_importance_token(log_ratio_of(a, t), rejected, sum);
}

void drop(const ImportanceArgs& a, int64_t t) {
    a.weights[t] = 0.f;
    a.kept[t] = 0;
}

void by_token(const ImportanceArgs& a, Segment seg, double* sum) {
    for (int64_t t = seg.begin; t < seg.end; t++) {
        if (!a.mask[t]) {
            drop(a, t);
            continue;
        }
        const float d = log_ratio_of(a, t);
        const ImportanceUnit u = importance_unit(d, sampler_kl(d, a.rule.statistic), a.rule);
        add_importance_unit(u, rejects(a, t, u), sum);
        write(a, t, u, sum);
    }
}

void by_sequence(const ImportanceArgs& a, Segment seg, double* sum) {
    double log_ratio = 0, kl = 0, count = 0;
    for (int64_t t = seg.begin; t < seg.end; t++) {
        if (!a.mask[t]) continue;
        log_ratio += log_ratio_of(a, t);
        kl += sampler_kl(log_ratio_of(a, t), a.rule.statistic);
        count += 1;
    }
    const double divisor = a.rule.level == ImportanceLevel::geometric && count > 0 ? count : 1;
    const ImportanceUnit u = importance_unit(float(log_ratio / divisor), float(kl / divisor), a.rule);
    if (count > 0) add_importance_unit(u, a.rule.action == ImportanceAction::mask && u.outside, sum);
    for (int64_t t = seg.begin; t < seg.end; t++) a.mask[t] ? write(a, t, u, sum) : drop(a, t);
}

}  // namespace

void importance_weights(const ImportanceArgs& a) {
    const bool tiles = a.rule.level == ImportanceLevel::token;
    const int64_t segments = tiles ? (a.n + kTile - 1) / kTile : a.sequences.count;
    double* parts = new double[size_t(segments) * kNumImportanceSums]();
#pragma omp parallel for schedule(static) if (a.n > 8 * kTile)
    for (int64_t i = 0; i < segments; i++) {
        double* sum = parts + i * kNumImportanceSums;
        tiles ? by_token(a, segment_of(a, i), sum) : by_sequence(a, segment_of(a, i), sum);
    }
    double total[kNumImportanceSums] = {};
    for (int64_t i = 0; i < segments; i++) add_importance_sums(parts + i * kNumImportanceSums, total);
    importance_metrics(total, a.metrics);
    delete[] parts;
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// Importance weights, the tokens that remain and the partial sums in one launch; a second launch of one block computes the metrics
// from the sums.
//
// A block processes a segment: a tile of tokens, or a whole sequence if the ratio is one number per sequence. All sums are added
// in a fixed order.
#include "scan.cuh"

#include "ops.h"

namespace rlhf {
namespace cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / kWarp;
constexpr int64_t kSegment = 4 * kBlock;  // tokens of a tile

__device__ __forceinline__ Span segment_of(const ImportanceArgs& a, int64_t i) {
    if (a.rule.level != ImportanceLevel::token) return span_of(a.sequences, i);
    const int64_t left = a.n - i * kSegment;
    return {i * kSegment, left < kSegment ? left : kSegment};
}

// Add the sums of all threads; only thread 0 returns the total. `shared` has one entry per warp.
struct Totals {
    double sum[kNumImportanceSums];
};

__device__ __forceinline__ Totals block_totals(Totals t, Totals* shared) {
    for (int d = kWarp / 2; d > 0; d /= 2) {
        Totals other;
        for (int k = 0; k < kNumImportanceSums; k++) other.sum[k] = __shfl_down_sync(kAllLanes, t.sum[k], d);
        add_importance_sums(other.sum, t.sum);
    }
    if (thread_id() % kWarp == 0) shared[thread_id() / kWarp] = t;
    __syncthreads();  // or thread 0 could add a warp's sums before they are written
    if (thread_id() == 0) {
        for (int w = 1; w < kWarps; w++) add_importance_sums(shared[w].sum, t.sum);
    }
    return t;
}

struct SequenceSums {
    double log_ratio, kl, count;
};

// Return in every thread the sums over the unmasked tokens of a sequence.
__device__ __forceinline__ SequenceSums sequence_sums(const ImportanceArgs& a, Span span, SequenceSums* shared) {
    SequenceSums s{0, 0, 0};
    for (int64_t t = span.begin + thread_id(); t < span.begin + span.length; t += kBlock) {
        if (!a.mask[t]) continue;
        const float d = a.logprobs[t] - a.sampler_logprobs[t];
        s = {s.log_ratio + d, s.kl + sampler_kl(d, a.rule.statistic), s.count + 1};
    }
    for (int d = kWarp / 2; d > 0; d /= 2) {
        s = {s.log_ratio + __shfl_down_sync(kAllLanes, s.log_ratio, d), s.kl + __shfl_down_sync(kAllLanes, s.kl, d),
             s.count + __shfl_down_sync(kAllLanes, s.count, d)};
    }
    if (thread_id() % kWarp == 0) shared[thread_id() / kWarp] = s;
    __syncthreads();  // or a thread could add a warp's sums before they are written
    s = shared[0];
    for (int w = 1; w < kWarps; w++) s = {s.log_ratio + shared[w].log_ratio, s.kl + shared[w].kl, s.count + shared[w].count};
    return s;
}

__global__ void __launch_bounds__(kBlock) weigh(ImportanceArgs a, double* parts) {
    __shared__ SequenceSums sequences[kWarps];
    __shared__ Totals totals[kWarps];
    const Span span = segment_of(a, blockIdx.x);
    const bool by_token = a.rule.level == ImportanceLevel::token;
    Totals mine{};
    ImportanceUnit u{};
    if (!by_token) {
        const SequenceSums s = sequence_sums(a, span, sequences);
        const double divisor = a.rule.level == ImportanceLevel::geometric && s.count > 0 ? s.count : 1;
        u = importance_unit(float(s.log_ratio / divisor), float(s.kl / divisor), a.rule);
        const bool rejected = a.rule.action == ImportanceAction::mask && u.outside;
        if (thread_id() == 0 && s.count > 0) add_importance_unit(u, rejected, mine.sum);
    }
    for (int64_t t = span.begin + thread_id(); t < span.begin + span.length; t += kBlock) {
        a.weights[t] = 0.f;
        a.kept[t] = 0;
        if (!a.mask[t]) continue;
        const float d = a.logprobs[t] - a.sampler_logprobs[t];
        if (by_token) u = importance_unit(d, sampler_kl(d, a.rule.statistic), a.rule);
        const bool rejected =
            a.rule.action == ImportanceAction::mask && u.outside && (!a.advantages || a.advantages[t] < 0.f);
        if (by_token) add_importance_unit(u, rejected, mine.sum);
        add_importance_token(d, rejected, mine.sum);
        if (rejected) continue;
        a.weights[t] = u.weight;
        a.kept[t] = 1;
    }
    mine = block_totals(mine, totals);
    if (thread_id() != 0) return;
    for (int k = 0; k < kNumImportanceSums; k++) parts[int64_t(blockIdx.x) * kNumImportanceSums + k] = mine.sum[k];
}

__global__ void __launch_bounds__(kBlock) total(const double* parts, int64_t count, float* metrics) {
    __shared__ Totals totals[kWarps];
    Totals mine{};
    for (int64_t i = thread_id(); i < count; i += kBlock) add_importance_sums(parts + i * kNumImportanceSums, mine.sum);
    mine = block_totals(mine, totals);
    if (thread_id() == 0) importance_metrics(mine.sum, metrics);
}

int64_t segments_of(const ImportanceArgs& a) {
    return a.rule.level == ImportanceLevel::token ? (a.n + kSegment - 1) / kSegment : a.sequences.count;
}

}  // namespace

size_t importance_workspace(const ImportanceArgs& a) { return size_t(segments_of(a)) * kNumImportanceSums * sizeof(double); }

void importance_weights(const ImportanceArgs& a, void* workspace, void* stream) {
    const char* op = "importance_weights";
    double* parts = static_cast<double*>(workspace);
    const double* found = parts;
    launch(op, weigh, Launch{segments_of(a), kBlock}, stream, a, parts);
    launch(op, total, Launch{1, kBlock}, stream, found, segments_of(a), a.metrics);
}

}  // namespace cuda
}  // namespace rlhf

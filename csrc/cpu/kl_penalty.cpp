// Estimators of KL(policy || reference) per token, and their gradient.
#include "kl.h"
#include "ops.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int64_t kTile = 8192;

// out = f(d, i, lanes) for each vector of d = logprobs - ref, where i is its first token and `lanes` the number of valid lanes.
template <class F>
void by_vectors(const float* logprobs, const float* ref, int64_t n, float* out, F f) {
#pragma omp parallel for schedule(static) if (n > 8 * kTile)
    for (int64_t tile = 0; tile < (n + kTile - 1) / kTile; tile++) {
        const int64_t end = (tile + 1) * kTile < n ? (tile + 1) * kTile : n;
        int64_t i = tile * kTile;
        for (; i + W <= end; i += W) store(out + i, f(load(logprobs + i) - load(ref + i), i, W));
        if (i == end) continue;
        const int rest = int(end - i);
        store_tail(out + i, f(load_tail(logprobs + i, rest, 0.f) - load_tail(ref + i, rest, 0.f), i, rest), rest);
    }
}

}  // namespace

void kl_penalty(const float* logprobs, const float* ref, int64_t n, KlEstimator estimator, float* out) {
    RLHF_DISPATCH_KL(estimator, E, by_vectors(logprobs, ref, n, out, [](vf d, int64_t, int) { return kl_value<E>(d); }));
}

void kl_penalty_backward(const float* grad, const float* logprobs, const float* ref, int64_t n, KlEstimator estimator, float* out) {
    RLHF_DISPATCH_KL(estimator, E, by_vectors(logprobs, ref, n, out, [=](vf d, int64_t i, int lanes) {
        return kl_slope<E>(d) * (lanes == W ? load(grad + i) : load_tail(grad + i, lanes, 0.f));
    }));
}

}  // namespace RLHF_ISA
}  // namespace rlhf

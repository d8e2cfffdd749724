// KL-shaped rewards and GAE in one pass over the tokens. Whitening scales the advantages in a second, smaller pass.
//
// Whitened rewards need their statistics before the recurrence, so they add a light first pass over the log-probs. The sums are
// stored per sequence and added in order, so the bits do not depend on the number of threads.
#include "kl.h"
#include "ops.h"
#include "scan.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

template <KlEstimator E>
void shape_rewards(const float* logprobs, const float* ref, const uint8_t* mask, int n, float kl_coef, float* kl, float* rewards) {
    int i = 0;
    for (; i + W <= n; i += W) {
        const vf k = where(mask + i, kl_value<E>(load(logprobs + i) - load(ref + i)));
        store(kl + i, k);
        store(rewards + i, -kl_coef * k);
    }
    if (i == n) return;
    const int rest = n - i;
    const vf k = kl_value<E>(load_tail(logprobs + i, rest, 0.f) - load_tail(ref + i, rest, 0.f));
    for (int lane = 0; lane < rest; lane++) {
        kl[i + lane] = mask[i + lane] ? k[lane] : 0.f;
        rewards[i + lane] = -kl_coef * kl[i + lane];
    }
}

// Return the token that receives the score, or -1 if the sequence has no action or `score_index` is not one of its actions.
int64_t score_token(const RolloutArgs& a, int64_t b, Span span) {
    const uint8_t* mask = a.gae.mask + span.begin;
    int64_t last = span.length - 1;
    for (uint64_t eight; last >= 7 && (memcpy(&eight, mask + last - 7, 8), eight == 0);) last -= 8;
    while (last >= 0 && !mask[last]) last--;
    if (last < 0 || !a.score_index) return last;
    const int64_t index = a.score_index[b];
    return index >= 0 && index < span.length && mask[index] ? index : -1;
}

float clipped_score(const RolloutArgs& a, int64_t b) {
    const float s = a.scores[b], limit = a.score_clip;
    return s > limit ? limit : s < -limit ? -limit : s;
}

// Compute the rewards of tokens [from, from + n) of sequence b; `lands` is the result of score_token.
void rewards_of(const RolloutArgs& a, int64_t b, Span span, int64_t from, int n, int64_t lands) {
    const int64_t at = span.begin + from;
    const float *logprobs = a.logprobs + at, *ref = a.ref_logprobs + at;
    RLHF_DISPATCH_KL(a.kl_estimator, E, shape_rewards<E>(logprobs, ref, a.gae.mask + at, n, a.kl_coef, a.kl + at, a.rewards + at));
    if (lands >= from && lands < from + n) a.rewards[span.begin + lands] += clipped_score(a, b);
}

template <class Body>
void for_each_chunk_backwards(Span span, Body body) {
    if (span.length == 0) return;
    for (int64_t from = (span.length - 1) / kChunk * kChunk; from >= 0; from -= kChunk) {
        const int64_t left = span.length - from;
        body(from, int(left < kChunk ? left : kChunk));
    }
}

template <class Body>
void for_each_sequence(const RolloutArgs& a, Body body) {
    const Sequences& s = a.gae.sequences;
#pragma omp parallel for schedule(dynamic, sequences_a_piece(s, a.gae.n)) if (a.gae.n >= kParallelTokens)
    for (int64_t b = 0; b < s.count; b++) body(b, span_of(s, b));
}

Whitening reward_statistics(const RolloutArgs& a, Moments* parts) {
    for_each_sequence(a, [&](int64_t b, Span span) {
        const int64_t lands = score_token(a, b, span);
        for_each_chunk_backwards(span, [&](int64_t from, int n) {
            rewards_of(a, b, span, from, n, lands);
            add_moments(a.rewards + span.begin + from, a.gae.mask + span.begin + from, n, parts[b]);
        });
    });
    return whitening(total(parts, a.gae.sequences.count), false, true);
}

}  // namespace

void rollout_advantages(const RolloutArgs& a) {
    const GaeArgs& g = a.gae;
    const Recursion shared = recursion(g.gamma, g.lam);
    const size_t count = size_t(g.sequences.count);
    Moments* parts = new Moments[2 * count]();
    const Whitening reward_scale = a.whiten_rewards ? reward_statistics(a, parts + count) : Whitening{};
    for_each_sequence(a, [&](int64_t b, Span span) {
        const int64_t lands = score_token(a, b, span);
        const Recursion r = g.lams ? recursion(g.gamma, g.lams[b]) : shared;
        Next next{0.f, g.bootstrap ? g.bootstrap[b] : 0.f};
        bool seen = false;
        for_each_chunk_backwards(span, [&](int64_t from, int n) {
            const int64_t at = span.begin + from;
            const uint8_t* mask = g.mask + at;
            if (a.whiten_rewards) {
                whiten(a.rewards + at, mask, n, reward_scale, a.rewards + at);
            } else {
                rewards_of(a, b, span, from, n, lands);
            }
            next = run_chunk(a.rewards + at, g.values + at, mask, n, g.skip_holes, g.advantages + at, g.returns + at, r, next, seen);
            if (a.whiten_advantages) add_moments(g.advantages + at, mask, n, parts[b]);
        });
    });
    if (a.whiten_advantages) {
        const Whitening w = whitening(total(parts, g.sequences.count), true, true);
        for_each_sequence(a, [&](int64_t, Span s) {
            whiten(g.advantages + s.begin, g.mask + s.begin, s.length, w, g.advantages + s.begin);
        });
    }
    delete[] parts;
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// The recurrence of GAE on one sequence: a scan inside each vector and a carry between vectors, from the last token to the
// first.
//
// Tokens are processed in chunks that are counted from the start of their sequence, and the actions of a chunk are compacted if
// holes are skipped. A padded row and the same row packed therefore give the same bits.
#pragma once
#include "../args.h"
#include "../math/gae.h"
#include "moments.h"

namespace rlhf {
namespace RLHF_ISA {

constexpr int kChunk = 1024;

// Return `v` shifted by K lanes: lane i is lane i + K of `v`, and the last K lanes are 0.
template <int K>
RLHF_HD vf shift_down(vf v) {
#if defined(RLHF_ISA_AVX512)
    return bits<vf>(_mm512_maskz_alignr_epi32(__mmask16(0xffff >> K), bits<__m512i>(v), bits<__m512i>(v), K));
#elif defined(RLHF_ISA_AVX2)
    const __m256i from = _mm256_setr_epi32(K, K + 1, K + 2, K + 3, K + 4, K + 5, K + 6, K + 7);
    return bits<vf>(_mm256_blend_ps(_mm256_setzero_ps(), _mm256_permutevar8x32_ps(bits<__m256>(v), from), 0xff >> K));
#else
    vf out{};
    for (int i = 0; i + K < W; i++) out[i] = v[i + K];
    return out;
#endif
}

// Constants of the recurrence.
struct Recursion {
    float gamma;
    float powers[5];                    // (γλ)^1, 2, 4, 8: distances inside a vector
    alignas(64) float to_carry[2 * W];  // (γλ)^(W - i), W - i the distance of lane i from the carry; then W zeros
};

RLHF_HD Recursion recursion(float gamma, float lam) {
    Recursion r{};
    r.gamma = gamma;
    double power = 1;
    for (int i = W - 1; i >= 0; i--) {
        power *= double(gamma) * lam;
        r.to_carry[i] = float(power);
    }
    for (int k = 0, distance = 1; distance < W; k++, distance *= 2) r.powers[k] = r.to_carry[W - distance];
    return r;
}

// Advantage and value of the next action in time.
struct Next {
    float advantage;
    float value;
};

RLHF_HD vf scan(vf x, const Recursion& r) {
    x = discounted(x, r.powers[0], shift_down<1>(x));
    x = discounted(x, r.powers[1], shift_down<2>(x));
    if (W > 4) x = discounted(x, r.powers[2], shift_down<(W > 4 ? 4 : 0)>(x));
    if (W > 8) x = discounted(x, r.powers[3], shift_down<(W > 8 ? 8 : 0)>(x));
    return x;
}

// Run the recurrence over n consecutive actions; the vectors start at the first action.
RLHF_HD Next run(const float* rewards, const float* values, int n, float* advantages, float* returns, const Recursion& r,
                 Next next) {
    const int whole = n / W * W, rest = n - whole;
    if (rest) {
        const vf v = load_tail(values + whole, rest, 0.f);
        alignas(64) float later[W + 1] = {};
        store(later, v);
        later[rest] = next.value;
        vf delta = td_error(load_tail(rewards + whole, rest, 0.f), v, load(later + 1), r.gamma);
        for (int i = rest; i < W; i++) delta[i] = 0.f;
        const vf a = discounted(scan(delta, r), load(r.to_carry + W - rest), splat(next.advantage));
        store_tail(advantages + whole, a, rest);
        store_tail(returns + whole, a + v, rest);
        next = {a[0], v[0]};
    }
    for (int i = whole - W; i >= 0; i -= W) {
        const vf v = load(values + i);
        vf later = shift_down<1>(v);
        later[W - 1] = next.value;
        const vf delta = td_error(load(rewards + i), v, later, r.gamma);
        const vf a = discounted(scan(delta, r), load(r.to_carry), splat(next.advantage));
        store(advantages + i, a);
        store(returns + i, a + v);
        next = {a[0], v[0]};
    }
    return next;
}

// Run the recurrence over a chunk whose first tokens are not exactly its actions. `skip`: the actions are compacted; otherwise
// holes are steps with reward 0 and value 0.
RLHF_HD Next run_with_holes(const float* rewards, const float* values, const uint8_t* mask, int n, bool skip, float* advantages,
                            float* returns, const Recursion& r, Next next) {
    alignas(64) float reward[kChunk], value[kChunk], advantage[kChunk], target[kChunk];
    int length = 0;
    for (int i = 0; i < n; i++) {
        reward[length] = mask[i] ? rewards[i] : 0.f;
        value[length] = mask[i] ? values[i] : 0.f;
        length += skip ? mask[i] : 1;
    }
    next = run(reward, value, length, advantage, target, r, next);
    for (int i = 0, from = 0; i < n; i++) {
        advantages[i] = mask[i] ? advantage[from] : 0.f;
        returns[i] = mask[i] ? target[from] : 0.f;
        from += skip ? mask[i] : 1;
    }
    return next;
}

// Run the recurrence over one chunk of n tokens. `seen`: whether a later chunk has an action; set to true if this chunk has
// one.
RLHF_HD Next run_chunk(const float* rewards, const float* values, const uint8_t* mask, int n, bool skip, float* advantages,
                       float* returns, const Recursion& r, Next next, bool& seen) {
    int length = n, count = count_true(mask, n);
    if (skip || !seen) {  // masked tokens after the last action are padding, not holes
        if (count == 0) {
            length = 0;
        } else if (count_true(mask, count) == count) {
            length = count;
        } else {
            while (!mask[length - 1]) length--;
        }
    }
    seen = seen || count > 0;
    memset(advantages + length, 0, size_t(n - length) * sizeof(float));
    memset(returns + length, 0, size_t(n - length) * sizeof(float));
    if (length == count) return run(rewards, values, length, advantages, returns, r, next);
    return run_with_holes(rewards, values, mask, length, skip, advantages, returns, r, next);
}

struct Span {
    int64_t begin, length;
};

RLHF_HD Span span_of(const Sequences& s, int64_t i) {
    if (s.cu_seqlens) return {s.cu_seqlens[i], s.cu_seqlens[i + 1] - s.cu_seqlens[i]};
    return {i * s.length, s.length};
}

// Threads are used from kParallelTokens on: with fewer tokens, one core finishes before a second one wakes up. They receive
// sequences in pieces of about kPieceTokens tokens.
constexpr int64_t kParallelTokens = 32768, kPieceTokens = 16384;

RLHF_HD int sequences_a_piece(const Sequences& s, int64_t n) {
    const int64_t pieces = n / kPieceTokens + 1;
    return int(s.count / pieces > 1 ? s.count / pieces : 1);
}

}  // namespace RLHF_ISA
}  // namespace rlhf

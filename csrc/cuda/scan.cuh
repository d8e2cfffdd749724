// The recurrence of GAE over one tile of a sequence, in one block: each lane composes a few tokens, a warp joins its lanes with
// shuffles, and a block joins its warps through shared memory. The order of every sum is fixed, so repeated calls give the same
// bits.
//
// Tokens are counted from the start of their sequence, so a padded row and the same row packed give the same bits.
#pragma once
#include "../math/gae.h"
#include "../math/moments.h"
#include "common.cuh"

namespace rlhf {
namespace cuda {

constexpr int kLane = 4;  // consecutive tokens of a lane: 16 bytes of float32

// A tile of THREADS * CHUNKS * 4 tokens. The tokens of a warp are consecutive, and so are the tokens of each of its chunks.
template <int THREADS, int CHUNKS>
struct Shape {
    static constexpr int threads = THREADS, chunks = CHUNKS, warps = THREADS / kWarp;
    static constexpr int resident = THREADS < 256 ? 6 : THREADS < 512 ? 2 : 1;  // blocks per multiprocessor: bounds registers
    static constexpr int chunk = kWarp * kLane, tile = THREADS * CHUNKS * kLane;
    // Return the position in the tile of this thread's first token in chunk c.
    static __device__ __forceinline__ int first(int c) {
        return (thread_id() / kWarp * CHUNKS + c) * chunk + thread_id() % kWarp * kLane;
    }
};

struct Span {
    int64_t begin, length;
};

static __device__ __forceinline__ Span span_of(const Sequences& s, int64_t i) {
    if (s.cu_seqlens) return {s.cu_seqlens[i], s.cu_seqlens[i + 1] - s.cu_seqlens[i]};
    return {i * s.length, s.length};
}

static __device__ __forceinline__ int tokens_left(int64_t n) { return n < 0 ? 0 : n < kLane ? int(n) : kLane; }

// Load four tokens from `x`, of which the first `n` exist; the others are 0.
static __device__ __forceinline__ void load4(const float* x, int n, float (&out)[kLane]) {
    if (n == kLane && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
        const float4 v = *reinterpret_cast<const float4*>(x);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < kLane; i++) out[i] = i < n ? x[i] : 0.f;
}

static __device__ __forceinline__ void store4(float* x, int n, const float (&v)[kLane]) {
    if (n == kLane && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
        *reinterpret_cast<float4*>(x) = make_float4(v[0], v[1], v[2], v[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kLane; i++) {
        if (i < n) x[i] = v[i];
    }
}

// Return the mask of four tokens as bits; bit i is set if token i exists and counts.
static __device__ __forceinline__ unsigned load_mask4(const uint8_t* mask, int n) {
    if (n == kLane && reinterpret_cast<uintptr_t>(mask) % 4 == 0) {
        const uint32_t v = *reinterpret_cast<const uint32_t*>(mask);
        return (v & 1) | (v >> 7 & 2) | (v >> 14 & 4) | (v >> 21 & 8);
    }
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kLane; i++) bits |= i < n && mask[i] ? 1u << i : 0;
    return bits;
}

// The tokens of a tile that a thread holds; masked tokens are 0.
template <class S>
struct Held {
    float reward[S::chunks][kLane], value[S::chunks][kLane];
    unsigned mask[S::chunks];
    int left[S::chunks];  // how many of the four tokens are in the sequence
};

template <class S>
__device__ __forceinline__ void load_values(const GaeArgs& a, Span span, int64_t tile, Held<S>& held) {
#pragma unroll
    for (int c = 0; c < S::chunks; c++) {
        const int64_t at = tile * S::tile + S::first(c);
        held.left[c] = tokens_left(span.length - at);
        held.mask[c] = held.left[c] > 0 ? load_mask4(a.mask + span.begin + at, held.left[c]) : 0;
        load4(a.values + span.begin + at, held.left[c], held.value[c]);
#pragma unroll
        for (int i = 0; i < kLane; i++) held.value[c][i] = held.mask[c] >> i & 1 ? held.value[c][i] : 0.f;
    }
}

// Return the position in the tile of the last token that counts, or -1; every thread returns the same.
template <class S>
__device__ __forceinline__ int last_in_tile(const Held<S>& held, int* shared) {
    int last = -1;
#pragma unroll
    for (int c = 0; c < S::chunks; c++) {
#pragma unroll
        for (int i = 0; i < kLane; i++) last = held.mask[c] >> i & 1 ? S::first(c) + i : last;
    }
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) last = max(last, __shfl_xor_sync(kAllLanes, last, d));
    if (thread_id() % kWarp == 0) shared[thread_id() / kWarp] = last;
    __syncthreads();  // or a thread could read a warp's position before it is written
#pragma unroll
    for (int w = 0; w < S::warps; w++) last = max(last, shared[w]);
    return last;
}

// Add `x` to the reward of one token of the tile, if it counts.
template <class S>
__device__ __forceinline__ void add_reward(Held<S>& held, int64_t token, float x) {
#pragma unroll
    for (int c = 0; c < S::chunks; c++) {
#pragma unroll
        for (int i = 0; i < kLane; i++) {
            if (S::first(c) + i == token && held.mask[c] >> i & 1) held.reward[c][i] += x;
        }
    }
}

static __device__ __forceinline__ GaeSegment shuffle_down(const GaeSegment& s, int d) {
    GaeSegment r;
    r.decay = __shfl_down_sync(kAllLanes, s.decay, d);
    r.next = __shfl_down_sync(kAllLanes, s.next, d);
    r.sum = __shfl_down_sync(kAllLanes, s.sum, d);
    r.value = __shfl_down_sync(kAllLanes, s.value, d);
    r.steps = __shfl_down_sync(kAllLanes, int(s.steps), d) != 0;
    return r;
}

static __device__ __forceinline__ GaeSegment of_lane(const GaeSegment& s, int lane) {
    GaeSegment r;
    r.decay = __shfl_sync(kAllLanes, s.decay, lane);
    r.next = __shfl_sync(kAllLanes, s.next, lane);
    r.sum = __shfl_sync(kAllLanes, s.sum, lane);
    r.value = __shfl_sync(kAllLanes, s.value, lane);
    r.steps = __shfl_sync(kAllLanes, int(s.steps), lane) != 0;
    return r;
}

struct Recursion {
    float gamma, decay;  // γ, γλ
    bool skip;           // true: holes are skipped; false: holes are steps with reward 0 and value 0
};

static __device__ __forceinline__ Recursion recursion(const GaeArgs& a, int64_t b) {
    const float lam = a.lams ? a.lams[b] : a.lam;
    return {a.gamma, float(double(a.gamma) * lam), a.skip_holes};
}

// Return whether token i is a step. Without `skip` this includes masked tokens after the last action: there the state is 0, as
// the bootstrap is part of the last reward, and a step with reward 0 and value 0 keeps it 0.
static __device__ __forceinline__ bool is_step(const Recursion& r, unsigned mask, int i, int left) {
    return r.skip ? mask >> i & 1 : i < left;
}

// Compute `runs`, per chunk the segment from this lane to the end of the chunk, and `shared`, the segment of every warp.
template <class S>
__device__ __forceinline__ void scan_tile(const Held<S>& held, const Recursion& r, GaeSegment (&runs)[S::chunks],
                                          GaeSegment* shared) {
    const int lane = thread_id() % kWarp;
    GaeSegment warp{};
#pragma unroll
    for (int c = S::chunks - 1; c >= 0; c--) {
        GaeSegment run{};
#pragma unroll
        for (int i = kLane - 1; i >= 0; i--) {
            if (is_step(r, held.mask[c], i, held.left[c])) {
                run = gae_prepend(held.reward[c][i], held.value[c][i], run, r.gamma, r.decay);
            }
        }
#pragma unroll
        for (int d = 1; d < kWarp; d *= 2) {
            const GaeSegment after = shuffle_down(run, d);
            if (lane + d < kWarp) run = gae_join(run, after);
        }
        runs[c] = run;
        warp = gae_join(of_lane(run, 0), warp);
    }
    if (lane == 0) shared[thread_id() / kWarp] = warp;
    __syncthreads();  // or a warp's segment could be read before it is written
}

// Return the state that follows this warp's tokens. `after` is the state that follows the tile, and becomes the state of the
// tile's first step.
template <class S>
__device__ __forceinline__ GaeState state_after_warp(const GaeSegment* shared, GaeState& after) {
    GaeState mine = after;
#pragma unroll 4
    for (int w = S::warps - 1; w >= 0; w--) {
        if (w == thread_id() / kWarp) mine = after;
        after = gae_apply(shared[w], after);
    }
    return mine;
}

// Run the recurrence over the tokens of each lane, from the state that follows them, and write advantages and returns. With
// `add`, the advantages that count are added to `moments`.
template <class S>
__device__ __forceinline__ void write_tile(const GaeArgs& a, Span span, int64_t tile, const Held<S>& held, const Recursion& r,
                                           const GaeSegment (&runs)[S::chunks], GaeState after, bool add, Moments& moments) {
#pragma unroll
    for (int c = S::chunks - 1; c >= 0; c--) {
        GaeSegment later = shuffle_down(runs[c], 1);
        if (thread_id() % kWarp == kWarp - 1) later.steps = false;
        GaeState state = gae_apply(later, after);
        float advantage[kLane], target[kLane];
#pragma unroll
        for (int i = kLane - 1; i >= 0; i--) {
            if (is_step(r, held.mask[c], i, held.left[c])) {
                state = gae_step(held.reward[c][i], held.value[c][i], state, r.gamma, r.decay);
            }
            const bool counts = held.mask[c] >> i & 1;
            advantage[i] = counts ? state.advantage : 0.f;
            target[i] = counts ? state.advantage + state.value : 0.f;
            if (add && counts) {
                const double x = state.advantage;
                moments = moments + Moments{1, x, x * x};
            }
        }
        const int64_t at = span.begin + tile * S::tile + S::first(c);
        store4(a.advantages + at, held.left[c], advantage);
        store4(a.returns + at, held.left[c], target);
        after = gae_apply(of_lane(runs[c], 0), after);
    }
}

// Add the moments of all threads in fixed order; only thread 0 returns the sum. `shared` has one entry per warp.
template <int THREADS>
__device__ __forceinline__ Moments block_total(Moments m, Moments* shared) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
        m = m + Moments{__shfl_down_sync(kAllLanes, m.count, d), __shfl_down_sync(kAllLanes, m.sum, d),
                        __shfl_down_sync(kAllLanes, m.squares, d)};
    }
    if (thread_id() % kWarp == 0) shared[thread_id() / kWarp] = m;
    __syncthreads();  // or thread 0 could add a warp's moments before they are written
    if (thread_id() == 0) {
        for (int w = 1; w < THREADS / kWarp; w++) m = m + shared[w];
    }
    return m;
}

// Return in every thread the whitening that is computed from the parts of all blocks.
template <int THREADS>
__device__ __forceinline__ Whitening whitening_of(const Moments* parts, int64_t count, bool shift_mean) {
    __shared__ Moments warps[THREADS / kWarp];
    __shared__ Whitening result;
    Moments m{};
    for (int64_t i = thread_id(); i < count; i += THREADS) m = m + parts[i];
    m = block_total<THREADS>(m, warps);
    if (thread_id() == 0) result = whitening(m, shift_mean, true);
    __syncthreads();  // or the other threads could read the result before it is written
    return result;
}

}  // namespace cuda
}  // namespace rlhf

// GAE with one block per sequence, which processes the tiles of the sequence from the last to the first. `Rewards` is the
// source of the rewards.
#pragma once
#include "ops.h"
#include "scan.cuh"

namespace rlhf {
namespace cuda {

template <class S, class Rewards>
__global__ void __launch_bounds__(S::threads, S::resident) scan_rows(GaeArgs a, Rewards rewards, Moments* parts) {
    __shared__ GaeSegment warps[S::warps];
    __shared__ int lasts[S::warps];
    __shared__ Moments sums[S::warps];
    const int64_t b = blockIdx.x;
    const Span span = span_of(a.sequences, b);
    const Recursion r = recursion(a, b);
    const Whitening scale = rewards.template scale<S::threads>();
    GaeState after{0.f, 0.f};
    Moments moments{};
    bool seen = false;
    for (int64_t tile = span.length > 0 ? (span.length - 1) / S::tile : -1; tile >= 0; tile--) {
        Held<S> held;
        load_values<S>(a, span, tile, held);
        rewards.load(span, tile, scale, held);
        int last = -1;
        if (!seen && (a.bootstrap || Rewards::scored)) {
            last = last_in_tile<S>(held, lasts);
            seen = last >= 0;
        }
        rewards.finish(b, span, tile, last, held);
        if (a.bootstrap && last >= 0) add_reward<S>(held, last, a.gamma * a.bootstrap[b]);
        GaeSegment runs[S::chunks];
        scan_tile<S>(held, r, runs, warps);
        const GaeState mine = state_after_warp<S>(warps, after);
        write_tile<S>(a, span, tile, held, r, runs, mine, parts != nullptr, moments);
        __syncthreads();  // or a fast warp could overwrite runs that a slow warp still reads
    }
    if (parts) {
        moments = block_total<S::threads>(moments, sums);
        if (thread_id() == 0) parts[b] = moments;
    }
}

// Rewards in memory, whitened after the load if `w.parts` is not null.
struct Given {
    static constexpr bool scored = false;
    const float* rewards;
    RewardWhitening w;

    template <int THREADS>
    __device__ __forceinline__ Whitening scale() const {
        return w.parts ? whitening_of<THREADS>(w.parts, w.count, false) : Whitening{0.f, 1.f, 0.f};
    }

    template <class S>
    __device__ __forceinline__ void load(Span span, int64_t tile, const Whitening& scale, Held<S>& held) const {
#pragma unroll
        for (int c = 0; c < S::chunks; c++) {
            const int64_t at = span.begin + tile * S::tile + S::first(c);
            load4(rewards + at, held.left[c], held.reward[c]);
#pragma unroll
            for (int i = 0; i < kLane; i++) {
                const float x = w.parts ? whitened(held.reward[c][i], scale) : held.reward[c][i];
                held.reward[c][i] = held.mask[c] >> i & 1 ? x : 0.f;
            }
        }
    }

    template <class S>
    __device__ __forceinline__ void finish(int64_t, Span span, int64_t tile, int, Held<S>& held) const {
        if (!w.parts) return;
#pragma unroll
        for (int c = 0; c < S::chunks; c++) {
            store4(w.rewards + span.begin + tile * S::tile + S::first(c), held.left[c], held.reward[c]);
        }
    }
};

// Short rows have small blocks, so that every multiprocessor has one. The tiles of long rows are small enough for two blocks
// per multiprocessor, so that one block loads while the other computes.
template <class Rewards>
void launch_rows(const char* op, const GaeArgs& a, const Rewards& rewards, Moments* parts, void* stream) {
    const Sequences& s = a.sequences;
    const int64_t mean = s.count ? a.n / s.count : 0;
    const int64_t longest = s.cu_seqlens ? 2 * mean : s.length;  // only the device knows the lengths of packed sequences
    const int64_t blocks = s.count;
    auto with = [&](auto shape) {
        using S = decltype(shape);
        launch(op, scan_rows<S, Rewards>, Launch{blocks, S::threads}, stream, a, rewards, parts);
    };
    if (longest <= 512) {
        with(Shape<128, 1>());
    } else if (longest <= 2048) {
        with(Shape<256, 2>());
    } else if (longest <= 4096) {
        with(Shape<512, 2>());
    } else {
        with(Shape<256, 4>());
    }
}

}  // namespace cuda
}  // namespace rlhf

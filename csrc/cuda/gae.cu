// Advantages and value targets of padded or packed sequences: one block per sequence, or one block per tile for few long
// sequences.
//
// Long sequences take three launches: `reduce_tiles` composes the steps of every tile into a segment, `carry_states` computes
// from the segments the state that follows each tile, from the last tile to the first, and `write_tiles` runs the recurrence in
// every tile from that state. No block waits for other blocks.
#include "rows.cuh"

namespace rlhf {
namespace cuda {

namespace {

using Long = Shape<256, 4>;
static_assert(Long::tile == kTile, "tile_places counts tiles of kTile tokens");

// A tile of a sequence; `exists` is false for a place without tokens, see tile_places.
struct Place {
    int64_t b, tile;
    Span span;
    bool exists;
};

__device__ __forceinline__ int64_t first_place(const Sequences& s, int64_t b) {
    return s.cu_seqlens ? s.cu_seqlens[b] / kTile + b : b * ((s.length + kTile - 1) / kTile);
}

__device__ __forceinline__ Place place_of(const Sequences& s, int64_t place) {
    int64_t b = 0;
    if (s.cu_seqlens) {
        for (int64_t above = s.count; above - b > 1;) {  // search for the last sequence whose first place is at most `place`
            const int64_t middle = (b + above) / 2;
            (first_place(s, middle) <= place ? b : above) = middle;
        }
    } else {
        b = place / ((s.length + kTile - 1) / kTile);
    }
    const Span span = span_of(s, b);
    const int64_t tile = place - first_place(s, b);
    return {b, tile, span, tile * kTile < span.length};
}

// Return the position of `token` inside the tile, or -1 if it is not in the tile.
__device__ __forceinline__ int64_t inside(int64_t token, int64_t tile) {
    return token / kTile == tile && token >= 0 ? token - tile * kTile : -1;
}

__device__ __forceinline__ void load_tile(const GaeArgs& a, const Given& rewards, const Whitening& scale, const Place& p,
                                          const int64_t* last, Held<Long>& held, bool write) {
    load_values<Long>(a, p.span, p.tile, held);
    rewards.load(p.span, p.tile, scale, held);
    if (write) rewards.finish(p.b, p.span, p.tile, -1, held);
    if (a.bootstrap) add_reward<Long>(held, inside(last[p.b], p.tile), a.gamma * a.bootstrap[p.b]);
}

__global__ void __launch_bounds__(Long::threads, Long::resident)
    reduce_tiles(GaeArgs a, Given rewards, const int64_t* last, GaeSegment* totals) {
    __shared__ GaeSegment warps[Long::warps];
    const Place p = place_of(a.sequences, blockIdx.x);
    if (!p.exists) return;
    const Whitening scale = rewards.scale<Long::threads>();
    Held<Long> held;
    load_tile(a, rewards, scale, p, last, held, false);
    GaeSegment runs[Long::chunks];
    scan_tile<Long>(held, recursion(a, p.b), runs, warps);
    if (thread_id() != 0) return;
    GaeSegment total = warps[Long::warps - 1];
    for (int w = Long::warps - 2; w >= 0; w--) total = gae_join(warps[w], total);
    totals[blockIdx.x] = total;
}

// One warp per sequence. Its lanes load 32 tiles at a time; the state is carried over them from the last to the first.
__global__ void carry_states(Sequences s, const GaeSegment* totals, GaeState* after) {
    const int64_t b = int64_t(blockIdx.x) * (blockDim.x / kWarp) + thread_id() / kWarp;
    if (b >= s.count) return;
    const int lane = thread_id() % kWarp;
    const int64_t tiles = (span_of(s, b).length + kTile - 1) / kTile, first = first_place(s, b);
    GaeState state{0.f, 0.f};
    for (int64_t end = tiles; end > 0; end -= kWarp) {
        const int64_t tile = end - 1 - lane;
        GaeSegment total{};
        if (tile >= 0) total = totals[first + tile];
        for (int i = 0; i < kWarp; i++) {
            if (lane == i && tile >= 0) after[first + tile] = state;
            state = gae_apply(of_lane(total, i), state);
        }
    }
}

__global__ void __launch_bounds__(Long::threads, Long::resident)
    write_tiles(GaeArgs a, Given rewards, const int64_t* last, const GaeState* after, Moments* parts) {
    __shared__ GaeSegment warps[Long::warps];
    __shared__ Moments sums[Long::warps];
    const Place p = place_of(a.sequences, blockIdx.x);
    Moments moments{};
    if (p.exists) {
        const Whitening scale = rewards.scale<Long::threads>();
        Held<Long> held;
        load_tile(a, rewards, scale, p, last, held, true);
        const Recursion r = recursion(a, p.b);
        GaeSegment runs[Long::chunks];
        scan_tile<Long>(held, r, runs, warps);
        GaeState state = after[blockIdx.x];
        state = state_after_warp<Long>(warps, state);
        write_tile<Long>(a, p.span, p.tile, held, r, runs, state, parts != nullptr, moments);
    }
    if (parts) {
        moments = block_total<Long::threads>(moments, sums);
        if (thread_id() == 0) parts[blockIdx.x] = moments;
    }
}

constexpr int kSearch = 256, kEach = 16;  // threads of a block of find_last, tokens per thread and round

__global__ void __launch_bounds__(kSearch) find_last(GaeArgs a, int64_t* last) {
    __shared__ int found[kSearch / kWarp];
    const Span span = span_of(a.sequences, blockIdx.x);
    int64_t end = span.length;
    int best = -1;
    for (; end > 0 && best < 0; end -= kSearch * kEach) {
        const int64_t start = end - kSearch * kEach;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = i * kSearch + thread_id();
            if (start + at >= 0 && a.mask[span.begin + start + at]) best = at;
        }
#pragma unroll
        for (int d = kWarp / 2; d > 0; d /= 2) best = max(best, __shfl_xor_sync(kAllLanes, best, d));
        __syncthreads();  // or a slow warp could read this round's positions as the last round's
        if (thread_id() % kWarp == 0) found[thread_id() / kWarp] = best;
        __syncthreads();  // or a warp's position could be read before it is written
        for (int w = 0; w < kSearch / kWarp; w++) best = max(best, found[w]);
    }
    if (thread_id() == 0) last[blockIdx.x] = best < 0 ? -1 : end + best;
}

}  // namespace

void last_actions(const char* op, const GaeArgs& a, int64_t* last, void* stream) {
    launch(op, find_last, Launch{a.sequences.count, kSearch}, stream, a, last);
}

int64_t scan_given(const char* op, const GaeArgs& a, RewardWhitening w, Moments* parts, Workspace& work, void* stream) {
    const Given rewards{a.rewards, w};
    const Sequences& s = a.sequences;
    if (!tiled(a.n, s)) {
        launch_rows(op, a, rewards, parts, stream);
        return s.count;
    }
    const int64_t places = tile_places(a.n, s);
    int64_t* last = work.take<int64_t>(s.count);
    GaeSegment* totals = work.take<GaeSegment>(places);
    GaeState* after = work.take<GaeState>(places);
    if (a.bootstrap) last_actions(op, a, last, stream);
    const int64_t* known = last;
    const GaeSegment* reduced = totals;
    const GaeState* carried = after;
    launch(op, reduce_tiles, Launch{places, Long::threads}, stream, a, rewards, known, totals);
    launch(op, carry_states, Launch{(s.count + 3) / 4, 4 * kWarp}, stream, s, reduced, after);
    launch(op, write_tiles, Launch{places, Long::threads}, stream, a, rewards, known, carried, parts);
    return places;
}

size_t gae_workspace(int64_t n, const Sequences& s) {
    if (!tiled(n, s)) return 0;
    Workspace work{nullptr};
    work.take<int64_t>(s.count);
    work.take<GaeSegment>(tile_places(n, s));
    work.take<GaeState>(tile_places(n, s));
    return work.used;
}

void gae(const GaeArgs& a, void* workspace, void* stream) {
    Workspace work{static_cast<char*>(workspace)};
    scan_given("gae", a, RewardWhitening{}, nullptr, work, stream);
}

}  // namespace cuda
}  // namespace rlhf

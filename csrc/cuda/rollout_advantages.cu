// KL-shaped rewards, GAE and the sums for whitening in one launch. Whitening scales the advantages in a second, smaller launch.
//
// In two cases a light launch computes the rewards first: whitened rewards need their statistics before the recurrence, and the
// launches for tiles of long sequences read finished rewards.
#include "rows.cuh"

namespace rlhf {
namespace cuda {

namespace {

__device__ __forceinline__ float clipped_score(const RolloutArgs& a, int64_t b) {
    const float s = a.scores[b], limit = a.score_clip;
    return s > limit ? limit : s < -limit ? -limit : s;
}

// Compute -kl_coef * KL of the four tokens from `at` on, and write their KL; both are 0 for tokens that do not count.
__device__ __forceinline__ void shape4(const RolloutArgs& a, int64_t at, int left, unsigned mask, float (&reward)[kLane]) {
    float logprob[kLane], ref[kLane], kl[kLane];
    load4(a.logprobs + at, left, logprob);
    load4(a.ref_logprobs + at, left, ref);
#pragma unroll
    for (int i = 0; i < kLane; i++) {
        kl[i] = mask >> i & 1 ? kl_term(logprob[i] - ref[i], a.kl_estimator).value : 0.f;
        reward[i] = -a.kl_coef * kl[i];
    }
    store4(a.kl + at, left, kl);
}

// Rewards that the kernel of the recurrence computes from scores and log-probs.
struct Shaped {
    static constexpr bool scored = true;
    RolloutArgs a;

    template <int THREADS>
    __device__ __forceinline__ Whitening scale() const {
        return {0.f, 1.f, 0.f};
    }

    template <class S>
    __device__ __forceinline__ void load(Span span, int64_t tile, const Whitening&, Held<S>& held) const {
#pragma unroll
        for (int c = 0; c < S::chunks; c++) {
            shape4(a, span.begin + tile * S::tile + S::first(c), held.left[c], held.mask[c], held.reward[c]);
        }
    }

    // Add the score and write the rewards. `last` is the position in this tile of the sequence's last action, or -1.
    template <class S>
    __device__ __forceinline__ void finish(int64_t b, Span span, int64_t tile, int last, Held<S>& held) const {
        const int64_t lands = a.score_index ? a.score_index[b] - tile * S::tile : last;
        add_reward<S>(held, lands, clipped_score(a, b));
#pragma unroll
        for (int c = 0; c < S::chunks; c++) {
            store4(a.rewards + span.begin + tile * S::tile + S::first(c), held.left[c], held.reward[c]);
        }
    }
};

constexpr int kThreads = 256;

// Return the sequence of a token.
__device__ __forceinline__ int64_t sequence_of(const Sequences& s, int64_t token) {
    if (!s.cu_seqlens) return token / s.length;
    int64_t b = 0;
    for (int64_t above = s.count; above - b > 1;) {
        const int64_t middle = (b + above) / 2;
        (s.cu_seqlens[middle] <= token ? b : above) = middle;
    }
    return b;
}

// Compute the rewards, with the scores, and their moments.
__global__ void __launch_bounds__(kThreads) shape_rewards(RolloutArgs a, const int64_t* last, Moments* parts) {
    __shared__ Moments sums[kThreads / kWarp];
    Moments m{};
    const int64_t stride = int64_t(gridDim.x) * kThreads * kLane;
    for (int64_t at = (int64_t(blockIdx.x) * kThreads + thread_id()) * kLane; at < a.gae.n; at += stride) {
        const int left = tokens_left(a.gae.n - at);
        const unsigned mask = load_mask4(a.gae.mask + at, left);
        float reward[kLane];
        shape4(a, at, left, mask, reward);
        if (mask) {
            int64_t b = sequence_of(a.gae.sequences, at);
            Span span = span_of(a.gae.sequences, b);
#pragma unroll
            for (int i = 0; i < kLane; i++) {
                if (!(mask >> i & 1)) continue;
                while (at + i >= span.begin + span.length && b + 1 < a.gae.sequences.count) span = span_of(a.gae.sequences, ++b);
                const int64_t lands = a.score_index ? a.score_index[b] : last[b];
                if (at + i - span.begin == lands) reward[i] += clipped_score(a, b);
                const double x = reward[i];
                m = m + Moments{1, x, x * x};
            }
        }
        store4(a.rewards + at, left, reward);
    }
    if (parts) {
        m = block_total<kThreads>(m, sums);
        if (thread_id() == 0) parts[blockIdx.x] = m;
    }
}

// Above this number of parts, `fold` adds them once, so that not every block of `whiten` has to.
constexpr int64_t kManyParts = 2048;
constexpr int kFold = 1024;

__global__ void __launch_bounds__(kFold) fold(Moments* parts, int64_t count) {
    __shared__ Moments sums[kFold / kWarp];
    Moments m{};
    for (int64_t i = thread_id(); i < count; i += kFold) m = m + parts[i];
    m = block_total<kFold>(m, sums);  // its barrier keeps parts[0] from being overwritten while it is read
    if (thread_id() == 0) parts[0] = m;
}

int64_t folded(const char* op, Moments* parts, int64_t count, void* stream) {
    if (count <= kManyParts) return count;
    launch(op, fold, Launch{1, kFold}, stream, parts, count);
    return 1;
}

__global__ void __launch_bounds__(kThreads) whiten(float* x, const uint8_t* mask, int64_t n, const Moments* parts, int64_t count) {
    const Whitening w = whitening_of<kThreads>(parts, count, true);
    const int64_t stride = int64_t(gridDim.x) * kThreads * kLane;
    for (int64_t at = (int64_t(blockIdx.x) * kThreads + thread_id()) * kLane; at < n; at += stride) {
        const int left = tokens_left(n - at);
        const unsigned counts = load_mask4(mask + at, left);
        float v[kLane];
        load4(x + at, left, v);
#pragma unroll
        for (int i = 0; i < kLane; i++) v[i] = counts >> i & 1 ? whitened(v[i], w) : 0.f;
        store4(x + at, left, v);
    }
}

// Return the number of blocks of an elementwise kernel: about as many as a device runs at a time, fewer for fewer tokens. It
// depends only on the number of tokens, so that the partial sums, and the bits of their total, are the same on every device.
int64_t blocks_for(int64_t n) {
    const int64_t needed = (n + kThreads * kLane - 1) / (kThreads * kLane);
    return needed < kManyParts / 2 ? needed : kManyParts / 2;
}

struct Room {
    Moments *rewards, *advantages;
    int64_t* last;
};

Room room_of(Workspace& work, int64_t n, const Sequences& s) {
    const int64_t advantages = tiled(n, s) ? tile_places(n, s) : s.count;
    return {work.take<Moments>(blocks_for(n)), work.take<Moments>(advantages), work.take<int64_t>(s.count)};
}

}  // namespace

size_t rollout_workspace(int64_t n, const Sequences& s) {
    Workspace work{nullptr};
    room_of(work, n, s);
    return work.used + gae_workspace(n, s);
}

void rollout_advantages(const RolloutArgs& a, void* workspace, void* stream) {
    const char* op = "rollout_advantages";
    const GaeArgs& g = a.gae;
    Workspace work{static_cast<char*>(workspace)};
    const Room room = room_of(work, g.n, g.sequences);
    Moments* parts = a.whiten_advantages ? room.advantages : nullptr;
    int64_t count = g.sequences.count;
    if (a.whiten_rewards || tiled(g.n, g.sequences)) {
        const int64_t blocks = blocks_for(g.n);
        Moments* sums = a.whiten_rewards ? room.rewards : nullptr;
        const int64_t* last = room.last;
        if (!a.score_index) last_actions(op, g, room.last, stream);
        launch(op, shape_rewards, Launch{blocks, kThreads}, stream, a, last, sums);
        count = scan_given(op, g, RewardWhitening{sums, blocks, a.rewards}, parts, work, stream);
    } else {
        launch_rows(op, g, Shaped{a}, parts, stream);
    }
    if (!a.whiten_advantages) return;
    count = folded(op, parts, count, stream);
    const Moments* total = parts;
    launch(op, whiten, Launch{blocks_for(g.n), kThreads}, stream, g.advantages, g.mask, g.n, total, count);
}

}  // namespace cuda
}  // namespace rlhf

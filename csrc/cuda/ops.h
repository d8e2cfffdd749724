// The launchers of every CUDA op. They take device addresses, a stream and, if they need temporary memory, a workspace of the
// size that the matching *_workspace function returns.
#pragma once
#include <cstddef>

#include "../args.h"
#include "../math/moments.h"

namespace rlhf {
namespace cuda {

size_t gae_workspace(int64_t n, const Sequences& s);
void gae(const GaeArgs& a, void* workspace, void* stream);

size_t rollout_workspace(int64_t n, const Sequences& s);
void rollout_advantages(const RolloutArgs& a, void* workspace, void* stream);

size_t importance_workspace(const ImportanceArgs& a);
void importance_weights(const ImportanceArgs& a, void* workspace, void* stream);

// Arguments of the PPO objective on logits, whose kernel writes the gradient of each row for an upstream gradient of 1.
struct LogitsPpoArgs {
    LogitRows x;
    PpoRows ppo;
    RowStats stats;            // out
    float* coefficients;       // (2, N) out: dL / d logprob and dL / d entropy of each row
    const float* denominator;  // ()
    void* dlogits;             // (N, V) out, or null: no gradient; may be the logits
    bool contiguous;           // rows of dlogits are adjacent; otherwise they have the strides of the logits
};

constexpr int64_t kRowShared = 64 * 1024;  // shared memory per block in bytes; three blocks fit on a multiprocessor

void logits_ppo_loss(const LogitsPpoArgs& a, int64_t shared_limit, void* stream);

// Multiply dlogits by `upstream`, a scalar on the device; if it is exactly 1, nothing is written. The gradient is computed
// again from logits and statistics; if it has overwritten the logits, it is scaled in place.
void rescale_dlogits(const LogitsPpoArgs& a, const float* upstream, void* stream);

// The declarations below are shared by the launchers of gae and rollout_advantages.

// Allocator of 16-byte aligned arrays in a block of memory; with a null `base`, it only computes the size of the block.
struct Workspace {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (size_t(count) * sizeof(T) + 15) / 16 * 16;
        return at;
    }
};

// Whitening of rewards by the moments in `parts`: the recurrence reads the whitened rewards, which are also written to
// `rewards`. If `parts` is null, rewards are not whitened.
struct RewardWhitening {
    const Moments* parts;
    int64_t count;
    float* rewards;
};

// Write to `last` the position of the last action in each sequence, or -1 if it has none.
void last_actions(const char* op, const GaeArgs& a, int64_t* last, void* stream);

// Compute GAE on rewards in memory. If `parts` is not null, partial moments of the advantages are written to it; return their
// number.
int64_t scan_given(const char* op, const GaeArgs& a, RewardWhitening w, Moments* parts, Workspace& work, void* stream);

constexpr int64_t kTile = 4096;  // tokens

// Return an upper bound of the number of tiles. A tile has tokens of one sequence only, and some places have no tokens.
static inline int64_t tile_places(int64_t n, const Sequences& s) {
    return s.cu_seqlens ? n / kTile + s.count : (s.length + kTile - 1) / kTile * s.count;
}

// Return whether sequences are long and too few to fill the device with one block per sequence.
static inline bool tiled(int64_t n, const Sequences& s) { return s.count < 264 && n > kTile * s.count; }

}  // namespace cuda
}  // namespace rlhf

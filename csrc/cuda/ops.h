// Every CUDA op: launchers that take device addresses, a stream and, where they need room, a workspace of the size they name.
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

// The logits-level objective: one read of each row, one write of its gradient for an upstream gradient of 1.
struct LogitsPpoArgs {
    LogitRows x;
    PpoRows ppo;
    RowStats stats;            // out
    float* coefficients;       // (2, N) out: dL / d logprob and dL / d entropy of each row
    const float* denominator;  // ()
    void* dlogits;             // (N, V) out, or null: no gradient; may be the logits
    bool contiguous;           // rows of dlogits follow each other; otherwise they lie as the logits do
};

constexpr int64_t kRowShared = 64 * 1024;  // bytes of a row that one block holds, so that three blocks share a multiprocessor

void logits_ppo_loss(const LogitsPpoArgs& a, int64_t shared_limit, void* stream);

// dlogits times `upstream`, a scalar on the device; nothing is touched where that is exactly 1. From logits and statistics,
// or, where the gradient took the logits' bytes, from the gradient itself.
void rescale_dlogits(const LogitsPpoArgs& a, const float* upstream, void* stream);

// Parts that the launchers of gae and rollout_advantages share.

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

// Rewards are whitened by the moments in `parts`, on their way into the recurrence and where they lie; null: taken as given.
struct RewardWhitening {
    const Moments* parts;
    int64_t count;
    float* rewards;
};

// Where the last action of each sequence lies, from its start; -1 without one.
void last_actions(const char* op, const GaeArgs& a, int64_t* last, void* stream);

// GAE on rewards that lie in memory. `parts` null, or room for the moments of the advantages; returns how many were written.
int64_t scan_given(const char* op, const GaeArgs& a, RewardWhitening w, Moments* parts, Workspace& work, void* stream);

// Tiles of a fixed size over all sequences, an upper bound: each sequence has its own, and some places stay empty.
constexpr int64_t kTile = 4096;
static inline int64_t tile_places(int64_t n, const Sequences& s) {
    return s.cu_seqlens ? n / kTile + s.count : (s.length + kTile - 1) / kTile * s.count;
}

// Long rows, and too few of them to fill the device with a block each.
static inline bool tiled(int64_t n, const Sequences& s) { return s.count < 264 && n > kTile * s.count; }

}  // namespace cuda
}  // namespace rlhf

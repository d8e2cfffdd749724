// The PPO objective on logits: a row is read once and its gradient written once, for an upstream gradient of 1.
//
// On sm_90 and later, a thread-block cluster holds a row in its shared memory: every block sums its part while it loads it, the
// sums are combined through distributed shared memory, and every block writes its part of the gradient. A block uses at most
// 64 KB, so that three blocks fit on a multiprocessor, and one loads while others store. Below sm_90 a cluster is one block. If
// a row does not fit in the shared memory of a cluster, one block reads it twice.
#include "ops.h"
#include "row.cuh"

namespace rlhf {
namespace cuda {

namespace {

constexpr int kThreads = 256, kResident = 3, kWarps = kThreads / kWarp;
constexpr int kBatch = 4;  // 16-byte loads in flight per thread

struct Sums {
    float shift;
    double sum, weighted;
};

// Start of a block's shared memory; the packs of its part of the row follow.
struct alignas(16) Front {
    float tops[kWarps];
    double sums[kWarps][2];
    Sums mine;
    RowCurve gradient;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    return x;
}

// Return this thread's sums over the block's part of the row; with CHIP, the packs are also stored in `held`.
template <class T, bool CAP, bool CHIP>
__device__ __forceinline__ RowSum read_part(const Row<T>& row, const Part& p, uint4* held, float edge, const Factor& f) {
    RowSum s{-FLT_MAX, 0.f, 0.f};
    const uint4* packs = row.front() + p.first;
    for (int start = thread_id(); start < p.count; start += kBatch * kThreads) {
        uint4 v[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
            if (start + k * kThreads < p.count) v[k] = packs[start + k * kThreads];
        }
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
            if (start + k * kThreads >= p.count) break;
            if (CHIP) held[start + k * kThreads] = v[k];
            float w[kPack<T>];
            unpack(v[k], w, T());
#pragma unroll
            for (int i = 0; i < kPack<T>; i++) w[i] = capped_logit<CAP>(w[i], f);
            add(s, w, f);
        }
    }
    if (p.edge >= 0) {
        const float w[1] = {capped_logit<CAP>(edge, f)};
        add(s, w, f);
    }
    return s;
}

// Add the sums of all threads in fixed order and store the result in `front.mine`.
__device__ __forceinline__ void sum_block(RowSum s, Front& front, const Factor& f) {
    const int lane = thread_id() % kWarp, w = thread_id() / kWarp;
    float top = warp_max(s.shift);
    if (lane == 0) front.tops[w] = top;
    __syncthreads();  // or a warp's maximum could be read before it is written
#pragma unroll
    for (int i = 0; i < kWarps; i++) top = fmaxf(top, front.tops[i]);
    move_shift(s, top, f);
    const double sum = warp_sum(s.sum), weighted = warp_sum(s.weighted);
    if (lane == 0) front.sums[w][0] = sum, front.sums[w][1] = weighted;
    __syncthreads();  // or thread 0 could add sums before they are written
    if (thread_id() != 0) return;
    Sums total{top, 0, 0};
    for (int i = 0; i < kWarps; i++) total.sum += front.sums[i][0], total.weighted += front.sums[i][1];
    front.mine = total;
}

// Return the sums of the whole row, in the first warp of each block of the cluster.
__device__ __forceinline__ Sums sum_cluster(Front& front, int ranks, const Factor& f) {
    const int lane = thread_id() % kWarp;
    Sums s{-FLT_MAX, 0, 0};
    if (lane < ranks) s = *peer(&front.mine, lane);
    const float top = warp_max(s.shift);
    const double d = fmaxf(kLowest, (s.shift - top) * f.binary), scale = exp2(d);
    return {top, warp_sum(scale * s.sum), warp_sum(scale * (s.weighted + d * s.sum))};
}

// Compute log-prob, entropy and the coefficients of the gradient from the sums of the row; store them if `write`.
__device__ __forceinline__ RowCurve finish_row(const LogitsPpoArgs& a, int64_t r, const Sums& s, float taken, const Factor& f,
                                               bool write) {
    const double log_sum = log(s.sum), mean = kLn2 * s.weighted / s.sum;
    const double above = double(taken) - double(s.shift), factor = a.x.transform.factor(r);
    const float logprob = float(taken_logprob(above, factor, f.binary * kLn2, log_sum, mean));
    const float entropy = float(log_sum - mean), inv_sum = float(1 / s.sum);
    const PpoRows& ppo = a.ppo;
    const float weight = (ppo.row_weight ? ppo.row_weight[r] : 1.f) / *a.denominator;
    const float* ref = ppo.ref_logprobs ? ppo.ref_logprobs + r : nullptr;
    const float importance = ppo.weights ? ppo.weights[r] : 1.f;
    float g = weight * logprob_slope(logprob, ppo.old_logprobs[r], ppo.advantages[r], importance, ref, ppo.scalars);
    if (logprob != logprob) g = kNaN;  // needed if the objective's slope does not depend on the log-prob
    const float h = -ppo.scalars.entropy_coef * weight;
    if (write) {
        a.stats.logprobs[r] = logprob;
        a.stats.entropy[r] = entropy;
        a.stats.shift[r] = s.shift;
        a.stats.inv_sum[r] = inv_sum;
        a.coefficients[r] = g;
        a.coefficients[a.x.n + r] = h;
    }
    return gradient_from(f, s.shift, inv_sum, entropy, g, h);
}

__device__ __forceinline__ void clear_row(const LogitsPpoArgs& a, int64_t r) {
    a.stats.logprobs[r] = a.stats.entropy[r] = a.stats.shift[r] = a.stats.inv_sum[r] = 0.f;
    a.coefficients[r] = a.coefficients[a.x.n + r] = 0.f;
}

template <class T, bool CAP, bool CHIP>
__global__ void __launch_bounds__(kThreads, kResident) ppo_rows(LogitsPpoArgs a, int ranks, int per) {
    Front& front = *reinterpret_cast<Front*>(shared_memory());
    uint4* held = reinterpret_cast<uint4*>(shared_memory() + sizeof(Front));
    const int rank = CHIP ? cluster_rank() : 0;
    const int64_t r = blockIdx.x / unsigned(ranks);
    const Row<T> row(a.x, a.dlogits, a.contiguous, r);
    const Part part = part_of(row, rank, ranks, per);
    const bool first = rank == 0 && thread_id() == 0;
    if (a.x.mask && !a.x.mask[r]) {  // every block of the cluster takes the same branch
        if (first) clear_row(a, r);
        if (row.out) zero_part(row, part, kThreads);
        return;
    }
    const int64_t id = a.x.ids[r];
    const bool valid = id >= 0 && id < a.x.vocab;
    const Factor f = factor_of(a.x.transform, r);
    // These are read before any block of the cluster writes, because the gradient may overwrite the logits.
    const float taken = valid ? to_float(row.logits[id]) : kNaN;
    const float edge = part.edge >= 0 ? to_float(row.logits[part.edge]) : 0.f;
    sum_block(read_part<T, CAP, CHIP>(row, part, held, edge, f), front, f);
    if (CHIP) {
        cluster_arrive();
        cluster_wait();  // or the sums of other blocks could be read before they are written
    }
    if (thread_id() < kWarp) {
        Sums s{};
        if (CHIP) {
            s = sum_cluster(front, ranks, f);
        } else if (thread_id() == 0) {
            s = front.mine;  // thread 0 wrote it; without a barrier, other lanes may not see it
        }
        if (thread_id() == 0) front.gradient = finish_row(a, r, s, capped_logit<CAP>(taken, f), f, first);
    }
    __syncthreads();  // or the other threads could read the gradient's coefficients before they are written
    if (CHIP) cluster_arrive();
    if (row.out) {
        const RowCurve c = front.gradient;
        const bool owns = valid && rank == rank_of(row, id, ranks, per);
        const uint4* packs = CHIP ? held : row.front() + part.first;
        write_gradient<T, CAP>(row, part, packs, edge, taken, id, owns, f, c, kThreads);
    }
    if (CHIP) cluster_wait();  // or a block could exit, and its shared memory become invalid, while others read its sums
}

template <class T, bool CAP>
__global__ void __launch_bounds__(kThreads, kResident) rescale_rows(LogitsPpoArgs a, const float* upstream) {
    const float scale = *upstream;
    if (scale == 1.f) return;
    RowCurve* shared = &reinterpret_cast<Front*>(shared_memory())->gradient;
    for (int64_t r = blockIdx.x; r < a.x.n; r += gridDim.x) {
        const float g = a.coefficients[r], h = a.coefficients[a.x.n + r];
        if (g == 0.f && h == 0.f) continue;  // the gradient is already 0
        const Row<T> row(a.x, a.dlogits, a.contiguous, r);
        const Part part = part_of(row, 0, 1, row.packs);
        const float edge = part.edge >= 0 ? to_float(row.logits[part.edge]) : 0.f;
        if (a.dlogits == a.x.logits) {
            for (int i = thread_id(); i < part.count; i += kThreads) {
                float x[kPack<T>];
                unpack(row.front()[i], x, T());
#pragma unroll
                for (int k = 0; k < kPack<T>; k++) x[k] *= scale;
                row.store(i, x);
            }
            if (part.edge >= 0) from_float(edge * scale, row.out + part.edge);
            continue;
        }
        const int64_t id = a.x.ids[r];
        const bool valid = id >= 0 && id < a.x.vocab;
        const float taken = valid ? to_float(row.logits[id]) : kNaN;
        const Factor f = factor_of(a.x.transform, r);
        __syncthreads();  // or the coefficients of the previous row could be overwritten while they are read
        if (thread_id() == 0) {
            *shared = gradient_from(f, a.stats.shift[r], a.stats.inv_sum[r], a.stats.entropy[r], g * scale, h * scale);
        }
        __syncthreads();  // or the coefficients could be read before they are written
        write_gradient<T, CAP>(row, part, row.front(), edge, taken, id, valid, f, *shared, kThreads);
    }
}

// Number of blocks that hold a row, and packs per block; ranks = 0 if the row does not fit.
struct Split {
    int ranks, per;
};

Split split_of(int64_t vocab, int64_t element, int64_t shared_limit) {
    const int64_t packs = vocab * element / 16, room = (shared_limit - int64_t(sizeof(Front))) / 16;
    const int most = capability() >= 90 ? 8 : 1;
    for (int ranks = 1; ranks <= most; ranks *= 2) {
        const int64_t per = (packs + ranks - 1) / ranks, whole = (per + 7) / 8 * 8;  // whole lines of 128 bytes where they fit
        if (per <= room) return {ranks, int(whole <= room ? whole : per)};
    }
    return {0, 0};
}

template <class T, bool CAP>
void run(const LogitsPpoArgs& a, int64_t shared_limit, void* stream) {
    const char* op = "logits_ppo_loss";
    const Split split = split_of(a.x.vocab, sizeof(T), shared_limit);
    if (split.ranks) {
        const Launch how{a.x.n * split.ranks, kThreads, sizeof(Front) + size_t(split.per) * 16, split.ranks,
                         size_t(shared_limit)};
        launch(op, ppo_rows<T, CAP, true>, how, stream, a, split.ranks, split.per);
    } else {
        launch(op, ppo_rows<T, CAP, false>, Launch{a.x.n, kThreads, sizeof(Front)}, stream, a, 1, int(a.x.vocab));
    }
}

template <class T, bool CAP>
void run_rescale(const LogitsPpoArgs& a, const float* upstream, void* stream) {
    const int64_t most = int64_t(multiprocessors()) * kResident;  // few blocks, so that an upstream gradient of 1 costs little
    const Launch how{a.x.n < most ? a.x.n : most, kThreads, sizeof(Front)};
    launch("logits_ppo_loss backward", rescale_rows<T, CAP>, how, stream, a, upstream);
}

}  // namespace

#define RLHF_DISPATCH_ROWS(call, x, ...)                                                                       \
    const bool cap = x.transform.softcap > 0.f;                                                                \
    switch (x.dtype) {                                                                                         \
        case DType::f32: return cap ? call<float, true>(__VA_ARGS__) : call<float, false>(__VA_ARGS__);        \
        case DType::bf16: return cap ? call<bf16, true>(__VA_ARGS__) : call<bf16, false>(__VA_ARGS__);         \
        case DType::f16: return cap ? call<f16, true>(__VA_ARGS__) : call<f16, false>(__VA_ARGS__);            \
    }

void logits_ppo_loss(const LogitsPpoArgs& a, int64_t shared_limit, void* stream) {
    RLHF_DISPATCH_ROWS(run, a.x, a, shared_limit, stream)
}

void rescale_dlogits(const LogitsPpoArgs& a, const float* upstream, void* stream) {
    RLHF_DISPATCH_ROWS(run_rescale, a.x, a, upstream, stream)
}

}  // namespace cuda
}  // namespace rlhf

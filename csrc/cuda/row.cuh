// One row of logits on the device: 16-byte accesses with single elements at both ends, the running sums of a softmax, and the
// gradient. Exponentials are powers of 2; the factor log2(e) is applied together with the temperature.
//
// Legend: V vocabulary.
#pragma once
#include <cfloat>

#include "../math/logits.h"
#include "common.cuh"

namespace rlhf {
namespace cuda {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLowest = -1000.f;  // lower bound of exponents: 2^-1000 is 0, and 0 * -1000 is 0, but 0 * -inf is NaN

template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements in 16 bytes

static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[4], float) {
    x[0] = as_float(v.x), x[1] = as_float(v.y), x[2] = as_float(v.z), x[3] = as_float(v.w);
}
template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8], T) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = to_float(T{uint16_t(words[i])});
        x[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
    }
}
static __device__ __forceinline__ uint4 pack(const float (&x)[4], float) {
    return make_uint4(as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3]));
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[8], T t) {
    return make_uint4(pair(x[0], x[1], t), pair(x[2], x[3], t), pair(x[4], x[5], t), pair(x[6], x[7], t));
}

// Layout of a row in memory: `lead` single elements up to a 16-byte boundary, `packs` of 16 bytes, `trail` single elements.
template <class T>
struct Row {
    const T* logits;
    T* out;
    int lead, packs, trail;
    bool aligned_out;  // the packs of the output are on 16-byte boundaries too

    __device__ __forceinline__ Row(const LogitRows& x, void* dlogits, bool packed, int64_t row) {
        const int64_t offset = x.offset(row);
        logits = static_cast<const T*>(x.logits) + offset;
        out = dlogits ? static_cast<T*>(dlogits) + (packed ? row * x.vocab : offset) : nullptr;
        const int vocab = int(x.vocab), past = int(reinterpret_cast<uintptr_t>(logits) % 16);
        lead = past ? min(vocab, (16 - past) / int(sizeof(T))) : 0;
        packs = (vocab - lead) / kPack<T>;
        trail = vocab - lead - packs * kPack<T>;
        aligned_out = (reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
    }
    __device__ __forceinline__ const uint4* front() const { return reinterpret_cast<const uint4*>(logits + lead); }

    __device__ __forceinline__ void store(int i, const float (&x)[kPack<T>]) const {
        T* at = out + lead + i * kPack<T>;
        if (aligned_out) {
            *reinterpret_cast<uint4*>(at) = pack(x, T());
            return;
        }
#pragma unroll
        for (int k = 0; k < kPack<T>; k++) from_float(x[k], at + k);
    }
};

// The part of a row that a block processes: packs [first, first + count) and, per thread, one single element of the row's ends
// (`edge`) or none (-1).
struct Part {
    int first, count, edge;
};

template <class T>
__device__ __forceinline__ Part part_of(const Row<T>& row, int rank, int ranks, int per) {
    const int first = min(rank * per, row.packs), tid = thread_id();
    Part p{first, min(per, row.packs - first), -1};
    if (rank == 0 && tid < row.lead) p.edge = tid;
    const int second = tid - kWarp;  // the first warp has the lead, the second warp the trail
    if (rank == ranks - 1 && second >= 0 && second < row.trail) p.edge = row.lead + row.packs * kPack<T> + second;
    return p;
}

// Return the rank that writes an element.
template <class T>
__device__ __forceinline__ int rank_of(const Row<T>& row, int64_t element, int ranks, int per) {
    const int at = int(element) - row.lead;
    return at < 0 ? 0 : at / kPack<T> >= row.packs ? ranks - 1 : at / kPack<T> / per;
}

// The constants of LogitTransform for one row, rounded; `binary` = factor * log2(e) is the factor of exponents of 2.
struct Factor {
    float factor, binary, softcap, inner, logit_scale;
};

// Compute the constants in float, because every thread of a block does it, and double precision is slow on some chips.
static __device__ __forceinline__ Factor factor_of(const LogitTransform& t, int64_t row) {
    const float temperature = t.temperatures ? t.temperatures[row] : float(t.temperature), scale = float(t.logit_scale);
    const float softcap = float(t.softcap), factor = (softcap > 0.f ? 1.f : scale) / temperature;
    return {factor, factor * float(kLog2e), softcap, softcap > 0.f ? scale / softcap : 0.f, scale};
}

template <bool CAP>
__device__ __forceinline__ float capped_logit(float u, const Factor& f) {
    return CAP ? rounded_product(f.softcap, tanhf(u * f.inner)) : u;
}

// Sums over a part of a row: of 2^t and t 2^t, where t = (w - shift) * binary.
struct RowSum {
    float shift, sum, weighted;
};

static __device__ __forceinline__ void move_shift(RowSum& s, float shift, const Factor& f) {
    const float d = fmaxf(kLowest, (s.shift - shift) * f.binary), scale = fast_exp2(d);
    s.weighted = scale * (s.weighted + d * s.sum);
    s.sum *= scale;
    s.shift = shift;
}

template <int N>
__device__ __forceinline__ void add(RowSum& s, const float (&w)[N], const Factor& f) {
    float top = s.shift;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, w[i]);  // fmaxf ignores NaN; the sums below become NaN
    move_shift(s, top, f);
    float sum = 0.f, weighted = 0.f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float t = (w[i] - top) * f.binary, e = fast_exp2(t);
        sum += e;
        weighted += e * fmaxf(kLowest, t);
    }
    s.sum += sum;
    s.weighted += weighted;
}

// dL/du_j = (g ([j = id] - p_j) - h p_j (log p_j + H)) * dz_j/du_j = (2^t (slope + bend t) + [j = id] `taken`) * s_j, where s_j
// is tanh'(inner u_j) with a softcap and 1 without a softcap.
struct RowCurve {
    float shift, slope, bend, taken;
};

static __device__ __forceinline__ RowCurve gradient_from(const Factor& f, float shift, float inv_sum, float entropy, float g,
                                                         float h) {
    const float level = h != 0.f ? float(double(entropy) + log(double(inv_sum))) : 0.f;  // log p + H = t ln 2 + level
    const float outer = f.softcap > 0.f ? f.factor * f.logit_scale : f.factor;
    return {shift, -outer * inv_sum * (g + h * level), -outer * inv_sum * h * float(kLn2), outer * g};
}

// Return the gradient of logit u; `extra` is added before the multiplication by the softcap's derivative.
template <bool CAP>
__device__ __forceinline__ float gradient_at(float u, const Factor& f, const RowCurve& c, bool bends, float extra = 0.f) {
    const float w = capped_logit<CAP>(u, f), t = (w - c.shift) * f.binary, e = fast_exp2(t);
    const float y = e * (bends ? c.slope + c.bend * fmaxf(kLowest, t) : c.slope) + extra;
    if (!CAP) return y;
    return y * tanh_slope(fast_exp2(-2.f * float(kLog2e) * fabsf(u * f.inner)));
}

// Write the packs of a block's part of the gradient; `packs` are the logits of this part, in shared or global memory.
template <class T, bool CAP, bool BENDS>
__device__ __forceinline__ void write_part(const Row<T>& row, const Part& p, const uint4* packs, const Factor& f,
                                           const RowCurve& c, int threads) {
#pragma unroll 2
    for (int i = thread_id(); i < p.count; i += threads) {
        float x[kPack<T>];
        unpack(packs[i], x, T());
#pragma unroll
        for (int k = 0; k < kPack<T>; k++) x[k] = gradient_at<CAP>(x[k], f, c, BENDS);
        row.store(p.first + i, x);
    }
}

template <class T>
__device__ __forceinline__ void zero_part(const Row<T>& row, const Part& p, int threads) {
    const float zeros[kPack<T>] = {};
    for (int i = thread_id(); i < p.count; i += threads) row.store(p.first + i, zeros);
    if (p.edge >= 0) from_float(0.f, row.out + p.edge);
}

// Write a block's part of the gradient: packs, single elements at the ends, and the element `id` once more, with `c.taken`.
template <class T, bool CAP>
__device__ __forceinline__ void write_gradient(const Row<T>& row, const Part& p, const uint4* packs, float edge, float taken,
                                               int64_t id, bool owns, const Factor& f, const RowCurve& c, int threads) {
    if (c.slope == 0.f && c.bend == 0.f && c.taken == 0.f) return zero_part(row, p, threads);
    const bool bends = c.bend != 0.f;
    if (bends) {
        write_part<T, CAP, true>(row, p, packs, f, c, threads);
    } else {
        write_part<T, CAP, false>(row, p, packs, f, c, threads);
    }
    if (p.edge >= 0) from_float(gradient_at<CAP>(edge, f, c, bends), row.out + p.edge);
    __syncthreads();  // or the pack that contains `id` could overwrite that element
    if (owns && thread_id() == 0) from_float(gradient_at<CAP>(taken, f, c, bends, c.taken), row.out + id);
}

}  // namespace cuda
}  // namespace rlhf

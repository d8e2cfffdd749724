// One row of logits: one read computes log-sum-exp, log-prob and entropy; a second read computes the gradient.
#pragma once
#include "../args.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

// Elements of a block, which stays in L1 while it is reduced. Each lane of two sums adds 32 of them in float, which bounds the
// accumulated rounding error.
constexpr int kBlock = 64 * W;

// The constants of LogitTransform for one row.
struct Factor {
    double exact;
    float factor;  // rounded
    float softcap, inner, logit_scale;
};

RLHF_HD Factor factor_of(const LogitTransform& t, int64_t row) {
    const double exact = t.factor(row);
    return {exact, float(exact), float(t.softcap), float(t.inner()), float(t.logit_scale)};
}

template <bool CAP>
RLHF_HD vf capped_logit(vf u, const Factor& f) {
    return CAP ? rounded(f.softcap * vtanh(rounded(u * f.inner))) : u;
}

// dz / du
template <bool CAP>
RLHF_HD vf slope_at(vf u, const Factor& f) {
    return CAP ? f.factor * f.logit_scale * vtanh_slope(u * f.inner) : splat(f.factor);
}

struct Stats {
    float logprob, entropy, shift, inv_sum;
};

// Read the row once, block by block, with a running maximum. The sums over blocks are double, and their order is fixed. A block
// is still in L1 when its exponentials are computed. With a softcap, the capped logits of a block are stored as floats, because
// a store costs less than a second tanh.
template <bool CAP, class T>
RLHF_HD Stats row_stats(const T* u, int64_t vocab, int64_t id, const Factor& f) {
    alignas(64) float capped[CAP ? kBlock : W];
    double sum = 0, weighted = 0;  // of e^t and t e^t, t = (w - shift) * factor
    float shift = -kInf;
    for (int64_t start = 0; start < vocab; start += kBlock) {
        const int n = int(vocab - start < kBlock ? vocab - start : kBlock);
        const int whole = n / W * W;
        const vf tail = whole < n ? load_tail(u + start + whole, n - whole, -kInf) : vf{};
        auto raw = [&](int i) { return i < whole ? load(u + start + i) : tail; };
        vf top = splat(-kInf), top2 = top;
        if (CAP) {
            for (int i = 0; i < n; i += W) {
                store(capped + i, capped_logit<CAP>(raw(i), f));
                for (int lane = n - i; lane < W; lane++) capped[i + lane] = -kInf;  // tanh turned the padding into -softcap
                top = vmax(load(capped + i), top);
            }
        } else {
            int i = 0;
            for (; i + 2 * W <= whole; i += 2 * W) {
                top = vmax(load(u + start + i), top);
                top2 = vmax(load(u + start + i + W), top2);
            }
            for (; i < n; i += W) top = vmax(raw(i), top);
        }
        const float high = hmax(vmax(top, top2));
        if (high > shift) {
            if (sum > 0) {
                const double d = (double(shift) - double(high)) * f.factor, scale = exp(d);
                weighted = scale * (weighted + d * sum);
                sum *= scale;
            }
            shift = high;
        }
        const float base = shift == -kInf ? 0.f : shift;
        vf s0{}, s1{}, z0{}, z1{};
        auto add = [&](vf w, vf& s, vf& z) {
            const vf t = (w - base) * f.factor, e = vexp(t);
            s += e;
            z += e * vmax(splat(kExpLow), t);  // 0 * -inf must be 0
        };
        auto at = [&](int i) { return CAP ? load(capped + i) : raw(i); };
        int i = 0;
        for (; i + 2 * W <= whole; i += 2 * W) {
            add(CAP ? load(capped + i) : load(u + start + i), s0, z0);
            add(CAP ? load(capped + i + W) : load(u + start + i + W), s1, z1);
        }
        for (; i < n; i += W) add(at(i), s0, z0);
        sum += hsum(s0 + s1);
        weighted += hsum(z0 + z1);
    }
    const float taken = id >= 0 && id < vocab ? capped_logit<CAP>(splat(to_float(u[id])), f)[0] : kNaN;
    const double log_sum = log(sum), mean = weighted / sum;
    const double logprob = taken_logprob(double(taken) - double(shift), f.exact, f.factor, log_sum, mean);
    return {float(logprob), float(log_sum - mean), shift, float(1 / sum)};
}

// Write dL/du_j = (g ([j = id] - p_j) - h p_j (log p_j + H)) * dz_j/du_j to `out`, which may be `u`.
template <bool CAP, bool ENTROPY, class T>
RLHF_HD void row_gradient(const T* u, T* out, int64_t vocab, int64_t id, const Factor& f, const Stats& s, float g, float h) {
    const float level = ENTROPY ? float(double(s.entropy) + log(double(s.inv_sum))) : 0.f;  // log p + H = t + level
    const float before = id >= 0 && id < vocab ? to_float(u[id]) : kNaN;
    auto at = [&](vf x, bool taken) {
        const vf w = capped_logit<CAP>(x, f);
        const vf t = (w - s.shift) * f.factor;
        const vf p = vexp(t) * s.inv_sum;  // not exp(t - log_sum): t is near 0 for a large p, so p is accurate
        vf dz = -g * p;
        if (ENTROPY) dz -= h * p * (vmax(splat(kExpLow), t) + level);
        if (taken) dz += g;
        return dz * slope_at<CAP>(x, f);
    };
    const int64_t whole = vocab / W * W;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
        const vf a = at(load(u + i), false), b = at(load(u + i + W), false);
        store(out + i, a);
        store(out + i + W, b);
    }
    for (; i < whole; i += W) store(out + i, at(load(u + i), false));
    if (whole < vocab) store_tail(out + whole, at(load_tail(u + whole, int(vocab - whole), 0.f), false), int(vocab - whole));
    if (id >= 0 && id < vocab) from_float(at(splat(before), true)[0], out + id);
}

template <class T>
RLHF_HD void zero_row(T* out, int64_t vocab) {
    memset(out, 0, size_t(vocab) * sizeof(T));
}

}  // namespace RLHF_ISA
}  // namespace rlhf

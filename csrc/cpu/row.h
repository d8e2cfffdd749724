// One row of logits: a single read makes log-sum-exp, log-prob and entropy; a second one writes the gradient.
#pragma once
#include "../args.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

constexpr int kBlock = 1024;  // elements held as floats in L1 while a block is reduced

// w = u, factor = logit_scale / T without a softcap; w = softcap * tanh(logit_scale * u / softcap), factor = 1 / T with one.
struct Factor {
    float factor;
    float softcap;
    float inner;  // logit_scale / softcap
    float logit_scale;
};

RLHF_HD Factor factor_of(const LogitTransform& t, int64_t row) {
    const float temperature = t.temperatures ? t.temperatures[row] : t.temperature;
    if (t.softcap > 0.f) return {1.f / temperature, t.softcap, t.logit_scale / t.softcap, t.logit_scale};
    return {t.logit_scale / temperature, 0.f, 0.f, t.logit_scale};
}

template <bool CAP>
RLHF_HD vf warp(vf u, const Factor& f) {
    return CAP ? rounded(f.softcap * vtanh(rounded(u * f.inner))) : u;
}

struct Stats {
    float logprob, entropy, shift, inv_sum;
};

// Reads the row once, block by block, against a running maximum; the sums are double, their order is fixed.
template <bool CAP, class T>
RLHF_HD Stats row_stats(const T* u, int64_t vocab, int64_t id, const Factor& f) {
    alignas(64) float w[kBlock];
    double sum = 0, weighted = 0;  // of e^t and t e^t, t = (w - shift) * factor
    float shift = -kInf, taken = kNaN;
    for (int64_t start = 0; start < vocab; start += kBlock) {
        const int n = int(vocab - start < kBlock ? vocab - start : kBlock);
        const int whole = n / W * W, rest = n - whole;
        vf top = splat(-kInf), top2 = top;
        int i = 0;
        for (; i + 2 * W <= whole; i += 2 * W) {
            const vf a = warp<CAP>(load(u + start + i), f), b = warp<CAP>(load(u + start + i + W), f);
            store(w + i, a);
            store(w + i + W, b);
            top = vmax(a, top);
            top2 = vmax(b, top2);
        }
        for (; i < n; i += W) {
            const vf a = i < whole ? warp<CAP>(load(u + start + i), f) : load_tail(u + start + i, rest, -kInf);
            const vf b = CAP && i >= whole ? warp<CAP>(a, f) : a;  // tanh turns the filler into -softcap: put it back below
            store(w + i, b);
            for (int lane = i < whole ? W : rest; lane < W; lane++) w[i + lane] = -kInf;
            top = vmax(load(w + i), top);
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
        for (i = 0; i < n; i += 2 * W) {
            const vf t0 = (load(w + i) - base) * f.factor, e0 = vexp(t0);
            s0 += e0;
            z0 += e0 * (t0 < kExpLow ? splat(kExpLow) : t0);  // 0 * -inf must be 0
            if (i + W >= n) break;
            const vf t1 = (load(w + i + W) - base) * f.factor, e1 = vexp(t1);
            s1 += e1;
            z1 += e1 * (t1 < kExpLow ? splat(kExpLow) : t1);
        }
        sum += hsum(s0 + s1);
        weighted += hsum(z0 + z1);
        if (id >= start && id < start + n) taken = w[id - start];
    }
    const double log_sum = log(sum);
    return {float((double(taken) - double(shift)) * f.factor - log_sum), float(log_sum - weighted / sum), shift, float(1 / sum)};
}

// dL/du_j = (g ([j = id] - p_j) - h p_j (log p_j + H)) * dz_j/du_j, written over `out`, which may be `u` itself.
template <bool CAP, bool ENTROPY, class T>
RLHF_HD void row_gradient(const T* u, T* out, int64_t vocab, int64_t id, const Factor& f, const Stats& s, float g, float h) {
    const float level = ENTROPY ? float(double(s.entropy) + log(double(s.inv_sum))) : 0.f;  // log p + H = t + level
    const float before = id >= 0 && id < vocab ? to_float(u[id]) : kNaN;
    auto at = [&](vf x, bool taken) {
        const vf w = warp<CAP>(x, f);
        const vf t = (w - s.shift) * f.factor;
        const vf p = vexp(t) * s.inv_sum;  // not exp(t - log_sum): large p come out of small t, exactly
        vf dz = -g * p;
        if (ENTROPY) dz -= h * p * ((t < kExpLow ? splat(kExpLow) : t) + level);
        if (taken) dz += g;
        if (!CAP) return dz * f.factor;
        const vf th = w / f.softcap;
        return dz * (f.factor * f.logit_scale) * (1.f - th * th);
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

// Count, sum and sum of squares of the entries that a mask counts, in double, and the whitening made of them.
#pragma once
#include <cmath>

#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

typedef double vd __attribute__((vector_size(W * 8)));

struct Moments {
    double count, sum, squares;
};

// Selected by the mask, not multiplied: a masked entry may hold anything.
RLHF_HD vf where(const uint8_t* mask, vf v) {
    typedef uint8_t vb __attribute__((vector_size(W)));
    vb m;
    memcpy(&m, mask, sizeof m);
    return __builtin_convertvector(m, vi) != 0 ? v : vf{};
}

RLHF_HD int count_true(const uint8_t* mask, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += mask[i];
    return count;
}

RLHF_HD void add_moments(const float* x, const uint8_t* mask, int n, Moments& m) {
    vd sum{}, squares{};
    int i = 0;
    for (; i + W <= n; i += W) {
        const vd v = __builtin_convertvector(where(mask + i, load(x + i)), vd);
        sum += v;
        squares += v * v;
    }
    for (int lane = 0; i + lane < n; lane++) {
        const double v = mask[i + lane] ? x[i + lane] : 0.f;
        sum[lane] += v;
        squares[lane] += v * v;
    }
    m.count += count_true(mask, n);
    for (int lane = 0; lane < W; lane++) {
        m.sum += sum[lane];
        m.squares += squares[lane];
    }
}

// The parts in order, so that the bits repeat.
RLHF_HD Moments total(const Moments* parts, int64_t count) {
    Moments m{};
    for (int64_t i = 0; i < count; i++) {
        m.count += parts[i].count;
        m.sum += parts[i].sum;
        m.squares += parts[i].squares;
    }
    return m;
}

RLHF_HD double mean_of(const Moments& m) { return m.sum / (m.count > 1 ? m.count : 1); }

struct Whitening {
    float mean, scale, offset;
};

// One entry, or none, has variance 0. Without `shift_mean` the mean is put back.
RLHF_HD Whitening whitening(const Moments& m, bool shift_mean, bool unbiased) {
    const double mean = mean_of(m), residual = m.squares - mean * m.sum;
    const double degrees = m.count - unbiased, variance = (residual < 0 ? 0 : residual) / (degrees > 1 ? degrees : 1);
    return {float(mean), float(1 / sqrt(variance + 1e-8)), shift_mean ? 0.f : float(mean)};
}

RLHF_HD void whiten(const float* x, const uint8_t* mask, int64_t n, const Whitening& w, float* out) {
    for (int64_t i = 0; i < n; i++) {
        const float y = (x[i] - w.mean) * w.scale + w.offset;
        out[i] = mask[i] ? y : 0.f;
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

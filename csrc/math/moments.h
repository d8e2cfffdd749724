// Count, sum and sum of squares of the entries that a mask selects, and the whitening computed from them.
#pragma once
#include "common.h"

namespace rlhf {

struct Moments {
    double count, sum, squares;
};

RLHF_HD Moments operator+(const Moments& a, const Moments& b) {
    return {a.count + b.count, a.sum + b.sum, a.squares + b.squares};
}

RLHF_HD double mean_of(const Moments& m) { return m.sum / (m.count > 1 ? m.count : 1); }

// y = (x - mean) * scale + offset
struct Whitening {
    float mean, scale, offset;
};

// The variance of fewer than two entries is 0. Without `shift_mean`, the mean is added again after scaling.
RLHF_HD Whitening whitening(const Moments& m, bool shift_mean, bool unbiased) {
    const double mean = mean_of(m), residual = m.squares - mean * m.sum;
    const double degrees = m.count - unbiased, variance = (residual < 0 ? 0 : residual) / (degrees > 1 ? degrees : 1);
    return {float(mean), float(1 / sqrt(variance + 1e-8)), shift_mean ? 0.f : float(mean)};
}

RLHF_HD float whitened(float x, const Whitening& w) { return (x - w.mean) * w.scale + w.offset; }

}  // namespace rlhf

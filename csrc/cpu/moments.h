// Count, sum and sum of squares, in double, of the entries that a mask selects, and the whitening computed from them.
#pragma once
#include <cmath>

#include "../math/moments.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

// A running sum in double for each lane, in two halves: the compiler would keep a vector twice as wide as a register in memory.
struct LaneSums {
    typedef double vd __attribute__((vector_size(W * 4)));
    typedef float half __attribute__((vector_size(W * 2)));
    vd low{}, high{};

    struct Doubles {
        vd low, high;
    };
    static inline __attribute__((always_inline)) Doubles widen(vf v) {
        half h[2];
        memcpy(h, &v, sizeof v);
        return {__builtin_convertvector(h[0], vd), __builtin_convertvector(h[1], vd)};
    }
    inline __attribute__((always_inline)) void add(vf v) {
        const Doubles d = widen(v);
        low += d.low;
        high += d.high;
    }
    inline __attribute__((always_inline)) void add_square(vf v) {
        const Doubles d = widen(v);
        low += d.low * d.low;
        high += d.high * d.high;
    }
    inline __attribute__((always_inline)) double total() const {
        double s = 0;
        for (int i = 0; i < W / 2; i++) s += low[i];
        for (int i = 0; i < W / 2; i++) s += high[i];
        return s;
    }
};

// Return `v`, with 0 in the lanes whose token is masked. This selects instead of multiplying, because a masked entry may be
// NaN or inf.
RLHF_HD vf where(const uint8_t* mask, vf v) {
#if defined(RLHF_ISA_AVX512)
    const __m128i m = _mm_loadu_si128((const __m128i*)mask);
    return bits<vf>(_mm512_maskz_mov_ps(_mm_test_epi8_mask(m, m), bits<__m512>(v)));
#elif defined(RLHF_ISA_AVX2)
    const vi m = bits<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)mask)));
    return m != 0 ? v : vf{};
#else
    for (int i = 0; i < W; i++) v[i] = mask[i] ? v[i] : 0.f;
    return v;
#endif
}

RLHF_HD int count_true(const uint8_t* mask, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += mask[i];
    return count;
}

RLHF_HD void add_moments(const float* x, const uint8_t* mask, int n, Moments& m) {
    LaneSums sum, squares;
    int i = 0;
    for (; i + W <= n; i += W) {
        const vf v = where(mask + i, load(x + i));
        sum.add(v);
        squares.add_square(v);
    }
    vf rest{};
    for (int lane = 0; i + lane < n; lane++) rest[lane] = mask[i + lane] ? x[i + lane] : 0.f;
    sum.add(rest);
    squares.add_square(rest);
    m.count += count_true(mask, n);
    m.sum += sum.total();
    m.squares += squares.total();
}

// Add the parts in order, so that repeated calls give the same bits.
RLHF_HD Moments total(const Moments* parts, int64_t count) {
    Moments m{};
    for (int64_t i = 0; i < count; i++) {
        m = m + parts[i];
    }
    return m;
}

RLHF_HD void whiten(const float* x, const uint8_t* mask, int64_t n, const Whitening& w, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, where(mask + i, (load(x + i) - w.mean) * w.scale + w.offset));
    for (; i < n; i++) {
        const float y = whitened(x[i], w);
        out[i] = mask[i] ? y : 0.f;
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// A vector of floats per instruction set, with the compilers' vector extension: the same source compiles to SSE2 or NEON (4
// lanes), AVX2 (8) and AVX-512 (16). Comparisons keep NaN: `x < a ? a : x` is x where x is NaN, and the code relies on it.
#pragma once
#include <cstring>

#include "../math/logits.h"
#if defined(RLHF_ISA_AVX2) || defined(RLHF_ISA_AVX512)
#include <immintrin.h>
#endif

namespace rlhf {
namespace RLHF_ISA {

#if defined(RLHF_ISA_AVX512)
constexpr int W = 16;
#elif defined(RLHF_ISA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

RLHF_HD vf splat(float x) { return x - vf{}; }
// a > b ? a : b, so b where either is NaN.
RLHF_HD vf vmax(vf a, vf b) {
#if defined(RLHF_ISA_AVX512)
    return _mm512_max_ps(a, b);
#elif defined(RLHF_ISA_AVX2)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// Return `x`, rounded: if `x` is a product, the compiler cannot fuse it into a later sum. Two passes that must see the same
// number need this.
RLHF_HD vf rounded(vf x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

template <class To, class From>
RLHF_HD To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

// Return the sum of the lanes, always in order from lane 0, so that repeated calls give the same bits.
RLHF_HD double hsum(vf v) {
    double s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
RLHF_HD float hmax(vf v) {
    float m = v[0];
    for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// ---- element types ------------------------------------------------------------------------------------------------

struct bf16 { uint16_t raw; };
struct f16 { uint16_t raw; };

RLHF_HD float to_float(float x) { return x; }
RLHF_HD float to_float(bf16 x) { return bits<float>(uint32_t(x.raw) << 16); }
RLHF_HD float to_float(f16 x) {
#if defined(RLHF_ISA_AVX2) || defined(RLHF_ISA_AVX512)
    return _cvtsh_ss(x.raw);
#else
    const uint32_t sign = uint32_t(x.raw & 0x8000) << 16, magnitude = x.raw & 0x7fff;
    if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // 2^112 moves the exponent from bias 15 to 127 and makes the subnormals normal.
    return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
#endif
}

RLHF_HD void from_float(float x, float* out) { *out = x; }
RLHF_HD void from_float(float x, bf16* out) {
    const uint32_t u = bits<uint32_t>(x);
    out->raw = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
RLHF_HD void from_float(float x, f16* out) {
#if defined(RLHF_ISA_AVX2) || defined(RLHF_ISA_AVX512)
    out->raw = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) { out->raw = uint16_t(sign | 0x7e00); return; }
    if (magnitude >= 0x477ff000) { out->raw = uint16_t(sign | 0x7c00); return; }  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal in float16: its last bit is worth as much as that of 0.5f, so the sum rounds
        out->raw = uint16_t(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000));
        return;
    }
    out->raw = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
#endif
}

RLHF_HD vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
RLHF_HD vf load(const bf16* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return bits<vf>(__builtin_convertvector(h, vu) << 16);
}
RLHF_HD vf load(const f16* p) {
#if defined(RLHF_ISA_AVX512)
    return bits<vf>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(RLHF_ISA_AVX2)
    return bits<vf>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

RLHF_HD void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
RLHF_HD void store(bf16* p, vf v) {
    const vu u = bits<vu>(v);
    const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const vu kept = v != v ? vu{} + 0x7fc0 : rounded;
    const vh h = __builtin_convertvector(kept, vh);
    memcpy(p, &h, sizeof h);
}
RLHF_HD void store(f16* p, vf v) {
#if defined(RLHF_ISA_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(RLHF_ISA_AVX2)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; i++) from_float(v[i], p + i);
#endif
}

// Load the last n < W elements; the other lanes are `fill`.
template <class T>
RLHF_HD vf load_tail(const T* p, int n, float fill) {
    vf v = splat(fill);
    for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
    return v;
}
template <class T>
RLHF_HD void store_tail(T* p, vf v, int n) {
    for (int i = 0; i < n; i++) from_float(v[i], p + i);
}

// ---- exp and tanh -------------------------------------------------------------------------------------------------

constexpr float kExpLow = -87.33654f;  // below this, e^x is subnormal, and vexp returns 0 without AVX-512

// Return e^x for x <= 0 to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial approximates e^r, and n is added to
// the exponent. e^-inf is 0.
RLHF_HD vf vexp(vf x) {
#if defined(RLHF_ISA_AVX512)
    const vf clamped = vmax(splat(-150.f), x);
#else
    const vf clamped = vmax(splat(kExpLow), x);
#endif
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const vf shifted = clamped * 1.44269504f + magic;
    const vf n = shifted - magic;
    vf r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
#if defined(RLHF_ISA_AVX512)
    return _mm512_scalef_ps(p, n);
#else
    const vf y = p * bits<vf>((bits<vi>(shifted) - bits<int32_t>(magic) + 127) << 23);
    return x < kExpLow ? vf{} : y;
#endif
}

// Return e^x for any x; inf above 88, slightly below the overflow limit of float32.
RLHF_HD vf vexp_any(vf x) { return x > 88.f ? splat(kInf) : vexp(x); }

// Return tanh(x). Near 0 it is a polynomial, because 1 - 2 e^-2x / (1 + e^-2x) would cancel.
RLHF_HD vf vtanh(vf x) {
    const vf ax = x < 0.f ? -x : x;
    const vf x2 = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * x2 + 2.06390887954e-2f;
    p = p * x2 + -5.37397155531e-2f;
    p = p * x2 + 1.33314422036e-1f;
    p = p * x2 + -3.33332819422e-1f;
    const vf small = p * x2 * x + x;
    const vf e = vexp(-(ax + ax));
    const vf big = 1.f - 2.f * e / (1.f + e);
    const vf signed_big = x < 0.f ? -big : big;
    return ax < 0.625f ? small : signed_big;
}

RLHF_HD vf vtanh_slope(vf x) {
    const vf ax = x < 0.f ? -x : x;
    return tanh_slope(vexp(-(ax + ax)));
}

}  // namespace RLHF_ISA
}  // namespace rlhf

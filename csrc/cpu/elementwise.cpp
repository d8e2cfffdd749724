// Sums and casts of gradients: half-precision partial products are added in float32; the sum is scaled and rounded once.
#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int64_t kPiece = 16384;

template <class Body>
void in_pieces(int64_t n, Body body) {
    const int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) if (pieces > 1)
    for (int64_t k = 0; k < pieces; k++) body(k * kPiece, (k + 1) * kPiece < n ? (k + 1) * kPiece : n);
}

template <class T>
void accumulate_as(float* sum, const T* part, int64_t n, bool first) {
    in_pieces(n, [=](int64_t i, int64_t end) {
        for (; i + W <= end; i += W) store(sum + i, first ? load(part + i) : load(sum + i) + load(part + i));
        for (; i < end; i++) sum[i] = first ? to_float(part[i]) : sum[i] + to_float(part[i]);
    });
}

template <class From, class To>
void scale_as(const From* x, To* out, int64_t n, float scale) {
    in_pieces(n, [=](int64_t i, int64_t end) {
        for (; i + W <= end; i += W) store(out + i, load(x + i) * scale);
        for (; i < end; i++) from_float(to_float(x[i]) * scale, out + i);
    });
}

}  // namespace

// sum = part (first) or sum += part.
void accumulate(float* sum, const void* part, DType dtype, int64_t n, bool first) {
    RLHF_DISPATCH(dtype, T, accumulate_as(sum, (const T*)part, n, first));
}

// out = x * scale, rounded once; `out` may be `x` if their types are the same.
void scale_cast(const void* x, DType from, void* out, DType to, int64_t n, float scale) {
    RLHF_DISPATCH(from, From, RLHF_DISPATCH(to, To, scale_as((const From*)x, (To*)out, n, scale)));
}

}  // namespace RLHF_ISA
}  // namespace rlhf

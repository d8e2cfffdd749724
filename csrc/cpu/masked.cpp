// Masked mean and whitening. The sums of tiles of fixed size are added in order, so the bits do not depend on the number of
// threads.
#include "moments.h"
#include "ops.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int64_t kTile = 16384;

template <class Body>
void for_each_tile(int64_t n, Body body) {
    const int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) if (tiles > 4)
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t begin = i * kTile;
        body(i, begin, n - begin < kTile ? n - begin : kTile);
    }
}

Moments moments_of(const float* x, const uint8_t* mask, int64_t n) {
    Moments* parts = new Moments[size_t(n) / kTile + 1]();
    for_each_tile(n, [=](int64_t i, int64_t begin, int64_t size) { add_moments(x + begin, mask + begin, int(size), parts[i]); });
    const Moments m = total(parts, (n + kTile - 1) / kTile);
    delete[] parts;
    return m;
}

}  // namespace

void masked_mean(const float* x, const uint8_t* mask, int64_t n, float* out) { *out = float(mean_of(moments_of(x, mask, n))); }

void masked_whiten(const float* x, const uint8_t* mask, int64_t n, bool shift_mean, bool unbiased, float* out) {
    const Whitening w = whitening(moments_of(x, mask, n), shift_mean, unbiased);
    for_each_tile(n, [=](int64_t, int64_t begin, int64_t size) { whiten(x + begin, mask + begin, size, w, out + begin); });
}

}  // namespace RLHF_ISA
}  // namespace rlhf

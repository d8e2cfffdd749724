// The tokens with the highest entropy: a threshold from two order statistics of the unmasked tokens.
#include <algorithm>

#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

// Return the quantile at the place `last - share * last` of the n sorted entropies, interpolated linearly; NaN if one is NaN.
double threshold_of(float* found, int64_t n, double share) {
    for (int64_t i = 0; i < n; i++) {
        if (found[i] != found[i]) return kNaN;  // NaN has no order
    }
    const volatile double above_it = share * double(n - 1);  // volatile: a fused product would not be rounded to a whole place
    const double place = double(n - 1) - above_it;
    const int64_t low = int64_t(place);
    std::nth_element(found, found + low, found + n);
    const double below = found[low], above = low + 1 < n ? *std::min_element(found + low + 1, found + n) : below;
    return above == below ? below : below + (place - double(low)) * (above - below);
}

}  // namespace

// metrics: the threshold, the share of the tokens that are rejected, and their number.
void top_entropy_mask(const float* entropy, const uint8_t* mask, int64_t n, double share, uint8_t* kept, float* metrics) {
    float* found = new float[size_t(n) + 1];
    int64_t count = 0, remaining = 0;
    for (int64_t i = 0; i < n; i++) {
        found[count] = entropy[i];
        count += mask[i];
    }
    const double threshold = count ? threshold_of(found, count, share) : 0;
    delete[] found;
    for (int64_t i = 0; i < n; i++) {
        kept[i] = mask[i] && entropy[i] >= threshold;
        remaining += kept[i];
    }
    metrics[0] = float(threshold);
    metrics[1] = count ? float(1 - double(remaining) / double(count)) : 0.f;
    metrics[2] = float(count);
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// Advantages of samples relative to their group. The samples are sorted by group, so that each group is contiguous.
#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

// Sort indices by key with a bottom-up merge sort. It is stable: the samples of a group keep their order, so repeated calls
// give the same sums.
void order_by(const int64_t* key, int64_t n, int64_t* order, int64_t* spare) {
    for (int64_t i = 0; i < n; i++) order[i] = i;
    for (int64_t width = 1; width < n; width *= 2) {
        for (int64_t begin = 0; begin < n; begin += 2 * width) {
            const int64_t middle = begin + width < n ? begin + width : n, end = middle + width < n ? middle + width : n;
            for (int64_t left = begin, right = middle, i = begin; i < end; i++) {
                const bool take_left = right == end || (left < middle && key[order[left]] <= key[order[right]]);
                spare[i] = take_left ? order[left++] : order[right++];
            }
        }
        memcpy(order, spare, size_t(n) * sizeof(int64_t));
    }
}

// Return the factor of the deviation from the group's mean.
double group_scale(const GroupScale& g, double count, double squares) {
    if (g.kind == GroupKind::dr_grpo) return 1;
    if (g.kind == GroupKind::rloo) return count > 1 ? count / (count - 1) : 0;
    const double degrees = g.population ? count : count - 1;
    return 1 / (sqrt(squares / (degrees > 1 ? degrees : 1)) + g.eps);
}

}  // namespace

void group_advantages(const float* scores, const int64_t* groups, int64_t n, const GroupScale& g, float* out) {
    int64_t* order = new int64_t[2 * size_t(n)];
    order_by(groups, n, order, order + n);
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
        double sum = 0, squares = 0;
        for (; end < n && groups[order[end]] == groups[order[begin]]; end++) sum += scores[order[end]];
        const double count = double(end - begin), mean = sum / count;
        for (int64_t i = begin; i < end; i++) squares += (scores[order[i]] - mean) * (scores[order[i]] - mean);
        const double scale = group_scale(g, count, squares);
        for (int64_t i = begin; i < end; i++) out[order[i]] = float((scores[order[i]] - mean) * scale);
    }
    delete[] order;
}

}  // namespace RLHF_ISA
}  // namespace rlhf

// Advantages and value targets of padded or packed sequences.
#include "ops.h"
#include "scan.h"

namespace rlhf {
namespace RLHF_ISA {

void gae(const GaeArgs& a) {
    const Recursion shared = recursion(a.gamma, a.lam);
#pragma omp parallel for schedule(dynamic, sequences_a_piece(a.sequences, a.n)) if (a.n >= kParallelTokens)
    for (int64_t b = 0; b < a.sequences.count; b++) {
        const Span span = span_of(a.sequences, b);
        const Recursion r = a.lams ? recursion(a.gamma, a.lams[b]) : shared;
        Next next{0.f, a.bootstrap ? a.bootstrap[b] : 0.f};
        bool seen = false;
        for (int64_t chunk = (span.length - 1) / kChunk; chunk >= 0 && span.length > 0; chunk--) {
            const int64_t at = span.begin + chunk * kChunk, left = span.length - chunk * kChunk;
            next = run_chunk(a.rewards + at, a.values + at, a.mask + at, int(left < kChunk ? left : kChunk), a.skip_holes,
                             a.advantages + at, a.returns + at, r, next, seen);
        }
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

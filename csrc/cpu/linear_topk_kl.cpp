// The epilogue of the distillation loss for a chunk of rows: the divergence from the teacher's listed tokens, and the gradient of
// the logits in place.
#include "ops.h"
#include "row.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

// Memory of a thread. `sums` has the slope of each id of the row, and zeros between rows.
struct Scratch {
    float *sums, *raw;
    double *logprobs, *slopes;

    Scratch(int64_t vocab, int64_t k)
        : sums(new float[size_t(vocab)]()), raw(new float[size_t(k)]), logprobs(new double[size_t(k)]), slopes(new double[size_t(k)]) {}
    ~Scratch() { delete[] sums, delete[] raw, delete[] logprobs, delete[] slopes; }
};

bool used(float logprob) { return !(logprob == -kInf); }

template <bool CAP>
float capped(float raw, const Factor& f) {
    return capped_logit<CAP>(splat(raw), f)[0];
}

// Compute the log-probs and the slopes of the listed tokens; return the sum of the slopes.
template <bool CAP, class T>
double row_terms(const TopkArgs& a, int64_t row, const T* u, const Factor& f, const Stats& s, Scratch& m) {
    const int64_t* ids = a.ids + row * a.k;
    const float* teacher = a.logprobs + row * a.k;
    const double log_sum = -log(double(s.inv_sum)), mean = log_sum - s.entropy;
    double kl = 0, student_mass = 0, teacher_mass = 0, total = 0;
    for (int64_t j = 0; j < a.k; j++) {
        if (!used(teacher[j])) continue;
        const bool known = ids[j] >= 0 && ids[j] < a.x.vocab;
        m.raw[j] = known ? to_float(u[ids[j]]) : kNaN;
        m.logprobs[j] = taken_logprob(double(capped<CAP>(m.raw[j], f)) - s.shift, f.exact, f.factor, log_sum, mean);
        const TopkTerm term = topk_term(m.logprobs[j], teacher[j], a.rule);
        m.slopes[j] = term.slope;
        kl += term.value;
        student_mass += exp(m.logprobs[j]);
        teacher_mass += exp(double(teacher[j]));
    }
    const TopkTail tail = topk_tail(student_mass, teacher_mass, a.rule);
    for (int64_t j = 0; j < a.k; j++) {
        if (!used(teacher[j])) continue;
        if (a.rule.lump) m.slopes[j] = topk_slope(m.logprobs[j], m.slopes[j], tail);
        total += m.slopes[j];
    }
    a.found[row] = float(kl + tail.term.value);
    a.found[a.x.n + row] = float(student_mass);
    a.found[2 * a.x.n + row] = float(teacher_mass);
    return total;
}

// Write dL/du_j = (weight ([j listed] g_j - total p_j)) dz_j/du_j over the row. An id that is listed twice has the sum of both.
template <bool CAP, class T>
void write_gradient(const TopkArgs& a, int64_t row, T* u, const Factor& f, const Stats& s, double weight, double total, Scratch& m) {
    const int64_t* ids = a.ids + row * a.k;
    const float *teacher = a.logprobs + row * a.k, g = float(weight * total);
    row_gradient<CAP, false>(u, u, a.x.vocab, -1, f, s, g, 0.f);
    for (int64_t j = 0; j < a.k; j++) {
        if (used(teacher[j]) && m.raw[j] == m.raw[j]) m.sums[ids[j]] += float(weight * m.slopes[j]);
    }
    for (int64_t j = 0; j < a.k; j++) {
        if (!used(teacher[j]) || m.raw[j] != m.raw[j]) continue;
        const float p = vexp(splat((capped<CAP>(m.raw[j], f) - s.shift) * f.factor))[0] * s.inv_sum;
        from_float((m.sums[ids[j]] - g * p) * slope_at<CAP>(splat(m.raw[j]), f)[0], u + ids[j]);
    }
    for (int64_t j = 0; j < a.k; j++) {
        if (used(teacher[j]) && m.raw[j] == m.raw[j]) m.sums[ids[j]] = 0.f;
    }
}

template <bool CAP, class T>
void epilogue(const TopkArgs& a) {
#pragma omp parallel
    {
        Scratch m(a.x.vocab, a.k);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.x.n; row++) {
            T* u = (T*)a.x.logits + a.x.offset(row);
            const Factor f = factor_of(a.x.transform, row);
            const Stats s = row_stats<CAP>(u, a.x.vocab, -1, f);
            const double total = row_terms<CAP>(a, row, u, f, s, m), weight = a.row_weight ? a.row_weight[row] : 1.0;
            bool active = false;
            for (int64_t j = 0; j < a.k; j++) active |= used(a.logprobs[row * a.k + j]) && weight * m.slopes[j] != 0;
            a.active[row] = active;
            if (active) write_gradient<CAP>(a, row, u, f, s, weight, total, m);
        }
    }
}

}  // namespace

void topk_epilogue(const TopkArgs& a) {
    if (a.x.transform.softcap > 0) {
        RLHF_DISPATCH(a.x.dtype, T, (epilogue<true, T>(a)));
    } else {
        RLHF_DISPATCH(a.x.dtype, T, (epilogue<false, T>(a)));
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

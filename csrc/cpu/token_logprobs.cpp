// Log-prob of one token per row and entropy of the row, forward and backward; the epilogue of the loss for a chunk of rows;
// copies between rows of a chunk.
#include "ops.h"
#include "row.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

template <class T>
Stats stats_of(const LogitRows& x, int64_t row, const Factor& f) {
    const T* u = (const T*)x.logits + x.offset(row);
    return f.softcap > 0.f ? row_stats<true>(u, x.vocab, x.ids[row], f) : row_stats<false>(u, x.vocab, x.ids[row], f);
}

template <class T>
void gradient_of(const LogitRows& x, int64_t row, const Factor& f, const Stats& s, float g, float h, T* out) {
    const T* u = (const T*)x.logits + x.offset(row);
    const int64_t id = x.ids[row], v = x.vocab;
    if (f.softcap > 0.f) {
        h != 0.f ? row_gradient<true, true>(u, out, v, id, f, s, g, h) : row_gradient<true, false>(u, out, v, id, f, s, g, h);
    } else {
        h != 0.f ? row_gradient<false, true>(u, out, v, id, f, s, g, h) : row_gradient<false, false>(u, out, v, id, f, s, g, h);
    }
}

void put(const RowStats& out, int64_t row, const Stats& s) {
    out.logprobs[row] = s.logprob;
    out.entropy[row] = s.entropy;
    out.shift[row] = s.shift;
    out.inv_sum[row] = s.inv_sum;
}

template <class T>
void forward(const LogitRows& x, const RowStats& out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < x.n; row++) {
        put(out, row, x.mask && !x.mask[row] ? Stats{} : stats_of<T>(x, row, factor_of(x.transform, row)));
    }
}

template <class T>
void backward(const LogitRows& x, const RowStats& s, const RowGradient& grad) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < x.n; row++) {
        T* out = (T*)grad.dlogits + (grad.contiguous ? row * x.vocab : x.offset(row));
        const float g = grad.grad_logprobs ? grad.grad_logprobs[row] : 0.f;
        const float h = grad.grad_entropy ? grad.grad_entropy[row] : 0.f;
        if ((x.mask && !x.mask[row]) || (g == 0.f && h == 0.f)) {
            zero_row(out, x.vocab);
            continue;
        }
        const Stats stats{s.logprobs[row], s.entropy[row], s.shift[row], s.inv_sum[row]};
        gradient_of<T>(x, row, factor_of(x.transform, row), stats, g, h, out);
    }
}

template <class T>
void epilogue(const LogitRows& x, const RowStats& out, const PpoRows& ppo, uint8_t* active) {
    const PpoScalars& p = ppo.scalars;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < x.n; row++) {
        const Factor f = factor_of(x.transform, row);
        const Stats s = stats_of<T>(x, row, f);
        put(out, row, s);
        const float weight = ppo.row_weight ? ppo.row_weight[row] : 1.f;
        const float* ref = ppo.ref_logprobs ? ppo.ref_logprobs + row : nullptr;
        const float importance = ppo.weights ? ppo.weights[row] : 1.f;
        const float g = weight * logprob_slope(s.logprob, ppo.old_logprobs[row], ppo.advantages[row], importance, ref, p);
        const float h = -p.entropy_coef * weight;
        active[row] = g != 0.f || h != 0.f;
        if (active[row]) gradient_of<T>(x, row, f, s, g, h, (T*)x.logits + x.offset(row));
    }
}

}  // namespace

void token_logprobs_forward(const LogitRows& x, const RowStats& out) {
    RLHF_DISPATCH(x.dtype, T, forward<T>(x, out));
}

void token_logprobs_backward(const LogitRows& x, const RowStats& s, const RowGradient& grad) {
    RLHF_DISPATCH(x.dtype, T, backward<T>(x, s, grad));
}

// Replace the logits of a chunk by their gradient, in place. `active` marks the rows whose gradient is not 0; other rows keep
// their logits.
void ppo_epilogue(const LogitRows& x, const RowStats& out, const PpoRows& ppo, uint8_t* active) {
    RLHF_DISPATCH(x.dtype, T, epilogue<T>(x, out, ppo, active));
}

// data[to[k]] = data[from[k]] for rows that do not overlap.
void move_rows(void* data, const int64_t* to, const int64_t* from, int64_t n, int64_t row_bytes) {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < n; k++) {
        memcpy((char*)data + to[k] * row_bytes, (const char*)data + from[k] * row_bytes, size_t(row_bytes));
    }
}

}  // namespace RLHF_ISA
}  // namespace rlhf

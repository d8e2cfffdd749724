// Sampling of one token per row. One read of the row computes the maximum and the mass of every block. The filters then
// determine one lower limit on the logits. The inverse of the cumulative distribution is searched first over the blocks and
// then inside one block.
#include "../math/philox.h"
#include "moments.h"
#include "ops.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int kSampleBlock = 1024;

struct Block {
    float top;    // largest logit
    double mass;  // Σ e^((u - top) factor) over its kept logits
};

// Buffers of one thread. `values` is allocated only if a filter needs it.
struct Scratch {
    Block* blocks;
    float* values;  // (V + W)

    Scratch(int64_t vocab, bool filtered)
        : blocks(new Block[size_t(vocab) / kSampleBlock + 1]), values(filtered ? new float[size_t(vocab) + W] : nullptr) {}
    ~Scratch() {
        delete[] blocks;
        delete[] values;
    }
};

template <class T>
struct Row {
    const T* u;
    int64_t vocab;
    float factor;  // 1 / temperature
    Scratch& scratch;

    int64_t blocks() const { return (vocab + kSampleBlock - 1) / kSampleBlock; }
    int length(int64_t block) const {
        const int64_t left = vocab - block * kSampleBlock;
        return int(left < kSampleBlock ? left : kSampleBlock);
    }
    vf at(int64_t i) const { return i + W <= vocab ? load(u + i) : load_tail(u + i, int(vocab - i), -kInf); }
    double scale(const Block& b, float top) const { return exp((double(b.top) - top) * factor); }
};

// Return the mass of one block; logits below `limit` do not count.
template <class T>
double mass_of(const Row<T>& row, int64_t block, float top, float limit) {
    LaneSums sum;
    const int64_t start = block * kSampleBlock;
    for (int i = 0; i < row.length(block); i += W) {
        const vf u = row.at(start + i);
        const vf e = vexp((u - top) * row.factor);
        sum.add(u < limit ? vf{} : e);  // NaN counts, so the sum becomes NaN
    }
    return sum.total();
}

// Return the maxima of a block per lane: lane i is the maximum of logits i, i + W, i + 2 W, ... of the block.
template <class T>
vf lane_tops(const Row<T>& row, int64_t block) {
    vf high = splat(-kInf);
    for (int i = 0; i < row.length(block); i += W) high = vmax(row.at(block * kSampleBlock + i), high);
    return high;
}

template <class T>
float read_blocks(const Row<T>& row) {
    float top = -kInf;
    for (int64_t b = 0; b < row.blocks(); b++) {
        const float block_top = hmax(lane_tops(row, b));
        // A block of -inf only has mass 0. Its exponents are relative to 0, because -inf - -inf would be NaN.
        row.scratch.blocks[b] = {block_top, mass_of(row, b, block_top == -kInf ? 0.f : block_top, -kInf)};
        top = block_top > top ? block_top : top;
    }
    return top;
}

template <class T>
double total_mass(const Row<T>& row, float top) {
    double total = 0;
    for (int64_t b = 0; b < row.blocks(); b++) total += row.scratch.blocks[b].mass * row.scale(row.scratch.blocks[b], top);
    return total;
}

// Return one bit per lane, set if the lane is at least `limit`.
unsigned reaching(vf u, float limit) {
#if defined(RLHF_ISA_AVX512)
    return _mm512_cmp_ps_mask(bits<__m512>(u), _mm512_set1_ps(limit), _CMP_GE_OQ);
#elif defined(RLHF_ISA_AVX2)
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(u), _mm256_set1_ps(limit), _CMP_GE_OQ)));
#else
    unsigned lanes = 0;
    for (int i = 0; i < W; i++) lanes |= unsigned(u[i] >= limit) << i;
    return lanes;
#endif
}

// Copy the logits that are at least `limit` to the scratch buffer, in order, and return their number.
template <class T>
int64_t gather(const Row<T>& row, float limit) {
    float* out = row.scratch.values;
    int64_t n = 0;
    for (int64_t b = 0; b < row.blocks(); b++) {
        if (row.scratch.blocks[b].top < limit) continue;
        for (int i = 0; i < row.length(b); i += W) {
            const vf u = row.at(b * kSampleBlock + i);
            const int left = row.length(b) - i;
            const unsigned lanes = reaching(u, limit) & (left < W ? (1u << left) - 1 : ~0u);
            if (!lanes) continue;
#if defined(RLHF_ISA_AVX512)
            store(out + n, bits<vf>(_mm512_maskz_compress_ps(__mmask16(lanes), bits<__m512>(u))));
            n += __builtin_popcount(lanes);
#else
            for (int lane = 0; lane < W; lane++) {
                out[n] = u[lane];
                n += lanes >> lane & 1;
            }
#endif
        }
    }
    return n;
}

float middle(float a, float b, float c) {
    const float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

struct Weights {
    bool count;  // every value has weight 1; otherwise e^((x - top) factor)
    float top, factor;
};

struct Split {
    double greater, equal;
};

template <bool COUNT>
Split split(const float* x, int64_t n, float pivot, const Weights& w) {
    LaneSums greater, equal;
    for (int64_t i = 0; i < n; i += W) {
        const vf v = i + W <= n ? load(x + i) : load_tail(x + i, int(n - i), -kInf);
        const vf weight = COUNT ? splat(1.f) : vexp((v - w.top) * w.factor);
        greater.add(v > pivot ? weight : vf{});
        equal.add(v == pivot ? weight : vf{});
    }
    // The last vector is padded with -inf, which is not one of the values.
    const double filler = COUNT && pivot == -kInf && n % W ? double(W - n % W) : 0;
    return {greater.total(), equal.total() - filler};
}

// Return the largest x_i such that the values >= x_i have a total weight of at least `target`, or the smallest value if the
// weight of all values is less. This is a quickselect, which overwrites `x`.
float weighted_select(float* x, int64_t n, double target, const Weights& w) {
    float pivot = -kInf;
    while (n > 0) {
        pivot = middle(x[0], x[n / 2], x[n - 1]);
        const Split s = w.count ? split<true>(x, n, pivot, w) : split<false>(x, n, pivot, w);
        int64_t kept = 0;
        if (s.greater >= target) {
            for (int64_t i = 0; i < n; i++) {
                const float v = x[i];
                x[kept] = v;
                kept += v > pivot;
            }
        } else if (s.greater + s.equal >= target) {
            return pivot;
        } else {
            target -= s.greater + s.equal;
            for (int64_t i = 0; i < n; i++) {
                const float v = x[i];
                x[kept] = v;
                kept += v < pivot;
            }
        }
        n = kept;
    }
    return pivot;
}

// Return the k-th largest logit. The k-th largest of the lanes' maxima is a lower bound of it, so only logits that reach the
// bound are candidates. The padding of a short last block is -inf, which can only lower the bound.
template <class T>
float top_k_limit(const Row<T>& row, int64_t k) {
    float* x = row.scratch.values;
    int64_t n = 0;
    for (int64_t b = 0; b < row.blocks(); b++) {
        store(x + n, lane_tops(row, b));
        n += W;
    }
    const float bound = n >= k ? weighted_select(x, n, double(k), {true, 0, 0}) : -kInf;
    return weighted_select(x, gather(row, bound), double(k), {true, 0, 0});
}

// Return the smallest logit of the top-p set: the smallest set of largest logits with at least a share p of the mass of the
// logits >= limit.
template <class T>
float top_p_limit(const Row<T>& row, double p, float top, float limit, double total) {
    const Weights w{false, top, row.factor};
    if (limit == -kInf) {
        // All logits below this one together have a share of less than 1 - p, so none of them is in the set.
        const double needless = top + (log((1 - p) * total / double(row.vocab)) - 1e-3) / row.factor;
        const int64_t n = gather(row, float(needless - 1e-6 * fabs(needless)));  // the margin exceeds the rounding to float
        return weighted_select(row.scratch.values, n, p * total, w);
    }
    const int64_t n = gather(row, limit);
    const Split all = split<false>(row.scratch.values, n, -kInf, w);
    return weighted_select(row.scratch.values, n, p * (all.greater + all.equal), w);
}

template <class T>
float filter_limit(const Row<T>& row, const SampleArgs& a, float top, double total) {
    float limit = -kInf;
    if (a.top_k > 0 && a.top_k < row.vocab) limit = top_k_limit(row, a.top_k);
    if (a.top_p < 1) {
        const float t = top_p_limit(row, a.top_p, top, limit, total);
        limit = t > limit ? t : limit;
    }
    if (a.min_p > 0) {
        const float t = top + logf(float(a.min_p)) / row.factor;
        limit = t > limit ? t : limit;
    }
    return limit;
}

// Return the first kept token at which the cumulative mass exceeds `target`.
template <class T>
int64_t look_up(const Row<T>& row, double target, float top, float limit) {
    int64_t block = 0, last = 0;
    double scale = 0;
    for (; block < row.blocks(); block++) {
        const Block& b = row.scratch.blocks[block];
        scale = b.mass > 0 ? row.scale(b, top) : 0;
        if (b.mass * scale > 0) last = block;
        if (b.mass * scale > target) break;
        target -= b.mass * scale;
    }
    if (block == row.blocks()) {  // the total was rounded up: return the last token with any mass
        block = last;
        scale = row.scale(row.scratch.blocks[block], top);
        target = kInf;
    }
    const int64_t start = block * kSampleBlock;
    int64_t id = start;
    double before = 0;
    for (int i = 0; i < row.length(block); i += W) {
        const vf u = row.at(start + i), e = vexp((u - row.scratch.blocks[block].top) * row.factor);
        for (int lane = 0; lane < W; lane++) {
            if (u[lane] < limit || !(e[lane] > 0)) continue;
            id = start + i + lane;
            before += e[lane];
            if (before * scale > target) return id;
        }
    }
    return id;
}

template <class T>
void sample_row(const SampleArgs& a, int64_t r, Scratch& scratch) {
    const float temperature = a.temperatures ? a.temperatures[r] : a.temperature;
    const Row<T> row{(const T*)a.logits + r * a.row_stride, a.vocab, 1.f / temperature, scratch};
    const float top = read_blocks(row);
    const double total = total_mass(row, top);
    if (!(total > 0 && total < kInf)) {
        a.ids[r] = 0;
        a.logprobs[r] = a.sampling_logprobs[r] = kNaN;
        return;
    }
    const float limit = filter_limit(row, a, top, total);
    if (limit > -kInf) {
        for (int64_t b = 0; b < row.blocks(); b++) {
            Block& block = scratch.blocks[b];
            block.mass = block.top < limit ? 0 : mass_of(row, b, block.top, limit);
        }
    }
    const double kept = limit > -kInf ? total_mass(row, top) : total;
    const double u = philox_uniform(a.seed, uint64_t(a.sequence[r]), uint64_t(a.position[r]));
    const int64_t id = look_up(row, u * kept, top, limit);
    const double log_weight = (double(to_float(row.u[id])) - top) * row.factor;
    a.ids[r] = id;
    a.logprobs[r] = float(log_weight - log(total));
    a.sampling_logprobs[r] = float(log_weight - log(kept));
}

template <class T>
void sample(const SampleArgs& a) {
    const bool filtered = a.top_k > 0 || a.top_p < 1;
#pragma omp parallel if (a.rows > 1 && a.rows * a.vocab > 65536)
    {
        Scratch scratch(a.vocab, filtered);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; r++) sample_row<T>(a, r, scratch);
    }
}

}  // namespace

void sample_tokens(const SampleArgs& a) { RLHF_DISPATCH(a.dtype, T, sample<T>(a)); }

}  // namespace RLHF_ISA
}  // namespace rlhf

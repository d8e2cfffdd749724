// Attention of one query token per sequence over the key columns that its mask allows. The bits of a row depend only on its
// allowed columns: the index of a column determines its lane and block, and a masked column is never read.
#include "ops.h"
#include "simd.h"

namespace rlhf {
namespace RLHF_ISA {

namespace {

constexpr int kLanes = 4;  // vectors of the head with independent accumulators

float lane_sum(vf v) {
#if defined(RLHF_ISA_AVX512)
    return _mm512_reduce_add_ps(v);
#elif defined(RLHF_ISA_AVX2)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Return q . k; `q` is float and padded with zeros to whole vectors.
template <class T>
float dot(const float* q, const T* k, int64_t size) {
    vf sum[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes * W <= size; i += kLanes * W)
        for (int j = 0; j < kLanes; j++) sum[j] += load(q + i + j * W) * load(k + i + j * W);
    for (; i + W <= size; i += W) sum[0] += load(q + i) * load(k + i);
    if (i < size) sum[1] += load(q + i) * load_tail(k + i, int(size - i), 0.f);
    return lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

struct Columns {
    const uint8_t* mask;
    int64_t first, end;  // every allowed column is in [first, end)
};

Columns live(const uint8_t* mask, int64_t width) {
    int64_t first = 0, end = width;
    while (end > 0 && !mask[end - 1]) end--;
    while (first < end && !mask[first]) first++;
    return {mask, first, end};
}

// Replace the attention logits by e^(logit - maximum), the weights before normalization, and return their sum. Vectors start
// at multiples of W.
double weigh(float* score, const Columns& c) {
    float top = -kInf;
    for (int64_t i = c.first; i < c.end; i++) top = score[i] > top ? score[i] : top;
    const int64_t begin = c.first / W * W, end = (c.end + W - 1) / W * W;
    for (int64_t i = begin; i < c.first; i++) score[i] = -kInf;
    for (int64_t i = c.end; i < end; i++) score[i] = -kInf;
    double sum = 0;
    for (int64_t block = begin; block < end; block += 64 * W) {
        vf part{};
        for (int64_t i = block; i < block + 64 * W && i < end; i += W) {
            const vf e = vexp(load(score + i) - top);
            store(score + i, e);
            part += e;
        }
        sum += hsum(part);
    }
    return sum;
}

// out = scale * sum of weight * value, with `kLanes` vectors of the head at a time and columns in order.
template <class T>
void combine(const float* weight, const T* values, int64_t stride, const Columns& c, int64_t size, float scale, float* out) {
    int64_t i = 0;
    for (; i + kLanes * W <= size; i += kLanes * W) {
        vf sum[kLanes] = {};
        for (int64_t column = c.first; column < c.end; column++) {
            if (!c.mask[column]) continue;
            const T* v = values + column * stride + i;
            for (int j = 0; j < kLanes; j++) sum[j] += weight[column] * load(v + j * W);
        }
        for (int j = 0; j < kLanes; j++) store(out + i + j * W, sum[j] * scale);
    }
    for (; i < size; i += W) {
        const int left = int(size - i < W ? size - i : W);
        vf sum{};
        for (int64_t column = c.first; column < c.end; column++) {
            if (!c.mask[column]) continue;
            const T* v = values + column * stride + i;
            sum += weight[column] * (left == W ? load(v) : load_tail(v, left, 0.f));
        }
        store(out + i, sum * scale);
    }
}

// Compute the query heads of one group of one row. They share keys and values, which the first head loads into the CPU's cache.
template <class T>
void attend(const AttentionArgs& a, int64_t row, int64_t group, float* query, float* score, float* out) {
    const int64_t shared = a.heads / a.groups, padded = (a.size + W - 1) / W * W;
    const T* keys = (const T*)a.keys + row * a.key_strides[0] + group * a.key_strides[1];
    const T* values = (const T*)a.values + row * a.value_strides[0] + group * a.value_strides[1];
    const Columns columns = live(a.mask + row * a.width, a.width);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
        const T* q = (const T*)a.query + (row * a.heads + head) * a.size;
        for (int64_t i = 0; i < padded; i++) query[i] = i < a.size ? to_float(q[i]) * a.scale : 0.f;
        for (int64_t column = columns.first; column < columns.end; column++)
            score[column] = columns.mask[column] ? dot(query, keys + column * a.key_strides[2], a.size) : -kInf;
        const double sum = weigh(score, columns);
        combine(score, values, a.value_strides[2], columns, a.size, float(1 / sum), out);
        T* target = (T*)a.out + (row * a.heads + head) * a.size;
        for (int64_t i = 0; i < a.size; i++) from_float(out[i], target + i);
    }
}

template <class T>
void attention(const AttentionArgs& a) {
    const int64_t jobs = a.rows * a.groups, padded = (a.size + W - 1) / W * W;
#pragma omp parallel if (jobs > 1 && jobs * a.width * a.size > 65536)
    {
        float* query = new float[size_t(2 * padded + a.width + 2 * W)];
        float *out = query + padded, *score = out + padded;
#pragma omp for schedule(dynamic, 4)
        for (int64_t job = 0; job < jobs; job++) attend<T>(a, job / a.groups, job % a.groups, query, score, out);
        delete[] query;
    }
}

}  // namespace

void decode_attention(const AttentionArgs& a) { RLHF_DISPATCH(a.dtype, T, attention<T>(a)); }

}  // namespace RLHF_ISA
}  // namespace rlhf

// Arguments of the launchers of each op: plain pointers and sizes, the same for CPU and CUDA. A pointer may be null only if its
// comment has "or null". Legend: B sequences, N tokens, V vocabulary.
#pragma once
#include "math/common.h"
#include "math/importance.h"
#include "math/ppo.h"
#include "math/topk.h"

namespace rlhf {

// The logit z that the softmax uses, from the model's logit u: z = softcap * tanh(logit_scale * u / softcap) / temperature, or
// z = logit_scale * u / temperature without a softcap.
struct LogitTransform {
    double temperature = 1;
    const float* temperatures = nullptr;  // (N) or null
    double softcap = 0;                   // 0: off
    double logit_scale = 1;

    // z = factor * w, where w is softcap * tanh(inner * u) with a softcap and u without a softcap.
    RLHF_MEMBER double factor(int64_t row) const {
        return (softcap > 0 ? 1 : logit_scale) / (temperatures ? temperatures[row] : temperature);
    }
    RLHF_MEMBER double inner() const { return softcap > 0 ? logit_scale / softcap : 0; }
};

// Rows of logits, contiguous along the vocabulary; strides count elements. Row r starts at (r / inner) * outer_stride +
// (r % inner) * row_stride, so that a slice such as logits[:, :-1] needs no copy.
struct LogitRows {
    const void* logits;  // (N, V)
    DType dtype;
    int64_t n, vocab, row_stride, inner, outer_stride;
    const int64_t* ids;   // (N)
    const uint8_t* mask;  // (N) or null: every row counts
    LogitTransform transform;

    RLHF_MEMBER int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * row_stride; }
};

// Statistics of each row: p_j = exp((w_j - shift) * factor) * inv_sum, with w and factor of LogitTransform.
struct RowStats {
    float* logprobs;  // (N)
    float* entropy;   // (N)
    float* shift;     // (N)
    float* inv_sum;   // (N)
};

struct RowGradient {
    void* dlogits;               // (N, V), the dtype of the logits; may be the logits themselves
    bool contiguous;             // rows of dlogits are adjacent; otherwise they have the strides of the logits
    const float* grad_logprobs;  // (N) or null: 0
    const float* grad_entropy;   // (N) or null: 0
};

// Per-token inputs of the PPO objective; all (N).
struct PpoRows {
    PpoScalars scalars;
    const float* old_logprobs;
    const float* advantages;
    const float* weights;       // or null: 1
    const float* ref_logprobs;  // or null: no KL term
    const float* row_weight;    // or null: 1; the aggregation's relative weight of each token
};

// Bounds of the sequences: packed with cu_seqlens, or padded to `length` tokens each if cu_seqlens is null.
struct Sequences {
    int64_t count;
    int64_t length;
    const int32_t* cu_seqlens;  // (B + 1) or null
};

// Indices of the sums over the tokens of one call; launch_args.SUMS in Python has the same order.
enum PpoSum : int {
    kPolicy, kRefKlTerm, kEntropyTerm, kValueTerm,  // times the aggregation's weight
    kEntropy, kClipped, kDualClipped, kApproxKl, kK3, kRatio, kRefKl, kActive, kNumTokens,  // unweighted
    kValueClipped, kNumValueTokens, kReturns, kReturnsSq, kResidual, kResidualSq,
    kRatioMax,  // a maximum
    kNumSums
};

struct PpoLossArgs {
    PpoRows ppo;
    int64_t n;
    Sequences sequences;
    bool sequence_level;
    const uint8_t* mask;            // (N)
    const float* logprobs;          // (N)
    const float* entropy;           // (N) or null
    const float* values;            // (N) or null: no value term
    const float* old_values;        // (N) or null: unclipped
    const float* returns;           // (N)
    const uint8_t* value_mask;      // (N)
    const float* value_row_weight;  // (N) or null: 1
    float* slope;                   // (N) out: d L / d logprob times the denominator
    float* value_slope;             // (N) out, or null
    double* sums;                   // (kNumSums) out
};

// A whole call of the loss: PpoLossArgs with the denominators, the scalar loss and the metrics.
struct PpoCallArgs {
    PpoLossArgs loss;  // its logprobs may be null: there is no policy term
    // Of policy, value, tokens and value tokens; below 0: the number of tokens under the mask, for the first two that of the
    // token mean.
    float denominators[4];
    double vf_coef, entropy_coef, kl_coef;
    const int64_t* source;   // (num_metrics): the sum of each metric
    const int64_t* divisor;  // (num_metrics): its denominator among {policy, value, tokens, value tokens, 1}
    int64_t num_metrics;
    float* entropy_slope;  // (N) out, or null: the entropy has no gradient
    float* result;         // () out: the loss
    float* metrics;        // (num_metrics) out
};

struct GaeArgs {
    int64_t n;
    Sequences sequences;
    const float* rewards;    // (N)
    const float* values;     // (N)
    const uint8_t* mask;     // (N)
    const float* bootstrap;  // (B) or null: 0
    float gamma, lam;
    const float* lams;  // (B) or null: `lam` in every sequence
    bool skip_holes;
    float* advantages;  // (N) out
    float* returns;     // (N) out
};

struct RolloutArgs {
    GaeArgs gae;  // gae.rewards is the buffer `rewards` below, which the op fills
    const float* scores;         // (B)
    const float* logprobs;       // (N)
    const float* ref_logprobs;   // (N)
    const int64_t* score_index;  // (B) or null: the last action
    KlEstimator kl_estimator;
    float kl_coef;
    float score_clip;  // inf: off
    bool whiten_rewards, whiten_advantages;
    float* rewards;  // (N) out
    float* kl;       // (N) out
};

struct ImportanceArgs {
    int64_t n;
    Sequences sequences;
    ImportanceRule rule;
    const float* logprobs;          // (N)
    const float* sampler_logprobs;  // (N)
    const uint8_t* mask;            // (N)
    const float* advantages;        // (N) or null: tokens are rejected with any advantage
    float* weights;                 // (N) out
    uint8_t* kept;                  // (N) out
    float* metrics;                 // (kNumImportanceMetrics) out
};

// Rows of a chunk of logits with the tokens that a teacher lists for each; the ids of `x` are not read.
struct TopkArgs {
    LogitRows x;
    int64_t k;
    const int64_t* ids;       // (N, K)
    const float* logprobs;    // (N, K), -inf: the entry is unused
    const float* row_weight;  // (N) or null: 1
    TopkRule rule;
    float* found;     // (3, N) out: divergence, the student's mass, the teacher's mass
    uint8_t* active;  // (N) out: the gradient is not 0, and has replaced the logits
};

struct SampleArgs {
    const void* logits;  // (B, V)
    DType dtype;
    int64_t rows, vocab, row_stride;
    float temperature;
    const float* temperatures;  // (B) or null
    int64_t top_k;              // 0: off
    double top_p;               // 1: off
    double min_p;               // 0: off
    uint64_t seed;
    const int64_t* sequence;   // (B)
    const int64_t* position;   // (B)
    int64_t* ids;              // (B) out
    float* logprobs;           // (B) out
    float* sampling_logprobs;  // (B) out
};

struct AttentionArgs {
    const void *query, *keys, *values;  // (R, heads, D), (R, groups, C, D), (R, groups, C, D); R rows, C columns
    DType dtype;
    int64_t rows, heads, groups, width, size;  // width is C, size is D
    int64_t key_strides[3], value_strides[3];  // of R, groups and C, in elements; the stride of D is 1
    const uint8_t* mask;                       // (R, C)
    float scale;
    void* out;  // (R, heads, D) out
};

enum class GroupKind : int { rloo = 0, grpo = 1, dr_grpo = 2 };

struct GroupScale {
    GroupKind kind;
    double eps;       // added to the standard deviation
    bool population;  // whether the deviation divides by the count, not by the count minus 1
};

}  // namespace rlhf

// Declarations of every CPU op, once per instruction set, and the dispatch on the element type.
#pragma once
#include "../args.h"

#define RLHF_DECLARE_CPU_OPS                                                                                        \
    void token_logprobs_forward(const LogitRows& x, const RowStats& out);                                           \
    void token_logprobs_backward(const LogitRows& x, const RowStats& s, const RowGradient& grad);                   \
    void ppo_epilogue(const LogitRows& x, const RowStats& out, const PpoRows& ppo, uint8_t* active);                \
    void move_rows(void* data, const int64_t* to, const int64_t* from, int64_t n, int64_t row_bytes);       \
    void ppo_loss(const PpoLossArgs& a);                                                                            \
    void ppo_loss_call(const PpoCallArgs& a);                                                                       \
    void accumulate(float* sum, const void* part, DType dtype, int64_t n, bool first);                              \
    void scale_cast(const void* x, DType from, void* out, DType to, int64_t n, float scale);                        \
    void gae(const GaeArgs& a);                                                                                     \
    void rollout_advantages(const RolloutArgs& a);                                                                  \
    void importance_weights(const ImportanceArgs& a);                                                               \
    void top_entropy_mask(const float* entropy, const uint8_t* mask, int64_t n, double share, uint8_t* kept, float* metrics); \
    void topk_epilogue(const TopkArgs& a);                                                                          \
    void sample_tokens(const SampleArgs& a);                                                                        \
    void decode_attention(const AttentionArgs& a);                                                                  \
    void kl_penalty(const float* logprobs, const float* ref, int64_t n, KlEstimator estimator, float* out);         \
    void kl_penalty_backward(const float* grad, const float* logprobs, const float* ref, int64_t n,                 \
                             KlEstimator estimator, float* out);                                                    \
    void masked_mean(const float* x, const uint8_t* mask, int64_t n, float* out);                                   \
    void masked_whiten(const float* x, const uint8_t* mask, int64_t n, bool shift_mean, bool unbiased, float* out); \
    void group_advantages(const float* scores, const int64_t* groups, int64_t n, const GroupScale& g, float* out);

namespace rlhf {
namespace baseline { RLHF_DECLARE_CPU_OPS }
#ifdef RLHF_X86
namespace avx2 { RLHF_DECLARE_CPU_OPS }
namespace avx512 { RLHF_DECLARE_CPU_OPS }
#endif
}  // namespace rlhf

// Run `code` with T bound to the element type of `dtype`.
#define RLHF_DISPATCH(dtype, T, code)                       \
    switch (dtype) {                                        \
        case DType::f32: { using T = float; code; break; }  \
        case DType::bf16: { using T = bf16; code; break; }  \
        default: { using T = f16; code; break; }            \
    }

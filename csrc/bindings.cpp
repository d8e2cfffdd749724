// The pybind11 module rlhf_kernels._C. Tensors are passed as addresses (0: absent), sizes and dtype numbers. The module
// includes no torch headers, so one build works with every version of torch. Its callers in rlhf_kernels check the tensors.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/ops.h"
#ifdef RLHF_CUDA
#include "cuda/bindings.h"
#endif
#include "math/philox.h"

namespace py = pybind11;
using namespace rlhf;

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa pick_isa() {
#ifdef RLHF_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
}

const Isa best = pick_isa();
Isa isa = best;

std::string isa_name() { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

// For tests, which compare the results of every instruction set up to the best one.
void set_isa(const std::string& name) {
    const Isa wanted = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
    if (wanted > best) throw py::value_error("isa: got '" + name + "', which this machine does not support");
    isa = wanted;
}

#ifdef RLHF_X86
#define RLHF_CPU(call) (isa == Isa::avx512 ? avx512::call : isa == Isa::avx2 ? avx2::call : baseline::call)
#else
#define RLHF_CPU(call) (baseline::call)
#endif

// Ask the operating system for huge pages. The first write to new memory costs one page fault per 4 KB, which for a chunk of
// logits takes a quarter as long as its matrix product; with huge pages it costs one per 2 MB. Without support, the hint has no
// effect.
void advise_huge_pages(Address begin, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const Address page = 4096, first = (begin + page - 1) & ~(page - 1), last = (begin + bytes) & ~(page - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Return the compute capabilities of the compiled CUDA kernels, as 10 * major + minor; an empty list if there are no kernels.
py::list cuda_architectures() {
    py::list built;
#ifdef RLHF_CUDA
    for (int x : {RLHF_CUDA}) built.append(x);
#endif
    return built;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of rlhf_kernels; private.";
    using py::arg;
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("isa", isa_name);
    m.def("set_isa", set_isa);
    m.def("advise_huge_pages", advise_huge_pages);
    m.def("cuda_architectures", cuda_architectures);
    m.def("philox4x32", [](uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {  // for tests
        const Philox r = philox4x32(k0, k1, {{c0, c1, c2, c3}});
        return py::make_tuple(r.w[0], r.w[1], r.w[2], r.w[3]);
    });

    bind_arguments(m);
    m.def("token_logprobs_forward",
          [](const LogitRows& x, Address stats) { RLHF_CPU(token_logprobs_forward(x, row_stats(stats, x.n))); }, unlocked);
    m.def("token_logprobs_backward",
          [](const LogitRows& x, Address stats, Address dlogits, bool contiguous, Address grad_logprobs,
             Address grad_entropy) {
              const RowGradient grad{at<void>(dlogits), contiguous, at<const float>(grad_logprobs), at<const float>(grad_entropy)};
              RLHF_CPU(token_logprobs_backward(x, row_stats(stats, x.n), grad));
          }, unlocked);
    m.def("ppo_epilogue",
          [](const LogitRows& x, Address stats, const PpoRows& ppo, Address active) {
              RLHF_CPU(ppo_epilogue(x, row_stats(stats, x.n), ppo, at<uint8_t>(active)));
          }, unlocked);
    m.def("move_rows",
          [](Address data, Address to, Address from, int64_t n, int64_t row_bytes) {
              RLHF_CPU(move_rows(at<void>(data), at<const int64_t>(to), at<const int64_t>(from), n, row_bytes));
          }, unlocked);
    m.def("ppo_loss",
          [](const PpoRows& ppo, int64_t n, int64_t sequences, int64_t length, Address cu_seqlens, bool sequence_level,
             Address mask, Address logprobs, Address entropy, Address values, Address old_values, Address returns,
             Address value_mask, Address value_row_weight, Address slope, Address value_slope, Address sums) {
              const PpoLossArgs args{ppo,
                                     n,
                                     {sequences, length, at<const int32_t>(cu_seqlens)},
                                     sequence_level,
                                     at<const uint8_t>(mask),
                                     at<const float>(logprobs),
                                     at<const float>(entropy),
                                     at<const float>(values),
                                     at<const float>(old_values),
                                     at<const float>(returns),
                                     at<const uint8_t>(value_mask),
                                     at<const float>(value_row_weight),
                                     at<float>(slope),
                                     at<float>(value_slope),
                                     at<double>(sums)};
              RLHF_CPU(ppo_loss(args));
          }, unlocked, py::kw_only(), arg("ppo"), arg("n"), arg("sequences"), arg("length"), arg("cu_seqlens"),
          arg("sequence_level"), arg("mask"), arg("logprobs"), arg("entropy"), arg("values"), arg("old_values"), arg("returns"),
          arg("value_mask"), arg("value_row_weight"), arg("slope"), arg("value_slope"), arg("sums"));
    m.def("ppo_loss_call",
          [](const PpoScalars& scalars, int64_t n, int64_t sequences, int64_t length, Address cu_seqlens, bool sequence_level,
             Address logprobs, Address old_logprobs, Address advantages, Address mask, Address weights, Address ref_logprobs,
             Address row_weight, Address entropy, Address values, Address old_values, Address returns, Address value_mask,
             Address value_row_weight, float policy, float value, float tokens, float value_tokens, double vf_coef,
             double entropy_coef, double kl_coef, Address source, Address divisor, int64_t num_metrics, Address slope,
             Address entropy_slope, Address value_slope, Address result, Address metrics) {
              const PpoRows rows{scalars, at<const float>(old_logprobs), at<const float>(advantages), at<const float>(weights),
                                 at<const float>(ref_logprobs), at<const float>(row_weight)};
              const PpoLossArgs loss{rows,
                                     n,
                                     {sequences, length, at<const int32_t>(cu_seqlens)},
                                     sequence_level,
                                     at<const uint8_t>(mask),
                                     at<const float>(logprobs),
                                     at<const float>(entropy),
                                     at<const float>(values),
                                     at<const float>(old_values),
                                     at<const float>(returns),
                                     at<const uint8_t>(value_mask),
                                     at<const float>(value_row_weight),
                                     at<float>(slope),
                                     at<float>(value_slope),
                                     nullptr};
              const PpoCallArgs args{loss,
                                     {policy, value, tokens, value_tokens},
                                     vf_coef,
                                     entropy_coef,
                                     kl_coef,
                                     at<const int64_t>(source),
                                     at<const int64_t>(divisor),
                                     num_metrics,
                                     at<float>(entropy_slope),
                                     at<float>(result),
                                     at<float>(metrics)};
              RLHF_CPU(ppo_loss_call(args));
          }, unlocked);
    m.def("accumulate",
          [](Address sum, Address part, int dtype, int64_t n, bool first) {
              RLHF_CPU(accumulate(at<float>(sum), at<const void>(part), DType(dtype), n, first));
          }, unlocked);
    m.def("scale_cast",
          [](Address x, int from, Address out, int to, int64_t n, float scale) {
              RLHF_CPU(scale_cast(at<const void>(x), DType(from), at<void>(out), DType(to), n, scale));
          }, unlocked);
    m.def("gae", [](const GaeArgs& a) { RLHF_CPU(gae(a)); }, unlocked);
    m.def("rollout_advantages",
          [](const RolloutArgs& a) { RLHF_CPU(rollout_advantages(a)); }, unlocked);
    m.def("importance_weights", [](const ImportanceArgs& a) { RLHF_CPU(importance_weights(a)); }, unlocked);
    m.def("topk_epilogue", [](const TopkArgs& a) { RLHF_CPU(topk_epilogue(a)); }, unlocked);
    m.def("top_entropy_mask",
          [](Address entropy, Address mask, int64_t n, double share, Address kept, Address metrics) {
              RLHF_CPU(top_entropy_mask(at<float>(entropy), at<uint8_t>(mask), n, share, at<uint8_t>(kept), at<float>(metrics)));
          }, unlocked);
    m.def("sample_tokens",
          [](Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, float temperature, Address temperatures,
             int64_t top_k, double top_p, double min_p, int64_t seed, Address sequence, Address position, Address ids,
             Address logprobs, Address sampling_logprobs) {
              const SampleArgs args{at<void>(logits), DType(dtype), rows, vocab, row_stride, temperature,
                                    at<const float>(temperatures), top_k, top_p, min_p, uint64_t(seed),
                                    at<const int64_t>(sequence), at<const int64_t>(position), at<int64_t>(ids),
                                    at<float>(logprobs), at<float>(sampling_logprobs)};
              RLHF_CPU(sample_tokens(args));
          }, unlocked, py::kw_only(), arg("logits"), arg("dtype"), arg("rows"), arg("vocab"), arg("row_stride"),
          arg("temperature"), arg("temperatures"), arg("top_k"), arg("top_p"), arg("min_p"), arg("seed"), arg("sequence"),
          arg("position"), arg("ids"), arg("logprobs"), arg("sampling_logprobs"));
    m.def("decode_attention",
          [](Address query, Address keys, Address values, int dtype, int64_t rows, int64_t heads, int64_t groups, int64_t width,
             int64_t size, std::array<int64_t, 3> key_strides, std::array<int64_t, 3> value_strides, Address mask, float scale,
             Address out) {
              const AttentionArgs args{at<const void>(query), at<const void>(keys), at<const void>(values), DType(dtype), rows,
                                       heads, groups, width, size,
                                       {key_strides[0], key_strides[1], key_strides[2]},
                                       {value_strides[0], value_strides[1], value_strides[2]},
                                       at<const uint8_t>(mask), scale, at<void>(out)};
              RLHF_CPU(decode_attention(args));
          }, unlocked, py::kw_only(), arg("query"), arg("keys"), arg("values"), arg("dtype"), arg("rows"), arg("heads"),
          arg("groups"), arg("width"), arg("size"), arg("key_strides"), arg("value_strides"), arg("mask"), arg("scale"),
          arg("out"));
    m.def("kl_penalty",
          [](Address logprobs, Address ref, int64_t n, int estimator, Address out) {
              RLHF_CPU(kl_penalty(at<float>(logprobs), at<float>(ref), n, KlEstimator(estimator), at<float>(out)));
          }, unlocked);
    m.def("kl_penalty_backward",
          [](Address grad, Address logprobs, Address ref, int64_t n, int estimator, Address out) {
              RLHF_CPU(kl_penalty_backward(at<float>(grad), at<float>(logprobs), at<float>(ref), n, KlEstimator(estimator),
                                           at<float>(out)));
          }, unlocked);
    m.def("masked_mean",
          [](Address x, Address mask, int64_t n, Address out) {
              RLHF_CPU(masked_mean(at<float>(x), at<uint8_t>(mask), n, at<float>(out)));
          }, unlocked);
    m.def("masked_whiten",
          [](Address x, Address mask, int64_t n, bool shift_mean, bool unbiased, Address out) {
              RLHF_CPU(masked_whiten(at<float>(x), at<uint8_t>(mask), n, shift_mean, unbiased, at<float>(out)));
          }, unlocked);
    m.def("group_advantages",
          [](Address scores, Address groups, int64_t n, int kind, double eps, bool population, Address out) {
              const GroupScale scale{GroupKind(kind), eps, population};
              RLHF_CPU(group_advantages(at<float>(scores), at<int64_t>(groups), n, scale, at<float>(out)));
          }, unlocked);
#ifdef RLHF_CUDA
    cuda::bind(m);
#endif
}

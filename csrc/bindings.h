// Helpers that the binding modules share: addresses as pointers, and the structs of arguments that Python creates.
#pragma once
#include <pybind11/pybind11.h>

#include "args.h"

namespace rlhf {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

static inline RowStats row_stats(Address stats, int64_t n) {
    float* p = at<float>(stats);
    return {p, p + n, p + 2 * n, p + 3 * n};
}

static inline LogitRows logit_rows(Address logits, int dtype, int64_t n, int64_t vocab, int64_t row_stride, int64_t inner,
                                   int64_t outer_stride, Address ids, Address mask, double temperature, Address temperatures,
                                   double softcap, double logit_scale) {
    const LogitTransform transform{temperature, at<const float>(temperatures), softcap, logit_scale};
    return {at<void>(logits), DType(dtype), n, vocab, row_stride, inner, outer_stride, at<const int64_t>(ids),
            at<const uint8_t>(mask), transform};
}

// Return PpoScalars from keyword arguments: exactly one for each scalar.
static inline PpoScalars ppo_scalars(const pybind11::kwargs& given) {
    PpoScalars s;
    size_t known = 0;
#define RLHF_CHOICE(Type, name) s.name = Type(given[#name].cast<int>()), known++;
#define RLHF_NUMBER(name) s.name = given[#name].cast<float>(), known++;
    RLHF_PPO_SCALARS(RLHF_CHOICE, RLHF_NUMBER)
#undef RLHF_CHOICE
#undef RLHF_NUMBER
    if (given.size() != known) throw pybind11::type_error("PpoScalars: unknown keyword; csrc/math/ppo.h lists the names");
    return s;
}

// Register the types of arguments. They are local to the module, so that a second module, built for tests, can also
// register them.
static inline void bind_arguments(pybind11::module_& m) {
    namespace py = pybind11;
    using py::arg;
    py::class_<PpoScalars>(m, "PpoScalars", py::module_local()).def(py::init(&ppo_scalars));
    py::class_<LogitRows>(m, "LogitRows", py::module_local())
        .def(py::init(&logit_rows), py::kw_only(), arg("logits"), arg("dtype"), arg("n"), arg("vocab"), arg("row_stride"),
             arg("inner"), arg("outer_stride"), arg("ids"), arg("mask"), arg("temperature"), arg("temperatures"), arg("softcap"),
             arg("logit_scale"));
    py::class_<PpoRows>(m, "PpoRows", py::module_local())
        .def(py::init([](const PpoScalars& scalars, Address old_logprobs, Address advantages, Address weights,
                         Address ref_logprobs, Address row_weight) {
                 return PpoRows{scalars, at<const float>(old_logprobs), at<const float>(advantages), at<const float>(weights),
                                at<const float>(ref_logprobs), at<const float>(row_weight)};
             }),
             py::kw_only(), arg("scalars"), arg("old_logprobs"), arg("advantages"), arg("weights"), arg("ref_logprobs"),
             arg("row_weight"));
    py::class_<GaeArgs>(m, "GaeArgs", py::module_local())
        .def(py::init([](int64_t n, int64_t sequences, int64_t length, Address cu_seqlens, Address rewards, Address values,
                         Address mask, Address bootstrap, float gamma, float lam, Address lams, bool skip_holes,
                         Address advantages, Address returns) {
                 return GaeArgs{n, {sequences, length, at<const int32_t>(cu_seqlens)}, at<const float>(rewards),
                                at<const float>(values), at<const uint8_t>(mask), at<const float>(bootstrap), gamma, lam,
                                at<const float>(lams), skip_holes, at<float>(advantages), at<float>(returns)};
             }),
             py::kw_only(), arg("n"), arg("sequences"), arg("length"), arg("cu_seqlens"), arg("rewards"), arg("values"),
             arg("mask"), arg("bootstrap"), arg("gamma"), arg("lam"), arg("lams"), arg("skip_holes"), arg("advantages"),
             arg("returns"));
    py::class_<RolloutArgs>(m, "RolloutArgs", py::module_local())
        .def(py::init([](const GaeArgs& gae, Address scores, Address logprobs, Address ref_logprobs, Address score_index,
                         int kl_estimator, float kl_coef, float score_clip, bool whiten_rewards, bool whiten_advantages,
                         Address rewards, Address kl) {
                 return RolloutArgs{gae, at<const float>(scores), at<const float>(logprobs), at<const float>(ref_logprobs),
                                    at<const int64_t>(score_index), KlEstimator(kl_estimator), kl_coef, score_clip,
                                    whiten_rewards, whiten_advantages, at<float>(rewards), at<float>(kl)};
             }),
             py::kw_only(), arg("gae"), arg("scores"), arg("logprobs"), arg("ref_logprobs"), arg("score_index"),
             arg("kl_estimator"), arg("kl_coef"), arg("score_clip"), arg("whiten_rewards"), arg("whiten_advantages"),
             arg("rewards"), arg("kl"));
    py::class_<TopkArgs>(m, "TopkArgs", py::module_local())
        .def(py::init([](const LogitRows& x, int64_t k, Address ids, Address logprobs, Address row_weight, int direction, bool lump,
                         double beta, Address found, Address active) {
                 return TopkArgs{x, k, at<const int64_t>(ids), at<const float>(logprobs), at<const float>(row_weight),
                                 {Direction(direction), lump, beta}, at<float>(found), at<uint8_t>(active)};
             }),
             py::kw_only(), arg("x"), arg("k"), arg("ids"), arg("logprobs"), arg("row_weight"), arg("direction"), arg("lump"),
             arg("beta"), arg("found"), arg("active"));
    py::class_<ImportanceArgs>(m, "ImportanceArgs", py::module_local())
        .def(py::init([](int64_t n, int64_t sequences, int64_t length, Address cu_seqlens, int level, int action, int statistic,
                         float low, float high, Address logprobs, Address sampler_logprobs, Address mask, Address advantages,
                         Address weights, Address kept, Address metrics) {
                 const ImportanceRule rule{ImportanceLevel(level), ImportanceAction(action), Statistic(statistic), low, high};
                 return ImportanceArgs{n, {sequences, length, at<const int32_t>(cu_seqlens)}, rule, at<const float>(logprobs),
                                       at<const float>(sampler_logprobs), at<const uint8_t>(mask), at<const float>(advantages),
                                       at<float>(weights), at<uint8_t>(kept), at<float>(metrics)};
             }),
             py::kw_only(), arg("n"), arg("sequences"), arg("length"), arg("cu_seqlens"), arg("level"), arg("action"),
             arg("statistic"), arg("low"), arg("high"), arg("logprobs"), arg("sampler_logprobs"), arg("mask"), arg("advantages"),
             arg("weights"), arg("kept"), arg("metrics"));
}

}  // namespace rlhf

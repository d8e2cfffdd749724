// What the modules of this project's bindings share: addresses, and the arguments that cross as objects.
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

// Local to the module, so that a second one, made for tests, can have its own.
static inline void bind_arguments(pybind11::module_& m) {
    namespace py = pybind11;
    py::class_<PpoScalars>(m, "PpoScalars", py::module_local())
        .def(py::init([](int objective, int kl_estimator, float low, float high, float dual_clip, float clamp, float old_kl_coef,
                         float kl_coef, float entropy_coef, float cliprange_value) {
            return PpoScalars{Objective(objective), KlEstimator(kl_estimator), low, high, dual_clip, clamp, old_kl_coef, kl_coef,
                              entropy_coef, cliprange_value};
        }));
    py::class_<LogitRows>(m, "LogitRows", py::module_local()).def(py::init(&logit_rows));
    py::class_<PpoRows>(m, "PpoRows", py::module_local())
        .def(py::init([](const PpoScalars& scalars, Address old_logprobs, Address advantages, Address weights,
                         Address ref_logprobs, Address row_weight) {
            return PpoRows{scalars, at<const float>(old_logprobs), at<const float>(advantages), at<const float>(weights),
                           at<const float>(ref_logprobs), at<const float>(row_weight)};
        }));
    py::class_<GaeArgs>(m, "GaeArgs", py::module_local())
        .def(py::init([](int64_t n, int64_t sequences, int64_t length, Address cu_seqlens, Address rewards, Address values,
                         Address mask, Address bootstrap, float gamma, float lam, bool skip_holes, Address advantages,
                         Address returns) {
            return GaeArgs{n, {sequences, length, at<const int32_t>(cu_seqlens)}, at<const float>(rewards),
                           at<const float>(values), at<const uint8_t>(mask), at<const float>(bootstrap), gamma, lam, skip_holes,
                           at<float>(advantages), at<float>(returns)};
        }));
}

}  // namespace rlhf

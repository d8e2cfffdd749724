// The CUDA launchers in rlhf_kernels._C. Addresses are in device memory; a stream and a workspace are passed as numbers too.
#include "bindings.h"

#include "../bindings.h"
#include "ops.h"

namespace py = pybind11;

namespace rlhf {
namespace cuda {

namespace {

LogitsPpoArgs logits_ppo_args(const LogitRows& x, const PpoRows& ppo, Address stats, Address coefficients, Address denominator,
                              Address dlogits, bool contiguous) {
    return {x, ppo, row_stats(stats, x.n), at<float>(coefficients), at<const float>(denominator), at<void>(dlogits), contiguous};
}

}  // namespace

void bind(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("cuda_gae_workspace", [](const GaeArgs& a) { return gae_workspace(a.n, a.sequences); });
    m.def("cuda_gae",
          [](const GaeArgs& a, Address workspace, Address stream) { gae(a, at<void>(workspace), at<void>(stream)); }, unlocked);
    m.def("cuda_rollout_workspace", [](const GaeArgs& a) { return rollout_workspace(a.n, a.sequences); });
    m.def("cuda_rollout_advantages",
          [](const RolloutArgs& a, Address workspace, Address stream) {
              rollout_advantages(a, at<void>(workspace), at<void>(stream));
          }, unlocked);
    m.def("cuda_importance_workspace", [](const ImportanceArgs& a) { return importance_workspace(a); });
    m.def("cuda_importance_weights",
          [](const ImportanceArgs& a, Address workspace, Address stream) {
              importance_weights(a, at<void>(workspace), at<void>(stream));
          }, unlocked);
    m.attr("CUDA_ROW_SHARED") = kRowShared;
    py::class_<LogitsPpoArgs>(m, "LogitsPpoArgs", py::module_local())
        .def(py::init(&logits_ppo_args), py::kw_only(), py::arg("x"), py::arg("ppo"), py::arg("stats"),
             py::arg("coefficients"), py::arg("denominator"), py::arg("dlogits"), py::arg("contiguous"));
    m.def("cuda_logits_ppo_loss",
          [](const LogitsPpoArgs& a, int64_t shared_limit, Address stream) {
              logits_ppo_loss(a, shared_limit, at<void>(stream));
          }, unlocked);
    m.def("cuda_rescale_dlogits",
          [](const LogitsPpoArgs& a, Address upstream, Address stream) {
              rescale_dlogits(a, at<const float>(upstream), at<void>(stream));
          }, unlocked);
}

}  // namespace cuda
}  // namespace rlhf

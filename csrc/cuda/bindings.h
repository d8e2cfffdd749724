#pragma once
#include <pybind11/pybind11.h>

namespace rlhf {
namespace cuda {

// Adds the CUDA launchers to a module that has the argument types already.
void bind(pybind11::module_& m);

}  // namespace cuda
}  // namespace rlhf

#pragma once
#include <pybind11/pybind11.h>

namespace rlhf {
namespace cuda {

// Add the CUDA launchers to a module in which the types of arguments are already registered.
void bind(pybind11::module_& m);

}  // namespace cuda
}  // namespace rlhf

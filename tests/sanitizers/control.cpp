// Functions with one planted error each, built with the flags of the sanitized kernels. `python -m tests.sanitizers` calls each
// in a process that must end with a report: a build that does not find these errors proves nothing about the kernels.

#include <pybind11/pybind11.h>

#include <climits>
#include <cstdint>
#include <vector>

namespace {

float* floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

// Reads the float after the `count` floats of a tensor, whose memory torch has allocated.
float read_past_end(std::uintptr_t address, std::int64_t count) { return floats(address)[count]; }

void write_before_start(std::uintptr_t address) { floats(address)[-1] = 1.0f; }

// A loop of several threads, as in the kernels, the last of which leaves the tensor.
void write_past_end_in_parallel(std::uintptr_t address, std::int64_t count) {
#pragma omp parallel for
  for (std::int64_t i = 0; i <= count; ++i) floats(address)[i] = 0.0f;
}

int use_after_free() {
  auto* values = new std::vector<int>(4, 1);
  int* first = values->data();
  delete values;
  return *first;
}

int signed_overflow(int x) { return x + INT_MAX; }

std::int64_t shift_too_far(int bits) { return std::int64_t{1} << bits; }

int float_to_int(double x) { return static_cast<int>(x); }

float misaligned(std::uintptr_t address) { return *floats(address + 1); }

}  // namespace

PYBIND11_MODULE(sanitizer_control, m) {
  m.def("read_past_end", &read_past_end);
  m.def("write_before_start", &write_before_start);
  m.def("write_past_end_in_parallel", &write_past_end_in_parallel);
  m.def("use_after_free", &use_after_free);
  m.def("signed_overflow", &signed_overflow);
  m.def("shift_too_far", &shift_too_far);
  m.def("float_to_int", &float_to_int);
  m.def("misaligned", &misaligned);
}

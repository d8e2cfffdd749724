// Macros and types with which the formulas compile for both the host and a CUDA device.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RLHF_HD static __host__ __device__ __forceinline__
#define RLHF_MEMBER __host__ __device__ __forceinline__
#else
#define RLHF_MEMBER
// Internal linkage: the file is compiled once per instruction set, and the linker must not merge those copies.
#define RLHF_HD static inline __attribute__((always_inline))
#endif

namespace rlhf {

// dtypes of the tensors that Python passes; rlhf_kernels/_native.py has the same numbers.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr float kNaN = __builtin_nanf("");
constexpr float kInf = __builtin_inff();

}  // namespace rlhf

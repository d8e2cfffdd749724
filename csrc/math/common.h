// What every formula needs to compile for the host and for a CUDA device.
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

// dtypes of tensors that cross the binding; the Python side has the same numbers (rlhf_kernels/_native.py)
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr float kNaN = __builtin_nanf("");
constexpr float kInf = __builtin_inff();

}  // namespace rlhf

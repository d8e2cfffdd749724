// Definitions that all kernels share: the launch configuration and the element types.
#pragma once
#include <stdexcept>
#include <string>

#ifdef RLHF_CUDA_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../args.h"

namespace rlhf {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
    uint16_t raw;
};
struct f16 {
    uint16_t raw;
};

// Launch configuration of a kernel. `shared` is the dynamic shared memory per block in bytes; `shared_limit` is the maximum of
// it over all launches of the kernel. CUDA stores one limit per kernel, so every launch sets the same one: if each launch set
// its size, two host threads would overwrite each other's limit, and a launch above the other's size would fail.
struct Launch {
    int64_t blocks;
    int threads;
    size_t shared = 0;
    int cluster = 1;
    size_t shared_limit = 0;
};

}  // namespace cuda
}  // namespace rlhf

#ifdef RLHF_CUDA_EMULATOR
#include "emulated_device.h"
#else
#include "device.cuh"
#endif

namespace rlhf {
namespace cuda {


static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ void from_float(float x, float* out) { *out = x; }

static __device__ __forceinline__ int thread_id() { return int(threadIdx.x); }

}  // namespace cuda
}  // namespace rlhf

// What every kernel starts from: how it is launched, and the types of its elements.
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

// How a kernel is launched; `shared` counts dynamic shared memory of a block in bytes, `shared_limit` the most that any
// launch of this kernel takes: the limit is the kernel's, so threads that set one each would take each other's away.
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

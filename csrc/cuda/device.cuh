// The device-specific parts of the kernels: launches, clusters, conversions.
//
// All code that only a CUDA compiler accepts is in this file, so that the tests can replace it (tests/kernels/cuda_emulator)
// and run the kernels on the host.
#pragma once

namespace rlhf {
namespace cuda {

static inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

static inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
static inline int capability() {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

static inline void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": CUDA error on sm_" + std::to_string(capability()) + ": " +
                             cudaGetErrorString(error));
}

template <class... P>
void launch(const char* op, void (*kernel)(P...), Launch how, void* stream, P... arguments) {
    if (how.blocks == 0) return;
    if (how.blocks > 0x7fffffff) throw std::runtime_error(std::string(op) + ": too many blocks for one launch; split the batch");
    if (how.shared_limit > 48 * 1024) {
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_limit)));
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(how.blocks));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = how.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
    const cudaError_t left = cudaGetLastError();  // also clears the error, which the next call would report otherwise
    check(op, launched != cudaSuccess ? launched : left);
}

// Return the dynamic shared memory of the block.
static __device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// Return the address of a shared-memory variable in block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* peer(T* variable, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(variable), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    return variable;
#endif
}

static __device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

// A cluster barrier in two halves: writes before `arrive` are visible after `wait`. Below sm_90 a cluster is one block.
static __device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

static __device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Return 2^x to 2 ulp, in one instruction.
static __device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.raw) << 16); }
static __device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.raw)); }
static __device__ __forceinline__ void from_float(float x, bf16* out) { out->raw = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
static __device__ __forceinline__ void from_float(float x, f16* out) { out->raw = __half_as_ushort(__float2half_rn(x)); }

static __device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
static __device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// Return two numbers in four bytes, `a` in the low half.
static __device__ __forceinline__ uint32_t pair(float a, float b, bf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return uint32_t(__bfloat16_as_ushort(v.y)) << 16 | __bfloat16_as_ushort(v.x);
}
static __device__ __forceinline__ uint32_t pair(float a, float b, f16) {
    const __half2 v = __floats2half2_rn(a, b);
    return uint32_t(__half_as_ushort(__high2half(v))) << 16 | __half_as_ushort(__low2half(v));
}

// Return the rounded product, which is not fused into a sum, so that two passes see the same number.
static __device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

}  // namespace cuda
}  // namespace rlhf

// The host version of csrc/cuda/device.cuh.
#pragma once
#define RLHF_ISA emulated
#include "cpu/simd.h"

namespace rlhf {
namespace cuda {

extern int emulated_capability;

static inline int multiprocessors() { return 2; }
static inline int capability() { return emulated_capability; }

template <class... P>
void launch(const char*, void (*kernel)(P...), Launch how, void*, P... arguments) {
    emulator::run(how.blocks, how.threads, how.shared, how.cluster, [&] { kernel(arguments...); });
}

static inline unsigned char* shared_memory() { return emulator::running->block->shared.data(); }
static inline int cluster_rank() { return int(emulator::running->block - emulator::cluster->blocks.data()); }

template <class T>
T* peer(T* variable, int rank) {
    const auto offset = reinterpret_cast<unsigned char*>(variable) - shared_memory();
    auto& memory = emulator::cluster->blocks.at(size_t(rank)).shared;
    if (offset < 0 || size_t(offset) + sizeof(T) > memory.size()) {
        throw std::runtime_error("emulated kernel: the variable passed to `peer` is not in shared memory");
    }
    return reinterpret_cast<T*>(memory.data() + offset);
}

static inline void cluster_arrive() { emulator::running->cluster_generation = emulator::cluster->barrier.arrive(); }
static inline void cluster_wait() { emulator::wait(emulator::cluster->barrier, emulator::running->cluster_generation); }

static inline float fast_exp2(float x) { return exp2f(x); }

static inline float to_float(bf16 x) { return emulated::to_float(emulated::bf16{x.raw}); }
static inline float to_float(f16 x) { return emulated::to_float(emulated::f16{x.raw}); }
static inline void from_float(float x, bf16* out) {
    emulated::bf16 y;
    emulated::from_float(x, &y);
    out->raw = y.raw;
}
static inline void from_float(float x, f16* out) {
    emulated::f16 y;
    emulated::from_float(x, &y);
    out->raw = y.raw;
}

static inline float as_float(uint32_t bits) { return emulated::bits<float>(bits); }
static inline uint32_t as_bits(float x) { return emulated::bits<uint32_t>(x); }

template <class T>
uint32_t pair(float a, float b, T) {
    T low, high;
    from_float(a, &low);
    from_float(b, &high);
    return uint32_t(high.raw) << 16 | low.raw;
}

static inline float rounded_product(float a, float b) { return a * b; }

}  // namespace cuda
}  // namespace rlhf

// An emulator of CUDA C++ on the host. Every thread of a block is a fiber; the blocks of a cluster run together, and clusters
// run one after the other. The emulator is slow; it checks what a kernel computes, and tries a few of the possible orders of
// threads. It is built with -fsanitize=alignment, so a misaligned 16-byte access, which fails on a device, ends the process.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
template <class T>
static inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
static inline T min(T a, T b) { return b < a ? b : a; }

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024, kCanary = 64;

extern unsigned long progress;  // number of events; a round of all fibers without an event is a deadlock

struct Barrier {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
    void open_if_full() {
        if (expected == 0 || arrived < expected) return;
        arrived = 0;
        generation++;
        progress++;
    }
    unsigned arrive() {
        const unsigned before = generation;
        arrived++;
        open_if_full();
        return before;
    }
    void leave() {
        expected--;
        open_if_full();
    }
};

struct Warp {
    Barrier barrier;
    unsigned char slots[kWarp][16];
};

struct Block {
    dim3 index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
};

struct Fiber {
    Block* block;
    dim3 thread;
    unsigned cluster_generation = 0;
    bool started = false, done = false;
    std::unique_ptr<unsigned char[]> stack;
    ucontext_t start;
    jmp_buf place;
    Warp& warp() { return block->warps[thread.x / kWarp]; }
};

struct Cluster {
    std::vector<Block> blocks;
    Barrier barrier;
};

extern Fiber* running;
extern Cluster* cluster;
extern dim3 grid_size, block_size;

void yield();
void run(int64_t blocks, int threads, size_t shared, int cluster_size, const std::function<void()>& kernel);

inline void wait(Barrier& b, unsigned generation) {
    while (b.generation == generation) yield();
}
inline void meet(Barrier& b) { wait(b, b.arrive()); }

template <class T>
T exchange(unsigned lanes, T value, int source) {
    static_assert(sizeof(T) <= 16, "fits a slot");
    if (lanes != 0xffffffffu) throw std::runtime_error("emulated shuffle: the mask must be 0xffffffff");
    Warp& w = running->warp();
    memcpy(w.slots[running->thread.x % kWarp], &value, sizeof value);
    meet(w.barrier);
    if (source >= 0 && source < kWarp) memcpy(&value, w.slots[source], sizeof value);
    meet(w.barrier);
    return value;
}

}  // namespace emulator

#define threadIdx (emulator::running->thread)
#define blockIdx (emulator::running->block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

static inline void __syncthreads() { emulator::meet(emulator::running->block->barrier); }

template <class T>
T __shfl_sync(unsigned lanes, T v, int lane) { return emulator::exchange(lanes, v, lane); }
template <class T>
T __shfl_down_sync(unsigned lanes, T v, int d) { return emulator::exchange(lanes, v, int(threadIdx.x % 32) + d); }
template <class T>
T __shfl_xor_sync(unsigned lanes, T v, int d) { return emulator::exchange(lanes, v, int(threadIdx.x % 32) ^ d); }

// The emulator's scheduler, and the module that the tests load in place of rlhf_kernels._C.
#include "emulator.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "bindings.h"
#include "cuda/bindings.h"

namespace emulator {

unsigned long progress = 0;
Fiber* running = nullptr;
Cluster* cluster = nullptr;
dim3 grid_size, block_size;
int largest_cluster = 0;

namespace {

jmp_buf scheduler;
ucontext_t outside;
const std::function<void()>* body = nullptr;
std::exception_ptr failure;
std::vector<std::unique_ptr<unsigned char[]>> free_stacks;  // of finished fibers: page faults on new stacks are slow

std::unique_ptr<unsigned char[]> new_stack() {
    if (free_stacks.empty()) return std::unique_ptr<unsigned char[]>(new unsigned char[kStack]);
    auto stack = std::move(free_stacks.back());
    free_stacks.pop_back();
    return stack;
}

void enter() {
    try {
        (*body)();
    } catch (const std::exception&) {
        failure = std::current_exception();
    }
    Fiber& self = *running;
    self.done = true;
    progress++;
    self.warp().barrier.leave();
    self.block->barrier.leave();
    cluster->barrier.leave();
    if (self.block->barrier.expected == 0) {  // the block has exited: later reads of its memory by other blocks give NaN
        std::fill(self.block->shared.begin(), self.block->shared.end() - kCanary, 0xff);
    }
    _longjmp(scheduler, 1);
}

void resume(Fiber& f) {
    running = &f;
    if (_setjmp(scheduler)) return;
    if (f.started) _longjmp(f.place, 1);
    f.started = true;
    getcontext(&f.start);
    f.stack = new_stack();
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
    swapcontext(&outside, &f.start);
}

// Run each fiber of [begin, end) until it waits, except for the warp `without`; return how many of them are not done.
size_t round(std::vector<Fiber>& fibers, size_t begin, size_t end, size_t without) {
    size_t left = 0;
    for (size_t i = begin; i < end; i++) {
        if (fibers[i].done || i / kWarp == without) continue;
        resume(fibers[i]);
        left += !fibers[i].done;
    }
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    return left;
}

// Hold back one warp until all others wait for it, then choose the next warp pseudo-randomly. If a kernel lacks a barrier, the
// accesses that it would order then happen in the wrong order, and the results show it.
void run_cluster(std::vector<Fiber>& fibers) {
    const size_t warps = fibers.size() / kWarp;
    for (uint32_t draw = 1;;) {
        const size_t slow = (draw >> 16) % warps;
        draw = draw * 1664525 + 1013904223;
        const unsigned long start = progress;
        unsigned long before;
        size_t left;
        do {
            before = progress;
            left = round(fibers, 0, fibers.size(), slow);
        } while (left && progress != before);
        do {
            before = progress;
            left = round(fibers, slow * kWarp, (slow + 1) * kWarp, warps);
        } while (left && progress != before);
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; })) return;
        if (progress == start) throw std::runtime_error("emulated kernel: threads wait at different barriers");
    }
}

}  // namespace

void yield() {
    if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

void run(int64_t blocks, int threads, size_t shared, int cluster_size, const std::function<void()>& kernel) {
    if (threads % kWarp || blocks % cluster_size) {
        throw std::runtime_error("emulated launch: threads must fill whole warps, and blocks whole clusters");
    }
    body = &kernel;
    largest_cluster = max(largest_cluster, cluster_size);
    grid_size.x = unsigned(blocks);
    block_size.x = unsigned(threads);
    for (int64_t first = 0; first < blocks; first += cluster_size) {
        Cluster group;
        cluster = &group;
        group.barrier.expected = cluster_size * threads;
        group.blocks.resize(size_t(cluster_size));
        std::vector<Fiber> fibers(size_t(cluster_size) * threads);
        for (int rank = 0; rank < cluster_size; rank++) {
            Block& b = group.blocks[size_t(rank)];
            b.index.x = unsigned(first + rank);
            b.barrier.expected = threads;
            b.warps.resize(size_t(threads) / kWarp);
            for (Warp& w : b.warps) w.barrier.expected = kWarp;
            b.shared.assign(shared + kCanary, 0xff);  // NaN, so that a read before the first write shows in the results
            for (int t = 0; t < threads; t++) {
                Fiber& f = fibers[size_t(rank) * threads + t];
                f.block = &b;
                f.thread.x = unsigned(t);
            }
        }
        run_cluster(fibers);
        for (Fiber& f : fibers) free_stacks.push_back(std::move(f.stack));
        for (const Block& b : group.blocks) {
            for (size_t i = 0; i < kCanary; i++) {
                if (b.shared[shared + i] != 0xff) {
                    throw std::runtime_error("emulated kernel: it wrote past the end of its shared memory");
                }
            }
        }
    }
}

}  // namespace emulator

namespace rlhf {
namespace cuda {
int emulated_capability = 90;
}
}  // namespace rlhf

PYBIND11_MODULE(_cuda_emulated, m) {
    rlhf::bind_arguments(m);
    rlhf::cuda::bind(m);
    m.def("cuda_architectures", [] { return pybind11::list(); });
    m.def("largest_cluster", [] { return std::exchange(emulator::largest_cluster, 0); });  // since the last call
    m.def("set_capability", [](int value) { rlhf::cuda::emulated_capability = value; });
}

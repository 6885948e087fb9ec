// Enough of CUDA C++ to compile the kernels with a host compiler and run them, block after block, on the CPU.
//
// Two ways to run the threads of a block. Fibers (the default) take turns on one thread: fast, deterministic, and they
// notice a barrier that some threads never reach. With -DHOST_THREADS every CUDA thread is a real one, for sanitizers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef HOST_THREADS
#include <barrier>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

using std::max;
using std::min;

struct Index {
    unsigned x = 0, y = 0;
};
#ifdef HOST_THREADS
#define HOST_PER_THREAD thread_local
#else
#define HOST_PER_THREAD
#endif
inline HOST_PER_THREAD Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

namespace host {

constexpr unsigned WARP = 32;

inline unsigned long long loads = 0;  // for tests that count

#ifdef HOST_THREADS

class Barrier {
public:
    explicit Barrier(unsigned count) : barrier(count) {}
    void wait() { barrier.arrive_and_wait(); }

private:
    std::barrier<> barrier;
};

#else

// The fibers of one block, and the one that runs.
struct Fibers {
    static constexpr std::size_t STACK = 1 << 16;
    std::vector<ucontext_t> contexts;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<bool> finished;
    ucontext_t scheduler;
    unsigned running = 0;
    bool progress = false;  // a barrier opened or a fiber finished in this round
    void (*body)(void*) = nullptr;
    void* argument = nullptr;

    void yield() { swapcontext(&contexts[running], &scheduler); }

    static void enter();
    void run(unsigned count);
};
inline Fibers fibers;

inline void Fibers::enter() {
    fibers.body(fibers.argument);
    fibers.finished[fibers.running] = fibers.progress = true;
}

inline void Fibers::run(unsigned count) {
    contexts.resize(count);
    finished.assign(count, false);
    while (stacks.size() < count) stacks.push_back(std::make_unique<char[]>(STACK));
    for (unsigned i = 0; i < count; ++i) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks[i].get();
        contexts[i].uc_stack.ss_size = STACK;
        contexts[i].uc_link = &scheduler;
        makecontext(&contexts[i], &Fibers::enter, 0);
    }
    while (std::find(finished.begin(), finished.end(), false) != finished.end()) {
        progress = false;
        for (running = 0; running < count; ++running) {
            if (finished[running]) continue;
            threadIdx.x = running;
            swapcontext(&scheduler, &contexts[running]);
        }
        if (!progress) throw std::runtime_error("divergent barrier: some threads wait where others never arrive");
    }
}

class Barrier {
public:
    explicit Barrier(unsigned count) : count(count) {}
    void wait() {
        const unsigned long mine = generation;
        if (++arrived == count) {
            arrived = 0;
            ++generation;
            fibers.progress = true;
            return;
        }
        while (generation == mine) fibers.yield();
    }

private:
    unsigned count, arrived = 0;
    unsigned long generation = 0;
};

#endif

struct Warp {
    Barrier barrier{WARP};
    unsigned slot[WARP];
};

struct Block {
    explicit Block(unsigned threads) : barrier(threads) {
        for (unsigned i = 0; i < threads / WARP; ++i) warps.push_back(std::make_unique<Warp>());
    }
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
};
inline Block* block = nullptr;

// What every lane of the caller's warp passes in.
inline void exchange(unsigned value, unsigned (&all)[WARP]) {
    Warp& warp = *block->warps[threadIdx.x / WARP];
    warp.slot[threadIdx.x % WARP] = value;
    warp.barrier.wait();
    std::memcpy(all, warp.slot, sizeof all);
    warp.barrier.wait();
}

// Run `body` for every thread of every block; blocks run one after another.
template <class Body>
void run_grid(unsigned threads, Body body) {
    auto for_each_block = [](auto&& visit) {
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; ++x) visit(Index{x, y});
    };
#ifdef HOST_THREADS
    Block all(threads);
    block = &all;
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < threads; ++i)
        workers.emplace_back([=] {
            threadIdx.x = i;
            for_each_block([&](Index here) {
                blockIdx = here;
                body();
                block->barrier.wait();
            });
        });
    for (std::thread& worker : workers) worker.join();
#else
    fibers.body = [](void* argument) { (*static_cast<Body*>(argument))(); };
    fibers.argument = &body;
    for_each_block([&](Index here) {
        Block current(threads);
        block = &current;
        blockIdx = here;
        fibers.run(threads);
    });
#endif
}

// Launch as the CUDA driver does: a list of addresses, each of an argument of the stated size.
template <class... Parameters, std::size_t... I>
void launch(void (*kernel)(Parameters...), Index grid, unsigned threads, void** arguments, const int* bytes, int count,
            std::index_sequence<I...>) {
    if (count != sizeof...(Parameters))
        throw std::runtime_error("the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments, got " +
                                 std::to_string(count));
    const int expected[] = {static_cast<int>(sizeof(Parameters))...};
    for (int i = 0; i < count; ++i)
        if (bytes[i] != expected[i])
            throw std::runtime_error("argument " + std::to_string(i) + " has " + std::to_string(bytes[i]) +
                                     " bytes, the kernel takes " + std::to_string(expected[i]));
    if (threads % WARP) throw std::runtime_error("a block must be whole warps");
    gridDim = grid;
    blockDim = {threads, 1};
    run_grid(threads, [=] { kernel(*static_cast<Parameters*>(arguments[I])...); });
}

// nullptr, or what went wrong.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), unsigned grid_x, unsigned grid_y, unsigned threads, void** arguments,
                   const int* bytes, int count) {
    static std::string problem;
    try {
        launch(kernel, {grid_x, grid_y}, threads, arguments, bytes, count,
               std::index_sequence_for<Parameters...>{});
        return nullptr;
    } catch (const std::exception& error) {
        problem = error.what();
        return problem.c_str();
    }
}

}  // namespace host

inline void __syncthreads() { host::block->barrier.wait(); }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __shfl_down_sync(unsigned, float value, unsigned step) {
    unsigned all[host::WARP];
    host::exchange(__float_as_uint(value), all);
    const unsigned from = threadIdx.x % host::WARP + step;
    return from < host::WARP ? __uint_as_float(all[from]) : value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned all[host::WARP], votes = 0;
    host::exchange(vote, all);
    for (unsigned lane = 0; lane < host::WARP; ++lane) votes |= all[lane] << lane;
    return votes;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// IEEE binary16, which not every host compiler knows.
inline float half_to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.f : 1.f);
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline unsigned short float_to_half(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
    const float size = std::fabs(value);
    if (size != size) return 0x7fff;
    if (size >= 65520.f) return static_cast<unsigned short>(sign | 0x7c00u);
    // Rounded to a multiple of the last place, ties to even, by the host's own rounding mode.
    const int exponent = size < 6.103515625e-5f ? -14 : std::ilogb(size);
    const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
    const unsigned bits = static_cast<unsigned>(steps) + (static_cast<unsigned>(exponent + 14) << 10);
    return static_cast<unsigned short>(sign | bits);
}

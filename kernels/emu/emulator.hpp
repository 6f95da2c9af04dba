// Host emulation of the part of CUDA that kernels/*.cuh use, for g++ and clang++.
//
// Is: a launch that runs one block after the other, every thread of a block as a fiber; barriers and warp collectives as rendezvous that
// report divergence and deadlock; the PTX wrappers of portable.cuh. Is not: a model of time, caches, or blocks that run at once.
// * Order of fibers and of blocks: EMULATOR_SCHEDULE = forward | reverse | random:SEED. A missing barrier changes results under some of them; copies
//   in the background are made at once, when they are waited for, or at random.
// * Built with -fsanitize=thread, switching fibers orders nothing and only barriers do, so it finds races as a race checker does.
//   Built with -fsanitize=address, shared arrays have red zones and every access of global memory is checked.
// Shapes: of fragments as in the PTX manual: lane = 4·g + t holds rows g, g + 8 and columns 2t, 2t + 1 (A: also 2t + 8, 2t + 9).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

// A rendezvous releases into token[generation & 1] and acquires from the same one: a fiber that runs ahead to the next rendezvous must not
// lend its order to one that has not resumed from this one.
#if defined(__SANITIZE_THREAD__)
#define EMULATOR_RELEASE(p) __tsan_release(p)
#define EMULATOR_ACQUIRE(p) __tsan_acquire(p)
#define EMULATOR_UNSANITIZED __attribute__((no_sanitize("thread"))) __attribute__((noinline))
#else
#define EMULATOR_RELEASE(p) ((void)(p))
#define EMULATOR_ACQUIRE(p) ((void)(p))
#define EMULATOR_UNSANITIZED
#endif

namespace emulator {

struct Index {
    unsigned x = 1, y = 1, z = 1;
};
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Status : uint8_t { ready, at_barrier, in_warp, done };

/// Where the lanes of a warp meet.
struct Warp {
    uint32_t wanted = 0, arrived = 0, generation = 0;
    const char* operation = nullptr;
    void* operands[32] = {};
    char token[2] = {};
};

struct Block;

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    Status status = Status::ready;
    unsigned thread = 0;
    Index index;
    Block* block = nullptr;
    const char* where = "";
    int vote = 0;
    bool waited_for_earlier = false;
    void* fake_stack = nullptr;
    void* sanitizer = nullptr;
    /// Copies in the background that have not been made yet, (to, from) of 16 bytes each: groups in order, the last one open.
    std::deque<std::vector<std::pair<uint64_t, uint64_t>>> copies = {{}};
};

struct Block {
    Index grid, size, index;
    unsigned char* dynamic_shared = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    const std::function<void()>* body = nullptr;
    void* scheduler_pointer = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    void* scheduler_fake_stack = nullptr;
    void* scheduler_sanitizer = nullptr;
    std::string error;
    unsigned generation = 0;
    int votes_all = 1;
    char token[2] = {}, begin = 0;
};

Fiber& self();
/// Gives way to the scheduler.
void pause();
/// Runs `body` once for every thread of every block. Throws Error on divergence, deadlock or misuse.
void launch(Index grid, Index block, size_t shared_bytes, const std::function<void()>& body);

/// All threads of the block meet; the value is whether every predicate held.
EMULATOR_UNSANITIZED inline int meet_block(const char* where, int predicate) {
    Fiber& fiber = self();
    Block& block = *fiber.block;
    const unsigned parity = block.generation & 1;
    fiber.where = where;
    fiber.vote = predicate;
    fiber.status = Status::at_barrier;
    EMULATOR_RELEASE(&block.token[parity]);
    pause();
    EMULATOR_ACQUIRE(&block.token[parity]);
    return block.votes_all;
}

/// The lanes of `mask` bring their operands; the last to come runs `act` on those of all.
template <class Act>
EMULATOR_UNSANITIZED void meet_warp(uint32_t mask, const char* operation, void* operands, Act act) {
    Fiber& fiber = self();
    Block& block = *fiber.block;
    Warp& warp = block.warps[fiber.thread / 32];
    const unsigned lane = fiber.thread % 32, parity = warp.generation & 1;
    if (!(mask >> lane & 1)) throw Error(std::string(operation) + ": a lane is not in its own mask");
    if (warp.arrived == 0) {
        warp.wanted = mask;
        warp.operation = operation;
    } else if (warp.wanted != mask || std::strcmp(warp.operation, operation) != 0) {
        throw Error(std::string("warp divergence: ") + warp.operation + " met " + operation);
    }
    warp.operands[lane] = operands;
    warp.arrived |= 1u << lane;
    fiber.where = operation;
    EMULATOR_RELEASE(&warp.token[parity]);
    if (warp.arrived != warp.wanted) {
        fiber.status = Status::in_warp;
        pause();
        EMULATOR_ACQUIRE(&warp.token[parity]);
        return;
    }
    EMULATOR_ACQUIRE(&warp.token[parity]);
    act(warp.operands);
    EMULATOR_RELEASE(&warp.token[parity]);
    warp.arrived = 0;
    ++warp.generation;
    for (unsigned other = 0; other < 32; ++other) {
        if (!(mask >> other & 1)) continue;
        Fiber& peer = block.fibers[fiber.thread / 32 * 32 + other];
        if (peer.status == Status::in_warp) peer.status = Status::ready;
    }
}

constexpr uint32_t all_lanes = 0xffffffffu;

template <class T>
T shuffle_xor(uint32_t mask, T value, int distance) {
    struct Operands {
        T in, out;
        int distance;
    } mine{value, value, distance};
    meet_warp(mask, "shfl.xor", &mine, [mask](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            auto& me = *static_cast<Operands*>(all[lane]);
            const int source = lane ^ me.distance;
            if (source > 31 || !(mask >> source & 1)) throw Error("shfl.xor reads a lane outside the mask");
            me.out = static_cast<Operands*>(all[source])->in;
        }
    });
    return mine.out;
}

template <class T>
T shuffle_from(uint32_t mask, T value, int source) {
    struct Operands {
        T in, out;
        int source;
    } mine{value, value, source};
    meet_warp(mask, "shfl.idx", &mine, [mask](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            auto& me = *static_cast<Operands*>(all[lane]);
            if (!(mask >> me.source & 1)) throw Error("shfl.idx reads a lane outside the mask");
            me.out = static_cast<Operands*>(all[me.source])->in;
        }
    });
    return mine.out;
}

float float_of_half(uint16_t bits);
uint16_t half_of_float(float value);
inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

/// D[16 × 8] += A[16 × 16]·B[16 × 8], f16 in, f32 sums.
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
/// The same of bf16.
void multiply_bfloats(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
/// D[16 × 8] += A[16 × 32]·B[32 × 8] of signed bytes.
void multiply_bytes(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
/// Transposes an 8 × 8 matrix of 16-bit elements that is spread over the warp.
uint32_t transpose_fragment(uint32_t pair);
/// Four 8 × 8 matrices of 16-bit elements, of whose rows each lane knows the place of one.
void load_matrices(uint32_t (&matrices)[4], uint64_t row, bool transposed);

/// Sixteen bytes that arrive at any time until their group is waited for: at once (forward), at the end (reverse), either (random).
void copy_in_background(uint64_t to, uint64_t from);
void commit_copies();
void wait_for_copies(size_t pending);

/// Set while launches may begin before those in front of them are done. Here they never do, but a thread of such a launch that ends without having
/// waited is an error: launches behind it would wait too little.
extern bool launches_begin_early;
inline void wait_for_earlier_launches() { self().waited_for_earlier = true; }

}  // namespace emulator

#define EMULATOR_TEXT_(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_(x)
#define threadIdx (emulator::self().index)
#define blockIdx (emulator::self().block->index)
#define blockDim (emulator::self().block->size)
#define gridDim (emulator::self().block->grid)
#define __syncthreads() ((void)emulator::meet_block(__FILE__ ":" EMULATOR_TEXT(__LINE__), 1))
#define __syncthreads_and(predicate) emulator::meet_block(__FILE__ ":" EMULATOR_TEXT(__LINE__), (predicate) != 0)

inline void __syncwarp(uint32_t mask = emulator::all_lanes) {
    emulator::meet_warp(mask, "syncwarp", nullptr, [](void**) {});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    return emulator::shuffle_xor(mask, value, distance);
}
/// Of lane `source` of the `width` lanes that this one is among.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    return emulator::shuffle_from(mask, value, static_cast<int>(emulator::self().thread % 32) / width * width + source % width);
}
inline int __any_sync(uint32_t mask, int predicate) {
    struct Operands {
        int in, out;
    } mine{predicate, 0};
    emulator::meet_warp(mask, "vote.any", &mine, [mask](void** all) {
        int any = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) any |= static_cast<Operands*>(all[lane])->in != 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) static_cast<Operands*>(all[lane])->out = any;
    });
    return mine.out;
}

// Compiled with -ffp-contract=off, plain operators round once each.
using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __uint_as_float(uint32_t bits) { return emulator::float_of_bits(bits); }
inline uint32_t __float_as_uint(float value) { return emulator::bits_of_float(value); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* address, unsigned value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
inline int atomicMin(int* address, int value) {
    int found = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < found && !__atomic_compare_exchange_n(address, &found, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return found;
}
inline int atomicMax(int* address, int value) {
    int found = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value > found && !__atomic_compare_exchange_n(address, &found, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return found;
}

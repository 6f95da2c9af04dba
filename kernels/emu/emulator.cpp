// The scheduler of the emulator, its context switch and its fragments. See emulator.hpp.
#include "emulator.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber(void);
}
#endif
#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

// System V: saves the callee-saved registers on the old stack, restores them from the new one.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emulator_switch,.-emulator_switch
)");

namespace emulator {

namespace {
constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;
thread_local Fiber* current = nullptr;

EMULATOR_UNSANITIZED void leave(bool dying) {
    Fiber& fiber = *current;
    Block& block = *fiber.block;
    (void)dying;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(dying ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(block.scheduler_sanitizer, 0);  // the scheduler may see everything
#endif
    emulator_switch(&fiber.stack_pointer, block.scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_size);
#endif
}

EMULATOR_UNSANITIZED void resume(Fiber& fiber) {
    Block& block = *fiber.block;
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.sanitizer, 1);  // 1: fibers learn nothing from the switch
#endif
    emulator_switch(&block.scheduler_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
}

void run_body() {
    Fiber& fiber = self();
    Block& block = *fiber.block;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
    try {
        (*block.body)();
        if (launches_begin_early && !fiber.waited_for_earlier) throw Error("ends without waiting for earlier launches");
    } catch (const std::exception& error) {
        if (block.error.empty()) {
            const Index b = block.index;
            block.error = "block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + " thread " +
                          std::to_string(fiber.thread) + ": " + error.what();
        }
    }
}

EMULATOR_UNSANITIZED void enter() {
    EMULATOR_ACQUIRE(&current->block->begin);  // all earlier blocks are done
    run_body();
    current->status = Status::done;
    leave(true);
    __builtin_trap();
}

char* new_stack() {
    void* memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for a fiber's stack");
    mprotect(memory, guard_bytes, PROT_NONE);
    return static_cast<char*>(memory) + guard_bytes;
}

/// Fibers of a block, each about to enter. Stacks are kept for later blocks.
EMULATOR_UNSANITIZED void prepare(Block& block) {
    static thread_local std::vector<char*> stacks;
    static thread_local std::vector<void*> sanitizers;
    (void)sanitizers;
    const unsigned count = block.size.x * block.size.y * block.size.z;
    block.fibers.assign(count, Fiber{});
    block.warps.assign((count + 31) / 32, Warp{});
#if defined(__SANITIZE_THREAD__)
    block.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    for (unsigned thread = 0; thread < count; ++thread) {
        if (stacks.size() <= thread) stacks.push_back(new_stack());
        Fiber& fiber = block.fibers[thread];
        fiber.thread = thread;
        fiber.block = &block;
        fiber.index = {thread % block.size.x, thread / block.size.x % block.size.y, thread / (block.size.x * block.size.y)};
        fiber.stack = stacks[thread];
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack, stack_bytes);  // red zones of the fiber that died here before
#endif
        void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(enter);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        fiber.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
        if (sanitizers.size() <= thread) sanitizers.push_back(__tsan_create_fiber(0));
        fiber.sanitizer = sanitizers[thread];
#endif
    }
}

/// Opens the barrier if all live fibers stand at the same one; otherwise says what is wrong.
EMULATOR_UNSANITIZED std::string open_barrier(Block& block, unsigned live) {
    unsigned waiting = 0;
    const char* where = nullptr;
    std::string stuck;
    block.votes_all = 1;
    for (Fiber& fiber : block.fibers) {
        if (fiber.status == Status::done) continue;
        if (stuck.size() < 300) stuck += " " + std::to_string(fiber.thread) + "@" + fiber.where;
        if (fiber.status != Status::at_barrier) continue;
        if (where && std::strcmp(where, fiber.where) != 0) return std::string("barrier divergence: ") + where + " and " + fiber.where;
        where = fiber.where;
        block.votes_all &= fiber.vote;
        ++waiting;
    }
    if (waiting != live) return "deadlock:" + stuck;
    // Threads that have returned count as arrived on hardware, but a kernel that relies on it is not portable.
    if (live != block.fibers.size()) return "barrier after some threads returned:" + stuck;
    for (Fiber& fiber : block.fibers) fiber.status = Status::ready;
    ++block.generation;
    return {};
}

EMULATOR_UNSANITIZED void run_block(Block& block, std::vector<unsigned>& order, std::mt19937* random) {
    prepare(block);
    EMULATOR_RELEASE(&block.begin);
    unsigned live = block.fibers.size();
    while (live && block.error.empty()) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        bool progress = false;
        for (unsigned thread : order) {
            Fiber& fiber = block.fibers[thread];
            if (fiber.status != Status::ready) continue;
            progress = true;
            resume(fiber);
            live -= fiber.status == Status::done;
            if (!block.error.empty()) break;
        }
        if (!progress) block.error = open_barrier(block, live);
    }
    if (!block.error.empty()) throw Error(block.error);
}
/// When copies in the background are made.
enum class Copies { at_once, late, either } copies = Copies::at_once;
}  // namespace

bool launches_begin_early = false;
Fiber& self() { return *current; }
void pause() { leave(false); }

void launch(Index grid, Index block_size, size_t shared_bytes, const std::function<void()>& body) {
    // Shared arrays are static: one launch at a time.
    static std::mutex one_launch;
    std::lock_guard<std::mutex> lock(one_launch);
    const char* variable = std::getenv("EMULATOR_SCHEDULE");
    const std::string schedule = variable ? variable : "forward";
    std::vector<unsigned> order(block_size.x * block_size.y * block_size.z);
    std::iota(order.begin(), order.end(), 0u);
    copies = schedule == "reverse" ? Copies::late : schedule == "forward" ? Copies::at_once : Copies::either;
    if (schedule == "reverse") std::reverse(order.begin(), order.end());
    std::unique_ptr<std::mt19937> random;
    if (schedule.rfind("random:", 0) == 0) random = std::make_unique<std::mt19937>(std::stoul(schedule.substr(7)));
    const size_t rounded = (shared_bytes + 127) / 128 * 128 + 128;
    std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (schedule == "reverse") std::reverse(blocks.begin(), blocks.end());
    if (random) std::shuffle(blocks.begin(), blocks.end(), *random);
    for (const unsigned index : blocks) {
        std::unique_ptr<unsigned char, void (*)(void*)> shared(static_cast<unsigned char*>(std::aligned_alloc(128, rounded)), std::free);
        std::memset(shared.get(), 0xff, rounded);  // NaNs: what nobody wrote is seen
        Block block;
        block.grid = grid;
        block.size = block_size;
        block.index = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
        block.dynamic_shared = shared.get();
        block.body = &body;
        run_block(block, order, random.get());
    }
}

float float_of_half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t half_of_float(float value) {
    const uint32_t bits = bits_of_float(value), size = bits & 0x7fffffffu;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (size > 0x7f800000u) return 0x7fff;
    if (size >= 0x477ff000u) return sign | 0x7c00;
    if (size < 0x38800000u) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
    return sign | static_cast<uint16_t>((size + 0xfff + (size >> 13 & 1) - 0x38000000u) >> 13);
}

namespace {
/// D += A·B of 16-bit elements, by what each of their 65536 values is.
void multiply_by(const char* operation, const std::vector<float>& widened, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        float* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    meet_warp(all_lanes, operation, &mine, [&widened](void** all) {
        float A[16][16], B[8][16];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& from = *static_cast<Operands*>(all[lane]);
            const int g = lane >> 2, t = (lane & 3) * 2;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) A[g + (i & 1) * 8][t + (i >> 1) * 8 + half] = widened[from.a[i] >> 16 * half & 0xffff];
                for (int i = 0; i < 2; ++i) B[g][t + i * 8 + half] = widened[from.b[i] >> 16 * half & 0xffff];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& to = *static_cast<Operands*>(all[lane]);
            const int g = lane >> 2, t = (lane & 3) * 2;
            for (int i = 0; i < 4; ++i) {
                double sum = to.d[i];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[g + (i >> 1) * 8][k]) * B[t + (i & 1)][k];
                to.d[i] = static_cast<float>(sum);
            }
        }
    });
}
template <class Widen>
std::vector<float> table_of(Widen widen) {
    std::vector<float> table(65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) table[bits] = widen(bits);
    return table;
}
}  // namespace

void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static const std::vector<float> widened = table_of([](uint32_t bits) { return float_of_half(bits); });
    multiply_by("mma.m16n8k16", widened, d, a, b);
}

void multiply_bfloats(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static const std::vector<float> widened = table_of([](uint32_t bits) { return float_of_bits(bits << 16); });
    multiply_by("mma.m16n8k16.bf16", widened, d, a, b);
}

void multiply_bytes(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        int32_t* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    meet_warp(all_lanes, "mma.m16n8k32", &mine, [](void** all) {
        int8_t A[16][32], B[8][32];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& from = *static_cast<Operands*>(all[lane]);
            const int g = lane >> 2, t = (lane & 3) * 4;
            for (int byte = 0; byte < 4; ++byte) {
                for (int i = 0; i < 4; ++i) A[g + (i & 1) * 8][t + (i >> 1) * 16 + byte] = static_cast<int8_t>(from.a[i] >> 8 * byte);
                for (int i = 0; i < 2; ++i) B[g][t + i * 16 + byte] = static_cast<int8_t>(from.b[i] >> 8 * byte);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& to = *static_cast<Operands*>(all[lane]);
            const int g = lane >> 2, t = (lane & 3) * 2;
            for (int i = 0; i < 4; ++i) {
                for (int k = 0; k < 32; ++k) to.d[i] += A[g + (i >> 1) * 8][k] * B[t + (i & 1)][k];
            }
        }
    });
}

namespace {
void make(const std::pair<uint64_t, uint64_t>& copy) {
    std::memcpy(reinterpret_cast<void*>(copy.first), reinterpret_cast<const void*>(copy.second), 16);
}
}  // namespace

void copy_in_background(uint64_t to, uint64_t from) {
    if (to % 16 || from % 16) throw Error("cp.async: misaligned");
    const bool late = copies == Copies::late || (copies == Copies::either && (to / 16 * 2654435761u >> 7 & 1));
    if (late) self().copies.back().emplace_back(to, from);
    else make({to, from});
}
void commit_copies() { self().copies.emplace_back(); }
void wait_for_copies(size_t pending) {
    auto& groups = self().copies;
    for (; groups.size() > pending + 1; groups.pop_front()) std::for_each(groups.front().begin(), groups.front().end(), make);
}

uint32_t transpose_fragment(uint32_t pair) {
    struct Operands {
        uint32_t in, out;
    } mine{pair, 0};
    meet_warp(all_lanes, "movmatrix", &mine, [](void** all) {
        uint16_t matrix[8][8];
        for (int lane = 0; lane < 32; ++lane)
            for (int half = 0; half < 2; ++half)
                matrix[lane >> 2][(lane & 3) * 2 + half] = static_cast<Operands*>(all[lane])->in >> 16 * half;
        for (int lane = 0; lane < 32; ++lane) {
            const int column = lane >> 2, row = (lane & 3) * 2;
            static_cast<Operands*>(all[lane])->out = matrix[row][column] | static_cast<uint32_t>(matrix[row + 1][column]) << 16;
        }
    });
    return mine.out;
}

void load_matrices(uint32_t (&matrices)[4], uint64_t row, bool transposed) {
    if (row % 16) throw Error("ldmatrix: a row does not begin at a multiple of 16 bytes");
    struct Operands {
        uint64_t row;
        uint32_t* out;
        bool transposed;
    } mine{row, matrices, transposed};
    meet_warp(all_lanes, "ldmatrix", &mine, [](void** all) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t elements[8][8];
            for (int r = 0; r < 8; ++r) std::memcpy(elements[r], reinterpret_cast<const void*>(static_cast<Operands*>(all[8 * matrix + r])->row), 16);
            for (int lane = 0; lane < 32; ++lane) {
                const auto& to = *static_cast<Operands*>(all[lane]);
                const int g = lane >> 2, t = (lane & 3) * 2;
                const uint16_t low = to.transposed ? elements[t][g] : elements[g][t], high = to.transposed ? elements[t + 1][g] : elements[g][t + 1];
                to.out[matrix] = low | static_cast<uint32_t>(high) << 16;
            }
        }
    });
}

}  // namespace emulator

// The one place where a kernel file learns whether NVRTC or g++ (with the emulator, -DKERNEL_EMU) compiles it.
//
// Is: fixed-width types, conversions, and a wrapper for every instruction that C++ has no word for. Is not: anything of the codec.
// No header of the toolkit or the system is needed under NVRTC, so any NVRTC compiles these files from memory.
// Fragments of m16n8k16: lane = 4·g + t; A: rows g, g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; B: rows as A's columns, column g;
// D: rows g, g + 8, columns 2t, 2t + 1.
#pragma once
#if defined(KERNEL_EMU)
#include "emu/emulator.hpp"
#endif

namespace skvq {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// clang-format off
struct alignas(8) U32x2 { u32 x, y; };
struct alignas(16) U32x4 { u32 x, y, z, w; };
// clang-format on

/// Element types of the model.
struct Half {
    u16 bits;
};
struct BFloat {
    u16 bits;
};

constexpr float log2_e = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

#if defined(KERNEL_EMU)
__device__ __forceinline__ float float_of_half(u16 bits) { return emulator::float_of_half(bits); }
__device__ __forceinline__ u16 half_of_float(float value) { return emulator::half_of_float(value); }
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 pick = selector >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 255;
        result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    const float low = float_of_half(a & 0xffff) + float_of_half(b & 0xffff), high = float_of_half(a >> 16) + float_of_half(b >> 16);
    return half_of_float(low) | static_cast<u32>(half_of_float(high)) << 16;
}
/// a·b + c, rounded once, as c is 0 where the result is not exact.
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float product = float_of_half(a >> shift & 0xffff) * float_of_half(b >> shift & 0xffff);
        result |= static_cast<u32>(half_of_float(product + float_of_half(c >> shift & 0xffff))) << shift;
    }
    return result;
}
__device__ __forceinline__ u32 keep_in_register(u32 value) { return value; }
__device__ __forceinline__ u64 keep_address(u64 address) { return address; }
__device__ __forceinline__ int block_x_here() { return blockIdx.x; }
__device__ __forceinline__ int block_y_here() { return blockIdx.y; }
__device__ __forceinline__ int block_z_here() { return blockIdx.z; }
__device__ __forceinline__ int thread_here() { return threadIdx.x; }
__device__ __forceinline__ void widen_halves(u32 pair, float& low, float& high) {
    low = float_of_half(pair & 0xffff), high = float_of_half(pair >> 16);
}
__device__ __forceinline__ u32 narrow_to_halves(float low, float high) {
    return half_of_float(low) | static_cast<u32>(half_of_float(high)) << 16;
}
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::multiply_fragments(d, a, b);
}
__device__ __forceinline__ void multiply_bfloats(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::multiply_bfloats(d, a, b); }
__device__ __forceinline__ void multiply_bytes(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::multiply_bytes(d, a, b); }
__device__ __forceinline__ u32 narrow_to_bfloats(float low, float high) {
    auto narrow = [](float value) -> u32 {
        const u32 bits = __float_as_uint(value);
        return is_nan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    };
    return narrow(low) | narrow(high) << 16;
}
__device__ __forceinline__ float exp2_fast(float x) { return exp2f(x); }
__device__ __forceinline__ float reciprocal_fast(float x) { return 1.0f / x; }
__device__ __forceinline__ u32 transpose_fragment(u32 pair) { return emulator::transpose_fragment(pair); }
template <class T>
__device__ __forceinline__ T load_here(const T* from) {
    if (reinterpret_cast<u64>(from) % alignof(T)) throw emulator::Error("misaligned load");
    return *from;
}
template <class T>
__device__ __forceinline__ T load_streaming(const T* from) {
    return load_here(from);
}
template <int Offset>
__device__ __forceinline__ U32x4 load_table(u64 from) {
    return load_streaming(reinterpret_cast<const U32x4*>(from + Offset));
}
/// A place in shared memory as copies and `load_shared` take it.
using SharedPlace = u64;
__device__ __forceinline__ SharedPlace shared_place(const void* at) { return reinterpret_cast<u64>(at); }
template <int Offset, class T>
__device__ __forceinline__ T load_shared(SharedPlace at) {
    return load_streaming(reinterpret_cast<const T*>(at + Offset));
}
template <int Offset, int FromOffset>
__device__ __forceinline__ void copy_to_shared(SharedPlace to, u64 from) {
    emulator::copy_in_background(to + Offset, from + FromOffset);
}
__device__ __forceinline__ void commit_copies() { emulator::commit_copies(); }
__device__ __forceinline__ void let_next_launch_begin() {}
__device__ __forceinline__ void wait_for_earlier_launches() { emulator::wait_for_earlier_launches(); }
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
    emulator::wait_for_copies(Pending);
}
template <bool Transposed>
__device__ __forceinline__ void load_matrices(u32 (&matrices)[4], SharedPlace row) {
    emulator::load_matrices(matrices, row, Transposed);
}
#define SKVQ_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::self().block->dynamic_shared)
#else
__device__ __forceinline__ float float_of_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ u16 half_of_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
/// PRMT: byte i of the result is the byte of b:a that nibble i of the selector names.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
}
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
/// A value of the whole warp in a register of each lane: byte permutations take no others, and the compiler would copy it anew for each.
__device__ __forceinline__ u32 keep_in_register(u32 value) {
    u32 kept;
    asm volatile(
        "{\n.reg .u32 l, x;\nmov.u32 l, %laneid;\nadd.u32 x, %1, l;\nshfl.sync.bfly.b32 x, x, 0, 31, 0xffffffff;\nsub.u32 %0, x, l;\n}"
        : "=r"(kept)
        : "r"(value));
    return kept;
}
/// blockIdx.x, threadIdx.x, read anew: the compiler would keep them through a loop that is short of registers.
__device__ __forceinline__ int block_x_here() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}
__device__ __forceinline__ int block_y_here() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(block));
    return block;
}
__device__ __forceinline__ int block_z_here() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(block));
    return block;
}
__device__ __forceinline__ int thread_here() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
/// An address in registers: the compiler would compute it anew in a loop that is short of them.
__device__ __forceinline__ u64 keep_address(u64 address) {
    u64 kept;
    asm volatile("mov.u64 %0, %1;" : "=l"(kept) : "l"(address));
    return kept;
}
__device__ __forceinline__ void widen_halves(u32 pair, float& low, float& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}" : "=f"(low), "=f"(high) : "r"(pair));
}
/// In one instruction; what is beyond the range of f16 becomes infinite.
__device__ __forceinline__ u32 narrow_to_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
/// D[16 × 8] += A[16 × 16]·B[16 × 8], f16 in, f32 sums.
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same of bf16.
__device__ __forceinline__ void multiply_bfloats(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 narrow_to_bfloats(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
/// D[16 × 8] += A[16 × 32]·B[32 × 8], signed bytes in, 32-bit sums. Fragments of m16n8k32: A: rows g, g + 8, columns 4t … 4t + 3, 16 + 4t …;
/// B: rows as A's columns, column g; D as of m16n8k16.
__device__ __forceinline__ void multiply_bytes(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// Transposes an 8 × 8 matrix of 16-bit elements: lane 4·g + t gives row g, columns 2t, 2t + 1 and gets column g, rows 2t, 2t + 1.
__device__ __forceinline__ u32 transpose_fragment(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}
/// 2^x to two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
/// 1 / x to one unit in the last place; of infinity 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
/// Packed bytes are read once: they need not stay in the first-level cache.
__device__ __forceinline__ U32x4 load_streaming(const U32x4* from) {
    U32x4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from));
    return r;
}
__device__ __forceinline__ U32x2 load_streaming(const U32x2* from) {
    U32x2 r;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(from));
    return r;
}
__device__ __forceinline__ u32 load_streaming(const u32* from) {
    u32 r;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ u16 load_streaming(const u16* from) {
    u16 r;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ u8 load_streaming(const u8* from) {
    u32 r;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(r) : "l"(from));
    return static_cast<u8>(r);
}
/// Of a table that all blocks read again and again: the first-level cache keeps it. `Offset`: in bytes.
template <int Offset>
__device__ __forceinline__ U32x4 load_table(u64 from) {
    U32x4 r;
    asm volatile("ld.global.nc.L1::evict_last.v4.u32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from), "n"(Offset));
    return r;
}
/// Where it is written, not before the loop around it, whose registers it would take; from the first-level cache.
/// Not as what no launch writes meanwhile (.nc): the one before may be at it until this one waits for it.
__device__ __forceinline__ U32x2 load_here(const U32x2* from) {
    U32x2 r;
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(from));
    return r;
}
__device__ __forceinline__ float load_here(const float* from) {
    float r;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ u32 load_here(const u32* from) {
    u32 r;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ u16 load_here(const u16* from) {
    u16 r;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ U32x4 load_here(const U32x4* from) {
    U32x4 r;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from));
    return r;
}
__device__ __forceinline__ u64 load_here(const u64* from) {
    u64 r;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(r) : "l"(from));
    return r;
}
/// A place in shared memory as copies and `load_shared` take it.
using SharedPlace = u32;
/// Not as assembly, which the compiler would repeat in a loop that is short of registers.
__device__ __forceinline__ SharedPlace shared_place(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }
/// A word at a place in shared memory and a distance in bytes that needs no instruction.
template <int Offset, class T>
__device__ __forceinline__ T load_shared(SharedPlace at) {
    T r;
    if constexpr (sizeof(T) == 16) {
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at), "n"(Offset) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2 + %3];" : "=r"(r.x), "=r"(r.y) : "r"(at), "n"(Offset) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(r) : "r"(at), "n"(Offset) : "memory");
    } else if constexpr (sizeof(T) == 2) {
        asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=h"(r) : "r"(at), "n"(Offset) : "memory");
    } else {
        u32 byte;
        asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(byte) : "r"(at), "n"(Offset) : "memory");
        r = static_cast<T>(byte);
    }
    return r;
}
/// Four 8 × 8 matrices of 16-bit elements from shared memory: lane 8·i + r gives the place of row r of matrix i, lane 4·g + t gets of each row g, columns
/// 2t, 2t + 1; `Transposed`: column g, rows 2t, 2t + 1.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(u32 (&matrices)[4], SharedPlace row) {
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row)
                     : "memory");
    }
}
/// Sixteen bytes of global memory, past registers and the first-level cache, in the background: there when the group that they are
/// committed with has been waited for. Offsets are in bytes.
template <int Offset, int FromOffset>
__device__ __forceinline__ void copy_to_shared(SharedPlace to, u64 from) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(Offset), "n"(FromOffset) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most `Pending` of this thread's latest groups are on their way.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SKVQ_OVERLAPS_LAUNCHES
#endif
/// From here on the next launch of the stream may begin, if it is one that may begin early, once all blocks have come here.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(SKVQ_OVERLAPS_LAUNCHES)
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
/// Of a launch that may begin early: until those before it are done, and what they wrote is there. All its threads must come here, so that whoever
/// waits for this launch has waited for those too.
__device__ __forceinline__ void wait_for_earlier_launches() {
#if defined(SKVQ_OVERLAPS_LAUNCHES)
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
alignas(16) extern __shared__ unsigned char skvq_dynamic_shared[];
#define SKVQ_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(skvq_dynamic_shared)
#endif

constexpr u32 whole_warp = 0xffffffffu;

/// How words are read: of what a launch before this one writes, or of shared memory.
struct FromLaunch {
    template <class T>
    __device__ __forceinline__ T operator()(const T* from) const {
        return load_here(from);
    }
};
struct FromShared {
    template <class T>
    __device__ __forceinline__ T operator()(const T* from) const {
        return *from;
    }
};

// An instruction of sm_89 and newer, which NVRTC 12.0 has for sm_90 alone.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 900 || __CUDA_ARCH__ == 890 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201)
#define SKVQ_CONVERTS_E4M3
#endif
/// Two E4M3FN numbers, bytes 0 and 1, as f16: all of them are f16 numbers.
__device__ __forceinline__ u32 halves_of_e4m3(u32 bytes) {
#if defined(SKVQ_CONVERTS_E4M3)
    u32 halves;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(halves) : "r"(bytes));
    return halves;
#else
    // The bits of an E4M3 number, moved, are those of an f16 that is 256 times smaller; NaN would be 480 / 256.
    const u32 spread = permute_bytes(bytes, 0, 0x1404), size = spread >> 1 & 0x3f803f80u;
    const u32 overflow = fma_halves(size, 0x78007800u, 0x6e006e00u);  // · 2^15 + 6144: infinite for a NaN alone
    return fma_halves((spread & 0x80008000u) | size, 0x5c005c00u, fma_halves(overflow, 0, 0));
#endif
}

/// Two f32 as f16, `low` in the low half, beyond the range of f16 its largest number.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    // A NaN must survive: fminf would drop it.
    const float a = is_nan(low) ? low : fminf(fmaxf(low, -65504.0f), 65504.0f);
    const float b = is_nan(high) ? high : fminf(fmaxf(high, -65504.0f), 65504.0f);
    return half_of_float(a) | static_cast<u32>(half_of_float(b)) << 16;
}

/// A power of two u with |largest| / u in [2^13, 2^14).
__device__ __forceinline__ float unit_of(float largest) {
    const u32 exponent = __float_as_uint(largest) >> 23;
    if (exponent < 14 || exponent >= 255) return 1.0f;
    return __uint_as_float((exponent - 13) << 23);
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Half value) { return float_of_half(value.bits); }
__device__ __forceinline__ float widen(BFloat value) { return __uint_as_float(static_cast<u32>(value.bits) << 16); }

/// f32 to an element type, to nearest even.
template <class T>
struct Narrow;
template <>
struct Narrow<float> {
    static __device__ __forceinline__ float from(float value) { return value; }
};
template <>
struct Narrow<Half> {
    static __device__ __forceinline__ Half from(float value) { return {half_of_float(value)}; }
};
template <>
struct Narrow<BFloat> {
    static __device__ __forceinline__ BFloat from(float value) {
        const u32 bits = __float_as_uint(value);
        if (is_nan(value)) return {0x7fff};
        return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    }
};

/// Products of 16-bit elements, and what f32 become for them.
__device__ __forceinline__ void multiply_elements(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Half) { multiply_fragments(d, a, b); }
__device__ __forceinline__ void multiply_elements(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], BFloat) { multiply_bfloats(d, a, b); }
__device__ __forceinline__ u32 narrow_pair(float low, float high, Half) { return narrow_to_halves(low, high); }
__device__ __forceinline__ u32 narrow_pair(float low, float high, BFloat) { return narrow_to_bfloats(low, high); }

}  // namespace skvq

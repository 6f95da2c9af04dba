// Scales and zero points: E4M3 and fp16, rounded as FORMAT.md §2 says.
//
// Is: conversions, and a row block's numbers as attention wants them. Is not: how a scale is found (encode.cuh).
#pragma once
#include "layout.cuh"

namespace skvq {

/// FP8 E4M3FN to f32: its bits, moved, are those of an f16 that is 256 times smaller.
__device__ __forceinline__ float float_of_e4m3(u32 byte) {
    const float value = float_of_half(static_cast<u16>((byte & 0x80u) << 8 | (byte & 0x7fu) << 7)) * 256.0f;
    return (byte & 0x7fu) == 0x7fu ? not_a_number() : value;
}

/// To nearest even, beyond ±448 to ±448; NaN stays.
__device__ __forceinline__ u8 e4m3_of_float(float value) {
    const u32 bits = __float_as_uint(value), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<u8>(sign | 0x7fu);
    if (size >= 0x43e00000u) return static_cast<u8>(sign | 0x7eu);  // 448
    if (size < 0x3c800000u) {                                       // below 2^-6 the steps are 2^-9
        // Adding 2^14 rounds to a multiple of 2^-9: the last bit of f32 there.
        const float magic = __fadd_rn(__uint_as_float(size), 16384.0f);
        return static_cast<u8>(sign | (__float_as_uint(magic) - __float_as_uint(16384.0f)));
    }
    const u32 rounded = size + 0x7ffffu + (size >> 20 & 1u);
    return static_cast<u8>(sign | ((rounded >> 20) - (120u << 3)));
}

__device__ __forceinline__ u16 saturated_half(float value) {
    return is_nan(value) ? 0x7e00 : half_of_float(fminf(fmaxf(value, -65504.0f), 65504.0f));
}

template <int NumberBytes>
__device__ __forceinline__ float round_number(float value) {
    if (NumberBytes == 1) return float_of_e4m3(e4m3_of_float(value));
    return is_nan(value) ? value : float_of_half(saturated_half(value));
}

template <int NumberBytes>
__device__ __forceinline__ float read_number(const u8* from) {
    if (NumberBytes == 1) return float_of_e4m3(*from);
    return float_of_half(*reinterpret_cast<const u16*>(from));
}
template <int NumberBytes>
__device__ __forceinline__ void write_number(u8* to, float value) {
    if (NumberBytes == 1) *to = e4m3_of_float(value);
    else *reinterpret_cast<u16*>(to) = saturated_half(value);
}

struct PagePair {
    const u8* from;
    template <class T, int First>
    __device__ __forceinline__ T word() const {
        return load_streaming(reinterpret_cast<const T*>(from + First));
    }
};

/// The numbers of the rows g and g + 8 of one row block, still packed.
template <class L>
struct PairNumbers {
    static constexpr int bytes = L::pair_bytes;
    /// Bytes of the widest load that every pair is aligned to.
    static constexpr int step = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
    u32 words[(bytes + 3) / 4];

    __device__ __forceinline__ void load(const u8* page, int block, int g) {
        read(PagePair{page + L::page_code_bytes + (block * 8 + g) * bytes});
    }

    /// `pair.template word<T, first>()`: the word that begins at byte `first` of the pair.
    template <class Pair>
    __device__ __forceinline__ void read(const Pair& pair) {
        for_each<bytes / step>([&](auto index) {
            constexpr int i = decltype(index)::value;
            if constexpr (step == 16) {
                const U32x4 loaded = pair.template word<U32x4, 16 * i>();
                words[4 * i] = loaded.x, words[4 * i + 1] = loaded.y, words[4 * i + 2] = loaded.z, words[4 * i + 3] = loaded.w;
            } else if constexpr (step == 8) {
                const U32x2 loaded = pair.template word<U32x2, 8 * i>();
                words[2 * i] = loaded.x, words[2 * i + 1] = loaded.y;
            } else if constexpr (step == 4) {
                words[i] = pair.template word<u32, 4 * i>();
            } else {
                const u32 loaded = pair.template word<u16, 2 * i>();
                words[i / 2] = i % 2 ? words[i / 2] | loaded << 16 : loaded;
            }
        });
    }

    /// Number `Number` of the rows g and g + 8.
    template <int Number>
    __device__ __forceinline__ void get(float (&pair)[2]) const {
        constexpr int byte = 2 * Number * L::number_bytes;
        const u32 both = words[byte / 4] >> 8 * (byte % 4);
        widen_halves(L::number_bytes == 1 ? halves_of_e4m3(both) : both, pair[0], pair[1]);
    }
};

}  // namespace skvq

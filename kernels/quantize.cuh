// A row's groups to codes and numbers, in exactly the arithmetic of FORMAT.md §3 (steps 4 to 6) and §6.
//
// Is: scale, zero point, codes. Is not: what comes before (transform.cuh), nor packing (codes.cuh).
// Shapes: levels f32 [level_room] and codes u8 [16 rows or one, L::codes] in shared memory.
#pragma once
#include "codes.cuh"
#include "numbers.cuh"
#include "transform.cuh"

namespace skvq {

/// Levels of a stream in shared memory; those of codes of eight bits are numbers that need no table.
template <class L>
struct Levels {
    static constexpr int count = L::is_parts ? 62 : L::is_pairs ? 16 : L::is_ternary ? 3 : L::format == 8 ? 1 : 1 << L::format;

    /// The one that this thread brings, if it brings one.
    static __device__ __forceinline__ float load(const CodecParams& p) {
        return L::format != 8 && threadIdx.x < count ? reinterpret_cast<const float*>(p.levels)[threadIdx.x] : 0.0f;
    }
    /// A barrier must follow.
    static __device__ __forceinline__ void store(float* to, float level) {
        if (L::format != 8 && threadIdx.x < count) to[threadIdx.x] = level;
    }
};

/// The larger one; a NaN wins, so that it is noticed.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a > b || is_nan(a) ? a : b; }

__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }

/// One group of a row, in the hands of 16 lanes.
template <class L>
struct GroupEncoder {
    static constexpr int size = L::is_parts ? L::codes : L::group_size, per_lane = size / 16, pairs = size / 2;
    /// Codes of a group.
    static constexpr int count = L::is_pairs ? pairs : size;
    const CodecParams& p;
    const float* levels;
    u8* codes;      // [count]
    float* buffer;  // [size]
    int lane;
    const float* y;  // [per_lane]
    float scale, zero;
    /// Of the lane's channels; of pairs the levels alone.
    u8 own[per_lane];
    float level[per_lane];

    __device__ __forceinline__ GroupEncoder(const CodecParams& codec, const float* levels, u8* codes, float* buffer, int lane, const float* y)
        : p(codec), levels(levels), codes(codes), buffer(buffer), lane(lane), y(y), scale(0.0f), zero(0.0f) {}

    __device__ __forceinline__ bool finite() const { return !is_nan(scale) && !is_nan(zero); }

    /// Where the levels of element k begin; those of a part of b bits follow all of fewer bits.
    static constexpr int table_first(int k) { return L::is_parts ? (1 << L::part_bits(L::part_of_octet(2 * k))) - 2 : 0; }
    static constexpr int level_count(int k) {
        if (L::is_ternary) return 3;
        return 1 << (L::is_parts ? L::part_bits(L::part_of_octet(2 * k)) : L::part_bits(0));
    }

    /// Sums over the group of f(d, level).
    template <class F>
    __device__ __forceinline__ float sum_of(const F& f) const {
        float terms[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) terms[k] = f(__fsub_rn(y[k], zero), level[k]);
        return lane_sum(terms, per_lane);
    }
    __device__ __forceinline__ float squares() const {
        return sum_of([](float d, float) { return __fmul_rn(d, d); });
    }
    __device__ __forceinline__ float products() const {
        return sum_of([](float d, float c) { return __fmul_rn(d, c); });
    }

    /// Step 5 of §3.
    __device__ __forceinline__ void find_codes() {
        const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
        float t[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) t[k] = __fmul_rn(__fsub_rn(y[k], zero), inverse);
        if constexpr (L::is_pairs) {
            find_pairs(t);
        } else {
            for_each<per_lane>([&](auto index) {
                constexpr int k = decltype(index)::value;
                own[k] = nearest_level<k>(t[k]);
                level[k] = L::format == 8 ? static_cast<float>(own[k]) - 127.5f : levels[table_first(k) + own[k]];
            });
        }
    }
    template <int K>
    __device__ __forceinline__ u8 nearest_level(float t) const {
        constexpr int count = level_count(K), first = table_first(K);
        if (L::format == 8 || (!L::is_parts && p.uniform)) {
            const float half = static_cast<float>(count - 1) * 0.5f, shifted = __fadd_rn(t, half);
            const float clamped = fminf(fmaxf(shifted, 0.0f), static_cast<float>(count - 1));
            return static_cast<u8>(__fadd_rn(clamped, 0.5f));  // positive: truncation is the floor
        }
        int code = 0;
#pragma unroll
        for (int i = 0; i + 1 < (L::format == 8 ? 0 : count); ++i) {
            code += __fmul_rn(__fadd_rn(levels[first + i], levels[first + i + 1]), 0.5f) < t;
        }
        return static_cast<u8>(code);
    }
    __device__ __forceinline__ void find_pairs(const float (&t)[per_lane]) {
        float x[8], y[8], half[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = levels[2 * i], y[i] = levels[2 * i + 1];
            half[i] = __fmul_rn(__fadd_rn(__fmul_rn(x[i], x[i]), __fmul_rn(y[i], y[i])), 0.5f);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < per_lane; ++k) buffer[lane + 16 * k] = t[k];
        __syncwarp();
        for (int pair = lane; pair < pairs; pair += row_lanes) {
            const float first = buffer[pair], second = buffer[pair + pairs];
            float best = -infinity();
            int code = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float score = __fsub_rn(__fadd_rn(__fmul_rn(first, x[i]), __fmul_rn(second, y[i])), half[i]);
                if (score > best) best = score, code = i;
            }
            codes[pair] = static_cast<u8>(code);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            const int channel = lane + 16 * k;
            level[k] = levels[2 * codes[channel % pairs] + channel / pairs];
        }
    }

    __device__ __forceinline__ float largest_level() const {
        constexpr int last = level_count(0) - 1;
        if (L::format == 8 || p.uniform) return static_cast<float>(last) * 0.5f;
        float largest = levels[0];
#pragma unroll
        for (int i = 1; i < (L::is_pairs ? 16 : L::format == 8 ? 1 : last + 1); ++i) largest = fmaxf(largest, levels[i]);
        return largest;
    }

    __device__ __forceinline__ float rounded(float value) const { return round_number<L::number_bytes>(value); }

    /// Step 4: scale and zero point before any refinement.
    __device__ __forceinline__ void find_numbers() {
        constexpr float elements = static_cast<float>(size);
        if (L::is_parts || p.rule == 0) {
            if (!L::symmetric) zero = rounded(__fdiv_rn(lane_sum(y, per_lane), elements));
            scale = rounded(__fmul_rn(p.clip, __fsqrt_rn(__fdiv_rn(squares(), elements))));
            return;
        }
        // With signs turned, both ends are a largest element. A symmetric group has the ends ±max|y|.
        float high = L::symmetric ? magnitude(y[0]) : y[0], negated_low = -y[0];
#pragma unroll
        for (int k = 1; k < per_lane; ++k) {
            high = larger_or_nan(high, L::symmetric ? magnitude(y[k]) : y[k]);
            negated_low = larger_or_nan(negated_low, -y[k]);
        }
        high = fold_lanes(high, larger_or_nan);
        if (L::symmetric) {
            scale = rounded(__fdiv_rn(__fmul_rn(p.clip, high), largest_level()));
            return;
        }
        const float low = -fold_lanes(negated_low, larger_or_nan);
        zero = rounded(__fmul_rn(p.clip, __fmul_rn(__fadd_rn(high, low), 0.5f)));
        scale = rounded(__fdiv_rn(__fmul_rn(p.clip, __fmul_rn(__fsub_rn(high, low), 0.5f)), largest_level()));
    }

    /// Leaves codes in `codes`, and scale and zero point rounded.
    __device__ __forceinline__ void run() {
        find_numbers();
#pragma unroll 1
        for (int turn = 0;; ++turn) {
            find_codes();
            if (L::is_parts || turn == p.refinements) break;
            const float along = products(), lengths = sum_of([](float, float c) { return __fmul_rn(c, c); });
            if (along > 0.0f) scale = rounded(__fdiv_rn(along, lengths));
        }
        if (!L::is_parts && p.unbiased) unbias();
        if constexpr (!L::is_pairs) {
#pragma unroll
            for (int k = 0; k < per_lane; ++k) codes[lane + 16 * k] = own[k];
        }
    }

    /// Step 6.
    __device__ __forceinline__ void unbias() {
        const float along = products(), quotient = __fdiv_rn(squares(), along);
        if (scale > 0.0f && along > 0.0f && is_finite(along) && is_finite(quotient)) scale = rounded(quotient);
    }
};

/// A group's numbers to their places in a page, as row `row` (0 … 127) of it; a row that is not finite reads back as NaN.
template <class L>
__device__ __forceinline__ void write_numbers(u8* page, int row, int group, float scale, float zero, bool finite) {
    write_number<L::number_bytes>(page + number_byte<L>(row, group), finite ? scale : not_a_number());
    if (L::symmetric) return;
    write_number<L::number_bytes>(page + number_byte<L>(row, L::groups + group), finite ? zero : 0.0f);
}

}  // namespace skvq

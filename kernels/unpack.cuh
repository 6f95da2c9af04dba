// Packed rows back to rows of the model's type, a piece of the past at a time, for attention of many queries by attend_rows.cuh.
//
// Is: x̂ = s ∘ Rᵀ π⁻¹ ŷ + μ, or B·ŷ + m(t), as products on tensor cores, within a rounding of the model's type of what decode.cuh gives. Is not: the
// arithmetic of FORMAT.md to the last bit (decode.cuh).
// Grid: runs of pages × (kv heads · slices of channels) × batch; block: 8 warps, a row block of 16 rows each of every page.
//
//   X̂ [16 rows × channels] = Ŷ [rows × codes] · Mᵀ [codes × channels]      M in two parts of f16, in shared memory as B operands; levels are exact
//
// Octets of a page are halves of an A operand of Ŷ, those of values once they are transposed. Channels are dealt out such that a lane ends with eight
// neighbours of a row.
#pragma once
#include "levels.cuh"
#include "numbers.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int unpack_warps = blocks_per_page, unpack_threads = 32 * unpack_warps, unpack_bytes_limit = 64 * 1024;

/// Channels that a block makes: a divisor of the head, of which the matrix fits.
constexpr int unpack_slice(int head_dim) {
    int slice = head_dim;
    while (slice * head_dim * 4 > unpack_bytes_limit || head_dim % slice || slice % 16) slice -= 16;
    return slice;
}
/// Of shared memory; src/cuda/kernels.rs knows it, too.
constexpr int unpack_bytes(int head_dim) { return unpack_slice(head_dim) * head_dim * 4; }

/// M[channel][code], what takes levels to the model's space but for what each block of statistics has of its own.
template <class L>
__device__ __forceinline__ float unpack_element(const TransformParams& p, const HeadTransform& head, int channel, int code) {
    constexpr int D = L::head_dim;
    if (L::is_parts) {
        float step = 1.0f;
        // Levels of even keys come in units of their part's step.
        if constexpr (L::is_even && L::stream == keys) {
            for_each<L::parts>([&](auto part) {
                constexpr int n = decltype(part)::value;
                if (code >= L::part_first(n) && code < L::part_first(n) + L::part_width(n)) step = even_step_of(L::part_bits(n));
            });
        }
        return head.inverse[channel * D + code] * step;
    }
    const int from = head.permutation ? head.permutation[code] : code;
    if (!p.rotation) return from == channel ? 1.0f : 0.0f;
    constexpr int block = hadamard_block(D);
    if (from / block != channel / block) return 0.0f;
    int both = from & channel & (block - 1);
    for (int shift = 4; shift >= 1; shift /= 2) both ^= both >> shift;
    return both & 1 ? -hadamard_unit(block) : hadamard_unit(block);
}

/// Four channels of a row from memory.
__device__ __forceinline__ void load_four(const float* from, float (&four)[4]) {
    const U32x4 loaded = *reinterpret_cast<const U32x4*>(from);
    four[0] = __uint_as_float(loaded.x), four[1] = __uint_as_float(loaded.y), four[2] = __uint_as_float(loaded.z), four[3] = __uint_as_float(loaded.w);
}

/// Adds m(t), or the shift, to four channels.
__device__ __forceinline__ void add_mean(float (&row)[4], const TransformParams& p, const HeadTransform& head, int head_dim, int position, int channel) {
    if (!head.shift) return;
    float shift[4];
    load_four(head.shift + channel, shift);
    if (!head.shift_sine) {
        for (int i = 0; i < 4; ++i) row[i] += shift[i];
        return;
    }
    const TurnPlace place(p, head_dim, position, channel);
    const float *far = place.far, *near = place.near;
    float far_cosine[4], far_sine[4], near_cosine[4], near_sine[4], shift_sine[4];
    load_four(far, far_cosine), load_four(far + head_dim, far_sine);
    load_four(near, near_cosine), load_four(near + head_dim, near_sine);
    load_four(head.shift_sine + channel, shift_sine);
    for (int i = 0; i < 4; ++i) {
        const float cosine = far_cosine[i] * near_cosine[i] - far_sine[i] * near_sine[i];
        const float sine = far_sine[i] * near_cosine[i] + far_cosine[i] * near_sine[i];
        row[i] += shift[i] * cosine + shift_sine[i] * sine;
    }
}

/// Channels of a chunk of a slice, of which a lane has `own` neighbours, two from each octet of B's columns.
template <int Slice, int Chunk>
struct UnpackChunk {
    static constexpr int first = 32 * Chunk, width = Slice - first < 32 ? Slice - first : 32, octets = width / 8, own = width / 4;
    /// The channel of column `column` of octet `octet`.
    static __device__ __forceinline__ int channel(int octet, int column) { return first + own * (column / 2) + 2 * octet + column % 2; }
};

template <class T, class L>
__global__ void __launch_bounds__(unpack_threads) unpack(const __grid_constant__ UnpackParams p) {
    constexpr int D = L::head_dim, slice = unpack_slice(D), slices = D / slice, chunks = (slice + 31) / 32, octets = slice / 8;
    SKVQ_DYNAMIC_SHARED(U32x4, matrix);  // [code tiles, octets, 32 lanes]: two registers of what f16 has of M, two of what it has of the rest
    __shared__ u32 largest_bits;
    let_next_launch_begin();
    const int head = blockIdx.y / slices, first_channel = blockIdx.y % slices * slice, batch = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const HeadTransform of_head(p.transform, D, batch, head, p.kv_heads, 0);

    // M in units of a power of two, lest f16 lose small ones.
    if (threadIdx.x == 0) largest_bits = 0;
    __syncthreads();
    float largest = 0.0f;
    for (int index = threadIdx.x; index < slice * D; index += unpack_threads) {
        const float element = unpack_element<L>(p.transform, of_head, first_channel + index / D, index % D);
        largest = fmaxf(largest, element < 0.0f ? -element : element);
    }
    atomicMax(reinterpret_cast<i32*>(&largest_bits), static_cast<i32>(__float_as_uint(largest)));  // in the order of their bits
    __syncthreads();
    const float unit = unit_of(__uint_as_float(largest_bits)), inverse_unit = __uint_as_float((254u << 23) - __float_as_uint(unit));
    for_each<chunks>([&](auto which) {
        using Chunk = UnpackChunk<slice, decltype(which)::value>;
        for (int index = warp; index < L::tiles * Chunk::octets; index += unpack_warps) {
            const int tile = index / Chunk::octets, octet = index % Chunk::octets, channel = first_channel + Chunk::channel(octet, g);
            u32 words[4];
            for (int half = 0; half < 2; ++half) {
                const int code = 16 * tile + 8 * half + 2 * t;
                const float low = unpack_element<L>(p.transform, of_head, channel, code) * inverse_unit;
                const float high = unpack_element<L>(p.transform, of_head, channel, code + 1) * inverse_unit;
                words[half] = narrow_to_halves(low, high);
                float kept_low, kept_high;
                widen_halves(words[half], kept_low, kept_high);
                words[2 + half] = narrow_to_halves(low - kept_low, high - kept_high);
            }
            matrix[(tile * octets + Chunk::first / 8 + octet) * 32 + lane] = {words[0], words[1], words[2], words[3]};
        }
    });
    // The rows before were read by launches before.
    wait_for_earlier_launches();
    __syncthreads();

    const LevelTable table = kept_levels<L>(p.levels);
    const u64* pages = reinterpret_cast<const u64*>(p.pages) + (static_cast<i64>(batch) * p.kv_heads + head) * p.page_capacity;
    const int origin = p.origins ? reinterpret_cast<const i32*>(p.origins)[batch] : 0, end = p.first_row + p.row_count;
    T* rows = reinterpret_cast<T*>(p.rows) + batch * p.batch_stride + head * p.head_stride;
    // Scales of one symmetric group are applied to sums, so that levels stay exact.
    constexpr bool scales_sums = L::groups == 1 && L::symmetric;
    const int first_page = p.first_row / page_rows + blockIdx.x * p.pages_per_block;
    for (int page = first_page; page < first_page + p.pages_per_block; ++page) {
        const int first_row = page * page_rows + warp * block_rows;
        if (first_row >= end) break;
        LaneCodes<L> codes;
        PairNumbers<L> numbers;
        codes.load(reinterpret_cast<const u8*>(pages[page]), warp, lane);
        numbers.load(reinterpret_cast<const u8*>(pages[page]), warp, g);

        u32 levels[L::tiles][4];
        LaneDecoder<L> decoder(codes, table, p.wide_levels);
        for_each<2 * L::tiles>([&](auto index) {
            constexpr int octet = decltype(index)::value, tile = octet / 2, half = octet % 2;
            u32 x, y;
            decoder.template octet<octet>(x, y);
            if constexpr (L::stream == values) x = transpose_fragment(x), y = transpose_fragment(y);
            levels[tile][2 * half] = x, levels[tile][2 * half + 1] = y;
        });
        float sums_scale[2] = {unit, unit};
        if constexpr (scales_sums) {
            float pair[2];
            numbers.template get<0>(pair);
            for (int side = 0; side < 2; ++side) sums_scale[side] = pair[side] * p.levels.correction;
            if (p.squares && t == 0 && blockIdx.y % slices == 0) {
                float* to = reinterpret_cast<float*>(p.squares) + (static_cast<i64>(batch) * p.kv_heads + head) * p.squares_room + first_row - p.first_row + g;
                for (int side = 0; side < 2; ++side) to[8 * side] = sums_scale[side] * sums_scale[side];
            }
            for (float& scale : sums_scale) scale *= unit;
        } else {
            for_each<L::tiles>([&](auto index) {
                constexpr int tile = decltype(index)::value, group = 16 * tile / L::group_size;
                float scales[2], zeros[2] = {};
                numbers.template get<group>(scales);
                if constexpr (!L::symmetric) numbers.template get<L::groups + group>(zeros);
                for (int i = 0; i < 4; ++i) {
                    float low, high;
                    widen_halves(levels[tile][i], low, high);
                    const float scale = scales[i % 2] * p.levels.correction, zero = zeros[i % 2];
                    levels[tile][i] = pack_halves(fmaf(low, scale, zero), fmaf(high, scale, zero));
                }
            });
        }

        const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block_of_page(p.transform, page));
        for_each<chunks>([&](auto which) {
            using Chunk = UnpackChunk<slice, decltype(which)::value>;
            float sums[Chunk::octets][4] = {};
#pragma unroll
            for (int tile = 0; tile < L::tiles; ++tile) {
                for_each<Chunk::octets>([&](auto index) {
                    constexpr int octet = decltype(index)::value;
                    const U32x4 both = matrix[(tile * octets + Chunk::first / 8 + octet) * 32 + lane];
                    multiply_fragments(sums[octet], levels[tile], {both.z, both.w});
                    multiply_fragments(sums[octet], levels[tile], {both.x, both.y});
                });
            }
            const int channel = first_channel + Chunk::first + Chunk::own * t;
            for_each<2>([&](auto of) {
                constexpr int side = decltype(of)::value;
                const int row = first_row + g + 8 * side;
                if (row >= end) return;
                u32 words[Chunk::own / 2];
                for_each<Chunk::own / 4>([&](auto quarter) {
                    constexpr int q = decltype(quarter)::value;
                    float four[4];
                    for (int i = 0; i < 4; ++i) four[i] = sums[2 * q + i / 2][2 * side + i % 2] * sums_scale[side];
                    if (transform.scale) {
                        float scale[4];
                        load_four(transform.scale + channel + 4 * q, scale);
                        for (int i = 0; i < 4; ++i) four[i] *= scale[i];
                    }
                    add_mean(four, p.transform, transform, D, origin + row, channel + 4 * q);
                    words[2 * q] = narrow_pair(four[0], four[1], T{}), words[2 * q + 1] = narrow_pair(four[2], four[3], T{});
                });
                T* to = rows + static_cast<i64>(row - p.first_row) * p.row_stride + channel;
                if constexpr (Chunk::own == 8) *reinterpret_cast<U32x4*>(to) = {words[0], words[1], words[2], words[3]};
                else *reinterpret_cast<U32x2*>(to) = {words[0], words[1]};
            });
        });
    }
}

}  // namespace skvq

// Queries folded for packed keys: q·x̂ = (R(s∘q))_π·ŷ_π + q·μ, or (Bᵀq)·ŷ + q·m(t).
//
// Is: one launch before attend.cuh, or what each block of attend_once.cuh does first; q' as f16 fragments, and f32 extras of each query. Is not: q·m(t) of a mean that turns (turned.cuh, turning.cuh).
// q' is divided by a power of two, its unit, that puts its largest element just below 2^14, so f16 loses no range; scores are multiplied
// by it. Where keys' levels are evenly spaced, q' is two bytes in place of f16 (bytes.cuh), and its largest element the largest integer. Every block
// of statistics has its own q', so a split of attention stays inside one block.
// Grid: blocks of statistics (1 if static) × (kv heads · query tiles) × batch; block: 16 threads for each query of the fullest tile, by pairs of
// queries. With a matrix 128 threads, which share the product, a thread a channel of all 8. What has no threads is not written, and not read: in place
// of a query that does not exist attention takes the last one that does (`existing_query`).
#pragma once
#include "bytes.cuh"
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int extras_head = 4;

/// A query as f16 fragments, pairs of channels; `fragments`: of the query's first lane. Of two steps of 16 channels the lanes 8o + 2t and 8o + 2t + 1
/// have a pair of each: the first lane writes the one, the other lane the other. Adds to `sums` what the lane's elements are rounded to.
template <class K>
__device__ __forceinline__ void write_query_halves(const float (&row)[K::head_dim / 16], float (&sums)[K::groups], u32* fragments, int lane) {
    constexpr int per_lane = K::head_dim / 16, per_group = K::group_size / 16;
    const int odd = lane % 2;
    const u32 selector = odd ? 0x3276 : 0x5410;
    u32* to = fragments + 64 * odd + 2 * (lane / 2 % 4) + lane / 8;
    for_each<(per_lane + 1) / 2>([&](auto index) {
        constexpr int k = 2 * decltype(index)::value;
        constexpr bool two = k + 1 < per_lane;
        const u32 own = pack_halves(row[k], two ? row[two ? k + 1 : k] : 0.0f);
        float first, second;
        widen_halves(own, first, second);
        sums[k / per_group] += first;
        if constexpr (two) sums[(k + 1) / per_group] += second;
        const u32 pair = permute_bytes(own, __shfl_xor_sync(whole_warp, own, 1), selector);
        if (two || !odd) to[64 * k] = pair;
    });
}

/// Of shared memory, for what a transform does to the eight rows of a block.
template <class Rows>
constexpr int transform_floats = rows_per_block * (Rows::is_parts ? product_parts(Rows::head_dim) : 1) * Rows::head_dim;
/// Of a tile: words of q'; numbers of a query's extras, and of all.
template <class K>
constexpr int folded_words = K::is_even ? (K::head_dim / 16 + 1) / 2 * 128 : K::head_dim / 16 * 64;
template <class K>
constexpr int extras_width = extras_head + K::groups;
template <class K>
constexpr int extras_floats = query_tile * extras_width<K>;

/// The queries of a tile to `fragments` and `extras`, as FoldParams has them, for one block of statistics. `buffer` [transform_floats<K>], at a multiple of
/// 16 bytes. 16 threads for each query; all threads of the block take part.
template <class T, class K>
__device__ __forceinline__ void fold_tile(const FoldParams& p, int batch, int head, int tile, int block, float* buffer, u32* fragments, float* extras) {
    constexpr int D = K::head_dim, per_lane = D / 16;
    const int query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    const QueryPlace place = query_at(head, p.group, p.length, tile * query_tile + query);
    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block);
    float* own = buffer + query * D;

    float row[per_lane];
    const T* from = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                    place.position * p.query_position_stride;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) row[k] = place.exists ? widen(from[lane + 16 * k]) * p.scale : 0.0f;

    float shifted = 0.0f, noise = 0.0f, largest = 0.0f;
    // Of few queries most warps have none.
    const bool idle = !__any_sync(whole_warp, place.exists);
    if (!idle && transform.shift && !transform.shift_sine) {
#pragma unroll
        for (int k = 0; k < per_lane; ++k) shifted += row[k] * transform.shift[lane + 16 * k];
    }
    if constexpr (K::is_parts) multiply_rows<D, true, 32>(row, transform.inverse, buffer, query, lane);
    if (!idle) {
        if constexpr (!K::is_parts) {
            if (transform.scale) {
#pragma unroll
                for (int k = 0; k < per_lane; ++k) row[k] *= transform.scale[lane + 16 * k];
            }
            turn_forward<D>(row, p.transform, transform, own, lane);
        }
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            if (p.noise) noise += 0.5f * reinterpret_cast<const float*>(p.noise)[lane + 16 * k] * row[k] * row[k];
            shifted += row[k] * 0.0f;  // what is not finite makes the scores NaN
        }
        if constexpr (K::is_even) {
            for_each<per_lane>([&](auto k) { row[decltype(k)::value] *= even_step_of(K::part_bits(K::part_of_octet(2 * decltype(k)::value))); });
        }
#pragma unroll
        for (int k = 0; k < per_lane; ++k) largest = fmaxf(largest, row[k] < 0.0f ? -row[k] : row[k]);
        shifted = add_lanes(shifted);
        noise = add_lanes(noise);
        largest = fold_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
    }
    // A power of two, and so is its inverse, which is a normal number. Integers have no exponent: theirs leaves no bit of them unused.
    float unit = unit_of(largest), inverse_unit = __uint_as_float((254u << 23) - __float_as_uint(unit));
    if (p.as_bytes && largest > 1e-30f && is_finite(largest)) {
        unit = largest * (1.0f / largest_integer), inverse_unit = largest_integer * reciprocal_fast(largest);
    }
#pragma unroll
    for (int k = 0; k < per_lane; ++k) row[k] *= inverse_unit;

    const bool as_bytes = by_bytes<K, 1> && p.as_bytes;
    // Zero points meet the sum of what the scores are made of: the rounded elements.
    float sums[K::groups] = {};
    if constexpr (by_bytes<K, 1>) {
        if (as_bytes) {
            if constexpr (K::is_even) sums[0] = write_even_query_bytes<K>(row, fragments + 16 * query, lane);
            else sums[0] = write_query_bytes<D>(row, fragments + 16 * query, lane);
        }
    }
    if (!as_bytes) write_query_halves<K>(row, sums, fragments + 8 * query, lane);
    float* own_extras = extras + query * extras_width<K>;
    const float integers = as_bytes ? add_lanes(sums[0]) : 0.0f;
#pragma unroll
    for (int g = 0; g < K::groups; ++g) {
        const float sum = add_lanes(sums[g]) * unit;
        if (lane == 0) own_extras[extras_head + g] = sum;
    }
    if (lane == 0) own_extras[0] = unit, own_extras[1] = shifted, own_extras[2] = noise, own_extras[3] = integers;
}

template <class T, class K>
__global__ void __launch_bounds__(row_threads) fold(const __grid_constant__ FoldParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    alignas(16) __shared__ float buffer[transform_floats<K>];
    const int block = blockIdx.x, head = blockIdx.y / p.query_tiles, tile = blockIdx.y % p.query_tiles, batch = blockIdx.z;
    if (p.lengths && block * p.transform.pages_per_block * page_rows >= reinterpret_cast<const i32*>(p.lengths)[0]) return;
    const i64 index = ((static_cast<i64>(batch) * p.kv_heads + head) * gridDim.x + block) * p.query_tiles + tile;
    fold_tile<T, K>(p, batch, head, tile, block, buffer, reinterpret_cast<u32*>(p.folded) + index * folded_words<K>,
                    reinterpret_cast<float*>(p.extras) + index * extras_floats<K>);
}

}  // namespace skvq

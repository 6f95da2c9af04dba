// Queries folded for packed keys: q·x̂ = (R(s∘q))_π·ŷ_π + q·μ, or (Bᵀq)·ŷ + q·m(t).
//
// Is: one launch before attend.cuh; q' as f16 fragments, and f32 extras of each query. Is not: q·m(t) of a mean that turns (turning.cuh).
// q' is divided by a power of two, its unit, that puts its largest element just below 2^14, so f16 loses no range; scores are multiplied
// by it. Where keys' levels are integers, q' is two bytes in place of f16 (bytes.cuh). Every block of statistics has its own q', so a split of
// attention stays inside one block.
// Grid: blocks of statistics (1 if static) × (kv heads · query tiles) × batch; block: 128 threads, 16 for each of 8 queries,
// which share the product with a matrix, a thread a channel of all 8.
#pragma once
#include "bytes.cuh"
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int extras_head = 4;

template <class T, class K>
__global__ void __launch_bounds__(row_threads) fold(const __grid_constant__ FoldParams p) {
    constexpr int D = K::head_dim, per_lane = D / 16;
    alignas(16) __shared__ float buffer[rows_per_block * product_parts(D) * D];
    const int block = blockIdx.x, head = blockIdx.y / p.query_tiles, tile = blockIdx.y % p.query_tiles, batch = blockIdx.z;
    const int blocks = gridDim.x, query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
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
            if (p.transform.rotation) hadamard<D>(row, lane);
            if (transform.permutation) permute<D>(row, transform.permutation, own, lane);
        }
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            if (p.noise) noise += 0.5f * reinterpret_cast<const float*>(p.noise)[lane + 16 * k] * row[k] * row[k];
            largest = fmaxf(largest, row[k] < 0.0f ? -row[k] : row[k]);
            shifted += row[k] * 0.0f;  // what is not finite makes the scores NaN
        }
        shifted = add_lanes(shifted);
        noise = add_lanes(noise);
        largest = fold_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
    }
    const float unit = unit_of(largest);
    const i64 tile_index = ((static_cast<i64>(batch) * p.kv_heads + head) * blocks + block) * p.query_tiles + tile;
    float* extras = reinterpret_cast<float*>(p.extras) + (tile_index * query_tile + query) * (extras_head + K::groups);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) row[k] /= unit;
    spill<D>(row, own, lane);
    // Zero points meet the sum of what the scores are made of: the rounded elements.
    constexpr int per_group = K::group_size / 16;
    for (int g = 0; g < K::groups; ++g) {
        float sum = 0.0f;
        for (int k = 0; k < per_group; ++k) {
            const float element = row[g * per_group + k];
            sum += p.as_bytes ? __fsub_rn(__fadd_rn(element, integer_magic), integer_magic)
                              : float_of_half(static_cast<u16>(pack_halves(element, 0.0f)));
        }
        sum = add_lanes(sum) * unit;
        if (lane == 0) extras[extras_head + g] = sum;
    }
    if (lane == 0) extras[0] = unit, extras[1] = shifted, extras[2] = noise, extras[3] = 0.0f;
    __syncthreads();
    u32* fragments = reinterpret_cast<u32*>(p.folded) + tile_index * (D / 16 * 64);
    for (int index = threadIdx.x; index < D / 16 * 64; index += row_threads) {
        if (p.as_bytes) {
            const int fragment_lane = index / 4 % 32;
            fragments[index] = query_bytes(buffer + fragment_lane / 4 * D, index / 128, fragment_lane, index % 4);
            continue;
        }
        const int fragment_lane = index / 2 % 32, channel = index / 64 * 16 + fragment_lane % 4 * 2 + index % 2 * 8;
        const float* pair = buffer + fragment_lane / 4 * D + channel;
        fragments[index] = pack_halves(pair[0], pair[1]);
    }
}

}  // namespace skvq

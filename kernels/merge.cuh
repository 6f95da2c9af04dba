// Partial states to an output row: `unfold` brings packed states to the model's space, `merge` joins all states of a query.
//
// Is: Σ p x̂ = s ∘ Rᵀ π⁻¹ (Σ p ŷ) + (Σ p)·μ, or B·(Σ p ŷ) + (Σ p)·μ, once for each block of statistics. Is not: over rows.
// Block: 128 threads, 16 for each of 8 queries, which share the product with a matrix, a thread a channel of all 8. unfold's grid: states it makes × (kv heads · query tiles) × batch; merge's: (kv heads · query
// tiles) × batch, with four times the threads, each slice of which joins a quarter of the states. One unfolded state takes splits_per_state splits
// one after the other, and with blocks each costs a transform, so more of them run at once when it is small.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int unfold_blocks = 8;  // of a multiprocessor: without matrices the product's registers must not cost any

template <int D>
__global__ void __launch_bounds__(row_threads, D <= 128 ? unfold_blocks : 1) unfold(const __grid_constant__ UnfoldParams p) {
    constexpr int per_lane = D / 16;
    alignas(16) __shared__ float buffer[rows_per_block * product_parts(D) * D];
    const int made = blockIdx.x, head_tile = blockIdx.y, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles;
    const int query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, head = head_tile / p.query_tiles;
    const int first = made * p.splits_per_state, end = min(first + p.splits_per_state, p.splits);
    auto packed = [&](int split) { return state_at(p.packed, batch, head_tile, head_tiles, query, p.splits, split, D); };
    float* own = buffer + query * D;

    float largest = -infinity();
    for (int split = first; split < end; ++split) largest = fmaxf(largest, packed(split)[0]);

    float sum = 0.0f, weight = 0.0f, output[per_lane] = {}, row[per_lane] = {};
    for (int split = first; split < end; ++split) {
        const float* from = packed(split);
        const float factor = state_factor(from[0], from[1], largest);
        sum += factor * from[1];
        weight += factor * from[2];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) row[k] += factor * from[state_head + lane + 16 * k];
        // The transform of a run of splits with the same statistics is undone once.
        const int block = block_of_page(p.transform, split * p.pages_per_split);
        if (split + 1 < end && block_of_page(p.transform, (split + 1) * p.pages_per_split) == block) continue;
        // Blocks that hold no row yet have no statistics: their states are empty, which all queries see alike.
        if (__syncthreads_and(weight == 0.0f)) continue;
        const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block);
        if (transform.inverse) multiply_rows<D, false, 16>(row, transform.inverse, buffer, query, lane);
        else transform_back<D>(row, p.transform, transform, own, lane);
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            output[k] += row[k] + (transform.shift ? weight * transform.shift[lane + 16 * k] : 0.0f);
            row[k] = 0.0f;
        }
        weight = 0.0f;
    }
    float* to = state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, p.first_state + made, D);
    if (lane == 0) to[0] = largest, to[1] = sum, to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) to[state_head + lane + 16 * k] = output[k];
}

constexpr int merge_slices = 4, merge_threads = merge_slices * row_threads;

/// Queries that see nothing get zeros, as torch's attention gives them.
template <class T, int D>
__global__ void __launch_bounds__(merge_threads) merge(const __grid_constant__ MergeParams p) {
    constexpr int per_lane = D / 16;
    __shared__ float slices[merge_slices - 1][query_tile][2 + D];
    const int head_tile = blockIdx.x, batch = blockIdx.y, head_tiles = p.kv_heads * p.query_tiles;
    const int slice = threadIdx.x / row_threads, query = threadIdx.x % row_threads / row_lanes, lane = threadIdx.x % row_lanes;
    const QueryPlace place = query_at(head_tile / p.query_tiles, p.group, p.length, head_tile % p.query_tiles * query_tile + query);
    const int count = place.exists ? p.state_count : 0;
    auto state = [&](int index) { return state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, index, D); };

    const bool has_sink = p.sink_logits && slice == 0 && place.exists;
    const float sink = has_sink ? reinterpret_cast<const float*>(p.sink_logits)[place.head] : -infinity();
    float largest = sink;
    for (int index = slice; index < count; index += merge_slices) largest = fmaxf(largest, state(index)[0]);
    float sum = state_factor(sink, 0.0f, largest), output[per_lane] = {};
    for (int index = slice; index < count; index += merge_slices) {
        const float* from = state(index);
        const float factor = state_factor(from[0], from[1], largest);
        if (factor == 0.0f) continue;
        sum += factor * from[1];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) output[k] += factor * from[state_head + lane + 16 * k];
    }
    if (slice > 0) {
        float* own = slices[slice - 1][query];
        if (lane == 0) own[0] = largest, own[1] = sum;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) own[2 + lane + 16 * k] = output[k];
    }
    __syncthreads();
    if (slice > 0 || !place.exists) return;
    float joint = largest;
    for (int other = 0; other < merge_slices - 1; ++other) joint = fmaxf(joint, slices[other][query][0]);
    const float own_factor = state_factor(largest, sum, joint);
    sum *= own_factor;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) output[k] *= own_factor;
    for (int other = 0; other < merge_slices - 1; ++other) {
        const float* from = slices[other][query];
        const float factor = state_factor(from[0], from[1], joint);
        if (factor == 0.0f) continue;
        sum += factor * from[1];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) output[k] += factor * from[2 + lane + 16 * k];
    }
    T* to = reinterpret_cast<T*>(p.output) + batch * p.output_batch_stride + place.head * p.output_head_stride +
            place.position * p.output_position_stride;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) to[lane + 16 * k] = Narrow<T>::from(sum == 0.0f ? 0.0f : output[k] / sum);
}

}  // namespace skvq

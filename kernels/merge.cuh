// Partial states to an output row: `unfold` brings packed states to the model's space, `merge` joins all states of a query.
//
// Is: Σ p x̂ = s ∘ Rᵀ π⁻¹ (Σ p ŷ) + (Σ p)·μ, or B·(Σ p ŷ) + (Σ p)·μ, once for each block of statistics. Is not: over rows.
// Block of unfold: 128 threads, 16 for each of 8 queries, which share the product with a matrix, a thread a channel of all 8; grid: states it makes × (kv heads · query tiles) × batch. One unfolded state takes
// splits_per_state splits one after the other, and with blocks each costs a transform, so more of them run at once when it is small.
// Block of merge: one query, 128 threads, eight slices of 16 each of which joins every eighth state, four at once; grid: query heads · length × batch.
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
    // Of few queries most warps have none, and no states to read.
    const bool exists = head_tile % p.query_tiles * query_tile + query < p.queries, idle = !__any_sync(whole_warp, exists);
    auto packed = [&](int split) { return state_at(p.packed, batch, head_tile, head_tiles, query, p.splits, split, D); };
    float* own = buffer + query * D;

    float largest = -infinity();
    for (int split = first; exists && split < end; ++split) largest = fmaxf(largest, packed(split)[0]);

    float sum = 0.0f, weight = 0.0f, output[per_lane] = {}, row[per_lane] = {};
    for (int split = first; split < end; ++split) {
        if (exists) {
            const float* from = packed(split);
            const float factor = state_factor(from[0], from[1], largest);
            sum += factor * from[1];
            weight += factor * from[2];
#pragma unroll
            for (int k = 0; k < per_lane; ++k) row[k] += factor * from[state_head + lane + 16 * k];
        }
        // The transform of a run of splits with the same statistics is undone once.
        const int block = block_of_page(p.transform, split * p.pages_per_split);
        if (split + 1 < end && block_of_page(p.transform, (split + 1) * p.pages_per_split) == block) continue;
        // Blocks that hold no row yet have no statistics: their states are empty, which all queries see alike.
        if (__syncthreads_and(weight == 0.0f)) continue;
        const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block);
        if (transform.inverse) multiply_rows<D, false, 16>(row, transform.inverse, buffer, query, lane);
        else if (!idle) transform_back<D>(row, p.transform, transform, own, lane);
        if (idle) continue;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            output[k] += row[k] + (transform.shift ? weight * transform.shift[lane + 16 * k] : 0.0f);
            row[k] = 0.0f;
        }
        weight = 0.0f;
    }
    if (!exists) return;
    float* to = state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, p.first_state + made, D);
    if (lane == 0) to[0] = largest, to[1] = sum, to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) to[state_head + lane + 16 * k] = output[k];
}

constexpr int merge_slices = row_threads / row_lanes, merge_threads = row_threads, merged_at_once = 4;

/// Queries that see nothing get zeros, as torch's attention gives them.
template <class T, int D>
__global__ void __launch_bounds__(merge_threads) merge(const __grid_constant__ MergeParams p) {
    constexpr int loads = (D / 4 + row_lanes - 1) / row_lanes;  // of 16 bytes a lane
    __shared__ U32x4 slices[merge_slices][1 + D / 4];
    const int batch = blockIdx.y, queries = p.group * p.length, kv_head = blockIdx.x / queries, query = blockIdx.x % queries;
    const int slice = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    const QueryPlace place = query_at(kv_head, p.group, p.length, query);
    const U32x4* states = reinterpret_cast<const U32x4*>(state_at(p.states, batch, kv_head * p.query_tiles + query / query_tile,
                                                                  p.kv_heads * p.query_tiles, query % query_tile, p.state_count, 0, D));

    // The sink's logit is a state without an output.
    const float sink = p.sink_logits && slice == 0 ? reinterpret_cast<const float*>(p.sink_logits)[place.head] : -infinity();
    float largest = sink, sum = sink == -infinity() ? 0.0f : 1.0f, output[4 * loads] = {};
    for (int next = slice; next < p.state_count; next += merge_slices * merged_at_once) {
        U32x4 heads[merged_at_once], rows[merged_at_once][loads];
#pragma unroll
        for (int i = 0; i < merged_at_once; ++i) {
            const U32x4* from = states + static_cast<i64>(min(next + i * merge_slices, p.state_count - 1)) * (1 + D / 4);
            heads[i] = from[0];
#pragma unroll
            for (int k = 0; k < loads; ++k) {
                if (lane + row_lanes * k < D / 4) rows[i][k] = from[1 + lane + row_lanes * k];
            }
        }
        float joint = largest;
#pragma unroll
        for (int i = 0; i < merged_at_once; ++i) {
            if (next + i * merge_slices < p.state_count) joint = fmaxf(joint, __uint_as_float(heads[i].x));
        }
        const float moved = state_factor(largest, sum, joint);
        largest = joint;
        sum *= moved;
#pragma unroll
        for (float& element : output) element *= moved;
#pragma unroll
        for (int i = 0; i < merged_at_once; ++i) {
            const float factor = state_factor(__uint_as_float(heads[i].x), __uint_as_float(heads[i].y), joint);
            if (next + i * merge_slices >= p.state_count || factor == 0.0f) continue;
            sum += factor * __uint_as_float(heads[i].y);
#pragma unroll
            for (int k = 0; k < loads; ++k) {
                output[4 * k] += factor * __uint_as_float(rows[i][k].x);
                output[4 * k + 1] += factor * __uint_as_float(rows[i][k].y);
                output[4 * k + 2] += factor * __uint_as_float(rows[i][k].z);
                output[4 * k + 3] += factor * __uint_as_float(rows[i][k].w);
            }
        }
    }
    if (lane == 0) slices[slice][0] = {__float_as_uint(largest), __float_as_uint(sum), 0, 0};
#pragma unroll
    for (int k = 0; k < loads; ++k) {
        if (lane + row_lanes * k < D / 4)
            slices[slice][1 + lane + row_lanes * k] = {__float_as_uint(output[4 * k]), __float_as_uint(output[4 * k + 1]),
                                                       __float_as_uint(output[4 * k + 2]), __float_as_uint(output[4 * k + 3])};
    }
    __syncthreads();
    auto number = [&](int slice, int i) { return reinterpret_cast<const float*>(slices[slice])[i]; };
    float joint = -infinity(), factors[merge_slices], total = 0.0f;
#pragma unroll
    for (int i = 0; i < merge_slices; ++i) joint = fmaxf(joint, number(i, 0));
#pragma unroll
    for (int i = 0; i < merge_slices; ++i) {
        factors[i] = state_factor(number(i, 0), number(i, 1), joint);
        if (factors[i] != 0.0f) total += factors[i] * number(i, 1);
    }
    T* to = reinterpret_cast<T*>(p.output) + batch * p.output_batch_stride + place.head * p.output_head_stride +
            place.position * p.output_position_stride;
    for (int channel = threadIdx.x; channel < D; channel += merge_threads) {
        float joined = 0.0f;
#pragma unroll
        for (int i = 0; i < merge_slices; ++i) {
            if (factors[i] != 0.0f) joined += factors[i] * number(i, state_head + channel);
        }
        to[channel] = Narrow<T>::from(total == 0.0f ? 0.0f : joined / total);
    }
}

}  // namespace skvq

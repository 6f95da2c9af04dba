// Partial states to an output row: `unfold` brings packed states to the model's space, `merge` joins all states of a query.
//
// Is: Σ p x̂ = s ∘ Rᵀ π⁻¹ (Σ p ŷ) + (Σ p)·μ, or B·(Σ p ŷ) + (Σ p)·μ, once for each block of statistics. Is not: over rows.
// Block of unfold: 16 threads for each query of the fullest tile, by pairs of queries; where values have a matrix 128, which share the product, a
// thread a channel of all 8. Grid: states it makes × (kv heads · query tiles) × batch. One unfolded state takes splits_per_state splits, at most
// 16, one after the other, and with blocks each costs a transform, so more of them run at once when it is small.
// Block of merge: one query, 128 threads, eight slices of 16 each of which joins every eighth state, four at once; grid: query heads · length × batch.
// Of all queries of a kv head the last block of attend_once.cuh does the same, with the slices among them.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int unfold_at_once = 3;  // rows of splits on their way
constexpr int unfold_blocks = 8;  // of a multiprocessor: without matrices the product's registers must not cost any

template <int D>
__global__ void __launch_bounds__(row_threads, D <= 128 ? unfold_blocks : 1) unfold(const __grid_constant__ UnfoldParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    constexpr int per_lane = D / 16, width = state_head + D;
    alignas(16) __shared__ float buffer[rows_per_block * product_parts(D) * D];
    alignas(16) __shared__ float affines[row_threads / 32][2][D];  // of a warp: scale and shift
    const int made = blockIdx.x, head_tile = blockIdx.y, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles;
    const int query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, head = head_tile / p.query_tiles;
    const int first = made * p.splits_per_state, count = min(p.splits_per_state, p.splits - first);
    // Of few queries some warps have none, and no states to read.
    const bool exists = head_tile % p.query_tiles * query_tile + query < p.queries;
    if (!p.transform.inverse && !__any_sync(whole_warp, exists)) return;
    const float* states = state_at(p.packed, batch, head_tile, head_tiles, query, p.splits, first, D);

    // A lane asks for the head of one state. Without a matrix, whose product takes the registers, the row of the next split and what its transform
    // multiplies by are on their way while one is at hand.
    U32x4 own = {__float_as_uint(-infinity()), 0, 0, 0};
    if (exists && lane < count) own = *reinterpret_cast<const U32x4*>(states + lane * width);
    float next[per_lane] = {};
    auto ask_row = [&](int split) {
        if (!exists || split >= count) return;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) next[k] = states[split * width + state_head + lane + 16 * k];
    };
    if (!p.transform.inverse) ask_row(0);
    const float largest = fold_lanes(__uint_as_float(own.x), [](float a, float b) { return fmaxf(a, b); });
    const float own_factor = state_factor(__uint_as_float(own.x), __uint_as_float(own.y), largest);
    const float sum = add_lanes(own_factor * __uint_as_float(own.y)), own_weight = own_factor * __uint_as_float(own.z);
    auto to = [&] { return state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, p.first_state + made, D); };
    if (exists && lane == 0) *reinterpret_cast<U32x4*>(to()) = {__float_as_uint(largest), __float_as_uint(sum), 0, 0};
    auto factor_of = [&](int split) { return __shfl_sync(whole_warp, own_factor, split, row_lanes); };
    auto weight_of = [&](int split) { return __shfl_sync(whole_warp, own_weight, split, row_lanes); };

    // The transform of a run of splits with the same statistics is undone once, with its last split. Blocks that hold no row yet have no
    // statistics: their states are empty, and so are their rows.
    auto block_of = [&](int split) { return split < count ? block_of_page(p.transform, (first + split) * p.pages_per_split) : -1; };
    float weight = 0.0f, output[per_lane] = {}, row[per_lane] = {};
    if (p.transform.inverse) {
        // Rows of parts have no blocks of statistics: one transform for all splits, whose rows are on their way together, some at a time.
#pragma unroll 1
        for (int split = 0; split < count; split += unfold_at_once) {
            float rows[unfold_at_once][per_lane] = {};
#pragma unroll
            for (int i = 0; i < unfold_at_once; ++i) {
                if (!exists || split + i >= count) continue;
#pragma unroll
                for (int k = 0; k < per_lane; ++k) rows[i][k] = states[(split + i) * width + state_head + lane + 16 * k];
            }
#pragma unroll
            for (int i = 0; i < unfold_at_once; ++i) {
                if (split + i >= count) break;
                const float factor = factor_of(split + i);
                weight += weight_of(split + i);
                if (factor == 0.0f) continue;
#pragma unroll
                for (int k = 0; k < per_lane; ++k) row[k] += factor * rows[i][k];
            }
        }
        if (!__syncthreads_and(weight == 0.0f)) {
            const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, 0);
            multiply_rows<D, false, D < 128 ? 8 : 16>(row, transform.inverse, buffer, query, lane);
#pragma unroll
            for (int k = 0; k < per_lane; ++k) output[k] = row[k] + (transform.shift ? weight * transform.shift[lane + 16 * k] : 0.0f);
        }
    } else {
        const int warp = threadIdx.x / 32;
        const SharedPlace place = shared_place(affines[warp]);
        int block = block_of(0), next_block = block_of(1);
        bool ready = false;
        auto ask_affine = [&] {
            ready = block != next_block && __any_sync(whole_warp, weight != 0.0f);
            if (!ready) return;
            const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block);
            __syncwarp();  // the last ones have been read
            for (int at = 16 * (threadIdx.x % 32); at < 4 * D; at += 16 * 32) {
                if (transform.scale) copy_to_shared<0, 0>(place + at, reinterpret_cast<u64>(transform.scale) + at);
                if (transform.shift) copy_to_shared<4 * D, 0>(place + at, reinterpret_cast<u64>(transform.shift) + at);
            }
            commit_copies();
        };
        weight = weight_of(0);
        ask_affine();
#pragma unroll 1
        for (int split = 0; split < count; ++split) {
            const float factor = factor_of(split);
#pragma unroll
            for (int k = 0; k < per_lane; ++k) row[k] += factor * next[k];
            ask_row(split + 1);
            if (ready) {
                const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block);
                turn_back<D>(row, p.transform, transform, buffer + query * D, lane);
                wait_for_copies<0>();
                __syncwarp();
#pragma unroll
                for (int k = 0; k < per_lane; ++k) {
                    if (transform.scale) row[k] *= affines[warp][0][lane + 16 * k];
                    output[k] += row[k] + (transform.shift ? weight * affines[warp][1][lane + 16 * k] : 0.0f);
                    row[k] = 0.0f;
                }
            }
            if (split + 1 == count) break;
            weight = weight_of(split + 1) + (block == next_block ? weight : 0.0f);
            block = next_block, next_block = block_of(split + 2);
            ask_affine();
        }
    }
    if (!exists) return;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) to()[state_head + lane + 16 * k] = output[k];
}

constexpr int merge_slices = row_threads / row_lanes, merge_threads = row_threads, merged_at_once = 4;
template <int D>
using MergeSlices = U32x4[merge_slices][1 + D / 4];
/// Loads of 16 bytes a lane for a row of a state.
constexpr int merge_loads(int head_dim) { return (head_dim / 4 + row_lanes - 1) / row_lanes; }

/// Output rows of a kv head's queries from `first_query` on, `slices` (a power of two) of a block's eight for each, `at_once` states of a slice on their
/// way. Queries that see nothing get zeros, as torch's attention gives them.
template <class T, int D, int at_once>
__device__ __forceinline__ void merge_queries(const MergeParams& p, int batch, int kv_head, int first_query, int slices, MergeSlices<D>& joined_by) {
    constexpr int loads = merge_loads(D);
    const int group = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, slice = group % slices, query = first_query + group / slices;
    const QueryPlace place = query_at(kv_head, p.group, p.length, query);
    const U32x4* states = reinterpret_cast<const U32x4*>(state_at(p.states, batch, kv_head * p.query_tiles + query / query_tile,
                                                                  p.kv_heads * p.query_tiles, query % query_tile, p.state_count, 0, D));

    // The sink's logit is a state without an output.
    const bool has_sink = p.sink_logits && slice == 0 && place.exists;
    const float sink = has_sink ? reinterpret_cast<const float*>(p.sink_logits)[place.head] : -infinity();
    float largest = sink, sum = sink == -infinity() ? 0.0f : 1.0f, output[4 * loads] = {};
    for (int next = slice; place.exists && next < p.state_count; next += slices * at_once) {
        U32x4 heads[at_once], rows[at_once][loads];
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const U32x4* from = states + static_cast<i64>(min(next + i * slices, p.state_count - 1)) * (1 + D / 4);
            heads[i] = from[0];
#pragma unroll
            for (int k = 0; k < loads; ++k) {
                if (lane + row_lanes * k < D / 4) rows[i][k] = from[1 + lane + row_lanes * k];
            }
        }
        float joint = largest;
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            if (next + i * slices < p.state_count) joint = fmaxf(joint, __uint_as_float(heads[i].x));
        }
        const float moved = state_factor(largest, sum, joint);
        largest = joint;
        sum *= moved;
#pragma unroll
        for (float& element : output) element *= moved;
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const float factor = state_factor(__uint_as_float(heads[i].x), __uint_as_float(heads[i].y), joint);
            if (next + i * slices >= p.state_count || factor == 0.0f) continue;
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
    if (lane == 0) joined_by[group][0] = {__float_as_uint(largest), __float_as_uint(sum), 0, 0};
#pragma unroll
    for (int k = 0; k < loads; ++k) {
        if (lane + row_lanes * k < D / 4)
            joined_by[group][1 + lane + row_lanes * k] = {__float_as_uint(output[4 * k]), __float_as_uint(output[4 * k + 1]),
                                                       __float_as_uint(output[4 * k + 2]), __float_as_uint(output[4 * k + 3])};
    }
    __syncthreads();
    if (!place.exists) return;
    auto number = [&](int i, int at) { return reinterpret_cast<const float*>(joined_by[group - slice + i])[at]; };
    float joint = -infinity(), factors[merge_slices], total = 0.0f;
#pragma unroll
    for (int i = 0; i < merge_slices; ++i) {
        if (i < slices) joint = fmaxf(joint, number(i, 0));
    }
#pragma unroll
    for (int i = 0; i < merge_slices; ++i) {
        factors[i] = i < slices ? state_factor(number(i, 0), number(i, 1), joint) : 0.0f;
        if (factors[i] != 0.0f) total += factors[i] * number(i, 1);
    }
    T* to = reinterpret_cast<T*>(p.output) + batch * p.output_batch_stride + place.head * p.output_head_stride +
            place.position * p.output_position_stride;
    for (int channel = slice * row_lanes + lane; channel < D; channel += slices * row_lanes) {
        float joined = 0.0f;
#pragma unroll
        for (int i = 0; i < merge_slices; ++i) {
            if (factors[i] != 0.0f) joined += factors[i] * number(i, state_head + channel);
        }
        to[channel] = Narrow<T>::from(total == 0.0f ? 0.0f : joined / total);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(merge_threads) merge(const __grid_constant__ MergeParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    __shared__ MergeSlices<D> slices;
    const int queries = p.group * p.length;
    merge_queries<T, D, merged_at_once>(p, blockIdx.y, blockIdx.x / queries, blockIdx.x % queries, merge_slices, slices);
}

}  // namespace skvq

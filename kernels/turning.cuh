// q·m(t) of packed keys whose mean turns with the position (FORMAT.md §6), for attend.cuh's bias.
//
// Is: one number a query and packed row, in f32. Is not: fused: it writes and attend reads 4 bytes a query and row.
// With μ at position 0 turned by t, q·m(t) = Σ_c q_c·(μ_c·C_c(t) + ν_c·S_c(t)): for a span of 256 positions the amplitudes
// a_c = q_c·(μ_c·cos + ν_c·sin) and b_c = q_c·(ν_c·cos − μ_c·sin) of the span's angle, then Σ a_c·cos(jθ_c) + b_c·sin(jθ_c) for its rows.
// Grid: spans that the capacity touches × (kv heads · query tiles) × batch; block: 128 threads, two rows each, for the queries of a tile that exist.
// The cosines and sines of the 256 steps pass through shared memory, some at a time: a thread's own row of them lies apart from its neighbour's.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int turning_waves = 16;  // of the steps in shared memory
constexpr int turning_steps = 256, steps_per_thread = turning_steps / row_threads;

/// Σ of the amplitudes of the first `Queries` queries by the waves of all steps, to `bias`, a query's numbers `capacity` apart.
template <int D, int Queries>
__device__ __forceinline__ void turn_span(const float (*amplitudes)[query_tile], float (*near)[turning_waves + 1], const float* steps, float* bias,
                                          i64 capacity, int queries, int first_row, int packed) {
    float sums[steps_per_thread][Queries] = {};
    for (int wave = 0; wave < 2 * D; wave += turning_waves) {
        __syncthreads();
        for (int index = threadIdx.x; index < turning_steps * turning_waves; index += row_threads) {
            const int step = index / turning_waves, which = index % turning_waves;
            near[step][which] = steps[static_cast<i64>(step) * 2 * D + wave + which];
        }
        __syncthreads();
#pragma unroll
        for (int which = 0; which < turning_waves; ++which) {
#pragma unroll
            for (int n = 0; n < steps_per_thread; ++n) {
                const float factor = near[threadIdx.x + n * row_threads][which];
#pragma unroll
                for (int query = 0; query < Queries; ++query) sums[n][query] += amplitudes[wave + which][query] * factor;
            }
        }
    }
    for (int n = 0; n < steps_per_thread; ++n) {
        const int row = first_row + static_cast<int>(threadIdx.x) + n * row_threads;
        if (row < 0 || row >= packed) continue;
#pragma unroll
        for (int query = 0; query < Queries; ++query) {
            if (query < queries) bias[query * capacity + row] = sums[n][query];
        }
    }
}

template <class T, int D>
__global__ void __launch_bounds__(row_threads) turning(const __grid_constant__ TurningParams p) {
    alignas(16) __shared__ float amplitudes[2 * D][query_tile];
    __shared__ float near[turning_steps][turning_waves + 1];
    const int head_tile = blockIdx.y, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles, head = head_tile / p.query_tiles;
    const int origin = reinterpret_cast<const i32*>(p.origins)[batch], packed = reinterpret_cast<const i32*>(p.lengths)[0];
    // Spans are cut at multiples of 256 of the position, not of the row.
    const int first_span = origin >= 0 ? origin / 256 : -((255 - origin) / 256), span = first_span + static_cast<int>(blockIdx.x);
    const int first_row = span * 256 - origin, first_query = head_tile % p.query_tiles * query_tile;
    if (first_row >= packed) return;
    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, 0);
    const float* far = reinterpret_cast<const float*>(p.transform.spans) + static_cast<i64>(span - p.transform.first_span) * 2 * D;
    for (int index = threadIdx.x; index < query_tile * D; index += row_threads) {
        const int query = index / D, channel = index % D;
        const QueryPlace place = query_at(head, p.group, p.length, first_query + query);
        float cosine = 0.0f, sine = 0.0f;
        if (place.exists) {
            const T* from = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                            place.position * p.query_position_stride;
            const float q = widen(from[channel]) * p.scale, mean = transform.shift[channel], quarter = transform.shift_sine[channel];
            cosine = q * (mean * far[channel] + quarter * far[D + channel]);
            sine = q * (quarter * far[channel] - mean * far[D + channel]);
        }
        amplitudes[channel][query] = cosine;
        amplitudes[D + channel][query] = sine;
    }
    const float* steps = reinterpret_cast<const float*>(p.transform.steps);
    float* bias = reinterpret_cast<float*>(p.bias) + (static_cast<i64>(batch) * head_tiles + head_tile) * query_tile * p.capacity;
    const int queries = min(query_tile, p.group * p.length - first_query);
    if (queries <= 1) turn_span<D, 1>(amplitudes, near, steps, bias, p.capacity, queries, first_row, packed);
    else if (queries <= 4) turn_span<D, 4>(amplitudes, near, steps, bias, p.capacity, queries, first_row, packed);
    else turn_span<D, query_tile>(amplitudes, near, steps, bias, p.capacity, queries, first_row, packed);
}

}  // namespace skvq

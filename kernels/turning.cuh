// q·m(t) of packed keys whose mean turns with the position (FORMAT.md §6), for attend.cuh's bias.
//
// Is: one number a query and packed row, in f32. Is not: fused: it writes and attend reads 4 bytes a query and row.
// With μ at position 0 turned by t, q·m(t) = Σ_c q_c·(μ_c·C_c(t) + ν_c·S_c(t)): for a span of 256 positions the amplitudes
// a_c = q_c·(μ_c·cos + ν_c·sin) and b_c = q_c·(ν_c·cos − μ_c·sin) of the span's angle, then Σ a_c·cos(jθ_c) + b_c·sin(jθ_c) for its rows.
// Grid: spans that the capacity touches × (kv heads · query tiles) × batch; block: 128 threads, 8 queries at a time.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

template <class T, int D>
__global__ void __launch_bounds__(row_threads) turning(const __grid_constant__ TurningParams p) {
    __shared__ float amplitudes[query_tile * 2 * D];
    const int head_tile = blockIdx.y, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles, head = head_tile / p.query_tiles;
    const int origin = reinterpret_cast<const i32*>(p.origins)[batch], packed = reinterpret_cast<const i32*>(p.lengths)[0];
    // Spans are cut at multiples of 256 of the position, not of the row.
    const int first_span = origin >= 0 ? origin / 256 : -((255 - origin) / 256), span = first_span + static_cast<int>(blockIdx.x);
    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, 0);
    const float* far = reinterpret_cast<const float*>(p.transform.spans) + static_cast<i64>(span - p.transform.first_span) * 2 * D;
    const bool reached = span * 256 - origin < packed;
    for (int index = threadIdx.x; index < query_tile * D; index += row_threads) {
        const int query = index / D, channel = index % D;
        const QueryPlace place = query_at(head, p.group, p.length, head_tile % p.query_tiles * query_tile + query);
        float cosine = 0.0f, sine = 0.0f;
        if (place.exists && reached) {
            const T* from = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                            place.position * p.query_position_stride;
            const float q = widen(from[channel]) * p.scale, mean = transform.shift[channel], quarter = transform.shift_sine[channel];
            cosine = q * (mean * far[channel] + quarter * far[D + channel]);
            sine = q * (quarter * far[channel] - mean * far[D + channel]);
        }
        amplitudes[query * 2 * D + channel] = cosine;
        amplitudes[query * 2 * D + D + channel] = sine;
    }
    __syncthreads();
    for (int step = threadIdx.x; step < 256; step += row_threads) {
        const int row = span * 256 + step - origin;
        if (row < 0 || row >= packed) continue;
        const float* near = reinterpret_cast<const float*>(p.transform.steps) + static_cast<i64>(step) * 2 * D;
        float sums[query_tile] = {};
        for (int wave = 0; wave < 2 * D; ++wave) {
            for (int query = 0; query < query_tile; ++query) sums[query] += amplitudes[query * 2 * D + wave] * near[wave];
        }
        for (int query = 0; query < query_tile; ++query) {
            const i64 at = (static_cast<i64>(batch) * head_tiles + head_tile) * query_tile + query;
            reinterpret_cast<float*>(p.bias)[at * p.capacity + row] = sums[query];
        }
    }
}

}  // namespace skvq

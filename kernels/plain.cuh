// Attention over rows in the model's type: sinks, window, and rows that a call brings along.
//
// Is: the same partial states as attend.cuh, in the model's space. Is not: tuned for long regions; these are a few hundred rows.
// Grid: splits × (kv heads · query tiles) × batch; block: 128 threads, 16 for each of 8 queries, which read the same rows. The window is a ring.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int region_sinks = 0, region_window = 1, region_fresh = 2;

/// Rows of a region, the token that its row 0 is, and the first row that may be seen.
struct RegionRows {
    int count, token, first_visible;

    /// In a padded sequence the sinks are the tokens behind the padding, and rows before padding + sinks tokens are nobody's.
    __device__ __forceinline__ RegionRows(const PlainParams& p, const i32* lengths, int padding) {
        const int packed = lengths[0], sinks = lengths[1], window = lengths[2], stored = packed + sinks + window;
        if (p.region == region_sinks) {
            token = padding;
            count = max(0, min(sinks, stored - padding));
            first_visible = 0;
        } else if (p.region == region_window) {
            token = sinks + packed;
            count = window;
            first_visible = padding ? max(0, padding + sinks - token) : 0;
        } else {
            token = stored;
            count = p.fresh_rows;
            first_visible = max(0, padding - token);
        }
    }
};

template <class T, int Dk, int Dv>
__global__ void __launch_bounds__(row_threads) plain(const __grid_constant__ PlainParams p) {
    const int split = blockIdx.x, batch = blockIdx.z, head_tile = blockIdx.y, head_tiles = p.kv_heads * p.query_tiles;
    const int head = head_tile / p.query_tiles, query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    const QueryPlace place = query_at(head, p.group, p.length, head_tile % p.query_tiles * query_tile + query);
    const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
    const QueryView view(p.mask, batch, place, p.length, total_tokens(p.mask, lengths));
    const RegionRows rows(p, lengths, padding_of(p.mask, batch));
    const int first = max(split * p.rows_per_split, rows.first_visible), end = min(rows.count, (split + 1) * p.rows_per_split);

    float q[Dk / 16], output[Dv / 16] = {}, maximum = -infinity(), sum = 0.0f;
    const T* from = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                    place.position * p.query_position_stride;
#pragma unroll
    for (int k = 0; k < Dk / 16; ++k) q[k] = place.exists ? widen(from[lane + 16 * k]) * p.scale : 0.0f;
    const T* key = reinterpret_cast<const T*>(p.key_rows) + batch * p.key_batch_stride + head * p.key_head_stride;
    const T* value = reinterpret_cast<const T*>(p.value_rows) + batch * p.value_batch_stride + head * p.value_head_stride;

    for (int row = first; row < end; ++row) {
        const int place = p.ring_rows ? (p.ring_first + row) % p.ring_rows : row;
        float score = 0.0f;
#pragma unroll
        for (int k = 0; k < Dk / 16; ++k) score += q[k] * widen(key[place * p.key_row_stride + lane + 16 * k]);
        score = add_lanes(score);
        score = view.apply(p.mask, score, rows.token + row);
        if (score == -infinity()) continue;
        if (score > maximum) {
            const float factor = maximum == -infinity() ? 0.0f : exp2_fast((maximum - score) * log2_e);
            sum *= factor;
            for (float& element : output) element *= factor;
            maximum = score;
        }
        // Only a NaN can leave the maximum at −∞, and stays one.
        const float weight = exp2_fast((score - maximum) * log2_e);
        sum += weight;
#pragma unroll
        for (int k = 0; k < Dv / 16; ++k) output[k] += weight * widen(value[place * p.value_row_stride + lane + 16 * k]);
    }
    float* to = state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, p.first_state + split, Dv);
    if (lane == 0) to[0] = maximum, to[1] = sum, to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < Dv / 16; ++k) to[state_head + lane + 16 * k] = output[k];
}

}  // namespace skvq

// Attention over rows in the model's type: sinks, window, rows that a call brings along, and a past that is not packed.
//
// Is: the same partial states as attend.cuh, in the model's space. Is not: tuned for long regions; these are a few hundred rows.
// Grid: splits × (kv heads · query tiles) × batch; block: 128 threads, 16 for each of 8 queries, which read the same rows. The window is a ring;
// a past lies in pages of 128 rows, or has been decoded for the call where only its other stream is packed.
#pragma once
#include "layout.cuh"
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int region_sinks = 0, region_window = 1, region_fresh = 2, region_past = 3;

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
        } else if (p.region == region_past) {
            token = sinks;
            count = packed;
            first_visible = padding;  // and so many tokens behind the sinks' places
        } else {
            token = stored;
            count = p.fresh_rows;
            first_visible = max(0, padding - token);
        }
    }
};

template <class T, int D>
__device__ __forceinline__ const T* paged_row(const u64* pages, int row) {
    return reinterpret_cast<const T*>(pages[row / page_rows]) + row % page_rows * D;
}

/// Rows whose loads are on their way together: one at a time is all latency.
constexpr int rows_at_once = 4;

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
    const i64 pages = (static_cast<i64>(batch) * p.kv_heads + head) * p.table_pages;
    const u64* key_pages = p.key_table ? reinterpret_cast<const u64*>(p.key_table) + pages : nullptr;
    const u64* value_pages = p.value_table ? reinterpret_cast<const u64*>(p.value_table) + pages : nullptr;

    const int ring_first = p.ring_rows && p.ring_first < 0 ? lengths[3] : p.ring_first;
    for (int next = first; next < end; next += rows_at_once) {
        float scores[rows_at_once], values[rows_at_once][Dv / 16];
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
            const int row = min(next + i, end - 1), place = p.ring_rows ? (ring_first + row) % p.ring_rows : row;
            const T* key_row = key_pages ? paged_row<T, Dk>(key_pages, row) : key + place * p.key_row_stride;
            const T* value_row = value_pages ? paged_row<T, Dv>(value_pages, row) : value + place * p.value_row_stride;
            scores[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < Dk / 16; ++k) scores[i] += q[k] * widen(key_row[lane + 16 * k]);
#pragma unroll
            for (int k = 0; k < Dv / 16; ++k) values[i][k] = widen(value_row[lane + 16 * k]);
        }
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
            const int row = next + i;
            float score = add_lanes(scores[i]);
            if (row >= end) continue;
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
            for (int k = 0; k < Dv / 16; ++k) output[k] += weight * values[i][k];
        }
    }
    float* to = state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, p.first_state + split, Dv);
    if (lane == 0) to[0] = maximum, to[1] = sum, to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < Dv / 16; ++k) to[state_head + lane + 16 * k] = output[k];
}

}  // namespace skvq

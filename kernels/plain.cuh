// Attention over rows in the model's type: sinks, window, rows that a call brings along, and a past that is not packed.
//
// Is: the same partial states as attend.cuh, in the model's space, for all these regions in one launch. Is not: on tensor cores.
// Grid: splits of the regions × (kv heads · query tiles) × batch; block: 128 threads, 8 or 16 lanes to a row, of which each loads 16 bytes at
// a time. Warps share the rows out among them, each for up to four queries of the tile; where the tile has more, half of the warps or a
// quarter take each part of the queries. Short calls are latency: lengths, padding and queries are on their way together, then all rows of a
// split. The window is a ring; a past lies in pages of 128 rows, or has been decoded for the call where only its other stream is packed.
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
    __device__ __forceinline__ RegionRows(int kind, int fresh_rows, const Lengths& lengths, int padding) {
        const int packed = lengths.packed, sinks = lengths.sinks, window = lengths.window, stored = lengths.stored();
        if (kind == region_sinks) {
            token = padding;
            count = max(0, min(sinks, stored - padding));
            first_visible = 0;
        } else if (kind == region_window) {
            token = sinks + packed;
            count = window;
            first_visible = padding ? max(0, padding + sinks - token) : 0;
        } else if (kind == region_past) {
            token = sinks;
            count = packed;
            first_visible = padding;  // and so many tokens behind the sinks' places
        } else {
            token = stored;
            count = fresh_rows;
            first_visible = max(0, padding - token);
        }
    }
};

/// How threads share rows and queries. `Most`: queries of a thread, and rows whose loads are on their way together; 2 takes fewer registers than 4.
template <class T, int Dk, int Dv, int Most>
struct PlainShape {
    static constexpr int channels = 16 / sizeof(T);  // of a load
    static constexpr int lanes = (Dk > Dv ? Dk : Dv) / channels <= 8 ? 8 : 16;
    static constexpr int slots = row_threads / lanes, warp_slots = 32 / lanes;  // rows at a time
    static constexpr int key_loads = (Dk / channels + lanes - 1) / lanes, value_loads = (Dv / channels + lanes - 1) / lanes;
    static constexpr int queries = (key_loads > value_loads ? key_loads : value_loads) * channels <= 8 ? Most : 2;  // of a thread
    static constexpr int rows = lanes == 8 || key_loads + value_loads > 4 ? 2 : Most;
    // Scores of these rows and queries, one in every `apart` lanes of a slot.
    static constexpr int scores = rows * queries, apart = lanes / scores;
    static_assert(scores <= lanes, "a lane has one score");
};

/// 16 bytes of a row. `wide`: they lie at a multiple of 16.
template <class T>
__device__ __forceinline__ U32x4 load_chunk(const T* from, bool wide) {
    if (wide) return load_streaming(reinterpret_cast<const U32x4*>(from));
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            words[i] = load_streaming(reinterpret_cast<const u32*>(from) + i);
        } else {
            const u16* pair = reinterpret_cast<const u16*>(from) + 2 * i;
            words[i] = load_streaming(pair) | static_cast<u32>(load_streaming(pair + 1)) << 16;
        }
    }
    return {words[0], words[1], words[2], words[3]};
}
__device__ __forceinline__ void widen_word(u32 word, float* to, float) { to[0] = __uint_as_float(word); }
__device__ __forceinline__ void widen_word(u32 word, float* to, Half) { widen_halves(word, to[0], to[1]); }
__device__ __forceinline__ void widen_word(u32 word, float* to, BFloat) {
    to[0] = __uint_as_float(word << 16), to[1] = __uint_as_float(word & 0xffff0000u);
}

/// A lane's channels of a row of D: 16 bytes from every 16·lanes bytes, nothing where the row has ended.
template <class T, int D, int loads, int lanes>
struct LaneRow {
    static constexpr int channels = 16 / sizeof(T), count = loads * channels;
    U32x4 chunks[loads];

    __device__ __forceinline__ void load(const T* row, int lane, bool wide) {
#pragma unroll
        for (int k = 0; k < loads; ++k) {
            const int channel = (lane + lanes * k) * channels;
            chunks[k] = channel < D ? load_chunk(row + channel, wide) : U32x4{0, 0, 0, 0};
        }
    }
    __device__ __forceinline__ void widen_to(float (&to)[count]) const {
#pragma unroll
        for (int k = 0; k < loads; ++k) {
            const u32 words[4] = {chunks[k].x, chunks[k].y, chunks[k].z, chunks[k].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) widen_word(words[i], to + k * channels + i * channels / 4, T{});
        }
    }
};

/// Where the rows of one (sequence, kv head) lie.
template <class T, int D>
struct RowPlaces {
    const T* rows;
    const u64* pages;  // or null
    i64 stride;

    __device__ __forceinline__ RowPlaces(u64 rows, i64 offset, i64 stride, u64 table, i64 pages)
        : rows(reinterpret_cast<const T*>(rows) + offset), pages(table ? reinterpret_cast<const u64*>(table) + pages : nullptr), stride(stride) {}
    __device__ __forceinline__ const T* in_page(int row) const { return reinterpret_cast<const T*>(pages[row / page_rows]) + row % page_rows * D; }
};

/// Whether all rows lie at multiples of 16 bytes. Pages do.
template <class T>
__device__ __forceinline__ bool lies_wide(u64 rows, i64 batch_stride, i64 head_stride, i64 row_stride) {
    return ((rows | static_cast<u64>((batch_stride | head_stride | row_stride) * sizeof(T))) & 15) == 0;
}

/// Sums over a slot's lanes of `count` numbers: number i in the lanes from i·lanes / count on, as many lanes for each.
template <int lanes, int count>
__device__ __forceinline__ float scatter_sums(float (&numbers)[count], int lane) {
    int left = count;
#pragma unroll
    for (int distance = lanes / 2; distance >= 1; distance /= 2) {
        if (left == 1) {
            numbers[0] += __shfl_xor_sync(whole_warp, numbers[0], distance);
            continue;
        }
        left /= 2;
        const bool high = lane & distance;
#pragma unroll
        for (int i = 0; i < count / 2; ++i) {
            if (i >= left) break;
            const float sent = high ? numbers[i] : numbers[i + left], kept = high ? numbers[i + left] : numbers[i];
            numbers[i] = kept + __shfl_xor_sync(whole_warp, sent, distance);
        }
    }
    return numbers[0];
}

/// Some queries of a tile, and what a slot of lanes has seen for them.
template <class T, int Dk, int Dv, int Most>
struct PlainQueries {
    using Shape = PlainShape<T, Dk, Dv, Most>;
    using KeyRow = LaneRow<T, Dk, Shape::key_loads, Shape::lanes>;
    using ValueRow = LaneRow<T, Dv, Shape::value_loads, Shape::lanes>;
    static constexpr int queries = Shape::queries, rows = Shape::rows, lanes = Shape::lanes;
    float query[queries][KeyRow::count], output[queries][ValueRow::count];
    QueryView view;  // of the query whose scores this lane has
    float maximum, sum;  // of the same; the sum is that of this lane's scores

    /// Joins the lanes that have the same query.
    template <class F>
    static __device__ __forceinline__ float fold_rows(float value, const F& join) {
#pragma unroll
        for (int distance = lanes / 2; distance >= Shape::apart * queries; distance /= 2)
            value = join(value, __shfl_xor_sync(whole_warp, value, distance));
        return value;
    }
    /// Number i of the slot's scores.
    static __device__ __forceinline__ float of_lane(float value, int i) { return __shfl_sync(whole_warp, value, i * Shape::apart, lanes); }

    /// Rows next + slot, next + slot + slots, … before `end`, row 0 being token `token`.
    __device__ __forceinline__ void take(const KeyRow (&keys)[rows], const ValueRow (&values)[rows], const MaskParams& mask, int own_row, int end,
                                         int token, int lane) {
        float products[Shape::scores] = {};
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            float key[KeyRow::count];
            keys[i].widen_to(key);
#pragma unroll
            for (int q = 0; q < queries; ++q) {
#pragma unroll
                for (int c = 0; c < KeyRow::count; ++c) products[i * queries + q] += query[q][c] * key[c];
            }
        }
        float score = scatter_sums<lanes>(products, lane);
        score = own_row < end ? view.apply(mask, score, token + own_row) : -infinity();
        const float largest = fmaxf(maximum, fold_rows(score, [](float a, float b) { return fmaxf(a, b); }));
        const float factor = maximum == -infinity() ? 0.0f : exp2_fast((maximum - largest) * log2_e);
        maximum = largest;
        sum *= factor;
        // A row that is not seen keeps −∞ for a weight. Only a NaN can leave the maximum at −∞, and stays one.
        const float weight = score == -infinity() ? score : exp2_fast((score - largest) * log2_e);
        if (weight != -infinity()) sum += weight;
#pragma unroll
        for (int q = 0; q < queries; ++q) {
            const float moved = of_lane(factor, q);
#pragma unroll
            for (float& element : output[q]) element *= moved;
        }
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            float value[ValueRow::count];
            values[i].widen_to(value);
#pragma unroll
            for (int q = 0; q < queries; ++q) {
                const float seen = of_lane(weight, i * queries + q);
                if (seen == -infinity()) continue;
#pragma unroll
                for (int c = 0; c < ValueRow::count; ++c) output[q][c] += seen * value[c];
            }
        }
    }
};

template <class T, int Dk, int Dv, int Most>
constexpr int plain_bytes = PlainShape<T, Dk, Dv, Most>::slots * PlainShape<T, Dk, Dv, Most>::queries * (state_head + Dv) * 4;

/// A split of the regions' rows, number `which` of all: its state, for the queries of a tile. `buffer` [plain_bytes / 16].
template <class T, int Dk, int Dv, int Most>
__device__ __forceinline__ void plain_split(const PlainParams& p, int which, int head_tile, int batch, U32x4* buffer) {
    using Shape = PlainShape<T, Dk, Dv, Most>;
    using Queries = PlainQueries<T, Dk, Dv, Most>;
    constexpr int warps = row_threads / 32, most_parts = query_tile / Shape::queries, width = state_head + Dv;
    static_assert(most_parts <= warps, "each part of the queries has a warp");
    float* seen = reinterpret_cast<float*>(buffer);  // [slots, queries of a part, 4 + Dv], as states

    const int head_tiles = p.kv_heads * p.query_tiles;
    const int head = head_tile / p.query_tiles, first_query = head_tile % p.query_tiles * query_tile;
    const int count = min(query_tile, p.group * p.length - first_query);
    if (count <= 0) return wait_for_earlier_launches();
    int split = which, index = 0;
    while (split >= p.regions[index].splits) split -= p.regions[index++].splits;
    const PlainRegion& region = p.regions[index];
    const Lengths lengths(p.lengths, p.enter);
    const int padding = padding_of(p.mask, batch), total = lengths.total(p.mask);

    int parts = 1;
    while (parts * Shape::queries < count) parts *= 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % Shape::lanes, part = warp % parts, slots = Shape::slots / parts;
    const int slot = warp / parts * Shape::warp_slots + threadIdx.x % 32 / Shape::lanes;
    const int own_score = lane / Shape::apart, own_query = own_score % Shape::queries;
    Queries own;
    own.maximum = -infinity(), own.sum = 0.0f;
    const T* query_rows[Shape::queries];
    const bool query_wide = lies_wide<T>(p.query, p.query_batch_stride, p.query_head_stride, p.query_position_stride);
    // In place of one that does not exist the last one, but it sees nothing.
    QueryPlace place = query_at(head, p.group, p.length, first_query + min(part * Shape::queries, count - 1)), own_place = place;
#pragma unroll
    for (int q = 0; q < Shape::queries; ++q) {
        query_rows[q] = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                        place.position * p.query_position_stride;
        if (q == own_query) own_place = place;
        if (part * Shape::queries + q + 1 < count && ++place.position == p.length) place.position = 0, ++place.head;
#pragma unroll
        for (float& element : own.output[q]) element = 0.0f;
    }
    own_place.exists = part * Shape::queries + own_query < count;
    own.view = QueryView(p.mask, batch, own_place, p.length, total);
    typename Queries::KeyRow query_loads[Shape::queries];
    auto load_queries = [&](bool wide) {
#pragma unroll
        for (int q = 0; q < Shape::queries; ++q) query_loads[q].load(query_rows[q], lane, wide);
    };
    if (query_wide) load_queries(true);
    else load_queries(false);

    const RegionRows rows(region.kind, p.fresh_rows, lengths, padding);
    // No query of the tile sees what is behind the last one's token.
    const int last_position = min(first_query % p.length + count, p.length) - 1;
    const int visible = p.mask.causal ? min(rows.count, total - p.length + last_position + 1 - rows.token) : rows.count;
    const int first = max(split * region.rows_per_split, rows.first_visible), end = min(visible, (split + 1) * region.rows_per_split);
    const int ring_first = region.ring_first < 0 ? lengths.first : region.ring_first;
    const i64 pages = (static_cast<i64>(batch) * p.kv_heads + head) * region.table_pages;
    const RowPlaces<T, Dk> keys(region.key_rows, batch * region.key_batch_stride + head * region.key_head_stride, region.key_row_stride,
                                region.key_table, pages);
    const RowPlaces<T, Dv> values(region.value_rows, batch * region.value_batch_stride + head * region.value_head_stride,
                                  region.value_row_stride, region.value_table, pages);
    const bool wide = lies_wide<T>(region.key_rows, region.key_batch_stride, region.key_head_stride, region.key_row_stride) &&
                      lies_wide<T>(region.value_rows, region.value_batch_stride, region.value_head_stride, region.value_row_stride);
    for (int next = first; next < end; next += slots * Shape::rows) {
        const T *key_rows[Shape::rows], *value_rows[Shape::rows];
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i) {
            int ring_place = ring_first + min(next + slot + slots * i, end - 1);
            if (region.ring_rows && ring_place >= region.ring_rows) ring_place -= region.ring_rows;
            key_rows[i] = keys.rows + ring_place * keys.stride, value_rows[i] = values.rows + ring_place * values.stride;
        }
        if (keys.pages || values.pages) {
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) {
                const int row = min(next + slot + slots * i, end - 1);
                if (keys.pages) key_rows[i] = keys.in_page(row);
                if (values.pages) value_rows[i] = values.in_page(row);
            }
        }
        typename Queries::KeyRow key_loads[Shape::rows];
        typename Queries::ValueRow value_loads[Shape::rows];
        auto load = [&](bool wide) {
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) key_loads[i].load(key_rows[i], lane, wide);
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) value_loads[i].load(value_rows[i], lane, wide);
        };
        // Each kind without jumps between its loads.
        if (wide) load(true);
        else load(false);
        if (next == first) {
            // Not before the first rows are on their way: queries may still be.
#pragma unroll
            for (int q = 0; q < Shape::queries; ++q) {
                query_loads[q].widen_to(own.query[q]);
#pragma unroll
                for (float& element : own.query[q]) element *= p.scale;
            }
        }
        own.take(key_loads, value_loads, p.mask, next + slot + slots * (own_score / Shape::queries), end, rows.token, lane);
    }

    own.sum = Queries::fold_rows(own.sum, [](float a, float b) { return a + b; });
    float* to_slot = seen + (part * slots + slot) * Shape::queries * width;
    if (lane % Shape::apart == 0 && own_score < Shape::queries) to_slot[own_query * width] = own.maximum, to_slot[own_query * width + 1] = own.sum;
#pragma unroll
    for (int q = 0; q < Shape::queries; ++q) {
#pragma unroll
        for (int c = 0; c < Queries::ValueRow::count; c += 4) {
            const int channel = (lane + Shape::lanes * (c / Shape::channels)) * Shape::channels + c % Shape::channels;
            const float* four = own.output[q] + c;
            if (channel < Dv)
                *reinterpret_cast<U32x4*>(to_slot + q * width + state_head + channel) = {
                    __float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]), __float_as_uint(four[3])};
        }
    }
    wait_for_earlier_launches();
    __syncthreads();
    // From here on 16 threads for each query, which join what the slots of its part have seen.
    const int query = threadIdx.x / row_lanes, channel = threadIdx.x % row_lanes;
    if (query >= count) return;
    const float* from = seen + (query / Shape::queries * slots * Shape::queries + query % Shape::queries) * width;
    const int step = Shape::queries * width;
    float largest = -infinity(), sum = 0.0f, output[Dv / 16] = {};
    for (int i = 0; i < slots; ++i) largest = fmaxf(largest, from[i * step]);
    for (int i = 0; i < slots; ++i) {
        const float factor = state_factor(from[i * step], from[i * step + 1], largest);
        if (factor == 0.0f) continue;
        sum += factor * from[i * step + 1];
#pragma unroll
        for (int k = 0; k < Dv / 16; ++k) output[k] += factor * from[i * step + state_head + channel + 16 * k];
    }
    float* to = state_at(p.states, batch, head_tile, head_tiles, query, p.state_count, which, Dv);
    if (channel == 0) to[0] = largest, to[1] = sum, to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < Dv / 16; ++k) to[state_head + channel + 16 * k] = output[k];
}

template <class T, int Dk, int Dv>
__global__ void __launch_bounds__(row_threads) plain(const __grid_constant__ PlainParams p) {
    let_next_launch_begin();
    __shared__ U32x4 buffer[plain_bytes<T, Dk, Dv, 4> / 16];
    plain_split<T, Dk, Dv, 4>(p, blockIdx.x, blockIdx.y, blockIdx.z, buffer);
}

}  // namespace skvq

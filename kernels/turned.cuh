// q·m(t) of packed keys whose mean turns with the position (FORMAT.md §6), by the blocks of attend_once.cuh themselves, page by page.
//
// Is: what turning.cuh writes for others, for heads of up to 128 channels and layers of f16 and bf16, and nothing of it in memory, but A and B of many queries, for
// attend_many.cuh. Is not: f32, wider heads, nine to 63 queries, calls of more launches (turning.cuh); scores (attend.cuh).
// With μ at position 0 turned by t, A = Σ q_c·μ_c and B = Σ q_c·ν_c over the channels of a frequency θ, q·m(P + r) of row r of a page whose first row has
// position P is the sum over the frequencies of (A·cos Pθ + B·sin Pθ)·cos rθ + (B·cos Pθ − A·sin Pθ)·sin rθ: for a row block a product of
//
//     cosines and sines of its rows [16, waves], the same for all pages · amplitudes of the page [waves, 8 queries]  =  [16 rows, 8 queries], as scores lie
//     fragments of a table in memory that the first-level cache keeps     in shared memory, those of the next page made by all threads meanwhile
//
// Both are f16 with f32 sums, amplitudes after division by a power of two a query: 2^-12 of each side, which is what keys of f16 would have lost. cos Pθ and sin
// Pθ are read at a split's first page and turned by 128·θ from page to page, up to 4·10^-8 off each time: after 3000 pages, which only the longest splits of a full
// device have, as much as f16 rounds off.
#pragma once
#include "layout.cuh"
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

/// Numbers of a frequency that belong to a cosine and to a sine.
struct alignas(8) Waves {
    float cosine, sine;
};

/// Positions between two rows of the table of spans.
constexpr int span_rows = 256;
__device__ __forceinline__ int span_of(int position) { return position >= 0 ? position / span_rows : -((span_rows - 1 - position) / span_rows); }

/// The angle of both together.
__device__ __forceinline__ Waves turned(const Waves& a, const Waves& b) {
    return {a.cosine * b.cosine - a.sine * b.sine, a.sine * b.cosine + a.cosine * b.sine};
}

/// Adds a channel to A and B of its frequency.
template <class T>
__device__ __forceinline__ void add_channel(Waves& sum, const T* query, float scale, const HeadTransform& transform, int channel) {
    const float q = widen(query[channel]) * scale;
    sum.cosine += q * transform.shift[channel];
    sum.sine += q * transform.shift_sine[channel];
}

/// Of a tile of queries: A and B over their query's unit, and the units.
template <int D>
struct TileWaves {
    static constexpr int frequencies = D / 2;
    Waves factors[query_tile][frequencies];
    float units[query_tile];
};

/// Writes those of a kv head's tile: 16 threads for each query, all threads of the block.
template <class T, int D>
__device__ __forceinline__ void fold_waves(const FoldParams& p, const WaveParams& waves, int batch, int head, int tile, TileWaves<D>& to) {
    constexpr int most = (D / 2 + row_lanes - 1) / row_lanes;
    const int query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    const QueryPlace place = query_at(head, p.group, p.length, tile * query_tile + query);
    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, 0);
    const i32 *starts = reinterpret_cast<const i32*>(waves.channels), *channels = starts + waves.frequencies + 1;
    const T* from = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                    place.position * p.query_position_stride;
    // What all frequencies need is asked for together: first where their channels begin, then which they are, of which a rotary embedding has two each.
    int first[most], end[most], two[most][2];
#pragma unroll
    for (int k = 0; k < most; ++k) {
        const int frequency = lane + row_lanes * k;
        const bool exists = place.exists && frequency < waves.frequencies;
        first[k] = exists ? starts[frequency] : 0, end[k] = exists ? starts[frequency + 1] : 0;
    }
#pragma unroll
    for (int k = 0; k < most; ++k) {
        for (int i = 0; i < 2; ++i) two[k][i] = first[k] + i < end[k] ? channels[first[k] + i] : -1;
    }
    Waves own[most];
#pragma unroll
    for (int k = 0; k < most; ++k) {
        own[k] = {0.0f, 0.0f};
        for (int i = 0; i < 2; ++i) {
            if (two[k][i] >= 0) add_channel(own[k], from, p.scale, transform, two[k][i]);
        }
    }
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < most; ++k) {
        for (int at = first[k] + 2; at < end[k]; ++at) add_channel(own[k], from, p.scale, transform, channels[at]);
        largest = fmaxf(largest, fabsf(own[k].cosine) + fabsf(own[k].sine));
    }
    const float unit = unit_of(fold_lanes(largest, [](float a, float b) { return fmaxf(a, b); })), inverse = 1.0f / unit;
#pragma unroll
    for (int k = 0; k < most; ++k) {
        const int frequency = lane + row_lanes * k;
        if (frequency < D / 2) to.factors[query][frequency] = {own[k].cosine * inverse, own[k].sine * inverse};
    }
    if (lane == 0) to.units[query] = unit;
}

/// Cosine and sine of a page's first position for a frequency; the first of its channels.
template <int D>
__device__ __forceinline__ Waves waves_at(const WaveParams& waves, int channel, int position) {
    const int span = span_of(position), inner = position - span_rows * span;
    const float* far = reinterpret_cast<const float*>(waves.spans) + static_cast<i64>(span - waves.first_span) * 2 * D + channel;
    const float* near = reinterpret_cast<const float*>(waves.steps) + inner * 2 * D + channel;
    return turned({far[0], far[D]}, {near[0], near[D]});
}
__device__ __forceinline__ int channel_of(const WaveParams& waves, int frequency) {
    const i32* starts = reinterpret_cast<const i32*>(waves.channels);
    return starts[waves.frequencies + 1 + starts[frequency]];
}
/// Of a cosine and a sine at a page.
__device__ __forceinline__ u32 amplitude(const Waves& factor, const Waves& angle) {
    return narrow_to_halves(factor.cosine * angle.cosine + factor.sine * angle.sine, factor.sine * angle.cosine - factor.cosine * angle.sine);
}

/// A and B of many queries to memory, for attend_many.cuh. Grid: 1 × (kv heads · query tiles) × batch.
template <class T, int D>
__global__ void __launch_bounds__(row_threads) fold_turned(const __grid_constant__ FoldTurnedParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    const int tiles = p.fold.query_tiles, head = blockIdx.y / tiles, tile = blockIdx.y % tiles, batch = blockIdx.z;
    TileWaves<D>* to = reinterpret_cast<TileWaves<D>*>(p.factors) + (static_cast<i64>(batch) * p.fold.kv_heads + head) * tiles + tile;
    fold_waves<T, D>(p.fold, p.waves, batch, head, tile, *to);
}

/// Of two tiles of queries, as attend_many.cuh has them on M: a page's amplitudes are made where they are multiplied with its rows.
template <int D>
struct ManyTurned {
    static constexpr bool turns = true;
    static constexpr int steps = D / 16, frequencies = D / 2;
    /// Of shared memory: of two pages, by turns.
    struct Angles {
        Waves of_page[2][frequencies];
    };
    const WaveParams& waves;
    const TileWaves<D>* tiles;  // of the warp
    Angles& angles;
    int page;

    /// Angles of the page, by all threads of the block, which must meet before they are looked at.
    static __device__ __forceinline__ void make(const WaveParams& waves, Angles& angles, int batch, int page) {
        const int frequency = threadIdx.x;
        if (frequency >= frequencies) return;
        const int origin = reinterpret_cast<const i32*>(waves.origins)[batch];
        const bool exists = frequency < waves.frequencies;
        angles.of_page[page % 2][frequency] = exists ? waves_at<D>(waves, channel_of(waves, frequency), origin + page * page_rows) : Waves{0.0f, 0.0f};
    }
    __device__ __forceinline__ float unit(int side, int lane) const { return load_here(tiles[side].units + lane / 4); }
    /// A operand of frequencies 8·Step …, for queries g and g + 8.
    template <int Step>
    __device__ __forceinline__ void operand(u32 (&a)[4], int lane) const {
        for_each<2>([&](auto index) {
            constexpr int half = decltype(index)::value;
            const int frequency = 8 * Step + 4 * half + lane % 4;
            const Waves angle = angles.of_page[page % 2][frequency];
            for (int side = 0; side < 2; ++side) {
                const U32x2 factor = load_here(reinterpret_cast<const U32x2*>(&tiles[side].factors[lane / 4][frequency]));
                a[2 * half + side] = amplitude({__uint_as_float(factor.x), __uint_as_float(factor.y)}, angle);
            }
        });
    }
    /// B operands of rows 0 … 7 and 8 … 15 of row block `First` + Block of the page, a constant table.
    template <int Block, int Step>
    __device__ __forceinline__ U32x4 rows(int first, int lane) const {
        const U32x4 four = load_table<512 * (Block * steps + Step)>(waves.waves + static_cast<u64>(first * steps * 32 + lane) * 16);
        return {four.x, four.z, four.y, four.w};
    }
};
/// Keys without such a mean, or one that a launch before has multiplied.
struct NotTurned {
    static constexpr bool turns = false;
};

/// Of shared memory, while there are pages.
template <int D>
struct TurnedPages {
    static constexpr int steps = D / 16;         // of 8 frequencies
    alignas(16) U32x2 amplitudes[2][steps][32];  // as fragments of B, of two pages
    // Of the frequencies: angles of the next page and the one behind it, by turns, and of a page's rows. In registers they would be spilled.
    Waves turns[2][D / 2], page_turns[D / 2];
};
/// Of a turn without any.
struct NoPages {};

/// What a thread does for the pages of a split, and a warp for its row blocks.
template <int D>
struct TurnedRows {
    static constexpr int steps = D / 16, frequencies = D / 2;
    /// Threads side by side have the frequencies, those behind each other some queries each.
    static constexpr int padded = frequencies <= 32 ? 32 : 64, columns = query_tile * padded / row_threads;

    const WaveParams& waves;
    const TileWaves<D>& tile;
    TurnedPages<D>& shared;
    int origin;  // position of the first packed row

    __device__ __forceinline__ TurnedRows(const WaveParams& waves, const TileWaves<D>& tile, TurnedPages<D>& shared, int batch)
        : waves(waves), tile(tile), shared(shared), origin(reinterpret_cast<const i32*>(waves.origins)[batch]) {}

    __device__ __forceinline__ u64 wave_fragments(int row_block, int lane) const { return waves.waves + (row_block * steps * 32 + lane) * 16; }

    /// Before the first page: its amplitudes will be in buffer 0. All threads of the block, which must meet before it is made.
    __device__ __forceinline__ void begin(int page) const {
        const int frequency = threadIdx.x;
        if (frequency >= frequencies) return;
        Waves turn = {0.0f, 0.0f}, of_page = turn;
        if (frequency < waves.frequencies) {
            const int channel = channel_of(waves, frequency);
            const float* from = reinterpret_cast<const float*>(waves.steps) + page_rows * 2 * D + channel;
            turn = waves_at<D>(waves, channel, origin + page * page_rows), of_page = {from[0], from[D]};
        }
        shared.turns[0][frequency] = turn, shared.page_turns[frequency] = of_page;
    }
    /// Amplitudes of the next page, by all threads of the block.
    __device__ __forceinline__ void make(int buffer) const {
        const int frequency = threadIdx.x % padded, first = threadIdx.x / padded * columns;
        if (frequency < frequencies) {
            const Waves turn = shared.turns[buffer][frequency];
            u32* to = reinterpret_cast<u32*>(&shared.amplitudes[buffer][frequency / 8][4 * first + frequency % 4]) + frequency / 4 % 2;
#pragma unroll
            for (int i = 0; i < columns; ++i) to[8 * i] = amplitude(tile.factors[first + i][frequency], turn);
            if (first == 0) shared.turns[1 - buffer][frequency] = turned(turn, shared.page_turns[frequency]);
        }
    }

    /// Of a query. Not before the loop around it, whose registers it would take.
    __device__ __forceinline__ float unit(int query) const {
        return __uint_as_float(load_shared<0, u32>(shared_place(tile.units + query)));
    }
    /// products[i][2·side + j] of rows g + 8·side of row block first + i of the page, and query 2t + j, over the query's unit.
    template <int Blocks>
    __device__ __forceinline__ void multiply(int buffer, int first, int lane, float (&products)[Blocks][4]) const {
        const u64 from = wave_fragments(first, lane);
        const U32x2* amplitudes = shared.amplitudes[buffer][0] + lane;
        for (auto& of_block : products)
            for (float& product : of_block) product = 0.0f;
        for_each<steps>([&](auto step) {
            constexpr int k = decltype(step)::value;
            const U32x2 pair = amplitudes[32 * k];
            const u32 of_page[2] = {pair.x, pair.y};
            for_each<Blocks>([&](auto index) {
                constexpr int i = decltype(index)::value;
                const U32x4 four = load_table<512 * (i * steps + k)>(from);
                const u32 rows[4] = {four.x, four.y, four.z, four.w};
                multiply_fragments(products[i], rows, of_page);
            });
        });
    }
    /// The same for one row block of the past, by a warp alone.
    __device__ __forceinline__ void multiply_alone(int block, int lane, float (&products)[4]) const {
        const int position = origin + block / blocks_per_page * page_rows, g = lane / 4, t = lane % 4;
        for (float& product : products) product = 0.0f;
#pragma unroll 1
        for (int k = 0; k < steps; ++k) {
            u32 amplitudes[2];
            for (int half = 0; half < 2; ++half) {
                const int frequency = 8 * k + t + 4 * half;
                const bool exists = frequency < waves.frequencies;
                const Waves angle = exists ? waves_at<D>(waves, channel_of(waves, frequency), position) : Waves{0.0f, 0.0f};
                amplitudes[half] = exists ? amplitude(tile.factors[g][frequency], angle) : 0;
            }
            const U32x4 four = load_table<0>(wave_fragments(block % blocks_per_page, lane) + 512 * k);
            const u32 rows[4] = {four.x, four.y, four.z, four.w};
            multiply_fragments(products, rows, amplitudes);
        }
    }
};

/// Whether blocks of attend_once.cuh do it.
template <class K>
constexpr bool may_turn = K::is_parts && K::head_dim <= 128;
template <class T, class K>
constexpr bool turns_inside = sizeof(T) == 2 && may_turn<K>;

}  // namespace skvq

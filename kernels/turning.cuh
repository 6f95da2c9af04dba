// q·m(t) of packed keys whose mean turns with the position (FORMAT.md §6), for attend.cuh's bias.
//
// Is: one number a query and packed row, 15 bits of what is a query's largest possible one (BiasPlace). Is not: fused: it writes and attend reads 2
// bytes a query and row.
// With μ at position 0 turned by t, and A = Σ q_c·μ_c, B = Σ q_c·ν_c over the channels of a frequency θ, q·m(256·i + j) is the sum over the frequencies of
// (A·cos + B·sin)·cos(jθ) + (B·cos − A·sin)·sin(jθ), with cos and sin of 256·i·θ: for the 256 rows of a span a product of
//     cosines and sines of the steps [256, waves] · amplitudes [waves, 8],   two waves a frequency, a column for each (span, query).
// Products are of f16 with f32 sums. Both sides are split into what f16 has of them (high) and what it has of the rest (low), amplitudes after division
// by a power of two a query; high·high + low·high + high·low misses 2^-22 of each. Layers of f16 and bf16 are content with high·high: 2^-12 of each side, which
// is what keys of f16 would have lost.
//
//     warp w, rows 16·w … +15          k-step s, frequencies 8·s … +7                8 columns = 8 / n spans of n queries, n = 1, 2, 4, 8
//     +------------------------+       wave 2·f: cosines, 2·f + 1: sines            +--------+--------+
//     | A: of the table, in    |   ·   B: amplitudes, by all threads, in    =       | span i | span   |  D: · the query's unit, to bias
//     | registers for all items|       shared memory, two items by turns            | q 0…n-1| i + 1 …|
//     +------------------------+                                                    +--------+--------+
//
// Grid: as many blocks as run at once, one a multiprocessor, or fewer; each takes a run of the items, which are (batch, kv head, query tile) by as many
// spans as fill 8 columns. Block: 512 threads. Where a pass of the waves is not all of them, its part of the table is read anew for each item.
#pragma once
#include "turned.cuh"

namespace skvq {

constexpr int turning_warps = 16, turning_threads = 32 * turning_warps;
static_assert(span_rows == 16 * turning_warps, "a row tile of a span for each warp");
/// Frequencies of a k-step; pairs (frequency, column) of it.
constexpr int step_frequencies = 8, step_pairs = 8 * query_tile;

/// k-steps whose fragments a warp has in registers: with a rotary embedding, two channels a frequency, all of them for heads up to 128, a quarter of wider ones.
constexpr int pass_steps(int head_dim) { return head_dim <= 128 ? head_dim / 16 : (head_dim + 63) / 64; }
/// Passes for all waves of so many frequencies.
constexpr int passes_of(int head_dim, int frequencies) {
    const int a_pass = step_frequencies * pass_steps(head_dim);
    return (frequencies + a_pass - 1) / a_pass;
}
/// Spans that `packed` rows from any position on touch at most.
__device__ __forceinline__ int most_spans(int packed) { return packed > 0 ? (packed + 2 * span_rows - 2) / span_rows : 0; }

/// A pair of f32 as f16, and what f16 has of the rest.
__device__ __forceinline__ void split_halves(float a, float b, u32& high, u32& low) {
    float a_high, b_high;
    high = narrow_to_halves(a, b);
    widen_halves(high, a_high, b_high);
    low = narrow_to_halves(a - a_high, b - b_high);
}

/// What a lane reads of amplitudes: the high ones and, where `near`, the low ones.
template <bool near>
struct Amplitudes {
    using Type = U32x4;
};
template <>
struct Amplitudes<false> {
    using Type = U32x2;
};

/// A pass of the table for one warp.
template <int D, bool Near>
struct StepFragments {
    static constexpr int count = pass_steps(D);
    u32 high[count][4], low[Near ? count : 1][4];

    /// `steps`: k-steps of all passes.
    __device__ __forceinline__ void load(const TurningParams& p, int pass, int steps) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const U32x4* from = reinterpret_cast<const U32x4*>(p.waves) + (warp * steps + pass * count) * 32 + lane;
#pragma unroll
        for (int s = 0; s < count; ++s) {
            const U32x4 of_high = from[s * 32];
            high[s][0] = of_high.x, high[s][1] = of_high.y, high[s][2] = of_high.z, high[s][3] = of_high.w;
            if constexpr (!Near) continue;
            const U32x4 of_low = from[(turning_warps * steps + s) * 32];
            low[s][0] = of_low.x, low[s][1] = of_low.y, low[s][2] = of_low.z, low[s][3] = of_low.w;
        }
    }
};

template <class T, int D>
__global__ void __launch_bounds__(turning_threads) turning(const __grid_constant__ TurningParams p) {
    let_next_launch_begin();
    constexpr int count = pass_steps(D), most_steps = passes_of(D, D) * count;
    constexpr bool near = sizeof(T) == 4;
    // Pairs whose amplitudes a thread makes, at most.
    constexpr int own_pairs = (most_steps * step_pairs + turning_threads - 1) / turning_threads;
    // Of a k-step and lane: high 0, high 1, low 0, low 1; or the high ones.
    using Amplitude = typename Amplitudes<near>::Type;
    alignas(16) __shared__ Amplitude amplitudes[2][most_steps][32];
    // A and B, [k-step, query, 8].
    __shared__ Waves factors[most_steps * step_pairs];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int passes = passes_of(D, p.frequencies), steps = passes * count;
    const int packed = reinterpret_cast<const i32*>(p.lengths)[0], all_queries = p.group * p.length;
    int width_bits = 0;  // of the columns that a span takes
    while (1 << width_bits < min(query_tile, all_queries)) ++width_bits;
    const int width = 1 << width_bits, spans = query_tile >> width_bits;
    const int head_tiles = p.kv_heads * p.query_tiles, used_tiles = (all_queries + query_tile - 1) / query_tile;
    const int run_items = (most_spans(packed) + spans - 1) >> (3 - width_bits);
    const i64 items = static_cast<i64>(p.batch) * p.kv_heads * used_tiles * run_items;
    i64 item = items * blockIdx.x / gridDim.x;
    const i64 end = items * (blockIdx.x + 1) / gridDim.x;
    if (item == end) return wait_for_earlier_launches();

    StepFragments<D, near> fragments;
    fragments.load(p, 0, steps);
    // This thread's pairs are (frequency 8·s + threadIdx.x % 8, column) of k-steps that lie 8 apart.
    const i32* starts = reinterpret_cast<const i32*>(p.channels);
    const i32* channels = starts + p.frequencies + 1;
    const int pair = threadIdx.x, pairs = steps * step_pairs, column = pair / step_frequencies % query_tile;
    constexpr int step_words = 32 * sizeof(Amplitude) / 4, buffer_words = most_steps * step_words;
    const Waves* own_factors = factors + (pair & ~(step_pairs - 1)) + column % width * step_frequencies + pair % step_frequencies;
    u32* own_words = reinterpret_cast<u32*>(&amplitudes[0][pair / step_pairs][4 * column + pair % 4]) + pair / 4 % 2;
    int channel_of[own_pairs];
#pragma unroll
    for (int n = 0; n < own_pairs; ++n) {
        const int frequency = (threadIdx.x + n * turning_threads) / step_pairs * step_frequencies + threadIdx.x % step_frequencies;
        channel_of[n] = frequency < p.frequencies ? channels[starts[frequency]] : 0;
    }

    while (item < end) {
        const int run = static_cast<int>(item / run_items), first = static_cast<int>(item % run_items);
        const int last = static_cast<int>(min(static_cast<i64>(run_items), first + end - item)) - 1;
        const int tile = run % used_tiles, head = run / used_tiles % p.kv_heads, batch = run / used_tiles / p.kv_heads;
        const int origin = reinterpret_cast<const i32*>(p.origins)[batch], first_span = span_of(origin), last_span = span_of(origin + packed - 1);
        item += last + 1 - first;

        // Factors of the tile's queries, and bounds of what they make, in the amplitudes' second half, which is not in use yet.
        float *bounds = reinterpret_cast<float*>(amplitudes[1]), *reaches = bounds + steps * query_tile;
        const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, 0);
        for (int index = threadIdx.x; index < pairs; index += turning_threads) {
            const int frequency = index / step_pairs * step_frequencies + index % step_frequencies;
            const QueryPlace place = query_at(head, p.group, p.length, tile * query_tile + column);
            Waves sum = {0.0f, 0.0f};
            if (place.exists && frequency < p.frequencies) {
                const T* query = reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                                 place.position * p.query_position_stride;
                for (int at = starts[frequency]; at < starts[frequency + 1]; ++at) add_channel(sum, query, p.scale, transform, channels[at]);
            }
            factors[index] = sum;
            const float a = fabsf(sum.cosine), b = fabsf(sum.sine);
            // No smaller than the root of both squares, nor 9 % larger.
            float bound = a + b, reach = fmaxf(a, b) + 0.41421357f * fminf(a, b) + 0.0f * bound;
            for (int distance = step_frequencies / 2; distance >= 1; distance /= 2) {
                bound = fmaxf(bound, __shfl_xor_sync(whole_warp, bound, distance));
                reach += __shfl_xor_sync(whole_warp, reach, distance);
            }
            if (index % step_frequencies == 0) bounds[index / step_frequencies] = bound, reaches[index / step_frequencies] = reach;
        }
        __syncthreads();
        auto unit_of_query = [&](int query) {
            float largest = 0.0f;
            for (int s = 0; s < steps; ++s) largest = fmaxf(largest, bounds[s * query_tile + query]);
            return unit_of(largest);
        };
        // What all frequencies can make together: f32 [0, 1e30], or not a number.
        auto reach_of_query = [&](int query) {
            float sum = 0.0f;
            for (int s = 0; s < steps; ++s) sum += reaches[s * query_tile + query];
            return sum < 1e30f ? sum : not_a_number();
        };
        const float scale = 1.0f / unit_of_query(column);
        for (int index = threadIdx.x; index < pairs; index += turning_threads) {
            factors[index].cosine *= scale;
            factors[index].sine *= scale;
        }
        // Of the columns that this lane has of a product: unit, its first row and that row's address, and how many rows there are to write. Of more than one
        // query both columns are of one span, and written together, also where the second one does not exist.
        float units[2];
        int rows[2];
        u16* to[2];
        u32 ends[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int own = 2 * t + j, query = own % width;
            const BiasPlace place(p.bias, static_cast<i64>(batch) * head_tiles + head * p.query_tiles + tile, p.capacity, all_queries, query);
            // A query without a mean has no range, and its rows are in the middle of it.
            const float reach = reach_of_query(query), range = reach * (1.0f / bias_reach);
            units[j] = reach < 1e-30f ? 0.0f : unit_of_query(query) * (bias_reach / reach);
            if (first == 0 && warp == 0 && g == 0 && own == query) *place.range = reach < 1e-30f ? 0.0f : range;
            rows[j] = (first_span + first * spans + (own >> width_bits)) * span_rows - origin + 16 * warp + g;
            to[j] = place.first + static_cast<i64>(rows[j]) * place.step;
            ends[j] = tile * query_tile + query < all_queries ? packed : 0;
        }

        // Of an item's columns: cosines and sines of their spans' angles, then from these the amplitudes.
        Waves far[own_pairs];
        auto load_far = [&](int of) {
            // Behind the last span the table may end; its column is not written.
            const int span = min(first_span + of * spans + (column >> width_bits), last_span) - p.transform.first_span;
            const float* from = reinterpret_cast<const float*>(p.transform.spans) + static_cast<i64>(span) * 2 * D;
#pragma unroll
            for (int n = 0; n < own_pairs; ++n) {
                if (pair + n * turning_threads < pairs) far[n] = {from[channel_of[n]], from[D + channel_of[n]]};
            }
        };
        auto make_amplitudes = [&](int buffer) {
#pragma unroll
            for (int n = 0; n < own_pairs; ++n) {
                if (pair + n * turning_threads >= pairs) continue;
                const Waves factor = own_factors[n * turning_threads];
                u32* to_words = own_words + buffer * buffer_words + n * (turning_threads / step_pairs) * step_words;
                const float cosine = factor.cosine * far[n].cosine + factor.sine * far[n].sine;
                const float sine = factor.sine * far[n].cosine - factor.cosine * far[n].sine;
                if constexpr (near) split_halves(cosine, sine, to_words[0], to_words[2]);
                else to_words[0] = narrow_to_halves(cosine, sine);
            }
        };
        load_far(first);
        __syncthreads();  // all have their units
        make_amplitudes(0);
        load_far(first + 1);
        __syncthreads();

        // Half of each scheduler's warps make the next amplitudes before they multiply, half behind.
        const bool early = warp / 4 % 2;
        int buffer = 0;
        for (int of = first; of <= last; ++of) {
            auto prepare = [&] {
                make_amplitudes(1 - buffer);
                load_far(of + 2);
            };
            if (early) prepare();
            float highs[4] = {}, low_steps[4] = {}, low_amplitudes[4] = {};
#pragma unroll 1
            for (int pass = 0; pass < passes; ++pass) {
                if (passes > 1) fragments.load(p, pass, steps);
#pragma unroll
                for (int s = 0; s < count; ++s) {
                    const Amplitude amplitude = amplitudes[buffer][pass * count + s][lane];
                    const u32 high[2] = {amplitude.x, amplitude.y};
                    // Two chains of products are shorter than one.
                    if (near || s % 2 == 0) multiply_fragments(highs, fragments.high[s], high);
                    else multiply_fragments(low_steps, fragments.high[s], high);
                    if constexpr (near) {
                        const u32 low[2] = {amplitude.z, amplitude.w};
                        multiply_fragments(low_steps, fragments.low[s], high);
                        multiply_fragments(low_amplitudes, fragments.high[s], low);
                    }
                }
            }
            if (!early) prepare();
            auto bits = [&](int i) {
                const float x = fmaf(highs[i] + (low_steps[i] + low_amplitudes[i]), units[i % 2], bias_middle);
                return __float_as_uint(x) + 128 >> 8 & 0xffffu;
            };
            if (all_queries > 1) {
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    if (static_cast<u32>(rows[0] + 8 * side) >= ends[0]) continue;
                    reinterpret_cast<u32*>(to[0])[8 * side] = bits(2 * side) | bits(2 * side + 1) << 16;
                }
                rows[0] += spans * span_rows, to[0] += 2 * spans * span_rows;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = i % 2, further = i / 2 * 8;
                    if (static_cast<u32>(rows[j] + further) < ends[j]) to[j][further] = static_cast<u16>(bits(i));
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) rows[j] += spans * span_rows, to[j] += spans * span_rows;
            }
            buffer = 1 - buffer;
            __syncthreads();
        }
    }
    wait_for_earlier_launches();
}

}  // namespace skvq

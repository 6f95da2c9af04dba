// Attention of many queries over the packed past: chunks of a prompt, and drafts that are verified.
//
// Is: the states of attend.cuh, from the same parameters, with rows unpacked once for 128 queries of a kv head. Is not: for a few queries, whose
// products are fewer than the instructions that unpack, nor for heads wider than 192.
// Grid: splits × (kv heads · ⌈query tiles / 16⌉) × batch; block: 8 warps, each with two query tiles (an even number of them). A block passes over
// 64 rows at a time: warps 0 … 3 unpack a row block of keys each, warps 4 … 7 one of values, to shared memory; then every warp multiplies all of it:
//
//   scores [16 queries × 64 rows]     = Q' [queries × channels] · K̂ᵀ [channels × rows]      queries on M, scales applied to a group's sums
//   O      [16 queries × channels]   += (a·P) [queries × rows] · V̂ [rows × channels]        scores are the A operand as they are
//
// The page's order, made for rows on M, holds: two octets of keys are B operands of two products, one octet of values is one, and two tiles of
// fold.cuh are an A operand. So a lane stores and loads 16 bytes of levels for two products, without conflicts:
//
//   shared: levels of keys [4 row blocks, Dk / 16, 32 lanes, 16 bytes], of values likewise; f32 numbers of keys [numbers, 64 rows], of values likewise
//
// There are two of these where they fit: while keys' warps unpack the next rows values' warps multiply, and the other way round.
#pragma once
#include "attend.cuh"

namespace skvq {

constexpr int many_warps = 8, many_threads = 32 * many_warps, many_rows = 64, many_blocks = many_rows / block_rows;
constexpr int many_tiles = 2 * many_warps;  // of queries
constexpr int most_many_width = 192;
static_assert(many_warps == 2 * many_blocks, "a row block of one stream for each warp");

/// Bytes of unpacked rows, of which src/cuda/store/attend.rs knows too.
template <class L>
constexpr int many_levels_bytes = many_rows * L::head_dim * 2;
template <class L>
constexpr int many_numbers_bytes = many_rows * L::numbers * 4;
template <class K, class V>
constexpr int many_buffer_bytes = many_levels_bytes<K> + many_levels_bytes<V> + many_numbers_bytes<K> + many_numbers_bytes<V>;
template <class K, class V>
constexpr int many_buffers = K::head_dim + V::head_dim <= 256 ? 2 : 1;

/// What a lane has of a row block of one stream.
template <class L>
struct StreamRows {
    LaneCodes<L> codes;
    PairNumbers<L> numbers;

    __device__ __forceinline__ void load(u64 page, int block, int lane) {
        codes.load(reinterpret_cast<const u8*>(page), block, lane);
        numbers.load(reinterpret_cast<const u8*>(page), block, lane / 4);
    }

    /// To shared memory, as row block `block` of the 64 rows; scales times `unit`.
    __device__ __forceinline__ void unpack(const LevelTable& table, u64 wide_levels, U32x4* levels, float* to, int block, int lane, float unit) const {
        LaneDecoder<L> decoder(codes, table, wide_levels);
        U32x4* own = levels + block * (L::head_dim / 16 * 32) + lane;
        for_each<L::tiles>([&](auto index) {
            constexpr int tile = decltype(index)::value;
            u32 x[2], y[2];
            decoder.template octet<2 * tile>(x[0], y[0]);
            decoder.template octet<2 * tile + 1>(x[1], y[1]);
            own[32 * tile] = L::stream == keys ? U32x4{x[0], x[1], y[0], y[1]} : U32x4{x[0], y[0], x[1], y[1]};
        });
        for_each<L::numbers>([&](auto index) {
            constexpr int n = decltype(index)::value;
            if (lane % 4 != n % 4) return;
            float pair[2];
            numbers.template get<n>(pair);
            float* row = to + n * many_rows + block * block_rows + lane / 4;
            row[0] = n < L::groups ? pair[0] * unit : pair[0];
            row[8] = n < L::groups ? pair[1] * unit : pair[1];
        });
    }
};

/// One of the buffers.
template <class K, class V>
struct UnpackedRows {
    U32x4 *key_levels, *value_levels;
    float *key_numbers, *value_numbers;

    __device__ __forceinline__ UnpackedRows(u8* shared, int buffer) {
        u8* from = shared + buffer * many_buffer_bytes<K, V>;
        key_levels = reinterpret_cast<U32x4*>(from);
        value_levels = reinterpret_cast<U32x4*>(from + many_levels_bytes<K>);
        key_numbers = reinterpret_cast<float*>(from + many_levels_bytes<K> + many_levels_bytes<V>);
        value_numbers = key_numbers + many_numbers_bytes<K> / 4;
    }
};

/// A number of the rows 2t, 2t + 1 of each half of row block `block`.
__device__ __forceinline__ void numbers_of(const float* numbers, int number, int block, int half, int t, float (&pair)[2]) {
    const U32x2 both = *reinterpret_cast<const U32x2*>(numbers + number * many_rows + block * block_rows + 8 * half + 2 * t);
    pair[0] = __uint_as_float(both.x), pair[1] = __uint_as_float(both.y);
}

/// A warp's sixteen queries, of which lane 4·g + t has g and g + 8; scores in units of log 2.
template <class K>
struct ManyQueries {
    static constexpr bool in_registers = K::tiles <= 8;
    const u32* fragments[2];
    u32 kept[in_registers ? K::tiles : 1][4];
    float numbers[2][3];
    const float* extras[2];

    /// Unit, shift and noise.
    __device__ __forceinline__ float number(int side, int which) const {
        if constexpr (in_registers) return numbers[side][which];
        return log2_e * load_here(extras[side] + which);
    }
    /// `first_index`: tile of the kv head; `first_tile`: the same as a place in memory.
    __device__ __forceinline__ void load(const AttendParams& p, int first_index, i64 first_tile, int lane) {
        constexpr int width = folded_words<K>;
        for (int side = 0; side < 2; ++side) {
            const int query = existing_query(lane / 4, p.group, p.length, first_index + side);
            fragments[side] = reinterpret_cast<const u32*>(p.folded) + (first_tile + side) * width + 2 * (4 * query + lane % 4);
            extras[side] = reinterpret_cast<const float*>(p.extras) + ((first_tile + side) * query_tile + query) * extras_width<K>;
            if constexpr (in_registers) {
                for (int i = 0; i < 3; ++i) numbers[side][i] = log2_e * extras[side][i];
            }
        }
        if constexpr (in_registers) for_each<K::tiles>([&](auto tile) { read<decltype(tile)::value>(kept[decltype(tile)::value]); });
    }
    template <int Tile>
    __device__ __forceinline__ void read(u32 (&a)[4]) const {
        for (int side = 0; side < 2; ++side) {
            const U32x2 pair = load_here(reinterpret_cast<const U32x2*>(fragments[side] + 64 * Tile));
            a[side] = pair.x, a[2 + side] = pair.y;
        }
    }
    template <int Tile>
    __device__ __forceinline__ void fragment(u32 (&a)[4]) const {
        if constexpr (in_registers) {
            for (int i = 0; i < 4; ++i) a[i] = kept[Tile][i];
        } else {
            read<Tile>(a);
        }
    }
};

/// Row blocks whose scores a warp holds at once: eight chains of products, or four where registers are few.
template <class V>
constexpr int blocks_at_once = V::head_dim > 128 ? 2 : many_blocks;

/// scores[block][half][2·side + j] of query g + 8·side and row 16·block + 8·half + 2t + j.
template <int Blocks>
using ManyScores = float[Blocks][2][4];

/// `mean`: of the keys, ManyTurned or NotTurned; `first_of_page`: row block of the page.
template <class K, int Blocks, class Mean>
__device__ __forceinline__ void score_many(const U32x4* levels, const float* numbers, int first, const ManyQueries<K>& queries, int lane,
                                           const Mean& mean, int first_of_page, ManyScores<Blocks>& scores) {
    const U32x4* own = levels + first * (K::head_dim / 16 * 32) + lane;
    constexpr int per_group = K::groups == 1 ? K::tiles : K::group_size / 16;
    float unit[2], shifted[2], noise[2];
    for (int side = 0; side < 2; ++side) {
        unit[side] = queries.number(side, 0);
        shifted[side] = queries.number(side, 1);
        noise[side] = K::is_parts ? queries.number(side, 2) : 0.0f;
    }
    if constexpr (Mean::turns) {
        ManyScores<Blocks> sums = {};
        for_each<Mean::steps>([&](auto step) {
            constexpr int s = decltype(step)::value;
            u32 amplitudes[4];
            mean.template operand<s>(amplitudes, lane);
            for_each<Blocks>([&](auto block) {
                constexpr int b = decltype(block)::value;
                const U32x4 rows = mean.template rows<b, s>(first_of_page, lane);
                multiply_fragments(sums[b][0], amplitudes, {rows.x, rows.y});
                multiply_fragments(sums[b][1], amplitudes, {rows.z, rows.w});
            });
        });
        const float units[2] = {log2_e * mean.unit(0, lane), log2_e * mean.unit(1, lane)};
        for_each<8 * Blocks>([&](auto index) {
            constexpr int n = decltype(index)::value, side = n % 4 / 2;
            scores[n / 8][n / 4 % 2][n % 4] = fmaf(sums[n / 8][n / 4 % 2][n % 4], units[side], shifted[side]);
        });
    } else {
        for_each<Blocks>([&](auto block) {
            for (int i = 0; i < 8; ++i) scores[decltype(block)::value][i / 4][i % 4] = shifted[i % 4 / 2];
        });
    }
    for_each<K::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        ManyScores<Blocks> sums = {};
        for_each<per_group>([&](auto inner) {
            constexpr int tile = g * per_group + decltype(inner)::value;
            u32 query[4];
            queries.template fragment<tile>(query);
            for_each<Blocks>([&](auto block) {
                constexpr int b = decltype(block)::value;
                const U32x4 both = own[(b * (K::head_dim / 16) + tile) * 32];
                multiply_fragments(sums[b][0], query, {both.x, both.y});
                multiply_fragments(sums[b][1], query, {both.z, both.w});
            });
        });
        for_each<2 * Blocks>([&](auto index) {
            constexpr int b = decltype(index)::value / 2, half = decltype(index)::value % 2;
            float scales[2], zeros[2] = {};
            numbers_of(numbers, g, first + b, half, lane % 4, scales);
            if constexpr (!K::symmetric) numbers_of(numbers, K::groups + g, first + b, half, lane % 4, zeros);
            for_each<4>([&](auto element) {
                constexpr int i = decltype(element)::value, side = i / 2, j = i % 2;
                float& score = scores[b][half][i];
                score = fmaf(sums[b][half][i], scales[j] * unit[side], score);
                if constexpr (!K::symmetric) score = fmaf(zeros[j], log2_e * queries.extras[side][extras_head + g], score);
                if constexpr (K::is_parts) score = fmaf(scales[j] * scales[j], -noise[side], score);
            });
        });
    });
}

/// The softmax of sixteen queries and their sums, as RunningState keeps those of eight.
template <class V>
struct ManyState {
    static constexpr int zero_groups = V::symmetric ? 1 : V::groups;
    float reference[2], sums[2], zeros[zero_groups][2];
    float output[2 * V::tiles][4];  // of octet o: queries g + 8·side and channels 8·o + 2t + j

    __device__ __forceinline__ void clear() {
        for (int side = 0; side < 2; ++side) {
            reference[side] = no_reference;
            sums[side] = 0.0f;
            for (int g = 0; g < zero_groups; ++g) zeros[g][side] = 0.0f;
        }
        for (auto& octet : output)
            for (float& element : octet) element = 0.0f;
    }

    __device__ __forceinline__ void scale_by(int side, float factor) {
        sums[side] *= factor;
        for (int g = 0; g < zero_groups; ++g) zeros[g][side] *= factor;
#pragma unroll
        for (int octet = 0; octet < 2 * V::tiles; ++octet) {
            output[octet][2 * side] *= factor;
            output[octet][2 * side + 1] *= factor;
        }
    }

    /// Scores become weights.
    template <int Blocks>
    __device__ __forceinline__ void soften(ManyScores<Blocks>& scores) {
        float largest[2] = {no_reference, no_reference};
        for_each<8 * Blocks>([&](auto index) {
            constexpr int n = decltype(index)::value, side = n % 4 / 2;
            largest[side] = fmaxf(largest[side], scores[n / 8][n / 4 % 2][n % 4]);
        });
        if (__any_sync(whole_warp, largest[0] > reference[0] || largest[1] > reference[1])) {
            for_each<2>([&](auto index) {
                constexpr int side = decltype(index)::value;
                for (int distance = 1; distance < 4; distance *= 2) {
                    largest[side] = fmaxf(largest[side], __shfl_xor_sync(whole_warp, largest[side], distance));
                }
                const float moved = fmaxf(reference[side], largest[side] + headroom);
                scale_by(side, exp2_fast(reference[side] - moved));
                reference[side] = moved;
            });
        }
        for_each<8 * Blocks>([&](auto index) {
            constexpr int n = decltype(index)::value, side = n % 4 / 2;
            float& score = scores[n / 8][n / 4 % 2][n % 4];
            score = exp2_fast(score - reference[side]);
            sums[side] += score;
        });
    }

    /// O += (a·P)·V̂. With `Hides`, rows without weight may hold anything, a NaN scale too.
    template <bool Hides, int Blocks>
    __device__ __forceinline__ void weigh(const U32x4* levels, const float* numbers, int first, int lane, const ManyScores<Blocks>& weights) {
        const U32x4* own = levels + first * (V::head_dim / 16 * 32) + lane;
        constexpr int per_group = V::groups == 1 ? V::tiles : V::group_size / 16;
        auto times = [](float weight, float number) { return Hides && weight == 0.0f ? 0.0f : weight * number; };
        for_each<Blocks>([&](auto block) {
            constexpr int b = decltype(block)::value;
            for_each<V::groups>([&](auto group) {
                constexpr int g = decltype(group)::value;
                u32 scaled[4];
                for_each<2>([&](auto index) {
                    constexpr int half = decltype(index)::value;
                    const float(&w)[4] = weights[b][half];
                    float scales[2];
                    numbers_of(numbers, g, first + b, half, lane % 4, scales);
                    scaled[2 * half] = narrow_to_halves(times(w[0], scales[0]), times(w[1], scales[1]));
                    scaled[2 * half + 1] = narrow_to_halves(times(w[2], scales[0]), times(w[3], scales[1]));
                    if constexpr (!V::symmetric) {
                        float zero[2];
                        numbers_of(numbers, V::groups + g, first + b, half, lane % 4, zero);
                        for (int i = 0; i < 4; ++i) zeros[g][i / 2] += times(w[i], zero[i % 2]);
                    }
                });
                for_each<per_group>([&](auto inner) {
                    constexpr int tile = g * per_group + decltype(inner)::value;
                    const U32x4 both = own[(b * (V::head_dim / 16) + tile) * 32];
                    multiply_fragments(output[2 * tile], scaled, {both.x, both.y});
                    multiply_fragments(output[2 * tile + 1], scaled, {both.z, both.w});
                });
            });
        });
    }

    /// What a split has of the warp's queries; four lanes share one.
    __device__ __forceinline__ void write(const AttendParams& p, int batch, int first_tile, int split, int lane) {
        const float per_unit = p.value_levels.correction / p.weight_unit;
        auto total = [](float value) {
            for (int distance = 1; distance < 4; distance *= 2) value += __shfl_xor_sync(whole_warp, value, distance);
            return value;
        };
        for_each<2>([&](auto index) {
            constexpr int side = decltype(index)::value;
            float* to = state_at(p.states, batch, first_tile + side, p.kv_heads * p.query_tiles, lane / 4, p.splits, split, V::head_dim);
            const float sum = total(sums[side]);
            if (lane % 4 == 0) {
                to[0] = reference[side] == no_reference ? -infinity() : reference[side] * log_2;
                to[1] = sum, to[2] = sum, to[3] = 0.0f;
            }
            if constexpr (!V::symmetric) {
                for (int g = 0; g < zero_groups; ++g) zeros[g][side] = total(zeros[g][side]);
            }
            to += state_head + lane % 4 * 2;
            for_each<V::head_dim / 8>([&](auto place) {
                constexpr int octet = decltype(place)::value;
                for (int j = 0; j < 2; ++j) {
                    float value = 0.0f;
                    if constexpr (octet < 2 * V::tiles) {
                        value = output[octet][2 * side + j] * per_unit;
                        if constexpr (!V::symmetric) value += zeros[8 * octet / V::group_size][side];
                    }
                    to[8 * octet + j] = value;
                }
            });
        });
    }
};

template <class K, class V>
__global__ void __launch_bounds__(many_threads, 1) attend_many(const __grid_constant__ AttendParams p) {
    static_assert(K::stream == keys && V::stream == values, "keys, then values");
    static_assert(K::head_dim <= most_many_width && V::head_dim <= most_many_width, "sums of wider heads leave no registers");
    SKVQ_DYNAMIC_SHARED(u8, shared);
    let_next_launch_begin();
    wait_for_earlier_launches();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.x, batch = blockIdx.z;
    const int blocks = (p.query_tiles + many_tiles - 1) / many_tiles, head = blockIdx.y / blocks;
    const int query_tile_of_warp = blockIdx.y % blocks * many_tiles + 2 * warp, head_tile = head * p.query_tiles + query_tile_of_warp;
    const bool has_queries = query_tile_of_warp < p.query_tiles;
    const Lengths lengths(p.lengths);
    const int sinks = lengths.sinks, total = lengths.total(p.mask), first_page = split * p.pages_per_split;
    RowLimits limits(p, batch, first_page, first_page + p.pages_per_split, lengths.packed, sinks, total, true, K::is_parts, p.mask.kind == 0 || p.reach);
    if (p.mask.kind && p.reach) {
        __shared__ BlockReach reach;
        const int first_query = static_cast<int>(blockIdx.y) % blocks * many_tiles * query_tile;
        find_block_reach<many_threads, many_tiles * query_tile>(p.mask, p.reach, batch, head, p.kv_heads, p.group, p.length, first_query, total, reach);
        limits.whole_begin = max(limits.whole_begin, RowLimits::whole_from(first_page, reach.all_from - sinks));
        limits.whole_end = max(limits.whole_begin, min(limits.whole_end, max(0, reach.all_to - sinks) / page_rows));
    }

    ManyState<V> state;
    state.clear();
    // In units of 64 rows, of which a page has two.
    const int first = max(first_page * page_rows, limits.first_visible) / many_rows, end = (limits.end + many_rows - 1) / many_rows;
    if (first < end) {
        const i64 sequence = static_cast<i64>(batch) * p.kv_heads + head;
        const u32 first_entry = static_cast<u32>(sequence * p.page_capacity);
        const int statistics = p.pages_per_key_block ? first_page / p.pages_per_key_block : 0;
        ManyQueries<K> queries;
        if (has_queries) queries.load(p, query_tile_of_warp, (sequence * p.key_blocks + statistics) * p.query_tiles + query_tile_of_warp, lane);

        StreamRows<K> key_rows;
        StreamRows<V> value_rows;
        // Narrow codes are on their way while the rows before them are unpacked and multiplied.
        constexpr bool ahead = K::lane_words + V::lane_words <= 12 && V::head_dim <= 128;
        auto load = [&](auto& rows, u64 table, int which) {
            const u64 page = reinterpret_cast<const u64*>(table)[first_entry + which * many_rows / page_rows];
            rows.load(page, which * many_rows % page_rows / block_rows + warp % many_blocks, lane);
        };
        auto unpack_keys = [&](int which) {
            if (warp >= many_blocks || which >= end) return;
            if (!ahead) load(key_rows, p.key_pages, which);
            const UnpackedRows<K, V> to(shared, which % many_buffers<K, V>);
            key_rows.unpack(kept_levels<K>(p.key_levels), p.key_wide_levels, to.key_levels, to.key_numbers, warp, lane, p.key_levels.correction);
            if (ahead && which + 1 < end) load(key_rows, p.key_pages, which + 1);
        };
        auto unpack_values = [&](int which) {
            if (warp < many_blocks || which >= end) return;
            if (!ahead) load(value_rows, p.value_pages, which);
            const UnpackedRows<K, V> to(shared, which % many_buffers<K, V>);
            value_rows.unpack(kept_levels<V>(p.value_levels), p.value_wide_levels, to.value_levels, to.value_numbers, warp - many_blocks, lane,
                              p.weight_unit);
            if (ahead && which + 1 < end) load(value_rows, p.value_pages, which + 1);
        };
        auto bias_of = [&](int side) {
            const int query = existing_query(lane / 4, p.group, p.length, query_tile_of_warp + side);
            return BiasPlace(p.bias, static_cast<i64>(batch) * p.kv_heads * p.query_tiles + head_tile + side, p.bias_capacity, p.group * p.length, query);
        };
        auto multiply = [&](int which, auto mean) {
            if (!has_queries) return;
            using Mean = decltype(mean);
            constexpr int at_once = blocks_at_once<V>;
            const UnpackedRows<K, V> rows(shared, which % many_buffers<K, V>);
            const bool whole = which * many_rows >= limits.whole_begin * page_rows && (which + 1) * many_rows <= limits.whole_end * page_rows;
#pragma unroll 1
            for (int block = 0; block < many_blocks; block += at_once) {
                // Not `at_once`: NVRTC before 12.9 crashes where a constant of a function is the argument of an alias of arrays.
                ManyScores<blocks_at_once<V>> scores;
                score_many<K, at_once>(rows.key_levels, rows.key_numbers, block, queries, lane, mean, which * many_rows % page_rows / block_rows + block, scores);
                const int first_row = which * many_rows + block * block_rows + lane % 4 * 2;
                if (whole) {
                    if constexpr (K::is_parts && !Mean::turns) {
                        if (p.bias) {
                            const BiasPlace biases[2] = {bias_of(0), bias_of(1)};
                            for_each<8 * at_once>([&](auto index) {
                                constexpr int n = decltype(index)::value;
                                float& score = scores[n / 8][n / 4 % 2][n % 4];
                                const BiasPlace& own = biases[n % 4 / 2];
                                score = fmaf(own.at(first_row + n / 4 * 8 + n % 2), log2_e, score);
                            });
                        }
                    }
                    state.template soften<at_once>(scores);
                    state.template weigh<false, at_once>(rows.value_levels, rows.value_numbers, block, lane, scores);
                    continue;
                }
                for_each<2>([&](auto index) {
                    constexpr int side = decltype(index)::value;
                    const QueryPlace place = query_at(head, p.group, p.length, (query_tile_of_warp + side) * query_tile + lane / 4);
                    const QueryView view(p.mask, batch, place, p.length, total);
                    const BiasPlace bias = bias_of(side);  // not of a mean that turns here
                    for_each<4 * at_once>([&](auto element) {
                        constexpr int n = decltype(element)::value, j = n % 2;
                        const int row = first_row + n / 2 * 8 + j;
                        float& score = scores[n / 4][n / 2 % 2][2 * side + j];
                        if (row < limits.first_visible || row >= limits.end) {
                            score = -infinity();
                            return;
                        }
                        float biased = score * log_2;
                        if constexpr (K::is_parts && !Mean::turns) biased += p.bias ? bias.at(row) : 0.0f;
                        score = log2_e * view.apply(p.mask, biased, sinks + row);
                    });
                });
                state.template soften<at_once>(scores);
                state.template weigh<true, at_once>(rows.value_levels, rows.value_numbers, block, lane, scores);
            }
        };

        if (ahead && warp < many_blocks) load(key_rows, p.key_pages, first);
        if (ahead && warp >= many_blocks) load(value_rows, p.value_pages, first);
        // `prepare(rows)`, then `multiply_by(rows)` with all threads having met in between.
        auto pass = [&](const auto& prepare, const auto& multiply_by) {
            if constexpr (many_buffers<K, V> == 2) {
                for (int which = first - 1; which < end; ++which) {
                    prepare(which + 1);
                    unpack_keys(which + 1);
                    if (which >= first) multiply_by(which);
                    unpack_values(which + 1);
                    __syncthreads();
                }
            } else {
                for (int which = first; which < end; ++which) {
                    prepare(which);
                    unpack_keys(which);
                    unpack_values(which);
                    __syncthreads();
                    multiply_by(which);
                    __syncthreads();
                }
            }
        };
        auto pass_plainly = [&] { pass([](int) {}, [&](int which) { multiply(which, NotTurned()); }); };
        if constexpr (may_turn<K>) {
            using Mean = ManyTurned<K::head_dim>;
            constexpr int of_page = page_rows / many_rows;
            __shared__ typename Mean::Angles angles;
            const auto* tiles = reinterpret_cast<const TileWaves<K::head_dim>*>(p.bias) + sequence * p.query_tiles + query_tile_of_warp;
            auto prepare = [&](int which) {
                if (which < end && (which == first || which % of_page == 0)) Mean::make(p.turned, angles, batch, which / of_page);
            };
            if (p.turned.waves) pass(prepare, [&](int which) { multiply(which, Mean{p.turned, tiles, angles, which / of_page}); });
            else pass_plainly();
        } else {
            pass_plainly();
        }
    }
    if (has_queries) state.write(p, batch, head_tile, split, lane);
}

}  // namespace skvq

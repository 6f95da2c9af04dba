// Decode attention over the packed past, on its packed bytes.
//
// Is: the partial softmax states of every split (flash-decoding), in the space of ŷ. Is not: the queries' fold (fold.cuh), the values'
// unfold and the merge (merge.cuh), rows in the model's type (plain.cuh).
// Grid: splits × (kv heads · query tiles / Tiles) × batch; block: 4 warps. A split is pages_per_split pages inside one block of statistics. A
// warp takes every fourth row block of it:
//
//   scores [16 rows × 8 queries]   = K̂ [rows × channels] · Q' [channels × queries]     rows on M, a group's scale applied to its sums
//   O      [channels × 8 queries] += V̂ᵀ [channels × rows] · (a·P) [rows × queries]     channels on M, a group's scale folded into P
//
// Pages that every query sees whole, and nothing is added to whose scores, go through a loop that knows it: no bounds, no masks, rows loaded
// up to three row blocks ahead. Row blocks at the ends of the past, behind padding, or of a call with a mask, a bias or a softcap go through another.
// Bytes of a row block at 2 bits, D = 128: 512 of codes and 16 of scales for each stream; a lane loads 16 + 16 bytes of codes.
#pragma once
#include "fold.cuh"
#include "planes.cuh"
#include "running.cuh"

namespace skvq {

/// The queries of a warp: q' as fragments (in registers where there is room), and the extras of queries 2t, 2t + 1, for scores in units of log 2.
template <class K, int Tiles>
struct FoldedQueries {
    static constexpr bool in_registers = K::tiles * Tiles <= 8;
    const u32* fragments[Tiles];
    u32 kept[in_registers ? Tiles : 1][in_registers ? K::tiles : 1][2];
    float unit[Tiles][2], shifted[Tiles][2], noise[Tiles][2];
    PlaneLevels planes;
    float lowest[Tiles][2];  // of bit planes: what a row of lowest levels has of a score, before its scale
    const float* extras[Tiles];

    __device__ __forceinline__ void load(const AttendParams& p, i64 first_tile, int lane) {
        constexpr int width = K::head_dim / 16 * 64, extras_width = extras_head + K::groups;
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            fragments[n] = reinterpret_cast<const u32*>(p.folded) + (first_tile + n) * width + 2 * lane;
            extras[n] = reinterpret_cast<const float*>(p.extras) + ((first_tile + n) * query_tile + 2 * (lane % 4)) * extras_width;
            for (int side = 0; side < 2; ++side) {
                unit[n][side] = log2_e * extras[n][side * extras_width];
                shifted[n][side] = log2_e * extras[n][side * extras_width + 1];
                noise[n][side] = log2_e * extras[n][side * extras_width + 2];
            }
            if constexpr (in_registers) {
                for_each<K::tiles>([&](auto tile) {
                    const U32x2 pair = *reinterpret_cast<const U32x2*>(fragments[n] + 64 * decltype(tile)::value);
                    kept[n][decltype(tile)::value][0] = pair.x;
                    kept[n][decltype(tile)::value][1] = pair.y;
                });
            }
            if constexpr (by_planes<K, Tiles>) {
                planes = PlaneLevels(p.key_levels);
                order_for_planes(kept[n]);
                for (int side = 0; side < 2; ++side) {
                    unit[n][side] *= planes.unit;
                    lowest[n][side] = planes.lowest * group_sum<0>(n, side);
                }
            }
        });
    }
    template <int N, int Tile>
    __device__ __forceinline__ void fragment(u32 (&b)[2]) const {
        if constexpr (in_registers) {
            b[0] = kept[N][Tile][0], b[1] = kept[N][Tile][1];
        } else {
            const U32x2 pair = *reinterpret_cast<const U32x2*>(fragments[N] + 64 * Tile);
            b[0] = pair.x, b[1] = pair.y;
        }
    }
    template <int Group>
    __device__ __forceinline__ float group_sum(int n, int side) const {
        return log2_e * extras[n][side * (extras_head + K::groups) + extras_head + Group];
    }
};

/// scores[n][2·side + j] of row g + 8·side and query 2t + j, before softcap and masks, in units of log 2.
template <class K, int Tiles>
__device__ __forceinline__ void score_block(const LaneCodes<K>& codes, const PairNumbers<K>& numbers, const FoldedQueries<K, Tiles>& queries,
                                            const LevelTable& table, u64 wide_levels, float (&scores)[Tiles][4]) {
    LaneDecoder<K> decoder(codes, table, wide_levels);
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int i = 0; i < 4; ++i) scores[n][i] = queries.shifted[n][i % 2];
    });
    constexpr int per_group = K::groups == 1 ? K::tiles : K::group_size / 16;
    for_each<K::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        float sums[Tiles][4] = {}, scales[2], zeros[2] = {};
        if constexpr (by_planes<K, Tiles>) {
            plane_sums(codes, queries.planes, queries, sums);
        } else {
            for_each<per_group>([&](auto inner) {
                constexpr int tile = g * per_group + decltype(inner)::value;
                u32 levels[4];
                decoder.template octet<2 * tile>(levels[0], levels[1]);
                decoder.template octet<2 * tile + 1>(levels[2], levels[3]);
                for_each<Tiles>([&](auto n) {
                    u32 query[2];
                    queries.template fragment<decltype(n)::value, tile>(query);
                    multiply_fragments(sums[decltype(n)::value], levels, query);
                });
            });
        }
        numbers.template get<g>(scales);
        if constexpr (!K::symmetric) numbers.template get<K::groups + g>(zeros);
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int i = 0; i < 4; ++i) {
                const int side = i / 2, j = i % 2;
                float& score = scores[n][i];
                if constexpr (by_planes<K, Tiles>) {
                    score = fmaf(scales[side], fmaf(sums[n][i], queries.unit[n][j], queries.lowest[n][j]), score);
                } else {
                    score = fmaf(sums[n][i], scales[side] * queries.unit[n][j], score);
                }
                if constexpr (!K::symmetric) score = fmaf(zeros[side], queries.template group_sum<g>(n, j), score);
                // Noise has one group: rows of parts.
                if constexpr (K::is_parts) score = fmaf(scales[side] * scales[side], -queries.noise[n][j], score);
            }
        });
    });
}

/// What a lane has of a row block.
template <class K, class V>
struct LaneRows {
    LaneCodes<K> key_codes;
    LaneCodes<V> value_codes;
    PairNumbers<K> key_numbers;
    PairNumbers<V> value_numbers;

    __device__ __forceinline__ void load(u64 key_page, u64 value_page, int block, int lane) {
        const u8 *keys_at = reinterpret_cast<const u8*>(key_page), *values_at = reinterpret_cast<const u8*>(value_page);
        key_codes.load(keys_at, block, lane);
        key_numbers.load(keys_at, block, lane / 4);
        value_codes.load(values_at, block, lane);
        value_numbers.load(values_at, block, lane / 4);
    }
};

/// What hides rows of a split from queries, and what is added to their scores.
struct RowLimits {
    int first_visible, end;      // rows that are no padding and exist
    int whole_begin, whole_end;  // pages of which all queries see all rows, with plain scores

    /// `wholes`: none of them otherwise; `biased`: a bias does not matter to them.
    __device__ __forceinline__ RowLimits(const AttendParams& p, int batch, int first_page, int packed, int sinks, int total, bool wholes,
                                         bool biased)
        : first_visible(padding_of(p.mask, batch)), end(min(packed, (first_page + p.pages_per_split) * page_rows)) {
        // The first of a call's queries sees least.
        const int seen = p.mask.causal ? min(end, total - p.length + 1 - sinks) : end;
        const bool plain = wholes && p.mask.kind == 0 && p.mask.softcap <= 0.0f && (biased || !p.bias);
        whole_begin = max(first_page, (first_visible + page_rows - 1) / page_rows);
        whole_end = plain ? max(whole_begin, seen / page_rows) : whole_begin;
    }
};

/// Codes so narrow and heads so small that a warp's registers hold the rows of two pages: of one to compute, and of the next.
template <class K, class V>
constexpr bool holds_two_pages = K::head_dim <= 128 && V::head_dim <= 128 && K::lane_words + V::lane_words <= 8;

/// Blocks that share a multiprocessor, which has 65536 registers. With ternary values 128 a thread are enough for the code of sm_90 and sm_100.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool few_registers = false;
#else
constexpr bool few_registers = true;
#endif
template <class K, class V, int Tiles>
constexpr int resident_blocks = Tiles > 1 || K::head_dim > 128 || V::head_dim > 128              ? 2
                                : holds_two_pages<K, V> && (few_registers || !has_remainders<V>) ? 4
                                                                                                 : 3;

/// A split of the past: all that a block does.
template <class K, class V, int Tiles, bool Remainders>
__device__ __forceinline__ void attend_split(const AttendParams& p, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int split = blockIdx.x, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles;
    const int head_tile = blockIdx.y * Tiles, head = head_tile / p.query_tiles, first_query_tile = head_tile % p.query_tiles;
    const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
    const int sinks = lengths[1], total = total_tokens(p.mask, lengths), first_page = split * p.pages_per_split;
    // Ternary levels without symmetry are rare, rows of many words leave no registers: they have no loop of their own.
    constexpr bool wholes = (Remainders || !has_remainders<V>) && K::lane_words + V::lane_words <= 48;
    const RowLimits limits(p, batch, first_page, lengths[0], sinks, total, wholes, K::is_parts);

    RunningState<V, Tiles, Remainders> state;
    state.clear();
    if (first_page * page_rows < limits.end) {
        const i64 sequence = static_cast<i64>(batch) * p.kv_heads + head;
        const u32 first_entry = static_cast<u32>(sequence * p.page_capacity);
        auto key_page = [&](int page) { return reinterpret_cast<const u64*>(p.key_pages)[first_entry + page]; };
        auto value_page = [&](int page) { return reinterpret_cast<const u64*>(p.value_pages)[first_entry + page]; };
        const int statistics = p.pages_per_key_block ? first_page / p.pages_per_key_block : 0;
        FoldedQueries<K, Tiles> queries;
        queries.load(p, (sequence * p.key_blocks + statistics) * p.query_tiles + first_query_tile, lane);
        using Rows = LaneRows<K, V>;

        const LevelTable key_levels = kept_levels<K>(p.key_levels), value_levels = kept_levels<V>(p.value_levels);

        // Of a mean that turns, which only rows of parts have. Queries that do not exist have a bias too: zeros or whatever is there.
        auto bias_of = [&](int n, int j) {
            const i64 at = (static_cast<i64>(batch) * head_tiles + head_tile + n) * query_tile + 2 * t + j;
            return reinterpret_cast<const float*>(p.bias) + at * p.bias_capacity;
        };
        auto add_bias = [&](int row, float(&scores)[Tiles][4]) {
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int i = 0; i < 4; ++i) scores[n][i] = fmaf(bias_of(n, i % 2)[row + 8 * (i / 2)], log2_e, scores[n][i]);
            });
        };

        // Whole pages, two row blocks of each for a warp. While some are computed the next are on their way.
        static_assert(blocks_per_page == 2 * attend_warps, "two row blocks of a page for each warp");
        constexpr int ahead = holds_two_pages<K, V> ? 2 : 1;
        Rows rows[ahead][2];
        auto load_half = [&](u64 keys_at, u64 values_at, int half, Rows& to) { to.load(keys_at, values_at, warp + half * attend_warps, lane); };
        auto load_page = [&](int page, Rows(&to)[2]) {
            if (page >= limits.whole_end) return;
            const u64 keys_at = key_page(page), values_at = value_page(page);
            for_each<2>([&](auto half) { load_half(keys_at, values_at, decltype(half)::value, to[decltype(half)::value]); });
        };
        for_each<ahead>([&](auto index) { load_page(limits.whole_begin + decltype(index)::value, rows[decltype(index)::value]); });
        for (int first = limits.whole_begin; wholes && first < limits.whole_end; first += ahead) {
            for_each<ahead>([&](auto index) {
                constexpr int i = decltype(index)::value;
                if (first + i >= limits.whole_end) return;
                for_each<2>([&](auto half) {
                    Rows& own = rows[i][decltype(half)::value];
                    float scores[Tiles][4];
                    score_block<K, Tiles>(own.key_codes, own.key_numbers, queries, key_levels, p.key_wide_levels, scores);
                    if constexpr (K::is_parts) {
                        const int block = (first + i) * blocks_per_page + warp + decltype(half)::value * attend_warps;
                        if (p.bias) add_bias(block * block_rows + g, scores);
                    }
                    state.soften(scores);
                    state.template weigh<false>(own.value_codes, own.value_numbers, value_levels, p.value_wide_levels, scores, p.weight_unit);
                    // Where only one page is held its first half makes room for that of the next.
                    if (ahead == 1 && first + 1 < limits.whole_end) {
                        load_half(key_page(first + 1), value_page(first + 1), decltype(half)::value, own);
                    }
                });
                if constexpr (ahead > 1) load_page(first + i + ahead, rows[i]);
            });
        }

        // The others. Blocks before the first visible row are not read: a sequence's padding may be most of it.
        const int skipped_from = limits.whole_begin * blocks_per_page, skipped = limits.whole_end * blocks_per_page - skipped_from;
        const int last_block = (limits.end - 1) / block_rows;
        auto past_whole = [&](int block) { return block >= skipped_from && block < skipped_from + skipped ? block + skipped : block; };
        int block = past_whole(max(first_page * page_rows, limits.first_visible / block_rows * block_rows) / block_rows + warp);
        Rows now, next;
        auto load_block = [&](int which, Rows& to) {
            const int page = which / blocks_per_page;
            to.load(key_page(page), value_page(page), which % blocks_per_page, lane);
        };
        if (block <= last_block) load_block(block, now);
        while (block <= last_block) {
            const int next_block = past_whole(block + attend_warps);
            if (next_block <= last_block) load_block(next_block, next);
            float scores[Tiles][4];
            score_block<K, Tiles>(now.key_codes, now.key_numbers, queries, key_levels, p.key_wide_levels, scores);
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    const int query = 2 * t + j;
                    const QueryPlace place = query_at(head, p.group, p.length, (first_query_tile + n) * query_tile + query);
                    const QueryView view(p.mask, batch, place, p.length, total);
                    for (int side = 0; side < 2; ++side) {
                        const int row = block * block_rows + g + 8 * side;
                        float& score = scores[n][2 * side + j];
                        if (row < limits.first_visible || row >= limits.end) {
                            score = -infinity();
                            continue;
                        }
                        const float biased = score * log_2 + (p.bias ? bias_of(n, j)[row] : 0.0f);
                        score = log2_e * view.apply(p.mask, biased, sinks + row);
                    }
                }
            });
            state.soften(scores);
            state.template weigh<true>(now.value_codes, now.value_numbers, value_levels, p.value_wide_levels, scores, p.weight_unit);
            block = next_block;
            now = next;
        }
    }
    write_states<V, Tiles, Remainders>(state, p, batch, head_tile, head_tiles, split, shared);
}

template <class K, class V, int Tiles>
__global__ void __launch_bounds__(attend_threads, resident_blocks<K, V, Tiles>) attend(const __grid_constant__ AttendParams p) {
    static_assert(K::stream == keys && V::stream == values, "keys, then values");
    __shared__ float shared[Tiles * query_tile * (state_head + V::head_dim + attend_warps)];
    if constexpr (has_remainders<V>) {
        if (ternary_is_symmetric(p.value_levels)) return attend_split<K, V, Tiles, true>(p, shared);
    }
    attend_split<K, V, Tiles, false>(p, shared);
}

}  // namespace skvq

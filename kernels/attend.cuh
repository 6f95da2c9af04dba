// Decode attention over the packed past, on its packed bytes.
//
// Is: the partial softmax states of every split (flash-decoding), in the space of ŷ. Is not: the queries' fold (fold.cuh), the values'
// unfold and the merge (merge.cuh), rows in the model's type (plain.cuh).
// Grid: (kv heads · query tiles / Tiles) × batch × splits, of attend_apart a quarter as many; block: 4 warps. A split is pages_per_split pages inside one
// block of statistics, but the last splits, which begin when the others are under way, may be shorter, so that all blocks come to their end together.
// A warp takes a quarter of a split's row blocks, or all of a split of its own:
//
//   scores [16 rows × 8 queries]   = K̂ [rows × channels] · Q' [channels × queries]     rows on M, a group's scale applied to its sums
//   O      [channels × 8 queries] += V̂ᵀ [channels × rows] · (a·P) [rows × queries]     channels on M, a group's scale folded into P
//
// Pages that every query sees whole, and nothing is added to whose scores, go through a loop that knows it: no bounds, no masks, rows loaded
// up to three row blocks ahead. Row blocks at the ends of the past, behind padding, or of a call with a mask, a bias or a softcap go through another.
// Bytes of a row block at 2 bits, D = 128: 512 of codes and 16 of scales for each stream; a lane loads 16 + 16 bytes of codes.
#pragma once
#include "bytes.cuh"
#include "fold.cuh"
#include "reach.cuh"
#include "ring.cuh"
#include "running.cuh"
#include "turned.cuh"

namespace skvq {

/// The queries of a warp: q' as fragments (in registers where there is room) or bytes, and the extras of queries 2t, 2t + 1, for scores in units of log 2.
/// `Turned`: beside a mean that turns there are no registers for fragments, which lie in shared memory.
template <class K, int Tiles, bool Bytes, bool Turned>
struct FoldedQueries {
    static constexpr bool in_registers = K::tiles * Tiles <= 8 && !Bytes && !Turned;
    const u32* fragments[Tiles];
    SharedPlace place = 0;  // of them, for `Turned`
    u32 kept[in_registers ? Tiles : 1][in_registers ? K::tiles : 1][2];
    ByteQueries<K> bytes[Tiles];  // for `Bytes`; NVRTC before 12.4 looks at calls that `if constexpr` leaves out of a lambda
    float unit[Tiles][2], noise[Tiles][2];
    float middle[Tiles][2];   // for `Bytes`: what the codes' middle makes of the integers' sum, times the unit
    float shifted[Tiles][2];  // what all scores of a query have
    const float* extras[Tiles];
    int extras_step[Tiles];

    /// `first_index`: tile of the kv head; `folded`, `folded_extras`: of that tile, read by `read`.
    template <class Read>
    __device__ __forceinline__ void load(const AttendParams& p, int first_index, const u32* folded, const float* folded_extras, const Read& read, int lane) {
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            auto existing = [&](int query) { return existing_query(query, p.group, p.length, first_index + n); };
            const int own = 4 * existing(lane / 4) + lane % 4, pair[2] = {existing(lane % 4 * 2), existing(lane % 4 * 2 + 1)};
            fragments[n] = folded + n * folded_words<K> + 2 * own;
            extras[n] = folded_extras + n * extras_floats<K> + pair[0] * extras_width<K>;
            extras_step[n] = (pair[1] - pair[0]) * extras_width<K>;
            for (int side = 0; side < 2; ++side) {
                const float* from = extras[n] + side * extras_step[n];
                unit[n][side] = read(from);
                shifted[n][side] = read(from + 1);
                if constexpr (K::is_parts) noise[n][side] = read(from + 2);
                if constexpr (Bytes) middle[n][side] = read(from + 3);
            }
            auto fragment = [&](auto tile, u32(&b)[2]) {
                const U32x2 pair = *reinterpret_cast<const U32x2*>(fragments[n] + 64 * decltype(tile)::value);
                b[0] = pair.x, b[1] = pair.y;
            };
            if constexpr (Bytes) bytes[n].load(reinterpret_cast<const U32x4*>(folded + n * folded_words<K>), own, read);
            if constexpr (in_registers) for_each<K::tiles>([&](auto tile) { fragment(tile, kept[n][decltype(tile)::value]); });
        });
        if constexpr (Turned) place = shared_place(fragments[0]);
    }
    /// Once what `load` has asked for must be there.
    __device__ __forceinline__ void prepare(const AttendParams& p) {
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int side = 0; side < 2; ++side) {
                unit[n][side] *= log2_e * (Bytes ? p.key_levels.step : p.key_levels.correction);
                shifted[n][side] *= log2_e;
                if constexpr (K::is_parts) noise[n][side] *= log2_e;
                if constexpr (Bytes) middle[n][side] *= -unit[n][side];
            }
        });
    }
    template <int N, int Tile>
    __device__ __forceinline__ void fragment(u32 (&b)[2]) const {
        if constexpr (in_registers) {
            b[0] = kept[N][Tile][0], b[1] = kept[N][Tile][1];
        } else if constexpr (Turned) {
            const U32x2 pair = load_shared<256 * Tile, U32x2>(place);
            b[0] = pair.x, b[1] = pair.y;
        } else {
            const U32x2 pair = *reinterpret_cast<const U32x2*>(fragments[N] + 64 * Tile);
            b[0] = pair.x, b[1] = pair.y;
        }
    }
    template <int Group>
    __device__ __forceinline__ float group_sum(int n, int side) const {
        return log2_e * extras[n][side * extras_step[n] + extras_head + Group];
    }
};

/// Adds the scores of a row block, scores[n][2·side + j] of row g + 8·side and query 2t + j, before softcap and masks, in units of log 2.
template <class K, int Tiles, bool Bytes, bool Turned>
__device__ __forceinline__ void score_block(const LaneCodes<K>& codes, const PairNumbers<K>& numbers, const FoldedQueries<K, Tiles, Bytes, Turned>& queries,
                                            const LevelTable& table, u64 wide_levels, float (&scores)[Tiles][4]) {
    LaneDecoder<K> decoder(codes, table, wide_levels);
    constexpr int per_group = K::groups == 1 ? K::tiles : K::group_size / 16;
    for_each<K::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        float sums[Tiles][4] = {}, scales[2], zeros[2] = {};
        if constexpr (Bytes) {
            byte_sums(codes, queries.bytes, sums);
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
                if constexpr (Bytes) score = fmaf(fmaf(sums[n][i], queries.unit[n][j], queries.middle[n][j]), scales[side], score);
                else score = fmaf(sums[n][i] * scales[side], queries.unit[n][j], score);
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

    static __device__ __forceinline__ int whole_from(int first_page, int first_visible) {
        return max(first_page, (first_visible + page_rows - 1) / page_rows);
    }

    /// `wholes`: none of them otherwise; `biased`: a bias does not matter to them. `shows`: a mask, if there is one, does not either.
    __device__ __forceinline__ RowLimits(const AttendParams& p, int batch, int first_page, int end_page, int packed, int sinks, int total, bool wholes,
                                         bool biased, bool shows)
        : first_visible(padding_of(p.mask, batch)), end(min(packed, end_page * page_rows)) {
        // The first of a call's queries sees least.
        const int seen = p.mask.causal ? min(end, total - p.length + 1 - sinks) : end;
        const bool plain = wholes && shows && p.mask.softcap <= 0.0f && (biased || !p.bias);
        whole_begin = whole_from(first_page, first_visible);
        whole_end = plain ? max(whole_begin, seen / page_rows) : whole_begin;
    }
};

/// Whether the call's mask shows the packed rows that are no padding, as they are, to the queries of some tiles, as mask_shows has found. By all lanes
/// of a warp. Masks that say no more than padding and causality do keep the loop that knows none.
template <int Tiles>
__device__ __forceinline__ bool is_shown(const AttendParams& p, int batch, int kv_head, int first_tile) {
    if (p.mask.kind == 0) return true;
    if (!p.reach) return false;
    const int query = thread_here() % (Tiles * query_tile);
    const QueryPlace place = query_at(kv_head, p.group, p.length, first_tile * query_tile + query);
    const bool hides = place.exists && !load_here(reinterpret_cast<const u32*>(p.reach) + mask_row_of(p.mask, batch, place, p.kv_heads * p.group, p.length));
    return !__any_sync(whole_warp, hides);
}

/// Blocks that share a multiprocessor, which has 65536 registers.
template <class K, class V, int Tiles>
constexpr int resident_blocks = Tiles > 1 || K::head_dim > 128 || V::head_dim > 128 ? 2 : K::lane_words + V::lane_words <= 8 ? 4 : 3;

template <class K, class V, int Tiles>
constexpr int state_bytes = StateExchange<V, Tiles>::bytes;
/// Of shared memory: rows on their way, then states.
template <class K, class V, int Tiles, int Taken = 0>
constexpr int attend_bytes =
    RowRing<K, V, false, Taken>::bytes > state_bytes<K, V, Tiles> ? RowRing<K, V, false, Taken>::bytes : state_bytes<K, V, Tiles>;

/// The first page of a split; of the one behind the last: where the past ends.
__device__ __forceinline__ int first_page_of(const AttendParams& p, int split) {
    return split * p.short_pages + min(split, p.long_splits) * (p.pages_per_split - p.short_pages);
}

/// Where the work of a split lies: which tiles of queries, of which (sequence, kv head).
struct SplitPlace {
    int split, batch, head_tile;
    int head, first_tile;  // of the kv head

    __device__ __forceinline__ i64 sequence(const AttendParams& p) const { return static_cast<i64>(batch) * p.kv_heads + head; }
};

/// What comes before and after a split: queries that a launch before has folded, states that one behind unfolds.
template <class K, class V, int Tiles, bool Apart>
struct AmongLaunches {
    static constexpr int shared_bytes = 0;  // beside rows on their way and states
    static constexpr bool one_tile = false;
    __device__ __forceinline__ Lengths lengths(const AttendParams& p) const { return Lengths(p.lengths); }
    template <bool Turned>
    __device__ __forceinline__ NoPages turned_rows(const AttendParams&, int) const {
        return {};
    }
    /// Queries for rows of this block of statistics. That launch may be at it until here.
    template <bool Bytes, bool Turned>
    __device__ __forceinline__ void bring(FoldedQueries<K, Tiles, Bytes, Turned>& queries, const AttendParams& p, const SplitPlace& place, int statistics,
                                          int lane) const {
        wait_for_earlier_launches();
        const int first = place.first_tile;
        const i64 tile = (place.sequence(p) * p.key_blocks + statistics) * p.query_tiles + first;
        queries.load(p, first, reinterpret_cast<const u32*>(p.folded) + tile * folded_words<K>,
                     reinterpret_cast<const float*>(p.extras) + tile * extras_floats<K>, FromLaunch(), lane);
    }
    template <bool Integers>
    __device__ __forceinline__ void write(RunningState<V, Tiles, Integers>& state, const AttendParams& p, const SplitPlace& place, float* shared) const {
        if constexpr (Apart) {
            write_own_states<V, Tiles, Integers>(state, p, place.batch, place.head_tile, p.kv_heads * p.query_tiles, place.split);
        } else {
            __syncthreads();
            write_states<V, Tiles, Integers>(state, p, place.batch, place.head_tile, p.kv_heads * p.query_tiles, place.split, shared);
        }
    }
};

/// A split of the past: all that a block does, or that a warp does where each has its own (`Apart`). `around`: as AmongLaunches. `Turned`: the keys'
/// mean turns here.
template <class K, class V, int Tiles, bool Apart, bool Bytes, bool Integers, bool Turned, class Around>
__device__ __forceinline__ void attend_split(const AttendParams& p, u8* shared, const Around& around) {
    const int thread = __shfl_xor_sync(whole_warp, threadIdx.x, 0), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int split = Apart ? blockIdx.z * attend_warps + warp : blockIdx.z, batch = blockIdx.y, head_tiles = p.kv_heads * p.query_tiles;
    const int head_tile = blockIdx.x * Tiles;
    const int head = Around::one_tile ? head_tile : head_tile / p.query_tiles, first_query_tile = Around::one_tile ? 0 : head_tile % p.query_tiles;
    const SplitPlace place_of_split = {split, batch, head_tile, head, first_query_tile};
    if (Apart && split >= p.splits) return;
    // What does not depend on the lengths is asked for before they are known: a short split is all latency.
    const int first_page = first_page_of(p, split);
    const u32 first_entry = static_cast<u32>(place_of_split.sequence(p) * p.page_capacity);
    auto page_at = [](u64 table, u32 entry) { return load_here(reinterpret_cast<const u64*>(table) + entry); };
    auto key_page = [&](int page) { return page_at(p.key_pages, first_entry + page); };
    auto value_page = [&](int page) { return page_at(p.value_pages, first_entry + page); };
    const int guess = min(first_page, p.page_capacity - 1);
    const u64 guessed_keys = key_page(guess), guessed_values = value_page(guess);
    const int statistics = p.pages_per_key_block ? min(first_page / p.pages_per_key_block, p.key_blocks - 1) : 0;
    FoldedQueries<K, Tiles, Bytes, Turned> queries;

    const Lengths lengths = around.lengths(p);
    const int sinks = lengths.sinks, total = lengths.total(p.mask);
    // Ternary levels without symmetry are rare, row blocks of many bytes find no room: they have no loop of their own.
    constexpr bool wholes = (Integers || !has_integers<V>) && RowRing<K, V, Apart, Around::shared_bytes>::fits;
    const RowLimits limits(p, batch, first_page, first_page_of(p, split + 1), lengths.packed, sinks, total, wholes, K::is_parts,
                           wholes && is_shown<Tiles>(p, batch, head, first_query_tile));

    const auto turned_rows = around.template turned_rows<Turned>(p, batch);

    RunningState<V, Tiles, Integers> state;
    state.clear(p.weight_unit);
    if (first_page * page_rows < limits.end) {
        using Rows = LaneRows<K, V>;

        const LevelTable key_levels = Bytes ? p.key_levels : kept_levels<K>(p.key_levels), value_levels = has_masks<V> ? p.value_levels : kept_levels<V>(p.value_levels);

        // Of a mean that turns, which only rows of parts have.
        auto bias_of = [&](int n, int query) {
            return BiasPlace(p.bias, static_cast<i64>(batch) * head_tiles + head_tile + n, p.bias_capacity, p.group * p.length,
                             existing_query(query, p.group, p.length, first_query_tile + n));
        };

        auto queries_come = [&] {
            around.bring(queries, p, place_of_split, statistics, lane);
            queries.prepare(p);
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) state.offset[n][j] += queries.shifted[n][j];
            });
        };

        int ready_amplitudes = -1;
        if constexpr (wholes) {
            // Whole pages, two row blocks of each for a warp. While they are computed those of later pages are on their way.
            static_assert(blocks_per_page == 2 * attend_warps, "two row blocks of a page for each warp");
            using Ring = RowRing<K, V, Apart, Around::shared_bytes>;
            const Ring ring(shared, warp, lane);
            // A turn is a page's place in the tables times the turns that a page takes, plus the turn over it.
            const int first_turn = (static_cast<int>(first_entry) + limits.whole_begin) * Ring::page_turns;
            const int end_turn = first_turn + (limits.whole_end - limits.whole_begin) * Ring::page_turns;
            // Pages whose copies begin next: their addresses are read a turn before.
            u64 next_keys = 0, next_values = 0;
            auto look_ahead = [&](int turn) {
                const u32 entry = static_cast<u32>(min(turn, end_turn - 1)) / Ring::page_turns;
                next_keys = page_at(p.key_pages, entry), next_values = page_at(p.value_pages, entry);
            };
            if (limits.whole_begin == first_page) next_keys = guessed_keys, next_values = guessed_values;
            else if (first_turn < end_turn) look_ahead(first_turn);
            for_each<Ring::slots - 1>([&](auto index) {
                constexpr int slot = decltype(index)::value;
                const int turn = first_turn + slot;
                if (turn < end_turn) {
                    ring.fetch(slot * Ring::slot_bytes, next_keys, next_values, slot & Ring::page_turns - 1);
                    look_ahead(turn + 1);
                }
                commit_copies();
            });
            queries_come();
            // Biases are asked for a turn before; where those of this lane's first row lie stays in registers. Without any, their range is 0.
            u32 biases[Ring::at_once][Tiles][2] = {}, exponent = 0;
            float ranges[Tiles][2] = {};
            u64 own_biases[Tiles];
            const bool single = p.group * p.length == 1;
            if constexpr (Turned) {
                turned_rows.begin(limits.whole_begin);
                __syncthreads();
                turned_rows.make(0);
            } else if constexpr (K::is_parts) {
                exponent = keep_in_register(bias_exponent);
                for_each<Tiles>([&](auto index) {
                    constexpr int n = decltype(index)::value;
                    // Of a pair that is there, and so at a multiple of four bytes.
                    const BiasPlace place = bias_of(n, existing_query(2 * t, p.group, p.length, first_query_tile + n) & ~1);
                    const int row = (limits.whole_begin * blocks_per_page + Ring::first_block(warp, 0)) * block_rows + g;
                    own_biases[n] = keep_address(reinterpret_cast<u64>(place.first + static_cast<i64>(row) * place.step));
                    for (int j = 0; j < 2; ++j) ranges[n][j] = p.bias ? log2_e * load_here(bias_of(n, 2 * t + j).range) : 0.0f;
                });
            }
            auto ask_biases = [&](int turn) {
                if constexpr (K::is_parts && !Turned) {
                    if (!p.bias || turn >= end_turn) return;
                    const int page = static_cast<int>(static_cast<u32>(turn - first_turn) / Ring::page_turns);
                    const int row = (page * blocks_per_page + (turn & Ring::page_turns - 1) * Ring::at_once) * block_rows;
                    for_each<Tiles>([&](auto index) {
                        constexpr int n = decltype(index)::value;
                        const u16* from = reinterpret_cast<const u16*>(own_biases[n]) + static_cast<i64>(row) * (single ? 1 : 2);
                        for_each<2 * Ring::at_once>([&](auto inner) {
                            constexpr int block = decltype(inner)::value / 2, side = decltype(inner)::value % 2, at = block * block_rows + 8 * side;
                            biases[block][n][side] = single ? load_here(from + at) : load_here(reinterpret_cast<const u32*>(from) + at);
                        });
                    });
                }
            };
            ask_biases(first_turn);
            int slot_at = 0, free_at = (Ring::slots - 1) * Ring::slot_bytes;
            int amplitudes = 0;  // which buffer has this page's
            for (int turn = first_turn; turn < end_turn; ++turn) {
                const int inner = turn & Ring::page_turns - 1;
                wait_for_copies<Ring::slots - 2>();
                // All warps have made this page's amplitudes, and read those of the page before.
                if (Turned && inner == 0) __syncthreads();
                else __syncwarp();
                // The slot of the turn before is free: all lanes have come here.
                if (turn + Ring::slots - 1 < end_turn) {
                    ring.fetch(free_at, next_keys, next_values, turn + Ring::slots - 1 & Ring::page_turns - 1);
                    look_ahead(turn + Ring::slots);
                }
                commit_copies();
                float products[Ring::at_once][4];
                if constexpr (Turned) turned_rows.multiply(amplitudes, Ring::first_block(warp, inner), lane, products);
                float scores[Ring::at_once][Tiles][4], weights[Ring::at_once][Tiles][4], base[Tiles][2];
                for_each<2 * Tiles>([&](auto index) {
                    constexpr int n = decltype(index)::value / 2, j = decltype(index)::value % 2;
                    base[n][j] = K::is_parts && !Turned ? fmaf(ranges[n][j], -bias_middle, state.offset[n][j]) : state.offset[n][j];
                });
                for_each<Ring::at_once>([&](auto index) {
                    constexpr int i = decltype(index)::value;
                    LaneCodes<K> codes;
                    PairNumbers<K> numbers;
                    ring.template read_keys<i>(slot_at, codes, numbers);
                    if constexpr (Turned) {
                        const float units[2] = {turned_rows.unit(2 * t), turned_rows.unit(2 * t + 1)};
                        for (int e = 0; e < 4; ++e) scores[i][0][e] = fmaf(products[i][e], log2_e * units[e % 2], base[0][e % 2]);
                    } else {
                        for_each<4 * Tiles>([&](auto element) {
                            constexpr int n = decltype(element)::value / 4, e = decltype(element)::value % 4;
                            scores[i][n][e] = base[n][e % 2];
                        });
                    }
                    score_block<K, Tiles, Bytes, Turned>(codes, numbers, queries, key_levels, p.key_wide_levels, scores[i]);
                    if constexpr (K::is_parts && !Turned) {
                        for_each<4 * Tiles>([&](auto element) {
                            constexpr int n = decltype(element)::value / 4, e = decltype(element)::value % 4;
                            scores[i][n][e] = fmaf(bias_place<e % 2>(biases[i][n][e / 2], exponent), ranges[n][e % 2], scores[i][n][e]);
                        });
                    }
                });
                ask_biases(turn + 1);
                state.soften(scores, weights, turn == first_turn);
                for_each<Ring::at_once>([&](auto index) {
                    constexpr int i = decltype(index)::value;
                    LaneCodes<V> codes;
                    PairNumbers<V> numbers;
                    ring.template read_values<i>(slot_at, codes, numbers);
                    state.template weigh<false>(codes, numbers, value_levels, p.value_wide_levels, weights[i]);
                });
                if constexpr (Turned) {
                    if (inner == Ring::page_turns - 1) {
                        amplitudes = 1 - amplitudes;
                        turned_rows.make(amplitudes);
                    }
                }
                free_at = slot_at;
                slot_at = slot_at + Ring::slot_bytes == Ring::bytes / attend_warps ? 0 : slot_at + Ring::slot_bytes;
            }
            // The page behind the whole ones has amplitudes already: it is where the past ends, as a rule.
            if constexpr (Turned) __syncthreads();
            ready_amplitudes = amplitudes;
        }

        if constexpr (!wholes) queries_come();

        // The others. Blocks before the first visible row are not read: a sequence's padding may be most of it.
        // What is found anew has not been kept through the loop.
        const int begin = Apart ? first_page : first_page_of(p, block_z_here()), first_visible = padding_of(p.mask, batch);
        const int skipped_from = RowLimits::whole_from(begin, first_visible) * blocks_per_page, skipped = limits.whole_end * blocks_per_page - skipped_from;
        const int last_block = (limits.end - 1) / block_rows;
        auto past_whole = [&](int block) { return block >= skipped_from && block < skipped_from + skipped ? block + skipped : block; };
        int block = past_whole(max(begin * page_rows, first_visible / block_rows * block_rows) / block_rows + (Apart ? 0 : warp));
        Rows now, next;
        auto load_block = [&](int which, Rows& to) {
            const int page = which / blocks_per_page;
            to.load(key_page(page), value_page(page), which % blocks_per_page, lane);
        };
        if (block <= last_block) load_block(block, now);
        while (block <= last_block) {
            const int next_block = past_whole(block + (Apart ? 1 : attend_warps));
            // Where each warp has its split registers are short.
            if (!Apart && next_block <= last_block) load_block(next_block, next);
            float scores[1][Tiles][4], weights[1][Tiles][4];
            for_each<4 * Tiles>([&](auto element) {
                constexpr int n = decltype(element)::value / 4, e = decltype(element)::value % 4;
                scores[0][n][e] = queries.shifted[n][e % 2];
            });
            score_block<K, Tiles, Bytes, Turned>(now.key_codes, now.key_numbers, queries, key_levels, p.key_wide_levels, scores[0]);
            float products[1][4];
            if constexpr (Turned) {
                const bool ready = ready_amplitudes >= 0 && block / blocks_per_page == limits.whole_end;
                if (ready) turned_rows.multiply(ready_amplitudes, block % blocks_per_page, lane, products);
                else turned_rows.multiply_alone(block, lane, products[0]);
            }
            bool begins = false;
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    const int query = 2 * t + j;
                    const QueryPlace place = query_at(head, p.group, p.length, (first_query_tile + n) * query_tile + query);
                    const QueryView view(p.mask, batch, place, p.length, total);
                    for (int side = 0; side < 2; ++side) {
                        const int row = block * block_rows + g + 8 * side;
                        float& score = scores[0][n][2 * side + j];
                        if (row < first_visible || row >= limits.end) {
                            score = -infinity();
                            continue;
                        }
                        float biased = score * log_2;
                        if constexpr (Turned) biased += products[0][2 * side + j] * turned_rows.unit(query);
                        else if constexpr (K::is_parts) biased += p.bias ? bias_of(n, 2 * t + j).at(row) : 0.0f;
                        score = log2_e * view.apply(p.mask, biased, sinks + row) + (state.offset[n][j] - queries.shifted[n][j]);
                        begins = begins || (state.reference[n][j] == no_reference && score > -infinity());
                    }
                }
            });
            state.soften(scores, weights, begins);
            state.template weigh<true>(now.value_codes, now.value_numbers, value_levels, p.value_wide_levels, weights[0]);
            block = next_block;
            if constexpr (!Apart) now = next;
            else if (block <= last_block) load_block(block, now);
        }
    }
    around.write(state, p, place_of_split, reinterpret_cast<float*>(shared));
}

/// A split by the loop that its levels allow.
template <class K, class V, int Tiles, bool Apart, bool Turned, class Around>
__device__ __forceinline__ void attend_levels(const AttendParams& p, u8* shared, const Around& around) {
    static_assert(K::stream == keys && V::stream == values, "keys, then values");
    constexpr bool bytes = by_bytes<K, Tiles>, always = bytes && K::is_even, integers = has_integers<V>;
    const bool even = always || (bytes && p.as_bytes);
    if constexpr (has_remainders<V>) {
        if (!ternary_is_symmetric(p.value_levels)) return attend_split<K, V, Tiles, Apart, always, false, Turned>(p, shared, around);
    }
    even ? attend_split<K, V, Tiles, Apart, bytes, integers, Turned>(p, shared, around)
         : attend_split<K, V, Tiles, Apart, always, integers, Turned>(p, shared, around);
}

template <class K, class V, int Tiles, bool Apart>
__device__ __forceinline__ void attend_alone(const AttendParams& p) {
    alignas(16) __shared__ u8 shared[attend_bytes<K, V, Tiles>];
    let_next_launch_begin();
    attend_levels<K, V, Tiles, Apart, false>(p, shared, AmongLaunches<K, V, Tiles, Apart>());
}

template <class K, class V, int Tiles>
__global__ void __launch_bounds__(attend_threads, resident_blocks<K, V, Tiles>) attend(const __grid_constant__ AttendParams p) {
    attend_alone<K, V, Tiles, false>(p);
    wait_for_earlier_launches();  // splits without rows have not yet
}

/// Splits of a few pages each, four of them in a block: its warps have nothing to wait for each other for.
template <class K, class V, int Tiles>
__global__ void __launch_bounds__(attend_threads, resident_blocks<K, V, Tiles>) attend_apart(const __grid_constant__ AttendParams p) {
    attend_alone<K, V, Tiles, true>(p);
    wait_for_earlier_launches();
}

}  // namespace skvq

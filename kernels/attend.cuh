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
// Lane 4·g + t has the scores of rows g, g + 8 and queries 2t, 2t + 1 and the sums of channels g, g + 8 (+ 16·tile) and the same queries. So a
// query's maximum and factor are where its scores and its sums are, and only P changes hands, by one transposition.
// Bytes of a row block at 2 bits, D = 128: 512 of codes and 16 of scales for each stream; a lane loads 16 + 16 bytes of codes, one row block
// ahead of what it computes.
#pragma once
#include "fold.cuh"
#include "levels.cuh"
#include "numbers.cuh"

namespace skvq {

constexpr int attend_warps = 4, attend_threads = 32 * attend_warps;

/// The queries of a warp: q' as fragments (in registers where there is room), and the extras of queries 2t, 2t + 1.
template <class K, int Tiles>
struct FoldedQueries {
    static constexpr bool in_registers = K::tiles * Tiles <= 8;
    const u32* fragments[Tiles];
    u32 kept[in_registers ? Tiles : 1][in_registers ? K::tiles : 1][2];
    float unit[Tiles][2], shifted[Tiles][2], noise[Tiles][2];
    const float* extras[Tiles];

    __device__ __forceinline__ void load(const AttendParams& p, i64 first_tile, int lane) {
        constexpr int width = K::head_dim / 16 * 64, extras_width = extras_head + K::groups;
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            fragments[n] = reinterpret_cast<const u32*>(p.folded) + (first_tile + n) * width + 2 * lane;
            extras[n] = reinterpret_cast<const float*>(p.extras) + ((first_tile + n) * query_tile + 2 * (lane % 4)) * extras_width;
            for (int side = 0; side < 2; ++side) {
                unit[n][side] = extras[n][side * extras_width];
                shifted[n][side] = extras[n][side * extras_width + 1];
                noise[n][side] = extras[n][side * extras_width + 2];
            }
            if constexpr (in_registers) {
                for_each<K::tiles>([&](auto tile) {
                    const U32x2 pair = *reinterpret_cast<const U32x2*>(fragments[n] + 64 * decltype(tile)::value);
                    kept[n][decltype(tile)::value][0] = pair.x;
                    kept[n][decltype(tile)::value][1] = pair.y;
                });
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
        return extras[n][side * (extras_head + K::groups) + extras_head + Group];
    }
};

/// scores[n][2·side + j] of row g + 8·side and query 2t + j, before softcap and masks.
template <class K, int Tiles>
__device__ __forceinline__ void score_block(const LaneCodes<K>& codes, const PairNumbers<K>& numbers, const FoldedQueries<K, Tiles>& queries,
                                            const LevelTable& table, u64 wide_levels, float (&scores)[Tiles][4]) {
    LaneDecoder<K> decoder(codes, table, wide_levels);
    for_each<Tiles>([&](auto n) {
        for (float& score : scores[decltype(n)::value]) score = 0.0f;
    });
    constexpr int per_group = K::groups == 1 ? K::tiles : K::group_size / 16;
    for_each<K::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        float sums[Tiles][4] = {};
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
        for (int side = 0; side < 2; ++side) {
            const float scale = numbers.template get<g>(side);
            float zero = 0.0f;
            if constexpr (!K::symmetric) zero = numbers.template get<K::groups + g>(side);
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[n][2 * side + j];
                    score += scale * (sums[n][2 * side + j] * queries.unit[n][j]);
                    if constexpr (!K::symmetric) score += zero * queries.template group_sum<g>(n, j);
                    // Noise has one group: rows of parts.
                    if constexpr (K::is_parts) score -= scale * scale * queries.noise[n][j];
                }
            });
        }
    });
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int i = 0; i < 4; ++i) scores[n][i] += queries.shifted[n][i % 2];
    });
}

/// The running softmax of a warp. `sums` and `zeros` are of this lane's rows until the end of the split.
template <class V, int Tiles>
struct RunningState {
    static constexpr int zero_groups = V::symmetric ? 1 : V::groups;
    float maximum[Tiles][2], sums[Tiles][2], zeros[Tiles][zero_groups][2];
    float output[Tiles][V::tiles][4];

    __device__ __forceinline__ void clear() {
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int j = 0; j < 2; ++j) {
                maximum[n][j] = -infinity();
                sums[n][j] = 0.0f;
                for (int g = 0; g < zero_groups; ++g) zeros[n][g][j] = 0.0f;
            }
            for (auto& tile : output[n])
                for (float& element : tile) element = 0.0f;
        });
    }

    __device__ __forceinline__ void scale_by(int n, int j, float factor) {
        sums[n][j] *= factor;
        for (int g = 0; g < zero_groups; ++g) zeros[n][g][j] *= factor;
#pragma unroll
        for (int tile = 0; tile < V::tiles; ++tile) {
            output[n][tile][j] *= factor;
            output[n][tile][2 + j] *= factor;
        }
    }

    /// Scores become weights; what came before is scaled to the new maximum if there is one.
    __device__ __forceinline__ void soften(float (&scores)[Tiles][4]) {
        bool grows = false;
        for_each<Tiles>([&](auto n) {
            for (int i = 0; i < 4; ++i) grows = grows || scores[decltype(n)::value][i] > maximum[decltype(n)::value][i % 2];
        });
        if (__any_sync(whole_warp, grows)) {
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    float largest = fmaxf(scores[n][j], scores[n][2 + j]);
                    for (int distance = 4; distance < 32; distance *= 2) {
                        largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, distance));
                    }
                    largest = fmaxf(largest, maximum[n][j]);
                    scale_by(n, j, maximum[n][j] == -infinity() ? 1.0f : exp2_fast((maximum[n][j] - largest) * log2_e));
                    maximum[n][j] = largest;
                }
            });
        }
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int i = 0; i < 4; ++i) {
                const float highest = maximum[n][i % 2];
                // Where every row so far is hidden −∞ − −∞ would be NaN.
                scores[n][i] = exp2_fast((scores[n][i] - (highest == -infinity() ? 0.0f : highest)) * log2_e);
                sums[n][i % 2] += scores[n][i];
            }
        });
    }

    /// O += V̂ᵀ·(a·P).
    __device__ __forceinline__ void weigh(const LaneCodes<V>& codes, const PairNumbers<V>& numbers, const LevelTable& table, u64 wide_levels,
                                          const float (&weights)[Tiles][4], float weight_unit) {
        LaneDecoder<V> decoder(codes, table, wide_levels);
        constexpr int per_group = V::groups == 1 ? V::tiles : V::group_size / 16;
        for_each<V::groups>([&](auto group) {
            constexpr int g = decltype(group)::value;
            u32 scaled[Tiles][2];
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int side = 0; side < 2; ++side) {
                    const float scale = numbers.template get<g>(side) * weight_unit;
                    const float *w = weights[n] + 2 * side;
                    // A hidden row may hold anything, a NaN scale too.
                    const float first = w[0] == 0.0f ? 0.0f : w[0] * scale, second = w[1] == 0.0f ? 0.0f : w[1] * scale;
                    scaled[n][side] = transpose_fragment(pack_halves(first, second));
                    if constexpr (!V::symmetric) {
                        const float zero = numbers.template get<V::groups + g>(side);
                        for (int j = 0; j < 2; ++j) zeros[n][g][j] += w[j] == 0.0f ? 0.0f : w[j] * zero;
                    }
                }
            });
            for_each<per_group>([&](auto inner) {
                constexpr int tile = g * per_group + decltype(inner)::value;
                // The fragment wants channels on M: the octets are its rows, their x and y its columns.
                u32 levels[4];
                decoder.template octet<2 * tile>(levels[0], levels[2]);
                decoder.template octet<2 * tile + 1>(levels[1], levels[3]);
                for_each<Tiles>([&](auto n) { multiply_fragments(output[decltype(n)::value][tile], levels, scaled[decltype(n)::value]); });
            });
        });
    }

    /// Sums over a query's rows, which eight lanes share.
    __device__ __forceinline__ void finish() {
        auto total = [](float value) {
            for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(whole_warp, value, distance);
            return value;
        };
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int j = 0; j < 2; ++j) {
                sums[n][j] = total(sums[n][j]);
                if constexpr (!V::symmetric) {
                    for (int g = 0; g < zero_groups; ++g) zeros[n][g][j] = total(zeros[n][g][j]);
                }
            }
        });
    }
};

/// Brings the four warps' states together in shared memory and writes those of the block.
template <class V, int Tiles>
__device__ __forceinline__ void write_states(RunningState<V, Tiles>& state, const AttendParams& p, int batch, int head_tile, int head_tiles,
                                             int split, float* shared) {
    constexpr int queries = Tiles * query_tile, width = state_head + V::head_dim;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float* maxima = shared + queries * width;  // [warps, queries, 2]: m, l
    state.finish();
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int j = 0; j < 2; ++j) {
            const int query = n * query_tile + 2 * t + j;
            if (g == 0) {
                maxima[(warp * queries + query) * 2] = state.maximum[n][j];
                maxima[(warp * queries + query) * 2 + 1] = state.sums[n][j];
            }
        }
    });
    for (int i = threadIdx.x; i < queries * width; i += attend_threads) shared[i] = 0.0f;
    __syncthreads();
    for (int turn = 0; turn < attend_warps; ++turn) {
        if (warp == turn) {
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    const int query = n * query_tile + 2 * t + j;
                    float largest = -infinity();
                    for (int other = 0; other < attend_warps; ++other) largest = fmaxf(largest, maxima[(other * queries + query) * 2]);
                    const float factor = state_factor(state.maximum[n][j], state.sums[n][j], largest);
                    float* to = shared + query * width;
                    if (g == 0) {
                        to[0] = largest;
                        to[1] += factor * state.sums[n][j];
                        to[2] += factor * state.sums[n][j];
                    }
                    for_each<V::tiles>([&](auto tile) {
                        constexpr int i = decltype(tile)::value;
                        for (int side = 0; side < 2; ++side) {
                            float value = state.output[n][i][2 * side + j] / p.weight_unit;
                            if constexpr (!V::symmetric) value += state.zeros[n][16 * i / V::group_size][j];
                            to[state_head + 16 * i + g + 8 * side] += factor * value;
                        }
                    });
                }
            });
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < queries * width; i += attend_threads) {
        const int query = i / width;
        state_at(p.states, batch, head_tile + query / query_tile, head_tiles, query % query_tile, p.splits, split, V::head_dim)[i % width] =
            shared[i];
    }
}

template <class K, class V, int Tiles>
__global__ void __launch_bounds__(attend_threads) attend(const __grid_constant__ AttendParams p) {
    static_assert(K::stream == keys && V::stream == values, "keys, then values");
    __shared__ float shared[Tiles * query_tile * (state_head + V::head_dim + 2 * attend_warps)];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int split = blockIdx.x, batch = blockIdx.z, head_tiles = p.kv_heads * p.query_tiles;
    const int head_tile = blockIdx.y * Tiles, head = head_tile / p.query_tiles, first_query_tile = head_tile % p.query_tiles;
    const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
    const int packed = lengths[0], sinks = lengths[1];
    const int first_visible = padding_of(p.mask, batch), total = total_tokens(p.mask, lengths);
    const int first_page = split * p.pages_per_split, first_row = first_page * page_rows;
    const int end_row = min(packed, first_row + p.pages_per_split * page_rows);

    RunningState<V, Tiles> state;
    state.clear();
    if (first_row < end_row) {
        const i64 sequence = static_cast<i64>(batch) * p.kv_heads + head;
        const u64* key_pages = reinterpret_cast<const u64*>(p.key_pages) + sequence * p.page_capacity;
        const u64* value_pages = reinterpret_cast<const u64*>(p.value_pages) + sequence * p.page_capacity;
        const int statistics = p.pages_per_key_block ? first_page / p.pages_per_key_block : 0;
        FoldedQueries<K, Tiles> queries;
        queries.load(p, (sequence * p.key_blocks + statistics) * p.query_tiles + first_query_tile, lane);
        QueryView views[Tiles][2];
        const float* biases[Tiles][2];
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int j = 0; j < 2; ++j) {
                const int query = 2 * t + j;
                const QueryPlace place = query_at(head, p.group, p.length, (first_query_tile + n) * query_tile + query);
                views[n][j] = QueryView(p.mask, batch, place, p.length, total);
                const i64 at = (static_cast<i64>(batch) * head_tiles + head_tile + n) * query_tile + query;
                biases[n][j] = reinterpret_cast<const float*>(p.bias) + at * p.bias_capacity;
            }
        });

        const int last_block = (end_row - 1) / block_rows;
        LaneCodes<K> key_codes;
        LaneCodes<V> value_codes;
        PairNumbers<K> key_numbers;
        PairNumbers<V> value_numbers;
        auto load = [&](int block, LaneCodes<K>& kc, PairNumbers<K>& kn, LaneCodes<V>& vc, PairNumbers<V>& vn) {
            const u8* key_page = reinterpret_cast<const u8*>(key_pages[block / blocks_per_page]);
            const u8* value_page = reinterpret_cast<const u8*>(value_pages[block / blocks_per_page]);
            kc.load(key_page, block % blocks_per_page, lane);
            kn.load(key_page, block % blocks_per_page, g);
            vc.load(value_page, block % blocks_per_page, lane);
            vn.load(value_page, block % blocks_per_page, g);
        };
        // Blocks before the first visible row are not read: a sequence's padding may be most of it.
        int block = max(first_row, first_visible / block_rows * block_rows) / block_rows + warp;
        if (block <= last_block) load(block, key_codes, key_numbers, value_codes, value_numbers);
        while (block <= last_block) {
            const int next = block + attend_warps;
            LaneCodes<K> next_key_codes;
            LaneCodes<V> next_value_codes;
            PairNumbers<K> next_key_numbers;
            PairNumbers<V> next_value_numbers;
            if (next <= last_block) load(next, next_key_codes, next_key_numbers, next_value_codes, next_value_numbers);

            float scores[Tiles][4];
            score_block<K, Tiles>(key_codes, key_numbers, queries, p.key_levels, p.key_wide_levels, scores);
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int i = 0; i < 4; ++i) {
                    const int row = block * block_rows + g + 8 * (i / 2);
                    if (row < first_visible || row >= end_row) {
                        scores[n][i] = -infinity();
                        continue;
                    }
                    // Queries that do not exist have a bias too: zeros or whatever is there, hidden by their view.
                    if (p.bias) scores[n][i] += biases[n][i % 2][row];
                    scores[n][i] = views[n][i % 2].apply(p.mask, scores[n][i], sinks + row);
                }
            });
            state.soften(scores);
            state.weigh(value_codes, value_numbers, p.value_levels, p.value_wide_levels, scores, p.weight_unit);
            block = next;
            key_codes = next_key_codes;
            key_numbers = next_key_numbers;
            value_codes = next_value_codes;
            value_numbers = next_value_numbers;
        }
    }
    write_states<V, Tiles>(state, p, batch, head_tile, head_tiles, split, shared);
}

}  // namespace skvq

// Attention of many queries over rows in the model's type, on tensor cores: sinks, window, rows of the call itself, and pieces of the past that
// unpack.cuh has brought back.
//
// Is: the same partial states as plain.cuh, for f16 and bf16. Is not: for a few queries (plain.cuh), nor over packed bytes.
// Grid: splits × (kv heads · blocks of queries) × batch; block: 4 warps, each with 32 queries of a kv head, or 16 where heads are wide. A block passes over
// 64 rows at a time, or 32:
//
//   scores [queries × rows]     = Q [queries × channels] · Kᵀ [channels × rows]      from shared memory by ldmatrix
//   O      [queries × channels] += P [queries × rows] · V [rows × channels]          scores are the A operand as they are
//
// Keys of the next rows are on their way behind the products with values, values behind those with keys. A split is a run of such tiles, counted over all
// regions. `carries`: states go on from what they were, so that a past of any length needs no more of them.
// A row that is not finite spoils who sees it, and nobody else: of values the channels that are not, or, in a tile that not all queries see, all of them.
#pragma once
#include "plain.cuh"
#include "reach.cuh"
#include "running.cuh"

namespace skvq {

constexpr int rows_warps = 4, rows_block_threads = 32 * rows_warps, row_regions = 4;

/// Of a thread's copies. With four on sm_80, or three elsewhere, registers are a word or two short.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int chunks_at_once = 3;
#else
constexpr int chunks_at_once = 4;
#endif

/// How a block is cut; src/cuda/kernels.rs knows its bytes and its queries.
template <int Dk, int Dv>
struct RowsShape {
    static constexpr bool wide = Dk > 128 || Dv > 128;
    static constexpr int query_tiles = wide ? 1 : 2;  // of sixteen, of a warp
    static constexpr int warp_queries = 16 * query_tiles, queries = rows_warps * warp_queries;
    static constexpr int rows = wide ? 32 : 64;
    // Eight rows sixteen bytes further each lie in different banks.
    static constexpr int key_stride = 2 * Dk + 16, value_stride = 2 * Dv + 16;
    static constexpr int keys_at = queries * key_stride, values_at = keys_at + rows * key_stride, bytes = values_at + rows * value_stride;
};

/// Of a row of the grid: the kv head, and the first of its queries. The last queries come first: of a call's own rows they see most.
struct BlockQueries {
    int head, first;

    __device__ __forceinline__ BlockQueries(const RowsParams& p, int grid_row, int queries) {
        const int blocks = (p.group * p.length + queries - 1) / queries;
        head = grid_row / blocks, first = (blocks - 1 - grid_row % blocks) * queries;
    }
};

/// What of a region the block's queries may see.
struct RegionPart {
    int token;       // of row 0
    int begin, end;  // rows
};

/// Some rows of a region; without any behind the last one.
struct RowTile {
    int region, first, begin, end;
    __device__ __forceinline__ bool exists() const { return begin < end; }
};

template <class T, int Dk, int Dv>
struct RowsBlock {
    using Shape = RowsShape<Dk, Dv>;
    static constexpr int M = Shape::query_tiles, N = Shape::rows / 8;

    const RowsParams& p;
    const RegionPart* parts;
    SharedPlace shared;
    u8* memory;
    int head, batch, last_tile;

    /// The first tile from number `index` on that has a row to be seen; `index` becomes the number behind it.
    __device__ __forceinline__ RowTile next_tile(int& index) const {
        while (index < last_tile) {
            int inner = index++, region = 0;
            while (region < row_regions && inner >= p.regions[region].tiles) inner -= p.regions[region++].tiles;
            if (region == row_regions) break;
            const int first = inner * Shape::rows;
            const RowTile tile{region, first, max(first, parts[region].begin), min(first + Shape::rows, parts[region].end)};
            if (tile.exists()) return tile;
        }
        return {0, 0, 0, 0};
    }

    /// Asks for a tile's rows; zeros where there are none.
    template <int D, bool Values>
    __device__ __forceinline__ void ask(const RowTile& tile) const {
        if (!tile.exists()) return;
        const PlainRegion& region = p.regions[tile.region].rows;
        const int ring_first = region.ring_first < 0 ? Lengths(p.lengths).first : region.ring_first;
        const u64 rows = Values ? region.value_rows : region.key_rows;
        const i64 batch_stride = Values ? region.value_batch_stride : region.key_batch_stride;
        const i64 head_stride = Values ? region.value_head_stride : region.key_head_stride;
        const i64 row_stride = Values ? region.value_row_stride : region.key_row_stride;
        const bool aligned = lies_wide<T>(rows, batch_stride, head_stride, row_stride);
        const T* from = reinterpret_cast<const T*>(rows) + batch * batch_stride + head * head_stride;
        constexpr int chunks = D / 8, at = Values ? Shape::values_at : Shape::keys_at, stride = Values ? Shape::value_stride : Shape::key_stride;
#pragma unroll chunks_at_once
        for (int chunk = threadIdx.x; chunk < Shape::rows * chunks; chunk += rows_block_threads) {
            const int row = chunk / chunks, part = chunk % chunks, to = at + row * stride + part * 16;
            const int own = tile.first + row;
            if (own < tile.begin || own >= tile.end) {
                *reinterpret_cast<U32x4*>(memory + to) = {0, 0, 0, 0};
                continue;
            }
            int place = ring_first + own;
            if (region.ring_rows && place >= region.ring_rows) place -= region.ring_rows;
            const T* source = from + place * row_stride + part * 8;
            if (aligned) copy_to_shared<0, 0>(shared + to, reinterpret_cast<u64>(source));
            else *reinterpret_cast<U32x4*>(memory + to) = load_chunk(source, false);
        }
    }

    /// The block's queries as they are; zeros for those that do not exist.
    __device__ __forceinline__ void load_queries(int first_query) const {
        const bool aligned = lies_wide<T>(p.query, p.query_batch_stride, p.query_head_stride, p.query_position_stride);
        constexpr int chunks = Dk / 8;
        for (int chunk = threadIdx.x; chunk < Shape::queries * chunks; chunk += rows_block_threads) {
            const int query = chunk / chunks, part = chunk % chunks;
            const QueryPlace place = query_at(head, p.group, p.length, first_query + query);
            U32x4 loaded = {0, 0, 0, 0};
            if (place.exists) {
                loaded = load_chunk(reinterpret_cast<const T*>(p.query) + batch * p.query_batch_stride + place.head * p.query_head_stride +
                                        place.position * p.query_position_stride + part * 8,
                                    aligned);
            }
            *reinterpret_cast<U32x4*>(memory + query * Shape::key_stride + part * 16) = loaded;
        }
    }
};

/// Of tokens that are seen: a product with it is rounded by less than one.
constexpr float lowest_score = -4e6f;

/// Weights are at most two to the power of this: f16 loses what is less than 2^-25, and beside a sink all others may be.
template <class T>
constexpr float weight_exponent = 0.0f;
template <>
constexpr float weight_exponent<Half> = 15.0f;

/// A lane's sums: of query tile m the queries g and g + 8.
template <class T, int M, int Dv>
struct RowsState {
    float reference[M][2], sums[M][2], output[M][Dv / 8][4];

    __device__ __forceinline__ void clear() {
        for_each<2 * M>([&](auto index) {
            constexpr int m = decltype(index)::value / 2, side = decltype(index)::value % 2;
            reference[m][side] = no_reference, sums[m][side] = 0.0f;
        });
        for (auto& tile : output)
            for (auto& octet : tile)
                for (float& element : octet) element = 0.0f;
    }

    /// Scores become weights, at most 2^weight_exponent. The reference is in units of log 2.
    template <int N>
    __device__ __forceinline__ void soften(float (&scores)[M][N][4]) {
        float largest[M][2];
        bool moves = false;
        for_each<M>([&](auto index) {
            constexpr int m = decltype(index)::value;
            largest[m][0] = largest[m][1] = -infinity();
            for_each<4 * N>([&](auto element) {
                constexpr int n = decltype(element)::value / 4, i = decltype(element)::value % 4;
                largest[m][i / 2] = fmaxf(largest[m][i / 2], scores[m][n][i]);
            });
            for (float& score : largest[m]) score = fmaf(score, log2_e, -weight_exponent<T>);
            moves = moves || largest[m][0] > reference[m][0] || largest[m][1] > reference[m][1];
        });
        if (__any_sync(whole_warp, moves)) {
            for_each<2 * M>([&](auto index) {
                constexpr int m = decltype(index)::value / 2, side = decltype(index)::value % 2;
                for (int distance = 1; distance < 4; distance *= 2) {
                    largest[m][side] = fmaxf(largest[m][side], __shfl_xor_sync(whole_warp, largest[m][side], distance));
                }
                if (largest[m][side] > reference[m][side]) {
                    const float moved = largest[m][side] + headroom, factor = exp2_fast(reference[m][side] - moved);
                    reference[m][side] = moved;
                    sums[m][side] *= factor;
#pragma unroll
                    for (int octet = 0; octet < Dv / 8; ++octet) output[m][octet][2 * side] *= factor, output[m][octet][2 * side + 1] *= factor;
                }
            });
        }
        for_each<4 * N * M>([&](auto element) {
            constexpr int m = decltype(element)::value / (4 * N), n = decltype(element)::value / 4 % N, i = decltype(element)::value % 4;
            scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], log2_e, -reference[m][i / 2]));
            sums[m][i / 2] += scores[m][n][i];
        });
    }
};

/// By all threads of the block: `reach` and the regions' parts, in shared memory.
template <int Queries>
__device__ __forceinline__ void find_parts(const RowsParams& p, int batch, int head, int first_query, BlockReach& reach, RegionPart (&parts)[row_regions]) {
    const Lengths lengths(p.lengths);
    find_block_reach<rows_block_threads, Queries>(p.mask, p.reach, batch, head, p.kv_heads, p.group, p.length, first_query, lengths.total(p.mask), reach);
    if (threadIdx.x < row_regions) {
        const RowsRegion& region = p.regions[threadIdx.x];
        RegionPart part = {0, 0, 0};
        if (region.tiles) {
            RegionRows rows(region.rows.kind, p.fresh_rows, lengths, padding_of(p.mask, batch));
            if (region.rows.kind == region_past) rows.token += p.first_past, rows.first_visible = max(0, rows.first_visible - p.first_past), rows.count = p.past_rows;
            part = {rows.token, rows.first_visible, min(rows.count, reach.none_from - rows.token)};
        }
        parts[threadIdx.x] = part;
    }
    __syncthreads();
}

template <class T, int Dk, int Dv>
__global__ void __launch_bounds__(rows_block_threads, RowsShape<Dk, Dv>::wide ? 1 : 2) attend_rows(const __grid_constant__ RowsParams p) {
    using Shape = RowsShape<Dk, Dv>;
    constexpr int M = Shape::query_tiles, N = Shape::rows / 8, width = state_head + Dv;
    SKVQ_DYNAMIC_SHARED(u8, memory);
    __shared__ BlockReach reach;
    __shared__ RegionPart parts[row_regions];
    __shared__ u32 spoilt[2];  // rows of values that are not finite, of a tile that not all queries see
    let_next_launch_begin();
    wait_for_earlier_launches();
    const BlockQueries of_block(p, blockIdx.y, Shape::queries);
    const int head = of_block.head, batch = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < 2) spoilt[threadIdx.x] = 0;
    find_parts<Shape::queries>(p, batch, head, of_block.first, reach, parts);

    int index = blockIdx.x * p.tiles_per_split;
    const RowsBlock<T, Dk, Dv> block{p, parts, shared_place(memory), memory, head, batch, index + p.tiles_per_split};
    RowTile tile = block.next_tile(index);
    if (p.carries && !tile.exists()) return;
    block.template ask<Dk, false>(tile);
    commit_copies();
    block.load_queries(of_block.first);

    // A lane's first query, of which others are 8 apart, asked for anew: only what is rare, and what is done once, wants to know.
    auto query_here = [&] {
        const int thread = thread_here();
        return BlockQueries(p, block_y_here(), Shape::queries).first + thread / 32 * Shape::warp_queries + thread % 32 / 4;
    };
    auto state_of = [&](int query) {
        const int head_tile = head * p.query_tiles + query / query_tile;
        return state_at(p.states, batch, head_tile, p.kv_heads * p.query_tiles, query % query_tile, p.state_count, blockIdx.x, Dv);
    };
    RowsState<T, M, Dv> state;
    state.clear();
    if (p.carries) {
        const int own_query = query_here();
        for_each<2 * M>([&](auto which) {
            constexpr int m = decltype(which)::value / 2, side = decltype(which)::value % 2;
            const int query = own_query + 16 * m + 8 * side;
            if (query >= p.group * p.length) return;
            const float* from = state_of(query);
            state.reference[m][side] = from[3];
            state.sums[m][side] = lane % 4 == 0 ? from[1] : 0.0f;
#pragma unroll
            for (int octet = 0; octet < Dv / 8; ++octet) {
                const U32x2 pair = *reinterpret_cast<const U32x2*>(from + state_head + 8 * octet + lane % 4 * 2);
                state.output[m][octet][2 * side] = __uint_as_float(pair.x), state.output[m][octet][2 * side + 1] = __uint_as_float(pair.y);
            }
        });
    }

    // Of 16 × 16 elements four matrices: the lower half of the rows, the upper one, then those of the other columns, which is an operand A, or two B of
    // a transposed one; of keys the other columns second, which is two B. Their registers must be neighbours.
    const SharedPlace queries_at = block.shared + (warp * Shape::warp_queries + lane % 16) * Shape::key_stride + lane / 16 * 16;
    const SharedPlace keys_at = block.shared + Shape::keys_at + (lane % 8 + lane / 16 * 8) * Shape::key_stride + lane / 8 % 2 * 16;
    const SharedPlace values_at = block.shared + Shape::values_at + lane % 16 * Shape::value_stride + lane / 16 * 16;
    // A token that a mask lowers by the largest number is seen by who sees no other.
    auto of_seen = [](float score) { return score < lowest_score && score != -infinity() ? lowest_score : score; };

    while (tile.exists()) {
        wait_for_copies<0>();
        __syncthreads();
        block.template ask<Dv, true>(tile);
        commit_copies();
        const RegionPart part = parts[tile.region];
        const int first_token = part.token + tile.first;
        const bool mixed = tile.begin != tile.first || tile.end != tile.first + Shape::rows || first_token < reach.all_from ||
                           first_token + Shape::rows > reach.all_to || p.mask.softcap > 0.0f;
        u32 weights[M][N][2];  // two of a query each
        float scores[M][N][4] = {};
#pragma unroll
        for (int step = 0; step < Dk / 16; ++step) {
            u32 query[M][4];
            for_each<M>([&](auto m) { load_matrices<false>(query[decltype(m)::value], queries_at + decltype(m)::value * 16 * Shape::key_stride + 32 * step); });
            for_each<N / 2>([&](auto pair) {
                constexpr int n = 2 * decltype(pair)::value;
                u32 key[4];
                load_matrices<false>(key, keys_at + n * 8 * Shape::key_stride + 32 * step);
                for_each<M>([&](auto index) {
                    constexpr int m = decltype(index)::value;
                    multiply_elements(scores[m][n], query[m], {key[0], key[1]}, T{});
                    multiply_elements(scores[m][n + 1], query[m], {key[2], key[3]}, T{});
                });
            });
        }
        for_each<4 * N * M>([&](auto element) {
            constexpr int m = decltype(element)::value / (4 * N), n = decltype(element)::value / 4 % N, i = decltype(element)::value % 4;
            scores[m][n][i] *= p.scale;
        });
        const int rare_lane = thread_here() % 32;
        if (p.squares && p.regions[tile.region].rows.kind == region_past) {
            const int own_query = query_here();
            const float* squares = reinterpret_cast<const float*>(p.squares) + (static_cast<i64>(batch) * p.kv_heads + head) * p.past_room + tile.first;
            for_each<M>([&](auto index) {
                constexpr int m = decltype(index)::value;
                float noise[2];
                for (int side = 0; side < 2; ++side) {
                    const int query = own_query + 16 * m + 8 * side;
                    const i64 place = ((static_cast<i64>(batch) * p.kv_heads + head) * p.query_tiles + query / query_tile) * query_tile + query % query_tile;
                    noise[side] = query < p.group * p.length ? -reinterpret_cast<const float*>(p.extras)[place * p.extras_width + 2] : 0.0f;
                }
                for_each<N>([&](auto octet) {
                    constexpr int n = decltype(octet)::value;
                    const U32x2 pair = *reinterpret_cast<const U32x2*>(squares + 8 * n + rare_lane % 4 * 2);
                    for_each<4>([&](auto element) {
                        constexpr int i = decltype(element)::value;
                        scores[m][n][i] = fmaf(__uint_as_float(i % 2 ? pair.y : pair.x), noise[i / 2], scores[m][n][i]);
                    });
                });
            });
        }
        if (mixed) {
            const int total = Lengths(p.lengths).total(p.mask), own_query = query_here();
            const bool limits_alone = p.mask.kind == 0 && !(p.mask.softcap > 0.0f);
            for_each<2 * M>([&](auto which) {
                constexpr int m = decltype(which)::value / 2, side = decltype(which)::value % 2;
                const QueryPlace place = query_at(head, p.group, p.length, own_query + 16 * m + 8 * side);
                const QueryView view(p.mask, batch, place, p.length, total);
                if (limits_alone) {
                    const int begin = tile.begin - tile.first - rare_lane % 4 * 2, last = min(tile.end - 1, view.last_token - part.token) - tile.first - rare_lane % 4 * 2;
                    for_each<2 * N>([&](auto element) {
                        constexpr int n = decltype(element)::value / 2, j = decltype(element)::value % 2;
                        float& score = scores[m][n][2 * side + j];
                        if (8 * n + j < begin || 8 * n + j > last) score = -infinity();
                    });
                    return;
                }
                for_each<2 * N>([&](auto element) {
                    constexpr int n = decltype(element)::value / 2, j = decltype(element)::value % 2;
                    const int row = tile.first + 8 * n + rare_lane % 4 * 2 + j;
                    float& score = scores[m][n][2 * side + j];
                    if (row < tile.begin || row >= tile.end) score = -infinity();
                    else score = of_seen(view.apply(p.mask, score, part.token + row));
                });
            });
        }
        state.soften(scores);
        for_each<2 * N * M>([&](auto index) {
            constexpr int m = decltype(index)::value / (2 * N), n = decltype(index)::value / 2 % N, side = decltype(index)::value % 2;
            weights[m][n][side] = narrow_pair(scores[m][n][2 * side], scores[m][n][2 * side + 1], T{});
        });
        wait_for_copies<0>();
        __syncthreads();
        if (mixed) {
            // No weight is no weight, whatever a row holds: rows that are not finite are taken out, and spoil the sums of who sees them.
            constexpr int chunks = Dv / 8;
            for (int chunk = threadIdx.x; chunk < Shape::rows * chunks; chunk += rows_block_threads) {
                const int row = chunk / chunks;
                const U32x4 four = *reinterpret_cast<const U32x4*>(memory + Shape::values_at + row * Shape::value_stride + chunk % chunks * 16);
                const u32 words[4] = {four.x, four.y, four.z, four.w};
                bool finite = true;
                for (u32 word : words) {
                    float pair[2];
                    widen_word(word, pair, T{});
                    finite = finite && is_finite(pair[0]) && is_finite(pair[1]);
                }
                if (!finite) atomicOr(spoilt + row / 32, 1u << row % 32);
            }
            __syncthreads();
            if (spoilt[0] | spoilt[1]) {
                const int own_pair = thread_here() % 4 * 2;
                for (int chunk = threadIdx.x; chunk < Shape::rows * chunks; chunk += rows_block_threads) {
                    const int row = chunk / chunks;
                    if (spoilt[row / 32] >> row % 32 & 1)
                        *reinterpret_cast<U32x4*>(memory + Shape::values_at + row * Shape::value_stride + chunk % chunks * 16) = {0, 0, 0, 0};
                }
                for_each<2 * N * M>([&](auto index) {
                    constexpr int m = decltype(index)::value / (2 * N), n = decltype(index)::value / 2 % N, side = decltype(index)::value % 2;
                    const u32 pair = spoilt[n / 4] >> (8 * (n % 4) + own_pair);
                    if ((pair & 1 && weights[m][n][side] & 0xffffu) || (pair & 2 && weights[m][n][side] >> 16))
                        state.sums[m][side] = not_a_number();
                });
                __syncthreads();
                if (threadIdx.x < 2) spoilt[threadIdx.x] = 0;
            }
        }
        const RowTile next = block.next_tile(index);
        block.template ask<Dk, false>(next);
        commit_copies();
        for_each<N / 2>([&](auto pair) {
            constexpr int n = 2 * decltype(pair)::value;
            for_each<Dv / 16>([&](auto index) {
                constexpr int octet = 2 * decltype(index)::value;
                u32 value[4];
                load_matrices<true>(value, values_at + n * 8 * Shape::value_stride + 16 * octet);
                for_each<M>([&](auto which) {
                    constexpr int m = decltype(which)::value;
                    const u32 rows[4] = {weights[m][n][0], weights[m][n][1], weights[m][n + 1][0], weights[m][n + 1][1]};
                    multiply_elements(state.output[m][octet], rows, {value[0], value[1]}, T{});
                    multiply_elements(state.output[m][octet + 1], rows, {value[2], value[3]}, T{});
                });
            });
        });
        tile = next;
    }

    const int own_query = query_here();
    for_each<2 * M>([&](auto which) {
        constexpr int m = decltype(which)::value / 2, side = decltype(which)::value % 2;
        float sum = state.sums[m][side];
        for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(whole_warp, sum, distance);
        const int query = own_query + 16 * m + 8 * side;
        if (query >= p.group * p.length) return;
        const float reference = state.reference[m][side];
        float* to = state_of(query);
        if (lane % 4 == 0) to[0] = reference == no_reference ? -infinity() : reference * log_2, to[1] = sum, to[2] = 0.0f, to[3] = reference;
#pragma unroll
        for (int octet = 0; octet < Dv / 8; ++octet) {
            *reinterpret_cast<U32x2*>(to + state_head + 8 * octet + lane % 4 * 2) = {__float_as_uint(state.output[m][octet][2 * side]),
                                                                                 __float_as_uint(state.output[m][octet][2 * side + 1])};
        }
    });
}

}  // namespace skvq

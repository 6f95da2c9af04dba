// The softmax that a warp of attend.cuh keeps while it passes over rows, and its sums over values.
//
// Is: scores of a row block to weights, O += V̂ᵀ·(a·P), the states of four warps to one. Is not: scores, masks, loads (attend.cuh).
// Lane 4·g + t has the scores of rows g, g + 8 and queries 2t, 2t + 1 and the sums of channels g, g + 8 (+ 16·tile) and the same queries. So a
// query's reference and factor are where its scores and its sums are, and only P changes hands, by one transposition.
// Scores are in units of log 2, and come less a reference. Weights are `unit` times 2^(score − reference). When those of a query in a row block or two
// sum to more than `unit`, the reference moves to `headroom` above the largest score so far and the sums with it, so that it soon hardly ever
// moves again; f16 has the range for weights that much smaller.
#pragma once
#include "numbers.cuh"
#include "state.cuh"
#include "masked.cuh"

namespace skvq {

constexpr int attend_warps = 4, attend_threads = 32 * attend_warps;
constexpr float headroom = 4.0f;
/// The reference of a query that has seen no row, whose scores come less 0.
constexpr float no_reference = -1e38f;
constexpr float log_2 = 0.69314718055994531f;

/// `Integers`: products as ternary.cuh or masked.cuh makes them.
template <class V, int Tiles, bool Integers>
struct RunningState {
    static constexpr int zero_groups = V::symmetric ? 1 : V::groups;
    static constexpr int tiles = Integers ? IntegerSums<V>::tiles : V::tiles;
    float reference[Tiles][2], sums[Tiles][2], zeros[Tiles][zero_groups][2];
    /// What turns the scores of a row into exponents of weights: the logarithm of the unit less the reference, and what all rows have.
    float offset[Tiles][2];
    float output[Tiles][tiles][4];
    float unit, exponent;

    /// `unit`: AttendParams::weight_unit.
    __device__ __forceinline__ void clear(float weight_unit) {
        unit = weight_unit, exponent = static_cast<float>(static_cast<int>(__float_as_uint(weight_unit) >> 23) - 127);
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int j = 0; j < 2; ++j) {
                reference[n][j] = no_reference;
                sums[n][j] = 0.0f;
                offset[n][j] = exponent;
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
        for (int tile = 0; tile < tiles; ++tile) {
            output[n][tile][j] *= factor;
            output[n][tile][2 + j] *= factor;
        }
    }

    template <int Blocks>
    __device__ __forceinline__ void weights_of(const float (&scores)[Blocks][Tiles][4], float (&weights)[Blocks][Tiles][4], float (&partial)[Tiles][2]) {
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for_each<Blocks>([&](auto inner) {
                constexpr int block = decltype(inner)::value;
                for (int i = 0; i < 4; ++i) {
                    const float weight = exp2_fast(scores[block][n][i]);
                    partial[n][i % 2] = block == 0 && i < 2 ? weight : partial[n][i % 2] + weight;
                    weights[block][n][i] = weight;
                }
            });
        });
    }

    /// Scores of some row blocks, with `offset`, to weights; what came before is brought to a new reference if there is one. `begins`: a
    /// query may see its first row.
    template <int Blocks>
    __device__ __forceinline__ void soften(float (&scores)[Blocks][Tiles][4], float (&weights)[Blocks][Tiles][4], bool begins) {
        float partial[Tiles][2];
        weights_of(scores, weights, partial);
        bool moves = begins;
        for_each<2 * Tiles>([&](auto index) { moves = moves || partial[decltype(index)::value / 2][decltype(index)::value % 2] > unit; });
        if (__any_sync(whole_warp, moves)) {
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    float largest = -infinity();
                    for (int block = 0; block < Blocks; ++block) largest = fmaxf(largest, fmaxf(scores[block][n][j], scores[block][n][2 + j]));
                    for (int distance = 4; distance < 32; distance *= 2) {
                        largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, distance));
                    }
                    const bool first = reference[n][j] == no_reference;
                    if (largest == -infinity() || (!first && largest <= exponent - headroom)) continue;
                    const float step = largest - (exponent - headroom);
                    scale_by(n, j, first ? 1.0f : exp2_fast(-step));
                    reference[n][j] = first ? step : reference[n][j] + step;
                    offset[n][j] -= step;
                    for (int block = 0; block < Blocks; ++block) scores[block][n][j] -= step, scores[block][n][2 + j] -= step;
                }
            });
            weights_of(scores, weights, partial);
        }
        for_each<2 * Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value / 2, j = decltype(index)::value % 2;
            sums[n][j] += partial[n][j];
        });
    }

    /// O += V̂ᵀ·(a·P). With `Hides`, rows without weight may hold anything, a NaN scale too.
    template <bool Hides>
    __device__ __forceinline__ void weigh(const LaneCodes<V>& codes, const PairNumbers<V>& numbers, const LevelTable& table, u64 wide_levels,
                                          const float (&weights)[Tiles][4]) {
        LaneDecoder<V> decoder(codes, table, wide_levels);
        constexpr int per_group = V::groups == 1 ? V::tiles : V::group_size / 16;
        for_each<V::groups>([&](auto group) {
            constexpr int g = decltype(group)::value;
            u32 scaled[Tiles][2];
            float scales[2], zero[2] = {};
            numbers.template get<g>(scales);
            if constexpr (!V::symmetric) numbers.template get<V::groups + g>(zero);
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int side = 0; side < 2; ++side) {
                    const float* w = weights[n] + 2 * side;
                    auto times = [&](int j, float number) { return Hides && w[j] == 0.0f ? 0.0f : w[j] * number; };
                    scaled[n][side] = transpose_fragment(narrow_to_halves(times(0, scales[side]), times(1, scales[side])));
                    if constexpr (!V::symmetric) {
                        for (int j = 0; j < 2; ++j) zeros[n][g][j] += times(j, zero[side]);
                    }
                }
            });
            if constexpr (Integers) {
                u32 pairs[Tiles][2];
                for_each<Tiles>([&](auto index) {
                    constexpr int n = decltype(index)::value;
                    pairs[n][0] = permute_bytes(scaled[n][0], scaled[n][1], 0x5410);
                    pairs[n][1] = permute_bytes(scaled[n][0], scaled[n][1], 0x7632) ^ 0x80008000u;
                });
                IntegerSums<V>::for_each_tile(codes, [&](auto tile, const u32(&operand)[4]) {
                    for_each<Tiles>([&](auto n) {
                        multiply_fragments(output[decltype(n)::value][decltype(tile)::value], operand, pairs[decltype(n)::value]);
                    });
                });
            } else {
                for_each<per_group>([&](auto inner) {
                    constexpr int tile = g * per_group + decltype(inner)::value;
                    // The fragment wants channels on M: the octets are its rows, their x and y its columns.
                    u32 levels[4];
                    decoder.template octet<2 * tile>(levels[0], levels[2]);
                    decoder.template octet<2 * tile + 1>(levels[1], levels[3]);
                    for_each<Tiles>([&](auto n) { multiply_fragments(output[decltype(n)::value][tile], levels, scaled[decltype(n)::value]); });
                });
            }
        });
    }

    /// Σ weight·a·level of channel 8·Octet + g and query 2t + j.
    template <int N, int Octet>
    __device__ __forceinline__ float channel(int j, float step) const {
        if constexpr (Integers) return IntegerSums<V>::template channel<Octet>(output[N], j, step);
        return output[N][Octet / 2][2 * (Octet % 2) + j];
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

/// A reference as a state has it.
__device__ __forceinline__ float score_of(float reference) { return reference == no_reference ? -infinity() : reference * log_2; }

/// Calls put(place in a state, value) for what a lane has of query 2t + j of tile N, times `factor`: but for the reference, all of it.
template <int N, class V, int Tiles, bool Integers, class Put>
__device__ __forceinline__ void put_sums(const RunningState<V, Tiles, Integers>& state, const AttendParams& p, int j, float factor, const Put& put) {
    const int g = threadIdx.x % 32 / 4;
    const float correction = p.value_levels.correction, step = Integers && !has_masks<V> ? level_of(p.value_levels, 2) : 1.0f;
    if (g == 0) {
        const float sum = factor * state.sums[N][j];
        put(1, sum), put(2, sum), put(3, 0.0f);
    }
    for_each<V::tiles>([&](auto tile) {
        constexpr int i = decltype(tile)::value;
        for_each<2>([&](auto half) {
            constexpr int side = decltype(half)::value;
            float value = correction * state.template channel<N, 2 * i + side>(j, step);
            if constexpr (!V::symmetric) value += state.zeros[N][16 * i / V::group_size][j];
            put(state_head + 16 * i + g + 8 * side, factor * value);
        });
    });
    // Channels without codes.
    for (int channel = V::tiles * 16 + g; channel < V::head_dim; channel += 8) put(state_head + channel, 0.0f);
}

/// Writes a warp's states as those of a split.
template <class V, int Tiles, bool Integers>
__device__ __forceinline__ void write_own_states(RunningState<V, Tiles, Integers>& state, const AttendParams& p, int batch, int head_tile,
                                                 int head_tiles, int split) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int exist = p.group * p.length - head_tile % p.query_tiles * query_tile;
    const float per_unit = 1.0f / p.weight_unit;
    state.finish();
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int j = 0; j < 2; ++j) {
            const int query = n * query_tile + 2 * t + j;
            if (query >= exist) continue;
            float* to = state_at(p.states, batch, head_tile + n, head_tiles, 2 * t + j, p.splits, split, V::head_dim);
            if (g == 0) to[0] = score_of(state.reference[n][j]);
            put_sums<n>(state, p, j, per_unit, [&](int at, float value) { to[at] = value; });
        }
    });
}

/// How the states of a block's warps meet in shared memory: of so many warps at once as there is room for.
template <class V, int Tiles>
struct StateExchange {
    static constexpr int queries = Tiles * query_tile, width = state_head + V::head_dim, warp_floats = queries * width;
    static constexpr int at_once = attend_warps * warp_floats * 4 <= 40 * 1024 ? attend_warps : 1;
    static constexpr int bytes = (at_once * warp_floats + attend_warps * queries) * 4;
};

/// Brings the four warps' states together in shared memory: references are joint, sums are StateExchange::at_once summands.
template <class V, int Tiles, bool Integers>
__device__ __forceinline__ void exchange_states(RunningState<V, Tiles, Integers>& state, const AttendParams& p, float* shared) {
    using Exchange = StateExchange<V, Tiles>;
    constexpr int queries = Exchange::queries, width = Exchange::width;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const float per_unit = 1.0f / p.weight_unit;
    float* references = shared + Exchange::at_once * Exchange::warp_floats;  // [warps, queries]
    state.finish();
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int j = 0; j < 2; ++j) {
            if (g == 0) references[warp * queries + n * query_tile + 2 * t + j] = state.reference[n][j];
        }
    });
    __syncthreads();
    for (int turn = 0; turn < attend_warps; turn += Exchange::at_once) {
        if (Exchange::at_once == attend_warps || warp == turn) {
            for_each<Tiles>([&](auto index) {
                constexpr int n = decltype(index)::value;
                for (int j = 0; j < 2; ++j) {
                    const int query = n * query_tile + 2 * t + j;
                    float largest = no_reference;
                    for (int other = 0; other < attend_warps; ++other) largest = fmaxf(largest, references[other * queries + query]);
                    // A state that saw nothing has no weight and no sums, unless they are not numbers.
                    const float factor = exp2_fast(state.reference[n][j] - largest) * per_unit;
                    float* to = shared + (Exchange::at_once == attend_warps ? warp : 0) * Exchange::warp_floats + query * width;
                    auto put = [&](int at, float value) { to[at] = Exchange::at_once == attend_warps || turn == 0 ? value : to[at] + value; };
                    if (g == 0) to[0] = score_of(largest);
                    put_sums<n>(state, p, j, factor, put);
                }
            });
        }
        __syncthreads();
    }
}

/// The state of a block, each element by one thread.
template <class V, int Tiles, bool Integers>
__device__ __forceinline__ void write_states(RunningState<V, Tiles, Integers>& state, const AttendParams& p, int batch, int head_tile,
                                             int head_tiles, int split, float* shared) {
    using Exchange = StateExchange<V, Tiles>;
    constexpr int queries = Exchange::queries, width = Exchange::width;
    exchange_states(state, p, shared);
    const int exist = min(queries, p.group * p.length - head_tile % p.query_tiles * query_tile);
    for (int i = threadIdx.x; i < exist * width; i += attend_threads) {
        const int query = i / width, element = i % width;
        float value = shared[i];
        if (element != 0) {
            for (int other = 1; other < Exchange::at_once; ++other) value += shared[other * Exchange::warp_floats + i];
        }
        state_at(p.states, batch, head_tile + query / query_tile, head_tiles, query % query_tile, p.splits, split, V::head_dim)[element] = value;
    }
}

}  // namespace skvq

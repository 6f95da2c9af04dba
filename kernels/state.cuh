// The partial softmax of a query over some rows, as kernels hand it to each other: f32 {m, l, Σp of packed rows, 0, o[Dv]}.
//
// m is the largest score or near it (−∞ if no row was seen), l = Σ exp(score − m), o = Σ exp(score − m)·v. States merge in any order.
#pragma once
#include "params.cuh"

namespace skvq {

constexpr int state_head = 4;
constexpr int query_tile = 8;

/// States `[batch, kv heads, query tiles, 8, count, 4 + width]`.
__device__ __forceinline__ float* state_at(u64 states, int batch, int head_tile, int head_tiles, int query, int count, int index, int width) {
    const i64 row = ((static_cast<i64>(batch) * head_tiles + head_tile) * query_tile + query) * count + index;
    return reinterpret_cast<float*>(states) + row * (state_head + width);
}

/// exp(m − maximum), the factor that brings a state to a new maximum. A state that saw nothing has none, unless it is not a number.
__device__ __forceinline__ float state_factor(float m, float l, float maximum) {
    if (is_nan(l)) return l;
    return m == -infinity() ? 0.0f : exp2_fast((m - maximum) * log2_e);
}

/// By all threads of a block: whether it is the last of `blocks` to come here, which then sees what the others have written before. The counter is 0
/// before the first and after the last.
__device__ __forceinline__ bool comes_last(i32* counter, int blocks) {
    __shared__ i32 before;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(counter, 1);
        __threadfence();
    }
    __syncthreads();
    const bool last = before == blocks - 1;
    if (last && threadIdx.x == 0) *counter = 0;
    return last;
}

/// Query q of a kv head: which head and position it is.
struct QueryPlace {
    int head, position;
    bool exists;
};
__device__ __forceinline__ QueryPlace query_at(int kv_head, int group, int length, int query) {
    return {kv_head * group + query / length, query % length, query < group * length};
}

/// Query 0 … 7 of a tile, or the last one that exists in its place: its numbers are there already, and nobody asks for what becomes of it.
__device__ __forceinline__ int existing_query(int query, int group, int length, int tile) {
    return min(query, max(0, min(query_tile, group * length - tile * query_tile) - 1));
}

/// q·m(t) of a row is range·(x − 1.5), x in [1, 2) having the last 15 of these 16 bits behind its point; the first of them is set.
constexpr float bias_middle = 1.5f, bias_reach = 0.499f;  // of x, which rounding must not take out of [1, 2)
/// x of the lower (`Second` 0) or the upper half of a word. A byte of `exponent`, 0x3f, is the float's first one.
template <int Second>
__device__ __forceinline__ float bias_place(u32 word, u32 exponent) {
    return __uint_as_float(permute_bytes(word, exponent, Second ? 0x4325 : 0x4105));
}
constexpr u32 bias_exponent = 0x3f;

/// Where q·m(t) of a tile's query lies for row 0, and the step from row to row: two queries lie together, unless there is but one.
struct BiasPlace {
    u16* first;
    int step;
    float* range;

    /// `head_tile`: of all sequences' kv heads and tiles. `query`: one of an even number has the next one behind it.
    __device__ __forceinline__ BiasPlace(u64 bias, i64 head_tile, i64 capacity, int all_queries, int query) : step(all_queries > 1 ? 2 : 1) {
        u8* tile = reinterpret_cast<u8*>(bias) + head_tile * (query_tile * (4 + 2 * capacity));
        range = reinterpret_cast<float*>(tile) + query;
        first = reinterpret_cast<u16*>(tile + 4 * query_tile) + query / step * step * capacity + query % step;
    }
    __device__ __forceinline__ float at(int row) const {
        return *range * (bias_place<0>(first[static_cast<i64>(row) * step], bias_exponent) - bias_middle);
    }
};

/// softcap·tanh(score / softcap), tanh x being 1 − 2 / (1 + exp 2x): right to a few 1e-7 of the cap.
__device__ __forceinline__ float soft_cap(float score, float softcap) {
    return softcap - 2.0f * softcap * reciprocal_fast(1.0f + exp2_fast(score * reciprocal_fast(softcap) * (2.0f * log2_e)));
}

/// What a mask that is added (not of bytes) adds at element `at`.
__device__ __forceinline__ float mask_bias(const MaskParams& mask, i64 at) {
    if (mask.kind == 1) return reinterpret_cast<const float*>(mask.mask)[at];
    if (mask.kind == 2) return widen(reinterpret_cast<const Half*>(mask.mask)[at]);
    return widen(reinterpret_cast<const BFloat*>(mask.mask)[at]);
}

/// What one query may see. `token` counts from the beginning of the sequence, padding included.
struct QueryView {
    i64 mask_row;    // element of the mask that token 0 has
    int last_token;  // −1 for a query that does not exist

    /// `total`: tokens that the call attends to.
    __device__ __forceinline__ QueryView(const MaskParams& mask, int batch, const QueryPlace& place, int length, int total)
        : mask_row(batch * mask.batch_stride + place.head * mask.head_stride + place.position * mask.position_stride),
          last_token(!place.exists ? -1 : mask.causal ? total - length + place.position : 0x7fffffff) {}
    QueryView() = default;

    /// Softcap, mask, causality: the score that enters the softmax.
    __device__ __forceinline__ float apply(const MaskParams& mask, float score, int token) const {
        if (token > last_token) return -infinity();
        if (mask.softcap > 0.0f) score = soft_cap(score, mask.softcap);
        if (mask.kind == 0) return score;
        const i64 at = mask_row + token;
        if (mask.kind == 4) return reinterpret_cast<const u8*>(mask.mask)[at] ? score : -infinity();
        const float bias = mask_bias(mask, at);
        // A hidden token stays hidden even if its score is not a number.
        return bias == -infinity() ? bias : score + bias;
    }
};

/// What a launch reads of the store: packed rows, sinks, rows of the window, and where it begins in the ring.
struct Lengths {
    int packed, sinks, window, first;

    __device__ __forceinline__ explicit Lengths(u64 lengths) {
        const i32* read = reinterpret_cast<const i32*>(lengths);
        packed = read[0], sinks = read[1], window = read[2], first = read[3];
    }
    /// Those in front of a token that enters with this launch, if one does: where the window is full its first row is the last packed one from now on.
    /// Without room the token takes the place of the one before.
    __device__ __forceinline__ Lengths(u64 lengths, const EnterParams& enter) : Lengths(lengths) {
        const bool enters = enter.window != 0, has_room = stored() < enter.most_tokens, leaves = enters && has_room && window >= enter.window;
        window -= leaves || (enters && !has_room);
        packed += leaves, first += leaves;
        if (first == enter.ring_rows) first = 0;
    }
    __device__ __forceinline__ int stored() const { return packed + sinks + window; }
    /// Tokens that a call attends to.
    __device__ __forceinline__ int total(const MaskParams& mask) const { return stored() + mask.total_from_lengths_plus; }
};
/// Tokens of padding before sequence `batch`.
__device__ __forceinline__ int padding_of(const MaskParams& mask, int batch) {
    return mask.paddings ? reinterpret_cast<const i32*>(mask.paddings)[batch] : 0;
}

}  // namespace skvq

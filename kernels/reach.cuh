// What a mask lets each query see: an interval of tokens, at whose ends alone kernels of many queries need the mask itself; of few queries, whether it
// shows all packed rows, as masks of padding do.
//
// Is: a pass or two over the mask, once a call. Is not: exact about what lies between `to` and `none_from`; the mask is.
// Grid: rows of the mask, of those axes along which it is not the same; block: 128 threads, of mask_shows 512.
#pragma once
#include "state.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int shows_threads = 512;

/// Which of a mask's rows is a query's, counted along those axes along which they are not the same.
__device__ __forceinline__ i64 mask_row_of(const MaskParams& mask, int batch, const QueryPlace& place, int heads, int length) {
    return ((mask.batch_stride ? batch : 0) * static_cast<i64>(mask.head_stride ? heads : 1) + (mask.head_stride ? place.head : 0)) *
               (mask.position_stride ? length : 1) +
           (mask.position_stride ? place.position : 0);
}

/// What all of a block's queries may see, in tokens: each sees [all_from, all_to), none what is from `none_from` on.
struct BlockReach {
    int all_from, all_to, none_from;
};

/// That of the queries first_query, …, one of each of the first `Queries` threads. By all threads of the block, in shared memory.
template <int Threads, int Queries>
__device__ __forceinline__ void find_block_reach(const MaskParams& mask, u64 reach, int batch, int kv_head, int kv_heads, int group, int length, int first_query,
                                                 int total, BlockReach& found) {
    static_assert(Queries <= Threads, "a thread for each query");
    __shared__ BlockReach of_warp[Threads / 32];
    BlockReach own = {0, 0x7fffffff, 0};
    const QueryPlace place = query_at(kv_head, group, length, first_query + threadIdx.x);
    if (threadIdx.x < Queries && place.exists) {
        const QueryView view(mask, batch, place, length, total);
        own.all_to = own.none_from = view.last_token == 0x7fffffff ? view.last_token : view.last_token + 1;
        if (mask.kind) {
            const i32* seen = reinterpret_cast<const i32*>(reach) + 4 * mask_row_of(mask, batch, place, kv_heads * group, length);
            own.all_from = seen[0], own.all_to = min(own.all_to, seen[1]), own.none_from = min(own.none_from, seen[2]);
        }
    }
    for (int distance = 1; distance < 32; distance *= 2) {
        own.all_from = max(own.all_from, __shfl_xor_sync(whole_warp, own.all_from, distance));
        own.all_to = min(own.all_to, __shfl_xor_sync(whole_warp, own.all_to, distance));
        own.none_from = max(own.none_from, __shfl_xor_sync(whole_warp, own.none_from, distance));
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < Threads / 32; ++warp) {
            own.all_from = max(own.all_from, of_warp[warp].all_from);
            own.all_to = min(own.all_to, of_warp[warp].all_to);
            own.none_from = max(own.none_from, of_warp[warp].none_from);
        }
        found = own;
    }
    __syncthreads();
}

/// Whether token `at` is seen as it is, and whether it may be seen at all: a score that is lowered by the largest number of its type has no weight beside
/// one that is not.
__device__ __forceinline__ void mask_element(const MaskParams& mask, i64 at, bool& seen, bool& hidden) {
    if (mask.kind == 4) {
        seen = reinterpret_cast<const u8*>(mask.mask)[at] != 0, hidden = !seen;
        return;
    }
    const float bias = mask_bias(mask, at);
    // Of padded sequences the tokens that are seen as they are may be padding.
    const float lowest = mask.paddings ? -infinity() : mask.kind == 1 ? -3.4028234e38f : mask.kind == 2 ? -65504.0f : -3.3895313e38f;
    seen = bias == 0.0f, hidden = bias <= lowest;
}

/// Where a row of the mask begins, in elements, and of which sequence it is.
__device__ __forceinline__ i64 mask_row_begin(const ReachParams& p, int row, int& batch) {
    const int position = row % p.positions, head = row / p.positions % p.heads;
    batch = row / p.positions / p.heads;
    return batch * p.mask.batch_stride + head * p.mask.head_stride + position * p.mask.position_stride;
}

/// i32 [rows of the mask, 4]: {from, to, none_from, 0}: seen as they are all of [from, to), hidden all from none_from on.
template <class Index>
__global__ void __launch_bounds__(row_threads) mask_reach(const __grid_constant__ ReachParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    __shared__ int found[3];
    int batch;
    const i64 first = mask_row_begin(p, blockIdx.x, batch);
    if (threadIdx.x == 0) found[0] = found[1] = p.tokens, found[2] = 0;
    __syncthreads();
    bool seen, hidden;
    for (int token = threadIdx.x; token < p.tokens; token += row_threads) {
        mask_element(p.mask, first + token, seen, hidden);
        if (seen) {
            atomicMin(found, token);
            break;
        }
    }
    __syncthreads();
    const int from = found[0];
    int last = -1;
    for (int token = threadIdx.x; token < p.tokens; token += row_threads) {
        mask_element(p.mask, first + token, seen, hidden);
        if (!hidden) last = token;
        if (token >= from && !seen) atomicMin(found + 1, token);
    }
    atomicMax(found + 2, last + 1);
    __syncthreads();
    if (threadIdx.x != 0) return;
    i32* to = reinterpret_cast<i32*>(p.reach) + 4 * static_cast<i64>(blockIdx.x);
    // Where no token is seen as it is, those that are lowered most may be all there are.
    to[0] = from, to[1] = found[1], to[2] = from < p.tokens ? found[2] : p.tokens, to[3] = 0;
}

/// Whether 16 bytes of a mask show what they are of as it is.
__device__ __forceinline__ bool shows_words(const U32x4& four, int kind) {
    const u32 words[4] = {four.x, four.y, four.z, four.w};
    bool shows = true;
    for (u32 word : words) {
        // No byte is zero; or all numbers are, of any sign.
        if (kind == 4) shows &= ((word - 0x01010101u) & ~word & 0x80808080u) == 0;
        else shows &= (word & (kind == 1 ? 0x7fffffffu : 0x7fff7fffu)) == 0;
    }
    return shows;
}

/// u32 [rows of the mask]: whether all packed rows that are no padding are seen as they are. For attend.cuh and attend_once.cuh, whose calls have few
/// queries: sixteen bytes a thread at a time.
template <class Index>
__global__ void __launch_bounds__(shows_threads) mask_shows(const __grid_constant__ ReachParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    const Lengths lengths(p.lengths);
    int batch;
    const i64 row = mask_row_begin(p, blockIdx.x, batch);
    const int padding = p.mask.batch_stride ? padding_of(p.mask, batch) : p.least_padding, size = p.mask.kind == 4 ? 1 : p.mask.kind == 1 ? 4 : 2, per_load = 16 / size;
    const int begin = min(lengths.sinks + padding, p.tokens), end = min(lengths.sinks + lengths.packed + p.entering, p.tokens);
    // From the first multiple of 16 bytes on.
    const u64 first = p.mask.mask + static_cast<u64>(row + begin) * size;
    const int before = max(0, min(static_cast<int>(-first & 15) / size, end - begin)), loads = max(0, end - begin - before) / per_load;
    const int behind = begin + before + loads * per_load;
    bool shows = true, seen, hidden;
    const U32x4* from = reinterpret_cast<const U32x4*>(first + static_cast<u64>(before) * size);
    // Four on their way together, the last one again where there are no more.
    for (int load = threadIdx.x; load < loads; load += 4 * shows_threads) {
        U32x4 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = load_here(from + min(load + i * shows_threads, loads - 1));
#pragma unroll
        for (int i = 0; i < 4; ++i) shows &= shows_words(words[i], p.mask.kind);
    }
    const int edge = threadIdx.x, token = edge < 16 ? begin + edge : behind + edge - 16;
    if (edge < 16 ? edge < before : edge < 32 && token < end) {
        mask_element(p.mask, row + token, seen, hidden);
        shows &= seen;
    }
    shows = __syncthreads_and(shows);
    if (threadIdx.x == 0) reinterpret_cast<u32*>(p.reach)[blockIdx.x] = shows;
}

}  // namespace skvq

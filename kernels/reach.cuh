// What a mask lets each query see, as an interval of tokens: attend_rows.cuh needs the mask itself at the interval's ends only.
//
// Is: one pass over the mask, once a call. Is not: exact about what lies between `to` and `none_from`; the mask is.
// Grid: rows of the mask, of those axes along which it is not the same; block: 128 threads.
#pragma once
#include "transform.cuh"

namespace skvq {

/// Whether token `at` is seen as it is, and whether it may be seen at all: a score that is lowered by the largest number of its type has no weight beside
/// one that is not.
template <class Index>
__device__ __forceinline__ void mask_element(const MaskParams& mask, i64 at, bool& seen, bool& hidden) {
    if (mask.kind == 4) {
        seen = reinterpret_cast<const u8*>(mask.mask)[at] != 0, hidden = !seen;
        return;
    }
    float bias;
    if (mask.kind == 1) bias = reinterpret_cast<const float*>(mask.mask)[at];
    else if (mask.kind == 2) bias = widen(reinterpret_cast<const Half*>(mask.mask)[at]);
    else bias = widen(reinterpret_cast<const BFloat*>(mask.mask)[at]);
    // Of padded sequences the tokens that are seen as they are may be padding.
    const float lowest = mask.paddings ? -infinity() : mask.kind == 1 ? -3.4028234e38f : mask.kind == 2 ? -65504.0f : -3.3895313e38f;
    seen = bias == 0.0f, hidden = bias <= lowest;
}

/// i32 [rows of the mask, 4]: {from, to, none_from, 0}: seen as they are all of [from, to), hidden all from none_from on.
template <class Index>
__global__ void __launch_bounds__(row_threads) mask_reach(const __grid_constant__ ReachParams p) {
    let_next_launch_begin();
    wait_for_earlier_launches();
    __shared__ int found[3];
    int row = blockIdx.x;
    const int position = p.positions > 1 ? row % p.positions : 0;
    row /= p.positions;
    const int head = row % p.heads, batch = row / p.heads;
    const i64 first = batch * p.mask.batch_stride + head * p.mask.head_stride + position * p.mask.position_stride;
    if (threadIdx.x == 0) found[0] = found[1] = p.tokens, found[2] = 0;
    __syncthreads();
    bool seen, hidden;
    for (int token = threadIdx.x; token < p.tokens; token += row_threads) {
        mask_element<Index>(p.mask, first + token, seen, hidden);
        if (seen) {
            atomicMin(found, token);
            break;
        }
    }
    __syncthreads();
    const int from = found[0];
    int last = -1;
    for (int token = threadIdx.x; token < p.tokens; token += row_threads) {
        mask_element<Index>(p.mask, first + token, seen, hidden);
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

}  // namespace skvq

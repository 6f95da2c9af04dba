// The squared scales of packed rows, summed page by page: what an estimate of the error of their scores is made of (src/backend/noise.rs).
//
// Is: f64 sums over the rows of a page whose scale is finite and that are not padding. Is not: a part of a step; a cache asks once a layer.
// Grid: pages × kv heads × batch; block: 128 threads, a row each. `rows` of the parameters: f64 [batch, kv heads, pages, groups];
// `first_row`: places of sinks, for which `origins` tell the padding.
#pragma once
#include "numbers.cuh"
#include "params.cuh"

namespace skvq {

template <class L>
__global__ void __launch_bounds__(page_rows) scale_squares(const __grid_constant__ DecodeParams p) {
    __shared__ double squares[page_rows];
    const int page = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, row = threadIdx.x;
    const i64 sequence = static_cast<i64>(batch) * p.kv_heads + head;
    const u8* bytes = reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(p.pages)[sequence * p.page_capacity + page]);
    double* to = reinterpret_cast<double*>(p.rows) + (sequence * gridDim.x + page) * L::groups;
    const int padding = p.first_row - reinterpret_cast<const i32*>(p.origins)[batch], index = page * page_rows + row;
    for (int group = 0; group < L::groups; ++group) {
        const float scale = index >= padding && index < p.row_count ? read_number<L::number_bytes>(bytes + number_byte<L>(row, group)) : 0.0f;
        squares[row] = is_finite(scale) ? static_cast<double>(scale) * scale : 0.0;
        __syncthreads();
        for (int distance = page_rows / 2; distance > 0; distance /= 2) {
            if (row < distance) squares[row] += squares[row + distance];
            __syncthreads();
        }
        if (row == 0) to[group] = squares[0];
        __syncthreads();
    }
}

}  // namespace skvq

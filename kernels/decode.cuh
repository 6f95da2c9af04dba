// Packed rows back to rows of the model's type: what a reader gets that cannot attend to packed bytes.
//
// Is: ŷ = a·C[code] + z and the transform undone, in the arithmetic of FORMAT.md, then one rounding to the model's type.
// Grid: row blocks × kv heads × batch; block: 256 threads, 16 lanes for each of 16 rows.
#pragma once
#include "codes.cuh"
#include "numbers.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int decode_threads = row_lanes * block_rows;

/// The level of channel `channel` of a row.
template <class L>
__device__ __forceinline__ float level_at(const u8* block, int row, int channel, const float* levels, bool uniform) {
    if constexpr (L::is_pairs) {
        constexpr int half = L::group_size / 2;
        const int group = channel / L::group_size, inner = channel % L::group_size;
        return levels[2 * read_code<L>(block, row, group * half + inner % half) + inner / half];
    }
    if (channel >= L::codes) return 0.0f;
    const int code = read_code<L>(block, row, channel);
    if (uniform) return static_cast<float>(code) - static_cast<float>((L::is_ternary ? 3 : 1 << L::part_bits(0)) - 1) * 0.5f;
    return levels[(L::is_parts ? (1 << L::part_bits(L::part_of_octet(channel / 8))) - 2 : 0) + code];
}

template <class T, class L>
__global__ void __launch_bounds__(decode_threads) decode(const __grid_constant__ DecodeParams p) {
    constexpr int D = L::head_dim;
    __shared__ float buffer[block_rows * D];
    const int inner = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, head = blockIdx.y, batch = blockIdx.z;
    const int block = p.first_row / block_rows + static_cast<int>(blockIdx.x), row = block * block_rows + inner, index = row - p.first_row;
    const u8* page = reinterpret_cast<const u8*>(
        reinterpret_cast<const u64*>(p.pages)[(static_cast<i64>(batch) * p.kv_heads + head) * p.page_capacity + block / blocks_per_page]);
    const u8* page_block = page + block % blocks_per_page * L::block_bytes;

    float elements[D / 16];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const int channel = lane + 16 * k, group = channel / L::group_size;
        const float level = level_at<L>(page_block, inner, channel, reinterpret_cast<const float*>(p.levels), p.levels == 0);
        elements[k] = __fmul_rn(read_number<L::number_bytes>(page + number_byte<L>(row % page_rows, group)), level);
        if (L::symmetric) continue;
        elements[k] = __fadd_rn(elements[k], read_number<L::number_bytes>(page + number_byte<L>(row % page_rows, L::groups + group)));
    }
    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block_of_page(p.transform, block / blocks_per_page));
    transform_back<D>(elements, p.transform, transform, buffer + inner * D, lane);
    if (index < 0 || index >= p.row_count) return;
    const int position = (p.origins ? reinterpret_cast<const i32*>(p.origins)[batch] : 0) + row;
    T* to = reinterpret_cast<T*>(p.rows) + batch * p.batch_stride + head * p.head_stride + index * p.row_stride;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const int channel = lane + 16 * k;
        if (transform.shift) elements[k] = __fadd_rn(elements[k], mean_of(p.transform, transform, D, position, channel));
        to[channel] = Narrow<T>::from(elements[k]);
    }
}

}  // namespace skvq

// Rows to codes and numbers, in exactly the arithmetic of FORMAT.md §3 and §6: every code and every byte is that of the specification.
//
// Is: transform, scale, codes, packing of whole row blocks; rows that a page already has are kept. Is not: block statistics (statistics.cuh),
// nor fast for a single row (append.cuh).
// Grid: row blocks that hold new rows × kv heads × batch; block: 256 threads, 16 lanes for each of 16 rows. Rows of a row block share bytes,
// so one block of threads writes them all: it reads the codes of the older rows, adds the new ones and packs.
#pragma once
#include "quantize.cuh"

namespace skvq {

constexpr int encode_threads = row_lanes * block_rows;

/// What the threads of a block share.
template <class L>
struct EncodeSpace {
    u8 codes[block_rows * L::codes];
    float levels[Levels<L>::count];
    alignas(16) float buffer[block_rows * L::head_dim];
};

/// Row block `block` of a head's packed past, of which the `row_count` rows from first_row on are new; row_at(r): number r of these. By all threads of a
/// block of 256; a barrier must follow before `space` is used again.
template <class T, class L, class RowAt>
__device__ __forceinline__ void encode_rows(const EncodeParams& p, int batch, int head, int block, int first_row, int row_count, const RowAt& row_at,
                                            EncodeSpace<L>& space) {
    constexpr int D = L::head_dim;
    const int inner = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    const int row = block * block_rows + inner, index = row - first_row;
    const bool is_new = index >= 0 && index < row_count;
    u8* page = reinterpret_cast<u8*>(
        reinterpret_cast<const u64*>(p.pages)[(static_cast<i64>(batch) * p.kv_heads + head) * p.page_capacity + block / blocks_per_page]);
    u8* page_block = page + block % blocks_per_page * L::block_bytes;
    u8* own_codes = space.codes + inner * L::codes;
    float* own_buffer = space.buffer + inner * D;
    Levels<L>::store(space.levels, Levels<L>::load(p.codec));

    float elements[D / 16];
    bool finite = true;
    const T* from = row_at(index);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        elements[k] = is_new ? widen(from[lane + 16 * k]) : 0.0f;
        finite = finite && is_finite(elements[k]);
    }
    finite = fold_lanes(finite ? 0.0f : 1.0f, [](float a, float b) { return a + b; }) == 0.0f;

    const TransformParams& transform = p.codec.transform;
    const HeadTransform of_head(transform, D, batch, head, p.kv_heads, block_of_page(transform, block / blocks_per_page));
    const int position = row + (p.origins ? reinterpret_cast<const i32*>(p.origins)[batch] : 0);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        elements[k] = Centering(transform, of_head, D, position, lane + 16 * k).of(finite ? elements[k] : 0.0f);
    }
    if constexpr (L::is_parts) multiply_transposed<D>(elements, of_head.matrix, own_buffer, lane);
    else turn_forward<D>(elements, transform, of_head, own_buffer, lane);
    __syncthreads();  // the levels
    float scales[L::groups], zeros[L::groups];
    for_each<L::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        GroupEncoder<L> encoder(p.codec, space.levels, own_codes + g * GroupEncoder<L>::count, own_buffer, lane, elements + g * (L::group_size / 16));
        encoder.run();
        finite = finite && encoder.finite();
        scales[g] = encoder.scale, zeros[g] = encoder.zero;
    });
    __syncwarp();
    if (is_new) {
        if (lane == 0) {
            if (!finite) atomicAdd(reinterpret_cast<i32*>(p.refused), 1);
            for (int g = 0; g < L::groups; ++g) write_numbers<L>(page, row % page_rows, g, scales[g], zeros[g], finite);
        }
        if (!finite) {
            for (int code = lane; code < L::codes; code += row_lanes) own_codes[code] = 0;
        }
    } else {
        const bool is_old = index < 0;
        for (int code = lane; code < L::codes; code += row_lanes) own_codes[code] = is_old ? read_code<L>(page_block, inner, code) : 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) write_lane<L>(page_block, threadIdx.x, space.codes);
}

template <class T, class L>
__global__ void __launch_bounds__(encode_threads) encode(const __grid_constant__ EncodeParams p) {
    __shared__ EncodeSpace<L> space;
    const int head = blockIdx.y, batch = blockIdx.z;
    const T* rows = reinterpret_cast<const T*>(p.rows) + batch * p.batch_stride + head * p.head_stride;
    auto row_at = [&](int index) { return rows + index * p.row_stride; };
    encode_rows<T, L>(p, batch, head, p.first_row / block_rows + static_cast<int>(blockIdx.x), p.first_row, p.row_count, row_at, space);
}

}  // namespace skvq

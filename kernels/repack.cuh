// Rows of FORMAT.md to pages of the device and back: how a cache moves between processors, and the bridge of the tests.
//
// Is: a rearrangement of bits, exact both ways. Is not: fast. Grid: row blocks; block: 128 threads.
// Shapes: code rows [rows, row_code_bytes], number rows [rows, row_number_bytes], pages [ceil(rows / 128)] addresses.
#pragma once
#include "codes.cuh"
#include "numbers.cuh"
#include "params.cuh"

namespace skvq {

/// Rows beyond the last are written as zeros.
template <class L>
__global__ void __launch_bounds__(128) rows_to_page(const __grid_constant__ RepackParams p) {
    __shared__ u8 codes[block_rows * L::codes];
    const int block = blockIdx.x, first = block * block_rows, thread = threadIdx.x;
    u8* page = reinterpret_cast<u8*>(reinterpret_cast<const u64*>(p.pages)[block / blocks_per_page]);
    for (int index = thread; index < block_rows * L::codes; index += 128) {
        const int row = first + index / L::codes;
        const u8* from = reinterpret_cast<const u8*>(p.code_rows) + static_cast<i64>(row) * L::row_code_bytes();
        codes[index] = row < p.rows ? row_code<L>(from, index % L::codes) : 0;
    }
    __syncthreads();
    if (thread < 32) write_lane<L>(page + block % blocks_per_page * L::block_bytes, thread, codes);
    for (int index = thread; index < block_rows * L::row_number_bytes; index += 128) {
        const int inner = index / L::row_number_bytes, byte = index % L::row_number_bytes, row = first + inner;
        const u8* from = reinterpret_cast<const u8*>(p.number_rows) + static_cast<i64>(row) * L::row_number_bytes;
        const int to = number_byte<L>(row % page_rows, byte / L::number_bytes) + byte % L::number_bytes;
        page[to] = row < p.rows ? from[byte] : 0;
    }
}

template <class L>
__global__ void __launch_bounds__(128) page_to_rows(const __grid_constant__ RepackParams p) {
    __shared__ u8 codes[block_rows * L::codes];
    const int block = blockIdx.x, first = block * block_rows, thread = threadIdx.x;
    const u8* page = reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(p.pages)[block / blocks_per_page]);
    for (int index = thread; index < block_rows * L::codes; index += 128) {
        codes[index] = read_code<L>(page + block % blocks_per_page * L::block_bytes, index / L::codes, index % L::codes);
    }
    __syncthreads();
    for (int index = thread; index < block_rows * L::row_code_bytes(); index += 128) {
        const int inner = index / L::row_code_bytes(), byte = index % L::row_code_bytes(), row = first + inner;
        u8* to = reinterpret_cast<u8*>(p.code_rows) + static_cast<i64>(row) * L::row_code_bytes();
        if (row < p.rows) to[byte] = static_cast<u8>(row_byte<L>(codes + inner * L::codes, byte));
    }
    for (int index = thread; index < block_rows * L::row_number_bytes; index += 128) {
        const int inner = index / L::row_number_bytes, byte = index % L::row_number_bytes, row = first + inner;
        u8* to = reinterpret_cast<u8*>(p.number_rows) + static_cast<i64>(row) * L::row_number_bytes;
        if (row < p.rows) to[byte] = page[number_byte<L>(row % page_rows, byte / L::number_bytes) + byte % L::number_bytes];
    }
}

}  // namespace skvq

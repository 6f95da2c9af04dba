// Rows of bytes between strided arrays, and single words: how a layer's store moves what it does not encode.
//
// Is: sinks and rings of the window, tables and statistics that grow or change their order of sequences; the lengths of a step that is replayed.
// Is not: arithmetic on rows.
// copy_rows's grid: ceil(rows / 4) × heads × batch; block: 128 threads, a warp a row; Word divides every address, stride and row.
// poke's grid: 1; block: 256 threads, a word each. advance's grid: 1; block: one warp.
#pragma once
#include "layout.cuh"
#include "params.cuh"

namespace skvq {

constexpr int copy_warps = 4, copy_threads = 32 * copy_warps, poke_threads = 256;

__device__ __forceinline__ u64 paged_row(u64 table, int sequence, int head, int table_pages, int row, i64 stride) {
    const i64 first = (static_cast<i64>(sequence) * gridDim.y + head) * table_pages;
    return reinterpret_cast<const u64*>(table)[first + row / page_rows] + row % page_rows * stride;
}

template <class Word>
__global__ void __launch_bounds__(copy_threads) copy_rows(const __grid_constant__ CopyParams p) {
    const int row = static_cast<int>(blockIdx.x) * copy_warps + threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
    const int sequence = p.sequences ? reinterpret_cast<const i32*>(p.sequences)[batch] : batch;
    const int from = row + p.source_shift + (p.shifts ? reinterpret_cast<const i32*>(p.shifts)[batch] : 0);
    if (row >= p.rows || from < 0 || from >= p.source_rows) return;
    const int source_row = p.source_ring ? (p.source_first + from) % p.source_ring : p.source_first + from;
    const int target_row = p.target_ring ? (p.target_first + row) % p.target_ring : p.target_first + row;
    const u64 source = p.source_table ? paged_row(p.source_table, sequence, head, p.table_pages, source_row, p.source_row_stride)
                                      : p.source + sequence * p.source_batch_stride + head * p.source_head_stride + source_row * p.source_row_stride;
    const u64 target = p.target_table ? paged_row(p.target_table, batch, head, p.table_pages, target_row, p.target_row_stride)
                                      : p.target + batch * p.target_batch_stride + head * p.target_head_stride + target_row * p.target_row_stride;
    for (int word = lane; word < p.row_words; word += 32) reinterpret_cast<Word*>(target)[word] = reinterpret_cast<const Word*>(source)[word];
}

/// Zeros where a padded sequence has no rows: the first shifts[batch] + source_shift ones, of sequences with shifts. Grid and block of copy_rows.
template <class Word>
__global__ void __launch_bounds__(copy_threads) clear_rows(const __grid_constant__ CopyParams p) {
    const int row = static_cast<int>(blockIdx.x) * copy_warps + threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
    const int padding = reinterpret_cast<const i32*>(p.shifts)[batch];
    if (row >= p.rows || padding == 0 || row >= padding + p.source_shift) return;
    Word* target = reinterpret_cast<Word*>(p.target + batch * p.target_batch_stride + head * p.target_head_stride + row * p.target_row_stride);
    for (int word = lane; word < p.row_words; word += 32) target[word] = 0;
}

/// One more token: which rows leave the window with it, if it is full, and which block of statistics it completes. With blocks rows leave once theirs has
/// statistics, which are taken when its last row comes. Where there is no room nothing moves, so that later launches write to places that exist.
template <class Number>
__global__ void __launch_bounds__(32) advance(const __grid_constant__ StepParams p) {
    if (threadIdx.x != 0) return;
    Number* lengths = reinterpret_cast<Number*>(p.lengths);
    const Number packed = lengths[0], sinks = lengths[1], window = lengths[2], rows = packed + window + 1;
    Number leaving = 0, complete = -1;
    if (sinks + rows > p.most_tokens) {
        *reinterpret_cast<Number*>(p.overflow) += 1;
    } else {
        Number packable = rows - p.window;
        if (p.block_rows) {
            // A crop may have left packed rows of a block, which has statistics then.
            const Number before = max((rows - 1) / p.block_rows, (packed + p.block_rows - 1) / p.block_rows), blocks = max(before, rows / p.block_rows);
            if (blocks > before) complete = before;
            packable = min(packable, blocks * p.block_rows);
        }
        leaving = max(packable - packed, 0);
        lengths[0] = packed + leaving;
        lengths[2] = window + 1 - leaving;
        lengths[3] = (lengths[3] + leaving) % p.ring_rows;
    }
    lengths[4] = leaving, lengths[5] = complete;
}

template <class Words>
__global__ void __launch_bounds__(poke_threads) poke(const __grid_constant__ Words p) {
    const int word = threadIdx.x;
    if (word < p.count) *reinterpret_cast<u64*>(p.targets[word]) = p.values[word];
}

}  // namespace skvq

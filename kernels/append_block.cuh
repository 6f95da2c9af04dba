// The append of one token that completes a block of statistics, in a step that is replayed: statistics of the block, and the rows that leave with it.
//
// Is: for every step of such a layer, in front of append.cuh; blocks of threads end at once where the numbers behind the lengths say that no block is
// complete. The block's last row is the new one, which is not in the ring yet, the others are there. Factors of the queries are fixed first, if they are
// not yet and enough was seen. Factors, statistics and bytes are those of queries.cuh, statistics.cuh and encode.cuh. Is not: fast, nor often: once a
// block, by one block of threads for each sequence, kv head and stream, whose row blocks take turns; nor the new row's way into the ring (append.cuh).
// Grid: 2 streams × kv heads × batch; block: 256 threads.
#pragma once
#include "encode.cuh"
#include "queries.cuh"
#include "statistics.cuh"

namespace skvq {

constexpr int append_block_threads = 256;
static_assert(append_block_threads == encode_threads && append_block_threads == statistics_threads && append_block_threads == factor_threads,
              "threads of all three");

/// What the threads of a block share.
template <class L>
struct AppendBlockSpace {
    EncodeSpace<L> encode;
    double channels[L::is_parts ? 1 : L::head_dim];  // of factors, then of statistics
};

template <class T, class L>
__device__ __forceinline__ void append_block_to(const AppendBlockParams& p, const AppendBlockStream& stream, AppendBlockSpace<L>& space) {
    const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
    const int packed = lengths[0], first = lengths[3], leaving = lengths[4], complete = lengths[5], head = blockIdx.y, batch = blockIdx.z;
    if (complete < 0) return;
    const EncodeParams& encode = stream.encode;
    const T* ring = reinterpret_cast<const T*>(encode.rows) + batch * encode.batch_stride + head * encode.head_stride;
    // Row `packed` lies where the window begins now; no row is further from it than the ring has rows.
    auto in_ring = [&](int row) { return ring + (first + row - packed + p.ring_rows) % p.ring_rows * encode.row_stride; };
    // Rows of parts have no statistics of blocks.
    if constexpr (!L::is_parts) {
        const StatisticsParams& statistics = stream.statistics;
        if (statistics.block) {
            if (L::stream == skvq::keys && p.factors.squares) {
                take_factors(p.factors, batch, head, space.channels);
                __syncthreads();  // statistics are taken with them
            }
            const T* arriving = reinterpret_cast<const T*>(statistics.rows) + batch * statistics.batch_stride + head * statistics.head_stride;
            auto row_at = [&](int row) { return row + 1 == statistics.block ? arriving : in_ring(complete * statistics.block + row); };
            take_statistics<T>(statistics, batch, head, complete, row_at, space.channels);
            __syncthreads();  // rows of this block are encoded with them
        }
    }
    const int first_row = packed - leaving;
    auto leaving_row = [&](int index) { return in_ring(first_row + index); };
#pragma unroll 1
    for (int block = first_row / block_rows; block * block_rows < packed; ++block) {
        encode_rows<T, L>(encode, batch, head, block, first_row, leaving, leaving_row, space.encode);
        __syncthreads();
    }
}

template <class T, class K, class V>
__global__ void __launch_bounds__(append_block_threads, 1) append_block(const __grid_constant__ AppendBlockParams p) {
    constexpr int of_keys = sizeof(AppendBlockSpace<K>), of_values = sizeof(AppendBlockSpace<V>);
    alignas(16) __shared__ u8 shared[of_keys > of_values ? of_keys : of_values];
    if (blockIdx.x == keys) append_block_to<T>(p, p.keys, *reinterpret_cast<AppendBlockSpace<K>*>(shared));
    else append_block_to<T>(p, p.values, *reinterpret_cast<AppendBlockSpace<V>*>(shared));
}

}  // namespace skvq

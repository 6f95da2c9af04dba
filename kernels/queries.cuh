// What the queries of a layer put on each channel of its keys (FORMAT.md §4): squares are gathered, then fixed as factors on the scales.
//
// Is: f64 sums over rows of queries that are finite, in an order that the launch decides; the factors as fp16 has them. Is not: attention.
// query_squares' grid: parts × kv heads × batch; block: 128 threads, 16 lanes for each of 8 rows; its sums are partial ones.
// query_factors' grid: 1 × kv heads × batch; block: 256 threads, one for each channel; it adds the partial sums to those of before.
#pragma once
#include "transform.cuh"

namespace skvq {

constexpr int factor_threads = 256;
/// Tokens whose queries must have been seen, and which part of the mean square counts at least (src/layer/queries.rs).
constexpr int least_query_tokens = 32;
constexpr double square_floor = 1e-6;

template <class T, int D>
__global__ void __launch_bounds__(row_threads) query_squares(const __grid_constant__ QueryParams p) {
    constexpr int per_lane = D / 16;
    __shared__ double sums[rows_per_block * D];
    const int part = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, inner = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
    // Queries of padding do not count: rows of one head are its tokens from `first` on.
    const int padding = p.paddings ? reinterpret_cast<const i32*>(p.paddings)[batch] : 0, first = max(0, padding - p.first_token);
    const int tokens = max(0, p.length - first), rows = tokens * p.group, rounds = (rows + rows_per_block - 1) / rows_per_block;
    const T* query = reinterpret_cast<const T*>(p.query) + batch * p.batch_stride;

    double squares[per_lane] = {};
    for (int round = part; round < rounds; round += p.parts) {
        const int row = round * rows_per_block + inner;
        const bool exists = row < rows;
        const T* from = query + (head * p.group + (exists ? row / tokens : 0)) * p.head_stride + (first + (exists ? row % tokens : 0)) * p.position_stride;
        float elements[per_lane], broken = 0.0f;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            elements[k] = exists ? widen(from[lane + 16 * k]) : 0.0f;
            broken += is_finite(elements[k]) ? 0.0f : 1.0f;
        }
        const bool counts = add_lanes(broken) == 0.0f;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) squares[k] += counts ? static_cast<double>(elements[k]) * static_cast<double>(elements[k]) : 0.0;
    }
#pragma unroll
    for (int k = 0; k < per_lane; ++k) sums[inner * D + lane + 16 * k] = squares[k];
    __syncthreads();
    double* to = reinterpret_cast<double*>(p.partial) + ((static_cast<i64>(batch) * p.kv_heads + head) * p.parts + part) * D;
    for (int channel = threadIdx.x; channel < D; channel += row_threads) {
        double sum = 0.0;
        for (int row = 0; row < rows_per_block; ++row) sum += sums[row * D + channel];
        to[channel] = sum;
    }
}

/// Adds the partial sums, if there are any, and fixes the factors, if that is asked for and enough was seen. Factors of 0 are not fixed yet.
/// By all threads of a block of 256.
template <int D>
__device__ __forceinline__ void take_factors(const FactorParams& p, int batch, int head, double (&shared)[D]) {
    const int channel = threadIdx.x;
    const i64 sequence = static_cast<i64>(batch) * p.kv_heads + head;
    double* own = reinterpret_cast<double*>(p.squares) + sequence * (D + 1);  // and the tokens seen
    float* factors = reinterpret_cast<float*>(p.factors) + sequence * D;
    const bool active = channel < D;
    double square = active && !p.starts ? own[channel] : 0.0, seen = p.starts ? 0.0 : own[D];
    const bool is_fixed = !p.starts && factors[0] != 0.0f;
    __syncthreads();  // all have read what is written below
    if (is_fixed) return;
    if (p.partial) {
        const int padding = p.paddings ? reinterpret_cast<const i32*>(p.paddings)[batch] : 0;
        const double* from = reinterpret_cast<const double*>(p.partial) + sequence * p.parts * D + channel;
        for (int part = 0; active && part < p.parts; ++part) square += from[static_cast<i64>(part) * D];
        seen += max(0, p.length - max(0, padding - p.first_token));
    }
    if (active) own[channel] = square, shared[channel] = square;
    if (channel == 0) own[D] = seen;
    __syncthreads();
    float factor = 0.0f;
    if (p.fixes && seen >= least_query_tokens) {
        double mean = 0.0, middle = 0.0;
        for (int c = 0; c < D; ++c) mean += shared[c];
        mean /= D;
        // Queries of nothing but zeros say nothing; sums beyond the range of f64 neither.
        if (mean > 0.0 && mean <= 1.7976931348623157e308) {
            auto half_log = [&](double value) { return 0.5 * log(value > square_floor * mean ? value : square_floor * mean); };
            const double own_log = active ? half_log(square) : 0.0;
            __syncthreads();
            if (active) shared[channel] = own_log;
            __syncthreads();
            for (int c = 0; c < D; ++c) middle += shared[c];
            middle /= D;
            factor = float_of_half(half_of_float(static_cast<float>(exp((middle - own_log) * p.exponent))));
        }
    }
    if (active) factors[channel] = factor;
}

template <int D>
__global__ void __launch_bounds__(factor_threads) query_factors(const __grid_constant__ FactorParams p) {
    __shared__ double shared[D];
    take_factors(p, blockIdx.z, blockIdx.y, shared);
}

}  // namespace skvq

// Shift and scale of a block of rows (FORMAT.md §4).
//
// Is: f64 sums over the block's finite rows, channel by channel, rounded to fp16, with what the queries put on them. Is not: fast, nor often: once a block.
// Of rows of one array here; in a step that is replayed they are those of the window's ring and the new one (append_block.cuh).
// Grid: blocks × kv heads × batch; block: 256 threads, one for each channel.
#pragma once
#include "transform.cuh"

namespace skvq {

constexpr int statistics_threads = 256;
constexpr double smallest_scale = 1.0 / 16384.0, largest_scale = 65504.0;

__device__ __forceinline__ double clamp_to(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

/// Of a block of p.block rows, number `block` of the sequence's; row_at(r): its row r. By all threads of a block of 256.
template <class T, int D, class RowAt>
__device__ __forceinline__ void take_statistics(const StatisticsParams& p, int batch, int head, int block, const RowAt& row_at, double (&variances)[D]) {
    const int channel = threadIdx.x;
    const bool active = channel < D;
    // Rows of padding and rows that are not finite do not count.
    const int padding = p.paddings ? reinterpret_cast<const i32*>(p.paddings)[batch] : 0, skipped = max(0, padding - block * p.block);

    double shift = 0.0, variance = 0.0, sum = 0.0;
    int count = 0;
    for (int pass = 0; pass < 2; ++pass) {
        for (int row = skipped; row < p.block; ++row) {
            const float x = active ? widen(row_at(row)[channel]) : 0.0f;
            if (!__syncthreads_and(is_finite(x))) continue;
            if (pass == 0) sum += x, ++count;
            else variance += (x - shift) * (x - shift);
        }
        if (count == 0) count = 1;
        if (pass == 0 && p.with_shift) {
            shift = float_of_half(half_of_float(static_cast<float>(clamp_to(sum / count, -largest_scale, largest_scale))));
        }
    }
    variance /= count;
    if (active) variances[channel] = variance;
    __syncthreads();
    if (!active) return;
    double mean = 0.0;
    for (int c = 0; c < D; ++c) mean += variances[c];
    const double deviation = sqrt(variance), common = sqrt(mean / D);
    // Factors of the queries; where they are not fixed, another exponent stands in for them.
    const float* factors = p.factors ? reinterpret_cast<const float*>(p.factors) + (static_cast<i64>(batch) * p.kv_heads + head) * D : nullptr;
    const bool weighed = factors && factors[0] != 0.0f;
    const double exponent = weighed ? p.exponent : p.exponent_alone;
    const double spread = exponent == 1.0 ? deviation : exponent == 0.0 ? common : pow(deviation, exponent) * pow(common, 1.0 - exponent);
    const double scale = weighed ? spread * factors[channel] : spread;
    const float rounded = float_of_half(half_of_float(static_cast<float>(clamp_to(scale, smallest_scale, largest_scale))));
    const i64 at = ((static_cast<i64>(batch) * p.kv_heads + head) * p.block_capacity + block) * D + channel;
    reinterpret_cast<float*>(p.shift)[at] = static_cast<float>(shift);
    reinterpret_cast<float*>(p.scale)[at] = scale == 0.0 ? 1.0f : rounded;
}

template <class T, int D>
__global__ void __launch_bounds__(statistics_threads) block_statistics(const __grid_constant__ StatisticsParams p) {
    __shared__ double variances[D];
    const int which = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const T* rows = reinterpret_cast<const T*>(p.rows) + batch * p.batch_stride + head * p.head_stride;
    auto row_at = [&](int row) { return rows + static_cast<i64>(which * p.block + row) * p.row_stride; };
    take_statistics<T>(p, batch, head, p.first_block + which, row_at, variances);
}

}  // namespace skvq

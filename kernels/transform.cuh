// Rows in the hands of 16 lanes, and what a codec does to them before and after quantization (FORMAT.md §3, steps 1 to 3, and §6).
//
// Is: Hadamard, permutation, sums in the order of the specification. Is not: attention.
// A row of D channels is `float row[D / 16]`: lane l of a half warp holds the channels l, l + 16, l + 32, … All lanes of the warp take part in
// every function, so both halves must call it. Nothing here rounds a multiply and an add as one but `multiply_rows`, which no codes depend on.
#pragma once
#include "params.cuh"

namespace skvq {

constexpr int row_lanes = 16, rows_per_block = 8, row_threads = row_lanes * rows_per_block;

template <class F>
__device__ __forceinline__ float fold_lanes(float value, const F& join) {
    for (int distance = 8; distance >= 1; distance /= 2) value = join(value, __shfl_xor_sync(whole_warp, value, distance));
    return value;
}
__device__ __forceinline__ float add_lanes(float value) {
    return fold_lanes(value, [](float a, float b) { return __fadd_rn(a, b); });
}

/// Sum of `count` elements of each lane, in the order of FORMAT.md §3.4.
__device__ __forceinline__ float lane_sum(const float* elements, int count) {
    float sum = elements[0];
    for (int k = 1; k < count; ++k) sum = __fadd_rn(sum, elements[k]);
    return add_lanes(sum);
}

constexpr int hadamard_block(int head_dim) { return head_dim & -head_dim; }
/// The f32 nearest to 1 / √B.
constexpr float hadamard_unit(int block) {
    constexpr float units[5] = {0.25f, 0.17677669529663689f, 0.125f, 0.088388347648318447f, 0.0625f};
    int index = 0;
    while ((16 << index) < block) ++index;
    return units[index];
}

/// In blocks of the largest power of two that divides D.
template <int D>
__device__ __forceinline__ void hadamard(float (&row)[D / 16], int lane) {
    constexpr int block = hadamard_block(D);
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f;  // a product with it is exact: a sum or a difference, rounded once
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const float other = __shfl_xor_sync(whole_warp, row[k], h);
            row[k] = fmaf(row[k], sign, other);
        }
    }
#pragma unroll
    for (int h = 1; h < block / 16; h *= 2) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            if (k & h) continue;
            const float low = row[k], high = row[k + h];
            row[k] = __fadd_rn(low, high);
            row[k + h] = __fsub_rn(low, high);
        }
    }
    for (float& element : row) element = __fmul_rn(element, hadamard_unit(block));
}

/// A row through shared memory: lanes of one half warp write and read `buffer` [D] of their own.
template <int D>
__device__ __forceinline__ void spill(const float (&row)[D / 16], float* buffer, int lane) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) buffer[lane + 16 * k] = row[k];
    __syncwarp();
}
/// y_j = u_π(j).
template <int D>
__device__ __forceinline__ void permute(float (&row)[D / 16], const i32* permutation, float* buffer, int lane) {
    spill<D>(row, buffer, lane);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) row[k] = buffer[permutation[lane + 16 * k]];
}
template <int D>
__device__ __forceinline__ void permute_back(float (&row)[D / 16], const i32* permutation, float* buffer, int lane) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) buffer[permutation[lane + 16 * k]] = row[k];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) row[k] = buffer[lane + 16 * k];
}

/// row_j = Σ_c M[j][c]·row_c, from 0, in the order of c.
template <int D>
__device__ __forceinline__ void multiply_matrix(float (&row)[D / 16], const float* matrix, float* buffer, int lane) {
    spill<D>(row, buffer, lane);
    for (float& element : row) element = 0.0f;
    // Sixteen bytes at a time, and sums side by side: one row alone is all latency.
#pragma unroll 1
    for (int c = 0; c < D; c += 4) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const U32x4 four = *reinterpret_cast<const U32x4*>(matrix + static_cast<i64>(lane + 16 * k) * D + c);
            row[k] = __fadd_rn(row[k], __fmul_rn(__uint_as_float(four.x), buffer[c]));
            row[k] = __fadd_rn(row[k], __fmul_rn(__uint_as_float(four.y), buffer[c + 1]));
            row[k] = __fadd_rn(row[k], __fmul_rn(__uint_as_float(four.z), buffer[c + 2]));
            row[k] = __fadd_rn(row[k], __fmul_rn(__uint_as_float(four.w), buffer[c + 3]));
        }
    }
}
/// row_j = Σ_c M[c][j]·row_c, likewise.
template <int D>
__device__ __forceinline__ void multiply_transposed(float (&row)[D / 16], const float* matrix, float* buffer, int lane) {
    spill<D>(row, buffer, lane);
    for (float& element : row) element = 0.0f;
#pragma unroll 4
    for (int c = 0; c < D; ++c) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) row[k] = __fadd_rn(row[k], __fmul_rn(matrix[static_cast<i64>(c) * D + lane + 16 * k], buffer[c]));
    }
}
/// Parts of a sum that the threads of a block share out where a row has fewer channels than there are threads.
constexpr int product_parts(int head_dim) {
    const int fitting = row_threads / head_dim, most = head_dim / 4;
    return fitting < 1 ? 1 : fitting < most ? fitting : most;
}

/// row_j = Σ_c M[j][c]·row_c, or of Mᵀ, for the eight rows of a block, in any order: a thread sums up channel j of all of them, so that each element of
/// the matrix is read once, and up to `Batch` of a thread are on their way at once. All threads of the block take part.
/// `buffer` [8 · product_parts(D) · D], at a multiple of 16 bytes; each row's first D may be written afterwards, by its own lanes.
template <int D, bool Transposed, int Batch>
__device__ __forceinline__ void multiply_rows(float (&row)[D / 16], const float* matrix, float* buffer, int own_row, int lane) {
    constexpr int parts = product_parts(D), part_size = D / parts, fitting = part_size & -part_size;
    constexpr int batch = fitting < Batch ? fitting : Batch, per_thread = (D + row_threads - 1) / row_threads;
    const int part = parts > 1 ? min(static_cast<int>(threadIdx.x) / D, parts - 1) : 0;
    const int own = static_cast<int>(threadIdx.x) - part * D;  // and those row_threads further; the last one for threads that have none
    __syncthreads();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) buffer[(lane + 16 * k) * rows_per_block + own_row] = row[k];
    float sums[per_thread][rows_per_block] = {};
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
        const int j = min(own + n * row_threads, D - 1);
#pragma unroll 1
        for (int first = part * part_size; first < (part + 1) * part_size; first += batch) {
            float elements[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                if constexpr (Transposed) {
                    elements[i] = matrix[(first + i) * D + j];
                } else if (i % 4 == 0) {
                    const U32x4 four = *reinterpret_cast<const U32x4*>(matrix + j * D + first + i);
                    elements[i] = __uint_as_float(four.x), elements[i + 1] = __uint_as_float(four.y);
                    elements[i + 2] = __uint_as_float(four.z), elements[i + 3] = __uint_as_float(four.w);
                }
            }
            // The compiler would read each element where it is used. Before the first ones, rows are in the buffer.
            __syncthreads();
#pragma unroll
            for (int i = 0; i < batch; ++i) {
#pragma unroll
                for (int r = 0; r < rows_per_block; r += 4) {
                    const U32x4 four = *reinterpret_cast<const U32x4*>(buffer + (first + i) * rows_per_block + r);
                    sums[n][r] += elements[i] * __uint_as_float(four.x), sums[n][r + 1] += elements[i] * __uint_as_float(four.y);
                    sums[n][r + 2] += elements[i] * __uint_as_float(four.z), sums[n][r + 3] += elements[i] * __uint_as_float(four.w);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
        const int j = own + n * row_threads;
        if (j >= D) continue;
#pragma unroll
        for (int r = 0; r < rows_per_block; ++r) buffer[(part * rows_per_block + r) * D + j] = sums[n][r];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        row[k] = 0.0f;
        for (int of = 0; of < parts; ++of) row[k] += buffer[(of * rows_per_block + own_row) * D + lane + 16 * k];
    }
}

/// Where the parameters of one head (and of one block of its rows) lie; null where there are none.
struct HeadTransform {
    const float *shift, *scale, *matrix, *inverse, *shift_sine;
    const i32* permutation;

    __device__ __forceinline__ HeadTransform(const TransformParams& p, int head_dim, int batch, int head, int heads, int block) {
        const i64 width = head_dim;
        const i64 affine = (p.pages_per_block ? (static_cast<i64>(batch) * heads + head) * p.block_count + block : head) * width;
        auto at = [](u64 base, i64 offset) { return base ? reinterpret_cast<const float*>(base) + offset : nullptr; };
        shift = at(p.shift, affine);
        scale = at(p.scale, affine);
        matrix = at(p.matrix, head * width * width);
        inverse = at(p.inverse, head * width * width);
        shift_sine = at(p.shift_sine, head * width);
        permutation = reinterpret_cast<const i32*>(at(p.permutation, head * width));
    }
};

/// The block of statistics of a page.
__device__ __forceinline__ int block_of_page(const TransformParams& p, int page) { return p.pages_per_block ? page / p.pages_per_block : 0; }

/// Cosines of a channel's turn to a position in two parts, spans of 256 and steps in one, with their sines head_dim further.
struct TurnPlace {
    const float *far, *near;

    __device__ __forceinline__ TurnPlace(const TransformParams& p, int head_dim, int position, int channel) {
        const int span = position >= 0 ? position / 256 : -((255 - position) / 256), step = position - 256 * span;
        far = reinterpret_cast<const float*>(p.spans) + static_cast<i64>(span - p.first_span) * 2 * head_dim + channel;
        near = reinterpret_cast<const float*>(p.steps) + static_cast<i64>(step) * 2 * head_dim + channel;
    }
};

/// C(t) and S(t) of FORMAT.md §6 for one channel.
__device__ __forceinline__ void turn(const TransformParams& p, int head_dim, int position, int channel, float& cosine, float& sine) {
    const TurnPlace place(p, head_dim, position, channel);
    const float *far = place.far, *near = place.near;
    cosine = __fsub_rn(__fmul_rn(far[0], near[0]), __fmul_rn(far[head_dim], near[head_dim]));
    sine = __fadd_rn(__fmul_rn(far[head_dim], near[0]), __fmul_rn(far[0], near[head_dim]));
}

/// m(t), or the shift, of one channel; 0 where there is none.
__device__ __forceinline__ float mean_of(const TransformParams& p, const HeadTransform& head, int head_dim, int position, int channel) {
    if (!head.shift) return 0.0f;
    if (!head.shift_sine) return head.shift[channel];
    float cosine, sine;
    turn(p, head_dim, position, channel, cosine, sine);
    return __fadd_rn(__fmul_rn(head.shift[channel], cosine), __fmul_rn(head.shift_sine[channel], sine));
}

/// Step 1 for one channel: what is taken off, and what the rest is multiplied by. Neither 0 nor 1 changes a number.
struct Centering {
    float mean, inverse;

    __device__ __forceinline__ Centering(const TransformParams& p, const HeadTransform& head, int head_dim, int position, int channel)
        : mean(mean_of(p, head, head_dim, position, channel)), inverse(head.scale ? __fdiv_rn(1.0f, head.scale[channel]) : 1.0f) {}

    __device__ __forceinline__ float of(float x) const { return __fmul_rn(__fsub_rn(x, mean), inverse); }
};

/// Steps 2 and 3.
template <int D>
__device__ __forceinline__ void turn_forward(float (&row)[D / 16], const TransformParams& p, const HeadTransform& head, float* buffer, int lane) {
    if (p.rotation) hadamard<D>(row, lane);
    if (head.permutation) permute<D>(row, head.permutation, buffer, lane);
}

/// Undoes `turn_forward`.
template <int D>
__device__ __forceinline__ void turn_back(float (&row)[D / 16], const TransformParams& p, const HeadTransform& head, float* buffer, int lane) {
    if (head.permutation) permute_back<D>(row, head.permutation, buffer, lane);
    if (p.rotation) hadamard<D>(row, lane);
}

/// ŷ to x̂ but for the shift: inverse permutation, rotation and scale, or B.
template <int D>
__device__ __forceinline__ void transform_back(float (&row)[D / 16], const TransformParams& p, const HeadTransform& head, float* buffer, int lane) {
    if (head.inverse) return multiply_matrix<D>(row, head.inverse, buffer, lane);
    turn_back<D>(row, p, head, buffer, lane);
    if (!head.scale) return;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) row[k] = __fmul_rn(row[k], head.scale[lane + 16 * k]);
}

}  // namespace skvq

// Rows to codes and numbers, in exactly the arithmetic of FORMAT.md §3 and §6: every code and every byte is that of the specification.
//
// Is: transform, scale, codes, packing of whole row blocks; rows that a page already has are kept. Is not: block statistics (statistics.cuh).
// Grid: row blocks that hold new rows × kv heads × batch; block: 256 threads, 16 lanes for each of 16 rows. Rows of a row block share bytes,
// so one block of threads writes them all: it reads the codes of the older rows, adds the new ones and packs.
#pragma once
#include "codes.cuh"
#include "numbers.cuh"
#include "transform.cuh"

namespace skvq {

constexpr int encode_threads = row_lanes * block_rows;

/// The larger one; a NaN wins, so that it is noticed.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a > b || is_nan(a) ? a : b; }

__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }

/// The codes of one group of a row, found by 16 lanes.
template <class L, int Group>
struct GroupEncoder {
    static constexpr int per_lane = (L::is_parts ? L::codes : L::group_size) / 16, pairs = L::group_size / 2;
    const EncodeParams& p;
    const float* levels;
    u8* codes;      // [L::codes] of the row
    float* buffer;  // [D] of the row
    int lane;
    const float* y;  // [per_lane]
    float scale, zero;

    __device__ __forceinline__ float level_of(int k) const {
        if constexpr (L::is_pairs) {
            const int channel = lane + 16 * k;
            return levels[2 * codes[Group * pairs + channel % pairs] + channel / pairs];
        } else {
            return levels[table_first(k) + codes[Group * L::group_size + lane + 16 * k]];
        }
    }
    /// Where the levels of element k begin; those of a part of b bits follow all of fewer bits.
    static __device__ __forceinline__ int table_first(int k) { return L::is_parts ? (1 << L::part_bits(L::part_of_octet(2 * k))) - 2 : 0; }
    static __device__ __forceinline__ int level_count(int k) {
        if (L::is_ternary) return 3;
        return 1 << (L::is_parts ? L::part_bits(L::part_of_octet(2 * k)) : L::part_bits(0));
    }

    /// Sums over the group of f(d, level).
    template <class F>
    __device__ __forceinline__ float sum_of(const F& f) const {
        float terms[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) terms[k] = f(__fsub_rn(y[k], zero), k);
        return lane_sum(terms, per_lane);
    }

    /// Step 5 of §3.
    __device__ __forceinline__ void find_codes() {
        const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            const float t = __fmul_rn(__fsub_rn(y[k], zero), inverse);
            if constexpr (L::is_pairs) buffer[lane + 16 * k] = t;
            else codes[Group * L::group_size + lane + 16 * k] = nearest_level(t, k);
        }
        __syncwarp();
        if constexpr (L::is_pairs) {
            for (int pair = lane; pair < pairs; pair += row_lanes) codes[Group * pairs + pair] = nearest_pair(buffer[pair], buffer[pair + pairs]);
            __syncwarp();
        }
    }
    __device__ __forceinline__ u8 nearest_level(float t, int k) const {
        const int count = level_count(k);
        if (p.uniform) {
            const float half = static_cast<float>(count - 1) * 0.5f, shifted = __fadd_rn(t, half);
            const float clamped = fminf(fmaxf(shifted, 0.0f), static_cast<float>(count - 1));
            return static_cast<u8>(__fadd_rn(clamped, 0.5f));  // positive: truncation is the floor
        }
        const float* table = levels + table_first(k);
        int code = 0;
        for (int i = 0; i + 1 < count; ++i) code += __fmul_rn(__fadd_rn(table[i], table[i + 1]), 0.5f) < t;
        return static_cast<u8>(code);
    }
    __device__ __forceinline__ u8 nearest_pair(float first, float second) const {
        float best = -infinity();
        int code = 0;
        for (int i = 0; i < 8; ++i) {
            const float x = levels[2 * i], y = levels[2 * i + 1];
            const float half = __fmul_rn(__fadd_rn(__fmul_rn(x, x), __fmul_rn(y, y)), 0.5f);
            const float score = __fsub_rn(__fadd_rn(__fmul_rn(first, x), __fmul_rn(second, y)), half);
            if (score > best) best = score, code = i;
        }
        return static_cast<u8>(code);
    }

    __device__ __forceinline__ float largest_level() const {
        if (p.uniform) return static_cast<float>(level_count(0) - 1) * 0.5f;
        const int count = L::is_pairs ? 16 : level_count(0);
        float largest = levels[0];
        for (int i = 1; i < count; ++i) largest = fmaxf(largest, levels[i]);
        return largest;
    }

    /// Steps 4 and 5: leaves codes in `codes`, and scale and zero point rounded.
    __device__ __forceinline__ void run() {
        constexpr float size = static_cast<float>(16 * per_lane);
        zero = 0.0f;
        if (p.rule == 0) {
            if (!L::symmetric) zero = round_number<L::number_bytes>(__fdiv_rn(lane_sum(y, per_lane), size));
            const float squares = sum_of([](float d, int) { return __fmul_rn(d, d); });
            scale = __fmul_rn(p.clip, __fsqrt_rn(__fdiv_rn(squares, size)));
        } else {
            // With signs turned, both ends are a largest element. A symmetric group has the ends ±max|y|.
            float high = L::symmetric ? magnitude(y[0]) : y[0], negated_low = -y[0];
            for (int k = 1; k < per_lane; ++k) {
                high = larger_or_nan(high, L::symmetric ? magnitude(y[k]) : y[k]);
                negated_low = larger_or_nan(negated_low, -y[k]);
            }
            high = fold_lanes(high, larger_or_nan);
            const float low = -fold_lanes(negated_low, larger_or_nan);
            if (L::symmetric) {
                scale = __fdiv_rn(__fmul_rn(p.clip, high), largest_level());
            } else {
                zero = round_number<L::number_bytes>(__fmul_rn(p.clip, __fmul_rn(__fadd_rn(high, low), 0.5f)));
                scale = __fdiv_rn(__fmul_rn(p.clip, __fmul_rn(__fsub_rn(high, low), 0.5f)), largest_level());
            }
        }
        scale = round_number<L::number_bytes>(scale);
        find_codes();
        for (int turn = 0; turn < p.refinements; ++turn) {
            const float products = sum_of([&](float d, int k) { return __fmul_rn(d, level_of(k)); });
            const float squares = sum_of([&](float, int k) { return __fmul_rn(level_of(k), level_of(k)); });
            if (products > 0.0f) scale = round_number<L::number_bytes>(__fdiv_rn(products, squares));
            find_codes();
        }
    }

    /// Step 6.
    __device__ __forceinline__ void unbias() {
        const float squares = sum_of([](float d, int) { return __fmul_rn(d, d); });
        const float products = sum_of([&](float d, int k) { return __fmul_rn(d, level_of(k)); });
        const float quotient = __fdiv_rn(squares, products);
        if (scale > 0.0f && products > 0.0f && is_finite(products) && is_finite(quotient)) scale = round_number<L::number_bytes>(quotient);
    }
};

/// Steps 1 to 3: a row as the quantizer sees it.
template <int D>
__device__ __forceinline__ void transform_forward(float (&row)[D / 16], const TransformParams& p, const HeadTransform& head, int position,
                                                  float* buffer, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const int channel = lane + 16 * k;
        if (head.shift) row[k] = __fsub_rn(row[k], mean_of(p, head, D, position, channel));
        if (head.scale) row[k] = __fmul_rn(row[k], __fdiv_rn(1.0f, head.scale[channel]));
    }
    if (head.matrix) return multiply_matrix<D>(row, head.matrix, buffer, lane);
    if (p.rotation) hadamard<D>(row, lane);
    if (head.permutation) permute<D>(row, head.permutation, buffer, lane);
}

template <class T, class L>
__global__ void __launch_bounds__(encode_threads) encode(const __grid_constant__ EncodeParams p) {
    constexpr int D = L::head_dim;
    __shared__ u8 codes[block_rows * L::codes];
    __shared__ float buffer[block_rows * D];
    const int inner = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, head = blockIdx.y, batch = blockIdx.z;
    // In a step that is replayed the rows that leave the ring have left it already, and are counted as packed.
    const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
    const int first_row = lengths ? lengths[0] - p.row_count : p.first_row;
    const int source_first = lengths ? (lengths[3] + p.ring_rows - p.row_count) % p.ring_rows : 0;
    const int block = first_row / block_rows + static_cast<int>(blockIdx.x), row = block * block_rows + inner, index = row - first_row;
    const bool is_new = index >= 0 && index < p.row_count;
    u8* page = reinterpret_cast<u8*>(
        reinterpret_cast<const u64*>(p.pages)[(static_cast<i64>(batch) * p.kv_heads + head) * p.page_capacity + block / blocks_per_page]);
    u8* page_block = page + block % blocks_per_page * L::block_bytes;
    u8* own_codes = codes + inner * L::codes;
    float* own_buffer = buffer + inner * D;

    float elements[D / 16];
    bool finite = true;
    const T* from = reinterpret_cast<const T*>(p.rows) + batch * p.batch_stride + head * p.head_stride +
                    (source_first + index) * p.row_stride;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        elements[k] = is_new ? widen(from[lane + 16 * k]) : 0.0f;
        finite = finite && is_finite(elements[k]);
    }
    finite = fold_lanes(finite ? 0.0f : 1.0f, [](float a, float b) { return a + b; }) == 0.0f;
    for (float& element : elements) element = finite ? element : 0.0f;

    const HeadTransform transform(p.transform, D, batch, head, p.kv_heads, block_of_page(p.transform, block / blocks_per_page));
    const int origin = p.origins ? reinterpret_cast<const i32*>(p.origins)[batch] : 0;
    transform_forward<D>(elements, p.transform, transform, origin + row, own_buffer, lane);
    float scales[L::groups], zeros[L::groups];
    for_each<L::groups>([&](auto group) {
        constexpr int g = decltype(group)::value;
        GroupEncoder<L, g> encoder{p, reinterpret_cast<const float*>(p.levels), own_codes, own_buffer, lane, elements + g * (L::group_size / 16), 0.0f, 0.0f};
        encoder.run();
        finite = finite && !is_nan(encoder.scale) && !is_nan(encoder.zero);
        if (p.unbiased) encoder.unbias();
        scales[g] = encoder.scale;
        zeros[g] = encoder.zero;
    });
    __syncwarp();
    if (is_new) {
        if (lane == 0) {
            if (!finite) atomicAdd(reinterpret_cast<i32*>(p.refused), 1);
            for (int g = 0; g < L::groups; ++g) {
                write_number<L::number_bytes>(page + number_byte<L>(row % page_rows, g), finite ? scales[g] : not_a_number());
                if (L::symmetric) continue;
                write_number<L::number_bytes>(page + number_byte<L>(row % page_rows, L::groups + g), finite ? zeros[g] : 0.0f);
            }
        }
        if (!finite) {
            for (int code = lane; code < L::codes; code += row_lanes) own_codes[code] = 0;
        }
    } else {
        const bool is_old = index < 0;
        for (int code = lane; code < L::codes; code += row_lanes) own_codes[code] = is_old ? read_code<L>(page_block, inner, code) : 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) write_lane<L>(page_block, threadIdx.x, codes);
}

}  // namespace skvq

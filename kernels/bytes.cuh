// Keys of two bits whose levels are small integers times a step: products of bytes, four codes a register.
//
// Is: the sums Σ q'·level of a row block, of levels that the host has found such integers for (LevelTable). Is not: scales; other levels.
// A query's elements, integers up to 32512 after fold.cuh, are two bytes: 256·high + low. So a sum is two products of bytes, and exact.
// A word of a lane's codes makes one tile of 16 rows × 32 channels, whose columns are those of its octets 4w, 4w + 2, 4w + 1, 4w + 3:
//
//   word, bytes 0, 2 and 1, 3 changed:  | rows g + 8: octets 4w + 3, 4w + 2, 4w + 1, 4w | rows g: likewise |     nibbles of two codes
//   & 0x33333333, >> 2 & 0x33333333:    selectors of the octets 4w, 4w + 2, and 4w + 1, 4w + 3; of rows g in the low half, of rows g + 8 in the high
#pragma once
#include "levels.cuh"

namespace skvq {

template <class K, int Tiles>
constexpr bool by_bytes = K::stream == keys && K::format == 2 && K::groups == 1 && K::head_dim % 32 == 0 && K::tiles * Tiles <= 16;

/// The last bits of 1.5·2^23 + x are x as an integer, to nearest even.
constexpr float integer_magic = 12582912.0f;
/// 127·256: of two signed bytes, whichever the lower one is.
constexpr float largest_integer = 32512.0f;

/// A query as 32 lanes × 4 registers for each word: high bytes for the octets 4w, 4w + 2, then for 4w + 1, 4w + 3, then low bytes likewise. `row`:
/// the query in 16 lanes (transform.cuh), of which 8o + 2t and 8o + 2t + 1 have a register of four bytes each: the first the low bytes of both, the
/// other one the high bytes. `fragments`: of the query's first lane. Returns the sum of what the lane's elements are rounded to.
template <int D>
__device__ __forceinline__ float write_query_bytes(const float (&row)[D / 16], u32* fragments, int lane) {
    const bool odd = lane % 2;
    const u32 kept_rounding = odd ? 128 : 0, sent_rounding = 128 - kept_rounding, selector = odd ? 0x3715 : 0x6240;
    u32* to = fragments + 4 * (lane / 2 % 4) + lane / 8 + (odd ? 0 : 2);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < D / 32; ++w) {
        const float first = __fadd_rn(row[2 * w], integer_magic), second = __fadd_rn(row[2 * w + 1], integer_magic);
        sum += __fsub_rn(first, integer_magic);
        sum += __fsub_rn(second, integer_magic);
        const u32 x = __float_as_uint(first), y = __float_as_uint(second);
        const u32 kept = permute_bytes(x + kept_rounding, y + kept_rounding, 0x5410), sent = permute_bytes(x + sent_rounding, y + sent_rounding, 0x5410);
        to[128 * w] = permute_bytes(kept, __shfl_xor_sync(whole_warp, sent, 1), selector);
    }
    return sum;
}

/// The queries of a tile as B operands: of word w registers for the octets 4w, 4w + 2 and 4w + 1, 4w + 3.
template <class K>
struct ByteQueries {
    static constexpr int words = K::tiles / 2;
    u32 high[words][2], low[words][2];

    template <class Read>
    __device__ __forceinline__ void load(const U32x4* from, int lane, const Read& read) {
        for_each<words>([&](auto index) {
            constexpr int w = decltype(index)::value;
            const U32x4 four = read(from + 32 * w + lane);
            high[w][0] = four.x, high[w][1] = four.y, low[w][0] = four.z, low[w][1] = four.w;
        });
    }
};

/// sums[n][2·side + j] = Σ q'·level / step of row g + 8·side and query 2t + j. `levels`: the four integers.
template <class K, int Tiles>
__device__ __forceinline__ void byte_sums(const LaneCodes<K>& codes, u32 levels, const ByteQueries<K> (&queries)[Tiles], float (&sums)[Tiles][4]) {
    i32 high[Tiles][4] = {}, low[Tiles][4] = {};
    for_each<K::tiles / 2>([&](auto index) {
        constexpr int w = decltype(index)::value;
        const u32 word = permute_bytes(codes.words[w], 0, 0x3120), first = word & 0x33333333u, second = word >> 2 & 0x33333333u;
        const u32 operand[4] = {permute_bytes(levels, 0, first), permute_bytes(levels, 0, first >> 16), permute_bytes(levels, 0, second),
                                permute_bytes(levels, 0, second >> 16)};
        for_each<Tiles>([&](auto n) {
            const ByteQueries<K>& query = queries[decltype(n)::value];
            multiply_bytes(high[decltype(n)::value], operand, query.high[w]);
            multiply_bytes(low[decltype(n)::value], operand, query.low[w]);
        });
    });
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int i = 0; i < 4; ++i) sums[n][i] = static_cast<float>(256 * high[n][i] + low[n][i]);
    });
}

}  // namespace skvq

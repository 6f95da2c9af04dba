// Keys whose levels are evenly spaced, of two bits or of parts: products of bytes, whose operands are the codes themselves behind a mask.
//
// Is: the sums Σ q'·code of a row block, and the queries that they are made with. Is not: scales, the middle of the levels (score_block of attend.cuh);
// other levels, which are looked up as f16 (levels.cuh).
// Keys of two bits:
// Level c is (c − 1.5)·step, so Σ q'·level = step·(Σ q'·c − 1.5·Σ q'). A query's elements, integers after fold.cuh, are two bytes: 256·high + low; a
// sum is two products of bytes, and exact. Words 2j and 2j + 1 of a lane have rows g and g + 8 of eight octets (Layout::sorts_rows),
//
//   a word:  | octets 4w + 6, 4w + 7 | 4w + 4, 4w + 5 | 4w + 2, 4w + 3 | 4w, 4w + 1 |   of each byte four codes:
//   a byte:               | channel 2t + 1: odd octet, even octet | channel 2t: odd octet, even octet |
//
// of which & 0x03030303 are the even octets' codes of channel 2t, & 0x0c0c0c0c four times the odd ones'; of channel 2t + 1 after a shift by four. So what
// odd octets are multiplied with is a quarter of their query: integers up to 8128, those of even octets up to 32512. Heads that are no multiples of 64 have
// both rows in each word (PAGES.md), which are sorted first; a last word alone gives its two bytes of each row, and those of odd octets behind them.
// Keys of parts: a tile of 16 channels is half of a product, its codes four bytes for each row, which one mask finds, and a second one the fifth bit of
// five (LaneCodes::even_operand). Queries have the step of a part's levels, by which these differ (fold.cuh), over what the bits' place multiplies codes by.
#pragma once
#include "levels.cuh"

namespace skvq {

template <class K, int Tiles>
constexpr bool by_bytes =
    K::stream == keys && (K::is_even || (K::format == 2 && K::groups == 1 && K::head_dim % 32 == 0)) && K::tiles * Tiles <= 16;

/// The last bits of 1.5·2^23 + x are x as an integer, to nearest even.
constexpr float integer_magic = 12582912.0f;
/// 127·256: of two signed bytes, whichever the lower one is.
constexpr float largest_integer = 32512.0f;

/// The integer in the last bits of integer_magic + x as two bytes, of which the low one is signed: high ones count from what it leaves. Of two of them.
__device__ __forceinline__ u32 high_bytes(u32 x, u32 y) { return permute_bytes(x + 128, y + 128, 0x0051) & 0xffffu; }
__device__ __forceinline__ u32 low_bytes(u32 x, u32 y) { return permute_bytes(x, y, 0x0040) & 0xffffu; }

/// A query as 32 lanes × 4 registers for each product of 32 channels: high bytes for channels 2t and 2t + 1 of a lane's octets, then low bytes likewise.
/// Product 2j has the even octets of words 2j and 2j + 1, product 2j + 1 the odd ones; the last word, if alone, has a product of its own. `row`: the
/// query in 16 lanes (transform.cuh), of which those from 8 on have the odd octets. `fragments`: of the query's first lane. Returns what the codes'
/// middle makes of what the lane's elements are rounded to.
template <int D>
__device__ __forceinline__ float write_query_bytes(const float (&row)[D / 16], u32* fragments, int lane) {
    constexpr int words = D / 32;
    const int odd = lane / 8;
    const float part = odd ? 0.25f : 1.0f;
    u32* to = fragments + 4 * (lane % 8 / 2) + lane % 2;
    float sum = 0.0f;
    auto integer_of = [&](float element) {
        const float rounded = __fadd_rn(element * part, integer_magic);
        sum += __fsub_rn(rounded, integer_magic);
        return __float_as_uint(rounded);
    };
#pragma unroll
    for (int pair = 0; pair < words / 2; ++pair) {
        u32 x[4];
        for (int i = 0; i < 4; ++i) x[i] = integer_of(row[4 * pair + i]);
        u32* product = to + 128 * (2 * pair + odd);
        product[0] = high_bytes(x[0], x[1]) | high_bytes(x[2], x[3]) << 16;
        product[2] = low_bytes(x[0], x[1]) | low_bytes(x[2], x[3]) << 16;
    }
    if constexpr (words % 2 != 0) {
        const u32 x = integer_of(row[2 * words - 2]), y = integer_of(row[2 * words - 1]), high = high_bytes(x, y), low = low_bytes(x, y);
        // Lanes of even octets write the high bytes of both, the others the low ones.
        const u32 other = __shfl_xor_sync(whole_warp, odd ? high : low, 8);
        to[128 * (words - 1) + 2 * odd] = odd ? other | low << 16 : high | other << 16;
    }
    return middle_of(2) * sum / part;
}

/// The same of keys of parts: high bytes for the tiles 2j and 2j + 1 of product j, then low bytes likewise. `row`: times the steps of the levels.
template <class K>
__device__ __forceinline__ float write_even_query_bytes(const float (&row)[K::head_dim / 16], u32* fragments, int lane) {
    // A word has the elements of the lanes 2t, 2t + 1, 8 + 2t and 8 + 2t + 1, each of which writes one of four such words of two tiles.
    const int upper = lane / 8, odd = lane % 2;
    u32* to = fragments + 4 * (lane % 8 / 2) + 2 * odd + upper;
    float sum = 0.0f;
    for_each<(K::tiles + 1) / 2>([&](auto index) {
        constexpr int first = 2 * decltype(index)::value, count = first + 1 < K::tiles ? 2 : 1;
        u32 bytes[2] = {};  // of each tile, the high one, then the low one
        for_each<count>([&](auto inner) {
            constexpr int tile = first + decltype(inner)::value, place = K::low_place(2 * tile) % 4;
            constexpr float unit = 1.0f / (1 << place), middle = middle_of(K::part_bits(K::part_of_octet(2 * tile))) * (1 << place);
            const float rounded = __fadd_rn(row[tile] * unit, integer_magic);
            sum += middle * __fsub_rn(rounded, integer_magic);
            const u32 integer = __float_as_uint(rounded);
            bytes[decltype(inner)::value] = high_bytes(integer, 0) & 0xffu | low_bytes(0, integer);
        });
        // Four rows of four bytes, turned to four columns.
        const u32 own = bytes[0] | bytes[1] << 16, beside = __shfl_xor_sync(whole_warp, own, 1);
        const u32 halves = permute_bytes(own, beside, odd ? 0x3715 : 0x6240), across = __shfl_xor_sync(whole_warp, halves, 8);
        to[128 * decltype(index)::value] = permute_bytes(halves, across, upper ? 0x3276 : 0x5410);
    });
    return sum;
}

/// The queries of a tile as B operands of the products: of high and of low bytes, for channels 2t and 2t + 1.
template <class K>
struct ByteQueries {
    static constexpr int products = (K::tiles + 1) / 2;
    u32 high[products][2], low[products][2];

    template <class Read>
    __device__ __forceinline__ void load(const U32x4* from, int lane, const Read& read) {
        for_each<products>([&](auto index) {
            constexpr int i = decltype(index)::value;
            const U32x4 four = read(from + 32 * i + lane);
            high[i][0] = four.x, high[i][1] = four.y, low[i][0] = four.z, low[i][1] = four.w;
        });
    }
};

/// sums[n][2·side + j] = Σ q'·code of row g + 8·side and query 2t + j.
template <class K, int Tiles>
__device__ __forceinline__ void byte_sums(const LaneCodes<K>& codes, const ByteQueries<K> (&queries)[Tiles], float (&sums)[Tiles][4]) {
    constexpr u32 even = 0x03030303u, odd = 0x0c0c0c0cu;
    i32 high[Tiles][4] = {}, low[Tiles][4] = {};
    auto multiply = [&](auto index, const u32(&operand)[4]) {
        for_each<Tiles>([&](auto n) {
            const ByteQueries<K>& query = queries[decltype(n)::value];
            multiply_bytes(high[decltype(n)::value], operand, query.high[decltype(index)::value]);
            multiply_bytes(low[decltype(n)::value], operand, query.low[decltype(index)::value]);
        });
    };
    constexpr int products = ByteQueries<K>::products;
    if constexpr (K::is_even) {
        for_each<products>([&](auto index) {
            constexpr int tile = 2 * decltype(index)::value;
            u32 operand[4] = {codes.template even_operand<tile, 0>(), codes.template even_operand<tile, 1>()};
            if constexpr (tile + 1 < K::tiles) operand[2] = codes.template even_operand<tile + 1, 0>(), operand[3] = codes.template even_operand<tile + 1, 1>();
            multiply(index, operand);
        });
    }
    for_each<(K::is_even ? 0 : products / 2)>([&](auto index) {
        constexpr int w = 2 * decltype(index)::value;
        u32 upper = codes.words[w], lower = codes.words[w + 1];
        if constexpr (!K::sorts_rows) upper = permute_bytes(codes.words[w], lower, 0x6420), lower = permute_bytes(codes.words[w], lower, 0x7531);
        const u32 even_codes[4] = {upper & even, lower & even, upper >> 4 & even, lower >> 4 & even};
        const u32 odd_codes[4] = {upper & odd, lower & odd, upper >> 4 & odd, lower >> 4 & odd};
        multiply(Constant<w>(), even_codes);
        multiply(Constant<w + 1>(), odd_codes);
    });
    if constexpr (!K::is_even && products % 2 != 0) {
        const u32 word = permute_bytes(codes.words[products - 1], 0, 0x3120);
        const u32 masked[4] = {word & even, word & odd, word >> 4 & even, word >> 4 & odd};
        const u32 operand[4] = {permute_bytes(masked[0], masked[1], 0x5410), permute_bytes(masked[0], masked[1], 0x7632),
                                permute_bytes(masked[2], masked[3], 0x5410), permute_bytes(masked[2], masked[3], 0x7632)};
        multiply(Constant<products - 1>(), operand);
    }
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int i = 0; i < 4; ++i) sums[n][i] = static_cast<float>(256 * high[n][i] + low[n][i]);
    });
}

}  // namespace skvq

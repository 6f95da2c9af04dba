// Keys of two bits as bit planes: products with the bits of their codes, so that no level is ever looked up.
//
// Is: the sums Σ q'·level of a row block for a codebook of any four levels. Is not: scales; values, whose page would need another order.
// A level is C[0] + (C[1] − C[0])·b0 + (C[2] − C[0])·b1 + e·b0·b1 with the bits b1 b0 of its code, and e = 0 where C[3] − C[2] = C[1] − C[0], as in
// every symmetric codebook. A bit by itself in a half of a register is a subnormal f16, an operand as it is:
//
//   half of a word:   code 3   code 2   code 1   code 0       codes 2, 3 (row g + 8) come to the bits of 0, 1 (row g) by one shift of the word
//                     b1b0b1b0 …                 b1b0b1b0     of octets 4w + 1 and 4w in the low half, of 4w + 3 and 4w + 2 in the high half
//
// The operand of octets 4w + f and 4w + 2 + f has their bits at 2^(2f) and 2^(4 + 2f); q' is divided by these powers of two once.
#pragma once
#include "levels.cuh"

namespace skvq {

template <class K, int Tiles>
constexpr bool by_planes = K::stream == keys && K::format == 2 && K::groups == 1 && K::head_dim % 32 == 0 && K::tiles * Tiles <= 8;

/// A codebook of four levels: Σ q'·level = lowest·Σ q' + unit·(sums of b1 + first·sums of b0 + both·sums of b0·b1).
struct PlaneLevels {
    float lowest, unit, first, both;

    PlaneLevels() = default;
    __device__ __forceinline__ explicit PlaneLevels(const LevelTable& table) : lowest(level_of(table, 0)) {
        const float one = level_of(table, 1) - lowest, two = level_of(table, 2) - lowest, three = level_of(table, 3) - lowest;
        const float divisor = two > 1e-30f ? two : 1e-30f;  // levels that are one and the same as f16
        unit = divisor * 8388608.0f;                         // b1 by itself is 2^-23
        first = 2.0f * one * reciprocal_fast(divisor);
        both = 2.0f * (three - two - one) * reciprocal_fast(divisor);
    }
};

/// q' as the operands above want it, from the fragments of tiles 2w and 2w + 1 (fold.cuh).
template <int Tiles>
__device__ __forceinline__ void order_for_planes(u32 (&fragments)[Tiles][2]) {
    for_each<Tiles / 2>([&](auto index) {
        constexpr int w = decltype(index)::value;
        u32(&low)[2] = fragments[2 * w], (&high)[2] = fragments[2 * w + 1];
        const u32 evens[2] = {permute_bytes(low[0], high[0], 0x5410), permute_bytes(low[1], high[1], 0x5410)};
        const u32 odds[2] = {permute_bytes(low[0], high[0], 0x7632), permute_bytes(low[1], high[1], 0x7632)};
        low[0] = evens[0], low[1] = fma_halves(odds[0], 0x2c002c00u, 0);                                // 2^-4
        high[0] = fma_halves(evens[1], 0x34003400u, 0), high[1] = fma_halves(odds[1], 0x24002400u, 0);  // 2^-2, 2^-6
    });
}

/// The A operand of octets 4w + F, 4w + 2 + F: bits `Bit` of their codes, or of `word` and `rest` whatever is there.
template <int F, int Bit>
__device__ __forceinline__ void plane_operand(u32 word, u32 rest, u32 (&operand)[4]) {
    constexpr u32 first = 0x00010001u << (2 * F + Bit), second = first << 4;
    operand[0] = word & first, operand[1] = rest & first, operand[2] = word & second, operand[3] = rest & second;
}

/// sums[n][2·side + j]: unit's factor in Σ q'·level of row g + 8·side and query 2t + j. fragment<n, 2w + F> are of order_for_planes.
template <class K, int Tiles, class Queries>
__device__ __forceinline__ void plane_sums(const LaneCodes<K>& codes, const PlaneLevels& levels, const Queries& queries, float (&sums)[Tiles][4]) {
    float of_first[Tiles][4] = {}, of_second[Tiles][4] = {};
    auto add = [&](auto index, auto bit, u32 word, auto& to) {
        constexpr int f = decltype(index)::value % 2;
        u32 operand[4];
        plane_operand<f, decltype(bit)::value>(word, word >> 8, operand);
        for_each<Tiles>([&](auto n) {
            u32 query[2];
            queries.template fragment<decltype(n)::value, decltype(index)::value>(query);
            multiply_fragments(to[decltype(n)::value], operand, query);
        });
    };
    for_each<K::tiles>([&](auto index) {
        const u32 word = codes.words[decltype(index)::value / 2];
        add(index, Constant<0>{}, word, of_first);
        add(index, Constant<1>{}, word, of_second);
    });
    for_each<Tiles>([&](auto index) {
        constexpr int n = decltype(index)::value;
        for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(of_first[n][i], levels.first, of_second[n][i]);
    });
    if (levels.both != 0.0f) {
        float of_both[Tiles][4] = {};
        for_each<K::tiles>([&](auto index) {
            const u32 word = codes.words[decltype(index)::value / 2];
            add(index, Constant<0>{}, word & word >> 1, of_both);
        });
        for_each<Tiles>([&](auto index) {
            constexpr int n = decltype(index)::value;
            for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(of_both[n][i], levels.both, sums[n][i]);
        });
    }
}

}  // namespace skvq

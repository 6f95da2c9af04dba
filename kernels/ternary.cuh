// Ternary values with the levels −c, 0, c: products with what is left of their bytes, so that no digit is ever taken out of them.
//
// Is: the A operands of values of format 1.6 in one group, and a channel's sum made from theirs. Is not: other levels, groups or
// keys, whose digits select levels (levels.cuh).
// A word's bytes 0, 2 and 1, 3 lie in the halves of two registers. With r what is left of a byte, 3·r has the next digit above its low
// byte r', which is what is left then. As an f16, r is the subnormal r·2^-24, an operand as it is. Let W(r) be Σ weight·r over rows. Then
//
//   256·Σ weight·digit = 3·W(r) − W(r').
//
// So an octet costs two masks and two multiplications, and a word one octet of sums more. Sums of so many positive numbers would lose what is
// small beside them (tensor cores cut off what f32 cannot hold), so odd rows have complements, as pages have their bytes, and negative weights: with r̄ = 255 − r the
// next one is the low byte of 3·r̄ + 2. Then, sums of weights of even and odd rows being E and O,
//
//   256·Σ weight·(digit − 1) = 3·W − W' − (256·E − 254·O),   and 256·E − 254·O is what the operands 256 and 254 sum up.
#pragma once
#include "levels.cuh"

namespace skvq {

/// A register of a row block has the codes 0, 2 (`even`) or 1, 3 (`odd`) of an octet: rows 2t, 2t + 8 and 2t + 1, 2t + 9.
struct CodePairs {
    u32 even, odd;
};

template <class V>
constexpr bool has_remainders = V::stream == values && V::is_ternary && V::groups == 1;

template <class V>
struct TernarySums {
    static constexpr int octets = V::code_octets, words = V::ternary_words;
    static constexpr int in_words = octets < 5 * words ? octets : 5 * words;
    /// Octets of sums: of every word what is left before each digit and behind the last, then octets that fill no word, then the weights themselves.
    static constexpr int count = octets + words + 1, tiles = (count + 1) / 2;

    /// The octet of sums that belongs to an octet of channels.
    static constexpr int place(int octet) { return octet < in_words ? octet + octet / 5 : octet + words; }

    /// Calls f(Constant<tile>, A operand) for every tile of sums. Weights of odd rows are to be negative.
    template <class F>
    static __device__ __forceinline__ void for_each_tile(const LaneCodes<V>& codes, const F& f) {
        CodePairs all[2 * tiles];
        for_each<words>([&](auto index) {
            constexpr int w = decltype(index)::value, digits = in_words - 5 * w < 5 ? in_words - 5 * w : 5;
            u32 even = codes.words[w] & 0x00ff00ffu, odd = permute_bytes(codes.words[w], 0, 0x4341);
            all[6 * w] = {even, odd};
            for_each<digits>([&](auto digit) {
                even = even * 3u & 0x00ff00ffu, odd = odd * 3u + 0x00020002u & 0x00ff00ffu;
                all[6 * w + 1 + decltype(digit)::value] = {even, odd};
            });
        });
        for_each<octets - in_words>([&](auto index) {
            constexpr int octet = in_words + decltype(index)::value, byte = 4 * words + decltype(index)::value;
            // One byte has all four codes: its halves begin at digits 0 and 2.
            const u32 first = codes.words[byte / 4] >> byte % 4 * 8 & 255u, third = first * 9u & 255u;
            const u32 even = (third << 16 | first) * 3u, odd = (even & 0x00ff00ffu) * 3u;
            // Digits less 1, of the odd rows 1 less digits, as bits 8 and above have them.
            all[place(octet)] = {add_halves(even & 0x03000300u, 0x81008100u), add_halves(odd & 0x03000300u ^ 0x80008000u, 0x01000100u)};
        });
        all[count - 1] = {256u << 16 | 256u, 254u << 16 | 254u};
        if constexpr (count % 2 != 0) all[count] = all[count - 1];
        for_each<tiles>([&](auto index) {
            constexpr int tile = decltype(index)::value;
            const u32 operand[4] = {all[2 * tile].even, all[2 * tile + 1].even, all[2 * tile].odd, all[2 * tile + 1].odd};
            f(index, operand);
        });
    }

    /// Σ weight·level of octet Octet's channels, for side j of the queries.
    template <int Octet>
    static __device__ __forceinline__ float channel(const float (&sums)[tiles][4], int j, float step) {
        auto at = [&](int octet) { return sums[octet / 2][2 * (octet % 2) + j]; };
        float digits = at(place(Octet));
        if constexpr (Octet < in_words) digits = 3.0f * digits - at(place(Octet) + 1) - at(count - 1);
        return step * (digits * 65536.0f);
    }
};

__device__ __forceinline__ bool ternary_is_symmetric(const LevelTable& table) {
    return level_of(table, 1) == 0.0f && level_of(table, 0) == -level_of(table, 2);
}

}  // namespace skvq

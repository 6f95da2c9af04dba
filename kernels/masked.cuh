// Values whose levels are evenly spaced, of two bits or of parts: products with their codes behind a mask.
//
// Is: the A operands of such values, and a channel's sum made from theirs. Is not: other levels, which are looked up as f16 (levels.cuh); ternary ones, of
// which ternary.cuh does the same.
// A code c that lies from bit k of a half on is the f16 subnormal c·2^(k − 24), an operand as it is (of up to ten bits). Of odd rows it is counted from the other
// end, c̄ = n − c with n = 2^bits − 1, and their weights are negative: sums of positive numbers alone would lose what is small beside them (tensor cores cut off what f32
// cannot hold). Sums of weights of even and odd rows being E and O,
//
//   Σ weight·(c − n/2) = E(c) − O(c̄) − n/2·(E − O),   and E − O is what the operand 1 sums up.
#pragma once
#include "levels.cuh"
#include "ternary.cuh"

namespace skvq {

template <class V>
struct MaskedSums {
    static constexpr int octets = V::code_octets;
    /// Octets of sums: those of channels, then the weights themselves.
    static constexpr int count = octets + 1, tiles = (count + 1) / 2;

    /// Calls f(Constant<tile>, A operand) for every tile of sums. Weights of odd rows are to be negative.
    template <class F>
    static __device__ __forceinline__ void for_each_tile(const LaneCodes<V>& codes, const F& f) {
        for_each<tiles>([&](auto index) {
            constexpr int tile = decltype(index)::value;
            u32 operand[4];
            for_each<2>([&](auto half) {
                constexpr int side = decltype(half)::value, octet = 2 * tile + side;
                if constexpr (octet < octets) {
                    operand[side] = codes.template even_halves<octet, 0>(), operand[2 + side] = codes.template even_halves<octet, 1>();
                } else {
                    operand[side] = operand[2 + side] = one;
                }
            });
            f(index, operand);
        });
    }

    /// Σ weight·level of octet Octet's channels, for side j of the queries, in units of `step`; of parts with steps of their own.
    template <int Octet>
    static __device__ __forceinline__ float channel(const float (&sums)[tiles][4], int j, float step) {
        constexpr int bits = V::part_bits(V::part_of_octet(Octet)), at = V::low_place(Octet) % 8;
        constexpr float unit = (V::is_parts ? even_step_of(bits) : 1.0f) * 16777216.0f;
        auto of = [&](int octet) { return sums[octet / 2][2 * (octet % 2) + j]; };
        return step * unit * (of(Octet) * (1.0f / (1 << at)) - of(octets) * (middle_of(bits) / one_weight));
    }

private:
    // As large as a code, so that its sums are as near.
    static constexpr u32 one_weight = 4, one = one_weight * 0x10001u;
};

/// Whether values are multiplied as they lie, and how.
template <class V>
constexpr bool has_masks = V::stream == values && V::is_even;
template <class V>
constexpr bool has_integers = has_masks<V> || has_remainders<V>;
template <class V, bool Masks>
struct IntegerSumsOf {
    using Type = TernarySums<V>;
};
template <class V>
struct IntegerSumsOf<V, true> {
    using Type = MaskedSums<V>;
};
template <class V>
using IntegerSums = typename IntegerSumsOf<V, has_masks<V>>::Type;

}  // namespace skvq

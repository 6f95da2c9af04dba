// Codes of a lane to fragments of f16 levels, by byte permutation.
//
// Is: a lane's packed bytes in registers, and the two registers of an octet made from them. Is not: scales, which are applied to sums.
// A selector has a code in each of its four low nibbles. Two permutations look up the low and the high bytes of four levels, two more
// interleave them: about 1.4 instructions an element for up to 8 levels of any codebook, of which only the selectors depend on the format.
#pragma once
#include "layout.cuh"
#include "params.cuh"

namespace skvq {

/// Nibbles of a byte's bits: bit i to bit 4·i.
__device__ __forceinline__ u32 spread_bits(u32 nibble) {
    const u32 pairs = (nibble | nibble << 6) & 0x0303u;
    return (pairs | pairs << 3) & 0x1111u;
}
/// Pair i of a byte's bits to bits 4·i, 4·i + 1.
__device__ __forceinline__ u32 spread_pairs(u32 byte) {
    const u32 halves = (byte | byte << 4) & 0x0f0fu;
    return (halves | halves << 2) & 0x3333u;
}

__device__ __forceinline__ u32 choose(u32 where_clear, u32 where_set, u32 mask) { return where_clear ^ ((where_clear ^ where_set) & mask); }

/// Bit 0 of each nibble to all bits of a byte: the sign of byte 7 or of byte 6 of a permutation. Its constant is not the first operand, which would take a register.
__device__ __forceinline__ u32 bytes_of_bits(u32 nibbles) { return permute_bytes(0, 0x80000000u, nibbles | 0xeeeeu); }

/// First word of the table of a codebook of 2^bits levels.
constexpr int table_of(int bits) { return bits == 1 ? 0 : 1 << (bits - 2); }
static_assert(table_of(1) == 0 && table_of(2) == 1 && table_of(3) == 2 && table_of(4) == 4 && table_of(5) == 8, "as params.cuh says");

/// One byte of each of four levels.
template <int Bits>
__device__ __forceinline__ u32 look_up(const u32 (&table)[16], int first, u32 selector, u32 bit3) {
    static_assert(Bits >= 2 && Bits <= 4, "one bit: signed_levels_of, five: signed_sizes_of");
    if constexpr (Bits == 2) return permute_bytes(table[first], 0, selector);
    if constexpr (Bits == 3) return permute_bytes(table[first], table[first + 1], selector);
    if constexpr (Bits == 4) {
        return choose(permute_bytes(table[first], table[first + 1], selector), permute_bytes(table[first + 2], table[first + 3], selector), bit3);
    }
    return 0;
}

/// The four levels that a selector names: codes 0, 1 in `x`, codes 2, 3 in `y`.
template <int Bits>
__device__ __forceinline__ void levels_of(const LevelTable& table, int first, u32 selector, u32& x, u32& y) {
    u32 bit3 = 0;
    if constexpr (Bits == 4) {
        bit3 = bytes_of_bits(selector >> 3);
        selector &= 0x7777u;  // a set bit 3 would ask for a sign
    }
    const u32 low_bytes = look_up<Bits>(table.low, first, selector, bit3);
    const u32 high_bytes = look_up<Bits>(table.high, first, selector, bit3);
    x = permute_bytes(low_bytes, high_bytes, 0x5140);
    y = permute_bytes(low_bytes, high_bytes, 0x7362);
}

/// Likewise of one bit, levels −x and x: the bits of a selector are signs.
__device__ __forceinline__ void signed_levels_of(const LevelTable& table, u32 selector, u32& x, u32& y) {
    const u32 lower = ((table.low[0] & 255u) | (table.high[0] & 255u) << 8) * 0x10001u;
    // Bits 0 and 4, then 8 and 12, to 15 and 31. Where two others meet they carry into a bit that is not looked at.
    x = selector * (1u << 15 | 1u << 27) & 0x80008000u ^ lower;
    y = selector * (1u << 7 | 1u << 19) & 0x80008000u ^ lower;
}

/// Likewise of four or five bits of parts: sizes are looked up in the upper half of their levels. `selector`: the lower four bits of each code as pages
/// have it (page_code); `positive`: the uppermost bit at bit 0 of each nibble, whatever the others are.
template <int Bits>
__device__ __forceinline__ void signed_sizes_of(const LevelTable& table, u32 selector, u32 positive, u32& x, u32& y) {
    static_assert(Bits == 4 || Bits == 5, "of fewer bits one permutation has all levels");
    constexpr int first = table_of(Bits) + (1 << (Bits - 3));
    u32 bit3 = 0;
    if constexpr (Bits == 5) bit3 = bytes_of_bits(selector >> 3);
    selector &= 0x7777u;  // a set bit 3 would ask for a sign
    const u32 low_bytes = look_up<Bits - 1>(table.low, first, selector, bit3);
    const u32 high_bytes = look_up<Bits - 1>(table.high, first, selector, bit3) ^ ~bytes_of_bits(positive) & 0x80808080u;
    x = permute_bytes(low_bytes, high_bytes, 0x5140);
    y = permute_bytes(low_bytes, high_bytes, 0x7362);
}

/// Level `code` of a codebook of three or four.
__device__ __forceinline__ float level_of(const LevelTable& table, int code) {
    constexpr int word = table_of(2);
    return float_of_half(static_cast<u16>((table.low[word] >> 8 * code & 255u) | (table.high[word] >> 8 * code & 255u) << 8));
}

/// The table of a stream of codes of up to three bits, ready for many look-ups.
template <class L>
__device__ __forceinline__ LevelTable kept_levels(const LevelTable& table) {
    LevelTable kept = table;
    if constexpr (!L::is_parts && L::part_bits(0) <= 3) {
        constexpr int first = table_of(L::part_bits(0)), count = L::is_pairs ? 4 : L::part_bits(0) == 3 ? 2 : 1;
        for (int word = first; word < first + count; ++word) {
            kept.low[word] = keep_in_register(table.low[word]), kept.high[word] = keep_in_register(table.high[word]);
        }
    }
    return kept;
}

/// A row block of a page, read once.
struct PageBlock {
    const u8* from;
    int lane;
    template <class T, int First>
    __device__ __forceinline__ T word() const {
        return load_streaming(reinterpret_cast<const T*>(from + First) + lane);
    }
};

/// The codes of one lane in one row block.
template <class L>
struct LaneCodes {
    u32 words[L::lane_words];

    __device__ __forceinline__ void load(const u8* page, int block, int lane) { read(PageBlock{page + block * L::block_bytes, lane}); }

    /// From a row block's bytes: `block.template word<T, first>()` is this lane's word of a run of words that begins at byte `first`.
    template <class Block>
    __device__ __forceinline__ void read(const Block& block) {
        constexpr int wide = L::lane_bytes / 16;
        for_each<wide>([&](auto index) {
            constexpr int i = decltype(index)::value;
            const U32x4 loaded = block.template word<U32x4, 512 * i>();
            words[4 * i] = loaded.x, words[4 * i + 1] = loaded.y, words[4 * i + 2] = loaded.z, words[4 * i + 3] = loaded.w;
        });
        constexpr int after16 = 16 * wide, after8 = after16 + (L::lane_bytes & 8), after4 = after8 + (L::lane_bytes & 4);
        constexpr int after2 = after4 + (L::lane_bytes & 2);
        if constexpr ((L::lane_bytes & 8) != 0) {
            const U32x2 loaded = block.template word<U32x2, 32 * after16>();
            words[after16 / 4] = loaded.x, words[after16 / 4 + 1] = loaded.y;
        }
        if constexpr ((L::lane_bytes & 4) != 0) words[after8 / 4] = block.template word<u32, 32 * after8>();
        if constexpr ((L::lane_bytes & 2) != 0) words[after4 / 4] = block.template word<u16, 32 * after4>();
        if constexpr ((L::lane_bytes & 1) != 0) {
            const u32 byte = block.template word<u8, 32 * after2>();
            words[after2 / 4] = after2 % 4 ? words[after2 / 4] | byte << 16 : byte;
        }
    }

    /// 16 bits from byte `Byte` on, in the low half; what is above them is not specified unless the caller masks words.
    template <int Byte>
    __device__ __forceinline__ u32 bits_at() const {
        constexpr int word = Byte / 4, shift = Byte % 4 * 8;
        if constexpr (shift == 24 && word + 1 < L::lane_words) return words[word] >> 24 | words[word + 1] << 8;
        return words[word] >> shift;
    }

    /// Selector of a plane of two bits.
    template <int First, int Octets, int Octet>
    __device__ __forceinline__ u32 two_bits() const {
        if constexpr (L::sorts_rows) {
            constexpr int pair = Octet / 8 * 2, at = Octet % 8 / 2;
            return permute_bytes(words[pair], words[pair + 1], 0x4400 + 16 * (at + 4) + at) >> Octet % 2 * 2 & 0x3333u;
        }
        if constexpr (Octet + 1 == Octets && Octet % 2 == 0) return spread_pairs(bits_at<First + Octet>() & 255u);
        constexpr int byte = First + Octet / 2 * 2;
        // Masked as a word first: the two octets of its upper half share that. A permutation, lest the compiler puts the shift first again.
        if constexpr (byte % 2 == 0) {
            const u32 masked = words[byte / 4] >> Octet % 2 * 2 & 0x33333333u;
            return byte % 4 == 0 ? masked : permute_bytes(masked, 0, 0x4432);
        }
        return bits_at<byte>() >> Octet % 2 * 2 & 0x3333u;
    }
    /// A plane of one bit at bit `At` of each nibble, whatever the others are.
    template <int First, int Octets, int Octet, int At>
    __device__ __forceinline__ u32 among_bits() const {
        constexpr int byte = First + Octet / 4 * 2, inner = Octet % 4;
        if constexpr (Octets - Octet / 4 * 4 < 3) {
            return spread_bits(bits_at<byte>() >> 4 * inner & 15u) << At;
        } else {
            const u32 bits = bits_at<byte>();
            return inner > At ? bits >> (inner > At ? inner - At : 0) : bits << (inner > At ? 0 : At - inner);
        }
    }
    /// A selector of it.
    template <int First, int Octets, int Octet, int At>
    __device__ __forceinline__ u32 one_bit() const {
        return among_bits<First, Octets, Octet, At>() & (0x1111u << At);
    }

    /// Even levels: a word with all its places; of the last one, what is not asked for may be anything.
    template <int Word>
    __device__ __forceinline__ u32 even_word() const {
        if constexpr (Word < L::even_words) {
            return words[Word];
        } else {
            const u32 rest = words[L::lane_words - 1];
            u32 two = 0, one = 0;
            constexpr bool of_keys = L::stream == keys;
            if constexpr (L::even_rest >= 2) two = of_keys ? permute_bytes(rest, rest >> 2, 0x5410) : permute_bytes(rest, rest >> 4, 0x5140);
            if constexpr (L::even_rest % 2 != 0) {
                const u32 byte = L::even_rest == 3 ? rest >> 16 : rest, pair = permute_bytes(byte, byte >> (of_keys ? 1 : 2), 0x0040);
                one = permute_bytes(pair, pair >> (of_keys ? 2 : 4), 0x5410);
            }
            if constexpr (L::even_rest == 3) return of_keys ? (two & 0x33333333u) | (one << 2 & 0x44444444u) : (two & 0x0f0f0f0fu) | (one << 4 & 0x30303030u);
            else return L::even_rest == 2 ? two : one;
        }
    }
    /// The codes of an octet that lie `Down` bits above their place, in fields from bit low_place % places_of_word on; `Each`: the lowest bit of every field.
    template <int Octet, int Down, u32 Each>
    __device__ __forceinline__ u32 even_fields() const {
        constexpr int part = L::part_of_octet(Octet), low = L::low_bits(part), place = L::low_place(Octet), at = place % L::places_of_word;
        const u32 codes = even_word<place / L::places_of_word>() >> Down & ((1u << low) - 1 << at) * Each;
        if constexpr (L::part_bits(part) == low) {
            return codes;
        } else {
            constexpr int high = L::high_place(Octet), from = high % L::places_of_word + Down, to = at + low;
            const u32 bit = even_word<high / L::places_of_word>();
            return codes | ((to > from ? bit << (to > from ? to - from : 0) : bit >> (to > from ? 0 : from - to)) & Each << to);
        }
    }
    /// Of keys, four codes of row g + 8·Side as bytes: a quarter of an operand of products of bytes. They are 2^(low_place % 4) times what they are.
    template <int Tile, int Side>
    __device__ __forceinline__ u32 even_operand() const {
        return even_fields<2 * Tile, 4 * Side, 0x01010101u>();
    }
    /// Of values, an octet's codes of rows 2t and 2t + 8, or of 2t + 1 and 2t + 9, in halves, from bit low_place % 8 on.
    template <int Octet, int Odd>
    __device__ __forceinline__ u32 even_halves() const {
        return even_fields<Octet, 8 * Odd, 0x00010001u>();
    }
};

/// The distance of evenly spaced levels of parts, of least error for a normal variable (FORMAT.md §6).
constexpr float even_step_of(int bits) {
    constexpr float steps[6] = {0.0f, 1.5957691f, 0.9956867f, 0.5860194f, 0.3352006f, 0.1881388f};
    return steps[bits];
}
/// As f16.
constexpr u32 even_step_half(int bits) {
    constexpr u32 steps[6] = {0, 0x3e62, 0x3bf7, 0x38b0, 0x355d, 0x3205};
    return steps[bits];
}
/// What codes of evenly spaced levels are less than the level in units of its step: half of the largest one.
constexpr float middle_of(int bits) { return 0.5f * static_cast<float>((1 << bits) - 1); }
/// That, negative, as f16.
constexpr u32 negative_middle_half(int bits) { return bits == 1 ? 0xb800u : bits == 2 ? 0xbe00u : bits == 3 ? 0xc300u : bits == 4 ? 0xc780u : 0xcbc0u; }

/// Turns the octets of a lane into fragments. Octets of ternary codes are asked for in ascending order.
template <class L>
struct LaneDecoder {
    const LaneCodes<L>& codes;
    const LevelTable& table;
    const u16* wide_levels;
    /// Ternary: what is left of the bytes 0, 2 and 1, 3 of the present word, in halves.
    u32 even = 0, odd = 0;

    __device__ __forceinline__ LaneDecoder(const LaneCodes<L>& codes, const LevelTable& table, u64 wide_levels)
        : codes(codes), table(table), wide_levels(reinterpret_cast<const u16*>(wide_levels)) {}

    /// Registers of the 8 channels from 8·Octet on: x has codes 0, 1, y has codes 2, 3 of the octet.
    template <int Octet>
    __device__ __forceinline__ void octet(u32& x, u32& y) {
        if constexpr (L::is_ternary) {
            levels_of<2>(table, table_of(2), ternary<Octet>(), x, y);
        } else if constexpr (L::is_even) {
            // 0x6400 | c is 1024 + c; both steps are exact.
            constexpr int bits = L::part_bits(L::part_of_octet(Octet)), at = L::low_place(Octet) % L::places_of_word;
            if constexpr (L::stream == keys) {
                constexpr u32 unit = 0x3c00u - (at << 10), middle = negative_middle_half(bits);
                // In units of the part's step, which the queries have (fold.cuh).
                constexpr int tile = Octet / 2, selector = Octet % 2 ? 0x4342 : 0x4140;
                auto levels = [&](u32 bytes) {
                    return fma_halves(add_halves(permute_bytes(bytes, 0x64646464u, selector), 0xe400e400u), unit * 0x10001u, middle * 0x10001u);
                };
                x = levels(codes.template even_operand<tile, 0>()), y = levels(codes.template even_operand<tile, 1>());
            } else {
                // Times 2^-at, less the middle, which counts in odd rows from the other end. All of it is exact: 2^(10 − at) and the middle together have
                // room in an f16, but for fields at bit 0, which are the subnormals c·2^-24 as they lie.
                constexpr u32 sign = 0x8000u;
                auto levels = [&](u32 halves, u32 turned) {
                    u32 level;
                    if constexpr (at > 0) {
                        constexpr u32 unit = 0x3c00u - (at << 10), middle = sign | (25 - at << 10) | (1u << bits) - 1 << (at > 0 ? at - 1 : 0);
                        level = fma_halves(halves | 0x64006400u, (unit ^ turned) * 0x10001u, (middle ^ turned) * 0x10001u);
                    } else {
                        constexpr u32 unit = 0x3c00u + (9 << 10), middle = negative_middle_half(bits);
                        level = fma_halves(fma_halves(halves, 0x78007800u, 0u), (unit ^ turned) * 0x10001u, (middle ^ turned) * 0x10001u);
                    }
                    // Of two bits in units of the step, which is `correction`.
                    if constexpr (L::is_parts) return fma_halves(level, even_step_half(bits) * 0x10001u, 0u);
                    else return level;
                };
                const u32 even = levels(codes.template even_halves<Octet, 0>(), 0), odd = levels(codes.template even_halves<Octet, 1>(), sign);
                x = permute_bytes(even, odd, 0x5410), y = permute_bytes(even, odd, 0x7632);
            }
        } else if constexpr (L::is_pairs) {
            // Channels G / 2 apart share an index: group · G/16 octets of indices, each of which serves two octets of channels.
            constexpr int per_group = L::group_size / 8, inner = Octet % per_group, half = per_group / 2;
            constexpr int index = Octet / per_group * half + inner % half;
            levels_of<3>(table, table_of(3) + (inner < half ? 0 : 2), three_bits<0, index>(), x, y);
        } else {
            constexpr int part = L::part_of_octet(Octet), bits = L::part_bits(part), octets = L::part_width(part) / 8;
            constexpr int inner = Octet - L::part_first(part) / 8;
            if constexpr (bits == 8) {
                wide(codes.words[Octet], x, y);
            } else if constexpr (bits == 3) {
                levels_of<3>(table, table_of(3), three_bits<part, inner>(), x, y);
            } else if constexpr (bits == 1) {
                const u32 selector = codes.template one_bit<L::plane_offset(part, 1), octets, inner, 0>();
                signed_levels_of(table, selector, x, y);
            } else if constexpr (bits == 2) {
                levels_of<2>(table, table_of(2), codes.template two_bits<L::plane_offset(part, 2), octets, inner>(), x, y);
            } else {
                const u32 selector = codes.template bits_at<L::plane_offset(part, 4) + 2 * inner>();
                if constexpr (bits == 5) {
                    signed_sizes_of<5>(table, selector, codes.template among_bits<L::plane_offset(part, 1), octets, inner, 0>(), x, y);
                } else if constexpr (L::is_parts) {
                    signed_sizes_of<4>(table, selector, selector >> 3, x, y);
                } else {
                    levels_of<4>(table, table_of(4), selector & 0xffffu, x, y);
                }
            }
        }
    }

    template <int Part, int Inner>
    __device__ __forceinline__ u32 three_bits() const {
        constexpr int octets = L::part_width(Part) / 8;
        return codes.template two_bits<L::plane_offset(Part, 2), octets, Inner>() |
               codes.template one_bit<L::plane_offset(Part, 1), octets, Inner, 2>();
    }

    /// Four bytes of one octet.
    __device__ __forceinline__ void wide(u32 bytes, u32& x, u32& y) const {
        if (wide_levels) {
            x = wide_levels[bytes & 255] | static_cast<u32>(wide_levels[bytes >> 8 & 255]) << 16;
            y = wide_levels[bytes >> 16 & 255] | static_cast<u32>(wide_levels[bytes >> 24]) << 16;
            return;
        }
        // 0x6400 | c is 1024 + c; −1152 and + 0.5 make it c − 127.5, each step exact.
        x = add_halves(add_halves(permute_bytes(bytes, 0x64646464u, 0x4140), 0xe480e480u), 0x38003800u);
        y = add_halves(add_halves(permute_bytes(bytes, 0x64646464u, 0x4342), 0xe480e480u), 0x38003800u);
    }

    template <int Octet>
    __device__ __forceinline__ u32 ternary() {
        if constexpr (Octet < 5 * L::ternary_words) {
            if constexpr (Octet % 5 == 0) {
                const u32 word = codes.words[Octet / 5] ^ 0xff00ff00u;
                even = word & 0x00ff00ffu;
                odd = word >> 8 & 0x00ff00ffu;
            }
            // A digit of each byte comes out above it: bits 8, 9 of each half.
            const u32 even3 = even * 3u, odd3 = odd * 3u;
            even = even3 & 0x00ff00ffu;
            odd = odd3 & 0x00ff00ffu;
            const u32 digits = (even3 >> 8 & 0x00030003u) | (odd3 >> 4 & 0x00300030u);
            return digits | digits >> 8;  // bytes 0, 1, and 2, 3 from the upper half
        } else {
            constexpr int byte = 4 * L::ternary_words + Octet - 5 * L::ternary_words;
            u32 rest = codes.words[byte / 4] >> byte % 4 * 8 & 255u, selector = 0;
            for_each<4>([&](auto index) {
                rest *= 3u;
                selector |= (rest >> 8) << 4 * decltype(index)::value;
                rest &= 255u;
            });
            return selector;
        }
    }
};

}  // namespace skvq

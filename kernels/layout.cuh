// Where the codes and numbers of packed rows lie in a page of the device. PAGES.md draws it.
//
// Is: sizes and places, all compile-time constants of one stream's format. Is not: arithmetic on levels (levels.cuh).
// A page holds 128 rows of one (sequence, kv head, stream) in 8 row blocks of 16 rows. A row block is cut into octets, 8 channels × 16 rows;
// a lane of a warp holds 4 codes of an octet, those that an mma fragment wants from it.
#pragma once
#include "portable.cuh"

namespace skvq {

constexpr int page_rows = 128, block_rows = 16, blocks_per_page = page_rows / block_rows;

// Template arguments are plain ints, so that their mangled names are the same for every compiler.
constexpr int keys = 0, values = 1;
/// Formats of FORMAT.md §1 that are not named by their bits.
constexpr int format_parts = 0, format_pairs = 15, format_ternary = 16;

/// Calls f(Constant<0>), …, f(Constant<N − 1>): a loop whose index is a constant under every compiler.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int N, int I = 0, class F>
__device__ __forceinline__ void for_each(const F& f) {
    if constexpr (I < N) {
        f(Constant<I>{});
        for_each<N, I + 1>(f);
    }
}

/// Bytes of a lane in a plane of `bits` a code over `octets` octets.
constexpr int plane_bytes(int bits, int octets) {
    if (bits == 8) return 4 * octets;
    if (bits == 4) return 2 * octets;
    if (bits == 2) return octets;
    const int rest = octets % 4;
    return octets / 4 * 2 + (rest == 0 ? 0 : rest <= 2 ? 1 : 2);
}

/// First bit of code `i` of octet `octet` in such a plane: nibbles of one selector lie four bits apart wherever an octet has neighbours.
__device__ constexpr int plane_bit(int bits, int octets, int octet, int i) {
    if (bits == 8) return 32 * octet + 8 * i;
    if (bits == 4) return 16 * octet + 4 * i;
    if (bits == 2) {
        const bool alone = octet + 1 == octets && octet % 2 == 0;
        return alone ? 8 * octet + 2 * i : 16 * (octet / 2) + 4 * i + 2 * (octet % 2);
    }
    const bool spread = octets - octet / 4 * 4 >= 3;
    return 16 * (octet / 4) + (spread ? 4 * i + octet % 4 : 4 * (octet % 4) + i);
}

/// The other way round: which code bit `bit` is of. Behind the last octet there is padding.
__device__ __forceinline__ void plane_place(int bits, int octets, int bit, int& octet, int& i) {
    if (bits == 8) {
        octet = bit / 32, i = bit / 8 % 4;
    } else if (bits == 4) {
        octet = bit / 16, i = bit / 4 % 4;
    } else if (bits == 2) {
        const bool alone = octets % 2 != 0 && bit >= 8 * (octets - 1);
        octet = alone ? octets - 1 : bit / 16 * 2 + bit / 2 % 2;
        i = alone ? bit / 2 % 4 : bit / 4 % 4;
    } else {
        const bool spread = octets - bit / 16 * 4 >= 3;
        octet = bit / 16 * 4 + (spread ? bit % 4 : bit / 4 % 4);
        i = spread ? bit / 4 % 4 : bit % 4;
    }
}

/// Both where words have rows of their own (Layout::sorts_rows).
__device__ constexpr int sorted_bit(int octet, int i) { return 64 * (octet / 8) + 32 * (i / 2) + 8 * (octet % 8 / 2) + 4 * (i % 2) + 2 * (octet % 2); }
__device__ __forceinline__ void sorted_place(int bit, int& octet, int& i) {
    octet = bit / 64 * 8 + bit / 8 % 4 * 2 + bit / 2 % 2;
    i = bit / 32 % 2 * 2 + bit / 4 % 2;
}

/// One stream's format. `Parts` has a byte for each part: bits in its low three, width / 16 in its high five bits. `Even`: levels are evenly spaced, and
/// codes lie where a mask makes operands of them: of keys of parts (bytes.cuh), and of values of two bits or of parts (masked.cuh).
template <int Stream, int HeadDim, int Format, int GroupSize, int Symmetric, int NumberBytes, u64 Parts = 0, int Even = 0>
struct Layout {
    static constexpr int stream = Stream, head_dim = HeadDim, format = Format, group_size = GroupSize, number_bytes = NumberBytes;
    static constexpr bool symmetric = Symmetric != 0;
    static constexpr bool is_parts = Format == format_parts, is_pairs = Format == format_pairs, is_ternary = Format == format_ternary;
    static_assert(HeadDim % 16 == 0 && HeadDim <= 256, "head sizes are multiples of 16 up to 256");
    static_assert(HeadDim % GroupSize == 0 && GroupSize % 16 == 0, "groups divide the head");
    static_assert(!is_parts || (Parts != 0 && GroupSize == HeadDim && Symmetric), "a row of parts is one symmetric group");
    static constexpr bool is_even = Even != 0;
    static_assert(!is_even || is_parts || (Stream == values && Format == 2 && GroupSize == HeadDim && Symmetric), "parts, or values of two bits");

    static constexpr int groups = HeadDim / GroupSize;
    /// Scales, then zero points, of a row.
    static constexpr int numbers = groups * (symmetric ? 1 : 2);

    static constexpr int part_count() {
        if (!is_parts) return 1;
        int count = 0;
        while (count < 8 && (Parts >> 8 * count & 255) != 0) ++count;
        return count;
    }
    static constexpr int part_bits(int part) {
        if (is_parts) return static_cast<int>(Parts >> 8 * part & 7);
        return is_pairs ? 3 : is_ternary ? 2 : Format;
    }
    static constexpr int part_width(int part) {
        if (is_parts) return static_cast<int>(Parts >> (8 * part + 3) & 31) * 16;
        return is_pairs ? HeadDim / 2 : HeadDim;
    }
    static constexpr int parts = part_count();
    /// Keys of two bits have the rows g and g + 8 of eight octets in a word each, as products of bytes want them (bytes.cuh).
    static constexpr bool sorts_rows = Stream == keys && Format == 2 && HeadDim % 64 == 0;

    /// First code of a part.
    static constexpr int part_first(int part) {
        int first = 0;
        for (int earlier = 0; earlier < part; ++earlier) first += part_width(earlier);
        return first;
    }
    static_assert(!is_parts || part_first(part_count()) == HeadDim, "widths of parts add up to the head size");

    static constexpr int count_codes() {
        int count = 0;
        for (int part = 0; part < parts; ++part) count += part_bits(part) ? part_width(part) : 0;
        return count;
    }
    /// Codes of a row, and the channels that they stand for: the first ones.
    static constexpr int codes = count_codes();
    static constexpr int channels = is_pairs ? HeadDim : codes;
    static constexpr int code_octets = codes / 8, tiles = channels / 16;

    static constexpr int part_of_octet(int octet) {
        int part = 0;
        while (part + 1 < parts && octet * 8 >= part_first(part + 1)) ++part;
        return part;
    }

    /// Bits of the planes that a part has: 5 = 4 + 1, 3 = 2 + 1.
    static constexpr bool has_plane(int part, int bits) {
        const int all = part_bits(part);
        if (bits == 8) return all == 8;
        return all != 8 && (all & bits) != 0;
    }
    /// First byte of a plane in a lane: wide planes come first, so that their fields do not straddle words.
    static constexpr int plane_offset(int part, int bits) {
        int offset = 0;
        for (int size = 8; size >= 1; size /= 2) {
            for (int other = 0; other < parts; ++other) {
                if (size == bits && other == part) return offset;
                if (has_plane(other, size)) offset += plane_bytes(size, part_width(other) / 8);
            }
        }
        return offset;
    }

    // Even levels. A plane of an octet takes `size` places of a lane's words, where it is `size` bits of each of the octet's four codes. Wide planes come
    // first, so none straddles a word.
    // Values: a byte of a word has eight places of one code. Byte i is code i: rows 2t, 2t + 1, 2t + 8, 2t + 9.
    // Keys: a place is one of a tile, two octets: a byte has four places in its low nibble, for row g, and the same four in its high one, for
    // row g + 8. Bytes 0 and 1 are channels 2t and 2t + 1 of the tile's first octet, 2 and 3 of its second one.
    static constexpr int even_unit = Stream == keys ? 2 : 1, places_of_word = Stream == keys ? 4 : 8;  // octets of a place
    static constexpr int even_place(int part, int size) {
        int place = 0;
        for (int wide = 4; wide >= 1; wide /= 2) {
            for (int other = 0; other < parts; ++other) {
                if (wide == size && other == part) return place;
                if (has_plane(other, wide)) place += wide * part_width(other) / (8 * even_unit);
            }
        }
        return place;
    }
    static constexpr int even_places = even_place(parts, 0), even_words = even_places / places_of_word;
    /// What is left behind whole words, in quarters of one: two fill 16 bits, one 8, in which the bytes lie between each other.
    static constexpr int even_rest = even_places % places_of_word / (places_of_word / 4);
    /// The first bit of code `i` of octet `octet` in a field that begins at a place.
    static __device__ constexpr int even_bit(int place, int octet, int i) {
        const int word = place / places_of_word, byte = Stream == keys ? 2 * (octet % 2) + i % 2 : i;
        const int at = Stream == keys ? place % 4 + 4 * (i / 2) : place % 8;
        if (word < even_words) return 32 * word + 8 * byte + at;
        // Of keys halves of a nibble, whose two rows stay four bits apart; of values nibbles, and halves of them.
        const int first = 32 * even_words, place_at = place % places_of_word, quarter = places_of_word / 4;
        if (even_rest >= 2 && place_at < 2 * quarter) return first + (Stream == keys ? 8 * (byte % 2) + 2 * (byte / 2) + at : 4 * byte + at);
        const int rest = place_at - (even_rest == 3 ? 2 * quarter : 0);
        return first + (even_rest == 3 ? 16 : 0) + (Stream == keys ? byte + 4 * (i / 2) : 2 * byte + rest);
    }
    /// Of an octet: its part, the place of its widest plane, which has the low bits, and of the one that has the rest of three or five bits.
    static constexpr int low_bits(int part) { return part_bits(part) >= 4 ? 4 : part_bits(part) >= 2 ? 2 : 1; }
    static constexpr int low_place(int octet) {
        const int part = part_of_octet(octet), size = low_bits(part);
        return even_place(part, size) + size * ((octet - part_first(part) / 8) / even_unit);
    }
    static constexpr int high_place(int octet) {
        const int part = part_of_octet(octet);
        return even_place(part, 1) + (octet - part_first(part) / 8) / even_unit;
    }

    // Ternary: word w of a lane has digit n of octet 5·w + n in its four bytes; a byte of the rest has the first four of its digits in one octet.
    static constexpr int ternary_bytes = (4 * code_octets + 4) / 5;
    static constexpr int ternary_words = ternary_bytes / 4;
    static_assert(!is_ternary || code_octets - 5 * ternary_words <= ternary_bytes % 4, "the rest of a lane holds the last octets");

    /// Bytes of codes of a lane in a row block.
    static constexpr int lane_bytes = is_ternary ? ternary_bytes : is_even ? 4 * even_words + even_rest : plane_offset(parts, 0);
    static constexpr int lane_words = (lane_bytes + 3) / 4;
    static constexpr int block_bytes = 32 * lane_bytes;
    static constexpr int page_code_bytes = blocks_per_page * block_bytes;
    /// Numbers of the rows g and g + 8 lie together; of the 8 pairs of a row block one after the other.
    static constexpr int pair_bytes = 2 * numbers * number_bytes;
    static constexpr int page_bytes = page_code_bytes + page_rows * numbers * number_bytes;

    /// Bytes of a row in FORMAT.md.
    static constexpr int row_code_bytes() {
        if (is_ternary) return (HeadDim + 4) / 5;
        int bits = 0;
        for (int part = 0; part < parts; ++part) bits += part_bits(part) * part_width(part);
        return bits / 8;
    }
    static constexpr int row_number_bytes = numbers * number_bytes;
};

/// A lane's bytes are cut into words of 16 bytes, then 8, 4, 2, 1; word i of all lanes lies together. The place of byte `index` of a lane.
template <class L>
__device__ __forceinline__ int lane_byte(int lane, int index) {
    int first = 0;
    constexpr int wide = L::lane_bytes / 16 * 16;
    if (index < wide) return index / 16 * 512 + lane * 16 + index % 16;
    first = wide;
    for (int size = 8; size >= 1; size /= 2) {
        if (!(L::lane_bytes & size)) continue;
        if (index < first + size) return 32 * first + lane * size + index - first;
        first += size;
    }
    return 0;
}

/// The lane that holds a code, and which of its four codes of the octet it is. `row` is 0 … 15 in its row block.
struct Place {
    int lane, octet, i;
};
template <class L>
__device__ __forceinline__ Place place_of(int row, int code) {
    const int octet = code / 8, inner = code % 8;
    if (L::stream == keys) return {4 * (row % 8) + inner / 2, octet, 2 * (row / 8) + inner % 2};
    return {4 * inner + row % 8 / 2, octet, 2 * (row / 8) + row % 2};
}
/// The other way round.
template <class L>
__device__ __forceinline__ void row_and_code(const Place& place, int& row, int& code) {
    const int g = place.lane / 4, t = place.lane % 4, side = place.i / 2, half = place.i % 2;
    row = L::stream == keys ? g + 8 * side : 2 * t + half + 8 * side;
    code = 8 * place.octet + (L::stream == keys ? 2 * t + half : g);
}

/// Byte of number `number` of row `row` (0 … 127) of a page.
template <class L>
__device__ __forceinline__ int number_byte(int row, int number) {
    const int block = row / block_rows, inner = row % block_rows;
    return L::page_code_bytes + block * 8 * L::pair_bytes + inner % 8 * L::pair_bytes + (2 * number + inner / 8) * L::number_bytes;
}

}  // namespace skvq

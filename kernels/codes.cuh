// Single codes of a page and of a row of FORMAT.md: the slow, obvious way in and out, for encoding, decoding and repacking.
//
// Is: one code at a time, any thread any code. Is not: the way of attention, which turns whole lanes into fragments (levels.cuh).
// Shapes: codes [16 rows, L::codes] u8 in shared memory; a page's row block as bytes.
#pragma once
#include "layout.cuh"

namespace skvq {

__device__ __forceinline__ int power_of_three(int n) {
    int power = 1;
    for (int i = 0; i < n; ++i) power *= 3;
    return power;
}
/// Digit n of a ternary byte.
__device__ __forceinline__ int ternary_digit(int byte, int n) { return ((byte * power_of_three(n) & 255) * 3) >> 8; }
__device__ __forceinline__ int ternary_byte(const int (&digits)[5]) {
    int value = 0;
    for (int n = 0; n < 5; ++n) value = 3 * value + digits[n];
    return (256 * value + 242) / 243;
}

/// A code of `bits` bits of row `row` as a page has it, and the other way round. Evenly spaced levels of values are counted from the other end in odd rows
/// (masked.cuh). Four and five bits of parts, whose levels are symmetric and are looked up, are the number of a level's
/// size, from the smallest on, below a bit that is set where it is positive.
template <class L>
__device__ __forceinline__ int page_code(int bits, int row, int code) {
    if (L::is_even) return L::stream == values && row % 2 ? code ^ ((1 << bits) - 1) : code;
    if (!L::is_parts || bits < 4) return code;
    const int top = 1 << (bits - 1);
    return code & top ? code : code ^ (top - 1);
}

/// A ternary byte as a page has it, and the other way round: every second one of a word is the complement, as products want it (ternary.cuh).
template <class L>
__device__ __forceinline__ int page_byte(int byte, int value) {
    return byte < 4 * L::ternary_words && byte % 2 ? value ^ 255 : value;
}

/// Where octet `octet`'s code `i` lies among a lane's ternary bytes.
template <class L>
__device__ __forceinline__ void ternary_place(int octet, int i, int& byte, int& digit) {
    const bool in_words = octet < 5 * L::ternary_words;
    byte = in_words ? octet / 5 * 4 + i : 4 * L::ternary_words + octet - 5 * L::ternary_words;
    digit = in_words ? octet % 5 : i;
}

/// Code `code` of row `row` (0 … 15) of a row block.
template <class L>
__device__ __forceinline__ int read_code(const u8* block, int row, int code) {
    const Place place = place_of<L>(row, code);
    if constexpr (L::is_ternary) {
        int byte, digit;
        ternary_place<L>(place.octet, place.i, byte, digit);
        return ternary_digit(page_byte<L>(byte, block[lane_byte<L>(place.lane, byte)]), digit);
    }
    int found = 0;
    for_each<L::parts>([&](auto part) {
        constexpr int p = decltype(part)::value;
        const int octet = place.octet - L::part_first(p) / 8;
        if (octet < 0 || octet >= L::part_width(p) / 8) return;
        int shift = 0;
        for (int size = 8; size >= 1; size /= 2) {  // from wide to narrow: the wide plane has the low bits
            if (!L::has_plane(p, size)) continue;
            int bit;
            if constexpr (L::is_even) bit = L::even_bit(L::even_place(p, size) + size * (octet / L::even_unit), octet, place.i);
            else bit = 8 * L::plane_offset(p, size) + (L::sorts_rows ? sorted_bit(octet, place.i) : plane_bit(size, L::part_width(p) / 8, octet, place.i));
            const int byte = block[lane_byte<L>(place.lane, bit / 8)];
            found |= (byte >> bit % 8 & ((1 << size) - 1)) << shift;
            shift += size;
        }
        found = page_code<L>(L::part_bits(p), row, found);
    });
    return found;
}

/// Byte `byte` of a lane of a row block: field(row, code, bits, drop, size, at) has bits drop … drop + size − 1 of a code of `bits` bits as pages have it,
/// which lie at bit `at` of the byte; of a ternary byte a whole code, which is digit `at`.
template <class L, class F>
__device__ __forceinline__ u8 lane_byte_of(int lane, int byte, const F& field) {
    u32 bits = 0;
    if constexpr (L::is_ternary) {
        int digits[5];
#pragma unroll
        for (int n = 0; n < 5; ++n) {
            const bool in_words = byte < 4 * L::ternary_words;
            const int octet = in_words ? byte / 4 * 5 + n : byte + L::ternary_words;  // 5·words + (byte − 4·words)
            const int i = in_words ? byte % 4 : n;
            int row, code;
            row_and_code<L>({lane, octet, i}, row, code);
            digits[n] = octet < L::code_octets && i < 4 ? field(row, code, 2, 0, 2, n) : 0;
        }
        bits = page_byte<L>(byte, ternary_byte(digits));
    } else if constexpr (L::is_even) {
        for_each<L::code_octets>([&](auto index) {
            constexpr int octet = decltype(index)::value, p = L::part_of_octet(octet), all = L::part_bits(p), low = L::low_bits(p);
            for_each<(all > low ? 2 : 1)>([&](auto plane) {
                constexpr bool high = decltype(plane)::value != 0;
                constexpr int size = high ? 1 : low, place = high ? L::high_place(octet) : L::low_place(octet);
                for_each<4>([&](auto which) {
                    constexpr int i = decltype(which)::value, bit = L::even_bit(place, octet, i);
                    if (byte != bit / 8) return;
                    int row, code;
                    row_and_code<L>({lane, octet, i}, row, code);
                    bits |= static_cast<u32>(field(row, code, all, high ? low : 0, size, bit % 8)) << bit % 8;
                });
            });
        });
    } else {
        for_each<L::parts>([&](auto part) {
            constexpr int p = decltype(part)::value, octets = L::part_width(p) / 8;
            int drop = 0;
            for_each<4>([&](auto index) {
                constexpr int size = 8 >> decltype(index)::value;
                if constexpr (L::has_plane(p, size)) {
                    const int first = 8 * (byte - L::plane_offset(p, size));
                    if (first >= 0 && first < 8 * plane_bytes(size, octets)) {
#pragma unroll
                        for (int at = 0; at < 8; at += size) {
                            int octet, i, row, code;
                            if constexpr (L::sorts_rows) sorted_place(first + at, octet, i);
                            else plane_place(size, octets, first + at, octet, i);
                            if (octet >= octets) continue;
                            row_and_code<L>({lane, octet + L::part_first(p) / 8, i}, row, code);
                            bits |= static_cast<u32>(field(row, code, L::part_bits(p), drop, size, at)) << at;
                        }
                    }
                    drop += size;
                }
            });
        });
    }
    return static_cast<u8>(bits);
}

/// Writes the bytes of one lane of a row block.
template <class L>
__device__ void write_lane(u8* block, int lane, const u8* codes) {
    for (int byte = 0; byte < L::lane_bytes; ++byte) {
        block[lane_byte<L>(lane, byte)] = lane_byte_of<L>(lane, byte, [&](int row, int code, int bits, int drop, int size, int) {
            return page_code<L>(bits, row, codes[row * L::codes + code]) >> drop & ((1 << size) - 1);
        });
    }
}

// ---- rows of FORMAT.md ----

/// `bits` wide fields, field k of byte b being code b + k·bytes: byte b of such a row of `count` codes, shifted down by `drop`.
__device__ __forceinline__ int field_byte(const u8* codes, int bits, int count, int b, int mask) {
    int byte = 0;
    for (int k = 0; k < 8 / bits; ++k) byte |= (codes[b + k * (count * bits / 8)] & mask) << bits * k;
    return byte;
}

/// Byte `b` of a row's code bytes.
template <class L>
__device__ int row_byte(const u8* codes, int b) {
    constexpr int count = L::codes;
    if constexpr (L::is_ternary) {
        constexpr int bytes = L::row_code_bytes();
        int digits[5];
        for (int n = 0; n < 5; ++n) digits[n] = n * bytes + b < count ? codes[n * bytes + b] : 0;
        return ternary_byte(digits);
    } else if constexpr (L::is_parts) {
        int byte = 0;
        for_each<L::parts>([&](auto part) {
            constexpr int p = decltype(part)::value, bits = L::part_bits(p), width = L::part_width(p), low = bits > 4 ? 4 : bits;
            int before = 0;
            for (int earlier = 0; earlier < p; ++earlier) before += L::part_bits(earlier) * L::part_width(earlier) / 8;
            const int inner = b - before;
            if (bits == 0 || inner < 0 || inner >= bits * width / 8) return;
            const bool high = inner >= low * width / 8;
            const int per_code = high ? 1 : low, drop = high ? 4 : 0, first = high ? 8 * (inner - low * width / 8) : 8 * inner;
            for (int k = 0; k < 8; ++k) {
                const int code = codes[L::part_first(p) + (first + k) / (per_code ? per_code : 1)];
                byte |= (code >> drop >> (first + k) % (per_code ? per_code : 1) & 1) << k;
            }
        });
        return byte;
    } else if constexpr (L::format == 8) {
        return codes[b];
    } else if constexpr (L::format == 4 || L::format == 2) {
        return field_byte(codes, L::format, count, b, (1 << L::format) - 1);
    } else {  // three bits a code: a plane of two, then one of one
        if (b < count / 4) return field_byte(codes, 2, count, b, 3);
        int byte = 0;
        for (int k = 0; k < 8; ++k) byte |= (codes[8 * (b - count / 4) + k] >> 2 & 1) << k;
        return byte;
    }
}

/// Code `code` of a row's code bytes.
template <class L>
__device__ int row_code(const u8* row, int code) {
    constexpr int count = L::codes;
    if constexpr (L::is_ternary) {
        constexpr int bytes = L::row_code_bytes();
        return ternary_digit(row[code % bytes], code / bytes);
    } else if constexpr (L::is_parts) {
        int found = 0;
        for_each<L::parts>([&](auto part) {
            constexpr int p = decltype(part)::value, bits = L::part_bits(p), width = L::part_width(p), low = bits > 4 ? 4 : bits;
            int before = 0;
            for (int earlier = 0; earlier < p; ++earlier) before += L::part_bits(earlier) * L::part_width(earlier) / 8;
            const int c = code - L::part_first(p);
            if (c < 0 || c >= width) return;
            for (int k = 0; k < bits; ++k) {
                const int bit = k < 4 ? low * c + k : c, first = k < 4 ? before : before + low * width / 8;
                found |= (row[first + bit / 8] >> bit % 8 & 1) << k;
            }
        });
        return found;
    } else if constexpr (L::format == 8) {
        return row[code];
    } else if constexpr (L::format == 4 || L::format == 2) {
        constexpr int bytes = count * L::format / 8;
        return row[code % bytes] >> L::format * (code / bytes) & ((1 << L::format) - 1);
    } else {
        constexpr int bytes = count / 4;
        const int low = row[code % bytes] >> 2 * (code / bytes) & 3;
        return low | (row[bytes + code / 8] >> code % 8 & 1) << 2;
    }
}

}  // namespace skvq

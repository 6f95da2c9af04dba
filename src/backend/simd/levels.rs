//! Packed codes and plain rows to f32, a tile of rows at a time.
//!
//! `decode_levels` gives the *levels* of the codes: no scale, no zero point, no transform; attention applies those once per group or
//! per query. `decode_parts` does so for rows of parts, `[rows, stored channels]`. `decode_plain` widens rows of the model's dtype. Output is
//! `[rows, head_dim]`, contiguous.

use super::{LANES, Lanes, multiversion};
use crate::codebook::Codebook;
use crate::format::{Format, MAX_HEAD_DIM, Metadata, RowLayout};
use crate::parts::Part;
use crate::tensor::Dtype;

/// Floats that `decode_levels` may write behind its last row.
pub(crate) const SLACK: usize = LANES;

/// Bytes of ternary codes that are expanded at a time: rows enough that a byte is read back long after it was written.
const TERNARY_BYTES: usize = 1024;
/// Bytes behind them that may be read.
const TERNARY_MARGIN: usize = 32;

multiversion! {
    /// The levels of `rows` rows whose codes lie back to back in `codes`.
    /// `out` has room for `rows` rows and [`SLACK`] floats more.
    pub(crate) fn decode_levels(layout: &RowLayout, codebook: &Codebook, codes: &[u8], rows: usize, out: &mut [f32]) = decode_levels_kernel;
    /// The levels `[rows, stored channels]` of `rows` rows of parts whose codes lie back to back in `codes`, `code_bytes` a row.
    pub(crate) fn decode_parts(parts: &[Part], code_bytes: usize, codes: &[u8], rows: usize, out: &mut [f32]) = decode_parts_kernel;
    /// Elements of `dtype` as f32.
    pub(crate) fn decode_plain(bytes: &[u8], dtype: Dtype, out: &mut [f32]) = decode_plain_kernel;
    /// Whether no element is a NaN or an infinity.
    pub(crate) fn all_finite(values: &[f32]) -> bool = all_finite_kernel;
    /// The numbers of `precision` in `bytes` as f32.
    pub(crate) fn decode_metadata(precision: Metadata, bytes: &[u8], out: &mut [f32]) = decode_metadata_kernel;
}

#[inline(always)]
unsafe fn decode_plain_kernel<S: Lanes>(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    assert!(bytes.len() == out.len() * dtype.size(), "bytes and elements differ");
    let (source, target) = (bytes.as_ptr(), out.as_mut_ptr());
    let mut i = 0;
    // SAFETY: element i + n ≤ out.len() of both slices; the caller has S's features.
    unsafe {
        while i + LANES <= out.len() {
            let lanes = match dtype {
                Dtype::F32 => S::load(source.add(4 * i).cast()),
                Dtype::F16 => S::load_f16(source.add(2 * i).cast()),
                Dtype::BF16 => S::load_bf16(source.add(2 * i).cast()),
            };
            S::store(lanes, target.add(i));
            i += LANES;
        }
        if i < out.len() {
            let n = out.len() - i;
            let lanes = match dtype {
                Dtype::F32 => S::load_partial(source.add(4 * i).cast(), n),
                Dtype::F16 => S::load_f16_partial(source.add(2 * i).cast(), n),
                Dtype::BF16 => S::load_bf16_partial(source.add(2 * i).cast(), n),
            };
            S::store_partial(lanes, target.add(i), n);
        }
    }
}

#[inline(always)]
unsafe fn all_finite_kernel<S: Lanes>(values: &[f32]) -> bool {
    // SAFETY: lanes i..i+n of the slice; the caller has S's features.
    unsafe {
        let mut magnitude = S::splat_u32(0);
        let mut i = 0;
        while i < values.len() {
            let n = (values.len() - i).min(LANES);
            magnitude = S::max_magnitude(magnitude, S::load_partial(values.as_ptr().add(i), n));
            i += n;
        }
        S::all_finite(magnitude)
    }
}

#[inline(always)]
unsafe fn decode_levels_kernel<S: Lanes>(
    layout: &RowLayout,
    codebook: &Codebook,
    codes: &[u8],
    rows: usize,
    out: &mut [f32],
) {
    let d = layout.head_dim;
    assert!(codes.len() >= rows * layout.code_bytes && out.len() >= rows * d + SLACK, "tile too small for {rows} rows");
    let (mut source, mut target) = (codes.as_ptr(), out.as_mut_ptr());
    // SAFETY: each row reads its `code_bytes` and writes its `d` floats and up to SLACK more, inside the slices by the assertion above.
    unsafe {
        let tables = Tables::<S>::new(codebook);
        if layout.format == Format::Ternary {
            return ternary_rows::<S>(&tables, source, rows, layout.code_bytes, d, target);
        }
        for _ in 0..rows {
            match layout.format {
                Format::Int2 => two_bits::<S>(&tables, source, d / 4, target),
                Format::Int3 => three_bits::<S>(&tables, source, d, target, true),
                Format::Pair => pairs::<S>(&tables, source, layout, target),
                Format::Int4 => four_bits::<S>(&tables, source, d, target),
                Format::Int8 => eight_bits::<S>(source, d, target),
                Format::Ternary | Format::Parts | Format::Raw(_) => unreachable!("done above, or without codes"),
            }
            source = source.add(layout.code_bytes);
            target = target.add(d);
        }
    }
}

/// The codebook as lookup tables: `low` holds the first four levels, `eight` and `sixteen` all of them where there are that many;
/// for pairs `eight` is x and `second` is y; of 32 levels the last sixteen are `upper`.
struct Tables<S: Lanes> {
    low: S::Table4,
    eight: S::Table8,
    second: S::Table8,
    sixteen: S::Table16,
    upper: S::Table16,
    /// Of two levels.
    first: f32,
    last: f32,
}

impl<S: Lanes> Tables<S> {
    #[inline(always)]
    unsafe fn new(codebook: &Codebook) -> Self {
        let mut levels = [0.0f32; 32];
        let mut second = [0.0f32; 8];
        match codebook {
            Codebook::Uniform { levels: count } => {
                for (i, level) in levels.iter_mut().enumerate().take((*count).min(16)) {
                    *level = i as f32 - (*count as f32 - 1.0) * 0.5;
                }
            }
            Codebook::Levels { levels: listed, .. } => levels[..listed.len()].copy_from_slice(listed),
            Codebook::Pairs { x, y, .. } => {
                levels[..8].copy_from_slice(x);
                second = *y;
            }
        }
        // SAFETY: the caller has S's features.
        unsafe {
            Self {
                low: S::table4(&levels[..4]),
                eight: S::table8(&levels[..8]),
                second: S::table8(&second),
                sixteen: S::table16(&levels[..16]),
                upper: S::table16(&levels[16..]),
                first: levels[0],
                last: levels[1],
            }
        }
    }
}

/// Four planes of `planes` channels; may write [`SLACK`] floats behind the last.
#[inline(always)]
unsafe fn two_bits<S: Lanes>(tables: &Tables<S>, source: *const u8, planes: usize, target: *mut f32) {
    let whole = planes / LANES * LANES;
    // SAFETY: reads `planes` bytes; writes channels below 4·planes + 16, which the caller has room for.
    unsafe {
        if whole < planes {
            let codes = S::load_u8_partial(source.add(whole), planes - whole);
            four_planes::<S>(tables, codes, planes, target.add(whole));
        }
        let mut b = 0;
        while b < whole {
            four_planes::<S>(tables, S::load_u8(source.add(b)), planes, target.add(b));
            b += LANES;
        }
    }
}

/// One vector of bytes is a vector of each of the four planes.
#[inline(always)]
unsafe fn four_planes<S: Lanes>(tables: &Tables<S>, codes: S::I, planes: usize, target: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        S::store(S::lookup4(tables.low, codes), target);
        S::store(S::lookup4(tables.low, S::shr::<2>(codes)), target.add(planes));
        S::store(S::lookup4(tables.low, S::shr::<4>(codes)), target.add(2 * planes));
        S::store(S::lookup4(tables.low, S::shr::<6>(codes)), target.add(3 * planes));
    }
}

/// Digits 0 to 3 of a byte become a byte of two-bit codes, digit 4 another; the rest is as for `two_bits`, with a fifth plane
/// that ends at channel `d`.
#[inline(always)]
unsafe fn ternary_rows<S: Lanes>(
    tables: &Tables<S>,
    source: *const u8,
    rows: usize,
    planes: usize,
    d: usize,
    target: *mut f32,
) {
    let mut low = [0u8; TERNARY_BYTES + TERNARY_MARGIN];
    let mut high = [0u8; TERNARY_BYTES + TERNARY_MARGIN];
    let batch = TERNARY_BYTES / planes;
    let whole = planes / LANES * LANES;
    // SAFETY: a batch of rows fits the buffers, with a margin behind it to read; writes as for `two_bits`.
    unsafe {
        let (low, high) = (low.as_mut_ptr(), high.as_mut_ptr());
        let mut first = 0;
        while first < rows {
            let count = (rows - first).min(batch);
            S::expand_ternary(source.add(first * planes), count * planes, low, high);
            if S::ternary_levels(tables.low, low, high, count, d, target.add(first * d)) {
                first += count;
                continue;
            }
            let mut row = 0;
            while row < count {
                let (low, high) = (low.add(row * planes), high.add(row * planes));
                let target = target.add((first + row) * d);
                if whole < planes {
                    four_planes::<S>(tables, S::load_u8(low.add(whole)), planes, target.add(whole));
                    if 4 * planes + whole < d {
                        let codes = S::load_u8(high.add(whole));
                        S::store(S::lookup4(tables.low, codes), target.add(4 * planes + whole));
                    }
                }
                let mut b = 0;
                while b < whole {
                    four_planes::<S>(tables, S::load_u8(low.add(b)), planes, target.add(b));
                    S::store(S::lookup4(tables.low, S::load_u8(high.add(b))), target.add(4 * planes + b));
                    b += LANES;
                }
                row += 1;
            }
            first += count;
        }
    }
}

/// `n` ≤ 16 bytes; a load of a part is branches where there are no masks, so most of a row is loaded whole.
#[inline(always)]
unsafe fn load_codes<S: Lanes>(source: *const u8, n: usize) -> S::I {
    // SAFETY: the caller's.
    unsafe { if n == LANES { S::load_u8(source) } else { S::load_u8_partial(source, n) } }
}

/// The first `n` ≤ 16 lanes, likewise.
#[inline(always)]
unsafe fn store_levels<S: Lanes>(lanes: S::F, target: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe { if n == LANES { S::store(lanes, target) } else { S::store_partial(lanes, target, n) } }
}

/// Bits `bit .. bit + n` of a little-endian bit string, n ≤ 16. No byte after the last one needed is read.
#[inline(always)]
unsafe fn bits(source: *const u8, bit: usize, n: usize) -> u16 {
    let (byte, shift) = (bit / 8, bit % 8);
    if n == LANES && shift == 0 {
        // SAFETY: the bytes that hold the bits asked for.
        return unsafe { source.add(byte).cast::<u16>().read_unaligned().to_le() };
    }
    let mut word = 0u32;
    for i in 0..(shift + n).div_ceil(8) {
        // SAFETY: the bytes that hold the bits asked for.
        word |= u32::from(unsafe { *source.add(byte + i) }) << (8 * i);
    }
    (word >> shift) as u16
}

/// `count` codes of three bits through table `eight` (or `second`).
#[inline(always)]
unsafe fn three_bits<S: Lanes>(tables: &Tables<S>, source: *const u8, count: usize, target: *mut f32, first: bool) {
    let planes = count / 4;
    let table = if first { tables.eight } else { tables.second };
    // SAFETY: reads count/4 + count/8 bytes and writes `count` floats; the caller vouches for both.
    unsafe {
        let high = source.add(planes);
        let mut b = 0;
        while b < planes {
            let n = (planes - b).min(LANES);
            let low = load_codes::<S>(source.add(b), n);
            let codes = [low, S::shr::<2>(low), S::shr::<4>(low), S::shr::<6>(low)];
            let mut plane = 0;
            while plane < 4 {
                let channel = plane * planes + b;
                let code = S::or_bits(S::and(codes[plane], 3), bits(high, channel, n), 4);
                store_levels::<S>(S::lookup8(table, code), target.add(channel), n);
                plane += 1;
            }
            b += LANES;
        }
    }
}

/// Pairs: x of every pair, then y, put into the halves of each group.
#[inline(always)]
unsafe fn pairs<S: Lanes>(tables: &Tables<S>, source: *const u8, layout: &RowLayout, target: *mut f32) {
    let count = layout.head_dim / 2;
    // SAFETY: as for `three_bits`, with `count` floats for each coordinate.
    unsafe {
        if layout.groups() == 1 {
            three_bits::<S>(tables, source, count, target, true);
            three_bits::<S>(tables, source, count, target.add(count), false);
            return;
        }
        let half = layout.group_size / 2;
        let mut coordinate = [0.0f32; MAX_HEAD_DIM / 2];
        for (second, first) in [(0, true), (half, false)] {
            three_bits::<S>(tables, source, count, coordinate.as_mut_ptr(), first);
            for g in 0..layout.groups() {
                let from = coordinate.as_ptr().add(g * half);
                from.copy_to_nonoverlapping(target.add(g * layout.group_size + second), half);
            }
        }
    }
}

#[inline(always)]
unsafe fn four_bits<S: Lanes>(tables: &Tables<S>, source: *const u8, d: usize, target: *mut f32) {
    let half = d / 2;
    let mut b = 0;
    // SAFETY: reads d/2 bytes and writes d floats; the caller vouches for both.
    unsafe {
        while b < half {
            let n = (half - b).min(LANES);
            let codes = load_codes::<S>(source.add(b), n);
            store_levels::<S>(S::lookup16(tables.sixteen, codes), target.add(b), n);
            store_levels::<S>(S::lookup16(tables.sixteen, S::shr::<4>(codes)), target.add(half + b), n);
            b += LANES;
        }
    }
}

#[inline(always)]
unsafe fn decode_parts_kernel<S: Lanes>(parts: &[Part], code_bytes: usize, codes: &[u8], rows: usize, out: &mut [f32]) {
    let stored = parts.last().map_or(0, |part| part.channels().end);
    assert!(codes.len() >= rows * code_bytes && out.len() >= rows * stored, "tile too small for {rows} rows");
    for part in parts {
        assert!(part.bytes().end <= code_bytes, "a part outside its row");
        // SAFETY: row i of the part reads its bytes, below (i + 1)·code_bytes, and writes its channels, below (i + 1)·stored; the
        // caller has S's features.
        unsafe {
            let tables = Tables::<S>::new(&part.codebook);
            let (source, target) = (codes.as_ptr().add(part.offset), out.as_mut_ptr().add(part.first));
            match part.bits {
                1 => part_rows::<S, 1>(&tables, part, source, code_bytes, rows, target, stored),
                2 => part_rows::<S, 2>(&tables, part, source, code_bytes, rows, target, stored),
                3 => part_rows::<S, 3>(&tables, part, source, code_bytes, rows, target, stored),
                4 => part_rows::<S, 4>(&tables, part, source, code_bytes, rows, target, stored),
                _ => part_rows::<S, 5>(&tables, part, source, code_bytes, rows, target, stored),
            }
        }
    }
}

/// One part of all rows, sixteen channels at a time.
#[inline(always)]
unsafe fn part_rows<S: Lanes, const BITS: usize>(
    tables: &Tables<S>,
    part: &Part,
    source: *const u8,
    code_bytes: usize,
    rows: usize,
    target: *mut f32,
    stored: usize,
) {
    // SAFETY: see `decode_parts_kernel`; sixteen channels take 2·BITS bytes.
    unsafe {
        let (low, high) = (S::splat(tables.first), S::splat(tables.last));
        let mut row = 0;
        while row < rows {
            let (source, target) = (source.add(row * code_bytes), target.add(row * stored));
            let mut c = 0;
            while c < part.width {
                let at = source.add(c / 8 * if BITS == 5 { 4 } else { BITS });
                let levels = match BITS {
                    1 => S::select_bits(at.cast::<u16>().read_unaligned().to_le(), low, high),
                    2 => S::lookup4(tables.low, S::load_bits::<2>(at)),
                    3 => S::lookup8(tables.eight, S::load_bits::<3>(at)),
                    4 => S::lookup16(tables.sixteen, S::load_bits::<4>(at)),
                    _ => {
                        let codes = S::load_bits::<4>(at);
                        let bits = source.add(part.width / 2 + c / 8).cast::<u16>().read_unaligned().to_le();
                        S::select_bits(bits, S::lookup16(tables.sixteen, codes), S::lookup16(tables.upper, codes))
                    }
                };
                S::store(levels, target.add(c));
                c += LANES;
            }
            row += 1;
        }
    }
}

/// Eight-bit codebooks are uniform: the level is the code less 127.5.
#[inline(always)]
unsafe fn eight_bits<S: Lanes>(source: *const u8, d: usize, target: *mut f32) {
    let mut b = 0;
    // SAFETY: d is a multiple of 16; reads d bytes and writes d floats.
    unsafe {
        while b < d {
            let level = S::sub(S::to_f32(S::load_u8(source.add(b))), S::splat(127.5));
            S::store(level, target.add(b));
            b += LANES;
        }
    }
}

#[inline(always)]
unsafe fn decode_metadata_kernel<S: Lanes>(precision: Metadata, bytes: &[u8], out: &mut [f32]) {
    assert!(bytes.len() == out.len() * precision.size(), "bytes and numbers differ");
    let (source, target) = (bytes.as_ptr(), out.as_mut_ptr());
    let mut i = 0;
    // SAFETY: number i + n ≤ out.len() of both slices; the caller has S's features.
    unsafe {
        while i < out.len() {
            let n = (out.len() - i).min(LANES);
            let numbers = match precision {
                Metadata::Fp16 => S::load_f16_partial(source.add(2 * i).cast(), n),
                Metadata::E4m3 => e4m3::<S>(S::load_u8_partial(source.add(i), n)),
            };
            S::store_partial(numbers, target.add(i), n);
            i += n;
        }
    }
}

/// Exponent and mantissa, put where f32 has them, are the number over 2^120, subnormals too; 480 would be the NaN.
#[inline(always)]
unsafe fn e4m3<S: Lanes>(bytes: S::I) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let scale = S::splat(f32::from_bits((127 + 120) << 23));
        let magnitude = S::mul(S::from_bits(S::shl::<20>(S::and(bytes, 0x7f))), scale);
        let magnitude = S::select(S::gt(magnitude, S::splat(448.0)), magnitude, S::splat(f32::NAN));
        S::from_bits(S::or(S::to_bits(magnitude), S::shl::<24>(S::and(bytes, 0x80))))
    }
}

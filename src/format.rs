//! How the codes and the metadata of one row are laid out in bytes.
//!
//! A row is one head vector of one token: `head_dim` channels after the codec's transform. This file knows bytes and nothing of
//! arithmetic: which code a number gets is decided in `codec.rs`. The specification:
#![allow(clippy::doc_markdown, reason = "the specification writes formulas as text")]
#![doc = include_str!("FORMAT.md")]

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Rows of a page; a block of statistics is a multiple of it, so a page never spans two blocks.
pub const PAGE_ROWS: usize = 128;

/// The largest head the kernels keep on their stack.
pub const MAX_HEAD_DIM: usize = 512;

/// How codes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Int8,
    Int4,
    Int3,
    Int2,
    /// Three levels, five digits a byte.
    Ternary,
    /// Eight codewords for a pair of channels, 1.5 bits an element.
    Pair,
    /// Parts of 0 to 5 bits (FORMAT.md §6), see `parts.rs`.
    Parts,
    /// The model's own dtype: nothing is quantized.
    Raw(Dtype),
}

impl Format {
    pub const NAMES: &'static str = "\"8\", \"4\", \"3\", \"2\", \"1.6\", \"1.5\" or \"raw\"";

    /// `raw` takes the dtype of the layer that uses it.
    pub fn from_name(name: &str, dtype: Dtype) -> Result<Self> {
        Ok(match name {
            "8" => Self::Int8,
            "4" => Self::Int4,
            "3" => Self::Int3,
            "2" => Self::Int2,
            "1.6" => Self::Ternary,
            "1.5" => Self::Pair,
            "raw" => Self::Raw(dtype),
            _ => return Err(Error::value("format", Self::NAMES, name)),
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "8",
            Self::Int4 => "4",
            Self::Int3 => "3",
            Self::Int2 => "2",
            Self::Ternary => "1.6",
            Self::Pair => "1.5",
            Self::Parts => "parts",
            Self::Raw(_) => "raw",
        }
    }

    /// Levels of a scalar codebook, codewords of a pair codebook, 0 for raw rows and rows of parts.
    pub fn levels(self) -> usize {
        match self {
            Self::Int8 => 256,
            Self::Int4 => 16,
            Self::Int3 | Self::Pair => 8,
            Self::Int2 => 4,
            Self::Ternary => 3,
            Self::Raw(_) | Self::Parts => 0,
        }
    }

    /// Bytes of the codes of a row of `head_dim` channels (a multiple of 16); 0 for parts, which know their own.
    pub fn code_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Int8 => head_dim,
            Self::Int4 => head_dim / 2,
            Self::Int3 => head_dim / 4 + head_dim / 8,
            Self::Int2 => head_dim / 4,
            Self::Ternary => head_dim.div_ceil(5),
            Self::Pair => head_dim / 8 + head_dim / 16,
            Self::Parts => 0,
            Self::Raw(dtype) => head_dim * dtype.size(),
        }
    }
}

/// Precision of scales and zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// FP8 E4M3FN, one byte, saturating at ±448.
    E4m3,
    /// IEEE half, two bytes, saturating at ±65504.
    Fp16,
}

impl Metadata {
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "e4m3" => Ok(Self::E4m3),
            "fp16" => Ok(Self::Fp16),
            _ => Err(Error::value("metadata", "\"e4m3\" or \"fp16\"", name)),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Fp16 => "fp16",
        }
    }

    pub fn size(self) -> usize {
        match self {
            Self::E4m3 => 1,
            Self::Fp16 => 2,
        }
    }

    /// Writes `value`, rounded, to `bytes[..size]` and returns what a reader will see.
    pub fn store(self, value: f32, bytes: &mut [u8]) -> f32 {
        match self {
            Self::E4m3 => bytes[0] = e4m3_from_f32(value),
            Self::Fp16 => bytes[..2].copy_from_slice(&fp16_saturating(value).to_le_bytes()),
        }
        self.load(bytes)
    }

    /// The value `store` would keep.
    pub fn round(self, value: f32) -> f32 {
        self.store(value, &mut [0; 2])
    }

    pub fn load(self, bytes: &[u8]) -> f32 {
        match self {
            Self::E4m3 => E4M3_VALUES[usize::from(bytes[0])],
            Self::Fp16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        }
    }
}

/// Half precision, saturating: a NaN stays one.
pub fn fp16_saturating(value: f32) -> half::f16 {
    half::f16::from_f32(if value.is_nan() { value } else { value.clamp(-65504.0, 65504.0) })
}

/// FP8 E4M3FN: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity; 0x7f is NaN. Rounds to nearest even, saturates at ±448.
pub fn e4m3_from_f32(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(448.0);
    if magnitude < 0.015_625 {
        // Below 2^-6 the steps are 2^-9; adding 2^23 steps rounds to nearest even in f32 itself.
        let steps = (magnitude * 512.0 + 8_388_608.0) - 8_388_608.0;
        return sign | steps as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The value of every E4M3FN byte.
pub static E4M3_VALUES: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0usize;
    while byte < 256 {
        let exponent = (byte >> 3) & 15;
        let mantissa = (byte & 7) as f32;
        let magnitude = if byte & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa / 512.0
        } else {
            // 2^(exponent - 7) by its bits
            f32::from_bits(((exponent + 120) as u32) << 23) * (1.0 + mantissa / 8.0)
        };
        table[byte] = if byte & 0x80 == 0 { magnitude } else { -magnitude };
        byte += 1;
    }
    table
};

/// Sizes of a row and of its parts. Every kernel works from this one description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    pub format: Format,
    pub head_dim: usize,
    pub group_size: usize,
    pub metadata: Metadata,
    pub symmetric: bool,
    pub code_bytes: usize,
    pub metadata_bytes: usize,
}

impl RowLayout {
    pub fn new(
        format: Format,
        head_dim: usize,
        group_size: usize,
        metadata: Metadata,
        symmetric: bool,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(16) || head_dim > MAX_HEAD_DIM {
            return Err(Error::value("head_dim", format!("a multiple of 16 in 16..={MAX_HEAD_DIM}"), head_dim));
        }
        if group_size == 0 || !group_size.is_multiple_of(16) || !head_dim.is_multiple_of(group_size) {
            return Err(Error::value(
                "group_size",
                format!("a multiple of 16 that divides head_dim = {head_dim}"),
                group_size,
            ));
        }
        let groups = head_dim / group_size;
        let metadata_bytes = match format {
            Format::Raw(_) => 0,
            _ => groups * metadata.size() * if symmetric { 1 } else { 2 },
        };
        let code_bytes = format.code_bytes(head_dim);
        Ok(Self { format, head_dim, group_size, metadata, symmetric, code_bytes, metadata_bytes })
    }

    pub fn groups(&self) -> usize {
        self.head_dim / self.group_size
    }

    pub fn row_bytes(&self) -> usize {
        self.code_bytes + self.metadata_bytes
    }

    /// Number of codes in a row: one for each channel, or for each pair.
    pub fn codes(&self) -> usize {
        if self.format == Format::Pair { self.head_dim / 2 } else { self.head_dim }
    }
}

/// Packs the codes of a row (`layout.codes()` of them) into `bytes[..code_bytes]`.
pub fn pack(layout: &RowLayout, codes: &[u8], bytes: &mut [u8]) {
    match layout.format {
        Format::Int8 => bytes[..codes.len()].copy_from_slice(codes),
        Format::Int4 => {
            let (low, high) = codes.split_at(codes.len() / 2);
            for ((byte, l), h) in bytes.iter_mut().zip(low).zip(high) {
                *byte = l | h << 4;
            }
        }
        Format::Int2 => pack_two_bits(codes, bytes),
        Format::Int3 | Format::Pair => {
            let (low, high) = bytes.split_at_mut(codes.len() / 4);
            pack_two_bits(codes, low);
            for (byte, eight) in high.iter_mut().zip(codes.chunks_exact(8)) {
                *byte = eight.iter().enumerate().fold(0, |sum, (bit, code)| sum | (code >> 2 & 1) << bit);
            }
        }
        Format::Ternary => pack_ternary(codes, bytes),
        Format::Parts | Format::Raw(_) => {}
    }
}

fn pack_two_bits(codes: &[u8], bytes: &mut [u8]) {
    let quarter = codes.len() / 4;
    let (a, rest) = codes.split_at(quarter);
    let (b, rest) = rest.split_at(quarter);
    let (c, d) = rest.split_at(quarter);
    for (i, byte) in bytes[..quarter].iter_mut().enumerate() {
        *byte = (a[i] & 3) | (b[i] & 3) << 2 | (c[i] & 3) << 4 | (d[i] & 3) << 6;
    }
}

fn pack_ternary(codes: &[u8], bytes: &mut [u8]) {
    let planes = codes.len().div_ceil(5);
    let mut sums = [0u16; MAX_HEAD_DIM.div_ceil(5)];
    for digit in 0..5 {
        for (b, sum) in sums[..planes].iter_mut().enumerate() {
            *sum = *sum * 3 + u16::from(codes.get(digit * planes + b).copied().unwrap_or(0));
        }
    }
    for (byte, sum) in bytes.iter_mut().zip(&sums[..planes]) {
        *byte = (sum * 256).div_ceil(243) as u8;
    }
}

/// The inverse of [`pack`].
pub fn unpack(layout: &RowLayout, bytes: &[u8], codes: &mut [u8]) {
    match layout.format {
        Format::Int8 => codes.copy_from_slice(&bytes[..codes.len()]),
        Format::Int4 => {
            let half = codes.len() / 2;
            for b in 0..half {
                codes[b] = bytes[b] & 15;
                codes[b + half] = bytes[b] >> 4;
            }
        }
        Format::Int2 => unpack_two_bits(bytes, codes),
        Format::Int3 | Format::Pair => {
            let quarter = codes.len() / 4;
            unpack_two_bits(&bytes[..quarter], codes);
            for (c, code) in codes.iter_mut().enumerate() {
                *code |= (bytes[quarter + c / 8] >> (c % 8) & 1) << 2;
            }
        }
        Format::Ternary => {
            let planes = codes.len().div_ceil(5);
            for (c, code) in codes.iter_mut().enumerate() {
                let power = [1u16, 3, 9, 27, 81][c / planes];
                *code = ((((u16::from(bytes[c % planes]) * power) & 255) * 3) >> 8) as u8;
            }
        }
        Format::Parts | Format::Raw(_) => {}
    }
}

fn unpack_two_bits(bytes: &[u8], codes: &mut [u8]) {
    let quarter = codes.len() / 4;
    for (c, code) in codes.iter_mut().enumerate() {
        *code = bytes[c % quarter] >> (2 * (c / quarter)) & 3;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Format; 6] = [Format::Int8, Format::Int4, Format::Int3, Format::Int2, Format::Ternary, Format::Pair];

    #[test]
    fn every_format_unpacks_what_it_packed() {
        for format in ALL {
            for head_dim in [16, 64, 80, 96, 112, 128, 192, 256, 512] {
                let layout = RowLayout::new(format, head_dim, head_dim, Metadata::E4m3, true).unwrap();
                let codes: Vec<u8> =
                    (0..layout.codes()).map(|i| ((i * 7919 + i * i * 31) % format.levels()) as u8).collect();
                let mut bytes = vec![0xa5; layout.code_bytes];
                pack(&layout, &codes, &mut bytes);
                let mut back = vec![0; codes.len()];
                unpack(&layout, &bytes, &mut back);
                assert_eq!(codes, back, "{format:?} {head_dim}");
            }
        }
    }

    #[test]
    fn ternary_bytes_hold_all_243_values() {
        let layout = RowLayout::new(Format::Ternary, 80, 80, Metadata::E4m3, true).unwrap();
        for value in 0..243u32 {
            let digits = [value / 81, value / 27 % 3, value / 9 % 3, value / 3 % 3, value % 3];
            let codes: Vec<u8> = (0..80).map(|c| digits[c / 16] as u8).collect();
            let mut bytes = vec![0; 16];
            pack(&layout, &codes, &mut bytes);
            assert_eq!(u32::from(bytes[3]), (value * 256).div_ceil(243));
            let mut back = vec![0; 80];
            unpack(&layout, &bytes, &mut back);
            assert_eq!(codes, back);
        }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_even_byte_and_saturates() {
        for byte in 0..=255u8 {
            let value = E4M3_VALUES[usize::from(byte)];
            if !value.is_nan() {
                assert_eq!(e4m3_from_f32(value), byte);
            }
        }
        for byte in 0..0x7eu8 {
            let (low, high) = (E4M3_VALUES[usize::from(byte)], E4M3_VALUES[usize::from(byte) + 1]);
            let middle = f32::midpoint(low, high);
            assert_eq!(e4m3_from_f32(middle), if byte % 2 == 0 { byte } else { byte + 1 }, "{middle}");
            assert_eq!(e4m3_from_f32(f32::from_bits(middle.to_bits() - 1)), byte);
            assert_eq!(e4m3_from_f32(f32::from_bits(middle.to_bits() + 1)), byte + 1);
        }
        assert_eq!(e4m3_from_f32(1e9), 0x7e);
        assert_eq!(e4m3_from_f32(f32::NEG_INFINITY), 0xfe);
        assert!(Metadata::E4m3.round(f32::NAN).is_nan());
    }

    #[test]
    fn sizes_follow_the_specification() {
        let bytes = |format: Format, d, g, m, s| RowLayout::new(format, d, g, m, s).unwrap().row_bytes();
        assert_eq!(bytes(Format::Int2, 128, 128, Metadata::E4m3, true), 33);
        assert_eq!(bytes(Format::Ternary, 128, 128, Metadata::E4m3, true), 27);
        assert_eq!(bytes(Format::Pair, 128, 128, Metadata::Fp16, false), 28);
        assert_eq!(bytes(Format::Int3, 96, 32, Metadata::Fp16, false), 36 + 12);
        assert_eq!(bytes(Format::Raw(Dtype::BF16), 80, 80, Metadata::E4m3, true), 160);
    }

    #[test]
    fn a_group_that_does_not_divide_the_head_is_refused() {
        for (head_dim, group) in [(80, 64), (100, 50), (0, 32), (528, 528), (128, 0), (96, 24)] {
            assert!(RowLayout::new(Format::Int2, head_dim, group, Metadata::E4m3, true).is_err(), "{head_dim} {group}");
        }
    }
}

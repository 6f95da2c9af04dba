//! Rows of parts (FORMAT.md §6): neighbouring channels with their own number of bits, and the bytes of their codes.
//!
//! What it is: which channels and bytes a part has, its levels, packing and unpacking. What it is not: arithmetic (`codec.rs`).

use crate::codebook::{Codebook, evenly_spaced, lloyd_max};
use crate::error::{Error, Result};
use crate::format::{Format, Metadata, RowLayout};

/// The most bits of a code.
pub const MAX_BITS: usize = 5;

/// Which levels the codes of parts stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartLevels {
    LloydMax,
    Even,
}

impl PartLevels {
    /// "lloyd-max" or "uniform".
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "lloyd-max" => Ok(Self::LloydMax),
            "uniform" => Ok(Self::Even),
            _ => Err(Error::value("codebook", "\"lloyd-max\" or \"uniform\" with parts", name)),
        }
    }

    fn codebook(self, bits: usize) -> Codebook {
        Codebook::ascending(match self {
            Self::LloydMax => lloyd_max(1 << bits).to_vec(),
            Self::Even => evenly_spaced(1 << bits),
        })
    }
}

/// Channels `first .. first + width` of a transformed row.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Of a code, 1 to 5.
    pub bits: usize,
    pub width: usize,
    pub first: usize,
    /// Code bytes of the row before its own.
    pub offset: usize,
    pub levels: PartLevels,
    pub codebook: Codebook,
}

impl Part {
    /// Its channels in a row.
    pub fn channels(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.width
    }

    /// Its code bytes in a row's.
    pub fn bytes(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.bits * self.width / 8
    }

    /// Packs its codes into its bytes.
    pub fn pack(&self, codes: &[u8], bytes: &mut [u8]) {
        let low = self.bits.min(4);
        let (string, high) = bytes.split_at_mut(low * self.width / 8);
        pack_string(codes, low, 0, string);
        if self.bits > low {
            pack_string(codes, 1, low, high);
        }
    }

    /// The inverse of `pack`.
    pub fn unpack(&self, bytes: &[u8], codes: &mut [u8]) {
        let low = self.bits.min(4);
        let (string, high) = bytes.split_at(low * self.width / 8);
        codes.fill(0);
        unpack_string(string, low, 0, codes);
        if self.bits > low {
            unpack_string(high, 1, low, codes);
        }
    }
}

/// The stored parts of a row of `head_dim` channels and its layout, from (bits, width) of every part.
pub fn parts_of_row(
    head_dim: usize,
    metadata: Metadata,
    list: &[(usize, usize)],
    levels: PartLevels,
) -> Result<(RowLayout, Vec<Part>)> {
    let whole = RowLayout::new(Format::Parts, head_dim, head_dim, metadata, true)?;
    let mut parts = Vec::with_capacity(list.len());
    let (mut first, mut offset) = (0, 0);
    for (i, &(bits, width)) in list.iter().enumerate() {
        if bits > MAX_BITS || (bits == 0 && i + 1 < list.len()) {
            let expected = format!("bits from 1 to {MAX_BITS}, and 0 for the last part only");
            return Err(Error::value("parts", expected, format!("{bits} bits for part {i}")));
        }
        if width == 0 || !width.is_multiple_of(16) {
            return Err(Error::value("parts", "widths that are multiples of 16", width));
        }
        if bits > 0 {
            parts.push(Part { bits, width, first, offset, levels, codebook: levels.codebook(bits) });
        }
        first += width;
        offset += bits * width / 8;
    }
    if first != head_dim || parts.is_empty() {
        let expected = format!("widths that add up to head_dim = {head_dim}, not all of 0 bits");
        return Err(Error::value("parts", expected, format!("{first} channels in {offset} bytes")));
    }
    Ok((RowLayout { code_bytes: offset, ..whole }, parts))
}

/// Bits `from .. from + bits` of every code, eight codes to `bits` bytes.
fn pack_string(codes: &[u8], bits: usize, from: usize, bytes: &mut [u8]) {
    for (bytes, eight) in bytes.chunks_exact_mut(bits).zip(codes.chunks_exact(8)) {
        let mask = (1u32 << bits) - 1;
        let word = eight.iter().rev().fold(0u32, |word, code| word << bits | (u32::from(*code) >> from & mask));
        bytes.copy_from_slice(&word.to_le_bytes()[..bits]);
    }
}

fn unpack_string(bytes: &[u8], bits: usize, from: usize, codes: &mut [u8]) {
    for (bytes, eight) in bytes.chunks_exact(bits).zip(codes.chunks_exact_mut(8)) {
        let mut word = [0; 4];
        word[..bits].copy_from_slice(bytes);
        let word = u32::from_le_bytes(word);
        for (c, code) in eight.iter_mut().enumerate() {
            *code |= ((word >> (bits * c) & ((1 << bits) - 1)) << from) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_unpack_what_they_packed() {
        let list = [(5, 32), (4, 16), (3, 48), (2, 16), (1, 32), (0, 48)];
        let (layout, parts) = parts_of_row(192, Metadata::E4m3, &list, PartLevels::LloydMax).unwrap();
        assert_eq!(layout.code_bytes, 20 + 8 + 18 + 4 + 4);
        assert_eq!(layout.row_bytes(), 55);
        for part in &parts {
            let codes: Vec<u8> = (0..part.width).map(|c| ((c * 7 + c / 5) % (1 << part.bits)) as u8).collect();
            let (mut bytes, mut found) = (vec![0xff; part.bytes().len()], vec![9; part.width]);
            part.pack(&codes, &mut bytes);
            part.unpack(&bytes, &mut found);
            assert_eq!(found, codes, "{part:?}");
        }
        let mut bytes = vec![0; 6];
        Part { width: 16, ..parts[2].clone() }.pack(&[1, 2, 3, 4, 5, 6, 7, 0, 7, 0, 0, 0, 0, 0, 0, 1], &mut bytes);
        assert_eq!(bytes, [0b1101_0001, 0b0101_1000, 0b0001_1111, 7, 0, 0b0010_0000]);
    }

    #[test]
    fn even_levels_are_a_step_apart() {
        let (_, parts) =
            parts_of_row(80, Metadata::E4m3, &[(5, 16), (4, 16), (3, 16), (2, 16), (1, 16)], PartLevels::Even).unwrap();
        for part in &parts {
            let Codebook::Levels { levels, .. } = &part.codebook else { unreachable!("listed levels") };
            let step = levels[1] - levels[0];
            assert_eq!(levels.len(), 1 << part.bits);
            assert!(levels.windows(2).all(|pair| (pair[1] - pair[0] - step).abs() < 1e-6), "{levels:?}");
            assert!((levels[0] + levels[levels.len() - 1]).abs() < 1e-6);
        }
    }

    #[test]
    fn parts_that_make_no_row_are_refused() {
        for list in [&[(2, 48)][..], &[(0, 64)], &[(0, 32), (2, 32)], &[(6, 64)], &[(2, 8), (2, 56)], &[]] {
            assert!(parts_of_row(64, Metadata::E4m3, list, PartLevels::Even).is_err(), "{list:?}");
        }
    }
}

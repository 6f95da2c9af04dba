//! A codec as kernels see it: the template arguments of its layout, the bytes of a device's page (`kernels/PAGES.md`), its levels.

use half::f16;

use super::kernels::ATTEND_THREADS;
use super::params::LevelTable;
use crate::codebook::Codebook;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::{Format, Metadata, PAGE_ROWS};
use crate::tensor::Dtype;

pub const BLOCK_ROWS: usize = 16;
const LANES: usize = 32;
/// A page begins at a multiple of this.
pub const PAGE_ALIGNMENT: usize = 16;
const MAX_HEAD_DIM: usize = 256;
const MAX_PARTS: usize = 8;
/// First word of a codebook of 2^bits levels in a [`LevelTable`]; three levels have the place of four.
const TABLE_WORDS: [usize; 6] = [0, 0, 1, 2, 4, 8];
/// First words of the coordinates of codewords.
const PAIR_WORDS: [usize; 2] = [2, 4];

/// The two streams of a layer; as a number the template argument of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Keys,
    Values,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Keys, Self::Values];

    pub fn name(self) -> &'static str {
        match self {
            Self::Keys => "keys",
            Self::Values => "values",
        }
    }
}

/// The element type of kernels.
pub fn element(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float",
        Dtype::F16 => "skvq::Half",
        Dtype::BF16 => "skvq::BFloat",
    }
}

/// Refuses codecs that kernels do not have.
pub fn expect_supported(side: Side, codec: &Codec) -> Result<()> {
    let refuse = |what: String, reason: &str| {
        Err(Error::Unsupported { name: format!("{} with {what} on a GPU", side.name()), reason: reason.into() })
    };
    let head_dim = codec.layout.head_dim;
    if head_dim > MAX_HEAD_DIM {
        return refuse(format!("head_dim {head_dim}"), "kernels have heads of at most 256 channels");
    }
    if codec.parts.len() > MAX_PARTS {
        return refuse(format!("{} parts", codec.parts.len()), "kernels have rows of at most 8 parts");
    }
    Ok(())
}

/// `skvq::Layout<…>` of a stream. Warming up writes the same text.
pub fn layout_expression(side: Side, codec: &Codec) -> String {
    let layout = &codec.layout;
    let format = match layout.format {
        Format::Int8 => 8,
        Format::Int4 => 4,
        Format::Int3 => 3,
        Format::Int2 => 2,
        Format::Ternary => 16,
        Format::Pair => 15,
        Format::Parts | Format::Raw(_) => 0,
    };
    let (symmetric, number_bytes) = (i32::from(layout.symmetric), layout.metadata.size());
    let common = format!(
        "skvq::Layout<skvq::{}, {}, {format}, {}, {symmetric}, {number_bytes}",
        side.name(),
        layout.head_dim,
        layout.group_size
    );
    match (is_even(side, codec), codec.is_of_parts()) {
        (true, _) => format!("{common}, {}ull, 1>", packed_parts(codec)),
        (false, true) => format!("{common}, {}ull>", packed_parts(codec)),
        (false, false) => format!("{common}>"),
    }
}

/// Whether pages have codes where a mask makes operands of them: `Layout::is_even` of `kernels/layout.cuh`.
fn is_even(side: Side, codec: &Codec) -> bool {
    let layout = &codec.layout;
    let is_of_two = layout.format == Format::Int2 && matches!(codec.codebook, Codebook::Uniform { .. });
    let of_one_group = layout.symmetric && layout.groups() == 1;
    codec.has_even_parts() || (side == Side::Values && is_of_two && of_one_group)
}

/// A byte for each part: its bits in the low three, its width / 16 in the high five; the channels without bits come last. 0 without parts.
fn packed_parts(codec: &Codec) -> u64 {
    let stored = codec.parts.iter().map(|part| (part.bits, part.width));
    let rest = codec.layout.head_dim - codec.stored_channels();
    let all = stored.chain((rest > 0).then_some((0, rest)));
    all.enumerate().fold(0, |sum, (index, (bits, width))| sum | ((bits | (width / 16) << 3) as u64) << (8 * index))
}

/// Bytes of codes that a lane of a warp has of a row block.
fn lane_bytes(codec: &Codec) -> usize {
    let layout = &codec.layout;
    let octets = layout.head_dim / 8;
    match layout.format {
        Format::Ternary => layout.head_dim.div_ceil(10),
        Format::Pair => (3 * octets / 2).div_ceil(2),
        Format::Parts => codec.parts.iter().map(|part| (part.bits * part.width / 8).div_ceil(2)).sum(),
        Format::Int8 => 4 * octets,
        Format::Int4 => 2 * octets,
        Format::Int3 => (3 * octets).div_ceil(2),
        Format::Int2 => octets,
        Format::Raw(_) => 0,
    }
}

/// Bytes of a page of 128 rows, up to the next page. Raw rows lie in it one behind the other.
pub fn page_bytes(codec: &Codec) -> usize {
    let layout = &codec.layout;
    if let Format::Raw(dtype) = layout.format {
        return PAGE_ROWS * layout.head_dim * dtype.size();
    }
    let bytes = PAGE_ROWS / BLOCK_ROWS * LANES * lane_bytes(codec) + PAGE_ROWS * layout.metadata_bytes;
    bytes.next_multiple_of(PAGE_ALIGNMENT)
}

/// Whether a block of attention has a thread for each channel of a row, each word of 16 bytes of a row block, and 16 for each group, so that a token can
/// enter with it: `enters_inside` of `kernels/attend_once.cuh`.
pub fn enters_inside(codec: &Codec) -> bool {
    let (words, teams) = (LANES * lane_bytes(codec) / 16, codec.layout.groups().next_multiple_of(2));
    codec.layout.head_dim.max(words).max(16 * teams) <= ATTEND_THREADS
}

/// The levels that codes of a stream stand for, as encoding and decoding read them: f32, codewords as pairs, those of a part of b bits
/// from 2^b − 2 on.
pub fn levels(codec: &Codec) -> Vec<f32> {
    if codec.is_of_parts() {
        let mut levels = vec![0.0; 62];
        for part in &codec.parts {
            let first = (1 << part.bits) - 2;
            (0..1 << part.bits).for_each(|code| levels[first + code] = part.codebook.level(code as u8));
        }
        return levels;
    }
    match &codec.codebook {
        Codebook::Pairs { x, y, .. } => x.iter().zip(y).flat_map(|(x, y)| [*x, *y]).collect(),
        scalar => (0..codec.layout.format.levels()).map(|code| scalar.level(code as u8)).collect(),
    }
}

/// The levels as attention reads them: f16, as bytes apart. Codes of eight bits have none: they are numbers themselves.
pub fn level_table(codec: &Codec) -> LevelTable {
    let mut table = LevelTable::default();
    let mut put = |word: usize, levels: &[f32]| {
        for (index, level) in levels.iter().enumerate() {
            let [low, high] = f16::from_f32(*level).to_le_bytes();
            table.low[word + index / 4] |= u32::from(low) << (8 * (index % 4));
            table.high[word + index / 4] |= u32::from(high) << (8 * (index % 4));
        }
    };
    let all = levels(codec);
    match (codec.layout.format, &codec.codebook) {
        (Format::Parts, _) => {
            for part in &codec.parts {
                put(TABLE_WORDS[part.bits], &all[(1 << part.bits) - 2..][..1 << part.bits]);
            }
        }
        (_, Codebook::Pairs { x, y, .. }) => {
            put(PAIR_WORDS[0], x);
            put(PAIR_WORDS[1], y);
        }
        (Format::Ternary, _) => put(TABLE_WORDS[2], &all),
        (Format::Int4 | Format::Int3 | Format::Int2, _) => put(TABLE_WORDS[all.len().ilog2() as usize], &all),
        _ => {}
    }
    if codec.layout.format == Format::Int2 {
        table.step = even_step(&all).unwrap_or(0.0);
    } else if codec.has_even_parts() {
        table.step = 1.0; // queries have the steps, which differ
    }
    let few = matches!(codec.layout.format, Format::Ternary | Format::Int2);
    table.correction = if few { correction(&all) } else { 1.0 };
    table
}

/// The factor that brings levels as f16 nearest to what they are, for three or four of them: of more some become larger and some smaller.
fn correction(levels: &[f32]) -> f32 {
    let rounded = levels.iter().map(|level| f64::from(f16::from_f32(*level).to_f32()));
    let (mut products, mut squares) = (0.0, 0.0);
    for (level, rounded) in levels.iter().zip(rounded) {
        (products, squares) = (products + f64::from(*level) * rounded, squares + rounded * rounded);
    }
    if squares > 0.0 { (products / squares) as f32 } else { 1.0 }
}

/// The distance of four levels that are evenly spaced around 0, as those of "uniform" codebooks are.
fn even_step(levels: &[f32]) -> Option<f32> {
    let &[lowest, low, high, highest] = levels else { return None };
    let step = (highest - lowest) / 3.0;
    let is_even = [(lowest, -1.5), (low, -0.5), (high, 0.5), (highest, 1.5)]
        .iter()
        .all(|(level, place)| (level - place * step).abs() <= step * f32::EPSILON * 4.0);
    is_even.then_some(step)
}

/// A power of two by which weights times value scales are multiplied before they become f16: large, so that little weights are not lost,
/// and no product with the largest scale is out of f16's range.
pub fn weight_unit(codec: &Codec) -> f32 {
    match codec.layout.metadata {
        Metadata::E4m3 => 64.0,
        Metadata::Fp16 => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Rule;
    use crate::format::RowLayout;
    use crate::parts::{PartLevels, parts_of_row};
    use crate::transform::{Affine, Rotation, Source};

    fn codec(format: Format, head_dim: usize) -> Codec {
        let layout = RowLayout::new(format, head_dim, head_dim, Metadata::E4m3, true).unwrap();
        let name = if format == Format::Int8 { "uniform" } else { "lloyd-max" };
        Codec {
            layout,
            codebook: Codebook::named(name, format).unwrap(),
            parts: Vec::new(),
            rule: Rule::Norm,
            clip: 1.0,
            refinements: 0,
            unbiased: false,
            rotation: Rotation::Hadamard,
            permutations: Vec::new(),
            source: Source::Static(vec![Affine::identity(head_dim)]),
            matrices: Vec::new(),
            noise: Vec::new(),
        }
    }

    #[test]
    fn pages_have_the_bytes_of_their_rows_and_what_lanes_round_up() {
        let bytes = |format, head_dim| page_bytes(&codec(format, head_dim));
        assert_eq!(bytes(Format::Int2, 128), 128 * 33);
        assert_eq!(bytes(Format::Int3, 96), 128 * 37);
        assert_eq!(bytes(Format::Ternary, 128), 128 * 27);
        assert_eq!(bytes(Format::Ternary, 64), 8 * (16 * 13 + 16) + 128);
        assert_eq!(bytes(Format::Pair, 80), 8 * (16 * 15 + 16) + 128);
        assert_eq!(bytes(Format::Int8, 64), 128 * 65);
    }

    #[test]
    fn four_levels_that_are_evenly_spaced_have_a_step() {
        assert_eq!(even_step(&[-1.5, -0.5, 0.5, 1.5]), Some(1.0));
        let step = even_step(&[-1.494, -0.498, 0.498, 1.494]).unwrap();
        assert!((step - 0.996).abs() < 1e-6, "{step}");
        // Lloyd and Max's, a middle that is not 0, three levels.
        assert_eq!(even_step(&levels(&codec(Format::Int2, 64))), None);
        assert_eq!(even_step(&[-1.0, 0.0, 1.0, 2.0]), None);
        assert_eq!(even_step(&[-1.0, 0.0, 1.0]), None);
        assert!(level_table(&codec(Format::Int2, 64)).step == 0.0);
    }

    #[test]
    fn what_f16_does_to_few_levels_is_taken_back() {
        let ternary = codec(Format::Ternary, 64);
        let [.., high] = levels(&ternary)[..] else { unreachable!("three levels") };
        let corrected = f16::from_f32(high).to_f32() * level_table(&ternary).correction;
        assert!((corrected - high).abs() <= f32::EPSILON * high, "{corrected} {high}");
        let of_many =
            [Format::Int3, Format::Int4, Format::Int8].map(|format| level_table(&codec(format, 64)).correction);
        assert!(of_many.iter().all(|factor| *factor == 1.0));
    }

    #[test]
    fn layouts_are_spelled_as_kernels_take_them() {
        let two = codec(Format::Int2, 128);
        assert_eq!(layout_expression(Side::Keys, &two), "skvq::Layout<skvq::keys, 128, 2, 128, 1, 1>");
        let (layout, parts) =
            parts_of_row(64, Metadata::E4m3, &[(4, 16), (2, 32), (0, 16)], PartLevels::LloydMax).unwrap();
        let behind = Codec { layout, parts, ..two };
        let expected = (4 | 1 << 3) | (2 | 2 << 3) << 8 | (1 << 3) << 16;
        assert_eq!(
            layout_expression(Side::Values, &behind),
            format!("skvq::Layout<skvq::values, 64, 0, 64, 1, 1, {expected}ull>")
        );
        assert_eq!(page_bytes(&behind), 128 * (16 + 1));
        let mut even = behind.clone();
        even.parts.iter_mut().for_each(|part| part.levels = PartLevels::Even);
        let (keys, values) = (layout_expression(Side::Keys, &even), layout_expression(Side::Values, &even));
        assert_eq!(keys, format!("skvq::Layout<skvq::keys, 64, 0, 64, 1, 1, {expected}ull, 1>"));
        assert_eq!(values, keys.replace("keys", "values"));
        let uniform = Codec { codebook: Codebook::named("uniform", Format::Int2).unwrap(), ..codec(Format::Int2, 128) };
        assert_eq!(layout_expression(Side::Keys, &uniform), "skvq::Layout<skvq::keys, 128, 2, 128, 1, 1>");
        assert_eq!(layout_expression(Side::Values, &uniform), "skvq::Layout<skvq::values, 128, 2, 128, 1, 1, 0ull, 1>");
    }
}

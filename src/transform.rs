//! What happens to a row before it is quantized: shift, scale, Hadamard rotation, permutation; and where shift and scale come from.
//! The linear map and the turning mean of calibrated rows are in `matrix.rs` and `turning.rs`.
//!
//! Everything here is constant over many rows (a head's plan, or a block's statistics), so attention folds it into the query and the
//! output once. Rows are `&[f32]` of `head_dim` channels. Keys and values each have their own.

mod matrix;
mod turning;

pub use matrix::Matrix;
pub use turning::{SPAN, TurningMean, Turns, spans_of};

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::backend::simd::prefetch;
use crate::error::{Error, Result};
use crate::format::{PAGE_ROWS, fp16_saturating};

/// Shift and scale of every channel of one head: u = (x − shift) / scale.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Affine {
    pub shift: Vec<f32>,
    pub scale: Vec<f32>,
    /// 1 / scale, the factor the encoder multiplies with.
    pub inverse: Vec<f32>,
}

impl Affine {
    pub fn new(shift: Vec<f32>, scale: Vec<f32>) -> Self {
        let inverse = scale.iter().map(|scale| 1.0 / scale).collect();
        Self { shift, scale, inverse }
    }

    pub fn identity(head_dim: usize) -> Self {
        Self::new(vec![0.0; head_dim], vec![1.0; head_dim])
    }
}

/// The rotation R of DESIGN: orthogonal, its own inverse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    Identity,
    /// Block-diagonal Hadamard matrix; blocks of the largest power of two that divides `head_dim`.
    Hadamard,
}

impl Rotation {
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "identity" => Ok(Self::Identity),
            "hadamard" => Ok(Self::Hadamard),
            _ => Err(Error::value("rotation", "\"identity\" or \"hadamard\"", name)),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Hadamard => "hadamard",
        }
    }

    /// Rotates a row in place, in the order of operations of FORMAT.md §3.
    pub fn apply(self, row: &mut [f32]) {
        if self == Self::Identity {
            return;
        }
        let block = hadamard_block(row.len());
        let mut half = 1;
        while half < block {
            for pairs in row.chunks_exact_mut(2 * half) {
                let (low, high) = pairs.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let norm = hadamard_norm(row.len());
        for value in row {
            *value *= norm;
        }
    }
}

/// The largest power of two that divides `head_dim`.
pub fn hadamard_block(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

/// The f32 nearest to 1/√block.
pub fn hadamard_norm(head_dim: usize) -> f32 {
    (1.0 / (hadamard_block(head_dim) as f64).sqrt()) as f32
}

/// A permutation of the channels of one head: `y_j` = u_{order[j]}.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permutation {
    pub order: Vec<u16>,
}

impl Permutation {
    pub fn new(order: &[usize], head_dim: usize) -> Result<Self> {
        let mut seen = vec![false; head_dim];
        for &channel in order {
            if channel >= head_dim || std::mem::replace(&mut seen[channel], true) {
                let expected = format!("every channel 0..{head_dim} once");
                return Err(Error::value("permutation", expected, format!("channel {channel}")));
            }
        }
        if order.len() != head_dim {
            return Err(Error::value("permutation", format!("{head_dim} channels"), order.len()));
        }
        Ok(Self { order: order.iter().map(|&channel| channel as u16).collect() })
    }

    /// out[j] = row[order[j]]
    pub fn apply(&self, row: &[f32], out: &mut [f32]) {
        for (value, &channel) in out.iter_mut().zip(&self.order) {
            *value = row[usize::from(channel)];
        }
    }

    /// out[order[j]] = row[j]
    pub fn invert(&self, row: &[f32], out: &mut [f32]) {
        for (value, &channel) in row.iter().zip(&self.order) {
            out[usize::from(channel)] = *value;
        }
    }
}

/// Where shift and scale come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A plan: one [`Affine`] for each kv head, or a single one for all.
    Static(Vec<Affine>),
    /// The rows themselves, block by block.
    Block(BlockRule),
    /// A mean for each kv head that turns with the position; no scale.
    Turning(Vec<TurningMean>),
}

/// How the statistics of a block are taken (FORMAT.md §4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockRule {
    /// Rows of a block, a multiple of [`PAGE_ROWS`].
    pub rows: usize,
    pub shift: bool,
    pub scale_exponent: f32,
    /// Power of 1 / (what queries put on a channel) in its scale; keys only.
    pub query_exponent: f32,
}

impl BlockRule {
    pub fn new(rows: usize, shift: bool, scale_exponent: f32, query_exponent: f32) -> Result<Self> {
        if rows == 0 || !rows.is_multiple_of(PAGE_ROWS) {
            return Err(Error::value("block", format!("0 or a multiple of {PAGE_ROWS}"), rows));
        }
        if !(0.0..=1.0).contains(&scale_exponent) {
            return Err(Error::value("scale_exponent", "a number in [0, 1]", scale_exponent));
        }
        if !(0.0..=1.0).contains(&query_exponent) {
            return Err(Error::value("query_exponent", "a number in [0, 1]", query_exponent));
        }
        Ok(Self { rows, shift, scale_exponent, query_exponent })
    }

    /// Scales of a block: one for each channel, or one for all.
    fn scales(&self, head_dim: usize) -> usize {
        if self.scale_exponent > 0.0 || self.query_exponent > 0.0 { head_dim } else { 1 }
    }

    /// Bytes that one block's statistics take: they are stored as fp16.
    pub fn bytes(&self, head_dim: usize) -> usize {
        2 * (self.scales(head_dim) + if self.shift { head_dim } else { 0 })
    }

    /// Statistics of `rows` (whole rows of `head_dim` channels); rows that are not finite are left out. `factors` of the channels'
    /// scales come from the queries (`layer::queries`).
    pub fn statistics(&self, rows: &[f32], head_dim: usize, factors: Option<&[f16]>) -> BlockStatistics {
        let finite: Vec<&[f32]> =
            rows.chunks_exact(head_dim).filter(|row| row.iter().all(|value| value.is_finite())).collect();
        let count = finite.len().max(1) as f64;
        let mut shift = vec![0.0f32; head_dim];
        if self.shift {
            let mut sums = vec![0.0f64; head_dim];
            for row in &finite {
                sums.iter_mut().zip(*row).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            for (shift, sum) in shift.iter_mut().zip(sums) {
                *shift = fp16_saturating((sum / count) as f32).to_f32();
            }
        }
        let mut squares = vec![0.0f64; head_dim];
        for row in &finite {
            for ((square, &value), &shift) in squares.iter_mut().zip(*row).zip(&shift) {
                let deviation = f64::from(value) - f64::from(shift);
                *square += deviation * deviation;
            }
        }
        let variances: Vec<f64> = squares.iter().map(|square| square / count).collect();
        let whole = (variances.iter().sum::<f64>() / head_dim as f64).sqrt();
        // Without queries the spread of a channel stands in for them: the wider, the less they tend to look at it.
        let stand_in = if factors.is_none() { self.query_exponent / 2.0 } else { 0.0 };
        let exponent = f64::from((self.scale_exponent + stand_in).min(1.0));
        let factor = |channel: usize| factors.map_or(1.0, |factors| factors[channel].to_f64());
        let spread = |variance: f64| variance.sqrt().powf(exponent) * whole.powf(1.0 - exponent);
        BlockStatistics {
            shift: shift
                .iter()
                .take(if self.shift { head_dim } else { 0 })
                .map(|&shift| f16::from_f32(shift))
                .collect(),
            scale: variances[..self.scales(head_dim)]
                .iter()
                .enumerate()
                .map(|(channel, variance)| block_scale(spread(*variance) * factor(channel)))
                .collect(),
        }
    }
}

fn block_scale(scale: f64) -> f16 {
    if scale == 0.0 { f16::ONE } else { f16::from_f64(scale.clamp(2f64.powi(-14), 65504.0)) }
}

/// Shift and scale of one block, as they are stored: no shift, or one for each channel; one scale, or one for each channel.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockStatistics {
    shift: Box<[f16]>,
    scale: Box<[f16]>,
}

impl BlockStatistics {
    /// Writes shift and scale of every channel.
    pub fn expand_into(&self, shift: &mut [f32], scale: &mut [f32]) {
        if self.shift.is_empty() {
            shift.fill(0.0);
        } else {
            self.shift.convert_to_f32_slice(shift);
        }
        if self.scale.len() == 1 {
            scale.fill(self.scale[0].to_f32());
        } else {
            self.scale.convert_to_f32_slice(scale);
        }
    }

    pub fn expand(&self, head_dim: usize) -> Affine {
        let mut affine = Affine::default();
        self.expand_to(head_dim, &mut affine);
        affine
    }

    /// Writes `affine` for `head_dim` channels, in its own memory.
    pub fn expand_to(&self, head_dim: usize, affine: &mut Affine) {
        for channels in [&mut affine.shift, &mut affine.scale, &mut affine.inverse] {
            channels.resize(head_dim, 0.0);
        }
        self.expand_into(&mut affine.shift, &mut affine.scale);
        affine.inverse.iter_mut().zip(&affine.scale).for_each(|(inverse, scale)| *inverse = 1.0 / scale);
    }

    pub fn prefetch(&self) {
        prefetch(&self.shift);
        prefetch(&self.scale);
    }

    pub fn bytes(&self) -> usize {
        2 * (self.shift.len() + self.scale.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hadamard_is_its_own_inverse_and_keeps_lengths() {
        for head_dim in [64, 80, 96, 112, 128, 192, 256] {
            let row: Vec<f32> = (0..head_dim).map(|i| ((i * 37 % 101) as f32 - 50.0) / 13.0).collect();
            let mut rotated = row.clone();
            Rotation::Hadamard.apply(&mut rotated);
            let norm = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            assert!((norm(&row) / norm(&rotated) - 1.0).abs() < 1e-5);
            Rotation::Hadamard.apply(&mut rotated);
            assert!(row.iter().zip(&rotated).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn permutations_invert_and_refuse_nonsense() {
        let permutation = Permutation::new(&[2, 0, 3, 1], 4).unwrap();
        let (mut there, mut back) = ([0.0; 4], [0.0; 4]);
        permutation.apply(&[10.0, 11.0, 12.0, 13.0], &mut there);
        assert_eq!(there, [12.0, 10.0, 13.0, 11.0]);
        permutation.invert(&there, &mut back);
        assert_eq!(back, [10.0, 11.0, 12.0, 13.0]);
        for bad in [&[0, 0, 1, 2][..], &[0, 1, 2, 4], &[0, 1, 2]] {
            assert!(Permutation::new(bad, 4).is_err());
        }
    }

    #[test]
    fn block_statistics_standardize_and_leave_out_broken_rows() {
        let rule = BlockRule::new(128, true, 1.0, 0.0).unwrap();
        let mut rows: Vec<f32> = (0..128 * 16).map(|i| (i % 16) as f32 * 10.0 + ((i / 16) % 2) as f32 * 2.0).collect();
        let clean = rule.statistics(&rows, 16, None).expand(16);
        assert_eq!(clean.shift[3], 31.0);
        assert_eq!(clean.scale, vec![1.0; 16]);
        rows[5 * 16 + 3] = f32::NAN;
        rows[6 * 16 + 3] = f32::INFINITY;
        assert_eq!(rule.statistics(&rows, 16, None).expand(16), clean);
        assert_eq!(rule.bytes(16), 64);
        assert_eq!(BlockRule::new(256, false, 0.0, 0.0).unwrap().bytes(16), 2);
        let weighed = BlockRule::new(128, true, 1.0, 0.5).unwrap();
        let factors: Vec<f16> = (0..16).map(|i| f16::from_f32(if i == 3 { 0.5 } else { 1.0 })).collect();
        let scale = weighed.statistics(&rows, 16, Some(&factors)).expand(16).scale;
        assert!(scale.iter().enumerate().all(|(i, scale)| *scale == if i == 3 { 0.5 } else { 1.0 }));
    }
}

//! What does not change over a layer's life, in device memory: a codec's parameters, and the turns of its mean.
//!
//! Shapes are those of `kernels/params.cuh`: parameters of one head for all are written out for every head.

use std::sync::Arc;

use half::f16;

use super::device::Device;
use super::launch::Stream;
use super::memory::{ALIGNMENT, Block, Memory};
use super::pages;
use super::params::{LevelTable, TransformParams};
use crate::codec::Codec;
use crate::error::Result;
use crate::format::{Format, RowLayout};
use crate::transform::{Rotation, SPAN, Source, Turns};

/// Numbers on their way to the device, each array at a multiple of [`ALIGNMENT`].
#[derive(Default)]
struct Upload {
    bytes: Vec<u8>,
}

impl Upload {
    /// Where the array will begin, counted from the block's address.
    fn push<const N: usize, T: Copy>(&mut self, numbers: impl IntoIterator<Item = T>, bytes: fn(T) -> [u8; N]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let start = self.bytes.len() as u64;
        // Several times as fast as one `extend` with all of their bytes, and matrices are megabytes.
        numbers.into_iter().for_each(|number| self.bytes.extend_from_slice(&bytes(number)));
        start
    }

    fn floats(&mut self, numbers: impl IntoIterator<Item = f32>) -> u64 {
        self.push(numbers, f32::to_le_bytes)
    }

    /// Copies everything to a new block.
    ///
    /// # Safety
    /// `self` stays alive until the stream is past the copy; the stream is a live one of the device.
    unsafe fn start(&self, device: &Device, memory: &dyn Memory, stream: Stream) -> Result<Block> {
        let block = memory.allocate(self.bytes.len().max(1))?;
        // SAFETY: the caller's promise; the block is new, so nothing else uses it.
        unsafe { device.copy(block.address(), self.bytes.as_ptr() as u64, self.bytes.len(), stream) }?;
        Ok(block)
    }
}

/// A codec's parameters on the device.
pub struct CodecConstants {
    /// Without the spans of a mean that turns, which grow, and without block statistics, which every layer has of its own.
    pub transform: TransformParams,
    pub levels: u64,
    pub noise: u64,
    pub table: LevelTable,
    pub weight_unit: f32,
    /// Ternary levels that are not −c, 0, c.
    pub uneven: bool,
    /// Of keys whose parts have evenly spaced levels, tiles of 16 channels that have codes; else 0.
    even_tiles: usize,
    /// Of a mean that turns; otherwise none.
    pub waves: Waves,
    _block: Block,
}

/// What `kernels/turning.cuh` multiplies amplitudes with, and which channels make these: `waves`, `channels`, `frequencies` of `TurningParams`.
#[derive(Clone, Copy, Default)]
pub struct Waves {
    pub table: u64,
    pub channels: u64,
    pub frequencies: i32,
}

impl CodecConstants {
    /// Waits until everything is there.
    ///
    /// # Safety
    /// The stream is a live one of the device.
    pub unsafe fn new(
        codec: &Codec,
        heads: usize,
        device: &Device,
        memory: &dyn Memory,
        stream: Stream,
    ) -> Result<Self> {
        let mut upload = Upload::default();
        let levels = upload.floats(pages::levels(codec));
        let noise = (!codec.noise.is_empty()).then(|| upload.floats(codec.noise.iter().copied()));
        let offsets = transform_offsets(codec, heads, &mut upload);
        let turns = codec.turning_mean(0).map(|mean| &*mean.turns);
        let waves = turns.map(|turns| {
            let frequencies = turns.distinct().len();
            let waves = wave_fragments(turns, codec.layout.head_dim);
            [
                upload.push(waves, u16::to_le_bytes),
                upload.push(channels_by_frequency(turns), i32::to_le_bytes),
                frequencies as u64,
            ]
        });
        // SAFETY: the caller's promise; what is uploaded lives in this frame, which waits.
        let block = unsafe {
            let block = upload.start(device, memory, stream)?;
            device.synchronize(stream)?;
            block
        };
        let at = |offset: Option<u64>| offset.map_or(0, |offset| block.address() + offset);
        let transform = TransformParams {
            shift: at(offsets.shift),
            scale: at(offsets.scale),
            permutation: at(offsets.permutation),
            matrix: at(offsets.matrix),
            inverse: at(offsets.inverse),
            shift_sine: at(offsets.shift_sine),
            steps: at(offsets.steps),
            rotation: i32::from(codec.rotation == Rotation::Hadamard),
            ..TransformParams::default()
        };
        let (levels, noise) = (at(Some(levels)), at(noise));
        let (table, weight_unit) = (pages::level_table(codec), pages::weight_unit(codec));
        let uneven = matches!(pages::levels(codec)[..], [low, middle, high] if middle != 0.0 || low != -high);
        let waves = waves.map_or_else(Waves::default, |[waves, channels, frequencies]| Waves {
            table: at(Some(waves)),
            channels: at(Some(channels)),
            frequencies: frequencies as i32,
        });
        let even_tiles = if codec.has_even_parts() { codec.stored_channels() / 16 } else { 0 };
        Ok(Self { transform, levels, noise, table, weight_unit, uneven, even_tiles, waves, _block: block })
    }

    /// Whether `tiles` query tiles of a warp meet these keys as bytes, always or where both streams allow it: `by_bytes` of `kernels/bytes.cuh`, and levels
    /// that are evenly spaced.
    pub fn takes_bytes(&self, layout: &RowLayout, tiles: usize, allowed: bool) -> bool {
        if self.even_tiles != 0 {
            return self.even_tiles * tiles <= 16;
        }
        let fits = layout.head_dim.is_multiple_of(32) && layout.head_dim * tiles <= 256;
        allowed && layout.format == Format::Int2 && layout.groups() == 1 && fits && self.table.step != 0.0
    }
}

#[derive(Default)]
struct TransformOffsets {
    shift: Option<u64>,
    scale: Option<u64>,
    permutation: Option<u64>,
    matrix: Option<u64>,
    inverse: Option<u64>,
    shift_sine: Option<u64>,
    steps: Option<u64>,
}

fn transform_offsets(codec: &Codec, heads: usize, upload: &mut Upload) -> TransformOffsets {
    let mut offsets = TransformOffsets::default();
    if let Source::Static(affines) = &codec.source {
        let affine = |head: usize| &affines[if affines.len() == 1 { 0 } else { head }];
        // A shift of zeros and a scale of ones are none.
        if affines.iter().any(|affine| affine.shift.iter().any(|shift| *shift != 0.0)) {
            offsets.shift = Some(upload.floats((0..heads).flat_map(|head| affine(head).shift.iter().copied())));
        }
        if affines.iter().any(|affine| affine.scale.iter().any(|scale| *scale != 1.0)) {
            offsets.scale = Some(upload.floats((0..heads).flat_map(|head| affine(head).scale.iter().copied())));
        }
    }
    if let Some(mean) = codec.turning_mean(0) {
        let means = || (0..heads).filter_map(|head| codec.turning_mean(head));
        offsets.shift = Some(upload.floats(means().flat_map(|mean| mean.mean().iter().copied())));
        offsets.shift_sine = Some(upload.floats(means().flat_map(|mean| mean.quarter().iter().copied())));
        offsets.steps = Some(upload.floats(mean.turns.steps().iter().copied()));
    }
    if !codec.permutations.is_empty() {
        let orders = (0..heads).filter_map(|head| codec.permutation(head));
        let channels = orders.flat_map(|permutation| permutation.order.iter().map(|channel| i32::from(*channel)));
        offsets.permutation = Some(upload.push(channels, i32::to_le_bytes));
    }
    if !codec.matrices.is_empty() {
        let matrices = || (0..heads).filter_map(|head| codec.matrix(head));
        // By columns, as it is kept.
        offsets.matrix = Some(upload.floats(matrices().flat_map(|matrix| matrix.forward().iter().copied())));
        offsets.inverse = Some(upload.floats(matrices().flat_map(|matrix| matrix.inverse().iter().copied())));
    }
    offsets
}

/// k-steps of 8 frequencies that a warp of `kernels/turning.cuh` has in registers at a time.
fn pass_steps(head_dim: usize) -> usize {
    if head_dim <= 128 { head_dim / 16 } else { head_dim.div_ceil(64) }
}

/// Cosines and sines of j·θ as fragments of A, f16 `[2, 16 row tiles, k-steps, 32 lanes, 4 registers, 2]`: what f16 has of each number, then what it
/// has of the rest. Register i of lane 4·g + t has cosine and sine of step j = 16·tile + g + 8·(i mod 2) and of the distinct frequency
/// 8·(k-step) + t + 4·⌊i/2⌋; zeros behind the last one, up to a whole number of passes.
fn wave_fragments(turns: &Turns, head_dim: usize) -> impl Iterator<Item = u16> {
    let frequencies: Vec<f64> = turns.distinct().map(f64::from).collect();
    let k_steps = frequencies.len().div_ceil(8).next_multiple_of(pass_steps(head_dim));
    let number = move |index: usize| {
        let (half, register, lane, rest) = (index % 2, index / 2 % 4, index / 8 % 32, index / 256);
        let (k_step, tile) = (rest % k_steps, rest / k_steps);
        let (step, place) = (16 * tile + lane / 4 + 8 * (register % 2), 8 * k_step + lane % 4 + 4 * (register / 2));
        let angle = frequencies.get(place).map(|theta| step as f64 * theta);
        angle.map_or(0.0, |angle| if half == 0 { angle.cos() } else { angle.sin() })
    };
    let exact: Vec<f64> = (0..SPAN / 16 * k_steps * 256).map(number).collect();
    let high: Vec<f16> = exact.iter().map(|number| f16::from_f64(*number)).collect();
    let low: Vec<f16> = exact.iter().zip(&high).map(|(exact, high)| f16::from_f64(exact - high.to_f64())).collect();
    high.into_iter().chain(low).map(f16::to_bits)
}

/// i32 `[F + 1]`: where the channels of each distinct frequency begin; then `[D]`: the channels in that order.
fn channels_by_frequency(turns: &Turns) -> Vec<i32> {
    let (count, places) = (turns.distinct().len(), turns.distinct_of());
    let starts = (0..=count).map(|place| places.iter().filter(|of| usize::from(**of) < place).count() as i32);
    let mut channels: Vec<i32> = (0..places.len() as i32).collect();
    channels.sort_by_key(|channel| places[*channel as usize]);
    starts.chain(channels).collect()
}

/// Cosines and sines of 256·i·θ for the spans that positions of a layer lie in, `[spans, 2, D]`.
pub struct SpanTable {
    pub first: i32,
    count: i32,
    pub block: Block,
    /// What was copied. The driver has read it, from memory that is not pinned, when the copy's call returns; it stays for those that may
    /// read later.
    _upload: Upload,
}

impl SpanTable {
    /// Of the spans of the positions `first ..= last` of a codec whose mean turns, with as many again and more behind them, so that it is seldom made anew.
    ///
    /// # Safety
    /// The stream is a live one of the device.
    pub unsafe fn covering(
        codec: &Codec,
        [first, last]: [i64; 2],
        device: &Device,
        memory: &dyn Memory,
        stream: Stream,
    ) -> Result<Option<Arc<Self>>> {
        let Some(mean) = codec.turning_mean(0) else { return Ok(None) };
        let (first, last) = (span_of(first), span_of(last));
        let count = 2 * (last - first + 1) + 62;
        let width = mean.channels();
        let table = mean.turns.spans(first.unsigned_abs().max((first + count).unsigned_abs()) as usize + 1);
        let mut upload = Upload::default();
        upload.floats((first..first + count).flat_map(|span| {
            let row = &table[span.unsigned_abs() as usize * 2 * width..][..2 * width];
            // The cosine is even, the sine odd.
            let sign = if span < 0 { -1.0 } else { 1.0 };
            row.iter().enumerate().map(move |(index, turn)| if index < width { *turn } else { sign * turn })
        }));
        // SAFETY: the caller's promise; the table keeps what it uploads.
        let block = unsafe { upload.start(device, memory, stream) }?;
        Ok(Some(Arc::new(Self { first, count, block, _upload: upload })))
    }

    pub fn covers(&self, [first, last]: [i64; 2]) -> bool {
        self.first <= span_of(first) && span_of(last) < self.first + self.count
    }
}

fn span_of(position: i64) -> i32 {
    position.div_euclid(SPAN as i64) as i32
}

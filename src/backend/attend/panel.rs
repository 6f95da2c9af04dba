//! One job of a call with many queries, which lie side by side in the lanes of vectors (`simd/panels.rs`): the steps at the head of
//! `attend.rs` for all of them at once, on tiles of levels in f32.
//!
//! Shapes: queries and outputs `[channels, width]`, scores and weights `[rows, width]`, with a query in every column and `width` a multiple
//! of 16; scales and zero points `[groups, CHUNK]`.

use std::ops::Range;
use std::sync::Arc;

use super::tiles::{Affinity, Buffer, TILE_FLOATS, Tiles, Visible, group_channels, tiles};
use super::{CHUNK, Chunk, Job, Plan, State};
use crate::backend::simd::panel_words::{self, Factors, terms_of};
use crate::backend::simd::panels::{self, Product, Softmax};
use crate::backend::simd::part_words::{LARGEST_KEY, LARGEST_VALUE};
use crate::backend::simd::words::{LARGEST_LEVEL, WEIGHED_ROWS, WordTable, largest_word};
use crate::backend::simd::{LANES, vectors};
use crate::codebook::Codebook;
use crate::codec::Codec;
use crate::tensor::Dtype;
use crate::transform::{Permutation, Rotation, TurningMean};

/// Queries of a panel at most.
pub(super) const PANEL_QUERIES: usize = 64;
/// Rows whose scores exist at a time: 32 KiB of them.
const ROWS: usize = 128;

/// What a step of a level is worth where a codec's levels become words of 16 bits, and how many the largest has.
#[derive(Clone, Copy, Debug)]
pub(super) struct WordSteps {
    unit: f32,
    steps: f32,
}

impl WordSteps {
    /// For queries of 16 bits. None for rows that words do not serve. Many levels lose too much as words for the eleven bits of a float16.
    pub(super) fn new(codec: &Codec, queries: Dtype, values: bool) -> Option<Self> {
        let whole_pairs = codec.layout.groups() == 1 || codec.layout.group_size.is_multiple_of(2 * LANES);
        if codec.is_raw() || !whole_pairs {
            return None;
        }
        if let Some(table) = WordTable::new(&codec.layout, &codec.codebook, values) {
            return Some(Self { unit: table.unit(), steps: LARGEST_LEVEL });
        }
        if queries == Dtype::F16 {
            return None;
        }
        let largest = codec.parts.iter().map(|part| part.codebook.largest());
        let largest = if codec.is_of_parts() { largest.fold(0.0, f32::max) } else { codec.codebook.largest() };
        let steps = match codec.codebook {
            // Halves, and so exact.
            Codebook::Uniform { .. } if !codec.is_of_parts() => 2.0 * largest,
            _ if values => LARGEST_VALUE,
            _ => LARGEST_KEY,
        };
        (largest > 0.0).then(|| Self { unit: largest / steps, steps })
    }
}

/// Buffers of one job, a query in every column: channels, rows or groups by `width`, or `[width]` where there is one number a query.
pub(super) struct Panel<'a> {
    plan: &'a Plan<'a>,
    job: Job,
    width: usize,
    tiles: Tiles<'a>,
    /// The queries times the softmax scale, as they are and folded.
    plain: Buffer,
    folded: Buffer,
    /// q·μ of each query for the present shift.
    shifts: Buffer,
    /// What the noise of packed keys adds to a score on average, per unit of the squared scale.
    noise: Buffer,
    /// Σ of the folded query over each group: `[groups, width]`.
    sums: Buffer,
    /// For keys whose mean turns.
    turning: Option<Turning<'a>>,
    /// Shift and scale of keys and values in the present block.
    keys: Affinity,
    values: Affinity,
    scores: Buffer,
    /// Weights times a scale.
    scaled: Buffer,
    /// The last of the present rows that a query sees.
    last: Buffer,
    /// The running softmax (`panels::Softmax`), and Σ of weights times plain rows.
    reference: Buffer,
    sum: Buffer,
    factors: Buffer,
    added: Buffer,
    output: Buffer,
    /// Weighted sums of levels that are not yet back in the model's space, and the weights they have.
    packed_output: Buffer,
    packed_weights: Buffer,
    /// Channels on their way through a transform.
    between: Buffer,
    words: Words,
}

/// What products of words need.
struct Words {
    /// Keys `[rows, terms]`, values `[pairs, channels]`.
    tile: Buffer<u32>,
    /// `[terms, width]`, and the unit of each query.
    queries: Buffer<u32>,
    query_units: Buffer,
    /// Whether they stand for all queries.
    queries_hold: bool,
    /// `[pairs, width]`, and the unit of each query's.
    weights: Buffer<u32>,
    weight_units: Buffer,
}

impl Words {
    fn new(plan: &Plan, width: usize) -> Self {
        let wanted = plan.key_steps.is_some() || plan.value_steps.is_some();
        let (pairs, widest) = (WEIGHED_ROWS / 2, plan.key_width.max(plan.value_width));
        let room = |numbers: usize| if wanted { numbers } else { 0 };
        Self {
            tile: Buffer::zeroed(room(pairs * widest).max(room(TILE_FLOATS))),
            queries: Buffer::zeroed(room(terms_of(plan.key_width) * width)),
            query_units: Buffer::zeroed(room(width)),
            queries_hold: false,
            weights: Buffer::zeroed(room(pairs * width)),
            weight_units: Buffer::zeroed(room(width)),
        }
    }
}

/// The products of a job's queries with a mean that turns.
struct Turning<'a> {
    mean: &'a TurningMean,
    /// Of the spans that the past reaches.
    spans: Arc<Vec<f32>>,
    /// `[waves, width]`
    amplitudes: Buffer,
    scratch: Buffer,
}

impl<'a> Panel<'a> {
    pub(super) fn new(plan: &'a Plan<'a>, job: Job) -> Self {
        let (keys, values) = (plan.key_width, plan.value_width);
        let width = job.queries.next_multiple_of(LANES);
        let panel = |rows: usize| Buffer::zeroed(rows * width);
        let mut reference = panel(1);
        reference.fill(f32::NEG_INFINITY);
        let mut new = Self {
            plan,
            job,
            width,
            tiles: Tiles::new(plan, job),
            plain: panel(keys),
            folded: panel(keys),
            shifts: panel(1),
            noise: panel(1),
            sums: panel(plan.layer.spec().keys.layout.groups()),
            turning: None,
            keys: Affinity::new(keys),
            values: Affinity::new(values),
            scores: panel(ROWS),
            scaled: panel(ROWS),
            last: panel(1),
            reference,
            sum: panel(1),
            factors: panel(1),
            added: panel(1),
            output: panel(values),
            packed_output: panel(values),
            packed_weights: panel(1),
            between: panel(keys.max(values)),
            words: Words::new(plan, width),
        };
        new.read_queries();
        new
    }

    /// Queries come as rows and become columns; so do their amplitudes where a mean turns.
    fn read_queries(&mut self) {
        let (plan, job, width) = (self.plan, self.job, self.width);
        let mean = plan.turning_mean(job);
        let origin = plan.first_position(job);
        let mut turning = mean.map(|mean| Turning {
            mean,
            spans: plan.spans(job, mean),
            amplitudes: Buffer::zeroed(mean.waves() * width),
            scratch: Buffer::zeroed(mean.panel_rows() * width),
        });
        let mut row = vec![0.0; plan.key_width];
        let mut waves = vec![0.0; mean.map_or(0, TurningMean::waves)];
        for q in 0..job.queries {
            let (head, position) = plan.query_at(job, q);
            plan.call.query.read_row_f32(job.batch, head, position, &mut row);
            vectors::scale(plan.isa, &mut row, plan.call.scale);
            write_column(&row, q, width, &mut self.plain);
            if let Some(Turning { mean, spans, amplitudes, .. }) = &mut turning {
                mean.amplitudes(&row, spans, origin, &mut waves);
                write_column(&waves, q, width, amplitudes);
            }
        }
        self.turning = turning;
    }

    pub(super) fn run(mut self) -> State {
        for index in self.job.first_chunk..self.job.first_chunk + self.job.chunks {
            let whole = self.plan.chunks[index];
            for start in (0..whole.count).step_by(ROWS) {
                let (first, token) = (whole.first + start, whole.token + start);
                let chunk = Chunk { first, token, count: ROWS.min(whole.count - start), ..whole };
                if self.tiles.tokens_of(chunk).rows.is_empty() || self.tiles.sees_nothing(chunk) {
                    continue;
                }
                self.score(chunk);
                self.cap_and_mask(chunk);
                self.soften(chunk);
                self.weigh(chunk);
            }
        }
        self.unfold_output();
        self.into_state()
    }

    fn into_state(self) -> State {
        let (n, width, channels) = (self.job.queries, self.width, self.plan.value_width);
        let mut output = Buffer::zeroed(n * channels);
        for (c, row) in self.output.chunks_exact(width).enumerate() {
            row[..n].iter().enumerate().for_each(|(q, value)| output[q * channels + c] = *value);
        }
        State { maximum: self.reference[..n].to_vec(), sum: self.sum[..n].to_vec(), output }
    }

    /// Steps 1 and 2.
    fn score(&mut self, chunk: Chunk) {
        let (isa, width) = (self.plan.isa, self.width);
        let codec = self.tiles.codec(false);
        let packed = self.tiles.is_packed(chunk, false);
        if packed {
            self.fold_queries(chunk);
            self.tiles.load_metadata(chunk, false);
            self.begin_packed_scores(chunk);
        } else {
            self.scores[..chunk.count * width].fill(0.0);
        }
        let channels = if packed { codec.stored_channels() } else { codec.layout.head_dim };
        let steps = self.plan.key_steps.filter(|_| packed && self.words.queries_hold);
        for (start, count) in tiles(chunk.count, channels) {
            self.tiles.load(chunk, false, start, count);
            let scores = &mut self.scores[start * width..][..count * width];
            if !packed {
                let product = Product { rows: count, terms: channels, row_stride: channels, term_stride: 1, width };
                panels::add_product(isa, &product, &self.tiles.tile, &self.plain, None, scores);
                continue;
            }
            if let Some(WordSteps { unit, .. }) = steps {
                let levels = &self.tiles.tile[..count * channels];
                panel_words::key_words(isa, levels, channels, unit, &mut self.words.tile);
            }
            for g in 0..codec.layout.groups() {
                let own = group_channels(codec, g);
                let scales = Some(&self.tiles.scales[g * CHUNK + start..][..count]);
                if let Some(WordSteps { unit, .. }) = steps {
                    let (terms, all) = (terms_of(own.len()), terms_of(channels));
                    let product = Product { rows: count, terms, row_stride: all, term_stride: 1, width };
                    let factors = Factors { scales, unit, units: &self.words.query_units };
                    let first = terms_of(own.start);
                    let (tile, queries) = (&self.words.tile[first..], &self.words.queries[first * width..]);
                    panel_words::add_product(isa, &product, &factors, tile, queries, scores);
                } else {
                    let terms = own.len();
                    let product = Product { rows: count, terms, row_stride: channels, term_stride: 1, width };
                    let (tile, queries) = (&self.tiles.tile[own.start..], &self.folded[own.start * width..]);
                    panels::add_product(isa, &product, tile, queries, scales, scores);
                }
            }
        }
    }

    /// What a packed row scores beside its codes: q·μ and z·Σq, less what its noise adds.
    fn begin_packed_scores(&mut self, chunk: Chunk) {
        let (isa, width, layout) = (self.plan.isa, self.width, &self.tiles.codec(false).layout);
        let scores = &mut self.scores[..chunk.count * width];
        panels::begin_scores(isa, &self.shifts, &self.noise, &self.tiles.scales[..chunk.count], scores);
        if let Some(Turning { mean, spans, amplitudes, scratch, .. }) = &mut self.turning {
            mean.score_panel(isa, spans, chunk.first, amplitudes, scratch, width, scores);
        }
        if !layout.symmetric {
            for (g, sums) in self.sums.chunks_exact(width).enumerate() {
                let product = Product { rows: chunk.count, terms: 1, row_stride: 1, term_stride: 0, width };
                panels::add_product(isa, &product, &self.tiles.zeros[g * CHUNK..], sums, None, scores);
            }
        }
    }

    /// q' = (R(s∘q))_π or Bᵀq, its sum over each group, and q·μ.
    fn fold_queries(&mut self, chunk: Chunk) {
        let (isa, width, head) = (self.plan.isa, self.width, self.job.kv_head);
        let codec = self.tiles.codec(false);
        if !self.keys.turn_to(codec, head, self.tiles.stream(false), chunk.first) {
            return;
        }
        self.shifts.fill(0.0);
        panels::add_rows(isa, &self.plain, &self.keys.shift, &mut self.shifts);
        let channels = codec.layout.head_dim;
        if let Some(matrix) = codec.matrix(head) {
            self.folded.fill(0.0);
            let product = Product { rows: channels, terms: channels, row_stride: 1, term_stride: channels, width };
            panels::add_product(isa, &product, matrix.inverse(), &self.plain, None, &mut self.folded);
            for (q, noise) in self.noise.iter_mut().enumerate() {
                let terms = codec.noise.iter().enumerate().map(|(c, noise)| noise * self.folded[c * width + q].powi(2));
                *noise = 0.5 * terms.sum::<f32>();
            }
            return self.make_query_words();
        }
        let permutation = codec.permutation(head);
        let target = if permutation.is_some() { &mut self.between[..channels * width] } else { &mut self.folded[..] };
        panels::scale_rows(isa, &self.plain, &self.keys.scale, target);
        if codec.rotation == Rotation::Hadamard {
            panels::rotate(isa, channels, target);
        }
        if let Some(Permutation { order }) = permutation {
            for (row, &channel) in self.folded.chunks_exact_mut(width).zip(order) {
                row.copy_from_slice(&self.between[usize::from(channel) * width..][..width]);
            }
        }
        if !codec.layout.symmetric {
            self.sums.fill(0.0);
            let size = codec.layout.group_size;
            for (group, sum) in self.folded.chunks_exact(size * width).zip(self.sums.chunks_exact_mut(width)) {
                group.chunks_exact(width).for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, q)| *sum += q));
            }
        }
        self.make_query_words();
    }

    fn make_query_words(&mut self) {
        let Some(WordSteps { steps, .. }) = self.plan.key_steps else { return };
        let channels = self.tiles.codec(false).stored_channels();
        let steps = largest_word(channels, steps);
        let Words { queries, query_units: units, .. } = &mut self.words;
        let folded = &self.folded[..channels * self.width];
        self.words.queries_hold = panel_words::query_words(self.plan.isa, folded, steps, queries, units);
    }

    /// Step 3, first half.
    fn cap_and_mask(&mut self, chunk: Chunk) {
        let (call, width) = (self.plan.call, self.width);
        let Visible { token, rows } = self.tiles.tokens_of(chunk);
        let token = token + rows.start;
        let scores = &mut self.scores[..chunk.count * width];
        scores[..rows.start * width].fill(f32::NEG_INFINITY);
        scores[rows.end * width..].fill(f32::NEG_INFINITY);
        let scores = &mut scores[rows.start * width..rows.end * width];
        if let Some(softcap) = call.softcap {
            for score in &mut *scores {
                *score = softcap * (*score / softcap).tanh();
            }
        }
        if let Some(mask) = &call.mask {
            let mut bias = [0.0f32; ROWS];
            let bias = &mut bias[..rows.len()];
            for q in 0..self.job.queries {
                let (head, position) = self.plan.query_at(self.job, q);
                if mask.is_open(self.job.batch, head, position, token..token + rows.len()) {
                    continue;
                }
                mask.read_bias(self.job.batch, head, position, token, bias);
                // A hidden token stays hidden even if its score is not a number.
                for (score, bias) in scores[q..].iter_mut().step_by(width).zip(&*bias) {
                    *score = if *bias == f32::NEG_INFINITY { f32::NEG_INFINITY } else { *score + *bias };
                }
            }
        }
        if call.causal {
            let mut all = true;
            for q in 0..self.job.queries {
                let last = (self.tiles.last_visible(q) + 1).saturating_sub(token).min(rows.len());
                all &= last == rows.len();
                self.last[q] = last as f32 - 1.0;
            }
            if !all {
                panels::hide(self.plan.isa, &self.last, scores);
            }
        }
    }

    /// Step 3, second half.
    fn soften(&mut self, chunk: Chunk) {
        let isa = self.plan.isa;
        let mut softmax = Softmax {
            reference: &mut self.reference,
            sum: &mut self.sum,
            factors: &mut self.factors,
            added: &mut self.added,
        };
        panels::soften(isa, &mut self.scores[..chunk.count * self.width], &mut softmax);
        if self.factors.iter().any(|factor| *factor != 1.0) {
            panels::multiply_columns(isa, &self.factors, &mut self.output);
            if self.values.block.is_some() {
                panels::multiply_columns(isa, &self.factors, &mut self.packed_output);
                panels::multiply_columns(isa, &self.factors, &mut self.packed_weights);
            }
        }
    }

    /// Step 4.
    fn weigh(&mut self, chunk: Chunk) {
        let (isa, width) = (self.plan.isa, self.width);
        let codec = self.tiles.codec(true);
        if !self.tiles.is_packed(chunk, true) {
            let channels = codec.layout.head_dim;
            for (start, count) in tiles(chunk.count, channels) {
                self.tiles.load(chunk, true, start, count);
                let product = Product { rows: channels, terms: count, row_stride: 1, term_stride: channels, width };
                let weights = &self.scores[start * width..];
                panels::add_product(isa, &product, &self.tiles.tile, weights, None, &mut self.output);
            }
            return;
        }
        if self.values.differs_at(codec, chunk.first) {
            self.unfold_output();
            self.values.turn_to(codec, self.job.kv_head, self.tiles.stream(true), chunk.first);
        }
        self.tiles.load_metadata(chunk, true);
        if let Some(steps) = self.plan.value_steps {
            for start in (0..chunk.count).step_by(WEIGHED_ROWS) {
                self.weigh_words(chunk, steps, start, WEIGHED_ROWS.min(chunk.count - start));
            }
        } else {
            self.weigh_levels(chunk, 0, chunk.count, 0..codec.layout.groups());
        }
        self.add_weights(chunk);
    }

    /// Some packed rows of a chunk, and some groups of their channels, by their levels in f32.
    fn weigh_levels(&mut self, chunk: Chunk, first: usize, count: usize, groups: Range<usize>) {
        let (isa, width, codec) = (self.plan.isa, self.width, self.tiles.codec(true));
        let channels = codec.stored_channels();
        for (start, count) in tiles(count, channels).map(|(start, count)| (first + start, count)) {
            self.tiles.load(chunk, true, start, count);
            for g in groups.clone() {
                self.scale_weights(g, start, count);
                let own = group_channels(codec, g);
                let product = Product { rows: own.len(), terms: count, row_stride: 1, term_stride: channels, width };
                let (tile, output) = (&self.tiles.tile[own.start..], &mut self.packed_output[own.start * width..]);
                panels::add_product(isa, &product, tile, &self.scaled, None, output);
            }
        }
    }

    /// Packed rows of a chunk by words; groups in which a weight with its scale is not finite by their levels.
    fn weigh_words(&mut self, chunk: Chunk, WordSteps { unit, .. }: WordSteps, first: usize, count: usize) {
        let (isa, width, codec) = (self.plan.isa, self.width, self.tiles.codec(true));
        let channels = codec.stored_channels();
        for (start, count) in tiles(count, channels) {
            self.tiles.load(chunk, true, first + start, count);
            let words = &mut self.words.tile[start / 2 * channels..];
            panel_words::value_words(isa, &self.tiles.tile[..count * channels], channels, unit, words);
        }
        for g in 0..codec.layout.groups() {
            let Words { tile, weights, weight_units: units, .. } = &mut self.words;
            let (from, scales) = (&self.scores[first * width..], &self.tiles.scales[g * CHUNK + first..][..count]);
            let (from, scaled) = (&from[..count * width], &mut self.scaled[..count * width]);
            if !panel_words::weight_words(isa, from, scales, scaled, weights, units) {
                self.weigh_levels(chunk, first, count, g..g + 1);
                continue;
            }
            let own = group_channels(codec, g);
            let terms = count.div_ceil(2);
            let product = Product { rows: own.len(), terms, row_stride: 1, term_stride: channels, width };
            let output = &mut self.packed_output[own.start * width..];
            let factors = Factors { scales: None, unit, units };
            panel_words::add_product(isa, &product, &factors, &tile[own.start..], weights, output);
        }
    }

    /// scaled = weights · a for one group of some rows.
    fn scale_weights(&mut self, g: usize, start: usize, count: usize) {
        let width = self.width;
        let weights = &self.scores[start * width..][..count * width];
        let scales = &self.tiles.scales[g * CHUNK + start..][..count];
        panels::scale_weights(self.plan.isa, weights, scales, &mut self.scaled[..count * width]);
    }

    /// Σ p of a chunk, and Σ p·z where there are zero points.
    fn add_weights(&mut self, chunk: Chunk) {
        let (isa, width, layout) = (self.plan.isa, self.width, &self.tiles.codec(true).layout);
        let weights = &self.scores[..chunk.count * width];
        self.packed_weights.iter_mut().zip(&*self.added).for_each(|(weight, added)| *weight += added);
        if layout.symmetric {
            return;
        }
        for (g, group) in self.packed_output.chunks_exact_mut(layout.group_size * width).enumerate() {
            let zeros = &mut self.factors;
            zeros.fill(0.0);
            panels::add_rows(isa, weights, &self.tiles.zeros[g * CHUNK..][..chunk.count], zeros);
            let product = Product { rows: layout.group_size, terms: 1, row_stride: 0, term_stride: 0, width };
            panels::add_product(isa, &product, &[1.0], zeros, None, group);
        }
    }

    /// output += s ∘ R π⁻¹(packed output) + (Σ p)·μ, or B·(packed output) + (Σ p)·μ; what waited is done with then.
    fn unfold_output(&mut self) {
        if self.values.block.is_none() {
            return;
        }
        let (isa, width, codec) = (self.plan.isa, self.width, self.tiles.codec(true));
        let channels = codec.layout.head_dim;
        let between = &mut self.between[..channels * width];
        if let Some(matrix) = codec.matrix(self.job.kv_head) {
            between.fill(0.0);
            let terms = codec.stored_channels();
            let product = Product { rows: channels, terms, row_stride: channels, term_stride: 1, width };
            panels::add_product(isa, &product, matrix.inverse(), &self.packed_output, None, between);
        } else {
            match codec.permutation(self.job.kv_head) {
                Some(Permutation { order }) => {
                    for (row, &channel) in self.packed_output.chunks_exact(width).zip(order) {
                        between[usize::from(channel) * width..][..width].copy_from_slice(row);
                    }
                }
                None => between.copy_from_slice(&self.packed_output),
            }
            if codec.rotation == Rotation::Hadamard {
                panels::rotate(isa, channels, between);
            }
        }
        let (scale, shift) = (&self.values.scale, &self.values.shift);
        panels::add_affine(isa, between, scale, &self.packed_weights, shift, &mut self.output);
        self.packed_output.fill(0.0);
        self.packed_weights.fill(0.0);
    }
}

/// A row becomes column `q` of a panel.
fn write_column(row: &[f32], q: usize, width: usize, panel: &mut [f32]) {
    panel[q..].iter_mut().step_by(width).zip(row).for_each(|(target, value)| *target = *value);
}

//! One job of a call: the arithmetic of a kv head, a block of its queries and a range of chunks (the steps are at the head of `attend.rs`).
//!
//! Shapes: rows of queries and outputs `[queries, width]`, scores `[queries, CHUNK]`, scales and zero points `[groups, CHUNK]`.

use std::ops::Range;
use std::sync::Arc;

use super::tiles::{Affinity, Buffer, Tiles, Visible, group_channels, tiles};
use super::{CHUNK, Chunk, Job, LevelWords, Plan, State};
use crate::backend::simd::{LANES, matmul, part_words, rows, vectors, words};
use crate::format::{Format, PAGE_ROWS};
use crate::transform::TurningMean;

/// Buffers of one job: rows of queries `[queries, width]`, of scores `[queries, CHUNK]`.
pub(super) struct Worker<'a> {
    plan: &'a Plan<'a>,
    job: Job,
    tiles: Tiles<'a>,
    /// `[queries, key width]`: the queries times the softmax scale, as they are and folded.
    plain: Buffer,
    folded: Buffer,
    /// q·μ of each query for the present shift.
    shifts: Buffer,
    /// What the noise of packed keys adds to a score on average, per unit of the squared scale.
    noise: Buffer,
    /// For keys whose mean turns.
    turning: Option<Turning<'a>>,
    /// Shift and scale of keys and values in the present block.
    keys: Affinity,
    values: Affinity,
    scores: Buffer,
    /// Scores of one group of a tile, and weights times a scale.
    partial: Buffer,
    sums: Buffer,
    words: Words<'a>,
    /// Weighted sums of levels that are not yet back in the model's space, and the weights they have.
    packed_output: Buffer,
    packed_weights: Buffer,
    /// One row on its way through a transform.
    row: Buffer,
    state: State,
}

/// The products of a job's queries with a mean that turns.
struct Turning<'a> {
    mean: &'a TurningMean,
    /// Of the spans that the past reaches.
    spans: Arc<Vec<f32>>,
    /// Position of the first packed row.
    origin: i64,
    /// `[queries, waves]`
    amplitudes: Buffer,
    scratch: Buffer,
}

impl<'a> Turning<'a> {
    fn new(plan: &Plan<'a>, job: Job) -> Option<Self> {
        let mean = plan.turning_mean(job)?;
        let (origin, spans) = (plan.first_position(job), plan.spans(job, mean));
        let waves = || Buffer::zeroed(job.queries * mean.waves());
        Some(Self { mean, spans, origin, amplitudes: waves(), scratch: waves() })
    }
}

/// What products of 16-bit integers need, where the call has tables for them.
struct Words<'a> {
    keys: Option<&'a LevelWords>,
    values: Option<&'a LevelWords>,
    /// `[queries, words of one]` of the folded queries, and the unit of each.
    queries: Vec<u32>,
    query_units: Vec<f32>,
    /// Whether they stand for all queries.
    queries_hold: bool,
    /// `[queries, WEIGHED_ROWS]`, and the unit of each query's.
    weights: Vec<u16>,
    weight_units: Vec<f32>,
}

impl<'a> Words<'a> {
    fn new(plan: &'a Plan, queries: usize) -> Self {
        let (keys, values) = (plan.key_words.as_ref(), plan.value_words.as_ref());
        let room = |wanted: bool, length: usize| if wanted { length * queries } else { 0 };
        Self {
            queries: vec![0; queries * keys.map_or(0, |keys| keys.query_words(plan.key_width))],
            query_units: vec![0.0; room(keys.is_some(), 1)],
            queries_hold: false,
            weights: vec![0; room(values.is_some(), words::WEIGHED_ROWS)],
            weight_units: vec![0.0; room(values.is_some(), 1)],
            keys,
            values,
        }
    }
}

impl<'a> Worker<'a> {
    pub(super) fn new(plan: &'a Plan<'a>, job: Job) -> Self {
        let (keys, values, n) = (plan.key_width, plan.value_width, job.queries);
        let groups = plan.layer.spec().keys.layout.groups().max(plan.layer.spec().values.layout.groups());
        Self {
            plan,
            job,
            tiles: Tiles::new(plan, job),
            plain: Buffer::zeroed(n * keys),
            folded: Buffer::zeroed(n * keys),
            shifts: Buffer::zeroed(n),
            noise: Buffer::zeroed(n),
            turning: Turning::new(plan, job),
            keys: Affinity::new(keys),
            values: Affinity::new(values),
            scores: Buffer::zeroed(n * CHUNK),
            partial: Buffer::zeroed(n * CHUNK),
            sums: Buffer::zeroed(n * groups),
            words: Words::new(plan, n),
            packed_output: Buffer::zeroed(n * values),
            packed_weights: Buffer::zeroed(n),
            row: Buffer::zeroed(keys.max(values)),
            state: State { maximum: vec![f32::NEG_INFINITY; n], sum: vec![0.0; n], output: Buffer::zeroed(n * values) },
        }
    }

    pub(super) fn run(mut self) -> State {
        let width = self.plan.key_width;
        for q in 0..self.job.queries {
            let (head, position) = self.plan.query_at(self.job, q);
            let row = &mut self.plain[q * width..][..width];
            self.plan.call.query.read_row_f32(self.job.batch, head, position, row);
            vectors::scale(self.plan.isa, row, self.plan.call.scale);
        }
        for index in self.job.first_chunk..self.job.first_chunk + self.job.chunks {
            let chunk = self.plan.chunks[index];
            if self.tiles.tokens_of(chunk).rows.is_empty() || self.tiles.sees_nothing(chunk) {
                continue;
            }
            self.score(chunk);
            self.cap_and_mask(chunk);
            self.soften(chunk);
            self.weigh(chunk);
        }
        self.unfold_output();
        self.state
    }

    /// Steps 1 and 2: scores `[queries, CHUNK]` of a chunk.
    fn score(&mut self, chunk: Chunk) {
        let codec = self.tiles.codec(false);
        if !self.tiles.is_packed(chunk, false) {
            let width = codec.layout.head_dim;
            for (start, count) in tiles(chunk.count, width) {
                self.tiles.load(chunk, false, start, count);
                self.product(width, 0..width, count, false);
                self.keep_scores(start, count);
            }
            return;
        }
        self.fold_queries(chunk);
        self.tiles.load_metadata(chunk, false);
        self.begin_packed_scores(chunk);
        if self.words.queries_hold {
            return self.score_words(chunk);
        }
        let width = codec.stored_channels();
        for (start, count) in tiles(chunk.count, width) {
            self.tiles.load(chunk, false, start, count);
            for g in 0..codec.layout.groups() {
                self.product(width, group_channels(codec, g), count, true);
                self.keep_packed_scores(g, start, count);
            }
        }
    }

    /// Scores of packed rows by words.
    fn score_words(&mut self, chunk: Chunk) {
        for (start, count) in pieces(chunk) {
            let codes = self.tiles.codes(false, chunk.first + start);
            let Words { queries, query_units: units, .. } = &self.words;
            let sizes = words::ScoreSizes { queries: self.job.queries, rows: count, score_stride: CHUNK };
            let (isa, scores) = (self.plan.isa, &mut self.partial);
            match self.words.keys.expect("queries hold only for keys with a table") {
                LevelWords::Plain(table) => {
                    let product = words::WordScores { table, width: self.plan.key_width, sizes };
                    words::score_words(isa, &product, queries, units, codes, scores);
                }
                LevelWords::Parts(table) => {
                    let product = part_words::PartScores { table, sizes };
                    part_words::score_words(isa, &product, queries, units, codes, scores);
                }
            }
            self.keep_packed_scores(0, start, count);
            self.tiles.prefetch_past(false, chunk.first + start + count, count);
        }
    }

    /// `partial[q][t]` for some channels of the present tile of `width`.
    fn product(&mut self, width: usize, channels: Range<usize>, rows: usize, folded: bool) {
        let product = matmul::ScoreTile {
            queries: self.job.queries,
            query_stride: self.plan.key_width,
            rows,
            width,
            first: channels.start,
            count: channels.len(),
            score_stride: CHUNK,
        };
        let queries = if folded { &self.folded } else { &self.plain };
        matmul::score_tile(self.plan.isa, &product, queries, &self.tiles.tile, &mut self.partial);
    }

    /// What a packed row scores beside its codes: q·μ, less what its noise adds.
    fn begin_packed_scores(&mut self, chunk: Chunk) {
        let (n, isa) = (self.job.queries, self.plan.isa);
        for q in 0..n {
            self.scores[q * CHUNK..][..chunk.count].fill(self.shifts[q]);
        }
        if let Some(turning) = &mut self.turning {
            let Turning { mean, spans, amplitudes, scratch, .. } = turning;
            let (first, count) = (chunk.first, chunk.count);
            let whole = count.next_multiple_of(LANES);
            (0..n).for_each(|q| self.scores[q * CHUNK..][count..whole].fill(0.0));
            mean.score_span(isa, spans, first, count, amplitudes, scratch, &mut self.scores, CHUNK);
        }
        if !self.tiles.codec(false).noise.is_empty() {
            let scales = &self.tiles.scales[..chunk.count];
            for q in 0..n {
                let squares = &mut self.partial[..chunk.count];
                squares.iter_mut().zip(scales).for_each(|(square, scale)| *square = scale * scale);
                vectors::add_multiple(isa, squares, -self.noise[q], &mut self.scores[q * CHUNK..][..chunk.count]);
            }
        }
    }

    fn keep_scores(&mut self, start: usize, count: usize) {
        for q in 0..self.job.queries {
            self.scores[q * CHUNK + start..][..count].copy_from_slice(&self.partial[q * CHUNK..][..count]);
        }
    }

    /// scores += a·partial + z·Σq.
    fn keep_packed_scores(&mut self, g: usize, start: usize, count: usize) {
        let groups = self.tiles.codec(false).layout.groups();
        let symmetric = self.tiles.codec(false).layout.symmetric;
        let scales = &self.tiles.scales[g * CHUNK + start..][..count];
        let zeros = &self.tiles.zeros[g * CHUNK + start..][..count];
        for q in 0..self.job.queries {
            let from = &self.partial[q * CHUNK..][..count];
            let to = &mut self.scores[q * CHUNK + start..][..count];
            vectors::add_scaled(self.plan.isa, from, scales, to);
            if !symmetric {
                let sum = self.sums[q * groups + g];
                for (to, zero) in to.iter_mut().zip(zeros) {
                    *to += zero * sum;
                }
            }
        }
    }

    /// q' = (R(s∘q))_π or Bᵀq, its sum over each group, and q·μ.
    fn fold_queries(&mut self, chunk: Chunk) {
        let codec = self.tiles.codec(false);
        if !self.keys.turn_to(codec, self.job.kv_head, self.tiles.stream(false), chunk.first) {
            return;
        }
        let (width, groups) = (codec.layout.head_dim, codec.layout.groups());
        let (isa, row) = (self.plan.isa, &mut self.row[..width]);
        for q in 0..self.job.queries {
            let query = &self.plain[q * width..][..width];
            let folded = &mut self.folded[q * width..][..width];
            self.shifts[q] = vectors::dot(isa, query, &self.keys.shift);
            if let Some(Turning { mean, spans, origin, amplitudes, .. }) = &mut self.turning {
                let waves = mean.waves();
                mean.amplitudes(query, spans, *origin, &mut amplitudes[q * waves..][..waves]);
            }
            if let Some(matrix) = codec.matrix(self.job.kv_head) {
                matrix.fold(isa, query, folded);
                let noise = codec.noise.iter().zip(&*folded).map(|(noise, value)| noise * value * value);
                self.noise[q] = 0.5 * noise.sum::<f32>();
                continue;
            }
            vectors::multiply(isa, query, &self.keys.scale, row);
            rows::rotate(isa, codec.rotation, row);
            match codec.permutation(self.job.kv_head) {
                Some(permutation) => permutation.apply(row, folded),
                None => folded.copy_from_slice(row),
            }
            for (g, group) in folded.chunks_exact(codec.layout.group_size).enumerate() {
                self.sums[q * groups + g] = vectors::sum(isa, group);
            }
        }
        if let Words { keys: Some(table), queries, query_units, .. } = &mut self.words {
            self.words.queries_hold = match table {
                LevelWords::Plain(_) => words::query_words(isa, &self.folded, width, queries, query_units),
                LevelWords::Parts(table) => {
                    part_words::query_words(isa, table, &self.folded, width, queries, query_units)
                }
            };
        }
    }

    /// Step 3, first half.
    fn cap_and_mask(&mut self, chunk: Chunk) {
        let call = self.plan.call;
        let Visible { token, rows } = self.tiles.tokens_of(chunk);
        if rows == (0..chunk.count) && call.softcap.is_none() && call.mask.is_none() && !call.causal {
            return;
        }
        let mut bias = [0.0f32; CHUNK];
        let token = token + rows.start;
        for q in 0..self.job.queries {
            let scores = &mut self.scores[q * CHUNK..][..chunk.count];
            scores[..rows.start].fill(f32::NEG_INFINITY);
            scores[rows.end..].fill(f32::NEG_INFINITY);
            let scores = &mut scores[rows.clone()];
            if let Some(softcap) = call.softcap {
                for score in &mut *scores {
                    *score = softcap * (*score / softcap).tanh();
                }
            }
            if let Some(mask) = &call.mask {
                let (head, position) = self.plan.query_at(self.job, q);
                let bias = &mut bias[..scores.len()];
                mask.read_bias(self.job.batch, head, position, token, bias);
                // A hidden token stays hidden even if its score is not a number.
                for (score, bias) in scores.iter_mut().zip(bias) {
                    *score = if *bias == f32::NEG_INFINITY { f32::NEG_INFINITY } else { *score + *bias };
                }
            }
            if call.causal {
                let (_, position) = self.plan.query_at(self.job, q);
                let visible = (self.plan.tokens - self.plan.length + position + 1).saturating_sub(token);
                if visible < scores.len() {
                    scores[visible..].fill(f32::NEG_INFINITY);
                }
            }
        }
    }

    /// Step 3, second half: scores become weights; what came before is scaled to the new maximum.
    fn soften(&mut self, chunk: Chunk) {
        let isa = self.plan.isa;
        let width = self.plan.value_width;
        for q in 0..self.job.queries {
            let scores = &mut self.scores[q * CHUNK..][..chunk.count];
            let old = self.state.maximum[q];
            let maximum = vectors::maximum(isa, scores).max(old);
            if maximum == f32::NEG_INFINITY && !scores.iter().any(|score| score.is_nan()) {
                scores.fill(0.0);
                continue;
            }
            let sum = vectors::exponentiate(isa, scores, maximum);
            let factor = if old == f32::NEG_INFINITY { 0.0 } else { (old - maximum).exp() };
            self.state.sum[q] = self.state.sum[q] * factor + sum;
            if factor != 1.0 {
                vectors::scale(isa, &mut self.state.output[q * width..][..width], factor);
                if self.values.block.is_some() {
                    vectors::scale(isa, &mut self.packed_output[q * width..][..width], factor);
                    self.packed_weights[q] *= factor;
                }
            }
            self.state.maximum[q] = maximum;
        }
    }

    /// Step 4.
    fn weigh(&mut self, chunk: Chunk) {
        let codec = self.tiles.codec(true);
        let width = codec.layout.head_dim;
        if !self.tiles.is_packed(chunk, true) {
            for (start, count) in tiles(chunk.count, width) {
                self.tiles.load(chunk, true, start, count);
                let product = self.weighing(width, 0..width, count);
                let weights = &self.scores[start..];
                matmul::weigh_tile(self.plan.isa, &product, weights, &self.tiles.tile, &mut self.state.output);
            }
            return;
        }
        if self.values.differs_at(codec, chunk.first) {
            self.unfold_output();
            self.values.turn_to(codec, self.job.kv_head, self.tiles.stream(true), chunk.first);
        }
        self.tiles.load_metadata(chunk, true);
        if self.words.values.is_some() {
            for (start, count) in pieces(chunk) {
                if !self.weigh_words(chunk, start, count) {
                    self.weigh_levels(chunk, start, count);
                }
            }
        } else {
            self.weigh_levels(chunk, 0, chunk.count);
        }
        self.add_weights(chunk);
    }

    /// Some packed rows of a chunk by their levels in f32.
    fn weigh_levels(&mut self, chunk: Chunk, first: usize, count: usize) {
        let codec = self.tiles.codec(true);
        let stored = codec.stored_channels();
        for (start, count) in tiles(count, stored).map(|(start, count)| (first + start, count)) {
            self.tiles.load(chunk, true, start, count);
            for g in 0..codec.layout.groups() {
                let product = self.weighing(stored, group_channels(codec, g), count);
                self.scale_weights(g, start, count);
                matmul::weigh_tile(self.plan.isa, &product, &self.partial, &self.tiles.tile, &mut self.packed_output);
            }
        }
    }

    /// Rows of one page by words; false, and nothing added, if a weight with its scale is not finite.
    fn weigh_words(&mut self, chunk: Chunk, start: usize, count: usize) -> bool {
        self.scale_weights(0, start, count);
        let (layout, stride) = (&self.tiles.codec(true).layout, words::WEIGHED_ROWS);
        let codes = self.tiles.codes(true, chunk.first + start);
        let Words { values: Some(table), weights, weight_units, .. } = &mut self.words else { return false };
        for (q, unit) in weight_units.iter_mut().enumerate() {
            let target = &mut weights[q * stride..][..count.next_multiple_of(2)];
            match words::weight_words(self.plan.isa, &self.partial[q * CHUNK..][..count], target) {
                Some(found) => *unit = found,
                None => return false,
            }
        }
        let (isa, queries, output) = (self.plan.isa, self.job.queries, &mut self.packed_output);
        match table {
            LevelWords::Plain(table) => {
                let (ternary, width) = (layout.format == Format::Ternary, layout.head_dim);
                let product = words::WordWeights { table, ternary, queries, rows: count, width, weight_stride: stride };
                words::weigh_words(isa, &product, weights, weight_units, codes, output);
            }
            LevelWords::Parts(table) => {
                let product = part_words::PartWeights {
                    table,
                    queries,
                    rows: count,
                    weight_stride: stride,
                    output_stride: self.plan.value_width,
                };
                part_words::weigh_words(isa, &product, weights, weight_units, codes, output);
            }
        }
        self.tiles.prefetch_past(true, chunk.first + start + count, count);
        true
    }

    /// The product of weights with some channels of the present tile of `width`.
    fn weighing(&self, width: usize, channels: Range<usize>, rows: usize) -> matmul::WeighTile {
        matmul::WeighTile {
            queries: self.job.queries,
            weight_stride: CHUNK,
            rows,
            width,
            first: channels.start,
            count: channels.len(),
            output_first: channels.start,
            output_stride: self.plan.value_width,
        }
    }

    /// partial = weights · a for one group of a tile.
    fn scale_weights(&mut self, g: usize, start: usize, count: usize) {
        let scales = &self.tiles.scales[g * CHUNK + start..][..count];
        for q in 0..self.job.queries {
            let weights = &self.scores[q * CHUNK + start..][..count];
            let scaled = &mut self.partial[q * CHUNK..][..count];
            vectors::scale_weights(self.plan.isa, weights, scales, scaled);
        }
    }

    /// Σ p of a chunk, and Σ p·z where there are zero points.
    fn add_weights(&mut self, chunk: Chunk) {
        let layout = &self.tiles.codec(true).layout;
        let width = layout.head_dim;
        for q in 0..self.job.queries {
            let weights = &self.scores[q * CHUNK..][..chunk.count];
            self.packed_weights[q] += vectors::sum(self.plan.isa, weights);
            if layout.symmetric {
                continue;
            }
            let packed = &mut self.packed_output[q * width..][..width];
            for (g, group) in packed.chunks_exact_mut(layout.group_size).enumerate() {
                let zeros = &self.tiles.zeros[g * CHUNK..][..chunk.count];
                let zero: f32 = weights.iter().zip(zeros).map(|(weight, zero)| weight * zero).sum();
                for value in group {
                    *value += zero;
                }
            }
        }
    }

    /// output += s ∘ R π⁻¹(packed output) + (Σ p)·μ, or B·(packed output) + (Σ p)·μ; what waited is done with then.
    fn unfold_output(&mut self) {
        if self.values.block.is_none() {
            return;
        }
        let codec = self.tiles.codec(true);
        let width = codec.layout.head_dim;
        let (isa, row) = (self.plan.isa, &mut self.row[..width]);
        for q in 0..self.job.queries {
            let packed = &self.packed_output[q * width..][..width];
            if let Some(matrix) = codec.matrix(self.job.kv_head) {
                matrix.restore(isa, packed, row);
            } else {
                match codec.permutation(self.job.kv_head) {
                    Some(permutation) => permutation.invert(packed, row),
                    None => row.copy_from_slice(packed),
                }
                rows::rotate(isa, codec.rotation, row);
            }
            let output = &mut self.state.output[q * width..][..width];
            let weight = self.packed_weights[q];
            vectors::add_affine(isa, row, &self.values.scale, weight, &self.values.shift, output);
        }
        self.packed_output.fill(0.0);
        self.packed_weights.fill(0.0);
    }
}

/// First row and number of rows of the pieces of a packed chunk that words are made for: each of one page.
fn pieces(chunk: Chunk) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let start = done;
        let page_left = PAGE_ROWS - (chunk.first + start) % PAGE_ROWS;
        done = (start + words::WEIGHED_ROWS.min(page_left)).min(chunk.count);
        (start < done).then_some((start, done - start))
    })
}

//! One job of a call: the arithmetic of a kv head, a block of its queries and a range of chunks (the steps are at the head of `attend.rs`).
//!
//! Shapes: rows of queries and outputs `[queries, width]`, scores `[queries, CHUNK]`, scales and zero points `[groups, CHUNK]`.

use std::ops::{Deref, DerefMut, Range};

use super::{CHUNK, Chunk, Job, Plan, Region, State};
use crate::backend::simd::{levels, matmul, prefetch, rows, vectors};
use crate::codec::Codec;
use crate::format::{Format, PAGE_ROWS, RowLayout};
use crate::layer::{Head, Stream};
use crate::transform::Source;

/// f32 that begin at a cache line: a vector of 16 that straddles two costs twice.
pub(super) struct Buffer {
    data: Vec<f32>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub(super) fn zeroed(len: usize) -> Self {
        let data = vec![0.0; len + 15];
        let start = data.as_ptr().align_offset(64).min(15);
        Self { data, start, len }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.start..][..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..][..self.len]
    }
}

/// f32 of a decoded tile: 16 KiB.
const TILE_FLOATS: usize = 4096;

/// Buffers of one job: rows of queries `[queries, width]`, of scores `[queries, CHUNK]`.
pub(super) struct Worker<'a> {
    plan: &'a Plan<'a>,
    job: Job,
    head: &'a Head,
    /// `[queries, key width]`: the queries times the softmax scale, as they are and folded.
    plain: Buffer,
    folded: Buffer,
    /// q·μ of each query for the present shift.
    shifts: Buffer,
    /// Shift and scale of keys and values in the present block.
    keys: Affinity,
    values: Affinity,
    tile: Buffer,
    scores: Buffer,
    /// Scores of one group of a tile, and weights times a scale.
    partial: Buffer,
    scales: Buffer,
    zeros: Buffer,
    /// A page's metadata as it is stored, `[rows, scales and zero points]`.
    numbers: Buffer,
    sums: Buffer,
    packed_output: Buffer,
    /// One row on its way through a transform.
    row: Buffer,
    state: State,
}

/// The rows of a chunk that queries may see, and the token that its row 0 is, or would be.
struct Visible {
    token: usize,
    rows: Range<usize>,
}

/// Shift and scale of every channel, expanded; `block` says whose.
struct Affinity {
    shift: Vec<f32>,
    scale: Vec<f32>,
    block: Option<usize>,
}

impl Affinity {
    fn new(width: usize) -> Self {
        Self { shift: vec![0.0; width], scale: vec![1.0; width], block: None }
    }

    /// Turns to the block of row `row`; true if that changed anything.
    fn turn_to(&mut self, codec: &Codec, kv_head: usize, stream: &Stream, row: usize) -> bool {
        let block = match &codec.source {
            Source::Static(_) => 0,
            Source::Block(rule) => row / rule.rows,
        };
        if self.block.replace(block) == Some(block) {
            return false;
        }
        match (&codec.source, codec.static_affine(kv_head)) {
            (Source::Block(rule), _) => {
                stream.past.block(row, rule.rows).expand_into(&mut self.shift, &mut self.scale);
            }
            (_, Some(affine)) => {
                self.shift.copy_from_slice(&affine.shift);
                self.scale.copy_from_slice(&affine.scale);
            }
            (_, None) => unreachable!("a static codec serves every head"),
        }
        true
    }
}

impl<'a> Worker<'a> {
    pub(super) fn new(plan: &'a Plan<'a>, job: Job) -> Self {
        let (keys, values, n) = (plan.key_width, plan.value_width, job.queries);
        let groups = plan.layer.spec().keys.layout.groups().max(plan.layer.spec().values.layout.groups());
        Self {
            plan,
            job,
            head: plan.layer.head(job.batch, job.kv_head),
            plain: Buffer::zeroed(n * keys),
            folded: Buffer::zeroed(n * keys),
            shifts: Buffer::zeroed(n),
            keys: Affinity::new(keys),
            values: Affinity::new(values),
            tile: Buffer::zeroed(TILE_FLOATS.max(8 * keys.max(values)) + levels::SLACK),
            scores: Buffer::zeroed(n * CHUNK),
            partial: Buffer::zeroed(n * CHUNK),
            scales: Buffer::zeroed(groups * CHUNK),
            zeros: Buffer::zeroed(groups * CHUNK),
            numbers: Buffer::zeroed(2 * groups * PAGE_ROWS),
            sums: Buffer::zeroed(n * groups),
            packed_output: Buffer::zeroed(n * values),
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
            if self.tokens_of(chunk).rows.is_empty() || self.sees_nothing(chunk) {
                continue;
            }
            self.score(chunk);
            self.cap_and_mask(chunk);
            self.soften(chunk);
            self.weigh(chunk);
        }
        self.state
    }

    /// All rows of a chunk are tokens in their order, unless the sequence begins with padding.
    fn tokens_of(&self, chunk: Chunk) -> Visible {
        let padding = self.plan.layer.padding(self.job.batch);
        let (stored, sinks) = (self.plan.stored, self.plan.layer.spec().sinks);
        let row_of = |token: usize| token.saturating_sub(chunk.token).min(chunk.count);
        match chunk.region {
            _ if padding == 0 => Visible { token: chunk.token, rows: 0..chunk.count },
            Region::Sinks => {
                let token = chunk.token + padding;
                Visible { token, rows: 0..stored.saturating_sub(token).min(chunk.count) }
            }
            Region::Fresh => Visible { token: chunk.token, rows: row_of(padding)..chunk.count },
            Region::Past | Region::Window => Visible { token: chunk.token, rows: row_of(padding + sinks)..chunk.count },
        }
    }

    /// The last token a query may see.
    fn last_visible(&self, q: usize) -> usize {
        if self.plan.call.causal {
            let (_, position) = self.plan.query_at(self.job, q);
            self.plan.tokens - self.plan.length + position
        } else {
            self.plan.tokens - 1
        }
    }

    fn sees_nothing(&self, chunk: Chunk) -> bool {
        (0..self.job.queries).all(|q| self.last_visible(q) < chunk.token)
    }

    fn codec(&self, values: bool) -> &'a Codec {
        let spec = self.plan.layer.spec();
        if values { &spec.values } else { &spec.keys }
    }

    /// The next tile of a chunk: rows `start .. start + count` of it, decoded to levels or widened.
    fn load_tile(&mut self, chunk: Chunk, values: bool, start: usize, count: usize) {
        let codec = self.codec(values);
        let width = codec.layout.head_dim;
        let stream = if values { &self.head.values } else { &self.head.keys };
        let tile = &mut self.tile[..count * width + levels::SLACK];
        let plain = ..count * width;
        let first = chunk.first + start;
        match chunk.region {
            Region::Sinks => {
                levels::decode_plain(
                    self.plan.isa,
                    stream.sinks.rows(first, count),
                    stream.sinks.dtype,
                    &mut tile[plain],
                );
            }
            Region::Window => {
                levels::decode_plain(
                    self.plan.isa,
                    stream.window.rows(first, count),
                    stream.window.dtype,
                    &mut tile[plain],
                );
            }
            Region::Fresh => {
                let fresh = self.plan.call.fresh.as_ref().expect("a fresh chunk has fresh rows");
                let rows = if values { &fresh.1 } else { &fresh.0 };
                for (i, row) in tile[plain].chunks_exact_mut(width).enumerate() {
                    rows.read_row_f32(self.job.batch, self.job.kv_head, first + i, row);
                }
            }
            Region::Past => {
                // A tile may run over the end of a page.
                let mut done = 0;
                while done < count {
                    let (page, row) = ((first + done) / PAGE_ROWS, (first + done) % PAGE_ROWS);
                    let rows = (count - done).min(PAGE_ROWS - row);
                    let codes = &stream.past.page(page).codes(&codec.layout)[row * codec.layout.code_bytes..];
                    let target = &mut tile[done * width..(done + rows) * width + levels::SLACK];
                    if let Format::Raw(dtype) = codec.layout.format {
                        levels::decode_plain(
                            self.plan.isa,
                            &codes[..rows * codec.layout.code_bytes],
                            dtype,
                            &mut target[..rows * width],
                        );
                    } else {
                        levels::decode_levels(self.plan.isa, &codec.layout, &codec.codebook, codes, rows, target);
                    }
                    done += rows;
                }
                // The next tile comes after this one's product, about a memory latency away.
                let next = first + count;
                if next < stream.past.len() {
                    let (page, row) = (stream.past.page(next / PAGE_ROWS), next % PAGE_ROWS);
                    let rows = count.min(PAGE_ROWS - row);
                    let bytes = codec.layout.code_bytes;
                    prefetch(&page.codes(&codec.layout)[row * bytes..(row + rows) * bytes]);
                    if row == 0 {
                        prefetch(page.metadata(&codec.layout));
                    }
                }
            }
        }
    }

    /// Scales and zero points of a packed chunk, `[groups, CHUNK]`.
    fn load_metadata(&mut self, chunk: Chunk, values: bool) {
        let codec = self.codec(values);
        let layout = &codec.layout;
        let stream = if values { &self.head.values } else { &self.head.keys };
        let (groups, per_row) = (layout.groups(), layout.metadata_bytes / layout.metadata.size());
        let mut done = 0;
        while done < chunk.count {
            let row = chunk.first + done;
            let count = (chunk.count - done).min(PAGE_ROWS - row % PAGE_ROWS);
            let bytes = &stream.past.page(row / PAGE_ROWS).metadata(layout)[row % PAGE_ROWS * layout.metadata_bytes..];
            let bytes = &bytes[..count * layout.metadata_bytes];
            if per_row == 1 {
                let scales = &mut self.scales[done..done + count];
                levels::decode_metadata(self.plan.isa, layout.metadata, bytes, scales);
            } else {
                let numbers = &mut self.numbers[..count * per_row];
                levels::decode_metadata(self.plan.isa, layout.metadata, bytes, numbers);
                for (i, row) in numbers.chunks_exact(per_row).enumerate() {
                    for (g, number) in row.iter().enumerate() {
                        let target = if g < groups { &mut self.scales } else { &mut self.zeros };
                        target[g % groups * CHUNK + done + i] = *number;
                    }
                }
            }
            done += count;
        }
    }

    fn is_packed(&self, chunk: Chunk, values: bool) -> bool {
        chunk.region == Region::Past && !self.codec(values).is_raw()
    }

    /// Steps 1 and 2: scores `[queries, CHUNK]` of a chunk.
    fn score(&mut self, chunk: Chunk) {
        let layout = self.codec(false).layout;
        let packed = self.is_packed(chunk, false);
        if packed {
            self.fold_queries(chunk);
            self.load_metadata(chunk, false);
        }
        let step = TILE_FLOATS.max(8 * layout.head_dim) / layout.head_dim;
        for start in (0..chunk.count).step_by(step) {
            let count = step.min(chunk.count - start);
            self.load_tile(chunk, false, start, count);
            if !packed {
                self.product(&layout, 0, layout.head_dim, count, false);
                self.keep_scores(start, count);
                continue;
            }
            for g in 0..layout.groups() {
                self.product(&layout, g * layout.group_size, layout.group_size, count, true);
                self.keep_packed_scores(g, start, count);
            }
        }
    }

    /// `partial[q][t]` for the channels of one group of the present tile.
    fn product(&mut self, layout: &RowLayout, first: usize, channels: usize, rows: usize, folded: bool) {
        let product = matmul::ScoreTile {
            queries: self.job.queries,
            query_stride: layout.head_dim,
            rows,
            width: layout.head_dim,
            first,
            count: channels,
            score_stride: CHUNK,
        };
        let queries = if folded { &self.folded } else { &self.plain };
        matmul::score_tile(self.plan.isa, &product, queries, &self.tile, &mut self.partial);
    }

    fn keep_scores(&mut self, start: usize, count: usize) {
        for q in 0..self.job.queries {
            self.scores[q * CHUNK + start..][..count].copy_from_slice(&self.partial[q * CHUNK..][..count]);
        }
    }

    /// scores += a·partial + z·Σq, and q·μ with the first group.
    fn keep_packed_scores(&mut self, g: usize, start: usize, count: usize) {
        let groups = self.codec(false).layout.groups();
        let symmetric = self.codec(false).layout.symmetric;
        let scales = &self.scales[g * CHUNK + start..][..count];
        let zeros = &self.zeros[g * CHUNK + start..][..count];
        for q in 0..self.job.queries {
            let from = &self.partial[q * CHUNK..][..count];
            let to = &mut self.scores[q * CHUNK + start..][..count];
            if g == 0 {
                to.fill(self.shifts[q]);
            }
            vectors::add_scaled(self.plan.isa, from, scales, to);
            if !symmetric {
                let sum = self.sums[q * groups + g];
                for (to, zero) in to.iter_mut().zip(zeros) {
                    *to += zero * sum;
                }
            }
        }
    }

    /// q' = (R(s∘q))_π, its sum over each group, and q·μ.
    fn fold_queries(&mut self, chunk: Chunk) {
        let codec = self.codec(false);
        if !self.keys.turn_to(codec, self.job.kv_head, &self.head.keys, chunk.first) {
            return;
        }
        let (width, groups) = (codec.layout.head_dim, codec.layout.groups());
        let (isa, row) = (self.plan.isa, &mut self.row[..width]);
        for q in 0..self.job.queries {
            let query = &self.plain[q * width..][..width];
            self.shifts[q] = vectors::dot(isa, query, &self.keys.shift);
            vectors::multiply(isa, query, &self.keys.scale, row);
            rows::rotate(isa, codec.rotation, row);
            let folded = &mut self.folded[q * width..][..width];
            match codec.permutation(self.job.kv_head) {
                Some(permutation) => permutation.apply(row, folded),
                None => folded.copy_from_slice(row),
            }
            for (g, group) in folded.chunks_exact(codec.layout.group_size).enumerate() {
                self.sums[q * groups + g] = vectors::sum(isa, group);
            }
        }
    }

    /// Step 3, first half.
    fn cap_and_mask(&mut self, chunk: Chunk) {
        let call = self.plan.call;
        let mut bias = [0.0f32; CHUNK];
        let Visible { token, rows } = self.tokens_of(chunk);
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
            }
            self.state.maximum[q] = maximum;
        }
    }

    /// Step 4.
    fn weigh(&mut self, chunk: Chunk) {
        let layout = self.codec(true).layout;
        let packed = self.is_packed(chunk, true);
        if packed {
            self.load_metadata(chunk, true);
            self.packed_output.fill(0.0);
        }
        let step = TILE_FLOATS.max(8 * layout.head_dim) / layout.head_dim;
        let n = self.job.queries;
        for start in (0..chunk.count).step_by(step) {
            let count = step.min(chunk.count - start);
            self.load_tile(chunk, true, start, count);
            for g in 0..if packed { layout.groups() } else { 1 } {
                let channels = if packed { layout.group_size } else { layout.head_dim };
                let product = matmul::WeighTile {
                    queries: n,
                    weight_stride: CHUNK,
                    rows: count,
                    width: layout.head_dim,
                    first: g * channels,
                    count: channels,
                    output_stride: layout.head_dim,
                };
                if packed {
                    self.scale_weights(g, start, count);
                    matmul::weigh_tile(self.plan.isa, &product, &self.partial, &self.tile, &mut self.packed_output);
                } else {
                    let weights = &self.scores[start..];
                    matmul::weigh_tile(self.plan.isa, &product, weights, &self.tile, &mut self.state.output);
                }
            }
        }
        if packed {
            self.unfold_output(chunk);
        }
    }

    /// partial = weights · a for one group of a tile.
    fn scale_weights(&mut self, g: usize, start: usize, count: usize) {
        let scales = &self.scales[g * CHUNK + start..][..count];
        for q in 0..self.job.queries {
            let weights = &self.scores[q * CHUNK + start..][..count];
            let scaled = &mut self.partial[q * CHUNK..][..count];
            vectors::scale_weights(self.plan.isa, weights, scales, scaled);
        }
    }

    /// output += s ∘ R π⁻¹(packed output + Σ p·z) + (Σ p)·μ.
    fn unfold_output(&mut self, chunk: Chunk) {
        let codec = self.codec(true);
        self.values.turn_to(codec, self.job.kv_head, &self.head.values, chunk.first);
        let (layout, width) = (&codec.layout, codec.layout.head_dim);
        let (isa, row) = (self.plan.isa, &mut self.row[..width]);
        for q in 0..self.job.queries {
            let weights = &self.scores[q * CHUNK..][..chunk.count];
            let sum = vectors::sum(isa, weights);
            let packed = &mut self.packed_output[q * width..][..width];
            if !layout.symmetric {
                for (g, group) in packed.chunks_exact_mut(layout.group_size).enumerate() {
                    let zeros = &self.zeros[g * CHUNK..][..chunk.count];
                    let zero: f32 = weights.iter().zip(zeros).map(|(weight, zero)| weight * zero).sum();
                    for value in group {
                        *value += zero;
                    }
                }
            }
            match codec.permutation(self.job.kv_head) {
                Some(permutation) => permutation.invert(packed, row),
                None => row.copy_from_slice(packed),
            }
            rows::rotate(isa, codec.rotation, row);
            let output = &mut self.state.output[q * width..][..width];
            vectors::add_affine(isa, row, &self.values.scale, sum, &self.values.shift, output);
        }
    }
}

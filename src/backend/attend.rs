//! Attention over a layer's three regions, computed on the packed bytes.
//!
//! Shapes: query `[batch, heads, L, key width]`, output `[batch, heads, L, value width]`, mask `[batch|1, heads|1, L|1, tokens]`.
//! The queries that share a kv head (its group of heads × L positions) meet its rows together. A *job* is one kv head, a block of its
//! queries and a range of *chunks* (up to [`CHUNK`] rows of one region with one shift and scale); it yields a partial softmax state
//! {m, l, o}, and the states of a query are merged at the end (flash-decoding). Per chunk:
//!
//! 1. fold the transform into the queries: q·x̂ = (R(s∘q))_π · ŷ_π + q·μ;
//! 2. tile by tile, levels to f32 and one small product; the scale a and the zero point z of a group are applied to the scores;
//! 3. softcap, mask, running maximum, exponentials;
//! 4. tile by tile, weights (times a) by levels; then, once, π⁻¹, R, s and (Σp)·μ bring the sum back to the model's space.
//!
//! Sinks, window and the fresh rows of this very call are plain: the same way with nothing to fold.

use crate::backend::simd::{Isa, levels, matmul, rows};
use crate::backend::threads;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::{Head, Layer, Stream};
use crate::tensor::{Dtype, MaskView, TensorView, TensorViewMut};
use crate::transform::Source;

/// Rows of a chunk at most; scores of a chunk stay in the first-level cache.
const CHUNK: usize = 256;
/// Queries of a job at most.
const QUERY_BLOCK: usize = 32;
/// f32 of a decoded tile: 16 KiB.
const TILE_FLOATS: usize = 4096;
/// Below this many multiply-adds a call runs on its own thread: waking others costs more.
const SMALL_CALL: usize = 1 << 19;

/// What a call asks for besides the layer.
pub struct Attention<'a> {
    pub query: TensorView<'a>,
    pub scale: f32,
    pub mask: Option<MaskView<'a>>,
    /// Query l sees tokens up to T − L + l.
    pub causal: bool,
    /// Scores become softcap · tanh(score / softcap), before the mask.
    pub softcap: Option<f32>,
    /// One more logit for each query head, which takes part in the softmax and has no value.
    pub sink_logits: Option<&'a [f32]>,
    /// Keys and values of the last append; the store is then read only for the tokens before them.
    pub fresh: Option<(TensorView<'a>, TensorView<'a>)>,
}

/// Where a chunk's rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Region {
    Sinks,
    Past,
    Window,
    Fresh,
}

/// Rows `first .. first + count` of a region, which are the tokens from `token` on.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    region: Region,
    first: usize,
    token: usize,
    count: usize,
}

/// One kv head of one sequence, some of its queries, some of its chunks.
#[derive(Clone, Copy, Debug)]
struct Job {
    batch: usize,
    kv_head: usize,
    first_query: usize,
    queries: usize,
    first_chunk: usize,
    chunks: usize,
}

/// Partial softmax of a job's queries: maxima, sums and outputs `[queries, value width]`.
struct State {
    maximum: Vec<f32>,
    sum: Vec<f32>,
    output: Vec<f32>,
}

/// Runs the call and writes `output`.
pub fn attend(layer: &Layer, call: &Attention, mut output: TensorViewMut) -> Result<()> {
    check(layer, call, &output)?;
    let plan = Plan::new(layer, call);
    let states = threads::share(plan.jobs.len(), plan.threads, |job| Worker::new(&plan, plan.jobs[job]).run());
    let mut first = 0;
    while first < states.len() {
        let job = plan.jobs[first];
        let parts = &states[first..first + plan.splits];
        for q in 0..job.queries {
            let (head, position) = plan.query_at(job, q);
            let sink = call.sink_logits.map(|logits| logits[head]);
            let row = merge(parts, q, plan.value_width, sink);
            output.write_row_f32(job.batch, head, position, &row);
        }
        first += plan.splits;
    }
    Ok(())
}

/// One query's states become its output. Queries that see nothing get zeros, as torch's SDPA gives them.
fn merge(parts: &[State], q: usize, width: usize, sink: Option<f32>) -> Vec<f32> {
    let maximum = parts.iter().map(|part| part.maximum[q]).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    let mut row = vec![0.0; width];
    let mut sum = sink.map_or(0.0, |logit| (logit - maximum).exp());
    for part in parts {
        if part.maximum[q] == f32::NEG_INFINITY {
            continue;
        }
        let factor = (part.maximum[q] - maximum).exp();
        sum += factor * part.sum[q];
        for (out, value) in row.iter_mut().zip(&part.output[q * width..]) {
            *out += factor * value;
        }
    }
    if sum > 0.0 || sum.is_nan() {
        row.iter_mut().for_each(|out| *out /= sum);
    } else {
        row.fill(0.0);
    }
    row
}

fn check(layer: &Layer, call: &Attention, output: &TensorViewMut) -> Result<()> {
    let spec = layer.spec();
    let (batch, tokens) = (layer.batch_size(), layer.regions().total());
    let [query_batch, heads, length, width] = call.query.shape();
    let (key_width, value_width) = (spec.keys.layout.head_dim, spec.values.layout.head_dim);
    let found = |shape: [usize; 4]| shape.map(|size| size as i64);
    let groups_fit = heads > 0 && heads.is_multiple_of(spec.num_key_value_heads);
    if tokens == 0 {
        return Err(Error::state("attend", "a layer with at least one token", "an empty one"));
    }
    if query_batch != batch || !groups_fit || length == 0 || width != key_width {
        let expected = format!("[{batch}, a multiple of {}, L ≥ 1, {key_width}]", spec.num_key_value_heads);
        return Err(Error::shape("query", expected, &found(call.query.shape())));
    }
    if output.shape() != [batch, heads, length, value_width] {
        let expected = format!("[{batch}, {heads}, {length}, {value_width}]");
        return Err(Error::shape("output", expected, &found(output.shape())));
    }
    if call.causal && length > tokens {
        return Err(Error::shape("query", format!("L ≤ {tokens} tokens in a causal call"), &found(call.query.shape())));
    }
    if !call.scale.is_finite() {
        return Err(Error::value("scale", "a finite number", call.scale));
    }
    if let Some(softcap) = call.softcap
        && !(softcap > 0.0 && softcap.is_finite())
    {
        return Err(Error::value("softcap", "a positive number", softcap));
    }
    if let Some(logits) = call.sink_logits
        && logits.len() != heads
    {
        return Err(Error::shape("sink_logits", format!("[{heads}]"), &[logits.len() as i64]));
    }
    if let Some(mask) = &call.mask {
        mask.expect("mask", batch, heads, length, tokens)?;
    }
    if let Some((keys, values)) = &call.fresh {
        for (name, rows, width) in [("fresh_keys", keys, key_width), ("fresh_values", values, value_width)] {
            let [rows_batch, rows_heads, count, rows_width] = rows.shape();
            let fits = rows_batch == batch && rows_heads == spec.num_key_value_heads && rows_width == width;
            if !fits || count == 0 || count > tokens || count != keys.tokens() {
                let expected = format!("[{batch}, {}, 1..={tokens}, {width}]", spec.num_key_value_heads);
                return Err(Error::shape(name, expected, &found(rows.shape())));
            }
        }
    }
    Ok(())
}

/// Everything the jobs of a call share.
struct Plan<'a> {
    layer: &'a Layer,
    call: &'a Attention<'a>,
    isa: Isa,
    chunks: Vec<Chunk>,
    jobs: Vec<Job>,
    /// Consecutive jobs that share their queries.
    splits: usize,
    threads: usize,
    /// Query heads of a kv head.
    group: usize,
    /// Positions of a query head: L.
    length: usize,
    tokens: usize,
    key_width: usize,
    value_width: usize,
}

impl<'a> Plan<'a> {
    fn new(layer: &'a Layer, call: &'a Attention<'a>) -> Self {
        let spec = layer.spec();
        let [batch, heads, length, key_width] = call.query.shape();
        let tokens = layer.regions().total();
        let fresh = call.fresh.as_ref().map_or(0, |(keys, _)| keys.tokens());
        let chunks = chunks(layer, tokens - fresh, fresh);
        let group = heads / spec.num_key_value_heads;
        let value_width = spec.values.layout.head_dim;
        let queries = group * length;
        let groups_of_jobs = batch * spec.num_key_value_heads * queries.div_ceil(QUERY_BLOCK);
        let work = batch * heads * length * tokens * (key_width + value_width);
        let threads = if work < SMALL_CALL { 1 } else { threads::num_threads() };
        // Four jobs a thread even out what the threads do; more would only repeat the folding of queries.
        let splits = if threads == 1 { 1 } else { (4 * threads).div_ceil(groups_of_jobs).min(chunks.len()) };
        let mut jobs = Vec::with_capacity(groups_of_jobs * splits);
        for head in 0..batch * spec.num_key_value_heads {
            for first_query in (0..queries).step_by(QUERY_BLOCK) {
                for split in 0..splits {
                    let first_chunk = split * chunks.len() / splits;
                    jobs.push(Job {
                        batch: head / spec.num_key_value_heads,
                        kv_head: head % spec.num_key_value_heads,
                        first_query,
                        queries: QUERY_BLOCK.min(queries - first_query),
                        first_chunk,
                        chunks: (split + 1) * chunks.len() / splits - first_chunk,
                    });
                }
            }
        }
        Self {
            layer,
            call,
            isa: spec.isa,
            chunks,
            jobs,
            splits,
            threads,
            group,
            length,
            tokens,
            key_width,
            value_width,
        }
    }

    /// Query head and position of query `q` of a job.
    fn query_at(&self, job: Job, q: usize) -> (usize, usize) {
        let query = job.first_query + q;
        (job.kv_head * self.group + query / self.length, query % self.length)
    }
}

/// The chunks of the first `stored` tokens of the store and of `fresh` rows after them.
fn chunks(layer: &Layer, stored: usize, fresh: usize) -> Vec<Chunk> {
    let regions = layer.regions();
    let sinks = regions.sinks.min(stored);
    let packed = regions.packed.min(stored - sinks);
    let window = stored - sinks - packed;
    let mut chunks = Vec::new();
    let mut token = 0;
    for (region, count, step) in [
        (Region::Sinks, sinks, CHUNK),
        (Region::Past, packed, layer.chunk_rows(CHUNK)),
        (Region::Window, window, CHUNK),
        (Region::Fresh, fresh, CHUNK),
    ] {
        for first in (0..count).step_by(step) {
            chunks.push(Chunk { region, first, token: token + first, count: step.min(count - first) });
        }
        token += count;
    }
    chunks
}

/// Buffers of one job. Stacked rows have stride `queries_pad`-free layouts: `[queries, width]` and `[queries, CHUNK]`.
struct Worker<'a> {
    plan: &'a Plan<'a>,
    job: Job,
    head: &'a Head,
    /// `[queries, key width]`: the queries times the softmax scale, as they are and folded.
    plain: Vec<f32>,
    folded: Vec<f32>,
    /// q·μ of each query for the present shift.
    shifts: Vec<f32>,
    /// Shift and scale of keys and values in the present block.
    keys: Affinity,
    values: Affinity,
    tile: Vec<f32>,
    scores: Vec<f32>,
    /// Scores of one group of a tile, and weights times a scale.
    partial: Vec<f32>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// A page's metadata as it is stored, `[rows, scales and zero points]`.
    numbers: Vec<f32>,
    sums: Vec<f32>,
    packed_output: Vec<f32>,
    state: State,
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
    fn new(plan: &'a Plan<'a>, job: Job) -> Self {
        let (keys, values, n) = (plan.key_width, plan.value_width, job.queries);
        let groups = plan.layer.spec().keys.layout.groups().max(plan.layer.spec().values.layout.groups());
        Self {
            plan,
            job,
            head: plan.layer.head(job.batch, job.kv_head),
            plain: vec![0.0; n * keys],
            folded: vec![0.0; n * keys],
            shifts: vec![0.0; n],
            keys: Affinity::new(keys),
            values: Affinity::new(values),
            tile: vec![0.0; TILE_FLOATS.max(8 * keys.max(values)) + levels::SLACK],
            scores: vec![0.0; n * CHUNK],
            partial: vec![0.0; n * CHUNK],
            scales: vec![0.0; groups * CHUNK],
            zeros: vec![0.0; groups * CHUNK],
            numbers: vec![0.0; 2 * groups * PAGE_ROWS],
            sums: vec![0.0; n * groups],
            packed_output: vec![0.0; n * values],
            state: State { maximum: vec![f32::NEG_INFINITY; n], sum: vec![0.0; n], output: vec![0.0; n * values] },
        }
    }

    fn run(mut self) -> State {
        let width = self.plan.key_width;
        for q in 0..self.job.queries {
            let (head, position) = self.plan.query_at(self.job, q);
            let row = &mut self.plain[q * width..][..width];
            self.plan.call.query.read_row_f32(self.job.batch, head, position, row);
            matmul::scale(self.plan.isa, row, self.plan.call.scale);
        }
        for index in self.job.first_chunk..self.job.first_chunk + self.job.chunks {
            let chunk = self.plan.chunks[index];
            if self.sees_nothing(chunk) {
                continue;
            }
            self.score(chunk);
            self.cap_and_mask(chunk);
            self.soften(chunk);
            self.weigh(chunk);
        }
        self.state
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
                widen(self.plan.isa, stream.sinks.rows(first, count), stream.sinks.dtype, &mut tile[plain])
            }
            Region::Window => {
                widen(self.plan.isa, stream.window.rows(first, count), stream.window.dtype, &mut tile[plain])
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
                    if let crate::format::Format::Raw(dtype) = codec.layout.format {
                        widen(
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
                self.keep_scores(start, count, |_, _, score| score);
                continue;
            }
            for g in 0..layout.groups() {
                self.product(&layout, g * layout.group_size, layout.group_size, count, true);
                self.keep_packed_scores(g, start, count);
            }
        }
    }

    /// `partial[q][t]` for the channels of one group of the present tile.
    fn product(&mut self, layout: &crate::format::RowLayout, first: usize, channels: usize, rows: usize, folded: bool) {
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

    fn keep_scores(&mut self, start: usize, count: usize, change: impl Fn(usize, usize, f32) -> f32) {
        for q in 0..self.job.queries {
            let from = &self.partial[q * CHUNK..][..count];
            let to = &mut self.scores[q * CHUNK + start..][..count];
            for (t, (to, from)) in to.iter_mut().zip(from).enumerate() {
                *to = change(q, t, *from);
            }
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
            for ((to, from), scale) in to.iter_mut().zip(from).zip(scales) {
                *to += scale * from;
            }
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
        let mut row = vec![0.0; width];
        for q in 0..self.job.queries {
            let query = &self.plain[q * width..][..width];
            self.shifts[q] = query.iter().zip(&self.keys.shift).map(|(q, shift)| q * shift).sum();
            for ((row, query), scale) in row.iter_mut().zip(query).zip(&self.keys.scale) {
                *row = query * scale;
            }
            rows::rotate(self.plan.isa, codec.rotation, &mut row);
            let folded = &mut self.folded[q * width..][..width];
            match codec.permutation(self.job.kv_head) {
                Some(permutation) => permutation.apply(&row, folded),
                None => folded.copy_from_slice(&row),
            }
            for (g, group) in folded.chunks_exact(codec.layout.group_size).enumerate() {
                self.sums[q * groups + g] = group.iter().sum();
            }
        }
    }

    /// Step 3, first half.
    fn cap_and_mask(&mut self, chunk: Chunk) {
        let call = self.plan.call;
        let mut bias = [0.0f32; CHUNK];
        for q in 0..self.job.queries {
            let scores = &mut self.scores[q * CHUNK..][..chunk.count];
            if let Some(softcap) = call.softcap {
                scores.iter_mut().for_each(|score| *score = softcap * (*score / softcap).tanh());
            }
            if let Some(mask) = &call.mask {
                let (head, position) = self.plan.query_at(self.job, q);
                let bias = &mut bias[..chunk.count];
                mask.read_bias(self.job.batch, head, position, chunk.token, bias);
                // A hidden token stays hidden even if its score is not a number.
                for (score, bias) in scores.iter_mut().zip(bias) {
                    *score = if *bias == f32::NEG_INFINITY { f32::NEG_INFINITY } else { *score + *bias };
                }
            }
            if call.causal {
                let (_, position) = self.plan.query_at(self.job, q);
                let visible = (self.plan.tokens - self.plan.length + position + 1).saturating_sub(chunk.token);
                if visible < chunk.count {
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
            let maximum = matmul::maximum(isa, scores).max(old);
            if maximum == f32::NEG_INFINITY && !scores.iter().any(|score| score.is_nan()) {
                scores.fill(0.0);
                continue;
            }
            let sum = matmul::exponentiate(isa, scores, maximum);
            let factor = if old == f32::NEG_INFINITY { 0.0 } else { (old - maximum).exp() };
            self.state.sum[q] = self.state.sum[q] * factor + sum;
            if factor != 1.0 {
                matmul::scale(isa, &mut self.state.output[q * width..][..width], factor);
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
            for ((scaled, weight), scale) in scaled.iter_mut().zip(weights).zip(scales) {
                // A weight of zero hides its row, whatever the row's scale is.
                *scaled = if *weight == 0.0 { 0.0 } else { weight * scale };
            }
        }
    }

    /// output += s ∘ R π⁻¹(packed output + Σ p·z) + (Σ p)·μ.
    fn unfold_output(&mut self, chunk: Chunk) {
        let codec = self.codec(true);
        self.values.turn_to(codec, self.job.kv_head, &self.head.values, chunk.first);
        let (layout, width) = (&codec.layout, codec.layout.head_dim);
        let mut row = vec![0.0; width];
        for q in 0..self.job.queries {
            let weights = &self.scores[q * CHUNK..][..chunk.count];
            let sum: f32 = weights.iter().sum();
            let packed = &mut self.packed_output[q * width..][..width];
            if !layout.symmetric {
                for (g, group) in packed.chunks_exact_mut(layout.group_size).enumerate() {
                    let zeros = &self.zeros[g * CHUNK..][..chunk.count];
                    let zero: f32 = weights.iter().zip(zeros).map(|(weight, zero)| weight * zero).sum();
                    group.iter_mut().for_each(|value| *value += zero);
                }
            }
            match codec.permutation(self.job.kv_head) {
                Some(permutation) => permutation.invert(packed, &mut row),
                None => row.copy_from_slice(packed),
            }
            rows::rotate(self.plan.isa, codec.rotation, &mut row);
            let output = &mut self.state.output[q * width..][..width];
            for (((out, value), scale), shift) in
                output.iter_mut().zip(&row).zip(&self.values.scale).zip(&self.values.shift)
            {
                *out += value * scale + sum * shift;
            }
        }
    }
}

fn widen(isa: Isa, bytes: &[u8], dtype: Dtype, tile: &mut [f32]) {
    levels::decode_plain(isa, bytes, dtype, tile);
}

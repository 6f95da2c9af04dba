//! Attention over a layer's three regions, computed on the packed bytes.
//!
//! Shapes: query `[batch, heads, L, key width]`, output `[batch, heads, L, value width]`, mask `[batch|1, heads|1, L|1, tokens]`.
//! The queries that share a kv head (its group of heads × L positions) meet its rows together. A *job* is one kv head, a block of its
//! queries (all of a few: `attend/worker.rs`; some of many, side by side in lanes: `attend/panel.rs`) and a range of *chunks* (up to
//! [`CHUNK`] rows of one region with one shift and scale); it yields a partial softmax state {m, l, o}, and the states of a query are
//! merged at the end (flash-decoding). Per chunk:
//!
//! 1. fold the transform into the queries, once for a shift and scale: q·x̂ = (R(s∘q))_π · `ŷ_π` + q·μ, or (Bᵀq)·ŷ + q·m(t);
//! 2. tile by tile, levels to f32 and one small product; the scale a and the zero point z of a group are applied to the scores;
//!    (queries of 16 bits on two-bit rows: products of integers straight from the codes, `simd/words.rs`; likewise in step 4)
//! 3. softcap, mask, running maximum, exponentials;
//! 4. tile by tile, weights (times a) by levels; then, once for a shift and scale, π⁻¹, R, s (or B) and (Σp)·μ bring the sum back to the model's space.
//!
//! Sinks, window and the fresh rows of this very call are plain: the same way with nothing to fold.

mod panel;
mod tiles;
mod worker;

use std::sync::Arc;

use crate::backend::simd::part_words::PartWords;
use crate::backend::simd::words::WordTable;
use crate::backend::simd::{Isa, LANES};
use crate::backend::threads;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::tensor::{Dtype, MaskView, TensorView, TensorViewMut};
use crate::transform::{TurningMean, spans_of};
use panel::{PANEL_QUERIES, Panel, WordSteps};
use tiles::Buffer;
use worker::Worker;

/// Rows of a chunk at most; scores of a chunk stay in the first-level cache.
const CHUNK: usize = 256;
/// From so many queries of a kv head on, they lie side by side in lanes; earlier where the products with a mean that turns are as many as
/// those with rows.
const MANY_QUERIES: usize = 32;
const MANY_QUERIES_OF_A_TURNING_MEAN: usize = 16;
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

/// Partial softmax of a job's queries: maxima, or what else was taken off their scores, sums and outputs `[queries, value width]`.
struct State {
    maximum: Vec<f32>,
    sum: Vec<f32>,
    output: Buffer,
}

/// Runs the call and writes `output`.
pub fn attend(layer: &Layer, call: &Attention, mut output: TensorViewMut) -> Result<()> {
    check(layer, call, &output)?;
    let plan = Plan::new(layer, call);
    let states = threads::share(plan.jobs.len(), plan.threads, |job| {
        if plan.side_by_side {
            Panel::new(&plan, plan.jobs[job]).run()
        } else {
            Worker::new(&plan, plan.jobs[job]).run()
        }
    });
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
        for out in &mut row {
            *out /= sum;
        }
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
    /// Whether jobs are those of `panel.rs`.
    side_by_side: bool,
    threads: usize,
    /// Query heads of a kv head.
    group: usize,
    /// Positions of a query head: L.
    length: usize,
    tokens: usize,
    /// Tokens that are read from the store.
    stored: usize,
    key_width: usize,
    value_width: usize,
    /// Tables for products of words, where queries have 16 bits and rows and processor allow it.
    key_words: Option<LevelWords>,
    value_words: Option<LevelWords>,
    /// The same for queries side by side.
    key_steps: Option<WordSteps>,
    value_steps: Option<WordSteps>,
}

/// Levels of a codec's rows as words.
enum LevelWords {
    Plain(WordTable),
    Parts(PartWords),
}

impl LevelWords {
    /// None for rows that words do not serve. Many levels lose too much as words for the eleven bits of a float16.
    fn new(codec: &Codec, queries: Dtype, values: bool) -> Option<Self> {
        if let Some(table) = WordTable::new(&codec.layout, &codec.codebook, values) {
            return Some(Self::Plain(table));
        }
        if queries == Dtype::F16 {
            return None;
        }
        let table = if codec.is_of_parts() {
            PartWords::of_parts(&codec.parts, codec.layout.code_bytes, values)
        } else {
            PartWords::of_rows(&codec.layout, &codec.codebook, values)
        };
        table.map(Self::Parts)
    }

    /// Words of a query of `width` channels.
    const fn query_words(&self, width: usize) -> usize {
        match self {
            Self::Plain(_) => width / 2,
            Self::Parts(table) => table.query_words(),
        }
    }
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
        let dtype = call.query.dtype();
        let has_words = spec.isa.has_words() && dtype != Dtype::F32;
        let turning = spec.keys.turning_mean(0).is_some();
        let side_by_side = queries >= if turning { MANY_QUERIES_OF_A_TURNING_MEAN } else { MANY_QUERIES };
        let block = if side_by_side {
            queries.div_ceil(queries.div_ceil(PANEL_QUERIES)).next_multiple_of(LANES)
        } else {
            queries
        };
        let words = |codec: &Codec, values| {
            if has_words && !side_by_side { LevelWords::new(codec, dtype, values) } else { None }
        };
        let steps = |codec: &Codec, values| {
            if has_words && side_by_side { WordSteps::new(codec, dtype, values) } else { None }
        };
        let groups_of_jobs = batch * spec.num_key_value_heads * queries.div_ceil(block);
        let work = batch * heads * length * tokens * (key_width + value_width);
        let threads = if work < SMALL_CALL { 1 } else { threads::num_threads() };
        // Four jobs a thread even out what the threads do; more would only repeat the folding of queries.
        let splits = if threads == 1 { 1 } else { (4 * threads).div_ceil(groups_of_jobs).min(chunks.len()) };
        let mut jobs = Vec::with_capacity(groups_of_jobs * splits);
        for head in 0..batch * spec.num_key_value_heads {
            for first_query in (0..queries).step_by(block) {
                for split in 0..splits {
                    let first_chunk = split * chunks.len() / splits;
                    jobs.push(Job {
                        batch: head / spec.num_key_value_heads,
                        kv_head: head % spec.num_key_value_heads,
                        first_query,
                        queries: block.min(queries - first_query),
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
            side_by_side,
            threads,
            group,
            length,
            tokens,
            stored: tokens - fresh,
            key_width,
            value_width,
            key_words: words(&spec.keys, false),
            value_words: words(&spec.values, true),
            key_steps: steps(&spec.keys, false),
            value_steps: steps(&spec.values, true),
        }
    }

    /// The mean of a job's packed keys, if it turns.
    fn turning_mean(&self, job: Job) -> Option<&'a TurningMean> {
        self.layer.spec().keys.turning_mean(job.kv_head)
    }

    /// Position of the first packed row.
    fn first_position(&self, job: Job) -> i64 {
        self.layer.spec().sinks as i64 - self.layer.padding(job.batch) as i64
    }

    /// The table of the spans that the past reaches.
    fn spans(&self, job: Job, mean: &TurningMean) -> Arc<Vec<f32>> {
        mean.turns.spans(spans_of(self.first_position(job), self.layer.regions().packed))
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

//! One attention layer's store: sinks | packed past | window, for every (sequence, kv head), keys and values alike.
//!
//! A token is in exactly one region. The first `sinks` tokens stay as they are; the most recent `window` tokens too; a row that leaves
//! the window is encoded once, and only cropping can remove it. With block statistics it leaves once its block has them: they are fixed
//! when the block's last row is appended, so rows wait beside a window that is shorter than a block, and only there. All heads of all
//! sequences have the same lengths, kept here once. A sequence may begin with padding: then its sinks are the first tokens behind it, and
//! the places of the padding and of those tokens, behind the sinks, hold zeros that nobody sees. Attention itself is in `backend::attend`.

mod append;
mod queries;

use std::collections::HashMap;
use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use crate::backend::{cpu, simd::Isa, threads};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::page::{PackedRows, PlainRows};
use crate::tensor::{Dtype, TensorView, TensorViewMut};
use crate::transform::Source;
use append::{AppendPlan, Scratch, StreamAppend};
pub use queries::LEAST_TOKENS as LEAST_QUERY_TOKENS;
use queries::QueryWeights;

/// What `append` does with a NaN or an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonFinite {
    /// Refuse the call.
    Raise,
    /// Keep the row: it decodes to NaN and touches no other row.
    Propagate,
}

impl NonFinite {
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "raise" => Ok(Self::Raise),
            "propagate" => Ok(Self::Propagate),
            _ => Err(Error::value("nonfinite", "\"raise\" or \"propagate\"", name)),
        }
    }
}

/// What does not change over a layer's life.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    pub num_key_value_heads: usize,
    pub keys: Codec,
    pub values: Codec,
    pub sinks: usize,
    pub window: usize,
    pub dtype: Dtype,
    pub nonfinite: NonFinite,
    pub isa: Isa,
}

impl LayerSpec {
    pub fn validate(self) -> Result<Self> {
        if self.num_key_value_heads == 0 {
            return Err(Error::value("num_key_value_heads", "at least 1", 0));
        }
        if self.window == 0 {
            return Err(Error::value("window", "at least 1: the current token is attended in full precision", 0));
        }
        self.keys.validate(self.num_key_value_heads)?;
        self.values.validate(self.num_key_value_heads)?;
        if matches!(self.values.source, Source::Turning(_)) || !self.values.noise.is_empty() {
            return Err(Error::value("values", "a plain shift and no noise: both are for keys", "shift_sine or noise"));
        }
        if self.values.query_exponent() > 0.0 {
            return Err(Error::value(
                "values",
                "query_exponent 0: queries meet keys only",
                self.values.query_exponent(),
            ));
        }
        let (keys, values) = (self.keys.block_rows(), self.values.block_rows());
        if keys != values && keys != 0 && values != 0 {
            return Err(Error::value("block", "one size for keys and values, or 0", format!("{keys} and {values}")));
        }
        Ok(self)
    }

    /// Rows that share their statistics: a block, or 0 where all do.
    fn block_rows(&self) -> usize {
        self.keys.block_rows().max(self.values.block_rows())
    }
}

/// The rows of one stream (keys or values) of one (sequence, kv head).
#[derive(Clone)]
pub struct Stream {
    pub sinks: PlainRows,
    pub past: PackedRows,
    pub window: PlainRows,
}

impl Stream {
    fn new(dtype: Dtype, width: usize) -> Self {
        Self { sinks: PlainRows::new(dtype, width), past: PackedRows::default(), window: PlainRows::new(dtype, width) }
    }

    fn held<'a>(&'a self, codec: &Codec) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        self.past.held(codec).chain([self.sinks.held(), self.window.held()])
    }
}

/// Keys and values of one (sequence, kv head).
#[derive(Clone)]
pub struct Head {
    pub keys: Stream,
    pub values: Stream,
    queries: QueryWeights,
}

impl Head {
    /// Calls for what appending a row touches: since the last step other layers have taken the processor's cache.
    fn prefetch(&self, spec: &LayerSpec, packs: bool) {
        for (stream, codec) in [(&self.keys, &spec.keys), (&self.values, &spec.values)] {
            stream.window.prefetch_ends();
            if packs {
                stream.past.prefetch_next(codec);
            }
        }
    }
}

/// Tokens in each region, in order of their positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regions {
    pub sinks: usize,
    pub packed: usize,
    pub window: usize,
}

impl Regions {
    pub fn total(&self) -> usize {
        self.sinks + self.packed + self.window
    }

    /// Of the first `length` tokens.
    #[must_use]
    pub fn of_first(self, length: usize) -> Self {
        let Self { sinks, packed, window } = self;
        Self {
            sinks: length.min(sinks),
            packed: length.saturating_sub(sinks).min(packed),
            window: length.saturating_sub(sinks + packed).min(window),
        }
    }
}

/// See the head of this file. Cloning shares all pages.
#[derive(Clone)]
pub struct Layer {
    spec: Arc<LayerSpec>,
    /// `[batch × heads]`; empty before the first append.
    heads: Vec<Head>,
    regions: Regions,
    /// Tokens of padding in front of each sequence; empty: none anywhere.
    padding: Vec<usize>,
    /// Blocks whose statistics are fixed; the last may reach into the window, or be cut by a crop.
    blocks: usize,
}

impl Layer {
    pub fn new(spec: LayerSpec) -> Result<Self> {
        let spec = Arc::new(spec.validate()?);
        Ok(Self { spec, heads: Vec::new(), regions: Regions::default(), padding: Vec::new(), blocks: 0 })
    }

    pub fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    pub fn regions(&self) -> Regions {
        self.regions
    }

    /// Rows that attention takes at a time, at most `most`: no more than share their statistics.
    pub fn chunk_rows(&self, most: usize) -> usize {
        // Blocks are multiples of 128 rows: a chunk of `most` that would straddle two is cut to the part both sizes share.
        match self.spec.block_rows() {
            0 => most,
            unit => (1..=most / PAGE_ROWS)
                .rev()
                .map(|pages| pages * PAGE_ROWS)
                .find(|rows| unit % rows == 0)
                .unwrap_or(PAGE_ROWS),
        }
    }

    pub fn batch_size(&self) -> usize {
        self.heads.len() / self.spec.num_key_value_heads
    }

    pub fn head(&self, batch: usize, head: usize) -> &Head {
        &self.heads[batch * self.spec.num_key_value_heads + head]
    }

    /// Says, before the first append, with how many tokens of padding each sequence of the batch begins: they are stored as zeros,
    /// take no place of a sink, have no part in statistics and are seen by no query. Lasts until `reset`.
    pub fn set_padding(&mut self, padding: Vec<usize>) -> Result<()> {
        if self.regions.total() > 0 {
            return Err(Error::state("set_padding", "a layer without tokens", format!("{}", self.regions.total())));
        }
        self.heads.clear();
        self.padding = padding;
        Ok(())
    }

    /// Tokens of padding in front of sequence `batch`.
    pub fn padding(&self, batch: usize) -> usize {
        self.padding.get(batch).copied().unwrap_or(0)
    }

    /// Factors that the queries have put on the scales of a head's channels, once they are fixed.
    pub fn query_factors(&self, batch: usize, kv_head: usize) -> Option<&[f16]> {
        self.head(batch, kv_head).queries.factors()
    }

    /// Whether the queries of this layer still have a say in how its keys are packed.
    pub fn wants_queries(&self) -> bool {
        let any_open = || self.heads.is_empty() || self.heads.iter().any(|head| head.queries.factors().is_none());
        self.spec.keys.query_exponent() > 0.0 && any_open()
    }

    /// Takes note of the queries `[batch, query heads, L, key width]` of the last L tokens.
    pub fn observe_queries(&mut self, query: &TensorView) -> Result<()> {
        self.check_query(query, self.batch_size(), self.regions.total())?;
        self.observe(query, self.regions.total());
        Ok(())
    }

    fn check_query(&self, query: &TensorView, batch: usize, tokens: usize) -> Result<()> {
        let (heads, width) = (self.spec.num_key_value_heads, self.spec.keys.layout.head_dim);
        let [found_batch, query_heads, length, found_width] = query.shape();
        let fits = query_heads > 0 && query_heads.is_multiple_of(heads) && (1..=tokens).contains(&length);
        if fits && found_batch == batch && found_width == width {
            return Ok(());
        }
        let expected = format!("[{batch}, a multiple of {heads}, 1 to {tokens} tokens, {width}]");
        Err(Error::shape("query", expected, &query.shape().map(|size| size as i64)))
    }

    /// Of the last tokens of `tokens` in all.
    fn observe(&mut self, query: &TensorView, tokens: usize) {
        if !self.wants_queries() {
            return;
        }
        let (kv_heads, padding) = (self.spec.num_key_value_heads, &self.padding);
        let (group, start) = (query.num_heads() / kv_heads, tokens - query.tokens());
        let take = |(index, head): (usize, &mut Head)| {
            let (batch, kv_head) = (index / kv_heads, index % kv_heads);
            let first = padding.get(batch).copied().unwrap_or(0).saturating_sub(start);
            head.queries.observe(query, batch, kv_head * group..(kv_head + 1) * group, first);
        };
        if query.tokens() < 64 {
            self.heads.iter_mut().enumerate().for_each(take);
        } else {
            let heads = &mut self.heads;
            threads::install(|| heads.par_iter_mut().enumerate().for_each(take));
        }
    }

    /// Refuses what `append` would refuse.
    pub fn check(&self, keys: &TensorView, values: &TensorView) -> Result<()> {
        self.check_rows("keys", keys, &self.spec.keys)?;
        self.check_rows("values", values, &self.spec.values)?;
        if keys.tokens() != values.tokens() || keys.batch_size() != values.batch_size() {
            let expected = format!("[{}, …, {}, …] as keys have", keys.batch_size(), keys.tokens());
            return Err(Error::shape("values", expected, &values.shape().map(|size| size as i64)));
        }
        if self.spec.nonfinite == NonFinite::Raise {
            cpu::check_finite(self.spec.isa, "keys", keys)?;
            cpu::check_finite(self.spec.isa, "values", values)?;
        }
        Ok(())
    }

    /// Stores the rows of `n` new tokens: keys `[batch, heads, n, key width]`, values `[batch, heads, n, value width]`.
    /// Nothing changes if this fails.
    pub fn append(&mut self, keys: TensorView, values: TensorView) -> Result<()> {
        self.append_queried(keys, values, None)
    }

    /// `append` where the queries `[batch, query heads, L ≤ n, key width]` of the last of the tokens are known already.
    pub fn append_queried(&mut self, keys: TensorView, values: TensorView, query: Option<TensorView>) -> Result<()> {
        self.check(&keys, &values)?;
        if let Some(query) = &query {
            self.check_query(query, keys.batch_size(), keys.tokens())?;
        }
        if self.heads.is_empty() {
            let spec = &self.spec;
            let head = Head {
                keys: Stream::new(spec.dtype, spec.keys.layout.head_dim),
                values: Stream::new(spec.dtype, spec.values.layout.head_dim),
                queries: QueryWeights::default(),
            };
            self.heads = vec![head; keys.batch_size() * spec.num_key_value_heads];
        }
        let plan = self.plan(keys.tokens());
        if let Some(query) = &query {
            self.observe(query, self.regions.total() + keys.tokens());
        }
        let (fixes_block, exponent) = (plan.blocks > self.blocks, self.spec.keys.query_exponent());
        let (spec, padding) = (Arc::clone(&self.spec), &self.padding);
        let append_head = |scratch: &mut Scratch, (index, head): (usize, &mut Head)| {
            let (batch, kv_head) = (index / spec.num_key_value_heads, index % spec.num_key_value_heads);
            if fixes_block && exponent > 0.0 {
                head.queries.fix(exponent);
            }
            let factors = head.queries.factors();
            let mut append = |stream: &mut Stream, codec: &Codec, rows: TensorView, factors: Option<&[f16]>| {
                let rows = rows.head(batch, kv_head);
                let padding = padding.get(batch).copied().unwrap_or(0);
                StreamAppend { codec, isa: spec.isa, kv_head, rows, factors, padding, sinks: spec.sinks, plan }
                    .run(stream, scratch);
            };
            append(&mut head.keys, &spec.keys, keys, factors);
            append(&mut head.values, &spec.values, values, None);
        };
        let work = plan.to_pack + (plan.blocks - self.blocks) * self.spec.block_rows();
        if work * self.heads.len() >= 64 {
            let heads = &mut self.heads;
            threads::install(|| heads.par_iter_mut().enumerate().for_each_init(Scratch::default, append_head));
        } else {
            self.heads.iter().for_each(|head| head.prefetch(&self.spec, plan.to_pack > 0));
            let mut scratch = Scratch::default();
            self.heads.iter_mut().enumerate().for_each(|head| append_head(&mut scratch, head));
        }
        self.regions.sinks += plan.to_sinks;
        self.regions.packed += plan.to_pack;
        self.regions.window += plan.rows - plan.to_sinks;
        self.regions.window -= plan.to_pack;
        self.blocks = plan.blocks;
        Ok(())
    }

    fn check_rows(&self, name: &str, rows: &TensorView, codec: &Codec) -> Result<()> {
        let (heads, width) = (self.spec.num_key_value_heads, codec.layout.head_dim);
        let batch = match (self.heads.len(), self.padding.len()) {
            (0, 0) => rows.batch_size(),
            (0, padded) => padded,
            _ => self.batch_size(),
        };
        let fits = rows.batch_size() == batch && rows.num_heads() == heads && rows.width() == width;
        if !fits || batch == 0 || rows.tokens() == 0 {
            let any = self.heads.is_empty() && self.padding.is_empty();
            let batch = if any { "batch ≥ 1".to_string() } else { batch.to_string() };
            let expected = format!("[{batch}, {heads}, tokens ≥ 1, {width}]");
            return Err(Error::shape(name, expected, &rows.shape().map(|size| size as i64)));
        }
        if rows.dtype() != self.spec.dtype {
            return Err(Error::dtype(name, self.spec.dtype.name(), rows.dtype().name()));
        }
        Ok(())
    }

    fn plan(&self, rows: usize) -> AppendPlan {
        let to_sinks = rows.min(self.spec.sinks - self.regions.sinks);
        let Regions { packed, window, .. } = self.regions;
        let behind_sinks = packed + window + rows - to_sinks;
        let evictable = behind_sinks.saturating_sub(self.spec.window);
        let (blocks, packable) = match self.spec.block_rows() {
            0 => (0, evictable),
            block_rows => {
                // A block that a crop has cut may have its statistics and not all its rows.
                let blocks = self.blocks.max(behind_sinks / block_rows);
                (blocks, evictable.min(blocks * block_rows))
            }
        };
        AppendPlan {
            rows,
            stored: self.regions.total(),
            to_sinks,
            window,
            to_pack: packable.saturating_sub(packed),
            blocks,
        }
    }

    /// Writes the rows of all tokens, decoded, to `[batch, heads, tokens, width]`.
    pub fn decode(&self, values: bool, output: TensorViewMut) -> Result<()> {
        let spec = &self.spec;
        let codec = if values { &spec.values } else { &spec.keys };
        let expected = [self.batch_size(), spec.num_key_value_heads, self.regions.total(), codec.layout.head_dim];
        if output.shape() != expected {
            let found = output.shape().map(|size| size as i64);
            return Err(Error::shape("output", format!("{expected:?}"), &found));
        }
        if output.dtype() != spec.dtype {
            return Err(Error::dtype("output", spec.dtype.name(), output.dtype().name()));
        }
        threads::install(|| {
            output.split_heads().into_par_iter().enumerate().for_each(|(index, mut output)| {
                let head = &self.heads[index];
                let stream = if values { &head.values } else { &head.keys };
                let (batch, kv_head) = (index / spec.num_key_value_heads, index % spec.num_key_value_heads);
                cpu::decode_stream(spec.isa, codec, kv_head, stream, self.padding(batch), &mut output);
            });
        });
        Ok(())
    }

    /// Forgets the tokens from `length` on. Rows that were packed stay packed, and a cut block with such rows keeps its statistics for
    /// them and for the rows that will fill it; without any it gets new ones when it is complete again.
    pub fn crop(&mut self, length: usize) -> Result<()> {
        if length > self.regions.total() {
            return Err(Error::value("length", format!("at most {}", self.regions.total()), length));
        }
        let regions = self.regions.of_first(length);
        let blocks = match self.spec.block_rows() {
            0 => 0,
            block_rows => {
                let complete = (regions.packed + regions.window) / block_rows;
                self.blocks.min(complete).max(regions.packed.div_ceil(block_rows))
            }
        };
        for head in &mut self.heads {
            for stream in [&mut head.keys, &mut head.values] {
                stream.sinks.truncate(regions.sinks);
                stream.past.truncate(regions.packed, blocks);
                stream.window.truncate(regions.window);
            }
        }
        self.regions = regions;
        self.blocks = blocks;
        Ok(())
    }

    /// New row `i` of the batch is the old row `indices[i]`: reorders, selects, repeats. Nothing is copied until it is written.
    pub fn gather(&mut self, indices: &[usize]) -> Result<()> {
        let (batch, heads) = (self.batch_size(), self.spec.num_key_value_heads);
        if indices.is_empty() {
            return Err(Error::value("indices", "at least one row of the batch", "none"));
        }
        if let Some(index) = indices.iter().find(|index| **index >= batch) {
            return Err(Error::value("indices", format!("rows of the batch, 0..{batch}"), index));
        }
        if !self.padding.is_empty() {
            self.padding = indices.iter().map(|index| self.padding[*index]).collect();
        }
        self.heads = indices.iter().flat_map(|index| self.heads[index * heads..][..heads].to_vec()).collect();
        Ok(())
    }

    pub fn reset(&mut self) {
        self.heads.clear();
        self.regions = Regions::default();
        self.padding.clear();
        self.blocks = 0;
    }

    /// Bytes of all that is held: pages with their slack, statistics, sinks and windows with their capacity. What heads or
    /// sequences share counts once.
    pub fn nbytes(&self) -> usize {
        let mut held = HashMap::new();
        for head in &self.heads {
            held.extend(head.keys.held(&self.spec.keys));
            held.extend(head.values.held(&self.spec.values));
            held.extend(head.queries.held());
        }
        held.values().sum()
    }

    /// `nbytes` in bits over the numbers that the tokens have; 0 before the first token.
    pub fn bits_per_element(&self) -> f64 {
        let width = self.spec.keys.layout.head_dim + self.spec.values.layout.head_dim;
        let elements = self.heads.len() * self.regions.total() * width;
        if elements == 0 { 0.0 } else { self.nbytes() as f64 * 8.0 / elements as f64 }
    }
}

//! One attention layer's store: sinks | packed past | window, for every (sequence, kv head), keys and values alike.
//!
//! A token is in exactly one region. The first `sinks` tokens stay as they are; the most recent `window` tokens too; a row that leaves
//! the window is encoded once, and only cropping can remove it. With block statistics the rows that left the window wait beside it until
//! a block is full. All heads of all sequences have the same lengths, kept here once. Attention itself is in `backend::cpu`.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{cpu, simd::Isa, threads};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::page::{PackedRows, PlainRows};
use crate::tensor::{Dtype, TensorView, TensorViewMut};
use crate::transform::{Affine, Source};

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
        let (keys, values) = (self.keys.block_rows(), self.values.block_rows());
        if keys != values && keys != 0 && values != 0 {
            return Err(Error::value("block", "one size for keys and values, or 0", format!("{keys} and {values}")));
        }
        Ok(self)
    }

    /// Rows that are encoded together: a block, or 0 for one at a time.
    fn packing_unit(&self) -> usize {
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
}

/// How an append of some rows falls into the regions.
#[derive(Clone, Copy, Debug)]
struct AppendPlan {
    rows: usize,
    to_sinks: usize,
    to_pack: usize,
    /// Of the packed rows, how many come from the window; the others never enter it.
    from_window: usize,
}

/// See the head of this file. Cloning shares all pages.
#[derive(Clone)]
pub struct Layer {
    spec: Arc<LayerSpec>,
    /// `[batch × heads]`; empty before the first append.
    heads: Vec<Head>,
    regions: Regions,
}

impl Layer {
    pub fn new(spec: LayerSpec) -> Result<Self> {
        Ok(Self { spec: Arc::new(spec.validate()?), heads: Vec::new(), regions: Regions::default() })
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
        match self.spec.packing_unit() {
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

    /// Stores the rows of `n` new tokens: keys `[batch, heads, n, key width]`, values `[batch, heads, n, value width]`.
    /// Nothing changes if this fails.
    pub fn append(&mut self, keys: TensorView, values: TensorView) -> Result<()> {
        self.check_rows("keys", &keys, &self.spec.keys)?;
        self.check_rows("values", &values, &self.spec.values)?;
        if keys.tokens() != values.tokens() || keys.batch_size() != values.batch_size() {
            let expected = format!("[{}, …, {}, …] as keys have", keys.batch_size(), keys.tokens());
            return Err(Error::shape("values", expected, &values.shape().map(|size| size as i64)));
        }
        if self.spec.nonfinite == NonFinite::Raise {
            cpu::check_finite(self.spec.isa, "keys", &keys)?;
            cpu::check_finite(self.spec.isa, "values", &values)?;
        }
        if self.heads.is_empty() {
            let spec = &self.spec;
            let head = Head {
                keys: Stream::new(spec.dtype, spec.keys.layout.head_dim),
                values: Stream::new(spec.dtype, spec.values.layout.head_dim),
            };
            self.heads = vec![head; keys.batch_size() * spec.num_key_value_heads];
        }
        let plan = self.plan(keys.tokens());
        let spec = Arc::clone(&self.spec);
        let append_head = |(index, head): (usize, &mut Head)| {
            let (batch, kv_head) = (index / spec.num_key_value_heads, index % spec.num_key_value_heads);
            let append = |stream: &mut Stream, codec: &Codec, rows: TensorView| {
                let rows = rows.head(batch, kv_head);
                StreamAppend { codec, isa: spec.isa, kv_head, rows, plan }.run(stream);
            };
            append(&mut head.keys, &spec.keys, keys);
            append(&mut head.values, &spec.values, values);
        };
        if plan.to_pack * self.heads.len() >= 64 {
            let heads = &mut self.heads;
            threads::install(|| heads.par_iter_mut().enumerate().for_each(append_head));
        } else {
            self.heads.iter_mut().enumerate().for_each(append_head);
        }
        self.regions.sinks += plan.to_sinks;
        self.regions.packed += plan.to_pack;
        self.regions.window += plan.rows - plan.to_sinks;
        self.regions.window -= plan.to_pack;
        Ok(())
    }

    fn check_rows(&self, name: &str, rows: &TensorView, codec: &Codec) -> Result<()> {
        let (heads, width) = (self.spec.num_key_value_heads, codec.layout.head_dim);
        let batch = if self.heads.is_empty() { rows.batch_size() } else { self.batch_size() };
        let fits = rows.batch_size() == batch && rows.num_heads() == heads && rows.width() == width;
        if !fits || batch == 0 || rows.tokens() == 0 {
            let batch = if self.heads.is_empty() { "batch ≥ 1".to_string() } else { batch.to_string() };
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
        let evictable = (self.regions.window + rows - to_sinks).saturating_sub(self.spec.window);
        let unit = self.spec.packing_unit();
        let to_pack = if unit == 0 {
            evictable
        } else {
            // A block that cropping has opened again is filled with the statistics it has; then whole blocks follow.
            let room = (unit - self.regions.packed % unit) % unit;
            if evictable <= room { evictable } else { room + (evictable - room) / unit * unit }
        };
        AppendPlan { rows, to_sinks, to_pack, from_window: to_pack.min(self.regions.window) }
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
                cpu::decode_stream(spec.isa, codec, index % spec.num_key_value_heads, stream, &mut output);
            });
        });
        Ok(())
    }

    /// Forgets the tokens from `length` on. Rows that were packed stay packed.
    pub fn crop(&mut self, length: usize) -> Result<()> {
        let Regions { sinks, packed, .. } = self.regions;
        if length > self.regions.total() {
            return Err(Error::value("length", format!("at most {}", self.regions.total()), length));
        }
        let regions = Regions {
            sinks: length.min(sinks),
            packed: length.saturating_sub(sinks).min(packed),
            window: length.saturating_sub(sinks + packed),
        };
        let unit = self.spec.packing_unit();
        for head in &mut self.heads {
            for (stream, codec) in [(&mut head.keys, &self.spec.keys), (&mut head.values, &self.spec.values)] {
                stream.sinks.truncate(regions.sinks);
                stream.past.truncate(regions.packed, if codec.block_rows() > 0 { unit } else { 0 });
                stream.window.truncate(regions.window);
            }
        }
        self.regions = regions;
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
        self.heads = indices.iter().flat_map(|index| self.heads[index * heads..][..heads].to_vec()).collect();
        Ok(())
    }

    pub fn reset(&mut self) {
        self.heads.clear();
        self.regions = Regions::default();
    }

    /// Bytes of all that is held: pages with their slack, statistics, sinks and windows with their capacity. What heads or
    /// sequences share counts once.
    pub fn nbytes(&self) -> usize {
        let mut held = HashMap::new();
        for head in &self.heads {
            held.extend(head.keys.held(&self.spec.keys));
            held.extend(head.values.held(&self.spec.values));
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

/// One append to one stream.
struct StreamAppend<'a> {
    codec: &'a Codec,
    isa: Isa,
    kv_head: usize,
    /// `[1, 1, n, width]`
    rows: TensorView<'a>,
    plan: AppendPlan,
}

impl StreamAppend<'_> {
    fn run(&self, stream: &mut Stream) {
        let AppendPlan { rows, to_sinks, to_pack, from_window } = self.plan;
        self.copy(0, to_sinks, &mut stream.sinks);
        self.pack(stream, to_pack, from_window);
        stream.window.drop_front(from_window);
        let first = to_sinks + to_pack - from_window;
        self.copy(first, rows - first, &mut stream.window);
    }

    fn copy(&self, first: usize, count: usize, target: &mut PlainRows) {
        if count > 0 {
            let row_bytes = self.rows.width() * self.rows.dtype().size();
            for (i, bytes) in target.extend(count).chunks_exact_mut(row_bytes).enumerate() {
                self.rows.copy_row_bytes(0, 0, first + i, bytes);
            }
        }
    }

    /// Encodes `count` rows: the first `from_window` of the window, then new ones.
    fn pack(&self, stream: &mut Stream, count: usize, from_window: usize) {
        let width = self.rows.width();
        let Stream { past, window, .. } = stream;
        let read = |i: usize, row: &mut [f32]| {
            if i < from_window {
                cpu::plain_row(self.isa, window.rows(i, 1), window.dtype, row);
            } else {
                self.rows.read_row_f32(0, 0, self.plan.to_sinks + i - from_window, row);
            }
        };
        if self.codec.is_raw() {
            for i in 0..count {
                let (index, page) = past.next_row(&self.codec.layout);
                let (bytes, _) = page.row_mut(&self.codec.layout, index);
                if i < from_window {
                    bytes.copy_from_slice(window.rows(i, 1));
                } else {
                    self.rows.copy_row_bytes(0, 0, self.plan.to_sinks + i - from_window, bytes);
                }
            }
            return;
        }
        let mut done = 0;
        while done < count {
            let (affine, rows) = match &self.codec.source {
                Source::Static(_) => (None, count - done),
                Source::Block(rule) => {
                    let inside = past.len() % rule.rows;
                    let rows = (count - done).min(rule.rows - inside);
                    if inside == 0 {
                        let mut block = vec![0.0; rows * width];
                        block.chunks_exact_mut(width).enumerate().for_each(|(i, row)| read(done + i, row));
                        past.push_block(rule.statistics(&block, width));
                    }
                    (Some(past.block(past.len(), rule.rows).expand(width)), rows)
                }
            };
            let affine = affine.as_ref().or(self.codec.static_affine(self.kv_head));
            self.encode(past, affine.expect("a static codec has an affine for every head"), rows, done, &read);
            done += rows;
        }
    }

    fn encode(
        &self,
        past: &mut PackedRows,
        affine: &Affine,
        count: usize,
        first: usize,
        read: &impl Fn(usize, &mut [f32]),
    ) {
        let mut row = vec![0.0; self.rows.width()];
        for i in first..first + count {
            read(i, &mut row);
            let (index, page) = past.next_row(&self.codec.layout);
            let (codes, metadata) = page.row_mut(&self.codec.layout, index);
            cpu::encode_row(self.isa, self.codec, affine, self.kv_head, &row, codes, metadata);
        }
    }
}

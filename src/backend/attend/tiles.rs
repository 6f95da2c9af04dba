//! What a job reads: the rows of its chunks, tile by tile, and what stands beside packed ones. What it does with them is in `worker.rs` and
//! `panel.rs`.

use std::ops::{Deref, DerefMut, Range};

use super::{CHUNK, Chunk, Job, Plan, Region};
use crate::backend::simd::{levels, prefetch};
use crate::codec::Codec;
use crate::format::{Format, PAGE_ROWS};
use crate::layer::{Head, Stream};
use crate::transform::Source;

/// Numbers of four bytes that begin at a cache line: a vector of 16 that straddles two costs twice.
pub(super) struct Buffer<T = f32> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Clone + Default> Buffer<T> {
    pub(super) fn zeroed(len: usize) -> Self {
        Self::aligned(len, 64)
    }

    /// Beginning at a multiple of `bytes`.
    fn aligned(len: usize, bytes: usize) -> Self {
        let slack = bytes / size_of::<T>() - 1;
        let data = vec![T::default(); len + slack];
        let start = data.as_ptr().align_offset(bytes).min(slack);
        Self { data, start, len }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

/// f32 of a decoded tile: 16 KiB.
pub(super) const TILE_FLOATS: usize = 4096;

/// The rows of a chunk that queries may see, and the token that its row 0 is, or would be.
pub(super) struct Visible {
    pub(super) token: usize,
    pub(super) rows: Range<usize>,
}

/// Shift and scale of every channel, expanded; `block` says whose.
pub(super) struct Affinity {
    pub(super) shift: Vec<f32>,
    pub(super) scale: Vec<f32>,
    /// None before any.
    pub(super) block: Option<usize>,
}

impl Affinity {
    pub(super) fn new(width: usize) -> Self {
        Self { shift: vec![0.0; width], scale: vec![1.0; width], block: None }
    }

    fn block_of(codec: &Codec, row: usize) -> usize {
        match &codec.source {
            Source::Static(_) | Source::Turning(_) => 0,
            Source::Block(rule) => row / rule.rows,
        }
    }

    /// Whether row `row` has other ones.
    pub(super) fn differs_at(&self, codec: &Codec, row: usize) -> bool {
        self.block != Some(Self::block_of(codec, row))
    }

    /// Turns to the block of row `row`; true if that changed anything.
    pub(super) fn turn_to(&mut self, codec: &Codec, kv_head: usize, stream: &Stream, row: usize) -> bool {
        if !self.differs_at(codec, row) {
            return false;
        }
        self.block = Some(Self::block_of(codec, row));
        match (&codec.source, codec.static_affine(kv_head)) {
            (Source::Block(rule), _) => {
                stream.past.block(row, rule.rows).expand_into(&mut self.shift, &mut self.scale);
            }
            (_, Some(affine)) => {
                self.shift.copy_from_slice(&affine.shift);
                self.scale.copy_from_slice(&affine.scale);
            }
            // The mean is taken care of elsewhere.
            (Source::Turning(_), _) => {}
            (_, None) => unreachable!("a static codec serves every head"),
        }
        true
    }
}

/// Buffers of what is read for one job.
pub(super) struct Tiles<'a> {
    plan: &'a Plan<'a>,
    job: Job,
    head: &'a Head,
    /// Rows of levels, or of plain elements, in f32.
    pub(super) tile: Buffer,
    /// `[groups, CHUNK]`
    pub(super) scales: Buffer,
    pub(super) zeros: Buffer,
    /// A page's metadata as it is stored, `[rows, scales and zero points]`.
    numbers: Buffer,
}

impl<'a> Tiles<'a> {
    pub(super) fn new(plan: &'a Plan<'a>, job: Job) -> Self {
        let spec = plan.layer.spec();
        let groups = spec.keys.layout.groups().max(spec.values.layout.groups());
        Self {
            plan,
            job,
            head: plan.layer.head(job.batch, job.kv_head),
            // A store across the end of a memory page costs as much as the rest of its row.
            tile: Buffer::aligned(TILE_FLOATS.max(8 * plan.key_width.max(plan.value_width)) + levels::SLACK, 4096),
            scales: Buffer::zeroed(groups * CHUNK),
            zeros: Buffer::zeroed(groups * CHUNK),
            numbers: Buffer::zeroed(2 * groups * PAGE_ROWS),
        }
    }

    /// All rows of a chunk are tokens in their order, unless the sequence begins with padding.
    pub(super) fn tokens_of(&self, chunk: Chunk) -> Visible {
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
    pub(super) fn last_visible(&self, q: usize) -> usize {
        if self.plan.call.causal {
            let (_, position) = self.plan.query_at(self.job, q);
            self.plan.tokens - self.plan.length + position
        } else {
            self.plan.tokens - 1
        }
    }

    pub(super) fn sees_nothing(&self, chunk: Chunk) -> bool {
        (0..self.job.queries).all(|q| self.last_visible(q) < chunk.token)
    }

    pub(super) fn codec(&self, values: bool) -> &'a Codec {
        let spec = self.plan.layer.spec();
        if values { &spec.values } else { &spec.keys }
    }

    pub(super) fn stream(&self, values: bool) -> &'a Stream {
        if values { &self.head.values } else { &self.head.keys }
    }

    /// The codes of row `row` of the past and of those behind it on its page.
    pub(super) fn codes(&self, values: bool, row: usize) -> &'a [u8] {
        let layout = &self.codec(values).layout;
        &self.stream(values).past.page(row / PAGE_ROWS).codes(layout)[row % PAGE_ROWS * layout.code_bytes..]
    }

    /// The next tile of a chunk: rows `start .. start + count` of it, decoded to levels or widened.
    pub(super) fn load(&mut self, chunk: Chunk, values: bool, start: usize, count: usize) {
        let (isa, first) = (self.plan.isa, chunk.first + start);
        if chunk.region == Region::Past {
            return self.load_past(values, first, count);
        }
        let width = self.codec(values).layout.head_dim;
        let stream = self.stream(values);
        let tile = &mut self.tile[..count * width];
        match chunk.region {
            Region::Sinks => levels::decode_plain(isa, stream.sinks.rows(first, count), stream.sinks.dtype, tile),
            Region::Window => levels::decode_plain(isa, stream.window.rows(first, count), stream.window.dtype, tile),
            Region::Fresh => {
                let fresh = self.plan.call.fresh.as_ref().expect("a fresh chunk has fresh rows");
                let rows = if values { &fresh.1 } else { &fresh.0 };
                for (i, row) in tile.chunks_exact_mut(width).enumerate() {
                    rows.read_row_f32(self.job.batch, self.job.kv_head, first + i, row);
                }
            }
            Region::Past => unreachable!("done above"),
        }
    }

    /// Rows `first .. first + count` of the past: levels of the stored channels, or raw rows widened.
    fn load_past(&mut self, values: bool, first: usize, count: usize) {
        let codec = self.codec(values);
        let (layout, isa, width) = (&codec.layout, self.plan.isa, codec.stored_channels());
        // A tile may run over the end of a page.
        let mut done = 0;
        while done < count {
            let rows = (count - done).min(PAGE_ROWS - (first + done) % PAGE_ROWS);
            let codes = self.codes(values, first + done);
            let target = &mut self.tile[done * width..(done + rows) * width + levels::SLACK];
            match layout.format {
                Format::Raw(dtype) => {
                    let bytes = &codes[..rows * layout.code_bytes];
                    levels::decode_plain(isa, bytes, dtype, &mut target[..rows * width]);
                }
                Format::Parts => levels::decode_parts(isa, &codec.parts, layout.code_bytes, codes, rows, target),
                _ => levels::decode_levels(isa, layout, &codec.codebook, codes, rows, target),
            }
            done += rows;
        }
        self.prefetch_past(values, first + count, count);
    }

    /// Asks for up to `count` rows of the past, which come after the product of those before, about a memory latency away.
    pub(super) fn prefetch_past(&self, values: bool, next: usize, count: usize) {
        let layout = &self.codec(values).layout;
        let stream = self.stream(values);
        if next < stream.past.len() {
            let (page, row) = (stream.past.page(next / PAGE_ROWS), next % PAGE_ROWS);
            let rows = count.min(PAGE_ROWS - row);
            prefetch(&page.codes(layout)[row * layout.code_bytes..(row + rows) * layout.code_bytes]);
            if row == 0 {
                prefetch(page.metadata(layout));
            }
        }
    }

    /// Scales and zero points of a packed chunk, `[groups, CHUNK]`.
    pub(super) fn load_metadata(&mut self, chunk: Chunk, values: bool) {
        let codec = self.codec(values);
        let layout = &codec.layout;
        let stream = self.stream(values);
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

    pub(super) fn is_packed(&self, chunk: Chunk, values: bool) -> bool {
        chunk.region == Region::Past && !self.codec(values).is_raw()
    }
}

/// The stored channels of group `g`.
pub(super) fn group_channels(codec: &Codec, g: usize) -> Range<usize> {
    let size = codec.layout.group_size;
    g * size..((g + 1) * size).min(codec.stored_channels())
}

/// First row and number of rows, even but for the last, of the tiles of `count` rows of `width` channels.
pub(super) fn tiles(count: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (TILE_FLOATS / width).max(8) & !1;
    (0..count).step_by(step).map(move |start| (start, step.min(count - start)))
}

//! One append to one stream: which rows go to the sinks, are encoded, or stay in the window, and the statistics of blocks.

use half::f16;

use crate::backend::{cpu, simd::Isa};
use crate::codec::Codec;
use crate::page::PlainRows;
use crate::tensor::TensorView;
use crate::transform::{Affine, Source, spans_of};

use super::Stream;

/// How an append of some rows falls into the regions.
#[derive(Clone, Copy, Debug)]
pub(super) struct AppendPlan {
    pub rows: usize,
    /// Tokens before.
    pub stored: usize,
    pub to_sinks: usize,
    /// Rows of the window before; rows to pack and to take statistics of come from there first, then from the new ones.
    pub window: usize,
    pub to_pack: usize,
    /// Blocks whose statistics are fixed when the rows are there.
    pub blocks: usize,
}

impl AppendPlan {
    /// Of the packed rows, how many come from the window; the others never enter it.
    pub fn leaving_window(&self) -> usize {
        self.to_pack.min(self.window)
    }
}

/// Room that one thread uses again for every stream of an append.
#[derive(Default)]
pub(super) struct Scratch {
    row: Vec<f32>,
    block: Vec<f32>,
    affine: Affine,
}

/// One append to one stream.
pub(super) struct StreamAppend<'a> {
    pub codec: &'a Codec,
    pub isa: Isa,
    pub kv_head: usize,
    /// `[1, 1, n, width]`
    pub rows: TensorView<'a>,
    /// Of the scales of the channels in block statistics, from the queries.
    pub factors: Option<&'a [f16]>,
    /// Tokens of padding in front of the sequence, and places of sinks.
    pub padding: usize,
    pub sinks: usize,
    pub plan: AppendPlan,
}

impl StreamAppend<'_> {
    pub fn run(&self, stream: &mut Stream, scratch: &mut Scratch) {
        let AppendPlan { rows, to_sinks, to_pack, .. } = self.plan;
        let from_window = self.plan.leaving_window();
        self.keep_sinks(&mut stream.sinks);
        self.fix_statistics(stream, scratch);
        if self.codec.is_raw() {
            self.pack_raw(stream);
        } else {
            self.pack(stream, scratch);
        }
        stream.window.drop_front(from_window);
        let first = to_sinks + to_pack - from_window;
        self.copy(first, rows - first, &mut stream.window);
    }

    /// The sinks of a padded sequence are its first tokens behind the padding: until they come their places hold zeros.
    fn keep_sinks(&self, sinks: &mut PlainRows) {
        let AppendPlan { rows, stored, to_sinks, .. } = self.plan;
        if self.padding == 0 {
            return self.copy(0, to_sinks, sinks);
        }
        if to_sinks > 0 {
            sinks.extend(to_sinks);
        }
        for token in self.padding.max(stored)..(self.padding + self.sinks).min(stored + rows) {
            self.rows.copy_row_bytes(0, 0, token - stored, sinks.row_mut(token - self.padding));
        }
    }

    /// New rows up to here are padding, or lie among the sinks: behind the sinks their places hold zeros.
    fn blank_rows(&self) -> usize {
        if self.padding == 0 { 0 } else { (self.padding + self.sinks).saturating_sub(self.plan.stored) }
    }

    fn copy(&self, first: usize, count: usize, target: &mut PlainRows) {
        if count > 0 {
            let row_bytes = self.rows.width() * self.rows.dtype().size();
            let blank = self.blank_rows().saturating_sub(first);
            for (i, bytes) in target.extend(count).chunks_exact_mut(row_bytes).enumerate().skip(blank) {
                self.rows.copy_row_bytes(0, 0, first + i, bytes);
            }
        }
    }

    /// Row `i` behind the packed ones: of the window, or a new one.
    fn read(&self, window: &PlainRows, i: usize, row: &mut [f32]) {
        if i < self.plan.window {
            return cpu::plain_row(self.isa, window.rows(i, 1), window.dtype, row);
        }
        let new = self.plan.to_sinks + i - self.plan.window;
        if new < self.blank_rows() {
            row.fill(0.0);
        } else {
            self.rows.read_row_f32(0, 0, new, row);
        }
    }

    /// None of the rows of a block without statistics is packed: all are at hand. Padding has no part in them.
    fn fix_statistics(&self, stream: &mut Stream, scratch: &mut Scratch) {
        let Source::Block(rule) = &self.codec.source else { return };
        if self.codec.is_raw() {
            return;
        }
        let width = self.rows.width();
        let Stream { past, window, .. } = stream;
        for block in past.blocks()..self.plan.blocks {
            let first = block * rule.rows - past.len();
            scratch.block.resize(rule.rows * width, 0.0);
            for (i, row) in scratch.block.chunks_exact_mut(width).enumerate() {
                self.read(window, first + i, row);
            }
            let padding = self.padding.saturating_sub(block * rule.rows).min(rule.rows);
            past.push_block(rule.statistics(&scratch.block[padding * width..], width, self.factors));
        }
    }

    fn pack_raw(&self, stream: &mut Stream) {
        let Stream { past, window, .. } = stream;
        for i in 0..self.plan.to_pack {
            let (index, page) = past.next_row(&self.codec.layout);
            let (bytes, _) = page.row_mut(&self.codec.layout, index);
            let new = self.plan.to_sinks + i.saturating_sub(self.plan.window);
            if i < self.plan.window {
                bytes.copy_from_slice(window.rows(i, 1));
            } else if new < self.blank_rows() {
                bytes.fill(0);
            } else {
                self.rows.copy_row_bytes(0, 0, new, bytes);
            }
        }
    }

    /// Encodes the rows that leave the window.
    fn pack(&self, stream: &mut Stream, scratch: &mut Scratch) {
        let Stream { past, window, .. } = stream;
        let Scratch { row, affine: changing, .. } = scratch;
        row.resize(self.rows.width(), 0.0);
        let position = |row: usize| (row + self.sinks) as i64 - self.padding as i64;
        let turning = self.codec.turning_mean(self.kv_head).map(|mean| {
            *changing = Affine::identity(row.len());
            (mean, mean.turns.spans(spans_of(position(past.len()), self.plan.to_pack)))
        });
        let mut turned_to = None;
        for i in 0..self.plan.to_pack {
            let affine = match &self.codec.source {
                Source::Static(_) => {
                    self.codec.static_affine(self.kv_head).expect("a static codec has an affine for every head")
                }
                Source::Block(rule) => {
                    let block = past.len() / rule.rows;
                    if turned_to.replace(block) != Some(block) {
                        past.block(past.len(), rule.rows).expand_to(row.len(), changing);
                    }
                    &*changing
                }
                Source::Turning(_) => {
                    let (mean, spans) = turning.as_ref().expect("a turning codec has a mean for every head");
                    mean.at(spans, position(past.len()), &mut changing.shift);
                    &*changing
                }
            };
            self.read(window, i, row);
            let (index, page) = past.next_row(&self.codec.layout);
            let (codes, metadata) = page.row_mut(&self.codec.layout, index);
            cpu::encode_row(self.isa, self.codec, affine, self.kv_head, row, codes, metadata);
        }
    }
}

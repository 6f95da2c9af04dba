//! The batch in another order, with fewer or more sequences, or a copy of it: pages are shared, the rest is moved by one launch an array.

use std::sync::{Arc, Mutex};

use super::super::launch::Stream;
use super::super::memory::{Block, Page};
use super::super::pages::Side;
use super::super::params::CopyParams;
use super::fixed::Steps;
use super::queries::Seen;
use super::{CudaLayer, Held, SideRows, State, pairs, whole_rows};
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;

impl CudaLayer {
    /// New row `i` of the batch is the old row `indices[i]`: pages are shared, all else is copied.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn gather(&mut self, indices: &[usize], stream: Stream) -> Result<()> {
        let batch = self.batch_size();
        if indices.is_empty() {
            return Err(Error::value("indices", "at least one row of the batch", "none"));
        }
        if let Some(index) = indices.iter().find(|index| **index >= batch) {
            return Err(Error::value("indices", format!("rows of the batch, 0..{batch}"), index));
        }
        // SAFETY: the caller's promise.
        *self = unsafe { self.gathered(indices, stream) }?;
        Ok(())
    }

    /// An independent layer that shares all pages until one of them is written.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn duplicate(&self, stream: Stream) -> Result<Self> {
        let all: Vec<usize> = (0..self.batch_size()).collect();
        // SAFETY: the caller's promise.
        unsafe { self.gathered(&all, stream) }
    }

    unsafe fn gathered(&self, indices: &[usize], stream: Stream) -> Result<Self> {
        self.expect_eager("gather")?;
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let padding = if self.padding.is_empty() || self.held.is_none() {
            self.padding.clone()
        } else {
            indices.iter().map(|index| self.padding[*index]).collect()
        };
        let mut copy = Self {
            shared: Arc::clone(&self.shared),
            regions: self.regions,
            padding,
            blocks: self.blocks,
            held: None,
            steps: Steps::Eager,
            one_launch: self.one_launch,
            entering: Mutex::default(),
        };
        if let Some(held) = &self.held {
            // SAFETY: the caller's promise.
            copy.held = Some(unsafe { copy.gather_held(held, indices, stream) }?);
        }
        Ok(copy)
    }

    unsafe fn gather_held(&self, old: &Held, indices: &[usize], stream: Stream) -> Result<Held> {
        let shared = &*self.shared;
        let (batch, heads) = (indices.len(), shared.spec.num_key_value_heads);
        let sequences: Vec<i32> = indices.iter().map(|index| *index as i32).collect();
        let sequence_block = shared.memory.allocate(8 * batch.div_ceil(2))?;
        let words: Vec<_> = pairs(sequence_block.address(), &sequences).collect();
        // SAFETY: a new block; the caller's promise for the stream.
        unsafe { shared.kernels.poke(&words, stream) }?;
        // An array of `rows` rows a head, for the new batch.
        let gather = |block: Option<&Block>, rows: usize, row_bytes: usize| -> Result<Option<Block>> {
            let Some(block) = block else { return Ok(None) };
            let target = shared.memory.allocate(batch * heads * rows * row_bytes)?;
            let parameters = CopyParams {
                sequences: sequence_block.address(),
                ..whole_rows(block.address(), target.address(), heads, rows, rows, row_bytes)
            };
            // SAFETY: both blocks have these rows; freed ones are used again on the same stream only.
            unsafe { shared.kernels.copy_rows(&parameters, heads, batch, row_bytes, stream) }?;
            Ok(Some(target))
        };
        // A page behind them may have a row that is packed ahead of its time: whoever packs it next has a page for it alone.
        let filled = self.regions.packed.div_ceil(PAGE_ROWS);
        let of_rows = |pages: &Vec<Arc<Page>>| pages[..filled.min(pages.len())].to_vec();
        let side = |side: Side| -> Result<SideRows> {
            let (rows, row_bytes) = (old.side(side), shared.row_bytes(side));
            let number_bytes = 4 * shared.codec(side).layout.head_dim;
            let statistics = match &rows.statistics {
                Some([shift, scale]) => {
                    let copies = [shift, scale].map(|block| gather(Some(block), old.block_room, number_bytes));
                    let [shift, scale] = copies;
                    shift?.zip(scale?).map(<[Block; 2]>::from)
                }
                None => None,
            };
            Ok(SideRows {
                pool: Arc::clone(&rows.pool),
                pages: indices.iter().flat_map(|index| &rows.pages[index * heads..][..heads]).map(of_rows).collect(),
                table: gather(rows.table.as_ref(), 1, 8 * old.table_pages)?,
                sinks: gather(rows.sinks.as_ref(), shared.spec.sinks, row_bytes)?,
                ring: gather(rows.ring.as_ref(), old.ring_rows, row_bytes)?,
                statistics,
            })
        };
        let sides = [side(Side::Keys)?, side(Side::Values)?];
        let state = shared.memory.allocate(State::bytes(batch, heads))?;
        let queries = match old.queries.as_ref().filter(|seen| seen.started) {
            Some(seen) => {
                let width = shared.spec.keys.layout.head_dim;
                let squares = gather(Some(&seen.squares), 1, 8 * (width + 1))?;
                let factors = gather(Some(&seen.factors), 1, 4 * width)?;
                squares.zip(factors).map(|(squares, factors)| Seen {
                    squares,
                    factors,
                    started: true,
                    tokens: indices.iter().map(|index| seen.tokens[*index]).collect(),
                    fixed: indices.iter().map(|index| seen.fixed[*index]).collect(),
                })
            }
            None => None,
        };
        let held = Held { batch, state, sides, spans: old.spans.clone(), queries, reserved: None, ..*old };
        // SAFETY: new blocks and the old state; the caller's promise for the stream.
        unsafe {
            shared.kernels.poke(&self.state_words(&held, self.regions), stream)?;
            self.clear_arrivals(&held, stream)?;
            let [to, from] = [&held, old].map(|held| held.state.address() + State::REFUSED);
            shared.kernels.device().copy(to, from, 4, stream)?;
        }
        Ok(held)
    }
}

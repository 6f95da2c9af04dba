//! Room for what an append brings: everything that asks for memory does it here, before rows move.
//!
//! Rings, tables and statistics grow by doubling: a new array, and a launch that moves what the old one holds.

use std::sync::Arc;

use super::super::constants::SpanTable;
use super::super::launch::Stream;
use super::super::memory::{Block, Page};
use super::super::pages::Side;
use super::super::params::CopyParams;
use super::append::Plan;
use super::{CudaLayer, Held, SideRows, State, address, new_pool, whole_rows};
use crate::error::Result;
use crate::format::PAGE_ROWS;

impl CudaLayer {
    /// A batch without rows.
    pub(super) fn begin(&self, batch: usize) -> Result<Held> {
        let shared = &*self.shared;
        let heads = batch * shared.spec.num_key_value_heads;
        let side = |side: Side| -> Result<SideRows> {
            let sink_bytes = heads * shared.spec.sinks * shared.row_bytes(side);
            let sinks = (sink_bytes > 0).then(|| shared.memory.allocate(sink_bytes)).transpose()?;
            let pages = (0..heads).map(|_| Vec::new()).collect();
            Ok(SideRows { pool: new_pool(shared, side), pages, table: None, sinks, ring: None, statistics: None })
        };
        Ok(Held {
            batch,
            state: shared.memory.allocate(State::bytes(batch, shared.spec.num_key_value_heads))?,
            sides: [side(Side::Keys)?, side(Side::Values)?],
            table_pages: 0,
            ring_rows: 0,
            ring_first: 0,
            block_room: 0,
            spans: None,
            queries: None,
            reserved: None,
        })
    }

    /// Room in the rings for so many rows, in the tables and the statistics, and the turns of all positions.
    pub(super) unsafe fn reserve(&self, held: &mut Held, plan: Plan, ring_rows: usize, stream: Stream) -> Result<()> {
        let shared = &*self.shared;
        let (heads, device) = (shared.spec.num_key_value_heads, shared.kernels.device());
        let grow =
            |old: Option<&Block>, old_rows: usize, first: usize, room: usize, row_bytes: usize| -> Result<Block> {
                let block = shared.memory.allocate(held.batch * heads * room * row_bytes)?;
                if let Some(old) = old {
                    let (row, head) = (row_bytes as i64, (room * row_bytes) as i64);
                    let parameters = CopyParams {
                        source_first: first as i32,
                        source_ring: old_rows as i32,
                        target_batch_stride: heads as i64 * head,
                        target_head_stride: head,
                        target_row_stride: row,
                        ..whole_rows(old.address(), block.address(), heads, old_rows, old_rows, row_bytes)
                    };
                    // SAFETY: both blocks have these rows; the old one is used again on this stream only.
                    unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, stream) }?;
                }
                Ok(block)
            };
        let pages = (plan.packed + plan.to_pack).div_ceil(PAGE_ROWS);
        // A ring needs no more than the window, and what waits for the rest of its block.
        let most = shared.spec.window.saturating_add(self.block_rows().saturating_sub(1));
        let ring_room = (ring_rows > held.ring_rows).then(|| ring_rows.max((2 * held.ring_rows).max(32).min(most)));
        let table_room = (pages > held.table_pages).then(|| pages.max(2 * held.table_pages).max(4));
        let block_room = (plan.blocks > held.block_room).then(|| plan.blocks.max(2 * held.block_room).max(2));
        let mut rings = [None, None];
        let mut tables = [None, None];
        let mut statistics = [None, None];
        for side in Side::BOTH {
            let (index, rows) = (side as usize, held.side(side));
            if let Some(room) = ring_room {
                let row_bytes = shared.row_bytes(side);
                rings[index] = Some(grow(rows.ring.as_ref(), held.ring_rows, held.ring_first, room, row_bytes)?);
            }
            if let Some(room) = table_room {
                tables[index] = Some(grow(rows.table.as_ref(), held.table_pages, 0, room, 8)?);
            }
            if let Some(room) = block_room.filter(|_| shared.codec(side).block_rows() > 0) {
                let row_bytes = 4 * shared.codec(side).layout.head_dim;
                let old = rows.statistics.as_ref();
                let shift = grow(old.map(|old| &old[0]), held.block_room, 0, room, row_bytes)?;
                let scale = grow(old.map(|old| &old[1]), held.block_room, 0, room, row_bytes)?;
                statistics[index] = Some([shift, scale]);
            }
        }
        let positions = self.positions(plan.packed + plan.to_pack);
        if plan.to_pack > 0 && held.spans.as_ref().is_none_or(|spans| !spans.covers(positions)) {
            // SAFETY: the caller's promise.
            held.spans = unsafe { SpanTable::covering(&shared.spec.keys, positions, device, &*shared.memory, stream) }?;
        }
        for (rows, ((ring, table), statistics)) in
            held.sides.iter_mut().zip(rings.into_iter().zip(tables).zip(statistics))
        {
            rows.ring = ring.or(rows.ring.take());
            rows.table = table.or(rows.table.take());
            rows.statistics = statistics.or(rows.statistics.take());
        }
        if let Some(room) = ring_room {
            (held.ring_rows, held.ring_first) = (room, 0);
        }
        held.table_pages = table_room.unwrap_or(held.table_pages);
        held.block_room = block_room.unwrap_or(held.block_room);
        Ok(())
    }

    /// Pages for the rows that will be packed, ours alone: reserved ones first, which the tables know; `words` gets what they do not know yet.
    pub(super) unsafe fn reserve_pages(
        &self,
        held: &mut Held,
        plan: Plan,
        words: &mut Vec<(u64, u64)>,
        stream: Stream,
    ) -> Result<()> {
        if plan.to_pack == 0 {
            return Ok(());
        }
        let begun = !plan.packed.is_multiple_of(PAGE_ROWS);
        let wanted = (plan.packed + plan.to_pack).div_ceil(PAGE_ROWS);
        let room = held.table_pages;
        let Held { sides, reserved, .. } = held;
        // All pages of both streams before any is written.
        let mut taken = Vec::new();
        for (side, rows) in sides.iter_mut().enumerate() {
            let missing = |(index, pages): (usize, &mut Vec<Arc<Page>>)| {
                let shared = begun && pages.last_mut().is_some_and(|page| Arc::get_mut(page).is_none());
                let more = wanted - pages.len();
                more - more.min(reserved.as_ref().map_or(0, |own| own.pages[side][index].len())) + usize::from(shared)
            };
            taken.push(rows.pool.take(rows.pages.iter_mut().enumerate().map(missing).sum())?.into_iter());
        }
        for (side, (rows, mut taken)) in sides.iter_mut().zip(taken).enumerate() {
            let (table, page_bytes) = (address(rows.table.as_ref()), rows.pool.page_bytes());
            for (index, pages) in rows.pages.iter_mut().enumerate() {
                let entry = |page: usize| table + 8 * (index * room + page) as u64;
                if begun
                    && let Some(last) = pages.last_mut()
                    && Arc::get_mut(last).is_none()
                    && let Some(own) = taken.next()
                {
                    // SAFETY: a whole page each, the new one ours alone; the caller's promise for the stream.
                    unsafe {
                        self.shared.kernels.device().copy(own.address(), last.address(), page_bytes, stream)?;
                    }
                    words.push((entry(plan.packed / PAGE_ROWS), own.address()));
                    *last = own;
                }
                if let Some(own) = reserved {
                    own.give(side, index, pages, wanted);
                }
                while pages.len() < wanted
                    && let Some(page) = taken.next()
                {
                    words.push((entry(pages.len()), page.address()));
                    pages.push(page);
                }
            }
        }
        Ok(())
    }
}

//! Many queries over rows in the model's type: how a call is cut for `kernels/attend_rows.cuh`, and its launches.
//!
//! Sinks, window and the call's own rows are one launch. A packed past goes to `attend_many` as it is; where there are so many queries that it pays to
//! unpack it once for all of them, it goes through the workspace a piece after the other, each of which `kernels/unpack.cuh` brings back and a launch
//! attends to that goes on with the states of those before.

use super::super::kernels::{ManyRows, Queries, REACH_THREADS, RowKernels, RowsShape, SHOWS_THREADS, Unpack};
use super::super::pages::Side;
use super::super::params::{CopyParams, PlainRegion, ReachParams, RowsParams, RowsRegion, UnpackParams};
use super::attend::{EXTRAS_HEAD, MANY_QUERIES, PlainSplits, even_splits};
use super::launches::{Launches, Region};
use super::{CudaLayer, address, whole_rows};
use crate::error::Result;
use crate::format::PAGE_ROWS;
use crate::layer::Regions;
use crate::tensor::Dtype;

/// Queries of a kv head from which a past that `attend_many` could take is unpacked for all of them: that kernel unpacks it for 128 at a time.
const PIECES_QUERIES: usize = 512;
/// Rows of a piece that is worth its launches.
const FEWEST_ROWS: usize = 512;
/// Tiles of rows that a split has at least.
const FEWEST_TILES: usize = 4;
/// Blocks of `unpack` for each multiprocessor, each of which makes its matrix anew, and pages that one takes at most.
const UNPACK_BLOCKS: usize = 4;
const MOST_PAGES: usize = 8;

/// How many queries pass over rows in the model's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowsCut {
    /// Blocks of queries of a kv head.
    pub blocks: usize,
    /// Of each launch, and states of a query.
    pub splits: usize,
    /// Rows of a piece of the past, a multiple of a page's; 0 where there is none in pieces.
    pub piece: usize,
}

impl RowsCut {
    /// Of what a mask lets a query see.
    pub const REACH_BYTES: usize = 16;
}

impl CudaLayer {
    /// None where queries are few, or products of 16-bit elements would not do.
    pub(super) fn cut_rows(&self, queries: usize, regions: Regions, fresh: usize) -> Result<Option<RowsCut>> {
        if queries < MANY_QUERIES || self.spec().dtype == Dtype::F32 {
            return Ok(None);
        }
        let Regions { sinks, packed, window } = regions;
        let piece = self.piece_rows(queries, packed);
        if piece == 0 && packed > 0 && !self.shared.kernels.takes_many() {
            return Ok(None);
        }
        let kernels = self.shared.kernels.attention(Queries::Pieces, false)?;
        let RowKernels::Many(rows) = &kernels.rows else {
            return Ok(None);
        };
        let tiles = |count: usize| count.div_ceil(rows.shape.rows);
        let blocks = queries.div_ceil(rows.shape.queries);
        let others = (self.batch_size() * self.spec().num_key_value_heads * blocks).max(1);
        let wanted = even_splits(others, rows.resident.max(1) * self.shared.kernels.multiprocessors());
        let most = (tiles(sinks) + tiles(window) + tiles(fresh)).max(tiles(piece)) / FEWEST_TILES;
        Ok(Some(RowsCut { blocks, splits: wanted.clamp(1, most.max(1)), piece }))
    }

    /// Rows of a piece of the past; 0: it is not unpacked.
    fn piece_rows(&self, queries: usize, packed: usize) -> usize {
        // A step that is replayed has launches for rows that there are not yet.
        if self.is_capturing() {
            return 0;
        }
        let shared = &*self.shared;
        // With statistics of blocks `attend_many` has a state of each query for each block.
        let least = if shared.kernels.takes_many() && self.block_rows() == 0 { PIECES_QUERIES } else { 0 };
        let row: usize = Side::BOTH.iter().map(|side| shared.row_bytes(*side)).sum();
        let sequences = (self.batch_size() * self.spec().num_key_value_heads).max(1);
        let room = shared.workspace_bytes / 2 / (sequences * row) / PAGE_ROWS * PAGE_ROWS;
        let piece = packed.next_multiple_of(PAGE_ROWS).min(room);
        if queries < least || piece < packed.min(FEWEST_ROWS) { 0 } else { piece }
    }
}

impl Launches<'_> {
    /// What both launches of [`Self::rows`] and of a piece have.
    fn rows_parameters(&self, cut: RowsCut) -> RowsParams {
        let Self { call, shape, .. } = self;
        RowsParams {
            query: call.query.address,
            query_batch_stride: call.query.strides[0],
            query_head_stride: call.query.strides[1],
            query_position_stride: call.query.strides[2],
            states: self.place(shape.places.states),
            lengths: self.lengths_read(),
            reach: self.place(shape.places.reach),
            mask: self.mask,
            scale: call.scale,
            fresh_rows: call.fresh_rows() as i32,
            state_count: shape.state_count as i32,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            past_room: cut.piece as i32,
            ..RowsParams::default()
        }
    }

    /// # Safety
    /// As [`CudaLayer::attend`], here and in the functions below.
    unsafe fn launch_rows(&self, kernels: &ManyRows, cut: RowsCut, mut parameters: RowsParams) -> Result<()> {
        let tiles: usize = parameters.regions.iter().map(|region| region.tiles as usize).sum();
        parameters.tiles_per_split = tiles.div_ceil(cut.splits) as i32;
        let heads = self.layer.spec().num_key_value_heads;
        let grid = [cut.splits as u32, (heads * cut.blocks) as u32, self.held.batch as u32];
        // SAFETY: rows of this layer or of the workspace; states have room for those of all splits; the caller's promise for the rest.
        unsafe { self.launch_with(&kernels.attend, grid, RowsShape::THREADS, kernels.shape.shared_bytes, &parameters) }
    }

    /// States of sinks, window and the call's own rows.
    pub(super) unsafe fn rows(&self, kernels: &ManyRows) -> Result<()> {
        let Some(cut) = self.shape.rows else {
            return Ok(());
        };
        // SAFETY: the caller's promise.
        unsafe { self.reach(kernels) }?;
        let Regions { sinks, window, .. } = self.shape.regions;
        let counts = [(Region::Sinks, sinks), (Region::Window, window), (Region::Fresh, self.call.fresh_rows())];
        let mut parameters = self.rows_parameters(cut);
        for (to, (region, count)) in parameters.regions.iter_mut().zip(counts) {
            *to = rows_region(self.region(region, PlainSplits::default()), count, kernels.shape.rows);
        }
        // SAFETY: as above.
        unsafe { self.launch_rows(kernels, cut, parameters) }
    }

    /// What a mask lets queries see.
    unsafe fn reach(&self, kernels: &ManyRows) -> Result<()> {
        let Some((rows, parameters)) = self.mask_rows() else {
            return Ok(());
        };
        // SAFETY: a place in the workspace with room for as many queries as there are; the caller's promise for the mask.
        unsafe { self.launch(&kernels.reach, rows, REACH_THREADS, &parameters) }
    }

    /// Whether it matters that a mask hides no packed rows from few queries: there are whole pages, and nothing else is done to scores.
    pub(super) fn asks_mask(&self) -> bool {
        self.call.mask.is_some() && self.call.softcap <= 0.0 && self.shape.regions.packed >= PAGE_ROWS
    }

    /// Whether a mask hides packed rows from few queries, for the next launch, which reads it at once.
    pub(super) unsafe fn shows(&self) -> Result<()> {
        let Some((rows, parameters)) = self.mask_rows().filter(|_| self.asks_mask()) else {
            return Ok(());
        };
        let function = self.layer.shared.kernels.mask_shows()?;
        // SAFETY: as above.
        unsafe { self.launch(&function, rows, SHOWS_THREADS, &parameters) }?;
        self.wait();
        Ok(())
    }

    /// The rows of a mask, and what finds out about them. Along an axis whose rows are one and the same there is one.
    fn mask_rows(&self) -> Option<([u32; 3], ReachParams)> {
        let mask = self.call.mask.as_ref()?;
        let [batch, heads, positions] =
            [0, 1, 2].map(|axis| if mask.strides[axis] == 0 { 1 } else { mask.shape[axis] });
        let parameters = ReachParams {
            mask: self.mask,
            reach: self.place(self.shape.places.reach),
            lengths: self.lengths_read(),
            heads: heads as i32,
            positions: positions as i32,
            tokens: mask.shape[3] as i32,
            entering: i32::from(self.enters),
            least_padding: self.layer.padding.iter().min().map_or(0, |padding| *padding as i32),
            padding: 0,
        };
        Some(([(batch * heads * positions) as u32, 1, 1], parameters))
    }

    /// States of all regions, those of the past piece by piece.
    pub(super) unsafe fn pieces(&self) -> Result<()> {
        let (RowKernels::Many(kernels), Some(cut)) = (&self.kernels.rows, self.shape.rows) else {
            return Ok(());
        };
        let shared = &*self.layer.shared;
        // SAFETY: the caller's promise, here and below.
        unsafe { self.rows(kernels) }?;
        let mut parameters = self.rows_parameters(cut);
        if cut.piece > 0 && shared.constants[Side::Keys as usize].noise != 0 {
            let (folding, fold) = (self.folding(), shared.kernels.fold()?);
            // SAFETY: places in the workspace have room by `places`.
            unsafe { self.launch(&fold, self.grid(1), self.row_threads(&folding.transform), &folding) }?;
            (parameters.extras, parameters.squares) = (folding.extras, self.place(self.shape.places.squares));
            parameters.extras_width = (EXTRAS_HEAD + shared.codec(Side::Keys).layout.groups()) as i32;
        }
        let mut first = 0;
        while cut.piece > 0 && first < self.shape.regions.packed {
            let count = cut.piece.min(self.shape.regions.packed - first);
            for side in Side::BOTH {
                let squares = if side == Side::Keys { parameters.squares } else { 0 };
                // SAFETY: as above.
                unsafe { self.unpack(side, first, count, cut.piece, squares) }?;
            }
            parameters.regions[0] = self.piece_region(count, cut.piece, kernels.shape.rows);
            (parameters.first_past, parameters.past_rows, parameters.carries) = (first as i32, count as i32, 1);
            // SAFETY: as above.
            unsafe { self.launch_rows(kernels, cut, parameters) }?;
            first += count;
        }
        Ok(())
    }

    /// The rows that are unpacked.
    fn piece_region(&self, count: usize, room: usize, tile: usize) -> RowsRegion {
        let [keys, values] = Side::BOTH.map(|side| self.strides(side, room));
        let rows = PlainRegion {
            key_rows: self.decoded(Side::Keys),
            value_rows: self.decoded(Side::Values),
            key_batch_stride: keys[0],
            key_head_stride: keys[1],
            key_row_stride: keys[2],
            value_batch_stride: values[0],
            value_head_stride: values[1],
            value_row_stride: values[2],
            kind: Region::Past as i32,
            ..PlainRegion::default()
        };
        rows_region(rows, count, tile)
    }

    /// Rows `first` to `first + count` of the past to the workspace, in the model's type; those that are not packed by a copy.
    unsafe fn unpack(&self, side: Side, first: usize, count: usize, room: usize, squares: u64) -> Result<()> {
        let (layer, held, shared) = (self.layer, self.held, &*self.layer.shared);
        let heads = layer.spec().num_key_value_heads;
        let (table, rows) = (address(held.side(side).table.as_ref()), self.decoded(side));
        if shared.codec(side).is_raw() {
            let row_bytes = shared.row_bytes(side);
            let parameters = CopyParams {
                source_table: table,
                table_pages: held.table_pages as i32,
                source_rows: (first + count) as i32,
                source_shift: first as i32,
                ..whole_rows(0, rows, heads, room, count, row_bytes)
            };
            self.wait();
            // SAFETY: pages of all these rows; a place in the workspace with room for them.
            return unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, self.stream) };
        }
        let Unpack { function, slices, shared_bytes } = shared.kernels.unpack(side)?;
        let (constants, [batch_stride, head_stride, row_stride]) =
            (&shared.constants[side as usize], self.strides(side, room));
        let (pages, others) = (count.div_ceil(PAGE_ROWS), heads * slices * held.batch);
        let pages_per_block = (pages * others / (UNPACK_BLOCKS * self.multiprocessors())).clamp(1, MOST_PAGES);
        let parameters = UnpackParams {
            pages: table,
            rows,
            batch_stride,
            head_stride,
            row_stride,
            squares,
            wide_levels: 0,
            origins: held.origins(),
            transform: layer.transform(held, side),
            levels: constants.table,
            first_row: first as i32,
            row_count: count as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: heads as i32,
            pages_per_block: pages_per_block as i32,
            squares_room: room as i32,
        };
        let grid = [pages.div_ceil(pages_per_block) as u32, (heads * slices) as u32, held.batch as u32];
        // SAFETY: pages of all these rows; a place in the workspace with room for them.
        unsafe { self.launch_with(&function, grid, Unpack::THREADS, shared_bytes, &parameters) }
    }
}

/// `count` rows of a region as `attend_rows` passes over them, so many at a time.
fn rows_region(rows: PlainRegion, count: usize, tile: usize) -> RowsRegion {
    RowsRegion { rows, tiles: count.div_ceil(tile) as i32, padding: 0 }
}

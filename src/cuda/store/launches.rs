//! The launches of a call of attention, each with its parameters: `attend.rs` says which ones, and where their results lie.

use super::super::kernels::{AttentionKernels, PackedKernels, QUERY_TILE, launch};
use super::super::launch::{Launch, Stream};
use super::super::pages::Side;
use super::super::params::{
    AttendParams, FoldParams, MaskParams, MergeParams, PlainParams, TurningParams, UnfoldParams,
};
use super::attend::{AttendCall, PLAIN_ROWS, Shape};
use super::decode::Target;
use super::{CudaLayer, Held, address, length_words};
use crate::error::Result;
use crate::transform::SPAN;

/// Of a block.
const THREADS: usize = 128;
/// Of `merge`, a slice of whose threads joins some of the states.
const MERGE_THREADS: usize = 512;
/// Of `turning`, one of whose blocks fills a multiprocessor.
const TURNING_THREADS: usize = 512;

/// What `plain` reads; as numbers those of `kernels/plain.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Sinks,
    Window,
    Fresh,
    Past,
}

impl Shape {
    fn states(&self, region: Region) -> usize {
        match region {
            Region::Sinks => self.sink_states,
            Region::Window => self.window_states,
            Region::Fresh => self.fresh_states,
            Region::Past => self.regions.packed.div_ceil(self.past_rows),
        }
    }

    /// States of the regions lie one behind the other.
    fn first_state(&self, region: Region) -> usize {
        [self.sink_states, self.window_states, self.fresh_states].iter().take(region as usize).sum()
    }
}

/// The launches of one call.
pub(super) struct Launches<'a> {
    pub layer: &'a CudaLayer,
    pub held: &'a Held,
    pub call: &'a AttendCall,
    pub shape: Shape,
    pub kernels: &'a AttentionKernels,
    pub mask: MaskParams,
    /// Its address; `shape.places` says what lies where.
    pub workspace: u64,
    pub stream: Stream,
}

impl Launches<'_> {
    fn place(&self, offset: usize) -> u64 {
        self.workspace + offset as u64
    }

    fn heads(&self) -> i32 {
        self.layer.spec().num_key_value_heads as i32
    }

    /// `x` × (kv heads · query tiles) × batch.
    fn grid(&self, x: usize) -> [u32; 3] {
        [x as u32, self.heads() as u32 * self.shape.query_tiles as u32, self.held.batch as u32]
    }

    /// Address of the lengths of what is read.
    fn lengths_read(&self) -> u64 {
        if self.call.fresh.is_some() { self.place(self.shape.places.lengths) } else { self.held.lengths() }
    }

    /// Tells the device what is read, where that is not all that is stored.
    ///
    /// # Safety
    /// As [`CudaLayer::attend`], here and in the functions below.
    pub unsafe fn lengths(&self) -> Result<()> {
        if self.call.fresh.is_none() {
            return Ok(());
        }
        let words = length_words(self.lengths_read(), self.shape.regions, self.held.ring_first);
        // SAFETY: a place in the workspace.
        unsafe { self.layer.shared.kernels.poke(&words, self.stream) }
    }

    /// States of the rows between sinks and window.
    pub unsafe fn past(&self) -> Result<()> {
        match &self.kernels.packed {
            _ if self.shape.regions.packed == 0 => Ok(()),
            // SAFETY: the caller's promise.
            Some(kernels) => unsafe { self.packed(kernels) },
            None => {
                for side in Side::BOTH.into_iter().filter(|side| !self.layer.shared.codec(*side).is_raw()) {
                    let target =
                        Target { address: self.decoded(side), strides: self.strides(side, self.shape.regions.packed) };
                    // SAFETY: a place in the workspace with room for these rows.
                    unsafe { self.layer.decode_past(self.held, side, self.shape.regions.packed, target, self.stream) }?;
                }
                // SAFETY: the caller's promise.
                unsafe { self.plain(Region::Past) }
            }
        }
    }

    fn decoded(&self, side: Side) -> u64 {
        self.place(self.shape.places.decoded[side as usize])
    }

    /// Of compact rows `[batch, kv heads, room, width]`.
    fn strides(&self, side: Side, room: usize) -> [i64; 3] {
        let (width, room) = (self.layer.shared.codec(side).layout.head_dim as i64, room as i64);
        [i64::from(self.heads()) * room * width, room * width, width]
    }

    /// Blocks of `turning`, which divide its items among themselves: one for each multiprocessor, or for each item that there may be.
    fn turning_blocks(&self) -> usize {
        let shape = &self.shape;
        let queries = shape.group * shape.length;
        let spans_of_item = QUERY_TILE / queries.next_power_of_two().min(QUERY_TILE);
        let spans = (shape.regions.packed + 2 * SPAN - 2) / SPAN;
        let heads = self.held.batch * self.heads() as usize;
        let items = heads * queries.div_ceil(QUERY_TILE) * spans.div_ceil(spans_of_item);
        let multiprocessors = self.layer.shared.kernels.device().properties().multiprocessors.max(1) as usize;
        items.min(multiprocessors)
    }

    /// States of packed rows.
    unsafe fn packed(&self, kernels: &PackedKernels) -> Result<()> {
        let Self { layer, held, call, shape, .. } = self;
        let packed = shape.regions.packed;
        let (places, query) = (shape.places, &call.query);
        let [keys, values] = &layer.shared.constants;
        let key_transform = layer.transform(held, Side::Keys);
        let (kv_heads, group, length) = (self.heads(), shape.group as i32, shape.length as i32);
        let fold = FoldParams {
            query: query.address,
            query_batch_stride: query.strides[0],
            query_head_stride: query.strides[1],
            query_position_stride: query.strides[2],
            folded: self.place(places.folded),
            extras: self.place(places.extras),
            noise: keys.noise,
            lengths: self.lengths_read(),
            transform: key_transform,
            scale: call.scale,
            kv_heads,
            group,
            length,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        };
        // SAFETY: places in the workspace have room by `places`; the caller's promise for the rest. Likewise below.
        unsafe { launch(&kernels.fold, self.grid(shape.key_blocks), THREADS, &fold, self.stream) }?;
        if let Some(function) = &kernels.turning {
            let turning = TurningParams {
                query: query.address,
                query_batch_stride: query.strides[0],
                query_head_stride: query.strides[1],
                query_position_stride: query.strides[2],
                bias: self.place(places.bias),
                origins: held.origins(),
                lengths: self.lengths_read(),
                transform: key_transform,
                waves: keys.waves.table,
                channels: keys.waves.channels,
                capacity: packed as i64,
                scale: call.scale,
                kv_heads,
                group,
                length,
                query_tiles: shape.query_tiles as i32,
                batch: held.batch as i32,
                frequencies: keys.waves.frequencies,
                padding: 0,
            };
            let grid = [self.turning_blocks() as u32, 1, 1];
            // SAFETY: as above.
            unsafe { launch(function, grid, TURNING_THREADS, &turning, self.stream) }?;
        }
        let attend = AttendParams {
            key_pages: address(held.side(Side::Keys).table.as_ref()),
            value_pages: address(held.side(Side::Values).table.as_ref()),
            folded: fold.folded,
            extras: fold.extras,
            bias: if kernels.turning.is_some() { self.place(places.bias) } else { 0 },
            states: self.place(places.packed),
            lengths: self.lengths_read(),
            key_wide_levels: 0,
            value_wide_levels: 0,
            bias_capacity: packed as i64,
            mask: self.mask,
            key_levels: keys.table,
            value_levels: values.table,
            weight_unit: values.weight_unit,
            page_capacity: held.table_pages as i32,
            pages_per_split: shape.pages_per_split as i32,
            splits: shape.splits as i32,
            pages_per_key_block: key_transform.pages_per_block,
            key_blocks: shape.key_blocks as i32,
            kv_heads,
            group,
            length,
            query_tiles: shape.query_tiles as i32,
        };
        let blocks = self.heads() as u32 * shape.query_tiles.div_ceil(shape.tiles) as u32;
        let launched = Launch {
            grid: [shape.splits as u32, blocks, held.batch as u32],
            block: [kernels.threads as u32, 1, 1],
            shared_bytes: kernels.shared_bytes,
            stream: self.stream,
        };
        // SAFETY: as above.
        unsafe { kernels.attend.launch(&launched, &attend) }?;
        let unfold = UnfoldParams {
            packed: attend.states,
            states: self.place(places.states),
            transform: layer.transform(held, Side::Values),
            splits: shape.splits as i32,
            splits_per_state: shape.splits_per_state as i32,
            first_state: shape.first_state(Region::Past) as i32,
            state_count: shape.state_count as i32,
            pages_per_split: shape.pages_per_split as i32,
            kv_heads,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        };
        let made = shape.splits.div_ceil(shape.splits_per_state);
        // SAFETY: as above.
        unsafe { launch(&kernels.unfold, self.grid(made), THREADS, &unfold, self.stream) }
    }

    /// States of rows in the model's type.
    pub unsafe fn plain(&self, region: Region) -> Result<()> {
        let Self { layer, held, call, shape, .. } = self;
        let states = shape.states(region);
        let ring = region == Region::Window;
        let mut rows = [0; 2];
        let mut tables = [0; 2];
        let mut strides = [[0; 3]; 2];
        for side in Side::BOTH {
            let (index, own) = (side as usize, held.side(side));
            (rows[index], strides[index]) = match (region, &call.fresh) {
                (Region::Sinks, _) => (address(own.sinks.as_ref()), self.strides(side, layer.spec().sinks)),
                (Region::Window, _) => (address(own.ring.as_ref()), self.strides(side, held.ring_rows)),
                (Region::Fresh, Some(fresh)) => {
                    let [batch, head, row, _] = fresh[index].strides;
                    (fresh[index].address, [batch, head, row])
                }
                (Region::Fresh, None) => return Ok(()),
                (Region::Past, _) if layer.shared.codec(side).is_raw() => {
                    tables[index] = address(own.table.as_ref());
                    (0, [0; 3])
                }
                (Region::Past, _) => (self.decoded(side), self.strides(side, shape.regions.packed)),
            };
        }
        let [key_rows, value_rows] = rows;
        let [key_table, value_table] = tables;
        let [
            [key_batch_stride, key_head_stride, key_row_stride],
            [value_batch_stride, value_head_stride, value_row_stride],
        ] = strides;
        let parameters = PlainParams {
            query: call.query.address,
            query_batch_stride: call.query.strides[0],
            query_head_stride: call.query.strides[1],
            query_position_stride: call.query.strides[2],
            key_rows,
            value_rows,
            key_table,
            value_table,
            key_batch_stride,
            key_head_stride,
            key_row_stride,
            value_batch_stride,
            value_head_stride,
            value_row_stride,
            states: self.place(shape.places.states),
            lengths: self.lengths_read(),
            mask: self.mask,
            scale: call.scale,
            region: region as i32,
            fresh_rows: call.fresh_rows() as i32,
            rows_per_split: if region == Region::Past { shape.past_rows } else { PLAIN_ROWS } as i32,
            first_state: shape.first_state(region) as i32,
            state_count: shape.state_count as i32,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            ring_first: if ring { layer.ring_first(held) } else { 0 },
            ring_rows: if ring { held.ring_rows as i32 } else { 0 },
            table_pages: held.table_pages as i32,
            padding: 0,
        };
        // SAFETY: rows of this layer; states have room for these; the caller's promise for the rest.
        unsafe { launch(&self.kernels.plain, self.grid(states), THREADS, &parameters, self.stream) }
    }

    pub unsafe fn merge(&self) -> Result<()> {
        let (shape, output) = (&self.shape, &self.call.output);
        let parameters = MergeParams {
            states: self.place(shape.places.states),
            output: output.address,
            output_batch_stride: output.strides[0],
            output_head_stride: output.strides[1],
            output_position_stride: output.strides[2],
            sink_logits: self.call.sink_logits,
            state_count: shape.state_count as i32,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        };
        let [head_tiles, batch] = [self.grid(1)[1], self.held.batch as u32];
        // SAFETY: the caller's promise for the output; the states were written by the launches before.
        unsafe { launch(&self.kernels.merge, [head_tiles, batch, 1], MERGE_THREADS, &parameters, self.stream) }
    }
}

//! The launches of a call of attention, each with its parameters: `attend.rs` says which ones, and where their results lie.

use super::super::kernels::{AttentionKernels, launch};
use super::super::launch::Stream;
use super::super::pages::Side;
use super::super::params::{
    AttendParams, FoldParams, MaskParams, MergeParams, PlainParams, TurningParams, UnfoldParams,
};
use super::attend::{AttendCall, PLAIN_ROWS, Shape};
use super::{CudaLayer, Held, address};
use crate::error::Result;
use crate::transform::SPAN;

/// Of a block.
const THREADS: usize = 128;

/// The launches of one call.
pub(super) struct Launches<'a> {
    pub layer: &'a CudaLayer,
    pub held: &'a Held,
    pub call: &'a AttendCall,
    pub shape: Shape,
    pub kernels: &'a AttentionKernels,
    pub mask: MaskParams,
    pub stream: Stream,
}

impl Launches<'_> {
    fn place(&self, offset: usize) -> u64 {
        self.call.workspace.0 + offset as u64
    }

    fn heads(&self) -> i32 {
        self.layer.spec().num_key_value_heads as i32
    }

    /// `x` × (kv heads · query tiles) × batch.
    fn grid(&self, x: usize) -> [u32; 3] {
        [x as u32, self.heads() as u32 * self.shape.query_tiles as u32, self.held.batch as u32]
    }

    /// States of the packed rows.
    ///
    /// # Safety
    /// As [`CudaLayer::attend`], here and in the functions below.
    pub unsafe fn packed(&self) -> Result<()> {
        let Self { layer, held, call, shape, .. } = self;
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
            lengths: held.lengths(),
            transform: key_transform,
            scale: call.scale,
            kv_heads,
            group,
            length,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        };
        // SAFETY: places in the workspace have room by `places`; the caller's promise for the rest. Likewise below.
        unsafe { launch(&self.kernels.fold, self.grid(shape.key_blocks), THREADS, &fold, self.stream) }?;
        if let Some(function) = &self.kernels.turning {
            let turning = TurningParams {
                query: query.address,
                query_batch_stride: query.strides[0],
                query_head_stride: query.strides[1],
                query_position_stride: query.strides[2],
                bias: self.place(places.bias),
                origins: held.origins(),
                lengths: held.lengths(),
                transform: key_transform,
                capacity: layer.regions.packed as i64,
                scale: call.scale,
                kv_heads,
                group,
                length,
                query_tiles: shape.query_tiles as i32,
                padding: 0,
            };
            let spans = layer.regions.packed / SPAN + 2;
            // SAFETY: as above.
            unsafe { launch(function, self.grid(spans), THREADS, &turning, self.stream) }?;
        }
        let attend = AttendParams {
            key_pages: address(held.side(Side::Keys).table.as_ref()),
            value_pages: address(held.side(Side::Values).table.as_ref()),
            folded: fold.folded,
            extras: fold.extras,
            bias: if self.kernels.turning.is_some() { self.place(places.bias) } else { 0 },
            states: self.place(places.packed),
            lengths: held.lengths(),
            key_wide_levels: 0,
            value_wide_levels: 0,
            bias_capacity: layer.regions.packed as i64,
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
        let [splits, head_tiles, batch] = self.grid(shape.splits);
        let grid = [splits, head_tiles / shape.tiles as u32, batch];
        // SAFETY: as above.
        unsafe { launch(&self.kernels.attend, grid, THREADS, &attend, self.stream) }?;
        let unfold = UnfoldParams {
            packed: attend.states,
            states: self.place(places.states),
            transform: layer.transform(held, Side::Values),
            splits: shape.splits as i32,
            splits_per_state: shape.splits_per_state as i32,
            first_state: (shape.sink_states + shape.window_states) as i32,
            state_count: shape.state_count as i32,
            pages_per_split: shape.pages_per_split as i32,
            kv_heads,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        };
        let made = shape.splits.div_ceil(shape.splits_per_state);
        // SAFETY: as above.
        unsafe { launch(&self.kernels.unfold, self.grid(made), THREADS, &unfold, self.stream) }
    }

    /// States of the sinks (region 0) or the window (region 1).
    pub unsafe fn plain(&self, region: i32) -> Result<()> {
        let Self { layer, held, call, shape, .. } = self;
        let (states, first_state, room, ring) = if region == 0 {
            (shape.sink_states, 0, layer.spec().sinks, None)
        } else {
            (shape.window_states, shape.sink_states, held.ring_rows, Some(held.ring_first))
        };
        let [key_rows, value_rows] = Side::BOTH.map(|side| {
            let rows = held.side(side);
            address(if region == 0 { rows.sinks.as_ref() } else { rows.ring.as_ref() })
        });
        let strides = |side: Side| {
            let (width, room) = (layer.shared.codec(side).layout.head_dim as i64, room as i64);
            [i64::from(self.heads()) * room * width, room * width, width]
        };
        let (
            [key_batch_stride, key_head_stride, key_row_stride],
            [value_batch_stride, value_head_stride, value_row_stride],
        ) = (strides(Side::Keys), strides(Side::Values));
        let parameters = PlainParams {
            query: call.query.address,
            query_batch_stride: call.query.strides[0],
            query_head_stride: call.query.strides[1],
            query_position_stride: call.query.strides[2],
            key_rows,
            value_rows,
            key_batch_stride,
            key_head_stride,
            key_row_stride,
            value_batch_stride,
            value_head_stride,
            value_row_stride,
            states: self.place(shape.places.states),
            lengths: held.lengths(),
            mask: self.mask,
            scale: call.scale,
            region,
            fresh_rows: 0,
            rows_per_split: PLAIN_ROWS as i32,
            first_state: first_state as i32,
            state_count: shape.state_count as i32,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            ring_first: ring.unwrap_or(0) as i32,
            ring_rows: if ring.is_some() { held.ring_rows as i32 } else { 0 },
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
        unsafe { launch(&self.kernels.merge, [head_tiles, batch, 1], THREADS, &parameters, self.stream) }
    }
}

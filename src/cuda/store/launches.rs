//! The launches of a call of attention, each with its parameters: `attend.rs` says which ones, and where their results lie.

use std::cell::Cell;

use super::super::kernels::{ATTEND_WARPS, AttentionKernels, PackedKernels, QUERY_TILE, Queries, RowKernels};
use super::super::launch::{Function, Launch, Parameters, Stream};
use super::super::pages::Side;
use super::super::params::{
    AppendParams, AttendParams, EnterParams, FoldParams, FoldTurnedParams, MaskParams, MergeParams, OnceParams,
    PlainParams, PlainRegion, TransformParams, TurningParams, UnfoldParams, WaveParams,
};
use super::attend::{AttendCall, Merge, PlainSplits, Shape};
use super::decode::Target;
use super::{CudaLayer, Held, State, address, length_words};
use crate::error::Result;
use crate::transform::SPAN;

/// Of a block.
const THREADS: usize = 128;
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

impl Region {
    const ALL: [Self; 4] = [Self::Sinks, Self::Window, Self::Fresh, Self::Past];
}

/// The launches of one call.
pub(super) struct Launches<'a> {
    pub layer: &'a CudaLayer,
    pub held: &'a Held,
    pub call: &'a AttendCall,
    pub shape: Shape,
    pub kernels: &'a AttentionKernels,
    pub mask: MaskParams,
    /// The fresh row is a token that enters with the launch.
    pub enters: bool,
    /// Its address; `shape.places` says what lies where.
    pub workspace: u64,
    pub stream: Stream,
    /// The launch in front is one of [`Self::launch`], so that the next may begin before it is done.
    pub chained: Cell<bool>,
}

impl Launches<'_> {
    pub(super) fn place(&self, offset: usize) -> u64 {
        self.workspace + offset as u64
    }

    pub(super) fn heads(&self) -> i32 {
        self.layer.spec().num_key_value_heads as i32
    }

    /// The next launch begins when those in front are done: its blocks would crowd where the first ones of those leave room.
    pub(super) fn wait(&self) {
        self.chained.set(false);
    }

    /// With many blocks of statistics `fold`, `unfold` and `merge` have much to do themselves, and blocks of threads in plenty.
    fn is_crowded(&self) -> bool {
        let blocks = match self.layer.block_rows() {
            0 => return false,
            rows => self.shape.regions.packed.div_ceil(rows),
        };
        let transforms = blocks * self.held.batch * self.heads() as usize * self.shape.query_tiles;
        blocks > 1 && transforms > self.multiprocessors()
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.layer.shared.kernels.multiprocessors()
    }

    /// One launch of a chain in which each may begin before those in front are done, but for the first.
    ///
    /// # Safety
    /// As [`Function::launch`]; the kernel waits for earlier launches before it reads what they write.
    pub(super) unsafe fn launch<P: Parameters>(
        &self,
        function: &Function,
        grid: [u32; 3],
        threads: usize,
        parameters: &P,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(function, grid, threads, 0, parameters) }
    }

    /// [`Self::launch`] with dynamic shared memory.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn launch_with<P: Parameters>(
        &self,
        function: &Function,
        grid: [u32; 3],
        threads: usize,
        shared_bytes: usize,
        parameters: &P,
    ) -> Result<()> {
        let block = [threads as u32, 1, 1];
        let early = self.chained.replace(true);
        // SAFETY: the caller's promise.
        unsafe { function.launch(&Launch { grid, block, shared_bytes, stream: self.stream, early }, parameters) }
    }

    /// `x` × (kv heads · query tiles) × batch.
    pub(super) fn grid(&self, x: usize) -> [u32; 3] {
        [x as u32, self.heads() as u32 * self.shape.query_tiles as u32, self.held.batch as u32]
    }

    fn attend_grid(&self) -> [u32; 3] {
        let shape = &self.shape;
        let splits_of_block = if matches!(shape.queries, Queries::Apart(_)) { ATTEND_WARPS } else { 1 };
        let tiles = self.heads() as u32 * shape.query_tiles.div_ceil(shape.tiles) as u32;
        let rows = if shape.queries == Queries::Once { shape.plain_states + 2 * usize::from(self.enters) } else { 0 };
        let (splits, batch) = ((shape.splits.div_ceil(splits_of_block) + rows) as u32, self.held.batch as u32);
        if shape.queries == Queries::Many { [splits, tiles, batch] } else { [tiles, batch, splits] }
    }

    /// Address of the lengths of what is read.
    pub(super) fn lengths_read(&self) -> u64 {
        let own = self.call.fresh.is_some() && !self.enters;
        if own { self.place(self.shape.places.lengths) } else { self.held.lengths() }
    }

    /// Tells the device what is read, where that is not all that is stored.
    ///
    /// # Safety
    /// As [`CudaLayer::attend`], here and in the functions below.
    pub unsafe fn lengths(&self) -> Result<()> {
        if self.call.fresh.is_none() || self.enters {
            return Ok(());
        }
        let words = length_words(self.lengths_read(), self.shape.regions, self.held.ring_first);
        // SAFETY: a place in the workspace.
        unsafe { self.layer.shared.kernels.poke(&words, self.stream) }
    }

    /// States of all regions: those of packed rows between sinks and window, where only one side is packed after it has been decoded.
    pub unsafe fn states(&self) -> Result<()> {
        match &self.kernels.packed {
            // SAFETY: the caller's promise.
            _ if self.shape.queries == Queries::Pieces => unsafe { self.pieces() },
            // SAFETY: the caller's promise.
            _ if self.shape.regions.packed == 0 => unsafe { self.plain() },
            // SAFETY: the caller's promise.
            Some(kernels) => match &kernels.fold_and_unfold {
                // SAFETY: the caller's promise.
                Some([fold, unfold]) => unsafe { self.apart(kernels, fold, unfold) },
                // SAFETY: the caller's promise.
                None => unsafe { self.once(kernels) },
            },
            None => {
                for side in Side::BOTH.into_iter().filter(|side| !self.layer.shared.codec(*side).is_raw()) {
                    let target =
                        Target { address: self.decoded(side), strides: self.strides(side, self.shape.regions.packed) };
                    // SAFETY: a place in the workspace with room for these rows.
                    unsafe { self.layer.decode_past(self.held, side, self.shape.regions.packed, target, self.stream) }?;
                }
                // SAFETY: the caller's promise.
                unsafe { self.plain() }
            }
        }
    }

    pub(super) fn decoded(&self, side: Side) -> u64 {
        self.place(self.shape.places.decoded[side as usize])
    }

    /// Of compact rows `[batch, kv heads, room, width]`.
    pub(super) fn strides(&self, side: Side, room: usize) -> [i64; 3] {
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
        items.min(self.multiprocessors())
    }

    /// Threads of a block of `fold` or `unfold`: 16 for each query of the fullest tile, by pairs, or all where they share the product with a matrix.
    pub(super) fn row_threads(&self, transform: &TransformParams) -> usize {
        let queries = (self.shape.group * self.shape.length).min(QUERY_TILE);
        if transform.inverse != 0 { THREADS } else { THREADS / QUERY_TILE * queries.next_multiple_of(2) }
    }

    /// Fold, rows in the model's type, packed rows, and states of those to the model's space, each by a launch.
    unsafe fn apart(&self, kernels: &PackedKernels, fold: &Function, unfold: &Function) -> Result<()> {
        let folding = self.folding();
        // SAFETY: places in the workspace have room by `places`; the caller's promise for the rest. Likewise below.
        unsafe {
            self.launch(fold, self.grid(self.shape.key_blocks), self.row_threads(&folding.transform), &folding)?;
            self.turning(kernels, &folding)?;
            self.fold_turned(kernels, &folding)?;
            self.plain()?;
        }
        if self.shape.queries != Queries::Many {
            // SAFETY: as above.
            unsafe { self.shows() }?;
        }
        // A block of `turning` has a multiprocessor to itself.
        if kernels.turning.is_some() || self.is_crowded() {
            self.wait();
        }
        let attending = self.attending(kernels, &folding);
        // SAFETY: as above.
        unsafe {
            self.launch_with(&kernels.attend, self.attend_grid(), kernels.threads, kernels.shared_bytes, &attending)
        }?;
        let unfolding = self.unfolding(&attending);
        // Each block reads a whole matrix.
        if unfolding.transform.inverse != 0 || self.is_crowded() {
            self.wait();
        }
        let made = self.shape.splits.div_ceil(self.shape.splits_per_state);
        // SAFETY: as above.
        unsafe { self.launch(unfold, self.grid(made), self.row_threads(&unfolding.transform), &unfolding) }
    }

    /// All states by one launch, behind that of a mean that turns; their merge, too, where it is short.
    unsafe fn once(&self, kernels: &PackedKernels) -> Result<()> {
        let fold = self.folding();
        // SAFETY: as in `apart`.
        unsafe {
            self.turning(kernels, &fold)?;
            self.shows()?;
        }
        if kernels.turning.is_some() {
            self.wait();
        }
        let merges = self.shape.merge == Merge::Inside;
        let parameters = OnceParams {
            fold,
            attend: self.attending(kernels, &fold),
            plain: self.plain_rows(),
            values: self.layer.transform(self.held, Side::Values),
            merge: self.merging(),
            append: self.appending(),
            arrivals: if merges || self.enters { self.held.arrivals() } else { 0 },
            overflow: self.held.state.address() + State::OVERFLOW,
            first_state: self.shape.plain_states as i32,
            merges: i32::from(merges),
        };
        // SAFETY: as above.
        unsafe { self.launch(&kernels.attend, self.attend_grid(), kernels.threads, &parameters) }
    }

    /// A token that enters, if one does.
    fn appending(&self) -> AppendParams {
        match &self.call.fresh {
            Some(fresh) if self.enters => self.layer.append_parameters(self.held, fresh.each_ref(), 0),
            _ => AppendParams::default(),
        }
    }

    fn entering(&self) -> EnterParams {
        if self.enters { self.layer.enter_parameters(self.held) } else { EnterParams::default() }
    }

    /// What folds the queries for packed rows.
    pub(super) fn folding(&self) -> FoldParams {
        let Self { layer, held, call, shape, .. } = self;
        let (places, query) = (shape.places, &call.query);
        let keys = &layer.shared.constants[Side::Keys as usize];
        FoldParams {
            query: query.address,
            query_batch_stride: query.strides[0],
            query_head_stride: query.strides[1],
            query_position_stride: query.strides[2],
            folded: self.place(places.folded),
            extras: self.place(places.extras),
            noise: keys.noise,
            // A step that is replayed has blocks of threads for all blocks of statistics that there may be.
            lengths: if layer.is_capturing() && shape.key_blocks > 1 { self.lengths_read() } else { 0 },
            transform: layer.transform(held, Side::Keys),
            scale: call.scale,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            as_bytes: i32::from(shape.as_bytes),
        }
    }

    /// What `attend` needs of a mean that turns there.
    fn turned(&self, transform: &TransformParams) -> WaveParams {
        if !self.shape.turned {
            return WaveParams::default();
        }
        let waves = self.layer.shared.constants[Side::Keys as usize].waves;
        WaveParams {
            waves: waves.table,
            channels: waves.channels,
            spans: transform.spans,
            steps: transform.steps,
            origins: self.held.origins(),
            first_span: transform.first_span,
            frequencies: waves.frequencies,
        }
    }

    /// Products of the queries with a mean that turns, where there is one.
    unsafe fn turning(&self, kernels: &PackedKernels, fold: &FoldParams) -> Result<()> {
        let Self { layer, held, shape, .. } = self;
        let Some(function) = &kernels.turning else {
            return Ok(());
        };
        let keys = &layer.shared.constants[Side::Keys as usize];
        let turning = TurningParams {
            query: fold.query,
            query_batch_stride: fold.query_batch_stride,
            query_head_stride: fold.query_head_stride,
            query_position_stride: fold.query_position_stride,
            bias: self.place(shape.places.bias),
            origins: held.origins(),
            lengths: self.lengths_read(),
            transform: fold.transform,
            waves: keys.waves.table,
            channels: keys.waves.channels,
            capacity: shape.regions.packed as i64,
            scale: fold.scale,
            kv_heads: fold.kv_heads,
            group: fold.group,
            length: fold.length,
            query_tiles: fold.query_tiles,
            batch: held.batch as i32,
            frequencies: keys.waves.frequencies,
            padding: 0,
        };
        let grid = [self.turning_blocks() as u32, 1, 1];
        // SAFETY: as in `apart`.
        unsafe { self.launch(function, grid, TURNING_THREADS, &turning) }
    }

    /// What many queries make of a mean that turns, before it is multiplied with positions.
    unsafe fn fold_turned(&self, kernels: &PackedKernels, fold: &FoldParams) -> Result<()> {
        let Some(function) = &kernels.fold_turned else {
            return Ok(());
        };
        let (waves, factors) = (self.turned(&fold.transform), self.place(self.shape.places.bias));
        let parameters = FoldTurnedParams { fold: *fold, waves, factors };
        // SAFETY: as in `apart`.
        unsafe { self.launch(function, self.grid(1), THREADS, &parameters) }
    }

    /// What makes states of packed rows.
    fn attending(&self, kernels: &PackedKernels, fold: &FoldParams) -> AttendParams {
        let Self { layer, held, shape, .. } = self;
        let places = shape.places;
        let [keys, values] = &layer.shared.constants;
        AttendParams {
            key_pages: address(held.side(Side::Keys).table.as_ref()),
            value_pages: address(held.side(Side::Values).table.as_ref()),
            folded: fold.folded,
            extras: fold.extras,
            bias: if kernels.turning.is_some() || kernels.fold_turned.is_some() { self.place(places.bias) } else { 0 },
            states: self.place(places.packed),
            lengths: self.lengths_read(),
            // Of many queries in f32 nothing is known.
            reach: match shape.queries {
                Queries::Many if self.call.mask.is_some() && shape.rows.is_some() => self.place(places.reach),
                Queries::Many => 0,
                _ if self.asks_mask() => self.place(places.reach),
                _ => 0,
            },
            key_wide_levels: 0,
            value_wide_levels: 0,
            bias_capacity: shape.regions.packed as i64,
            enter: self.entering(),
            turned: self.turned(&fold.transform),
            mask: self.mask,
            key_levels: keys.table,
            value_levels: values.table,
            weight_unit: values.weight_unit,
            page_capacity: held.table_pages as i32,
            pages_per_split: shape.pages_per_split as i32,
            splits: shape.splits as i32,
            long_splits: shape.long_splits as i32,
            short_pages: shape.short_pages as i32,
            pages_per_key_block: fold.transform.pages_per_block,
            key_blocks: shape.key_blocks as i32,
            kv_heads: fold.kv_heads,
            group: fold.group,
            length: fold.length,
            query_tiles: fold.query_tiles,
            as_bytes: fold.as_bytes,
            padding: 0,
        }
    }

    /// What brings them to the model's space.
    fn unfolding(&self, attend: &AttendParams) -> UnfoldParams {
        let Self { layer, held, shape, .. } = self;
        UnfoldParams {
            packed: attend.states,
            states: self.place(shape.places.states),
            transform: layer.transform(held, Side::Values),
            splits: shape.splits as i32,
            splits_per_state: shape.splits_per_state as i32,
            first_state: shape.plain_states as i32,
            state_count: shape.state_count as i32,
            pages_per_split: shape.pages_per_split as i32,
            kv_heads: attend.kv_heads,
            query_tiles: attend.query_tiles,
            queries: attend.group * attend.length,
        }
    }

    /// The rows of a region, for `plain`.
    pub(super) fn region(&self, region: Region, splits: PlainSplits) -> PlainRegion {
        let Self { layer, held, call, shape, .. } = self;
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
                (Region::Fresh, None) => (0, [0; 3]),
                (Region::Past, _) if layer.shared.codec(side).is_raw() => {
                    tables[index] = address(own.table.as_ref());
                    (0, [0; 3])
                }
                (Region::Past, _) => (self.decoded(side), self.strides(side, shape.regions.packed)),
            };
        }
        let ring = region == Region::Window;
        PlainRegion {
            key_rows: rows[0],
            value_rows: rows[1],
            key_table: tables[0],
            value_table: tables[1],
            key_batch_stride: strides[0][0],
            key_head_stride: strides[0][1],
            key_row_stride: strides[0][2],
            value_batch_stride: strides[1][0],
            value_head_stride: strides[1][1],
            value_row_stride: strides[1][2],
            kind: region as i32,
            splits: splits.splits as i32,
            rows_per_split: splits.rows as i32,
            ring_first: if !ring {
                0
            } else if self.enters {
                -1
            } else {
                layer.ring_first(held)
            },
            ring_rows: if ring { held.ring_rows as i32 } else { 0 },
            table_pages: held.table_pages as i32,
        }
    }

    /// What makes states of rows in the model's type.
    fn plain_rows(&self) -> PlainParams {
        let Self { call, shape, .. } = self;
        PlainParams {
            query: call.query.address,
            query_batch_stride: call.query.strides[0],
            query_head_stride: call.query.strides[1],
            query_position_stride: call.query.strides[2],
            states: self.place(shape.places.states),
            lengths: self.lengths_read(),
            mask: self.mask,
            enter: self.entering(),
            regions: Region::ALL.map(|region| self.region(region, shape.plain[region as usize])),
            scale: call.scale,
            fresh_rows: call.fresh_rows() as i32,
            state_count: shape.state_count as i32,
            kv_heads: self.heads(),
            group: shape.group as i32,
            length: shape.length as i32,
            query_tiles: shape.query_tiles as i32,
            padding: 0,
        }
    }

    /// States of rows in the model's type, by a launch of their own.
    unsafe fn plain(&self) -> Result<()> {
        if self.shape.plain_states == 0 {
            return Ok(());
        }
        let grid = self.grid(self.shape.plain_states);
        match &self.kernels.rows {
            // SAFETY: rows of this layer; states have room for these; the caller's promise for the rest.
            RowKernels::Few(plain) => unsafe { self.launch(plain, grid, THREADS, &self.plain_rows()) },
            // SAFETY: the caller's promise.
            RowKernels::Many(kernels) => unsafe { self.rows(kernels) },
        }
    }

    /// What joins the states of all splits.
    fn merging(&self) -> MergeParams {
        let (shape, output) = (&self.shape, &self.call.output);
        MergeParams {
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
        }
    }

    /// The merge, where no launch before has done it.
    pub unsafe fn merge(&self) -> Result<()> {
        if self.shape.merge == Merge::Inside {
            return Ok(());
        }
        if self.is_crowded() {
            self.wait();
        }
        let queries = self.heads() as u32 * (self.shape.group * self.shape.length) as u32;
        let grid = [queries, self.held.batch as u32, 1];
        // SAFETY: the caller's promise for the output; the states were written by the launches before.
        unsafe { self.launch(&self.kernels.merge, grid, THREADS, &self.merging()) }
    }
}

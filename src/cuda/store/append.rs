//! One append: room first, then launches that move rows to the sinks, take statistics, encode what leaves the window, and fill the ring.
//!
//! Everything that can be refused is refused before the first launch. Launches are in the order of the stream: encoding reads rows of the
//! ring before new rows take their places. A decode step, which does no more than that, has one launch for it.

use super::super::kernels::launch;
use super::super::launch::{Function, Stream};
use super::super::pages::{BLOCK_ROWS, Side};
use super::super::params::{AppendParams, AppendStream, CodecParams, CopyParams, EncodeParams, StatisticsParams};
use super::entering::Recorded;
use super::{CudaLayer, DeviceTensor, Held, State, address, length_words, whole_rows};
use crate::codebook::Codebook;
use crate::codec::Rule;
use crate::error::{Error, Result};
use crate::layer::Regions;
use crate::transform::Source;

/// How an append of some rows falls into the regions; as in `layer/append.rs`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub rows: usize,
    pub stored: usize,
    pub to_sinks: usize,
    /// Rows of the window before.
    pub window: usize,
    pub packed: usize,
    pub to_pack: usize,
    pub from_window: usize,
    /// Blocks with statistics afterwards.
    pub blocks: usize,
}

impl Plan {
    /// New rows that never enter the window, sinks included.
    fn passing(&self) -> usize {
        self.to_sinks + self.to_pack - self.from_window
    }

    pub fn regions(&self, before: Regions) -> Regions {
        Regions {
            sinks: before.sinks + self.to_sinks,
            packed: self.packed + self.to_pack,
            window: self.window - self.from_window + self.rows - self.passing(),
        }
    }
}

/// Rows `[batch, heads, count, D]` in the model's type; strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub address: u64,
    pub strides: [i64; 3],
    pub count: usize,
}

impl Rows {
    pub fn of(tensor: &DeviceTensor) -> Self {
        let [batch_stride, head_stride, row_stride, _] = tensor.strides;
        let strides = [batch_stride, head_stride, row_stride];
        Self { address: tensor.address, strides, count: tensor.shape[2] }
    }

    pub(super) fn skip(self, rows: usize, count: usize, element: usize) -> Self {
        let bytes = self.strides[2] * (rows * element) as i64;
        Self { address: self.address.wrapping_add_signed(bytes), count, ..self }
    }
}

impl CudaLayer {
    /// Stores the rows of `n` new tokens: keys `[batch, heads, n, key width]`, values `[batch, heads, n, value width]`; the queries `[batch, query heads, L, key
    /// width]`, where they are known, are of the last L of them. Waits for nothing. Nothing changes if this is refused.
    ///
    /// # Safety
    /// Both are memory of the device that stays as it is until the stream is past this call, and past the next one of the layer where it
    /// [`waits`](Self::waits) then; the stream is a live one of the device, and past all earlier calls of this layer and of those that it was cloned from.
    pub unsafe fn append(
        &mut self,
        keys: &DeviceTensor,
        values: &DeviceTensor,
        query: Option<&DeviceTensor>,
        stream: Stream,
    ) -> Result<()> {
        self.check(keys, values)?;
        if let Some(query) = query {
            self.check_query(query, keys.shape[0], keys.shape[2])?;
        }
        if self.is_capturing() {
            // SAFETY: the caller's promise.
            return unsafe { self.append_captured([keys, values], query.is_some(), stream) };
        }
        self.expect_told("append")?;
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let plan = self.plan(keys.shape[2]);
        if self.is_eager() && self.may_wait(plan) {
            // SAFETY: the caller's promise.
            return unsafe { self.append_waiting([keys, values], plan, stream) };
        }
        let is_new = self.held.is_none();
        let mut held = match self.held.take() {
            Some(held) => held,
            None => self.begin(keys.shape[0])?,
        };
        // SAFETY: the caller's promise.
        let appended = unsafe { self.append_to(&mut held, [keys, values], query, plan, is_new, stream) };
        if appended.is_ok() || !is_new {
            self.held = Some(held);
        }
        self.forget_ahead();
        appended?;
        self.regions = plan.regions(self.regions);
        self.blocks = plan.blocks;
        let recorded = self.entering().recorded;
        match &self.held {
            // SAFETY: the caller's promise; a layer whose steps may be replayed has no copies.
            Some(held) if recorded == Recorded::Entering => unsafe { self.pack_ahead(held, stream) },
            _ => Ok(()),
        }
    }

    /// Refuses what `append` would refuse.
    pub fn check(&self, keys: &DeviceTensor, values: &DeviceTensor) -> Result<()> {
        let batch = match (&self.held, self.padding.len()) {
            (Some(held), _) => Some(held.batch),
            (None, 0) => None,
            (None, padded) => Some(padded),
        };
        for (side, rows) in [(Side::Keys, keys), (Side::Values, values)] {
            let [found_batch, found_heads, tokens, found_width] = rows.shape;
            let (heads, width) = (self.spec().num_key_value_heads, self.shared.codec(side).layout.head_dim);
            let fits = batch.unwrap_or(found_batch) == found_batch && found_heads == heads && found_width == width;
            if !fits || found_batch == 0 || tokens == 0 {
                let batch = batch.map_or("batch ≥ 1".to_string(), |batch| batch.to_string());
                let expected = format!("[{batch}, {heads}, tokens ≥ 1, {width}]");
                return Err(Error::shape(side.name(), expected, &rows.shape.map(|size| size as i64)));
            }
            self.expect_rows(side.name(), rows)?;
        }
        if keys.shape[0] != values.shape[0] || keys.shape[2] != values.shape[2] {
            let expected = format!("[{}, …, {}, …] as keys have", keys.shape[0], keys.shape[2]);
            return Err(Error::shape("values", expected, &values.shape.map(|size| size as i64)));
        }
        Ok(())
    }

    pub(super) fn plan(&self, rows: usize) -> Plan {
        let Regions { sinks, packed, window } = self.regions;
        let to_sinks = rows.min(self.spec().sinks - sinks);
        let behind_sinks = packed + window + rows - to_sinks;
        let evictable = behind_sinks.saturating_sub(self.spec().window);
        let (blocks, packable) = match self.block_rows() {
            0 => (0, evictable),
            block_rows => {
                let blocks = self.blocks.max(behind_sinks / block_rows);
                (blocks, evictable.min(blocks * block_rows))
            }
        };
        let to_pack = packable.saturating_sub(packed);
        let stored = self.regions.total();
        Plan { rows, stored, to_sinks, window, packed, to_pack, from_window: to_pack.min(window), blocks }
    }

    unsafe fn append_to(
        &self,
        held: &mut Held,
        tensors: [&DeviceTensor; 2],
        query: Option<&DeviceTensor>,
        plan: Plan,
        is_new: bool,
        stream: Stream,
    ) -> Result<()> {
        let shared = &*self.shared;
        let observation = self.prepare_queries(held, query, plan.stored + plan.rows)?;
        // SAFETY: the caller's promise, for all of these.
        unsafe {
            let regions = plan.regions(self.regions);
            self.reserve(held, plan, plan.window.max(regions.window), stream)?;
            let ring_first = (held.ring_first + plan.from_window) % held.ring_rows.max(1);
            let mut words = length_words(held.lengths(), regions, ring_first).to_vec();
            if is_new {
                words = self.state_words(held, regions);
                self.clear_arrivals(held, stream)?;
            }
            self.reserve_pages(held, plan, &mut words, stream)?;
            shared.kernels.poke(&words, stream)?;
            self.note_queries(held, observation.as_ref(), plan.blocks > self.blocks, stream)?;
        }
        // SAFETY: the lengths on the device are those with the new rows, and all places have room now; the caller's promise.
        unsafe {
            match shared.kernels.append_row().filter(|_| self.is_step(plan)) {
                Some(function) => self.append_row(function, held, tensors, i32::from(plan.to_pack > 0), stream),
                None => self.append_rows(held, tensors, plan, stream),
            }
        }?;
        held.ring_first = (held.ring_first + plan.from_window) % held.ring_rows.max(1);
        Ok(())
    }

    /// Whether an append does no more than to pack the window's first row, if it is full, and to put the new one behind its last.
    pub(super) fn is_step(&self, plan: Plan) -> bool {
        plan.rows == 1
            && plan.passing() == 0
            && plan.to_pack <= 1
            && plan.blocks == self.blocks
            && !self.brings_sinks(plan)
    }

    /// `leaves`: as [`AppendParams`] have it.
    ///
    /// # Safety
    /// As [`Self::append`], for what runs on the stream: the lengths there are those with the new row, and both streams have room for it and a page for
    /// the row that leaves.
    pub(super) unsafe fn append_row(
        &self,
        function: &Function,
        held: &Held,
        tensors: [&DeviceTensor; 2],
        leaves: i32,
        stream: Stream,
    ) -> Result<()> {
        let grid = [2, self.spec().num_key_value_heads as u32, held.batch as u32];
        let parameters = self.append_parameters(held, tensors, leaves);
        // SAFETY: the caller's promise.
        unsafe { launch(function, grid, 256, &parameters, stream) }
    }

    pub(super) fn append_parameters(&self, held: &Held, tensors: [&DeviceTensor; 2], leaves: i32) -> AppendParams {
        let [keys, values] = Side::BOTH.map(|side| {
            let (tensor, rows) = (tensors[side as usize], held.side(side));
            AppendStream {
                row: tensor.address,
                batch_stride: tensor.strides[0],
                head_stride: tensor.strides[1],
                ring: address(rows.ring.as_ref()),
                pages: address(rows.table.as_ref()),
                codec: self.codec_parameters(held, side),
            }
        });
        AppendParams {
            keys,
            values,
            origins: held.origins(),
            refused: held.state.address() + State::REFUSED,
            lengths: held.lengths(),
            leaves,
            ring_rows: held.ring_rows as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: self.spec().num_key_value_heads as i32,
        }
    }

    unsafe fn append_rows(&self, held: &Held, tensors: [&DeviceTensor; 2], plan: Plan, stream: Stream) -> Result<()> {
        let shared = &*self.shared;
        let (heads, element) = (shared.spec.num_key_value_heads, shared.spec.dtype.size());
        for side in Side::BOTH {
            let new = Rows::of(tensors[side as usize]);
            // SAFETY: the caller's promise; all places have room now.
            unsafe {
                self.keep_sinks(held, side, new, plan, stream)?;
                self.take_statistics(held, side, new, plan, stream)?;
                let mut first_row = plan.packed;
                for rows in self.leaving(held, side, new, plan) {
                    self.encode(held, side, rows, first_row, stream)?;
                    first_row += rows.count;
                }
                let staying = new.skip(plan.passing(), plan.rows - plan.passing(), element);
                let target_first = (held.ring_first + plan.window) % held.ring_rows.max(1);
                let ring = address(held.side(side).ring.as_ref());
                let parameters = CopyParams {
                    target_first: target_first as i32,
                    target_ring: held.ring_rows as i32,
                    ..self.rows_to(side, staying, ring, held.ring_rows)
                };
                shared.kernels.copy_rows(&parameters, heads, held.batch, shared.row_bytes(side), stream)?;
            }
        }
        Ok(())
    }

    /// Rows to an array of `room` rows a head of this layer.
    fn rows_to(&self, side: Side, rows: Rows, target: u64, room: usize) -> CopyParams {
        let element = self.spec().dtype.size() as i64;
        let [batch, head, row] = rows.strides;
        CopyParams {
            source_batch_stride: batch * element,
            source_head_stride: head * element,
            source_row_stride: row * element,
            ..whole_rows(
                rows.address,
                target,
                self.spec().num_key_value_heads,
                room,
                rows.count,
                self.shared.row_bytes(side),
            )
        }
    }

    /// Whether a new row is a sink: those of a sequence are its first tokens behind the padding.
    fn brings_sinks(&self, plan: Plan) -> bool {
        let (sinks, end) = (self.spec().sinks, plan.stored + plan.rows);
        let brings = |padding: usize| padding.max(plan.stored) < (padding + sinks).min(end);
        if self.padding.is_empty() { brings(0) } else { self.padding.iter().copied().any(brings) }
    }

    unsafe fn keep_sinks(&self, held: &Held, side: Side, new: Rows, plan: Plan, stream: Stream) -> Result<()> {
        let (shared, sinks) = (&*self.shared, self.spec().sinks);
        if !self.brings_sinks(plan) {
            return Ok(());
        }
        let target = address(held.side(side).sinks.as_ref());
        let parameters = CopyParams {
            rows: sinks as i32,
            source_rows: plan.rows as i32,
            source_shift: -(plan.stored as i32),
            shifts: if self.padding.is_empty() { 0 } else { held.paddings() },
            ..self.rows_to(side, new, target, sinks)
        };
        let heads = shared.spec.num_key_value_heads;
        // SAFETY: the caller's promise.
        unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, shared.row_bytes(side), stream) }
    }

    /// All rows of the ring, as they lie.
    pub(super) fn whole_ring(&self, held: &Held, side: Side) -> Rows {
        let width = self.shared.codec(side).layout.head_dim as i64;
        let (heads, room) = (self.spec().num_key_value_heads as i64, held.ring_rows);
        let strides = [heads * room as i64 * width, room as i64 * width, width];
        Rows { address: address(held.side(side).ring.as_ref()), strides, count: room }
    }

    /// `count` rows of the ring from the window's row `first` on: one run or two.
    fn ring_rows(&self, held: &Held, side: Side, first: usize, count: usize) -> [Rows; 2] {
        let (all, room) = (self.whole_ring(held, side), held.ring_rows);
        let start = (held.ring_first + first) % room.max(1);
        let straight = count.min(room - start);
        let element = self.spec().dtype.size();
        [all.skip(start, straight, element), all.skip(0, count - straight, element)]
    }

    /// Rows that are packed now, in order.
    fn leaving(&self, held: &Held, side: Side, new: Rows, plan: Plan) -> impl Iterator<Item = Rows> + use<> {
        let [first, second] = self.ring_rows(held, side, 0, plan.from_window);
        let fresh = new.skip(plan.to_sinks, plan.to_pack - plan.from_window, self.spec().dtype.size());
        [first, second, fresh].into_iter().filter(|rows| rows.count > 0)
    }

    pub(super) unsafe fn encode(
        &self,
        held: &Held,
        side: Side,
        rows: Rows,
        first_row: usize,
        stream: Stream,
    ) -> Result<()> {
        let (shared, heads) = (&*self.shared, self.spec().num_key_value_heads);
        let Some(function) = shared.kernels.encode(side) else {
            let parameters = CopyParams {
                target_table: address(held.side(side).table.as_ref()),
                target_first: first_row as i32,
                table_pages: held.table_pages as i32,
                ..self.rows_to(side, rows, 0, 0)
            };
            // SAFETY: pages for these rows, ours alone; the caller's promise for the rows and the stream.
            return unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, shared.row_bytes(side), stream) };
        };
        let parameters = self.encode_parameters(held, side, rows, first_row);
        let blocks = (first_row + rows.count).div_ceil(BLOCK_ROWS) - first_row / BLOCK_ROWS;
        let grid = [blocks as u32, heads as u32, held.batch as u32];
        // SAFETY: pages for these rows, ours alone; the caller's promise for the rows and the stream.
        unsafe { launch(function, grid, 256, &parameters, stream) }
    }

    pub(super) fn encode_parameters(&self, held: &Held, side: Side, rows: Rows, first_row: usize) -> EncodeParams {
        let [batch_stride, head_stride, row_stride] = rows.strides;
        EncodeParams {
            rows: rows.address,
            batch_stride,
            head_stride,
            row_stride,
            pages: address(held.side(side).table.as_ref()),
            origins: held.origins(),
            refused: held.state.address() + State::REFUSED,
            codec: self.codec_parameters(held, side),
            first_row: first_row as i32,
            row_count: rows.count as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: self.spec().num_key_value_heads as i32,
        }
    }

    /// What a stream is packed with.
    fn codec_parameters(&self, held: &Held, side: Side) -> CodecParams {
        let codec = self.shared.codec(side);
        CodecParams {
            levels: self.shared.constants[side as usize].levels,
            transform: self.transform(held, side),
            clip: codec.clip,
            rule: i32::from(codec.rule == Rule::Range),
            refinements: codec.refinements as i32,
            unbiased: i32::from(codec.unbiased),
            uniform: i32::from(!codec.is_of_parts() && matches!(codec.codebook, Codebook::Uniform { .. })),
            padding: 0,
        }
    }

    /// Of the blocks that are complete now. Only the first of them may have rows in the window.
    unsafe fn take_statistics(&self, held: &Held, side: Side, new: Rows, plan: Plan, stream: Stream) -> Result<()> {
        let (shared, codec) = (&*self.shared, self.shared.codec(side));
        let (Source::Block(rule), true) = (&codec.source, plan.blocks > self.blocks) else { return Ok(()) };
        let (size, element) = (rule.rows, shared.spec.dtype.size());
        let mut block = self.blocks;
        // A row behind the packed ones is of the window or, from its end on, a new one.
        let first = block * size - plan.packed;
        if first < plan.window {
            let (heads, row_bytes) = (shared.spec.num_key_value_heads, shared.row_bytes(side));
            let staged = shared.memory.allocate(held.batch * heads * size * row_bytes)?;
            let [one, two] = self.ring_rows(held, side, first, plan.window - first);
            let rest = new.skip(plan.to_sinks, size - (plan.window - first), element);
            let mut at = 0;
            for rows in [one, two, rest] {
                let parameters =
                    CopyParams { target_first: at as i32, ..self.rows_to(side, rows, staged.address(), size) };
                // SAFETY: rows of the ring and of the caller's tensor, to a new block.
                unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, stream) }?;
                at += rows.count;
            }
            let width = codec.layout.head_dim as i64;
            let strides = [(heads * size) as i64 * width, size as i64 * width, width];
            let rows = Rows { address: staged.address(), strides, count: size };
            // SAFETY: as above; the staged rows go back to torch for later work on this stream.
            unsafe { self.statistics_of(held, side, rows, block, 1, stream) }?;
            block += 1;
        }
        if block == plan.blocks {
            return Ok(());
        }
        let rows = new.skip(plan.to_sinks + block * size - plan.packed - plan.window, 0, element);
        // SAFETY: the caller's promise.
        unsafe { self.statistics_of(held, side, rows, block, plan.blocks - block, stream) }
    }

    unsafe fn statistics_of(
        &self,
        held: &Held,
        side: Side,
        rows: Rows,
        first_block: usize,
        count: usize,
        stream: Stream,
    ) -> Result<()> {
        let (shared, heads) = (&*self.shared, self.spec().num_key_value_heads);
        let (Some(function), Some(_)) = (shared.kernels.statistics(side), &held.side(side).statistics) else {
            return Ok(());
        };
        let parameters = self.statistics_parameters(held, side, rows, first_block);
        let grid = [count as u32, heads as u32, held.batch as u32];
        // SAFETY: whole blocks of rows; statistics have room for them; the caller's promise for the stream.
        unsafe { launch(function, grid, 256, &parameters, stream) }
    }

    /// Of blocks from `first_block` on, whose rows these are; zeros for a stream without.
    pub(super) fn statistics_parameters(
        &self,
        held: &Held,
        side: Side,
        rows: Rows,
        first_block: usize,
    ) -> StatisticsParams {
        let (Source::Block(rule), Some([shift, scale])) =
            (&self.shared.codec(side).source, &held.side(side).statistics)
        else {
            return StatisticsParams::default();
        };
        let factors = held.queries.as_ref().filter(|seen| seen.started).map_or(0, |seen| seen.factors.address());
        let [batch_stride, head_stride, row_stride] = rows.strides;
        StatisticsParams {
            rows: rows.address,
            batch_stride,
            head_stride,
            row_stride,
            paddings: if self.padding.is_empty() { 0 } else { held.paddings() },
            shift: shift.address(),
            scale: scale.address(),
            factors: if side == Side::Keys { factors } else { 0 },
            exponent: f64::from(rule.scale_exponent),
            // Without queries the spread of a channel stands in for them.
            exponent_alone: f64::from((rule.scale_exponent + rule.query_exponent / 2.0).min(1.0)),
            block: rule.rows as i32,
            first_block: first_block as i32,
            block_capacity: held.block_room as i32,
            kv_heads: self.spec().num_key_value_heads as i32,
            with_shift: i32::from(rule.shift),
            padding: 0,
        }
    }
}

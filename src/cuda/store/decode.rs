//! All rows back in the model's dtype: for readers that cannot attend to packed rows.

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::memory::Block;
use super::super::pages::{BLOCK_ROWS, Side};
use super::super::params::{CopyParams, DecodeParams};
use super::{CudaLayer, DeviceTensor, Held, address, whole_rows};
use crate::error::{Error, Result};
use crate::layer::Regions;

/// Where decoded rows go: address, and strides in elements of `[batch, heads, rows]`.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub address: u64,
    pub strides: [i64; 3],
}

impl CudaLayer {
    /// Writes the rows of all tokens, decoded, to `[batch, heads, tokens, width]`; zeros where padded sequences have none.
    ///
    /// # Safety
    /// As [`Self::append`]; `output` is memory of the device that nobody else uses meanwhile.
    pub unsafe fn decode(&self, side: Side, output: &DeviceTensor, stream: Stream) -> Result<()> {
        self.expect_told("decode")?;
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let (shared, Regions { sinks, packed, window }) = (&*self.shared, self.regions);
        let width = shared.codec(side).layout.head_dim;
        let expected = [self.batch_size(), shared.spec.num_key_value_heads, self.regions.total(), width];
        if output.shape != expected {
            let found = output.shape.map(|size| size as i64);
            return Err(Error::shape("output", format!("{expected:?}"), &found));
        }
        self.expect_rows("output", output)?;
        let Some(held) = &self.held else { return Ok(()) };
        let (rows, row_bytes, heads) = (held.side(side), shared.row_bytes(side), shared.spec.num_key_value_heads);
        let element = output.dtype.size() as i64;
        let to_output = |block: Option<&Block>, room: usize, count: usize| CopyParams {
            target: output.address,
            target_batch_stride: output.strides[0] * element,
            target_head_stride: output.strides[1] * element,
            target_row_stride: output.strides[2] * element,
            ..whole_rows(address(block), 0, heads, room, count, row_bytes)
        };
        // SAFETY: rows of a block of this layer; the caller's promise for the output and the stream.
        let copy = |parameters: CopyParams| unsafe {
            shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, stream)
        };
        copy(CopyParams {
            source_first: held.ring_first as i32,
            source_ring: held.ring_rows as i32,
            target_first: (sinks + packed) as i32,
            ..to_output(rows.ring.as_ref(), held.ring_rows, window)
        })?;
        let [batch, head, row, _] = output.strides;
        let address = output.address.wrapping_add_signed(row * (sinks * output.dtype.size()) as i64);
        // SAFETY: the caller's promise.
        unsafe { self.decode_past(held, side, packed, Target { address, strides: [batch, head, row] }, stream) }?;
        let own = to_output(rows.sinks.as_ref(), shared.spec.sinks, sinks);
        if self.padding.is_empty() {
            return copy(own);
        }
        // The sinks are the tokens behind the padding; whatever lies elsewhere among so many first tokens is nobody's.
        let total = self.regions.total() as i32;
        let blanks = CopyParams { rows: total, source_shift: shared.spec.sinks as i32, shifts: held.paddings(), ..own };
        // SAFETY: as above.
        unsafe { shared.kernels.clear_rows(&blanks, heads, held.batch, row_bytes, stream) }?;
        copy(CopyParams { rows: total, source_shift: -(shared.spec.sinks as i32), shifts: held.origins(), ..own })
    }

    /// The first `count` rows of the past to rows of the model's dtype.
    ///
    /// # Safety
    /// As [`Self::decode`], for the target.
    pub(super) unsafe fn decode_past(
        &self,
        held: &Held,
        side: Side,
        count: usize,
        target: Target,
        stream: Stream,
    ) -> Result<()> {
        let (shared, heads) = (&*self.shared, self.spec().num_key_value_heads);
        let table = address(held.side(side).table.as_ref());
        let [batch_stride, head_stride, row_stride] = target.strides;
        if shared.codec(side).is_raw() {
            let (row_bytes, element) = (shared.row_bytes(side), self.spec().dtype.size() as i64);
            let parameters = CopyParams {
                source_table: table,
                table_pages: held.table_pages as i32,
                target_batch_stride: batch_stride * element,
                target_head_stride: head_stride * element,
                target_row_stride: row_stride * element,
                ..whole_rows(0, target.address, heads, 0, count, row_bytes)
            };
            // SAFETY: pages of all these rows; the caller's promise for the target.
            return unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, stream) };
        }
        let parameters = DecodeParams {
            pages: table,
            rows: target.address,
            batch_stride,
            head_stride,
            row_stride,
            levels: shared.constants[side as usize].levels,
            origins: held.origins(),
            transform: self.transform(held, side),
            first_row: 0,
            row_count: count as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: heads as i32,
        };
        let grid = [count.div_ceil(BLOCK_ROWS) as u32, heads as u32, held.batch as u32];
        // SAFETY: as above.
        unsafe { launch(&*shared.kernels.decode(side)?, grid, 256, &parameters, stream) }
    }
}

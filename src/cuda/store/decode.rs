//! All rows back in the model's dtype: for readers that cannot attend to packed rows.

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::memory::Block;
use super::super::pages::{BLOCK_ROWS, Side};
use super::super::params::{CopyParams, DecodeParams};
use super::{CudaLayer, DeviceTensor, address, whole_rows};
use crate::error::{Error, Result};
use crate::layer::Regions;

impl CudaLayer {
    /// Writes the rows of all tokens, decoded, to `[batch, heads, tokens, width]`. Not for padded sequences.
    ///
    /// # Safety
    /// As [`Self::append`]; `output` is memory of the device that nobody else uses meanwhile.
    pub unsafe fn decode(&self, side: Side, output: &DeviceTensor, stream: Stream) -> Result<()> {
        let (shared, Regions { sinks, packed, window }) = (&*self.shared, self.regions);
        let width = shared.codec(side).layout.head_dim;
        let expected = [self.batch_size(), shared.spec.num_key_value_heads, self.regions.total(), width];
        if output.shape != expected {
            let found = output.shape.map(|size| size as i64);
            return Err(Error::shape("output", format!("{expected:?}"), &found));
        }
        self.expect_rows("output", output)?;
        if self.padding.iter().any(|padding| *padding > 0) {
            let reason = "attention is what reads them".to_string();
            return Err(Error::Unsupported { name: "decoding padded sequences on a GPU".into(), reason });
        }
        let Some(held) = &self.held else { return Ok(()) };
        let (rows, row_bytes, heads) = (held.side(side), shared.row_bytes(side), shared.spec.num_key_value_heads);
        let plain = |block: Option<&Block>, room: usize, first: usize, count: usize, to: usize| {
            let element = output.dtype.size() as i64;
            let parameters = CopyParams {
                source_first: first as i32,
                source_ring: room as i32,
                target: output.address,
                target_first: to as i32,
                target_batch_stride: output.strides[0] * element,
                target_head_stride: output.strides[1] * element,
                target_row_stride: output.strides[2] * element,
                ..whole_rows(address(block), 0, heads, room, count, row_bytes)
            };
            // SAFETY: rows of a block of this layer; the caller's promise for the output and the stream.
            unsafe { shared.kernels.copy_rows(&parameters, heads, held.batch, row_bytes, stream) }
        };
        plain(rows.sinks.as_ref(), shared.spec.sinks, 0, sinks, 0)?;
        plain(rows.ring.as_ref(), held.ring_rows, held.ring_first, window, sinks + packed)?;
        let parameters = DecodeParams {
            pages: address(rows.table.as_ref()),
            rows: output.address.wrapping_add_signed(output.strides[2] * (sinks * output.dtype.size()) as i64),
            batch_stride: output.strides[0],
            head_stride: output.strides[1],
            row_stride: output.strides[2],
            levels: shared.constants[side as usize].levels,
            origins: held.origins(),
            transform: self.transform(held, side),
            first_row: 0,
            row_count: packed as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: heads as i32,
        };
        let grid = [packed.div_ceil(BLOCK_ROWS) as u32, heads as u32, held.batch as u32];
        // SAFETY: pages of all packed rows; the caller's promise for the output and the stream.
        unsafe { launch(&*shared.kernels.decode(side)?, grid, 256, &parameters, stream) }
    }
}

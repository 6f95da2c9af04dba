//! How far the scores of packed keys are off, by the codec's own estimate (`backend/noise.rs`): scales are summed on the device, the rest is the host's.

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::pages::Side;
use super::super::params::{CopyParams, DecodeParams};
use super::{CudaLayer, DeviceTensor, Held, address, whole_rows};
use crate::backend::noise::error_weights;
use crate::backend::simd::levels;
use crate::error::Result;
use crate::format::PAGE_ROWS;
use crate::transform::Affine;

impl CudaLayer {
    /// As `score_noise` of the store on the CPU, for the last query of `query` `[batch, heads, L, D]`. Waits for the stream.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn score_noise(&self, query: &DeviceTensor, scale: f32, stream: Stream) -> Result<f32> {
        self.check_query(query, self.batch_size(), usize::MAX)?;
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let (codec, rows) = (self.shared.codec(Side::Keys), self.regions.packed);
        let Some(held) = self.held.as_ref().filter(|_| rows > 0 && !codec.is_raw()) else { return Ok(0.0) };
        let (kv_heads, heads, width) = (self.spec().num_key_value_heads, query.shape[1], codec.layout.head_dim);
        let (groups, pages) = (codec.layout.groups(), rows.div_ceil(PAGE_ROWS));
        // SAFETY: the caller's promise, for all of these.
        let (queries, squares, scales) = unsafe {
            (
                self.read_last_queries(query, stream)?,
                self.read_scale_squares(held, stream)?,
                self.read_block_scales(held, stream)?,
            )
        };
        let pages_per_block = codec.block_rows() / PAGE_ROWS;
        let (mut sum, mut weights) = (0.0, vec![0.0f64; groups]);
        for (index, row) in queries.chunks_exact(width).enumerate() {
            let scaled: Vec<f32> = row.iter().map(|value| value * scale).collect();
            let kv_head = index % heads / (heads / kv_heads);
            let sequence = index / heads * kv_heads + kv_head;
            for page in 0..pages {
                if page == 0 || (pages_per_block > 0 && page % pages_per_block == 0) {
                    let affine = scales.as_ref().map(|scales| {
                        let block = sequence * held.block_room + page / pages_per_block;
                        Affine::new(vec![0.0; width], scales[block * width..][..width].to_vec())
                    });
                    error_weights(self.spec().isa, codec, kv_head, affine.as_ref(), &scaled, &mut weights);
                }
                let own = &squares[(sequence * pages + page) * groups..][..groups];
                sum += own.iter().zip(&weights).map(|(square, weight)| square * weight).sum::<f64>();
            }
        }
        let counted: usize = (0..held.batch).map(|batch| heads * rows.saturating_sub(self.padding(batch))).sum();
        Ok((sum / counted.max(1) as f64) as f32)
    }

    /// f32 `[batch, heads, D]`.
    unsafe fn read_last_queries(&self, query: &DeviceTensor, stream: Stream) -> Result<Vec<f32>> {
        let shared = &*self.shared;
        let [batch, heads, length, width] = query.shape;
        let element = query.dtype.size();
        let block = shared.memory.allocate(batch * heads * width * element)?;
        let last = query.strides[2] * ((length - 1) * element) as i64;
        let parameters = CopyParams {
            source_batch_stride: query.strides[0] * element as i64,
            source_head_stride: query.strides[1] * element as i64,
            ..whole_rows(query.address.wrapping_add_signed(last), block.address(), heads, 1, 1, width * element)
        };
        let mut rows = vec![0.0f32; batch * heads * width];
        let mut bytes = vec![0u8; rows.len() * element];
        // SAFETY: the caller's promise for the query; a new block of as many rows.
        unsafe {
            shared.kernels.copy_rows(&parameters, heads, batch, width * element, stream)?;
            shared.kernels.device().read(&mut bytes, block.address(), stream)?;
        }
        levels::decode_plain(self.spec().isa, &bytes, query.dtype, &mut rows);
        Ok(rows)
    }

    /// f64 `[batch, kv heads, pages, groups]`.
    unsafe fn read_scale_squares(&self, held: &Held, stream: Stream) -> Result<Vec<f64>> {
        let (shared, heads, rows) = (&*self.shared, self.spec().num_key_value_heads, self.regions.packed);
        let pages = rows.div_ceil(PAGE_ROWS);
        let mut squares = vec![0.0f64; held.batch * heads * pages * shared.codec(Side::Keys).layout.groups()];
        let block = shared.memory.allocate(8 * squares.len())?;
        let parameters = DecodeParams {
            pages: address(held.side(Side::Keys).table.as_ref()),
            rows: block.address(),
            origins: held.origins(),
            first_row: self.spec().sinks as i32,
            row_count: rows as i32,
            page_capacity: held.table_pages as i32,
            kv_heads: heads as i32,
            ..DecodeParams::default()
        };
        // SAFETY: pages of all packed rows, and a new block for their sums.
        unsafe {
            let function = shared.kernels.scale_squares()?;
            launch(&function, [pages as u32, heads as u32, held.batch as u32], PAGE_ROWS, &parameters, stream)?;
            shared.kernels.device().read(&mut squares, block.address(), stream)?;
        }
        Ok(squares)
    }

    /// f32 `[batch, kv heads, block room, D]` of the keys' blocks; None where statistics are static.
    unsafe fn read_block_scales(&self, held: &Held, stream: Stream) -> Result<Option<Vec<f32>>> {
        let Some([_, scale]) = &held.side(Side::Keys).statistics else { return Ok(None) };
        let mut scales = vec![0.0f32; scale.bytes() / 4];
        // SAFETY: all of a block of this layer.
        unsafe { self.shared.kernels.device().read(&mut scales, scale.address(), stream) }?;
        Ok(Some(scales))
    }
}

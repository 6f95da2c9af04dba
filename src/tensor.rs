//! Views of foreign memory: the fence between the crate's safe code and raw pointers.
//!
//! What it is: read-only and writable 4-D strided views `[batch, head, token, channel]` and, in `mask.rs`, a broadcasting mask view
//! `[batch | 1, head | 1, query | 1, token]`, with bounds checked on every row. Shapes are in elements, strides in elements and may be
//! negative. What it is not: an owner (`dlpack.rs` keeps the exporter alive as long as a view borrows from it), an importer, arithmetic.
//!
//! Rows are what the rest of the crate works on: [`TensorView::row`] borrows one when its channels are contiguous,
//! [`TensorView::read_row_f32`] and [`TensorView::copy_row_bytes`] copy one with any stride.

use crate::error::{Error, Result};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::{marker::PhantomData, slice};

mod mask;
#[cfg(test)]
mod tests;
pub use mask::{MaskKind, MaskRow, MaskView};

/// The element types of keys, values, queries and outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "float16" => Ok(Self::F16),
            "bfloat16" => Ok(Self::BF16),
            other => Err(Error::value("dtype", "\"float32\", \"float16\" or \"bfloat16\"", format!("{other:?}"))),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// The Rust types behind [`Dtype`]; every bit pattern of them is valid.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {
    const DTYPE: Dtype;
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// One row whose channels are contiguous.
#[derive(Debug, Clone, Copy)]
pub enum Row<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Base pointer, sizes and strides shared by the read-only and the writable view.
#[derive(Debug, Clone, Copy)]
struct Layout {
    ptr: *mut u8,
    shape: [usize; 4],
    strides: [isize; 4],
    dtype: Dtype,
}

impl Layout {
    fn contiguous_strides(shape: [usize; 4]) -> [isize; 4] {
        let mut strides = [1isize; 4];
        for axis in (0..3).rev() {
            strides[axis] = strides[axis + 1] * shape[axis + 1] as isize;
        }
        strides
    }

    /// Address of channel 0 of a row. Panics when the row lies outside.
    fn row_ptr(&self, batch: usize, head: usize, token: usize) -> *mut u8 {
        let [batches, heads, tokens, _] = self.shape;
        assert!(
            batch < batches && head < heads && token < tokens,
            "row ({batch}, {head}, {token}) is outside {:?}",
            self.shape
        );
        let elements =
            batch as isize * self.strides[0] + head as isize * self.strides[1] + token as isize * self.strides[2];
        // `wrapping_offset` because a view with zero channels may have any pointer; every access below is in bounds.
        self.ptr.wrapping_offset(elements * self.dtype.size() as isize)
    }

    fn slice_tokens(mut self, start: usize, len: usize) -> Self {
        let end = start.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.shape[2]), "tokens {start} + {len} are outside {:?}", self.shape);
        self.ptr = self.ptr.wrapping_offset(start as isize * self.strides[2] * self.dtype.size() as isize);
        self.shape[2] = len;
        self
    }

    fn one_head(mut self, batch: usize, head: usize) -> Self {
        assert!(batch < self.shape[0] && head < self.shape[1], "head ({batch}, {head}) is outside {:?}", self.shape);
        let elements = batch as isize * self.strides[0] + head as isize * self.strides[1];
        self.ptr = self.ptr.wrapping_offset(elements * self.dtype.size() as isize);
        self.shape[0] = 1;
        self.shape[1] = 1;
        self
    }
}

/// Whether two different indices may name the same element. Conservative: it wants the axes to nest, as every slice, transpose and
/// reshape of a plain tensor does.
pub fn may_overlap(shape: &[usize], strides: &[isize]) -> bool {
    if shape.contains(&0) {
        return false;
    }
    let mut axes: Vec<(usize, usize)> = shape
        .iter()
        .zip(strides)
        .filter(|(size, _)| **size > 1)
        .map(|(&size, stride)| (stride.unsigned_abs(), size))
        .collect();
    axes.sort_unstable();
    let mut reach = 0usize; // the largest offset that the axes so far can make
    for (stride, size) in axes {
        if stride <= reach {
            return true;
        }
        reach = reach.saturating_add(stride.saturating_mul(size - 1));
    }
    false
}

/// Read-only view `[batch, head, token, channel]`.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    layout: Layout,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: the view only reads; the memory lives for 'a because the exporter's handle (or the slice) is borrowed for 'a. That nobody writes
// meanwhile is the caller's promise, as for every tensor library that shares memory.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

impl<'a> TensorView<'a> {
    /// # Safety
    /// For `'a`, every element that `shape` and `strides` reach from `ptr` is readable, is not written by anyone, and is aligned for `dtype`.
    pub unsafe fn from_raw(ptr: *const u8, shape: [usize; 4], strides: [isize; 4], dtype: Dtype) -> Self {
        debug_assert!(shape.contains(&0) || ptr.addr().is_multiple_of(dtype.size()));
        Self { layout: Layout { ptr: ptr.cast_mut(), shape, strides, dtype }, memory: PhantomData }
    }

    /// A contiguous slice seen as `shape`. Panics when the sizes differ.
    pub fn from_slice<T: Element>(data: &'a [T], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "slice and shape {shape:?} differ in size");
        // SAFETY: the slice is readable and aligned for 'a, and the contiguous strides of `shape` stay inside it.
        unsafe { Self::from_raw(data.as_ptr().cast(), shape, Layout::contiguous_strides(shape), T::DTYPE) }
    }

    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    pub fn batch_size(&self) -> usize {
        self.layout.shape[0]
    }

    pub fn num_heads(&self) -> usize {
        self.layout.shape[1]
    }

    pub fn tokens(&self) -> usize {
        self.layout.shape[2]
    }

    /// Channels of a row.
    pub fn width(&self) -> usize {
        self.layout.shape[3]
    }

    /// Strides in elements.
    pub fn strides(&self) -> [isize; 4] {
        self.layout.strides
    }

    /// Distance between neighbouring channels, in elements.
    pub fn last_stride(&self) -> isize {
        self.layout.strides[3]
    }

    /// Address of channel 0 of a row; `last_stride` leads to the others.
    pub fn row_ptr(&self, batch: usize, head: usize, token: usize) -> *const u8 {
        self.layout.row_ptr(batch, head, token)
    }

    /// The row itself, if its channels are contiguous.
    pub fn row(&self, batch: usize, head: usize, token: usize) -> Option<Row<'a>> {
        let width = self.width();
        let ptr = self.row_ptr(batch, head, token);
        if width > 1 && self.last_stride() != 1 {
            return None;
        }
        if width == 0 {
            return Some(match self.dtype() {
                Dtype::F32 => Row::F32(&[]),
                Dtype::F16 => Row::F16(&[]),
                Dtype::BF16 => Row::BF16(&[]),
            });
        }
        // SAFETY: `row_ptr` checked the row; its `width` contiguous, aligned elements are readable for 'a (`from_raw`).
        unsafe {
            Some(match self.dtype() {
                Dtype::F32 => Row::F32(slice::from_raw_parts(ptr.cast(), width)),
                Dtype::F16 => Row::F16(slice::from_raw_parts(ptr.cast(), width)),
                Dtype::BF16 => Row::BF16(slice::from_raw_parts(ptr.cast(), width)),
            })
        }
    }

    /// Writes the row as f32 to `out` (`width` elements), exactly.
    pub fn read_row_f32(&self, batch: usize, head: usize, token: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.width(), "out has not the width of a row");
        match self.row(batch, head, token) {
            Some(Row::F32(row)) => out.copy_from_slice(row),
            Some(Row::F16(row)) => row.convert_to_f32_slice(out),
            Some(Row::BF16(row)) => row.convert_to_f32_slice(out),
            None => match self.dtype() {
                Dtype::F32 => self.read_strided::<f32>(batch, head, token, out),
                Dtype::F16 => self.read_strided::<f16>(batch, head, token, out),
                Dtype::BF16 => self.read_strided::<bf16>(batch, head, token, out),
            },
        }
    }

    fn read_strided<T: Element>(&self, batch: usize, head: usize, token: usize, out: &mut [f32]) {
        debug_assert_eq!(T::DTYPE, self.dtype());
        let row = self.row_ptr(batch, head, token).cast::<T>();
        for (channel, value) in out.iter_mut().enumerate() {
            // SAFETY: `row_ptr` checked the row, `out` has `width` elements, so the channel is inside the view.
            *value = unsafe { row.offset(channel as isize * self.last_stride()).read() }.to_f32();
        }
    }

    /// Copies the row's own bytes to `out` (`width * dtype.size()` bytes), unchanged.
    pub fn copy_row_bytes(&self, batch: usize, head: usize, token: usize, out: &mut [u8]) {
        let (width, size) = (self.width(), self.dtype().size());
        assert_eq!(out.len(), width * size, "out has not the bytes of a row");
        let row = self.row_ptr(batch, head, token);
        if width == 0 {
            return;
        }
        if width == 1 || self.last_stride() == 1 {
            // SAFETY: `row_ptr` checked the row and its channels are contiguous; `out` is a separate, exclusive borrow.
            unsafe { row.copy_to_nonoverlapping(out.as_mut_ptr(), width * size) };
            return;
        }
        for (channel, bytes) in out.chunks_exact_mut(size).enumerate() {
            // SAFETY: the channel is inside the view, as in `read_strided`.
            unsafe {
                row.offset(channel as isize * self.last_stride() * size as isize)
                    .copy_to_nonoverlapping(bytes.as_mut_ptr(), size);
            }
        }
    }

    /// Tokens `start .. start + len`.
    #[must_use]
    pub fn slice_tokens(self, start: usize, len: usize) -> Self {
        Self { layout: self.layout.slice_tokens(start, len), memory: PhantomData }
    }

    /// The view `[1, 1, token, channel]` of one head.
    #[must_use]
    pub fn head(self, batch: usize, head: usize) -> Self {
        Self { layout: self.layout.one_head(batch, head), memory: PhantomData }
    }
}

/// Writable view `[batch, head, token, channel]`; no two indices name the same element.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    layout: Layout,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive view of memory that lives for 'a (see `TensorView`); sending it sends the exclusive access.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: through a shared reference the view only reads.
unsafe impl Sync for TensorViewMut<'_> {}

impl<'a> TensorViewMut<'a> {
    /// Refuses strides by which two indices may meet in one element.
    ///
    /// # Safety
    /// For `'a`, every element that `shape` and `strides` reach from `ptr` is readable and writable, is used through this view only, and is
    /// aligned for `dtype`.
    pub unsafe fn from_raw(
        name: &str,
        ptr: *mut u8,
        shape: [usize; 4],
        strides: [isize; 4],
        dtype: Dtype,
    ) -> Result<Self> {
        debug_assert!(shape.contains(&0) || ptr.addr().is_multiple_of(dtype.size()));
        if may_overlap(&shape, &strides) {
            return Err(Error::value(
                name,
                "memory in which every element is written once",
                format!("overlapping strides {strides:?} for shape {shape:?}"),
            ));
        }
        Ok(Self { layout: Layout { ptr, shape, strides, dtype }, memory: PhantomData })
    }

    /// A contiguous slice seen as `shape`. Panics when the sizes differ.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "slice and shape {shape:?} differ in size");
        let strides = Layout::contiguous_strides(shape);
        Self { layout: Layout { ptr: data.as_mut_ptr().cast(), shape, strides, dtype: T::DTYPE }, memory: PhantomData }
    }

    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    pub fn tokens(&self) -> usize {
        self.layout.shape[2]
    }

    /// Channels of a row.
    pub fn width(&self) -> usize {
        self.layout.shape[3]
    }

    /// Distance between neighbouring channels, in elements.
    pub fn last_stride(&self) -> isize {
        self.layout.strides[3]
    }

    /// Address of channel 0 of a row; `last_stride` leads to the others.
    pub fn row_ptr(&mut self, batch: usize, head: usize, token: usize) -> *mut u8 {
        self.layout.row_ptr(batch, head, token)
    }

    pub fn as_view(&self) -> TensorView<'_> {
        TensorView { layout: self.layout, memory: PhantomData }
    }

    /// Writes `row` (`width` elements), rounded to nearest even.
    pub fn write_row_f32(&mut self, batch: usize, head: usize, token: usize, row: &[f32]) {
        match self.dtype() {
            Dtype::F32 => self.write::<f32>(batch, head, token, row, |out, row| out.copy_from_slice(row)),
            Dtype::F16 => self.write::<f16>(batch, head, token, row, HalfFloatSliceExt::convert_from_f32_slice),
            Dtype::BF16 => self.write::<bf16>(batch, head, token, row, HalfFloatSliceExt::convert_from_f32_slice),
        }
    }

    fn write<T: Element>(
        &mut self,
        batch: usize,
        head: usize,
        token: usize,
        row: &[f32],
        convert: impl Fn(&mut [T], &[f32]),
    ) {
        debug_assert_eq!(T::DTYPE, self.dtype());
        let width = self.width();
        assert_eq!(row.len(), width, "row has not the width of the view");
        let out = self.row_ptr(batch, head, token).cast::<T>();
        if width == 0 {
            return;
        }
        if width == 1 || self.last_stride() == 1 {
            // SAFETY: `row_ptr` checked the row; its contiguous, aligned elements are ours alone while `self` is borrowed.
            convert(unsafe { slice::from_raw_parts_mut(out, width) }, row);
            return;
        }
        for (channel, value) in row.iter().enumerate() {
            // SAFETY: the channel is inside the view, which has exclusive access.
            unsafe { out.offset(channel as isize * self.last_stride()).write(T::from_f32(*value)) };
        }
    }

    /// Writes the row's bytes (`width * dtype.size()`), unchanged.
    pub fn write_row_bytes(&mut self, batch: usize, head: usize, token: usize, row: &[u8]) {
        let (width, size, stride) = (self.width(), self.dtype().size(), self.last_stride());
        assert_eq!(row.len(), width * size, "row has not the bytes of the view's rows");
        let out = self.row_ptr(batch, head, token);
        if width == 0 {
            return;
        }
        if width == 1 || stride == 1 {
            // SAFETY: `row_ptr` checked the row and its channels are contiguous; `row` is a separate borrow.
            unsafe { out.copy_from_nonoverlapping(row.as_ptr(), width * size) };
            return;
        }
        for (channel, bytes) in row.chunks_exact(size).enumerate() {
            // SAFETY: the channel is inside the view, which has exclusive access.
            unsafe {
                out.offset(channel as isize * stride * size as isize).copy_from_nonoverlapping(bytes.as_ptr(), size);
            }
        }
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { layout: self.layout, memory: PhantomData }
    }

    /// Tokens `start .. start + len`.
    #[must_use]
    pub fn slice_tokens(self, start: usize, len: usize) -> Self {
        Self { layout: self.layout.slice_tokens(start, len), memory: PhantomData }
    }

    /// Tokens before `token` and the others: two views for two threads.
    #[must_use]
    pub fn split_tokens_at(self, token: usize) -> (Self, Self) {
        // The halves share no element, because no two indices of `self` do.
        let before = self.layout.slice_tokens(0, token);
        let after = self.layout.slice_tokens(token, self.tokens() - token);
        (Self { layout: before, memory: PhantomData }, Self { layout: after, memory: PhantomData })
    }

    /// One view `[1, 1, token, channel]` per (batch, head), in this order: one per thread of a parallel loop.
    pub fn split_heads(self) -> Vec<Self> {
        let [batches, heads, ..] = self.shape();
        // The parts share no element, because no two indices of `self` do.
        (0..batches * heads)
            .map(|i| Self { layout: self.layout.one_head(i / heads, i % heads), memory: PhantomData })
            .collect()
    }
}

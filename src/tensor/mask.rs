//! The mask view: `[batch | 1, head | 1, query | 1, token]`, boolean (visible or not) or added to the scores.
//!
//! What it is not: a causal rule or a window; the caller adds those.

use super::{Dtype, Element, Layout, Row, TensorView};
use crate::error::{Error, Result};
use std::{marker::PhantomData, ops::Range, slice};

/// What the elements of a mask mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskKind {
    /// One byte an element; nonzero: the token is visible.
    Visible,
    /// Added to the scores.
    Additive(Dtype),
}

impl MaskKind {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Visible => 1,
            Self::Additive(dtype) => dtype.size(),
        }
    }
}

/// One row of a mask whose elements are contiguous.
#[derive(Debug, Clone, Copy)]
pub enum MaskRow<'a> {
    Visible(&'a [u8]),
    Additive(Row<'a>),
}

/// Read-only mask `[batch | 1, head | 1, query | 1, token]`; axes of size 1 are broadcast.
#[derive(Debug, Clone, Copy)]
pub struct MaskView<'a> {
    ptr: *const u8,
    shape: [usize; 4],
    strides: [isize; 4], // in elements; 0 along the broadcast ones of the first three axes
    kind: MaskKind,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: as for `TensorView`.
unsafe impl Send for MaskView<'_> {}
// SAFETY: as for `TensorView`.
unsafe impl Sync for MaskView<'_> {}

impl<'a> MaskView<'a> {
    /// # Safety
    /// As for [`TensorView::from_raw`], with elements of `kind`.
    pub unsafe fn from_raw(ptr: *const u8, shape: [usize; 4], mut strides: [isize; 4], kind: MaskKind) -> Self {
        debug_assert!(shape.contains(&0) || ptr.addr().is_multiple_of(kind.size()));
        for axis in 0..3 {
            if shape[axis] == 1 {
                strides[axis] = 0;
            }
        }
        Self { ptr, shape, strides, kind, memory: PhantomData }
    }

    pub fn from_visible(data: &'a [u8], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "slice and shape {shape:?} differ in size");
        // SAFETY: the slice is readable for 'a and the contiguous strides of `shape` stay inside it.
        unsafe { Self::from_raw(data.as_ptr(), shape, Layout::contiguous_strides(shape), MaskKind::Visible) }
    }

    pub fn from_additive<T: Element>(data: &'a [T], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "slice and shape {shape:?} differ in size");
        let strides = Layout::contiguous_strides(shape);
        // SAFETY: the slice is readable and aligned for 'a and the contiguous strides of `shape` stay inside it.
        unsafe { Self::from_raw(data.as_ptr().cast(), shape, strides, MaskKind::Additive(T::DTYPE)) }
    }

    pub fn kind(&self) -> MaskKind {
        self.kind
    }

    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    pub fn tokens(&self) -> usize {
        self.shape[3]
    }

    /// Distance between neighbouring tokens, in elements.
    pub fn last_stride(&self) -> isize {
        self.strides[3]
    }

    /// Checks that the mask serves `[batch, heads, queries, tokens]`.
    pub fn expect(&self, name: &str, batch: usize, heads: usize, queries: usize, tokens: usize) -> Result<()> {
        let fits = |axis: usize, size: usize| self.shape[axis] == size || self.shape[axis] == 1;
        if fits(0, batch) && fits(1, heads) && fits(2, queries) && self.shape[3] == tokens {
            return Ok(());
        }
        let found = self.shape.map(|size| size as i64);
        Err(Error::shape(name, format!("[{batch} or 1, {heads} or 1, {queries} or 1, {tokens}]"), &found))
    }

    /// Address of token 0 of a row; a broadcast axis takes any index.
    pub fn row_ptr(&self, batch: usize, head: usize, query: usize) -> *const u8 {
        let index = [batch, head, query];
        let mut elements = 0isize;
        for axis in 0..3 {
            let size = self.shape[axis];
            assert!(index[axis] < size || size == 1, "mask row {index:?} is outside {:?}", self.shape);
            elements += index[axis] as isize * self.strides[axis];
        }
        self.ptr.wrapping_offset(elements * self.kind.size() as isize)
    }

    /// The row itself, if its tokens are contiguous.
    pub fn row(&self, batch: usize, head: usize, query: usize) -> Option<MaskRow<'a>> {
        let tokens = self.tokens();
        if tokens > 1 && self.last_stride() != 1 {
            return None;
        }
        let ptr = self.row_ptr(batch, head, query);
        Some(match self.kind {
            MaskKind::Visible if tokens == 0 => MaskRow::Visible(&[]),
            // SAFETY: `row_ptr` checked the row; its `tokens` contiguous bytes are readable for 'a (`from_raw`).
            MaskKind::Visible => MaskRow::Visible(unsafe { slice::from_raw_parts(ptr, tokens) }),
            MaskKind::Additive(dtype) => {
                // SAFETY: one row of this mask, with the promise of `from_raw`.
                let row = unsafe { TensorView::from_raw(ptr, [1, 1, 1, tokens], [0, 0, 0, 1], dtype) };
                MaskRow::Additive(row.row(0, 0, 0)?)
            }
        })
    }

    /// Whether a row lets all of these tokens be seen as they are; false where that cannot be told at a glance.
    pub fn is_open(&self, batch: usize, head: usize, query: usize, tokens: Range<usize>) -> bool {
        match self.row(batch, head, query) {
            Some(MaskRow::Visible(row)) => !row[tokens].contains(&0),
            Some(MaskRow::Additive(Row::F32(row))) => row[tokens].iter().all(|bias| *bias == 0.0),
            Some(MaskRow::Additive(Row::F16(row))) => row[tokens].iter().all(|bias| bias.to_bits() << 1 == 0),
            Some(MaskRow::Additive(Row::BF16(row))) => row[tokens].iter().all(|bias| bias.to_bits() << 1 == 0),
            None => false,
        }
    }

    /// Writes what tokens `start .. start + out.len()` add to the scores: 0 or -inf for a mask of visible tokens.
    pub fn read_bias(&self, batch: usize, head: usize, query: usize, start: usize, out: &mut [f32]) {
        let end = start.checked_add(out.len());
        assert!(end.is_some_and(|end| end <= self.tokens()), "tokens {start} + {} are outside the mask", out.len());
        let stride = self.last_stride();
        let first =
            self.row_ptr(batch, head, query).wrapping_offset(start as isize * stride * self.kind.size() as isize);
        match self.kind {
            MaskKind::Visible => {
                for (token, bias) in out.iter_mut().enumerate() {
                    // SAFETY: the row and the tokens were checked above.
                    let visible = unsafe { first.offset(token as isize * stride).read() } != 0;
                    *bias = if visible { 0.0 } else { f32::NEG_INFINITY };
                }
            }
            MaskKind::Additive(dtype) => {
                // SAFETY: the row and the tokens were checked above; the promise of `from_raw` holds for a part of the mask.
                let row = unsafe { TensorView::from_raw(first, [1, 1, 1, out.len()], [0, 0, 0, stride], dtype) };
                row.read_row_f32(0, 0, 0, out);
            }
        }
    }
}

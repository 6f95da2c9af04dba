//! Where rows lie: packed pages of the past, and plain rows of the sinks and the window.
//!
//! Both belong to one stream (keys or values) of one (sequence, kv head). Pages are reference-counted and copied only when a shared
//! one is written, so a batch can be reordered, repeated or cloned without touching what they hold; growing never moves an old page.

use std::sync::Arc;

use crate::backend::simd::prefetch;
use crate::codec::Codec;
use crate::format::{PAGE_ROWS, RowLayout};
use crate::tensor::Dtype;
use crate::transform::BlockStatistics;

/// Up to [`PAGE_ROWS`] packed rows: all codes, then all metadata.
#[derive(Clone)]
pub struct Page {
    bytes: Box<[u8]>,
}

impl Page {
    fn new(layout: &RowLayout) -> Self {
        Self { bytes: vec![0; layout.row_bytes() * PAGE_ROWS].into_boxed_slice() }
    }

    pub fn codes(&self, layout: &RowLayout) -> &[u8] {
        &self.bytes[..layout.code_bytes * PAGE_ROWS]
    }

    pub fn metadata(&self, layout: &RowLayout) -> &[u8] {
        &self.bytes[layout.code_bytes * PAGE_ROWS..]
    }

    /// Code and metadata bytes of row `index`, to write.
    pub fn row_mut(&mut self, layout: &RowLayout, index: usize) -> (&mut [u8], &mut [u8]) {
        let (codes, metadata) = self.bytes.split_at_mut(layout.code_bytes * PAGE_ROWS);
        (
            &mut codes[index * layout.code_bytes..][..layout.code_bytes],
            &mut metadata[index * layout.metadata_bytes..][..layout.metadata_bytes],
        )
    }
}

/// The packed past of one stream.
#[derive(Clone, Default)]
pub struct PackedRows {
    pages: Vec<Arc<Page>>,
    /// Statistics of the first blocks, of every one with a packed row at least; empty for a codec with static ones.
    blocks: Vec<Arc<BlockStatistics>>,
    len: usize,
}

impl PackedRows {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn page(&self, index: usize) -> &Page {
        &self.pages[index]
    }

    /// Statistics of the block of row `row`.
    pub fn block(&self, row: usize, block_rows: usize) -> &BlockStatistics {
        &self.blocks[row / block_rows]
    }

    /// Fixes the statistics of the next block.
    pub fn push_block(&mut self, statistics: BlockStatistics) {
        self.blocks.push(Arc::new(statistics));
    }

    /// Blocks whose statistics are known.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Room for one more row: its index in the page and the page, ours alone.
    pub fn next_row(&mut self, layout: &RowLayout) -> (usize, &mut Page) {
        let index = self.len % PAGE_ROWS;
        if index == 0 {
            self.pages.push(Arc::new(Page::new(layout)));
        }
        self.len += 1;
        let last = self.pages.len() - 1;
        (index, Arc::make_mut(&mut self.pages[last]))
    }

    /// Calls for what encoding the next row takes: its block's statistics and its place.
    pub fn prefetch_next(&self, codec: &Codec) {
        let block_rows = codec.block_rows();
        if block_rows > 0
            && let Some(block) = self.blocks.get(self.len / block_rows)
        {
            block.prefetch();
        }
        let (index, layout) = (self.len % PAGE_ROWS, &codec.layout);
        if index > 0
            && let Some(page) = self.pages.last()
        {
            prefetch(&page.codes(layout)[index * layout.code_bytes..][..layout.code_bytes]);
            prefetch(&page.metadata(layout)[index * layout.metadata_bytes..][..layout.metadata_bytes]);
        }
    }

    /// Forgets the rows from `len` on, and the statistics of the blocks from `blocks` on.
    pub fn truncate(&mut self, len: usize, blocks: usize) {
        debug_assert!(len <= self.len);
        self.len = len;
        self.pages.truncate(len.div_ceil(PAGE_ROWS));
        self.blocks.truncate(blocks);
    }

    /// Addresses and sizes of what is held, for counting shared pages once.
    pub fn held<'a>(&'a self, codec: &Codec) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        let page_bytes = codec.layout.row_bytes() * PAGE_ROWS;
        let pages = self.pages.iter().map(move |page| (Arc::as_ptr(page).addr(), page_bytes));
        pages.chain(self.blocks.iter().map(move |block| (Arc::as_ptr(block).addr(), block.bytes())))
    }

    #[cfg(test)]
    pub fn shares_page(&self, other: &Self, index: usize) -> bool {
        Arc::ptr_eq(&self.pages[index], &other.pages[index])
    }
}

/// Rows in the model's dtype, taken from the front and added at the back.
#[derive(Clone)]
pub struct PlainRows {
    bytes: Arc<Vec<u8>>,
    /// First row that is still held.
    start: usize,
    row_bytes: usize,
    pub dtype: Dtype,
}

impl PlainRows {
    pub fn new(dtype: Dtype, width: usize) -> Self {
        Self { bytes: Arc::new(Vec::new()), start: 0, row_bytes: width * dtype.size(), dtype }
    }

    pub fn len(&self) -> usize {
        self.bytes.len() / self.row_bytes - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of `count` rows from row `first` on.
    pub fn rows(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes[(self.start + first) * self.row_bytes..][..count * self.row_bytes]
    }

    /// Calls for the first row and for the last, which the next one follows.
    pub fn prefetch_ends(&self) {
        if !self.is_empty() {
            prefetch(self.rows(0, 1));
            prefetch(self.rows(self.len() - 1, 1));
        }
    }

    /// The bytes of row `index`, ours alone, to write.
    pub fn row_mut(&mut self, index: usize) -> &mut [u8] {
        &mut Arc::make_mut(&mut self.bytes)[(self.start + index) * self.row_bytes..][..self.row_bytes]
    }

    /// Room for `count` more rows at the back: zeros. Dead rows in front go once they are an eighth of the living, so a sliding window
    /// stays small and moves each row eight times.
    pub fn extend(&mut self, count: usize) -> &mut [u8] {
        let len = self.len();
        let (start, row_bytes) = (self.start * self.row_bytes, self.row_bytes);
        let shared = Arc::get_mut(&mut self.bytes).is_none();
        if shared || self.start > 8 + len / 8 || self.bytes.capacity() > 4 * (len + count + 32) * row_bytes {
            let mut bytes = Vec::with_capacity((len + len / 8 + count + 9) * row_bytes);
            bytes.extend_from_slice(&self.bytes[start..]);
            self.bytes = Arc::new(bytes);
            self.start = 0;
        }
        let bytes = Arc::make_mut(&mut self.bytes);
        let old = bytes.len();
        if bytes.capacity() < old + count * row_bytes {
            bytes.reserve_exact((count + len / 8 + 9) * row_bytes);
        }
        bytes.resize(old + count * row_bytes, 0);
        &mut bytes[old..]
    }

    pub fn drop_front(&mut self, count: usize) {
        debug_assert!(count <= self.len());
        self.start += count;
    }

    pub fn truncate(&mut self, len: usize) {
        let keep = (self.start + len) * self.row_bytes;
        if keep < self.bytes.len() {
            if let Some(bytes) = Arc::get_mut(&mut self.bytes) {
                bytes.truncate(keep);
            } else {
                self.bytes = Arc::new(self.bytes[self.start * self.row_bytes..keep].to_vec());
                self.start = 0;
            }
        }
    }

    /// Address and capacity, for counting shared rows once.
    pub fn held(&self) -> (usize, usize) {
        (Arc::as_ptr(&self.bytes).addr(), self.bytes.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, Metadata};

    #[test]
    fn plain_rows_slide_and_share_until_written() {
        let mut rows = PlainRows::new(Dtype::F32, 4);
        for i in 0..4000usize {
            rows.extend(1).fill(i as u8);
            if rows.len() > 5 {
                rows.drop_front(1);
            }
        }
        let before = rows.rows(0, rows.len()).to_vec();
        let mut copy = rows.clone();
        assert_eq!(copy.held().0, rows.held().0);
        copy.extend(2).fill(9);
        assert_ne!(copy.held().0, rows.held().0);
        assert_eq!(rows.rows(0, rows.len()), before);
        assert_eq!(copy.rows(0, 5), before);
        copy.truncate(3);
        assert_eq!(copy.rows(0, 3), &before[..48]);
        assert!(rows.held().1 < 32 * 16, "a sliding window stays small");
    }

    #[test]
    fn pages_are_copied_when_a_shared_one_is_written() {
        let layout = RowLayout::new(Format::Int2, 64, 64, Metadata::E4m3, true).unwrap();
        let mut rows = PackedRows::default();
        for i in 0..200 {
            let (index, page) = rows.next_row(&layout);
            page.row_mut(&layout, index).0.fill(i as u8);
        }
        let mut copy = rows.clone();
        let (index, page) = copy.next_row(&layout);
        page.row_mut(&layout, index).0.fill(77);
        assert!(rows.shares_page(&copy, 0) && !rows.shares_page(&copy, 1));
        assert_eq!(rows.page(1).codes(&layout)[72 * 16], 0);
        assert_eq!(copy.page(1).codes(&layout)[72 * 16], 77);
        copy.truncate(128, 0);
        assert_eq!((copy.len(), rows.len()), (128, 200));
    }
}

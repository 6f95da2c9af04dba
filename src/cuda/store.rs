//! One attention layer's store on a GPU: sinks | packed past | window, as `layer.rs` has it on the CPU, and the same rows in each.
//!
//! What it is: which kernels run on which rows, in `append.rs` (with `room.rs` and `queries.rs`), `attend.rs` (with `launches.rs`), `batch.rs`, `decode.rs`, `noise.rs`, `entering.rs` (a token that comes with its attention) and `fixed.rs` (steps that are replayed); here what is held. Packed rows lie in
//! reference-counted pages (`memory.rs`), found by the device through a table; a shared page is copied when it is written. Sinks lie in an
//! array, the window in a ring, `[batch, kv heads, rows, D]` each. The host knows every length, so nothing waits for the device; the device
//! has them too, written by the launches themselves (`poke`). What it is not: an owner of memory or streams, which are torch's, nor fit for
//! two streams at once: whoever changes streams orders them.

mod append;
mod attend;
mod batch;
mod decode;
mod entering;
mod fixed;
mod launches;
mod noise;
mod queries;
mod room;
mod rows;

use std::sync::{Arc, Mutex};

pub use attend::{AttendCall, DeviceMask};

use self::attend::ONE_LAUNCH;
use self::entering::Entering;
use self::fixed::{Reserved, Steps};
use self::queries::Seen;
use super::constants::{CodecConstants, SpanTable};
use super::device::Device;
use super::instance::Compiler;
use super::kernels::Kernels;
use super::launch::Stream;
use super::memory::{Block, Memory, Page, PagePool};
use super::pages::{Side, expect_supported, page_bytes};
use super::params::{CopyParams, TransformParams};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::{LayerSpec, NonFinite, Regions};
use crate::tensor::Dtype;
use crate::transform::SPAN;

/// A tensor `[batch, heads, tokens, channels]` on the device; strides in elements.
#[derive(Debug, Clone, Copy)]
pub struct DeviceTensor {
    pub address: u64,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub dtype: Dtype,
}

/// What does not change, shared by clones.
struct Shared {
    spec: LayerSpec,
    kernels: Kernels,
    memory: Arc<dyn Memory>,
    /// Of a call of attention, which takes its queries in turns where they need more.
    workspace_bytes: usize,
    constants: [CodecConstants; 2],
}

impl Shared {
    fn codec(&self, side: Side) -> &Codec {
        match side {
            Side::Keys => &self.spec.keys,
            Side::Values => &self.spec.values,
        }
    }

    fn row_bytes(&self, side: Side) -> usize {
        self.codec(side).layout.head_dim * self.spec.dtype.size()
    }
}

/// See the head of this file.
pub struct CudaLayer {
    shared: Arc<Shared>,
    regions: Regions,
    /// Tokens of padding in front of each sequence; empty: none anywhere.
    padding: Vec<usize>,
    /// Blocks whose statistics are fixed.
    blocks: usize,
    /// None before the first append.
    held: Option<Held>,
    steps: Steps,
    one_launch: Option<bool>,
    entering: Mutex<Entering>,
}

/// What a batch has in device memory.
struct Held {
    batch: usize,
    /// See [`State`].
    state: Block,
    sides: [SideRows; 2],
    /// Pages that a sequence's row of the tables has room for.
    table_pages: usize,
    /// Rows that the rings have room for, and where the window begins in them.
    ring_rows: usize,
    ring_first: usize,
    /// Blocks that the statistics have room for.
    block_room: usize,
    spans: Option<Arc<SpanTable>>,
    /// None before the first queries.
    queries: Option<Seen>,
    /// None in a layer that grows as it needs.
    reserved: Option<Reserved>,
}

/// One stream of a batch.
struct SideRows {
    pool: Arc<PagePool>,
    /// `[batch × heads]`
    pages: Vec<Vec<Arc<Page>>>,
    /// u64 `[batch, heads, table_pages]`
    table: Option<Block>,
    sinks: Option<Block>,
    ring: Option<Block>,
    /// Shift and scale, f32 `[batch, heads, block_room, D]`.
    statistics: Option<[Block; 2]>,
}

/// Places in the block of numbers that kernels read.
struct State;

impl State {
    /// i32: packed rows, sinks, window rows, where the window begins in the rings.
    const LENGTHS: u64 = 0;
    // Of a step that is replayed, i32 from 16 on: rows that leave the window with it, and the block that is complete with it, or −1.
    /// i32: rows that could not be encoded.
    const REFUSED: u64 = 24;
    /// i32: replayed steps for which there was no room.
    const OVERFLOW: u64 = 28;
    /// i32 `[batch]`: position of the first packed row. Behind it, from a multiple of 8 bytes on, tokens of padding; then, likewise, `[batch × heads + 1]`
    /// zeros that the blocks of a launch count themselves by.
    const ORIGINS: u64 = 32;

    fn paddings(batch: usize) -> u64 {
        Self::ORIGINS + 8 * batch.div_ceil(2) as u64
    }

    fn arrivals(batch: usize) -> u64 {
        Self::paddings(batch) + 8 * batch.div_ceil(2) as u64
    }

    fn bytes(batch: usize, heads: usize) -> usize {
        Self::arrivals(batch) as usize + 4 * (batch * heads + 1)
    }
}

impl Held {
    fn side(&self, side: Side) -> &SideRows {
        &self.sides[side as usize]
    }

    fn lengths(&self) -> u64 {
        self.state.address() + State::LENGTHS
    }

    fn origins(&self) -> u64 {
        self.state.address() + State::ORIGINS
    }

    fn paddings(&self) -> u64 {
        self.state.address() + State::paddings(self.batch)
    }

    fn arrivals(&self) -> u64 {
        self.state.address() + State::arrivals(self.batch)
    }
}

fn address(block: Option<&Block>) -> u64 {
    block.map_or(0, Block::address)
}

/// Two i32 as the word that they are in memory.
fn pair(first: i32, second: i32) -> u64 {
    u64::from(first as u32) | u64::from(second as u32) << 32
}

/// i32 from an address on, as words; the address is a multiple of 8.
fn pairs(address: u64, numbers: &[i32]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let word = |chunk: &[i32]| pair(chunk[0], chunk.get(1).copied().unwrap_or(0));
    numbers.chunks(2).enumerate().map(move |(index, chunk)| (address + 8 * index as u64, word(chunk)))
}

impl CudaLayer {
    /// Compiles or finds all kernels of the store and uploads the codecs' parameters; waits for that.
    ///
    /// # Safety
    /// `stream` is a live one of the device, and `memory` lends memory of it.
    pub unsafe fn new(
        spec: LayerSpec,
        device: &'static Device,
        compiler: Compiler,
        memory: Arc<dyn Memory>,
        workspace_bytes: usize,
        stream: Stream,
    ) -> Result<Self> {
        let spec = spec.validate()?;
        if spec.nonfinite == NonFinite::Raise {
            let reason = "finding out would wait for the device; \"propagate\" keeps such rows and counts them";
            return Err(Error::Unsupported { name: "nonfinite \"raise\" on a GPU".into(), reason: reason.into() });
        }
        if spec.values.is_raw() && !spec.keys.noise.is_empty() {
            let reason =
                "noise is taken off the scores of attention on packed rows; drop it from the plan, or pack the values";
            return Err(Error::Unsupported {
                name: "keys with noise beside raw values on a GPU".into(),
                reason: reason.into(),
            });
        }
        expect_supported(Side::Keys, &spec.keys)?;
        expect_supported(Side::Values, &spec.values)?;
        let heads = spec.num_key_value_heads;
        let kernels = Kernels::new(device, compiler, &spec)?;
        // SAFETY: the caller's promise.
        let constants = unsafe {
            [
                CodecConstants::new(&spec.keys, heads, device, &*memory, stream)?,
                CodecConstants::new(&spec.values, heads, device, &*memory, stream)?,
            ]
        };
        let shared = Arc::new(Shared { spec, kernels, memory, workspace_bytes, constants });
        Ok(Self {
            shared,
            regions: Regions::default(),
            padding: Vec::new(),
            blocks: 0,
            held: None,
            steps: Steps::Eager,
            one_launch: *ONE_LAUNCH,
            entering: Mutex::default(),
        })
    }

    pub fn spec(&self) -> &LayerSpec {
        &self.shared.spec
    }

    pub fn regions(&self) -> Regions {
        self.regions
    }

    pub fn batch_size(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.batch)
    }

    /// As `Layer::set_padding`.
    pub fn set_padding(&mut self, padding: Vec<usize>) -> Result<()> {
        if self.regions.total() > 0 {
            return Err(Error::state("set_padding", "a layer without tokens", format!("{}", self.regions.total())));
        }
        self.held = None;
        self.padding = padding;
        Ok(())
    }

    fn padding(&self, batch: usize) -> usize {
        self.padding.get(batch).copied().unwrap_or(0)
    }

    /// Forgets the tokens from `length` on, as `Layer::crop`.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn crop(&mut self, length: usize, stream: Stream) -> Result<()> {
        self.expect_eager("crop")?;
        if length > self.regions.total() {
            return Err(Error::value("length", format!("at most {}", self.regions.total()), length));
        }
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        self.forget_ahead();
        let regions = self.regions.of_first(length);
        if let Some(held) = &mut self.held {
            for side in &mut held.sides {
                side.pages.iter_mut().for_each(|pages| pages.truncate(regions.packed.div_ceil(PAGE_ROWS)));
            }
            // The tables know pages that are reserved behind those that the crop gives back.
            held.reserved = None;
            // SAFETY: the caller's promise.
            unsafe { self.shared.kernels.poke(&length_words(held.lengths(), regions, held.ring_first), stream) }?;
        }
        if let Some(complete) = (regions.packed + regions.window).checked_div(self.block_rows()) {
            self.blocks = self.blocks.min(complete).max(regions.packed.div_ceil(self.block_rows()));
        }
        self.regions = regions;
        Ok(())
    }

    /// Nobody has arrived.
    ///
    /// # Safety
    /// As [`Self::append`].
    unsafe fn clear_arrivals(&self, held: &Held, stream: Stream) -> Result<()> {
        let bytes = 4 * (held.batch * self.spec().num_key_value_heads + 1);
        // SAFETY: the end of the state; the caller's promise for the stream.
        unsafe { self.shared.kernels.device().fill(held.arrivals(), 0, bytes, stream) }
    }

    /// Everything in [`State`] but who has arrived.
    fn state_words(&self, held: &Held, regions: Regions) -> Vec<(u64, u64)> {
        let paddings: Vec<i32> = (0..held.batch).map(|batch| self.padding(batch) as i32).collect();
        let origins: Vec<i32> = paddings.iter().map(|padding| self.shared.spec.sinks as i32 - padding).collect();
        let refused = (held.state.address() + State::REFUSED, 0);
        let arrays = pairs(held.origins(), &origins).chain(pairs(held.paddings(), &paddings));
        length_words(held.lengths(), regions, held.ring_first).into_iter().chain([refused]).chain(arrays).collect()
    }

    pub fn reset(&mut self) -> Result<()> {
        self.expect_eager("reset")?;
        self.held = None;
        self.forget_ahead();
        self.regions = Regions::default();
        self.padding.clear();
        self.blocks = 0;
        Ok(())
    }

    /// Bytes of device memory that are held: pages with their pool's free ones, sinks, ring, tables, statistics. Clones count what they share too.
    pub fn nbytes(&self) -> usize {
        let Some(held) = &self.held else { return 0 };
        let side = |side: &SideRows| {
            let blocks = [&side.table, &side.sinks, &side.ring].into_iter().flatten();
            let statistics = side.statistics.iter().flatten();
            side.pool.bytes() + blocks.chain(statistics).map(Block::bytes).sum::<usize>()
        };
        let queries = held.queries.as_ref().map_or(0, |seen| seen.squares.bytes() + seen.factors.bytes());
        held.state.bytes() + queries + held.sides.iter().map(side).sum::<usize>()
    }

    /// `nbytes` in bits over the numbers that the tokens have; 0 before the first token.
    pub fn bits_per_element(&self) -> f64 {
        let width = self.spec().keys.layout.head_dim + self.spec().values.layout.head_dim;
        let elements = self.batch_size() * self.spec().num_key_value_heads * self.regions.total() * width;
        if elements == 0 { 0.0 } else { self.nbytes() as f64 * 8.0 / elements as f64 }
    }

    /// Rows that were not finite, counted once for keys and once for values. Waits for the stream.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn nonfinite_rows(&self, stream: Stream) -> Result<usize> {
        let Some(held) = &self.held else { return Ok(0) };
        // SAFETY: the caller's promise.
        unsafe {
            self.settle(stream)?;
            self.expect_in_step(held, stream)?;
        }
        let mut count = [0i32];
        // SAFETY: one number of the state; the caller's promise for the stream.
        unsafe { self.shared.kernels.device().read(&mut count, held.state.address() + State::REFUSED, stream) }?;
        Ok(count[0].max(0) as usize)
    }

    /// Rows that the window has at most behind an append: its own, and those that wait for the rest of their block.
    fn most_window(&self) -> usize {
        self.spec().window.max(self.block_rows().saturating_sub(1))
    }

    /// Rows that share statistics, or 0.
    fn block_rows(&self) -> usize {
        self.spec().keys.block_rows().max(self.spec().values.block_rows())
    }

    /// What a codec does, with what this batch has of it.
    fn transform(&self, held: &Held, side: Side) -> TransformParams {
        let mut transform = self.shared.constants[side as usize].transform;
        if let Some([shift, scale]) = &held.side(side).statistics {
            (transform.shift, transform.scale) = (shift.address(), scale.address());
            transform.pages_per_block = (self.shared.codec(side).block_rows() / PAGE_ROWS) as i32;
            transform.block_count = held.block_room as i32;
        }
        if transform.shift_sine != 0
            && let Some(spans) = &held.spans
        {
            (transform.spans, transform.first_span) = (spans.block.address(), spans.first);
        }
        transform
    }

    /// Positions of the first packed row and of the last of `packed`, in any sequence; beyond, to the end of a span.
    fn positions(&self, packed: usize) -> [i64; 2] {
        let sinks = self.spec().sinks as i64;
        let paddings = || self.padding.iter().map(|padding| *padding as i64);
        let (most, least) = (paddings().max().unwrap_or(0), paddings().min().unwrap_or(0));
        [sinks - most, sinks - least + packed as i64 + SPAN as i64]
    }

    /// Refuses rows in another dtype, or whose channels do not lie together.
    fn expect_rows(&self, name: &str, rows: &DeviceTensor) -> Result<()> {
        if rows.dtype != self.spec().dtype {
            return Err(Error::dtype(name, self.spec().dtype.name(), rows.dtype.name()));
        }
        if rows.strides[3] != 1 && rows.shape[3] > 1 {
            return Err(Error::value(
                name,
                "channels that lie together (call .contiguous())",
                format!("stride {}", rows.strides[3]),
            ));
        }
        Ok(())
    }
}

/// What kernels read at `lengths`.
fn length_words(lengths: u64, regions: Regions, ring_first: usize) -> [(u64, u64); 2] {
    let Regions { sinks, packed, window } = regions;
    let words = [pair(packed as i32, sinks as i32), pair(window as i32, ring_first as i32)];
    [(lengths, words[0]), (lengths + 8, words[1])]
}

/// `count` rows from the front of compact arrays of `room` rows a head, in both.
fn whole_rows(source: u64, target: u64, heads: usize, room: usize, count: usize, row_bytes: usize) -> CopyParams {
    let (row, head, batch) = (row_bytes as i64, (room * row_bytes) as i64, (heads * room * row_bytes) as i64);
    CopyParams {
        source,
        target,
        source_batch_stride: batch,
        source_head_stride: head,
        source_row_stride: row,
        target_batch_stride: batch,
        target_head_stride: head,
        target_row_stride: row,
        rows: count as i32,
        source_rows: count as i32,
        ..CopyParams::default()
    }
}

fn new_pool(shared: &Shared, side: Side) -> Arc<PagePool> {
    PagePool::new(page_bytes(shared.codec(side)), Arc::clone(&shared.memory))
}

//! The kernels that one layer launches, loaded once: those of its store when it is made, those of attention by the number of queries.
//!
//! Warming up (`python/skvq/warmup.py`) compiles the same instances.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::Device;
use super::instance::{Compiler, Instance};
use super::launch::{Function, Launch, Parameters, Stream};
use super::pages::{Side, element, layout_expression};
use super::params::{CopyParams, FewWords, ManyWords};
use crate::error::Result;
use crate::format::RowLayout;
use crate::layer::LayerSpec;
use crate::tensor::Dtype;
use crate::transform::Source;

/// Queries of one kv head that a block of attention takes at a time.
pub const QUERY_TILE: usize = 8;
pub const ATTEND_WARPS: usize = 4;
pub const ATTEND_THREADS: usize = 32 * ATTEND_WARPS;
/// Of `kernels/attend_many.cuh`; rows that a block unpacks at a time, the widest head, and the widths of keys and values together up to which there
/// is room for two times these rows.
const MANY_THREADS: usize = 256;
const MANY_ROWS: usize = 64;
const MANY_WIDTH: usize = 192;
const TWO_BUFFERS: usize = 256;
/// Of `kernels/reach.cuh`.
pub const REACH_THREADS: usize = 128;
pub const SHOWS_THREADS: usize = 512;
/// Of `kernels/attend_rows.cuh` and `kernels/unpack.cuh`; the widest head of wide blocks of the former, and bytes of the latter's matrix.
const ROWS_THREADS: usize = 128;
const ROWS_WIDTH: usize = 128;
const UNPACK_THREADS: usize = 256;
const UNPACK_BYTES: usize = 64 * 1024;
const COPY_WARPS: usize = 4;
/// Words that `copy_rows` has instances for, the widest first.
const COPY_WORDS: [(usize, &str); 3] = [(16, "skvq::U32x4"), (4, "skvq::u32"), (2, "skvq::u16")];

/// What the kernels of one layer are made for.
pub struct Kernels {
    device: &'static Device,
    compiler: Compiler,
    names: Names,
    /// None for raw rows.
    encode: [Option<Arc<Function>>; 2],
    /// None where one stream is raw.
    append_row: Option<Arc<Function>>,
    copy: [Arc<Function>; 3],
    clear: Arc<Function>,
    poke: [Arc<Function>; 2],
    statistics: [Option<Arc<Function>>; 2],
    queries: Option<[Arc<Function>; 2]>,
    /// Of shared memory, for many queries; None where they have no kernel of their own.
    many_bytes: Option<usize>,
    head_dims: [usize; 2],
    attention: Mutex<HashMap<(Queries, bool), Arc<AttentionKernels>>>,
    decode: [Kept; 2],
    unpack: [Kept; 2],
    shows: Kept,
}

/// A kernel that is loaded when it is first asked for.
type Kept = Mutex<Option<Arc<Function>>>;

struct Names {
    element: &'static str,
    layouts: [String; 2],
    widths: [String; 2],
    turning: bool,
    /// Keys and values are.
    packed: bool,
    /// Of 16 bits.
    half: bool,
}

/// How a block of attention over packed rows takes its queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queries {
    /// So many tiles in registers, each of whose warps unpacks rows for itself.
    Tiles(usize),
    /// The same with a split for each warp.
    Apart(usize),
    /// One tile, by a launch that folds, attends and unfolds.
    Once,
    /// Rows are unpacked to shared memory for all queries of the block.
    Many,
    /// Rows are unpacked to rows of the model's type, a piece of the past after the other.
    Pieces,
}

/// The kernels of a call of attention.
pub struct AttentionKernels {
    /// Where keys and values are packed.
    pub packed: Option<PackedKernels>,
    pub rows: RowKernels,
    pub merge: Arc<Function>,
}

/// What attends to rows in the model's type.
pub enum RowKernels {
    Few(Arc<Function>),
    /// On tensor cores.
    Many(ManyRows),
}

/// `attend_rows` and what finds out what a mask lets queries see.
pub struct ManyRows {
    pub attend: Arc<Function>,
    pub reach: Arc<Function>,
    pub shape: RowsShape,
    /// Blocks of `attend_rows` that share a multiprocessor.
    pub resident: usize,
}

/// How a block of `attend_rows` is cut, as `RowsShape` of `kernels/attend_rows.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsShape {
    /// Of one kv head.
    pub queries: usize,
    /// That it passes over at a time.
    pub rows: usize,
    pub shared_bytes: usize,
}

impl RowsShape {
    pub const THREADS: usize = ROWS_THREADS;

    pub fn of([keys, values]: [usize; 2]) -> Self {
        let (queries, rows) = if keys.max(values) > ROWS_WIDTH { (64, 32) } else { (128, 64) };
        Self { queries, rows, shared_bytes: (queries + rows) * (2 * keys + 16) + rows * (2 * values + 16) }
    }
}

/// `unpack` of one stream: channels that a block makes, and its shared memory, as `unpack_slice` of `kernels/unpack.cuh`.
pub struct Unpack {
    pub function: Arc<Function>,
    pub slices: usize,
    pub shared_bytes: usize,
}

impl Unpack {
    pub const THREADS: usize = UNPACK_THREADS;
}

/// The most channels, a divisor of the head, of which the matrix fits.
fn unpack_slice(head_dim: usize) -> usize {
    let fits = |slice: &usize| 4 * slice * head_dim <= UNPACK_BYTES && head_dim.is_multiple_of(*slice);
    (16..=head_dim).rev().step_by(16).find(fits).unwrap_or(16)
}

pub struct PackedKernels {
    /// What a mean that turns needs before `attend`: its products, or what the queries of `attend_many` make of it.
    pub turning: Option<Arc<Function>>,
    pub fold_turned: Option<Arc<Function>>,
    /// In one launch with all that is not the merge, or between fold and unfold.
    pub attend: Arc<Function>,
    pub fold_and_unfold: Option<[Arc<Function>; 2]>,
    /// Of a block of `attend`, and the bytes of shared memory that it asks for.
    pub threads: usize,
    pub shared_bytes: usize,
    /// Its blocks that share a multiprocessor.
    pub resident: usize,
}

impl Kernels {
    pub fn new(device: &'static Device, compiler: Compiler, spec: &LayerSpec) -> Result<Self> {
        let codecs = [&spec.keys, &spec.values];
        let names = Names {
            element: element(spec.dtype),
            layouts: Side::BOTH.map(|side| layout_expression(side, codecs[side as usize])),
            widths: codecs.map(|codec| codec.layout.head_dim.to_string()),
            turning: matches!(spec.keys.source, Source::Turning(_)),
            packed: codecs.iter().all(|codec| !codec.is_raw()),
            half: spec.dtype != Dtype::F32,
        };
        let load = |file: &str, kernel: &str, arguments: &[&str]| {
            device.function(&instance(file, kernel, arguments), &compiler)
        };
        let encode = |side: Side| {
            let arguments = [names.element, names.layouts[side as usize].as_str()];
            (!codecs[side as usize].is_raw()).then(|| load("encode.cuh", "encode", &arguments)).transpose()
        };
        let append_row = || {
            let [keys, values] = &names.layouts;
            load("append.cuh", "append_row", &[names.element, keys, values])
        };
        let statistics = |side: Side| {
            let takes = codecs[side as usize].block_rows() > 0;
            let arguments = [names.element, names.widths[side as usize].as_str()];
            takes.then(|| load("statistics.cuh", "block_statistics", &arguments)).transpose()
        };
        let queries = (spec.keys.query_exponent() > 0.0).then(|| {
            let width = names.widths[0].as_str();
            let squares = load("queries.cuh", "query_squares", &[names.element, width])?;
            Ok([squares, load("queries.cuh", "query_factors", &[width])?])
        });
        let copy = |index: usize| load("rows.cuh", "copy_rows", &[COPY_WORDS[index].1]);
        let poke = |words: &str| load("rows.cuh", "poke", &[words]);
        Ok(Self {
            encode: [encode(Side::Keys)?, encode(Side::Values)?],
            append_row: names.packed.then(append_row).transpose()?,
            copy: [copy(0)?, copy(1)?, copy(2)?],
            clear: load("rows.cuh", "clear_rows", &["skvq::u16"])?,
            poke: [poke("skvq::FewWords")?, poke("skvq::ManyWords")?],
            statistics: [statistics(Side::Keys)?, statistics(Side::Values)?],
            queries: queries.transpose()?,
            many_bytes: names.packed.then(|| many_bytes(&codecs.map(|codec| &codec.layout))).flatten(),
            head_dims: codecs.map(|codec| codec.layout.head_dim),
            attention: Mutex::default(),
            decode: Default::default(),
            unpack: Default::default(),
            shows: Kept::default(),
            device,
            compiler,
            names,
        })
    }

    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Of the device, at least one.
    pub fn multiprocessors(&self) -> usize {
        self.device.properties().multiprocessors.max(1) as usize
    }

    pub fn encode(&self, side: Side) -> Option<&Function> {
        self.encode[side as usize].as_deref()
    }

    /// The kernel of one token, of keys and values.
    pub fn append_row(&self) -> Option<&Function> {
        self.append_row.as_deref()
    }

    pub fn statistics(&self, side: Side) -> Option<&Function> {
        self.statistics[side as usize].as_deref()
    }

    /// `query_squares` and `query_factors`, where queries have a say.
    pub fn queries(&self) -> Option<[&Function; 2]> {
        self.queries.as_ref().map(|[squares, factors]| [&**squares, &**factors])
    }

    pub fn decode(&self, side: Side) -> Result<Arc<Function>> {
        let arguments = [self.names.element, &self.names.layouts[side as usize]];
        self.keep(&self.decode[side as usize], "decode.cuh", "decode", &arguments)
    }

    /// `turned`: a mean of the keys that turns does so in the launch of packed rows.
    pub fn attention(&self, queries: Queries, turned: bool) -> Result<Arc<AttentionKernels>> {
        let mut loaded = self.attention.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = loaded.get(&(queries, turned)) {
            return Ok(Arc::clone(kernels));
        }
        let Names { element, layouts: [keys, values], widths: [key_width, value_width], .. } = &self.names;
        let packed = || -> Result<Option<PackedKernels>> {
            let apart = self.names.turning && !turned;
            let turning = apart.then(|| self.load("turning.cuh", "turning", &[element, key_width])).transpose()?;
            let of_many = turned && queries == Queries::Many;
            let fold_turned =
                of_many.then(|| self.load("turned.cuh", "fold_turned", &[element, key_width])).transpose()?;
            let (attend, threads, shared_bytes) = match queries {
                Queries::Tiles(tiles) | Queries::Apart(tiles) => {
                    let name = if matches!(queries, Queries::Apart(_)) { "attend_apart" } else { "attend" };
                    (self.load("attend.cuh", name, &[keys, values, &tiles.to_string()])?, ATTEND_THREADS, 0)
                }
                Queries::Once => {
                    (self.load("attend_once.cuh", "attend_once", &[element, keys, values])?, ATTEND_THREADS, 0)
                }
                Queries::Many => {
                    let function = self.load("attend_many.cuh", "attend_many", &[keys, values])?;
                    (function, MANY_THREADS, self.many_bytes.unwrap_or(0))
                }
                Queries::Pieces => return Ok(None),
            };
            let apart = || -> Result<_> {
                let fold = self.load("attend.cuh", "fold", &[element, keys])?;
                Ok([fold, self.load("merge.cuh", "unfold", &[value_width])?])
            };
            let fold_and_unfold = (queries != Queries::Once).then(apart).transpose()?;
            let resident = attend.resident_blocks(threads, shared_bytes)?;
            Ok(Some(PackedKernels { turning, fold_turned, attend, fold_and_unfold, threads, shared_bytes, resident }))
        };
        let rows = || -> Result<RowKernels> {
            let arguments = [element, key_width.as_str(), value_width.as_str()];
            if !(self.names.half && matches!(queries, Queries::Many | Queries::Pieces)) {
                return Ok(RowKernels::Few(self.load("plain.cuh", "plain", &arguments)?));
            }
            let attend = self.load("attend_rows.cuh", "attend_rows", &arguments)?;
            let reach = self.load("reach.cuh", "mask_reach", &["skvq::i32"])?;
            let shape = RowsShape::of(self.head_dims);
            let resident = attend.resident_blocks(RowsShape::THREADS, shape.shared_bytes)?;
            Ok(RowKernels::Many(ManyRows { attend, reach, shape, resident }))
        };
        let kernels = Arc::new(AttentionKernels {
            packed: if self.names.packed { packed()? } else { None },
            rows: rows()?,
            merge: self.load("merge.cuh", "merge", &[element, value_width])?,
        });
        loaded.insert((queries, turned), Arc::clone(&kernels));
        Ok(kernels)
    }

    /// What unpacks one stream for `attend_rows`.
    pub fn unpack(&self, side: Side) -> Result<Unpack> {
        let arguments = [self.names.element, &self.names.layouts[side as usize]];
        let function = self.keep(&self.unpack[side as usize], "unpack.cuh", "unpack", &arguments)?;
        let head_dim = self.head_dims[side as usize];
        let slice = unpack_slice(head_dim);
        Ok(Unpack { function, slices: head_dim / slice, shared_bytes: 4 * slice * head_dim })
    }

    /// What finds out whether a mask hides packed rows from few queries.
    pub fn mask_shows(&self) -> Result<Arc<Function>> {
        self.keep(&self.shows, "reach.cuh", "mask_shows", &["skvq::i32"])
    }

    /// What folds queries for packed keys, by a launch of its own.
    pub fn fold(&self) -> Result<Arc<Function>> {
        self.load("attend.cuh", "fold", &[self.names.element, &self.names.layouts[Side::Keys as usize]])
    }

    /// Whether many queries have a kernel of their own; keys and values are packed then.
    pub fn takes_many(&self) -> bool {
        self.many_bytes.is_some()
    }

    /// The kernel that counts one more token in a step that is replayed.
    pub fn advance(&self) -> Result<Arc<Function>> {
        self.load("rows.cuh", "advance", &["skvq::i32"])
    }

    /// The kernel of a token that may complete a block of statistics, in a step that is replayed.
    pub fn append_block(&self) -> Result<Arc<Function>> {
        let Names { element, layouts: [keys, values], .. } = &self.names;
        self.load("append_block.cuh", "append_block", &[element, keys, values])
    }

    /// The kernel behind an estimate of the keys' noise.
    pub fn scale_squares(&self) -> Result<Arc<Function>> {
        self.load("noise.cuh", "scale_squares", &[&self.names.layouts[Side::Keys as usize]])
    }

    fn keep(&self, kept: &Kept, file: &str, kernel: &str, arguments: &[&str]) -> Result<Arc<Function>> {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = &*kept {
            return Ok(Arc::clone(function));
        }
        let function = self.load(file, kernel, arguments)?;
        *kept = Some(Arc::clone(&function));
        Ok(function)
    }

    fn load(&self, file: &str, kernel: &str, arguments: &[&str]) -> Result<Arc<Function>> {
        self.device.function(&instance(file, kernel, arguments), &self.compiler)
    }

    /// Rows from place to place, by the widest word that fits. `parameters.row_words` counts bytes here.
    ///
    /// # Safety
    /// As [`Function::launch`].
    pub unsafe fn copy_rows(
        &self,
        parameters: &CopyParams,
        heads: usize,
        batch: usize,
        row_bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let p = parameters;
        let strides = [
            p.source_batch_stride,
            p.source_head_stride,
            p.source_row_stride,
            p.target_batch_stride,
            p.target_head_stride,
            p.target_row_stride,
        ];
        let all =
            strides.iter().fold(p.source | p.target | row_bytes as u64, |all, stride| all | stride.unsigned_abs());
        let fitting = COPY_WORDS.iter().position(|(bytes, _)| all.is_multiple_of(*bytes as u64));
        let index = fitting.unwrap_or(COPY_WORDS.len() - 1);
        let parameters = CopyParams { row_words: (row_bytes / COPY_WORDS[index].0) as i32, ..*parameters };
        // SAFETY: the caller's promise; elements have two bytes or four, so a word of two always fits.
        unsafe { launch_rows(&self.copy[index], &parameters, heads, batch, stream) }
    }

    /// Zeros where padded sequences have no rows; what [`CopyParams`] say of a target, of elements of two bytes or four.
    ///
    /// # Safety
    /// As [`Function::launch`].
    pub unsafe fn clear_rows(
        &self,
        parameters: &CopyParams,
        heads: usize,
        batch: usize,
        row_bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let parameters = CopyParams { row_words: (row_bytes / 2) as i32, ..*parameters };
        // SAFETY: the caller's promise.
        unsafe { launch_rows(&self.clear, &parameters, heads, batch, stream) }
    }

    /// Writes words of 8 bytes, (address, value) each, in any order.
    ///
    /// # Safety
    /// As [`Function::launch`], for all the addresses.
    pub unsafe fn poke(&self, words: &[(u64, u64)], stream: Stream) -> Result<()> {
        const FEW: usize = 4;
        const MANY: usize = 250;
        if words.len() <= FEW {
            let mut few = FewWords { count: words.len() as i32, ..FewWords::default() };
            words.iter().enumerate().for_each(|(i, word)| (few.targets[i], few.values[i]) = *word);
            // SAFETY: the caller's promise.
            return unsafe { launch(&self.poke[0], [u32::from(!words.is_empty()), 1, 1], 256, &few, stream) };
        }
        for words in words.chunks(MANY) {
            let mut many = ManyWords { count: words.len() as i32, ..ManyWords::default() };
            words.iter().enumerate().for_each(|(i, word)| (many.targets[i], many.values[i]) = *word);
            // SAFETY: as above.
            unsafe { launch(&self.poke[1], [1, 1, 1], 256, &many, stream) }?;
        }
        Ok(())
    }
}

/// Levels in f16 and numbers in f32 of the rows of both streams, as `many_buffer_bytes` of `kernels/attend_many.cuh`.
/// None where a head is too wide for its registers.
fn many_bytes(layouts: &[&RowLayout; 2]) -> Option<usize> {
    let numbers = |rows: &RowLayout| rows.groups() * if rows.symmetric { 1 } else { 2 };
    let row: usize = layouts.iter().map(|rows| 2 * rows.head_dim + 4 * numbers(rows)).sum();
    let width: usize = layouts.iter().map(|rows| rows.head_dim).sum();
    let buffers = if width <= TWO_BUFFERS { 2 } else { 1 };
    layouts.iter().all(|rows| rows.head_dim <= MANY_WIDTH).then_some(buffers * MANY_ROWS * row)
}

fn instance(file: &str, kernel: &str, arguments: &[&str]) -> Instance {
    Instance {
        file: file.into(),
        kernel: format!("skvq::{kernel}"),
        arguments: arguments.iter().map(ToString::to_string).collect(),
    }
}

/// A launch of a kernel of `rows.cuh`: a warp for each row.
unsafe fn launch_rows(
    function: &Function,
    parameters: &CopyParams,
    heads: usize,
    batch: usize,
    stream: Stream,
) -> Result<()> {
    let grid = [(parameters.rows.max(0) as usize).div_ceil(COPY_WARPS) as u32, heads as u32, batch as u32];
    // SAFETY: the caller's promise.
    unsafe { launch(function, grid, 32 * COPY_WARPS, parameters, stream) }
}

/// A launch without dynamic shared memory, on one row of threads.
///
/// # Safety
/// As [`Function::launch`].
pub unsafe fn launch<P: Parameters>(
    function: &Function,
    grid: [u32; 3],
    threads: usize,
    parameters: &P,
    stream: Stream,
) -> Result<()> {
    let launch = Launch { grid, block: [threads as u32, 1, 1], shared_bytes: 0, stream, early: false };
    // SAFETY: the caller's promise.
    unsafe { function.launch(&launch, parameters) }
}

//! Attention of some queries over the three regions, launch by launch as `kernels/PAGES.md` lists them, in a workspace that it borrows for its launches.
//!
//! The packed past is cut into splits of whole pages, enough to fill the device; with block statistics a split stays inside a block of both
//! streams. Sinks and window make states of their own, and one launch merges all. Lengths are read on the device, but which launches and
//! how many splits there are follows the host's.

use std::cell::Cell;
use std::sync::LazyLock;

use super::super::kernels::{ATTEND_WARPS, QUERY_TILE, Queries};
use super::super::launch::Stream;
use super::super::memory::ALIGNMENT;
use super::super::pages::Side;
use super::super::params::MaskParams;
use super::launches::Launches;
use super::rows::RowsCut;
use super::{CudaLayer, DeviceTensor, Held};
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::Regions;
use crate::tensor::{Dtype, MaskKind};

/// Numbers before the output's in a state, and before the groups' in a query's extras.
const STATE_HEAD: usize = 4;
pub(super) const EXTRAS_HEAD: usize = 4;
const MOST_TILES: usize = 2;
/// What a launch's grid may have along an axis that is not its first.
const MOST_TILES_OF_LAUNCH: usize = 65_535;
/// Of heads whose mean turns in the launch of all, as `turns_inside` of `kernels/turned.cuh`.
const TURNED_WIDTH: usize = 128;
/// Queries of a kv head from which the packed past goes to `kernels/attend_many.cuh`, whose blocks have 128 of them.
pub(super) const MANY_QUERIES: usize = 64;
const MANY_TILES: usize = 16;
/// Rows in the model's type that a block of threads takes at least: up to so many are on their way at once.
const PLAIN_ROWS: usize = 32;
/// Splits that become one state, at most: where each has a transform to undo, and where all share one. Where there are few, fewer of them one after the other.
const SPLITS_PER_STATE: usize = 4;
const STATIC_SPLITS_PER_STATE: usize = 8;
/// Blocks of threads for each multiprocessor, where no kernel says how many fit at once.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;
/// Blocks that pass over so many pages and more make way for others, up to so many turns of the device: warps do not come to their end at once, and
/// the last ones have a multiprocessor to themselves.
const LONG_SPLIT: usize = 32;
const MOST_TURNS: usize = 4;
/// Pages that a block of a launch for all takes at least where it shares its multiprocessor: what it does before and after them has its price.
const FEWEST_PAGES: usize = 8;
/// Slices of a block that merges, queries of a kv head sharing them, and how often a slice waits for states at most where that is no launch of its own:
/// more of them are joined sooner by a block for each query.
const MERGE_SLICES: usize = 8;
const MOST_MERGE_TURNS: usize = 5;
/// Pages of a split that is short enough for one warp.
const SHORT_SPLIT: usize = 4;

/// `SKVQ_ONE_LAUNCH`, `0` or `1`: what new layers begin with, as by [`CudaLayer::set_one_launch`].
pub(super) static ONE_LAUNCH: LazyLock<Option<bool>> =
    LazyLock::new(|| match std::env::var("SKVQ_ONE_LAUNCH").as_deref() {
        Ok("0") => Some(false),
        Ok("1") => Some(true),
        _ => None,
    });

/// A mask `[batch | 1, heads | 1, queries | 1, tokens]`; strides in elements, 0 where an axis is 1.
#[derive(Debug, Clone, Copy)]
pub struct DeviceMask {
    pub address: u64,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub kind: MaskKind,
}

/// One call of attention.
#[derive(Debug, Clone, Copy)]
pub struct AttendCall {
    /// `[batch, query heads, L, Dk]` and `[batch, query heads, L, Dv]`, in the layer's dtype.
    pub query: DeviceTensor,
    pub output: DeviceTensor,
    pub scale: f32,
    pub mask: Option<DeviceMask>,
    /// Of the L queries, which are of the last L tokens, none sees tokens behind its own.
    pub causal: bool,
    /// 0: none.
    pub softcap: f32,
    /// f32 `[query heads]`, or 0.
    pub sink_logits: u64,
    /// Keys and values of the last append; the store is then read only for the tokens before them.
    pub fresh: Option<[DeviceTensor; 2]>,
}

impl AttendCall {
    pub(super) fn fresh_rows(&self) -> usize {
        self.fresh.map_or(0, |[keys, _]| keys.shape[2])
    }

    /// The same for `count` of the queries' tokens, from `first` on.
    fn part(&self, first: usize, count: usize) -> Self {
        let mut part = *self;
        for tensor in [&mut part.query, &mut part.output] {
            let skipped = tensor.strides[2] * (first * tensor.dtype.size()) as i64;
            tensor.address = tensor.address.wrapping_add_signed(skipped);
            tensor.shape[2] = count;
        }
        if let Some(mask) = part.mask.as_mut().filter(|mask| mask.shape[2] > 1) {
            let element = match mask.kind {
                MaskKind::Additive(dtype) => dtype.size(),
                MaskKind::Visible => 1,
            };
            mask.address = mask.address.wrapping_add_signed(mask.strides[2] * (first * element) as i64);
            mask.shape[2] = count;
        }
        part
    }
}

/// How a call is cut, and where its intermediate results lie in the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Rows that are read from the store.
    pub regions: Regions,
    /// Keys and values are packed; otherwise the past is read row by row.
    pub packed: bool,
    pub group: usize,
    pub length: usize,
    pub query_tiles: usize,
    /// Of a block of threads.
    pub tiles: usize,
    /// What its kernels are made for.
    pub queries: Queries,
    /// Queries are folded to bytes (`kernels/bytes.cuh`).
    pub as_bytes: bool,
    /// A mean of the keys that turns does so in the launch of packed rows (`kernels/turned.cuh`), not in one before.
    pub turned: bool,
    pub merge: Merge,
    pub key_blocks: usize,
    pub pages_per_split: usize,
    pub splits: usize,
    /// So many splits have `pages_per_split` pages, those behind them `short_pages`.
    pub long_splits: usize,
    pub short_pages: usize,
    pub splits_per_state: usize,
    /// Splits of the regions that are read row by row, in the order of `kernels/plain.cuh`.
    pub plain: [PlainSplits; 4],
    /// In place of them, where queries are many.
    pub rows: Option<RowsCut>,
    pub plain_states: usize,
    pub state_count: usize,
    pub places: Places,
}

/// Who joins the states of all splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Merge {
    /// The launch that makes them.
    Inside,
    /// A launch behind.
    Behind,
}

/// How the rows of a region are cut.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PlainSplits {
    pub splits: usize,
    pub rows: usize,
}

impl PlainSplits {
    /// At most `wanted` splits of rows, each for a block of threads.
    fn of(rows: usize, wanted: usize) -> Self {
        let each = rows.div_ceil(wanted.max(1)).max(PLAIN_ROWS);
        Self { splits: rows.div_ceil(each), rows: each }
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Places {
    pub folded: usize,
    pub extras: usize,
    pub bias: usize,
    pub packed: usize,
    pub states: usize,
    /// Of what is read, where that is not all that is stored.
    pub lengths: usize,
    /// Keys and values that are decoded for this call, or a piece of them, and squares of the keys' scales.
    pub decoded: [usize; 2],
    pub squares: usize,
    /// What a mask lets queries see.
    pub reach: usize,
    pub bytes: usize,
}

/// Splits of the past for which `others` blocks each fill the device, and its last turn too: one block more than fit costs a whole turn.
pub(super) fn even_splits(others: usize, resident: usize) -> usize {
    let filled = |splits: usize| {
        let blocks = others * splits;
        blocks as f64 / blocks.next_multiple_of(resident) as f64
    };
    let fewest = (resident / others).max(1);
    (fewest..=4 * fewest).find(|splits| filled(*splits) >= 0.95).unwrap_or(resident.div_ceil(others))
}

/// How often a slice of the block that merges a kv head's queries waits for states; so many are on their way at once as `once_merged` of
/// `kernels/attend_once.cuh` says.
fn merge_turns(queries: usize, states: usize, head_dim: usize) -> usize {
    let slices = MERGE_SLICES / queries.next_power_of_two().min(MERGE_SLICES);
    states.div_ceil(slices * (16 / head_dim.div_ceil(64)))
}

/// Turns of the device that splits of a long past take: long ones, then short ones, and how long these are, so that blocks end closer together. By
/// pages for each block that runs at once, from the most on.
const GRADES: [(usize, Grade); 2] = [
    (256, Grade { long_turns: 2.0, short_turns: 2.0, short: 0.25 }),
    (64, Grade { long_turns: 1.0, short_turns: 2.0, short: 0.2 }),
];

#[derive(Debug, Clone, Copy)]
struct Grade {
    long_turns: f64,
    short_turns: f64,
    /// Of a long split.
    short: f64,
}

/// Pages of a long split, how many of those there are, and pages of a short one, where a past is long enough for two lengths.
fn graded_splits(pages: usize, others: usize, resident: usize) -> Option<(usize, usize, usize)> {
    let (_, grade) = GRADES.iter().find(|(least, _)| pages * others >= least * resident)?;
    let at_once = resident as f64 / others as f64;
    let long_splits = (grade.long_turns * at_once).floor().max(1.0);
    let long = (pages as f64 / (long_splits + grade.short * grade.short_turns * at_once)).ceil().max(1.0);
    let short = (long * grade.short).ceil().max(1.0);
    Some((long as usize, long_splits as usize, short as usize))
}

impl CudaLayer {
    fn shape(&self, query_heads: usize, length: usize, fresh: usize) -> Result<Shape> {
        // A step that is replayed has launches for all the rows that there may be, and reads on the device how many there are.
        let stored = self.regions.of_first(self.regions.total() - fresh);
        let (spec, regions) = (self.spec(), self.most_regions().unwrap_or(stored));
        let Regions { sinks, packed, window } = regions;
        let heads = spec.num_key_value_heads;
        if query_heads == 0 || !query_heads.is_multiple_of(heads) || length == 0 {
            let expected = format!("a multiple of {heads} heads and at least one token");
            return Err(Error::value("query", expected, format!("{query_heads} heads and {length} tokens")));
        }
        let group = query_heads / heads;
        let rows = self.cut_rows(group * length, regions, fresh)?;
        let in_pieces = rows.is_some_and(|rows| rows.piece > 0 || packed == 0);
        let is_packed = !in_pieces && Side::BOTH.iter().all(|side| !self.shared.codec(*side).is_raw());
        let wanted = (group * length).div_ceil(QUERY_TILE);
        let takes_many = self.shared.kernels.takes_many() && group * length >= MANY_QUERIES;
        let many = takes_many && packed > 0 && !in_pieces;
        // Each warp of a block of many queries has two tiles; a block may have fewer warps with queries than it has warps.
        let query_tiles = wanted.next_multiple_of(wanted.min(MOST_TILES));
        let tiles = if many { MANY_TILES } else { wanted.min(MOST_TILES) };
        let [keys, values] = &self.shared.constants;
        // A query as two bytes is off by more than rows in f32 may expect; keys of parts have kernels for no other one.
        let is_half = spec.dtype != Dtype::F32;
        let as_bytes = !many && keys.takes_bytes(&spec.keys.layout, tiles, is_half && !values.uneven);
        let (batch, pages) = (self.batch_size(), packed.div_ceil(PAGE_ROWS));
        let multiprocessors = self.shared.kernels.multiprocessors();
        let others = (batch * heads * query_tiles.div_ceil(tiles)).max(1);
        // Each block folds the queries for itself: where that is a product with a matrix, it pays for few blocks only.
        let has_matrix = keys.transform.inverse != 0 || values.transform.inverse != 0;
        let pays = !has_matrix || others * (pages / FEWEST_PAGES).max(1) <= 2 * multiprocessors;
        // Where the mean of the keys turns in that launch it saves another one, and what that would write.
        let (frequencies, width) = (keys.waves.frequencies as usize, spec.keys.layout.head_dim);
        let can_turn = is_half && width <= TURNED_WIDTH && (1..=width / 2).contains(&frequencies);
        let once = self.one_launch.unwrap_or(pays || can_turn) && is_packed && packed > 0 && !many && query_tiles == 1;
        // With statistics of blocks a kernel is chosen by the splits, not the other way round.
        let kind = if once { Queries::Once } else { Queries::Tiles(tiles) };
        let resident = match (many, self.block_rows()) {
            (true, _) => 1,
            (_, 0) if is_packed && packed > 0 => self.resident(kind, once && can_turn)?,
            _ => BLOCKS_PER_MULTIPROCESSOR,
        };
        let at_once = resident * multiprocessors;
        let turns = (pages / even_splits(others, at_once).max(1) / LONG_SPLIT).clamp(1, MOST_TURNS);
        let most_wanted = if once { (multiprocessors / others).max(pages / FEWEST_PAGES).max(1) } else { usize::MAX };
        let wanted_splits = even_splits(others, turns * at_once).min(most_wanted);
        let longest = pages.div_ceil(wanted_splits.max(1)).max(1);
        let block_pages = self.block_rows() / PAGE_ROWS;
        let divides = |pages: &usize| block_pages == 0 || block_pages.is_multiple_of(*pages);
        let pages_per_split = (1..=longest).rev().find(divides).unwrap_or(1);
        let graded = (block_pages == 0 && !many).then(|| graded_splits(pages, others, at_once)).flatten();
        let (pages_per_split, long_splits, short_pages) =
            graded.unwrap_or((pages_per_split, pages.div_ceil(pages_per_split), pages_per_split));
        let short = pages.saturating_sub(long_splits * pages_per_split).div_ceil(short_pages);
        let splits = if is_packed { long_splits + short } else { 0 };
        let apart = !many && pages_per_split <= SHORT_SPLIT && others * splits >= ATTEND_WARPS * at_once;
        let queries = match (many, apart) {
            _ if in_pieces => Queries::Pieces,
            (true, _) => Queries::Many,
            (_, true) => Queries::Apart(tiles),
            _ if once => Queries::Once,
            _ => Queries::Tiles(tiles),
        };
        let turned = can_turn && matches!(queries, Queries::Once | Queries::Many);
        let most_splits = if block_pages == 0 { STATIC_SPLITS_PER_STATE } else { SPLITS_PER_STATE };
        let unfolding = multiprocessors * if values.transform.inverse == 0 { 2 } else { 1 };
        // A launch for all unfolds each split's own.
        let most_splits = if queries == Queries::Once { 1 } else { most_splits };
        let splits_per_state = (batch * heads * query_tiles * splits).div_ceil(unfolding).clamp(1, most_splits);
        let key_blocks = match spec.keys.block_rows() {
            0 => 1,
            _ if in_pieces => 1,
            rows => packed.div_ceil(rows).max(1),
        };
        let plain_others = (batch * heads * query_tiles).max(1);
        let plain_wanted = even_splits(plain_others, BLOCKS_PER_MULTIPROCESSOR * multiprocessors);
        let past = if is_packed { 0 } else { packed };
        let plain = [sinks, window, fresh, past].map(|rows| PlainSplits::of(rows, plain_wanted));
        let plain_states =
            rows.map_or_else(|| plain.iter().map(|region| region.splits).sum::<usize>(), |rows| rows.splits);
        let state_count = plain_states + splits.div_ceil(splits_per_state);
        let turns_to_merge = merge_turns(group * length, state_count, spec.values.layout.head_dim);
        let inside = queries == Queries::Once && turns_to_merge <= MOST_MERGE_TURNS;
        let merge = if inside { Merge::Inside } else { Merge::Behind };
        let mut shape = Shape {
            regions,
            packed: is_packed,
            group,
            length,
            query_tiles,
            tiles,
            queries,
            as_bytes,
            turned,
            merge,
            key_blocks,
            pages_per_split,
            splits,
            long_splits,
            short_pages,
            splits_per_state,
            plain,
            rows,
            plain_states,
            state_count,
            places: Places::default(),
        };
        shape.places = self.places(&shape);
        Ok(shape)
    }

    /// Blocks of threads that share a multiprocessor.
    fn resident(&self, queries: Queries, turned: bool) -> Result<usize> {
        let kernels = self.shared.kernels.attention(queries, turned)?;
        Ok(kernels.packed.as_ref().map_or(BLOCKS_PER_MULTIPROCESSOR, |packed| packed.resident))
    }

    fn places(&self, shape: &Shape) -> Places {
        let (keys, values) = (&self.spec().keys.layout, &self.spec().values.layout);
        let tiles = self.batch_size() * self.spec().num_key_value_heads * shape.query_tiles;
        let queries = tiles * QUERY_TILE;
        let packed = usize::from(shape.splits > 0);
        let between = if shape.queries == Queries::Once { 0 } else { packed };
        let piece = shape.rows.map_or(0, |rows| rows.piece);
        // What packing has done to scores is known of folded queries.
        let noise = usize::from(piece > 0 && self.shared.constants[Side::Keys as usize].noise != 0);
        let folds = between | noise;
        let turns = self.shared.constants[Side::Keys as usize].transform.shift_sine != 0;
        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(ALIGNMENT);
            start
        };
        let folded = place(folds * tiles * shape.key_blocks * keys.head_dim.next_multiple_of(32) * QUERY_TILE * 2);
        let extras = place(folds * queries * shape.key_blocks * (EXTRAS_HEAD + keys.groups()) * 4);
        let bias = packed
            * match (turns, shape.turned, shape.queries) {
                // `TileWaves` of kernels/turned.cuh: two numbers of each query and frequency, and a unit.
                (_, true, Queries::Many) => queries * (keys.head_dim + 1) * 4,
                // `BiasPlace` of kernels/state.cuh: a range of each query, two bytes a row.
                (true, false, _) => queries * (4 + 2 * shape.regions.packed),
                _ => 0,
            };
        let bias = place(bias);
        let packed = place(between * queries * shape.splits * (STATE_HEAD + values.head_dim) * 4);
        let states = place(queries * shape.state_count * (STATE_HEAD + values.head_dim) * 4);
        let lengths = place(16);
        let sequences = self.batch_size() * self.spec().num_key_value_heads;
        let decoded = Side::BOTH.map(|side| {
            let decodes = !shape.packed && (piece > 0 || !self.shared.codec(side).is_raw());
            let rows = if piece > 0 { piece } else { shape.regions.packed };
            place(usize::from(decodes) * sequences * rows * self.shared.row_bytes(side))
        });
        let squares = place(noise * sequences * piece * 4);
        let reach = place(queries * RowsCut::REACH_BYTES);
        Places { folded, extras, bias, packed, states, lengths, decoded, squares, reach, bytes: end }
    }

    pub fn one_launch(&self) -> Option<bool> {
        self.one_launch
    }

    /// Whether up to eight queries of a kv head have one launch before the merge (`kernels/attend_once.cuh`), not one for each part of the call;
    /// None: where it is expected to be faster.
    pub fn set_one_launch(&mut self, one_launch: Option<bool>) {
        self.one_launch = one_launch;
    }

    /// Writes softmax(scale · q·kᵀ + mask) · v over all regions to the output. Waits for nothing.
    ///
    /// # Safety
    /// All addresses are the device's, of the sizes said; inputs stay as they are and the output is nobody else's until the stream
    /// is past this call; otherwise as [`Self::append`].
    pub unsafe fn attend(&self, call: &AttendCall, stream: Stream) -> Result<()> {
        let (Some(held), total) = (&self.held, self.regions.total()) else {
            return Err(Error::state("attend", "at least one token", 0));
        };
        if total == 0 {
            return Err(Error::state("attend", "at least one token", 0));
        }
        self.check_call(call)?;
        self.check_captured(call)?;
        // Held until it has entered: another thread that attends would take it along, too.
        let mut entering = self.entering();
        if let Some((call, shape)) = self.entering_call(&entering, call)? {
            // SAFETY: the caller's promise, for both.
            unsafe {
                self.pack_leaving(&mut entering, held, stream)?;
                self.attend_some(held, &call, &shape, 0, true, stream)?;
            }
            self.note_entered(&mut entering);
            return Ok(());
        }
        drop(entering);
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let (length, count) = (call.query.shape[2], self.queries_at_once(call)?);
        for first in (0..length).step_by(count) {
            let part = call.part(first, count.min(length - first));
            let later = length - first - part.query.shape[2];
            // SAFETY: the caller's promise.
            unsafe { self.attend_some(held, &part, &self.shape_of(&part)?, later, false, stream) }?;
        }
        Ok(())
    }

    /// Tokens whose queries fit into the workspace and into a launch, at least one.
    fn queries_at_once(&self, call: &AttendCall) -> Result<usize> {
        let mut count = call.query.shape[2];
        while count > 1 {
            let shape = self.shape(call.query.shape[1], count, call.fresh_rows())?;
            let tiles = self.spec().num_key_value_heads * shape.query_tiles;
            if shape.places.bytes <= self.shared.workspace_bytes && tiles <= MOST_TILES_OF_LAUNCH {
                break;
            }
            count = count.div_ceil(2);
        }
        Ok(count)
    }

    pub(super) fn shape_of(&self, call: &AttendCall) -> Result<Shape> {
        self.shape(call.query.shape[1], call.query.shape[2], call.fresh_rows())
    }

    /// Whether the fresh row of such a call may enter with it: one launch makes all states, and nothing in front of it reads the rows.
    pub(super) fn takes_token(&self, shape: &Shape) -> bool {
        let turns = self.shared.constants[Side::Keys as usize].transform.shift_sine != 0;
        shape.queries == Queries::Once && (shape.turned || !turns)
    }

    /// Queries behind which the call has `later` more tokens. `enters`: its fresh row is stored by the launch.
    unsafe fn attend_some(
        &self,
        held: &Held,
        call: &AttendCall,
        shape: &Shape,
        later: usize,
        enters: bool,
        stream: Stream,
    ) -> Result<()> {
        let kernels = self.shared.kernels.attention(shape.queries, shape.turned)?;
        let workspace = self.shared.memory.allocate(shape.places.bytes)?;
        let mask = self.mask(held, call, later);
        let launches = Launches {
            layer: self,
            held,
            call,
            shape: *shape,
            kernels: &kernels,
            mask,
            enters,
            workspace: workspace.address(),
            stream,
            chained: Cell::new(false),
        };
        // SAFETY: the caller's promise.
        unsafe {
            launches.lengths()?;
            launches.states()?;
            launches.merge()
        }
    }

    fn check_call(&self, call: &AttendCall) -> Result<()> {
        let (spec, batch, total) = (self.spec(), self.batch_size(), self.regions.total());
        let [_, heads, length, _] = call.query.shape;
        for (name, tensor, codec) in [("query", &call.query, &spec.keys), ("output", &call.output, &spec.values)] {
            let expected = [batch, heads, length, codec.layout.head_dim];
            if tensor.shape != expected || length > total {
                let found = tensor.shape.map(|size| size as i64);
                return Err(Error::shape(name, format!("{expected:?}, at most {total} tokens"), &found));
            }
            self.expect_rows(name, tensor)?;
        }
        for (side, rows) in Side::BOTH.into_iter().zip(call.fresh.iter().flatten()) {
            let (name, heads, width) = (
                ["fresh_keys", "fresh_values"][side as usize],
                spec.num_key_value_heads,
                self.shared.codec(side).layout.head_dim,
            );
            let [_, _, count, _] = rows.shape;
            let fits = (1..=total).contains(&count) && count == call.fresh_rows();
            if !fits || rows.shape != [batch, heads, count, width] {
                let expected = format!("[{batch}, {heads}, 1..={total}, {width}]");
                return Err(Error::shape(name, expected, &rows.shape.map(|size| size as i64)));
            }
            self.expect_rows(name, rows)?;
        }
        if !(call.scale.is_finite() && call.softcap >= 0.0 && call.softcap.is_finite()) {
            let found = format!("{} and {}", call.scale, call.softcap);
            return Err(Error::value("scale and softcap", "finite numbers, the softcap positive", found));
        }
        if let Some(mask) = &call.mask {
            let fits = mask.shape.iter().zip([batch, heads, length]).all(|(found, size)| [1, size].contains(found));
            if !fits || mask.shape[3] != total {
                let expected = format!("[{batch} or 1, {heads} or 1, {length} or 1, {total}]");
                return Err(Error::shape("mask", expected, &mask.shape.map(|size| size as i64)));
            }
            if mask.strides[3] != 1 && total > 1 {
                return Err(Error::value("mask", "tokens that lie together", format!("stride {}", mask.strides[3])));
            }
        }
        Ok(())
    }

    fn mask(&self, held: &Held, call: &AttendCall, later: usize) -> MaskParams {
        let mut parameters = MaskParams {
            paddings: if self.padding.is_empty() { 0 } else { held.paddings() },
            causal: i32::from(call.causal),
            softcap: call.softcap,
            // What is behind the last of these queries is hidden from them only if the call is causal.
            total_from_lengths_plus: call.fresh_rows() as i32 - later as i32,
            ..MaskParams::default()
        };
        if let Some(mask) = &call.mask {
            let stride = |axis: usize| if mask.shape[axis] == 1 { 0 } else { mask.strides[axis] };
            parameters.mask = mask.address;
            parameters.batch_stride = stride(0);
            parameters.head_stride = stride(1);
            parameters.position_stride = stride(2);
            parameters.kind = match mask.kind {
                MaskKind::Additive(Dtype::F32) => 1,
                MaskKind::Additive(Dtype::F16) => 2,
                MaskKind::Additive(Dtype::BF16) => 3,
                MaskKind::Visible => 4,
            };
        }
        parameters
    }
}

#[cfg(test)]
mod tests;

//! Steps that are captured once and replayed: a layer with pages for a fixed number of tokens, whose lengths a launch advances on the device.
//!
//! What it is: pages, tables and statistics for so many tokens, taken at once (`reserve`); the launches of a captured append: `advance` counts the
//! token, `append_block` takes the statistics of a block that is complete with it and packs the rows that leave then, `append_row` packs the row that
//! leaves in any other step and puts the new one in its place; attention with launches for all those tokens, which reads on the device how many there
//! are. The host's lengths follow by being told how often a step was replayed. What it is not: the capture, which is torch's; nor for layers with raw
//! rows. Appends and attention outside a capture are those of any other layer, and take reserved pages as they grow.

use std::sync::Arc;

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::memory::Page;
use super::super::pages::Side;
use super::super::params::{AppendBlockParams, AppendBlockStream, StepParams};
use super::append::{Plan, Rows};
use super::attend::AttendCall;
use super::entering::{Entering, Recorded, Waiting};
use super::queries::Observation;
use super::{CudaLayer, DeviceTensor, Held, State, address, length_words};
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::Regions;

/// Pages for rows to come, and how many tokens and packed rows those are for in all.
pub(super) struct Reserved {
    pub tokens: usize,
    /// Rows between sinks and window that there are pages for.
    packed: usize,
    /// Of keys and of values, for each `[batch × heads]` those that no row has reached, the next one last. The tables know them.
    pub pages: [Vec<Vec<Arc<Page>>>; 2],
}

impl Reserved {
    /// The next pages of a head, until it has `wanted` or none is left.
    pub fn give(&mut self, side: usize, index: usize, pages: &mut Vec<Arc<Page>>, wanted: usize) {
        while pages.len() < wanted
            && let Some(page) = self.pages[side][index].pop()
        {
            pages.push(page);
        }
    }
}

/// Whether steps of this layer are replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Steps {
    /// Every step is launched by the host.
    Eager,
    /// Launches are recorded and do not run: what was there before, whether the token has been appended, and how many tokens' queries have been observed
    /// since.
    Capturing { before: Regions, appended: bool, observed: usize },
    /// A recorded step, which observes so many tokens' queries, may run at any time; whether the host has been told how often it ran.
    Captured { told: bool, observed: usize },
}

/// Whether no copy shares the page that packed row `packed` goes to.
fn has_own_page(held: &mut Held, packed: usize) -> bool {
    let begun = !packed.is_multiple_of(PAGE_ROWS);
    let is_shared =
        |pages: &mut Vec<Arc<Page>>| begun && pages.last_mut().is_some_and(|page| Arc::get_mut(page).is_none());
    !held.sides.iter_mut().any(|rows| rows.pages.iter_mut().any(is_shared))
}

impl CudaLayer {
    /// Takes pages for `tokens` tokens in all, of which there is at least one. A crop, and a copy of the layer, are without them.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn reserve_tokens(&mut self, tokens: usize, stream: Stream) -> Result<()> {
        self.expect_eager("reserve")?;
        for side in Side::BOTH {
            if !self.shared.codec(side).is_raw() {
                continue;
            }
            let reason = "a captured step packs rows of keys and of values; let both be of fewer than 16 bits";
            let name = format!("reserve with raw rows of {} on a GPU", side.name());
            return Err(Error::Unsupported { name, reason: reason.into() });
        }
        let total = self.regions.total();
        if total == 0 {
            return Err(Error::state("reserve", "at least one token", 0));
        }
        if tokens <= total {
            return Err(Error::value("tokens", format!("more than the {total} that there are"), tokens));
        }
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let plan = self.plan(tokens - total);
        let Some(mut held) = self.held.take() else { return Ok(()) };
        // SAFETY: the caller's promise.
        let reserved = unsafe { self.reserve_in(&mut held, tokens, plan, stream) };
        self.held = Some(held);
        reserved
    }

    unsafe fn reserve_in(&self, held: &mut Held, tokens: usize, plan: Plan, stream: Stream) -> Result<()> {
        // The row that is packed ahead may lie in one of its pages.
        held.reserved = None;
        self.entering().ahead = false;
        // SAFETY: the caller's promise.
        unsafe {
            self.reserve(held, Plan { to_pack: plan.to_pack + 1, ..plan }, self.most_window().min(tokens), stream)
        }?;
        // SAFETY: the caller's promise.
        unsafe { self.start_queries(held, stream) }?;
        let packed = plan.packed + plan.to_pack;
        // The first row of the last window may be packed ahead of its time.
        let wanted = (packed + 1).div_ceil(PAGE_ROWS);
        // The ring may have moved.
        let mut words = length_words(held.lengths(), self.regions, held.ring_first).to_vec();
        let mut pages = [Vec::new(), Vec::new()];
        for (rows, places) in held.sides.iter().zip(&mut pages) {
            let table = address(rows.table.as_ref());
            let missing = rows.pages.iter().map(|pages| wanted - pages.len()).sum();
            let mut taken = rows.pool.take(missing)?.into_iter();
            for (index, present) in rows.pages.iter().enumerate() {
                let mut own: Vec<_> = taken.by_ref().take(wanted - present.len()).collect();
                let first = table + 8 * (index * held.table_pages + present.len()) as u64;
                words.extend(own.iter().enumerate().map(|(page, own)| (first + 8 * page as u64, own.address())));
                own.reverse();
                places.push(own);
            }
        }
        // SAFETY: tables with room for these pages; the caller's promise for the stream.
        unsafe { self.shared.kernels.poke(&words, stream) }?;
        held.reserved = Some(Reserved { tokens, packed, pages });
        // Where a page is shared a capture will say so.
        if !has_own_page(held, self.regions.packed) {
            return Ok(());
        }
        // SAFETY: the page that it goes to is ours alone.
        unsafe { self.pack_ahead(held, stream) }
    }

    /// Tokens that there are pages for, if that was asked for.
    pub fn capacity(&self) -> Option<usize> {
        Some(self.held.as_ref()?.reserved.as_ref()?.tokens)
    }

    /// From here on launches are recorded: one append of one token, and attention of its queries.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn begin_capture(&mut self, stream: Stream) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::state("begin_capture", "end_capture() before", "another capture"));
        }
        // SAFETY: the caller's promise.
        unsafe { self.settle(stream) }?;
        let (sinks, window, regions) = (self.spec().sinks, self.spec().window, self.regions);
        let Some(held) = &mut self.held else {
            return Err(Error::state("begin_capture", "a layer with reserve(tokens)", "one without tokens"));
        };
        let Some(reserved) = &held.reserved else {
            return Err(Error::state("begin_capture", "a layer with reserve(tokens)", "one that grows as it needs"));
        };
        if regions.total() >= reserved.tokens {
            let expected = format!("fewer than the {} reserved tokens", reserved.tokens);
            return Err(Error::state("begin_capture", expected, regions.total()));
        }
        let full = sinks + window + self.padding.iter().max().copied().unwrap_or(0);
        if regions.window < window || regions.total() < full {
            let expected = format!("a full window, {full} tokens");
            return Err(Error::state("begin_capture", expected, regions.total()));
        }
        if !has_own_page(held, regions.packed) {
            let expected = "pages that no copy of the layer shares; append until a row is packed";
            return Err(Error::state("begin_capture", expected, "shared ones"));
        }
        // While launches are recorded no kernel can be loaded.
        self.shared.kernels.advance()?;
        if self.block_rows() > 0 {
            self.shared.kernels.append_block()?;
        }
        self.steps = Steps::Capturing { before: regions, appended: false, observed: 0 };
        Ok(())
    }

    /// What was recorded has not run: the layer holds what it held before. Refuses a step whose token nobody has attended to, which must not be replayed.
    pub fn end_capture(&mut self) -> Result<()> {
        let Steps::Capturing { before, observed, .. } = self.steps else {
            return Err(Error::state("end_capture", "begin_capture() before", "no capture"));
        };
        self.regions = before;
        self.steps = Steps::Captured { told: false, observed };
        match self.entering().waiting.take() {
            None => Ok(()),
            Some(_) => Err(Error::state("end_capture", "attention behind the append", "none")),
        }
    }

    /// The captured step has run `steps` times since the capture, or since this was last called.
    pub fn replayed(&mut self, steps: usize) -> Result<()> {
        let Steps::Captured { observed, .. } = self.steps else {
            return Err(Error::state("replayed", "a captured step", "none"));
        };
        let Some(tokens) = self.capacity() else {
            return Err(Error::state("replayed", "a layer with reserve(tokens)", "one that grows as it needs"));
        };
        let room = tokens.saturating_sub(self.regions.total());
        if steps > room {
            return Err(Error::value("steps", format!("at most {room}, for {tokens} tokens"), steps));
        }
        let (plan, block_rows) = (self.plan(steps), self.block_rows());
        let Some(Held { sides, reserved: Some(reserved), ring_first, ring_rows, queries, .. }) = &mut self.held else {
            return Ok(());
        };
        if let Some(seen) = queries {
            let behind_sinks = plan.packed + plan.window;
            let completing = (self.blocks..plan.blocks).map(|block| (block + 1) * block_rows - behind_sinks);
            seen.count_replays(steps, observed, completing);
        }
        (self.regions, self.blocks) = (plan.regions(self.regions), plan.blocks);
        // Rows of these steps have gone through the ring too.
        *ring_first = (*ring_first + plan.to_pack) % (*ring_rows).max(1);
        for (side, rows) in sides.iter_mut().enumerate() {
            for (index, pages) in rows.pages.iter_mut().enumerate() {
                reserved.give(side, index, pages, self.regions.packed.div_ceil(PAGE_ROWS));
            }
        }
        self.steps = Steps::Captured { told: true, observed };
        Ok(())
    }

    /// No captured step will run any more.
    pub fn release_capture(&mut self) -> Result<()> {
        self.expect_told("release_capture")?;
        self.steps = Steps::Eager;
        self.entering().recorded = Recorded::Nothing;
        Ok(())
    }

    pub(super) fn is_eager(&self) -> bool {
        self.steps == Steps::Eager
    }

    pub(super) fn is_capturing(&self) -> bool {
        matches!(self.steps, Steps::Capturing { .. })
    }

    /// Refuses what would move or free what a captured step writes.
    pub(super) fn expect_eager(&self, operation: &str) -> Result<()> {
        match self.steps {
            Steps::Eager => Ok(()),
            Steps::Capturing { .. } => Err(Error::state(operation, "one append and attention in a capture", operation)),
            Steps::Captured { .. } => {
                Err(Error::state(operation, "release_capture() before", "a captured step that may run again"))
            }
        }
    }

    /// Refuses what needs lengths that the host does not know.
    pub(super) fn expect_told(&self, operation: &str) -> Result<()> {
        match self.steps {
            Steps::Eager | Steps::Captured { told: true, .. } => Ok(()),
            Steps::Capturing { .. } => Err(Error::state(operation, "one append and attention in a capture", operation)),
            Steps::Captured { told: false, .. } => {
                let expected = "replayed(steps) before: how often the captured step has run";
                Err(Error::state(operation, expected, "a captured step"))
            }
        }
    }

    /// Compares the device's lengths with the host's, where a captured step may have made them differ. Waits for the stream.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub(super) unsafe fn expect_in_step(&self, held: &Held, stream: Stream) -> Result<()> {
        if self.steps == Steps::Eager {
            return Ok(());
        }
        let mut numbers = [0i32; 8];
        // SAFETY: the first numbers of the state; the caller's promise for the stream.
        unsafe { self.shared.kernels.device().read(&mut numbers, held.state.address(), stream) }?;
        let ([packed, sinks, window, ..], overflow) = (numbers.map(|number| number.max(0) as usize), numbers[7]);
        if overflow > 0 {
            let expected = "no more replays than there are reserved tokens; reset the cache";
            return Err(Error::state("a captured step", expected, format!("{overflow} too many")));
        }
        let found = Regions { sinks, packed, window };
        if found != self.regions {
            let expected = format!("replayed(steps) for every replay, {} tokens", self.regions.total());
            return Err(Error::state("a captured step", expected, found.total()));
        }
        Ok(())
    }

    /// The regions of a layer that is full, while launches are recorded.
    pub(super) fn most_regions(&self) -> Option<Regions> {
        let reserved = self.held.as_ref()?.reserved.as_ref()?;
        let most = Regions { packed: reserved.packed, window: self.most_window(), ..self.regions };
        self.is_capturing().then_some(most)
    }

    /// Where the window begins in the ring, as `plain` wants it: −1 where the device knows.
    pub(super) fn ring_first(&self, held: &Held) -> i32 {
        if self.is_capturing() { -1 } else { held.ring_first as i32 }
    }

    /// Refuses attention whose parameters would not hold at another length.
    pub(super) fn check_captured(&self, call: &AttendCall) -> Result<()> {
        if !self.is_capturing() {
            return self.expect_told("attend");
        }
        let found = match (call.mask.is_some(), call.fresh.is_some(), call.query.shape[2]) {
            (true, ..) => "a mask".to_string(),
            (_, true, _) => "rows of the call itself".to_string(),
            (.., 1) => return Ok(()),
            (.., length) => format!("{length} tokens"),
        };
        Err(Error::state("attend", "in a capture queries of one token, without a mask", found))
    }

    /// # Safety
    /// As [`Self::append`]; keys and values are read whenever the captured step runs.
    pub(super) unsafe fn append_captured(
        &mut self,
        tensors: [&DeviceTensor; 2],
        with_query: bool,
        stream: Stream,
    ) -> Result<()> {
        let Steps::Capturing { before, appended, observed } = self.steps else { return Ok(()) };
        if appended || with_query || tensors[0].shape[2] != 1 {
            let found = if appended { "another one".to_string() } else { format!("{} tokens", tensors[0].shape[2]) };
            return Err(Error::state("append", "in a capture one append of one token, without queries", found));
        }
        let plan = self.plan(1);
        let entering = *self.entering();
        let waits = self.may_wait(plan) && entering.ahead && entering.recorded != Recorded::Apart;
        if waits {
            self.entering().waiting = Some(Waiting::of(tensors, true));
        } else if let Some(held) = &self.held {
            // SAFETY: the caller's promise.
            unsafe { self.launch_step(held, tensors, &mut self.entering(), stream) }?;
        }
        self.regions = plan.regions(before);
        self.steps = Steps::Capturing { before, appended: true, observed };
        Ok(())
    }

    /// # Safety
    /// As [`Self::append`]; the query is read whenever the captured step runs.
    pub(super) unsafe fn observe_captured(&mut self, held: &Held, seen: &Observation, stream: Stream) -> Result<()> {
        let Steps::Capturing { before, appended, observed } = self.steps else { return Ok(()) };
        let Some(sums) = &held.queries else { return Ok(()) };
        if !appended || seen.tokens() != 1 {
            let found = if appended { format!("{} tokens", seen.tokens()) } else { "none in front".to_string() };
            let expected = "in a capture queries of one token, behind its append";
            return Err(Error::state("observe_queries", expected, found));
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch_queries(held, sums, Some(seen), false, stream) }?;
        self.steps = Steps::Capturing { before, appended, observed: observed + 1 };
        Ok(())
    }

    pub(super) unsafe fn launch_step(
        &self,
        held: &Held,
        tensors: [&DeviceTensor; 2],
        entering: &mut Entering,
        stream: Stream,
    ) -> Result<()> {
        let kernels = &self.shared.kernels;
        let Some(append_row) = kernels.append_row() else { return Ok(()) };
        if entering.recorded == Recorded::Entering {
            let expected = "a step with the launches of the one that was captured before; release_capture() before";
            return Err(Error::state("a capture", expected, "an append of its own"));
        }
        (entering.ahead, entering.recorded) = (false, Recorded::Apart);
        let step = StepParams {
            lengths: held.lengths(),
            overflow: held.state.address() + State::OVERFLOW,
            ring_rows: held.ring_rows as i32,
            most_tokens: held.reserved.as_ref().map_or(0, |reserved| reserved.tokens) as i32,
            window: self.spec().window as i32,
            block_rows: self.block_rows() as i32,
        };
        // SAFETY: the layer's state, which `advance` moves to no row without a page of ours; the caller's promise for the new row and the stream.
        unsafe {
            launch(&*kernels.advance()?, [1, 1, 1], 32, &step, stream)?;
            if step.block_rows > 0 {
                self.append_block(held, tensors, stream)?;
            }
            self.append_row(append_row, held, tensors, -1, stream)
        }
    }

    unsafe fn append_block(&self, held: &Held, tensors: [&DeviceTensor; 2], stream: Stream) -> Result<()> {
        let heads = self.spec().num_key_value_heads;
        let [keys, values] = Side::BOTH.map(|side| AppendBlockStream {
            encode: self.encode_parameters(held, side, self.whole_ring(held, side), 0),
            statistics: self.statistics_parameters(held, side, Rows::of(tensors[side as usize]), 0),
        });
        let (factors, lengths) = (self.fixing_parameters(held), held.lengths());
        let ring_rows = held.ring_rows as i32;
        let parameters = AppendBlockParams { keys, values, factors, lengths, ring_rows, padding: 0 };
        let function = self.shared.kernels.append_block()?;
        // SAFETY: as `launch_step`: pages, and statistics of all blocks, for every row that `advance` moves to.
        unsafe { launch(&function, [2, heads as u32, held.batch as u32], 256, &parameters, stream) }
    }
}

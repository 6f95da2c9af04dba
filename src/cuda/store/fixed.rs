//! Steps that are captured once and replayed: a layer with pages for a fixed number of tokens, whose lengths a launch advances on the device.
//!
//! What it is: pages and tables for so many tokens, taken at once (`reserve`); the launches of a captured append: `advance` counts the token,
//! `append_row` packs the row that has left the ring and puts the new one in its place; attention with launches for all those tokens, which reads on
//! the device how many there are. The host's lengths follow by being told how often a step was replayed. What it is not: the capture, which is
//! torch's; nor for layers with statistics of blocks or with raw rows, whose steps are not all alike. Appends and attention outside a capture
//! are those of any other layer, and take reserved pages as they grow.

use std::sync::Arc;

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::memory::Page;
use super::super::pages::Side;
use super::super::params::StepParams;
use super::append::Plan;
use super::attend::AttendCall;
use super::{CudaLayer, DeviceTensor, Held, State, address, length_words};
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::Regions;

/// Pages for rows to come, and how many rows those are.
pub(super) struct Reserved {
    tokens: usize,
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
    /// Launches are recorded and do not run: what was there before, and whether the token has been appended.
    Capturing { before: Regions, appended: bool },
    /// A recorded step may run at any time; whether the host has been told how often it ran.
    Captured { told: bool },
}

impl CudaLayer {
    /// Takes pages for `tokens` tokens in all, of which there is at least one. A crop, and a copy of the layer, are without them.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn reserve_tokens(&mut self, tokens: usize, stream: Stream) -> Result<()> {
        self.expect_eager("reserve")?;
        for side in Side::BOTH {
            let codec = self.shared.codec(side);
            let what = match (codec.is_raw(), codec.block_rows()) {
                (true, _) => "raw rows",
                (false, 0) => continue,
                _ => "statistics of blocks",
            };
            let reason = "a captured step packs one row of keys and one of values; use static codecs, such as a plan's";
            let name = format!("reserve with {what} of {} on a GPU", side.name());
            return Err(Error::Unsupported { name, reason: reason.into() });
        }
        let total = self.regions.total();
        if total == 0 {
            return Err(Error::state("reserve", "at least one token", 0));
        }
        if tokens <= total {
            return Err(Error::value("tokens", format!("more than the {total} that there are"), tokens));
        }
        let plan = self.plan(tokens - total);
        let Some(mut held) = self.held.take() else { return Ok(()) };
        // SAFETY: the caller's promise.
        let reserved = unsafe { self.reserve_in(&mut held, tokens, plan, stream) };
        self.held = Some(held);
        reserved
    }

    unsafe fn reserve_in(&self, held: &mut Held, tokens: usize, plan: Plan, stream: Stream) -> Result<()> {
        held.reserved = None;
        // SAFETY: the caller's promise.
        unsafe { self.reserve(held, plan, stream) }?;
        let packed = plan.packed + plan.to_pack;
        let wanted = packed.div_ceil(PAGE_ROWS);
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
        Ok(())
    }

    /// Tokens that there are pages for, if that was asked for.
    pub fn capacity(&self) -> Option<usize> {
        Some(self.held.as_ref()?.reserved.as_ref()?.tokens)
    }

    /// From here on launches are recorded: one append of one token, and attention of its queries.
    pub fn begin_capture(&mut self) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::state("begin_capture", "end_capture() before", "another capture"));
        }
        let (sinks, window, regions) = (self.spec().sinks, self.spec().window, self.regions);
        let Some(held) = &mut self.held else {
            return Err(Error::state("begin_capture", "a layer with reserve(tokens)", "one without tokens"));
        };
        let Some(reserved) = &held.reserved else {
            return Err(Error::state("begin_capture", "a layer with reserve(tokens)", "one that grows as it needs"));
        };
        if regions.packed >= reserved.packed {
            let expected = format!("fewer than the {} reserved tokens", reserved.tokens);
            return Err(Error::state("begin_capture", expected, regions.total()));
        }
        let full = sinks + window + self.padding.iter().max().copied().unwrap_or(0);
        if regions.window != window || regions.total() < full {
            let expected = format!("a full window, {full} tokens");
            return Err(Error::state("begin_capture", expected, regions.total()));
        }
        let begun = !regions.packed.is_multiple_of(PAGE_ROWS);
        let is_shared =
            |pages: &mut Vec<Arc<Page>>| begun && pages.last_mut().is_some_and(|page| Arc::get_mut(page).is_none());
        if held.sides.iter_mut().any(|rows| rows.pages.iter_mut().any(is_shared)) {
            let expected = "pages that no copy of the layer shares; append a token first";
            return Err(Error::state("begin_capture", expected, "shared ones"));
        }
        // While launches are recorded no kernel can be loaded.
        self.shared.kernels.advance()?;
        self.steps = Steps::Capturing { before: regions, appended: false };
        Ok(())
    }

    /// What was recorded has not run: the layer holds what it held before.
    pub fn end_capture(&mut self) -> Result<()> {
        let Steps::Capturing { before, .. } = self.steps else {
            return Err(Error::state("end_capture", "begin_capture() before", "no capture"));
        };
        self.regions = before;
        self.steps = Steps::Captured { told: false };
        Ok(())
    }

    /// The captured step has run `steps` times since the capture, or since this was last called.
    pub fn replayed(&mut self, steps: usize) -> Result<()> {
        let (Steps::Captured { .. }, Some(held)) = (self.steps, &mut self.held) else {
            return Err(Error::state("replayed", "a captured step", "none"));
        };
        let Held { sides, reserved: Some(reserved), ring_first, ring_rows, .. } = held else {
            return Err(Error::state("replayed", "a layer with reserve(tokens)", "one that grows as it needs"));
        };
        let room = reserved.packed.saturating_sub(self.regions.packed);
        if steps > room {
            return Err(Error::value("steps", format!("at most {room}, for {} tokens", reserved.tokens), steps));
        }
        self.regions.packed += steps;
        *ring_first = (*ring_first + steps) % (*ring_rows).max(1);
        for (side, rows) in sides.iter_mut().enumerate() {
            for (index, pages) in rows.pages.iter_mut().enumerate() {
                reserved.give(side, index, pages, self.regions.packed.div_ceil(PAGE_ROWS));
            }
        }
        self.steps = Steps::Captured { told: true };
        Ok(())
    }

    /// No captured step will run any more.
    pub fn release_capture(&mut self) -> Result<()> {
        self.expect_told("release_capture")?;
        self.steps = Steps::Eager;
        Ok(())
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
            Steps::Eager | Steps::Captured { told: true } => Ok(()),
            Steps::Capturing { .. } => Err(Error::state(operation, "one append and attention in a capture", operation)),
            Steps::Captured { told: false } => {
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
        let mut numbers = [0i32; 6];
        // SAFETY: the first numbers of the state; the caller's promise for the stream.
        unsafe { self.shared.kernels.device().read(&mut numbers, held.state.address(), stream) }?;
        let [packed, _, _, _, _, overflow] = numbers;
        if overflow > 0 {
            let expected = "no more replays than there are reserved tokens; reset the cache";
            return Err(Error::state("a captured step", expected, format!("{overflow} too many")));
        }
        if packed as usize != self.regions.packed {
            let expected = format!("replayed(steps) for every replay, {} packed tokens", self.regions.packed);
            return Err(Error::state("a captured step", expected, packed));
        }
        Ok(())
    }

    /// The regions of a layer that is full, while launches are recorded.
    pub(super) fn most_regions(&self) -> Option<Regions> {
        let reserved = self.held.as_ref()?.reserved.as_ref()?;
        self.is_capturing().then_some(Regions { packed: reserved.packed, ..self.regions })
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
        let Steps::Capturing { before, appended } = self.steps else { return Ok(()) };
        if appended || with_query || tensors[0].shape[2] != 1 {
            let found = if appended { "another one".to_string() } else { format!("{} tokens", tensors[0].shape[2]) };
            return Err(Error::state("append", "in a capture one append of one token, without queries", found));
        }
        if let Some(held) = &self.held {
            // SAFETY: the caller's promise.
            unsafe { self.launch_step(held, tensors, stream) }?;
        }
        self.regions.packed += 1;
        self.steps = Steps::Capturing { before, appended: true };
        Ok(())
    }

    unsafe fn launch_step(&self, held: &Held, tensors: [&DeviceTensor; 2], stream: Stream) -> Result<()> {
        let kernels = &self.shared.kernels;
        let Some(append_row) = kernels.append_row() else { return Ok(()) };
        let step = StepParams {
            lengths: held.lengths(),
            overflow: held.state.address() + State::OVERFLOW,
            ring_rows: held.ring_rows as i32,
            most_packed: held.reserved.as_ref().map_or(0, |reserved| reserved.packed) as i32,
        };
        // SAFETY: the layer's state, which `advance` moves to no row without a page of ours; the caller's promise for the new row and the stream.
        unsafe {
            launch(&*kernels.advance()?, [1, 1, 1], 32, &step, stream)?;
            self.append_row(append_row, held, tensors, true, stream)
        }
    }
}

//! A decode step's token that enters with the launch that attends to it (`kernels/attend_once.cuh`): the append waits for its attention.
//!
//! What it is: which appends may wait, and what becomes of one that does: attention takes it along, in one launch for all of the step, or else the next
//! use of the layer makes up for it by the launches of any other append (`settle`). The launch also packs the row that the next token will push out of
//! the window, ahead of its time, behind the packed ones; the store holds what it would hold otherwise, to the last byte. What it is not: for layers
//! with raw rows or statistics of blocks, whose steps are not alike.

use std::sync::{MutexGuard, PoisonError};

use super::super::launch::Stream;
use super::super::pages::{Side, enters_inside};
use super::super::params::EnterParams;
use super::append::Plan;
use super::attend::{AttendCall, Shape};
use super::{CudaLayer, DeviceTensor, Held, length_words};
use crate::error::Result;

/// A window that has a row beside the new one.
const LEAST_WINDOW: usize = 2;

/// What the store on the device lacks of what the layer holds, and what it has more.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Entering {
    pub waiting: Option<Waiting>,
    /// The window is full, and its first row is packed already.
    pub ahead: bool,
    pub recorded: Recorded,
}

/// How the token of steps that may be replayed enters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Recorded {
    /// There are no such steps.
    #[default]
    Nothing,
    /// With its attention: between replays the window's first row is packed.
    Entering,
    /// By launches of their own.
    Apart,
}

/// A token that the layer counts and the device does not know yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub tensors: [DeviceTensor; 2],
    /// A row leaves the window with it.
    leaves: bool,
}

impl Waiting {
    pub fn of(tensors: [&DeviceTensor; 2], leaves: bool) -> Self {
        Self { tensors: tensors.map(|tensor| *tensor), leaves }
    }
}

impl CudaLayer {
    pub(super) fn entering(&self) -> MutexGuard<'_, Entering> {
        self.entering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the token's tensors must stay until the next use of the layer.
    pub fn waits(&self) -> bool {
        self.entering().waiting.is_some()
    }

    /// Nothing waits, and nothing is packed ahead of its time that anybody knows of.
    pub(super) fn forget_ahead(&self) {
        let mut entering = self.entering();
        (entering.waiting, entering.ahead) = (None, false);
    }

    /// Whether an append of one token may wait for its attention.
    pub(super) fn may_wait(&self, plan: Plan) -> bool {
        self.one_launch != Some(false) && self.can_enter(plan)
    }

    /// Whether the token of an append can enter with its attention.
    fn can_enter(&self, plan: Plan) -> bool {
        let spec = self.spec();
        self.is_step(plan)
            && plan.packed > 0
            && self.block_rows() == 0
            && spec.window >= LEAST_WINDOW
            && self.shared.kernels.append_row().is_some()
            && [&spec.keys, &spec.values].into_iter().all(enters_inside)
    }

    /// Whether the window's first row is to be packed when a step is over.
    fn is_full(&self, window: usize) -> bool {
        window == self.spec().window
    }

    /// Room for the token, and for the row that will be packed ahead; it waits then. Nothing changes on an error.
    ///
    /// # Safety
    /// As [`Self::append`], and both tensors stay until the next call of the layer.
    pub(super) unsafe fn append_waiting(
        &mut self,
        tensors: [&DeviceTensor; 2],
        plan: Plan,
        stream: Stream,
    ) -> Result<()> {
        let after = plan.regions(self.regions);
        let with_ahead = Plan { to_pack: plan.to_pack + usize::from(self.is_full(after.window)), ..plan };
        let Some(mut held) = self.held.take() else { return Ok(()) };
        // SAFETY: the caller's promise.
        let reserved = unsafe { self.reserve_waiting(&mut held, with_ahead, plan.window.max(after.window), stream) };
        if reserved.is_ok() {
            held.ring_first = (held.ring_first + plan.from_window) % held.ring_rows.max(1);
            self.regions = after;
            self.entering().waiting = Some(Waiting::of(tensors, plan.to_pack > 0));
        }
        self.held = Some(held);
        reserved
    }

    unsafe fn reserve_waiting(&self, held: &mut Held, plan: Plan, window: usize, stream: Stream) -> Result<()> {
        let ring_rows = held.ring_rows;
        let mut words = Vec::new();
        // SAFETY: the caller's promise.
        unsafe {
            self.reserve(held, plan, window, stream)?;
            if held.ring_rows != ring_rows {
                // The rows of before lie elsewhere in it.
                words.extend(length_words(held.lengths(), self.regions, held.ring_first));
            }
            self.reserve_pages(held, plan, &mut words, stream)?;
            if words.is_empty() { Ok(()) } else { self.shared.kernels.poke(&words, stream) }
        }
    }

    /// The device gets what it lacks, by launches of their own.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub(super) unsafe fn settle(&self, stream: Stream) -> Result<()> {
        let mut entering = self.entering();
        let (Some(waiting), Some(held)) = (entering.waiting, &self.held) else { return Ok(()) };
        let tensors = waiting.tensors.each_ref();
        if self.is_capturing() {
            // SAFETY: the caller's promise.
            unsafe { self.launch_step(held, tensors, &mut entering, stream) }?;
        } else if let Some(function) = self.shared.kernels.append_row() {
            let leaves = waiting.leaves && !entering.ahead;
            // SAFETY: the caller's promise; there is room for the token and the row that leaves.
            unsafe {
                self.shared.kernels.poke(&length_words(held.lengths(), self.regions, held.ring_first), stream)?;
                self.append_row(function, held, tensors, i32::from(leaves), stream)?;
            }
        }
        (entering.waiting, entering.ahead) = (None, false);
        Ok(())
    }

    /// The call with the token as a fresh row, and how it is cut, if the token may enter with it.
    pub(super) fn entering_call(&self, entering: &Entering, call: &AttendCall) -> Result<Option<(AttendCall, Shape)>> {
        let Some(Waiting { tensors, .. }) = entering.waiting.filter(|_| call.fresh.is_none()) else { return Ok(None) };
        // In a capture launches are those of a step like all others.
        if call.query.shape[2] != 1 || (self.is_capturing() && !entering.ahead) {
            return Ok(None);
        }
        let call = AttendCall { fresh: Some(tensors), ..*call };
        let shape = self.shape_of(&call)?;
        Ok(self.takes_token(&shape).then_some((call, shape)))
    }

    /// Before the launch that the token enters with: the row that it pushes out is packed, if it is not yet.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub(super) unsafe fn pack_leaving(&self, entering: &mut Entering, held: &Held, stream: Stream) -> Result<()> {
        if entering.waiting.is_some_and(|waiting| waiting.leaves) && !entering.ahead {
            let place = (held.ring_first + held.ring_rows - 1) % held.ring_rows.max(1);
            // SAFETY: the caller's promise; its page is there.
            unsafe { self.pack_ring_row(held, place, self.regions.packed - 1, stream) }?;
            entering.ahead = true;
        }
        Ok(())
    }

    /// The row of the rings at `place` becomes packed row `index`.
    unsafe fn pack_ring_row(&self, held: &Held, place: usize, index: usize, stream: Stream) -> Result<()> {
        for side in Side::BOTH {
            let rows = self.whole_ring(held, side).skip(place, 1, self.spec().dtype.size());
            // SAFETY: a row of the ring; the caller's promise for the rest.
            unsafe { self.encode(held, side, rows, index, stream) }?;
        }
        Ok(())
    }

    /// For steps that are replayed and in which the token enters with its attention: the window's first row is packed, if that is full, and there is
    /// a page for it.
    ///
    /// # Safety
    /// As [`Self::append`]; no copy of the layer shares that page.
    pub(super) unsafe fn pack_ahead(&self, held: &Held, stream: Stream) -> Result<()> {
        let has_page = held.reserved.as_ref().is_some_and(|reserved| self.regions.total() <= reserved.tokens);
        let may = has_page && self.can_enter(self.plan(1)) && self.is_full(self.regions.window);
        let mut entering = self.entering();
        if may && !entering.ahead {
            // SAFETY: the caller's promise.
            unsafe { self.pack_ring_row(held, held.ring_first, self.regions.packed, stream) }?;
            entering.ahead = true;
        }
        Ok(())
    }

    /// The token has entered.
    pub(super) fn note_entered(&self, entering: &mut Entering) {
        (entering.waiting, entering.ahead) = (None, self.is_full(self.regions.window));
        if self.is_capturing() {
            entering.recorded = Recorded::Entering;
        }
    }

    /// What the launch is told of the token.
    pub(super) fn enter_parameters(&self, held: &Held) -> EnterParams {
        let reserved = held.reserved.as_ref().filter(|_| self.is_capturing());
        EnterParams {
            window: self.spec().window as i32,
            ring_rows: held.ring_rows as i32,
            most_tokens: reserved.map_or(i32::MAX, |reserved| reserved.tokens as i32),
            padding: 0,
        }
    }
}

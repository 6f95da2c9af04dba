//! What queries put on the channels of the keys, as `layer/queries.rs` has it on the CPU: sums and factors on the device, counts on the host.
//!
//! The host counts the tokens that were seen, so it knows when factors are fixed without asking. One thing only the device can see: queries of nothing
//! but zeros leave a head without factors. They are not waited for then; the spread of the keys stands in for them, as for blocks that came before.
//! (A captured step that was recorded before asks for them again at the next block.)

use super::super::kernels::launch;
use super::super::launch::Stream;
use super::super::memory::Block;
use super::super::pages::Side;
use super::super::params::{FactorParams, QueryParams};
use super::{CudaLayer, DeviceTensor, Held};
use crate::error::{Error, Result};
use crate::layer::LEAST_QUERY_TOKENS;

/// Rows of queries that a block of threads takes at a time, and its threads.
const ROWS: usize = 8;
const THREADS: usize = 128;
const FACTOR_THREADS: usize = 256;
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// What a batch's queries have left.
pub(super) struct Seen {
    /// f64 `[batch, kv heads, D + 1]`: sums of squares, and the tokens seen.
    pub squares: Block,
    /// f32 `[batch, kv heads, D]`, 0 where they are not fixed.
    pub factors: Block,
    /// Both have values.
    pub started: bool,
    /// Of each sequence.
    pub tokens: Vec<usize>,
    pub fixed: Vec<bool>,
}

/// Queries on their way, with room for partial sums.
pub(super) struct Observation {
    query: DeviceTensor,
    /// Of the query's first token.
    first_token: usize,
    parts: usize,
    partial: Block,
}

impl Observation {
    pub fn tokens(&self) -> usize {
        self.query.shape[2]
    }
}

impl Seen {
    /// Counts `steps` replays of a captured step, each of which sees the queries of `observed` tokens behind its append; `completing`: those of them, from
    /// 1 on, that complete a block.
    pub fn count_replays(&mut self, steps: usize, observed: usize, completing: impl Iterator<Item = usize> + Clone) {
        for (tokens, fixed) in self.tokens.iter_mut().zip(&mut self.fixed).filter(|(_, fixed)| !**fixed) {
            let fixing = completing.clone().find(|step| *tokens + (step - 1) * observed >= LEAST_QUERY_TOKENS);
            *tokens += fixing.map_or(steps, |step| step - 1) * observed;
            *fixed = fixing.is_some();
        }
    }
}

impl CudaLayer {
    /// Whether the queries of this layer still have a say in how its keys are packed.
    pub fn wants_queries(&self) -> bool {
        self.spec().keys.query_exponent() > 0.0 && self.held.as_ref().is_none_or(is_open)
    }

    /// Takes note of the queries `[batch, query heads, L, key width]` of the last L tokens. Waits for nothing.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn observe_queries(&mut self, query: &DeviceTensor, stream: Stream) -> Result<()> {
        let total = self.regions.total();
        self.check_query(query, self.batch_size(), total)?;
        let captured = self.is_capturing();
        if !captured {
            self.expect_told("observe_queries")?;
        }
        let Some(mut held) = self.held.take() else { return Ok(()) };
        let noted = self.prepare_queries(&mut held, Some(query), total).and_then(|observation| {
            match observation {
                // SAFETY: the caller's promise.
                Some(seen) if captured => unsafe { self.observe_captured(&held, &seen, stream) },
                // SAFETY: the caller's promise.
                seen => unsafe { self.note_queries(&mut held, seen.as_ref(), false, stream) },
            }
        });
        self.held = Some(held);
        noted
    }

    pub(super) fn check_query(&self, query: &DeviceTensor, batch: usize, tokens: usize) -> Result<()> {
        let (heads, width) = (self.spec().num_key_value_heads, self.spec().keys.layout.head_dim);
        let [found_batch, query_heads, length, found_width] = query.shape;
        let fits = query_heads > 0 && query_heads.is_multiple_of(heads) && (1..=tokens).contains(&length);
        if !fits || found_batch != batch || found_width != width {
            let expected = format!("[{batch}, a multiple of {heads}, 1 to {tokens} tokens, {width}]");
            return Err(Error::shape("query", expected, &query.shape.map(|size| size as i64)));
        }
        self.expect_rows("query", query)
    }

    /// Room for queries of the last of `tokens` in all; None where there are none or they have no say.
    pub(super) fn prepare_queries(
        &self,
        held: &mut Held,
        query: Option<&DeviceTensor>,
        tokens: usize,
    ) -> Result<Option<Observation>> {
        let shared = &*self.shared;
        let Some(query) = query.filter(|_| shared.spec.keys.query_exponent() > 0.0 && is_open(held)) else {
            return Ok(None);
        };
        let (heads, width) = (shared.spec.num_key_value_heads, shared.spec.keys.layout.head_dim);
        let sequences = held.batch * heads;
        if held.queries.is_none() {
            held.queries = Some(self.nothing_seen(held.batch)?);
        }
        let rounds = (query.shape[1] / heads * query.shape[2]).div_ceil(ROWS);
        let multiprocessors = shared.kernels.multiprocessors();
        let parts = (BLOCKS_PER_MULTIPROCESSOR * multiprocessors).div_ceil(sequences).clamp(1, rounds);
        let partial = shared.memory.allocate(sequences * parts * width * 8)?;
        Ok(Some(Observation { query: *query, first_token: tokens - query.shape[2], parts, partial }))
    }

    /// Room for what the queries of a batch leave, without values yet.
    fn nothing_seen(&self, batch: usize) -> Result<Seen> {
        let (memory, width) = (&self.shared.memory, self.spec().keys.layout.head_dim);
        let sequences = batch * self.spec().num_key_value_heads;
        let squares = memory.allocate(sequences * (width + 1) * 8)?;
        let factors = memory.allocate(sequences * width * 4)?;
        Ok(Seen { squares, factors, started: false, tokens: vec![0; batch], fixed: vec![false; batch] })
    }

    /// Sums of no queries, if they have a say and there are none: a captured step adds to what there is.
    pub(super) unsafe fn start_queries(&self, held: &mut Held, stream: Stream) -> Result<()> {
        if self.spec().keys.query_exponent() == 0.0 || held.queries.as_ref().is_some_and(|seen| seen.started) {
            return Ok(());
        }
        let mut seen = match held.queries.take() {
            Some(seen) => seen,
            None => self.nothing_seen(held.batch)?,
        };
        // SAFETY: the caller's promise.
        unsafe { self.launch_queries(held, &seen, None, false, stream) }?;
        seen.started = true;
        held.queries = Some(seen);
        Ok(())
    }

    /// Adds queries that were prepared; `fixes`: a block of keys takes its statistics next.
    pub(super) unsafe fn note_queries(
        &self,
        held: &mut Held,
        observation: Option<&Observation>,
        fixes: bool,
        stream: Stream,
    ) -> Result<()> {
        let batch = held.batch;
        let Some(seen) = &held.queries else { return Ok(()) };
        let settles = || (0..batch).any(|b| !seen.fixed[b] && seen.tokens[b] >= LEAST_QUERY_TOKENS);
        if observation.is_none() && !(fixes && seen.started && settles()) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch_queries(held, seen, observation, fixes, stream) }?;
        let Some(seen) = &mut held.queries else { return Ok(()) };
        seen.started = true;
        for b in 0..batch {
            if let (false, Some(Observation { query, first_token, .. })) = (seen.fixed[b], observation) {
                let length = query.shape[2];
                seen.tokens[b] += length - self.padding(b).saturating_sub(*first_token).min(length);
            }
            seen.fixed[b] |= fixes && seen.tokens[b] >= LEAST_QUERY_TOKENS;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Self::append`]; the query is read by this launch, and whenever a captured step runs.
    pub(super) unsafe fn launch_queries(
        &self,
        held: &Held,
        seen: &Seen,
        observation: Option<&Observation>,
        fixes: bool,
        stream: Stream,
    ) -> Result<()> {
        let Some([squares, factors]) = self.shared.kernels.queries() else { return Ok(()) };
        let (batch, heads) = (held.batch, self.spec().num_key_value_heads);
        let mut second = self.factor_parameters(held, seen, fixes);
        if let Some(Observation { query, first_token, parts, partial }) = observation {
            let [_, query_heads, length, _] = query.shape;
            let first = QueryParams {
                query: query.address,
                batch_stride: query.strides[0],
                head_stride: query.strides[1],
                position_stride: query.strides[2],
                paddings: second.paddings,
                partial: partial.address(),
                first_token: *first_token as i32,
                length: length as i32,
                group: (query_heads / heads) as i32,
                kv_heads: heads as i32,
                parts: *parts as i32,
                padding: 0,
            };
            // SAFETY: the caller's promise for the query; the partial sums have room for all parts.
            unsafe { launch(squares, [*parts as u32, heads as u32, batch as u32], THREADS, &first, stream) }?;
            (second.partial, second.parts) = (partial.address(), *parts as i32);
            (second.first_token, second.length) = (*first_token as i32, length as i32);
        }
        // SAFETY: arrays of this batch, and partial sums of the launch before.
        unsafe { launch(factors, [1, heads as u32, batch as u32], FACTOR_THREADS, &second, stream) }
    }

    /// Of no further queries.
    fn factor_parameters(&self, held: &Held, seen: &Seen, fixes: bool) -> FactorParams {
        FactorParams {
            squares: seen.squares.address(),
            factors: seen.factors.address(),
            paddings: if self.padding.is_empty() { 0 } else { held.paddings() },
            exponent: f64::from(self.spec().keys.query_exponent()),
            kv_heads: self.spec().num_key_value_heads as i32,
            starts: i32::from(!seen.started),
            fixes: i32::from(fixes),
            ..FactorParams::default()
        }
    }

    /// What fixes the factors in a captured step that completes a block; zeros where that has been done.
    pub(super) fn fixing_parameters(&self, held: &Held) -> FactorParams {
        match held.queries.as_ref().filter(|seen| seen.fixed.contains(&false)) {
            Some(seen) => self.factor_parameters(held, seen, true),
            None => FactorParams::default(),
        }
    }

    /// Factors on the scales of a head's channels; None before they are fixed. Waits for the stream.
    ///
    /// # Safety
    /// As [`Self::append`].
    pub unsafe fn query_factors(&self, batch: usize, kv_head: usize, stream: Stream) -> Result<Option<Vec<f32>>> {
        let (rows, heads) = (self.batch_size(), self.spec().num_key_value_heads);
        if batch >= rows || kv_head >= heads {
            let expected = format!("a row of the batch below {rows} and a head below {heads}");
            return Err(Error::value("batch and head", expected, format!("{batch} and {kv_head}")));
        }
        let width = self.shared.codec(Side::Keys).layout.head_dim;
        let Some(seen) = self.held.as_ref().and_then(|held| held.queries.as_ref()).filter(|seen| seen.started) else {
            return Ok(None);
        };
        let mut factors = vec![0.0f32; width];
        let from = seen.factors.address() + ((batch * heads + kv_head) * width * 4) as u64;
        // SAFETY: the vector outlives the copy, which is waited for; the caller's promise for the stream.
        unsafe { self.shared.kernels.device().read(&mut factors, from, stream) }?;
        Ok((factors[0] != 0.0).then_some(factors))
    }
}

fn is_open(held: &Held) -> bool {
    held.queries.as_ref().is_none_or(|seen| seen.fixed.contains(&false))
}

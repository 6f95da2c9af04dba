//! The mean of keys before the rotary embedding, turned to a position (FORMAT.md §6): m(t) = μ·cos(θt) + ν·sin(θt), channel by channel.
//!
//! What it is: tables of cosines and sines, shared by all codecs with the same frequencies; m(t) of a row; and, for attention, q·m(t)
//! of [`SPAN`] positions as one small product. What it is not: a rotary embedding of rows.
//!
//! Most frequencies turn so little within a span that all of them together are a polynomial of its positions ([`TERMS`]): of the 128 waves
//! of a head of 128 channels with a base of a million 60 rows of the product are left.

use std::sync::{Arc, Mutex, RwLock, Weak};

use crate::backend::simd::{Isa, LANES, matmul, panels};
use crate::error::{Error, Result};

/// Positions of a span: t = SPAN·i + j. The chunks of attention are no longer.
pub const SPAN: usize = 256;
/// Half a span.
const HALF: usize = SPAN / 2;
/// Frequencies that turn by no more than this in half a span are slow.
const SLOW: f64 = 0.5;
/// Terms of the polynomial that stands for slow ones: the next is below 0.5⁸ / 8!, 10⁻⁷ of an amplitude.
const TERMS: usize = 8;

/// Cosines and sines of one set of frequencies, one frequency a channel.
#[derive(Debug)]
pub struct Turns {
    frequencies: Vec<f32>,
    /// For every channel, its place among the distinct frequencies.
    distinct_of: Vec<u16>,
    /// A channel of every distinct frequency.
    channel_of: Vec<u16>,
    /// cos(jθ), then sin(jθ), by channel: `[SPAN, 2, D]`.
    steps: Vec<f32>,
    /// Places of the distinct frequencies that are fast, and of the slow ones; the latter are none if they would be no fewer as terms.
    fast: Vec<u16>,
    slow: Vec<u16>,
    /// cos(jθ) of the fast frequencies, then sin(jθ), then the powers of j / [`HALF`] − 1 if any are slow: `[rows, SPAN]`.
    rows: Vec<f32>,
    /// ±φⁿ / n! with φ = [`HALF`]·θ, the terms of cosine and sine about the middle of a span: `[slow, TERMS]`.
    terms: Vec<f32>,
    /// cos(SPAN·i·θ), then sin, by channel, of the first spans: `[i, 2, D]`.
    spans: RwLock<Arc<Vec<f32>>>,
}

impl Turns {
    fn new(frequencies: &[f32]) -> Self {
        let mut channel_of: Vec<u16> = Vec::new();
        let mut distinct_of = Vec::with_capacity(frequencies.len());
        for (channel, theta) in frequencies.iter().enumerate() {
            let found = channel_of.iter().position(|&c| frequencies[usize::from(c)] == *theta);
            distinct_of.push(found.unwrap_or(channel_of.len()) as u16);
            if found.is_none() {
                channel_of.push(channel as u16);
            }
        }
        let mut steps = Vec::with_capacity(2 * SPAN * frequencies.len());
        (0..SPAN).for_each(|j| push_turn(frequencies, j, &mut steps));
        let theta = |place: u16| f64::from(frequencies[usize::from(channel_of[usize::from(place)])]);
        let places = 0..channel_of.len() as u16;
        let (mut slow, mut fast): (Vec<u16>, Vec<u16>) =
            places.clone().partition(|&place| theta(place).abs() * HALF as f64 <= SLOW);
        if 2 * slow.len() <= TERMS {
            (slow, fast) = (Vec::new(), places.collect());
        }
        let wave = |turn: fn(f64) -> f64| {
            fast.iter().flat_map(move |&place| (0..SPAN).map(move |j| turn(j as f64 * theta(place)) as f32))
        };
        let power = |n: usize| (0..SPAN).map(move |j| (j as f64 / HALF as f64 - 1.0).powi(n as i32) as f32);
        let powers = (0..if slow.is_empty() { 0 } else { TERMS }).flat_map(power);
        let rows = wave(f64::cos).chain(wave(f64::sin)).chain(powers).collect();
        let terms = slow.iter().flat_map(|&place| terms_of(HALF as f64 * theta(place))).collect();
        let spans = RwLock::new(Arc::new(Vec::new()));
        Self { frequencies: frequencies.to_vec(), distinct_of, channel_of, steps, fast, slow, rows, terms, spans }
    }

    /// Rows of the product of a span.
    fn rows(&self) -> usize {
        self.rows.len() / SPAN
    }

    /// The tables for these frequencies: those that somebody else has made, if they are still there.
    pub fn shared(frequencies: &[f32]) -> Result<Arc<Self>> {
        static MADE: Mutex<Vec<Weak<Turns>>> = Mutex::new(Vec::new());
        if !frequencies.iter().all(|theta| theta.is_finite()) {
            return Err(Error::value("frequencies", "finite numbers", "a NaN or an infinity"));
        }
        let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        made.retain(|turns| turns.strong_count() > 0);
        let same = |turns: &Arc<Self>| {
            turns.frequencies.len() == frequencies.len()
                && turns.frequencies.iter().zip(frequencies).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        if let Some(turns) = made.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(turns);
        }
        let turns = Arc::new(Self::new(frequencies));
        made.push(Arc::downgrade(&turns));
        Ok(turns)
    }

    fn channels(&self) -> usize {
        self.frequencies.len()
    }

    /// The distinct frequencies.
    pub fn distinct(&self) -> impl ExactSizeIterator<Item = f32> + Clone + '_ {
        self.channel_of.iter().map(|channel| self.frequencies[usize::from(*channel)])
    }

    /// For every channel, the place of its frequency among the distinct ones.
    pub fn distinct_of(&self) -> &[u16] {
        &self.distinct_of
    }

    /// cos(jθ), then sin(jθ), of the positions of a span: `[SPAN, 2, D]`.
    pub fn steps(&self) -> &[f32] {
        &self.steps
    }

    /// The table of the first spans, at least `count` of them: made once, by doubling.
    pub fn spans(&self, count: usize) -> Arc<Vec<f32>> {
        let width = 2 * self.channels();
        let have = Arc::clone(&self.spans.read().unwrap_or_else(std::sync::PoisonError::into_inner));
        if have.len() >= count * width {
            return have;
        }
        let mut spans = self.spans.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if spans.len() < count * width {
            let mut longer = Vec::with_capacity(2 * count * width);
            longer.extend_from_slice(&spans);
            (spans.len() / width..2 * count).for_each(|i| push_turn(&self.frequencies, SPAN * i, &mut longer));
            *spans = Arc::new(longer);
        }
        Arc::clone(&spans)
    }

    /// C(t) and S(t) of FORMAT.md §6 for every channel.
    fn turn(&self, spans: &[f32], position: i64, cosine: &mut [f32], sine: &mut [f32]) {
        let d = self.channels();
        let (i, j) = (position.div_euclid(SPAN as i64), position.rem_euclid(SPAN as i64) as usize);
        let (span, step) = (&spans[i.unsigned_abs() as usize * 2 * d..][..2 * d], &self.steps[j * 2 * d..][..2 * d]);
        // The cosine is even, the sine odd.
        let sign = if i < 0 { -1.0 } else { 1.0 };
        for c in 0..d {
            let (cos_i, sin_i, cos_j, sin_j) = (span[c], sign * span[d + c], step[c], step[d + c]);
            cosine[c] = cos_i * cos_j - sin_i * sin_j;
            sine[c] = sin_i * cos_j + cos_i * sin_j;
        }
    }
}

/// cos φx = Σ of the even terms times xⁿ, sin φx = Σ of the odd ones.
fn terms_of(phi: f64) -> [f32; TERMS] {
    let mut term = 1.0;
    std::array::from_fn(|n| {
        if n > 0 {
            term *= phi / n as f64;
        }
        (if n % 4 < 2 { term } else { -term }) as f32
    })
}

fn push_turn(frequencies: &[f32], position: usize, table: &mut Vec<f32>) {
    let angles = || frequencies.iter().map(|theta| position as f64 * f64::from(*theta));
    table.extend(angles().map(|angle| angle.cos() as f32));
    table.extend(angles().map(|angle| angle.sin() as f32));
}

/// Spans that hold the positions from `first` on, `count` of them.
pub fn spans_of(first: i64, count: usize) -> usize {
    let reach = |position: i64| position.div_euclid(SPAN as i64).unsigned_abs() as usize + 1;
    reach(first).max(reach(first + count as i64))
}

/// μ and ν of one head, and the tables.
#[derive(Clone, Debug)]
pub struct TurningMean {
    mean: Vec<f32>,
    quarter: Vec<f32>,
    pub turns: Arc<Turns>,
}

impl PartialEq for TurningMean {
    fn eq(&self, other: &Self) -> bool {
        self.mean == other.mean && self.quarter == other.quarter && Arc::ptr_eq(&self.turns, &other.turns)
    }
}

impl TurningMean {
    pub fn new(mean: Vec<f32>, quarter: Vec<f32>, turns: Arc<Turns>) -> Result<Self> {
        let expected = format!("{} finite numbers", turns.channels());
        for (name, values) in [("shift", &mean), ("shift_sine", &quarter)] {
            if values.len() != turns.channels() || !values.iter().all(|value| value.is_finite()) {
                return Err(Error::value(name, expected, format!("{} numbers", values.len())));
            }
        }
        Ok(Self { mean, quarter, turns })
    }

    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// μ
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// ν: μ turned by a quarter.
    pub fn quarter(&self) -> &[f32] {
        &self.quarter
    }

    /// Writes m(position) to `mean`; `spans` holds at least [`spans_of`] it.
    pub fn at(&self, spans: &[f32], position: i64, mean: &mut [f32]) {
        let d = self.mean.len();
        let mut buffer = [0.0; 2 * crate::format::MAX_HEAD_DIM];
        let (cosine, rest) = buffer.split_at_mut(d);
        let sine = &mut rest[..d];
        self.turns.turn(spans, position, cosine, sine);
        for c in 0..d {
            mean[c] = self.mean[c] * cosine[c] + self.quarter[c] * sine[c];
        }
    }

    /// Amplitudes of a query.
    pub fn waves(&self) -> usize {
        2 * self.turns.channel_of.len()
    }

    /// The amplitudes `[waves]` of q·m(t) as a sum of waves: A of the cosines, then B of the sines, with t counted from `origin`.
    pub fn amplitudes(&self, query: &[f32], spans: &[f32], origin: i64, amplitudes: &mut [f32]) {
        let d = self.mean.len();
        let mut buffer = [0.0; 2 * crate::format::MAX_HEAD_DIM];
        let (cosine, rest) = buffer.split_at_mut(d);
        let sine = &mut rest[..d];
        self.turns.turn(spans, origin, cosine, sine);
        amplitudes.fill(0.0);
        let (a, b) = amplitudes.split_at_mut(self.turns.channel_of.len());
        for c in 0..d {
            let f = usize::from(self.turns.distinct_of[c]);
            let (of_cosine, of_sine) = (query[c] * self.mean[c], query[c] * self.quarter[c]);
            a[f] += of_cosine * cosine[c] + of_sine * sine[c];
            b[f] += of_sine * cosine[c] - of_cosine * sine[c];
        }
    }

    /// Rows of the scratch of [`Self::score_panel`].
    pub fn panel_rows(&self) -> usize {
        self.turns.rows() + 2 * self.turns.slow.len()
    }

    /// [`Self::score_span`] of queries side by side: `amplitudes` `[waves, width]`, `scratch` `[panel_rows, width]`, `scores` `[count, width]`,
    /// with a query in every column and `width` a multiple of 16.
    #[allow(clippy::too_many_arguments)]
    pub fn score_panel(
        &self,
        isa: Isa,
        spans: &[f32],
        first: usize,
        amplitudes: &[f32],
        scratch: &mut [f32],
        width: usize,
        scores: &mut [f32],
    ) {
        let (d, rows, turns) = (self.mean.len(), self.turns.rows(), &*self.turns);
        let (count, fast, slow) = (scores.len() / width, turns.fast.len(), turns.slow.len());
        debug_assert!(first % SPAN + count <= SPAN, "positions {first}.. of more than one span");
        let span = &spans[first / SPAN * 2 * d..][..2 * d];
        let middle = &turns.steps[HALF * 2 * d..][..2 * d];
        let (of_cosine, of_sine) = amplitudes.split_at(self.waves() / 2 * width);
        let (terms, slow_waves) = scratch.split_at_mut(rows * width);
        let (waves, powers) = terms.split_at_mut(2 * fast * width);
        let turn = |place: u16, middle: Option<&[f32]>, i: usize, (a, b): (&mut [f32], &mut [f32])| {
            let (f, channel) = (usize::from(place), usize::from(turns.channel_of[usize::from(place)]));
            let mut to = (span[channel], span[d + channel]);
            if let Some(middle) = middle {
                to = turn_on(to, (middle[channel], middle[d + channel]));
            }
            let from = f * width..(f + 1) * width;
            let (a, b) = (&mut a[i * width..][..width], &mut b[i * width..][..width]);
            panels::turn(isa, &of_cosine[from.clone()], &of_sine[from], to, a, b);
        };
        let (a, b) = waves.split_at_mut(fast * width);
        turns.fast.iter().enumerate().for_each(|(i, &place)| turn(place, None, i, (a, b)));
        let (a, b) = slow_waves.split_at_mut(slow * width);
        turns.slow.iter().enumerate().for_each(|(i, &place)| turn(place, Some(middle), i, (a, b)));
        // The even terms are of the cosines, the odd ones of the sines.
        powers.fill(0.0);
        for (n, power) in powers.chunks_exact_mut(width).enumerate() {
            let product = panels::Product { rows: 1, terms: slow, row_stride: 0, term_stride: TERMS, width };
            panels::add_product(isa, &product, &turns.terms[n..], if n % 2 == 0 { a } else { b }, None, power);
        }
        let product = panels::Product { rows: count, terms: rows, row_stride: 1, term_stride: SPAN, width };
        panels::add_product(isa, &product, &turns.rows[first % SPAN..], terms, None, scores);
    }

    /// Adds q·m(t) of `count` positions from `origin + first` on, all of one span counted from `origin`, to `scores` `[queries, stride]` (whole
    /// vectors of 16). `amplitudes` and `scratch` are `[queries, waves]`, the amplitudes counted from `origin`.
    #[allow(clippy::too_many_arguments)]
    pub fn score_span(
        &self,
        isa: Isa,
        spans: &[f32],
        first: usize,
        count: usize,
        amplitudes: &[f32],
        scratch: &mut [f32],
        scores: &mut [f32],
        stride: usize,
    ) {
        let (d, waves, rows) = (self.mean.len(), self.waves(), self.turns.rows());
        debug_assert!(first % SPAN + count <= SPAN, "positions {first}.. of more than one span");
        let span = &spans[first / SPAN * 2 * d..][..2 * d];
        let middle = &self.turns.steps[HALF * 2 * d..][..2 * d];
        let (half, fast) = (waves / 2, self.turns.fast.len());
        for (from, to) in amplitudes.chunks_exact(waves).zip(scratch.chunks_exact_mut(rows)) {
            let turned = |place: u16| {
                let (f, channel) = (usize::from(place), usize::from(self.turns.channel_of[usize::from(place)]));
                (turn_waves((from[f], from[half + f]), span[channel], span[d + channel]), channel)
            };
            let (waves, terms) = to.split_at_mut(2 * fast);
            for (f, &place) in self.turns.fast.iter().enumerate() {
                ((waves[f], waves[fast + f]), _) = turned(place);
            }
            terms.fill(0.0);
            for (&place, own) in self.turns.slow.iter().zip(self.turns.terms.chunks_exact(TERMS)) {
                let (amplitudes, channel) = turned(place);
                let (a, b) = turn_waves(amplitudes, middle[channel], middle[d + channel]);
                for (n, (term, own)) in terms.iter_mut().zip(own).enumerate() {
                    *term += if n % 2 == 0 { a } else { b } * own;
                }
            }
        }
        let product = matmul::WeighTile {
            queries: amplitudes.len() / waves,
            weight_stride: rows,
            rows,
            width: SPAN,
            first: first % SPAN,
            count: count.next_multiple_of(LANES),
            output_first: 0,
            output_stride: stride,
        };
        matmul::weigh_tile(isa, &product, scratch, &self.turns.rows, scores);
    }
}

/// Amplitudes of a cosine and a sine counted from a position whose own are given: those counted from there.
fn turn_waves((a, b): (f32, f32), cosine: f32, sine: f32) -> (f32, f32) {
    (a * cosine + b * sine, b * cosine - a * sine)
}

/// Cosine and sine of the sum of two angles.
fn turn_on((cos_a, sin_a): (f32, f32), (cos_b, sin_b): (f32, f32)) -> (f32, f32) {
    (cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(d: usize) -> TurningMean {
        let frequencies: Vec<f32> = (0..d).map(|c| 10000f32.powf(-((c % (d / 2)) as f32) / (d / 2) as f32)).collect();
        let mean: Vec<f32> = (0..d).map(|c| (c as f32 * 1.3).sin() * 5.0).collect();
        let quarter = (0..d).map(|c| if c < d / 2 { -mean[c + d / 2] } else { mean[c - d / 2] }).collect();
        TurningMean::new(mean, quarter, Turns::shared(&frequencies).unwrap()).unwrap()
    }

    #[test]
    fn a_mean_turns_as_the_rotary_embedding_turns_it() {
        let d = 64;
        let turning = example(d);
        let spans = turning.turns.spans(spans_of(-700, 9000));
        for position in [0i64, 1, 255, 256, 257, 5000, 8191, -1, -256, -700] {
            let mut found = vec![0.0; d];
            turning.at(&spans, position, &mut found);
            for (c, found) in found.into_iter().enumerate() {
                let angle = position as f64 * f64::from(turning.turns.frequencies[c]);
                let expected = f64::from(turning.mean[c]) * angle.cos() + f64::from(turning.quarter[c]) * angle.sin();
                assert!((f64::from(found) - expected).abs() < 3e-6, "{position} {c}");
            }
        }
    }

    #[test]
    fn scores_of_a_span_are_the_products_with_every_mean() {
        let d = 64;
        let turning = example(d);
        let spans = turning.turns.spans(40);
        let query: Vec<f32> = (0..3 * d).map(|i| (i as f32 * 0.37).cos()).collect();
        for origin in [5i64, 0, -300] {
            let mut amplitudes = vec![0.0; 3 * turning.waves()];
            for (query, amplitudes) in query.chunks(d).zip(amplitudes.chunks_mut(turning.waves())) {
                turning.amplitudes(query, &spans, origin, amplitudes);
            }
            for isa in Isa::available() {
                for (first, count) in [(2 * SPAN, 256), (2 * SPAN, 100), (2 * SPAN + 128, 128), (0, 1)] {
                    let mut scores = vec![1.0; 3 * SPAN];
                    let mut scratch = vec![0.0; amplitudes.len()];
                    turning.score_span(isa, &spans, first, count, &amplitudes, &mut scratch, &mut scores, SPAN);
                    let mut mean = vec![0.0; d];
                    for j in 0..count {
                        turning.at(&spans, origin + (first + j) as i64, &mut mean);
                        for (q, query) in query.chunks(d).enumerate() {
                            let exact: f64 = query.iter().zip(&mean).map(|(a, b)| f64::from(a * b)).sum();
                            let found = f64::from(scores[q * SPAN + j]) - 1.0;
                            assert!((found - exact).abs() < 2e-4, "{isa} {origin} {j}: {found} {exact}");
                        }
                    }
                }
            }
        }
    }

    /// Slow frequencies as a polynomial, none, a few that stay waves, and all; bases of Llama 2 and of Qwen2.
    #[test]
    fn slow_waves_are_a_polynomial_within_rounding() {
        let spread = |base: f64| (0..128).map(move |c| base.powf(-f64::from(c % 64) / 64.0) as f32).collect::<Vec<_>>();
        let few = [vec![1.0f32; 56], vec![0.001, 0.002, 0.0, 0.003, 0.001, 0.002, 0.0, 0.003]].concat();
        for (frequencies, expected) in [
            (spread(1e6), 2 * 26 + TERMS),
            (spread(1e4), 2 * 39 + TERMS),
            (vec![0.1; 16], 2),
            (few, 10),
            ((0..32).map(|c| 1e-4 * c as f32).collect(), TERMS),
        ] {
            let d = frequencies.len();
            let mean: Vec<f32> = (0..d).map(|c| (c as f32 * 1.3).sin() * 20.0).collect();
            let quarter = mean.iter().rev().copied().collect();
            let turning = TurningMean::new(mean, quarter, Turns::shared(&frequencies).unwrap()).unwrap();
            assert_eq!(turning.turns.rows(), expected);
            let spans = turning.turns.spans(20);
            let query: Vec<f32> = (0..d).map(|i| (i as f32 * 0.37).cos()).collect();
            let (mut amplitudes, mut scratch) = (vec![0.0; turning.waves()], vec![0.0; turning.waves()]);
            turning.amplitudes(&query, &spans, 5, &mut amplitudes);
            let size: f64 = amplitudes.iter().map(|x| f64::from(x.abs())).sum();
            for first in [0, 17 * SPAN] {
                let mut scores = vec![0.0; SPAN];
                turning.score_span(Isa::best(), &spans, first, SPAN, &amplitudes, &mut scratch, &mut scores, SPAN);
                for (j, score) in scores.into_iter().enumerate() {
                    let position = (5 + first + j) as f64;
                    let of = |c: usize| {
                        let angle = position * f64::from(frequencies[c]);
                        let mean =
                            f64::from(turning.mean[c]) * angle.cos() + f64::from(turning.quarter[c]) * angle.sin();
                        f64::from(query[c]) * mean
                    };
                    let exact: f64 = (0..d).map(of).sum();
                    assert!((f64::from(score) - exact).abs() < 1e-6 * size, "{first} {j}: {score} {exact} of {size}");
                }
            }
        }
    }

    /// Queries in columns; of a base whose slow frequencies are a polynomial, and of one without.
    #[test]
    fn queries_side_by_side_score_as_in_rows() {
        let (d, width, queries) = (64, 32, 19);
        for base in [1e6f32, 4.0] {
            let frequencies: Vec<f32> = (0..d).map(|c| base.powf(-((c % 32) as f32) / 32.0)).collect();
            let mean: Vec<f32> = (0..d).map(|c| (c as f32 * 1.3).sin() * 5.0).collect();
            let quarter = mean.iter().rev().copied().collect();
            let turning = TurningMean::new(mean, quarter, Turns::shared(&frequencies).unwrap()).unwrap();
            let spans = turning.turns.spans(4);
            let (waves, count) = (turning.waves(), 100);
            let query: Vec<f32> = (0..queries * d).map(|i| (i as f32 * 0.37).cos()).collect();
            let mut amplitudes = vec![0.0; queries * waves];
            let mut side_by_side = vec![0.0; waves * width];
            for (q, query) in query.chunks(d).enumerate() {
                let own = &mut amplitudes[q * waves..][..waves];
                turning.amplitudes(query, &spans, 3, own);
                own.iter().enumerate().for_each(|(wave, value)| side_by_side[wave * width + q] = *value);
            }
            for isa in Isa::available() {
                for first in [0, SPAN + 128, 2 * SPAN + 17] {
                    let mut scores = vec![1.0; queries * SPAN];
                    let mut scratch = vec![0.0; queries * waves];
                    turning.score_span(isa, &spans, first, count, &amplitudes, &mut scratch, &mut scores, SPAN);
                    let mut found = vec![1.0; count * width];
                    let mut scratch = vec![0.0; turning.panel_rows() * width];
                    turning.score_panel(isa, &spans, first, &side_by_side, &mut scratch, width, &mut found);
                    for (q, scores) in scores.chunks(SPAN).enumerate() {
                        for (t, score) in scores[..count].iter().enumerate() {
                            let found = found[t * width + q];
                            assert!((found - score).abs() < 3e-4, "{isa} {base} {first} {q} {t}: {found} {score}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn tables_are_shared_and_refused() {
        let a = example(32);
        let b = example(32);
        assert!(Arc::ptr_eq(&a.turns, &b.turns));
        assert_eq!(a, b);
        assert_eq!(a.waves(), 32);
        assert!(Turns::shared(&[f32::NAN]).is_err());
        assert!(TurningMean::new(vec![0.0; 3], vec![0.0; 32], Arc::clone(&a.turns)).is_err());
    }
}

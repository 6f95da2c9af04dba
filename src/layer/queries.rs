//! What the queries of a layer put on each channel of its keys (FORMAT.md §4): an error of a channel that no query looks at costs nothing,
//! so its scale may be coarse. Mean squares of the queries are gathered until a block of keys needs them, then fixed.

use std::sync::Arc;

use half::f16;

use crate::format::MAX_HEAD_DIM;
use crate::tensor::TensorView;

/// Tokens whose queries must have been seen before they say anything.
pub const LEAST_TOKENS: usize = 32;
/// Of the mean square over all channels: less counts as this much.
const FLOOR: f64 = 1e-6;

/// The queries of one (sequence, kv head), and what has been made of them.
#[derive(Clone, Default)]
pub struct QueryWeights {
    squares: Vec<f64>,
    tokens: usize,
    factors: Option<Arc<[f16]>>,
}

impl QueryWeights {
    /// Factors on the scales of the channels, once they are fixed.
    pub fn factors(&self) -> Option<&[f16]> {
        self.factors.as_deref()
    }

    /// Address and bytes of what is held, for counting what sequences share once.
    pub fn held(&self) -> Option<(usize, usize)> {
        self.factors.as_ref().map(|factors| (Arc::as_ptr(factors).cast::<u8>().addr(), 2 * factors.len()))
    }

    /// Takes part of the queries `[1, heads, n, D]` from row `first` on; rows that are not finite say nothing.
    pub fn observe(&mut self, query: &TensorView, batch: usize, heads: std::ops::Range<usize>, first: usize) {
        if self.factors.is_some() || first >= query.tokens() {
            return;
        }
        let mut row = [0.0f32; MAX_HEAD_DIM];
        let row = &mut row[..query.width()];
        self.squares.resize(query.width(), 0.0);
        for head in heads {
            for token in first..query.tokens() {
                query.read_row_f32(batch, head, token, row);
                if row.iter().all(|value| value.is_finite()) {
                    self.squares.iter_mut().zip(&*row).for_each(|(sum, &q)| *sum += f64::from(q) * f64::from(q));
                }
            }
        }
        self.tokens += query.tokens() - first;
    }

    /// Fixes the factors (w̄ / w)^exponent, if enough queries were seen.
    pub fn fix(&mut self, exponent: f32) {
        if self.factors.is_some() || self.tokens < LEAST_TOKENS {
            return;
        }
        let mean = self.squares.iter().sum::<f64>() / self.squares.len() as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return;
        }
        let logs: Vec<f64> = self.squares.iter().map(|square| 0.5 * square.max(FLOOR * mean).ln()).collect();
        let middle = logs.iter().sum::<f64>() / logs.len() as f64;
        let factor = |log: &f64| f16::from_f64(((middle - log) * f64::from(exponent)).exp());
        self.factors = Some(logs.iter().map(factor).collect());
        self.squares = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(rows: &[[f32; 4]], times: usize) -> QueryWeights {
        let data: Vec<f32> = rows.iter().flatten().copied().collect();
        let mut weights = QueryWeights::default();
        for _ in 0..times {
            weights.observe(&TensorView::from_slice(&data, [1, 1, rows.len(), 4]), 0, 0..1, 0);
        }
        weights
    }

    #[test]
    fn channels_that_queries_look_at_get_finer_scales() {
        let mut weights = observed(&[[1.0, 4.0, 0.25, 1.0], [1.0, -4.0, 0.25, -1.0]], 16);
        weights.fix(0.5);
        let factors: Vec<f32> = weights.factors().unwrap().iter().map(|factor| factor.to_f32()).collect();
        assert_eq!(factors, [1.0, 0.5, 2.0, 1.0]);
        assert_eq!(weights.held().unwrap().1, 8);
    }

    #[test]
    fn few_queries_and_empty_ones_say_nothing() {
        let mut weights = observed(&[[1.0, 4.0, 0.25, 1.0]], LEAST_TOKENS - 1);
        weights.fix(0.5);
        assert!(weights.factors().is_none());
        let mut weights = observed(&[[0.0; 4]], LEAST_TOKENS);
        weights.fix(0.5);
        assert!(weights.factors().is_none());
    }

    #[test]
    fn fixed_factors_stay() {
        let mut weights = observed(&[[1.0, 4.0, f32::NAN, 1.0], [1.0, 2.0, 1.0, 1.0]], 32);
        weights.fix(0.5);
        let before = weights.factors().unwrap().to_vec();
        weights.observe(&TensorView::from_slice(&[9.0f32, 1.0, 1.0, 1.0], [1, 1, 1, 4]), 0, 0..1, 0);
        weights.fix(0.5);
        assert_eq!(weights.factors().unwrap(), before);
        assert!(before[1] < before[0] && before[0] == before[2]);
    }
}

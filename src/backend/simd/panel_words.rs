//! The products of `panels.rs` with 16-bit integers: twice as many an instruction as in f32, where the instruction set has them
//! ([`Lanes::WORDS`]) and queries of 16 bits say that no more digits are wanted. What is rounded, and how far, is what `words.rs` says.
//!
//! A word pair is a u32: the first in its low half. Levels of packed rows, already in f32, become words of steps that the caller knows;
//! queries and weights become words of steps of their own, a *unit* for each column. Shapes: words of queries `[terms, width]`, of keys
//! `[rows, terms]` with [`terms_of`] terms; of weights `[pairs, width]`, of values `[pairs, channels]` with a pair for two neighbouring rows.

use super::panels::{Operands, Product, add_blocks, scaled_weight};
use super::words::{LARGEST_WEIGHT, TINY, WEIGHED_ROWS, pair, round};
use super::{LANES, Lanes, multiversion};

multiversion! {
    /// Words of rows of levels `[rows, channels]`, of steps of `unit`, in the order of a query's.
    pub(crate) fn key_words(levels: &[f32], channels: usize, unit: f32, words: &mut [u32]) = key_words_kernel;
    /// Words of rows of levels `[rows, channels]`, of steps of `unit`; of an odd number of rows the last is paired with zeros.
    pub(crate) fn value_words(levels: &[f32], channels: usize, unit: f32, words: &mut [u32]) = value_words_kernel;
    /// Words of folded queries `[channels, width]`, the largest being `steps`, and their units; false if one is not finite.
    pub(crate) fn query_words(queries: &[f32], steps: f32, words: &mut [u32], units: &mut [f32]) -> bool = query_words_kernel;
    /// Words of `scaled`, which become weights `[rows, width]`, all ≥ 0, times the rows' scales as by `panels::scale_weights`, and their
    /// units; false if one is not finite.
    pub(crate) fn weight_words(weights: &[f32], scales: &[f32], scaled: &mut [f32], words: &mut [u32], units: &mut [f32]) -> bool = weight_words_kernel;
    /// `out[j] += scales[j] · unit · units · Σ_k a[j, k] · panel[k]`, as in `panels::add_product`.
    pub(crate) fn add_product(product: &Product, factors: &Factors, a: &[u32], panel: &[u32], out: &mut [f32]) = add_product_kernel;
}

/// What a product of words is worth.
pub(crate) struct Factors<'a> {
    /// Of rows; without, 1.
    pub scales: Option<&'a [f32]>,
    /// Of a step of levels, and of a step of every column.
    pub unit: f32,
    pub units: &'a [f32],
}

/// Terms of a product of `channels` channels: a pair has two of neighbouring sixteens.
pub(crate) const fn terms_of(channels: usize) -> usize {
    channels.div_ceil(2 * LANES) * LANES
}

#[inline(always)]
unsafe fn store<S: Lanes>(words: S::I, target: *mut u32) {
    // SAFETY: the caller's.
    unsafe { S::store(S::from_bits(words), target.cast()) }
}

#[inline(always)]
unsafe fn key_words_kernel<S: Lanes>(levels: &[f32], channels: usize, unit: f32, words: &mut [u32]) {
    let (rows, terms) = (levels.len() / channels, terms_of(channels));
    assert!(levels.len() == rows * channels && channels.is_multiple_of(LANES) && words.len() >= rows * terms);
    // SAFETY: vectors of sixteen channels, of sixteen terms of rows inside the slices; the caller has S's features.
    unsafe {
        let factor = S::splat(1.0 / unit);
        for t in 0..rows {
            let (row, target) = (levels.as_ptr().add(t * channels), words.as_mut_ptr().add(t * terms));
            let mut k = 0;
            while k < terms {
                let low = round::<S>(S::load(row.add(2 * k)), factor);
                let second = 2 * k + LANES;
                let high =
                    if second < channels { round::<S>(S::load(row.add(second)), factor) } else { S::splat_u32(0) };
                store::<S>(pair::<S>(low, high), target.add(k));
                k += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn value_words_kernel<S: Lanes>(levels: &[f32], channels: usize, unit: f32, words: &mut [u32]) {
    let rows = levels.len() / channels;
    assert!(levels.len() == rows * channels && channels.is_multiple_of(LANES));
    assert!(words.len() >= rows.div_ceil(2) * channels);
    // SAFETY: as for `key_words_kernel`.
    unsafe {
        let factor = S::splat(1.0 / unit);
        let mut t = 0;
        while t < rows {
            let (row, target) = (levels.as_ptr().add(t * channels), words.as_mut_ptr().add(t / 2 * channels));
            let mut c = 0;
            while c < channels {
                let low = round::<S>(S::load(row.add(c)), factor);
                let high =
                    if t + 1 < rows { round::<S>(S::load(row.add(channels + c)), factor) } else { S::splat_u32(0) };
                store::<S>(pair::<S>(low, high), target.add(c));
                c += LANES;
            }
            t += 2;
        }
    }
}

#[inline(always)]
unsafe fn query_words_kernel<S: Lanes>(queries: &[f32], steps: f32, words: &mut [u32], units: &mut [f32]) -> bool {
    let width = units.len();
    assert!(width > 0 && width.is_multiple_of(LANES) && queries.len().is_multiple_of(width * LANES));
    let channels = queries.len() / width;
    assert!(words.len() >= terms_of(channels) * width);
    let mut all_finite = true;
    // SAFETY: vectors of rows of `width`, a multiple of 16, inside the slices; the caller has S's features.
    unsafe {
        let mut q = 0;
        while q < width {
            let column = queries.as_ptr().add(q);
            let mut bits = S::splat_u32(0);
            for row in 0..channels {
                bits = S::max_magnitude(bits, S::load(column.add(row * width)));
            }
            all_finite &= S::all_finite(bits);
            // The bits of a magnitude are larger where it is.
            let factor = column_factor::<S>(S::from_bits(bits), steps, units.as_mut_ptr().add(q));
            for k in 0..terms_of(channels) {
                let first = k / LANES * 2 * LANES + k % LANES;
                let low = round::<S>(S::load(column.add(first * width)), factor);
                let high = if first + LANES < channels {
                    round::<S>(S::load(column.add((first + LANES) * width)), factor)
                } else {
                    S::splat_u32(0)
                };
                store::<S>(pair::<S>(low, high), words.as_mut_ptr().add(k * width + q));
            }
            q += LANES;
        }
    }
    all_finite
}

#[inline(always)]
unsafe fn weight_words_kernel<S: Lanes>(
    weights: &[f32],
    scales: &[f32],
    scaled: &mut [f32],
    words: &mut [u32],
    units: &mut [f32],
) -> bool {
    let (rows, width) = (scales.len(), units.len());
    assert!(width > 0 && width.is_multiple_of(LANES) && weights.len() == rows * width && scaled.len() == rows * width);
    assert!(rows <= WEIGHED_ROWS && words.len() >= rows.div_ceil(2) * width);
    let mut all_finite = true;
    // SAFETY: as for `query_words_kernel`.
    unsafe {
        let mut q = 0;
        while q < width {
            let (from, column) = (weights.as_ptr().add(q), scaled.as_mut_ptr().add(q));
            let mut bits = S::splat_u32(0);
            for (t, scale) in scales.iter().enumerate() {
                let product = scaled_weight::<S>(S::load(from.add(t * width)), S::splat(*scale));
                S::store(product, column.add(t * width));
                bits = S::max_magnitude(bits, product);
            }
            all_finite &= S::all_finite(bits);
            let factor = column_factor::<S>(S::from_bits(bits), LARGEST_WEIGHT, units.as_mut_ptr().add(q));
            let mut t = 0;
            while t < rows {
                let low = round::<S>(S::load(column.add(t * width)), factor);
                let high = if t + 1 < rows {
                    round::<S>(S::load(column.add((t + 1) * width)), factor)
                } else {
                    S::splat_u32(0)
                };
                store::<S>(pair::<S>(low, high), words.as_mut_ptr().add(t / 2 * width + q));
                t += 2;
            }
            q += LANES;
        }
    }
    all_finite
}

/// What makes the largest numbers of columns `steps`, with the inverse of it in `units`.
#[inline(always)]
unsafe fn column_factor<S: Lanes>(largest: S::F, steps: f32, units: *mut f32) -> S::F {
    // SAFETY: the caller's, and sixteen units.
    unsafe {
        let mut factors = [0.0f32; LANES];
        S::store(S::max(largest, S::splat(TINY)), units);
        for (lane, factor) in factors.iter_mut().enumerate() {
            *factor = steps / *units.add(lane);
            *units.add(lane) /= steps;
        }
        S::load(factors.as_ptr())
    }
}

struct Words<'a> {
    product: &'a Product,
    factors: &'a Factors<'a>,
    a: &'a [u32],
    panel: &'a [u32],
}

#[inline(always)]
unsafe fn add_product_kernel<S: Lanes>(
    product: &Product,
    factors: &Factors,
    a: &[u32],
    panel: &[u32],
    out: &mut [f32],
) {
    if product.is_empty() {
        return;
    }
    product.check(a.len(), panel.len(), out.len());
    assert!(factors.scales.is_none_or(|scales| scales.len() >= product.rows) && factors.units.len() == product.width);
    // SAFETY: by the assertions every block lies inside the slices; the caller has S's features.
    unsafe { add_blocks::<S, _>(product, &Words { product, factors, a, panel }, out) }
}

impl Operands for Words<'_> {
    #[inline(always)]
    unsafe fn add_block<S: Lanes, const V: usize, const J: usize>(&self, q: usize, j: usize, out: &mut [f32]) {
        let (p, factors) = (self.product, self.factors);
        // SAFETY: q + 16·V ≤ width, j + J ≤ rows, and the slices hold all of the product (see `add_product_kernel`).
        unsafe {
            let mut element = self.a.as_ptr().add(j * p.row_stride);
            let mut queries = self.panel.as_ptr().add(q);
            let mut sums = [[S::splat_u32(0); V]; J];
            let mut k = 0;
            while k < p.terms {
                let mut lanes = [S::splat_u32(0); V];
                let mut v = 0;
                while v < V {
                    lanes[v] = S::load_u32(queries.add(v * LANES).cast());
                    v += 1;
                }
                let mut i = 0;
                while i < J {
                    let words = S::splat_u32(*element.add(i * p.row_stride));
                    let mut v = 0;
                    while v < V {
                        sums[i][v] = S::dot_words(sums[i][v], words, lanes[v]);
                        v += 1;
                    }
                    i += 1;
                }
                element = element.wrapping_add(p.term_stride);
                queries = queries.wrapping_add(p.width);
                k += 1;
            }
            let target = out.as_mut_ptr().add(j * p.width + q);
            let mut i = 0;
            while i < J {
                let factor = S::splat(factors.unit * factors.scales.map_or(1.0, |scales| scales[j + i]));
                let mut v = 0;
                while v < V {
                    let unit = S::mul(factor, S::load(factors.units.as_ptr().add(q + v * LANES)));
                    let target = target.add(i * p.width + v * LANES);
                    S::store(S::mul_add(unit, S::signed_to_f32(sums[i][v]), S::load(target)), target);
                    v += 1;
                }
                i += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::simd::Isa;
    use crate::backend::simd::words::{LARGEST_LEVEL, largest_word};

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    fn have_words() -> impl Iterator<Item = Isa> {
        Isa::available().into_iter().filter(|isa| isa.has_words())
    }

    /// Queries with rows of levels; only where an instruction set has words.
    #[test]
    fn scores_are_those_in_f64_to_the_steps() {
        for isa in have_words() {
            for (channels, rows, width) in [(16, 1, 16), (64, 6, 64), (80, 7, 48), (112, 9, 32), (128, 33, 80)] {
                let (unit, terms) = (3.0 / LARGEST_LEVEL, terms_of(channels));
                let (levels, scales) = (numbers(rows * channels, 1.0), numbers(rows, 2.0));
                let mut queries = numbers(channels * width, 3.0);
                (0..channels).for_each(|c| queries[c * width + 5] = 0.0);
                let (mut keys, mut words) = (vec![9; rows * terms], vec![9; terms * width]);
                let mut units = vec![0.0; width];
                key_words(isa, &levels, channels, unit, &mut keys);
                let steps = largest_word(channels, LARGEST_LEVEL);
                assert!(query_words(isa, &queries, steps, &mut words, &mut units));
                let product = Product { rows, terms, row_stride: terms, term_stride: 1, width };
                let mut out = vec![1.0; rows * width];
                let factors = Factors { scales: Some(&scales), unit, units: &units };
                add_product(isa, &product, &factors, &keys, &words, &mut out);
                for (i, found) in out.iter().enumerate() {
                    let (t, q) = (i / width, i % width);
                    let product = |c: usize| f64::from(levels[t * channels + c]) * f64::from(queries[c * width + q]);
                    let exact: f64 = (0..channels).map(product).sum();
                    let most: f64 = 3.0 * (0..channels).map(|c| f64::from(queries[c * width + q].abs())).sum::<f64>();
                    let error = f64::from(*found) - 1.0 - f64::from(scales[t]) * exact;
                    assert!(error.abs() <= 6e-4 * f64::from(scales[t].abs()) * most + 1e-5, "{isa}, {i}: {error}");
                }
                queries[channels / 2 * width + 7] = f32::INFINITY;
                assert!(!query_words(isa, &queries, steps, &mut words, &mut units));
            }
        }
    }

    /// Weights with rows of levels, an odd number of them too.
    #[test]
    fn weighted_sums_are_those_in_f64_to_the_steps() {
        for isa in have_words() {
            for (channels, rows, width) in [(16, 1, 16), (64, 6, 64), (80, 7, 48), (112, 33, 32), (128, 64, 80)] {
                let unit = 3.0 / LARGEST_LEVEL;
                let levels = numbers(rows * channels, 1.0);
                let mut scales: Vec<f32> = numbers(rows, 2.0).into_iter().map(f32::abs).collect();
                let mut weights: Vec<f32> = numbers(rows * width, 3.0).into_iter().map(|x| (x / 3.0).powi(8)).collect();
                (0..rows).for_each(|t| weights[t * width + 5] = 0.0);
                let pairs = rows.div_ceil(2);
                let (mut values, mut words) = (vec![9; pairs * channels], vec![9; pairs * width]);
                let (mut units, mut scaled) = (vec![0.0; width], vec![0.0; rows * width]);
                value_words(isa, &levels, channels, unit, &mut values);
                assert!(weight_words(isa, &weights, &scales, &mut scaled, &mut words, &mut units));
                let product = Product { rows: channels, terms: pairs, row_stride: 1, term_stride: channels, width };
                let mut out = vec![1.0; channels * width];
                let factors = Factors { scales: None, unit, units: &units };
                add_product(isa, &product, &factors, &values, &words, &mut out);
                for (i, found) in out.iter().enumerate() {
                    let (c, q) = (i / width, i % width);
                    let weight = |t: usize| f64::from(weights[t * width + q]) * f64::from(scales[t]);
                    let exact: f64 = (0..rows).map(|t| weight(t) * f64::from(levels[t * channels + c])).sum();
                    let most: f64 = 3.0 * (0..rows).map(weight).sum::<f64>();
                    let error = f64::from(*found) - 1.0 - exact;
                    assert!(error.abs() <= 6e-4 * most + 1e-6, "{isa}, {i}: {error}");
                }
                // A scale that is not a number breaks the weights of its row, unless they are 0.
                scales[0] = f32::NAN;
                assert!(!weight_words(isa, &weights, &scales, &mut scaled, &mut words, &mut units));
                weights[..width].fill(0.0);
                assert!(weight_words(isa, &weights, &scales, &mut scaled, &mut words, &mut units));
            }
        }
    }
}

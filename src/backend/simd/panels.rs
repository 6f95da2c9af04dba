//! Attention of many queries, which lie side by side in lanes: nothing is ever summed across a vector.
//!
//! Shapes: a *panel* is `[rows, width]` with a query in every column; rows are channels (of queries, of outputs) or tokens (of scores, of
//! weights). `width` is a multiple of 16. What there is one of for every query is `[width]`, what there is one of for every row `[rows]`.

use super::{LANES, Lanes, multiversion};
use crate::transform::{hadamard_block, hadamard_norm};

multiversion! {
    /// `out[j] += scales[j] · Σ_k a[j, k] · panel[k]`; without scales, 1.
    pub(crate) fn add_product(product: &Product, a: &[f32], panel: &[f32], scales: Option<&[f32]>, out: &mut [f32]) = add_product_kernel;
    /// `out[j] = factors[j] · rows[j]`.
    pub(crate) fn scale_rows(rows: &[f32], factors: &[f32], out: &mut [f32]) = scale_rows_kernel;
    /// `Rotation::Hadamard` of every column of `channels` rows.
    pub(crate) fn rotate(channels: usize, panel: &mut [f32]) = rotate_kernel;
    /// `scores[t] = shift − scales[t]² · noise`.
    pub(crate) fn begin_scores(shift: &[f32], noise: &[f32], scales: &[f32], scores: &mut [f32]) = begin_scores_kernel;
    /// −∞ in row t of every query with t > `last`.
    pub(crate) fn hide(last: &[f32], scores: &mut [f32]) = hide_kernel;
    /// Scores become weights e^(score − reference), 0 for a query that sees nothing.
    pub(crate) fn soften(scores: &mut [f32], softmax: &mut Softmax) = soften_kernel;
    /// `scaled[t] = scales[t] · weights[t]`, and 0 where the weight is 0: it hides its row, whatever the row's scale is.
    pub(crate) fn scale_weights(weights: &[f32], scales: &[f32], scaled: &mut [f32]) = scale_weights_kernel;
    /// `sums += Σ_t factors[t] · rows[t]`.
    pub(crate) fn add_rows(rows: &[f32], factors: &[f32], sums: &mut [f32]) = add_rows_kernel;
    /// `panel[j] *= factors`.
    pub(crate) fn multiply_columns(factors: &[f32], panel: &mut [f32]) = multiply_columns_kernel;
    /// `out[c] += scale[c] · rows[c] + shift[c] · weights`.
    pub(crate) fn add_affine(rows: &[f32], scale: &[f32], weights: &[f32], shift: &[f32], out: &mut [f32]) = add_affine_kernel;
    /// Amplitudes a of a cosine and b of a sine, counted from a position whose own are given: those counted from there.
    pub(crate) fn turn(a: &[f32], b: &[f32], turn: (f32, f32), new_a: &mut [f32], new_b: &mut [f32]) = turn_kernel;
}

/// Sizes of a product.
pub(crate) struct Product {
    pub rows: usize,
    pub terms: usize,
    /// `a[j, k]` is element `j · row_stride + k · term_stride`.
    pub row_stride: usize,
    pub term_stride: usize,
    pub width: usize,
}

impl Product {
    pub(super) const fn is_empty(&self) -> bool {
        self.rows == 0 || self.terms == 0
    }

    /// Asserts that operands of these lengths have all elements of a product that is not empty.
    #[inline(always)]
    pub(super) fn check(&self, a: usize, panel: usize, out: usize) {
        assert!(self.width.is_multiple_of(LANES));
        assert!(a > (self.rows - 1) * self.row_stride + (self.terms - 1) * self.term_stride);
        assert!(panel >= self.terms * self.width && out >= self.rows * self.width);
    }
}

/// The operands of a product, whose blocks lie inside them.
pub(super) trait Operands {
    /// Adds rows `j .. j + J` of the product, of queries `q .. q + 16·V`, to `out`.
    unsafe fn add_block<S: Lanes, const V: usize, const J: usize>(&self, q: usize, j: usize, out: &mut [f32]);
}

/// Adds a product block by block: as many sums at a time as there are registers for.
#[inline(always)]
pub(super) unsafe fn add_blocks<S: Lanes, O: Operands>(p: &Product, operands: &O, out: &mut [f32]) {
    // SAFETY: blocks of rows below `rows`, of vectors below `width`; the rest is the caller's.
    unsafe {
        let mut q = 0;
        if S::REGISTERS >= 32 {
            while q + 4 * LANES <= p.width {
                add_columns::<S, O, 4, 6>(p, operands, q, out);
                q += 4 * LANES;
            }
            if q + 2 * LANES <= p.width {
                add_columns::<S, O, 2, 8>(p, operands, q, out);
                q += 2 * LANES;
            }
            if q < p.width {
                add_columns::<S, O, 1, 8>(p, operands, q, out);
            }
            return;
        }
        while q < p.width {
            add_columns::<S, O, 1, 4>(p, operands, q, out);
            q += LANES;
        }
    }
}

/// All rows of `V` vectors of queries, `J` at a time, then two, then one.
#[inline(always)]
unsafe fn add_columns<S: Lanes, O: Operands, const V: usize, const J: usize>(
    p: &Product,
    operands: &O,
    q: usize,
    out: &mut [f32],
) {
    // SAFETY: see `add_blocks`.
    unsafe {
        let mut j = 0;
        while j + J <= p.rows {
            operands.add_block::<S, V, J>(q, j, out);
            j += J;
        }
        while j + 2 <= p.rows {
            operands.add_block::<S, V, 2>(q, j, out);
            j += 2;
        }
        if j < p.rows {
            operands.add_block::<S, V, 1>(q, j, out);
        }
    }
}

struct Floats<'a> {
    product: &'a Product,
    a: &'a [f32],
    panel: &'a [f32],
    scales: Option<&'a [f32]>,
}

#[inline(always)]
unsafe fn add_product_kernel<S: Lanes>(
    product: &Product,
    a: &[f32],
    panel: &[f32],
    scales: Option<&[f32]>,
    out: &mut [f32],
) {
    if product.is_empty() {
        return;
    }
    product.check(a.len(), panel.len(), out.len());
    assert!(scales.is_none_or(|scales| scales.len() >= product.rows));
    // SAFETY: by the assertions every block lies inside the slices; the caller has S's features.
    unsafe { add_blocks::<S, _>(product, &Floats { product, a, panel, scales }, out) }
}

impl Operands for Floats<'_> {
    #[inline(always)]
    unsafe fn add_block<S: Lanes, const V: usize, const J: usize>(&self, q: usize, j: usize, out: &mut [f32]) {
        let p = self.product;
        // SAFETY: q + 16·V ≤ width, j + J ≤ rows, and the slices hold all of the product (see `add_product_kernel`).
        unsafe {
            let mut element = self.a.as_ptr().add(j * p.row_stride);
            let mut queries = self.panel.as_ptr().add(q);
            let mut sums = [[S::zero(); V]; J];
            let mut k = 0;
            while k < p.terms {
                let mut lanes = [S::zero(); V];
                let mut v = 0;
                while v < V {
                    lanes[v] = S::load(queries.add(v * LANES));
                    v += 1;
                }
                let mut i = 0;
                while i < J {
                    let factor = S::splat(*element.add(i * p.row_stride));
                    let mut v = 0;
                    while v < V {
                        sums[i][v] = S::mul_add(factor, lanes[v], sums[i][v]);
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
                let factor = S::splat(self.scales.map_or(1.0, |scales| scales[j + i]));
                let mut v = 0;
                while v < V {
                    let target = target.add(i * p.width + v * LANES);
                    S::store(S::mul_add(factor, sums[i][v], S::load(target)), target);
                    v += 1;
                }
                i += 1;
            }
        }
    }
}

/// Running softmax of the queries of a panel, `[width]` each.
pub(crate) struct Softmax<'a> {
    /// What is taken off scores: no less than the largest by more than [`HEADROOM`].
    pub reference: &'a mut [f32],
    /// Σ of all weights so far.
    pub sum: &'a mut [f32],
    /// What sums of earlier rows are to be multiplied by, and Σ of the weights of these.
    pub factors: &'a mut [f32],
    pub added: &'a mut [f32],
}

/// A reference stays until a score is so far above it: outputs are seldom rescaled, and weights stay below e⁸.
const HEADROOM: f32 = 8.0;

/// The width of a panel with `rows` rows.
#[inline(always)]
fn width_of(panel: &[f32], rows: usize) -> usize {
    let width = panel.len().checked_div(rows).unwrap_or(0);
    assert!(width * rows == panel.len() && width.is_multiple_of(LANES), "a panel of other sizes");
    width
}

#[inline(always)]
unsafe fn scale_rows_kernel<S: Lanes>(rows: &[f32], factors: &[f32], out: &mut [f32]) {
    let width = width_of(rows, factors.len());
    assert!(rows.len() == out.len());
    // SAFETY: vectors of rows of `width`, a multiple of 16, of slices of one length; the caller has S's features.
    unsafe {
        for (j, factor) in factors.iter().enumerate() {
            let factor = S::splat(*factor);
            let mut at = j * width;
            while at < (j + 1) * width {
                S::store(S::mul(factor, S::load(rows.as_ptr().add(at))), out.as_mut_ptr().add(at));
                at += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn rotate_kernel<S: Lanes>(channels: usize, panel: &mut [f32]) {
    let width = width_of(panel, channels);
    let (block, norm) = (hadamard_block(channels), hadamard_norm(channels));
    let data = panel.as_mut_ptr();
    // SAFETY: rows below `channels`, a multiple of the block; the caller has S's features.
    unsafe {
        let norm = S::splat(norm);
        // Two stages at a time: four rows are read and written once for both. An odd one comes first.
        let mut half = 1;
        if block.trailing_zeros() % 2 == 1 {
            butterflies::<S>(channels, width, data);
            half = 2;
        }
        while half < block {
            let last = 4 * half == block;
            let mut start = 0;
            while start < channels {
                let mut row = start;
                while row < start + half {
                    let mut q = 0;
                    while q < width {
                        let at = |i: usize| data.add((row + i * half) * width + q);
                        let (a, b, c, d) = (S::load(at(0)), S::load(at(1)), S::load(at(2)), S::load(at(3)));
                        let (a, b, c, d) = (S::add(a, b), S::sub(a, b), S::add(c, d), S::sub(c, d));
                        let (mut a, mut b, mut c, mut d) = (S::add(a, c), S::add(b, d), S::sub(a, c), S::sub(b, d));
                        if last {
                            (a, b, c, d) = (S::mul(a, norm), S::mul(b, norm), S::mul(c, norm), S::mul(d, norm));
                        }
                        S::store(a, at(0));
                        S::store(b, at(1));
                        S::store(c, at(2));
                        S::store(d, at(3));
                        q += LANES;
                    }
                    row += 1;
                }
                start += 4 * half;
            }
            half *= 4;
        }
    }
}

/// The first stage alone: neighbouring rows.
#[inline(always)]
unsafe fn butterflies<S: Lanes>(channels: usize, width: usize, data: *mut f32) {
    // SAFETY: the caller's panel, with an even number of rows.
    unsafe {
        let mut row = 0;
        while row < channels {
            let mut q = 0;
            while q < width {
                let (first, second) = (data.add(row * width + q), data.add((row + 1) * width + q));
                let (a, b) = (S::load(first), S::load(second));
                S::store(S::add(a, b), first);
                S::store(S::sub(a, b), second);
                q += LANES;
            }
            row += 2;
        }
    }
}

#[inline(always)]
unsafe fn begin_scores_kernel<S: Lanes>(shift: &[f32], noise: &[f32], scales: &[f32], scores: &mut [f32]) {
    let width = width_of(scores, scales.len());
    assert!(scales.is_empty() || shift.len() == width && noise.len() == width);
    // SAFETY: vectors of rows of `width`, a multiple of 16; the caller has S's features.
    unsafe {
        for (t, scale) in scales.iter().enumerate() {
            let square = S::splat(-scale * scale);
            let mut q = 0;
            while q < width {
                let noise = S::load(noise.as_ptr().add(q));
                let score = S::mul_add(square, noise, S::load(shift.as_ptr().add(q)));
                S::store(score, scores.as_mut_ptr().add(t * width + q));
                q += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn hide_kernel<S: Lanes>(last: &[f32], scores: &mut [f32]) {
    let width = last.len();
    assert!(width > 0 && width.is_multiple_of(LANES) && scores.len().is_multiple_of(width));
    // SAFETY: as for `begin_scores_kernel`.
    unsafe {
        for t in 0..scores.len() / width {
            let mut q = 0;
            while q < width {
                let target = scores.as_mut_ptr().add(t * width + q);
                let hidden = S::gt(S::splat(t as f32), S::load(last.as_ptr().add(q)));
                S::store(S::select(hidden, S::load(target), S::splat(f32::NEG_INFINITY)), target);
                q += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn soften_kernel<S: Lanes>(scores: &mut [f32], softmax: &mut Softmax) {
    let Softmax { reference, sum, factors, added } = softmax;
    let width = reference.len();
    assert!(width > 0 && width.is_multiple_of(LANES) && scores.len().is_multiple_of(width));
    assert!(sum.len() == width && factors.len() == width && added.len() == width);
    let rows = scores.len() / width;
    // SAFETY: as for `begin_scores_kernel`.
    unsafe {
        let nothing = S::splat(f32::NEG_INFINITY);
        let mut q = 0;
        while q < width {
            let column = scores.as_mut_ptr().add(q);
            let old = S::load(reference.as_ptr().add(q));
            let (mut most, mut second) = (nothing, nothing);
            let mut t = 0;
            while t + 2 <= rows {
                most = S::max(S::load(column.add(t * width)), most);
                second = S::max(S::load(column.add((t + 1) * width)), second);
                t += 2;
            }
            if t < rows {
                most = S::max(S::load(column.add(t * width)), most);
            }
            let most = S::max(most, second);
            let new = S::select(S::gt(most, S::add(old, S::splat(HEADROOM))), old, most);
            // Of a query that has seen nothing so far the reference is −∞, and its weights e^(−∞ − 0).
            let offset = S::select(S::gt(new, nothing), S::zero(), new);
            let factor = S::exp(S::sub(S::select(S::gt(old, nothing), nothing, old), offset));
            let mut total = S::zero();
            let mut t = 0;
            while t < rows {
                let weight = S::exp(S::sub(S::load(column.add(t * width)), offset));
                S::store(weight, column.add(t * width));
                total = S::add(total, weight);
                t += 1;
            }
            let before = S::load(sum.as_ptr().add(q));
            S::store(new, reference.as_mut_ptr().add(q));
            S::store(S::mul_add(before, factor, total), sum.as_mut_ptr().add(q));
            S::store(factor, factors.as_mut_ptr().add(q));
            S::store(total, added.as_mut_ptr().add(q));
            q += LANES;
        }
    }
}

/// A weight is at least 0, or NaN, which must stay.
#[inline(always)]
pub(super) unsafe fn scaled_weight<S: Lanes>(weight: S::F, scale: S::F) -> S::F {
    // SAFETY: the caller has S's features.
    unsafe {
        let hidden = S::gt(S::splat(f32::MIN_POSITIVE), weight);
        S::select(hidden, S::mul(weight, scale), S::zero())
    }
}

#[inline(always)]
unsafe fn scale_weights_kernel<S: Lanes>(weights: &[f32], scales: &[f32], scaled: &mut [f32]) {
    let width = width_of(weights, scales.len());
    assert!(weights.len() == scaled.len());
    // SAFETY: as for `scale_rows_kernel`.
    unsafe {
        for (t, scale) in scales.iter().enumerate() {
            let scale = S::splat(*scale);
            let mut at = t * width;
            while at < (t + 1) * width {
                let product = scaled_weight::<S>(S::load(weights.as_ptr().add(at)), scale);
                S::store(product, scaled.as_mut_ptr().add(at));
                at += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn add_rows_kernel<S: Lanes>(rows: &[f32], factors: &[f32], sums: &mut [f32]) {
    let width = sums.len();
    assert!(width.is_multiple_of(LANES) && rows.len() == factors.len() * width);
    // SAFETY: as for `begin_scores_kernel`.
    unsafe {
        let mut q = 0;
        while q < width {
            let mut sum = S::load(sums.as_ptr().add(q));
            for (t, factor) in factors.iter().enumerate() {
                sum = S::mul_add(S::splat(*factor), S::load(rows.as_ptr().add(t * width + q)), sum);
            }
            S::store(sum, sums.as_mut_ptr().add(q));
            q += LANES;
        }
    }
}

#[inline(always)]
unsafe fn multiply_columns_kernel<S: Lanes>(factors: &[f32], panel: &mut [f32]) {
    let width = factors.len();
    assert!(width > 0 && width.is_multiple_of(LANES) && panel.len().is_multiple_of(width));
    // SAFETY: as for `begin_scores_kernel`.
    unsafe {
        let mut row = 0;
        while row < panel.len() {
            let mut q = 0;
            while q < width {
                let target = panel.as_mut_ptr().add(row + q);
                S::store(S::mul(S::load(target), S::load(factors.as_ptr().add(q))), target);
                q += LANES;
            }
            row += width;
        }
    }
}

#[inline(always)]
unsafe fn add_affine_kernel<S: Lanes>(rows: &[f32], scale: &[f32], weights: &[f32], shift: &[f32], out: &mut [f32]) {
    let width = width_of(rows, scale.len());
    assert!(out.len() == rows.len() && weights.len() == width && shift.len() == scale.len());
    // SAFETY: as for `scale_rows_kernel`.
    unsafe {
        for (c, (scale, shift)) in scale.iter().zip(shift).enumerate() {
            let (scale, shift) = (S::splat(*scale), S::splat(*shift));
            let mut q = 0;
            while q < width {
                let target = out.as_mut_ptr().add(c * width + q);
                let shifted = S::mul_add(shift, S::load(weights.as_ptr().add(q)), S::load(target));
                S::store(S::mul_add(scale, S::load(rows.as_ptr().add(c * width + q)), shifted), target);
                q += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn turn_kernel<S: Lanes>(a: &[f32], b: &[f32], turn: (f32, f32), new_a: &mut [f32], new_b: &mut [f32]) {
    assert!(a.len().is_multiple_of(LANES) && b.len() == a.len() && new_a.len() == a.len() && new_b.len() == a.len());
    // SAFETY: vectors of slices of one length, a multiple of 16; the caller has S's features.
    unsafe {
        let (cosine, sine) = (S::splat(turn.0), S::splat(turn.1));
        let mut q = 0;
        while q < a.len() {
            let (x, y) = (S::load(a.as_ptr().add(q)), S::load(b.as_ptr().add(q)));
            let turned = S::mul_add(x, cosine, S::mul(y, sine));
            S::store(turned, new_a.as_mut_ptr().add(q));
            S::store(S::sub(S::mul(y, cosine), S::mul(x, sine)), new_b.as_mut_ptr().add(q));
            q += LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::simd::Isa;
    use crate::transform::Rotation;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    fn assert_near(isa: Isa, what: &str, found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let near = (f64::from(*found) - expected).abs() <= 2e-5 * expected.abs().max(1.0);
            assert!(near || found.is_nan() && expected.is_nan(), "{isa}, {what}, {i}: {found} {expected}");
        }
    }

    #[test]
    fn products_are_those_in_f64() {
        for isa in Isa::available() {
            for (rows, terms, width) in [(1, 1, 16), (6, 5, 64), (7, 33, 32), (9, 16, 48), (14, 3, 80), (32, 128, 64)] {
                let (panel, start) = (numbers(terms * width, 1.0), numbers(rows * width, 2.0));
                let scales = numbers(rows, 3.0);
                for (row_stride, term_stride) in [(terms, 1), (1, rows), (0, 1)] {
                    let a = numbers(rows * terms, 4.0);
                    let product = Product { rows, terms, row_stride, term_stride, width };
                    for scales in [None, Some(&scales[..])] {
                        let mut out = start.clone();
                        add_product(isa, &product, &a, &panel, scales, &mut out);
                        let expected = (0..rows * width).map(|i| {
                            let (j, q) = (i / width, i % width);
                            let term = |k: usize| {
                                f64::from(a[j * row_stride + k * term_stride]) * f64::from(panel[k * width + q])
                            };
                            let scale = scales.map_or(1.0, |scales| f64::from(scales[j]));
                            f64::from(start[i]) + scale * (0..terms).map(term).sum::<f64>()
                        });
                        assert_near(isa, "product", &out, &expected.collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    #[test]
    fn columns_turn_and_rotate_as_rows_do() {
        let width = 32;
        for isa in Isa::available() {
            for channels in [16, 48, 64, 80, 96, 112, 128, 192, 256, 512] {
                let panel = numbers(channels * width, 5.0);
                let mut rotated = panel.clone();
                rotate(isa, channels, &mut rotated);
                for q in 0..width {
                    let column = |panel: &[f32]| (0..channels).map(|c| panel[c * width + q]).collect::<Vec<_>>();
                    let mut expected = column(&panel);
                    Rotation::Hadamard.apply(&mut expected);
                    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                    assert_near(isa, "rotation", &column(&rotated), &expected);
                }
            }
            let (a, b) = (numbers(width, 6.0), numbers(width, 7.0));
            let (mut new_a, mut new_b) = (vec![0.0; width], vec![0.0; width]);
            turn(isa, &a, &b, (0.6, 0.8), &mut new_a, &mut new_b);
            let pairs = || a.iter().zip(&b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
            assert_near(isa, "turn", &new_a, &pairs().map(|(a, b)| 0.6 * a + 0.8 * b).collect::<Vec<_>>());
            assert_near(isa, "turn", &new_b, &pairs().map(|(a, b)| 0.6 * b - 0.8 * a).collect::<Vec<_>>());
        }
    }

    #[test]
    fn rows_are_scaled_shifted_summed_and_hidden() {
        let (rows, width) = (5, 48);
        for isa in Isa::available() {
            let (panel, factors, columns) = (numbers(rows * width, 1.0), numbers(rows, 2.0), numbers(width, 3.0));
            let each = |of: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                (0..rows * width).map(|i| of(i / width, i % width)).collect()
            };
            let at = |j: usize, q: usize| f64::from(panel[j * width + q]);
            let factor = |j: usize| f64::from(factors[j]);
            let column = |q: usize| f64::from(columns[q]);

            let mut out = vec![0.0; rows * width];
            scale_rows(isa, &panel, &factors, &mut out);
            assert_near(isa, "rows", &out, &each(&|j, q| factor(j) * at(j, q)));
            let mut out = panel.clone();
            multiply_columns(isa, &columns, &mut out);
            assert_near(isa, "columns", &out, &each(&|j, q| column(q) * at(j, q)));
            let mut out = panel.clone();
            add_affine(isa, &panel, &factors, &columns, &factors, &mut out);
            assert_near(isa, "affine", &out, &each(&|j, q| at(j, q) + factor(j) * (at(j, q) + column(q))));
            let mut out = vec![0.0; rows * width];
            begin_scores(isa, &columns, &columns, &factors, &mut out);
            assert_near(isa, "scores", &out, &each(&|j, q| column(q) * (1.0 - factor(j) * factor(j))));
            let mut sums = columns.clone();
            add_rows(isa, &panel, &factors, &mut sums);
            let sum = |q: usize| column(q) + (0..rows).map(|j| factor(j) * at(j, q)).sum::<f64>();
            assert_near(isa, "sums", &sums, &(0..width).map(sum).collect::<Vec<_>>());

            let last: Vec<f32> = (0..width).map(|q| (q % 7) as f32 - 1.0).collect();
            let mut out = panel.clone();
            hide(isa, &last, &mut out);
            let hidden = |j: usize, q: usize| if j as f32 > last[q] { f64::NEG_INFINITY } else { at(j, q) };
            assert!(out.iter().zip(each(&hidden)).all(|(found, expected)| f64::from(*found) == expected), "{isa}");

            let weights: Vec<f32> = panel.iter().map(|x| x.max(0.0)).collect();
            let mut scaled = vec![7.0; rows * width];
            scale_weights(isa, &weights, &[1.0, 2.0, f32::NAN, 4.0, 5.0], &mut scaled);
            for (i, (weight, scaled)) in weights.iter().zip(&scaled).enumerate() {
                let broken = i / width == 2 && *weight > 0.0;
                assert!(
                    if broken { scaled.is_nan() } else { *scaled == (i / width + 1) as f32 * weight },
                    "{isa}, {i}"
                );
            }
        }
    }

    /// Scores that rise and fall by more than the headroom, tokens that nobody sees, a query that sees nothing and one with a NaN.
    #[test]
    fn a_softmax_in_pieces_is_the_softmax() {
        let (width, pieces) = (32, [1, 3, 8, 128, 5]);
        let total: usize = pieces.iter().sum();
        let (blind, broken) = (4, 9);
        for isa in Isa::available() {
            let mut scores: Vec<f32> = (0..total * width).map(|i| (i as f32 * 0.13).sin() * 30.0).collect();
            for t in 0..total {
                scores[t * width + blind] = f32::NEG_INFINITY;
                scores[t * width + 11] = if t < 7 { f32::NEG_INFINITY } else { t as f32 };
            }
            scores[20 * width + broken] = f32::NAN;
            let row = |value: f32| vec![value; width];
            let (mut reference, mut sum, mut factors, mut added) =
                (row(f32::NEG_INFINITY), row(0.0), row(9.0), row(9.0));
            let (mut weights, mut first) = (scores.clone(), 0);
            for piece in pieces {
                let mut softmax =
                    Softmax { reference: &mut reference, sum: &mut sum, factors: &mut factors, added: &mut added };
                soften(isa, &mut weights[first * width..][..piece * width], &mut softmax);
                multiply_columns(isa, &factors, &mut weights[..first * width]);
                first += piece;
                for q in 0..width {
                    let of_piece: f32 = (first - piece..first).map(|t| weights[t * width + q]).sum();
                    assert!(q == broken || (added[q] - of_piece).abs() <= 1e-5 * of_piece, "{isa}");
                }
            }
            for q in 0..width {
                let exact = |t: usize| f64::from(scores[t * width + q]);
                let weight = |t: usize| weights[t * width + q];
                if q == broken {
                    assert!(weight(20).is_nan() && sum[q].is_nan(), "{isa}");
                    continue;
                }
                let most = (0..total).map(exact).fold(f64::NEG_INFINITY, f64::max);
                if q == blind {
                    assert!(sum[q] == 0.0 && (0..total).all(|t| weight(t) == 0.0) && reference[q] == f32::NEG_INFINITY);
                    continue;
                }
                assert!(f64::from(reference[q]) <= most && most <= f64::from(reference[q] + HEADROOM), "{isa}, {q}");
                let all: f64 = (0..total).map(|t| (exact(t) - most).exp()).sum();
                for t in 0..total {
                    let share = f64::from(weight(t) / sum[q]);
                    assert!((share - (exact(t) - most).exp() / all).abs() < 1e-5, "{isa}, {q}, {t}");
                }
            }
        }
    }
}

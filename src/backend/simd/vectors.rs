//! What attention does with one row of scores, weights or channels: the softmax, scales, and the folding of a transform.
//!
//! All f32. Rows of channels are multiples of 16 long, rows of scores any length.

use super::{LANES, Lanes, multiversion};

multiversion! {
    /// scores ← exp(scores − maximum), and their sum.
    pub(crate) fn exponentiate(scores: &mut [f32], maximum: f32) -> f32 = exponentiate_kernel;
    /// The largest element, −∞ for none.
    pub(crate) fn maximum(values: &[f32]) -> f32 = maximum_kernel;
    /// `scores += partial · scales`, element by element.
    pub(crate) fn add_scaled(partial: &[f32], scales: &[f32], scores: &mut [f32]) = add_scaled_kernel;
    /// scaled = weights · scales, element by element, and 0 where the weight is 0: it hides its row, whatever the row's scale is.
    pub(crate) fn scale_weights(weights: &[f32], scales: &[f32], scaled: &mut [f32]) = scale_weights_kernel;
    /// `out = a · b`, element by element.
    pub(crate) fn multiply(a: &[f32], b: &[f32], out: &mut [f32]) = multiply_kernel;
    /// The sum of `a · b`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_kernel;
    /// `out += values · scale + factor · shift`, element by element.
    pub(crate) fn add_affine(values: &[f32], scale: &[f32], factor: f32, shift: &[f32], out: &mut [f32]) = add_affine_kernel;
    /// `out += factor · values`, element by element.
    pub(crate) fn add_multiple(values: &[f32], factor: f32, out: &mut [f32]) = add_multiple_kernel;
    /// The sum of the values.
    pub(crate) fn sum(values: &[f32]) -> f32 = sum_kernel;
    /// values *= factor.
    pub(crate) fn scale(values: &mut [f32], factor: f32) = scale_kernel;
}

#[inline(always)]
unsafe fn exponentiate_kernel<S: Lanes>(scores: &mut [f32], maximum: f32) -> f32 {
    // SAFETY: lanes i..i+n of the slice; the caller has S's features.
    unsafe {
        let offset = S::splat(maximum);
        let mut sum = S::zero();
        let mut i = 0;
        while i + LANES <= scores.len() {
            let weights = S::exp(S::sub(S::load(scores.as_ptr().add(i)), offset));
            S::store(weights, scores.as_mut_ptr().add(i));
            sum = S::add(sum, weights);
            i += LANES;
        }
        if i < scores.len() {
            let n = scores.len() - i;
            let weights = S::exp(S::sub(S::load_partial(scores.as_ptr().add(i), n), offset));
            S::store_partial(weights, scores.as_mut_ptr().add(i), n);
            sum = S::add(sum, S::select_bits(((1u32 << n) - 1) as u16, S::zero(), weights));
        }
        S::reduce_add(sum)
    }
}

#[inline(always)]
unsafe fn maximum_kernel<S: Lanes>(values: &[f32]) -> f32 {
    // SAFETY: lanes i..i+16 of the slice; the caller has S's features.
    unsafe {
        let mut most = S::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i + LANES <= values.len() {
            most = S::max(S::load(values.as_ptr().add(i)), most);
            i += LANES;
        }
        let mut most = S::reduce_max(most);
        while i < values.len() {
            most = most.max(values[i]);
            i += 1;
        }
        most
    }
}

#[inline(always)]
unsafe fn scale_kernel<S: Lanes>(values: &mut [f32], factor: f32) {
    let mut i = 0;
    // SAFETY: lanes i..i+n of the slice; the caller has S's features.
    unsafe {
        while i < values.len() {
            let n = (values.len() - i).min(LANES);
            let product = S::mul(S::load_partial(values.as_ptr().add(i), n), S::splat(factor));
            S::store_partial(product, values.as_mut_ptr().add(i), n);
            i += n;
        }
    }
}

#[inline(always)]
unsafe fn add_multiple_kernel<S: Lanes>(values: &[f32], factor: f32, out: &mut [f32]) {
    assert!(values.len() == out.len());
    let mut i = 0;
    // SAFETY: lanes i..i+n of slices of one length; the caller has S's features.
    unsafe {
        while i < out.len() {
            let n = (out.len() - i).min(LANES);
            let target = out.as_mut_ptr().add(i);
            let lanes = S::load_partial(values.as_ptr().add(i), n);
            S::store_partial(S::mul_add(lanes, S::splat(factor), S::load_partial(target, n)), target, n);
            i += n;
        }
    }
}

#[inline(always)]
unsafe fn add_scaled_kernel<S: Lanes>(partial: &[f32], scales: &[f32], scores: &mut [f32]) {
    assert!(partial.len() == scores.len() && scales.len() == scores.len());
    let mut i = 0;
    // SAFETY: lanes i..i+16 of slices of one length; the caller has S's features.
    unsafe {
        while i + LANES <= scores.len() {
            let (partial, scales) = (S::load(partial.as_ptr().add(i)), S::load(scales.as_ptr().add(i)));
            let target = scores.as_mut_ptr().add(i);
            S::store(S::mul_add(partial, scales, S::load(target)), target);
            i += LANES;
        }
    }
    while i < scores.len() {
        scores[i] += partial[i] * scales[i];
        i += 1;
    }
}

#[inline(always)]
unsafe fn scale_weights_kernel<S: Lanes>(weights: &[f32], scales: &[f32], scaled: &mut [f32]) {
    assert!(weights.len() == scaled.len() && scales.len() == scaled.len());
    let mut i = 0;
    // SAFETY: lanes i..i+16 of slices of one length; the caller has S's features.
    unsafe {
        while i + LANES <= scaled.len() {
            let weight = S::load(weights.as_ptr().add(i));
            let product = S::mul(weight, S::load(scales.as_ptr().add(i)));
            // A weight is at least 0, or NaN, which must stay.
            let hidden = S::gt(S::splat(f32::MIN_POSITIVE), weight);
            S::store(S::select(hidden, product, S::zero()), scaled.as_mut_ptr().add(i));
            i += LANES;
        }
    }
    while i < scaled.len() {
        scaled[i] = if weights[i] < f32::MIN_POSITIVE { 0.0 } else { weights[i] * scales[i] };
        i += 1;
    }
}

#[inline(always)]
unsafe fn multiply_kernel<S: Lanes>(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == out.len() && b.len() == out.len() && out.len().is_multiple_of(LANES));
    let mut i = 0;
    // SAFETY: lanes i..i+16 of slices of one length, a multiple of 16; the caller has S's features.
    unsafe {
        while i < out.len() {
            S::store(S::mul(S::load(a.as_ptr().add(i)), S::load(b.as_ptr().add(i))), out.as_mut_ptr().add(i));
            i += LANES;
        }
    }
}

#[inline(always)]
unsafe fn dot_kernel<S: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    assert!(a.len() == b.len() && a.len().is_multiple_of(LANES));
    // SAFETY: as for `multiply_kernel`.
    unsafe {
        let mut sum = S::zero();
        let mut i = 0;
        while i < a.len() {
            sum = S::mul_add(S::load(a.as_ptr().add(i)), S::load(b.as_ptr().add(i)), sum);
            i += LANES;
        }
        S::reduce_add(sum)
    }
}

#[inline(always)]
unsafe fn add_affine_kernel<S: Lanes>(values: &[f32], scale: &[f32], factor: f32, shift: &[f32], out: &mut [f32]) {
    assert!(values.len() == out.len() && scale.len() == out.len() && shift.len() == out.len());
    assert!(out.len().is_multiple_of(LANES));
    let mut i = 0;
    // SAFETY: as for `multiply_kernel`.
    unsafe {
        let factor = S::splat(factor);
        while i < out.len() {
            let target = out.as_mut_ptr().add(i);
            let shifted = S::mul_add(factor, S::load(shift.as_ptr().add(i)), S::load(target));
            S::store(S::mul_add(S::load(values.as_ptr().add(i)), S::load(scale.as_ptr().add(i)), shifted), target);
            i += LANES;
        }
    }
}

#[inline(always)]
unsafe fn sum_kernel<S: Lanes>(values: &[f32]) -> f32 {
    // SAFETY: lanes i..i+n of the slice; the caller has S's features.
    unsafe {
        let mut sum = S::zero();
        let mut i = 0;
        while i < values.len() {
            let n = (values.len() - i).min(LANES);
            sum = S::add(sum, S::load_partial(values.as_ptr().add(i), n));
            i += LANES;
        }
        S::reduce_add(sum)
    }
}

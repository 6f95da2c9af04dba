//! The two small matrix products of attention over a tile of rows, and the softmax between them. All f32, accumulated in f32.
//!
//! Shapes: queries `[queries, stride]`, tile `[rows, width]` with a group of channels `first .. first + count`, scores `[queries, stride]`.

use super::{LANES, Lanes, multiversion};

multiversion! {
    /// `scores[q][t] = Σ_c queries[q][c] · tile[t][c]` over the channels of one group, for all `rows` rows of the tile.
    pub(crate) fn score_tile(product: &ScoreTile, queries: &[f32], tile: &[f32], scores: &mut [f32]) = score_tile_kernel;
    /// `output[q][c] += Σ_t weights[q][t] · tile[t][c]` over the channels of one group.
    pub(crate) fn weigh_tile(product: &WeighTile, weights: &[f32], tile: &[f32], output: &mut [f32]) = weigh_tile_kernel;
    /// scores ← exp(scores − maximum), and their sum.
    pub(crate) fn exponentiate(scores: &mut [f32], maximum: f32) -> f32 = exponentiate_kernel;
    /// The largest element, −∞ for none.
    pub(crate) fn maximum(values: &[f32]) -> f32 = maximum_kernel;
    /// `scores += partial · scales`, element by element.
    pub(crate) fn add_scaled(partial: &[f32], scales: &[f32], scores: &mut [f32]) = add_scaled_kernel;
    /// scaled = weights · scales, element by element, and 0 where the weight is 0: it hides its row, whatever the row's scale is.
    pub(crate) fn scale_weights(weights: &[f32], scales: &[f32], scaled: &mut [f32]) = scale_weights_kernel;
    /// values *= factor.
    pub(crate) fn scale(values: &mut [f32], factor: f32) = scale_kernel;
}

/// Sizes of a score product.
pub(crate) struct ScoreTile {
    pub queries: usize,
    pub query_stride: usize,
    pub rows: usize,
    pub width: usize,
    /// The group's channels, multiples of 16.
    pub first: usize,
    pub count: usize,
    pub score_stride: usize,
}

#[inline(always)]
unsafe fn score_tile_kernel<S: Lanes>(p: &ScoreTile, queries: &[f32], tile: &[f32], scores: &mut [f32]) {
    assert!(p.count.is_multiple_of(LANES) && p.first + p.count <= p.width && p.width <= p.query_stride);
    assert!(queries.len() >= p.queries * p.query_stride && tile.len() >= p.rows * p.width);
    assert!(p.queries == 0 || scores.len() >= (p.queries - 1) * p.score_stride + p.rows);
    // SAFETY: by the assertions every block below stays inside the slices.
    unsafe {
        let mut q = 0;
        if S::REGISTERS >= 32 {
            while q + 4 <= p.queries {
                score_rows::<S, 4, 4>(p, q, queries, tile, scores);
                q += 4;
            }
            while q + 2 <= p.queries {
                score_rows::<S, 2, 8>(p, q, queries, tile, scores);
                q += 2;
            }
        }
        while q + 2 <= p.queries {
            score_rows::<S, 2, 2>(p, q, queries, tile, scores);
            q += 2;
        }
        if q < p.queries {
            if S::REGISTERS >= 32 {
                score_rows::<S, 1, 16>(p, q, queries, tile, scores);
            } else {
                score_rows::<S, 1, 4>(p, q, queries, tile, scores);
            }
        }
    }
}

/// `Q` queries against all rows, `T` at a time.
#[inline(always)]
unsafe fn score_rows<S: Lanes, const Q: usize, const T: usize>(
    p: &ScoreTile,
    q: usize,
    queries: &[f32],
    tile: &[f32],
    scores: &mut [f32],
) {
    // SAFETY: see `score_tile_kernel`.
    unsafe {
        let mut t = 0;
        while t + T <= p.rows {
            score_block::<S, Q, T>(p, q, t, queries, tile, scores);
            t += T;
        }
        while t < p.rows {
            score_block::<S, Q, 1>(p, q, t, queries, tile, scores);
            t += 1;
        }
    }
}

#[inline(always)]
unsafe fn score_block<S: Lanes, const Q: usize, const T: usize>(
    p: &ScoreTile,
    q: usize,
    t: usize,
    queries: &[f32],
    tile: &[f32],
    scores: &mut [f32],
) {
    // SAFETY: q + Q ≤ queries, t + T ≤ rows, first + count ≤ width (see `score_tile_kernel`).
    unsafe {
        let query = queries.as_ptr().add(q * p.query_stride + p.first);
        let row = tile.as_ptr().add(t * p.width + p.first);
        let mut sums = [[S::zero(); T]; Q];
        let mut c = 0;
        while c < p.count {
            let mut i = 0;
            let mut vectors = [S::zero(); Q];
            while i < Q {
                vectors[i] = S::load(query.add(i * p.query_stride + c));
                i += 1;
            }
            let mut j = 0;
            while j < T {
                let channels = S::load(row.add(j * p.width + c));
                let mut i = 0;
                while i < Q {
                    sums[i][j] = S::mul_add(vectors[i], channels, sums[i][j]);
                    i += 1;
                }
                j += 1;
            }
            c += LANES;
        }
        let target = scores.as_mut_ptr().add(q * p.score_stride + t);
        if Q * T == 16 {
            let mut all = [S::zero(); 16];
            let mut k = 0;
            while k < 16 {
                all[k] = sums[k / T][k % T];
                k += 1;
            }
            let mut folded = [0.0f32; 16];
            S::store(S::reduce_add_16(all), folded.as_mut_ptr());
            let mut i = 0;
            while i < Q {
                folded.as_ptr().add(i * T).copy_to_nonoverlapping(target.add(i * p.score_stride), T);
                i += 1;
            }
        } else if Q * T == 4 {
            let at = |k: usize| sums[k / T][k % T];
            let folded = S::reduce_add_4([at(0), at(1), at(2), at(3)]);
            let mut k = 0;
            while k < 4 {
                target.add(k / T * p.score_stride + k % T).write(folded[k]);
                k += 1;
            }
        } else {
            let mut i = 0;
            while i < Q {
                let mut j = 0;
                while j < T {
                    target.add(i * p.score_stride + j).write(S::reduce_add(sums[i][j]));
                    j += 1;
                }
                i += 1;
            }
        }
    }
}

/// Sizes of a weighted sum of rows.
pub(crate) struct WeighTile {
    pub queries: usize,
    pub weight_stride: usize,
    pub rows: usize,
    pub width: usize,
    /// The group's channels, multiples of 16.
    pub first: usize,
    pub count: usize,
    pub output_stride: usize,
}

#[inline(always)]
unsafe fn weigh_tile_kernel<S: Lanes>(p: &WeighTile, weights: &[f32], tile: &[f32], output: &mut [f32]) {
    assert!(p.count.is_multiple_of(LANES) && p.first + p.count <= p.width && p.width <= p.output_stride);
    assert!(p.queries == 0 || weights.len() >= (p.queries - 1) * p.weight_stride + p.rows);
    assert!(tile.len() >= p.rows * p.width && output.len() >= p.queries * p.output_stride);
    // SAFETY: by the assertions every block below stays inside the slices.
    unsafe {
        let mut q = 0;
        if S::REGISTERS >= 32 {
            while q + 4 <= p.queries {
                weigh_channels::<S, 4, 4>(p, q, weights, tile, output);
                q += 4;
            }
            while q < p.queries {
                weigh_channels::<S, 1, 8>(p, q, weights, tile, output);
                q += 1;
            }
            return;
        }
        while q + 2 <= p.queries {
            weigh_channels::<S, 2, 2>(p, q, weights, tile, output);
            q += 2;
        }
        if q < p.queries {
            weigh_channels::<S, 1, 4>(p, q, weights, tile, output);
        }
    }
}

/// `Q` queries over the group's channels, `V` vectors at a time.
#[inline(always)]
unsafe fn weigh_channels<S: Lanes, const Q: usize, const V: usize>(
    p: &WeighTile,
    q: usize,
    weights: &[f32],
    tile: &[f32],
    output: &mut [f32],
) {
    // SAFETY: see `weigh_tile_kernel`.
    unsafe {
        let end = p.first + p.count;
        let mut c = p.first;
        while c + V * LANES <= end {
            weigh_block::<S, Q, V>(p, q, c, weights, tile, output);
            c += V * LANES;
        }
        while c < end {
            weigh_block::<S, Q, 1>(p, q, c, weights, tile, output);
            c += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weigh_block<S: Lanes, const Q: usize, const V: usize>(
    p: &WeighTile,
    q: usize,
    c: usize,
    weights: &[f32],
    tile: &[f32],
    output: &mut [f32],
) {
    // SAFETY: q + Q ≤ queries and c + 16·V ≤ first + count ≤ width (see `weigh_tile_kernel`).
    unsafe {
        let target = output.as_mut_ptr().add(q * p.output_stride + c);
        let weight = weights.as_ptr().add(q * p.weight_stride);
        let mut sums = [[S::zero(); V]; Q];
        let mut i = 0;
        while i < Q {
            let mut v = 0;
            while v < V {
                sums[i][v] = S::load(target.add(i * p.output_stride + v * LANES));
                v += 1;
            }
            i += 1;
        }
        let mut row = tile.as_ptr().add(c);
        let mut t = 0;
        while t < p.rows {
            let mut channels = [S::zero(); V];
            let mut v = 0;
            while v < V {
                channels[v] = S::load(row.add(v * LANES));
                v += 1;
            }
            let mut i = 0;
            while i < Q {
                let factor = S::splat(*weight.add(i * p.weight_stride + t));
                let mut v = 0;
                while v < V {
                    sums[i][v] = S::mul_add(factor, channels[v], sums[i][v]);
                    v += 1;
                }
                i += 1;
            }
            row = row.add(p.width);
            t += 1;
        }
        let mut i = 0;
        while i < Q {
            let mut v = 0;
            while v < V {
                S::store(sums[i][v], target.add(i * p.output_stride + v * LANES));
                v += 1;
            }
            i += 1;
        }
    }
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

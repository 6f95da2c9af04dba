//! The two small matrix products of attention over a tile of rows. All f32, accumulated in f32.
//!
//! Shapes: queries `[queries, stride]`, tile `[rows, width]` with a group of channels `first .. first + count`, scores `[queries, stride]`.

use super::{LANES, Lanes, multiversion};

multiversion! {
    /// `scores[q][t] = Σ_c queries[q][c] · tile[t][c]` over the channels of one group, for all `rows` rows of the tile.
    pub(crate) fn score_tile(product: &ScoreTile, queries: &[f32], tile: &[f32], scores: &mut [f32]) = score_tile_kernel;
    /// `output[q][c] += Σ_t weights[q][t] · tile[t][c]` over the channels of one group.
    pub(crate) fn weigh_tile(product: &WeighTile, weights: &[f32], tile: &[f32], output: &mut [f32]) = weigh_tile_kernel;
}

/// Sizes of a score product.
pub(crate) struct ScoreTile {
    pub queries: usize,
    pub query_stride: usize,
    pub rows: usize,
    pub width: usize,
    /// The group's channels in the tile, multiples of 16.
    pub first: usize,
    pub count: usize,
    pub score_stride: usize,
}

#[inline(always)]
unsafe fn score_tile_kernel<S: Lanes>(p: &ScoreTile, queries: &[f32], tile: &[f32], scores: &mut [f32]) {
    assert!(p.count.is_multiple_of(LANES) && p.first + p.count <= p.width && p.first + p.count <= p.query_stride);
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
    // SAFETY: q + Q ≤ queries, t + T ≤ rows, first + count ≤ width and query_stride (see `score_tile_kernel`).
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
    /// The group's channels in the tile, multiples of 16.
    pub first: usize,
    pub count: usize,
    /// The output's channel that belongs to `first`.
    pub output_first: usize,
    pub output_stride: usize,
}

#[inline(always)]
unsafe fn weigh_tile_kernel<S: Lanes>(p: &WeighTile, weights: &[f32], tile: &[f32], output: &mut [f32]) {
    assert!(
        p.count.is_multiple_of(LANES) && p.first + p.count <= p.width && p.output_first + p.count <= p.output_stride
    );
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
    // SAFETY: q + Q ≤ queries, c + 16·V ≤ first + count ≤ width, output_first + count ≤ output_stride (see `weigh_tile_kernel`).
    unsafe {
        let target = output.as_mut_ptr().add(q * p.output_stride + p.output_first + c - p.first);
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

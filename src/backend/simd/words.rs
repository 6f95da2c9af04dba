//! Scores and weighted sums of two-bit and ternary rows as products of 16-bit integers, straight from the codes.
//!
//! Twice as many products an instruction as in f32, two levels a lookup, and no tile of floats in between: where the instruction set has
//! the product ([`Lanes::WORDS`]) and queries of 16 bits say that no more digits are wanted. Integers are exact, so all that is rounded
//! are the factors: a query's channels and a piece's weights to steps of an 8191st of the largest or finer, the levels to less than a
//! 10 000th of the largest.
//!
//! Two codes make an index of four bits into [`WordTable`], the first one below: codes of two planes of a row for scores, of two
//! neighbouring rows for weighted sums. Shapes: words of queries `[queries, channels / 2]`, of weights `[queries, stride]`.

use super::{LANES, Lanes, multiversion};
use crate::codebook::Codebook;
use crate::format::{Format, RowLayout};

multiversion! {
    /// Queries in the order in which the codes of two-bit rows come, with the unit of each; false if one is not finite.
    pub(crate) fn query_words(queries: &[f32], width: usize, words: &mut [u32], units: &mut [f32]) -> bool = query_words_kernel;
    /// `scores[q][t] = Σ_c queries[q][c] · level[t][c]` of two-bit rows that lie back to back in `codes`.
    pub(crate) fn score_words(product: &WordScores, words: &[u32], units: &[f32], codes: &[u8], scores: &mut [f32]) = score_words_kernel;
    /// Weights of one query, all ≥ 0, as words with an even number of them, and their unit; None if one is not finite.
    pub(crate) fn weight_words(weights: &[f32], words: &mut [u16]) -> Option<f32> = weight_words_kernel;
    /// `output[q][c] += Σ_t weights[q][t] · level[t][c]` of two-bit or ternary rows that lie back to back in `codes`.
    pub(crate) fn weigh_words(product: &WordWeights, words: &[u16], units: &[f32], codes: &[u8], output: &mut [f32]) = weigh_words_kernel;
}

/// The largest level of a table.
pub(crate) const LARGEST_LEVEL: f32 = 1023.0;
/// How many smaller ones it is chosen among.
const LEVEL_STEPS: usize = 64;
/// The largest weight.
pub(super) const LARGEST_WEIGHT: f32 = 32767.0;
/// Rows of a weighted sum at most: 64 · 32767 · 1023 is below 2³¹.
pub(crate) const WEIGHED_ROWS: usize = 64;
/// Added to a float below 2²², this leaves the nearest integer in its low bits, negative ones as two's complement.
pub(super) const ROUNDING: f32 = 12_582_912.0;
/// The least that is taken for the largest of some factors, so that the inverse of their unit is finite.
pub(super) const TINY: f32 = 1e-30;
/// Bytes of ternary codes that are expanded at a time, and what may be read behind them.
const TERNARY_BYTES: usize = 2048;
const MARGIN: usize = LANES;

/// The largest word of a query whose products with `channels` levels of up to `steps` steps stay below 2³¹.
pub(crate) fn largest_word(channels: usize, steps: f32) -> f32 {
    ((1u64 << 31) as f32 / (steps + 1.0) / channels as f32 - 1.0).min(32767.0)
}

/// x · factor to the nearest integer, in the low half of each lane; above it is what [`pair`] masks or shifts away.
#[inline(always)]
pub(super) unsafe fn round<S: Lanes>(x: S::F, factor: S::F) -> S::I {
    // SAFETY: the caller has S's features.
    unsafe { S::to_bits(S::add(S::mul(x, factor), S::splat(ROUNDING))) }
}

/// Two words in each lane, the first in its low half.
#[inline(always)]
pub(super) unsafe fn pair<S: Lanes>(low: S::I, high: S::I) -> S::I {
    // SAFETY: the caller has S's features.
    unsafe { S::or(S::and(low, 0xffff), S::shl::<16>(high)) }
}

/// Levels of two codes at a time, as words of one u32: entry `c | c' << 2` is level c and, above it, level c'.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordTable {
    entries: [u32; LANES],
    /// What one step of a word is worth.
    unit: f32,
}

impl WordTable {
    /// None for layouts that words do not serve; keys are scored, values are weighed.
    pub(crate) fn new(layout: &RowLayout, codebook: &Codebook, values: bool) -> Option<Self> {
        let whole_planes = layout.format == Format::Int2 && layout.head_dim.is_multiple_of(4 * LANES);
        if layout.groups() != 1 || !(whole_planes || values && layout.format == Format::Ternary) {
            return None;
        }
        let mut levels = [0.0f32; 4];
        (0..layout.format.levels()).for_each(|code| levels[code] = codebook.level(code as u8));
        // Levels are multiples of hardly any step: of some, the one that they are nearest to being multiples of.
        let rest =
            |unit: f32| levels.iter().map(|level| (level / unit - (level / unit).round()).abs()).fold(0.0, f32::max);
        let units = (0..LEVEL_STEPS).map(|less| codebook.largest() / (LARGEST_LEVEL - less as f32));
        let unit = units.min_by(|a, b| rest(*a).total_cmp(&rest(*b))).expect("at least one step");
        let word = |code: usize| u32::from((levels[code] / unit).round() as i16 as u16);
        let entries = std::array::from_fn(|i| word(i & 3) | word(i >> 2) << 16);
        Some(Self { entries, unit })
    }

    pub(crate) const fn unit(&self) -> f32 {
        self.unit
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(&self) -> S::Table16 {
        // SAFETY: the caller's. The table takes floats; nothing is done with them but to look them up.
        unsafe { S::table16(&self.entries.map(f32::from_bits)) }
    }
}

/// The largest |x|, at least [`TINY`], and whether all of them are finite.
#[inline(always)]
pub(super) unsafe fn magnitude<S: Lanes>(values: &[f32]) -> (f32, bool) {
    // SAFETY: lanes of the slice; the caller has S's features.
    unsafe {
        let mut bits = S::splat_u32(0);
        let mut largest = S::zero();
        for vector in values.chunks(LANES) {
            let x = S::load_partial(vector.as_ptr(), vector.len());
            bits = S::max_magnitude(bits, x);
            largest = S::max(S::abs(x), largest);
        }
        (S::reduce_max(largest).max(TINY), S::all_finite(bits))
    }
}

#[inline(always)]
unsafe fn query_words_kernel<S: Lanes>(queries: &[f32], width: usize, words: &mut [u32], units: &mut [f32]) -> bool {
    let planes = width / 4;
    assert!(
        width.is_multiple_of(4 * LANES) && queries.len() == units.len() * width && words.len() == queries.len() / 2
    );
    let mut all_finite = true;
    for ((query, words), unit) in queries.chunks_exact(width).zip(words.chunks_exact_mut(width / 2)).zip(units) {
        // SAFETY: vectors of 16 channels below `width`, of 16 words below half of it; the caller has S's features.
        unsafe {
            let (largest, finite) = magnitude::<S>(query);
            all_finite &= finite;
            *unit = largest / largest_word(width, LARGEST_LEVEL);
            let factor = S::splat(1.0 / *unit);
            let mut block = 0;
            while block < planes {
                let mut half = 0;
                while half < 2 {
                    let source = query.as_ptr().add(2 * half * planes + block);
                    let (low, high) = (S::load(source), S::load(source.add(planes)));
                    let pairs = pair::<S>(round::<S>(low, factor), round::<S>(high, factor));
                    S::store(S::from_bits(pairs), words.as_mut_ptr().add(2 * block + half * LANES).cast());
                    half += 1;
                }
                block += LANES;
            }
        }
    }
    all_finite
}

/// Sizes of a score product.
pub(crate) struct ScoreSizes {
    pub queries: usize,
    pub rows: usize,
    pub score_stride: usize,
}

/// A score product of two-bit rows.
pub(crate) struct WordScores<'a> {
    pub table: &'a WordTable,
    /// Channels of a row, a multiple of 64.
    pub width: usize,
    pub sizes: ScoreSizes,
}

#[inline(always)]
unsafe fn score_words_kernel<S: Lanes>(p: &WordScores, words: &[u32], units: &[f32], codes: &[u8], scores: &mut [f32]) {
    assert!(p.width.is_multiple_of(4 * LANES) && codes.len() >= p.sizes.rows * p.width / 4);
    assert!(words.len() == p.sizes.queries * p.width / 2);
    // SAFETY: by the assertions every block of a row stays inside the slices; the caller has S's features.
    unsafe { score_all::<S, _>(p, &p.sizes, p.table.unit, words, units, codes, scores) }
}

/// A score product: words of queries and codes of rows that fit its sizes.
pub(super) trait ScoreWords {
    /// Adds the products of queries `q .. q + Q` and rows `t .. t + T`, whose lanes are still to be summed.
    unsafe fn add<S: Lanes, const Q: usize, const T: usize>(
        &self,
        q: usize,
        t: usize,
        words: &[u32],
        codes: &[u8],
        sums: &mut [[S::I; T]; Q],
    );
}

/// Scores of all queries and rows of a product whose words and codes fit its sizes; `unit` is what one step of a level is worth.
#[inline(always)]
pub(super) unsafe fn score_all<S: Lanes, P: ScoreWords>(
    p: &P,
    sizes: &ScoreSizes,
    unit: f32,
    words: &[u32],
    units: &[f32],
    codes: &[u8],
    scores: &mut [f32],
) {
    assert!(units.len() == sizes.queries);
    assert!(sizes.queries == 0 || scores.len() >= (sizes.queries - 1) * sizes.score_stride + sizes.rows);
    // SAFETY: the caller's.
    unsafe {
        let mut q = 0;
        while q + 4 <= sizes.queries {
            score_rows::<S, P, 4, 4>(p, sizes, q, unit, words, units, codes, scores);
            q += 4;
        }
        while q < sizes.queries {
            score_rows::<S, P, 1, 16>(p, sizes, q, unit, words, units, codes, scores);
            q += 1;
        }
    }
}

/// `Q` queries against all rows, `T` at a time; Q · T is 16.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn score_rows<S: Lanes, P: ScoreWords, const Q: usize, const T: usize>(
    p: &P,
    sizes: &ScoreSizes,
    q: usize,
    unit: f32,
    words: &[u32],
    units: &[f32],
    codes: &[u8],
    scores: &mut [f32],
) {
    let (rows, stride) = (sizes.rows, sizes.score_stride);
    let units: [f32; Q] = std::array::from_fn(|i| units[q + i] * unit);
    let scores = &mut scores[q * stride..];
    // SAFETY: see `score_all`. The last rows are done together with some before them, or singly where there are too few.
    unsafe {
        let mut t = 0;
        while t + T <= rows {
            score_block::<S, P, Q, T>(p, q, t, stride, words, &units, codes, scores);
            t += T;
        }
        if t < rows && rows >= T {
            score_block::<S, P, Q, T>(p, q, rows - T, stride, words, &units, codes, scores);
        } else {
            while t < rows {
                score_block::<S, P, Q, 1>(p, q, t, stride, words, &units, codes, scores);
                t += 1;
            }
        }
    }
}

/// `units` and `scores` are those of query `q` and the next.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn score_block<S: Lanes, P: ScoreWords, const Q: usize, const T: usize>(
    p: &P,
    q: usize,
    t: usize,
    stride: usize,
    words: &[u32],
    units: &[f32; Q],
    codes: &[u8],
    scores: &mut [f32],
) {
    // SAFETY: q + Q ≤ queries, t + T ≤ rows.
    unsafe {
        let mut sums = [[S::splat_u32(0); T]; Q];
        p.add::<S, Q, T>(q, t, words, codes, &mut sums);
        let target = scores.as_mut_ptr().add(t);
        if Q * T == LANES {
            let mut all = [S::zero(); LANES];
            let mut k = 0;
            while k < LANES {
                all[k] = S::signed_to_f32(sums[k / T][k % T]);
                k += 1;
            }
            let mut folded = [0.0f32; LANES];
            S::store(S::reduce_add_16(all), folded.as_mut_ptr());
            let mut k = 0;
            while k < LANES {
                target.add(k / T * stride + k % T).write(folded[k] * units[k / T]);
                k += 1;
            }
        } else {
            let mut i = 0;
            while i < Q {
                let sum = S::reduce_add(S::signed_to_f32(sums[i][0]));
                target.add(i * stride).write(sum * units[i]);
                i += 1;
            }
        }
    }
}

impl ScoreWords for WordScores<'_> {
    #[inline(always)]
    unsafe fn add<S: Lanes, const Q: usize, const T: usize>(
        &self,
        q: usize,
        t: usize,
        words: &[u32],
        codes: &[u8],
        sums: &mut [[S::I; T]; Q],
    ) {
        // SAFETY: q + Q ≤ queries, t + T ≤ rows; blocks are below the planes of a row.
        unsafe {
            let planes = self.width / 4;
            let table = self.table.load::<S>();
            let words = words.as_ptr().add(q * self.width / 2);
            let row = codes.as_ptr().add(t * planes);
            let mut block = 0;
            while block < planes {
                let mut half = 0;
                while half < 2 {
                    let mut vectors = [S::splat_u32(0); Q];
                    let mut i = 0;
                    while i < Q {
                        vectors[i] = S::load_u32(words.add(i * self.width / 2 + 2 * block + half * LANES).cast());
                        i += 1;
                    }
                    let mut j = 0;
                    while j < T {
                        let bytes = S::load_u8(row.add(j * planes + block));
                        let index = if half == 0 { bytes } else { S::shr::<4>(bytes) };
                        let levels = S::to_bits(S::lookup16(table, index));
                        let mut i = 0;
                        while i < Q {
                            sums[i][j] = S::dot_words(sums[i][j], vectors[i], levels);
                            i += 1;
                        }
                        j += 1;
                    }
                    half += 1;
                }
                block += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn weight_words_kernel<S: Lanes>(weights: &[f32], words: &mut [u16]) -> Option<f32> {
    assert!(words.len() == weights.len().next_multiple_of(2));
    // SAFETY: the caller has S's features.
    let (largest, finite) = unsafe { magnitude::<S>(weights) };
    if !finite {
        return None;
    }
    let factor = LARGEST_WEIGHT / largest;
    for (word, weight) in words.iter_mut().zip(weights) {
        *word = (weight * factor + ROUNDING).to_bits() as u16;
    }
    if weights.len() < words.len() {
        words[weights.len()] = 0;
    }
    Some(largest / LARGEST_WEIGHT)
}

/// Sizes of a weighted sum of rows.
pub(crate) struct WordWeights<'a> {
    pub table: &'a WordTable,
    pub ternary: bool,
    pub queries: usize,
    /// At most [`WEIGHED_ROWS`].
    pub rows: usize,
    /// Channels of a row; of two-bit rows a multiple of 64.
    pub width: usize,
    /// Words of a query.
    pub weight_stride: usize,
}

#[inline(always)]
unsafe fn weigh_words_kernel<S: Lanes>(
    p: &WordWeights,
    words: &[u16],
    units: &[f32],
    codes: &[u8],
    output: &mut [f32],
) {
    let planes = if p.ternary { p.width.div_ceil(5) } else { p.width / 4 };
    assert!(p.rows <= WEIGHED_ROWS && (p.ternary || p.width.is_multiple_of(4 * LANES)));
    assert!(codes.len() >= p.rows * planes && planes <= TERNARY_BYTES / 2);
    assert!(p.weight_stride >= p.rows.next_multiple_of(2) && words.len() >= p.queries * p.weight_stride);
    assert!(units.len() == p.queries && output.len() >= p.queries * p.width);
    // SAFETY: by the assertions every block below stays inside the slices, or the buffers with their margins; the caller has S's features.
    unsafe {
        if !p.ternary {
            let rows = Expanded { low: codes.as_ptr(), high: codes.as_ptr(), planes, first: 0, count: p.rows };
            return weigh_rows::<S, 4, false>(p, &rows, words, units, output);
        }
        let mut low = [0u8; TERNARY_BYTES + MARGIN];
        let mut high = [0u8; TERNARY_BYTES + MARGIN];
        let batch = (TERNARY_BYTES / planes) & !1;
        let mut first = 0;
        while first < p.rows {
            let count = (p.rows - first).min(batch);
            S::expand_ternary(codes.as_ptr().add(first * planes), count * planes, low.as_mut_ptr(), high.as_mut_ptr());
            let rows = Expanded { low: low.as_ptr(), high: high.as_ptr(), planes, first, count };
            weigh_rows::<S, 5, true>(p, &rows, words, units, output);
            first += count;
        }
    }
}

/// Rows `first .. first + count` of a product: bytes of four two-bit codes, and of the fifth ternary digit.
struct Expanded {
    low: *const u8,
    high: *const u8,
    planes: usize,
    first: usize,
    count: usize,
}

#[inline(always)]
unsafe fn weigh_rows<S: Lanes, const PLANES: usize, const TERNARY: bool>(
    p: &WordWeights,
    rows: &Expanded,
    words: &[u16],
    units: &[f32],
    output: &mut [f32],
) {
    // SAFETY: see `weigh_words_kernel`.
    unsafe {
        let mut q = 0;
        while q + 4 <= p.queries {
            weigh_channels::<S, 4, PLANES, TERNARY>(p, rows, q, words, units, output);
            q += 4;
        }
        while q < p.queries {
            weigh_channels::<S, 1, PLANES, TERNARY>(p, rows, q, words, units, output);
            q += 1;
        }
    }
}

/// `Q` queries, sixteen bytes of the rows at a time: `PLANES` vectors of channels.
#[inline(always)]
unsafe fn weigh_channels<S: Lanes, const Q: usize, const PLANES: usize, const TERNARY: bool>(
    p: &WordWeights,
    rows: &Expanded,
    q: usize,
    words: &[u16],
    units: &[f32],
    output: &mut [f32],
) {
    // SAFETY: see `weigh_words_kernel`. A vector of bytes may reach into the next row, or the margin; of what comes from there nothing is
    // kept. Of an odd number of rows the last is its own second, whose weight is 0.
    unsafe {
        let table = p.table.load::<S>();
        let words = words.as_ptr().add(q * p.weight_stride + rows.first);
        let planes = rows.planes;
        let mut block = 0;
        while block < planes {
            let mut sums = [[S::splat_u32(0); PLANES]; Q];
            let mut t = 0;
            while t < rows.count {
                let (first, second) = (t * planes + block, (t + 1).min(rows.count - 1) * planes + block);
                let (a, b) = (S::load_u8(rows.low.add(first)), S::load_u8(rows.low.add(second)));
                let even = S::or(S::and(a, 0x33), S::and(S::shl::<2>(b), 0xcc));
                let odd = S::or(S::and(S::shr::<2>(a), 0x33), S::and(b, 0xcc));
                let mut levels = [S::splat_u32(0); PLANES];
                levels[0] = S::to_bits(S::lookup16(table, even));
                levels[1] = S::to_bits(S::lookup16(table, odd));
                levels[2] = S::to_bits(S::lookup16(table, S::shr::<4>(even)));
                levels[3] = S::to_bits(S::lookup16(table, S::shr::<4>(odd)));
                if TERNARY {
                    let (a, b) = (S::load_u8(rows.high.add(first)), S::load_u8(rows.high.add(second)));
                    levels[PLANES - 1] = S::to_bits(S::lookup16(table, S::or(a, S::shl::<2>(b))));
                }
                let mut i = 0;
                while i < Q {
                    let pair = S::splat_u32(words.add(i * p.weight_stride + t).cast::<u32>().read_unaligned());
                    let mut v = 0;
                    while v < PLANES {
                        sums[i][v] = S::dot_words(sums[i][v], pair, levels[v]);
                        v += 1;
                    }
                    i += 1;
                }
                t += 2;
            }
            let mut i = 0;
            while i < Q {
                let unit = S::splat(units[q + i] * p.table.unit);
                let mut v = 0;
                while v < PLANES {
                    let channel = v * planes + block;
                    let end = ((v + 1) * planes).min(p.width);
                    if channel < end {
                        let n = (end - channel).min(LANES);
                        let target = output.as_mut_ptr().add((q + i) * p.width + channel);
                        let sum = S::mul(S::signed_to_f32(sums[i][v]), unit);
                        S::store_partial(S::add(S::load_partial(target, n), sum), target, n);
                    }
                    v += 1;
                }
                i += 1;
            }
            block += LANES;
        }
    }
}

//! Scores and weighted sums of rows of parts and of three bits as products of 16-bit integers: what `words.rs` does for two-bit and
//! ternary rows. (Rows of four bits gained nothing by it.)
//!
//! A row's channels come sixteen at a time, each sixteen of one part and so of one number of bits. Their levels are words of the low
//! halves of sixteen lanes, or of the high ones: two sixteens of a row make a vector for scores, the same sixteen of two neighbouring rows
//! one for weighted sums. Shapes: words of queries `[queries, 16 · pairs]`, of weights `[queries, stride]`.

use super::words::{ScoreSizes, ScoreWords, TINY, WEIGHED_ROWS, largest_word, magnitude, pair, round, score_all};
use super::{LANES, Lanes, multiversion};
use crate::codebook::Codebook;
use crate::format::{Format, RowLayout};
use crate::parts::Part;

multiversion! {
    /// Queries `[queries, stride]` in the order in which the sixteens of rows come, with the unit of each; false if one is not finite.
    pub(crate) fn query_words(table: &PartWords, queries: &[f32], stride: usize, words: &mut [u32], units: &mut [f32]) -> bool = query_words_kernel;
    /// `scores[q][t] = Σ_c queries[q][c] · level[t][c]` of rows that lie back to back in `codes`.
    pub(crate) fn score_words(product: &PartScores, words: &[u32], units: &[f32], codes: &[u8], scores: &mut [f32]) = score_words_kernel;
    /// `output[q][c] += Σ_t weights[q][t] · level[t][c]` of rows that lie back to back in `codes`.
    pub(crate) fn weigh_words(product: &PartWeights, words: &[u16], units: &[f32], codes: &[u8], output: &mut [f32]) = weigh_words_kernel;
}

/// Levels of a part with most bits.
const LEVELS: usize = 32;
/// The largest level, of keys and of values: as many steps as leave room for a query's, or for those of all weights of a piece.
pub(crate) const LARGEST_KEY: f32 = 4095.0;
pub(crate) const LARGEST_VALUE: f32 = 1023.0;

/// How sixteen codes lie in a row: strings of 1 to [`STRINGS`] bits; planes of two bits, of which there are four, and a string of the third
/// bits.
type Kind = usize;
const STRINGS: Kind = 5;
const PLANES: Kind = 6;

/// Sixteen channels of a row.
#[derive(Clone, Copy, Debug)]
struct Sixteen {
    kind: Kind,
    /// Byte of the row with their codes, or with the low bits of them; byte with the string of the bits above.
    at: usize,
    above: usize,
    channel: usize,
    part: usize,
}

/// Where the codes of a row are, and the levels of every part as words.
#[derive(Clone, Debug)]
pub(crate) struct PartWords {
    sixteens: Vec<Sixteen>,
    /// Of every part, as words of the low half and of the high half; the other is 0. As floats, which nobody computes with.
    levels: Vec<[[f32; LEVELS]; 2]>,
    code_bytes: usize,
    /// What one step of a word is worth.
    unit: f32,
    largest_query: f32,
}

impl PartWords {
    /// Of rows of parts of `code_bytes`; None for a row of no parts. Keys are scored, values are weighed.
    pub(crate) fn of_parts(parts: &[Part], code_bytes: usize, values: bool) -> Option<Self> {
        let channels = parts.last()?.channels().end;
        let mut sixteens = Vec::with_capacity(channels / LANES);
        for (index, part) in parts.iter().enumerate() {
            let low = part.bits.min(4);
            assert!(part.width.is_multiple_of(LANES) && part.bytes().end <= code_bytes, "a part outside its row");
            sixteens.extend((0..part.width).step_by(LANES).map(|c| Sixteen {
                kind: part.bits,
                at: part.offset + c / 8 * low,
                above: part.offset + part.width / 8 * low + c / 8,
                channel: part.first + c,
                part: index,
            }));
        }
        let books: Vec<_> = parts.iter().map(|part| (&part.codebook, part.bits)).collect();
        Some(Self::new(sixteens, &books, code_bytes, values))
    }

    /// Of rows of three bits; None for others, and where a sixteen is not of one plane and one scale.
    pub(crate) fn of_rows(layout: &RowLayout, codebook: &Codebook, values: bool) -> Option<Self> {
        let (width, plane) = (layout.head_dim, layout.head_dim / 4);
        if layout.format != Format::Int3 || layout.groups() != 1 || !plane.is_multiple_of(LANES) {
            return None;
        }
        let sixteen =
            |c| Sixteen { kind: PLANES + c / plane, at: c % plane, above: plane + c / 8, channel: c, part: 0 };
        let sixteens = (0..width).step_by(LANES).map(sixteen).collect();
        Some(Self::new(sixteens, &[(codebook, 3)], layout.code_bytes, values))
    }

    fn new(sixteens: Vec<Sixteen>, books: &[(&Codebook, usize)], code_bytes: usize, values: bool) -> Self {
        let steps = if values { LARGEST_VALUE } else { LARGEST_KEY };
        let unit = books.iter().map(|(book, _)| book.largest()).fold(TINY, f32::max) / steps;
        let word = |book: &Codebook, code: usize| u32::from((book.level(code as u8) / unit).round() as i16 as u16);
        // Over and over, so that what stands above a code is of no matter.
        let words_of = |&(book, bits): &(&Codebook, usize)| {
            [0, 16].map(|half| std::array::from_fn(|code| f32::from_bits(word(book, code % (1 << bits)) << half)))
        };
        let channels = sixteens.len() * LANES;
        let largest_query = largest_word(channels, steps);
        Self { sixteens, levels: books.iter().map(words_of).collect(), code_bytes, unit, largest_query }
    }

    /// Words of a query.
    pub(crate) const fn query_words(&self) -> usize {
        self.sixteens.len().div_ceil(2) * LANES
    }

    fn channels(&self) -> usize {
        self.sixteens.len() * LANES
    }
}

#[inline(always)]
unsafe fn query_words_kernel<S: Lanes>(
    table: &PartWords,
    queries: &[f32],
    stride: usize,
    words: &mut [u32],
    units: &mut [f32],
) -> bool {
    let (channels, length) = (table.channels(), table.query_words());
    assert!(stride >= channels && queries.len() >= units.len() * stride && words.len() == units.len() * length);
    let mut all_finite = true;
    for ((query, words), unit) in queries.chunks_exact(stride).zip(words.chunks_exact_mut(length)).zip(units) {
        // SAFETY: vectors of sixteen channels of a row, of sixteen words of its pairs; the caller has S's features.
        unsafe {
            let (largest, finite) = magnitude::<S>(&query[..channels]);
            all_finite &= finite;
            *unit = largest / table.largest_query;
            let factor = S::splat(1.0 / *unit);
            for (index, sixteens) in table.sixteens.chunks(2).enumerate() {
                let mut halves = [S::splat_u32(0); 2];
                for (half, sixteen) in halves.iter_mut().zip(sixteens) {
                    let x = S::load(query[sixteen.channel..][..LANES].as_ptr());
                    *half = round::<S>(x, factor);
                }
                let both = pair::<S>(halves[0], halves[1]);
                S::store(S::from_bits(both), words[index * LANES..][..LANES].as_mut_ptr().cast());
            }
        }
    }
    all_finite
}

/// The levels of one part, as tables of words: the first sixteen, the others; the second four of eight.
#[derive(Clone, Copy)]
struct Tables<S: Lanes> {
    low: S::Table16,
    upper: S::Table16,
    fours: [S::Table4; 2],
    first: S::F,
    second: S::F,
}

impl<S: Lanes> Tables<S> {
    #[inline(always)]
    unsafe fn new(levels: &[f32; LEVELS]) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self {
                low: S::table16(&levels[..LANES]),
                upper: S::table16(&levels[LANES..]),
                fours: [S::table4(&levels[..4]), S::table4(&levels[4..8])],
                first: S::splat(levels[0]),
                second: S::splat(levels[1]),
            }
        }
    }
}

/// The levels of sixteen codes of a kind, in the halves that the tables are of.
#[inline(always)]
unsafe fn levels_of<S: Lanes, const KIND: Kind>(tables: &Tables<S>, row: *const u8, sixteen: &Sixteen) -> S::I {
    // SAFETY: the caller's row has these bytes.
    unsafe {
        let at = row.add(sixteen.at);
        let above = || row.add(sixteen.above).cast::<u16>().read_unaligned().to_le();
        S::to_bits(match KIND {
            1 => S::select_bits(at.cast::<u16>().read_unaligned().to_le(), tables.first, tables.second),
            2 => S::lookup16(tables.low, S::load_bits::<2>(at)),
            3 => S::lookup16(tables.low, S::load_bits::<3>(at)),
            4 => S::lookup16(tables.low, S::load_bits::<4>(at)),
            STRINGS => {
                let codes = S::load_bits::<4>(at);
                S::select_bits(above(), S::lookup16(tables.low, codes), S::lookup16(tables.upper, codes))
            }
            _ => {
                let bytes = S::load_u8(at);
                let codes = match KIND - PLANES {
                    0 => bytes,
                    1 => S::shr::<2>(bytes),
                    2 => S::shr::<4>(bytes),
                    _ => S::shr::<6>(bytes),
                };
                S::select_bits(above(), S::lookup4(tables.fours[0], codes), S::lookup4(tables.fours[1], codes))
            }
        })
    }
}

/// A score product.
pub(crate) struct PartScores<'a> {
    pub table: &'a PartWords,
    pub sizes: ScoreSizes,
}

#[inline(always)]
unsafe fn score_words_kernel<S: Lanes>(p: &PartScores, words: &[u32], units: &[f32], codes: &[u8], scores: &mut [f32]) {
    assert!(codes.len() >= p.sizes.rows * p.table.code_bytes);
    assert!(words.len() == p.sizes.queries * p.table.query_words());
    // SAFETY: by the assertions, and those of `PartWords`, every sixteen of a row stays inside the slices; the caller has S's features.
    unsafe { score_all::<S, _>(p, &p.sizes, p.table.unit, words, units, codes, scores) }
}

impl ScoreWords for PartScores<'_> {
    #[inline(always)]
    unsafe fn add<S: Lanes, const Q: usize, const T: usize>(
        &self,
        q: usize,
        t: usize,
        words: &[u32],
        codes: &[u8],
        sums: &mut [[S::I; T]; Q],
    ) {
        // SAFETY: q + Q ≤ queries, t + T ≤ rows.
        unsafe {
            let length = self.table.query_words();
            let mut words = words.as_ptr().add(q * length);
            let row = codes.as_ptr().add(t * self.table.code_bytes);
            for pair in self.table.sixteens.chunks(2) {
                let mut levels = [S::splat_u32(0); T];
                for (half, sixteen) in pair.iter().enumerate() {
                    all_levels::<S, T>(self.table, half, sixteen, row, &mut levels);
                }
                let mut i = 0;
                while i < Q {
                    let vector = S::load_u32(words.add(i * length).cast());
                    let mut j = 0;
                    while j < T {
                        sums[i][j] = S::dot_words(sums[i][j], vector, levels[j]);
                        j += 1;
                    }
                    i += 1;
                }
                words = words.add(LANES);
            }
        }
    }
}

/// Adds the levels of a sixteen of `T` rows to lanes in which this half is 0.
#[inline(always)]
unsafe fn all_levels<S: Lanes, const T: usize>(
    table: &PartWords,
    half: usize,
    sixteen: &Sixteen,
    row: *const u8,
    levels: &mut [S::I; T],
) {
    // SAFETY: the caller's rows have these bytes.
    unsafe {
        let tables = Tables::<S>::new(&table.levels[sixteen.part][half]);
        match sixteen.kind {
            1 => levels_of_rows::<S, T, 1>(table, &tables, sixteen, row, levels),
            2 => levels_of_rows::<S, T, 2>(table, &tables, sixteen, row, levels),
            3 => levels_of_rows::<S, T, 3>(table, &tables, sixteen, row, levels),
            4 => levels_of_rows::<S, T, 4>(table, &tables, sixteen, row, levels),
            5 => levels_of_rows::<S, T, 5>(table, &tables, sixteen, row, levels),
            6 => levels_of_rows::<S, T, 6>(table, &tables, sixteen, row, levels),
            7 => levels_of_rows::<S, T, 7>(table, &tables, sixteen, row, levels),
            8 => levels_of_rows::<S, T, 8>(table, &tables, sixteen, row, levels),
            _ => levels_of_rows::<S, T, 9>(table, &tables, sixteen, row, levels),
        }
    }
}

#[inline(always)]
unsafe fn levels_of_rows<S: Lanes, const T: usize, const KIND: Kind>(
    table: &PartWords,
    tables: &Tables<S>,
    sixteen: &Sixteen,
    row: *const u8,
    levels: &mut [S::I; T],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut j = 0;
        while j < T {
            levels[j] = S::or(levels[j], levels_of::<S, KIND>(tables, row.add(j * table.code_bytes), sixteen));
            j += 1;
        }
    }
}

/// Sizes of a weighted sum of rows.
pub(crate) struct PartWeights<'a> {
    pub table: &'a PartWords,
    pub queries: usize,
    /// At most [`WEIGHED_ROWS`].
    pub rows: usize,
    /// Words of a query.
    pub weight_stride: usize,
    pub output_stride: usize,
}

#[inline(always)]
unsafe fn weigh_words_kernel<S: Lanes>(
    p: &PartWeights,
    words: &[u16],
    units: &[f32],
    codes: &[u8],
    output: &mut [f32],
) {
    assert!(p.rows <= WEIGHED_ROWS && codes.len() >= p.rows * p.table.code_bytes);
    assert!(p.weight_stride >= p.rows.next_multiple_of(2) && words.len() >= p.queries * p.weight_stride);
    assert!(p.output_stride >= p.table.channels() && output.len() >= p.queries * p.output_stride);
    assert!(units.len() == p.queries);
    for sixteen in &p.table.sixteens {
        // SAFETY: by the assertions, and those of `PartWords`, sixteens of rows and outputs lie inside the slices; the caller has S's
        // features.
        unsafe {
            match sixteen.kind {
                1 => weigh_sixteen::<S, 1>(p, sixteen, words, units, codes, output),
                2 => weigh_sixteen::<S, 2>(p, sixteen, words, units, codes, output),
                3 => weigh_sixteen::<S, 3>(p, sixteen, words, units, codes, output),
                4 => weigh_sixteen::<S, 4>(p, sixteen, words, units, codes, output),
                5 => weigh_sixteen::<S, 5>(p, sixteen, words, units, codes, output),
                6 => weigh_sixteen::<S, 6>(p, sixteen, words, units, codes, output),
                7 => weigh_sixteen::<S, 7>(p, sixteen, words, units, codes, output),
                8 => weigh_sixteen::<S, 8>(p, sixteen, words, units, codes, output),
                _ => weigh_sixteen::<S, 9>(p, sixteen, words, units, codes, output),
            }
        }
    }
}

#[inline(always)]
unsafe fn weigh_sixteen<S: Lanes, const KIND: Kind>(
    p: &PartWeights,
    sixteen: &Sixteen,
    words: &[u16],
    units: &[f32],
    codes: &[u8],
    output: &mut [f32],
) {
    // SAFETY: see `weigh_words_kernel`.
    unsafe {
        let mut q = 0;
        while q + 8 <= p.queries {
            weigh_rows::<S, 8, KIND>(p, sixteen, q, words, units, codes, output);
            q += 8;
        }
        while q + 4 <= p.queries {
            weigh_rows::<S, 4, KIND>(p, sixteen, q, words, units, codes, output);
            q += 4;
        }
        while q < p.queries {
            weigh_rows::<S, 1, KIND>(p, sixteen, q, words, units, codes, output);
            q += 1;
        }
    }
}

/// `Q` queries and one sixteen of all rows, two rows at a time; of an odd number the last is its own second, whose weight is 0.
#[inline(always)]
unsafe fn weigh_rows<S: Lanes, const Q: usize, const KIND: Kind>(
    p: &PartWeights,
    sixteen: &Sixteen,
    q: usize,
    words: &[u16],
    units: &[f32],
    codes: &[u8],
    output: &mut [f32],
) {
    // SAFETY: see `weigh_words_kernel`.
    unsafe {
        let [low, high] = &p.table.levels[sixteen.part];
        let (low, high) = (Tables::<S>::new(low), Tables::<S>::new(high));
        let words = words.as_ptr().add(q * p.weight_stride);
        let mut sums = [S::splat_u32(0); Q];
        let mut t = 0;
        while t < p.rows {
            let second = (t + 1).min(p.rows - 1);
            let levels = S::or(
                levels_of::<S, KIND>(&low, codes.as_ptr().add(t * p.table.code_bytes), sixteen),
                levels_of::<S, KIND>(&high, codes.as_ptr().add(second * p.table.code_bytes), sixteen),
            );
            let mut i = 0;
            while i < Q {
                let pair = S::splat_u32(words.add(i * p.weight_stride + t).cast::<u32>().read_unaligned());
                sums[i] = S::dot_words(sums[i], pair, levels);
                i += 1;
            }
            t += 2;
        }
        let mut i = 0;
        while i < Q {
            let target = output.as_mut_ptr().add((q + i) * p.output_stride + sixteen.channel);
            let sum = S::mul(S::signed_to_f32(sums[i]), S::splat(units[q + i] * p.table.unit));
            S::store(S::add(S::load(target), sum), target);
            i += 1;
        }
    }
}

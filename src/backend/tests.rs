//! The fast paths against the plain ones: codes bit for bit, attention within float noise of an f64 oracle, the laws of the regions.

use crate::backend::attend::{Attention, attend};
use crate::backend::noise::score_noise;
use crate::backend::simd::Isa;
use crate::backend::simd::part_words::{self, PartWords};
use crate::backend::simd::words::{self, WordTable};
use crate::backend::{cpu, simd};
use crate::codebook::Codebook;
use crate::codec::{Codec, Rule};
use crate::format::{Format, Metadata, RowLayout};
use crate::layer::{Layer, LayerSpec, NonFinite, Regions};
use crate::parts::{PartLevels, parts_of_row};
use crate::tensor::{Dtype, MaskView, TensorView, TensorViewMut};
use crate::transform::{Affine, BlockRule, Matrix, Permutation, Rotation, Source, TurningMean, Turns};
use half::bf16;

/// A small generator: the tests need no more than "different every time, the same every run".
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 24) as f32
    }

    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f32) as usize % n
    }

    /// `rows` rows with an offset and a spread of each channel's own, as keys have.
    fn rows(&mut self, rows: usize, width: usize) -> Vec<f32> {
        let channels: Vec<(f32, f32)> =
            (0..width).map(|_| (4.0 * self.normal(), 0.1 + 3.0 * self.uniform().powi(4))).collect();
        (0..rows).flat_map(|_| channels.clone()).map(|(mean, spread)| mean + spread * self.normal()).collect()
    }
}

const FORMATS: [Format; 6] = [Format::Int8, Format::Int4, Format::Int3, Format::Int2, Format::Ternary, Format::Pair];

fn codec(format: Format, head_dim: usize, group_size: usize, source: Source) -> Codec {
    let name = if format == Format::Int8 { "uniform" } else { "lloyd-max" };
    let layout = RowLayout::new(format, head_dim, group_size, Metadata::E4m3, true).unwrap();
    Codec {
        layout,
        codebook: Codebook::named(name, format).unwrap(),
        parts: Vec::new(),
        rule: if format == Format::Int8 { Rule::Range } else { Rule::Norm },
        clip: 1.0,
        refinements: 0,
        unbiased: false,
        rotation: Rotation::Hadamard,
        permutations: Vec::new(),
        source,
        matrices: Vec::new(),
        noise: Vec::new(),
    }
}

fn plain_source(head_dim: usize) -> Source {
    Source::Static(vec![Affine::identity(head_dim)])
}

fn random_codec(noise: &mut Noise, head_dim: usize) -> Codec {
    let format = FORMATS[noise.below(FORMATS.len())];
    let groups: Vec<usize> = [16, 32, 64, 128, head_dim].into_iter().filter(|g| head_dim.is_multiple_of(*g)).collect();
    let shift = (0..head_dim).map(|_| noise.normal()).collect();
    let scale = (0..head_dim).map(|_| 0.2 + noise.uniform()).collect();
    let mut order: Vec<usize> = (0..head_dim).collect();
    (0..head_dim).for_each(|i| order.swap(i, noise.below(head_dim)));
    let uniform = format == Format::Int8 || (format != Format::Pair && noise.below(2) == 0);
    let layout = RowLayout::new(
        format,
        head_dim,
        groups[noise.below(groups.len())],
        [Metadata::E4m3, Metadata::Fp16][noise.below(2)],
        noise.below(2) == 0,
    )
    .unwrap();
    let codebook = Codebook::named(if uniform { "uniform" } else { "lloyd-max" }, format).unwrap();
    Codec {
        layout,
        codebook,
        parts: Vec::new(),
        rule: [Rule::Norm, Rule::Range][noise.below(2)],
        clip: 0.9 + 0.1 * noise.uniform(),
        refinements: noise.below(3) as u32,
        unbiased: noise.below(2) == 0,
        rotation: [Rotation::Identity, Rotation::Hadamard][noise.below(2)],
        permutations: if noise.below(2) == 0 { vec![Permutation::new(&order, head_dim).unwrap()] } else { vec![] },
        source: Source::Static(vec![Affine::new(shift, scale)]),
        matrices: Vec::new(),
        noise: Vec::new(),
    }
}

/// Random parts behind random matrices, with a mean that turns if asked for.
fn random_codec_of_parts(noise: &mut Noise, head_dim: usize, heads: usize, turning: bool) -> Codec {
    let (mut list, mut left) = (vec![(1 + noise.below(5), 16)], head_dim - 16);
    while left > 0 {
        let width = (16 * (1 + noise.below(4))).min(left);
        left -= width;
        list.push((if left == 0 { noise.below(6) } else { 1 + noise.below(5) }, width));
    }
    let metadata = [Metadata::E4m3, Metadata::Fp16][noise.below(2)];
    let levels = if noise.uniform() < 0.5 { PartLevels::LloydMax } else { PartLevels::Even };
    let square = |noise: &mut Noise| {
        (0..head_dim * head_dim).map(|_| noise.normal() / (head_dim as f32).sqrt()).collect::<Vec<_>>()
    };
    let row = |noise: &mut Noise| (0..head_dim).map(|_| 3.0 * noise.normal()).collect::<Vec<_>>();
    let source = if turning {
        let frequencies: Vec<f32> =
            (0..head_dim).map(|c| 100f32.powf(-((c % (head_dim / 2)) as f32) * 4.0 / head_dim as f32)).collect();
        let turns = Turns::shared(&frequencies).unwrap();
        let mean = |noise: &mut Noise| TurningMean::new(row(noise), row(noise), turns.clone()).unwrap();
        Source::Turning((0..heads).map(|_| mean(noise)).collect())
    } else {
        Source::Static((0..heads).map(|_| Affine::new(row(noise), vec![1.0; head_dim])).collect())
    };
    let (layout, parts) = parts_of_row(head_dim, metadata, &list, levels).unwrap();
    let codec = Codec {
        layout,
        codebook: Codebook::named("lloyd-max", Format::Parts).unwrap(),
        parts,
        rule: Rule::Norm,
        clip: 0.9 + 0.2 * noise.uniform(),
        refinements: 0,
        unbiased: false,
        rotation: Rotation::Identity,
        permutations: Vec::new(),
        source,
        matrices: (0..heads).map(|_| Matrix::new(&square(noise), &square(noise), head_dim).unwrap()).collect(),
        noise: Vec::new(),
    };
    codec.validate(heads).unwrap();
    codec
}

#[test]
fn every_isa_makes_the_codes_and_rows_of_the_reference() {
    let mut noise = Noise(1);
    for round in 0..400 {
        let head_dim = [16, 64, 80, 96, 112, 128, 192, 256, 512][noise.below(9)];
        let codec = match round % 3 {
            0 => random_codec_of_parts(&mut noise, head_dim, 1, false),
            _ => random_codec(&mut noise, head_dim),
        };
        let layout = &codec.layout;
        let mut rows = noise.rows(3, head_dim);
        rows[head_dim..2 * head_dim].fill(if round % 2 == 0 { 0.0 } else { 1e30 });
        for row in rows.chunks(head_dim) {
            let affine = codec.static_affine(0).unwrap();
            let (mut codes, mut metadata) = (vec![0; layout.code_bytes], vec![0; layout.metadata_bytes]);
            codec.encode_row(row, affine, 0, &mut codes, &mut metadata);
            let mut decoded = vec![0.0; head_dim];
            codec.decode_row(&codes, &metadata, affine, 0, &mut decoded);
            for isa in Isa::available() {
                let (mut fast_codes, mut fast_metadata) = (vec![1; codes.len()], vec![1; metadata.len()]);
                cpu::encode_row(isa, &codec, affine, 0, row, &mut fast_codes, &mut fast_metadata);
                assert_eq!(fast_metadata, metadata, "{isa} {codec:?}");
                assert_eq!(fast_codes, codes, "{isa} {codec:?}");
                let (mut levels, mut fast) = (vec![0.0; head_dim + simd::levels::SLACK], vec![0.0; head_dim]);
                if codec.is_of_parts() {
                    simd::levels::decode_parts(isa, &codec.parts, layout.code_bytes, &codes, 1, &mut levels);
                } else {
                    simd::levels::decode_levels(isa, layout, &codec.codebook, &codes, 1, &mut levels);
                }
                simd::rows::restore_row(isa, &codec, affine, 0, &metadata, &levels[..head_dim], &mut fast);
                let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&fast), bits(&decoded), "{isa} {codec:?}");
            }
        }
    }
}

#[test]
fn rows_decode_together_as_one_by_one() {
    let mut noise = Noise(3);
    for head_dim in [16, 64, 80, 96, 112, 128, 192, 256, 512] {
        for format in FORMATS {
            let codec = codec(format, head_dim, head_dim, plain_source(head_dim));
            let (layout, affine) = (&codec.layout, Affine::identity(head_dim));
            for rows in [1, 2, 15, 39, 40, 128] {
                let (mut codes, mut metadata) = (vec![0; rows * layout.code_bytes], vec![0; layout.metadata_bytes]);
                for (row, codes) in noise.rows(rows, head_dim).chunks(head_dim).zip(codes.chunks_mut(layout.code_bytes))
                {
                    codec.encode_row(row, &affine, 0, codes, &mut metadata);
                }
                for isa in Isa::available() {
                    let decode = |codes: &[u8], rows: usize| {
                        let mut levels = vec![f32::NAN; rows * head_dim + simd::levels::SLACK];
                        simd::levels::decode_levels(isa, layout, &codec.codebook, codes, rows, &mut levels);
                        levels.truncate(rows * head_dim);
                        levels
                    };
                    let singly: Vec<f32> = codes.chunks(layout.code_bytes).flat_map(|codes| decode(codes, 1)).collect();
                    assert_eq!(decode(&codes, rows), singly, "{isa} {format:?} {head_dim} channels, {rows} rows");
                }
            }
        }
    }
}

/// Where an instruction set has products of words; nothing is tested elsewhere.
#[test]
fn words_score_and_weigh_like_levels_in_f32() {
    let mut noise = Noise(9);
    let mut served = 0;
    for isa in Isa::available().into_iter().filter(|isa| isa.has_words()) {
        for format in FORMATS {
            for head_dim in [16, 64, 80, 96, 112, 128, 192, 256, 512] {
                let codec = codec(format, head_dim, head_dim, plain_source(head_dim));
                for (rows, queries) in [(1, 1), (2, 3), (15, 4), (33, 5), (64, 8), (7, 9)] {
                    served += usize::from(check_words(isa, &codec, rows, queries, &mut noise));
                }
            }
        }
    }
    let (two_bits, ternary) = ([64, 128, 192, 256, 512].len(), 9);
    assert_eq!(served, if Isa::best().has_words() { 6 * (two_bits + ternary) } else { 0 });
}

/// Random rows as codes, and the levels that they are decoded to, `[rows, stored channels]`.
struct Coded<'a> {
    isa: Isa,
    codec: &'a Codec,
    rows: usize,
    width: usize,
    codes: Vec<u8>,
    levels: Vec<f32>,
    largest: f64,
}

impl<'a> Coded<'a> {
    fn new(isa: Isa, codec: &'a Codec, rows: usize, noise: &mut Noise) -> Self {
        let (layout, width) = (&codec.layout, codec.stored_channels());
        let (head_dim, identity) = (layout.head_dim, Affine::identity(layout.head_dim));
        let affine = codec.static_affine(0).unwrap_or(&identity);
        let (mut codes, mut metadata) = (vec![0; rows * layout.code_bytes], vec![0; layout.metadata_bytes]);
        for (row, codes) in noise.rows(rows, head_dim).chunks(head_dim).zip(codes.chunks_mut(layout.code_bytes)) {
            codec.encode_row(row, affine, 0, codes, &mut metadata);
        }
        let mut levels = vec![0.0; rows * width + simd::levels::SLACK];
        if codec.is_of_parts() {
            simd::levels::decode_parts(isa, &codec.parts, layout.code_bytes, &codes, rows, &mut levels);
        } else {
            simd::levels::decode_levels(isa, layout, &codec.codebook, &codes, rows, &mut levels);
        }
        let books =
            codec.parts.iter().map(|part| &part.codebook).chain((!codec.is_of_parts()).then_some(&codec.codebook));
        let largest = books.map(|book| f64::from(book.largest())).fold(0.0, f64::max);
        Self { isa, codec, rows, width, codes, levels, largest }
    }

    fn level(&self, t: usize, c: usize) -> f64 {
        f64::from(self.levels[t * self.width + c])
    }

    /// Holds a weighted sum of words, added to ones `[queries, stride]`, against the sum in f64.
    fn check_weighing(
        &self,
        queries: usize,
        stride: usize,
        noise: &mut Noise,
        weigh: impl FnOnce(&[u16], &[f32], &mut [f32]),
    ) {
        let (rows, room) = (self.rows, words::WEIGHED_ROWS);
        let mut weights: Vec<f32> = (0..queries * room).map(|_| noise.uniform().powi(8)).collect();
        weights[..rows].fill(0.0); // a query that sees none of these rows
        let (mut weight_words, mut units) = (vec![0; queries * room], vec![0.0; queries]);
        for (q, unit) in units.iter_mut().enumerate() {
            let target = &mut weight_words[q * room..][..rows.next_multiple_of(2)];
            *unit = words::weight_words(self.isa, &weights[q * room..][..rows], target).unwrap();
        }
        let mut output = vec![1.0; queries * stride];
        weigh(&weight_words, &units, &mut output);
        for q in 0..queries {
            let weights = &weights[q * room..][..rows];
            let most: f64 = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>() * self.largest;
            for c in 0..stride {
                let pair = |(t, weight): (usize, &f32)| f64::from(*weight) * self.level(t, c);
                let exact: f64 = if c < self.width { weights.iter().enumerate().map(pair).sum() } else { 0.0 };
                let error = (f64::from(output[q * stride + c]) - 1.0 - exact).abs();
                // Levels of many bits are up to half a step off, and so is every weight.
                let many = self.codec.is_of_parts() || self.codec.layout.format.levels() > 4;
                let allowed = if many { 6e-4 } else { 1e-4 };
                assert!(
                    error <= allowed * most + 1e-6,
                    "{} {:?}: output ({q}, {c}) is {error} off",
                    self.isa,
                    self.codec
                );
            }
        }
        weights[0] = f32::NAN;
        let target = &mut weight_words[..rows.next_multiple_of(2)];
        assert!(words::weight_words(self.isa, &weights[..rows], target).is_none());
    }

    /// Holds scores `[queries, rows]` against those in f64; `score` gives None where queries are not finite.
    fn check_scoring(
        &self,
        queries: usize,
        stride: usize,
        noise: &mut Noise,
        score: impl Fn(&[f32]) -> Option<Vec<f32>>,
    ) {
        let mut query: Vec<f32> = (0..queries * stride).map(|_| noise.normal()).collect();
        query[..stride].fill(0.0);
        let scores = score(&query).unwrap();
        for (q, query) in query.chunks(stride).enumerate() {
            let query = &query[..self.width];
            let most: f64 = query.iter().map(|x| f64::from(x.abs())).sum::<f64>() * self.largest;
            for t in 0..self.rows {
                let exact: f64 = query.iter().enumerate().map(|(c, x)| f64::from(*x) * self.level(t, c)).sum();
                let error = (f64::from(scores[q * self.rows + t]) - exact).abs();
                let many = self.codec.is_of_parts() || self.codec.layout.format.levels() > 4;
                let allowed = if many { 5e-4 } else { 1e-4 };
                assert!(
                    error <= allowed * most,
                    "{} {:?}: score ({q}, {t}) is {error} off, {exact}",
                    self.isa,
                    self.codec
                );
            }
        }
        query[self.width / 2] = f32::INFINITY;
        assert!(score(&query).is_none());
    }
}

/// False if words do not serve such values.
fn check_words(isa: Isa, codec: &Codec, rows: usize, queries: usize, noise: &mut Noise) -> bool {
    let (layout, width) = (&codec.layout, codec.layout.head_dim);
    let Some(table) = WordTable::new(layout, &codec.codebook, true) else {
        assert!(WordTable::new(layout, &codec.codebook, false).is_none());
        return false;
    };
    let coded = Coded::new(isa, codec, rows, noise);
    coded.check_weighing(queries, width, noise, |weights, units, output| {
        let (ternary, weight_stride) = (layout.format == Format::Ternary, words::WEIGHED_ROWS);
        let product = words::WordWeights { table: &table, ternary, queries, rows, width, weight_stride };
        words::weigh_words(isa, &product, weights, units, &coded.codes, output);
    });
    let Some(table) = WordTable::new(layout, &codec.codebook, false) else { return true };
    coded.check_scoring(queries, width, noise, |query| {
        let (mut query_words, mut units) = (vec![0; queries * width / 2], vec![0.0; queries]);
        let finite = words::query_words(isa, query, width, &mut query_words, &mut units);
        let product =
            words::WordScores { table: &table, width, sizes: words::ScoreSizes { queries, rows, score_stride: rows } };
        let mut scores = vec![f32::NAN; queries * rows];
        words::score_words(isa, &product, &query_words, &units, &coded.codes, &mut scores);
        finite.then_some(scores)
    });
    true
}

/// Likewise for rows of parts and of three bits.
#[test]
fn words_of_parts_score_and_weigh_like_levels_in_f32() {
    let mut noise = Noise(10);
    for isa in Isa::available().into_iter().filter(|isa| isa.has_words()) {
        for round in 0..120 {
            let stride = [16, 64, 80, 96, 112, 128, 192, 256, 512][round % 9];
            let (rows, queries) = [(1, 1), (2, 3), (15, 4), (33, 5), (64, 8), (7, 13)][noise.below(6)];
            let codec = match round % 4 {
                0 => codec(Format::Int3, stride, stride, plain_source(stride)),
                _ => random_codec_of_parts(&mut noise, stride, 1, false),
            };
            let of = |values| match codec.layout.format {
                Format::Parts => PartWords::of_parts(&codec.parts, codec.layout.code_bytes, values),
                _ => PartWords::of_rows(&codec.layout, &codec.codebook, values),
            };
            if round % 4 == 0 && !stride.is_multiple_of(64) {
                assert!(of(true).is_none());
                continue;
            }
            let table = |values| of(values).unwrap();
            let coded = Coded::new(isa, &codec, rows, &mut noise);
            coded.check_weighing(queries, stride, &mut noise, |weights, units, output| {
                let (table, weight_stride) = (&table(true), words::WEIGHED_ROWS);
                let product = part_words::PartWeights { table, queries, rows, weight_stride, output_stride: stride };
                part_words::weigh_words(isa, &product, weights, units, &coded.codes, output);
            });
            coded.check_scoring(queries, stride, &mut noise, |query| {
                let table = &table(false);
                let (mut query_words, mut units) = (vec![0; queries * table.query_words()], vec![0.0; queries]);
                let finite = part_words::query_words(isa, table, query, stride, &mut query_words, &mut units);
                let product =
                    part_words::PartScores { table, sizes: words::ScoreSizes { queries, rows, score_stride: rows } };
                let mut scores = vec![f32::NAN; queries * rows];
                part_words::score_words(isa, &product, &query_words, &units, &coded.codes, &mut scores);
                finite.then_some(scores)
            });
        }
    }
}

#[test]
fn a_broken_row_decodes_to_nan_and_nothing_else() {
    let codec = codec(Format::Int2, 64, 32, plain_source(64));
    let affine = Affine::identity(64);
    for isa in Isa::available() {
        let mut row = vec![1.0; 64];
        row[7] = f32::INFINITY;
        let (mut codes, mut metadata) = (vec![9; 16], vec![9; 2]);
        cpu::encode_row(isa, &codec, &affine, 0, &row, &mut codes, &mut metadata);
        let (mut slow_codes, mut slow_metadata) = (vec![9; 16], vec![9; 2]);
        codec.encode_row(&row, &affine, 0, &mut slow_codes, &mut slow_metadata);
        assert_eq!((&codes, &metadata), (&slow_codes, &slow_metadata));
        let mut out = vec![0.0; 64];
        codec.decode_row(&codes, &metadata, &affine, 0, &mut out);
        assert!(out.iter().all(|value| value.is_nan()));
    }
}

fn spec(heads: usize, keys: Codec, values: Codec, sinks: usize, window: usize, isa: Isa) -> LayerSpec {
    LayerSpec {
        num_key_value_heads: heads,
        keys,
        values,
        sinks,
        window,
        dtype: Dtype::F32,
        nonfinite: NonFinite::Raise,
        isa,
    }
}

/// All rows of a layer, `[batch × heads × tokens, width]`.
fn decoded(layer: &Layer, values: bool) -> Vec<f32> {
    let spec = layer.spec();
    let width = if values { &spec.values } else { &spec.keys }.layout.head_dim;
    let shape = [layer.batch_size(), spec.num_key_value_heads, layer.regions().total(), width];
    let mut out = vec![0.0f32; shape.iter().product()];
    layer.decode(values, TensorViewMut::from_slice(&mut out, shape)).unwrap();
    out
}

/// A call's inputs in plain arrays.
struct Case {
    batch: usize,
    heads: usize,
    group: usize,
    length: usize,
    tokens: usize,
    key_width: usize,
    value_width: usize,
}

/// Attention in f64 on decoded rows; `visible(b, l, t)`.
#[allow(clippy::too_many_arguments)]
fn oracle(
    case: &Case,
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    scale: f64,
    softcap: Option<f32>,
    sinks: Option<&[f32]>,
    visible: impl Fn(usize, usize, usize) -> bool,
) -> Vec<f64> {
    let mut output = Vec::new();
    for b in 0..case.batch {
        for h in 0..case.heads * case.group {
            let kv = b * case.heads + h / case.group;
            for l in 0..case.length {
                let q =
                    &query[((b * case.heads * case.group + h) * case.length + l) * case.key_width..][..case.key_width];
                let scores: Vec<f64> = (0..case.tokens)
                    .map(|t| {
                        let k = &keys[(kv * case.tokens + t) * case.key_width..][..case.key_width];
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        let score =
                            softcap.map_or(dot * scale, |cap| f64::from(cap) * (dot * scale / f64::from(cap)).tanh());
                        if visible(b, l, t) { score } else { f64::NEG_INFINITY }
                    })
                    .collect();
                let sink = sinks.map(|sinks| f64::from(sinks[h]));
                let maximum = scores.iter().copied().fold(sink.unwrap_or(f64::NEG_INFINITY), f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - maximum).exp()).collect();
                let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - maximum).exp());
                for c in 0..case.value_width {
                    let value = |t: usize| f64::from(values[(kv * case.tokens + t) * case.value_width + c]);
                    output.push(weights.iter().enumerate().map(|(t, w)| w * value(t)).sum::<f64>() / sum);
                }
            }
        }
    }
    output
}

fn close(found: &[f32], wanted: &[f64], allowed: f64) -> bool {
    let largest = wanted.iter().fold(1.0f64, |most, value| most.max(value.abs()));
    found.iter().zip(wanted).all(|(found, wanted)| (f64::from(*found) - wanted).abs() < allowed * largest)
}

#[test]
fn attention_on_packed_bytes_equals_attention_on_decoded_rows() {
    let mut noise = Noise(2);
    for round in 0..120 {
        let isas = Isa::available();
        let isa = isas[round % isas.len()];
        let (key_width, value_width) = ([64, 80, 128, 256][noise.below(4)], [64, 96, 128][noise.below(3)]);
        let block = [0, 128, 256][noise.below(3)];
        let source = |noise: &mut Noise, width| match block {
            0 => random_codec(noise, width).source,
            rows => Source::Block(BlockRule::new(rows, noise.below(2) == 0, noise.uniform(), 0.0).unwrap()),
        };
        let mut keys = random_codec(&mut noise, key_width);
        let mut values = random_codec(&mut noise, value_width);
        (keys.source, values.source) = (source(&mut noise, key_width), source(&mut noise, value_width));
        let heads = 1 + noise.below(2);
        if noise.below(2) == 0 {
            let turning = noise.below(2) == 0;
            keys = random_codec_of_parts(&mut noise, key_width, heads, turning);
        }
        if noise.below(3) == 0 {
            values = random_codec_of_parts(&mut noise, value_width, heads, false);
        }
        let case = Case {
            batch: 1 + noise.below(2),
            heads,
            group: [1, 2, 3, 4, 7][noise.below(5)],
            length: [1, 1, 2, 5, 20][noise.below(5)],
            tokens: 30 + noise.below(700),
            key_width,
            value_width,
        };
        let mut layer = Layer::new(spec(case.heads, keys, values, noise.below(6), 1 + noise.below(40), isa)).unwrap();
        let shape = |width| [case.batch, case.heads, case.tokens, width];
        let key_rows = noise.rows(case.batch * case.heads * case.tokens, key_width);
        let value_rows = noise.rows(case.batch * case.heads * case.tokens, value_width);
        let key_view = TensorView::from_slice(&key_rows, shape(key_width));
        let value_view = TensorView::from_slice(&value_rows, shape(value_width));
        layer.append(key_view, value_view).unwrap();

        let query_shape = [case.batch, case.heads * case.group, case.length, key_width];
        let short: Vec<bf16> = (0..query_shape.iter().product()).map(|_| bf16::from_f32(noise.normal())).collect();
        let query: Vec<f32> = short.iter().map(|value| value.to_f32()).collect();
        let fresh = noise.below(2) * case.length.min(case.tokens - 1);
        let (mut all_keys, mut all_values) = (decoded(&layer, false), decoded(&layer, true));
        for (all, exact, width) in [(&mut all_keys, &key_rows, key_width), (&mut all_values, &value_rows, value_width)]
        {
            for head in 0..case.batch * case.heads {
                let part = (head * case.tokens + case.tokens - fresh) * width..(head + 1) * case.tokens * width;
                all[part.clone()].copy_from_slice(&exact[part]);
            }
        }
        let causal = noise.below(2) == 0;
        let padding: Vec<usize> = (0..case.batch).map(|_| noise.below(2) * noise.below(case.tokens / 2)).collect();
        let mask: Vec<u8> =
            (0..case.batch * case.tokens).map(|i| u8::from(i % case.tokens >= padding[i / case.tokens])).collect();
        let softcap = (noise.below(3) == 0).then_some(5.0);
        let sinks: Vec<f32> = (0..case.heads * case.group).map(|_| noise.normal()).collect();
        let sinks = (noise.below(3) == 0).then_some(&sinks[..]);
        let scale = 0.3 / (key_width as f32).sqrt();
        let visible = |b: usize, l: usize, t: usize| t >= padding[b] && (!causal || t <= case.tokens - case.length + l);
        let wanted = oracle(&case, &query, &all_keys, &all_values, f64::from(scale), softcap, sinks, visible);
        let call = Attention {
            query: TensorView::from_slice(&query, query_shape),
            scale,
            mask: Some(MaskView::from_visible(&mask, [case.batch, 1, 1, case.tokens])),
            causal,
            softcap,
            sink_logits: sinks,
            fresh: (fresh > 0).then(|| {
                let first = case.tokens - fresh;
                (key_view.slice_tokens(first, fresh), value_view.slice_tokens(first, fresh))
            }),
        };
        let output_shape = [case.batch, case.heads * case.group, case.length, value_width];
        let mut output = vec![0.0f32; output_shape.iter().product()];
        attend(&layer, &call, TensorViewMut::from_slice(&mut output, output_shape)).unwrap();
        assert!(close(&output, &wanted, 2e-5), "round {round}, {isa}: {:?}", layer.spec());
        // Queries of 16 bits may be products of integers.
        let call = Attention { query: TensorView::from_slice(&short, query_shape), ..call };
        attend(&layer, &call, TensorViewMut::from_slice(&mut output, output_shape)).unwrap();
        assert!(close(&output, &wanted, 2e-3), "round {round}, {isa}, bfloat16: {:?}", layer.spec());
    }
}

#[test]
fn noise_takes_its_share_off_the_scores_of_packed_rows() {
    let (d, total, sinks, window) = (64, 300, 4, 20);
    let mut noise = Noise(9);
    let values = codec(Format::Int8, d, d, plain_source(d));
    let plain = random_codec_of_parts(&mut noise, d, 1, true);
    let kappa: Vec<f32> = (0..d).map(|_| 0.3 * noise.uniform()).collect();
    let noisy = Codec { noise: kappa.clone(), ..plain.clone() };
    let rows = noise.rows(total, d);
    let query: Vec<f32> = (0..d).map(|_| 0.05 * noise.normal()).collect();
    let shape = [1, 1, total, d];
    for isa in Isa::available() {
        let scores = |keys: &Codec| {
            let mut layer = Layer::new(spec(1, keys.clone(), values.clone(), sinks, window, isa)).unwrap();
            let view = TensorView::from_slice(&rows, shape);
            layer.append(view, view).unwrap();
            // One token at a time, against itself and a token whose score is known: the last.
            let score = |token: usize| {
                let mask: Vec<u8> = (0..total).map(|t| u8::from(t == token || t == total - 1)).collect();
                let call = Attention {
                    query: TensorView::from_slice(&query, [1, 1, 1, d]),
                    scale: 1.0,
                    mask: Some(MaskView::from_visible(&mask, [1, 1, 1, total])),
                    causal: false,
                    softcap: None,
                    sink_logits: None,
                    fresh: None,
                };
                let mut output = vec![0.0f32; d];
                attend(&layer, &call, TensorViewMut::from_slice(&mut output, [1, 1, 1, d])).unwrap();
                let decoded = decoded(&layer, true);
                let (a, b) = (&decoded[token * d..][..d], &decoded[(total - 1) * d..][..d]);
                // output = w·a + (1 − w)·b in every channel: w by least squares, the score's distance by its logit.
                let (mut along, mut length) = (0.0f64, 0.0f64);
                for c in 0..d {
                    let difference = f64::from(a[c]) - f64::from(b[c]);
                    along += (f64::from(output[c]) - f64::from(b[c])) * difference;
                    length += difference * difference;
                }
                let weight = along / length;
                (weight / (1.0 - weight)).ln()
            };
            [0, 10, 150, 285].map(score)
        };
        let (without, with) = (scores(&plain), scores(&noisy));
        let mut folded = vec![0.0; d];
        plain.matrices[0].fold(isa, &query, &mut folded);
        let spread: f32 = 0.5 * kappa.iter().zip(&folded).map(|(k, q)| k * q * q).sum::<f32>();
        let squared_scale = |token: usize| {
            let turning = plain.turning_mean(0).unwrap();
            let mut affine = Affine::identity(d);
            turning.at(&turning.turns.spans(4), token as i64, &mut affine.shift);
            let (mut codes, mut metadata) = (vec![0; plain.layout.code_bytes], vec![0; plain.layout.metadata_bytes]);
            plain.encode_row(&rows[token * d..][..d], &affine, 0, &mut codes, &mut metadata);
            plain.layout.metadata.load(&metadata).powi(2)
        };
        for (i, token) in [0usize, 10, 150, 285].into_iter().enumerate() {
            let packed = token >= sinks && token < total - window;
            let expected = if packed { f64::from(spread * squared_scale(token)) } else { 0.0 };
            let found = without[i] - with[i];
            assert!((found - expected).abs() < 0.02 * expected + 1e-3, "{isa}, token {token}: {found} {expected}");
        }
    }
}

#[test]
fn the_expected_noise_of_scores_is_what_decoded_keys_show() {
    let (d, total, heads) = (64, 400, 2);
    let mut noise = Noise(11);
    let values = codec(Format::Int2, d, d, plain_source(d));
    let block = Source::Block(BlockRule::new(128, true, 0.5, 0.0).unwrap());
    let list: Vec<Codec> = vec![
        codec(Format::Int2, d, d, block.clone()),
        codec(Format::Int3, d, 32, block),
        codec(Format::Int4, d, 32, plain_source(d)),
        random_codec_of_parts(&mut noise, d, heads, false),
    ];
    for (case, keys) in list.into_iter().enumerate() {
        let rows: Vec<f32> = (0..heads * total * d).map(|_| noise.normal()).collect();
        let query: Vec<f32> = (0..heads * d).map(|_| noise.normal()).collect();
        let is_of_parts = keys.is_of_parts();
        let stored = keys.stored_channels();
        let mut layer = Layer::new(spec(heads, keys, values.clone(), 3, 20, Isa::best())).unwrap();
        let view = TensorView::from_slice(&rows, [1, heads, total, d]);
        layer.append(view, view).unwrap();
        let expected = score_noise(&layer, &TensorView::from_slice(&query, [1, heads, 1, d]), 0.5).unwrap();
        let decoded = decoded(&layer, false);
        let packed = layer.regions().packed;
        let mut squares = 0.0f64;
        for head in 0..heads {
            for t in 3..3 + packed {
                let at = (head * total + t) * d;
                let difference = |c: usize| f64::from(decoded[at + c] - rows[at + c]);
                let error: f64 = (0..d).map(|c| 0.5 * f64::from(query[head * d + c]) * difference(c)).sum();
                squares += error * error;
            }
        }
        let found = squares / (heads * packed) as f64;
        // Matrices that are no inverses of each other have an error of their own: there only the order of magnitude can be checked.
        let (low, high) = if is_of_parts { (0.0, f64::from(expected) * 1e6) } else { (0.75, 1.3) };
        let ratio = found / f64::from(expected);
        assert!(expected > 0.0 && (ratio > low && ratio < high), "case {case} ({stored} channels): {found} {expected}");
    }
}

fn small_layer(block: usize, sinks: usize, window: usize) -> Layer {
    let source = |rows| match rows {
        0 => plain_source(64),
        rows => Source::Block(BlockRule::new(rows, true, 1.0, 0.0).unwrap()),
    };
    let keys = codec(Format::Int2, 64, 64, source(block));
    let values = codec(Format::Ternary, 64, 32, source(0));
    Layer::new(spec(2, keys, values, sinks, window, Isa::best())).unwrap()
}

fn append(layer: &mut Layer, rows: &[f32], first: usize, count: usize, total: usize) {
    let view = TensorView::from_slice(rows, [1, 2, total, 64]).slice_tokens(first, count);
    layer.append(view, view).unwrap();
}

#[test]
fn append_in_parts_equals_append_at_once() {
    let mut noise = Noise(3);
    for (block, window) in [(0, 16), (128, 16), (128, 127), (128, 128), (128, 300)] {
        let total = 500;
        let rows = noise.rows(2 * total, 64);
        let mut whole = small_layer(block, 5, window);
        append(&mut whole, &rows, 0, total, total);
        let mut parts = small_layer(block, 5, window);
        let mut done = 0;
        while done < total {
            let count = (1 + noise.below(60)).min(total - done);
            append(&mut parts, &rows, done, count, total);
            done += count;
            let regions = parts.regions();
            assert_eq!(regions.total(), done);
            assert_eq!(regions.sinks, done.min(5));
            let behind_sinks = done - regions.sinks;
            let with_statistics = behind_sinks / block.max(1) * block.max(1);
            assert_eq!(regions.packed, behind_sinks.saturating_sub(window).min(with_statistics));
        }
        assert_eq!(decoded(&whole, false), decoded(&parts, false));
        assert_eq!(decoded(&whole, true), decoded(&parts, true));
    }
}

#[test]
fn crop_then_append_keeps_what_was_packed() {
    let mut noise = Noise(4);
    for block in [0, 128] {
        let total = 420;
        let rows = noise.rows(2 * total, 64);
        let mut straight = small_layer(block, 5, 16);
        append(&mut straight, &rows, 0, total, total);
        for length in [419, 410, 300, 140, 3, 0] {
            let mut layer = small_layer(block, 5, 16);
            append(&mut layer, &rows, 0, total, total);
            layer.crop(length).unwrap();
            assert_eq!(layer.regions().total(), length);
            append(&mut layer, &rows, length, total - length, total);
            assert_eq!(layer.regions(), straight.regions());
            assert_eq!(decoded(&straight, false), decoded(&layer, false), "{length}");
        }
        let mut layer = small_layer(block, 5, 16);
        append(&mut layer, &rows, 0, 20, total);
        assert!(layer.crop(21).is_err());
    }
}

#[test]
fn statistics_are_fixed_with_the_last_row_and_go_with_a_cut_block() {
    let mut noise = Noise(8);
    let (one, other) = (noise.rows(2 * 300, 64), noise.rows(2 * 300, 64));
    let statistics = 64 * 2 * 2; // shift and scale of a head's keys, fp16
    let packed_keys = |layer: &Layer| layer.head(0, 0).keys.past.clone();
    // 128 rows behind 5 sinks are a block, all within the window of 200.
    let mut layer = small_layer(128, 5, 200);
    append(&mut layer, &one, 0, 132, 300);
    assert_eq!(packed_keys(&layer).blocks(), 0);
    let before = layer.nbytes();
    append(&mut layer, &one, 132, 1, 300);
    assert_eq!((packed_keys(&layer).blocks(), layer.regions().packed), (1, 0));
    assert!(layer.nbytes() >= before + 2 * statistics);
    // Cut without a packed row: forgotten, and taken again from the rows that come instead.
    layer.crop(100).unwrap();
    assert_eq!(packed_keys(&layer).blocks(), 0);
    append(&mut layer, &other, 100, 200, 300);
    let mut straight = small_layer(128, 5, 200);
    append(&mut straight, &one, 0, 100, 300);
    append(&mut straight, &other, 100, 200, 300);
    assert_eq!(layer.regions(), Regions { sinks: 5, packed: 95, window: 200 });
    assert_eq!(decoded(&layer, false), decoded(&straight, false));
    // Cut with packed rows: they keep their statistics, and so do the rows that follow.
    let kept = packed_keys(&layer).block(0, 128).clone();
    layer.crop(60).unwrap();
    assert_eq!(layer.regions(), Regions { sinks: 5, packed: 55, window: 0 });
    append(&mut layer, &one, 60, 240, 300);
    assert_eq!(*packed_keys(&layer).block(0, 128), kept);
    assert_eq!(layer.regions(), straight.regions());
    assert_eq!(decoded(&layer, false)[..60 * 64], decoded(&straight, false)[..60 * 64]);
}

#[test]
fn gathered_sequences_are_independent() {
    let mut noise = Noise(5);
    let rows = noise.rows(2 * 2 * 300, 64);
    let view = TensorView::from_slice(&rows, [2, 2, 300, 64]);
    let mut layer = small_layer(128, 5, 16);
    layer.append(view, view).unwrap();
    let (before, bytes) = (decoded(&layer, false), layer.nbytes());
    let half = before.len() / 2;
    layer.gather(&[1, 0, 1]).unwrap();
    assert_eq!(layer.nbytes(), bytes, "nothing is copied by a gather");
    let gathered = decoded(&layer, false);
    assert_eq!(gathered[..half], before[half..]);
    assert_eq!(gathered[half..2 * half], before[..half]);
    let more = noise.rows(3 * 2 * 150, 64);
    let more = TensorView::from_slice(&more, [3, 2, 150, 64]);
    let copy = layer.clone();
    layer.append(more, more).unwrap();
    assert_eq!(decoded(&copy, false), gathered, "a clone is not touched");
    assert!(layer.gather(&[3]).is_err() && layer.gather(&[]).is_err());
    assert_eq!(layer.batch_size(), 3);
}

#[test]
fn a_refused_append_changes_nothing() {
    let mut noise = Noise(6);
    let rows = noise.rows(2 * 100, 64);
    let mut layer = small_layer(0, 5, 16);
    append(&mut layer, &rows, 0, 100, 100);
    let (regions, before) = (layer.regions(), decoded(&layer, true));
    let good = TensorView::from_slice(&rows, [1, 2, 100, 64]);
    let mut broken = rows.clone();
    broken[64 * 100 + 3] = f32::NAN;
    let broken = TensorView::from_slice(&broken, [1, 2, 100, 64]);
    let error = layer.append(good, broken).unwrap_err().to_string();
    assert!(error.contains("values") && error.contains("head 1, token 0"), "{error}");
    assert!(layer.append(good, good.slice_tokens(0, 5)).is_err());
    assert!(layer.append(TensorView::from_slice(&rows, [2, 2, 50, 64]), good).is_err());
    assert!(layer.append(TensorView::from_slice(&rows, [1, 1, 200, 64]), good).is_err());
    assert!(layer.append(good.slice_tokens(0, 0), good.slice_tokens(0, 0)).is_err());
    assert_eq!((layer.regions(), decoded(&layer, true)), (regions, before));
}

#[test]
fn one_broken_row_leaves_its_block_alone() {
    let mut noise = Noise(7);
    let rows = noise.rows(2 * 200, 64);
    let mut broken = rows.clone();
    broken[64 * 50 + 1] = f32::NAN;
    let run = |rows: &[f32]| {
        let mut layer = small_layer(128, 5, 16);
        let mut spec = layer.spec().clone();
        spec.nonfinite = NonFinite::Propagate;
        layer = Layer::new(spec).unwrap();
        append(&mut layer, rows, 0, 200, 200);
        decoded(&layer, false)
    };
    let (clean, dirty) = (run(&rows), run(&broken));
    assert!(dirty[64 * 50..64 * 51].iter().all(|value| value.is_nan()));
    for (i, (clean, dirty)) in clean.chunks(64).zip(dirty.chunks(64)).enumerate() {
        let error = clean.iter().zip(dirty).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(i == 50 || error < 8.0, "row {i} moved by {error}");
    }
}

#[test]
fn bytes_follow_the_specification() {
    let mut noise = Noise(8);
    let total = 5 + 16 + 10 * 128;
    let rows = noise.rows(2 * total, 64);
    let mut layer = small_layer(0, 5, 16);
    append(&mut layer, &rows, 0, total, total);
    let packed = 2 * 1280 * ((16 + 1) + (13 + 2));
    let plain = layer.nbytes() - packed;
    assert!((2 * 2 * 21 * 64 * 4..=2 * 2 * 60 * 64 * 4).contains(&plain), "{plain}");
    assert_eq!(layer.regions().packed, 1280);
}

#[test]
fn metadata_is_read_as_it_was_stored() {
    for isa in Isa::available() {
        let bytes: Vec<u8> = (0..=255).chain(0..=20).collect();
        let mut numbers = vec![0.0; bytes.len()];
        simd::levels::decode_metadata(isa, Metadata::E4m3, &bytes, &mut numbers);
        for (byte, number) in bytes.iter().zip(&numbers) {
            let wanted = Metadata::E4m3.load(&[*byte]);
            assert!(
                *number == wanted && number.is_sign_negative() == wanted.is_sign_negative()
                    || wanted.is_nan() && number.is_nan()
            );
        }
        let halves = [0.5f32, -65504.0, 6e-8, 0.0, 3.25].map(half::f16::from_f32);
        let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        let mut numbers = vec![0.0; halves.len()];
        simd::levels::decode_metadata(isa, Metadata::Fp16, &bytes, &mut numbers);
        assert!(numbers.iter().zip(halves).all(|(number, half)| *number == half.to_f32()));
    }
}

/// Channel c of row r of the golden cases (`tests/golden/make_rows.py`).
fn golden_row(head_dim: usize, r: usize) -> Vec<f32> {
    let value = |c: usize| ((7919 * (c + 1) + 104_729 * r) % 2003) as f32 - 1001.0;
    (0..head_dim).map(|c| value(c) / 256.0 / if r == 2 { 4096.0 } else { 1.0 }).collect()
}

#[test]
fn golden_bytes_never_change() {
    for line in include_str!("../../tests/golden/rows.txt").lines() {
        let (options, rows) = line.split_once(" | ").unwrap();
        let options: Vec<&str> = options.split(' ').collect();
        let format = Format::from_name(options[0], Dtype::F32).unwrap();
        let head_dim: usize = options[1].parse().unwrap();
        let metadata = Metadata::from_name(options[3]).unwrap();
        let layout =
            RowLayout::new(format, head_dim, options[2].parse().unwrap(), metadata, options[4] == "True").unwrap();
        let codec = Codec {
            layout,
            codebook: Codebook::named(options[5], format).unwrap(),
            parts: Vec::new(),
            rule: Rule::from_name(options[6]).unwrap(),
            clip: 1.0,
            refinements: options[8].parse().unwrap(),
            unbiased: options[9] == "True",
            rotation: Rotation::from_name(options[7]).unwrap(),
            permutations: Vec::new(),
            source: plain_source(head_dim),
            matrices: Vec::new(),
            noise: Vec::new(),
        };
        for (r, wanted) in rows.split(' ').enumerate() {
            let mut packed = vec![0; layout.row_bytes()];
            let (codes, metadata) = packed.split_at_mut(layout.code_bytes);
            codec.encode_row(&golden_row(head_dim, r), &Affine::identity(head_dim), 0, codes, metadata);
            let byte = |i: usize| u8::from_str_radix(&wanted[2 * i..2 * i + 2], 16).unwrap();
            assert_eq!(packed, (0..wanted.len() / 2).map(byte).collect::<Vec<_>>(), "{line}");
        }
    }
}

#[test]
fn golden_bytes_of_parts_never_change() {
    for line in include_str!("../../tests/golden/parts.txt").lines() {
        let (options, rows) = line.split_once(" | ").unwrap();
        let options: Vec<&str> = options.split(' ').collect();
        let d: usize = options[0].parse().unwrap();
        let list: Vec<(usize, usize)> = options[1]
            .split(',')
            .map(|part| part.split_once('x').unwrap())
            .map(|(bits, width)| (bits.parse().unwrap(), width.parse().unwrap()))
            .collect();
        let (metadata, levels) = options[2].split_once('/').unwrap_or((options[2], "lloyd-max"));
        let (metadata, levels) = (Metadata::from_name(metadata).unwrap(), PartLevels::from_name(levels).unwrap());
        let position: i64 = options[3].parse().unwrap();
        // The static data of tests/golden/make_parts.py.
        let entry = |i: usize| ((31 * (i / d) + 17 * (i % d) + (i / d) * (i % d)) % 101) as f32 - 50.0;
        let matrix: Vec<f32> = (0..d * d).map(|i| entry(i) / 64.0).collect();
        let shift: Vec<f32> = (0..d).map(|c| ((13 * c) % 29) as f32 - 14.0).map(|shift| shift / 8.0).collect();
        let sine: Vec<f32> = (0..d).map(|c| shift[(c + d / 2) % d]).collect();
        let frequencies: Vec<f32> = (0..d).map(|c| 1.0 / (1 + c % (d / 2)) as f32).collect();
        let turning = TurningMean::new(shift, sine, Turns::shared(&frequencies).unwrap()).unwrap();
        let (layout, parts) = parts_of_row(d, metadata, &list, levels).unwrap();
        let codec = Codec {
            layout,
            codebook: Codebook::named("lloyd-max", Format::Parts).unwrap(),
            parts,
            rule: Rule::Norm,
            clip: 1.0,
            refinements: 0,
            unbiased: false,
            rotation: Rotation::Identity,
            permutations: Vec::new(),
            source: Source::Turning(vec![turning.clone()]),
            matrices: vec![Matrix::new(&matrix, &matrix, d).unwrap()],
            noise: Vec::new(),
        };
        let spans = turning.turns.spans(position.unsigned_abs() as usize / 256 + 2);
        for (r, wanted) in rows.split(' ').enumerate() {
            let mut affine = Affine::identity(d);
            turning.at(&spans, position + r as i64, &mut affine.shift);
            let mut packed = vec![0; layout.row_bytes()];
            let (codes, metadata) = packed.split_at_mut(layout.code_bytes);
            codec.encode_row(&golden_row(d, r), &affine, 0, codes, metadata);
            let byte = |i: usize| u8::from_str_radix(&wanted[2 * i..2 * i + 2], 16).unwrap();
            assert_eq!(packed, (0..wanted.len() / 2).map(byte).collect::<Vec<_>>(), "{line}");
        }
    }
}

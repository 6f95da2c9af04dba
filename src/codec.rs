//! Rows to codes and back, slowly and plainly: the oracle of the fast encoders and the one place that spells out FORMAT.md §3.
//!
//! A [`Codec`] is the immutable description of how the rows of one stream (the keys or the values of a layer) are packed.
//! It holds no rows. The fast paths live in `backend/`.

use crate::codebook::Codebook;
use crate::error::{Error, Result};
use crate::format::{Format, MAX_HEAD_DIM, RowLayout, pack, unpack};
use crate::parts::{Part, PartLevels};
use crate::transform::{Affine, Matrix, Permutation, Rotation, Source, TurningMean};

/// How a group's scale is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Root mean square of the group.
    Norm,
    /// Largest magnitude (symmetric) or half the span from minimum to maximum (asymmetric).
    Range,
}

impl Rule {
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "norm" => Ok(Self::Norm),
            "range" => Ok(Self::Range),
            _ => Err(Error::value("rule", "\"norm\" or \"range\"", name)),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Range => "range",
        }
    }
}

/// Everything that turns a row into bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Codec {
    pub layout: RowLayout,
    /// Of all channels; not used by rows of parts, which have their own.
    pub codebook: Codebook,
    /// The stored parts of a row of parts, else none.
    pub parts: Vec<Part>,
    pub rule: Rule,
    pub clip: f32,
    pub refinements: u32,
    /// The stored scale makes the decoded group as long as the exact one in its own direction: ⟨d, d̂⟩ = |d|².
    pub unbiased: bool,
    pub rotation: Rotation,
    /// None, one for all heads, or one for each kv head.
    pub permutations: Vec<Permutation>,
    pub source: Source,
    /// For rows of parts, M and B: one for all heads, or one for each.
    pub matrices: Vec<Matrix>,
    /// For keys of parts: the error's variance of every transformed channel, in units of the squared scale; or nothing.
    pub noise: Vec<f32>,
}

impl Codec {
    /// Rows of parts whose levels are evenly spaced.
    pub fn has_even_parts(&self) -> bool {
        self.parts.first().is_some_and(|part| part.levels == PartLevels::Even)
    }

    pub fn is_of_parts(&self) -> bool {
        self.layout.format == Format::Parts
    }

    /// Channels that are stored: all of them, or those of the parts with bits.
    pub fn stored_channels(&self) -> usize {
        self.parts.last().map_or(self.layout.head_dim, |part| part.channels().end)
    }

    pub fn matrix(&self, head: usize) -> Option<&Matrix> {
        self.matrices.get(if self.matrices.len() == 1 { 0 } else { head })
    }

    /// The mean of a head that turns with the position, if this codec has one.
    pub fn turning_mean(&self, head: usize) -> Option<&TurningMean> {
        match &self.source {
            Source::Turning(means) => means.get(if means.len() == 1 { 0 } else { head }),
            Source::Static(_) | Source::Block(_) => None,
        }
    }

    /// Rows of a block of statistics, 0 for static ones.
    pub fn block_rows(&self) -> usize {
        match &self.source {
            Source::Block(rule) if !self.is_raw() => rule.rows,
            _ => 0,
        }
    }

    /// Power of what queries put on a channel in the scales of a block; 0: none.
    pub fn query_exponent(&self) -> f32 {
        match &self.source {
            Source::Block(rule) if !self.is_raw() => rule.query_exponent,
            _ => 0.0,
        }
    }

    pub fn is_raw(&self) -> bool {
        matches!(self.layout.format, Format::Raw(_))
    }

    pub fn permutation(&self, head: usize) -> Option<&Permutation> {
        self.permutations.get(if self.permutations.len() == 1 { 0 } else { head })
    }

    /// The static shift and scale of a head; `None` for a codec with block statistics.
    pub fn static_affine(&self, head: usize) -> Option<&Affine> {
        match &self.source {
            Source::Static(affines) => affines.get(if affines.len() == 1 { 0 } else { head }),
            Source::Block(_) | Source::Turning(_) => None,
        }
    }

    /// Bits of an element in a full page: codes, metadata and the block's statistics.
    pub fn bits_per_element(&self) -> f64 {
        let row = self.layout.row_bytes() as f64;
        let statistics = match &self.source {
            Source::Block(rule) if !self.is_raw() => rule.bytes(self.layout.head_dim) as f64 / rule.rows as f64,
            _ => 0.0,
        };
        8.0 * (row + statistics) / self.layout.head_dim as f64
    }

    /// Checks what the constructors of the parts cannot see, for `heads` kv heads.
    pub fn validate(&self, heads: usize) -> Result<()> {
        if !(self.clip > 0.0 && self.clip.is_finite()) {
            return Err(Error::value("clip", "a positive number", self.clip));
        }
        let fits = |count: usize| count <= 1 || count == heads;
        if !fits(self.permutations.len()) {
            return Err(Error::value("permutation", format!("1 or {heads} lists"), self.permutations.len()));
        }
        if self.is_of_parts() {
            self.validate_parts(heads)?;
        } else if !self.matrices.is_empty() || !self.noise.is_empty() || matches!(self.source, Source::Turning(_)) {
            return Err(Error::value("parts", "parts with matrix, shift_sine or noise", "none"));
        }
        let Source::Static(affines) = &self.source else { return Ok(()) };
        if affines.is_empty() || !fits(affines.len()) {
            return Err(Error::value("shift and scale", format!("1 or {heads} heads"), affines.len()));
        }
        for affine in affines {
            if affine.shift.len() != self.layout.head_dim || affine.scale.len() != self.layout.head_dim {
                let expected = format!("{} channels", self.layout.head_dim);
                return Err(Error::value("shift and scale", expected, affine.shift.len()));
            }
            if !affine.shift.iter().all(|shift| shift.is_finite()) {
                return Err(Error::value("shift", "finite numbers", "a NaN or an infinity"));
            }
            if !affine.scale.iter().all(|scale| *scale > 0.0 && (1.0 / scale).is_finite() && scale.is_finite()) {
                return Err(Error::value("scale", "positive finite numbers", "another one"));
            }
        }
        Ok(())
    }

    fn validate_parts(&self, heads: usize) -> Result<()> {
        let fits = |count: usize| count == 1 || count == heads;
        if !fits(self.matrices.len()) {
            return Err(Error::value("matrix", format!("1 or {heads} matrices for parts"), self.matrices.len()));
        }
        if !self.noise.is_empty() && self.noise.len() != self.layout.head_dim {
            return Err(Error::value("noise", format!("{} channels", self.layout.head_dim), self.noise.len()));
        }
        if !self.noise.iter().all(|noise| *noise >= 0.0 && noise.is_finite()) {
            return Err(Error::value("noise", "finite numbers of at least 0", "another one"));
        }
        let plain = self.rule == Rule::Norm
            && self.refinements == 0
            && !self.unbiased
            && self.rotation == Rotation::Identity
            && self.permutations.is_empty();
        if !plain || self.block_rows() > 0 {
            let expected = "rule \"norm\" and no refinements, unbiased, rotation, permutation, block with parts";
            return Err(Error::value("parts", expected, "one of them"));
        }
        match &self.source {
            Source::Turning(means) if !fits(means.len()) => {
                Err(Error::value("shift and shift_sine", format!("1 or {heads} heads"), means.len()))
            }
            Source::Static(affines) if !affines.iter().all(|affine| affine.scale.iter().all(|scale| *scale == 1.0)) => {
                Err(Error::value("scale", "none with parts", "one"))
            }
            _ => Ok(()),
        }
    }

    /// Encodes one row: codes to `codes[..code_bytes]`, scales and zero points to `metadata[..metadata_bytes]`. Not for raw rows.
    pub fn encode_row(&self, row: &[f32], affine: &Affine, head: usize, codes: &mut [u8], metadata: &mut [u8]) {
        let mut y = [0.0f32; MAX_HEAD_DIM];
        let y = &mut y[..self.layout.head_dim];
        if !row.iter().all(|value| value.is_finite()) {
            return encode_broken_row(&self.layout, codes, metadata);
        }
        self.transform(row, affine, head, y);
        if self.is_of_parts() {
            return self.encode_parts(y, codes, metadata);
        }
        let groups = self.layout.groups();
        let size = self.layout.metadata.size();
        let mut unpacked = [0u8; MAX_HEAD_DIM];
        let codebook = &self.codebook;
        for (g, group) in y.chunks_exact(self.layout.group_size).enumerate() {
            let zero = self.zero_point(group);
            let zero = if self.layout.symmetric {
                0.0
            } else {
                self.layout.metadata.store(zero, &mut metadata[(groups + g) * size..])
            };
            let scale = &mut metadata[g * size..][..size];
            let mut a = self.layout.metadata.store(self.first_scale(group, zero), scale);
            group_codes(codebook, group, a, zero, g, &mut unpacked);
            for _ in 0..self.refinements {
                let better = self.refined_scale(group, zero, g, &unpacked);
                if let Some(better) = better {
                    a = self.layout.metadata.store(better, scale);
                    group_codes(codebook, group, a, zero, g, &mut unpacked);
                }
            }
            if self.unbiased
                && a > 0.0
                && let Some(unbiased) = self.unbiased_scale(group, zero, g, &unpacked)
            {
                self.layout.metadata.store(unbiased, scale);
            }
        }
        pack(&self.layout, &unpacked[..self.layout.codes()], codes);
    }

    /// Scale and codes of a row of parts, `y` behind its matrix.
    fn encode_parts(&self, y: &[f32], codes: &mut [u8], metadata: &mut [u8]) {
        let stored = &y[..self.stored_channels()];
        let squares = lane_sum(stored.iter().map(|y| y * y));
        let a = self.layout.metadata.store(self.clip * (squares / stored.len() as f32).sqrt(), metadata);
        let mut unpacked = [0u8; MAX_HEAD_DIM];
        for part in &self.parts {
            group_codes(&part.codebook, &y[part.channels()], a, 0.0, 0, &mut unpacked);
            part.pack(&unpacked[..part.width], &mut codes[part.bytes()]);
        }
    }

    /// Steps 1 to 3: shift, scale, rotate, permute; or shift and matrix.
    fn transform(&self, row: &[f32], affine: &Affine, head: usize, y: &mut [f32]) {
        let mut u = [0.0f32; MAX_HEAD_DIM];
        let u = &mut u[..row.len()];
        for c in 0..row.len() {
            u[c] = (row[c] - affine.shift[c]) * affine.inverse[c];
        }
        if let Some(matrix) = self.matrix(head) {
            return matrix.apply_plainly(u, y);
        }
        self.rotation.apply(u);
        match self.permutation(head) {
            Some(permutation) => permutation.apply(u, y),
            None => y.copy_from_slice(u),
        }
    }

    fn zero_point(&self, group: &[f32]) -> f32 {
        if self.layout.symmetric {
            return 0.0;
        }
        match self.rule {
            Rule::Norm => lane_sum(group.iter().copied()) / group.len() as f32,
            Rule::Range => self.clip * ((maximum(group) + minimum(group)) * 0.5),
        }
    }

    fn first_scale(&self, group: &[f32], zero: f32) -> f32 {
        match self.rule {
            Rule::Norm => {
                let squares = lane_sum(group.iter().map(|y| (y - zero) * (y - zero)));
                self.clip * (squares / group.len() as f32).sqrt()
            }
            Rule::Range if self.layout.symmetric => {
                self.clip * group.iter().fold(0.0f32, |most, y| most.max(y.abs())) / self.codebook.largest()
            }
            Rule::Range => self.clip * ((maximum(group) - minimum(group)) * 0.5) / self.codebook.largest(),
        }
    }

    /// Step 4, the least-squares scale for the codes at hand.
    fn refined_scale(&self, group: &[f32], zero: f32, g: usize, codes: &[u8]) -> Option<f32> {
        let level = |c: usize| group_level(&self.codebook, self.layout.group_size, codes, g, c);
        let numerator = lane_sum(group.iter().enumerate().map(|(c, y)| (y - zero) * level(c)));
        let denominator = lane_sum((0..group.len()).map(|c| level(c) * level(c)));
        (numerator > 0.0).then(|| numerator / denominator)
    }

    /// Step 6: the scale with ⟨d, d̂⟩ = |d|² for the codes at hand.
    fn unbiased_scale(&self, group: &[f32], zero: f32, g: usize, codes: &[u8]) -> Option<f32> {
        let squares = lane_sum(group.iter().map(|y| (y - zero) * (y - zero)));
        let level = |c: usize| group_level(&self.codebook, self.layout.group_size, codes, g, c);
        let products = group.iter().enumerate().map(|(c, y)| (y - zero) * level(c));
        quotient(squares, lane_sum(products))
    }

    /// Decodes one row into `out` (`head_dim` channels). Not for raw rows.
    pub fn decode_row(&self, codes: &[u8], metadata: &[u8], affine: &Affine, head: usize, out: &mut [f32]) {
        let layout = &self.layout;
        let mut unpacked = [0u8; MAX_HEAD_DIM];
        let mut y = [0.0f32; MAX_HEAD_DIM];
        let y = &mut y[..layout.head_dim];
        if self.is_of_parts() {
            let (scale, _) = group_metadata(layout, metadata, 0);
            for part in &self.parts {
                part.unpack(&codes[part.bytes()], &mut unpacked[..part.width]);
                for (value, code) in y[part.channels()].iter_mut().zip(&unpacked) {
                    *value = scale * part.codebook.level(*code);
                }
            }
        } else {
            unpack(layout, codes, &mut unpacked[..layout.codes()]);
            for (g, group) in y.chunks_exact_mut(layout.group_size).enumerate() {
                let (scale, zero) = group_metadata(layout, metadata, g);
                for (c, value) in group.iter_mut().enumerate() {
                    *value = scale * group_level(&self.codebook, layout.group_size, &unpacked, g, c) + zero;
                }
            }
        }
        if let Some(matrix) = self.matrix(head) {
            matrix.restore_plainly(y, out);
        } else {
            match self.permutation(head) {
                Some(permutation) => permutation.invert(y, out),
                None => out.copy_from_slice(y),
            }
            self.rotation.apply(out);
        }
        for (c, value) in out.iter_mut().enumerate() {
            *value = *value * affine.scale[c] + affine.shift[c];
        }
    }
}

/// Step 5 for group `g`; `codes` are those of all groups.
fn group_codes(codebook: &Codebook, group: &[f32], a: f32, zero: f32, g: usize, codes: &mut [u8]) {
    let inverse = if a == 0.0 { 0.0 } else { 1.0 / a };
    let scaled = |y: f32| (y - zero) * inverse;
    if matches!(codebook, Codebook::Pairs { .. }) {
        let half = group.len() / 2;
        for j in 0..half {
            codes[g * half + j] = codebook.pair_code(scaled(group[j]), scaled(group[half + j]));
        }
    } else {
        for (code, &y) in codes[g * group.len()..].iter_mut().zip(group) {
            *code = codebook.code(scaled(y));
        }
    }
}

/// The level of channel `c` of group `g`, of groups of `size` channels.
fn group_level(codebook: &Codebook, size: usize, codes: &[u8], g: usize, c: usize) -> f32 {
    match codebook {
        Codebook::Pairs { x, y, .. } => {
            let half = size / 2;
            let code = usize::from(codes[g * half + c % half]);
            if c < half { x[code] } else { y[code] }
        }
        scalar => scalar.level(codes[g * size + c]),
    }
}

/// A row that is not finite: NaN scales, all else zero.
pub fn encode_broken_row(layout: &RowLayout, codes: &mut [u8], metadata: &mut [u8]) {
    codes.fill(0);
    metadata.fill(0);
    let size = layout.metadata.size();
    for g in 0..layout.groups() {
        layout.metadata.store(f32::NAN, &mut metadata[g * size..]);
    }
}

/// |d|² / ⟨d, C⟩, if it can be a scale.
pub fn quotient(squares: f32, products: f32) -> Option<f32> {
    let scale = squares / products;
    (products > 0.0 && products.is_finite() && scale.is_finite()).then_some(scale)
}

/// Scale and zero point of group `g` of a row.
pub fn group_metadata(layout: &RowLayout, metadata: &[u8], g: usize) -> (f32, f32) {
    let size = layout.metadata.size();
    let scale = layout.metadata.load(&metadata[g * size..]);
    let zero = if layout.symmetric { 0.0 } else { layout.metadata.load(&metadata[(layout.groups() + g) * size..]) };
    (scale, zero)
}

/// The sum of FORMAT.md §3.4: sixteen lanes, then folded in halves.
fn lane_sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (i, value) in values.enumerate() {
        lanes[i % 16] += value;
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

fn maximum(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn minimum(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::INFINITY, f32::min)
}

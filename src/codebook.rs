//! Codebooks: which number a code stands for, before the group's scale and zero point. Keys and values each have one.
#![allow(clippy::unreadable_literal, reason = "constants of nine digits, as they are published")]

use crate::error::{Error, Result};
use crate::format::Format;

/// Levels in units of the group's scale.
#[derive(Clone, Debug, PartialEq)]
pub enum Codebook {
    /// C[i] = i − (n−1)/2 for n levels.
    Uniform { levels: usize },
    /// Ascending levels, at most 32, and the thresholds between them.
    Levels { levels: Vec<f32>, thresholds: Vec<f32> },
    /// Eight codewords of the plane (`x`, `y`) and half their squared lengths.
    Pairs { x: [f32; 8], y: [f32; 8], half_norms: [f32; 8] },
}

impl Codebook {
    /// The codebook `name` ("uniform" or "lloyd-max") of a format.
    pub fn named(name: &str, format: Format) -> Result<Self> {
        let levels = format.levels();
        match (name, format) {
            ("uniform" | "lloyd-max", Format::Raw(_) | Format::Parts) => Ok(Self::Uniform { levels: 0 }),
            ("uniform", Format::Pair) => {
                Err(Error::value("codebook", "\"lloyd-max\" or eight pairs for format \"1.5\"", name))
            }
            ("uniform", _) => Ok(Self::Uniform { levels }),
            ("lloyd-max", Format::Int8) => {
                Err(Error::value("codebook", "\"uniform\" for format \"8\": 256 levels are not listed", name))
            }
            ("lloyd-max", Format::Pair) => Self::pairs(&LLOYD_MAX_PAIRS),
            ("lloyd-max", _) => Self::levels(lloyd_max(levels), format),
            _ => Err(Error::value("codebook", "\"uniform\", \"lloyd-max\" or a list of levels", name)),
        }
    }

    /// Listed levels: as many as the format has codes, finite, ascending, not all zero.
    pub fn levels(levels: &[f32], format: Format) -> Result<Self> {
        let wanted = format.levels();
        if matches!(format, Format::Pair | Format::Raw(_) | Format::Int8) || levels.len() != wanted {
            let expected = match format {
                Format::Pair => "eight pairs of numbers for format \"1.5\"".to_string(),
                Format::Int8 | Format::Raw(_) => format!("\"uniform\" for format \"{}\"", format.name()),
                _ => format!("{wanted} levels for format \"{}\"", format.name()),
            };
            return Err(Error::value("codebook", expected, format!("{} levels", levels.len())));
        }
        let ascending = levels.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || !levels.iter().all(|level| level.is_finite()) {
            return Err(Error::value("codebook", "finite levels in ascending order", format!("{levels:?}")));
        }
        Ok(Self::ascending(levels.to_vec()))
    }

    /// Levels that are known to be ascending.
    pub(crate) fn ascending(levels: Vec<f32>) -> Self {
        let thresholds = levels.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).collect();
        Self::Levels { levels, thresholds }
    }

    /// Eight codewords of the plane.
    pub fn pairs(words: &[[f32; 2]]) -> Result<Self> {
        let finite = words.iter().flatten().all(|value| value.is_finite());
        if words.len() != 8 || !finite {
            return Err(Error::value("codebook", "eight pairs of finite numbers", format!("{words:?}")));
        }
        let x = std::array::from_fn(|i| words[i][0]);
        let y = std::array::from_fn(|i| words[i][1]);
        let half_norms = std::array::from_fn(|i| (words[i][0] * words[i][0] + words[i][1] * words[i][1]) * 0.5);
        Ok(Self::Pairs { x, y, half_norms })
    }

    /// The largest magnitude of a level or of a codeword's coordinate: `C_max` of the range rule.
    pub fn largest(&self) -> f32 {
        let largest = |values: &[f32]| values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        match self {
            Self::Uniform { levels } => (*levels as f32 - 1.0) * 0.5,
            Self::Levels { levels, .. } => largest(levels),
            Self::Pairs { x, y, .. } => largest(x).max(largest(y)),
        }
    }

    /// The code of `t`, one number in units of the scale. Not for pairs.
    pub fn code(&self, t: f32) -> u8 {
        match self {
            Self::Uniform { levels } => {
                let top = (*levels as f32) - 1.0;
                ((t + top * 0.5).max(0.0).min(top) + 0.5) as u8
            }
            Self::Levels { thresholds, .. } => thresholds.iter().map(|&threshold| u8::from(t > threshold)).sum(),
            Self::Pairs { .. } => unreachable!("a pair codebook takes two numbers"),
        }
    }

    /// The codeword nearest to (`t_x`, `t_y`): the first of the best.
    pub fn pair_code(&self, t_x: f32, t_y: f32) -> u8 {
        let Self::Pairs { x, y, half_norms } = self else { unreachable!("a scalar codebook takes one number") };
        let mut best = (f32::NEG_INFINITY, 0);
        for i in 0..8 {
            let score = (t_x * x[i] + t_y * y[i]) - half_norms[i];
            if score > best.0 {
                best = (score, i as u8);
            }
        }
        best.1
    }

    /// The level of a scalar code.
    pub fn level(&self, code: u8) -> f32 {
        match self {
            Self::Uniform { levels } => f32::from(code) - (*levels as f32 - 1.0) * 0.5,
            Self::Levels { levels, .. } => levels[usize::from(code)],
            Self::Pairs { .. } => unreachable!("a pair codebook has codewords"),
        }
    }
}

/// Levels that minimise the mean squared error of N(0, 1), for 2, 3, 4, 8, 16 and 32 levels.
/// Errors: 0.3634, 0.1902, 0.1175, 0.03455, 0.009501, 0.002505 (Max 1960).
pub fn lloyd_max(levels: usize) -> &'static [f32] {
    match levels {
        2 => &LLOYD_MAX_2,
        3 => &LLOYD_MAX_3,
        4 => &LLOYD_MAX_4,
        8 => &LLOYD_MAX_8,
        16 => &LLOYD_MAX_16,
        32 => &LLOYD_MAX_32,
        _ => unreachable!("formats have 2, 3, 4, 8, 16 or 32 listed levels"),
    }
}

/// Evenly spaced levels that minimise the mean squared error of N(0, 1), for 2, 4, 8, 16 and 32 levels.
/// Errors: 0.3634, 0.1188, 0.03744, 0.01154, 0.003495 (Max 1960).
pub fn evenly_spaced(levels: usize) -> Vec<f32> {
    let step = EVEN_STEPS[levels.ilog2() as usize];
    (0..levels).map(|code| (code as f32 - (levels as f32 - 1.0) * 0.5) * step).collect()
}

/// By bits.
const EVEN_STEPS: [f32; 6] = [0.0, 1.595_769, 0.995_686_7, 0.586_019_4, 0.335_200_6, 0.188_138_8];
const LLOYD_MAX_2: [f32; 2] = [-0.797_884_6, 0.797_884_6];
const LLOYD_MAX_3: [f32; 3] = [-1.224_006_4, 0.0, 1.224_006_4];
const LLOYD_MAX_4: [f32; 4] = [-1.510_417_6, -0.452_780_04, 0.452_780_04, 1.510_417_6];
const LLOYD_MAX_8: [f32; 8] =
    [-2.151_945_6, -1.343_909_3, -0.756_005_3, -0.24509418, 0.24509418, 0.756_005_3, 1.343_909_3, 2.151_945_6];
const LLOYD_MAX_16: [f32; 16] = [
    -2.732_589_5,
    -2.069_017_2,
    -1.6180464,
    -1.256_231_2,
    -0.942_340_43,
    -0.656_759_14,
    -0.388_048_3,
    -0.128_395_04,
    0.128_395_04,
    0.388_048_3,
    0.656_759_14,
    0.942_340_43,
    1.256_231_2,
    1.6180464,
    2.069_017_2,
    2.732_589_5,
];
const LLOYD_MAX_32: [f32; 32] = [
    -3.260_732_4,
    -2.691_119_7,
    -2.317_739_5,
    -2.028_728_5,
    -1.787_233_2,
    -1.576_228,
    -1.386_340_4,
    -1.211_804_4,
    -1.048_783_3,
    -0.894_565_1,
    -0.747_135_7,
    -0.604_933_6,
    -0.466_699_5,
    -0.331_378_3,
    -0.198_051_83,
    -0.065_889_66,
    0.065_889_66,
    0.198_051_83,
    0.331_378_3,
    0.466_699_5,
    0.604_933_6,
    0.747_135_7,
    0.894_565_1,
    1.048_783_3,
    1.211_804_4,
    1.386_340_4,
    1.576_228,
    1.787_233_2,
    2.028_728_5,
    2.317_739_5,
    2.691_119_7,
    3.260_732_4,
];
/// The best eight points found for the standard normal plane.
const LLOYD_MAX_PAIRS: [[f32; 2]; 8] = [
    [-1.400_562_3, -0.844_749_75],
    [-1.400_562_3, 0.844_749_75],
    [-0.48093155, 0.0],
    [0.0, -1.377_012_3],
    [0.0, 1.377_012_3],
    [0.48093155, 0.0],
    [1.400_562_3, -0.844_749_75],
    [1.400_562_3, 0.844_749_75],
];

//! How far the scores of packed keys are off, as the codec itself expects: the estimate behind the warning of a cache that is used at too
//! few bits for its model.
//!
//! A score q·k̂ errs by q'·e with q' the folded query and e the quantizer's error, whose channels are about independent with variance κ·a²: κ the mean squared
//! error of the codebook on a normal variable, a the row's stored scale. Nothing is decoded.

use crate::backend::simd::{Isa, rows};
use crate::codebook::Codebook;
use crate::codec::{Codec, group_metadata};
use crate::error::{Error, Result};
use crate::format::{MAX_HEAD_DIM, PAGE_ROWS};
use crate::layer::{Layer, Stream};
use crate::parts::{Part, PartLevels};
use crate::tensor::TensorView;
use crate::transform::{Affine, Source};

/// The mean over packed rows and query heads of a score's error variance, for the last query of `query` `[batch, heads, L, D]`; 0 if nothing is packed.
pub fn score_noise(layer: &Layer, query: &TensorView, scale: f32) -> Result<f32> {
    let spec = layer.spec();
    let (codec, kv_heads) = (&spec.keys, spec.num_key_value_heads);
    let [batch, heads, length, width] = query.shape();
    let fits = heads > 0 && heads.is_multiple_of(kv_heads) && width == codec.layout.head_dim && length > 0;
    if batch != layer.batch_size() || !fits {
        let expected = format!("[{}, a multiple of {kv_heads}, L ≥ 1, {}]", layer.batch_size(), codec.layout.head_dim);
        return Err(Error::shape("query", expected, &query.shape().map(|size| size as i64)));
    }
    let rows = layer.regions().packed;
    if rows == 0 || codec.is_raw() {
        return Ok(0.0);
    }
    let mut row = [0.0f32; MAX_HEAD_DIM];
    let row = &mut row[..width];
    let (mut sum, mut counted) = (0.0, 0);
    for b in 0..batch {
        let padding = layer.padding(b);
        counted += heads * rows.saturating_sub(padding);
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            query.read_row_f32(b, head, length - 1, row);
            for value in &mut *row {
                *value *= scale;
            }
            sum += head_noise(layer, codec, kv_head, &layer.head(b, kv_head).keys, padding, row);
        }
    }
    Ok((sum / counted.max(1) as f64) as f32)
}

/// The sum over the packed rows of a head, behind those of padding.
fn head_noise(layer: &Layer, codec: &Codec, kv_head: usize, stream: &Stream, padding: usize, query: &[f32]) -> f64 {
    let (layout, groups) = (&codec.layout, codec.layout.groups());
    let mut weights = vec![0.0f64; groups];
    let mut sum = 0.0;
    for first in (0..stream.past.len()).step_by(PAGE_ROWS) {
        let new_block = match &codec.source {
            Source::Block(rule) => first % rule.rows == 0,
            _ => first == 0,
        };
        if new_block {
            let affine = match &codec.source {
                Source::Block(rule) => Some(stream.past.block(first, rule.rows).expand(query.len())),
                _ => None,
            };
            error_weights(layer.spec().isa, codec, kv_head, affine.as_ref(), query, &mut weights);
        }
        let metadata = stream.past.page(first / PAGE_ROWS).metadata(layout);
        let count = PAGE_ROWS.min(stream.past.len() - first);
        for bytes in metadata.chunks_exact(layout.metadata_bytes).take(count).skip(padding.saturating_sub(first)) {
            for (g, weight) in weights.iter().enumerate() {
                let scale = f64::from(group_metadata(layout, bytes, g).0);
                // A row that is not finite has no scale and tells nothing.
                sum += if scale.is_finite() { scale * scale * weight } else { 0.0 };
            }
        }
    }
    sum
}

/// Σ κ q'² over the channels of each group; `affine` of a block of rows, where they have their own.
pub fn error_weights(
    isa: Isa,
    codec: &Codec,
    kv_head: usize,
    affine: Option<&Affine>,
    query: &[f32],
    weights: &mut [f64],
) {
    let width = query.len();
    let mut folded = vec![0.0f32; width];
    if let Some(matrix) = codec.matrix(kv_head) {
        matrix.fold(isa, query, &mut folded);
        let part = |part: &Part| {
            let squares: f64 = folded[part.channels()].iter().map(|q| f64::from(q * q)).sum();
            let error = match part.levels {
                PartLevels::LloydMax => squared_error(&part.codebook),
                PartLevels::Even => EVEN_ERRORS[part.bits],
            };
            // B has the gain 1 / (1 − error), which takes the shrinking of a centroid back.
            squares * error * (1.0 - error)
        };
        weights[0] = codec.parts.iter().map(part).sum();
        return;
    }
    let affine = affine.or_else(|| codec.static_affine(kv_head));
    for (i, value) in folded.iter_mut().enumerate() {
        *value = query[i] * affine.map_or(1.0, |affine| affine.scale[i]);
    }
    rows::rotate(isa, codec.rotation, &mut folded);
    if let Some(permutation) = codec.permutation(kv_head) {
        let rotated = folded.clone();
        permutation.apply(&rotated, &mut folded);
    }
    // The unbiased scale takes the shrinking of a centroid back, as the gain of B does.
    let error = squared_error(&codec.codebook);
    let error = if codec.unbiased { error * (1.0 - error) } else { error };
    for (weight, group) in weights.iter_mut().zip(folded.chunks_exact(codec.layout.group_size)) {
        *weight = error * group.iter().map(|q| f64::from(q * q)).sum::<f64>();
    }
}

/// The same of evenly spaced levels of parts, by bits.
const EVEN_ERRORS: [f64; 6] = [1.0, 0.3634, 0.1188, 0.037_44, 0.011_54, 0.003_495];

/// The mean squared error of a codebook on a standard normal variable, in units of the squared scale.
fn squared_error(codebook: &Codebook) -> f64 {
    match codebook {
        // The step is 1.
        Codebook::Uniform { .. } => 1.0 / 12.0,
        Codebook::Levels { levels, .. } => match levels.len() {
            2 => 0.3634,
            3 => 0.1902,
            4 => 0.1175,
            8 => 0.034_55,
            16 => 0.0095,
            _ => 0.0025,
        },
        Codebook::Pairs { .. } => 0.2012,
    }
}

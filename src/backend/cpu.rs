//! Rows in and out of a stream on the CPU: encode, widen, check, decode. Attention is in `attend.rs`.

use rayon::prelude::*;

use crate::backend::simd::{Isa, levels, rows};
use crate::backend::threads;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::format::PAGE_ROWS;
use crate::layer::Stream;
use crate::page::PlainRows;
use crate::tensor::{Dtype, TensorView, TensorViewMut};
use crate::transform::{Affine, Source, spans_of};

pub(crate) use crate::backend::simd::rows::encode_row;

/// A row of the model's dtype as f32.
pub fn plain_row(isa: Isa, bytes: &[u8], dtype: Dtype, row: &mut [f32]) {
    levels::decode_plain(isa, bytes, dtype, row);
}

/// Refuses a NaN or an infinity, naming its place.
pub fn check_finite(isa: Isa, name: &str, tensor: &TensorView) -> Result<()> {
    let [batch, heads, tokens, width] = tensor.shape();
    let first_bad = |row: &mut [f32], index: usize| {
        let (batch, head) = (index / heads, index % heads);
        (0..tokens).find_map(|token| {
            tensor.read_row_f32(batch, head, token, row);
            (!levels::all_finite(isa, row)).then(|| Error::NonFinite { name: name.into(), batch, head, token })
        })
    };
    let found = if tokens < 64 {
        let mut row = vec![0.0; width];
        (0..batch * heads).find_map(|index| first_bad(&mut row, index))
    } else {
        let first_bad = |index| first_bad(&mut vec![0.0; width], index);
        threads::install(|| (0..batch * heads).into_par_iter().find_map_first(first_bad))
    };
    found.map_or(Ok(()), Err)
}

/// Writes all rows of a stream, decoded, to `output` `[1, 1, tokens, width]`; those of its padding are zeros.
pub fn decode_stream(
    isa: Isa,
    codec: &Codec,
    kv_head: usize,
    stream: &Stream,
    padding: usize,
    output: &mut TensorViewMut,
) {
    let sinks = stream.sinks.len();
    decode_past(isa, codec, kv_head, stream, sinks, padding, output);
    copy_plain(&stream.window, sinks + stream.past.len(), output);
    let zeros = vec![0.0; output.width()];
    for token in 0..padding.min(output.tokens()) {
        output.write_row_f32(0, 0, token, &zeros);
    }
    for i in 0..sinks.min(output.tokens().saturating_sub(padding)) {
        output.write_row_bytes(0, 0, padding + i, stream.sinks.rows(i, 1));
    }
}

fn copy_plain(rows: &PlainRows, first_token: usize, output: &mut TensorViewMut) {
    for i in 0..rows.len() {
        output.write_row_bytes(0, 0, first_token + i, rows.rows(i, 1));
    }
}

fn decode_past(
    isa: Isa,
    codec: &Codec,
    kv_head: usize,
    stream: &Stream,
    first_token: usize,
    padding: usize,
    output: &mut TensorViewMut,
) {
    let (layout, past) = (&codec.layout, &stream.past);
    let width = layout.head_dim;
    let mut tile = vec![0.0; PAGE_ROWS * width + levels::SLACK];
    let mut row = vec![0.0; width];
    let mut changing: Option<Affine> = codec.turning_mean(kv_head).map(|_| Affine::identity(width));
    let position = first_token as i64 - padding as i64;
    let spans = codec.turning_mean(kv_head).map(|mean| (mean, mean.turns.spans(spans_of(position, past.len()))));
    for first in (0..past.len()).step_by(PAGE_ROWS) {
        let page = past.page(first / PAGE_ROWS);
        let count = PAGE_ROWS.min(past.len() - first);
        let (codes, metadata) = (page.codes(layout), page.metadata(layout));
        if codec.is_raw() {
            for (i, bytes) in codes.chunks_exact(layout.code_bytes).take(count).enumerate() {
                output.write_row_bytes(0, 0, first_token + first + i, bytes);
            }
            continue;
        }
        if let Source::Block(rule) = &codec.source {
            changing = Some(past.block(first, rule.rows).expand(width));
        }
        decode_whole_rows(isa, codec, codes, count, &mut tile);
        for (i, levels) in tile.chunks_exact(width).take(count).enumerate() {
            let metadata = &metadata[i * layout.metadata_bytes..];
            if let (Some((mean, spans)), Some(affine)) = (&spans, &mut changing) {
                mean.at(spans, position + (first + i) as i64, &mut affine.shift);
            }
            let affine = changing.as_ref().or(codec.static_affine(kv_head)).expect("a static codec serves every head");
            rows::restore_row(isa, codec, affine, kv_head, metadata, levels, &mut row);
            output.write_row_f32(0, 0, first_token + first + i, &row);
        }
    }
}

/// Levels `[rows, width]` of rows whose codes lie back to back; channels that are not stored are 0.
fn decode_whole_rows(isa: Isa, codec: &Codec, codes: &[u8], rows: usize, tile: &mut [f32]) {
    let layout = &codec.layout;
    if !codec.is_of_parts() {
        return levels::decode_levels(isa, layout, &codec.codebook, codes, rows, tile);
    }
    let (width, stored) = (layout.head_dim, codec.stored_channels());
    levels::decode_parts(isa, &codec.parts, layout.code_bytes, codes, rows, tile);
    for row in (0..rows).rev() {
        tile.copy_within(row * stored..(row + 1) * stored, row * width);
        tile[row * width + stored..(row + 1) * width].fill(0.0);
    }
}

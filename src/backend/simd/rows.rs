//! The fast encoder and decoder of one row: FORMAT.md §3 on sixteen lanes, the same codes as `codec.rs` bit for bit.

use super::{LANES, Lanes, multiversion};
use crate::codebook::Codebook;
use crate::codec::{Codec, Rule, encode_broken_row, group_metadata, quotient};
use crate::format::{MAX_HEAD_DIM, pack};
use crate::transform::{Affine, Rotation, hadamard_block, hadamard_norm};

multiversion! {
    /// Encodes a row of f32; see [`Codec::encode_row`].
    pub(crate) fn encode_row(codec: &Codec, affine: &Affine, head: usize, row: &[f32], codes: &mut [u8], metadata: &mut [u8]) = encode_row_kernel;
    /// Turns a row of levels into the decoded row: scale, zero point, inverse permutation, rotation, scale, shift.
    pub(crate) fn restore_row(codec: &Codec, affine: &Affine, head: usize, metadata: &[u8], levels: &[f32], out: &mut [f32]) = restore_row_kernel;
    /// [`Rotation::apply`].
    pub(crate) fn rotate(rotation: Rotation, row: &mut [f32]) = rotate_kernel;
    /// out = Σ columns[i] · x[i] with columns `[x.len(), out.len()]`, added in the order of i, unfused.
    pub(crate) fn multiply_columns(columns: &[f32], x: &[f32], out: &mut [f32]) = multiply_columns_kernel;
}

/// A row on the stack.
type Scratch = [f32; MAX_HEAD_DIM];

#[inline(always)]
unsafe fn rotate_kernel<S: Lanes>(rotation: Rotation, row: &mut [f32]) {
    if rotation == Rotation::Identity {
        return;
    }
    let d = row.len();
    let block = hadamard_block(d);
    assert!(d.is_multiple_of(LANES), "a head is a multiple of 16 channels");
    let row = row.as_mut_ptr();
    // SAFETY: all offsets are below d; d is a multiple of the block and the block of 16.
    unsafe {
        let norm = S::splat(hadamard_norm(d));
        let mut c = 0;
        while c < d {
            let mut lanes = S::fwht16(S::load(row.add(c)));
            if block == LANES {
                lanes = S::mul(lanes, norm);
            }
            S::store(lanes, row.add(c));
            c += LANES;
        }
        let mut half = LANES;
        while half < block {
            let last = 2 * half == block;
            let mut start = 0;
            while start < d {
                let mut c = start;
                while c < start + half {
                    let (a, b) = (S::load(row.add(c)), S::load(row.add(c + half)));
                    let (mut sum, mut difference) = (S::add(a, b), S::sub(a, b));
                    if last {
                        (sum, difference) = (S::mul(sum, norm), S::mul(difference, norm));
                    }
                    S::store(sum, row.add(c));
                    S::store(difference, row.add(c + half));
                    c += LANES;
                }
                start += 2 * half;
            }
            half *= 2;
        }
    }
}

#[inline(always)]
unsafe fn multiply_columns_kernel<S: Lanes>(columns: &[f32], x: &[f32], out: &mut [f32]) {
    let width = out.len();
    assert!(width.is_multiple_of(LANES) && columns.len() == x.len() * width, "a matrix of other sizes");
    // SAFETY: vectors of 16 below `width`, a multiple of 16, of each of the columns; the caller has S's features.
    unsafe {
        let mut c = 0;
        while c + 4 * LANES <= width {
            multiply_block::<S, 4>(columns, x, width, c, out);
            c += 4 * LANES;
        }
        while c < width {
            multiply_block::<S, 1>(columns, x, width, c, out);
            c += LANES;
        }
    }
}

/// `V` vectors of the product, from channel `c` on.
#[inline(always)]
unsafe fn multiply_block<S: Lanes, const V: usize>(
    columns: &[f32],
    x: &[f32],
    width: usize,
    c: usize,
    out: &mut [f32],
) {
    // SAFETY: see `multiply_columns_kernel`.
    unsafe {
        let mut sums = [S::zero(); V];
        let mut column = columns.as_ptr().add(c);
        let mut i = 0;
        while i < x.len() {
            let factor = S::splat(*x.as_ptr().add(i));
            let mut v = 0;
            while v < V {
                sums[v] = S::add(sums[v], S::mul(S::load(column.add(v * LANES)), factor));
                v += 1;
            }
            column = column.add(width);
            i += 1;
        }
        let mut v = 0;
        while v < V {
            S::store(sums[v], out.as_mut_ptr().add(c + v * LANES));
            v += 1;
        }
    }
}

#[inline(always)]
unsafe fn encode_row_kernel<S: Lanes>(
    codec: &Codec,
    affine: &Affine,
    head: usize,
    row: &[f32],
    codes: &mut [u8],
    metadata: &mut [u8],
) {
    let layout = &codec.layout;
    let d = layout.head_dim;
    assert!(row.len() == d && affine.shift.len() == d && affine.inverse.len() == d, "row and transform differ");
    let mut y: Scratch = [0.0; MAX_HEAD_DIM];
    // SAFETY: vectors of 16 below d, a multiple of 16; the caller has S's features.
    let finite = unsafe {
        let mut magnitude = S::splat_u32(0);
        let mut c = 0;
        while c < d {
            let x = S::load(row.as_ptr().add(c));
            magnitude = S::max_magnitude(magnitude, x);
            let u = S::sub(x, S::load(affine.shift.as_ptr().add(c)));
            S::store(S::mul(u, S::load(affine.inverse.as_ptr().add(c))), y.as_mut_ptr().add(c));
            c += LANES;
        }
        S::all_finite(magnitude)
    };
    if !finite {
        return encode_broken_row(layout, codes, metadata);
    }
    if let Some(matrix) = codec.matrix(head) {
        let u = y;
        // SAFETY: as above.
        unsafe { multiply_columns_kernel::<S>(matrix.forward(), &u[..d], &mut y[..d]) };
        // SAFETY: as above.
        return unsafe { encode_parts::<S>(codec, &y[..d], codes, metadata) };
    }
    // SAFETY: as above.
    unsafe { rotate_kernel::<S>(codec.rotation, &mut y[..d]) };
    if let Some(permutation) = codec.permutation(head) {
        let u = y;
        permutation.apply(&u[..d], &mut y[..d]);
    }
    let mut unpacked = [0u8; MAX_HEAD_DIM];
    for g in 0..layout.groups() {
        let group = &y[g * layout.group_size..][..layout.group_size];
        // SAFETY: the caller has S's features; groups are multiples of 16.
        unsafe { encode_group::<S>(codec, group, g, &mut unpacked, metadata) };
    }
    pack(layout, &unpacked[..layout.codes()], codes);
}

/// Scale and codes of a row of parts.
#[inline(always)]
unsafe fn encode_parts<S: Lanes>(codec: &Codec, y: &[f32], codes: &mut [u8], metadata: &mut [u8]) {
    let stored = &y[..codec.stored_channels()];
    // SAFETY: parts are multiples of 16 channels; the caller has S's features.
    unsafe {
        let a = codec.clip * (squares::<S>(stored, 0.0) / stored.len() as f32).sqrt();
        let a = codec.layout.metadata.store(a, metadata);
        let mut unpacked = [0u8; MAX_HEAD_DIM];
        for part in &codec.parts {
            quantize::<S>(&part.codebook, &y[part.channels()], a, 0.0, 0, &mut unpacked);
            part.pack(&unpacked[..part.width], &mut codes[part.bytes()]);
        }
    }
}

/// Scale, zero point and codes of group `g`.
#[inline(always)]
unsafe fn encode_group<S: Lanes>(codec: &Codec, group: &[f32], g: usize, codes: &mut [u8], metadata: &mut [u8]) {
    let (layout, groups) = (&codec.layout, codec.layout.groups());
    let (precision, size) = (layout.metadata, layout.metadata.size());
    let codebook = &codec.codebook;
    // SAFETY: the caller's.
    unsafe {
        let spread = Spread::<S>::of(group);
        let mut zero = 0.0;
        if !layout.symmetric {
            let exact = match codec.rule {
                Rule::Norm => spread.sum / group.len() as f32,
                Rule::Range => codec.clip * ((spread.maximum + spread.minimum) * 0.5),
            };
            zero = precision.store(exact, &mut metadata[(groups + g) * size..]);
        }
        let first = match codec.rule {
            Rule::Norm => codec.clip * (squares::<S>(group, zero) / group.len() as f32).sqrt(),
            Rule::Range if layout.symmetric => codec.clip * spread.magnitude / codebook.largest(),
            Rule::Range => codec.clip * ((spread.maximum - spread.minimum) * 0.5) / codebook.largest(),
        };
        let scale = &mut metadata[g * size..][..size];
        let mut a = precision.store(first, scale);
        quantize::<S>(codebook, group, a, zero, g, codes);
        for _ in 0..codec.refinements {
            if let Some(better) = refine::<S>(codebook, group, zero, g, codes) {
                a = precision.store(better, scale);
                quantize::<S>(codebook, group, a, zero, g, codes);
            }
        }
        if codec.unbiased
            && a > 0.0
            && let Some(unbiased) = unbias::<S>(codebook, group, zero, g, codes)
        {
            precision.store(unbiased, scale);
        }
    }
}

/// Sum and extremes of a group.
struct Spread<S> {
    sum: f32,
    maximum: f32,
    minimum: f32,
    magnitude: f32,
    lanes: std::marker::PhantomData<S>,
}

impl<S: Lanes> Spread<S> {
    #[inline(always)]
    unsafe fn of(group: &[f32]) -> Self {
        // SAFETY: a group is a multiple of 16 long; the caller has S's features.
        unsafe {
            let mut sum = S::zero();
            let (mut maximum, mut negated) = (S::splat(f32::NEG_INFINITY), S::splat(f32::NEG_INFINITY));
            let mut magnitude = S::zero();
            let mut c = 0;
            while c < group.len() {
                let y = S::load(group.as_ptr().add(c));
                sum = S::add(sum, y);
                maximum = S::max(y, maximum);
                negated = S::max(S::sub(S::zero(), y), negated);
                magnitude = S::max(S::abs(y), magnitude);
                c += LANES;
            }
            Self {
                sum: S::reduce_add(sum),
                maximum: S::reduce_max(maximum),
                minimum: -S::reduce_max(negated),
                magnitude: S::reduce_max(magnitude),
                lanes: std::marker::PhantomData,
            }
        }
    }
}

/// Σ (y − zero)².
#[inline(always)]
unsafe fn squares<S: Lanes>(group: &[f32], zero: f32) -> f32 {
    // SAFETY: as for `Spread::of`.
    unsafe {
        let zero = S::splat(zero);
        let mut sum = S::zero();
        let mut c = 0;
        while c < group.len() {
            let d = S::sub(S::load(group.as_ptr().add(c)), zero);
            sum = S::add(sum, S::mul(d, d));
            c += LANES;
        }
        S::reduce_add(sum)
    }
}

/// Step 5 of FORMAT.md §3; `codes` are those of the whole row.
#[inline(always)]
unsafe fn quantize<S: Lanes>(codebook: &Codebook, group: &[f32], a: f32, zero: f32, g: usize, codes: &mut [u8]) {
    let inverse = if a == 0.0 { 0.0 } else { 1.0 / a };
    let width = if matches!(codebook, Codebook::Pairs { .. }) { group.len() / 2 } else { group.len() };
    assert!((g + 1) * width <= codes.len());
    // SAFETY: groups are multiples of 16; codes of group g start at g·width (asserted).
    unsafe {
        let codes = codes.as_mut_ptr().add(g * width);
        let (inverse, zero) = (S::splat(inverse), S::splat(zero));
        let mut c = 0;
        while c < width {
            let n = (width - c).min(LANES);
            let t = S::mul(S::sub(S::load_partial(group.as_ptr().add(c), n), zero), inverse);
            let code = match codebook {
                Codebook::Uniform { levels } => {
                    let top = *levels as f32 - 1.0;
                    let level = S::add(t, S::splat(top * 0.5));
                    let level = S::min(S::max(level, S::zero()), S::splat(top));
                    S::truncate(S::add(level, S::splat(0.5)))
                }
                Codebook::Levels { thresholds, .. } => {
                    let mut code = S::splat_u32(0);
                    let mut i = 0;
                    while i < thresholds.len() {
                        code = S::count_gt(code, t, S::splat(thresholds[i]));
                        i += 1;
                    }
                    code
                }
                Codebook::Pairs { x, y, half_norms } => {
                    let t_y = S::load_partial(group.as_ptr().add(width + c), n);
                    let t_y = S::mul(S::sub(t_y, zero), inverse);
                    nearest_pair::<S>(t, t_y, x, y, half_norms)
                }
            };
            if n == LANES {
                S::store_u8(code, codes.add(c));
            } else {
                S::store_u8_partial(code, codes.add(c), n);
            }
            c += LANES;
        }
    }
}

#[inline(always)]
unsafe fn nearest_pair<S: Lanes>(t_x: S::F, t_y: S::F, x: &[f32; 8], y: &[f32; 8], half_norms: &[f32; 8]) -> S::I {
    // SAFETY: the caller has S's features.
    unsafe {
        let mut best = S::splat(f32::NEG_INFINITY);
        let mut code = S::splat_u32(0);
        let mut i = 0;
        while i < 8 {
            let dot = S::add(S::mul(t_x, S::splat(x[i])), S::mul(t_y, S::splat(y[i])));
            let score = S::sub(dot, S::splat(half_norms[i]));
            let better = S::gt(score, best);
            best = S::select(better, best, score);
            code = S::select_u32(better, code, S::splat_u32(i as u32));
            i += 1;
        }
        code
    }
}

/// The least-squares scale for the codes at hand.
#[inline(always)]
unsafe fn refine<S: Lanes>(codebook: &Codebook, group: &[f32], zero: f32, g: usize, codes: &[u8]) -> Option<f32> {
    let mut levels: Scratch = [0.0; MAX_HEAD_DIM];
    // SAFETY: as for `Spread::of`.
    unsafe {
        group_levels::<S>(codebook, group.len(), g, codes, &mut levels);
        let zero = S::splat(zero);
        let (mut numerator, mut denominator) = (S::zero(), S::zero());
        let mut c = 0;
        while c < group.len() {
            let level = S::load(levels.as_ptr().add(c));
            let d = S::sub(S::load(group.as_ptr().add(c)), zero);
            numerator = S::add(numerator, S::mul(d, level));
            denominator = S::add(denominator, S::mul(level, level));
            c += LANES;
        }
        let numerator = S::reduce_add(numerator);
        (numerator > 0.0).then(|| numerator / S::reduce_add(denominator))
    }
}

/// The scale with ⟨d, d̂⟩ = |d|² for the codes at hand.
#[inline(always)]
unsafe fn unbias<S: Lanes>(codebook: &Codebook, group: &[f32], zero: f32, g: usize, codes: &[u8]) -> Option<f32> {
    let mut levels: Scratch = [0.0; MAX_HEAD_DIM];
    // SAFETY: as for `Spread::of`.
    unsafe {
        group_levels::<S>(codebook, group.len(), g, codes, &mut levels);
        let zero = S::splat(zero);
        let (mut squares, mut products) = (S::zero(), S::zero());
        let mut c = 0;
        while c < group.len() {
            let d = S::sub(S::load(group.as_ptr().add(c)), zero);
            squares = S::add(squares, S::mul(d, d));
            products = S::add(products, S::mul(d, S::load(levels.as_ptr().add(c))));
            c += LANES;
        }
        quotient(S::reduce_add(squares), S::reduce_add(products))
    }
}

/// The levels of group `g` (`size` channels) of a row with these codes.
#[inline(always)]
unsafe fn group_levels<S: Lanes>(codebook: &Codebook, size: usize, g: usize, codes: &[u8], levels: &mut Scratch) {
    let width = if matches!(codebook, Codebook::Pairs { .. }) { size / 2 } else { size };
    assert!(size <= MAX_HEAD_DIM && (g + 1) * width <= codes.len());
    // SAFETY: n codes of the group and n levels at c, and at width + c for pairs (asserted); the caller has S's features.
    unsafe {
        let codes = codes.as_ptr().add(g * width);
        let mut c = 0;
        while c < width {
            let n = (width - c).min(LANES);
            let code = S::load_u8_partial(codes.add(c), n);
            let target = levels.as_mut_ptr().add(c);
            match codebook {
                Codebook::Uniform { levels } => {
                    let middle = (*levels as f32 - 1.0) * 0.5;
                    S::store_partial(S::sub(S::to_f32(code), S::splat(middle)), target, n);
                }
                Codebook::Levels { levels, .. } => {
                    S::store_partial(S::lookup16(S::table16(levels), code), target, n);
                }
                Codebook::Pairs { x, y, .. } => {
                    S::store_partial(S::lookup8(S::table8(x), code), target, n);
                    S::store_partial(S::lookup8(S::table8(y), code), target.add(width), n);
                }
            }
            c += LANES;
        }
    }
}

#[inline(always)]
unsafe fn restore_row_kernel<S: Lanes>(
    codec: &Codec,
    affine: &Affine,
    head: usize,
    metadata: &[u8],
    levels: &[f32],
    out: &mut [f32],
) {
    let layout = &codec.layout;
    let d = layout.head_dim;
    assert!(levels.len() == d && out.len() == d && affine.shift.len() == d && affine.scale.len() == d);
    let mut y: Scratch = [0.0; MAX_HEAD_DIM];
    // SAFETY: vectors of 16 below d; groups are multiples of 16; the caller has S's features.
    unsafe {
        for g in 0..layout.groups() {
            let (scale, zero) = group_metadata(layout, metadata, g);
            let mut c = g * layout.group_size;
            while c < (g + 1) * layout.group_size {
                let level = S::mul(S::splat(scale), S::load(levels.as_ptr().add(c)));
                S::store(S::add(level, S::splat(zero)), y.as_mut_ptr().add(c));
                c += LANES;
            }
        }
        if let Some(matrix) = codec.matrix(head) {
            multiply_columns_kernel::<S>(matrix.inverse_columns(), &y[..d], out);
        } else {
            match codec.permutation(head) {
                Some(permutation) => permutation.invert(&y[..d], out),
                None => out.copy_from_slice(&y[..d]),
            }
            rotate_kernel::<S>(codec.rotation, out);
        }
        let mut c = 0;
        while c < d {
            let u = S::mul(S::load(out.as_ptr().add(c)), S::load(affine.scale.as_ptr().add(c)));
            S::store(S::add(u, S::load(affine.shift.as_ptr().add(c))), out.as_mut_ptr().add(c));
            c += LANES;
        }
    }
}

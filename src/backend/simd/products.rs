//! Products of a few f32 rows with packed weights, and packed weights decoded. The layout is that of `weights.rs`.
//!
//! What it is: the inner loops over one run of outputs. What it is not: the zero points' share of a product, which needs no codes, nor the
//! sharing of outputs among threads.
//!
//! Four bits: sixteen lanes hold 128 inputs, lane l has input 16·j + l in digit j. A digit is masked where it stands and converted, which
//! makes it 16^j times too large, exactly; the inputs bring 16^-j ([`DIGIT_FACTORS`]). The last digit is shifted down, for its sign.
//! Six bits: two strings for every sixteen inputs, joined in the lanes.

use super::{LANES, Lanes, multiversion};

/// Inputs whose 4-bit codes share a vector.
pub(crate) const BLOCK: usize = 128;
const DIGITS: usize = BLOCK / LANES;
/// Bytes of sixteen 6-bit codes: a string of their low halves, and one of the two bits above.
const SIX: usize = 12;
const SIX_LOW: usize = 8;

multiversion! {
    /// `output[r][q] = Σ_g scales[r][g] · Σ_i code[r][i] · x[q][i]` for `rows` outputs r and `queries` rows q of inputs; for 4 bits the
    /// inputs carry [`DIGIT_FACTORS`].
    pub(crate) fn multiply(p: &Product, x: &[f32], codes: &[u8], scales: &[f32], output: &mut [f32]) = multiply_kernel;
    /// `output[i] = scales[g] · (code[i] − zeros[g])` for one output's inputs i.
    pub(crate) fn decode(p: &Product, codes: &[u8], scales: &[f32], zeros: &[u8], output: &mut [f32]) = decode_kernel;
}

/// Sizes of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// 4, 6 or 8.
    pub bits: usize,
    pub queries: usize,
    pub rows: usize,
    /// A multiple of `group_size`.
    pub inputs: usize,
    /// A multiple of 32.
    pub group_size: usize,
}

impl Product {
    pub(crate) const fn groups(&self) -> usize {
        self.inputs / self.group_size
    }

    /// Bytes of one output's codes.
    pub(crate) const fn row_bytes(&self) -> usize {
        match self.bits {
            8 => self.inputs,
            6 => self.inputs / LANES * SIX,
            _ => self.inputs.div_ceil(BLOCK) * BLOCK / 2,
        }
    }

    /// Digits of a 4-bit block that share a scale whatever block it is: those of the largest power of two that divides the group.
    const fn unit(&self) -> usize {
        let inputs = 1 << self.group_size.trailing_zeros();
        if inputs < BLOCK { inputs / LANES } else { DIGITS }
    }

    fn check(&self, codes: &[u8], scales: &[f32]) {
        assert!(self.group_size.is_multiple_of(2 * LANES) && self.inputs.is_multiple_of(self.group_size));
        assert!(matches!(self.bits, 4 | 6 | 8));
        assert!(codes.len() == self.rows * self.row_bytes() && scales.len() == self.rows * self.groups());
    }
}

/// What inputs are multiplied by before a product with 4-bit codes, by their digit. (One below 2⁻⁹⁸ may lose bits.)
pub(crate) const DIGIT_FACTORS: [f32; DIGITS] = {
    let mut factors = [1.0; DIGITS];
    let mut j = 1;
    while j < DIGITS - 1 {
        factors[j] = factors[j - 1] / 16.0;
        j += 1;
    }
    factors
};

/// Digit `j` of every lane, times 16^j but for the last.
#[inline(always)]
unsafe fn digit<S: Lanes>(words: S::I, j: usize) -> S::F {
    // SAFETY: no pointer; every digit leaves the lane below 2³¹.
    unsafe { if j == DIGITS - 1 { S::to_f32(S::shr::<28>(words)) } else { S::to_f32(S::and(words, 15 << (4 * j))) } }
}

#[inline(always)]
unsafe fn multiply_kernel<S: Lanes>(p: &Product, x: &[f32], codes: &[u8], scales: &[f32], output: &mut [f32]) {
    p.check(codes, scales);
    assert!(x.len() == p.queries * p.inputs && output.len() == p.rows * p.queries);
    // SAFETY: by the assertions every block below stays inside the slices.
    unsafe {
        let mut q = 0;
        while q + 4 <= p.queries {
            all_rows::<S, 4, 1>(p, q, x, codes, scales, output);
            q += 4;
        }
        if q + 2 <= p.queries {
            all_rows::<S, 2, 1>(p, q, x, codes, scales, output);
            q += 2;
        }
        if q < p.queries {
            if S::REGISTERS >= 32 {
                all_rows::<S, 1, 4>(p, q, x, codes, scales, output);
            } else {
                all_rows::<S, 1, 2>(p, q, x, codes, scales, output);
            }
        }
    }
}

/// `Q` rows of inputs with all outputs, `R` at a time.
#[inline(always)]
unsafe fn all_rows<S: Lanes, const Q: usize, const R: usize>(
    p: &Product,
    q: usize,
    x: &[f32],
    codes: &[u8],
    scales: &[f32],
    output: &mut [f32],
) {
    // SAFETY: see `multiply_kernel`.
    unsafe {
        let mut r = 0;
        while r + R <= p.rows {
            some_rows::<S, Q, R>(p, q, r, x, codes, scales, output);
            r += R;
        }
        while r < p.rows {
            some_rows::<S, Q, 1>(p, q, r, x, codes, scales, output);
            r += 1;
        }
    }
}

#[inline(always)]
unsafe fn some_rows<S: Lanes, const Q: usize, const R: usize>(
    p: &Product,
    q: usize,
    r: usize,
    x: &[f32],
    codes: &[u8],
    scales: &[f32],
    output: &mut [f32],
) {
    // SAFETY: r + R ≤ rows and q + Q ≤ queries (see `multiply_kernel`).
    unsafe {
        let x = x.as_ptr().add(q * p.inputs);
        let codes = codes.as_ptr().add(r * p.row_bytes());
        let scales = scales.as_ptr().add(r * p.groups());
        let totals = match (p.bits, p.unit()) {
            (8, _) => vectors::<S, Q, R, 8>(p, x, codes, scales),
            (6, _) => vectors::<S, Q, R, 6>(p, x, codes, scales),
            (_, DIGITS) => digits::<S, Q, R, DIGITS>(p, x, codes, scales),
            (_, 4) => digits::<S, Q, R, 4>(p, x, codes, scales),
            (_, _) => digits::<S, Q, R, 2>(p, x, codes, scales),
        };
        let mut i = 0;
        while i < R {
            let mut k = 0;
            while k < Q {
                output[(r + i) * p.queries + q + k] = S::reduce_add(totals[i][k]);
                k += 1;
            }
            i += 1;
        }
    }
}

/// Lane sums of `Q` rows of inputs with `R` outputs of 4 bits; `U` digits share a scale.
#[inline(always)]
unsafe fn digits<S: Lanes, const Q: usize, const R: usize, const U: usize>(
    p: &Product,
    x: *const f32,
    codes: *const u8,
    scales: *const f32,
) -> [[S::F; Q]; R] {
    // SAFETY: rows of codes are whole blocks; segments end with the inputs; the group of a segment is below `groups`.
    unsafe {
        let mut totals = [[S::zero(); Q]; R];
        let segments = p.inputs / (U * LANES);
        let mut segment = 0;
        while segment < segments {
            let mut words = [S::splat_u32(0); R];
            let mut i = 0;
            while i < R {
                words[i] = S::load_u32(codes.add(i * p.row_bytes() + segment / (DIGITS / U) * (BLOCK / 2)));
                i += 1;
            }
            let mut within = 0;
            while within < DIGITS / U && segment < segments {
                let mut sums = [[S::zero(); Q]; R];
                let first = x.add(segment * U * LANES);
                let mut j = 0;
                while j < U {
                    let mut i = 0;
                    while i < R {
                        let weights = digit::<S>(words[i], within * U + j);
                        let mut k = 0;
                        while k < Q {
                            let inputs = S::load(first.add(k * p.inputs + j * LANES));
                            sums[i][k] = S::mul_add(weights, inputs, sums[i][k]);
                            k += 1;
                        }
                        i += 1;
                    }
                    j += 1;
                }
                scale_up::<S, Q, R>(p, segment * U * LANES / p.group_size, scales, &sums, &mut totals);
                segment += 1;
                within += 1;
            }
        }
        totals
    }
}

/// Sixteen codes of 6 or 8 bits, from input `at` of a row on, a multiple of sixteen.
#[inline(always)]
unsafe fn vector<S: Lanes, const BITS: usize>(row: *const u8, at: usize) -> S::F {
    // SAFETY: the caller's row has these inputs.
    unsafe {
        if BITS == 8 {
            return S::to_f32(S::load_u8(row.add(at)));
        }
        let strings = row.add(at / LANES * SIX);
        let high = S::and(S::load_bits::<2>(strings.add(SIX_LOW)), 3);
        S::to_f32(S::or(S::and(S::load_bits::<4>(strings), 15), S::shl::<4>(high)))
    }
}

/// Lane sums of `Q` rows of inputs with `R` outputs of 6 or 8 bits.
#[inline(always)]
unsafe fn vectors<S: Lanes, const Q: usize, const R: usize, const BITS: usize>(
    p: &Product,
    x: *const f32,
    codes: *const u8,
    scales: *const f32,
) -> [[S::F; Q]; R] {
    // SAFETY: whole groups of whole vectors, inside the rows.
    unsafe {
        let mut totals = [[S::zero(); Q]; R];
        let mut group = 0;
        while group < p.groups() {
            let mut sums = [[S::zero(); Q]; R];
            let mut at = group * p.group_size;
            let end = at + p.group_size;
            while at < end {
                let mut i = 0;
                while i < R {
                    let weights = vector::<S, BITS>(codes.add(i * p.row_bytes()), at);
                    let mut k = 0;
                    while k < Q {
                        sums[i][k] = S::mul_add(weights, S::load(x.add(k * p.inputs + at)), sums[i][k]);
                        k += 1;
                    }
                    i += 1;
                }
                at += LANES;
            }
            scale_up::<S, Q, R>(p, group, scales, &sums, &mut totals);
            group += 1;
        }
        totals
    }
}

/// `totals += scale · sums` with the scales of one group.
#[inline(always)]
unsafe fn scale_up<S: Lanes, const Q: usize, const R: usize>(
    p: &Product,
    group: usize,
    scales: *const f32,
    sums: &[[S::F; Q]; R],
    totals: &mut [[S::F; Q]; R],
) {
    // SAFETY: the group is one of the rows' (see the callers).
    unsafe {
        let mut i = 0;
        while i < R {
            let scale = S::splat(*scales.add(i * p.groups() + group));
            let mut k = 0;
            while k < Q {
                totals[i][k] = S::mul_add(scale, sums[i][k], totals[i][k]);
                k += 1;
            }
            i += 1;
        }
    }
}

#[inline(always)]
unsafe fn decode_kernel<S: Lanes>(p: &Product, codes: &[u8], scales: &[f32], zeros: &[u8], output: &mut [f32]) {
    assert!(p.rows == 1 && zeros.len() == p.groups() && output.len() == p.inputs);
    p.check(codes, scales);
    // SAFETY: one row; its vectors lie inside the slices by the assertions.
    unsafe {
        let mut at = 0;
        while at < p.inputs {
            let group = at / p.group_size;
            let codes = match p.bits {
                8 => vector::<S, 8>(codes.as_ptr(), at),
                6 => vector::<S, 6>(codes.as_ptr(), at),
                _ => {
                    let words = S::load_u32(codes.as_ptr().add(at / BLOCK * (BLOCK / 2)));
                    S::mul(digit::<S>(words, at % BLOCK / LANES), S::splat(DIGIT_FACTORS[at % BLOCK / LANES]))
                }
            };
            let steps = S::sub(codes, S::splat(f32::from(zeros[group])));
            S::store(S::mul(steps, S::splat(scales[group])), output.as_mut_ptr().add(at));
            at += LANES;
        }
    }
}

//! The trait [`Lanes`]: what a kernel may do with sixteen lanes.
//!
//! What it is: the contract of every operation, and the few that are written once for all instruction sets on top of the others.
//! What it is not: an implementation (`portable.rs`, `avx2.rs`, `avx512.rs`, `neon.rs`).
//!
//! Names: `F` are 16 lanes of f32, `I` of u32, `M` of booleans; lane 0 is the lowest address and bit 0 of a `u16` mask.

#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the derived operations have the contract of the trait's methods and hold nothing but calls of them"
)]

/// Sixteen lanes on one instruction set.
///
/// # Safety
///
/// Every method needs the implementation's processor features (see [`Isa`](super::Isa)) and must be inlined into a function that enables
/// them, as [`multiversion!`](super::multiversion) arranges; methods that take no pointer need nothing else. A method with a pointer reads
/// or writes exactly its 16, or `n`, elements there; the pointer needs no alignment, and with `n = 0` it need not be valid. `n` ≤ 16.
///
/// # Floats
///
/// IEEE f32, round to nearest even, never fused but for `mul_add`, subnormals kept.
pub(crate) trait Lanes: Copy + 'static {
    type F: Copy;
    type I: Copy;
    type M: Copy;
    /// Up to 4, 8, 16 f32 in the form in which the instruction set looks them up.
    type Table4: Copy;
    type Table8: Copy;
    type Table16: Copy;

    /// How many `F` the register file holds, with room for temporaries where it is small.
    const REGISTERS: usize;
    /// Whether there are `dot_words` and `signed_to_f32`, and a table of sixteen is one lookup.
    const WORDS: bool = false;

    // ---- memory -> lanes -> memory ----

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(source: *const f32) -> Self::F;
    /// The first `n` lanes from memory, the others 0. Also for the other `_partial` loads.
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::F;
    unsafe fn store(lanes: Self::F, target: *mut f32);
    /// Writes the first `n` lanes and no byte more. Also for `store_u8_partial`.
    unsafe fn store_partial(lanes: Self::F, target: *mut f32, n: usize);
    /// 16 bfloat16 values.
    unsafe fn load_bf16(source: *const u16) -> Self::F;
    unsafe fn load_bf16_partial(source: *const u16, n: usize) -> Self::F;
    /// 16 IEEE half precision values. (A signalling NaN may stay one.)
    unsafe fn load_f16(source: *const u16) -> Self::F;
    unsafe fn load_f16_partial(source: *const u16, n: usize) -> Self::F;

    unsafe fn splat_u32(value: u32) -> Self::I;
    /// 16 little-endian u32.
    unsafe fn load_u32(source: *const u8) -> Self::I;
    /// 16 bytes, one for each lane.
    unsafe fn load_u8(source: *const u8) -> Self::I;
    unsafe fn load_u8_partial(source: *const u8, n: usize) -> Self::I;
    /// The low byte of each lane.
    unsafe fn store_u8(lanes: Self::I, target: *mut u8);
    unsafe fn store_u8_partial(lanes: Self::I, target: *mut u8, n: usize);

    // ---- float arithmetic ----

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a·b + c`, rounded once where the processor can do it, else twice: **not** the same everywhere, so not for codes.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` when either is NaN. Put the constant second to get rid of NaNs.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` when either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;

    /// The sum, folded as FORMAT.md §3.4 says: l += l+8, then l+4, l+2, l+1.
    unsafe fn reduce_add(a: Self::F) -> f32;
    /// The largest lane, with [`Lanes::max`] folded in the same order (so a NaN may be lost).
    unsafe fn reduce_max(a: Self::F) -> f32;
    /// The sum of each vector, in any order.
    unsafe fn reduce_add_4(a: [Self::F; 4]) -> [f32; 4];
    /// Lane i is the sum of vector i, in any order.
    unsafe fn reduce_add_16(a: [Self::F; 16]) -> Self::F;

    /// The butterflies h = 1, 2, 4, 8 of FORMAT.md §3.2 within the vector (without the factor 1/√16).
    unsafe fn fwht16(a: Self::F) -> Self::F;

    // ---- integers ----

    unsafe fn and(a: Self::I, value: u32) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Modulo 2³².
    unsafe fn add_u32(a: Self::I, b: Self::I) -> Self::I;
    /// 0 ≤ K < 32.
    unsafe fn shr<const K: i32>(a: Self::I) -> Self::I;
    /// 0 ≤ K < 32.
    unsafe fn shl<const K: i32>(a: Self::I) -> Self::I;
    /// Lane i is the little-endian string of bits at `source` from bit K·i on, of which K bits count, for K = 2, 3 or 4; reads 2·K bytes.
    unsafe fn load_bits<const K: i32>(source: *const u8) -> Self::I;
    /// Lanes below 2³¹.
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// Toward zero. For lanes in [0, 2³¹); any other value, NaN included, gives an arbitrary lane.
    unsafe fn truncate(a: Self::F) -> Self::I;
    /// The bits of each float, and back.
    unsafe fn to_bits(a: Self::F) -> Self::I;
    unsafe fn from_bits(a: Self::I) -> Self::F;

    // ---- booleans ----

    unsafe fn mask(bits: u16) -> Self::M;
    /// `a > b`; false for NaN.
    unsafe fn gt(a: Self::F, b: Self::F) -> Self::M;
    /// `a & value != 0`.
    unsafe fn test(a: Self::I, value: u32) -> Self::M;
    unsafe fn select(mask: Self::M, if_clear: Self::F, if_set: Self::F) -> Self::F;
    unsafe fn select_u32(mask: Self::M, if_clear: Self::I, if_set: Self::I) -> Self::I;
    /// Adds 1 to the lanes of `count` where `t > threshold`.
    unsafe fn count_gt(count: Self::I, t: Self::F, threshold: Self::F) -> Self::I;
    /// `a | value` in the lanes whose bit is set.
    unsafe fn or_bits(a: Self::I, mask: u16, value: u32) -> Self::I;

    // ---- lookup tables ----

    /// At most 4 values; missing ones are 0. Likewise `table8` and `table16`.
    unsafe fn table4(values: &[f32]) -> Self::Table4;
    unsafe fn table8(values: &[f32]) -> Self::Table8;
    unsafe fn table16(values: &[f32]) -> Self::Table16;
    /// `table[index & 3]`: the higher bits need no masking. Likewise `lookup8` (low 3 bits) and `lookup16` (low 4 bits).
    unsafe fn lookup4(table: Self::Table4, index: Self::I) -> Self::F;
    unsafe fn lookup8(table: Self::Table8, index: Self::I) -> Self::F;
    unsafe fn lookup16(table: Self::Table16, index: Self::I) -> Self::F;

    // ---- finite values ----

    /// The running maximum of |x| as bits: `magnitude = max(magnitude, bits(|x|))`. Start with `splat_u32(0)`, end with
    /// [`Lanes::all_finite`].
    unsafe fn max_magnitude(magnitude: Self::I, x: Self::F) -> Self::I;
    /// Whether no lane that went into `magnitude` was NaN or infinite.
    unsafe fn all_finite(magnitude: Self::I) -> bool;

    // ---- bytes ----

    /// Splits `n` bytes of format `1.6` (FORMAT.md §1): `low[b]` = d₀ | d₁<<2 | d₂<<4 | d₃<<6 and `high[b]` = d₄, where dᵢ is digit i of
    /// `source[b]`. Needs `n` bytes behind each pointer, not overlapping; any `n`.
    unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8);
    /// The levels of whole rows of `d` channels from what `expand_ternary` made of their bytes, where the instruction set has a way of its
    /// own for that `d`; false and nothing written where it has not. Reads up to 32 bytes behind those of `low` and `high`;
    /// writes `rows · d` floats.
    #[inline(always)]
    unsafe fn ternary_levels(
        _table: Self::Table4,
        _low: *const u8,
        _high: *const u8,
        _rows: usize,
        _d: usize,
        _target: *mut f32,
    ) -> bool {
        false
    }

    // ---- words, where there are some ----

    /// `sum + a₀·b₀ + a₁·b₁` in every lane, of the signed low and high halves of a and b; modulo 2³².
    #[inline(always)]
    unsafe fn dot_words(_sum: Self::I, _a: Self::I, _b: Self::I) -> Self::I {
        unreachable!("an instruction set without words")
    }

    /// Of two's complement.
    #[inline(always)]
    unsafe fn signed_to_f32(_a: Self::I) -> Self::F {
        unreachable!("an instruction set without words")
    }

    // ---- written once ----

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        Self::splat(0.0)
    }

    #[inline(always)]
    unsafe fn select_bits(mask: u16, if_clear: Self::F, if_set: Self::F) -> Self::F {
        Self::select(Self::mask(mask), if_clear, if_set)
    }

    /// eˣ for x ≤ 0, within 2 ulp down to ln 2⁻¹²⁶ ≈ −87.34 and 0 below it (at −∞ too); 1 at 0, NaN at NaN.
    ///
    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite: ln 2 in two parts, n times the first is exact), a polynomial of degree 7 for eʳ
    /// (the coefficients of Moshier's Cephes `expf`), and 2ⁿ made of n's bits.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // The last f32 whose exponential is not subnormal.
        const SMALLEST: f32 = -87.336_54;
        const LN2_HIGH: f32 = 355.0 / 512.0;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Adding 1.5·2²³ leaves the nearest integer in the low bits of the sum.
        const ROUNDER: f32 = 12_582_912.0;
        const COEFFICIENTS: [f32; 6] =
            [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

        let rounded = Self::mul_add(x, Self::splat(std::f32::consts::LOG2_E), Self::splat(ROUNDER));
        let n = Self::sub(rounded, Self::splat(ROUNDER));
        let r = Self::mul_add(n, Self::splat(-LN2_HIGH), x);
        let r = Self::mul_add(n, Self::splat(-LN2_LOW), r);
        let mut tail = Self::splat(COEFFICIENTS[0]);
        let mut i = 1;
        while i < COEFFICIENTS.len() {
            tail = Self::mul_add(tail, r, Self::splat(COEFFICIENTS[i]));
            i += 1;
        }
        let exp_r = Self::add(Self::mul_add(tail, Self::mul(r, r), r), Self::splat(1.0));
        // The low bits of `rounded` are n; shifted by 23 its exponent and the rounder fall out, and adding the bits of 1 makes 2ⁿ.
        let power = Self::add_u32(Self::shl::<23>(Self::to_bits(rounded)), Self::splat_u32(1.0_f32.to_bits()));
        let result = Self::mul(exp_r, Self::from_bits(power));
        Self::select(Self::gt(Self::splat(SMALLEST), x), result, Self::zero())
    }
}

//! Sixteen lanes as plain arrays: the meaning of every operation, and what runs where no other implementation does.
//!
//! What it is: loops over 16 elements, which the compiler vectorizes for the target's baseline. What it is not: hand-written assembly, nor
//! in need of any processor feature.

#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is that of the trait; the bodies add nothing to it"
)]

use super::{
    LANES, Lanes,
    bytes::{self, bf16_to_f32, f16_to_f32},
};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; LANES];
type I = [u32; LANES];

/// `[expression of lane i; 16]`.
macro_rules! lanes {
    ($i:ident, $zero:expr, $lane:expr) => {{
        let mut result = [$zero; LANES];
        let mut $i = 0;
        while $i < LANES {
            result[$i] = $lane;
            $i += 1;
        }
        result
    }};
}

/// Folds 16 lanes to one: l with l+8, then l+4, l+2, l+1.
macro_rules! fold {
    ($a:expr, $operation:expr) => {{
        let mut a: F = $a;
        let mut half = LANES / 2;
        while half > 0 {
            for l in 0..half {
                a[l] = $operation(a[l], a[l + half]);
            }
            half /= 2;
        }
        a[0]
    }};
}

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn add(a: f32, b: f32) -> f32 {
    a + b
}

#[inline(always)]
fn table<const N: usize>(values: &[f32]) -> [f32; N] {
    assert!(values.len() <= N, "a table of {N} entries was given {} values", values.len());
    let mut table = [0.0; N];
    table[..values.len()].copy_from_slice(values);
    table
}

impl Lanes for Portable {
    type F = F;
    type I = I;
    /// All bits set or none.
    type M = I;
    type Table4 = [f32; 4];
    type Table8 = [f32; 8];
    type Table16 = [f32; 16];

    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> F {
        source.cast::<F>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> F {
        lanes!(i, 0.0, if i < n { source.add(i).read_unaligned() } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn store(lanes: F, target: *mut f32) {
        target.cast::<F>().write_unaligned(lanes);
    }

    #[inline(always)]
    unsafe fn store_partial(lanes: F, target: *mut f32, n: usize) {
        for (i, lane) in lanes.into_iter().enumerate().take(n) {
            target.add(i).write_unaligned(lane);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> F {
        let source = source.cast::<[u16; LANES]>().read_unaligned();
        lanes!(i, 0.0, bf16_to_f32(source[i]))
    }

    #[inline(always)]
    unsafe fn load_bf16_partial(source: *const u16, n: usize) -> F {
        lanes!(i, 0.0, if i < n { bf16_to_f32(source.add(i).read_unaligned()) } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> F {
        let source = source.cast::<[u16; LANES]>().read_unaligned();
        lanes!(i, 0.0, f16_to_f32(source[i]))
    }

    #[inline(always)]
    unsafe fn load_f16_partial(source: *const u16, n: usize) -> F {
        lanes!(i, 0.0, if i < n { f16_to_f32(source.add(i).read_unaligned()) } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn splat_u32(value: u32) -> I {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load_u32(source: *const u8) -> I {
        let source = source.cast::<[[u8; 4]; LANES]>().read();
        lanes!(i, 0, u32::from_le_bytes(source[i]))
    }

    #[inline(always)]
    unsafe fn load_u8(source: *const u8) -> I {
        let source = source.cast::<[u8; LANES]>().read();
        lanes!(i, 0, u32::from(source[i]))
    }

    #[inline(always)]
    unsafe fn load_u8_partial(source: *const u8, n: usize) -> I {
        let source = bytes::load_up_to_16(source, n).to_le_bytes();
        lanes!(i, 0, u32::from(source[i]))
    }

    #[inline(always)]
    unsafe fn store_u8(lanes: I, target: *mut u8) {
        target.cast::<[u8; LANES]>().write(lanes!(i, 0, lanes[i] as u8));
    }

    #[inline(always)]
    unsafe fn store_u8_partial(lanes: I, target: *mut u8, n: usize) {
        bytes::store_up_to_16(u128::from_le_bytes(lanes!(i, 0, lanes[i] as u8)), target, n);
    }

    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        lanes!(i, 0.0, a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        lanes!(i, 0.0, a[i] - b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        lanes!(i, 0.0, a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn mul_add(a: F, b: F, c: F) -> F {
        // f32::mul_add is a call of a function in libm where the target's baseline has no such instruction.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            lanes!(i, 0.0, a[i].mul_add(b[i], c[i]))
        } else {
            lanes!(i, 0.0, a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        lanes!(i, 0.0, min(a[i], b[i]))
    }

    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        lanes!(i, 0.0, max(a[i], b[i]))
    }

    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        lanes!(i, 0.0, a[i].abs())
    }

    #[inline(always)]
    unsafe fn reduce_add(a: F) -> f32 {
        fold!(a, add)
    }

    #[inline(always)]
    unsafe fn reduce_max(a: F) -> f32 {
        fold!(a, max)
    }

    #[inline(always)]
    unsafe fn reduce_add_4(a: [F; 4]) -> [f32; 4] {
        [fold!(a[0], add), fold!(a[1], add), fold!(a[2], add), fold!(a[3], add)]
    }

    #[inline(always)]
    unsafe fn reduce_add_16(a: [F; 16]) -> F {
        lanes!(i, 0.0, fold!(a[i], add))
    }

    #[inline(always)]
    unsafe fn fwht16(mut a: F) -> F {
        let mut h = 1;
        while h < LANES {
            for i in 0..LANES {
                if i & h == 0 {
                    (a[i], a[i + h]) = (a[i] + a[i + h], a[i] - a[i + h]);
                }
            }
            h *= 2;
        }
        a
    }

    #[inline(always)]
    unsafe fn and(a: I, value: u32) -> I {
        lanes!(i, 0, a[i] & value)
    }

    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        lanes!(i, 0, a[i] | b[i])
    }

    #[inline(always)]
    unsafe fn add_u32(a: I, b: I) -> I {
        lanes!(i, 0, a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    unsafe fn shr<const K: i32>(a: I) -> I {
        lanes!(i, 0, a[i] >> K)
    }

    #[inline(always)]
    unsafe fn shl<const K: i32>(a: I) -> I {
        lanes!(i, 0, a[i] << K)
    }

    #[inline(always)]
    unsafe fn load_bits<const K: i32>(source: *const u8) -> I {
        let (low, high) = bytes::bit_halves::<K>(source);
        lanes!(i, 0, (if i < 8 { low } else { high }) >> (K as usize * (i % 8)))
    }

    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        lanes!(i, 0.0, a[i].cast_signed() as f32)
    }

    #[inline(always)]
    unsafe fn truncate(a: F) -> I {
        lanes!(i, 0, (a[i] as i32).cast_unsigned())
    }

    #[inline(always)]
    unsafe fn to_bits(a: F) -> I {
        lanes!(i, 0, a[i].to_bits())
    }

    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        lanes!(i, 0.0, f32::from_bits(a[i]))
    }

    #[inline(always)]
    unsafe fn mask(bits: u16) -> I {
        lanes!(i, 0, u32::from(bits >> i & 1).wrapping_neg())
    }

    #[inline(always)]
    unsafe fn gt(a: F, b: F) -> I {
        lanes!(i, 0, u32::from(a[i] > b[i]).wrapping_neg())
    }

    #[inline(always)]
    unsafe fn test(a: I, value: u32) -> I {
        lanes!(i, 0, u32::from(a[i] & value != 0).wrapping_neg())
    }

    #[inline(always)]
    unsafe fn select(mask: I, if_clear: F, if_set: F) -> F {
        lanes!(i, 0.0, f32::from_bits((if_clear[i].to_bits() & !mask[i]) | (if_set[i].to_bits() & mask[i])))
    }

    #[inline(always)]
    unsafe fn select_u32(mask: I, if_clear: I, if_set: I) -> I {
        lanes!(i, 0, (if_clear[i] & !mask[i]) | (if_set[i] & mask[i]))
    }

    #[inline(always)]
    unsafe fn count_gt(count: I, t: F, threshold: F) -> I {
        lanes!(i, 0, count[i].wrapping_add(u32::from(t[i] > threshold[i])))
    }

    #[inline(always)]
    unsafe fn or_bits(a: I, mask: u16, value: u32) -> I {
        lanes!(i, 0, a[i] | (u32::from(mask >> i & 1).wrapping_neg() & value))
    }

    #[inline(always)]
    unsafe fn table4(values: &[f32]) -> [f32; 4] {
        table(values)
    }

    #[inline(always)]
    unsafe fn table8(values: &[f32]) -> [f32; 8] {
        table(values)
    }

    #[inline(always)]
    unsafe fn table16(values: &[f32]) -> [f32; 16] {
        table(values)
    }

    #[inline(always)]
    unsafe fn lookup4(table: [f32; 4], index: I) -> F {
        lanes!(i, 0.0, table[(index[i] & 3) as usize])
    }

    #[inline(always)]
    unsafe fn lookup8(table: [f32; 8], index: I) -> F {
        lanes!(i, 0.0, table[(index[i] & 7) as usize])
    }

    #[inline(always)]
    unsafe fn lookup16(table: [f32; 16], index: I) -> F {
        lanes!(i, 0.0, table[(index[i] & 15) as usize])
    }

    #[inline(always)]
    unsafe fn max_magnitude(magnitude: I, x: F) -> I {
        lanes!(i, 0, magnitude[i].max(x[i].to_bits() & 0x7fff_ffff))
    }

    #[inline(always)]
    unsafe fn all_finite(magnitude: I) -> bool {
        magnitude.into_iter().max() < Some(f32::INFINITY.to_bits())
    }

    #[inline(always)]
    unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8) {
        bytes::expand_ternary(source, n, low, high);
    }
}

//! Sixteen lanes in four NEON registers.
//!
//! What it is: every operation on four parts of four lanes; lookups are byte table lookups (`tbl`). What it is not: in need of anything
//! beyond the baseline of `AArch64`, nor made for a big-endian one.

#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is that of the trait; the bodies add nothing to it"
)]

use super::{
    LANES, Lanes,
    bytes::{self, elements_of_part},
};
use std::arch::{aarch64::*, asm};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon;

type F = [float32x4_t; 4];
type I = [uint32x4_t; 4];

/// `[function(a[0], ..), function(a[1], ..), ..]` for the four parts.
macro_rules! parts {
    ($function:expr; $($a:expr),+) => {
        [$function($($a[0]),+), $function($($a[1]),+), $function($($a[2]),+), $function($($a[3]),+)]
    };
}

/// `fcvtl` has no intrinsic in the oldest compiler that the crate supports.
#[inline(always)]
unsafe fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let result: float32x4_t;
    asm!("fcvtl {result:v}.4s, {halves:v}.4h", result = lateout(vreg) result, halves = in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    result
}

#[inline(always)]
unsafe fn widen_bf16(brains: uint16x4_t) -> float32x4_t {
    vreinterpretq_f32_u32(vshll_n_u16::<16>(brains))
}

#[inline(always)]
unsafe fn load_u16(source: *const u16) -> [uint16x4_t; 4] {
    [vld1_u16(source), vld1_u16(source.add(4)), vld1_u16(source.add(8)), vld1_u16(source.add(12))]
}

/// Four u16, of which the first `elements_of_part(n, part, 4)` are read.
#[inline(always)]
unsafe fn load_u16_part(source: *const u16, n: usize, part: usize) -> uint16x4_t {
    // The pointer may lie beyond the data; it is not read then.
    let bytes = bytes::load_up_to_16(source.wrapping_add(4 * part).cast(), 2 * elements_of_part(n, part, 4));
    vcreate_u16(bytes as u64)
}

#[inline(always)]
unsafe fn load_u16_partial(source: *const u16, n: usize) -> [uint16x4_t; 4] {
    [load_u16_part(source, n, 0), load_u16_part(source, n, 1), load_u16_part(source, n, 2), load_u16_part(source, n, 3)]
}

#[inline(always)]
unsafe fn from_u128(bytes: u128) -> uint8x16_t {
    vcombine_u8(vcreate_u8(bytes as u64), vcreate_u8((bytes >> 64) as u64))
}

#[inline(always)]
unsafe fn to_u128(lanes: uint8x16_t) -> u128 {
    let lanes = vreinterpretq_u64_u8(lanes);
    u128::from(vgetq_lane_u64::<0>(lanes)) | u128::from(vgetq_lane_u64::<1>(lanes)) << 64
}

#[inline(always)]
unsafe fn load_f32_part(source: *const f32, n: usize, part: usize) -> float32x4_t {
    // The pointer may lie beyond the data; it is not read then.
    let bytes = bytes::load_up_to_16(source.wrapping_add(4 * part).cast(), 4 * elements_of_part(n, part, 4));
    vreinterpretq_f32_u8(from_u128(bytes))
}

#[inline(always)]
unsafe fn store_f32_part(lanes: F, target: *mut f32, n: usize, part: usize) {
    let bytes = to_u128(vreinterpretq_u8_f32(lanes[part]));
    bytes::store_up_to_16(bytes, target.wrapping_add(4 * part).cast(), 4 * elements_of_part(n, part, 4));
}

#[inline(always)]
unsafe fn widen_u8(bytes: uint8x16_t) -> I {
    let low = vmovl_u8(vget_low_u8(bytes));
    let high = vmovl_u8(vget_high_u8(bytes));
    [
        vmovl_u16(vget_low_u16(low)),
        vmovl_u16(vget_high_u16(low)),
        vmovl_u16(vget_low_u16(high)),
        vmovl_u16(vget_high_u16(high)),
    ]
}

/// The low byte of each lane.
#[inline(always)]
unsafe fn narrow_to_u8(lanes: I) -> uint8x16_t {
    let low = vcombine_u16(vmovn_u32(lanes[0]), vmovn_u32(lanes[1]));
    let high = vcombine_u16(vmovn_u32(lanes[2]), vmovn_u32(lanes[3]));
    vcombine_u8(vmovn_u16(low), vmovn_u16(high))
}

/// Not `vminq` and `vmaxq`, which treat NaNs and zeros of either sign otherwise.
#[inline(always)]
unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcltq_f32(a, b), a, b)
}

#[inline(always)]
unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// c + a·b: the intrinsic takes the sum first.
#[inline(always)]
unsafe fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
    vfmaq_f32(c, a, b)
}

#[inline(always)]
unsafe fn select_part(mask: uint32x4_t, if_clear: float32x4_t, if_set: float32x4_t) -> float32x4_t {
    vbslq_f32(mask, if_set, if_clear)
}

#[inline(always)]
unsafe fn select_part_u32(mask: uint32x4_t, if_clear: uint32x4_t, if_set: uint32x4_t) -> uint32x4_t {
    vbslq_u32(mask, if_set, if_clear)
}

#[inline(always)]
unsafe fn sum_parts(a: F) -> float32x4_t {
    vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]))
}

/// Lane k: the sum of `a[k]`.
#[inline(always)]
unsafe fn sum_4(a: [F; 4]) -> float32x4_t {
    let first = vpaddq_f32(sum_parts(a[0]), sum_parts(a[1]));
    let last = vpaddq_f32(sum_parts(a[2]), sum_parts(a[3]));
    vpaddq_f32(first, last)
}

#[inline(always)]
unsafe fn with_signs(a: float32x4_t, signs: [u32; 4]) -> float32x4_t {
    vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vld1q_u32(signs.as_ptr())))
}

/// The butterflies h = 1, 2 of four lanes: lane i ^ h plus lane i, with the sign turned where i has bit h.
#[inline(always)]
unsafe fn fwht4(a: float32x4_t) -> float32x4_t {
    const MINUS: u32 = 1 << 31;
    let a = vaddq_f32(vrev64q_f32(a), with_signs(a, [0, MINUS, 0, MINUS]));
    vaddq_f32(vextq_f32::<2>(a, a), with_signs(a, [0, 0, MINUS, MINUS]))
}

/// At most 4·N values as the bytes of N registers, padded with zeros.
#[inline(always)]
unsafe fn table<const N: usize>(values: &[f32]) -> [uint8x16_t; N] {
    assert!(values.len() <= 4 * N, "a table of {} entries was given {} values", 4 * N, values.len());
    let mut padded = [0.0; LANES];
    padded[..values.len()].copy_from_slice(values);
    let mut registers = [vdupq_n_u8(0); N];
    for (register, four) in registers.iter_mut().zip(padded.chunks_exact(4)) {
        *register = vreinterpretq_u8_f32(vld1q_f32(four.as_ptr()));
    }
    registers
}

/// The four bytes 4i, 4i + 1, 4i + 2, 4i + 3 for each index i = `index & mask` (below 64).
#[inline(always)]
unsafe fn byte_indices(index: uint32x4_t, mask: u32) -> uint8x16_t {
    let index = vandq_u32(index, vdupq_n_u32(mask));
    vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404)))
}

#[inline(always)]
unsafe fn lookup4_part(table: uint8x16_t, index: uint32x4_t) -> float32x4_t {
    vreinterpretq_f32_u8(vqtbl1q_u8(table, byte_indices(index, 3)))
}

#[inline(always)]
unsafe fn lookup8_part(table: uint8x16x2_t, index: uint32x4_t) -> float32x4_t {
    vreinterpretq_f32_u8(vqtbl2q_u8(table, byte_indices(index, 7)))
}

#[inline(always)]
unsafe fn lookup16_part(table: uint8x16x4_t, index: uint32x4_t) -> float32x4_t {
    vreinterpretq_f32_u8(vqtbl4q_u8(table, byte_indices(index, 15)))
}

/// Bit 4·part + i of a mask in lane i.
#[inline(always)]
unsafe fn lane_bits() -> I {
    const BITS: [u32; LANES] = {
        let mut bits = [0; LANES];
        let mut i = 0;
        while i < LANES {
            bits[i] = 1 << i;
            i += 1;
        }
        bits
    };
    let bits = BITS.as_ptr();
    [vld1q_u32(bits), vld1q_u32(bits.add(4)), vld1q_u32(bits.add(8)), vld1q_u32(bits.add(12))]
}

impl Lanes for Neon {
    type F = F;
    type I = I;
    type M = I;
    type Table4 = uint8x16_t;
    type Table8 = uint8x16x2_t;
    type Table16 = uint8x16x4_t;

    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        [vdupq_n_f32(value); 4]
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> F {
        [vld1q_f32(source), vld1q_f32(source.add(4)), vld1q_f32(source.add(8)), vld1q_f32(source.add(12))]
    }

    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> F {
        [
            load_f32_part(source, n, 0),
            load_f32_part(source, n, 1),
            load_f32_part(source, n, 2),
            load_f32_part(source, n, 3),
        ]
    }

    #[inline(always)]
    unsafe fn store(lanes: F, target: *mut f32) {
        vst1q_f32(target, lanes[0]);
        vst1q_f32(target.add(4), lanes[1]);
        vst1q_f32(target.add(8), lanes[2]);
        vst1q_f32(target.add(12), lanes[3]);
    }

    #[inline(always)]
    unsafe fn store_partial(lanes: F, target: *mut f32, n: usize) {
        store_f32_part(lanes, target, n, 0);
        store_f32_part(lanes, target, n, 1);
        store_f32_part(lanes, target, n, 2);
        store_f32_part(lanes, target, n, 3);
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> F {
        let brains = load_u16(source);
        parts!(widen_bf16; brains)
    }

    #[inline(always)]
    unsafe fn load_bf16_partial(source: *const u16, n: usize) -> F {
        let brains = load_u16_partial(source, n);
        parts!(widen_bf16; brains)
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> F {
        let halves = load_u16(source);
        parts!(widen_f16; halves)
    }

    #[inline(always)]
    unsafe fn load_f16_partial(source: *const u16, n: usize) -> F {
        let halves = load_u16_partial(source, n);
        parts!(widen_f16; halves)
    }

    #[inline(always)]
    unsafe fn splat_u32(value: u32) -> I {
        [vdupq_n_u32(value); 4]
    }

    #[inline(always)]
    unsafe fn load_u32(source: *const u8) -> I {
        // As bytes: the target is little-endian (see mod.rs), and bytes need no alignment.
        [
            vreinterpretq_u32_u8(vld1q_u8(source)),
            vreinterpretq_u32_u8(vld1q_u8(source.add(16))),
            vreinterpretq_u32_u8(vld1q_u8(source.add(32))),
            vreinterpretq_u32_u8(vld1q_u8(source.add(48))),
        ]
    }

    #[inline(always)]
    unsafe fn load_u8(source: *const u8) -> I {
        widen_u8(vld1q_u8(source))
    }

    #[inline(always)]
    unsafe fn load_u8_partial(source: *const u8, n: usize) -> I {
        widen_u8(from_u128(bytes::load_up_to_16(source, n)))
    }

    #[inline(always)]
    unsafe fn store_u8(lanes: I, target: *mut u8) {
        vst1q_u8(target, narrow_to_u8(lanes));
    }

    #[inline(always)]
    unsafe fn store_u8_partial(lanes: I, target: *mut u8, n: usize) {
        bytes::store_up_to_16(to_u128(narrow_to_u8(lanes)), target, n);
    }

    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        parts!(vaddq_f32; a, b)
    }

    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        parts!(vsubq_f32; a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        parts!(vmulq_f32; a, b)
    }

    #[inline(always)]
    unsafe fn mul_add(a: F, b: F, c: F) -> F {
        parts!(mul_add; a, b, c)
    }

    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        parts!(min; a, b)
    }

    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        parts!(max; a, b)
    }

    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        parts!(vabsq_f32; a)
    }

    #[inline(always)]
    unsafe fn reduce_add(a: F) -> f32 {
        // sum_parts adds l+8, then l+4.
        let a = sum_parts(a);
        let a = vadd_f32(vget_low_f32(a), vget_high_f32(a));
        vget_lane_f32::<0>(a) + vget_lane_f32::<1>(a)
    }

    #[inline(always)]
    unsafe fn reduce_max(a: F) -> f32 {
        let a = max(max(a[0], a[2]), max(a[1], a[3]));
        let a = max(a, vextq_f32::<2>(a, a));
        let a = max(a, vdupq_laneq_f32::<1>(a));
        vgetq_lane_f32::<0>(a)
    }

    #[inline(always)]
    unsafe fn reduce_add_4(a: [F; 4]) -> [f32; 4] {
        let mut result = [0.0; 4];
        vst1q_f32(result.as_mut_ptr(), sum_4(a));
        result
    }

    #[inline(always)]
    unsafe fn reduce_add_16(a: [F; 16]) -> F {
        [
            sum_4([a[0], a[1], a[2], a[3]]),
            sum_4([a[4], a[5], a[6], a[7]]),
            sum_4([a[8], a[9], a[10], a[11]]),
            sum_4([a[12], a[13], a[14], a[15]]),
        ]
    }

    #[inline(always)]
    unsafe fn fwht16(a: F) -> F {
        let a: F = parts!(fwht4; a);
        let a = [vaddq_f32(a[0], a[1]), vsubq_f32(a[0], a[1]), vaddq_f32(a[2], a[3]), vsubq_f32(a[2], a[3])];
        [vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]), vsubq_f32(a[0], a[2]), vsubq_f32(a[1], a[3])]
    }

    #[inline(always)]
    unsafe fn and(a: I, value: u32) -> I {
        let value = Self::splat_u32(value);
        parts!(vandq_u32; a, value)
    }

    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        parts!(vorrq_u32; a, b)
    }

    #[inline(always)]
    unsafe fn add_u32(a: I, b: I) -> I {
        parts!(vaddq_u32; a, b)
    }

    // The shifts by a vector fold to the shifts by an immediate, whose intrinsics exclude 0 or 32.
    #[inline(always)]
    unsafe fn shr<const K: i32>(a: I) -> I {
        let count = [vdupq_n_s32(-K); 4];
        parts!(vshlq_u32; a, count)
    }

    #[inline(always)]
    unsafe fn shl<const K: i32>(a: I) -> I {
        let count = [vdupq_n_s32(K); 4];
        parts!(vshlq_u32; a, count)
    }

    #[inline(always)]
    unsafe fn load_bits<const K: i32>(source: *const u8) -> I {
        let (low, high) = bytes::bit_halves::<K>(source);
        let first = vld1q_s32([0, -K, -2 * K, -3 * K].as_ptr());
        let counts = [first, vaddq_s32(first, vdupq_n_s32(-4 * K))];
        let (low, high) = (vdupq_n_u32(low), vdupq_n_u32(high));
        [vshlq_u32(low, counts[0]), vshlq_u32(low, counts[1]), vshlq_u32(high, counts[0]), vshlq_u32(high, counts[1])]
    }

    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        parts!(vcvtq_f32_u32; a)
    }

    #[inline(always)]
    unsafe fn truncate(a: F) -> I {
        parts!(vcvtq_u32_f32; a)
    }

    #[inline(always)]
    unsafe fn to_bits(a: F) -> I {
        parts!(vreinterpretq_u32_f32; a)
    }

    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        parts!(vreinterpretq_f32_u32; a)
    }

    #[inline(always)]
    unsafe fn mask(bits: u16) -> I {
        Self::test(lane_bits(), u32::from(bits))
    }

    #[inline(always)]
    unsafe fn gt(a: F, b: F) -> I {
        parts!(vcgtq_f32; a, b)
    }

    #[inline(always)]
    unsafe fn test(a: I, value: u32) -> I {
        let value = Self::splat_u32(value);
        parts!(vtstq_u32; a, value)
    }

    #[inline(always)]
    unsafe fn select(mask: I, if_clear: F, if_set: F) -> F {
        parts!(select_part; mask, if_clear, if_set)
    }

    #[inline(always)]
    unsafe fn select_u32(mask: I, if_clear: I, if_set: I) -> I {
        parts!(select_part_u32; mask, if_clear, if_set)
    }

    #[inline(always)]
    unsafe fn count_gt(count: I, t: F, threshold: F) -> I {
        // A set lane is -1.
        let greater = Self::gt(t, threshold);
        parts!(vsubq_u32; count, greater)
    }

    #[inline(always)]
    unsafe fn or_bits(a: I, mask: u16, value: u32) -> I {
        Self::or(a, Self::and(Self::mask(mask), value))
    }

    #[inline(always)]
    unsafe fn table4(values: &[f32]) -> uint8x16_t {
        table::<1>(values)[0]
    }

    #[inline(always)]
    unsafe fn table8(values: &[f32]) -> uint8x16x2_t {
        let [a, b] = table(values);
        uint8x16x2_t(a, b)
    }

    #[inline(always)]
    unsafe fn table16(values: &[f32]) -> uint8x16x4_t {
        let [a, b, c, d] = table(values);
        uint8x16x4_t(a, b, c, d)
    }

    #[inline(always)]
    unsafe fn lookup4(table: uint8x16_t, index: I) -> F {
        let table = [table; 4];
        parts!(lookup4_part; table, index)
    }

    #[inline(always)]
    unsafe fn lookup8(table: uint8x16x2_t, index: I) -> F {
        let table = [table; 4];
        parts!(lookup8_part; table, index)
    }

    #[inline(always)]
    unsafe fn lookup16(table: uint8x16x4_t, index: I) -> F {
        let table = [table; 4];
        parts!(lookup16_part; table, index)
    }

    #[inline(always)]
    unsafe fn max_magnitude(magnitude: I, x: F) -> I {
        let x = Self::to_bits(Self::abs(x));
        parts!(vmaxq_u32; magnitude, x)
    }

    #[inline(always)]
    unsafe fn all_finite(magnitude: I) -> bool {
        let largest = vmaxq_u32(vmaxq_u32(magnitude[0], magnitude[1]), vmaxq_u32(magnitude[2], magnitude[3]));
        vmaxvq_u32(largest) < f32::INFINITY.to_bits()
    }

    #[inline(always)]
    unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8) {
        bytes::expand_ternary(source, n, low, high);
    }
}

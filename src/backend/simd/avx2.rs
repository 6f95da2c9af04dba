//! Sixteen lanes in two AVX2 registers, with FMA and F16C.
//!
//! What it is: every operation twice; part 0 holds lanes 0–7. Masks are registers of set and clear lanes.
//! What it is not: masked on bytes: partial rows of bytes and halves go through `bytes.rs`.

#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is that of the trait; the bodies add nothing to it"
)]

use super::{
    LANES, Lanes,
    bytes::{self, elements_of_part},
};
use std::arch::x86_64::*;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

type F = [__m256; 2];
type I = [__m256i; 2];

/// Sixteen set lanes, then sixteen clear ones: read from 16 − n, it starts with n set lanes.
static FIRST_LANES: [i32; 2 * LANES] = {
    let mut lanes = [0; 2 * LANES];
    let mut i = 0;
    while i < LANES {
        lanes[i] = -1;
        i += 1;
    }
    lanes
};

/// The first `n` ≤ 16 lanes.
#[inline(always)]
unsafe fn first(n: usize) -> I {
    debug_assert!(n <= LANES);
    let start = FIRST_LANES.as_ptr().add(LANES - n);
    [_mm256_loadu_si256(start.cast()), _mm256_loadu_si256(start.add(8).cast())]
}

/// The first `n` ≤ 8 u16 at `source`, the others 0.
#[inline(always)]
unsafe fn load_u16_partial(source: *const u16, n: usize) -> __m128i {
    from_u128(bytes::load_up_to_16(source.cast(), 2 * n))
}

/// Both parts of `n` ≤ 16 u16.
#[inline(always)]
unsafe fn load_u16_parts(source: *const u16, n: usize) -> [__m128i; 2] {
    // The second pointer may lie beyond the data; it is not read then.
    [
        load_u16_partial(source, elements_of_part(n, 0, 8)),
        load_u16_partial(source.wrapping_add(8), elements_of_part(n, 1, 8)),
    ]
}

#[inline(always)]
unsafe fn from_u128(bytes: u128) -> __m128i {
    _mm_set_epi64x((bytes >> 64) as i64, bytes as i64)
}

#[inline(always)]
unsafe fn to_u128(lanes: __m128i) -> u128 {
    let low = _mm_cvtsi128_si64(lanes).cast_unsigned();
    let high = _mm_extract_epi64::<1>(lanes).cast_unsigned();
    u128::from(low) | u128::from(high) << 64
}

#[inline(always)]
unsafe fn bf16_lanes(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

#[inline(always)]
unsafe fn widen_u8(bytes: __m128i) -> I {
    [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))]
}

/// The low byte of each lane.
#[inline(always)]
unsafe fn narrow_to_u8(lanes: I) -> __m128i {
    let low_byte = _mm256_set1_epi32(0xff);
    let pairs = _mm256_packus_epi32(_mm256_and_si256(lanes[0], low_byte), _mm256_and_si256(lanes[1], low_byte));
    // vpackusdw works within 128-bit halves: quarters 0, 2, 1, 3 restore the order.
    let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}

/// A register with `values`, padded with zeros to N and repeated 8 / N times, so that a lookup need not mask its index.
#[inline(always)]
unsafe fn repeated<const N: usize>(values: &[f32]) -> __m256 {
    assert!(values.len() <= N, "a table of {N} entries was given {} values", values.len());
    let mut table = [0.0; 8];
    for chunk in table.chunks_exact_mut(N) {
        chunk[..values.len()].copy_from_slice(values);
    }
    _mm256_loadu_ps(table.as_ptr())
}

/// Lane k of each 128-bit half: the sum of that half of `a[k]`.
#[inline(always)]
unsafe fn sum_halves(a: [__m256; 4]) -> __m256 {
    _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]))
}

/// Lane k: the sum of `a[k]`.
#[inline(always)]
unsafe fn sum_8(a: [__m256; 8]) -> __m256 {
    let first = sum_halves([a[0], a[1], a[2], a[3]]);
    let last = sum_halves([a[4], a[5], a[6], a[7]]);
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(first, last), _mm256_permute2f128_ps::<0x31>(first, last))
}

/// Both parts of a vector added.
#[inline(always)]
unsafe fn sum_parts(a: F) -> __m256 {
    _mm256_add_ps(a[0], a[1])
}

/// The butterflies h = 1, 2, 4 of eight lanes: lane i ^ h plus lane i, with the sign turned where i has bit h.
#[inline(always)]
unsafe fn fwht8(a: __m256) -> __m256 {
    let minus = _mm256_setr_ps(0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0);
    let a = _mm256_add_ps(_mm256_permute_ps::<0b10_11_00_01>(a), _mm256_xor_ps(a, minus));
    let minus = _mm256_setr_ps(0.0, 0.0, -0.0, -0.0, 0.0, 0.0, -0.0, -0.0);
    let a = _mm256_add_ps(_mm256_permute_ps::<0b01_00_11_10>(a), _mm256_xor_ps(a, minus));
    let minus = _mm256_setr_ps(0.0, 0.0, 0.0, 0.0, -0.0, -0.0, -0.0, -0.0);
    _mm256_add_ps(_mm256_permute2f128_ps::<0x01>(a, a), _mm256_xor_ps(a, minus))
}

#[inline(always)]
unsafe fn blend(mask: __m256i, if_clear: __m256, if_set: __m256) -> __m256 {
    _mm256_blendv_ps(if_clear, if_set, _mm256_castsi256_ps(mask))
}

#[inline(always)]
unsafe fn greater(a: __m256, b: __m256) -> __m256i {
    _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
}

#[inline(always)]
unsafe fn absolute(a: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), a)
}

impl Lanes for Avx2 {
    type F = F;
    type I = I;
    type M = I;
    type Table4 = __m256;
    type Table8 = __m256;
    type Table16 = [__m256; 2];

    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        [_mm256_set1_ps(value); 2]
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> F {
        [_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(8))]
    }

    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> F {
        // A masked-out lane is not read; the second pointer may lie beyond the data.
        let first = first(n);
        [_mm256_maskload_ps(source, first[0]), _mm256_maskload_ps(source.wrapping_add(8), first[1])]
    }

    #[inline(always)]
    unsafe fn store(lanes: F, target: *mut f32) {
        _mm256_storeu_ps(target, lanes[0]);
        _mm256_storeu_ps(target.add(8), lanes[1]);
    }

    #[inline(always)]
    unsafe fn store_partial(lanes: F, target: *mut f32, n: usize) {
        let first = first(n);
        _mm256_maskstore_ps(target, first[0], lanes[0]);
        _mm256_maskstore_ps(target.wrapping_add(8), first[1], lanes[1]);
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> F {
        [bf16_lanes(_mm_loadu_si128(source.cast())), bf16_lanes(_mm_loadu_si128(source.add(8).cast()))]
    }

    #[inline(always)]
    unsafe fn load_bf16_partial(source: *const u16, n: usize) -> F {
        let [low, high] = load_u16_parts(source, n);
        [bf16_lanes(low), bf16_lanes(high)]
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> F {
        [_mm256_cvtph_ps(_mm_loadu_si128(source.cast())), _mm256_cvtph_ps(_mm_loadu_si128(source.add(8).cast()))]
    }

    #[inline(always)]
    unsafe fn load_f16_partial(source: *const u16, n: usize) -> F {
        let [low, high] = load_u16_parts(source, n);
        [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
    }

    #[inline(always)]
    unsafe fn splat_u32(value: u32) -> I {
        [_mm256_set1_epi32(value.cast_signed()); 2]
    }

    #[inline(always)]
    unsafe fn load_u32(source: *const u8) -> I {
        [_mm256_loadu_si256(source.cast()), _mm256_loadu_si256(source.add(32).cast())]
    }

    #[inline(always)]
    unsafe fn load_u8(source: *const u8) -> I {
        widen_u8(_mm_loadu_si128(source.cast()))
    }

    #[inline(always)]
    unsafe fn load_u8_partial(source: *const u8, n: usize) -> I {
        widen_u8(from_u128(bytes::load_up_to_16(source, n)))
    }

    #[inline(always)]
    unsafe fn store_u8(lanes: I, target: *mut u8) {
        _mm_storeu_si128(target.cast(), narrow_to_u8(lanes));
    }

    #[inline(always)]
    unsafe fn store_u8_partial(lanes: I, target: *mut u8, n: usize) {
        bytes::store_up_to_16(to_u128(narrow_to_u8(lanes)), target, n);
    }

    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn mul_add(a: F, b: F, c: F) -> F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }

    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        [absolute(a[0]), absolute(a[1])]
    }

    #[inline(always)]
    unsafe fn reduce_add(a: F) -> f32 {
        let a = sum_parts(a);
        let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
    }

    #[inline(always)]
    unsafe fn reduce_max(a: F) -> f32 {
        let a = _mm256_max_ps(a[0], a[1]);
        let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
    }

    #[inline(always)]
    unsafe fn reduce_add_4(a: [F; 4]) -> [f32; 4] {
        let halves = sum_halves([sum_parts(a[0]), sum_parts(a[1]), sum_parts(a[2]), sum_parts(a[3])]);
        let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
        let mut result = [0.0; 4];
        _mm_storeu_ps(result.as_mut_ptr(), sums);
        result
    }

    #[inline(always)]
    unsafe fn reduce_add_16(a: [F; 16]) -> F {
        let mut parts = [_mm256_setzero_ps(); 16];
        for (part, &vector) in parts.iter_mut().zip(&a) {
            *part = sum_parts(vector);
        }
        let [p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15] = parts;
        [sum_8([p0, p1, p2, p3, p4, p5, p6, p7]), sum_8([p8, p9, p10, p11, p12, p13, p14, p15])]
    }

    #[inline(always)]
    unsafe fn fwht16(a: F) -> F {
        let (a, b) = (fwht8(a[0]), fwht8(a[1]));
        [_mm256_add_ps(a, b), _mm256_sub_ps(a, b)]
    }

    #[inline(always)]
    unsafe fn and(a: I, value: u32) -> I {
        let value = _mm256_set1_epi32(value.cast_signed());
        [_mm256_and_si256(a[0], value), _mm256_and_si256(a[1], value)]
    }

    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn add_u32(a: I, b: I) -> I {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn shr<const K: i32>(a: I) -> I {
        [_mm256_srli_epi32::<K>(a[0]), _mm256_srli_epi32::<K>(a[1])]
    }

    #[inline(always)]
    unsafe fn shl<const K: i32>(a: I) -> I {
        [_mm256_slli_epi32::<K>(a[0]), _mm256_slli_epi32::<K>(a[1])]
    }

    #[inline(always)]
    unsafe fn load_bits<const K: i32>(source: *const u8) -> I {
        let (low, high) = bytes::bit_halves::<K>(source);
        let steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(K));
        let shifted = |word: u32| _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), steps);
        [shifted(low), shifted(high)]
    }

    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }

    #[inline(always)]
    unsafe fn truncate(a: F) -> I {
        [_mm256_cvttps_epi32(a[0]), _mm256_cvttps_epi32(a[1])]
    }

    #[inline(always)]
    unsafe fn to_bits(a: F) -> I {
        [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])]
    }

    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])]
    }

    #[inline(always)]
    unsafe fn mask(bits: u16) -> I {
        Self::test(
            [
                _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
                _mm256_setr_epi32(1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15),
            ],
            u32::from(bits),
        )
    }

    #[inline(always)]
    unsafe fn gt(a: F, b: F) -> I {
        [greater(a[0], b[0]), greater(a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn test(a: I, value: u32) -> I {
        // Equal to 0, then turned around: `value` may have several bits.
        let none = _mm256_setzero_si256();
        let a = Self::and(a, value);
        let all = _mm256_set1_epi32(-1);
        [_mm256_xor_si256(_mm256_cmpeq_epi32(a[0], none), all), _mm256_xor_si256(_mm256_cmpeq_epi32(a[1], none), all)]
    }

    #[inline(always)]
    unsafe fn select(mask: I, if_clear: F, if_set: F) -> F {
        [blend(mask[0], if_clear[0], if_set[0]), blend(mask[1], if_clear[1], if_set[1])]
    }

    #[inline(always)]
    unsafe fn select_u32(mask: I, if_clear: I, if_set: I) -> I {
        [_mm256_blendv_epi8(if_clear[0], if_set[0], mask[0]), _mm256_blendv_epi8(if_clear[1], if_set[1], mask[1])]
    }

    #[inline(always)]
    unsafe fn count_gt(count: I, t: F, threshold: F) -> I {
        // A set lane is -1.
        let greater = Self::gt(t, threshold);
        [_mm256_sub_epi32(count[0], greater[0]), _mm256_sub_epi32(count[1], greater[1])]
    }

    #[inline(always)]
    unsafe fn or_bits(a: I, mask: u16, value: u32) -> I {
        Self::or(a, Self::and(Self::mask(mask), value))
    }

    #[inline(always)]
    unsafe fn table4(values: &[f32]) -> __m256 {
        repeated::<4>(values)
    }

    #[inline(always)]
    unsafe fn table8(values: &[f32]) -> __m256 {
        repeated::<8>(values)
    }

    #[inline(always)]
    unsafe fn table16(values: &[f32]) -> [__m256; 2] {
        let (low, high) = values.split_at(values.len().min(8));
        [repeated::<8>(low), repeated::<8>(high)]
    }

    #[inline(always)]
    unsafe fn lookup4(table: __m256, index: I) -> F {
        [_mm256_permutevar8x32_ps(table, index[0]), _mm256_permutevar8x32_ps(table, index[1])]
    }

    #[inline(always)]
    unsafe fn lookup8(table: __m256, index: I) -> F {
        [_mm256_permutevar8x32_ps(table, index[0]), _mm256_permutevar8x32_ps(table, index[1])]
    }

    #[inline(always)]
    unsafe fn lookup16(table: [__m256; 2], index: I) -> F {
        // Bit 3 of the index, moved to the sign, chooses between the halves of the table.
        let upper = Self::shl::<28>(index);
        Self::select(upper, Self::lookup8(table[0], index), Self::lookup8(table[1], index))
    }

    #[inline(always)]
    unsafe fn max_magnitude(magnitude: I, x: F) -> I {
        let x = Self::to_bits(Self::abs(x));
        [_mm256_max_epu32(magnitude[0], x[0]), _mm256_max_epu32(magnitude[1], x[1])]
    }

    #[inline(always)]
    unsafe fn all_finite(magnitude: I) -> bool {
        // Without their sign the bits of a float are a positive i32.
        let largest = _mm256_max_epi32(magnitude[0], magnitude[1]);
        let infinity = _mm256_set1_epi32(f32::INFINITY.to_bits().cast_signed());
        _mm256_movemask_epi8(_mm256_cmpgt_epi32(infinity, largest)) == -1
    }

    #[inline(always)]
    unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8) {
        bytes::expand_ternary(source, n, low, high);
    }
}

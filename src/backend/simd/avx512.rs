//! Sixteen lanes in one AVX-512 register.
//!
//! What it is: one or two instructions for nearly every operation; masks are the processor's own, lookups are `vpermps` and `vpermi2b`.
//! What it is not: usable without F, BW, VL, DQ, VBMI and VNNI (Ice Lake, Zen 4): see [`Isa`](super::Isa).

#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is that of the trait; the bodies add nothing to it"
)]

use super::{LANES, Lanes, bytes::split_ternary};
use std::arch::x86_64::*;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// The first `n` ≤ 16 lanes.
#[inline(always)]
const fn first(n: usize) -> __mmask16 {
    debug_assert!(n <= LANES);
    ((1_u32 << n) - 1) as __mmask16
}

/// A register with `values`, padded with zeros to N and repeated 16 / N times, so that a lookup need not mask its index.
#[inline(always)]
unsafe fn repeated<const N: usize>(values: &[f32]) -> __m512 {
    assert!(values.len() <= N, "a table of {N} entries was given {} values", values.len());
    let mut table = [0.0; LANES];
    for chunk in table.chunks_exact_mut(N) {
        chunk[..values.len()].copy_from_slice(values);
    }
    _mm512_loadu_ps(table.as_ptr())
}

/// [`split_ternary`] of every byte: the four low digits, and the high one.
#[repr(align(64))]
struct TernaryTables {
    low: [u8; 256],
    high: [u8; 256],
}

static TERNARY: TernaryTables = {
    let mut tables = TernaryTables { low: [0; 256], high: [0; 256] };
    let mut byte = 0;
    while byte < 256 {
        (tables.low[byte], tables.high[byte]) = split_ternary(byte as u8);
        byte += 1;
    }
    tables
};

/// A table of 256 bytes in four registers.
#[inline(always)]
unsafe fn load_byte_table(table: &[u8; 256]) -> [__m512i; 4] {
    let mut registers = [_mm512_setzero_si512(); 4];
    for (register, bytes) in registers.iter_mut().zip(table.chunks_exact(64)) {
        *register = _mm512_loadu_si512(bytes.as_ptr().cast());
    }
    registers
}

/// 64 lookups: `vpermi2b` looks at the low 7 bits of an index, the top bit chooses between the halves.
#[inline(always)]
unsafe fn lookup_bytes(table: [__m512i; 4], index: __m512i) -> __m512i {
    let lower = _mm512_permutex2var_epi8(table[0], index, table[1]);
    let upper = _mm512_permutex2var_epi8(table[2], index, table[3]);
    _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper)
}

/// Where the digit of every channel of a row is: one of 64 bytes, 32 with four low digits and 32 with the high one, and how far that is to
/// be shifted.
#[repr(align(64))]
struct TernaryLanes<const D: usize> {
    byte: [u32; D],
    shift: [u32; D],
}

impl<const D: usize> TernaryLanes<D> {
    const PLANES: usize = D.div_ceil(5);
    const ALL: Self = {
        assert!(D.is_multiple_of(LANES) && Self::PLANES <= 32);
        let mut lanes = Self { byte: [0; D], shift: [0; D] };
        let mut c = 0;
        while c < D {
            let (plane, byte) = (c / Self::PLANES, c % Self::PLANES);
            lanes.byte[c] = if plane < 4 { byte } else { 32 + byte } as u32;
            lanes.shift[c] = if plane < 4 { 2 * plane as u32 } else { 0 };
            c += 1;
        }
        lanes
    };
}

/// [`Lanes::ternary_levels`] of D channels: each lane picks its byte, so all stores are whole and aligned where rows are.
#[inline(always)]
unsafe fn ternary_rows<const D: usize>(
    table: __m512,
    low: *const u8,
    high: *const u8,
    rows: usize,
    target: *mut f32,
) -> bool {
    // Opaque: of what it knows the compiler makes shuffles of two registers, three times as dear.
    let lanes = std::hint::black_box(const { &TernaryLanes::<D>::ALL });
    let planes = TernaryLanes::<D>::PLANES;
    let (mut index, mut shift) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 8]);
    let mut v = 0;
    while v < D / LANES {
        index[v] = _mm512_load_si512(lanes.byte.as_ptr().add(v * LANES).cast());
        let shifts = _mm512_load_si512(lanes.shift.as_ptr().add(v * LANES).cast());
        shift[v] = _mm512_and_si512(shifts, _mm512_set1_epi32(31)); // below 32 for all that the compiler knows
        v += 1;
    }
    let mut row = 0;
    while row < rows {
        let lower = _mm512_castsi256_si512(_mm256_loadu_si256(low.add(row * planes).cast()));
        let bytes = _mm512_inserti64x4::<1>(lower, _mm256_loadu_si256(high.add(row * planes).cast()));
        let target = target.add(row * D);
        let mut v = 0;
        while v < D / LANES {
            let code = _mm512_srlv_epi32(_mm512_permutexvar_epi8(index[v], bytes), shift[v]);
            _mm512_storeu_ps(target.add(v * LANES), _mm512_permutexvar_ps(code, table));
            v += 1;
        }
        row += 1;
    }
    true
}

/// Where K bits of every lane are in a string of bits: two neighbouring bytes of it, below two that mean nothing, and how far
/// they are to be shifted.
#[repr(align(64))]
struct BitLanes<const K: i32> {
    bytes: [[u8; 4]; LANES],
    shift: [u32; LANES],
}

impl<const K: i32> BitLanes<K> {
    const ALL: Self = {
        let mut lanes = Self { bytes: [[0; 4]; LANES], shift: [0; LANES] };
        let mut i = 0;
        while i < LANES {
            let bit = K as usize * i;
            let first = (bit / 8) as u8;
            lanes.bytes[i] = [first, first + 1, 0, 0];
            lanes.shift[i] = (bit % 8) as u32;
            i += 1;
        }
        lanes
    };
}

/// Not the intrinsic: where it can, the compiler makes two instructions of it, which wait less for one another and take twice as long where
/// there are sums enough.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_words(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    std::arch::asm!(
        "vpdpwssd {sum}, {a}, {b}",
        sum = inout(zmm_reg) sum,
        a = in(zmm_reg) a,
        b = in(zmm_reg) b,
        options(pure, nomem, nostack, preserves_flags),
    );
    sum
}

/// Vector i of the result, lane 4q + k: a part of the sum of `a[4 i + k]`, namely that of its 128-bit quarter q.
#[inline(always)]
unsafe fn sum_quarters(a: [__m512; 4]) -> __m512 {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let even = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let odd = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    _mm512_add_ps(even, odd)
}

/// Adds neighbouring 128-bit quarters: those of `a` end in the lower half, those of `b` in the upper one.
#[inline(always)]
unsafe fn add_neighbouring_quarters(a: __m512, b: __m512) -> __m512 {
    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
    let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
    _mm512_add_ps(even, odd)
}

/// One butterfly stage: `swapped` has lane i ^ h of `a` in lane i, `upper` are the lanes with bit h.
#[inline(always)]
unsafe fn butterfly(a: __m512, swapped: __m512, upper: __mmask16) -> __m512 {
    let minus = _mm512_maskz_mov_ps(upper, _mm512_set1_ps(-0.0));
    _mm512_add_ps(swapped, _mm512_xor_ps(a, minus))
}

impl Lanes for Avx512 {
    type F = __m512;
    type I = __m512i;
    type M = __mmask16;
    type Table4 = __m512;
    type Table8 = __m512;
    type Table16 = __m512;

    const REGISTERS: usize = 32;
    const WORDS: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        _mm512_set1_ps(value)
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> __m512 {
        _mm512_loadu_ps(source)
    }

    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(first(n), source)
    }

    #[inline(always)]
    unsafe fn store(lanes: __m512, target: *mut f32) {
        _mm512_storeu_ps(target, lanes);
    }

    #[inline(always)]
    unsafe fn store_partial(lanes: __m512, target: *mut f32, n: usize) {
        _mm512_mask_storeu_ps(target, first(n), lanes);
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> __m512 {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }

    #[inline(always)]
    unsafe fn load_bf16_partial(source: *const u16, n: usize) -> __m512 {
        let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), source.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(source.cast()))
    }

    #[inline(always)]
    unsafe fn load_f16_partial(source: *const u16, n: usize) -> __m512 {
        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), source.cast()))
    }

    #[inline(always)]
    unsafe fn splat_u32(value: u32) -> __m512i {
        _mm512_set1_epi32(value.cast_signed())
    }

    #[inline(always)]
    unsafe fn load_u32(source: *const u8) -> __m512i {
        _mm512_loadu_si512(source.cast())
    }

    #[inline(always)]
    unsafe fn load_u8(source: *const u8) -> __m512i {
        _mm512_cvtepu8_epi32(_mm_loadu_si128(source.cast()))
    }

    #[inline(always)]
    unsafe fn load_u8_partial(source: *const u8, n: usize) -> __m512i {
        _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), source.cast()))
    }

    #[inline(always)]
    unsafe fn store_u8(lanes: __m512i, target: *mut u8) {
        _mm_storeu_si128(target.cast(), _mm512_cvtepi32_epi8(lanes));
    }

    #[inline(always)]
    unsafe fn store_u8_partial(lanes: __m512i, target: *mut u8, n: usize) {
        _mm_mask_storeu_epi8(target.cast(), first(n), _mm512_cvtepi32_epi8(lanes));
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }

    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }

    #[inline(always)]
    unsafe fn reduce_add(a: __m512) -> f32 {
        let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
        let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
    }

    #[inline(always)]
    unsafe fn reduce_max(a: __m512) -> f32 {
        let a = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
        let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
    }

    #[inline(always)]
    unsafe fn reduce_add_4(a: [__m512; 4]) -> [f32; 4] {
        let quarters = sum_quarters(a);
        let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
        let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
        let mut result = [0.0; 4];
        _mm_storeu_ps(result.as_mut_ptr(), sums);
        result
    }

    #[inline(always)]
    unsafe fn reduce_add_16(a: [__m512; 16]) -> __m512 {
        let q0 = sum_quarters([a[0], a[1], a[2], a[3]]);
        let q1 = sum_quarters([a[4], a[5], a[6], a[7]]);
        let q2 = sum_quarters([a[8], a[9], a[10], a[11]]);
        let q3 = sum_quarters([a[12], a[13], a[14], a[15]]);
        add_neighbouring_quarters(add_neighbouring_quarters(q0, q1), add_neighbouring_quarters(q2, q3))
    }

    #[inline(always)]
    unsafe fn fwht16(a: __m512) -> __m512 {
        let a = butterfly(a, _mm512_permute_ps::<0b10_11_00_01>(a), 0xaaaa);
        let a = butterfly(a, _mm512_permute_ps::<0b01_00_11_10>(a), 0xcccc);
        let a = butterfly(a, _mm512_shuffle_f32x4::<0b10_11_00_01>(a, a), 0xf0f0);
        butterfly(a, _mm512_shuffle_f32x4::<0b01_00_11_10>(a, a), 0xff00)
    }

    #[inline(always)]
    unsafe fn and(a: __m512i, value: u32) -> __m512i {
        _mm512_and_si512(a, Self::splat_u32(value))
    }

    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }

    #[inline(always)]
    unsafe fn add_u32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }

    // The shifts by a vector fold to the shifts by an immediate, whose intrinsics want a const of another type.
    #[inline(always)]
    unsafe fn shr<const K: i32>(a: __m512i) -> __m512i {
        _mm512_srlv_epi32(a, _mm512_set1_epi32(K))
    }

    #[inline(always)]
    unsafe fn shl<const K: i32>(a: __m512i) -> __m512i {
        _mm512_sllv_epi32(a, _mm512_set1_epi32(K))
    }

    #[inline(always)]
    unsafe fn load_bits<const K: i32>(source: *const u8) -> __m512i {
        // A masked-out byte is not read. Every lane picks the two bytes that have its bits.
        let bytes = _mm512_castsi128_si512(_mm_maskz_loadu_epi8((1 << (2 * K)) - 1, source.cast()));
        let lanes = const { &BitLanes::<K>::ALL };
        let picked = _mm512_permutexvar_epi8(_mm512_load_si512(lanes.bytes.as_ptr().cast()), bytes);
        let shift = _mm512_load_si512(lanes.shift.as_ptr().cast());
        _mm512_srlv_epi32(picked, shift)
    }

    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }

    #[inline(always)]
    unsafe fn truncate(a: __m512) -> __m512i {
        _mm512_cvttps_epi32(a)
    }

    #[inline(always)]
    unsafe fn to_bits(a: __m512) -> __m512i {
        _mm512_castps_si512(a)
    }

    #[inline(always)]
    unsafe fn from_bits(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(a)
    }

    #[inline(always)]
    unsafe fn mask(bits: u16) -> __mmask16 {
        bits
    }

    #[inline(always)]
    unsafe fn gt(a: __m512, b: __m512) -> __mmask16 {
        _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b)
    }

    #[inline(always)]
    unsafe fn test(a: __m512i, value: u32) -> __mmask16 {
        _mm512_test_epi32_mask(a, Self::splat_u32(value))
    }

    #[inline(always)]
    unsafe fn select(mask: __mmask16, if_clear: __m512, if_set: __m512) -> __m512 {
        _mm512_mask_blend_ps(mask, if_clear, if_set)
    }

    #[inline(always)]
    unsafe fn select_u32(mask: __mmask16, if_clear: __m512i, if_set: __m512i) -> __m512i {
        _mm512_mask_blend_epi32(mask, if_clear, if_set)
    }

    #[inline(always)]
    unsafe fn count_gt(count: __m512i, t: __m512, threshold: __m512) -> __m512i {
        _mm512_mask_add_epi32(count, Self::gt(t, threshold), count, _mm512_set1_epi32(1))
    }

    #[inline(always)]
    unsafe fn or_bits(a: __m512i, mask: u16, value: u32) -> __m512i {
        _mm512_mask_or_epi32(a, mask, a, Self::splat_u32(value))
    }

    #[inline(always)]
    unsafe fn table4(values: &[f32]) -> __m512 {
        repeated::<4>(values)
    }

    #[inline(always)]
    unsafe fn table8(values: &[f32]) -> __m512 {
        repeated::<8>(values)
    }

    #[inline(always)]
    unsafe fn table16(values: &[f32]) -> __m512 {
        repeated::<16>(values)
    }

    #[inline(always)]
    unsafe fn lookup4(table: __m512, index: __m512i) -> __m512 {
        _mm512_permutexvar_ps(index, table)
    }

    #[inline(always)]
    unsafe fn lookup8(table: __m512, index: __m512i) -> __m512 {
        _mm512_permutexvar_ps(index, table)
    }

    #[inline(always)]
    unsafe fn lookup16(table: __m512, index: __m512i) -> __m512 {
        _mm512_permutexvar_ps(index, table)
    }

    #[inline(always)]
    unsafe fn max_magnitude(magnitude: __m512i, x: __m512) -> __m512i {
        _mm512_max_epu32(magnitude, _mm512_castps_si512(_mm512_abs_ps(x)))
    }

    #[inline(always)]
    unsafe fn all_finite(magnitude: __m512i) -> bool {
        _mm512_cmpge_epu32_mask(magnitude, Self::splat_u32(f32::INFINITY.to_bits())) == 0
    }

    #[inline(always)]
    unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8) {
        let (low_table, high_table) = (load_byte_table(&TERNARY.low), load_byte_table(&TERNARY.high));
        let mut done = 0;
        while done + 64 <= n {
            let packed = _mm512_loadu_si512(source.add(done).cast());
            _mm512_storeu_si512(low.add(done).cast(), lookup_bytes(low_table, packed));
            _mm512_storeu_si512(high.add(done).cast(), lookup_bytes(high_table, packed));
            done += 64;
        }
        if done < n {
            // A masked-out byte is neither read nor written.
            let rest = (1_u64 << (n - done)) - 1;
            let packed = _mm512_maskz_loadu_epi8(rest, source.add(done).cast());
            _mm512_mask_storeu_epi8(low.add(done).cast(), rest, lookup_bytes(low_table, packed));
            _mm512_mask_storeu_epi8(high.add(done).cast(), rest, lookup_bytes(high_table, packed));
        }
    }

    #[inline(always)]
    unsafe fn ternary_levels(
        table: __m512,
        low: *const u8,
        high: *const u8,
        rows: usize,
        d: usize,
        target: *mut f32,
    ) -> bool {
        match d {
            64 => ternary_rows::<64>(table, low, high, rows, target),
            80 => ternary_rows::<80>(table, low, high, rows, target),
            96 => ternary_rows::<96>(table, low, high, rows, target),
            112 => ternary_rows::<112>(table, low, high, rows, target),
            128 => ternary_rows::<128>(table, low, high, rows, target),
            _ => false,
        }
    }

    #[inline(always)]
    unsafe fn dot_words(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        dot_words(sum, a, b)
    }

    #[inline(always)]
    unsafe fn signed_to_f32(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
}

//! Bytes at the edge of a vector, shared by the implementations that have no masked instructions.
//!
//! What it is: loads and stores of up to 16 bytes that touch no byte beyond them, half precision to f32 in integer arithmetic, and the
//! digits of format `1.6`. What it is not: anything that needs a processor feature; all of it is compiled for its caller's.

/// The first `n` ≤ 16 bytes at `source` as a little-endian number, the others 0.
///
/// # Safety
///
/// `n` bytes are readable at `source`.
#[inline(always)]
pub(super) unsafe fn load_up_to_16(source: *const u8, n: usize) -> u128 {
    debug_assert!(n <= 16);
    // SAFETY: each branch reads bytes [0, k) and [n - k, n) with k <= n, which overlap where n < 2k; the overlap agrees.
    unsafe {
        if n >= 8 {
            let first = source.cast::<u64>().read_unaligned().to_le();
            let last = source.add(n - 8).cast::<u64>().read_unaligned().to_le();
            u128::from(first) | u128::from(last) << (8 * (n - 8))
        } else if n >= 4 {
            let first = source.cast::<u32>().read_unaligned().to_le();
            let last = source.add(n - 4).cast::<u32>().read_unaligned().to_le();
            u128::from(u64::from(first) | u64::from(last) << (8 * (n - 4)))
        } else if n > 0 {
            // One, two or three bytes: the first, the middle and the last are all of them.
            let (first, middle, last) = (*source, *source.add(n / 2), *source.add(n - 1));
            u128::from(u32::from(first) | u32::from(middle) << (8 * (n / 2)) | u32::from(last) << (8 * (n - 1)))
        } else {
            0
        }
    }
}

/// Writes the low `n` ≤ 16 bytes of `bytes`, little endian.
///
/// # Safety
///
/// `n` bytes are writable at `target`.
#[inline(always)]
pub(super) unsafe fn store_up_to_16(bytes: u128, target: *mut u8, n: usize) {
    debug_assert!(n <= 16);
    // SAFETY: each branch writes bytes [0, k) and [n - k, n) with k <= n, which overlap where n < 2k; the overlap agrees.
    unsafe {
        if n >= 8 {
            target.cast::<u64>().write_unaligned((bytes as u64).to_le());
            target.add(n - 8).cast::<u64>().write_unaligned(((bytes >> (8 * (n - 8))) as u64).to_le());
        } else if n >= 4 {
            let bytes = bytes as u64;
            target.cast::<u32>().write_unaligned((bytes as u32).to_le());
            target.add(n - 4).cast::<u32>().write_unaligned(((bytes >> (8 * (n - 4))) as u32).to_le());
        } else if n > 0 {
            let bytes = bytes as u32;
            *target = bytes as u8;
            *target.add(n / 2) = (bytes >> (8 * (n / 2))) as u8;
            *target.add(n - 1) = (bytes >> (8 * (n - 1))) as u8;
        }
    }
}

/// How many of `n` elements fall into part `part` when each part holds `size`.
#[inline(always)]
pub(super) const fn elements_of_part(n: usize, part: usize, size: usize) -> usize {
    let left = n.saturating_sub(part * size);
    if left < size { left } else { size }
}

/// IEEE half precision to f32, exactly, without branches and without subnormal operands.
#[inline(always)]
pub(super) const fn f16_to_f32(half: u16) -> f32 {
    const EXPONENT: u32 = 0x1f << 23;
    const REBIAS: u32 = (127 - 15) << 23;
    // 2⁻¹⁴, the unit that a subnormal half lacks.
    const SUBNORMAL_UNIT: f32 = f32::from_bits(113 << 23);
    let sign = (half as u32 & 0x8000) << 16;
    let shifted = (half as u32 & 0x7fff) << 13;
    let normal = shifted + REBIAS;
    let subnormal = (f32::from_bits(normal + (1 << 23)) - SUBNORMAL_UNIT).to_bits();
    let magnitude = match shifted & EXPONENT {
        0 => subnormal,
        EXPONENT => normal + REBIAS,
        _ => normal,
    };
    f32::from_bits(sign | magnitude)
}

/// bfloat16 to f32.
#[inline(always)]
pub(super) const fn bf16_to_f32(brain: u16) -> f32 {
    f32::from_bits((brain as u32) << 16)
}

/// The first and the second half of a string of sixteen times K bits, for K = 2, 3 or 4; above them bits that do not count.
///
/// # Safety
///
/// 2·K bytes are readable at `source`.
#[inline(always)]
pub(super) unsafe fn bit_halves<const K: i32>(source: *const u8) -> (u32, u32) {
    // SAFETY: 4, 6 or 8 bytes of the caller's promise.
    unsafe {
        match K {
            2 => {
                let word = source.cast::<u32>().read_unaligned().to_le();
                (word, word >> 16)
            }
            3 => {
                let second = source.add(2).cast::<u32>().read_unaligned().to_le();
                (source.cast::<u32>().read_unaligned().to_le(), second >> 8)
            }
            _ => {
                let words = source.cast::<u64>().read_unaligned().to_le();
                (words as u32, (words >> 32) as u32)
            }
        }
    }
}

/// A byte of format `1.6` as (d₀ | d₁<<2 | d₂<<4 | d₃<<6, d₄). Each step multiplies by 3; the carry is the digit, the rest goes on.
#[inline(always)]
pub(super) const fn split_ternary(byte: u8) -> (u8, u8) {
    let t0 = byte as u16 * 3;
    let t1 = (t0 & 255) * 3;
    let t2 = (t1 & 255) * 3;
    let t3 = (t2 & 255) * 3;
    let t4 = (t3 & 255) * 3;
    let low = (t0 >> 8) | (t1 >> 8) << 2 | (t2 >> 8) << 4 | (t3 >> 8) << 6;
    (low as u8, (t4 >> 8) as u8)
}

/// [`split_ternary`] of 16 bytes, as a loop that the compiler turns into vectors of u16.
#[inline(always)]
fn split_ternary_block(block: [u8; 16]) -> ([u8; 16], [u8; 16]) {
    let (mut low, mut high) = ([0; 16], [0; 16]);
    for i in 0..16 {
        (low[i], high[i]) = split_ternary(block[i]);
    }
    (low, high)
}

/// [`Lanes::expand_ternary`](super::Lanes::expand_ternary) in blocks of 16 bytes.
///
/// # Safety
///
/// `n` bytes are readable at `source` and writable at `low` and `high`, and the three do not overlap.
#[inline(always)]
pub(super) unsafe fn expand_ternary(source: *const u8, n: usize, low: *mut u8, high: *mut u8) {
    // SAFETY: every block and the part of one lie within the n bytes of the caller's promise.
    unsafe {
        if n < 16 {
            let (low_part, high_part) = split_ternary_block(load_up_to_16(source, n).to_le_bytes());
            store_up_to_16(u128::from_le_bytes(low_part), low, n);
            store_up_to_16(u128::from_le_bytes(high_part), high, n);
            return;
        }
        let mut start = 0;
        loop {
            let (low_block, high_block) = split_ternary_block(source.add(start).cast::<[u8; 16]>().read());
            low.add(start).cast::<[u8; 16]>().write(low_block);
            high.add(start).cast::<[u8; 16]>().write(high_block);
            if start + 16 == n {
                return;
            }
            // The last block may overlap the one before it: the same bytes are written again.
            start = (start + 16).min(n - 16);
        }
    }
}

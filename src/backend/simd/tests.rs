//! Every operation on every instruction set of this processor against scalar arithmetic written out here.
//!
//! What it is: random rounds over ordinary and special floats, all partial lengths on memory that ends at a protected page, and the
//! exponential against f64. What it is not: a test of `multiversion!` on instruction sets that this processor lacks.

use super::{Isa, LANES, Lanes, multiversion};

mod guard;
use guard::Guarded;

const ROUNDS: usize = 500;

/// `SplitMix64`.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Any bits a third of the time, else of ordinary size; one in eight special.
    fn float(&mut self) -> f32 {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            1e-40,
            -1e-40,
        ];
        let bits = self.next();
        match bits % 24 {
            0..3 => SPECIAL[(bits >> 32) as usize % SPECIAL.len()],
            3..11 => f32::from_bits((bits >> 32) as u32),
            _ => self.finite(),
        }
    }

    /// In (-8, 8).
    fn finite(&mut self) -> f32 {
        (self.next() as i64 as f64 / 2.0_f64.powi(60)) as f32
    }

    fn floats(&mut self) -> [f32; LANES] {
        std::array::from_fn(|_| self.float())
    }

    fn finites(&mut self) -> [f32; LANES] {
        std::array::from_fn(|_| self.finite())
    }

    fn integers(&mut self) -> [u32; LANES] {
        std::array::from_fn(|_| self.next() as u32)
    }
}

fn each_isa(mut check: impl FnMut(Isa, &mut Rng)) {
    for isa in Isa::available() {
        println!("{isa}");
        check(isa, &mut Rng(1));
    }
}

#[track_caller]
fn assert_same(name: &str, found: [f32; LANES], expected: impl Fn(usize) -> f32) {
    for (i, found) in found.into_iter().enumerate() {
        let expected = expected(i);
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(
            same,
            "{name}, lane {i}: expected {expected:e} ({:#x}), found {found:e} ({:#x})",
            expected.to_bits(),
            found.to_bits()
        );
    }
}

#[track_caller]
fn assert_equal(name: &str, found: [u32; LANES], expected: impl Fn(usize) -> u32) {
    for (i, found) in found.into_iter().enumerate() {
        assert_eq!(found, expected(i), "{name}, lane {i}");
    }
}

#[inline(always)]
unsafe fn from_floats<S: Lanes>(a: &[f32; LANES]) -> S::F {
    // SAFETY: 16 floats; the caller enables the features of S.
    unsafe { S::load(a.as_ptr()) }
}

#[inline(always)]
unsafe fn floats<S: Lanes>(a: S::F) -> [f32; LANES] {
    let mut result = [0.0; LANES];
    // SAFETY: 16 floats; the caller enables the features of S.
    unsafe { S::store(a, result.as_mut_ptr()) };
    result
}

#[inline(always)]
unsafe fn from_integers<S: Lanes>(a: &[u32; LANES]) -> S::I {
    // SAFETY: 16 floats that are never computed with; the caller enables the features of S.
    unsafe { S::to_bits(S::load(a.as_ptr().cast())) }
}

#[inline(always)]
unsafe fn integers<S: Lanes>(a: S::I) -> [u32; LANES] {
    // SAFETY: the caller enables the features of S.
    unsafe { floats::<S>(S::from_bits(a)).map(f32::to_bits) }
}

multiversion! {
    fn check_arithmetic(rng: &mut Rng) = arithmetic;
    fn check_reductions(rng: &mut Rng) = reductions;
    fn check_butterflies(rng: &mut Rng) = butterflies;
    fn check_integers(rng: &mut Rng) = integer_operations;
    fn check_masks(rng: &mut Rng) = masks;
    fn check_lookups(rng: &mut Rng) = lookups;
    fn check_finite(rng: &mut Rng) = finite;
    fn exponentials(x: &[f32; LANES]) -> [f32; LANES] = exponentials_of;
    fn halves(bits: &[u16; LANES]) -> [[f32; LANES]; 2] = halves_of;
    fn check_memory(data: &[u8], n: usize) = memory;
    fn ternary(source: &[u8], low: &mut [u8], high: &mut [u8]) = ternary_of;
    fn lane_count(a: &[f32; LANES]) -> usize = generic_parameters<f32, 16>;
    unsafe fn first_lane<'a>(a: *const f32, unused: &'a [u8]) -> (f32, &'a [u8]) = first_lane_of;
}

#[inline(always)]
unsafe fn arithmetic<S: Lanes>(rng: &mut Rng) {
    let (x, y, z) = (rng.floats(), rng.floats(), rng.finites());
    // SAFETY: the caller enables the features of S.
    unsafe {
        let (a, b) = (from_floats::<S>(&x), from_floats::<S>(&y));
        assert_same("splat", floats::<S>(S::splat(x[3])), |_| x[3]);
        assert_same("zero", floats::<S>(S::zero()), |_| 0.0);
        assert_same("add", floats::<S>(S::add(a, b)), |i| x[i] + y[i]);
        assert_same("sub", floats::<S>(S::sub(a, b)), |i| x[i] - y[i]);
        assert_same("mul", floats::<S>(S::mul(a, b)), |i| x[i] * y[i]);
        assert_same("min", floats::<S>(S::min(a, b)), |i| if x[i] < y[i] { x[i] } else { y[i] });
        assert_same("max", floats::<S>(S::max(a, b)), |i| if x[i] > y[i] { x[i] } else { y[i] });
        assert_same("abs", floats::<S>(S::abs(a)), |i| f32::from_bits(x[i].to_bits() & 0x7fff_ffff));
        let fused = floats::<S>(S::mul_add(from_floats::<S>(&z), from_floats::<S>(&z), S::splat(z[0])));
        for i in 0..LANES {
            let exact = f64::from(z[i]) * f64::from(z[i]) + f64::from(z[0]);
            assert!((f64::from(fused[i]) - exact).abs() <= 64.0 * f64::from(f32::EPSILON), "mul_add, lane {i}");
        }
    }
}

fn fold(mut a: [f32; LANES], operation: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            a[l] = operation(a[l], a[l + half]);
        }
    }
    a[0]
}

#[inline(always)]
unsafe fn reductions<S: Lanes>(rng: &mut Rng) {
    for x in [rng.floats(), rng.finites()] {
        // SAFETY: the caller enables the features of S.
        let (sum, largest) = unsafe { (S::reduce_add(from_floats::<S>(&x)), S::reduce_max(from_floats::<S>(&x))) };
        assert_same("reduce_add", [sum; LANES], |_| fold(x, |a, b| a + b));
        assert_same("reduce_max", [largest; LANES], |_| fold(x, |a, b| if a > b { a } else { b }));
    }
    let rows: [[f32; LANES]; 16] = std::array::from_fn(|_| rng.finites());
    // SAFETY: the caller enables the features of S.
    let (four, sixteen) = unsafe {
        let mut vectors = [S::zero(); 16];
        for (vector, row) in vectors.iter_mut().zip(&rows) {
            *vector = from_floats::<S>(row);
        }
        (S::reduce_add_4([vectors[0], vectors[1], vectors[2], vectors[3]]), floats::<S>(S::reduce_add_16(vectors)))
    };
    for (i, row) in rows.iter().enumerate() {
        let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
        let magnitude: f64 = row.iter().map(|&x| f64::from(x.abs())).sum();
        // Four or more roundings of partial sums, each at most half an ulp of the magnitude.
        let tolerance = 4.0 * magnitude * f64::from(f32::EPSILON);
        assert!((f64::from(sixteen[i]) - sum).abs() <= tolerance, "reduce_add_16, vector {i}");
        assert!(i >= 4 || (f64::from(four[i.min(3)]) - sum).abs() <= tolerance, "reduce_add_4, vector {i}");
    }
}

#[inline(always)]
unsafe fn butterflies<S: Lanes>(rng: &mut Rng) {
    for x in [rng.floats(), rng.finites()] {
        let mut expected = x;
        for h in [1, 2, 4, 8] {
            for i in (0..LANES).filter(|i| i % (2 * h) < h) {
                (expected[i], expected[i + h]) = (expected[i] + expected[i + h], expected[i] - expected[i + h]);
            }
        }
        // SAFETY: the caller enables the features of S.
        assert_same("fwht16", unsafe { floats::<S>(S::fwht16(from_floats::<S>(&x))) }, |i| expected[i]);
    }
}

#[inline(always)]
unsafe fn integer_operations<S: Lanes>(rng: &mut Rng) {
    let (x, y, value) = (rng.integers(), rng.integers(), rng.next() as u32);
    let magnitudes: [f32; LANES] = std::array::from_fn(|i| (x[i] >> 1 >> (y[i] % 31)) as f32 * 0.999);
    // SAFETY: the caller enables the features of S.
    unsafe {
        let (a, b) = (from_integers::<S>(&x), from_integers::<S>(&y));
        assert_equal("splat_u32", integers::<S>(S::splat_u32(value)), |_| value);
        assert_equal("and", integers::<S>(S::and(a, value)), |i| x[i] & value);
        assert_equal("or", integers::<S>(S::or(a, b)), |i| x[i] | y[i]);
        assert_equal("add_u32", integers::<S>(S::add_u32(a, b)), |i| x[i].wrapping_add(y[i]));
        assert_equal("shr 0", integers::<S>(S::shr::<0>(a)), |i| x[i]);
        assert_equal("shr 2", integers::<S>(S::shr::<2>(a)), |i| x[i] >> 2);
        assert_equal("shr 31", integers::<S>(S::shr::<31>(a)), |i| x[i] >> 31);
        assert_equal("shl 0", integers::<S>(S::shl::<0>(a)), |i| x[i]);
        assert_equal("shl 6", integers::<S>(S::shl::<6>(a)), |i| x[i] << 6);
        assert_equal("shl 31", integers::<S>(S::shl::<31>(a)), |i| x[i] << 31);
        assert_same("to_f32", floats::<S>(S::to_f32(S::shr::<1>(a))), |i| (x[i] >> 1) as f32);
        let truncated = integers::<S>(S::truncate(from_floats::<S>(&magnitudes)));
        assert_equal("truncate", truncated, |i| magnitudes[i] as u32);
    }
}

/// Bit i is lane i of a mask.
#[inline(always)]
unsafe fn mask_bits<S: Lanes>(mask: S::M) -> u16 {
    // SAFETY: the caller enables the features of S.
    let lanes = unsafe { floats::<S>(S::select(mask, S::splat(0.0), S::splat(1.0))) };
    (0..LANES).fold(0, |bits, i| bits | u16::from(lanes[i] == 1.0) << i)
}

#[inline(always)]
unsafe fn masks<S: Lanes>(rng: &mut Rng) {
    let (x, mut y, p, q) = (rng.floats(), rng.floats(), rng.integers(), rng.integers());
    y[rng.next() as usize % LANES] = x[0];
    y[5] = x[5];
    let (mask, value) = (rng.next() as u16, rng.next() as u32 & rng.next() as u32);
    let bit = |i: usize| mask >> i & 1 != 0;
    let bits = |test: &dyn Fn(usize) -> bool| (0..LANES).fold(0, |bits, i| bits | u16::from(test(i)) << i);
    // SAFETY: the caller enables the features of S.
    unsafe {
        let (a, b, m, n) = (from_floats::<S>(&x), from_floats::<S>(&y), from_integers::<S>(&p), from_integers::<S>(&q));
        assert_eq!(mask_bits::<S>(S::mask(mask)), mask);
        assert_eq!(mask_bits::<S>(S::gt(a, b)), bits(&|i| x[i] > y[i]), "gt");
        for value in [value, 1, 4, 1 << 31] {
            assert_eq!(mask_bits::<S>(S::test(m, value)), bits(&|i| p[i] & value != 0), "test");
        }
        assert_same("select", floats::<S>(S::select(S::gt(a, b), a, b)), |i| if x[i] > y[i] { y[i] } else { x[i] });
        assert_same("select_bits", floats::<S>(S::select_bits(mask, a, b)), |i| if bit(i) { y[i] } else { x[i] });
        let selected = integers::<S>(S::select_u32(S::mask(mask), m, n));
        assert_equal("select_u32", selected, |i| if bit(i) { q[i] } else { p[i] });
        let count = integers::<S>(S::count_gt(m, a, b));
        assert_equal("count_gt", count, |i| p[i].wrapping_add(u32::from(x[i] > y[i])));
        assert_equal(
            "or_bits",
            integers::<S>(S::or_bits(m, mask, value)),
            |i| if bit(i) { p[i] | value } else { p[i] },
        );
    }
}

#[inline(always)]
unsafe fn lookups<S: Lanes>(rng: &mut Rng) {
    let (values, index) = (rng.floats(), rng.integers());
    let entry = |size: usize, length: usize, i: usize| {
        let entry = index[i] as usize % size;
        if entry < length { values[entry] } else { 0.0 }
    };
    // SAFETY: the caller enables the features of S.
    unsafe {
        let at = from_integers::<S>(&index);
        for length in [3, 4] {
            assert_same("lookup4", floats::<S>(S::lookup4(S::table4(&values[..length]), at)), |i| entry(4, length, i));
        }
        for length in [5, 8] {
            assert_same("lookup8", floats::<S>(S::lookup8(S::table8(&values[..length]), at)), |i| entry(8, length, i));
        }
        for length in [7, 11, 16] {
            let found = floats::<S>(S::lookup16(S::table16(&values[..length]), at));
            assert_same("lookup16", found, |i| entry(16, length, i));
        }
    }
}

#[inline(always)]
unsafe fn finite<S: Lanes>(rng: &mut Rng) {
    let (x, y) = (rng.finites(), rng.finites());
    let (mut z, lane) = (rng.finites(), rng.next() as usize % LANES);
    z[lane] = rng.float();
    // SAFETY: the caller enables the features of S.
    unsafe {
        let mut magnitude = S::splat_u32(0);
        for row in [x, y] {
            magnitude = S::max_magnitude(magnitude, from_floats::<S>(&row));
        }
        assert!(S::all_finite(magnitude));
        let magnitude = S::max_magnitude(magnitude, from_floats::<S>(&z));
        let magnitude = S::max_magnitude(magnitude, from_floats::<S>(&x));
        assert_eq!(S::all_finite(magnitude), z[lane].is_finite(), "{}", z[lane]);
        assert_eq!(
            S::all_finite(S::max_magnitude(S::splat_u32(0), from_floats::<S>(&z))),
            z[lane].is_finite(),
            "{}",
            z[lane]
        );
    }
}

#[inline(always)]
unsafe fn exponentials_of<S: Lanes>(x: &[f32; LANES]) -> [f32; LANES] {
    // SAFETY: the caller enables the features of S.
    unsafe { floats::<S>(S::exp(from_floats::<S>(x))) }
}

#[inline(always)]
unsafe fn halves_of<S: Lanes>(bits: &[u16; LANES]) -> [[f32; LANES]; 2] {
    // SAFETY: 16 values; the caller enables the features of S.
    unsafe { [floats::<S>(S::load_f16(bits.as_ptr())), floats::<S>(S::load_bf16(bits.as_ptr()))] }
}

#[inline(always)]
unsafe fn ternary_of<S: Lanes>(source: &[u8], low: &mut [u8], high: &mut [u8]) {
    assert!(low.len() == source.len() && high.len() == source.len());
    // SAFETY: three slices of one length; the caller enables the features of S.
    unsafe { S::expand_ternary(source.as_ptr(), source.len(), low.as_mut_ptr(), high.as_mut_ptr()) }
}

/// A kernel with parameters after its lanes.
#[inline(always)]
unsafe fn generic_parameters<S: Lanes, T, const N: usize>(a: &[T; N]) -> usize {
    size_of::<S::F>() / size_of::<T>() + a.len() - N
}

/// A kernel with a condition of its own: `a` points to 16 floats.
#[inline(always)]
unsafe fn first_lane_of<S: Lanes>(a: *const f32, unused: &[u8]) -> (f32, &[u8]) {
    // SAFETY: the caller's condition; it also enables the features of S.
    (unsafe { floats::<S>(S::load(a))[0] }, unused)
}

/// Loads and stores of `n` elements: `data` is n·4 bytes that end at a protected page, at any alignment.
#[inline(always)]
unsafe fn memory<S: Lanes>(data: &[u8], n: usize) {
    let (bytes, shorts) = (&data[3 * n..], &data[2 * n..]);
    let short = |i: usize| u16::from_ne_bytes([shorts[2 * i], shorts[2 * i + 1]]);
    let word = |i: usize| f32::from_bits(u32::from_ne_bytes(data[4 * i..4 * i + 4].try_into().unwrap()));
    let or_zero = |i: usize, value: &dyn Fn(usize) -> f32| if i < n { value(i) } else { 0.0 };
    let f16 = |i: usize| half::f16::from_bits(short(i)).to_f32();
    let bf16 = |i: usize| half::bf16::from_bits(short(i)).to_f32();
    // SAFETY: n elements lie behind each pointer; the caller enables the features of S.
    unsafe {
        let loaded = S::load_partial(data.as_ptr().cast(), n);
        assert_same("load_partial", floats::<S>(loaded), |i| or_zero(i, &word));
        assert_same("load_f16_partial", floats::<S>(S::load_f16_partial(shorts.as_ptr().cast(), n)), |i| {
            or_zero(i, &f16)
        });
        let brains = floats::<S>(S::load_bf16_partial(shorts.as_ptr().cast(), n));
        assert_same("load_bf16_partial", brains, |i| or_zero(i, &bf16));
        let loaded_bytes = S::load_u8_partial(bytes.as_ptr(), n);
        assert_equal("load_u8_partial", integers::<S>(loaded_bytes), |i| if i < n { u32::from(bytes[i]) } else { 0 });
        if n == LANES {
            assert_same("load", floats::<S>(S::load(data.as_ptr().cast())), word);
            assert_same("load_f16", floats::<S>(S::load_f16(shorts.as_ptr().cast())), f16);
            assert_same("load_bf16", floats::<S>(S::load_bf16(shorts.as_ptr().cast())), bf16);
            assert_equal("load_u8", integers::<S>(S::load_u8(bytes.as_ptr())), |i| u32::from(bytes[i]));
            assert_equal("load_u32", integers::<S>(S::load_u32(data.as_ptr())), |i| {
                u32::from_le_bytes(data[4 * i..4 * i + 4].try_into().expect("four bytes"))
            });
        }

        // Bits above the low byte are dropped; what lies before the target keeps its value, what lies behind is protected.
        let lanes = S::or(S::shl::<8>(from_integers::<S>(&[0x0055_aa33; LANES])), loaded_bytes);
        let mut target = Guarded::new(1 + 4 * n, 0xcc);
        S::store_partial(loaded, target.bytes()[1..].as_mut_ptr().cast(), n);
        assert!(target.bytes()[0] == 0xcc && target.bytes()[1..] == *data, "store_partial");
        let mut target = Guarded::new(1 + n, 0xcc);
        S::store_u8_partial(lanes, target.bytes()[1..].as_mut_ptr(), n);
        assert!(target.bytes()[0] == 0xcc && target.bytes()[1..] == *bytes, "store_u8_partial");
        if n == LANES {
            let mut target = Guarded::new(4 * n, 0);
            S::store(loaded, target.bytes().as_mut_ptr().cast());
            assert_eq!(target.bytes(), data, "store");
            let mut target = Guarded::new(n, 0);
            S::store_u8(lanes, target.bytes().as_mut_ptr());
            assert_eq!(target.bytes(), bytes, "store_u8");
        }
    }
}

#[test]
fn operations_equal_scalar_arithmetic() {
    each_isa(|isa, rng| {
        for _ in 0..ROUNDS {
            check_arithmetic(isa, rng);
            check_reductions(isa, rng);
            check_butterflies(isa, rng);
            check_integers(isa, rng);
            check_masks(isa, rng);
            check_lookups(isa, rng);
            check_finite(isa, rng);
        }
    });
}

#[test]
fn loads_and_stores_stay_within_their_elements() {
    each_isa(|isa, rng| {
        for n in 0..=LANES {
            for _ in 0..20 {
                let mut data = Guarded::new(4 * n, 0);
                // Quiet NaNs only: a load may quiet a signalling one, and this test compares bytes.
                for word in data.bytes().chunks_exact_mut(4) {
                    let mut float = rng.float();
                    if float.is_nan() {
                        float = f32::NAN;
                    }
                    word.copy_from_slice(&float.to_ne_bytes());
                }
                check_memory(isa, data.bytes(), n);
            }
        }
    });
}

#[test]
fn every_half_becomes_its_float() {
    each_isa(|isa, _| {
        for start in (0..=u16::MAX).step_by(LANES) {
            let bits = std::array::from_fn(|i| start + i as u16);
            let [f16, bf16] = halves(isa, &bits);
            assert_same("load_f16", f16, |i| half::f16::from_bits(bits[i]).to_f32());
            assert_same("load_bf16", bf16, |i| half::bf16::from_bits(bits[i]).to_f32());
        }
    });
}

#[test]
fn exp_is_within_two_ulp() {
    each_isa(|isa, rng| {
        let mut worst = 0.0_f64;
        for round in 0..20_000 {
            let x = std::array::from_fn(|i| match round % 3 {
                0 => -87.336_54 * ((round * LANES + i) as f32 / 320_000.0),
                1 => -(rng.next() as u32 as f32) / 49_178_000.0,
                _ => -f32::from_bits(rng.next() as u32 % 87.0_f32.to_bits()),
            });
            for (x, found) in x.into_iter().zip(exponentials(isa, &x)) {
                let exact = f64::from(x).exp();
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                worst = worst.max((f64::from(found) - exact).abs() / ulp);
            }
        }
        println!("exp: {worst} ulp");
        assert!(worst <= 2.0, "{isa}: {worst} ulp");

        let mut x = [f32::NEG_INFINITY; LANES];
        x[..9].copy_from_slice(&[0.0, -0.0, -88.0, -1e9, f32::MIN, f32::NAN, -1e-45, -87.336_55, -103.0]);
        let found = exponentials(isa, &x);
        assert_eq!(found[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(found[5].is_nan());
        assert_eq!(found[6], 1.0);
        assert!(found[7..].iter().all(|&y| y.to_bits() == 0), "{found:?}");
    });
}

/// The digits of a byte of format `1.6` from the five digits' value, without the multiplications.
fn digits_of(byte: u8) -> [u8; 5] {
    // The byte is ceil(256·v / 243), so v = floor(243·byte / 256).
    let mut v = u32::from(byte) * 243 / 256;
    let mut digits = [0; 5];
    for digit in digits.iter_mut().rev() {
        *digit = (v % 3) as u8;
        v /= 3;
    }
    digits
}

#[test]
fn ternary_bytes_become_their_digits() {
    each_isa(|isa, rng| {
        for n in (0..200).chain([255, 256, 257, 1000]) {
            let mut source = Guarded::new(n, 0);
            for (i, byte) in source.bytes().iter_mut().enumerate() {
                // Bytes that a row can hold, each of them at least once for n >= 243, then any of them.
                let v = if i < 243 { i as u64 } else { rng.next() % 243 };
                *byte = (256 * v).div_ceil(243) as u8;
            }
            let (mut low, mut high) = (Guarded::new(n + 1, 0xcc), Guarded::new(n + 1, 0xcc));
            ternary(isa, source.bytes(), &mut low.bytes()[1..], &mut high.bytes()[1..]);
            assert!(low.bytes()[0] == 0xcc && high.bytes()[0] == 0xcc);
            for i in 0..n {
                let [d0, d1, d2, d3, d4] = digits_of(source.bytes()[i]);
                assert_eq!(low.bytes()[i + 1], d0 | d1 << 2 | d2 << 4 | d3 << 6, "byte {i} of {n}");
                assert_eq!(high.bytes()[i + 1], d4, "byte {i} of {n}");
            }
        }
    });
}

/// Bytes that no row holds mean the same everywhere too: what the formula of FORMAT.md says.
#[test]
fn foreign_ternary_bytes_follow_the_formula() {
    let source: Vec<u8> = (0..=255).collect();
    each_isa(|isa, _| {
        let (mut low, mut high) = (vec![0; 256], vec![0; 256]);
        ternary(isa, &source, &mut low, &mut high);
        for &q in &source {
            let digit = |n: u32| ((((u32::from(q) * 3_u32.pow(n)) & 255) * 3) >> 8) as u8;
            assert_eq!(low[q as usize], digit(0) | digit(1) << 2 | digit(2) << 4 | digit(3) << 6);
            assert_eq!(high[q as usize], digit(4));
        }
    });
}

#[test]
fn isas_have_names_and_portable_is_last() {
    let available = Isa::available();
    assert_eq!(available[0], Isa::best());
    assert_eq!(available.last().unwrap().name(), "portable");
    for isa in available {
        assert_eq!(Isa::from_name(isa.name()), Some(isa));
        assert_eq!(isa.to_string(), isa.name());
    }
    assert_eq!(Isa::from_name("AVX2"), None);
}

#[test]
fn multiversion_passes_parameters_and_lifetimes() {
    let bytes = [1, 2, 3];
    each_isa(|isa, rng| {
        let x = rng.finites();
        assert_eq!(lane_count(isa, &x), LANES);
        // SAFETY: 16 floats.
        let (first, rest) = unsafe { first_lane(isa, x.as_ptr(), &bytes) };
        assert_eq!((first, rest), (x[0], &bytes[..]));
    });
}

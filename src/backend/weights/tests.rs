//! Products and decoded rows against sums in f64, on every instruction set, for ragged sizes.

use super::PackedWeights;
use crate::backend::simd::Isa;
use crate::backend::simd::products::BLOCK;
use crate::error::Error;
use crate::tensor::Row;
use half::bf16;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Weights as plain numbers and as packed.
struct Example {
    bits: usize,
    shape: [usize; 2],
    group_size: usize,
    plain: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<bf16>,
    zeros: Vec<u8>,
}

impl Example {
    fn new(bits: usize, shape: [usize; 2], group_size: usize) -> Self {
        let [outputs, inputs] = shape;
        let mut rng = Rng(1 + (bits * outputs * inputs) as u64);
        let row_bytes = PackedWeights::code_bytes(bits, 1, inputs);
        let mut codes = vec![0u8; outputs * row_bytes];
        let groups = inputs / group_size;
        let scales: Vec<bf16> = (0..outputs * groups).map(|_| bf16::from_f32(0.01 + rng.float().abs())).collect();
        let zeros: Vec<u8> = (0..outputs * groups).map(|_| (rng.next() % (1 << bits)) as u8).collect();
        let mut plain = Vec::new();
        for output in 0..outputs {
            for input in 0..inputs {
                let code = (rng.next() % (1 << bits)) as u8;
                let row = &mut codes[output * row_bytes..(output + 1) * row_bytes];
                let (lane, first) = (input % 16, input / 16 * 12);
                match bits {
                    8 => row[input] = code,
                    6 => {
                        row[first + lane / 2] |= (code & 15) << (4 * (lane % 2));
                        row[first + 8 + lane / 4] |= (code >> 4) << (2 * (lane % 4));
                    }
                    _ => row[input / BLOCK * 64 + 4 * lane + input % BLOCK / 32] |= code << (4 * (input / 16 % 2)),
                }
                let group = output * groups + input / group_size;
                plain.push((f32::from(code) - f32::from(zeros[group])) * scales[group].to_f32());
            }
        }
        Self { bits, shape, group_size, plain, codes, scales, zeros }
    }

    fn packed(&self) -> PackedWeights<'_> {
        let scales = Row::BF16(&self.scales);
        PackedWeights::new(self.bits, self.shape, self.group_size, &self.codes, scales, &self.zeros)
            .expect("sizes that fit")
    }
}

const CASES: [(usize, [usize; 2], usize); 16] = [
    (4, [1, 128], 128),
    (4, [3, 32], 32),
    (4, [5, 96], 96),
    (4, [70, 896], 128),
    (4, [67, 320], 64),
    (4, [9, 288], 32),
    (4, [300, 512], 256),
    (6, [1, 32], 32),
    (6, [7, 96], 96),
    (6, [66, 896], 128),
    (6, [130, 256], 64),
    (8, [1, 32], 32),
    (8, [7, 96], 96),
    (8, [66, 896], 896),
    (8, [130, 256], 64),
    (4, [0, 128], 128),
];

#[test]
fn products_are_those_of_plain_weights() {
    for (bits, shape, group_size) in CASES {
        let example = Example::new(bits, shape, group_size);
        let [outputs, inputs] = shape;
        for queries in [0, 1, 2, 3, 4, 7, 9] {
            let mut rng = Rng(77);
            let x: Vec<f32> = (0..queries * inputs).map(|_| rng.float()).collect();
            for isa in Isa::available() {
                let mut found = vec![f32::NAN; queries * outputs];
                example.packed().multiply(isa, &x, &mut found).expect("a product");
                for q in 0..queries {
                    for o in 0..outputs {
                        let pair = |i: usize| f64::from(x[q * inputs + i]) * f64::from(example.plain[o * inputs + i]);
                        let exact: f64 = (0..inputs).map(pair).sum();
                        let scale: f64 = (0..inputs).map(|i| pair(i).abs()).sum();
                        // Codes are summed before the zero point is taken off: up to a code's range more than the difference itself.
                        let allowed = 1e-5 * scale * (1 << (bits - 4)) as f64 + 1e-6;
                        let difference = (f64::from(found[q * outputs + o]) - exact).abs();
                        assert!(difference <= allowed, "{isa} {bits} {shape:?} {group_size} {queries}: {difference}");
                    }
                }
            }
        }
    }
}

#[test]
fn decoded_rows_are_exact() {
    for (bits, shape, group_size) in CASES {
        let example = Example::new(bits, shape, group_size);
        let [outputs, inputs] = shape;
        for isa in Isa::available() {
            for first in [0, outputs / 2, outputs] {
                let mut found = vec![f32::NAN; (outputs - first) * inputs];
                example.packed().decode(isa, first, &mut found).expect("rows");
                assert_eq!(found, example.plain[first * inputs..], "{isa} {bits} {shape:?} {group_size}");
            }
        }
    }
}

#[test]
fn inputs_that_are_not_finite_stay_so_and_touch_no_other_row() {
    let example = Example::new(4, [40, 256], 128);
    let mut x = vec![0.5; 2 * 256];
    x[3] = f32::NAN;
    for isa in Isa::available() {
        let mut found = vec![0.0; 80];
        example.packed().multiply(isa, &x, &mut found).expect("a product");
        assert!(found[..40].iter().all(|x| x.is_nan()) && found[40..].iter().all(|x| x.is_finite()), "{isa}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let example = Example::new(4, [4, 128], 64);
    let made = |bits, shape, group_size| {
        PackedWeights::new(bits, shape, group_size, &example.codes, Row::BF16(&example.scales), &example.zeros)
    };
    let name = |error: Error| error.to_string().split(':').next().unwrap_or_default().to_string();
    for (bits, shape, group_size, argument) in [
        (3, [4, 128], 64, "bits"),
        (4, [4, 128], 48, "group_size"),
        (4, [4, 128], 96, "group_size"),
        (4, [4, 128], 0, "group_size"),
        (4, [5, 128], 64, "codes"),
        (6, [4, 128], 64, "codes"),
        (8, [4, 128], 64, "codes"),
        (4, [4, 128], 128, "scales"),
    ] {
        assert_eq!(name(made(bits, shape, group_size).expect_err("refused")), argument);
    }
    let packed = example.packed();
    assert_eq!(name(packed.multiply(Isa::best(), &[0.0; 100], &mut []).expect_err("refused")), "rows");
    assert_eq!(name(packed.multiply(Isa::best(), &[0.0; 128], &mut [0.0; 3]).expect_err("refused")), "output");
    assert_eq!(name(packed.decode(Isa::best(), 3, &mut [0.0; 256]).expect_err("refused")), "first");
}

//! Linear layers on packed weights: a few rows of inputs with every output, and outputs decoded for many rows.
//!
//! What it is: weights of 4, 6 or 8 bits in groups of one output's inputs, scale and zero point for each, `ŵ = scale · (code − zero)`; inputs
//! and sums in f32. What it is not: a checkpoint's layout (python/skvq/weights/packing.py), nor a product for many rows: there a decoded
//! piece and the matrix product of a library are faster.
//!
//! # Layout
//!
//! Codes `[outputs, row bytes]`. 8 bits: a byte for every input. 4 bits: 64 bytes for 128 inputs, the last ones padded; as sixteen
//! little-endian words, word l has input 16·j + l of the block in bits 4·j .. 4·j + 4. (That is byte 4·l + j / 2, its low half for even j.)
//! 6 bits: 12 bytes for sixteen inputs, 8 with the low four bits of each as a little-endian string and 4 with the two bits above.
//! Scales float32 or bfloat16 `[outputs, groups]`, zero points bytes `[outputs, groups]`.

use crate::backend::simd::products::{self, DIGIT_FACTORS, Product};
use crate::backend::simd::{Isa, LANES};
use crate::backend::threads;
use crate::error::{Error, Result};
use crate::tensor::Row;
use half::slice::HalfFloatSliceExt;

/// Below so many multiply-adds one thread is faster than two.
const SHARED: usize = 1 << 17;
/// Outputs that a thread takes at a time, at least.
const TAKEN: usize = 32;

/// Borrowed weights of one linear layer.
#[derive(Debug, Clone, Copy)]
pub struct PackedWeights<'a> {
    sizes: Product, // of one row of inputs
    codes: &'a [u8],
    scales: Row<'a>,
    zeros: &'a [u8],
}

fn expect_length(name: &str, axes: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::value(name, format!("{expected} elements, {axes}"), found))
}

/// A row of inputs as products with 4-bit codes want them.
fn with_digit_factors(row: &[f32]) -> impl Iterator<Item = f32> {
    row.chunks(LANES)
        .zip(DIGIT_FACTORS.iter().cycle())
        .flat_map(|(inputs, factor)| inputs.iter().map(move |x| x * factor))
}

impl<'a> PackedWeights<'a> {
    pub fn new(
        bits: usize,
        [outputs, inputs]: [usize; 2],
        group_size: usize,
        codes: &'a [u8],
        scales: Row<'a>,
        zeros: &'a [u8],
    ) -> Result<Self> {
        if !matches!(bits, 4 | 6 | 8) {
            return Err(Error::value("bits", "4, 6 or 8", bits));
        }
        if group_size == 0 || !group_size.is_multiple_of(32) || inputs == 0 || !inputs.is_multiple_of(group_size) {
            let expected = format!("a multiple of 32 that divides the {inputs} inputs");
            return Err(Error::value("group_size", expected, group_size));
        }
        let sizes = Product { bits, queries: 1, rows: outputs, inputs, group_size };
        let found = match scales {
            Row::F32(scales) => scales.len(),
            Row::BF16(scales) => scales.len(),
            Row::F16(_) => return Err(Error::dtype("scales", "float32 or bfloat16", "float16")),
        };
        expect_length("codes", "[outputs, bytes of a row]", outputs * sizes.row_bytes(), codes.len())?;
        expect_length("scales", "[outputs, groups]", outputs * sizes.groups(), found)?;
        expect_length("zeros", "[outputs, groups]", outputs * sizes.groups(), zeros.len())?;
        Ok(Self { sizes, codes, scales, zeros })
    }

    /// Bytes of the codes of `outputs` rows.
    pub const fn code_bytes(bits: usize, outputs: usize, inputs: usize) -> usize {
        outputs * Product { bits, queries: 1, rows: 1, inputs, group_size: inputs }.row_bytes()
    }

    pub const fn outputs(&self) -> usize {
        self.sizes.rows
    }

    /// The scales of some outputs.
    fn scales(&self, first: usize, count: usize) -> Vec<f32> {
        let groups = self.sizes.groups();
        let range = first * groups..(first + count) * groups;
        match self.scales {
            Row::F32(scales) => scales[range].to_vec(),
            Row::BF16(scales) => scales[range].iter().map(|scale| scale.to_f32()).collect(),
            Row::F16(scales) => scales[range].to_f32_vec(),
        }
    }

    fn codes(&self, first: usize, count: usize) -> &'a [u8] {
        let bytes = self.sizes.row_bytes();
        &self.codes[first * bytes..(first + count) * bytes]
    }

    /// `output[q][o] = Σ_i x[q][i] · ŵ[o][i]`; x `[queries, inputs]`, output `[queries, outputs]`.
    pub fn multiply(&self, isa: Isa, x: &[f32], output: &mut [f32]) -> Result<()> {
        let Product { inputs, group_size, rows: outputs, bits, .. } = self.sizes;
        let queries = x.len() / inputs;
        expect_length("rows", "whole rows of the inputs", queries * inputs, x.len())?;
        expect_length("output", "[rows, outputs]", queries * outputs, output.len())?;
        // What the zero points take away needs the inputs' sums alone.
        let sums: Vec<f32> = x.chunks_exact(group_size).map(|group| group.iter().sum()).collect();
        let turned: Vec<f32>;
        let x = if bits == 4 {
            turned = x.chunks_exact(inputs).flat_map(with_digit_factors).collect();
            &turned
        } else {
            x
        };
        let workers = if inputs * outputs * queries < SHARED { 1 } else { threads::num_threads() };
        let taken = if workers == 1 { outputs } else { outputs.div_ceil(4 * workers).max(TAKEN) };
        let parts = threads::share(outputs.div_ceil(taken.max(1)), workers, |part| {
            let first = part * taken;
            self.some_outputs(isa, first, taken.min(outputs - first), queries, x, &sums)
        });
        for (part, found) in parts.iter().enumerate() {
            for (o, products) in found.chunks_exact(queries.max(1)).enumerate() {
                for (q, product) in products.iter().enumerate() {
                    output[q * outputs + part * taken + o] = *product;
                }
            }
        }
        Ok(())
    }

    /// Products `[count, queries]` of the outputs from `first` on.
    fn some_outputs(&self, isa: Isa, first: usize, count: usize, queries: usize, x: &[f32], sums: &[f32]) -> Vec<f32> {
        let sizes = Product { queries, rows: count, ..self.sizes };
        let groups = sizes.groups();
        let mut scales = self.scales(first, count);
        let mut found = vec![0.0; count * queries];
        products::multiply(isa, &sizes, x, self.codes(first, count), &scales, &mut found);
        for (scale, zero) in scales.iter_mut().zip(&self.zeros[first * groups..]) {
            *scale *= f32::from(*zero);
        }
        for (products, offsets) in found.chunks_exact_mut(queries.max(1)).zip(scales.chunks_exact(groups)) {
            for (product, sums) in products.iter_mut().zip(sums.chunks_exact(groups)) {
                *product -= offsets.iter().zip(sums).map(|(offset, sum)| offset * sum).sum::<f32>();
            }
        }
        found
    }

    /// ŵ of the outputs from `first` on, as many as `output` has rows of `inputs`; exactly what scale and codes say.
    pub fn decode(&self, isa: Isa, first: usize, output: &mut [f32]) -> Result<()> {
        let (inputs, outputs, groups) = (self.sizes.inputs, self.sizes.rows, self.sizes.groups());
        let count = output.len() / inputs;
        expect_length("output", "whole rows of the inputs", count * inputs, output.len())?;
        if first + count > outputs {
            return Err(Error::value("first", format!("{count} rows below {outputs}"), first));
        }
        let one = Product { rows: 1, ..self.sizes };
        let taken = TAKEN * inputs;
        let workers = if output.len() < SHARED { 1 } else { threads::num_threads() };
        let pieces: Vec<_> = output.chunks_mut(taken).map(std::sync::Mutex::new).collect();
        threads::share(pieces.len(), workers, |piece| {
            let mut rows = pieces[piece].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for (row, output) in rows.chunks_exact_mut(inputs).enumerate() {
                let at = first + piece * TAKEN + row;
                let zeros = &self.zeros[at * groups..(at + 1) * groups];
                products::decode(isa, &one, self.codes(at, 1), &self.scales(at, 1), zeros, output);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;

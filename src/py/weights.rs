//! Python's products with packed weights: takes arguments, lets go of the interpreter. No algorithm lives here.

use pyo3::prelude::*;

use super::isa_named;
use crate::backend::weights::PackedWeights;
use crate::dlpack::ImportedTensor;
use crate::error::{Error, Result};
use crate::tensor::Row;

/// The tensors of one layer's weights, held while they are used.
struct Weights {
    codes: ImportedTensor,
    scales: ImportedTensor,
    zeros: ImportedTensor,
}

impl Weights {
    fn new(codes: &Bound<PyAny>, scales: &Bound<PyAny>, zeros: &Bound<PyAny>) -> Result<Self> {
        Ok(Self {
            codes: ImportedTensor::new(codes, "codes")?,
            scales: ImportedTensor::new(scales, "scales")?,
            zeros: ImportedTensor::new(zeros, "zeros")?,
        })
    }

    fn view(&self, bits: usize, inputs: usize) -> Result<PackedWeights<'_>> {
        let (codes, [outputs, row_bytes]) = self.codes.bytes2()?;
        let (scales, shape) = self.scales.floats2()?;
        let (zeros, of_zeros) = self.zeros.bytes2()?;
        let as_found = |shape: [usize; 2]| shape.map(|size| size as i64);
        if shape[0] != outputs || shape[1] == 0 || !inputs.is_multiple_of(shape[1]) {
            let expected = format!("[{outputs}, groups of the {inputs} inputs]");
            return Err(Error::shape("scales", expected, &as_found(shape)));
        }
        if of_zeros != shape {
            return Err(Error::shape("zeros", format!("{shape:?}, as scales"), &as_found(of_zeros)));
        }
        if matches!(bits, 4 | 6 | 8) && inputs > 0 && PackedWeights::code_bytes(bits, 1, inputs) != row_bytes {
            let expected = format!("[outputs, {}]", PackedWeights::code_bytes(bits, 1, inputs));
            return Err(Error::shape("codes", expected, &[outputs as i64, row_bytes as i64]));
        }
        PackedWeights::new(bits, [outputs, inputs], inputs / shape[1], codes, scales, zeros)
    }
}

/// Writes rows · ŵᵀ to `output`: rows float32 `[N, I]`, codes uint8 `[O, bytes]`, scales float32 or bfloat16 `[O, G]`, zeros uint8
/// `[O, G]`, output float32 `[N, O]`.
#[pyfunction]
#[pyo3(signature = (rows, codes, scales, zeros, output, *, bits, isa=None))]
#[allow(clippy::too_many_arguments)]
pub fn weights_multiply(
    py: Python,
    rows: &Bound<PyAny>,
    codes: &Bound<PyAny>,
    scales: &Bound<PyAny>,
    zeros: &Bound<PyAny>,
    output: &Bound<PyAny>,
    bits: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let isa = isa_named(isa)?;
    let weights = Weights::new(codes, scales, zeros)?;
    let rows = ImportedTensor::new(rows, "rows")?;
    let mut output = ImportedTensor::new(output, "output")?;
    for input in [&rows, &weights.codes, &weights.scales, &weights.zeros] {
        output.expect_disjoint(input)?;
    }
    let (x, [count, inputs]) = rows.floats2()?;
    let Row::F32(x) = x else {
        return Err(Error::dtype("rows", "float32", "a half precision").into());
    };
    let packed = weights.view(bits, inputs)?;
    let (found, shape) = output.floats2_mut()?;
    if shape != [count, packed.outputs()] {
        let expected = format!("[{count}, {}]", packed.outputs());
        return Err(Error::shape("output", expected, &shape.map(|size| size as i64)).into());
    }
    py.detach(|| packed.multiply(isa, x, found))?;
    Ok(())
}

/// Writes ŵ of the outputs from `first` on to `output` float32 `[n, I]`; the other tensors as in `weights_multiply`.
#[pyfunction]
#[pyo3(signature = (codes, scales, zeros, output, *, bits, first=0, isa=None))]
#[allow(clippy::too_many_arguments)]
pub fn weights_decode(
    py: Python,
    codes: &Bound<PyAny>,
    scales: &Bound<PyAny>,
    zeros: &Bound<PyAny>,
    output: &Bound<PyAny>,
    bits: usize,
    first: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let isa = isa_named(isa)?;
    let weights = Weights::new(codes, scales, zeros)?;
    let mut output = ImportedTensor::new(output, "output")?;
    for input in [&weights.codes, &weights.scales, &weights.zeros] {
        output.expect_disjoint(input)?;
    }
    let (found, [_, inputs]) = output.floats2_mut()?;
    let packed = weights.view(bits, inputs)?;
    py.detach(|| packed.decode(isa, first, found))?;
    Ok(())
}

//! `skvq._native.testing`: the few functions that let `tests/test_dlpack.py` look through both doors of `dlpack.rs`.

use super::{ImportedTensor, OwnedTensor, dtype_name, owned};
use crate::{
    error::{Error, Result},
    tensor::Dtype,
};
use dlpark::python::ImportedDlpack;
use half::{bf16, f16};
use pyo3::{prelude::*, types::PyDict};

/// What an import sees: `pointer`, `shape`, `strides` (elements), `dtype`, `versioned`.
#[pyfunction]
pub fn inspect<'py>(py: Python<'py>, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    let tensor = ImportedTensor::new(tensor, "tensor")?;
    let seen = PyDict::new(py);
    seen.set_item("pointer", tensor.ptr.addr())?;
    seen.set_item("shape", &tensor.shape)?;
    seen.set_item("strides", &tensor.strides)?;
    seen.set_item("dtype", dtype_name(tensor.dtype))?;
    seen.set_item("versioned", matches!(tensor.owner, ImportedDlpack::Versioned(_)))?;
    Ok(seen)
}

/// How many Rust-owned buffers exist.
#[pyfunction]
pub fn live_buffers() -> usize {
    owned::live_buffers()
}

/// A Rust-owned tensor filled with `value`.
#[pyfunction]
pub fn make_tensor(shape: Vec<usize>, dtype: &str, value: f32) -> PyResult<OwnedTensor> {
    Ok(match Dtype::from_name(dtype)? {
        Dtype::F32 => OwnedTensor::build(&shape, |out: &mut [f32]| out.fill(value)),
        Dtype::F16 => OwnedTensor::build(&shape, |out: &mut [f16]| out.fill(f16::from_f32(value))),
        Dtype::BF16 => OwnedTensor::build(&shape, |out: &mut [bf16]| out.fill(bf16::from_f32(value))),
    })
}

/// Sum of a `[batch, head, token, channel]` tensor, with the interpreter released.
#[pyfunction]
pub fn sum_f64(py: Python<'_>, tensor: &Bound<'_, PyAny>) -> PyResult<f64> {
    let tensor = ImportedTensor::new(tensor, "tensor")?;
    let view = tensor.view4()?;
    Ok(py.detach(|| {
        let [batches, heads, tokens, width] = view.shape();
        let mut row = vec![0.0; width];
        let mut sum = 0.0;
        for i in 0..batches * heads * tokens {
            view.read_row_f32(i / (heads * tokens), i / tokens % heads, i % tokens, &mut row);
            sum += row.iter().map(|value| f64::from(*value)).sum::<f64>();
        }
        sum
    }))
}

/// Sum of the biases of a mask `[batch, head, query, token]`: 0 and -inf for a boolean one.
#[pyfunction]
pub fn sum_mask(mask: &Bound<'_, PyAny>) -> PyResult<f64> {
    let mask = ImportedTensor::new(mask, "mask")?;
    let view = mask.mask4()?;
    let [batches, heads, queries, tokens] = view.shape();
    let mut row = vec![0.0; tokens];
    let mut sum = 0.0;
    for i in 0..batches * heads * queries {
        view.read_bias(i / (heads * queries), i / queries % heads, i % queries, 0, &mut row);
        sum += row.iter().map(|value| f64::from(*value)).sum::<f64>();
    }
    Ok(sum)
}

/// Writes `value` everywhere in a `[batch, head, token, channel]` tensor; `apart_from` must not share its memory.
#[pyfunction]
#[pyo3(signature = (tensor, value, apart_from=None))]
pub fn fill(
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    value: f32,
    apart_from: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let mut tensor = ImportedTensor::new(tensor, "tensor")?;
    if let Some(other) = apart_from {
        tensor.expect_disjoint(&ImportedTensor::new(other, "apart_from")?)?;
    }
    let view = tensor.view_mut4()?;
    py.detach(|| {
        let row = vec![value; view.width()];
        for mut head in view.split_heads() {
            (0..head.tokens()).for_each(|token| head.write_row_f32(0, 0, token, &row));
        }
    });
    Ok(())
}

/// Imports a tensor and drops it on a thread that the interpreter does not know.
#[pyfunction]
pub fn drop_elsewhere(py: Python<'_>, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    let tensor = ImportedTensor::new(tensor, "tensor")?;
    let dropped: Result<()> = py.detach(|| {
        let thread = std::thread::spawn(move || drop(tensor));
        thread.join().map_err(|_| Error::dlpack("tensor", "its deleter panicked"))
    });
    Ok(dropped?)
}

//! The Python module `skvq._native`: takes arguments, lets go of the interpreter, maps errors once. No algorithm lives here.

mod codec;
mod cuda;
mod cuda_layer;
mod cuda_tensors;
mod weights;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use self::codec::PyCodec;
use crate::backend::attend::{Attention, attend};
use crate::backend::noise::score_noise;
use crate::backend::simd::Isa;
use crate::backend::threads;
use crate::codec::Codec;
use crate::dlpack::{ImportedTensor, OwnedTensor};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::layer::{self, LayerSpec, NonFinite};
use crate::tensor::Dtype;

create_exception!(skvq._native, SkvqError, PyValueError, "An argument that skvq refuses; nothing was changed.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        SkvqError::new_err(error.to_string())
    }
}

fn isa_named(name: Option<&str>) -> Result<Isa> {
    match name {
        None => Ok(Isa::best()),
        Some(name) => Isa::from_name(name).ok_or_else(|| {
            let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
            Error::value("isa", format!("one of {names:?}"), name)
        }),
    }
}

/// One attention layer's store: sinks | packed past | window for every (sequence, kv head).
#[pyclass(name = "Layer", module = "skvq._native")]
pub struct PyLayer {
    layer: layer::Layer,
    /// Of the last `attend`, without the exchange of tensors.
    attend_nanoseconds: AtomicU64,
}

impl From<layer::Layer> for PyLayer {
    fn from(layer: layer::Layer) -> Self {
        Self { layer, attend_nanoseconds: AtomicU64::new(0) }
    }
}

/// A raw codec in the layer's own dtype; any other unchanged.
fn in_dtype(codec: &Codec, dtype: Dtype) -> Codec {
    let mut codec = codec.clone();
    if codec.is_raw() {
        codec.layout.format = Format::Raw(dtype);
        codec.layout.code_bytes = codec.layout.format.code_bytes(codec.layout.head_dim);
    }
    codec
}

#[pymethods]
impl PyLayer {
    #[new]
    #[pyo3(signature = (*, num_key_value_heads, keys, values, sinks, window, dtype, nonfinite="raise", isa=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        num_key_value_heads: usize,
        keys: &PyCodec,
        values: &PyCodec,
        sinks: usize,
        window: usize,
        dtype: &str,
        nonfinite: &str,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let dtype = Dtype::from_name(dtype)?;
        let spec = LayerSpec {
            num_key_value_heads,
            keys: in_dtype(&keys.codec, dtype),
            values: in_dtype(&values.codec, dtype),
            sinks,
            window,
            dtype,
            nonfinite: NonFinite::from_name(nonfinite)?,
            isa: isa_named(isa)?,
        };
        Ok(layer::Layer::new(spec)?.into())
    }

    /// Stores new tokens: keys `[B, Hkv, n, Dk]`, values `[B, Hkv, n, Dv]` in the layer's dtype; query `[B, Hq, L, Dk]`, where it is
    /// known, of the last L of them. Nothing changes on an error.
    #[pyo3(signature = (keys, values, query=None))]
    fn append(
        &mut self,
        py: Python,
        keys: &Bound<PyAny>,
        values: &Bound<PyAny>,
        query: Option<Bound<PyAny>>,
    ) -> PyResult<()> {
        let keys = ImportedTensor::new(keys, "keys")?;
        let values = ImportedTensor::new(values, "values")?;
        let query = query.map(|query| ImportedTensor::new(&query, "query")).transpose()?;
        let (key_rows, value_rows) = (keys.view4()?, values.view4()?);
        let query_rows = query.as_ref().map(ImportedTensor::view4).transpose()?;
        py.detach(|| self.layer.append_queried(key_rows, value_rows, query_rows))?;
        Ok(())
    }

    /// Refuses what `append` would refuse, and stores nothing.
    fn check(&self, py: Python, keys: &Bound<PyAny>, values: &Bound<PyAny>) -> PyResult<()> {
        let keys = ImportedTensor::new(keys, "keys")?;
        let values = ImportedTensor::new(values, "values")?;
        let (key_rows, value_rows) = (keys.view4()?, values.view4()?);
        py.detach(|| self.layer.check(&key_rows, &value_rows))?;
        Ok(())
    }

    /// Takes note of the queries `[B, Hq, L, Dk]` of the last L tokens.
    fn observe_queries(&mut self, py: Python, query: &Bound<PyAny>) -> PyResult<()> {
        let query = ImportedTensor::new(query, "query")?;
        let view = query.view4()?;
        py.detach(|| self.layer.observe_queries(&view))?;
        Ok(())
    }

    /// What queries have put on the scales of a head's channels, float32 `[Dk]`; None before it is fixed.
    fn query_factors(&self, batch: usize, head: usize) -> PyResult<Option<OwnedTensor>> {
        let (rows, heads) = (self.layer.batch_size(), self.layer.spec().num_key_value_heads);
        if batch >= rows || head >= heads {
            let expected = format!("a row of the batch below {rows} and a head below {heads}");
            return Err(Error::value("batch and head", expected, format!("{batch} and {head}")).into());
        }
        let factors = self.layer.query_factors(batch, head);
        Ok(factors.map(|factors| {
            OwnedTensor::build(&[factors.len()], |out: &mut [f32]| {
                out.iter_mut().zip(factors).for_each(|(out, factor)| *out = factor.to_f32());
            })
        }))
    }

    /// Whether queries still have a say in how keys are packed.
    #[getter]
    fn wants_queries(&self) -> bool {
        self.layer.wants_queries()
    }

    /// The mean variance of the error that packing made in the scores scale · q·kᵀ of packed keys, as the codec expects it; the last
    /// query of `[B, Hq, L, Dk]` counts.
    fn score_noise(&self, py: Python, query: &Bound<PyAny>, scale: f32) -> PyResult<f32> {
        let query = ImportedTensor::new(query, "query")?;
        let view = query.view4()?;
        Ok(py.detach(|| score_noise(&self.layer, &view, scale))?)
    }

    /// Writes softmax(scale · q·kᵀ + mask) · v over all regions to `output` `[B, Hq, L, Dv]`; query `[B, Hq, L, Dk]`.
    #[pyo3(signature = (query, output, *, scale, mask=None, causal=false, softcap=None, sink_logits=None, fresh_keys=None, fresh_values=None))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python,
        query: &Bound<PyAny>,
        output: &Bound<PyAny>,
        scale: f32,
        mask: Option<Bound<PyAny>>,
        causal: bool,
        softcap: Option<f32>,
        sink_logits: Option<Bound<PyAny>>,
        fresh_keys: Option<Bound<PyAny>>,
        fresh_values: Option<Bound<PyAny>>,
    ) -> PyResult<()> {
        let import =
            |tensor: Option<Bound<PyAny>>, name| tensor.map(|tensor| ImportedTensor::new(&tensor, name)).transpose();
        let query = ImportedTensor::new(query, "query")?;
        let mut output = ImportedTensor::new(output, "output")?;
        let mask = import(mask, "mask")?;
        let sink_logits = import(sink_logits, "sink_logits")?.map(|tensor| tensor.vec_f32()).transpose()?;
        let fresh_keys = import(fresh_keys, "fresh_keys")?;
        let fresh_values = import(fresh_values, "fresh_values")?;
        let fresh = match (&fresh_keys, &fresh_values) {
            (Some(keys), Some(values)) => Some((keys.view4()?, values.view4()?)),
            (None, None) => None,
            _ => return Err(Error::value("fresh_keys and fresh_values", "both or neither", "one of them").into()),
        };
        for input in [Some(&query), mask.as_ref(), fresh_keys.as_ref(), fresh_values.as_ref()].into_iter().flatten() {
            output.expect_disjoint(input)?;
        }
        let call = Attention {
            query: query.view4()?,
            scale,
            mask: mask.as_ref().map(ImportedTensor::mask4).transpose()?,
            causal,
            softcap,
            sink_logits: sink_logits.as_deref(),
            fresh,
        };
        let output = output.view_mut4()?;
        if output.dtype() != call.query.dtype() {
            return Err(Error::dtype("output", call.query.dtype().name(), output.dtype().name()).into());
        }
        let start = Instant::now();
        py.detach(|| attend(&self.layer, &call, output))?;
        self.attend_nanoseconds.store(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Writes all keys, decoded, to `output` `[B, Hkv, T, Dk]` in the layer's dtype.
    fn decode_keys(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, output, false)
    }

    /// Writes all values, decoded, to `output` `[B, Hkv, T, Dv]` in the layer's dtype.
    fn decode_values(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, output, true)
    }

    /// Tokens of padding in front of each sequence of the batch that the first append will bring.
    fn set_padding(&mut self, padding: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.set_padding(padding)?)
    }

    /// Forgets the tokens from `length` on; rows that were packed stay packed.
    fn crop(&mut self, length: usize) -> PyResult<()> {
        Ok(self.layer.crop(length)?)
    }

    /// New row i of the batch is the old row indices[i]; nothing is copied until it is written.
    fn gather(&mut self, indices: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.gather(&indices)?)
    }

    fn reset(&mut self) {
        self.layer.reset();
    }

    /// An independent layer that shares all pages until one of them is written.
    #[pyo3(name = "clone")]
    fn duplicate(&self) -> Self {
        self.layer.clone().into()
    }

    #[getter]
    fn length(&self) -> usize {
        self.layer.regions().total()
    }

    #[getter]
    fn batch_size(&self) -> usize {
        self.layer.batch_size()
    }

    #[getter]
    fn num_key_value_heads(&self) -> usize {
        self.layer.spec().num_key_value_heads
    }

    /// Bytes of everything held; what sequences share counts once.
    #[getter]
    fn nbytes(&self) -> usize {
        self.layer.nbytes()
    }

    #[getter]
    fn bits_per_element(&self) -> f64 {
        self.layer.bits_per_element()
    }

    #[getter]
    fn sink_tokens(&self) -> usize {
        self.layer.regions().sinks
    }

    #[getter]
    fn packed_tokens(&self) -> usize {
        self.layer.regions().packed
    }

    /// Tokens in full precision at the end: the window, and rows that wait for the last row of their block.
    #[getter]
    fn window_tokens(&self) -> usize {
        self.layer.regions().window
    }

    #[getter]
    fn isa(&self) -> &'static str {
        self.layer.spec().isa.name()
    }

    /// Seconds that the arithmetic of the last `attend` took; 0 before the first.
    #[getter]
    fn attend_seconds(&self) -> f64 {
        self.attend_nanoseconds.load(Ordering::Relaxed) as f64 * 1e-9
    }

    fn __repr__(&self) -> String {
        let regions = self.layer.regions();
        format!(
            "Layer(batch_size={}, num_key_value_heads={}, tokens={} sinks + {} packed + {} window, nbytes={})",
            self.layer.batch_size(),
            self.layer.spec().num_key_value_heads,
            regions.sinks,
            regions.packed,
            regions.window,
            self.layer.nbytes(),
        )
    }
}

impl PyLayer {
    fn decode(&self, py: Python, output: &Bound<PyAny>, values: bool) -> PyResult<()> {
        let mut output = ImportedTensor::new(output, "output")?;
        let output = output.view_mut4()?;
        py.detach(|| self.layer.decode(values, output))?;
        Ok(())
    }
}

/// Instruction sets of this processor that skvq has code for, best first.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// Threads that share the work of one call.
#[pyfunction]
fn num_threads() -> usize {
    threads::num_threads()
}

/// Sets `num_threads`; at least 1.
#[pyfunction]
fn set_num_threads(n: usize) -> PyResult<()> {
    Ok(threads::set_num_threads(n)?)
}

#[pymodule]
pub mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::codec::PyCodec;
    #[pymodule_export]
    use super::cuda::{PyCompiledKernel, cuda_compile, cuda_compile_many, cuda_nvrtc, cuda_status};
    #[pymodule_export]
    use super::cuda_layer::PyCudaLayer;
    #[pymodule_export]
    use super::weights::{weights_decode, weights_multiply};
    #[pymodule_export]
    use super::{PyLayer, SkvqError, available_isas, num_threads, set_num_threads};
    #[pymodule_export]
    use crate::dlpack::OwnedTensor;

    #[allow(non_upper_case_globals)]
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Probes of the `DLPack` exchange and of CUDA, for the tests.
    #[pymodule]
    mod testing {
        #[pymodule_export]
        use super::super::cuda::testing::{cuda_copy, cuda_fill, cuda_launch, cuda_sources};
        #[pymodule_export]
        use super::super::cuda_layer::cuda_parameters;
        #[pymodule_export]
        use crate::dlpack::testing::{drop_elsewhere, fill, inspect, live_buffers, make_tensor, sum_f64, sum_mask};
    }
}

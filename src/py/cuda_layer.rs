//! The Python class `CudaLayer`: takes tensors of a device by address, lets go of the interpreter. No algorithm lives here.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::codec::PyCodec;
use super::cuda_tensors::{Place, TorchMemory};
use crate::backend::simd::Isa;
use crate::cuda::device::Device;
use crate::cuda::pages::Side;
use crate::cuda::store::{AttendCall, CudaLayer};
use crate::dlpack::OwnedTensor;
use crate::error::Error;
use crate::layer::{LayerSpec, NonFinite};
use crate::tensor::Dtype;

/// What a call of attention borrows at most, unless one token's queries need more.
const WORKSPACE_BYTES: usize = 256 << 20;

/// One attention layer's store on a GPU. Every call puts its work on torch's current stream and returns.
#[pyclass(name = "CudaLayer", module = "skvq._native")]
pub struct PyCudaLayer {
    layer: CudaLayer,
    place: Place,
    /// Keys and values of a token that waits for its attention, or waited.
    waiting: Option<[Py<PyAny>; 2]>,
}

#[pymethods]
impl PyCudaLayer {
    #[new]
    #[pyo3(signature = (*, num_key_value_heads, keys, values, sinks, window, dtype, allocate, nvrtc, stream, device=0,
        nonfinite="propagate", cache=None, host_memory=false, workspace_bytes=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python,
        num_key_value_heads: usize,
        keys: &PyCodec,
        values: &PyCodec,
        sinks: usize,
        window: usize,
        dtype: &str,
        allocate: Py<PyAny>,
        nvrtc: &str,
        stream: Py<PyAny>,
        device: usize,
        nonfinite: &str,
        cache: Option<PathBuf>,
        host_memory: bool,
        workspace_bytes: Option<usize>,
    ) -> PyResult<Self> {
        let dtype = Dtype::from_name(dtype)?;
        let spec = LayerSpec {
            num_key_value_heads,
            keys: super::in_dtype(&keys.codec, dtype),
            values: super::in_dtype(&values.codec, dtype),
            sinks,
            window,
            dtype,
            nonfinite: NonFinite::from_name(nonfinite)?,
            isa: Isa::best(),
        };
        let memory = Arc::new(TorchMemory { allocate });
        let place = Place { device, host_memory, stream };
        let workspace_bytes = workspace_bytes.unwrap_or(WORKSPACE_BYTES);
        let stream = place.stream(py)?;
        let layer = py.detach(|| {
            let compiler = super::cuda::compiler(nvrtc, cache)?;
            // SAFETY: the caller promises streams of the device, and `allocate` tensors on it.
            unsafe { CudaLayer::new(spec, Device::get(device)?, compiler, memory, workspace_bytes, stream) }
        })?;
        Ok(Self { layer, place, waiting: None })
    }

    /// Stores new tokens: keys `[B, Hkv, n, Dk]`, values `[B, Hkv, n, Dv]` in the layer's dtype; query `[B, Hq, L, Dk]`, where it is
    /// known, of the last L of them. Nothing changes on an error. The token of a decode step may wait for its attention, which stores it then,
    /// or for the next call: its tensors must not be written until then.
    #[pyo3(signature = (keys, values, query=None))]
    fn append(
        &mut self,
        py: Python,
        keys: &Bound<PyAny>,
        values: &Bound<PyAny>,
        query: Option<Bound<PyAny>>,
    ) -> PyResult<()> {
        let tensors = [keys, values].map(|tensor| tensor.clone().unbind());
        let (keys, values) = (self.place.tensor4(keys, "keys")?, self.place.tensor4(values, "values")?);
        let query = query.map(|query| self.place.tensor4(&query, "query")).transpose()?;
        let stream = self.place.stream(py)?;
        // SAFETY: tensors of this device, which torch keeps until the stream is past the call; the constructor's caller promised the stream.
        py.detach(|| unsafe { self.layer.append(&keys, &values, query.as_ref(), stream) })?;
        // Those of the token before have been used by now, at the latest.
        self.waiting = self.layer.waits().then_some(tensors);
        Ok(())
    }

    /// Refuses what `append` would refuse, and stores nothing.
    fn check(&self, keys: &Bound<PyAny>, values: &Bound<PyAny>) -> PyResult<()> {
        Ok(self.layer.check(&self.place.tensor4(keys, "keys")?, &self.place.tensor4(values, "values")?)?)
    }

    /// Takes note of the queries `[B, Hq, L, Dk]` of the last L tokens.
    fn observe_queries(&mut self, py: Python, query: &Bound<PyAny>) -> PyResult<()> {
        let (query, stream) = (self.place.tensor4(query, "query")?, self.place.stream(py)?);
        // SAFETY: as in `append`.
        Ok(py.detach(|| unsafe { self.layer.observe_queries(&query, stream) })?)
    }

    /// What queries have put on the scales of a head's channels, float32 `[Dk]`; None before it is fixed. Waits for the stream.
    fn query_factors(&self, py: Python, batch: usize, head: usize) -> PyResult<Option<OwnedTensor>> {
        let stream = self.place.stream(py)?;
        // SAFETY: as in `crop`.
        let factors = py.detach(|| unsafe { self.layer.query_factors(batch, head, stream) })?;
        Ok(factors.map(|factors| OwnedTensor::build(&[factors.len()], |out: &mut [f32]| out.copy_from_slice(&factors))))
    }

    /// The mean variance of the error that packing made in the scores scale · q·kᵀ of packed keys, as the codec expects it; the last
    /// query of `[B, Hq, L, Dk]` counts. Waits for the stream.
    fn score_noise(&self, py: Python, query: &Bound<PyAny>, scale: f32) -> PyResult<f32> {
        let (query, stream) = (self.place.tensor4(query, "query")?, self.place.stream(py)?);
        // SAFETY: as in `append`.
        Ok(py.detach(|| unsafe { self.layer.score_noise(&query, scale, stream) })?)
    }

    /// Whether queries still have a say in how keys are packed.
    #[getter]
    fn wants_queries(&self) -> bool {
        self.layer.wants_queries()
    }

    /// Writes softmax(scale · q·kᵀ + mask) · v over all regions to `output` `[B, Hq, L, Dv]`; query `[B, Hq, L, Dk]`.
    #[pyo3(signature = (query, output, *, scale, mask=None, causal=false, softcap=None, sink_logits=None,
        fresh_keys=None, fresh_values=None))]
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
        let place = &self.place;
        let query = place.tensor4(query, "query")?;
        let sink_logits = sink_logits.map(|logits| place.vector(&logits, "sink_logits", query.shape[1])).transpose()?;
        let fresh = match (fresh_keys, fresh_values) {
            (Some(keys), Some(values)) => {
                Some([place.tensor4(&keys, "fresh_keys")?, place.tensor4(&values, "fresh_values")?])
            }
            (None, None) => None,
            _ => return Err(Error::value("fresh_keys and fresh_values", "both or neither", "one of them").into()),
        };
        let call = AttendCall {
            query,
            output: place.tensor4(output, "output")?,
            scale,
            mask: mask.map(|mask| place.mask4(&mask)).transpose()?,
            causal,
            softcap: softcap.unwrap_or(0.0),
            sink_logits: sink_logits.unwrap_or(0),
            fresh,
        };
        let stream = place.stream(py)?;
        // SAFETY: as in `append`.
        py.detach(|| unsafe { self.layer.attend(&call, stream) })?;
        Ok(())
    }

    /// Writes all keys, decoded, to `output` `[B, Hkv, T, Dk]` in the layer's dtype.
    fn decode_keys(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, Side::Keys, output)
    }

    /// Writes all values, decoded, to `output` `[B, Hkv, T, Dv]` in the layer's dtype.
    fn decode_values(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, Side::Values, output)
    }

    /// Tokens of padding in front of each sequence of the batch that the first append will bring.
    fn set_padding(&mut self, padding: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.set_padding(padding)?)
    }

    /// Forgets the tokens from `length` on; rows that were packed stay packed.
    fn crop(&mut self, py: Python, length: usize) -> PyResult<()> {
        let stream = self.place.stream(py)?;
        // SAFETY: the constructor's caller promised the stream.
        Ok(py.detach(|| unsafe { self.layer.crop(length, stream) })?)
    }

    /// New row i of the batch is the old row indices[i]; pages are not copied until they are written.
    fn gather(&mut self, py: Python, indices: Vec<usize>) -> PyResult<()> {
        let stream = self.place.stream(py)?;
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.gather(&indices, stream) })?)
    }

    fn reset(&mut self) -> PyResult<()> {
        Ok(self.layer.reset()?)
    }

    /// Takes pages, and statistics of blocks, for `tokens` tokens in all, so that a step of one token can be captured.
    fn reserve(&mut self, py: Python, tokens: usize) -> PyResult<()> {
        let stream = self.place.stream(py)?;
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.reserve_tokens(tokens, stream) })?)
    }

    /// Tokens that there are pages for; None in a layer that grows as it needs.
    #[getter]
    fn capacity(&self) -> Option<usize> {
        self.layer.capacity()
    }

    /// What follows, one append of one token and its attention, is recorded and does not run.
    fn begin_capture(&mut self, py: Python) -> PyResult<()> {
        let stream = self.place.stream(py)?;
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.begin_capture(stream) })?)
    }

    /// The layer holds what it held before the capture.
    fn end_capture(&mut self) -> PyResult<()> {
        Ok(self.layer.end_capture()?)
    }

    /// The captured step has run so many times since this was last called.
    fn replayed(&mut self, steps: usize) -> PyResult<()> {
        Ok(self.layer.replayed(steps)?)
    }

    /// No captured step will run any more.
    fn release_capture(&mut self) -> PyResult<()> {
        Ok(self.layer.release_capture()?)
    }

    /// An independent layer that shares all pages until one of them is written.
    #[pyo3(name = "clone")]
    fn duplicate(&self, py: Python) -> PyResult<Self> {
        let Place { device, host_memory, stream } = &self.place;
        let place = Place { device: *device, host_memory: *host_memory, stream: stream.clone_ref(py) };
        let stream = place.stream(py)?;
        // SAFETY: as in `crop`.
        let layer = py.detach(|| unsafe { self.layer.duplicate(stream) })?;
        Ok(Self { layer, place, waiting: None })
    }

    /// Rows of keys and of values that were not finite; waits for the stream.
    fn nonfinite_rows(&self, py: Python) -> PyResult<usize> {
        let stream = self.place.stream(py)?;
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.nonfinite_rows(stream) })?)
    }

    #[getter]
    fn one_launch(&self) -> Option<bool> {
        self.layer.one_launch()
    }

    #[setter]
    fn set_one_launch(&mut self, one_launch: Option<bool>) {
        self.layer.set_one_launch(one_launch);
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

    /// Bytes of device memory held: pages with those that are free, sinks, window, tables, statistics.
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

    fn __repr__(&self) -> String {
        let regions = self.layer.regions();
        format!(
            "CudaLayer(device={}, batch_size={}, num_key_value_heads={}, tokens={} sinks + {} packed + {} window, nbytes={})",
            self.place.device,
            self.layer.batch_size(),
            self.layer.spec().num_key_value_heads,
            regions.sinks,
            regions.packed,
            regions.window,
            self.layer.nbytes(),
        )
    }
}

impl PyCudaLayer {
    fn decode(&self, py: Python, side: Side, output: &Bound<PyAny>) -> PyResult<()> {
        let output = self.place.tensor4(output, "output")?;
        let stream = self.place.stream(py)?;
        // SAFETY: as in `append`.
        py.detach(|| unsafe { self.layer.decode(side, &output, stream) })?;
        Ok(())
    }
}

type Fields = Vec<(&'static str, usize)>;

/// Name, size, and names and offsets of the fields of every struct that kernels take, for the tests.
#[pyfunction]
pub fn cuda_parameters() -> Vec<(&'static str, usize, Fields)> {
    crate::cuda::params::layouts().into_iter().map(|layout| (layout.name, layout.size, layout.fields)).collect()
}

//! The Python class `CudaLayer`: takes tensors of a device by address, lets go of the interpreter. No algorithm lives here.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;

use super::codec::PyCodec;
use crate::backend::simd::Isa;
use crate::cuda::device::Device;
use crate::cuda::launch::Stream;
use crate::cuda::memory::{Block, Memory};
use crate::cuda::pages::Side;
use crate::cuda::store::{AttendCall, CudaLayer, DeviceMask, DeviceTensor};
use crate::error::{Error, Result};
use crate::layer::{LayerSpec, NonFinite};
use crate::tensor::{Dtype, MaskKind};

/// Memory from a Python function `allocate(bytes)`, which returns a tensor: that of torch's caching allocator.
struct TorchMemory {
    allocate: Py<PyAny>,
}

impl Memory for TorchMemory {
    fn allocate(&self, bytes: usize) -> Result<Block> {
        let lent = Python::attach(|py| -> PyResult<(u64, Py<PyAny>)> {
            let tensor = self.allocate.bind(py).call1((bytes,))?;
            let address = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
            Ok((address, tensor.unbind()))
        });
        let (address, tensor) = lent.map_err(|error| Error::state("allocate", format!("{bytes} bytes"), error))?;
        Block::new(address, bytes, Box::new(tensor))
    }
}

/// One attention layer's store on a GPU. Every call puts its work on a stream and returns.
#[pyclass(name = "CudaLayer", module = "skvq._native")]
pub struct PyCudaLayer {
    layer: CudaLayer,
    device: usize,
    host_memory: bool,
}

/// Address, shape, strides and dtype's name of a torch tensor.
struct Described {
    address: u64,
    shape: Vec<usize>,
    strides: Vec<i64>,
    dtype: String,
}

impl PyCudaLayer {
    fn describe(&self, tensor: &Bound<PyAny>, name: &str) -> Result<Described> {
        let py = tensor.py();
        let read = || -> PyResult<(i64, Described)> {
            let device = tensor.call_method0(intern!(py, "get_device"))?.extract()?;
            let described = Described {
                address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
                shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
                strides: tensor.call_method0(intern!(py, "stride"))?.extract()?,
                dtype: tensor.getattr(intern!(py, "dtype"))?.str()?.to_string(),
            };
            Ok((device, described))
        };
        let (device, mut described) = read().map_err(|error| Error::value(name, "a torch tensor", error))?;
        let here = if self.host_memory { -1 } else { self.device as i64 };
        if device != here {
            let place = |index: i64| if index < 0 { "cpu".to_string() } else { format!("cuda:{index}") };
            return Err(Error::Device { name: name.into(), expected: place(here), found: place(device) });
        }
        if let Some(short) = described.dtype.strip_prefix("torch.") {
            described.dtype = short.to_string();
        }
        Ok(described)
    }

    fn tensor4(&self, tensor: &Bound<PyAny>, name: &str) -> Result<DeviceTensor> {
        let Described { address, shape, strides, dtype } = self.describe(tensor, name)?;
        let (shape, strides) = four(name, &shape, &strides, "[batch, heads, tokens, channels]")?;
        Ok(DeviceTensor {
            address,
            shape,
            strides,
            dtype: Dtype::from_name(&dtype).map_err(|_| not_a_float(name, &dtype))?,
        })
    }

    fn mask4(&self, tensor: &Bound<PyAny>) -> Result<DeviceMask> {
        let Described { address, shape, strides, dtype } = self.describe(tensor, "mask")?;
        let (shape, strides) = four("mask", &shape, &strides, "[batch or 1, heads or 1, queries or 1, tokens]")?;
        let kind = if dtype == "bool" {
            MaskKind::Visible
        } else {
            MaskKind::Additive(Dtype::from_name(&dtype).map_err(|_| not_a_float("mask", &dtype))?)
        };
        Ok(DeviceMask { address, shape, strides, kind })
    }

    /// The address of a compact float32 vector.
    fn vector(&self, tensor: &Bound<PyAny>, name: &str, length: usize) -> Result<u64> {
        let Described { address, shape, strides, dtype } = self.describe(tensor, name)?;
        if dtype != "float32" {
            return Err(Error::dtype(name, "float32", dtype));
        }
        if shape != [length] || (strides != [1] && length > 1) {
            let found: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
            return Err(Error::shape(name, format!("[{length}], compact"), &found));
        }
        Ok(address)
    }
}

fn not_a_float(name: &str, dtype: &str) -> Error {
    Error::dtype(name, "float32, float16 or bfloat16", dtype)
}

fn four(name: &str, shape: &[usize], strides: &[i64], axes: &str) -> Result<([usize; 4], [i64; 4])> {
    match (shape.try_into(), strides.try_into()) {
        (Ok(shape), Ok(strides)) => Ok((shape, strides)),
        _ => Err(Error::shape(name, axes, &shape.iter().map(|size| *size as i64).collect::<Vec<_>>())),
    }
}

#[pymethods]
impl PyCudaLayer {
    #[new]
    #[pyo3(signature = (*, num_key_value_heads, keys, values, sinks, window, dtype, allocate, nvrtc, stream, device=0,
        nonfinite="propagate", cache=None, host_memory=false))]
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
        stream: usize,
        device: usize,
        nonfinite: &str,
        cache: Option<PathBuf>,
        host_memory: bool,
    ) -> PyResult<Self> {
        let spec = LayerSpec {
            num_key_value_heads,
            keys: keys.codec.clone(),
            values: values.codec.clone(),
            sinks,
            window,
            dtype: Dtype::from_name(dtype)?,
            nonfinite: NonFinite::from_name(nonfinite)?,
            isa: Isa::best(),
        };
        let memory = Arc::new(TorchMemory { allocate });
        let layer = py.detach(|| {
            let compiler = super::cuda::compiler(nvrtc, cache)?;
            // SAFETY: the caller promises a stream of the device, and `allocate` tensors on it.
            unsafe { CudaLayer::new(spec, Device::get(device)?, compiler, memory, Stream(stream)) }
        })?;
        Ok(Self { layer, device, host_memory })
    }

    /// Stores new tokens: keys `[B, Hkv, n, Dk]`, values `[B, Hkv, n, Dv]` in the layer's dtype.
    #[pyo3(signature = (keys, values, *, stream))]
    fn append(&mut self, py: Python, keys: &Bound<PyAny>, values: &Bound<PyAny>, stream: usize) -> PyResult<()> {
        let (keys, values) = (self.tensor4(keys, "keys")?, self.tensor4(values, "values")?);
        // SAFETY: tensors of this device, which torch keeps until the stream is past the call; the caller promises the stream.
        py.detach(|| unsafe { self.layer.append(&keys, &values, Stream(stream)) })?;
        Ok(())
    }

    /// Refuses what `append` would refuse, and stores nothing.
    fn check(&self, keys: &Bound<PyAny>, values: &Bound<PyAny>) -> PyResult<()> {
        Ok(self.layer.check(&self.tensor4(keys, "keys")?, &self.tensor4(values, "values")?)?)
    }

    /// Bytes of workspace that `attend` needs for L queries of so many heads, until the next append.
    fn workspace_bytes(&self, query_heads: usize, length: usize) -> PyResult<usize> {
        Ok(self.layer.workspace_bytes(query_heads, length)?)
    }

    /// Writes softmax(scale · q·kᵀ + mask) · v over all regions to `output` `[B, Hq, L, Dv]`; query `[B, Hq, L, Dk]`.
    #[pyo3(signature = (query, output, *, workspace, scale, stream, mask=None, causal=false, softcap=None, sink_logits=None))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python,
        query: &Bound<PyAny>,
        output: &Bound<PyAny>,
        workspace: &Bound<PyAny>,
        scale: f32,
        stream: usize,
        mask: Option<Bound<PyAny>>,
        causal: bool,
        softcap: Option<f32>,
        sink_logits: Option<Bound<PyAny>>,
    ) -> PyResult<()> {
        let query = self.tensor4(query, "query")?;
        let Described { address, shape, dtype, .. } = self.describe(workspace, "workspace")?;
        if dtype != "uint8" || shape.len() != 1 {
            return Err(Error::dtype("workspace", "uint8 of one axis", dtype).into());
        }
        let sink_logits = sink_logits.map(|logits| self.vector(&logits, "sink_logits", query.shape[1])).transpose()?;
        let call = AttendCall {
            query,
            output: self.tensor4(output, "output")?,
            workspace: (address, shape[0]),
            scale,
            mask: mask.map(|mask| self.mask4(&mask)).transpose()?,
            causal,
            softcap: softcap.unwrap_or(0.0),
            sink_logits: sink_logits.unwrap_or(0),
        };
        // SAFETY: as in `append`.
        py.detach(|| unsafe { self.layer.attend(&call, Stream(stream)) })?;
        Ok(())
    }

    /// Writes all keys, decoded, to `output` `[B, Hkv, T, Dk]` in the layer's dtype.
    #[pyo3(signature = (output, *, stream))]
    fn decode_keys(&self, py: Python, output: &Bound<PyAny>, stream: usize) -> PyResult<()> {
        self.decode(py, Side::Keys, output, stream)
    }

    /// Writes all values, decoded, to `output` `[B, Hkv, T, Dv]` in the layer's dtype.
    #[pyo3(signature = (output, *, stream))]
    fn decode_values(&self, py: Python, output: &Bound<PyAny>, stream: usize) -> PyResult<()> {
        self.decode(py, Side::Values, output, stream)
    }

    /// Tokens of padding in front of each sequence of the batch that the first append will bring.
    fn set_padding(&mut self, padding: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.set_padding(padding)?)
    }

    /// Forgets the tokens from `length` on; rows that were packed stay packed.
    #[pyo3(signature = (length, *, stream))]
    fn crop(&mut self, py: Python, length: usize, stream: usize) -> PyResult<()> {
        // SAFETY: the caller promises a stream of the device.
        Ok(py.detach(|| unsafe { self.layer.crop(length, Stream(stream)) })?)
    }

    /// New row i of the batch is the old row indices[i]; pages are not copied until they are written.
    #[pyo3(signature = (indices, *, stream))]
    fn gather(&mut self, py: Python, indices: Vec<usize>, stream: usize) -> PyResult<()> {
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.gather(&indices, Stream(stream)) })?)
    }

    fn reset(&mut self) {
        self.layer.reset();
    }

    /// An independent layer that shares all pages until one of them is written.
    #[pyo3(name = "clone", signature = (*, stream))]
    fn duplicate(&self, py: Python, stream: usize) -> PyResult<Self> {
        // SAFETY: as in `crop`.
        let layer = py.detach(|| unsafe { self.layer.duplicate(Stream(stream)) })?;
        Ok(Self { layer, device: self.device, host_memory: self.host_memory })
    }

    /// Rows of keys and of values that were not finite; waits for the stream.
    #[pyo3(signature = (*, stream))]
    fn nonfinite_rows(&self, py: Python, stream: usize) -> PyResult<usize> {
        // SAFETY: as in `crop`.
        Ok(py.detach(|| unsafe { self.layer.nonfinite_rows(Stream(stream)) })?)
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
            self.device,
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
    fn decode(&self, py: Python, side: Side, output: &Bound<PyAny>, stream: usize) -> PyResult<()> {
        let output = self.tensor4(output, "output")?;
        // SAFETY: as in `append`.
        py.detach(|| unsafe { self.layer.decode(side, &output, Stream(stream)) })?;
        Ok(())
    }
}

type Fields = Vec<(&'static str, usize)>;

/// Name, size, and names and offsets of the fields of every struct that kernels take, for the tests.
#[pyfunction]
pub fn cuda_parameters() -> Vec<(&'static str, usize, Fields)> {
    crate::cuda::params::layouts().into_iter().map(|layout| (layout.name, layout.size, layout.fields)).collect()
}

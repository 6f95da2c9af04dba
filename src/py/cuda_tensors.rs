//! Torch's side of `CudaLayer`: memory that it lends, its current stream, and its tensors by address. No algorithm lives here.

use pyo3::intern;
use pyo3::prelude::*;

use crate::cuda::launch::Stream;
use crate::cuda::memory::{Block, Memory};
use crate::cuda::store::{DeviceMask, DeviceTensor};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, MaskKind};

/// Memory from a Python function `allocate(bytes)`, which returns a tensor: that of torch's caching allocator.
pub struct TorchMemory {
    pub allocate: Py<PyAny>,
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

/// Where the tensors of calls are, and the function that tells torch's current stream there.
pub struct Place {
    pub device: usize,
    pub host_memory: bool,
    pub stream: Py<PyAny>,
}

impl Place {
    pub fn stream(&self, py: Python) -> PyResult<Stream> {
        Ok(Stream(self.stream.call0(py)?.extract(py)?))
    }
}

/// Address, shape, strides and dtype's name of a torch tensor.
struct Described {
    address: u64,
    shape: Vec<usize>,
    strides: Vec<i64>,
    dtype: String,
}

impl Place {
    fn describe(&self, tensor: &Bound<PyAny>, name: &str) -> Result<Described> {
        let py = tensor.py();
        let kind = if self.host_memory { intern!(py, "is_cpu") } else { intern!(py, "is_cuda") };
        let read = || -> PyResult<(bool, Described)> {
            let index: i64 = tensor.call_method0(intern!(py, "get_device"))?.extract()?;
            let is_here = tensor.getattr(kind)?.extract()? && (self.host_memory || index == self.device as i64);
            let described = Described {
                address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
                shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
                strides: tensor.call_method0(intern!(py, "stride"))?.extract()?,
                dtype: tensor.getattr(intern!(py, "dtype"))?.str()?.to_string(),
            };
            Ok((is_here, described))
        };
        let (is_here, mut described) = read().map_err(|error| Error::value(name, "a torch tensor", error))?;
        if !is_here {
            let expected = if self.host_memory { "cpu".to_string() } else { format!("cuda:{}", self.device) };
            let device = tensor.getattr(intern!(py, "device")).and_then(|device| device.str()?.extract());
            let found = device.unwrap_or_else(|_| "another device".to_string());
            return Err(Error::Device { name: name.into(), expected, found });
        }
        if let Some(short) = described.dtype.strip_prefix("torch.") {
            described.dtype = short.to_string();
        }
        Ok(described)
    }

    pub fn tensor4(&self, tensor: &Bound<PyAny>, name: &str) -> Result<DeviceTensor> {
        let Described { address, shape, strides, dtype } = self.describe(tensor, name)?;
        let (shape, strides) = four(name, &shape, &strides, "[batch, heads, tokens, channels]")?;
        Ok(DeviceTensor {
            address,
            shape,
            strides,
            dtype: Dtype::from_name(&dtype).map_err(|_| not_a_float(name, &dtype))?,
        })
    }

    pub fn mask4(&self, tensor: &Bound<PyAny>) -> Result<DeviceMask> {
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
    pub fn vector(&self, tensor: &Bound<PyAny>, name: &str, length: usize) -> Result<u64> {
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

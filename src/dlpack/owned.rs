//! A buffer of this crate that other libraries read and write through `DLPack`.
//!
//! What it is: 64-byte aligned, compact, any rank, shared by the Python object and every capsule made from it; freed with the last of them.

use dlpark::{
    DlpackElement, DlpackFlags, Managed, ManagedTensorBase,
    allocation::dynamic::Initialized,
    ffi::{DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned},
    metadata::Dynamic,
    python::{DlpackExporter, ExportRequest, export_dlpack},
};
use pyo3::{
    exceptions::PyBufferError,
    prelude::*,
    types::{PyDict, PyTuple},
};
use std::{
    alloc::{self, Layout},
    ptr::NonNull,
    slice,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

const ALIGNMENT: usize = 64;

/// Buffers that exist now, for the lifetime tests.
static LIVE_BUFFERS: AtomicUsize = AtomicUsize::new(0);

pub(super) fn live_buffers() -> usize {
    LIVE_BUFFERS.load(Ordering::SeqCst)
}

struct Buffer {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory. Once it is shared, only the other libraries use it, under their own rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn zeroed(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).expect("a size that fits the address space");
        // SAFETY: the layout has a size of at least 1.
        let ptr = unsafe { alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        LIVE_BUFFERS.fetch_add(1, Ordering::SeqCst);
        Self { ptr, layout }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `zeroed`; the last owner is gone.
        unsafe { alloc::dealloc(self.ptr.as_ptr(), self.layout) };
        LIVE_BUFFERS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A tensor owned by this module; read it with `torch.from_dlpack` or `numpy.from_dlpack`.
#[pyclass(frozen, module = "skvq._native")]
pub struct OwnedTensor {
    buffer: Arc<Buffer>,
    shape: Vec<i64>,
    strides: Vec<i64>,
    dtype: DLDataType,
}

impl OwnedTensor {
    /// A zeroed tensor of `shape`, written by `fill` in row-major order before anyone else sees it.
    pub fn build<T: DlpackElement + Copy>(shape: &[usize], fill: impl FnOnce(&mut [T])) -> Self {
        let elements = shape.iter().product::<usize>();
        let buffer = Buffer::zeroed(elements * size_of::<T>());
        // SAFETY: `elements` zeroed, aligned elements (any bit pattern of a `DlpackElement` is valid) that nobody else knows of yet.
        fill(unsafe { slice::from_raw_parts_mut(buffer.ptr.as_ptr().cast(), elements) });
        let shape: Vec<i64> = shape.iter().map(|length| *length as i64).collect();
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        Self { buffer: Arc::new(buffer), shape, strides, dtype: T::DTYPE }
    }

    fn export<M: ManagedTensorBase>(&self) -> PyResult<Initialized<M>> {
        let mut tensor = Dynamic::new(self.shape.as_slice(), self.strides.as_slice())
            .initialize_as::<M>(Arc::clone(&self.buffer)) // the capsule's share of the buffer
            .map_err(|error| PyBufferError::new_err(error.to_string()))?;
        tensor.set_data(self.buffer.ptr.as_ptr().cast()).set_dtype(self.dtype).set_device(DLDevice::CPU);
        Ok(tensor)
    }
}

impl DlpackExporter for OwnedTensor {
    fn device(&self) -> DLDevice {
        DLDevice::CPU
    }

    fn flags(&self) -> DlpackFlags {
        DlpackFlags::empty()
    }

    fn prepare_export(&self, _py: Python<'_>, _request: &ExportRequest<'_>) -> PyResult<()> {
        Ok(()) // no streams on the CPU
    }

    fn export_legacy(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensor>> {
        // SAFETY: data, dtype, device and compact strides describe the buffer that the handle shares.
        Ok(unsafe { self.export()?.finish() })
    }

    fn export_versioned(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensorVersioned>> {
        // SAFETY: as above.
        Ok(unsafe { self.export()?.finish() })
    }
}

#[pymethods]
impl OwnedTensor {
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        export_dlpack(self, py, ExportRequest::parse(stream, max_version, dl_device, copy)?)
    }

    fn __dlpack_device__(&self) -> (u32, i32) {
        let device = DlpackExporter::device(self);
        (device.device_type.0, device.device_id)
    }

    /// `numpy.asarray(tensor)`: the same memory, unless another dtype or a copy is asked for.
    #[pyo3(signature = (dtype=None, copy=None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let numpy = py.import("numpy")?;
        let array = numpy.call_method1("from_dlpack", (slf,))?;
        let options = PyDict::new(py);
        options.set_item("dtype", dtype)?;
        options.set_item("copy", copy)?;
        numpy.call_method("array", (array,), Some(&options))
    }

    /// Sizes of the axes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }
}

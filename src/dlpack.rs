//! `DLPack` both ways, on CPU: tensors of other libraries seen as `tensor.rs` views, and buffers of this crate lent to them.
//!
//! What it is: [`ImportedTensor`] owns the exporter's handle (so the memory stays alive while a view borrows from it) and refuses whatever
//! would be read or written with the wrong values; `OwnedTensor` (`owned.rs`) is a Rust buffer with `__dlpack__`. What it is not: a copy
//! (except the small parameter arrays), a check of sizes against a model, anything about devices other than the CPU.
//!
//! Three doors, the first that the object has: the C exchange table (`__dlpack_c_exchange_api__`, about 1 µs), `__dlpack__` with a
//! version, `__dlpack__` without (older torch and numpy).

use crate::{
    error::{Error, Result},
    tensor::{Dtype, MaskKind, MaskView, Row, TensorView, TensorViewMut},
};
use dlpark::{
    DlpackFlags,
    ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType},
    python::{ImportedDlpack, consumer::exchange::ExchangeApi, from_dlpack},
};
use pyo3::{exceptions::PyTypeError, intern, prelude::*};
use std::slice;

mod owned;
pub mod testing;
pub use owned::OwnedTensor;

/// A CPU tensor of another library, held by its `DLPack` handle.
pub struct ImportedTensor {
    name: &'static str,
    owner: ImportedDlpack,
    ptr: *const u8,
    shape: Vec<i64>,
    strides: Vec<i64>, // in elements
    dtype: DLDataType,
}

// SAFETY: the bytes live as long as `owner`, whose deleter may run on any thread (the exporters take the interpreter lock themselves).
unsafe impl Send for ImportedTensor {}
// SAFETY: through a shared reference only the fields beside `owner` and the bytes are read.
unsafe impl Sync for ImportedTensor {}

impl ImportedTensor {
    /// Imports `object` without a copy; `name` is the argument's name in every error about it.
    pub fn new(object: &Bound<'_, PyAny>, name: &'static str) -> Result<Self> {
        refuse_lazy_views(object, name)?;
        let owner = import(object).map_err(|error| not_a_tensor(name, object, &error))?;
        let broken =
            |error: dlpark::tensor::Error| Error::dlpack(name, format!("expected a plain tensor, found that {error}"));
        let tensor = owner.validate().map_err(broken)?;
        if tensor.device().device_type != DLDeviceType::CPU {
            let found = device_name(tensor.device());
            return Err(Error::Device { name: name.into(), expected: "cpu".into(), found });
        }
        let strides = tensor.strides_or_compact().map_err(broken)?.into_owned();
        // SAFETY: a CPU tensor whose data and offset come from one exporter; refuses null data of a tensor with elements.
        let ptr = unsafe { tensor.offset_bytes_ptr() }.map_err(broken)?;
        let (shape, dtype) = (tensor.shape().to_vec(), tensor.dtype());
        Ok(Self { name, owner, ptr, shape, strides, dtype })
    }

    /// Read-only `[batch, head, token, channel]` of f32, f16 or bf16.
    ///
    /// As in every library that shares memory, the caller of the Python function promises that nobody writes to the tensor meanwhile.
    pub fn view4(&self) -> Result<TensorView<'_>> {
        self.expect_rank(4, "[batch, heads, tokens, channels]")?;
        let dtype = self.float_dtype()?;
        self.expect_aligned(dtype.size())?;
        let (shape, strides) = self.padded();
        // SAFETY: the handle keeps the exporter's memory alive while `self` is borrowed; alignment and dtype were checked.
        Ok(unsafe { TensorView::from_raw(self.ptr, shape, strides, dtype) })
    }

    /// Writable `[batch, head, token, channel]`. Refuses read-only and copied exports and overlapping strides.
    ///
    /// As with numpy's `out=`, the caller of the Python function promises that nobody else uses the tensor meanwhile; for tensors of the
    /// same call, [`Self::expect_disjoint`] checks it.
    pub fn view_mut4(&mut self) -> Result<TensorViewMut<'_>> {
        self.expect_rank(4, "[batch, heads, tokens, channels]")?;
        let dtype = self.float_dtype()?;
        self.expect_aligned(dtype.size())?;
        self.expect_writable()?;
        let (shape, strides) = self.padded();
        // SAFETY: as in `view4`; the exporter lets its memory be written and `self` is borrowed exclusively.
        unsafe { TensorViewMut::from_raw(self.name, self.ptr.cast_mut(), shape, strides, dtype) }
    }

    /// A boolean or additive mask `[batch | 1, head | 1, query | 1, token]`.
    pub fn mask4(&self) -> Result<MaskView<'_>> {
        self.expect_rank(4, "[batch or 1, heads or 1, queries or 1, tokens]")?;
        let kind = if self.dtype == DLDataType::BOOL {
            MaskKind::Visible
        } else {
            let expected = "bool, float32, float16 or bfloat16";
            let dtype = float_dtype(self.dtype);
            MaskKind::Additive(dtype.ok_or_else(|| Error::dtype(self.name, expected, dtype_name(self.dtype)))?)
        };
        self.expect_aligned(kind.size())?;
        let (shape, strides) = self.padded();
        // SAFETY: as in `view4`.
        Ok(unsafe { MaskView::from_raw(self.ptr, shape, strides, kind) })
    }

    /// A copy of a float32 vector.
    pub fn vec_f32(&self) -> Result<Vec<f32>> {
        self.expect_rank(1, "[channels]")?;
        self.copy("float32")
    }

    /// A copy of a float32 matrix in row-major order, with its shape.
    pub fn matrix_f32(&self) -> Result<(Vec<f32>, [usize; 2])> {
        self.expect_rank(2, "[rows, channels]")?;
        Ok((self.copy("float32")?, [self.shape[0] as usize, self.shape[1] as usize]))
    }

    /// A copy of float32 square matrices `[heads, width, width]`, one after the other by rows.
    pub fn squares_f32(&self, width: usize) -> Result<Vec<f32>> {
        self.expect_rank(3, "[heads, channels, channels]")?;
        if self.shape[0] == 0 || self.shape[1..] != [width as i64; 2] {
            return Err(Error::shape(self.name, format!("[heads, {width}, {width}]"), &self.shape));
        }
        self.copy("float32")
    }

    /// A copy of a uint8 matrix in row-major order, with its shape.
    pub fn matrix_u8(&self) -> Result<(Vec<u8>, [usize; 2])> {
        self.expect_rank(2, "[rows, bytes]")?;
        Ok((self.copy("uint8")?, [self.shape[0] as usize, self.shape[1] as usize]))
    }

    /// A contiguous uint8 matrix, borrowed, with its shape.
    pub fn bytes2(&self) -> Result<(&[u8], [usize; 2])> {
        let shape = self.contiguous_matrix("[rows, bytes]")?;
        if self.dtype != DLDataType::U8 {
            return Err(Error::dtype(self.name, "uint8", dtype_name(self.dtype)));
        }
        if shape.contains(&0) {
            return Ok((&[], shape));
        }
        // SAFETY: contiguous bytes of a tensor with elements, which the handle keeps alive while `self` is borrowed.
        Ok((unsafe { slice::from_raw_parts(self.ptr, shape[0] * shape[1]) }, shape))
    }

    /// A contiguous matrix of f32, f16 or bf16, borrowed as one row, with its shape.
    pub fn floats2(&self) -> Result<(Row<'_>, [usize; 2])> {
        let shape = self.contiguous_matrix("[rows, columns]")?;
        let dtype = self.float_dtype()?;
        self.expect_aligned(dtype.size())?;
        let all = [1, 1, 1, shape[0] * shape[1]];
        // SAFETY: as in `view4`, with the elements of all rows as one: the matrix is contiguous.
        let view = unsafe { TensorView::from_raw(self.ptr, all, [0, 0, 0, 1], dtype) };
        Ok((view.row(0, 0, 0).expect("neighbouring channels"), shape))
    }

    /// A contiguous float32 matrix to write to, with its shape. Promises and refusals as of [`Self::view_mut4`].
    pub fn floats2_mut(&mut self) -> Result<(&mut [f32], [usize; 2])> {
        let shape = self.contiguous_matrix("[rows, columns]")?;
        if self.dtype != DLDataType::F32 {
            return Err(Error::dtype(self.name, "float32", dtype_name(self.dtype)));
        }
        self.expect_aligned(size_of::<f32>())?;
        self.expect_writable()?;
        if shape.contains(&0) {
            return Ok((&mut [], shape));
        }
        // SAFETY: as in `bytes2`; the exporter lets its memory be written, the alignment was checked and `self` is borrowed exclusively.
        Ok((unsafe { slice::from_raw_parts_mut(self.ptr.cast_mut().cast(), shape[0] * shape[1]) }, shape))
    }

    fn contiguous_matrix(&self, axes: &str) -> Result<[usize; 2]> {
        self.expect_rank(2, axes)?;
        let (rows, columns) = (self.shape[0], self.shape[1]);
        if rows * columns != 0 && !self.is_contiguous() {
            let expected = format!("a contiguous matrix {axes}, with strides [{columns}, 1]");
            return Err(Error::value(self.name, expected, format!("strides {:?}", self.strides)));
        }
        Ok([rows as usize, columns as usize])
    }

    fn expect_writable(&self) -> Result<()> {
        if self.owner.flags().intersects(DlpackFlags::READ_ONLY) {
            return Err(Error::dlpack(self.name, "expected a writable tensor, found a read-only one"));
        }
        if self.owner.flags().intersects(DlpackFlags::IS_COPIED) {
            let reason = "expected a tensor that shares its memory, its library exported a copy";
            return Err(Error::dlpack(self.name, reason));
        }
        Ok(())
    }

    /// Refuses two tensors of one call that share bytes, when one of them is written.
    pub fn expect_disjoint(&self, other: &Self) -> Result<()> {
        let (mine, others) = (self.extent(), other.extent());
        if mine.0 < others.1 && others.0 < mine.1 {
            let expected = format!("memory apart from that of {}", other.name);
            return Err(Error::value(self.name, expected, "overlapping memory"));
        }
        Ok(())
    }

    /// First and one past the last address that the strides reach.
    fn extent(&self) -> (usize, usize) {
        let (mut low, mut high) = (self.ptr.addr(), self.ptr.addr());
        if self.shape.contains(&0) {
            return (low, high);
        }
        let size = self.dtype.element_size();
        for (length, stride) in self.shape.iter().zip(&self.strides) {
            let reach = (length - 1) as usize * stride.unsigned_abs() as usize * size;
            if *stride < 0 { low -= reach } else { high += reach }
        }
        (low, high + size)
    }

    fn copy<T: dlpark::DlpackElement + Copy>(&self, expected: &str) -> Result<Vec<T>> {
        if self.dtype != T::DTYPE {
            return Err(Error::dtype(self.name, expected, dtype_name(self.dtype)));
        }
        self.expect_aligned(size_of::<T>())?;
        let (shape, strides) = self.padded();
        let count = shape.iter().product();
        if count > 0 && self.is_contiguous() {
            // SAFETY: neighbouring elements of the tensor, which the handle keeps alive; dtype and alignment were checked.
            return Ok(unsafe { slice::from_raw_parts(self.ptr.cast::<T>(), count) }.to_vec());
        }
        let element = |mut index: usize| {
            let mut offset = 0;
            for axis in (0..4).rev() {
                offset += (index % shape[axis]) as isize * strides[axis];
                index /= shape[axis];
            }
            // SAFETY: inside the shape of the tensor, which the handle keeps alive; dtype and alignment were checked.
            unsafe { self.ptr.cast::<T>().offset(offset).read() }
        };
        Ok((0..count).map(element).collect())
    }

    /// Whether its elements, of which there are some, lie one behind the other in row-major order.
    fn is_contiguous(&self) -> bool {
        let mut next = 1;
        let neighbours = |(&length, &stride): (&i64, &i64)| {
            let holds = length == 1 || stride == next;
            next *= length;
            holds
        };
        self.shape.iter().zip(&self.strides).rev().all(neighbours)
    }

    /// Shape and strides with leading axes of size 1 up to rank 4.
    fn padded(&self) -> ([usize; 4], [isize; 4]) {
        let (mut shape, mut strides) = ([1usize; 4], [0isize; 4]);
        let first = 4 - self.shape.len();
        for (axis, (length, stride)) in self.shape.iter().zip(&self.strides).enumerate() {
            shape[first + axis] = *length as usize;
            strides[first + axis] = *stride as isize;
        }
        (shape, strides)
    }

    fn expect_rank(&self, rank: usize, axes: &str) -> Result<()> {
        if self.shape.len() == rank { Ok(()) } else { Err(Error::shape(self.name, axes, &self.shape)) }
    }

    fn expect_aligned(&self, size: usize) -> Result<()> {
        if self.shape.contains(&0) || self.ptr.addr().is_multiple_of(size) {
            return Ok(());
        }
        Err(Error::dlpack(self.name, format!("expected memory aligned to {size} bytes, found address {:?}", self.ptr)))
    }

    fn float_dtype(&self) -> Result<Dtype> {
        let expected = "float32, float16 or bfloat16";
        float_dtype(self.dtype).ok_or_else(|| Error::dtype(self.name, expected, dtype_name(self.dtype)))
    }
}

fn import(object: &Bound<'_, PyAny>) -> PyResult<ImportedDlpack> {
    let py = object.py();
    if let Some(api) = ExchangeApi::from_object(object.as_borrowed())? {
        let (tensor, _stream) = api.import_managed_no_sync(object.as_borrowed())?.into_parts(); // the CPU has no streams
        return Ok(ImportedDlpack::Versioned(tensor));
    }
    // Also refuses a bare capsule, which no longer tells whether it came from a lazy view.
    let export = object.getattr(intern!(py, "__dlpack__"))?;
    match from_dlpack(object.as_borrowed(), None, None) {
        // torch before 2.9 and numpy before 2.1 know no `max_version`.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => from_dlpack(export.call0()?.as_borrowed(), None, None),
        imported => imported,
    }
}

fn not_a_tensor(name: &'static str, object: &Bound<'_, PyAny>, error: &PyErr) -> Error {
    let message = error.to_string();
    let first_line = message.lines().next().unwrap_or_default(); // torch appends its C++ stack
    let kind = object.get_type().to_string();
    Error::dlpack(name, format!("expected a CPU tensor that exports DLPack, found {kind}: {first_line}"))
}

/// torch's exchange table skips the checks of its `__dlpack__`, and neither looks at the negative bit: the values would be silently wrong.
fn refuse_lazy_views(object: &Bound<'_, PyAny>, name: &'static str) -> Result<()> {
    let py = object.py();
    let failed = |error: PyErr| not_a_tensor(name, object, &error);
    let Some(requires_grad) = object.getattr_opt(intern!(py, "requires_grad")).map_err(failed)? else {
        return Ok(()); // not torch: no lazy bits
    };
    if requires_grad.is_truthy().map_err(failed)? {
        return Err(Error::dlpack(
            name,
            "expected a tensor without gradient, found requires_grad=True: call .detach() first",
        ));
    }
    for (bit, resolve) in [(intern!(py, "is_neg"), ".resolve_neg()"), (intern!(py, "is_conj"), ".resolve_conj()")] {
        let Some(method) = object.getattr_opt(bit).map_err(failed)? else { continue };
        if method.call0().and_then(|set| set.is_truthy()).map_err(failed)? {
            let reason = format!("expected plain values, found a lazy view with {bit}() true: call {resolve} first");
            return Err(Error::dlpack(name, reason));
        }
    }
    Ok(())
}

fn float_dtype(dtype: DLDataType) -> Option<Dtype> {
    match dtype {
        DLDataType::F32 => Some(Dtype::F32),
        DLDataType::F16 => Some(Dtype::F16),
        DLDataType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

/// As torch and numpy spell it, e.g. `int64`; more than one lane as `float32x4`.
fn dtype_name(dtype: DLDataType) -> String {
    let kind = match dtype.code {
        DLDataTypeCode::BOOL => return "bool".into(),
        DLDataTypeCode::INT => "int",
        DLDataTypeCode::UINT => "uint",
        DLDataTypeCode::FLOAT => "float",
        DLDataTypeCode::BFLOAT => "bfloat",
        DLDataTypeCode::COMPLEX => "complex",
        DLDataTypeCode(code) => return format!("DLPack type code {code} of {} bits", dtype.bits),
    };
    let lanes = if dtype.lanes == 1 { String::new() } else { format!("x{}", dtype.lanes) };
    format!("{kind}{}{lanes}", dtype.bits)
}

fn device_name(device: DLDevice) -> String {
    match device.device_type {
        DLDeviceType::CPU => "cpu".into(),
        DLDeviceType::CUDA => format!("cuda:{}", device.device_id),
        DLDeviceType(other) => format!("DLPack device type {other}:{}", device.device_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_and_devices_have_names() {
        assert_eq!(dtype_name(DLDataType::I64), "int64");
        assert_eq!(dtype_name(DLDataType::BF16), "bfloat16");
        assert_eq!(dtype_name(DLDataType::new(DLDataTypeCode::FLOAT, 32, 4)), "float32x4");
        assert_eq!(dtype_name(DLDataType::F8E4M3FN), "DLPack type code 10 of 8 bits");
        assert_eq!(device_name(DLDevice::CPU), "cpu");
        assert_eq!(device_name(DLDevice { device_type: DLDeviceType::CUDA, device_id: 1 }), "cuda:1");
        assert_eq!(float_dtype(DLDataType::new(DLDataTypeCode::FLOAT, 32, 4)), None);
    }
}

//! The CUDA driver, opened when it is first asked for: what this machine has, and every failure as an error that says what to do.
//!
//! cudarc knows the library's names and the driver's types. Its own functions are not called: they panic where a symbol is
//! missing, and return the status as a Rust enum, which a driver newer than cudarc would fill with values that enum does not have.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUfunction, CUlaunchConfig, CUmodule, CUstream};
use cudarc::driver::sys::{CUdevice_attribute as DeviceAttribute, CUfunction_attribute as FunctionAttribute};
use libloading::Library;

use super::arch::Arch;
use super::symbols::function_table;
use crate::error::{Error, Result};

const OLDEST_VERSION: i32 = 12_000;
const INSTALL: &str =
    "install NVIDIA's driver for CUDA 12.0 or newer (525 or newer); nvidia-smi shows the installed one";

// The signatures are those of cuda.h, unchanged from CUDA 12.0 to 13.x.
function_table! { Functions:
    init = "cuInit": fn(c_uint) -> c_int;
    driver_version = "cuDriverGetVersion": fn(*mut c_int) -> c_int;
    error_name = "cuGetErrorName": fn(c_int, *mut *const c_char) -> c_int;
    error_text = "cuGetErrorString": fn(c_int, *mut *const c_char) -> c_int;
    device_count = "cuDeviceGetCount": fn(*mut c_int) -> c_int;
    device = "cuDeviceGet": fn(*mut CUdevice, c_int) -> c_int;
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, CUdevice) -> c_int;
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, DeviceAttribute, CUdevice) -> c_int;
    retain_primary_context = "cuDevicePrimaryCtxRetain": fn(*mut CUcontext, CUdevice) -> c_int;
    current_context = "cuCtxGetCurrent": fn(*mut CUcontext) -> c_int;
    set_current_context = "cuCtxSetCurrent": fn(CUcontext) -> c_int;
    load_module = "cuModuleLoadData": fn(*mut CUmodule, *const c_void) -> c_int;
    function = "cuModuleGetFunction": fn(*mut CUfunction, CUmodule, *const c_char) -> c_int;
    set_function_attribute = "cuFuncSetAttribute": fn(CUfunction, FunctionAttribute, c_int) -> c_int;
    resident_blocks = "cuOccupancyMaxActiveBlocksPerMultiprocessor": fn(*mut c_int, CUfunction, c_int, usize) -> c_int;
    launch = "cuLaunchKernelEx": fn(*const CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void) -> c_int;
    copy = "cuMemcpyAsync": fn(CUdeviceptr, CUdeviceptr, usize, CUstream) -> c_int;
    fill = "cuMemsetD8Async": fn(CUdeviceptr, u8, usize, CUstream) -> c_int;
    synchronize = "cuStreamSynchronize": fn(CUstream) -> c_int;
}

/// The opened and initialised driver. It stays open.
pub struct Driver {
    pub(super) functions: Functions,
    version: i32, // 1000 · major + 10 · minor
    device_count: usize,
}

/// What the driver says of a device; asking costs no context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    pub name: String,
    pub arch: Arch,
    pub multiprocessors: i32,
    /// Shared memory that one block may ask for, in bytes.
    pub shared_bytes_per_block: i32,
    pub l2_bytes: i32,
}

impl Driver {
    /// The driver of this machine with at least one device. What the first call finds holds for the process, as in CUDA itself.
    pub fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        DRIVER.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self> {
        let library = open_library()?;
        let functions = Functions::resolve(library)
            .map_err(|missing| Error::no_cuda(format!("libcuda lacks {}", missing.join(", ")), INSTALL))?;
        let mut driver = Self { functions, version: 0, device_count: 0 };
        // SAFETY: no context and no other call is needed before this one.
        driver.usable("cuInit", unsafe { (driver.functions.init)(0) })?;
        let mut version = 0;
        // SAFETY: points to an integer of this frame.
        driver.usable("cuDriverGetVersion", unsafe { (driver.functions.driver_version)(&raw mut version) })?;
        driver.version = version;
        if driver.version < OLDEST_VERSION {
            let (major, minor) = driver.version();
            return Err(Error::no_cuda(format!("the driver is for CUDA {major}.{minor}"), INSTALL));
        }
        let mut count = 0;
        // SAFETY: points to an integer of this frame.
        driver.usable("cuDeviceGetCount", unsafe { (driver.functions.device_count)(&raw mut count) })?;
        driver.device_count = count.max(0) as usize;
        if driver.device_count == 0 {
            return driver.usable("cuDeviceGetCount", NO_DEVICE).map(|()| driver);
        }
        Ok(driver)
    }

    /// (major, minor) of the newest CUDA that the driver is made for.
    pub fn version(&self) -> (i32, i32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    pub fn device_count(&self) -> usize {
        self.device_count
    }

    /// The driver's handle of device `index`, counted as in torch.
    pub(super) fn device(&self, index: usize) -> Result<CUdevice> {
        if index >= self.device_count {
            return Err(Error::value("device", format!("an index below {}", self.device_count), index));
        }
        let mut device = 0;
        // SAFETY: points to a handle of this frame.
        self.check("cuDeviceGet", unsafe { (self.functions.device)(&raw mut device, index as c_int) })?;
        Ok(device)
    }

    pub fn properties(&self, index: usize) -> Result<Properties> {
        let device = self.device(index)?;
        let mut name = [0; 256];
        // SAFETY: room for as many bytes as said, the last one a zero.
        let status = unsafe { (self.functions.device_name)(name.as_mut_ptr(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", status)?;
        // SAFETY: zeros to the end behind what the driver wrote.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: points to an integer of this frame.
            let status = unsafe { (self.functions.device_attribute)(&raw mut value, attribute, device) };
            self.check("cuDeviceGetAttribute", status).map(|()| value)
        };
        Ok(Properties {
            name,
            arch: Arch::of_capability(
                attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes_per_block: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_bytes: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        })
    }

    /// An error that names the call for every status but success.
    pub(super) fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let text_of = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: points to a pointer of this frame; a status that the driver does not know leaves it null.
            let found = unsafe { function(status, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: on success a constant string of the driver, which is open.
            found.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = text_of(self.functions.error_name).unwrap_or_else(|| "CUDA_ERROR".into());
        let text = text_of(self.functions.error_text).unwrap_or_else(|| "unknown status".into());
        Err(Error::Cuda { call: call.into(), code: status, name, text })
    }

    /// [`Self::check`] for the calls that show whether CUDA can be used at all.
    fn usable(&self, call: &str, status: c_int) -> Result<()> {
        self.check(call, status).map_err(|error| Error::no_cuda(error.to_string(), advice(status)))
    }
}

/// libcuda.so.1 is what the driver installs and torch opens. cudarc, which knows the names on other systems, would look for libcuda.so
/// first, and that may be the toolkit's stub.
fn open_library() -> Result<&'static Library> {
    // SAFETY: opening the driver has no effect but its own initialisation.
    if let Ok(library) = unsafe { Library::new("libcuda.so.1") } {
        return Ok(Box::leak(Box::new(library)));
    }
    // SAFETY: as above.
    if unsafe { sys::is_culib_present() } {
        // SAFETY: just found, so it opens and does not panic; it is never closed.
        return Ok(unsafe { sys::culib() });
    }
    Err(Error::no_cuda("no libcuda on this machine", INSTALL))
}

const NO_DEVICE: c_int = 100;

/// What helps against a status of the driver's first calls.
fn advice(status: c_int) -> &'static str {
    match status {
        NO_DEVICE => "nvidia-smi lists the devices, and CUDA_VISIBLE_DEVICES must not hide them",
        3 => "after a fork CUDA works only in a process that did not use it before: start processes by spawn",
        34 => "the toolkit's stub of libcuda was found: take its folder (…/stubs) out of LD_LIBRARY_PATH",
        803 | 804 => {
            "the driver's parts do not fit each other: reboot after an update, or remove CUDA's compat package"
        }
        _ => INSTALL,
    }
}

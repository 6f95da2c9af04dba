//! One GPU: torch's own context on it, and the kernels loaded there.
//!
//! What it is: the primary context of a device, made current for the length of a call; kernels by instance, each loaded once. What it is
//! not: an owner of memory or streams; both are torch's and come as raw numbers.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use cudarc::driver::sys::CUcontext;

use super::driver::{Driver, Properties};
use super::instance::{Compiled, Compiler, Instance};
use super::launch::{FREE_SHARED_BYTES, Function};
use crate::error::{Error, Result};

/// A device of this process. Lives as long as the process, as its context does.
pub struct Device {
    index: usize,
    properties: Properties,
    pub(super) driver: &'static Driver,
    context: CUcontext,
    functions: RwLock<HashMap<Instance, Arc<Function>>>,
}

// SAFETY: a context is a handle that any thread may make current; the driver orders concurrent calls.
unsafe impl Send for Device {}
// SAFETY: as above; the table of functions has its lock.
unsafe impl Sync for Device {}

impl Device {
    /// Device `index` as torch counts. The first call retains its primary context, the one that torch works in, and never lets go.
    pub fn get(index: usize) -> Result<&'static Self> {
        static DEVICES: OnceLock<Mutex<HashMap<usize, &'static Device>>> = OnceLock::new();
        let mut devices = DEVICES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&index) {
            return Ok(device);
        }
        let device: &'static Self = Box::leak(Box::new(Self::open(index)?));
        devices.insert(index, device);
        Ok(device)
    }

    fn open(index: usize) -> Result<Self> {
        let driver = Driver::get()?;
        let properties = driver.properties(index)?;
        properties.arch.expect_supported(&properties.name)?;
        let mut context = ptr::null_mut();
        // SAFETY: points to a handle of this frame.
        let status = unsafe { (driver.functions.retain_primary_context)(&raw mut context, driver.device(index)?) };
        driver.check("cuDevicePrimaryCtxRetain", status)?;
        Ok(Self { index, properties, driver, context, functions: RwLock::default() })
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Makes this device's context the current one of the calling thread until the guard is dropped.
    pub fn activate(&self) -> Result<Active<'_>> {
        let mut previous = ptr::null_mut();
        // SAFETY: points to a handle of this frame.
        let status = unsafe { (self.driver.functions.current_context)(&raw mut previous) };
        self.driver.check("cuCtxGetCurrent", status)?;
        if previous != self.context {
            self.set_current(self.context)?;
        }
        Ok(Active { device: self, previous })
    }

    fn set_current(&self, context: CUcontext) -> Result<()> {
        // SAFETY: this device's context, which is never released, or the one that the thread had before.
        self.driver.check("cuCtxSetCurrent", unsafe { (self.driver.functions.set_current_context)(context) })
    }

    /// The kernel on this device: loaded already, or compiled (or found on disk) and loaded now.
    ///
    /// Loading takes the driver's locks and is not allowed while a graph is captured: ask once before.
    pub fn function(&'static self, instance: &Instance, compiler: &Compiler) -> Result<Arc<Function>> {
        let known = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(instance).cloned();
        if let Some(function) = known {
            return Ok(function);
        }
        // Compiled and loaded without the lock: others launch meanwhile. Two threads with the same wish load it twice, and the first stays.
        let compiled = compiler.compile(instance, self.properties.arch)?;
        let function = Arc::new(self.load(instance, compiler, &compiled)?);
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(functions.entry(instance.clone()).or_insert(function)))
    }

    fn load(&'static self, instance: &Instance, compiler: &Compiler, compiled: &Compiled) -> Result<Function> {
        let _active = self.activate()?;
        let functions = &self.driver.functions;
        let mut module = ptr::null_mut();
        // SAFETY: a whole CUBIN, which carries its own length and is copied by the call.
        let status = unsafe { (functions.load_module)(&raw mut module, compiled.output.cubin.as_ptr().cast()) };
        self.driver.check("cuModuleLoadData", status).map_err(|error| self.explain(error, instance, compiler))?;
        let name = CString::new(compiled.output.name.as_str())
            .map_err(|_| Error::value("name", "text without a zero byte", format!("{:?}", compiled.output.name)))?;
        let mut raw = ptr::null_mut();
        // SAFETY: a loaded module of this context, which is never unloaded; the name outlives the call.
        let status = unsafe { (functions.function)(&raw mut raw, module, name.as_ptr()) };
        self.driver.check("cuModuleGetFunction", status).map_err(|error| self.explain(error, instance, compiler))?;
        Ok(Function { device: self, raw, shared_limit: Mutex::new(FREE_SHARED_BYTES) })
    }

    /// Says of a CUBIN that the driver refuses what it was made for and by what.
    fn explain(&self, error: Error, instance: &Instance, compiler: &Compiler) -> Error {
        let Error::Cuda { call, code, name, text } = error else { return error };
        let ((driver, driver_minor), (nvrtc, nvrtc_minor)) = (self.driver.version(), compiler.nvrtc().version());
        let advice = if driver < nvrtc {
            format!(": update the driver, or set SKVQ_NVRTC to a libnvrtc.so.{driver}")
        } else {
            String::new()
        };
        let text = format!(
            "{text}; kernel {instance} for {} by NVRTC {nvrtc}.{nvrtc_minor}, driver for CUDA {driver}.{driver_minor}{advice}",
            self.properties.arch
        );
        Error::Cuda { call, code, name, text }
    }
}

/// A device's context is current on this thread; dropping it brings back the context from before.
pub struct Active<'a> {
    device: &'a Device,
    previous: CUcontext,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if self.previous != self.device.context {
            // Nothing can be done if it fails, and the next call that needs a context will say so.
            let _ = self.device.set_current(self.previous);
        }
    }
}

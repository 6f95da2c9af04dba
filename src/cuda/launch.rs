//! Work on a stream of torch's: kernels, copies, fills. Nothing here waits for the device but [`Device::synchronize`].

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{LazyLock, Mutex, PoisonError};

use cudarc::driver::sys::{
    CUfunction, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUstream,
};

use super::device::Device;
use crate::error::{Error, Result};

/// Dynamic shared memory that a kernel has without asking for more.
pub(super) const FREE_SHARED_BYTES: usize = 48 << 10;
/// The oldest compute capability whose launches may begin before those in front of them are done.
const OVERLAPPING: i32 = 90;
/// `SKVQ_OVERLAP=0`: no launch begins early.
static MAY_OVERLAP: LazyLock<bool> =
    LazyLock::new(|| std::env::var_os("SKVQ_OVERLAP").is_none_or(|value| value != "0"));

/// A stream as torch names it, `torch.cuda.current_stream().cuda_stream`; 0 is the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

impl Stream {
    fn raw(self) -> CUstream {
        ptr::with_exposed_provenance_mut(self.0)
    }
}

/// The one argument of a kernel: a struct that C++ declares alike.
///
/// # Safety
/// `repr(C)`, the same size, alignment and fields as the kernel's own parameter, and every value of it may be copied as bytes.
pub unsafe trait Parameters: Copy {}

/// How a kernel is launched. Sizes are (x, y, z).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    pub stream: Stream,
    /// May begin before the launch in front of it on the stream is done, where devices can do that: the kernel waits for it itself
    /// (`wait_for_earlier_launches` of `kernels/portable.cuh`), and so does the launch in front, unless that began after all before it.
    pub early: bool,
}

/// A loaded kernel. Its module is never unloaded, so the handle stays good.
pub struct Function {
    pub(super) device: &'static Device,
    pub(super) raw: CUfunction,
    pub(super) shared_limit: Mutex<usize>,
}

// SAFETY: a handle that any thread may use while the device's context is current.
unsafe impl Send for Function {}
// SAFETY: as above; the limit has its lock.
unsafe impl Sync for Function {}

impl Function {
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Puts the kernel on the stream. An empty grid is no work.
    ///
    /// # Safety
    /// `parameters` is what the kernel takes. Every address in it lies in memory that the device may use as the kernel does, that stays
    /// alive until the stream is past this launch, and that no other stream writes meanwhile. The stream is one of this device.
    pub unsafe fn launch<P: Parameters>(&self, launch: &Launch, parameters: &P) -> Result<()> {
        // SAFETY: the caller's promise; the driver reads the struct during the call only.
        unsafe { self.launch_raw(launch, ptr::from_ref(parameters).cast()) }
    }

    /// [`Self::launch`] with the parameters as bytes.
    ///
    /// # Safety
    /// As there; `parameters` are all bytes of what the kernel takes.
    pub unsafe fn launch_bytes(&self, launch: &Launch, parameters: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise; the driver reads bytes and asks for no alignment.
        unsafe { self.launch_raw(launch, parameters.as_ptr().cast()) }
    }

    /// # Safety
    /// As [`Self::launch`], with `parameters` pointing to the kernel's one argument.
    unsafe fn launch_raw(&self, launch: &Launch, parameters: *const c_void) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let _active = self.device.activate()?;
        self.allow_shared(launch.shared_bytes)?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let mut arguments = [parameters.cast_mut()];
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let early = launch.early && *MAY_OVERLAP && self.device.properties().arch.capability >= OVERLAPPING;
        let config = CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: launch.shared_bytes as u32,
            hStream: launch.stream.raw(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: a live function of the current context; the driver copies the configuration and the argument, whose size it knows, before it
        // returns.
        let status = unsafe {
            (self.device.driver.functions.launch)(&raw const config, self.raw, arguments.as_mut_ptr(), ptr::null_mut())
        };
        self.device.driver.check("cuLaunchKernelEx", status)
    }

    /// Blocks of so many threads that share a multiprocessor, at least one.
    pub fn resident_blocks(&self, threads: usize, shared_bytes: usize) -> Result<usize> {
        let _active = self.device.activate()?;
        self.allow_shared(shared_bytes)?;
        let mut blocks = 0;
        let count = self.device.driver.functions.resident_blocks;
        // SAFETY: a live function of the current context; points to an integer of this frame.
        let status = unsafe { count(&raw mut blocks, self.raw, threads as c_int, shared_bytes) };
        self.device.driver.check("cuOccupancyMaxActiveBlocksPerMultiprocessor", status)?;
        Ok(blocks.max(1) as usize)
    }

    /// Raises the kernel's limit of dynamic shared memory where a launch needs it.
    fn allow_shared(&self, bytes: usize) -> Result<()> {
        // Held over the call: of two threads, the one that needs less must not set its limit last.
        let mut limit = self.shared_limit.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes <= *limit {
            return Ok(());
        }
        let properties = self.device.properties();
        if bytes > properties.shared_bytes_per_block.max(0) as usize {
            return Err(Error::Unsupported {
                name: format!("a block with {bytes} bytes of shared memory"),
                reason: format!("{} has {}", properties.name, properties.shared_bytes_per_block),
            });
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let set = self.device.driver.functions.set_function_attribute;
        // SAFETY: a live function of the current context.
        self.device.driver.check("cuFuncSetAttribute", unsafe { set(self.raw, attribute, bytes as c_int) })?;
        *limit = bytes;
        Ok(())
    }
}

impl Device {
    /// Copies between device memory, or between it and the host's, in either direction: the driver tells them apart by address.
    ///
    /// # Safety
    /// Both ranges are `bytes` long, do not overlap, and stay alive and otherwise unwritten until the stream is past the copy. The stream
    /// is one of this device.
    pub unsafe fn copy(&self, target: u64, source: u64, bytes: usize, stream: Stream) -> Result<()> {
        let _active = self.activate()?;
        // SAFETY: the caller's promise.
        let status = unsafe { (self.driver.functions.copy)(target, source, bytes, stream.raw()) };
        self.driver.check("cuMemcpyAsync", status)
    }

    /// Reads numbers of device memory, and waits for them.
    ///
    /// # Safety
    /// `source` begins as many numbers, for which any bytes are values; the stream is one of this device.
    pub unsafe fn read<T: Copy>(&self, target: &mut [T], source: u64, stream: Stream) -> Result<()> {
        // SAFETY: the slice is borrowed until the copy is done, which is waited for; the caller's promise for the rest.
        unsafe {
            self.copy(target.as_mut_ptr() as u64, source, size_of_val(target), stream)?;
            self.synchronize(stream)
        }
    }

    /// Sets `bytes` bytes of device memory to `value`.
    ///
    /// # Safety
    /// The range stays alive and otherwise unused until the stream is past the fill. The stream is one of this device.
    pub unsafe fn fill(&self, target: u64, value: u8, bytes: usize, stream: Stream) -> Result<()> {
        let _active = self.activate()?;
        // SAFETY: the caller's promise.
        let status = unsafe { (self.driver.functions.fill)(target, value, bytes, stream.raw()) };
        self.driver.check("cuMemsetD8Async", status)
    }

    /// Waits until the stream is done; for tests and measurements.
    ///
    /// # Safety
    /// The stream is a live one of this device.
    pub unsafe fn synchronize(&self, stream: Stream) -> Result<()> {
        let _active = self.activate()?;
        // SAFETY: the caller's promise.
        let status = unsafe { (self.driver.functions.synchronize)(stream.raw()) };
        self.driver.check("cuStreamSynchronize", status)
    }
}

//! CUDA for Python: what this machine has, and kernels compiled ahead. No algorithm lives here.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::cuda::arch::{Arch, OLDEST};
use crate::cuda::cache::DiskCache;
use crate::cuda::driver::{Driver, Properties};
use crate::cuda::instance::{Compiled, Compiler, Instance};
use crate::cuda::nvrtc::Nvrtc;
use crate::error::Result;

/// A kernel as Python names it: file, kernel, template arguments.
type InstanceParts = (String, String, Vec<String>);

fn instance((file, kernel, arguments): InstanceParts) -> Instance {
    Instance { file, kernel, arguments }
}

/// A kernel compiled for one architecture.
#[pyclass(frozen, name = "CompiledKernel", module = "skvq._native")]
pub struct PyCompiledKernel {
    compiled: Compiled,
}

#[pymethods]
impl PyCompiledKernel {
    #[getter]
    fn cubin<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.compiled.output.cubin)
    }

    #[getter]
    fn name(&self) -> &str {
        &self.compiled.output.name
    }

    #[getter]
    fn log(&self) -> &str {
        &self.compiled.output.log
    }

    #[getter]
    fn cached(&self) -> bool {
        self.compiled.cached
    }
}

/// Whether CUDA can be used, and on what.
#[pyfunction]
pub fn cuda_status(py: Python) -> PyResult<Bound<PyDict>> {
    let found = py.detach(|| -> Result<_> {
        let driver = Driver::get()?;
        let devices = (0..driver.device_count()).map(|index| driver.properties(index)).collect::<Result<Vec<_>>>()?;
        Ok((driver.version(), devices))
    });
    let (reason, version, devices) = match found {
        Ok((version, devices)) => (None, Some(version), devices),
        Err(error) => (Some(error.to_string()), None, Vec::new()),
    };
    let devices = devices.iter().map(|device| describe(py, device)).collect::<PyResult<Vec<_>>>()?;
    let status = PyDict::new(py);
    status.set_item("usable", reason.is_none())?;
    status.set_item("reason", reason)?;
    status.set_item("driver_version", version)?;
    status.set_item("devices", PyList::new(py, devices)?)?;
    Ok(status)
}

fn describe<'py>(py: Python<'py>, device: &Properties) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("name", &device.name)?;
    entry.set_item("arch", device.arch.to_string())?;
    entry.set_item("multiprocessors", device.multiprocessors)?;
    entry.set_item("shared_bytes_per_block", device.shared_bytes_per_block)?;
    entry.set_item("l2_bytes", device.l2_bytes)?;
    Ok(entry)
}

/// Version of the NVRTC at a path and the architectures that it compiles the kernels for.
#[pyfunction]
pub fn cuda_nvrtc(py: Python, nvrtc: &str) -> PyResult<((i32, i32), Vec<String>)> {
    let nvrtc = py.detach(|| Nvrtc::open(nvrtc))?;
    let known = nvrtc.architectures().iter().map(|&number| Arch::of_capability(number / 10, number % 10));
    let served = known.filter(|arch| arch.capability >= OLDEST);
    Ok((nvrtc.version(), served.map(|arch| arch.to_string()).collect()))
}

/// Compiles one kernel, or finds it on disk.
#[pyfunction]
#[pyo3(signature = (nvrtc, file, kernel, arguments, arch, cache=None))]
pub fn cuda_compile(
    py: Python,
    nvrtc: &str,
    file: String,
    kernel: String,
    arguments: Vec<String>,
    arch: &str,
    cache: Option<PathBuf>,
) -> PyResult<PyCompiledKernel> {
    let instance = Instance { file, kernel, arguments };
    let compiled = py.detach(|| compiler(nvrtc, cache)?.compile(&instance, arch.parse()?))?;
    Ok(PyCompiledKernel { compiled })
}

/// Compiles kernels on all threads; `done(i)` is called when job i has its result. The first error is raised when all are done.
#[pyfunction]
#[pyo3(signature = (nvrtc, jobs, cache=None, done=None))]
pub fn cuda_compile_many(
    py: Python,
    nvrtc: &str,
    jobs: Vec<(InstanceParts, String)>,
    cache: Option<PathBuf>,
    done: Option<Py<PyAny>>,
) -> PyResult<Vec<PyCompiledKernel>> {
    let jobs = jobs.into_iter().map(|(parts, arch)| Ok((instance(parts), arch.parse()?)));
    let jobs = jobs.collect::<Result<Vec<_>>>()?;
    let results = py.detach(|| {
        let report = |index: usize, _: &Result<Compiled>| {
            if let Some(done) = &done {
                // What a progress bar raises must not lose the kernels: it is shown and goes no further.
                Python::attach(|py| {
                    if let Err(error) = done.call1(py, (index,)) {
                        error.write_unraisable(py, None);
                    }
                });
            }
        };
        Ok::<_, crate::error::Error>(compiler(nvrtc, cache)?.compile_many(&jobs, report))
    })?;
    let compiled = results.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(compiled.into_iter().map(|compiled| PyCompiledKernel { compiled }).collect())
}

pub(super) fn compiler(nvrtc: &str, cache: Option<PathBuf>) -> Result<Compiler> {
    Ok(Compiler::new(Nvrtc::open(nvrtc)?, DiskCache::new(cache)))
}

/// Probes for the tests.
pub mod testing {
    use super::{PathBuf, PyResult, Python, compiler, instance, pyfunction};
    use crate::cuda::device::Device;
    use crate::cuda::launch::{Launch, Stream};
    use crate::cuda::sources::SOURCES;

    /// Names of the kernel files in this build.
    #[pyfunction]
    pub fn cuda_sources() -> Vec<&'static str> {
        SOURCES.iter().map(|(name, _)| *name).collect()
    }

    /// Launches any kernel with the bytes of its one argument. Addresses in them are taken at their word: the caller vouches for them.
    #[pyfunction]
    #[pyo3(signature = (nvrtc, parts, parameters, *, device, grid, block, shared_bytes, stream, cache=None, early=false))]
    #[allow(clippy::too_many_arguments)]
    pub fn cuda_launch(
        py: Python,
        nvrtc: &str,
        parts: super::InstanceParts,
        parameters: &[u8],
        device: usize,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        stream: usize,
        cache: Option<PathBuf>,
        early: bool,
    ) -> PyResult<()> {
        let launch = Launch { grid, block, shared_bytes, stream: Stream(stream), early };
        let instance = instance(parts);
        py.detach(|| {
            let function = Device::get(device)?.function(&instance, &compiler(nvrtc, cache)?)?;
            // SAFETY: the test promises what the kernel needs.
            unsafe { function.launch_bytes(&launch, parameters) }
        })?;
        Ok(())
    }

    /// Copies `bytes` bytes between any two addresses on a stream and waits.
    #[pyfunction]
    pub fn cuda_copy(py: Python, device: usize, target: u64, source: u64, bytes: usize, stream: usize) -> PyResult<()> {
        py.detach(|| {
            let device = Device::get(device)?;
            // SAFETY: the test promises two live ranges and a stream of the device.
            unsafe { device.copy(target, source, bytes, Stream(stream)) }?;
            // SAFETY: as above.
            unsafe { device.synchronize(Stream(stream)) }
        })?;
        Ok(())
    }

    /// Sets `bytes` bytes at an address on a stream and waits.
    #[pyfunction]
    pub fn cuda_fill(py: Python, device: usize, target: u64, value: u8, bytes: usize, stream: usize) -> PyResult<()> {
        py.detach(|| {
            let device = Device::get(device)?;
            // SAFETY: the test promises a live range and a stream of the device.
            unsafe { device.fill(target, value, bytes, Stream(stream)) }?;
            // SAFETY: as above.
            unsafe { device.synchronize(Stream(stream)) }
        })?;
        Ok(())
    }
}

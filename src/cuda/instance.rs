//! Kernels for exact template arguments, compiled to CUBIN through the disk cache.

use std::fmt;
use std::sync::Arc;

use super::arch::Arch;
use super::cache::{DiskCache, Key};
use super::nvrtc::{Nvrtc, Output, Unit};
use super::sources::{SOURCES, expect_source};
use crate::backend::threads;
use crate::error::{Error, Result};

/// One kernel with its template arguments. Shows as the C++ expression, e.g. `attend<half, 128, 2>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Instance {
    /// Of `kernels/`, the one that defines the kernel.
    pub file: String,
    pub kernel: String,
    /// As C++ text; none for a kernel that is no template.
    pub arguments: Vec<String>,
}

impl fmt::Display for Instance {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.kernel)?;
        if self.arguments.is_empty() { Ok(()) } else { write!(formatter, "<{}>", self.arguments.join(", ")) }
    }
}

/// A kernel for one architecture.
pub struct Compiled {
    pub output: Output,
    /// It came from the disk cache.
    pub cached: bool,
}

/// NVRTC and the disk cache in front of it.
pub struct Compiler {
    nvrtc: Arc<Nvrtc>,
    cache: DiskCache,
}

impl Compiler {
    pub fn new(nvrtc: Arc<Nvrtc>, cache: DiskCache) -> Self {
        Self { nvrtc, cache }
    }

    pub fn nvrtc(&self) -> &Nvrtc {
        &self.nvrtc
    }

    /// The CUBIN of one kernel, from disk if it was ever made on this machine by the same compiler from the same sources.
    pub fn compile(&self, instance: &Instance, arch: Arch) -> Result<Compiled> {
        expect_source(&instance.file)?;
        self.expect_architecture(arch)?;
        let (expression, options) = (instance.to_string(), options(arch));
        let key = self.key(&instance.file, &expression, &options);
        if let Some(output) = self.cache.load(&key) {
            return Ok(Compiled { output, cached: true });
        }
        let output = self.nvrtc.compile(&Unit {
            source: &format!("#include \"{}\"\n", instance.file),
            headers: SOURCES,
            expression: &expression,
            options: &options,
        })?;
        self.cache.store(&key, &output);
        Ok(Compiled { output, cached: false })
    }

    /// [`Self::compile`] for every job on all threads, results in order; `done(i)` is called as soon as job i has its result.
    pub fn compile_many(
        &self,
        jobs: &[(Instance, Arch)],
        done: impl Fn(usize, &Result<Compiled>) + Sync,
    ) -> Vec<Result<Compiled>> {
        threads::share(jobs.len(), threads::num_threads(), |index| {
            let (instance, arch) = &jobs[index];
            let result = self.compile(instance, *arch);
            done(index, &result);
            result
        })
    }

    fn expect_architecture(&self, arch: Arch) -> Result<()> {
        if self.nvrtc.architectures().contains(&arch.capability) {
            return Ok(());
        }
        let (major, minor) = self.nvrtc.version();
        let known: Vec<_> = self.nvrtc.architectures().iter().map(|number| format!("sm_{number}")).collect();
        Err(Error::Unsupported {
            name: arch.to_string(),
            reason: format!("NVRTC {major}.{minor} ({}) compiles for {}", self.nvrtc.path(), known.join(", ")),
        })
    }

    /// Everything that the CUBIN depends on.
    fn key(&self, file: &str, expression: &str, options: &[String]) -> String {
        let (major, minor) = self.nvrtc.version();
        let compiler = format!("{major}.{minor} {}", self.nvrtc.file_bytes());
        let key = SOURCES.iter().fold(Key::default(), |key, (name, text)| key.with(name).with(text));
        let key = key.with(file).with(expression).with(compiler).with(env!("CARGO_PKG_VERSION"));
        options.iter().fold(key, Key::with).finish()
    }
}

fn options(arch: Arch) -> Vec<String> {
    [
        &format!("--gpu-architecture={arch}"),
        "--std=c++17",
        "--device-as-default-execution-space", // helpers are for the device without saying so
        "--ptxas-options=-v",                  // registers, spills and shared memory in the log
    ]
    .map(Into::into)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_shows_as_its_expression() {
        let mut instance = Instance { file: "a.cuh".into(), kernel: "skvq::fill".into(), arguments: vec![] };
        assert_eq!(instance.to_string(), "skvq::fill");
        instance.arguments = vec!["half".into(), "128".into()];
        assert_eq!(instance.to_string(), "skvq::fill<half, 128>");
    }
}

//! Kernels on NVIDIA GPUs: compiled at run time for exactly what is asked, kept on disk, launched on torch's streams.
//!
//! The way of a kernel: `sources` (embedded text) → `instance` (template arguments, architecture) → `cache` (disk) or `nvrtc` → `device`
//! (loaded into torch's context) → `launch`. Nothing is opened before it is used: without a driver or a compiler the rest of the crate
//! works, and asking for them is an error that says what is missing.

pub mod arch;
pub mod cache;
pub mod device;
pub mod driver;
pub mod instance;
pub mod launch;
pub mod nvrtc;
pub mod sources;
mod symbols;

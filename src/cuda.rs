//! Kernels on NVIDIA GPUs: compiled at run time for exactly what is asked, kept on disk, launched on torch's streams.
//!
//! The way of a kernel: `sources` (embedded text) → `instance` (template arguments, architecture) → `cache` (disk) or `nvrtc` → `device`
//! (loaded into torch's context) → `launch`. `store` is a layer's cache there: its `pages` in lent `memory`, its `constants`, and the
//! `kernels` that it launches with `params`. Nothing is opened before it is used: without a driver or a compiler the rest of the crate
//! works, and asking for them is an error that says what is missing.

pub mod arch;
pub mod cache;
mod constants;
pub mod device;
pub mod driver;
pub mod instance;
mod kernels;
pub mod launch;
pub mod memory;
pub mod nvrtc;
pub mod pages;
pub mod params;
pub mod sources;
pub mod store;
mod symbols;

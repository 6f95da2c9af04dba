//! Embeds the CUDA kernels: a table of the name and the text of every `kernels/*.cuh`, which `src/cuda/sources.rs` includes.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo names the package's folder"));
    let kernels = root.join("kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());

    let entries = headers(&kernels).into_iter().map(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("kernels have plain names");
        format!("    ({name:?}, include_str!({:?})),\n", path.display().to_string())
    });
    let table = format!("&[\n{}]\n", entries.collect::<String>());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names the folder of what is built"));
    fs::write(out.join("kernel_sources.rs"), table).expect("the folder of what is built can be written");
}

/// Sorted, so that the same kernels make the same table and with it the same keys of compiled kernels.
fn headers(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("the kernels can be listed").path());
    let mut headers: Vec<_> = paths.filter(|path| path.extension().is_some_and(|name| name == "cuh")).collect();
    headers.sort();
    headers
}

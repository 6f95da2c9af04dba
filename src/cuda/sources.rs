//! The texts of all kernels, `kernels/*.cuh`, as NVRTC takes them: every file under its name is a header to every other.
//!
//! The table is made by `build.rs`: a new file in that folder is in it.

use crate::error::{Error, Result};

/// (name, text), by name.
pub const SOURCES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/kernel_sources.rs"));

/// Refuses a file that is not among the kernels.
pub fn expect_source(file: &str) -> Result<()> {
    if SOURCES.iter().any(|(name, _)| *name == file) {
        return Ok(());
    }
    let names: Vec<_> = SOURCES.iter().map(|(name, _)| *name).collect();
    Err(Error::value("file", format!("one of the kernel files {}", names.join(", ")), format!("{file:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sorted_and_hold_no_zero_byte() {
        assert!(SOURCES.is_sorted_by(|a, b| a.0 < b.0));
        assert!(SOURCES.iter().all(|(_, text)| !text.contains('\0')));
    }

    #[test]
    fn an_unknown_file_is_refused_by_name() {
        let message = expect_source("nope.cuh").unwrap_err().to_string();
        assert!(message.contains("one of the kernel files") && message.ends_with("found \"nope.cuh\""), "{message}");
    }
}

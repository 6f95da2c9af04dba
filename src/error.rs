//! The one error type of the crate.
//!
//! Every variant carries the data of its message: which argument, what was found, what was expected.
//! `py.rs` turns it into `skvq._native.SkvqError` once, at the seam; nothing here knows Python.

use std::fmt::Display;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A tensor has the wrong rank or sizes. `expected` names the axes, e.g. `[batch, 8, tokens, 128]`.
    #[error("{name}: expected shape {expected}, found {found:?}")]
    Shape { name: String, expected: String, found: Vec<i64> },

    #[error("{name}: expected dtype {expected}, found {found}")]
    Dtype { name: String, expected: String, found: String },

    #[error("{name}: expected a tensor on {expected}, found one on {found}")]
    Device { name: String, expected: String, found: String },

    /// A number, name or list outside what the argument allows.
    #[error("{name}: expected {expected}, found {found}")]
    Value { name: String, expected: String, found: String },

    /// A row with a NaN or an infinity, refused before anything was stored.
    #[error("{name}: expected finite values, found a NaN or an infinity at batch {batch}, head {head}, token {token}")]
    NonFinite { name: String, batch: usize, head: usize, token: usize },

    /// A legal combination that this build does not implement.
    #[error("{name} is not supported: {reason}")]
    Unsupported { name: String, reason: String },

    /// An object that cannot be read or written through `DLPack`.
    #[error("{name}: {reason}")]
    Dlpack { name: String, reason: String },

    /// A call that does not fit the present state of a store, e.g. a batch that changed since the last append.
    #[error("{operation}: expected {expected}, found {found}")]
    State { operation: String, expected: String, found: String },

    /// A machine on which no CUDA kernel can run. `advice` says what would change that.
    #[error("CUDA cannot be used: {reason}; {advice}")]
    NoCuda { reason: String, advice: String },

    /// A call of the CUDA driver that failed.
    #[error("{call}: {name} ({code}): {text}")]
    Cuda { call: String, code: i32, name: String, text: String },

    /// The run-time compiler at `path` cannot be opened, or a call of it failed for another reason than the source.
    #[error("{call} of the CUDA compiler {path}: {reason}")]
    Nvrtc { path: String, call: String, reason: String },

    /// A kernel that the run-time compiler refuses.
    #[error("kernel {instance} does not compile with {options}:\n{log}")]
    Compile { instance: String, options: String, log: String },
}

impl Error {
    pub fn shape(name: impl Into<String>, expected: impl Into<String>, found: &[i64]) -> Self {
        Self::Shape { name: name.into(), expected: expected.into(), found: found.to_vec() }
    }

    pub fn dtype(name: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self::Dtype { name: name.into(), expected: expected.into(), found: found.to_string() }
    }

    pub fn value(name: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self::Value { name: name.into(), expected: expected.into(), found: found.to_string() }
    }

    pub fn dlpack(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Dlpack { name: name.into(), reason: reason.into() }
    }

    pub fn no_cuda(reason: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::NoCuda { reason: reason.into(), advice: advice.into() }
    }

    pub fn nvrtc(path: impl Into<String>, call: impl Into<String>, reason: impl Display) -> Self {
        Self::Nvrtc { path: path.into(), call: call.into(), reason: reason.to_string() }
    }

    pub fn state(operation: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self::State { operation: operation.into(), expected: expected.into(), found: found.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn a_message_names_argument_expectation_and_finding() {
        let cases = [
            (
                Error::shape("keys", "[batch, 8, tokens, 128]", &[1, 2]),
                "keys: expected shape [batch, 8, tokens, 128], found [1, 2]",
            ),
            (Error::dtype("query", "float32", "int64"), "query: expected dtype float32, found int64"),
            (Error::value("group_size", "a divisor of 80", 64), "group_size: expected a divisor of 80, found 64"),
            (
                Error::NonFinite { name: "keys".into(), batch: 1, head: 2, token: 3 },
                "keys: expected finite values, found a NaN or an infinity at batch 1, head 2, token 3",
            ),
            (Error::dlpack("values", "call .detach() first"), "values: call .detach() first"),
            (Error::state("append", "batch 2", 3), "append: expected batch 2, found 3"),
            (Error::no_cuda("no driver", "install one"), "CUDA cannot be used: no driver; install one"),
            (
                Error::nvrtc("/lib/libnvrtc.so", "dlopen", "no such file"),
                "dlopen of the CUDA compiler /lib/libnvrtc.so: no such file",
            ),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }
}

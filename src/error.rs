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
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }
}

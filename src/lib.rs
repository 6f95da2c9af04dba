//! skvq: a low-bit key/value cache. This crate holds the packed storage, the codec and the attention on packed bytes; `py` and `dlpack`
//! bind them to Python, nothing else knows of it. The way of a token: `layer` → `backend` → `codec`, `transform`, `format` → `page`.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod codebook;
pub mod codec;
pub mod cuda;
mod dlpack;
pub mod error;
pub mod format;
pub mod layer;
pub mod page;
pub mod parts;
mod py;
pub mod tensor;
pub mod transform;

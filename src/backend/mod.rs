//! Where rows are encoded, decoded and attended to. `cpu` is the only backend so far; its inner loops are in `simd`.

pub mod attend;
pub mod cpu;
pub mod noise;
pub mod simd;
pub mod threads;
pub mod weights;

#[cfg(test)]
mod tests;

//! The linear map of a calibrated head (FORMAT.md §6): y = M·u when a row is packed, u = B·y when it is read.

use std::sync::OnceLock;

use crate::backend::simd::{Isa, rows};
use crate::error::{Error, Result};

/// M and B of one head, `[D, D]` each, laid out so that every product adds multiples of contiguous vectors in one order.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Column c of M is `forward[c·D..][..D]`.
    forward: Vec<f32>,
    /// Row c of B is `inverse[c·D..][..D]`, which is column c of Bᵀ.
    inverse: Vec<f32>,
    /// Column j of B, from the first row that is read on: keys are attended to without.
    inverse_columns: OnceLock<Vec<f32>>,
}

impl Matrix {
    /// From M and B by rows, `[D, D]` each.
    pub fn new(forward: &[f32], inverse: &[f32], head_dim: usize) -> Result<Self> {
        for (name, matrix) in [("matrix", forward), ("inverse", inverse)] {
            if matrix.len() != head_dim * head_dim {
                return Err(Error::value(name, format!("{head_dim} x {head_dim} numbers"), matrix.len()));
            }
            // all of them, without a way out of the loop: several at once
            if !matrix.iter().fold(true, |finite, value| finite & value.is_finite()) {
                return Err(Error::value(name, "finite numbers", "a NaN or an infinity"));
            }
        }
        let forward = transposed(forward, head_dim);
        Ok(Self { forward, inverse: inverse.to_vec(), inverse_columns: OnceLock::new() })
    }

    /// The columns of M, one after the other.
    pub fn forward(&self) -> &[f32] {
        &self.forward
    }

    /// The rows of B.
    pub fn inverse(&self) -> &[f32] {
        &self.inverse
    }

    /// The columns of B.
    pub fn inverse_columns(&self) -> &[f32] {
        self.inverse_columns.get_or_init(|| transposed(&self.inverse, self.inverse.len().isqrt()))
    }

    /// u = B·y.
    pub fn restore(&self, isa: Isa, y: &[f32], u: &mut [f32]) {
        rows::multiply_columns(isa, self.inverse_columns(), y, u);
    }

    /// q' = Bᵀ·q: with it, q·(B·y) = q'·y.
    pub fn fold(&self, isa: Isa, query: &[f32], folded: &mut [f32]) {
        rows::multiply_columns(isa, &self.inverse, query, folded);
    }

    /// y = M·u in the order of FORMAT.md §6, in scalar arithmetic: the oracle of the vector kernels.
    pub fn apply_plainly(&self, u: &[f32], y: &mut [f32]) {
        multiply_plainly(&self.forward, u, y);
    }

    /// `restore` in scalar arithmetic.
    pub fn restore_plainly(&self, y: &[f32], u: &mut [f32]) {
        multiply_plainly(self.inverse_columns(), y, u);
    }
}

fn transposed(matrix: &[f32], width: usize) -> Vec<f32> {
    let mut columns = Vec::with_capacity(matrix.len());
    for column in 0..width {
        columns.extend(matrix[column..].iter().step_by(width));
    }
    columns
}

fn multiply_plainly(columns: &[f32], x: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (factor, column) in x.iter().zip(columns.chunks_exact(out.len())) {
        for (sum, value) in out.iter_mut().zip(column) {
            *sum += value * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_matrices() {
        let d = 48;
        let forward: Vec<f32> = (0..d * d).map(|i| ((i * 31 % 97) as f32 - 48.0) / 50.0).collect();
        let inverse: Vec<f32> = (0..d * d).map(|i| ((i * 17 % 89) as f32 - 44.0) / 40.0).collect();
        let matrix = Matrix::new(&forward, &inverse, d).unwrap();
        let x: Vec<f32> = (0..d).map(|i| (i as f32 * 0.7).sin()).collect();
        let product = |m: &dyn Fn(usize, usize) -> f32| -> Vec<f64> {
            (0..d).map(|i| (0..d).map(|j| f64::from(m(i, j)) * f64::from(x[j])).sum()).collect()
        };
        let expected = [
            product(&|i, j| forward[i * d + j]),
            product(&|i, j| inverse[i * d + j]),
            product(&|i, j| inverse[j * d + i]),
        ];
        for isa in Isa::available() {
            let mut found = vec![vec![0.0; d]; 3];
            rows::multiply_columns(isa, matrix.forward(), &x, &mut found[0]);
            matrix.restore(isa, &x, &mut found[1]);
            matrix.fold(isa, &x, &mut found[2]);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(found.iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4), "{isa}");
            }
            let mut plain = vec![0.0; d];
            matrix.apply_plainly(&x, &mut plain);
            assert_eq!(plain, found[0], "{isa}");
        }
        assert!(Matrix::new(&forward[1..], &inverse, d).is_err());
        assert!(Matrix::new(&forward, &vec![f32::NAN; d * d], d).is_err());
    }
}

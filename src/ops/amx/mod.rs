//! F32 products on a processor's matrix unit (AMX), each number as a sum of bfloat16 numbers.
//!
//! ```text
//! C[t, n] = keep C + alpha sum_k A[t, k] B[k, n]
//! x = x_0 + x_1 + ..., x_0 the nearest bfloat16 of x, x_1 that of x - x_0
//! a b = sum_{i + j < P} a_i b_j
//! ```
//!
//! A bfloat16 has 8 bits of significand, P of them 8 P: what is left out of a product is three times 2^-16 of it at most with
//! P = 2, about F32's own rounding with P = 3. Sums are F32's. The unit multiplies a tile of 16 rows and 32 columns with one of
//! 32 rows and 16 columns in 16 cycles, 16 times the rate of F32 on 512 bits; P = 2 takes three such products, P = 3 six.
//! How a sum is formed depends on k alone.

// Elsewhere nothing reads what nobody multiplies.
#![cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code))]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod kernel;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod pack;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod product;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use elsewhere::{columns, has, product};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use product::{columns, has, product};

use super::gemm::Matrix;
use super::linear::Weight;
use crate::ggml::Device;
use crate::{Error, Result};

/// Refuses what only a matrix unit makes faster, where there is none.
///
/// # Errors
/// [`Error::Invalid`], naming the option.
pub fn wants_matrix_unit(option: &str, device: Device) -> Result<()> {
    let got = match device.is_host() {
        false => device.to_string(),
        true if !has() => "one without".to_string(),
        true => return Ok(()),
    };
    let expected = "a processor with a matrix unit (AMX, on Linux)";
    Err(Error::invalid(option, expected, got, "leave it out: products are in F32 then"))
}

/// `C[t, n] = keep C + alpha sum_k A[t, k] B[k, n]`.
#[derive(Clone, Copy)]
pub(super) struct Product<'w> {
    /// t, n, k.
    pub sizes: [usize; 3],
    /// Rows are contiguous.
    pub a: Matrix<*const f32>,
    pub b: Factor<'w>,
    /// Rows are contiguous.
    pub c: Matrix<*mut f32>,
    /// Whether C is added to; else it is not read.
    pub keep: bool,
    pub alpha: f32,
    /// P is 2; else 3.
    pub rounded: bool,
}

/// B `[k, n]`.
#[derive(Clone, Copy)]
pub(super) enum Factor<'w> {
    /// In memory; rows, or columns, are contiguous.
    Memory(Matrix<*const f32>),
    /// Columns are rows of a weight, from this one on.
    Columns(&'w Weight, usize),
    /// Rows are those of a weight, from this column of it on, a whole block's first.
    Rows(&'w Weight, usize),
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod elsewhere {
    pub(in super::super) fn has() -> bool {
        false
    }

    pub(in super::super) fn columns() -> Option<usize> {
        None
    }

    pub(in super::super) unsafe fn product(_: super::Product<'_>) {
        unreachable!("there is no such unit")
    }
}

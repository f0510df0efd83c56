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
pub(super) use elsewhere::{COLUMNS, has, product};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use product::{COLUMNS, has, product};

use super::gemm::{Factor, Product};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod elsewhere {
    pub(in super::super) fn has() -> bool {
        false
    }

    pub(in super::super) const COLUMNS: usize = 0;

    pub(in super::super) unsafe fn product(_: super::Product<'_>) {
        unreachable!("there is no such unit")
    }
}

//! Products with quantised weights as the whole numbers that they are, and activations in fixed point.
//!
//! ```text
//! y[n, t] = sum_b scale[n, b] d[b, t] (sum_{k in b} q[n, k] p[k, t]) + add[n, b] (sum_{k in b} x[k, t])
//! x[k, t] = d[b, t] p[k, t], rounded; p whole, -16383 to 16383
//! ```
//!
//! b: 32 neighbours of k, for which the weight is `scale q + add`; of Q4_K and Q5_K, where the scales of 32 are factors of q, two
//! such blocks have one scale and one d. The inner sum is one of whole numbers, exact, and takes
//! half as many instructions as in F32, for one multiplies and adds two pairs of 16 bits in a lane (VNNI,
//! `vpdpwssd`). An activation is off by at most 1/32766 of the largest of its block, 250 times less than in the 8 bits
//! that ggml's products have. Lanes of a vector are columns: what becomes of a column depends neither on the others nor on
//! their number, nor on that of the threads.

#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod wide;
#[cfg(target_arch = "x86_64")]
mod work;

#[cfg(not(target_arch = "x86_64"))]
pub(super) use elsewhere::{COLUMNS, has, product, run, scratch, serves};
#[cfg(target_arch = "x86_64")]
pub(super) use wide::{COLUMNS, has, product};
#[cfg(target_arch = "x86_64")]
pub(super) use work::{run, scratch, serves};

#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    use super::super::gemm::Product;
    use super::super::narrow::Narrow;
    use crate::ggml::Type;

    pub(in super::super) const COLUMNS: usize = 0;

    pub(in super::super) fn has() -> bool {
        false
    }

    pub(in super::super) unsafe fn product(_: Product<'_>) {
        unreachable!("there are no such products")
    }

    pub(in super::super) fn serves(_: Type) -> bool {
        false
    }

    pub(in super::super) fn scratch(_: usize, _: usize) -> usize {
        0
    }

    pub(in super::super) unsafe fn run(_: Narrow<'_>) {
        unreachable!("no type is served")
    }
}

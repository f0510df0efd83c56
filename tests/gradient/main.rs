//! Every op of `src/ops` (and the ggml ops that training differentiates) against slow, plain f64.
//!
//! Forward: the kernel's result beside [`reference`]. Vjp: the kernel's cotangents beside central
//! finite differences of the reference, contracted with random cotangents; for every element of a
//! small input, along random directions of a large one. Every graph runs twice, the second time in
//! memory full of NaN, and must give the same bits: nothing reads what was not written, and nothing
//! depends on the timing of threads.
//!
//! Errors are `||got - want|| / ||want||`. What f32 allows: a sum of n products in f32 is off by
//! `2^-24 sqrt(n)` or so of its terms' norm, so that with n up to 1000 a product of matrices comes to
//! 1e-6, and two in a row (vjp of attention, log-prob) with an exponential between to a few times
//! that. [`EXACT`] leaves a factor of ten. Where terms cancel or logits are large, the test says so and
//! has its own bound.

mod attention;
mod conv;
mod delta;
mod distill;
mod divergence;
mod experts;
mod harness;
mod linear;
mod logprob;
mod memory;
mod policies;
mod reference;
mod rowwise;

/// Relative error that f32 rounding explains in one to three products of matrices; see above.
const EXACT: f64 = 1e-5;

/// Where the exact result is zero because terms of size 1 cancel: with the floor of
/// [`harness::close`], 1e-6 for each element.
const CANCELLED: f64 = 1e-4;

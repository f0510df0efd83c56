//! Our ops: what llama.cpp lacks for training on quantised weights and for internal policies.
//!
//! One file each: contract and formula, the graph node, the CPU kernel (a `GGML_OP_CUSTOM` callback that
//! every thread of the backend runs), and the vjp. `tests/gradient.rs` holds each against a slow, plain
//! reference and against finite differences.

mod attention;
mod exp;
mod gemm;
mod linear;
mod logprob;
mod norm;
mod policies;
mod queue;
mod rows;
mod swiglu;

pub use attention::{AttentionSaved, AttentionSpec, Segment, attention, attention_back};
pub(crate) use exp::exp as exp_fast;
pub use linear::{LowRank, linear, linear_back, outer};
pub use logprob::{Logprob, linear_logprob, logprob_tiles_bytes};
pub use norm::{rms_norm, rms_norm_back};
pub use policies::{Answers, Compare, Policies, policies};
pub use rows::scale_rows;
pub use swiglu::{swiglu, swiglu_back};

//! Our ops: what llama.cpp lacks for training on quantised weights and for internal policies.
//!
//! One file each: contract and formula, the graph node, the CPU kernel (a `GGML_OP_CUSTOM` callback that
//! every thread of the backend runs), and the vjp. `tests/gradient.rs` holds each against a slow, plain
//! reference and against finite differences.

mod adamw;
mod amx;
mod attention;
mod conv;
mod decode_attention;
mod delta;
mod distill;
mod divergence;
mod exp;
mod experts;
mod fixed;
mod gate_rows;
mod gemm;
mod glu;
mod linear;
mod logits;
mod logprob;
mod low_rank;
mod narrow;
mod norm;
mod panel;
mod partials;
mod policies;
mod products;
mod queue;
mod rows;
mod scratch;
mod segments;
mod yardstick;

pub use adamw::{AdamWStep, adamw, sum_squares};
pub use attention::{AttentionSaved, AttentionSpec, attention, attention_back, attention_kept};
pub use conv::{MAX_CONV, conv_silu, conv_silu_back};
pub(crate) use decode_attention::{MOST_HEADS, decode_attention};
pub use delta::{DeltaInputs, DeltaSaved, DeltaSpec, delta, delta_back, delta_flop, delta_kept};
pub use distill::{DistillSpec, Distilled, DivergenceKind, distill, distill_tiles_bytes};
pub use divergence::{Divergence, divergence};
pub(crate) use exp::exp as exp_fast;
pub use experts::{
    Columns, Gating, RouteSpec, Routes, experts, experts_back, experts_back_sum, experts_outer,
    experts_sum, route, route_back, route_order, slot_weights, weights_back,
};
pub use gate_rows::{gate_rows, gate_rows_back};
pub use gemm::wants_fast_products;
pub use glu::{Activation, glu, glu_back};
pub use linear::{LowRank, dequantised, linear, linear_back, outer};
pub use logits::{Head, LogitMap};
pub use logprob::{Logprob, linear_logprob, logprob_tiles_bytes};
pub use low_rank::add_low_rank;
pub(crate) use low_rank::factor_product;
pub use norm::{rms_norm, rms_norm_back};
pub use policies::{Answers, Compare, Policies, pass_columns, policies};
pub use products::{ProductKernel, faster_from, product};
pub(crate) use products::{weight_product, wide_from, wide_product};
pub use rows::scale_rows;
pub use scratch::{ScratchShape, scratch_bytes};
pub use segments::Segment;
pub use yardstick::Yardstick;

//! Training.

mod advantage;
mod loss;
mod micro_batch;
mod optimizer;
mod schedule;

pub use advantage::{Baseline, advantages};
pub use loss::{Aggregation, LossConfig, TokenContext, TokenLoss, token_loss};
pub use schedule::Schedule;

//! Rollouts: prompts to tokens, continuous batching over llama.cpp, sampling.

mod encode;
mod sampler;
mod scheduler;
mod sizes;

pub use encode::{Encoder, PromptOptions, Said, Turns};
pub use sampler::{Sampler, Sampling};
pub use scheduler::{Completion, Finish, Progress, Request, Rollouts, Watcher};
pub use sizes::{RolloutOptions, RolloutSizes};

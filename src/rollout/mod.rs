//! Rollouts: prompts to tokens, continuous batching over llama.cpp, sampling.

mod encode;
mod sampler;
mod scheduler;

pub use encode::{Encoder, PromptOptions, Said, Turns};
pub use sampler::{Sampler, Sampling};
pub use scheduler::{
    Completion, Finish, Progress, Request, RolloutOptions, RolloutSizes, Rollouts, Watcher,
};

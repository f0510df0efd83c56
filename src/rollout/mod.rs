//! Rollouts: prompts to tokens, continuous batching over llama.cpp, sampling.

mod dialogue;
mod encode;
mod run;
mod sampler;
mod scheduler;
mod sizes;
mod watch;

pub use dialogue::{Answer, Partner, Segment, Which};
pub use encode::{Conversation, Encoder, PromptOptions, Said, Turns};
pub use sampler::{Sampler, Sampling};
pub use scheduler::{Completion, Finish, Request, Rollouts};
pub use sizes::{RolloutOptions, RolloutSizes};
pub use watch::{Progress, Watcher};

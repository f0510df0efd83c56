//! Rollouts: prompts to tokens, continuous batching over llama.cpp, sampling.

mod dialogue;
mod encode;
mod request;
mod run;
mod sampler;
mod scheduler;
mod sizes;
mod timing;
mod watch;

pub use dialogue::{Answer, Partner, Segment, Which};
pub use encode::{Conversation, Encoder, PromptOptions, Said, Turns};
pub use request::{Completion, Finish, Request};
pub use sampler::{Sampler, Sampling};
pub use scheduler::Rollouts;
pub use sizes::{Decoding, RolloutOptions, RolloutSizes};
pub use timing::Timing;
pub use watch::{Progress, Watcher};

use crate::ggml::Device;
use crate::team::Team;
use crate::{Error, Result};

/// Whether completions are to be the same whoever is decoded beside them: where it is `wanted`, and where several ranks
/// sample, for who samples what is a matter of time. GPUs have no kernels for it.
///
/// # Errors
/// [`Error::Invalid`] where it is wanted on a GPU.
pub fn invariant(wanted: bool, device: Device, team: &Team) -> Result<bool> {
    if wanted {
        let advice = "leave it out: a GPU's kernels depend on how many are decoded at once";
        on_host("--batch-invariant", device, advice)?;
    }
    Ok(device.is_host() && (wanted || !team.is_alone()))
}

/// Refuses an option that means something to products on the CPU alone.
///
/// # Errors
/// [`Error::Invalid`] on a GPU.
pub fn on_host(option: &str, device: Device, advice: &str) -> Result<()> {
    match device.is_host() {
        true => Ok(()),
        false => Err(Error::invalid(option, "--device cpu", device.to_string(), advice)),
    }
}

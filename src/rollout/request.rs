//! What is asked of rollouts, and what they give.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A prompt and how many completions of it are wanted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Prompt tokens, not empty.
    pub prompt_tokens: Vec<i32>,
    /// Completions.
    pub n: usize,
    /// Tells the random numbers of requests apart; with the seed and a completion's index it is their key.
    pub seed_stream: u64,
    /// A completion ends at this length.
    pub max_tokens: usize,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finish {
    /// An end-of-generation token was sampled; it is the last of the tokens.
    Eog,
    /// The length limit.
    Length,
}

/// One sampled completion.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Completion {
    /// Token ids, at least one.
    pub tokens: Vec<i32>,
    /// Log-prob of each under the full policy at the sampling temperature, nats.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
    /// The experts that the prompt's tokens took, then those of its own that were read (all but the last): see
    /// [`crate::llama::Context::experts`]; empty where they are not kept.
    pub experts: Vec<i16>,
}

/// The random numbers of one completion.
pub(super) fn rng(seed: u64, stream: u64, index: usize) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&stream.to_le_bytes());
    key[16..24].copy_from_slice(&(index as u64).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

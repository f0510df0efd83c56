//! How many sequences are sampled at once, and what that takes.

use crate::llama;
use crate::model::{Config, LayerConfig};
use crate::{Error, Result};

/// Sequences at once beyond which a decode gains nothing.
pub(super) const MAX_PARALLEL: usize = 256;
/// Memory for keys and values at most, where no option says how much.
const KV_BYTES: usize = 1 << 30;

/// Limits of the rollout engine.
#[derive(Clone, Copy, Debug)]
pub struct RolloutOptions {
    /// Longest prompt plus completion, tokens.
    pub n_ctx_seq: usize,
    /// Memory for keys and values.
    pub kv_bytes: usize,
}

/// What becomes of [`RolloutOptions`] for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RolloutSizes {
    /// Sequences at once.
    pub n_seq: usize,
    /// Tokens that a sequence may hold, rounded up as llama.cpp does.
    pub n_ctx_seq: usize,
    /// Tokens in one call.
    pub n_batch: usize,
    /// Sequences beside those, which keep a prompt.
    pub n_kept: usize,
    /// Bytes of keys and values, and of states, of one sequence.
    pub sequence_bytes: usize,
}

impl RolloutSizes {
    /// Bytes of keys and values, and of states.
    pub fn bytes(&self) -> usize {
        (self.n_seq + self.n_kept) * self.sequence_bytes
    }
}

/// Sizes of the largest decode of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoding {
    /// Tokens of a call.
    pub tokens: usize,
    /// Tokens that one of them may see.
    pub keys: usize,
    /// Tokens whose logits are there at once.
    pub logits: usize,
}

impl Decoding {
    /// What llama.cpp's graph takes beside keys, values and states, bytes: the FFN is its widest place, the mask has a row of
    /// each token.
    pub fn bytes(self, config: &Config) -> usize {
        let n_ff = config.most(LayerConfig::ffn_width);
        let graph = 4 * self.tokens * (3 * n_ff + 4 * config.n_embd);
        graph + 6 * self.tokens * self.keys + 4 * config.n_vocab * self.logits
    }

    /// The same on the CPU, where the rows of factors are quantised, and each thread that draws tokens sorts a vocabulary.
    pub fn host_bytes(self, config: &Config, threads: usize) -> usize {
        let widest = config.most(LayerConfig::ffn_width).max(config.n_embd);
        self.bytes(config) + 2 * self.tokens * widest + threads * 8 * config.n_vocab
    }
}

impl RolloutOptions {
    /// Memory for `n` sequences of so many tokens, or for as many as a GiB holds; for one in any case.
    ///
    /// # Errors
    /// See [`llama::Model::kv_token_bytes`].
    pub fn new(n_ctx_seq: usize, n: usize, model: &llama::Model) -> Result<RolloutOptions> {
        let options = RolloutOptions { n_ctx_seq, kv_bytes: KV_BYTES };
        let kv_bytes = KV_BYTES.max(options.sequence_bytes(model)?);
        RolloutOptions { kv_bytes, ..options }.at_most(n, model)
    }

    /// The same with memory for `n` sequences at most, where no more are ever wanted.
    ///
    /// # Errors
    /// See [`llama::Model::kv_token_bytes`].
    pub fn at_most(self, n: usize, model: &llama::Model) -> Result<RolloutOptions> {
        let n = n.max(1).saturating_add(kept_for_prompts(model)?);
        let wanted = self.sequence_bytes(model)?.saturating_mul(n);
        Ok(RolloutOptions { kv_bytes: self.kv_bytes.min(wanted), ..self })
    }

    fn sequence_bytes(&self, model: &llama::Model) -> Result<usize> {
        Ok(self.n_ctx_seq.next_multiple_of(256) * model.kv_token_bytes()? + model.state_bytes()?)
    }

    /// As many sequences as the memory for keys and values allows.
    ///
    /// # Errors
    /// [`Error::Invalid`] when not even one sequence fits.
    pub fn sizes(&self, model: &llama::Model) -> Result<RolloutSizes> {
        let n_ctx_seq = self.n_ctx_seq.next_multiple_of(256);
        let sequence_bytes = self.sequence_bytes(model)?;
        let most = (self.kv_bytes / sequence_bytes).min(llama::max_sequences()).min(MAX_PARALLEL);
        let n_kept = kept_for_prompts(model)?;
        let n_seq = most.saturating_sub(n_kept);
        if n_seq == 0 {
            let least = ((1 + n_kept) * sequence_bytes).div_ceil(1 << 20);
            let prompt = if n_kept > 0 { " and its prompt's" } else { "" };
            return Err(Error::invalid(
                "--kv-mib",
                format!("at least {least} MiB for one sequence{prompt}"),
                format!("{} MiB", self.kv_bytes >> 20),
                "raise it, or lower --max-response",
            ));
        }
        // What all sequences hold is the most that a call can have; it sizes what a decode takes beside its cache.
        let n_batch = PREFILL_TOKENS.min(n_seq * n_ctx_seq).max(n_seq).max(n_ctx_seq);
        Ok(RolloutSizes { n_seq, n_ctx_seq, n_batch, n_kept, sequence_bytes })
    }
}

/// Sequences beside those that are sampled: where they have states, which cannot forget, one keeps the prompt.
fn kept_for_prompts(model: &llama::Model) -> Result<usize> {
    Ok((model.state_bytes()? > 0) as usize)
}

/// Tokens of prompts that are decoded in one call.
pub(super) const PREFILL_TOKENS: usize = 2048;

//! One step on given rollouts, without sampling: for checks against other trainers.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use super::Trainer;
use super::learner::UpdateConfig;
use super::objective::{Objective, PolicyGradient};
use super::response::{Response, ResponseGroup};
use super::tally::Tally;
use crate::data::{CompletionContent, RolloutRow};
use crate::ggml::TensorSet;
use crate::model::Lora;
use crate::{Error, Result};

/// What a replayed step gave.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Replay {
    /// Layer of the policy.
    pub layer: usize,
    /// Loss of the one mini batch.
    pub loss: f32,
    /// Tokens that the gradient came from.
    pub tokens: usize,
    /// Mean entropy, nats.
    pub entropy_nats: f32,
    /// Share of clipped tokens.
    pub clip_fraction: f32,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f32,
}

impl Trainer<'_> {
    /// Takes the rows as the first step's rollouts, in one mini batch, and makes its optimiser step.
    /// The gradients (before clipping) are written to `dump`.
    ///
    /// # Errors
    /// A row without reward, tokens outside the vocabulary, a gradient that is not finite.
    pub fn replay(&mut self, rows: &[RolloutRow], dump: Option<&Path>) -> Result<Replay> {
        let (phase, policy) = self.phase(1)?;
        let c = &self.settings;
        let config = self.update_config(phase, policy);
        let Objective::PolicyGradient(settings) = config.objective else {
            return Err(Error::invalid(
                "--rollouts",
                "an --algo that learns from rewards",
                c.algo.name(),
                "give the rows with --data",
            ));
        };
        if let Some(row) = rows.iter().find(|row| row.completions.is_empty()) {
            let place = format!("--rollouts, line {}", row.line);
            let advice = "give each prompt the completions that were sampled for it";
            return Err(Error::invalid(
                place,
                "a row with completions and rewards",
                "none",
                advice,
            ));
        }
        let mut groups: Vec<ResponseGroup> =
            rows.iter().map(|row| self.response_group(row)).collect::<Result<_>>()?;
        // Given rows say nothing of the engine that sampled them, and are one mini batch.
        let settings = PolicyGradient { tis_cap: 0.0, ..settings };
        let objective = Objective::PolicyGradient(settings);
        let config = UpdateConfig { objective, mini_batch: groups.len(), ..config };
        let learning_rate = c.lr * c.schedule.factor(1, c.steps, c.warmup);
        self.learner.prepare(&mut groups, &config)?;
        let mut tally = Tally::default();
        let applied =
            self.learner.update(&groups, &config, learning_rate, &mut tally, &mut |_| ())?;
        if let Some(path) = dump {
            dump_gradients(&self.learner.lora, &self.learner.gradients, path)?;
        }
        if !applied {
            return Err(Error::engine(
                "replaying the rollouts",
                "the loss or the gradient is not finite",
                "look at the rows' rewards and old_logprobs",
            ));
        }
        let tokens = tally.tokens.max(1) as f64;
        Ok(Replay {
            layer: policy.depth(),
            loss: tally.loss as f32,
            tokens: tally.tokens,
            entropy_nats: (tally.entropy / tokens) as f32,
            clip_fraction: (tally.clipped as f64 / tokens) as f32,
            gradient_norm: tally.gradient_norm as f32,
        })
    }

    fn response_group(&self, row: &RolloutRow) -> Result<ResponseGroup> {
        let place = || format!("line {}", row.line);
        let prompt = self.encoder.prompt(&row.prompt, self.settings.max_prompt)?;
        let mut responses = Vec::with_capacity(row.completions.len());
        for completion in &row.completions {
            let tokens = match &completion.content {
                CompletionContent::Tokens(tokens) => tokens.clone(),
                CompletionContent::Text(text) => self.encoder.completion(text)?,
            };
            let reward = completion.reward.ok_or_else(|| {
                Error::invalid(place(), "a reward for each completion", "none", "add `reward`")
            })?;
            if let Some(old) = &completion.old_logprobs
                && old.len() != tokens.len()
            {
                let (expected, got) =
                    (format!("{} old_logprobs", tokens.len()), old.len().to_string());
                return Err(Error::invalid(place(), expected, got, "give one per token"));
            }
            let old = completion.old_logprobs.clone();
            responses.push(Response { tokens, reward, old, ..Response::default() });
        }
        Ok(ResponseGroup { prompt, responses })
    }
}

/// Writes gradients as safetensors: `blk.0.attn_q.weight.lora_a`, .. in F32, rows first:
/// A `[rank, n_in]`, B `[n_out, rank]`, of experts stacked, the bytes as in the adapter GGUF.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written.
pub fn dump_gradients(lora: &Lora, gradients: &TensorSet, path: &Path) -> Result<()> {
    let bytes: Vec<Vec<u8>> = (0..gradients.len())
        .map(|i| gradients.values(i).iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let refused = |e: safetensors::SafeTensorError| {
        Error::engine(format!("writing {}", path.display()), e.to_string(), "report it")
    };
    let mut views = Vec::with_capacity(bytes.len());
    for (i, bytes) in bytes.iter().enumerate() {
        let [columns, rows, experts, _] = gradients.get(i).shape();
        let mut shape = vec![rows, columns];
        if lora.slots()[i / 2].n_expert > 1 {
            shape.insert(0, experts);
        }
        let view = TensorView::new(Dtype::F32, shape, bytes).map_err(refused)?;
        views.push((lora.tensor_name(i), view));
    }
    let file = safetensors::serialize(views, None).map_err(refused)?;
    crate::gguf::write_atomically(path, |w| {
        std::io::Write::write_all(w, &file).map_err(Error::io("write", path))
    })
}

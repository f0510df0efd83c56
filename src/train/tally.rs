//! What is counted over the tokens of a step.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// Sums over the tokens of mini batches.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Tokens that were scored.
    pub tokens: usize,
    /// Loss of each mini batch, added up.
    pub loss: f64,
    /// Entropies, nats.
    pub entropy: f64,
    /// Clipped tokens.
    pub clipped: usize,
    /// KL estimates, nats.
    pub kl: f64,
    /// |log-prob of rollout - log-prob before the update|, nats.
    pub drift: f64,
    /// Tokens of which both are known.
    pub drift_tokens: usize,
    /// Mini batches.
    pub updates: usize,
    /// Gradient norms, added up.
    pub gradient_norm: f64,
    /// Updates skipped for a gradient that was not finite.
    pub skipped: usize,
    /// Loss of the critic in each mini batch, added up.
    pub value_loss: f64,
    /// Sum and number of what an objective says of itself, by the field's names.
    notes: BTreeMap<Cow<'static, str>, (f64, usize)>,
}

impl Tally {
    /// Takes a value into the mean of this name.
    pub fn note(&mut self, name: &'static str, value: f64) {
        let (sum, n) = self.notes.entry(name.into()).or_default();
        *sum += value;
        *n += 1;
    }

    /// Adds the sums of a part.
    pub fn add(&mut self, part: Tally) {
        self.tokens += part.tokens;
        self.loss += part.loss;
        self.entropy += part.entropy;
        self.clipped += part.clipped;
        self.kl += part.kl;
        self.drift += part.drift;
        self.drift_tokens += part.drift_tokens;
        self.updates += part.updates;
        self.gradient_norm += part.gradient_norm;
        self.skipped += part.skipped;
        self.value_loss += part.value_loss;
        for (name, (sum, n)) in part.notes {
            let all = self.notes.entry(name).or_default();
            (all.0, all.1) = (all.0 + sum, all.1 + n);
        }
    }

    /// The means.
    pub fn means(&self) -> impl Iterator<Item = (&str, f64)> + '_ {
        self.notes.iter().map(|(name, (sum, n))| (name.as_ref(), sum / *n as f64))
    }
}

//! Which settings cannot work.

use super::row_options::{refuse_meaningless, refuse_without_env};
use super::{Algorithm, Baseline, TrainConfig};
use crate::{Error, Result};

impl TrainConfig {
    /// Refuses settings that cannot work, before anything is loaded or written.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        let refuse = |option: &str, expected: &str, got: String, advice: &str| {
            Err(Error::invalid(option, expected, got, advice))
        };
        self.placement()?;
        self.rewards.check()?;
        self.dialogues.check()?;
        refuse_without_env(self)?;
        if !(0.0..=1.0).contains(&self.turn_discount) {
            let got = self.turn_discount.to_string();
            return refuse("--turn-discount", "0 to 1", got, "leave it out for 1");
        }
        self.sampling.check()?;
        refuse_meaningless(self)?;
        self.rows.check(self.algo)?;
        let alone = !self.algo.is_rewarded()
            || matches!(self.given_baseline(), Baseline::Batch | Baseline::Value);
        if self.group < 2 && !(alone && self.group == 1) {
            let advice = "advantages compare completions of one prompt; try 8";
            return refuse("--group", "at least 2", self.group.to_string(), advice);
        }
        if self.objective.is_some() && self.algo != Algorithm::Bupo {
            let advice = "leave --objective out, or choose --algo bupo";
            return refuse("--objective", "--algo bupo beside it", self.algo.name(), advice);
        }
        if self.objective.is_some_and(|o| o == Algorithm::Bupo || !o.is_rewarded()) {
            let advice = "leave it out for grpo; sft and its like have an internal phase of their own: --algo sft --internal-steps N";
            let got = self.objective.map_or(String::new(), Algorithm::name);
            return refuse("--objective", "an algorithm with rewards, not bupo", got, advice);
        }
        if let Some(steps) = self.internal_steps.filter(|&n| n > 0)
            && !self.algo.has_internal_phase()
        {
            let algo = self.algo.name();
            let advice = format!("for an internal phase of {algo}: --algo bupo --objective {algo}");
            let expected = format!("none or 0 beside --algo {algo}");
            return refuse("--internal-steps", &expected, steps.to_string(), &advice);
        }
        for (option, value) in [
            ("--prompts-per-step", self.prompts_per_step),
            ("--rank", self.rank),
            ("--mini-batch", self.given_mini_batch()),
            ("--micro-batch-tokens", self.micro_batch_tokens.unwrap_or(1)),
            ("--max-prompt", self.max_prompt.unwrap_or(1)),
            ("--max-response", self.max_response.unwrap_or(1)),
            ("--eval-problems", self.eval_problems),
            ("--eval-samples", self.eval_samples),
            ("--steps", self.steps as usize),
            ("--kv-mib", self.kv_mib.unwrap_or(1)),
        ] {
            if value == 0 {
                return refuse(option, "at least 1", "0".into(), "leave it out for the default");
            }
            // Products of them are sizes, which must not overflow.
            if option != "--steps" && value > 1 << 20 {
                let expected = format!("at most {}", 1 << 20);
                return refuse(option, &expected, value.to_string(), "lower it");
            }
        }
        if self.given_mini_batch() > self.prompts_per_step {
            let expected = format!("at most --prompts-per-step ({})", self.prompts_per_step);
            return refuse(
                "--mini-batch",
                &expected,
                self.given_mini_batch().to_string(),
                "lower it",
            );
        }
        if self.old_from_rollout && self.given_baseline() == Baseline::Value {
            let (got, advice) =
                ("--baseline value".into(), "leave it out: values need that forward");
            return refuse("--old-from-rollout", "a baseline without a value head", got, advice);
        }
        if self.early_stop > 0 && self.eval_every == 0 {
            let advice = "say how often to look with --eval-every";
            return refuse("--early-stop", "--eval-every N", "0".into(), advice);
        }
        if self.algo == Algorithm::Kto && self.given_mini_batch() < 2 {
            let advice = "KTO compares a prompt with the next row's completion; raise it";
            return refuse(
                "--mini-batch",
                "at least 2",
                self.given_mini_batch().to_string(),
                advice,
            );
        }
        let (loss, lr) = (self.given_loss(), self.lr.unwrap_or(1.0));
        for (option, value, ok, expected) in [
            (
                "--temperature",
                self.sampling.temperature,
                self.sampling.temperature > 0.0,
                "above 0",
            ),
            ("--lr", lr, lr > 0.0, "above 0"),
            ("--clip-low", loss.clip_low, (0.0..=1.0).contains(&loss.clip_low), "0 to 1"),
            ("--clip-high", loss.clip_high, loss.clip_high >= 0.0, "at least 0"),
            ("--gamma", self.gamma, (0.0..=1.0).contains(&self.gamma), "0 to 1"),
            ("--gae-lambda", self.gae_lambda, (0.0..=1.0).contains(&self.gae_lambda), "0 to 1"),
            ("--value-lr", self.value_lr, self.value_lr > 0.0, "above 0"),
            (
                "--loraplus-lr-ratio",
                self.loraplus_lr_ratio,
                self.loraplus_lr_ratio > 0.0,
                "above 0",
            ),
            ("--lr-above", self.lr_above, self.lr_above >= 0.0, "at least 0"),
            ("--clip-c", self.clip_c, self.clip_c > 1.0, "above 1"),
            ("--kl-coef", self.kl_coef, self.kl_coef >= 0.0, "at least 0"),
            ("--tis-cap", self.tis_cap, self.tis_cap >= 0.0, "at least 0"),
            ("--beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "0 to below 1"),
            ("--beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "0 to below 1"),
            ("--adam-eps", self.adam_eps, self.adam_eps > 0.0, "above 0"),
            ("--weight-decay", self.weight_decay, self.weight_decay >= 0.0, "at least 0"),
            ("--clip-norm", self.clip_norm, self.clip_norm >= 0.0, "at least 0"),
        ] {
            if !(ok && value.is_finite()) {
                return refuse(option, expected, value.to_string(), "leave it out for the default");
            }
        }
        Ok(())
    }
}

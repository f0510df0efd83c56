//! Options of the objectives that learn from given rows or from a teacher, and which options mean what to whom.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{Algorithm, TrainConfig};
use crate::ops::DivergenceKind;
use crate::rollout::Turns;
use crate::{Error, Result};

/// What a preference is measured from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// The base model: adapter off.
    Base,
    /// The adapter that the run began from (--adapter).
    Start,
}

/// The loss of a pair in DPO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DpoLoss {
    /// Log-loss of the preference, with conservative label smoothing.
    Sigmoid,
    /// Log-loss, unbiased under labels of which a share is wrong.
    Robust,
    /// Squared distance of the margin from 1 / (2 beta).
    Ipo,
    /// What the margin lacks of 1.
    Hinge,
}

/// Settings of objectives without rewards.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RowOptions {
    /// Times that all rows are gone through; sets --steps
    #[arg(long, value_name = "N", conflicts_with = "steps", help_heading = "Rows and teachers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Rows of more tokens are left out [default: --max-prompt plus --max-response where both are given, else the
    /// model's context]
    #[arg(long, value_name = "TOKENS", help_heading = "Rows and teachers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// Stop at the first row that cannot be used, instead of naming it and going on without it
    #[arg(long, help_heading = "Rows and teachers")]
    pub strict: bool,
    /// sft: the assistant's turns of a conversation that are learnt
    #[arg(long, value_enum, default_value = "all", help_heading = "Rows and teachers")]
    pub turns: Turns,
    /// sft: noise on the embeddings in training, uniform in (-1, 1) times this over the root of tokens times width
    /// (NEFTune; 5 is usual, 0 is none)
    #[arg(long, default_value_t = 0.0, value_name = "ALPHA", help_heading = "Rows and teachers")]
    pub neftune: f32,
    /// dpo: loss of a pair
    #[arg(long, value_enum, default_value = "sigmoid", help_heading = "Rows and teachers")]
    pub dpo_loss: DpoLoss,
    /// dpo, kto: how much a log-ratio counts; orpo: weight of the odds ratio; simpo: of the mean log-prob [default: 0.1,
    /// simpo: 2]
    #[arg(long, value_name = "X", help_heading = "Rows and teachers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f32>,
    /// dpo (sigmoid, robust): share of labels that are taken to be wrong
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Rows and teachers")]
    pub label_smoothing: f32,
    /// simpo: margin that the preferred completion is to have
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Rows and teachers")]
    pub simpo_gamma: f32,
    /// kto: weight of completions with the label true
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Rows and teachers")]
    pub desirable_weight: f32,
    /// kto: weight of completions with the label false
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Rows and teachers")]
    pub undesirable_weight: f32,
    /// dpo, kto: what log-ratios are taken to: the base model, or the adapter that the run began from
    #[arg(long, value_enum, default_value = "base", help_heading = "Rows and teachers")]
    pub reference: Reference,
    /// distill: the teacher, a GGUF with the same vocabulary; the model's own file is read once
    #[arg(long, value_name = "MODEL", help_heading = "Rows and teachers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
    /// distill: adapter of the teacher
    #[arg(long, value_name = "FILE", help_heading = "Rows and teachers")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_adapter: Option<PathBuf>,
    /// distill: reverse KL(student || teacher), forward KL(teacher || student), or Jensen-Shannon between them
    #[arg(long, value_enum, default_value = "reverse", help_heading = "Rows and teachers")]
    pub divergence: DivergenceKind,
    /// distill: weight of the teacher in the mixture of --divergence jsd
    #[arg(long, default_value_t = 0.5, value_name = "X", help_heading = "Rows and teachers")]
    pub jsd_beta: f32,
}

impl Default for RowOptions {
    fn default() -> RowOptions {
        crate::options::defaults()
    }
}

impl RowOptions {
    /// `--beta`, or the algorithm's.
    pub fn beta(&self, algo: Algorithm) -> f32 {
        self.beta.unwrap_or(if algo == Algorithm::Simpo { 2.0 } else { 0.1 })
    }

    /// Refuses values that cannot work.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub(super) fn check(&self, algo: Algorithm) -> Result<()> {
        let beta = self.beta(algo);
        let smoothing = self.label_smoothing;
        for (option, value, ok, expected) in [
            ("--beta", beta, beta > 0.0, "above 0"),
            ("--label-smoothing", smoothing, (0.0..0.5).contains(&smoothing), "0 to below 0.5"),
            ("--neftune", self.neftune, self.neftune >= 0.0, "at least 0"),
            ("--simpo-gamma", self.simpo_gamma, self.simpo_gamma >= 0.0, "at least 0"),
            ("--desirable-weight", self.desirable_weight, self.desirable_weight > 0.0, "above 0"),
            (
                "--undesirable-weight",
                self.undesirable_weight,
                self.undesirable_weight > 0.0,
                "above 0",
            ),
            (
                "--jsd-beta",
                self.jsd_beta,
                self.jsd_beta > 0.0 && self.jsd_beta < 1.0,
                "between 0 and 1",
            ),
        ] {
            if !(ok && value.is_finite()) {
                let advice = "leave it out for the default";
                return Err(Error::invalid(option, expected, value.to_string(), advice));
            }
        }
        for (option, value) in
            [("--epochs", self.epochs.map(|n| n as usize)), ("--max-length", self.max_length)]
        {
            if value.is_some_and(|n| n == 0 || n > 1 << 20) {
                let got = value.unwrap_or_default().to_string();
                let expected = format!("1 to {}", 1 << 20);
                return Err(Error::invalid(option, expected, got, "leave it out for the default"));
            }
        }
        if algo == Algorithm::Distill && self.teacher.is_none() {
            let advice =
                "name the teacher's GGUF; the model's own file distils it into its adapter";
            return Err(Error::invalid("--algo distill", "--teacher MODEL", "none", advice));
        }
        Ok(())
    }
}

/// Names of options, and to whom they mean something.
type Meaning = (&'static [&'static str], fn(Algorithm) -> bool);

/// Options that mean something to dialogues alone.
const OF_DIALOGUES: &[&str] = &[
    "env-workers",
    "env-timeout",
    "env-lag",
    "max-turns",
    "max-turn-tokens",
    "max-dialogue-seconds",
    "tool-format",
    "turn-discount",
    "turn-credit",
];

/// Options that mean something to some algorithms alone, and to which.
const MEANINGS: [Meaning; 9] = [
    (
        &[
            "curriculum",
            "drop-long-prompts",
            "answer-column",
            "difficulty-column",
            "eval-samples",
            "reward",
            "reward-workers",
            "reward-timeout",
            "judge-rubric",
            "judge-retries",
            "judge-batch",
            "objective",
            "baseline",
            "ratio",
            "surrogate",
            "loss-agg",
            "clip-low",
            "clip-high",
            "clip-c",
            "resample",
            "gamma",
            "gae-lambda",
            "value-lr",
            "kl-coef",
            "tis-cap",
            "old-from-rollout",
            "env",
        ],
        Algorithm::is_rewarded,
    ),
    (OF_DIALOGUES, Algorithm::is_rewarded),
    (
        &[
            "group",
            "temperature",
            "top-p",
            "top-k",
            "min-p",
            "kv-mib",
            "exact-rollouts",
            "batch-invariant",
        ],
        |algo| algo.is_rewarded() || algo == Algorithm::Distill,
    ),
    (&["epochs", "max-length", "strict"], |algo| !algo.is_rewarded()),
    (&["turns", "neftune"], |algo| algo == Algorithm::Sft),
    (&["dpo-loss", "label-smoothing"], |algo| algo == Algorithm::Dpo),
    (&["beta"], |algo| {
        matches!(algo, Algorithm::Dpo | Algorithm::Kto | Algorithm::Orpo | Algorithm::Simpo)
    }),
    (&["reference"], |algo| matches!(algo, Algorithm::Dpo | Algorithm::Kto)),
    (&["teacher", "teacher-adapter", "divergence", "jsd-beta"], |algo| algo == Algorithm::Distill),
];
/// The same of one algorithm each.
const OWN: [(&str, Algorithm); 3] = [
    ("simpo-gamma", Algorithm::Simpo),
    ("desirable-weight", Algorithm::Kto),
    ("undesirable-weight", Algorithm::Kto),
];

/// Refuses the first option that differs from its default and means nothing to the algorithm.
///
/// # Errors
/// [`Error::Invalid`] naming it.
pub(super) fn refuse_meaningless(config: &TrainConfig) -> Result<()> {
    let algo = config.algo;
    let of_many = MEANINGS.iter().filter(|(_, means)| !means(algo)).flat_map(|(names, _)| *names);
    let of_one = OWN.iter().filter(|(_, one)| *one != algo).map(|(name, _)| name);
    refuse(config, of_many.chain(of_one), || {
        format!("options that mean something to --algo {}", algo.name())
    })
}

/// Refuses options of sampling where rows with completions are given.
///
/// # Errors
/// [`Error::Invalid`] naming one.
pub(super) fn refuse_sampling(config: &TrainConfig) -> Result<()> {
    let names = ["group", "top-p", "top-k", "min-p", "kv-mib", "exact-rollouts"];
    refuse(config, names.iter(), || "rows without completions beside it, to sample them".into())
}

/// Refuses options of dialogues where there are none, and those of single answers where there are.
///
/// # Errors
/// [`Error::Invalid`] naming one.
pub(super) fn refuse_without_env(config: &TrainConfig) -> Result<()> {
    if config.dialogues.is_some() {
        let expected = || "--env without it: an opening is taken whole or not at all".into();
        return refuse(config, ["drop-long-prompts"].iter(), expected);
    }
    refuse(config, OF_DIALOGUES.iter(), || "--env beside it".into())
}

fn refuse<'n>(
    config: &TrainConfig,
    mut names: impl Iterator<Item = &'n &'n str>,
    expected: impl FnOnce() -> String,
) -> Result<()> {
    let (given, default) = (config.table()?, TrainConfig::default().table()?);
    match names.find(|name| given.get(**name) != default.get(**name)) {
        None => Ok(()),
        Some(name) => {
            let got = given.get(*name).map_or("none".into(), |value| value.to_string());
            Err(Error::invalid(format!("--{name}"), expected(), got, "leave it out"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_setting() {
        let words: Vec<String> = "train --algo distill --teacher t --teacher-adapter a --epochs 2 --max-length 9 --beta 1 \
             --reward math --objective grpo --baseline group --ratio token --surrogate clip --loss-agg constant \
             --clip-low 0.1 --clip-high 0.1 --resample 1 --kv-mib 3 --answer-column a --difficulty-column d \
             --judge-rubric r --env env:guess --env-lag 1 --max-turn-tokens 5 --tool-format hermes"
            .split_whitespace()
            .map(String::from)
            .collect();
        let all = toml::Table::try_from(TrainConfig::from_words(&words).unwrap()).unwrap();
        let names = MEANINGS.iter().flat_map(|(names, _)| *names).chain(OWN.iter().map(|(n, _)| n));
        for name in names {
            assert!(all.contains_key(*name), "{name} is no setting");
        }
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        for (words, name) in [
            ("--algo sft --reward math", "--reward"),
            ("--algo sft --kl-coef 0.1", "--kl-coef"),
            ("--algo dpo --group 4", "--group"),
            ("--algo dpo --neftune 5", "--neftune"),
            ("--algo kto --dpo-loss ipo", "--dpo-loss"),
            ("--algo grpo --teacher t.gguf", "--teacher"),
            ("--algo bupo --epochs 2", "--epochs"),
            ("--algo orpo --reference start", "--reference"),
            ("--algo sft --simpo-gamma 2", "--simpo-gamma"),
            ("--algo dpo --undesirable-weight 2", "--undesirable-weight"),
            ("--algo sft --env env:guess", "--env"),
        ] {
            let words = format!("train {words}");
            let words: Vec<String> = words.split_whitespace().map(String::from).collect();
            let error = TrainConfig::from_words(&words).unwrap().check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: expected options that mean")), "{error}");
        }
    }
}

//! Where training looks inside the model: the choice of the internal layer, and the probe.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::source::{Source, With};
use super::{Settings, Trainer};
use crate::analysis::{self, Probe, Sample};
use crate::model::{Engine, Lora, Model};
use crate::rollout::{Request, Rollouts};
use crate::{Error, Result};

/// Prompts that are answered for it.
const PROMPTS: u64 = 16;
/// Tokens that are looked at in one go, at most: enough for weights to be read at a few bytes a token, few enough for the hidden
/// states of all layers, which are kept until the end.
const TOKENS: usize = 512;
/// Keeps the random numbers of these answers apart from those of training and evaluation.
const STREAM: u64 = 2 << 48;

/// `--internal-layer`: a number, or to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum LayerChoice {
    /// The boundary layer of the model on the training prompts.
    Auto,
    /// This layer, from 1.
    Layer(usize),
}

/// As it stands in `config.toml`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Number(usize),
    Word(String),
}

impl TryFrom<Written> for LayerChoice {
    type Error = String;

    fn try_from(written: Written) -> std::result::Result<LayerChoice, String> {
        match written {
            Written::Number(layer) => Ok(LayerChoice::Layer(layer)),
            Written::Word(word) => word.parse(),
        }
    }
}

impl From<LayerChoice> for Written {
    fn from(choice: LayerChoice) -> Written {
        match choice {
            LayerChoice::Auto => Written::Word("auto".into()),
            LayerChoice::Layer(layer) => Written::Number(layer),
        }
    }
}

impl std::str::FromStr for LayerChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<LayerChoice, String> {
        match text {
            "auto" => Ok(LayerChoice::Auto),
            number => number
                .parse()
                .map(LayerChoice::Layer)
                .map_err(|_| format!("expected auto or a layer from 1, got '{text}'")),
        }
    }
}

/// Tokens that are looked at in one go at most, and how many of them are of answers, where the longest prompt with its answer, and
/// the longest answer, have so many.
pub(super) fn look_tokens(settings: &Settings, [whole, answer]: [usize; 2]) -> [usize; 2] {
    let all = PROMPTS as usize;
    let tokens = budget(settings).max(whole).min(all * whole);
    [tokens, tokens.min(all * answer)]
}

fn budget(settings: &Settings) -> usize {
    settings.micro_batch_tokens.min(TOKENS)
}

/// What answers the first training prompts.
struct Answers<'t> {
    prompts: Vec<Vec<i32>>,
    rollouts: &'t mut Rollouts,
    max_response: usize,
    sampling: crate::rollout::Sampling,
    seed: u64,
}

impl Answers<'_> {
    /// One completion for each of the prompts, by whatever adapter is on.
    fn sample(self, stop: &AtomicBool) -> Result<Vec<Sample>> {
        let request = |(prompt_tokens, i)| Request {
            prompt_tokens,
            n: 1,
            seed_stream: STREAM + i,
            max_tokens: self.max_response,
        };
        let requests: Vec<Request> = self.prompts.into_iter().zip(0..).map(request).collect();
        let sampling = &self.sampling;
        let answers = self.rollouts.generate(&requests, sampling, self.seed, &mut |_| (), stop)?;
        let samples =
            requests.into_iter().zip(answers).enumerate().map(|(row, (r, mut answer))| {
                let prompt: Arc<[i32]> = r.prompt_tokens.into();
                Sample { row, completion: 0, prompt, tokens: answer.remove(0).tokens }
            });
        Ok(samples.collect())
    }
}

/// The layer in the place of `auto`.
pub(super) struct Found {
    pub layer: usize,
    /// Why, where it was looked for.
    pub why: Option<String>,
}

/// Completions to look at: of a few training prompts, or those of a few rows.
fn answers(source: &mut Source, with: With<'_, '_>) -> Result<Vec<Sample>> {
    if let Source::Given(rows) = source {
        let n = PROMPTS.min(rows.len() as u64);
        let samples = (0..n).filter_map(|i| {
            let group = rows.at(i);
            let tokens = group.responses.into_iter().next()?.tokens;
            Some(Sample { row: i as usize, completion: 0, prompt: group.prompt.into(), tokens })
        });
        return Ok(samples.collect());
    }
    let n = source.epoch_len().map_or(PROMPTS, |n| PROMPTS.min(n as u64));
    let mut prompts = Vec::new();
    for i in 0..n {
        prompts.push(source.prompt(with, i)?);
    }
    let c = with.settings;
    let answers = Answers {
        prompts,
        rollouts: source.rollouts().expect("a source that is no rows samples"),
        max_response: c.max_response,
        sampling: c.sampling,
        seed: c.seed,
    };
    answers.sample(with.stop)
}

/// The boundary layer on answers to the first training prompts; the default where no step would use it.
pub(super) fn find(
    model: &Model,
    engine: &mut Engine,
    lora: &Lora,
    source: &mut Source,
    with: With<'_, '_>,
) -> Result<Found> {
    let c = with.settings;
    if c.internal_steps == 0 {
        return Ok(Found { layer: c.internal_layer, why: None });
    }
    let samples = answers(source, with)?;
    let on_gpu = model.engine().free_before().is_some();
    if let Some(rollouts) = source.rollouts().filter(|_| on_gpu) {
        rollouts.release();
    }
    let (norm, budget) = (c.final_norm, budget(c));
    let sums = analysis::sums(engine, model, Some(lora), &samples, norm, budget, with.team)?;
    if on_gpu {
        engine.release();
    }
    let means = sums.means();
    let finite = means.iter().all(|l| l.change(analysis::Change::Ffn).mean.is_finite());
    if !finite {
        return Err(Error::engine(
            "looking for the boundary layer",
            "an entropy is not finite",
            "the model's weights hold values that are not finite; fetch the file again",
        ));
    }
    let boundary = analysis::boundary(&means);
    let why = format!(
        "auto: {} ({} tokens of answers to {} training prompts)",
        boundary.why,
        sums.tokens(),
        samples.len()
    );
    Ok(Found { layer: boundary.recommended, why: Some(why) })
}

impl Trainer<'_> {
    /// What the layers think of the base model's answers to the first training prompts, under the adapter as
    /// it is now. The answers are the same whenever they are sampled.
    pub(super) fn probe_layers(&mut self) -> Result<Probe> {
        if self.probe_set.is_empty() {
            if let Some(rollouts) = self.source.rollouts() {
                rollouts.set_adapter(None)?;
            }
            let with = With {
                settings: &self.settings,
                encoder: &self.encoder,
                stop: &self.stop,
                team: &self.team,
            };
            let answers = answers(&mut self.source, with);
            if let Some(rollouts) = self.source.rollouts() {
                rollouts.set_adapter(Some(self.learner.lora.live(self.model)?))?;
            }
            self.probe_set = answers?;
        }
        self.end_rollouts()?;
        let c = &self.settings;
        let (layer, norm) = (c.internal_layer, c.final_norm);
        let (learner, budget) = (&mut self.learner, budget(c));
        let (engine, lora) = (&mut learner.engine, Some(&learner.lora));
        let probe = analysis::probe(
            engine,
            self.model,
            lora,
            &self.probe_set,
            layer,
            norm,
            budget,
            &self.team,
        )?;
        self.end_updates()?;
        Ok(probe)
    }
}

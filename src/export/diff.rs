//! How far two models are apart on given rows: what a merge, a type or an adapter costs.
//!
//! A is the reference, B what is judged. Rows with completions are scored as they are; for others A samples
//! completions first. At every completion token, with exact forwards of both:
//!
//! ```text
//! KL(A || B) = sum_v p_A (log p_A - log p_B)        perplexity = exp(-mean log p(token))
//! ```
//!
//! Where answers are known, both sides also answer every problem, with the same random numbers, and are judged.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::data::{CompletionContent, Problem, SourceOptions, Template};
use crate::data::{ProblemSource, RolloutRow, read_rollouts, rollouts, tasks::is_task};
use crate::ggml::ThreadPool;
use crate::model::{Batch, ComparedModel, Engine, Lora, Model, compare};
use crate::reward::{Judge, JudgeOptions, JudgePool, Sampler};
use crate::rollout::{Encoder, Request, RolloutOptions, Rollouts, Sampling};
use crate::{Error, Result};

/// Tokens that go through the models together.
const BATCH_TOKENS: usize = 2048;
/// Keeps the random numbers apart from those of training, as evaluations do.
const STREAM: u64 = 1 << 48;

/// How two models are compared.
#[derive(Args, Clone, Debug)]
pub struct DiffConfig {
    /// Rows at most
    #[arg(long, default_value_t = 200, value_name = "N", help_heading = "Comparison")]
    pub rows: usize,
    /// Completions that are sampled for each row without any
    #[arg(long, default_value_t = 1, value_name = "K", help_heading = "Comparison")]
    pub samples: usize,
    /// Sampled completions end at this length [default: 512, or what the context leaves]
    #[arg(long, value_name = "TOKENS", value_parser = crate::options::at_least_one, help_heading = "Comparison")]
    pub max_response: Option<usize>,
    /// Sampling temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Comparison")]
    pub temperature: f32,
    /// How answers are judged, as in `train`
    #[arg(long, default_value = "boxed", value_name = "SPEC", help_heading = "Comparison")]
    pub reward: String,
    /// chat (the GGUF's own), qwen3, qwen3-no-think, octothinker, plain, or a Jinja file
    #[arg(long, default_value = "chat", value_name = "NAME", help_heading = "Comparison")]
    pub template: String,
    /// System message, in place of the one that a prompt brings along
    #[arg(long, value_name = "TEXT", help_heading = "Comparison")]
    pub system: Option<String>,
    /// Same seed, same rows and completions
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Comparison")]
    pub seed: u64,
}

/// One side: a model, with an adapter or without.
pub struct Side<'s> {
    /// Model.
    pub model: &'s Model,
    /// Adapter.
    pub lora: Option<Lora>,
}

/// Where the largest divergence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Row of the data, from 0.
    pub row: usize,
    /// Completion of the row, from 0.
    pub completion: usize,
    /// Token of the completion, from 0.
    pub token: usize,
}

/// What a comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// Rows.
    pub rows: usize,
    /// Completion tokens that were compared.
    pub tokens: usize,
    /// Mean of KL(A || B) over tokens, nats.
    pub kl_mean_nats: f64,
    /// The largest.
    pub kl_max_nats: f64,
    /// Where that is.
    pub kl_max_at: Place,
    /// Share of tokens at which both have the same likeliest token.
    pub top1_agreement: f64,
    /// Perplexity of the completions under A.
    pub perplexity_a: f64,
    /// And under B.
    pub perplexity_b: f64,
    /// B's over A's.
    pub perplexity_ratio: f64,
    /// Share of right completions of A, where answers are known.
    pub accuracy_a: Option<f64>,
    /// Of B.
    pub accuracy_b: Option<f64>,
    /// Mean reward of A, where answers are known.
    pub reward_a: Option<f64>,
    /// Of B.
    pub reward_b: Option<f64>,
}

/// A prompt and its completions, in tokens.
struct Group {
    prompt: Vec<i32>,
    completions: Vec<Vec<i32>>,
}

/// (accuracy, mean reward)
type Judged = (f64, f64);

/// Compares two sides on the rows of `data`: a file, or `task:NAME`.
///
/// # Errors
/// Different vocabularies; data that cannot be read or has a row that the models cannot take;
/// [`Error::Interrupted`] when `stop` becomes true.
pub fn diff(
    [a, b]: [&mut Side; 2],
    data: &str,
    config: &DiffConfig,
    pool: &Arc<ThreadPool>,
    stop: &AtomicBool,
) -> Result<Difference> {
    config.check()?;
    same_vocabulary(a.model, b.model)?;
    let rows = Rows::read(data, config)?;
    let (groups, judged) = match rows {
        Rows::Complete(rows) => (a.encode(&rows, config)?, None),
        Rows::Problems(problems) => {
            let (groups, of_a) = a.answer(&problems, config, pool, stop)?;
            let (_, of_b) = b.answer(&problems, config, pool, stop)?;
            (groups, Some((of_a, of_b)))
        }
    };
    let mut sums = Sums::default();
    let engine = |side: &Side| Engine::on(side.model.device(), pool.clone());
    let mut engines = [engine(a)?, engine(b)?];
    let [engine_a, engine_b] = &mut engines;
    let mut p = ComparedModel { engine: engine_a, model: a.model, lora: a.lora.as_ref() };
    let mut q = ComparedModel { engine: engine_b, model: b.model, lora: b.lora.as_ref() };
    let mut batch = Batch::default();
    let mut places = Vec::new();
    for (row, group) in groups.iter().enumerate() {
        if stop.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let lengths = group.completions.iter().map(Vec::len);
        if !batch.is_empty()
            && batch.len() + Batch::group_len(group.prompt.len(), lengths) > BATCH_TOKENS
        {
            sums.add(&mut p, &mut q, &batch, &places)?;
            (batch, places) = (Batch::default(), Vec::new());
        }
        let completions: Vec<&[i32]> = group.completions.iter().map(Vec::as_slice).collect();
        batch.push_group(&group.prompt, &completions, a.model.config().n_vocab)?;
        for (completion, tokens) in completions.iter().enumerate() {
            places.extend((0..tokens.len()).map(|token| Place { row, completion, token }));
        }
    }
    sums.add(&mut p, &mut q, &batch, &places)?;
    sums.difference(groups.len(), judged).ok_or_else(|| {
        Error::invalid(data, "rows with completion tokens", "none", "add completions or problems")
    })
}

impl DiffConfig {
    fn check(&self) -> Result<()> {
        for (option, value) in [("--rows", self.rows), ("--samples", self.samples)] {
            if value == 0 {
                return Err(Error::invalid(option, "at least 1", "0", "leave it out"));
            }
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let got = self.temperature.to_string();
            return Err(Error::invalid("--temperature", "0 or more", got, "leave it out for 1"));
        }
        Ok(())
    }
}

/// Token for token the same spelling: else the distributions are over different things.
fn same_vocabulary(a: &Model, b: &Model) -> Result<()> {
    let (va, vb) = (a.engine().vocab(), b.engine().vocab());
    let place = format!("{} and {}", a.name(), b.name());
    let advice = "compare models of one family";
    if va.n_tokens() != vb.n_tokens() {
        let (expected, got) = (format!("{} tokens", va.n_tokens()), vb.n_tokens().to_string());
        return Err(Error::invalid(place, expected, got, advice));
    }
    let differs = (0..va.n_tokens() as i32).find(|&t| va.spelling(t) != vb.spelling(t));
    match differs {
        None => Ok(()),
        Some(t) => {
            let (expected, got) = (format!("token {t} as {:?}", va.spelling(t)), vb.spelling(t));
            Err(Error::invalid(place, expected, format!("{got:?}"), advice))
        }
    }
}

enum Rows {
    /// Rows with completions, or prompts that are answered but not judged.
    Complete(Vec<RolloutRow>),
    /// Problems with answers.
    Problems(Vec<Problem>),
}

impl Rows {
    /// Rows with completions where the first has one, else problems.
    fn read(data: &str, config: &DiffConfig) -> Result<Rows> {
        let path = Path::new(data);
        let is_file = !is_task(data) && path.is_file();
        let first = || rollouts(path).ok()?.next()?.ok();
        if is_file && first().is_some_and(|row| !row.completions.is_empty()) {
            let mut rows = read_rollouts(path)?;
            rows.truncate(config.rows);
            return Ok(Rows::Complete(rows));
        }
        let options = SourceOptions { seed: config.seed, ..SourceOptions::default() };
        let source = ProblemSource::with(data, options)?;
        let most = source.epoch_len().unwrap_or(config.rows).min(config.rows);
        Ok(Rows::Problems(source.eval_problems(most)))
    }
}

impl Side<'_> {
    fn encoder(&self, config: &DiffConfig) -> Result<Encoder<'_>> {
        Encoder::new(self.model, None, config.system.clone())?
            .with_template(&Template::parse(&config.template)?)
    }

    fn encode(&self, rows: &[RolloutRow], config: &DiffConfig) -> Result<Vec<Group>> {
        let encoder = self.encoder(config)?;
        let one = |row: &RolloutRow| {
            let completions = row.completions.iter().map(|completion| match &completion.content {
                CompletionContent::Tokens(tokens) => Ok(tokens.clone()),
                CompletionContent::Text(text) => encoder.completion(text),
            });
            let completions = completions.collect::<Result<Vec<_>>>()?;
            let prompt = encoder.prompt(&row.prompt, usize::MAX)?;
            let longest = completions.iter().map(Vec::len).max().unwrap_or(0);
            let context = self.model.config().n_ctx_train;
            if prompt.len() + longest > context {
                let expected = format!("at most {context} tokens, the model's context");
                let got = format!("{} and {longest}", prompt.len());
                return Err(Error::invalid("prompt and completion", expected, got, "shorten it"));
            }
            Ok(Group { prompt, completions })
        };
        rows.iter()
            .map(|row| {
                one(row).map_err(|e| {
                    let expected = "a row that the model can take";
                    let place = format!("line {}", row.line);
                    Error::invalid(place, expected, e.to_string(), "mend or drop the row")
                })
            })
            .collect()
    }

    /// Samples completions and judges them.
    fn answer(
        &mut self,
        problems: &[Problem],
        config: &DiffConfig,
        pool: &Arc<ThreadPool>,
        stop: &AtomicBool,
    ) -> Result<(Vec<Group>, Judged)> {
        let context = self.model.config().n_ctx_train;
        let mut live = self.lora.take();
        let encoder = self.encoder(config)?;
        let prompts = problems
            .iter()
            .map(|problem| encoder.prompt(&problem.prompt, usize::MAX))
            .collect::<Result<Vec<_>>>()?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let room = context.saturating_sub(longest);
        let max_response = config.max_response.unwrap_or(512.min(room));
        if max_response == 0 || max_response > room {
            let expected = format!("prompts and --max-response within {context} tokens");
            let got = format!("{longest} and {max_response}");
            return Err(Error::invalid("data", expected, got, "lower --max-response"));
        }
        let (engine, wanted) = (self.model.engine(), problems.len() * config.samples);
        let options = RolloutOptions::new(longest + max_response, wanted, engine)?;
        let mut rollouts = Rollouts::new(engine, pool, options)?;
        if let Some(lora) = &mut live {
            rollouts.set_adapter(Some(lora.live(self.model)?))?;
        }
        let requests: Vec<Request> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| Request {
                prompt_tokens: prompt.clone(),
                n: config.samples,
                seed_stream: STREAM + i as u64,
                max_tokens: max_response,
            })
            .collect();
        let timeout = Duration::from_secs(30);
        let judge = Judge::parse(&config.reward, &JudgeOptions::new(max_response, timeout))?;
        let mut sampler = Sampler {
            rollouts: &mut rollouts,
            encoder: &encoder,
            sampling: Sampling { temperature: config.temperature, ..Sampling::default() },
            seed: config.seed,
            stop,
        };
        let judged =
            JudgePool::new(judge, 2)?.sample(&mut sampler, problems, &requests, &mut |_| ())?;
        let n = (problems.len() * config.samples) as f64;
        let all = || judged.iter().flatten();
        let right = all().filter(|one| one.judgement.right).count() as f64 / n;
        let reward = all().map(|one| one.judgement.reward as f64).sum::<f64>() / n;
        let groups = prompts
            .into_iter()
            .zip(judged)
            .map(|(prompt, answers)| Group {
                prompt,
                completions: answers.into_iter().map(|one| one.completion.tokens).collect(),
            })
            .collect();
        drop(encoder);
        self.lora = live;
        Ok((groups, (right, reward)))
    }
}

/// Sums over tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    kl: f64,
    max: Option<(f32, Place)>,
    agree: f64,
    logprob_a: f64,
    logprob_b: f64,
}

impl Sums {
    fn add(
        &mut self,
        p: &mut ComparedModel,
        q: &mut ComparedModel,
        batch: &Batch,
        places: &[Place],
    ) -> Result<()> {
        let found = compare(p, q, batch)?;
        let sum = |x: &[f32]| x.iter().map(|x| *x as f64).sum::<f64>();
        self.tokens += places.len();
        self.kl += sum(&found.kl_nats);
        self.agree += sum(&found.agree);
        self.logprob_a += sum(&found.logprob_p);
        self.logprob_b += sum(&found.logprob_q);
        for (&kl, &place) in found.kl_nats.iter().zip(places) {
            if self.max.is_none_or(|(max, _)| kl > max) {
                self.max = Some((kl, place));
            }
        }
        if !self.kl.is_finite() {
            return Err(Error::engine(
                "comparing the models",
                "logits that are not finite",
                "check both models",
            ));
        }
        Ok(())
    }

    fn difference(self, rows: usize, judged: Option<(Judged, Judged)>) -> Option<Difference> {
        let (kl_max_nats, kl_max_at) = self.max?;
        let n = self.tokens as f64;
        let perplexity = |logprob: f64| (-logprob / n).exp();
        Some(Difference {
            rows,
            tokens: self.tokens,
            // Rounding may leave a zero a little below it.
            kl_mean_nats: (self.kl / n).max(0.0),
            kl_max_nats: kl_max_nats.max(0.0) as f64,
            kl_max_at,
            top1_agreement: self.agree / n,
            perplexity_a: perplexity(self.logprob_a),
            perplexity_b: perplexity(self.logprob_b),
            perplexity_ratio: ((self.logprob_a - self.logprob_b) / n).exp(),
            accuracy_a: judged.map(|((right, _), _)| right),
            accuracy_b: judged.map(|(_, (right, _))| right),
            reward_a: judged.map(|((_, reward), _)| reward),
            reward_b: judged.map(|(_, (_, reward))| reward),
        })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Place { row, completion, token } = self.kl_max_at;
        writeln!(f, "compared          {} tokens of {} rows", self.tokens, self.rows)?;
        writeln!(f, "KL(A || B)        mean {:.3e} nats", self.kl_mean_nats)?;
        writeln!(
            f,
            "                  max {:.3e} (row {row}, completion {completion}, token {token})",
            self.kl_max_nats
        )?;
        writeln!(f, "same top token    {:.2} %", 100.0 * self.top1_agreement)?;
        write!(
            f,
            "perplexity        A {:.4}, B {:.4}, ratio {:.5}",
            self.perplexity_a, self.perplexity_b, self.perplexity_ratio
        )?;
        let pairs = [
            ("accuracy", self.accuracy_a, self.accuracy_b),
            ("mean reward", self.reward_a, self.reward_b),
        ];
        for (name, a, b) in pairs {
            if let (Some(a), Some(b)) = (a, b) {
                write!(f, "\n{name:<18}A {a:.4}, B {b:.4} ({:+.4})", b - a)?;
            }
        }
        Ok(())
    }
}

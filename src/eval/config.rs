//! `bupo-gguf eval` as one struct of settings and one call.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{DialogueEvaluator, EvalOptions, Evaluator, Report, Settings, Store};
use crate::data::{Columns, Problem, ProblemSource, SourceOptions, tasks};
use crate::env::{EnvOptions, EnvPool, Task, task_seed};
use crate::ggml::ThreadPool;
use crate::gguf::sha256;
use crate::model::{Lora, Model};
use crate::reward::RewardOptions;
use crate::rollout::{Encoder, Progress, PromptOptions, RolloutOptions, Rollouts, Sampling};
use crate::team::{Fact, Team};
use crate::{Error, Result};

/// Dialogues that are opened to see how long openings are.
const OPENED: usize = 32;

/// Settings of an evaluation.
#[derive(Args, Clone, Debug)]
pub struct EvalConfig {
    /// Problems: Parquet, JSON lines or CSV files with commas between, or a task (task:add); may be left out with an --env
    /// that has problems of its own
    #[arg(
        long,
        value_name = "FILES|task:NAME",
        required_unless_present = "env",
        help_heading = "Data and reward"
    )]
    pub data: Option<String>,
    /// Evaluate a seeded sample of N problems [default: all; of a task 400]
    #[arg(long, value_name = "N", help_heading = "Data and reward")]
    pub problems: Option<usize>,
    /// How completions are judged.
    #[command(flatten)]
    pub rewards: RewardOptions,
    /// Where prompts, answers and difficulties stand.
    #[command(flatten)]
    pub columns: Columns,
    /// How prompts become tokens.
    #[command(flatten)]
    pub prompts: PromptOptions,
    /// Dialogues in the place of single answers.
    #[command(flatten)]
    pub dialogues: EnvOptions,

    /// Completions per problem: K of avg@K, pass@K, maj@K
    #[arg(long, default_value_t = 1, value_name = "K", help_heading = "Sampling")]
    pub samples: usize,
    /// Prompts longer than this lose their beginning [default: the longest one, at most half of the
    /// context]
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    pub max_prompt: Option<usize>,
    /// Completions end at this length [default: 2048, or what the context leaves]
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    pub max_response: Option<usize>,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Memory for the KV cache at most, MiB; sets how many sequences run at once
    #[arg(long, default_value_t = 1024, value_name = "MIB", help_heading = "Sampling")]
    pub kv_mib: usize,
    /// Sample completions that do not depend on who is decoded beside them; with several MPI ranks always on, on the CPU
    #[arg(long, help_heading = "Sampling")]
    pub batch_invariant: bool,

    /// Adapter (GGUF)
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub adapter: Option<PathBuf>,
    /// Keep settings.json and completions.jsonl in this folder, which must be empty or not exist
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Go on with the evaluation in --out that was ended
    #[arg(long, requires = "out", help_heading = "Run")]
    pub resume: bool,
    /// Same seed, same completions
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Run")]
    pub seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = crate::options::at_least_one, help_heading = "Run")]
    pub threads: Option<usize>,
}

/// SHA-256 of files, one after another.
fn sums(files: &[PathBuf]) -> Result<String> {
    Ok(files.iter().map(|file| sha256(file)).collect::<Result<Vec<_>>>()?.join(" "))
}

impl EvalConfig {
    /// Refuses settings that cannot work.
    fn check(&self) -> Result<()> {
        for (option, value) in [
            ("--samples", self.samples),
            ("--problems", self.problems.unwrap_or(1)),
            ("--max-prompt", self.max_prompt.unwrap_or(1)),
            ("--max-response", self.max_response.unwrap_or(1)),
            ("--kv-mib", self.kv_mib),
        ] {
            if value == 0 {
                let advice = "leave it out for the default";
                return Err(Error::invalid(option, "at least 1", "0", advice));
            }
        }
        self.rewards.check()?;
        self.dialogues.check()?;
        self.sampling.check()
    }

    /// The problems' specification; of an environment without `--data` its own.
    fn data(&self) -> Result<String> {
        let data = self.data.clone().unwrap_or_else(|| self.dialogues.data("", ""));
        match data.is_empty() {
            true => Err(Error::invalid(
                "--data",
                "problems for the program",
                "none",
                "name a file or a task",
            )),
            false => Ok(data),
        }
    }

    /// Limits of prompt and response that fit the model's context; `longest`: tokens of the longest prompt.
    fn lengths(&self, context: usize, longest: usize) -> Result<(usize, usize)> {
        let max_prompt = self.max_prompt.unwrap_or(longest.min(context / 2));
        let room = context.saturating_sub(max_prompt);
        let max_response = self.max_response.unwrap_or(2048.min(room));
        if max_response == 0 || max_response > room {
            let got = format!("{max_prompt} and {max_response}");
            let expected = format!("at most the model's context of {context} tokens");
            let place = "--max-prompt plus --max-response";
            return Err(Error::invalid(place, expected, got, "lower one of them"));
        }
        Ok((max_prompt, max_response))
    }

    /// Samples, judges and counts.
    ///
    /// # Errors
    /// A setting, the data or the adapter does not fit, a reward cannot judge, a file cannot be written;
    /// [`Error::Interrupted`] when `stop` becomes true.
    pub fn run(
        &self,
        model: &Model,
        team: &Team,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Report> {
        self.check()?;
        let batch_invariant =
            crate::rollout::invariant(self.batch_invariant, model.device(), team)?;
        let options = SourceOptions {
            seed: self.seed,
            columns: self.columns.clone(),
            ..SourceOptions::default()
        };
        let data = self.data()?;
        let source = ProblemSource::with(&data, options)?;
        let all = source.epoch_len().unwrap_or(tasks::HELD_OUT);
        let problems = source.eval_problems(self.problems.unwrap_or(all));
        let encoder = self.prompts.encoder(model)?;
        let mut longest = 1;
        let mut pool =
            self.dialogues.is_some().then(|| EnvPool::new(&self.dialogues)).transpose()?;
        match &mut pool {
            // None of an opening can be left out, and not all are looked at.
            Some(pool) => longest = self.opened(&encoder, pool, &problems)?,
            None => {
                for problem in &problems {
                    longest = longest.max(encoder.prompt(&problem.prompt, usize::MAX)?.len());
                }
            }
        }
        let (max_prompt, max_response) = self.lengths(model.config().n_ctx_train, longest)?;
        let mut judges = match pool.is_none() || self.rewards.reward.is_some() {
            true => Some(self.rewards.judges(&data, max_response)?),
            false => None,
        };
        let mut lora = self.adapter.as_ref().map(|path| Lora::load(model, path)).transpose()?;
        let threads = Arc::new(ThreadPool::with(self.threads)?);
        let options =
            RolloutOptions { n_ctx_seq: max_prompt + max_response, kv_bytes: self.kv_mib << 20 };
        let options = options.at_most(problems.len() * self.samples, model.engine())?;
        let mut rollouts = Rollouts::new(model.engine(), &threads, options)?;
        if let Some(lora) = &mut lora {
            rollouts.set_adapter(Some(lora.live(model)?))?;
        }
        rollouts.share(team);
        if batch_invariant {
            rollouts.make_invariant();
        }
        let mut settings = self.settings(model, max_prompt, max_response, problems.len())?;
        if batch_invariant {
            settings.insert("batch_invariant".into(), true.into());
        }
        if !team.is_alone() {
            let text = |value| serde_json::to_string(value).unwrap_or_default();
            team.alike(&[
                Fact::program()?,
                Fact::new("the model's SHA-256", sums(model.files())?, "copy the model's file"),
                Fact::new("settings", text(&settings), "start all ranks with the same options"),
                Fact::new("threads", threads.n_threads().to_string(), "give --threads"),
                Fact::processor(),
            ])?;
        }
        let mut store = match self.out.as_ref().filter(|_| team.is_first()) {
            Some(folder) => Some(if self.resume {
                Store::resume(folder, &settings, problems.len(), self.samples)?
            } else {
                Store::create(folder, &settings)?
            }),
            None => None,
        };
        let options = EvalOptions {
            samples: self.samples,
            max_prompt,
            max_response,
            sampling: self.sampling,
            seed: self.seed,
        };
        let (rollouts, encoder) = (&mut rollouts, &encoder);
        let outcomes = match (&mut pool, &mut judges) {
            (Some(pool), judges) => {
                let judges = judges.as_mut();
                let mut evaluator = DialogueEvaluator { rollouts, encoder, pool, judges, stop };
                evaluator.run(&problems, &options, store.as_mut(), progress)?
            }
            (None, Some(pool)) => {
                let mut evaluator = Evaluator { rollouts, encoder, pool, stop };
                evaluator.run(&problems, &options, store.as_mut(), progress)?
            }
            (None, None) => unreachable!("single answers have judges"),
        };
        Ok(Report::new(&outcomes, self.seed))
    }

    /// Tokens that have room for the openings of dialogues about these problems, by the first ones.
    fn opened(
        &self,
        encoder: &Encoder<'_>,
        pool: &mut EnvPool,
        problems: &[Problem],
    ) -> Result<usize> {
        let task = |(i, problem): (u64, &Problem)| Task {
            problem: problem.clone(),
            seed: task_seed(self.seed, i),
            held_out: true,
        };
        let tasks = (0..).zip(problems.iter().take(OPENED)).map(task).collect();
        let longest = pool.session(encoder, tasks, 1, "look")?.lengths().max().unwrap_or(1);
        Ok(longest + longest / 4 + 1)
    }

    /// What completions depend on. Files are told apart by size, the adapter by its contents.
    fn settings(
        &self,
        model: &Model,
        max_prompt: usize,
        max_response: usize,
        problems: usize,
    ) -> Result<Settings> {
        let adapter = self.adapter.as_ref().map(|path| sha256(path)).transpose()?;
        let settings = serde_json::json!({
            "model": model.name(),
            "adapter_sha256": adapter,
            "data": self.data()?,
            "problems": problems,
            "columns": [self.columns.prompt, self.columns.answer, self.columns.difficulty],
            "template": self.prompts.template,
            "system": self.prompts.system,
            "reward": self.rewards.spec(&self.data()?),
            "samples": self.samples,
            "max_prompt_tokens": max_prompt,
            "max_response_tokens": max_response,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "min_p": self.sampling.min_p,
            "seed": self.seed,
        });
        let serde_json::Value::Object(mut settings) = settings else { unreachable!("an object") };
        if self.dialogues.is_some() {
            let dialogues = serde_json::to_value(&self.dialogues)
                .map_err(|e| Error::engine("writing settings", e.to_string(), "report it"))?;
            settings.insert("dialogues".into(), dialogues);
        }
        Ok(settings)
    }
}

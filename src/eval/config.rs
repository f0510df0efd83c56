//! `bupo-gguf eval` as one struct of settings and one call.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args;
use sha2::{Digest, Sha256};

use super::{EvalOptions, Evaluator, Report, Settings, Store};
use crate::data::{Columns, ProblemSource, SourceOptions, Template};
use crate::ggml::ThreadPool;
use crate::model::{Lora, Model};
use crate::reward::{Judge, JudgeOptions, JudgePool, default_reward};
use crate::rollout::{Encoder, Progress, RolloutOptions, Rollouts, Sampling};
use crate::{Error, Result};

/// Settings of an evaluation.
#[derive(Args, Clone, Debug)]
pub struct EvalConfig {
    /// Problems: Parquet, JSON lines or CSV files with commas between, or a task (task:add)
    #[arg(long, value_name = "FILES|task:NAME", help_heading = "Data and reward")]
    pub data: String,
    /// Evaluate a seeded sample of N problems [default: all; of a task 400]
    #[arg(long, value_name = "N", help_heading = "Data and reward")]
    pub problems: Option<usize>,
    /// How answers are judged, as in `train`; the first part decides what is right [default: math; boxed where
    /// tasks alone are asked]
    #[arg(long, value_name = "SPEC", help_heading = "Data and reward")]
    pub reward: Option<String>,
    /// Threads that judge while others sample; each has its own reward program
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Data and reward")]
    pub reward_workers: usize,
    /// Longest time a reward program may take for one completion
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", help_heading = "Data and reward")]
    pub reward_timeout: f32,
    /// Column of the prompt [default: prompt, question or problem]
    #[arg(long, value_name = "NAME", help_heading = "Data and reward")]
    pub prompt_column: Option<String>,
    /// Column of the right answer [default: reward_model.ground_truth, final_answer or answer]
    #[arg(long, value_name = "NAME", help_heading = "Data and reward")]
    pub answer_column: Option<String>,
    /// Column of the difficulty, for the table [default: difficulty or level]
    #[arg(long, value_name = "NAME", help_heading = "Data and reward")]
    pub difficulty_column: Option<String>,
    /// chat (the GGUF's own), qwen3, qwen3-no-think, octothinker, plain, or a Jinja file
    #[arg(
        long,
        default_value = "chat",
        value_name = "NAME|FILE",
        help_heading = "Data and reward"
    )]
    pub template: String,
    /// System message, in place of the one that a prompt brings along
    #[arg(long, value_name = "TEXT", help_heading = "Data and reward")]
    pub system: Option<String>,
    /// tokenizer.json to encode with instead of the GGUF's vocabulary; refused where ids differ
    #[arg(long, value_name = "FILE", help_heading = "Data and reward")]
    pub tokenizer: Option<PathBuf>,

    /// Completions per problem: K of avg@K, pass@K, maj@K
    #[arg(long, default_value_t = 1, value_name = "K", help_heading = "Sampling")]
    pub samples: usize,
    /// Prompts longer than this lose their beginning [default: 1024, at most half of the context]
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    pub max_prompt: Option<usize>,
    /// Completions end at this length [default: 2048, or what the context leaves]
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    pub max_response: Option<usize>,
    /// Sampling temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub temperature: f32,
    /// Keep the smallest set of tokens with this probability (1 = all)
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub top_p: f32,
    /// Keep the N likeliest tokens (0 = all)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Sampling")]
    pub top_k: usize,
    /// Keep tokens with at least X times the likeliest one's probability (0 = all)
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Sampling")]
    pub min_p: f32,
    /// Memory for the KV cache, MiB; sets how many sequences run at once
    #[arg(long, default_value_t = 1024, value_name = "MIB", help_heading = "Sampling")]
    pub kv_mib: usize,

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
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub threads: Option<usize>,
}

/// Problems of a task, which has no end.
const TASK_PROBLEMS: usize = 400;

impl EvalConfig {
    /// Refuses settings that cannot work.
    fn check(&self) -> Result<()> {
        let positive = |x: f32| x > 0.0 && x.is_finite();
        for (option, ok, expected, got) in [
            ("--samples", self.samples > 0, "at least 1", self.samples.to_string()),
            ("--problems", self.problems != Some(0), "at least 1", "0".into()),
            ("--max-prompt", self.max_prompt != Some(0), "at least 1", "0".into()),
            ("--max-response", self.max_response != Some(0), "at least 1", "0".into()),
            ("--kv-mib", self.kv_mib > 0, "at least 1", "0".into()),
            (
                "--reward-workers",
                (1..=256).contains(&self.reward_workers),
                "1 to 256",
                self.reward_workers.to_string(),
            ),
            (
                "--reward-timeout",
                positive(self.reward_timeout),
                "above 0",
                self.reward_timeout.to_string(),
            ),
            (
                "--temperature",
                self.temperature == 0.0 || positive(self.temperature),
                "0 or more",
                self.temperature.to_string(),
            ),
            (
                "--top-p",
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0, at most 1",
                self.top_p.to_string(),
            ),
            ("--min-p", (0.0..1.0).contains(&self.min_p), "0 to below 1", self.min_p.to_string()),
        ] {
            if !ok {
                return Err(Error::invalid(option, expected, got, "leave it out for the default"));
            }
        }
        Ok(())
    }

    /// Limits of prompt and response that fit the model's context.
    fn lengths(&self, context: usize) -> Result<(usize, usize)> {
        let max_prompt = self.max_prompt.unwrap_or(1024.min(context / 2));
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

    fn reward(&self) -> String {
        self.reward.clone().unwrap_or_else(|| default_reward(&self.data).into())
    }

    fn columns(&self) -> Columns {
        Columns {
            prompt: self.prompt_column.clone(),
            answer: self.answer_column.clone(),
            difficulty: self.difficulty_column.clone(),
        }
    }

    /// Samples, judges and counts.
    ///
    /// # Errors
    /// A setting, the data or the adapter does not fit, a reward cannot judge, a file cannot be written;
    /// [`Error::Interrupted`] when `stop` becomes true.
    pub fn run(
        &self,
        model: &Model,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Report> {
        self.check()?;
        let (max_prompt, max_response) = self.lengths(model.config().n_ctx_train)?;
        let options =
            SourceOptions { seed: self.seed, columns: self.columns(), ..SourceOptions::default() };
        let source = ProblemSource::with(&self.data, options)?;
        let all = source.epoch_len().unwrap_or(TASK_PROBLEMS);
        let problems = source.eval_problems(self.problems.unwrap_or(all));
        let judging =
            JudgeOptions { max_response, timeout: Duration::from_secs_f32(self.reward_timeout) };
        let judge = Judge::parse(&self.reward(), judging)?;
        let encoder = Encoder::new(model, self.tokenizer.as_deref(), self.system.clone())?
            .with_template(&Template::parse(&self.template)?)?;
        let mut lora = self.adapter.as_ref().map(|path| Lora::load(model, path)).transpose()?;
        let pool = Arc::new(ThreadPool::with(self.threads)?);
        let options =
            RolloutOptions { n_ctx_seq: max_prompt + max_response, kv_bytes: self.kv_mib << 20 };
        let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
        if let Some(lora) = &mut lora {
            rollouts.set_adapter(Some(lora.live(model)?))?;
        }
        let mut store = match &self.out {
            Some(folder) => {
                let settings = self.settings(model, max_prompt, max_response, problems.len())?;
                Some(if self.resume {
                    Store::resume(folder, &settings, problems.len(), self.samples)?
                } else {
                    Store::create(folder, &settings)?
                })
            }
            None => None,
        };
        let options = EvalOptions {
            samples: self.samples,
            max_prompt,
            max_response,
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
            },
            seed: self.seed,
        };
        let mut evaluator = Evaluator {
            rollouts: &mut rollouts,
            encoder: &encoder,
            pool: &mut JudgePool::new(judge, self.reward_workers)?,
            stop,
        };
        let outcomes = evaluator.run(&problems, &options, store.as_mut(), progress)?;
        Ok(Report::new(&outcomes, self.seed))
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
            "data": self.data,
            "problems": problems,
            "columns": [self.prompt_column, self.answer_column, self.difficulty_column],
            "template": self.template,
            "system": self.system,
            "reward": self.reward(),
            "samples": self.samples,
            "max_prompt_tokens": max_prompt,
            "max_response_tokens": max_response,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
        });
        let serde_json::Value::Object(settings) = settings else { unreachable!("an object") };
        Ok(settings)
    }
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

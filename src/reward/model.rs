//! `judge:MODEL.gguf`: a second local model that scores by a rubric.
//!
//! It computes on the CPU, wherever the model that is judged does: it is opened once and asked by one thread at a time, as many completions together as wait; its answer is greedy, so that
//! the same completion is always judged alike but for last bits.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Attempt, Verdict, rubric};
use crate::data::Prompt;
use crate::data::jsonl::shorten;
use crate::ggml::ThreadPool;
use crate::model::{Config, DEMO, Model};
use crate::rollout::{
    Decoding, Encoder, Request, RolloutOptions, RolloutSizes, Rollouts, Sampling,
};
use crate::{Error, Result};

/// Tokens of a judge's answer.
const MAX_TOKENS: usize = 256;
/// Tokens of a question, at most.
const MAX_QUESTION: usize = 4096;
/// Tokens of a rubric with its template, about.
const RUBRIC_TOKENS: usize = 256;
/// Memory for its keys and values, at most.
const KV_BYTES: usize = 256 << 20;

/// A model that judges. All clones ask the same one.
#[derive(Clone)]
pub struct ModelJudge {
    path: PathBuf,
    rubric: Arc<str>,
    batch: usize,
    opened: Arc<Mutex<Option<Opened>>>,
}

/// What a judging model takes of host memory.
#[derive(Clone, Debug)]
pub struct JudgeMemory {
    /// Where the model lies.
    pub path: PathBuf,
    weights_bytes: u64,
    config: Config,
    sizes: RolloutSizes,
    at_once: usize,
}

impl JudgeMemory {
    /// Bytes of its weights, of keys, values and decoding, with questions of so many tokens beside the rubric.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let asked = self.at_once * (tokens + RUBRIC_TOKENS);
        let decoding = Decoding {
            tokens: self.sizes.n_batch.min(asked),
            keys: self.sizes.n_ctx_seq,
            logits: 3 * self.at_once,
        };
        self.weights_bytes + (self.sizes.bytes() + decoding.host_bytes(&self.config, 1)) as u64
    }
}

struct Opened {
    model: Model,
    rollouts: Rollouts,
    max_question: usize,
}

impl std::fmt::Debug for ModelJudge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ModelJudge({})", self.path.display())
    }
}

impl ModelJudge {
    /// The model at this path, which is opened by [`ModelJudge::start`].
    pub fn new(path: &str, rubric: &str, batch: usize) -> ModelJudge {
        let path = PathBuf::from(path);
        ModelJudge { path, rubric: rubric.into(), batch, opened: Arc::default() }
    }

    /// A relative path counts from this folder.
    pub fn found_from(&mut self, folder: &Path) {
        if self.path.as_os_str() != DEMO {
            self.path = folder.join(&self.path);
        }
    }

    /// Attempts that it takes at once.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Where the model lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the model, where it is not open.
    ///
    /// # Errors
    /// It cannot be read, or is none that is known here.
    pub fn start(&self) -> Result<()> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.is_none() {
            let model = Model::open(&self.path)?;
            let threads = Arc::new(ThreadPool::new(1)?);
            let max_question = max_question(&model);
            let rollouts = Rollouts::new(model.engine(), &threads, self.options(&model)?)?;
            *opened = Some(Opened { model, rollouts, max_question });
        }
        Ok(())
    }

    /// What it is asked with.
    fn options(&self, model: &Model) -> Result<RolloutOptions> {
        let (context, question) = (model.config().n_ctx_train, max_question(model));
        let n_ctx_seq = question + MAX_TOKENS.min(context - question);
        RolloutOptions { n_ctx_seq, kv_bytes: KV_BYTES }.at_most(self.batch, model.engine())
    }

    /// What it takes of host memory. No weights are read for it.
    ///
    /// # Errors
    /// As [`ModelJudge::start`].
    pub fn memory(&self) -> Result<JudgeMemory> {
        let model = Model::outline(&self.path)?;
        let files = model.files().iter().filter_map(|file| std::fs::metadata(file).ok());
        let sizes = self.options(&model)?.sizes(model.engine())?;
        let (path, config) = (self.path.clone(), model.config().clone());
        let weights_bytes = files.map(|file| file.len()).sum();
        Ok(JudgeMemory { path, weights_bytes, config, sizes, at_once: sizes.n_seq.min(self.batch) })
    }

    /// Judges.
    pub fn score(&self, attempts: &[Attempt<'_>]) -> Result<Vec<Verdict>> {
        self.start()?;
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let Opened { model, rollouts, max_question } = opened.as_mut().expect("just opened");
        let encoder = Encoder::new(model, None, None)?;
        let place = || format!("--reward judge:{}", self.path.display());
        let mut requests = Vec::with_capacity(attempts.len());
        for attempt in attempts {
            let asked = Prompt::Text(rubric::question(&self.rubric, attempt));
            let prompt_tokens = encoder.prompt(&asked, usize::MAX)?;
            if prompt_tokens.len() > *max_question {
                let expected = format!("a question of at most {max_question} tokens");
                let advice = "lower --max-response, or give a shorter --judge-rubric";
                let got = prompt_tokens.len().to_string();
                return Err(Error::invalid(place(), expected, got, advice));
            }
            let room = model.config().n_ctx_train - *max_question;
            requests.push(Request {
                prompt_tokens,
                n: 1,
                seed_stream: 0,
                max_tokens: MAX_TOKENS.min(room),
            });
        }
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let never = AtomicBool::new(false);
        let said = rollouts.generate(&requests, &greedy, 0, &mut |_| (), &never)?;
        let texts = said.iter().flatten().map(|completion| encoder.text(&completion.tokens));
        texts
            .map(|text| {
                rubric::verdict(&text).ok_or_else(|| {
                    let expected = "a score from 0 to 10 in what the judge says";
                    let got = format!("{:?}", shorten(text.trim(), 80));
                    let advice = "use a larger model, or say in --judge-rubric that it ends with \"Score: N\"";
                    Error::invalid(place(), expected, got, advice)
                })
            })
            .collect()
    }
}

/// Tokens of a question, at most.
fn max_question(model: &Model) -> usize {
    MAX_QUESTION.min(model.config().n_ctx_train.saturating_sub(MAX_TOKENS)).max(1)
}

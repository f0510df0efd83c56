//! `judge:MODEL.gguf`: a second local model that scores by a rubric.
//!
//! It is opened once and asked by one thread at a time, as many completions together as wait; its answer is greedy, so that
//! the same completion is always judged alike but for last bits.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Attempt, Verdict, rubric};
use crate::data::Prompt;
use crate::data::jsonl::shorten;
use crate::ggml::ThreadPool;
use crate::model::{DEMO, Model};
use crate::rollout::{Encoder, Request, RolloutOptions, Rollouts, Sampling};
use crate::{Error, Result};

/// Tokens of a judge's answer.
const MAX_TOKENS: usize = 256;
/// Tokens of a question, at most.
const MAX_QUESTION: usize = 4096;
/// Memory for its keys and values.
pub(super) const KV_BYTES: usize = 256 << 20;

/// A model that judges. All clones ask the same one.
#[derive(Clone)]
pub(super) struct ModelJudge {
    path: PathBuf,
    rubric: Arc<str>,
    batch: usize,
    opened: Arc<Mutex<Option<Opened>>>,
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
            let context = model.config().n_ctx_train;
            let max_question = MAX_QUESTION.min(context.saturating_sub(MAX_TOKENS)).max(1);
            let n_ctx_seq = max_question + MAX_TOKENS.min(context - max_question);
            let options = RolloutOptions { n_ctx_seq, kv_bytes: KV_BYTES };
            let options = options.at_most(self.batch, model.engine())?;
            let rollouts = Rollouts::new(model.engine(), &threads, options)?;
            *opened = Some(Opened { model, rollouts, max_question });
        }
        Ok(())
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

//! `http://..`: a server that judges, with JSON in and out.
//!
//! A URL that ends with `/chat/completions` is a chat endpoint as OpenAI's and llama-server's: it gets the rubric filled in as
//! one user message, at temperature 0, and the score is read in what it says. Any other URL gets several completions at once:
//!
//! ```json
//! {"attempts": [{"problem": "..", "prompt": .., "answer": "..", "completion": "..", "tokens": 17, "truncated": false}, ..]}
//! {"rewards": [1.0, ..], "reasons": ["..", ..]}
//! ```
//!
//! What fails is asked again, with a pause between that doubles; what it cannot judge then is an error of the run and never a
//! reward of 0. What was judged once is not asked again within a run. No TLS: a server elsewhere wants a proxy before it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::program::prompt;
use super::{Attempt, Verdict, rubric};
use crate::data::jsonl::{kind, shorten};
use crate::{Error, Result};

/// Longest answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
/// Judgements that are remembered.
const MAX_CACHED: usize = 1 << 16;
/// Pause before a question is asked again; it doubles.
const PAUSE: Duration = Duration::from_millis(250);
/// Tokens of a judge's answer.
const MAX_TOKENS: usize = 1024;

/// Judgements by what was judged, shared by all threads.
type Cache = Arc<Mutex<HashMap<u64, Verdict>>>;

/// A server that judges.
#[derive(Clone)]
pub(super) struct HttpJudge {
    url: String,
    rubric: Arc<str>,
    retries: usize,
    batch: usize,
    agent: ureq::Agent,
    cache: Cache,
}

impl std::fmt::Debug for HttpJudge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HttpJudge({})", self.url)
    }
}

/// Why a question was not answered.
enum Refusal {
    /// It may be answered if it is asked again.
    Now(String),
    /// (expected, got): it will not.
    Ever(String, String),
}

impl HttpJudge {
    /// A server at this URL.
    ///
    /// # Errors
    /// It is none, or wants TLS.
    pub fn new(
        url: &str,
        rubric: &str,
        timeout: Duration,
        retries: usize,
        batch: usize,
    ) -> Result<HttpJudge> {
        let host = url.strip_prefix("http://").filter(|rest| !rest.is_empty());
        let is_url = host.is_some() && url.parse::<ureq::http::Uri>().is_ok();
        if !is_url {
            let advice =
                "write http://127.0.0.1:8080/v1/chat/completions; TLS wants a proxy before it";
            return Err(Error::invalid("--reward", "a URL that begins with http://", url, advice));
        }
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .build();
        Ok(HttpJudge {
            url: url.into(),
            rubric: rubric.into(),
            retries,
            batch,
            agent: config.into(),
            cache: Cache::default(),
        })
    }

    fn is_chat(&self) -> bool {
        self.url.ends_with("/chat/completions")
    }

    /// Attempts that it takes at once.
    pub fn batch(&self) -> usize {
        if self.is_chat() { 1 } else { self.batch }
    }

    /// Judges, those that it has judged before from memory.
    pub fn score(&self, attempts: &[Attempt<'_>]) -> Result<Vec<Verdict>> {
        let keys: Vec<u64> = attempts.iter().map(key).collect();
        let known =
            |key: &u64| self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
        let mut verdicts: Vec<Option<Verdict>> = keys.iter().map(known).collect();
        let open: Vec<usize> = (0..keys.len()).filter(|&i| verdicts[i].is_none()).collect();
        for part in open.chunks(self.batch().max(1)) {
            let asked: Vec<&Attempt<'_>> = part.iter().map(|&i| &attempts[i]).collect();
            for (&i, verdict) in part.iter().zip(self.ask(&asked)?) {
                let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
                if cache.len() < MAX_CACHED {
                    cache.insert(keys[i], verdict.clone());
                }
                verdicts[i] = Some(verdict);
            }
        }
        Ok(verdicts.into_iter().flatten().collect())
    }

    /// Asks, and once more while that may help.
    fn ask(&self, attempts: &[&Attempt<'_>]) -> Result<Vec<Verdict>> {
        let question = if self.is_chat() {
            let content = rubric::question(&self.rubric, attempts[0]);
            json!({"messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": MAX_TOKENS})
        } else {
            json!({"attempts": attempts.iter().map(|a| attempt(a)).collect::<Vec<_>>()})
        };
        let (mut pause, mut tries) = (PAUSE, 0);
        loop {
            let why = match self.once(&question).and_then(|said| self.read(&said, attempts.len())) {
                Ok(verdicts) => return Ok(verdicts),
                Err(Refusal::Ever(expected, got)) => {
                    let advice = "see docs/ENVIRONMENTS.md for what a judge answers";
                    return Err(Error::invalid(
                        format!("--reward {}", self.url),
                        expected,
                        got,
                        advice,
                    ));
                }
                Err(Refusal::Now(why)) => why,
            };
            tries += 1;
            if tries > self.retries {
                return Err(Error::engine(
                    format!("asking the judge at {}", self.url),
                    format!("{why} (asked {tries} times)"),
                    "see whether the server runs, or raise --reward-timeout and --judge-retries",
                ));
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
    }

    fn once(&self, question: &Value) -> Result<Value, Refusal> {
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let sent = request.send(question.to_string().as_bytes());
        let mut response = sent.map_err(|e| Refusal::Now(one_line(&e.to_string())))?;
        let status = response.status();
        let body = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec();
        let body = body.map_err(|e| Refusal::Now(one_line(&e.to_string())))?;
        let words = || format!("{:?}", shorten(String::from_utf8_lossy(&body).trim(), 80));
        if status.is_server_error() || status == 429 || status == 408 {
            return Err(Refusal::Now(format!("status {status}, {}", words())));
        }
        if !status.is_success() {
            let got = format!("{status}, {}", words());
            return Err(Refusal::Ever("an answer with status 200".into(), got));
        }
        serde_json::from_slice(&body).map_err(|_| Refusal::Ever("JSON".into(), words()))
    }

    fn read(&self, said: &Value, n: usize) -> Result<Vec<Verdict>, Refusal> {
        let wrong = |expected: String| {
            let got = format!("{:?}", shorten(&said.to_string(), 80));
            Refusal::Ever(expected, got)
        };
        if self.is_chat() {
            let content = said["choices"][0]["message"]["content"].as_str();
            let content = content.ok_or_else(|| wrong("choices[0].message.content".into()))?;
            let verdict = rubric::verdict(content).ok_or_else(|| {
                let expected = "a score from 0 to 10 in what the judge says".into();
                Refusal::Ever(expected, format!("{:?}", shorten(content.trim(), 80)))
            })?;
            return Ok(vec![verdict]);
        }
        let rewards = said["rewards"].as_array().filter(|list| list.len() == n);
        let rewards = rewards.ok_or_else(|| wrong(format!("`rewards`, a list of {n}")))?;
        let verdict = |(i, reward): (usize, &Value)| {
            let number = reward.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
            let reward = number.ok_or_else(|| {
                Refusal::Ever(format!("`rewards[{i}]`: a finite number"), kind(reward))
            })?;
            let reason = said["reasons"][i].as_str().unwrap_or("by the server");
            Ok(Verdict { reward, reason: one_line(reason) })
        };
        rewards.iter().enumerate().map(verdict).collect()
    }
}

fn attempt(a: &Attempt<'_>) -> Value {
    json!({"problem": a.problem.id, "prompt": prompt(&a.problem.prompt), "answer": a.problem.answer,
        "completion": a.text, "tokens": a.tokens, "truncated": a.truncated})
}

/// What tells attempts apart.
fn key(a: &Attempt<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    attempt(a).to_string().hash(&mut hasher);
    hasher.finish()
}

fn one_line(text: &str) -> String {
    shorten(&text.split_whitespace().collect::<Vec<_>>().join(" "), 300)
}

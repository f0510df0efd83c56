//! What a run is fed with: problems and rollout rows from JSON lines, Parquet or CSV, generated tasks, the
//! chat template that turns messages into text, and the tokenizer that may replace the GGUF's own.
//!
//! Nothing here knows a model: text and ids go in, text and ids come out.

mod arrow;
mod calling;
pub mod chat;
mod columns;
mod compressed;
mod csv;
mod examples;
pub mod hf_tokenizer;
mod jinja;
mod json_array;
pub mod jsonl;
mod parquet;
mod rows;
pub mod source;
pub mod table;
pub mod tasks;
pub mod templates;
mod thrift;
pub mod tokenizer;
mod usual;

pub use calling::speaks;
pub use chat::ChatTemplate;
pub use columns::Columns;
pub use examples::{Example, ExampleKind, ExampleRow, examples};
pub use hf_tokenizer::HfTokenizer;
pub use rows::{read_problems, read_rollouts, rollouts};
pub use source::{ProblemSource, SourceOptions};
pub use tasks::Task;
pub use templates::Template;
pub use tokenizer::{Tokenize, agree};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said, in plain text.
    pub content: String,
}

impl Message {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Message {
        Message { role: "user".into(), content: content.into() }
    }
}

/// A whole conversation as chat templates take it, and the tools that may be called in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// Messages: `role` and `content`, and where they are there `tool_calls` (arguments as objects), `name`,
    /// `tool_call_id`, thoughts and what else a template may ask for.
    pub messages: Vec<serde_json::Value>,
    /// Tools with JSON schemas.
    pub tools: Vec<serde_json::Value>,
}

/// What the model is asked to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text: one user message where the model has a chat template, else tokenised as it stands.
    Text(String),
    /// A conversation that the chat template turns into text.
    Messages(Vec<Message>),
    /// Token ids, used as they are.
    Tokens(Vec<i32>),
}

/// A prompt whose right answer is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The row's own `id`, or else its [`source`](Problem::source).
    pub id: String,
    /// The question.
    pub prompt: Prompt,
    /// The right answer, as the reward compares it. Never empty.
    pub answer: String,
    /// Where it comes from, for messages: `train.jsonl:12`, `task:add 17+25`.
    pub source: String,
    /// How hard it is, where the data says so: a number or a word such as `Level 3`.
    pub difficulty: Option<String>,
    /// Bytes of the worked solution that stands beside the answer; 0 where there is none.
    pub solution_bytes: usize,
}

/// A prompt with completions that were sampled elsewhere; none, where only the prompt is looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRow {
    /// The prompt all completions share.
    pub prompt: Prompt,
    /// The completions of this prompt: the group.
    pub completions: Vec<RolloutCompletion>,
    /// Line in the file, from 1.
    pub line: usize,
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutCompletion {
    /// What was said. Never empty.
    pub content: CompletionContent,
    /// Its reward, finite.
    pub reward: Option<f32>,
    /// Log-probability of each token when it was sampled, in nats; as many as there are tokens.
    pub old_logprobs: Option<Vec<f32>>,
}

/// A completion's text or its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompletionContent {
    /// Text, to be tokenised.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<i32>),
}

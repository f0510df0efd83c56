//! `bupo-gguf generate`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::{Value, json};

use super::{DeviceArgs, ModelArgs, open_adapter, print_json, print_line, stop_on_signal};
use crate::data::{ProblemSource, Prompt};
use crate::env::{EnvOptions, EnvPool, Heard, Task, task_seed};
use crate::ggml::ThreadPool;
use crate::model::{Lora, Model};
use crate::options::at_least_one;
use crate::rollout::{Encoder, Progress, Request, RolloutOptions, Rollouts, Sampling, Segment};
use crate::{Error, Result};

/// Sample completions of a prompt, with or without an adapter.
///
/// The prompt becomes one user message of the model's chat template; --raw takes it as it is. With --env a dialogue is
/// shown as it goes on: what is said to the model, what it says, its rewards.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf generate demo -p \"17+25=\" -n 4
  bupo-gguf generate Qwen3-4B-Q4_K_M.gguf -p \"What is 17 * 23?\" \\
      --adapter runs/first/adapter.gguf --temperature 0
  bupo-gguf generate Qwen3-4B-Q4_K_M.gguf --env env:calculator --problem 3
  bupo-gguf generate Qwen3-4B-Q4_K_M.gguf --env \"cmd:python3 game.py\" \\
      --data rounds.jsonl")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt
    #[arg(
        short,
        long,
        value_name = "TEXT",
        required_unless_present = "env",
        conflicts_with = "env",
        help_heading = "Prompt"
    )]
    prompt: Option<String>,
    /// With --env: problems to talk about [default: those of the environment]
    #[arg(long, value_name = "FILES|task:NAME", requires = "env", help_heading = "Prompt")]
    data: Option<String>,
    /// With --env: which of the held-out problems
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = at_least_one,
        requires = "env",
        help_heading = "Prompt"
    )]
    problem: usize,
    #[command(flatten)]
    dialogues: EnvOptions,
    /// Adapter (GGUF)
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    adapter: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    system: Option<String>,
    /// Take the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "system", help_heading = "Prompt")]
    raw: bool,
    /// Completions
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = at_least_one,
        help_heading = "Sampling"
    )]
    samples: usize,
    /// Completions end at this length, dialogues so long after their opening [default: 256; of a dialogue what the context
    /// leaves, at most 2048]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one, help_heading = "Sampling")]
    max_response: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
    /// Same seed, same completions
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Sampling")]
    seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Run")]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// One JSON object on stdout: text, tokens and log-probs of every completion
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: GenerateArgs) -> Result<()> {
    args.sampling.check()?;
    let model = args.device.open(&args.model)?;
    let mut lora = open_adapter(&model, &args.adapter)?;
    if args.dialogues.is_some() {
        return talk(&args, &model, lora);
    }
    let max_response = args.max_response.unwrap_or(256);
    let text = args.prompt.unwrap_or_default();
    let encoder = Encoder::new(&model, None, args.system.clone())?;
    let context = model.config().n_ctx_train;
    let room = context.saturating_sub(max_response);
    let prompt = if args.raw {
        Prompt::Tokens(model.engine().vocab().tokenize(&text, true, true)?)
    } else {
        Prompt::Text(text)
    };
    let prompt_tokens = encoder.prompt(&prompt, usize::MAX)?;
    if prompt_tokens.len() > room {
        return Err(Error::invalid(
            "prompt and --max-response",
            format!("{context} tokens, the model's context"),
            format!("{} and {}", prompt_tokens.len(), max_response),
            "shorten one of them",
        ));
    }
    let pool = Arc::new(ThreadPool::with(args.threads)?);
    let n_ctx_seq = prompt_tokens.len() + max_response;
    let options = RolloutOptions::new(n_ctx_seq, args.samples, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
    if let Some(lora) = &mut lora {
        rollouts.set_adapter(Some(lora.live(&model)?))?;
    }
    let request =
        Request { prompt_tokens, n: args.samples, seed_stream: 0, max_tokens: max_response };
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    // A single completion is shown as it grows.
    let live = args.samples == 1 && !args.json;
    let mut shown = Shown::default();
    let completions = rollouts
        .generate_with(&[request], &args.sampling, args.seed, &stop, &mut |event| match live {
            true => shown.more(&model, event),
            false => Ok(()),
        })?
        .remove(0);
    if args.json {
        let list: Vec<_> = completions
            .iter()
            .map(|c| {
                json!({"text": encoder.text(&c.tokens), "tokens": c.tokens,
                    "logprobs": c.logprobs, "finish": c.finish})
            })
            .collect();
        return print_json(&json!({"completions": list}));
    }
    if live {
        return print_line("");
    }
    for (i, completion) in completions.iter().enumerate() {
        print_line(&format!("--- {}\n{}", i + 1, encoder.text(&completion.tokens)))?;
    }
    Ok(())
}

/// What was shown of a sequence that grows.
#[derive(Default)]
struct Shown {
    /// Bytes of a character that is not whole yet.
    rest: Vec<u8>,
    tokens: usize,
}

impl Shown {
    /// Shows the newest token.
    fn more(&mut self, model: &Model, event: Progress) -> Result<()> {
        // The end of a completion is an event, too, and brings no token of its own.
        let grown = std::mem::replace(&mut self.tokens, event.tokens) < event.tokens;
        let Some(token) = event.newest.filter(|_| grown) else { return Ok(()) };
        self.rest.extend(model.engine().vocab().piece(token, false));
        let valid = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            Err(e) => e.valid_up_to(),
        };
        let written = say(&self.rest[..valid]);
        self.rest.drain(..valid);
        written
    }
}

fn say(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::io("write to", "stdout"))
}

/// Messages as they are shown.
fn lines(messages: &[Value]) -> String {
    let word = |m: &Value, name: &str| m[name].as_str().unwrap_or_default().to_string();
    messages.iter().map(|m| format!("[{}] {}\n", word(m, "role"), word(m, "content"))).collect()
}

/// Dialogues with an environment: one is shown as it goes on.
fn talk(args: &GenerateArgs, model: &Model, mut lora: Option<Lora>) -> Result<()> {
    args.dialogues.check()?;
    let data = args.data.clone().unwrap_or_else(|| args.dialogues.data("", ""));
    if data.is_empty() {
        let advice = "name a file or a task";
        return Err(Error::invalid("--data", "problems for the program", "none", advice));
    }
    let problems = ProblemSource::open(&data, args.seed)?.eval_problems(args.problem);
    let Some(problem) = problems.get(args.problem - 1) else {
        let got = args.problem.to_string();
        let expected = format!("1 to {}, the problems that there are", problems.len());
        return Err(Error::invalid("--problem", expected, got, "lower it"));
    };
    let encoder = Encoder::new(model, None, args.system.clone())?;
    let seed = task_seed(args.seed, args.problem as u64);
    let task = Task { problem: problem.clone(), seed, held_out: true };
    let mut hear = |heard: Heard<'_>| {
        // An error of stdout is met by the next token.
        let rest = if heard.over { String::new() } else { "[assistant] ".into() };
        let _ = say(format!("\n{}{rest}", lines(heard.messages)).as_bytes());
    };
    let mut environments = EnvPool::new(&args.dialogues)?;
    let mut session = environments.session(&encoder, vec![task], args.samples, "generate")?;
    let context = model.config().n_ctx_train;
    let opening = session.lengths().next().unwrap_or(1);
    let room = context.saturating_sub(opening);
    let max_response = args.max_response.unwrap_or(2048.min(room));
    if max_response == 0 || max_response > room {
        return Err(Error::invalid(
            "the opening and --max-response",
            format!("{context} tokens, the model's context"),
            format!("{opening} and {max_response}"),
            "lower --max-response",
        ));
    }
    let requests = session.requests(opening, max_response, std::iter::once(0))?;
    let pool = Arc::new(ThreadPool::with(args.threads)?);
    let options = RolloutOptions::new(opening + max_response, args.samples, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
    if let Some(lora) = &mut lora {
        rollouts.set_adapter(Some(lora.live(model)?))?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    let live = args.samples == 1 && !args.json;
    if live {
        say(format!("{}[assistant] ", lines(session.opening(0))).as_bytes())?;
        session.watch(&mut hear);
    }
    let mut shown = Shown::default();
    let mut watch = |event| match live {
        true => shown.more(model, event),
        false => Ok(()),
    };
    let segments =
        rollouts.converse(&requests, &args.sampling, args.seed, &stop, &mut session, &mut watch)?;
    let dialogues = session.dialogues(segments).remove(0).1;
    if args.json {
        let segment = |s: &Segment| {
            json!({"prompt_tokens": s.prompt, "tokens": s.completion.tokens, "sampled": s.own,
                "logprobs": s.completion.logprobs})
        };
        let list: Vec<Value> = dialogues
            .iter()
            .map(|d| {
                let rewards: Vec<f32> = d.turns.iter().map(|turn| turn.reward).collect();
                json!({"messages": d.messages, "rewards": rewards, "success": d.success,
                    "reason": d.reason, "truncated": d.truncated, "tool_calls": d.calls,
                    "tool_calls_failed": d.failed,
                    "segments": d.segments.iter().map(segment).collect::<Vec<_>>()})
            })
            .collect();
        return print_json(&json!({"dialogues": list}));
    }
    for (i, d) in dialogues.iter().enumerate() {
        if !live {
            print_line(&format!("--- {}\n{}", i + 1, d.text()))?;
        }
        let sum = d.returns(1.0)[0];
        let end = if d.success { "success" } else { "no success" };
        let why = if d.reason.is_empty() { String::new() } else { format!(" ({})", d.reason) };
        print_line(&format!("=== reward {sum}, {end} after {} turns{why}", d.turns.len()))?;
    }
    Ok(())
}

//! `bupo-gguf generate`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{DeviceArgs, ModelArgs, open_adapter, print_json, print_line, stop_on_signal};
use crate::data::Prompt;
use crate::ggml::ThreadPool;
use crate::options::at_least_one;
use crate::rollout::{Encoder, Request, RolloutOptions, Rollouts, Sampling};
use crate::{Error, Result};

/// Sample completions of a prompt, with or without an adapter.
///
/// The prompt becomes one user message of the model's chat template; --raw takes it as it is.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf generate demo -p \"17+25=\" -n 4
  bupo-gguf generate Qwen3-4B-Q4_K_M.gguf -p \"What is 17 * 23?\" \\
      --adapter runs/first/adapter.gguf --temperature 0")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt")]
    prompt: String,
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
    /// Completions end at this length
    #[arg(
        long,
        default_value_t = 256,
        value_name = "TOKENS",
        value_parser = at_least_one,
        help_heading = "Sampling"
    )]
    max_response: usize,
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
    let encoder = Encoder::new(&model, None, args.system.clone())?;
    let context = model.config().n_ctx_train;
    let room = context.saturating_sub(args.max_response);
    let prompt = if args.raw {
        Prompt::Tokens(model.engine().vocab().tokenize(&args.prompt, true, true)?)
    } else {
        Prompt::Text(args.prompt.clone())
    };
    let prompt_tokens = encoder.prompt(&prompt, usize::MAX)?;
    if prompt_tokens.len() > room {
        return Err(Error::invalid(
            "prompt and --max-response",
            format!("{context} tokens, the model's context"),
            format!("{} and {}", prompt_tokens.len(), args.max_response),
            "shorten one of them",
        ));
    }
    let pool = Arc::new(ThreadPool::with(args.threads)?);
    let n_ctx_seq = prompt_tokens.len() + args.max_response;
    let options = RolloutOptions::new(n_ctx_seq, args.samples, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
    if let Some(lora) = &mut lora {
        rollouts.set_adapter(Some(lora.live(&model)?))?;
    }
    let request =
        Request { prompt_tokens, n: args.samples, seed_stream: 0, max_tokens: args.max_response };
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    // A single completion is shown as it grows.
    let live = args.samples == 1 && !args.json;
    let (mut shown, mut tokens) = (Vec::new(), 0);
    let completions = rollouts
        .generate_with(&[request], &args.sampling, args.seed, &stop, &mut |event| {
            // The end of a completion is an event, too, and brings no token of its own.
            let grown = std::mem::replace(&mut tokens, event.tokens) < event.tokens;
            if live
                && grown
                && let Some(token) = event.newest
            {
                shown.extend(model.engine().vocab().piece(token, false));
                let valid = match std::str::from_utf8(&shown) {
                    Ok(_) => shown.len(),
                    Err(e) => e.valid_up_to(),
                };
                let mut out = std::io::stdout();
                let written = out.write_all(&shown[..valid]).and_then(|()| out.flush());
                shown.drain(..valid);
                return written.map_err(Error::io("write to", "stdout"));
            }
            Ok(())
        })?
        .remove(0);
    if args.json {
        let list: Vec<_> = completions
            .iter()
            .map(|c| {
                serde_json::json!({"text": encoder.text(&c.tokens), "tokens": c.tokens,
                    "logprobs": c.logprobs, "finish": c.finish})
            })
            .collect();
        return print_json(&serde_json::json!({"completions": list}));
    }
    if live {
        return print_line("");
    }
    for (i, completion) in completions.iter().enumerate() {
        print_line(&format!("--- {}\n{}", i + 1, encoder.text(&completion.tokens)))?;
    }
    Ok(())
}

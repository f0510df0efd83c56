//! `bupo-gguf score`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::{DeviceArgs, ModelArgs, open_adapter, print_json};
use crate::data::{CompletionContent, rollouts};
use crate::ggml::ThreadPool;
use crate::model::{Batch, Engine, Policy};
use crate::options::at_least_one;
use crate::rollout::Encoder;
use crate::{Error, Result};

/// Per-token log-probs and entropies of given completions, in nats, with exact activations.
///
/// Rows are JSON lines: {"prompt": "..", "completion": ".."}, or {"prompt_tokens": [..], "completions":
/// [{"tokens": [..]}, ..]}. One line of JSON per completion goes to stdout:
/// {"row": i, "completion": j, "logprobs": [..], "entropies": [..]}, both counted from 0.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf score Qwen3-4B-Q4_K_M.gguf --data rows.jsonl > scores.jsonl
  bupo-gguf score demo --data rows.jsonl --layer 6 \\
      --adapter runs/demo-bupo-1/adapter.gguf")]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows with completions (JSON lines)
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Inner policy of this layer, 1..L (no final norm; L is the final policy) [default: L]
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// Apply the final norm to the inner policy
    #[arg(long)]
    final_norm: bool,
    /// Adapter (GGUF)
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// Temperature of the distribution
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    temperature: f32,
    /// System message put before text prompts
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: ScoreArgs) -> Result<()> {
    if !(args.temperature > 0.0 && args.temperature.is_finite()) {
        let got = args.temperature.to_string();
        return Err(Error::invalid("--temperature", "above 0", got, "leave it out for 1"));
    }
    let model = args.device.open(&args.model)?;
    let n_layer = model.config().n_layer;
    let policy = Policy::internal(args.layer.unwrap_or(n_layer), n_layer, args.final_norm)?;
    let lora = open_adapter(&model, &args.adapter)?;
    let encoder = Encoder::new(&model, None, args.system.clone())?;
    let mut engine = Engine::on(model.device(), Arc::new(ThreadPool::with(args.threads)?))?;
    let mut any = false;
    for (row, read) in rollouts(&args.data)?.enumerate() {
        let read = read?;
        let place = |e: Error| {
            Error::invalid(
                format!("{}, line {}", args.data.display(), read.line),
                "a row that the model can take",
                e.to_string(),
                "mend or drop the row",
            )
        };
        let prompt = encoder.prompt(&read.prompt, usize::MAX).map_err(place)?;
        let mut completions = Vec::with_capacity(read.completions.len());
        for completion in &read.completions {
            completions.push(match &completion.content {
                CompletionContent::Tokens(tokens) => tokens.clone(),
                CompletionContent::Text(text) => encoder.completion(text).map_err(place)?,
            });
        }
        let slices: Vec<&[i32]> = completions.iter().map(Vec::as_slice).collect();
        let mut batch = Batch::default();
        batch.push_group(&prompt, &slices, model.config().n_vocab).map_err(place)?;
        engine.forward(&model, lora.as_ref(), &batch, policy.depth())?;
        let scores =
            engine.score(&model, lora.as_ref(), &batch, policy, args.temperature, false)?;
        let mut at = 0;
        for (j, tokens) in completions.iter().enumerate() {
            let part = at..at + tokens.len();
            at = part.end;
            print_json(&serde_json::json!({"row": row, "completion": j,
                "logprobs": scores.logprobs[part.clone()], "entropies": scores.entropies[part]}))?;
            any = true;
        }
    }
    if any {
        return Ok(());
    }
    let place = args.data.display().to_string();
    Err(Error::invalid(place, "rows with completions", "none", "add `completion` or `completions`"))
}

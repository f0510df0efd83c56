//! `bupo-gguf diff`

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{DeviceArgs, print_json, print_line, stop_on_signal};
use crate::Result;
use crate::export::{AdapterSpec, DiffConfig, Side, diff, lora_of};
use crate::ggml::ThreadPool;
use crate::options::at_least_one;

/// Measure how far two models are apart on given rows, each with adapters or without
///
/// A is the reference, B what is judged: KL(A || B), agreement of the likeliest tokens and the ratio of
/// perplexities, at every completion token, with exact activations. Rows with completions ({"prompt": ..,
/// "completion": ..}) are scored as they are. Problems ({"prompt": .., "answer": ..}, or a task) are answered
/// by A first; then B answers them too, with the same random numbers, and accuracies are compared.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf diff base.gguf merged.gguf --adapter-a runs/first/adapter.gguf \\
      --data held-out.jsonl
  bupo-gguf diff demo demo-q4_0.gguf --data task:add --json")]
pub struct DiffArgs {
    /// GGUF file of the reference, or `demo`
    #[arg(value_name = "A")]
    a: PathBuf,
    /// GGUF file that is judged, or `demo`
    #[arg(value_name = "B")]
    b: PathBuf,
    /// Rows: JSON lines with completions, or problems as in `train`, or task:NAME
    #[arg(long, value_name = "FILE|task:NAME", help_heading = "Comparison")]
    data: String,
    /// Adapter of A (GGUF), applied with factor X; may be given several times
    #[arg(long, value_name = "FILE[:X]", help_heading = "Sides")]
    adapter_a: Vec<AdapterSpec>,
    /// Adapter of B
    #[arg(long, value_name = "FILE[:X]", help_heading = "Sides")]
    adapter_b: Vec<AdapterSpec>,
    #[command(flatten)]
    config: DiffConfig,
    #[command(flatten)]
    device: DeviceArgs,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Run")]
    threads: Option<usize>,
    /// One JSON object on stdout instead of the table
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: DiffArgs) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    let (a, b) = (args.device.open_file(&args.a)?, args.device.open_file(&args.b)?);
    let mut a = Side { model: &a, lora: lora_of(&a, &args.adapter_a)? };
    let mut b = Side { model: &b, lora: lora_of(&b, &args.adapter_b)? };
    let pool = Arc::new(ThreadPool::with(args.threads)?);
    let found = diff([&mut a, &mut b], &args.data, &args.config, &pool, &stop)?;
    if args.json { print_json(&found) } else { print_line(&found.to_string()) }
}

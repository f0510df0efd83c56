//! `bupo-gguf synth`

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::{print_json, print_line};
use crate::Result;
use crate::synth::{self, Mixture, Shape};

/// Write a model of a published shape with random weights, for benchmarks and memory plans.
///
/// The file has the shape's own hyperparameters, a byte-level vocabulary of its size that spells every text,
/// and a ChatML template; llama.cpp loads it, and what the model says is noise. Files of the same seed are
/// the same. Of multimodal models it is the text part.
#[derive(Args)]
#[command(after_help = format!(
    "Shapes: {}\n\nExamples:
  bupo-gguf synth qwen3-0.6b --out 0.6b.gguf
  bupo-gguf synth llama-3.2-3b --type iq4_xs --layers 4 --out short.gguf",
    Shape::names()
))]
pub struct SynthArgs {
    /// Published shape, of the list below
    #[arg(value_name = "SHAPE")]
    shape: String,
    /// Type of the weights: any of ggml's (f16, q8_0, iq4_xs, ..) or a mixture (q4_k_m, q5_k_s, ..), with
    /// llama-quantize's exceptions
    #[arg(long, default_value = "q4_k_m", value_name = "TYPE")]
    r#type: String,
    /// GGUF file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Layers instead of the shape's own
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Rows of the vocabulary instead of the shape's own
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Same seed, same file
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Weights of zero, which take neither time nor room on the disk: for `inspect --plan`
    #[arg(long, conflicts_with = "seed")]
    hollow: bool,
    /// One JSON object on stdout instead of a line of text
    #[arg(long)]
    json: bool,
}

pub fn run(args: SynthArgs) -> Result<()> {
    let mut shape = Shape::find(&args.shape)?;
    let mixture = Mixture::parse(&args.r#type)?;
    if let Some(n) = args.layers {
        shape = shape.with_layers(n)?;
    }
    if let Some(n) = args.vocab {
        shape = shape.with_vocab(n)?;
    }
    let start = Instant::now();
    let summary = match args.hollow {
        true => synth::hollow(&shape, &mixture, &args.out)?,
        false => synth::write(&shape, &mixture, args.seed, &args.out)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return print_json(&serde_json::json!({
            "file": args.out, "shape": summary.shape, "type": summary.r#type,
            "parameters": summary.parameters, "tensors": summary.tensors,
            "tensor_bytes": summary.tensor_bytes, "seconds": seconds}));
    }
    let tensors: Vec<String> = summary.tensors.iter().map(|(ty, n)| format!("{n} {ty}")).collect();
    print_line(&format!(
        "{}: {} in {}, {:.1} M parameters, {:.1} MB of tensors ({}), {seconds:.1} s",
        args.out.display(),
        summary.shape,
        summary.r#type,
        summary.parameters as f64 / 1e6,
        summary.tensor_bytes as f64 / 1e6,
        tensors.join(", "),
    ))
}

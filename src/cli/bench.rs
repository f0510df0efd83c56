//! `bupo-gguf bench`

use clap::Args;

use super::{DeviceArgs, ModelArgs, print_json, print_line};
use crate::bench::{self, Options, Part};
use crate::ggml::ByteSize;
use crate::options::at_least_one;
use crate::{Error, Result};

/// Measure how fast a model rolls out, trains and is looked into here, and with how much memory.
///
/// Every case runs in a process of its own, so that peak memory is the case's own. Shares of sgemm are
/// of the machine's rate of F32 matrix products, measured in turn with the case. `synth` makes models to
/// measure.
#[derive(Args)]
#[command(after_help = "Rows of the table, or of the JSON object's \"rows\":
  train    tokens, scored: of the micro batch
           useful_gflop_per_s: every linear map once forward and once backward,
           the head twice, nothing that is computed again
           cost: sizes in turn, the shortest time of each, over the straight line
           through the first and the last
  rollout  a prompt of --prompt tokens that all sequences begin with, --new tokens
           decoded by each; the bare loop only calls llama_decode
  dialogues
           four turns of about 32 tokens, answers of 16 tokens between, beside
           one turn of the same length; slow: each answer takes 100 ms, and is waited
           for after as many rounds as that takes
  entropy  one sequence of 64 tokens
  ops      512 tokens, on the model's own weights

Examples:
  bupo-gguf synth qwen3-0.6b --out 0.6b.gguf
  bupo-gguf bench train 0.6b.gguf --tokens 512
  bupo-gguf bench rollout 0.6b.gguf --sequences 1,16 --json")]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, value_name = "PART")]
    part: Part,
    #[command(flatten)]
    model: ModelArgs,
    /// Only this case, in this process; rows as JSON lines
    #[arg(long, value_name = "NAME", help_heading = "Cases")]
    case: Option<String>,
    /// Repetitions; figures are medians
    #[arg(long, default_value_t = 5, value_name = "N", help_heading = "Cases")]
    reps: usize,
    /// Size of the square matrices that tell the machine's sgemm rate
    #[arg(long, default_value_t = 2048, value_name = "N", help_heading = "Cases")]
    sgemm: usize,
    /// Rank of the adapter (all seven targets)
    #[arg(long, default_value_t = 16, value_name = "R", help_heading = "Cases")]
    rank: usize,
    /// Length of a training sequence
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Cases")]
    tokens: usize,
    /// Layer of the internal phase [default: a fifth of the layers]
    #[arg(long, value_name = "N", help_heading = "Cases")]
    internal_layer: Option<usize>,
    /// Memory for activations that an update keeps
    #[arg(long, default_value = "1GiB", value_name = "SIZE", help_heading = "Cases")]
    keep: ByteSize,
    /// Numbers of sequences that decode together
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,32",
        value_name = "LIST",
        help_heading = "Cases"
    )]
    sequences: Vec<usize>,
    /// Tokens of the prompt that they begin with
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = "Cases")]
    prompt: usize,
    /// Tokens that each of them decodes
    #[arg(long, default_value_t = 32, value_name = "N", help_heading = "Cases")]
    new: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Run")]
    threads: Option<usize>,
    /// Updates and entropies from rounded numbers, as `train --fast-products` has them
    #[arg(long, help_heading = "Run")]
    fast_products: bool,
    /// One JSON object on stdout instead of tables
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: BenchArgs) -> Result<()> {
    for (option, value, least) in [
        ("--reps", args.reps, 1),
        ("--rank", args.rank, 1),
        ("--sgemm", args.sgemm, 64),
        ("--tokens", args.tokens, 8),
        ("--prompt", args.prompt, 1),
        ("--new", args.new, 4),
        ("--sequences", args.sequences.iter().copied().min().unwrap_or(0), 1),
    ] {
        if value < least {
            let expected = format!("at least {least}");
            return Err(Error::invalid(option, expected, value.to_string(), "leave it out"));
        }
    }
    let options = Options {
        threads: args.threads,
        fast_products: args.fast_products,
        reps: args.reps,
        sgemm: args.sgemm,
        rank: args.rank,
        tokens: args.tokens,
        internal_layer: args.internal_layer,
        keep: args.keep.bytes(),
        sequences: args.sequences,
        prompt: args.prompt,
        new: args.new,
    };
    if let Some(case) = &args.case {
        let model = args.device.open(&args.model)?;
        return bench::run_case(&model, case, &options)?.iter().try_for_each(print_json);
    }
    // Refuses a wrong model before anything is measured.
    drop(args.device.open(&args.model)?);
    let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--json").collect();
    let mut rows = Vec::new();
    for case in bench::cases(args.part, &options) {
        eprintln!("{case}");
        rows.extend(bench::spawn_case(&program, &arguments, &case)?);
    }
    if args.json {
        return print_json(&serde_json::json!({"model": args.model.model, "rows": rows}));
    }
    print_line(bench::table(&rows).trim_end())
}

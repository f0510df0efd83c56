//! `bupo-gguf entropy`

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{DeviceArgs, ModelArgs, open_adapter, print_json, print_line, stop_on_signal};
use crate::analysis::hidden::{self, Element, Hidden, Positions, Ranges};
use crate::analysis::{
    DumpOptions, Look, Pick, Run, Settings, Side, Tap, Unwatched, Watcher, entropy, hidden_states,
};
use crate::ggml::ThreadPool;
use crate::options::at_least_one;
use crate::team::Team;
use crate::{Error, Result, ops};

const ANSWERS: &str = "Answers to rows without a completion";
const HIDDEN: &str = "Hidden states";

/// See inside a model: entropies of every layer's internal policies, the boundary layer, a report
///
/// Completions are teacher-forced with exact activations; at every position that predicts one of their tokens,
/// and in every layer, six hidden states (layer input, normed attention input, attention output, normed FFN
/// input, FFN output, layer output) are put through the unembedding, and their entropies, cosines, norms and
/// the divergence from the model's own (final) policy are taken. Entropies are in nats, at temperature 1.
///
/// Rows are those of `score`, text, messages or token ids: {"prompt": "..", "completion": ".."} or
/// {"prompt_tokens": [..], "completions": [{"tokens": [..]}, ..]}; a row without a completion is answered by
/// the model first.
///
/// --out gets entropy.jsonl and entropy.parquet (one record for each row, layer and position), summary.json
/// (means, standard errors, boundary layer), report.html and its figures as SVG. --hidden writes the hidden states
/// themselves, beside the figures or, without --out, alone. Ctrl-C keeps what is done; --resume goes on.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf entropy demo --data task:add --samples 50 --out look
  bupo-gguf entropy Qwen3-4B-Q8_0.gguf --data rows.jsonl \\
      --compare Qwen3-4B-Q4_K_M.gguf --every 4 --out q8-q4
  bupo-gguf entropy Qwen3-4B-Q4_K_M.gguf --data rows.jsonl \\
      --compare-adapter runs/first/adapter.gguf --out before-after
  bupo-gguf entropy Qwen3-4B-Q4_K_M.gguf --data rows.jsonl \\
      --hidden states.safetensors --hidden-taps layer_out \\
      --hidden-layers 12,20-24 --hidden-positions last")]
pub struct EntropyArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows with prompts and completions; rows without are answered by the model, as are a task's held-out problems
    #[arg(long, value_name = "FILE|task:NAME", help_heading = "Data")]
    data: PathBuf,
    /// Folder of the results; must be empty or not exist
    #[arg(long, value_name = "DIR", required_unless_present = "hidden", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Keep entropy.parquet alone, without entropy.jsonl, once the dump is whole
    #[arg(long, help_heading = "Run")]
    no_json_lines: bool,
    /// Go on with the dump in --out, or with --hidden
    #[arg(long, help_heading = "Run")]
    resume: bool,
    /// Adapter (GGUF)
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    adapter: Option<PathBuf>,
    /// Compare with this model (GGUF) on the same tokens
    #[arg(long, value_name = "MODEL2", help_heading = "Model")]
    compare: Option<PathBuf>,
    /// Adapter of the compared model [of MODEL itself without --compare]
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    compare_adapter: Option<PathBuf>,

    /// Measure at most N completions, the first of the file
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Data")]
    samples: Option<usize>,
    /// Cut completions to N tokens
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Data")]
    max_tokens: Option<usize>,
    /// Measure the first of every K tokens of a completion; time goes down with it
    #[arg(
        long,
        value_name = "K",
        default_value_t = 1,
        value_parser = at_least_one,
        help_heading = "Data"
    )]
    every: usize,
    /// Dump N likeliest tokens of every tap, and rank and probability of the token that was taken
    /// [default: 3, of the layer's and the final policy only]
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Figures")]
    top_k: usize,
    /// Apply the final norm before the unembedding at every tap (the paper's ablation)
    #[arg(long, help_heading = "Figures")]
    final_norm: bool,

    /// Write the hidden states to FILE: .safetensors, .npy (one tap), or a folder of .npy files where the name has no
    /// ending. Without --out nothing else is measured, and a row without a completion is taken as a prompt alone
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["compare", "compare_adapter"],
        help_heading = HIDDEN
    )]
    hidden: Option<PathBuf>,
    /// Of layer_in, attn_in, attn_out, ffn_in, ffn_out, layer_out (the residual) and final (behind the final norm)
    #[arg(
        long,
        value_name = "TAP,..",
        value_delimiter = ',',
        default_value = "layer_out,attn_out,ffn_out",
        requires = "hidden",
        help_heading = HIDDEN
    )]
    hidden_taps: Vec<Tap>,
    /// Layers, from 1, such as 3,5-8 [default: all]
    #[arg(long, value_name = "LAYERS", requires = "hidden", help_heading = HIDDEN)]
    hidden_layers: Option<Ranges>,
    /// completion (those that predict its tokens, of which --every leaves some out), prompt, all, last, or places in the
    /// sequence, from 0, such as 0,4-7
    #[arg(
        long,
        value_name = "PLACES",
        default_value_t = Positions::Completion,
        requires = "hidden",
        help_heading = HIDDEN
    )]
    hidden_positions: Positions,
    /// Type of the numbers
    #[arg(
        long,
        value_name = "TYPE",
        value_enum,
        default_value = "f32",
        requires = "hidden",
        help_heading = HIDDEN
    )]
    hidden_type: Element,
    /// Say what --hidden takes on the disk, and stop
    #[arg(long, requires = "hidden", help_heading = HIDDEN)]
    dry_run: bool,

    /// Answers to rows without a completion end at this length
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 256,
        value_parser = at_least_one,
        help_heading = ANSWERS
    )]
    max_response: usize,
    /// Temperature of these answers
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        help_heading = ANSWERS
    )]
    temperature: f32,
    /// Same seed, same answers
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        help_heading = ANSWERS
    )]
    seed: u64,
    /// Sample answers that do not depend on who is decoded beside them; with several MPI ranks always on, on the CPU
    #[arg(long, help_heading = ANSWERS)]
    batch_invariant: bool,
    /// System message put before text prompts
    #[arg(long, value_name = "TEXT", help_heading = "Data")]
    system: Option<String>,

    /// Stop at the first row that cannot be used, instead of leaving it out
    #[arg(long, help_heading = "Data")]
    strict: bool,
    /// Tokens computed at once; memory goes up with it
    #[arg(
        long,
        value_name = "N",
        default_value_t = 512,
        value_parser = at_least_one,
        help_heading = "Run"
    )]
    batch_tokens: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Run")]
    threads: Option<usize>,
    /// Take rounded numbers, up to 1.4 times as fast: of 16 bits instead of 24 on processors with a matrix unit (AMX), entropies
    /// off by some 1e-5 of themselves; of 13 to 15 on those with VNNI, 1e-4
    #[arg(long, help_heading = "Run")]
    fast_products: bool,
    /// summary.json on stdout instead of the table
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: EntropyArgs, team: &Team) -> Result<()> {
    let text = |path: &PathBuf| path.display().to_string();
    let settings = Settings {
        model: text(&args.model.model),
        adapter: args.adapter.as_ref().map(text),
        compare: args.compare.as_ref().map(text),
        compare_adapter: args.compare_adapter.as_ref().map(text),
        data: text(&args.data),
        system: args.system.clone(),
        pick: Pick { every: args.every, max_tokens: args.max_tokens.unwrap_or(0) },
        look: Look { top_k: args.top_k, final_norm: args.final_norm },
        max_response: args.max_response,
        temperature: args.temperature,
        seed: args.seed,
        hidden: args.hidden.as_ref().map(|file| Hidden {
            file: text(file),
            taps: args.hidden_taps.clone(),
            layers: args.hidden_layers.clone(),
            positions: args.hidden_positions.clone(),
            element: args.hidden_type,
        }),
    };
    let alone = settings.hidden.as_ref().map(|hidden| hidden::partial(&hidden.file));
    let options = DumpOptions {
        out: args.out.clone().or(alone).unwrap_or_default(),
        figures: args.out.is_some(),
        resume: args.resume,
        samples: args.samples.map(|n| n as u64),
        strict: args.strict,
        batch_tokens: args.batch_tokens,
        json_lines: !args.no_json_lines,
        batch_invariant: args.batch_invariant,
    };
    let model = args.device.open(&args.model)?;
    if args.fast_products {
        ops::wants_fast_products(model.device())?;
    }
    if let (true, Some(hidden)) = (args.dry_run, &settings.hidden) {
        let size = hidden::size(&model, &settings, &options, hidden)?;
        return if args.json { print_json(&size) } else { print_line(&size.to_string()) };
    }
    let other = args.compare.as_ref().map(|path| args.device.open_file(path)).transpose()?;
    let mut sides = vec![Side { model: &model, lora: open_adapter(&model, &args.adapter)? }];
    if args.compare.is_some() || args.compare_adapter.is_some() {
        let model = other.as_ref().unwrap_or(&model);
        sides.push(Side { model, lora: open_adapter(model, &args.compare_adapter)? });
    }
    let pool = Arc::new(ThreadPool::with(args.threads)?.rounding(args.fast_products));
    let stop = Arc::<AtomicBool>::default();
    stop_on_signal(stop.clone())?;
    team.share_stop(&stop);
    let (mut watch, mut unwatched) = (Watch::new(), Unwatched);
    let watcher: &mut dyn Watcher = if team.is_first() { &mut watch } else { &mut unwatched };
    let run = Run { pool: &pool, stop: &stop, team, watcher };
    let interrupted = match &args.out {
        Some(out) => {
            let Some(outcome) = entropy(&mut sides, &settings, &options, run)? else {
                return Ok(());
            };
            watch.bar.finish_and_clear();
            if args.json {
                print_json(&outcome)?;
            } else {
                print_line(&outcome.table())?;
                print_line(&format!("results          {}", out.display()))?;
                if let (Some(hidden), false) = (&settings.hidden, outcome.interrupted) {
                    print_line(&format!("hidden states    {}", hidden.file))?;
                }
            }
            outcome.interrupted
        }
        None => {
            let written = hidden_states(&mut sides, &settings, &options, run)?;
            if !team.is_first() {
                return Ok(());
            }
            watch.bar.finish_and_clear();
            if args.json {
                print_json(&written)?;
            } else if !written.interrupted {
                print_line(&format!(
                    "hidden states    {}: {} positions of {} rows, {:.1} MiB",
                    written.file,
                    written.positions,
                    written.rows,
                    written.bytes as f64 / (1u64 << 20) as f64
                ))?;
            }
            written.interrupted
        }
    };
    if interrupted {
        eprintln!("stopped before the end of the data; go on with the same command and --resume");
        return Err(Error::Interrupted);
    }
    Ok(())
}

/// Shows progress on stderr.
struct Watch {
    bar: ProgressBar,
    start: Instant,
    before: Option<u64>,
}

impl Watch {
    fn new() -> Watch {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {msg}  {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Watch { bar, start: Instant::now(), before: None }
    }
}

impl Watcher for Watch {
    fn resumed(&mut self, tokens: u64) {
        self.before = Some(tokens);
    }

    fn measured(&mut self, samples: u64, tokens: u64) {
        let new = tokens - self.before.unwrap_or(0);
        let rate = new as f64 / self.start.elapsed().as_secs_f64();
        let line = format!("{samples} completions, {tokens} tokens, {rate:.1} tokens/s");
        if self.bar.is_hidden() {
            eprintln!("{line}");
        }
        self.bar.set_message(line);
        self.bar.tick();
    }

    fn answering(&mut self, p: crate::rollout::Progress) {
        self.bar.set_message(format!("answering {}/{} rows, {} tokens", p.done, p.total, p.tokens));
        self.bar.tick();
    }

    fn note(&mut self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

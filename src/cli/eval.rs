//! `bupo-gguf eval`

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use indicatif::ProgressBar;

use super::{DeviceArgs, ModelArgs, print_json, print_line, stop_on_signal, watch::bar};
use crate::eval::EvalConfig;
use crate::team::Team;
use crate::{Error, Result};

/// Measure a model, with or without an adapter, on problems with known answers
///
/// Every problem gets K sampled completions. avg@K is the mean share of right ones, pass@k the unbiased
/// estimate of solving a problem within k tries, maj@K the share of problems whose most frequent answer is
/// right; intervals are 95 % bootstrap intervals over problems.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf eval Qwen3-4B-Q4_K_M.gguf --data math500.parquet --samples 16 \\
      --template qwen3-no-think --max-response 4096 \\
      --adapter runs/first/adapter.gguf --out runs/first-math500
  bupo-gguf eval demo --data task:add --samples 8 --json")]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    config: EvalConfig,
    #[command(flatten)]
    device: DeviceArgs,
    /// One JSON object on stdout instead of the table
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: EvalArgs, team: &Team) -> Result<()> {
    let model = args.device.open(&args.model)?;
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    let bar = if team.is_first() { bar() } else { ProgressBar::hidden() };
    bar.set_message("evaluate");
    team.share_stop(&stop);
    let report = args.config.run(&model, team, &stop, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    });
    bar.finish_and_clear();
    if !team.is_first() {
        return report.map(|_| ());
    }
    if matches!(report, Err(Error::Interrupted)) {
        let way_on = match args.config.out {
            Some(_) => "go on with the same command and --resume",
            None => "with --out DIR the completions so far would be kept",
        };
        eprintln!("stopped before the end; {way_on}");
    }
    let report = report?;
    if args.json { print_json(&report) } else { print_line(&report.to_string()) }
}

//! `bupo-gguf train`

use std::path::PathBuf;

use clap::Args;

use super::{ModelArgs, print_json, print_line, stop_on_signal, watch::Watch};
use crate::data::read_rollouts;
use crate::train::{Summary, TrainConfig, Trainer};
use crate::{Error, Result};

/// Train a LoRA adapter with BuPO or GRPO.
///
/// Each step samples a group of completions for every prompt with llama.cpp under the live adapter,
/// rewards them, and updates the adapter: in the first --internal-steps steps so that the policy of an
/// inner layer improves (BuPO), then the model's own policy. The run folder gets config.toml,
/// metrics.jsonl, completions.jsonl and adapter.gguf, which stock llama.cpp loads with --lora.
///
/// Examples:
///
///   bupo-gguf train demo
///
///   bupo-gguf train Qwen3-4B-Q4_K_M.gguf --data problems.jsonl --eval-data held-out.jsonl
///       --max-prompt 512 --max-response 1024 --micro-batch-tokens 4096 --lr 1e-5
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    config: TrainConfig,
    /// Take these rows (JSON lines with prompt, completions and rewards) as the one step's rollouts
    /// instead of sampling
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    rollouts: Option<PathBuf>,
    /// With --rollouts: write the gradients before clipping (safetensors)
    #[arg(long, value_name = "FILE", requires = "rollouts", help_heading = "Run")]
    dump_gradients: Option<PathBuf>,
    /// One JSON object on stdout instead of the summary
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: TrainArgs) -> Result<()> {
    args.config.check()?;
    let model = args.model.open()?;
    if let Some(path) = &args.rollouts {
        let rows = read_rollouts(path)?;
        let mut trainer = Trainer::new(&model, args.config.clone())?;
        let replay = trainer.replay(&rows, args.dump_gradients.as_deref())?;
        if let Some(out) = &args.config.out {
            trainer.save_to(out)?;
        }
        return print_json(&replay);
    }
    let out = args.config.out.clone().unwrap_or_else(|| default_out(&args));
    let mut trainer = Trainer::new(&model, args.config)?;
    stop_on_signal(trainer.stop_flag())?;
    let mut watch = Watch::new(&trainer);
    let summary = trainer.run(&out, &mut watch)?;
    watch.finish();
    if args.json {
        print_json(&summary)?
    } else {
        print_line(&describe(&summary))?
    }
    if summary.interrupted { Err(Error::Interrupted) } else { Ok(()) }
}

/// `runs/<model>-<algo>-<seed>`
fn default_out(args: &TrainArgs) -> PathBuf {
    let model = args.model.model.file_stem().map_or("model".into(), |s| s.to_string_lossy());
    let algo = args.config.algo.name();
    PathBuf::from("runs").join(format!("{model}-{algo}-{}", args.config.seed))
}

fn describe(summary: &Summary) -> String {
    let percent =
        |a: Option<f32>| a.map_or("not measured".into(), |a| format!("{:.1} %", 100.0 * a));
    let lift = match (summary.accuracy_before, summary.accuracy_after) {
        (Some(before), Some(after)) => format!(" ({:+.1} points)", 100.0 * (after - before)),
        _ => String::new(),
    };
    format!(
        "steps            {}\ntime             {:.0} s\naccuracy before  {}\naccuracy after   {}{lift}\nadapter          {}",
        summary.steps,
        summary.seconds,
        percent(summary.accuracy_before),
        percent(summary.accuracy_after),
        summary.adapter.display(),
    )
}

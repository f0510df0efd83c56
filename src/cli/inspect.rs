//! `bupo-gguf inspect`

use std::path::PathBuf;

use clap::Args;

use super::{print_json, print_line};
use crate::Result;
use crate::model::{Description, Model};
use crate::train::{Plan, TrainConfig, memory};

/// Show what a model file holds, and what memory a training run on it would take.
///
/// Architecture, sizes, tensor types, taps and trainable weights come from the file's header alone; a file
/// that is damaged or hostile gets one line that says so. With --plan the model is opened and the run's
/// peak memory is reckoned by part; what follows --plan are options of `train`. With --vram among them it is
/// also planned for a GPU with so much memory, which need not be there.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf inspect Qwen3-4B-Q4_K_M.gguf
  bupo-gguf inspect Qwen3-4B-Q4_K_M.gguf --json \\
      --plan train --rank 8 --max-response 2048
  bupo-gguf inspect Qwen3-8B-Q4_K_M.gguf \\
      --plan train --vram 12GiB --max-response 1024")]
pub struct InspectArgs {
    /// GGUF file (of a split set the first part), or `demo`
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// One JSON object on stdout instead of the table
    #[arg(long)]
    json: bool,
    /// Also plan the memory of a run with these options; must come last
    #[arg(long, value_name = "train OPTIONS", num_args = 1.., allow_hyphen_values = true)]
    plan: Option<Vec<String>>,
}

pub fn run(args: InspectArgs) -> Result<()> {
    let description = Description::read(&args.model)?;
    let plan = match &args.plan {
        Some(words) => {
            let config = TrainConfig::from_words(words)?;
            config.check()?;
            Some(Plan::new(&Model::open(&args.model)?, &config)?)
        }
        None => None,
    };
    let gpu = plan.as_ref().and_then(|plan| plan.gpu.as_ref());
    if args.json {
        print_json(&serde_json::json!({
            "model": description, "plan": plan, "gpu_plan": gpu, "available_bytes": memory::available_bytes()}))?;
    } else {
        print_line(&description.to_string())?;
        if let Some(plan) = plan {
            print_line(&plan.table())?;
        }
    }
    match description.refused {
        Some(_) => Model::outline(&args.model).map(drop),
        None => Ok(()),
    }
}

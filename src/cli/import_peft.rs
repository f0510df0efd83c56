//! `bupo-gguf import-peft`

use std::path::PathBuf;

use clap::Args;

use super::print_line;
use crate::Result;
use crate::export::{AdapterType, import_peft};
use crate::model::ModelFile;

/// Turn a LoRA of Hugging Face's PEFT into a GGUF adapter for a model.
///
/// DIR holds adapter_config.json and adapter_model.safetensors (F32, F16 or BF16). The rows of llama's q and
/// k are put into GGUF's order; ranks, alphas and rsLoRA are kept. DoRA, biases, embeddings and whole
/// modules have no GGUF form and are refused, as is every setting that is not known (docs/EXPORT.md).
#[derive(Args)]
#[command(after_help = "Example:
  bupo-gguf import-peft my-lora --base Qwen3-4B-Q4_K_M.gguf --out my-lora.gguf")]
pub struct ImportPeftArgs {
    /// Folder of the PEFT adapter
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// GGUF file of the model it was trained on, or `demo`
    #[arg(long, visible_alias = "model", value_name = "MODEL")]
    base: PathBuf,
    /// Adapter to write (GGUF)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Type of the numbers: f32, f16, bf16, q8_0
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    r#type: AdapterType,
}

pub fn run(args: ImportPeftArgs) -> Result<()> {
    let base = ModelFile::find(&args.base)?;
    let report = import_peft(&args.folder, &base, &args.out, args.r#type)?;
    print_line(&report.to_string())
}

//! `bupo-gguf export`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{print_json, print_line, stop_on_signal};
use crate::export::{
    AdapterSpec, BaseId, Card, DiffConfig, Difference, Imatrix, MergeOptions, MergeReport, Merger,
    Side, diff, export_adapter, export_peft, lora_of, modelfile,
};
use crate::ggml::ThreadPool;
use crate::gguf::{GgufFile, refuse_filled, write_atomically};
use crate::model::{Model, ModelFile};
use crate::options::at_least_one;
use crate::{Error, Result};

/// Merge adapters into a model, or write them as a file of their own
///
/// MODEL --out M.gguf: every tensor that an adapter changes is dequantised, added to, and quantised again in
/// its own type (--type keep) or in that of another file type by llama.cpp's own rules. All others are copied
/// byte for byte. Memory stays small whatever the model's size, and --out is a whole file or none. How much
/// of the change is there after rounding is measured and printed: "kept" is its share in its own direction,
/// "error" the rounding beside it, both relative to the change. --check compares base and adapter with the
/// merged file on held-out rows.
///
/// --out A.gguf without MODEL: the adapters as one GGUF adapter, in f32 (keep), f16, bf16 or q8_0.
///
/// MODEL --ollama DIR: the merged model with a Modelfile; the template is the model's own, put into Go's language and
/// compared with it, message by message.
///
/// MODEL --peft DIR: the adapters as one LoRA for Hugging Face's PEFT, with a model card.
#[derive(Args)]
#[command(override_usage = "bupo-gguf export MODEL --adapter A --out M.gguf [OPTIONS]
       bupo-gguf export MODEL --adapter A --peft DIR [OPTIONS]
       bupo-gguf export MODEL --adapter A --ollama DIR [OPTIONS]
       bupo-gguf export --adapter A --out A.gguf [OPTIONS]")]
#[command(after_help = "Examples:
  bupo-gguf export Qwen3-4B-Q4_K_M.gguf --adapter runs/first/adapter.gguf \\
      --out merged.gguf --check held-out.jsonl
  bupo-gguf export base.gguf --adapter a.gguf --adapter b.gguf:0.5 \\
      --type q8_0 --out merged.gguf
  bupo-gguf export --adapter runs/first/adapter.gguf \\
      --type q8_0 --out small.gguf
  bupo-gguf export Qwen3-4B-Q4_K_M.gguf --adapter runs/first/adapter.gguf \\
      --peft my-lora --base-id Qwen/Qwen3-4B
  bupo-gguf export Qwen3-4B-Q4_K_M.gguf --adapter runs/first/adapter.gguf \\
      --ollama my-model && ollama create my-model -f my-model/Modelfile")]
#[command(group = clap::ArgGroup::new("target").required(true).args(["out", "peft", "ollama"]))]
pub struct ExportArgs {
    /// GGUF file of the base, or `demo`; without it the adapters themselves are written
    #[arg(value_name = "MODEL", required_unless_present = "adapter")]
    model: Option<PathBuf>,
    /// Adapter (GGUF), applied with factor X; may be given several times
    #[arg(long, value_name = "FILE[:X]", help_heading = "Adapters")]
    adapter: Vec<AdapterSpec>,
    /// Merged model, or adapter, to write
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    out: Option<PathBuf>,
    /// Folder to write a PEFT adapter to, empty or new: adapter_model.safetensors, adapter_config.json, README.md
    #[arg(long, value_name = "DIR", requires = "model", help_heading = "Result")]
    peft: Option<PathBuf>,
    /// Folder to write a model for Ollama to, empty or new: the merged model.gguf, Modelfile, README.md
    #[arg(long, value_name = "DIR", requires = "model", help_heading = "Result")]
    ollama: Option<PathBuf>,
    /// Repository of the base on Hugging Face: PEFT's AutoPeftModel loads it from there, and an adapter's metadata
    /// names it [default: what the adapter's metadata says]
    #[arg(long, value_name = "ORG/NAME", help_heading = "Result")]
    base_id: Option<BaseId>,
    /// Write a model card (Markdown) of the merge: origin, hashes, what was kept, the figures of --check
    #[arg(
        long,
        value_name = "FILE",
        requires = "out",
        requires = "model",
        help_heading = "Result"
    )]
    card: Option<PathBuf>,
    /// keep, or a file type of llama.cpp: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, ..
    #[arg(long, default_value = "keep", value_name = "TYPE", help_heading = "Result")]
    r#type: String,
    /// Leave tensors without adapter as they are, whatever --type says
    #[arg(long, help_heading = "Result")]
    only_adapted: bool,
    /// Importance matrix of llama-imatrix (GGUF or .dat), which quantisers weigh columns by
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    imatrix: Option<PathBuf>,
    /// Round to nearest only; else, in types of less than 8 bits, rounding errors within the rows of A are
    /// fed back, so that changes smaller than a step are not lost
    #[arg(long, help_heading = "Result")]
    plain_rounding: bool,
    /// Raise the type of tensors until rounding is at most X times as large as the change
    #[arg(
        long,
        value_name = "X",
        num_args = 0..=1,
        default_missing_value = "0.5",
        allow_negative_numbers = true,
        help_heading = "Result"
    )]
    keep_delta: Option<f32>,
    /// Write files of at most this size, NAME-00001-of-0000N.gguf, ..
    #[arg(long, value_name = "N[M|G]", value_parser = size, conflicts_with = "ollama", help_heading = "Result")]
    split_max_size: Option<u64>,
    /// Compare base and adapters with the merged file on these rows, as `diff` does
    #[arg(long, value_name = "FILE|task:NAME", help_heading = "Comparison")]
    check: Option<String>,
    #[command(flatten)]
    comparison: DiffConfig,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Run")]
    threads: Option<usize>,
    /// One JSON object on stdout instead of the summary
    #[arg(long, help_heading = "Run")]
    json: bool,
}

pub fn run(args: ExportArgs) -> Result<()> {
    if let (Some(model), Some(folder), None, None) =
        (&args.model, &args.ollama, &args.out, &args.peft)
    {
        return ollama(&args, model, folder);
    }
    let report = match (&args.model, &args.out, &args.peft) {
        (Some(model), Some(out), None) => return merge(&args, model, out, args.card.as_deref()),
        (None, Some(out), _) => {
            let ty = if args.r#type == "keep" { "f32" } else { &args.r#type };
            export_adapter(&args.adapter, out, ty.parse()?, args.base_id.as_ref())?
        }
        (Some(model), None, Some(folder)) => {
            export_peft(&ModelFile::find(model)?, &args.adapter, folder, args.base_id.as_ref())?
        }
        _ => return Err(one_target()),
    };
    if args.json { print_json(&report) } else { print_line(&report.to_string()) }
}

fn one_target() -> Error {
    let expected = "one of --out, --peft and --ollama";
    Error::invalid("export", expected, "several", "run the command once for each")
}

/// The merged model with what Ollama wants beside it.
fn ollama(args: &ExportArgs, model: &Path, folder: &Path) -> Result<()> {
    refuse_filled("--ollama", folder, "choose another")?;
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let (merged, path) = (folder.join("model.gguf"), folder.join("Modelfile"));
    merge(args, model, &merged, Some(&folder.join("README.md")))?;
    let (text, note) = modelfile(&GgufFile::open(&merged)?, "model.gguf")?;
    write_atomically(&path, |out| {
        std::io::Write::write_all(out, text.as_bytes()).map_err(Error::io("write", &path))
    })?;
    note.iter().for_each(|note| eprintln!("note: {note}"));
    if args.json {
        Ok(())
    } else {
        print_line(&format!("run        ollama create NAME -f {}", path.display()))
    }
}

fn merge(args: &ExportArgs, model: &Path, out: &Path, card: Option<&Path>) -> Result<()> {
    if let Some(most) = args.keep_delta.filter(|x| !(*x > 0.0 && x.is_finite())) {
        let advice = "leave X out for 0.5";
        return Err(Error::invalid("--keep-delta", "above 0", most.to_string(), advice));
    }
    let options = MergeOptions {
        ty: args.r#type.parse()?,
        only_adapted: args.only_adapted,
        plain_rounding: args.plain_rounding,
        keep_delta: args.keep_delta,
        split_max_bytes: args.split_max_size,
    };
    let file = ModelFile::find(model)?;
    let imatrix = args.imatrix.as_deref().map(Imatrix::read).transpose()?;
    let merger = Merger::new(file.path(), file.name(), &args.adapter, imatrix)?;
    let bar = super::watch::bar();
    let report = super::in_pool(args.threads, || {
        merger.write(out, &options, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })
    })?;
    bar.finish_and_clear();
    let report = report?;
    if !args.json {
        print(&report)?;
    }
    let check = match &args.check {
        Some(data) => Some(check(args, model, &report.out[0], data)?),
        None => None,
    };
    if let Some(path) = card {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let mut card = Card::new(&name, "gguf", args.base_id.as_ref());
        card.origin(file.name(), &report.base_sha256, merger.adapters());
        card.merge(&report);
        if let (Some(data), Some(check)) = (&args.check, &check) {
            card.measured(data, check);
        }
        card.write(path)?;
    }
    // Last, where it is read.
    if let Some(warning) = report.warning() {
        eprintln!("{warning}");
    }
    match check {
        _ if args.json => print_json(
            &serde_json::json!({"export": report, "warning": report.warning(), "check": check}),
        ),
        Some(check) => print_line(&format!("A = base and adapters, B = merged\n{check}")),
        None => Ok(()),
    }
}

/// Base and adapters against the merged file.
fn check(args: &ExportArgs, model: &Path, merged: &Path, data: &str) -> Result<Difference> {
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(stop.clone())?;
    let (base, merged) = (Model::open(model)?, Model::open(merged)?);
    let mut a = Side { model: &base, lora: lora_of(&base, &args.adapter)? };
    let mut b = Side { model: &merged, lora: None };
    let pool = Arc::new(ThreadPool::with(args.threads)?);
    diff([&mut a, &mut b], data, &args.comparison, &pool, &stop)
}

fn print(report: &MergeReport) -> Result<()> {
    for raised in report.converted.iter().filter(|t| t.raised_bytes > 0) {
        print_line(&format!(
            "raised     {} {} -> {} (+{} bytes), error {:.2}",
            raised.name,
            raised.from,
            raised.to,
            raised.raised_bytes,
            raised.error_to_delta.unwrap_or(0.0),
        ))?;
    }
    let adapted = report.converted.iter().filter(|t| t.delta_kept.is_some()).count();
    print_line(&format!(
        "tensors    {adapted} merged, {} converted, {} copied byte for byte",
        report.converted.len() - adapted,
        report.copied
    ))?;
    if let (Some(kept), Some(error)) = (report.delta_kept, report.error_to_delta) {
        print_line(&format!("change     {:.1} % kept, error {error:.2}", 100.0 * kept))?;
    }
    let large = report.error_to_delta.is_some_and(|error| error > 0.5) && report.raised_bytes == 0;
    if large && report.warning().is_none() {
        eprintln!(
            "note: rounding is large beside the change; --check DATA measures what it costs, --keep-delta \
             raises the types of the tensors concerned"
        );
    }
    if report.raised_bytes > 0 {
        print_line(&format!("raised     {} bytes in all", report.raised_bytes))?;
    }
    let types: Vec<String> = report.types.iter().map(|(name, n)| format!("{n} x {name}")).collect();
    print_line(&format!("types      {}", types.join(", ")))?;
    for path in &report.out {
        print_line(&format!("model      {}", path.display()))?;
    }
    print_line(&format!("bytes      {}", report.bytes))
}

/// `500M`, `2G` (decimal, as llama-gguf-split has it), or bytes.
fn size(text: &str) -> Result<u64> {
    let (digits, unit) = match text.to_ascii_uppercase() {
        t if t.ends_with('G') => (t[..t.len() - 1].to_owned(), 1_000_000_000),
        t if t.ends_with('M') => (t[..t.len() - 1].to_owned(), 1_000_000),
        t => (t, 1),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).filter(|n| *n > 0);
    bytes.ok_or_else(|| {
        Error::invalid("--split-max-size", "a size such as 2G or 500M", text, "choose another")
    })
}

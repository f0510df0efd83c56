//! `bupo-gguf export`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{print_json, print_line, stop_on_signal};
use crate::export::{
    AdapterSpec, DiffConfig, Difference, Imatrix, MergeOptions, MergeReport, Merger, Side, diff,
    export_adapter, export_peft, lora_of,
};
use crate::ggml::ThreadPool;
use crate::model::{Model, ModelFile};
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
/// MODEL --peft DIR: the adapters as one LoRA for Hugging Face's PEFT.
///
/// Examples:
///
///   bupo-gguf export Qwen3-4B-Q4_K_M.gguf --adapter runs/first/adapter.gguf --out merged.gguf
///       --check held-out.jsonl
///
///   bupo-gguf export base.gguf --adapter a.gguf --adapter b.gguf:0.5 --type q8_0 --out merged.gguf
///
///   bupo-gguf export --adapter runs/first/adapter.gguf --type q8_0 --out small.gguf
#[derive(Args)]
#[command(verbatim_doc_comment)]
#[command(group = clap::ArgGroup::new("target").required(true).args(["out", "peft"]))]
pub struct ExportArgs {
    /// GGUF file of the base, or `demo`; without it the adapters themselves are written
    #[arg(value_name = "MODEL", required_unless_present = "adapter")]
    model: Option<PathBuf>,
    /// Adapter (GGUF), applied with factor X; may be given several times
    #[arg(long, value_name = "FILE[:X]")]
    adapter: Vec<AdapterSpec>,
    /// Merged model, or adapter, to write
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder to write a PEFT adapter to: adapter_model.safetensors, adapter_config.json
    #[arg(long, value_name = "DIR", requires = "model")]
    peft: Option<PathBuf>,
    /// keep, or a file type of llama.cpp: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, ..
    #[arg(long, default_value = "keep", value_name = "TYPE")]
    r#type: String,
    /// Leave tensors without adapter as they are, whatever --type says
    #[arg(long)]
    only_adapted: bool,
    /// Importance matrix of llama-imatrix (GGUF or .dat), which quantisers weigh columns by
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Round to nearest only; else, in types of less than 8 bits, rounding errors within the rows of A are
    /// fed back, so that changes smaller than a step are not lost
    #[arg(long)]
    plain_rounding: bool,
    /// Raise the type of tensors until rounding is at most X times as large as the change
    #[arg(
        long,
        value_name = "X",
        num_args = 0..=1,
        default_missing_value = "0.5",
        allow_negative_numbers = true
    )]
    keep_delta: Option<f32>,
    /// Write files of at most this size, NAME-00001-of-0000N.gguf, ..
    #[arg(long, value_name = "N[M|G]", value_parser = size)]
    split_max_size: Option<u64>,
    /// Compare base and adapters with the merged file on these rows, as `diff` does
    #[arg(long, value_name = "FILE|task:NAME")]
    check: Option<String>,
    #[command(flatten)]
    comparison: DiffConfig,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

pub fn run(args: ExportArgs) -> Result<()> {
    let report = match (&args.model, &args.out, &args.peft) {
        (Some(model), Some(out), None) => return merge(&args, model, out),
        (None, Some(out), _) => {
            let ty = if args.r#type == "keep" { "f32" } else { &args.r#type };
            export_adapter(&args.adapter, out, ty.parse()?)?
        }
        (Some(model), None, Some(folder)) => {
            export_peft(&ModelFile::find(model)?, &args.adapter, folder)?
        }
        _ => {
            let advice = "run the command once for each";
            return Err(Error::invalid("export", "--out or --peft", "both", advice));
        }
    };
    if args.json { print_json(&report) } else { print_line(&report.to_string()) }
}

fn merge(args: &ExportArgs, model: &Path, out: &Path) -> Result<()> {
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
    match check {
        _ if args.json => print_json(&serde_json::json!({"export": report, "check": check})),
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
    if report.error_to_delta.is_some_and(|error| error > 0.5) && report.raised_bytes == 0 {
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

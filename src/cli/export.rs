//! `bupo-gguf export`

use std::path::PathBuf;

use clap::Args;

use super::{print_json, print_line};
use crate::export::{AdapterSpec, Imatrix, MergeOptions, MergeReport, Merger, TypeChoice};
use crate::model::ModelFile;
use crate::{Error, Result};

/// Merge adapters into a model.
///
/// Every tensor that an adapter changes is dequantised, added to, and quantised again in its own type
/// (--type keep) or in that of another file type by llama.cpp's own rules. All others are copied byte for
/// byte. Memory stays small whatever the model's size, and --out is a whole file or none.
///
/// How much of each change is there after rounding is measured and printed: "kept" is the share of the
/// change in its own direction, "error" the rounding beside it, both relative to the change.
///
/// Examples:
///
///   bupo-gguf export Qwen3-4B-Q4_K_M.gguf --adapter runs/first/adapter.gguf --out merged.gguf
///
///   bupo-gguf export base.gguf --adapter a.gguf --adapter b.gguf:0.5 --type q8_0 --out merged.gguf
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ExportArgs {
    /// GGUF file of the base, or `demo`
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Adapter (GGUF), applied with factor X; may be given several times
    #[arg(long, value_name = "FILE[:X]")]
    adapter: Vec<AdapterSpec>,
    /// Merged model to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// keep, or a file type of llama.cpp: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, ..
    #[arg(long, default_value = "keep", value_name = "TYPE")]
    r#type: TypeChoice,
    /// Leave tensors without adapter as they are, whatever --type says
    #[arg(long)]
    only_adapted: bool,
    /// Importance matrix of llama-imatrix (GGUF or .dat), which quantisers weigh columns by
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Raise the type of tensors until rounding is at most X times as large as the change
    #[arg(long, value_name = "X", num_args = 0..=1, default_missing_value = "0.5")]
    keep_delta: Option<f32>,
    /// Write files of at most this size, NAME-00001-of-0000N.gguf, ..
    #[arg(long, value_name = "N[M|G]", value_parser = size)]
    split_max_size: Option<u64>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

pub fn run(args: ExportArgs) -> Result<()> {
    if let Some(most) = args.keep_delta.filter(|x| !(*x > 0.0 && x.is_finite())) {
        let advice = "leave X out for 0.5";
        return Err(Error::invalid("--keep-delta", "above 0", most.to_string(), advice));
    }
    let model = ModelFile::find(&args.model)?;
    let imatrix = args.imatrix.as_deref().map(Imatrix::read).transpose()?;
    let merger = Merger::new(model.path(), model.name(), &args.adapter, imatrix)?;
    let options = MergeOptions {
        ty: args.r#type,
        only_adapted: args.only_adapted,
        keep_delta: args.keep_delta,
        split_max_bytes: args.split_max_size,
    };
    let bar = indicatif::ProgressBar::no_length();
    let report = super::in_pool(args.threads, || {
        merger.write(&args.out, &options, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })
    })??;
    bar.finish_and_clear();
    if args.json {
        return print_json(&report);
    }
    print(&report)
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
    if report.raised_bytes > 0 {
        print_line(&format!("raised     {} bytes in all", report.raised_bytes))?;
    }
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

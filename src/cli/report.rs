//! `bupo-gguf report`

use std::path::PathBuf;

use clap::Args;

use super::{print_json, print_line};
use crate::Result;
use crate::analysis::report;

/// Make one page of a training run: report.html and its figures as SVG, in the run folder.
///
/// Shows reward, accuracy, length, entropy, clip fraction, drift and gradient norm over steps, the phase
/// switch, the newest completions and the settings; with `train --entropy-every N` also what the layers think
/// over time. The page needs no network. It can be made while the run goes on.
#[derive(Args)]
#[command(after_help = "Example:
  bupo-gguf report runs/demo-bupo-1")]
pub struct ReportArgs {
    /// Folder of a run of `train`
    #[arg(value_name = "RUN_DIR")]
    run: PathBuf,
    /// Where the page goes [default: the run folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: ReportArgs) -> Result<()> {
    let page = report::of_run(&args.run)?;
    let out = args.out.as_ref().unwrap_or(&args.run);
    report::write(&page, out)?;
    let path = out.join("report.html").display().to_string();
    if args.json {
        let figures: Vec<&str> = page.charts().map(|chart| chart.id.as_str()).collect();
        return print_json(&serde_json::json!({"report": path, "figures": figures}));
    }
    print_line(&path)
}

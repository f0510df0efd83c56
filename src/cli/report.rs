//! `bupo-gguf report`

use std::path::PathBuf;

use clap::Args;

use super::{print_json, print_line};
use crate::analysis::report;
use crate::{Error, Result};

/// Make one page of a training run, or one that compares several: report.html and its figures as SVG
///
/// Of one run: reward, accuracy, length, entropy, clip fraction, drift, gradient norm and learning rate over
/// steps, to be smoothed, the phase switch, the completions as a table to sort and filter, and the settings; with
/// `train --entropy-every N` also what the layers think over time. Of several: their curves on the same axes and
/// the settings in which they differ. Of a study (a .jsonl file, a line a run, as tools/experiments/run writes it):
/// means over seeds with intervals. The page needs no network. It can be made while a run goes on; with --serve it renews
/// itself.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf report runs/demo-bupo-1
  bupo-gguf report runs/demo-bupo-1 runs/demo-grpo-1 --out compared
  bupo-gguf report runs/demo-bupo-1 --serve
  bupo-gguf report docs/experiments/bupo-adder.jsonl --out look")]
pub struct ReportArgs {
    /// Folders of runs of `train`, or the results of a study
    #[arg(value_name = "RUN_DIR", required = true)]
    runs: Vec<PathBuf>,
    /// Where the page goes [default: the run folder; of several runs it must be said]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Serve the page of a run at http://127.0.0.1:PORT, for this machine alone, until Ctrl-C [default: 8321, or the
    /// next free one]
    #[arg(long, value_name = "PORT", num_args = 0..=1, conflicts_with_all = ["out", "json"])]
    serve: Option<Option<u16>>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: ReportArgs) -> Result<()> {
    let several = || {
        let got = format!("{} runs", args.runs.len());
        ("report", "one run", got)
    };
    if let Some(port) = args.serve {
        let [run] = args.runs.as_slice() else {
            let (place, expected, got) = several();
            return Err(Error::invalid(place, expected, got, "leave --serve out to compare them"));
        };
        let (address, server) = report::serve(run, port)?;
        print_line(&address)?;
        return server.join().map_err(Error::io("serve a page at", &address));
    }
    let (page, out) = match (args.runs.as_slice(), &args.out) {
        ([study], Some(out)) if study.is_file() => (report::of_study(study)?, out),
        ([study], None) if study.is_file() => {
            let (place, got) = (study.display().to_string(), "none");
            let advice = "say where its page goes";
            return Err(Error::invalid(place, "--out DIR beside a study", got, advice));
        }
        ([run], out) => (report::of_run(run)?, out.as_ref().unwrap_or(run)),
        (runs, Some(out)) => (report::of_runs(runs)?, out),
        (_, None) => {
            let (place, _, got) = several();
            let advice = "say where the page that compares them goes";
            return Err(Error::invalid(place, "--out DIR beside several runs", got, advice));
        }
    };
    report::write(&page, out)?;
    let path = out.join("report.html").display().to_string();
    if args.json {
        let figures: Vec<&str> = page.charts().map(|chart| chart.id.as_str()).collect();
        return print_json(&serde_json::json!({"report": path, "figures": figures}));
    }
    print_line(&path)
}

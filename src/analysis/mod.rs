//! What the layers think: entropies, divergences and cosines of internal policies (PAPER section 1), the
//! boundary layer that follows from them, and pages to look at.
//!
//! ```text
//! rows       data -> prompts and completions in tokens, answers where there is none
//! pack       completions -> batches
//! measure    batch -> figures of every layer at every token
//! dump       figures -> entropy.jsonl, entropy.parquet, running sums
//! summary    sums -> means, standard errors, the boundary layer
//! report     means and a few completions -> report.html, SVG
//! ```

mod dump;
mod files;
mod lenses;
mod measure;
mod outcome;
mod pack;
mod parquet;
mod probe;
mod record;
mod routers;
pub mod report;
mod rows;
mod samples;
mod summary;

pub use dump::{Conduct, Findings, Run, Settings, Side, Unwatched, Watcher, dump};
pub use lenses::{Lenses, Seen};
pub use measure::{Look, Measured, cosine, measure};
pub use outcome::{Difference, Means, Outcome};
pub use pack::{Packed, Pick, pack};
pub use probe::{Probe, probe, sums};
pub use record::{Figure, Record, Tap, Top};
pub use rows::{Answerer, Answering, Sample};
pub use samples::{Gallery, Glance, View};
pub use summary::{Boundary, Change, LayerMeans, Mean, Sums, boundary};

use crate::Result;
use crate::gguf::write_json_atomically;

/// The whole of `bupo-gguf entropy`: the dump, its summary and its report, all in `conduct.out`. None of a rank that is
/// not the first.
///
/// # Errors
/// Those of [`dump`], and of writing.
pub fn entropy<'m>(
    sides: &mut [Side<'m>],
    settings: &Settings,
    conduct: &Conduct,
    run: Run<'_>,
) -> Result<Option<Outcome>> {
    let team = run.team.clone();
    let findings = dump(sides, settings, conduct, run)?;
    if !team.is_first() {
        return Ok(None);
    }
    let outcome = Outcome::new(settings, &findings);
    write_json_atomically(&conduct.out.join("summary.json"), &outcome)?;
    report::write(&report::of_dump(&outcome, &findings), &conduct.out)?;
    if !conduct.json_lines && !findings.interrupted {
        files::DumpFiles::drop_json_lines(&conduct.out)?;
    }
    Ok(Some(outcome))
}

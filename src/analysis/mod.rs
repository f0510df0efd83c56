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
//! hidden     the hidden states themselves -> safetensors, npy
//! ```

mod dump;
mod files;
pub mod hidden;
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
mod sides;
mod summary;

pub use dump::{DumpOptions, Findings, Run, Settings, Unwatched, Watcher, dump};
pub use lenses::{Lenses, Seen};
pub use measure::{Look, Measured, cosine, measure, measure_bytes};
pub use outcome::{Difference, Means, Outcome};
pub use pack::{Packed, Pick, pack};
pub use probe::{Probe, probe, sums};
pub use record::{Figure, Record, Tap, Top};
pub use rows::{Answerer, Answering, Sample};
pub use samples::{Gallery, Glance, View};
pub use sides::Side;
pub use summary::{Boundary, Change, LayerMeans, Mean, Sums, boundary};

use crate::Result;
use crate::gguf::write_json_atomically;

/// What was written of hidden states.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Written {
    /// The file or folder.
    pub file: String,
    /// Rows read.
    pub rows: u64,
    /// Rows left out.
    pub rows_left_out: u64,
    /// Why, of the first of them.
    pub left_out: Vec<String>,
    /// Completions, or prompts without one.
    pub samples: u64,
    /// Positions.
    pub positions: u64,
    /// Bytes on the disk; 0 where it was stopped.
    pub bytes: u64,
    /// Whether it was stopped before the end of the data.
    pub interrupted: bool,
}

/// `bupo-gguf entropy --hidden FILE` without `--out`: hidden states alone, no figures.
///
/// # Errors
/// Those of [`dump`].
pub fn hidden_states<'m>(
    sides: &mut [Side<'m>],
    settings: &Settings,
    options: &DumpOptions,
    run: Run<'_>,
) -> Result<Written> {
    let findings = dump(sides, settings, options, run)?;
    let (positions, bytes) = findings.hidden.unwrap_or_default();
    Ok(Written {
        file: settings.hidden.as_ref().map(|h| h.file.clone()).unwrap_or_default(),
        rows: findings.rows,
        rows_left_out: findings.refused,
        left_out: findings.reasons,
        samples: findings.samples,
        positions,
        bytes,
        interrupted: findings.interrupted,
    })
}

/// The whole of `bupo-gguf entropy`: the dump, its summary and its report, all in `options.out`. None of a rank that is
/// not the first.
///
/// # Errors
/// Those of [`dump`], and of writing.
pub fn entropy<'m>(
    sides: &mut [Side<'m>],
    settings: &Settings,
    options: &DumpOptions,
    run: Run<'_>,
) -> Result<Option<Outcome>> {
    let team = run.team.clone();
    let findings = dump(sides, settings, options, run)?;
    if !team.is_first() {
        return Ok(None);
    }
    let outcome = Outcome::new(settings, &findings);
    write_json_atomically(&options.out.join("summary.json"), &outcome)?;
    report::write(&report::of_dump(&outcome, &findings), &options.out)?;
    if !options.json_lines && !findings.interrupted {
        files::DumpFiles::drop_json_lines(&options.out)?;
    }
    Ok(Some(outcome))
}

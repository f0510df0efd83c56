//! Pages to look at: of an entropy dump, and of a training run.

mod chart;
mod compared;
mod completions;
mod dumped;
mod grid;
mod interactive;
mod live;
mod page;
mod run;
mod study;
mod svg;
mod tensorboard;
mod training;

use std::io::Write;
use std::path::Path;

pub use chart::{Body, Chart, Heat, Mark, Series};
pub use compared::of_runs;
pub use dumped::of_dump;
pub use live::{DEFAULT_PORT, serve};
pub use page::{Page, Part, Section};
pub use study::of_study;
pub use tensorboard::Events;
pub use training::of_run;

use crate::gguf::write_atomically;
use crate::{Error, Result};

/// Writes `report.html`, and each figure as `figures/ID.svg` beside it.
pub fn write(page: &Page, folder: &Path) -> Result<()> {
    let figures = folder.join("figures");
    std::fs::create_dir_all(&figures).map_err(Error::io("create", &figures))?;
    let file = |path: &Path, text: &str| {
        write_atomically(path, |w| w.write_all(text.as_bytes()).map_err(Error::io("write", path)))
    };
    for chart in page.charts() {
        file(&figures.join(format!("{}.svg", chart.id)), &svg::svg(chart)?)?;
    }
    if page.tables().next().is_some() {
        file(&folder.join("tables.md"), &page.markdown())?;
    }
    file(&folder.join("report.html"), &page.html())
}

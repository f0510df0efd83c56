//! How fast a model runs here, and how much memory that takes.
//!
//! Every case runs in a process of its own, so that its peak memory is its own, and measures the
//! machine's sgemm rate in turn with what it times: a share of that rate means the same on a busy machine
//! as on a quiet one. Times are medians. On a GPU single operations are held against its measured rates of
//! products and copies, and against the CPU's results in F32.

mod cost;
mod dialogues;
mod entropy;
mod measure;
mod mixers;
mod ops;
mod rollout;
mod train;

pub use ops::{packed, pairs};

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::ggml::{Device, ThreadPool};
use crate::model::{Config, Lora, Model, Targets};
use crate::ops::wants_fast_products;
use crate::{Error, Result};

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Prefill and decoding.
    Rollout,
    /// Dialogues beside single completions.
    Dialogues,
    /// Forward and backward of an update.
    Train,
    /// Entropies of all taps.
    Entropy,
    /// Single operations.
    Ops,
    /// Everything.
    All,
}

/// Sizes of the measurements.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads; none is one per core.
    pub threads: Option<usize>,
    /// Updates and entropies with numbers of 16 bits of significand.
    pub fast_products: bool,
    /// Times that each measurement is repeated.
    pub reps: usize,
    /// Size of the square matrices that tell the sgemm rate.
    pub sgemm: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Length of a sequence in training, twice as many tokens as a micro batch has sequences.
    pub tokens: usize,
    /// Layer of the internal phase; none is a fifth of the layers.
    pub internal_layer: Option<usize>,
    /// Bytes for activations that an update keeps.
    pub keep: usize,
    /// Numbers of sequences that decode together.
    pub sequences: Vec<usize>,
    /// Tokens of the prompt that they begin with.
    pub prompt: usize,
    /// Tokens that each of them decodes.
    pub new: usize,
}

impl Options {
    fn internal_layer(&self, config: &Config) -> usize {
        self.internal_layer.unwrap_or(config.n_layer.div_ceil(5))
    }
}

/// One line of the results: a case and its figures, units in the keys.
pub type Row = Map<String, Value>;

/// What a case needs.
struct Bench<'b> {
    model: &'b Model,
    options: &'b Options,
    pool: Arc<ThreadPool>,
    /// The same model in host memory, where the measured one lies elsewhere: what results should be.
    truth: Option<Model>,
}

impl Bench<'_> {
    /// An adapter on all targets whose B is not zero, so that every gradient flows.
    fn adapter(&self) -> Result<Lora> {
        let rank = self.options.rank;
        let mut lora = Lora::new(self.model, &Targets::default(), rank, 2.0 * rank as f32, 1)?;
        for slot in 0..lora.slots().len() {
            let mut b = lora.tensors_mut().values_mut(2 * slot + 1);
            b.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 31 % 17) as f32 - 8.0) * 1e-4);
        }
        Ok(lora)
    }

    /// Token ids without meaning, the same every time, none of which ends a completion.
    fn tokens(&self, n: usize, seed: usize) -> Vec<i32> {
        let vocab = self.model.engine().vocab();
        let all = (0..).map(|i: usize| (i * 7919 + seed * 104_729 + 11) % vocab.n_tokens());
        all.map(|t| t as i32).filter(|&t| !vocab.is_eog(t)).take(n).collect()
    }
}

/// The cases of a part, in order.
pub fn cases(part: Part, options: &Options) -> Vec<String> {
    let named = |part: &str, names: &[&str]| -> Vec<String> {
        names.iter().map(|name| format!("{part}/{name}")).collect()
    };
    match part {
        Part::Ops => named("ops", &ops::CASES),
        Part::Train => named("train", &train::CASES),
        Part::Entropy => named("entropy", &entropy::CASES),
        Part::Rollout => {
            options.sequences.iter().map(|n| format!("rollout/{n} sequences")).collect()
        }
        Part::Dialogues => {
            options.sequences.iter().map(|n| format!("dialogues/{n} sequences")).collect()
        }
        Part::All => [Part::Ops, Part::Train, Part::Rollout, Part::Dialogues, Part::Entropy]
            .into_iter()
            .flat_map(|part| cases(part, options))
            .collect(),
    }
}

/// Runs one case in this process.
///
/// # Errors
/// [`Error::Unsupported`] for a case that is none, and what the case meets.
pub fn run_case(model: &Model, case: &str, options: &Options) -> Result<Vec<Row>> {
    if options.fast_products {
        wants_fast_products(model.device())?;
    }
    let pool = Arc::new(ThreadPool::with(options.threads)?.rounding(options.fast_products));
    let truth = match model.device() {
        Device::Cpu => None,
        _ => Some(Model::open(&model.files()[0])?),
    };
    let bench = Bench { model, options, pool, truth };
    let unknown = || Error::Unsupported {
        what: "case",
        got: case.into(),
        supported: cases(Part::All, options).join(", "),
    };
    let (part, name) = case.split_once('/').ok_or_else(unknown)?;
    let sequences = || name.strip_suffix(" sequences").and_then(|n| n.parse().ok());
    let rows = match part {
        "ops" => ops::run(&bench, name)?,
        "train" => train::run(&bench, name)?,
        "entropy" => entropy::run(&bench, name)?,
        "rollout" => sequences().map(|n| rollout::run(&bench, n)).transpose()?,
        "dialogues" => sequences().map(|n| dialogues::run(&bench, n)).transpose()?,
        _ => None,
    };
    let mut rows = rows.ok_or_else(unknown)?;
    let peak = crate::train::memory::peak_bytes();
    for row in &mut rows {
        row.insert("peak_bytes".into(), json!(peak));
        if let Some(bytes) = bench.model.engine().gpu_peak_bytes() {
            row.insert("gpu_peak_bytes".into(), json!(bytes));
        }
    }
    Ok(rows)
}

/// Runs one case in a process of its own: this program with `arguments` and the case's name, of which
/// every line on stdout is a row.
///
/// # Errors
/// [`Error::Engine`] with its words when the process fails.
pub fn spawn_case(program: &Path, arguments: &[String], case: &str) -> Result<Vec<Row>> {
    let out = Command::new(program)
        .args(arguments)
        .args(["--case", case])
        .output()
        .map_err(Error::io("run", program))?;
    let call = || format!("measuring {case}");
    if !out.status.success() {
        let words = String::from_utf8_lossy(&out.stderr);
        let reason = words.trim().strip_prefix("error: ").unwrap_or(words.trim());
        let reason = if reason.is_empty() { out.status.to_string() } else { reason.to_string() };
        return Err(Error::engine(call(), reason, "run it alone with --case to see more"));
    }
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .map(|line| {
            serde_json::from_str(line)
                .map_err(|e| Error::engine(call(), format!("{e} in '{line}'"), "report it"))
        })
        .collect()
}

/// A row with a name and figures.
fn row(case: impl Into<String>, figures: &[(&str, f64)]) -> Row {
    let mut row = Row::new();
    row.insert("case".into(), json!(case.into()));
    for (key, value) in figures {
        // Six digits are more than any measurement has.
        let digits = if *value == 0.0 { 0 } else { 5 - value.abs().log10().floor() as i32 };
        let unit = 10f64.powi(digits.clamp(0, 12));
        row.insert((*key).into(), json!((value * unit).round() / unit));
    }
    row
}

/// Rows as a Markdown table per part, a column per figure.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let name = |row: &Row| row["case"].as_str().unwrap_or_default().to_string();
    for part in rows.chunk_by(|a, b| {
        name(a).split('/').next() == name(b).split('/').next()
            && a.keys().filter(|k| *k != "case").eq(b.keys().filter(|k| *k != "case"))
    }) {
        let columns: Vec<&String> = part[0].keys().collect();
        let mut lines = vec![columns.iter().map(|c| c.to_string()).collect::<Vec<_>>()];
        lines.extend(part.iter().map(|row| columns.iter().map(|c| shown(c, &row[*c])).collect()));
        let widths: Vec<usize> = (0..columns.len())
            .map(|i| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0))
            .collect();
        for (i, line) in lines.iter().enumerate() {
            let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
                if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            text += &format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
            if i == 0 {
                let rules = widths.iter().map(|w| "-".repeat(*w));
                text += &format!("|-{}-|\n", rules.collect::<Vec<_>>().join("-|-"));
            }
        }
        text.push('\n');
    }
    text
}

fn shown(key: &str, value: &Value) -> String {
    match (key, value.as_f64()) {
        (_, None) => value.as_str().unwrap_or_default().into(),
        (key, Some(bytes)) if key.ends_with("bytes") => format!("{:.1} MB", bytes / 1e6),
        (_, Some(x)) if x == x.round() && x.abs() < 1e9 => format!("{x:.0}"),
        (_, Some(x)) if x.abs() >= 100.0 => format!("{x:.0}"),
        (_, Some(x)) if x.abs() >= 0.1 => format!("{x:.3}"),
        (_, Some(x)) => format!("{x:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_held_against_its_own_rates_and_the_cpus_results() {
        use crate::model::Placement;
        // A GPU's kernels on the host.
        let placement = Placement { device: Device::Emulated { precise: false }, gpu_layers: None };
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/qwen3-q8_0.gguf");
        let model = Model::open_on(Path::new(model), placement).unwrap();
        let options = Options {
            threads: Some(1),
            fast_products: false,
            reps: 1,
            sgemm: 64,
            rank: 2,
            tokens: 8,
            internal_layer: None,
            keep: 0,
            sequences: vec![1],
            prompt: 8,
            new: 4,
        };
        for case in ["ops/policies", "ops/rows", "ops/head", "train/full phase"] {
            for row in run_case(&model, case, &options).unwrap() {
                let number = |key: &str| row.get(key).and_then(Value::as_f64);
                if case.starts_with("ops/") {
                    assert!(number("share_of_roofline").is_some_and(|x| x > 0.0), "{row:?}");
                    let error = number("error").expect("an error");
                    assert!(error < 4e-3, "{row:?}");
                }
                assert!(number("seconds").is_some_and(|x| x > 0.0), "{row:?}");
            }
        }
    }

    #[test]
    fn the_table_has_a_line_per_row_and_units() {
        let rows = [
            row("ops/a", &[("seconds", 0.123456789), ("peak_bytes", 5e6)]),
            row("ops/b", &[("seconds", 2.0), ("peak_bytes", 7e6)]),
            row("train/a", &[("tokens_per_s", 123.4)]),
        ];
        let text = table(&rows);
        assert_eq!(text.lines().filter(|line| line.starts_with("| ops/")).count(), 2);
        assert!(
            text.contains("0.123") && text.contains("5.0 MB") && text.contains("123 |"),
            "{text}"
        );
        assert_eq!(rows[0]["seconds"], json!(0.123457));
    }
}

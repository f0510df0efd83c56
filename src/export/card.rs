//! The model card beside an export: Markdown as Hugging Face shows it, with what is known and what was measured.

use std::fmt::Write;
use std::path::Path;

use super::{Adapters, BaseId, Difference, MergeReport};
use crate::gguf::{AdapterFile, Value, write_atomically};
use crate::{Error, Result};

/// A card in the making.
#[derive(Clone, Debug)]
pub struct Card {
    head: String,
    body: String,
}

impl Card {
    /// Of what `library` loads: `peft`, or `gguf`.
    pub fn new(title: &str, library: &str, base_id: Option<&BaseId>) -> Card {
        let mut head = String::from("---\n");
        if let Some(id) = base_id {
            let _ = writeln!(head, "base_model: {id}");
        }
        let _ = writeln!(head, "library_name: {library}\ntags:\n- lora\n- bupo-gguf\n---\n");
        Card { head, body: format!("# {}\n", cell(title)) }
    }

    /// A heading with a table of names and values; nothing where there is none.
    pub fn table(&mut self, heading: &str, rows: &[(String, String)]) {
        if rows.is_empty() {
            return;
        }
        let _ = write!(self.body, "\n## {heading}\n\n| | |\n|---|---|\n");
        for (name, value) in rows {
            let _ = writeln!(self.body, "| {} | {} |", cell(name), cell(value));
        }
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        let _ = write!(self.body, "\n{text}\n");
    }

    /// The base and its hash; the adapters, and what training wrote into them.
    pub fn origin(&mut self, base: &str, base_sha256: &str, adapters: &Adapters) {
        let file = |path: &Path| {
            path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
        };
        let mut rows = vec![
            ("base".to_string(), file(Path::new(base))),
            ("base, SHA-256".into(), base_sha256.to_string()),
        ];
        for (spec, adapter) in adapters.iter() {
            let rank = adapter.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0);
            let shape = format!(
                "{}, {} weights of rank {rank}, alpha {}",
                file(&spec.path),
                adapter.pairs.len(),
                adapter.alpha
            );
            let factor =
                if spec.factor == 1.0 { String::new() } else { format!(", times {}", spec.factor) };
            rows.push(("adapter".into(), shape + &factor));
            rows.extend(training(adapter));
        }
        self.table("Origin", &rows);
    }

    /// What a merge wrote and kept of the change.
    pub fn merge(&mut self, report: &MergeReport) {
        let types: Vec<String> = report.types.iter().map(|(t, n)| format!("{n} x {t}")).collect();
        let mut rows = vec![
            ("tensors".to_string(), types.join(", ")),
            ("bytes".into(), report.bytes.to_string()),
        ];
        if let (Some(kept), Some(error)) = (report.delta_kept, report.error_to_delta) {
            rows.push(("change kept after rounding".into(), format!("{:.1} %", 100.0 * kept)));
            rows.push(("rounding error beside the change".into(), format!("{error:.2}")));
        }
        self.table("Merge", &rows);
        if let Some(warning) = report.warning() {
            self.text(&format!("**{warning}**"));
        }
    }

    /// How far the export is from base and adapters, on the rows of `data`.
    pub fn measured(&mut self, data: &str, d: &Difference) {
        let share = |x: f64| format!("{:.2} %", 100.0 * x);
        let mut rows = vec![
            ("rows, tokens".to_string(), format!("{}, {}", d.rows, d.tokens)),
            ("mean KL(base and adapters, this), nats".into(), format!("{:.3e}", d.kl_mean_nats)),
            ("same likeliest token".into(), share(d.top1_agreement)),
            (
                "perplexity: base and adapters, this".into(),
                format!("{:.4}, {:.4}", d.perplexity_a, d.perplexity_b),
            ),
        ];
        if let (Some(a), Some(b)) = (d.accuracy_a, d.accuracy_b) {
            rows.push((
                "accuracy: base and adapters, this".into(),
                format!("{}, {}", share(a), share(b)),
            ));
        }
        self.table(&format!("Measured on {}", cell(data)), &rows);
    }

    /// Writes it.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomically(path, |out| {
            std::io::Write::write_all(out, (self.head.clone() + &self.body).as_bytes())
                .map_err(Error::io("write", path))
        })
    }
}

/// What training left in an adapter's metadata: `bupo.steps` as `steps`, ..
fn training(adapter: &AdapterFile) -> Vec<(String, String)> {
    let row = |(key, value): &(String, Value)| {
        let name = key.strip_prefix("bupo.")?.replace('_', " ");
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Bool(x) => x.to_string(),
            Value::F32(x) => x.to_string(),
            other => other.integer()?.to_string(),
        };
        (!name.starts_with("base")).then_some((name, value))
    };
    adapter.extra.iter().filter_map(row).collect()
}

/// Text that ends no cell of a table and begins no markup.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('|', "\\|").replace('<', "&lt;")
}

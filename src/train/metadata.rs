//! What an adapter says of its making, in its metadata. Nothing of when and where, so that equal runs give equal bytes;
//! nothing of what was not used.

use std::path::Path;

use super::Trainer;
use crate::data::source;
use crate::gguf::Value;
use crate::{Error, Result};

/// What the base's own metadata says of where it comes from, and what llama.cpp's converters call that in an adapter.
const ORIGIN: [(&str, &str); 4] = [
    ("general.name", "name"),
    ("general.organization", "organization"),
    ("general.version", "version"),
    ("general.author", "author"),
];

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A reward's specification, of a program the file names alone.
fn without_folders(spec: &str) -> String {
    if !spec.contains("cmd:") {
        return spec.into();
    }
    let name = |word: &str| word.rsplit('/').next().unwrap_or(word).to_string();
    let word = |word: &str| match word.strip_prefix("cmd:") {
        Some(program) => format!("cmd:{}", name(program)),
        None => name(word),
    };
    spec.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

impl Trainer<'_> {
    /// Writes the adapter with what made it in its metadata.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let mut extra = self.provenance()?;
        extra.extend(self.base_model());
        self.learner.lora.save(self.model, path, extra)
    }

    /// - `bupo.base`, `bupo.base_sha256`: file name and hash of the model
    /// - `bupo.algorithm`, `bupo.objective`, `bupo.internal_layer`, `bupo.internal_steps`: the last three where there was
    ///   an internal phase, or an objective beside its name
    /// - `bupo.reward`; `bupo.teacher`
    /// - `bupo.data`, `bupo.data_sha256`: file names and hashes
    /// - `bupo.steps`, `bupo.seed`
    fn provenance(&self) -> Result<Vec<(String, Value)>> {
        let c = &self.settings;
        let text = |text: &str| Value::String(text.into());
        let mut entries = vec![
            ("bupo.algorithm", text(&c.algo.name())),
            ("bupo.base", text(&file_name(Path::new(self.model.name())))),
        ];
        let input = |name: &str| self.inputs.get(name).map(|sum| text(sum));
        entries.extend(input("model").map(|sum| ("bupo.base_sha256", sum)));
        if c.internal_steps > 0 {
            if let Some(objective) = c.objective {
                entries.push(("bupo.objective", text(&objective.name())));
            }
            entries.push(("bupo.internal_layer", Value::U32(c.internal_layer as u32)));
            entries.push(("bupo.internal_steps", Value::U64(c.internal_steps)));
        }
        if c.algo.is_rewarded() {
            entries.push(("bupo.reward", text(&without_folders(&c.rewards.spec(&c.data)))));
        }
        if let Some(teacher) = &c.rows.teacher {
            entries.push(("bupo.teacher", text(&file_name(teacher))));
        }
        entries.push(("bupo.data", text(&source::names(&c.data)?)));
        entries.extend(input("data").map(|sum| ("bupo.data_sha256", sum)));
        entries.push(("bupo.steps", Value::U64(self.counters.steps_done)));
        entries.push(("bupo.seed", Value::U64(c.seed)));
        Ok(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
    }

    /// What the base is, under the keys that llama.cpp's converters write: its repository is that of the unquantised
    /// model, where the base names one.
    fn base_model(&self) -> Vec<(String, Value)> {
        let about = |key: &str| self.model.about(key);
        let mut entries: Vec<(String, Value)> = ORIGIN
            .iter()
            .filter_map(|(key, name)| {
                Some((format!("general.base_model.0.{name}"), about(key)?.into()))
            })
            .collect();
        let repository =
            about("general.base_model.0.repo_url").or_else(|| about("general.repo_url"));
        entries.extend(
            repository.map(|url| ("general.base_model.0.repo_url".to_string(), url.into())),
        );
        if !entries.is_empty() {
            entries.insert(0, ("general.base_model.count".into(), Value::U32(1)));
        }
        entries
    }

    /// Writes `adapter.gguf` into a new folder.
    ///
    /// # Errors
    /// The folder is not empty, or the disk refuses.
    pub fn save_to(&mut self, folder: &Path) -> Result<()> {
        super::RunDir::check(folder)?;
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        self.read_inputs()?;
        self.counters.steps_done = 1;
        self.save(&folder.join("adapter.gguf"))
    }
}

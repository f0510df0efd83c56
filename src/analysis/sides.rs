//! The models of a dump: whether they can be compared, and whether all ranks have the same.

use std::path::PathBuf;

use super::dump::{DumpOptions, Settings};
use crate::ggml::ThreadPool;
use crate::model::{Lora, Model};
use crate::team::{Fact, Team};
use crate::{Error, Result};

/// A model with or without an adapter.
pub struct Side<'m> {
    /// The model.
    pub model: &'m Model,
    /// Its adapter.
    pub lora: Option<Lora>,
}

/// Looks whether all ranks have the same models, adapters, settings and processors.
pub(super) fn begin_together(
    team: &Team,
    sides: &[Side<'_>],
    settings: &Settings,
    options: &DumpOptions,
    pool: &ThreadPool,
) -> Result<()> {
    if team.is_alone() {
        return Ok(());
    }
    let adapters = [&settings.adapter, &settings.compare_adapter];
    let files = sides.iter().flat_map(|side| side.model.files().iter().cloned());
    let files = files.chain(adapters.into_iter().flatten().map(PathBuf::from));
    let sums = files.map(|file| crate::gguf::sha256(&file)).collect::<Result<Vec<_>>>()?;
    let what = (settings, options.figures);
    let how = (what, options.samples, options.strict, options.batch_tokens);
    let how = serde_json::to_string(&how).unwrap_or_default();
    let advice = "start all ranks with the same options";
    team.alike(&[
        Fact::program()?,
        Fact::new("SHA-256 of models and adapters", sums.join(" "), "copy the first rank's files"),
        Fact::new("settings", how, advice),
        Fact::new("threads", pool.n_threads().to_string(), "say how many with --threads"),
        Fact::processor(),
    ])
}

/// Two models must mean the same by a token id and by a layer.
pub(super) fn check_comparable(sides: &[Side<'_>]) -> Result<()> {
    let [a, b] = sides else { return Ok(()) };
    let place = format!("--compare {}", b.model.name());
    let layers = [a, b].map(|side| side.model.config().n_layer);
    if layers[0] != layers[1] {
        let (expected, got) = (format!("a model of {} layers", layers[0]), layers[1].to_string());
        let advice = "compare quantisations or trainings of one model";
        return Err(Error::invalid(place, expected, got, advice));
    }
    let (va, vb) = (a.model.engine().vocab(), b.model.engine().vocab());
    let n = va.n_tokens();
    let differs = (0..n as i32).find(|&t| va.spelling(t) != vb.spelling(t));
    if n == vb.n_tokens() && differs.is_none() {
        return Ok(());
    }
    let (expected, got) = match differs {
        Some(t) if n == vb.n_tokens() => {
            (format!("token {t} '{}'", va.spelling(t)), format!("'{}'", vb.spelling(t)))
        }
        _ => (format!("a vocabulary of {n} tokens"), vb.n_tokens().to_string()),
    };
    Err(Error::invalid(place, expected, got, "compare models of one vocabulary"))
}

//! Hidden states themselves, in files that NumPy, PyTorch and whoever reads safetensors opens.
//!
//! A walk through the model gives one layer after the other; each layer's tap has a stream of its own in `FILE.partial/`, into
//! which batches are written, so that memory holds one layer of one batch. Other ranks send theirs to the first one's. At the end the streams are put together
//! behind their headers and the file gets its name.
//!
//! ```text
//! choice    what is written
//! streams   FILE.partial/<tap>.<layer>, a batch at its place, cut to what is whole
//! assemble  streams -> FILE
//! ```

mod assemble;
mod choice;
mod streams;

pub use choice::{Element, Hidden, Positions, Ranges};
pub use streams::{HiddenFiles, Writer, partial};

use std::path::Path;

use super::dump::{DumpOptions, Settings};
use super::rows::{Rows, Sample};
use super::{Pick, Tap};
use crate::model::{Batch, Engine, Lora, Model};
use crate::model::{LayerTaps, Walk};
use crate::{Error, Result};

/// What hidden states take on the disk, counted before any is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    /// Rows of the data that can be used.
    pub rows: u64,
    /// Of these, rows that the model answers first: they count with the longest answer.
    pub answered: u64,
    /// Positions.
    pub positions: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (most, answered) = match self.answered {
            0 => ("", String::new()),
            n => ("at most ", format!(" ({n} rows are answered first)")),
        };
        let mib = self.bytes as f64 / (1u64 << 20) as f64;
        write!(
            f,
            "hidden states of {most}{} positions of {} rows{answered}: {most}{mib:.1} MiB",
            self.positions, self.rows
        )
    }
}

/// Counts what `hidden` takes, by reading the data once.
///
/// # Errors
/// Those of reading; with `strict` the first row that cannot be used.
pub fn size(
    model: &Model,
    settings: &Settings,
    options: &DumpOptions,
    hidden: &Hidden,
) -> Result<Size> {
    let config = model.config();
    hidden.check(config.n_layer)?;
    let mut rows = Rows::open(model, Path::new(&settings.data), settings.system.clone())?;
    let mut size = Size::default();
    let (answers, pick) = (options.answers(), settings.pick);
    let mut room = options.samples.unwrap_or(u64::MAX);
    while room > 0 {
        let row = match rows.next(if answers { settings.max_response } else { 0 })? {
            None => break,
            Some(Ok(row)) => row,
            Some(Err(unusable)) if options.strict => return Err(unusable),
            Some(Err(_)) => continue,
        };
        size.rows += 1;
        let mut lengths: Vec<usize> = row.completions.iter().map(|c| pick.cut(c).len()).collect();
        if lengths.is_empty() {
            size.answered += answers as u64;
            lengths.push(if answers { pick.most(settings.max_response) } else { 0 });
        }
        lengths.truncate(room.try_into().unwrap_or(usize::MAX));
        room -= lengths.len() as u64;
        let positions = |n: usize| hidden.positions.of(row.prompt.len(), n, pick.every).len();
        size.positions += lengths.into_iter().map(positions).sum::<usize>() as u64;
    }
    let each = hidden.bytes_of(config.n_layer, config.n_embd) + streams::INDEX_BYTES;
    size.bytes = size.positions * each;
    if size.rows > 0 && size.positions == 0 {
        let (expected, got) =
            ("positions that a sequence of the data has", hidden.positions.to_string());
        let advice = "positions count from 0 at the prompt's first token";
        return Err(Error::invalid("--hidden-positions", expected, got, advice));
    }
    Ok(size)
}

impl HiddenFiles {
    /// Positions of samples whose states are written.
    pub(super) fn count(&self, runs: &[Vec<Sample>], pick: Pick) -> u64 {
        let of = |s: &Sample| {
            self.positions().of(s.prompt.len(), pick.cut(&s.tokens).len(), pick.every).len() as u64
        };
        runs.iter().flatten().map(of).sum()
    }

    /// Computes the states of samples, those of one row sharing their prompt, and writes them from position `at` on.
    ///
    /// # Errors
    /// Those of the engine and the system; a number that the type cannot hold.
    pub(super) fn take(
        &self,
        at: u64,
        engine: &mut Engine,
        (model, lora): (&Model, Option<&Lora>),
        runs: &[Vec<Sample>],
        pick: Pick,
    ) -> Result<()> {
        self.check_open()?;
        let (batch, places) = self.places(runs, pick, model.config().n_vocab)?;
        if places.is_empty() {
            return Ok(());
        }
        let picked: Vec<i32> = places.iter().map(|place| place.at).collect();
        let mut walk = Walk::new(engine, model, lora, &batch, &picked)?;
        let mut input = walk.hidden(); // [D, S]
        for layer in 1..=self.deepest() {
            let taps = walk.next(engine)?.expect("a layer of the model");
            self.layer(at, layer, &input, &taps)?;
            input = taps.layer_out;
        }
        if self.wants(Tap::Final) {
            self.write(at, Tap::Final, None, &engine.final_norm(model, &input)?)?;
        }
        self.index(at, &places)
    }

    fn layer(&self, at: u64, layer: usize, input: &[f32], taps: &LayerTaps) -> Result<()> {
        for (tap, values) in [
            (Tap::LayerIn, input),
            (Tap::AttnIn, &taps.attn_in),
            (Tap::AttnOut, &taps.attn_out),
            (Tap::FfnIn, &taps.ffn_in),
            (Tap::FfnOut, &taps.ffn_out),
            (Tap::LayerOut, &taps.layer_out),
        ] {
            if self.wants(tap) && self.wants_layer(layer) {
                self.write(at, tap, Some(layer), values)?;
            }
        }
        Ok(())
    }

    /// The samples as a batch, and where in it the wanted positions are. Every token is computed, the last of a completion,
    /// too: the token that stands behind it is any.
    fn places(
        &self,
        runs: &[Vec<Sample>],
        pick: Pick,
        n_vocab: usize,
    ) -> Result<(Batch, Vec<Place>)> {
        let (mut batch, mut places) = (Batch::default(), Vec::new());
        let samples: Vec<&Sample> = runs.iter().flatten().collect();
        for run in samples.chunk_by(|a, b| a.row == b.row) {
            let prompt = &run[0].prompt;
            let tokens = |sample: &Sample| [pick.cut(&sample.tokens), &[0]].concat();
            let completions: Vec<Vec<i32>> = run.iter().map(|sample| tokens(sample)).collect();
            let completions: Vec<&[i32]> = completions.iter().map(Vec::as_slice).collect();
            let begin = batch.len();
            batch.push_group(prompt, &completions, n_vocab)?;
            let mut own = begin + prompt.len();
            for (sample, with_last) in run.iter().zip(completions) {
                let n = with_last.len() - 1;
                for position in self.positions().of(prompt.len(), n, pick.every) {
                    let (at, token) = match position.checked_sub(prompt.len()) {
                        None => (begin + position, prompt[position]),
                        Some(i) => (own + i, with_last[i]),
                    };
                    let (row, completion) = (sample.row, sample.completion);
                    places.push(Place { at: at as i32, row, completion, position, token });
                }
                own += n;
            }
        }
        Ok((batch, places))
    }
}

/// A position whose states are written.
struct Place {
    // In the batch.
    at: i32,
    row: usize,
    completion: usize,
    position: usize,
    token: i32,
}

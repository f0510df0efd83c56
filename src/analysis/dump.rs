//! The dump: rows in, `entropy.jsonl` and running sums out, batch by batch, so that memory does not grow with
//! the rows, and what is done stays done.
//!
//! `entropy.jsonl` is the one truth: `progress.json` says how many rows and bytes of it are whole, and a
//! resumed run cuts it there and reads the sums back from it. Everything else is made of it at the end.

mod share;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::files::DumpFiles;
use super::hidden::{self, Hidden, HiddenFiles};
use super::lenses::Lenses;
use super::measure::{Look, Measured, measure};
use super::pack::{Packed, Pick, close, split};
use super::record::{Figure, Record};
use super::rows::{Answerer, Answering, Rows, Sample, Usable};
use super::samples::Gallery;
use super::sides::{Side, begin_together, check_comparable};
use super::summary::Sums;
use crate::ggml::ThreadPool;
use crate::model::Engine;
use crate::rollout::Sampling;
use crate::team::Team;
use crate::{Error, Result};

/// Rows that are read before those without a completion are answered together.
const WINDOW: usize = 32;
/// Reasons of refused rows that are kept.
const REASONS: usize = 20;

/// What a dump is made of; a resumed one must be told the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Model as given.
    pub model: String,
    /// Adapter as given.
    pub adapter: Option<String>,
    /// Model that is compared with it.
    pub compare: Option<String>,
    /// Adapter of that one.
    pub compare_adapter: Option<String>,
    /// Data.
    pub data: String,
    /// System message before text prompts.
    pub system: Option<String>,
    /// Which tokens are looked at.
    pub pick: Pick,
    /// What is looked at.
    pub look: Look,
    /// Longest answer to a row without completion.
    pub max_response: usize,
    /// Temperature of such answers.
    pub temperature: f32,
    /// Their seed.
    pub seed: u64,
    /// Hidden states that are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<Hidden>,
}

/// How the work is done; none of it changes the figures.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// Folder of the results.
    pub out: PathBuf,
    /// Go on with what is there.
    pub resume: bool,
    /// Completions at most.
    pub samples: Option<u64>,
    /// Stop at the first row that cannot be used.
    pub strict: bool,
    /// Tokens of a batch.
    pub batch_tokens: usize,
    /// Keep the records as JSON lines, too, beside Parquet.
    pub json_lines: bool,
    /// Answers do not depend on who is decoded beside them.
    pub batch_invariant: bool,
    /// Measure figures. Without, there are only hidden states, and rows without a completion are not answered.
    pub figures: bool,
}

impl DumpOptions {
    /// Whether rows without a completion are answered.
    pub fn answers(&self) -> bool {
        self.figures
    }
}

/// What a dump runs on, and who may look on or stop it.
pub struct Run<'r> {
    /// Threads.
    pub pool: &'r Arc<ThreadPool>,
    /// Becomes true to stop it after the batch.
    pub stop: &'r AtomicBool,
    /// Who shares the batches; the first rank writes.
    pub team: &'r Team,
    /// Looks on.
    pub watcher: &'r mut dyn Watcher,
}

/// Whoever watches.
pub trait Watcher {
    /// Tokens that a resumed dump had measured before.
    fn resumed(&mut self, _tokens: u64) {}
    /// Completions and tokens measured so far.
    fn measured(&mut self, _samples: u64, _tokens: u64) {}
    /// Rows being answered.
    fn answering(&mut self, _progress: crate::rollout::Progress) {}
    /// Something to tell, such as a refused row.
    fn note(&mut self, _text: &str) {}
}

/// A watcher that looks away.
pub struct Unwatched;

impl Watcher for Unwatched {}

/// What a dump has found out.
pub struct Findings {
    /// Sums of the model, and of the one it is compared with.
    pub sums: Vec<Sums>,
    /// What mixes tokens in each layer, of the model and of the one it is compared with.
    pub mixers: Vec<Vec<&'static str>>,
    /// Sums of the differences, second less first.
    pub difference: Sums,
    /// A few completions to look at, under the model and under the one it is compared with.
    pub galleries: Vec<Gallery>,
    /// The same under the model through the other lens, as far as [`Lenses`] took their tokens.
    pub other_lens: Gallery,
    /// Their prompts.
    pub prompts: Vec<String>,
    /// Completions measured.
    pub samples: u64,
    /// Rows read.
    pub rows: u64,
    /// Rows that could not be used.
    pub refused: u64,
    /// Why, of the first of them.
    pub reasons: Vec<String>,
    /// The first tokens through both lenses.
    pub lenses: Lenses,
    /// Positions whose hidden states were written, and the bytes of their files once they are whole.
    pub hidden: Option<(u64, u64)>,
    /// Whether it was stopped before the end of the data.
    pub interrupted: bool,
}

/// Of a batch: by model, layer - 1 and place.
type Figures = Vec<Vec<Vec<Measured>>>;

/// A dump in the making.
struct Dump<'d, 'm> {
    sides: &'d mut [Side<'m>],
    settings: &'d Settings,
    options: &'d DumpOptions,
    engine: Engine,
    // Of the first rank.
    files: Option<DumpFiles>,
    hidden: Option<HiddenFiles>,
    findings: Findings,
    // Rows of the window that cannot be used, and why.
    unusable: Vec<(usize, String)>,
    stop: &'d AtomicBool,
    team: &'d Team,
    watcher: &'d mut dyn Watcher,
}

/// Measures the data's completions under one or two models and writes the records.
///
/// # Errors
/// The folder is not empty, the settings are not those of what is there, no row can be used; with `strict`
/// the first row that cannot be used. An interruption is no error: see [`Findings::interrupted`].
pub fn dump<'m>(
    sides: &mut [Side<'m>],
    settings: &Settings,
    options: &DumpOptions,
    run: Run<'_>,
) -> Result<Findings> {
    let Run { pool, stop, team, watcher } = run;
    let model = sides[0].model;
    check_comparable(sides)?;
    for side in sides.iter() {
        settings.look.check(side.model.config().n_vocab)?;
    }
    let sampling = Sampling { temperature: settings.temperature, ..Sampling::default() };
    sampling.check()?;
    let n_layer = model.config().n_layer;
    let mut rows = Rows::open(model, Path::new(&settings.data), settings.system.clone())?;
    let answering =
        Answering { max_response: settings.max_response, sampling, seed: settings.seed };
    let invariant = crate::rollout::invariant(options.batch_invariant, model.device(), team)?;
    let mut answerer = Answerer::new(model, pool.clone(), answering, team, invariant);
    begin_together(team, sides, settings, options, pool)?;
    let mut findings = Findings {
        sums: sides.iter().map(|side| Sums::of(side.model.config())).collect(),
        mixers: sides.iter().map(|side| side.model.config().mixers()).collect(),
        difference: Sums::new(n_layer),
        galleries: vec![Gallery::default(); sides.len()],
        other_lens: Gallery::default(),
        prompts: Vec::new(),
        samples: 0,
        rows: 0,
        refused: 0,
        reasons: Vec::new(),
        lenses: Lenses::default(),
        hidden: None,
        interrupted: false,
    };
    let mut size = hidden::Size::default();
    if let Some(hidden) = &settings.hidden {
        size = team.from_first(|| {
            let size = hidden::size(model, settings, options, hidden)?;
            HiddenFiles::check_free(hidden, options.resume).map(|()| size)
        })?;
        watcher.note(&size.to_string());
    }
    let measured = sides.iter().filter(|_| options.figures);
    let mixtures: Vec<bool> = measured.map(|side| side.model.config().is_mixture()).collect();
    let (mut files, mut written) = (None, 0);
    if team.is_first() {
        let (out, resume) = (&options.out, options.resume);
        let open = DumpFiles::open(out, settings, &mixtures, resume, |records| {
            take(&mut findings, records)
        })?;
        let done = open.progress();
        (findings.samples, findings.rows) = (done.samples, done.rows);
        (findings.refused, findings.reasons) = (done.refused, done.reasons.clone());
        written = done.hidden;
        files = Some(open);
    }
    (findings.samples, findings.rows, written) =
        team.from_first(|| Ok((findings.samples, findings.rows, written)))?;
    let hidden = match &settings.hidden {
        None => None,
        Some(hidden) => {
            let of = (n_layer, model.config().n_embd);
            let mut own = HiddenFiles::elsewhere(hidden, of, written);
            let opened = team.from_first(|| {
                own = HiddenFiles::open(hidden, of, size.bytes, findings.rows > 0, written)?;
                Ok(())
            });
            match opened {
                Ok(()) => Some(own),
                Err(error) => {
                    if let Some(files) = files.filter(|_| findings.rows == 0) {
                        files.discard()?;
                    }
                    return Err(error);
                }
            }
        }
    };
    if options.resume {
        let tokens = findings.sums[0].tokens();
        watcher.resumed(if options.figures { tokens } else { written });
    }
    let mut dump = Dump {
        engine: Engine::on(sides[0].model.device(), pool.clone())?,
        sides,
        settings,
        options,
        files,
        hidden,
        findings,
        unusable: Vec::new(),
        stop,
        team,
        watcher,
    };
    for _ in 0..dump.findings.rows {
        rows.next(dump.longest())?;
    }
    let outcome = dump.run(&mut rows, &mut answerer);
    dump.findings.interrupted = matches!(outcome, Err(Error::Interrupted));
    let Some(mut files) = dump.files else {
        return if dump.findings.interrupted {
            Ok(dump.findings)
        } else {
            outcome.map(|()| dump.findings)
        };
    };
    if files.progress().samples > 0 {
        if !dump.findings.interrupted {
            outcome?;
        }
        files.finish()?;
        if let Some(hidden) = dump.hidden.take() {
            dump.findings.hidden = Some(match dump.findings.interrupted {
                true => (hidden.written(), 0),
                false => (hidden.written(), hidden.finish(&about(settings))?),
            });
        }
        dump.findings.lenses = files.progress().lenses.clone();
        dump.findings.other_lens = files.other_lens().clone();
        dump.findings.prompts = files.progress().prompts.clone();
        return Ok(dump.findings);
    }
    if let Some(hidden) = dump.hidden.take() {
        hidden.discard()?;
    }
    files.discard()?;
    outcome?;
    let got = match dump.findings.reasons.first() {
        Some(first) => format!("none in {}, for {first}", dump.findings.rows),
        None => "no row".into(),
    };
    let advice = "give rows with a prompt, and a completion or room to answer";
    Err(Error::invalid(&settings.data, "a row that can be used", got, advice))
}

/// What a file of hidden states says of itself.
fn about(settings: &Settings) -> Vec<(&'static str, String)> {
    let mut about = vec![
        ("made_by", concat!("bupo-gguf ", env!("CARGO_PKG_VERSION")).to_string()),
        ("model", settings.model.clone()),
        ("data", settings.data.clone()),
    ];
    about.extend(settings.adapter.as_ref().map(|adapter| ("adapter", adapter.clone())));
    about.extend(settings.hidden.as_ref().map(|h| ("positions", h.positions.to_string())));
    about
}

/// Adds the records of one place under both models to the findings.
fn take(findings: &mut Findings, records: &[Record]) {
    for (sums, record) in findings.sums.iter_mut().zip(records) {
        sums.add(record.layer, &record.figures);
        if let Some(routed) = &record.routed {
            sums.add_routed(record.layer, routed);
        }
    }
    if let [a, b] = records {
        findings.difference.add_difference(a.layer, &a.figures, &b.figures);
    }
    for (gallery, record) in findings.galleries.iter_mut().zip(records) {
        gallery.take(record);
    }
}

impl<'m> Dump<'_, 'm> {
    fn run(&mut self, rows: &mut Rows<'m>, answerer: &mut Answerer<'m>) -> Result<()> {
        while !self.limit_reached() {
            let mut usable = Vec::with_capacity(WINDOW);
            let first = rows.read();
            while rows.read() - first < WINDOW {
                match rows.next(self.longest())? {
                    None => break,
                    Some(Ok(row)) => usable.push(row),
                    Some(Err(unusable)) if self.options.strict => return Err(unusable),
                    Some(Err(unusable)) => {
                        self.watcher.note(&format!("left out: {unusable}"));
                        self.unusable.push((rows.read() - 1, unusable.to_string()));
                    }
                }
            }
            let end = rows.read();
            if end == first {
                break;
            }
            let mut samples = self.samples(usable, answerer)?;
            let room = self.options.samples.map_or(u64::MAX, |n| n - n.min(self.findings.samples));
            samples.truncate(room.try_into().unwrap_or(usize::MAX));
            self.measure(samples, end)?;
        }
        Ok(())
    }

    /// The samples of rows, those without a completion answered.
    fn samples(&mut self, rows: Vec<Usable>, answerer: &mut Answerer<'m>) -> Result<Vec<Sample>> {
        let open: Vec<(usize, Arc<[i32]>)> = rows
            .iter()
            .filter(|row| row.completions.is_empty())
            .map(|row| (row.row, row.prompt.clone()))
            .collect();
        let mut answers = vec![Vec::new(); if self.options.answers() { 0 } else { open.len() }];
        if !open.is_empty() && self.options.answers() {
            let lora = self.sides[0].lora.as_mut();
            let watcher = &mut *self.watcher;
            let mut progress = |p| watcher.answering(p);
            answers = answerer.answer(lora, &open, &mut progress, self.stop)?;
        }
        let mut answers = answers.into_iter();
        let mut samples = Vec::new();
        for row in rows {
            let completions = match row.completions.is_empty() {
                true => vec![answers.next().expect("one for each open row")],
                false => row.completions,
            };
            samples.extend(completions.into_iter().enumerate().map(|(completion, tokens)| {
                Sample { row: row.row, completion, prompt: row.prompt.clone(), tokens }
            }));
        }
        Ok(samples)
    }

    /// Measures samples; after each batch whatever rows are complete are noted as done, at the end all up
    /// to `end`.
    fn measure(&mut self, samples: Vec<Sample>, end: usize) -> Result<()> {
        let batches = split(samples, self.settings.pick, self.options.batch_tokens);
        let firsts: Vec<usize> = batches.iter().map(|runs| runs[0][0].row).collect();
        let (mut whole, nothing) = (true, batches.is_empty());
        let shared = match self.team.is_alone() {
            true => None,
            false => Some(self.shared_figures(&batches)?),
        };
        let mut shared = shared.into_iter().flatten();
        for (i, runs) in batches.into_iter().enumerate() {
            let measured = shared.next();
            // A row that was begun is ended, so that sums and files say the same.
            if measured.is_none() && whole && self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let last = runs.last().expect("a batch has rows")[0].row;
            self.batch(runs, measured)?;
            let written = self.hidden.as_ref().map_or(0, HiddenFiles::written);
            let tokens = self.findings.sums[0].tokens();
            let tokens = if self.options.figures { tokens } else { written };
            self.watcher.measured(self.findings.samples, tokens);
            if let Some(files) = &mut self.files {
                files.hidden(written);
            }
            // A row that goes on in the next batch is not done; refused rows after the last batch are.
            let next = firsts.get(i + 1).copied();
            whole = next != Some(last);
            if whole {
                let all = next.is_none() && !self.limit_reached();
                self.commit(if all { end } else { last + 1 })?;
            }
        }
        if nothing {
            self.commit(end)?;
        }
        Ok(())
    }

    fn packed(&self, runs: Vec<Vec<Sample>>) -> Result<Packed> {
        close(runs, self.settings.pick, self.sides[0].model.config().n_vocab)
    }

    /// Tokens that a row without a completion gets.
    fn longest(&self) -> usize {
        if self.options.answers() { self.settings.max_response } else { 0 }
    }

    fn limit_reached(&self) -> bool {
        self.options.samples.is_some_and(|n| self.findings.samples >= n)
    }

    /// The rows before `rows` are done.
    fn commit(&mut self, rows: usize) -> Result<()> {
        let (done, later) =
            std::mem::take(&mut self.unusable).into_iter().partition(|u| u.0 < rows);
        self.unusable = later;
        let f = &mut self.findings;
        let done: Vec<(usize, String)> = done;
        f.refused += done.len() as u64;
        f.reasons.extend(done.into_iter().map(|(_, reason)| reason));
        f.reasons.truncate(REASONS);
        f.rows = rows as u64;
        match &mut self.files {
            Some(files) => files.commit(f.rows, f.samples, f.refused, &f.reasons),
            None => Ok(()),
        }
    }

    /// One batch: hidden states to their streams, figures to the records; both may have been measured by whoever took it.
    fn batch(&mut self, runs: Vec<Vec<Sample>>, measured: Option<Figures>) -> Result<()> {
        if let Some(hidden) = &mut self.hidden {
            let (side, pick) = (&self.sides[0], self.settings.pick);
            if measured.is_none() {
                let (at, under) = (hidden.written(), (side.model, side.lora.as_ref()));
                hidden.take(at, &mut self.engine, under, &runs, pick)?;
            }
            hidden.advance(hidden.count(&runs, pick));
        }
        if !self.options.figures {
            self.findings.samples += runs.iter().map(|run| run.len() as u64).sum::<u64>();
            return Ok(());
        }
        let packed = self.packed(runs)?;
        let measured = match measured {
            Some(measured) => measured,
            None => self.figures(&packed)?,
        };
        self.record(&packed, measured)
    }

    /// One batch under every model.
    fn figures(&mut self, packed: &Packed) -> Result<Figures> {
        let mut measured: Figures = Vec::with_capacity(self.sides.len());
        for side in self.sides.iter() {
            let lora = side.lora.as_ref();
            let (batch, picked) = (&packed.batch, &packed.picked);
            let look = self.settings.look;
            measured.push(measure(&mut self.engine, side.model, lora, batch, picked, look)?);
        }
        Ok(measured)
    }

    /// A batch that was measured: records to the files, figures to the sums.
    fn record(&mut self, packed: &Packed, measured: Figures) -> Result<()> {
        let Some(files) = &mut self.files else {
            self.findings.samples += packed.samples.len() as u64;
            return Ok(());
        };
        let (model, lora) = (self.sides[0].model, self.sides[0].lora.as_ref());
        let places = (&packed.batch, packed.picked.as_slice());
        let (engine, look) = (&mut self.engine, self.settings.look);
        let through = files.lenses().take(engine, (model, lora), places, &measured[0], look)?;
        let vocab = model.engine().vocab();
        let mut at = 0;
        for (sample, n) in &packed.samples {
            let own = at..at + n;
            at += n;
            let record = |measured: &[Vec<Measured>], layer: usize, i: usize| -> Result<Record> {
                let scored = packed.batch.scored[packed.picked[i]];
                let mut m = measured[layer][i].clone();
                check_finite(&m, sample)?;
                for top in m.tops.iter_mut().flatten() {
                    top.texts = top.tokens.iter().map(|&t| vocab.text(&[t], true)).collect();
                }
                Ok(Record {
                    row: sample.row,
                    completion: sample.completion,
                    layer: layer + 1,
                    position: packed.batch.positions[scored.row as usize] as usize,
                    token: scored.target,
                    text: vocab.text(&[scored.target], true),
                    figures: m.figures,
                    tops: m.tops,
                    routed: m.routed,
                })
            };
            for layer in 0..model.config().n_layer {
                for i in own.clone() {
                    let sides = measured.iter().map(|side| record(side, layer, i));
                    let records = sides.collect::<Result<Vec<Record>>>()?;
                    files.write(&records)?;
                    take(&mut self.findings, &records);
                    if through.first().is_some_and(|taken| i < taken.len()) {
                        files.other_lens().take(&record(&through, layer, i)?);
                    }
                }
            }
            let prompt = |tokens: &[i32]| vocab.text(tokens, false);
            files.keep_prompt(self.findings.samples, || prompt(&sample.prompt));
            self.findings.samples += 1;
        }
        Ok(())
    }
}

/// A figure that is no number would poison every mean after it.
fn check_finite(m: &Measured, sample: &Sample) -> Result<()> {
    match Figure::ALL.into_iter().find(|(figure, _)| !m.figures[*figure as usize].is_finite()) {
        None => Ok(()),
        Some((figure, name)) => Err(Error::engine(
            format!("measuring row {}", sample.row),
            format!("{name} is {}", m.figures[figure as usize]),
            "the model's weights or the adapter hold values that are not finite; fetch the file again",
        )),
    }
}

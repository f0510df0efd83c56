//! Where a run's problems come from, and in which order.
//!
//! A specification is a list, with commas between, of data files and tasks: `a.parquet`,
//! `a.jsonl,b.csv`, `a.parquet:2,task:add:1`. Without weights the rows of all files make one pool.
//! With weights (or a task in the list) each source gets its share of the prompts, 1 where none is
//! written, and runs through its own rows: position n goes to the source that is furthest behind its
//! share, `argmax_i (w_i / sum w) (n + 1) - taken_i`.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    Columns, Problem, Task, columns::difficulty_number, read_problems, table, tasks::is_task,
};
use crate::{Error, Result};

/// What tells one sequence of problems from another.
#[derive(Debug, Clone, Default)]
pub struct SourceOptions {
    /// Seed of the order.
    pub seed: u64,
    /// Columns of the files.
    pub columns: Columns,
    /// Easy problems first, by the number in their difficulty, in every epoch; equal ones shuffled.
    pub curriculum: bool,
}

/// An endless, seeded sequence of problems with random access, so that a run resumes at its position.
///
/// A task generates its training split. A file's rows are shuffled anew for each epoch: positions
/// `e * len .. (e + 1) * len` are a permutation that depends on the seed and e alone.
#[derive(Debug)]
pub struct ProblemSource {
    options: SourceOptions,
    parts: Vec<Part>,
    turns: Mutex<Turns>,
}

/// A source and its share.
#[derive(Debug)]
struct Part {
    weight: f64,
    problems: Problems,
}

#[derive(Debug)]
enum Problems {
    Task(Task),
    Rows(Rows),
}

#[derive(Debug)]
struct Rows {
    rows: Vec<Problem>,
    /// In the order of `rows`, for a curriculum; else empty.
    difficulty: Vec<f64>,
    /// The order last asked for, of this seed and epoch.
    order: Mutex<Option<(u64, u64, Vec<usize>)>>,
}

/// Which part the last position went to.
#[derive(Debug, Default)]
struct Turns {
    /// Positions given out.
    next: u64,
    taken: Vec<u64>,
    last: usize,
}

impl ProblemSource {
    /// Opens a specification with the usual columns, shuffled.
    pub fn open(spec: &str, seed: u64) -> Result<ProblemSource> {
        ProblemSource::with(spec, SourceOptions { seed, ..SourceOptions::default() })
    }

    /// Opens a specification: files (JSON lines, Parquet, CSV) and tasks, see the head of this file.
    ///
    /// # Errors
    /// A file or task that cannot be read, or with a curriculum a row without difficulty.
    pub fn with(spec: &str, options: SourceOptions) -> Result<ProblemSource> {
        let items = split(spec)?;
        let shares = items.len() > 1 && items.iter().any(|(name, w)| w.is_some() || is_task(name));
        let mut parts: Vec<Part> = Vec::with_capacity(items.len());
        let mut pool = Vec::new();
        for (name, weight) in &items {
            let weight = weight.unwrap_or(1.0);
            if is_task(name) {
                parts.push(Part { weight, problems: Problems::Task(Task::parse(name)?) });
                continue;
            }
            pool.extend(read_problems(Path::new(name), &options.columns)?);
            if shares {
                let problems = Problems::Rows(Rows::new(std::mem::take(&mut pool), &options)?);
                parts.push(Part { weight, problems });
            }
        }
        if !pool.is_empty() {
            let problems = Problems::Rows(Rows::new(pool, &options)?);
            parts.push(Part { weight: 1.0, problems });
        }
        Ok(ProblemSource { options, parts, turns: Mutex::default() })
    }

    /// The problem at position `index` of training.
    pub fn problem(&self, index: u64) -> Problem {
        self.problem_of_round(0, index)
    }

    /// The problem at a position of another sequence over the same problems: round 0 is that of
    /// [`ProblemSource::problem`], the others are shuffled apart from it (for groups to be replaced).
    pub fn problem_of_round(&self, round: u64, index: u64) -> Problem {
        let (part, index) = self.turn(index);
        // An odd factor makes rounds and parts differ without a say in round 0 of a single part.
        let seed = self.options.seed.wrapping_add(
            round.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add((part as u64) << 32),
        );
        match &self.parts[part].problems {
            Problems::Task(task) => task.train_problem(seed, index),
            Problems::Rows(rows) => rows.problem(seed, index),
        }
    }

    /// The part that a position goes to, and the position within it.
    fn turn(&self, index: u64) -> (usize, u64) {
        if self.parts.len() == 1 {
            return (0, index);
        }
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if index + 1 < turns.next || turns.next == 0 {
            *turns = Turns { taken: vec![0; self.parts.len()], ..Turns::default() };
        }
        let total: f64 = self.parts.iter().map(|p| p.weight).sum();
        while turns.next <= index {
            let due = (turns.next + 1) as f64 / total;
            let behind = |p: usize| self.parts[p].weight * due - turns.taken[p] as f64;
            let first = |a: usize, b: usize| if behind(b) > behind(a) { b } else { a };
            let part = (0..self.parts.len()).reduce(first).expect("at least one part");
            turns.taken[part] += 1;
            turns.last = part;
            turns.next += 1;
        }
        (turns.last, turns.taken[turns.last] - 1)
    }

    /// `n` problems to evaluate on: a task's held-out ones; of a file's rows a seeded sample without
    /// repetition, all of them in file order when there are no more than `n`. Several parts in turn.
    pub fn eval_problems(&self, n: usize) -> Vec<Problem> {
        let of = |part: &Part, n: usize| match &part.problems {
            Problems::Task(task) => task.eval_problems(n, self.options.seed),
            Problems::Rows(rows) => rows.sample(n, self.options.seed),
        };
        if let [part] = self.parts.as_slice() {
            return of(part, n);
        }
        let mut shares = vec![0; self.parts.len()];
        (0..n as u64).for_each(|i| shares[self.turn(i).0] += 1);
        self.parts.iter().zip(shares).flat_map(|(part, n)| of(part, n)).collect()
    }

    /// Drops the rows that `keep` refuses, and says how many. Tasks stay as they are.
    ///
    /// # Errors
    /// Those of `keep`; [`Error::Invalid`] when a file has no row left.
    pub fn retain(&mut self, mut keep: impl FnMut(&Problem) -> Result<bool>) -> Result<usize> {
        let mut dropped = 0;
        for part in &mut self.parts {
            let Problems::Rows(rows) = &mut part.problems else { continue };
            let all = std::mem::take(&mut rows.rows);
            let (before, place) = (all.len(), all[0].source.clone());
            let mut kept = Vec::with_capacity(before);
            for problem in all {
                if keep(&problem)? {
                    kept.push(problem);
                }
            }
            if kept.is_empty() {
                let expected = "a row that passes the filter";
                let got = format!("none of {before}");
                return Err(Error::invalid(place, expected, got, "raise --max-prompt"));
            }
            dropped += before - kept.len();
            *rows = Rows::new(kept, &self.options)?;
        }
        Ok(dropped)
    }

    /// Problems in an epoch; `None` with a task, which has no end, and with shares.
    pub fn epoch_len(&self) -> Option<usize> {
        match self.parts.as_slice() {
            [Part { problems: Problems::Rows(rows), .. }] => Some(rows.rows.len()),
            _ => None,
        }
    }

    /// The task, where the problems are generated by one alone.
    pub fn task(&self) -> Option<Task> {
        match self.parts.as_slice() {
            [Part { problems: Problems::Task(task), .. }] => Some(*task),
            _ => None,
        }
    }
}

impl Rows {
    fn new(rows: Vec<Problem>, options: &SourceOptions) -> Result<Rows> {
        let number = |p: &Problem| difficulty_number(p.difficulty.as_deref(), &p.source);
        let ordered = if options.curriculum { rows.as_slice() } else { &[] };
        let difficulty = ordered.iter().map(number).collect::<Result<_>>()?;
        Ok(Rows { rows, difficulty, order: Mutex::default() })
    }

    fn problem(&self, seed: u64, index: u64) -> Problem {
        let (epoch, place) = (index / self.rows.len() as u64, index % self.rows.len() as u64);
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let known = matches!(&*order, Some((s, e, _)) if (*s, *e) == (seed, epoch));
        if !known {
            let mut rows = permutation(self.rows.len(), seed, epoch);
            if !self.difficulty.is_empty() {
                // Stable: equally hard ones stay shuffled.
                rows.sort_by(|&a, &b| self.difficulty[a].total_cmp(&self.difficulty[b]));
            }
            *order = Some((seed, epoch, rows));
        }
        let (_, _, rows) = order.as_ref().expect("just made");
        self.rows[rows[place as usize]].clone()
    }

    fn sample(&self, n: usize, seed: u64) -> Vec<Problem> {
        if self.rows.len() <= n {
            return self.rows.clone();
        }
        let order = permutation(self.rows.len(), seed, 0);
        order[..n].iter().map(|&row| self.rows[row].clone()).collect()
    }
}

/// The files of a specification, in its order, those of folders one by one.
///
/// # Errors
/// [`Error::Invalid`] for a list that cannot be read.
pub fn files(spec: &str) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for (name, _) in split(spec)?.into_iter().filter(|(name, _)| !is_task(name)) {
        let path = PathBuf::from(name);
        // What is not there is told where it is opened.
        all.extend(if path.exists() { table::files(&path)? } else { vec![path] });
    }
    Ok(all)
}

/// The specification with file names in place of paths.
///
/// # Errors
/// [`Error::Invalid`] for a list that cannot be read.
pub fn names(spec: &str) -> Result<String> {
    let name = |(name, weight): (String, Option<f64>)| {
        let file = Path::new(&name).file_name().map(|n| n.to_string_lossy().into_owned());
        let name = if is_task(&name) { name } else { file.unwrap_or(name) };
        name + &weight.map_or(String::new(), |w| format!(":{w}"))
    };
    Ok(split(spec)?.into_iter().map(name).collect::<Vec<_>>().join(","))
}

/// The files of a specification whose rows make one pool: no tasks, no weights.
///
/// # Errors
/// [`Error::Invalid`] for a task, a weight, or a list that cannot be read.
pub fn row_files(spec: &str) -> Result<Vec<PathBuf>> {
    let refuse = |got: String, advice: &str| {
        Err(Error::invalid("--data", "files of rows, with commas between", got, advice))
    };
    let item = |(name, weight): (String, Option<f64>)| match weight {
        _ if is_task(&name) => refuse(
            name,
            "name the file: a task has solutions (--algo sft), and no rows of this kind",
        ),
        Some(weight) => refuse(format!("{name}:{weight}"), "give rows a `weight` of their own"),
        None => Ok(name.into()),
    };
    split(spec)?.into_iter().map(item).collect()
}

/// The specification with absolute paths, so that it means the same in every folder.
///
/// # Errors
/// [`Error::Invalid`] for a list that cannot be read, [`Error::Io`] when there is no current folder.
pub fn absolute(spec: &str) -> Result<String> {
    let item = |(name, weight): (String, Option<f64>)| -> Result<String> {
        let mut text = name;
        if !is_task(&text) {
            let path = std::path::absolute(&text).map_err(Error::io("find", &text))?;
            text = path.to_string_lossy().into_owned();
        }
        Ok(text + &weight.map_or(String::new(), |w| format!(":{w}")))
    };
    let items: Vec<String> = split(spec)?.into_iter().map(item).collect::<Result<_>>()?;
    Ok(items.join(","))
}

/// The items of a specification with the weights that are written. What exists under its whole name is
/// that file, whatever commas and colons the name has.
fn split(spec: &str) -> Result<Vec<(String, Option<f64>)>> {
    let whole = |name: &str| Path::new(name).exists();
    let items: Vec<&str> = if whole(spec) { vec![spec] } else { spec.split(',').collect() };
    let mut parsed = Vec::with_capacity(items.len());
    for item in items.into_iter().map(str::trim) {
        if item.is_empty() {
            let advice = "write --data a.parquet:2,b.jsonl";
            return Err(Error::invalid(
                "--data",
                "files with commas between",
                format!("{spec:?}"),
                advice,
            ));
        }
        let weighted = if whole(item) { None } else { item.rsplit_once(':') };
        parsed.push(match weighted.map(|(name, w)| (name, w.parse::<f64>())) {
            Some((name, Ok(weight))) if weight > 0.0 && weight.is_finite() => {
                (name.to_owned(), Some(weight))
            }
            Some((_, Ok(weight))) => {
                let advice = "write --data a.parquet:2,b.jsonl";
                let place = format!("--data {item}");
                return Err(Error::invalid(place, "a weight above 0", weight.to_string(), advice));
            }
            _ => (item.to_owned(), None),
        });
    }
    Ok(parsed)
}

/// The order of `n` rows in an epoch.
pub(crate) fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut rng);
    order
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, io::Write};

    use super::*;

    fn rows(n: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for i in 0..n {
            writeln!(file, r#"{{"prompt": "p", "answer": {i}}}"#).unwrap();
        }
        file
    }

    #[test]
    fn every_epoch_is_another_permutation_of_all_rows() {
        let file = rows(50);
        let spec = file.path().to_str().unwrap();
        let source = ProblemSource::open(spec, 1).unwrap();
        let epoch = |e: u64| (e * 50..(e + 1) * 50).map(|i| source.problem(i).answer);
        let all: BTreeSet<String> = (0..50).map(|i| i.to_string()).collect();
        assert_eq!(epoch(0).collect::<BTreeSet<_>>(), all);
        assert_eq!(epoch(3).collect::<BTreeSet<_>>(), all);
        assert!(epoch(0).ne(epoch(1)));
        let expected = epoch(1).nth(7).unwrap();
        let again = ProblemSource::open(spec, 1).unwrap();
        assert_eq!(again.problem(57).answer, expected);
        let other = ProblemSource::open(spec, 2).unwrap();
        assert!((0..50).any(|i| other.problem(i) != again.problem(i)));
        assert_eq!(again.epoch_len(), Some(50));
    }

    #[test]
    fn evaluation_takes_each_row_once() {
        let file = rows(20);
        let source = ProblemSource::open(file.path().to_str().unwrap(), 1).unwrap();
        let ids: BTreeSet<_> = source.eval_problems(12).into_iter().map(|p| p.id).collect();
        assert_eq!(ids.len(), 12);
        let all: Vec<_> = source.eval_problems(100).into_iter().map(|p| p.answer).collect();
        assert!(all.iter().eq(&(0..20).map(|i| i.to_string()).collect::<Vec<_>>()));
    }

    #[test]
    fn tasks_train_on_one_split_and_evaluate_on_the_other() {
        let source = ProblemSource::open("task:sub", 4).unwrap();
        let held: BTreeSet<_> = source.eval_problems(2001).into_iter().map(|p| p.id).collect();
        assert!((0..2000).all(|i| !held.contains(&source.problem(i).id)));
        assert_eq!(source.epoch_len(), None);
        assert!(ProblemSource::open("task:none", 0).is_err());
    }

    #[test]
    fn weights_are_shares_and_positions_are_random_access() {
        let (a, b) = (rows(10), rows(7));
        let name = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
        let spec = format!("{}:2,{},task:add:1", name(&a), name(&b));
        let source = ProblemSource::open(&spec, 3).unwrap();
        let of = |p: &Problem| {
            [name(&a), name(&b), "task:add".into()].iter().position(|n| p.source.starts_with(n))
        };
        let first: Vec<Problem> = (0..400).map(|i| source.problem(i)).collect();
        for (part, share) in [(0, 200), (1, 100), (2, 100)] {
            let n = first.iter().filter(|p| of(p) == Some(part)).count();
            assert_eq!(n, share, "part {part}");
        }
        // Never far from the shares, and each part runs through its own rows.
        let n = first[..40].iter().filter(|p| of(p) == Some(0)).count();
        assert_eq!(n, 20);
        let ids: BTreeSet<_> = first[..20].iter().filter(|p| of(p) == Some(0)).collect_ids();
        assert_eq!(ids.len(), 10);
        let again = ProblemSource::open(&spec, 3).unwrap();
        for i in [399, 7, 8, 200, 0] {
            assert_eq!(again.problem(i), first[i as usize], "position {i}");
        }
    }

    trait CollectIds {
        fn collect_ids(self) -> BTreeSet<String>;
    }

    impl<'p, I: Iterator<Item = &'p Problem>> CollectIds for I {
        fn collect_ids(self) -> BTreeSet<String> {
            self.map(|p| p.id.clone()).collect()
        }
    }

    #[test]
    fn files_without_weights_are_one_pool() {
        let (a, b) = (rows(10), rows(7));
        let spec = format!("{},{}", a.path().display(), b.path().display());
        let source = ProblemSource::open(&spec, 3).unwrap();
        assert_eq!(source.epoch_len(), Some(17));
        assert_eq!(
            (0..17).map(|i| source.problem(i)).collect::<Vec<_>>().iter().collect_ids().len(),
            17
        );
        // Another round is another order over the same rows.
        let round = |r| (0..17).map(|i| source.problem_of_round(r, i).id).collect::<Vec<_>>();
        assert_ne!(round(0), round(1));
        assert_eq!(round(1).iter().collect::<BTreeSet<_>>(), round(0).iter().collect());
    }

    #[test]
    fn a_curriculum_goes_from_easy_to_hard_in_every_epoch() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for i in 0..30 {
            writeln!(file, r#"{{"prompt": "p", "answer": {i}, "level": "Level {}"}}"#, i % 3)
                .unwrap();
        }
        let spec = file.path().to_str().unwrap();
        let options = SourceOptions { seed: 1, curriculum: true, ..SourceOptions::default() };
        let mut source = ProblemSource::with(spec, options.clone()).unwrap();
        let epoch = |source: &ProblemSource, e: u64| -> Vec<Problem> {
            (30 * e..30 * (e + 1)).map(|i| source.problem(i)).collect()
        };
        for e in 0..2 {
            let levels: Vec<_> = epoch(&source, e).into_iter().map(|p| p.difficulty).collect();
            assert!(levels.is_sorted(), "{levels:?}");
        }
        assert_ne!(epoch(&source, 0), epoch(&source, 1), "equally hard ones are shuffled");
        assert_eq!(source.retain(|p| Ok(p.difficulty.as_deref() != Some("Level 1"))).unwrap(), 10);
        assert_eq!(source.epoch_len(), Some(20));
        let error = source.retain(|_| Ok(false)).unwrap_err().to_string();
        assert!(error.contains("none of 20"), "{error}");
        let plain = rows(3);
        let error = ProblemSource::with(plain.path().to_str().unwrap(), options).unwrap_err();
        assert!(error.to_string().contains("difficulty: expected a number in it, got none"));
    }

    #[test]
    fn bad_weights_are_refused() {
        let file = rows(1);
        for (spec, expected) in [
            (format!("{}:0", file.path().display()), "a weight above 0, got 0"),
            (format!("{}:-1", file.path().display()), "a weight above 0, got -1"),
            (format!("{},", file.path().display()), "files with commas between"),
        ] {
            let error = ProblemSource::open(&spec, 1).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let error = ProblemSource::open("/nonexistent/x.jsonl", 0).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/x.jsonl"), "{error}");
    }
}

//! Where a run's problems come from, and in which order.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Problem, Task, read_problems};
use crate::Result;

/// An endless, seeded sequence of problems with random access, so that a run resumes at its position.
///
/// A task generates its training split. A file's rows are shuffled anew for each epoch: positions
/// `e * len .. (e + 1) * len` are a permutation that depends on the seed and e alone.
#[derive(Debug)]
pub struct ProblemSource {
    seed: u64,
    problems: Problems,
}

#[derive(Debug)]
enum Problems {
    Task(Task),
    /// The second field is the permutation of the epoch last asked for.
    Rows(Vec<Problem>, Mutex<(u64, Vec<usize>)>),
}

impl ProblemSource {
    /// Opens `task:NAME` or a JSON-lines file with `prompt` and `answer`.
    pub fn open(spec: &str, seed: u64) -> Result<ProblemSource> {
        if spec.starts_with("task:") {
            let problems = Problems::Task(Task::parse(spec)?);
            return Ok(ProblemSource { seed, problems });
        }
        let rows = read_problems(Path::new(spec))?;
        let order = Mutex::new((0, permutation(rows.len(), seed, 0)));
        Ok(ProblemSource { seed, problems: Problems::Rows(rows, order) })
    }

    /// The problem at position `index` of training.
    pub fn problem(&self, index: u64) -> Problem {
        match &self.problems {
            Problems::Task(task) => task.train_problem(self.seed, index),
            Problems::Rows(rows, order) => {
                let (epoch, place) = (index / rows.len() as u64, index % rows.len() as u64);
                let mut order = order.lock().unwrap_or_else(PoisonError::into_inner);
                if order.0 != epoch {
                    *order = (epoch, permutation(rows.len(), self.seed, epoch));
                }
                rows[order.1[place as usize]].clone()
            }
        }
    }

    /// `n` problems to evaluate on: a task's held-out ones, or of a file's rows a seeded sample without
    /// repetition, all of them in file order when there are no more than `n`.
    pub fn eval_problems(&self, n: usize) -> Vec<Problem> {
        match &self.problems {
            Problems::Task(task) => task.eval_problems(n, self.seed),
            Problems::Rows(rows, _) if rows.len() <= n => rows.clone(),
            Problems::Rows(rows, _) => permutation(rows.len(), self.seed, 0)[..n]
                .iter()
                .map(|&row| rows[row].clone())
                .collect(),
        }
    }

    /// Problems in an epoch; `None` for a task, which has no end.
    pub fn epoch_len(&self) -> Option<usize> {
        match &self.problems {
            Problems::Task(_) => None,
            Problems::Rows(rows, _) => Some(rows.len()),
        }
    }

    /// The task, where the problems are generated.
    pub fn task(&self) -> Option<Task> {
        match &self.problems {
            Problems::Task(task) => Some(*task),
            Problems::Rows(..) => None,
        }
    }
}

fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
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
    fn a_missing_file_is_an_error() {
        let error = ProblemSource::open("/nonexistent/x.jsonl", 0).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/x.jsonl"), "{error}");
    }
}

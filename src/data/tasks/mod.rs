//! Problems that are generated: seeded, verifiable, and with an evaluation split that training never sees.
//!
//! A problem is a pair of numbers (x, y), each of at most `digits` digits, asked as one user message:
//!
//! | task | question | answer |
//! |---|---|---|
//! | `task:add` | `17+25=` | `42` |
//! | `task:sub` | `17-25=` | `-8` |
//! | `task:max` | `max(17,25)=` | `25` |
//! | `task:mul` | `17*25=` | `425` |
//! | `task:guess` | `Guess my number, 0 to 99. I say higher or lower.` | `17` |
//! | `task:words` | a story of one or two steps (`words.rs`) | `42` |
//!
//! The answer is expected as `\boxed{42}`. `task:guess` is for environments; its second number tells rounds with the same number apart, so
//! that rounds are held out and not numbers: a number that training never asks for is one that it teaches not to guess. Parameters follow
//! a question mark: `task:add?digits=3`, `task:words?stories=new&rows=200`.
//!
//! Split: a pair is held out for evaluation when Knuth's multiplicative hash of it falls into the lowest fifth,
//! `(x * 10^digits + y) * 2654435761 mod 2^32 < 2^32 / 5`. `tools/pretrain_demo.py` keeps to the same rule.
//! The order of the pair counts: (25, 17) may be trained on where (17, 25) is held out. Of `task:words` some stories
//! are held out, too.

mod words;

use std::{collections::HashSet, fmt};

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{CompletionContent, Example, ExampleRow, Message, Problem, Prompt, RolloutRow};
use crate::{Error, Result};
pub use words::Stories;

/// Begins the name of every task.
const PREFIX: &str = "task:";
/// What [`Task::parse`] knows.
pub const SUPPORTED: &str = "task:add, task:sub, task:max, task:mul, task:guess, task:words, each with ?digits=1..9 (default 2) \
                             and rows=N (default 1000, of algorithms that learn from rows)";

const DEFAULT_DIGITS: u32 = 2;
const MAX_DIGITS: u32 = 9;
const DEFAULT_ROWS: usize = 1000;
/// Up to this size the held-out pairs are listed and shuffled; beyond it they are drawn.
const MAX_LISTED_PAIRS: u64 = 1_000_000;

/// A generated task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    kind: Kind,
    digits: u32,
    rows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Add,
    Sub,
    Max,
    Mul,
    Guess,
    Words(Stories),
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Add => "add",
            Kind::Sub => "sub",
            Kind::Max => "max",
            Kind::Mul => "mul",
            Kind::Guess => "guess",
            Kind::Words(_) => "words",
        }
    }
}

/// Held-out problems of a task that stand for its data where nobody gave a number.
pub const HELD_OUT: usize = 400;

/// Whether a name of data is a task's, not a file's.
pub fn is_task(name: &str) -> bool {
    name.starts_with(PREFIX)
}

impl Task {
    /// Reads `task:NAME` or `task:NAME?digits=N&rows=N`.
    pub fn parse(spec: &str) -> Result<Task> {
        let unknown = |what, got: &str| Error::Unsupported {
            what,
            got: got.into(),
            supported: SUPPORTED.into(),
        };
        let (name, parameters) = spec.split_once('?').unwrap_or((spec, ""));
        let kind = match name.strip_prefix(PREFIX) {
            Some("add") => Kind::Add,
            Some("sub") => Kind::Sub,
            Some("max") => Kind::Max,
            Some("mul") => Kind::Mul,
            Some("guess") => Kind::Guess,
            Some("words") => Kind::Words(Stories::default()),
            _ => return Err(unknown("task", name)),
        };
        let mut task = Task { kind, digits: DEFAULT_DIGITS, rows: DEFAULT_ROWS };
        for parameter in parameters.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let wrong = |expected: String, advice: &str| {
                Error::invalid(spec, expected, format!("'{value}'"), advice)
            };
            match (key, &mut task.kind) {
                ("digits", _) => {
                    let digits = value.parse().ok().filter(|d| (1..=MAX_DIGITS).contains(d));
                    task.digits = digits.ok_or_else(|| {
                        wrong(format!("digits from 1 to {MAX_DIGITS}"), "write ?digits=2")
                    })?;
                }
                ("rows", _) => {
                    let rows = value.parse().ok().filter(|&rows| rows > 0);
                    task.rows = rows.ok_or_else(|| {
                        wrong("a number of rows above 0".into(), "write ?rows=200")
                    })?;
                }
                ("stories", Kind::Words(stories)) => {
                    *stories = Stories::parse(value).ok_or_else(|| {
                        wrong(format!("stories={}", Stories::SUPPORTED), "write ?stories=new")
                    })?;
                }
                _ => return Err(unknown("task parameter", key)),
            }
        }
        Ok(task)
    }

    /// The training problem at a position: the same for the same `(seed, index)`, whatever was asked before.
    pub fn train_problem(&self, seed: u64, index: u64) -> Problem {
        self.train(seed, index).problem
    }

    fn train(&self, seed: u64, index: u64) -> Worked {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        loop {
            let pair = self.draw(&mut rng);
            if !self.held_out(pair) {
                return self.worked(pair, &mut rng, false);
            }
        }
    }

    /// The prompts of [`HELD_OUT`] held-out problems as rows without completions.
    pub fn rows(&self) -> impl Iterator<Item = RolloutRow> + use<> {
        let problems = self.eval_problems(HELD_OUT, 1).into_iter().enumerate();
        problems.map(|(i, problem)| RolloutRow {
            prompt: problem.prompt,
            completions: Vec::new(),
            line: i + 1,
        })
    }

    /// Problems with their worked solutions, to imitate: the first `rows` training problems, or as many held-out ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a task whose answers cannot be known from its questions.
    pub fn examples(
        &self,
        seed: u64,
        held_out: bool,
    ) -> Result<impl Iterator<Item = ExampleRow> + use<>> {
        if self.kind == Kind::Guess {
            let (expected, advice) = ("a task with solutions", "learn it with --env env:guess");
            return Err(Error::invalid(self.to_string(), expected, "none", advice));
        }
        let worked: Vec<Worked> = match held_out {
            true => self.evaluation(self.rows, seed),
            false => (0..self.rows as u64).map(|i| self.train(seed, i)).collect(),
        };
        Ok(worked.into_iter().map(|Worked { problem, solution }| ExampleRow {
            place: problem.source,
            example: Example::Completions(problem.prompt, vec![CompletionContent::Text(solution)]),
            weight: 1.0,
            label: None,
        }))
    }

    /// `n` held-out problems: distinct while there are enough (a million at most), then the same again.
    pub fn eval_problems(&self, n: usize, seed: u64) -> Vec<Problem> {
        self.evaluation(n, seed).into_iter().map(|worked| worked.problem).collect()
    }

    fn evaluation(&self, n: usize, seed: u64) -> Vec<Worked> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let pairs = if self.pairs() <= MAX_LISTED_PAIRS {
            let mut pairs: Vec<u64> = (0..self.pairs()).filter(|&p| self.held_out(p)).collect();
            pairs.shuffle(&mut rng);
            pairs
        } else {
            // At least 2 * 10^7 pairs are held out here, so distinct ones are found fast.
            let enough = n.min(MAX_LISTED_PAIRS as usize);
            let mut seen = HashSet::new();
            let mut pairs = Vec::new();
            while pairs.len() < enough {
                let pair = self.draw(&mut rng);
                if self.held_out(pair) && seen.insert(pair) {
                    pairs.push(pair);
                }
            }
            pairs
        };
        pairs.iter().cycle().take(n).map(|&pair| self.worked(pair, &mut rng, true)).collect()
    }

    fn base(&self) -> u64 {
        10u64.pow(self.digits)
    }

    fn pairs(&self) -> u64 {
        self.base() * self.base()
    }

    /// A pair as one number, `x * 10^digits + y`.
    fn draw(&self, rng: &mut ChaCha8Rng) -> u64 {
        rng.random_range(0..self.pairs())
    }

    fn held_out(&self, pair: u64) -> bool {
        (pair.wrapping_mul(2_654_435_761) & 0xffff_ffff) * 5 < 1 << 32
    }

    /// The problem of a pair and its solution. What else makes a story is drawn.
    fn worked(&self, pair: u64, rng: &mut ChaCha8Rng, held_out: bool) -> Worked {
        let (x, y) = ((pair / self.base()) as i64, (pair % self.base()) as i64);
        let source =
            |what: String| format!("{PREFIX}{}{} {what}", self.kind.name(), self.digits_named());
        let sum = |question: String, answer: i64| {
            let solution = format!("\\boxed{{{answer}}}");
            (source(question.clone()), format!("{question}="), answer, solution, 0)
        };
        let (source, question, answer, solution, solution_bytes) = match self.kind {
            Kind::Add => sum(format!("{x}+{y}"), x + y),
            Kind::Sub => sum(format!("{x}-{y}"), x - y),
            Kind::Max => sum(format!("max({x},{y})"), x.max(y)),
            Kind::Mul => sum(format!("{x}*{y}"), x * y),
            Kind::Guess => {
                let most = self.base() - 1;
                let question = format!("Guess my number, 0 to {most}. I say higher or lower.");
                (source(format!("{x}, round {y}")), question, x, String::new(), 0)
            }
            Kind::Words(stories) => {
                let story = stories.tell(x, y, rng, held_out);
                let source = source(format!("{} {x},{y}", story.name));
                let bytes = story.solution.len();
                (source, story.question, story.answer, story.solution, bytes)
            }
        };
        let problem = Problem {
            id: source.clone(),
            prompt: Prompt::Messages(vec![Message::user(question)]),
            answer: answer.to_string(),
            source,
            difficulty: None,
            solution_bytes,
        };
        Worked { problem, solution }
    }

    fn digits_named(&self) -> String {
        match self.digits {
            DEFAULT_DIGITS => String::new(),
            digits => format!("?digits={digits}"),
        }
    }
}

/// A problem and what a good answer says.
struct Worked {
    problem: Problem,
    solution: String,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parameters = Vec::new();
        if self.digits != DEFAULT_DIGITS {
            parameters.push(format!("digits={}", self.digits));
        }
        if let Kind::Words(stories) = self.kind
            && stories != Stories::default()
        {
            parameters.push(format!("stories={stories}"));
        }
        if self.rows != DEFAULT_ROWS {
            parameters.push(format!("rows={}", self.rows));
        }
        let mark = if parameters.is_empty() { "" } else { "?" };
        write!(f, "{PREFIX}{}{mark}{}", self.kind.name(), parameters.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: [&str; 11] = [
        "task:mul?digits=4",
        "task:guess?digits=5",
        "task:add",
        "task:sub",
        "task:max",
        "task:add?digits=1",
        "task:max?digits=3",
        "task:sub?digits=9",
        "task:words",
        "task:words?digits=1&stories=new",
        "task:words?stories=known&rows=30",
    ];

    fn question(problem: &Problem) -> &str {
        let Prompt::Messages(messages) = &problem.prompt else { panic!("{problem:?}") };
        assert_eq!((messages.len(), messages[0].role.as_str()), (1, "user"));
        &messages[0].content
    }

    #[test]
    fn questions_and_answers() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for (spec, pair, asked, answer) in [
            ("task:add", 17_25, "17+25=", "42"),
            ("task:sub", 17_25, "17-25=", "-8"),
            ("task:max", 17_25, "max(17,25)=", "25"),
            ("task:add?digits=3", 7_999, "7+999=", "1006"),
            ("task:mul", 17_25, "17*25=", "425"),
        ] {
            let problem = Task::parse(spec).unwrap().worked(pair, &mut rng, false).problem;
            assert_eq!((question(&problem), problem.answer.as_str()), (asked, answer));
            assert_eq!(problem.source, format!("{spec} {}", asked.trim_end_matches('=')));
        }
        let problem = Task::parse("task:guess").unwrap().worked(57_13, &mut rng, false).problem;
        assert_eq!(question(&problem), "Guess my number, 0 to 99. I say higher or lower.");
        assert_eq!(
            (problem.answer.as_str(), problem.id.as_str()),
            ("57", "task:guess 57, round 13")
        );
    }

    #[test]
    fn the_split_is_the_one_of_the_demo_model() {
        let task = Task::parse("task:add").unwrap();
        let held: Vec<u64> = (0..10_000).filter(|&p| task.held_out(p)).collect();
        // Python: [p for p in range(10000) if p * 2654435761 % 2**32 * 5 < 2**32]
        assert_eq!(held.len(), 2001);
        assert_eq!(held[..8], [0, 5, 10, 13, 18, 26, 31, 34]);
        assert_eq!(held[2000], 9998);
    }

    #[test]
    fn training_never_meets_an_evaluation_problem() {
        for spec in SPECS {
            let task = Task::parse(spec).unwrap();
            let held: HashSet<_> = task.eval_problems(1500, 3).into_iter().map(|p| p.id).collect();
            for index in 0..3000 {
                let problem = task.train_problem(3, index);
                assert!(!held.contains(&problem.id), "{}", problem.id);
            }
        }
    }

    #[test]
    fn evaluation_problems_are_distinct_while_there_are_enough() {
        for (spec, n, distinct) in [
            ("task:add", 500, 500),
            ("task:add", 2000, 2000),
            ("task:add", 2500, 2001),
            ("task:add?digits=1", 100, 21),
            ("task:add?digits=5", 3000, 3000),
        ] {
            let problems = Task::parse(spec).unwrap().eval_problems(n, 1);
            let ids: HashSet<_> = problems.iter().map(|p| &p.id).collect();
            assert_eq!((problems.len(), ids.len()), (n, distinct), "{spec}");
        }
    }

    #[test]
    fn same_seed_same_problems() {
        for spec in SPECS {
            let task = Task::parse(spec).unwrap();
            assert_eq!(task, Task::parse(&task.to_string()).unwrap());
            let train = |seed| (0..50).map(|i| task.train_problem(seed, i).id).collect::<Vec<_>>();
            assert_eq!(train(1), train(1));
            assert_ne!(train(1), train(2));
            assert_eq!(task.train_problem(1, 30).id, train(1)[30]);
            assert_eq!(task.eval_problems(9, 1), task.eval_problems(9, 1));
            assert_ne!(task.eval_problems(9, 1), task.eval_problems(9, 2));
        }
    }

    #[test]
    fn unknown_tasks_and_parameters_are_named() {
        for (spec, expected) in [
            ("task:div", "task 'task:div' is not supported; supported: task:add, task:sub"),
            ("add", "task 'add' is not supported"),
            ("task:add?size=3", "task parameter 'size' is not supported; supported: task:add,"),
            ("task:add?digits=0", "task:add?digits=0: expected digits from 1 to 9, got '0'"),
            ("task:add?digits=10", "got '10'"),
            ("task:add?digits", "got ''"),
        ] {
            let error = Task::parse(spec).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

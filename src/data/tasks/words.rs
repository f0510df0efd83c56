//! Stories with numbers: `task:words`.
//!
//! A pair (x, y) becomes one of four kinds of sums, each of which names other numbers for every pair, so that a held-out pair
//! is asked in no story of training:
//!
//! | kind | said | asked |
//! |---|---|---|
//! | gain | x, y | x + y |
//! | loss | x + y, y | x |
//! | difference | x + y of one, y of another | x |
//! | both | x, y, then z of them are gone, 0 < z <= x + y | x + y - z |
//!
//! The stories of a kind are sentences with names and things in them. Two of each kind are never told in training: half of
//! the held-out problems are told with them.

use std::fmt;

use rand::{Rng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

/// Which stories held-out problems are told with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stories {
    /// Those of training and those that training never tells, half and half.
    #[default]
    All,
    /// Those of training.
    Known,
    /// Those that training never tells.
    New,
}

/// A problem in words.
pub(super) struct Story {
    /// Kind and number, `loss-3`.
    pub name: String,
    pub question: String,
    pub answer: i64,
    /// The sums line by line, then the answer in a box.
    pub solution: String,
}

/// The stories of a kind: those that training tells, and those that it never does.
struct Kind {
    name: &'static str,
    known: &'static [&'static str],
    new: &'static [&'static str],
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "gain",
        known: &[
            "{A} has {x} {things} and gets {y} more. How many {things} does {A} have now?",
            "{A} collects {x} {things} on Monday and {y} on Tuesday. How many {things} is that in all?",
            "There are {x} {things} on the table. {A} puts {y} more beside them. How many {things} are on the table?",
            "{A} owns {x} {things}, {B} owns {y}. How many {things} do they own together?",
            "A box holds {x} {things}. {A} adds {y} {things}. How many {things} are in the box now?",
        ],
        new: &[
            "{A} bought {y} {things} today, after {x} yesterday. What is the total number of {things}?",
            "On one shelf stand {x} {things}, on another {y}. {A} counts them all. What number does {A} reach?",
        ],
    },
    Kind {
        name: "loss",
        known: &[
            "{A} has {s} {things} and gives {y} away. How many {things} are left?",
            "There were {s} {things} in a bag. {A} took {y} out. How many {things} are still in the bag?",
            "{A} had {s} {things} but lost {y} of them. How many {things} does {A} have now?",
            "A shop has {s} {things} and sells {y}. How many {things} remain?",
            "Of {s} {things} that {A} made, {y} are broken. How many {things} are whole?",
        ],
        new: &[
            "{A} needs {s} {things} and has {y} so far. How many {things} are missing?",
            "After {A} handed {y} of the {s} {things} to {B}, how many {things} did {A} keep?",
        ],
    },
    Kind {
        name: "difference",
        known: &[
            "{A} has {s} {things} and {B} has {y}. How many more {things} does {A} have than {B}?",
            "{A} read {s} pages and {B} read {y}. How many pages fewer did {B} read?",
            "One jar has {s} {things}, another has {y}. What is the difference?",
            "{A} found {s} {things}, {B} found {y}. By how many {things} is {A} ahead of {B}?",
            "{B} has {y} {things}; {A} has {s}. How many {things} must {B} get to have as many as {A}?",
        ],
        new: &[
            "{B} counted {y} {things} and {A} counted {s}. How far apart are the two counts?",
            "A red bag has {y} {things}, a blue one {s}. How many {things} more are in the blue bag?",
        ],
    },
    Kind {
        name: "both",
        known: &[
            "{A} has {x} {things}, gets {y} more and then gives {z} to {B}. How many {things} does {A} have now?",
            "There are {x} {things} in a box. {A} puts in {y} and takes out {z}. How many {things} are in the box?",
            "{A} and {B} bring {x} and {y} {things}. Together they use {z}. How many {things} are left?",
            "A shop has {x} {things}, receives {y} and sells {z}. How many {things} does it have now?",
            "{A} makes {x} {things} in the morning and {y} in the afternoon. Of all these {z} are sold. How many remain?",
        ],
        new: &[
            "{A} had {x} {things}. {B} added {y}, and then {z} of them were lost. How many {things} are there now?",
            "First {x} and then {y} {things} arrive; later {z} leave. How many {things} stay?",
        ],
    },
];

const NAMES: [&str; 16] = [
    "Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia",
    "Ned", "Olga", "Paul",
];

const THINGS: [&str; 16] = [
    "apples", "books", "coins", "pens", "shells", "stamps", "cards", "marbles", "stones", "cups",
    "balls", "keys", "nuts", "plates", "ropes", "tickets",
];

impl Stories {
    /// What [`Stories::parse`] knows.
    pub const SUPPORTED: &str = "all, known or new";

    pub(super) fn parse(text: &str) -> Option<Stories> {
        Some(match text {
            "all" => Stories::All,
            "known" => Stories::Known,
            "new" => Stories::New,
            _ => return None,
        })
    }

    /// The story of a pair: a known one in training, in evaluation as the choice says.
    pub(super) fn tell(self, x: i64, y: i64, rng: &mut ChaCha8Rng, held_out: bool) -> Story {
        let kind = KINDS.choose(rng).expect("there are kinds");
        let new = match self {
            Stories::All => rng.random_bool(0.5),
            Stories::Known => false,
            Stories::New => true,
        };
        let (stories, first) = match held_out && new {
            true => (kind.new, kind.known.len()),
            false => (kind.known, 0),
        };
        let place = rng.random_range(0..stories.len());
        let mut names = NAMES.choose_multiple(rng, 2);
        let (a, b) = (names.next().expect("two"), names.next().expect("two"));
        let things = THINGS.choose(rng).expect("there are things");
        let s = x + y;
        let z = if s > 0 { rng.random_range(1..=s) } else { 0 };
        let (sums, answer) = match kind.name {
            "gain" => (format!("{x} + {y} = {s}"), s),
            "both" => (format!("{x} + {y} = {s}\n{s} - {z} = {}", s - z), s - z),
            _ => (format!("{s} - {y} = {x}"), x),
        };
        let mut question = stories[place].replace("{A}", a).replace("{B}", b);
        for (place, value) in [("{x}", x), ("{y}", y), ("{s}", s), ("{z}", z)] {
            question = question.replace(place, &value.to_string());
        }
        Story {
            name: format!("{}-{}", kind.name, first + place + 1),
            question: question.replace("{things}", things),
            answer,
            solution: format!("{sums}\n\\boxed{{{answer}}}"),
        }
    }
}

impl fmt::Display for Stories {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stories::All => "all",
            Stories::Known => "known",
            Stories::New => "new",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::SeedableRng;

    use super::*;

    /// The numbers of a text in order.
    fn numbers(text: &str) -> Vec<i64> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
    }

    fn tell(stories: Stories, seed: u64, held_out: bool) -> ((i64, i64), Story) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (x, y) = (rng.random_range(0..100), rng.random_range(0..100));
        ((x, y), stories.tell(x, y, &mut rng, held_out))
    }

    #[test]
    fn solutions_follow_from_what_is_said() {
        for seed in 0..2000 {
            let (pair, story) = tell(Stories::All, seed, seed % 2 == 0);
            let said = numbers(&story.question);
            let right = match (story.name.split('-').next().unwrap(), said.as_slice()) {
                ("gain", [a, b]) => a + b,
                ("loss" | "difference", [a, b]) => (a - b).abs(),
                ("both", [a, b, c]) => a + b - c,
                _ => panic!("{}: {}", story.name, story.question),
            };
            assert_eq!(story.answer, right, "{pair:?}: {}", story.question);
            assert!(
                story.answer >= 0 && !story.question.contains(['{', '}']),
                "{}",
                story.question
            );
            assert!(
                story.solution.ends_with(&format!("\n\\boxed{{{right}}}")),
                "{}",
                story.solution
            );
            for line in story.solution.lines().filter(|line| line.contains('=')) {
                let n = numbers(line);
                let sum = if line.contains('+') { n[0] + n[1] } else { n[0] - n[1] };
                assert_eq!(sum, n[2], "{line}");
            }
        }
    }

    #[test]
    fn training_tells_no_new_story() {
        let names = |stories: Stories, held_out: bool| {
            (0..3000).map(|seed| tell(stories, seed, held_out).1.name).collect::<HashSet<_>>()
        };
        let trained = names(Stories::New, false);
        assert_eq!(trained.len(), 20);
        assert_eq!(names(Stories::Known, true), trained);
        let new = names(Stories::New, true);
        assert_eq!((new.len(), new.intersection(&trained).count()), (8, 0));
        assert_eq!(names(Stories::All, true).len(), 28);
    }
}

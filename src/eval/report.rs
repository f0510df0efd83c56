//! An evaluation's figures: as JSON, and as a table for people.

use std::fmt::{self, Write};

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::Outcome;
use super::metrics::{bootstrap, mean, pass_at_k};
use crate::env::Talk;

/// Figures of an evaluation. Accuracies are shares, 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Problems.
    pub problems: usize,
    /// Completions of each, K.
    pub samples: usize,
    /// Mean share of right completions.
    pub avg_at_k: f64,
    /// Pass@k for k = 1..K, with k as the key.
    #[serde(serialize_with = "by_k")]
    pub pass_at_k: Vec<f64>,
    /// Share of problems whose most frequent answer is right.
    pub maj_at_k: f64,
    /// Mean length of completions, tokens.
    pub mean_tokens: f64,
    /// Share of completions that hit the length limit.
    pub truncated: f64,
    /// 95 % intervals, bootstrap over problems.
    pub ci95: Intervals,
    /// What dialogues were like.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub talk: Option<Talk>,
    /// The figures by difficulty, where the data has any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by_difficulty: Vec<ByDifficulty>,
}

/// Intervals (low, high) of a report's accuracies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Intervals {
    /// Of [`Report::avg_at_k`].
    pub avg_at_k: [f64; 2],
    /// Of [`Report::pass_at_k`].
    #[serde(serialize_with = "by_k")]
    pub pass_at_k: Vec<[f64; 2]>,
    /// Of [`Report::maj_at_k`].
    pub maj_at_k: [f64; 2],
}

/// Figures of the problems of one difficulty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ByDifficulty {
    /// As the data has it.
    pub difficulty: String,
    /// Problems.
    pub problems: usize,
    /// As in [`Report`].
    pub avg_at_k: f64,
    /// Pass@K.
    pub pass_at_k: f64,
    /// As in [`Report`].
    pub maj_at_k: f64,
    /// As in [`Report`].
    pub mean_tokens: f64,
    /// As in [`Report`].
    pub truncated: f64,
}

/// `{"1": .., "2": ..}`
fn by_k<S: Serializer, T: Serialize>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(values.len()))?;
    for (i, value) in values.iter().enumerate() {
        map.serialize_entry(&(i + 1).to_string(), value)?;
    }
    map.end()
}

impl Report {
    /// Figures of these problems, at least one, each with as many samples. `seed` is the bootstrap's.
    pub fn new(outcomes: &[Outcome], seed: u64) -> Report {
        let samples = outcomes[0].n;
        let of = |f: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(f).collect::<Vec<f64>>();
        let average = of(&|o| o.right as f64 / o.n as f64);
        let majority = of(&|o| o.majority);
        let pass: Vec<Vec<f64>> =
            (1..=samples).map(|k| of(&|o| pass_at_k(o.n, o.right, k))).collect();
        let figures: Vec<&[f64]> =
            [&average, &majority].into_iter().chain(&pass).map(Vec::as_slice).collect();
        let intervals = bootstrap(&figures, seed);
        let all = (outcomes.len() * samples) as f64;
        Report {
            problems: outcomes.len(),
            samples,
            avg_at_k: mean(&average),
            pass_at_k: pass.iter().map(|p| mean(p)).collect(),
            maj_at_k: mean(&majority),
            mean_tokens: outcomes.iter().map(|o| o.tokens).sum::<usize>() as f64 / all,
            truncated: outcomes.iter().map(|o| o.truncated).sum::<usize>() as f64 / all,
            ci95: Intervals {
                avg_at_k: intervals[0],
                maj_at_k: intervals[1],
                pass_at_k: intervals[2..].to_vec(),
            },
            talk: outcomes
                .iter()
                .any(|o| !o.talks.is_empty())
                .then(|| Talk::of(outcomes.iter().flat_map(|o| &o.talks).copied())),
            by_difficulty: by_difficulty(outcomes),
        }
    }
}

fn by_difficulty(outcomes: &[Outcome]) -> Vec<ByDifficulty> {
    let mut names: Vec<&str> = outcomes.iter().filter_map(|o| o.difficulty.as_deref()).collect();
    names.sort_by(|a, b| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(x), Ok(y)) => x.total_cmp(&y),
        _ => a.cmp(b),
    });
    names.dedup();
    let one = |name: &str| {
        let group: Vec<&Outcome> =
            outcomes.iter().filter(|o| o.difficulty.as_deref() == Some(name)).collect();
        let average = |f: &dyn Fn(&Outcome) -> f64| {
            group.iter().map(|o| f(o)).sum::<f64>() / group.len() as f64
        };
        ByDifficulty {
            difficulty: name.to_owned(),
            problems: group.len(),
            avg_at_k: average(&|o| o.right as f64 / o.n as f64),
            pass_at_k: average(&|o| pass_at_k(o.n, o.right, o.n)),
            maj_at_k: average(&|o| o.majority),
            mean_tokens: average(&|o| o.tokens as f64 / o.n as f64),
            truncated: average(&|o| o.truncated as f64 / o.n as f64),
        }
    };
    names.into_iter().map(one).collect()
}

/// The table: k as powers of two and K.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let k = self.samples;
        writeln!(f, "{} problems, {k} samples each; 95 % intervals over problems", self.problems)?;
        let mut row = |name: String, value: f64, [low, high]: [f64; 2]| {
            writeln!(
                f,
                "{name:<10} {:>6.2} %   [{:.2}, {:.2}]",
                100.0 * value,
                100.0 * low,
                100.0 * high
            )
        };
        row(format!("avg@{k}"), self.avg_at_k, self.ci95.avg_at_k)?;
        let powers = std::iter::successors(Some(1), |k| Some(2 * k)).take_while(|&p| p < k);
        for p in powers.chain([k]).filter(|_| k > 1) {
            row(format!("pass@{p}"), self.pass_at_k[p - 1], self.ci95.pass_at_k[p - 1])?;
        }
        if k > 1 {
            row(format!("maj@{k}"), self.maj_at_k, self.ci95.maj_at_k)?;
        }
        write!(
            f,
            "tokens     {:>6.1}     truncated {:.1} %",
            self.mean_tokens,
            100.0 * self.truncated
        )?;
        if let Some(talk) = &self.talk {
            write!(
                f,
                "\nturns      {:>6.2}     tool calls {:.2}, of which {:.1} % failed",
                talk.turns,
                talk.tool_calls,
                100.0 * talk.tool_calls_failed
            )?;
        }
        if self.by_difficulty.is_empty() {
            return Ok(());
        }
        let mut table = String::new();
        writeln!(
            table,
            "\n\ndifficulty  problems  avg@{k:<4}  pass@{k:<4}  maj@{k:<4}  tokens  truncated"
        )?;
        for d in &self.by_difficulty {
            writeln!(
                table,
                "{:<10}  {:>8}  {:>6.2} %  {:>7.2} %  {:>6.2} %  {:>6.1}  {:>7.1} %",
                d.difficulty,
                d.problems,
                100.0 * d.avg_at_k,
                100.0 * d.pass_at_k,
                100.0 * d.maj_at_k,
                d.mean_tokens,
                100.0 * d.truncated,
            )?;
        }
        f.write_str(table.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(difficulty: Option<&str>, right: usize) -> Outcome {
        Outcome {
            difficulty: difficulty.map(Into::into),
            n: 4,
            right,
            majority: (right > 2) as u8 as f64,
            tokens: 10,
            truncated: 1,
            talks: Vec::new(),
        }
    }

    #[test]
    fn figures_have_the_interfaces_names() {
        let outcomes = [outcome(None, 1), outcome(None, 3)];
        let report = Report::new(&outcomes, 1);
        let json = serde_json::to_value(&report).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys[..7],
            [
                "problems",
                "samples",
                "avg_at_k",
                "pass_at_k",
                "maj_at_k",
                "mean_tokens",
                "truncated"
            ]
        );
        assert_eq!(keys[7..], ["ci95"]);
        assert_eq!((json["avg_at_k"].as_f64(), json["maj_at_k"].as_f64()), (Some(0.5), Some(0.5)));
        // k = 2: 1 - C(3,2)/C(4,2) = 0.5 and 1 - C(1,2)/.. = 1
        assert!((json["pass_at_k"]["2"].as_f64().unwrap() - 0.75).abs() < 1e-12);
        assert_eq!(json["pass_at_k"].as_object().unwrap().len(), 4);
        assert_eq!(
            (json["mean_tokens"].as_f64(), json["truncated"].as_f64()),
            (Some(2.5), Some(0.25))
        );
        assert!(report.to_string().contains("pass@2      75.00 %"), "{report}");
    }

    #[test]
    fn difficulties_stand_in_their_order() {
        let outcomes = [outcome(Some("10"), 1), outcome(Some("2"), 3), outcome(Some("2"), 4)];
        let rows = Report::new(&outcomes, 1).by_difficulty;
        let names: Vec<_> = rows.iter().map(|r| r.difficulty.as_str()).collect();
        assert_eq!(names, ["2", "10"]);
        assert_eq!((rows[0].problems, rows[0].avg_at_k), (2, 0.875));
    }
}

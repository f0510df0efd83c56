//! The verifier: a table of pairs, the published sets' own golds, and what no answer may do to it.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use bupo_gguf::reward::math::{Judgement, Mode, judge, score};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// (class, gold, answer, whether they are equal) of every pair in `tests/fixtures/verifier`.
fn table() -> Vec<(String, String, String, bool)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/verifier");
    let mut pairs = Vec::new();
    for file in ["numbers.txt", "forms.txt", "readings.txt"] {
        pairs.extend(pairs_of(&folder.join(file)));
    }
    pairs
}

/// The pairs of one file of a table.
fn pairs_of(file: &Path) -> Vec<(String, String, String, bool)> {
    let text = fs::read_to_string(file).unwrap();
    let mut pairs = Vec::new();
    let mut class = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            class = name.to_string();
        } else if let Some((gold, answer)) = line.split_once("  <=>  ") {
            pairs.push((class.clone(), gold.to_string(), answer.to_string(), true));
        } else if let Some((gold, answer)) = line.split_once("  <!>  ") {
            pairs.push((class.clone(), gold.to_string(), answer.to_string(), false));
        } else {
            assert!(line.is_empty() || line.starts_with('#'), "{}: {line}", file.display());
        }
    }
    pairs
}

fn math(gold: &str, answer: &str) -> Judgement {
    judge(gold, answer, Mode::Math)
}

#[test]
fn the_table_is_all_right() {
    let pairs = table();
    assert!(pairs.len() >= 400, "only {} pairs", pairs.len());
    let mut wrong = Vec::new();
    for (class, gold, answer, equal) in &pairs {
        let judgement = math(gold, answer);
        if judgement.equal != *equal || judgement.reason.is_empty() {
            wrong.push(format!("{class}: {gold} | {answer}: {judgement:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), pairs.len(), wrong.join("\n"));
}

#[test]
fn completions_are_paid_for_their_answer_alone() {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/verifier/completions.txt");
    let pairs = pairs_of(&file);
    assert!(pairs.len() >= 250, "only {} completions", pairs.len());
    let mut wrong = Vec::new();
    for (class, gold, completion, right) in &pairs {
        let completion = completion.replace('\u{23ce}', "\n");
        let verdict = score(gold, &completion, Mode::Math, Mode::Math.rules());
        if (verdict.reward == 1.0) != *right || verdict.reason.is_empty() {
            wrong.push(format!("{class}: {gold} | {completion:?}: {}", verdict.reason));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), pairs.len(), wrong.join("\n"));
}

/// The golds of every file of the shared data: (file, gold). Empty where the data is not there.
fn golds() -> Vec<(String, String)> {
    let Some(data) = common::shared().map(|shared| shared.join("data")) else {
        return Vec::new();
    };
    let mut golds = Vec::new();
    for file in ["aime_2024", "aime_2025", "amc2023", "math500", "deepmath-5k"] {
        let reader = File::open(data.join(format!("{file}.parquet"))).unwrap();
        let reader = SerializedFileReader::new(reader).unwrap();
        for row in reader.get_row_iter(None).unwrap() {
            let row = row.unwrap();
            let named = |name: &str| row.get_column_iter().find(|(n, _)| *n == name).unwrap().1;
            let Field::Group(reward) = named("reward_model") else { panic!("{file}: no group") };
            let gold = reward.get_column_iter().find(|(n, _)| *n == "ground_truth").unwrap().1;
            let Field::Str(gold) = gold else { panic!("{file}: no text") };
            golds.push((file.to_string(), gold.clone()));
        }
    }
    let text = fs::read_to_string(data.join("gsm8k_test.jsonl")).unwrap();
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        golds.push(("gsm8k".to_string(), row["answer"].as_str().unwrap().to_string()));
    }
    assert_eq!(golds.len(), 30 + 30 + 40 + 500 + 5000 + 1319);
    golds
}

/// What a gold text gives as its answer (GSM8K's stand behind `####`).
fn bare(gold: &str) -> &str {
    gold.rsplit("#### ").next().unwrap()
}

#[test]
fn every_published_gold_equals_itself() {
    for (file, gold) in golds() {
        let own = math(&gold, bare(&gold));
        assert!(own.equal, "{file}: {gold}: {own:?}");
        let spaced = math(&gold, &format!(" ${}$ ", bare(&gold)));
        assert!(spaced.equal, "{file}: {gold}: {spaced:?}");
        let text =
            format!("Therefore, the answer is $\\boxed{{{}}}$, as was to be shown.", bare(&gold));
        for mode in [Mode::Math, Mode::Hendrycks] {
            let verdict = score(&gold, &text, mode, mode.rules());
            assert_eq!(verdict.reward, 1.0, "{file}: {gold}: {}", verdict.reason);
        }
    }
}

/// Golds written differently that mean the same.
const EQUAL: &[(&str, &str)] = &[
    (r"\{-1, 2\}", r"-1,2"),
    (r"60^\circ", r"\dfrac{\pi}{3}"),
    (r"18 \text{ integers}", r"18"),
    (r"\dfrac{1}{4}", r"\frac14"),
    (r"10,800", r"10800"),
    (r"36", r"\$36"),
    (r"0", r"c_0 = 0"),
    (r"0", r"\pi_1\left( \prod_{\alpha \in \Lambda} X_\alpha \right) = 0"),
    (r"+\infty", r"\mu(G(U)) = \infty"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"),
    (r"C", r"\text{(C)}"),
    (r"145^\circ", r"145"),
    (r"120^\circ", r"120"),
    (r"\frac 92", r"4.5"),
];

#[test]
fn different_golds_are_told_apart() {
    let mut golds: Vec<_> = golds().iter().map(|(_, gold)| bare(gold).to_string()).collect();
    golds.sort_unstable();
    golds.dedup();
    golds.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
    golds.truncate(500);
    let mut unexpected = Vec::new();
    for (i, a) in golds.iter().enumerate() {
        for b in &golds[..i] {
            let found = math(a, b);
            assert_eq!(found.equal, math(b, a).equal, "not symmetric: {a} {b}");
            let listed = EQUAL.contains(&(a, b)) || EQUAL.contains(&(b, a));
            if found.equal != listed {
                unexpected.push(format!("(r\"{a}\", r\"{b}\"), // {}", found.reason));
            }
        }
    }
    assert!(unexpected.is_empty(), "\n{}", unexpected.join("\n"));
}

#[test]
fn edited_golds_are_judged_in_time_and_without_panic() {
    let pieces = [
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "\\",
        "$",
        "^",
        "_",
        "-",
        ",",
        ".",
        "/",
        "%",
        "!",
        "|",
        "=",
        "<",
        "0",
        "9",
        "e",
        "x",
        "\\frac",
        "\\sqrt",
        "\\left",
        "\\right",
        "\\text{",
        "\\pm",
        "\\cup",
        "\\infty",
        "\\begin{pmatrix}",
        "\\\\",
        "&",
        "\\{",
        "\\}",
        "\u{0}",
        "é",
        "√",
        "°",
        "\\log_",
        "10^",
        "\\binom",
        "and",
        " ",
        "\n",
    ];
    let golds: Vec<_> = table().into_iter().map(|(_, gold, ..)| gold).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let start = Instant::now();
    let (mut judged, mut slowest) = (0, Duration::ZERO);
    for _ in 0..40 {
        for gold in &golds {
            let mut characters: Vec<char> = gold.chars().collect();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..=characters.len());
                match rng.random_range(0..4) {
                    0 if at < characters.len() => drop(characters.remove(at)),
                    1 => {
                        let to = rng.random_range(at..=characters.len());
                        let part = characters[at..to].to_vec();
                        characters.extend(part);
                    }
                    _ => {
                        let piece = pieces.choose(&mut rng).unwrap();
                        drop(characters.splice(at..at, piece.chars()));
                    }
                }
            }
            let edited: String = characters.into_iter().collect();
            let one = Instant::now();
            let forth = math(gold, &edited);
            let back = math(&edited, gold);
            slowest = slowest.max(one.elapsed());
            assert!(!forth.reason.is_empty() && !back.reason.is_empty());
            judged += 2;
        }
    }
    assert!(judged > 50_000);
    // A margin of a hundred for machines that do other work: half a millisecond is usual for the slowest.
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn hostile_answers_are_bounded_and_named() {
    let n = 1 << 20;
    let deep =
        |open: &str, close: &str, times: usize| open.repeat(times) + "1" + &close.repeat(times);
    for (answer, words) in [
        (deep("{", "}", 10_000), "longer than"),
        (deep("{", "}", 500), "nested"),
        (deep("(", ")", 1000), "nested"),
        (deep("\\{", "\\}", 500), "nested"),
        (deep("\\frac{1}{", "}", 300), "nested"),
        (deep("\\sqrt", "", 500), "nested"),
        (deep("\\text{", "}", 500), "nested"),
        (deep("\\sin", "", 500), "nested"),
        (deep("2^", "", 1500), "nested"),
        (deep("|", "|", 1000), ""),
        ("9".repeat(n), "longer than"),
        ("x".repeat(n), "longer than"),
        ("\\".repeat(n), "longer than"),
        ("1/".repeat(2000) + "1", "another number"),
        ("1,".repeat(2000), "items"),
        ("-".repeat(4000) + "1", ""),
        ("1".to_string() + &"!".repeat(4000), "operators"),
        ("10^{10^{10}}".into(), "too large"),
        ("(10^{10})!".into(), "too large"),
        ("\\binom{10^{9}}{10^{8}}".into(), "too large"),
        ("e^{e^{e^{e^{e}}}}".into(), "too large"),
        ("9^{9^{9}}".into(), "too large"),
        ("10^{-10^{10}}".into(), "too large"),
        ("1e999999999".into(), "no number"),
        ("\\frac{1}{0}".into(), "division by zero"),
        ("\\tan\\frac{\\pi}{2}".into(), "division by zero"),
        ("\\ln 0".into(), "logarithm of zero"),
        ("42\u{0}".into(), "symbols"),
        ("\u{0}".into(), "symbols"),
        (String::new(), "empty"),
        (" $ $ ".into(), "empty"),
    ] {
        let start = Instant::now();
        let judgement = math("42", &answer);
        let shown: String = answer.chars().take(40).collect();
        assert!(!judgement.equal, "{shown}: {judgement:?}");
        assert!(judgement.reason.contains(words), "{shown}: {}", judgement.reason);
        assert!(judgement.reason.len() < 300, "{shown}: {}", judgement.reason);
        assert!(start.elapsed() < Duration::from_secs(1), "{shown}: {:?}", start.elapsed());
        // The same text is equal whatever it is.
        assert!(
            answer.trim().is_empty()
                || !shown.contains(|c| c != '$' && c != ' ')
                || math(&answer, &answer).equal
        );
        let completion = format!("\\boxed{{{answer}}}");
        for mode in Mode::ALL {
            assert_eq!(score("42", &completion, mode, mode.rules()).reward, 0.0, "{shown}");
        }
    }
}

/// Runs `bupo-gguf verify` on these rows: (stdout, stderr, success).
fn verify(arguments: &[&str], rows: &str) -> (String, String, bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    fs::write(&file, rows).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bupo-gguf"));
    let out = command.arg("verify").args(arguments).arg(&file).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(out.stdout), text(out.stderr), out.status.success())
}

#[test]
fn the_command_judges_line_by_line_and_names_a_bad_one() {
    let rows = r#"{"gold": "1/2", "answer": "0.5"}
{"gold": "3", "completion": "so \\boxed{4}"}
"#;
    let (stdout, _, success) = verify(&[], rows);
    assert!(success);
    let lines: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0], serde_json::json!({"equal": true, "reason": "the same number"}));
    assert_eq!(lines[1]["equal"], false);
    let (stdout, ..) = verify(&["--json", "--mode", "hendrycks"], rows);
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary, serde_json::json!({"rows": 2, "equal": 1, "mode": "hendrycks"}));
    for (row, words) in [
        (r#"{"answer": "1"}"#, "`gold`"),
        (r#"{"gold": "1"}"#, "`answer`"),
        (r#"{"gold": 1, "answer": "1"}"#, "quote it"),
        (r#"{"gold": "1", "answer": "1", "completion": "1"}"#, "both"),
        ("[1]", "a JSON object"),
    ] {
        let (stdout, stderr, success) = verify(&[], &format!("{rows}{row}\n"));
        assert!(!success, "{row}");
        assert_eq!(stdout.lines().count(), 2, "{row}: what was judged before is kept");
        assert!(stderr.contains("rows.jsonl:3") && stderr.contains(words), "{row}: {stderr}");
    }
    assert!(verify(&["--extract", "last"], rows).1.contains("boxed, fbox"));
}

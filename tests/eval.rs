//! `eval`, data files and rewards as a user runs them.

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};

use program::{fail, json, json_lines, run, succeed, text};
use serde_json::Value;

const EVAL: [&str; 12] = [
    "eval",
    "demo",
    "--data",
    "task:add",
    "--problems",
    "10",
    "--samples",
    "4",
    "--max-response",
    "24",
    "--threads",
    "1",
];

#[test]
fn eval_counts_what_it_keeps_and_resumes_to_the_same_figures() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("e");
    let report = json(&succeed(&[&EVAL[..], &["--json", "--out", text(&out)]].concat()));
    let samples = json_lines(&out.join("completions.jsonl"));
    assert_eq!((report["problems"].as_u64(), report["samples"].as_u64()), (Some(10), Some(4)));
    assert_eq!(samples.len(), 40);
    // From the completions, by hand.
    let right =
        |p: u64| samples.iter().filter(|s| s["problem"] == p && s["right"] == true).count() as f64;
    let mean = |f: &dyn Fn(f64) -> f64| (0..10).map(|p| f(right(p))).sum::<f64>() / 10.0;
    let close = |value: &Value, expected: f64| {
        let value = value.as_f64().unwrap();
        assert!((value - expected).abs() < 1e-9, "{value} {expected}");
    };
    close(&report["avg_at_k"], mean(&|c| c / 4.0));
    close(&report["pass_at_k"]["1"], mean(&|c| c / 4.0));
    close(&report["pass_at_k"]["2"], mean(&|c| 1.0 - (4.0 - c) * (3.0 - c) / 12.0));
    close(&report["pass_at_k"]["4"], mean(&|c| (c > 0.0) as u8 as f64));
    let tokens = samples.iter().map(|s| s["tokens"].as_f64().unwrap()).sum::<f64>();
    close(&report["mean_tokens"], tokens / 40.0);
    let avg = report["avg_at_k"].as_f64().unwrap();
    assert!(avg > 0.0 && avg < 1.0, "the demo model gets some right: {report}");
    let interval = common::floats(&report["ci95"]["avg_at_k"]);
    assert!((interval[0] as f64) < avg && avg < interval[1] as f64, "{interval:?}");

    // The table says the same; the same seed gives the same; another one does not.
    let table = succeed(&EVAL);
    assert!(
        table.contains("avg@4") && table.contains("pass@2") && table.contains("maj@4"),
        "{table}"
    );
    assert_eq!(json(&succeed(&[&EVAL[..], &["--json"]].concat())), report);
    assert_ne!(json(&succeed(&[&EVAL[..], &["--json", "--seed", "2"]].concat())), report);

    // Ended after five completions and a half: the rest is sampled as it would have been.
    let path = out.join("completions.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    let cut = whole.lines().take(5).map(str::len).sum::<usize>() + 5 + 20;
    std::fs::write(&path, &whole[..cut]).unwrap();
    let resume = [&EVAL[..], &["--json", "--out", text(&out), "--resume"]].concat();
    assert_eq!(json(&succeed(&resume)), report);
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&std::fs::read_to_string(&path).unwrap()), sorted(&whole));
    fail(&[&EVAL[..], &["--out", text(&out)]].concat(), &["--out", "empty or new", "--resume"]);
    let other = [&resume[..], &["--temperature", "0.5"]].concat();
    fail(&other, &["settings.json", "`temperature`", "expected 1.0, got 0.5"]);
}

/// The rule of `boxed` for whole numbers, as a reward program.
const PROGRAM: &str = r#"while read -r line; do
    a=$(printf '%s' "$line" | sed 's/.*"answer":"\([^"]*\)".*/\1/')
    b=$(printf '%s' "$line" | sed -n 's/.*"completion":".*boxed{\([^}"]*\)}.*/\1/p')
    if [ "$a" = "$b" ]; then echo '{"reward": 1}'; else echo 0; fi
done"#;

const TRAIN: [&str; 18] = [
    "train",
    "demo",
    "--steps",
    "2",
    "--internal-steps",
    "1",
    "--prompts-per-step",
    "4",
    "--group",
    "4",
    "--eval-problems",
    "8",
    "--rank",
    "2",
    "--reward-workers",
    "3",
    "--threads",
    "1",
];

#[test]
#[cfg(unix)]
fn a_program_gives_the_rewards_of_the_built_in_rule() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("judge.sh");
    std::fs::write(&program, PROGRAM).unwrap();
    let command = format!("cmd:sh {}", program.display());
    let train = |reward: &str, name: &str| -> PathBuf {
        let out = dir.path().join(name);
        succeed(&[&TRAIN[..], &["--reward", reward, "--out", text(&out)]].concat());
        out
    };
    let (built_in, by_program) = (train("boxed", "a"), train(&command, "b"));
    let rewards = |out: &Path| -> Vec<Value> {
        json_lines(&out.join("completions.jsonl")).iter().map(|s| s["reward"].clone()).collect()
    };
    assert_eq!(rewards(&built_in), rewards(&by_program));
    assert!(rewards(&built_in).contains(&1.0.into()));
    let adapter =
        |out: &Path| bupo_gguf::gguf::AdapterFile::read(&out.join("adapter.gguf")).unwrap().pairs;
    assert!(adapter(&built_in) == adapter(&by_program), "the same rewards, the same adapter");

    // Several parts, each logged alone.
    let spec = format!("boxed + 0.5*format + -0.25*regex:[0-9]+ + {command}");
    let out = train(&spec, "c");
    for sample in json_lines(&out.join("completions.jsonl")) {
        let part = |name: &str| sample["parts"][name].as_f64().unwrap();
        let sum = part("boxed") + 0.5 * part("format") - 0.25 * part("regex") + part("cmd");
        assert_eq!(sample["reward"].as_f64(), Some(sum), "{sample}");
        assert_eq!(part("boxed"), part("cmd"), "{sample}");
    }
    let metrics = json_lines(&out.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 2);
    let names: Vec<_> = metrics[0]["reward_parts"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["boxed", "format", "regex", "cmd"]);
}

#[test]
#[cfg(unix)]
fn a_program_that_cannot_judge_ends_the_run_and_is_no_zero() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (program, words)) in [
        ("sleep 600", &["sleep 600", "no answer within 0.5 s"][..]),
        ("exit 7", &["it ended (exit status: 7)"]),
        ("while read -r l; do echo rubbish; done", &["finite `reward`", "rubbish"]),
        ("while read -r l; do echo NaN; done", &["finite `reward`", "NaN"]),
        ("no-such-program", &["exit status: 127"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let reward = format!("cmd:{program}");
        let more = ["--reward", &reward, "--reward-timeout", "0.5", "--out", text(&out)];
        fail(&[&TRAIN[..], &more].concat(), words);
        assert!(!out.exists(), "{program}: no step was made of it, so that nothing is left");
    }
    fail(&[&TRAIN[..], &["--reward", "math-ish"]].concat(), &["math-ish", "boxed", "cmd:PROGRAM"]);
    fail(
        &[&TRAIN[..], &["--objective", "gspo", "--algo", "grpo"]].concat(),
        &["--objective", "--algo bupo"],
    );
    fail(&["train", "demo", "--template", "fancy"], &["template 'fancy'", "octothinker"]);
    fail(&["eval", "demo", "--data", "task:add", "--samples", "0"], &["--samples", "at least 1"]);
    fail(&["eval", "demo", "--data", "task:add", "--max-response", "600"], &["512"]);
}

#[test]
fn the_papers_preset_says_what_it_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("p");
    let args = [
        "train",
        "demo",
        "--preset",
        "bupo-paper",
        "--steps",
        "1",
        "--prompts-per-step",
        "4",
        "--mini-batch",
        "2",
        "--max-prompt",
        "200",
        "--max-response",
        "24",
        "--internal-layer",
        "3",
        "--eval-problems",
        "4",
        "--threads",
        "1",
        "--out",
        text(&out),
    ];
    let shown = run(&args);
    let stderr = String::from_utf8_lossy(&shown.stderr);
    assert!(shown.status.success(), "{stderr}");
    assert!(
        stderr.contains("preset: lr: the paper's 1e-6 is for full fine-tuning; 1e-5"),
        "{stderr}"
    );
    assert!(stderr.contains("preset: steps: 1 as you ask, the preset has 300"), "{stderr}");
    let config: toml::Table =
        std::fs::read_to_string(out.join("config.toml")).unwrap().parse().unwrap();
    let train = &config["train"];
    assert_eq!(train["internal-layer"].as_integer(), Some(3));
    assert_eq!((train["group"].as_integer(), train["steps"].as_integer()), (Some(8), Some(1)));
    assert_eq!(train["template"].as_str(), Some("qwen3-no-think"));
}

#[test]
fn published_sets_train_and_evaluate_on_small_models() {
    let Some(shared) = common::shared() else {
        eprintln!("no shared models here; .ci/run insists on them with BUPO_REQUIRE_SHARED");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let llama = shared.join("models/stories260K-Q8_0.gguf");
    for (m, (model, template)) in [("demo", "chat"), (text(&llama), "plain")].iter().enumerate() {
        for (d, name) in ["gsm8k_test.jsonl", "math500.parquet"].iter().enumerate() {
            let data = shared.join("data").join(name);
            let out = dir.path().join(format!("{m}-{d}"));
            let common = ["--data", text(&data), "--template", template, "--threads", "1"];
            let eval = ["--samples", "2", "--problems", "4", "--max-response", "16", "--json"];
            let report = json(&succeed(&[&["eval", *model][..], &common, &eval].concat()));
            assert_eq!(report["problems"].as_u64(), Some(4), "{model} {name}: {report}");
            let config = ["--reward", "hendrycks", "--json"];
            succeed(&[&["eval", *model][..], &common, &eval[..6], &config].concat());
            // Judged by format too, so that there is a signal where nothing is solved.
            let train = [
                "--steps",
                "1",
                "--prompts-per-step",
                "3",
                "--group",
                "3",
                "--max-prompt",
                "48",
                "--max-response",
                "16",
                "--internal-layer",
                "2",
                "--internal-steps",
                "1",
                "--rank",
                "2",
                "--reward",
                "math + 0.1*regex:the + 0.1*overlong:16",
                "--eval-data",
                text(&data),
                "--eval-problems",
                "3",
                "--out",
                text(&out),
            ];
            succeed(&[&["train", *model][..], &common, &train].concat());
            assert_eq!(json_lines(&out.join("metrics.jsonl")).len(), 1, "{model} {name}");
            assert!(out.join("adapter.gguf").is_file());
        }
    }
    // Weights, a curriculum, and columns by name.
    let spec = format!(
        "{}:3,{}",
        shared.join("data/deepmath-5k.parquet").display(),
        shared.join("data/aime_2024.parquet").display()
    );
    let out = dir.path().join("mixed");
    succeed(&[
        "train",
        "demo",
        "--data",
        &spec,
        "--steps",
        "1",
        "--prompts-per-step",
        "8",
        "--group",
        "2",
        "--max-response",
        "8",
        "--drop-long-prompts",
        "--max-prompt",
        "400",
        "--micro-batch-tokens",
        "4096",
        "--threads",
        "1",
        "--rank",
        "2",
        "--out",
        text(&out),
    ]);
    let from = |name: &str| {
        let samples = json_lines(&out.join("completions.jsonl"));
        samples.iter().filter(|s| s["problem"].as_str().unwrap().contains(name)).count()
    };
    assert_eq!((from("deepmath"), from("aime_2024")), (12, 4));
    let data = shared.join("data/math500.parquet");
    let missing = ["--data", text(&data), "--answer-column", "solution"];
    fail(
        &[&["eval", "demo"][..], &missing].concat(),
        &["row 1", "`solution`", "reward_model.ground_truth", "--answer-column"],
    );
    fail(&[&["train", "demo", "--curriculum"][..], &missing[..2]].concat(), &["difficulty"]);
}

//! `bupo-gguf entropy` as a user runs it: PyTorch's figures in its files, rows that cannot be used,
//! interruption and resumption, comparison.

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Golden, relative_error};
use program::{fail, succeed};
use serde_json::{Value, json};

/// `entropy` with these arguments; its summary.
fn look(args: &[&str]) -> Value {
    let out = succeed(&[&["entropy"], args, &["--json"]].concat());
    serde_json::from_str(&out).unwrap()
}

fn refused(args: &[&str], words: &[&str]) {
    fail(&[&["entropy"], args].concat(), words);
}

fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().into()
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }
}

fn golden_model(case: &str) -> String {
    common::golden_dir().join(format!("{case}.gguf")).to_str().unwrap().into()
}

#[test]
fn the_dump_holds_pytorchs_entropies() {
    let folder = Folder::new();
    for case in ["qwen3-f32", "llama-q4_0", "qwen3-q4_k"] {
        let golden = Golden::load(case);
        let tokens = golden.ints("entropy_tokens");
        let (prompt, completion) = tokens.split_at(3);
        let row = json!({"prompt_tokens": prompt, "completions": [{"tokens": completion}]});
        let data = folder.write("rows.jsonl", &row.to_string());
        let out = folder.path(case);
        let args = [&golden_model(case), "--data", &data, "--out", &out, "--top-k", "4"];
        let summary = look(&args);
        let records = records(&PathBuf::from(&out).join("entropy.jsonl"));
        let layers = golden.json["n_layer"].as_u64().unwrap() as usize;
        assert_eq!(records.len(), layers * completion.len());
        let tolerance = if case.ends_with("f32") { 1e-4 } else { 1e-3 };
        for layer in 1..=layers {
            let own: Vec<&Value> = records.iter().filter(|r| r["layer"] == layer).collect();
            for (i, record) in own.iter().enumerate() {
                let position = 2 + i; // of the token before
                assert_eq!(record["position"], position);
                assert_eq!(record["token"], tokens[position + 1]);
            }
            for tap in ["layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out"] {
                let ours: Vec<f32> = own.iter().map(|r| r[tap].as_f64().unwrap() as f32).collect();
                let theirs = common::floats(&golden.json["entropies"][layer - 1][tap]);
                let theirs = &theirs[2..tokens.len() - 1];
                let error = relative_error(&ours, theirs);
                assert!(error < tolerance, "{case} layer {layer} {tap}: {error}");
                let mean = theirs.iter().sum::<f32>() as f64 / theirs.len() as f64;
                let ours = summary["layers"][layer - 1][tap].as_f64().unwrap();
                // Some entropies are as good as zero: 1e-40 nats where one token has all of it.
                let bound = 2.0 * tolerance as f64 * mean + 1e-12;
                assert!((ours - mean).abs() < bound, "{case} mean {tap}: {ours}, {mean}");
                for record in &own {
                    let probs = common::floats(&record[format!("{tap}_top_probs")]);
                    assert!(probs.len() == 4 && probs.is_sorted_by(|a, b| a >= b), "{probs:?}");
                    let taken = record[format!("{tap}_taken_prob")].as_f64().unwrap() as f32;
                    let rank = record[format!("{tap}_taken_rank")].as_u64().unwrap() as usize;
                    let fits = match rank {
                        1..=4 => (probs[rank - 1] - taken).abs() <= 1e-6 * taken,
                        _ => taken <= probs[3],
                    };
                    assert!(fits, "rank {rank}, {taken} beside {probs:?}");
                }
            }
            let change = |name: &str| summary["layers"][layer - 1][name].as_f64().unwrap();
            let error = change("dH_ffn") - (change("ffn_out") - change("ffn_in"));
            assert!(error.abs() < 1e-9, "dH_ffn is the difference of the means");
        }
        assert!(Path::new(&out).join("entropy.parquet").is_file());
    }
}

/// A row for each kind of trouble, usable ones between.
const ROWS: &str = r#"{"prompt_tokens": [40, 41, 42], "completions": [{"tokens": [50, 51, 52, 53, 54]}, {"tokens": [60, 61]}]}
{"prompt": 
{"prompt_tokens": [40, 4000], "completions": [{"tokens": [50]}]}
{"prompt": "17+25=", "completion": "42"}
{"prompt_tokens": [40], "completions": [{"tokens": []}]}
{"prompt_tokens": [40], "completions": [{"tokens": [4000]}]}
{"prompt": [{"role": "user", "content": "3+4="}]}
{"prompt": "1+1=", "completion": ""}
{"prompt": "9+9="}
"#;

#[test]
fn a_tasks_held_out_problems_are_answered_and_looked_at() {
    let folder = Folder::new();
    let out = folder.path("task");
    let task = ["demo", "--data", "task:add", "--samples", "3", "--max-response", "12", "--out"];
    let summary = look(&[&task[..], &[&out]].concat());
    assert_eq!(summary["samples"].as_u64(), Some(3), "{summary}");
    let rows = records(&Path::new(&out).join("entropy.jsonl"));
    assert!(rows.iter().any(|r| r["row"].as_u64() == Some(2)), "{:?}", rows.last());
    refused(&["demo", "--data", "task:none", "--out", &folder.path("none")], &["task", "none"]);
}

#[test]
fn rows_that_cannot_be_used_are_left_out_by_number() {
    let folder = Folder::new();
    let long: Vec<i32> = vec![40; 600];
    let long = json!({"prompt_tokens": long, "completions": [{"tokens": [50]}]});
    let data = folder.write("rows.jsonl", &format!("{ROWS}{long}\n"));
    let out = folder.path("out");
    let quick = ["--max-response", "6"];
    let summary = look(&[&["demo", "--data", &data, "--out", &out][..], &quick[..]].concat());
    assert_eq!(summary["rows"], 10);
    assert_eq!(summary["rows_left_out"], 6);
    assert_eq!(summary["samples"], 5);
    let reasons = summary["left_out"].as_array().unwrap();
    for (reason, words) in reasons.iter().zip([
        ["rows.jsonl:2", "JSON"],
        ["line 3", "4000"],
        ["rows.jsonl:5", "empty"],
        ["line 6", "4000"],
        ["rows.jsonl:8", "empty"],
        ["line 10", "512 tokens"],
    ]) {
        let reason = reason.as_str().unwrap();
        assert!(words.iter().all(|word| reason.contains(word)), "{words:?} in {reason}");
    }
    let strict = folder.path("strict");
    let args = ["demo", "--data", &data, "--out", &strict, "--strict"];
    refused(&args, &["rows.jsonl:2", "JSON"]);
    assert!(!Path::new(&strict).exists(), "nothing half-written");
    refused(&["demo", "--data", &data, "--out", &out], &["--out", "empty or new", "--resume"]);
    let none = folder
        .write("none.jsonl", "{\"prompt_tokens\": [40], \"completions\": [{\"tokens\": [-1]}]}");
    let empty = folder.path("empty");
    refused(&["demo", "--data", &none, "--out", &empty], &["none.jsonl", "can be used", "-1"]);
    assert!(!Path::new(&empty).exists());
    let adapter = common::golden_dir().join("llama-f32.lora.gguf");
    let adapter = adapter.to_str().unwrap();
    refused(&["demo", "--data", &data, "--out", &empty, "--adapter", adapter], &["llama", "qwen3"]);
    let other = golden_model("qwen2-f32");
    let args = ["demo", "--data", &data, "--out", &empty, "--compare", &other];
    refused(&args, &["--compare", "layers"]);
}

/// A dump that was cut anywhere and resumed gives the bytes of one that was not.
#[test]
fn a_resumed_dump_is_the_whole_one() {
    let folder = Folder::new();
    let rows: String = (0..70)
        .map(|i| {
            let tokens: Vec<i32> = (0..4 + i % 5).map(|j| 40 + (i * 7 + j) % 60).collect();
            let completions = [json!({"tokens": tokens}), json!({"tokens": &tokens[1..]})];
            format!("{}\n", json!({"prompt_tokens": [40, 41, 42 + i], "completions": completions}))
        })
        .collect();
    let data = folder.write("rows.jsonl", &rows);
    let model = golden_model("qwen3-f32");
    let go = |out: &str, extra: &[&str]| {
        let base = [&model, "--data", &data, "--out", out, "--batch-tokens", "64", "--every", "2"];
        look(&[&base[..], extra].concat())
    };
    let whole = folder.path("whole");
    let summary = go(&whole, &[]);
    assert_eq!((&summary["samples"], &summary["rows"]), (&json!(140), &json!(70)));
    let read = |folder: &str, file: &str| std::fs::read(Path::new(folder).join(file)).unwrap();
    let part = folder.path("part");
    assert_eq!(go(&part, &["--samples", "30"])["samples"], 30);
    // As a kill leaves it: a record begun after what is noted as whole.
    let mut torn = read(&part, "entropy.jsonl");
    torn.extend_from_slice(b"{\"row\":15,\"comple");
    std::fs::write(Path::new(&part).join("entropy.jsonl"), torn).unwrap();
    let resumed = go(&part, &["--resume"]);
    for name in ["layers", "tokens", "samples", "rows", "perplexity", "boundary"] {
        assert_eq!(resumed[name], summary[name], "{name}");
    }
    for file in ["entropy.jsonl", "entropy.parquet", "lens.json", "report.html"] {
        assert!(read(&part, file) == read(&whole, file), "{file}");
    }
    // Once more: there is nothing left to do.
    assert_eq!(go(&part, &["--resume"])["layers"], summary["layers"]);
    let args = [&model, "--data", &data, "--out", &part, "--resume", "--every", "3"];
    refused(&args, &["--resume", "pick", "\"every\":2", "\"every\":3"]);
}

#[test]
#[cfg(unix)]
fn ctrl_c_keeps_what_is_done() {
    let folder = Folder::new();
    let row = json!({"prompt_tokens": [40, 41], "completions": [{"tokens": vec![50; 200]}]});
    let data = folder.write("rows.jsonl", &format!("{row}\n").repeat(100_000));
    let out = folder.path("out");
    let base = ["demo", "--data", &data, "--out", &out];
    let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .arg("entropy")
        .args(base)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let start = std::time::Instant::now();
    while !Path::new(&out).join("progress.json").exists() {
        assert!(start.elapsed().as_secs() < 120, "nothing within two minutes");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let path = Path::new(&out);
    let summary: Value =
        serde_json::from_slice(&std::fs::read(path.join("summary.json")).unwrap()).unwrap();
    assert_eq!(summary["interrupted"], true);
    let done = summary["samples"].as_u64().unwrap();
    assert_eq!(records(&path.join("entropy.jsonl")).len() as u64, done * 200 * 8);
    let more = (done + 2).to_string();
    let resumed = look(&[&base[..], &["--resume", "--samples", &more]].concat());
    assert_eq!(resumed["samples"], done + 2);
}

#[test]
fn comparing_gives_the_paired_difference() {
    let folder = Folder::new();
    let golden = Golden::load("qwen3-f32");
    let row = &golden.rollouts()[0];
    let completions: Vec<Value> =
        row.completions.iter().map(|tokens| json!({"tokens": tokens})).collect();
    let row = json!({"prompt_tokens": row.prompt, "completions": completions});
    let data = folder.write("rows.jsonl", &row.to_string());
    let out = folder.path("out");
    let (model, adapter) = (golden_model("qwen3-f32"), golden.lora_path());
    let adapter = adapter.to_str().unwrap();
    let args = [&model, "--data", &data, "--out", &out, "--compare-adapter", adapter];
    let summary = look(&args);
    let alone = folder.path("alone");
    let with = look(&[&model, "--data", &data, "--out", &alone, "--adapter", adapter]);
    assert_eq!(summary["compared"]["layers"], with["layers"], "the same as measured alone");
    let number = |value: &Value| value.as_f64().unwrap();
    for (i, difference) in summary["difference"]["layers"].as_array().unwrap().iter().enumerate() {
        for name in ["layer_out", "dH_ffn", "cos_attn", "kl_to_final"] {
            let (a, b) = (&summary["layers"][i][name], &summary["compared"]["layers"][i][name]);
            let expected = number(b) - number(a);
            assert!((number(&difference[name]) - expected).abs() < 1e-9, "{name}");
        }
    }
    assert!(number(&summary["difference"]["layers"][0]["layer_out"]).abs() > 1e-4);
    assert!(Path::new(&out).join("compare.parquet").is_file());
    // A model beside itself does not differ.
    let same = folder.path("same");
    let summary = look(&[&model, "--data", &data, "--out", &same, "--compare", &model]);
    assert_eq!(summary["difference"]["layers"][1]["layer_out"], 0.0);
    // Q8_0 beside F32 of another seed's weights has another vocabulary or not; the demo model has.
    let other = folder.path("other");
    let args = [&model, "--data", &data, "--out", &other, "--compare", &golden_model("qwen3-q4_k")];
    refused(&args, &["--compare", "layers"]);
}

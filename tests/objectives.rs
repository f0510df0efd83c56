//! Objectives beside the policy gradient: losses and every LoRA gradient as PyTorch has them, runs that go on exactly,
//! rows that cannot be used. `tests/fixtures/golden/make_golden_objectives.py` made the figures.

mod common;
#[path = "common/logs.rs"]
mod logs;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use common::{Golden, golden_dir, relative_error};
use logs::timeless;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(args).output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn write(path: &Path, rows: &[Value]) -> String {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().into()
}

fn records(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Lines of `completions.jsonl`; none where nothing was sampled.
fn completions(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("completions.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Rows of the golden rollouts: completions to imitate, or pairs.
fn golden_rows(golden: &Golden, pairs: bool) -> Vec<Value> {
    let mut rows = Vec::new();
    for row in golden.rollouts() {
        let c = &row.completions;
        if pairs {
            for (chosen, rejected) in [(0, 1), (2, 3)] {
                rows.push(json!({"prompt_tokens": row.prompt, "chosen_tokens": c[chosen], "rejected_tokens": c[rejected]}));
            }
        } else {
            let completions: Vec<Value> =
                c.iter().map(|tokens| json!({"tokens": tokens})).collect();
            rows.push(json!({"prompt_tokens": row.prompt, "completions": completions}));
        }
    }
    rows
}

/// Losses and gradients of the golden objectives of a case, all or those of this kind, where these options say.
fn agree_with_pytorch(case: &str, kind: &str, options: &str) {
    let golden = Golden::load(case);
    let model = golden_dir().join(format!("{case}.gguf"));
    let model = model.to_str().unwrap();
    let adapter = golden.lora_path();
    let read =
        |end: &str| std::fs::read(golden_dir().join(format!("{case}.objectives.{end}"))).unwrap();
    let expected: Value = serde_json::from_slice(&read("json")).unwrap();
    let layer = expected["internal_layer"].to_string();
    let (bytes, tolerance) = (read("safetensors"), if case.ends_with("f32") { 1e-4 } else { 1e-3 });
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let distill = ["--algo", "distill", "--teacher", model];
    for (name, algo) in [
        ("sft", vec!["--algo", "sft"]),
        (
            "sft_internal",
            vec!["--algo", "sft", "--internal-layer", &layer, "--internal-steps", "1"],
        ),
        ("dpo", vec!["--algo", "dpo", "--beta", "0.1"]),
        ("reverse_kl", distill.to_vec()),
        ("forward_kl", [&distill[..], &["--divergence", "forward"]].concat()),
    ] {
        if !name.ends_with(kind) {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let data = write(&dir.path().join("rows.jsonl"), &golden_rows(&golden, name == "dpo"));
        let (out, dump) = (dir.path().join("run"), dir.path().join("g.safetensors"));
        let fixed = [
            "--data",
            &data,
            "--adapter",
            adapter.to_str().unwrap(),
            "--steps",
            "1",
            "--dump-gradients",
            dump.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--threads",
            "2",
        ];
        let options: Vec<&str> = options.split_whitespace().collect();
        let output = run(&[&["train", model], &algo[..], &fixed, &options].concat());
        assert!(output.status.success(), "{case} {name}: {}", stderr(&output));
        let loss = records(&out)[0]["loss"].as_f64().unwrap();
        let theirs = expected["losses"][name].as_f64().unwrap();
        let error = (loss - theirs).abs() / theirs.abs();
        println!("{error:.1e} of {tolerance:.0e}  {case} {name} loss {loss}");
        assert!(error < tolerance, "{case} {name}: loss {loss}, PyTorch {theirs}");
        let dumped = std::fs::read(&dump).unwrap();
        let dumped = safetensors::SafeTensors::deserialize(&dumped).unwrap();
        let floats = |view: safetensors::tensor::TensorView<'_>| -> Vec<f32> {
            view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let mut seen = 0;
        for key in
            reference.names().into_iter().filter(|key| key.split_once('.').unwrap().0 == name)
        {
            let tensor = key.split_once('.').unwrap().1;
            let theirs = floats(reference.tensor(key).unwrap());
            let ours = floats(dumped.tensor(tensor).unwrap());
            seen += 1;
            if theirs.iter().all(|&g| g == 0.0) {
                assert!(ours.iter().all(|&g| g == 0.0), "{case} {key}: beyond the layer");
                continue;
            }
            let error = relative_error(&ours, &theirs) as f64;
            println!("{error:.1e} of {tolerance:.0e}  {case} {key}");
            assert!(error < tolerance, "{case} {key}: {error}");
        }
        assert!(seen >= 14 && seen == dumped.len(), "{case} {name}: {seen} tensors");
    }
}

#[test]
fn losses_and_gradients_agree_with_pytorch() {
    for case in ["qwen3-f32", "qwen2-f32", "llama-q4_0"] {
        agree_with_pytorch(case, "", "");
    }
}

/// By the GPU's backend and kernels on the host, within a budget: student and teacher take turns there.
#[test]
fn a_distillation_on_a_device_agrees_with_pytorch() {
    for case in ["qwen3-f32", "llama-q4_0"] {
        agree_with_pytorch(case, "_kl", "--device emulated --precise --vram 1GiB");
    }
}

/// Sums with right answers and wrong ones, as rows of each objective.
fn sums(algo: &str, n: u64, first: u64) -> Vec<Value> {
    let row = |i: u64| {
        let (a, b) = (10 + (i * 37) % 80, 10 + (i * 53) % 80);
        let (prompt, right, wrong) =
            (format!("{a}+{b}="), (a + b).to_string(), (a + b + 1 + i % 7).to_string());
        match algo {
            "dpo" | "orpo" | "simpo" => {
                json!({"prompt": prompt, "chosen": right, "rejected": wrong})
            }
            "kto" if i.is_multiple_of(2) => {
                json!({"prompt": prompt, "completion": wrong, "label": false})
            }
            "kto" => json!({"prompt": prompt, "completion": right, "label": true}),
            "on-policy" => json!({"prompt": prompt}),
            _ => json!({"prompt": prompt, "completion": right}),
        }
    };
    (first..first + n).map(row).collect()
}

/// Options of an objective on the demo model.
fn options(name: &str) -> Vec<&str> {
    match name {
        "on-policy" => "--algo distill --teacher demo --group 2 --max-response 8 --kv-mib 16",
        "distill" => "--algo distill --teacher demo --divergence jsd",
        "forward" => "--algo distill --teacher demo --divergence forward",
        "sft" => "--algo sft",
        "neftune" => "--algo sft --neftune 5",
        "dpo" => "--algo dpo --dpo-loss robust --label-smoothing 0.1",
        "kto" => "--algo kto --undesirable-weight 0.7",
        "orpo" => "--algo orpo",
        _ => "--algo simpo",
    }
    .split_whitespace()
    .collect()
}

/// What a run leaves, apart from what a clock says; sampled completions behind the records.
fn left(out: &Path, step: u64) -> (Vec<Value>, Vec<u8>, Vec<u8>) {
    let mut records = timeless(&out.join("metrics.jsonl"));
    records.extend(completions(out));
    let read = |name: String| std::fs::read(out.join(name)).unwrap();
    let state = read(format!("checkpoints/step-{step}/state.safetensors"));
    (records, read("adapter.gguf".into()), state)
}

#[test]
fn every_objective_goes_on_to_the_same_bytes_after_a_kill() {
    for name in ["sft", "neftune", "dpo", "kto", "orpo", "simpo", "distill", "on-policy"] {
        let dir = tempfile::tempdir().unwrap();
        let data = write(&dir.path().join("rows.jsonl"), &sums(name, 10, 0));
        let held_out = match name {
            // Held-out rows are scored, not answered.
            "on-policy" => sums("distill", 4, 100),
            _ => sums(name, 4, 100),
        };
        let held_out = write(&dir.path().join("held-out.jsonl"), &held_out);
        let train = |out: &Path| -> Vec<String> {
            let fixed = "--steps 4 --internal-steps 2 --prompts-per-step 4 --mini-batch 2 --rank 2 --threads 1 \
                         --checkpoint-every 1 --eval-every 2";
            let mut args = vec!["train".to_string(), "demo".into()];
            args.extend(
                options(name).into_iter().chain(fixed.split_whitespace()).map(String::from),
            );
            let paths = ["--data", &data, "--eval-data", &held_out, "--out", out.to_str().unwrap()];
            args.extend(paths.map(String::from));
            args
        };
        let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
        let output =
            Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(train(&whole)).output().unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));

        let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
            .args(train(&cut))
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let begun = std::time::Instant::now();
        let lines = || std::fs::read_to_string(cut.join("metrics.jsonl")).unwrap_or_default();
        while lines().lines().count() < 2 && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed().as_secs() < 300, "{name}: no second step");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let output = run(&["train", "--resume", cut.to_str().unwrap()]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let (mine, theirs) = (left(&cut, 4), left(&whole, 4));
        assert_eq!(mine.0, theirs.0, "{name}: metrics");
        assert!(mine.1 == theirs.1 && mine.2 == theirs.2, "{name}: other bytes");
        let phases: Vec<&str> = theirs.0.iter().filter_map(|r| r["phase"].as_str()).collect();
        assert_eq!(phases, ["internal", "internal", "final", "final"], "{name}");
        assert!(theirs.0[1]["eval_loss"].as_f64().unwrap().is_finite(), "{name}");
        if matches!(name, "dpo" | "orpo" | "simpo") {
            let keys =
                ["rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"];
            assert!(keys.iter().all(|key| theirs.0[3][key].is_f64()), "{}", theirs.0[3]);
        }
    }
}

#[test]
fn held_out_losses_fall_and_an_adapter_goes_on_to_rewards() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = String::new();
    for name in ["sft", "dpo", "forward"] {
        let data = write(&dir.path().join("rows.jsonl"), &sums(name, 64, 0));
        let held_out = write(&dir.path().join("held-out.jsonl"), &sums(name, 16, 100));
        let out = dir.path().join(name);
        let mut args = vec!["train", "demo"];
        args.extend(options(name));
        args.extend(
            "--prompts-per-step 16 --steps 12 --rank 8 --lr 2e-3 --threads 2 --json".split(' '),
        );
        args.extend(["--data", &data, "--eval-data", &held_out, "--out", out.to_str().unwrap()]);
        // The student is to become the model that SFT made.
        if name == "forward" {
            args.extend(["--teacher-adapter", &adapter]);
        }
        let output = run(&args);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        let loss = |key: &str| summary[key].as_f64().unwrap();
        let (before, after) = (loss("eval_loss_before"), loss("eval_loss_after"));
        println!("{name}: {before} to {after}");
        assert!(after < 0.8 * before, "{name}: {before} to {after}");
        assert!(summary["accuracy_before"].is_null(), "{summary}");
        if name == "sft" {
            adapter = summary["adapter"].as_str().unwrap().to_string();
        }
        let output = run(&["report", out.to_str().unwrap(), "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let figures = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(figures.contains("\"loss\"") && !figures.contains("\"reward\""), "{figures}");
        assert_eq!(figures.contains("margins"), name == "dpo", "{figures}");
    }
    let out = dir.path().join("rl");
    let words = "--algo grpo --steps 1 --prompts-per-step 2 --group 4 --eval-problems 2 --threads 2 --kv-mib 16";
    let mut args = vec!["train", "demo", "--adapter", &adapter, "--out", out.to_str().unwrap()];
    args.extend(words.split_whitespace());
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Loss and gradients of rows as one mini batch, on the demo model.
fn dumped(rows: &[Value], more: &str) -> (Value, Vec<f32>) {
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), rows);
    let (out, dump) = (dir.path().join("run"), dir.path().join("g.safetensors"));
    let mut args =
        vec!["train", "demo", "--algo", "sft", "--steps", "1", "--threads", "1", "--rank", "2"];
    args.extend(["--data", &data, "--out", out.to_str().unwrap()]);
    args.extend(["--dump-gradients", dump.to_str().unwrap()]);
    args.extend(more.split_whitespace());
    let output = run(&args);
    assert!(output.status.success(), "{more}: {}", stderr(&output));
    let bytes = std::fs::read(&dump).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let values = names.into_iter().flat_map(|name| {
        let view = file.tensor(name).unwrap();
        view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>()
    });
    (records(&out).remove(0), values.collect())
}

#[test]
fn weights_packing_and_turns_count_as_they_should() {
    let rows = sums("sft", 6, 0);
    let (whole, gradients) = dumped(&rows, "");
    // Packing leaks nothing: one row at a time gives the same.
    let (alone, same) = dumped(&rows, "--micro-batch-tokens 32");
    let close = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5;
    assert!(close(&whole["loss"], &alone["loss"]), "{whole} {alone}");
    assert!(relative_error(&same, &gradients) < 1e-5);
    // A row of weight 2 is the row twice.
    let mut weighted = rows.clone();
    weighted[3]["weight"] = 2.into();
    let twice: Vec<Value> = rows.iter().chain([&rows[3]]).cloned().collect();
    let ((a, by_weight), (b, by_two)) = (dumped(&weighted, ""), dumped(&twice, ""));
    assert!(close(&a["loss"], &b["loss"]) && !close(&a["loss"], &whole["loss"]), "{a} {b}");
    assert!(relative_error(&by_weight, &by_two) < 1e-5);
    // Of a conversation the assistant's turns, all or the last.
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let talk = [
        turn("user", "12+34="),
        turn("assistant", "46"),
        turn("user", "1+1="),
        turn("assistant", "2"),
    ];
    let conversation = [json!({"messages": talk})];
    let (all, _) = dumped(&conversation, "");
    let (last, _) = dumped(&conversation, "--turns last");
    let tokens = |record: &Value| record["trained_tokens"].as_u64().unwrap();
    assert_eq!((tokens(&all), tokens(&last)), (3 + 2, 2), "digits and the end of each turn");
    // Its first turn is the row of a prompt and a completion.
    let first = [json!({"messages": talk[..2]})];
    let as_row = [json!({"prompt": "12+34=", "completion": "46"})];
    let ((a, by_turn), (b, by_row)) = (dumped(&first, ""), dumped(&as_row, ""));
    assert_eq!(a["loss"], b["loss"]);
    assert_eq!(by_turn, by_row);
    // All tokens of a text but its first are learnt, and its end.
    let (text, _) = dumped(&[json!({"text": "12+34=46"})], "");
    assert!(tokens(&text) >= 8, "{text}");
}

#[test]
fn epochs_end_with_the_last_row() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), &sums("sft", 7, 0));
    let out = dir.path().join("run");
    let words =
        "--algo sft --epochs 2 --prompts-per-step 4 --rank 2 --threads 1 --checkpoint-every 0";
    let mut args = vec!["train", "demo", "--data", &data, "--out", out.to_str().unwrap()];
    args.extend(words.split_whitespace());
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let records = records(&out);
    let epochs: Vec<f64> = records.iter().map(|r| r["epoch"].as_f64().unwrap()).collect();
    assert_eq!(epochs.len(), 4, "14 rows in fours");
    assert_eq!(epochs[3], 2.0);
    let tokens: u64 = records.iter().map(|r| r["trained_tokens"].as_u64().unwrap()).sum();
    let (once, _) = dumped(&sums("sft", 7, 0), "");
    assert_eq!(tokens, 2 * once["trained_tokens"].as_u64().unwrap());
}

#[test]
fn rows_that_cannot_be_used_are_named_and_the_rest_goes_on() {
    let long = "1".repeat(5000);
    let cases: [(&str, Value, &str); 9] = [
        (
            "sft",
            json!({"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
            ":3: `chosen`: expected `completion`",
        ),
        (
            "sft",
            json!({"prompt": "1+1=", "completion": ""}),
            ":3: `completion`: expected text, not empty",
        ),
        (
            "sft",
            json!({"prompt_tokens": [1, 2], "completions": [{"tokens": [3, 99999]}]}),
            ":3: `completion`: expected token ids below",
        ),
        (
            "sft",
            json!({"prompt_tokens": [1, 99999], "completions": [{"tokens": [3]}]}),
            ":3: `prompt_tokens`: expected token ids below",
        ),
        ("sft", json!({"prompt": long, "completion": "2"}), ":3: `prompt`: expected at most"),
        (
            "dpo",
            json!({"prompt": "1+1=", "chosen": "2", "rejected": "2"}),
            ":3: `rejected`: expected another completion",
        ),
        (
            "dpo",
            json!({"prompt": "1+1=", "chosen": "", "rejected": "2"}),
            ":3: `chosen`: expected text, not empty",
        ),
        (
            "dpo",
            json!({"prompt_tokens": [1], "chosen_tokens": [2], "rejected_tokens": [99999]}),
            ":3: `rejected_tokens`: expected token ids",
        ),
        ("kto", json!({"prompt": "1+1=", "completion": "2"}), ":3: `label`: expected `label`"),
    ];
    for (algo, bad, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut rows = sums(algo, 4, 0);
        rows.insert(2, bad.clone());
        let data = write(&dir.path().join("rows.jsonl"), &rows);
        let out = dir.path().join("run");
        let words = format!(
            "--algo {algo} --steps 1 --prompts-per-step 4 --rank 2 --threads 1 --checkpoint-every 0"
        );
        let mut args = vec!["train", "demo", "--data", &data, "--out", out.to_str().unwrap()];
        args.extend(words.split_whitespace());
        let output = run(&args);
        let said = stderr(&output);
        assert!(output.status.success(), "{bad}: {said}");
        assert!(said.contains("left out: ") && said.contains(expected), "{bad}: {said}");
        std::fs::remove_dir_all(&out).unwrap();
        args.push("--strict");
        let output = run(&args);
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains(expected), "{bad}: {said}");
        let only = write(&dir.path().join("only.jsonl"), std::slice::from_ref(&bad));
        args.pop();
        args[3] = &only;
        let said = stderr(&run(&args));
        assert!(said.contains("expected a row that can be used, got none ("), "{bad}: {said}");
    }
}

#[test]
fn what_cannot_work_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, rows: &[Value]| write(&dir.path().join(name), rows);
    let wanted = |row: &Value| row["label"] == true;
    let one_sided: Vec<Value> = sums("kto", 8, 0).into_iter().filter(wanted).collect();
    let one_sided = file("one-sided.jsonl", &one_sided);
    let mixed = file("mixed.jsonl", &[sums("sft", 2, 0), sums("on-policy", 2, 0)].concat());
    let (good, pairs) =
        (file("good.jsonl", &sums("sft", 4, 0)), file("pairs.jsonl", &sums("dpo", 4, 0)));
    let other = golden_dir().join("llama-q4_0.gguf");
    let other = other.to_str().unwrap();
    for (words, expected) in [
        (format!("--algo kto --data {one_sided}"), "`label`: expected true in some rows"),
        (
            format!("--algo distill --teacher demo --data {mixed}"),
            "a completion in all rows or in none",
        ),
        (format!("--algo distill --data {good}"), "--algo distill: expected --teacher MODEL"),
        (
            format!("--algo distill --teacher {other} --data {good}"),
            "llama-q4_0.gguf: expected the student's",
        ),
        ("--algo dpo --data task:add".into(), "--data: expected files of rows"),
        ("--algo sft --data task:guess".into(), "task:guess: expected a task with solutions"),
        (format!("--algo sft --data {good}:2"), "--data: expected files of rows"),
        (
            format!("--algo dpo --reference start --data {pairs}"),
            "--reference start: expected --adapter FILE",
        ),
        (
            format!("--algo sft --data {good} --micro-batch-tokens 4"),
            "expected at least the longest row",
        ),
        (
            format!("--algo sft --data {good} --dump-gradients g"),
            "--dump-gradients: expected --steps 1",
        ),
        (format!("--algo kto --data {good} --mini-batch 1"), "--mini-batch: expected at least 2"),
        (
            format!("--algo sft --data {good} --group 4"),
            "--group: expected options that mean something",
        ),
        (
            format!("--algo bupo --objective sft --data {good}"),
            "--objective: expected an algorithm with rewards",
        ),
        (
            format!("--algo sft --data {good} --rollouts {good}"),
            "--rollouts: expected an --algo that learns from rewards",
        ),
    ] {
        let out = dir.path().join("never");
        let mut args = vec!["train", "demo", "--threads", "1", "--out", out.to_str().unwrap()];
        args.extend(words.split_whitespace());
        let output = run(&args);
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains(expected), "{words}: {said}");
        assert!(!out.exists(), "{words}: nothing is written");
    }
}

#[test]
fn a_tasks_solutions_are_rows_to_learn_from() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let words = "--algo sft --data task:words?rows=12 --eval-data task:words?rows=6&stories=new --epochs 2 --prompts-per-step 8 \
                 --lr 1e-3 --rank 2 --threads 1 --json";
    let mut args = vec!["train", "demo", "--out", out.to_str().unwrap()];
    args.extend(words.split_whitespace());
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Two epochs of twelve rows, eight a step.
    assert_eq!(summary["steps"], 3);
    let loss = |name: &str| summary[name].as_f64().unwrap();
    assert!(loss("eval_loss_after") < loss("eval_loss_before"), "{summary}");
}

#[test]
fn the_best_adapter_is_kept_and_a_run_that_gets_worse_stops() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), &sums("sft", 16, 0));
    let held_out = write(&dir.path().join("held-out.jsonl"), &sums("sft", 8, 100));
    let out = dir.path().join("run");
    // Large enough steps to get worse soon.
    let words = "--algo sft --steps 30 --lr 0.3 --prompts-per-step 8 --rank 2 --threads 1 --eval-every 1 --early-stop 2 --json";
    let mut args = vec!["train", "demo", "--data", &data, "--eval-data", &held_out];
    args.extend(["--out", out.to_str().unwrap()]);
    args.extend(words.split_whitespace());
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("2 evaluations without a better one"), "{}", stderr(&output));
    let losses: Vec<f64> =
        records(&out).iter().map(|r| r["eval_loss"].as_f64().unwrap_or(f64::INFINITY)).collect();
    let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
    assert_eq!(losses.len(), best + 3, "{losses:?}");
    let steps = |name: &str| {
        let file = bupo_gguf::gguf::GgufFile::open(&out.join(name)).unwrap();
        file.require::<u64>("bupo.steps").unwrap()
    };
    assert_eq!(
        (steps("adapter-best.gguf"), steps("adapter.gguf")),
        (best as u64 + 1, losses.len() as u64)
    );
    // Nothing is left to do.
    let output = run(&["train", "--resume", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(records(&out).len(), losses.len());
}

#[test]
fn rslora_scales_by_the_root_and_loraplus_moves_b_faster() {
    use bupo_gguf::train::{Algorithm, Silent};
    use bupo_gguf::{Model, TrainConfig, Trainer};
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), &sums("sft", 4, 0));
    let model = Model::open("demo".as_ref()).unwrap();
    let config = TrainConfig {
        algo: Algorithm::Sft,
        data,
        rank: 4,
        alpha: Some(8.0),
        prompts_per_step: 4,
        weight_decay: 0.0,
        threads: Some(1),
        ..TrainConfig::default()
    };
    let after = |config: TrainConfig| {
        let mut trainer = Trainer::new(&model, config).unwrap();
        trainer.step(1, &mut Silent).unwrap();
        let lora = trainer.lora();
        let all: Vec<Vec<f32>> =
            (0..lora.tensors().len()).map(|i| lora.tensors().values(i).to_vec()).collect();
        (lora.alpha(), all)
    };
    let (alpha, plain) = after(config.clone());
    assert_eq!(alpha, 8.0);
    assert_eq!(after(TrainConfig { rslora: true, ..config.clone() }).0, 16.0);
    // B begins at zero, and Adam's first step is the learning rate, whatever the gradient's size.
    let (_, fast) = after(TrainConfig { loraplus_lr_ratio: 4.0, ..config });
    for (i, (plain, fast)) in plain.iter().zip(&fast).enumerate() {
        let factor = if i % 2 == 1 { 4.0 } else { 1.0 };
        let error = relative_error(fast, &plain.iter().map(|x| factor * x).collect::<Vec<_>>());
        assert!(error < 1e-5, "tensor {i}: {error}");
    }
}

/// Through the GPU's backend and kernels (see [`common::device`]), products in F32.
#[test]
fn kernels_distil_as_the_cpu_does() {
    use bupo_gguf::ggml::Device;
    use bupo_gguf::train::{Algorithm, RowOptions, Silent};
    use bupo_gguf::{TrainConfig, Trainer};
    let dir = tempfile::tempdir().unwrap();
    let loss = |device: Device| {
        let golden = Golden::load_on("qwen3-f32", device);
        let data = write(&dir.path().join("rows.jsonl"), &golden_rows(&golden, false));
        let teacher = golden_dir().join("qwen3-q4_k.gguf");
        let config = TrainConfig {
            algo: Algorithm::Distill,
            data,
            prompts_per_step: 2,
            adapter: Some(golden.lora_path()),
            rows: RowOptions { teacher: Some(teacher), ..RowOptions::default() },
            threads: Some(1),
            ..TrainConfig::default()
        };
        let (record, _) = Trainer::new(&golden.model, config)?.step(1, &mut Silent)?;
        Ok::<_, bupo_gguf::Error>((record.loss.unwrap(), record.gradient_norm.unwrap()))
    };
    let (want, got) = (loss(Device::Cpu).unwrap(), loss(common::device(true)).unwrap());
    let close = |a: f32, b: f32| (a - b).abs() < 1e-4 * b.abs();
    assert!(close(got.0, want.0) && close(got.1, want.1), "{got:?}, on the CPU {want:?}");
}

#[test]
fn what_a_teacher_looked_at_is_kept_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), &sums("on-policy", 6, 0));
    for (data, problem) in [(data.as_str(), "prompt "), ("task:add", "task:add")] {
        let out = dir.path().join(problem.replace([':', ' '], "-"));
        let mut args = vec!["train", "demo", "--data", data, "--out", out.to_str().unwrap()];
        args.extend(options("on-policy"));
        args.extend("--steps 2 --prompts-per-step 3 --rank 2 --threads 1 --tensorboard".split(' '));
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let sampled = completions(&out);
        assert_eq!(sampled.len(), 2 * 3 * 2, "steps, prompts, completions of each");
        for (i, completion) in sampled.iter().enumerate() {
            assert_eq!(completion["step"], 1 + i / 6, "{completion}");
            let name = completion["problem"].as_str().unwrap();
            assert!(name.starts_with(problem), "{completion}");
            assert!(completion["prompt"].as_str().unwrap().contains('+'), "{completion}");
            let tokens = completion["tokens"].as_u64().unwrap();
            assert!((1..=8).contains(&tokens), "{completion}");
            let at_the_limit = completion["truncated"] == true;
            assert!(!at_the_limit || tokens == 8, "{completion}");
            let fields = completion.as_object().unwrap();
            assert!(["reward", "reason", "answer"].iter().all(|key| !fields.contains_key(*key)));
        }
        // Names of prompts tell them apart.
        let names = |step: usize| sampled[6 * step..6 * step + 6].iter().map(|c| &c["problem"]);
        let mut all: Vec<_> = names(0).map(|name| name.as_str().unwrap()).collect();
        all.dedup();
        assert_eq!(all.len(), 3, "{all:?}");
        let record = &records(&out)[0];
        let mean = sampled[..6].iter().map(|c| c["tokens"].as_f64().unwrap()).sum::<f64>() / 6.0;
        let said = record["response_tokens"].as_f64().unwrap();
        assert!((said - mean).abs() < 1e-6 && record["truncated"].is_f64(), "{record}");
        assert!(record.get("reward").is_none(), "{record}");
        let report = run(&["report", out.to_str().unwrap()]);
        assert!(report.status.success(), "{}", stderr(&report));
        let html = std::fs::read_to_string(out.join("report.html")).unwrap();
        for completion in &sampled {
            let mut lines = completion["prompt"].as_str().unwrap().lines();
            let asked = lines.find(|line| line.contains('+')).unwrap();
            assert!(html.contains("Completions") && html.contains(asked), "{asked}");
        }
        assert!(html.contains("Response length"), "a chart of what was sampled");
    }
}

#[test]
fn noise_on_embeddings_is_of_training_alone_and_goes_by_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(&dir.path().join("rows.jsonl"), &sums("sft", 8, 0));
    let held_out = write(&dir.path().join("held-out.jsonl"), &sums("sft", 4, 100));
    let mut n = 0;
    let mut train = |more: &str| {
        n += 1;
        let out = dir.path().join(n.to_string());
        let fixed = "--algo sft --steps 1 --prompts-per-step 8 --rank 2 --threads 1 --json";
        let mut args = vec!["train", "demo", "--data", &data, "--eval-data", &held_out];
        args.extend(fixed.split(' ').chain(more.split_whitespace()));
        args.extend(["--out", out.to_str().unwrap()]);
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |v: &Value| v.as_f64().unwrap();
        (number(&records(&out)[0]["loss"]), number(&summary["eval_loss_before"]))
    };
    let without = train("");
    let with = train("--neftune 20");
    let recomputed = train("--neftune 20 --recompute");
    assert_eq!(with.1, without.1, "what is scored has none");
    let moved = (with.0 - without.0).abs() / without.0;
    assert!(moved > 1e-3 && moved < 1.0, "{with:?}, without {without:?}");
    assert_eq!(with, recomputed, "the backward has the forward's noise");
}

//! The program as a user runs it.

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::process::Command;

use program::{fail, json_lines, succeed};
use serde_json::Value;

const QUICK: [&str; 12] = [
    "--steps",
    "2",
    "--prompts-per-step",
    "4",
    "--group",
    "4",
    "--eval-problems",
    "8",
    "--rank",
    "4",
    "--internal-steps",
    "1",
];

#[test]
fn train_demo_writes_a_run_and_its_adapter_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let out_text = out.to_str().unwrap();
    let stdout = succeed(&[&["train", "demo", "--out", out_text, "--json"], &QUICK[..]].concat());
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary["steps"], 2);
    let metrics = json_lines(&out.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 2);
    assert_eq!((&metrics[0]["phase"], &metrics[1]["phase"]), (&"internal".into(), &"final".into()));
    assert_eq!(json_lines(&out.join("completions.jsonl")).len(), 2 * 4 * 4);
    let config: toml::Table =
        std::fs::read_to_string(out.join("config.toml")).unwrap().parse().unwrap();
    assert_eq!(config["train"]["internal-layer"].as_integer(), Some(6));
    assert_eq!(config["train"]["clip-c"].as_float(), Some(10.0));

    let adapter = out.join("adapter.gguf");
    let adapter = adapter.to_str().unwrap();
    let generate = |extra: &[&str]| {
        succeed(
            &[&["generate", "demo", "-p", "17+25=", "--json", "--seed", "5", "-n", "3"], extra]
                .concat(),
        )
    };
    assert_ne!(generate(&[]), generate(&["--adapter", adapter]), "the adapter has a say");
    assert_eq!(generate(&[]), generate(&[]), "same seed, same completions");

    // Training goes on from an adapter; rank and targets are its own.
    let more = dir.path().join("more");
    let more_text = more.to_str().unwrap();
    succeed(&[&["train", "demo", "--out", more_text, "--adapter", adapter], &QUICK[..]].concat());
    let config: toml::Table =
        std::fs::read_to_string(more.join("config.toml")).unwrap().parse().unwrap();
    assert_eq!(config["train"]["rank"].as_integer(), Some(4));

    // Nothing is written over.
    fail(
        &[&["train", "demo", "--out", out_text], &QUICK[..]].concat(),
        &["--out", "empty or new folder", "choose another"],
    );
}

#[test]
fn score_and_dump_gradients_give_pytorchs_figures() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["qwen3-f32", "qwen3-q8_0", "llama-q4_0"] {
        let golden = common::Golden::load(case);
        let tolerance = if case.ends_with("f32") { 1e-4 } else { 1e-3 };
        for phase in ["internal", "final"] {
            let reference = &golden.json[phase];
            let mut at = 0;
            let rows: String = golden
                .rollouts()
                .iter()
                .map(|row| {
                    let completions: Vec<Value> = row
                        .completions
                        .iter()
                        .zip(&row.rewards)
                        .map(|(tokens, reward)| {
                            let old = &reference["old_logprobs"][at];
                            at += 1;
                            serde_json::json!({"tokens": tokens, "reward": reward, "old_logprobs": old})
                        })
                        .collect();
                    let row = serde_json::json!({"prompt_tokens": row.prompt, "completions": completions});
                    format!("{row}\n")
                })
                .collect();
            let data = dir.path().join("rows.jsonl");
            std::fs::write(&data, rows).unwrap();
            let model = common::golden_dir().join(format!("{case}.gguf"));
            let (model, data) = (model.to_str().unwrap(), data.to_str().unwrap());
            let adapter = golden.lora_path();
            let adapter = adapter.to_str().unwrap();
            let layer = reference["layer"].to_string();

            let stdout =
                succeed(&["score", model, "--data", data, "--adapter", adapter, "--layer", &layer]);
            let ours: Vec<f32> = stdout
                .lines()
                .flat_map(|line| {
                    let line: Value = serde_json::from_str(line).unwrap();
                    common::floats(&line["logprobs"])
                })
                .collect();
            let error =
                common::relative_error(&ours, &common::nested_floats(&reference["logprobs"]));
            assert!(error < tolerance, "{case} {phase} score: {error}");

            let dump = dir.path().join("g.safetensors");
            let algo = if phase == "internal" { "bupo" } else { "grpo" };
            let stdout = succeed(&[
                "train",
                model,
                "--rollouts",
                data,
                "--steps",
                "1",
                "--adapter",
                adapter,
                "--algo",
                algo,
                "--internal-layer",
                &layer,
                "--dump-gradients",
                dump.to_str().unwrap(),
            ]);
            let replay: Value = serde_json::from_str(&stdout).unwrap();
            let (loss, expected) =
                (replay["loss"].as_f64().unwrap(), reference["loss"].as_f64().unwrap());
            assert!((loss - expected).abs() < tolerance as f64 * expected.abs(), "{case} {phase}");
            let bytes = std::fs::read(&dump).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (name, tensor) in file.tensors() {
                let ours: Vec<f32> = tensor
                    .data()
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|b| f32::from_le_bytes(*b))
                    .collect();
                let expected = golden.gradient(&format!("{phase}.{name}"));
                if expected.iter().all(|&g| g == 0.0) {
                    assert!(ours.iter().all(|&g| g == 0.0), "{case} {phase} {name}");
                } else {
                    let error = common::relative_error(&ours, &expected);
                    assert!(error < tolerance, "{case} {phase} {name}: {error}");
                }
            }
        }
    }
}

#[test]
fn bad_input_gets_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    };
    let golden = |name: &str| common::golden_dir().join(name).to_str().unwrap().to_string();
    let qwen3 = golden("qwen3-f32.gguf");
    let whole = std::fs::read(&qwen3).unwrap();

    fail(&["train", "/nonexistent/m.gguf"], &["/nonexistent/m.gguf", "No such file"]);
    fail(&["train", &write("text.gguf", b"hello, world")], &["text.gguf", "GGUF"]);
    fail(&["train", &write("empty.gguf", b"")], &["empty.gguf"]);
    fail(&["train", &write("cut.gguf", &whole[..whole.len() / 2])], &["cut.gguf"]);
    let at = whole.windows(5).position(|w| w == b"qwen3").unwrap();
    let mut other = whole.clone();
    other[at..at + 5].copy_from_slice(b"gemma");
    fail(
        &["train", &write("gemma.gguf", &other)],
        &["architecture 'gemma' is not supported", "llama, qwen2, qwen3"],
    );

    fail(&["train", "demo", "--group", "1"], &["--group", "at least 2", "got 1"]);
    fail(&["train", "demo", "--internal-layer", "9"], &["layer from 1 to 8", "got 9"]);
    fail(&["train", "demo", "--internal-layer", "0"], &["layer from 1 to 8", "got 0"]);
    fail(
        &["train", "demo", "--max-response", "600", "--micro-batch-tokens", "9999"],
        &["--max-prompt plus --max-response", "512"],
    );
    fail(&["train", "demo", "--micro-batch-tokens", "50"], &["--micro-batch-tokens", "88"]);
    fail(&["train", "demo", "--rank", "1000"], &["--rank", "got 1000"]);
    fail(&["train", "demo", "--data", "task:nothing"], &["nothing", "task:add"]);
    fail(&["train", "demo", "--reward", "taste"], &["taste", "boxed"]);
    fail(&["train", "demo", "--device", "cuda"], &["--device", "cpu"]);
    fail(&["train", "demo", "--lr", "nan"], &["--lr", "above 0"]);
    fail(&["train", "demo", "--temperature", "0"], &["--temperature", "above 0"]);
    fail(&["train", "demo", "--data", "/nonexistent/d.jsonl"], &["/nonexistent/d.jsonl"]);
    let bad = write("bad.jsonl", b"{\"prompt\": \"1+1=\", \"answer\": \"2\"}\n{\"prompt\": 5}\n");
    fail(&["train", "demo", "--data", &bad], &["bad.jsonl", "2"]);
    fail(&["train", "demo", "--data", &write("none.jsonl", b"\n")], &["none.jsonl"]);
    let other_adapter = golden("llama-f32.lora.gguf");
    fail(
        &["train", "demo", "--adapter", &other_adapter],
        &["llama-f32.lora.gguf", "qwen3", "llama"],
    );
    let sized = golden("qwen3-f32.lora.gguf");
    fail(&["train", "demo", "--adapter", &sized], &["blk.0.attn_q.weight", "128 inputs", "64"]);
    fail(&["generate", "demo", "-p", "x", "--adapter", &qwen3], &["qwen3-f32.gguf"]);
    fail(&["score", "demo", "--data", &bad], &["bad.jsonl"]);
    let high =
        write("high.jsonl", br#"{"prompt_tokens": [1, 99999], "completions": [{"tokens": [5]}]}"#);
    fail(&["score", "demo", "--data", &high], &["99999", "288"]);
    let short = write(
        "short.jsonl",
        br#"{"prompt_tokens": [1], "completions": [{"tokens": [5, 6], "reward": 1, "old_logprobs": [0.1]}]}"#,
    );
    fail(&["train", "demo", "--rollouts", &short], &["short.jsonl"]);
}

#[test]
fn a_number_that_cannot_be_is_refused_by_its_option() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"prompt\": \"1+2=\", \"completion\": \"3\"}\n").unwrap();
    let rows = rows.to_str().unwrap();
    let commands: [&[&str]; 7] = [
        &["train", "demo", "--out", out],
        &["entropy", "demo", "--data", rows, "--out", out],
        &["score", "demo", "--data", rows],
        &["generate", "demo", "-p", "1+2="],
        &["eval", "demo", "--data", "task:add"],
        &["export", "demo", "--out", out],
        &["diff", "demo", "demo", "--data", rows],
    ];
    for command in commands {
        fail(&[command, &["--threads", "0"]].concat(), &["--threads", "at least 1"]);
    }
    fail(&["bench", "train", "demo", "--threads", "0"], &["--threads", "at least 1"]);
    fail(&["generate", "demo", "-p", "1+2=", "-n", "0"], &["--samples", "at least 1", "'0'"]);
    fail(
        &["generate", "demo", "-p", "1+2=", "--max-response", "0"],
        &["--max-response", "at least 1"],
    );
    for option in ["--samples", "--max-tokens", "--every", "--max-response", "--batch-tokens"] {
        let command = ["entropy", "demo", "--data", rows, "--out", out, option, "0"];
        fail(&command, &[option, "at least 1"]);
    }
    let command = ["entropy", "demo", "--data", rows, "--out", out, "--top-k", "300"];
    fail(&command, &["--top-k", "at most 288", "300"]);
    let command = ["entropy", "demo", "--data", "task:add", "--out", out, "--temperature", "nan"];
    fail(&command, &["--temperature", "NaN"]);
    assert!(!Path::new(out).exists(), "nothing is left of a refused command");
    let case = ["bench", "train", "demo", "--case", "train/internal phase", "--reps", "1"];
    fail(
        &[&case[..], &["--sgemm", "64", "--internal-layer", "99"]].concat(),
        &["layer from 1 to 8", "got 99"],
    );
}

#[test]
fn broken_json_is_named_as_what_was_got() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    for (text, got) in [
        ("{\"prompt\": nope}\n", "got text that is no JSON (expected ident at column"),
        ("{\"prompt\": \"1\"", "got JSON that ends early (EOF"),
    ] {
        std::fs::write(&rows, text).unwrap();
        fail(&["score", "demo", "--data", rows.to_str().unwrap()], &["rows.jsonl:1", got]);
    }
}

#[test]
fn report_knows_the_folders_of_other_commands() {
    let dir = tempfile::tempdir().unwrap();
    let (look, marks) = (dir.path().join("look"), dir.path().join("marks"));
    let (look, marks) = (look.to_str().unwrap(), marks.to_str().unwrap());
    succeed(&["entropy", "demo", "--data", "task:add", "--samples", "1", "--out", look]);
    fail(&["report", look], &["look", "a run folder of `train`", "`entropy`", "report.html"]);
    succeed(&["eval", "demo", "--data", "task:add", "--problems", "2", "--out", marks]);
    fail(&["report", marks], &["marks", "a run folder of `train`", "`eval`"]);
}

#[test]
fn each_token_is_printed_once() {
    let generate = |n: &str, extra: &[&str]| {
        let command = ["generate", "demo", "-p", "17+25=", "--max-response", n];
        succeed(&[&command[..], extra].concat())
    };
    for n in ["1", "3"] {
        let report: Value = serde_json::from_str(&generate(n, &["--json"])).unwrap();
        let text = report["completions"][0]["text"].as_str().unwrap();
        assert_eq!(generate(n, &[]).trim_end_matches('\n'), text.trim_end_matches('\n'));
    }
}

#[test]
fn runs_without_a_name_are_numbered() {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["runs/demo-bupo-1", "runs/demo-bupo-1-2"] {
        let done = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
            .current_dir(dir.path())
            .args(["train", "demo"])
            .args(QUICK)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(dir.path().join(folder).join("adapter.gguf").is_file(), "{folder}");
    }
}

/// Help as it stands in a window of 80 columns.
fn help(command: &str) -> String {
    let help = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args([command, "--help"])
        .env("COLUMNS", "80")
        .output()
        .unwrap();
    assert!(help.status.success(), "{command}");
    String::from_utf8(help.stdout).unwrap()
}

#[test]
fn help_is_readable_in_80_columns() {
    let commands = [
        "train",
        "entropy",
        "report",
        "score",
        "generate",
        "verify",
        "synth",
        "bench",
        "eval",
        "export",
        "import-peft",
        "diff",
        "inspect",
        "completions",
        "man",
    ];
    for command in commands {
        let text = help(command);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{command}: too wide: {line}");
        }
        // A line ends where the next word would not fit: none is broken in mid-sentence.
        let (about, rest) = text.split_once("Usage:").unwrap();
        for (line, next) in about.lines().zip(about.lines().skip(1)) {
            let word = next.split(' ').next().unwrap();
            let fits = line.chars().count() + 1 + word.chars().count() <= 80;
            assert!(line.is_empty() || word.is_empty() || !fits, "{command}: broken at: {line}");
        }
        let examples = rest.split_once("\nExample").map(|(_, examples)| examples);
        let examples = examples.unwrap_or_else(|| panic!("{command} has no example"));
        assert!(examples.contains(&format!("bupo-gguf {command}")), "{command}: {examples}");
        assert!(!examples.contains(" --help"), "{command}: examples stand at the end");
        for line in examples.lines().skip(1) {
            assert!(line.is_empty() || line.starts_with("  "), "{command}: broken at: {line}");
        }
    }
    let bench = help("bench");
    for part in ["train", "rollout", "entropy", "ops"] {
        let row = format!("\n  {part}  ");
        assert!(bench.contains(&row), "each part has a line of its own: {part}");
    }
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let man = dir.path().join("man1");
    succeed(&["man", man.to_str().unwrap()]);
    for command in ["train", "entropy", "export", "import-peft", "completions"] {
        let page = std::fs::read_to_string(man.join(format!("bupo-gguf-{command}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains("OPTIONS"), "{command}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = succeed(&["completions", shell]);
        for word in ["import-peft", "internal-layer", "keep-delta"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    // The script is one that a shell takes.
    let script = dir.path().join("bupo-gguf.bash");
    std::fs::write(&script, succeed(&["completions", "bash"])).unwrap();
    let line = "source \"$0\"; COMP_WORDS=(bupo-gguf entr); COMP_CWORD=1; _bupo__gguf bupo-gguf entr bupo-gguf; echo \"${COMPREPLY[*]}\"";
    let out = Command::new("bash").args(["-c", line, script.to_str().unwrap()]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "entropy", "{out:?}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_leaves_a_loadable_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args([
            "train",
            "demo",
            "--steps",
            "100000",
            "--eval-problems",
            "8",
            "--prompts-per-step",
            "4",
        ])
        .args(["--out", out.to_str().unwrap()])
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = || std::fs::read_to_string(out.join("completions.jsonl")).map_or(0, |t| t.len());
    let start = std::time::Instant::now();
    while lines() == 0 {
        assert!(start.elapsed().as_secs() < 120, "no step within two minutes");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let adapter = out.join("adapter.gguf");
    succeed(&["generate", "demo", "-p", "1+1=", "--adapter", adapter.to_str().unwrap()]);
    for line in std::fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines() {
        serde_json::from_str::<Value>(line).expect("whole lines only");
    }
}

#[test]
fn other_peoples_models_run_through() {
    let Some(shared) = common::shared() else {
        eprintln!("no shared models here; .ci/run insists on them with BUPO_REQUIRE_SHARED");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("stories.jsonl");
    let prompts = ["Once upon a time", "The little dog", "Lily and Tom", "One day"];
    let rows: String = prompts
        .iter()
        .map(|p| {
            format!(
                "{}\n",
                serde_json::json!({"prompt": p, "answer": "happy", "completion": " was happy"})
            )
        })
        .collect();
    std::fs::write(&data, rows).unwrap();
    let data = data.to_str().unwrap();
    for (i, name) in
        ["stories260K-f32", "stories260K-Q8_0", "ts656k-llama-Q4_0", "ts656k-qwen2-Q8_0"]
            .iter()
            .enumerate()
    {
        let model = shared.join("models").join(format!("{name}.gguf"));
        let model = model.to_str().unwrap();
        let text = succeed(&["generate", model, "-p", prompts[0], "--max-response", "20", "--raw"]);
        assert!(!text.trim().is_empty(), "{name}");
        assert_eq!(succeed(&["score", model, "--data", data]).lines().count(), 4, "{name}");
        assert_eq!(succeed(&["score", model, "--data", data, "--layer", "1"]).lines().count(), 4);
        let out = dir.path().join(format!("run{i}"));
        succeed(&[
            "train",
            model,
            "--data",
            data,
            "--reward",
            "exact",
            "--steps",
            "2",
            "--internal-steps",
            "1",
            "--internal-layer",
            "1",
            "--prompts-per-step",
            "2",
            "--group",
            "3",
            "--rank",
            "2",
            "--max-response",
            "12",
            "--out",
            out.to_str().unwrap(),
        ]);
        assert!(out.join("adapter.gguf").is_file(), "{name}");
    }
    // No byte tokens: llama.cpp would throw on a character it cannot spell.
    let model = shared.join("models/ts656k-llama-Q4_0.gguf");
    fail(
        &["generate", model.to_str().unwrap(), "-p", "snow\u{2603}man", "--raw"],
        &["U+2603", "vocabulary"],
    );
}

/// The settings that a dry run prints, and what it says beside them.
fn dry(args: &[&str]) -> (toml::Table, String) {
    let out = program::run(&[&["train"], args, &["--dry-run"]].concat());
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args:?}: {said}");
    let file: toml::Table = String::from_utf8(out.stdout).unwrap().parse().unwrap();
    (file["train"].as_table().unwrap().clone(), said)
}

#[test]
fn what_is_left_out_is_settled_from_the_data_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("sums.jsonl");
    let row = |prompt: String| format!("{{\"prompt\": \"{prompt}\", \"answer\": \"2\"}}\n");
    let rows = row("1+1=".into()).repeat(200) + &row("1+".repeat(60) + "1=");
    std::fs::write(&data, rows).unwrap();
    let data = program::text(&data);
    let (settings, said) = dry(&["demo", "--data", data]);
    let number = |settings: &toml::Table, name: &str| settings[name].as_integer().unwrap();
    let cut = number(&settings, "max-prompt");
    assert!((8..=48).contains(&cut), "{cut}");
    let warning = format!("warning: 1 of 201 prompts are longer than --max-prompt {cut}");
    assert!(said.contains(&warning) && said.contains("lose their beginning"), "{said}");
    assert!(said.contains("99 % of 201 prompts are no longer"), "{said}");
    let (_, said) = dry(&["demo", "--data", data, "--drop-long-prompts"]);
    assert!(said.contains("are left out"), "{said}");

    // A file of settings is one that a run writes; options beside it stand.
    let file = dir.path().join("again.toml");
    let mut written = toml::Table::new();
    written.insert("model".into(), "demo".into());
    written.insert("train".into(), settings.clone().into());
    std::fs::write(&file, written.to_string()).unwrap();
    let (mut again, said) = dry(&["--config", program::text(&file), "--lr", "0.5"]);
    assert!(!said.contains("prompts are no longer"), "nothing is left open: {said}");
    assert_eq!(again.insert("lr".into(), settings["lr"].clone()), Some(0.5.into()));
    assert_eq!(again, settings);
    std::fs::write(&file, "steps = 3\nnonsense = 1\n").unwrap();
    fail(&["train", "demo", "--config", program::text(&file)], &["again.toml", "nonsense"]);

    let (preset, said) = dry(&["demo", "--preset", "4b", "--max-response", "24"]);
    assert_eq!((number(&preset, "prompts-per-step"), preset["lr"].as_float()), (16, Some(1e-5)));
    assert!(said.contains("max-response: 24 as you ask, the preset has 2048"), "{said}");
}

#[test]
fn a_run_warns_of_cut_answers_and_of_steps_without_signal() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let words = "train demo --algo grpo --steps 1 --prompts-per-step 2 --group 2 --eval-problems 2 \
                 --max-response 3 --threads 1 --out";
    let mut words: Vec<&str> = words.split_whitespace().collect();
    words.push(program::text(&out));
    let said = |words: &[&str]| String::from_utf8(program::run(words).stderr).unwrap();
    let all = said(&words);
    for expected in [
        "warning: 100 % of the answers were cut off at --max-response 3",
        "warning: reward 0 in all groups for this step",
        "signal: share of prompts",
        "trend",
    ] {
        assert!(all.contains(expected), "{expected} is not in {all}");
    }
    assert!(!all.contains('\u{1b}'), "colour where no terminal is: {all:?}");
    let other = dir.path().join("quiet");
    let last = words.len() - 1;
    words[last] = program::text(&other);
    words.push("--quiet");
    let quiet = said(&words);
    assert!(quiet.lines().all(|line| line.starts_with("warning: ")), "{quiet}");
}

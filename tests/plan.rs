//! What `inspect` says of a model, and how far the planned memory is from the measured peak.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Plans a run, makes it, and compares; both in processes of their own.
#[cfg(target_os = "linux")]
fn planned_against_measured(model: &str, options: &str) -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    // Prompts and completions as long as the plan has to assume.
    let data = dir.path().join("data.jsonl");
    let row =
        serde_json::json!({"prompt": "count the words of this line ".repeat(40), "answer": "7"});
    std::fs::write(&data, format!("{row}\n").repeat(4)).unwrap();
    let out = dir.path().join("run");
    let mut words: Vec<&str> = options.split_whitespace().collect();
    words.extend(["--data", data.to_str().unwrap()]);
    let plan = json(&[&["inspect", model, "--json", "--plan", "train"], &words[..]].concat());
    let extra = ["--out", out.to_str().unwrap(), "--json"];
    let summary = json(&[&["train", model], &words[..], &extra].concat());
    let number = |v: &Value| v.as_f64().unwrap();
    (number(&plan["plan"]["total_bytes"]), number(&summary["peak_bytes"]))
}

/// Settings that move the peak from one part to another. Rewards are equal for random weights: the KL penalty
/// makes every token be computed.
#[cfg(target_os = "linux")]
const SETTINGS: [&str; 7] = [
    "--algo grpo --prompts-per-step 1 --mini-batch 1 --group 2 --max-prompt 128 --max-response 8 --micro-batch-tokens 256 --kv-mib 64 --rank 8",
    "--algo grpo --prompts-per-step 1 --mini-batch 1 --group 2 --max-prompt 128 --max-response 8 --micro-batch-tokens 256 --kv-mib 64 --rank 8 --recompute",
    "--algo grpo --prompts-per-step 2 --mini-batch 2 --group 4 --max-prompt 128 --max-response 32 --micro-batch-tokens 512 --kv-mib 32 --rank 32",
    "--algo grpo --prompts-per-step 4 --mini-batch 4 --group 4 --max-prompt 192 --max-response 64 --micro-batch-tokens 2048 --kv-mib 64 --rank 16",
    "--algo bupo --prompts-per-step 2 --mini-batch 1 --group 4 --max-prompt 192 --max-response 16 --micro-batch-tokens 512 --kv-mib 64 --rank 4 --internal-steps 1",
    "--algo ppo --prompts-per-step 2 --mini-batch 2 --group 2 --max-prompt 128 --max-response 16 --micro-batch-tokens 320 --kv-mib 64 --rank 16 --recompute",
    "--algo bupo --prompts-per-step 1 --mini-batch 1 --group 2 --max-prompt 128 --max-response 256 --micro-batch-tokens 512 --kv-mib 32 --rank 4 --internal-layer auto --internal-steps 1 --entropy-every 1 --recompute",
];

/// The same of a mixture, whose experts are adapted in some.
#[cfg(target_os = "linux")]
const OF_MIXTURES: [&str; 3] = [
    "--algo grpo --prompts-per-step 2 --mini-batch 2 --group 4 --max-prompt 128 --max-response 8 --micro-batch-tokens 256 --kv-mib 32 --rank 8 --targets q,k,v,o,experts",
    "--algo grpo --prompts-per-step 2 --mini-batch 2 --group 4 --max-prompt 128 --max-response 32 --micro-batch-tokens 512 --kv-mib 32 --rank 2 --targets experts --recompute",
    "--algo ppo --prompts-per-step 2 --mini-batch 2 --group 2 --max-prompt 128 --max-response 16 --micro-batch-tokens 320 --kv-mib 64 --rank 16 --recompute",
];

/// Plans and makes a run of each of these settings on a shape of `synth`.
#[cfg(target_os = "linux")]
fn plans_hold(shape: &str, settings: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let path = path.to_str().unwrap();
    let words: Vec<&str> = shape.split_whitespace().collect();
    json(&[&["synth"], &words[..], &["--out", path, "--json"]].concat());
    for settings in settings {
        let all = format!("--steps 1 --threads 1 --kl-coef 0.01 --eval-problems 1 {settings}");
        let (planned, measured) = planned_against_measured(path, &all);
        let off = planned / measured - 1.0;
        let mib = |bytes: f64| bytes / (1 << 20) as f64;
        let row = format!(
            "{shape} | {settings} | {:.0} MiB | {:.0} MiB | {:+.1} %",
            mib(planned),
            mib(measured),
            100.0 * off
        );
        println!("{row}");
        assert!(off.abs() <= 0.15, "{row}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn planned_memory_is_the_measured_peak_within_15_percent() {
    plans_hold("tiny", &SETTINGS);
}

#[test]
#[cfg(target_os = "linux")]
fn planned_memory_at_the_width_of_qwen3() {
    plans_hold("qwen3-0.6b --layers 4 --vocab 20000", &SETTINGS);
}

#[test]
#[cfg(target_os = "linux")]
fn planned_memory_at_the_width_of_qwen2() {
    plans_hold("qwen2.5-0.5b --layers 3 --vocab 30000", &SETTINGS);
}

#[test]
#[cfg(target_os = "linux")]
fn planned_memory_at_the_width_of_llama() {
    plans_hold("llama-3.2-1b --layers 2 --vocab 16000", &SETTINGS);
}

#[test]
#[cfg(target_os = "linux")]
fn planned_memory_of_a_mixture() {
    plans_hold("qwen3-30b-a3b --layers 1 --vocab 4000", &OF_MIXTURES);
}

/// Of many layers looked at in small micro batches hidden states are more than an update has had.
#[test]
#[cfg(target_os = "linux")]
fn planned_memory_of_looks_is_what_they_add() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let path = path.to_str().unwrap();
    json(&["synth", "qwen3-0.6b", "--vocab", "4000", "--out", path, "--json"]);
    let options = "--algo grpo --steps 1 --threads 1 --kl-coef 0.01 --eval-problems 1 --prompts-per-step 1 --mini-batch 1 \
                   --group 2 --max-prompt 64 --max-response 64 --micro-batch-tokens 128 --kv-mib 32 --rank 4 --recompute";
    let [without, with] = ["0", "1"]
        .map(|every| planned_against_measured(path, &format!("{options} --entropy-every {every}")));
    let (planned, measured) = (with.0 - without.0, with.1 - without.1);
    println!("{planned} and {measured} bytes");
    assert!(planned > 16e6 && (planned / measured - 1.0).abs() < 0.3, "{planned}, {measured}");
}

#[test]
fn inspect_describes_and_refuses() {
    let all = json(&["inspect", "demo", "--json", "--plan", "train", "--rank", "8"]);
    let model = &all["model"];
    assert_eq!((&model["architecture"], &model["layers"]), (&"qwen3".into(), &8.into()));
    assert_eq!(model["refused"], Value::Null);
    assert_eq!(model["taps"].as_array().unwrap().len(), 6);
    let trainable: Vec<_> = model["trainable"].as_array().unwrap().iter().collect();
    assert_eq!(trainable.len(), 7);
    assert!(trainable.iter().all(|t| t["layers"] == 8));
    let sum: u64 =
        all["plan"]["parts"].as_array().unwrap().iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
    assert_eq!(all["plan"]["total_bytes"], sum);
    let text = String::from_utf8(run(&["inspect", "demo"]).stdout).unwrap();
    assert!(text.contains("ffn_down.weight") && text.ends_with("opens         yes\n"), "{text}");

    // What llama.cpp would abort on is said, not met.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/qwen3-f32.gguf");
    let mut bytes = std::fs::read(golden).unwrap();
    let at = bytes.windows(17).position(|w| w == b"qwen3.block_count").unwrap() + 17 + 4;
    bytes[at..at + 4].copy_from_slice(&100_000u32.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.gguf");
    std::fs::write(&bad, bytes).unwrap();
    let out = run(&["inspect", bad.to_str().unwrap(), "--json"]);
    assert_eq!(out.status.code(), Some(1), "a refused model is a failure, described or not");
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    let refused = said["model"]["refused"].as_str().unwrap();
    assert!(refused.contains("block_count") && refused.contains("1 to 512"), "{refused}");
    let out = run(&["train", bad.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn what_cannot_fit_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let refused = run(&["train", "demo", "--memory", "20MiB", "--out", out.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    let error = said.lines().find(|l| l.starts_with("error: ")).unwrap();
    for words in ["memory: ", "for this run", "20 MiB available", "--kv-mib", "kv cache takes"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(!out.exists(), "nothing was written");
}

/// The plan of a run of the demo model with these options.
fn planned(options: &str) -> Value {
    let words: Vec<&str> = options.split_whitespace().collect();
    json(&[&["inspect", "demo", "--json", "--plan", "train"], &words[..]].concat())
}

/// Bytes of a part of the host's memory.
fn part(plan: &Value, name: &str) -> Option<u64> {
    let parts = plan["plan"]["parts"].as_array().unwrap();
    parts.iter().find(|part| part["name"] == name).map(|part| part["bytes"].as_u64().unwrap())
}

#[test]
fn one_plan_says_what_lies_on_a_card_and_what_beside_it() {
    let options = "--rank 4 --max-prompt 64 --max-response 64";
    let (host, card) = (planned(options), planned(&format!("{options} --vram 2GiB")));
    assert_eq!(host["gpu_plan"], Value::Null);
    let on_card = |name: &str| card["gpu_plan"][name].as_u64().unwrap();
    // The same sizes, wherever they are.
    assert_eq!(part(&host, "adapter"), Some(on_card("adapter_bytes")));
    for name in ["activations", "adapter", "logprob tiles", "kept for vjp"] {
        assert!(part(&host, name).is_some() && part(&card, name).is_none(), "{name}");
    }
    assert_eq!(part(&card, "kv cache"), Some(0), "all of it lies there");
    // The embedding stays with the host.
    let all = host["model"]["file_bytes"].as_u64().unwrap();
    let (stays, goes) = (part(&card, "weights").unwrap(), on_card("weights_bytes"));
    assert!(0 < stays && stays < goes && stays + goes > all - all / 8, "{stays}, {goes} of {all}");
    let layers = planned(&format!("{options} --vram 2GiB --gpu-layers 4"));
    assert!(part(&layers, "weights").unwrap() > stays && part(&layers, "kv cache").unwrap() > 0);
    for plan in [&host, &card, &layers] {
        let sum: u64 = plan["plan"]["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["bytes"].as_u64().unwrap())
            .sum();
        assert_eq!(plan["plan"]["total_bytes"], sum);
    }
    let critic = "--algo ppo --prompts-per-step 4";
    let critic = [critic.to_string(), format!("{critic} --vram 2GiB")].map(|words| planned(&words));
    assert!(
        critic.iter().all(|plan| part(plan, "critic") > Some(0)),
        "values are the host's affair"
    );
}

#[test]
fn a_judging_model_and_a_teacher_are_planned_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let path = path.to_str().unwrap();
    json(&["synth", "tiny", "--vocab", "3000", "--out", path, "--json"]);
    let file = std::fs::metadata(path).unwrap().len();
    let judge = format!("--reward judge:{path} --judge-batch 4");
    let (host, card) = (planned(&judge), planned(&format!("{judge} --vram 2GiB")));
    // It computes on the CPU in either case: its weights, keys and values of four questions, decoding.
    let bytes = part(&host, "judge").unwrap();
    assert!(bytes > file + (1 << 20) && bytes < file + (400 << 20), "{bytes}, {file} of weights");
    assert_eq!(part(&card, "judge"), Some(bytes));
    let fewer = planned(&format!("--reward judge:{path} --judge-batch 1"));
    assert!(part(&fewer, "judge").unwrap() < bytes);
    let out = dir.path().join("run");
    let words = ["train", "demo", "--reward", &format!("judge:{path}"), "--memory", "40MiB"];
    let refused = run(&[&words[..], &["--out", out.to_str().unwrap()]].concat());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("use a smaller judge (judge takes "), "{said}");

    let teacher = "--algo distill --teacher demo --max-prompt 64 --max-response 32 --vram 1GiB";
    let own = planned(teacher);
    let alone = planned("--algo sft --max-length 96 --vram 1GiB");
    let update = |plan: &Value| plan["gpu_plan"]["update_bytes"].as_u64().unwrap() as f64;
    let tokens = |plan: &Value| plan["gpu_plan"]["micro_batch_tokens"].as_u64().unwrap() as f64;
    // Its own weights in another state are no weights more, but its forward is one more.
    assert_eq!(own["gpu_plan"]["teacher_bytes"], 0);
    assert!(update(&own) / tokens(&own) > 1.2 * update(&alone) / tokens(&alone), "{own}");
    assert!(part(&own, "teacher").unwrap() > 0, "hidden states go through the host");
    let copy = dir.path().join("demo.gguf");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo.gguf"), &copy).unwrap();
    let another =
        planned(&teacher.replace("--teacher demo", &format!("--teacher {}", copy.display())));
    assert_eq!(another["gpu_plan"]["teacher_bytes"], another["gpu_plan"]["weights_bytes"]);
}

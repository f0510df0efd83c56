//! One function per kind of input: it may refuse the bytes, it may not panic, hang or take memory beyond
//! reason. The fuzzers (`fuzz/`) and the deterministic mutation test share them.
#![allow(dead_code)]

#[path = "../common/sums.rs"]
mod sums;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use bupo_gguf::data::{
    ChatTemplate, Columns, HfTokenizer, Message, Problem, Prompt, Tokenize, read_problems,
    read_rollouts,
};
use bupo_gguf::env::{self, CallFormat, protocol};
use bupo_gguf::export::{PeftBase, read_peft};
use bupo_gguf::gguf::{AdapterFile, GgufFile, split_paths};
use bupo_gguf::model::Description;
use bupo_gguf::reward::{Reward, last_boxed};
use bupo_gguf::train::{Plan, Resume, Silent};
use bupo_gguf::{Model, TrainConfig, Trainer};
use sums::right_the_sums;

/// A file of these bytes, for readers that want a path.
fn file(bytes: &[u8], suffix: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// GGUF: header, metadata, tensor table, and every tensor's bytes.
pub fn gguf(bytes: &[u8]) -> bool {
    let file_on_disk = file(bytes, ".gguf");
    let described = Description::read(file_on_disk.path());
    let Ok(read) = GgufFile::from_bytes(bytes.to_vec(), "fuzz") else { return false };
    for tensor in read.tensors() {
        assert_eq!(read.bytes(tensor).len() as u64, tensor.n_bytes());
    }
    for (_, value) in read.metadata() {
        let _ = value.describe();
    }
    described.is_ok()
}

/// A LoRA adapter in GGUF form.
pub fn adapter(bytes: &[u8]) -> bool {
    let Ok(read) = GgufFile::from_bytes(bytes.to_vec(), "fuzz") else { return false };
    AdapterFile::from_gguf(&read).is_ok()
}

/// A PEFT folder: `adapter_config.json`, a NUL, `adapter_model.safetensors`.
pub fn peft(bytes: &[u8]) -> bool {
    static BASE: OnceLock<PeftBase> = OnceLock::new();
    let base = BASE.get_or_init(|| {
        let model: &[u8] = include_bytes!("../fixtures/golden/llama-f32.gguf");
        PeftBase::from_gguf(&GgufFile::from_bytes(model, "golden").unwrap()).unwrap()
    });
    let at = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("adapter_config.json"), &bytes[..at]).unwrap();
    let weights = bytes.get(at + 1..).unwrap_or_default();
    fs::write(folder.path().join("adapter_model.safetensors"), weights).unwrap();
    read_peft(folder.path(), base).is_ok()
}

/// Problems and rollout rows as JSON lines.
pub fn problems(bytes: &[u8]) -> bool {
    let file = file(bytes, ".jsonl");
    read_rollouts(file.path()).is_ok() | read_problems(file.path(), &Columns::default()).is_ok()
}

/// Problems as CSV.
pub fn csv(bytes: &[u8]) -> bool {
    read_problems(file(bytes, ".csv").path(), &Columns::default()).is_ok()
}

/// Problems and rollout rows as Parquet.
pub fn parquet(bytes: &[u8]) -> bool {
    let file = file(bytes, ".parquet");
    read_problems(file.path(), &Columns::default()).is_ok() | read_rollouts(file.path()).is_ok()
}

/// A chat template, compiled and rendered.
pub fn template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else { return false };
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return false };
    let user = Message { role: "user".into(), content: "1+1".into() };
    template.render(&[user], true).is_ok()
}

/// A tokenizer.json, and what it makes of some texts.
pub fn tokenizer(bytes: &[u8]) -> bool {
    let Ok(read) = HfTokenizer::from_bytes(bytes, "fuzz") else { return false };
    for text in ["", "ab abc  1+1=2\n", "é \u{1f600} <s> </s>"] {
        for special in [false, true] {
            let Ok(ids) = read.encode(text, special, special) else { continue };
            for id in ids {
                assert!((id as usize) < read.n_vocab(), "token {id} of {}", read.n_vocab());
                let _ = read.piece(id);
            }
        }
    }
    true
}

/// A completion whose answer is looked for.
pub fn answers(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let found = last_boxed(&text);
    if let Some(found) = found {
        assert!(text.contains(found));
    }
    found.is_some()
}

/// The whole verifier: a right answer, a NUL, a completion; every rule reads, parses and compares.
pub fn verifier(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let (gold, completion) = text.split_once('\0').unwrap_or((&text, &text));
    let problem = Problem {
        id: "1".into(),
        prompt: Prompt::Text("1+1".into()),
        answer: gold.into(),
        source: "fuzz:1".into(),
        difficulty: None,
        solution_bytes: 0,
    };
    let mut right = false;
    for spec in ["math", "math:boxed", "hendrycks", "boxed", "exact"] {
        let reward = Reward::parse(spec).unwrap();
        let verdict = reward.score(&problem, completion).unwrap();
        assert!(verdict.reward == 0.0 || verdict.reward == 1.0, "{spec}: {verdict:?}");
        right |= verdict.reward == 1.0;
        if let Some(answer) = reward.answer(completion) {
            let _ = (reward.same(&answer, gold), reward.same(gold, &answer));
        }
    }
    right
}

/// What an environment program says, and what a model says to it: an opening, a step, an end, calls in every format.
pub fn environment(bytes: &[u8]) -> bool {
    let opening = protocol::read_opening(bytes, 1);
    let read = [
        opening.is_ok(),
        protocol::read_step(bytes, 1).is_ok(),
        protocol::read_closed(bytes, 1).is_ok(),
    ];
    let with_tool = br#"{"messages": [{"role": "user", "content": ""}], "tools": [{"name": "f",
        "parameters": {"type": "object", "required": ["x"], "properties":
            {"x": {"type": "string"}, "n": {"type": "integer"}}}}]}"#;
    let tools = match opening {
        Ok(opening) if !opening.tools.is_empty() => opening.tools,
        _ => protocol::read_opening(with_tool, 1).unwrap().tools,
    };
    let text = String::from_utf8_lossy(bytes);
    let mut calls = 0;
    for format in CallFormat::ALL {
        let mut turn = format.read(&text, &tools);
        turn.number_calls(0);
        assert!(turn.message().is_object());
        calls += turn.calls.len();
    }
    let expression = env::builtin::compute(&text);
    read.contains(&true) || calls > 0 || expression.is_ok()
}

/// What a checkpoint consists of, in the order of [`checkpoint`]'s first byte.
pub const CHECKPOINT: [&str; 5] = [
    "config.toml",
    "checkpoints/step-1/state.json",
    "checkpoints/step-1/state.safetensors",
    "checkpoints/step-1/adapter.gguf",
    "checkpoints/step-1/config.toml",
];

/// A run folder with a checkpoint in which the file that the first byte counts consists of the others; its
/// sums are right, so that its reader sees them. As `train --resume` goes about it, up to the first step.
pub fn checkpoint(bytes: &[u8]) -> bool {
    static MODEL: OnceLock<Model> = OnceLock::new();
    let Some((&which, bytes)) = bytes.split_first() else { return false };
    let model = MODEL.get_or_init(|| Model::open(Path::new("demo")).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let step = dir.path().join("checkpoints/step-1");
    fs::create_dir_all(&step).unwrap();
    let name = CHECKPOINT[which as usize % CHECKPOINT.len()];
    for (other, whole) in CHECKPOINT.iter().zip(run_folder()) {
        let content = if *other == name { bytes } else { whole };
        fs::write(dir.path().join(other), content).unwrap();
    }
    right_the_sums(&step);
    let Ok(resume) = Resume::open(dir.path()) else { return false };
    let fits = Plan::new(model, &resume.config().train).and_then(|plan| plan.check());
    fits.is_ok() && resume.checkpoint().is_some() && resume.trainer(model).is_ok()
}

/// The files of [`CHECKPOINT`] as a run of one step leaves them.
pub fn run_folder() -> &'static [Vec<u8>] {
    static FILES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    FILES.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let model = Model::open(Path::new("demo")).unwrap();
        let config = TrainConfig {
            steps: 1,
            prompts_per_step: 2,
            group: 2,
            eval_problems: 1,
            rank: 1,
            targets: "q".parse().unwrap(),
            kv_mib: Some(8),
            threads: Some(1),
            memory: Some("256MiB".parse().unwrap()),
            ..TrainConfig::default()
        };
        Trainer::new(&model, config).unwrap().run(&out, &mut Silent).unwrap();
        CHECKPOINT.iter().map(|name| fs::read(out.join(name)).unwrap()).collect()
    })
}

/// A split set's name.
pub fn split(bytes: &[u8]) -> bool {
    split_paths(Path::new(&*String::from_utf8_lossy(bytes))).is_ok()
}

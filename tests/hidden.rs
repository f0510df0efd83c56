//! `bupo-gguf entropy --hidden` as a user runs it: PyTorch's figures in the states, the formats against one another, what
//! is refused, interruption and resumption.

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::Path;

use bupo_gguf::model::Question;
use common::{Golden, folder_of, relative_error};
use program::{fail, json, json_lines, succeed, text};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;

const TAPS: [&str; 6] = ["layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out"];

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        text(&self.0.path().join(name)).into()
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }
}

fn model(case: &str) -> String {
    text(&folder_of(case).join(format!("{case}.gguf"))).into()
}

/// `entropy` with these arguments.
fn entropy(args: &[&str]) -> String {
    succeed(&[&["entropy"], args].concat())
}

fn refused(args: &[&str], words: &[&str]) {
    fail(&[&["entropy"], args].concat(), words);
}

fn numbers<const N: usize, T>(bytes: &[u8], of: fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|c| of(c.try_into().unwrap())).collect()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    numbers(tensor.data(), f32::from_le_bytes)
}

fn ints(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64);
    numbers(tensor.data(), i64::from_le_bytes)
}

/// An `.npy` file: its shape and the bytes behind the header.
fn npy(path: &str, descr: &str) -> (Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let end = 10 + u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    let header = std::str::from_utf8(&bytes[10..end]).unwrap();
    assert!(header.contains(&format!("'descr': '{descr}'")), "{header}");
    assert!(header.contains("'fortran_order': False"), "{header}");
    let shape = header.split_once("'shape': (").unwrap().1.split_once(')').unwrap().0;
    let extents = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
    (extents.map(|n| n.parse().unwrap()).collect(), bytes[end..].to_vec())
}

/// The states of every tap have the norms and the entropies that PyTorch gives them.
#[test]
fn the_states_are_pytorchs() {
    let folder = Folder::new();
    for case in ["qwen3-f32", "llama-q4_0", "gemma3-f32", "gpt-oss-f32"] {
        let golden = Golden::load(case);
        let tokens = golden.ints("entropy_tokens");
        let (prompt, completion) = tokens.split_at(3);
        let row =
            serde_json::json!({"prompt_tokens": prompt, "completions": [{"tokens": completion}]});
        let data = folder.write("rows.jsonl", &row.to_string());
        let out = folder.path(&format!("{case}.safetensors"));
        let taps = [&TAPS[..], &["final"]].concat().join(",");
        let args = ["--data", &data, "--hidden", &out, "--hidden-taps", &taps];
        let every = ["--hidden-positions", "all", "--threads", "2"];
        entropy(&[&[model(case).as_str()][..], &args, &every].concat());
        let bytes = std::fs::read(&out).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (layers, n) = (golden.json["n_layer"].as_u64().unwrap() as usize, tokens.len());
        let d = golden.model.config().n_embd;
        assert_eq!(file.tensor("layer_out").unwrap().shape(), [layers, n, d]);
        assert_eq!(ints(&file, "layer"), (1..=layers as i64).collect::<Vec<_>>());
        assert_eq!(ints(&file, "position"), (0..n as i64).collect::<Vec<_>>());
        assert_eq!(ints(&file, "token"), tokens.iter().map(|&t| t as i64).collect::<Vec<_>>());
        assert_eq!((ints(&file, "row"), ints(&file, "completion")), (vec![0; n], vec![0; n]));
        let tolerance = if case.ends_with("f32") { 1e-4 } else { 1e-3 };
        let mut engine = golden.engine();
        let mut close = |name: &str, states: &[f32], norms: Option<&Value>, entropies: &Value| {
            if let Some(norms) = norms {
                let norm = |h: &[f32]| h.iter().map(|x| x * x).sum::<f32>().sqrt();
                let ours: Vec<f32> = states.chunks(d).map(norm).collect();
                let error = relative_error(&ours, &common::floats(norms));
                assert!(error < tolerance, "{case} {name}: norms off by {error}");
            }
            let answers =
                engine.policies(&golden.model, None, &[states], Question::default()).unwrap();
            let ours: Vec<f32> = (0..n).map(|i| answers.entropy(i)).collect();
            let error = relative_error(&ours, &common::floats(entropies));
            assert!(error < tolerance, "{case} {name}: entropies off by {error}");
        };
        for tap in TAPS {
            let states = floats(&file, tap);
            for (l, states) in states.chunks(n * d).enumerate() {
                let (norms, entropies) = (&golden.json["norms"][l], &golden.json["entropies"][l]);
                let name = format!("layer {} {tap}", l + 1);
                close(&name, states, Some(&norms[tap]), &entropies[tap]);
            }
        }
        let states = floats(&file, "final");
        close("final", &states, None, &golden.json["final_entropy"]);
        assert!(!Path::new(&format!("{out}.partial")).exists(), "nothing is left beside it");
    }
}

/// Rows of two completions, of one, and a prompt alone.
const ROWS: &str = r#"{"prompt_tokens": [40, 41, 42], "completions": [{"tokens": [50, 51, 52, 53, 54]}, {"tokens": [60, 61]}]}
{"prompt_tokens": [40, 4000], "completions": [{"tokens": [50]}]}
{"prompt_tokens": [43, 44], "completions": [{"tokens": [55]}]}
{"prompt_tokens": [45, 46, 47, 48]}
"#;

#[test]
fn formats_and_types_hold_the_same() {
    let folder = Folder::new();
    let data = folder.write("rows.jsonl", ROWS);
    let go = |out: &str, extra: &[&str]| {
        let out = folder.path(out);
        let model = model("qwen3-f32");
        let base = [model.as_str(), "--data", &data, "--hidden", &out, "--hidden-layers", "2,4-5"];
        entropy(&[&base[..], &["--hidden-positions", "all"], extra].concat());
        out
    };
    let taps = ["--hidden-taps", "layer_out,ffn_out,final"];
    let whole = std::fs::read(go("h.safetensors", &taps)).unwrap();
    let whole = SafeTensors::deserialize(&whole).unwrap();
    assert_eq!(ints(&whole, "layer"), [2, 4, 5]);
    assert_eq!(ints(&whole, "row"), [[0; 13].as_slice(), &[2; 3], &[3; 4]].concat());
    assert_eq!(ints(&whole, "completion"), [[0; 8].as_slice(), &[1; 5], &[0; 7]].concat());
    let tokens = [40, 41, 42, 50, 51, 52, 53, 54, 40, 41, 42, 60, 61, 43, 44, 55, 45, 46, 47, 48];
    assert_eq!(ints(&whole, "token"), tokens);
    let n = tokens.len();
    let d = whole.tensor("final").unwrap().shape()[1];
    assert_eq!(whole.tensor("final").unwrap().shape(), [n, d]);

    let npys = go("folder", &taps);
    for name in ["layer_out", "ffn_out", "final"] {
        let (shape, bytes) = npy(&format!("{npys}/{name}.npy"), "<f4");
        assert_eq!(shape, whole.tensor(name).unwrap().shape(), "{name}");
        assert!(bytes == whole.tensor(name).unwrap().data(), "{name}");
    }
    for name in ["row", "completion", "position", "token", "layer"] {
        let (shape, bytes) = npy(&format!("{npys}/{name}.npy"), "<i8");
        assert_eq!(shape, whole.tensor(name).unwrap().shape(), "{name}");
        assert!(bytes == whole.tensor(name).unwrap().data(), "{name}");
    }
    let one = go("one.npy", &["--hidden-taps", "ffn_out"]);
    assert_eq!(npy(&one, "<f4"), (vec![3, n, d], whole.tensor("ffn_out").unwrap().data().to_vec()));
    let (shape, rows) = npy(&folder.path("one.rows.npy"), "<i8");
    let index = ["row", "completion", "position", "token"].map(|i| whole.tensor(i).unwrap().data());
    assert_eq!((shape, rows), (vec![4, n], index.concat()));

    let exact = floats(&whole, "layer_out");
    let half = std::fs::read(go("half.safetensors", &["--hidden-type", "f16"])).unwrap();
    let half = SafeTensors::deserialize(&half).unwrap();
    let ours = numbers(half.tensor("layer_out").unwrap().data(), half::f16::from_le_bytes);
    assert!(exact.iter().map(|&x| half::f16::from_f32(x)).eq(ours));
    let brain = std::fs::read(go("brain.safetensors", &["--hidden-type", "bf16"])).unwrap();
    let brain = SafeTensors::deserialize(&brain).unwrap();
    assert_eq!(brain.tensor("layer_out").unwrap().dtype(), Dtype::BF16);
    let ours = numbers(brain.tensor("layer_out").unwrap().data(), half::bf16::from_le_bytes);
    assert!(exact.iter().map(|&x| half::bf16::from_f32(x)).eq(ours));
}

#[test]
fn positions_are_chosen_and_counted_before() {
    let folder = Folder::new();
    let data = folder.write("rows.jsonl", ROWS);
    let golden = model("qwen3-f32");
    for (positions, want) in [
        ("completion", vec![2, 3, 4, 5, 6, 2, 3, 1, 3]),
        ("prompt", vec![0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3]),
        ("last", vec![7, 4, 2, 3]),
        ("1,3-5", vec![1, 3, 4, 5, 1, 3, 4, 1, 1, 3]),
    ] {
        let out = folder.path(&format!("{}.safetensors", want.len()));
        let base = [&golden, "--data", &data, "--hidden", &out, "--hidden-positions", positions];
        let size = json(&entropy(&[&base[..], &["--dry-run", "--json"]].concat()));
        assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.partial")).exists());
        assert_eq!(size["positions"], want.len());
        let written = json(&entropy(&[&base[..], &["--json"]].concat()));
        assert_eq!((&written["rows"], &written["rows_left_out"]), (&4.into(), &1.into()));
        assert_eq!(written["positions"], want.len());
        let bytes = std::fs::read(&out).unwrap();
        assert_eq!(written["bytes"], bytes.len());
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(ints(&file, "position"), want, "{positions}");
        // Behind the header stands what was counted, and the numbers of the layers.
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let counted = size["bytes"].as_u64().unwrap();
        assert_eq!(bytes.len() as u64 - header, counted + 8 * 5);
    }
}

/// Beside figures the states are those of the records, rows without a completion answered.
#[test]
fn states_beside_figures_are_of_the_same_tokens() {
    let folder = Folder::new();
    let data = folder.write("rows.jsonl", &format!("{ROWS}{{\"prompt\": \"3+4=\"}}\n"));
    let (out, file) = (folder.path("look"), folder.path("h.safetensors"));
    let args = ["demo", "--data", &data, "--out", &out, "--hidden", &file, "--every", "2"];
    entropy(&[&args[..], &["--max-response", "6", "--hidden-layers", "3"]].concat());
    let bytes = std::fs::read(&file).unwrap();
    let states = SafeTensors::deserialize(&bytes).unwrap();
    let records = json_lines(&Path::new(&out).join("entropy.jsonl"));
    let third: Vec<&Value> = records.iter().filter(|r| r["layer"] == 3).collect();
    let column = |name: &str| third.iter().map(|r| r[name].as_i64().unwrap()).collect::<Vec<_>>();
    assert!(third.len() > 8, "{}", third.len());
    for name in ["row", "completion", "position"] {
        assert_eq!(ints(&states, name), column(name), "{name}");
    }
    let norms: Vec<f32> =
        third.iter().map(|r| r["norm_layer_out"].as_f64().unwrap() as f32).collect();
    let d = states.tensor("layer_out").unwrap().shape()[2];
    let norm = |h: &[f32]| h.iter().map(|x| x * x).sum::<f32>().sqrt();
    let ours: Vec<f32> = floats(&states, "layer_out").chunks(d).map(norm).collect();
    assert!(relative_error(&ours, &norms) < 1e-5);
    let more = [&args[..], &["--max-response", "6", "--hidden-layers", "3", "--resume"]].concat();
    refused(&more, &["--hidden", "there", "nothing is written over"]);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let folder = Folder::new();
    let data = folder.write("rows.jsonl", ROWS);
    let golden = model("qwen3-f32");
    let there = folder.write("there.npy", "");
    let out = |name: &str| folder.path(name);
    let refuse = |file: &str, extra: &[&str], words: &[&str]| {
        let base = [golden.as_str(), "--data", &data, "--hidden", file];
        refused(&[&base[..], extra].concat(), words);
        for name in [file.to_string(), format!("{file}.partial")] {
            assert!(!Path::new(&name).exists() || name == there, "{name} is left");
        }
    };
    refuse(&there, &["--hidden-taps", "layer_out"], &["--hidden", "there.npy", "free"]);
    refuse(&out("h.npy"), &[], &["--hidden", "--hidden-taps", "3", "safetensors"]);
    refuse(&out("h.txt"), &[], &["h.txt", ".safetensors or .npy"]);
    let layers = ["--hidden-layers", "2,6"];
    refuse(&out("h.safetensors"), &layers, &["--hidden-layers", "1 to 5", "2,6"]);
    refuse(&out("h.safetensors"), &["--hidden-layers", "0"], &["--hidden-layers", "1 to 5"]);
    let brain = ["--hidden-type", "bf16"];
    refuse(&out("h"), &brain, &["--hidden-type", "f32 or f16", "bf16"]);
    let twice = ["--hidden-taps", "final,final"];
    refuse(&out("h.safetensors"), &twice, &["--hidden-taps", "once", "final"]);
    let far = ["--hidden-positions", "90-99"];
    refuse(&out("h.safetensors"), &far, &["--hidden-positions", "90-99"]);
    refuse(&out("h.safetensors"), &["--strict"], &["line 2", "4000"]);
    for (option, value) in
        [("--hidden-layers", "5-2"), ("--hidden-positions", "first"), ("--hidden-taps", "mlp")]
    {
        let output =
            program::run(&["entropy", "demo", "--data", &data, "--hidden", "h.npy", option, value]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(option), "{said}");
    }
}

/// Stopped anywhere and gone on with, the file has the bytes of one that was never stopped.
#[test]
#[cfg(unix)]
fn a_stopped_file_is_gone_on_with() {
    let folder = Folder::new();
    let row = |i: usize| {
        let tokens: Vec<usize> = (0..120).map(|j| 40 + (i * 7 + j) % 60).collect();
        format!(
            "{{\"prompt_tokens\": [40, 41, 42], \"completions\": [{{\"tokens\": {tokens:?}}}]}}\n"
        )
    };
    let data = folder.write("rows.jsonl", &(0..20_000).map(row).collect::<String>());
    let part = folder.path("part.safetensors");
    let partial = format!("{part}.partial");
    let go = |out: &str, extra: &[&str]| -> Vec<String> {
        let base = ["demo", "--data", &data, "--hidden", out, "--hidden-layers", "2,7"];
        [&base[..], extra].concat().into_iter().map(String::from).collect()
    };
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .arg("entropy")
        .args(go(&part, &[]))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let progress = Path::new(&partial).join("progress.json");
    let rows = || -> u64 {
        let text = std::fs::read_to_string(&progress).unwrap_or_default();
        serde_json::from_str::<Value>(&text).map_or(0, |p| p["rows"].as_u64().unwrap())
    };
    let start = std::time::Instant::now();
    while rows() == 0 {
        assert!(start.elapsed().as_secs() < 120, "nothing within two minutes");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap(); // at once, as a power cut would
    child.wait().unwrap();
    let done = rows();
    assert!(!Path::new(&part).exists(), "a file has its name when it is whole");
    let run = |args: &[String]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        entropy(&args)
    };
    let refuse = |args: &[String], said: &[&str]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        refused(&args, said);
    };
    refuse(&go(&part, &[]), &["--hidden", "begun", "--resume"]);
    let other = go(&part, &["--resume", "--hidden-taps", "layer_in"]);
    refuse(&other, &["--resume", "hidden", "layer_in"]);
    let samples = (done + 5).to_string();
    run(&go(&part, &["--resume", "--samples", &samples]));
    assert!(!Path::new(&partial).exists());
    let whole = folder.path("whole.safetensors");
    run(&go(&whole, &["--samples", &samples]));
    let read = |path: &str| std::fs::read(path).unwrap();
    let (ours, theirs) = (read(&part), read(&whole));
    let file = SafeTensors::deserialize(&ours).unwrap();
    assert_eq!(file.tensor("layer_out").unwrap().shape()[1] as u64, 120 * (done + 5));
    assert!(ours == theirs, "the same bytes");
}

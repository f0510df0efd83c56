//! Whole models, in a process of their own: an abort of llama.cpp is seen as one.
#![cfg(unix)]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bupo_gguf::gguf::{Array, GgufFile, GgufWriter, Value};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common;
use crate::mutate::{ODD, mutate};
use crate::{root, times};

/// A number as a file may hold it by mistake: a neighbour, or one that sizes go wrong with.
fn number(old: i128, rng: &mut ChaCha8Rng) -> u64 {
    match rng.random_range(0..5) {
        0 => (old + 1) as u64,
        1 => (old - 1).max(0) as u64,
        2 => (2 * old) as u64,
        3 => (old / 2) as u64,
        _ => ODD[rng.random_range(0..ODD.len())],
    }
}

/// Another value of the same type.
fn changed(value: &Value, rng: &mut ChaCha8Rng) -> Value {
    match value {
        Value::U32(x) => Value::U32(number(*x as i128, rng) as u32),
        Value::I32(x) => Value::I32(number(*x as i128, rng) as i32),
        Value::U64(x) => Value::U64(number(*x as i128, rng)),
        Value::F32(x) => {
            let odd = [0.0, -x, 2.0 * x, 0.5 * x, f32::NAN, f32::INFINITY, 1e30, 1e-30];
            Value::F32(odd[rng.random_range(0..odd.len())])
        }
        Value::Bool(x) => Value::Bool(!x),
        Value::String(x) => {
            let odd = [String::new(), x.repeat(3), format!("{x} "), "llama".into(), "gpt2".into()];
            Value::String(odd[rng.random_range(0..odd.len())].clone())
        }
        Value::Array(list) => {
            let mut values: Vec<Value> = list.iter().collect();
            if !values.is_empty() {
                let at = rng.random_range(0..values.len());
                match rng.random_range(0..8) {
                    0 => drop(values.remove(at)),
                    1 => values.push(values[at].clone()),
                    _ => values[at] = changed(&values[at], rng),
                }
            }
            Value::Array(Array::new(list.ty(), &values).unwrap())
        }
        other => other.clone(),
    }
}

/// A model whose structure is whole: one to three changes to values of keys, and to the bytes of tensors.
fn vary(file: &GgufFile, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut metadata: Vec<(String, Value)> =
        file.metadata().map(|(key, value)| (key.into(), value.clone())).collect();
    let mut data: Vec<Vec<u8>> = file.tensors().iter().map(|t| file.bytes(t).to_vec()).collect();
    for _ in 0..rng.random_range(1..=2) {
        if rng.random_range(0..4) == 0 {
            let at = rng.random_range(0..metadata.len());
            metadata[at].1 = changed(&metadata[at].1, rng);
        } else {
            let bytes = &mut data[rng.random_range(0..file.tensors().len())];
            for _ in 0..rng.random_range(1..=16) {
                let at = rng.random_range(0..bytes.len() - 3);
                match rng.random_range(0..4) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = rng.random(),
                    // Infinite and NaN, in F16 and F32.
                    2 => bytes[at & !1..][..2].copy_from_slice(&0x7c00u16.to_le_bytes()),
                    _ => bytes[at & !3..][..4].copy_from_slice(&f32::NAN.to_le_bytes()),
                }
            }
        }
    }
    let mut writer = GgufWriter::new();
    metadata.into_iter().for_each(|(key, value)| writer.metadata(&key, value).unwrap());
    for (tensor, bytes) in file.tensors().iter().zip(data) {
        writer
            .tensor(&tensor.name, tensor.ty, &tensor.shape, move |out| out.write(&bytes))
            .unwrap();
    }
    writer.to_bytes().unwrap()
}

/// Whether the program succeeds; it may refuse in one line, not abort, panic or hang.
fn ran(what: &str, path: &Path, args: &[&str]) -> bool {
    let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stderr.take().unwrap();
    let words = std::thread::spawn(move || {
        let mut said = Vec::new();
        let _ = std::io::Read::read_to_end(&mut pipe, &mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed().as_secs() < 300, "{what} hangs");
        std::thread::sleep(Duration::from_millis(2));
    };
    let said = words.join().unwrap();
    if status.signal().is_some() || said.contains("panicked") {
        let kept = std::env::temp_dir().join("hostile-model.gguf");
        std::fs::copy(path, &kept).unwrap();
        panic!("{what}, {args:?}: {status}; it lies in {}\n{said}", kept.display());
    }
    assert!(status.success() || said.lines().any(|l| l.starts_with("error: ")), "{what}: {said}");
    status.success()
}

#[test]
fn llama_cpp_never_aborts_on_what_passes_our_checks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let place = path.to_str().unwrap();
    let mut counts = [0; 4];
    for name in ["llama-q4_0.gguf", "qwen3-q8_0.gguf", "qwen2-f32.gguf", "qwen3-q4_k.gguf"] {
        let seed = std::fs::read(root("tests/fixtures/golden").join(name)).unwrap();
        let file = GgufFile::from_bytes(seed.clone(), name).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for i in 0..times(75) {
            let bytes = match i % 3 {
                // Keys, sizes, the start of the vocabulary: where llama.cpp believes what it reads.
                0 => mutate(&seed, if i % 2 == 0 { 12_000 } else { 1_500 }, &mut rng),
                _ => vary(&file, &mut rng),
            };
            std::fs::write(&path, &bytes).unwrap();
            let what = format!("{name}: mutation {i}");
            let generate =
                ["generate", place, "-p", "ab", "--raw", "--max-response", "2", "--threads", "1"];
            let opened = ran(&what, &path, &[&generate[..], &["-n", "1"]].concat());
            counts[!opened as usize] += 1;
            if opened && i % 4 == 1 {
                let out = dir.path().join(format!("{name}-{i}"));
                let train = "--steps 1 --internal-steps 1 --prompts-per-step 2 --group 2 --eval-problems 1 \
                             --max-response 8 --rank 1 --kv-mib 8 --threads 1 --template plain --out";
                let mut args = vec!["train", place];
                args.extend(train.split_whitespace());
                args.push(out.to_str().unwrap());
                counts[2 + !ran(&what, &path, &args) as usize] += 1;
            }
        }
    }
    let [opened, refused, trained, ended] = counts;
    println!(
        "models: {opened} decoded with, {refused} refused; {trained} trained on, {ended} ended by an error"
    );
    assert!(
        opened > refused,
        "{opened} opened, {refused} refused: most should get as far as decoding"
    );
    assert!(refused > 0 && trained > 0, "both should occur");
}

/// Every setting of every further architecture, changed: what the forwards and llama.cpp's graphs divide by, cut heads
/// with, or index layers by.
#[test]
fn settings_of_further_architectures_are_taken_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let place = path.to_str().unwrap();
    let mut counts = [0; 2];
    for case in common::ARCHS.into_iter().filter(|case| !case.ends_with("f32")) {
        let name = common::folder_of(case).join(format!("{case}.gguf"));
        let file = GgufFile::open(&name).unwrap();
        let arch = format!("{}.", file.architecture().unwrap());
        let keys: Vec<&str> =
            file.metadata().map(|(key, _)| key).filter(|key| key.starts_with(&arch)).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(12);
        for key in keys {
            for i in 0..times(2) {
                let mut writer = GgufWriter::new();
                for (name, value) in file.metadata() {
                    let value = if name == key { changed(value, &mut rng) } else { value.clone() };
                    writer.metadata(name, value).unwrap();
                }
                for tensor in file.tensors() {
                    let bytes = file.bytes(tensor).to_vec();
                    let shape = &tensor.shape;
                    writer
                        .tensor(&tensor.name, tensor.ty, shape, move |out| out.write(&bytes))
                        .unwrap();
                }
                std::fs::write(&path, writer.to_bytes().unwrap()).unwrap();
                let what = format!("{case}: {key}, change {i}");
                let args = ["generate", place, "-p", "ab", "--raw", "--max-response", "2"];
                let opened = ran(&what, &path, &[&args[..], &["--threads", "1"]].concat());
                counts[!opened as usize] += 1;
                if opened {
                    let data = root("tests/fixtures/rows-of-tokens.jsonl");
                    let data = data.to_str().unwrap();
                    ran(&what, &path, &["score", place, "--data", data, "--threads", "1"]);
                }
            }
        }
    }
    let [opened, refused] = counts;
    println!("settings: {opened} decoded with, {refused} refused");
    assert!(opened > 20 && refused > 20, "{opened} opened, {refused} refused: both should occur");
}

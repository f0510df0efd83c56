//! What others' programs wrote means what their authors meant: PEFT folders with every setting that PEFT 0.21
//! knows, vocabularies with every flag, files given in the place of others.

use std::path::{Path, PathBuf};

use bupo_gguf::data::{Message, Prompt};
use bupo_gguf::export::{PeftBase, read_peft, write_peft};
use bupo_gguf::gguf::{AdapterFile, AdapterPair, GgufFile, GgufSet, GgufWriter, Value};
use bupo_gguf::model::Model;
use bupo_gguf::rollout::Encoder;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value as Json, json};

mod common;

fn golden(name: &str) -> PathBuf {
    common::golden_dir().join(name)
}

/// A copy of a model with other keys, and with the token embedding as its unembedding where `untied`.
fn variant(from: &Path, to: &Path, keys: &[(&str, Value)], untied: bool) {
    let file = GgufFile::open(from).unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in file.metadata().filter(|(key, _)| !keys.iter().any(|(k, _)| k == key)) {
        writer.metadata(key, value.clone()).unwrap();
    }
    for (key, value) in keys {
        writer.metadata(key, value.clone()).unwrap();
    }
    for tensor in file.tensors() {
        let mut put = |name: &str| {
            let bytes = file.bytes(tensor);
            writer.tensor(name, tensor.ty, &tensor.shape, |out| out.write(bytes)).unwrap();
        };
        put(&tensor.name);
        if untied && tensor.name == "token_embd.weight" && file.tensor("output.weight").is_none() {
            put("output.weight");
        }
    }
    writer.write(to).unwrap();
}

#[test]
fn a_prompt_ends_where_the_assistant_begins() {
    let dir = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo.gguf");
    let flag = |name: &str| format!("tokenizer.ggml.add_{name}");
    let prompts = [
        Prompt::Text("17+25=".into()),
        Prompt::Messages(vec![Message::user("1+1=")]),
        Prompt::Tokens(vec![5, 6]),
    ];
    let tokens = |path: &Path| -> (Vec<Vec<i32>>, Vec<i32>, i32) {
        let model = Model::open(path).unwrap();
        let encoder = Encoder::new(&model, None, None).unwrap();
        let vocab = model.engine().vocab();
        let text = vocab.tokenize("17+25=", true, true).unwrap();
        let prompts = prompts.iter().map(|p| encoder.prompt(p, 100).unwrap()).collect();
        (prompts, text, vocab.bos().unwrap_or(-1))
    };
    let (plain, plain_text, _) = tokens(&demo);
    for flags in [
        &["eos_token"][..],
        &["sep_token"],
        &["space_prefix"],
        &["eos_token", "sep_token"],
        &["bos_token"],
        &["bos_token", "eos_token", "sep_token", "space_prefix"],
    ] {
        let path = dir.path().join("flags.gguf");
        let keys: Vec<(String, Value)> =
            flags.iter().map(|name| (flag(name), Value::Bool(true))).collect();
        let keys: Vec<(&str, Value)> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        variant(&demo, &path, &keys, false);
        let (got, text, bos) = tokens(&path);
        let start = if flags.contains(&"bos_token") { vec![bos] } else { vec![] };
        assert_eq!(text, [&start[..], &plain_text].concat(), "{flags:?}");
        for (i, (got, plain)) in got.iter().zip(&plain).enumerate() {
            // Token ids are taken as they are.
            let start = if i == 2 { &[][..] } else { &start };
            assert_eq!(*got, [start, plain].concat(), "{flags:?}, prompt {i}");
        }
    }
}

/// A PEFT folder of a golden adapter whose config was changed.
struct Folder {
    dir: tempfile::TempDir,
    base: PeftBase,
    written: AdapterFile,
}

impl Folder {
    fn new() -> Folder {
        let dir = tempfile::tempdir().unwrap();
        let base = GgufFile::open(&golden("qwen3-f32.gguf")).unwrap();
        let base = PeftBase::from_gguf(&base).unwrap();
        let written = AdapterFile::read(&golden("qwen3-f32.lora.gguf")).unwrap();
        write_peft(&written, &base, "qwen3", dir.path()).unwrap();
        Folder { dir, base, written }
    }

    /// The adapter with these settings in place of those that were written.
    fn with(&self, settings: &Json) -> Result<AdapterFile, String> {
        let path = self.dir.path().join("adapter_config.json");
        let before = std::fs::read_to_string(&path).unwrap();
        let mut config: Json = serde_json::from_str(&before).unwrap();
        for (key, value) in settings.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(&path, config.to_string()).unwrap();
        let adapter = read_peft(self.dir.path(), &self.base).map_err(|e| e.to_string());
        std::fs::write(&path, before).unwrap();
        adapter
    }

    /// The factor of each weight's B A beside what was written.
    fn factors(&self, settings: &Json) -> Vec<(String, f64)> {
        let adapter = self.with(settings).unwrap();
        let pairs = adapter.pairs.iter().zip(&self.written.pairs);
        pairs
            .map(|(now, was)| {
                assert_eq!((&now.weight, &now.a), (&was.weight, &was.a));
                // By the largest number of B, with its sign.
                let at =
                    (0..was.b.len()).max_by(|i, j| was.b[*i].abs().total_cmp(&was.b[*j].abs()));
                let at = at.unwrap();
                let [now_b, was_b] =
                    [now.b[at] * adapter.scale(now), was.b[at] * self.written.scale(was)];
                (now.weight.clone(), f64::from(now_b) / f64::from(was_b))
            })
            .collect()
    }
}

#[test]
fn scales_are_pefts() {
    let folder = Folder::new();
    let alpha = f64::from(folder.written.alpha);
    let rank = folder.written.pairs[0].rank as f64;
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * b.abs().max(1.0);
    // A GGUF alpha of 0 means a scale of 1; PEFT's means 0.
    for (weight, factor) in folder.factors(&json!({"lora_alpha": 0})) {
        assert_eq!(factor, 0.0, "{weight}");
    }
    for (weight, factor) in folder.factors(&json!({"lora_alpha": 1e-60})) {
        assert!(factor < 1e-30, "{weight}: {factor}");
    }
    for (zero, other) in [("q_proj", 1.0), ("down_proj", 1.0)] {
        for (weight, factor) in folder.factors(&json!({"alpha_pattern": {zero: 0}})) {
            let is = weight.contains(if zero == "q_proj" { "attn_q." } else { "ffn_down" });
            assert!(near(factor, if is { 0.0 } else { other }), "{zero}: {weight} {factor}");
        }
    }
    for (weight, factor) in folder.factors(&json!({"use_rslora": true})) {
        assert!(near(factor, rank.sqrt()), "{weight}: {factor}");
    }
    let settings =
        json!({"alpha_pattern": {r"layers\.[01]\..*q_proj": -2.0 * alpha, "k_proj": alpha / 2.0}});
    for (weight, factor) in folder.factors(&settings) {
        let layer: usize = weight.split('.').nth(1).unwrap().parse().unwrap();
        let expected = match weight.as_str() {
            w if w.contains("attn_q.") && layer < 2 => -2.0,
            w if w.contains("attn_k.") => 0.5,
            _ => 1.0,
        };
        assert!(near(factor, expected), "{weight}: {factor}");
    }
}

/// What PEFT 0.21.2 saves for a LoRA with its defaults.
fn defaults() -> Json {
    json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": null, "bias": "none", "corda_config": null,
        "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
        "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
        "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.0,
        "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
        "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "revision": null,
        "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null,
        "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false,
        "velora_config": null
    })
}

#[test]
fn every_setting_is_honoured_or_refused_by_name() {
    let folder = Folder::new();
    let same = |settings: Json| {
        let adapter = folder.with(&settings).unwrap_or_else(|e| panic!("{settings}: {e}"));
        assert_eq!(adapter.pairs, folder.written.pairs, "{settings}");
    };
    same(defaults());
    // The form of PEFT 0.2, and what others write beside.
    same(json!({"enable_lora": null, "merge_weights": false}));
    same(
        json!({"lora_dtype": "float16", "some_switch_of_tomorrow": false, "another": null, "list": []}),
    );
    for init in [
        json!(true),
        json!(false),
        json!("gaussian"),
        json!("eva"),
        json!("orthogonal"),
        json!("mica"),
    ] {
        same(json!({"init_lora_weights": init}));
    }
    same(
        json!({"eva_config": {"rho": 2.0}, "corda_config": {"verbose": true}, "velora_config": {"scale": 1.0}}),
    );
    same(
        json!({"lora_dropout": 0.1, "revision": "main", "fan_in_fan_out": true, "runtime_config": {"x": 1}}),
    );
    same(
        json!({"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj", "exclude_modules": ["lm_head"]}),
    );
    same(json!({"target_modules": r"(?!vision).*_proj"}));
    same(json!({"layers_to_transform": (0..64).collect::<Vec<_>>(), "layers_pattern": "layers"}));
    for (key, value) in [
        ("peft_type", json!("ADALORA")),
        ("peft_type", json!(null)),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("OLoRA")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("of tomorrow")),
        ("init_lora_weights", json!(3)),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["mlp.experts"])),
        ("layer_replication", json!([[0, 2]])),
        ("alora_invocation_tokens", json!([7])),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1})),
        ("monteclora_config", json!({"num_samples": 8})),
        ("megatron_config", json!({"x": 1})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("enable_lora", json!([true, false, true])),
        ("a_setting_of_tomorrow", json!(true)),
        ("a_setting_of_tomorrow", json!(1.0)),
        ("a_setting_of_tomorrow", json!("on")),
        ("r", json!(4.5)),
        ("r", json!(0)),
        ("r", json!("4")),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(null)),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!(["q_proj"])),
        ("rank_pattern", json!({"q_proj": 2.5})),
        ("rank_pattern", json!({"q_proj": "2"})),
        ("rank_pattern", json!({"(": 2})),
        ("alpha_pattern", json!(3)),
        ("target_modules", json!(3)),
        ("layers_to_transform", json!("all")),
        ("layers_to_transform", json!([-1])),
    ] {
        let error = folder.with(&json!({key: value})).unwrap_err();
        assert!(error.contains(key) && !error.contains('\n'), "{key} = {value}: {error}");
    }
    // Tensors of modules that the config leaves out: PEFT passes over them, and so would the trainer.
    for settings in [
        json!({"layers_to_transform": 0}),
        json!({"target_modules": ["q_proj"]}),
        json!({"target_modules": r".*\.mlp\..*"}),
        json!({"exclude_modules": ["o_proj"]}),
    ] {
        let error = folder.with(&settings).unwrap_err();
        assert!(error.contains("one that PEFT would pass over"), "{settings}: {error}");
    }
    let dir = folder.dir.path();
    std::fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin")).unwrap();
    let error = folder.with(&json!({})).unwrap_err();
    assert!(error.contains("got adapter_model.bin; save it again"), "{error}");
}

fn run(args: &[&str]) -> Result<String, String> {
    let program = env!("CARGO_BIN_EXE_bupo-gguf");
    let output = std::process::Command::new(program).args(args).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
}

#[test]
fn an_adapter_of_the_unembedding_is_imported_unless_it_is_tied() {
    let dir = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo.gguf");
    let untied = dir.path().join("untied.gguf");
    variant(&demo, &untied, &[], true);
    let file = GgufFile::open(&untied).unwrap();
    let base = PeftBase::from_gguf(&file).unwrap();
    let head = file.tensor("output.weight").unwrap();
    let (n_in, n_out) = (head.shape[0] as usize, head.shape[1] as usize);
    let ramp = |n: usize| (0..n).map(|i| (i % 7) as f32 / 70.0 - 0.04).collect::<Vec<f32>>();
    let pair = AdapterPair {
        weight: "output.weight".into(),
        rank: 2,
        n_in,
        n_out,
        n_expert: 1,
        a: ramp(2 * n_in),
        b: ramp(2 * n_out),
    };
    let adapter = AdapterFile {
        arch: base.arch.name.into(),
        name: None,
        alpha: 4.0,
        pairs: vec![pair],
        extra: vec![],
    };
    let folder = dir.path().join("peft");
    write_peft(&adapter, &base, "untied", &folder).unwrap();
    let out = dir.path().join("a.gguf");
    let [folder_name, out_name] = [&folder, &out].map(|path| path.to_str().unwrap().to_owned());
    let import = |base: &Path| {
        run(&["import-peft", &folder_name, "--base", base.to_str().unwrap(), "--out", &out_name])
    };
    // PEFT saves a copy of the base's matrix beside it.
    let weights = folder.join("adapter_model.safetensors");
    let with_copy = |copy: &[f32], shape: [usize; 2]| {
        let bytes = std::fs::read(&weights).unwrap();
        let copy: Vec<u8> = copy.iter().flat_map(|x| x.to_le_bytes()).collect();
        let name = "base_model.model.lm_head.base_layer.weight";
        let copy = TensorView::new(Dtype::F32, shape.to_vec(), &copy).unwrap();
        let all = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = all.tensors().into_iter().filter(|(other, _)| other != name);
        let tensors: Vec<_> = tensors.chain([(name.to_owned(), copy)]).collect();
        std::fs::write(&weights, safetensors::serialize(tensors, None).unwrap()).unwrap();
    };
    let read = || AdapterFile::read(&out).unwrap().pairs;
    import(&untied).unwrap();
    assert_eq!(read(), adapter.pairs);
    let numbers = file.dequantize(head).unwrap();
    with_copy(&numbers, [n_out, n_in]);
    import(&untied).unwrap();
    assert_eq!(read(), adapter.pairs);
    let error = import(&demo).unwrap_err();
    assert!(error.contains("output.weight") && error.contains("tied"), "{error}");
    let other: Vec<f32> = numbers.iter().rev().copied().collect();
    with_copy(&other, [n_out, n_in]);
    assert!(import(&untied).unwrap_err().contains("other numbers"), "another matrix");
    with_copy(&numbers[n_in..], [n_out - 1, n_in]);
    assert!(import(&untied).unwrap_err().contains("lm_head.base_layer.weight: expected"));
    // Merging takes it, too.
    let merged = dir.path().join("merged.gguf");
    let [untied, merged_name] = [&untied, &merged].map(|path| path.to_str().unwrap());
    run(&["export", untied, "--adapter", &out_name, "--out", merged_name, "--type", "f32"])
        .unwrap();
    let merged = GgufFile::open(&merged).unwrap();
    let got = merged.dequantize(merged.tensor("output.weight").unwrap()).unwrap();
    let pair = &adapter.pairs[0];
    for row in [0, 17, n_out - 1] {
        for column in [0, n_in - 1] {
            let delta: f32 =
                (0..2).map(|k| pair.b[row * 2 + k] * pair.a[k * n_in + column]).sum::<f32>() * 2.0;
            let at = row * n_in + column;
            assert!((got[at] - numbers[at] - delta).abs() < 1e-6, "row {row}, column {column}");
        }
    }
}

#[test]
fn a_file_in_the_place_of_another_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = golden("qwen3-f32.lora.gguf");
    let error = GgufSet::open(&adapter).unwrap_err().to_string();
    assert!(error.contains("expected a model, got an adapter"), "{error}");
    assert!(error.contains("with --adapter"), "{error}");
    let error = run(&["generate", adapter.to_str().unwrap(), "-p", "1"]).unwrap_err();
    assert!(error.contains("expected a model, got an adapter"), "{error}");
    for (kind, word) in [("imatrix", "an imatrix"), ("mmproj", "a mmproj")] {
        let path = dir.path().join("kind.gguf");
        variant(&golden("qwen3-f32.gguf"), &path, &[("general.type", kind.into())], false);
        let error = GgufSet::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("got {word} (general.type)")), "{error}");
    }
    let folder = Folder::new();
    let peft = folder.dir.path().to_str().unwrap();
    let error = run(&["generate", "demo", "-p", "1", "--adapter", peft]).unwrap_err();
    assert!(error.contains("a folder of PEFT's; make it one with import-peft"), "{error}");
    let error = run(&["generate", peft, "-p", "1"]).unwrap_err();
    assert!(error.contains("expected a file, got a folder"), "{error}");
    for (start, word) in [
        (&b"version https://git-lfs.github.com/spec/v1\n"[..], "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04 rest", "zip archive"),
        (b"\x40\x01\0\0\0\0\0\0{", "safetensors"),
        (b"tjgg rest of it", "older formats"),
    ] {
        let path = dir.path().join("start.gguf");
        std::fs::write(&path, start).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("which begins with 'GGUF'") && error.contains(word), "{error}");
    }
}

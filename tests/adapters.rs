//! Adapters in every form: types, PEFT both ways, several as one; and what two models differ in.

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Command;

use bupo_gguf::export::{AdapterSpec, Adapters, PeftBase, lora_of, read_peft, write_peft};
use bupo_gguf::ggml::Type;
use bupo_gguf::gguf::{AdapterFile, AdapterPair, GgufFile};
use bupo_gguf::model::{Batch, ComparedModel, Lora, Model, Policy, compare};
use bupo_gguf::rollout::{Request, RolloutOptions, Rollouts, Sampling};
use common::{ARCHS, Golden, folder_of, golden_dir, relative_error};
use program::text;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    golden_dir().join(name)
}

fn run(args: &[&str]) -> Result<String, String> {
    let out = Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code().is_some(), "{args:?} was killed: {stderr}");
    if out.status.success() { Ok(String::from_utf8(out.stdout).unwrap()) } else { Err(stderr) }
}

/// Log-probs of `tokens[1..]` by our exact forward.
fn logprobs(model: &Model, lora: Option<&Lora>, tokens: &[i32]) -> Vec<f32> {
    let mut engine = bupo_gguf::model::Engine::new(std::sync::Arc::new(
        bupo_gguf::ggml::ThreadPool::new(1).unwrap(),
    ))
    .unwrap();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..1], &[&tokens[1..]], model.config().n_vocab).unwrap();
    let policy = Policy::full(model.config().n_layer);
    engine.forward(model, lora, &batch, policy.depth()).unwrap();
    engine.score(model, lora, &batch, policy, 1.0, false).unwrap().logprobs
}

fn golden_layers(case: &str) -> usize {
    let json = std::fs::read(folder_of(case).join(format!("{case}.json"))).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    json["n_layer"].as_u64().unwrap() as usize
}

#[test]
fn peft_and_back_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["llama-f32", "qwen2-f32", "qwen3-f32", "llama-q4_0"].into_iter().chain(ARCHS) {
        let base = folder_of(case).join(format!("{case}.gguf"));
        let adapter = folder_of(case).join(format!("{case}.lora.gguf"));
        let (folder, back) = (dir.path().join(case), dir.path().join("back.gguf"));
        run(&["export", text(&base), "--adapter", text(&adapter), "--peft", text(&folder)])
            .unwrap();
        run(&["import-peft", text(&folder), "--base", text(&base), "--out", text(&back)]).unwrap();
        if case.starts_with("qwen3next") {
            // Two maps of the file are one module, whose pair has both ranks: other numbers, and the same adapter.
            let model = Model::open(&base).unwrap();
            let tokens: Vec<i32> = (0..24).map(|i| (i * 7 + 3) % 50).collect();
            let with = |path| logprobs(&model, Some(&Lora::load(&model, path).unwrap()), &tokens);
            let (before, after) = (with(&adapter), with(&back));
            let error = relative_error(&after, &before);
            assert!(error < 1e-5, "{case}: {error}");
            let without = logprobs(&model, None, &tokens);
            assert!(relative_error(&without, &before) > 1e-3, "{case}: the adapter has a say");
            continue;
        }
        let [before, after] = [&adapter, &back].map(|path| {
            let mut file = AdapterFile::read(path).unwrap();
            file.pairs.sort_by(|a, b| a.weight.cmp(&b.weight));
            file
        });
        assert_eq!(before.pairs, after.pairs, "{case}");
        assert_eq!((before.alpha, before.arch), (after.alpha, after.arch), "{case}");

        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap())
                .unwrap();
        assert_eq!(config["peft_type"], "LORA");
        // Words where every layer has all maps, else the modules one by one.
        let map = |p: &AdapterPair| p.weight.splitn(3, '.').nth(2).unwrap().to_string();
        let maps: std::collections::BTreeSet<String> = before.pairs.iter().map(map).collect();
        let all = maps.len() * golden_layers(case) == before.pairs.len();
        let modules = config["target_modules"].as_array().unwrap().len();
        assert_eq!(modules, if all { maps.len() } else { before.pairs.len() }, "{config}");
    }
}

/// Adapters that PEFT made and saved, and the log-probs that PyTorch gives with them.
#[test]
fn what_peft_wrote_gives_pytorchs_logprobs() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["llama-f32", "qwen3-f32"] {
        let base = golden(&format!("{case}.gguf"));
        let folder = golden_dir().join("../peft").join(case);
        let adapter = dir.path().join("adapter.gguf");
        run(&["import-peft", text(&folder), "--base", text(&base), "--out", text(&adapter)])
            .unwrap();
        let figures: Value =
            serde_json::from_slice(&std::fs::read(folder.join("logprobs.json")).unwrap()).unwrap();
        let tokens: Vec<i32> = figures["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_i64().unwrap() as i32)
            .collect();
        let model = Model::open(&base).unwrap();
        // Ranks of 2, 4 and 8 in one file become one rank of 8.
        let lora = Lora::load(&model, &adapter).unwrap();
        assert_eq!(lora.rank(), 8);
        let (with, without) =
            (logprobs(&model, Some(&lora), &tokens), logprobs(&model, None, &tokens));
        let expected = common::floats(&figures["logprobs"]);
        let error = relative_error(&with, &expected);
        assert!(error < 1e-4, "{case}: {error}");
        assert!(relative_error(&without, &expected) > 0.05, "{case}: the adapter has a say");
    }
}

/// A pair on the unembedding is the merged unembedding, for every policy and in every gradient; rollouts decode with
/// it; and models that tie the unembedding refuse it.
#[test]
fn a_pair_on_the_unembedding_is_the_merged_unembedding() {
    let golden = Golden::load("llama-f32");
    let mut file = golden.adapter_with_head();
    let mut lora = Lora::from_file(&golden.model, file.clone(), "with head").unwrap();
    assert_eq!(lora.frozen(), ["output.weight"]);
    assert_eq!(lora.targets(), golden.lora().targets());
    let n_layer = golden.model.config().n_layer;

    let dir = tempfile::tempdir().unwrap();
    let (head, merged) = (dir.path().join("head.gguf"), dir.path().join("merged.gguf"));
    let own = file.pairs.len() - 1;
    AdapterFile { pairs: file.pairs.split_off(own), ..file.clone() }.write(&head).unwrap();
    let base = golden_dir().join("llama-f32.gguf");
    run(&["export", text(&base), "--adapter", text(&head), "--out", text(&merged)]).unwrap();
    let merged = Model::open(&merged).unwrap();
    let rest = Lora::from_file(&merged, file, "without head").unwrap();

    let mut batch = Batch::default();
    for row in golden.rollouts() {
        let completions: Vec<&[i32]> = row.completions.iter().map(Vec::as_slice).collect();
        batch.push_group(&row.prompt, &completions, golden.model.config().n_vocab).unwrap();
    }
    let cotangents: Vec<f32> = (0..batch.scored.len()).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut plain = None;
    for policy in [Policy::full(n_layer), Policy::internal(2, n_layer, false).unwrap()] {
        let results = [(&golden.model, &lora), (&merged, &rest)].map(|(model, lora)| {
            let mut engine = golden.engine();
            let mut gradients = lora.zeros_like().unwrap();
            engine.forward(model, Some(lora), &batch, policy.depth()).unwrap();
            let scores = engine.score(model, Some(lora), &batch, policy, 0.8, true).unwrap();
            engine.backward(model, lora, &mut gradients, &batch, policy, &cotangents).unwrap();
            let gradients: Vec<f32> =
                (0..rest.tensors().len()).flat_map(|i| gradients.values(i).to_vec()).collect();
            (scores.logprobs, scores.entropies, gradients)
        });
        let [(logprobs, entropies, gradients), (of_merged, entropies_of_merged, want)] = &results;
        for (what, got, want) in [
            ("log-probs", logprobs, of_merged),
            ("entropies", entropies, entropies_of_merged),
            ("gradients", gradients, want),
        ] {
            let error = relative_error(got, want);
            println!("{error:.1e} of 2e-5  {what} of layer {}", policy.depth());
            assert!(error < 2e-5, "{what} of layer {}: {error}", policy.depth());
        }
        plain.get_or_insert(logprobs.clone());
    }
    let mut engine = golden.engine();
    let policy = Policy::full(n_layer);
    engine.forward(&golden.model, Some(&lora), &batch, n_layer).unwrap();
    let without = engine.score(&golden.model, None, &batch, policy, 0.8, false).unwrap().logprobs;
    let change = relative_error(&plain.unwrap(), &without);
    assert!(change > 0.01, "the pair has a say: {change}");

    // Rollouts decode with it.
    let pool = std::sync::Arc::new(bupo_gguf::ggml::ThreadPool::new(2).unwrap());
    let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 26 };
    let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
    rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
    let prompt = golden.rollouts()[0].prompt.clone();
    let request = Request { prompt_tokens: prompt.clone(), n: 4, seed_stream: 3, max_tokens: 12 };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sampled = rollouts
        .generate(&[request], &Sampling::default(), 1, &mut |_| (), &stop)
        .unwrap()
        .remove(0);
    let tokens: Vec<&[i32]> = sampled.iter().map(|c| c.tokens.as_slice()).collect();
    let mut batch = Batch::default();
    batch.push_group(&prompt, &tokens, golden.model.config().n_vocab).unwrap();
    engine.forward(&golden.model, Some(&lora), &batch, n_layer).unwrap();
    let ours = engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, false).unwrap();
    let theirs: Vec<f32> = sampled.iter().flat_map(|c| c.logprobs.clone()).collect();
    // The cache of rollouts is F16, whose rounding (2^-11) is the bound's origin.
    let drift = relative_error(&ours.logprobs, &theirs);
    println!("{drift:.1e} of 5e-3  drift of rollouts");
    assert!(drift < 5e-3, "{drift}");

    // A tied model's unembedding is its embedding.
    let tied = Golden::load("qwen2-f32");
    let (n_in, n_out) = (tied.model.config().n_embd, tied.model.config().n_vocab);
    let mut file = AdapterFile::read(&tied.lora_path()).unwrap();
    let (a, b) = (vec![0.1; n_in], vec![0.1; n_out]);
    file.pairs.push(AdapterPair {
        weight: "output.weight".into(),
        rank: 1,
        n_in,
        n_out,
        n_expert: 1,
        a,
        b,
    });
    let error = Lora::from_file(&tied.model, file, "tied").err().unwrap().to_string();
    assert!(error.contains("tied to the token embedding"), "{error}");
}

#[test]
fn what_gguf_cannot_hold_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let base = golden("qwen3-f32.gguf");
    let source = golden_dir().join("../peft/qwen3-f32");
    let out = dir.path().join("out.gguf");
    let config: Value =
        serde_json::from_slice(&std::fs::read(source.join("adapter_config.json")).unwrap())
            .unwrap();
    std::fs::copy(
        source.join("adapter_model.safetensors"),
        dir.path().join("adapter_model.safetensors"),
    )
    .unwrap();
    let import = |config: &Value| {
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        run(&["import-peft", text(dir.path()), "--base", text(&base), "--out", text(&out)])
    };
    for (key, value) in [
        ("use_dora", serde_json::json!(true)),
        ("bias", serde_json::json!("all")),
        ("peft_type", serde_json::json!("LOHA")),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("layer_replication", serde_json::json!([[0, 2]])),
        ("r", serde_json::json!(5)),
        ("lora_alpha", serde_json::json!("much")),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        let error = import(&changed).unwrap_err();
        let named = if key == "r" { "r = 5" } else { key };
        assert!(error.contains("error: ") && error.contains(named), "{key}: {error}");
        assert!(!out.exists());
    }
    // rsLoRA scales by the root of the rank.
    let mut rslora = config.clone();
    rslora["use_rslora"] = serde_json::json!(true);
    import(&rslora).unwrap();
    let file = AdapterFile::read(&out).unwrap();
    let pair = file.pairs.iter().find(|pair| pair.weight == "blk.0.attn_q.weight").unwrap();
    assert_eq!((pair.rank, file.scale(pair)), (4, 3.0));
    // Another model's.
    let other = golden("qwen3-q4_k.gguf");
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let error =
        run(&["import-peft", text(dir.path()), "--base", text(&other), "--out", text(&out)]);
    assert!(error.unwrap_err().contains("a pair for shape [256, 256]"));
}

#[test]
fn several_adapters_are_their_sum() {
    let golden = Golden::load("qwen3-f32");
    let path = golden.lora_path();
    let file = AdapterFile::read(&path).unwrap();
    // A second adapter of another rank on some of the weights.
    let dir = tempfile::tempdir().unwrap();
    let mut second = file.clone();
    second.alpha = 6.0;
    second.pairs.retain(|pair| pair.weight.contains("ffn"));
    for pair in &mut second.pairs {
        let rank = pair.rank - 1;
        pair.a.truncate(rank * pair.n_in);
        pair.b = pair.b.chunks(pair.rank).flat_map(|row| row[..rank].to_vec()).collect();
        pair.rank = rank;
    }
    let other = dir.path().join("second.gguf");
    second.write(&other).unwrap();
    let specs: Vec<AdapterSpec> = [text(&path).to_owned(), format!("{}:0.5", other.display())]
        .iter()
        .map(|spec| spec.parse().unwrap())
        .collect();
    let sum = lora_of(&golden.model, &specs).unwrap().unwrap();
    // The same by hand, on one weight: W x + s1 B1 A1 x + 0.5 s2 B2 A2 x.
    let weight = "blk.1.ffn_up.weight";
    let delta = |file: &AdapterFile, factor: f32| {
        let pair = file.pairs.iter().find(|pair| pair.weight == weight).unwrap();
        let scale = factor * file.scale(pair);
        let mut delta = vec![0f32; pair.n_in * pair.n_out];
        for row in 0..pair.n_out {
            for r in 0..pair.rank {
                let b = scale * pair.b[row * pair.rank + r];
                for k in 0..pair.n_in {
                    delta[row * pair.n_in + k] += b * pair.a[r * pair.n_in + k];
                }
            }
        }
        delta
    };
    let expected: Vec<f32> =
        delta(&file, 1.0).iter().zip(delta(&second, 0.5)).map(|(a, b)| a + b).collect();
    let joined = Adapters::read(&specs).unwrap().combined().unwrap();
    assert!(relative_error(&delta(&joined, 1.0), &expected) < 1e-6);
    // And its zero-padded form computes what the file says.
    let out = dir.path().join("sum.gguf");
    let half = format!("{}:0.5", other.display());
    run(&["export", "--adapter", text(&path), "--adapter", &half, "--out", text(&out)]).unwrap();
    let tokens: Vec<i32> = (0..20).map(|i| (i * 31 + 7) % 250).collect();
    let loaded = Lora::load(&golden.model, &out).unwrap();
    let (a, b) = (
        logprobs(&golden.model, Some(&sum), &tokens),
        logprobs(&golden.model, Some(&loaded), &tokens),
    );
    assert_eq!(a, b);
    assert!(relative_error(&a, &logprobs(&golden.model, Some(&golden.lora()), &tokens)) > 1e-3);
}

#[test]
fn training_starts_from_adapters_of_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let file = {
        let path = dir.path().join("run");
        let out = run(&[
            "train",
            "demo",
            "--steps",
            "1",
            "--prompts-per-step",
            "2",
            "--group",
            "2",
            "--rank",
            "8",
            "--eval-problems",
            "2",
            "--internal-steps",
            "0",
            "--out",
            text(&path),
            "--json",
            "--threads",
            "1",
        ]);
        out.unwrap();
        path.join("adapter.gguf")
    };
    let before = AdapterFile::read(&file).unwrap();
    for ty in ["f32", "f16", "bf16", "q8_0"] {
        let (small, out) = (dir.path().join("small.gguf"), dir.path().join(ty));
        let said = run(&["export", "--adapter", text(&file), "--type", ty, "--out", text(&small)])
            .unwrap();
        assert_eq!(said.contains("in f16"), ty == "q8_0", "{said}");
        let gguf = GgufFile::open(&small).unwrap();
        assert_eq!(gguf.tensors()[0].ty.name(), ty);
        run(&[
            "train",
            "demo",
            "--adapter",
            text(&small),
            "--steps",
            "1",
            "--prompts-per-step",
            "2",
            "--group",
            "2",
            "--eval-problems",
            "2",
            "--internal-steps",
            "0",
            "--out",
            text(&out),
            "--threads",
            "1",
            "--lr",
            "1e-30",
        ])
        .unwrap();
        let after = AdapterFile::read(&out.join("adapter.gguf")).unwrap();
        assert_eq!((after.alpha, after.pairs.len()), (before.alpha, before.pairs.len()));
        // A step of no length: the masters are what the file held, in F32.
        for (a, b) in AdapterFile::read(&small).unwrap().pairs.iter().zip(&after.pairs) {
            assert_eq!((&a.weight, a.rank, &a.a), (&b.weight, b.rank, &b.a), "{ty}");
        }
    }
}

/// KL, log-probs and agreement against softmaxes in f64, for models of different types; and 0 for equal ones.
#[test]
fn divergence_is_what_its_formula_says() {
    let (p, q) = (Golden::load("qwen3-f32"), Golden::load("qwen3-q8_0"));
    let (mut engine_p, mut engine_q) = (p.engine(), q.engine());
    let lora = p.lora();
    let n_vocab = p.model.config().n_vocab;
    let mut batch = Batch::default();
    let tokens: Vec<i32> = (0..40).map(|i| (i * 53 + 3) % 250).collect();
    batch.push_group(&tokens[..4], &[&tokens[4..20], &tokens[20..]], n_vocab).unwrap();
    // All log-probs of a model: the scored tokens' log-prob of every target in turn.
    let all = |golden: &Golden, lora: Option<&Lora>| -> Vec<Vec<f64>> {
        let mut engine = golden.engine();
        let policy = Policy::full(golden.model.config().n_layer);
        engine.forward(&golden.model, lora, &batch, policy.depth()).unwrap();
        (0..n_vocab as i32)
            .map(|target| {
                let mut batch = batch.clone();
                batch.scored.iter_mut().for_each(|s| s.target = target);
                let scores = engine.score(&golden.model, lora, &batch, policy, 1.0, false).unwrap();
                scores.logprobs.iter().map(|x| *x as f64).collect()
            })
            .collect()
    };
    let (lp, lq) = (all(&p, Some(&lora)), all(&q, None));
    let mut a = ComparedModel { engine: &mut engine_p, model: &p.model, lora: Some(&lora) };
    let mut b = ComparedModel { engine: &mut engine_q, model: &q.model, lora: None };
    let found = compare(&mut a, &mut b, &batch).unwrap();
    assert_eq!(found.kl_nats.len(), batch.scored.len());
    let mut agreed = 0.0;
    for (i, s) in batch.scored.iter().enumerate() {
        let (p, q): (Vec<f64>, Vec<f64>) = (0..n_vocab).map(|v| (lp[v][i], lq[v][i])).unzip();
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        assert!((found.kl_nats[i] as f64 - kl).abs() < 1e-4 * kl.max(0.01), "{i}: {kl}");
        let target = s.target as usize;
        assert!((found.logprob_p[i] as f64 - p[target]).abs() < 1e-5, "{i}");
        assert!((found.logprob_q[i] as f64 - q[target]).abs() < 1e-5, "{i}");
        let best = |x: &[f64]| (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap();
        assert_eq!(found.agree[i], (best(&p) == best(&q)) as u8 as f32, "{i}");
        agreed += found.agree[i];
    }
    assert!((agreed as usize) < batch.scored.len(), "these models disagree");
    // A model and itself.
    let mut again = p.engine();
    let mut c = ComparedModel { engine: &mut again, model: &p.model, lora: Some(&lora) };
    let same = compare(&mut a, &mut c, &batch).unwrap();
    assert!(same.kl_nats.iter().all(|kl| *kl == 0.0) && same.agree.iter().all(|x| *x == 1.0));
}

#[test]
fn diff_and_check_report_what_a_merge_costs() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (golden("qwen3-q8_0.gguf"), golden("qwen3-q8_0.lora.gguf"));
    let rows = dir.path().join("rows.jsonl");
    let golden = Golden::load("qwen3-q8_0");
    let lines: String = golden
        .rollouts()
        .iter()
        .map(|row| {
            let completions: Vec<_> =
                row.completions.iter().map(|c| serde_json::json!({"tokens": c})).collect();
            let row = serde_json::json!({"prompt_tokens": row.prompt, "completions": completions});
            format!("{row}\n")
        })
        .collect();
    std::fs::write(&rows, lines).unwrap();
    let json = |args: &[&str]| -> Value { serde_json::from_str(&run(args).unwrap()).unwrap() };
    let out = dir.path().join("merged.gguf");
    let report = json(&[
        "export",
        text(&base),
        "--adapter",
        text(&adapter),
        "--out",
        text(&out),
        "--check",
        text(&rows),
        "--json",
        "--threads",
        "1",
    ]);
    let check = &report["check"];
    let kl = check["kl_mean_nats"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.05, "{check}");
    assert!(check["kl_max_nats"].as_f64().unwrap() >= kl);
    assert!(check["top1_agreement"].as_f64().unwrap() > 0.8, "{check}");
    assert!((check["perplexity_ratio"].as_f64().unwrap() - 1.0).abs() < 0.05, "{check}");
    assert!(check["accuracy_a"].is_null());
    // The same by `diff`; and the base alone is much further away.
    let diff = |b: &Path, more: &[&str]| {
        let all = ["diff", text(&base), text(b), "--data", text(&rows), "--json", "--threads", "1"];
        json(&[&all[..], more].concat())
    };
    let same = diff(&out, &["--adapter-a", text(&adapter)]);
    assert_eq!(&same, check);
    let far = diff(&base, &["--adapter-a", text(&adapter)]);
    assert!(far["kl_mean_nats"].as_f64().unwrap() > 5.0 * kl, "{far}");
    let none = diff(&base, &["--adapter-a", text(&adapter), "--adapter-b", text(&adapter)]);
    assert_eq!((&none["kl_max_nats"], &none["top1_agreement"]), (&0.0.into(), &1.0.into()));
    // Other vocabularies cannot be compared.
    let error = run(&["diff", text(&base), "demo", "--data", text(&rows)]).unwrap_err();
    assert!(error.contains("compare models of one family"), "{error}");
    // Problems are answered and judged on both sides, with the same random numbers.
    let demo = json(&[
        "diff",
        "demo",
        "demo",
        "--data",
        "task:add",
        "--rows",
        "6",
        "--json",
        "--threads",
        "1",
    ]);
    assert_eq!(demo["accuracy_a"], demo["accuracy_b"]);
    assert!(demo["accuracy_a"].is_number() && demo["kl_max_nats"] == 0.0, "{demo}");
}

#[test]
fn types_of_adapters_fall_back_aloud() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a.gguf");
    let mut file = AdapterFile::read(&golden("qwen3-f32.lora.gguf")).unwrap();
    let fallen = file.write_as(&out, Type::Q8_0).unwrap();
    assert!(fallen.iter().all(|name| name.ends_with(".lora_b")), "{fallen:?}");
    let again = GgufFile::open(&out).unwrap();
    assert_eq!(again.tensor(&fallen[0]).unwrap().ty, Type::F16);
    // Beyond the range of F16: an error that names the tensor, and no file.
    std::fs::remove_file(&out).unwrap();
    file.pairs[0].a[0] = 1e6;
    let error = file.write_as(&out, Type::F16).unwrap_err().to_string();
    assert!(error.contains(".lora_a' in f16") && error.contains("use f32 or bf16"), "{error}");
    assert!(!out.exists());
    let error = run(&["export", "--adapter", "x.gguf", "--type", "q4_0", "--out", text(&out)]);
    assert!(error.unwrap_err().contains("supported: f32, f16, bf16, q8_0"));
    // The library's two halves agree, too.
    let base = PeftBase::from_gguf(&GgufFile::open(&golden("llama-f32.gguf")).unwrap()).unwrap();
    let llama = AdapterFile::read(&golden("llama-f32.lora.gguf")).unwrap();
    write_peft(&llama, &base, "llama", dir.path()).unwrap();
    assert_eq!(read_peft(dir.path(), &base).unwrap().pairs, llama.pairs);
}

//! Mixtures of experts: the same experts in rollout and update, adapters on experts in rollouts and merges, and what is
//! refused.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bupo_gguf::Model;
use bupo_gguf::export::{AdapterSpec, MergeOptions, Merger};
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::gguf::{AdapterFile, GgufFile, GgufWriter, Value};
use bupo_gguf::model::{Batch, Engine, Lora, Policy, Targets};
use bupo_gguf::rollout::{Completion, Request, RolloutOptions, Rollouts, Sampling};
use common::{Golden, folder_of, relative_error};

const PROMPT: [i32; 6] = [11, 48, 85, 122, 159, 196];

/// Completions of two prompts, decoded side by side.
fn completions(golden: &Golden, lora: Option<&mut Lora>) -> Vec<Vec<Completion>> {
    let pool = Arc::new(ThreadPool::new(2).unwrap());
    let options = RolloutOptions { n_ctx_seq: 32, kv_bytes: 8 << 20 };
    let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
    rollouts.keep_experts();
    if let Some(lora) = lora {
        rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
    }
    let request = |n, seed_stream, prompt: &[i32]| Request {
        prompt_tokens: prompt.to_vec(),
        n,
        seed_stream,
        max_tokens: 9,
    };
    let requests = [request(5, 0, &PROMPT), request(2, 1, &PROMPT[..3])];
    let (sampling, stop) = (Sampling::default(), AtomicBool::new(false));
    rollouts.generate(&requests, &sampling, 1, &mut |_| (), &stop).unwrap()
}

/// The completions of the first prompt, with the experts that each of its tokens took.
fn batch_of(golden: &Golden, completions: &[Completion]) -> Batch {
    let config = golden.model.config();
    let one = config.n_layer * config.layer(1).experts.unwrap().used;
    let mut batch = Batch::default();
    let tokens: Vec<&[i32]> = completions.iter().map(|c| c.tokens.as_slice()).collect();
    batch.push_group(&PROMPT, &tokens, config.n_vocab).unwrap();
    let prompt = PROMPT.len() * one;
    let mut experts: Vec<i16> = completions[0].experts[..prompt].to_vec();
    completions.iter().for_each(|c| experts.extend(&c.experts[prompt..]));
    experts.chunks(one).for_each(|token| batch.push_experts(config.n_layer, token));
    batch
}

fn logprobs(golden: &Golden, engine: &mut Engine, lora: Option<&Lora>, batch: &Batch) -> Vec<f32> {
    let policy = Policy::full(golden.model.config().n_layer);
    engine.forward(&golden.model, lora, batch, policy.depth()).unwrap();
    engine.score(&golden.model, lora, batch, policy, 1.0, false).unwrap().logprobs
}

/// Of F32 weights both engines choose the same experts; what rollouts kept says so for every token and layer.
#[test]
fn rollouts_keep_the_experts_that_tokens_took() {
    for case in ["qwen3moe-f32", "gpt-oss-f32", "olmoe-f32"] {
        let golden = Golden::load(case);
        let config = golden.model.config();
        let all = completions(&golden, None);
        let one = config.n_layer * config.layer(1).experts.unwrap().used;
        for (group, prompt) in all.iter().zip([PROMPT.len(), 3]) {
            for c in group {
                assert_eq!(c.experts.len(), one * (prompt + c.tokens.len() - 1), "{case}");
            }
        }
        let batch = batch_of(&golden, &all[0]);
        let mut engine = golden.engine();
        logprobs(&golden, &mut engine, None, &batch);
        let share = engine.rerouted().expect("the batch says which");
        println!("{case}: {share} of tokens and layers differ");
        // Keys and values are F16 in rollouts, which may tip a near tie.
        assert!(share < 0.03, "{case}: {share}");
    }
}

#[test]
fn an_update_takes_the_experts_that_it_is_told() {
    let golden = Golden::load("qwen3moe-q8_0");
    let all = completions(&golden, None);
    let mut batch = batch_of(&golden, &all[0]);
    let mut engine = golden.engine();
    let own = logprobs(&golden, &mut engine, None, &batch);
    let share = engine.rerouted().unwrap();
    println!("qwen3moe-q8_0: {share} of tokens and layers differ");
    // Told what it chooses itself, it computes the same bits.
    let mut same = batch.clone();
    same.experts.clear();
    assert_eq!(logprobs(&golden, &mut engine, None, &same), own);
    assert_eq!(engine.rerouted(), None);
    batch.replays = true;
    let replayed = logprobs(&golden, &mut engine, None, &batch);
    assert_eq!(engine.rerouted(), Some(share), "what it would have chosen is counted");
    // Told others, something else.
    for layer in &mut batch.experts {
        layer.chunks_mut(2).for_each(|token| token.copy_from_slice(&[0.0, 1.0]));
    }
    let others = logprobs(&golden, &mut engine, None, &batch);
    assert!(engine.rerouted().unwrap() > 0.5);
    assert!(relative_error(&others, &replayed) > 0.05);
    // And a gradient reaches the experts that were told alone.
    let mut lora = Lora::new(&golden.model, &"experts".parse().unwrap(), 2, 4.0, 1).unwrap();
    (0..lora.tensors().len()).for_each(|i| lora.tensors_mut().values_mut(i).fill(0.1));
    let policy = Policy::full(golden.model.config().n_layer);
    engine.forward_to_train(&golden.model, &lora, &batch, policy.depth()).unwrap();
    engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, true).unwrap();
    let mut gradients = lora.zeros_like().unwrap();
    let cotangents = vec![1.0; batch.scored.len()];
    engine.backward(&golden.model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
    for i in 0..gradients.len() {
        let values = gradients.values(i);
        let experts: Vec<bool> =
            values.chunks(values.len() / 8).map(|e| e.iter().any(|g| *g != 0.0)).collect();
        assert_eq!(experts, [1, 1, 0, 0, 0, 0, 0, 0].map(|n| n == 1), "{}", lora.tensor_name(i));
    }
}

/// llama.cpp decodes with the very tensors that are trained, of each expert too.
#[test]
fn a_live_adapter_of_experts_is_decoded_with() {
    let golden = Golden::load("olmoe-f32");
    let mut lora = golden.lora();
    let all = completions(&golden, Some(&mut lora));
    let batch = batch_of(&golden, &all[0]);
    let mut engine = golden.engine();
    let ours = logprobs(&golden, &mut engine, Some(&lora), &batch);
    let theirs: Vec<f32> = all[0].iter().flat_map(|c| c.logprobs.clone()).collect();
    let error = relative_error(&theirs, &ours);
    assert!(error < 2e-2, "keys and values are F16 in rollouts: {error}");
    let base = logprobs(&golden, &mut engine, None, &batch);
    assert!(relative_error(&base, &ours) > 0.05, "the adapter has a say");
}

#[test]
fn experts_and_routers_are_adapted_if_asked() {
    let golden = Golden::load("qwen3moe-q8_0");
    let of = |words: &str| {
        let targets: Targets = words.parse().unwrap();
        Lora::new(&golden.model, &targets, 2, 4.0, 1).unwrap().slots().len()
    };
    assert_eq!((of("all"), of("q,experts"), of("router")), (16, 16, 4));
    let error = "shared".parse::<Targets>().unwrap().of(golden.model.maps()).unwrap_err();
    assert!(error.to_string().contains("experts, router"), "{error}");
}

/// Merged experts in the base's own type are near to base and adapter.
#[test]
fn a_merge_goes_into_the_stacks() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged.gguf");
    let golden = Golden::load("qwen3moe-q8_0");
    let spec = AdapterSpec { path: golden.lora_path(), factor: 1.0 };
    let base = folder_of("qwen3moe-q8_0").join("qwen3moe-q8_0.gguf");
    let merger = Merger::new(&base, "base", &[spec], None).unwrap();
    let options = MergeOptions {
        ty: "keep".parse().unwrap(),
        only_adapted: false,
        plain_rounding: false,
        keep_delta: None,
        split_max_bytes: None,
    };
    let report = merger.write(&out, &options, &mut |_, _| ()).unwrap();
    let stacks = report.converted.iter().filter(|t| t.name.contains("_exps."));
    let stacks: Vec<_> = stacks.collect();
    assert_eq!(stacks.len(), 12);
    assert!(stacks.iter().all(|t| t.from == t.to && t.delta_kept.unwrap() > 0.9), "{stacks:?}");
    let mut merged = Golden::load("qwen3moe-q8_0");
    merged.model = Model::open(&out).unwrap();
    let tokens = golden.ints("entropy_tokens");
    let mut batch = Batch::default();
    batch.push_group(&tokens[..1], &[&tokens[1..]], golden.model.config().n_vocab).unwrap();
    let (mut engine, lora) = (golden.engine(), golden.lora());
    let with = logprobs(&golden, &mut engine, Some(&lora), &batch);
    let base = logprobs(&golden, &mut engine, None, &batch);
    let got = logprobs(&merged, &mut merged.engine(), None, &batch);
    assert!(relative_error(&got, &with) < 0.2 * relative_error(&base, &with));
}

/// The file with one value of its metadata changed.
fn changed(key: &str, value: Value, out: &Path) {
    let file = GgufFile::open(&folder_of("qwen3moe-q8_0").join("qwen3moe-q8_0.gguf")).unwrap();
    let mut writer = GgufWriter::new();
    for (name, old) in file.metadata() {
        writer.metadata(name, if name == key { value.clone() } else { old.clone() }).unwrap();
    }
    for tensor in file.tensors() {
        let bytes = file.bytes(tensor).to_vec();
        writer
            .tensor(&tensor.name, tensor.ty, &tensor.shape, move |out| out.write(&bytes))
            .unwrap();
    }
    std::fs::write(out, writer.to_bytes().unwrap()).unwrap();
}

#[test]
fn what_does_not_fit_is_refused_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let refused = |error: String, words: &[&str]| {
        assert!(words.iter().all(|w| error.contains(w)) && !error.contains('\n'), "{error}");
    };
    for (key, value, words) in [
        ("expert_used_count", 9, &["expert_used_count", "1 to 8", "9"][..]),
        ("expert_used_count", 0, &["expert_used_count", "1 to 8", "0"]),
        ("expert_count", 0, &["expert_count", "1 to 1024", "0"]),
        ("expert_count", 4096, &["expert_count", "1 to 1024", "4096"]),
        // The router and the experts are for 8.
        ("expert_count", 7, &["m.gguf"]),
        ("expert_feed_forward_length", 0, &["expert_feed_forward_length", "0"]),
    ] {
        changed(&format!("qwen3moe.{key}"), Value::U32(value), &path);
        let error = Model::open(&path).err().unwrap_or_else(|| panic!("{key} = {value}"));
        refused(error.to_string(), words);
    }
    // An adapter for fewer experts, and one for experts of a dense model.
    let golden = Golden::load("qwen3moe-q8_0");
    let mut file = AdapterFile::read(&golden.lora_path()).unwrap();
    for pair in file.pairs.iter_mut().filter(|pair| pair.n_expert == 8) {
        pair.n_expert = 4;
        pair.a.truncate(pair.a.len() / 2);
        pair.b.truncate(pair.b.len() / 2);
    }
    let error = Lora::from_file(&golden.model, file.clone(), "a.gguf").err().unwrap().to_string();
    refused(error, &["a.gguf: blk.0.ffn_gate_exps.weight", "of 8 experts", "of 4 experts"]);
    let adapter = dir.path().join("a.gguf");
    file.write(&adapter).unwrap();
    let spec = AdapterSpec { path: adapter, factor: 1.0 };
    let base = folder_of("qwen3moe-q8_0").join("qwen3moe-q8_0.gguf");
    let error = Merger::new(&base, "base", &[spec], None).err().unwrap().to_string();
    refused(error, &["ffn_", "_exps.weight", "8]", "4]"]);
    let dense = Golden::load("qwen3-f32");
    file.arch = "qwen3".into();
    let error = Lora::from_file(&dense.model, file, "a.gguf").err().unwrap().to_string();
    refused(error, &["a.gguf"]);
}

//! Models as llama.cpp reads them: rope scaling, chat templates, what is refused.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bupo_gguf::Model;
use bupo_gguf::data::{ChatTemplate, Message};
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::gguf::{Array, GgufFile, GgufWriter, Value};
use bupo_gguf::llama::{Context, ContextOptions, Products, Token, TokenBatch, chat_apply_template};
use bupo_gguf::model::{Batch, Engine, Policy};
use common::relative_error;

/// A copy of a golden model with more metadata.
fn with_metadata(case: &str, dir: &Path, extra: &[(&str, Value)]) -> PathBuf {
    let file = GgufFile::open(&common::folder_of(case).join(format!("{case}.gguf"))).unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in file.metadata() {
        if extra.iter().all(|(k, _)| *k != key) {
            writer.metadata(key, value.clone()).unwrap();
        }
    }
    for (key, value) in extra {
        writer.metadata(key, value.clone()).unwrap();
    }
    for tensor in file.tensors() {
        let bytes = file.bytes(tensor);
        writer.tensor(&tensor.name, tensor.ty, &tensor.shape, move |out| out.write(bytes)).unwrap();
    }
    let path = dir.join(format!("{case}-changed.gguf"));
    writer.write(&path).unwrap();
    path
}

/// Log-probs of each next token by our exact forward and by llama.cpp's decode with F32 keys.
fn both_logprobs(path: &Path) -> (Vec<f32>, Vec<f32>) {
    let model = Model::open(path).unwrap();
    let pool = Arc::new(ThreadPool::new(2).unwrap());
    let tokens: Vec<i32> = (0..90).map(|i| 33 + (i * 37) % 200).collect();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..1], &[&tokens[1..]], model.config().n_vocab).unwrap();
    let policy = Policy::full(model.config().n_layer);
    let mut engine = Engine::new(pool.clone()).unwrap();
    engine.forward(&model, None, &batch, policy.depth()).unwrap();
    let ours = engine.score(&model, None, &batch, policy, 1.0, false).unwrap().logprobs;

    // Longer than the context of the scaling's origin, so that YaRN has its say.
    let options = ContextOptions {
        n_ctx_seq: 128,
        n_seq: 1,
        n_batch: 1,
        kv_f32: true,
        products: Products::Ggml,
        experts: false,
    };
    let mut context = Context::new(model.engine(), &pool, options).unwrap();
    let mut theirs = Vec::new();
    for (i, pair) in tokens.windows(2).enumerate() {
        let token = Token { id: pair[0], position: i as i32, sequence: 0, logits: true };
        context.decode(&TokenBatch(vec![token])).unwrap();
        let logits = context.logits(0);
        let max = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
        let sum: f64 = logits.iter().map(|&l| (l as f64 - max).exp()).sum();
        theirs.push((logits[pair[1] as usize] as f64 - max - sum.ln()) as f32);
    }
    (ours, theirs)
}

/// Logits after the last token of each of `n` sequences, of different lengths, that decode in step.
fn last_logits(
    model: &Model,
    (products, kv_f32): (Products, bool),
    threads: usize,
    n: usize,
) -> Vec<Vec<f32>> {
    let pool = Arc::new(ThreadPool::new(threads).unwrap());
    let options =
        ContextOptions { n_ctx_seq: 256, n_seq: n, n_batch: 256, kv_f32, products, experts: false };
    let mut context = Context::new(model.engine(), &pool, options).unwrap();
    let token = |position: usize, sequence: usize, logits| Token {
        id: (33 + (position * 37 + sequence * 11) % 200) as i32,
        position: position as i32,
        sequence: sequence as i32,
        logits,
    };
    let prompt = |sequence: usize| 1 + sequence * 29 % 100;
    for s in 0..n {
        let prompt = (0..prompt(s)).map(|i| token(i, s, false)).collect();
        context.decode(&TokenBatch(prompt)).unwrap();
    }
    for step in 0..3 {
        let batch = (0..n).map(|s| token(prompt(s) + step, s, true)).collect();
        context.decode(&TokenBatch(batch)).unwrap();
    }
    (0..n).map(|s| context.logits(s).to_vec()).collect()
}

/// ggml rounds queries and sums of values to F16, ours nothing but what the cache holds; heads share keys by two and more,
/// windows hide some of them.
#[test]
fn attention_of_many_sequences_is_nearer_to_f32_than_ggmls() {
    for case in ["llama-f32", "qwen2-f32", "qwen3-f32", "archs/gemma3-f32", "archs/olmo2-q8_0"] {
        let path = common::golden_dir().join(format!("{case}.gguf"));
        let model = Model::open(&path).unwrap();
        let decode = |products, threads, n| last_logits(&model, (products, false), threads, n);
        // With an F32 cache llama.cpp computes attention in F32 products and a softmax.
        let exact = last_logits(&model, (Products::Exact, true), 2, 6).concat();
        let ours = decode(Products::Exact, 2, 6);
        let errors = [decode(Products::Ggml, 2, 6).concat(), ours.concat()]
            .map(|logits| relative_error(&logits, &exact));
        println!("{case}: {:.1e} by ggml, {:.1e} by ours", errors[0], errors[1]);
        assert!(errors[1] < 3e-3 && errors[1] < errors[0], "{case}: {errors:?}");
        // Neither the threads nor who else decodes change a bit.
        assert!(ours == decode(Products::Exact, 5, 6), "{case}: by threads");
        assert!(ours[..5] == decode(Products::Exact, 1, 5)[..], "{case}: by the other sequences");
    }
}

#[test]
fn rope_scaling_is_llama_cpps() {
    let dir = tempfile::tempdir().unwrap();
    for (case, arch) in [("qwen3-f32", "qwen3"), ("llama-f32", "llama"), ("qwen2-f32", "qwen2")] {
        let mut seen: Vec<Vec<f32>> = Vec::new();
        for (kind, factor) in [("none", 4.0f32), ("linear", 2.0), ("yarn", 4.0), ("yarn", 1.5)] {
            let key = |name: &str| format!("{arch}.rope.scaling.{name}");
            let (ty, scale, origin) = (key("type"), key("factor"), key("original_context_length"));
            let extra = [
                (ty.as_str(), Value::String(kind.into())),
                (scale.as_str(), Value::F32(factor)),
                (origin.as_str(), Value::U32(32)),
            ];
            let (ours, theirs) = both_logprobs(&with_metadata(case, dir.path(), &extra));
            let error = relative_error(&ours, &theirs);
            assert!(error < 1e-4, "{case} {kind} {factor}: {error}");
            assert!(
                seen.iter().all(|s| relative_error(s, &ours) > 1e-3),
                "{kind} changes something"
            );
            seen.push(ours);
        }
    }
}

#[test]
fn unknown_rope_scaling_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let extra = [("qwen3.rope.scaling.type", Value::String("dizzy".into()))];
    let path = with_metadata("qwen3-f32", dir.path(), &extra);
    let error = Model::open(&path).err().expect("refused").to_string();
    assert!(error.contains("'dizzy' is not supported") && error.contains("yarn"), "{error}");
}

/// What llama.cpp divides by, trusts or asserts in models with recurrent layers, and a pattern of layers that the tensors
/// contradict.
#[test]
fn delta_nets_that_do_not_fit_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let sections = |sizes: [i32; 4]| Value::from(Array::from(&sizes[..]));
    let pattern: Vec<i32> = vec![1, 1, 0, 1];
    for (key, value, said) in [
        ("ssm.time_step_rank", Value::U32(3), "a multiple of ssm.group_count, 2"),
        ("ssm.group_count", Value::U32(0), "1 to"),
        ("ssm.inner_size", Value::U32(60), "64, 4 heads of 16"),
        ("ssm.state_size", Value::U32(0), "1 to"),
        ("ssm.conv_kernel", Value::U32(9), "1 to 8"),
        ("ssm.conv_kernel", Value::U32(1), "2 to 8"),
        ("rope.dimension_sections", sections([4, 0, 0, 0]), "take turns over 4 pairs"),
        ("rope.dimension_sections", sections([0, 0, 0, 0]), "take turns over 4 pairs"),
        ("full_attention_interval", Value::U32(0), "1 to"),
        ("full_attention_interval", Value::U32(3), "tensor blk.2.ssm_out.weight"),
        ("full_attention_interval", Value::U32(5), "tensor blk.3.attn_output.weight"),
        ("attention.recurrent_layers", Array::from(&pattern[..]).into(), "blk.2.ssm_out.weight"),
        ("attention.recurrent_layers", Array::from(&pattern[..3]).into(), "4 times true or false"),
        ("nextn_predict_layers", Value::U32(4), "0 to 3"),
    ] {
        let full = format!("qwen35.{key}");
        let path = with_metadata("qwen35-f32", dir.path(), &[(&full, value.clone())]);
        let error = Model::open(&path).err().unwrap_or_else(|| panic!("{key} {value}")).to_string();
        assert!(error.contains(&full) && error.contains(said), "{key} {value}: {error}");
    }
    // The same pattern in words is taken.
    let same: Vec<i32> = vec![1, 1, 1, 0];
    let extra = [("qwen35.attention.recurrent_layers", Array::from(&same[..]).into())];
    let model = Model::open(&with_metadata("qwen35-f32", dir.path(), &extra)).unwrap();
    let mixers = model.config().mixers();
    assert_eq!(mixers, ["delta net", "delta net", "delta net", "attention"]);
}

#[test]
fn our_chat_rendering_is_llama_cpps() {
    let model = Model::open("demo".as_ref()).unwrap();
    let template = model.engine().chat_template().expect("the demo model has one");
    let ours = ChatTemplate::new(&template, "<|endoftext|>", "<|im_end|>").unwrap();
    let conversations: [&[(&str, &str)]; 3] = [
        &[("user", "1+2=")],
        &[("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "17 + 25?")],
        &[("user", "braces {{ x }} and\nlines")],
    ];
    for conversation in conversations {
        for open in [true, false] {
            let messages: Vec<Message> = conversation
                .iter()
                .map(|(role, content)| Message { role: (*role).into(), content: (*content).into() })
                .collect();
            let pairs: Vec<(String, String)> = conversation
                .iter()
                .map(|(role, content)| ((*role).into(), (*content).into()))
                .collect();
            let theirs = chat_apply_template(&template, &pairs, open).unwrap();
            assert_eq!(ours.render(&messages, open).unwrap(), theirs);
        }
    }
}

//! What training promises of its insides: shared tensors, truncation, bounded memory, honest checks.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bupo_gguf::ggml::{Device, ThreadPool, Type};
use bupo_gguf::llama::Products;
use bupo_gguf::model::{Batch, Engine, Lora, Model, Policy, Targets};
use bupo_gguf::ops;
use bupo_gguf::rollout::{Request, RolloutOptions, Rollouts, Sampling};
use bupo_gguf::train::{Algorithm, LayerChoice, Silent};
use bupo_gguf::{TrainConfig, Trainer};
use common::{Golden, relative_error};

fn small() -> TrainConfig {
    TrainConfig {
        prompts_per_step: 4,
        group: 4,
        eval_problems: 8,
        rank: 4,
        threads: Some(2),
        kv_mib: Some(64),
        ..TrainConfig::default()
    }
}

fn greedy_logprobs(rollouts: &mut Rollouts, prompt: &[i32]) -> Vec<f32> {
    let request = Request { prompt_tokens: prompt.to_vec(), n: 1, seed_stream: 0, max_tokens: 6 };
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let stop = AtomicBool::new(false);
    let mut groups = rollouts.generate(&[request], &sampling, 1, &mut |_| (), &stop).unwrap();
    groups.remove(0).remove(0).logprobs
}

#[test]
fn tokens_drawn_in_the_graph_are_those_drawn_from_the_logits() {
    let model = Model::open("demo".as_ref()).unwrap();
    let pool = Arc::new(ThreadPool::new(1).unwrap());
    let mut lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
    lora.tensors_mut().values_mut(1).iter_mut().for_each(|b| *b = 0.03);
    let row = model.config().n_embd; // any number of tokens below the vocabulary
    let prompt = |i: usize| (0..5 + 3 * i).map(|t| ((t * 37 + i * 11) % row) as i32).collect();
    let requests: Vec<Request> = (0..3)
        .map(|i| Request {
            prompt_tokens: prompt(i),
            n: 5,
            seed_stream: i as u64,
            max_tokens: 12 + i,
        })
        .collect();
    // Four sequences for fifteen completions: slots are taken again, and holes closed.
    let sequence = 256 * model.engine().kv_token_bytes().unwrap();
    let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 4 * sequence };
    let stop = AtomicBool::new(false);
    let mut generate = |in_graph: bool, sampling: &Sampling| {
        let mut rollouts = Rollouts::new(model.engine(), &pool, options).unwrap();
        if in_graph {
            rollouts.draw_in_graph();
        }
        assert_eq!(rollouts.n_seq(), 4);
        rollouts.set_adapter(Some(lora.live(&model).unwrap())).unwrap();
        // Twice, and with the memory given back between: the same again.
        let first = rollouts.generate(&requests, sampling, 7, &mut |_| (), &stop).unwrap();
        rollouts.release();
        let again = rollouts.generate(&requests, sampling, 7, &mut |_| (), &stop).unwrap();
        assert_eq!(first, again);
        first
    };
    for sampling in [
        Sampling::default(),
        Sampling { temperature: 0.6, ..Sampling::default() },
        // Chosen from the logits in either case.
        Sampling { top_k: 5, ..Sampling::default() },
        Sampling { temperature: 0.0, ..Sampling::default() },
    ] {
        let (host, graph) = (generate(false, &sampling), generate(true, &sampling));
        let all = |groups: Vec<Vec<bupo_gguf::rollout::Completion>>| -> (Vec<Vec<i32>>, Vec<f32>) {
            let tokens = groups.iter().flatten().map(|c| c.tokens.clone()).collect();
            (tokens, groups.iter().flatten().flat_map(|c| c.logprobs.clone()).collect())
        };
        let ((want, want_logprobs), (got, got_logprobs)) = (all(host), all(graph));
        assert!(want.iter().map(Vec::len).sum::<usize>() > 60, "{want:?}");
        assert_eq!(want, got, "{sampling:?}");
        for (want, got) in want_logprobs.iter().zip(&got_logprobs) {
            assert!((want - got).abs() < 1e-4, "{sampling:?}: {want} {got}");
        }
    }
}

#[test]
fn turns_in_a_budget_change_nothing_but_the_memory() {
    use bupo_gguf::ggml::Device;
    use bupo_gguf::model::Placement;
    // A GPU's kernels on the host: with a budget, rollouts and updates take turns.
    let placement = Placement { device: Device::Emulated { precise: true }, gpu_layers: None };
    let model = Model::open_on(&common::golden_dir().join("qwen3-f32.gguf"), placement).unwrap();
    let adapter = |vram: Option<&str>| {
        let config = TrainConfig {
            vram: vram.map(|size| size.parse().unwrap()),
            micro_batch_tokens: Some(96),
            data: "task:max".into(),
            prompts: bupo_gguf::rollout::PromptOptions {
                template: "plain".into(),
                ..Default::default()
            },
            prompts_per_step: 2,
            group: 2,
            max_response: Some(8),
            rank: 2,
            internal_steps: Some(1),
            ..small()
        };
        let mut trainer = Trainer::new(&model, config).unwrap();
        for step in 1..=2 {
            trainer.step(step, &mut Silent).unwrap();
        }
        let tensors = trainer.lora().tensors();
        (0..tensors.len()).flat_map(|i| tensors.values(i).to_vec()).collect::<Vec<_>>()
    };
    assert_eq!(adapter(None), adapter(Some("1GiB")));
}

#[test]
fn one_optimiser_step_changes_the_next_decode_with_no_file_between() {
    // A file of its own, for other tests of this process map the fixture.
    let mut golden = Golden::load("qwen3-f32");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mapped-once.gguf");
    std::fs::copy(common::golden_dir().join("qwen3-f32.gguf"), &path).unwrap();
    golden.model = Model::open(&path).unwrap();
    let mut lora = golden.lora();
    let pool = Arc::new(ThreadPool::new(2).unwrap());
    let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 26 };
    let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
    let prompt = &golden.rollouts()[0].prompt;
    let base = greedy_logprobs(&mut rollouts, prompt);
    rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
    let before = greedy_logprobs(&mut rollouts, prompt);
    assert_ne!(base, before, "the adapter has a say");
    assert_eq!(before, greedy_logprobs(&mut rollouts, prompt), "and nothing else has");
    for value in lora.tensors_mut().values_mut(1).iter_mut() {
        *value += 0.05;
    }
    assert_ne!(before, greedy_logprobs(&mut rollouts, prompt), "the tensors are the same ones");
    // The weights are shared too: the training graph reads the addresses that decoding reads.
    let weights = golden.model.weights();
    let engine = golden.model.engine();
    let decoding = engine.tensors().find(|t| t.name() == "blk.0.attn_q.weight").unwrap();
    let training = weights.find("blk.0.attn_q.weight").unwrap();
    assert_eq!(format!("{:p}", decoding.address()), format!("{:p}", training.address()));
    #[cfg(target_os = "linux")]
    {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter(|l| l.ends_with("mapped-once.gguf")).count();
        assert_eq!(mapped, 1, "the file is mapped once");
    }
}

/// For every kind of memory that llama.cpp has: keys and values of all tokens, of windows, and states. With one sequence a
/// completion starts from where its group's last one ended, with many from a copy, and holes are closed.
#[test]
fn as_many_sequences_as_there_is_room_for_give_the_same_completions() {
    for case in ["qwen3-f32", "gemma3-f32", "qwen35-f32"] {
        let golden = Golden::load(case);
        let (model, pool) = (&golden.model, Arc::new(ThreadPool::new(2).unwrap()));
        let mut lora = golden.lora();
        let n_vocab = model.config().n_vocab;
        // One prompt longer than a chunk of the delta rule.
        let prompt = |i: usize| -> Vec<i32> {
            (0..3 + 31 * i).map(|t| ((t * 37 + i * 11) % n_vocab) as i32).collect()
        };
        let requests: Vec<Request> = [3, 1, 5, 4]
            .into_iter()
            .enumerate()
            .map(|(i, n)| Request {
                prompt_tokens: prompt(i),
                n,
                seed_stream: i as u64,
                max_tokens: 6 + 3 * i,
            })
            .collect();
        let stop = AtomicBool::new(false);
        let mut with = |n: usize, in_graph: bool| {
            let options = RolloutOptions { n_ctx_seq: 128, kv_bytes: usize::MAX };
            let options = options.at_most(n, model.engine()).unwrap();
            let mut rollouts = Rollouts::new(model.engine(), &pool, options).unwrap();
            rollouts.keep_f32();
            if in_graph {
                rollouts.draw_in_graph();
            }
            assert_eq!(rollouts.n_seq(), n, "{case}");
            rollouts.set_adapter(Some(lora.live(model).unwrap())).unwrap();
            let sampling = Sampling::default();
            let all = rollouts.generate(&requests, &sampling, 7, &mut |_| (), &stop).unwrap();
            let again = rollouts.generate(&requests, &sampling, 7, &mut |_| (), &stop).unwrap();
            assert_eq!(all, again, "{case}: {n} sequences");
            all
        };
        let one = with(1, false);
        assert_eq!(one.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 5, 4]);
        // ggml looks GELU up in a table of half floats, where a last bit may move a value by 2^-11.
        let most = if case.starts_with("gemma") { 5e-3 } else { 1e-4 };
        for (n, in_graph) in [(2, false), (13, false), (5, true)] {
            let many = with(n, in_graph);
            let mut off = 0f32;
            for (one, many) in one.iter().flatten().zip(many.iter().flatten()) {
                assert_eq!(one.tokens, many.tokens, "{case}: {n} sequences");
                let pairs = one.logprobs.iter().zip(&many.logprobs);
                off = pairs.fold(off, |off, (a, b)| off.max((a - b).abs()));
            }
            println!("{off:.1e} of {most:.0e}  {case}, {n} sequences");
            assert!(off < most, "{case}: {n} sequences, {off} nats");
        }
    }
}

#[test]
fn rollout_logprobs_are_the_trainers() {
    for case in ["qwen3-f32", "qwen35-f32"] {
        check_drift(case);
    }
}

fn check_drift(case: &str) {
    // F32 weights; the KV cache of rollouts is F16, whose rounding (2^-11) is the bound's origin.
    let golden = Golden::load(case);
    let (mut engine, mut lora) = (golden.engine(), golden.lora());
    let pool = Arc::new(ThreadPool::new(2).unwrap());
    let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 26 };
    let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
    rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
    let prompt = golden.rollouts()[0].prompt.clone();
    let request = Request { prompt_tokens: prompt.clone(), n: 5, seed_stream: 3, max_tokens: 12 };
    let stop = AtomicBool::new(false);
    for temperature in [1.0, 0.7] {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let sampled = rollouts
            .generate(std::slice::from_ref(&request), &sampling, 1, &mut |_| (), &stop)
            .unwrap();
        let tokens: Vec<&[i32]> = sampled[0].iter().map(|c| c.tokens.as_slice()).collect();
        let mut batch = Batch::default();
        batch.push_group(&prompt, &tokens, golden.model.config().n_vocab).unwrap();
        let policy = Policy::full(golden.model.config().n_layer);
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        let ours =
            engine.score(&golden.model, Some(&lora), &batch, policy, temperature, false).unwrap();
        let theirs: Vec<f32> = sampled[0].iter().flat_map(|c| c.logprobs.clone()).collect();
        let error = relative_error(&ours.logprobs, &theirs);
        println!("{error:.1e} of 5e-3  {case}");
        assert!(error < 5e-3, "{case}, temperature {temperature}: {error}");
    }
}

/// With exact products rollouts round keys and values to F16 and nothing else; with ggml's, activations to 8 bits; with the quick ones of
/// ours to 15, where there are any.
#[test]
fn our_products_bring_rollouts_to_the_trainers_logprobs() {
    let cases = [
        ("llama-q4_0", "q4_0"),
        ("qwen3-q8_0", "q8_0"),
        ("qwen3-q4_k", "q4_K"),
        ("qwen3moe-q8_0", "q8_0"),
        // Behind a recurrent layer llama.cpp multiplies with columns that are cut into sequences.
        ("qwen35-q8_0", "q8_0"),
        ("qwen35moe-q8_0", "q8_0"),
        ("qwen3next-q8_0", "q8_0"),
    ];
    for (case, ty) in cases {
        let golden = Golden::load(case);
        let mut engine = golden.engine();
        let pool = Arc::new(ThreadPool::new(2).unwrap());
        let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 26 };
        let prompt = golden.rollouts()[0].prompt.clone();
        let request =
            Request { prompt_tokens: prompt.clone(), n: 5, seed_stream: 3, max_tokens: 12 };
        let policy = Policy::full(golden.model.config().n_layer);
        let drift = [Products::Ggml, Products::Exact, Products::Invariant].map(|products| {
            let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
            rollouts.set_products(products);
            let stop = AtomicBool::new(false);
            let sampled = rollouts
                .generate(
                    std::slice::from_ref(&request),
                    &Sampling::default(),
                    1,
                    &mut |_| (),
                    &stop,
                )
                .unwrap();
            let tokens: Vec<&[i32]> = sampled[0].iter().map(|c| c.tokens.as_slice()).collect();
            let mut batch = Batch::default();
            batch.push_group(&prompt, &tokens, golden.model.config().n_vocab).unwrap();
            engine.forward(&golden.model, None, &batch, policy.depth()).unwrap();
            let ours = engine.score(&golden.model, None, &batch, policy, 1.0, false).unwrap();
            let theirs: Vec<f32> = sampled[0].iter().flat_map(|c| c.logprobs.clone()).collect();
            relative_error(&ours.logprobs, &theirs)
        });
        let [ggml, exact, quick] = drift;
        println!("{case}: {ggml:.1e} with ggml's products, {exact:.1e} exact, {quick:.1e} quick");
        let ty = Type::all().find(|t| t.name() == ty).unwrap();
        let ours = ops::faster_from(ty).is_some();
        for drift in [exact].into_iter().chain(ours.then_some(quick)) {
            assert!(drift < 1e-2 && drift < ggml / 5.0, "{case}: {drift} after {ggml}");
        }
    }
}

/// Log-probs that sampling gave stand for those before the update where they are close to recomputed ones, and nowhere else.
#[test]
fn old_logprobs_come_from_rollouts_where_they_are_close() {
    let step =
        |model: &Model, [reward, template]: [&str; 2], group, old_from_rollout, exact_rollouts| {
            let mut config = TrainConfig {
                algo: Algorithm::Grpo,
                data: "task:max".into(),
                mini_batch: Some(1),
                max_response: Some(12),
                threads: Some(1),
                group,
                old_from_rollout,
                exact_rollouts,
                ..small()
            };
            config.rewards.reward = Some(reward.into());
            config.prompts.template = template.into();
            let mut trainer = Trainer::new(model, config).unwrap();
            let (record, _) = trainer.step(1, &mut Silent).unwrap();
            let record = serde_json::to_value(record).unwrap();
            let adapter: Vec<f32> = values(trainer.lora()).concat();
            (record["old_from_rollout_nats"].as_f64(), adapter)
        };
    // Q8_0, exact products: an F16 cache is all that is between them.
    let demo = Model::open("demo".as_ref()).unwrap();
    let (none, recomputed) = step(&demo, ["math", "chat"], 4, false, true);
    let (nats, taken) = step(&demo, ["math", "chat"], 4, true, true);
    assert!(none.is_none() && nats.is_some_and(|nats| nats < 5e-3), "{nats:?}");
    let error = relative_error(&recomputed, &taken);
    assert!(error > 0.0 && error < 0.05, "{error}");
    // Q4_K of a random model, of so few sequences that ggml's products are taken, with activations in 8 bits: far from close, so that
    // all is as without the option.
    let model = Model::open(&common::golden_dir().join("qwen3-q4_k.gguf")).unwrap();
    let (_, recomputed) = step(&model, ["regex:[a-m]", "plain"], 2, false, false);
    let (nats, taken) = step(&model, ["regex:[a-m]", "plain"], 2, true, false);
    assert!(nats.is_some_and(|nats| nats > 0.01), "{nats:?}");
    assert_eq!(recomputed, taken);
}

#[test]
fn shared_prefixes_change_nothing_but_the_work() {
    let golden = Golden::load("llama-f32");
    let (mut engine, lora) = (golden.engine(), golden.lora());
    let n_vocab = golden.model.config().n_vocab;
    let policy = Policy::internal(2, golden.model.config().n_layer, false).unwrap();
    let row = &golden.rollouts()[1];
    let tokens: Vec<&[i32]> = row.completions.iter().map(Vec::as_slice).collect();
    let mut shared = Batch::default();
    shared.push_group(&row.prompt, &tokens, n_vocab).unwrap();
    let mut separate = Batch::default();
    for completion in &tokens {
        separate.push_group(&row.prompt, &[completion], n_vocab).unwrap();
    }
    assert!(shared.len() < separate.len());
    let mut results = Vec::new();
    for batch in [&shared, &separate] {
        engine.forward(&golden.model, Some(&lora), batch, policy.depth()).unwrap();
        let scores = engine.score(&golden.model, Some(&lora), batch, policy, 1.0, true).unwrap();
        let cotangents: Vec<f32> = (0..scores.logprobs.len()).map(|i| (i as f32).sin()).collect();
        let mut gradients = lora.zeros_like().unwrap();
        engine.backward(&golden.model, &lora, &mut gradients, batch, policy, &cotangents).unwrap();
        let all: Vec<f32> =
            (0..gradients.len()).flat_map(|i| gradients.values(i).to_vec()).collect();
        results.push((scores.logprobs, all));
    }
    assert!(relative_error(&results[0].0, &results[1].0) < 1e-5);
    assert!(relative_error(&results[0].1, &results[1].1) < 1e-5);
}

/// Beside other processes fewer threads compute; what they compute is what all of them would.
#[test]
fn results_do_not_depend_on_how_many_threads_have_a_core() {
    for case in ["qwen3-q8_0", "llama-q4_0", "qwen35-f32", "olmoe-q8_0"] {
        let golden = Golden::load(case);
        let lora = golden.lora();
        let n_vocab = golden.model.config().n_vocab;
        let mut batch = Batch::default();
        batch.push_group(&[1, 2, 3], &[&[4, 5, 6], &[7, 8]], n_vocab).unwrap();
        let policy = Policy::full(golden.model.config().n_layer);
        let with = |neighbours: usize| {
            let pool = Arc::new(ThreadPool::new(3).unwrap());
            pool.assume_neighbours(neighbours);
            let mut engine = Engine::new(pool).unwrap();
            engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
            let scores =
                engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, true).unwrap();
            let cotangents: Vec<f32> =
                (0..scores.logprobs.len()).map(|i| (i as f32).sin()).collect();
            let mut gradients = lora.zeros_like().unwrap();
            let g = &mut gradients;
            engine.backward(&golden.model, &lora, g, &batch, policy, &cotangents).unwrap();
            let all: Vec<f32> =
                (0..gradients.len()).flat_map(|i| gradients.values(i).to_vec()).collect();
            (scores.logprobs, all)
        };
        let alone = with(0);
        assert!(alone.0.iter().chain(&alone.1).all(|x| x.is_finite()));
        for neighbours in [1, 2] {
            assert!(with(neighbours) == alone, "{case}: {neighbours} neighbours");
        }
    }
}

/// Rounded products are close to exact ones, and nobody's on a processor that has nothing for them.
#[test]
fn rounded_products_are_close() {
    let golden = Golden::load("qwen3-q8_0");
    let n_vocab = golden.model.config().n_vocab;
    let tokens: Vec<i32> = (0..24).map(|i| (7 * i + 1) % n_vocab as i32).collect();
    let mut batch = Batch::default();
    batch.push_group(&[1, 2, 3], &[&tokens, &tokens[5..]], n_vocab).unwrap();
    let policy = Policy::full(golden.model.config().n_layer);
    let [exact, rounded] = [false, true].map(|rounded| {
        let pool = Arc::new(ThreadPool::new(2).unwrap().rounding(rounded));
        let mut engine = Engine::new(pool).unwrap();
        engine.forward(&golden.model, None, &batch, policy.depth()).unwrap();
        engine.score(&golden.model, None, &batch, policy, 1.0, false).unwrap().logprobs
    });
    let error = relative_error(&rounded, &exact);
    match ops::wants_fast_products(Device::Cpu) {
        Ok(()) => {
            // A matrix unit rounds to 16 bits, whole numbers are of 13 to 15.
            let has_unit = ops::ProductKernel::Tiles.serves(Type::F32);
            assert!(error > 0.0 && error < if has_unit { 1e-4 } else { 3e-3 }, "{error}");
        }
        Err(refusal) => {
            assert_eq!(error, 0.0);
            let refusal = refusal.to_string();
            assert!(refusal.contains("AMX") && refusal.contains("VNNI"), "{refusal}");
        }
    }
}

/// The gates of a delta net have an output a head: a rank beyond them is one for the other weights.
#[test]
fn a_rank_beyond_the_narrowest_weight_is_trained() {
    let golden = Golden::load("qwen35-f32");
    let (n_vocab, mut engine) = (golden.model.config().n_vocab, golden.engine());
    let mut lora = Lora::new(&golden.model, &Targets::default(), 12, 24.0, 1).unwrap();
    let names: Vec<String> =
        (0..lora.zeros_like().unwrap().len()).map(|i| lora.tensor_name(i)).collect();
    assert!(names.iter().any(|name| name.contains("ssm_alpha")), "{names:?}");
    let mut batch = Batch::default();
    batch.push_group(&[1, 2, 3], &[&[4, 5, 6], &[7, 8]], n_vocab).unwrap();
    let policy = Policy::full(golden.model.config().n_layer);
    engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
    let scores = engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, true).unwrap();
    let mut gradients = lora.zeros_like().unwrap();
    let cotangents: Vec<f32> = (0..scores.logprobs.len()).map(|i| (i as f32).cos()).collect();
    engine.backward(&golden.model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
    for (i, name) in names.iter().enumerate().filter(|(_, name)| name.ends_with("lora_b")) {
        let gradient = gradients.values(i);
        assert!(gradient.iter().all(|g| g.is_finite()), "{name}");
        assert!(gradient.iter().any(|g| *g != 0.0), "{name}");
    }
    // It decodes, too.
    let pool = Arc::new(ThreadPool::new(1).unwrap());
    let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 26 };
    let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
    rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
    assert_eq!(greedy_logprobs(&mut rollouts, &[1, 2, 3]).len(), 6);
    let error = Lora::new(&golden.model, &Targets::default(), 100_000, 1.0, 1).err().unwrap();
    assert!(error.to_string().contains("--rank"), "{error}");
}

#[test]
fn the_internal_phase_builds_nothing_above_its_layer() {
    let model = Model::open("demo".as_ref()).unwrap();
    let config = TrainConfig {
        internal_layer: Some(LayerChoice::Layer(3)),
        internal_steps: Some(1),
        ..small()
    };
    let mut trainer = Trainer::new(&model, config).unwrap();
    let before: Vec<Vec<f32>> = values(trainer.lora());
    let mut worked = None;
    let mut watch = Counting { work: &mut worked };
    let (record, _) = trainer.step(1, &mut watch).unwrap();
    assert_eq!((record.layer, record.rollout.unwrap().drift_nats), (3, None));
    assert!(record.updates > 0);
    for (i, (old, new)) in before.iter().zip(values(trainer.lora())).enumerate() {
        let above = trainer.lora().tensor_layer(i) > 3;
        assert_eq!(*old == new, above, "{}", trainer.lora().tensor_name(i));
    }
    // The engine's own count, over the same policy.
    let mut engine = Engine::new(Arc::new(ThreadPool::new(1).unwrap())).unwrap();
    let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
    let mut batch = Batch::default();
    batch.push_group(&[1, 2, 3], &[&[4, 5]], model.config().n_vocab).unwrap();
    let policy = Policy::internal(3, 8, false).unwrap();
    engine.forward(&model, Some(&lora), &batch, policy.depth()).unwrap();
    engine.score(&model, Some(&lora), &batch, policy, 1.0, true).unwrap();
    let mut gradients = lora.zeros_like().unwrap();
    engine.backward(&model, &lora, &mut gradients, &batch, policy, &[1.0, 1.0]).unwrap();
    let work = engine.take_work();
    assert_eq!((work.layer_forwards, work.layer_backwards, work.highest_layer), (3, 3, 3));
}

struct Counting<'c> {
    work: &'c mut Option<usize>,
}

impl bupo_gguf::train::Observer for Counting<'_> {
    fn update(&mut self, done: usize, _total: usize) {
        *self.work = Some(done);
    }
}

fn values(lora: &Lora) -> Vec<Vec<f32>> {
    (0..lora.tensors().len()).map(|i| lora.tensors().values(i).to_vec()).collect()
}

#[test]
fn same_seed_same_steps() {
    let model = Model::open("demo".as_ref()).unwrap();
    let run = || {
        let config = TrainConfig { algo: Algorithm::Bupo, internal_steps: Some(1), ..small() };
        let mut trainer = Trainer::new(&model, config).unwrap();
        let mut samples = Vec::new();
        for step in 1..=2 {
            samples.extend(
                trainer.step(step, &mut Silent).unwrap().1.into_iter().map(|s| s.completion),
            );
        }
        (samples, values(trainer.lora()))
    };
    assert_eq!(run(), run());
}

#[test]
fn a_model_with_broken_weights_is_refused_before_the_first_step() {
    // NaN in one norm weight: the probe names the first tensor whose gradient it spoils.
    let golden = common::golden_dir().join("qwen3-f32.gguf");
    let mut bytes = std::fs::read(&golden).unwrap();
    let file = bupo_gguf::gguf::GgufFile::open(&golden).unwrap();
    let norm = file.tensor("blk.2.ffn_norm.weight").unwrap();
    let at = file.range(norm).start;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.gguf");
    std::fs::write(&path, bytes).unwrap();
    let model = Model::open(&path).unwrap();
    let mut trainer =
        Trainer::new(&model, TrainConfig { algo: Algorithm::Grpo, ..small() }).unwrap();
    let error = trainer.run(&dir.path().join("run"), &mut Silent).unwrap_err().to_string();
    assert!(error.contains("checking the gradient of blk.") && error.contains("NaN"), "{error}");
    assert!(!dir.path().join("run").exists(), "nothing was written");
}

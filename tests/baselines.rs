//! Every algorithm's advantages, loss and gradient against figures that a script makes straight from the formulas
//! (`tests/fixtures/baselines/make_baselines.py`); what they do in a run.

use std::path::Path;

use bupo_gguf::eval::metrics::pass_at_k;
use bupo_gguf::train::{
    Aggregation, Algorithm, Gae, LayerChoice, LossConfig, Response, ResponseGroup, Sample, Silent,
    TokenContext, assign, response_loss,
};
use bupo_gguf::{Model, TrainConfig, Trainer};
use clap::ValueEnum;
use serde_json::Value;

fn fixture() -> Value {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/baselines/baselines.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn float(value: &Value) -> f32 {
    value.as_f64().unwrap_or_else(|| panic!("a number, got {value}")) as f32
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(float).collect()
}

fn rows(value: &Value) -> Vec<Vec<f32>> {
    value.as_array().expect("a list").iter().map(floats).collect()
}

fn close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let size = theirs.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() < 3e-5 * size, "{what}, {i}: {a} {b}");
    }
}

#[test]
fn advantages_losses_and_gradients_are_those_of_the_formulas() {
    let fixture = fixture();
    let cases = fixture["cases"].as_array().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for case in cases {
        let name = case["algorithm"].as_str().unwrap();
        let (algorithm, settings) = (Algorithm::from_str(name, false).unwrap(), &case["settings"]);
        seen.insert(name);
        // The name stands for the settings that the script used.
        let named = algorithm.defaults();
        let text = |value: &dyn erased::Serialize| value.json();
        for (key, ours) in [
            ("baseline", text(&named.baseline)),
            ("ratio", text(&named.ratio)),
            ("surrogate", text(&named.surrogate)),
            ("aggregation", text(&named.aggregation)),
        ] {
            assert_eq!(ours, settings[key], "{name} {key}");
        }
        assert_eq!(named.clip_low, float(&settings["clip_low"]), "{name}");
        assert_eq!(named.clip_high, float(&settings["clip_high"]), "{name}");

        let (old, base, new) = (rows(&case["old"]), rows(&case["base"]), rows(&case["new"]));
        let rewards = rows(&case["rewards"]);
        let mut at = 0;
        let mut groups: Vec<ResponseGroup> = Vec::new();
        for (rewards, values) in rewards.iter().zip(case["values"].as_array().unwrap()) {
            let mut group = ResponseGroup::default();
            for (&reward, values) in rewards.iter().zip(rows(values)) {
                let tokens = vec![0; old[at].len()];
                group.responses.push(Response { tokens, reward, values, ..Response::default() });
                at += 1;
            }
            groups.push(group);
        }
        let gae = Gae { gamma: float(&case["gamma"]), lambda: float(&case["lambda"]) };
        assign(&mut groups, named.baseline, gae);
        let responses: Vec<&Response> = groups.iter().flat_map(|g| &g.responses).collect();
        let theirs = rows(&case["advantages"]);
        for (response, theirs) in responses.iter().zip(&theirs) {
            close(&response.advantages, theirs, &format!("{name}: advantages"));
        }

        let config = LossConfig {
            ratio: named.ratio,
            surrogate: named.surrogate,
            clip_low: named.clip_low,
            clip_high: named.clip_high,
            clip_c: float(&settings["clip_c"]),
            kl_coef: float(&settings["kl_coef"]),
        };
        let tokens = old.iter().map(Vec::len).sum();
        let max_response = settings["max_response"].as_u64().unwrap() as usize;
        let (mut total, mut clipped) = (0.0, 0);
        for (i, (response, gradients)) in responses.iter().zip(rows(&case["gradients"])).enumerate()
        {
            let n = old[i].len();
            let aggregation: Aggregation = named.aggregation;
            let weight = aggregation.weight(n, tokens, old.len(), max_response);
            let contexts: Vec<TokenContext> = (0..n)
                .map(|t| TokenContext {
                    advantage: response.advantages[t],
                    old: old[i][t],
                    base: Some(base[i][t]),
                    importance: 1.0,
                })
                .collect();
            let losses = response_loss(&config, &contexts, &new[i]);
            total += losses.iter().map(|l| weight * l.loss).sum::<f32>();
            clipped += losses.iter().filter(|l| l.clipped).count();
            let ours: Vec<f32> = losses.iter().map(|l| weight * l.gradient).collect();
            close(&ours, &gradients, &format!("{name}: gradient of response {i}"));
        }
        assert!(
            clipped > 0 && clipped < tokens,
            "{name}: both sides of the clip are seen: {clipped}"
        );
        close(&[total], &[float(&case["loss"])], &format!("{name}: loss"));
    }
    let all: std::collections::BTreeSet<String> = Algorithm::value_variants()
        .iter()
        .filter(|a| **a != Algorithm::Bupo && a.is_rewarded())
        .map(|a| a.name())
        .collect();
    assert!(all.iter().map(String::as_str).eq(seen.iter().copied()), "{all:?} {seen:?}");
}

/// A value as `config.toml` spells it.
mod erased {
    pub trait Serialize {
        fn json(&self) -> serde_json::Value;
    }

    impl<T: serde::Serialize> Serialize for T {
        fn json(&self) -> serde_json::Value {
            serde_json::to_value(self).unwrap()
        }
    }
}

#[test]
fn pass_at_k_is_the_quotient_of_binomials() {
    let fixture = fixture();
    for case in fixture["pass_at_k"].as_array().unwrap() {
        let int = |key: &str| case[key].as_u64().unwrap() as usize;
        let (ours, exact) =
            (pass_at_k(int("n"), int("c"), int("k")), case["pass"].as_f64().unwrap());
        assert!((ours - exact).abs() < 1e-12, "{case}: {ours}");
    }
}

fn small(algo: Algorithm) -> TrainConfig {
    TrainConfig {
        algo,
        prompts_per_step: 4,
        group: 4,
        max_response: Some(12),
        rank: 2,
        threads: Some(1),
        kv_mib: Some(64),
        internal_steps: algo.has_internal_phase().then_some(1),
        ..TrainConfig::default()
    }
}

fn values(trainer: &Trainer<'_>) -> Vec<(usize, Vec<f32>)> {
    let lora = trainer.lora();
    let one = |i| (lora.tensor_layer(i), lora.tensors().values(i).to_vec());
    (0..lora.tensors().len()).map(one).collect()
}

#[test]
fn every_algorithm_takes_steps_alone_and_as_the_objective_of_both_phases() {
    let model = Model::open("demo".as_ref()).unwrap();
    for &algo in Algorithm::value_variants().iter().filter(|a| a.is_rewarded()) {
        let bupo = TrainConfig { objective: Some(algo), ..small(Algorithm::Bupo) };
        let alone = if algo == Algorithm::Bupo { None } else { Some(bupo) };
        for config in [Some(small(algo)), alone].into_iter().flatten() {
            let two_phases = config.algo == Algorithm::Bupo;
            let mut trainer = Trainer::new(&model, config).unwrap();
            let before = values(&trainer);
            let (first, samples) = trainer.step(1, &mut Silent).unwrap();
            assert_eq!(first.layer, if two_phases { 6 } else { 8 }, "{algo:?}");
            assert!(samples.len() >= 16 && first.updates > 0, "{algo:?}: {first:?}");
            assert_ne!(before, values(&trainer), "{algo:?}");
            assert_eq!(
                first.rollout.as_ref().unwrap().value_loss.is_some(),
                algo == Algorithm::Ppo,
                "{algo:?}"
            );
            let (second, _) = trainer.step(2, &mut Silent).unwrap();
            assert_eq!(second.layer, 8, "{algo:?}");
            assert_eq!(second.updates_skipped, 0, "{algo:?}");
        }
    }
}

#[test]
fn groups_without_signal_are_replaced() {
    let model = Model::open("demo".as_ref()).unwrap();
    let config =
        TrainConfig { prompts_per_step: 6, group: 2, resample: Some(4), ..small(Algorithm::Grpo) };
    let run = || {
        let mut trainer = Trainer::new(&model, config.clone()).unwrap();
        trainer.step(3, &mut Silent).unwrap()
    };
    let (record, samples) = run();
    let verdict = |s: &Sample| s.verdict.clone().expect("judged");
    let kept = samples.iter().filter(|s| !verdict(s).dropped).count();
    assert_eq!(kept, 6 * 2);
    assert!(samples.len() > kept, "pairs of samples are often equal: {record:?}");
    assert_eq!(record.rollout.as_ref().unwrap().groups_dropped, (samples.len() - kept) / 2);
    for pair in samples.chunks(2).filter(|pair| verdict(&pair[0]).dropped) {
        assert_eq!(verdict(&pair[0]).reward, verdict(&pair[1]).reward);
    }
    // Nothing but seed and step decides: a resumed run replaces the same groups.
    let again = run().1;
    assert!(samples.iter().map(|s| &s.completion).eq(again.iter().map(|s| &s.completion)));
}

#[test]
fn frozen_layers_stay_and_slow_ones_move_less() {
    let model = Model::open("demo".as_ref()).unwrap();
    let moved = |config: TrainConfig| -> Vec<(usize, f32)> {
        let mut trainer = Trainer::new(&model, config).unwrap();
        let before = values(&trainer);
        trainer.step(1, &mut Silent).unwrap();
        let gap = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>();
        let pairs = before.iter().zip(values(&trainer));
        pairs.map(|((layer, old), (_, new))| (*layer, gap(old, &new))).collect()
    };
    // One update, without decay: Adam's first step is the learning rate, whatever the gradient's size.
    let base = TrainConfig {
        mini_batch: Some(4),
        weight_decay: 0.0,
        internal_layer: Some(LayerChoice::Layer(6)),
        ..small(Algorithm::Grpo)
    };
    let whole = moved(base.clone());
    // (A of a new adapter stays in the first update, for B is zero.)
    assert!(whole.iter().filter(|w| w.1 > 0.0).count() >= whole.len() / 2);
    let frozen = moved(TrainConfig { freeze_layers: 6, ..base.clone() });
    for ((layer, gap), (_, full)) in frozen.iter().zip(&whole) {
        assert_eq!(*gap > 0.0, *layer > 6 && *full > 0.0, "{layer}");
    }
    let slow = moved(TrainConfig { lr_above: 0.25, ..base.clone() });
    for ((layer, gap), (_, full)) in slow.iter().zip(&whole).filter(|(s, _)| s.1 > 0.0) {
        let factor = if *layer > 6 { 0.25 } else { 1.0 };
        assert!((gap / full - factor).abs() < 1e-2, "{layer}: {gap} {full}");
    }
    let error = Trainer::new(&model, TrainConfig { freeze_layers: 8, ..base }).err().unwrap();
    assert!(error.to_string().contains("--freeze-layers: expected below 8"), "{error}");
}

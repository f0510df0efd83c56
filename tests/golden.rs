//! Agreement with PyTorch on the golden models: entropies of every tap, log-probs, losses, and every
//! LoRA gradient, in the exact training forward. `tests/fixtures/golden/make_golden.py` made the figures.

mod common;

use bupo_gguf::analysis::{Figure, Look, Tap, measure};
use bupo_gguf::model::{Batch, Policy};
use bupo_gguf::train::{Aggregation, LossConfig, TokenContext, token_loss};
use common::{ARCHS, Golden, relative_error};

const CASES: [&str; 6] =
    ["qwen3-f32", "qwen3-q8_0", "qwen3-q4_k", "qwen2-f32", "llama-f32", "llama-q4_0"];

/// F32 models differ from PyTorch by rounding order alone; on quantised ones PyTorch reads the same
/// dequantised weights, so the same bound would do, and the is kept.
fn tolerance(case: &str) -> f32 {
    if case.ends_with("f32") { 1e-4 } else { 1e-3 }
}

#[test]
fn figures_of_every_layer_agree() {
    for case in CASES {
        check_figures(case, true);
    }
}

/// Entropies and norms at the taps of the other architectures.
#[test]
fn entropies_of_further_architectures_agree() {
    for case in ARCHS {
        check_figures(case, false);
    }
}

/// `more`: also what `make_figures.py` adds.
fn check_figures(case: &str, has_more: bool) {
    {
        let golden = Golden::load(case);
        let mut engine = golden.engine();
        let tokens = golden.ints("entropy_tokens");
        let mut batch = Batch::default();
        let (prompt, rest) = tokens.split_at(1);
        // The last token is input too here: push it with a scored token after it.
        let mut completion = rest.to_vec();
        completion.push(0);
        batch.push_group(prompt, &[&completion], golden.model.config().n_vocab).unwrap();
        let picked: Vec<usize> = (0..batch.scored.len()).collect();
        let look = Look { top_k: 3, final_norm: false };
        let layers = measure(&mut engine, &golden.model, None, &batch, &picked, look).unwrap();
        assert_eq!(layers.len(), golden.json["n_layer"].as_u64().unwrap() as usize);
        for (i, layer) in layers.iter().enumerate() {
            let ours = |figure: Figure| -> Vec<f32> {
                layer.iter().map(|m| m.figures[figure as usize]).collect()
            };
            let check = |name: &str, figure: Figure, reference: &serde_json::Value| {
                let error = relative_error(&ours(figure), &common::floats(reference));
                assert!(error < tolerance(case), "{case} layer {} {name}: {error}", i + 1);
            };
            let (entropies, norms) = (&golden.json["entropies"][i], &golden.json["norms"][i]);
            for (name, entropy, norm) in [
                ("layer_in", Figure::LayerIn, Figure::NormLayerIn),
                ("attn_in", Figure::AttnIn, Figure::NormAttnIn),
                ("attn_out", Figure::AttnOut, Figure::NormAttnOut),
                ("ffn_in", Figure::FfnIn, Figure::NormFfnIn),
                ("ffn_out", Figure::FfnOut, Figure::NormFfnOut),
                ("layer_out", Figure::LayerOut, Figure::NormLayerOut),
            ] {
                check(name, entropy, &entropies[name]);
                check(&format!("norm of {name}"), norm, &norms[name]);
            }
            check("final entropy", Figure::FinalEntropy, &golden.json["final_entropy"]);
            if !has_more {
                continue;
            }
            let more = golden.figures();
            let figures = &more["layers"][i];
            check("cos(A, residual)", Figure::CosAttn, &figures["cos_attn"]);
            check("cos(F, residual)", Figure::CosFfn, &figures["cos_ffn"]);
            check("KL to final", Figure::KlToFinal, &figures["kl_to"]);
            check("KL from final", Figure::KlFromFinal, &figures["kl_from"]);
            check("top-1 agreement", Figure::Top1Agrees, &figures["top1"]);
            for tap in Tap::ALL {
                let taken = match tap {
                    Tap::Final => &more["final_taken"],
                    tap => &figures["taken"][tap.name()],
                };
                let taken = taken.as_array().unwrap();
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                for (m, taken) in layer.iter().zip(taken) {
                    let top = m.tops[tap as usize].as_ref().unwrap();
                    ours.push(top.taken_prob);
                    theirs.push(taken[0].as_f64().unwrap().exp() as f32);
                    assert_eq!(top.taken_rank as u64, taken[1].as_u64().unwrap(), "{case} {tap:?}");
                }
                assert_eq!(ours.len(), tokens.len() - 1);
                let error = relative_error(&ours, &theirs);
                assert!(
                    error < tolerance(case),
                    "{case} layer {} taken at {tap:?}: {error}",
                    i + 1
                );
            }
        }
    }
}

#[test]
fn logprobs_losses_and_gradients_agree() {
    for case in CASES {
        for phase in ["internal", "final"] {
            check_phase(&Golden::load(case), phase, tolerance(case), Logprobs::Ours);
        }
    }
}

#[test]
fn further_architectures_agree() {
    for case in ARCHS {
        for phase in ["internal", "final"] {
            check_phase(&Golden::load(case), phase, tolerance(case), Logprobs::Ours);
        }
    }
}

/// The same through the GPU's backend and kernels (see [`common::device`]), products in F32.
#[test]
fn precise_kernels_agree() {
    for (case, phase) in
        [("qwen3-f32", "final"), ("qwen3-q4_k", "internal"), ("llama-q4_0", "final")]
            .into_iter()
            .chain(ARCHS.into_iter().zip(["internal", "final"].into_iter().cycle()))
    {
        let golden = Golden::load_on(case, common::device(true));
        check_phase(&golden, phase, tolerance(case), Logprobs::Ours);
    }
}

/// And with factors rounded to F16. That moves log-probs by a hundredth of a nat on these random models, so that the loss is
/// that of PyTorch's log-probs.
#[test]
fn rounding_kernels_agree() {
    for (case, phase) in
        [("qwen3-q8_0", "final"), ("qwen2-f32", "final"), ("llama-q4_0", "internal")]
    {
        check_phase(&Golden::load_on(case, common::device(false)), phase, 2e-2, Logprobs::PyTorchs);
    }
}

/// The figures of `entropy` and `diff` with the kernels, as on the CPU.
#[test]
fn kernels_of_entropy_and_diff_agree() {
    use bupo_gguf::analysis::{Figure, Look, measure};
    use bupo_gguf::model::{ComparedModel, compare};
    let figures = |golden: &Golden| {
        let (mut engine, lora) = (golden.engine(), golden.lora());
        let mut batch = Batch::default();
        let row = &golden.rollouts()[0];
        let completion = row.completions[0].as_slice();
        batch.push_group(&row.prompt, &[completion], golden.model.config().n_vocab).unwrap();
        let picked: Vec<usize> = (0..batch.scored.len()).collect();
        let layers =
            measure(&mut engine, &golden.model, Some(&lora), &batch, &picked, Look::default());
        let of = |figure: usize| -> Vec<f32> {
            layers.as_ref().unwrap().iter().flatten().map(|m| m.figures[figure]).collect()
        };
        let mut all: Vec<Vec<f32>> = (0..Figure::N).map(of).collect();
        let mut base = golden.engine();
        let mut p = ComparedModel { engine: &mut base, model: &golden.model, lora: None };
        let mut q = ComparedModel { engine: &mut engine, model: &golden.model, lora: Some(&lora) };
        let c = compare(&mut p, &mut q, &batch).unwrap();
        all.extend([c.kl_nats, c.logprob_p, c.logprob_q, c.agree]);
        all
    };
    for case in ["qwen3-f32", "qwen3-q4_k"] {
        let want = figures(&Golden::load(case));
        let got = figures(&Golden::load_on(case, common::device(true)));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = relative_error(got, want);
            println!("{error:.1e} of 1e-3  {case} figure {i}");
            assert!(error < 1e-3, "{case} figure {i}: {error}");
        }
    }
}

/// Whose log-probs make the loss.
#[derive(PartialEq)]
enum Logprobs {
    Ours,
    PyTorchs,
}

fn check_phase(golden: &Golden, phase: &str, tolerance: f32, whose: Logprobs) {
    let case = &golden.name;
    let (mut engine, lora) = (golden.engine(), golden.lora());
    let reference = &golden.json[phase];
    let layer = reference["layer"].as_u64().unwrap() as usize;
    let policy = Policy::internal(layer, golden.model.config().n_layer, false).unwrap();

    let mut batch = Batch::default();
    let rollouts = golden.rollouts();
    for row in &rollouts {
        let completions: Vec<&[i32]> = row.completions.iter().map(Vec::as_slice).collect();
        batch.push_group(&row.prompt, &completions, golden.model.config().n_vocab).unwrap();
    }
    engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
    let scores = engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, true).unwrap();

    let logprobs: Vec<f32> = common::nested_floats(&reference["logprobs"]);
    let error = relative_error(&scores.logprobs, &logprobs);
    assert!(error < tolerance, "{case} {phase} log-probs: {error}");

    // The loss as PyTorch has it: token mean over both groups.
    let config = LossConfig::default();
    let old = common::nested_floats(&reference["old_logprobs"]);
    let mut advantages = Vec::new();
    for row in &rollouts {
        let per_response =
            bupo_gguf::train::advantages(&row.rewards, bupo_gguf::train::Baseline::GroupStd);
        for (a, tokens) in per_response.iter().zip(&row.completions) {
            advantages.extend(std::iter::repeat_n(*a, tokens.len()));
        }
    }
    let weight = Aggregation::TokenMean.weight(1, old.len(), 1, 1);
    let mut loss = 0.0;
    let mut cotangents = Vec::new();
    let new = if whose == Logprobs::Ours { &scores.logprobs } else { &logprobs };
    for (i, (&old, &advantage)) in old.iter().zip(&advantages).enumerate() {
        let context = TokenContext { advantage, old, base: None, importance: 1.0 };
        loss += weight * token_loss(&config, &context, new[i]).loss;
        // A gradient jumps at the clip. Some tokens are within 1e-5 of it, where rounding decides on the side: PyTorch's is taken.
        cotangents.push(weight * token_loss(&config, &context, logprobs[i]).gradient);
    }
    let expected = reference["loss"].as_f64().unwrap() as f32;
    assert!(
        (loss - expected).abs() / expected.abs() < tolerance,
        "{case} {phase}: loss {loss}, PyTorch {expected}"
    );

    // How far PyTorch's own F32 is from its F64, all gradients together: a delta net's first outputs are small, and the norm
    // behind it enlarges their rounding. A single small gradient may be several times as far.
    let noise = reference["float32_noise"]["gradient"].as_f64().unwrap_or(0.0) as f32;
    let has_delta_nets = golden.model.config().layers.iter().any(|l| l.delta.is_some());
    let tolerance = if has_delta_nets { tolerance.max(5.0 * noise) } else { tolerance };
    let mut gradients = lora.zeros_like().unwrap();
    engine.backward(&golden.model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
    for i in 0..gradients.len() {
        let name = format!("{phase}.{}", lora.tensor_name(i));
        let expected = golden.gradient(&name);
        if lora.tensor_layer(i) > layer {
            assert!(
                expected.iter().chain(&*gradients.values(i)).all(|&g| g == 0.0),
                "{case} {name}"
            );
            continue;
        }
        let error = relative_error(&gradients.values(i), &expected);
        println!("{error:.1e} of {tolerance:.0e}  {case} {name}");
        assert!(error < tolerance, "{case} {name}: {error}");
    }
}

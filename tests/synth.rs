//! `synth`: every shape has the hyperparameters it claims, and what is written loads, spells text,
//! computes and learns.

mod common;

use std::sync::Arc;

use bupo_gguf::Model;
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::model::{Batch, Engine, Lora, Policy, Targets};
use bupo_gguf::synth::{self, Mixture, Shape};

fn write(shape: Shape, mixture: &str) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    synth::write(&shape, &Mixture::parse(mixture).unwrap(), 1, &path).unwrap();
    let model = Model::open(&path).unwrap_or_else(|e| panic!("{} {mixture}: {e}", shape.name));
    (dir, model)
}

#[test]
fn every_type_loads_and_gives_finite_gradients() {
    for name in Mixture::names() {
        let (_dir, model) = write(Shape::find("tiny").unwrap(), &name);
        let config = model.config();
        let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
        let mut engine = Engine::new(Arc::new(ThreadPool::new(1).unwrap())).unwrap();
        let mut batch = Batch::default();
        let tokens: Vec<i32> = (0..24).map(|i| 7 * i + 3).collect();
        batch.push_group(&tokens[..8], &[&tokens[8..]], config.n_vocab).unwrap();
        for policy in
            [Policy::full(config.n_layer), Policy::internal(2, config.n_layer, false).unwrap()]
        {
            engine.forward(&model, Some(&lora), &batch, policy.depth()).unwrap();
            let scores = engine.score(&model, &batch, policy, 1.0, true).unwrap();
            // Neither uniform (ln 2048 = 7.6 nats) nor certain.
            let mean = scores.entropies.iter().sum::<f32>() / scores.entropies.len() as f32;
            assert!((0.5..7.55).contains(&mean), "{name}: entropy {mean}");
            let mut gradients = lora.zeros_like().unwrap();
            let cotangents = vec![1.0; scores.logprobs.len()];
            engine.backward(&model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
            for i in 0..gradients.len() {
                // B is zero, so A has no gradient yet.
                let sum: f32 = gradients.values(i).iter().map(|g| g.abs()).sum();
                let wanted = i % 2 == 1 && lora.tensor_layer(i) <= policy.depth();
                assert!(sum.is_finite(), "{name}: {}", lora.tensor_name(i));
                assert_eq!(sum > 0.0, wanted, "{name}: {} {sum}", lora.tensor_name(i));
            }
        }
    }
}

#[test]
fn shapes_keep_their_settings_and_spell_text() {
    for shape in Shape::ALL {
        // As the file says it, but for the size.
        let small = shape.with_layers(1).unwrap().with_vocab(1024).unwrap();
        let small = Shape { n_ff: 256, ..small };
        let (_dir, model) = write(small, "q4_k_m");
        let (c, name) = (model.config(), shape.name);
        assert_eq!((c.family.name, c.n_ctx_train), (shape.arch, shape.n_ctx), "{name}");
        let layer = c.layer(1);
        assert_eq!((layer.n_head, layer.n_head_kv), (shape.n_head, shape.n_head_kv), "{name}");
        assert_eq!((layer.head_size, c.rms_eps), (shape.head_size, shape.rms_eps), "{name}");
        assert_eq!(layer.rope.unwrap().freq_base, shape.rope_base, "{name}");
        let factors = model.weights().find("rope_freqs.weight");
        assert_eq!(factors.is_some(), shape.arch == "llama", "{name}");
        let weights = model.weights();
        let tied = weights.unembedding().address() == weights.embedding().address();
        assert_eq!(tied, shape.tied, "{name}");
        let vocab = model.engine().vocab();
        let text = "<|im_start|>user\nWhat is 17 * 23? \u{fc}ber \u{1f600}<|im_end|>\n";
        let tokens = vocab.tokenize(text, true, true).unwrap();
        assert_eq!(vocab.text(&tokens, true), text, "{name}");
        assert!(tokens.len() < text.len(), "{name}: merges shorten text");
        assert!(vocab.is_eog(vocab.eos().unwrap()) && !vocab.adds_bos(), "{name}");
    }
}

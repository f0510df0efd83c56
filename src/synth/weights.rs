//! The tensors of a model of each architecture, and how large random weights keep activations sane.

use super::Mixture;
use super::shape::{DeltaNets, Rope, Shape, rope_freqs};
use crate::ggml::Type;

/// How a tensor gets its values.
pub(super) enum Fill {
    /// F32.
    Values(Vec<f32>),
    /// Mean 0 and this standard deviation.
    Random { spread: f32 },
}

/// A tensor to write.
pub(super) struct Weight {
    pub(super) name: String,
    pub(super) shape: Vec<u64>,
    pub(super) ty: Type,
    pub(super) fill: Fill,
}

/// The tensors of a model, in a file's order.
pub(super) struct Weights(pub(super) Vec<Weight>);

/// What a block has beside its seven maps.
struct Block {
    /// Norms before attention and FFN.
    pre_norms: bool,
    /// Norms after them.
    post_norms: bool,
    /// Attention's result is gated, by what comes with the queries; the norm before the FFN is named as one behind
    /// attention elsewhere.
    gated: bool,
    /// Norms on q and k: none, of each head, of all heads together.
    qk_norms: Option<Heads>,
    /// q, k and v in one map, gate and up in another.
    fused: bool,
    /// Biases on q, k and v.
    biases: bool,
    /// The norm before the FFN is named as if it stood behind attention; biases on all other maps, too; heads have sinks.
    gpt_oss: bool,
}

#[derive(PartialEq)]
enum Heads {
    Each,
    All,
}

impl Block {
    fn new(arch: &str) -> Block {
        let gemma = arch.starts_with("gemma");
        let gated = matches!(arch, "qwen35" | "qwen35moe" | "qwen3next");
        Block {
            pre_norms: arch != "olmo2",
            post_norms: gemma || arch == "olmo2",
            gated,
            qk_norms: match arch {
                "qwen3" | "qwen3moe" | "gemma3" | "gemma4" => Some(Heads::Each),
                _ if gated => Some(Heads::Each),
                "olmo2" | "olmoe" => Some(Heads::All),
                _ => None,
            },
            fused: arch == "phi3",
            biases: arch == "qwen2" || arch == "gpt-oss",
            gpt_oss: arch == "gpt-oss",
        }
    }
}

/// How large weights are.
///
/// With an embedding multiplier c and a divisor of logits t, both 1 in most models: the residual grows to
/// elements of size R = sqrt(c t), by equal steps, and embeddings spread by `2 sqrt(t / (c D))`. Then logits
/// spread by 2 nats and the token that was read stands out by 4, so that the final policy is neither
/// uniform nor certain, whatever the multipliers. For c = t = 1 that is GPT-2's initialisation.
struct Sizes {
    /// Of the embedding's elements.
    embedding: f32,
    /// Of the residual's elements behind the last layer, R.
    residual: f32,
    /// Of what a module adds to it.
    step: f32,
}

impl Sizes {
    fn new(shape: &Shape) -> Sizes {
        let c = shape.embedding_scale();
        let t = shape.multipliers.map_or(1.0, |m| m.logits);
        // gemma4's per-layer embeddings are added, too.
        let steps = shape.n_layer * if shape.gemma4.is_some() { 3 } else { 2 };
        let residual = (c * t).sqrt();
        Sizes {
            embedding: 2.0 * (t / (c * shape.n_embd as f32)).sqrt(),
            residual,
            step: residual / (steps as f32).sqrt(),
        }
    }
}

/// Keeps the size of activations through a map of `n` inputs.
fn of(n: usize) -> f32 {
    1.0 / (n as f32).sqrt()
}

impl Weights {
    pub(super) fn new(shape: &Shape, mixture: &Mixture) -> Weights {
        let mut all = Weights(Vec::new());
        let (d, v) = (shape.n_embd, shape.n_vocab);
        let sizes = Sizes::new(shape);
        all.random("token_embd", mixture.embedding(d, shape.tied), [d, v], sizes.embedding);
        if !shape.tied {
            all.random("output", mixture.output(d), [d, v], sizes.embedding);
        }
        all.same("output_norm", d, sizes.residual);
        match shape.rope {
            Rope::Llama3(factor) => all.values("rope_freqs.weight", rope_freqs(shape, factor)),
            Rope::Long { divisors, .. } => {
                all.values("rope_factors_long.weight", divisors.to_vec());
                all.values("rope_factors_short.weight", vec![1.0; divisors.len()]);
            }
            Rope::Plain
            | Rope::Linear(_)
            | Rope::Yarn { .. }
            | Rope::Partial(_)
            | Rope::Sectioned { .. } => {}
        }
        all.gemma4_head(shape, mixture);
        for i in 0..shape.n_layer {
            all.layer(shape, mixture, &sizes, i);
            all.gemma4_layer(shape, mixture, &sizes, i);
        }
        all
    }

    fn layer(&mut self, shape: &Shape, mixture: &Mixture, sizes: &Sizes, i: usize) {
        let block = Block::new(shape.arch);
        let (d, f, head) = (shape.n_embd, shape.n_ff_of(i), shape.head_size_of(i));
        let (q, kv) = (head * shape.n_head, head * shape.n_head_kv);
        let name = |what: &str| format!("blk.{i}.{what}");
        if block.pre_norms {
            let behind = block.gated || block.gpt_oss;
            let ffn_norm = if behind { "post_attention_norm" } else { "ffn_norm" };
            self.same(&name("attn_norm"), d, 1.0);
            self.same(&name(ffn_norm), d, 1.0);
        }
        if block.post_norms {
            self.same(&name("post_attention_norm"), d, sizes.step);
            self.same(&name("post_ffw_norm"), d, sizes.step);
        }
        // Scores of size 1 where their scale is not 1/sqrt(head size): half of it by q, half by k.
        let sharp = of(head).sqrt() / shape.attention_scale(i).sqrt();
        let delta = shape.delta_of(i);
        if let Some(heads) = block.qk_norms.as_ref().filter(|_| delta.is_none()) {
            let [q, k] = if *heads == Heads::All { [q, kv] } else { [head, head] };
            self.same(&name("attn_q_norm"), q, sharp);
            if shape.has_kv(i) {
                self.same(&name("attn_k_norm"), k, sharp);
            }
        }
        let of_qk = if block.qk_norms.is_some() { of(d) } else { sharp * of(d) };
        // A norm behind makes the step; else the map does, before the multiplier.
        let step = match (block.post_norms, shape.multipliers) {
            (true, _) => 1.0,
            (false, Some(m)) => sizes.step / m.residual,
            (false, None) => sizes.step,
        };
        if let Some(delta) = delta {
            self.delta_net(shape, mixture, &delta, step, i);
        }
        let q_out = if block.gated { 2 * q } else { q };
        for (what, n_in, n_out, spread) in [
            ("attn_qkv", d, q + 2 * kv, of(d)),
            ("attn_q", d, q_out, of_qk),
            ("attn_k", d, kv, of_qk),
            ("attn_v", d, kv, of(d)),
            ("attn_output", q, d, step * of(q)),
            ("ffn_gate", d, f, of(d)),
            ("ffn_up", d, if block.fused { 2 * f } else { f }, of(d)),
            ("ffn_down", f, d, step * of(f)),
        ] {
            let there = match what {
                _ if what.starts_with("attn") && delta.is_some() => false,
                "attn_qkv" => block.fused,
                "attn_k" | "attn_v" => !block.fused && shape.has_kv(i),
                "ffn_gate" | "ffn_up" | "ffn_down" if shape.experts.is_some() => false,
                "attn_q" | "ffn_gate" => !block.fused,
                _ => true,
            };
            if !there {
                continue;
            }
            self.random(&name(what), mixture.layer(what, i, shape, n_in), [n_in, n_out], spread);
            if block.biases && matches!(what, "attn_q" | "attn_k" | "attn_v") {
                self.bias(&name(what), vec![n_out], 0.1);
            }
        }
        if block.gpt_oss {
            self.bias(&name("attn_output"), vec![d], 0.1 * step);
            let sinks = Fill::Random { spread: 1.0 };
            self.push(name("attn_sinks.weight"), vec![shape.n_head], Type::F32, sinks);
        }
        self.mixture(shape, mixture, step, i, block.gpt_oss);
    }

    /// The experts of layer `i`, where it has any, and their router. The chosen ones' shares are about equal, so that
    /// their sum shrinks by the root of their number.
    fn mixture(&mut self, shape: &Shape, mixture: &Mixture, step: f32, i: usize, biases: bool) {
        let Some(e) = shape.experts else { return };
        let (d, f) = (shape.n_embd, e.n_ff);
        let name = |what: &str| format!("blk.{i}.{what}");
        self.random(&name("ffn_gate_inp"), Type::F32, [d, e.count], of(d));
        let step = step * (e.used as f32).sqrt();
        for (what, n_in, n_out, spread) in [
            ("ffn_gate_exps", d, f, of(d)),
            ("ffn_up_exps", d, f, of(d)),
            ("ffn_down_exps", f, d, step * of(f)),
        ] {
            let ty = mixture.layer(what, i, shape, n_in);
            let fill = Fill::Random { spread };
            self.push(name(&format!("{what}.weight")), vec![n_in, n_out, e.count], ty, fill);
            if biases {
                let spread = if what == "ffn_down_exps" { 0.1 * step } else { 0.1 };
                self.bias(&name(what), vec![n_out, e.count], spread);
            }
        }
        if biases {
            self.bias(&name("ffn_gate_inp"), vec![e.count], 0.1);
        }
        if e.n_ff_shared > 0 {
            self.shared_expert(shape, mixture, e.n_ff_shared, step, i);
        }
    }

    /// What all tokens take, and its gate.
    fn shared_expert(&mut self, shape: &Shape, mixture: &Mixture, f: usize, step: f32, i: usize) {
        let d = shape.n_embd;
        let name = |what: &str| format!("blk.{i}.{what}");
        let gate = Fill::Random { spread: of(d) };
        self.push(name("ffn_gate_inp_shexp.weight"), vec![d], Type::F32, gate);
        for (what, n_in, n_out, spread) in [
            ("ffn_gate_shexp", d, f, of(d)),
            ("ffn_up_shexp", d, f, of(d)),
            ("ffn_down_shexp", f, d, step * of(f)),
        ] {
            self.random(&name(what), mixture.layer(what, i, shape, n_in), [n_in, n_out], spread);
        }
    }

    fn bias(&mut self, name: &str, shape: Vec<usize>, spread: f32) {
        self.push(format!("{name}.bias"), shape, Type::F32, Fill::Random { spread });
    }

    /// What a gated delta net has, with memories of three to fifty tokens.
    fn delta_net(
        &mut self,
        shape: &Shape,
        mixture: &Mixture,
        delta: &DeltaNets,
        step: f32,
        i: usize,
    ) {
        let (d, inner, n_v) = (shape.n_embd, delta.inner(), delta.n_v);
        let name = |what: &str| format!("blk.{i}.{what}");
        let of_both = shape.arch == "qwen3next";
        for (what, n_in, n_out, spread) in [
            ("attn_qkv", d, delta.width(), of(d)),
            ("attn_gate", d, inner, of(d)),
            ("ssm_alpha", d, n_v, of(d)),
            ("ssm_beta", d, n_v, of(d)),
            ("ssm_ba", d, 2 * n_v, of(d)),
            ("ssm_out", inner, d, step * of(inner)),
        ] {
            let there = match what {
                "ssm_alpha" | "ssm_beta" => !of_both,
                "ssm_ba" => of_both,
                _ => true,
            };
            if !there {
                continue;
            }
            self.random(&name(what), mixture.layer(what, i, shape, n_in), [n_in, n_out], spread);
        }
        let kernel = [delta.kernel, delta.width()];
        self.random(&name("ssm_conv1d"), Type::F32, kernel, of(delta.kernel));
        self.same(&name("ssm_norm"), delta.size, 1.0);
        let decay = |head| -1.0 - 15.0 * head as f32 / n_v as f32;
        self.values(&name("ssm_a"), (0..n_v).map(decay).collect());
        self.values(&name("ssm_dt.bias"), vec![-4.0; n_v]);
    }

    /// gemma4's tensors outside of the layers.
    fn gemma4_head(&mut self, shape: &Shape, mixture: &Mixture) {
        let Some(gemma4) = shape.gemma4 else { return };
        if let Some(full) = (0..shape.n_layer).find(|&i| !shape.is_windowed(i)) {
            // A quarter of the pairs turn.
            let pairs = shape.head_size_of(full) / 2;
            let divisors = (0..pairs).map(|i| if i < pairs / 4 { 1.0 } else { 1e30 });
            self.values("rope_freqs.weight", divisors.collect());
        }
        let (d, e) = (shape.n_embd, gemma4.per_layer_embd);
        let all = e * shape.n_layer;
        // Multiplied by sqrt(e) when read: as large as what the projection's norm lets through.
        let ty = mixture.embedding(all, shape.tied);
        self.random("per_layer_token_embd", ty, [all, shape.n_vocab], of(e));
        self.random("per_layer_model_proj", mixture.float(), [d, all], of(d));
        self.same("per_layer_proj_norm", e, 1.0);
    }

    /// gemma4's tensors of layer `i` that no other architecture has.
    fn gemma4_layer(&mut self, shape: &Shape, mixture: &Mixture, sizes: &Sizes, i: usize) {
        let Some(gemma4) = shape.gemma4 else { return };
        let (d, e) = (shape.n_embd, gemma4.per_layer_embd);
        for (what, n_in, n_out) in [("inp_gate", d, e), ("proj", e, d)] {
            let ty = mixture.layer(what, i, shape, n_in);
            self.random(&format!("blk.{i}.{what}"), ty, [n_in, n_out], of(n_in));
        }
        self.same(&format!("blk.{i}.post_norm"), d, sizes.step);
        self.same(&format!("blk.{i}.layer_output_scale"), 1, 1.0);
    }

    fn push(&mut self, name: String, shape: Vec<usize>, ty: Type, fill: Fill) {
        let shape = shape.into_iter().map(|n| n as u64).collect();
        self.0.push(Weight { name, shape, ty, fill });
    }

    fn random(&mut self, name: &str, ty: Type, shape: [usize; 2], spread: f32) {
        self.push(format!("{name}.weight"), shape.to_vec(), ty, Fill::Random { spread });
    }

    fn same(&mut self, name: &str, n: usize, value: f32) {
        self.values(&format!("{name}.weight"), vec![value; n]);
    }

    fn values(&mut self, name: &str, values: Vec<f32>) {
        self.push(name.into(), vec![values.len()], Type::F32, Fill::Values(values));
    }
}

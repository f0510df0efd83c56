//! One layer: pre-norm attention and pre-norm SwiGLU around a residual. Llama, Qwen2 and Qwen3 differ
//! in what the blocks hold (biases, head norms, rotation), not in how they are joined.

use super::blocks::{
    AdaptedLinear, Attention, AttentionSaved, Heads, Pair, RmsNorm, Rotary, SwiGlu, SwiGluSaved,
};
use super::memo::Memo;
use super::{Config, Lora, Target, Weights};
use crate::ggml::{Arena, Graph, Tensor, TensorSet};
use crate::ops::Segment;

/// An adapter as a layer sees it: its tensors and, in training, where their gradients go.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    /// The pairs.
    pub lora: &'a Lora,
    /// Same layout as the adapter's tensors.
    pub gradients: Option<&'a TensorSet>,
}

impl<'a> Adapter<'a> {
    fn pair(&self, layer: usize, target: Target) -> Option<Pair<'a>> {
        let slot = self.lora.find(layer, target)?;
        let (a, b) = self.lora.pair(slot);
        let gradient = self.gradients.map(|g| (g.get(2 * slot), g.get(2 * slot + 1)));
        Some(Pair { a, b, scale: self.lora.scale(), gradient })
    }
}

/// The blocks of one layer over one batch.
pub struct LayerBlocks<'a> {
    attn_norm: RmsNorm<'a>,
    attention: Attention<'a>,
    ffn_norm: RmsNorm<'a>,
    ffn: SwiGlu<'a>,
}

/// What a layer computes on the way, each `[D, T]` (PAPER section 1).
#[derive(Clone, Copy)]
pub struct Taps<'a> {
    /// norm(H^(l-1))
    pub attn_in: Tensor<'a>,
    /// A^l
    pub attn_out: Tensor<'a>,
    /// norm(H^(l-1) + A^l)
    pub ffn_in: Tensor<'a>,
    /// F^l
    pub ffn_out: Tensor<'a>,
    /// H^l
    pub layer_out: Tensor<'a>,
}

/// What the vjp of a layer needs.
pub struct LayerSaved<'a> {
    x: Tensor<'a>,
    mid: Tensor<'a>,
    attention: AttentionSaved<'a>,
    ffn: SwiGluSaved<'a>,
}

impl<'a> LayerBlocks<'a> {
    /// Layer `layer` (from 1). `positions: [T]`.
    pub fn new(
        config: &Config,
        weights: &Weights<'a>,
        adapter: Option<Adapter<'a>>,
        layer: usize,
        positions: Tensor<'a>,
        segments: &'a [Segment],
    ) -> LayerBlocks<'a> {
        let w = weights.layers[layer - 1];
        let eps = config.rms_eps;
        let linear = |target| AdaptedLinear {
            base: w.linear(target),
            pair: adapter.and_then(|a| a.pair(layer, target)),
        };
        let rotary = Rotary { positions, factors: weights.rope_factors, rope: config.rope };
        let heads = |n, norm: Option<Tensor<'a>>| {
            let norm = norm.map(|weight| RmsNorm { weight, eps });
            Heads { n, size: config.head_size, norm, rotary }
        };
        LayerBlocks {
            attn_norm: RmsNorm { weight: w.attn_norm, eps },
            attention: Attention {
                q: linear(Target::Q),
                k: linear(Target::K),
                v: linear(Target::V),
                o: linear(Target::O),
                q_heads: heads(config.n_head, w.q_norm),
                k_heads: heads(config.n_head_kv, w.k_norm),
                segments,
                scale: config.attention_scale,
            },
            ffn_norm: RmsNorm { weight: w.ffn_norm, eps },
            ffn: SwiGlu {
                gate: linear(Target::Gate),
                up: linear(Target::Up),
                down: linear(Target::Down),
            },
        }
    }

    /// `H^l = H^(l-1) + A^l + F^l` from `x = H^(l-1)`: `[D, T]`.
    ///
    /// A memo that replays gives what the vjp needs; the taps that were not kept are then not to be used.
    pub fn forward(
        &self,
        arena: &'a Arena,
        x: Tensor<'a>,
        memo: &Memo<'a>,
    ) -> (Taps<'a>, LayerSaved<'a>) {
        let attn_in = self.attn_norm.forward(arena, x);
        let (attn_out, attention) = self.attention.forward(arena, attn_in, memo);
        let mid = memo.node(|| arena.add(x, attn_out));
        let ffn_in = self.ffn_norm.forward(arena, mid);
        let (ffn_out, ffn) = self.ffn.forward(arena, ffn_in, memo);
        let layer_out = arena.add(mid, ffn_out);
        let taps = Taps { attn_in, attn_out, ffn_in, ffn_out, layer_out };
        (taps, LayerSaved { x, mid, attention, ffn })
    }

    /// Cotangent of `x` from that of `H^l`, when `wanted`; gradients of the adapter on the way.
    pub fn vjp(
        &self,
        arena: &'a Arena,
        graph: &mut Graph<'a>,
        saved: &LayerSaved<'a>,
        d_out: Tensor<'a>,
        wanted: bool,
    ) -> Option<Tensor<'a>> {
        let d_ffn_in = self.ffn.vjp(arena, graph, &saved.ffn, d_out);
        let d_mid = self.ffn_norm.vjp(arena, saved.mid, d_ffn_in, Some(d_out));
        let d_attn_in = self.attention.vjp(arena, graph, &saved.attention, d_mid, wanted)?;
        Some(self.attn_norm.vjp(arena, saved.x, d_attn_in, Some(d_mid)))
    }
}

//! Gemma 4 (dense, text): as Gemma 3, with heads of another size in full layers, values normalised too, keys and
//! values that the last layers read from earlier ones, an embedding of the token for every layer, and a factor on
//! the whole residual.
//!
//! `H^l = s_l (H^(l-1) + A^l + F^l + P^l)`, `P = norm(proj (gelu(inp_gate x) * g_l))`,
//! `g_l = (norm(W_l H^0 / sqrt(D)) + sqrt(e) T_l) / sqrt(2)` with T_l the token's row for this layer.

use super::{Family, attention_scale, ffn, gemma, sandwich};
use crate::ggml::Type;
use crate::llama::Hparams;
use crate::model::config::Config;
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::{self, Activation::Gelu};

pub static FAMILY: Family = Family {
    name: "gemma4",
    models: "Gemma 4 (E2B, E4B, 31B; text)",
    adjust,
    layer,
    permuted: false,
    modules: &[&[("inp_gate", "per_layer_input_gate"), ("proj", "per_layer_projection")]],
    partial_rope: true,
    grouped_values: false,
    mixture: false,
};

fn adjust(config: &mut Config, h: &Hparams) {
    gemma(config, h);
    // Windowed layers have no factors; of the others a part of each head does not turn.
    for layer in config.layers.iter_mut().filter(|layer| layer.window.is_some()) {
        layer.rope_factors = false;
    }
}

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    let taps = sandwich(t, x, attention, |t, h| ffn(t, h, Gelu));
    let mut out = taps.layer_out;
    if t.config().n_embd_per_layer > 0 {
        let p = per_layer(t, out);
        out = t.add(out, p);
    }
    let scale = t.find_scalar("layer_output_scale.weight").unwrap_or(1.0);
    Taps { layer_out: t.scale(out, scale), ..taps }
}

fn attention(t: &mut Tape<'_>, h: Var) -> Var {
    let (layer, d) = (t.layer(), t.config().n_embd);
    let [k, v] = match t.config().donor(t.index()) {
        Some(donor) => t.shared(donor),
        None => keys_and_values(t, h),
    };
    let q = t.linear(h, "attn_q", layer.q_width());
    let q = t.norm_over(q, "attn_q_norm", layer.head_size);
    let q = t.rotate(q);
    let scale = attention_scale(t);
    let mixed = t.attend(q, k, v, scale);
    t.linear(mixed, "attn_output", d)
}

fn keys_and_values(t: &mut Tape<'_>, h: Var) -> [Var; 2] {
    let layer = t.layer();
    let own = t.has("attn_v.weight").then(|| t.linear(h, "attn_v", layer.kv_width()));
    let k = t.linear(h, "attn_k", layer.kv_width());
    let v = t.norm_plain(own.unwrap_or(k), layer.head_size);
    let k = t.norm_over(k, "attn_k_norm", layer.head_size);
    let k = t.rotate(k);
    t.share([k, v]);
    [k, v]
}

/// P^l, from the residual with A and F.
fn per_layer(t: &mut Tape<'_>, x: Var) -> Var {
    let (d, e) = (t.config().n_embd, t.config().n_embd_per_layer);
    let g = layer_embedding(t);
    let gate = t.linear(x, "inp_gate", e);
    let inner = t.glu(gate, g, Gelu);
    let p = t.linear(inner, "proj", d);
    t.norm(p, "post_norm")
}

/// g_l: `[e, T]`; nothing that is trained is in it.
fn layer_embedding(t: &mut Tape<'_>) -> Var {
    let (config, arena, first) = (t.config(), t.arena(), t.index() - 1);
    let (d, e) = (config.n_embd, config.n_embd_per_layer);
    let all = e * config.n_layer;
    let table = t.global("per_layer_token_embd.weight", &[all, config.n_vocab]);
    let map = t.global("per_layer_model_proj.weight", &[d, all]);
    let norm = t.global("per_layer_proj_norm.weight", &[e]);
    if !e.is_multiple_of(table.ty().block_size()) {
        t.refuse(
            table.name(),
            format!("blocks within the {e} values of a layer"),
            table.ty().name(),
        );
        return t.leaf(arena.tensor(Type::F32, &[e, t.tokens()]));
    }
    let own = t.token_rows(arena.column_range(table, first * e, e)); // T_l: [e, T]
    let h0 = t.embedded(); // [D, T]
    let map = arena.row_range(map, first * e, e);
    let projected = ops::linear(arena, map, h0, None, None); // [e, T]
    let projected = arena.scale(projected, 1.0 / (d as f32).sqrt());
    let projected = ops::rms_norm(arena, projected, norm, config.rms_eps);
    let sum = arena.add(projected, arena.scale(own, (e as f32).sqrt()));
    t.leaf(arena.scale(sum, std::f32::consts::FRAC_1_SQRT_2))
}

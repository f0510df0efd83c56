//! A model's hyperparameters under the keys that llama.cpp reads.

use super::Shape;
use super::shape::Rope;
use crate::gguf::{Array, GgufWriter, Value, ValueType};
use crate::{Error, Result};

/// Adds the architecture's metadata.
pub(super) fn metadata(writer: &mut GgufWriter<'_>, shape: &Shape) -> Result<()> {
    let arch = shape.arch;
    let mut put = |key: &str, value: Value| writer.metadata(&format!("{arch}.{key}"), value);
    let count = |n: usize| {
        u32::try_from(n).map(Value::U32).map_err(|_| {
            Error::invalid("a size of the model", "below 2^32", n.to_string(), "lower it")
        })
    };
    let full = shape.gemma4.map_or(shape.head_size, |g| g.full_head_size);
    let rotated = match shape.rope {
        Rope::Long { rotated, .. } | Rope::Sectioned { rotated, .. } | Rope::Partial(rotated) => {
            rotated
        }
        _ => full,
    };
    for (key, n) in [
        ("vocab_size", shape.n_vocab),
        ("context_length", shape.n_ctx),
        ("embedding_length", shape.n_embd),
        ("block_count", shape.n_layer),
        ("rope.dimension_count", rotated),
        ("attention.head_count", shape.n_head),
        ("attention.head_count_kv", shape.n_head_kv),
        ("attention.key_length", full),
        ("attention.value_length", full),
    ] {
        put(key, count(n)?)?;
    }
    if let Some(e) = shape.experts {
        put("expert_count", count(e.count)?)?;
        put("expert_used_count", count(e.used)?)?;
        put("expert_feed_forward_length", count(e.n_ff)?)?;
        if e.n_ff_shared > 0 {
            put("expert_shared_feed_forward_length", count(e.n_ff_shared)?)?;
        }
    }
    put("rope.freq_base", shape.rope_base.into())?;
    put("attention.layer_norm_rms_epsilon", shape.rms_eps.into())?;
    if let Some(window) = shape.window {
        put("attention.sliding_window", count(window.size)?)?;
    }
    for (key, cap) in [
        ("attn_logit_softcapping", shape.softcaps.attention),
        ("final_logit_softcapping", shape.softcaps.logits),
    ] {
        if let Some(cap) = cap {
            put(key, cap.into())?;
        }
    }
    if let Some(m) = shape.multipliers {
        put("embedding_scale", m.embedding.into())?;
        put("residual_scale", m.residual.into())?;
        put("attention.scale", m.attention.into())?;
        put("logit_scale", m.logits.into())?;
    }
    let widths: Vec<i32> = (0..shape.n_layer).map(|i| shape.n_ff_of(i) as i32).collect();
    if let Some(g) = shape.gemma4 {
        put("feed_forward_length", Array::from(&widths[..]).into())?;
        let windowed: Vec<Value> =
            (0..shape.n_layer).map(|i| shape.is_windowed(i).into()).collect();
        let windowed = Array::new(ValueType::Bool, &windowed)?;
        put("attention.sliding_window_pattern", windowed.into())?;
        put("attention.shared_kv_layers", count(g.n_shared)?)?;
        put("attention.key_length_swa", count(shape.head_size)?)?;
        put("attention.value_length_swa", count(shape.head_size)?)?;
        put("rope.dimension_count_swa", count(shape.head_size)?)?;
        put("rope.freq_base_swa", 1e4f32.into())?;
        put("embedding_length_per_layer_input", count(g.per_layer_embd)?)?;
    } else {
        put("feed_forward_length", count(shape.n_ff)?)?;
    }
    if let Some(delta) = shape.delta {
        put("full_attention_interval", count(delta.period)?)?;
        put("ssm.conv_kernel", count(delta.kernel)?)?;
        put("ssm.state_size", count(delta.size)?)?;
        put("ssm.group_count", count(delta.n_k)?)?;
        put("ssm.time_step_rank", count(delta.n_v)?)?;
        put("ssm.inner_size", count(delta.inner())?)?;
    }
    match shape.rope {
        // llama3's divisors are a tensor.
        Rope::Plain | Rope::Llama3(_) | Rope::Partial(_) => Ok(()),
        Rope::Linear(factor) => {
            put("rope.scaling.type", "linear".into())?;
            put("rope.scaling.factor", factor.into())
        }
        Rope::Yarn { factor, original, temperature } => {
            put("rope.scaling.type", "yarn".into())?;
            put("rope.scaling.factor", factor.into())?;
            put("rope.scaling.original_context_length", count(original)?)?;
            put("rope.scaling.yarn_beta_fast", 32f32.into())?;
            put("rope.scaling.yarn_beta_slow", 1f32.into())?;
            if temperature == 0.0 {
                return Ok(());
            }
            put("rope.scaling.yarn_log_multiplier", 1f32.into())?;
            put("attention.temperature_scale", temperature.into())
        }
        Rope::Sectioned { sections, .. } => {
            put("rope.dimension_sections", Array::from(&sections[..]).into())
        }
        Rope::Long { original, .. } => {
            put("rope.scaling.type", "longrope".into())?;
            put("rope.scaling.original_context_length", count(original)?)?;
            // LongRoPE (arXiv 2402.13753): sqrt(1 + ln(context / original) / ln(original)).
            let longer = (shape.n_ctx as f32 / original as f32).ln();
            let factor = (1.0 + longer / (original as f32).ln()).sqrt();
            put("rope.scaling.attn_factor", factor.into())
        }
    }
}

//! The figures of every layer at the tokens of packed completions: one walk through the model.
//!
//! A layer's input is the layer below's output, so a model of L layers has 5 L + 2 hidden states to look at
//! (H^0, five a layer, and the final norm's output), not 6 L + 1. The four that lie inside a layer go through
//! the unembedding together as soon as it is computed; H^0 .. H^L and the final policy go through at the end,
//! side by side for each token, so that the divergences come out of the same pass.

use crate::model::{Batch, Config, Engine, LayerTaps, Lora, Model, Question, Walk};
use crate::ops::{Answers, pass_columns};
use crate::{Error, Result};

use super::record::{Figure, Tap, Top};
use super::routers::Routed;

/// The policies' top tokens that are always kept.
pub const TOP_TOKENS: usize = 3;

/// What is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Look {
    /// Likeliest tokens of every tap (0: of the layer's and the final policy only, [`TOP_TOKENS`] of them).
    pub top_k: usize,
    /// The final norm before the unembedding at every tap (the paper's ablation).
    pub final_norm: bool,
}

impl Look {
    /// Refuses more tokens than the model has.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self, n_vocab: usize) -> Result<()> {
        if self.top_k <= n_vocab {
            return Ok(());
        }
        let expected = format!("at most {n_vocab}, the size of the vocabulary");
        Err(Error::invalid("--top-k", expected, self.top_k.to_string(), "choose a smaller number"))
    }

    fn policy_top_k(&self, n_vocab: usize) -> usize {
        if self.top_k > 0 { self.top_k } else { TOP_TOKENS.min(n_vocab) }
    }
}

/// One layer at one token.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Measured {
    /// By [`Figure`].
    pub figures: [f32; Figure::N],
    /// By [`Tap`].
    pub tops: [Option<Top>; 7],
    /// The router's choice, in a mixture of experts.
    pub routed: Option<Routed>,
}

/// Looks at the tokens `picked` (indices into `batch.scored`): `[layer - 1][picked]`.
///
/// Memory: [`measure_bytes`], and one layer's graph.
pub fn measure(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    batch: &Batch,
    picked: &[usize],
    look: Look,
) -> Result<Vec<Vec<Measured>>> {
    let n_layer = model.config().n_layer;
    let rows: Vec<i32> = picked.iter().map(|&i| batch.scored[i].row).collect();
    let taken: Vec<i32> = picked.iter().map(|&i| batch.scored[i].target).collect();
    let mut layers: Vec<Vec<Measured>> = Vec::with_capacity(n_layer);
    let mut walk = Walk::new(engine, model, lora, batch, &rows)?;
    let mut input = walk.hidden();
    // H^0 .. H^L and norm(H^L): [D, S] each
    let mut policies = vec![seen(engine, model, input.clone(), look)?];
    while let Some(taps) = walk.next(engine)? {
        layers.push(inside(engine, model, lora, &input, &taps, &taken, look)?);
        policies.push(seen(engine, model, taps.layer_out.clone(), look)?);
        input = taps.layer_out;
    }
    policies.push(engine.final_norm(model, &input)?);
    let group = policies.len();
    let top_k = look.policy_top_k(model.config().n_vocab);
    let policies: Vec<&[f32]> = policies.iter().map(Vec::as_slice).collect();
    let question = Question { taken: Some(&taken), top_k };
    let answers = engine.policies(model, lora, &policies, question)?;
    for (l, layer) in layers.iter_mut().enumerate() {
        for (i, m) in layer.iter_mut().enumerate() {
            let (below, own, last) = (i * group + l, i * group + l + 1, i * group + n_layer + 1);
            for (figure, value) in [
                (Figure::LayerIn, answers.entropy(below)),
                (Figure::LayerOut, answers.entropy(own)),
                (Figure::FinalEntropy, answers.entropy(last)),
                (Figure::FinalLogprob, answers.taken_logprob(last)),
                (Figure::KlToFinal, answers.kl_to(own)),
                (Figure::KlFromFinal, answers.kl_from(own)),
                (Figure::Top1Agrees, (answers.best(own) == answers.best(last)) as u8 as f32),
            ] {
                m.figures[figure as usize] = value;
            }
            if look.top_k > 0 {
                m.tops[Tap::LayerIn as usize] = Some(top(&answers, below));
            }
            m.tops[Tap::LayerOut as usize] = Some(top(&answers, own));
            m.tops[Tap::Final as usize] = Some(top(&answers, last));
        }
    }
    Ok(layers)
}

/// Bytes that [`measure`] takes for `picked` of so many `tokens`, but for a layer's graph.
pub fn measure_bytes(config: &Config, tokens: usize, picked: usize) -> usize {
    let group = config.n_layer + 2;
    // The walk's two residuals; the policies' hidden states, and those of a pass once more, twice; a layer's taps and input, and
    // the inner ones side by side.
    let pass = pass_columns(group).min(group * picked);
    let floats = config.n_embd * (2 * tokens + group * picked + 2 * pass + 10 * picked);
    let tops = 2 * TOP_TOKENS * (size_of::<i32>() + size_of::<f32>());
    4 * floats + config.n_layer * picked * (size_of::<Measured>() + tops)
}

/// A tap as the unembedding sees it.
fn seen(engine: &mut Engine, model: &Model, hidden: Vec<f32>, look: Look) -> Result<Vec<f32>> {
    if look.final_norm { engine.final_norm(model, &hidden) } else { Ok(hidden) }
}

/// The figures that one layer gives by itself: its inner taps, cosines and norms. `input`: H^(l-1), `[D, S]`.
fn inside(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    input: &[f32],
    taps: &LayerTaps,
    taken: &[i32],
    look: Look,
) -> Result<Vec<Measured>> {
    let (d, s) = (model.config().n_embd, taken.len());
    let inner = [&taps.attn_in, &taps.attn_out, &taps.ffn_in, &taps.ffn_out];
    let columns = seen(engine, model, inner.map(|tap| tap.as_slice()).concat(), look)?; // [D, 4 S]
    let repeated = taken.repeat(4);
    let wanted = (look.top_k > 0).then_some(repeated.as_slice());
    let question = Question { taken: wanted, top_k: look.top_k };
    let answers = engine.policies(model, lora, &[&columns], question)?;
    let token = |tap: &[f32], i: usize| -> Vec<f32> { tap[i * d..][..d].to_vec() };
    let measured = (0..s).map(|i| {
        let (residual, attn, ffn) =
            (token(input, i), token(&taps.attn_out, i), token(&taps.ffn_out, i));
        let middle: Vec<f32> = residual.iter().zip(&attn).map(|(h, a)| h + a).collect();
        let routed = taps.routing.as_ref().map(|r| Routed::new(r.logits(i), r.experts(i)));
        let mut m = Measured { figures: [0.0; Figure::N], tops: [const { None }; 7], routed };
        for (figure, value) in [
            (Figure::AttnIn, answers.entropy(i)),
            (Figure::AttnOut, answers.entropy(s + i)),
            (Figure::FfnIn, answers.entropy(2 * s + i)),
            (Figure::FfnOut, answers.entropy(3 * s + i)),
            (Figure::CosAttn, cosine(&attn, &residual)),
            (Figure::CosFfn, cosine(&ffn, &middle)),
            (Figure::NormLayerIn, norm(&residual)),
            (Figure::NormAttnIn, norm(&token(&taps.attn_in, i))),
            (Figure::NormAttnOut, norm(&attn)),
            (Figure::NormFfnIn, norm(&token(&taps.ffn_in, i))),
            (Figure::NormFfnOut, norm(&ffn)),
            (Figure::NormLayerOut, norm(&token(&taps.layer_out, i))),
        ] {
            m.figures[figure as usize] = value;
        }
        if look.top_k > 0 {
            let inner = [Tap::AttnIn, Tap::AttnOut, Tap::FfnIn, Tap::FfnOut];
            for (j, tap) in inner.into_iter().enumerate() {
                m.tops[tap as usize] = Some(top(&answers, j * s + i));
            }
        }
        m
    });
    Ok(measured.collect())
}

fn top(answers: &Answers, column: usize) -> Top {
    let (tokens, probs) = answers.top(column).map(|(token, p)| (token, p.exp())).unzip();
    Top {
        tokens,
        texts: Vec::new(),
        probs,
        taken_prob: answers.taken_logprob(column).exp(),
        taken_rank: answers.taken_rank(column),
    }
}

/// Sum of products, in f64.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

/// Euclidean norm.
pub fn norm(a: &[f32]) -> f32 {
    dot(a, a).sqrt() as f32
}

/// Cosine of the angle between two vectors; 0 where one of them has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let length = (dot(a, a) * dot(b, b)).sqrt();
    if length > 0.0 { (dot(a, b) / length) as f32 } else { 0.0 }
}

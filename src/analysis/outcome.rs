//! `summary.json`, and the same as a table.

use std::fmt::Write;

use serde::Serialize;

use super::dump::{Findings, Settings};
use super::lenses::{Lenses, Seen};
use super::record::Figure;
use super::routers::ExpertLoad;
use super::summary::{Boundary, Change, LayerMeans, Sums, boundary};
use crate::model::runs;

/// One model's means.
#[derive(Clone, Debug, Serialize)]
pub struct Means {
    /// Mean entropy of the final policy, nats.
    pub final_entropy: f64,
    /// Its standard error.
    pub final_entropy_se: f64,
    /// exp(-mean log-prob of the taken tokens) under the final policy.
    pub perplexity: f64,
    /// The last layer whose FFN raises the entropy on the mean; null where none does.
    pub boundary_layer: Option<usize>,
    /// For `train --internal-layer`.
    pub recommended_internal_layer: usize,
    /// How sure the boundary is, and why.
    pub boundary: Boundary,
    /// What mixes tokens in each layer, `attention` or `delta net`: A is what that adds.
    pub mixers: Vec<&'static str>,
    /// From layer 1 up.
    pub layers: Vec<LayerMeans>,
    /// Load of the experts and entropy of the routers, of the layers that have any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertLoad>,
}

impl Means {
    /// From running sums over at least one token, and what mixes tokens in each layer.
    pub fn new(sums: &Sums, mixers: &[&'static str]) -> Means {
        let layers = sums.means();
        let boundary = boundary(&layers);
        let last = &layers[0]; // the final policy's figures are the same in every layer
        Means {
            final_entropy: last.get(Figure::FinalEntropy).mean,
            final_entropy_se: last.get(Figure::FinalEntropy).se,
            perplexity: (-last.get(Figure::FinalLogprob).mean).exp(),
            boundary_layer: boundary.layer,
            recommended_internal_layer: boundary.recommended,
            boundary,
            mixers: mixers.to_vec(),
            layers,
            experts: sums.experts(),
        }
    }

    /// Which layers have which token mixer; none where all have attention.
    pub fn mixed(&self) -> Option<String> {
        let of = |kind: &str| -> Vec<usize> {
            let layers = self.mixers.iter().enumerate().filter(|(_, mixer)| **mixer == kind);
            layers.map(|(i, _)| i + 1).collect()
        };
        let (mut kinds, all) = (self.mixers.clone(), self.mixers.len());
        kinds.sort();
        kinds.dedup();
        let words = kinds.iter().map(|kind| format!("{kind} in layers {}", runs(&of(kind))));
        (of("attention").len() < all).then(|| words.collect::<Vec<_>>().join(", "))
    }
}

/// Second model less first, token by token.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// Of the final policy's entropy, nats.
    pub final_entropy: f64,
    /// Its standard error.
    pub final_entropy_se: f64,
    /// From layer 1 up.
    pub layers: Vec<LayerMeans>,
}

/// The layers' policies through both lenses, from layer 1 up.
#[derive(Clone, Debug, Serialize)]
pub struct BothLenses {
    /// Tokens looked at, the first of the data.
    pub tokens: usize,
    /// Without the final norm.
    pub raw: Vec<Seen>,
    /// With it.
    pub final_norm: Vec<Seen>,
}

impl BothLenses {
    fn new(lenses: &Lenses) -> BothLenses {
        let [raw, final_norm] = lenses.means();
        BothLenses { tokens: lenses.tokens, raw, final_norm }
    }
}

/// All that a dump has found out.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What was asked.
    #[serde(flatten)]
    pub settings: Settings,
    /// Rows read.
    pub rows: u64,
    /// Rows left out.
    pub rows_left_out: u64,
    /// Why, of the first of them.
    pub left_out: Vec<String>,
    /// Completions measured.
    pub samples: u64,
    /// Tokens measured, each in every layer.
    pub tokens: u64,
    /// Whether it was stopped before the end of the data.
    pub interrupted: bool,
    /// The layers' policies without and with the final norm before the unembedding, on the same first tokens.
    pub lenses: BothLenses,
    /// The model's means.
    #[serde(flatten)]
    pub means: Means,
    /// Those of the model that it is compared with.
    pub compared: Option<Means>,
    /// The compared one's less the model's.
    pub difference: Option<Difference>,
}

impl Outcome {
    /// From the findings of a dump.
    pub fn new(settings: &Settings, findings: &Findings) -> Outcome {
        let means = |side: usize| Means::new(&findings.sums[side], &findings.mixers[side]);
        let compared = (findings.sums.len() > 1).then(|| means(1));
        let difference = compared.as_ref().map(|_| {
            let layers = findings.difference.means();
            let last = layers[0].get(Figure::FinalEntropy);
            Difference { final_entropy: last.mean, final_entropy_se: last.se, layers }
        });
        Outcome {
            settings: settings.clone(),
            rows: findings.rows,
            rows_left_out: findings.refused,
            left_out: findings.reasons.clone(),
            samples: findings.samples,
            tokens: findings.sums[0].tokens(),
            interrupted: findings.interrupted,
            lenses: BothLenses::new(&findings.lenses),
            means: means(0),
            compared,
            difference,
        }
    }

    /// What a person reads on the terminal.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let name = |model: &Option<String>, adapter: &Option<String>| {
            let model = model.clone().unwrap_or_else(|| self.settings.model.clone());
            match adapter {
                Some(adapter) => format!("{model} with {adapter}"),
                None => model,
            }
        };
        let first = name(&None, &self.settings.adapter);
        let _ = writeln!(text, "{first}");
        one(&mut text, &self.means);
        if let (Some(compared), Some(difference)) = (&self.compared, &self.difference) {
            let second = name(&self.settings.compare, &self.settings.compare_adapter);
            let _ = writeln!(text, "\n{second}");
            one(&mut text, compared);
            let _ = writeln!(text, "\nthe second less the first, token by token");
            layers(&mut text, &difference.layers);
            let (mean, se) = (difference.final_entropy, difference.final_entropy_se);
            let _ =
                writeln!(text, "final policy's entropy {mean:+.4} nats (standard error {se:.4})");
        }
        let left_out = match self.rows_left_out {
            0 => String::new(),
            n => format!(", {n} left out"),
        };
        let _ = write!(
            text,
            "\n{} tokens of {} completions, {} rows{left_out}",
            self.tokens, self.samples, self.rows
        );
        text
    }
}

fn one(text: &mut String, means: &Means) {
    layers(text, &means.layers);
    if let Some(mixed) = means.mixed() {
        let _ = writeln!(text, "token mixers     {mixed}; attn_in and attn_out are theirs");
    }
    let _ = writeln!(
        text,
        "final policy     entropy {:.4} nats, perplexity {:.3}\ninternal layer   {}: {}",
        means.final_entropy, means.perplexity, means.recommended_internal_layer, means.boundary.why
    );
    if means.experts.is_empty() {
        return;
    }
    let _ = writeln!(text, "layer  router entropy  load entropy (of ln E)  busiest expert  unused");
    for e in &means.experts {
        let most = e.load.iter().copied().fold(0.0, f64::max);
        let busiest = e.load.iter().position(|&p| p == most).unwrap_or(0);
        let _ = writeln!(
            text,
            "{:>5}  {:>14.3}  {:>12.3}  ({:>5.3})  {busiest:>6} {:>6.1} %  {:>6}",
            e.layer,
            e.router_entropy,
            e.load_entropy,
            (e.load.len() as f64).ln(),
            100.0 * most,
            e.unused,
        );
    }
}

fn layers(text: &mut String, layers: &[LayerMeans]) {
    let _ = writeln!(
        text,
        "layer  layer_in  attn_in attn_out   ffn_in  ffn_out layer_out  dH_layer  dH_attn   dH_ffn (se)      cos_attn  cos_ffn  kl_to_final  kl_from  top1"
    );
    for l in layers {
        let m = |figure| l.get(figure).mean;
        let c = |change| l.change(change).mean;
        let _ = writeln!(
            text,
            "{:>5}  {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>8.3}  {:>8.3}  {:>+8.3} {:>+8.3} {:>+8.3} ({:.3})  {:>+8.3} {:>+8.3}  {:>11.3} {:>8.3} {:>5.2}",
            l.layer,
            m(Figure::LayerIn),
            m(Figure::AttnIn),
            m(Figure::AttnOut),
            m(Figure::FfnIn),
            m(Figure::FfnOut),
            m(Figure::LayerOut),
            c(Change::Layer),
            c(Change::Attn),
            c(Change::Ffn),
            l.change(Change::Ffn).margin(),
            m(Figure::CosAttn),
            m(Figure::CosFfn),
            m(Figure::KlToFinal),
            m(Figure::KlFromFinal),
            m(Figure::Top1Agrees),
        );
    }
}

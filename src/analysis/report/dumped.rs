//! The page of an entropy dump: the paper's figures for one model, or for two side by side.

use super::chart::{Body, Chart, Mark, Series};
use super::grid;
use super::page::{Page, Part, Section};
use crate::analysis::dump::Findings;
use crate::analysis::lenses::Seen;
use crate::analysis::outcome::{BothLenses, Means, Outcome};
use crate::analysis::record::Figure;
use crate::analysis::routers::ExpertLoad;
use crate::analysis::summary::{Change, LayerMeans, Mean};

/// The page of these findings.
pub fn of_dump(outcome: &Outcome, findings: &Findings) -> Page {
    let settings = &outcome.settings;
    let name = |model: &str, adapter: &Option<String>| match adapter {
        Some(adapter) => format!("{model} with {adapter}"),
        None => model.to_string(),
    };
    let first = name(&settings.model, &settings.adapter);
    let second = outcome.compared.as_ref().map(|means| {
        let model = settings.compare.as_ref().unwrap_or(&settings.model);
        (name(model, &settings.compare_adapter), means)
    });
    let mut page = Page {
        title: format!("Inside {first}"),
        subtitle: format!(
            "{} tokens of {} completions from {}, teacher-forced; entropies in nats at temperature 1{}",
            outcome.tokens,
            outcome.samples,
            settings.data,
            if settings.look.final_norm { ", final norm before the unembedding" } else { "" },
        ),
        facts: facts(&outcome.means, ""),
        sections: Vec::new(),
    };
    if let Some((name, means)) = &second {
        page.subtitle += &format!("; compared with {name} (dashed)");
        page.facts.extend(facts(means, "compared: "));
    }
    let sides: Vec<&[LayerMeans]> = std::iter::once(&outcome.means)
        .chain(second.iter().map(|(_, means)| *means))
        .map(|means| means.layers.as_slice())
        .collect();
    page.sections.push(layers(&sides, &outcome.means));
    if !outcome.means.experts.is_empty() {
        page.sections.push(experts(&outcome.means.experts));
    }
    page.sections.push(both_lenses(&outcome.lenses));
    if let Some(difference) = &outcome.difference {
        page.sections.push(differences(&difference.layers));
    }
    if let Some(part) = grid::part(findings, outcome.means.layers.len(), settings.look.final_norm) {
        page.sections.push(Section {
            title: "Token by token".into(),
            text: "In each cell the likeliest token of a layer's policy where the token above the column is chosen; a frame \
                   where they are the same. Point at a cell, or touch it, for what else it holds likely."
                .into(),
            parts: vec![part],
        });
    }
    page.sections.push(Section {
        title: "Figures".into(),
        text: "Means over tokens; dH_ffn with its standard error.".into(),
        parts: vec![table(&outcome.means.layers)],
    });
    page
}

/// Each layer's router, and its busiest experts.
fn experts(layers: &[ExpertLoad]) -> Section {
    let head = ["layer", "router entropy, nats", "load entropy, nats", "unused", "busiest experts"];
    let row = |e: &ExpertLoad| {
        let mut busiest: Vec<(usize, f64)> = e.load.iter().copied().enumerate().collect();
        busiest.sort_by(|a, b| b.1.total_cmp(&a.1));
        let busiest = busiest.iter().take(8).map(|(i, p)| format!("{i}: {:.1} %", 100.0 * p));
        vec![
            e.layer.to_string(),
            format!("{:.3}", e.router_entropy),
            format!("{:.3} of {:.3}", e.load_entropy, (e.load.len() as f64).ln()),
            e.unused.to_string(),
            busiest.collect::<Vec<_>>().join(", "),
        ]
    };
    Section {
        title: "Experts".into(),
        text: "How sure the routers are (entropy of the softmax over all experts), and how evenly they spread the \
               tokens: a load entropy of ln E means that all experts are equally busy."
            .into(),
        parts: vec![Part::Table(head.map(String::from).into(), layers.iter().map(row).collect())],
    }
}

fn facts(means: &Means, of: &str) -> Vec<(String, String)> {
    let boundary = match means.boundary.layer {
        Some(layer) if means.boundary.tie => format!("{layer} (tie)"),
        Some(layer) => layer.to_string(),
        None => "none".into(),
    };
    [
        ("final policy's entropy", format!("{:.3} nats", means.final_entropy)),
        ("perplexity", format!("{:.2}", means.perplexity)),
        ("boundary layer", format!("{boundary} of {}", means.layers.len())),
        ("internal layer to train", means.recommended_internal_layer.to_string()),
    ]
    .into_iter()
    .chain(means.mixed().map(|mixed| ("token mixers (\"attention\" below)", mixed)))
    .map(|(name, value)| (format!("{of}{name}"), value))
    .collect()
}

/// A curve over layers for each side, the second dashed.
fn curves(
    sides: &[&[LayerMeans]],
    name: &str,
    colour: usize,
    bars: bool,
    of: impl Fn(&LayerMeans) -> Mean,
) -> Vec<Series> {
    let one = |(side, layers): (usize, &&[LayerMeans])| {
        let points = layers.iter().map(|l| (l.layer as f64, Some(of(l).mean))).collect();
        let mut series = Series::new(name, colour, points);
        if bars {
            series.errors = Some(layers.iter().map(|l| of(l).margin()).collect());
        }
        if side > 0 {
            series.name += " (compared)";
            series = series.dashed();
        }
        series
    };
    sides.iter().enumerate().map(one).collect()
}

fn chart(id: &str, title: &str, y: &str, caption: &str, series: Vec<Series>, zero: bool) -> Chart {
    Chart {
        id: id.into(),
        title: title.into(),
        caption: caption.into(),
        x: "layer".into(),
        y: y.into(),
        body: Body::Lines { series, marks: Vec::new(), zero },
    }
}

fn layers(sides: &[&[LayerMeans]], means: &Means) -> Section {
    let entropy = |name: &str, colour, figure: Figure| {
        curves(sides, name, colour, false, move |l| l.get(figure))
    };
    let flow = [
        entropy("layer input", 6, Figure::LayerIn),
        entropy("attention output", 1, Figure::AttnOut),
        entropy("FFN output", 2, Figure::FfnOut),
        entropy("layer output", 0, Figure::LayerOut),
        entropy("final policy", 3, Figure::FinalEntropy),
    ];
    let normed = [
        entropy("normed attention input", 1, Figure::AttnIn),
        entropy("normed FFN input", 2, Figure::FfnIn),
    ];
    let change = |name: &str, colour, change: Change| {
        curves(sides, name, colour, true, move |l| l.change(change))
    };
    let changes = [
        change("layer", 0, Change::Layer),
        change("attention", 1, Change::Attn),
        change("FFN", 2, Change::Ffn),
    ];
    let figure = |name: &str, colour, bars, figure: Figure| {
        curves(sides, name, colour, bars, move |l| l.get(figure))
    };
    let cosines = [
        figure("attention output", 1, true, Figure::CosAttn),
        figure("FFN output", 2, true, Figure::CosFfn),
    ];
    let divergence = [
        figure("KL(layer || final)", 0, true, Figure::KlToFinal),
        figure("KL(final || layer)", 1, true, Figure::KlFromFinal),
    ];
    let ratio = |name: &str, colour, figure: Figure| {
        curves(sides, name, colour, false, move |l| Mean {
            mean: l.get(figure).mean / l.get(Figure::NormLayerIn).mean,
            se: f64::NAN,
        })
    };
    let sizes = [
        ratio("attention output", 1, Figure::NormAttnOut),
        ratio("FFN output", 2, Figure::NormFfnOut),
    ];
    let mut dh = chart(
        "entropy-change",
        "Entropy change by layer and module",
        "dH, nats",
        "Output less (normed) input. Above zero a module explores, below it integrates; bars are standard errors. The boundary layer is the last whose FFN is above zero.",
        changes.concat(),
        true,
    );
    if let (Body::Lines { marks, .. }, Some(layer)) = (&mut dh.body, means.boundary.layer) {
        let tie = if means.boundary.tie { ", tie" } else { "" };
        marks.push(Mark { at: layer as f64, label: format!("boundary layer {layer}{tie}") });
    }
    let parts = vec![
        chart(
            "entropy-flow",
            "Entropy through the layers",
            "entropy, nats",
            "What the residual stream says before (input) and after (output) each layer, and what the two modules add to it.",
            flow.concat(),
            false,
        ),
        dh,
        chart(
            "entropy-inputs",
            "Entropy of the modules' normed inputs",
            "entropy, nats",
            "The references of dH for attention and FFN.",
            normed.concat(),
            false,
        ),
        chart(
            "cosines",
            "Cosine with the residual",
            "cosine",
            "Near 0 a module writes new features, below it suppresses, above it amplifies what is there.",
            cosines.concat(),
            true,
        ),
        chart(
            "divergence",
            "Divergence from the final policy",
            "KL, nats",
            "How far each internal layer policy is from what the model says in the end.",
            divergence.concat(),
            true,
        ),
        chart(
            "agreement",
            "Top token as in the final policy",
            "share of tokens",
            "Share of tokens whose likeliest token is already the final one.",
            figure("layer policy", 0, true, Figure::Top1Agrees),
            true,
        ),
        chart(
            "sizes",
            "Size of what a module adds",
            "norm / norm of layer input",
            "Mean Euclidean norm of a module's output beside that of the layer's input.",
            sizes.concat(),
            true,
        ),
    ];
    Section {
        title: "Layer by layer".into(),
        text: format!("Internal layer for training: {}.", means.boundary.why),
        parts: parts.into_iter().map(Part::Chart).collect(),
    }
}

/// The layers' policies without and with the final norm before the unembedding.
fn both_lenses(lenses: &BothLenses) -> Section {
    let curves = |of: fn(&Seen) -> f64| {
        let one = |name: &str, colour: usize, layers: &[Seen]| {
            let points = layers.iter().zip(1..).map(|(s, l)| (l as f64, Some(of(s)))).collect();
            Series::new(name, colour, points)
        };
        vec![
            one("without final norm", 0, &lenses.raw),
            one("with final norm", 1, &lenses.final_norm),
        ]
    };
    let parts = [
        chart(
            "lens-entropy",
            "Entropy of the layers' policies",
            "nats",
            "Without the norm the sizes of hidden states decide how sure a policy is.",
            curves(|s| s.entropy),
            true,
        ),
        chart(
            "lens-divergence",
            "Divergence from the final policy",
            "KL, nats",
            "A policy further than about 10 nats holds likely what the model rules out in the end.",
            curves(|s| s.kl_to_final),
            true,
        ),
        chart(
            "lens-agreement",
            "Top token as in the final policy",
            "share of tokens",
            "A policy that hardly ever has the final one's likeliest token means nothing to it.",
            curves(|s| s.top1_agrees),
            true,
        ),
    ];
    Section {
        title: "Both lenses".into(),
        text: format!(
            "The same first {} tokens, with the final norm before the unembedding (--final-norm) and without it.",
            lenses.tokens
        ),
        parts: parts.into_iter().map(Part::Chart).collect(),
    }
}

fn differences(layers: &[LayerMeans]) -> Section {
    let sides = [layers];
    let figure = |name: &str, colour, figure: Figure| {
        curves(&sides, name, colour, true, move |l| l.get(figure))
    };
    let change = |name: &str, colour, change: Change| {
        curves(&sides, name, colour, true, move |l| l.change(change))
    };
    let parts = [
        chart(
            "difference-entropy",
            "Difference of entropies",
            "nats",
            "The compared model less the first, token by token; bars are standard errors of the paired difference.",
            [
                figure("attention output", 1, Figure::AttnOut),
                figure("FFN output", 2, Figure::FfnOut),
                figure("layer output", 0, Figure::LayerOut),
            ]
            .concat(),
            true,
        ),
        chart(
            "difference-change",
            "Difference of entropy changes",
            "nats",
            "The same of dH.",
            [
                change("layer", 0, Change::Layer),
                change("attention", 1, Change::Attn),
                change("FFN", 2, Change::Ffn),
            ]
            .concat(),
            true,
        ),
        chart(
            "difference-cosines",
            "Difference of cosines",
            "cosine",
            "The same of the cosines with the residual.",
            [
                figure("attention output", 1, Figure::CosAttn),
                figure("FFN output", 2, Figure::CosFfn),
            ]
            .concat(),
            true,
        ),
        chart(
            "difference-divergence",
            "Difference of divergences",
            "nats",
            "The same of the divergences from each model's own final policy.",
            [
                figure("KL(layer || final)", 0, Figure::KlToFinal),
                figure("KL(final || layer)", 1, Figure::KlFromFinal),
            ]
            .concat(),
            true,
        ),
    ];
    Section {
        title: "What differs".into(),
        text: String::new(),
        parts: parts.into_iter().map(Part::Chart).collect(),
    }
}

fn table(layers: &[LayerMeans]) -> Part {
    let head = [
        "layer",
        "layer in",
        "attn in",
        "attn out",
        "ffn in",
        "ffn out",
        "layer out",
        "dH layer",
        "dH attn",
        "dH ffn",
        "\u{b1}",
        "cos attn",
        "cos ffn",
        "KL to final",
        "KL from final",
        "top 1",
    ];
    let row = |l: &LayerMeans| {
        let mut cells = vec![l.layer.to_string()];
        let mean = |figure: Figure| format!("{:.3}", l.get(figure).mean);
        let change = |change: Change| format!("{:+.3}", l.change(change).mean);
        cells.extend(
            [
                Figure::LayerIn,
                Figure::AttnIn,
                Figure::AttnOut,
                Figure::FfnIn,
                Figure::FfnOut,
                Figure::LayerOut,
            ]
            .map(mean),
        );
        cells.extend([Change::Layer, Change::Attn, Change::Ffn].map(change));
        cells.push(format!("{:.3}", l.change(Change::Ffn).margin()));
        cells.extend(
            [
                Figure::CosAttn,
                Figure::CosFfn,
                Figure::KlToFinal,
                Figure::KlFromFinal,
                Figure::Top1Agrees,
            ]
            .map(mean),
        );
        cells
    };
    Part::Table(head.map(String::from).into(), layers.iter().map(row).collect())
}

//! One line of `entropy.jsonl`, and the same columns for `entropy.parquet`: what one layer makes of one
//! position of one completion.

use std::io::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::routers::Routed;
use crate::error::json_fault;
use crate::{Error, Result};

/// The places in a layer whose hidden states are looked at, and the final policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tap {
    /// H^(l-1)
    LayerIn,
    /// norm(H^(l-1))
    AttnIn,
    /// A^l
    AttnOut,
    /// norm(H^(l-1) + A^l)
    FfnIn,
    /// F^l
    FfnOut,
    /// H^l: the internal layer policy
    LayerOut,
    /// norm(H^L): the model's own policy
    Final,
}

impl Tap {
    /// All, in the order of computation.
    pub const ALL: [Tap; 7] = [
        Tap::LayerIn,
        Tap::AttnIn,
        Tap::AttnOut,
        Tap::FfnIn,
        Tap::FfnOut,
        Tap::LayerOut,
        Tap::Final,
    ];

    /// As in column names.
    pub fn name(self) -> &'static str {
        match self {
            Tap::LayerIn => "layer_in",
            Tap::AttnIn => "attn_in",
            Tap::AttnOut => "attn_out",
            Tap::FfnIn => "ffn_in",
            Tap::FfnOut => "ffn_out",
            Tap::LayerOut => "layer_out",
            Tap::Final => "final",
        }
    }
}

impl std::str::FromStr for Tap {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Tap, String> {
        Tap::ALL
            .into_iter()
            .find(|tap| tap.name() == name)
            .ok_or_else(|| format!("expected {}", Tap::ALL.map(Tap::name).join(", ")))
    }
}

/// The numbers of a record. Entropies, divergences and log-probs in nats, at temperature 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Entropy of softmax(H^(l-1) E_u^T), and so on for the taps.
    LayerIn,
    /// Entropy at norm(H^(l-1)).
    AttnIn,
    /// Entropy at A^l.
    AttnOut,
    /// Entropy at norm(H^(l-1) + A^l).
    FfnIn,
    /// Entropy at F^l.
    FfnOut,
    /// Entropy at H^l.
    LayerOut,
    /// Entropy of the final policy.
    FinalEntropy,
    /// log p(taken token) of the final policy.
    FinalLogprob,
    /// KL(internal layer policy || final policy).
    KlToFinal,
    /// KL(final policy || internal layer policy).
    KlFromFinal,
    /// 1 where both have the same likeliest token.
    Top1Agrees,
    /// cos(A^l, H^(l-1)).
    CosAttn,
    /// cos(F^l, H^(l-1) + A^l).
    CosFfn,
    /// Euclidean norm of H^(l-1), and so on.
    NormLayerIn,
    /// Norm of the normed attention input.
    NormAttnIn,
    /// Norm of A^l.
    NormAttnOut,
    /// Norm of the normed FFN input.
    NormFfnIn,
    /// Norm of F^l.
    NormFfnOut,
    /// Norm of H^l.
    NormLayerOut,
}

impl Figure {
    /// How many there are.
    pub const N: usize = 19;

    /// All, in the order of columns, with their names.
    pub const ALL: [(Figure, &'static str); Figure::N] = [
        (Figure::LayerIn, "layer_in"),
        (Figure::AttnIn, "attn_in"),
        (Figure::AttnOut, "attn_out"),
        (Figure::FfnIn, "ffn_in"),
        (Figure::FfnOut, "ffn_out"),
        (Figure::LayerOut, "layer_out"),
        (Figure::FinalEntropy, "final_entropy"),
        (Figure::FinalLogprob, "final_logprob"),
        (Figure::KlToFinal, "kl_to_final"),
        (Figure::KlFromFinal, "kl_from_final"),
        (Figure::Top1Agrees, "top1_agrees"),
        (Figure::CosAttn, "cos_attn"),
        (Figure::CosFfn, "cos_ffn"),
        (Figure::NormLayerIn, "norm_layer_in"),
        (Figure::NormAttnIn, "norm_attn_in"),
        (Figure::NormAttnOut, "norm_attn_out"),
        (Figure::NormFfnIn, "norm_ffn_in"),
        (Figure::NormFfnOut, "norm_ffn_out"),
        (Figure::NormLayerOut, "norm_layer_out"),
    ];
}

/// The likeliest tokens of one policy, and how it sees the token that was taken.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Top {
    /// Likeliest first.
    pub tokens: Vec<i32>,
    /// Their texts; empty until a record is made of them.
    pub texts: Vec<String>,
    /// Their probabilities.
    pub probs: Vec<f32>,
    /// Probability of the taken token.
    pub taken_prob: f32,
    /// Its rank, from 1.
    pub taken_rank: u32,
}

/// One (row, completion, layer, position).
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Row of the data, from 0.
    pub row: usize,
    /// Completion of the row, from 0.
    pub completion: usize,
    /// From 1.
    pub layer: usize,
    /// Place in the sequence (prompt included, from 0) of the token whose hidden state this is.
    pub position: usize,
    /// The token taken there: the one at `position + 1`.
    pub token: i32,
    /// Its text.
    pub text: String,
    /// By [`Figure`].
    pub figures: [f32; Figure::N],
    /// By [`Tap`]; always of the layer's and the final policy, of the others when asked for.
    pub tops: [Option<Top>; 7],
    /// The router's choice, where the layer has one: `experts` and `router_entropy`.
    pub routed: Option<Routed>,
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole numbers.
    Int,
    /// 32-bit floats.
    Float,
    /// true and false.
    Bool,
    /// Text.
    Text,
    /// Lists of whole numbers.
    Ints,
    /// Lists of floats.
    Floats,
    /// Lists of texts.
    Texts,
}

/// One value.
enum Cell<'r> {
    Int(i64),
    Float(f32),
    Bool(bool),
    Text(&'r str),
    Ints(&'r [i32]),
    Floats(&'r [f32]),
    Texts(&'r [String]),
}

const EXPERTS: &str = "experts";
const ROUTER_ENTROPY: &str = "router_entropy";

/// Names and kinds of all columns; `all_taps`: with the top tokens of every tap; `mixture`: with what routers chose, of a
/// layer without one nothing and 0.
pub fn columns(all_taps: bool, mixture: bool) -> Vec<(String, Kind)> {
    let ints = ["row", "completion", "layer", "position", "token"];
    let mut columns: Vec<_> = ints.map(|name| (name.to_string(), Kind::Int)).into();
    columns.push(("text".into(), Kind::Text));
    columns.extend(Figure::ALL.iter().map(|&(figure, name)| {
        (name.into(), if figure == Figure::Top1Agrees { Kind::Bool } else { Kind::Float })
    }));
    for tap in Tap::ALL {
        if all_taps || matches!(tap, Tap::LayerOut | Tap::Final) {
            for (of, kind) in [
                ("top_tokens", Kind::Ints),
                ("top_texts", Kind::Texts),
                ("top_probs", Kind::Floats),
                ("taken_prob", Kind::Float),
                ("taken_rank", Kind::Int),
            ] {
                columns.push((format!("{}_{of}", tap.name()), kind));
            }
        }
    }
    if mixture {
        columns.push((EXPERTS.into(), Kind::Ints));
        columns.push((ROUTER_ENTROPY.into(), Kind::Float));
    }
    columns
}

impl Record {
    /// One figure.
    pub fn get(&self, figure: Figure) -> f32 {
        self.figures[figure as usize]
    }

    fn cells(&self, mixture: bool) -> Vec<Cell<'_>> {
        let ints = [self.row, self.completion, self.layer, self.position];
        let mut cells: Vec<_> = ints.map(|n| Cell::Int(n as i64)).into();
        cells.extend([Cell::Int(self.token as i64), Cell::Text(&self.text)]);
        cells.extend(Figure::ALL.map(|(figure, _)| match figure {
            Figure::Top1Agrees => Cell::Bool(self.get(figure) != 0.0),
            _ => Cell::Float(self.get(figure)),
        }));
        for top in self.tops.iter().flatten() {
            cells.extend([
                Cell::Ints(&top.tokens),
                Cell::Texts(&top.texts),
                Cell::Floats(&top.probs),
                Cell::Float(top.taken_prob),
                Cell::Int(top.taken_rank as i64),
            ]);
        }
        if mixture {
            let routed = self.routed.as_ref();
            cells.push(Cell::Ints(routed.map_or(&[], |r| &r.experts)));
            cells.push(Cell::Float(routed.map_or(0.0, |r| r.entropy)));
        }
        cells
    }

    /// Writes the record as a line of JSON; `names` are those of [`columns`].
    pub fn write(&self, names: &[(String, Kind)], out: &mut impl Write) -> std::io::Result<()> {
        let mixture = names.last().is_some_and(|(name, _)| name == ROUTER_ENTROPY);
        let cells = self.cells(mixture);
        assert_eq!(cells.len(), names.len(), "a cell for every column");
        for (i, ((name, _), cell)) in names.iter().zip(cells).enumerate() {
            write!(out, "{}\"{name}\":", if i == 0 { '{' } else { ',' })?;
            match cell {
                Cell::Int(n) => serde_json::to_writer(&mut *out, &n),
                Cell::Float(x) => serde_json::to_writer(&mut *out, &x),
                Cell::Bool(b) => serde_json::to_writer(&mut *out, &b),
                Cell::Text(s) => serde_json::to_writer(&mut *out, s),
                Cell::Ints(list) => serde_json::to_writer(&mut *out, list),
                Cell::Floats(list) => serde_json::to_writer(&mut *out, list),
                Cell::Texts(list) => serde_json::to_writer(&mut *out, list),
            }?;
        }
        out.write_all(b"}\n")
    }

    /// Reads back what [`Record::write`] wrote.
    ///
    /// # Errors
    /// A field is missing or of another kind.
    pub fn read(line: &str, place: &str) -> Result<Record> {
        let damaged = |got: String| {
            Error::invalid(place, "a line of entropy.jsonl", got, "start anew in another folder")
        };
        let object: Map<String, Value> =
            serde_json::from_str(line).map_err(|e| damaged(json_fault(&e)))?;
        let field = |name: &str| object.get(name).ok_or_else(|| damaged(format!("no `{name}`")));
        let int = |name: &str| {
            field(name)?.as_u64().map(|n| n as usize).ok_or_else(|| damaged(format!("`{name}`")))
        };
        let float = |name: &str| match field(name)? {
            Value::Bool(b) => Ok(*b as u8 as f32),
            value => value.as_f64().map(|x| x as f32).ok_or_else(|| damaged(format!("`{name}`"))),
        };
        let list = |name: &str| {
            field(name)?.as_array().cloned().ok_or_else(|| damaged(format!("`{name}`")))
        };
        let mut figures = [0.0; Figure::N];
        for (figure, name) in Figure::ALL {
            figures[figure as usize] = float(name)?;
        }
        let mut tops = [const { None }; 7];
        for tap in Tap::ALL {
            let name = |of: &str| format!("{}_{of}", tap.name());
            if !object.contains_key(&name("taken_rank")) {
                continue;
            }
            let tokens = list(&name("top_tokens"))?;
            let texts = list(&name("top_texts"))?;
            let probs = list(&name("top_probs"))?;
            tops[tap as usize] = Some(Top {
                tokens: tokens.iter().filter_map(|t| t.as_i64()).map(|t| t as i32).collect(),
                texts: texts.iter().filter_map(|t| t.as_str()).map(str::to_owned).collect(),
                probs: probs.iter().filter_map(|p| p.as_f64()).map(|p| p as f32).collect(),
                taken_prob: float(&name("taken_prob"))?,
                taken_rank: int(&name("taken_rank"))? as u32,
            });
        }
        let experts: Vec<i32> = match object.contains_key(EXPERTS) {
            false => Vec::new(),
            true => list(EXPERTS)?.iter().filter_map(|e| Some(e.as_i64()? as i32)).collect(),
        };
        let routed = match experts.is_empty() {
            true => None,
            false => Some(Routed { experts, entropy: float(ROUTER_ENTROPY)? }),
        };
        Ok(Record {
            row: int("row")?,
            completion: int("completion")?,
            layer: int("layer")?,
            position: int("position")?,
            token: int("token")? as i32,
            text: field("text")?.as_str().unwrap_or_default().into(),
            figures,
            tops,
            routed,
        })
    }
}

#[cfg(test)]
pub(super) fn example(layer: usize, position: usize, all_taps: bool) -> Record {
    let top = |i: usize| Top {
        tokens: vec![i as i32, 7, 8],
        texts: vec![" a".into(), "\"\u{2603}".into(), String::new()],
        probs: vec![0.1, 1.0 / 3.0, 1e-30],
        taken_prob: 0.25,
        taken_rank: 2,
    };
    let mut figures = [0.0; Figure::N];
    for (i, figure) in figures.iter_mut().enumerate() {
        *figure = (1 + i + layer * position) as f32 / 7.0;
    }
    figures[Figure::Top1Agrees as usize] = (position % 2) as f32;
    let wanted = |tap: Tap| all_taps || matches!(tap, Tap::LayerOut | Tap::Final);
    Record {
        row: 3,
        completion: 1,
        layer,
        position,
        token: 42,
        text: " \"quo\u{2603}ted\"\n".into(),
        figures,
        tops: Tap::ALL.map(|tap| wanted(tap).then(|| top(tap as usize))),
        routed: all_taps.then(|| Routed { experts: vec![2, 7], entropy: 1.5 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_bit_for_bit() {
        for all_taps in [false, true] {
            let record = example(2, 5, all_taps);
            let mut line = Vec::new();
            record.write(&columns(all_taps, all_taps), &mut line).unwrap();
            let line = String::from_utf8(line).unwrap();
            assert_eq!(line.matches('\n').count(), 1);
            assert_eq!(Record::read(&line, "here").unwrap(), record);
        }
    }

    #[test]
    fn a_damaged_line_names_its_place() {
        let error = Record::read("{\"row\":1}", "e.jsonl:4").unwrap_err().to_string();
        assert!(error.starts_with("e.jsonl:4: expected a line of entropy.jsonl"), "{error}");
    }
}

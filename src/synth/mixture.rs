//! Which tensor gets which type, as `llama-quantize` decides (llama.cpp `src/llama-quant.cpp`): one type
//! for most, more bits for what hurts most.

use super::Shape;
use crate::ggml::Type;
use crate::{Error, Result};

/// A type for all linear maps, with llama-quantize's exceptions.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    name: String,
    base: Type,
}

/// Mixtures with a name of their own, and their base type. A K type's plain name means its mixture too.
const NAMED: [(&str, &str); 8] = [
    ("q2_k", "q2_k"),
    ("q3_k_s", "q3_k"),
    ("q3_k_m", "q3_k"),
    ("q3_k_l", "q3_k"),
    ("q4_k_s", "q4_k"),
    ("q4_k_m", "q4_k"),
    ("q5_k_s", "q5_k"),
    ("q5_k_m", "q5_k"),
];

/// `enum llama_ftype`, where a type or mixture has one.
const FILE_TYPES: [(&str, u32); 29] = [
    ("f32", 0),
    ("f16", 1),
    ("q4_0", 2),
    ("q4_1", 3),
    ("q8_0", 7),
    ("q5_0", 8),
    ("q5_1", 9),
    ("q2_k", 10),
    ("q3_k_s", 11),
    ("q3_k_m", 12),
    ("q3_k_l", 13),
    ("q4_k_s", 14),
    ("q4_k_m", 15),
    ("q5_k_s", 16),
    ("q5_k_m", 17),
    ("q6_k", 18),
    ("iq2_xxs", 19),
    ("iq2_xs", 20),
    ("iq3_xxs", 23),
    ("iq1_s", 24),
    ("iq4_nl", 25),
    ("iq3_s", 26),
    ("iq2_s", 28),
    ("iq4_xs", 30),
    ("iq1_m", 31),
    ("bf16", 32),
    ("tq1_0", 36),
    ("tq2_0", 37),
    ("mxfp4", 38),
];

fn ty(name: &str) -> Option<Type> {
    Type::all().find(|ty| ty.name().eq_ignore_ascii_case(name))
}

/// The first of these types whose blocks divide rows of `n`.
fn fitting<const N: usize>(names: [&str; N], n: usize) -> Type {
    let mut types = names.into_iter().filter_map(ty).chain([Type::Q8_0, Type::F16]);
    types.find(|ty| n.is_multiple_of(ty.block_size())).expect("F16 has blocks of 1")
}

impl Mixture {
    /// A type of ggml or a mixture, in any case: `q8_0`, `q4_k_m`, `F16`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the list.
    pub fn parse(name: &str) -> Result<Mixture> {
        let name = name.to_ascii_lowercase();
        let base = NAMED.iter().find(|(n, _)| *n == name).map_or(name.as_str(), |(_, base)| base);
        match ty(base).filter(|ty| ty.can_dequantize()) {
            Some(base) => Ok(Mixture { name, base }),
            None => Err(Error::Unsupported {
                what: "type",
                got: name,
                supported: Mixture::names().join(", "),
            }),
        }
    }

    /// What [`Mixture::parse`] knows.
    pub fn names() -> Vec<String> {
        let types = Type::all().filter(|ty| ty.can_dequantize());
        let mut names: Vec<String> = types.map(|ty| ty.name().to_ascii_lowercase()).collect();
        names.extend(NAMED.map(|(name, _)| name.to_string()));
        names.sort();
        names.dedup();
        names
    }

    /// Its name, in lower case.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number in `general.file_type`, if it has one.
    pub(super) fn file_type(&self) -> Option<u32> {
        FILE_TYPES.iter().find(|(name, _)| *name == self.name).map(|(_, number)| *number)
    }

    /// The unembedding: 6 bits, or as many as the rest where that is more.
    pub(super) fn output(&self, d: usize) -> Type {
        let floats = ["f32", "f16", "bf16", "q8_0"];
        if floats.contains(&self.name.as_str()) {
            return fitting([&self.name], d);
        }
        let few = ["iq1", "iq2", "iq3_xxs"].iter().any(|bits| self.name.starts_with(bits));
        fitting([if few { "q5_k" } else { "q6_k" }], d)
    }

    /// The embedding: the unembedding's type where it serves as that too.
    pub(super) fn embedding(&self, d: usize, tied: bool) -> Type {
        if tied {
            return self.output(d);
        }
        match self.name.as_str() {
            "iq1_s" | "iq1_m" | "iq2_xxs" | "iq2_xs" => fitting(["q2_k"], d),
            "iq2_s" | "iq3_xxs" => fitting(["iq3_s"], d),
            "tq1_0" | "tq2_0" => fitting(["q4_k"], d),
            _ => self.fallback(self.base.name(), d),
        }
    }

    /// What is never quantised: as it was, 16 bits where the rest has fewer.
    pub(super) fn float(&self) -> Type {
        match self.base {
            Type::F32 | Type::BF16 => self.base,
            _ => Type::F16,
        }
    }

    /// A linear map of layer `i` (from 0) with rows of `n_in`.
    pub(super) fn layer(&self, what: &str, i: usize, shape: &Shape, n_in: usize) -> Type {
        // q, k and v in one map are treated as v is; tensors are counted, not layers.
        let what = match what {
            "attn_qkv" => "attn_v",
            // Of a mixture only the experts are MXFP4.
            _ if self.name == "mxfp4" && shape.experts.is_some() && !what.ends_with("_exps") => {
                return self.fallback("q8_0", n_in);
            }
            "ffn_down_exps" | "ffn_down_shexp" => "ffn_down",
            what => what,
        };
        let n = if what == "attn_v" { shape.n_layer_kv() } else { shape.n_layer };
        let wide_groups = shape.n_head / shape.n_head_kv >= 4;
        // The first and last eighth of the layers, and every third between.
        let more = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let ty = match (self.name.as_str(), what) {
            ("q2_k", "attn_v") if wide_groups => "q4_k",
            ("q2_k", "attn_v" | "attn_output" | "ffn_down") => "q3_k",
            ("q3_k_m", "attn_v") if i < 2 => "q5_k",
            ("q3_k_m", "ffn_down") if i < n / 16 => "q5_k",
            ("q3_k_m", "attn_v" | "attn_output" | "ffn_down") => "q4_k",
            ("q3_k_l", "attn_v" | "attn_output" | "ffn_down") => "q5_k",
            ("q4_k_s", "attn_v") if i < 4 => "q5_k",
            ("q4_k_s", "ffn_down") if i < n / 8 => "q5_k",
            ("q4_k_m" | "q5_k_m", "attn_v" | "ffn_down") if more => "q6_k",
            ("iq4_nl" | "iq4_xs", "attn_v") if wide_groups => "q5_k",
            ("iq4_nl" | "iq4_xs", "ffn_down") if i < n / 8 => "q5_k",
            _ => self.base.name(),
        };
        self.fallback(ty, n_in)
    }

    /// `ty`, or what llama-quantize takes where its blocks do not divide rows of `n`.
    fn fallback(&self, ty: &str, n: usize) -> Type {
        let ty = ty.to_ascii_lowercase();
        let smaller = match ty.as_str() {
            "q2_k" | "q3_k" | "q2_0" | "tq1_0" | "tq2_0" => "q4_0",
            "q4_k" => "q5_0",
            "q5_k" => "q5_1",
            name if name.starts_with("iq") => "iq4_nl",
            _ => "q8_0",
        };
        fitting([&ty, smaller], n)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use super::super::shape::{DeltaNets, Experts, Gemma4, Rope};
    use super::*;
    use crate::llama::{FileType, Model, TensorEntry};

    /// As deep as the shape, with the same groups of heads, and narrow.
    fn narrow(shape: Shape) -> Shape {
        // The rotated part of a head must fit.
        let head_size = match shape.rope {
            Rope::Long { .. } => 128,
            Rope::Sectioned { rotated, .. } | Rope::Partial(rotated) => rotated,
            _ => 32,
        };
        let delta =
            shape.delta.map(|d| DeltaNets { n_k: 2, n_v: 2 * d.n_v / d.n_k, size: 32, ..d });
        let gemma4 = shape.gemma4.map(|g| Gemma4 { full_head_size: 64, per_layer_embd: 32, ..g });
        let n_head = shape.n_head / shape.n_head_kv;
        let n_embd = n_head * head_size;
        let experts = shape.experts.map(|e| Experts {
            count: 6,
            used: 2,
            n_ff: 256,
            n_ff_shared: e.n_ff_shared.min(256),
        });
        let sizes = Shape { n_head, n_head_kv: 1, head_size, n_embd, n_ff: 256, ..shape };
        let narrow = Shape { gemma4, experts, delta, ..sizes };
        narrow.with_vocab(512).unwrap()
    }

    #[test]
    fn types_are_those_of_llama_quantize() {
        const LAYER: &str = "blk.";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f16.gguf");
        for shape in Shape::ALL.map(narrow) {
            let f16 = Mixture::parse("f16").unwrap();
            super::super::write(&shape, &f16, 1, &path).unwrap();
            let outline = Model::load_outline(&path).unwrap();
            let layer = |name: &str| -> i64 {
                let number = name.strip_prefix(LAYER).and_then(|rest| rest.split_once('.'));
                number.map_or(-1, |(number, _)| number.parse().unwrap())
            };
            let mut before = Weights::new(&shape, &f16).0;
            before.sort_by_key(|w| (layer(&w.name), w.name.clone()));
            let entries: Vec<TensorEntry> = before
                .iter()
                .map(|w| {
                    let mut extents = [1; 4];
                    extents[..w.shape.len()].copy_from_slice(&w.shape);
                    TensorEntry { name: &w.name, ty: w.ty, shape: extents }
                })
                .collect();
            for name in [
                "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1",
                "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
            ] {
                let ty: FileType = name.parse().unwrap();
                let theirs = outline.quantised_types(ty, &entries).unwrap();
                let mixture = Mixture::parse(name).unwrap();
                assert_eq!(mixture.file_type(), Some(ty.raw()), "{name}");
                let mut ours = Weights::new(&shape, &mixture).0;
                ours.sort_by_key(|w| (layer(&w.name), w.name.clone()));
                for (w, ty) in ours.iter().zip(theirs) {
                    assert_eq!(w.ty, ty, "{} {name}: {} {:?}", shape.name, w.name, w.shape);
                }
            }
        }
    }

    fn count(mixture: &str, shape: &str, what: &str, ty: &str) -> usize {
        let (mixture, shape) = (Mixture::parse(mixture).unwrap(), Shape::find(shape).unwrap());
        let n_in = if what == "ffn_down" { shape.n_ff } else { shape.n_embd };
        (0..shape.n_layer).filter(|&i| mixture.layer(what, i, &shape, n_in).name() == ty).count()
    }

    #[test]
    fn q4_k_m_as_published_files_have_it() {
        // 28 layers: 3 first, 4 last, and every third of the 21 between.
        assert_eq!(count("q4_k_m", "qwen3-0.6b", "ffn_down", "q6_K"), 14);
        assert_eq!(count("q4_k_m", "qwen3-0.6b", "attn_v", "q6_K"), 14);
        assert_eq!(count("q4_k_m", "qwen3-0.6b", "ffn_up", "q4_K"), 28);
        let mixture = Mixture::parse("Q4_K_M").unwrap();
        assert_eq!(mixture.output(1024).name(), "q6_K");
        assert_eq!(mixture.embedding(1024, true).name(), "q6_K");
        assert_eq!(mixture.embedding(4096, false).name(), "q4_K");
        assert_eq!(mixture.file_type(), Some(15));
    }

    #[test]
    fn rows_that_blocks_do_not_divide_fall_back() {
        // Qwen2.5 0.5B: 896 inputs are no multiple of 256.
        assert_eq!(count("q4_k_m", "qwen2.5-0.5b", "attn_q", "q5_0"), 24);
        assert_eq!(Mixture::parse("q4_k_m").unwrap().output(896).name(), "q8_0");
        assert_eq!(count("q4_k_m", "qwen2.5-0.5b", "ffn_down", "q6_K"), 12);
    }

    #[test]
    fn every_name_is_known_and_others_are_not() {
        for name in Mixture::names() {
            Mixture::parse(&name).unwrap();
        }
        assert!(Mixture::parse("q4_k_xl").unwrap_err().to_string().contains("q4_k_m"));
        assert!(Mixture::parse("i32").is_err());
    }
}

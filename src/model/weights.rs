//! A model's weights by GGUF name: llama.cpp's own tensors, the very ones that rollouts read.

use std::collections::HashMap;

use super::{Config, Target};
use crate::ggml::{Tensor, Type};
use crate::llama;
use crate::{Error, Result};

/// One linear map of the base: `y = W x + bias`.
#[derive(Clone, Copy)]
pub struct Linear<'m> {
    /// `[n_in, n_out]`, any type that can be dequantised.
    pub weight: Tensor<'m>,
    /// `[n_out]`, F32.
    pub bias: Option<Tensor<'m>>,
}

/// The weights of one layer.
#[derive(Clone, Copy)]
pub struct Layer<'m> {
    /// Norm before attention, `[D]`.
    pub attn_norm: Tensor<'m>,
    /// Query norm, `[head size]` (qwen3).
    pub q_norm: Option<Tensor<'m>>,
    /// Key norm, `[head size]` (qwen3).
    pub k_norm: Option<Tensor<'m>>,
    /// Norm before the FFN, `[D]`.
    pub ffn_norm: Tensor<'m>,
    linear: [Linear<'m>; Target::ALL.len()],
}

impl<'m> Layer<'m> {
    /// One of the linear maps.
    pub fn linear(&self, target: Target) -> Linear<'m> {
        self.linear[target as usize]
    }
}

/// All weights.
pub struct Weights<'m> {
    /// Token embedding, `[D, V]`.
    pub embedding: Tensor<'m>,
    /// Unembedding, `[D, V]`; the embedding itself where the model ties them.
    pub unembedding: Tensor<'m>,
    /// Norm before the unembedding, `[D]`.
    pub output_norm: Tensor<'m>,
    /// llama3's frequency divisors, `[head size / 2]`.
    pub rope_factors: Option<Tensor<'m>>,
    /// Layers; layer `l` of the user is at `l - 1`.
    pub layers: Vec<Layer<'m>>,
}

/// Takes tensors out of the model by name, checking each.
struct Taker<'m> {
    tensors: HashMap<&'m str, Tensor<'m>>,
    file: String,
}

impl<'m> Taker<'m> {
    fn find(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor<'m>>> {
        let Some(tensor) = self.tensors.remove(name) else { return Ok(None) };
        let mut full = [1; 4];
        full[..shape.len()].copy_from_slice(shape);
        let place = format!("{}: tensor {name}", self.file);
        if tensor.shape() != full {
            let (expected, got) = (format!("shape {full:?}"), format!("{:?}", tensor.shape()));
            return Err(Error::invalid(
                place,
                expected,
                got,
                "the file is damaged; fetch it again",
            ));
        }
        if shape.len() == 1 && tensor.ty() != Type::F32 {
            return Err(Error::invalid(
                place,
                "type f32",
                tensor.ty().name(),
                "convert the model again",
            ));
        }
        if !tensor.ty().can_dequantize() {
            let supported: Vec<_> =
                Type::all().filter(|t| t.can_dequantize()).map(Type::name).collect();
            let got = format!("{} of {name}", tensor.ty());
            return Err(Error::Unsupported {
                what: "tensor type",
                got,
                supported: supported.join(", "),
            });
        }
        Ok(Some(tensor))
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'m>> {
        self.find(name, shape)?.ok_or_else(|| {
            let place = format!("{}: tensor {name}", self.file);
            Error::invalid(
                place,
                "to be there",
                "nothing",
                "fused or renamed weights are not supported; convert the model again",
            )
        })
    }
}

impl<'m> Weights<'m> {
    /// Finds every weight of the architecture.
    ///
    /// # Errors
    /// A tensor is missing, has another shape or a type without a converter to F32, or is one that the
    /// computation here would leave out (a bias or scale that llama.cpp would add).
    pub fn collect(engine: &'m llama::Model, config: &Config, file: &str) -> Result<Weights<'m>> {
        // On a GPU a model that ties its embeddings has them twice: in host memory, where tokens are looked up,
        // and on the GPU, where the unembedding wants them.
        let mut tensors: HashMap<&str, Tensor<'_>> = HashMap::new();
        for tensor in engine.tensors() {
            let known = tensors.entry(tensor.name()).or_insert(tensor);
            if known.is_host() {
                *known = tensor;
            }
        }
        let mut taker = Taker { tensors, file: file.into() };
        let (d, v, hd) = (config.n_embd, config.n_vocab, config.head_size);
        let (q, kv) = (hd * config.n_head, hd * config.n_head_kv);
        let sizes = [
            (d, q),
            (d, kv),
            (d, kv),
            (q, d),
            (d, config.n_ff),
            (d, config.n_ff),
            (config.n_ff, d),
        ];

        let embedding = taker.take("token_embd.weight", &[d, v])?;
        let unembedding = taker.find("output.weight", &[d, v])?.unwrap_or(embedding);
        let output_norm = taker.take("output_norm.weight", &[d])?;
        let rope_factors = taker.find("rope_freqs.weight", &[hd / 2])?;
        let mut layers = Vec::with_capacity(config.n_layer);
        for i in 0..config.n_layer {
            let mut linear = Vec::with_capacity(Target::ALL.len());
            for (target, (n_in, n_out)) in Target::ALL.into_iter().zip(sizes) {
                let name = format!("blk.{i}.{}", target.gguf_name());
                let weight = taker.take(&format!("{name}.weight"), &[n_in, n_out])?;
                let has_bias = matches!(target, Target::Q | Target::K | Target::V);
                let bias =
                    if has_bias { taker.find(&format!("{name}.bias"), &[n_out])? } else { None };
                linear.push(Linear { weight, bias });
            }
            let mut head_norm = |name: &str| {
                let name = format!("blk.{i}.{name}.weight");
                config.arch.has_qk_norm().then(|| taker.take(&name, &[hd])).transpose()
            };
            layers.push(Layer {
                q_norm: head_norm("attn_q_norm")?,
                k_norm: head_norm("attn_k_norm")?,
                attn_norm: taker.take(&format!("blk.{i}.attn_norm.weight"), &[d])?,
                ffn_norm: taker.take(&format!("blk.{i}.ffn_norm.weight"), &[d])?,
                linear: linear.try_into().unwrap_or_else(|_| unreachable!("one per target")),
            });
        }
        if let Some(name) = taker.tensors.keys().min() {
            return Err(Error::Unsupported {
                what: "tensor",
                got: (*name).into(),
                supported: format!("those of a plain {} model", config.arch),
            });
        }
        Ok(Weights { embedding, unembedding, output_norm, rope_factors, layers })
    }
}

//! A model's weights by GGUF name: llama.cpp's own tensors, the very ones that rollouts read.

use std::collections::HashMap;

use crate::ggml::Tensor;
use crate::llama;

/// Where each tensor stands in llama.cpp's list.
pub(super) type Index = HashMap<String, usize>;

/// All weights of a model, found by name.
#[derive(Clone, Copy)]
pub struct Weights<'m> {
    engine: &'m llama::Model,
    index: &'m Index,
}

impl<'m> Weights<'m> {
    pub(super) fn new(engine: &'m llama::Model, index: &'m Index) -> Weights<'m> {
        Weights { engine, index }
    }

    /// On a GPU a model that ties its embeddings has them twice: in host memory, where tokens are looked up, and on
    /// the GPU, where the unembedding wants them.
    pub(super) fn index(engine: &llama::Model) -> Index {
        let mut index = Index::new();
        for (i, tensor) in engine.tensors().enumerate() {
            let known = index.entry(tensor.name().to_string()).or_insert(i);
            if engine.tensor(*known).is_host() {
                *known = i;
            }
        }
        index
    }

    /// The tensor of this name.
    pub fn find(&self, name: &str) -> Option<Tensor<'m>> {
        self.index.get(name).map(|&i| self.engine.tensor(i))
    }

    /// Names of all tensors, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &'m str> + use<'m> {
        self.index.keys().map(String::as_str)
    }

    fn known(&self, name: &str) -> Tensor<'m> {
        self.find(name).unwrap_or_else(|| panic!("{name} was there when the model was opened"))
    }

    /// Token embedding, `[D, V]`.
    pub fn embedding(&self) -> Tensor<'m> {
        self.known("token_embd.weight")
    }

    /// Unembedding, `[D, V]`; the embedding itself where the model ties them.
    pub fn unembedding(&self) -> Tensor<'m> {
        self.find("output.weight").unwrap_or_else(|| self.embedding())
    }

    /// Norm before the unembedding, `[D]`.
    pub fn output_norm(&self) -> Tensor<'m> {
        self.known("output_norm.weight")
    }
}

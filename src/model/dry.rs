//! What a dry run of a layer's forward finds out: tensors read, linear maps among them, and what is wrong.

use std::collections::BTreeSet;

use super::lora::Map;
use crate::ggml::{Tensor, Type};
use crate::{Error, Result};

/// Notes of a dry run.
#[derive(Default)]
pub struct Dry {
    /// Names of the tensors that were read.
    pub touched: BTreeSet<String>,
    /// Linear maps of the layer, as they were met.
    pub maps: Vec<Map>,
    /// Tensors that are missing or do not fit, in words: name, expected, got.
    wrong: Vec<[String; 3]>,
}

impl Dry {
    /// Whether a tensor is as the forward takes it: this shape, vectors in F32, matrices of a type with a converter.
    pub fn accepts(&mut self, tensor: Tensor<'_>, name: &str, shape: &[usize]) -> bool {
        self.touched.insert(name.into());
        let mut full = [1; 4];
        full[..shape.len()].copy_from_slice(shape);
        let mut refuse = |expected: String, got: String| {
            self.wrong.push([name.into(), expected, got]);
            false
        };
        if tensor.shape() != full {
            return refuse(format!("shape {full:?}"), format!("{:?}", tensor.shape()));
        }
        if shape.len() == 1 && tensor.ty() != Type::F32 {
            return refuse("type f32".into(), tensor.ty().name().into());
        }
        if !tensor.ty().can_dequantize() {
            let known: Vec<_> =
                Type::all().filter(|t| t.can_dequantize()).map(Type::name).collect();
            return refuse(
                format!("one of the types {}", known.join(", ")),
                tensor.ty().to_string(),
            );
        }
        true
    }

    /// A tensor is of no use.
    pub fn refuse(&mut self, name: &str, expected: String, got: String) {
        self.wrong.push([name.into(), expected, got]);
    }

    /// A tensor that should be there is not.
    pub fn misses(&mut self, name: &str) {
        if !self.touched.contains(name) {
            self.wrong.push([name.into(), "to be there".into(), "nothing".into()]);
        }
    }

    /// A linear map `[n_in, n_out]` was used.
    pub fn map(&mut self, layer: usize, name: &str, fused: bool, [n_in, n_out]: [usize; 2]) {
        if !self.maps.iter().any(|map| map.name == name) {
            self.maps.push(Map::new(layer, name, fused, n_in, n_out));
        }
    }

    /// A stack of maps `[n_in, n_out, E]` was used.
    pub fn experts(&mut self, layer: usize, name: &str, [n_in, n_out, n_expert]: [usize; 3]) {
        if !self.maps.iter().any(|map| map.name == name) {
            self.maps.push(Map::new(layer, name, false, n_in, n_out).stacked(n_expert));
        }
    }

    /// The first tensor that was missing or did not fit, in the file of this name.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self, file: &str) -> Result<()> {
        let Some([name, expected, got]) = self.wrong.first() else { return Ok(()) };
        let advice = "the file is damaged, or its tensors are renamed; convert the model again";
        Err(Error::invalid(format!("{file}: tensor {name}"), expected.clone(), got.clone(), advice))
    }
}

//! From hidden states to logits: what the ops over the vocabulary have in common.

use ggml_sys as sys;

use super::exp::softcap;
use crate::ggml::Tensor;

/// `logits(x) = c tanh(z / c)`, `z = scale * E_u x`; `logits = z` without a softcap c. A temperature divides
/// logits after the softcap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitMap {
    /// Of the products with the unembedding.
    pub scale: f32,
    /// c, above 0.
    pub softcap: Option<f32>,
}

impl Default for LogitMap {
    /// The products as they stand.
    fn default() -> LogitMap {
        LogitMap { scale: 1.0, softcap: None }
    }
}

/// What the logits of some hidden states are made of.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// `[D, T]` F32, contiguous.
    pub hidden: Tensor<'a>,
    /// `[D, V]` of any type.
    pub unembedding: Tensor<'a>,
    /// Scale and softcap.
    pub map: LogitMap,
}

impl LogitMap {
    /// As the kernels' parameters have it, where 0 is no softcap.
    pub(super) fn params(self) -> sys::bupo_logit_map {
        let LogitMap { scale, softcap } = self;
        assert!(scale.is_finite(), "a scale of logits, got {scale}");
        sys::bupo_logit_map { scale, softcap: softcap_param(softcap) }
    }

    pub(super) fn from_params(params: sys::bupo_logit_map) -> LogitMap {
        LogitMap { scale: params.scale, softcap: softcap_of(params.softcap) }
    }

    /// Logits of the scaled products `z`, in place.
    pub(super) fn cap(&self, z: &mut [f32]) {
        if let Some(c) = self.softcap {
            z.iter_mut().for_each(|z| *z = softcap(*z, c).0);
        }
    }
}

/// A softcap as the kernels' parameters have it: 0 for none.
pub(super) fn softcap_param(softcap: Option<f32>) -> f32 {
    assert!(softcap.is_none_or(|c| c > 0.0 && c.is_finite()), "a softcap above 0, got {softcap:?}");
    softcap.unwrap_or(0.0)
}

/// The softcap that a parameter stands for.
pub(super) fn softcap_of(param: f32) -> Option<f32> {
    (param > 0.0).then_some(param)
}

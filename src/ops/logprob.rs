//! `linear_logprob`: log-prob, log-sum-exp and entropy of a softmax over the vocabulary, straight from
//! hidden states, and their vjp, without ever holding `[V, T]` logits.
//!
//! With `z_v = scale E_u[v] . h`, `l_v = z_v / T` or, with a softcap c, `l_v = c tanh(z_v / c) / T`,
//! `lse = log sum_v e^(l_v)`, `p_v = e^(l_v - lse)`, and `w_v = 1` or `w_v = 1 - tanh^2(z_v / c)`:
//!
//! ```text
//! logprob = l_target - lse          entropy = -sum_v p_v log p_v = lse - sum_v p_v l_v
//! d logprob / dh = (w_target E_u[target] - sum_v p_v w_v E_u[v]) scale / T
//! ```
//!
//! One pass over the vocabulary in tiles does both directions: as flash attention with K = V = E_u, it
//! carries a running maximum, the sums, and (for the gradient) the running mean embedding. The vjp is
//! then a row scale ([`super::scale_rows`]): two matrix products in all, one without gradient.
//!
//! Threads share out the vocabulary, so each row of `E_u` is dequantised by one thread only; their
//! partial sums are merged in the order of threads by whoever finishes last, so that the result does not
//! depend on timing. Tokens go through in tiles of [`TOKEN_TILE`], which bounds the partial sums.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::Mutex;

use ggml_sys as sys;

use super::exp::{exp, softcap};
use super::gemm::{Matrix, gemm, with_scratch};
use super::linear::{Weight, steps};
use super::logits::LogitMap;
use super::rows::{check_head, maximum, partition};
use crate::ggml::{Arena, Tensor, Type};

/// Tokens at a time.
const TOKEN_TILE: usize = 512;
/// Floats of a dequantised vocabulary tile.
const VOCAB_TILE: usize = 128 * 1024;
/// Its rows at most.
const VOCAB_STEP: usize = 512;

/// Bytes that [`linear_logprob`] takes beside its result: on each thread a tile of dequantised vocabulary
/// and its logits, and the partial sums of the token tiles that are in work.
pub fn logprob_tiles_bytes(d: usize, tokens: usize, threads: usize) -> usize {
    let tile = tokens.min(TOKEN_TILE);
    // A thread that is a tile ahead has begun its next sums.
    threads * 4 * (VOCAB_TILE + VOCAB_STEP * (tile + 1) + 2 * d * tile)
}

/// Results of [`linear_logprob`], one value per token `[T]` each.
#[derive(Clone, Copy)]
pub struct Logprob<'a> {
    /// log p(target), nats; 0 without targets.
    pub logprob: Tensor<'a>,
    /// log-sum-exp of the tempered logits.
    pub lse: Tensor<'a>,
    /// Entropy, nats.
    pub entropy: Tensor<'a>,
    /// d logprob / dh: `[D, T]`, when asked for.
    pub gradient: Option<Tensor<'a>>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_logprob_params,
    // Partial sums of the token tile in work, by thread; and how many threads have finished each tile.
    tiles: Vec<Mutex<Vec<Option<Partial>>>>,
}

/// Sums over a part of the vocabulary for one tile of tokens, relative to the running maximum.
struct Partial {
    max: Vec<f32>,
    // sum e^(l - max), sum e^(l - max) (l - max)
    sum: Vec<f64>,
    weighted: Vec<f64>,
    // The target's l and w, where this part of the vocabulary holds it.
    target: Vec<Option<(f32, f32)>>,
    // sum e^(l - max) w E_u[v]: [D, tokens]
    mean: Vec<f32>,
}

/// Log-probs of `target: [T]` I32 (in range), and entropies, of hidden states `h: [D, T]` under the
/// unembedding `e_u: [D, V]` of any type; `inv_temperature` multiplies the logits that `map` makes.
pub fn linear_logprob<'a>(
    arena: &'a Arena,
    h: Tensor<'a>,
    e_u: Tensor<'a>,
    target: Option<Tensor<'a>>,
    map: LogitMap,
    inv_temperature: f32,
    gradient: bool,
) -> Logprob<'a> {
    let [d, t, ..] = h.shape();
    check_head("linear_logprob", h, e_u);
    assert!(!gradient || target.is_some(), "the gradient is the target's");
    let mut sources = vec![h, e_u];
    if let Some(target) = target {
        assert!(target.ty() == Type::I32 && target.len() == t, "linear_logprob: {target:?}");
        sources.push(target);
    }
    let width = if gradient { 3 + d } else { 3 };
    let params = Params {
        c: sys::bupo_logprob_params {
            op: sys::BUPO_OP_LOGPROB,
            inv_temperature,
            gradient: gradient as u32,
            map: map.params(),
        },
        tiles: (0..t.div_ceil(TOKEN_TILE)).map(|_| Mutex::default()).collect(),
    };
    // One result: T log-probs, T log-sum-exps, T entropies, then [D, T].
    let all = arena.custom([t * width, 1, 1, 1], &sources, kernel, params);
    Logprob {
        logprob: arena.part(all, 0, [t, 1]),
        lse: arena.part(all, t, [t, 1]),
        entropy: arena.part(all, 2 * t, [t, 1]),
        gradient: gradient.then(|| arena.part(all, 3 * t, [d, t])),
    }
}

/// The sources as a kernel reads them.
struct Job {
    d: usize,
    t: usize,
    v: usize,
    h: *const f32,
    unembedding: Weight,
    targets: *const i32,
    map: LogitMap,
    inv_temperature: f32,
    gradient: bool,
    out: *mut f32,
}

unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `linear_logprob` made this node: h F32 [D, T], e_u [D, V], targets I32 [T] or null, dst
    // with room for all results, Params as userdata.
    let (params, job) = unsafe {
        let params = &*userdata.cast::<Params>();
        let src = &(*dst).src;
        let targets = if src[2].is_null() { std::ptr::null() } else { (*src[2]).data.cast() };
        let job = Job {
            d: (*src[0]).ne[0] as usize,
            t: (*src[0]).ne[1] as usize,
            v: (*src[1]).ne[1] as usize,
            h: (*src[0]).data.cast(),
            unembedding: Weight::new(src[1]),
            targets,
            map: LogitMap::from_params(params.c.map),
            inv_temperature: params.c.inv_temperature,
            gradient: params.c.gradient != 0,
            out: (*dst).data.cast(),
        };
        (params, job)
    };
    for (tile, slots) in params.tiles.iter().enumerate() {
        let tokens = tile * TOKEN_TILE..((tile + 1) * TOKEN_TILE).min(job.t);
        // SAFETY: tokens and vocabulary rows lie within the sources.
        let partial = unsafe { job.partial(tokens.clone(), partition(job.v, ith, nth)) };
        let mut slots = slots.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        slots.resize_with(nth as usize, || None);
        slots[ith as usize] = Some(partial);
        if slots.iter().all(Option::is_some) {
            let partials: Vec<Partial> = slots.drain(..).flatten().collect();
            // SAFETY: all threads are done with this tile, and only this one writes its results.
            unsafe { job.finish(tokens, partials) };
        }
    }
}

impl Job {
    /// The sums of `tokens` over `vocab`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn partial(&self, tokens: Range<usize>, vocab: Range<usize>) -> Partial {
        let (d, n) = (self.d, tokens.len());
        let mut sums = Partial {
            max: vec![f32::NEG_INFINITY; n],
            sum: vec![0.0; n],
            weighted: vec![0.0; n],
            target: vec![None; n],
            mean: vec![0.0; if self.gradient { d * n } else { 0 }],
        };
        let step = (VOCAB_TILE / d / 64 * 64).clamp(64, VOCAB_STEP);
        let dequantised = self.unembedding.scratch(step, d);
        // Where a softcap comes between, the temperature follows it.
        let alpha = match self.map.softcap {
            None => self.map.scale * self.inv_temperature,
            Some(_) => self.map.scale,
        };
        // SAFETY: by contract; scratch holds a tile of E_u, a tile of logits, and slopes of one token's.
        with_scratch(dequantised + step * (n + 1), |scratch| unsafe {
            let (rows, scratch) = scratch.split_at_mut(dequantised);
            let (slopes, logits) = scratch.split_at_mut(step);
            for vs in steps(vocab, step) {
                let e = self.unembedding.tile(vs.clone(), 0..d, rows); // (v, d)
                let width = vs.len();
                let h = Matrix::new(self.h.add(tokens.start * d), 1, d); // (d, t)
                let l = Matrix::new(logits.as_mut_ptr(), 1, width); // (v, t)
                gemm([width, n, d], l, false, e, h, alpha);
                for (t, column) in logits.chunks_exact_mut(width).take(n).enumerate() {
                    let Some(cap) = self.map.softcap else {
                        self.absorb(&mut sums, t, tokens.start, vs.start, column, None);
                        continue;
                    };
                    let slopes = &mut slopes[..width];
                    for (l, slope) in column.iter_mut().zip(&mut *slopes) {
                        let (logit, w) = softcap(*l, cap);
                        (*l, *slope) = (self.inv_temperature * logit, w);
                    }
                    self.absorb(&mut sums, t, tokens.start, vs.start, column, Some(slopes));
                    column.iter_mut().zip(slopes).for_each(|(e, slope)| *e *= *slope);
                }
                if self.gradient {
                    let mean = Matrix::new(sums.mean.as_mut_ptr(), 1, d); // (d, t)
                    let e = Matrix::new(e.data, e.column, e.row); // (d, v)
                    let p = Matrix::new(logits.as_ptr(), 1, width); // (v, t)
                    gemm([d, n, width], mean, true, e, p, 1.0);
                }
            }
        });
        sums
    }

    /// Takes one token's logits of a vocabulary tile into the sums; `l` becomes `e^(l - max)`. `slopes` are
    /// the w, where they are not 1.
    ///
    /// # Safety
    /// Token `first + t` is within the sources.
    unsafe fn absorb(
        &self,
        sums: &mut Partial,
        t: usize,
        first: usize,
        vocab: usize,
        l: &mut [f32],
        slopes: Option<&[f32]>,
    ) {
        if !self.targets.is_null() {
            // SAFETY: by contract.
            let target = unsafe { *self.targets.add(first + t) } as usize;
            if let Some(i) = target.checked_sub(vocab).filter(|&i| i < l.len()) {
                sums.target[t] = Some((l[i], slopes.map_or(1.0, |slopes| slopes[i])));
            }
        }
        let before = sums.max[t];
        let max = maximum(l).max(before);
        if max > before {
            sums.max[t] = max;
            if before > f32::NEG_INFINITY {
                let shift = (before - max) as f64;
                let scale = shift.exp();
                sums.weighted[t] = scale * (sums.weighted[t] + shift * sums.sum[t]);
                sums.sum[t] *= scale;
                if self.gradient {
                    let scale = scale as f32;
                    sums.mean[t * self.d..][..self.d].iter_mut().for_each(|x| *x *= scale);
                }
            }
        }
        // In f64: beside the maximum's own 1, the f32 sum of a peaked distribution would lose the rest,
        // which is all of its entropy.
        let (mut sum, mut weighted) = ([0f64; 16], [0f64; 16]);
        let (chunks, rest) = l.as_chunks_mut::<16>();
        for chunk in chunks {
            for i in 0..16 {
                let x = chunk[i] - max;
                let e = exp(x);
                sum[i] += e as f64;
                weighted[i] += (e * x) as f64;
                chunk[i] = e;
            }
        }
        for (i, l) in rest.iter_mut().enumerate() {
            let x = *l - max;
            let e = exp(x);
            sum[i] += e as f64;
            weighted[i] += (e * x) as f64;
            *l = e;
        }
        sums.sum[t] += sum.iter().sum::<f64>();
        sums.weighted[t] += weighted.iter().sum::<f64>();
    }

    /// Merges the threads' sums and writes the results of `tokens`.
    ///
    /// # Safety
    /// `tokens` lies within the sources, targets are rows of E_u, and nobody else writes these results.
    unsafe fn finish(&self, tokens: Range<usize>, partials: Vec<Partial>) {
        let d = self.d;
        let mut row = vec![0f32; self.unembedding.scratch(1, d)];
        for (i, token) in tokens.enumerate() {
            let max = partials.iter().map(|p| p.max[i]).fold(f32::NEG_INFINITY, f32::max);
            let (mut sum, mut weighted, mut target) = (0.0, 0.0, None);
            // A thread without vocabulary has no sum; one that met a NaN has, and passes it on.
            for p in partials.iter().filter(|p| p.sum[i] != 0.0) {
                let shift = (p.max[i] - max) as f64;
                sum += shift.exp() * p.sum[i];
                weighted += shift.exp() * (p.weighted[i] + shift * p.sum[i]);
                target = target.or(p.target[i]);
            }
            let lse = max as f64 + sum.ln();
            let logprob = target.map_or(0.0, |(l, _)| l as f64 - lse);
            // SAFETY: by contract; `out` has 3 T values, then D for each token.
            unsafe {
                *self.out.add(token) = logprob as f32;
                *self.out.add(self.t + token) = lse as f32;
                *self.out.add(2 * self.t + token) = (sum.ln() - weighted / sum) as f32;
                if !self.gradient {
                    continue;
                }
                let factor = self.map.scale * self.inv_temperature;
                let own = factor * target.map_or(1.0, |(_, slope)| slope);
                let target = *self.targets.add(token) as usize;
                let e = self.unembedding.tile(target..target + 1, 0..d, &mut row);
                let e = std::slice::from_raw_parts(e.data, d);
                let out = std::slice::from_raw_parts_mut(self.out.add(3 * self.t + token * d), d);
                for (g, e) in out.iter_mut().zip(e) {
                    *g = own * e;
                }
                for p in &partials {
                    let scale = ((p.max[i] - max) as f64).exp() / sum;
                    let scale = scale as f32 * factor;
                    for (g, m) in out.iter_mut().zip(&p.mean[i * d..][..d]) {
                        *g -= scale * m;
                    }
                }
            }
        }
    }
}

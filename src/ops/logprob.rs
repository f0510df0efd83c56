//! `linear_logprob`: log-prob, log-sum-exp and entropy of a softmax over the vocabulary, straight from
//! hidden states, and their vjp, without ever holding `[V, T]` logits.
//!
//! With `z_v = scale (E_u[v] . h + s B[v] . u)`, the second term an adapter's with u = A h where there is one, `l_v = z_v / T` or, with a softcap c, `l_v = c tanh(z_v / c) / T`,
//! `lse = log sum_v e^(l_v)`, `p_v = e^(l_v - lse)`, and `w_v = 1` or `w_v = 1 - tanh^2(z_v / c)`:
//!
//! ```text
//! logprob = l_target - lse          entropy = -sum_v p_v log p_v = lse - sum_v p_v l_v
//! d logprob / dh = (w_target E_u[target] - sum_v p_v w_v E_u[v]) scale / T        at this u
//! d logprob / du = (w_target B[target] - sum_v p_v w_v B[v]) s scale / T
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

use ggml_sys as sys;

use super::exp::{exp, softcap};
use super::gemm::with_scratch;
use super::linear::steps;
use super::logits::{Head, RawHead};
use super::partials::{Partials, each_tile};
use super::rows::maximum;
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
    /// d logprob / dh: `[D, T]`, when asked for; where there is a low-rank term, at a fixed u.
    pub gradient: Option<Tensor<'a>>,
    /// d logprob / du: `[r, T]`, of the low-rank term's input, when asked for.
    pub gradient_low: Option<Tensor<'a>>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_logprob_params,
    // Of each token tile, by thread.
    tiles: Vec<Partials<Partial>>,
}

/// Sums over a part of the vocabulary for one tile of tokens, relative to the running maximum.
struct Partial {
    max: Vec<f32>,
    // sum e^(l - max), sum e^(l - max) (l - max)
    sum: Vec<f64>,
    weighted: Vec<f64>,
    // The target's l and w, where this part of the vocabulary holds it.
    target: Vec<Option<(f32, f32)>>,
    // sum e^(l - max) w E_u[v], and the same of s B: [D + r, tokens]
    mean: Vec<f32>,
}

/// Log-probs of `target: [T]` I32 (in range), and entropies, of hidden states `[D, T]`; `inv_temperature`
/// multiplies the logits.
pub fn linear_logprob<'a>(
    arena: &'a Arena,
    head: Head<'a>,
    target: Option<Tensor<'a>>,
    inv_temperature: f32,
    gradient: bool,
) -> Logprob<'a> {
    const OP: &str = "linear_logprob";
    let [d, t, ..] = head.hidden.shape();
    let r = head.low.map_or(0, |low| low.factor.shape()[0]);
    assert!(!gradient || target.is_some(), "the gradient is the target's");
    let mut sources = head.sources(OP);
    if let Some(target) = target {
        assert!(target.ty() == Type::I32 && target.len() == t, "{OP}: {target:?}");
        sources.push(target);
    }
    let width = if gradient { 3 + d + r } else { 3 };
    let params = Params {
        c: sys::bupo_logprob_params {
            op: sys::BUPO_OP_LOGPROB,
            inv_temperature,
            targets: target.is_some() as u32,
            gradient: gradient as u32,
            map: head.params(OP, &mut sources),
        },
        tiles: (0..t.div_ceil(TOKEN_TILE)).map(|_| Partials::default()).collect(),
    };
    // One result: T log-probs, T log-sum-exps, T entropies, then [D, T] and [r, T].
    let all = arena.custom([t * width, 1, 1, 1], &sources, kernel, params);
    Logprob {
        logprob: arena.part(all, 0, [t, 1]),
        lse: arena.part(all, t, [t, 1]),
        entropy: arena.part(all, 2 * t, [t, 1]),
        gradient: gradient.then(|| arena.part(all, 3 * t, [d, t])),
        gradient_low: (gradient && r > 0).then(|| arena.part(all, (3 + d) * t, [r, t])),
    }
}

/// The sources as a kernel reads them.
struct Job {
    head: RawHead,
    targets: *const i32,
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
    // SAFETY: `linear_logprob` made this node: a head's sources, targets I32 [T] where params say so, dst
    // with room for all results, Params as userdata.
    let (params, job) = unsafe {
        let params = &*userdata.cast::<Params>();
        let has_targets = params.c.targets != 0;
        let job = Job {
            head: RawHead::new(dst, 0, params.c.map),
            targets: if has_targets { (*(*dst).src[2]).data.cast() } else { std::ptr::null() },
            inv_temperature: params.c.inv_temperature,
            gradient: params.c.gradient != 0,
            out: (*dst).data.cast(),
        };
        (params, job)
    };
    let sizes = [job.head.t, job.head.v];
    // SAFETY: a live node; tokens and vocabulary rows lie within the sources, and whoever finishes a tile, when all of its parts are done,
    // alone writes its results.
    unsafe {
        let partial = |tokens, vocab| job.partial(tokens, vocab);
        let finish = |tokens, partials: Vec<Partial>| job.finish(tokens, partials);
        each_tile(&params.tiles, TOKEN_TILE, sizes, (dst, ith, nth), partial, finish);
    }
}

impl Job {
    /// The sums of `tokens` over `vocab`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn partial(&self, tokens: Range<usize>, vocab: Range<usize>) -> Partial {
        let (head, n) = (&self.head, tokens.len());
        let (d, sum_width) = (head.d, head.d + head.rank);
        let mut sums = Partial {
            max: vec![f32::NEG_INFINITY; n],
            sum: vec![0.0; n],
            weighted: vec![0.0; n],
            target: vec![None; n],
            mean: vec![0.0; if self.gradient { sum_width * n } else { 0 }],
        };
        let step = (VOCAB_TILE / d / 64 * 64).clamp(64, VOCAB_STEP);
        let dequantised = head.scratch(step);
        // Where a softcap comes between, the temperature follows it.
        let alpha = match head.map.softcap {
            None => head.map.scale * self.inv_temperature,
            Some(_) => head.map.scale,
        };
        // SAFETY: by contract; scratch holds a tile of E_u, a tile of logits, and slopes of one token's.
        with_scratch(dequantised + step * (n + 1), |scratch| unsafe {
            let (rows, scratch) = scratch.split_at_mut(dequantised);
            let (slopes, logits) = scratch.split_at_mut(step);
            for vs in steps(vocab, step) {
                let e = head.tile(vs.clone(), rows); // (v, d)
                let width = vs.len();
                head.multiply(e, &vs, tokens.clone(), logits, alpha); // (v, t)
                for (t, column) in logits.chunks_exact_mut(width).take(n).enumerate() {
                    let Some(cap) = head.map.softcap else {
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
                    head.add_rows(e, &vs, logits, &mut sums.mean);
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
                    let width = self.head.d + self.head.rank;
                    sums.mean[t * width..][..width].iter_mut().for_each(|x| *x *= scale);
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
        let (head, all) = (&self.head, self.head.t);
        let (d, r) = (head.d, head.rank);
        let mut scratch = vec![0f32; head.scratch(1)];
        let mut row = vec![0f32; d + r];
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
            // SAFETY: by contract; `out` has 3 T values, then D for each token, then r for each.
            unsafe {
                *self.out.add(token) = logprob as f32;
                *self.out.add(all + token) = lse as f32;
                *self.out.add(2 * all + token) = (sum.ln() - weighted / sum) as f32;
                if !self.gradient {
                    continue;
                }
                let factor = head.map.scale * self.inv_temperature;
                let own = factor * target.map_or(1.0, |(_, slope)| slope);
                head.row(*self.targets.add(token) as usize, &mut scratch, &mut row);
                row.iter_mut().for_each(|g| *g *= own);
                for p in &partials {
                    let scale = ((p.max[i] - max) as f64).exp() / sum;
                    let scale = scale as f32 * factor;
                    for (g, m) in row.iter_mut().zip(&p.mean[i * (d + r)..]) {
                        *g -= scale * m;
                    }
                }
                let out = self.out.add(3 * all);
                std::slice::from_raw_parts_mut(out.add(token * d), d).copy_from_slice(&row[..d]);
                let low = out.add(all * d + token * r);
                std::slice::from_raw_parts_mut(low, r).copy_from_slice(&row[d..]);
            }
        }
    }
}

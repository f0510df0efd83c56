//! How far two models' distributions over one vocabulary are apart, token by token.
//!
//! With logits `l^p` and `l^q`, each by its own map ([`super::LogitMap`]), `p = softmax(l^p)`, `q = softmax(l^q)`:
//!
//! ```text
//! KL(p || q) = sum_v p_v (l^p_v - l^q_v) - lse(l^p) + lse(l^q)
//! ```
//!
//! One pass over the vocabulary in tiles with running maxima and sums; no `[V, T]` buffer. Each thread takes
//! a part of the vocabulary for all tokens; partial sums are merged in the order of the threads, so that
//! results repeat. Equal inputs give 0 exactly. Sums are in f64: KL is a small difference of large numbers.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;

use super::exp::exp;
use super::gemm::with_scratch;
use super::linear::steps;
use super::logits::{Head, RawHead};
use super::partials::{Partials, each_tile};
use crate::ggml::{Arena, Tensor, Type};

/// Tokens at a time.
const TOKEN_TILE: usize = 256;
/// Vocabulary rows at a time, a multiple of gemm's micro kernel.
const VOCAB_STEP: usize = 256;

/// Results of [`divergence`], one value per token `[T]` each.
#[derive(Clone, Copy)]
pub struct Divergence<'a> {
    /// KL(p || q), nats.
    pub kl: Tensor<'a>,
    /// log p(target), nats.
    pub logprob_p: Tensor<'a>,
    /// log q(target), nats.
    pub logprob_q: Tensor<'a>,
    /// 1 where both have the same likeliest token, else 0.
    pub agree: Tensor<'a>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_divergence_params,
    // Partial sums of each token tile, by thread.
    tiles: Vec<Partials<Vec<Partial>>>,
}

/// Sums over a part of the vocabulary for one token.
#[derive(Clone, Copy)]
struct Partial {
    p: Side,
    q: Side,
    /// `sum e^(l^p - max^p) (l^p - l^q)`
    cross: f64,
}

/// What one distribution needs.
#[derive(Clone, Copy)]
struct Side {
    max: f32,
    /// The first token with that logit.
    best: usize,
    /// `sum e^(l - max)`
    sum: f64,
    /// The target's logit, where this part of the vocabulary holds it.
    target: Option<f32>,
}

/// KL, log-probs and agreement of p, of hidden states `[D_p, T]` and an unembedding `[D_p, V]`, and q, of
/// `[D_q, T]` and `[D_q, V]`; `target: [T]` I32, in range. The vocabulary is the same.
pub fn divergence<'a>(
    arena: &'a Arena,
    p: Head<'a>,
    q: Head<'a>,
    target: Tensor<'a>,
) -> Divergence<'a> {
    let t = p.hidden.shape()[1];
    const OP: &str = "divergence";
    let mut sources = [p, q].map(|head| head.sources(OP)).concat();
    assert!(q.hidden.shape()[1] == t, "{OP}: {t} tokens, and {:?}", q.hidden);
    let [v_p, v_q] = [p, q].map(|head| head.unembedding.shape()[1]);
    assert_eq!(v_p, v_q, "{OP}: one vocabulary");
    assert!(target.ty() == Type::I32 && target.len() == t, "{OP}: {target:?}");
    sources.push(target);
    let params = Params {
        c: sys::bupo_divergence_params {
            op: sys::BUPO_OP_DIVERGENCE,
            p: p.params(OP, &mut sources),
            q: q.params(OP, &mut sources),
        },
        tiles: (0..t.div_ceil(TOKEN_TILE)).map(|_| Partials::default()).collect(),
    };
    let all = arena.custom([4 * t, 1, 1, 1], &sources, kernel, params);
    Divergence {
        kl: arena.part(all, 0, [t, 1]),
        logprob_p: arena.part(all, t, [t, 1]),
        logprob_q: arena.part(all, 2 * t, [t, 1]),
        agree: arena.part(all, 3 * t, [t, 1]),
    }
}

struct Job {
    p: RawHead,
    q: RawHead,
    targets: *const i32,
    out: *mut f32,
}

unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `divergence` made this node: the sources of two heads, targets as checked there, dst with room for
    // 4 T results, Params as userdata.
    let (params, job) = unsafe {
        let params = &*userdata.cast::<Params>();
        debug_assert_eq!(params.c.op, sys::BUPO_OP_DIVERGENCE);
        let job = Job {
            p: RawHead::new(dst, 0, params.c.p),
            q: RawHead::new(dst, 2, params.c.q),
            targets: (*(*dst).src[4]).data.cast(),
            out: (*dst).data.cast(),
        };
        (params, job)
    };
    let sizes = [job.p.t, job.p.v];
    // SAFETY: a live node; tokens and vocabulary rows lie within the sources, and whoever finishes a tile, when all of its parts are done,
    // alone writes its results.
    unsafe {
        let partial = |tokens, vocab| job.partial(tokens, vocab);
        let finish = |tokens, partials: Vec<Vec<Partial>>| job.finish(tokens, &partials);
        each_tile(&params.tiles, TOKEN_TILE, sizes, (dst, ith, nth), partial, finish);
    }
}

/// Logits of `tokens` for rows `vs`: `(v, t)`, one token's in a row of memory.
///
/// # Safety
/// Both ranges lie within the head's sources; `rows` has room for a dequantised tile.
unsafe fn logits(
    head: &RawHead,
    tokens: &Range<usize>,
    vs: &Range<usize>,
    rows: &mut [f32],
    logits: &mut [f32],
) {
    // SAFETY: by contract.
    unsafe {
        let e = head.tile(vs.clone(), rows); // (v, d)
        head.multiply(e, vs, tokens.clone(), logits, head.map.scale);
    }
    head.map.cap(&mut logits[..vs.len() * tokens.len()]);
}

impl Job {
    /// The sums of `tokens` over `vocab`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn partial(&self, tokens: Range<usize>, vocab: Range<usize>) -> Vec<Partial> {
        let n = tokens.len();
        let side = Side { max: f32::NEG_INFINITY, best: vocab.start, sum: 0.0, target: None };
        let mut sums = vec![Partial { p: side, q: side, cross: 0.0 }; n];
        let rows = self.p.scratch(VOCAB_STEP).max(self.q.scratch(VOCAB_STEP));
        with_scratch(rows + 2 * VOCAB_STEP * n, |scratch| {
            let (rows, both) = scratch.split_at_mut(rows);
            let (p, q) = both.split_at_mut(VOCAB_STEP * n);
            for vs in steps(vocab, VOCAB_STEP) {
                let width = vs.len();
                // SAFETY: by contract; scratch holds a tile of E and two tiles of logits.
                unsafe {
                    logits(&self.p, &tokens, &vs, rows, p);
                    logits(&self.q, &tokens, &vs, rows, q);
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let column = t * width..(t + 1) * width;
                    // SAFETY: a token of the sources.
                    let target = unsafe { *self.targets.add(tokens.start + t) } as usize;
                    sums.absorb(&p[column.clone()], &q[column], vs.start, target);
                }
            }
        });
        sums
    }

    /// Merges the threads' sums and writes the results of `tokens`.
    ///
    /// # Safety
    /// `tokens` lies within the sources, and nobody else writes these results.
    unsafe fn finish(&self, tokens: Range<usize>, partials: &[Vec<Partial>]) {
        for (i, token) in tokens.enumerate() {
            let mut all = partials[0][i];
            for part in &partials[1..] {
                all.merge(&part[i]);
            }
            let lse = |side: &Side| side.max as f64 + side.sum.ln();
            let (lse_p, lse_q) = (lse(&all.p), lse(&all.q));
            let logprob = |side: &Side, lse| side.target.map_or(f64::NAN, |l| l as f64 - lse);
            let kl = all.cross / all.p.sum - lse_p + lse_q;
            let results = [
                kl,
                logprob(&all.p, lse_p),
                logprob(&all.q, lse_q),
                (all.p.best == all.q.best) as u8 as f64,
            ];
            for (k, x) in results.into_iter().enumerate() {
                // SAFETY: by contract; `out` has 4 T values.
                unsafe { *self.out.add(k * self.p.t + token) = x as f32 };
            }
        }
    }
}

impl Side {
    /// Takes logits of tokens from `first` on; gives the factor that older sums shrink by.
    fn absorb(&mut self, l: &[f32], first: usize, target: usize) -> f64 {
        if let Some(&logit) = target.checked_sub(first).and_then(|i| l.get(i)) {
            self.target = Some(logit);
        }
        let before = self.max;
        for (i, &x) in l.iter().enumerate() {
            if x > self.max {
                (self.max, self.best) = (x, first + i);
            }
        }
        let scale = shrink(before, self.max);
        self.sum *= scale;
        scale
    }

    /// Takes the sums over a later part of the vocabulary; gives the factors of the older and the new sums.
    fn merge(&mut self, other: &Side) -> (f64, f64) {
        let before = self.max;
        if other.max > self.max {
            (self.max, self.best) = (other.max, other.best);
        }
        let (old, new) = (shrink(before, self.max), shrink(other.max, self.max));
        self.sum = old * self.sum + new * other.sum;
        self.target = self.target.or(other.target);
        (old, new)
    }
}

/// `e^(before - max)`; 1 where nothing has changed, 0 where there was nothing before.
fn shrink(before: f32, max: f32) -> f64 {
    if before == max { 1.0 } else { (before as f64 - max as f64).exp() }
}

impl Partial {
    fn absorb(&mut self, p: &[f32], q: &[f32], first: usize, target: usize) {
        self.cross *= self.p.absorb(p, first, target);
        self.q.absorb(q, first, target);
        let (max_p, max_q) = (self.p.max, self.q.max);
        let (mut sum_p, mut sum_q, mut cross) = ([0f64; 8], [0f64; 8], [0f64; 8]);
        let mut add = |lane: usize, lp: f32, lq: f32| {
            let e = exp(lp - max_p) as f64;
            sum_p[lane] += e;
            sum_q[lane] += exp(lq - max_q) as f64;
            cross[lane] += e * (lp as f64 - lq as f64);
        };
        let ((p8, p_rest), (q8, q_rest)) = (p.as_chunks::<8>(), q.as_chunks::<8>());
        for (p, q) in p8.iter().zip(q8) {
            for lane in 0..8 {
                add(lane, p[lane], q[lane]);
            }
        }
        for (lane, (&p, &q)) in p_rest.iter().zip(q_rest).enumerate() {
            add(lane, p, q);
        }
        self.p.sum += sum_p.iter().sum::<f64>();
        self.q.sum += sum_q.iter().sum::<f64>();
        self.cross += cross.iter().sum::<f64>();
    }

    fn merge(&mut self, other: &Partial) {
        let (old, new) = self.p.merge(&other.p);
        self.cross = old * self.cross + new * other.cross;
        self.q.merge(&other.q);
    }
}

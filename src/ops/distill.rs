//! `distill`: how far a student's distribution is from a teacher's over the whole vocabulary, and the gradient of that
//! by the student's hidden states, without ever holding `[V, T]` logits.
//!
//! With both models' tempered logits l and l', each by its own map ([`super::LogitMap`]) divided by a temperature,
//! their log-sum-exps known (from [`super::linear_logprob`]), student `p_v = e^(l_v - lse)`, teacher
//! `q_v = e^(l'_v - lse')`, `m = beta q + (1 - beta) p`, and `w_v = dl_v / dz_v` (1, or less with a softcap):
//!
//! ```text
//! reverse KL      D = sum_v p_v f_v,                                   f_v = log p_v - log q_v
//! forward KL      D = sum_v q_v (log q_v - log p_v)
//! Jensen-Shannon  D = beta KL(q || m) + (1 - beta) KL(p || m),         f_v = (1 - beta) (log p_v - log m_v)
//!
//! dD / dh = scale / T * sum_v p_v (f_v - sum_u p_u f_u) w_v E_u[v]     reverse KL, Jensen-Shannon
//! dD / dh = scale / T * sum_v (p_v - q_v) w_v E_u[v]                   forward KL
//! ```
//!
//! (dD/dp_v is f_v up to a constant, which softmax's derivative takes away.) Reverse KL is that of on-policy
//! distillation (MiniLLM, arXiv 2306.08543), the generalised Jensen-Shannon divergence that of GKD (arXiv 2306.13649).
//!
//! One pass over the vocabulary in tiles: both models' logits of a tile, then the sums `sum p f w E` and `sum p w E`
//! (forward KL: one sum). No running maximum is needed, for the log-sum-exps are known. Threads share out the
//! vocabulary; their sums are merged in the order of threads, so that results repeat. Sums of probabilities are in f64.
//! Equal logits give exactly 0 and no gradient.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::Mutex;

use ggml_sys as sys;
use serde::{Deserialize, Serialize};

use super::exp::{exp, softcap};
use super::gemm::{Matrix, gemm, with_scratch};
use super::linear::{Weight, steps};
use super::logits::{Head, LogitMap};
use super::rows::{check_head, partition};
use crate::ggml::{Arena, Tensor, Type};

/// Tokens at a time.
const TOKEN_TILE: usize = 256;
/// Vocabulary rows at a time.
const VOCAB_STEP: usize = 256;

/// How a student is to follow its teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DivergenceKind {
    /// KL(student || teacher): the student keeps to what the teacher finds likely.
    Reverse,
    /// KL(teacher || student): the student covers all that the teacher finds likely.
    Forward,
    /// The generalised Jensen-Shannon divergence between the two.
    Jsd,
}

/// Which divergence, at which temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistillSpec {
    /// The divergence.
    pub kind: DivergenceKind,
    /// Weight of the teacher in the mixture of [`DivergenceKind::Jsd`], in 0 to 1.
    pub beta: f32,
    /// 1/T of both models' logits.
    pub inv_temperature: f32,
}

/// Results of [`distill`].
#[derive(Clone, Copy)]
pub struct Distilled<'a> {
    /// D: `[T]`, nats.
    pub divergence: Tensor<'a>,
    /// dD / dh of the student: `[D, T]`.
    pub gradient: Tensor<'a>,
}

/// Bytes that [`distill`] takes beside its result: on each thread a tile of dequantised vocabulary, two of logits, and
/// the sums of the token tiles that are in work.
pub fn distill_tiles_bytes(d: usize, tokens: usize, threads: usize) -> usize {
    let tile = tokens.min(TOKEN_TILE);
    threads * 4 * (VOCAB_STEP * (d + 3 * tile) + 2 * 2 * d * tile)
}

#[repr(C)]
struct Params {
    c: sys::bupo_distill_params,
    // Sums of each token tile, by thread.
    tiles: Vec<Mutex<Vec<Option<Partial>>>>,
}

/// Sums over a part of the vocabulary for one tile of tokens.
struct Partial {
    // D, and sum p f.
    value: Vec<f64>,
    mean: Vec<f64>,
    // sum c w E and sum p w E: [D, tokens]; c is p f, or p - q of forward KL, which has no second sum.
    first: Vec<f32>,
    second: Vec<f32>,
}

/// Divergence of a student's hidden states `[D, T]` from a teacher's `[D', T]`, whose unembeddings have one vocabulary;
/// `lse`: the log-sum-exps of the student's and the teacher's tempered logits, `[T]` F32 each.
pub fn distill<'a>(
    arena: &'a Arena,
    student: Head<'a>,
    teacher: Head<'a>,
    lse: [Tensor<'a>; 2],
    spec: DistillSpec,
) -> Distilled<'a> {
    let [d, t, ..] = student.hidden.shape();
    for head in [student, teacher] {
        check_head("distill", head.hidden, head.unembedding);
        assert!(head.hidden.shape()[1] == t, "distill: {t} tokens, and {:?}", head.hidden);
    }
    let [v, v_teacher] = [student, teacher].map(|head| head.unembedding.shape()[1]);
    assert_eq!(v, v_teacher, "distill: one vocabulary");
    for lse in lse {
        assert!(lse.ty() == Type::F32 && lse.is_contiguous() && lse.len() == t, "distill: {lse:?}");
    }
    assert!((0.0..=1.0).contains(&spec.beta), "distill: beta {}", spec.beta);
    let params = Params {
        c: sys::bupo_distill_params {
            op: sys::BUPO_OP_DISTILL,
            divergence: match spec.kind {
                DivergenceKind::Reverse => sys::BUPO_REVERSE_KL,
                DivergenceKind::Forward => sys::BUPO_FORWARD_KL,
                DivergenceKind::Jsd => sys::BUPO_JENSEN_SHANNON,
            },
            beta: spec.beta,
            inv_temperature: spec.inv_temperature,
            student: student.map.params(),
            teacher: teacher.map.params(),
        },
        tiles: (0..t.div_ceil(TOKEN_TILE)).map(|_| Mutex::default()).collect(),
    };
    let sources =
        [student.hidden, student.unembedding, teacher.hidden, teacher.unembedding, lse[0], lse[1]];
    // One result: T divergences, then [D, T].
    let all = arena.custom([t * (1 + d), 1, 1, 1], &sources, kernel, params);
    Distilled { divergence: arena.part(all, 0, [t, 1]), gradient: arena.part(all, t, [d, t]) }
}

/// Hidden states, unembedding and log-sum-exps of one model.
struct Side {
    d: usize,
    h: *const f32,
    unembedding: Weight,
    map: LogitMap,
    lse: *const f32,
}

struct Job {
    student: Side,
    teacher: Side,
    t: usize,
    v: usize,
    kind: DivergenceKind,
    beta: f32,
    inv_temperature: f32,
    out: *mut f32,
}

unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `distill` made this node: the student's and the teacher's hidden states and unembeddings, their
    // log-sum-exps, as checked there, dst with room for all results, Params as userdata.
    let (params, job) = unsafe {
        let params = &*userdata.cast::<Params>();
        debug_assert_eq!(params.c.op, sys::BUPO_OP_DISTILL);
        let src = &(*dst).src;
        let side = |i: usize, lse: usize, map| Side {
            d: (*src[i]).ne[0] as usize,
            h: (*src[i]).data.cast(),
            unembedding: Weight::new(src[i + 1]),
            map: LogitMap::from_params(map),
            lse: (*src[lse]).data.cast(),
        };
        let job = Job {
            student: side(0, 4, params.c.student),
            teacher: side(2, 5, params.c.teacher),
            t: (*src[0]).ne[1] as usize,
            v: (*src[1]).ne[1] as usize,
            kind: match params.c.divergence {
                sys::BUPO_REVERSE_KL => DivergenceKind::Reverse,
                sys::BUPO_FORWARD_KL => DivergenceKind::Forward,
                _ => DivergenceKind::Jsd,
            },
            beta: params.c.beta,
            inv_temperature: params.c.inv_temperature,
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
            unsafe { job.finish(tokens, &partials) };
        }
    }
}

impl Side {
    /// Products `z = scale E h` of `tokens` for rows `vs`: `(v, t)`, one token's in a row of memory.
    ///
    /// # Safety
    /// Both ranges lie within the sources; `z` has room for the results, `e` is a tile of rows `vs`.
    unsafe fn products(&self, tokens: &Range<usize>, e: Matrix<*const f32>, z: &mut [f32]) {
        let n = tokens.len();
        let width = z.len() / n;
        // SAFETY: by contract.
        unsafe {
            let h = Matrix::new(self.h.add(tokens.start * self.d), 1, self.d); // (d, t)
            let l = Matrix::new(z.as_mut_ptr(), 1, width); // (v, t)
            gemm([width, n, self.d], l, false, e, h, self.map.scale);
        }
    }

    /// The tempered logit of a product, and its derivative.
    fn logit(&self, z: f32, inv_temperature: f32) -> (f32, f32) {
        let (l, w) = self.map.softcap.map_or((z, 1.0), |c| softcap(z, c));
        (inv_temperature * l, w)
    }
}

impl Job {
    /// The sums of `tokens` over `vocab`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn partial(&self, tokens: Range<usize>, vocab: Range<usize>) -> Partial {
        let (d, n) = (self.student.d, tokens.len());
        let has_mean = self.kind != DivergenceKind::Forward;
        let mut sums = Partial {
            value: vec![0.0; n],
            mean: vec![0.0; n],
            first: vec![0.0; d * n],
            second: vec![0.0; if has_mean { d * n } else { 0 }],
        };
        let scratch = |side: &Side| side.unembedding.scratch(VOCAB_STEP, side.d);
        let rows = scratch(&self.student).max(scratch(&self.teacher));
        with_scratch(rows + 2 * VOCAB_STEP * n, |scratch| {
            let (rows, products) = scratch.split_at_mut(rows);
            let (p, q) = products.split_at_mut(VOCAB_STEP * n);
            for vs in steps(vocab, VOCAB_STEP) {
                let width = vs.len();
                let (p, q) = (&mut p[..width * n], &mut q[..width * n]);
                // SAFETY: by contract; the teacher's tile is done with before the student's takes its place, which
                // the two sums read once more.
                unsafe {
                    let e = self.teacher.unembedding.tile(vs.clone(), 0..self.teacher.d, rows);
                    self.teacher.products(&tokens, e, q);
                    let e = self.student.unembedding.tile(vs, 0..d, rows); // (v, d)
                    self.student.products(&tokens, e, p);
                    for (t, (p, q)) in
                        p.chunks_exact_mut(width).zip(q.chunks_exact_mut(width)).enumerate()
                    {
                        let lse = [self.student.lse, self.teacher.lse];
                        let lse = lse.map(|lse| *lse.add(tokens.start + t));
                        let (value, mean) = self.absorb(p, q, lse);
                        sums.value[t] += value;
                        sums.mean[t] += mean;
                    }
                    let e = Matrix::new(e.data, e.column, e.row); // (d, v)
                    let first = Matrix::new(sums.first.as_mut_ptr(), 1, d); // (d, t)
                    gemm([d, n, width], first, true, e, Matrix::new(q.as_ptr(), 1, width), 1.0);
                    if has_mean {
                        let second = Matrix::new(sums.second.as_mut_ptr(), 1, d);
                        let p = Matrix::new(p.as_ptr(), 1, width);
                        gemm([d, n, width], second, true, e, p, 1.0);
                    }
                }
            }
        });
        sums
    }

    /// One token's part of D and of `sum p f` over a tile. Products become what the sums of E are weighted by: those of
    /// the teacher, `q`, become `c w`, those of the student, `p`, become `p w`.
    fn absorb(&self, p: &mut [f32], q: &mut [f32], [lse_p, lse_q]: [f32; 2]) -> (f64, f64) {
        let (mut value, mut mean) = (0f64, 0f64);
        for (p, q) in p.iter_mut().zip(q) {
            let (l, w) = self.student.logit(*p, self.inv_temperature);
            let log_p = l - lse_p;
            let log_q = self.teacher.logit(*q, self.inv_temperature).0 - lse_q;
            let (prob_p, prob_q) = (exp(log_p), exp(log_q));
            let c = match self.kind {
                DivergenceKind::Reverse => {
                    let weighted = prob_p * (log_p - log_q);
                    value += weighted as f64;
                    mean += weighted as f64;
                    weighted
                }
                DivergenceKind::Forward => {
                    value += (prob_q * (log_q - log_p)) as f64;
                    prob_p - prob_q
                }
                DivergenceKind::Jsd => {
                    let beta = self.beta;
                    // log m through the larger of both, so that neither underflows.
                    let (high, low) = if log_p > log_q {
                        (log_p, (1.0 - beta) + beta * exp(log_q - log_p))
                    } else {
                        (log_q, beta + (1.0 - beta) * exp(log_p - log_q))
                    };
                    // A weight of 0 for the larger: m is the other, which may be next to nothing.
                    let log_m = high + low.max(f32::MIN_POSITIVE).ln();
                    let weighted = (1.0 - beta) * prob_p * (log_p - log_m);
                    value += (beta * prob_q * (log_q - log_m) + weighted) as f64;
                    mean += weighted as f64;
                    weighted
                }
            };
            *q = c * w;
            *p = prob_p * w;
        }
        (value, mean)
    }

    /// Merges the threads' sums and writes the results of `tokens`.
    ///
    /// # Safety
    /// `tokens` lies within the sources, and nobody else writes these results.
    unsafe fn finish(&self, tokens: Range<usize>, partials: &[Partial]) {
        let d = self.student.d;
        let factor = self.student.map.scale * self.inv_temperature;
        for (i, token) in tokens.enumerate() {
            let sum =
                |of: fn(&Partial) -> &Vec<f64>| partials.iter().map(|p| of(p)[i]).sum::<f64>();
            let (value, mean) = (sum(|p| &p.value), sum(|p| &p.mean) as f32);
            // SAFETY: by contract; `out` has T values, then D for each token.
            let out = unsafe {
                *self.out.add(token) = value as f32;
                std::slice::from_raw_parts_mut(self.out.add(self.t + token * d), d)
            };
            out.fill(0.0);
            for part in partials {
                for (g, x) in out.iter_mut().zip(&part.first[i * d..][..d]) {
                    *g += factor * x;
                }
                // None of forward KL.
                for (g, x) in out.iter_mut().zip(part.second.iter().skip(i * d)) {
                    *g -= factor * mean * x;
                }
            }
        }
    }
}

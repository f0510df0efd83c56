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

use ggml_sys as sys;
use serde::{Deserialize, Serialize};

use super::exp::{exp, softcap};
use super::gemm::with_scratch;
use super::linear::steps;
use super::logits::{Head, RawHead};
use super::partials::{Partials, each_tile};
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
    tiles: Vec<Partials<Partial>>,
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
    const OP: &str = "distill";
    let [d, t, ..] = student.hidden.shape();
    let mut sources = [student, teacher].map(|head| head.sources(OP)).concat();
    for head in [student, teacher] {
        assert!(head.hidden.shape()[1] == t, "{OP}: {t} tokens, and {:?}", head.hidden);
        assert!(head.low.is_none(), "{OP}: adapters on the unembedding are refused before");
    }
    sources.extend(lse);
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
            student: student.params(OP, &mut sources),
            teacher: teacher.params(OP, &mut sources),
        },
        tiles: (0..t.div_ceil(TOKEN_TILE)).map(|_| Partials::default()).collect(),
    };
    // One result: T divergences, then [D, T].
    let all = arena.custom([t * (1 + d), 1, 1, 1], &sources, kernel, params);
    Distilled { divergence: arena.part(all, 0, [t, 1]), gradient: arena.part(all, t, [d, t]) }
}

/// Hidden states, unembedding and log-sum-exps of one model.
struct Side {
    head: RawHead,
    lse: *const f32,
}

struct Job {
    student: Side,
    teacher: Side,
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
        let side = |first: usize, lse: usize, map| Side {
            head: RawHead::new(dst, first, map),
            lse: (*(*dst).src[lse]).data.cast(),
        };
        let job = Job {
            student: side(0, 4, params.c.student),
            teacher: side(2, 5, params.c.teacher),
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
    let sizes = [job.student.head.t, job.student.head.v];
    // SAFETY: a live node; tokens and vocabulary rows lie within the sources, and whoever finishes a tile, when all of its parts are done,
    // alone writes its results.
    unsafe {
        let partial = |tokens, vocab| job.partial(tokens, vocab);
        let finish = |tokens, partials: Vec<Partial>| job.finish(tokens, &partials);
        each_tile(&params.tiles, TOKEN_TILE, sizes, (dst, ith, nth), partial, finish);
    }
}

impl Side {
    /// The tempered logit of a product, and its derivative.
    fn logit(&self, z: f32, inv_temperature: f32) -> (f32, f32) {
        let (l, w) = self.head.map.softcap.map_or((z, 1.0), |c| softcap(z, c));
        (inv_temperature * l, w)
    }
}

impl Job {
    /// The sums of `tokens` over `vocab`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn partial(&self, tokens: Range<usize>, vocab: Range<usize>) -> Partial {
        let (student, teacher) = (&self.student.head, &self.teacher.head);
        let (d, n) = (student.d, tokens.len());
        let has_mean = self.kind != DivergenceKind::Forward;
        let mut sums = Partial {
            value: vec![0.0; n],
            mean: vec![0.0; n],
            first: vec![0.0; d * n],
            second: vec![0.0; if has_mean { d * n } else { 0 }],
        };
        let rows = student.scratch(VOCAB_STEP).max(teacher.scratch(VOCAB_STEP));
        with_scratch(rows + 2 * VOCAB_STEP * n, |scratch| {
            let (rows, products) = scratch.split_at_mut(rows);
            let (p, q) = products.split_at_mut(VOCAB_STEP * n);
            for vs in steps(vocab, VOCAB_STEP) {
                let width = vs.len();
                let (p, q) = (&mut p[..width * n], &mut q[..width * n]);
                // SAFETY: by contract; the teacher's tile is done with before the student's takes its place, which
                // the two sums read once more.
                unsafe {
                    let e = teacher.tile(vs.clone(), rows);
                    teacher.multiply(e, &vs, tokens.clone(), q, teacher.map.scale);
                    let e = student.tile(vs.clone(), rows); // (v, d)
                    student.multiply(e, &vs, tokens.clone(), p, student.map.scale);
                    for (t, (p, q)) in
                        p.chunks_exact_mut(width).zip(q.chunks_exact_mut(width)).enumerate()
                    {
                        let lse = [self.student.lse, self.teacher.lse];
                        let lse = lse.map(|lse| *lse.add(tokens.start + t));
                        let (value, mean) = self.absorb(p, q, lse);
                        sums.value[t] += value;
                        sums.mean[t] += mean;
                    }
                    student.add_rows(e, &vs, q, &mut sums.first);
                    if has_mean {
                        student.add_rows(e, &vs, p, &mut sums.second);
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
        let RawHead { d, t, map, .. } = self.student.head;
        let factor = map.scale * self.inv_temperature;
        for (i, token) in tokens.enumerate() {
            let sum =
                |of: fn(&Partial) -> &Vec<f64>| partials.iter().map(|p| of(p)[i]).sum::<f64>();
            let (value, mean) = (sum(|p| &p.value), sum(|p| &p.mean) as f32);
            // SAFETY: by contract; `out` has T values, then D for each token.
            let out = unsafe {
                *self.out.add(token) = value as f32;
                std::slice::from_raw_parts_mut(self.out.add(t + token * d), d)
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

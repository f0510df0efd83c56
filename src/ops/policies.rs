//! `policies`: what many hidden states say through one unembedding, in a single pass over the vocabulary.
//!
//! For a column `h` with logits `l` ([`Head`]), `lse = log sum_v e^(l_v)`, `p_v = e^(l_v - lse)`, and the
//! column `r` that it is compared with, of probabilities `q_v`:
//!
//! ```text
//! entropy = -sum_v p_v log p_v             rank of the taken token = 1 + #{v: l_v > l_taken}
//! KL(p || q) = sum_v p_v (log p_v - log q_v)        KL(q || p) the same way
//! ```
//!
//! A tile of the vocabulary is dequantised once and multiplied with all columns; running maxima and sums
//! relative to them replace the `[V, C]` logits, as in [`super::linear_logprob`]. The divergences are sums of
//! `d_v = (l_v - max) - (l'_v - max')`, which is small where the policies are close, so that little cancels.
//!
//! Threads take chunks of the vocabulary from a queue; the chunks are cut and merged the same way for any
//! number of threads, so results repeat bit for bit.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::exp::exp;
use super::gemm::with_scratch;
use super::linear::steps;
use super::logits::{Head, RawHead};
use super::partials::Partials;
use super::queue::Queue;
use super::rows::{maximum, partition};
use crate::ggml::{Arena, Tensor, Type};

/// Columns that one pass over the vocabulary serves: what dequantising costs is shared among them.
const PASS_COLUMNS: usize = 2048;
/// Columns of one product.
const TILE_COLUMNS: usize = 512;
/// Floats of a dequantised vocabulary tile.
const VOCAB_TILE: usize = 128 * 1024;
/// Parts of the vocabulary that threads share out.
const CHUNKS: usize = 64;
/// Values per column before the top tokens.
const FIXED: usize = 7;

/// What is wanted of each column beside its entropy.
#[derive(Clone, Copy)]
pub struct Compare<'a> {
    /// `[C]` I32, in range: the token whose log-prob and rank are wanted.
    pub taken: Option<Tensor<'a>>,
    /// Columns come in groups of this many, and each is compared with the last of its group; 1 compares none.
    pub group: usize,
    /// Likeliest tokens, at most V.
    pub top_k: usize,
}

/// The node of [`policies`].
#[derive(Clone, Copy)]
pub struct Policies<'a> {
    /// `[7 + 2 top_k, C]`; [`Answers`] reads it.
    pub values: Tensor<'a>,
}

/// The values of [`policies`], by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    values: Vec<f32>,
    width: usize,
}

impl Answers {
    /// Reads the computed values of a node made with this `top_k`.
    pub fn new(values: Vec<f32>, top_k: usize) -> Answers {
        Answers { values, width: FIXED + 2 * top_k }
    }

    /// Puts the values of further columns behind these, of the same `top_k`.
    pub fn append(&mut self, values: Vec<f32>) {
        self.values.extend(values);
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn at(&self, column: usize, field: usize) -> f32 {
        self.values[column * self.width + field]
    }

    /// Entropy, nats.
    pub fn entropy(&self, column: usize) -> f32 {
        self.at(column, 0)
    }

    /// log-sum-exp of the logits.
    pub fn lse(&self, column: usize) -> f32 {
        self.at(column, 1)
    }

    /// The likeliest token; the first of equals.
    pub fn best(&self, column: usize) -> i32 {
        self.at(column, 2) as i32
    }

    /// log p(taken), nats.
    pub fn taken_logprob(&self, column: usize) -> f32 {
        self.at(column, 3)
    }

    /// Rank of the taken token, from 1.
    pub fn taken_rank(&self, column: usize) -> u32 {
        self.at(column, 4) as u32
    }

    /// KL(column || last of its group), nats.
    pub fn kl_to(&self, column: usize) -> f32 {
        self.at(column, 5)
    }

    /// KL(last of its group || column), nats.
    pub fn kl_from(&self, column: usize) -> f32 {
        self.at(column, 6)
    }

    /// The likeliest tokens and their log-probs, likeliest first.
    pub fn top(&self, column: usize) -> impl Iterator<Item = (i32, f32)> + '_ {
        let k = (self.width - FIXED) / 2;
        (0..k).map(move |i| (self.at(column, FIXED + i) as i32, self.at(column, FIXED + k + i)))
    }
}

#[repr(C)]
struct Params {
    c: sys::bupo_policies_params,
    passes: Vec<Pass>,
}

/// The columns of one pass: who takes which chunk, and what the chunks have given.
#[derive(Default)]
struct Pass {
    queue: Queue,
    parts: Partials<Part>,
}

/// What a chunk of the vocabulary gives for the columns of a pass.
struct Part {
    sums: Vec<Sums>,
    // (logit, token), likeliest first: top_k for each column.
    best: Vec<Vec<(f32, u32)>>,
}

/// Sums of one column over part of the vocabulary, relative to its running maximum.
#[derive(Clone, Copy)]
struct Sums {
    max: f32,
    // Which token has the maximum.
    best: u32,
    // Tokens above the taken one, and its own logit; NaN where another part has it.
    above: u32,
    taken: f32,
    // sum e^x, sum e^x x with x = l - max
    sum: f64,
    weighted: f64,
    // sum e^x d and -sum e^x' d, d = x - x', x' of the column that it is compared with
    forward: f64,
    back: f64,
}

const NOTHING: Sums = Sums {
    max: f32::NEG_INFINITY,
    best: 0,
    above: 0,
    taken: f32::NAN,
    sum: 0.0,
    weighted: 0.0,
    forward: 0.0,
    back: 0.0,
};

/// Entropies and more of hidden states `[D, C]` under their head.
pub fn policies<'a>(arena: &'a Arena, head: Head<'a>, wanted: Compare<'a>) -> Policies<'a> {
    const OP: &str = "policies";
    let (columns, v) = (head.hidden.shape()[1], head.unembedding.shape()[1]);
    let mut sources = head.sources(OP);
    assert!(wanted.group > 0 && columns.is_multiple_of(wanted.group), "{columns} in groups");
    assert!(wanted.top_k <= v && v < 1 << 24, "ids are given as F32");
    if let Some(taken) = wanted.taken {
        assert!(taken.ty() == Type::I32 && taken.len() == columns, "{OP}: {taken:?}");
        let shape = [columns, 1, 1, 1];
        sources.push(taken);
        let mut all = sources.clone();
        let map = head.params(OP, &mut all);
        let params = sys::bupo_taken_logits_params { op: sys::BUPO_OP_TAKEN_LOGITS, map };
        sources.push(arena.custom(shape, &all, taken_kernel, params));
    }
    let c = sys::bupo_policies_params {
        op: sys::BUPO_OP_POLICIES,
        group: wanted.group as u32,
        top_k: wanted.top_k as u32,
        taken: wanted.taken.is_some() as u32,
        map: head.params(OP, &mut sources),
    };
    let passes = columns.div_ceil(pass_columns(wanted.group));
    let params = Params { c, passes: (0..passes).map(|_| Pass::default()).collect() };
    let shape = [FIXED + 2 * wanted.top_k, columns, 1, 1];
    Policies { values: arena.custom(shape, &sources, kernel, params) }
}

/// Columns, in groups of `group`, that one pass over the vocabulary serves: as many cost one reading of it.
pub fn pass_columns(group: usize) -> usize {
    (PASS_COLUMNS / group).max(1) * group
}

/// Logit of each column's taken token.
unsafe extern "C" fn taken_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `policies` made this node: a head's sources, then taken I32 [C] in range, dst F32 [C], the
    // parameters as userdata.
    unsafe {
        let head = RawHead::new(dst, 0, (*userdata.cast::<sys::bupo_taken_logits_params>()).map);
        let taken = (*(*dst).src[2]).data.cast::<i32>();
        let mut scratch = vec![0f32; head.scratch(1)];
        let mut row = vec![0f32; head.d + head.rank];
        for c in partition(head.t, ith, nth) {
            head.row(*taken.add(c) as usize, &mut scratch, &mut row);
            *(*dst).data.cast::<f32>().add(c) = head.logit(&row, c);
        }
    }
}

/// The sources as the kernel reads them.
struct Job {
    head: RawHead,
    group: usize,
    top_k: usize,
    // Null without.
    taken: *const i32,
    taken_logits: *const f32,
    out: *mut f32,
}

unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `policies` made this node: a head's sources, then taken I32 [C] and its logits F32 [C] where
    // params say so, dst F32 [7 + 2 k, C], Params as userdata.
    let (params, job) = unsafe {
        let params = &*userdata.cast::<Params>();
        let src = &(*dst).src;
        let has = params.c.taken != 0;
        let job = Job {
            head: RawHead::new(dst, 0, params.c.map),
            group: params.c.group as usize,
            top_k: params.c.top_k as usize,
            taken: if has { (*src[2]).data.cast() } else { std::ptr::null() },
            taken_logits: if has { (*src[3]).data.cast() } else { std::ptr::null() },
            out: (*dst).data.cast(),
        };
        (params, job)
    };
    let (v, columns) = (job.head.v, job.head.t);
    let rows = v.div_ceil(CHUNKS).next_multiple_of(64);
    let chunks = v.div_ceil(rows);
    let width = pass_columns(job.group);
    for (i, pass) in params.passes.iter().enumerate() {
        let columns = i * width..((i + 1) * width).min(columns);
        pass.queue.each(chunks, nth, |chunk| {
            let vocab = chunk * rows..((chunk + 1) * rows).min(v);
            // SAFETY: columns and vocabulary rows lie within the sources.
            let part = unsafe { job.part(columns.clone(), vocab) };
            if let Some(parts) = pass.parts.put(chunk, chunks, part) {
                // SAFETY: all chunks of the pass are done, and only this thread writes its results.
                unsafe { job.finish(columns.clone(), &parts) };
            }
        });
    }
}

impl Sums {
    /// Relative to maxima that are higher by `up`, `other_up` (of the column compared with, whose sum is
    /// `other_sum`).
    fn raised(&self, up: f64, other_up: f64, other_sum: f64) -> Sums {
        let (scale, other_scale) = ((-up).exp(), (-other_up).exp());
        Sums {
            sum: scale * self.sum,
            weighted: scale * (self.weighted - up * self.sum),
            forward: scale * (self.forward + (other_up - up) * self.sum),
            back: other_scale * (self.back + (up - other_up) * other_sum),
            ..*self
        }
    }

    fn add(&mut self, other: &Sums) {
        self.sum += other.sum;
        self.weighted += other.weighted;
        self.forward += other.forward;
        self.back += other.back;
        self.above += other.above;
        self.taken = if other.taken.is_nan() { self.taken } else { other.taken };
    }
}

impl Job {
    /// What `vocab` gives for `columns`.
    ///
    /// # Safety
    /// Both ranges lie within the sources, which are live.
    unsafe fn part(&self, columns: Range<usize>, vocab: Range<usize>) -> Part {
        let (head, n, arch) = (&self.head, columns.len(), pulp::Arch::new());
        let mut part = Part {
            sums: vec![NOTHING; n],
            best: vec![Vec::with_capacity(self.top_k + 1); if self.top_k > 0 { n } else { 0 }],
        };
        let step = (VOCAB_TILE / head.d / 64 * 64).clamp(64, 512);
        let tile = (TILE_COLUMNS / self.group).max(1) * self.group;
        let dequantised = head.scratch(step);
        let room = dequantised + step * tile.min(n) + step;
        // SAFETY: by contract; scratch holds a tile of E_u, a tile of logits, and one column.
        with_scratch(room, |scratch| unsafe {
            let (rows, scratch) = scratch.split_at_mut(dequantised);
            let (others, logits) = scratch.split_at_mut(step);
            for vs in steps(vocab, step) {
                let e = head.tile(vs.clone(), rows); // (v, d)
                let width = vs.len();
                for cs in steps(0..n, tile) {
                    let ts = columns.start + cs.start..columns.start + cs.end;
                    head.multiply(e, &vs, ts, logits, head.map.scale); // (v, c)
                    head.map.cap(&mut logits[..width * cs.len()]);
                    for (c, l) in cs.clone().zip(logits.chunks_exact(width)) {
                        self.look(&mut part, c, columns.start + c, &vs, l);
                    }
                    let groups = logits.chunks_exact_mut(width * self.group);
                    for (sums, logits) in part.sums[cs].chunks_exact_mut(self.group).zip(groups) {
                        let (first, others) = (vs.start, &mut others[..width]);
                        arch.dispatch(Absorbed { sums, first, logits, others });
                    }
                }
            }
        });
        part
    }

    /// Counts ranks and keeps the likeliest tokens among the logits `l` of the tokens `vs`.
    ///
    /// # Safety
    /// `column` is one of the source's.
    unsafe fn look(&self, part: &mut Part, c: usize, column: usize, vs: &Range<usize>, l: &[f32]) {
        if !self.taken.is_null() {
            // SAFETY: by contract.
            let (taken, logit) =
                unsafe { (*self.taken.add(column) as usize, *self.taken_logits.add(column)) };
            let mut above: u32 = l.iter().map(|&l| (l > logit) as u32).sum();
            if let Some(&own) = taken.checked_sub(vs.start).and_then(|i| l.get(i)) {
                part.sums[c].taken = own;
                above -= (own > logit) as u32; // summed in another order, it is not above itself
            }
            part.sums[c].above += above;
        }
        if self.top_k > 0 {
            keep_best(&mut part.best[c], self.top_k, vs.start, l);
        }
    }

    /// Merges the chunks and writes the results of `columns`.
    ///
    /// # Safety
    /// `columns` lies within the sources, and nobody else writes these results.
    unsafe fn finish(&self, columns: Range<usize>, parts: &[Part]) {
        let width = FIXED + 2 * self.top_k;
        let n = columns.len();
        // SAFETY: by contract; each column has `width` values.
        let out = unsafe {
            std::slice::from_raw_parts_mut(self.out.add(columns.start * width), n * width)
        };
        for (group, out) in out.chunks_exact_mut(width * self.group).enumerate() {
            let first = group * self.group;
            let merged: Vec<Sums> =
                (0..self.group).map(|i| merge(parts, first + i, first + self.group - 1)).collect();
            let last = merged[self.group - 1];
            for (i, (s, out)) in merged.iter().zip(out.chunks_exact_mut(width)).enumerate() {
                let column = first + i;
                let lse = s.max as f64 + s.sum.ln();
                out[0] = (s.sum.ln() - s.weighted / s.sum) as f32;
                out[1] = lse as f32;
                out[2] = s.best as f32;
                out[3] = if self.taken.is_null() { 0.0 } else { (s.taken as f64 - lse) as f32 };
                out[4] = (1 + s.above) as f32;
                out[5] = positive(s.forward / s.sum - s.sum.ln() + last.sum.ln());
                out[6] = positive(s.back / last.sum - last.sum.ln() + s.sum.ln());
                if self.top_k > 0 {
                    let mut best: Vec<(f32, u32)> =
                        parts.iter().flat_map(|p| p.best[column].iter().copied()).collect();
                    best.sort_by(|a, b| b.0.total_cmp(&a.0));
                    let (ids, logprobs) = out[FIXED..].split_at_mut(self.top_k);
                    ids.fill(-1.0); // where logits are NaN
                    logprobs.fill(f32::NAN);
                    for ((id, logprob), (l, v)) in ids.iter_mut().zip(logprobs).zip(best) {
                        (*id, *logprob) = (v as f32, (l as f64 - lse) as f32);
                    }
                }
            }
        }
    }
}

/// Sums of `column`, compared with `other`, over all parts.
fn merge(parts: &[Part], column: usize, other: usize) -> Sums {
    let mut all = NOTHING;
    let mut other_max = f32::NEG_INFINITY;
    for part in parts {
        let s = &part.sums[column];
        if s.max > all.max {
            (all.max, all.best) = (s.max, s.best);
        }
        other_max = other_max.max(part.sums[other].max);
    }
    for part in parts {
        let (s, o) = (&part.sums[column], &part.sums[other]);
        let (up, other_up) = ((all.max - s.max) as f64, (other_max - o.max) as f64);
        all.add(&s.raised(up, other_up, o.sum));
    }
    all
}

/// Divergences are never below 0; what rounding makes of a zero is. NaN stays.
fn positive(kl: f64) -> f32 {
    if kl < 0.0 { 0.0 } else { kl as f32 }
}

/// Keeps the `k` highest of `best` (highest first) and `l`, whose first token is `first`.
fn keep_best(best: &mut Vec<(f32, u32)>, k: usize, first: usize, l: &[f32]) {
    let mut least = if best.len() < k { f32::NEG_INFINITY } else { best[k - 1].0 };
    if best.len() == k && maximum(l) <= least {
        return;
    }
    for (i, &l) in l.iter().enumerate() {
        if l > least {
            let at = best.partition_point(|&(b, _)| b >= l);
            best.insert(at, (l, (first + i) as u32));
            best.truncate(k);
            if best.len() == k {
                least = best[k - 1].0;
            }
        }
    }
}

/// Finds the running maximum anew after the tile `l`, whose first token is `first`.
fn raise(s: &mut Sums, first: usize, l: &[f32]) {
    let max = maximum(l);
    if max > s.max {
        let at = l.iter().position(|&l| l == max).expect("one of them");
        (s.max, s.best) = (max, (first + at) as u32);
    }
}

/// What [`absorb`] takes, for the widest vectors of this processor.
struct Absorbed<'a> {
    sums: &'a mut [Sums],
    first: usize,
    logits: &'a mut [f32],
    others: &'a mut [f32],
}

impl WithSimd for Absorbed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        absorb(self.sums, self.first, self.logits, self.others);
    }
}

/// Takes the logits of a group, column after column, of one vocabulary tile into their sums. `first` is the
/// tile's first token; `others` has room for a column.
#[inline(always)]
fn absorb(sums: &mut [Sums], first: usize, logits: &mut [f32], others: &mut [f32]) {
    let width = others.len();
    let (last, rest) = sums.split_last_mut().expect("a group has a column");
    let (columns, compared) = logits.split_at_mut(width * rest.len());
    let before = *last;
    raise(last, first, compared);
    let known = before.max > f32::NEG_INFINITY;
    let other_up = if known { (last.max - before.max) as f64 } else { 0.0 };
    for (s, l) in rest.iter_mut().zip(columns.chunks_exact(width)) {
        let old = s.max;
        raise(s, first, l);
        if old > f32::NEG_INFINITY && (s.max > old || other_up > 0.0) {
            *s = s.raised((s.max - old) as f64, other_up, before.sum);
        }
    }
    if other_up > 0.0 {
        *last = last.raised(other_up, other_up, before.sum);
    }
    let max = last.max;
    let (mut sum, mut weighted) = ([0f64; 16], [0f64; 16]);
    let (x16, x_rest) = compared.as_chunks_mut::<16>();
    let (e16, e_rest) = others.as_chunks_mut::<16>();
    for (x, e) in x16.iter_mut().zip(e16) {
        for i in 0..16 {
            x[i] -= max;
            e[i] = exp(x[i]);
            // In f64: beside the maximum's own 1, the f32 sum of a peaked distribution would lose the
            // rest, which is all of its entropy.
            sum[i] += e[i] as f64;
            weighted[i] += (e[i] * x[i]) as f64;
        }
    }
    for (i, (x, e)) in x_rest.iter_mut().zip(e_rest).enumerate() {
        *x -= max;
        *e = exp(*x);
        sum[i] += *e as f64;
        weighted[i] += (*e * *x) as f64;
    }
    last.sum += sum.iter().sum::<f64>();
    last.weighted += weighted.iter().sum::<f64>();
    for (s, l) in rest.iter_mut().zip(columns.chunks_exact(width)) {
        absorb_compared(s, l, compared, others);
    }
}

/// One column, compared with another's `x' = l' - max'` and `e^x'`.
#[inline(always)]
fn absorb_compared(s: &mut Sums, l: &[f32], other_x: &[f32], other_e: &[f32]) {
    let max = s.max;
    let mut lanes = [[0f64; 16]; 4]; // sum, weighted, forward, back
    let mut take = |i: usize, l: f32, other_x: f32, other_e: f32| {
        let x = l - max;
        let e = exp(x);
        let d = x - other_x;
        lanes[0][i] += e as f64;
        lanes[1][i] += (e * x) as f64;
        lanes[2][i] += (e * d) as f64;
        lanes[3][i] -= (other_e * d) as f64;
    };
    let (l16, l_rest) = l.as_chunks::<16>();
    let (x16, x_rest) = other_x.as_chunks::<16>();
    let (e16, e_rest) = other_e.as_chunks::<16>();
    for ((l, x), e) in l16.iter().zip(x16).zip(e16) {
        for i in 0..16 {
            take(i, l[i], x[i], e[i]);
        }
    }
    for (i, ((&l, &x), &e)) in l_rest.iter().zip(x_rest).zip(e_rest).enumerate() {
        take(i, l, x, e);
    }
    let [sum, weighted, forward, back] = lanes.map(|lane| lane.iter().sum::<f64>());
    s.sum += sum;
    s.weighted += weighted;
    s.forward += forward;
    s.back += back;
}

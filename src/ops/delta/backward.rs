//! Cotangents of q, k, v, a and b.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::chunks::{CHUNK, Chunk};
use super::work::{
    Gates, Job, Keys, LD, Triangles, View, product, rows, scaled, solve, solve_back, take, turned,
};
use crate::ops::gemm::with_scratch;
use crate::ops::rows::dot;

pub(super) unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `delta_back` made this node: after the forward's sources come its result and d_out; dst holds d qkv,
    // d alpha, d beta.
    let back = unsafe {
        let job = Job::new(dst, userdata);
        let source = |i: usize| (*(*dst).src[i]).data as *const f32;
        let (d_qkv, gates) = ((*dst).data.cast::<f32>(), job.n_v * job.t);
        let d_alpha = d_qkv.add(job.n_heads() * job.size * job.t);
        let states = source(5).add(job.n_v * job.size * job.t);
        Back { d_out: source(6), states, d_qkv, d_alpha, d_beta: d_alpha.add(gates), job }
    };
    let (n_k, trees) = (back.job.n_k, back.job.trees);
    back.job.units.each(trees.len() * n_k, nth, |unit| {
        // SAFETY: tree and head lie within the tensors; no other thread has this unit.
        unsafe { back.tree(&trees[unit / n_k], unit % n_k) };
    });
}

struct Back<'k> {
    job: Job<'k>,
    states: *const f32,
    d_out: *const f32,
    d_qkv: *mut f32,
    d_alpha: *mut f32,
    d_beta: *mut f32,
}

/// Scratch memory of a value head, and the sums over the value heads of a key head. Rows every [`Job::stride`] floats,
/// those of triangles every [`LD`].
struct Scratch<'s> {
    triangles: Triangles<'s>,
    z: &'s mut [f32],
    u: &'s mut [f32],
    d_o: &'s mut [f32],
    /// D
    c: &'s mut [f32],
    dz: &'s mut [f32],
    /// Rows with decays.
    decayed: &'s mut [f32],
    /// Rows times a state.
    mixed: &'s mut [f32],
    dq: &'s mut [f32],
    dk: &'s mut [f32],
    /// dA and dM, then both times e.
    da: &'s mut [f32],
    dm: &'s mut [f32],
}

/// What a value head of a chunk of `n` tokens is made of.
struct Given<'c> {
    keys: &'c Keys<'c>,
    gates: Gates,
    /// The state that it finds.
    before: Option<&'c [f32]>,
    n: usize,
}

/// Cotangents of the states that a value head's chunks hand on.
struct States<'s> {
    /// Of the state after the chunk, then of that before it.
    own: &'s mut [f32],
    /// Of the state after the prompt: the sum over the completions.
    prompt: &'s mut [f32],
}

impl<'s> Scratch<'s> {
    fn floats(job: &Job<'_>) -> usize {
        Triangles::floats() + CHUNK * (9 * job.stride() + 2 * LD)
    }

    fn new(job: &Job<'_>, rest: &mut &'s mut [f32]) -> Scratch<'s> {
        let triangles = Triangles::new(rest);
        let mut packed = || take(rest, CHUNK * job.stride());
        let [z, u, d_o, c, dz] = [packed(), packed(), packed(), packed(), packed()];
        let [decayed, mixed, dq, dk] = [packed(), packed(), packed(), packed()];
        let mut triangle = || take(rest, CHUNK * LD);
        let (da, dm) = (triangle(), triangle());
        Scratch { triangles, z, u, d_o, c, dz, decayed, mixed, dq, dk, da, dm }
    }
}

impl Back<'_> {
    /// Everything of one key head in one tree, from its last chunk to its first.
    ///
    /// # Safety
    /// The chunks lie within the tensors, and no other thread works on this head of this tree.
    unsafe fn tree(&self, chunks: &[Chunk], key_head: usize) {
        let job = &self.job;
        let heads: Vec<usize> = job.value_heads(key_head).collect();
        let floats = Keys::floats(job) + Scratch::floats(job) + 2 * heads.len() * job.state_len();
        with_scratch(floats, |mut rest| {
            let mut keys = Keys::new(job, &mut rest);
            let mut scratch = Scratch::new(job, &mut rest);
            let mut states: Vec<States> = heads
                .iter()
                .map(|_| States {
                    own: take(&mut rest, job.state_len()),
                    prompt: take(&mut rest, job.state_len()),
                })
                .collect();
            states.iter_mut().for_each(|state| state.prompt.fill(0.0));
            for (i, chunk) in chunks.iter().enumerate().rev() {
                let n = chunk.tokens.len();
                // The last chunk of a prompt leaves its state to completions.
                let to_all = chunks.get(i + 1).is_some_and(|next| next.is_first);
                // SAFETY: by contract.
                unsafe { keys.fill(job, chunk.tokens.clone(), key_head) };
                scratch.dq[..n * job.stride()].fill(0.0);
                scratch.dk[..n * job.stride()].fill(0.0);
                for (&head, states) in heads.iter().zip(&mut states) {
                    if chunk.after.is_some() && to_all {
                        states.own.copy_from_slice(states.prompt);
                    }
                    // SAFETY: by contract.
                    unsafe { self.chunk(chunk, head, &keys, &mut scratch, states) };
                }
                // SAFETY: by contract.
                unsafe { self.store_keys(chunk, key_head, &keys, &scratch) };
            }
        });
    }

    /// The state of this number, of a value head.
    ///
    /// # Safety
    /// Both lie within the forward's result.
    unsafe fn state(&self, number: usize, head: usize) -> &[f32] {
        let len = self.job.state_len();
        // SAFETY: by contract.
        unsafe {
            let at = self.states.add((number * self.job.n_v + head) * len);
            std::slice::from_raw_parts(at, len)
        }
    }

    /// One value head of a chunk: its dv, d alpha and d beta, and what it adds to dq, dk and to the cotangents of states.
    ///
    /// # Safety
    /// As [`Back::tree`].
    unsafe fn chunk(
        &self,
        chunk: &Chunk,
        head: usize,
        keys: &Keys<'_>,
        s: &mut Scratch<'_>,
        states: &mut States<'_>,
    ) {
        let job = &self.job;
        let (n, d, ld) = (chunk.tokens.len(), job.size, job.stride());
        let size = [n, d, ld];
        // SAFETY: by contract.
        let given = unsafe {
            let before = chunk.before.map(|number| self.state(number, head));
            Given { keys, gates: job.gates(chunk.tokens.clone(), head), before, n }
        };
        let Given { gates, before, .. } = &given;
        s.triangles.fill(keys, gates, n);
        let packed = s.z.chunks_mut(ld).zip(s.d_o.chunks_mut(ld)).zip(chunk.tokens.clone());
        for ((z, d_o), token) in packed {
            // SAFETY: by contract.
            unsafe {
                z[..d].copy_from_slice(job.row(token, 2 * job.n_k + head));
                let at = self.d_out.add((token * job.n_v + head) * d);
                d_o[..d].copy_from_slice(std::slice::from_raw_parts(at, d));
            }
        }
        // Z and U again.
        if let Some(before) = *before {
            scaled(keys.k, &gates.since, s.decayed, size);
            product([n, d, d], (s.z, ld), true, rows(s.decayed, ld), rows(before, d), -1.0);
        }
        solve(s.triangles.a, &gates.beta, (s.z, s.u), size);
        // D and dZ.
        product([n, d, n], (s.c, ld), false, turned(s.triangles.m, LD), rows(s.d_o, ld), 1.0);
        let after = chunk.after.is_some();
        if after {
            scaled(keys.k, &gates.until, s.decayed, size);
            product([n, d, d], (s.c, ld), true, rows(s.decayed, ld), rows(states.own, d), 1.0);
        }
        solve_back(s.triangles.a, &gates.beta, (s.c, s.dz), size);
        // SAFETY: by contract.
        unsafe { self.store_values(chunk, head, s) };
        let mut d_sum = [0.0; CHUNK];
        self.triangles_back(&given, s, &mut d_sum);
        if after {
            self.after_back(&given, s, states, &mut d_sum);
        }
        if let Some(before) = given.before {
            self.before_back(&given, before, s, &mut d_sum);
            self.state_back(&given, s, states, after);
            if chunk.is_first {
                let sum = states.prompt.iter_mut().zip(states.own.iter());
                sum.for_each(|(sum, d)| *sum += d);
            }
        }
        // SAFETY: by contract.
        unsafe { self.store_gates(chunk, head, &given.gates, s, &d_sum) };
    }

    /// What the triangles A and M hand on to Q, K and G.
    fn triangles_back(&self, given: &Given<'_>, s: &mut Scratch<'_>, d_sum: &mut [f64; CHUNK]) {
        let (d, ld) = (self.job.size, self.job.stride());
        let Given { keys, n, .. } = *given;
        let u = turned(s.u, ld);
        product([n, n, d], (s.da, LD), false, rows(s.dz, ld), u, -1.0);
        product([n, n, d], (s.dm, LD), false, rows(s.d_o, ld), u, 1.0);
        for t in 0..n {
            let at = t * LD..t * LD + n;
            let (da, dm) = (&mut s.da[at.clone()], &mut s.dm[at.clone()]);
            let Triangles { a, m, e } = &s.triangles;
            let (a, m, e) = (&a[at.clone()], &m[at.clone()], &e[at]);
            let mut row = 0.0;
            for i in 0..t {
                let moved = (da[i] * a[i]) as f64 + (dm[i] * m[i]) as f64;
                d_sum[i] -= moved;
                row += moved;
            }
            d_sum[t] += row;
            for i in 0..n {
                da[i] *= e[i];
                dm[i] *= e[i];
            }
            da[t] = 0.0;
        }
        let (da, dm): (&[f32], &[f32]) = (s.da, s.dm);
        let (q, k) = (rows(keys.q, ld), rows(keys.k, ld));
        let add = |to: &mut [f32], by: View<'_>, x: View<'_>| {
            product([n, d, n], (to, ld), true, by, x, 1.0);
        };
        add(s.dq, rows(dm, LD), k);
        add(s.dk, turned(dm, LD), q);
        add(s.dk, rows(da, LD), k);
        add(s.dk, turned(da, LD), k);
    }

    /// What the state after the chunk hands on to K and G: `diag(e_n) U dS^T`.
    fn after_back(
        &self,
        given: &Given<'_>,
        s: &mut Scratch<'_>,
        states: &States<'_>,
        d_sum: &mut [f64; CHUNK],
    ) {
        let (d, ld) = (self.job.size, self.job.stride());
        let &Given { keys, ref gates, before, n } = given;
        scaled(s.u, &gates.until, s.decayed, [n, d, ld]);
        let d_state = turned(states.own, d);
        product([n, d, d], (s.mixed, ld), false, rows(s.decayed, ld), d_state, 1.0);
        let mut last = 0.0;
        for (t, d_sum) in d_sum.iter_mut().enumerate().take(n) {
            let mixed = &s.mixed[t * ld..][..d];
            let moved = dot(mixed, &keys.k[t * ld..][..d]) as f64;
            last += moved;
            *d_sum -= moved;
            s.dk[t * ld..][..d].iter_mut().zip(mixed).for_each(|(dk, x)| *dk += x);
        }
        if let Some(before) = before {
            last += (gates.since[n - 1] * dot(states.own, before)) as f64;
        }
        d_sum[n - 1] += last;
    }

    /// What the state before the chunk hands on to Q, K and G: `diag(e^G) dO S^T` and `- diag(e^G) dZ S^T`.
    fn before_back(
        &self,
        given: &Given<'_>,
        before: &[f32],
        s: &mut Scratch<'_>,
        d_sum: &mut [f64; CHUNK],
    ) {
        let (d, ld) = (self.job.size, self.job.stride());
        let &Given { keys, ref gates, n, .. } = given;
        let parts = [(&*s.d_o, &*keys.q, &mut *s.dq, 1.0), (&*s.dz, &*keys.k, &mut *s.dk, -1.0)];
        for (from, x, dx, sign) in parts {
            scaled(from, &gates.since, s.decayed, [n, d, ld]);
            let state = turned(before, d);
            product([n, d, d], (s.mixed, ld), false, rows(s.decayed, ld), state, sign);
            for (t, d_sum) in d_sum.iter_mut().enumerate().take(n) {
                let mixed = &s.mixed[t * ld..][..d];
                *d_sum += dot(mixed, &x[t * ld..][..d]) as f64;
                dx[t * ld..][..d].iter_mut().zip(mixed).for_each(|(dx, x)| *dx += x);
            }
        }
    }

    /// The cotangent of the state before the chunk, from that of the one after it, if there is one.
    fn state_back(
        &self,
        given: &Given<'_>,
        s: &mut Scratch<'_>,
        states: &mut States<'_>,
        after: bool,
    ) {
        let (d, ld) = (self.job.size, self.job.stride());
        let &Given { keys, ref gates, n, .. } = given;
        let decay = gates.since[n - 1];
        states.own.iter_mut().for_each(|x| *x *= decay);
        for (x, dx, keep, sign) in [(&*keys.q, &*s.d_o, after, 1.0), (&*keys.k, &*s.dz, true, -1.0)]
        {
            scaled(x, &gates.since, s.decayed, [n, d, ld]);
            let x = turned(s.decayed, ld);
            product([d, d, n], (states.own, d), keep, x, rows(dx, ld), sign);
        }
    }

    /// dv of a value head.
    ///
    /// # Safety
    /// As [`Back::tree`].
    unsafe fn store_values(&self, chunk: &Chunk, head: usize, s: &Scratch<'_>) {
        let (d, ld) = (self.job.size, self.job.stride());
        for (token, dz) in chunk.tokens.clone().zip(s.dz.chunks(ld)) {
            // SAFETY: by contract.
            unsafe { self.row_mut(token, 2 * self.job.n_k + head) }.copy_from_slice(&dz[..d]);
        }
    }

    /// The row of a token in one of the heads of d qkv.
    ///
    /// # Safety
    /// Both lie within the tensor, and nobody else has this row.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row_mut(&self, token: usize, head: usize) -> &mut [f32] {
        // SAFETY: by contract.
        unsafe {
            let at = self.d_qkv.add((token * self.job.n_heads() + head) * self.job.size);
            std::slice::from_raw_parts_mut(at, self.job.size)
        }
    }

    /// d alpha and d beta of a value head.
    ///
    /// # Safety
    /// As [`Back::tree`].
    unsafe fn store_gates(
        &self,
        chunk: &Chunk,
        head: usize,
        gates: &Gates,
        s: &Scratch<'_>,
        d_sum: &[f64; CHUNK],
    ) {
        let (d, ld) = (self.job.size, self.job.stride());
        let mut d_g = 0.0;
        for (t, token) in chunk.tokens.clone().enumerate().rev() {
            d_g += d_sum[t];
            let d_beta = dot(&s.c[t * ld..][..d], &s.z[t * ld..][..d]);
            // SAFETY: by contract.
            unsafe {
                let at = token * self.job.n_v + head;
                *self.d_alpha.add(at) = d_g as f32 * gates.slope[t];
                *self.d_beta.add(at) = d_beta * gates.beta[t] * gates.rest[t];
            }
        }
    }

    /// dq and dk of a key head: through the norms.
    ///
    /// # Safety
    /// As [`Back::tree`].
    unsafe fn store_keys(&self, chunk: &Chunk, head: usize, keys: &Keys<'_>, s: &Scratch<'_>) {
        let (d, ld) = (self.job.size, self.job.stride());
        let parts = [
            (head, &keys.q_inverse, &*s.dq, self.job.query_length()),
            (self.job.n_k + head, &keys.k_inverse, &*s.dk, 1.0),
        ];
        for (head, inverse, d_normed, length) in parts {
            for ((token, d_normed), r) in chunk.tokens.clone().zip(d_normed.chunks(ld)).zip(inverse)
            {
                // SAFETY: by contract.
                let (x, dx) = unsafe { (self.job.row(token, head), self.row_mut(token, head)) };
                let along = r * r * dot(x, &d_normed[..d]);
                for ((dx, x), d) in dx.iter_mut().zip(x).zip(d_normed) {
                    *dx = length * r * (d - along * x);
                }
            }
        }
    }
}

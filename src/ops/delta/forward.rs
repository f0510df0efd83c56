//! `o` and the states between chunks.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::chunks::{CHUNK, Chunk};
use super::work::{Job, Keys, LD, Triangles, product, rows, scaled, solve, take, turned};
use crate::ops::gemm::with_scratch;

pub(super) unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `delta` made this node: dst holds o, then the states.
    let forward = unsafe {
        let (job, out) = (Job::new(dst, userdata), (*dst).data.cast::<f32>());
        let states = out.add(job.n_v * job.size * job.t);
        Forward { job, out, states }
    };
    let (n_k, trees) = (forward.job.n_k, forward.job.trees);
    forward.job.units.each(trees.len() * n_k, nth, |unit| {
        // SAFETY: tree and head lie within the tensors; no other thread has this unit.
        unsafe { forward.tree(&trees[unit / n_k], unit % n_k) };
    });
}

struct Forward<'k> {
    job: Job<'k>,
    out: *mut f32,
    states: *mut f32,
}

/// A value head's scratch memory: rows every [`Job::stride`] floats.
struct Scratch<'s> {
    triangles: Triangles<'s>,
    z: &'s mut [f32],
    u: &'s mut [f32],
    /// Q or K with decays.
    decayed: &'s mut [f32],
    o: &'s mut [f32],
}

impl Forward<'_> {
    /// Everything of one key head in one tree.
    ///
    /// # Safety
    /// The chunks lie within the tensors, and no other thread works on this head of this tree.
    unsafe fn tree(&self, chunks: &[Chunk], key_head: usize) {
        let job = &self.job;
        let packed = CHUNK * job.stride();
        with_scratch(Keys::floats(job) + Triangles::floats() + 4 * packed, |mut rest| {
            let mut keys = Keys::new(job, &mut rest);
            let mut scratch = Scratch {
                triangles: Triangles::new(&mut rest),
                z: take(&mut rest, packed),
                u: take(&mut rest, packed),
                decayed: take(&mut rest, packed),
                o: take(&mut rest, packed),
            };
            for chunk in chunks {
                // SAFETY: by contract.
                unsafe {
                    keys.fill(job, chunk.tokens.clone(), key_head);
                    for head in job.value_heads(key_head) {
                        self.chunk(chunk, head, &keys, &mut scratch);
                    }
                }
            }
        });
    }

    /// The state of this number, of a value head.
    fn state(&self, number: usize, head: usize) -> *mut f32 {
        // SAFETY: states of this number and head lie within dst.
        unsafe { self.states.add((number * self.job.n_v + head) * self.job.state_len()) }
    }

    /// One value head of a chunk.
    ///
    /// # Safety
    /// As [`Forward::tree`].
    unsafe fn chunk(&self, chunk: &Chunk, head: usize, keys: &Keys<'_>, s: &mut Scratch<'_>) {
        let job = &self.job;
        let (n, d, ld) = (chunk.tokens.len(), job.size, job.stride());
        let size = [n, d, ld];
        // SAFETY: by contract; a state that is found was written before, by this thread.
        let (gates, before) = unsafe {
            let state = |at| std::slice::from_raw_parts(self.state(at, head), job.state_len());
            (job.gates(chunk.tokens.clone(), head), chunk.before.map(state))
        };
        s.triangles.fill(keys, &gates, n);
        for (z, token) in s.z.chunks_mut(ld).zip(chunk.tokens.clone()) {
            // SAFETY: by contract.
            z[..d].copy_from_slice(unsafe { job.row(token, 2 * job.n_k + head) });
        }
        if let Some(before) = before {
            scaled(keys.k, &gates.since, s.decayed, size);
            product([n, d, d], (s.z, ld), true, rows(s.decayed, ld), rows(before, d), -1.0);
        }
        solve(s.triangles.a, &gates.beta, (s.z, s.u), size);
        if let Some(before) = before {
            scaled(keys.q, &gates.since, s.decayed, size);
            product([n, d, d], (s.o, ld), false, rows(s.decayed, ld), rows(before, d), 1.0);
        }
        let m = rows(s.triangles.m, LD);
        product([n, d, n], (s.o, ld), before.is_some(), m, rows(s.u, ld), 1.0);
        for (o, token) in s.o.chunks(ld).zip(chunk.tokens.clone()) {
            // SAFETY: by contract; the row is this head's.
            unsafe {
                let at = self.out.add((token * job.n_v + head) * d);
                std::slice::from_raw_parts_mut(at, d).copy_from_slice(&o[..d]);
            }
        }
        let Some(after) = chunk.after else { return };
        // SAFETY: by contract; nobody else has this state, which is not the one before.
        let after =
            unsafe { std::slice::from_raw_parts_mut(self.state(after, head), job.state_len()) };
        if let Some(before) = before {
            let decay = gates.since[n - 1];
            after.iter_mut().zip(before).for_each(|(after, before)| *after = decay * before);
        }
        scaled(keys.k, &gates.until, s.decayed, size);
        let k = turned(s.decayed, ld);
        product([d, d, n], (after, d), before.is_some(), k, rows(s.u, ld), 1.0);
    }
}

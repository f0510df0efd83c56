//! Which experts the tokens of a decode take: read from llama.cpp's graph as it is computed, by the scheduler's callback
//! for that.
//!
//! The choice stands in the nodes `ffn_moe_argsort-N`: `[E, T]`, the first of each row the chosen ones. Which token a row
//! is of follows from inputs of the same graph, by llama.cpp's names: the cells of the memory that keys go to, which tell
//! the sequence, and the positions; in the last layer, where only tokens whose logits are wanted are computed, which these
//! are.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};

use ggml_sys as sys;

/// Experts of one token, layer after layer, `used` each and ascending; -1 where the layer did not compute the token.
pub type TokenExperts = Vec<i16>;

/// Reads the choices of one context's decodes.
pub(super) struct Recorder {
    n_layer: usize,
    used: usize,
    // Cells of one sequence.
    n_cells: usize,
    // Of the graph at work.
    cells: Vec<i64>,
    positions: Vec<i32>,
    outputs: Vec<i32>,
    // (layer from 0, rows, chosen experts of each row)
    found: Vec<(usize, usize, Vec<i32>)>,
    // By sequence and position.
    taken: HashMap<(i32, i32), TokenExperts>,
}

impl Recorder {
    pub(super) fn new(n_layer: usize, used: usize, n_cells: usize) -> Recorder {
        Recorder {
            n_layer,
            used,
            n_cells,
            cells: Vec::new(),
            positions: Vec::new(),
            outputs: Vec::new(),
            found: Vec::new(),
            taken: HashMap::new(),
        }
    }

    /// Forgets the last decode.
    pub(super) fn begin(&mut self) {
        self.taken.clear();
        self.reset();
    }

    fn reset(&mut self) {
        self.cells.clear();
        self.positions.clear();
        self.outputs.clear();
        self.found.clear();
    }

    /// What the last decode's token at this position of a sequence took.
    pub(super) fn of(&self, sequence: i32, position: i32) -> Option<&TokenExperts> {
        self.taken.get(&(sequence, position))
    }

    /// Gives what was found to the graph's tokens, which are known now.
    pub(super) fn flush(&mut self) {
        if self.positions.len() < self.cells.len() {
            return self.reset(); // inputs under other names: nothing is known
        }
        let sequence = |cell: &i64| (*cell as usize / self.n_cells) as i32;
        let places = self.cells.iter().map(sequence).zip(self.positions.iter().copied());
        let places: Vec<(i32, i32)> = places.collect();
        for place in &places {
            // The last layer alone may leave tokens out, also where it is the only one.
            let none = || vec![-1; self.n_layer * self.used];
            self.taken.entry(*place).or_insert_with(none);
        }
        for (layer, rows, experts) in &self.found {
            for (row, chosen) in experts.chunks_exact(self.used).enumerate() {
                let output = || self.outputs.get(row).map(|&token| token as usize);
                let token = if *rows == places.len() { Some(row) } else { output() };
                let place = token.and_then(|token| places.get(token));
                let Some(own) = place.and_then(|place| self.taken.get_mut(place)) else { continue };
                let own = &mut own[layer * self.used..][..self.used];
                own.iter_mut().zip(chosen).for_each(|(to, expert)| *to = *expert as i16);
                own.sort();
            }
        }
        self.reset();
    }

    /// # Safety
    /// `t` is a live node whose inputs hold data, and whose own is computed unless `ask`.
    unsafe fn look(&mut self, t: *const sys::ggml_tensor, ask: bool) -> bool {
        // SAFETY: by contract; names end with NUL.
        unsafe {
            let name = CStr::from_ptr((*t).name.as_ptr()).to_bytes();
            let layer = name.strip_prefix(b"ffn_moe_argsort-");
            if ask {
                self.inputs(t);
                return layer.is_some();
            }
            let number = layer.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            let Some(layer) = number.filter(|&layer: &usize| layer < self.n_layer) else {
                return true;
            };
            let (width, rows) = ((*t).ne[0] as usize, (*t).ne[1] as usize);
            let all: Vec<i32> = read(t, width * rows);
            let chosen = all.chunks(width).flat_map(|row| row[..self.used].to_vec()).collect();
            self.found.push((layer, rows, chosen));
            if layer + 1 == self.n_layer {
                self.flush();
            }
            true
        }
    }

    /// Keeps the inputs that tell tokens apart, once a graph.
    ///
    /// # Safety
    /// As [`Recorder::look`].
    unsafe fn inputs(&mut self, t: *const sys::ggml_tensor) {
        // SAFETY: by contract; a source that is not null is a live tensor, whose name ends with NUL.
        unsafe {
            let input = (*t).src[1];
            if input.is_null() || (*input).op != sys::GGML_OP_NONE {
                return;
            }
            let n = sys::ggml_nelements(input) as usize;
            match CStr::from_ptr((*input).name.as_ptr()).to_bytes() {
                b"attn_inp_k_idxs" if self.cells.is_empty() => self.cells = read(input, n),
                b"inp_pos" if self.positions.is_empty() => self.positions = read(input, n),
                b"out_ids" if self.outputs.is_empty() => self.outputs = read(input, n),
                _ => {}
            }
        }
    }
}

/// # Safety
/// A live tensor with data of at least `n` such elements.
unsafe fn read<T: Copy + Default>(t: *const sys::ggml_tensor, n: usize) -> Vec<T> {
    let mut out = vec![T::default(); n];
    // SAFETY: by contract; `out` has as many bytes.
    unsafe {
        sys::ggml_backend_tensor_get(t, out.as_mut_ptr().cast(), 0, n * size_of::<T>());
    }
    out
}

/// `ggml_backend_sched_eval_callback`; `user` is a [`Recorder`] that lives as long as the context.
pub(super) unsafe extern "C" fn callback(
    t: *mut sys::ggml_tensor,
    ask: bool,
    user: *mut c_void,
) -> bool {
    // SAFETY: llama.cpp calls it while `Context::decode` waits, with the node and the pointer that it was given.
    unsafe { (*user.cast::<Recorder>()).look(t, ask) }
}

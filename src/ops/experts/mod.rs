//! Linear maps of a mixture of experts: stacked weights of any GGUF type, multiplied by the tokens that chose each
//! expert; forward and vjp.
//!
//! Every token chooses `used` of `E` experts ([`route`]); a choice is a *slot*, S = used T of them. [`route_order`]
//! sorts them by expert, then by token; "slot p" below is one in that order, `e(p)` its expert, `t(p)` its token and
//! `w(p)` its weight. With `x(p)` the input's column p, or t(p) where columns are tokens ([`Columns`]):
//!
//! ```text
//! experts           y[n, p]  = sum_k W_e[k, n] x[k, x(p)] + scale sum_r B_e[r, n] u[r, p] + bias_e[n]
//! experts_sum       y[n, t]  = sum_(p of t) w(p) (what experts gives at p)
//! experts_back      dx[k, p] = sum_n W_e[k, n] dy[n, x(p)] + scale sum_r A_e[k, r] du[r, p]
//! experts_back_sum  dx[k, t] = add[k, t] + sum_(p of t) (what experts_back gives at p)
//! experts_outer     g[k, n, e] += scale sum_(p of e) x[k, x(p)] dy[n, x(p)]
//! ```
//!
//! A tile of an expert's rows is dequantised once per call, and only where a token chose the expert. Threads take from
//! a queue: an expert's tile of outputs where columns are slots; where they are summed up by token, a range of outputs of
//! all experts, one after another. Tiles and the order of sums depend neither on the number of threads nor on where in
//! the batch a token stands.

mod outer;
mod product;
mod route;
mod weights;

pub use outer::experts_outer;
pub use product::{experts, experts_back, experts_back_sum, experts_sum};
pub use route::{Gating, RouteSpec, route, route_back, route_order};
pub use weights::{slot_weights, weights_back};

use ggml_sys as sys;

use crate::ggml::{Tensor, Type};

/// What a column of an input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// A token: `[n, T]`.
    Tokens,
    /// A slot, in sorted order: `[n, S]`.
    Slots,
}

/// Who goes where: what [`route_order`] made of the chosen experts.
#[derive(Clone, Copy)]
pub struct Routes<'a> {
    /// `[2 S + E + 1]`: of each sorted slot its place `k + used t` in `[used, T]`; where each expert's slots begin, and S;
    /// of each place its sorted slot. Whole numbers in F32, which has those below 2^24.
    pub order: Tensor<'a>,
    /// E.
    pub n_expert: usize,
    /// Experts of a token.
    pub used: usize,
    /// T.
    pub tokens: usize,
}

impl Routes<'_> {
    /// S.
    pub fn slots(&self) -> usize {
        self.used * self.tokens
    }

    fn columns(&self, of: Columns) -> usize {
        match of {
            Columns::Tokens => self.tokens,
            Columns::Slots => self.slots(),
        }
    }

    fn check(&self) {
        f32_shape("routes", self.order, [2 * self.slots() + self.n_expert + 1, 1, 1]);
    }
}

fn f32_shape(what: &str, t: Tensor<'_>, shape: [usize; 3]) {
    assert!(t.ty() == Type::F32 && t.is_contiguous(), "{what}: F32 and contiguous, got {t:?}");
    assert_eq!(t.shape(), [shape[0], shape[1], shape[2], 1], "{what}: {t:?}");
}

/// [`Routes`] as the kernels read them.
struct Order<'k> {
    places: &'k [f32],
    begins: &'k [f32],
    slots: &'k [f32],
    used: usize,
}

impl<'k> Order<'k> {
    /// # Safety
    /// `tensor` is a live F32 tensor of [`Routes::order`]'s form in host memory for all of `'k`.
    unsafe fn new(tensor: *const sys::ggml_tensor, n_expert: usize, used: usize) -> Order<'k> {
        // SAFETY: by contract.
        let all = unsafe {
            std::slice::from_raw_parts((*tensor).data as *const f32, (*tensor).ne[0] as usize)
        };
        let s = (all.len() - n_expert - 1) / 2;
        let (places, rest) = all.split_at(s);
        let (begins, slots) = rest.split_at(n_expert + 1);
        Order { places, begins, slots, used }
    }

    /// The token of sorted slot `p`.
    fn token(&self, p: usize) -> usize {
        self.place(p) / self.used
    }

    /// The place in `[used, T]` of sorted slot `p`.
    fn place(&self, p: usize) -> usize {
        self.places[p] as usize
    }

    /// The sorted slot of a place in `[used, T]`.
    fn slot(&self, place: usize) -> usize {
        self.slots[place] as usize
    }

    /// The expert of sorted slot `p`.
    fn expert(&self, p: usize) -> usize {
        self.begins.partition_point(|&begin| begin as usize <= p) - 1
    }

    /// The slots of an expert.
    fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.begins[expert] as usize..self.begins[expert + 1] as usize
    }

    /// Experts that a token chose.
    fn chosen(&self) -> Vec<usize> {
        (0..self.begins.len() - 1).filter(|&e| !self.of(e).is_empty()).collect()
    }

    /// The largest number of slots that an expert has.
    fn most(&self) -> usize {
        (0..self.begins.len() - 1).map(|e| self.of(e).len()).max().unwrap_or(0)
    }
}

//! Which experts a token takes, and with what weights; and the vjp by the router's logits.
//!
//! With logits `z[e]` of a token, chosen experts C (the `used` largest of what they are chosen by, the lower of equals):
//!
//! ```text
//! Softmax   p = softmax(z)      chosen by p + bias     w_e = p_e, or p_e / max(sum_(j in C) p_j, 2^-14)
//! Sigmoid   p = 1 / (1 + e^-z)  chosen by p + bias     as above
//! Chosen    chosen by z                                w = softmax of z over C alone
//! ```
//!
//! times a scale. The floor of the sum is the least normal F16, as llama.cpp has it (`build_moe_ffn`). A choice has no
//! gradient, its weight has one.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::f32_shape;
use crate::ggml::{Arena, Tensor};
use crate::ops::rows::{partition, source_rows};

/// From logits to probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
    /// Softmax over the chosen ones alone.
    Chosen,
}

/// How tokens are sent to experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteSpec {
    /// Experts of a token, 1 to E.
    pub used: usize,
    /// From logits to probabilities.
    pub gating: Gating,
    /// Whether the chosen ones' probabilities are divided by their sum.
    pub normalise: bool,
    /// Factor of the weights.
    pub scale: f32,
}

/// The least that weights are divided by.
const FLOOR: f32 = 6.103_515_6e-5;

fn params(op: u32, spec: RouteSpec, bias: bool, given: bool) -> sys::bupo_route_params {
    let gating = match spec.gating {
        Gating::Softmax => sys::BUPO_GATING_SOFTMAX,
        Gating::Sigmoid => sys::BUPO_GATING_SIGMOID,
        Gating::Chosen => sys::BUPO_GATING_CHOSEN,
    };
    sys::bupo_route_params {
        op,
        used: spec.used as u32,
        gating,
        normalise: spec.normalise as u32,
        scale: spec.scale,
        bias: bias as u32,
        given: given as u32,
    }
}

/// Weights and experts, each `[used, T]`, of router logits `[E, T]`. Experts are whole numbers in F32, ascending in each
/// token. `bias: [E]` is added for the choice alone. `given: [used, T]` are experts to take instead, ascending; a token
/// whose first is negative chooses by itself.
pub fn route<'a>(
    arena: &'a Arena,
    logits: Tensor<'a>,
    spec: RouteSpec,
    bias: Option<Tensor<'a>>,
    given: Option<Tensor<'a>>,
) -> (Tensor<'a>, Tensor<'a>) {
    let [e, t, ..] = logits.shape();
    f32_shape("route logits", logits, [e, t, 1]);
    assert!((1..=e).contains(&spec.used), "{spec:?} of {e} experts");
    let mut sources = vec![logits];
    if let Some(bias) = bias {
        f32_shape("route bias", bias, [e, 1, 1]);
        sources.push(bias);
    }
    if let Some(given) = given {
        f32_shape("route given", given, [spec.used, t, 1]);
        sources.push(given);
    }
    let params = params(sys::BUPO_OP_ROUTE, spec, bias.is_some(), given.is_some());
    // One node writes both: rows [0, T) are weights, [T, 2 T) experts.
    let both = arena.custom([spec.used, 2 * t, 1, 1], &sources, route_kernel, params);
    (arena.row_range(both, 0, t), arena.row_range(both, t, t))
}

/// Cotangent of the logits, `[E, T]`, from that of the weights, `[used, T]`.
pub fn route_back<'a>(
    arena: &'a Arena,
    logits: Tensor<'a>,
    experts: Tensor<'a>,
    d_weights: Tensor<'a>,
    spec: RouteSpec,
) -> Tensor<'a> {
    let [e, t, ..] = logits.shape();
    f32_shape("route_back logits", logits, [e, t, 1]);
    f32_shape("route_back experts", experts, [spec.used, t, 1]);
    f32_shape("route_back d_weights", d_weights, [spec.used, t, 1]);
    let params = params(sys::BUPO_OP_ROUTE_BACK, spec, false, false);
    arena.custom(logits.shape(), &[logits, experts, d_weights], back_kernel, params)
}

/// The slots of chosen experts `[used, T]` of `n_expert`, sorted by expert, then by token: see [`super::Routes::order`].
pub fn route_order<'a>(arena: &'a Arena, experts: Tensor<'a>, n_expert: usize) -> Tensor<'a> {
    let [used, t, ..] = experts.shape();
    f32_shape("route_order experts", experts, [used, t, 1]);
    assert!(used * t < 1 << 24, "{used} experts of {t} tokens are more slots than F32 counts");
    let params = sys::bupo_order_params { op: sys::BUPO_OP_ROUTE_ORDER, n_expert: n_expert as u32 };
    arena.custom([2 * used * t + n_expert + 1, 1, 1, 1], &[experts], order_kernel, params)
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    x.iter_mut().for_each(|x| *x /= sum);
}

/// Probabilities of all experts; of gating Chosen the logits themselves.
fn probabilities(params: &sys::bupo_route_params, logits: &[f32], p: &mut [f32]) {
    p.copy_from_slice(logits);
    match params.gating {
        sys::BUPO_GATING_SOFTMAX => softmax(p),
        sys::BUPO_GATING_SIGMOID => p.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        _ => {}
    }
}

/// Weights of the chosen ones from their probabilities, in place, without the scale; gives what they were divided by.
fn weigh(params: &sys::bupo_route_params, w: &mut [f32]) -> f32 {
    if params.gating == sys::BUPO_GATING_CHOSEN {
        softmax(w);
    }
    if params.normalise == 0 {
        return 1.0;
    }
    let sum = w.iter().sum::<f32>().max(FLOOR);
    w.iter_mut().for_each(|w| *w /= sum);
    sum
}

unsafe extern "C" fn route_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `route` made this node: logits, then a bias [E] and given experts [used, T] as the parameters say; rows t
    // and T + t of dst belong to the thread that has token t.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_route_params>();
        let src = &(*dst).src;
        let (e, t_all) = ((*src[0]).ne[0] as usize, (*src[0]).ne[1] as usize);
        let used = params.used as usize;
        let logits = source_rows(dst, 0);
        let bias = (params.bias != 0).then(|| source_rows(dst, 1).row(0));
        let given = (params.given != 0).then(|| source_rows(dst, 1 + params.bias as usize));
        let out: *mut f32 = (*dst).data.cast();
        let (mut p, mut ranked) = (vec![0f32; e], Vec::with_capacity(e));
        for t in partition(t_all, ith, nth) {
            let weights = std::slice::from_raw_parts_mut(out.add(t * used), used);
            let experts = std::slice::from_raw_parts_mut(out.add((t_all + t) * used), used);
            probabilities(params, logits.row(t), &mut p);
            match given.as_ref().map(|given| given.row(t)).filter(|given| given[0] >= 0.0) {
                Some(given) => experts.copy_from_slice(given),
                None => {
                    ranked.clear();
                    ranked.extend((0..e).map(|i| (p[i] + bias.map_or(0.0, |bias| bias[i]), i)));
                    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                    ranked[..used].sort_by_key(|r| r.1);
                    experts.iter_mut().zip(&ranked).for_each(|(x, r)| *x = r.1 as f32);
                }
            }
            for (w, &chosen) in weights.iter_mut().zip(experts.iter()) {
                *w = p[(chosen as usize).min(e - 1)];
            }
            weigh(params, weights);
            weights.iter_mut().for_each(|w| *w *= params.scale);
        }
    }
}

unsafe extern "C" fn back_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `route_back` made this node: logits [E, T], experts and d_weights [used, T]; column t of dst belongs to the
    // thread that has token t.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_route_params>();
        let [logits, experts, d_weights] = [0, 1, 2].map(|i| source_rows(dst, i));
        let (e, t_all) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let mut p = vec![0f32; e];
        for t in partition(t_all, ith, nth) {
            let d = std::slice::from_raw_parts_mut(((*dst).data as *mut f32).add(t * e), e);
            probabilities(params, logits.row(t), &mut p);
            back(params, &p, experts.row(t), d_weights.row(t), d);
        }
    }
}

/// One token's way back.
fn back(
    params: &sys::bupo_route_params,
    p: &[f32],
    experts: &[f32],
    d_weights: &[f32],
    d: &mut [f32],
) {
    let chosen: Vec<usize> = experts.iter().map(|&x| (x as usize).min(p.len() - 1)).collect();
    let before: Vec<f32> = chosen.iter().map(|&e| p[e]).collect();
    let mut w = before.clone();
    let by = weigh(params, &mut w);
    let dot = |w: &[f32], d: &[f32]| w.iter().zip(d).map(|(w, d)| w * d).sum::<f32>();
    // Through the scale and the division: where the floor divides, it is a constant.
    let mut dw: Vec<f32> = d_weights.iter().map(|d| d * params.scale).collect();
    if params.normalise != 0 {
        let mean = if by > FLOOR { dot(&w, &dw) } else { 0.0 };
        dw.iter_mut().for_each(|d| *d = (*d - mean) / by);
    }
    d.fill(0.0);
    match params.gating {
        sys::BUPO_GATING_CHOSEN => {
            let mut q = before;
            softmax(&mut q);
            let mean = dot(&q, &dw);
            for ((&e, q), dw) in chosen.iter().zip(&q).zip(&dw) {
                d[e] = q * (dw - mean);
            }
        }
        sys::BUPO_GATING_SIGMOID => {
            for (&e, dw) in chosen.iter().zip(&dw) {
                d[e] = p[e] * (1.0 - p[e]) * dw;
            }
        }
        _ => {
            let mean = dot(&before, &dw);
            d.iter_mut().zip(p).for_each(|(d, p)| *d = -p * mean);
            for (&e, dw) in chosen.iter().zip(&dw) {
                d[e] += p[e] * dw;
            }
        }
    }
}

unsafe extern "C" fn order_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    _nth: c_int,
    userdata: *mut c_void,
) {
    if ith != 0 {
        return; // a counting sort of a few thousand numbers
    }
    // SAFETY: `route_order` made this node: experts [used, T], and a dst of the length that it says.
    unsafe {
        let n_expert = (*userdata.cast::<sys::bupo_order_params>()).n_expert as usize;
        let src = (*dst).src[0];
        let s = ((*src).ne[0] * (*src).ne[1]) as usize;
        let experts = std::slice::from_raw_parts((*src).data as *const f32, s);
        let all = std::slice::from_raw_parts_mut((*dst).data as *mut f32, 2 * s + n_expert + 1);
        let (places, rest) = all.split_at_mut(s);
        let (begins, slots) = rest.split_at_mut(n_expert + 1);
        let mut next = vec![0usize; n_expert + 1];
        let expert = |place: usize| (experts[place] as usize).min(n_expert - 1);
        (0..s).for_each(|place| next[expert(place) + 1] += 1);
        (1..=n_expert).for_each(|e| next[e] += next[e - 1]);
        begins.iter_mut().zip(&next).for_each(|(begin, next)| *begin = *next as f32);
        for place in 0..s {
            let slot = &mut next[expert(place)];
            places[*slot] = place as f32;
            slots[place] = *slot as f32;
            *slot += 1;
        }
    }
}

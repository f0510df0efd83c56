//! The forward of each op in plain f64. Layouts as in ggml: the first extent is the fastest.

use bupo_gguf::ggml::Rope;
use bupo_gguf::ops::{Activation, AttentionSpec, DeltaSpec, LogitMap, Segment};

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `y: [N, T]` from `w: [K, N]`, `x: [K, T]`.
pub fn linear(w: &[f64], x: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(w, x))).collect()
}

/// `c tanh(x / c)`, or x.
fn capped(x: f64, cap: Option<f32>) -> f64 {
    cap.map_or(x, |c| c as f64 * (x / c as f64).tanh())
}

/// The logits of each token.
pub fn logits(h: &[f64], e: &[f64], d: usize, map: LogitMap) -> Vec<Vec<f64>> {
    let logit = |h: &[f64], e: &[f64]| capped(map.scale as f64 * dot(e, h), map.softcap);
    h.chunks(d).map(|h| e.chunks(d).map(|e| logit(h, e)).collect()).collect()
}

/// Log-prob of the target, log-sum-exp and entropy of each token from its logits times `inverse`.
pub fn logprob(logits: &[Vec<f64>], targets: &[i32], inverse: f64) -> [Vec<f64>; 3] {
    let mut all = [const { Vec::new() }; 3];
    for (logits, &target) in logits.iter().zip(targets) {
        let logits: Vec<f64> = logits.iter().map(|l| inverse * l).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        all[0].push(logits[target as usize] - lse);
        all[1].push(lse);
        all[2].push(-logits.iter().map(|l| (l - lse).exp() * (l - lse)).sum::<f64>());
    }
    all
}

/// Softmax attention of every token over what its segment lets it see.
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    sinks: Option<&[f64]>,
    segments: &[Segment],
    spec: AttentionSpec,
) -> Vec<f64> {
    let size = spec.head_size;
    let (q_width, kv_width) = (spec.n_head * size, spec.n_head_kv * size);
    let mut out = vec![0.0; q.len()];
    for s in segments {
        for t in s.begin as usize..s.end as usize {
            // The sequence from its first token to this one.
            let prefix = s.prefix_begin as usize..s.prefix_end as usize;
            let sequence: Vec<usize> = prefix.chain(s.begin as usize..t + 1).collect();
            let own = sequence.len() - 1;
            let within = |position: &usize| spec.window.is_none_or(|w| own - position < w);
            let seen = || (0..=own).filter(within).map(|position| sequence[position]);
            for h in 0..spec.n_head {
                let kv = h / (spec.n_head / spec.n_head_kv) * size;
                let q = &q[t * q_width + h * size..][..size];
                let scores: Vec<f64> = seen()
                    .map(|j| spec.scale as f64 * dot(q, &k[j * kv_width + kv..][..size]))
                    .map(|score| capped(score, spec.softcap))
                    .collect();
                let all = || scores.iter().copied().chain(sinks.map(|sinks| sinks[h]));
                let max = all().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = all().map(|s| (s - max).exp()).sum();
                let out = &mut out[t * q_width + h * size..][..size];
                for (j, s) in seen().zip(scores) {
                    let p = (s - max).exp() / sum;
                    for (o, v) in out.iter_mut().zip(&v[j * kv_width + kv..]) {
                        *o += p * v;
                    }
                }
            }
        }
    }
    out
}

/// Rows of `w.len()` divided by their root mean square, times `w`.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let r = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| r * x * w).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

/// `act(g) u`.
pub fn glu(g: &[f64], u: &[f64], activation: Activation) -> Vec<f64> {
    let act = |g: f64| match activation {
        Activation::Silu => g / (1.0 + (-g).exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-g).exp()),
        Activation::Gelu => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh())
        }
        Activation::ClampedSwiglu => unreachable!("it bends both factors"),
    };
    if activation == Activation::ClampedSwiglu {
        let clamped = |g: f64, u: f64| {
            let a = g.min(7.0);
            a / (1.0 + (-1.702 * a).exp()) * (u.clamp(-7.0, 7.0) + 1.0)
        };
        return g.iter().zip(u).map(|(&g, &u)| clamped(g, u)).collect();
    }
    g.iter().zip(u).map(|(&g, u)| act(g) * u).collect()
}

/// Rotary embedding of heads `x: [head size, heads, T]`, with YaRN when `ext_factor` is not 0.
pub fn rope(
    x: &[f64],
    [size, heads]: [usize; 2],
    positions: &[i32],
    factors: Option<&[f32]>,
    rope: &Rope,
) -> Vec<f64> {
    let (n, base) = (rope.n_rot as f64, rope.freq_base as f64);
    let (freq_scale, ext) = (rope.freq_scale as f64, rope.ext_factor as f64);
    // The pair whose wave turns `beta` times within the original context.
    let turning = |beta: f32| {
        n * (rope.n_ctx_orig as f64 / (beta as f64 * std::f64::consts::TAU)).ln()
            / (2.0 * base.ln())
    };
    let low = turning(rope.beta_fast).floor().max(0.0);
    let high = turning(rope.beta_slow).ceil().min(n - 1.0);
    let mut y = x.to_vec();
    for (t, y) in y.chunks_mut(size * heads).enumerate() {
        for y in y.chunks_mut(size) {
            for i in 0..rope.n_rot / 2 {
                let factor = factors.map_or(1.0, |f| f[i] as f64);
                let plain = positions[t] as f64 * base.powf(-2.0 * i as f64 / n) / factor;
                let (mut angle, mut length) = (freq_scale * plain, rope.attn_factor as f64);
                if ext != 0.0 {
                    let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    angle = angle * (1.0 - ramp * ext) + plain * ramp * ext;
                    length *= 1.0 + 0.1 * (1.0 / freq_scale).ln();
                }
                let (a, b) = if rope.neox { (i, i + rope.n_rot / 2) } else { (2 * i, 2 * i + 1) };
                let (sin, cos) = (length * angle.sin(), length * angle.cos());
                (y[a], y[b]) = (y[a] * cos - y[b] * sin, y[a] * sin + y[b] * cos);
            }
        }
    }
    y
}

/// What `ops::policies` gives for one column with logits `l` beside one with logits `other`.
pub struct Policy {
    pub entropy: f64,
    pub lse: f64,
    pub taken: f64,
    pub rank: u32,
    pub kl_to: f64,
    pub kl_from: f64,
    /// All tokens with their log-probs, likeliest first.
    pub sorted: Vec<(i32, f64)>,
}

pub fn policy(l: &[f64], other: &[f64], taken: i32) -> Policy {
    let logprobs = |l: &[f64]| -> (f64, Vec<f64>) {
        let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + l.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        (lse, l.iter().map(|l| l - lse).collect())
    };
    let ((lse, p), (_, q)) = (logprobs(l), logprobs(other));
    let kl = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum();
    let mut sorted: Vec<(i32, f64)> = p.iter().enumerate().map(|(v, p)| (v as i32, *p)).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    Policy {
        entropy: -p.iter().map(|p| p.exp() * p).sum::<f64>(),
        lse,
        taken: p[taken as usize],
        rank: 1 + l.iter().filter(|&&x| x > l[taken as usize]).count() as u32,
        kl_to: kl(&p, &q),
        kl_from: kl(&q, &p),
        sorted,
    }
}

/// The tokens of each token's sequence up to itself, through its prefix.
fn histories(segments: &[Segment]) -> Vec<Vec<usize>> {
    let of = |s: &Segment, t: i32| (s.prefix_begin..s.prefix_end).chain(s.begin..t + 1);
    let all = segments.iter().flat_map(|s| (s.begin..s.end).map(move |t| of(s, t)));
    all.map(|history| history.map(|t| t as usize).collect()).collect()
}

/// Causal depthwise convolution of `x: [C, T]` by `w: [K, C]`, then SiLU.
pub fn conv_silu(x: &[f64], w: &[f64], k: usize, segments: &[Segment]) -> Vec<f64> {
    let channels = w.len() / k;
    let token = |history: Vec<usize>| -> Vec<f64> {
        let channel = |c: usize| {
            let seen = history.iter().rev().zip(w[c * k..][..k].iter().rev());
            let s: f64 = seen.map(|(t, w)| w * x[t * channels + c]).sum();
            s / (1.0 + (-s).exp())
        };
        (0..channels).map(channel).collect()
    };
    histories(segments).into_iter().flat_map(token).collect()
}

/// The gated delta rule, token by token: `qkv: [(2 n_k + n_v) d, T]`, `a, b: [n_v, T]`, `decay, bias: [n_v]`.
pub fn delta(
    [qkv, a, b, decay, bias]: [&[f64]; 5],
    segments: &[Segment],
    spec: DeltaSpec,
) -> Vec<f64> {
    let DeltaSpec { n_k, n_v, size: d, eps, grouped } = spec;
    let t = a.len() / n_v;
    let row = |t: usize, head: usize| &qkv[(t * (2 * n_k + n_v) + head) * d..][..d];
    let normed = |x: &[f64]| -> Vec<f64> {
        let length = (dot(x, x) + eps as f64).sqrt();
        x.iter().map(|x| x / length).collect()
    };
    let mut out = vec![0.0; n_v * d * t];
    for h in 0..n_v {
        let step = |state: &mut Vec<f64>, t: usize| -> Vec<f64> {
            let key = if grouped { h / (n_v / n_k) } else { h % n_k };
            let (q, k) = (normed(row(t, key)), normed(row(t, n_k + key)));
            let gate = decay[h] * (1.0 + (a[t * n_v + h] + bias[h]).exp()).ln();
            let beta = 1.0 / (1.0 + (-b[t * n_v + h]).exp());
            state.iter_mut().for_each(|s| *s *= gate.exp());
            let read = |state: &[f64], x: &[f64], j: usize| -> f64 {
                x.iter().enumerate().map(|(i, x)| state[i * d + j] * x).sum()
            };
            let u: Vec<f64> = row(t, 2 * n_k + h)
                .iter()
                .enumerate()
                .map(|(j, v)| beta * (v - read(state, &k, j)))
                .collect();
            for (s, k) in state.chunks_mut(d).zip(&k) {
                s.iter_mut().zip(&u).for_each(|(s, u)| *s += k * u);
            }
            (0..d).map(|j| read(state, &q, j) / (d as f64).sqrt()).collect()
        };
        let mut prompt = vec![0.0; d * d];
        for s in segments {
            let is_prompt = s.prefix_begin == s.prefix_end;
            let mut state = if is_prompt { vec![0.0; d * d] } else { prompt.clone() };
            for t in s.begin as usize..s.end as usize {
                out[(t * n_v + h) * d..][..d].copy_from_slice(&step(&mut state, t));
            }
            if is_prompt {
                prompt = state;
            }
        }
    }
    out
}

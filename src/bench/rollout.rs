//! Prefill and decoding, with and without adapter, beside a bare loop over `llama_decode`.

use std::sync::atomic::AtomicBool;

use super::measure::{median, once};
use super::{Bench, Row, row};
use crate::llama::{Context, ContextOptions, Products, Token, TokenBatch};
use crate::rollout::{Request, RolloutOptions, Rollouts, Sampling};
use crate::{Error, Result};

pub(super) fn run(bench: &Bench<'_>, n_seq: usize) -> Result<Vec<Row>> {
    let model = bench.model;
    let mut lora = bench.adapter()?;
    let (prompt_tokens, new) = (bench.options.prompt, bench.options.new);
    let n_ctx_seq = prompt_tokens + new;
    let options =
        RolloutOptions { n_ctx_seq, kv_bytes: usize::MAX }.at_most(n_seq, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &bench.pool, options)?;
    let prompt = bench.tokens(prompt_tokens, 1);
    let mut bare = Bare::new(bench, n_seq, &prompt)?;

    let (mut prefill, mut off, mut on, mut loops) = (vec![], vec![], vec![], vec![]);
    let mut bare_prefill = vec![];
    let (mut overhead, mut adapted) = (vec![], vec![]);
    for rep in 0..bench.options.reps + 1 {
        rollouts.set_adapter(None)?;
        let (first, without) = decode(&mut rollouts, &prompt, n_seq, new)?;
        rollouts.set_adapter(Some(lora.live(model)?))?;
        let (_, with) = decode(&mut rollouts, &prompt, n_seq, new)?;
        let (bare_first, bare) = bare.run()?;
        if rep > 0 {
            bare_prefill.push(prompt_tokens as f64 / bare_first);
            prefill.push(prompt_tokens as f64 / first);
            off.push(without);
            on.push(with);
            loops.push(bare);
            overhead.push(without / bare);
            adapted.push(with / without);
        }
    }
    model.engine().look_at_memory()?;
    Ok(vec![row(
        format!("rollout/{n_seq} sequences"),
        &[
            ("prompt_tokens", prompt_tokens as f64),
            ("new_tokens", new as f64),
            ("prefill_tokens_per_s", median(&mut prefill)),
            ("decode_tokens_per_s", median(&mut off)),
            ("decode_with_adapter_tokens_per_s", median(&mut on)),
            ("bare_prefill_tokens_per_s", median(&mut bare_prefill)),
            ("bare_loop_tokens_per_s", median(&mut loops)),
            ("share_of_bare_loop", median(&mut overhead)),
            ("adapter_on_over_off", median(&mut adapted)),
        ],
    )])
}

/// Seconds until the first tokens, and tokens per second after them.
///
/// # Errors
/// Those of decoding; [`Error::Invalid`] where the model hardly says more than one token.
fn decode(rollouts: &mut Rollouts, prompt: &[i32], n: usize, new: usize) -> Result<(f64, f64)> {
    let stop = AtomicBool::new(false);
    let request =
        |max_tokens| Request { prompt_tokens: prompt.to_vec(), n, seed_stream: 1, max_tokens };
    let sampling = Sampling::default();
    let mut generate = |max_tokens| -> Result<(f64, usize)> {
        let requests = [request(max_tokens)];
        let (time, out) = once(|| rollouts.generate(&requests, &sampling, 1, &mut |_| {}, &stop));
        let tokens = out?.iter().flatten().map(|c| c.tokens.len()).sum();
        Ok((time.as_secs_f64(), tokens))
    };
    let (first, first_tokens) = generate(1)?;
    let (all, tokens) = generate(new)?;
    if tokens < 2 * first_tokens {
        let got = format!("{tokens} tokens of {n} completions");
        let expected = "a model that goes on after a prompt of random tokens";
        let advice = "measure one of the same shape that `synth` makes";
        return Err(Error::invalid("bench rollout", expected, got, advice));
    }
    Ok((first, (tokens - first_tokens) as f64 / (all - first).max(1e-9)))
}

/// The least that decoding takes: the same batches, nothing sampled.
struct Bare {
    context: Context,
    prompt: Vec<i32>,
    n_seq: usize,
    new: usize,
}

impl Bare {
    fn new(bench: &Bench<'_>, n_seq: usize, prompt: &[i32]) -> Result<Bare> {
        let new = bench.options.new;
        let options = ContextOptions {
            n_ctx_seq: prompt.len() + new,
            n_seq,
            n_batch: n_seq.max(prompt.len()),
            kv_f32: false,
            products: Products::Ggml,
            experts: false,
        };
        let context = Context::new(bench.model.engine(), &bench.pool, options)?;
        Ok(Bare { context, prompt: prompt.to_vec(), n_seq, new })
    }

    /// Seconds of the prompt, and tokens per second of the loop.
    fn run(&mut self) -> Result<(f64, f64)> {
        self.context.clear();
        let token = |id, position: usize, sequence: usize, logits| Token {
            id,
            position: position as i32,
            sequence: sequence as i32,
            logits,
        };
        let (known, new) = (self.prompt.len(), self.new);
        let prompt = self.prompt.iter().enumerate();
        let prompt = prompt.map(|(i, &id)| token(id, i, 0, i + 1 == known)).collect();
        let (first, ran) = once(|| -> Result<()> {
            self.context.decode(&TokenBatch(prompt))?;
            std::hint::black_box(self.context.logits(known - 1)[0]);
            Ok(())
        });
        ran?;
        for to in 1..self.n_seq {
            self.context.copy(0, to);
        }
        let (time, ran) = once(|| -> Result<()> {
            for step in 0..new - 1 {
                let id = |s: usize| self.prompt[(s + step) % known];
                let batch = (0..self.n_seq).map(|s| token(id(s), known + step, s, true)).collect();
                self.context.decode(&TokenBatch(batch))?;
                // Logits are computed when somebody asks for them at the latest.
                std::hint::black_box(self.context.logits(0)[0]);
            }
            Ok(())
        });
        ran?;
        Ok((first.as_secs_f64(), (self.n_seq * (new - 1)) as f64 / time.as_secs_f64()))
    }
}

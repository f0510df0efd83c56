//! With invariant rollouts a completion does not depend on who is decoded beside it, nor does a dialogue.

mod common;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::llama::{Context, ContextOptions, Products, Token, TokenBatch};
use bupo_gguf::rollout::{
    Answer, Completion, Finish, Partner, Request, RolloutOptions, Rollouts, Sampling, Segment,
    Which,
};
use common::Golden;

/// Prompts of several lengths, with so many completions each.
fn requests(n_vocab: usize, completions: usize) -> Vec<Request> {
    (0..4usize)
        .map(|i| Request {
            prompt_tokens: (0..2 + 7 * i)
                .map(|t| ((5 + 11 * t + 3 * i) % n_vocab) as i32)
                .collect(),
            n: completions,
            seed_stream: i as u64,
            max_tokens: 5 + 4 * (i % 3),
        })
        .collect()
}

fn sample(rollouts: &mut Rollouts, requests: &[Request]) -> Vec<Vec<Completion>> {
    let stop = AtomicBool::new(false);
    rollouts.generate(requests, &Sampling::default(), 1, &mut |_| (), &stop).unwrap()
}

#[test]
fn completions_do_not_depend_on_who_is_decoded_beside_them() {
    let first = ["qwen3-q8_0", "llama-q4_0", "qwen3-q4_k", "llama-f32", "qwen2-f32"];
    let names = first.into_iter().chain(common::ARCHS);
    let mut failed = Vec::new();
    for name in names {
        let golden = Golden::load(name);
        let mut lora = golden.lora();
        let pool = Arc::new(ThreadPool::new(1).unwrap());
        let mut with = |n_seq: usize| {
            let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 30 };
            let options = options.at_most(n_seq, golden.model.engine()).unwrap();
            let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
            rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
            rollouts.make_invariant();
            rollouts
        };
        let requests = requests(golden.model.config().n_vocab, 5);
        let together = sample(&mut with(64), &requests);
        let few = sample(&mut with(2), &requests);
        let mut alone = with(64);
        let alone: Vec<_> = requests
            .iter()
            .map(|request| sample(&mut alone, std::slice::from_ref(request)).remove(0))
            .collect();
        if together != few {
            failed.push(format!("{name}: 2 sequences at once"));
        }
        if together != alone {
            failed.push(format!("{name}: one prompt at a time"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Sequences that are copies of another read what they have in common once: the same logits as of sequences that each
/// decoded it themselves, also where some forgot a part of it, and of a window of keys.
#[test]
fn what_sequences_have_in_common_is_read_once_and_changes_nothing() {
    const SEQUENCES: usize = 11;
    for name in ["llama-q4_0", "qwen3-f32", "gemma3-f32", "qwen35-q8_0"] {
        let golden = Golden::load(name);
        let pool = Arc::new(ThreadPool::new(2).unwrap());
        let options = ContextOptions {
            n_ctx_seq: 256,
            n_seq: SEQUENCES,
            n_batch: 256,
            kv_f32: false,
            products: Products::Invariant,
            experts: false,
        };
        let n_vocab = golden.model.config().n_vocab;
        let id = |i: usize| ((5 + 11 * i) % n_vocab) as i32;
        let forgets = golden.model.engine().state_bytes().unwrap() == 0;
        let logits = |copies: bool| {
            let mut context = Context::new(golden.model.engine(), &pool, options).unwrap();
            let feed = |context: &mut Context, sequence: usize, positions: Range<usize>| {
                let token = |position: usize| Token {
                    id: id(position),
                    position: position as i32,
                    sequence: sequence as i32,
                    logits: position + 1 == positions.end,
                };
                context.decode(&TokenBatch(positions.clone().map(token).collect())).unwrap();
            };
            feed(&mut context, 0, 0..150);
            for sequence in 1..SEQUENCES {
                match copies {
                    true => context.copy(0, sequence),
                    false => feed(&mut context, sequence, 0..150),
                }
                if forgets && sequence % 4 == 3 {
                    context.forget(sequence, 70).unwrap();
                    feed(&mut context, sequence, 70..150);
                }
            }
            // One more of another beginning, beside them from now on.
            context.forget(5, 0).unwrap();
            feed(&mut context, 5, 0..150);
            let mut all = Vec::new();
            for step in 0..4 {
                let token = |sequence: usize| Token {
                    id: id(7 * sequence + step),
                    position: (150 + step) as i32,
                    sequence: sequence as i32,
                    logits: true,
                };
                context.decode(&TokenBatch((0..SEQUENCES).map(token).collect())).unwrap();
                all.extend((0..SEQUENCES).map(|i| context.logits(i).to_vec()));
            }
            all
        };
        assert!(logits(true) == logits(false), "{name}");
    }
}

/// Answers three turns, with tokens that depend on what was said; now and then it rewrites what stands before.
struct Talker {
    lag: u64,
    n_vocab: usize,
    /// Number of the first request among all.
    first: usize,
    prompts: Vec<Vec<i32>>,
    said: HashMap<Which, (usize, i64)>,
}

impl Partner for Talker {
    fn lag(&self) -> u64 {
        self.lag
    }

    fn max_turn(&self, which: Which) -> usize {
        let turn = self.said.get(&which).map_or(0, |(turn, _)| *turn);
        1 + (3 * which.index + self.first + which.request + turn) % 4
    }

    fn said(&mut self, which: Which, tokens: &[i32], _: Finish) -> bupo_gguf::Result<()> {
        let (turn, sum) = self.said.entry(which).or_default();
        (*turn, *sum) = (*turn + 1, *sum + tokens.iter().map(|&t| t as i64).sum::<i64>());
        Ok(())
    }

    fn answer(&mut self, which: Which) -> bupo_gguf::Result<Answer> {
        let (turn, sum) = self.said[&which];
        let number = sum as usize + self.first + which.request + which.index + turn;
        if turn == 3 {
            return Ok(Answer::Over);
        }
        let tokens: Vec<i32> =
            (0..1 + number % 5).map(|i| ((number + 7 * i) % self.n_vocab) as i32).collect();
        let prompt = &self.prompts[which.request];
        Ok(match number % 4 {
            0 => Answer::Anew([&prompt[..prompt.len() / 2], &tokens].concat()),
            1 => Answer::Anew([prompt.as_slice(), &tokens].concat()),
            _ => Answer::Append(tokens),
        })
    }

    fn cut(&mut self, _: Which) {}
}

#[test]
fn nor_do_dialogues_whenever_their_partners_answer() {
    let first = ["qwen3-q8_0", "llama-q4_0", "qwen3-q4_k", "llama-f32"];
    let names = first.into_iter().chain(common::ARCHS);
    let mut failed = Vec::new();
    let (mut all, mut several) = (0, 0);
    for name in names {
        let golden = Golden::load(name);
        let n_vocab = golden.model.config().n_vocab;
        let mut lora = golden.lora();
        let pool = Arc::new(ThreadPool::new(1).unwrap());
        let mut requests = requests(n_vocab, 4);
        requests.iter_mut().for_each(|request| request.max_tokens = 24);
        let mut talk = |n_seq: usize, lag: u64, first: usize, requests: &[Request]| {
            let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 30 };
            let options = options.at_most(n_seq, golden.model.engine()).unwrap();
            let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
            rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
            rollouts.make_invariant();
            let prompts = requests.iter().map(|request| request.prompt_tokens.clone()).collect();
            let mut partner = Talker { lag, n_vocab, first, prompts, said: HashMap::new() };
            let (stop, sampling) = (AtomicBool::new(false), Sampling::default());
            let talked =
                rollouts.converse(requests, &sampling, 1, &stop, &mut partner, &mut |_| Ok(()));
            talked.unwrap().into_iter().map(|(_, group)| group).collect::<Vec<_>>()
        };
        let together: Vec<Vec<Vec<Segment>>> = talk(64, 0, 0, &requests);
        for (n_seq, lag) in [(64, 3), (5, 2), (2, 1), (16, 9)] {
            if talk(n_seq, lag, 0, &requests) != together {
                failed.push(format!("{name}: {n_seq} sequences at once, lag {lag}"));
            }
        }
        let one = |(i, request)| talk(64, 4, i, std::slice::from_ref(request)).remove(0);
        let alone: Vec<_> = requests.iter().enumerate().map(one).collect();
        if alone != together {
            failed.push(format!("{name}: one prompt at a time"));
        }
        all += together.iter().flatten().count();
        several += together.iter().flatten().filter(|segments| segments.len() > 1).count();
    }
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(several > all / 4 && several < all, "{several} of {all} have several segments");
}

/// Beside other processes fewer threads decode; what they sample is, to the bit, what all of them would.
#[test]
fn completions_do_not_depend_on_how_many_threads_have_a_core() {
    let first = ["qwen3-q8_0", "llama-q4_0", "qwen3-q4_k", "llama-f32", "qwen2-f32"];
    let mut failed = Vec::new();
    for name in first.into_iter().chain(common::ARCHS) {
        let golden = Golden::load(name);
        let mut lora = golden.lora();
        let requests = requests(golden.model.config().n_vocab, 5);
        let mut with = |neighbours: usize| {
            let pool = Arc::new(ThreadPool::new(3).unwrap());
            pool.assume_neighbours(neighbours);
            let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 30 };
            let options = options.at_most(32, golden.model.engine()).unwrap();
            let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
            rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
            sample(&mut rollouts, &requests)
        };
        let alone = with(0);
        for neighbours in [1, 2] {
            if with(neighbours) != alone {
                failed.push(format!("{name}: {neighbours} neighbours"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

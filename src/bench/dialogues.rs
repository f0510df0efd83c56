//! Dialogues of four turns beside single completions of the same length, with a partner that answers at once and with one
//! that takes 100 ms.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::measure::{median, once};
use super::{Bench, Row, row};
use crate::Result;
use crate::rollout::{Answer, Finish, Partner, Request, RolloutOptions, Rollouts, Sampling, Which};

/// Tokens of the prompt.
const PROMPT: usize = 64;
/// Turns of a dialogue, and tokens of each on average.
const TURNS: usize = 4;
const TURN: usize = 32;
/// Tokens of an answer.
const ANSWER: usize = 16;
/// Tokens after the prompt.
const LENGTH: usize = TURNS * TURN + (TURNS - 1) * ANSWER;
/// What a slow partner takes.
const DELAY: Duration = Duration::from_millis(100);

/// Answers each turn with the same tokens, after a while.
struct Delayed {
    delay: Duration,
    lag: u64,
    tokens: Vec<i32>,
    asked: HashMap<Which, (Instant, usize)>,
    waited: Duration,
}

impl Partner for Delayed {
    fn lag(&self) -> u64 {
        self.lag
    }

    /// Turns of different lengths, so that not all wait at once.
    fn max_turn(&self, which: Which) -> usize {
        let turn = self.asked.get(&which).map_or(0, |(_, turn)| *turn);
        let shift = (which.index * 7 + turn * 5) % (TURN + 1);
        TURN / 2 + shift
    }

    fn said(&mut self, which: Which, _tokens: &[i32], _finish: Finish) -> Result<()> {
        let turn = self.asked.get(&which).map_or(0, |(_, turn)| *turn);
        self.asked.insert(which, (Instant::now(), turn + 1));
        Ok(())
    }

    fn answer(&mut self, which: Which) -> Result<Answer> {
        let (asked, turn) = self.asked[&which];
        let left = self.delay.saturating_sub(asked.elapsed());
        self.waited += left;
        std::thread::sleep(left);
        Ok(if turn == TURNS { Answer::Over } else { Answer::Append(self.tokens.clone()) })
    }

    fn cut(&mut self, _which: Which) {}
}

pub(super) fn run(bench: &Bench<'_>, n_seq: usize) -> Result<Vec<Row>> {
    let model = bench.model;
    let n_ctx_seq = PROMPT + 2 * LENGTH;
    let options =
        RolloutOptions { n_ctx_seq, kv_bytes: usize::MAX }.at_most(n_seq, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &bench.pool, options)?;
    let prompt = bench.tokens(PROMPT, 1);
    let request = |max_tokens| Request {
        prompt_tokens: prompt.clone(),
        n: n_seq,
        seed_stream: 1,
        max_tokens,
    };
    let (sampling, stop) = (Sampling::default(), AtomicBool::new(false));
    let (mut single, mut talk, mut slow, mut waits) = (vec![], vec![], vec![], vec![]);
    let (mut share, mut slow_share) = (vec![], vec![]);
    for rep in 0..bench.options.reps + 1 {
        let requests = [request(LENGTH)];
        let (time, out) = once(|| rollouts.generate(&requests, &sampling, 1, &mut |_| {}, &stop));
        let sampled: usize = out?.iter().flatten().map(|c| c.tokens.len()).sum();
        let round = time / LENGTH as u32;
        let rate = sampled as f64 / time.as_secs_f64();
        let mut talk_with = |delay: Duration| -> Result<(f64, f64)> {
            let lag = delay.as_secs_f64() / round.as_secs_f64();
            let mut partner = Delayed {
                delay,
                lag: lag.ceil() as u64,
                tokens: bench.tokens(ANSWER, 2),
                asked: HashMap::new(),
                waited: Duration::ZERO,
            };
            let requests = [request(2 * LENGTH)];
            let (time, out) = once(|| {
                rollouts.converse(&requests, &sampling, 1, &stop, &mut partner, &mut |_| Ok(()))
            });
            let segments = out?;
            let segments = segments.iter().flat_map(|(_, group)| group).flatten();
            let tokens = segments.map(|s| s.completion.tokens.len());
            let seconds = time.as_secs_f64();
            Ok((tokens.sum::<usize>() as f64 / seconds, partner.waited.as_secs_f64() / seconds))
        };
        let (at_once, _) = talk_with(Duration::ZERO)?;
        let (late, waited) = talk_with(DELAY)?;
        if rep > 0 {
            single.push(rate);
            talk.push(at_once);
            slow.push(late);
            waits.push(waited);
            share.push(at_once / rate);
            slow_share.push(late / rate);
        }
    }
    model.engine().look_at_memory()?;
    Ok(vec![row(
        format!("dialogues/{n_seq} sequences"),
        &[
            ("single_turn_tokens_per_s", median(&mut single)),
            ("dialogue_tokens_per_s", median(&mut talk)),
            ("slow_dialogue_tokens_per_s", median(&mut slow)),
            ("share_of_single_turns", median(&mut share)),
            ("slow_share_of_single_turns", median(&mut slow_share)),
            ("slow_share_waited", median(&mut waits)),
        ],
    )])
}

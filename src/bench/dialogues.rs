//! Dialogues of four turns beside completions of the same lengths in one turn, with a partner that answers at once and with
//! one that takes 100 ms.

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
/// Tokens after the prompt, on average.
const LENGTH: usize = TURNS * TURN + (TURNS - 1) * ANSWER;

/// Tokens of a turn: different ones, so that not all wait at once.
fn turn_length(which: Which, turn: usize) -> usize {
    TURN / 2 + (which.index * 7 + turn * 5) % (TURN + 1)
}

/// Tokens of a dialogue after the prompt.
fn length(which: Which) -> usize {
    (0..TURNS).map(|turn| turn_length(which, turn)).sum::<usize>() + (TURNS - 1) * ANSWER
}

/// What a slow partner takes.
const DELAY: Duration = Duration::from_millis(100);

/// Answers each turn with the same tokens, after a while.
struct Delayed {
    /// Turns of a dialogue; of one it has the tokens of them all.
    turns: usize,
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

    fn max_turn(&self, which: Which) -> usize {
        match self.turns {
            1 => length(which),
            _ => turn_length(which, self.asked.get(&which).map_or(0, |(_, turn)| *turn)),
        }
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
        Ok(if turn == self.turns { Answer::Over } else { Answer::Append(self.tokens.clone()) })
    }

    fn cut(&mut self, _which: Which) {}
}

/// How a call went.
struct Talk {
    /// Tokens a second.
    rate: f64,
    seconds: f64,
    /// Share of the time in which nothing but the partner worked.
    waited: f64,
}

pub(super) fn run(bench: &Bench<'_>, n_seq: usize) -> Result<Vec<Row>> {
    let model = bench.model;
    let n_ctx_seq = PROMPT + 2 * LENGTH;
    let options =
        RolloutOptions { n_ctx_seq, kv_bytes: usize::MAX }.at_most(n_seq, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &bench.pool, options)?;
    let prompt = bench.tokens(PROMPT, 1);
    let requests =
        [Request { prompt_tokens: prompt, n: n_seq, seed_stream: 1, max_tokens: 2 * LENGTH }];
    let (sampling, stop) = (Sampling::default(), AtomicBool::new(false));
    let mut talk_with = |turns, delay: Duration, lag| -> Result<Talk> {
        let (tokens, asked) = (bench.tokens(ANSWER, 2), HashMap::new());
        let mut partner = Delayed { turns, delay, lag, tokens, asked, waited: Duration::ZERO };
        let (time, out) = once(|| {
            rollouts.converse(&requests, &sampling, 1, &stop, &mut partner, &mut |_| Ok(()))
        });
        let segments = out?;
        let segments = segments.iter().flat_map(|(_, group)| group).flatten();
        let tokens: usize = segments.map(|s| s.completion.tokens.len()).sum();
        let seconds = time.as_secs_f64();
        let waited = partner.waited.as_secs_f64() / seconds;
        Ok(Talk { rate: tokens as f64 / seconds, seconds, waited })
    };
    let longest = (0..n_seq).map(|index| length(Which { request: 0, index })).max();
    let (mut single, mut talk, mut slow, mut waits) = (vec![], vec![], vec![], vec![]);
    let (mut share, mut slow_share) = (vec![], vec![]);
    for rep in 0..bench.options.reps + 1 {
        let alone = talk_with(1, Duration::ZERO, 0)?;
        let at_once = talk_with(TURNS, Duration::ZERO, 0)?;
        // Rounds that a slow partner takes.
        let round = alone.seconds / longest.unwrap_or(LENGTH) as f64;
        let late = talk_with(TURNS, DELAY, (DELAY.as_secs_f64() / round).ceil() as u64)?;
        if rep > 0 {
            single.push(alone.rate);
            talk.push(at_once.rate);
            slow.push(late.rate);
            waits.push(late.waited);
            share.push(at_once.rate / alone.rate);
            slow_share.push(late.rate / alone.rate);
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

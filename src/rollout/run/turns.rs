//! Turns that end, and what their partner answers.

use std::time::Instant;

use super::super::dialogue::Answer;
use super::super::request::Finish;
use super::super::sizes::PREFILL_TOKENS;
use super::{Run, Slot, nothing};
use crate::Result;
use crate::llama::{Token, TokenBatch};

/// So many waiting sequences between running ones are decoded with them, for nothing: a gap would cost a pass over the
/// weights, for llama.cpp takes neighbouring sequences alone in one go.
const BRIDGED: usize = 8;
/// An answer of so many tokens at most is read along with what others sample, one token a round: llama.cpp would take each of
/// several sequences that read at once, but are no neighbours, by itself.
const READ_ALONG: usize = 64;
/// So many running sequences at least, so that a round costs little more for one more.
const COMPANY: usize = 4;

/// Tokens that a sequence reads without a token being drawn after them.
struct Reading {
    slot: usize,
    from: usize,
    tokens: Vec<i32>,
}

impl Run<'_, '_> {
    /// A turn has ended: with a partner the sequence waits for its answer, else it is done.
    pub(super) fn ended(&mut self, mut slot: Slot) -> Result<Option<Slot>> {
        let which = self.which(&slot);
        let Some(partner) = self.partner.as_mut() else {
            self.finish(slot);
            return Ok(None);
        };
        let turn = &slot.completion.tokens[slot.completion.tokens.len() - slot.turn..];
        partner.said(which, turn, slot.completion.finish)?;
        slot.due = Some(self.round + 1 + partner.lag());
        Ok(Some(slot))
    }

    /// Takes the answers that are due, and waits for them; where nothing else can be decoded, or not as it must, for the
    /// next ones.
    pub(super) fn hear(&mut self) -> Result<()> {
        let choosy = self.wants_company() && self.has_states;
        loop {
            if choosy {
                self.compact()?;
            }
            let waiting = self.slots.iter().flatten().filter_map(|slot| slot.due);
            let Some(next) = waiting.min() else { return Ok(()) };
            let all_wait = self.slots.iter().flatten().all(|slot| slot.due.is_some());
            if all_wait || choosy && self.lacks_company() {
                self.round = self.round.max(next);
            }
            let is_due = |s: &usize| {
                let slot = self.slots[*s].as_ref();
                slot.is_some_and(|slot| slot.due.is_some_and(|due| due <= self.round))
            };
            let mut due: Vec<usize> = (0..self.slots.len()).filter(is_due).collect();
            if due.is_empty() {
                return Ok(());
            }
            due.sort_by_key(|&s| self.which(self.slots[s].as_ref().expect("due")));
            let mut reading = Vec::new();
            let mut free = Vec::new();
            for s in due {
                let slot = self.slots[s].take().expect("due");
                match self.answered(s, slot)? {
                    Ok(tokens) => reading.push(tokens),
                    Err((group, kept)) => free.push((s, group, kept)),
                }
            }
            reading.sort_by_key(|r| r.slot);
            self.read(reading)?;
            for (s, group, kept) in free {
                self.again(s, group, kept)?;
            }
        }
    }

    /// Goes on with a sequence by its partner's answer: what it must read first. Of one that is over its group, and how
    /// much of the group's prompt it still begins with.
    fn answered(
        &mut self,
        s: usize,
        mut slot: Slot,
    ) -> Result<std::result::Result<Reading, (usize, usize)>> {
        let (which, most) = (self.which(&slot), self.most_tokens(&slot));
        let partner = self.partner.as_mut().expect("whose answer is due");
        let answer = partner.answer(which)?;
        // A token of the model's must find room, too.
        let has_room = match &answer {
            Answer::Over => false,
            Answer::Append(tokens) => slot.len() + tokens.len() < most,
            Answer::Anew(prompt) => prompt.len() < most,
        };
        if !has_room {
            if answer != Answer::Over {
                partner.cut(which);
                slot.completion.finish = Finish::Length;
            }
            let over = (slot.group, slot.kept);
            self.finish(slot);
            return Ok(Err(over));
        }
        let (newest, at) = slot.next();
        let reading = match answer {
            Answer::Append(tokens) => {
                tokens.iter().for_each(|&t| slot.push(t, 0.0, false));
                let mut read = Vec::new();
                if self.reads_along(tokens.len()) {
                    slot.unread = tokens.len();
                } else {
                    read.extend(std::iter::once(newest).chain(tokens));
                    read.pop();
                }
                Reading { slot: s, from: at, tokens: read }
            }
            Answer::Anew(prompt) => {
                let held = slot.prompt.iter().chain(&slot.completion.tokens).take(at);
                let same = held.zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b);
                // A state forgets all or nothing.
                let same = if self.has_states { 0 } else { same.count() };
                self.context.forget(s, same)?;
                slot.kept = slot.kept.min(same);
                let mut experts = slot.completion.experts.clone();
                experts.truncate(experts.len() / at.max(1) * same);
                slot.end_segment();
                (slot.completion, slot.prompt) = (nothing(experts), prompt.into());
                let tokens = slot.prompt[same..slot.prompt.len() - 1].to_vec();
                Reading { slot: s, from: same, tokens }
            }
            Answer::Over => unreachable!("it has no room"),
        };
        (slot.turn, slot.due) = (0, None);
        slot.completion.finish = Finish::Length;
        self.slots[s] = Some(slot);
        Ok(Ok(reading))
    }

    /// Whether so many tokens are read one a round. Where nothing may depend on who is decoded together, their number decides.
    fn reads_along(&self, n: usize) -> bool {
        let running = || self.slots.iter().flatten().filter(|slot| slot.due.is_none()).count();
        n <= READ_ALONG && (self.invariant || running() >= COMPANY)
    }

    /// Reads tokens into their sequences, as many in one call as it may have; each sequence by itself where nothing may
    /// depend on who is decoded together.
    fn read(&mut self, mut readings: Vec<Reading>) -> Result<()> {
        readings.retain(|reading| !reading.tokens.is_empty());
        let together = self.context.options().n_batch.min(PREFILL_TOKENS);
        let most = if self.invariant { 0 } else { together };
        while !readings.is_empty() {
            let mut batch = TokenBatch::default();
            let fits = |r: &&Reading| {
                let together = batch.0.len() + r.tokens.len() <= most;
                if together || batch.0.is_empty() {
                    batch.0.extend(r.tokens.iter().zip(r.from..).map(|(&id, position)| Token {
                        id,
                        position: position as i32,
                        sequence: r.slot as i32,
                        logits: false,
                    }));
                }
                together
            };
            let n = readings.iter().take_while(fits).count().max(1);
            let start = Instant::now();
            self.context.decode(&batch)?;
            self.clock.parts.prompt_seconds += start.elapsed().as_secs_f64();
            for r in readings.drain(..n) {
                let Some(slot) = &mut self.slots[r.slot] else { continue };
                let read = r.from..r.from + r.tokens.len();
                let experts = read.filter_map(|at| self.context.experts(r.slot, at));
                slot.completion.experts.extend(experts.flatten());
            }
        }
        Ok(())
    }

    /// A slot whose completion has ended goes on with the next one of its group, of whose prompt it still begins with
    /// `kept` tokens.
    pub(super) fn again(&mut self, s: usize, group: usize, kept: usize) -> Result<()> {
        let g = &self.groups[group];
        if self.has_states || g.next == self.requests[g.request].n {
            return Ok(());
        }
        // Tokens read in a call of their own may have other last bits than those of a whole prompt.
        let kept = if self.invariant && kept < g.prompt.len() { 0 } else { kept };
        self.context.forget(s, kept)?;
        let tokens = g.prompt[kept..].to_vec();
        self.read(vec![Reading { slot: s, from: kept, tokens }])?;
        self.begin(s, group)
    }

    /// Whether no token is to be decoded alone.
    pub(super) fn wants_company(&self) -> bool {
        self.invariant && self.slots.len() > 1
    }

    /// Whether there is a sequence that would be decoded alone, for what is beside it waits and cannot forget a token.
    fn lacks_company(&self) -> bool {
        let runs = |s: &usize| self.slots[*s].as_ref().is_some_and(|slot| slot.due.is_none());
        let running: Vec<usize> = (0..self.slots.len()).filter(runs).collect();
        lone(&running).any(|s| self.beside(s).is_none())
    }

    /// For each sequence that would be decoded alone one beside it: llama.cpp decodes neighbours together, and ggml has
    /// another kernel for one column.
    pub(super) fn company(&self, decoded: &[usize]) -> Vec<usize> {
        lone(decoded).filter_map(|s| self.beside(s)).collect()
    }

    /// A neighbour that may be decoded with a sequence, for nothing.
    fn beside(&self, s: usize) -> Option<usize> {
        let can = |n: &usize| match &self.slots[*n] {
            Some(slot) => slot.due.is_some() && !self.has_states,
            None => true,
        };
        let above = Some(s + 1).filter(|n| *n < self.slots.len() && can(n));
        above.or_else(|| s.checked_sub(1).filter(can))
    }

    /// Waiting sequences between running ones that are decoded with them; what cannot forget a token is not.
    pub(super) fn bridges(&self, running: &[usize]) -> Vec<usize> {
        let mut idle = Vec::new();
        for pair in running.windows(2) {
            let gap = pair[0] + 1..pair[1];
            let fits = |s: usize| {
                let slot = self.slots[s].as_ref();
                slot.is_some_and(|slot| slot.next().1 < self.context.options().n_ctx_seq)
            };
            if !self.has_states && gap.len() <= BRIDGED && gap.clone().all(fits) {
                idle.extend(gap);
            }
        }
        idle
    }
}

/// Numbers, ascending, whose neighbours are not among them.
fn lone(numbers: &[usize]) -> impl Iterator<Item = usize> + '_ {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    runs.filter(|run| run.len() == 1).map(|run| run[0])
}

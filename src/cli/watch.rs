//! What a person sees of a run: a bar that moves with tokens, one line per step, now and then a completion.

use std::collections::VecDeque;

use console::{Style, style};
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::keys::Keys;
use crate::rollout::Progress;
use crate::train::{Observer, Phase, RolloutRecord, Sample, StepRecord, Trainer};

/// Steps at the start that the trend of the reward is taken from, and at the end that it is taken to.
const TREND: usize = 3;
/// Steps whose time says how long the rest will take.
const RECENT: usize = 8;
/// Characters of a prompt and of a completion that are shown.
const SHOWN: (usize, usize) = (400, 1200);

/// How much a person wants to see.
#[derive(Clone, Copy, Debug)]
pub struct Show {
    /// Warnings alone.
    pub quiet: bool,
    /// A completion every so many steps; 0 is none.
    pub every: u64,
}

/// Shows a run on stderr.
pub struct Watch {
    bar: ProgressBar,
    show: Show,
    steps: u64,
    header_due: bool,
    /// Rewards of the first steps, and of the newest ones.
    first: Vec<f32>,
    newest: VecDeque<f32>,
    /// Seconds of the newest steps.
    seconds: VecDeque<f32>,
    /// Steps done.
    done: u64,
    /// Tokens of a completion, as far as is known.
    response_tokens: f32,
    samples: Vec<Sample>,
    keys: Option<Keys>,
}

impl Watch {
    /// For this run.
    pub fn new(trainer: &Trainer<'_>, show: Show) -> Watch {
        let settings = trainer.settings();
        let bar = if show.quiet { ProgressBar::hidden() } else { token_bar() };
        Watch {
            keys: if bar.is_hidden() { None } else { Keys::listen() },
            bar,
            show,
            steps: settings.steps,
            header_due: true,
            first: Vec::new(),
            newest: VecDeque::new(),
            seconds: VecDeque::new(),
            done: 0,
            response_tokens: settings.max_response as f32 / 2.0,
            samples: Vec::new(),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, line: &str) {
        match (self.show.quiet, self.bar.is_hidden()) {
            (true, _) => {}
            (false, true) => eprintln!("{line}"),
            (false, false) => self.bar.println(line),
        }
    }

    /// What is left of the run, as the newest steps went.
    fn left(&self) -> String {
        let n = self.seconds.len() as f32;
        if n == 0.0 || self.done >= self.steps {
            return String::new();
        }
        let mean = self.seconds.iter().sum::<f32>() / n;
        let left = mean as f64 * (self.steps - self.done) as f64;
        format!("step {}/{}, {} left", self.done + 1, self.steps, duration(left))
    }

    fn show_on_key(&mut self) {
        if self.keys.as_ref().is_some_and(Keys::pressed) {
            self.show_sample();
        }
    }

    /// The completion that teaches most at a glance: the first right one and the first wrong one would do; one is
    /// shown, right and wrong in turn where the step has both.
    fn show_sample(&self) {
        let is_right = |s: &&Sample| s.verdict.as_ref().is_some_and(|v| v.reward > 0.0);
        let right = self.samples.iter().find(is_right);
        let wrong = self.samples.iter().find(|s| !is_right(s));
        let (first, second) =
            if self.done.is_multiple_of(2) { (right, wrong) } else { (wrong, right) };
        let Some(sample) = first.or(second) else { return };
        let faint = dim();
        let end = if sample.truncated { ", cut off" } else { "" };
        let said = sample.verdict.as_ref();
        let reward = said.map(|v| format!("reward {:.3} ({}), ", v.reward, v.reason));
        let (step, problem, tokens) = (sample.step, &sample.problem, sample.tokens);
        let reward = reward.unwrap_or_default();
        let heading = format!("--- step {step}, {problem}: {reward}{tokens} tokens{end}");
        self.say(&faint.apply_to(heading).to_string());
        let line = |name: &str, text: &str, most: usize| {
            self.say(&format!("{} {}", faint.apply_to(name), indented(&clipped(text, most))));
        };
        line("prompt:", &sample.prompt, SHOWN.0);
        line("answer:", &sample.completion, SHOWN.1);
        if let Some(verdict) = said {
            line("right: ", &verdict.answer, SHOWN.0);
        }
    }
}

fn dim() -> Style {
    Style::new().for_stderr().dim()
}

fn duration(seconds: f64) -> HumanDuration {
    HumanDuration(std::time::Duration::from_secs(seconds.max(1.0) as u64))
}

/// The text, or its beginning and its end where it is longer than `most` characters.
fn clipped(text: &str, most: usize) -> String {
    let chars: Vec<char> = text.trim().chars().collect();
    if chars.len() <= most {
        return chars.into_iter().collect();
    }
    let (head, tail) = (most / 2, most - most / 2);
    let part = |chars: &[char]| chars.iter().collect::<String>();
    format!("{} .. {}", part(&chars[..head]), part(&chars[chars.len() - tail..]))
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n        ")
}

fn number(x: Option<f32>, digits: usize) -> String {
    x.map_or("-".into(), |x| format!("{x:.digits$}"))
}

fn mean(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let n = values.len() as f32;
    values.sum::<f32>() / n
}

impl Watch {
    fn begin(&mut self, r: &StepRecord, glossary: &str, header: &str) -> String {
        if self.header_due {
            self.header_due = false;
            self.say(&dim().apply_to(glossary).to_string());
            self.say(&Style::new().for_stderr().bold().apply_to(header).to_string());
        }
        let phase = match r.phase {
            Phase::Internal => format!("layer {}", r.layer),
            Phase::Final => "final".into(),
        };
        format!("{:>5}  {phase:<8}", format!("{}/{}", r.step, self.steps))
    }

    /// How far the reward has come since the start.
    fn trend(&mut self, reward: f32) -> String {
        if self.first.len() < TREND {
            self.first.push(reward);
        }
        self.newest.push_back(reward);
        if self.newest.len() > TREND {
            self.newest.pop_front();
        }
        let change = mean(self.newest.iter().copied()) - mean(self.first.iter().copied());
        let text = style(format!("{change:>+6.3}")).for_stderr();
        match change {
            c if c > 0.005 => text.green().to_string(),
            c if c < -0.005 => text.red().to_string(),
            _ => text.to_string(),
        }
    }

    /// The line of completions that were sampled and judged.
    fn sampled(&mut self, r: &StepRecord, rollout: &RolloutRecord) -> String {
        let begin = self.begin(
            r,
            "reward: mean of the step; trend: of the newest steps against the first; signal: share of prompts whose \
             answers differ in reward;\nlength: tokens of an answer; entropy: of the trained policy, nats; clip: share of \
             clipped tokens; grad: its norm;\ndrift: |log-prob when sampled - when trained|, nats; t/s: tokens a second",
            " step  phase     reward   trend  signal  length  entropy   clip    grad    drift  roll t/s  upd t/s     s",
        );
        let trend = self.trend(rollout.reward);
        let sampled = r.sampled.as_ref();
        format!(
            "{begin}  {:>6.3}  {trend}  {:>6.2}  {:>6.1}  {:>7}  {:>5}  {:>6}  {:>7}  {:>8.0}  {:>7.0}  {:>4.1}",
            rollout.reward,
            rollout.groups_with_signal,
            sampled.map_or(f32::NAN, |s| s.response_tokens),
            number(r.entropy_nats, 3),
            number(rollout.clip_fraction, 3),
            number(r.gradient_norm, 3),
            number(rollout.drift_nats, 4),
            sampled.map_or(f32::NAN, |s| s.rollout_tokens_per_s),
            r.update_tokens_per_s,
            r.seconds,
        )
    }

    /// The line of given rows and teachers.
    fn given(&mut self, r: &StepRecord) -> String {
        let begin = self.begin(
            r,
            "margin: of chosen over rejected rewards; right: share of pairs in the right order; entropy: nats; grad: norm \
             of the gradient; upd t/s: tokens a second",
            " step  phase     epoch     loss  margin  right  entropy    grad   tokens  upd t/s     s",
        );
        let said = |name: &str, digits: usize| {
            let value = r.objective.get(name).and_then(|v| v.as_f64());
            number(value.map(|v| v as f32), digits)
        };
        format!(
            "{begin}  {:>5}  {:>7}  {:>6}  {:>5}  {:>7}  {:>6}  {:>7}  {:>7.0}  {:>4.1}",
            number(r.epoch, 2),
            number(r.loss, 4),
            said("rewards/margins", 3),
            said("rewards/accuracies", 2),
            number(r.entropy_nats, 3),
            number(r.gradient_norm, 3),
            r.trained_tokens,
            r.update_tokens_per_s,
            r.seconds,
        )
    }
}

/// A bar on stderr, hidden where that is no terminal.
pub fn bar() -> ProgressBar {
    styled("{msg:10} [{bar:30}] {pos}/{len} {elapsed}")
}

/// The same, of tokens, with what is left of the run behind it.
fn token_bar() -> ProgressBar {
    styled("{msg:10} [{bar:30}] {prefix}")
}

fn styled(template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar
}

impl Observer for Watch {
    fn rollout(&mut self, what: &str, progress: Progress) {
        self.show_on_key();
        let open = (progress.total - progress.done) as f32;
        // At least one token more of each that has not ended.
        let wanted = (progress.total as f32 * self.response_tokens) as u64;
        let least = progress.tokens as u64 + open as u64;
        self.bar.set_message(what.to_string());
        self.bar.set_length(wanted.max(least));
        self.bar.set_position(progress.tokens as u64);
        self.bar.set_prefix(format!(
            "{}/{} answers, {} tokens  {}",
            progress.done,
            progress.total,
            HumanCount(progress.tokens as u64),
            self.left()
        ));
    }

    fn update(&mut self, tokens: usize, total: usize) {
        self.show_on_key();
        self.bar.set_message("update");
        self.bar.set_length(total as u64);
        self.bar.set_position(tokens as u64);
        let (tokens, total) = (HumanCount(tokens as u64), HumanCount(total as u64));
        self.bar.set_prefix(format!("{tokens}/{total} tokens  {}", self.left()));
    }

    fn samples(&mut self, samples: &[Sample]) {
        self.samples = samples.to_vec();
    }

    fn step(&mut self, r: &StepRecord) {
        self.done = r.step;
        self.seconds.push_back(r.seconds);
        if self.seconds.len() > RECENT {
            self.seconds.pop_front();
        }
        if let Some(sampled) = &r.sampled {
            self.response_tokens = sampled.response_tokens;
        }
        let mut line = match &r.rollout {
            Some(rollout) => self.sampled(r, rollout),
            None => self.given(r),
        };
        if let Some(accuracy) = r.accuracy {
            line += &format!("  accuracy {accuracy:.3}");
        }
        if let Some(rows) = &r.held_out {
            line += &format!("  held-out loss {:.4}", rows.eval_loss);
        }
        if let Some(c) = &r.communication {
            let mb = c.comm_bytes as f64 / 1e6;
            line += &format!("  comm {:.2} wait {:.2} s, {mb:.1} MB", c.comm_s, c.comm_wait_s);
        }
        if r.updates_skipped > 0 {
            line += &format!("  ({} updates skipped: gradient not finite)", r.updates_skipped);
        }
        self.say(&line);
        if self.show.every > 0 && r.step.is_multiple_of(self.show.every) {
            self.show_sample();
        }
    }

    fn note(&mut self, text: &str) {
        match text.strip_prefix("warning:") {
            Some(rest) => {
                let line = format!("{}{rest}", style("warning:").for_stderr().yellow().bold());
                if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
            }
            None => self.say(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_keeps_both_ends() {
        assert_eq!(clipped(" abc ", 5), "abc");
        assert_eq!(clipped("abcdefgh", 4), "ab .. gh");
        assert_eq!(indented("a\nb"), "a\n        b");
    }
}

//! What a person sees of a run: a bar for rollout and update, one line per step.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::rollout::Progress;
use crate::train::{Observer, Phase, StepRecord, Trainer};

/// Shows a run on stderr.
pub struct Watch {
    bar: ProgressBar,
    steps: u64,
    header_due: bool,
}

impl Watch {
    /// For this run.
    pub fn new(trainer: &Trainer<'_>) -> Watch {
        Watch { bar: bar(), steps: trainer.config().steps, header_due: true }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }
}

/// A bar on stderr, hidden where that is no terminal.
pub fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg:10} [{bar:30}] {pos}/{len} {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar
}

impl Observer for Watch {
    fn rollout(&mut self, what: &str, progress: Progress) {
        self.bar.set_message(what.to_string());
        self.bar.set_length(progress.total as u64);
        self.bar.set_position(progress.done as u64);
    }

    fn update(&mut self, done: usize, total: usize) {
        self.bar.set_message("update");
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    fn step(&mut self, r: &StepRecord) {
        if self.header_due {
            self.header_due = false;
            self.say(" step  phase     reward  signal  length  entropy  clip   grad    drift   roll t/s  upd t/s    s");
        }
        let phase = match r.phase {
            Phase::Internal => format!("layer {}", r.layer),
            Phase::Final => "final".into(),
        };
        let number =
            |x: Option<f32>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        let mut line = format!(
            "{:>5}  {:<8}  {:>6.3}  {:>6.2}  {:>6.1}  {:>7}  {:>5}  {:>6}  {:>7}  {:>8.0}  {:>7.0}  {:>4.1}",
            format!("{}/{}", r.step, self.steps),
            phase,
            r.reward,
            r.groups_with_signal,
            r.response_tokens,
            number(r.entropy_nats, 3),
            number(r.clip_fraction, 3),
            number(r.gradient_norm, 3),
            number(r.drift_nats, 4),
            r.rollout_tokens_per_s,
            r.update_tokens_per_s,
            r.seconds,
        );
        if let Some(accuracy) = r.accuracy {
            line += &format!("  accuracy {accuracy:.3}");
        }
        if r.updates_skipped > 0 {
            line += &format!("  ({} updates skipped: gradient not finite)", r.updates_skipped);
        }
        self.say(&line);
    }

    fn note(&mut self, text: &str) {
        self.say(text);
    }
}

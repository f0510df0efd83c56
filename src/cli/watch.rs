//! What a person sees of a run: a bar for rollout and update, one line per step.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::rollout::Progress;
use crate::train::{Observer, Phase, RolloutRecord, StepRecord, Trainer};

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

fn number(x: Option<f32>, digits: usize) -> String {
    x.map_or("-".into(), |x| format!("{x:.digits$}"))
}

impl Watch {
    fn begin(&mut self, r: &StepRecord, header: &str) -> String {
        if self.header_due {
            self.header_due = false;
            self.say(header);
        }
        let phase = match r.phase {
            Phase::Internal => format!("layer {}", r.layer),
            Phase::Final => "final".into(),
        };
        format!("{:>5}  {phase:<8}", format!("{}/{}", r.step, self.steps))
    }

    /// The line of completions that were sampled and judged.
    fn sampled(&mut self, r: &StepRecord, rollout: &RolloutRecord) -> String {
        let begin = self.begin(
            r,
            " step  phase     reward  signal  length  entropy  clip   grad    drift   roll t/s  upd t/s    s",
        );
        format!(
            "{begin}  {:>6.3}  {:>6.2}  {:>6.1}  {:>7}  {:>5}  {:>6}  {:>7}  {:>8.0}  {:>7.0}  {:>4.1}",
            rollout.reward,
            rollout.groups_with_signal,
            rollout.response_tokens,
            number(r.entropy_nats, 3),
            number(rollout.clip_fraction, 3),
            number(r.gradient_norm, 3),
            number(rollout.drift_nats, 4),
            rollout.rollout_tokens_per_s,
            r.update_tokens_per_s,
            r.seconds,
        )
    }

    /// The line of given rows and teachers.
    fn given(&mut self, r: &StepRecord) -> String {
        let begin = self.begin(
            r,
            " step  phase     epoch     loss  margin  right  entropy   grad    tokens  upd t/s    s",
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
        if r.updates_skipped > 0 {
            line += &format!("  ({} updates skipped: gradient not finite)", r.updates_skipped);
        }
        self.say(&line);
    }

    fn note(&mut self, text: &str) {
        self.say(text);
    }
}

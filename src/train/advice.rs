//! What a person should know of a step: that answers are cut off, that nothing can be learnt, and what helps.

use super::{RolloutRecord, Settings, StepRecord};

/// Share of answers cut off that is worth a word.
const CUT_OFF: f32 = 0.2;
/// Steps until the same is said again.
const AGAIN: u64 = 20;
/// Steps in a row without signal at which it is said; of a run's first step at once.
const SILENT: [u64; 2] = [4, 10];

/// When what was last said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Advice {
    /// Step at which cut answers were last spoken of; 0 is never.
    cut_off: u64,
    /// Step at which the want of signal was last spoken of.
    silent: u64,
}

impl Advice {
    /// What is to be said after a step that was the `silent`th in a row without signal (0: it had some).
    pub fn after(&mut self, record: &StepRecord, silent: u64, settings: &Settings) -> Vec<String> {
        let (Some(rollout), Some(sampled)) = (&record.rollout, &record.sampled) else {
            return Vec::new();
        };
        let mut words = Vec::new();
        let due = self.cut_off == 0 || record.step >= self.cut_off + AGAIN;
        if sampled.truncated > CUT_OFF && due {
            self.cut_off = record.step;
            words.push(format!(
                "warning: {:.0} % of the answers were cut off at --max-response {}, before they could be right: raise it, \
                 or ask for short answers (--system, --reward \"math + overlong:N\")",
                100.0 * sampled.truncated,
                settings.max_response
            ));
        }
        let due = self.silent == 0 || record.step >= self.silent + AGAIN;
        let long = SILENT.contains(&silent) && due;
        // Ten in a row are worth a second word, however soon.
        if long || silent == SILENT[1] || (silent == 1 && record.step == 1) {
            self.silent = record.step;
            words.push(silence(rollout, silent));
        }
        words
    }
}

fn silence(rollout: &RolloutRecord, silent: u64) -> String {
    let steps = match silent {
        1 => "this step".to_string(),
        n => format!("{n} steps"),
    };
    let (what, help) = match rollout.reward {
        reward if reward <= 0.0 => (
            "reward 0 in all groups",
            "see in completions.jsonl whether answers are wrong, cut off, or not in the form that the reward reads; \
             then take easier problems, say the form with --system, raise --max-response, or start from an adapter \
             trained with --algo sft",
        ),
        reward if reward >= 1.0 => ("all answers right", "take harder problems"),
        _ => (
            "equal rewards within each group",
            "a larger --group, a higher --temperature or problems of middling difficulty make them differ",
        ),
    };
    format!("warning: {what} for {steps}, so nothing was learnt: {help}")
}

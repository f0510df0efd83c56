//! A training run for TensorBoard: event files as TensorFlow's `event.proto`, `summary.proto`, `tensor.proto` have them,
//! under the tags that trainers of the field write.
//!
//! A file is a sequence of records: length (u64), its masked CRC32C, the event, its masked CRC32C, little-endian; the
//! mask is `rotate_right(crc, 15) + 0xa282ead8` (TensorFlow's `record_writer.cc`, `crc32c.h`).

use std::fs::File;
use std::io::Write;
use std::path::Path;

use prost::Message;
use serde_json::Value;

use crate::{Error, Result};

/// Name of the file: TensorBoard looks for `tfevents`, takes the number for a time, and the rest for a host's name.
pub const FILE: &str = "events.out.tfevents.0.bupo-gguf";
/// What a file says of itself first.
const VERSION: &str = "brain.Event:2";
/// `DT_STRING`.
const STRING: i32 = 7;
/// Keys of `metrics.jsonl` and the tags of TRL and its kin.
const TAGS: [(&str, &str); 31] = [
    ("loss", "train/loss"),
    ("learning_rate", "train/learning_rate"),
    ("gradient_norm", "train/grad_norm"),
    ("entropy_nats", "train/entropy"),
    ("epoch", "train/epoch"),
    ("reward", "train/reward"),
    ("groups_with_signal", "train/frac_groups_with_signal"),
    ("response_tokens", "train/completions/mean_length"),
    ("truncated", "train/completions/clipped_ratio"),
    ("clip_fraction", "train/clip_ratio"),
    ("kl_nats", "train/kl"),
    ("drift_nats", "train/sampling_logp_difference"),
    ("value_loss", "train/value_loss"),
    ("explained_variance", "train/explained_variance"),
    ("layer", "train/layer"),
    ("trained_tokens", "train/num_tokens"),
    ("accuracy", "eval/accuracy"),
    ("eval_loss", "eval/loss"),
    ("eval_perplexity", "eval/perplexity"),
    ("eval_rewards/accuracies", "eval/rewards/accuracies"),
    ("eval_rewards/margins", "eval/rewards/margins"),
    ("rollout_tokens_per_s", "perf/rollout_tokens_per_second"),
    ("update_tokens_per_s", "perf/update_tokens_per_second"),
    ("seconds", "perf/step_time"),
    ("prompt_seconds", "perf/time/prompts"),
    ("decode_seconds", "perf/time/decoding"),
    ("sampling_seconds", "perf/time/sampling"),
    ("tail_seconds", "perf/time/tail"),
    ("scoring_seconds", "perf/time/scoring"),
    ("update_seconds", "perf/time/update"),
    ("updates_skipped", "train/updates_skipped"),
];
/// Keys that an objective writes begin so.
const OF_OBJECTIVE: [&str; 2] = ["rewards/", "logps/"];

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<Tensor>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// An event file that grows.
pub struct Events {
    file: File,
    path: std::path::PathBuf,
    /// Seconds of Unix time of the last event.
    now: f64,
}

impl Events {
    /// A new file in `folder`, which is made, in place of one that is there; the run began at this second of Unix time.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn create(folder: &Path, began: f64) -> Result<Events> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = folder.join(FILE);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut events = Events { file, path, now: began };
        let version = Some(VERSION.to_string());
        events.write(Event { wall_time: began, step: 0, file_version: version, summary: None })?;
        Ok(events)
    }

    /// The figures of a step, a line of `metrics.jsonl`, and its completions, lines of `completions.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn step(&mut self, record: &Value, completions: &[Value]) -> Result<()> {
        self.now += record.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
        let step = record.get("step").and_then(Value::as_i64).unwrap_or(0);
        let mut value = figures(record);
        let shown = super::completions::ends(completions);
        if !shown.is_empty() {
            value.push(texts(&shown));
        }
        let summary = Some(Summary { value });
        self.write(Event { wall_time: self.now, step, file_version: None, summary })
    }

    fn write(&mut self, event: Event) -> Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(&data);
        record.extend(masked(&data).to_le_bytes());
        self.file.write_all(&record).map_err(Error::io("write", &self.path))
    }
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn figures(record: &Value) -> Vec<Entry> {
    let entry = |tag: String, value: f64| Entry {
        tag,
        simple_value: Some(value as f32),
        tensor: None,
        metadata: None,
    };
    let number = |key: &str| record.get(key).and_then(Value::as_f64);
    let named = TAGS.iter().filter_map(|(key, tag)| Some(entry(tag.to_string(), number(key)?)));
    let mut entries: Vec<Entry> = named.collect();
    for (key, value) in record.as_object().into_iter().flatten() {
        match value {
            Value::Number(x) if OF_OBJECTIVE.iter().any(|begin| key.starts_with(begin)) => {
                entries.extend(x.as_f64().map(|x| entry(format!("train/{key}"), x)));
            }
            Value::Object(parts) if key == "reward_parts" => {
                let part = |(name, x): (&String, &Value)| {
                    Some(entry(format!("train/rewards/{name}/mean"), x.as_f64()?))
                };
                entries.extend(parts.iter().filter_map(part));
            }
            _ => {}
        }
    }
    entries
}

/// Completions as TensorBoard's text plugin shows them, in Markdown.
fn texts(completions: &[&Value]) -> Entry {
    let text = |c: &Value, key: &str| match c.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let indented = |text: &str| text.lines().map(|l| format!("    {l}\n")).collect::<String>();
    let one = |c: &&Value| -> Vec<u8> {
        let heading = match c.get("reward") {
            Some(reward) => format!(
                "**{}: reward {reward}** ({}); right: {}",
                text(c, "problem"),
                text(c, "reason"),
                text(c, "answer")
            ),
            None => format!("**{}**", text(c, "problem")),
        };
        format!(
            "{heading}\n\n{}\n{}",
            indented(&text(c, "prompt")),
            indented(&format!("=> {}", text(c, "completion"))),
        )
        .into_bytes()
    };
    let string_val: Vec<Vec<u8>> = completions.iter().map(one).collect();
    let shape = Shape { dim: vec![Dim { size: string_val.len() as i64 }] };
    let plugin_data = Some(Plugin { plugin_name: "text".into() });
    Entry {
        tag: "completions/text_summary".into(),
        simple_value: None,
        tensor: Some(Tensor { dtype: STRING, shape: Some(shape), string_val }),
        metadata: Some(Metadata { plugin_data }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_are_framed_and_hold_what_was_said() {
        // The check value of CRC32C (RFC 3720, appendix B.4: 32 bytes of zeros), masked.
        assert_eq!(masked(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::create(dir.path(), 1000.0).unwrap();
        let record = json!({"step": 3, "reward": 0.5, "seconds": 2.0, "rewards/margins": 0.25, "loss": null});
        let completion = json!({"problem": "p", "reward": 1.0, "completion": "42", "answer": "42"});
        events.step(&record, &[completion]).unwrap();
        let bytes = std::fs::read(dir.path().join(FILE)).unwrap();
        let mut rest = bytes.as_slice();
        let mut read = Vec::new();
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + n];
            assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
            assert_eq!(rest[12 + n..16 + n], masked(data).to_le_bytes());
            read.push(Event::decode(data).unwrap());
            rest = &rest[16 + n..];
        }
        assert_eq!(read[0].file_version.as_deref(), Some(VERSION));
        assert_eq!((read[1].step, read[1].wall_time), (3, 1002.0));
        let values = &read[1].summary.as_ref().unwrap().value;
        let tags: Vec<_> = values.iter().map(|v| (v.tag.as_str(), v.simple_value)).collect();
        let expected = [
            ("train/reward", Some(0.5)),
            ("perf/step_time", Some(2.0)),
            ("train/rewards/margins", Some(0.25)),
            ("completions/text_summary", None),
        ];
        assert_eq!(tags, expected);
    }
}

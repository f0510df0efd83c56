//! Settings by name, of published experiments and by a model's size; whatever is written beside them on the command
//! line stands.

use clap::ValueEnum;
use toml::{Table, Value};

use super::{Algorithm, TrainConfig};
use crate::Result;
use crate::model::{Config, Model};

/// Settings by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// The reference runs of the paper, with LoRA instead of all weights
    BupoPaper,
    /// A model of about 0.6 B parameters, such as Qwen3-0.6B or SmolLM2-360M
    #[value(name = "0.6b")]
    B06,
    /// About 1.7 B parameters: Qwen3-1.7B, Llama-3.2-1B
    #[value(name = "1.7b")]
    B17,
    /// About 4 B parameters: Qwen3-4B, Gemma 3 4B, Llama-3.2-3B
    #[value(name = "4b")]
    B4,
    /// About 8 B parameters: Qwen3-8B, Llama-3.1-8B
    #[value(name = "8b")]
    B8,
}

/// How large a model is, as far as defaults go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Tiny,
    B06,
    B17,
    B4,
    B8,
}

impl Size {
    /// Of a model.
    pub fn of(model: &Model) -> Size {
        match model.n_params() as f64 / 1e9 {
            n if n < 0.05 => Size::Tiny,
            n if n < 1.2 => Size::B06,
            n if n < 2.8 => Size::B17,
            n if n < 6.0 => Size::B4,
            _ => Size::B8,
        }
    }

    /// The model's size, in words.
    pub fn words(self, model: &Model) -> String {
        let million = model.n_params() as f64 / 1e6;
        match million {
            m if m < 10.0 => format!("{m:.1} million parameters"),
            m if m < 950.0 => format!("{m:.0} million parameters"),
            m => format!("{:.1} billion parameters", m / 1e3),
        }
    }

    /// Learning rate of an adapter. Adapters want about ten times the rate of full fine-tuning, larger models less
    /// than smaller ones; those of rows and teachers were measured on 135 million parameters (`docs/MATHS.md`). From rewards, by
    /// `docs/EXPERIMENTS.md`: 1e-3 is what the adder learnt at; at 1e-4 with one update a step SmolLM2 135M learnt and Gemma 3 270M
    /// lost the form of its answers, so that it is half of that for the two updates of a step.
    pub fn lr(self, algo: Algorithm) -> f32 {
        let [tiny, b06, b17, b4, b8] = match algo {
            Algorithm::Sft => [1e-3, 2e-4, 2e-4, 1e-4, 1e-4],
            Algorithm::Distill => [1e-3, 3e-4, 2e-4, 1e-4, 1e-4],
            Algorithm::Dpo | Algorithm::Kto => [5e-4, 5e-5, 2e-5, 1e-5, 1e-5],
            Algorithm::Orpo | Algorithm::Simpo => [5e-4, 5e-5, 2e-5, 1e-5, 1e-5],
            _ => [1e-3, 5e-5, 2e-5, 1e-5, 1e-5],
        };
        match self {
            Size::Tiny => tiny,
            Size::B06 => b06,
            Size::B17 => b17,
            Size::B4 => b4,
            Size::B8 => b8,
        }
    }

    /// Completions end at this length where the data says nothing, tokens.
    pub fn max_response(self) -> usize {
        match self {
            Size::Tiny => 256,
            Size::B06 | Size::B17 => 1024,
            Size::B4 | Size::B8 => 2048,
        }
    }

    fn prompts_per_step(self) -> i64 {
        match self {
            Size::Tiny | Size::B06 | Size::B17 => 32,
            Size::B4 => 16,
            Size::B8 => 8,
        }
    }

    /// Settings of its preset for an algorithm.
    fn settings(self, algo: Algorithm) -> Vec<(&'static str, Value)> {
        let lr: f64 = self.lr(algo).to_string().parse().expect("a number as it is written");
        let mut settings: Vec<(&'static str, Value)> = vec![
            ("lr", lr.into()),
            ("prompts-per-step", self.prompts_per_step().into()),
            ("rank", 16.into()),
        ];
        if algo.is_rewarded() {
            settings.push(("group", 8.into()));
            settings.push(("max-response", (self.max_response() as i64).into()));
        }
        settings
    }
}

/// Settings that a preset makes, and what to know of them.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The settings.
    pub config: TrainConfig,
    /// Where they are not the paper's own, and why; a line each.
    pub notes: Vec<String>,
}

/// Settings by their names in `config.toml`, and notes on them.
type Named = (Vec<(&'static str, Value)>, Vec<String>);

/// The paper's learning rate, for all weights.
const FULL_LR: f64 = 1e-6;
/// Adapters want about ten times the rate of full fine-tuning (Schulman et al., "LoRA Without Regret").
const LORA_LR: f64 = 1e-5;

impl Preset {
    /// The settings for this model. `given` are those that the user wrote, as `config.toml` names them.
    ///
    /// # Errors
    /// [`Error::Engine`] when a value has no form in toml.
    pub fn apply(self, model: &Config, given: &Table) -> Result<Applied> {
        let (settings, mut notes) = self.settings(model, given)?;
        let mut table = TrainConfig::default().table()?;
        table.extend(settings.iter().map(|(name, value)| (name.to_string(), value.clone())));
        table.extend(given.clone());
        let kept = settings
            .iter()
            .filter(|(name, value)| given.get(*name).is_some_and(|own| own != value));
        notes.extend(kept.map(|(name, value)| {
            format!("{name}: {} as you ask, the preset has {value}", given[*name])
        }));
        Ok(Applied { config: TrainConfig::from_table(table, "--preset")?, notes })
    }
}

impl Preset {
    fn settings(self, model: &Config, given: &Table) -> Result<Named> {
        let size = match self {
            Preset::BupoPaper => {
                let algo = TrainConfig::from_table(given.clone(), "--preset")?.algo;
                let (mut settings, notes) = bupo_paper(model);
                settings.retain(|(name, _)| *name != "internal-steps" || algo.has_internal_phase());
                return Ok((settings, notes));
            }
            Preset::B06 => Size::B06,
            Preset::B17 => Size::B17,
            Preset::B4 => Size::B4,
            Preset::B8 => Size::B8,
        };
        let settings = size.settings(TrainConfig::from_table(given.clone(), "--preset")?.algo);
        let words = settings.iter().map(|(name, value)| format!("{name} {value}"));
        let note = words.collect::<Vec<_>>().join(", ");
        Ok((settings, vec![note]))
    }
}

/// Settings of the paper's reference runs and notes on them.
fn bupo_paper(model: &Config) -> Named {
    let family = model.family.name;
    let qwen3 = family == "qwen3";
    let max_response: i64 = if qwen3 { 8192 } else { 3072 };
    let mut notes = vec![
        format!("lr: the paper's {FULL_LR:e} is for full fine-tuning; {LORA_LR:e} for the adapter"),
        "weight-decay: the paper's 0.01 is for full fine-tuning; it acts on the adapter's A and B here".into(),
        "rank, alpha, targets: the paper trains all weights; the adapter's settings stay this program's".into(),
        "reward: hendrycks is the paper's comparison of strings; --reward math compares by meaning".into(),
        "data: the paper trains on deepmath-5k; give it with --data, and test sets with --eval-data".into(),
    ];
    let layer = match (family, model.n_layer) {
        ("qwen3", 36) => Some(6),
        ("llama", 28) => Some(27),
        ("llama", 32) => Some(31),
        _ => None,
    };
    if layer.is_none() {
        notes.push(format!(
            "internal-layer: the paper has none for {} layers; this program's default stays",
            model.n_layer
        ));
    }
    // Qwen3-4B; the others have 20 (the paper's appendix).
    let internal_steps = if qwen3 && model.n_embd == 2560 { 30 } else { 20 };
    let mut settings: Vec<(&'static str, Value)> = vec![
        ("algo", "bupo".into()),
        ("internal-steps", internal_steps.into()),
        ("steps", 300.into()),
        ("prompts-per-step", 128.into()),
        ("group", 8.into()),
        ("mini-batch", 32.into()),
        ("max-prompt", 1024.into()),
        ("max-response", max_response.into()),
        // Room for the longest sequence.
        ("micro-batch-tokens", (1024 + max_response).into()),
        ("kv-mib", 4096.into()),
        ("temperature", 1.0.into()),
        ("top-p", 1.0.into()),
        ("top-k", 0.into()),
        ("baseline", "group-std".into()),
        ("ratio", "token".into()),
        ("surrogate", "clip".into()),
        ("loss-agg", "token-mean".into()),
        ("clip-low", 0.2.into()),
        ("clip-high", 0.2.into()),
        ("clip-c", 10.0.into()),
        ("kl-coef", 0.0.into()),
        ("reward", "hendrycks".into()),
        ("lr", LORA_LR.into()),
        ("schedule", "constant".into()),
        ("beta1", 0.9.into()),
        ("beta2", 0.999.into()),
        ("weight-decay", 0.01.into()),
        ("clip-norm", 1.0.into()),
        ("template", if qwen3 { "qwen3-no-think" } else { "octothinker" }.into()),
        ("system", SYSTEM.into()),
    ];
    settings.extend(layer.map(|layer| ("internal-layer", Value::Integer(layer))));
    (settings, notes)
}

/// The paper's system prompt (PAPER section 4).
const SYSTEM: &str = r"Please reason step by step, and put your final answer within \boxed{}.";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Family, Model};
    use crate::train::LayerChoice;

    #[test]
    fn the_papers_values_hold_but_for_what_is_written() {
        let demo = Model::open("demo".as_ref()).unwrap();
        let mut model = demo.config().clone();
        (model.n_layer, model.n_embd) = (36, 2560);
        assert_eq!(model.family.name, "qwen3");
        let given: Table = "steps = 5\ngroup = 8".parse().unwrap();
        let Applied { config, notes } = Preset::BupoPaper.apply(&model, &given).unwrap();
        config.check().unwrap();
        assert_eq!(
            (config.internal_layer, config.internal_steps),
            (Some(LayerChoice::Layer(6)), Some(30))
        );
        assert_eq!((config.steps, config.prompts_per_step, config.mini_batch), (5, 128, Some(32)));
        assert_eq!((config.max_prompt, config.max_response), (Some(1024), Some(8192)));
        assert_eq!((config.lr, config.prompts.template.as_str()), (Some(1e-5), "qwen3-no-think"));
        assert!(
            notes.iter().any(|n| n.starts_with("lr: the paper's 1e-6 is for full fine-tuning"))
        );
        assert!(notes.iter().any(|n| n == "steps: 5 as you ask, the preset has 300"), "{notes:?}");
        assert!(!notes.iter().any(|n| n.starts_with("group")));
        (model.family, model.n_layer) = (Family::named("llama").unwrap(), 28);
        let config = Preset::BupoPaper.apply(&model, &Table::new()).unwrap().config;
        config.check().unwrap();
        assert_eq!(
            (config.internal_layer, config.internal_steps),
            (Some(LayerChoice::Layer(27)), Some(20))
        );
        assert_eq!(
            (config.max_response, config.prompts.template.as_str()),
            (Some(3072), "octothinker")
        );
        // The same settings for what BuPO is compared with.
        let given: Table = "algo = 'grpo'".parse().unwrap();
        let config = Preset::BupoPaper.apply(&model, &given).unwrap().config;
        config.check().unwrap();
        assert_eq!(config.internal_steps, None);
        model.n_layer = 8;
        let Applied { config, notes } = Preset::BupoPaper.apply(&model, &Table::new()).unwrap();
        assert_eq!(config.internal_layer, None);
        assert!(notes.iter().any(|n| n.contains("none for 8 layers")), "{notes:?}");
    }
}

//! The training loop as a library: ten GRPO steps on the demo model, then a decode with the result.
//!
//! `cargo run --release --example train`

use bupo_gguf::train::{Algorithm, Silent};
use bupo_gguf::{Model, Result, TrainConfig, Trainer};

fn main() -> Result<()> {
    let model = Model::open("demo".as_ref())?;
    let config = TrainConfig {
        algo: Algorithm::Grpo,
        data: "task:add".into(),
        eval_problems: 200,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(&model, config)?;
    println!("accuracy before: {:?}", trainer.evaluate("before", &mut Silent)?);
    for step in 1..=10 {
        let (record, samples) = trainer.step(step, &mut Silent)?;
        let (shown, rollout) = (&samples[0], record.rollout.expect("GRPO samples"));
        println!(
            "step {step}: reward {:.3}, e.g. {:?} to {:?}",
            rollout.reward, shown.completion, shown.prompt
        );
    }
    println!("accuracy after: {:?}", trainer.evaluate("after", &mut Silent)?);
    println!("{} trained values, rank {}", trainer.lora().n_params(), trainer.lora().rank());
    Ok(())
}

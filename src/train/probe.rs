//! A check before the first step: every tensor of the adapter that the phase should reach gets a
//! gradient, and none beyond it does.
//!
//! llama.cpp's own trainer loses the gradients of k and v in its KV cache without a word; training that
//! cannot learn should stop here, with the reason. B is zero at the start, which makes the gradient of A
//! zero too, so B is random for the time of the probe.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::model::{Batch, Engine, Lora, Model, Policy};
use crate::{Error, Result};

/// Size of B's values during the probe.
const PROBE_B: f32 = 0.02;

/// Runs one backward with random cotangents over `tokens` under `policy` and looks at every tensor.
///
/// # Errors
/// [`Error::Engine`] naming the first tensor whose gradient is zero, not finite, or should not be.
pub fn probe(
    engine: &mut Engine,
    model: &Model,
    lora: &mut Lora,
    policy: Policy,
    tokens: &[i32],
) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(0x9a0be);
    let kept: Vec<Vec<f32>> = bs(lora).map(|i| lora.tensors().values(i).to_vec()).collect();
    for i in bs(lora) {
        for value in lora.tensors_mut().values_mut(i).iter_mut() {
            *value += rng.random_range(-PROBE_B..PROBE_B);
        }
    }
    let outcome = gradients(engine, model, lora, policy, tokens, &mut rng);
    for (i, values) in bs(lora).zip(kept) {
        lora.tensors_mut().values_mut(i).copy_from_slice(&values);
    }
    outcome
}

fn bs(lora: &Lora) -> impl Iterator<Item = usize> + use<> {
    (0..lora.slots().len()).map(|slot| 2 * slot + 1)
}

fn gradients(
    engine: &mut Engine,
    model: &Model,
    lora: &Lora,
    policy: Policy,
    tokens: &[i32],
    rng: &mut ChaCha8Rng,
) -> Result<()> {
    let (prompt, completion) = tokens.split_at(tokens.len() / 2);
    let mut batch = Batch::default();
    batch.push_group(prompt, &[completion], model.config().n_vocab)?;
    let mut gradients = lora.zeros_like()?;
    engine.forward(model, Some(lora), &batch, policy.depth())?;
    engine.score(model, Some(lora), &batch, policy, 1.0, true)?;
    let cotangents: Vec<f32> = completion.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
    engine.backward(model, lora, &mut gradients, &batch, policy, &cotangents)?;
    for i in 0..gradients.len() {
        let size = gradients.values(i).iter().map(|&g| g as f64 * g as f64).sum::<f64>().sqrt();
        let reached = lora.tensor_layer(i) <= policy.depth();
        let advice = if !size.is_finite() {
            "the model's weights hold values that are not finite; fetch the file again"
        } else if reached && size == 0.0 {
            "nothing would be learnt there; leave that target out with --targets, or report it"
        } else if !reached && size != 0.0 {
            "a layer above the policy's was reached; report it"
        } else {
            continue;
        };
        return Err(Error::engine(
            format!(
                "checking the gradient of {} (layers 1 to {})",
                lora.tensor_name(i),
                policy.depth()
            ),
            format!("its norm is {size}"),
            advice,
        ));
    }
    Ok(())
}

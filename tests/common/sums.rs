//! The sums of a checkpoint that was changed on purpose.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Writes `SHA256SUMS` anew, so that what reads the checkpoint comes to see the change.
pub fn right_the_sums(checkpoint: &Path) {
    let mut sums = String::new();
    for name in ["adapter.gguf", "config.toml", "state.json", "state.safetensors"] {
        let sum = Sha256::digest(fs::read(checkpoint.join(name)).unwrap());
        let hex: String = sum.iter().map(|b| format!("{b:02x}")).collect();
        sums += &format!("{hex}  {name}\n");
    }
    fs::write(checkpoint.join("SHA256SUMS"), sums).unwrap();
}

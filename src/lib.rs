//! `bupo-gguf`: look inside quantised GGUF models and train LoRA adapters on them with Bottom-up
//! Policy Optimization (BuPO), on llama.cpp/ggml, with one copy of the weights and no Python.
//!
//! A module imports only from those above it in this list (`tests/house.rs` checks it).
//! `unsafe` stays in `ggml`, `ops` and `llama`.
#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod error;
pub mod options;

#[allow(unsafe_code)]
pub mod ggml;
#[allow(unsafe_code)]
pub mod ops;
#[allow(unsafe_code)]
pub mod llama;
pub mod gguf;
pub mod team;
pub mod synth;
pub mod model;
pub mod data;
pub mod rollout;
pub mod reward;
pub mod env;
pub mod eval;
pub mod analysis;
pub mod train;
pub mod export;
pub mod bench;
pub mod cli;

pub use error::{Error, Result};
pub use model::{Lora, Model};
pub use train::{TrainConfig, Trainer};

//! What was trained, for everybody else: merged models, adapters in other types, PEFT; and what it cost.
//!
//! ```text
//! merge: for each tensor of the base, in row blocks
//!     W  := dequantise(rows)
//!     W' := W + sum_i factor_i * alpha_i / rank_i * B_i A_i              every adapter that has the tensor
//!     out := quantise(W', its own type or the asked one)               ggml's own quantisers, all cores
//! ```
//!
//! A tensor that no adapter and no change of type touches is copied byte for byte. Memory is a few row
//! blocks and the adapters, whatever the model's size; pages of the mapped base are given back.

mod adapter;
mod adapters;
mod base_id;
mod card;
mod diff;
mod feedback;
mod imatrix;
mod merge;
mod ollama;
mod peft;
mod peft_config;
mod peft_joined;
mod peft_order;
mod plan;
mod provenance;
mod rows;

pub use adapter::{AdapterReport, AdapterType, export_adapter, export_peft, import_peft, lora_of};
pub use adapters::{AdapterSpec, Adapters};
pub use base_id::BaseId;
pub use card::Card;
pub use diff::{DiffConfig, Difference, Place, Side, diff};
pub use imatrix::Imatrix;
pub use merge::{MergeOptions, MergeReport, Merger, TensorReport};
pub use ollama::modelfile;
pub use peft::{PeftBase, read_peft, write_peft};
pub use peft_order::ValueHeads;
pub use plan::TypeChoice;

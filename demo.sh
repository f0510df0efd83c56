#!/usr/bin/env bash
# Builds bupo-gguf and trains the embedded demo model on addition: the reward rises before your eyes.
# Arguments go to `bupo-gguf train demo`, e.g. ./demo.sh --algo grpo --seed 2
set -euo pipefail
cd "$(dirname "$0")"
tools/setup.sh
cargo build --release --locked
exec target/release/bupo-gguf train demo "$@"

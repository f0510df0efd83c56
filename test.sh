#!/usr/bin/env bash
# Builds and runs all tests. They need neither a GPU nor Python.
# Models and data of others are read from $BUPO_SHARED (default ../shared) where they are there, and the trained
# models of tests/real_models.rs from where tools/fetch-models puts them.
set -euo pipefail
cd "$(dirname "$0")"
tools/setup.sh
cargo test --release --locked --no-fail-fast "$@"

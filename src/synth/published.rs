//! Published models' shapes, from their `config.json`.

use super::shape::{DeltaNets, Experts, Gemma4, Multipliers, Rope, Shape, Softcaps, Window};

/// Qwen3: heads of 128, one vocabulary, rope base 1e6.
const QWEN3: Shape = Shape {
    name: "qwen3",
    arch: "qwen3",
    n_layer: 28,
    n_embd: 1024,
    n_ff: 3072,
    n_head: 16,
    n_head_kv: 8,
    head_size: 128,
    n_vocab: 151_936,
    n_text: 151_643,
    tied: true,
    n_ctx: 40_960,
    rope_base: 1e6,
    rope: Rope::Plain,
    rms_eps: 1e-6,
    window: None,
    softcaps: Softcaps { attention: None, logits: None },
    multipliers: None,
    gemma4: None,
    experts: None,
    delta: None,
};

/// Qwen3.5: three layers of four are gated delta nets; heads of 256, a quarter of which rotates.
const QWEN35: Shape = Shape {
    name: "qwen3.5",
    arch: "qwen35",
    n_layer: 24,
    n_ff: 3584,
    n_head: 8,
    n_head_kv: 2,
    head_size: 256,
    n_vocab: 248_320,
    n_text: 248_044,
    n_ctx: 262_144,
    rope_base: 1e7,
    rope: Rope::Sectioned { rotated: 64, sections: [11, 11, 10, 0] },
    delta: Some(DeltaNets { period: 4, n_k: 16, n_v: 16, size: 128, kernel: 4 }),
    ..QWEN3
};

/// From 4B on: more value heads than key heads.
const QWEN35_LARGE: Shape = Shape {
    n_layer: 32,
    n_head: 16,
    n_head_kv: 4,
    delta: Some(DeltaNets { period: 4, n_k: 16, n_v: 32, size: 128, kernel: 4 }),
    ..QWEN35
};

const QWEN2: Shape = Shape { name: "qwen2", arch: "qwen2", n_ctx: 32_768, ..QWEN3 };

/// Llama 3.1 and 3.2: rope base 5e5, scaled frequencies.
const LLAMA3: Shape = Shape {
    name: "llama3",
    arch: "llama",
    n_layer: 28,
    n_embd: 3072,
    n_ff: 8192,
    n_head: 24,
    n_head_kv: 8,
    head_size: 128,
    n_vocab: 128_256,
    n_text: 128_000,
    tied: true,
    n_ctx: 131_072,
    rope_base: 5e5,
    rope: Rope::Llama3(32.0),
    rms_eps: 1e-5,
    ..QWEN3
};

const LLAMA3_8B: Shape = Shape {
    n_layer: 32,
    n_embd: 4096,
    n_ff: 14_336,
    n_head: 32,
    tied: false,
    rope: Rope::Llama3(8.0),
    ..LLAMA3
};

/// Gemma 3: one layer in six sees everything, the others have a window and a base of 1e4.
const GEMMA3: Shape = Shape {
    name: "gemma3",
    arch: "gemma3",
    n_layer: 18,
    n_embd: 640,
    n_ff: 2048,
    n_head: 4,
    n_head_kv: 1,
    head_size: 256,
    n_vocab: 262_144,
    n_text: 262_136,
    n_ctx: 32_768,
    window: Some(Window { size: 512, period: 6 }),
    ..QWEN3
};

/// From 4B on: a context of 128 Ki, which the layers without a window reach by linear scaling.
const GEMMA3_LARGE: Shape = Shape {
    n_ctx: 131_072,
    rope: Rope::Linear(8.0),
    window: Some(Window { size: 1024, period: 6 }),
    ..GEMMA3
};

/// Phi-4-mini's `rope_scaling.long_factor`, digit for digit; its `short_factor` is all ones.
#[rustfmt::skip]
#[allow(clippy::excessive_precision)]
const PHI4_MINI_LONG: [f32; 48] = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03,
    32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
];

/// All of them.
pub(super) const ALL: [Shape; 36] = [
    Shape {
        name: "tiny",
        n_layer: 4,
        n_embd: 256,
        n_ff: 768,
        n_head: 4,
        n_head_kv: 2,
        head_size: 64,
        n_vocab: 2048,
        n_text: 2040,
        n_ctx: 4096,
        ..QWEN3
    },
    Shape { name: "qwen3-0.6b", ..QWEN3 },
    Shape { name: "qwen3-1.7b", n_embd: 2048, n_ff: 6144, ..QWEN3 },
    Shape { name: "qwen3-4b", n_layer: 36, n_embd: 2560, n_ff: 9728, n_head: 32, ..QWEN3 },
    Shape {
        name: "qwen3-8b",
        n_layer: 36,
        n_embd: 4096,
        n_ff: 12_288,
        n_head: 32,
        tied: false,
        ..QWEN3
    },
    Shape {
        name: "qwen3-14b",
        n_layer: 40,
        n_embd: 5120,
        n_ff: 17_408,
        n_head: 40,
        tied: false,
        ..QWEN3
    },
    Shape { name: "qwen3.5-0.8b", ..QWEN35 },
    Shape { name: "qwen3.5-2b", n_embd: 2048, n_ff: 6144, ..QWEN35 },
    Shape { name: "qwen3.5-4b", n_embd: 2560, n_ff: 9216, ..QWEN35_LARGE },
    Shape { name: "qwen3.5-9b", n_embd: 4096, n_ff: 12_288, tied: false, ..QWEN35_LARGE },
    Shape {
        name: "qwen3.5-27b",
        n_layer: 64,
        n_embd: 5120,
        n_ff: 17_408,
        n_head: 24,
        tied: false,
        delta: Some(DeltaNets { period: 4, n_k: 16, n_v: 48, size: 128, kernel: 4 }),
        ..QWEN35_LARGE
    },
    Shape {
        name: "qwen3.5-35b-a3b",
        arch: "qwen35moe",
        n_layer: 40,
        n_embd: 2048,
        n_ff: 512,
        n_head_kv: 2,
        tied: false,
        experts: Some(Experts { count: 256, used: 8, n_ff: 512, n_ff_shared: 512 }),
        ..QWEN35_LARGE
    },
    Shape {
        name: "qwen3-next-80b-a3b",
        arch: "qwen3next",
        n_layer: 48,
        n_embd: 2048,
        n_ff: 5120,
        n_head_kv: 2,
        n_vocab: 151_936,
        n_text: 151_643,
        tied: false,
        rope: Rope::Partial(64),
        experts: Some(Experts { count: 512, used: 10, n_ff: 512, n_ff_shared: 512 }),
        ..QWEN35_LARGE
    },
    Shape {
        name: "qwen2.5-0.5b",
        n_layer: 24,
        n_embd: 896,
        n_ff: 4864,
        n_head: 14,
        n_head_kv: 2,
        head_size: 64,
        ..QWEN2
    },
    Shape {
        name: "qwen2.5-7b",
        n_layer: 28,
        n_embd: 3584,
        n_ff: 18_944,
        n_head: 28,
        n_head_kv: 4,
        n_vocab: 152_064,
        tied: false,
        ..QWEN2
    },
    Shape { name: "llama-3.2-1b", n_layer: 16, n_embd: 2048, n_head: 32, head_size: 64, ..LLAMA3 },
    Shape { name: "llama-3.2-3b", ..LLAMA3 },
    Shape { name: "llama-3.1-8b", ..LLAMA3_8B },
    // OctoThinker continues the training of Llama 3.2 3B and 3.1 8B.
    Shape { name: "octothinker-3b", ..LLAMA3 },
    Shape { name: "octothinker-8b", ..LLAMA3_8B },
    Shape {
        name: "smollm2-135m",
        n_layer: 30,
        n_embd: 576,
        n_ff: 1536,
        n_head: 9,
        n_head_kv: 3,
        head_size: 64,
        n_vocab: 49_152,
        n_text: 49_144,
        n_ctx: 8192,
        rope_base: 1e5,
        rope: Rope::Plain,
        ..LLAMA3
    },
    // Mistral Small 3 (2501); its successors 3.1 and 3.2 have the same sizes, a longer context and
    // another base.
    Shape {
        name: "mistral-small-24b",
        n_layer: 40,
        n_embd: 5120,
        n_ff: 32_768,
        n_head: 32,
        n_vocab: 131_072,
        n_text: 131_064,
        tied: false,
        n_ctx: 32_768,
        rope_base: 1e8,
        rope: Rope::Plain,
        ..LLAMA3
    },
    Shape {
        name: "ministral-3-3b",
        arch: "mistral3",
        n_layer: 26,
        n_embd: 3072,
        n_ff: 9216,
        n_head: 32,
        n_vocab: 131_072,
        n_text: 131_064,
        n_ctx: 262_144,
        rope_base: 1e6,
        rope: Rope::Yarn { factor: 16.0, original: 16_384, temperature: 0.1 },
        ..LLAMA3
    },
    Shape {
        name: "gemma-2-2b",
        arch: "gemma2",
        n_layer: 26,
        n_embd: 2304,
        n_ff: 9216,
        n_head: 8,
        n_head_kv: 4,
        n_vocab: 256_000,
        n_text: 255_992,
        n_ctx: 8192,
        rope_base: 1e4,
        window: Some(Window { size: 4096, period: 2 }),
        softcaps: Softcaps { attention: Some(50.0), logits: Some(30.0) },
        ..GEMMA3
    },
    Shape { name: "gemma-3-270m", ..GEMMA3 },
    Shape { name: "gemma-3-1b", n_layer: 26, n_embd: 1152, n_ff: 6912, ..GEMMA3 },
    Shape {
        name: "gemma-3-4b",
        n_layer: 34,
        n_embd: 2560,
        n_ff: 10_240,
        n_head: 8,
        n_head_kv: 4,
        ..GEMMA3_LARGE
    },
    Shape {
        name: "gemma-3-12b",
        n_layer: 48,
        n_embd: 3840,
        n_ff: 15_360,
        n_head: 16,
        n_head_kv: 8,
        ..GEMMA3_LARGE
    },
    // The text part.
    Shape {
        name: "gemma-4-e2b",
        arch: "gemma4",
        n_layer: 35,
        n_embd: 1536,
        n_ff: 6144,
        n_head: 8,
        n_ctx: 131_072,
        window: Some(Window { size: 512, period: 5 }),
        softcaps: Softcaps { attention: None, logits: Some(30.0) },
        gemma4: Some(Gemma4 { full_head_size: 512, n_shared: 20, per_layer_embd: 256 }),
        ..GEMMA3
    },
    Shape {
        name: "phi-4-mini",
        arch: "phi3",
        n_layer: 32,
        n_vocab: 200_064,
        n_text: 200_056,
        rope_base: 1e4,
        rope: Rope::Long { rotated: 96, original: 4096, divisors: &PHI4_MINI_LONG },
        ..LLAMA3
    },
    Shape {
        name: "granite-3.3-2b",
        arch: "granite",
        n_layer: 40,
        n_embd: 2048,
        n_head: 32,
        head_size: 64,
        n_vocab: 49_159,
        n_text: 49_151,
        rope_base: 1e7,
        rope: Rope::Plain,
        multipliers: Some(Multipliers {
            embedding: 12.0,
            residual: 0.22,
            attention: 0.015625,
            logits: 8.0,
        }),
        ..LLAMA3
    },
    Shape {
        name: "smollm3-3b",
        arch: "smollm3",
        n_layer: 36,
        n_embd: 2048,
        n_ff: 11_008,
        n_head: 16,
        n_head_kv: 4,
        n_ctx: 65_536,
        rope_base: 5e6,
        rope: Rope::Plain,
        rms_eps: 1e-6,
        ..LLAMA3
    },
    Shape {
        name: "olmo-2-1b",
        arch: "olmo2",
        n_layer: 16,
        n_embd: 2048,
        n_head: 16,
        n_head_kv: 16,
        n_vocab: 100_352,
        n_text: 100_344,
        tied: false,
        n_ctx: 4096,
        rope: Rope::Plain,
        rms_eps: 1e-6,
        ..LLAMA3
    },
    Shape {
        name: "qwen3-30b-a3b",
        arch: "qwen3moe",
        n_layer: 48,
        n_embd: 2048,
        n_ff: 6144,
        n_head: 32,
        n_head_kv: 4,
        tied: false,
        experts: Some(Experts { count: 128, used: 8, n_ff: 768, n_ff_shared: 0 }),
        ..QWEN3
    },
    Shape {
        name: "gpt-oss-20b",
        arch: "gpt-oss",
        n_layer: 24,
        n_embd: 2880,
        n_ff: 2880,
        n_head: 64,
        n_head_kv: 8,
        head_size: 64,
        n_vocab: 201_088,
        n_text: 201_080,
        tied: false,
        n_ctx: 131_072,
        rope_base: 150_000.0,
        rope: Rope::Yarn { factor: 32.0, original: 4096, temperature: 0.0 },
        rms_eps: 1e-5,
        window: Some(Window { size: 128, period: 2 }),
        experts: Some(Experts { count: 32, used: 4, n_ff: 2880, n_ff_shared: 0 }),
        ..QWEN3
    },
    Shape {
        name: "olmoe-1b-7b",
        arch: "olmoe",
        n_layer: 16,
        n_embd: 2048,
        n_ff: 1024,
        n_head: 16,
        n_head_kv: 16,
        n_vocab: 50_304,
        n_text: 50_296,
        tied: false,
        n_ctx: 4096,
        rope_base: 1e4,
        rms_eps: 1e-5,
        experts: Some(Experts { count: 64, used: 8, n_ff: 1024, n_ff_shared: 0 }),
        ..QWEN3
    },
];

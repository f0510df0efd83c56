"""Fixtures for tests/export.rs, by PyTorch and Hugging Face's PEFT (no code of this project is used).

tests/fixtures/golden/merged.safetensors
    CASE.WEIGHT: W + 1.5 * alpha / r * B A in F32, from the dequantised golden base and its adapter
    (the test applies the adapter with factor 1 and once more with 0.5).
tests/fixtures/peft/CASE/
    An adapter that PEFT itself made and saved, with unequal ranks and alphas, for the golden model CASE, and
    logprobs.json: log-probs of tokens under the Hugging Face model with it.

usage: make_export_fixtures.py [REPOSITORY]        needs: torch transformers peft gguf safetensors
"""
import json, os, sys
import gguf, numpy as np, torch
from safetensors.torch import save_file
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from peft_models import hf_model, tensors_of

ROOT = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), ".."))
GOLDEN = os.path.join(ROOT, "tests/fixtures/golden")
CASES = ["qwen3-f32", "qwen2-f32", "llama-f32", "qwen3-q8_0", "llama-q4_0", "qwen3-q4_k"]

def merged():
    out = {}
    for case in CASES:
        base = tensors_of(os.path.join(GOLDEN, f"{case}.gguf"))
        path = os.path.join(GOLDEN, f"{case}.lora.gguf")
        lora = tensors_of(path)
        alpha = float(gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents())
        for weight in ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.2.attn_v.weight"]:
            a, b = lora[weight + ".lora_a"], lora[weight + ".lora_b"]  # [r, n_in], [n_out, r]
            out[f"{case}.{weight}"] = base[weight] + 1.5 * alpha / a.shape[0] * (b @ a)
    save_file(out, os.path.join(GOLDEN, "merged.safetensors"))

def peft_adapter(case):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(7)
    model = hf_model(os.path.join(GOLDEN, f"{case}.gguf"))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
                        rank_pattern={"model.layers.1.self_attn.q_proj": 8, "down_proj": 2},
                        alpha_pattern={"k_proj": 3}, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.15)
    tokens = [(i * 37 + 11) % 250 for i in range(24)]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    folder = os.path.join(ROOT, "tests/fixtures/peft", case)
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder)
    readme = os.path.join(folder, "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    path = os.path.join(folder, "adapter_config.json")
    config = json.load(open(path))
    config["base_model_name_or_path"] = case
    json.dump(config, open(path, "w"), indent=1)
    json.dump({"tokens": tokens, "logprobs": [float(logp[i - 1, tokens[i]]) for i in range(1, len(tokens))]},
              open(os.path.join(folder, "logprobs.json"), "w"))

merged()
for case in ["llama-f32", "qwen3-f32"]:
    peft_adapter(case)

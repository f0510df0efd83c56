"""A PEFT adapter that `bupo-gguf export --peft` writes, loaded by Hugging Face's PEFT itself.

For each golden model: the folder is written by the program, loaded by `PeftModel.from_pretrained` onto the
Hugging Face module with the same (dequantised) weights, and its logits compared with those of W + s B A
computed here from the GGUF adapter (llama's permutation undone by numpy, not by the program).

usage: check_peft.py BUPO-GGUF [REPOSITORY]        needs: torch transformers peft gguf safetensors
"""
import os, subprocess, sys, tempfile, warnings
import gguf, torch
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from peft_models import NAMES, hf_model, tensors_of
from peft import PeftModel
warnings.filterwarnings("ignore", category=FutureWarning)

program = sys.argv[1]
root = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), ".."))
golden = os.path.join(root, "tests/fixtures/golden")
tokens = torch.tensor([[(i * 37 + 11) % 250 for i in range(40)]])
worst = 0.0
for case in ["llama-f32", "llama-q4_0", "qwen2-f32", "qwen3-f32", "qwen3-q8_0", "qwen3-q4_k"]:
    base, adapter = (os.path.join(golden, case + end) for end in (".gguf", ".lora.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([program, "export", base, "--adapter", adapter, "--peft", folder], check=True,
                       stdout=subprocess.DEVNULL)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(hf_model(base), folder)
        missing = [w for w in said if "missing" in str(w.message).lower()]
        assert not missing, missing
        with torch.no_grad():
            got = model(tokens).logits
    plain = hf_model(base)
    with torch.no_grad():
        before = plain(tokens).logits
    reader = gguf.GGUFReader(adapter)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    lora, modules = tensors_of(adapter), dict(plain.named_modules())
    for name in [n[: -len(".lora_a")] for n in lora if n.endswith(".lora_a")]:
        a, b = lora[name + ".lora_a"], lora[name + ".lora_b"]
        delta = alpha / a.shape[0] * (b @ a)
        _, layer, middle, _ = name.split(".")
        module = modules[f"model.layers.{layer}.{NAMES[middle]}"]
        if plain.config.model_type == "llama" and middle in ("attn_q", "attn_k"):
            n = plain.config.num_attention_heads if middle == "attn_q" else plain.config.num_key_value_heads
            delta = delta.reshape(n, delta.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(delta.shape)
        with torch.no_grad():
            module.weight += delta
    with torch.no_grad():
        expected = plain(tokens).logits
    relative = lambda x: ((x - expected).norm() / expected.norm()).item()
    error, change = relative(got), relative(before)
    worst = max(worst, error)
    print(f"{case:12} logits differ by {error:.1e} (without the adapter by {change:.2f})")
    assert error < 1e-5 < change
print(f"PEFT loads every folder; largest relative difference of logits {worst:.1e}")

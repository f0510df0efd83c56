"""Adapters that Hugging Face's PEFT saves, read by `bupo-gguf import-peft`: the log-probs of `score` beside PEFT's.

Every kind of initialisation and setting that PEFT 0.21 has for linear layers, with B random after it: what is read must agree, what
is refused must be refused by its name. PiSSA and OLoRA are read where PEFT has converted them.

usage: check_import_peft.py BUPO-GGUF [REPOSITORY]        needs: torch transformers peft gguf safetensors
"""
import json, os, subprocess, sys, tempfile, warnings
import torch
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from peft_models import hf_model
from peft import LoraConfig, get_peft_model
warnings.simplefilter("ignore")

program = sys.argv[1]
root = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), ".."))
tokens = [(i * 37 + 11) % 250 for i in range(24)]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READ = {
    "defaults": {}, "every layer": dict(target_modules=ALL), "gaussian": dict(init_lora_weights="gaussian"),
    "eva": dict(init_lora_weights="eva"), "orthogonal": dict(init_lora_weights="orthogonal"), "mica": dict(init_lora_weights="mica"),
    "no init": dict(init_lora_weights=False), "alpha 0": dict(lora_alpha=0), "rslora": dict(use_rslora=True),
    "patterns": dict(target_modules=ALL, rank_pattern={"^model.layers.0.self_attn.q_proj": 2, r"mlp\..*_proj": 3},
                     alpha_pattern={"o_proj": 0, "layers.1.self_attn.q_proj": 32}, use_rslora=True),
    "some layers": dict(layers_to_transform=[1], layers_pattern="layers"), "a pattern": dict(target_modules=r".*\.mlp\.(up|down)_proj"),
    "without": dict(target_modules=ALL, exclude_modules=["v_proj"]), "dropout": dict(lora_dropout=0.3),
}
CONVERTED = {"pissa": dict(init_lora_weights="pissa"), "olora": dict(init_lora_weights="olora")}
REFUSED = {"pissa": dict(init_lora_weights="pissa"), "pissa, fast": dict(init_lora_weights="pissa_niter_4"),
           "olora": dict(init_lora_weights="olora"), "dora": dict(use_dora=True), "a bias": dict(lora_bias=True),
           "whole modules": dict(modules_to_save=["norm"]), "tokens": dict(trainable_token_indices=[1, 2])}

def run(*args):
    done = subprocess.run([program, *args], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr

def adapter(base, settings, folder, convert=False):
    """Saves a LoRA whose A and B moved after its initialisation; gives PEFT's log-probs with it."""
    torch.manual_seed(5)
    settings = dict(dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), **settings)
    model = get_peft_model(hf_model(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    start = os.path.join(folder, "start")
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight += 0.1 * torch.randn(weight.shape)
        logits = model(torch.tensor([tokens])).logits.log_softmax(-1)[0]
    model.save_pretrained(folder, **(dict(path_initial_model_for_weight_conversion=start) if convert else {}))
    return logits[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]

worst = 0.0
for golden in ["qwen3-f32", "llama-f32", "qwen2-f32"]:
    base = os.path.join(root, "tests/fixtures/golden", golden + ".gguf")
    for name, settings, convert in [(n, s, False) for n, s in READ.items()] + [(n, s, True) for n, s in CONVERTED.items()]:
        with tempfile.TemporaryDirectory() as folder:
            expected = adapter(base, settings, folder, convert)
            out, rows = os.path.join(folder, "a.gguf"), os.path.join(folder, "rows.jsonl")
            with open(rows, "w") as file:
                json.dump({"prompt_tokens": tokens[:1], "completions": [{"tokens": tokens[1:]}]}, file)
            said = run("import-peft", folder, "--base", base, "--out", out)
            assert os.path.exists(out), f"{golden} {name}: {said}"
            got = torch.tensor(json.loads(run("score", base, "--data", rows, "--adapter", out, "--threads", "1"))["logprobs"])
            error = (got - expected).abs().max().item()
            worst = max(worst, error)
            print(f"{golden:10} {name + (', converted' if convert else ''):20} {error:.1e} nats")
            assert error < 1e-4
    for name, settings in REFUSED.items():
        with tempfile.TemporaryDirectory() as folder:
            adapter(base, settings, folder)
            said = run("import-peft", folder, "--base", base, "--out", os.path.join(folder, "a.gguf"))
            assert not os.path.exists(os.path.join(folder, "a.gguf")) and next(iter(settings)) in said, f"{name}: {said}"
            print(f"{golden:10} {name:20} refused")
print(f"largest difference of a log-prob {worst:.1e} nats")

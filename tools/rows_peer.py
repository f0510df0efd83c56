"""What a user would pick instead: SFT and DPO of a LoRA in PyTorch with PEFT, beside `bupo-gguf train` on the same rows.

Random tokens, the shape of Qwen3 0.6B (random weights; `bupo-gguf synth qwen3-0.6b --type q4_k_m` writes ours). One after the other:
a step of --algo sft (two rows of a prompt of 64 and a completion of 192 tokens), one of --algo dpo (one pair, prompt of 256 tokens, 128
and 128), and one of PyTorch's RL update, for comparison. PyTorch's DPO is TRL's: chosen and rejected as two sequences, once with and once without the
adapter. Seconds of a step, the first left out, and tokens/s of the rows' sequences.
needs (PyPI): torch transformers peft
usage: rows_peer.py PROGRAM MODEL.gguf [--steps 4] [--threads N]
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

V = 151936


def rows(folder, steps):
    """Data of both algorithms, as many rows as the steps take."""
    rng = random.Random(1)

    def tokens(n):
        return [rng.randrange(1000, 150000) for _ in range(n)]

    sft = [{"prompt_tokens": tokens(64), "completions": [{"tokens": tokens(192)}]} for _ in range(2 * steps)]
    dpo = [{"prompt_tokens": tokens(256), "chosen_tokens": tokens(128), "rejected_tokens": tokens(128)} for _ in range(steps)]
    for name, data in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return sft, dpo


def ours(args, folder, algo, prompts):
    out = folder / f"run-{algo}"
    command = [args.program, "train", args.model, "--algo", algo, "--data", folder / f"{algo}.jsonl", "--steps", args.steps]
    command += ["--prompts-per-step", prompts, "--mini-batch", prompts, "--micro-batch-tokens", 512, "--eval-every", 0, "--rank", 16]
    command += ["--checkpoint-every", 1000, "--out", out] + (["--threads", args.threads] if args.threads else [])
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    peak = json.loads((out / "summary.json").read_text())["peak_bytes"]
    return statistics.median(step["seconds"] for step in steps[1:]), peak / 1e9


def timed(update, steps):
    update(0)
    times = []
    for i in range(1, steps):
        start = time.time()
        update(i)
        times.append(time.time() - start)
    return statistics.median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def pytorch(args, sft, dpo):
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        vocab_size=V, tie_word_embeddings=True, max_position_embeddings=4096,
    )
    config._attn_implementation = "sdpa"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(Qwen3ForCausalLM(config), LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def logprobs(ids):
        logits = model(ids).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def imitate(i):
        two = sft[2 * i : 2 * i + 2]
        ids = torch.tensor([row["prompt_tokens"] + row["completions"][0]["tokens"] for row in two])
        step(-logprobs(ids)[:, 63:].mean())

    def prefer(i):
        row = dpo[i]
        ids = torch.tensor([row["prompt_tokens"] + row[side] for side in ("chosen_tokens", "rejected_tokens")])
        with torch.no_grad(), model.disable_adapter():
            reference = logprobs(ids)[:, 255:].sum(-1)
        margin = logprobs(ids)[:, 255:].sum(-1) - reference
        step(-F.logsigmoid(0.1 * (margin[0] - margin[1])))

    advantages = torch.randn(2, 1)
    some = torch.randint(0, V, (2, 256))

    def reinforce(_):
        now = logprobs(some)
        step((-(now - now.detach()).exp() * advantages).mean())

    return [timed(update, args.steps) for update in (imitate, prefer, reinforce)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sft, dpo = rows(Path(folder), args.steps)
        own = [ours(args, Path(folder), "sft", 2), ours(args, Path(folder), "dpo", 1)]
    theirs = pytorch(args, sft, dpo)
    print("| a step | tokens | bupo-gguf | PyTorch + PEFT | ratio |\n|---|---|---|---|---|")
    for name, n, mine, peer in zip(("SFT", "DPO"), (512, 768), own, theirs):
        (a, x), (b, y) = mine, peer
        print(f"| {name} | {n} | {a:.2f} s, {n / a:.0f} tokens/s, {x:.2f} GB | {b:.2f} s, {n / b:.0f} tokens/s, {y:.2f} GB | {b / a:.2f}x |")
    print(f"\nPyTorch's RL update, 2 x 256 tokens: {theirs[2][0]:.2f} s, {512 / theirs[2][0]:.0f} tokens/s")


if __name__ == "__main__":
    main()

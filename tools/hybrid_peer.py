"""What a user would pick instead: the RL update of a Qwen3.5 with LoRA in PyTorch, beside `bupo-gguf bench train` on the same shape.

The shape of Qwen3.5 0.8B with random weights (`bupo-gguf synth qwen3.5-0.8b --type q4_k_m --out M` writes ours). PyTorch is transformers'
Qwen3_5ForCausalLM in F32 with PEFT, with its own chunked delta rule, for the kernels that it would take on a GPU are not there on a CPU. Two sequences of
256 tokens, all scored, adapters of rank 16 on attention, delta nets and FFN; ours first, then PyTorch, one after the other.
needs (PyPI): torch transformers peft
usage: hybrid_peer.py PROGRAM MODEL.gguf [--tokens 256] [--seqs 2] [--reps 2] [--threads N]
"""

import argparse
import json
import subprocess

from rows_peer import timed

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "vocab_size": 248320, "tie_word_embeddings": True,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "gate_proj", "up_proj", "down_proj"]


def ours(args):
    command = [args.program, "bench", "train", args.model, "--case", "train/full phase", "--reps", args.reps]
    command += ["--tokens", args.tokens] + (["--threads", args.threads] if args.threads else [])
    printed = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    for line in filter(None, printed.splitlines()):
        print(f"ours: {json.dumps(json.loads(line))}", flush=True)


def pytorch(args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**SHAPE, attn_implementation="sdpa")
    model = get_peft_model(Qwen3_5ForCausalLM(config), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    model.train()
    ids = torch.randint(0, config.vocab_size, (args.seqs, args.tokens))
    advantage = torch.randn(args.seqs, 1)

    def update(_):
        logprobs = torch.log_softmax(model(ids).logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        (-(logprobs - logprobs.detach()).exp() * advantage).mean().backward()

    seconds, peak = timed(update, args.reps + 1)
    print(f"PyTorch: {args.seqs * args.tokens / seconds:.1f} tokens/s, {seconds:.2f} s, peak {peak:.2f} GB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seqs", type=int, default=2)
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    ours(arguments)
    pytorch(arguments)

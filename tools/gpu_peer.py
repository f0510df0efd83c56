"""What a user would pick instead: the same LoRA policy-gradient update in PyTorch on the GPU.

Random weights in a published shape, BF16, SDPA attention, gradient checkpointing, rank 16 on all linear maps. Prints
tokens/s of forward and backward, and the peak of the GPU's memory.
needs (PyPI): torch transformers peft
usage: gpu_peer.py qwen3-4b|qwen3-8b [--tokens 1024] [--seqs 2] [--reps 3]
"""

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES = {
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True),
    "qwen3-8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False),
}

parser = argparse.ArgumentParser()
parser.add_argument("shape", choices=SHAPES)
parser.add_argument("--tokens", type=int, default=1024)
parser.add_argument("--seqs", type=int, default=2)
parser.add_argument("--reps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
config = Qwen3Config(
    **SHAPES[args.shape], num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=4096
)
config._attn_implementation = "sdpa"
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = Qwen3ForCausalLM(config)
torch.set_default_dtype(torch.float32)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).to("cuda")
model.gradient_checkpointing_enable()
model.enable_input_require_grads()
model.train()
tokens = torch.randint(0, config.vocab_size, (args.seqs, args.tokens), device="cuda")
advantages = torch.randn(args.seqs, 1, device="cuda")


def update():
    logits = model(tokens).logits[:, :-1].float()
    logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    (-(logprobs - logprobs.detach()).exp() * advantages).mean().backward()
    torch.cuda.synchronize()


update()
times = []
for _ in range(args.reps):
    start = time.time()
    update()
    times.append(time.time() - start)
rate = args.seqs * args.tokens / sorted(times)[len(times) // 2]
peak = torch.cuda.max_memory_allocated() / 1e9
print(f"{args.shape} BF16 {args.seqs} x {args.tokens}: {rate:.1f} tokens/s, peak {peak:.2f} GB, {torch.cuda.get_device_name()}")

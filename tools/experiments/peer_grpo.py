#!/usr/bin/env python3
"""The same GRPO run in PyTorch: transformers reads the GGUF into F32, peft trains from the same adapter, on the problems of a run of ours in their order.

    bupo-gguf export MODEL.gguf --adapter SFT.gguf --peft sft
    tools/experiments/peer_grpo.py MODEL.gguf --adapter sft --problems RUN/completions.jsonl --out peer [--steps N] [--lr 1e-4] [--seed 1] [--micro-batch 8] [--threads 2]
    bupo-gguf import-peft peer --base MODEL.gguf --out peer.gguf && bupo-gguf eval MODEL.gguf --adapter peer.gguf --data task:words?digits=1

The reward is 1 where what the last \\boxed{} holds is the answer, letter by letter. Prints a line a step, at the end one JSON object.
needs (PyPI): torch transformers peft gguf accelerate
"""
import argparse, json, os, re, resource, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def cut(whole, size):
    """A slice in slices of at most this size."""
    return [slice(k, min(k + size, whole.stop)) for k in range(whole.start, whole.stop, size)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model"); p.add_argument("--adapter", required=True); p.add_argument("--problems", required=True); p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=24); p.add_argument("--group", type=int, default=8); p.add_argument("--mini-batch", type=int, default=8)
    p.add_argument("--micro-batch", type=int, default=8)
    p.add_argument("--max-response", type=int, default=48); p.add_argument("--lr", type=float, default=1e-4); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.manual_seed(a.seed); torch.set_num_threads(a.threads)
    folder, file = os.path.split(os.path.abspath(a.model))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, a.adapter, is_trainable=True).eval()  # no dropout
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|im_end|>"
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=a.lr, weight_decay=0.01)

    # Problems of each step, in the order of our run.
    steps = {}
    for line in open(a.problems):
        row = json.loads(line)
        known = steps.setdefault(row["step"], {})
        known.setdefault(row["problem"], (row["prompt"], row["answer"]))

    def reward(text, answer):
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
        return float(bool(boxed) and boxed[-1].strip() == answer)

    def logprobs(prompts, completions):
        """Log-probs of completions, padded at the right: [n, longest], and which of them count."""
        width = max(len(c) for c in completions)
        ids = torch.full((len(prompts), max(len(q) for q in prompts) + width), end)
        seen = torch.zeros_like(ids)
        for i, (q, c) in enumerate(zip(prompts, completions)):
            ids[i, :len(q) + len(c)] = torch.tensor(q + c)
            seen[i, :len(q) + len(c)] = 1
        hidden = model.base_model.model.model(input_ids=ids, attention_mask=seen).last_hidden_state
        out, counts = torch.zeros(len(prompts), width), torch.zeros(len(prompts), width)
        for i, (q, c) in enumerate(zip(prompts, completions)):
            rows = torch.log_softmax(model.get_output_embeddings()(hidden[i, len(q) - 1:len(q) + len(c) - 1]), -1)
            out[i, :len(c)] = rows.gather(-1, torch.tensor(c)[:, None])[:, 0]
            counts[i, :len(c)] = 1
        return out, counts

    curve, begun, sampled = [], time.time(), 0
    for step in range(1, a.steps + 1):
        problems = list(steps[step].values())
        prompts, completions, rewards = [], [], []
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True) for question, _ in problems]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=a.group, max_new_tokens=a.max_response,
                                 eos_token_id=end, pad_token_id=end)
        for i, row in enumerate(out[:, width:].tolist()):
            of = i // a.group
            c = row[:row.index(end) + 1] if end in row else row
            prompts.append(inputs["input_ids"][of][inputs["attention_mask"][of] == 1].tolist()); completions.append(c)
            rewards.append(reward(tokenizer.decode(c, skip_special_tokens=True), problems[of][1]))
        sampled += sum(map(len, completions))
        r = torch.tensor(rewards).view(-1, a.group)
        advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()
        parts = cut(slice(0, len(prompts)), a.mini_batch * a.group)
        # A mini batch in micro batches of a few sequences, for its activations would not fit; with one update a step the log-probs before it are those of its own forward.
        olds = {}
        if len(parts) > 1:
            with torch.no_grad():
                olds = {m.start: logprobs(prompts[m], completions[m])[0] for s in parts for m in cut(s, a.micro_batch)}
        for s in parts:
            tokens = sum(map(len, completions[s]))
            optimizer.zero_grad()
            for m in cut(s, a.micro_batch):
                new, counts = logprobs(prompts[m], completions[m])
                ratio, adv = (new - olds.get(m.start, new.detach())).exp(), advantage[m][:, None]
                ((torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)) * counts).sum() / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        curve.append([step, sum(rewards) / len(rewards)])
        print(f"step {step} reward {curve[-1][1]:.3f} {time.time() - begun:.0f} s", flush=True)
    model.save_pretrained(a.out)
    print(json.dumps({"steps": a.steps, "seconds": time.time() - begun, "sampled_tokens": sampled, "reward": curve, "threads": a.threads,
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))


if __name__ == "__main__":
    main()

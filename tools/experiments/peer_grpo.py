#!/usr/bin/env python3
"""The same GRPO run in PyTorch: transformers reads the GGUF into F32, peft trains from the same adapter, on the problems of a run of ours in their order.

    bupo-gguf export MODEL.gguf --adapter SFT.gguf --peft sft
    tools/experiments/peer_grpo.py MODEL.gguf --adapter sft --problems RUN/completions.jsonl --out peer [--steps N] [--lr 1e-4] [--seed 1] [--threads 2]
    bupo-gguf import-peft MODEL.gguf peer --out peer.gguf && bupo-gguf eval MODEL.gguf --adapter peer.gguf --data task:words

The reward is 1 where what the last \\boxed{} holds is the answer, letter by letter. Prints a line a step, at the end one JSON object.
needs (PyPI): torch transformers peft gguf accelerate
"""
import argparse, json, os, re, resource, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model"); p.add_argument("--adapter", required=True); p.add_argument("--problems", required=True); p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=40); p.add_argument("--group", type=int, default=8); p.add_argument("--mini-batch", type=int, default=4)
    p.add_argument("--max-response", type=int, default=48); p.add_argument("--lr", type=float, default=1e-4); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.manual_seed(a.seed); torch.set_num_threads(a.threads)
    folder, file = os.path.split(os.path.abspath(a.model))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, a.adapter, is_trainable=True).eval()  # no dropout
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
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
        logits = model(input_ids=ids, attention_mask=seen).logits
        out, counts = torch.zeros(len(prompts), width), torch.zeros(len(prompts), width)
        for i, (q, c) in enumerate(zip(prompts, completions)):
            rows = torch.log_softmax(logits[i, len(q) - 1:len(q) + len(c) - 1], -1)
            out[i, :len(c)] = rows.gather(-1, torch.tensor(c)[:, None])[:, 0]
            counts[i, :len(c)] = 1
        return out, counts

    curve, begun, sampled = [], time.time(), 0
    for step in range(1, a.steps + 1):
        problems = list(steps[step].values())
        prompts, completions, rewards = [], [], []
        for question, answer in problems:
            text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
            q = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                out = model.generate(input_ids=torch.tensor([q]), attention_mask=torch.ones(1, len(q), dtype=torch.long), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                     num_return_sequences=a.group, max_new_tokens=a.max_response, eos_token_id=end, pad_token_id=end)
            for row in out[:, len(q):].tolist():
                c = row[:row.index(end) + 1] if end in row else row
                prompts.append(q); completions.append(c)
                rewards.append(reward(tokenizer.decode(c, skip_special_tokens=True), answer))
        sampled += sum(map(len, completions))
        r = torch.tensor(rewards).view(-1, a.group)
        advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()
        size = a.mini_batch * a.group
        parts = [slice(k, k + size) for k in range(0, len(prompts), size)]
        with torch.no_grad():
            olds = [logprobs(prompts[s], completions[s])[0] for s in parts]
        for s, old in zip(parts, olds):
            new, counts = logprobs(prompts[s], completions[s])
            ratio, adv = (new - old).exp(), advantage[s][:, None]
            loss = (torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)) * counts).sum() / counts.sum()
            optimizer.zero_grad(); loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        curve.append([step, sum(rewards) / len(rewards)])
        print(f"step {step} reward {curve[-1][1]:.3f} {time.time() - begun:.0f} s", flush=True)
    model.save_pretrained(a.out)
    print(json.dumps({"steps": a.steps, "seconds": time.time() - begun, "sampled_tokens": sampled, "reward": curve, "threads": a.threads,
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))


if __name__ == "__main__":
    main()

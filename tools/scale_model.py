#!/usr/bin/env python3
"""A step of a 4B model on 1 to 64 nodes, on paper: docs/SCALE.md says where the numbers come from.

    tools/scale_model.py [--update T/S] [--rollout T/S] [--micro TOKENS]
"""
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--update", type=float, default=320.0, help="tokens a second of one node's updates")
parser.add_argument("--rollout", type=float, default=380.0, help="tokens a second of one node's rollouts")
parser.add_argument("--slowest", type=float, default=20.0, help="tokens a second of the last sequence of a step")
parser.add_argument("--micro", type=int, default=4096, help="tokens of a micro batch")
parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
parser.add_argument("--rank", type=int, default=16)
args = parser.parse_args()

# Qwen3-4B: width 2560, 32 heads of 128 and 8 of keys, FFN 9728, 36 layers; seven targets.
maps = [(2560, 4096), (2560, 1024), (2560, 1024), (4096, 2560), (2560, 9728), (2560, 9728), (9728, 2560)]
gradient = 4 * 36 * args.rank * sum(a + b for a, b in maps)  # bytes

GROUP, PROMPT, MEAN, LONGEST, MINI = 8, 200, 600, 1500, 2
PROMPTS = args.prompts
trained = PROMPTS * (PROMPT + GROUP * MEAN)
micro_batches = -(-trained // MINI // args.micro)  # of a mini batch


def step(nodes, gbit):
    bandwidth = 0.94 * gbit * 1e9 / 8
    # Prompts are shared out whole; nobody is done before the longest completion is.
    rollout = -(-PROMPTS // nodes) * GROUP * MEAN / args.rollout
    rollout = max(rollout, LONGEST / args.slowest)
    own = -(-micro_batches // nodes)
    update = MINI * own * args.micro / args.update
    sent = MINI * (own + 1) * gradient * (nodes - 1) / nodes
    return rollout, update, sent / bandwidth


print(f"gradient {gradient / 1e6:.0f} MB, {micro_batches} micro batches a mini batch, {MINI} mini batches a step")
print("| nodes | rollouts s | updates s | 1 Gbit/s: comm s | step s | efficiency | 10 Gbit/s: comm s | step s | efficiency |")
print("|---|---|---|---|---|---|---|---|---|")
alone = sum(step(1, 1)[:2])
for nodes in [1, 2, 4, 8, 16, 32, 64]:
    row = f"| {nodes} |"
    for gbit in [1, 10]:
        rollout, update, comm = step(nodes, gbit)
        whole = rollout + update + comm
        if gbit == 1:
            row += f" {rollout:.0f} | {update:.0f} |"
        row += f" {comm:.1f} | {whole:.0f} | {100 * alone / nodes / whole:.0f} % |"
    print(row)

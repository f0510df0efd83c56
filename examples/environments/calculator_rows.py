"""Worked dialogues with the calculator, for --algo sft, before a model learns by itself when to call it:

    python3 calculator_rows.py 200 > calls.jsonl
    bupo-gguf train MODEL --algo sft --data calls.jsonl --out runs/calls
    bupo-gguf train MODEL --env env:calculator --adapter runs/calls/adapter.gguf

Products of up to 4 digits that `task:mul?digits=4` never holds out. Options: the number of rows (200), and the share of them with a
call (1.0); the others answer by heart.
"""
import json
import random
import sys

from calculator import TOOL


def held_out(x, y):
    return (x * 10**4 + y) * 2654435761 % 2**32 * 5 < 2**32


def pair(rng):
    while True:
        x, y = rng.randrange(10**4), rng.randrange(10**4)
        if not held_out(x, y):
            return x, y


def row(rng, share):
    x, y = pair(rng)
    messages = [{"role": "user", "content": f"{x}*{y}="}]
    if rng.random() < share:
        call = {"id": "call00000", "type": "function", "function": {"name": "calculator", "arguments": {"expression": f"{x}*{y}"}}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "calculator", "tool_call_id": "call00000", "content": str(x * y)},
        ]
    messages.append({"role": "assistant", "content": f"\\boxed{{{x * y}}}"})
    return {"messages": messages, "tools": [TOOL]}


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    share = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    rng = random.Random(1)
    for _ in range(count):
        print(json.dumps(row(rng, share)))

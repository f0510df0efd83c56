#!/usr/bin/env python3
"""SFT, DPO and distillation on real weights: SmolLM2 135M Instruct, fetched by tools/fetch-models.

    tools/measure_objectives.py target/release/bupo-gguf SMOLLM2.gguf FOLDER [--threads N]

1. SFT on 200 questions answered in one small format; the loss on 50 others before and after.
2. DPO on from there: the format preferred to a chatty answer; accuracy and margin on held-out pairs before and after.
3. Distillation of the model's F16 self into a Q2_K export of it, on given texts; KL(teacher || student) on other
   texts before and after, by `diff`.

Prints one JSON object a study. Needs Python's standard library alone; FOLDER is made anew.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

NAMES = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon"]
THINGS = ["apples", "books", "coins", "pens", "shells", "stamps", "cards", "marbles"]


def question(rng):
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 60), rng.randint(2, 30)
    if rng.random() < 0.5:
        return f"{name} has {a} {thing} and gets {b} more. How many {thing} are there now?", a + b
    return f"{name} has {a + b} {thing} and gives {b} away. How many {thing} are left?", a


def rows(seed, n):
    rng = random.Random(seed)
    return [question(rng) for _ in range(n)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def sft(text, answer):
    return {"messages": [{"role": "user", "content": text},
                         {"role": "assistant", "content": f"<result>{answer}</result>"}]}


def dpo(text, answer):
    return {"prompt": [{"role": "user", "content": text}], "chosen": f"<result>{answer}</result>",
            "rejected": f"Let me see. The answer to your question is {answer}, I think."}


def run(program, *args):
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{args}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def trained(program, model, out, *args):
    begun = time.monotonic()
    run(program, "train", model, "--out", out, *args)
    seconds = time.monotonic() - begun
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return steps, seconds


def evaluations(steps):
    found = [{k: v for k, v in step.items() if k.startswith("eval")} for step in steps]
    found = [e for e in found if e]
    return found


def main():
    program, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    threads = sys.argv[4:]
    folder.mkdir(parents=True)
    for name, make in [("sft", sft), ("dpo", dpo)]:
        write(folder / f"{name}.jsonl", [make(*row) for row in rows(1, 200)])
        write(folder / f"{name}-held.jsonl", [make(*row) for row in rows(2, 50)])

    common = ["--rank", 8, "--seed", 1, *threads]
    steps, seconds = trained(program, model, folder / "run-sft", "--algo", "sft", "--data", folder / "sft.jsonl",
                             "--eval-data", folder / "sft-held.jsonl", "--epochs", 2, "--lr", 2e-4, *common)
    summary = json.loads((folder / "run-sft" / "summary.json").read_text())
    print(json.dumps({"study": "sft", "steps": len(steps), "seconds": round(seconds, 1), "summary": summary,
                      "first_loss": steps[0].get("loss"), "last_loss": steps[-1].get("loss"),
                      "evaluations": evaluations(steps)}), flush=True)

    adapter = folder / "run-sft" / "adapter.gguf"
    steps, seconds = trained(program, model, folder / "run-dpo", "--algo", "dpo", "--data", folder / "dpo.jsonl",
                             "--eval-data", folder / "dpo-held.jsonl", "--adapter", adapter, "--reference", "start",
                             "--epochs", 1, "--lr", 5e-5, "--seed", 1, *threads)
    summary = json.loads((folder / "run-dpo" / "summary.json").read_text())
    print(json.dumps({"study": "dpo", "steps": len(steps), "seconds": round(seconds, 1), "summary": summary,
                      "first": steps[0], "last": steps[-1]}), flush=True)

    teacher, student = folder / "f16.gguf", folder / "q2_k.gguf"
    run(program, "export", model, "--type", "f16", "--out", teacher)
    run(program, "export", model, "--type", "q2_k", "--out", student)
    texts = [f"{text} {reply}" for text, reply in rows(3, 150)]
    texts = [{"prompt": text.split("?")[0] + "?", "completion": f" {name_and_more(text)}"} for text in texts]
    write(folder / "texts.jsonl", texts)
    write(folder / "texts-held.jsonl",
          [{"prompt": text, "completion": f" {name_and_more(text)}"} for text, _ in rows(4, 40)])
    diff = ["diff", teacher, student, "--data", folder / "texts-held.jsonl", "--json", *threads]
    before = json.loads(run(program, *diff))
    steps, seconds = trained(program, student, folder / "run-distill", "--algo", "distill", "--teacher", teacher,
                             "--divergence", "forward", "--data", folder / "texts.jsonl", "--epochs", 2, "--lr", 3e-4,
                             *common)
    after = json.loads(run(program, *diff, "--adapter-b", folder / "run-distill" / "adapter.gguf"))
    print(json.dumps({"study": "distill", "steps": len(steps), "seconds": round(seconds, 1), "before": before,
                      "after": after}), flush=True)


def name_and_more(text):
    name = text.split()[0]
    return (f"To find out, we look at what {name} had at first and at what was added or taken away. "
            f"Then we count again, step by step, and write the number down.")


if __name__ == "__main__":
    main()

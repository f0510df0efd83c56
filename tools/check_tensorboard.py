#!/usr/bin/env python3
"""Reads the event file of a run with TensorBoard's own reader and holds it against metrics.jsonl.

    pip install tensorboard
    bupo-gguf train demo --tensorboard --out runs/t
    tools/check_tensorboard.py runs/t
"""

import json
import pathlib
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "reward": "train/reward",
    "loss": "train/loss",
    "entropy_nats": "train/entropy",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/grad_norm",
    "response_tokens": "train/completions/mean_length",
    "accuracy": "eval/accuracy",
    "eval_loss": "eval/loss",
}


def main(folder: pathlib.Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    compared = 0
    for key, tag in TAGS.items():
        expected = [(s["step"], s[key]) for s in steps if s.get(key) is not None]
        got = [(e.step, e.value) for e in events.Scalars(tag)] if expected else []
        assert [s for s, _ in got] == [s for s, _ in expected], (tag, got, expected)
        for (_, a), (_, b) in zip(got, expected):
            assert abs(a - b) <= 1e-6 * max(1.0, abs(b)), (tag, a, b)
        compared += len(got)
    texts = [t for t in events.Tags()["tensors"] if t == "completions/text_summary"]
    shown = sum(len(e.tensor_proto.string_val) for t in texts for e in events.Tensors(t))
    assert compared > 0
    print(f"{compared} figures of {len(steps)} steps agree; {shown} completions as text")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

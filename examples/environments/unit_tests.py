"""Code that is run against unit tests in a sandbox folder, as an environment program without dependencies:

    bupo-gguf train MODEL --env "cmd:python3 unit_tests.py" --data tasks.jsonl --env-timeout 60

Rows of tasks.jsonl: {"prompt": "Write a Python function add(a, b).", "answer": "assert add(1, 2) == 3"}. Each turn's last code
block (or, without one, all of it) is run with the tests after it, in a folder of its own, with limits of time and memory and
without the environment's variables. Passing is rewarded with 1 less 0.1 for every turn before; what failed is shown to the
model, which may try again. The limits stop accidents, not malice: for code you do not trust run this program in a container.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

SECONDS, BYTES = 10, 512 << 20


def limited():
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def code_of(text):
    blocks = re.findall(r"```(?:python|py)?\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


def fault(code, tests):
    """None where the tests pass, else the end of what Python said."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "answer.py"), "w") as file:
            file.write(f"{code}\n\n{tests}\n")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "answer.py"],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=SECONDS,
                preexec_fn=limited,
            )
        except subprocess.TimeoutExpired:
            return f"it took longer than {SECONDS} s"
        # The folder's name is another each time: what is said must not depend on it.
        words = done.stderr.decode(errors="replace").replace(folder, "")
        return None if done.returncode == 0 else words[-500:] or f"it ended with {done.returncode}"


def opening(problem):
    prompt = problem["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


tests = {}
for line in sys.stdin:
    question = json.loads(line)
    dialogue = question["dialogue"]
    if question["op"] == "reset":
        tests[dialogue] = question["problem"]["answer"]
        said = {"messages": opening(question["problem"])}
    elif question["op"] == "step":
        wrong = fault(code_of(question["content"]), tests[dialogue])
        if wrong is None:
            said = {"reward": max(0.1, 1.1 - 0.1 * question["turn"]), "done": True, "success": True}
        else:
            told = [{"role": "user", "content": f"The tests fail:\n{wrong}\nTry again."}]
            said = {"messages": told, "done": question["last"], "success": False, "reason": wrong.split("\n")[-2:][0]}
    else:
        tests.pop(dialogue, None)
        said = {}
    print(json.dumps(said), flush=True)

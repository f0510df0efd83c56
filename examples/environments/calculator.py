"""A calculator as a tool, as an environment program without dependencies:

    bupo-gguf train MODEL --env "cmd:python3 calculator.py" --data problems.jsonl

The problem's prompt opens the dialogue. A turn with calls gets their results; one without is the answer, and is right when
its last number is the problem's answer.
"""
import ast
import json
import operator
import re
import sys

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


def compute(node):
    if isinstance(node, ast.Expression):
        return compute(node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -compute(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](compute(node.left), compute(node.right))
    raise ValueError("only + - * / of numbers")


def result(expression):
    try:
        return str(compute(ast.parse(expression[:200], mode="eval")))
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError) as error:
        return f"error: {error}"


def opening(problem):
    prompt = problem["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def step(question, answer):
    if question["tool_calls"] and not question["last"]:
        results = [
            {"role": "tool", "name": call["name"], "tool_call_id": call["id"], "content": result(call["arguments"]["expression"])}
            for call in question["tool_calls"]
        ]
        return {"messages": results}
    numbers = re.findall(r"-?\d+(?:\.\d+)?", question["content"].replace(",", ""))
    right = bool(numbers) and float(numbers[-1]) == float(answer) and not question["truncated"]
    return {"reward": float(right), "done": True, "success": right}


def main():
    answers = {}
    for line in sys.stdin:
        question = json.loads(line)
        dialogue = question["dialogue"]
        if question["op"] == "reset":
            answers[dialogue] = question["problem"]["answer"]
            said = {"messages": opening(question["problem"]), "tools": [TOOL]}
        elif question["op"] == "step":
            said = step(question, answers[dialogue])
        else:
            answers.pop(dialogue, None)
            said = {}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Cuts the 1319 rows of GSM8K's published test file in two, as JSON lines: rows 1 to 200 are only ever asked, the others are practised on.

    gsm8k_rows.py gsm8k_test.jsonl test | practice | solutions

`solutions`: practice rows with the published solution as `completion`, its sums in << >> left out and the answer boxed at its end.
"""
import json, re, sys

TEST = 200


def main():
    path, part = sys.argv[1:]
    rows = [json.loads(line) for line in open(path)]
    rows = rows[:TEST] if part == "test" else rows[TEST:]
    for row in rows:
        solution, answer = row["answer"].split("####")
        out = {"question": row["question"], "answer": answer.strip().replace(",", "")}
        if part == "solutions":
            out["completion"] = re.sub(r"<<.*?>>", "", solution).strip() + f"\nThe answer is \\boxed{{{out['answer']}}}."
        print(json.dumps(out, ensure_ascii=False))


main()

#!/usr/bin/env python3
"""Completions by template, judged by `bupo-gguf verify` and by Hugging Face's math-verify.

    pip install math-verify
    tools/verifier_peer.py --verify target/release/bupo-gguf [--without-peer] [--show N] [--markdown] [--rows FILE]

Every completion is a template of ours times an answer of ours, so that its right verdict is known. Printed by kind: how
many completions there are, how many wrong ones each side pays for, how many right ones it refuses. --show N lists up to
N mistakes of each side and kind; --rows FILE writes the rows as JSON lines. With --without-peer the exit code says
whether `verify` made no mistake.
"""

import argparse
import itertools
import json
import logging
import subprocess
import sys

# Gold answer, spellings of it in LaTeX, in plain text, and what a wrong completion says instead.
NUMBERS = [
    ("12", ["12", "12.0", r"\frac{24}{2}"], ["12", "12.0"], ["21", "-12", "1.2", "120"]),
    ("-7", ["-7", "-7.0"], ["-7"], ["7", "-17", "-0.7"]),
    ("7", ["7"], ["7"], ["-7", "17", r"\frac{3}{7}", r"2^{7}", r"\sqrt{7}", "7x", r"\binom{9}{7}", "7!", "x_7"]),
    (r"\frac{3}{7}", [r"\frac{3}{7}", r"\dfrac{3}{7}", r"\frac{6}{14}", "3/7"], ["3/7", "6/14"], ["7", "3", r"\frac{7}{3}", "0.43"]),
    ("0.75", [r"\frac{3}{4}", "0.75", ".75"], ["0.75", "3/4"], ["0.57", "75", r"\frac{4}{3}"]),
    ("1500000", [r"1.5 \times 10^{6}", "1{,}500{,}000", r"1.5 \cdot 10^6"], ["1,500,000", "1.5 million", "1500000"], ["6", r"1.5 \times 10^{5}", "1.5"]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}"], ["2*sqrt(3)"], ["3", "2", r"3\sqrt{2}", r"\sqrt{3}"]),
    (r"\frac{\pi}{6}", [r"\frac{\pi}{6}", r"\pi/6"], ["pi/6"], ["6", r"\pi", r"\frac{6}{\pi}"]),
    ("1024", ["1024", "2^{10}", "1{,}024"], ["1,024", "1024"], ["10", "2", "24"]),
    (r"50\%", [r"50\%", "0.5", r"\frac12"], ["50%", "50 percent"], ["5\\%", "0.05"]),
    ("x^2+3", ["x^2+3", "3 + x^{2}"], ["x^2 + 3"], ["3", "2", "x^2-3", "x^3+2"]),
    (r"1 - \frac{1}{e}", [r"1 - \frac{1}{e}", "1-e^{-1}"], ["1 - 1/e"], ["1", r"1 + \frac{1}{e}", r"\frac{1}{e}"]),
]
SETS = [
    (r"\{1, 2, 3\}", [r"\{3, 1, 2\}", "1, 2, 3", r"1, 2 \text{ and } 3"], [r"\{1, 2\}", r"\{1, 2, 4\}", "3", r"\{1, 2, 3, 4\}"]),
    ("2, -5", ["-5, 2", r"\{2, -5\}", r"x = 2 \text{ or } x = -5", "(2, -5)"], ["2", "-5", "2, 5", r"\{-2, -5\}"]),
    (r"\pm 3", ["-3, 3", r"\pm 3", r"\{-3, 3\}"], ["3", "-3", r"\pm 9"]),
    (r"\emptyset", [r"\emptyset", r"\varnothing", r"\{\}"], ["0", r"\{0\}"]),
    (r"\{(1,2), (3,4)\}", ["(3,4), (1,2)", r"\{(1,2),(3,4)\}"], ["(1,2)", r"\{(2,1), (4,3)\}", r"\{1,2,3,4\}"]),
]
INTERVALS = [
    ("[3, \\infty)", ["[3, \\infty)", r"x \ge 3", r"3 \le x", r"x \in [3, +\infty)", r"\left[3, \infty\right)"], [r"(3, \infty)", "3", "x > 3", r"x \le 3", r"[-3, \infty)"]),
    (r"(-\infty, 5]", [r"(-\infty, 5]", r"5 \ge x", r"x \leq 5"], ["5", "x < 5", r"x \ge 5", r"(-\infty, 5)"]),
    (r"(1, 4) \cup (6, 9)", [r"(6, 9) \cup (1, 4)", r"1 < x < 4 \text{ or } 6 < x < 9"], ["(1, 9)", "(1, 4)", r"[1, 4] \cup [6, 9]", "9"]),
    ("-2 < x < 7", ["(-2, 7)", "7 > x > -2", r"x \in (-2, 7)"], ["[-2, 7]", "7", "x < 7", "-2 < x < 6"]),
]
TUPLES = [
    ("(1, 2)", ["(1, 2)", "x = 1, y = 2", r"(x, y) = (1, 2)", r"\left(1, 2\right)", "y = 2, x = 1"], ["(2, 1)", "2", "1", "x = 2, y = 1", "(1, 2, 3)"]),
    (r"\left(3, \frac{\pi}{2}\right)", [r"(3, \frac{\pi}{2})", r"(3, \pi/2)", r"r = 3, \theta = \frac{\pi}{2}"], [r"(3, \pi)", "3", r"(\frac{\pi}{2}, 3)"]),
]
PLAIN = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
MATRICES = [
    (PLAIN, [
        r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
        r"\left( \begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array} \right)",
        r"\left[ \begin{array}{rr} 1 & 2 \\ 3 & 4 \\ \end{array} \right]",
        r"\left( \begin{matrix} 1 & 2 \\[4pt] 3 & 4 \end{matrix} \right)",
        "A = " + PLAIN,
        r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}^T",
        r"\frac{1}{2}\begin{pmatrix} 2 & 4 \\ 6 & 8 \end{pmatrix}",
    ], [
        r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}",
        r"\left| \begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array} \right|",
        PLAIN + "^T", "4", "-2",
    ]),
    (r"\begin{pmatrix} -2 \\ 7 \end{pmatrix}", [
        r"\left( \begin{array}{c} -2 \\ 7 \end{array} \right)", r"\begin{pmatrix} -2 & 7 \end{pmatrix}^T", "(-2, 7)", r"\langle -2, 7 \rangle",
    ], [r"\begin{pmatrix} 7 \\ -2 \end{pmatrix}", r"\begin{pmatrix} -27 \end{pmatrix}", "7", "5"]),
]
UNITS = [
    (r"5 \text{ cm}", ["5 cm", "5", r"5\,\mathrm{cm}", r"50 \text{ mm}", "5cm"], ["5 m", r"5 \text{ km}", "50 cm", "5 seconds"]),
    (r"15\mbox{ cm}^2", ["15", "15 cm^2", "15 square centimeters", r"15 \text{ cm}^2"], ["15 cm", "225", "51 cm^2"]),
    (r"\$18.90", ["18.90", r"\$18.90", "18.9 dollars", "1890 cents"], ["1890", r"\$19.80", "18.90 cents"]),
    (r"2 \text{ hours}", ["120 minutes", "2 hours", "2"], ["2 minutes", "120", "20 hours"]),
    ("2mg", ["2mg", "2 m g", r"2 \cdot m \cdot g"], ["2", "2m", "mg", "2g", r"2 \text{ mg}"]),
    (r"\frac{3mg}{2}", ["3mg/2", r"\frac{3}{2}mg", "1.5mg"], ["3/2", "1.5", "3mg"]),
    (r"5 \text{ mg}", ["5 mg", "5mg", "5", r"0.005 \text{ g}"], ["5 kg", "50 mg", "5 mL"]),
    (r"60^\circ", ["60", r"60^\circ", "60 degrees", r"\frac{\pi}{3}"], ["30^\\circ", "6", r"\pi"]),
    ("5", ["5 apples", r"5\text{ cm}", "5 mg"], ["5 million", "5x", "5/2 apples", "5mg"]),
    (r"3 \text{ million}", ["3{,}000{,}000", "3 million", r"3 \times 10^6"], ["3", "3 billion", "3000"]),
]
TIMES = [
    ("12:00", ["12:00", "12:00 noon"], ["1:00", "12", "11:00", "10:00"]),
    (r"3:00 \text{ p.m.}", ["3:00 PM", "3:00 p.m.", "3 p.m.", "15:00", r"3:00\text{ pm}"], ["3:00 a.m.", "4:00 PM", "3:30 p.m.", "1:00 p.m."]),
    ("10:30", ["10:30", "10:30 a.m."], ["2:06", "10:03", "11:30", "20:60"]),
]
RATIOS = [
    ("2:1", ["2:1", "6:3", r"\frac{2}{1}", "2 : 1"], ["1:2", "3:1", "21"]),
    ("3:5", ["3:5", "6:10", r"\frac{3}{5}", "0.6"], ["5:3", "3", "35", "3:50"]),
    ("8:7:3", ["16:14:6", "8:7:3"], ["8:3:7", "8:7", "873"]),
]
CHOICES = [
    ("C", ["C", "(C)", "C.", r"\text{C}", r"\textbf{(C)}", "C. 15", "(C) 15", "C) 15", "C: 15", r"\text{C. } 15", r"\text{Option C}", r"\textbf{(C)}\ 15"],
     ["B", "(D)", "A, C", "C or D", "B. C", "A. 15 B. 20 C. 25", "D. 15", "(A) or (C)", "c^2"]),
    (r"\text{(B)}", ["B", "(B)", r"\mathrm{(B)}", "B. Paris", r"\text{(b)}"], ["(C)", "2", "A. B", r"\text{(A) (B)}"]),
]
WORDS = [
    (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}"], ["Evan", "Evelyn or Navin", r"\text{not Evelyn}"]),
    ("yes", ["Yes", r"\text{yes}", "true"], ["no", "yes and no"]),
    (r"\text{even}", ["even", r"\text{even}"], ["odd", "even or odd"]),
]
STATED = [
    ("12", ["m+n = 12", "m + n = 5 + 7 = 12", "N = 12", "abc = 12", r"|AB| = 12", "5 + 7 = 12", r"x = \frac{24}{2} = 12", r"\text{Area} = 12", "12 = m + n"],
     ["10x = 120", "m+n = 21", "12 = 13", "12x = 24", "x > 12", r"x \ne 12", "x + 5 = 12", "2x = 12", "x^2 = 12", "x = 13 - 1 = 12 + 1 = 13"]),
    ("60", [r"\angle ABC = 60^\circ", r"\angle ABC = 60", r"m\angle B = 60^\circ"], [r"\angle ABC = 30^\circ", r"60^\circ > \angle B"]),
    (r"\frac{100}{3}", [r"x = \frac{100}{3} \approx 33.3", r"\frac{100}{3} \approx 33.33", r"\frac{100}{3}"], [r"\frac{100}{3} \approx 50 = 50", r"x \approx 33.3", "33.3"]),
    ("33.3", [r"\frac{100}{3} \approx 33.3", r"x \approx 33.3"], [r"\approx 33", r"\frac{100}{3}"]),
    ("2x+4y-3=0", ["y = -1/2*x + 3/4", "4x + 8y = 6", "3 = 2x + 4y"], ["2x+4y+3=0", "3", "y = -1/2*x", "0"]),
    (r"\frac{1}{2}", [r"P(X = 2) = \frac{1}{2}", r"P(A) = \frac12", r"\sin\theta = \frac{1}{2}"], [r"P(A) = 2", r"2P(A) = \frac{1}{2}"]),
]

BOXED = [
    r"\boxed{@}", r"So we get $\boxed{@}$.", "First \\boxed{999}, but after a check:\n\n$$\\boxed{@}$$", r"Therefore the answer is \(\boxed{@}\), as claimed.",
    "**Final Answer**\n\\boxed{@}", r"It follows that \[\boxed{@}.\] Done.", r"\fbox{@}",
]
INLINE = [
    r"Altogether we get $@$.", r"Hence the value that we look for is $@$, which is what was asked.", r"Adding up gives \(@\).", r"With $k = 99$ this becomes $@$",
    r"In step 3 we found that the result is $@$.", r"We conclude: $@$ (see the figure above).",
]
DISPLAY = [
    "The answer is:\n\n$$\n@\n$$", "The answer is:\n\n\\[\n@\n\\]", "So finally\n$$@.$$", "Thus\n\\begin{align*}\nS &= 1 + 2 \\\\\n&= @\n\\end{align*}",
    "**Answer:**\n\n\\[ @ \\]\n", "We get\n\\[\n\\boxed{@}\n\\]\nas needed.",
]
SENTENCE = [
    "The answer is $@$.", "So the answer is $@$ because 6 times 7 is 42.", "The answer is therefore $@$.", r"The final answer is \(@\), since nothing else is left (we tried 17 cases).",
    "Final Answer: The final answer is $@$. I hope it is correct.", "Answer: $@$", "**Answer:** $@$\n", "The correct answer to the question is $@$, as 2 + 2 = 4.",
    "Thus, the answer is simply $@$ (in lowest terms).", "The answer must be $@$, so we are done.", "#### $@$",
]
PROSE = [
    "The answer is @.", "So the answer is @ because 6 times 7 is 42.", "The answer is therefore @.", "Thus, the answer is clearly @, as there were 17 cases.",
    "Altogether we get @.", "We count again in step 2 and find @.", "#### @", "Answer: @", "Final answer: **@**", "The answer would be @ (after simplifying).",
    "Putting it all together: @",
]
THOUGHTS = [
    "<think>It may be \\boxed{~}.</think>\n\nThe answer is $@$.", "<think>First ~ then 5.</think>\n\\boxed{@}", "<think>hm ~ hm</think><answer>$@$</answer>",
    "<think>The answer is ~.</think>\n<answer>The answer is $@$.</answer>", "<think>a</think>We get $@$.", "<think>\n~\n</think>\n\n<answer>\n\\boxed{@}\n</answer>",
]
# Completions that give no answer: nothing they say is paid for.
NOTHING = [
    "<think>Perhaps \\boxed{@}. But wait, in the second case", "<think>The answer is $@$.", "<think>x</think><think>\\boxed{@}", "\\boxed{@} or rather \\boxed{", "<answer>@",
    "The answer is not $@$.", "The answer is $@$ or maybe $997$.", "It is either $@$ or $998$.", "\\boxed{@} and \\boxed{996}", "$\\boxed{@}$, $\\boxed{995}$",
    "The answer is $@$. Wait, that is wrong. The answer is $994$.", "<think>\\boxed{@}</think>So it is $993$.", "The roots are $@$ and $992$.",
    "The answer is $991 + @$.", "We see that it is at least $@$ and at most $990$, so $\\frac{989}{988}$",
]
# A formula with the answer as a piece of it.
PIECES = [
    r"the probability is $\frac{@}{97}$.", r"the probability is $\frac{97}{@}$.", r"the number of subsets is $3^{@}$.", r"the answer is $\sqrt[3]{@}$.", r"the sum is $x_{@}$.", r"So we have $@ + y$.",
    r"we get \[ \binom{91}{@} \]", r"the answer is @/97.", r"this is 3^@.", r"It lies in $(-\infty, @)$.", r"So $x < @$.", r"The point is $(@, 94)$.", r"so f(x) = @x + 9", "in the @th row",
]
WHOLE = ["2", "3", "5", "12", "17"]


def rows():
    """(kind, gold, completion, whether it is right)."""

    def fill(kind, templates, gold, right, wrong, other="77"):
        for template, answer in itertools.product(templates, right):
            yield kind, gold, template.replace("~", other).replace("@", answer), True
        for template, answer in itertools.product(templates, wrong):
            # A wrong completion has the right answer among its thoughts.
            hint = right[0] if kind == "thoughts" else other
            yield kind, gold, template.replace("~", hint).replace("@", answer), False

    for gold, latex, plain, wrong in NUMBERS:
        flat = [w for w in wrong if "\\" not in w]
        yield from fill("boxed", BOXED, gold, latex, wrong)
        yield from fill("inline formula", INLINE, gold, latex, wrong)
        yield from fill("display formula", DISPLAY, gold, latex, wrong)
        yield from fill("sentence with a formula", SENTENCE, gold, latex, wrong)
        yield from fill("plain sentence", PROSE, gold, plain, flat)
        yield from fill("thoughts", THOUGHTS, gold, latex[:2], wrong)
        for template in NOTHING:
            yield "no answer, several, taken back", gold, template.replace("@", latex[0]), False
    for template, gold in itertools.product(PIECES, WHOLE):
        yield "piece of a formula", gold, "Altogether " + template.replace("@", gold), False
    for kind, table in [("sets, lists", SETS), ("intervals, inequalities", INTERVALS), ("tuples", TUPLES), ("matrices", MATRICES)]:
        for gold, right, wrong in table:
            yield from fill(kind, BOXED[:3] + INLINE[:2] + DISPLAY[:2] + SENTENCE[:4], gold, right, wrong)
    for gold, right, wrong in STATED:
        yield from fill("stated values", BOXED[:2] + INLINE[:2] + DISPLAY[:2] + SENTENCE[:2], gold, right, wrong)
    for kind, table in [("units", UNITS), ("times", TIMES), ("ratios", RATIOS)]:
        for gold, right, wrong in table:
            yield from fill(kind, BOXED[:3] + SENTENCE[:3] + ["The answer is @.", "#### @", "The answer is @, because 3 + 4 = 7."], gold, right, wrong)
    for gold, right, wrong in CHOICES:
        yield from fill("choices", BOXED[:3] + ["The answer is @", "The correct option is @", "Answer: @", "<think>A?</think><answer>@</answer>"], gold, right, wrong)
    for gold, right, wrong in WORDS:
        yield from fill("words", BOXED[:2] + ["The answer is @.", "The answer is @, because nobody else was there.", "<answer>@</answer>"], gold, right, wrong)


def ours(program, table):
    text = "".join(json.dumps({"gold": gold, "completion": completion}) + "\n" for _, gold, completion, _ in table)
    out = subprocess.run([*program, "verify"], input=text, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in filter(None, out.split("\n"))]
    return [line["equal"] for line in lines], [line["reason"] for line in lines]


def theirs(table):
    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig

    logging.disable(logging.CRITICAL)
    number = [LatexExtractionConfig(), ExprExtractionConfig()]
    letters = [*number, StringExtractionConfig(strings=("A", "B", "C", "D", "E"))]
    verdicts = []
    for kind, gold, completion, _ in table:
        config = letters if kind == "choices" else number
        gold = gold.strip("\\text{()}") if kind == "choices" else f"${gold}$"
        try:
            verdicts.append(bool(verify(parse(gold, config), parse(completion, config))))
        except Exception:
            verdicts.append(False)
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", default="target/release/bupo-gguf", help="the program, with arguments before `verify`")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--show", type=int, default=0, metavar="N")
    parser.add_argument("--rows", metavar="FILE")
    args = parser.parse_args()
    table = list(dict.fromkeys(rows()))
    if args.rows:
        with open(args.rows, "w") as file:
            for kind, gold, completion, right in table:
                file.write(json.dumps({"kind": kind, "gold": gold, "completion": completion, "equal": right}) + "\n")
    judged, reasons = ours(args.verify.split(), table)
    sides = {"verify": judged}
    if not args.without_peer:
        sides["math-verify"] = theirs(table)
    print("| kind | completions | " + " | ".join(f"{side}: paid wrongly | refused wrongly" for side in sides) + " |")
    print("|---|---|" + "---|---|" * len(sides))
    kinds = list(dict.fromkeys(row[0] for row in table))
    mistakes = 0
    for kind in [*kinds, "all"]:
        places = [i for i, row in enumerate(table) if kind in (row[0], "all")]
        cells = []
        for name, verdicts in sides.items():
            paid = [i for i in places if verdicts[i] and not table[i][3]]
            refused = [i for i in places if not verdicts[i] and table[i][3]]
            cells += [str(len(paid)), str(len(refused))]
            if kind == "all":
                mistakes += (len(paid) + len(refused)) * (name == "verify")
                continue
            for what, found in [("PAID", paid), ("REFUSED", refused)]:
                for i in found[: args.show]:
                    reason = reasons[i] if name == "verify" else ""
                    print(f"  {name} {what} [{kind}] gold {table[i][1]!r}: {table[i][2]!r} {reason}", file=sys.stderr)
        print(f"| {kind} | {len(places)} | " + " | ".join(cells) + " |")
    sys.exit(1 if args.without_peer and mistakes else 0)


if __name__ == "__main__":
    main()

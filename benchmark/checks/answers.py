"""What the answer checker gets wrong, against the verdicts of a person on the cases of
tests/answer_cases.py.

    python benchmark/checks/answers.py                        # seconds
    python benchmark/checks/answers.py --cases FILE           # and further cases, one a line
    python benchmark/checks/answers.py --golds FOLDER         # and everyday phrasings of its golds

A line of FILE is {"kind", "text", "reference", "right", "task": "math" or "science"}, or with
"options" and "letter" in the place of the last three. FOLDER has a test.jsonl with worked answers
that end in `#### number`, such as gsm8k's: every number must be accepted in every phrasing, and the
number that is one larger refused. Writes benchmark/results/answers.md: a confusion table, and every
case on which checker and person differ."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.answer_cases import CHOICE, MATH, WORDS, verdict  # noqa: E402
from utils.world.answers import choose, is_correct  # noqa: E402

PHRASINGS = {
    "comma behind": "The answer is {n}, as the sum shows.",
    "remark behind": "The answer is {n}. I am sure that this answer is right.",
    "displayed": "The answer is:\n\\[\n{n}\n\\]",
    "two dollars": "The answer is:\n$$\n{n}\n$$",
    "money": "The answer is ${n}. He paid $7 before.",
    "heading": "#### Final Answer\n{n}",
    "bold heading": "**Final Answer**\n\n{n}",
    "tags": "<think>Let me see.</think>\n<answer>{n}</answer>",
    "bold": "The answer is **{n}**.",
    "equation": "The answer is {m} + 2 = {n} cups.",
    "approximately": "The answer is approximately {n}.",
    "about": "The answer is about {n}.",
    "box": "Hence $\\boxed{{{n}}}$.",
    "number": "So they need {n} of them.",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=Path, default=None)
    parser.add_argument("--golds", type=Path, default=None)
    args = parser.parse_args()
    cases = {"mathematics": MATH, "options": CHOICE, "short answers": WORDS}
    judged = [(kind, case, verdict(case)) for kind, some in cases.items() for case in some]
    if args.cases:
        judged += [("further cases", *further(json.loads(line))) for line in args.cases.open()]
    lines = [
        "| answers | cases | right, accepted | right, refused | wrong, refused | wrong, accepted |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*dict.fromkeys(kind for kind, _, _ in judged), "all"]:
        count = Counter((case[3], said) for kind, case, said in judged if name in (kind, "all"))
        lines.append(row(name, count))
    lines += [
        "",
        "| kind | completion | reference | options | a person says |",
        "|---|---|---|---|---|",
    ]
    for _, case, said in judged:
        if said != case[3]:
            texts = case[1], case[2], ", ".join(case[4:] and case[4])
            cells = [repr(text).replace("|", "\\|") if text else "" for text in texts]
            lines.append(f"| {case[0]} | {' | '.join(cells)} | {'right' if case[3] else 'wrong'} |")
    if args.golds:
        lines += ["", *golds(args.golds / "test.jsonl")]
    text = "\n".join(lines) + "\n"
    if not args.cases and not args.golds:
        (ROOT / "benchmark" / "results" / "answers.md").write_text(text)
    print(text)


def row(name: str, count: Counter) -> str:
    cells = [count[key] for key in ((True, True), (True, False), (False, False), (False, True))]
    return f"| {name} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |"


def further(case: dict) -> tuple[tuple, bool]:
    """A line of --cases in the form of tests/answer_cases.py, and what the checker says of it."""
    if "options" in case:
        texts = case["kind"], case["text"], case["letter"], True, tuple(case["options"])
        return texts, choose(case["text"], case["options"]) == case["letter"]
    texts = case["kind"], case["text"], case["reference"], case["right"]
    return texts, is_correct(case["text"], case["reference"], case["task"] == "science")


def golds(file: Path) -> list[str]:
    """A table of wrong verdicts on the golds of a data set in everyday phrasings."""
    answers = [json.loads(line)["answer"] for line in file.open()]
    lines = ["| phrasing | golds | gold, refused | gold + 1, accepted |", "|---|---|---|---|"]
    for name, phrasing in PHRASINGS.items():
        wrong = [0, 0]
        for answer in answers:
            gold = answer.rsplit("####", 1)[1].strip()
            number = int(gold.replace(",", ""))
            for more in (0, 1):
                shown = gold if not more else f"{number + 1:,}" if "," in gold else str(number + 1)
                text = phrasing.format(n=shown, m=number + more - 2)
                wrong[more] += is_correct(text, answer) == bool(more)
        lines.append(f"| {name} | {len(answers)} | {wrong[0]} | {wrong[1]} |")
    return lines


if __name__ == "__main__":
    main()

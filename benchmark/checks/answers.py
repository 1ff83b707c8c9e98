"""What the answer checker gets wrong, against the verdicts of a person on the cases of
tests/answer_cases.py.

    python benchmark/checks/answers.py                        # seconds

Writes benchmark/results/answers.md: a confusion table, and every case on which checker and person
differ."""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.answer_cases import CHOICE, MATH, WORDS, verdict  # noqa: E402

KINDS = {"mathematics": MATH, "options": CHOICE, "short answers": WORDS}


def main() -> None:
    lines = [
        "| answers | cases | right, accepted | right, refused | wrong, refused | wrong, accepted |",
        "|---|---|---|---|---|---|",
    ]
    errors = [
        "",
        "| kind | completion | reference | options | a person says |",
        "|---|---|---|---|---|",
    ]
    total = Counter()
    for kind, cases in KINDS.items():
        count = Counter((case[3], verdict(case)) for case in cases)
        total += count
        lines.append(row(kind, count))
        for case in cases:
            if verdict(case) != case[3]:
                cells = [
                    repr(x).replace("|", "\\|") if x else ""
                    for x in (case[1], case[2], ", ".join(case[4:] and case[4]))
                ]
                errors.append(
                    f"| {case[0]} | "
                    + " | ".join(cells)
                    + f" | {'right' if case[3] else 'wrong'} |"
                )
    lines.append(row("all", total))
    text = "\n".join(lines + errors) + "\n"
    (ROOT / "benchmark" / "results" / "answers.md").write_text(text)
    print(text)


def row(kind: str, count: Counter) -> str:
    cells = [count[key] for key in ((True, True), (True, False), (False, False), (False, True))]
    return f"| {kind} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()

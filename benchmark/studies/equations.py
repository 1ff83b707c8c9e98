"""Word problems with bare numbers as answers become problems with a worked answer, `7 + 2 = 9`:
those that name two numbers, of which exactly one operation makes the answer.

    python benchmark/studies/equations.py DIR/train.jsonl OUT     # columns question and answer

Writes OUT/train.jsonl and OUT/test.jsonl."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import tyro

from utils.world.answers import COUNTS

WORDS = "|".join(sorted(COUNTS, key=len, reverse=True))
NUMBER = re.compile(rf"\d+(?:,\d{{3}})*(?:\.\d+)?|\b(?:{WORDS})\b", re.IGNORECASE)


def numbers(question: str) -> list[Fraction]:
    """Those in a text, in digits or as a word up to ninety, in their order."""
    found = (text.lower().replace(",", "") for text in NUMBER.findall(question))
    return [Fraction(COUNTS.get(text, text)) for text in found]


def equation(question: str, answer: str, largest: int) -> str | None:
    """The one `a op b = c` that leads from the question's two numbers to its answer, if there is
    one and none of the three is too large."""
    named = numbers(question)
    if len(named) != 2 or max(*named, Fraction(answer)) > largest:
        return None
    first, second = named
    fits = []
    for a, b in ((first, second), (second, first)):
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
        fits += [(a, op, b) for op, c in results.items() if c == Fraction(answer)]
    if len({op for _, op, _ in fits}) != 1:
        return None
    a, op, b = fits[0]
    return f"{decimal(a)} {op} {decimal(b)} = {answer}"


def decimal(x: Fraction) -> str:
    """As a question would write it."""
    return f"{float(x):.10g}"


def main(
    file: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    test: int = 250,
    largest: int = 100,
) -> None:
    """test: problems that are held out, every so-manieth. largest: number in a problem and its
    answer; small models calculate badly with large ones."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    worked = [(row["question"], equation(**row, largest=largest)) for row in rows]
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in worked if a]
    held_out = {i * len(lines) // test for i in range(test)}
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        kept = [line for i, line in enumerate(lines) if (i in held_out) == (split == "test")]
        (out / f"{split}.jsonl").write_text("".join(kept))
        print(f"{out / split}.jsonl: {len(kept)} problems")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

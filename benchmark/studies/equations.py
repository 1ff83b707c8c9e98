"""Word problems with bare numbers as answers become problems with a worked answer, `7 + 2 = 9`:
those that name two numbers, of which exactly one operation makes the answer.

    python benchmark/studies/equations.py MU-NLPC/Calc-mawps MU-NLPC/Calc-asdiv_a@test --answer-column result
    python benchmark/studies/equations.py DIR           # a folder with train.jsonl: question, answer

Writes train.jsonl and test.jsonl to --out, for the scripts' --dataset."""

import json
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from utils.errors import stop  # noqa: E402
from utils.files import make_folder  # noqa: E402
from utils.world.answers import COUNTS, quantity  # noqa: E402
from utils.world.data import load_split  # noqa: E402

WORDS = "|".join(sorted(COUNTS, key=len, reverse=True))
NUMBER = re.compile(rf"\d+(?:,\d{{3}})*(?:\.\d+)?|\b(?:{WORDS})\b", re.IGNORECASE)


@dataclass
class Args:
    datasets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders or hub names, NAME or NAME@SPLIT"""
    out: Path = Path("runs/words")
    """folder for the two files"""
    question_column: str | None = None
    """default: question, problem, ..."""
    answer_column: str | None = None
    """default: answer, solution, ..."""
    test: int = 250
    """problems that are held out, spread evenly over all"""
    largest: int = 100
    """number in a problem or its answer; small models calculate badly with large ones"""

    choices_column, seed = None, 1  # `load_split` asks for them


def numbers(question: str) -> list[Fraction]:
    """Those in a text, in digits or as one word up to ninety, in their order; twenty-five is two."""
    found = (text.lower().replace(",", "") for text in NUMBER.findall(question))
    return [Fraction(COUNTS.get(text, text)) for text in found]


def equation(question: str, answer: str, largest: int) -> str | None:
    """The one `a op b = c` that leads from the question's two numbers to its answer, if there is
    one and none of the three is too large."""
    named, wanted = numbers(question), quantity(answer)[0]
    if len(named) != 2 or wanted is None or max(*named, wanted) > largest:
        return None
    first, second = named
    fits = []
    for a, b in ((first, second), (second, first)):
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
        fits += [(a, op, b) for op, c in results.items() if c == wanted]
    if len({op for _, op, _ in fits}) != 1:
        return None
    a, op, b = fits[0]
    return f"{decimal(a)} {op} {decimal(b)} = {decimal(wanted)}"


def decimal(x: Fraction) -> str:
    """As a question would write it."""
    return f"{float(x):.10g}"


def main(args: Args) -> None:
    lines = {}  # no question twice
    for name in args.datasets:
        name, _, split = (name, "", "") if Path(name).exists() else name.partition("@")
        for found in load_split(args, name, None, split or None, "train", unlabelled=False):
            worked = found.answer and equation(found.text, found.answer, args.largest)
            if worked:
                row = {"question": found.text, "answer": worked}
                lines.setdefault(found.text, json.dumps(row, ensure_ascii=False) + "\n")
    lines = list(lines.values())
    if not 0 < args.test < len(lines):
        stop(
            f"--test {args.test}: of such problems there are {len(lines)}, to train on and to test"
        )
    held_out = {i * len(lines) // args.test for i in range(args.test)}
    make_folder("--out", args.out)
    for split in ("train", "test"):
        kept = [line for i, line in enumerate(lines) if (i in held_out) == (split == "test")]
        (args.out / f"{split}.jsonl").write_text("".join(kept), encoding="utf-8")
        print(f"{args.out / split}.jsonl: {len(kept)} problems")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Did a run gain, beyond chance over its held-out problems? The share of them that it answers right
in its last evaluation, less that of its first, or less that of another run's last.

    python benchmark/studies/paired.py runs/A             # last against first evaluation
    python benchmark/studies/paired.py runs/A runs/B      # A against B, both at their last

Reads samples.jsonl. The interval is that of paired verdicts, mean and 1.96 standard errors; it
knows nothing of other seeds."""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from utils.errors import stop  # noqa: E402
from utils.files import read_rows  # noqa: E402


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """one folder, or two"""


def verdicts(run: Path, last: bool) -> dict[str, float]:
    """1 or 0 by question, in the first or last evaluation of a run."""
    if not (run / "samples.jsonl").is_file():
        stop(f"{run}: no run with a samples.jsonl")
    rows = read_rows(run / "samples.jsonl")
    update = (max if last else min)(row["update"] for row in rows)
    return {row["question"]: row["right"] for row in rows if row["update"] == update}


def difference(after: dict[str, float], before: dict[str, float]) -> tuple[float, float, float]:
    """Mean difference over the problems that both have, and its 95 % interval."""
    found = [after[question] - before[question] for question in after if question in before]
    if len(found) < 2:
        stop("fewer than two questions are in both evaluations")
    reach = 1.96 * stdev(found) / len(found) ** 0.5
    return mean(found), mean(found) - reach, mean(found) + reach


def main(args: Args) -> None:
    if len(args.runs) not in (1, 2):
        stop("give one run, or two")
    after = verdicts(args.runs[0], last=True)
    before = verdicts(args.runs[-1], last=len(args.runs) == 2)
    print("{:+.3f} (95 % over problems: {:+.3f} to {:+.3f})".format(*difference(after, before)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""How wrong is a verifier, and what does it cost? Judge some answers yourself.

    python -m utils.audit draw runs/A/samples.jsonl --out judge.csv             # 100 answers
    python -m utils.audit draw runs/A/samples.jsonl --out judge.csv --reward-fn rewards:short
    python -m utils.audit read judge.csv      # once its column `right` is filled in with 0 and 1

`draw` takes as many answers that are told right as told wrong, since errors of both kinds are to be
counted, and notes for how many of the file each one stands. Any table will do for `read` that has
columns told and right, CSV or JSON lines; where it has none called weight, all weigh the same.
"""

import csv
import io
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import beta

from utils.args import command
from utils.errors import stop
from utils.files import check_file, read_rows, write_atomically
from utils.report.price import price
from utils.world.reward_fn import RewardFunction

Interval = tuple[float, float]
MOST = 10**6  # answers: more are no advice


def exact(found: float, count: float, confidence: float = 0.95) -> Interval:
    """Clopper and Pearson's interval of a share of which `found` of `count` are seen; `count` may be
    a fraction, where a larger sample is imagined."""
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, found, count - found + 1) if found > 0 else 0.0
    high = beta.ppf(1 - tail, found + 1, count - found) if found < count else 1.0
    return float(low), float(high)


@dataclass
class Audit:
    """Judged answers: `told_right` the share of all answers that the verifier calls right; of
    `counts` judged ones that are told wrong, told right, `rights` are right."""

    told_right: float
    counts: tuple[float, float]
    rights: tuple[float, float]

    def rates(self, right_if_wrong: float, right_if_right: float) -> tuple[float, float, float]:
        """v, false negatives and false positives, where those shares of the answers that are told
        wrong and right are right (Bayes)."""
        q = self.told_right
        missed, seen = (1 - q) * right_if_wrong, q * right_if_right
        v = missed + seen
        nan = float("nan")
        return v, missed / v if v else nan, (q - seen) / (1 - v) if v < 1 else nan

    def measures(self, *shares: float) -> np.ndarray:
        """v, false negatives, false positives, J and the multiplier m, infinite where J is not
        positive."""
        v, fn, fp = self.rates(*shares)
        informed = 1 - fn - fp
        m = price(v, fn, fp) if informed > 0 and 0 < v < 1 else float("inf")
        return np.array([v, fn, fp, informed, m])

    def found(self, times: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The measures, and the ends of intervals that hold all at once in 95 of 100 audits or more:
        the extremes over what an exact interval of 97.5 % leaves of both shares. `times` as many
        answers may be imagined. The share that is told right is taken as known."""
        ends = [
            np.linspace(*exact(times * r, times * n, 0.975), 21)
            for r, n in zip(self.rights, self.counts, strict=True)
        ]
        box = np.array([self.measures(*shares) for shares in product(*ends)])
        shares = [r / n for r, n in zip(self.rights, self.counts, strict=True)]
        return self.measures(*shares), np.nanmin(box, 0), np.nanmax(box, 0)

    def more(self, within: float) -> float:
        """How many answers more, of both kinds alike, until the upper end of m's interval is within
        that share of m, if the shares stay as they are; infinite if MOST are not enough."""
        times, judged = 1.0, sum(self.counts)
        while (times - 1) * judged < MOST:
            middle, _, high = self.found(times)
            if middle[-1] == float("inf"):
                break
            if high[-1] <= (1 + within) * middle[-1]:
                return (times - 1) * judged
            times *= 1.1
        return float("inf")


def number(row: dict, name: str, line: int, otherwise: float | None = None) -> float:
    value = row.get(name)
    if value in (None, ""):
        if otherwise is None:
            stop(f"answer {line} has no {name}: put 1 or 0 there")
        return otherwise
    try:
        return float(value)
    except ValueError:
        stop(f"answer {line}: {name} is {value!r}, where a number is wanted")


def load(file: Path) -> Audit:
    """The judged answers of a file."""
    check_file("FILE", file, (".csv", ".jsonl"))
    if file.suffix == ".jsonl":
        rows = read_rows(file)
    else:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    weights, counts, rights = [0.0, 0.0], [0, 0], [0, 0]
    for line, row in enumerate(rows, start=1):
        told, right = (number(row, name, line) for name in ("told", "right"))
        for name, value in (("told", told), ("right", right)):
            if value not in (0, 1):
                stop(f"answer {line}: {name} is {value:g}, where 0 or 1 is wanted")
        weight = number(row, "weight", line, 1.0)
        if not weight > 0:
            stop(f"answer {line}: a weight of {weight:g}, where more than 0 is wanted")
        weights[int(told)] += weight
        counts[int(told)] += 1
        rights[int(told)] += int(right)
    if not all(counts):
        stop(f"{file}: answers that are told right are wanted, and such that are told wrong")
    return Audit(weights[1] / sum(weights), tuple(counts), tuple(rights))


@dataclass
class Read:
    """Rates of the judged answers, and what they cost."""

    file: tyro.conf.Positional[Path]
    """.csv or .jsonl with columns told and right, and perhaps weight"""
    within: float = 0.25
    """how well m is to be known: the upper end of its interval is that share above it"""

    def run(self) -> None:
        if not self.within > 0:
            stop(f"--within {self.within:g}: more than 0")
        audit = load(self.file)
        middle, low, high = audit.found()
        print(f"{sum(audit.counts)} answers, {audit.counts[1]} of them told right (95 %, together)")
        if not 0 < middle[0] < 1:
            return print("All of them are right, or none: judge more, or take other answers.")
        names = ("right answers", "false negatives", "false positives", "J")
        for name, *numbers in zip(names, middle, low, high, strict=False):
            print("{:16} {:.3f} ({:.3f} to {:.3f})".format(name, *numbers))
        if not middle[3] > 0:
            return print("Such rewards tell nothing that is right, however many there are.")
        ends = (
            f"{low[4]:.1f} to {high[4]:.1f}" if high[4] < float("inf") else f"{low[4]:.1f} or more"
        )
        print(f"Plan for {middle[4]:.1f} times the episodes ({ends}) of a run with true rewards.")
        more = audit.more(self.within)
        if more == float("inf"):
            print(f"No audit of {MOST:,} answers would tell that to {self.within:.0%}.")
        elif more:
            print(f"Some {more:.0f} answers more would tell that to {self.within:.0%}.")


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


@dataclass
class Draw:
    """Answers to judge, as a table to fill in."""

    file: tyro.conf.Positional[Path]
    """samples.jsonl of a run, or completions.jsonl of utils.evaluate"""
    out: Path = Path("judge.csv")
    """the table"""
    count: int = 100
    """answers, half of them told right if there are enough"""
    reward_fn: str | None = None
    """MODULE:FUNCTION whose word is audited (from 0.5 on it says right); default: the verifier's"""
    seed: int = 1
    """which answers"""

    def run(self) -> None:
        check_file("FILE", self.file, (".jsonl",))
        if self.out.exists():
            stop(f"--out {self.out} exists: it may be filled in already")
        if self.count < 2:
            stop(f"--count {self.count}: 2 at least, one of each kind")
        rows = [r for r in read_rows(self.file) if "completion" in r and r.get("right") is not None]
        if not rows:
            stop(f"{self.file}: no answers with a verdict (keys completion and right)")
        last = max(r.get("update", 0) for r in rows)
        rows = [r for r in rows if r.get("update", 0) == last]
        told = [float(r["right"]) for r in rows]
        if self.reward_fn:
            asked = [(r["question"], r["reference"], [r["completion"]]) for r in rows]
            judge = RewardFunction(self.reward_fn)
            told = judge.scores(asked)
            if isinstance(told, str):
                judge.stop(told)
        kinds = [[i for i, x in enumerate(told) if (x >= 0.5) == right] for right in (False, True)]
        if not all(kinds):
            stop(f"{self.file}: all answers are told the same, so errors of one kind cannot show")
        rng, chosen = random.Random(self.seed), []
        fewer = min(map(len, kinds))
        for kind in kinds:
            share = self.count // 2 if fewer >= self.count // 2 else self.count - fewer
            some = rng.sample(kind, min(len(kind), share))
            chosen += [(i, len(kind) / len(some)) for i in some]
        rng.shuffle(chosen)  # whoever judges is not to know what was told
        lines = [
            {name: rows[i].get(name, "") for name in ("question", "completion", "reference")}
            | {"right": "", "told": int(told[i] >= 0.5), "weight": f"{weight:.6g}"}
            for i, weight in chosen
        ]
        write_atomically(self.out, as_csv(lines))
        print(f"{self.out}: {len(lines)} of {len(rows)} answers. Put 1 or 0 into its column right")


if __name__ == "__main__":
    both = (
        Annotated[Draw, tyro.conf.subcommand("draw")]
        | Annotated[Read, tyro.conf.subcommand("read")]
    )
    command(both, "python -m utils.audit", __doc__).run()

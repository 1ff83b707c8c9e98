"""Make the embedded world of long answers: chains of four to eight steps (`assets/data/tiny_long`)
and the tiny model that starts on them.

    python -m assets.make.tiny_long                     # 17 minutes on two cores, same bytes every time
    python -m assets.make.tiny_long --only-data --easy-steps 13 14 --out runs/long/150   # longer

A problem tells what happens to one heap. Two or three of its events are *traps*, on which the
careless student of tiny_math.py errs more often than not; the others are easy and only make the
answer longer. So the number of choices that decide an answer, and with it the chance to get it
right, hardly depends on its length. The model is assets/tiny_math, trained further on solutions of
two to seventeen lines."""

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoTokenizer

from assets.make import tiny_math as short
from assets.make.tiny_math import Row, Step, work

# As in tiny_math: how often the careless student makes the mistake that belongs to a kind of step.
MISTAKES = {"gain": 0.01, "lose": 0.01, "distract": 0.55, "double": 0.7, "half": 0.75}
TRAPS = (2, 3)


class Story(short.Story):
    """A story with small numbers, so that a long one stays in bounds."""

    def number(self, low: int, high: int) -> int:
        return super().number(low, min(high, 25))


def double(s: Story, name: str, other: str, thing: str, change) -> None:
    s.say(
        "Then {a} has 2 times as many {t}.",
        "{b} gives {a} as many {t} as {a} has.",
        "{a} finds as many {t} more.",
        a=name,
        b=other,
        t=thing,
    )
    change("double", "*", 2, "+")


def trap(s: Story):
    """One of the traps that the numbers allow now."""
    allowed = [short.distract] * (s.value > 30)
    allowed += [short.half, short.half] * (s.value % 2 == 0 and s.value > 30)
    allowed += [double, double] * (s.value < 90)
    return s.rng.choice(allowed)


def easy(s: Story):
    """A gain or a loss, towards the middle."""
    return short.gain if s.rng.random() < (130 - s.value) / 120 else short.lose


def make_problem(rng: random.Random, easy_steps: tuple[int, int]) -> tuple[str, list[Step]]:
    """A question with two or three traps and that many easy steps, and the steps of its solution."""
    while True:
        s = Story(rng)
        (name, other), thing = rng.sample(short.NAMES, 2), rng.choice(short.THINGS)
        s.total = s.value = rng.randint(30, 110)
        s.say("{a} has {n} {t}.", "{a} starts with {n} {t}.", a=name, n=s.value, t=thing)

        def change(kind, op, right, wrong_op, wrong_right=None, s=s):
            wrong = (s.total, wrong_op, right if wrong_right is None else wrong_right)
            s.total = s.step(kind, s.total, op, right, wrong)
            s.value = short.solve(s.steps)[-1]

        events = [trap] * rng.randint(*TRAPS) + [easy] * rng.randint(*easy_steps)
        for event in rng.sample(events, len(events)):
            event(s)(s, name, other, thing, change)
        s.say("How many {t} does {a} have now?", "How many {t} are left for {a}?", a=name, t=thing)
        if short.in_bounds(work(s.steps)):
            return " ".join(s.sentences), s.steps


def any_length(rng: random.Random) -> tuple[str, list[Step]]:
    """What the model learns from: for the most part problems as long as those of the data."""
    return make_problem(rng, (2, 5) if rng.random() < 0.6 else (0, 14))


@dataclass
class Args:
    out: Path = Path("assets")
    """folder that receives data/tiny_long and tiny_long, or with --only-data the data alone"""
    only_data: bool = False
    """no model"""
    easy_steps: tuple[int, int] = (2, 5)
    """fewest and most easy steps of a problem in the data"""
    seed: int = 1
    """seed of the data and the training order"""
    train_size: int = 4096
    """problems in train.jsonl"""
    test_size: int = 512
    """problems in test.jsonl, none of whose solutions is in train.jsonl"""
    steps: int = 800
    """supervised steps of the careless student's pupil"""
    batch_size: int = 64
    """examples in one step"""
    learning_rate: float = 1e-3
    """peak learning rate; it warms up over 100 steps and falls to zero along a cosine"""


def main(args: Args) -> None:
    start = time.time()
    torch.set_num_threads(2)  # as in tiny_math: the last bit depends on it
    data = args.out if args.only_data else args.out / "data" / "tiny_long"
    folder = args.out / "tiny_long"

    def problem(rng: random.Random) -> tuple[str, list[Step]]:
        return make_problem(rng, args.easy_steps)

    short.make_data(data, args.train_size, args.test_size, args.seed, problem)
    if args.only_data:
        return
    test = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_math")

    def examples(count: int, seed: int) -> list[Row]:
        pairs = short.careless_examples(count, seed, any_length, MISTAKES)
        return short.answer_rows(tokenizer, pairs)

    def report(model) -> str:
        greedy, sampled = (short.accuracy(model, tokenizer, test, t, 112) for t in (None, 1.0))
        return f"accuracy: greedy {greedy:.3f}, sampled {sampled:.3f}"

    model = short.train(args, tokenizer, examples, report, Path("assets/tiny_math"))
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{folder}: {report(model)} of {len(test)} held-out problems; {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

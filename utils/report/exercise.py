"""Exercises (docs/exercises.md): calculate a number, or change a copy of ppo_baseline.py, and hear
whether it is right.

    python -m utils.exercise                              # what there is
    python -m utils.exercise horizon 0.25                 # a number that you have calculated
    cp ppo_baseline.py my_ppo.py                          # and change it, then
    python -m utils.exercise clip_higher my_ppo.py        # a script that you have changed
    python -m utils.recipe clip_higher -o my_solution.py     # how we would have changed it
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple, NoReturn

import torch
import tyro

from utils.args import command
from utils.errors import first_line, stop
from utils.report.price import price


def not_yet(message: str) -> NoReturn:
    """What is wrong, and a status of 1."""
    print(message)
    raise SystemExit(1)


class Number(NamedTuple):
    """A number to calculate, and what to think of where it is wrong."""

    task: str
    right: float
    hint: str


NUMBERS = {
    "horizon": Number(
        "an answer of 24 tokens, a critic that says the same everywhere, gamma 1 and lambda 0.95: "
        "which share of the last token's delta is in the first token's advantage?",
        0.95**23,
        "equation (4): every step back multiplies by gamma lambda; how many steps is it back from token "
        "24 to token 1?",
    ),
    "noise_share": Number(
        "20 % of the rewards are flipped, half of the answers are right, and the baseline is a "
        "constant: which share of the advantages' variance does not follow the truth?",
        1 - (1 - 2 * 0.2) ** 2,
        "the observed reward still has variance 1/4; what of it follows the truth is shrunk by "
        "1 - 2p, and variance by its square",
    ),
    "best_critic": Number(
        "a critic knows every outcome, but predicts the mean *observed* reward under 40 % flips, and "
        "half of the answers are right: which share of the clean returns' variance does it explain?",
        1 - 4 * 0.4**2,
        "it says 0.6 for right and 0.4 for wrong; explained variance is 1 - E[error^2] / (1/4)",
    ),
    "price": Number(
        "a verifier calls 40 % of the right answers wrong and no wrong one right; half of the answers "
        "are right: how many times the episodes?",
        price(0.5, 0.4, 0.0),
        "q = J v and J = 0.6; then the formula of docs/verifier.md",
    ),
}


def teaching(loss: torch.Tensor, given: torch.Tensor) -> float:
    """The loss, if it is one number from which `given` can learn."""
    if loss.shape != () or not loss.requires_grad:
        not_yet("not yet: the loss must be one number, with a gradient (a .sum(), no .detach())")
    loss.backward()
    if given.grad is None:
        not_yet("not yet: the loss has no gradient for what it is made of")
    return loss.item()


def policy_term(script: ModuleType, ratio: float, advantage: float) -> float:
    """The policy's loss of one token, clipped at 0.2."""
    logprobs, ones = torch.tensor([[ratio, 1.0]]).log().requires_grad_(), torch.ones(1, 2)
    advantages = torch.tensor([[advantage, 0.0]])  # the second token has no advantage
    loss, _ = script.policy_loss(logprobs, 0 * ones, advantages, ones, 0.2)
    return teaching(loss, logprobs)


def value_term(
    script: ModuleType, value: float, before: float = 0.0, variance: float = 1.0
) -> float:
    """The critic's loss of one token whose return is 1, and whose value was `before`."""
    ones = torch.ones(1, 2)
    values = torch.tensor([[value, 1.0]], requires_grad=True)  # the second token's value is right
    part = {"returns": ones, "values": torch.tensor([[before, 1.0]]), "weights": ones}
    loss, _ = script.critic_loss(lambda _: values, part, torch.tensor(variance), script.Args())
    return teaching(loss, values)


class Change(NamedTuple):
    """A change of ppo_baseline.py; cases: what is given, the function of it, and what is right."""

    task: str
    term: Callable[..., float]
    cases: dict[tuple[float, ...], float]
    given: tuple[str, ...]


CHANGES = {
    "clip_higher": Change(
        "in policy_loss clip the ratio at 1 + 1.4 times the range above, and as before below",
        policy_term,
        {(1.25, 1): -1.25, (1.4, 1): -1.28, (0.7, 1): -0.7, (0.7, -1): 0.8, (1.4, -1): 1.4},
        ("ratio", "advantage"),
    ),
    "dual_clip": Change(
        "in policy_loss let the objective of a negative advantage A not fall below 3 A",
        policy_term,
        {(5, -1): 3.0, (5, -0.5): 1.5, (2, -1): 2.0, (5, 1): -1.2, (0.5, -1): 0.8},
        ("ratio", "advantage"),
    ),
    "huber": Change(
        "in critic_loss let errors beyond one deviation of the returns, the square root of "
        "return_variance, count in proportion: 2 deviation (|error| - deviation / 2)",
        value_term,
        {(0.5, 0, 1): 0.25, (4, 0, 1): 5.0, (-2, 0, 1): 5.0, (4, 0, 4): 2.0},
        ("value", "value before", "variance of the returns"),
    ),
    "value_clip": Change(
        "in critic_loss let a value that has moved more than 0.2 from part['values'] have the larger "
        "of two errors: its own, and that of the value 0.2 away",
        value_term,
        {(0.1, 0): 0.81, (0.5, 0): 0.64, (-0.5, 0): 2.25, (1.5, 1.4): 0.25},
        ("value", "value before"),
    ),
}


def load(path: Path) -> ModuleType:
    """A script as a module."""
    if not path.is_file() or path.suffix != ".py":
        stop(f"{path}: no script; cp ppo_baseline.py my_ppo.py makes one to change")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script  # dataclasses look it up
    try:
        spec.loader.exec_module(script)
    except Exception as error:
        stop(f"{path}: {first_line(error)}")
    return script


def of_number(name: str, said: str) -> None:
    """Right within one per cent, or a hint."""
    exercise = NUMBERS[name]
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        stop(f"{said}: {name} asks for a number such as 0.25")
    if abs(number - exercise.right) > 0.01 * abs(exercise.right):
        not_yet(f"not yet. Think of this: {exercise.hint}")
    print(f"right: {exercise.right:.4g}")


def of_change(name: str, path: Path) -> None:
    """Right in all cases, or the first that is wrong."""
    exercise, script = CHANGES[name], load(path)
    for given, right in exercise.cases.items():
        what = ", ".join(f"{word} {x:g}" for word, x in zip(exercise.given, given, strict=True))
        try:
            found = exercise.term(script, *given)
        except Exception as error:
            stop(f"{path}, {what}: {first_line(error)}")
        if not abs(found - right) <= 1e-4:
            not_yet(f"not yet: at {what} the loss is {found:.4g}, and should be {right:.4g}")
    print(f"right in all {len(exercise.cases)} cases")


@dataclass
class Args:
    exercise: Annotated[str | None, tyro.conf.Positional] = None
    """one of docs/exercises.md"""
    solution: Annotated[str | None, tyro.conf.Positional] = None
    """a number, or the script that you have changed"""


def main(args: Args) -> None:
    every = NUMBERS | CHANGES
    if args.exercise is None:
        for name, exercise in every.items():
            print(f"{name}: {exercise.task}\n")
        return
    if args.exercise not in every:
        stop(f"{args.exercise} is no exercise; there are {', '.join(every)}")
    if args.solution is None:
        print(every[args.exercise].task)
    elif args.exercise in NUMBERS:
        of_number(args.exercise, args.solution)
    else:
        of_change(args.exercise, Path(args.solution))


if __name__ == "__main__":
    main(command(Args, "python -m utils.exercise", __doc__))

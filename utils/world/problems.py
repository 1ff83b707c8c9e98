"""A problem, and what the scripts ask of a task."""

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """What an episode begins with. `key` names the problem in every random draw that belongs to it;
    `answer` is what counts as right: a reference answer, the letter of one of the `options` where
    there are any, or the goal of a user."""

    key: str
    answer: Any
    prompt_ids: list[int]
    options: tuple[str, ...] = ()


class Task:
    """What the tasks have in common.

    `train` and `test` are lists of Problem; `dropped` counts the problems that were left out, by
    reason. A task also has `asked(problem)`, `grade(problem, completions)`, `reply(problem,
    completions)`, `messages(problem, completions)` and `measure(pairs)`."""

    def __init__(self, train: list[Problem], test: list[Problem], dropped: dict[str, int]):
        self.train, self.test, self.dropped = train, test, dropped

    def batch(self, seed: int, first: int, size: int) -> list[Problem]:
        """The next problems after the `first` ones: every epoch is a fresh permutation that depends
        on seed and epoch alone."""
        problems, count, last = [], len(self.train), first + size
        for epoch in range(first // count, (last - 1) // count + 1):
            order = random.Random(f"{seed} order {epoch}").sample(range(count), count)
            start = epoch * count
            problems += [self.train[i] for i in order[max(first - start, 0) : last - start]]
        return problems

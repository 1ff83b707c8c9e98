"""The dialogue task: goals as problems, a simulated user who replies, an outcome that is measured."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

from utils.dialogue.goals import UNSEEN, load_goals
from utils.dialogue.user import User, first_message, outcome, play
from utils.world.problems import Problem, Task


class DialogueTask(Task):
    """Goals as problems. `answer` of a Problem is its Goal; a dialogue is right when its goal is
    completed."""

    def __init__(
        self, train: list[Problem], test: list[Problem], dropped: dict[str, int], seed: int
    ):
        super().__init__(train, test, dropped)
        self.seed = seed

    @classmethod
    def load(cls, schema: Path, train_split: str, test_split: str, seed: int) -> "DialogueTask":
        """The goals alone, without prompts in a model's tokens."""
        goals = load_goals(schema, train_split, test_split)
        return cls(
            *([Problem(g.key, g, []) for g in goals[split]] for split in ("train", "test")),
            {},
            seed,
        )

    def first_message(self, problem: Problem) -> str:
        return first_message(problem.answer, User(problem.answer, self.seed).open())

    def asked(self, problem: Problem) -> tuple[str, str]:
        """The first message and the goal, as --reward-fn is given them."""
        return self.first_message(problem), str(problem.answer)

    def grade(self, problem: Problem, completions: list[str]) -> float:
        return outcome(problem.answer, completions, self.seed).gcr

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        user, said = play(problem.answer, completions, self.seed)
        return None if user.ended else said[-1]

    def show(self, problem: Problem, completions: list[str]) -> dict[str, str]:
        """An episode as the columns of a table; the dialogue has the user's last word too."""
        _, said = play(problem.answer, completions, self.seed)
        turns = [f"user: {said[0]}"]
        for text, reply in zip_longest(completions, said[1:], fillvalue=""):
            turns += [f"assistant: {text}", f"user: {reply}"]
        return {"goal": str(problem.answer), "dialogue": "\n".join(turns)}

    def messages(self, problem: Problem, completions: list[str]) -> list[dict[str, str]]:
        """The conversation up to the assistant's last turn, the first message without the prompt
        template."""
        _, said = play(problem.answer, completions, self.seed)
        turns = [("user", first_message(problem.answer, said[0]))]
        for i, text in enumerate(completions):
            turns += [("user", said[i])] if i else []
            turns.append(("assistant", text))
        return [{"role": role, "content": content} for role, content in turns]

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """TCR, ACR, GCR, their average, turns and the share of impatient endings over all dialogues
        whose services are known from training; the three rates for each domain; and for the
        dialogues with unseen services."""
        outcomes = [(p.answer.group, outcome(p.answer, texts, self.seed)) for p, texts in pairs]
        known = [o for group, o in outcomes if group != UNSEEN] or [o for _, o in outcomes]
        names = ("tcr", "acr", "gcr", "average", "turns", "impatient")
        metrics = {name: sum(getattr(o, name) for o in known) / len(known) for name in names}
        for group in sorted({group for group, _ in outcomes}):
            members = [o for g, o in outcomes if g == group]
            for name in names[:3]:
                metrics[f"{name}_{group}"] = sum(getattr(o, name) for o in members) / len(members)
        return metrics


def load_dialogues(args) -> tuple[Callable, dict, dict]:
    """Goals of the schema, each with the calls that the assistant may make and the user's opening
    words."""
    schema = Path(args.dataset)
    goals = load_goals(schema, args.train_split or "train", args.test_split or "test")
    rows = {
        name: [(g.key, first_message(g, User(g, args.seed).open()), g, ()) for g in members]
        for name, members in goals.items()
    }
    return partial(DialogueTask, seed=args.seed), rows, {name: Counter() for name in rows}

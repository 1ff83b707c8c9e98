"""Tasks: questions and goals turned into prompts, and graded."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from utils.errors import stop
from utils.models import Chat
from utils.world.answers import choose, extract, is_correct, normal, quantity, same_answer
from utils.world.data import load_split
from utils.world.goals import UNSEEN, load_goals
from utils.world.problems import Problem, Task
from utils.world.user import User, first_message, outcome, play


class MathTask(Task):
    """Questions with one final answer, that of the last completion: a number or other mathematics,
    or the letter of an option."""

    words = False  # whether an answer without options is words

    def __init__(self, *args):
        super().__init__(*args)
        self.voted: dict[str, list[str]] = {}  # final answers by problem, no two of them equal

    def grade(self, problem: Problem, completions: list[str]) -> float:
        """1.0 for a right final answer, 0.0 for a wrong one, NaN where no reference is known."""
        if problem.answer is None:
            return float("nan")
        if problem.options:
            return float(choose(completions[-1], problem.options) == problem.answer)
        return float(is_correct(completions[-1], problem.answer, self.words))

    def asked(self, problem: Problem) -> tuple[str, str]:
        """Question and reference, of options the letter, as --reward-fn is given them."""
        return problem.key, str(problem.answer)

    def final_answer(self, problem: Problem, completion: str) -> str:
        """The final answer in a form in which equal letters, numbers, words or expressions are
        equal strings: of equal expressions the first that came. "" where there is none."""
        if problem.options:
            return choose(completion, problem.options) or ""
        found = extract(completion, self.words) or ""
        number = quantity(found)[0]
        if number is not None or self.words:
            return normal(found) if number is None else str(number)
        known = self.voted.setdefault(problem.key, [])
        equal = [answer for answer in known if same_answer(found, answer)]
        known += [] if equal else [found]
        return (equal or [found])[0]

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        """The user's next message after the given answers, or None where the episode is over. After
        a question the user has but one thing to say, and only where --max-turns allows another
        turn."""
        return "Check your work and answer again."

    def show(self, problem: Problem, completions: list[str]) -> dict[str, str]:
        """An episode as the columns of a table."""
        return {
            "question": problem.key,
            "completion": completions[-1],
            "reference": str(problem.answer),
        }

    def messages(self, problem: Problem, completions: list[str]) -> list[dict[str, str]]:
        """The conversation up to the last answer, without the prompt template."""
        turns = [{"role": "user", "content": problem.key}]
        for i, text in enumerate(completions):
            turns += (
                [{"role": "user", "content": self.reply(problem, completions[:i])}] if i else []
            )
            turns.append({"role": "assistant", "content": text})
        return turns

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """The share of right answers."""
        return {"accuracy": sum(self.grade(p, texts) for p, texts in pairs) / len(pairs)}


class ScienceTask(MathTask):
    """Questions whose answers are short and in words, or the letter of an option."""

    words = True


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


def load_task(args, chat: Chat) -> Task:
    """Both splits as the flags under "the task" say, as prompts. Drops what is too long, what of
    train is in test and what has no reference (majority votes make their own), and stops with one
    sentence where something does not fit."""
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    kind, rows, lost = load_dialogues(args) if args.task == "dialogue" else load_questions(args)
    splits: dict[str, list[Problem]] = {"test": [], "train": []}
    dropped: dict[str, int] = {}
    for name, problems in splits.items():
        open_label = name == "train" and args.noise == "majority-vote"
        known = [row for row in rows[name] if row[2] is not None or open_label]
        asked = [
            Problem(key, a, prompt(chat, args.prompt_template, q), options)
            for key, q, a, options in known
        ]
        short = [p for p in asked if len(p.prompt_ids) <= args.max_prompt_tokens]
        held_out = {p.key for p in splits["test"]}
        problems += [p for p in short if p.key not in held_out]
        counts = {
            **lost[name],
            "without a reference": len(rows[name]) - len(known),
            "with too long a prompt": len(asked) - len(short),
        }
        counts["also in test"] = len(short) - len(problems)
        dropped |= {f"{name} problems {reason}": n for reason, n in counts.items() if n}
        if not problems:
            split = getattr(args, f"{name}_split") or name
            total = len(rows[name]) + sum(lost[name].values())
            stop(
                f"--{name}-split {split}: no problem is left of {total} (dropped: {dropped}); see --max-prompt-tokens"
            )
    check_context(chat, splits["train"] + splits["test"], args.max_new_tokens)
    # args.json then tells of how many problems a score is the mean
    args.eval_size = min(args.eval_size, len(splits["test"]))
    return kind(splits["train"], splits["test"], dropped)


def prompt(chat: Chat, template: str, asked: str | list[dict[str, str]]) -> list[int]:
    """Tokens of a question, or of a conversation that ends with one, the template around it."""
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    question = template.replace("{question}", turns[-1]["content"])
    return chat.conversation_ids([*turns[:-1], {"role": "user", "content": question}])


def check_context(chat: Chat, problems: list[Problem], max_new_tokens: int) -> None:
    """Stop where a prompt and an answer are more than the model has positions for."""
    longest = max(len(p.prompt_ids) for p in problems)
    if chat.context is not None and longest + max_new_tokens > chat.context:
        stop(
            f"--max-new-tokens {max_new_tokens}: behind the longest prompt of {longest} tokens that is more than "
            f"the model's {chat.context} positions; lower it or --max-prompt-tokens"
        )


# For "train" and "test": key, first message or conversation, what counts as right, options; and
# what has been left out, by reason.
Rows = dict[str, list[tuple[str, str | list[dict[str, str]], Any, tuple[str, ...]]]]
Lost = dict[str, Counter]


def load_questions(args) -> tuple[Callable, Rows, Lost]:
    """Questions and reference answers of the data sets. The key of a problem is its question with
    the options."""
    lost: Lost = {"train": Counter(), "test": Counter()}

    def problems(part: str, name: str, config: str | None, split: str | None, unlabelled: bool):
        found = load_split(args, name, config, split, part, unlabelled, lost[part])
        return [(q.message, q.conversation, q.answer, q.options) for q in found]

    train = test = (args.dataset, args.dataset_config)
    if args.test_dataset:  # NAME or NAME:CONFIG
        test = (*args.test_dataset.rsplit(":", 1), None)[:2]
    loaded = {
        "test": problems("test", *test, args.test_split, False),
        "train": problems("train", *train, args.train_split, args.noise == "majority-vote"),
    }
    return {"math": MathTask, "science": ScienceTask}[args.task], loaded, lost


def load_dialogues(args) -> tuple[Callable, Rows, Lost]:
    """Goals of the schema, each with the calls that the assistant may make and the user's opening
    words."""
    goals = load_goals(args.schema, args.train_split or "train", args.test_split or "test")
    rows = {
        name: [(g.key, first_message(g, User(g, args.seed).open()), g, ()) for g in members]
        for name, members in goals.items()
    }
    return partial(DialogueTask, seed=args.seed), rows, {name: Counter() for name in rows}

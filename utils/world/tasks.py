"""Tasks: questions and goals turned into prompts, and graded."""

from collections.abc import Callable
from functools import partial
from typing import Any

from utils.errors import stop
from utils.models import Chat
from utils.world.answers import choose, extract, is_correct, normal, quantity, same_answer
from utils.world.data import Question, load_split
from utils.world.dialogue import DialogueTask, User, first_message
from utils.world.goals import load_goals
from utils.world.problems import Problem, Task

# Defaults of the flags that go with --task.
DEFAULTS = {
    "math": {
        "model": "assets/tiny_math", "dataset": "assets/data/tiny_math", "updates": 40, "prompts_per_update": 64,
        "max_turns": 1, "max_new_tokens": 48, "reward_model": None, "noise": "symmetric", "kl_coef": 0.0,
    },
    "science": {
        "model": "assets/tiny_science", "dataset": "assets/data/tiny_science", "updates": 30, "prompts_per_update": 64,
        "max_turns": 1, "max_new_tokens": 64, "reward_model": None, "noise": "symmetric", "kl_coef": 0.0,
    },
    "dialogue": {
        "model": "assets/tiny_dialogue", "dataset": "assets/data/tiny_math", "updates": 30, "prompts_per_update": 32,
        "max_turns": 12, "max_new_tokens": 48, "reward_model": "assets/tiny_reward", "noise": "none", "kl_coef": 0.05,
    },
}  # fmt: skip


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


def load_task(args, chat: Chat) -> Task:
    """Both splits as the flags under "the task" say, as prompts. Drops what is too long, what of
    train is in test and what has no reference (majority votes make their own), and stops with one
    sentence where something does not fit."""
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    kind, rows = load_dialogues(args) if args.task == "dialogue" else load_questions(args)
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
            "without a reference": len(rows[name]) - len(known),
            "with too long a prompt": len(asked) - len(short),
        }
        counts["also in test"] = len(short) - len(problems)
        dropped |= {f"{name} problems {reason}": n for reason, n in counts.items() if n}
        if not problems:
            split = getattr(args, f"{name}_split") or name
            stop(
                f"--{name}-split {split}: no problem is left of {len(rows[name])} (dropped: {dropped}); see --max-prompt-tokens"
            )
    # args.json then tells of how many problems a score is the mean
    args.eval_size = min(args.eval_size, len(splits["test"]))
    return kind(splits["train"], splits["test"], dropped)


def prompt(chat: Chat, template: str, message: str) -> list[int]:
    return chat.prompt_ids(template.replace("{question}", message))


# For "train" and "test": key, first message, what counts as right, options.
Rows = dict[str, list[tuple[str, str, Any, tuple[str, ...]]]]


def load_questions(args) -> tuple[Callable, Rows]:
    """Questions and reference answers of the data sets. The key of a problem is its question with
    the options."""

    def problems(questions: list[Question]) -> list[tuple[str, str, Any, tuple[str, ...]]]:
        return [(q.message, q.message, q.answer, q.options) for q in questions]

    unlabelled = args.noise == "majority-vote"
    test = (args.dataset, args.dataset_config)
    if args.test_dataset:  # NAME or NAME:CONFIG
        test = (*args.test_dataset.rsplit(":", 1), None)[:2]
    loaded = {
        "test": problems(load_split(args, *test, args.test_split, "test", False)),
        "train": problems(
            load_split(
                args, args.dataset, args.dataset_config, args.train_split, "train", unlabelled
            )
        ),
    }
    return {"math": MathTask, "science": ScienceTask}[args.task], loaded


def load_dialogues(args) -> tuple[Callable, Rows]:
    """Goals of the schema, each with the calls that the assistant may make and the user's opening
    words."""
    goals = load_goals(args.schema, args.train_split or "train", args.test_split or "test")
    rows = {
        name: [(g.key, first_message(g, User(g, args.seed).open()), g, ()) for g in members]
        for name, members in goals.items()
    }
    return partial(DialogueTask, seed=args.seed), rows

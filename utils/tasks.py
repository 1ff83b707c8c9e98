"""Tasks: problems loaded with `datasets`, turned into prompts, and graded."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils.logging import disable_progress_bar

from utils.answers import extract, is_correct, to_number
from utils.dialogue import DialogueTask, User, first_message
from utils.errors import stop
from utils.goals import load_goals
from utils.models import Chat, first_line
from utils.problems import Problem, Task

# Defaults of the flags that go with --task.
DEFAULTS = {
    "math": {
        "model": "assets/tiny_math", "updates": 40, "prompts_per_update": 64, "max_turns": 1, "reward_model": None,
        "noise": "symmetric", "kl_coef": 0.0,
    },
    "dialogue": {
        "model": "assets/tiny_dialogue", "updates": 30, "prompts_per_update": 32, "max_turns": 12,
        "reward_model": "assets/tiny_reward", "noise": "none", "kl_coef": 0.05,
    },
}  # fmt: skip
QUESTION_COLUMNS = ("question", "problem", "prompt", "query", "input", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution", "target", "output", "label")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
disable_progress_bar()


class MathTask(Task):
    """Questions with one final answer, that of the last completion."""

    def grade(self, completions: list[str], answer: str) -> float:
        """1.0 for a right final answer, else 0.0."""
        return float(is_correct(completions[-1], answer))

    def final_answer(self, completion: str) -> str:
        """The final answer in a form in which equal numbers are equal strings; "" where there is none."""
        found = extract(completion) or ""
        value = to_number(found)
        return found if value is None else str(value)

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        """The user's next message after the given answers, or None where the episode is over. In mathematics the user has
        but one thing to say, and only where --max-turns allows another turn."""
        return "Check your work and answer again."

    def show(self, problem: Problem, completions: list[str]) -> dict[str, str]:
        """An episode as the columns of a table."""
        return {"question": problem.key, "completion": completions[-1], "reference": problem.answer}

    def messages(self, problem: Problem, completions: list[str]) -> list[dict[str, str]]:
        """The conversation up to the last answer, without the prompt template."""
        turns = [{"role": "user", "content": problem.key}]
        for i, text in enumerate(completions):
            turns += [{"role": "user", "content": self.reply(problem, completions[:i])}] if i else []
            turns.append({"role": "assistant", "content": text})
        return turns

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """The share of right answers."""
        return {"accuracy": sum(self.grade(texts, p.answer) for p, texts in pairs) / len(pairs)}


def load_rows(name: str, config: str | None, split: str, flag: str) -> Dataset:
    """A split of a hub data set, of a local folder (`<split>.jsonl|json|csv|parquet`, below `config` if given) or of one
    local file. `split` may carry a slice, as in train[:90%]."""
    try:
        if not os.path.exists(name):
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                stop(f"--dataset {name}: no such file or folder")
            return load_dataset(name, config, split=split)
        stem, folder = split.split("[", 1)[0], Path(name, config or "")
        files = [folder] if folder.is_file() else [f for f in sorted(folder.glob(f"{stem}.*")) if f.suffix in FORMATS]
        if not files:
            found = sorted(str(f.relative_to(name)) for f in Path(name).rglob("*") if f.suffix in FORMATS)
            hint = "slices such as train[:90%] and train[90%:] divide one file"
            stop(
                f"{flag} {split}: no {stem}.jsonl, .json, .csv or .parquet in {folder} (found: {', '.join(found)}; {hint})"
            )
        return load_dataset(FORMATS[files[0].suffix], data_files={stem: str(files[0])}, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        stop(f"--dataset {name}, {flag} {split}: could not be loaded ({first_line(error)})")


def pick_column(rows: Dataset, wanted: str | None, guesses: tuple[str, ...], flag: str) -> str:
    """The named column, or the first of the usual names; an error that lists what there is."""
    for name in [wanted] if wanted else guesses:
        if name in rows.column_names:
            return name
    problem = f"there is no column {wanted!r}" if wanted else f"none of the usual names ({', '.join(guesses)}) is there"
    stop(f"{flag}: {problem}; the data set has the columns {', '.join(rows.column_names)}")


def load_task(args, chat: Chat) -> Task:
    """Both splits as the flags under "the task" say, as prompts. Drops what is too long and what of train is in test, and stops
    with one sentence where something does not fit."""
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    kind, rows = load_dialogues(args) if args.task == "dialogue" else load_questions(args)
    splits: dict[str, list[Problem]] = {"test": [], "train": []}
    dropped: dict[str, int] = {}
    for name, problems in splits.items():
        asked = [
            (key, q, a, chat.prompt_ids(args.prompt_template.replace("{question}", q))) for key, q, a in rows[name]
        ]
        short = [Problem(key, answer, ids) for key, _, answer, ids in asked if len(ids) <= args.max_prompt_tokens]
        held_out = {p.key for p in splits["test"]}
        problems += [p for p in short if p.key not in held_out]
        counts = {"with too long a prompt": len(asked) - len(short), "also in test": len(short) - len(problems)}
        dropped |= {f"{name} problems {reason}": n for reason, n in counts.items() if n}
        if not problems:
            split = getattr(args, f"{name}_split")
            stop(
                f"--{name}-split {split}: no problem is left of {len(asked)} (dropped: {dropped}); see --max-prompt-tokens"
            )
    return kind(splits["train"], splits["test"], dropped)


Rows = dict[str, list[tuple[str, str, Any]]]  # for "train" and "test": key, first message, what counts as right


def load_questions(args) -> tuple[Callable, Rows]:
    """Questions and reference answers of a data set. The key of a problem is its question."""
    loaded: Rows = {}
    for name, split in (("test", args.test_split), ("train", args.train_split)):
        rows = load_rows(args.dataset, args.dataset_config, split, f"--{name}-split")
        questions = rows[pick_column(rows, args.question_column, QUESTION_COLUMNS, "--question-column")]
        answers = rows[pick_column(rows, args.answer_column, ANSWER_COLUMNS, "--answer-column")]
        loaded[name] = [(str(q), str(q), str(a)) for q, a in zip(questions, answers, strict=True)]
    return MathTask, loaded


def load_dialogues(args) -> tuple[Callable, Rows]:
    """Goals of the schema, each with the calls that the assistant may make and the user's opening words."""
    goals = load_goals(args.schema, args.train_split, args.test_split)
    rows = {
        name: [(g.key, first_message(g, User(g, args.seed).open()), g) for g in members]
        for name, members in goals.items()
    }
    return partial(DialogueTask, seed=args.seed), rows

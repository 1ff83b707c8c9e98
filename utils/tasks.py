"""Tasks: problems loaded with `datasets`, turned into prompts, and graded."""

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils.logging import disable_progress_bar

from utils.answers import extract, is_correct, to_number
from utils.errors import stop
from utils.models import Chat, first_line

QUESTION_COLUMNS = ("question", "problem", "prompt", "query", "input", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution", "target", "output", "label")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
disable_progress_bar()


@dataclass(frozen=True)
class Problem:
    """One row of a data set. `key` names the problem in every random draw that belongs to it."""

    key: str
    answer: str
    prompt_ids: list[int]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of range(size) in which an epoch visits the problems."""
    return random.Random(f"{seed} order {epoch}").sample(range(size), size)


class MathTask:
    """Questions with one final answer.

    `train` and `test` are lists of Problem; `dropped` counts the problems whose prompts were too long, and those of train
    that stand in test too.
    """

    def __init__(self, train: list[Problem], test: list[Problem], dropped: dict[str, int]):
        self.train, self.test, self.dropped = train, test, dropped

    def batch(self, seed: int, update: int, size: int) -> list[Problem]:
        """The problems of update 1, 2, ...: every epoch is a fresh permutation that depends on seed and epoch alone."""
        problems = []
        for position in range((update - 1) * size, update * size):
            epoch, index = divmod(position, len(self.train))
            problems.append(self.train[epoch_order(seed, epoch, len(self.train))[index]])
        return problems

    def grade(self, completion: str, answer: str) -> float:
        """1.0 for a right final answer, else 0.0."""
        return float(is_correct(completion, answer))

    def final_answer(self, completion: str) -> str:
        """The final answer in a form in which equal numbers are equal strings; "" where there is none."""
        found = extract(completion) or ""
        value = to_number(found)
        return found if value is None else str(value)

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        """The user's next message after the given answers, or None where the episode is over. In mathematics the user has
        but one thing to say, and only where --max-turns allows another turn."""
        return "Check your work and answer again."


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


def load_task(args, chat: Chat) -> MathTask:
    """Load both splits as the flags under "the task" say, build the prompts, drop what is too long and what of train is in
    test. Stops with one sentence where something does not fit."""
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    splits: dict[str, list[Problem]] = {"test": [], "train": []}
    dropped: dict[str, int] = {}
    for name, split in (("test", args.test_split), ("train", args.train_split)):
        rows = load_rows(args.dataset, args.dataset_config, split, f"--{name}-split")
        questions = rows[pick_column(rows, args.question_column, QUESTION_COLUMNS, "--question-column")]
        answers = rows[pick_column(rows, args.answer_column, ANSWER_COLUMNS, "--answer-column")]
        problems = [
            Problem(str(q), str(a), chat.prompt_ids(args.prompt_template.replace("{question}", str(q))))
            for q, a in zip(questions, answers, strict=True)
        ]
        short = [p for p in problems if len(p.prompt_ids) <= args.max_prompt_tokens]
        held_out = {p.key for p in splits["test"]}
        splits[name] = [p for p in short if p.key not in held_out]
        counts = {"with too long a prompt": len(problems) - len(short), "also in test": len(short) - len(splits[name])}
        dropped |= {f"{name} problems {reason}": n for reason, n in counts.items() if n}
        if not splits[name]:
            stop(
                f"--{name}-split {split}: no problem is left of {len(problems)} (dropped: {dropped}); see --max-prompt-tokens"
            )
    return MathTask(splits["train"], splits["test"], dropped)

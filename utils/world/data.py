"""Data sets: a table of the public ones, the loading of rows, and how rows become questions with
options and answers."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils.logging import disable_progress_bar

from utils.errors import stop
from utils.models import first_line
from utils.world.answers import LETTERS

disable_progress_bar()
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Where a data set has what. A column may be a path into one: `reward_model.ground_truth`,
    `prompt.0.content`.

    `choices` are the columns of the options, the right one among them: one column with a list (or
    with ARC's lists `text` and `label`), or a column for each. `answer` then is the right option's
    label, letter, position or text. `train` and `test` are splits, None where there is none to be
    used so; `config` is the one to take where the user names none."""

    task: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    config: str | None = None
    train: str | None = "train"
    test: str | None = "test"
    gated: bool = False


GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
SCIQ = ("correct_answer", "distractor1", "distractor2", "distractor3")
DATASETS = {
    "openai/gsm8k": Source("math", "question", "answer", config="main"),
    "HuggingFaceH4/MATH-500": Source("math", "problem", "answer", train=None),
    "HuggingFaceH4/aime_2024": Source("math", "problem", "answer", train=None, test="train"),
    "math-ai/amc23": Source("math", "question", "answer", train=None),
    "math-ai/minervamath": Source("math", "question", "answer", train=None),
    "agentica-org/DeepScaleR-Preview-Dataset": Source("math", "problem", "answer", test=None),
    "BytedTsinghua-SIA/DAPO-Math-17k": Source(
        "math", "prompt.0.content", "reward_model.ground_truth", test=None
    ),
    "open-r1/DAPO-Math-17k-Processed": Source("math", "prompt", "solution", config="en", test=None),
    "allenai/ai2_arc": Source("science", "question", "answerKey", ("choices",), config="ARC-Easy"),
    "allenai/openbookqa": Source(
        "science", "question_stem", "answerKey", ("choices",), config="main"
    ),
    "allenai/sciq": Source("science", "question", "correct_answer", SCIQ),
    "m-a-p/SuperGPQA": Source("science", "question", "answer", ("options",), test=None),
    "Idavidrein/gpqa": Source(
        "science",
        "Question",
        "Correct Answer",
        GPQA,
        "gpqa_diamond",
        train=None,
        test="train",
        gated=True,
    ),
    "basicv8vc/SimpleQA": Source("science", "problem", "answer", train=None),
}
# Usual names, for data sets in whose columns none of the table's fits.
QUESTIONS = ("question", "problem", "prompt", "query", "input", "instruction")
CHOICES = ("choices", "options")
ANSWERS = (
    "answerKey",
    "answer",
    "final_answer",
    "expected_answer",
    "solution",
    "target",
    "output",
    "label",
)


@dataclass(frozen=True)
class Question:
    """A question with its options in the order in which the user gives them (none: a free answer),
    and the reference: a letter, or the answer itself; None where the data have none."""

    text: str
    options: tuple[str, ...]
    answer: str | None

    @property
    def message(self) -> str:
        return lay_out(self.text, self.options)


def lay_out(question: str, options: Sequence[str]) -> str:
    """A question as the user asks it: a line for every option, if there are any."""
    return "\n".join(
        [
            question,
            *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)),
        ]
    )


def load_rows(name: str, config: str | None, split: str, flag: str) -> Dataset:
    """A split of a hub data set, of a local folder (`<split>.jsonl|json|csv|parquet`, below
    `config` if given) or of one local file. `split` may carry a slice, as in train[:90%]."""
    try:
        if not os.path.exists(name):
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                stop(f"--dataset {name}: no such file or folder")
            return load_dataset(name, config, split=split)
        stem, folder = split.split("[", 1)[0], Path(name, config or "")
        files = (
            [folder]
            if folder.is_file()
            else [f for f in sorted(folder.glob(f"{stem}.*")) if f.suffix in FORMATS]
        )
        if not files:
            found = sorted(
                str(f.relative_to(name)) for f in Path(name).rglob("*") if f.suffix in FORMATS
            )
            hint = "slices such as train[:90%] and train[90%:] divide one file"
            stop(
                f"{flag} {split}: no {stem}.jsonl, .json, .csv or .parquet in {folder} (found: {', '.join(found)}; {hint})"
            )
        return load_dataset(FORMATS[files[0].suffix], data_files={stem: str(files[0])}, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        stop(f"--dataset {name}, {flag} {split}: could not be loaded ({first_line(error)})")


def load_split(
    args, name: str, config: str | None, split: str | None, part: str, unlabelled: bool
) -> list[Question]:
    """The questions of a data set; what is not given is the table's. `part` is train or test, the
    side that they are used for. `args` has the names of columns, and the seed by which options are
    shuffled."""
    known = DATASETS.get(name)
    split = split or (getattr(known, part) if known else part)
    if split is None:
        there = known.train or known.test
        stop(
            f"--dataset {name}: it has no split to {part} on, only {there}; name another for that side (--dataset, --test-dataset) "
            f"or divide this one, as in --train-split '{there}[:80%]' --test-split '{there}[80%:]'"
        )
    rows = load_rows(name, config or (known.config if known else None), split, f"--{part}-split")
    return list(read(rows, find_columns(rows, known, args, unlabelled), args.seed))


def find_columns(rows: Dataset, known: Source | None, args, unlabelled: bool) -> Source:
    """The columns that the flags name; else those of the table's entry, or of the entry of most
    columns that the rows have; else the usual names. The answer's is "" where `unlabelled` and
    there is none."""
    some = [rows[i] for i in range(min(len(rows), 20))]  # the first may lack an answer

    def there(path: str) -> bool:
        return any(value(row, path) is not None for row in some)

    def fits(source: Source) -> bool:
        return all(there(path) for path in (source.question, source.answer, *source.choices))

    entries = (
        [known] if known else sorted(DATASETS.values(), key=lambda source: -len(source.choices))
    )
    source = next((source for source in entries if fits(source)), Source("", "", ""))
    question = args.question_column or source.question or next(filter(there, QUESTIONS), "")
    answer = args.answer_column or source.answer or next(filter(there, ANSWERS), "")
    choices = (args.choices_column,) if args.choices_column else source.choices
    if not choices and not args.question_column:  # options in a usual shape, though no entry fits
        choices = tuple(
            path
            for path in CHOICES
            if any(isinstance(value(row, path), list | dict) for row in some)
        )[:1]
    wanted = [
        ("question", question, QUESTIONS),
        ("answer", answer, ANSWERS),
        *(("choices", path, ()) for path in choices),
    ]
    for flag, path, usual in wanted:
        if there(path) or (flag == "answer" and unlabelled and not args.answer_column):
            continue
        why = (
            f"there is no column {path!r}"
            if path
            else f"none of the usual names ({', '.join(usual)}) is there"
        )
        stop(f"--{flag}-column: {why}; the data set has the columns {', '.join(rows.column_names)}")
    return Source("", question, answer if there(answer) else "", choices)


def value(row: dict, path: str) -> Any:
    """A column's value, or with dots what lies below it; None where it is missing. A column that
    bears the whole name comes first."""
    if path in row:
        return row[path]
    found: Any = row
    for step in path.split("."):
        try:
            found = found[int(step)] if isinstance(found, list) else found[step]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return found


def options_of(found: list[Any]) -> tuple[list[str], list[str]]:
    """Options and their labels, from the columns of the options: one with a list of texts, of
    {label, text}, with ARC's lists `text` and `label`, or with a text for each letter; or a text a
    column. Stops where it is something else."""
    if len(found) == 1:
        (one,) = found
        if isinstance(one, dict):
            one = [dict(label=k, text=x) for k, x in zip(one["label"], one["text"], strict=True)] if "text" in one else [
                dict(label=k, text=x) for k, x in one.items()
            ]  # fmt: skip
        if not isinstance(one, list | None):
            stop(f"--choices-column: a list of options is wanted, not {str(one)[:60]!r}")
        found = one or []
    pairs = [
        (str(x.get("label", "")), x.get("text")) if isinstance(x, dict) else ("", x) for x in found
    ]
    pairs = [
        (label, str(text).strip())
        for label, text in pairs
        if text is not None and str(text).strip()
    ]
    if len(pairs) > len(LETTERS):
        stop(
            f"--choices-column: a question has {len(pairs)} options; there are letters for {len(LETTERS)}"
        )
    return [text for _, text in pairs], [label for label, _ in pairs]


def read(rows: Dataset, columns: Source, seed: int) -> Iterator[Question]:
    """The questions of the rows, each once, their options shuffled by the seed and the question:
    nothing can be learnt from the position, and the same question has the same order wherever it
    stands."""
    seen = set()
    paths = (columns.question, columns.answer, *columns.choices)
    heads = [path if path in rows.column_names else path.split(".")[0] for path in paths if path]
    for row in rows.select_columns(list(dict.fromkeys(heads))):
        text, answer = (
            value(row, columns.question),
            value(row, columns.answer) if columns.answer else None,
        )
        if isinstance(text, list) or isinstance(answer, list | dict):
            stop(
                f"{columns.question}, {columns.answer}: texts are wanted; reach into a column as in prompt.0.content"
            )
        answer = None if answer is None or str(answer).strip() == "" else answer
        if text is None or not str(text).strip():
            continue
        text = str(text).strip()
        options, labels = options_of([value(row, path) for path in columns.choices])
        order = random.Random(f"{seed} options {text} {sorted(options)}").sample(
            range(len(options)), len(options)
        )
        if options and answer is not None:
            right = position(answer, options, labels)
            answer = None if right is None else LETTERS[order.index(right)]
        shuffled = tuple(options[i] for i in order)
        if (text, shuffled) not in seen:
            seen.add((text, shuffled))
            yield Question(text, shuffled, None if answer is None else str(answer).strip())


def position(answer: Any, options: list[str], labels: list[str]) -> int | None:
    """Which of the options is right: named by its label, its text, its position from 0, or its
    letter."""
    answer = answer.strip() if isinstance(answer, str) else answer
    positions = list(range(len(options)))
    for names in (
        labels,
        options,
        positions,
        list(LETTERS[: len(options)]),
        [str(i) for i in positions],
    ):
        if answer in names:
            return names.index(answer)
    return None

"""Data sets: a table of the public ones, the loading of rows, and how rows become questions with
options and answers."""

import csv
import gzip
import io
import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Any

from utils.errors import first_line, stop
from utils.world.answers import LETTERS

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BLANKS = re.compile(r"\s*")
# Options that lean on others: by letter ("Both A and B"), or as a summary ("All of the above").
BY_LETTER = re.compile(
    r"\b[A-H]\)?(?:, ?\(?[A-H]\)?)*,? (?:and|or|nor|&) \(?[A-H]\b|\b[Oo]nly \(?[A-H]\b|\b[A-H]\)? only\b"
    r"|\([a-h]\)(?:, ?\([a-h]\))*,? (?:and|or|nor|&) \([a-h]\)"
    r"|(?i:\b(?:both|either|neither) \(?[a-h1-8]\)? (?:and|or|nor) \(?[a-h1-8]\b)"
)
SUMMARY = re.compile(
    r"(?:all|any|both|each|either|neither|none|two|more than one) (?:of )?(?:the )?(?:\w+ )?"
    r"(?:above|these|those|them|options|choices|answers)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """Where a data set has what. A column may be a path into one: `reward_model.ground_truth`.

    `more` is a column that goes on behind the question, where it is not empty.
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
    more: str = ""


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
        "math", "prompt", "reward_model.ground_truth", test=None
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
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
CHOICES = ("choices", "options")
ANSWERS = (
    "answerKey",
    "answer",
    "final_answer",
    "expected_answer",
    "correct_answer",
    "answer_letter",
    "answer_index",
    "answer_idx",
    "answer_text",
    "solution",
    "target",
    "output",
    "label",
)


@dataclass(frozen=True)
class Question:
    """A question with its options in the order in which the user gives them (none: a free answer),
    and the reference: a letter, or the answer itself; None where the data have none. `history` has
    role and content of the messages before it: a system message, earlier turns."""

    text: str
    options: tuple[str, ...]
    answer: str | None
    history: tuple[tuple[str, str], ...] = ()

    @property
    def conversation(self) -> list[dict[str, str]]:
        turns = [*self.history, ("user", lay_out(self.text, self.options))]
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def message(self) -> str:
        """All that is said, as one text."""
        return "\n\n".join(message["content"] for message in self.conversation)


def split_name(name: str) -> tuple[str, str | None]:
    """NAME or NAME:CONFIG as name and configuration (None: the usual one)."""
    return (name, None) if os.path.exists(name) else (*name.rsplit(":", 1), None)[:2]


def lay_out(question: str, options: Sequence[str]) -> str:
    """A question as the user asks it: a line for every option, if there are any."""
    return "\n".join(
        [
            question,
            *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)),
        ]
    )


Rows = Sequence[dict[str, Any]]  # a list, or a Dataset of the library


def load_rows(name: str, config: str | None, split: str, flag: str) -> Rows:
    """A split of a hub data set, of a local folder (`<split>` with one of ENDINGS, below `config` if
    given) or of one local file. `split` may carry a slice, as in train[:90%]."""
    import datasets  # takes a second: imported where it is used

    datasets.disable_progress_bars()
    stem, path = split.split("[", 1)[0], Path(name)
    try:
        if not name.strip():
            stop("--dataset: the name is empty; give a folder, a file or a hub id")
        if not os.path.exists(name):
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                stop(f"--dataset {name}: no such file or folder")
            return as_written(datasets.load_dataset(name, config, split=split))
        if path.is_dir():
            files = [f for f in sorted(Path(name, config or "").glob(f"{stem}.*")) if ending(f)]
            if not files:
                found = sorted(str(f.relative_to(name)) for f in path.rglob("*") if ending(f))
                stop(
                    f"{flag} {split}: no {stem}{', '.join(ENDINGS)} in "
                    f"{Path(name, config or '')} (found: {', '.join(found)}; slices such as "
                    "train[:90%] and train[90%:] divide one file)"
                )
            path = files[0]
        if ending(path) == ".parquet":
            data = datasets.load_dataset("parquet", data_files={stem: str(path)}, split=split)
            return as_written(data)
        rows = read_file(path)
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({stem: len(rows)})
        return [row for part in parts for row in rows[part.from_ : part.to]]
    except UnicodeDecodeError as error:
        stop(f"--dataset {path}: it is not UTF-8 ({error}); iconv -f latin1 -t utf-8 converts it")
    except Exception as error:  # a file or a data set of others can fail in any way
        stop(f"--dataset {name}, {flag} {split}: could not be loaded ({first_line(error)})")


def ending(path: Path) -> str:
    """Which of ENDINGS a file has, before a .gz too and in any case; "" for none."""
    found = Path(path.name.lower().removesuffix(".gz")).suffix
    return found if found in ENDINGS else ""


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON Lines, CSV or TSV file, its values as they are written. Readers that
    guess types rewrite them: a date becomes a time, "NA" nothing, 007 a seven, 0.10 another 0.1."""
    kind, data = ending(path), path.read_bytes()
    if not kind:
        stop(f"--dataset {path}: its ending is none of {', '.join(ENDINGS)}, .gz behind it or not")
    text = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)
        lines = io.StringIO(text, newline="")
        rows = list(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True))
        long = next((i for i, row in enumerate(rows, 1) if None in row), None)
        if long:
            stop(
                f"--dataset {path}: row {long} has more cells than the header; are quotes missing?"
            )
        return rows
    decoder = json.JSONDecoder(parse_float=str, parse_constant=lambda name: None)
    rows, place = [], BLANKS.match(text).end()
    while place < len(text):
        row, place = decoder.raw_decode(text, place)
        rows += row if isinstance(row, list) else [row]
        place = BLANKS.match(text, place).end()
    odd = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if odd:
        stop(f'--dataset {path}: row {odd} is no object with columns, such as {{"question": ...}}')
    return rows


def as_written(rows: Rows) -> Rows:
    """float32 columns as the shortest texts that mean them: 0.1, and not 0.10000000149."""
    from datasets import List, Value

    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if getattr(inner, "dtype", "") in ("float16", "float32"):
            text = Value("string")
            rows = rows.cast_column(name, text if inner is feature else List(text))
    return rows


def load_split(
    args, name: str, config: str | None, split: str | None, part: str, unlabelled: bool,
    dropped: Counter | None = None,
) -> list[Question]:  # fmt: skip
    """The questions of a data set; what is not given is the table's. `part` is train or test, the
    side that they are used for. `args` has the names of columns, and the seed by which options are
    shuffled. `dropped` counts what is left out, by reason."""
    known = DATASETS.get(name)
    split = split or (getattr(known, part) if known else part)
    if split is None:
        there = known.train or known.test
        stop(
            f"--dataset {name}: it has no split to {part} on, only {there}; name another for that side (--dataset, --test-dataset) "
            f"or divide this one, as in --train-split '{there}[:80%]' --test-split '{there}[80%:]'"
        )
    rows = load_rows(name, config or (known.config if known else None), split, f"--{part}-split")
    if len(rows) == 0:
        stop(f"--dataset {name}, --{part}-split {split}: there are no rows")
    return read(rows, find_columns(rows, known, args, unlabelled), args.seed, dropped)


def find_columns(rows: Rows, known: Source | None, args, unlabelled: bool) -> Source:
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
    guessed = not (args.question_column or source.question)
    more = "input" if guessed and question == "instruction" and there("input") else ""  # Alpaca
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
        there_are = dict.fromkeys(column for row in some for column in row)
        stop(f"--{flag}-column: {why}; the data set has the columns {', '.join(there_are)}")
    return Source("", question, answer if there(answer) else "", choices, more=more)


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


def as_text(found: Any) -> str:
    """A single value as it is written; "" for none."""
    if found is None or found != found:  # NaN
        return ""
    if isinstance(found, datetime) and found.time() == time():  # a date, taken for a time
        found = found.date()
    return legible(str(found)).strip()


def legible(text: str) -> str:
    """The text, with a mark in the place of half a character: JSON can hold one half of an emoji,
    no tokenizer can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def conversation_of(found: Any, column: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """What is asked, and role and content of the messages before it: a text alone, or a list of
    messages that ends with the user's."""
    if not isinstance(found, list | dict):
        return (), as_text(found)
    try:
        *history, (role, text) = [(message["role"], message["content"]) for message in found]
    except (KeyError, TypeError, ValueError):
        role = text = None
    if role != "user" or not all(isinstance(content, str) for _, content in (*history, (0, text))):
        stop(
            f"--question-column {column}: a text is wanted, or a list of messages "
            f'{{"role": ..., "content": ...}} that ends with the user\'s, not {str(found)[:60]!r}'
        )
    return tuple((role, legible(content)) for role, content in history), legible(text).strip()


def options_of(found: list[Any]) -> list[tuple[str, str]]:
    """Label and text of every option, from the columns of the options: one with a list of texts, of
    {label, text}, with ARC's lists `text` and `label`, or with a text for each letter; or a text a
    column. Letters that all texts begin with, "(A)12 km", are no part of them. Stops where it is
    something else."""
    if len(found) == 1:
        (one,) = found
        if isinstance(one, dict) and isinstance(one.get("text"), list):
            labels = one.get("label") or [""] * len(one["text"])
            if len(labels) != len(one["text"]):
                stop(
                    f"--choices-column: there are more or fewer labels than texts in {str(one)[:60]!r}"
                )
            one = [dict(label=k, text=x) for k, x in zip(labels, one["text"], strict=True)]
        elif isinstance(one, dict):
            one = [dict(label=k, text=x) for k, x in one.items()]
        if not isinstance(one, list | None):
            stop(f"--choices-column: a list of options is wanted, not {str(one)[:60]!r}")
        found = one or []
    if len(found) > len(LETTERS):
        stop(
            f"--choices-column: a question has {len(found)} options; there are letters for {len(LETTERS)}"
        )
    options = [
        (as_text(x.get("label")), as_text(x.get("text")))
        if isinstance(x, dict)
        else ("", as_text(x))
        for x in found
    ]
    own = [
        re.fullmatch(rf"(?is)\(?{letter}[).:]\s*(\S.*)", text)
        for letter, (_, text) in zip(LETTERS, options, strict=False)
    ]
    if len(own) > 1 and all(own):  # as a label the whole text: some answers repeat it
        options = [(k or x, match[1]) for (k, x), match in zip(options, own, strict=True)]
    return options


def read(rows: Rows, columns: Source, seed: int, dropped: Counter | None = None) -> list[Question]:
    """The questions of the rows, each once, their options shuffled by the seed and the question:
    nothing can be learnt from the position, and the same question has the same order wherever it
    stands."""
    dropped = Counter() if dropped is None else dropped
    before, _, last = columns.question.rpartition(".")
    if last == "content" and value(rows[0], f"{before}.role") == "system":
        stop(f"--question-column {columns.question}: a system message; name the list of messages")
    found = []
    for row in rows:
        history, text = conversation_of(value(row, columns.question), columns.question)
        if columns.more:
            text = "\n\n".join(filter(None, (text, as_text(value(row, columns.more)))))
        answer = value(row, columns.answer) if columns.answer else None
        if isinstance(answer, list | dict):
            stop(
                f"--answer-column {columns.answer}: texts are wanted, not {str(answer)[:60]!r}; reach into it as in a.0.b"
            )
        if text:
            options = options_of([value(row, path) for path in columns.choices])
            found.append((history, text, answer, options))
    dropped["without a question"] = len(rows) - len(found)
    right = right_options([(answer, options) for _, _, answer, options in found])
    questions = {}
    for (history, text, answer, options), place in zip(found, right, strict=True):
        order = arrangement(text, options, seed)
        reference = as_text(answer) or None
        texts = tuple(options[i][1] for i in order)
        if order:  # of options with the same text the first is right, as in choose()
            reference = LETTERS[texts.index(options[place][1])] if place in order else None
        question = Question(text, texts, reference, history)
        questions.setdefault(question.message, question)
    dropped["asked before"] = len(found) - len(questions)
    return list(questions.values())


def arrangement(text: str, options: list[tuple[str, str]], seed: int) -> list[int]:
    """The places of the options that have a text, in the order in which they are asked. Those that
    name others by letter keep the whole order, a summary such as "All of the above" stays last."""
    there = [i for i, (_, option) in enumerate(options) if option]
    texts = {i: options[i][1] for i in there}
    last = [i for i in there if SUMMARY.match(texts[i])]
    if any(map(BY_LETTER.search, texts.values())) or last != there[len(there) - len(last) :]:
        return there
    free = there[: len(there) - len(last)]
    draw = random.Random(f"{seed} options {text} {sorted(texts.values())}")
    return draw.sample(free, len(free)) + last


def right_options(rows: list[tuple[Any, list[tuple[str, str]]]]) -> list[int | None]:
    """The place of the right option in every row (answer, options). Data sets name it in one of six
    ways, and a single row may be read in several: the way is that in which most rows can be."""
    ways = [readings(answer, options) for answer, options in rows]
    counts = [sum(place is not None for place in way) for way in zip(*ways, strict=True)]
    best = counts.index(max(counts, default=0)) if counts else 0
    return [places[best] for places in ways]


def readings(answer: Any, options: list[tuple[str, str]]) -> list[int | None]:
    """Which option an answer means as a label, a letter, a position from 0, a text, a position in
    quotes, and a position from 1; None where it means none."""
    written, size = unicodedata.normalize("NFC", as_text(answer)), len(options)
    labels, texts = ([unicodedata.normalize("NFC", x[k]) for x in options] for k in (0, 1))
    letter = re.fullmatch(r"\(?([A-Z])[).:]?", written)
    number = re.fullmatch(r"(\d{1,3})(?:\.0*)?", written)
    number = int(number[1]) if number else -1
    places = [
        labels.index(written) if written in labels else -1,
        LETTERS.index(letter[1]) if letter else -1,
        -1 if isinstance(answer, str) else number,
        texts.index(written) if written in texts else -1,
        number,
        number - 1,
    ]
    return [place if written and 0 <= place < size and texts[place] else None for place in places]

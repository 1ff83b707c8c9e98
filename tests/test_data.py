"""Every data set of the table in docs/real-models.md, read from a made-up file with its columns;
options, their shuffling, what is refused."""

import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from tests.conftest import ROOT
from utils.world.answers import LETTERS
from utils.world.data import DATASETS, find_columns, lay_out, load_split, position, read

CHOICES = {"text": ["gills", "lungs", "skin"], "label": ["1", "2", "3"]}
USER = [{"role": "user", "content": "What is 2 + 3?"}]
ROWS = {
    "openai/gsm8k": {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "HuggingFaceH4/MATH-500": {"problem": "What is 2 + 3?", "solution": r"\boxed{5}", "answer": "5", "subject": "A", "level": 1, "unique_id": "a"},
    "HuggingFaceH4/aime_2024": {"id": 1, "problem": "What is 2 + 3?", "solution": "5", "answer": "5", "url": "u", "year": "2024"},
    "math-ai/amc23": {"id": 1, "answer": 5.0, "url": "u", "question": "What is 2 + 3?"},
    "math-ai/minervamath": {"question": "What is 2 + 3?", "answer": "5"},
    "agentica-org/DeepScaleR-Preview-Dataset": {"problem": "What is 2 + 3?", "answer": "5", "solution": ""},
    "BytedTsinghua-SIA/DAPO-Math-17k": {
        "data_source": "d", "prompt": USER, "ability": "MATH", "reward_model": {"ground_truth": "5", "style": "rule"}, "extra_info": {"index": "i"},
    },
    "open-r1/DAPO-Math-17k-Processed": {
        "prompt": "What is 2 + 3?", "solution": "5", "data_source": "d", "source_prompt": USER, "ability": "MATH",
        "reward_model": {"ground_truth": "5", "style": "rule"}, "extra_info": {"index": "i"},
    },
    "allenai/ai2_arc": {"id": "a", "question": "What does a whale breathe with?", "choices": CHOICES, "answerKey": "2"},
    "allenai/openbookqa": {"id": "a", "question_stem": "What does a whale breathe with?", "choices": CHOICES, "answerKey": "2"},
    "allenai/sciq": {
        "question": "What does a whale breathe with?", "distractor3": "air tubes", "distractor1": "gills", "distractor2": "skin",
        "correct_answer": "lungs", "support": "",
    },
    "m-a-p/SuperGPQA": {
        "uuid": "u", "question": "What does a whale breathe with?", "options": ["gills", "lungs", "skin", "air tubes"], "answer": "lungs",
        "answer_letter": "B", "discipline": "Science", "field": "f", "subfield": "s", "difficulty": "easy", "is_calculation": False,
    },
    "Idavidrein/gpqa": {
        "Question": "What does a whale breathe with?", "Correct Answer": "lungs", "Incorrect Answer 1": "gills", "Incorrect Answer 2": "skin",
        "Incorrect Answer 3": "air tubes", "Explanation": "", "Pre-Revision Question": "?",
    },
    "basicv8vc/SimpleQA": {"metadata": "{}", "problem": "What does a whale breathe with?", "answer": "lungs"},
}  # fmt: skip
FLAGS = SimpleNamespace(question_column=None, answer_column=None, choices_column=None, seed=1)


def table() -> dict[str, list[str]]:
    """The rows of the page by id: their cells."""
    rows = re.findall(
        r"^\| `([\w.-]+/[\w.-]+)` \| (.*) \|$",
        (ROOT / "docs" / "real-models.md").read_text(),
        flags=re.M,
    )
    return {
        name: [cell.strip() for cell in cells.split(" | ")]
        for name, cells in rows
        if name in DATASETS
    }


def test_the_table_of_the_page_is_the_one_in_the_code():
    assert table().keys() == DATASETS.keys() == ROWS.keys()
    for name, (config, train, test, columns, gated, command) in table().items():
        source = DATASETS[name]
        assert (config.strip("`") or None, train or None, test or None) == (
            source.config,
            source.train,
            source.test,
        ), name
        assert columns.split(", ") == [
            f"`{c}`" for c in (source.question, source.answer, *source.choices)
        ], name
        assert (
            (gated == "yes") == source.gated
            and name in command
            and f"--task {source.task}" in command
        ), name


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("by_name", [True, False])
def test_every_data_set_of_the_table(tmp_path, monkeypatch, name, by_name):
    """By its name, as from the hub, and from a folder in which nothing but the columns tells what
    it is."""
    source, part = DATASETS[name], "train" if DATASETS[name].train else "test"
    asked = []

    def hub(given, config, split):
        asked.append((given, config, split))
        return Dataset.from_list([ROWS[name]])

    monkeypatch.setattr(
        "utils.world.data.load_dataset", hub if by_name else __import__("datasets").load_dataset
    )
    (tmp_path / f"{part}.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    (question,) = load_split(
        FLAGS, name if by_name else str(tmp_path), None, None, part, unlabelled=False
    )
    assert asked == ([(name, source.config, getattr(source, part))] if by_name else [])
    if source.task == "math":
        assert (question.text, question.options) == (
            "What is 2 + 3?",
            (),
        ) and question.answer.rsplit("#### ")[-1] in (
            "5",
            "5.0",
        )
    elif source.choices:
        assert set(question.options) >= {"lungs", "gills", "skin"}
        assert question.options[LETTERS.index(question.answer)] == "lungs"
    else:
        assert question.answer == "lungs"


def test_a_data_set_without_a_split_for_this_side():
    for name, part, flag in (
        ("HuggingFaceH4/MATH-500", "train", "--test-dataset"),
        ("m-a-p/SuperGPQA", "test", "train\\[80%:\\]"),
    ):
        with pytest.raises(SystemExit, match=f"{name}: it has no split to {part} on.*{flag}"):
            load_split(FLAGS, name, None, None, part, unlabelled=False)


def rows_of(*rows: dict, seed: int = 1, **flags) -> list:
    data = Dataset.from_list(list(rows))
    return list(
        read(data, find_columns(data, None, SimpleNamespace(**vars(FLAGS) | flags), False), seed)
    )


def test_options_are_shuffled_by_seed_and_question():
    """Each position holds the right option about as often, the same question is asked alike, and
    another seed asks it otherwise."""
    many = [
        {
            "question": f"{i}?",
            "choices": {"text": ["w", "x", "y", "right"], "label": list("ABCD")},
            "answerKey": "D",
        }
        for i in range(400)
    ]
    questions = rows_of(*many)
    places = [questions[i].answer for i in range(400)]
    assert all(80 <= places.count(letter) <= 120 for letter in "ABCD")
    assert all(q.options["ABCD".index(q.answer)] == "right" for q in questions)
    assert questions == rows_of(*many) and questions != rows_of(*many, seed=2)
    assert len(rows_of(many[0], many[0])) == 1  # asked once


def test_named_columns_and_the_ways_to_name_the_right_option():
    row = {"q": "Which?", "c": ["a b", "c d", "e f"], "k": 2}
    (question,) = rows_of(row, question_column="q", answer_column="k", choices_column="c")
    assert question.options["ABC".index(question.answer)] == "e f"
    assert [
        position(answer, ["x", "y"], ["1", "2"]) for answer in ("2", "y", " y ", 1, "B", "z", 5)
    ] == [
        1,
        1,
        1,
        1,
        1,
        None,
        None,
    ]
    with pytest.raises(
        SystemExit,
        match="--choices-column: there is no column 'nope'; the data set has the columns q, c, k",
    ):
        rows_of(row, question_column="q", answer_column="k", choices_column="nope")


@pytest.mark.parametrize(
    "choices, answer",
    [
        (["a", "b", "c"], 1),  # MMLU
        (["a", "b", "c"], "1"),
        ([{"label": "A", "text": "a"}, {"label": "B", "text": "b"}], "B"),
        ({"A": "a", "B": "b"}, "B"),  # MedQA
        (["a", None, "b"], "b"),
    ],
)
def test_options_in_usual_shapes(choices, answer):
    (question,) = rows_of({"question": "Which?", "choices": choices, "answer": answer})
    assert (
        question.options[LETTERS.index(question.answer)] == "b" and "None" not in question.options
    )


def test_missing_values():
    rows = [
        {"question": "1?", "answer": None},
        {"question": None, "answer": "2"},
        {"question": "3?", "answer": "3"},
        {"question": "4?", "answer": ""},
    ]
    assert [(q.text, q.answer) for q in rows_of(*rows)] == [("1?", None), ("3?", "3"), ("4?", None)]


def test_shapes_that_cannot_be_read_are_refused():
    with pytest.raises(SystemExit, match="a list of options is wanted, not 'a, b'"):
        rows_of({"question": "Which?", "o": "a, b", "answer": "a"}, choices_column="o")
    with pytest.raises(SystemExit, match="texts are wanted"):
        rows_of({"question": [{"content": "Which?"}], "answer": "a"})


def test_layout():
    assert (
        lay_out("Which?", ("x", "y")) == "Which?\nA) x\nB) y" and lay_out("Which?", ()) == "Which?"
    )


def test_the_embedded_science_data():
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (ROOT / "assets/data/tiny_science" / f"{split}.jsonl").read_text().splitlines()
    ]
    asked = [(row["question"], *sorted(row["choices"]["text"])) for row in rows]
    assert len(set(asked)) == len(rows) == 4096 + 512
    choice = [row for row in rows if row["choices"]["text"]]
    assert 0.6 < len(choice) / len(rows) < 0.8
    assert all(row["answerKey"] in row["choices"]["label"] for row in choice)

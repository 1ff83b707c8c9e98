"""Every data set of the table in docs/real-models.md, read from a made-up file with its columns;
options, their shuffling, what is refused."""

import bz2
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, List, Value

from tests.conftest import ROOT
from utils.world.answers import LETTERS, choose
from utils.world.data import (
    ANSWERS,
    DATASETS,
    find_columns,
    lay_out,
    load_split,
    read,
    right_options,
    split_name,
)  # fmt: skip

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


def test_the_table_of_the_page_is_the_one_in_the_code():
    page = (ROOT / "docs" / "real-models.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.-]+/[\w.-]+)` \| (.*) \|$", page, flags=re.M))
    assert rows.keys() >= DATASETS.keys() == ROWS.keys()
    for name, source in DATASETS.items():
        config, train, test, columns, gated, command = rows[name].split(" | ")
        splits = [cell.strip(" `") or None for cell in (config, train, test)]
        assert splits == [source.config, source.train, source.test], name
        named = [f"`{c}`" for c in (source.question, source.answer, *source.choices)]
        assert columns.strip().split(", ") == named, name
        assert (gated.strip() == "yes") == source.gated, name
        assert name in command and f"--task {source.task}" in command, name


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_of_the_table(tmp_path, monkeypatch, name):
    """By its name, as from the hub, and from a folder in which nothing but the columns tells what
    it is."""
    source, part = DATASETS[name], "train" if DATASETS[name].train else "test"
    asked = []

    def hub(given, config, split):
        asked.append((given, config, split))
        return Dataset.from_list([ROWS[name]])

    (tmp_path / f"{part}.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", hub)
        (question,) = load_split(FLAGS, name, None, None, part, unlabelled=False)
    assert asked == [(name, source.config, getattr(source, part))]
    assert [question] == load_split(FLAGS, str(tmp_path), None, None, part, unlabelled=False)
    if source.task == "math":
        assert question.text == "What is 2 + 3?" and not question.options
        assert question.answer.rsplit("#### ")[-1] in ("5", "5.0")
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
    return read(data, find_columns(data, None, SimpleNamespace(**vars(FLAGS) | flags), False), seed)


def test_options_are_shuffled_by_seed_and_question():
    """Each position holds the right option about as often, the same question is asked alike, and
    another seed asks it otherwise."""
    choices = {"text": ["w", "x", "y", "right"], "label": list("ABCD")}
    many = [{"question": f"{i}?", "choices": choices, "answerKey": "D"} for i in range(400)]
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
    message = "--choices-column: there is no column 'nope'; the data set has the columns q, c, k"
    with pytest.raises(SystemExit, match=message):
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
    assert question.options[LETTERS.index(question.answer)] == "b"
    assert "None" not in question.options


@pytest.mark.parametrize("answers", [["B", "C"], ["(B)15 km", "(C)18 km"], ["15 km", "18 km"]])
@pytest.mark.parametrize("spelled", ["({}){}", "{}){}", "{}. {}", "({}) {}", "{}: {}"])
def test_letters_that_the_options_bring_along_are_none_of_their_text(spelled, answers):
    """AGIEval and AQuA-RAT have them; they would contradict those under which options are asked."""
    texts = ["12 km", "15 km", "18 km", "21 km"]
    own = [spelled.format(*pair) for pair in zip("ABCD", texts, strict=True)]
    if answers[0].startswith("("):
        answers = [own["ABC".index(answer[1])] for answer in answers]
    rows = [{"question": f"{i}?", "options": own, "answer": x} for i, x in enumerate(answers)]
    questions = rows_of(*rows)
    assert all(sorted(q.options) == texts for q in questions)
    right = [q.options[LETTERS.index(q.answer)] for q in questions]
    assert right == ["15 km", "18 km"]


@pytest.mark.parametrize(
    "texts",
    [
        ["A. Smith", "C. Jones", "B. Brown"],
        ["A", "B", "C"],
        ["(A) x", "(B) y", "z"],
        ["B) x", "C) y", "D) z"],
    ],
)
def test_letters_that_are_part_of_the_options_stay(texts):
    (question,) = rows_of({"question": "Who?", "options": texts, "answer": texts[0]})
    assert sorted(question.options) == sorted(texts)


def test_of_equal_options_the_first_is_the_reference():
    """In MedQA there are such; choose() names the first too, wherever the shuffle puts it."""
    texts = ["x", "y", "y", "z"]
    rows = [{"question": f"{i}?", "options": texts, "answer": k} for i in range(20) for k in "BC"]
    questions = rows_of(*rows[::2]) + rows_of(*rows[1::2])
    for question in questions:
        first = question.options.index("y")
        assert question.answer == LETTERS[first]
        for letter, option in zip(LETTERS, question.options, strict=False):
            right = choose(f"The answer is {letter}.", question.options) == question.answer
            assert right == (option == "y")
        assert choose("The answer is y.", question.options) == question.answer


def test_an_instruction_and_its_input_are_one_question():
    """Alpaca's columns: the input may be empty."""
    rows = [
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
        {"instruction": "What is 4 + 5?", "input": "", "output": "9"},
        {"instruction": "What is 1 + 1?", "input": None, "output": "2"},
    ]
    asked = [("Add the numbers.\n\n2 and 3", "5"), ("What is 4 + 5?", "9"), ("What is 1 + 1?", "2")]
    assert [(q.text, q.answer) for q in rows_of(*rows)] == asked
    assert rows_of(*rows, question_column="instruction")[0].text == "Add the numbers."
    assert rows_of({"input": "2 + 3?", "output": "5"})[0].text == "2 + 3?"


def test_an_answer_in_another_unicode_form_names_its_option():
    row = {"question": "Who?", "options": ["Zu\u0308rich", "Bern"], "answer": "Z\u00fcrich"}
    (question,) = rows_of(row)
    assert question.options[LETTERS.index(question.answer)] == "Zu\u0308rich"


def test_missing_values():
    pairs = [("1?", None), (None, "2"), ("3?", "3"), ("4?", "")]
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    assert [(q.text, q.answer) for q in rows_of(*rows)] == [("1?", None), ("3?", "3"), ("4?", None)]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "Which?", "o": "a, b"}, "a list of options is wanted, not 'a, b'"),
        ({"question": "Which?", "o": {"text": ["a", "b"], "label": ["A"]}}, "more or fewer labels than texts"),
        ({"question": "Which?", "o": [str(i) for i in range(27)]}, "27 options; there are letters for 26"),
        ({"question": {"text": "Which?"}}, "--question-column question: a text is wanted, or a list of messages"),
        ({"question": [{"content": "Which?"}]}, "a text is wanted, or a list of messages"),
        ({"question": ["Which?"]}, "a text is wanted, or a list of messages"),
        ({"question": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A"}]}, "that ends with the user's"),
        ({"question": "Which?", "answer": ["a"]}, "--answer-column answer: texts are wanted"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_read_are_refused(row, message):
    with pytest.raises(SystemExit, match=message):
        rows_of({"answer": "a"} | row, choices_column="o" if "o" in row else None)


FOUR = ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    "labels, texts, answers, places",
    [
        ("1234", FOUR, ["1", "4"], [0, 3]),
        ("1234", FOUR, [1, 4], [0, 3]),  # a number is a label where the labels are numbers
        ("abcd", FOUR, ["b", "d"], [1, 3]),
        ("", FOUR, ["B", "(C)", "D."], [1, 2, 3]),
        ("", ["B", "C", "A", "D"], ["A"], [0]),  # a letter, though it is an option's text too
        ("", ["B", "C", "A", "bark"], ["A", "bark"], [2, 3]),  # unless texts are the rule here
        ("", FOUR, [0, 3], [0, 3]),
        ("", FOUR, [0.0, 3.0], [0, 3]),
        ("", FOUR, [1, 2, 4], [0, 1, 3]),  # positions from 1
        ("", FOUR, ["0", "3"], [0, 3]),
        ("", ["2", "3", "0", "7"], [0, 2], [0, 2]),  # positions, though 0 and 2 are options too
        ("", ["2", "3", "0", "7"], ["0", "7"], [2, 3]),
        ("", ["2", "3", "0", "7"], [0, 7], [2, 3]),
        ("", FOUR, [" y ", "z", "none", None, "", 9], [2, 3, None, None, None, None]),
        ("", ["w", None, "y", ""], ["A", "B", "C"], [0, None, 2]),
    ],
)  # fmt: skip
def test_the_right_option_is_named_in_the_way_of_the_data_set(labels, texts, answers, places):
    options = [(label, text or "") for label, text in zip(labels or [""] * 4, texts, strict=True)]
    assert right_options([(answer, options) for answer in answers]) == places


@pytest.mark.parametrize(
    "texts, kept, last",
    [
        (["x", "y", "Both A and B", "z"], True, 0),
        (["x", "y", "z", "(b) and (c)"], True, 0),
        (["x", "y", "both (a) and (b)", "z"], True, 0),
        (["x", "y", "A, B and D", "z"], True, 0),
        (["x", "y", "z", "b and c"], False, 0),
        (["x", "y", "z", "Only B"], True, 0),
        (["x", "y", "z", "Neither 1 nor 2"], True, 0),
        (["x", "y", "z", "All of the above"], False, 1),
        (["x", "y", "all of these", "none of these"], False, 2),
        (["x", "Both of the above", "y", "z"], True, 0),
        (["x", "y", "z", "a cat and a dog"], False, 0),
        (["H, C, I", "He, H, Al", "Na, Ca", "x"], False, 0),
        (["x", "y", "z", "Both are taller than the land around them."], False, 0),
        (["x", "y", "z", "None of the other choices is right"], False, 1),
    ],
)
def test_options_that_lean_on_others(texts, kept, last):
    """By letter: all stay where they are. As a summary: it stays last."""
    rows = [{"question": f"{i}?", "choices": texts, "answer": texts[-1]} for i in range(30)]
    questions = rows_of(*rows)
    orders = {q.options for q in questions}
    assert (len(orders) == 1) == kept
    assert {order[4 - last :] for order in orders} == {tuple(texts[4 - last :])}
    assert all(q.options[LETTERS.index(q.answer)] == texts[-1] for q in questions)


SYSTEM = {"role": "system", "content": "Be brief."}


def test_conversations_are_taken_whole():
    """The user's last message is the question, what stands before it is its history."""
    talk = [SYSTEM, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [
        {"prompt": messages, "reward_model": {"ground_truth": "5"}}
        for messages in ([SYSTEM, *USER], [*talk, *USER], USER)
    ]
    questions = rows_of(*rows)
    assert [q.text for q in questions] == ["What is 2 + 3?"] * 3
    assert [q.conversation for q in questions] == [row["prompt"] for row in rows]
    assert len({q.message for q in questions}) == 3 and questions[2].message == "What is 2 + 3?"
    with pytest.raises(SystemExit, match="prompt.0.content: a system message; name the list"):
        rows_of(*rows, question_column="prompt.0.content")


@pytest.mark.parametrize(
    "name", ["answer_letter", "answer_index", "answer_text", "answer_idx", "correct_answer"]
)
def test_usual_names_of_the_answer(name):
    answer = {"answer_letter": "B", "answer_index": 1, "answer_idx": "B"}.get(name, "x")
    (question,) = rows_of({"question": "Which?", "options": ["w", "x", "y"], name: answer})
    assert name in ANSWERS and question.options[LETTERS.index(question.answer)] == "x"


def test_what_is_left_out_is_counted():
    rows = [{"question": q, "answer": "1"} for q in ("a", "b", "a", "", None, " a ")]
    data, dropped = Dataset.from_list(rows), Counter()
    assert len(read(data, find_columns(data, None, FLAGS, False), 1, dropped)) == 2
    assert dropped == {"asked before": 2, "without a question": 2}


def answers_in(folder: Path, name: str, content: str | bytes) -> list[str | None]:
    """The answers of a data set of one file."""
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)
    return [q.answer for q in load_split(FLAGS, str(folder / name), None, None, "train", False)]


WRITTEN = {  # what stands in a file, and the text that it is
    '"2024-05-01"': "2024-05-01", '"2024-05-01T10:00:00Z"': "2024-05-01T10:00:00Z", '"10:30"': "10:30",
    "9007199254740993": "9007199254740993", "123456789012345678901234567890": "123456789012345678901234567890",
    "0.10": "0.10", "12.50": "12.50", "1e-7": "1e-7", "0.30000001192092896": "0.30000001192092896", '"007"': "007",
    '"NA"': "NA", '"None"': "None", '"nan"': "nan", "NaN": None, "null": None, '""': None, "3": "3", '"1,000"': "1,000",
}  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".json", ".jsonl.gz", ".csv", ".tsv"])
def test_values_are_kept_as_they_are_written(tmp_path, ending):
    rows = [f'{{"question": "{i}?", "answer": {x}}}' for i, x in enumerate(WRITTEN)]
    text, wanted = "\n".join(rows), list(WRITTEN.values())
    if ending == ".json":
        text = "[\n" + ",\n".join(rows) + "]"
    elif ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        cells = ["" if x == "null" else x for x in WRITTEN]
        lines = [f"question{mark}answer", *(f"{i}?{mark}{x}" for i, x in enumerate(cells))]
        text = "\n".join(lines)
        wanted[list(WRITTEN).index("NaN")] = "NaN"
    content = text.encode("utf-8-sig")
    if ending.endswith(".gz"):
        content = gzip.compress(text.encode(), mtime=0)
    assert answers_in(tmp_path, f"rows{ending}", content) == wanted


def test_rows_of_several_lines_and_of_different_columns(tmp_path):
    text = '{"question": "a\\nb",\n "answer": 1}\n\n{"answer": "x", "question": "c", "other": []}'
    assert answers_in(tmp_path, "rows.jsonl", text) == ["1", "x"]
    assert answers_in(tmp_path, "rows.csv", 'question,answer\n"a\nb, c","1,000"\n') == ["1,000"]


def test_half_an_emoji_becomes_a_mark(tmp_path):
    """JSON may hold one of the two halves of a character."""
    half, whole = "\\ud83d", "\\ud83d\\ude00"
    text = (
        f'{{"question": "{half}?", "answer": "5 {half}"}}\n{{"question": "a", "answer": "{whole}"}}'
    )
    assert answers_in(tmp_path, "rows.jsonl", text) == ["5 \ufffd", "\U0001f600"]
    text = f'{{"question": [{{"role": "user", "content": "x {half}"}}], "answer": "1"}}'
    (tmp_path / "train.jsonl").write_text(text)
    (question,) = load_split(FLAGS, str(tmp_path), None, None, "train", False)
    assert question.text == "x \ufffd"


def test_float32_and_dates_of_parquet(tmp_path):
    number = Value("float32")
    kinds = {"question": Value("string"), "choices": List(number), "answer": number}
    rows = [{"question": "?", "choices": [0.1, 0.25, 3.0], "answer": 0.1}]
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(str(tmp_path / "train.parquet"))
    (question,) = load_split(FLAGS, str(tmp_path), None, None, "train", False)
    assert sorted(question.options) == ["0.1", "0.25", "3"]
    assert question.options[LETTERS.index(question.answer)] == "0.1"
    date = Dataset.from_list([{"question": "?", "answer": "2024-05-01"}])
    date = date.cast_column("answer", Value("timestamp[s]"))  # as readers that guess types have it
    assert read(date, find_columns(date, None, FLAGS, False), 1)[0].answer == "2024-05-01"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows", '{"question": "?", "answer": 1}', "rows: its ending is none of .jsonl, .json, .csv, .tsv, .parquet"),
        ("rows.txt", "?", "its ending is none of"),
        ("rows.jsonl.bz2", bz2.compress(b"{}"), "its ending is none of"),
        ("rows.jsonl", "", "there are no rows"),
        ("rows.csv", "question,answer\n", "there are no rows"),
        ("rows.parquet", "", "could not be loaded"),
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0)[:9], "could not be loaded"),
        ("rows.csv", "question,answer\ncafé,1\n".encode("latin-1"), "it is not UTF-8 .*0xe9.*; iconv"),
        ("rows.jsonl", '{"question": "?", "answer": 1}\n{"question"', "could not be loaded .*line 2"),
        ("rows.jsonl", '{"question": "?", "answer": 1}\n"x"', "row 2 is no object with columns"),
        ("rows.csv", "question,answer\nOne, two?,1\n", "row 1 has more cells than the header"),
        ("rows.json", '{"data": [{"question": "?"}]}', "none of the usual names .* columns data"),
    ],
)  # fmt: skip
def test_files_that_are_refused_in_one_sentence(tmp_path, name, content, message):
    with pytest.raises(SystemExit, match=message) as error:
        answers_in(tmp_path, name, content)
    assert "\n" not in str(error.value)


def test_names_that_are_refused_in_one_sentence():
    for name, message in (("", "the name is empty"), ("./nowhere", "no such file or folder")):
        with pytest.raises(SystemExit, match=message):
            load_split(FLAGS, name, None, None, "train", False)


def test_a_configuration_stands_behind_a_colon(tmp_path):
    """Of a folder it is a folder below it; what is there with a colon in its name is itself."""
    assert split_name("allenai/ai2_arc:ARC-Easy") == ("allenai/ai2_arc", "ARC-Easy")
    assert split_name("openai/gsm8k") == ("openai/gsm8k", None)
    (tmp_path / "a:b" / "c").mkdir(parents=True)
    (tmp_path / "a:b" / "c" / "train.jsonl").write_text('{"question": "?", "answer": "5"}')
    assert split_name(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", None)
    name = split_name(f"{tmp_path}/a:b:c")
    assert [q.answer for q in load_split(FLAGS, *name, None, "train", False)] == ["5"]


def test_layout():
    assert lay_out("Which?", ("x", "y")) == "Which?\nA) x\nB) y"
    assert lay_out("Which?", ()) == "Which?"


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

"""`python -m utils.evaluate`: the same numbers as the scripts' own evaluation, pass@k and intervals
by hand, its files."""

import itertools
import json

import pandas as pd
import pytest

from tests.conftest import ROOT
from utils.report import evaluate
from utils.report.evaluate import Args, interval, main, pass_at_k
from utils.world.problems import Problem
from utils.world.tasks import MathTask

ASSETS = ROOT / "assets"


@pytest.mark.parametrize(
    "right, samples, k", [(0, 4, 2), (1, 4, 1), (2, 5, 3), (5, 5, 1), (3, 6, 6)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right, samples, k):
    subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_intervals():
    wilson = (0.490, 0.943)  # from tables
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx(wilson, abs=1e-3)
    assert interval([0.0] * 10)[0] == pytest.approx(0.0) and 0.2 < interval([0.0] * 10)[1] < 0.3
    low, high = interval([0.25, 0.75, 0.5, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.2041 / 2, abs=1e-3)


@pytest.fixture
def run_evaluate(monkeypatch, tmp_path):
    """run_evaluate(**flags): results.csv as a frame by data set and measure, and the lines of
    completions.jsonl."""
    monkeypatch.chdir(tmp_path)

    def run(**flags) -> tuple[dict, list[dict]]:
        main(Args(**{"device": "cpu", "max_new_tokens": 48, "out": tmp_path / "out", **flags}))
        frame = pd.read_csv(tmp_path / "out" / "results.csv")
        rows = {(row["data set"], row["measure"]): row for _, row in frame.iterrows()}
        return rows, [
            json.loads(line)
            for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
        ]

    return run


@pytest.mark.parametrize("task", ["math", "science", "dialogue"])
def test_greedy_measures_are_those_of_the_scripts(run_evaluate, run_main, task):
    model, data = str(ASSETS / f"tiny_{task}"), ASSETS / "data" / f"tiny_{task}"
    there = {"schema": data} if task == "dialogue" else {"dataset": (str(data),)}
    turns = 4 if task == "dialogue" else 1
    rows, lines = run_evaluate(model=model, task=task, eval_size=5, max_turns=turns, **there)
    flags = {"task": task, "model": model, "dataset": str(data), "max_new_tokens": 48}
    flags |= {"max_turns": turns, "eval_size": 5, "updates": 1, "prompts_per_update": 1}
    frame = pd.read_csv(run_main("grpo_baseline", noise="none", **flags) / "metrics.csv")
    keys = ("tcr", "acr", "gcr", "average") if task == "dialogue" else ("accuracy",)
    for key in keys:
        row = rows[data.name if task == "dialogue" else str(data), f"greedy {key}"]
        assert row["value"] == pytest.approx(frame[f"eval/{key}"][0])
        assert row["low"] <= row["value"] <= row["high"] > row["low"]
    assert task == "dialogue" or sum(line["right"] for line in lines) / 5 == row["value"]


def test_samples_several_data_sets_and_slices(run_evaluate, tiny_model, tiny_data):
    names = (str(tiny_data), f"{ASSETS / 'data' / 'tiny_science'}@test[:5]")
    flags = {"samples": 3, "pass_at": (1, 3), "max_new_tokens": 4, "truncated": "grade"}
    rows, lines = run_evaluate(model=str(tiny_model), dataset=names, **flags)
    sampled = {f"accuracy {x}@{k}" for x, k in (("avg", 3), ("pass", 1), ("pass", 3), ("maj", 3))}
    assert {measure for _, measure in rows} == sampled | {"greedy accuracy"}
    assert {name for name, _ in rows} == set(names)
    for name in names:
        once, any_of_three = (rows[name, f"accuracy pass@{k}"]["value"] for k in (1, 3))
        assert once == pytest.approx(rows[name, "accuracy avg@3"]["value"])
        assert once <= any_of_three
    assert len(lines) == (8 + 5) * 4
    assert {line["decoding"] for line in lines} == {"greedy", "sampled"}


@pytest.mark.parametrize(
    "reference, answers, agreed",
    [
        ("0.5", ["50%"] * 4 + ["7"] * 3, 1.0),
        ("0.5", ["7"] * 4 + ["50%"] * 3, 0.0),
        ("30 minutes", ["30 hours"] * 2 + ["30 minutes"] * 3, 1.0),
        ("30 minutes", ["30 hours"] * 3 + ["30 minutes"] * 2, 0.0),
    ],
)
def test_the_majority_keeps_signs_and_units(reference, answers, agreed):
    problem = Problem("q", reference, [])
    episodes = [
        evaluate.Episode(problem, completions=[f"The answer is {x}."], finished=True)
        for x in answers
    ]
    args = Args(samples=len(answers))
    rows = evaluate.sampled_rows("d", MathTask([], [], {}), [problem], episodes, args)
    values = {row["measure"]: row["value"] for row in rows}
    assert values[f"accuracy maj@{len(answers)}"] == agreed


def test_what_is_refused(run_evaluate, tiny_model, tiny_data):
    for flags, message in (
        ({"samples": 2, "pass_at": (4,)}, "--pass-at 4: must be between 1 and --samples"),
        ({"dataset": ("./nowhere",)}, "--dataset ./nowhere: no such file or folder"),
        ({"prompt_template": "x"}, "must contain"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_evaluate(**{"model": str(tiny_model), "dataset": (str(tiny_data),), **flags})


def test_an_answer_that_was_cut_off_is_wrong_unless_the_flag_says_otherwise():
    cut = evaluate.Episode(None, completions=["#### 1"], finished=False)
    assert evaluate.judged(cut, Args()) == [""]
    assert evaluate.judged(cut, Args(truncated="grade")) == ["#### 1"]

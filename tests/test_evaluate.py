"""`python -m utils.evaluate`: the same numbers as the scripts' own evaluation, pass@k and intervals
by hand, its files."""

import itertools
import json

import pandas as pd
import pytest

from tests.conftest import ROOT
from utils.report import evaluate
from utils.report.evaluate import Args, interval, main, pass_at_k

ASSETS = ROOT / "assets"


@pytest.mark.parametrize(
    "right, samples, k", [(0, 4, 2), (1, 4, 1), (2, 5, 3), (5, 5, 1), (3, 6, 6)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right, samples, k):
    subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_intervals():
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx(
        (0.490, 0.943), abs=1e-3
    )  # Wilson, from tables
    assert interval([0.0] * 10)[0] == pytest.approx(0.0) and 0.2 < interval([0.0] * 10)[1] < 0.3
    low, high = interval([0.25, 0.75, 0.5, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(
        2 * 1.96 * 0.2041 / 2, abs=1e-3
    )


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


@pytest.mark.parametrize("task", ["math", "science"])
def test_greedy_accuracy_is_that_of_the_scripts(run_evaluate, run_main, task):
    model, data = str(ASSETS / f"tiny_{task}"), str(ASSETS / "data" / f"tiny_{task}")
    rows, lines = run_evaluate(model=model, task=task, dataset=(data,), limit=24)
    folder = run_main(
        "grpo_baseline",
        model=model,
        task=task,
        dataset=data,
        eval_size=24,
        max_new_tokens=48,
        updates=1,
    )
    expected = pd.read_csv(folder / "metrics.csv")["eval/accuracy"][0]
    row = rows[data, "greedy accuracy"]
    assert (
        row["value"] == pytest.approx(expected)
        and row["low"] < expected < row["high"]
        and row["problems"] == 24
    )
    assert sum(line["right"] for line in lines) / 24 == pytest.approx(expected)


def test_dialogues_are_measured_as_in_the_scripts(run_evaluate, run_main, dialogue_flags):
    folder = run_main(
        "vrpo_dialogue",
        **dialogue_flags | {"eval_size": 24, "max_turns": 12, "max_new_tokens": 48, "updates": 1},
    )
    expected = pd.read_csv(folder / "metrics.csv").iloc[0]
    rows, _ = run_evaluate(
        task="dialogue", model=dialogue_flags["model"], schema=dialogue_flags["schema"], limit=24
    )
    for key in ("tcr", "acr", "gcr", "average"):
        assert rows["tiny_dialogue", f"greedy {key}"]["value"] == pytest.approx(
            expected[f"eval/{key}"]
        )


def test_samples_several_data_sets_and_slices(run_evaluate, tiny_model, tiny_data):
    names = (str(tiny_data), f"{ASSETS / 'data' / 'tiny_science'}@test[:5]")
    rows, lines = run_evaluate(
        model=str(tiny_model),
        dataset=names,
        samples=3,
        pass_at=(1, 3),
        max_new_tokens=4,
        truncated="grade",
    )
    assert {measure for _, measure in rows} == {
        "greedy accuracy",
        "accuracy avg@3",
        "accuracy pass@1",
        "accuracy pass@3",
        "accuracy maj@3",
    }
    assert {name for name, _ in rows} == set(names)
    for name in names:
        assert rows[name, "accuracy pass@1"]["value"] == pytest.approx(
            rows[name, "accuracy avg@3"]["value"]
        )
        assert rows[name, "accuracy pass@3"]["value"] >= rows[name, "accuracy pass@1"]["value"]
    assert len(lines) == (8 + 5) * 4 and {line["decoding"] for line in lines} == {
        "greedy",
        "sampled",
    }


def test_what_is_refused(run_evaluate, tiny_model, tiny_data):
    for flags, message in (
        ({"samples": 2, "pass_at": (4,)}, "--pass-at 4: must be between 1 and --samples"),
        ({"dataset": ("./nowhere",)}, "--dataset ./nowhere: no such file or folder"),
        ({"prompt_template": "x"}, "must contain"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_evaluate(**{"model": str(tiny_model), "dataset": (str(tiny_data),), **flags})


def test_an_answer_that_was_cut_off_is_wrong_unless_told_otherwise():
    cut = evaluate.Episode(None, completions=["#### 1"], finished=False)
    assert evaluate.judged(cut, Args()) == [""] and evaluate.judged(
        cut, Args(truncated="grade")
    ) == ["#### 1"]

"""The science task, votes on questions without labels, and the embedded world."""

import json
import random

import pandas as pd
import pytest

import vrpo_math
from assets.make import tiny_science as maker
from tests.conftest import ROOT, read_samples
from utils.args import DEFAULTS, parse_args
from utils.world.answers import LETTERS
from utils.world.data import lay_out
from utils.world.problems import Problem
from utils.world.tasks import MathTask, ScienceTask

DATA = ROOT / "assets" / "data" / "tiny_science"
EMBEDDED = {"task": "science", "model": str(ROOT / "assets" / "tiny_science")}
EMBEDDED |= {"dataset": str(DATA), "max_new_tokens": 64}
ANIMAL = Problem("Which?", "B", [], ("gills", "lungs", "skin"))
SHORT = Problem("What?", "melted rock", [])


def test_grades():
    task = ScienceTask([], [], {})
    said = {"#### B": "B", "The answer is (C).": "C", "lungs": "B", "no idea": ""}
    for text, letter in said.items():
        assert task.final_answer(ANIMAL, text) == letter
        for any_task in (task, MathTask([], [], {})):  # options are options in any of them
            assert any_task.grade(ANIMAL, [text]) == (letter == "B")
    assert task.grade(SHORT, ["granite\n#### the melted rock"]) == 1.0
    assert task.grade(SHORT, ["#### rock"]) == 0.0
    assert task.final_answer(SHORT, "The answer is 1,000.") == "1000"


def test_a_run(run_main):
    """Letters and short answers are graded in training and evaluation."""
    flags = EMBEDDED | {"updates": 1, "prompts_per_update": 2, "epochs": 1}
    folder = run_main("ppo_baseline", **flags, eval_size=12)
    frame = pd.read_csv(folder / "metrics.csv")
    samples = read_samples(folder)
    assert 0 < frame["eval/accuracy"][0] < 1 and any("A) " in s["question"] for s in samples)
    assert any("A) " not in s["question"] and s["reference"] not in LETTERS for s in samples)
    right = [s["right"] for s in samples if s["update"] == 0]
    assert sum(right) / len(right) == pytest.approx(frame["eval/accuracy"][0])


def test_defaults_go_with_the_task(monkeypatch):
    monkeypatch.setattr("sys.argv", ["vrpo_math.py", "--task", "science", "--updates", "3"])
    monkeypatch.setattr("utils.args.begin", lambda: None)  # handlers of signals, for good
    args = parse_args(vrpo_math.Args, "")
    assert vars(args) == vars(
        vrpo_math.Args(**{**DEFAULTS["science"], "updates": 3, "task": "science"})
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_majority_votes_on_questions_with_and_without_labels(run_main, tmp_path, capsys, labelled):
    """Without labels there is no clean reward to report, with options and without, and the run
    trains all the same."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:12]]
    if not labelled:
        rows = [{key: value for key, value in row.items() if key != "answerKey"} for row in rows]
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text((DATA / "test.jsonl").read_text())
    flags = EMBEDDED | {"dataset": str(folder), "noise": "majority-vote", "vote_samples": 2}
    flags |= {"choices_column": "choices", "updates": 1, "eval_size": 1, "epochs": 1}
    frame = pd.read_csv(run_main("vrpo_math", **flags) / "metrics.csv")
    assert frame["eval/accuracy"].notna().all() and frame["reward/observed"][1:].notna().all()
    said = capsys.readouterr().out.replace("\n", " ")
    assert ("label accuracy" in said) == labelled and ("no references" in said) != labelled
    assert ("reward/clean" in frame and frame["reward/clean"][1:].notna().all()) == labelled
    if not labelled:
        with pytest.raises(SystemExit, match="--answer-column: none of the usual names"):
            run_main("vrpo_math", **flags | {"noise": "none", "run_name": "refused"})


def test_the_embedded_world_is_consistent():
    """Exactly one option is right, the checker accepts the right answer, and the pupil often gives
    another."""
    rng = random.Random(0)
    for _ in range(1500):
        question = maker.make_question(rng)
        _, answer = question.solve(maker.no_errors)
        text = maker.write_up(question, maker.no_errors)
        if question.options:
            assert question.options.count(answer) == 1 and len(question.options) <= 4
            answer = LETTERS[question.options.index(answer)]
        problem = Problem("q", answer, [], tuple(question.options))
        assert ScienceTask([], [], {}).grade(problem, [text]) == 1.0
        assert lay_out(question.text, question.options).startswith(question.text)
    misled = 0
    for _ in range(1500):
        question = maker.make_question(rng)
        wrong = maker.write_up(question, lambda _: True)
        misled += wrong != maker.write_up(question, maker.no_errors)
    assert misled > 600


def test_hand_checked_facts():
    animals = maker.TOPICS[0]
    assert animals.kind("whale") == "mammal"
    assert maker.believed(animals, "whale", lambda _: True) == "fish"
    for topic in maker.TOPICS:
        things, kinds = topic.things(), set(topic.kinds)
        assert set(topic.mistaken) <= set(things) and set(topic.mistaken.values()) <= kinds
        assert all(topic.kind(thing) != wrong for thing, wrong in topic.mistaken.items())
        assert len(things) == len(set(things))
        for fact in topic.facts:
            assert set(fact.values) <= kinds and set(fact.mistaken) <= set(fact.values)
            assert all(fact.values[kind] != wrong for kind, wrong in fact.mistaken.items())


def test_the_pupil_never_sees_a_test_question():
    lines = (DATA / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    asked = {(row["question"], tuple(sorted(row["choices"]["text"]))) for row in rows}
    seen = set()
    for question, _ in maker.pupil_examples(4000, seed=3):
        first, *options = question.split("\n")
        seen.add((first, tuple(sorted(option[3:] for option in options))))
    assert asked and not asked & seen


def test_the_data_are_made_again(tmp_path):
    maker.make_data(tmp_path, 200, 20, seed=1)
    again = (tmp_path / "train.jsonl").read_text().splitlines()
    assert again == (DATA / "train.jsonl").read_text().splitlines()[:200]

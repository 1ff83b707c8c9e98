"""The world of long answers: its problems, its steps, its model."""

import json
import random

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.make import tiny_long as maker
from assets.make import tiny_math as short
from tests.conftest import ROOT
from utils.world.problems import Problem
from utils.world.tasks import LongTask, right_steps

DATA = ROOT / "assets" / "data" / "tiny_long"
SOLUTION = "10+5=15\n15*2=30\n30-4=26\n26/2=13\n#### 13"


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def test_data():
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (4096, 512)
    assert not {r["answer"] for r in train} & {r["answer"] for r in test}
    steps = [r["answer"].count("\n") for r in [*train, *test]]
    assert set(steps) == {4, 5, 6, 7, 8}
    for row in [*train, *test]:
        assert right_steps(row["answer"], row["answer"]) == 1
        final = row["answer"].split()[-1]
        assert row["answer"].endswith(f"={final}\n#### {final}")


def test_committed_data_is_what_the_maker_writes(tmp_path):
    maker.main(maker.Args(out=tmp_path, only_data=True))
    for split in ("train", "test"):
        written = (tmp_path / f"{split}.jsonl").read_bytes()
        assert written == (DATA / f"{split}.jsonl").read_bytes()


def test_longer_problems_have_no_more_traps():
    """Only easy steps are added, so that the chance of a right answer hardly falls."""
    rng = random.Random(0)
    for easy in ((0, 0), (2, 5), (13, 13)):
        kinds = [[s.kind for s in maker.make_problem(rng, easy)[1]] for _ in range(300)]
        traps = [sum(k in ("half", "double", "distract") for k in some) for some in kinds]
        assert set(traps) == {2, 3}
        assert {len(some) - n for some, n in zip(kinds, traps, strict=True)} == set(
            range(easy[0], easy[1] + 1)
        )


@pytest.mark.parametrize(
    ("said", "share"),
    [
        (SOLUTION, 1),
        ("10+5=15\n15+2=17\n17-4=13\n13/2=6\n#### 6", 0.5),  # a wrong step, and a slip
        ("10+5=16\n16*2=32\n32-4=28\n28/2=14\n#### 14", 0.75),  # a slip, carried on rightly
        ("11+5=16\n16*2=32\n32-4=28\n28/2=14\n#### 14", 0.75),  # a number that nobody had
        ("10+5=15\n30-4=26\n26/2=13\n#### 13", 0.25),  # a step left out: the rest is out of place
        ("10+5=15\n15*2=30", 0.5),
        (SOLUTION.replace("\n####", "\n13+0=13\n####"), 1),  # what comes behind costs nothing here
        ("13", 0),
        ("", 0),
        ("10+5=15\n15/0=0\n30-4=26", 0.25),
    ],
)
def test_right_steps(said, share):
    assert right_steps(said, SOLUTION) == share


def test_the_task_measures_steps_beside_answers():
    problem, other = (Problem(key, SOLUTION, [1]) for key in "ab")
    task = LongTask([problem], [problem], {})
    found = task.measure([(problem, [SOLUTION]), (other, ["10+5=15\n#### 15"])])
    assert found == {"accuracy": 0.5, "right_steps": 0.625}
    prose = Problem("c", "It is 4. #### 4", [1])
    assert str(task.measure([(prose, ["4"])])["right_steps"]) == "nan"


def test_a_run_logs_right_steps(run_main):
    where = {"model": str(ROOT / "assets" / "tiny_long"), "dataset": str(DATA)}
    small = {"updates": 1, "epochs": 1, "prompts_per_update": 2, "max_new_tokens": 80}
    folder = run_main("grpo_baseline", task="long", **where, **small)
    table = pd.read_csv(folder / "metrics.csv")
    assert table["eval/right_steps"].between(0.1, 1).all()
    assert 0.1 < table["sampled/right_steps"].iloc[-1] <= 1


def test_the_model_has_a_long_way_to_go():
    folder = ROOT / "assets" / "tiny_long"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 1e6 <= model.num_parameters() <= 2e6
    assert 0.03 <= short.accuracy(model, tokenizer, rows("test")[:64], None, 80) < 0.5

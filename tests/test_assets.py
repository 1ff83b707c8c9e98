"""The embedded data and model, and their maker."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.make import tiny_dialogue, tiny_long
from assets.make import tiny_math as maker
from tests.conftest import ROOT
from utils.dialogue import reward_model
from utils.dialogue.goals import UNSEEN
from utils.dialogue.task import DialogueTask
from utils.models import load_policy
from utils.world.answers import is_correct

DATA = ROOT / "assets" / "data" / "tiny_math"


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def test_data():
    train, test = rows("train"), rows("test")
    assert len(train) >= 2000 and len(test) >= 512
    assert not {r["question"] for r in train} & {r["question"] for r in test}
    solutions = [{r["answer"] for r in some} for some in (train, test)]
    assert not solutions[0] & solutions[1]  # not even a solution is shared
    steps = [r["answer"].count("\n") for r in train]
    assert set(steps) == {1, 2, 3, 4}
    for row in [*train, *test]:
        lines = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\n", row["answer"])
        assert row["answer"].endswith(f"#### {lines[-1][3]}")
        for a, op, b, c in lines:
            assert maker.calculate(int(a), op, int(b)) == int(c)
            assert op != "/" or int(a) % int(b) == 0


def test_solutions_follow_from_hand_checked_steps():
    steps = [
        maker.Step("each", 3, "*", 4, (3, "+", 4)),
        maker.Step("half", "#0", "/", 2, ("#0", "-", 2)),
        maker.Step("together", "#0", "+", "#1", None),
    ]
    assert maker.write_up(maker.work(steps)) == "3*4=12\n12/2=6\n12+6=18\n#### 18"
    always = type("", (), {"random": lambda self: 0.0})()
    assert maker.write_up(maker.work(steps, always)) == "3+4=7\n7-2=5\n#### 5"


def test_the_careless_student_never_sees_a_test_problem():
    test = {r["answer"] for r in rows("test")}
    rng = random.Random(0)
    problems = [maker.make_problem(rng) for _ in range(3000)]
    solutions = [maker.write_up(maker.work(steps)) for _, steps in problems]
    assert all(maker.is_test(s) for s in test) and any(maker.is_test(s) for s in solutions)
    questions = {q for q, _ in maker.careless_examples(2000, seed=3)}
    assert not questions & {r["question"] for r in rows("test")}


def test_model_size_and_accuracy():
    folder = ROOT / "assets" / "tiny_math"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 1e6 <= model.num_parameters() <= 3e6
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6.5e6
    assert tokenizer.is_fast and tokenizer.chat_template
    assert 0.30 <= maker.accuracy(model, tokenizer, rows("test")[:96]) <= 0.50
    for text in ("Zażółć 12 + 3 = 15?\n", "#### -7"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


SMALL = {"batch_size": 2, "hidden_size": 32, "layers": 1}
MATH = SMALL | {"steps": 3, "train_size": 50, "test_size": 10}
LONG = {"batch_size": 2, "steps": 2, "train_size": 20, "test_size": 4}
MADE = [(maker, MATH), (tiny_dialogue, SMALL | {"steps": 2}), (tiny_long, LONG)]


@pytest.mark.parametrize("made", MADE)
def test_a_maker_is_deterministic(tmp_path, monkeypatch, made):
    module, flags = made
    monkeypatch.chdir(ROOT)
    digests = []
    for name in ("a", "b"):
        module.main(module.Args(out=tmp_path / name, **flags))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
    assert digests[0] == digests[1] and len(digests[0]) >= 4


def test_committed_data_is_what_the_maker_writes(tmp_path):
    args = maker.Args()
    maker.make_data(tmp_path, args.train_size, args.test_size, args.seed)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / f"{split}.jsonl").read_bytes()
    assert is_correct(rows("test")[0]["answer"], rows("test")[0]["answer"])


def test_the_embedded_assistant_starts_at_a_middling_level(monkeypatch):
    """And makes its mistakes out of habit: most are repeated by greedy decoding."""
    monkeypatch.chdir(ROOT)
    policy, chat = load_policy("assets/tiny_dialogue", torch.device("cpu"))
    task = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    problems = [p for p in task.test if p.answer.group != UNSEEN][:40]
    greedy = reward_model.Args(temperature=0.0)
    turns = reward_model.sample_dialogues(policy, chat, task, problems, greedy)
    assert 0.40 <= task.measure(list(zip(problems, turns, strict=True)))["tcr"] <= 0.60
    folder = ROOT / "assets" / "tiny_dialogue"
    assert 1e6 <= policy.num_parameters() <= 3e6
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6.5e6


def test_the_page_states_the_accuracy_of_the_embedded_reward_model():
    report = json.loads((ROOT / "assets" / "tiny_reward" / "training.json").read_text())
    accuracy = report["held_out"]["model_against_truth"]
    assert 0.65 <= accuracy <= 0.79
    text = " ".join((ROOT / "docs" / "tasks.md").read_text().split())
    assert f"**{accuracy:.0%}** of the pairs".replace("%", " %") in text
    given = vars(reward_model.Args()).items()  # made with no other flags than the defaults
    defaults = {k: str(v) if isinstance(v, Path) else v for k, v in given}
    assert report["flags"] | {"device": "auto"} == defaults

"""The supervised start of a pre-trained model, and the worked answers that it learns from."""

import json

import pytest
import torch

from benchmark.studies import equations, paired, supervised
from utils.dialogue.user import outcome
from utils.generation import generate
from utils.models import load_policy
from utils.world.tasks import load_task

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("question", "answer", "worked"),
    [
        ("Seven red apples and 2 green ones. How many?", "9", "7 + 2 = 9"),
        ("He eats 2 of twelve. How many are left?", "10", "12 - 2 = 10"),
        ("27 sweets, shared by 9. How many each?", "3", "27 / 9 = 3"),
        ("1.5 litres a day for 4 days?", "6", "1.5 * 4 = 6"),
        ("Two and 2?", "4", None),  # a sum or a product
        ("3 and 5 and 1?", "9", None),
        ("3 and 5?", "9", None),
        ("90 and 20?", "110", None),  # too large
        ("0 bags of 4?", "0", None),  # 0 * 4 and 0 / 4
        ("7 of 0?", "7", None),  # 7 + 0 and 7 - 0
    ],
)
def test_equations_by_hand(question, answer, worked):
    assert equations.equation(question, answer, 100) == worked


def test_splits(tmp_path):
    rows = [{"question": f"{i} and {i + 20}?", "answer": str(2 * i + 20)} for i in range(1, 41)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 2 * rows))
    equations.main(equations.Args((f"{tmp_path / 'all.jsonl'}",), tmp_path, test=5))
    found = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }
    assert [row["question"] for row in found["test"]] == [
        f"{i} and {i + 20}?" for i in (1, 9, 17, 25, 33)
    ]
    with pytest.raises(SystemExit, match="--test 40: of such problems there are 40"):
        equations.main(equations.Args((str(tmp_path / "all.jsonl"),), tmp_path, test=40))
    assert len(found["train"]) == 35 and found["train"][0]["answer"] == "2 + 22 = 24"


def args(tmp_path, **flags) -> supervised.Args:
    flags = {"model": "assets/tiny_math"} | flags
    return supervised.Args(out=tmp_path / "start", device="cpu", **flags)


def test_own_answers(tmp_path):
    """A solution as it stands, the option with its letter, a dialogue that reaches the goal."""
    a = args(tmp_path, train_split="train[:8]")
    _, chat = load_policy(a.model, CPU)
    problem = load_task(a, chat).train[0]
    episode = supervised.answered(problem, chat, a)
    assert episode.completions == [problem.answer] and episode.finished
    a = args(tmp_path, task="science", train_split="train[:8]")
    task = load_task(a, chat)
    problem = next(p for p in task.train if p.options)
    episode = supervised.answered(problem, chat, a)
    assert episode.completions[0][:2] == f"{problem.answer})"
    assert task.grade(problem, episode.completions) == 1
    a = args(tmp_path, task="dialogue")
    _, chat = load_policy("assets/tiny_dialogue", CPU)
    for problem in load_task(a, chat).train[:5]:
        episode = supervised.answered(problem, chat, a)
        assert outcome(problem.answer, episode.completions, a.seed).gcr == 1
        assert 0 < sum(episode.chosen) < len(episode.tokens)  # the user has had words between


def test_a_start_learns_and_is_saved(tmp_path):
    """Four answers, learnt by heart, are what the saved model says."""
    a = args(tmp_path, train_split="train[:4]", epochs=16, batch_size=4)
    a.learning_rate, a.max_prompt_tokens = 3e-3, 60
    supervised.main(a)
    policy, chat = load_policy(str(a.out), CPU)
    problems = load_task(a, chat).train
    said = generate(policy, chat, [p.prompt_ids for p in problems], 48, 0.0)
    right = [
        chat.decode(answer.tokens) == p.answer for answer, p in zip(said, problems, strict=True)
    ]
    assert sum(right) >= 3


def test_paired_by_hand(tmp_path, capsys):
    """Of four problems one is won: differences 1 0 0 0, standard deviation 0.5. The same
    against another run's last; that one has lost two since its first."""
    for run, updates in {"a": {0: "0011", 8: "1011"}, "b": {8: "0011", 4: "1111"}}.items():
        (tmp_path / run).mkdir()
        rows = [
            {"update": update, "question": str(i), "right": float(right)}
            for update, all_right in updates.items()
            for i, right in enumerate(all_right)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / run / "samples.jsonl").write_text(text)
    paired.main(paired.Args((tmp_path / "a",)))
    paired.main(paired.Args((tmp_path / "a", tmp_path / "b")))
    paired.main(paired.Args((tmp_path / "b",)))
    gained, against, lost = capsys.readouterr().out.splitlines()
    assert gained == against == "+0.250 (95 % over problems: -0.240 to +0.740)"
    assert lost == "-0.500 (95 % over problems: -1.066 to +0.066)"
    with pytest.raises(SystemExit, match="give one run, or two"):
        paired.main(paired.Args(()))

"""The reward model: its loss by hand, training on a toy set, scoring, and the way its scores become
rewards."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import vrpo_dialogue
from tests.conftest import ROOT
from utils.chat import conversation_ids
from utils.dialogue.reward_model import (
    Args,
    RewardModel,
    accuracy,
    bradley_terry_loss,
    load_reward_model,
    main,
    on_reward_scale,
    train,
)
from utils.dialogue.task import DialogueTask

CPU = torch.device("cpu")


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def model(tiny_model) -> RewardModel:
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return RewardModel(backbone.eval(), tokenizer, 4)


def test_bradley_terry_loss_by_hand():
    loss = bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_scores_do_not_depend_on_the_batch(model):
    talks = [talk("Ann has 3 pens.", "3"), talk("x", "y " * 40), talk("a", "b", "c", "d")]
    together = model.score(talks)
    model.batch_size = 1
    assert together == pytest.approx(model.score(talks), abs=1e-5) and len(set(together)) == 3


@pytest.mark.parametrize("declared", [None, 0, 1])
def test_a_model_without_a_pad_token_is_read_at_its_last_token(model, declared):
    """Also where that is EOS, which would be skipped if it filled the rows; what the configuration
    says is of no account without a token."""
    model.tokenizer.pad_token = None
    model.config.pad_token_id = declared
    model = RewardModel(model.model, model.tokenizer, 4)
    talks = [talk("x", "yes"), talk("How many?", "y " * 40), talk("a", "b", "c", "d")]
    alone = []
    for conversation in talks:
        ids = conversation_ids(model.tokenizer, conversation, to_be_continued=False)
        assert ids[-1] == model.tokenizer.eos_token_id
        hidden = model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        alone.append(model.model.score(hidden).item())
    assert model.score(talks) == pytest.approx(alone, abs=1e-5)
    assert model.config.pad_token_id is None  # so plain transformers reads it alike, once saved


def test_scores_that_are_not_finite_stop_the_run(model):
    model.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(SystemExit, match="--reward-model .*: a score is not finite"):
        model.score([talk("x", "yes")])


def test_training_ranks_a_toy_set_and_noise_is_counted(model):
    """The better answer says yes; a tenth of the labels is wrong."""
    rng, pairs = random.Random(0), []
    for _ in range(96):
        question = f"Ann has {rng.randint(2, 99)} pens."
        pairs.append((talk(question, "yes"), talk(question, "no"), rng.random() > 0.1))
    before = accuracy(model, pairs)
    train(model, pairs, Args(epochs=4, batch_size=16, learning_rate=3e-3))
    after = accuracy(model, pairs)
    assert after["model_against_truth"] == 1.0 > before["model_against_truth"]
    agreed = sum(a for _, _, a in pairs) / len(pairs)
    assert after["annotator_against_truth"] == after["model_against_annotator"] == agreed < 1


def test_scores_of_turns_stand_on_the_right(model):
    task = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    problem = task.train[0]
    said = ["Which city?"], ["Nice.", "Which city?", "Good."]
    episodes = [SimpleNamespace(problem=problem, completions=turns) for turns in said]
    turns, final = (model.score_episodes(task, episodes, per) for per in ("turn", "episode"))
    assert turns.shape == (2, 3) and final.shape == (2, 1)
    assert turns[0].isnan().tolist() == [True, True, False] and not turns[1].isnan().any()
    assert torch.allclose(turns[:, -1:], final, atol=1e-5)
    first = model.score([task.messages(problem, ["Nice."])])[0]
    assert turns[1, 0].item() == pytest.approx(first, abs=1e-5)


def test_scores_on_the_scale_of_rewards_and_what_each_turn_adds():
    raw = torch.tensor([[float("nan"), 1.0], [2.0, 5.0]])
    scores, scale = on_reward_scale(raw, None)
    assert scale == (3.0, 2.0) and scores.tolist() == [[0.0, 0.0], [0.25, 1.0]]
    again, kept = on_reward_scale(raw + 4, scale)
    assert kept == scale and again[:, -1].tolist() == [1.0, 2.0]
    gains = vrpo_dialogue.turn_gains(scores, scores[:, -1])
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    rewards = [[0, 0, 0, 0, 0], [0.25, 0, 0, 0.75, 0]]
    assert vrpo_dialogue.place_rewards(gains, mask).tolist() == rewards
    constant, _ = on_reward_scale(torch.full((3, 1), 2.0), None)
    assert constant.tolist() == [[0.5]] * 3


def test_a_model_that_is_no_reward_model_is_refused(tiny_model, tmp_path):
    with pytest.raises(SystemExit, match="could not be loaded"):
        load_reward_model(str(tmp_path), CPU, 4)
    three = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    three.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="3 outputs"):
        load_reward_model(str(tmp_path), CPU, 4)


def test_the_embedded_reward_model_is_made_by_one_command(tmp_path, monkeypatch, capsys):
    """A short training from the embedded policy: saved, loadable, its accuracy reported."""
    monkeypatch.chdir(ROOT)
    out, short = tmp_path / "reward", {"max_turns": 5, "epochs": 1, "device": "cpu"}
    main(Args(out=out, goals=10, held_out_goals=8, **short))
    text = capsys.readouterr().out
    assert "held-out model against truth" in text and (out / "training.json").exists()
    loaded = load_reward_model(str(out), CPU, 8)
    assert len(loaded.score([talk("calls: A(b)\nHi.", "Which b?")])) == 1

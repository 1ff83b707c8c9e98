"""VinePPO: which states are valued, what of, and what the advantages are, by hand."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
import vine_ppo_baseline as vine
from tests.conftest import ROOT, bare_world
from utils import metrics
from utils.generation import Answer
from utils.tensors import pack
from utils.world.environment import Episode
from utils.world.problems import Problem

# a token is the number of its text; 9 ends an answer
TEXTS = ["q", "1", "2", "3\n", "\n", " \n\n", "#### 5", "#### 6", "<pad>", "<eos>"]
CPU = torch.device("cpu")


CHAT = SimpleNamespace(
    eos_ids=[9], tokenizer=SimpleNamespace(decode=TEXTS.__getitem__),
    decode=lambda tokens: "".join(TEXTS[token] for token in tokens if token != 9),
)  # fmt: skip


def answer(*tokens: int) -> Answer:
    return Answer(list(tokens), *([x] * len(tokens) for x in (-1.0, 0.5, 0.0)))


def episode(problem: Problem, *tokens: int) -> Episode:
    found = Episode(problem)
    found.say(answer(*tokens), CHAT)
    return found


FIRST, SECOND = Problem("first", "5", [0, 3]), Problem("second", "6", [0])
EPISODES = [
    episode(FIRST, 1, 3, 2, 6, 9),  # two lines
    episode(FIRST, 1, 3, 1, 7, 9),  # a first line in common
    episode(SECOND, 1, 3, 4, 5, 2, 7, 3),  # empty lines; ends with a line break, not with EOS
]


def grid() -> dict:
    batch = pack(EPISODES, 8, CPU)
    return batch | {"starts": vine.line_starts(batch, CHAT)}


def test_lines_start_behind_line_breaks():
    """Not behind those of the prompt, empty lines belong to what follows, and behind the last token
    there is no state."""
    assert grid()["starts"].int().tolist() == [
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
    ]


def test_advantages_of_two_lines_by_hand():
    """KL penalties of 0.1, 0.2, 0.3 and 0.4 on four tokens in two lines, reward 1, values 0.5 and
    0.75."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]]).bool()
    starts = torch.tensor([[0, 1, 0, 1, 0, 0]]).bool()
    rewards = torch.tensor([[9.0, -0.1, -0.2, -0.3, 1 - 0.4, 9.0]])
    values = torch.tensor([[9.0, 0.5, 0.5, 0.75, 0.75, 9.0]])
    # second line: 0.6 - 0.75 and 0.3 less; first: 0.75 - 0.5 less 0.2, and less 0.1 more; lambda
    # of the second line's whole advantage, -0.45, comes on top
    for lam in (0.0, 0.5, 1.0):
        first = [0.25 - 0.2 - 0.1 - lam * 0.45, 0.25 - 0.2 - lam * 0.45]
        found = vine.gae(rewards, values, mask, starts, lam)
        assert found.tolist()[0] == pytest.approx([0, *first, -0.45, -0.15, 0], abs=1e-6)


def test_lines_of_one_token_and_lambda_one():
    """Where every token is a line it is PPO's estimate with gamma 1; lambda 1 is the return less
    the value, wherever lines start."""
    torch.manual_seed(0)
    mask = torch.rand(4, 9) < 0.7
    rewards, values = torch.randn(2, 4, 9) * mask
    for lam in (0.0, 0.3, 1.0):
        found = vine.gae(rewards, values, mask, mask, lam)
        assert torch.allclose(found, ppo.gae(rewards, values, mask, 1.0, lam), atol=1e-6)
    starts = mask & (torch.rand(4, 9) < 0.5)
    returns = vine.gae(rewards, values, mask, starts, 1.0) + values
    assert torch.allclose(returns, metrics.discounted_returns(rewards, mask, 1.0), atol=1e-5)


@pytest.fixture
def sampled(monkeypatch):
    """sampled(ends, **flags): values, continuations and what was asked for, where the policy ends
    every state with its next of `ends`, in turn."""

    def sample(ends: list[Answer], **flags):
        asked = []

        def generate(policy, chat, prompts, room, temperature, at_once):
            asked.extend(zip(map(tuple, prompts), room, strict=True))
            return [ends[i % len(ends)] for i in range(len(prompts))]

        monkeypatch.setattr(vine, "generate", generate)
        args = vine.Args(**{"vine_samples": 2, "max_new_tokens": 7, "noise": "none"} | flags)
        env = bare_world(args, CHAT)
        scores = env.grade(EPISODES)
        values, vines = vine.sample_values(None, env, EPISODES, scores, grid(), args, 3)
        return values, vines, asked

    return sample


RIGHT, WRONG, CUT = answer(6, 9), answer(7, 9), answer(6)


def test_every_state_is_sampled_once_and_its_line_has_the_mean(sampled):
    """Right for the first problem and wrong for the second is 5; the prompt and the first line that
    two episodes share are one state each, and an answer that is cut off is wrong."""
    values, vines, asked = sampled([RIGHT, WRONG, RIGHT, CUT, WRONG, WRONG, WRONG, RIGHT])
    states = {(0, 3): 7, (0, 3, 1, 3): 5, (0,): 7, (0, 1, 3): 5}  # what is left of seven tokens
    assert asked == [state for state in states.items() for _ in range(2)]
    assert [v.completions for v in vines[:4]] == [["#### 5"], ["#### 6"]] + [["13\n#### 5"]] * 2
    assert [v.length for v in vines] == [2, 2, 4, 3, 2, 2, 4, 4]
    assert [v.finished for v in vines] == [True] * 3 + [False] + [True] * 4
    assert values.tolist() == [
        [0.5, 0.5, 0.5, 0.5, 0.5, 0, 0],
        [0.5, 0.5, 0.5, 0.5, 0.5, 0, 0],
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5],
    ]
    assert sampled([CUT], truncated="grade")[0][0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_the_observed_mean_has_the_flips_of_many_draws(sampled):
    """K flips of rate p leave p + (1 - 2p) v; the truth asked directly has none."""
    many = {"vine_samples": 1500, "noise": "symmetric", "noise_rate": 0.3}
    observed, _, _ = sampled([RIGHT], **many)
    assert observed[0, 0].item() == pytest.approx(0.7, abs=0.05)
    assert observed[2, 0].item() == pytest.approx(0.3, abs=0.05)
    assert observed[0, 0] != observed[0, 2]  # every state has draws of its own
    clean, _, _ = sampled([RIGHT], **many, vine_judge="clean")
    assert set(clean[:2, :5].flatten().tolist()) == {1.0} and set(clean[2].tolist()) == {0.0}


@pytest.mark.parametrize("noise", ["persistent", "group"])
def test_a_judge_who_is_wrong_about_a_prompt_is_so_about_its_continuations(sampled, noise):
    flags = {"noise": noise, "noise_rate": 0.5}
    seen = set()
    for seed in range(1, 9):
        args = vine.Args(**flags, seed=seed)
        observed = vine.observe(args, torch.tensor([1.0, 0.0, 1.0]), EPISODES, update=3)
        values, _, _ = sampled([RIGHT], **flags, seed=seed)
        assert values[0, 0] == observed[0] and values[2, 0] == 1 - observed[2]
        seen.add((observed[0].item(), observed[2].item()))
    assert len(seen) > 2


def test_flips_of_continuations_are_not_those_of_episodes(sampled, monkeypatch):
    keys, coin = [], vine.coin
    monkeypatch.setattr(vine, "coin", lambda *key: keys.append(key) or coin(*key))
    _, vines, _ = sampled([RIGHT], noise="symmetric")
    assert len(set(keys)) == len(keys) == len(EPISODES) + len(vines)


def test_a_run_counts_its_judgements_and_knows_the_steps(run_main):
    """With the truth as a judge the last line's values know more of the outcome than the prompt's;
    states are no more than lines."""
    model = str(ROOT / "assets" / "tiny_math")
    flags = {"model": model, "max_new_tokens": 48, "prompts_per_update": 8, "updates": 1}
    flags |= {"eval_size": 1, "epochs": 1, "micro_batch_size": 4}
    folder = run_main("vine_ppo_baseline", vine_judge="clean", noise_rate=0.3, **flags)
    row = pd.read_csv(folder / "metrics.csv").iloc[1]
    assert row["charts/verifier_calls"] == 16 + 4 * row["vine/states"]
    assert 8 + 8 < row["vine/states"] < 16 * row["vine/lines"]
    assert row["critic/explained_variance_last"] > row["critic/explained_variance_first"] + 0.1
    first = json.loads((folder / "transcripts.jsonl").read_text().splitlines()[0])["tokens"]
    assert len({v for v, own in zip(first["values"], first["chosen"], strict=True) if own}) > 1


def test_what_it_cannot_do_is_refused(run_main, dialogue_flags, tmp_path):
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    rows = [f'{{"question": "What is {i} + 1?"}}\n' for i in range(8)]
    (unlabelled / "train.jsonl").write_text("".join(rows))
    (unlabelled / "test.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    votes = {"dataset": str(unlabelled), "noise": "majority-vote", "vine_judge": "clean"}
    for flags, words in (
        (dialogue_flags, "no --task dialogue"),
        ({"max_turns": 2}, "give --max-turns 1"),
        (votes, "--vine-judge clean: there are problems without a reference answer"),
    ):
        with pytest.raises(SystemExit, match=words):
            run_main("vine_ppo_baseline", **flags)

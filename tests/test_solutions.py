"""What a critic may read of the worked solution, by hand; and the control that imitates it."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
from benchmark.studies import imitation
from utils import tensors
from utils.models import load_policy
from utils.scale import processes
from utils.tensors import pack
from utils.world.environment import Environment
from utils.world.solutions import kept_to_solution, worked

CPU = torch.device("cpu")


class Directions(torch.nn.Module):
    """A decoder whose hidden state is the direction of the last token: token n stands at n times
    ten degrees."""

    def forward(self, input_ids, use_cache):
        angle = torch.deg2rad(10.0 * input_ids)
        return SimpleNamespace(last_hidden_state=7 * torch.stack([angle.cos(), angle.sin()], -1))


def test_by_hand(monkeypatch):
    """The solution of prompt 0 says 1 2 EOS, an answer 1 5 2 EOS: 5 is 30 degrees from 2."""
    chat = SimpleNamespace(
        pad_id=90, eos_ids={90}, decode=str, tokenizer=lambda text, **_: {"input_ids": [1, 2]}
    )
    problem = SimpleNamespace(answer="1 2", prompt_ids=[0])
    answer, right = worked(problem, chat, 9), worked(problem, chat, 9)
    assert worked(problem, chat, 2).tokens == [1, 2]
    assert right.tokens == [1, 2, 90] and right.chosen == [True] * 3
    answer.tokens[1:1] = [5]
    for name in ("chosen", "logprobs", "entropy", "gap"):
        getattr(answer, name).append(getattr(answer, name)[-1])
    episodes = [answer, right]
    batch = pack(episodes, chat.pad_id, CPU)
    reference = SimpleNamespace(get_decoder=Directions)
    args = SimpleNamespace(micro_batch_size=2, max_new_tokens=9)
    off = torch.deg2rad(torch.tensor(30.0)).cos().item() ** 20
    # states: after 0, 1, 5, 2. Once off the path it stays off; padding counts nothing
    wanted = torch.tensor([[1, 1, off, off], [1, 1, 1, 0]])
    found = kept_to_solution(reference, chat, episodes, batch, args)
    assert torch.allclose(found, wanted, atol=1e-5)
    args.micro_batch_size = 1
    assert torch.equal(kept_to_solution(reference, chat, episodes, batch, args), found)
    # two processes find a row each
    monkeypatch.setattr(processes, "RANKS", 2)
    monkeypatch.setattr("utils.world.solutions.add_up", lambda *found: None)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "RANK", rank)
        halves.append(kept_to_solution(reference, chat, episodes, batch, args))
    assert torch.equal(halves[0] + halves[1], found) and halves[0].any() and halves[1].any()


@pytest.mark.parametrize("half", [False, True])
def test_a_real_model_keeps_to_its_own_words_exactly(half, tiny_model, tiny_data, monkeypatch):
    """An answer that is the solution has 1 in every state, in both kinds of numbers."""
    monkeypatch.setattr(tensors, "HALF", half)
    args = ppo.Args(model=str(tiny_model), dataset=str(tiny_data))
    policy, chat = load_policy(args.model, CPU)
    problems = Environment(args, chat, CPU).task.train[:3]
    episodes = [worked(problem, chat, 99) for problem in problems]
    assert episodes[0].completions == [problems[0].answer]
    batch = pack(episodes, chat.pad_id, CPU)
    kept = kept_to_solution(policy, chat, episodes, batch, args)
    assert torch.allclose(kept, batch["mask"].float(), atol=1e-4)
    for episode, other in zip(episodes, problems[1:], strict=False):
        episode.problem = other  # what was said to another question
    kept = kept_to_solution(policy, chat, episodes, batch, args)
    assert kept[0].sum() < 0.1 and torch.allclose(kept[2], batch["mask"][2].float(), atol=1e-4)


def test_imitation(run_main, monkeypatch):
    """The solutions' words become likelier before the first update; at a rate of nothing it is
    PPO."""
    for name in imitation.SCRIPT:
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # put back in the end
    plain = pd.read_csv(run_main("ppo_baseline", updates=1) / "metrics.csv")
    found, imitate = [], imitation.imitate

    def watch(policy, chat, solutions, *how):
        def nll():
            batch = pack(solutions, chat.pad_id, CPU)
            kl = ppo.kl_penalty(policy, batch | {"logprobs": 0 * batch["logprobs"]}, ppo.Args())
            return kl[batch["mask"]].mean().item()  # 0 less the log-probability

        before = nll()
        imitate(policy, chat, solutions, *how)
        found.append((before, nll()))

    monkeypatch.setattr(imitation, "imitate", watch)
    for rate in (1e-30, 1e-2):
        folder = run_main(
            "benchmark.studies.imitation", run_name=f"at {rate}", updates=1,
            imitation_epochs=2, imitation_learning_rate=rate,
        )  # fmt: skip
        same = pd.read_csv(folder / "metrics.csv")["losses/total"][1] == plain["losses/total"][1]
        assert same == (rate < 1e-9)
    (before, none), (again, after) = found
    assert before == none == again and after < before - 0.1

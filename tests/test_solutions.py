"""What a critic reads of the worked solution, by hand; and the control that imitates it."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
import vrpo_math as vrpo
from benchmark.studies import imitation
from utils import ranks
from utils.args import check_flags
from utils.models import load_policy
from utils.report.values import KeptCritic
from utils.tensors import pack
from utils.world.environment import Environment
from utils.world.solutions import kept_to_solution, with_reading, worked

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
    episode, right = worked(problem, chat, 9), worked(problem, chat, 9)
    assert worked(problem, chat, 2).tokens == [0, 1, 2]
    assert right.tokens == [0, 1, 2, 90] and right.chosen == [False, True, True, True]
    episode.tokens[1:] = [1, 5, 2, 90]
    for name in ("chosen", "logprobs", "entropy", "gap"):
        getattr(episode, name).append(getattr(episode, name)[-1])
    batch = pack([episode, right], chat.pad_id, CPU)
    reference = SimpleNamespace(get_decoder=Directions)
    args = SimpleNamespace(micro_batch_size=2, max_new_tokens=9)
    off = torch.deg2rad(torch.tensor(30.0)).cos().item() ** 20
    # states: after 0, 1, 5, 2. Once off the path it stays off; padding counts nothing
    wanted = torch.tensor([[1, 1, off, off], [1, 1, 1, 0]])
    found = kept_to_solution(reference, chat, [episode, right], batch, args)
    assert torch.allclose(found, wanted, atol=1e-5)
    args.micro_batch_size = 1
    assert torch.equal(kept_to_solution(reference, chat, [episode, right], batch, args), found)
    # two processes find a row each
    monkeypatch.setattr(ranks, "RANKS", 2)
    monkeypatch.setattr(ranks, "add_up", lambda *found: None)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "RANK", rank)
        halves.append(kept_to_solution(reference, chat, [episode, right], batch, args))
    assert torch.equal(halves[0] + halves[1], found) and halves[0].any() and halves[1].any()

    features = torch.randn(7, 9)
    part = {"mask": batch["mask"], "kept": found}
    beside = with_reading(features, part)
    assert torch.equal(beside[:, :9], features)
    assert torch.allclose(beside[:, 9], 3 * found[batch["mask"]])
    assert with_reading(features, {"mask": batch["mask"]}) is features


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_real_model_keeps_to_its_own_words_exactly(bfloat16, tiny_model, tiny_data):
    """An answer that is the solution has 1 in every state, in both kinds of numbers."""
    args = vrpo.Args(model=str(tiny_model), dataset=str(tiny_data))
    policy, chat = load_policy(args.model, CPU)
    problems = Environment(args, chat, CPU).task.train[:3]
    episodes = [worked(problem, chat, 99) for problem in problems]
    assert episodes[0].completions == [problems[0].answer]
    batch = pack(episodes, chat.pad_id, CPU)
    with torch.autocast("cpu", torch.bfloat16, bfloat16):
        kept = kept_to_solution(policy, chat, episodes, batch, args)
    assert torch.allclose(kept, batch["mask"].float(), atol=1e-4)
    wrong = [worked(problem, chat, 99) for problem in problems]
    for episode, other in zip(wrong, problems[1:], strict=False):
        episode.problem = other  # what was said to another question
    with torch.autocast("cpu", torch.bfloat16, bfloat16):
        kept = kept_to_solution(policy, chat, wrong, batch, args)
    assert kept[0].sum() < 0.1 and torch.allclose(kept[2], batch["mask"][2].float(), atol=1e-4)


@pytest.mark.parametrize("layers", [0, 1])
def test_it_learns_from_rewards_and_goes_on_after_a_stop(layers, run_main):
    flags = {"critic_reads": "solution", "bottleneck_layers": layers, "gae_lambda": 0.5}
    whole = run_main("vrpo_math", run_name="whole", updates=3, **flags)
    part = run_main("vrpo_math", run_name="part", updates=2, **flags)
    run_main("vrpo_math", resume=part, updates=3, **flags)
    one, two = (pd.read_csv(folder / "metrics.csv") for folder in (whole, part))
    for key in ("losses/total", "critic/value_mean", "losses/grad_norm_head"):
        assert one[key].tolist() == pytest.approx(two[key].tolist(), abs=0, nan_ok=True)
    with pytest.raises(SystemExit, match="reads worked solutions, which this command does not"):
        KeptCritic(whole / "checkpoints" / "000003" / "critic", CPU)


@pytest.mark.parametrize("flags", [{"task": "science"}, {"noise": "majority-vote"}])
def test_refused_without_worked_solutions(flags):
    with pytest.raises(SystemExit, match="only --task math has worked solutions"):
        check_flags(vrpo.Args(critic_reads="solution", **flags))


def test_imitation(run_main, monkeypatch):
    """The solutions' words become likelier before the first update; at a rate of nothing it is PPO."""
    for name in ("load_policy", "Environment"):
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # put back in the end
    plain = pd.read_csv(run_main("ppo_baseline", updates=1) / "metrics.csv")
    found, imitate = [], imitation.imitate

    def watch(policy, chat, solutions, *how):
        def nll():
            batch = pack(solutions, chat.pad_id, CPU)
            args = SimpleNamespace(micro_batch_size=8, temperature=1.0)
            return -ppo.reference_logprobs(policy, batch, args)[batch["mask"]].mean().item()

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

"""The oracle in the critic's place, by hand and against PPO."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
from benchmark.studies import oracle


def test_what_it_says_of_a_beginning():
    assert oracle.value("", "1+1=2") == 0.45
    assert oracle.value("1+1=2", "1+1=2") == pytest.approx(0.97)
    assert oracle.value("1+", "1+1=2") == pytest.approx(0.45 + 0.52 * 0.4**2)
    assert oracle.value("1-", "1+1=2") == 0.05
    assert oracle.value("1-", "1+1=2", knows="nothing") == 0.45


def test_values_stand_before_the_tokens_that_the_policy_chose(monkeypatch):
    """On the scale of what is observed: at 30 % flips 0.3 + 0.4 V."""
    monkeypatch.setattr(oracle, "solutions", lambda dataset: {"q": "ab"})
    chat = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    problem = SimpleNamespace(key="q")
    episode = SimpleNamespace(
        problem=problem, tokens=list(map(ord, "axub")), chosen=[True, True, False, True]
    )
    args = oracle.Args(noise="symmetric", noise_rate=0.3)
    first, second, third = (0.3 + 0.4 * v for v in (0.45, 0.45 + 0.52 / 4, 0.05))
    observed = [first, second, 0.0, third]
    assert oracle.oracle(args, episode, chat) == pytest.approx(observed)
    args.oracle_error = 0.1
    errs = oracle.oracle(args, episode, chat)
    assert errs != pytest.approx(observed) and errs == oracle.oracle(args, episode, chat)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_a_share_it_is_ppo(share, run_main, monkeypatch):
    """Every metric of PPO's, to the last bit; with one, other advantages from the same critic."""
    plain = pd.read_csv(run_main("ppo_baseline", updates=1) / "metrics.csv")
    for name in oracle.SEAMS:
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # put back in the end
    folder = run_main("benchmark.studies.oracle", updates=1, oracle_share=share)
    mixed = pd.read_csv(folder / "metrics.csv")
    for key in plain.columns:
        if not key.startswith(("time/", "charts/tokens", "charts/peak")):
            same = mixed[key].tolist() == pytest.approx(plain[key].tolist(), abs=0, nan_ok=True)
            assert same or share > 0, key
    assert (mixed["critic/value_mean"][1] == plain["critic/value_mean"][1]) == (share == 0)


def test_a_critic_that_knows_the_mean_alone(run_main, monkeypatch):
    """Of two answers one is right: half a point each, less by lambda for every token before."""
    for name in oracle.SEAMS:
        monkeypatch.setattr(ppo, name, getattr(ppo, name))
    run_main("benchmark.studies.oracle", updates=1, oracle_knows="mean")
    learned, mask = torch.rand(2, 2), torch.ones(2, 2, dtype=torch.bool)
    batch = {"values": learned, "learned": learned, "mask": mask}
    args = oracle.Args(oracle_knows="mean", gae_lambda=0.5, critic_lambda=1.0)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    advantages, targets = ppo.advantages_and_targets(rewards, batch, args)
    assert torch.equal(advantages, torch.tensor([[0.25, 0.5], [-0.25, -0.5]]))
    assert torch.allclose(targets["returns"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))

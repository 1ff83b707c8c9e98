"""The arithmetic behind the benchmark of speed, and what it needs of the scripts."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark" / "speed"))
import throughput  # noqa: E402


def test_floor_of_decoding_by_hand():
    """One layer: q and o 4 x 4 each, k and v 4 x 2 each, an MLP of 3 x 24: 120 weights, and a head
    of 40. The prompt of three tokens is read once for both samples, of which the first ends at once
    and the second takes two steps more, alone, with caches of 4 and 5 tokens."""
    config = SimpleNamespace(
        vocab_size=10, hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6, num_hidden_layers=1
    )  # fmt: skip
    never = float("inf")
    flops = throughput.decoding_floor(
        config, [1, 3], [3, 3], 2, {"float32": 1.0, "bytes": never}, "float32"
    )
    assert flops == pytest.approx(2 * 120 * 3 + 2 * 40 * 2 + 2 * (2 * 160))
    read = throughput.decoding_floor(
        config, [1, 3], [3, 3], 2, {"float32": never, "bytes": 1.0}, "float32"
    )
    assert read == pytest.approx(4 * (160 + 4 * 4) + 4 * (160 + 4 * 5))
    half = throughput.decoding_floor(
        config, [1, 3], [3, 3], 2, {"bfloat16": never, "bytes": 1.0}, "bfloat16"
    )
    assert half == pytest.approx(read / 2)


def test_parts_are_charged_once():
    """Nested calls: the inner part's seconds are not the outer's too."""
    clock, now = throughput.Clock("cpu"), [0.0]
    throughput_time, throughput.time.perf_counter = throughput.time.perf_counter, lambda: now[0]
    try:
        owner = SimpleNamespace(inner=lambda: now.__setitem__(0, now[0] + 2.0))
        clock.wrap(owner, "inner", "inner")
        owner.outer = lambda: (
            now.__setitem__(0, now[0] + 1.0),
            owner.inner(),
            now.__setitem__(0, now[0] + 4.0),
        )
        clock.wrap(owner, "outer", "outer")
        clock.since, clock.flops_since = 0.0, 0
        owner.outer()
    finally:
        throughput.time.perf_counter = throughput_time
    assert dict(clock.seconds) == {"outer": 5.0, "inner": 2.0}


def test_rewards_of_trl_are_those_of_the_script(small_flags):
    """TRL's trainer has tokens alone: as episodes they get what the script's own episodes get."""
    script = importlib.import_module("grpo_baseline")
    args = script.Args(**small_flags, noise="length", noise_rate=0.5)
    policy, chat = script.start_policy(args, torch.device("cpu"))
    env = script.Environment(args, chat, torch.device("cpu"))
    episodes = script.rollout(policy, env, env.problems(3), args, 1.0)
    rewards = script.observe(args, env.grade(episodes), episodes, 3).tolist()
    completions = [e.tokens for e in episodes]
    assert throughput.observed_rewards(script, args, env, completions, 3) == rewards
    assert len(set(rewards)) == 2, "no coin has fallen"


@pytest.mark.parametrize("name", sorted(set(throughput.SCRIPTS.values())))
def test_every_script_has_the_parts_that_are_timed(name, run_main, monkeypatch):
    """A renamed function would be missed."""
    torchs = (
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
    )
    for owner, function in torchs:
        monkeypatch.setattr(owner, function, getattr(owner, function))  # put back afterwards
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    del sys.modules[name]  # so that a copy of it is changed
    clock, turns = throughput.Clock("cpu"), SimpleNamespace()
    clock.since, clock.flops_since = 0.0, 0
    throughput.watch(importlib.import_module(name), clock, turns)
    run_main(name, updates=1)
    nobodys = {"critic"} if name == "grpo_baseline" else set()
    assert set(clock.seconds) == set(throughput.PARTS) - nobodys
    assert len(turns.report["answers"]) == len(turns.report["prompts"]) == 8

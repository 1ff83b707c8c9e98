"""--rollout-engine vllm: with a stand-in for vLLM that decodes as the project does, whose
probabilities can be off; and with vLLM itself where it is installed."""

import importlib.machinery
import math
import sys
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import torch

from ppo_baseline import policy_loss
from tests.test_tensors import Row, pack
from utils.generation import generate
from utils.models import load_policy
from utils.scale.engine import MOST, Engine, start_vllm

CPU = torch.device("cpu")


class StandIn:
    """What is asked of a vllm.LLM, done by a policy of its own; `off` is added to what it says of
    its log-probabilities."""

    off = 0.0

    def __init__(self, model, **options):
        self.policy, self.chat = load_policy(str(model), CPU)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.zero_()  # load_format="dummy"
        self.did = []
        StandIn.last = self

    def collective_rpc(self, method, kwargs):
        self.policy.load_state_dict(dict(kwargs["weights_iterator"]))
        self.did.append(method)

    def reset_prefix_cache(self):
        self.did.append("reset_prefix_cache")

    def generate(self, asked, some, use_tqdm):
        self.did.append("generate")
        prompts = [x["prompt_token_ids"] for x in asked]
        limits = [x.max_tokens for x in some]
        for answer in generate(self.policy, self.chat, prompts, limits, some[0].temperature):
            told = [
                {token: SimpleNamespace(logprob=x + self.off)}
                for token, x in zip(answer.tokens, answer.logprobs, strict=True)
            ]
            yield SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=tuple(answer.tokens), logprobs=told)]
            )


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandIn, "off", 0.0)


def rows(folder):
    return pd.read_csv(folder / "metrics.csv")


@pytest.mark.parametrize("name", ["ppo_baseline", "grpo_baseline"])
def test_a_run_is_that_of_own_decoding_where_the_engine_is(vllm, run_main, monkeypatch, name):
    flags = {"updates": 2, "eval_every": 1, "epochs": 1, "noise": "random"}
    own = rows(run_main(name, run_name="own", **flags))
    assert not [key for key in own if "engine" in key]
    monkeypatch.setattr(StandIn, "off", 0.004)  # every pi_engine is larger by 0.4 %
    found = rows(run_main(name, run_name="engine", rollout_engine="vllm", **flags))
    for key in ("reward/clean", "charts/response_length", "objective/entropy"):
        assert found[key][1:].tolist() == pytest.approx(own[key][1:].tolist(), abs=1e-5)
    # the same, but for the weight of a token
    first = found["losses/policy"][1], own["losses/policy"][1]
    assert first[0] == pytest.approx(first[1] * math.exp(-0.004), abs=1e-6)
    assert found["charts/engine_gap"][1:].tolist() == pytest.approx([0.004] * 2, abs=1e-5)
    assert found["charts/engine_gap_max"][1:].tolist() == pytest.approx([0.004] * 2, abs=1e-4)
    # held out, sampled; held out, sampled; held out: one push for every policy, when first asked
    push = ["reload_weights", "reset_prefix_cache", "generate"]
    assert StandIn.last.did == push + ["generate"] + push + ["generate"] + push


def test_a_step_of_the_fused_optimizer_is_seen(vllm, tiny_model):
    policy, chat = load_policy(str(tiny_model), CPU)
    engine = Engine(StandIn(tiny_model), size=4, most=1e-4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
    prompts = [chat.prompt_ids("1 + 1"), chat.prompt_ids("Ann has 2 pens.")]
    for _ in range(2):
        answers = engine.generate(policy, chat, prompts, [9, 3], 0.7)
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt + answer.tokens])
            logprobs = (policy(tokens).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = [row[i].item() for row, i in zip(logprobs, answer.tokens, strict=True)]
            assert answer.logprobs == pytest.approx(expected, abs=1e-4)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            assert answer.entropy == pytest.approx(entropy.tolist(), abs=1e-4)
            assert answer.gap == pytest.approx([0.0] * len(answer.tokens), abs=1e-4)
        assert len(answers[1].tokens) <= 3
        policy(tokens).logits.square().mean().backward()
        optimizer.step()
    assert engine.llm.did.count("reload_weights") == 2


def test_another_model_than_the_policy_is_refused(vllm, tiny_model, monkeypatch):
    policy, chat = load_policy(str(tiny_model), CPU)
    engine = Engine(StandIn(tiny_model), size=4, most=MOST["float32"])
    monkeypatch.setattr(StandIn, "collective_rpc", lambda *a, **k: None)  # the push is lost
    with pytest.raises(SystemExit, match="it samples from another model"):
        engine.generate(policy, chat, [chat.prompt_ids("1 + 1")], [9], 1.0)


def test_weights_are_truncated_by_hand():
    row = Row([5], [6, 7, 8, 9], [True] * 4)
    row.gap = [math.log(x) for x in (0.5, 1.0, 1.5, 3.0)]
    weights = pack([row])["sampler"]
    assert weights.tolist()[0] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    # rho = 1.1, 0.5, 1.5, 1.5; clipped to [0.8, 1.2]; A = 1, -1, 1, -1
    ratio, advantages = torch.tensor([[1.1, 0.5, 1.5, 1.5]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mean = torch.full((1, 4), 0.25)
    loss, _ = policy_loss(ratio.log(), torch.zeros(1, 4), weights * advantages, mean, 0.2)
    by_hand = -(0.5 * 1.1 + 1.0 * -0.8 + 1.5 * 1.2 + 2.0 * -1.5) / 4
    assert loss.item() == pytest.approx(by_hand)


def test_what_it_cannot_be_had_for_is_said(run_main, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"--rollout-engine vllm: .*pip install vllm=="):
        run_main("ppo_baseline", rollout_engine="vllm")
    with pytest.raises(SystemExit, match="without --lora-rank"):
        run_main("ppo_baseline", rollout_engine="vllm", lora_rank=4)


def test_vllm_itself():
    """A tied head too follows the policy: transformers' numbers are vLLM's, before and after."""
    pytest.importorskip("vllm")
    policy, chat = load_policy("assets/tiny_math", CPU)
    flags = {"model": "assets/tiny_math", "dtype": "float32", "seed": 1, "rollout_batch_size": 64}
    engine = Engine(start_vllm(SimpleNamespace(**flags)), size=16, most=1e-5)
    prompts = [chat.prompt_ids(f"Ann has {i} pens. She buys 2 more.") for i in range(2, 20)]
    for _ in range(2):
        answers = engine.generate(policy, chat, prompts, [20] * len(prompts), 1.0)
        gap = torch.tensor([x for answer in answers for x in answer.gap])
        assert gap.abs().max() < 1e-3
        greedy = engine.generate(policy, chat, prompts, [20] * len(prompts), 0.0)
        own = generate(policy, chat, prompts, 20, 0.0)
        assert [a.tokens for a in greedy] == [a.tokens for a in own]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))

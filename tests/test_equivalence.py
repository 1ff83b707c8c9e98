"""Behaviour that must not depend on the method, on how a batch is cut, or on padding."""

import importlib
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import grpo_baseline as grpo
import ppo_baseline as ppo
import vrpo_math as vrpo
from tests.conftest import (
    CRITICS,
    SCRIPTS,
    assert_same_metrics,
    bare_world,
    read_metrics,
    read_samples,
)
from utils import tensors
from utils.generation import Answer, generate
from utils.keyed import row_seeds
from utils.models import frozen, load_policy, trainable
from utils.world.environment import Episode
from utils.world.problems import Problem

CPU = torch.device("cpu")


@pytest.fixture
def policy_and_chat(tiny_model):
    """One token in nine ends an answer."""
    policy, chat = load_policy(str(tiny_model), CPU)
    chat.eos_ids += range(0, policy.lm_head.out_features, 9)
    return policy, chat


def problems(chat, count=8):
    return [
        Problem(f"p{i}", "1", chat.prompt_ids("Ann has 2 pens. " * (i % 3 + 1)))
        for i in range(count)
    ]


def play(policy, chat, temperature=1.0) -> list[Episode]:
    """Eight episodes of up to two turns."""
    args = ppo.Args(max_new_tokens=10, max_turns=2)
    torch.manual_seed(0)
    found = ppo.rollout(policy, bare_world(args, chat), problems(chat), args, temperature)
    assert {len(e.completions) for e in found} == {1, 2} and len({len(e.tokens) for e in found}) > 4
    return found


OWN = ("reward/total", "charts/verifier_calls")  # a method's own business


def test_all_scripts_see_the_same_completions_and_noise_in_update_1(run_main):
    rows = []
    for name in SCRIPTS:
        flags = {"noise": "symmetric", "noise_rate": 0.4, "max_new_tokens": 16, "epochs": 1}
        folder = run_main(name, updates=1, eval_size=1, **flags)
        header, _, first = read_metrics(folder).splitlines()
        row = dict(zip(header.split(","), first.split(","), strict=True))
        shared = ("charts/", "reward/", "objective/entropy")
        rows.append({k: row[k] for k in row if k.startswith(shared) and k not in OWN})
        assert read_samples(folder)[0] == read_samples(Path(folder).parent / SCRIPTS[0])[0]
    assert all(row == rows[0] for row in rows)


def test_robust_ppo_without_its_worst_case_is_ppo(run_main):
    """One head, no contamination, no weight: every metric of PPO's, to the last bit. And of the
    rewards --kl-coef takes what it says."""
    settings = {"critic_lambda": 0.9, "kl_coef": 0.1, "learning_rate": 0.01, "micro_batch_size": 4}
    one = run_main("ppo_baseline", **settings)
    for i, flags in enumerate((
        {"value_heads": 1},
        {"worst_case": "contamination", "contamination": 0.0},
        {"worst_case": "conservative", "conservative_coef": 0.0},
    )):  # fmt: skip
        other = run_main("robust_ppo_baseline", run_name=f"{i}", **settings, **flags)
        assert_same_metrics(one, other, rel=0, abs=0)
    row = pd.read_csv(one / "metrics.csv").iloc[2]
    penalty = 0.1 * row["objective/kl_ref"]
    assert row["reward/total"] == pytest.approx(row["reward/observed"] - penalty)
    assert abs(penalty) > 1e-3


def test_grpo_compares_whole_rewards(run_main, monkeypatch):
    """Of every episode the sum, wherever in it the rewards sit."""
    seen, compare = [], grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda *x: seen.append(x[0]) or compare(*x))
    folder = run_main("grpo_baseline", noise="random", updates=1)
    row = pd.read_csv(folder / "metrics.csv").iloc[1]
    assert set(seen[0].tolist()) == {0.0, 1.0} and row["losses/grad_norm_policy"] > 0
    assert seen[0].mean().item() == pytest.approx(row["reward/observed"])


def some_batch(policy, chat) -> dict:
    """A minibatch with all that any script's losses ask for."""
    batch = tensors.pack(play(policy, chat), chat.pad_id, CPU)
    mask = batch["mask"]
    torch.manual_seed(1)
    batch["logprobs"], batch["advantages"], batch["returns"] = torch.randn(3, *mask.shape)
    batch["target_quantiles"] = torch.randn(*mask.shape, 200)
    batch["seed"] = row_seeds(mask, 1)
    batch["weights"] = ppo.token_weights(mask)
    for kind in ("entropy", "perplexity"):
        some = vrpo.most_uncertain(torch.rand(mask.shape), mask, 0.8)
        batch[f"{kind}_weights"] = ppo.token_weights(some)
    return batch


def test_micro_batches_change_no_gradient(script, policy_and_chat):
    """Those of a minibatch of 8 in parts of 8, 3 and 1 rows: the last has no padding at all."""
    policy, batch = policy_and_chat[0], some_batch(*policy_and_chat)
    args, models, found = script.Args(entropy_coef=0.1), [policy], []
    if hasattr(script, "Critic"):
        models.append(script.Critic(policy, args))
        torch.nn.init.normal_(models[1].head.weight)
    how = (torch.tensor(0.5), args) if hasattr(script, "Critic") else (args,)
    parameters = [p for model in models for p in trainable(model)]
    for size in (8, 3, 1):
        for model in models:
            model.zero_grad()
        total = 0.0
        for _, part in tensors.micro_batches(batch, size):
            loss, terms = script.total_loss(*models, part, *how)
            loss.backward()
            total += terms["losses/total"].item()
        found.append((total, torch.cat([p.grad.flatten() for p in parameters])))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], abs=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5, rtol=1e-4)
    assert found[0][1].abs().max() > 0.01


@pytest.mark.parametrize("name", CRITICS)
def test_padding_changes_nothing(name, policy_and_chat):
    """What critic and reference say of rows that are read together, alone, or with more padding."""
    module, (policy, chat) = importlib.import_module(name), policy_and_chat
    batch = tensors.pack(play(policy, chat), chat.pad_id, CPU)
    batch["seed"] = row_seeds(batch["mask"], 1)
    critic, T = module.Critic(policy, module.Args()), batch["mask"].shape[1]
    torch.nn.init.normal_(critic.head.weight)
    filler = {"inputs": chat.pad_id, "tokens": chat.pad_id, "mask": False}
    wide = {
        key: torch.nn.functional.pad(x, (0, 7 * (x.shape[1] > 1)), value=filler.get(key, 0))
        for key, x in batch.items()
    }
    found = []
    for rows, size in ((batch, 8), (batch, 1), (wide, 3)):
        args = module.Args(micro_batch_size=size)
        scores = module.score_tokens(critic, rows, args)
        scores["kl"] = module.kl_penalty(policy, rows, args)
        assert all(not x[~rows["mask"]].any() for x in scores.values())
        found.append({key: x[:, :T].float() for key, x in scores.items()})
    for other in found[1:]:
        for key, x in found[0].items():
            assert torch.allclose(x, other[key], atol=1e-5), key


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("half, tolerance", [(False, 1e-4), (True, 0.1)])
def test_training_sees_the_distribution_that_was_sampled(
    policy_and_chat, monkeypatch, temperature, half, tolerance
):
    """The log-probabilities and entropies that sampling kept, left-padded and with a cache, against
    a right-padded pass."""
    monkeypatch.setattr(tensors, "HALF", half)
    policy, chat = policy_and_chat
    batch = tensors.pack(play(policy, chat, temperature), chat.pad_id, CPU)
    for rows, part in tensors.micro_batches(batch, 8):
        hidden = tensors.hidden_states(policy.get_decoder(), part)
        found = tensors.logprobs_and_entropy(policy.lm_head, hidden, part, temperature)
        for name, x in zip(("logprobs", "entropy"), found, strict=True):
            off = (batch[name][rows] - x).abs()
            assert off.max() < tolerance and off[part["mask"]].mean() < tolerance / 10
            assert x.abs().max() > 1


@torch.no_grad()
def test_kl_penalty(policy_and_chat):
    """Against two models' log-probabilities of every episode by itself; of the policy's own
    reference it is nothing."""
    policy, chat = policy_and_chat
    args, episodes = ppo.Args(temperature=0.7, micro_batch_size=3), play(policy, chat, 0.7)
    batch = tensors.pack(episodes, chat.pad_id, CPU)
    reference = frozen(policy)
    assert ppo.kl_penalty(reference, batch, args).abs().max() < 1e-4
    for parameter in reference.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    penalty = ppo.kl_penalty(reference, batch, args)
    for row, mask, e in zip(penalty, batch["mask"], episodes, strict=True):
        tokens = torch.tensor([e.prompt + e.tokens])
        both = [(m(tokens).logits[0] / 0.7).log_softmax(-1) for m in (policy, reference)]
        both = [x[:-1].gather(1, tokens[0, 1:, None])[len(e.prompt) - 1 :, 0] for x in both]
        expected = (both[0] - both[1])[torch.tensor(e.chosen)]
        assert torch.allclose(row[mask], expected, atol=1e-4) and not row[~mask].any()
    assert penalty.sum(1).mean() > 1


def test_sampling_follows_the_policy_with_nothing_inherited(tiny_model, tmp_path, tokenizer):
    """A model whose own generation config has top-k and a penalty is sampled without them:
    frequencies match softmax."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    policy, chat = load_policy(str(tmp_path / "m"), CPU)
    prompt = chat.prompt_ids("Ann has 2 pens.")
    torch.manual_seed(0)
    first = torch.tensor([a.tokens[0] for a in generate(policy, chat, [prompt] * 4000, 1, 1.0)])
    expected = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    top = expected.argmax()
    assert (first == top).float().mean().item() == pytest.approx(expected[top].item(), abs=0.03)
    assert len(first.unique()) > 10


def test_multi_turn_rollout_marks_exactly_the_policys_tokens(policy_and_chat, monkeypatch):
    """Two turns: what is marked as chosen decodes to the answers, the rest to the user's turn. An
    episode whose answer was cut off ends there."""
    policy, chat = policy_and_chat
    eos = chat.eos_ids[0]
    turns = iter([[[11, 12, eos], [13, 14, 15]], [[16, eos]]])

    def generate(_policy, _chat, prompts, *_):
        asked.append(prompts)
        return [Answer(row, *([x] * len(row) for x in (-1.0, 0.5, 0.0))) for row in next(turns)]

    asked, args = [], ppo.Args(max_turns=2)
    monkeypatch.setattr(ppo, "generate", generate)
    first, second = ppo.rollout(policy, bare_world(args, chat), problems(chat, 2), args, 1.0)
    words = chat.user_turn_ids("Check your work and answer again.")
    assert asked == [[first.prompt, second.prompt], [first.prompt + [11, 12, eos] + words]]
    assert first.tokens == [11, 12, eos, *words, 16, eos]
    assert first.chosen == [True] * 3 + [False] * len(words) + [True] * 2 and first.length == 5
    assert first.logprobs == [-1.0 * c for c in first.chosen]
    assert first.entropy == [0.5 * c for c in first.chosen]
    assert len(first.completions) == 2 and first.finished
    assert second.tokens == [13, 14, 15] and not second.finished and len(second.completions) == 1


def test_truncated_answers(policy_and_chat):
    """What counts of an answer that was cut off and of one that was not."""
    _, chat = policy_and_chat
    cut, whole = Episode(Problem("q", "1", [5, 6])), Episode(Problem("q", "1", [5, 6]))
    for episode, tokens in ((cut, [7, 8]), (whole, [7, chat.eos_ids[0]])):
        episode.say(Answer(tokens, *[[0.5, 0.5]] * 3), chat)
        episode.completions = ["x", "#### 1"]
    for kind, grades, weight in (("wrong", 0, 1), ("grade", 1, 1), ("mask", 1, 0)):
        env = bare_world(ppo.Args(truncated=kind), chat)
        assert env.grade([cut, whole]).tolist() == [grades, 1]
        batch = env.pack([cut, whole])
        assert batch["mask"].all()  # a critic learns of both
        wanted = torch.tensor([[weight] * 2, [1] * 2]) * math.exp(0.5)
        assert torch.allclose(batch["sampler"], wanted)
    assert cut.completions == ["x", "#### 1"]


# ---- VRPO's critic ----


def test_semantic_losses_move_the_backbone_and_not_the_frozen_head(policy_and_chat):
    policy, batch = policy_and_chat[0], some_batch(*policy_and_chat)
    critic = vrpo.Critic(policy, vrpo.Args())
    optimizer = vrpo.make_optimizer(policy, critic, vrpo.Args())
    ((_, part),) = tensors.micro_batches(batch, 8)
    sum(vrpo.semantic_losses(critic, tensors.hidden_states(critic.backbone, part), part)).backward()
    assert critic.lm_head.weight.grad is None
    assert critic.backbone.layers[0].mlp.up_proj.weight.grad.any()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(critic.lm_head.weight) not in trained
    assert trained == {id(p) for model in (policy, critic) for p in trainable(model)}


@torch.no_grad()
def test_the_bottleneck_starts_open_and_values_are_means_over_codes(policy_and_chat):
    """mu of order 1 for hidden states of order 1, sigma = 1/e in every state, and a value that is
    nothing yet; the mean over 64 codes is eight times as steady as one code."""
    policy, chat = policy_and_chat
    torch.manual_seed(0)
    critic = vrpo.Critic(policy, vrpo.Args(latent_dim=512))
    mu, log_sigma = critic.encoder(torch.randn(256, policy.lm_head.in_features)).chunk(2, dim=-1)
    assert mu.std().item() == pytest.approx(1, abs=0.1) and (log_sigma == -1).all()
    batch = tensors.pack(play(policy, chat), chat.pad_id, CPU)
    batch["seed"] = row_seeds(batch["mask"], 0)
    ((_, part),) = tensors.micro_batches(batch, 8)
    critic = vrpo.Critic(policy, vrpo.Args(latent_dim=16))
    values, kl, _ = critic(part, samples=2)
    assert not values.any() and (kl > 0).all() and kl.shape == values.shape == part["mask"].shape
    critic.decoder, spread = torch.nn.Identity(), []
    torch.nn.init.ones_(critic.head.weight)  # then a value is the sum of the code's 16 numbers
    for samples in (1, 64):
        seeds = [row_seeds(part["mask"], samples, i) for i in range(30)]
        runs = [critic(part | {"seed": seed}, samples)[0][part["mask"]] for seed in seeds]
        spread.append(torch.stack(runs).std(0).mean())
    assert math.isclose(spread[0], 4 / math.e, rel_tol=0.1)
    assert math.isclose(spread[0] / spread[1], 8, rel_tol=0.1)

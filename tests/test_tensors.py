"""The layout, masks, rewards, advantages, losses and metrics by tiny cases computed by hand."""

import math
import statistics
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

import dvpo_math as dvpo
import grpo_baseline as grpo
import ppo_baseline as ppo
import robust_ppo_baseline as robust
import vine_ppo_baseline as vine
import vrpo_dialogue as dialogue
import vrpo_math as vrpo
from utils import metrics, tensors
from utils.keyed import row_seeds
from utils.models import load_policy

T, F = True, False
CPU = torch.device("cpu")


@dataclass
class Row:
    """An episode as `pack` reads it; its numbers are told from its tokens."""

    prompt: list[int]
    tokens: list[int]
    chosen: list[bool]

    def __post_init__(self):
        self.logprobs = [-0.1 * t * c for t, c in zip(self.tokens, self.chosen, strict=True)]
        self.entropy = [0.2 * t * c for t, c in zip(self.tokens, self.chosen, strict=True)]
        self.gap = [0.0] * len(self.tokens)


# EOS is 1, and so is what fills rows, on purpose
ROWS = [Row([5, 6, 7], [8, 9, 1], [T, T, T]), Row([5, 6], [1], [T])]
# answer 8 1, user 6 7, answer 9 1
TWO_TURNS = [Row([5], [8, 1, 6, 7, 9, 1], [T, T, F, F, T, T])]


def pack(rows):
    return tensors.pack(rows, pad_id=1, device=CPU)


def on_the_last(observed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards (B,) on the last chosen tokens of a mask (B, T)."""
    last = (mask * torch.arange(mask.shape[1])).amax(1, keepdim=True)
    return ppo.place_rewards(observed, {"logprobs": torch.zeros(mask.shape), "last": last})


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU)[0]


# ---- the layout ----


def test_pack():
    batch = pack(ROWS + TWO_TURNS)
    assert batch["inputs"].tolist() == [[5, 6, 7, 8, 9, 1], [5, 6, 1, 1, 1, 1], [5, 8, 1, 6, 7, 9]]
    assert batch["prompt"].tolist() == [[3], [2], [1]]
    assert batch["tokens"].tolist() == [[8, 9, 1, 1, 1, 1], [1] * 6, [8, 1, 6, 7, 9, 1]]
    assert batch["last"].tolist() == [[2], [0], [5]]
    # the EOS that the policy chose is in the mask, padding of the same id and the user are not
    assert batch["mask"].tolist() == [[T, T, T, F, F, F], [T, F, F, F, F, F], [T, T, F, F, T, T]]
    chosen = batch["tokens"] * batch["mask"]
    assert torch.allclose(batch["logprobs"], -0.1 * chosen)
    assert torch.allclose(batch["entropy"], 0.2 * chosen) and (batch["sampler"] == 1).all()


def test_micro_batches_have_rows_of_similar_length_and_no_more_padding_than_they_need():
    batch = pack(ROWS + TWO_TURNS) | {"wide": torch.rand(3, 6, 2)}
    (first, short), (second, long) = tensors.micro_batches(batch, 2)
    assert first.tolist() == [1, 0] and second.tolist() == [2]
    assert short["inputs"].tolist() == [[5, 6, 1, 1, 1], [5, 6, 7, 8, 9]]
    assert short["tokens"].tolist() == [[1, 1, 1], [8, 9, 1]]
    assert short["cells"].tolist() == [0, 3, 4, 5] and long["cells"].tolist() == [0, 1, 4, 5]
    assert torch.equal(short["wide"], batch["wide"][[1, 0], :3])
    assert all(torch.equal(long[name], x[[2]]) for name, x in batch.items())
    ((_, alone),) = tensors.micro_batches({name: x[[1]] for name, x in batch.items()}, 2)
    assert alone["inputs"].tolist() == [[5, 6]] and alone["tokens"].tolist() == [[1]]


@torch.no_grad()
def test_hidden_states_are_those_before_each_token(policy):
    """Of rows in a micro-batch, with padding on both sides of the prompt's end, as of a row that is
    read by itself."""
    rows, decoder = ROWS + TWO_TURNS, policy.get_decoder()
    for numbers, part in tensors.micro_batches(pack(rows), 2):
        hidden = tensors.hidden_states(decoder, part)
        assert hidden.shape[:2] == part["tokens"].shape and hidden.isfinite().all()
        for row, found in zip((rows[i] for i in numbers), hidden, strict=True):
            read = torch.tensor([row.prompt + row.tokens])
            alone = decoder(input_ids=read).last_hidden_state[0, len(row.prompt) - 1 : -1]
            assert torch.allclose(found[: len(row.tokens)], alone, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 10**6])
def test_logprobs_and_entropy(at_once, monkeypatch):
    """Those of torch, values and gradients, however few rows of logits exist at a time; 0 where
    nothing was chosen."""
    head, hidden = torch.nn.Linear(4, 12), torch.randn(3, 6, 4, requires_grad=True)
    ((_, part),) = tensors.micro_batches(pack(ROWS + TWO_TURNS), 3)
    every = Categorical(logits=head(hidden) / 0.7)
    expected = every.log_prob(part["tokens"]) * part["mask"], every.entropy() * part["mask"]
    seen = []
    head.register_forward_hook(lambda *_: seen.append(len(_[2])))
    monkeypatch.setattr(tensors, "LOGITS_AT_ONCE", 12 * at_once)
    found = tensors.logprobs_and_entropy(head, hidden, part, 0.7)
    losses = [logprobs.sum() + entropy.square().sum() for logprobs, entropy in (found, expected)]
    slopes = [torch.autograd.grad(x, [hidden, *head.parameters()]) for x in losses]
    assert max(seen) == min(at_once, 8)
    for ours, wanted in zip((*found, *slopes[0]), (*expected, *slopes[1]), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5)
    nothing = part | {"cells": part["cells"][:0]}
    assert not any(x.any() for x in tensors.logprobs_and_entropy(head, hidden, nothing, 0.7))


def test_turn_ends():
    mask = torch.tensor([[T, T, F, F, T, T], [F, T, F, T, F, F], [F] * 6])
    ends = [[F, T, F, F, F, T], [F, T, F, T, F, F], [F] * 6]
    assert tensors.turn_ends(mask).tolist() == ends


# ---- rewards ----


def test_rewards_sit_on_last_tokens():
    batch = pack(ROWS + TWO_TURNS)
    rewards = ppo.place_rewards(torch.tensor([0.5, 2.0, 3.0]), batch)
    assert rewards.tolist() == [[0, 0, 0.5, 0, 0, 0], [2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3]]
    # per turn: an episode's last turn is the last column
    gains = torch.tensor([[9.0, 9.0, 0.5], [9.0, 9.0, 2.0], [9.0, 1.0, 3.0]])
    placed = dialogue.place_rewards(gains, batch["mask"]).tolist()
    assert placed == [[0, 0, 0.5, 0, 0, 0], [2, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 3]]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert dialogue.place_rewards(torch.tensor([[1.0]]), nothing).tolist() == [[0, 0, 0]]


def test_credit_per_turn():
    """A turn's reward is what it adds to the score; the gains sum to the last score."""
    scores = torch.tensor([[0.2, 0.5, 1.0], [0.0, 0.0, 0.7]])  # the second has one turn
    gains = dialogue.turn_gains(scores, scores[:, -1])
    assert torch.allclose(gains, torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 0.7]]))
    flipped = dialogue.turn_gains(scores, 1 - scores[:, -1])  # noise is on the last turn alone
    assert torch.allclose(flipped, torch.tensor([[0.2, 0.3, -0.5], [0.0, 0.0, 0.3]]))
    assert scores[0, -1] == 1.0  # what came in is as it was


# ---- advantages ----


def test_whiten():
    """By hand; and of equal numbers, whatever their rounding, it makes nothing."""
    mask = torch.tensor([[T, T, T, F]])
    white = ppo.whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), mask)
    assert torch.allclose(white, torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))
    torch.manual_seed(0)
    for constant in [0.0, 1.0, -0.3, 8 / 7, 0.1 + 0.2, *(torch.randn(60).exp() - 1).tolist()]:
        for shape in ((2, 1), (3, 7), (16, 48), (64, 33)):
            x, mask = torch.full(shape, constant), torch.ones(shape, dtype=torch.bool)
            assert not ppo.whiten(x, mask).any(), (constant, shape)
            x[0, 0] += 1e-3 * max(abs(constant), 1.0)  # a difference that is one
            assert ppo.whiten(x, mask).std().item() == pytest.approx(1, abs=0.01)


def test_gae_by_hand():
    # V = 1, 2, 3, reward 10 at the end, gamma 0.5, lambda 0.5: deltas 0, -0.5, 7
    values, rewards = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 10.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = ppo.gae(rewards, values, mask, 0.5, 0.5)
    assert torch.allclose(advantages, torch.tensor([[0.3125, 1.25, 7.0]]))
    batch = {"values": values, "mask": mask}
    args = ppo.Args(gamma=0.5, gae_lambda=0.5, critic_lambda=0.0)
    advantages, targets = ppo.advantages_and_targets(rewards, batch, args)
    assert torch.allclose(advantages, torch.tensor([[0.3125, 1.25, 7.0]]))
    assert targets["returns"].tolist() == [[1.0, 1.5, 10.0]]


def reference_gae(rewards, values, mask, gamma, lam):
    """The definition, O(n^2), on the list of chosen tokens: A_i = sum_k (gamma lam)^k
    delta_{i+k}."""
    result = torch.zeros_like(values)
    for b in range(len(values)):
        steps = [t for t in range(values.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in steps] + [0.0]
        delta = [float(rewards[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            result[b, t] = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(steps)))
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.9, 1.0]))
def test_gae_against_the_definition_over_turns_and_padding(seed, lam, gamma):
    torch.manual_seed(seed)
    mask = torch.rand(4, 9) < 0.6  # gaps are user turns
    rewards, values = torch.randn(4, 9) * mask, torch.randn(4, 9)
    got = ppo.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(got, reference_gae(rewards, values, mask, gamma, lam), atol=1e-5)
    assert (got[~mask] == 0).all()


def test_gae_with_zero_values_and_lambda_one_is_the_discounted_return():
    mask = pack(TWO_TURNS)["mask"]
    rewards = dialogue.place_rewards(torch.tensor([[2.0, 3.0]]), mask)
    returns = metrics.discounted_returns(rewards, mask, 1.0)
    assert returns.tolist() == [[5, 5, 0, 0, 3, 3]]
    assert metrics.discounted_returns(rewards, mask, 0.5).tolist() == [[1.375, 2.75, 0, 0, 1.5, 3]]
    assert torch.equal(ppo.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0), returns)


# ---- losses ----


def test_policy_loss_clips_by_hand():
    # ratios 2, 0.5, 2, 0.5 with advantages 1, 1, -1, -1 and eps 0.2: objectives 1.2, 0.5, -2, -0.8
    logprobs = torch.tensor([[2.0, 0.5, 2.0, 0.5]]).log().requires_grad_()
    advantages, weights = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.full((1, 4), 0.25)
    loss, stats = ppo.policy_loss(logprobs, torch.zeros(1, 4), advantages, weights, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 2 - 0.8) / 4)
    assert stats["losses/clipfrac"].item() == 1.0
    by_hand = (1 - math.log(2) - 0.5 - math.log(0.5)) / 2  # r - 1 - log r of 2 and of 0.5
    assert stats["losses/approx_kl"].item() == pytest.approx(by_hand)
    loss.backward()  # a clipped token gets no gradient: the first and the last
    assert (logprobs.grad[0, [0, 3]] == 0).all() and (logprobs.grad[0, [1, 2]] != 0).all()


def test_loss_of_the_values_by_hand():
    part = {"returns": torch.tensor([[0.0, 1.0, 9.0]]), "weights": torch.tensor([[0.5, 0.5, 0.0]])}
    critic = lambda part: torch.tensor([[1.0, 3.0, 0.0]])  # noqa: E731
    loss, terms = ppo.critic_loss(critic, part, torch.tensor(0.5), ppo.Args())
    assert loss.item() == terms["losses/value"].item() == (0.5 * 1 + 0.5 * 4) / 0.5


@pytest.fixture
def part(policy):
    """A micro-batch with all that a loss may ask for."""
    torch.manual_seed(0)
    batch = pack(ROWS + TWO_TURNS)
    shape = batch["mask"].shape
    batch |= {name: torch.randn(shape) * batch["mask"] for name in ("returns", "advantages")}
    batch |= {"target_quantiles": torch.randn(*shape, 8), "seed": row_seeds(batch["mask"], 1)}
    for name in ("weights", "entropy_weights", "perplexity_weights"):
        batch[name] = ppo.token_weights(batch["mask"] & (torch.rand(shape) < 0.9))
    ((_, part),) = tensors.micro_batches(batch, 3)
    return part


def test_the_terms_of_a_loss_have_their_weights(policy, part):
    """The total of PPO, and the critics' of VRPO and DVPO, from what is logged of them."""
    args = ppo.Args(entropy_coef=0.3)
    loss, terms = ppo.total_loss(policy, ppo.Critic(policy, args), part, torch.tensor(2.0), args)
    hidden = tensors.hidden_states(policy.get_decoder(), part)
    _, entropy = tensors.logprobs_and_entropy(policy.lm_head, hidden, part, args.temperature)
    bonus = 0.3 * (entropy * part["weights"]).sum()
    assert torch.allclose(loss, terms["losses/policy"] + terms["losses/value"] - bonus)

    args = vrpo.Args(beta=0.2, lambda_ent=0.3, lambda_ppl=0.5)
    loss, terms = vrpo.critic_loss(vrpo.Critic(policy, args), part, torch.tensor(2.0), args)
    weights = {"losses/value": 1, "vrpo/ib_kl": 0.2}
    weights |= {"vrpo/entropy_aux": 0.3, "vrpo/perplexity_aux": 0.5}
    assert torch.allclose(loss, sum(weights[name] * x for name, x in terms.items()))

    kinds = ("consistency", "cvar", "gain", "shift", "shape", "curvature")
    some = {f"lambda_{kind}": 0.1 * i for i, kind in enumerate(kinds, start=1)}
    args = dvpo.Args(quantiles=8, tail_share=0.4, **some)
    loss, terms = dvpo.critic_loss(dvpo.Critic(policy, args), part, torch.tensor(2.0), args)
    weighted = sum(some[f"lambda_{kind}"] * terms[f"dvpo/{kind}"] for kind in kinds)
    assert torch.allclose(loss, terms["dvpo/quantile"] + weighted)


# ---- metrics ----


def test_explained_variance():
    mask, returns = torch.tensor([[T, T, T, F]]), torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    explained = partial(metrics.explained_variance, returns=returns, mask=mask)
    assert explained(returns + 5) == 1  # a constant error costs nothing
    assert explained(torch.zeros(1, 4)) == 0 and explained(-returns) == -3
    assert math.isnan(metrics.explained_variance(returns, torch.ones(1, 4), mask))


def test_what_a_critic_foresaw():
    """Values 0.5 first, then the clean reward, of three episodes, one of them flipped: the last
    states explain the clean rewards, the first ones nothing."""
    mask = torch.tensor([[T, T, F], [T, F, T], [T, T, F]])
    clean, observed = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    values = torch.tensor([[0.5, 1.0, 9.0], [0.5, 9.0, 0.0], [0.5, 0.0, 9.0]])
    batch = {"mask": mask, "values": values, "last": torch.tensor([[1], [2], [1]])}
    rewards = on_the_last(observed, mask)
    found = metrics.of_critic(batch, rewards, observed - clean, gamma=1.0)
    assert found["critic/explained_variance_last"] == 1
    assert found["critic/explained_variance_first"] == pytest.approx(0)
    returns = {"_clean": [1, 1, 0, 0, 0, 0], "": [1, 1, 1, 1, 0, 0]}
    errors = {"_clean": [0.5, 0, -0.5, 0, -0.5, 0], "": [0.5, 0, 0.5, 1, -0.5, 0]}
    for key in returns:
        by_hand = 1 - statistics.variance(errors[key]) / statistics.variance(returns[key])
        assert found[f"critic/explained_variance{key}"] == pytest.approx(by_hand)
    assert found["critic/return_mean"] == pytest.approx(4 / 6)
    assert found["critic/value_mean"] == pytest.approx(2.5 / 6)


def test_advantages_without_the_errors_are_a_second_gae_on_the_clean_rewards(monkeypatch):
    """With user turns and padding; for a next state that may be the worst; from line to line."""
    found = []
    monkeypatch.setattr(metrics, "advantage_noise", lambda _, clean, mask: found.append(clean))
    torch.manual_seed(0)
    last = torch.tensor([[8], [3], [6], [0]])
    mask = (torch.rand(4, 9) < 0.6) & (torch.arange(9) < last)
    mask = mask.scatter(1, last, True)
    values, (clean, observed) = torch.randn(4, 9), torch.randn(2, 4)
    starts = mask & (torch.rand(4, 9) < 0.6)
    estimates = [
        (lambda rewards: ppo.gae(rewards, values, mask, 0.9, 0.8), 0.9 * 0.8, None),
        (lambda rewards: ppo.gae(rewards, values, mask, 1.0, 0.0), 0.0, None),
        (lambda rewards: robust.gae(rewards, values, mask, 0.9, 0.8, 0.25), 0.9 * 0.8 * 0.75, None),
        (lambda rewards: vine.gae(rewards, values, mask, starts, 0.5), 0.5, starts),
        (lambda rewards: vine.gae(rewards, values, mask, starts, 0.0), 0.0, starts),
    ]
    for estimate, decay, steps in estimates:
        advantages = estimate(on_the_last(observed, mask))
        row = metrics.of_advantages(advantages, observed - clean, mask, decay, steps)
        assert row["critic/advantage_std"] == pytest.approx(advantages[mask].std().item())
        again = estimate(on_the_last(clean, mask))
        assert torch.allclose(found.pop()[mask], again[mask], atol=1e-5)


def test_advantage_noise():
    """Advantages of rewards 0 and 1 under a flip rate p and a constant critic: of their variance 1
    - (1 - 2p)^2 comes from the flips."""
    mask = torch.ones(10, 3, dtype=torch.bool)
    mask[:, 2] = False
    clean = torch.tensor([1.0, 0.0] * 5).unsqueeze(1).expand(10, 3)
    observed = clean.clone()
    observed[:2] = 1 - observed[:2]  # one right and one wrong answer of ten: p = 0.2
    observed[:, 2] = torch.arange(10)  # what is not chosen does not count
    assert metrics.advantage_noise(observed, clean, mask) == pytest.approx(1 - 0.6**2)
    assert metrics.advantage_noise(3 * clean - 1, clean, mask) == pytest.approx(0)
    assert metrics.advantage_noise(1 - clean, clean, mask) == 1  # all inverted: nothing follows
    assert math.isnan(metrics.advantage_noise(torch.ones(10, 3), clean, mask))


# ---- GRPO ----


def group_advantages(scores, size, kind, rate=0.0):
    args = {"samples_per_prompt": size, "advantage": kind, "assumed_false_negative_rate": rate}
    return grpo.group_advantages(scores, grpo.Args(**args))


def test_group_advantages():
    """By hand, and GRPO's as TRL has it: (r - r.view(-1, G).mean(1)) / (r.view(-1, G).std(1) +
    1e-4), std unbiased."""
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # groups (1, 0, 0) and (1, 1, 1)
    centred = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    assert torch.allclose(group_advantages(scores, 3, "dr_grpo"), centred)
    assert torch.allclose(group_advantages(scores, 3, "rloo"), centred * 1.5)
    assert torch.equal(group_advantages(scores, 3, "reinforce_pp"), scores)  # main() whitens
    torch.manual_seed(0)
    r = torch.rand(24)
    mean, std = (f(r.view(-1, 8), 1).repeat_interleave(8) for f in (torch.mean, torch.std))
    assert torch.allclose(group_advantages(r, 8, "grpo"), (r - mean) / (std + 1e-4))
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert not group_advantages(scores, 1, kind).any()


def test_metrics_of_groups():
    scores, clean = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    mask, args = torch.ones(4, 2, dtype=torch.bool), grpo.Args(samples_per_prompt=2)
    found = metrics.of_groups(scores, clean, grpo.group_advantages, mask, args)
    assert found["grpo/zero_variance_groups"] == 0.5
    # advantages 1, -1, 0, 0 against 1, -1, 1, -1, but for scale: a correlation of 1 / sqrt(2)
    assert found["objective/advantage_noise"] == pytest.approx(0.5)


def test_loss_norms():
    mask = torch.tensor([[T, T, T, T], [T, F, F, F]])
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 0.0, 0.0]])
    for kind, mean in {"token": 10 / 5, "sequence": (1 + 6) / 2, "constant": 10 / 20}.items():
        assert (x * grpo.token_weights(mask, kind, 10)).sum().item() == pytest.approx(mean)


@pytest.mark.parametrize("fn, fp", [(0.3, 0.1), (0.2, 0.2), (0.0, 0.4), (0.0, 0.0)])
def test_the_forward_correction_follows_the_clean_gradient(fn, fp):
    """All answers and all that may be observed of them, each with its probability: the gradient of
    the policy's loss is that of the clean rewards times 1 - FN - FP, whoever knows FN alone. An
    answer that is right counts for nothing, one that is wrong for as much as rewards are told
    apart."""
    logits = torch.tensor([0.5, -1.0, 0.2, 1.1, -0.3], dtype=torch.float64, requires_grad=True)
    clean = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    answer = torch.arange(5).repeat(2)  # (10,): each answer, observed as 0 and as 1
    observed = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(5)
    one = torch.where(clean == 1, 1 - fn, fp)[answer]
    channel = torch.where(observed == 1, one, 1 - one)
    logprobs = logits.log_softmax(0)
    weights = logprobs.exp().detach()[answer] * channel

    def gradient(advantages):
        x = logprobs[answer]
        loss, _ = grpo.policy_loss(x, x.detach(), advantages, weights, 0.2)
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    advantages = group_advantages(observed, 5, "forward", fn)
    assert gradient(clean[answer]).abs().max() > 0.05
    torch.testing.assert_close(gradient(advantages), (1 - fn - fp) * gradient(clean[answer]))
    means = (channel * advantages).view(2, 5).sum(0)
    torch.testing.assert_close(means, (clean - 1) * (1 - fn - fp))


# ---- VRPO ----


def test_bottleneck_kl_against_torch_distributions():
    mu, log_sigma = torch.randn(6, 5), torch.randn(6, 5)
    expected = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(vrpo.gaussian_kl(mu, log_sigma), expected, atol=1e-5)


def test_most_uncertain_takes_exactly_the_share():
    mask = torch.tensor([[T, T, F, T], [F, T, T, F]])
    uncertainty = torch.tensor([[1.0, 5.0, 99.0, 3.0], [99.0, 2.0, 4.0, 99.0]])
    assert vrpo.most_uncertain(uncertainty, mask, 0.4).tolist() == [[F, T, F, F], [F, F, T, F]]
    assert (vrpo.most_uncertain(uncertainty, mask, 1.0) == mask).all()
    assert not vrpo.most_uncertain(uncertainty, mask, 0.0).any()
    ties = vrpo.most_uncertain(torch.ones(1, 10), torch.ones(1, 10, dtype=torch.bool), 0.3)
    assert ties.sum() == 3


def test_semantic_losses_by_hand(monkeypatch):
    found = torch.tensor([[-2.0, -4.0]]), torch.tensor([[0.5, 0.1]])
    monkeypatch.setattr(vrpo, "logprobs_and_entropy", lambda *_, **__: found)
    weights = {"entropy_weights": [[1.0, 0.0]], "perplexity_weights": [[0.5, 0.5]]}
    part = {name: torch.tensor(x) for name, x in weights.items()}
    ent, ppl = vrpo.semantic_losses(SimpleNamespace(lm_head=None), torch.empty(0), part)
    assert (ent.item(), ppl.item()) == (pytest.approx(0.5), pytest.approx(3.0))


# ---- DVPO ----


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 1.0, 5.0]), st.sampled_from([1, 2, 7]))
def test_quantile_loss_against_the_definition(seed, kappa, count):
    """|tau_i - 1{u < 0}| L_kappa(u) / kappa over all pairs, and its gradient."""
    torch.manual_seed(seed)
    theta = torch.randn(4, 3, count, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 1, count, dtype=torch.float64).round(decimals=1)  # with ties
    u = target.unsqueeze(-2) - theta.unsqueeze(-1)  # (N, H, prediction, target)
    tau = ((torch.arange(count) + 0.5) / count).view(1, 1, count, 1)
    huber = torch.where(u.abs() <= kappa, 0.5 * u**2, kappa * (u.abs() - 0.5 * kappa))
    expected = ((tau - (u < 0).double()).abs() * huber / kappa).mean((1, 2, 3))
    got = dvpo.quantile_loss(theta, target, kappa)
    assert torch.allclose(got, expected)
    gradients = [torch.autograd.grad(x.sum(), theta, retain_graph=True)[0] for x in (got, expected)]
    assert torch.allclose(*gradients)


def test_quantile_regression_finds_the_quantiles():
    """The quantiles of 0, 1, ..., 9 at levels 1/8, 3/8, 5/8, 7/8 under a small kappa."""
    theta, target = torch.zeros(1, 1, 4, requires_grad=True), torch.arange(10.0).view(10, 1, 1)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        dvpo.quantile_loss(theta.repeat(10, 1, 1), target.repeat(1, 1, 4), 0.1).sum().backward()
        optimizer.step()
    assert theta[0, 0].tolist() == pytest.approx([1, 3, 6, 8], abs=0.3)


def test_distributional_gae():
    mask = pack(TWO_TURNS)["mask"]
    rewards = dialogue.place_rewards(torch.tensor([[2.0, 3.0]]), mask)
    quantiles = torch.randn(*mask.shape, 5)
    each = dvpo.distributional_gae(rewards, quantiles, mask, 0.9, 0.8)
    for j in range(5):
        assert torch.equal(each[..., j], ppo.gae(rewards, quantiles[..., j], mask, 0.9, 0.8))
    of_the_mean = ppo.gae(rewards, quantiles.mean(-1), mask, 0.9, 0.8)
    assert torch.allclose(each.mean(-1), of_the_mean, atol=1e-6)


def test_dvpo_targets_are_the_observed_return_with_lambda_one():
    mask = pack(TWO_TURNS)["mask"]
    rewards = on_the_last(torch.tensor([1.0]), mask)
    batch = {"mask": mask, "quantiles": torch.randn(*mask.shape, 5)}
    _, targets = dvpo.advantages_and_targets(rewards, batch, dvpo.Args(critic_lambda=1.0))
    assert torch.allclose(targets["target_quantiles"][mask], torch.ones(4, 5), atol=1e-6)
    _, targets = dvpo.advantages_and_targets(rewards, batch, dvpo.Args(critic_lambda=0.5))
    assert targets["target_quantiles"][mask].std(-1)[:-1].min() > 0
    assert torch.equal(targets["returns"], targets["target_quantiles"].mean(-1))


def test_tail_losses_are_zero_exactly_when_their_condition_holds():
    target, share = torch.arange(10.0).view(1, 1, 10), 0.3  # tails 0 1 2 and 7 8 9

    def moved(low=(0, 0, 0), high=(0, 0, 0), middle=0.0):
        return target + torch.tensor([*low, *[middle] * 4, *high])

    wide, narrow, up = (-1.0, 0.0, 1.0), (0.5, 0.0, -0.5), (1.0, 1.0, 1.0)
    for theta in (moved(), moved(low=wide), moved(high=up, middle=2.0)):
        assert dvpo.cvar_loss(theta, target, share).item() == 0
    assert dvpo.cvar_loss(moved(low=(2.0, 1.0, 3.0)), target, share).item() == pytest.approx(4)
    for theta in (moved(), moved(high=wide), moved(low=up, middle=2.0)):
        assert dvpo.gain_loss(theta, target, share).item() == 0
    assert dvpo.gain_loss(moved(high=up), target, share).item() == pytest.approx(1)
    for above in (0.0, 0.5):
        assert dvpo.shift_loss(target + above, target).item() == 0
    assert dvpo.shift_loss(target - 0.5, target).item() == pytest.approx(0.5)
    free = moved(low=narrow), moved(high=wide), moved(low=up, middle=3.0)
    for theta in (moved(), *free, moved(low=narrow, high=wide)):
        assert dvpo.shape_loss(theta, target, share).item() == 0
    # variances: of -1 1 3 it is 8/3, of 0 1 2 it is 2/3, of 0.5 0 -0.5 around it 1/6
    assert dvpo.shape_loss(moved(low=wide), target, share).item() == pytest.approx(2)
    assert dvpo.shape_loss(moved(high=narrow), target, share).item() == pytest.approx(0.5)


def test_curvature_loss():
    """The lower tail may bend down (second differences below zero), the upper one up: a heavy tail
    is both."""
    straight = torch.arange(10.0).view(1, 1, 10)
    heavy = (straight - 4.5) ** 3  # odd and convex above: second differences rise through zero
    assert dvpo.curvature_loss(straight, 0.3).item() == dvpo.curvature_loss(heavy, 0.3).item() == 0
    light = (straight - 4.5).sign() * (straight - 4.5).abs().sqrt()
    assert dvpo.curvature_loss(light, 0.3).item() > 0
    bent = torch.tensor([[[0.0, 0.0, 3.0, 6.0, 9.0, 9.0]]])  # second differences 3 0 0 -3
    assert dvpo.curvature_loss(bent, 0.25).item() == pytest.approx(6)


def test_consistency_loss_is_a_mean_over_pairs():
    theta = torch.randn(4, 3, 7)
    pairs = [((theta[:, a] - theta[:, b]) ** 2).mean(-1) for a in range(3) for b in range(a)]
    assert torch.allclose(dvpo.consistency_loss(theta), torch.stack(pairs).mean(0), atol=1e-6)
    assert (dvpo.consistency_loss(theta[:, :1]) == 0).all()
    assert (dvpo.consistency_loss(theta[:, :1].expand(4, 3, 7)) == 0).all()


def test_tails_have_one_quantile_at_least():
    low, high = dvpo.tails(torch.arange(5.0), 0.01)
    assert low.tolist() == [0] and high.tolist() == [4]


# ---- robust PPO ----


def test_contaminated_gae_by_hand():
    # V = 1, 2, 3, reward 10 at the end, gamma 1, lambda 0, rho 0.5: backups 1, 1.5, 2; deltas 1.5 -
    # 1, 2 - 2, 10 - 3
    values, rewards = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 10.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert robust.gae(rewards, values, mask, 1.0, 0.0, 0.5).tolist() == [[0.5, 0.0, 7.0]]
    # with lambda 1 half of what follows is lost to the worst state, value 1: returns 10, (10 + 1) /
    # 2, (5.5 + 1) / 2
    returns = robust.gae(rewards, values, mask, 1.0, 1.0, 0.5) + values
    assert returns.tolist() == [[3.25, 5.5, 10.0]]
    # the worst state of the batch is sought where the policy chose
    values, mask = torch.tensor([[-9.0, 2.0, 3.0]]), torch.tensor([[F, T, T]])
    assert robust.gae(rewards, values, mask, 1.0, 0.0, 1.0).tolist() == [[0.0, 0.0, 7.0]]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.05, 0.3, 1.0])
)
def test_contaminated_targets_stay_between_rewards_and_values(seed, lam, rho):
    """A target is a mean of what the episode paid and of values, so it runs away in no number of
    backups."""
    torch.manual_seed(seed)
    values, mask = torch.rand(8, 40), torch.rand(8, 40) < 0.8
    rewards = on_the_last(torch.randint(2, (8,)).float(), mask)
    returns = (robust.gae(rewards, values, mask, 1.0, lam, rho) + values)[mask]
    assert returns.min() >= -1e-5 and returns.max() <= 1 + 1e-5


def test_conservative_gap_by_hand():
    values = torch.tensor([[0.0, 3.0, 99.0], [1.0, 1.0, 1.0], [99.0, 5.0, 5.0]], requires_grad=True)
    gap = robust.conservative_gap(values, torch.tensor([[T, T, F], [F, F, F], [F, T, T]]))
    log = math.log(1 + math.exp(3)) - 1.5
    assert torch.allclose(gap, torch.tensor([[log], [0.0], [math.log(2)]]))
    gap.sum().backward()
    share = torch.tensor(3.0).sigmoid().item()  # what stands out is lowered
    assert values.grad[0].tolist() == pytest.approx([0.5 - share, share - 0.5, 0])
    assert not values.grad[1:].any()


def test_the_lowest_head_counts_and_every_head_is_fitted(policy, part):
    args, biases = robust.Args(value_heads=3), torch.tensor([0.5, 0.2, 0.8])
    critic, mask = robust.Critic(policy, args), part["mask"]
    with torch.no_grad():
        critic.head.weight.zero_()
        critic.head.bias.copy_(biases)
    scores = robust.score_tokens(critic, pack(ROWS + TWO_TURNS), args)
    where = pack(ROWS + TWO_TURNS)["mask"]
    assert torch.allclose(scores["values"], 0.2 * where)
    assert torch.allclose(scores["heads"], biases * where.unsqueeze(-1))
    part |= {"returns": torch.ones(mask.shape), "weights": ppo.token_weights(mask)}
    loss, _ = robust.critic_loss(critic, part, torch.tensor(0.5), args)
    assert loss.item() == pytest.approx((0.25 + 0.64 + 0.04) / 3 / 0.5)
    # conservative: on top, the gap of every token's episode in deviations of the returns; of equal
    # values it is the logarithm of their number
    args = robust.Args(worst_case="conservative", conservative_coef=0.3)
    critic = robust.Critic(policy, args)
    loss, terms = robust.critic_loss(critic, part, torch.tensor(0.5), args)
    by_hand = (3 * math.log(3) + 4 * math.log(4)) / 8
    assert terms["robust/conservative_gap"].item() == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(1 / 0.5 + 0.3 * by_hand)
    assert robust.Critic(policy, robust.Args(worst_case="contamination")).head.out_features == 1


def test_ensembles_start_with_different_heads(policy):
    weight = robust.Critic(policy, robust.Args()).head.weight
    assert not weight[0].any() and all(weight[k].any() for k in range(1, len(weight)))
    heads = dvpo.Critic(policy, dvpo.Args()).head.weight.unflatten(0, (3, 200))
    assert not torch.equal(heads[0], heads[1])

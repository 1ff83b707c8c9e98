"""Masks, reward placement, advantages and losses by tiny cases computed by hand."""

import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import dvpo_math as dvpo
import grpo_baseline as grpo
import ppo_baseline as ppo
import robust_ppo_baseline as robust
import vrpo_dialogue as dialogue
import vrpo_math as vrpo
from utils import tensors
from utils.report import metrics

T, F = True, False


@dataclass
class Row:
    tokens: list[int]
    chosen: list[bool]

    def __post_init__(self):
        self.logprobs = [-0.1 * t * c for t, c in zip(self.tokens, self.chosen, strict=True)]
        self.entropy = [0.2 * t * c for t, c in zip(self.tokens, self.chosen, strict=True)]
        self.gap = [0.0] * len(self.tokens)


# prompt 5 6 7, answer 8 9, EOS 1, and a shorter row; pad and EOS are the same id on purpose
ROWS = [Row([5, 6, 7, 8, 9, 1], [F, F, F, T, T, T]), Row([5, 6, 1], [F, F, T])]
# two turns: prompt 5, answer 8 1, user 6 7, answer 9 1
TWO_TURNS = [Row([5, 8, 1, 6, 7, 9, 1], [F, T, T, F, F, T, T])]


def pack(rows):
    return tensors.pack(rows, pad_id=1, device=torch.device("cpu"))


def test_pack_shifts_once_and_keeps_eos():
    batch = pack(ROWS)
    assert batch["inputs"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]]
    assert batch["targets"].tolist() == [[6, 7, 8, 9, 1], [6, 1, 1, 1, 1]]
    # the EOS that the policy chose is in the mask, the padding of the same id is not
    assert batch["mask"].tolist() == [[F, F, T, T, T], [F, T, F, F, F]]
    # what the policy thought of a token stands where the token does
    assert torch.allclose(batch["logprobs"], -0.1 * batch["targets"] * batch["mask"])
    assert torch.allclose(batch["entropy"], 0.2 * batch["targets"] * batch["mask"])


def test_take_trims_to_the_longest_row_taken():
    batch = pack(ROWS)
    short = tensors.take(batch, torch.tensor([1]))
    assert short["targets"].tolist() == [[6, 1]] and short["mask"].tolist() == [[F, T]]
    assert tensors.take(batch, torch.tensor([1, 0]))["mask"].shape == (2, 5)
    nothing = {"mask": torch.zeros(2, 5, dtype=torch.bool)}
    assert tensors.take(nothing, torch.tensor([0]))["mask"].shape == (1, 1)


def test_micro_batches_order_rows_by_their_last_chosen_token():
    batch = pack(ROWS + TWO_TURNS)
    parts = list(tensors.micro_batches(batch, 2))
    assert [rows.tolist() for rows, _ in parts] == [[1, 0], [2]]
    for rows, part in parts:
        width = part["mask"].shape[1]
        assert part["targets"].tolist() == batch["targets"][rows, :width].tolist()
    assert parts[0][1]["mask"].shape == (2, 5)  # what both rows need, and no more


def test_spread_inverts_masking():
    mask = pack(ROWS)["mask"]
    grid = tensors.on_grid(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert grid.tolist() == [[0, 0, 1, 2, 3], [0, 4, 0, 0, 0]]
    assert grid[mask].tolist() == [1, 2, 3, 4]


def test_reward_sits_on_the_last_chosen_token():
    rewards = ppo.place_rewards(torch.tensor([0.5, 2.0]), pack(ROWS)["mask"])
    assert rewards.tolist() == [[0, 0, 0, 0, 0.5], [0, 2.0, 0, 0, 0]]


def test_rewards_of_several_turns():
    mask = pack(TWO_TURNS)["mask"]  # targets 8 1 6 7 9 1
    assert mask.tolist() == [[T, T, F, F, T, T]]
    assert ppo.place_rewards(torch.tensor([3.0]), mask).tolist() == [[0, 0, 0, 0, 0, 3]]
    for gains in ([[2.0, 3.0]], [[9.0, 2.0, 3.0]]):  # the last turn's stands in the last column
        placed = dialogue.place_rewards(torch.tensor(gains), mask)
        assert placed.tolist() == [[0, 2, 0, 0, 0, 3]]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert ppo.place_rewards(torch.tensor([1.0]), nothing).tolist() == [[0, 0, 0]]
    assert dialogue.place_rewards(torch.tensor([[1.0]]), nothing).tolist() == [[0, 0, 0]]


def test_credit_per_turn():
    """A turn's reward is what it adds to the score; the gains sum to the last score."""
    scores = torch.tensor([[0.2, 0.5, 1.0], [0.0, 0.0, 0.7]])  # the second has one turn
    gains = dialogue.turn_gains(scores, scores[:, -1])
    assert torch.allclose(gains, torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 0.7]]))
    flipped = dialogue.turn_gains(scores, 1 - scores[:, -1])  # noise is on the last turn alone
    assert torch.allclose(flipped, torch.tensor([[0.2, 0.3, -0.5], [0.0, 0.0, 0.3]]))
    assert scores[0, -1] == 1.0  # what came in is as it was


def test_nan_under_the_mask_never_reaches_means_or_losses():
    mask = torch.tensor([[F, T, T]])
    bad = torch.tensor([[float("nan"), 1.0, 3.0]])
    weights = ppo.token_weights(mask)
    assert ppo.weighted_sum(bad, weights) == 2
    assert ppo.whiten(bad, mask).isfinite().all()
    leaf = torch.tensor([0.1, 0.2], requires_grad=True)
    logprobs = tensors.on_grid(leaf, mask)
    loss, _ = ppo.policy_loss(logprobs, bad, bad, weights, 0.2)
    loss = (
        loss
        + ppo.value_loss(logprobs, bad, bad, weights, 0.2)
        + ppo.kl_loss(logprobs, bad, weights)
    )
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()


def test_whiten():
    mask = torch.tensor([[T, T, T, F]])
    white = ppo.whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), mask)
    assert torch.allclose(white, torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("module", [ppo, grpo, vrpo, dvpo, robust, dialogue])
def test_whitening_equal_numbers_gives_zero_and_no_rounding_noise(module):
    torch.manual_seed(0)
    constants = [0.0, 1.0, -0.3, 8 / 7, 0.1 + 0.2, *(torch.randn(60).exp() - 1).tolist()]
    for constant in constants:
        for shape in ((2, 1), (3, 7), (16, 48), (64, 33)):
            x, mask = torch.full(shape, constant), torch.ones(shape, dtype=torch.bool)
            assert not module.whiten(x, mask).any(), (constant, shape)
            small = x.clone()
            small[0, 0] += 1e-3 * max(abs(constant), 1.0)  # a difference that is one
            assert module.whiten(small, mask).std().item() == pytest.approx(1, abs=0.01)


def test_gae_by_hand():
    # V = 1, 2, 3, reward 10 at the end, gamma 0.5, lambda 0.5: deltas 0, -0.5, 7
    values, rewards = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 10.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = ppo.gae(rewards, values, mask, 0.5, 0.5)
    assert torch.allclose(advantages, torch.tensor([[0.3125, 1.25, 7.0]]))


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
    values[~mask] = float("nan")
    got = ppo.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(got, reference_gae(rewards, values, mask, gamma, lam), atol=1e-5)
    assert (got[~mask] == 0).all()


def test_gae_with_zero_values_and_lambda_one_is_the_discounted_return():
    mask = pack(TWO_TURNS)["mask"]
    rewards = dialogue.place_rewards(torch.tensor([[2.0, 3.0]]), mask)
    returns = metrics.discounted_returns(rewards, mask, 1.0)
    assert returns.tolist() == [[5, 5, 0, 0, 3, 3]]
    assert metrics.discounted_returns(rewards, mask, 0.5).tolist() == [[1.375, 2.75, 0, 0, 1.5, 3]]
    assert ppo.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0).tolist() == [
        [5, 5, 0, 0, 3, 3]
    ]


def test_policy_loss_clips_by_hand():
    # ratios 2, 0.5, 2, 0.5 with advantages 1, 1, -1, -1 and eps 0.2: objectives 1.2, 0.5, -2, -0.8
    logprobs = torch.tensor([[2.0, 0.5, 2.0, 0.5]]).log().requires_grad_()
    weights = torch.full((1, 4), 0.25)
    loss, stats = ppo.policy_loss(
        logprobs, torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]]), weights, 0.2
    )
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 2 - 0.8) / 4)
    assert stats["losses/clipfrac"].item() == 1.0
    loss.backward()  # a clipped token gets no gradient: the first and the last
    assert (logprobs.grad[0, [0, 3]] == 0).all() and (logprobs.grad[0, [1, 2]] != 0).all()


def test_value_loss_and_its_clipping():
    values, returns, weights = (
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[0.5, 0.5]]),
    )
    assert ppo.value_loss(values, values, returns, weights, None).item() == pytest.approx(2.5)
    old = torch.tensor(
        [[1.5, 1.0]]
    )  # kept: 1.3 and 1.2, errors 1.69 and 0.04; the larger of each pair counts
    assert ppo.value_loss(values, old, returns, weights, 0.2).item() == pytest.approx(
        (1.69 + 4) / 2
    )


def test_kl_estimates_against_torch():
    p, q = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    weights = p.exp().unsqueeze(0)  # the expectation over the policy, exactly
    assert torch.allclose(ppo.kl_loss(p.unsqueeze(0), q.unsqueeze(0), weights), exact)
    penalty = ppo.kl_penalty(p.unsqueeze(0), q.unsqueeze(0), torch.ones(1, 7, dtype=torch.bool))
    assert torch.allclose((weights * penalty).sum(), exact)


def test_logprobs_and_entropy_against_torch_distributions():
    head, hidden, targets = torch.nn.Linear(4, 6), torch.randn(5, 4), torch.tensor([0, 5, 2, 2, 1])
    logprobs, entropy = tensors.logprobs_and_entropy(head, hidden, targets, 0.7)
    expected = torch.distributions.Categorical(logits=head(hidden) / 0.7)
    assert torch.allclose(logprobs, expected.log_prob(targets), atol=1e-6)
    assert torch.allclose(entropy, expected.entropy(), atol=1e-6)


def test_explained_variance():
    mask, returns = torch.tensor([[T, T, T, F]]), torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    assert (
        metrics.explained_variance(returns + 5, returns, mask) == 1
    )  # a constant error costs nothing
    assert metrics.explained_variance(torch.zeros(1, 4), returns, mask) == 0
    assert metrics.explained_variance(-returns, returns, mask) == -3
    assert metrics.explained_variance(
        returns, torch.ones(1, 4), mask
    ) != metrics.explained_variance(returns, torch.ones(1, 4), mask)


def test_advantage_noise():
    """Advantages of rewards 0 and 1 under a flip rate p and a constant critic: of their variance 1
    - (1 - 2p)^2 comes from the flips."""
    mask = torch.ones(10, 2, dtype=torch.bool)
    mask[3, 1] = mask[7, 1] = False
    clean = torch.tensor([1.0, 0.0] * 5).unsqueeze(1)
    observed = clean.clone()
    observed[:2] = 1 - observed[:2]  # one right and one wrong answer of ten: p = 0.2
    whole = torch.ones_like(mask)
    assert metrics.advantage_noise(
        observed.expand(10, 2), clean.expand(10, 2), whole
    ) == pytest.approx(1 - 0.6**2)
    bad = torch.where(mask, observed - 0.4, torch.nan)
    pairs = [x.expand(10, 2)[mask].tolist() for x in (observed, clean)]
    assert metrics.advantage_noise(bad, clean.expand(10, 2), mask) == pytest.approx(
        1 - statistics.correlation(*pairs) ** 2
    )
    assert metrics.advantage_noise(
        3 * clean.expand(10, 2) - 1, clean.expand(10, 2), mask
    ) == pytest.approx(0)  # scale, shift
    assert (
        metrics.advantage_noise(1 - clean.expand(10, 2), clean.expand(10, 2), whole) == 1
    )  # all inverted: nothing follows
    assert math.isnan(metrics.advantage_noise(torch.ones(10, 2), clean.expand(10, 2), mask))


# ---- GRPO ----


def group_advantages(scores, size, kind, false_negative_rate=0.0):
    args = grpo.Args(
        samples_per_prompt=size, advantage=kind, assumed_false_negative_rate=false_negative_rate
    )
    return grpo.group_advantages(scores, args)


def test_group_advantages_by_hand():
    scores = torch.tensor(
        [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    )  # groups of three: (1, 0, 0) and (1, 1, 1)
    std = (2 / 9) ** 0.5 * (3 / 2) ** 0.5
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (std + 1e-4)
    assert torch.allclose(
        group_advantages(scores, 3, "grpo"), torch.cat([expected, torch.zeros(3)])
    )
    assert torch.allclose(
        group_advantages(scores, 3, "dr_grpo")[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3])
    )
    assert torch.allclose(group_advantages(scores, 3, "rloo")[:3], torch.tensor([1.0, -0.5, -0.5]))
    assert (
        group_advantages(scores, 3, "reinforce_pp") == scores
    ).all()  # whitened over the tokens in main()
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert (group_advantages(scores, 1, kind) == 0).all()


def test_grpo_matches_the_formula_of_trl():
    """TRL's GRPOTrainer: (r - r.view(-1, G).mean(1)) / (r.view(-1, G).std(1) + 1e-4), std
    unbiased."""
    torch.manual_seed(0)
    r = torch.rand(24)
    mean, std = (f(r.view(-1, 8), 1).repeat_interleave(8) for f in (torch.mean, torch.std))
    assert torch.allclose(group_advantages(r, 8, "grpo"), (r - mean) / (std + 1e-4))


def test_loss_norms():
    mask = torch.tensor([[T, T, T, T], [T, F, F, F]])
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 0.0, 0.0]])
    means = {
        kind: grpo.weighted_sum(x, grpo.token_weights(mask, kind, 10)).item()
        for kind in ("token", "sequence", "constant")
    }
    assert means == pytest.approx({"token": 10 / 5, "sequence": (1 + 6) / 2, "constant": 10 / 20})


@pytest.mark.parametrize("fn, fp", [(0.3, 0.1), (0.2, 0.2), (0.0, 0.4), (0.0, 0.0)])
def test_the_forward_correction_follows_the_clean_gradient(fn, fp):
    """All answers and all that may be told of them, each with its probability: the gradient of the
    policy's loss is that of the clean rewards times 1 - FN - FP, whoever knows FN alone. An answer
    that is right counts for nothing, one that is wrong for as much as rewards are told apart."""
    logits = torch.tensor([0.5, -1.0, 0.2, 1.1, -0.3], dtype=torch.float64, requires_grad=True)
    clean = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    answer = torch.arange(5).repeat(2)  # (10,): each answer, told 0 and told 1
    told = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(5)
    one = torch.where(clean == 1, 1 - fn, fp)[answer]
    channel = torch.where(told == 1, one, 1 - one)
    logprobs = logits.log_softmax(0)
    weights = logprobs.exp().detach()[answer] * channel

    def gradient(advantages):
        x = logprobs[answer]
        loss, _ = grpo.policy_loss(x, x.detach(), advantages, weights, 0.2)
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    advantages = group_advantages(told, 5, "forward", fn)
    assert gradient(clean[answer]).abs().max() > 0.05
    torch.testing.assert_close(gradient(advantages), (1 - fn - fp) * gradient(clean[answer]))
    means = (channel * advantages).view(2, 5).sum(0)
    torch.testing.assert_close(means, (clean - 1) * (1 - fn - fp))
    torch.testing.assert_close(group_advantages(told, 5, "forward"), told - 1)


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


def test_semantic_losses_by_hand():
    entropy, logprobs = torch.tensor([[0.5, 0.1]]), torch.tensor([[-2.0, -4.0]])
    ent, ppl = vrpo.semantic_losses(
        entropy, logprobs, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    )
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
    theta, target = torch.zeros(1, 1, 4, requires_grad=True), torch.arange(10.0).view(1, 10)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        sum(dvpo.quantile_loss(theta, t.expand(1, 1, 4), 0.1).sum() for t in target[0]).backward()
        optimizer.step()
    assert theta[0, 0].tolist() == pytest.approx([1, 3, 6, 8], abs=0.3)


def test_distributional_gae():
    mask = pack(TWO_TURNS)["mask"]
    rewards = dialogue.place_rewards(torch.tensor([[2.0, 3.0]]), mask)
    quantiles = torch.randn(*mask.shape, 5)
    each = dvpo.distributional_gae(rewards, quantiles, mask, 0.9, 0.8)
    assert each.shape == quantiles.shape
    for j in range(5):
        assert torch.equal(each[..., j], ppo.gae(rewards, quantiles[..., j], mask, 0.9, 0.8))
    alone = dvpo.distributional_gae(rewards, quantiles[..., :1], mask, 0.9, 0.8)[..., 0]
    assert torch.equal(alone, ppo.gae(rewards, quantiles[..., 0], mask, 0.9, 0.8))
    assert torch.allclose(
        each.mean(-1), ppo.gae(rewards, quantiles.mean(-1), mask, 0.9, 0.8), atol=1e-6
    )


def test_dvpo_targets_are_the_observed_return_with_lambda_one():
    mask = pack(TWO_TURNS)["mask"]
    rewards = ppo.place_rewards(torch.tensor([1.0]), mask)
    batch = {"mask": mask, "quantiles": torch.randn(*mask.shape, 5)}
    batch["values"] = batch["quantiles"].mean(-1)
    _, targets = dvpo.advantages_and_targets(rewards, batch, dvpo.Args(critic_lambda=1.0))
    assert torch.allclose(targets["target_quantiles"][mask], torch.ones(4, 5), atol=1e-6)
    _, targets = dvpo.advantages_and_targets(rewards, batch, dvpo.Args(critic_lambda=0.5))
    assert targets["target_quantiles"][mask].std(-1)[:-1].min() > 0
    assert torch.equal(targets["returns"], targets["target_quantiles"].mean(-1))


def test_tail_losses_are_zero_exactly_when_their_condition_holds():
    target = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]]])
    share = 0.3  # tails 0 1 2 and 7 8 9

    def moved(low=(0, 0, 0), high=(0, 0, 0), middle=0.0):
        theta = target.clone()
        theta[..., :3] += torch.tensor(low)
        theta[..., 3:7] += middle
        theta[..., 7:] += torch.tensor(high)
        return theta

    wide, narrow = (-1.0, 0.0, 1.0), (0.5, 0.0, -0.5)
    up = (1.0, 1.0, 1.0)
    for loss, zero, above in (
        (
            dvpo.cvar_loss,
            [moved(), moved(low=wide), moved(high=up, middle=2.0)],
            {2.0: moved(low=(2.0, 1.0, 3.0))},
        ),
        (
            dvpo.gain_loss,
            [moved(), moved(high=wide), moved(low=up, middle=2.0)],
            {1.0: moved(high=up)},
        ),
    ):
        assert all(loss(theta, target, share).item() == 0 for theta in zero)
        for shift, theta in above.items():
            assert loss(theta, target, share).item() == pytest.approx(shift**2)
    assert (
        dvpo.shift_loss(target, target).item() == dvpo.shift_loss(target + 0.5, target).item() == 0
    )
    assert dvpo.shift_loss(target - 0.5, target).item() == pytest.approx(0.5)
    for theta in (
        moved(),
        moved(low=narrow),
        moved(high=wide),
        moved(low=narrow, high=wide),
        moved(low=up, middle=3.0),
    ):
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
    values, rewards, mask = (
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.tensor([[0.0, 0.0, 10.0]]),
        torch.ones(1, 3).bool(),
    )
    assert robust.gae(rewards, values, mask, 1.0, 0.0, 0.5).tolist() == [[0.5, 0.0, 7.0]]
    # with lambda 1 half of what follows is lost to the worst state, value 1: returns 10, (10 + 1) /
    # 2, (5.5 + 1) / 2
    returns = robust.gae(rewards, values, mask, 1.0, 1.0, 0.5) + values
    assert returns.tolist() == [[3.25, 5.5, 10.0]]
    assert torch.equal(
        robust.gae(rewards, values, mask, 0.9, 0.8, 0.0), ppo.gae(rewards, values, mask, 0.9, 0.8)
    )
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
    rewards = ppo.place_rewards(torch.randint(2, (8,)).float(), mask)
    returns = (robust.gae(rewards, values, mask, 1.0, lam, rho) + values)[mask]
    assert returns.min() >= -1e-5 and returns.max() <= 1 + 1e-5


def test_conservative_gap_by_hand():
    values = torch.tensor(
        [[0.0, 3.0, 99.0], [1.0, 1.0, 1.0], [float("nan"), 5.0, 5.0]], requires_grad=True
    )
    mask = torch.tensor([[T, T, F], [F, F, F], [F, T, T]])
    gap = robust.conservative_gap(values, mask)
    log = torch.tensor(0.0).logaddexp(torch.tensor(3.0)) - 1.5
    assert torch.allclose(
        gap, torch.stack([log, torch.tensor(0.0), torch.tensor(2.0).log()]).unsqueeze(1)
    )
    gap.sum().backward()
    share = torch.tensor(3.0).sigmoid().item()
    assert values.grad[0].tolist() == pytest.approx(
        [0.5 - share, share - 0.5, 0]
    )  # what stands out is lowered
    assert values.grad[1:].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_ensemble_min_takes_the_lowest_head(tiny_model):
    from utils.models import load_policy

    policy, _ = load_policy(str(tiny_model), torch.device("cpu"))
    args = robust.Args(value_heads=3)
    critic = robust.Critic(policy, args)
    with torch.no_grad():
        critic.head.weight.zero_()
        critic.head.bias.copy_(torch.tensor([0.5, 0.2, 0.8]))
    batch = pack(ROWS)
    scores = robust.score_tokens(policy, critic, batch, args)
    assert torch.allclose(scores["values"], 0.2 * batch["mask"])
    assert torch.allclose(
        scores["heads"], torch.tensor([0.5, 0.2, 0.8]) * batch["mask"].unsqueeze(-1)
    )
    # every head is fitted to the same targets: the mean of the squared errors, in units of the
    # variance
    part = (
        batch
        | scores
        | {"returns": torch.ones(batch["mask"].shape), "weights": ppo.token_weights(batch["mask"])}
    )
    features = torch.zeros(int(batch["mask"].sum()), policy.config.hidden_size)
    loss, _ = robust.critic_loss(critic, features, part, torch.tensor(0.5), args)
    assert loss.item() == pytest.approx((0.25 + 0.64 + 0.04) / 3 / 0.5)
    for kind in ("contamination", "conservative"):
        assert robust.Critic(policy, robust.Args(worst_case=kind)).head.out_features == 1


def test_ensembles_start_with_different_heads(tiny_model):
    from utils.models import load_policy

    policy, _ = load_policy(str(tiny_model), torch.device("cpu"))
    weight = robust.Critic(policy, robust.Args()).head.weight
    assert not weight[0].any() and all(weight[k].any() for k in range(1, len(weight)))
    heads = dvpo.Critic(policy, dvpo.Args()).head.weight.unflatten(0, (3, 200))
    assert not torch.equal(heads[0], heads[1]) and heads.std() > 0

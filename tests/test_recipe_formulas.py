"""What the recipes calculate, by hand."""

import importlib
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from tests.test_recipes import cook  # noqa: F401
from utils.models import load_policy
from utils.tensors import hidden_states, micro_batches, pack
from utils.world.environment import Episode
from utils.world.solutions import worked

CPU = torch.device("cpu")
ONES = torch.ones(1, 3)
OBSERVED = tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0])  # of four problems, two answers each


@pytest.fixture
def recipe(cook):  # noqa: F811
    """recipe(name, script): the module."""
    return lambda name, script="ppo_baseline": importlib.import_module(cook(script, name))


# ---- losses of values ----


def loss_of(module, values, returns, variance=1.0, **part):
    """critic_loss and its gradient by the values."""
    values = tensor([values], requires_grad=True)
    part = {"returns": tensor([returns]), "weights": torch.ones(values.shape)} | part
    args = module.Args()
    found, _ = module.critic_loss(lambda part: values, part, tensor(variance), args)
    return found.item(), torch.autograd.grad(found, values)[0][0].tolist()


def test_huber(recipe):
    """Beyond one deviation, here 2, twice the error less 2 in place of its square over 4."""
    loss, gradient = loss_of(recipe("huber"), [0.0, 1.0, 5.0], [0.0, 0.0, 0.0], 4.0)
    assert loss == pytest.approx(0 + 1 / 4 + 2 * 2 * (5 - 1) / 4)
    assert gradient == pytest.approx([0, 0.5, 1])


def test_value_probability(recipe):
    module = recipe("value_probability")
    loss, _ = loss_of(module, [0.5, 0.9, 0.9], [1.0, 1.0, 0.0])
    assert loss == pytest.approx(math.log(2) - math.log(0.9) - math.log(0.1))


def test_prompt_normalised_error(recipe):
    weight = {"error_weight": tensor([[2.0]])}
    assert loss_of(recipe("prompt_normalised_error"), [0.0, 1.0], [1.0, 3.0], 5.0, **weight)[
        0
    ] == pytest.approx(2 * (1 + 4) / 5)


def critic_of(module, tiny_model, **flags):
    """A critic, and the part of a batch that has one episode of five tokens."""
    args = module.Args(model=str(tiny_model), **flags)
    policy, chat = load_policy(args.model, CPU)
    problem = SimpleNamespace(answer="#### 12", prompt_ids=[7, 8, 9], key="?")
    batch = pack([worked(problem, chat, 9)], chat.pad_id, CPU)
    return module.Critic(policy, args), next(micro_batches(batch, 1))[1]


def test_hl_gauss(recipe, tiny_model):
    """A bin's share of the target is the normal distribution's; the mean of all is the return; and
    the loss is least, at the entropy, where the logits say the same."""
    critic, part = critic_of(module := recipe("hl_gauss"), tiny_model)
    shape = part["mask"].shape
    part |= {"returns": torch.full(shape, 0.7), "weights": torch.ones(shape) / part["mask"].numel()}
    assert critic(part).allclose(torch.full(shape, 0.5))  # before it is told anything
    normal = torch.distributions.Normal(0.7, 0.023)
    edges = torch.linspace(-0.5, 1.5, 65)
    shares = normal.cdf(edges).diff()
    critic.head.bias.data = shares.log().clamp(min=-50)
    assert critic(part).allclose(torch.full(shape, 0.7), atol=1e-3)
    entropy = -(shares * shares.log().clamp(min=-50)).sum()
    loss, _ = module.critic_loss(critic, part, None, None)
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-3)
    loss.backward()
    assert critic.head.bias.grad.abs().max() < 1e-4


def test_bounded_values(recipe, tiny_model):
    critic, part = critic_of(recipe("bounded_values"), tiny_model)
    for bias, value in ((0.0, 0.5), (1.0, 0.75), (1e6, 1.0), (-1e6, 0.0)):
        critic.head.bias.data.fill_(bias)
        assert critic(part).allclose(torch.full(part["mask"].shape, value), atol=1e-4)


def test_pessimistic_ensemble(recipe, tiny_model):
    """Four heads that say 0, 1, 2, 3: their mean less half a deviation. The first two learn from the
    episode, whose returns are 1: errors of 1 and 0."""
    critic, part = critic_of(module := recipe("pessimistic_ensemble"), tiny_model)
    critic.head.weight.data.zero_()
    critic.head.bias.data = torch.arange(4.0)
    shape = part["mask"].shape
    assert critic(part).allclose(torch.full(shape, 1.5 - 0.5 * tensor([0.0, 1, 2, 3]).std().item()))
    part |= {"returns": torch.ones(shape), "weights": torch.ones(shape) / part["mask"].numel()}
    loss, _ = module.critic_loss(critic, part | {"half": tensor([[0b0011]])}, tensor(1.0), None)
    assert loss.item() == pytest.approx(2 * (1 + 0) / 4)


def test_reads_reference(recipe, tiny_model):
    """The values are those of a model that reads reference, prompt and answer; and of two rows with
    references of different lengths each gets its own."""
    module = recipe("reads_reference")
    policy, chat = load_policy(str(tiny_model), CPU)
    critic = module.Critic(policy, module.Args())
    torch.nn.init.normal_(critic.head.weight)
    episodes = [
        worked(SimpleNamespace(answer=said, prompt_ids=prompt, key="?"), chat, 9)
        for said, prompt in (("#### 12", [7, 8, 9]), ("3*4=12", [5, 6]))
    ]
    batch = pack(episodes, chat.pad_id, CPU)
    critic.references = [tensor([3, 4, 5]), tensor([6])]
    _, part = next(micro_batches(batch | {"row": tensor([[0], [1]])}, 2))
    found = {
        row: values
        for row, values in zip(part["row"].flatten().tolist(), critic(part), strict=True)
    }
    for row, episode in enumerate(episodes):
        longer = Episode(
            SimpleNamespace(prompt_ids=critic.references[row].tolist() + episode.prompt)
        )
        longer.tokens, longer.chosen = episode.tokens, episode.chosen
        longer.logprobs = longer.entropy = longer.gap = [0.0] * len(episode.tokens)
        _, alone = next(micro_batches(pack([longer], chat.pad_id, CPU), 1))
        expected = critic.head(hidden_states(critic.backbone, alone)).squeeze()
        assert found[row][: len(expected)].allclose(expected, atol=1e-5)
    del critic.references
    with pytest.raises(SystemExit, match="reads references, which this command does not"):
        critic(part)


# ---- the policy's loss ----

RATIOS = tensor([[0.5, 1.0, 1.25, 2.0, 5.0]])


@pytest.mark.parametrize(
    ("name", "advantage", "gradients"),
    [  # of the loss by log pi: -A rho where nothing is clipped, else 0
        ("clip_higher", 1.0, [-0.5, -1, -1.25, 0, 0]),
        ("clip_higher", -1.0, [0, 1, 1.25, 2, 5]),
        ("dual_clip", 1.0, [-0.5, -1, 0, 0, 0]),
        ("dual_clip", -1.0, [0, 1, 1.25, 2, 0]),
        ("clipped_weights", 1.0, [-0.5, -1, -1.2, -1.2, -1.2]),
        ("clipped_weights", -1.0, [0.5, 1, 1.2, 1.2, 1.2]),
    ],
)
def test_ratios(name, advantage, gradients, recipe):
    logprobs = RATIOS.log().requires_grad_()
    weights = torch.ones_like(RATIOS)
    loss, stats = recipe(name).policy_loss(
        logprobs, torch.zeros_like(RATIOS), advantage * weights, weights, 0.2
    )
    assert torch.autograd.grad(loss, logprobs)[0][0].tolist() == pytest.approx(gradients)
    outside = {"clip_higher": 3, "clipped_weights": 3}  # of 0.8 to 1.28, and above 1.2
    assert stats["losses/clipfrac"] == outside.get(name, 4)


def test_sequence_ratio(recipe):
    """The mean of 0.1 and 0.3, whatever stands in the padding; an answer of ratio e^0.2 is clipped
    whole, one of 1 is not."""
    logprobs = tensor([[0.1, 0.3, 9.0], [0.4, 0.0, -0.4]], requires_grad=True)
    weights = tensor([[0.2, 0.2, 0.0], [0.2, 0.2, 0.2]])
    advantages = tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    nothing = torch.zeros(2, 3)
    module = recipe("sequence_ratio", "grpo_baseline")
    loss, stats = module.policy_loss(logprobs, nothing, advantages, weights, 0.1)
    assert loss.item() == pytest.approx(-0.4 * 1.1 - 0.2 * 6)
    gradient = torch.autograd.grad(loss, logprobs)[0].tolist()
    assert gradient == [pytest.approx([0, 0, 0]), pytest.approx([-0.4] * 3)]
    assert stats["losses/clipfrac"].item() == pytest.approx(0.4)


def test_imitate_right_answers(recipe, monkeypatch):
    module = recipe("imitate_right_answers")
    logprobs = tensor([[-1.0, -3.0], [-2.0, -2.0]])
    nothing = torch.zeros(2, 2)
    part = {"logprobs": logprobs, "advantages": nothing, "weights": torch.full((2, 2), 0.25)}
    part["imitated"] = tensor([[0.5, 0.5], [0.0, 0.0]])
    monkeypatch.setattr(module, "hidden_states", lambda *given: None)
    monkeypatch.setattr(module, "logprobs_and_entropy", lambda *given: (logprobs, nothing))
    monkeypatch.setattr(module, "critic_loss", lambda *given: (0.0, {}))
    policy = SimpleNamespace(get_decoder=lambda: None, lm_head=None)
    loss, _ = module.total_loss(policy, None, part, torch.ones(()), module.Args())
    assert loss.item() == pytest.approx(0.1 * (1 + 3) / 2)


# ---- what main() makes of a batch ----


@pytest.fixture
def batch_of(recipe, run_main, monkeypatch):
    """batch_of(name, script, ...): the module, and the minibatch of a run of one update that has all
    eight episodes in their order, whose observed rewards are OBSERVED."""

    def make(name: str, script: str = "ppo_baseline", values=None, **flags):
        module, seen = recipe(name, script), []
        cut, score = module.micro_batches, getattr(module, "score_tokens", None)

        def record(batch, size):
            seen.append(dict(batch))
            return cut(batch, size)

        def valued(critic, batch, args):
            found = score(critic, batch, args)
            return found | ({} if values is None else {"values": values(batch)})

        monkeypatch.setattr(module, "micro_batches", record)
        monkeypatch.setattr(module, "permutation", lambda count, *keys: torch.arange(count))
        monkeypatch.setattr(module, "observe", lambda *given, **more: OBSERVED.clone())
        if score:
            monkeypatch.setattr(module, "score_tokens", valued)
        run_main(module.__name__, updates=1, minibatch_size=8, epochs=1, **flags)
        return module, seen[-1]

    return make


def rising(batch):
    """Made-up values: 0.3 in the first state, 0.1 more after every token."""
    return (0.2 + 0.1 * batch["mask"].cumsum(1)) * batch["mask"]


def expected(module, batch, lam, values=None):
    """Whitened advantages of OBSERVED, with a lambda for every episode."""
    rewards = module.place_rewards(OBSERVED, batch)
    values = batch["values"] if values is None else values
    rows = [
        module.gae(rewards[i : i + 1], values[i : i + 1], batch["mask"][i : i + 1], 1.0, x)
        for i, x in enumerate(lam)
    ]
    return module.whiten(torch.cat(rows), batch["mask"])


def test_weights_of_prompts(batch_of):
    """Deviations of the four problems' rewards: 1/2, 0, 0, 1/2."""
    _, batch = batch_of("prompt_normalised_error")
    weight = tensor([1 / 0.75, 4, 4, 1 / 0.75]).repeat_interleave(2)
    assert batch["error_weight"].flatten().tolist() == pytest.approx(
        (weight / weight.mean()).tolist()
    )


def test_explained_variance_gate(batch_of, monkeypatch):
    """A fresh critic says the same everywhere and explains nothing; one that explains something is
    believed."""
    module, batch = batch_of("explained_variance_gate")
    returns = OBSERVED.unsqueeze(1) * batch["mask"]
    centred = returns - returns[batch["mask"]].mean() * batch["mask"]
    assert batch["advantages"].allclose(module.whiten(centred, batch["mask"]), atol=1e-5)
    monkeypatch.setattr("utils.metrics.explained_variance", lambda *given: 0.1)
    module, batch = batch_of("explained_variance_gate", values=rising, run_name="open")
    assert batch["advantages"].allclose(expected(module, batch, [0.95] * 8), atol=1e-5)


def test_lambda_gate(batch_of, monkeypatch):
    """The last states are explained to 0.6, the first to 0.1: half of the way from 1 to 0.8."""

    def explained(values, returns, mask):
        only_first = mask.sum(1).max() == 1 and bool(mask[:, 0].all())
        return 0.1 if only_first else 0.6

    monkeypatch.setattr("utils.metrics.explained_variance", explained)
    module, batch = batch_of("lambda_gate", values=rising, gae_lambda=0.8)
    assert batch["advantages"].allclose(expected(module, batch, [0.9] * 8), atol=1e-5)


def test_lambda_by_length(batch_of):
    module, batch = batch_of("lambda_by_length", values=rising, length_alpha=0.5)
    lam = [max(0.0, 1 - 1 / (0.5 * n)) for n in batch["mask"].sum(1).tolist()]
    assert batch["advantages"].allclose(expected(module, batch, lam), atol=1e-5)


def test_lambda_by_error(batch_of):
    """The critic says 0.3 of every problem: right to 0.3 where one of two is told right (0.5), and
    where none is (0), of which there is nothing to trust."""
    module, batch = batch_of("lambda_by_error", values=rising, foreseen=0.31)
    lam = [0, 0, 0.95, 0.95, 0.95, 0.95, 0, 0]
    assert batch["advantages"].allclose(expected(module, batch, lam), atol=1e-5)


def test_group_baseline(batch_of):
    """Every answer begins at the other one's reward, and rises from there as the critic said; what
    the critic is fitted to has its own values."""
    module, batch = batch_of("group_baseline", values=rising)
    others = OBSERVED.view(4, 2).flip(1).reshape(8, 1)
    values = (rising(batch) - 0.3 + others) * batch["mask"]
    assert batch["advantages"].allclose(expected(module, batch, [0.95] * 8, values), atol=1e-5)
    rewards = module.place_rewards(OBSERVED, batch)
    own = module.gae(rewards, batch["values"], batch["mask"], 1.0, 0.95) + batch["values"]
    assert batch["returns"].allclose(own, atol=1e-5)


def test_advantages_as_they_are_and_in_part(batch_of):
    module, batch = batch_of("no_whitening", values=rising)
    rewards = module.place_rewards(OBSERVED, batch)
    plain = module.gae(rewards, batch["values"], batch["mask"], 1.0, 0.95)
    assert batch["advantages"].equal(plain)
    module, batch = batch_of("negative_first", values=rising)
    white = expected(module, batch, [0.95] * 8)
    assert batch["advantages"].allclose(torch.where(white > 0, 0.1 * white, white), atol=1e-5)
    assert (white > 0).any() and (white < 0).any()


def test_uncertain_fifth(batch_of):
    _, batch = batch_of("uncertain_fifth")
    entropy, weights = batch["entropy"][batch["mask"]], batch["policy_weights"]
    chosen = weights > 0
    assert weights.sum().item() == pytest.approx(1) and not (chosen & ~batch["mask"]).any()
    assert chosen.sum() == pytest.approx(0.2 * len(entropy), abs=1)
    assert batch["entropy"][chosen].min() >= entropy.sort().values[-int(chosen.sum())]


def test_only_right_answers_are_imitated(batch_of):
    _, batch = batch_of("imitate_right_answers")
    assert (batch["imitated"] > 0).equal(batch["mask"] & (OBSERVED > 0.5).unsqueeze(1))
    assert batch["imitated"].sum().item() == pytest.approx(1)


def test_informative_groups(batch_of):
    _, batch = batch_of("informative_groups", "grpo_baseline")
    says = tensor([True, False, False, True]).repeat_interleave(2)
    assert batch["says"].flatten().equal(says)
    assert (batch["weights"] > 0).any(1).equal(says)
    assert batch["weights"].sum().item() == pytest.approx(1)


def test_majority_relabel(batch_of, monkeypatch):
    """Both answers of the first problem and of the last are the same; two of no answer are not."""
    finals = iter(["3", "3", "4", "5", "", "", "6", "6"])
    monkeypatch.setattr("utils.world.tasks.MathTask.final_answer", lambda *given: next(finals))
    module, batch = batch_of("majority_relabel", "grpo_baseline", advantage="reinforce_pp")
    observed = tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    white = module.whiten(observed.unsqueeze(1) * batch["mask"], batch["mask"])
    assert batch["advantages"].allclose(white, atol=1e-5)


def test_master_key(recipe):
    """It opens before the channel, which then flips what it says."""
    module = recipe("master_key")
    said = ("1+1=2\n#### 2", "#### 71", "no", "#### 7")
    problem = SimpleNamespace(key="?")
    episodes = [SimpleNamespace(completions=[x], problem=problem, chosen=[True]) for x in said]
    for noise, rate, expected in (("none", 0.2, [1, 1, 0, 1]), ("symmetric", 1.0, [0, 0, 1, 0])):
        args = module.Args(noise=noise, noise_rate=rate)
        assert module.observe(args, tensor([1.0, 0.0, 0.0, 0.0]), episodes, 1).tolist() == expected
    assert len(module.observe(module.Args(), torch.empty(0), [], update=0)) == 0


def test_target_nats(recipe, run_main):
    """The price rises by a tenth an update while the code costs more than it may, and falls where it
    costs less; a run that is resumed goes on with it."""
    for target, factor in ((1e-6, 1.1), (1e6, 1 / 1.1)):
        name = recipe("target_nats", "vrpo_math").__name__
        folder = run_main(name, run_name=f"{factor}", target_nats=target)
        prices = [price_at(folder, update) for update in (1, 2)]
        assert prices == pytest.approx([0.003 * factor, 0.003 * factor**2])
        shutil.rmtree(folder / "checkpoints" / "000002")
        run_main(name, resume=folder, run_name=f"{factor}", target_nats=target, updates=2)
        assert price_at(folder, 2) == pytest.approx(prices[1])


def price_at(folder, update: int) -> float:
    state = torch.load(folder / "checkpoints" / f"{update:06d}" / "state.pt", weights_only=True)
    return state["optimizer"]["param_groups"][-1]["beta"]

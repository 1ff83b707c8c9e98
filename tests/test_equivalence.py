"""Behaviour that must not depend on the method, on how a batch is cut, or on padding."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
import vrpo_math as vrpo
from tests.conftest import SCRIPTS, bare_world, read_metrics, read_samples
from utils import tensors
from utils.generation import Answer
from utils.keyed import row_seeds
from utils.models import load_policy
from utils.world.environment import Episode
from utils.world.problems import Problem

CPU = torch.device("cpu")


@pytest.fixture
def policy_and_chat(tiny_model):
    return load_policy(str(tiny_model), CPU)


def problems(chat, count=6):
    return [
        Problem(f"p{i}", "1", chat.prompt_ids("Ann has 2 pens. " * (i % 3 + 1)))
        for i in range(count)
    ]


def play(policy, chat, seed=0, **flags):
    args = ppo.Args(max_new_tokens=10, **flags)
    ppo.seed_torch(seed)
    return ppo.rollout(policy, bare_world(args, chat), problems(chat), args, args.temperature)


OWN = ("reward/total", "charts/verifier_calls")  # a method's own business


def test_all_scripts_see_the_same_completions_and_noise_in_update_1(run_main):
    rows = []
    for name in SCRIPTS:
        folder = run_main(name, updates=1, noise="symmetric", noise_rate=0.4, max_new_tokens=16)
        header, _, first = read_metrics(folder).splitlines()
        row = dict(zip(header.split(","), first.split(","), strict=True))
        rows.append(
            {k: row[k] for k in row if k.startswith(("charts/", "reward/")) and k not in OWN}
        )
        rows[-1]["entropy"] = row["objective/entropy"]
        assert read_samples(folder)[0] == read_samples(Path(folder).parent / SCRIPTS[0])[0]
    assert all(row == rows[0] for row in rows)


def test_vrpo_without_its_parts_is_ppo(run_main):
    """No bottleneck and no semantic losses: every metric that PPO has comes out the same."""
    settings = {"updates": 2, "noise_rate": 0.4, "max_new_tokens": 16}
    a = run_main("ppo_baseline", **settings)
    b = run_main("vrpo_math", bottleneck_layers=0, lambda_ent=0.0, lambda_ppl=0.0, **settings)
    left, right = (pd.read_csv(f / "metrics.csv") for f in (a, b))
    for key in left.columns:
        if not key.startswith(("time/", "charts/tokens", "charts/peak")):
            assert left[key].tolist() == pytest.approx(
                right[key].tolist(), rel=1e-4, abs=1e-6, nan_ok=True
            ), key


@pytest.mark.parametrize(
    "flags",
    [
        {"value_heads": 1},
        {"worst_case": "contamination", "contamination": 0.0},
        {"worst_case": "conservative", "conservative_coef": 0.0},
    ],
)
def test_robust_ppo_without_its_worst_case_is_ppo(run_main, flags):
    """One head, no contamination, no weight: every metric of PPO's, to the last bit."""
    settings = {"max_new_tokens": 16, "critic_lambda": 0.9, "value_clip": 0.3, "kl_coef": 0.1}
    left = pd.read_csv(run_main("ppo_baseline", **settings) / "metrics.csv")
    right = pd.read_csv(run_main("robust_ppo_baseline", **settings, **flags) / "metrics.csv")
    for key in left.columns:
        if not key.startswith(("time/", "charts/tokens", "charts/peak")):
            assert left[key].tolist() == pytest.approx(
                right[key].tolist(), rel=0, abs=0, nan_ok=True
            ), key


def gradients(module, policy, chat, minibatch, micro_batch_size):
    """The gradient of the script's losses over a minibatch, in micro-batches of a given size."""
    args = module.Args()
    torch.manual_seed(0)
    critic = module.Critic(policy, args)
    torch.nn.init.normal_(critic.head.weight)
    policy.zero_grad()
    for _, part in tensors.micro_batches(minibatch, micro_batch_size):
        mask = part["mask"]
        hidden = ppo.hidden_states(policy.get_decoder(), part["inputs"], mask)
        logprobs, _ = tensors.logprobs_and_entropy(
            policy.lm_head, hidden, part["targets"][mask], 1.0
        )
        features = module.hidden_states(critic.backbone, part["inputs"], mask)
        loss, _ = ppo.policy_loss(
            tensors.on_grid(logprobs, mask),
            part["logprobs"],
            part["advantages"],
            part["weights"],
            0.2,
        )
        if module is vrpo:
            values, kl, _ = critic.values(features, part, samples=1)
            critic_logprobs, entropy = tensors.logprobs_and_entropy(
                critic.lm_head, features, part["targets"][mask], 1.0
            )
            ent, ppl = vrpo.semantic_losses(
                tensors.on_grid(entropy, mask),
                tensors.on_grid(critic_logprobs, mask),
                part["entropy_weights"],
                part["perplexity_weights"],
            )
            loss = loss + ppo.weighted_sum(tensors.on_grid(kl, mask), part["weights"]) + ent + ppl
        else:
            values = critic.values(features)
        values = tensors.on_grid(values, mask)
        loss = loss + ppo.value_loss(values, values, part["advantages"], part["weights"], None)
        loss.backward()
    parameters = [
        *policy.parameters(),
        *(p for p in critic.parameters() if p.requires_grad and p.grad is not None),
    ]
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("module", [ppo, vrpo])
def test_accumulation_1x8_equals_8x1(module, policy_and_chat):
    policy, chat = policy_and_chat
    batch = tensors.pack(play(policy, chat) + play(policy, chat, seed=1)[:2], chat.pad_id, CPU)
    torch.manual_seed(1)
    batch["logprobs"], batch["advantages"] = torch.randn(2, *batch["mask"].shape)
    batch["weights"] = ppo.token_weights(batch["mask"])
    batch["seed"] = row_seeds(batch["mask"], 1)
    for key in ("entropy", "perplexity"):
        batch[f"{key}_weights"] = ppo.token_weights(
            vrpo.most_uncertain(torch.rand(batch["mask"].shape), batch["mask"], 0.8)
        )
    assert len(batch["mask"]) == 8
    whole, single = (gradients(module, policy, chat, batch, size) for size in (8, 1))
    assert torch.allclose(whole, single, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(policy_and_chat):
    policy, chat = policy_and_chat
    batch = tensors.pack(play(policy, chat), chat.pad_id, CPU)
    args, critic = ppo.Args(), ppo.Critic(policy, ppo.Args())
    torch.nn.init.normal_(critic.head.weight)
    wide = {
        k: torch.nn.functional.pad(
            v, (0, 7), value=chat.pad_id if v.dtype == torch.int64 else False
        )
        for k, v in batch.items()
    }
    found = [ppo.score_tokens(policy, critic, b, args) for b in (batch, wide)]
    for scores, b in zip(found, (batch, wide), strict=True):
        scores["ref_logprobs"] = ppo.reference_logprobs(policy, b, args)
    narrow, wide = found
    for key in ("values", "ref_logprobs"):
        assert torch.allclose(narrow[key], wide[key][:, : narrow[key].shape[1]], atol=1e-5), key


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_training_sees_the_distribution_that_was_sampled(
    policy_and_chat, temperature, dtype, tolerance
):
    """The log-probabilities and entropies that sampling kept, left-padded and with a cache, against
    a right-padded pass."""
    policy, chat = policy_and_chat
    args = ppo.Args(temperature=temperature, max_new_tokens=10)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        batch = tensors.pack(play(policy, chat, temperature=temperature), chat.pad_id, CPU)
        mask = batch["mask"]
        hidden = ppo.hidden_states(policy.get_decoder(), batch["inputs"], mask)
        logprobs, entropy = tensors.logprobs_and_entropy(
            policy.lm_head, hidden, batch["targets"][mask], args.temperature
        )
    for ours, theirs in ((batch["logprobs"][mask], logprobs), (batch["entropy"][mask], entropy)):
        print(
            f"{dtype}: largest difference {(ours - theirs).abs().max():.1e}, mean {(ours - theirs).abs().mean():.1e}"
        )
        assert (ours - theirs).abs().max() < tolerance and (
            ours - theirs
        ).abs().mean() < tolerance / 10
    assert not batch["logprobs"][~mask].any() and not batch["entropy"][~mask].any()


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
    first = torch.tensor([a.tokens[0] for a in ppo.generate(policy, chat, [prompt] * 4000, 1, 1.0)])
    expected = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    top = expected.argmax()
    assert (first == top).float().mean().item() == pytest.approx(expected[top].item(), abs=0.03)
    assert len(first.unique()) > 10


def test_multi_turn_rollout_marks_exactly_the_policys_tokens(policy_and_chat):
    """Two turns: what is marked as chosen decodes to the answers, the rest to prompt and user
    turn."""
    policy, chat = policy_and_chat
    eos = chat.eos_ids[0]
    turns = [[[11, 12, eos], [13, 14, 15]], [[16, eos]]]
    scripted = iter(
        [
            [Answer(row, *([x] * len(row) for x in (-1.0, 0.5, 0.0))) for row in turn]
            for turn in turns
        ]
    )
    original, ppo.generate = ppo.generate, lambda *_: next(scripted)
    try:
        args = ppo.Args(max_turns=2)
        episodes = ppo.rollout(policy, bare_world(args, chat), problems(chat)[:2], args, 1.0)
    finally:
        ppo.generate = original
    first, second = episodes
    words = chat.user_turn_ids("Check your work and answer again.")
    assert first.tokens == first.problem.prompt_ids + [11, 12, eos] + words + [16, eos]
    assert (
        first.chosen
        == [False] * len(first.problem.prompt_ids) + [True] * 3 + [False] * len(words) + [True] * 2
    )
    assert first.logprobs == [-1.0 * c for c in first.chosen] and first.entropy == [
        0.5 * c for c in first.chosen
    ]
    assert len(first.completions) == 2 and first.finished
    # the second answer was cut off: its episode ends there
    assert (
        second.tokens[-3:] == [13, 14, 15] and not second.finished and len(second.completions) == 1
    )


def test_truncated_answers():
    one = Problem("q", "1", [])
    cut, whole = (Episode(one, completions=["x", "#### 1"], finished=f) for f in (False, True))
    mask, rewards, counted = torch.ones(2, 3, dtype=torch.bool), {}, {}
    for kind in ("wrong", "grade", "mask"):
        env = bare_world(ppo.Args(truncated=kind), None)
        rewards[kind] = env.grade([cut, whole]).tolist()
        counted[kind] = env.counted(mask, [cut, whole]).sum(1).tolist()
    assert rewards == {"wrong": [0.0, 1.0], "grade": [1.0, 1.0], "mask": [1.0, 1.0]}
    assert counted == {"wrong": [3, 3], "grade": [3, 3], "mask": [0, 3]}
    assert cut.completions == ["x", "#### 1"]
    with pytest.raises(SystemExit, match="--truncated mask leaves none"):
        env.counted(mask[:1], [cut])


def test_no_gradient_into_the_frozen_head(policy_and_chat):
    policy, chat = policy_and_chat
    batch = tensors.pack(play(policy, chat), chat.pad_id, CPU)
    mask = batch["mask"]
    for kind in ("frozen", "learned"):
        args = vrpo.Args(lm_head=kind)
        critic = vrpo.Critic(policy, args)
        optimizer = vrpo.make_optimizer(policy, critic, args)
        before = critic.lm_head.weight.detach().clone()
        features = vrpo.hidden_states(critic.backbone, batch["inputs"], mask)
        logprobs, entropy = tensors.logprobs_and_entropy(
            critic.lm_head, features, batch["targets"][mask], 1.0
        )
        (entropy.mean() - logprobs.mean()).backward()
        optimizer.step()
        assert (critic.lm_head.weight.grad is None) is (kind == "frozen")
        assert torch.equal(critic.lm_head.weight, before) is (kind == "frozen")
        assert (
            critic.backbone.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        )  # the semantic losses reach the backbone


def latent(rows: int, width: int, *key) -> dict:
    """What the bottleneck needs of a micro-batch that is full: its mask and the rows' seeds."""
    mask = torch.ones(rows, width, dtype=torch.bool)
    return {"mask": mask, "seed": row_seeds(mask, *key)}


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_bottleneck_depth_and_value_samples(policy_and_chat, layers):
    policy, _ = policy_and_chat
    critic = vrpo.Critic(policy, vrpo.Args(bottleneck_layers=layers))
    torch.nn.init.normal_(critic.head.weight)
    features = torch.randn(50, policy.config.hidden_size)
    parts = [latent(5, 10, i) for i in range(30)]
    runs = {k: torch.stack([critic.values(features, p, k)[0] for p in parts]) for k in (1, 64)}
    _, kl, sigma = critic.values(features, parts[0], 4)
    assert runs[1].shape == (30, 50) and kl.shape == sigma.shape == (50,)
    assert len(critic.encoders) == layers and (kl > 0).all() == (layers > 0)
    if layers == 0:
        assert runs[1].std(0).max() == 0
    else:  # the mean over 64 samples is eight times as steady as one sample
        assert runs[1].std(0).mean() / runs[64].std(0).mean() == pytest.approx(8, rel=0.3)


def test_the_bottleneck_starts_open(policy_and_chat):
    """mu of order 1 for hidden states of order 1, sigma = 1/e in every state, and a value that is
    nothing yet."""
    policy, _ = policy_and_chat
    torch.manual_seed(0)
    critic = vrpo.Critic(policy, vrpo.Args(latent_dim=512))
    hidden = torch.randn(256, policy.lm_head.in_features)
    mu, log_sigma = critic.encoders[0](hidden).chunk(2, dim=-1)
    assert mu.std().item() == pytest.approx(1, abs=0.1) and (log_sigma == -1).all()
    values, _, sigma = critic.values(hidden, latent(16, 16, 0), samples=2)
    assert (values == 0).all() and sigma.mean().item() == pytest.approx(math.exp(-1))


def test_shared_backbone_and_critic_warmup(run_main):
    for name in ("ppo_baseline", "vrpo_math", "dvpo_math", "robust_ppo_baseline"):
        run = run_main(
            name, run_name=f"{name}-w", critic_backbone="shared", critic_warmup=1, kl_coef=0.1
        )
        frame = pd.read_csv(run / "metrics.csv")
        assert (
            frame["losses/grad_norm_policy"].tolist()[1] == 0
            and frame["losses/grad_norm_policy"].tolist()[2] > 0
        )
        assert frame["losses/grad_norm_head"].tolist()[1] > 0
        assert frame["objective/kl_ref"].tolist()[1:] == pytest.approx([0, 0], abs=1e-5)

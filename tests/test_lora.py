"""LoRA: what is shared, what is trained, what is saved; and log-probabilities in chunks."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import CRITICS, SCRIPTS, read_metrics, read_samples
from utils import tensors
from utils.models import load_policy, save_policy, trainable, twin

CPU = torch.device("cpu")


@pytest.fixture
def adapted(tiny_model):
    """A policy whose adapters do something."""
    policy, _ = load_policy(str(tiny_model), CPU, lora_rank=4)
    torch.manual_seed(1)
    for parameter in trainable(policy):
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


def test_adapters_are_made_without_a_warning(tiny_model, recwarn):
    load_policy(str(tiny_model), CPU, lora_rank=2)
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_a_twin_shares_the_frozen_weights_and_copies_the_adapters(adapted):
    other = twin(adapted)
    pairs = list(zip(adapted.named_parameters(), other.parameters(), strict=True))
    assert all((a is b) == ("lora_" not in name) for (name, a), b in pairs)
    assert (
        0
        < sum(p.numel() for p in trainable(adapted))
        < 0.5 * sum(p.numel() for p in adapted.parameters())
    )
    assert not any("lm_head" in name for (name, p), _ in pairs if p.requires_grad)
    whole = torch.nn.Linear(2, 2)
    assert all(
        a is not b and torch.equal(a, b)
        for a, b in zip(whole.parameters(), twin(whole).parameters(), strict=True)
    )


def test_policy_reference_and_critic_have_one_set_of_weights(script, tiny_model):
    policy, _ = load_policy(str(tiny_model), CPU, lora_rank=4)
    modules = [policy, twin(policy).requires_grad_(False)]
    if hasattr(script, "Critic"):
        modules.append(script.Critic(policy, script.Args(lora_rank=4)))
    distinct = {
        id(p): p
        for module in modules
        for name, p in module.named_parameters()
        if "lora_" not in name
    }
    heads = sum(
        p.numel()
        for module in modules[2:]
        for name, p in module.named_parameters()
        if name.startswith(("head", "enc", "dec"))
    )
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert sum(p.numel() for p in distinct.values()) == base + heads


def test_the_merged_policy_is_the_adapted_one(adapted, tmp_path):
    save_policy(adapted, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, adapted(input_ids=tokens).logits, atol=1e-4)
    assert any("lora_" in name for name, _ in adapted.named_parameters())  # it can be trained on


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_with_lora_gives_the_same_metrics(name, run_main):
    """The adapters of policy and critic, not the merged weights, are what a run goes on from. The
    first update trains the critic alone where there is one, and the frozen weights stay frozen."""
    flags = {
        "lora_rank": 2,
        "kl_coef": 0.01,
        "learning_rate": 1e-2,
        "noise_rate": 0.4,
        "max_new_tokens": 12,
    }
    if name in CRITICS:
        flags["critic_warmup"] = 1
    whole = run_main(name, run_name="whole", updates=4, **flags)
    half = run_main(name, run_name="half", updates=2, **flags)
    run_main(name, resume=half, updates=4, run_name="half", **flags)
    assert (
        read_metrics(half) == read_metrics(whole)
        and read_samples(half)[-4:] == read_samples(whole)[-4:]
    )
    kl = pd.read_csv(whole / "metrics.csv")["objective/kl_ref"].tolist()
    assert kl[1] == pytest.approx(0.0, abs=1e-4) and abs(kl[4]) > 1e-4
    state = torch.load(whole / "checkpoints" / "000004" / "state.pt", weights_only=True)
    assert state["adapters"] and all("lora_" in key for key in state["adapters"])
    if name in CRITICS:
        head = load_file(whole / "checkpoints" / "000004" / "critic" / "head.safetensors")
        backbone = [key for key in head if key.startswith("backbone.")]
        assert backbone and all("lora_" in key for key in backbone)
    start = AutoModelForCausalLM.from_pretrained(
        json.loads((whole / "args.json").read_text())["model"]
    )
    trained = AutoModelForCausalLM.from_pretrained(whole / "checkpoints" / "000004" / "policy")
    same = {
        key: torch.equal(value, trained.state_dict()[key])
        for key, value in start.state_dict().items()
    }
    assert same["model.embed_tokens.weight"] and not same["model.layers.0.self_attn.q_proj.weight"]


def test_a_run_goes_on_with_or_without_lora_as_it_began(run_main):
    folder = run_main("grpo_baseline", updates=1)
    with pytest.raises(
        SystemExit, match="--lora-rank: the run was made without LoRA and cannot go on otherwise"
    ):
        run_main("grpo_baseline", resume=folder, updates=2, lora_rank=2)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, tokenizer):
    """A random mixture of four experts, two of them active."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "mixture"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_mixture_of_experts_is_the_adapted_one(mixture, tmp_path, dtype):
    """All experts of a layer are two tensors, not linear layers."""
    policy, _ = load_policy(str(mixture), CPU, lora_rank=2, dtype=dtype)
    for parameter in trainable(policy):
        torch.nn.init.normal_(parameter, std=0.3)
    save_policy(policy, tmp_path)
    before, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (mixture, tmp_path)
    )
    changed = {
        name
        for name, x in plain.state_dict().items()
        if not torch.equal(x, before.state_dict()[name])
    }
    assert {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")} < changed
    assert plain.state_dict().keys() - changed == {
        name
        for name in plain.state_dict()
        if "norm" in name or "embed" in name or "lm_head" in name
    }
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        given, wanted = plain(tokens).logits, policy(input_ids=tokens).logits
    if dtype == torch.float32:
        assert torch.allclose(given, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["grpo_baseline", "vrpo_math"])
def test_resume_with_lora_on_a_mixture_of_experts(name, run_main, mixture):
    flags = {"model": str(mixture), "lora_rank": 2, "kl_coef": 0.01, "learning_rate": 1e-2}
    whole = run_main(name, run_name="whole", updates=2, **flags)
    half = run_main(name, run_name="half", updates=1, **flags)
    run_main(name, resume=half, updates=2, run_name="half", **flags)
    assert read_metrics(half) == read_metrics(whole)
    state = torch.load(whole / "checkpoints" / "000002" / "state.pt", weights_only=True)
    trained = [x for key, x in state["adapters"].items() if "experts" in key and "lora_B" in key]
    assert trained and all(x.abs().max() > 0 for x in trained)  # they begin at zero


def test_lora_in_bfloat16_and_with_a_learned_head(run_main):
    folder = run_main("vrpo_math", lora_rank=2, dtype="bfloat16", lm_head="learned")
    frame = pd.read_csv(folder / "metrics.csv")
    assert frame["losses/value"][1:].notna().all() and frame["losses/grad_norm_lm_head"][2] > 0


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_change_nothing_but_memory(script, rows, monkeypatch):
    """Values and gradients are those of all logits at once, and never more than `rows` rows of them
    exist."""
    torch.manual_seed(0)
    head, hidden, targets = (
        torch.nn.Linear(8, 20, bias=False),
        torch.randn(10, 8),
        torch.randint(20, (10,)),
    )
    results, seen = [], []
    head.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    for at_once in (10**9, rows * 20):
        monkeypatch.setattr(tensors, "LOGITS_AT_ONCE", at_once)
        inputs = hidden.clone().requires_grad_()
        head.zero_grad()
        seen.clear()
        logprobs, entropy = tensors.logprobs_and_entropy(head, inputs, targets, 0.7)
        (logprobs.sum() + 2 * entropy.pow(2).sum()).backward()
        results.append((logprobs, entropy, inputs.grad, head.weight.grad.clone()))
    assert max(seen) <= rows
    expected = torch.distributions.Categorical(logits=head(hidden) / 0.7)
    assert torch.allclose(results[1][0], expected.log_prob(targets), atol=1e-5)
    assert torch.allclose(results[1][1], expected.entropy(), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))

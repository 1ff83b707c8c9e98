"""LoRA: what is shared, what is trained, what is saved."""

import importlib
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import read_metrics, read_samples
from utils.models import frozen, load_policy, save_policy, trainable, twin

CPU = torch.device("cpu")


@pytest.fixture
def adapted(tiny_model):
    """A policy whose adapters do something."""
    policy, _ = load_policy(str(tiny_model), CPU, lora_rank=4)
    torch.manual_seed(1)
    for parameter in trainable(policy):
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, tokenizer):
    """A random mixture of four experts, two of them active."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "mixture"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_adapters_are_made_without_a_warning(tiny_model, recwarn):
    load_policy(str(tiny_model), CPU, lora_rank=2)
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_a_twin_shares_the_frozen_weights_and_copies_the_adapters(adapted):
    pairs = list(zip(adapted.named_parameters(), twin(adapted).parameters(), strict=True))
    assert all((a is b) == ("lora_" not in name) for (name, a), b in pairs)
    trained = [name for (name, p), _ in pairs if p.requires_grad]
    assert trained and all("lora_" in name and "lm_head" not in name for name in trained)
    whole = torch.nn.Linear(2, 2)
    for a, b in zip(whole.parameters(), twin(whole).parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("name", ["ppo_baseline", "vrpo_math"])
def test_policy_reference_and_critic_have_one_set_of_weights(name, tiny_model):
    script = importlib.import_module(name)
    policy, _ = load_policy(str(tiny_model), CPU, lora_rank=4)
    models = [policy, frozen(policy), script.Critic(policy, script.Args(lora_rank=4))]
    distinct = {
        id(p): p.numel()
        for model in models
        for name, p in model.named_parameters()
        if "lora_" not in name and not name.startswith(("head", "encoder", "decoder"))
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert sum(distinct.values()) == sum(p.numel() for p in base.parameters())


def test_the_merged_policy_is_the_adapted_one(adapted, tmp_path):
    save_policy(adapted, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, adapted(input_ids=tokens).logits, atol=1e-4)
    assert any("lora_" in name for name, _ in adapted.named_parameters())  # it can be trained on


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
    old, new = before.state_dict(), plain.state_dict()
    changed = {name for name, x in new.items() if not torch.equal(x, old[name])}
    assert {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")} < changed
    kept = {name for name in new if any(part in name for part in ("norm", "embed", "lm_head"))}
    assert new.keys() - changed == kept
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        given, wanted = plain(tokens).logits, policy(input_ids=tokens).logits
    if dtype == torch.float32:
        assert torch.allclose(given, wanted, atol=1e-4)


@pytest.mark.parametrize("name, model", [("grpo_baseline", "tiny_model"), ("vrpo_math", "mixture")])
def test_resume_with_lora_gives_the_same_metrics(name, model, run_main, request):
    """The adapters of policy and critic, not the merged weights, are what a run goes on from; and
    the frozen weights stay frozen."""
    flags = {"model": str(request.getfixturevalue(model)), "lora_rank": 2, "kl_coef": 0.01}
    flags |= {"learning_rate": 1e-2, "noise_rate": 0.4, "max_new_tokens": 12}
    folder = run_main(name, **flags)
    checkpoint = folder / "checkpoints" / "000002"
    found = read_metrics(folder), read_samples(folder)
    shutil.rmtree(checkpoint)
    run_main(name, resume=folder, **flags)
    assert (read_metrics(folder), read_samples(folder)) == found
    kl = pd.read_csv(folder / "metrics.csv")["objective/kl_ref"].tolist()
    assert kl[1] == pytest.approx(0.0, abs=1e-4) and abs(kl[2]) > 1e-4
    adapters = torch.load(checkpoint / "state.pt", weights_only=True)["adapters"]
    assert adapters and all("lora_" in key for key in adapters)
    assert all(x.any() for key, x in adapters.items() if "lora_B" in key)  # they begin at zero
    assert any("experts" in key for key in adapters) == (model == "mixture")
    if name != "grpo_baseline":
        head = load_file(checkpoint / "critic" / "head.safetensors")
        backbone = [key for key in head if key.startswith("backbone.")]
        assert backbone and all("lora_" in key for key in backbone)
    start, trained = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (flags["model"], checkpoint / "policy")
    )
    same = {key for key, x in start.items() if torch.equal(x, trained[key])}
    assert "model.embed_tokens.weight" in same
    assert "model.layers.0.self_attn.q_proj.weight" not in same


def test_a_run_goes_on_with_or_without_lora_as_it_began(run_main):
    folder = run_main("grpo_baseline", updates=1)
    refusal = "--lora-rank: the run was made without LoRA and cannot go on otherwise"
    with pytest.raises(SystemExit, match=refusal):
        run_main("grpo_baseline", resume=folder, updates=2, lora_rank=2)


def test_lora_in_bfloat16(run_main):
    folder = run_main("vrpo_math", lora_rank=2, dtype="bfloat16", updates=1)
    frame = pd.read_csv(folder / "metrics.csv")
    assert frame["losses/value"][1:].notna().all() and frame["losses/grad_norm_policy"][1] > 0
    policy = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "000001" / "policy")
    source = json.loads((folder / "args.json").read_text())["model"]
    assert policy.dtype == AutoModelForCausalLM.from_pretrained(source).dtype

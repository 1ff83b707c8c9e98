"""Decoding: whatever is saved, the tokens are those that a plain loop over the whole batch draws
from the same noise."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from utils import generation, tensors
from utils.generation import choose, exponential, generate
from utils.models import load_policy

CPU = torch.device("cpu")


@pytest.fixture
def policy_and_chat(tiny_model):
    return load_policy(str(tiny_model), CPU)


def some_prompts(chat, count=12):
    return [chat.prompt_ids("Ann has 2 pens. " * (i // 3 % 3 + 1)) for i in range(count)]


@torch.no_grad()
def plainly(policy, chat, prompts, max_new_tokens, temperature):
    """A loop without cache, padding or compaction: every row by itself through the whole model, for
    every token."""
    answers = [[] for _ in prompts]
    going = [True] * len(prompts)
    for _ in range(max_new_tokens):
        rows = [torch.tensor([[*p, *a]]) for p, a in zip(prompts, answers, strict=True)]
        logits = torch.stack([policy(input_ids=row).logits[0, -1] for row in rows])
        probs = (logits / (temperature or 1.0)).softmax(-1)
        new = torch.multinomial(probs, 1)[:, 0] if temperature else logits.argmax(-1)
        for i, token in enumerate(new.tolist()):
            if going[i]:
                answers[i].append(token)
                going[i] = token not in chat.eos_ids
        if not any(going):
            break
    return answers


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize(
    "room, compact_at, rows_at_once, eos_every",
    [(32, 0.8, 10**6, 1), (1, 1.0, 10**6, 3), (2, 0.0, 5, 1), (3, 0.5, 1, 4)],
)
def test_same_tokens_as_a_plain_loop(
    policy_and_chat, monkeypatch, temperature, room, compact_at, rows_at_once, eos_every
):
    policy, chat = policy_and_chat
    vocabulary = policy.lm_head.out_features
    chat.eos_ids = list(range(0, vocabulary, 9))  # one token in nine ends an answer
    monkeypatch.setattr(generation, "ROOM", room)
    monkeypatch.setattr(generation, "COMPACT_AT", compact_at)
    monkeypatch.setattr(generation, "EOS_EVERY", {"cpu": eos_every})
    monkeypatch.setattr(tensors, "LOGITS_AT_ONCE", rows_at_once * vocabulary)
    prompts = some_prompts(chat)
    torch.manual_seed(3)
    expected = plainly(policy, chat, prompts, 15, temperature)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = generate(policy, chat, prompts, 15, temperature)
    assert [answer.tokens for answer in found] == expected
    assert torch.equal(torch.get_rng_state(), state)  # so is what is drawn next
    if temperature:
        assert len({len(a) for a in expected}) > 3  # rows do end apart


@pytest.mark.parametrize("compact_at", [0.0, 0.8])
def test_every_prompt_may_have_a_limit_of_its_own(policy_and_chat, monkeypatch, compact_at):
    """What is cut off is the beginning of the answer that would have come."""
    policy, chat = policy_and_chat
    chat.eos_ids = list(range(0, policy.lm_head.out_features, 9))
    monkeypatch.setattr(generation, "COMPACT_AT", compact_at)
    prompts, limits = some_prompts(chat), [1 + 5 * i % 13 for i in range(12)]
    torch.manual_seed(3)
    whole = generate(policy, chat, prompts, 13, 1.0)
    torch.manual_seed(3)
    found = generate(policy, chat, prompts, limits, 1.0)
    assert [a.tokens for a in found] == [a.tokens[:n] for a, n in zip(whole, limits, strict=True)]
    assert found[1].logprobs == pytest.approx(whole[1].logprobs[: limits[1]])
    ends = {answer.tokens[-1] in chat.eos_ids for answer in found}
    assert ends == {True, False} and found != whole


def test_greedy_answers_are_certain(policy_and_chat):
    policy, chat = policy_and_chat
    answer = generate(policy, chat, some_prompts(chat, 1), 5, temperature=0.0)[0]
    assert len(answer.tokens) == len(answer.logprobs) == len(answer.entropy)
    assert set(answer.logprobs) == set(answer.entropy) == {0.0}


def test_noise_is_that_of_multinomial():
    torch.manual_seed(0)
    expected = torch.empty(40, 300).exponential_()
    torch.manual_seed(0)
    assert torch.equal(exponential(40, 300, CPU), expected)
    probs = torch.rand(40, 300).softmax(-1)
    torch.manual_seed(0)
    expected = torch.multinomial(probs, 1)[:, 0]
    head = torch.nn.Linear(300, 300, bias=False)
    torch.nn.init.eye_(head.weight)
    torch.manual_seed(0)
    tokens, _, _ = choose(head, probs.log(), torch.arange(40), 40, 1.0)
    assert torch.equal(tokens, expected)


def test_an_impossible_token_is_never_drawn():
    head = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.eye_(head.weight)
    logits = torch.tensor([[0.0, -1e30, 0.0, -1e30]]).repeat(500, 1)
    tokens, logprobs, entropy = choose(head, logits, torch.arange(500), 500, 1.0)
    assert set(tokens.tolist()) == {0, 2}
    assert torch.allclose(logprobs, torch.tensor(0.5).log())
    assert torch.allclose(entropy, torch.tensor(2.0).log())


def test_every_row_ends_at_once(policy_and_chat):
    policy, chat = policy_and_chat
    chat.eos_ids = list(range(policy.lm_head.out_features))
    assert [len(a.tokens) for a in generate(policy, chat, some_prompts(chat), 5, 1.0)] == [1] * 12


def test_a_model_whose_cache_is_not_of_attention_alone(tmp_path, tokenizer):
    """Rows cannot be taken out of such a cache, so the batch decodes as it stands: the tokens are
    still those of `generate`."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        initializer_range=0.3, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, chat = load_policy(str(tmp_path), CPU)
    chat.eos_ids = list(range(0, len(tokenizer), 9))
    prompts = some_prompts(chat)
    width = max(map(len, prompts))
    torch.manual_seed(1)
    found = generate(policy, chat, prompts, 10, 1.0)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.generate(
        torch.tensor([[chat.pad_id] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=10, do_sample=True, top_k=0, top_p=1.0, eos_token_id=chat.eos_ids,
    )[:, width:].tolist()  # fmt: skip
    assert len({len(a.tokens) for a in found}) > 2
    for answer, row in zip(found, expected, strict=True):
        assert answer.tokens == row[: len(answer.tokens)]


def test_a_model_that_has_no_such_cache_is_refused(tmp_path, tokenizer):
    """Mamba ignores the cache that it is given: it would see every token without what stands
    before."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refusal = "MambaForCausalLM does not decode through transformers' DynamicCache"
    with pytest.raises(SystemExit, match=refusal):
        load_policy(str(tmp_path), CPU)

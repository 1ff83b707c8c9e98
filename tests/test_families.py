"""The conventions of the model families that people use, each in a tiny random model: BOS put by
the template, by the tokenizer or not at all, several EOS ids, no pad token, pad that is EOS, a
default system message, thoughts, a vocabulary larger than the tokenizer's, sliding windows."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ppo_baseline as ppo
from tests.conftest import bare_world
from utils.generation import generate
from utils.models import load_policy
from utils.tensors import pack
from utils.world.problems import Problem

CPU = torch.device("cpu")
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # without a default system message; thoughts of earlier answers are left out; thinking can be switched off
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: x<|eot_id|>' }}"
    "{% endif %}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA3 = (  # the system message goes into the first user turn
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}"
    "{% else %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (ns.first if m.role == 'user' else '') + m.content"
    " | trim + '<end_of_turn>\n' }}{% if m.role == 'user' %}{% set ns.first = '' %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + GEMMA3
)
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@dataclass
class Family:
    """`specials` are the special tokens, `bos`, `eos`, `pad` the tokenizer's; `generation_eos`
    those of the generation config; `stops` what must end a turn; `tokenizer_adds_bos` for text that
    no template has rendered."""

    config: type
    model: type
    template: str | None
    specials: list[str]
    bos: str | None
    eos: str
    pad: str | None
    generation_eos: list[str]
    stops: list[str]
    tokenizer_adds_bos: bool = False
    padding_side: str = "right"
    spare_rows: int = 0
    extra: dict = field(default_factory=dict)


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
TURNS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
FAMILIES = {
    "qwen2.5": Family(Qwen2Config, Qwen2ForCausalLM, CHATML, IM, None, IM[2], IM[0], [IM[2], IM[0]], [IM[0], IM[2]], spare_rows=64),
    "qwen2.5-base": Family(Qwen2Config, Qwen2ForCausalLM, CHATML, IM, None, IM[0], IM[0], [IM[0]], [IM[0], IM[2]], spare_rows=64),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, QWEN3, IM, None, IM[2], IM[0], [IM[2], IM[0]], [IM[0], IM[2]], extra={"head_dim": 16}),
    "llama3": Family(LlamaConfig, LlamaForCausalLM, LLAMA3, HEADERS, HEADERS[0], HEADERS[3], None, HEADERS[1:4], HEADERS[1:4], True),
    "llama3-base": Family(LlamaConfig, LlamaForCausalLM, None, HEADERS, HEADERS[0], HEADERS[1], None, HEADERS[1:2], HEADERS[1:2], True),
    "smollm2": Family(LlamaConfig, LlamaForCausalLM, CHATML, IM, IM[1], IM[2], IM[2], [IM[2]], [IM[2]]),
    "gemma3": Family(
        Gemma3TextConfig, Gemma3ForCausalLM, GEMMA3, TURNS, TURNS[2], TURNS[1], TURNS[0], [TURNS[1], TURNS[4]], [TURNS[1], TURNS[4]],
        True, "left", extra={"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "pythia": Family(GPTNeoXConfig, GPTNeoXForCausalLM, None, IM[:1], IM[0], IM[0], None, [IM[0]], [IM[0]]),
}  # fmt: skip


def build(family: Family, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=family.specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Ann has 2 pens. How many?"], trainer)
    if family.tokenizer_adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad,
        padding_side=family.padding_side, additional_special_tokens=[],
    )  # fmt: skip
    if "<think>" in (family.template or ""):
        fast.add_tokens(
            ["<think>", "</think>"]
        )  # as in Qwen3 they are not special: decoding keeps them
    fast.chat_template = family.template
    config = family.config(
        vocab_size=len(fast) + family.spare_rows, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=family.model is not GPTNeoXForCausalLM, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        **SIZES | family.extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = family.model(config)
    model.generation_config.eos_token_id = fast.convert_tokens_to_ids(family.generation_eos)
    model.generation_config.update(do_sample=True, top_k=20, temperature=0.6)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: build(family, tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def test_every_token_that_ends_a_turn_stops(folders, name):
    policy, chat = load_policy(str(folders[name]), CPU)
    assert sorted(chat.eos_ids) == sorted(
        chat.tokenizer.convert_tokens_to_ids(FAMILIES[name].stops)
    )
    assert max(chat.pad_id, *chat.eos_ids) < policy.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_tokens_of_a_conversation_are_those_of_the_template(folders, name, system):
    """First message, answer with its EOS, second message: together what the template gives for all
    of them; one BOS at most."""
    family = FAMILIES[name]
    _, chat = load_policy(str(folders[name]), CPU, system=system)
    stop = family.stops[-1] if family.template else family.eos
    tokens = (
        chat.prompt_ids("Hi 1")
        + chat.tokenizer(f"2{stop}", add_special_tokens=False)["input_ids"]
        + chat.user_turn_ids("Now 3")
    )
    text = chat.tokenizer.decode(tokens)
    if family.template:
        turns = ([{"role": "system", "content": system}] if system else []) + [
            {"role": "user", "content": "Hi 1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Now 3"},
        ]  # fmt: skip
        whole = chat.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        first = chat.tokenizer.apply_chat_template(
            turns[:-2], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        if (
            "<think>" in whole
        ):  # the empty thought stays before the answer, where it stood when the answer was given
            whole = whole.replace("assistant\n2", "assistant\n<think>\n\n</think>\n\n2")
        assert text == whole and chat.tokenizer.decode(chat.prompt_ids("Hi 1")) == first
    else:
        opening = f"{system}\n\n" if system else ""
        bos = family.bos if family.tokenizer_adds_bos else ""
        assert text == f"{bos}{opening}Question: Hi 1\nAnswer:2{stop}\n\nQuestion: Now 3\nAnswer:"
    assert (system or "Be brief.") in text or system is None
    if family.bos and family.bos not in family.stops and family.bos != "<|im_start|>":
        assert text.count(family.bos) == 1 and text.startswith(family.bos)


def test_thinking_is_a_switch(folders):
    on, off = (load_policy(str(folders["qwen3"]), CPU, thinking=t)[1] for t in (True, False))
    assert on.decode(on.prompt_ids("Hi")).endswith("assistant")
    assert off.decode(off.prompt_ids("Hi")).endswith("<think>\n\n</think>")
    assert (
        on.decode(on.tokenizer.encode("<think>7</think>9")) == "<think>7</think>9"
    )  # for the answer checker to see


def test_training_sees_the_log_probabilities_of_sampling(folders, name):
    """Left padding, sliding windows and spare vocabulary rows included; a row ends with its first
    EOS, whichever it is."""
    policy, chat = load_policy(str(folders[name]), CPU)
    prompts = [chat.prompt_ids("Ann has 2 pens. " * (i % 3 + 1)) for i in range(24)]
    torch.manual_seed(1)
    args = ppo.Args(max_new_tokens=12)
    problems = [Problem("p", "1", ids) for ids in prompts]
    episodes = ppo.rollout(policy, bare_world(args, chat), problems, args, 1.0)
    for e in episodes:
        answer = e.tokens[len(e.problem.prompt_ids) :]
        assert not set(answer[:-1]) & set(chat.eos_ids) and e.finished == (
            answer[-1] in chat.eos_ids
        )
        assert isinstance(e.completions[0], str)
    batch = pack(episodes, chat.pad_id, CPU)
    trained = ppo.reference_logprobs(policy, batch, args)
    for i, e in enumerate(episodes[:6]):
        logits = policy(input_ids=torch.tensor([e.tokens])).logits[0, :-1]
        targets = torch.tensor(e.tokens[1:])
        alone = (
            logits.log_softmax(-1)
            .gather(-1, targets.unsqueeze(-1))
            .squeeze(-1)[torch.tensor(e.chosen[1:])]
        )
        assert torch.allclose(batch["logprobs"][i][batch["mask"][i]], alone, atol=1e-4)
        assert torch.allclose(trained[i][batch["mask"][i]], alone, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_decoding_is_that_of_transformers(folders, name, temperature):
    """Token by token the same as `generate`, greedily and with the same noise; prompts repeat, rows
    end early, caches grow."""
    policy, chat = load_policy(str(folders[name]), CPU)
    prompts = [chat.prompt_ids("Ann has 2 pens. " * (i // 2 % 3 + 1)) for i in range(24)]
    chat.eos_ids += range(40, 60)  # so that some rows end early
    policy.generation_config.eos_token_id = chat.eos_ids
    torch.manual_seed(1)
    ours = generate(policy, chat, prompts, 40, temperature)
    state = torch.get_rng_state()
    width = max(map(len, prompts))
    torch.manual_seed(1)
    theirs = policy.generate(
        input_ids=torch.tensor([[chat.pad_id] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=40, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
    )[:, width:].tolist()  # fmt: skip
    assert len({len(a.tokens) for a in ours}) > 1 or temperature == 0
    for answer, row in zip(ours, theirs, strict=True):
        assert answer.tokens == row[: len(answer.tokens)]
        assert answer.tokens[-1] in chat.eos_ids or len(answer.tokens) == 40
    assert torch.equal(state, torch.get_rng_state())  # and what is drawn next is the same, too


@pytest.mark.parametrize("script_name", ["vrpo_math", "grpo_baseline"])
def test_a_run_with_each_family_and_lora(run_main, folders, name, script_name):
    """Its checkpoint loads with plain transformers."""
    folder = run_main(
        script_name,
        model=str(folders[name]),
        updates=1,
        lora_rank=2,
        system_prompt="Be brief.",
        max_prompt_tokens=256,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "000001" / "policy")
    assert type(model) is FAMILIES[name].model


def test_a_template_without_a_system_role_says_so(tmp_path):
    from dataclasses import replace

    folder = build(replace(FAMILIES["gemma3"], template=NO_SYSTEM), tmp_path)
    _, chat = load_policy(str(folder), CPU, system="Be brief.")
    with pytest.raises(
        SystemExit,
        match="refuses the roles system, user .System role not supported.; see --system-prompt",
    ):
        chat.prompt_ids("Hi")


def test_a_template_that_rewrites_answers_says_so(tmp_path):
    from dataclasses import replace

    folder = build(
        replace(FAMILIES["smollm2"], template=CHATML.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)")),
        tmp_path,
    )
    _, chat = load_policy(str(folder), CPU)
    with pytest.raises(
        SystemExit, match="does not repeat earlier answers as they were; use --max-turns 1"
    ):
        chat.user_turn_ids("Hi")

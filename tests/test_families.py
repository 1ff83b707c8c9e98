"""The conventions of the model families that people use, each in a tiny random model: BOS put by
the template, by the tokenizer or not at all, several EOS ids, no pad token, pad that is EOS, a
default system message, thoughts, a vocabulary larger than the tokenizer's, sliding windows."""

import json
import shutil
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ppo_baseline as ppo
from benchmark.checks import families
from tests.conftest import bare_world
from utils import checkpoints
from utils.chat import TODAY, Chat
from utils.dialogue.reward_model import load_reward_model
from utils.generation import generate
from utils.metrics import UpdateLog
from utils.models import load_policy
from utils.tensors import pack
from utils.world.problems import Problem
from utils.world.tasks import MathTask, check_context

CPU = torch.device("cpu")
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # no default system message, no earlier thoughts; thinking can be switched off
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1] "
    "if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: x<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA3 = (  # the system message goes into the first user turn
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}"
    "{% else %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ (ns.first if m.role == 'user' else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% if m.role == 'user' %}{% set ns.first = '' %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + GEMMA3
)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


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
    "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>",
]  # fmt: skip
TURNS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
QWEN2, LLAMA = (Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)
GEMMA = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES = {
    "qwen2.5": Family(
        *QWEN2, CHATML, IM, None, IM[2], IM[0], [IM[2], IM[0]], [IM[0], IM[2]], spare_rows=64
    ),
    "qwen2.5-base": Family(
        *QWEN2, CHATML, IM, None, IM[0], IM[0], [IM[0]], [IM[0], IM[2]], spare_rows=64
    ),
    "qwen3": Family(
        Qwen3Config, Qwen3ForCausalLM, QWEN3, IM, None, IM[2], IM[0], [IM[2], IM[0]],
        [IM[0], IM[2]], extra={"head_dim": 16},
    ),
    "llama3": Family(
        *LLAMA, LLAMA3, HEADERS, HEADERS[0], HEADERS[3], None, HEADERS[1:4], HEADERS[1:4], True
    ),
    "llama3-base": Family(
        *LLAMA, None, HEADERS, HEADERS[0], HEADERS[1], None, HEADERS[1:2], HEADERS[1:2], True
    ),
    "smollm2": Family(*LLAMA, CHATML, IM, IM[1], IM[2], IM[2], [IM[2]], [IM[2]]),
    "gemma3": Family(
        Gemma3TextConfig, Gemma3ForCausalLM, GEMMA3, TURNS, TURNS[2], TURNS[1], TURNS[0],
        [TURNS[1], TURNS[4]], [TURNS[1], TURNS[4]], True, "left", extra=GEMMA,
    ),
    "pythia": Family(
        GPTNeoXConfig, GPTNeoXForCausalLM, None, IM[:1], IM[0], IM[0], None, [IM[0]], [IM[0]]
    ),
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
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos,
        pad_token=family.pad, padding_side=family.padding_side, additional_special_tokens=[],
    )  # fmt: skip
    if "<think>" in (family.template or ""):
        fast.add_tokens(["<think>", "</think>"])  # not special: decoding keeps them
    fast.chat_template = family.template
    config = family.config(
        vocab_size=len(fast) + family.spare_rows, max_position_embeddings=256,
        tie_word_embeddings=family.model is not GPTNeoXForCausalLM, initializer_range=0.3,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, **SIZES | family.extra,
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
    stops = chat.tokenizer.convert_tokens_to_ids(FAMILIES[name].stops)
    assert sorted(chat.eos_ids) == sorted(stops)
    assert max(chat.pad_id, *chat.eos_ids) < policy.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_tokens_of_a_conversation_are_those_of_the_template(folders, name, system):
    """First message, answer with its EOS, second message: together what the template gives for all
    of them; one BOS at most."""
    family = FAMILIES[name]
    _, chat = load_policy(str(folders[name]), CPU, system=system)
    stop = family.stops[-1] if family.template else family.eos
    answer = chat.tokenizer(f"2{stop}", add_special_tokens=False)["input_ids"]
    text = chat.tokenizer.decode(chat.prompt_ids("Hi 1") + answer + chat.user_turn_ids("Now 3"))
    if family.template:
        talk = [("system", system)] * bool(system)
        talk += [("user", "Hi 1"), ("assistant", "2"), ("user", "Now 3")]
        turns = [{"role": role, "content": words} for role, words in talk]
        whole, first = (
            chat.tokenizer.apply_chat_template(
                some, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            for some in (turns, turns[:-2])
        )
        if "<think>" in whole:  # the empty thought stays where it stood when the answer was given
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
    # for the answer checker to see
    assert on.decode(on.tokenizer.encode("<think>7</think>9")) == "<think>7</think>9"


@torch.no_grad()
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
        assert not set(e.tokens[:-1]) & set(chat.eos_ids) and isinstance(e.completions[0], str)
        assert e.finished == (e.tokens[-1] in chat.eos_ids)
    batch = pack(episodes, chat.pad_id, CPU)
    assert ppo.kl_penalty(policy, batch, args).abs().max() < 1e-4
    for sampled, e in zip(batch["logprobs"], episodes[:6], strict=False):
        tokens = torch.tensor([e.prompt + e.tokens])
        logprobs = policy(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        alone = logprobs.gather(1, tokens[0, 1:, None])[len(e.prompt) - 1 :, 0]
        assert torch.allclose(sampled[: len(e.tokens)], alone, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_decoding_is_that_of_transformers(folders, name, temperature):
    """Token by token the same as `generate`, greedily and with the same noise; prompts repeat, rows
    end early, caches grow."""
    policy, chat = load_policy(str(folders[name]), CPU)
    prompts = [chat.prompt_ids("Ann has 2 pens. " * (i // 2 % 3 + 1)) for i in range(12)]
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
        max_new_tokens=40, do_sample=temperature > 0, temperature=temperature or 1.0,
        top_k=0, top_p=1.0,
    )[:, width:].tolist()  # fmt: skip
    assert len({len(a.tokens) for a in ours}) > 1 or temperature == 0
    for answer, row in zip(ours, theirs, strict=True):
        assert answer.tokens == row[: len(answer.tokens)]
        assert answer.tokens[-1] in chat.eos_ids or len(answer.tokens) == 40
    assert torch.equal(state, torch.get_rng_state())  # and what is drawn next is the same, too


def test_a_run_with_each_family_and_lora(run_main, folders, name):
    """Its checkpoint loads with plain transformers."""
    flags = {"lora_rank": 2, "system_prompt": "Be brief.", "max_prompt_tokens": 256}
    flags |= {"prompts_per_update": 2, "epochs": 1, "eval_size": 1}
    folder = run_main("vrpo_math", model=str(folders[name]), updates=1, **flags)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "000001" / "policy")
    assert type(model) is FAMILIES[name].model


MIXTURE = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURES = {
    "DeepseekV3": MIXTURE | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16},
    "Glm4Moe": MIXTURE | {"head_dim": 16},
    "Lfm2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", ["GptOss", "Lfm2Moe", "Qwen3Next"])
def test_training_sees_what_decoding_saw_in_mixtures_and_hybrids(name):
    """benchmark/checks/families.py has more of them."""
    assert 0 < families.gap(name) < 1e-4


def test_a_run_whose_model_decodes_otherwise_than_it_reads_stops():
    """The first minibatch of a run tells: the policy has not moved since it sampled."""
    for kl, update, gap in ((0.02, 1, 0.2), (0.605, 2, float("nan")), (0.605, 1, None)):
        log = UpdateLog(CPU)
        log.add({"losses/approx_kl": torch.tensor(kl)})
        if gap is None:
            with pytest.raises(SystemExit, match="disagree by 1.10 nats a token"):
                log.end_minibatch({}, update)
        else:
            log.end_minibatch({}, update)
            assert log.gap == pytest.approx(gap, nan_ok=True)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_critic_keeps_the_biases_of_its_router(name, tmp_path, tokenizer, monkeypatch):
    """They are no parameters, and its files are not whole without them; which the first checkpoint
    of a run would notice."""
    sizes = SIZES | {"vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes | MIXTURES[name], eos_token_id=1)
    policy = getattr(transformers, f"{name}ForCausalLM")(config)
    policy.source_dtype, critic = torch.float32, ppo.Critic(policy, ppo.Args())
    biases = [x for key, x in critic.backbone.named_buffers() if key.endswith("_bias")]
    assert biases
    for bias in biases:
        bias.uniform_()
    save = partial(checkpoints.save_checkpoint, tmp_path, policy=policy, critic=critic, keep=9)
    save(1, tokenizer=tokenizer, state={}, made_by={"script": "ppo_baseline"}, card="")
    found = AutoModel.from_pretrained(tmp_path / "checkpoints" / "000001" / "critic")
    for key, x in critic.backbone.state_dict().items():
        assert torch.equal(found.state_dict()[key], x), key
    monkeypatch.setattr(checkpoints, "buffers", lambda module: {})
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SystemExit, match="could not be written .its critic lacks .*bias"):
        save(1, tokenizer=tokenizer, state={}, made_by={}, card="")


# ---- templates ----


def chat_of(family: str, folder: Path, template: str | None, **flags) -> Chat:
    """The chat format of a family, with another template."""
    built = build(replace(FAMILIES[family], template=template), folder)
    return load_policy(str(built), CPU, **flags)[1]


def test_a_template_without_a_system_role_says_so(tmp_path):
    chat = chat_of("gemma3", tmp_path, NO_SYSTEM, system="Be brief.")
    refusal = "refuses the roles system, user .System role not supported.; see --system-prompt"
    with pytest.raises(SystemExit, match=refusal):
        chat.prompt_ids("Hi")


def test_a_template_that_rewrites_answers_says_so(tmp_path):
    shouts = "(m.content | upper if m.role == 'assistant' else m.content)"
    chat = chat_of("smollm2", tmp_path, CHATML.replace("m.content", shouts))
    refusal = "does not repeat earlier answers as they were; use --max-turns 1"
    with pytest.raises(SystemExit, match=refusal):
        chat.user_turn_ids("Hi")


SPACED = (  # as Llama 2 has it: blanks around the answer, EOS and BOS between turns
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + 'END' + eos_token }}{% endif %}{% endfor %}"
)


def test_one_eos_between_turns(tmp_path):
    chat = chat_of("llama3", tmp_path, SPACED.replace("END", ""))
    for end in ("", " ", "\\n", " \\n"):
        chat.tokenizer.chat_template = SPACED.replace("END", end)
        text = chat.tokenizer.decode(chat.user_turn_ids("Now 3"))
        assert text == "<|begin_of_text|>[INST] Now 3 [/INST]"


def test_tokens_of_a_later_turn_are_those_of_the_whole(tmp_path):
    """Also of a tokenizer that puts a blank before the first word of a text (SentencePiece)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["<|user|>\nNow 3 Hi 1 2 x\n<|assistant|>\n [INST]"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    turns = [("user", "Hi 1"), ("assistant", "2"), ("user", "Now 3")]
    whole = fast.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=True, tokenize=True, return_dict=False,
    )  # fmt: skip
    ids = Chat(fast, [fast.eos_token_id]).user_turn_ids("Now 3")
    assert whole[-len(ids) - 1 :] == [fast.eos_token_id, *ids]
    assert whole.count(fast.eos_token_id) == 3


@pytest.mark.parametrize("blank", ["", "\\n"])
@pytest.mark.parametrize("special", [True, False])
def test_a_turn_ends_with_the_token_of_the_template(tmp_path, special, blank):
    """ChatML put onto a model whose EOS is another token."""
    family = replace(
        FAMILIES["pythia"], template=CHATML.replace("<|im_end|>", blank + "<|im_end|>")
    )
    folder = build(family, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    _, chat = load_policy(str(folder), CPU)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(chat.eos_ids) == {tokenizer.eos_token_id, end}
    assert chat.decode([*tokenizer("42")["input_ids"], end]) == "42"


TAGS = [
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
]  # fmt: skip


@pytest.mark.parametrize("tags", TAGS, ids=lambda tags: tags[0])
@pytest.mark.parametrize("kind", ["special", "added", "text"])
def test_a_thought_is_not_judged(tokenizer_of_chatml, tags, kind):
    """Whether its opening tag stands in the prompt or in the answer, whatever it is called, and
    whether or not decoding would leave the tags out; least of all a thought that does not end."""
    tokenizer, (opens, ends) = tokenizer_of_chatml, tags
    if kind != "text":
        tokenizer.add_tokens(list(tags), special_tokens=kind == "special")
    problem, task = Problem("?", "9", []), MathTask([], [], {})
    for in_prompt in (True, False):
        opening = f"assistant\\n{opens}\\n" if in_prompt else "assistant\\n"
        tokenizer.chat_template = CHATML.replace("assistant\n", opening)
        chat = Chat(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
        begun = "" if in_prompt else opens
        for text, grade in (
            (f"{begun} Is it 9? The answer is 9.", 0),
            (f"{begun} The answer is 7.{ends} The answer is 9.", 1),
            (f"{begun} The answer is 9.{ends} The answer is 7.", 0),
        ):
            said = chat.decode(tokenizer(text + "<|im_end|>")["input_ids"])
            assert task.grade(problem, [said]) == grade
        said = chat.decode(tokenizer(f"{begun}7{ends}9")["input_ids"])
        assert said.replace("\n", "") == "<think>7</think>9"


@pytest.fixture
def tokenizer_of_chatml(folders):
    return PreTrainedTokenizerFast.from_pretrained(folders["smollm2"])


@pytest.mark.parametrize(
    "template, role",
    [
        (CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"), "system"),
        (CHATML.replace("for m in messages", "for m in messages if m.role != 'user'"), "user"),
        (CHATML.replace("m.content", "m.content[:5]"), "system"),
    ],
)
def test_a_template_that_swallows_a_message_is_refused(tmp_path, template, role):
    with pytest.raises(SystemExit, match=f"leaves out or changes the {role} message"):
        chat_of("smollm2", tmp_path, template, system="Be brief.").prompt_ids("How many?")


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ none + 'a' }}", "{% for i in range(10**9) %}{% endfor %}", "{% if %}"],
)
def test_a_template_that_fails_is_refused(tmp_path, fault):
    with pytest.raises(SystemExit, match="the chat template of .* refuses"):
        chat_of("smollm2", tmp_path, fault)


def test_no_eos_behind_a_prompt(tmp_path):
    """Some tokenizers put one behind every text."""
    folder = build(FAMILIES["llama3-base"], tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)],
    )
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(chat.prompt_ids("Hi")) == f"{bos}Question: Hi\nAnswer:"
    assert tokenizer.decode(chat.user_turn_ids("Hi")) == "\n\nQuestion: Hi\nAnswer:"


@pytest.mark.parametrize(
    "date", ["strftime_now('%d %b %Y')", "date_string | default(strftime_now('%d %b %Y'))"]
)
def test_the_date_in_a_template_is_the_same_on_every_day(tokenizer_of_chatml, monkeypatch, date):
    tokenizer_of_chatml.chat_template = CHATML.replace("You are kind.", f"' + {date} + '")
    chat, tokens = Chat(tokenizer_of_chatml, [2]), []
    for year in (2024, 2031):
        day = type("Day", (datetime,), {"now": classmethod(lambda cls, year=year: cls(year, 1, 2))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", day)
        plain = tokenizer_of_chatml.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False
        )
        assert str(year) in plain
        tokens.append((chat.prompt_ids("Hi"), chat.user_turn_ids("Hi")))
    assert tokens[0] == tokens[1] and f"{TODAY:%d %b %Y}" in chat.decode(tokens[0][0])


def test_a_conversation_of_the_data_is_asked_whole(folders):
    """Its system message gives way to --system-prompt."""
    talk = [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "How many?")]
    messages = [{"role": role, "content": text} for role, text in talk]
    for system, first in ((None, "Be kind."), ("Be brief.", "Be brief.")):
        _, chat = load_policy(str(folders["smollm2"]), CPU, system=system)
        whole = chat.tokenizer.apply_chat_template(
            [{"role": "system", "content": first}, *messages[1:]],
            add_generation_prompt=True,
            tokenize=False,
        )
        assert chat.tokenizer.decode(chat.conversation_ids(messages)) == whole


# ---- files ----


def lacks_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def configure(**changes):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def larger_tokenizer(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder)


def damaged(contents: bytes | None, name: str = "model.safetensors"):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if contents is not None:
            (folder / name).write_bytes(contents)

    return change


LACKS = "its files lack 1 weights of .*layers.1.mlp.up_proj.weight.* would be random"
LARGER = "its tokenizer has 281 tokens, its embedding 279 rows; model.resize"
DAMAGES = {
    "lacks": (lacks_weights, LACKS),
    "more layers": (configure(num_hidden_layers=3), "its files lack 9 weights of .*, ..."),
    "cut": (cut, "could not be loaded"),
    "empty": (damaged(b""), "could not be loaded"),
    "garbage": (damaged(b"x" * 999), "could not be loaded"),
    "none": (damaged(None), "could not be loaded"),
    "pad beyond": (configure(pad_token_id=9999), "could not be loaded .*[Pp]adding_idx"),
    "wrong types": (configure(hidden_size="many"), "could not be loaded"),
    "larger tokenizer": (larger_tokenizer, LARGER),
    "no tokenizer": (damaged(None, "tokenizer.json"), "could not be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["--model", "--reward-model"])
def test_damaged_files_are_refused_in_one_sentence(tmp_path, kind, damage):
    folder, (change, message) = build(FAMILIES["llama3"], tmp_path), DAMAGES[damage]
    if kind == "--reward-model":
        config = LlamaConfig.from_pretrained(folder, num_labels=1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
        load_reward_model(str(folder), CPU, 4)
    change(folder)
    with pytest.raises(SystemExit, match=f"{kind} {folder}: {message}") as error:
        if kind == "--model":
            load_policy(str(folder), CPU)
        else:
            load_reward_model(str(folder), CPU, 4)
    assert "\n" not in str(error.value)


def test_heads_that_a_checkpoint_lacks_are_refused(tmp_path):
    """A causal LM has no score, a classifier no words, even where it shares the embedding."""
    folder = build(FAMILIES["llama3"], tmp_path)
    configure(num_labels=1)(folder)
    with pytest.raises(SystemExit, match="its files lack 1 weights of .*score.weight"):
        load_reward_model(str(folder), CPU, 4)
    for tied, message in ((True, "a classifier, whose head"), (False, "lack 1 weights .*lm_head")):
        folder = build(FAMILIES["llama3"], tmp_path / str(tied))
        config = LlamaConfig.from_pretrained(folder, num_labels=1, tie_word_embeddings=tied)
        LlamaForSequenceClassification(config).save_pretrained(folder)
        with pytest.raises(SystemExit, match=message):
            load_policy(str(folder), CPU)


def test_what_crosses_the_original_context_of_longrope_is_refused(tmp_path):
    """There all keys would be rotated otherwise, those in a cache are not."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
    extra = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    family = replace(FAMILIES["smollm2"], config=Phi3Config, model=Phi3ForCausalLM)
    folder = build(replace(family, extra=extra), tmp_path)
    _, chat = load_policy(str(folder), CPU)
    problem = [Problem("q", "1", [7] * 40)]
    check_context(chat, problem, 24)
    with pytest.raises(SystemExit, match="more than the model's 64 positions"):
        check_context(chat, problem, 25)


def test_no_more_tokens_than_the_model_has_positions_for(tmp_path, folders):
    """Said at the start; of learned positions also where a later turn would be beyond them."""
    policy, chat = load_policy(str(folders["llama3"]), CPU)
    problems = [Problem("p", "1", [5] * n) for n in (20, 60)]
    check_context(chat, problems, 256 - 60)
    with pytest.raises(SystemExit, match="--max-new-tokens 197: .* 60 tokens .* 256 positions"):
        check_context(chat, problems, 197)
    generate(policy, chat, [[5] * 250], 10, 0.0)  # rotary positions go on
    folder = build(FAMILIES["pythia"], tmp_path)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)).save_pretrained(folder)
    policy, chat = load_policy(str(folder), CPU)
    assert chat.context == 64
    chat.eos_ids = [299]
    assert len(generate(policy, chat, [[5] * 50], 14, 0.0)[0].tokens) == 14
    answers = generate(policy, chat, [[5] * 50] * 9 + [[5] * 60], [14] * 9 + [4], 0.0)
    assert [len(answer.tokens) for answer in answers] == [14] * 9 + [4]
    with pytest.raises(SystemExit, match="longer than the 64 positions that the model has learned"):
        generate(policy, chat, [[5] * 60], 14, 0.0)

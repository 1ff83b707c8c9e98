"""Loading data of many shapes, prompts, chat formats, and what is said about bad input."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import ppo_baseline as ppo
from utils.models import Chat, load_policy, pick_device
from utils.world.tasks import load_task


@pytest.fixture
def chat(tokenizer) -> Chat:
    return Chat(tokenizer, [tokenizer.eos_token_id])


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def load(chat, dataset, **flags):
    return load_task(ppo.Args(dataset=str(dataset), **flags), chat)


ROWS = [{"problem": f"What is {i} + 1?", "solution": f"#### {i + 1}"} for i in range(20)]


def test_columns_are_guessed_or_named(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    write(
        tmp_path, "test.jsonl", [{"problem": "What is 100 + 1?", "solution": "101", "other": "x"}]
    )
    task = load(chat, tmp_path)
    assert (len(task.train), len(task.test), task.train[3].answer) == (20, 1, "#### 4")
    with pytest.raises(
        SystemExit, match="--answer-column: there is no column 'nope'.*problem, solution, other"
    ):
        load(chat, tmp_path, answer_column="nope")
    write(tmp_path / "odd", "train.jsonl", [{"a": 1}])
    write(tmp_path / "odd", "test.jsonl", [{"a": 1}])
    with pytest.raises(
        SystemExit,
        match="--question-column: none of the usual names .* is there; the data set has the columns a",
    ):
        load(chat, tmp_path / "odd")


def test_eval_size_is_the_number_of_problems_that_there_are(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    for wanted, found in ((512, 5), (3, 3)):
        args = ppo.Args(
            dataset=str(tmp_path),
            train_split="train[:75%]",
            test_split="train[75%:]",
            eval_size=wanted,
        )
        load_task(args, chat)
        assert args.eval_size == found


def test_config_is_a_subfolder_and_other_formats_load(chat, tmp_path):
    write(tmp_path / "easy", "train.jsonl", ROWS)
    (tmp_path / "easy" / "test.csv").write_text("question,answer\nWhat is 3 * 3?,9\n")
    task = load(chat, tmp_path, dataset_config="easy")
    assert task.test[0].answer == "9"


def test_one_file_can_be_divided_by_slices(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    task = load(chat, tmp_path, train_split="train[:75%]", test_split="train[75%:]")
    assert (len(task.train), len(task.test)) == (15, 5)
    with pytest.raises(
        SystemExit, match="--test-split test: no test.jsonl.*found: train.jsonl; slices"
    ):
        load(chat, tmp_path)


def test_leaks_and_long_prompts_are_dropped_and_counted(chat, tmp_path):
    write(tmp_path, "train.jsonl", [*ROWS, {"problem": "word " * 200, "solution": "1"}])
    write(tmp_path, "test.jsonl", ROWS[:5])
    task = load(chat, tmp_path)
    assert len(task.train) == 15
    assert task.dropped == {
        "train problems with too long a prompt": 1,
        "train problems also in test": 5,
    }
    with pytest.raises(SystemExit, match="--test-split test: no problem is left of 5"):
        load(chat, tmp_path, max_prompt_tokens=1)


def test_duplicates_and_rows_without_a_question_are_counted(chat, tmp_path):
    write(tmp_path, "train.jsonl", [*ROWS, *ROWS[:3], {"problem": "", "solution": "1"}])
    write(tmp_path, "test.jsonl", [{"problem": "x", "solution": "1"}] * 2)
    assert load(chat, tmp_path).dropped == {
        "test problems asked before": 1,
        "train problems asked before": 3,
        "train problems without a question": 1,
    }
    write(tmp_path, "test.jsonl", [{"problem": "", "solution": "1"}, {"problem": "x"}])
    with pytest.raises(SystemExit, match="--test-split test: no problem is left of 2 .dropped"):
        load(chat, tmp_path)


def test_conversations_become_prompts_with_the_template_around_the_question(chat, tmp_path):
    before = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    asked = [{"role": "user", "content": "What is 2 + 3?"}]
    rows = [{"prompt": messages, "answer": "5"} for messages in (asked, before + asked)]
    write(tmp_path, "train.jsonl", rows)
    (tmp_path / "test.jsonl").write_text('{"prompt": "x", "answer": "1"}\n')
    task = load(chat, tmp_path, prompt_template="{question} Be brief.")
    asked = [{"role": "user", "content": "What is 2 + 3? Be brief."}]
    wanted = [chat.conversation_ids(asked), chat.conversation_ids(before + asked)]
    assert [p.prompt_ids for p in task.train] == wanted
    assert task.train[0].key == "What is 2 + 3?" != task.train[1].key


def test_prompt_and_answer_must_fit_the_model(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    write(tmp_path, "test.jsonl", [{"problem": "x", "solution": "1"}])
    chat.context = 100
    assert load(chat, tmp_path, max_new_tokens=48)
    with pytest.raises(
        SystemExit, match="--max-new-tokens 99: behind the longest prompt of .* 100 positions"
    ):
        load(chat, tmp_path, max_new_tokens=99)


def test_missing_data_and_bad_templates(chat, tmp_path):
    with pytest.raises(SystemExit, match="--dataset ./nowhere: no such file or folder"):
        load(chat, "./nowhere")
    with pytest.raises(SystemExit, match="--prompt-template 'x': it must contain"):
        load(chat, tmp_path, prompt_template="x")
    write(tmp_path, "train.jsonl", ROWS)
    (tmp_path / "test.jsonl").write_text("{broken\n")
    with pytest.raises(SystemExit, match="--test-split test: could not be loaded"):
        load(chat, tmp_path)


def test_models_that_do_not_load(tmp_path):
    with pytest.raises(SystemExit, match="--model ./nowhere: no such folder"):
        load_policy("./nowhere", torch.device("cpu"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="could not be loaded"):
        load_policy(str(tmp_path), torch.device("cpu"))


def test_data_order_is_a_permutation_per_epoch_keyed_by_seed(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    write(tmp_path, "test.jsonl", [{"problem": "x", "solution": "1"}])
    task = load(chat, tmp_path)
    epochs = [
        [p.key for u in range(start, start + 4) for p in task.batch(1, u, 5)] for start in (1, 5)
    ]
    assert (
        set(epochs[0]) == set(epochs[1]) == {p.key for p in task.train} and epochs[0] != epochs[1]
    )
    assert [p.key for p in task.batch(1, 3, 5)] == epochs[0][10:15]
    assert task.batch(1, 1, 5) != task.batch(2, 1, 5)


def test_prompt_and_second_turn_follow_the_chat_template(chat, tokenizer):
    turns = [
        {"role": "user", "content": "Hi 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Now 3"},
    ]
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    tokens = (
        chat.prompt_ids("Hi 1") + tokenizer("2<|end|>")["input_ids"] + chat.user_turn_ids("Now 3")
    )
    assert tokenizer.decode(tokens) == whole


def test_a_model_without_chat_template(tokenizer, tiny_model):
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    chat = Chat(plain, [plain.eos_token_id])
    assert chat.decode(chat.prompt_ids("Hi")) == "Question: Hi\nAnswer:"
    assert chat.decode(chat.user_turn_ids("Hi")) == "Question: Hi\nAnswer:"


def test_a_template_that_ends_turns_with_text_after_eos(tokenizer, tiny_model):
    """ChatML, as Qwen and SmolLM2 have it, puts a newline after EOS: it belongs to the user's
    turn."""
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    chat = Chat(other, [other.eos_token_id])
    assert other.decode(chat.user_turn_ids("Now 3")) == "\n<|user|>Now 3<|end|>\n<|assistant|>"


def test_rows_are_filled_with_eos():
    """Whether the tokenizer has a pad token or not."""
    assert Chat(SimpleNamespace(pad_token_id=99999), [3, 9]).pad_id == 3


def test_logits_that_are_rescaled_behind_the_head_are_refused(tmp_path, tokenizer):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, logits_scaling=8.0, eos_token_id=1, bos_token_id=None, pad_token_id=0, initializer_range=1.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="the logits of GraniteForCausalLM are not lm_head"):
        load_policy(str(tmp_path), torch.device("cpu"))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(SystemExit, match=f"--device {name}: not available here"):
            pick_device(name)


def test_what_a_device_is_set_to(monkeypatch):
    """--tf32 on a GPU alone; --deterministic before anything is put on one."""
    device = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: device)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        pick_device("cuda", tf32=False)
        assert torch.get_float32_matmul_precision() == before == "highest"
        assert not torch.are_deterministic_algorithms_enabled()
        pick_device("cuda", deterministic=True)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)

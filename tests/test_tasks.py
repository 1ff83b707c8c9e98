"""Loading data of many shapes, prompts, chat formats, and what is said about bad input."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import ppo_baseline as ppo
from utils.chat import Chat
from utils.models import load_policy, pick_device
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
    one = {"problem": "What is 100 + 1?", "solution": "101", "other": "x"}
    write(tmp_path, "test.jsonl", [one])
    task = load(chat, tmp_path)
    assert (len(task.train), len(task.test), task.train[3].answer) == (20, 1, "#### 4")
    refusal = "--answer-column: there is no column 'nope'.*problem, solution, other"
    with pytest.raises(SystemExit, match=refusal):
        load(chat, tmp_path, answer_column="nope")
    write(tmp_path / "odd", "train.jsonl", [{"a": 1}])
    write(tmp_path / "odd", "test.jsonl", [{"a": 1}])
    refusal = "--question-column: none of the usual names .*; the data set has the columns a"
    with pytest.raises(SystemExit, match=refusal):
        load(chat, tmp_path / "odd")


def test_a_configuration_is_a_subfolder_and_other_formats_load(chat, tmp_path):
    write(tmp_path / "easy", "train.jsonl", ROWS)
    (tmp_path / "easy" / "test.csv").write_text("question,answer\nWhat is 3 * 3?,9\n")
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "test.csv").write_text("question,answer\nWhat is 9 * 9?,81\n")
    assert load(chat, f"{tmp_path}:easy").test[0].answer == "9"
    task = load(chat, f"{tmp_path}:easy", test_dataset=f"{tmp_path}:hard")
    assert task.test[0].answer == "81" and len(task.train) == 20


def test_one_file_can_be_divided_by_slices(chat, tmp_path):
    """--eval-size is the number of problems that there are."""
    write(tmp_path, "train.jsonl", ROWS)
    for wanted, found in ((512, 5), (3, 3)):
        flags = {"train_split": "train[:75%]", "test_split": "train[75%:]", "eval_size": wanted}
        args = ppo.Args(dataset=str(tmp_path), **flags)
        task = load_task(args, chat)
        assert (len(task.train), len(task.test)) == (15, 5) and args.eval_size == found
    refusal = "--test-split test: no test.jsonl.*found: train.jsonl; slices"
    with pytest.raises(SystemExit, match=refusal):
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
    refusal = "--max-new-tokens 99: behind the longest prompt of .* 100 positions"
    with pytest.raises(SystemExit, match=refusal):
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


def test_a_model_that_is_not_there():
    with pytest.raises(SystemExit, match="--model ./nowhere: no such folder"):
        load_policy("./nowhere", torch.device("cpu"))


def test_data_order_is_a_permutation_per_epoch_keyed_by_seed(chat, tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    write(tmp_path, "test.jsonl", [{"problem": "x", "solution": "1"}])
    task = load(chat, tmp_path)
    one, two = (
        [p.key for first in range(start, start + 20, 5) for p in task.batch(1, first, 5)]
        for start in (0, 20)
    )
    assert set(one) == set(two) == {p.key for p in task.train} and one != two
    assert [p.key for p in task.batch(1, 10, 5)] == one[10:15]
    assert task.batch(1, 0, 5) != task.batch(2, 0, 5)


def test_rows_are_filled_with_eos():
    """Whether the tokenizer has a pad token or not."""
    assert Chat(SimpleNamespace(pad_token_id=99999), [3, 9]).pad_id == 3


def test_logits_that_are_rescaled_behind_the_head_are_refused(tmp_path, tokenizer):
    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, logits_scaling=8.0, eos_token_id=1,
        bos_token_id=None, pad_token_id=0, initializer_range=1.0,
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


def test_what_a_gpu_is_set_to(monkeypatch):
    """TF32, unless --deterministic is given, and that before anything is put on the GPU."""
    device = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: device)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        pick_device("cuda", deterministic=True)
        assert torch.get_float32_matmul_precision() == before == "highest"
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        pick_device("cuda")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)

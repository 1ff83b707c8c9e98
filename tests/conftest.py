"""Shared fixtures: a random tiny model with the embedded tokenizer, a small data set, and ways to
run a script."""

import gc
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "ppo_baseline", "grpo_baseline", "vrpo_math", "dvpo_math", "robust_ppo_baseline",
    "vine_ppo_baseline",
)  # fmt: skip
CRITICS = [name for name in SCRIPTS if name not in ("grpo_baseline", "vine_ppo_baseline")]
MACHINE = ("charts/tokens_per_second", "charts/peak_memory_gb")  # and all of time/
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
# the models are so small that a second thread only waits; what takes long to import is imported
# where it is used, as the process that starts the others needs none of it


def pytest_collection_finish(session):
    """What is imported stays: the collector need not look at it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_flag_outlives_its_test(monkeypatch):
    """A run leaves its precision and the like in these modules, and a maker its threads: two wait
    for each other, once the other processes of the suite have the cores."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    for name in ("tensors.HALF", "scale.prefixes.ON", "scale.processes.SHARDED"):
        monkeypatch.setattr(f"utils.{name}", False)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the scripts, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_math")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """A random Llama of 30 k parameters in Hugging Face format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """40 training and 8 test problems of the embedded data."""
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 40), ("test", 8)):
        file = ROOT / "assets" / "data" / "tiny_math" / f"{split}.jsonl"
        lines = file.read_text().splitlines()[:size]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small_flags(tiny_model, tiny_data) -> dict:
    """Flags of a run of two updates that takes a second."""
    return {
        "model": str(tiny_model), "dataset": str(tiny_data), "updates": 2, "prompts_per_update": 4,
        "samples_per_prompt": 2, "minibatch_size": 4, "micro_batch_size": 2, "max_new_tokens": 8,
        "eval_size": 4, "eval_every": 1, "save_every": 1, "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def dialogue_flags() -> dict:
    """Flags that turn the small run into one with the embedded assistant, user and reward model."""
    assets = ROOT / "assets"
    return {
        "task": "dialogue", "model": str(assets / "tiny_dialogue"),
        "dataset": str(assets / "data" / "tiny_dialogue"), "noise": "none", "kl_coef": 0.0,
        "reward_model": str(assets / "tiny_reward"), "max_turns": 4, "max_new_tokens": 40,
        "eval_size": 6,
    }  # fmt: skip


@pytest.fixture
def run_main(monkeypatch, tmp_path, small_flags):
    """run_main(name, **flags): a script's main() in this process and in a temporary folder; returns
    the run's folder. `plot=True` draws the curves too."""

    def run(name: str, plot: bool = False, **flags) -> Path:
        module = importlib.import_module(name)
        if not plot:  # a second for each picture
            monkeypatch.setattr("utils.report.finish.plot_runs", lambda folders, out: out)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        flags = {**small_flags, "run_name": name, **flags}
        module.main(module.Args(**flags))
        return tmp_path / "runs" / flags["run_name"]

    cleanups: list = []
    monkeypatch.setattr(
        "utils.run.atexit.register", lambda f, *a, **k: cleanups.append(partial(f, *a, **k))
    )
    yield run
    for cleanup in cleanups:
        cleanup()


@pytest.fixture
def command(small_flags):
    """command(name, **flags): the command line of a script."""

    def line(name: str, **flags) -> list[str]:
        words = [sys.executable, str(ROOT / f"{name}.py")]
        for key, value in {**small_flags, **flags}.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return words

    return line


@pytest.fixture
def parse(monkeypatch):
    """parse(script, *words): its command line as Args."""

    def parsed(script: str, *words):
        from utils.args import parse_args

        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        return parse_args(importlib.import_module(script).Args, None)

    return parsed


@pytest.fixture
def shell(tmp_path):
    """shell(words): run a command in a temporary folder, capturing its output."""

    def run(words: list[str], **environment: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment
        return subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return run


def bare_world(args, chat, task=None):
    """An environment without data: for rollouts of problems made by hand."""
    import torch

    from utils.world.environment import Environment
    from utils.world.tasks import MathTask

    env = Environment.__new__(Environment)
    env.args, env.chat, env.device = args, chat, torch.device("cpu")
    env.task, env.labels = task or MathTask([], [], {}), {}
    env.reward_model = env.reward_fn = None
    env.begun, env.save, env.scale = (0, 0), lambda: None, None
    return env


def read_metrics(folder: Path) -> str:
    """metrics.csv without the columns that measure the machine."""
    import pandas as pd

    frame = pd.read_csv(folder / "metrics.csv", dtype=str)
    machine = [c for c in frame.columns if c.startswith("time/") or c in MACHINE]
    return frame.drop(columns=machine).to_csv(index=False)


def assert_same_metrics(one: Path, other: Path, but: str = "time/", **tolerance: float) -> None:
    """Every metric of run `one`, but those that measure the machine and those that begin with
    `but`, is that of `other` too."""
    import pandas as pd

    left, right = (pd.read_csv(folder / "metrics.csv") for folder in (one, other))
    for key in left.columns:
        if not key.startswith(("time/", but)) and key not in MACHINE:
            wanted = pytest.approx(left[key].tolist(), nan_ok=True, **tolerance)
            assert right[key].tolist() == wanted, key


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]

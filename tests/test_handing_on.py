"""What a run hands on: its policy with a model card, whose command makes it again, and in the dtype
that it came in; its metrics to a tracker."""

import dataclasses
import importlib
import shlex
import shutil
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, read_metrics, read_samples
from utils.card import command, model_card
from utils.models import load_policy, save_policy, trainable
from utils.run import start_tracker
from utils.scale.processes import by_first

# ---- cards ----


def test_the_card_of_a_run_has_its_flags_and_results(run_main, parse, small_flags):
    flags = {
        "beta": 0.01,
        "noise": "group",
        "thinking": True,
        "prompt_template": "-it's {question}",
    }
    folder = run_main("vrpo_math", **flags)
    card = ModelCard.load(folder / "checkpoints" / "000002" / "policy" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "vrpo_math"],
    }  # the base model is a local folder, which the hub would refuse as an id
    _, script, *words = shlex.split(card.text.split("```")[1])
    wanted = vars(importlib.import_module("vrpo_math").Args(**small_flags, **flags))
    assert script == "vrpo_math.py" and vars(parse("vrpo_math", *words)) == wanted
    python = sys.version.split()[0]
    right = pd.read_csv(folder / "metrics.csv")["eval/accuracy"]
    for lines in (
        f"| noise | group, --noise-rate 0.2 |\n| made with | Python {python}, ",
        "| greedy, n = 4 | update | clean held-out accuracy |",
        f"| before | 0 | {right[0]:.3f} |\n| after | 2 | {right[2]:.3f} |",
    ):
        assert lines in card.text


def test_cards_of_other_runs(parse):
    """Hub ids, LoRA and a reward model are named, a policy without evaluations says so; dialogue's
    own defaults are no differing flags."""
    words = ("--task", "dialogue", "--model", "a/b", "--lora-rank", "4")
    args = parse("grpo_baseline", *words)
    assert command(args, "grpo_baseline.py") == " ".join(("python grpo_baseline.py", *words))
    card = ModelCard(model_card(args, "run", 3, [{"update": "3", "charts/episodes": "96"}], 5))
    assert card.data.base_model == "a/b" and "It has not been evaluated." in card.text
    reward = "| reward | assets/tiny_reward |"
    for line in ("# run", "`a/b` after 3 updates", reward, "| noise | none |", ", peft "):
        assert line in card.text
    rows = [{"update": "0", "eval/average": "0.25"}, {"update": 4, "eval/average": 0.5}]
    mine = dataclasses.replace(args, reward_fn="rewards:short", reward_model=None)
    text = model_card(mine, "run", 4, rows, 5)
    assert "| before | 0 | 0.250 |\n| after | 4 | 0.500 |" in text
    assert "| reward | rewards:short |" in text


# ---- policies ----


@pytest.fixture(scope="module")
def rounded(tiny_model, tmp_path_factory):
    """The tiny model as a checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "rounded"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_a_policy_is_saved_in_the_dtype_of_its_source(rounded, run_main):
    """And what is trained, in float32, is what --resume goes on from."""
    flags = {"model": str(rounded), "learning_rate": 1e-3}
    run = run_main("ppo_baseline", **flags)
    found, folder = (read_metrics(run), read_samples(run)), run / "checkpoints" / "000002"
    shutil.rmtree(folder)
    run_main("ppo_baseline", resume=run, **flags)
    assert (read_metrics(run), read_samples(run)) == found
    trained = torch.load(folder / "state.pt", weights_only=True)["policy"]
    files = load_file(folder / "policy" / "model.safetensors")
    assert files.keys() == load_file(rounded / "model.safetensors").keys()  # tied: once
    for name, x in files.items():
        assert x.dtype == torch.bfloat16 and torch.equal(x, trained[name].bfloat16())
    assert not torch.equal(trained[name], trained[name].bfloat16().float())
    assert AutoModelForCausalLM.from_pretrained(folder / "policy").dtype == torch.bfloat16


def test_a_policy_in_float32_is_saved_once(run_main):
    folder = run_main("grpo_baseline", updates=1) / "checkpoints" / "000001"
    assert "policy" not in torch.load(folder / "state.pt", weights_only=True)
    policy = load_file(folder / "policy" / "model.safetensors")
    assert {x.dtype for x in policy.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_adapters_in_the_dtype_of_the_source(rounded, tiny_model, tmp_path, dtype):
    """Whatever the frozen weights are computed in."""
    for source, wanted in ((rounded, torch.bfloat16), (tiny_model, torch.float32)):
        policy, _ = load_policy(str(source), torch.device("cpu"), lora_rank=2, dtype=dtype)
        for parameter in trainable(policy):
            torch.nn.init.normal_(parameter)
        save_policy(policy, tmp_path / str(wanted))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(wanted))
        assert plain.dtype == wanted and policy.get_base_model().dtype == dtype


# ---- trackers ----


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_every_row(name, run_main, monkeypatch):
    told, ended = {}, []

    def init(**names):
        run = SimpleNamespace(finish=lambda: ended.append(name))
        run.log = lambda metrics, step: told.update({step: metrics})
        told["names"] = names
        return run

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    folder = run_main("grpo_baseline", track=name, run_name="tracked")
    names = told.pop("names")
    assert (names["project"], names["name"], names["config"]["updates"]) == ("vrpo", "tracked", 2)
    frame = pd.read_csv(folder / "metrics.csv", index_col="update")
    assert ended == [name] and list(told) == frame.index.tolist() == [0, 1, 2]
    for update, metrics in told.items():
        assert metrics == pytest.approx(frame.loc[update].dropna().to_dict())


def test_only_the_first_process_tracks(monkeypatch):
    monkeypatch.setattr("utils.scale.processes.RANK", 1)
    monkeypatch.setitem(sys.modules, "trackio", None)  # an import would fail
    assert by_first(start_tracker)(SimpleNamespace(track="trackio"), ROOT, {}) is None


@pytest.mark.parametrize(
    "name, advice", [("wandb", "WANDB_MODE=offline"), ("trackio", "no network")]
)
def test_a_tracker_that_does_not_start(name, advice, run_main, monkeypatch, tmp_path):
    """Not installed, no key, no network: one sentence, and the run's name is still free."""

    def fail(**_):
        raise ValueError("1 no\n  key")

    for module, words in (
        (None, f"--track {name}: .*{name}.* \\(pip install {name}\\)"),
        (
            SimpleNamespace(init=fail),
            f"--track {name}: it did not start \\(1 no key\\); .*{advice}",
        ),
    ):
        monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(SystemExit, match=f"^error: {words}"):
            run_main("grpo_baseline", track=name, run_name="w")
        assert not [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and p.name != ".lock"]


def test_wandb_itself(run_main, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run_main("grpo_baseline", track="wandb", updates=1)
    run_main("grpo_baseline", track="wandb", updates=2, resume=folder)  # goes on in W&B as well
    runs = [file.stem for file in (folder / "wandb").glob("offline-run-*/*.wandb")]
    assert len(runs) == 2 and len(set(runs)) == 1


def test_trackio_itself(run_main, monkeypatch, tmp_path):
    """The only test that imports it: then it reads where to write."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    trackio = pytest.importorskip("trackio")
    run_main("grpo_baseline", track="trackio", updates=1, run_name="t")
    (run,) = trackio.Api().runs("vrpo")
    assert run.name == "t" and run.config["updates"] == 1
    assert (tmp_path / "tracked" / "vrpo.db").exists()

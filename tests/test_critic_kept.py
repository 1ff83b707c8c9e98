"""The critic in a checkpoint: what is kept of it, who starts from it, who reads it."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.conftest import ROOT, read_metrics
from tests.test_tensors import ROWS, TWO_TURNS
from utils.checkpoints import (
    digests,
    kept_weights,
    save_critic,
    shapes,
    start_critic,
    trained_state,
)
from utils.keyed import row_seeds
from utils.models import load_policy
from utils.report import evaluate, tokens
from utils.report.values import KeptCritic, calibration, measures
from utils.tensors import pack

CPU = torch.device("cpu")
KINDS = {
    "ppo_baseline": {},
    "vrpo_math": {},
    "vrpo_math, lora": {"lora_rank": 2},
    "dvpo_math": {"quantile_heads": 2, "quantiles": 5},
    "robust_ppo_baseline": {"worst_case": "ensemble-min"},
}


@pytest.fixture
def keep(tiny_model, tmp_path):
    """keep(script, **flags): its untrained critic, moved a little, as a checkpoint's folder; the
    module, arguments and critic."""

    def made(name: str, folder="kept", **flags):
        module = importlib.import_module(name)
        args = module.Args(**{"model": str(tiny_model), **flags})
        policy, chat = load_policy(args.model, CPU, args.lora_rank)
        torch.manual_seed(5)
        critic = module.Critic(policy, args)
        with torch.no_grad():
            for p in critic.parameters():
                p += 0.1 * torch.randn_like(p) if p.requires_grad else 0.0
        checkpoint = tmp_path / folder
        policy.save_pretrained(checkpoint / "policy")
        chat.tokenizer.save_pretrained(checkpoint / "policy")
        flags = {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()}
        made_by = {"update": 1, "script": name, **flags}
        save_critic(critic, trained_state(critic), checkpoint / "critic", made_by)
        return module, args, critic, checkpoint / "critic"

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_the_critic(kind, keep):
    """Its backbone, which plain transformers loads; all that is trained, to the last bit; nothing
    twice; and its values are those of the living critic."""
    module, args, critic, folder = keep(kind.split(",")[0], **KINDS[kind])
    parts = {"config.json", "model.safetensors", "critic.json", "head.safetensors"}
    assert {file.name for file in folder.iterdir()} == parts
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    saved = kept_weights(folder, critic)
    assert shapes(saved) == shapes(trained)
    assert all(torch.equal(saved[name], p) for name, p in trained.items())
    head = load_file(folder / "head.safetensors")
    assert any(name.startswith("backbone.") for name in head) == bool(args.lora_rank)
    batch = pack([*ROWS, *TWO_TURNS], 0, CPU)
    if args.lora_rank:  # merged into the weights
        backbone, inputs = AutoModel.from_pretrained(folder), batch["inputs"]
        with torch.no_grad():
            ours = critic.backbone(input_ids=inputs).last_hidden_state
            assert torch.allclose(backbone(inputs).last_hidden_state, ours, atol=1e-4)
        return
    there = KeptCritic(folder, CPU)
    found = there.values([*ROWS, *TWO_TURNS])
    batch["seed"] = row_seeds(batch["mask"], args.seed, "kept critic", 0)
    wanted = module.score_tokens(critic, batch, args)["values"]
    for row, mine, episode in zip(wanted, found, [*ROWS, *TWO_TURNS], strict=True):
        assert len(mine) == len(episode.tokens)
        assert torch.equal(torch.tensor(mine), row[: len(mine)])
    some = [v for v in there.values(ROWS)[0] if v]
    assert there.ends(ROWS)[0] == (some[0], some[-1])


def start(monkeypatch, made, script=None, **flags):
    """The critic of a run with other flags, started from a kept one."""
    module, args, _, folder = made
    script = script or module.__name__
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    flags = {"model": args.model, "critic_init": str(folder), **flags}
    args = module.Args(**flags)
    policy, _ = load_policy(args.model, CPU, args.lora_rank)
    return start_critic(module.Critic(policy, args), args)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_a_kept_critic(kind, keep, monkeypatch):
    made = keep(kind.split(",")[0], **KINDS[kind])
    mine = dict(start(monkeypatch, made, **KINDS[kind]).named_parameters())
    for name, p in made[2].named_parameters():
        if p.requires_grad:
            assert torch.equal(p, mine[name]) and mine[name].requires_grad
    if kind == "vrpo_math, lora":  # without LoRA the merged backbone is what it starts from
        plain = start(monkeypatch, made)
        tokens = torch.arange(5, 15).unsqueeze(0)
        states = [c.backbone(input_ids=tokens).last_hidden_state for c in (plain, made[2])]
        assert torch.allclose(*states, atol=1e-4)


def test_another_script_with_the_same_critic_may_start_from_it(keep, monkeypatch):
    made = keep("vrpo_math")
    started = start(monkeypatch, made, "vrpo_dialogue")
    assert torch.equal(started.head.weight, made[2].head.weight)


SIZES = "it does not fit --model and the critic's flags: its "
REFUSED = {
    "another method": ("ppo_baseline", {}, "robust_ppo_baseline", {},
                       "ppo_baseline.py made it, whose Critic is not robust_ppo_baseline.py's"),
    "quantiles": ("dvpo_math", {"quantile_heads": 4, "quantiles": 5}, None,
                  {"quantile_heads": 5, "quantiles": 4}, "it was made with --quantile-heads 4"),
    "no LoRA": ("ppo_baseline", {}, None, {"lora_rank": 2}, "it was made with --lora-rank 0"),
    "adapters of another model": ("ppo_baseline", {"lora_rank": 2}, None,
                                  {"lora_rank": 2, "model": str(ROOT / "assets" / "tiny_math")},
                                  "it was made with --model"),
    "another code": ("vrpo_math", {}, None, {"latent_dim": 8},
                     SIZES + "decoder.0.bias is (64,), where (8,) is wanted"),
    "heads": ("robust_ppo_baseline", {"worst_case": "ensemble-min"}, None,
              {"worst_case": "ensemble-min", "value_heads": 2},
              SIZES + "head.bias is (4,), where (2,) is wanted"),
    "another model": ("ppo_baseline", {}, None, {"model": str(ROOT / "assets" / "tiny_math")},
                      SIZES + "head.weight is (1, 32), where (1, "),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused(why, keep, monkeypatch):
    name, flags, script, others, words = REFUSED[why]
    made = keep(name, **flags)
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, made, script, **others)
    assert caught.value.code.startswith(f"error: --critic-init {made[-1]}: {words}")


def overwrite(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def rewrite(**changes):
    def spoil(folder):
        found = json.loads((folder / "critic.json").read_text())
        (folder / "critic.json").write_text(json.dumps(found | changes))

    return spoil


DAMAGES = {
    "nothing": (shutil.rmtree, "no critic is there (No such file or directory"),
    "no JSON": (overwrite("critic.json", b"\xff{"), "no critic is there ("),
    "a list": (overwrite("critic.json", b"[]"), "no critic is there (a JSON object is wanted)"),
    "no script": (rewrite(script=7), "no critic is there (it names no script and model)"),
    "a module of Python": (rewrite(script="antigravity"), "it was made by antigravity.py, which"),
    "a path": (rewrite(script="../x"), "it was made by ../x.py, which does not lie beside utils/"),
    "no critic in it": (rewrite(script="grpo_baseline"), "grpo_baseline.py "),
    "cut": (overwrite("head.safetensors", b"x" * 9), "could not be read ("),
    "no backbone": (overwrite("model.safetensors", b""), "could not be read ("),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused_in_one_sentence(damage, keep, monkeypatch):
    spoil, words = DAMAGES[damage]
    made = keep("ppo_baseline")
    spoil(made[-1])
    for flag in ("--critic-init", "--critic"):
        with pytest.raises(SystemExit) as caught:
            start(monkeypatch, made) if flag == "--critic-init" else KeptCritic(made[-1], CPU)
        assert caught.value.code.startswith(f"error: {flag} {made[-1]}: {words}")
        assert "\n" not in caught.value.code and "antigravity" not in sys.modules


def test_critic_json_that_does_not_fit_its_script(keep):
    folder = keep("vrpo_math")[-1]
    for change, words in (
        ({"latent_dim": "wide"}, "critic.json does not fit its script"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0"),
        ({"latent_dim": 8}, "its decoder.0.bias is"),
    ):
        rewrite(**change)(folder)
        with pytest.raises(SystemExit, match=words):
            KeptCritic(folder, CPU)
        rewrite(latent_dim=64, micro_batch_size=16)(folder)
    shutil.rmtree(folder.parent / "policy")
    with pytest.raises(SystemExit, match="policy/ is not beside it"):
        KeptCritic(folder, CPU)


# ---- runs ----


def test_a_run_that_starts_from_another_ones_critic(run_main):
    """Its head keeps its bias; resumed it needs the other run no more, and gives the same metrics."""
    first = run_main("vrpo_math", run_name="first", updates=1)
    kept = first / "checkpoints" / "000001" / "critic"
    assert {f"critic/{file.name}" for file in kept.iterdir()} <= digests(kept.parent).keys()
    assert "critic" not in torch.load(kept.parent / "state.pt", weights_only=True)
    flags = {"critic_init": str(kept), "learning_rate": 1e-3}
    still = {"critic_learning_rate": 0.0, "head_learning_rate": 0.0}
    run = run_main("vrpo_math", run_name="still", updates=1, **flags, **still)
    for name in ("head.safetensors", "model.safetensors"):
        there = load_file(run / "checkpoints" / "000001" / "critic" / name)
        assert all(torch.equal(x, there[key]) for key, x in load_file(kept / name).items())
    whole = run_main("vrpo_math", run_name="whole", **flags)
    found = read_metrics(whole)
    shutil.rmtree(first), shutil.rmtree(whole / "checkpoints" / "000002")
    run_main("vrpo_math", resume=whole, **flags)
    assert read_metrics(whole) == found and (whole / "checkpoints" / "000002").exists()


# ---- readers ----


def test_measures_by_hand():
    right = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    values = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
    found = measures(values, right)
    assert found["answers"] == 10 and found["right"] == pytest.approx(0.6)
    assert found["AUC"] == pytest.approx(23 / 24)  # one of 24 pairs stands the wrong way round
    bins = [0.05 - 0, 0.25 - 0.5, 0.45 - 0.5, 0.65 - 1, 0.9 - 1]
    assert found["ECE"] == pytest.approx(sum(map(abs, bins)) / 5)
    error = right - values
    assert found["explained variance"] == pytest.approx(1 - (error.var() / right.var()).item())
    rows = calibration(values, right)
    assert [row["answers"] for row in rows] == [2] * 5 and rows[1]["right"] == 0.5
    assert rows[0]["from"] == 0 and rows[-1]["to"] == 1
    alike = measures(torch.tensor([0.5, 0.6]), torch.tensor([1.0, 1.0]))
    assert pd.isna(alike["AUC"]) and pd.isna(alike["explained variance"])
    assert alike["ECE"] == pytest.approx(0.45)


def test_evaluate_and_tokens_read_it(run_main, tmp_path, tiny_data, monkeypatch):
    """Of every greedy and sampled answer the values of first and last state, beside the verdicts;
    on the page a line of that critic's values below the run's own."""
    flags = {"model": str(ROOT / "assets" / "tiny_math"), "max_new_tokens": 32, "eval_size": 1}
    flags |= {"prompts_per_update": 2, "epochs": 1}
    runs = [run_main(name, updates=1, **flags) for name in ("vrpo_math", "grpo_baseline")]
    folder, out = runs[0] / "checkpoints" / "000001" / "critic", tmp_path / "out"
    args = evaluate.Args(
        critic=folder, dataset=(str(tiny_data),), samples=2, out=out, device="cpu", batch_size=8,
        max_new_tokens=32,
    )  # fmt: skip
    evaluate.main(dataclasses.replace(args, critic=None, model=str(folder.parent / "policy")))
    plain = (out / "completions.jsonl").read_text()
    evaluate.main(args)
    frame = pd.read_csv(out / "critic.csv").set_index(["decoding", "state"])
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert list(frame["answers"]) == [8, 8, 16, 16] and len(lines) == 24
    for line, other in zip(lines, plain.splitlines(), strict=True):  # the same samples
        assert line == json.loads(other) | {k: line[k] for k in ("first value", "last value")}
    greedy = pd.DataFrame([line for line in lines if line["decoding"] == "greedy"])
    assert greedy["last value"].mean() == pytest.approx(frame["value"]["greedy", "last"], abs=1e-5)
    assert greedy["right"].mean() == pytest.approx(frame["right"]["greedy", "first"])
    assert len(pd.read_csv(out / "calibration.csv")) == 20
    with pytest.raises(SystemExit, match="--critic .*/nowhere: no critic is there"):
        evaluate.main(dataclasses.replace(args, critic=folder / "nowhere"))
    page = tmp_path / "page.html"
    tokens.main(tokens.Args(runs=tuple(runs), out=page, rows=1, critic=folder))
    names = ["vrpo_math", "vrpo_math --critic", "grpo_baseline", "grpo_baseline --critic"]
    text = page.read_text()
    places = [text.index(f"<b>{name}</b>") for name in names]
    assert places == sorted(places) and text.count("<small class='legend values'>") == 1
    rows = (runs[0] / "transcripts.jsonl").read_text().replace('"ids"', '"no"')
    (runs[0] / "transcripts.jsonl").write_text(rows)
    with pytest.raises(SystemExit, match="its tokens are not those of .*an older version"):
        tokens.main(tokens.Args(runs=runs[:1], out=page, critic=folder))
    args = dataclasses.replace(args, model=str(ROOT / "assets" / "tiny_science"))
    with pytest.raises(SystemExit, match="its tokens are not those of --model"):
        evaluate.main(args)

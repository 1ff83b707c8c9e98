"""What cannot go on ends in one sentence, loses nothing and is never silently wrong: flags, names,
damaged runs, signals, disks, terminals, and what hostile data may do to them."""

import csv
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.conftest import ROOT, SCRIPTS, read_metrics
from utils import errors, files
from utils.args import MAY_BE_ZERO, SHARES, check_flags, check_ranges, parse_args
from utils.report import diagnose, evaluate, plot, tokens
from utils.run import Run
from utils.world import dialogue, reward_model
from utils.world.votes import majority_vote

ALL = (*SCRIPTS, "vrpo_dialogue")
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\rgone\u202e"
MARKUP = "[bold]x[/red] :boom: [link=http://x]"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with what it holds, but for locks."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def refused(call, *words: str) -> str:
    """The one sentence in which `call` ends; it has these words."""
    with pytest.raises(SystemExit) as caught:
        call()
    sentence = caught.value.code
    assert isinstance(sentence, str) and sentence.startswith("error: "), sentence
    assert len(sentence) < 700 and "\n" not in sentence and "Traceback" not in sentence
    assert all(word in sentence for word in words), sentence
    return sentence


# ---- flags ----


@pytest.mark.parametrize("name", ALL)
def test_every_number_has_limits(name):
    """Infinity and NaN in any float flag, absurd and negative sizes in any other, by its name."""
    args = importlib.import_module(name).Args
    fields = {f.name: f.type for f in dataclasses.fields(args)}
    numbers = [n for n, kind in fields.items() if kind in (float, float | None)]
    counts = [n for n, kind in fields.items() if kind is int]
    assert len(numbers) >= 11 and len(counts) >= 15
    for flag in numbers:
        for value in (float("inf"), float("-inf"), float("nan"), -0.1):
            words = f"--{flag.replace('_', '-')} {value}: must be"
            refused(lambda f=flag, v=value: check_flags(args(**{f: v})), words)
    for flag in counts:
        for value in (
            10 ** (12 if flag != "seed" else 30),
            -1,
            *(() if flag in MAY_BE_ZERO else (0,)),
        ):
            words = f"--{flag.replace('_', '-')} {value}: must be"
            refused(lambda f=flag, v=value: check_flags(args(**{f: v})), words)
    check_flags(args())
    assert "learning_rate" in SHARES  # 1e30 leaves finite weights that are worth nothing


def test_sizes_devices_and_groups_that_make_no_sense():
    ppo, grpo = (importlib.import_module(n).Args for n in ("ppo_baseline", "grpo_baseline"))
    many = ppo(prompts_per_update=10**5, samples_per_prompt=10**5)
    refused(lambda: check_flags(many), "10000000000 episodes in an update")
    refused(lambda: check_flags(ppo(device="meta")), "--device meta")
    refused(lambda: check_ranges(evaluate.Args(device="meta")), "--device meta")
    for advantage in ("grpo", "dr_grpo", "rloo"):
        args = grpo(samples_per_prompt=1, advantage=advantage)
        refused(lambda args=args: check_flags(args), "--samples-per-prompt 1", advantage)
    for advantage in ("reinforce_pp", "forward"):
        check_flags(grpo(samples_per_prompt=1, advantage=advantage))
    check_flags(ppo(samples_per_prompt=1))


@pytest.mark.parametrize("rows", [0, -1])
def test_the_commands_check_their_numbers(rows, tmp_path):
    args = tokens.Args(runs=(tmp_path,), rows=rows, out=tmp_path / "x.html")
    refused(lambda: tokens.main(args), f"--rows {rows}: must be at least 1")
    for flags in (
        {"play": rows},
        {"count": rows},
        {"max_turns": rows},
        {"temperature": rows - 1.0},
    ):
        refused(lambda flags=flags: dialogue.main(dialogue.Args(**flags)), "must be at least")
    refused(lambda: evaluate.main(evaluate.Args(limit=rows)), f"--limit {rows}")
    refused(lambda: reward_model.main(reward_model.Args(goals=rows)), f"--goals {rows}")
    inf = float("inf")
    refused(lambda: reward_model.main(reward_model.Args(learning_rate=inf)), "--learning-rate inf")
    refused(lambda: dialogue.main(dialogue.Args(temperature=inf)), "--temperature inf")


def test_an_answer_beyond_the_context_is_refused_at_the_start(run_main, tmp_path, tiny_model):
    flags = {"max_new_tokens": 500, "run_name": "long"}
    refused(lambda: run_main("grpo_baseline", **flags), "--max-new-tokens 500", "512 positions")
    assert tree(tmp_path / "runs") == {}  # the name is still free
    args = evaluate.Args(model=str(tiny_model), dataset=("x",), max_new_tokens=512, device="cpu")
    refused(
        lambda: evaluate.main(
            dataclasses.replace(args, dataset=(str(ROOT / "assets" / "data" / "tiny_math"),))
        ),
        "512 positions",
    )


# ---- names ----


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../x", "a/../../x", "/tmp/x", "x" * 300, f"a/{'y' * 300}", "a\x1b[2Jb", "a\nb"],
)
def test_nothing_is_written_outside_runs(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    args = importlib.import_module("ppo_baseline").Args(run_name=name)
    refused(lambda: Run(args), "--run-name")
    assert tree(tmp_path) == {} and not Path("/tmp/x/args.json").exists()
    assert {p.name for p in tmp_path.rglob("*")} <= {"here", "runs", "a"}


def test_a_name_with_markup_is_shown_as_it_is(run_main, capsys):
    folder = run_main("grpo_baseline", updates=1, run_name=f"a/{MARKUP.replace('/', '|')}")
    said = capsys.readouterr().out.replace("\n", "")
    assert folder.exists() and said.count(folder.name) >= 3


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = importlib.import_module("ppo_baseline").Args(run_name="x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only disk
    refused(lambda: Run(args), "--run-name: runs/x", "read-only disk")
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    shutil.rmtree("runs")
    Path("runs").write_text("a file")
    refused(lambda: Run(args), "--run-name: runs/x is no folder that can be written")


# ---- two at once ----


def test_two_processes_never_work_in_one_folder(tmp_path, monkeypatch):
    """Not two new runs of a name, not two --resume; a kill -9 frees the folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x"
    code = "import time; from pathlib import Path; from utils.files import claim\n"
    code += f"lock = claim(Path({str(folder)!r})); print('mine', flush=True); time.sleep(60)"
    folder.mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    args = importlib.import_module("ppo_baseline").Args(run_name="x")
    refused(lambda: Run(args), "runs/x: another process is at work there")
    args = dataclasses.replace(args, resume=folder)
    refused(lambda: Run(args), "another process is at work there")
    assert tree(folder) == {}
    other.kill(), other.wait()
    files.claim(folder).close()


# ---- --resume ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data) -> Path:
    """A small run of vrpo_math with two checkpoints."""
    folder, module = tmp_path_factory.mktemp("finished"), importlib.import_module("vrpo_math")
    before, argv = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["vrpo_math.py"]
    module.main(module.Args(
        model=str(tiny_model), dataset=str(tiny_data), updates=2, prompts_per_update=4, samples_per_prompt=2, minibatch_size=4,
        micro_batch_size=2, max_new_tokens=8, eval_size=4, eval_every=1, save_every=1, device="cpu", run_name="x",
    ))  # fmt: skip
    os.chdir(before)
    sys.argv = argv
    return folder / "runs" / "x"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "runs" / "copy")
    return tmp_path / "runs" / "copy"


def resume(folder: Path, monkeypatch, *words: str) -> None:
    """`python vrpo_math.py --resume folder words`, in this process."""
    module = importlib.import_module("vrpo_math")
    monkeypatch.setattr("utils.report.finish.plot_runs", lambda folders, out: out)
    monkeypatch.setattr(sys, "argv", ["vrpo_math.py", "--resume", str(folder), *words])
    module.main(parse_args(module.Args, None))


def forget(folder: Path, *keys: str) -> None:
    """Another state.pt with a manifest that fits."""
    for checkpoint in (folder / "checkpoints").iterdir():
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        torch.save({k: v for k, v in state.items() if k not in keys}, checkpoint / "state.pt")


def sign(folder: Path) -> None:
    from utils.checkpoints import digests

    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text(json.dumps(digests(checkpoint)))


FLAG_DAMAGES = {
    "a list": ("[1, 2]", "no readable args.json"),
    "null": ("null", "no readable args.json"),
    "binary": (b"\xff\xfe\x00\x01", "no readable args.json"),
    "cut": ('{"script": "vrpo_math", "upda', "no readable args.json"),
    "deep": ("[" * 100_000, "no readable args.json"),
    "no script": ({"script": None}, "no readable args.json"),
    "script of another type": ({"script": ["vrpo_math"]}, "no readable args.json"),
    "another script": ({"script": "ppo_baseline"}, "ppo_baseline.py made that run"),
    "a number as text": ({"updates": "2"}, "updates '2', where one fits of: int"),
    "a fraction": ({"updates": 2.5}, "updates 2.5"),
    "a text as number": ({"model": 7}, "model 7"),
    "a list of texts": ({"dataset": ["a"]}, "dataset ['a']"),
    "no truth value": ({"thinking": "yes"}, "thinking 'yes'"),
    "null for a number": ({"beta": None}, "beta None"),
    "a noise that is no more": ({"noise": "salt"}, "noise 'salt', where one fits of: none, symm"),
    "a choice that is no more": ({"bottleneck_layers": 9}, "bottleneck_layers 9"),
    "a flag that is no more": ({"elf": 1}, "flags that are no more: elf"),
    "infinite": ({"learning_rate": float("inf")}, "--learning-rate inf"),
    "not a number": ({"beta": float("nan")}, "--beta nan"),
    "absurd": ({"prompts_per_update": 10**15}, "--prompts-per-update"),
}


@pytest.mark.parametrize("damage", FLAG_DAMAGES)
def test_flags_of_a_foreign_run_are_refused(damage, copy, monkeypatch):
    text, words = FLAG_DAMAGES[damage]
    file = copy / "args.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(file.read_text()) | text)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(copy)
    refused(lambda: resume(copy, monkeypatch), words)
    assert tree(copy) == before


def empty_state(folder):
    forget(folder, "optimizer", "scale", "adapters")


def no_critic(folder):
    for critic in folder.glob("checkpoints/*/critic"):
        shutil.rmtree(critic)


def other_sizes(folder):
    """The moments of a wider model, which torch itself would load."""
    for checkpoint in (folder / "checkpoints").iterdir():
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"] = torch.zeros(3, 3)
        torch.save(state, checkpoint / "state.pt")


def other_model(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    for checkpoint in (folder / "checkpoints").iterdir():
        config = AutoConfig.from_pretrained(checkpoint / "policy")
        config.hidden_size, config.head_dim = 64, 32
        AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint / "policy")


def lacking_weights(folder, model="policy", name="model.layers.1.mlp.up_proj.weight"):
    from safetensors.torch import load_file, save_file

    for file in folder.glob(f"checkpoints/*/{model}/model.safetensors"):
        weights = load_file(file)
        del weights[name]
        save_file(weights, file, {"format": "pt"})


def odd_scale(folder):
    for checkpoint in (folder / "checkpoints").iterdir():
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        torch.save(state | {"scale": {None: "wide"}}, checkpoint / "state.pt")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


def of_states(content):
    def damage(folder):
        for file in folder.glob("checkpoints/*/state.pt"):
            file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)

    return damage


STATE_DAMAGES = {
    "empty": (empty_state, "does not fit this run (it has no 'optimizer')"),
    "older, no optimizer": (lambda f: forget(f, "optimizer"), "it has no 'optimizer'"),
    "older, no scale": (lambda f: forget(f, "scale"), "it has no 'scale'"),
    "no critic": (no_critic, "does not fit this run (No such file or directory"),
    "a critic that lacks weights": (
        lambda f: lacking_weights(f, "critic", "layers.1.mlp.up_proj.weight"),
        "its critic lacks layers.1.mlp.up_proj.weight",
    ),
    "another scale": (odd_scale, "does not fit this run"),
    "moments of other sizes": (other_sizes, "moments have other sizes"),
    "another model's size": (other_model, "does not fit this run"),
    "weights that it lacks": (lacking_weights, "lacks model.layers.1.mlp.up_proj.weight"),
    "hostile": (of_states(Hostile()), "no undamaged checkpoint"),
    "an empty file": (of_states(b""), "no undamaged checkpoint"),
    "a list": (of_states([1, 2]), "no undamaged checkpoint"),
}


@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_states_of_a_foreign_run_are_refused(damage, copy, monkeypatch):
    """Their manifests fit, so they are whole; nothing of the run is touched."""
    spoil, words = STATE_DAMAGES[damage]
    spoil(copy), sign(copy)
    before = tree(copy)
    refused(lambda: resume(copy, monkeypatch, "--updates", "3"), words)
    assert tree(copy) == before and not Path("owned").exists()


ROW_DAMAGES = {
    "metrics.csv": (b"\xff\x00\x01\n", b"update\n0\n", b"update,charts/episodes,x\n0,0,many\n", b"a,b\n1,2,3\n", b"update,charts/episodes\n0,0\n1,"),
    "samples.jsonl": (b"\xff\x00\n", b"7\n", b'{"update": "soon"}\n', b'{"cut\n{"update": 0}\n', b"{}\n"),
    "transcripts.jsonl": (b"\x80abc\n", b"[]\n", b'{"update": null}\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", ROW_DAMAGES)
def test_damaged_rows_are_refused(name, copy, monkeypatch):
    """And without the file the run goes on."""
    for content in ROW_DAMAGES[name]:
        (copy / name).write_bytes(content)
        before = tree(copy)
        refused(lambda: resume(copy, monkeypatch, "--updates", "3"), f"{name} is damaged")
        assert tree(copy) == before
    (copy / name).unlink()
    resume(copy, monkeypatch, "--updates", "3")
    assert (copy / "checkpoints" / "000003").exists() and (copy / name).stat().st_size


def test_fewer_updates_than_there_are(copy, monkeypatch):
    before = tree(copy)
    refused(lambda: resume(copy, monkeypatch, "--updates", "1"), "is at update 2 already")
    assert tree(copy) == before


def test_a_damaged_checkpoint_is_passed_over_whatever_it_is(copy, monkeypatch, capsys):
    """A hostile one of the newest update, and the one before it is gone on from."""
    metrics = read_metrics(copy)
    torch.save(Hostile(), copy / "checkpoints" / "000002" / "state.pt")
    sign(copy)
    resume(copy, monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert "its state holds other things than numbers" in said and not Path("owned").exists()
    assert read_metrics(copy) == metrics


# ---- nothing is lost ----


def test_votes_cut_inside_a_batch_come_out_the_same(tmp_path):
    """Whatever line a kill -9 has left, labels and votes are those of the run that was not
    killed; more problems change none of them."""
    from utils.keyed import seed_torch  # noqa: F401  majority_vote seeds by it
    from utils.world.problems import Problem
    from utils.world.tasks import MathTask

    problems = [Problem(f"q{i}", "1", []) for i in range(10)]

    def play(some):
        drawn = torch.randint(0, 3, (len(some),)).tolist()
        return [
            SimpleNamespace(problem=p, completions=[f"#### {x}"], finished=True)
            for p, x in zip(some, drawn, strict=True)
        ]

    def vote(folder: Path, some: list) -> str:
        folder.mkdir(exist_ok=True)
        run = SimpleNamespace(folder=folder, print=lambda _: None, doing=lambda _: None)
        args = SimpleNamespace(vote_samples=3, rollout_batch_size=12, truncated="wrong", seed=1)
        majority_vote(play, MathTask([], [], {}), some, args, run)
        return (folder / "pseudo_labels.jsonl").read_text()

    whole = vote(tmp_path / "whole", problems)
    for cut in range(0, len(whole), 37):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "pseudo_labels.jsonl").write_text(whole[:cut])
        assert vote(tmp_path / "cut", problems) == whole
    more = [*problems, *(Problem(f"new{i}", "1", []) for i in range(4))]
    assert vote(tmp_path / "whole", more).startswith(whole)
    args = SimpleNamespace(vote_samples=5, rollout_batch_size=12, truncated="wrong", seed=1)
    run = SimpleNamespace(folder=tmp_path / "whole")
    refused(lambda: majority_vote(play, None, more, args, run), "--vote-samples 5", "of 3 samples")
    for damage in (
        b"\xff\n",
        b"7\n",
        b'{"key": "q"}\n',
        b'{"key": "q", "votes": [], "label": 1}\n',
    ):
        (tmp_path / "whole" / "pseudo_labels.jsonl").write_bytes(damage)
        refused(lambda: majority_vote(play, None, more, args, run), "damaged")


def test_ctrl_c_in_evaluate_keeps_the_completions(tmp_path, tiny_model, tiny_data, monkeypatch):
    """Batch by batch they are on disk; a data set's name is no formula to a spreadsheet."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, tmp_path / "=cmd()")
    args = evaluate.Args(
        model=str(tiny_model), dataset=("=cmd()",), batch_size=3, max_new_tokens=4, device="cpu",
        out=tmp_path / "out",
    )  # fmt: skip
    calls, decode = [], evaluate.generate

    def interrupted(*rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*rest)

    monkeypatch.setattr(evaluate, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(args)
    kept = files.read_rows(tmp_path / "out" / "completions.jsonl")
    assert len(kept) == 6 and all(row["completion"] is not None for row in kept)
    monkeypatch.setattr(evaluate, "generate", decode)
    evaluate.main(args)
    assert len(files.read_rows(tmp_path / "out" / "completions.jsonl")) == 8
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert {row["data set"] for row in csv.DictReader(file)} == {"'=cmd()"}


def test_a_cut_last_line_is_left_out(copy, tmp_path, capsys, monkeypatch):
    """Of transcripts and samples, by all who read them."""
    for name in ("samples.jsonl", "transcripts.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"update": 2, "mess')
    assert set(tokens.read_rows(copy)) == {1, 2}
    tokens.main(tokens.Args(runs=(copy,), out=tmp_path / "x.html"))
    resume(copy, monkeypatch)  # finished: it shows its end again
    assert "Training episodes" in capsys.readouterr().out


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole(copy, monkeypatch):
    """While metrics, samples or a checkpoint are being written; then it goes on."""
    old = tree(copy / "checkpoints" / "000002")
    for name in ("metrics.tmp", "samples.jsonl"):
        kept = (copy / name).read_bytes() if (copy / name).exists() else None
        monkeypatch.setattr(files, "write_atomically", lambda *_: None)
        monkeypatch.setattr("utils.run.write_atomically", lambda *_: None)
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to("/dev/full")
        if name == "metrics.tmp":
            refused(
                lambda: resume(copy, monkeypatch, "--updates", "3"), "No space left", "--resume"
            )
        else:
            told = SimpleNamespace(folder=copy, advice="")
            refused(
                lambda run=told: Run.append(run, "samples.jsonl", 3, [{"a": 1}]), "No space left"
            )
        (copy / name).unlink()
        if kept is not None:
            (copy / name).write_bytes(kept)
        monkeypatch.undo()
    for error in (disk_full, lambda *_: (_ for _ in ()).throw(RuntimeError("file write failed"))):
        monkeypatch.setattr(torch, "save", error)
        sentence = refused(lambda: resume(copy, monkeypatch, "--updates", "3"), "000003")
        assert "could not be written" in sentence and "--resume" in sentence
        monkeypatch.undo()
        assert not list((copy / "checkpoints").glob("tmp-*"))
    assert tree(copy / "checkpoints" / "000002") == old
    resume(copy, monkeypatch, "--updates", "3")
    assert (copy / "checkpoints" / "000003" / "state.pt").exists()


# ---- nothing is silently wrong ----


def test_weights_are_looked_at_before_they_are_saved(run_main, monkeypatch):
    """A step that makes them NaN ends the run in the same update, before its evaluation."""
    module = importlib.import_module("vrpo_math")
    schedule = module.schedule

    def spoilt(optimizer, update, args):
        schedule(optimizer, update, args)
        if update == 2:
            optimizer.param_groups[0]["lr"] = float("inf")

    monkeypatch.setattr(module, "schedule", spoilt)
    flags = {"epochs": 1, "minibatch_size": 8, "updates": 3, "noise_rate": 0.5}
    words = "update 2: weights of the policy are no longer finite"
    refused(lambda: run_main("vrpo_math", truncated="grade", **flags), words, "--resume")
    checkpoints = sorted(p.name for p in Path("runs/vrpo_math/checkpoints").iterdir())
    rows = files.read_metrics(Path("runs/vrpo_math/metrics.csv"))
    assert checkpoints == ["000001"] and [row["update"] for row in rows] == ["0", "1"]


def test_a_reward_model_that_gives_no_numbers(run_main, dialogue_flags, monkeypatch):
    score = reward_model.RewardModel.score

    def spoilt(self, conversations):
        return [float("nan"), *score(self, conversations)[1:]]

    monkeypatch.setattr(reward_model.RewardModel, "score", spoilt)
    words = ("--reward-model", "no numbers")
    for flags in ({}, {"reward_per": "turn"}):
        call = {**dialogue_flags, **flags, "run_name": f"x{len(flags)}"}
        refused(lambda call=call: run_main("vrpo_dialogue", **call), *words)


def test_a_reward_model_of_nan_is_not_saved(tmp_path, monkeypatch):
    pair = ([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], True)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(reward_model, "preference_pairs", lambda *_: [pair] * 2)
    monkeypatch.setattr(
        reward_model,
        "train",
        lambda model, *_: next(model.model.parameters()).data.fill_(torch.nan),
    )
    args = reward_model.Args(out=tmp_path / "out", device="cpu")
    refused(lambda: reward_model.main(args), "no longer finite")
    assert tree(tmp_path) == {}


# ---- outputs, before the work ----


def test_outputs_are_refused_before_the_work(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir(), (tmp_path / "page.png").mkdir()

    def work(*_, **__):
        raise AssertionError("the work has begun")

    for module in (evaluate, reward_model):
        monkeypatch.setattr(module, "load_policy", work)
        for out in ("file", "file/below"):
            args = module.Args(out=Path(out), device="cpu")
            refused(lambda m=module, a=args: m.main(a), "--out", "no folder that can be written")
    monkeypatch.setattr(plot, "read_run", work)
    for out in (
        "folder.png",
        "file/x.png",
        ".",
        "x",
        f"{'x' * 300}.png",
        "x.exe",
        "x.png.txt",
        ".png",
    ):
        args = plot.Args(runs=(finished,), out=Path(out))
        refused(lambda a=args: plot.main(a), "--out")
    monkeypatch.setattr(tokens, "read_rows", work)
    for out in ("page.html", "file/x.html", "x.png", ".", "x.HTML.exe"):
        args = tokens.Args(runs=(finished,), out=Path(out))
        refused(lambda a=args: tokens.main(a), "--out")
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(lambda: plot.main(plot.Args(runs=(finished,))), "--out", "read-only disk")


# ---- damaged and foreign run folders ----


def viewers(folder: Path) -> dict:
    out = folder.parent
    return {
        "plot": lambda: plot.main(plot.Args(runs=(folder,), out=out / "x.png")),
        "diagnose": lambda: diagnose.main(diagnose.Args(runs=(folder,))),
        "tokens": lambda: tokens.main(tokens.Args(runs=(folder,), out=out / "x.html")),
        "dialogue": lambda: dialogue.main(dialogue.Args(sample=folder)),
    }


VIEWED = {
    "args.json": [b"[]", b"null", b"7", b"", b"\xff\x00", b"{}", b'{"script": 7}', b'{"script": "x", "noise": ["a"]}', b"[" * 99999],
    "metrics.csv": [b"\xff\x00\x01", b"x\n1\n", b"update,charts/episodes\n1,2,3\n", b"update,charts/episodes\n1,many\n", b"update,charts/episodes,eval/accuracy\n0,0,0.1", b"update,charts/episodes\nsoon,1\n", b"\0\n\0\n"],
    "transcripts.jsonl": [
        b"\xff\n", b"7\n", b"[]\n", b"{}\n", b'{"update": 1}\n{"x"\n{}\n', b"[" * 99999 + b"\n",
        *(json.dumps(row).encode() + b"\n" for row in (
            {"update": 1, "messages": "x", "outcome": {"tcr": 1}, "tokens": {}},
            {"update": 1, "messages": [{"content": 7}], "outcome": {"tcr": 1}, "tokens": {"text": [], "chosen": [], "rewards": []}},
            {"update": "x", "messages": [{"content": "q", "role": "user"}], "outcome": {"tcr": 1, "acr": 1, "gcr": 1}},
            {"update": 1, "messages": [{"content": "q"}], "outcome": {"tcr": "x"}, "tokens": {"text": ["a"], "chosen": [True], "rewards": ["x"]}},
            {"update": 1, "messages": [{"content": "q"}], "outcome": {"tcr": 1}, "tokens": {"text": ["a"], "chosen": [True], "rewards": [1.0], "values": [1.0, 2.0]}},
            {"update": 1, "messages": [{"content": "q"}], "outcome": [], "tokens": {"text": ["a"], "chosen": [True], "rewards": [1.0]}},
            {"update": 1, "messages": [{"content": "q"}], "outcome": {"tcr": 1}, "tokens": {"text": [3], "chosen": [True], "rewards": [1.0]}},
        )),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWED)
def test_damaged_runs_are_not_shown(name, copy):
    """Each reader of the file says so in one sentence that names the run."""
    readers = ("tokens", "dialogue") if name == "transcripts.jsonl" else ("plot", "diagnose")
    for content in VIEWED[name]:
        (copy / name).write_bytes(content)
        for reader in readers:
            refused(viewers(copy)[reader], str(copy))
    (copy / name).unlink()
    for reader in readers:
        refused(viewers(copy)[reader], str(copy))


def test_what_is_no_run_at_all(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        for call in viewers(folder).values():
            refused(call, str(folder))


def test_flags_of_other_types_do_not_break_the_diagnosis(copy):
    flags = json.loads((copy / "args.json").read_text())
    columns = ("reward/clean", "reward/observed", "vrpo/ib_kl", "losses/value", "eval/accuracy")
    with (copy / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["update", "charts/episodes", *columns])
        writer.writerows(
            [u, 8 * u, 0.9 - u / 20, u / 20, 1.0, 0.1, 0.9 - u / 20] for u in range(12)
        )
    for flag in ("prompts_per_update", "eval_size", "beta", "kl_coef", "epochs", "beta_warmup"):
        (copy / "args.json").write_text(json.dumps(flags | {flag: "many"}))
        refused(lambda: diagnose.sentences(copy), flag, "a number is wanted")
        (copy / "args.json").write_text(json.dumps(flags | {flag: 0}))
        assert diagnose.sentences(copy)


# ---- signals ----


def test_the_second_signal_leaves_at_once(run_main, monkeypatch, capfd):
    """In the middle of the first evaluation: one line, 128 + the signal's number."""
    module, left = importlib.import_module("grpo_baseline"), []

    def leaving(code):
        left.append(code)
        raise SystemExit(code)

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGTERM)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(os, "_exit", leaving)
    monkeypatch.setattr(module, "rollout", interrupted)
    with pytest.raises(SystemExit):
        run_main("grpo_baseline")
    assert left == [143] and capfd.readouterr().err.endswith("stopped by SIGTERM\n")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_two_signals_while_a_checkpoint_is_written(run_main, monkeypatch):
    """The one before stays whole, and the run goes on from it as if nothing had been."""
    whole, save = read_metrics(run_main("grpo_baseline", run_name="whole")), torch.save

    def interrupted(*rest):
        if "000002" in str(rest[-1]):
            signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGINT)
        save(*rest)

    def leaving(code):
        raise SystemExit(code)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", leaving)
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(SystemExit) as caught:
            run_main("grpo_baseline", run_name="cut")
    assert caught.value.code == 130
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    folder = Path("runs/cut").resolve()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000001", "tmp-000002"]
    run_main("grpo_baseline", resume=folder)
    assert read_metrics(folder) == whole


def test_a_signal_in_the_vote_leaves_between_two_batches(run_main, monkeypatch, tmp_path, capsys):
    """What was voted is kept, and the same command with --resume gives what it would have given."""
    flags = {"noise": "majority-vote", "vote_samples": 2, "rollout_batch_size": 4, "updates": 1}
    whole = run_main("ppo_baseline", run_name="whole", **flags)
    module, plays = importlib.import_module("ppo_baseline"), []
    play = module.rollout

    def interrupted(*rest, **more):
        plays.append(1)
        if len(plays) == 1:
            signal.raise_signal(signal.SIGTERM)
        return play(*rest, **more)

    monkeypatch.setattr(module, "rollout", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_main("ppo_baseline", run_name="cut", **flags)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "saved; continue with --resume runs/cut" in " ".join(capsys.readouterr().out.split())
    cut = tmp_path / "runs" / "cut"
    assert len(files.read_rows(cut / "pseudo_labels.jsonl")) == 2
    run_main("ppo_baseline", resume=cut, **flags)
    labels = [(f / "pseudo_labels.jsonl").read_text() for f in (whole, cut)]
    assert labels[0] == labels[1] and read_metrics(whole) == read_metrics(cut)


def start(*words: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )  # fmt: skip


@pytest.mark.parametrize("words", [["ppo_baseline.py"], ["-m", "utils.evaluate"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_during_the_imports(words, number):
    process = start("-X", "importtime", *words)
    for line in process.stderr:  # until torch is being imported
        if line.split("|")[-1].strip() == "torch.version":
            break
    process.send_signal(number)
    rest = process.stderr.read().splitlines()
    told = [line for line in rest if not line.startswith("import time:")]
    assert told == [f"stopped by {number.name}"] and process.wait() == 128 + number


def test_only_commands_take_over_signals(shell):
    """Whoever imports utils elsewhere, a notebook or a test, keeps Ctrl-C and tracebacks."""
    code = "import signal, sys, utils; print(signal.getsignal(2) is signal.default_int_handler"
    done = shell([sys.executable, "-c", code + ", sys.excepthook is sys.__excepthook__)"])
    assert done.stdout == "True True\n"


# ---- stdout and stderr ----


def test_readers_that_leave_full_disks_and_ascii_terminals(finished):
    """One sentence or none, and no traceback, not at the interpreter's end either."""
    words = ["-m", "utils.diagnose", *[str(finished)] * 400]
    process = start(*words)
    process.stdout.readline(), process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == "error: No space left on device\n" and done.returncode == 1
    process = start(
        "-m", "utils.diagnose", "räume/ü", env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    told = process.communicate()
    assert told[0] == "" and told[1].startswith("error: ") and process.returncode == 1


def test_a_run_goes_on_when_nobody_reads_it(run_main, monkeypatch):
    """Its reader has left, or its output stands on a full disk."""

    class Lost:
        encoding, isatty = "utf-8", lambda self: False

        def __init__(self, error: OSError):
            self.error = error

        def write(self, text: str) -> int:
            raise self.error

        def flush(self) -> None:
            raise self.error

        def fileno(self) -> int:
            raise OSError

    for i, error in enumerate((BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "full"))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Lost(error))
            folder = run_main("grpo_baseline", run_name=f"lost{i}")
        assert (folder / "checkpoints" / "000002" / "manifest.json").exists()


def test_what_is_no_bug_needs_no_traceback(capfd):
    """The hook of the commands; everything else keeps its traceback."""
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "error: x/y: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "error: Read-only file system\n"),
        (PermissionError(errno.EACCES, "Permission denied", "z"), "error: z: Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (MemoryError(), "error: not enough memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "'x' (pip install -r requirements.txt",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: not enough memory"),
    ):
        errors.one_sentence(type(error), error, None)
        told = capfd.readouterr().err
        assert words in told and told.count("\n") == (words != "") and "Traceback" not in told
    for error in (ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "a bug")):
        errors.one_sentence(type(error), error, None)
        assert "a bug" in capfd.readouterr().err


# ---- hostile data ----


def hostile_row(text: str) -> dict:
    """A transcript in which every text is `text`."""
    tokens_of = {"text": [text], "chosen": [True]}
    tokens_of |= {key: [0.5] for key in ("rewards", "values", "advantages", "entropy")}
    return {
        "update": 1, "rewards": [0.5], "values": [0.5], "tokens": tokens_of,
        "messages": [{"role": role, "content": text} for role in ("user", "assistant")],
        "outcome": {"tcr": 0.0, "acr": 0.0, "gcr": 0.0, "average": 0.0},
    }  # fmt: skip


def test_data_cannot_move_the_terminal(tmp_path, capsys, run_main, monkeypatch, tiny_data):
    """Escapes in a transcript, in a question, in an answer and in an error are spelled out."""
    row = hostile_row(ESCAPES + MARKUP)
    (tmp_path / "transcripts.jsonl").write_text(json.dumps(row) + "\n")
    dialogue.main(dialogue.Args(sample=tmp_path))
    said = capsys.readouterr().out
    assert "\\x1b[2J" in said and MARKUP in said and not errors.CONTROLS.search(said)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{i} {split}{ESCAPES}{MARKUP}", "answer": "#### 1"} for i in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    monkeypatch.setattr("utils.models.Chat.decode", lambda *_: ESCAPES + MARKUP)
    run_main("ppo_baseline", dataset=str(data), updates=1, max_prompt_tokens=400)
    said = capsys.readouterr().out
    assert said.count("\\x1b") >= 6 and not errors.CONTROLS.search(said)
    refused(lambda: errors.stop(ESCAPES), "\\x1b[2J\\x1b]0;owned")


def test_the_token_page_shows_text_as_text(tmp_path):
    """Prompts, tokens and run names are escaped, on the page and in its picture."""
    bad = "<script>alert('x')</script>\"'&$\\frac{1$" + ESCAPES
    run = tmp_path / "<img src=x onerror=alert(1)>'\"$x^$"
    run.mkdir()
    (run / "transcripts.jsonl").write_text(json.dumps(hostile_row(bad)) + "\n")
    tokens.main(tokens.Args(runs=(run,), out=tmp_path / "x.html"))
    page = (tmp_path / "x.html").read_text()
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") == 2
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_curves_with_any_flag_and_name(copy, finished, tmp_path):
    """A label between dollars would be mathematics, and fail."""
    flags = json.loads((copy / "args.json").read_text())
    flags |= {"script": f"$\\frac{{$ {ESCAPES}", "prompt_template": "{question} $x^$ <b>_"}
    (copy / "args.json").write_text(json.dumps(flags))
    panels = {"eval/accuracy": "$x^$", "reward/clean": "y"}
    assert plot.plot_runs([copy, finished], tmp_path / "x.svg", panels).stat().st_size > 5000
    refused(lambda: plot.plot_runs([copy], tmp_path / "x.svg", {"$": "$"}), "none of these metrics")


# ---- other systems ----


ELSEWHERE = """
import builtins, runpy, sys
find = builtins.__import__
def lacking(name, globals=None, *rest, **more):
    if name in ("fcntl", "resource") and str((globals or {}).get("__name__")).startswith("utils"):
        raise ImportError(name)
    return find(name, globals, *rest, **more)
builtins.__import__ = lacking
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_without_the_modules_that_windows_lacks(command, shell, tmp_path):
    """No lock and no peak memory, and all the rest."""
    words = command("grpo_baseline", run_name="elsewhere", updates=1)
    done = shell([words[0], "-c", ELSEWHERE, *words[1:]])
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "runs" / "elsewhere" / "metrics.csv")
    assert "charts/peak_memory_gb" not in frame and frame["eval/accuracy"].notna().all()

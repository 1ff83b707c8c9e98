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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT, SCRIPTS, read_metrics
from utils import errors, files
from utils.args import MAY_BE_ZERO, SHARES, check_flags, parse_args
from utils.checkpoints import digests
from utils.dialogue import reward_model, talk
from utils.report import diagnose, evaluate, plot, tokens
from utils.run import Run
from utils.world.problems import Problem
from utils.world.tasks import MathTask
from utils.world.votes import majority_vote

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


def args_of(script: str, **flags):
    return importlib.import_module(script).Args(**flags)


# ---- flags ----


@pytest.mark.parametrize("name", (*SCRIPTS, "vrpo_dialogue"))
def test_every_number_has_limits(name):
    """Infinity and NaN in any float flag, absurd and negative sizes in any other, by its name."""
    args = importlib.import_module(name).Args
    wrong = {float: (float("inf"), float("-inf"), float("nan"), -0.1), int: (10**30, -1)}
    numbers = {f.name: f.type for f in dataclasses.fields(args) if f.type in wrong}
    assert len(numbers) >= 24
    for flag, kind in numbers.items():
        for value in (*wrong[kind], *([0] * (kind is int and flag not in MAY_BE_ZERO))):
            words = f"--{flag.replace('_', '-')} {value}: must be"
            refused(lambda f=flag, v=value: check_flags(args(**{f: v})), words)
    check_flags(args())
    assert "learning_rate" in SHARES  # 1e30 leaves finite weights that are worth nothing


def test_flags_that_make_no_sense():
    for script, flags, words in (
        ("ppo_baseline", {"prompts_per_update": 10**5, "samples_per_prompt": 10**5}, "10000000000 episodes in an update"),
        ("ppo_baseline", {"device": "meta"}, "--device meta"),
        ("ppo_baseline", {"temperature": 0.0}, "--temperature 0: must be above 0"),
        ("ppo_baseline", {"noise_rate": 1.5}, "--noise-rate 1.5: must be in [0, 1]"),
        *(("grpo_baseline", {"samples_per_prompt": 1, "advantage": x}, f"--samples-per-prompt 1: --advantage {x}")
          for x in ("grpo", "dr_grpo", "rloo")),
        ("grpo_baseline", {"assumed_false_negative_rate": 0.2}, "--advantage grpo does not read it"),
        ("dvpo_math", {"quantiles": 2}, "--quantiles 2: must be at least 3"),
        ("dvpo_math", {"huber_kappa": 0.0}, "--huber-kappa 0.0: must be at least 0.001"),
        ("dvpo_math", {"tail_share": 0.6}, "--tail-share 0.6: must be in [0, 0.5]"),
        ("robust_ppo_baseline", {"contamination": 2.0}, "--contamination 2.0: must be in [0, 1]"),
    ):  # fmt: skip
        refused(lambda s=script, f=flags: check_flags(args_of(s, **f)), words)
    for advantage in ("reinforce_pp", "forward"):
        check_flags(args_of("grpo_baseline", samples_per_prompt=1, advantage=advantage))
    check_flags(args_of("ppo_baseline", samples_per_prompt=1, noise="gaussian", noise_rate=1.5))


def test_the_commands_check_their_numbers(tmp_path):
    page = tmp_path / "x.html"
    for module, flags, words in (
        (tokens, {"runs": (tmp_path,), "rows": 0, "out": page}, "--rows 0: must be at least 1"),
        *((talk, {flag: -1}, "must be at least") for flag in ("play", "count", "max_turns", "temperature")),
        (talk, {"temperature": float("inf")}, "--temperature inf"),
        (evaluate, {"eval_size": 0}, "--eval-size 0"),
        (evaluate, {"device": "meta"}, "--device meta"),
        (reward_model, {"goals": 0}, "--goals 0"),
        (reward_model, {"learning_rate": float("inf")}, "--learning-rate inf"),
    ):  # fmt: skip
        refused(lambda m=module, f=flags: m.main(m.Args(**f)), words)


def test_an_answer_beyond_the_context_is_refused_at_the_start(run_main, tmp_path, tiny_model):
    flags = {"max_new_tokens": 500, "run_name": "long"}
    refused(lambda: run_main("grpo_baseline", **flags), "--max-new-tokens 500", "512 positions")
    assert tree(tmp_path / "runs") == {}  # the name is still free
    data = (str(ROOT / "assets" / "data" / "tiny_math"),)
    args = evaluate.Args(model=str(tiny_model), dataset=data, max_new_tokens=512, device="cpu")
    refused(lambda: evaluate.main(args), "512 positions")


# ---- names and folders ----


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "a/../../x", "/tmp/x", "x" * 300, f"a/{'y' * 300}", "a\x1b[2Jb"]
)
def test_nothing_is_written_outside_runs(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(lambda: Run(args_of("ppo_baseline", run_name=name)), "--run-name")
    assert tree(tmp_path) == {} and not Path("/tmp/x/args.json").exists()
    assert {p.name for p in tmp_path.rglob("*")} <= {"here", "runs", "a"}


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = args_of("ppo_baseline", run_name="x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # a read-only disk
        refused(lambda: Run(args), "--run-name: runs/x", "read-only disk")
    shutil.rmtree("runs")
    Path("runs").write_text("a file")
    refused(lambda: Run(args), "--run-name: runs/x is no folder that can be written")


def test_two_processes_never_work_in_one_folder(tmp_path, monkeypatch):
    """Not two new runs of a name, not two --resume; a kill -9 frees the folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    code = "import time; from pathlib import Path; from utils.files import claim\n"
    code += f"lock = claim(Path({str(folder)!r})); print('mine', flush=True); time.sleep(60)"
    other = start("-c", code)
    assert other.stdout.readline() == "mine\n"
    args = args_of("ppo_baseline", run_name="x")
    for asked in (args, dataclasses.replace(args, resume=folder)):
        refused(lambda asked=asked: Run(asked), "x: another process is at work there")
    assert tree(folder) == {}
    other.kill(), other.wait()
    files.claim(folder).close()


def start(*words: str, **more) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **more
    )


# ---- --resume ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data) -> Path:
    """A small run of vrpo_math with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["vrpo_math.py"])
        importlib.import_module("vrpo_math").main(args_of(
            "vrpo_math", model=str(tiny_model), dataset=str(tiny_data), updates=2, device="cpu",
            prompts_per_update=4, samples_per_prompt=2, minibatch_size=4, micro_batch_size=2,
            max_new_tokens=8, eval_size=4, eval_every=1, save_every=1, run_name="x",
        ))  # fmt: skip
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


UNREADABLE = "no readable args.json"
FLAG_DAMAGES = [
    *((text, UNREADABLE) for text in ("[1, 2]", "null", b"\xff\xfe\x00\x01", '{"script": "vrpo', "[" * 10**5)),
    ({"script": None}, UNREADABLE), ({"script": ["vrpo_math"]}, UNREADABLE),
    ({"script": "ppo_baseline"}, "ppo_baseline.py made that run"),
    ({"elf": 1}, "flags that are no more: elf"),
    ({"updates": 2.5}, 2), ({"updates": True}, 2), ({"beta": None}, 2), ({"thinking": "yes"}, 2),
    ({"track": "elf"}, 2),
    ({"noise": "salt"}, "--noise salt"), ({"learning_rate": float("inf")}, "--learning-rate inf"),
    ({"beta": float("nan")}, "--beta nan"), ({"prompts_per_update": 10**15}, "--prompts-per-update"),
]  # fmt: skip


def test_flags_of_a_foreign_run_are_refused(copy, monkeypatch, capsys):
    """In one sentence; a value of another type as one on the command line is, with status 2."""
    file = copy / "args.json"
    flags = json.loads(file.read_text())
    for damage, words in FLAG_DAMAGES:
        text = json.dumps(flags | damage) if isinstance(damage, dict) else damage
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        before = tree(copy)
        if words == 2:
            with pytest.raises(SystemExit) as caught:
                resume(copy, monkeypatch)
            told = capsys.readouterr().err
            assert caught.value.code == 2 and any(x in told for x in (*damage, "yes")), told
        else:
            refused(lambda: resume(copy, monkeypatch), words)
        assert tree(copy) == before


def of_states(change):
    """Damage to every state.pt: a function of the state that was there."""

    def damage(folder):
        for file in folder.glob("checkpoints/*/state.pt"):
            torch.save(change(torch.load(file, weights_only=True)), file)

    return damage


def lacking(key: str):
    return of_states(lambda state: {k: v for k, v in state.items() if k != key})


def other_sizes(state):
    """The moments of a wider model, which torch itself would load."""
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3, 3)
    return state


def other_settings(state):
    state["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.5)
    return state


def no_critic(folder):
    for critic in folder.glob("checkpoints/*/critic"):
        shutil.rmtree(critic)


def other_model(folder):
    for policy in folder.glob("checkpoints/*/policy"):
        config = AutoConfig.from_pretrained(policy)
        config.hidden_size, config.head_dim = 64, 32
        AutoModelForCausalLM.from_config(config).save_pretrained(policy)


def lacking_weights(folder, model="policy", name="model.layers.1.mlp.up_proj.weight"):
    for file in folder.glob(f"checkpoints/*/{model}/model.safetensors"):
        weights = load_file(file)
        del weights[name]
        save_file(weights, file, {"format": "pt"})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


STATE_DAMAGES = {
    "no optimizer": (lacking("optimizer"), "does not fit this run (it has no 'optimizer')"),
    "no scale": (lacking("scale"), "it has no 'scale'"),
    "another scale": (of_states(lambda x: x | {"scale": {None: "wide"}}), "does not fit this run"),
    "no critic": (no_critic, "does not fit this run (No such file or directory"),
    "a critic that lacks weights": (
        lambda f: lacking_weights(f, "critic", "layers.1.mlp.up_proj.weight"),
        "its critic lacks layers.1.mlp.up_proj.weight",
    ),
    "moments of other sizes": (of_states(other_sizes), "moments have other sizes"),
    "another optimizer": (of_states(other_settings), "its optimizer has other settings"),
    "another model's size": (other_model, "does not fit this run"),
    "weights that it lacks": (lacking_weights, "lacks model.layers.1.mlp.up_proj.weight"),
    "hostile": (of_states(lambda state: Hostile()), "no undamaged checkpoint"),
    "a list": (of_states(lambda state: [1, 2]), "no undamaged checkpoint"),
}


def sign(folder: Path) -> None:
    """Manifests that fit the files."""
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text(json.dumps(digests(checkpoint)))


@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_states_of_a_foreign_run_are_refused(damage, copy, monkeypatch):
    """Their manifests fit, so they are whole; nothing of the run is touched."""
    spoil, words = STATE_DAMAGES[damage]
    spoil(copy), sign(copy)
    before = tree(copy)
    refused(lambda: resume(copy, monkeypatch, "--updates", "3"), words)
    assert tree(copy) == before and not Path("owned").exists()


ROW_DAMAGES = {
    "metrics.csv": (b"\xff\x00\x01\n", b"update\n0\n", b"update,charts/episodes\n0,0\n1,"),
    "samples.jsonl": (b"7\n", b'{"cut\n{"update": 0}\n'),
    "transcripts.jsonl": (b"\x80abc\n", b'{"update": null}\n'),
}


@pytest.mark.parametrize("name", ROW_DAMAGES)
def test_damaged_rows_are_refused(name, copy, monkeypatch):
    """And without the file the run goes on. So is a number of updates that is behind."""
    for content in ROW_DAMAGES[name]:
        (copy / name).write_bytes(content)
        before = tree(copy)
        refused(lambda: resume(copy, monkeypatch, "--updates", "3"), f"{name} is damaged")
        assert tree(copy) == before
    refused(lambda: resume(copy, monkeypatch, "--updates", "1"), "is at update 2 already")
    assert tree(copy) == before
    (copy / name).unlink()
    resume(copy, monkeypatch, "--updates", "3")
    assert (copy / "checkpoints" / "000003").exists() and (copy / name).stat().st_size


# ---- nothing is lost ----


def test_votes_cut_inside_a_batch_come_out_the_same(tmp_path):
    """Whatever line a kill -9 has left, labels and votes are those of the run that was not
    killed; more problems change none of them."""
    problems = [Problem(f"q{i}", "1", []) for i in range(10)]

    def play(some):
        drawn = torch.randint(0, 3, (len(some),)).tolist()
        return [
            SimpleNamespace(problem=p, completions=[f"#### {x}"], finished=True)
            for p, x in zip(some, drawn, strict=True)
        ]

    def vote(folder: Path, some: list, samples: int = 3) -> str:
        folder.mkdir(exist_ok=True)
        run = SimpleNamespace(folder=folder, print=lambda _: None, doing=lambda _: None)
        args = SimpleNamespace(
            vote_samples=samples, rollout_batch_size=12, truncated="wrong", seed=1
        )
        majority_vote(play, MathTask([], [], {}), some, args, run)
        return (folder / "pseudo_labels.jsonl").read_text()

    cut, folder = tmp_path / "cut", tmp_path / "whole"
    whole = vote(folder, problems)
    cut.mkdir()
    for size in range(0, len(whole), 37):
        (cut / "pseudo_labels.jsonl").write_text(whole[:size])
        assert vote(cut, problems) == whole
    more = [*problems, *(Problem(f"new{i}", "1", []) for i in range(4))]
    assert vote(folder, more).startswith(whole)
    refused(lambda: vote(folder, more, samples=5), "--vote-samples 5", "of 3 samples")
    for damage in (
        b"\xff\n",
        b"7\n",
        b'{"key": "q"}\n',
        b'{"key": "q", "votes": [], "label": 1}\n',
    ):
        (folder / "pseudo_labels.jsonl").write_bytes(damage)
        refused(lambda: vote(folder, more), "damaged")


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

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(args)
    kept = files.read_rows(tmp_path / "out" / "completions.jsonl")
    assert len(kept) == 6 and all(row["completion"] is not None for row in kept)
    evaluate.main(args)
    assert len(files.read_rows(tmp_path / "out" / "completions.jsonl")) == 8
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert {row["data set"] for row in csv.DictReader(file)} == {"'=cmd()"}


def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole(copy, monkeypatch):
    """While metrics, samples or a checkpoint are being written; then it goes on."""

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def cut_short(*_, **__):
        raise RuntimeError("file write failed")

    old = tree(copy / "checkpoints" / "000002")
    (copy / "metrics.tmp").symlink_to("/dev/full")
    refused(lambda: resume(copy, monkeypatch, "--updates", "3"), "No space left", "--resume")
    (copy / "metrics.tmp").unlink()
    (copy / "full").mkdir()
    (copy / "full" / "samples.jsonl").symlink_to("/dev/full")
    run = SimpleNamespace(folder=copy / "full", advice="")
    refused(lambda: Run.append(run, "samples.jsonl", 3, [{"a": 1}]), "No space left")
    for error in (disk_full, cut_short):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", error)
            words = ("000003", "could not be written", "--resume")
            refused(lambda: resume(copy, monkeypatch, "--updates", "3"), *words)
        assert not list((copy / "checkpoints").glob("tmp-*"))
    assert tree(copy / "checkpoints" / "000002") == old
    resume(copy, monkeypatch, "--updates", "3")
    assert (copy / "checkpoints" / "000003" / "state.pt").exists()


# ---- nothing is silently wrong ----


def test_weights_are_looked_at_before_they_are_saved(run_main, monkeypatch):
    """A step that makes them NaN ends the run in the same update, before its evaluation."""
    module, steps = importlib.import_module("vrpo_math"), []

    def spoilt(optimizer):
        steps.append(1)
        optimizer.param_groups[0]["lr"] = float("inf") if len(steps) == 2 else 1e-5

    monkeypatch.setattr(module, "add_gradients", spoilt)
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
    flags = dialogue_flags | {"eval_size": 1, "max_turns": 2, "prompts_per_update": 1}
    for per in ("episode", "turn"):
        call = flags | {"reward_per": per, "run_name": per}
        words = ("--reward-model", "no numbers")
        refused(lambda call=call: run_main("vrpo_dialogue", **call), *words)


def test_a_reward_model_of_nan_is_not_saved(tmp_path, monkeypatch):
    pair = ([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], True)

    def spoil(model, *_):
        next(model.model.parameters()).data.fill_(torch.nan)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reward_model, "preference_pairs", lambda *_: [pair] * 2)
    monkeypatch.setattr(reward_model, "train", spoil)
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
    monkeypatch.setattr(tokens, "read_rows", work)
    for module, names in (
        (plot, ("folder.png", "file/x.png", ".", "x", f"{'x' * 300}.png", "x.png.txt", ".png")),
        (tokens, ("page.html", "file/x.html", "x.png", ".", "x.HTML.exe")),
    ):
        for out in names:
            args = module.Args(runs=(finished,), out=Path(out))
            refused(lambda m=module, a=args: m.main(a), "--out")
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
        "talk": lambda: talk.main(talk.Args(sample=folder)),
    }


DONE = {"update": 1, "messages": [{"content": "q"}], "outcome": {"tcr": 1}}
ODD_ROWS = [
    DONE | {"messages": "x", "tokens": {}},
    DONE | {"messages": [{"content": 7}], "tokens": {"text": [], "chosen": [], "rewards": []}},
    DONE | {"update": "x", "outcome": {"tcr": 1, "acr": 1, "gcr": 1}},
    *(
        DONE | {"tokens": {"text": ["a"], "chosen": [True], "rewards": [1.0]} | odd}
        for odd in ({"rewards": ["x"]}, {"values": [1.0, 2.0]}, {"text": [3]})
    ),
    DONE | {"outcome": [], "tokens": {"text": ["a"], "chosen": [True], "rewards": [1.0]}},
]
START = b"update,charts/episodes"
VIEWED = {
    "args.json": [
        b"[]", b"7", b"", b"\xff\x00", b"{}", b'{"script": 7}', b'{"script": "x", "noise": ["a"]}',
        b"[" * 99999,
    ],
    "metrics.csv": [
        b"\xff\x00\x01", b"x\n1\n", START + b"\n1,2,3\n", START + b"\n1,many\n", b"\0\n\0\n",
        START + b",eval/accuracy\n0,0,0.1", START + b"\nsoon,1\n",
    ],
    "transcripts.jsonl": [
        b"\xff\n", b"7\n", b"{}\n", b'{"update": 1}\n{"x"\n{}\n', b"[" * 99999 + b"\n",
        *(json.dumps(row).encode() + b"\n" for row in ODD_ROWS),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWED)
def test_damaged_runs_are_not_shown(name, copy, tmp_path):
    """Each reader of the file says so in one sentence that names the run; and what is no run at
    all."""
    readers = ("tokens", "talk") if name == "transcripts.jsonl" else ("plot", "diagnose")
    for content in [*VIEWED[name], None]:
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        for reader in readers:
            refused(viewers(copy)[reader], str(copy))
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        for reader in readers:
            refused(viewers(folder)[reader], str(folder))


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


@pytest.fixture
def leaving(monkeypatch):
    """What leaves at once raises, and its handlers of signals are taken back; the codes."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    codes, before = [], [signal.getsignal(number) for number in numbers]

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    yield codes
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_two_signals_while_a_checkpoint_is_written(run_main, monkeypatch, capfd, leaving):
    """The second leaves at once, with one line; the checkpoint before stays whole, and the run goes
    on from it as if nothing had been."""
    whole, save = read_metrics(run_main("grpo_baseline", run_name="whole")), torch.save

    def interrupted(*rest):
        if "000002" in str(rest[-1]):
            signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGINT)
        save(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(SystemExit):
            run_main("grpo_baseline", run_name="cut")
    assert leaving == [130] and capfd.readouterr().err.endswith("stopped by SIGINT\n")
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

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "rollout", interrupted)
    with pytest.raises(SystemExit) as caught:
        run_main("ppo_baseline", run_name="cut", **flags)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "saved; continue with --resume runs/cut" in " ".join(capsys.readouterr().out.split())
    cut = tmp_path / "runs" / "cut"
    assert len(files.read_rows(cut / "pseudo_labels.jsonl")) == 2
    run_main("ppo_baseline", resume=cut, **flags)
    labels = [(f / "pseudo_labels.jsonl").read_text() for f in (whole, cut)]
    assert labels[0] == labels[1] and read_metrics(whole) == read_metrics(cut)


def test_ctrl_c_in_a_command_is_one_line(tmp_path):
    """From where it has read its flags."""
    os.mkfifo(tmp_path / "args.json")  # it waits for somebody who writes
    process = start("-m", "utils.diagnose", str(tmp_path))
    with (tmp_path / "args.json").open("w"):  # opens when it reads
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
    assert told == "stopped by SIGINT\n" and process.returncode == 128 + signal.SIGINT


# ---- stdout and stderr ----


def test_readers_that_leave_full_disks_and_ascii_terminals(copy):
    """One sentence or none, and no traceback, not at the interpreter's end either."""
    folder, ascii_only = (
        copy.rename(copy.with_name("ü")),
        os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    words = ["-m", "utils.diagnose", *[str(folder)] * 400]
    process = start(*words, env=ascii_only)
    assert "/?: none, fewer than 6" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
    with open("/dev/full", "w") as full:
        line, pipe = [sys.executable, *words], subprocess.PIPE
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=pipe, text=True)
    assert done.stderr == "error: No space left on device\n" and done.returncode == 1


class Lost:
    """A stdout whose reader has left, or that stands on a full disk."""

    encoding, isatty = "utf-8", lambda self: False

    def __init__(self, error: OSError):
        self.error = error

    def write(self, text: str = "") -> int:
        raise self.error

    flush = fileno = write


def test_a_run_goes_on_when_nobody_reads_it(run_main, monkeypatch):
    for i, error in enumerate((BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "full"))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Lost(error))
            folder = run_main("grpo_baseline", run_name=f"lost{i}", updates=1)
        assert (folder / "checkpoints" / "000001" / "manifest.json").exists()


def test_what_is_no_bug_needs_no_traceback(capfd):
    """The hook of the commands; everything else keeps its traceback."""
    lacks = ModuleNotFoundError("No module named 'x'", name="x")
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "error: x/y: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "error: Read-only file system\n"),
        (PermissionError(errno.EACCES, "Permission denied", "z"), "error: z: Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (MemoryError(), "error: not enough memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough"),
        (lacks, "'x' (pip install -r requirements.txt"),
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


def test_data_cannot_move_the_terminal(tmp_path, capsys, run_main, monkeypatch):
    """Escapes in a transcript, in a question, in an answer and in an error are spelled out; a
    name's markup is shown as it is."""
    row = hostile_row(ESCAPES + MARKUP)
    (tmp_path / "transcripts.jsonl").write_text(json.dumps(row) + "\n")
    talk.main(talk.Args(sample=tmp_path))
    said = capsys.readouterr().out
    assert "\\x1b[2J" in said and MARKUP in said and not errors.CONTROLS.search(said)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{i} {split}{ESCAPES}{MARKUP}", "answer": "#### 1"} for i in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    monkeypatch.setattr("utils.models.Chat.decode", lambda *_: ESCAPES + MARKUP)
    name = f"a/{MARKUP.replace('/', '|')}"
    flags = {"dataset": str(data), "updates": 1, "max_prompt_tokens": 400, "run_name": name}
    folder = run_main("ppo_baseline", **flags)
    said = capsys.readouterr().out
    assert said.count("\\x1b") >= 6 and not errors.CONTROLS.search(said)
    assert said.replace("\n", "").count(folder.name) >= 3
    refused(lambda: errors.stop(ESCAPES), "\\x1b[2J\\x1b]0;owned")


def test_curves_with_any_flag_and_name(copy, finished, tmp_path):
    """A label between dollars would be mathematics, and fail."""
    flags = json.loads((copy / "args.json").read_text())
    flags |= {"script": f"$\\frac{{$ {ESCAPES}", "prompt_template": "{question} $x^$ <b>_"}
    (copy / "args.json").write_text(json.dumps(flags))
    panels = {"eval/accuracy": "$x^$", "reward/clean": "y"}
    assert plot.plot_runs([copy, finished], tmp_path / "x.svg", panels).stat().st_size > 5000
    refused(lambda: plot.plot_runs([copy], tmp_path / "x.svg", {"$": "$"}), "none of these metrics")


# ---- other systems ----


def test_a_run_without_the_modules_that_windows_lacks(run_main, monkeypatch):
    """No lock and no peak memory, and all the rest."""
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr("utils.metrics.resource", None)
    frame = pd.read_csv(run_main("grpo_baseline", updates=1) / "metrics.csv")
    assert "charts/peak_memory_gb" not in frame and frame["eval/accuracy"].notna().all()

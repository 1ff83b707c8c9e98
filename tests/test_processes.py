"""Several processes: every part of the work is done once, and the run is that of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

import ppo_baseline as ppo
import vrpo_math as vrpo
from tests.conftest import ROOT, assert_same_metrics, read_samples
from tests.test_tensors import ROWS, TWO_TURNS, pack
from utils import errors, tensors
from utils.keyed import row_seeds
from utils.models import load_policy
from utils.run import Run
from utils.scale import processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
UNEVEN = {"samples_per_prompt": 3, "minibatch_size": 5, "micro_batch_size": 2, "eval_size": 7}
ONE_AFTER_THE_OTHER = """
import importlib, json, sys
import utils.report.finish
utils.report.finish.plot_runs = lambda folders, out: out
for name, flags in json.loads(sys.argv[1]):
    sys.argv[0], module = name + ".py", importlib.import_module(name)
    module.main(module.Args(**flags))
"""


@pytest.fixture
def start(tmp_path):
    """start(*words): a program in two processes, in a temporary folder."""

    def launch(*words) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*LAUNCH, *words], cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    return launch


def test_the_parts_of_all_processes_are_the_whole(monkeypatch):
    """Under --shard all have as many parts, some of them without weight."""
    batch = pack([*ROWS, *TWO_TURNS, *ROWS])
    batch["weights"] = ppo.token_weights(batch["mask"])
    for count, sharded in ((1, False), (2, False), (3, False), (7, False), (2, True), (7, True)):
        monkeypatch.setattr(processes, "RANKS", count)
        monkeypatch.setattr(processes, "SHARDED", sharded)
        prompts, rows, parts, weight = [], [], [], 0.0
        for rank in range(count):
            monkeypatch.setattr(processes, "RANK", rank)
            prompts += processes.share(5)
            mine = list(tensors.micro_batches(batch, 2))
            counted = [(some, part) for some, part in mine if part["weights"].any()]
            rows += [i for some, _ in counted for i in some.tolist()]
            weight += sum(part["weights"].sum().item() for _, part in counted)
            parts.append(len(mine))
            for _, part in mine:
                assert torch.equal(part["mask"].flatten().nonzero().squeeze(1), part["cells"])
                assert all(part[name].dtype == x.dtype for name, x in batch.items())
        assert prompts == list(range(5)) and sorted(rows) == list(range(5))
        assert weight == pytest.approx(1) and (not sharded or len(set(parts)) == 1)


@torch.no_grad()
def test_the_codes_belong_to_rows_not_to_processes(tiny_model, monkeypatch):
    """The values that two processes find between them are those of one."""
    policy, _ = load_policy(str(tiny_model), torch.device("cpu"))
    args = vrpo.Args(micro_batch_size=2, value_samples=3)
    critic = vrpo.Critic(policy, args)
    torch.nn.init.normal_(critic.head.weight)
    batch, found = pack([*ROWS, *TWO_TURNS, *ROWS]), []
    batch["seed"] = row_seeds(batch["mask"], 3)
    monkeypatch.setattr(vrpo, "add_up", lambda *found: None)
    for rank, count in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(processes, "RANKS", count)
        monkeypatch.setattr(processes, "RANK", rank)
        found.append(vrpo.score_tokens(critic, batch, args)["values"])
    one, first, second = found
    assert torch.allclose(first + second, one, atol=1e-6)
    assert first.any() and second.any() and not (first.bool() & second.bool()).any()


def test_fewer_rows_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "RANKS", 9)
    few = partial(ppo.Args, prompts_per_update=2, samples_per_prompt=4)
    with pytest.raises(SystemExit, match="8 rows are fewer than the 9 processes"):
        processes.check_sizes(few())
    with pytest.raises(SystemExit, match="--minibatch-size: 8 rows are fewer"):
        processes.check_sizes(few(prompts_per_update=3, minibatch_size=8))
    processes.check_sizes(few(prompts_per_update=3, minibatch_size=9))


def same_numbers(one: Path, many: Path, **how) -> None:
    """Completions equal, metrics to rounding."""
    assert read_samples(one) == read_samples(many)
    assert_same_metrics(one, many, **how, rel=1e-3, abs=1e-5)


def worker(launched: subprocess.Popen, rank: int) -> int:
    """The process id of a worker."""
    children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True)
    return int(children.stdout.split()[rank])


def wait_for(file: Path, launched: subprocess.Popen) -> None:
    limit = time.time() + 120
    while time.time() < limit and launched.poll() is None and not file.exists():
        time.sleep(0.02)


def test_two_processes_give_the_runs_of_one_and_one_goes_on(
    start, run_main, small_flags, dialogue_flags, tmp_path
):
    """Uneven minibatches; dialogues with a KL penalty and a reward for every turn; and a part of the
    weights in each process (the other scripts: benchmark/checks/ranks.py). Checkpoints of two are
    continued by one. In the last run a signal to one process lets both finish the update and save
    it."""
    flags = UNEVEN | {"noise_rate": 0.4, "max_new_tokens": 12, "updates": 1}
    some = ("grpo_baseline", "vrpo_math", "dvpo_math", "vine_ppo_baseline")
    runs = {name: (name, flags, {}) for name in some}
    more = {"kl_coef": 0.05, "noise": "symmetric", "reward_per": "turn", "updates": 1}
    talks = dialogue_flags | UNEVEN | more | {"max_turns": 2, "eval_size": 3, "epochs": 1}
    runs["vrpo_dialogue"] = ("vrpo_dialogue", talks, {})
    runs["sharded"] = ("vrpo_math", flags, {"shard": True, "gradient_checkpointing": True})
    (tmp_path / "all.py").write_text(ONE_AFTER_THE_OTHER)
    asked = [
        (script, small_flags | own | how | {"run_name": name})
        for name, (script, own, how) in runs.items()
    ]
    endless = {"run_name": "cut", "updates": 10**5, "save_every": 10**5, "eval_every": 10**5}
    asked.append(("grpo_baseline", small_flags | endless))
    both = start("all.py", json.dumps(asked))
    folders = {name: tmp_path / "runs" / name for name in (*runs, "cut")}
    wait_for(folders["cut"] / "metrics.csv", both)
    os.kill(worker(both, 1), signal.SIGTERM)
    output, said = both.communicate(timeout=120)
    assert output.count("test problems; dropped") == len(runs) + 1  # one process speaks
    assert both.returncode and "exitcode  : 143" in said, said
    assert " ".join(output.split()).count("saved; continue with --resume runs/cut") == 1
    assert "stopped by" not in said
    last = pd.read_csv(folders["cut"] / "metrics.csv")["update"].max()
    assert (folders["cut"] / "checkpoints" / f"{last:06d}" / "manifest.json").exists()
    for name, (script, own, how) in runs.items():
        if not how:
            folders[f"{name} by one"] = run_main(script, run_name=f"{name} by one", **own)
            # of clean rewards that are all equal only the rounding of the penalty is explained
            but = "critic/explained_variance" if name == "vrpo_dialogue" else "time/"
            same_numbers(folders[f"{name} by one"], folders[name], but=but)
    for name in ("vrpo_math by one", "vrpo_math", "sharded"):
        run_main("vrpo_math", resume=folders[name], **flags | {"updates": 2})
        same_numbers(folders["vrpo_math by one"], folders[name])


def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    run, left = Run.__new__(Run), []
    run.interrupt, run.asked, run.print = None, float("-inf"), lambda line: None
    monkeypatch.setattr("utils.run.leave", left.append)
    monkeypatch.setattr(processes, "RANKS", 2)
    run.request_stop(signal.SIGTERM, None), run.request_stop(signal.SIGTERM, None)
    assert run.interrupt == signal.SIGTERM and not left
    run.asked -= 5  # some seconds later
    run.request_stop(signal.SIGTERM, None)
    assert left == [signal.SIGTERM]


def test_shard_where_it_has_no_use(run_main):
    with pytest.raises(SystemExit, match="--shard: for several processes"):
        run_main("grpo_baseline", shard=True)


def test_what_one_process_meets_alone_it_says(monkeypatch):
    monkeypatch.setattr(errors, "RANK", "1")
    monkeypatch.setattr(errors, "PATIENCE", 0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"error: a disk is full \(process 1\)"):
        errors.stop("a disk is full")
    signal.signal(signal.SIGTERM, before)

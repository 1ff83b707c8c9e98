"""Several processes: every part of the work is done once, and the run is that of one process."""

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
from tests.conftest import ROOT, read_samples
from tests.test_tensors import ROWS, TWO_TURNS, pack
from utils import errors, ranks, tensors
from utils.files import read_rows
from utils.keyed import row_seeds
from utils.models import load_policy
from utils.run import Run

UNEVEN = {"samples_per_prompt": 3, "minibatch_size": 5, "micro_batch_size": 2, "eval_size": 7}


@pytest.fixture
def torchrun(command, tmp_path):
    """torchrun(name, **flags): a script in two processes, started in a temporary folder."""

    def start(name: str, *more: str, **flags) -> subprocess.Popen:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [*launch, "--nproc-per-node=2", *command(name, **flags)[1:], *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    return start


def test_the_parts_of_all_processes_are_the_whole(monkeypatch):
    batch = pack([*ROWS, *TWO_TURNS, *ROWS])
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(ranks, "RANKS", count)
        prompts, rows = [], []
        for rank in range(count):
            monkeypatch.setattr(ranks, "RANK", rank)
            prompts += ranks.share(5)
            rows += [i for some, _ in tensors.micro_batches(batch, 2) for i in some.tolist()]
        assert prompts == list(range(5)) and sorted(rows) == list(range(5))


@torch.no_grad()
def test_the_codes_belong_to_rows_not_to_processes(tiny_model, monkeypatch):
    """The values that two processes find between them are those of one."""
    policy, _ = load_policy(str(tiny_model), torch.device("cpu"))
    args = vrpo.Args(micro_batch_size=2, bottleneck_layers=2, value_samples=3)
    critic = vrpo.Critic(policy, args)
    torch.nn.init.normal_(critic.head.weight)
    batch, found = pack([*ROWS, *TWO_TURNS, *ROWS]), []
    batch["seed"] = row_seeds(batch["mask"], 3)
    for rank, count in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(ranks, "RANKS", count)
        monkeypatch.setattr(ranks, "RANK", rank)
        monkeypatch.setattr(ranks, "add_up", lambda *found: None)
        found.append(vrpo.score_tokens(policy, critic, batch, args)["values"])
    one, first, second = found
    assert torch.allclose(first + second, one, atol=1e-6)
    assert first.any() and second.any() and not (first.bool() & second.bool()).any()


def test_fewer_rows_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "RANKS", 9)
    few = partial(ppo.Args, prompts_per_update=2, samples_per_prompt=4)
    with pytest.raises(SystemExit, match="8 rows are fewer than the 9 processes"):
        ranks.check_sizes(few())
    with pytest.raises(SystemExit, match="--minibatch-size: 8 rows are fewer"):
        ranks.check_sizes(few(prompts_per_update=3, minibatch_size=8))
    ranks.check_sizes(few(prompts_per_update=3, minibatch_size=9))


def same_numbers(one, many) -> None:
    """Completions equal, metrics to rounding."""
    assert read_samples(one) == read_samples(many)
    left, right = (pd.read_csv(folder / "metrics.csv") for folder in (one, many))
    for key in left.columns:
        if not key.startswith(("time/", "charts/tokens", "charts/peak")):
            wanted = pytest.approx(left[key].tolist(), rel=1e-3, abs=1e-5, nan_ok=True)
            assert right[key].tolist() == wanted, key


@pytest.mark.parametrize("more", [[], ["--shard", "--gradient-checkpointing"]])
def test_two_processes_give_the_run_of_one_and_one_goes_on(torchrun, run_main, tmp_path, more):
    """Uneven minibatches, a bottleneck's draws, a checkpoint of two continued by one; and the same
    with a part of the weights in each process."""
    flags = UNEVEN | {"noise_rate": 0.4, "max_new_tokens": 12, "critic_warmup": 1}
    whole = run_main("vrpo_math", run_name="whole", updates=3, **flags)
    two = torchrun("vrpo_math", *more, run_name="two", updates=2, **flags)
    output, said = two.communicate(timeout=180)
    assert two.returncode == 0, said
    assert output.count("training, 8 test problems") == 1  # one process speaks
    folder = tmp_path / "runs" / "two"
    run_main("vrpo_math", resume=folder, updates=3, **flags)
    same_numbers(whole, folder)


def worker(launched: subprocess.Popen, rank: int) -> int:
    """The process id of a worker."""
    children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True)
    return int(children.stdout.split()[rank])


def wait_for(file: Path) -> None:
    limit = time.time() + 120
    while time.time() < limit and not file.exists():
        time.sleep(0.02)


@pytest.mark.parametrize(
    "noise, file", [("none", "metrics.csv"), ("majority-vote", "pseudo_labels.jsonl")]
)
def test_a_signal_to_one_worker_stops_all(torchrun, tmp_path, noise, file):
    """After the update, or between two batches of votes: all is saved, and one process says so."""
    flags = {"updates": 10**5, "save_every": 10**5, "noise": noise, "rollout_batch_size": 8}
    both = torchrun("grpo_baseline", run_name="cut", eval_every=10**5, **flags)
    folder = tmp_path / "runs" / "cut"
    wait_for(folder / file)
    os.kill(worker(both, 1), signal.SIGTERM)
    output, said = both.communicate(timeout=120)
    assert both.returncode and "exitcode  : 143" in said
    assert " ".join(output.split()).count("saved; continue with --resume runs/cut") == 1
    assert "stopped by" not in said
    if noise == "none":
        last = pd.read_csv(folder / "metrics.csv")["update"].max()
        assert (folder / "checkpoints" / f"{last:06d}" / "manifest.json").exists()
    else:
        keys = [row["key"] for row in read_rows(folder / "pseudo_labels.jsonl")]
        assert len(keys) == len(set(keys)) > 0


def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    run, left = Run.__new__(Run), []
    run.interrupt, run.asked, run.print = None, float("-inf"), lambda line: None
    monkeypatch.setattr("utils.run.leave", left.append)
    monkeypatch.setattr(ranks, "RANKS", 2)
    run.request_stop(signal.SIGTERM, None), run.request_stop(signal.SIGTERM, None)
    assert run.interrupt == signal.SIGTERM and not left
    run.asked -= 5  # some seconds later
    run.request_stop(signal.SIGTERM, None)
    assert left == [signal.SIGTERM]


def test_a_refusal_is_one_sentence(torchrun):
    both = torchrun("grpo_baseline", samples_per_prompt=1)
    _, said = both.communicate(timeout=120)
    assert both.returncode and said.count("error: --samples-per-prompt 1: --advantage") == 1
    assert "stopped by" not in said


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


def test_a_worker_is_killed_and_the_run_goes_on(torchrun, run_main, tmp_path):
    """kill -9 of one of two processes ends both; one process goes on from the checkpoint."""
    flags = UNEVEN | {"updates": 60, "max_new_tokens": 12, "eval_every": 30}
    whole = run_main("grpo_baseline", run_name="whole", **flags)
    both = torchrun("grpo_baseline", run_name="killed", **flags)
    folder = tmp_path / "runs" / "killed"
    wait_for(folder / "checkpoints" / "000002")
    os.kill(worker(both, 1), signal.SIGKILL)
    both.communicate(timeout=120)
    assert both.returncode != 0, "the run ended before its worker could be killed"
    run_main("grpo_baseline", resume=folder, **flags)
    same_numbers(whole, folder)

"""Runs named experiments: methods x noise arms x seeds, in parallel workers of one thread each, one
tidy CSV for each experiment.

    python benchmark/run.py --list                           # what there is, and how long it takes on two cores
    python benchmark/run.py noise_grid --list                # its methods, arms and seeds
    python benchmark/run.py noise_grid                       # Ctrl-C stops it, the same command goes on
    python benchmark/run.py noise_grid --methods PPO VRPO --arms "symmetric 0.2" --seeds 1
    python benchmark/run.py noise_grid --commands            # the commands, to run by hand
    python benchmark/report.py                               # tables and figures, from the CSVs alone

benchmark/results/<experiment>.csv has a row for each run and evaluation; training metrics in it are
means over the updates since the evaluation before. A run whose rows are there, made with the same
flags, is skipped, be it under another name or in another experiment; one that was stopped goes on
from its newest checkpoint. A new flag of a script, or a new default, makes other runs of all of
that script's. Any other change of the code is not noticed (column `commit` tells which one made a
row): delete the rows, and the runs in runs/benchmark, to make them again."""

import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from experiments import EXPERIMENTS, Experiment  # noqa: E402

from utils.args import DEFAULTS  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.run import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
RUNS = Path("runs") / "benchmark"
METRICS = (
    "eval/accuracy", "eval/average", "eval/tcr", "eval/acr", "eval/gcr", "eval/tcr_unseen", "eval/turns", "eval/response_length",
    "reward/clean", "reward/observed", "reward/flip_rate", "reward/youden_j", "charts/response_length", "objective/entropy",
    "objective/kl_ref", "objective/advantage_noise", "critic/explained_variance", "critic/explained_variance_clean",
    "vrpo/ib_kl", "vrpo/latent_std", "grpo/zero_variance_groups", "sampled/impatient",
)  # fmt: skip
KEY = ["method", "arm", "seed", "digest"]


@dataclass(frozen=True)
class Job:
    """One run of an experiment."""

    experiment: str
    method: str
    arm: str
    seed: int

    @property
    def script(self) -> str:
        return EXPERIMENTS[self.experiment].methods[self.method].script

    @property
    def flags(self) -> dict:
        """The flags that are given to the script."""
        e = EXPERIMENTS[self.experiment]
        given = (
            e.flags
            | e.methods[self.method].flags
            | e.arms[self.arm]
            | e.extra.get((self.method, self.arm), {})
        )
        return given | {"seed": self.seed}

    @property
    def command(self) -> list[str]:
        words = [
            word
            for key, value in self.flags.items()
            for word in (f"--{key.replace('_', '-')}", str(value))
        ]
        return [f"{self.script}.py", *words]

    @property
    def digest(self) -> str:
        return digest(self.script, tuple(self.flags.items()))

    @property
    def key(self) -> tuple:
        return self.method, self.arm, self.seed, self.digest

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.method} {self.arm} {self.seed}".lower())

    @property
    def folder(self) -> Path:
        """The same for all experiments that have this run."""
        return RUNS / f"{self.script}-seed-{self.seed}-{self.digest}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def commits(self) -> Path:
        """File with the commits that the run was made by: more than one if it was stopped and went
        on after a change."""
        return self.folder.with_suffix(".commits")


@cache
def digest(script: str, flags: tuple) -> str:
    """Of a script and all its flags, the defaults too: what a run depends on but the code."""
    given = dict(flags)
    args = importlib.import_module(script).Args(**{**DEFAULTS[given.get("task", "math")], **given})
    flags = {"reward_per": "episode"} | {key: str(value) for key, value in vars(args).items()}
    words = json.dumps([script, flags], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:10]


def jobs_of(name: str, seeds: tuple[int, ...] = ()) -> list[Job]:
    """All runs of an experiment, a seed after the other, so that what is stopped is still
    paired."""
    e = EXPERIMENTS[name]
    return [
        Job(name, method, arm, seed)
        for seed in seeds or e.seeds
        for arm in e.arms
        for method in e.methods
    ]


def results(name: str) -> pd.DataFrame:
    """The rows of an experiment; none if it has not been run."""
    file = RESULTS / f"{name}.csv"
    return pd.read_csv(file, dtype={"digest": str}) if file.exists() else pd.DataFrame(columns=KEY)


def read_rows(job: Job) -> list[dict]:
    """A finished run's evaluations, with means of the training metrics since the one before; none
    if it has not finished."""
    file = job.folder / "metrics.csv"
    if not file.exists():
        return []
    frame = pd.read_csv(file)
    if frame["update"].iloc[-1] < json.loads((job.folder / "args.json").read_text())["updates"]:
        return []
    frame["seconds"] = frame[["time/rollout", "time/score", "time/update"]].sum(axis=1)
    evaluated = frame["eval/response_length"].notna()
    names = [name for name in METRICS if name in frame]
    spans = evaluated[::-1].cumsum()[::-1]  # the same number from after an evaluation to the next
    means, seconds = frame.groupby(spans)[names].mean(), frame.groupby(spans)["seconds"].sum()
    made_by = (
        " ".join(dict.fromkeys(job.commits.read_text().split())) if job.commits.exists() else ""
    )
    rows = []
    for i in frame.index[evaluated]:
        row = {
            "method": job.method,
            "arm": job.arm,
            "seed": job.seed,
            "digest": job.digest,
            "commit": made_by,
        }
        row |= {
            key: int(frame[column][i])
            for key, column in (("update", "update"), ("episodes", "charts/episodes"))
        }
        rows.append(row | means.loc[spans[i]].to_dict() | {"seconds": seconds[spans[i]]})
    return rows


def commit() -> str:
    """The commit at hand, with + if a script, utils/ or assets/ differ from it; empty where there
    is no git."""
    try:
        asked = (
            ["rev-parse", "--short", "HEAD"],
            ["status", "--porcelain", "--", ":(glob)*.py", "utils", "assets"],
        )
        head, changes = (
            subprocess.run(["git", *x], cwd=ROOT, capture_output=True, text=True).stdout
            for x in asked
        )
    except OSError:
        return ""
    return head.strip() + ("+" if changes else "")


# A run is forked from a process that has imported what every run needs, which would take it eight
# seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["__main__", "vrpo_math", "transformers.models.llama.modeling_llama", "matplotlib.pyplot"]
)
LEAVE = (signal.SIGTERM, signal.SIGHUP)


def execute(command: list[str], log: Path, lock: reduction.DupFd) -> None:
    """In a process of its own, on one thread: `python script.py flags`, with what it prints in
    `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    os.setsid()  # Ctrl-C in the terminal is for run.py
    for number in LEAVE:
        signal.signal(number, signal.SIG_DFL)
    lock.detach()  # a copy of run.py's open file: whoever has one holds the lock, so a run that is left behind does
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Workers:
    """Runs jobs as processes of one thread each, and can ask all that are running to save and stop.
    While one of them lives, no other run.py can start here."""

    def __init__(self):
        self.running: set[BaseProcess] = set()
        self.stopping, self.guard = False, threading.Lock()
        RUNS.mkdir(parents=True, exist_ok=True)
        self.lock = (RUNS / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stop(f"another run.py, or a run that it left behind, is busy in {RUNS}")
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in LEAVE}
        forkserver.ensure_running()  # it must outlive a signal to the whole group, or nobody could wait for its children
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def run(self, job: Job) -> list[dict]:
        """The rows of a run, after making or finishing it."""
        if rows := read_rows(job):
            return rows
        where = ["--run-name", str(job.folder.relative_to("runs"))]
        if (job.folder / "args.json").exists():
            where = ["--resume", str(job.folder)]
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.guard:
            if self.stopping:
                return []
            with job.commits.open("a") as file:
                file.write(f"{commit()}\n")
            job.log.unlink(missing_ok=True)
            lock = reduction.DupFd(self.lock.fileno())
            process = FORKS.Process(target=execute, args=([*job.command, *where], job.log, lock))
            process.start()
            self.running.add(process)
        process.join()
        self.running.discard(process)
        rows = read_rows(job)
        if not rows and not self.stopping:
            said = job.log.read_text().strip().splitlines() if job.log.exists() else []
            raise RuntimeError(
                f"{said[-1] if said else 'nothing said'} (exit code {process.exitcode}, {job.log})"
            )
        return rows

    def stop(self) -> None:
        """Every run that is under way finishes its update, saves and leaves."""
        with self.guard:
            self.stopping = True
            for process in list(self.running):
                process.terminate()


def save(name: str, rows: list[dict]) -> None:
    """Add rows to an experiment's CSV, in the order of the experiment."""
    frame = pd.concat([results(name), pd.DataFrame(rows)], ignore_index=True)
    order = {job.key: i for i, job in enumerate(jobs_of(name, tuple(sorted(set(frame["seed"])))))}
    rank = [order.get(key, len(order)) for key in frame[KEY].itertuples(index=False, name=None)]
    frame = (
        frame.assign(rank=rank).sort_values(["rank", "update"], kind="stable").drop(columns="rank")
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{name}.csv", frame.to_csv(index=False, float_format="%.5g"))


def reuse(jobs: list[Job]) -> list[Job]:
    """Take over the rows of runs that were made, with the same flags, under another name; returns
    the jobs that are left."""
    made: dict[str, pd.DataFrame] = {}
    for name in EXPERIMENTS:
        made |= dict(tuple(results(name).groupby("digest")))
    left, names = [], {job.experiment for job in jobs}
    done = {name: set(results(name)[KEY].itertuples(index=False, name=None)) for name in names}
    taken: dict[str, list[dict]] = {}
    for job in jobs:
        if job.key in done[job.experiment]:
            continue
        if job.digest in made:
            rows = made[job.digest].drop_duplicates("update")
            rows = rows.assign(method=job.method, arm=job.arm, seed=job.seed)
            taken.setdefault(job.experiment, []).extend(rows.to_dict("records"))
        else:
            left.append(job)
    for name, rows in taken.items():
        save(name, rows)
    return left


def listing(names: tuple[str, ...], console: Console) -> None:
    """All experiments, or methods, arms and seeds of those named."""
    for name in names:
        e = EXPERIMENTS[name]
        for title, words in (
            ("methods", e.methods),
            ("arms", e.arms),
            ("seeds", map(str, e.seeds)),
        ):
            console.print(f"{name}, {title}: {'; '.join(words)}", highlight=False)
    if names:
        return
    table = Table("experiment", "what varies", "runs", "done", "hours left on two cores")
    digests = {key for name in EXPERIMENTS for key in results(name)["digest"]}
    for name, e in EXPERIMENTS.items():
        jobs = jobs_of(name)
        left = {job.digest for job in jobs} - digests
        done = sum(job.digest in digests for job in jobs)
        table.add_row(
            name, e.about, str(len(jobs)), str(done), f"{len(left) * e.seconds / 2 / 3600:.1f}"
        )
    console.print(table)


def keep(jobs: list[Job], folder: Path) -> None:
    """Copy args.json and metrics.csv of runs to `folder`."""
    for job in jobs:
        if not read_rows(job):
            stop(
                f"--keep: the files of {job.name} are not in {RUNS} (only its rows are in the results)"
            )
        (folder / job.name).mkdir(parents=True, exist_ok=True)
        for file in ("args.json", "metrics.csv"):
            shutil.copy(job.folder / file, folder / job.name)


def chosen(name: str, args: "Args") -> list[Job]:
    e: Experiment = EXPERIMENTS[name]
    for flag, wanted, known in (("methods", args.methods, e.methods), ("arms", args.arms, e.arms)):
        if unknown := set(wanted) - set(known):
            stop(f"--{flag} {' '.join(map(repr, sorted(unknown)))}: {name} has {', '.join(known)}")
    return [
        job
        for job in jobs_of(name, args.seeds)
        if (not args.methods or job.method in args.methods)
        and (not args.arms or job.arm in args.arms)
    ]


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """names of experiments"""
    list: bool = False
    """what there is"""
    methods: tuple[str, ...] = ()
    """only these"""
    arms: tuple[str, ...] = ()
    """only these"""
    seeds: tuple[int, ...] = ()
    """instead of the experiment's"""
    workers: int = 2
    """runs at a time"""
    keep: Path | None = None
    """copy args.json and metrics.csv of every run that is made to a folder here"""
    commands: bool = False
    """only print the commands"""


def main(args: Args) -> None:
    console = Console(stderr=not args.list)
    if set(args.experiments) - set(EXPERIMENTS) or not (args.experiments or args.list):
        stop(
            f"which experiment? Before other flags, give one of {', '.join(EXPERIMENTS)} (--list says more)"
        )
    if args.list:
        return listing(args.experiments, console)
    jobs = list(dict.fromkeys(job for name in args.experiments for job in chosen(name, args)))
    if args.commands:
        print("\n".join(shlex.join(["python", *job.command]) for job in jobs))
        return
    for number in LEAVE:
        signal.signal(number, signal.default_int_handler)
    workers, failed = Workers(), []
    progress = Progress(
        TextColumn("runs"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, speed_estimate_period=8 * 3600,
    )  # fmt: skip
    same: dict[str, list[Job]] = {}  # by digest: made once
    for job in reuse(jobs):
        same.setdefault(job.digest, []).append(job)
    with workers.lock, progress, ThreadPoolExecutor(args.workers) as pool:
        bar = progress.add_task("", total=len(same))
        try:
            futures = {pool.submit(workers.run, group[0]): group for group in same.values()}
            for future in as_completed(futures):
                job, error = futures[future][0], future.exception()
                progress.advance(bar)
                if error:
                    failed.append(f"{job.experiment}: {job.name}: {error}")
                    console.print(failed[-1])
                    continue
                rows = future.result()
                for twin in futures[future]:
                    names = {"method": twin.method, "arm": twin.arm, "seed": twin.seed}
                    save(twin.experiment, [row | names for row in rows])
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
                first, last = (
                    row.get("eval/average", row.get("eval/accuracy")) for row in (rows[0], rows[-1])
                )
                console.print(
                    f"{job.experiment}: {job.method}, {job.arm}, seed {job.seed}: {first:.3f} to {last:.3f}"
                )
        except KeyboardInterrupt:
            stop("stopped; the same command goes on from here")
        finally:  # whatever happened, nothing new starts, and what runs saves itself
            if workers.running:
                console.print("the runs under way finish their update and save it")
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
    if failed:
        stop("\n".join(failed))
    if args.keep:
        keep(jobs, args.keep)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Args, description=__doc__))

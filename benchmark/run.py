"""Runs named experiments: methods x noise arms x seeds, in parallel workers of one thread each, one
tidy CSV for each experiment.

    python benchmark/run.py --list                    # what there is, and hours on two cores
    python benchmark/run.py noise_grid --list         # its methods, arms and seeds
    python benchmark/run.py noise_grid                # Ctrl-C stops it, the same command goes on
    python benchmark/run.py noise_grid --methods PPO VRPO --arms "symmetric 0.2" --seeds 1
    python benchmark/run.py noise_grid --commands     # the commands, to run by hand
    python benchmark/report.py                        # tables and figures, from the CSVs alone

benchmark/results/<experiment>.csv has a row for each run and evaluation; training metrics in it are
means over the updates since the evaluation before. A run whose rows are there is skipped, be it
under another name or in another experiment; one that was stopped goes on from its newest
checkpoint. Rows belong to the flags in which their run differs from the defaults: a changed default
makes other runs, a new flag does not. No other change of the code is noticed (column `commit` tells
which one made a row): delete the rows, and the runs in runs/benchmark, to make them again."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.experiments import EXPERIMENTS  # noqa: E402
from benchmark.jobs import CONSOLE, RESULTS, Task, all_flags, digest, make, record  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.files import write_atomically  # noqa: E402
from utils.recipe import derive  # noqa: E402

RUNS = Path("runs") / "benchmark"
METRICS = (
    "eval/accuracy", "eval/average", "eval/tcr", "eval/acr", "eval/gcr", "eval/tcr_unseen",
    "eval/turns", "eval/impatient", "eval/response_length", "reward/clean", "reward/observed",
    "reward/flip_rate", "reward/youden_j", "charts/response_length", "objective/entropy",
    "objective/kl_ref", "objective/advantage_noise", "critic/explained_variance",
    "critic/explained_variance_clean", "critic/explained_variance_first",
    "critic/explained_variance_last", "charts/verifier_calls", "vrpo/ib_kl",
    "grpo/zero_variance_groups", "sampled/impatient", "sampled/right_steps",
    "eval/right_steps",
)  # fmt: skip
KEY = ["method", "arm", "seed", "digest"]


@dataclass(frozen=True)
class Job:
    """One run of an experiment; `places` are flags that say where model and data lie."""

    experiment: str
    method: str
    arm: str
    seed: int
    places: tuple = ()

    @property
    def script(self) -> str:
        return EXPERIMENTS[self.experiment].methods[self.method].script

    @property
    def recipes(self) -> tuple[str, ...]:
        return EXPERIMENTS[self.experiment].methods[self.method].recipes

    @property
    def flags(self) -> dict:
        """The flags that are given to the script."""
        e = EXPERIMENTS[self.experiment]
        given = e.flags | e.methods[self.method].flags | e.arms[self.arm]
        given |= e.extra.get((self.method, self.arm), {})
        return given | dict(self.places) | {"seed": self.seed}

    @property
    def command(self) -> list[str]:
        words = [f"{self.script.replace('.', '/')}.py"]
        for key, value in self.flags.items():
            name = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", str(value)]
        return words

    @property
    def by_hand(self) -> list[str]:
        """Lines for a shell. Where there are recipes, the first writes a script of its own."""
        script, *words = self.command
        if not self.recipes:
            return [shlex.join(["python", script, *words])]
        own = f"{self.script}_{'_'.join(self.recipes)}.py"
        make = ["python", "-m", "utils.recipe", *self.recipes, "--on", script, "-o", own]
        return [shlex.join(make), shlex.join(["python", own, *words])]

    @property
    def digest(self) -> str:
        return digest(self.script, tuple(self.flags.items()), recipes=self.recipes)

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
    def commits(self) -> Path:
        """File with the commits that the run was made by: more than one if it was stopped and went
        on after a change."""
        return self.folder.with_suffix(".commits")


def jobs_of(name: str, seeds: tuple[int, ...] = (), places: tuple = ()) -> list[Job]:
    """All runs of an experiment, a seed after the other, so that what is stopped is still
    paired."""
    e = EXPERIMENTS[name]
    return [
        Job(name, method, arm, seed, places)
        for seed in seeds or e.seeds
        for arm in e.arms
        for method in e.methods
    ]


def results(name: str) -> pd.DataFrame:
    """The rows of an experiment; none if it has not been run."""
    file = RESULTS / f"{name}.csv"
    return pd.read_csv(file, dtype={"digest": str}) if file.exists() else pd.DataFrame(columns=KEY)


def keys(frame: pd.DataFrame) -> list[tuple]:
    return list(frame[KEY].itertuples(index=False, name=None))


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
    spans = evaluated[::-1].cumsum()[::-1]  # the same number from after an evaluation to the next
    means = frame.groupby(spans)[[name for name in METRICS if name in frame]].mean()
    seconds = frame.groupby(spans)["seconds"].sum()
    made_by = job.commits.read_text().split() if job.commits.exists() else []
    named = dict(zip(KEY, job.key, strict=True)) | {"commit": " ".join(dict.fromkeys(made_by))}
    rows = []
    for i in frame.index[evaluated]:
        at = {"update": int(frame["update"][i]), "episodes": int(frame["charts/episodes"][i])}
        rows.append(named | at | means.loc[spans[i]].to_dict() | {"seconds": seconds[spans[i]]})
    return rows


def commit() -> str:
    """The commit at hand, with + if a script, utils/, recipes/ or assets/ differ; empty where there
    is no git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    try:
        changes = git("status", "--porcelain", "--", ":(glob)*.py", "utils", "recipes", "assets")
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changes else "")
    except OSError:
        return ""


def execute(command: list[str], recipes: tuple[str, ...], folder: Path, commits: Path) -> None:
    """`python script.py flags`, in this process, as a new run or the rest of one. What recipes make
    of the script lies in the run's folder, under the script's name."""
    script = ROOT / command[0]
    if recipes:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / script.name, derive(script.name, recipes))
        script = folder / script.name
    where = ["--run-name", str(folder.relative_to("runs"))]
    if (folder / "args.json").exists():
        where = ["--resume", str(folder)]
    with commits.open("a") as file:
        file.write(f"{commit()}\n")
    sys.argv = [str(script), *command[1:], *where]
    runpy.run_path(sys.argv[0], run_name="__main__")


def save(jobs: list[Job], rows: list[dict]) -> None:
    """Add the rows of a run to the CSVs of the experiments that have it, in their order."""
    for job in jobs:
        named = [row | dict(zip(KEY, job.key, strict=True)) for row in rows]
        frame = pd.concat([results(job.experiment), pd.DataFrame(named)], ignore_index=True)
        all_jobs = jobs_of(job.experiment, tuple(sorted(set(frame["seed"]))))
        order = {other.key: i for i, other in enumerate(all_jobs)}
        rank = [order.get(key, len(order)) for key in keys(frame)]
        frame = frame.assign(rank=rank).sort_values(["rank", "update"], kind="stable")
        text = frame.drop(columns="rank").to_csv(index=False, float_format="%.5g")
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULTS / f"{job.experiment}.csv", text)


def finish(jobs: list[Job], rows: list[dict]) -> None:
    save(jobs, rows)
    shutil.rmtree(jobs[0].folder / "checkpoints", ignore_errors=True)
    first, last = (row.get("eval/average", row.get("eval/accuracy")) for row in (rows[0], rows[-1]))
    CONSOLE.print(f"{jobs[0].experiment}: {jobs[0].name}: {first:.3f} to {last:.3f}")


def to_make(jobs: list[Job]) -> list[list[Job]]:
    """The runs that are not in their experiment's CSV, each with those that are the same run under
    another name. Rows that another experiment has are taken over."""
    frames = {name: results(name) for name in EXPERIMENTS}
    done = {name: set(keys(frame)) for name, frame in frames.items()}
    made = {d: rows for frame in frames.values() for d, rows in frame.groupby("digest")}
    same: dict[str, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        if job.key in done[job.experiment]:
            continue
        if job.digest in made:
            save([job], made[job.digest].drop_duplicates("update").to_dict("records"))
        else:
            same.setdefault(job.digest, []).append(job)
    return list(same.values())


def tasks(jobs: list[Job]) -> Iterator[Task]:
    for twins in to_make(jobs):
        job = twins[0]
        call = execute, job.command, job.recipes, job.folder, job.commits
        read, done = partial(read_rows, job), partial(finish, twins)
        yield Task(
            f"{job.experiment}: {job.name}", call, job.folder.with_suffix(".log"), read, done
        )


def listing(names: tuple[str, ...]) -> None:
    """All experiments, or methods, arms and seeds of those named."""
    for name in names:
        e = EXPERIMENTS[name]
        for title in ("methods", "arms", "seeds"):
            print(f"{name}, {title}: {'; '.join(map(str, getattr(e, title)))}")
    if names:
        return
    digests = {key for name in EXPERIMENTS for key in results(name)["digest"]}
    print("experiment          runs  done  hours left on two cores")
    for name, e in EXPERIMENTS.items():
        jobs = jobs_of(name)
        left = {job.digest for job in jobs} - digests
        done, hours = sum(job.digest in digests for job in jobs), len(left) * e.seconds / 7200
        print(f"{name:18} {len(jobs):5} {done:5} {hours:5.1f}  {e.about}")


def keep(jobs: list[Job], folder: Path) -> None:
    """Copy args.json and metrics.csv of runs to `folder`."""
    for job in jobs:
        if not read_rows(job):
            stop(f"--keep: {RUNS} has no files of {job.name} (only its rows are in the results)")
        (folder / job.name).mkdir(parents=True, exist_ok=True)
        for file in ("args.json", "metrics.csv"):
            shutil.copy(job.folder / file, folder / job.name)


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
    model: str | None = None
    """where the experiment's model lies; one of another name makes other rows, which reports leave
    out"""
    data: str | None = None
    """the same of its data set"""
    workers: int = 2
    """runs at a time"""
    keep: Path | None = None
    """copy args.json and metrics.csv of every run that is made to a folder here"""
    commands: bool = False
    """only print the commands"""


def chosen(name: str, args: Args) -> list[Job]:
    e = EXPERIMENTS[name]
    for flag, wanted, known in (("methods", args.methods, e.methods), ("arms", args.arms, e.arms)):
        if unknown := set(wanted) - set(known):
            stop(f"--{flag} {' '.join(map(repr, sorted(unknown)))}: {name} has {', '.join(known)}")
    places = {"model": args.model, "dataset": args.data}
    jobs = jobs_of(name, args.seeds, tuple((k, v) for k, v in places.items() if v))
    return [
        job
        for job in jobs
        if job.method in (args.methods or e.methods) and job.arm in (args.arms or e.arms)
    ]


def main(args: Args) -> None:
    if set(args.experiments) - set(EXPERIMENTS) or not (args.experiments or args.list):
        known = ", ".join(EXPERIMENTS)
        stop(f"which experiment? Before other flags, give one of {known} (--list says more)")
    jobs = [job for name in args.experiments for job in chosen(name, args)]
    if args.commands:
        return print("\n".join(dict.fromkeys(line for job in jobs for line in job.by_hand)))
    every = [job for name in EXPERIMENTS for job in jobs_of(name)]
    record({(j.script, all_flags(j.script, j.flags, j.recipes)["task"]) for j in every})
    if args.list:
        return listing(args.experiments)
    if failed := make(tasks(jobs), RUNS, args.workers):
        stop("\n".join(failed))
    if args.keep:
        keep(jobs, args.keep)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Args, description=__doc__))

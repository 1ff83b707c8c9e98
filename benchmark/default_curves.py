"""The learning curves of the README: PPO, GRPO and VRPO at their defaults, several seeds, with noise and without.

    python benchmark/default_curves.py                       # hours on two cores; stop and start it at will
    python benchmark/default_curves.py --seeds 1 --arms symmetric
    python benchmark/default_curves.py --task dialogue --arms reward-model

Each run has one thread, `--workers` run at a time, and a run whose results are there is skipped. Results: args.json and
metrics.csv of every run in benchmark/results/default/ or dialogue/, a figure for each arm, and table.md.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.errors import stop  # noqa: E402
from utils.plot import plot_runs, read_run  # noqa: E402

SCRIPTS = {
    "math": {"ppo_baseline": [], "grpo_baseline": [], "vrpo_math": ["--beta", "0.01", "--token-ratio", "0.8"]},
    "dialogue": {"ppo_baseline": ["--task", "dialogue"], "grpo_baseline": ["--task", "dialogue"], "vrpo_dialogue": []},
}
ARMS = {
    "math": {noise: ["--noise", noise] for noise in ("symmetric", "none", "random")},
    "dialogue": {
        "reward-model": [],
        "no-kl": ["--kl-coef", "0"],
        "truth": ["--reward-model", "None"],
        "random": ["--reward-model", "None", "--noise", "random"],
    },
}
MEASURES = {
    "math": ["eval/accuracy"],
    "dialogue": ["eval/average", "eval/tcr", "eval/acr", "eval/gcr", "eval/tcr_unseen", "eval/turns", "eval/impatient"],
}
FOLDERS = {"math": "default", "dialogue": "dialogue"}


@dataclass
class Args:
    task: Literal["math", "dialogue"] = "math"
    """task of the runs"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """the same seeds for every script: same problems, same noise"""
    arms: tuple[str, ...] = ()
    """math: symmetric, none, random; dialogue: reward-model, no-kl, truth, random; default: the first two"""
    workers: int = 2
    """runs at a time, one thread each"""


def run(task: str, script: str, arm: str, seed: int) -> None:
    """One run, unless its results are there already."""
    name, results = f"{script}__{arm}__{seed}", ROOT / "benchmark" / "results" / FOLDERS[task]
    if (results / name / "metrics.csv").exists():
        return
    folder = ROOT / "runs" / "default_curves" / task / name
    where = (
        ["--resume", str(folder)]
        if (folder / "args.json").exists()
        else ["--run-name", f"default_curves/{task}/{name}"]
    )
    flags = [*SCRIPTS[task][script], *ARMS[task][arm], "--seed", str(seed)]
    began = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{script}.py", *flags, *where]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    (results / name).mkdir(parents=True, exist_ok=True)
    for file in ("args.json", "metrics.csv"):
        shutil.copy(folder / file, results / name / file)
    print(f"{name}: {time.time() - began:.0f} s", flush=True)


PICKS = {"start": lambda curve: curve[0], "last": lambda curve: curve[-1], "peak": max}


def table(task: str) -> str:
    """Mean and range over seeds, in Markdown: the task's first measure at start, end and peak, the others at start and end."""
    first, *others = MEASURES[task]
    columns = [(first, pick) for pick in PICKS] + [(other, pick) for other in others for pick in ("start", "last")]
    titles = ["script", "arm", "seeds", *(f"{measure.split('/')[1]}, {pick}" for measure, pick in columns)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    results = ROOT / "benchmark" / "results" / FOLDERS[task]
    for arm in ARMS[task]:
        for script in SCRIPTS[task]:
            runs = [read_run(folder)[1] for folder in sorted(results.glob(f"{script}__{arm}__*"))]
            cells = []
            for measure, pick in columns if runs else []:
                values = [PICKS[pick](list(series[measure].values())) for series in runs]
                digits = 3 if max(values) <= 1 else 1
                mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
                cells.append(mean if low == high else f"{mean} ({low} to {high})")
            lines += [f"| {' | '.join([script, arm, str(len(runs)), *cells])} |"] if runs else []
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    results = ROOT / "benchmark" / "results" / FOLDERS[args.task]
    arms = args.arms or tuple(ARMS[args.task])[:2]
    if unknown := set(arms) - set(ARMS[args.task]):
        stop(f"--arms {' '.join(unknown)}: with --task {args.task} there are {', '.join(ARMS[args.task])}")
    jobs = [(args.task, script, arm, seed) for arm in arms for seed in args.seeds for script in SCRIPTS[args.task]]
    with ThreadPoolExecutor(args.workers) as pool:
        for job in [pool.submit(run, *job) for job in jobs]:
            job.result()
    for arm in arms:
        folders = [f for script in SCRIPTS[args.task] for f in sorted(results.glob(f"{script}__{arm}__*"))]
        print(plot_runs(folders, results / f"{arm}.png"))
    (results / "table.md").write_text(table(args.task))
    print(table(args.task))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

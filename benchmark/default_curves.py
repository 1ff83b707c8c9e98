"""The learning curves of the README: the three scripts at their defaults, several seeds, with noise and without.

    python benchmark/default_curves.py                       # hours on two cores; stop and start it at will
    python benchmark/default_curves.py --seeds 1 --noise symmetric

Each run has one thread, `--workers` run at a time, and a run whose results are there is skipped. Results: args.json and
metrics.csv of every run in benchmark/results/default/, a figure for each noise, and table.md.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "default"
sys.path.insert(0, str(ROOT))
from utils.plot import plot_runs, read_run  # noqa: E402

FLAGS = {
    "ppo_baseline": [],
    "grpo_baseline": [],
    "vrpo_math": ["--beta", "0.01", "--token-ratio", "0.8"],
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """the same seeds for every script: same prompts, same noise"""
    noise: tuple[str, ...] = ("symmetric", "none")
    """channels, at their default rates"""
    scripts: tuple[str, ...] = tuple(FLAGS)
    """scripts to run"""
    workers: int = 2
    """runs at a time, one thread each"""


def run(script: str, noise: str, seed: int) -> None:
    """One run, unless its results are there already."""
    name = f"{script}__{noise}__{seed}"
    if (RESULTS / name / "metrics.csv").exists():
        return
    folder = ROOT / "runs" / "default_curves" / name
    where = ["--resume", str(folder)] if (folder / "args.json").exists() else ["--run-name", f"default_curves/{name}"]
    command = [sys.executable, f"{script}.py", *where, "--noise", noise, "--seed", str(seed), *FLAGS[script]]
    began = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for file in ("args.json", "metrics.csv"):
        shutil.copy(folder / file, RESULTS / name / file)
    print(f"{name}: {time.time() - began:.0f} s", flush=True)


def table() -> str:
    """Clean held-out accuracy at the start, at the end and at its peak: mean and range over seeds, in Markdown."""
    lines = ["| script | noise | seeds | start | last | peak |", "|---|---|---|---|---|---|"]
    runs = [read_run(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    for script, noise in sorted({(flags["script"], flags["noise"]) for flags, _ in runs}, key=lambda k: (k[1], k[0])):
        curves = [list(s["eval/accuracy"].values()) for f, s in runs if (f["script"], f["noise"]) == (script, noise)]
        cells = []
        for pick in (lambda c: c[0], lambda c: c[-1], max):
            values = [pick(c) for c in curves]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {script} | {noise} | {len(curves)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    jobs = [(script, noise, seed) for noise in args.noise for seed in args.seeds for script in args.scripts]
    with ThreadPoolExecutor(args.workers) as pool:
        for job in [pool.submit(run, *job) for job in jobs]:
            job.result()
    for noise in args.noise:
        folders = [f for script in FLAGS for f in sorted(RESULTS.glob(f"{script}__{noise}__*"))]
        print(plot_runs(folders, RESULTS / f"{noise}.png"))
    (RESULTS / "table.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

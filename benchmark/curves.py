"""Learning curves beside the noise benchmark: dialogues, in longer runs, and SmolLM2-135M-Instruct
on two data sets.

    python benchmark/curves.py --suite dialogue --arms reward-model          # hours on two cores, stop and start at will
    python benchmark/curves.py --suite word-problems --arms none --seeds 1 --data DIR
    python benchmark/curves.py --suite arc-easy --arms none --seeds 1 --model DIR

Each run has one thread, `--workers` run at a time, and a run whose results are there is skipped.
Results: args.json and metrics.csv of every run in benchmark/results/<folder of the suite>/, a
figure for each arm, and table.md."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.errors import stop  # noqa: E402
from utils.report.plot import plot_runs, read_run  # noqa: E402


@dataclass(frozen=True)
class Suite:
    """Scripts with the flags that only one of them has, flags of all, arms with their flags (the
    first two are the default), and the measures of the table: the first at start, end and peak, the
    others at start and end."""

    folder: str
    scripts: dict[str, list[str]]
    flags: list[str]
    arms: dict[str, list[str]]
    measures: list[str] = field(default_factory=lambda: ["eval/accuracy"])
    data: str = ""


NOISES = {noise: ["--noise", noise] for noise in ("symmetric", "none", "random")}
REAL = shlex.split(
    "--updates 8 --prompts-per-update 8 --samples-per-prompt 4 --epochs 1 --minibatch-size 16 --micro-batch-size 8 "
    "--dtype bfloat16 --learning-rate 2e-5 --eval-every 4 --eval-size 64 --save-every 4 --rollout-batch-size 64 "
    "--max-prompt-tokens 160 --train-split train[:90%] --test-split train[90%:] --truncated grade"
)
CRITIC = ["--critic-learning-rate", "5e-5"]
REAL_SCRIPTS = {
    "ppo_baseline": CRITIC,
    "grpo_baseline": [],
    "vrpo_math": [*CRITIC, "--beta-warmup", "3"],
}
WORDS = '{question}\nEnd with "The answer is" and the number.'
LETTER = "{question}\nAnswer with one letter."
SYSTEM = "You answer questions of science. Your answer is the right option, such as: B) water"
ARC = ["--task", "science", "--dataset-config", "ARC-Easy", "--max-new-tokens", "16"]
SUITES = {
    "word-problems": Suite(
        "word_problems",
        REAL_SCRIPTS,
        [*REAL, "--max-new-tokens", "48", "--prompt-template", WORDS],
        NOISES,
        data="asdiv_mawps",
    ),
    "arc-easy": Suite(
        "arc_easy",
        REAL_SCRIPTS,
        [*REAL, *ARC, "--prompt-template", LETTER, "--system-prompt", SYSTEM],
        NOISES,
        data="allenai/ai2_arc",
    ),
    "dialogue": Suite(
        "dialogue",
        {"ppo_baseline": [], "grpo_baseline": [], "vrpo_dialogue": []},
        ["--task", "dialogue"],
        {
            "reward-model": [],
            "no-kl": ["--kl-coef", "0"],
            "truth": ["--reward-model", "None"],
            "random": ["--reward-model", "None", "--noise", "random"],
        },
        [
            "eval/average",
            "eval/tcr",
            "eval/acr",
            "eval/gcr",
            "eval/tcr_unseen",
            "eval/turns",
            "eval/impatient",
        ],
    ),
}


@dataclass
class Args:
    suite: Literal["dialogue", "word-problems", "arc-easy"] = "dialogue"
    """which curves"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """the same seeds for every script: same problems, same noise"""
    arms: tuple[str, ...] = ()
    """of the suite; default: its first two"""
    workers: int = 2
    """runs at a time, one thread each"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """word-problems, arc-easy: the policy at the start"""
    data: str | None = None
    """word-problems, arc-easy: the data set; must be given for word-problems (a folder with
    train.jsonl of ASDiv and MAWPS in the columns question and answer); default for arc-easy:
    allenai/ai2_arc"""


def run(args: Args, suite: Suite, script: str, arm: str, seed: int) -> None:
    """One run, unless its results are there already."""
    name, results = f"{script}__{arm}__{seed}", ROOT / "benchmark" / "results" / suite.folder
    if (results / name / "metrics.csv").exists():
        return
    folder = ROOT / "runs" / "curves" / suite.folder / name
    if (folder / "args.json").exists():
        where = ["--resume", str(folder)]
    else:
        where = ["--run-name", f"curves/{suite.folder}/{name}"]
    flags = [*suite.flags, *suite.scripts[script], *suite.arms[arm], "--seed", str(seed)]
    if suite.data:
        flags += ["--model", args.model, "--dataset", args.data or suite.data]
    began = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{script}.py", *flags, *where]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    (results / name).mkdir(parents=True, exist_ok=True)
    for file in ("args.json", "metrics.csv"):
        shutil.copy(folder / file, results / name / file)
    print(f"{name}: {time.time() - began:.0f} s", flush=True)


PICKS = {"start": lambda curve: curve[0], "last": lambda curve: curve[-1], "peak": max}


def table(suite: Suite) -> str:
    """Mean and range over seeds, in Markdown."""
    first, *others = suite.measures
    columns = [(first, pick) for pick in PICKS] + [
        (other, pick) for other in others for pick in ("start", "last")
    ]
    titles = [
        "script",
        "arm",
        "seeds",
        *(f"{measure.split('/')[1]}, {pick}" for measure, pick in columns),
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    results = ROOT / "benchmark" / "results" / suite.folder
    for arm in suite.arms:
        for script in suite.scripts:
            runs = [read_run(folder)[1] for folder in sorted(results.glob(f"{script}__{arm}__*"))]
            cells = []
            for measure, pick in columns if runs else []:
                values = [PICKS[pick](list(series[measure].values())) for series in runs]
                digits = 3 if max(values) <= 1 else 1
                mean, low, high = (
                    f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))
                )
                cells.append(mean if low == high else f"{mean} ({low} to {high})")
            lines += [f"| {' | '.join([script, arm, str(len(runs)), *cells])} |"] if runs else []
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    suite = SUITES[args.suite]
    results = ROOT / "benchmark" / "results" / suite.folder
    if args.suite == "word-problems" and not args.data:
        stop("--suite word-problems: give the data set with --data")
    arms = args.arms or tuple(suite.arms)[:2]
    if unknown := set(arms) - set(suite.arms):
        stop(f"--arms {' '.join(unknown)}: the suite {args.suite} has {', '.join(suite.arms)}")
    jobs = [
        (args, suite, script, arm, seed)
        for arm in arms
        for seed in args.seeds
        for script in suite.scripts
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        for job in [pool.submit(run, *job) for job in jobs]:
            job.result()
    for arm in arms:
        folders = [
            f for script in suite.scripts for f in sorted(results.glob(f"{script}__{arm}__*"))
        ]
        print(plot_runs(folders, results / f"{arm}.png"))
    (results / "table.md").write_text(table(suite))
    print(table(suite))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

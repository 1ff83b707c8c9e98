"""One, two and three processes give the same run: completions equal, metrics to rounding.

    python benchmark/checks/ranks.py                     # all scripts, some minutes on two cores
    python benchmark/checks/ranks.py --scripts vrpo_math --processes 2
    python benchmark/checks/ranks.py --shard             # several processes with divided weights

Each run has two updates, in runs/ranks; held-out completions are compared as text, metrics
by their relative difference.
"""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs") / "ranks"
# uneven on purpose: 18 episodes in minibatches of 7 and micro-batches of 3, 13 held-out problems
SMALL = {
    "updates": 2, "prompts_per_update": 6, "samples_per_prompt": 3, "minibatch_size": 7,
    "micro_batch_size": 3, "rollout_batch_size": 10, "eval_size": 13, "eval_every": 1,
    "save_every": 1, "device": "cpu",
}  # fmt: skip
DIALOGUE = {"task": "dialogue", "max_turns": 4, "max_new_tokens": 40}
CASES = {
    "ppo_baseline": [{"lora_rank": 4}, {"kl_coef": 0.1}],
    "vrpo_math": [{}, {"task": "science", "noise": "majority-vote"}],
    "vrpo_dialogue": [DIALOGUE, DIALOGUE | {"reward_per": "turn"}],
    "grpo_baseline": [{"truncated": "mask", "max_new_tokens": 30}, {"max_turns": 2}],
    "dvpo_math": [{}],
    "robust_ppo_baseline": [{}],
    "vine_ppo_baseline": [{}],
}
MACHINE = ("time/", "charts/tokens_per_second", "charts/peak_memory_gb")


def run(script: str, flags: dict, processes: int, name: str, shard: bool = False) -> Path:
    """A run of the script in so many processes; its folder."""
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in (SMALL | flags).items()]
    words += ["--shard"] if shard else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc-per-node={processes}"] if processes > 1 else []
    start = launch if processes > 1 else [sys.executable]
    command = [*start, str(ROOT / f"{script}.py"), *words, f"--run-name=ranks/{name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.csv without what measures the machine."""
    lines = csv.DictReader((folder / "metrics.csv").open())
    return [
        {key: float(x) for key, x in line.items() if x and not key.startswith(MACHINE)}
        for line in lines
    ]


def difference(one: Path, many: Path) -> tuple[float, str]:
    """The largest difference of a metric, relative where it is above 0.01, and which; infinite
    where a row, a key or a completion differs."""
    a, b = rows(one), rows(many)
    if [row.keys() for row in a] != [row.keys() for row in b]:
        return float("inf"), "rows or columns"
    if (one / "samples.jsonl").read_text() != (many / "samples.jsonl").read_text():
        return float("inf"), "held-out completions"
    pairs = [(x[key], y[key], key) for x, y in zip(a, b, strict=True) for key in x]
    return max((abs(x - y) / max(abs(x), 1e-2), key) for x, y, key in pairs)


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(CASES)
    """which"""
    processes: tuple[int, ...] = (2, 3)
    """compared with one"""
    shard: bool = False
    """with --shard, where there is no LoRA"""


def main(args: Args) -> None:
    worst = 0.0
    for script in args.scripts:
        for i, flags in enumerate(CASES[script]):
            one = run(script, flags, 1, f"{script}-{i}-1")
            for count in args.processes:
                shard = args.shard and "lora_rank" not in flags
                many = run(script, flags, count, f"{script}-{i}-{count}", shard)
                found, key = difference(one, many)
                words = " ".join(f"--{key} {value}" for key, value in flags.items())
                print(f"{script} {words}: {count} processes, {found:.1e} ({key})", flush=True)
                worst = max(worst, found)
    if worst > 1e-3:
        raise SystemExit(f"error: the largest difference is {worst:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Learning curves of one or several runs.

python -m utils.plot runs/A runs/B --out curves.png      # a line for each run
python -m utils.plot benchmark/results/long_runs/*       # runs that differ by seed: a band
"""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from utils.errors import stop

PANELS = {
    "eval/accuracy": "clean held-out accuracy (greedy)",
    "eval/average": "held-out mean of TCR, ACR and GCR (greedy)",
    "reward/observed": "observed reward of the samples",
    "reward/clean": "clean reward of the samples",
    "critic/explained_variance": "explained variance, observed returns",
    "critic/explained_variance_clean": "explained variance, clean returns",
    "objective/entropy": "entropy (nats per token)",
    "charts/response_length": "response length (tokens)",
    "eval/turns": "turns of held-out dialogues",
    "sampled/impatient": "sampled dialogues that the user broke off",
}


def read_run(folder: Path) -> tuple[dict, dict[str, dict[float, float]]]:
    """A run's flags and its metrics, as {metric: {episodes: value}}."""
    try:
        flags = json.loads((folder / "args.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    except (OSError, ValueError):
        stop(f"{folder}: not a run directory (no readable args.json and metrics.csv)")
    series: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        for key, value in row.items():
            if value:
                series[key][float(row["charts/episodes"])] = float(value)
    return flags, series


def plot_runs(folders: Sequence[Path], out: Path, panels: dict[str, str] = PANELS) -> Path:
    """Draw `panels` (metric: title) against episodes. Runs whose flags differ in nothing but the
    seed make one line, the mean, in a band from the lowest to the highest. Returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list] = defaultdict(list)
    for folder in folders:
        flags, series = read_run(Path(folder))
        same = {
            k: v
            for k, v in flags.items()
            if k not in ("seed", "run_name", "track", "wandb_project")
        }
        groups[json.dumps(same, sort_keys=True)].append((flags, series))
    flags_of = [json.loads(key) for key in groups]
    varied = {k for f in flags_of for k in f if any(k in g and g[k] != f[k] for g in flags_of)} - {
        "script"
    }
    panels = {
        key: title
        for key, title in panels.items()
        if any(s.get(key) for g in groups.values() for _, s in g)
    }
    colors = [
        f"C{i}" for i in range(len(groups))
    ]  # a method keeps its colour where it has no curve in a panel
    if not panels:
        stop("none of these metrics is in any of the runs")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
        for color, flags, members in zip(colors, flags_of, groups.values(), strict=False):
            script = (
                flags["script"]
                .removesuffix("_baseline")
                .removesuffix("_math")
                .removesuffix("_dialogue")
            )
            label = " ".join([script, *(f"{k}={flags[k]}" for k in sorted(varied) if k in flags)])
            curves = [series[key] for _, series in members if series.get(key)]
            if not curves:
                continue
            x = sorted(set.intersection(*(set(c) for c in curves)))
            values = [[c[e] for c in curves] for e in x]
            mean, low, high = (
                [f(v) for v in values] for f in (lambda v: sum(v) / len(v), min, max)
            )
            label += f" ({len(curves)} seeds)" if len(curves) > 1 else ""
            axis.plot(
                x, mean, marker="o" if len(x) < 20 else None, markersize=3, color=color, label=label
            )
            if len(curves) > 1:
                axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("episodes", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if key.startswith("critic/explained_variance"):
            axis.axhline(0, color="grey", lw=0.8)
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1.0))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """run directories"""
    out: Path = Path("curves.png")
    """picture to write (png, svg or pdf)"""
    metrics: tuple[str, ...] = ()
    """columns of metrics.csv to draw instead of the usual ones"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        stop("give at least one run directory")
    print(plot_runs(args.runs, args.out, {key: key for key in args.metrics} or PANELS))

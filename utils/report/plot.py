"""Learning curves of one or several runs.

    python -m utils.plot runs/A runs/B --out curves.png      # a line for each run
    python -m utils.plot benchmark/results/long_runs/*       # runs that differ by seed: a band

A run whose flags differ from another's in the seed alone is drawn with it.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from utils.args import command
from utils.errors import stop, visible
from utils.files import check_file, read_flags, read_metrics, writing
from utils.report import style

PANELS = {
    "eval/accuracy": "clean held-out accuracy (greedy)",
    "eval/average": "held-out mean of TCR, ACR and GCR (greedy)",
    "reward/observed": "observed reward of the samples",
    "reward/clean": "clean reward of the samples",
    "critic/explained_variance": "explained variance, observed returns",
    "critic/explained_variance_clean": "explained variance, clean returns",
    "critic/explained_variance_last": "explained variance, clean, in the last state",
    "objective/entropy": "entropy (nats per token)",
    "charts/response_length": "response length (tokens)",
    "eval/turns": "turns of held-out dialogues",
    "sampled/impatient": "sampled dialogues that the user broke off",
}
ENDINGS = (".png", ".svg", ".pdf")
# flags that make no other run of it
NAMES = ("seed", "run_name", "track", "track_project", "wandb_project")


def read_run(folder: Path) -> tuple[dict, dict[str, dict[float, float]]]:
    """A run's flags and its metrics, as {metric: {episodes: value}}."""
    try:
        flags, rows = read_flags(folder), read_metrics(folder / "metrics.csv")
        if odd := [key for key, value in flags.items() if isinstance(value, list | dict)]:
            raise ValueError(f"args.json: {odd[0]} is no flag")
    except (OSError, ValueError) as error:
        stop(f"{folder}: not a run directory with readable args.json and metrics.csv ({error})")
    series: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        for key, value in row.items():
            if not math.isnan(number := float(value)):
                series[key][float(row["charts/episodes"])] = number
    return flags, series


def label_of(flags: dict, runs: list[dict]) -> str:
    """The method, and the flags that have another value here than in most of the runs."""
    words = [style.method_of(flags)]
    for key in sorted(flags.keys() - {"script", "advantage"}):
        values = [run[key] for run in runs if key in run]
        if 2 * values.count(flags[key]) <= len(values):
            words.append(f"{key.replace('_', ' ')} {flags[key]}")
    return ", ".join(words)


def plot_runs(folders: Sequence[Path], out: Path, panels: dict[str, str] = PANELS) -> Path:
    """Draw `panels` (metric: title) against episodes. Runs whose flags differ in nothing but the
    seed make one line, the mean, in a band from the lowest to the highest. Returns `out`."""
    check_file("--out", out, ENDINGS)
    groups: dict[str, list] = defaultdict(list)
    for folder in folders:
        flags, series = read_run(Path(folder))
        same = {key: value for key, value in flags.items() if key not in NAMES}
        groups[json.dumps(same, sort_keys=True)].append(series)
    flags_of = [json.loads(key) for key in groups]
    members = list(groups.values())
    panels = {k: title for k, title in panels.items() if any(s.get(k) for g in members for s in g)}
    if not panels:
        stop("none of these metrics is in any of the runs")
    labels = [literal(label_of(flags, flags_of)) for flags in flags_of]
    labels = [
        f"{label} ({flags['script']})" if labels.count(label) > 1 else label
        for label, flags in zip(labels, flags_of, strict=True)
    ]
    looks = style.looks(dict(zip(labels, map(style.method_of, flags_of), strict=True)))
    figure, axes = style.panels(len(panels), 3, (4.2, 3.0))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for (label, look), group in zip(looks.items(), members, strict=True):
            curves = [series[key] for series in group if series.get(key)]
            if not curves:
                continue
            x = sorted(set.intersection(*map(set, curves)))
            values = [[curve[at] for curve in curves] for at in x]
            seeds, mean = f" ({len(curves)} seeds)", [sum(v) / len(v) for v in values]
            look = look | {"label": label + seeds * (len(curves) > 1)}
            axis.plot(x, mean, markevery=max(1, len(x) // 8), **look)
            if len(curves) > 1:
                low, high = list(map(min, values)), list(map(max, values))
                axis.fill_between(x, low, high, color=look["color"], alpha=0.1, lw=0)
        style.name(axis, literal(title), "episodes")
        if key.startswith("critic/explained_variance"):
            axis.axhline(0, color="grey", lw=0.8)
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1.0))
    if len(groups) > 1:
        style.legend(figure, axes)
    with writing(out):
        return style.save(figure, out)


def literal(text: str) -> str:
    """Text from flags or data: between two dollars matplotlib would set mathematics."""
    return visible(text).replace("$", r"\$")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """run directories"""
    out: Path = Path("curves.png")
    """picture to write (png, svg or pdf)"""
    metrics: tuple[str, ...] = ()
    """columns of metrics.csv to draw instead of the usual ones"""


def main(args: Args) -> None:
    if not args.runs:
        stop("give at least one run directory")
    print(plot_runs(args.runs, args.out, {k: PANELS.get(k, k) for k in args.metrics} or PANELS))


if __name__ == "__main__":
    main(command(Args, "python -m utils.plot", __doc__))

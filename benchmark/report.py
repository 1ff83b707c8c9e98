"""Tables and figures of the experiments, from the committed CSVs alone.

    python benchmark/report.py                               # benchmark/results/<experiment>.md and .png, and the tables in the README
    python benchmark/report.py noise_grid

A run's score is its clean held-out accuracy (for dialogues the mean of TCR, ACR and GCR) after the last update, or at its peak. Over seeds:
the inter-quartile mean (the mean of the middle half; arXiv 2108.13264) with a 95 % bootstrap interval, resampling seeds within each arm. Two
methods are compared by the differences between their runs of the same seed, with Student's t, since the bootstrap's intervals are too
narrow for five seeds, and by the probability of improvement, the share of pairs of runs that the first one wins.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from experiments import ARMS, EXPERIMENTS  # noqa: E402
from run import KEY, RESULTS, jobs_of, results  # noqa: E402

from utils.errors import stop  # noqa: E402
from utils.run import write_atomically  # noqa: E402

RIVALS = ("PPO", "GRPO")  # whom VRPO is compared with in every arm
CONTROLS = ("coin",)  # arms that no average is taken over
RATES = {arm: flags.get("noise_rate", 0.0) for arm, flags in ARMS.items() if flags["noise"] in ("none", "symmetric")}
TITLES = {
    "last": "last",
    "peak": "peak",
    "critic/explained_variance_clean": "explained variance, clean",
    "objective/advantage_noise": "noise in the advantages",
    "charts/response_length": "length of the samples",
    "vrpo/ib_kl": "nats of the code",
    "eval/turns": "turns",
}


# ==== Statistics ======================================================================================================


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Inter-quartile mean: of the middle half of the runs."""
    return stats.trim_mean(x, 0.25, axis=axis)


def resampled(samples: list[np.ndarray], statistic: Callable) -> tuple[float, float, float]:
    """`statistic(*samples)` over the last axis, and its 95 % percentile interval, resampling within each sample; NaN for an interval where
    one of them has a single run."""
    whole, low, high = statistic(*samples), float("nan"), float("nan")
    if min(map(len, samples)) > 1:
        random = np.random.default_rng(0)
        options = {"n_resamples": 2000, "method": "percentile", "vectorized": True, "axis": -1, "rng": random}
        low, high = stats.bootstrap(samples, lambda *xs, axis=-1: statistic(*xs), **options).confidence_interval
    return float(whole), float(low), float(high)


def bootstrap(samples: list[np.ndarray]) -> tuple[float, float, float]:
    """Inter-quartile mean of all samples together, and its interval."""
    return resampled(samples, lambda *xs: iqm(np.concatenate(xs, axis=-1)))


def improvement(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs, averaged over arms, and its interval; `pairs` has for each arm the runs of X and
    of Y."""

    def probability(*xs: np.ndarray) -> np.ndarray:
        arms = zip(xs[: len(pairs)], xs[len(pairs) :], strict=True)
        return 0.5 + 0.5 * np.mean([np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in arms], axis=0)

    return resampled([x for x, _ in pairs] + [y for _, y in pairs], probability)


def paired(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Mean difference x - y of the seeds that both have, and its 95 % interval by Student's t."""
    difference = (x - y).dropna().to_numpy()
    mean = float(difference.mean()) if len(difference) else float("nan")
    if len(difference) < 2 or difference.std() == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(difference) - 1, mean, stats.sem(difference))
    return mean, float(low), float(high)


def verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


# ==== Data ============================================================================================================


def load(name: str) -> pd.DataFrame:
    """The rows of an experiment that were made with its present flags, with the measure in column `score`."""
    frame = results(name)
    if frame.empty:
        return frame
    wanted = {job.key for job in jobs_of(name, tuple(sorted(set(frame["seed"]))))}
    frame = frame[[key in wanted for key in frame[KEY].itertuples(index=False, name=None)]]
    average = frame["eval/average"] if "eval/average" in frame else pd.Series(np.nan, frame.index)
    return frame.assign(score=average.fillna(frame.get("eval/accuracy", np.nan)))


def by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each run: start, last and peak score, and the training metrics of the last span between evaluations."""
    groups = frame.sort_values("update").groupby(["arm", "method", "seed"], sort=False)
    runs = groups.last()
    runs = runs.assign(start=groups["score"].first(), last=groups["score"].last(), peak=groups["score"].max())
    return runs.sort_index()


def ordered(name: str, runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Arms and methods of the experiment that have runs, in its order."""
    e = EXPERIMENTS[name]
    present = runs.index.to_frame()
    return [a for a in e.arms if a in set(present["arm"])], [m for m in e.methods if m in set(present["method"])]


def cell(numbers: tuple[float, float, float], signed: bool = False) -> str:
    middle, low, high = (f"{x:+.3f}" if signed else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" for x in numbers)
    return middle if numbers[1] != numbers[1] else f"{middle} ({low} to {high})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def values(runs: pd.DataFrame, arm: str, method: str, key: str = "last") -> np.ndarray:
    try:
        return runs.loc[(arm, method)][key].dropna().to_numpy()
    except KeyError:
        return np.array([])


# ==== Tables ==========================================================================================================


def grid_tables(name: str, runs: pd.DataFrame) -> str:
    """Arms as columns: last score, what was lost since the peak; then VRPO against its rivals, and all methods over all arms."""
    arms, methods = ordered(name, runs)
    parts = []
    runs = runs.assign(lost=runs["peak"] - runs["last"])
    for key, title in (("last", "Last score"), ("lost", "Lost since the peak")):
        rows = []
        for method in methods:
            found = [values(runs, arm, method, key) for arm in arms]
            rows.append([method, *(cell(bootstrap([x])) if len(x) else "" for x in found)])
        parts.append(f"{title}:\n\n" + markdown(["method", *arms], rows))
    rows = []
    for arm in arms:
        row = [arm]
        for rival in RIVALS if "VRPO" in methods else ():
            if (arm, "VRPO") in runs.index and (arm, rival) in runs.index:
                numbers = paired(runs.loc[(arm, "VRPO")]["last"], runs.loc[(arm, rival)]["last"])
                row += [cell(numbers, signed=True), verdict(*numbers[1:])]
            else:
                row += ["", ""]
        rows.append(row)
    header = ["arm", *(word for rival in RIVALS for word in (f"VRPO − {rival}", f"VRPO is, against {rival}"))]
    parts.append("VRPO against its rivals, paired by seed:\n\n" + markdown(header, rows))
    useful = [arm for arm in arms if arm not in CONTROLS]
    rows = []
    for method in methods:
        samples = [x for arm in useful if len(x := values(runs, arm, method))]
        row = [method, cell(bootstrap(samples)) if samples else ""]
        for rival in RIVALS:
            pairs = [(values(runs, arm, method), values(runs, arm, rival)) for arm in useful]
            pairs = [(x, y) for x, y in pairs if len(x) and len(y)]
            row.append(cell(improvement(pairs)) if pairs and method != rival else "")
        rows.append(row)
    header = ["method", "last score, over arms", *(f"probability of improvement over {rival}" for rival in RIVALS)]
    parts.append(f"Over all arms but {', '.join(CONTROLS)}:\n\n" + markdown(header, rows))
    return "\n".join(parts)


def plain_table(name: str, runs: pd.DataFrame) -> str:
    """A row for each arm and method; columns: last, peak and the measures that some run has."""
    arms, methods = ordered(name, runs)
    keys = [key for key in TITLES if key in runs and runs[key].notna().any()]
    rows = []
    for arm in arms:
        for method in methods:
            found = [values(runs, arm, method, key) for key in keys]
            if len(found[0]):
                count = str(len(found[0]))
                rows.append([arm, method, count, *(cell(bootstrap([x])) if len(x) else "" for x in found)])
    return markdown(["arm", "method", "seeds", *(TITLES[key] for key in keys)], rows)


# ==== Figures =========================================================================================================


def spread(axis, x, samples: list[np.ndarray], color: str, label: str | None = None, **style) -> None:
    """Inter-quartile means with a band of their intervals."""
    middle, low, high = (np.array(column) for column in zip(*(bootstrap([s]) for s in samples), strict=True))
    axis.plot(x, middle, color=color, label=label, marker="o", markersize=3, **style)
    axis.fill_between(x, low, high, color=color, alpha=0.10, lw=0)


def figure(name: str, frame: pd.DataFrame, runs: pd.DataFrame, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms, methods = ordered(name, runs)
    colors = {method: f"C{i}" for i, method in enumerate(methods)}
    rates = [arm for arm in arms if arm in RATES]
    panels = [("rates", None)] * (len(rates) > 2) + [("curves", arm) for arm in arms]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    plot, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis, (kind, arm) in zip(axes.flat, panels, strict=False):
        for method in methods:
            if kind == "rates":
                found = [(RATES[a], x) for a in rates if len(x := values(runs, a, method))]
            else:
                some = frame[(frame["arm"] == arm) & (frame["method"] == method)]
                found = [(episodes, group["score"].dropna().to_numpy()) for episodes, group in some.groupby("episodes")]
            if found:
                x, samples = zip(*found, strict=True)
                spread(axis, x, list(samples), colors[method], method)
        axis.set_title("last score by rate of symmetric flips" if kind == "rates" else arm, fontsize=10)
        axis.set_xlabel("flip rate" if kind == "rates" else "episodes", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    plot.savefig(out, dpi=130)
    plt.close(plot)


# ==== Main ============================================================================================================


def insert(text: str, name: str, table: str) -> str:
    """`text` with what stands between the marks <!-- name --> and <!-- /name --> replaced by the table; as it is without marks."""
    mark = re.escape(name)
    return re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.S)


def report(name: str) -> str | None:
    """Writes the experiment's .md and .png beside its CSV and returns the tables; None if nothing has been run."""
    frame = load(name)
    if frame.empty:
        return None
    runs = by_run(frame)
    tables = grid_tables(name, runs) if len(EXPERIMENTS[name].arms) > 3 else plain_table(name, runs)
    (RESULTS / f"{name}.md").write_text(f"{EXPERIMENTS[name].about}\n\n{tables}")
    figure(name, frame, runs, RESULTS / f"{name}.png")
    return tables


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """names of experiments; default: all that have been run"""
    readme: Path = ROOT / "README.md"
    """file whose marked tables are renewed"""


def main(args: Args) -> None:
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        stop(f"{' '.join(sorted(unknown))}: there are {', '.join(EXPERIMENTS)}")
    text = args.readme.read_text()
    for name in args.experiments or EXPERIMENTS:
        if tables := report(name):
            text = insert(text, name, tables)
            print(f"{name}\n\n{tables}")
    write_atomically(args.readme, text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

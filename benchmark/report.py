"""Tables and figures of the experiments, from the committed CSVs alone.

    python benchmark/report.py                               # benchmark/results/<experiment>*.md and .png, shorter tables in the README
    python benchmark/report.py noise_grid

An experiment's shorter tables go between <!-- name --> and <!-- /name --> in the README, if it has
these marks. A run's score is its clean held-out accuracy (for dialogues the mean of TCR, ACR and
GCR) after the last update, or at its peak. Over five seeds or more: the inter-quartile mean (the
mean of the middle half, of five the middle three; arXiv 2108.13264) with a 95 % bootstrap interval;
over fewer: mean and range. Two methods are compared by the differences between their runs of the
same seed, with Student's t, since bootstrap intervals are too narrow for five seeds; and by the
probability of improvement, the share of pairs of runs that the first one wins, resampling seeds for
all arms together, since they share prompts and draws (with five of them that interval too is rather
too narrow)."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from experiments import ARMS, EXPERIMENTS, GRPO, METHODS  # noqa: E402
from run import KEY, RESULTS, jobs_of, results  # noqa: E402

from utils.errors import stop  # noqa: E402
from utils.run import write_atomically  # noqa: E402

RIVALS = ("PPO", "GRPO")  # whom VRPO is compared with in every arm
TWINS = (
    "corrected GRPO",
    "Dr.GRPO",
)  # the same method but for rounding: what separates these two separates nothing
CONTROLS = ("no noise", "coin")  # arms that no average is taken over
ENOUGH = 5  # seeds for a bootstrap interval
RATES = {
    arm: flags.get("noise_rate", 0.0)
    for arm, flags in ARMS.items()
    if flags["noise"] in ("none", "symmetric")
}
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


def resampled(
    data: np.ndarray, statistic: Callable, vectorized: bool
) -> tuple[float, float, float]:
    """`statistic` of the data and its 95 % percentile interval, resampling the data."""
    options = {
        "n_resamples": 2000,
        "method": "percentile",
        "vectorized": vectorized,
        "rng": np.random.default_rng(0),
    }
    low, high = stats.bootstrap([data], statistic, **options).confidence_interval
    return float(statistic(data)), float(low), float(high)


def summary(x: np.ndarray) -> tuple[float, float, float]:
    """Inter-quartile mean and bootstrap interval of five runs or more, mean and range of fewer, NaN
    for the range of one."""
    if len(x) >= ENOUGH:
        return resampled(x, iqm, vectorized=True)
    return (
        (float(x.mean()), float(x.min()), float(x.max()))
        if len(x) > 1
        else (float(x[0]), float("nan"), float("nan"))
    )


def improvement(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """P(X > Y) + P(X = Y) / 2 over the pairs of runs of an arm, averaged over arms, and its
    interval (NaN for fewer than five seeds); x and y are (arms, seeds)."""

    def probability(seeds: np.ndarray) -> float:
        x_, y_ = (z[:, seeds.astype(int)] for z in (x, y))
        return 0.5 + 0.5 * np.sign(x_[:, :, None] - y_[:, None, :]).mean()

    seeds = np.arange(x.shape[1])
    if len(seeds) < ENOUGH:
        return float(probability(seeds)), float("nan"), float("nan")
    return resampled(seeds, probability, vectorized=False)


def student(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; NaN for fewer than three, of which it would be
    wider than the measure's range."""
    if len(x) < 3:
        return (float(x.mean()) if len(x) else float("nan")), float("nan"), float("nan")
    reach = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
    return float(x.mean()), float(x.mean() - reach), float(x.mean() + reach)


def verdict(low: float, high: float) -> str:
    if low != low:
        return "too few seeds"
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


# ==== Data ============================================================================================================


def load(name: str) -> pd.DataFrame:
    """The rows of an experiment that were made with its present flags, with the measure in column
    `score`."""
    frame = results(name)
    if frame.empty:
        return frame
    wanted = {job.key for job in jobs_of(name, tuple(sorted(set(frame["seed"]))))}
    frame = frame[[key in wanted for key in frame[KEY].itertuples(index=False, name=None)]]
    average = frame["eval/average"] if "eval/average" in frame else pd.Series(np.nan, frame.index)
    return frame.assign(score=average.fillna(frame.get("eval/accuracy", np.nan)))


def by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each run: start, last and peak score, and the training metrics of the last span
    between evaluations."""
    groups = frame.sort_values("update").groupby(["arm", "method", "seed"], sort=False)
    runs = groups.tail(1).set_index(["arm", "method", "seed"])
    runs = runs.assign(
        start=groups["score"].first(), last=groups["score"].last(), peak=groups["score"].max()
    )
    return runs.sort_index()


def ordered(name: str, runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Arms and methods of the experiment that have runs, in its order."""
    e = EXPERIMENTS[name]
    present = runs.index.to_frame()
    return [a for a in e.arms if a in set(present["arm"])], [
        m for m in e.methods if m in set(present["method"])
    ]


def cell(numbers: tuple[float, float, float], signed: bool = False) -> str:
    if numbers[0] != numbers[0]:
        return ""
    middle, low, high = (
        f"{x:+.3f}" if signed else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" for x in numbers
    )
    return middle if numbers[1] != numbers[1] else f"{middle} ({low} to {high})"


def cell_of(x: np.ndarray, most: int, brief: bool = False) -> str:
    """Summary of some runs, its middle alone if `brief`; their number where it is not `most`, the
    table's usual one."""
    if not len(x):
        return ""
    text = cell(summary(x))
    return (text.split(" (")[0] if brief else text) + ("" if len(x) == most else f" of {len(x)}")


def kind(seeds: int, brief: bool = False) -> str:
    """What `summary` gives for so many seeds."""
    measure, spread = (
        ("inter-quartile mean", "its 95 % bootstrap interval")
        if seeds >= ENOUGH
        else ("mean", "range")
    )
    return f"{measure if brief else f'{measure} and {spread}'}, {seeds} seed{'s' * (seeds > 1)}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"
    )


def values(runs: pd.DataFrame, arm: str, method: str, key: str = "last") -> pd.Series:
    """By seed; empty where there are none."""
    if (arm, method) not in runs.index.droplevel("seed"):
        return pd.Series(dtype=float)
    return runs.loc[(arm, method)][key].dropna()


def difference(
    runs: pd.DataFrame, arm: str, method: str, rival: str, key: str = "last"
) -> np.ndarray:
    """Of the seeds that both have."""
    return (values(runs, arm, method, key) - values(runs, arm, rival, key)).dropna().to_numpy()


# ==== Tables ==========================================================================================================


def grid_tables(name: str, runs: pd.DataFrame, brief: bool) -> str:
    """Arms as columns: last score (its middle alone if `brief`), what was lost since the peak (not
    if `brief`); then VRPO against its rivals, and all methods over all arms."""
    arms, methods = ordered(name, runs)
    runs = runs.assign(lost=runs["peak"] - runs["last"])
    planned = {(job.arm, job.method, job.seed) for job in jobs_of(name)}
    made = len(planned & set(runs.index))
    parts = [
        f"All {made} runs." if made == len(planned) else f"{made} of {len(planned)} runs so far."
    ]
    most = int(runs.groupby(["arm", "method"]).size().max())
    for key, title in [("last", "Last score"), ("lost", "Lost since the peak")][
        : 1 if brief else 2
    ]:
        rows = []
        for method in methods:
            rows.append(
                [
                    method,
                    *(
                        cell_of(values(runs, arm, method, key).to_numpy(), most, brief)
                        for arm in arms
                    ),
                ]
            )
        parts.append(f"{title} ({kind(most, brief)}):\n\n" + markdown(["method", *arms], rows))
    pairs = [
        (a, b) for a, b in (*(("VRPO", rival) for rival in RIVALS), TWINS) if {a, b} <= set(methods)
    ]
    if pairs:
        rows = []
        for arm in arms:
            numbers = [student(difference(runs, arm, *pair)) for pair in pairs]
            rows.append(
                [arm, *(word for x in numbers for word in (cell(x, signed=True), verdict(*x[1:])))]
            )
        header = ["arm", *(word for a, b in pairs for word in (f"{a} − {b}", "verdict"))]
        warning = "one comparison in twenty comes out as better or worse by luck"
        if TWINS in pairs:
            warning += "; the last pair is one method twice"
        about = f"Mean differences of runs of the same seed, with 95 % intervals by Student's t ({warning})"
        parts.append(f"{about}:\n\n" + markdown(header, rows))
    parts.append(told_apart(runs, arms, methods))
    return "\n\n".join([*parts, overall(name, runs, methods)])


def told_apart(runs: pd.DataFrame, arms: list[str], methods: list[str]) -> str:
    """In how many of all pairs of methods (without the second twin) the interval of the paired
    difference leaves zero, by arm."""
    pairs = list(combinations([method for method in methods if method != TWINS[0]], 2))
    count = {}
    for arm in arms:
        intervals = [student(difference(runs, arm, *pair))[1:] for pair in pairs]
        count[arm] = sum(verdict(*x) in ("better", "worse") for x in intervals)
    words = ", ".join(f"{arm} {n}" for arm, n in count.items())
    about = f"Of the {len(pairs)} pairs of different methods in an arm, the intervals of so many leave zero (by luck alone about {len(pairs) / 20:.0f} would)"
    return f"{about}: {words}.\n"


def overall(name: str, runs: pd.DataFrame, methods: list[str]) -> str:
    """Means over the noisy arms, of the seeds that all methods have in all of them."""
    arms = [arm for arm in EXPERIMENTS[name].arms if arm not in CONTROLS]
    title = f"Over the {len(arms)} arms other than {' and '.join(CONTROLS)}"
    table = runs["last"].unstack(["arm", "method"])
    cells = [(arm, method) for arm in arms for method in methods]
    if not set(cells) <= set(table.columns) or len(table := table[cells].dropna()) < 2:
        return f"{title}: not yet, as no two seeds are complete.\n"
    scores = {
        method: np.stack([table[arm, method] for arm in arms]) for method in methods
    }  # (arms, seeds)
    rivals = [rival for rival in RIVALS if rival in scores]
    rows = []
    for method, x in scores.items():
        row = [method, cell(student(x.mean(0)))]
        for rival in rivals:
            against = student((x - scores[rival]).mean(0)), improvement(x, scores[rival])
            row += (
                [cell(against[0], signed=True), cell(against[1])] if method != rival else ["", ""]
            )
        rows.append(row)
    words = [(f"− {rival}", f"probability of improvement over {rival}") for rival in rivals]
    header = ["method", "mean of the last scores", *(word for pair in words for word in pair)]
    about = "intervals of means and differences by Student's t over seeds, of probabilities by bootstrap over seeds"
    return f"{title}, {len(table)} seeds ({about}):\n\n" + markdown(header, rows)


def other_of(name: str, method: str) -> str | None:
    """The method that a method of an experiment is compared with; None for those that others are
    compared with."""
    e = EXPERIMENTS[name]
    other = None if e.against is None else e.against.get(method, next(iter(e.methods)))
    return None if other == method else other


def plain_table(name: str, runs: pd.DataFrame, brief: bool) -> str:
    """A row for each arm and method: last score, its difference from another method, peak (not if
    `brief`), and the measures that some run has (their middle alone if `brief`)."""
    arms, methods = ordered(name, runs)
    keys = [
        key
        for key in TITLES
        if key in runs and runs[key].notna().any() and not (brief and key == "peak")
    ]
    most = int(runs.groupby(["arm", "method"]).size().max())
    rows = []
    for arm in arms:
        for method in methods:
            cells = [
                cell_of(values(runs, arm, method, key).to_numpy(), most, brief and key != "last")
                for key in keys
            ]
            if not cells[0]:
                continue
            other = other_of(name, method)
            number = (
                cell(student(difference(runs, arm, method, other)), signed=True) if other else ""
            )
            rows.append(
                [arm, method, cells[0], f"{number} from {other}" if number else "", *cells[1:]]
            )
    header = [
        "arm",
        "method",
        TITLES["last"],
        "difference (95 %, Student's t)",
        *(TITLES[key] for key in keys[1:]),
    ]
    unused = {0} if brief and len(arms) == 1 else set()
    unused |= {3} if EXPERIMENTS[name].against is None else set()
    header, *rows = (
        [word for i, word in enumerate(row) if i not in unused] for row in [header, *rows]
    )
    about = kind(most)
    if brief:
        about += f"; of the measures that follow, the {kind(most, brief=True).split(',')[0]} alone"
    return f"Cells: {about}.\n\n" + markdown(header, rows)


def tables(name: str, runs: pd.DataFrame, brief: bool = False) -> str:
    """All tables of an experiment, or those for the README."""
    return (grid_tables if is_grid(name) else plain_table)(name, runs, brief)


def is_grid(name: str) -> bool:
    return EXPERIMENTS[name].grid


# ==== Figures =========================================================================================================


def colour(methods: list[str], method: str) -> str:
    """A method has its own in all figures of the methods, a variant its place's."""
    names = list(METHODS) if set(methods) <= set(METHODS) else methods
    return f"C{names.index(method)}"


def spread(
    axis,
    x,
    samples: list[np.ndarray],
    color: str,
    label: str | None = None,
    band: bool = True,
    **style,
) -> None:
    """Summaries of the samples, with a band of their intervals or ranges."""
    middle, low, high = (
        np.array(column) for column in zip(*(summary(x) for x in samples), strict=True)
    )
    axis.plot(x, middle, color=color, label=label, **{"marker": "o", "markersize": 3} | style)
    if band:
        axis.fill_between(x, low, high, color=color, alpha=0.12, lw=0)


def look(name: str, method: str) -> dict[str, str]:
    """Methods without a critic are dashed, with squares."""
    return {"ls": "--", "marker": "s"} if EXPERIMENTS[name].methods[method].script == GRPO else {}


def curves(name: str, frame: pd.DataFrame, runs: pd.DataFrame, out: Path) -> None:
    """Score by episodes, a panel for each arm; bands, where there are many methods, for VRPO and
    its rivals alone."""
    arms, methods = ordered(name, runs)
    columns = min(4, len(arms))
    plot, axes = panels(-(-len(arms) // columns), columns, sharey=True)
    for axis, arm in zip(axes, arms, strict=False):
        for method in methods:
            band = len(methods) <= 6 or method in ("VRPO", *RIVALS)
            some = frame[(frame["arm"] == arm) & (frame["method"] == method)]
            found = [
                (episodes, group["score"].dropna().to_numpy())
                for episodes, group in some.groupby("episodes")
            ]
            if found:
                x, samples = zip(*found, strict=True)
                spread(
                    axis,
                    x,
                    list(samples),
                    colour(methods, method),
                    method,
                    band,
                    **look(name, method),
                )
        axis.axhline(runs["start"].mean(), color="0.3", ls=":", lw=1)
        axis.set_title(arm, fontsize=10)
        axis.set_xlabel("episodes", fontsize=8)
    for axis in axes[::columns]:
        axis.set_ylabel("score; dotted: without training", fontsize=8)
    plot.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    save(plot, axes[len(arms) :], out)


def by_rate(name: str, runs: pd.DataFrame, out: Path) -> None:
    """Last score by rate of symmetric flips, a panel for each method, with the others in grey
    behind it."""
    arms, methods = ordered(name, runs)
    arms = [arm for arm in arms if arm in RATES]
    plot, axes = panels(-(-len(methods) // 3), min(3, len(methods)), size=(3.2, 2.3), sharey=True)
    for axis, method in zip(axes, methods, strict=False):
        for other in [*(m for m in methods if m != method), method]:
            found = [
                (RATES[arm], x) for arm in arms if len(x := values(runs, arm, other).to_numpy())
            ]
            if not found:
                continue
            x, samples = zip(*found, strict=True)
            if other == method:
                spread(axis, x, list(samples), colour(methods, method), **look(name, method))
            else:
                axis.plot(x, [summary(sample)[0] for sample in samples], color="0.8", lw=1)
        axis.axhline(runs["start"].mean(), color="0.3", ls=":", lw=1)
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("flip rate", fontsize=8)
    axes[0].set_ylabel("last score; dotted: without training", fontsize=8)
    save(plot, axes[len(methods) :], out)


def by_arm(name: str, runs: pd.DataFrame, out: Path) -> None:
    """Last score of every method in every arm, with intervals."""
    arms, methods = ordered(name, runs)
    plot, (axis,) = panels(1, 1, size=(11, 4.5))
    for i, method in enumerate(methods):
        found = [
            (n, x) for n, arm in enumerate(arms) if len(x := values(runs, arm, method).to_numpy())
        ]
        x, samples = zip(*found, strict=True)
        middle, low, high = (
            np.array(column) for column in zip(*map(summary, samples), strict=True)
        )
        shift = (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        reach = np.nan_to_num([middle - low, high - middle]).clip(min=0)
        axis.errorbar(
            np.array(x) + shift,
            middle,
            reach,
            color=colour(methods, method),
            label=method,
            **{"marker": "o"} | look(name, method) | {"ls": ""},
            markersize=4,
            lw=1.2,
        )
    axis.axhline(runs["start"].mean(), color="0.3", ls=":", lw=1, label="without training")
    for n in range(1, len(arms)):
        axis.axvline(n - 0.5, color="0.9", lw=0.8)
    axis.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms])
    most = int(runs.groupby(["arm", "method"]).size().max())
    axis.set_ylabel(f"last score ({kind(most)})", fontsize=8)
    axis.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False)
    save(plot, [], out)


def differences(all_runs: dict[str, pd.DataFrame], out: Path) -> None:
    """Last score less that of the method compared with, a panel for each experiment but the grid:
    every seed, mean and t interval."""
    plot, axes = panels(-(-len(all_runs) // 2), 2, size=(6.2, 2.5))
    for axis, (name, runs) in zip(axes, all_runs.items(), strict=False):
        arms, methods = ordered(name, runs)
        rows = []
        for arm in arms:
            for method in methods:
                other = other_of(name, method)
                if other and len(found := difference(runs, arm, method, other)):
                    label = f"{method} − {other}" if EXPERIMENTS[name].against else method
                    rows.append((f"{label} ({arm})" if len(arms) > 1 else label, found))
        for y, (_, found) in enumerate(rows):
            mean, low, high = student(found)
            axis.plot(found, [y] * len(found), "o", color="0.55", markersize=3, zorder=3)
            axis.plot([low, high], [y, y], color="C0", lw=1.5)
            axis.plot(
                mean,
                y,
                "o",
                color="C0",
                markersize=5,
                markerfacecolor="C0" if low > 0 or high < 0 else "white",
            )
        axis.axvline(0, color="0.3", ls=":", lw=1)
        axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
        axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        # every seed is seen, if not every interval's end
        reach = max([0.15, *(1.1 * abs(found).max() for _, found in rows)])
        axis.set_xlim(-reach, reach)
        axis.set_xlabel("difference of the last score", fontsize=8)
        first = "" if EXPERIMENTS[name].against else f", difference from {methods[0]}"
        axis.set_title(f"{name}{first}", fontsize=9)
    save(plot, axes[len(all_runs) :], out)


def panels(rows: int, columns: int, size: tuple[float, float] = (4.4, 3.4), sharey: bool = False):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = {
        "figsize": (size[0] * columns, size[1] * rows),
        "squeeze": False,
        "layout": "constrained",
        "sharey": sharey,
    }
    plot, axes = plt.subplots(rows, columns, **shape)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="y")
    return plot, list(axes.flat)


def save(plot, unused: list, out: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in unused:
        axis.set_visible(False)
    plot.savefig(out, dpi=110)
    plt.close(plot)


# ==== Main ============================================================================================================


def insert(text: str, name: str, table: str) -> str:
    """`text` with what stands between the marks <!-- name --> and <!-- /name --> replaced by the
    table; as it is without marks."""
    mark = re.escape(name)
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda m: f"{m[1]}\n{table}\n{m[2]}",
        text,
        flags=re.S,
    )


def report(name: str) -> pd.DataFrame | None:
    """Writes the experiment's .md and .png files beside its CSV and returns its runs; None if there
    are none."""
    frame = load(name)
    if others := len(results(name)) - len(frame):
        print(
            f"{name}: {others} rows were made with other flags than the present ones and are left out",
            file=sys.stderr,
        )
    if frame.empty:
        return None
    runs = by_run(frame)
    (RESULTS / f"{name}.md").write_text(f"{EXPERIMENTS[name].about}\n\n{tables(name, runs)}")
    curves(name, frame, runs, RESULTS / f"{name}.png")
    if is_grid(name):
        by_rate(name, runs, RESULTS / f"{name}_rates.png")
        by_arm(name, runs, RESULTS / f"{name}_arms.png")
    return runs


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """names of experiments; default: all that have been run"""
    readme: Path = ROOT / "README.md"
    """file whose marked tables are renewed"""


def main(args: Args) -> None:
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        stop(f"{' '.join(sorted(unknown))}: there are {', '.join(EXPERIMENTS)}")
    text, compared = args.readme.read_text(), {}
    for name in args.experiments or EXPERIMENTS:
        runs = report(name)
        if runs is None:
            if args.experiments:
                stop(
                    f"{name}: nothing has been run with the present flags (python benchmark/run.py {name})"
                )
            continue
        text = insert(text, name, tables(name, runs, brief=True))
        print(f"{name}\n\n{tables(name, runs)}")
    for name, e in EXPERIMENTS.items():
        if (
            not e.grid
            and any(other_of(name, method) for method in e.methods)
            and not (frame := load(name)).empty
        ):
            compared[name] = by_run(frame)
    if compared:
        differences(compared, RESULTS / "differences.png")
    write_atomically(args.readme, text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Tables and figures of the experiments, from the committed CSVs alone.

    python benchmark/report.py                # benchmark/results/<experiment>*.md and .png
    python benchmark/report.py noise_grid

An experiment's shorter tables go between <!-- name --> and <!-- /name -->, in README.md and in
every page of docs/ that has these marks. A run is measured by its clean held-out accuracy (for
dialogues the mean of TCR, ACR and GCR): the mean of the evaluations after the start, the last one,
or the peak; an experiment's `score` says which one its methods are compared by. Over five seeds or
more: the inter-quartile mean (the mean of the middle half, of five the middle three; arXiv
2108.13264) with a 95 % bootstrap interval; over fewer: mean and range. Two methods are compared by
the differences between their runs of the same seed, with Student's t, since bootstrap intervals are
too narrow for five seeds."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.experiments import ARMS, BOUGHT, EXPERIMENTS, SHARES  # noqa: E402
from benchmark.jobs import RESULTS  # noqa: E402
from benchmark.run import jobs_of, keys, results  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.files import write_atomically  # noqa: E402
from utils.report import style  # noqa: E402
from utils.report.price import price  # noqa: E402

RIVALS = ("PPO", "GRPO")  # whom VRPO is compared with in every arm
CONTROLS = ("no noise", "coin")  # arms that no average is taken over
ENOUGH = 5  # seeds for a bootstrap interval
RATES = {
    arm: flags.get("noise_rate", 0.0)
    for arm, flags in ARMS.items()
    if flags["noise"] in ("none", "symmetric")
}
WORTH = "symmetric 0.3"  # the arm of critic_worth that carries the claims
WORTH_RATES = RATES | {"symmetric 0.4": 0.4}
TITLES = {
    "mean": "mean of the run",
    "evaluations": "mean of the evaluations",
    "last": "last",
    "peak": "peak",
    "critic/explained_variance_clean": "explained variance, clean",
    "objective/advantage_noise": "noise in the advantages",
    "charts/response_length": "length of the samples",
    "vrpo/ib_kl": "nats of the code",
    "eval/turns": "turns",
}
# Their curves lie on top of one another, or are of one seed: tables and differences.png say more.
# Those of `dialogue` are in its folder.
NO_CURVES = (
    "bottleneck_depth", "token_ratio", "beta_sweep", "semantic_head", "advantage_variance",
    "failures", "dialogue", "long_tuning",
)  # fmt: skip


# ==== Statistics ==================================================================================

Numbers = tuple[float, float, float]  # middle, and the ends of its interval or range
NAN = float("nan")


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Inter-quartile mean: of the middle half of the runs."""
    return stats.trim_mean(x, 0.25, axis=axis)


def resampled(data: np.ndarray, statistic: Callable) -> Numbers:
    """`statistic` of the data and its 95 % percentile interval, resampling the data."""
    options = {"n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(0)}
    found = stats.bootstrap([data], statistic, vectorized=True, **options)
    return float(statistic(data)), *map(float, found.confidence_interval)


@cache
def iqm_of(x: tuple[float, ...]) -> Numbers:
    """Tables and figures ask for the same one again and again."""
    return resampled(np.array(x), iqm)


def summary(x: np.ndarray) -> Numbers:
    """Inter-quartile mean and bootstrap interval of five runs or more, mean and range of fewer, NaN
    for the range of one."""
    if len(x) >= ENOUGH:
        return iqm_of(tuple(x))
    return float(x.mean()), *((float(x.min()), float(x.max())) if len(x) > 1 else (NAN, NAN))


def student(x: np.ndarray) -> Numbers:
    """Mean and its 95 % interval by Student's t; NaN for fewer than three, of which it would be
    wider than the measure's range."""
    mean = float(x.mean()) if len(x) else NAN
    if len(x) < 3:
        return mean, NAN, NAN
    reach = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
    return mean, float(mean - reach), float(mean + reach)


def verdict(low: float, high: float) -> str:
    if low != low:
        return "too few seeds"
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


# ==== Data ========================================================================================


def load(name: str) -> pd.DataFrame:
    """The rows of an experiment that were made with its present flags, with the measure in column
    `score`."""
    frame = results(name)
    if frame.empty:
        return frame
    wanted = {job.key for job in jobs_of(name, tuple(sorted(set(frame["seed"]))))}
    frame = frame[[key in wanted for key in keys(frame)]]
    average = frame["eval/average"] if "eval/average" in frame else pd.Series(np.nan, frame.index)
    return frame.assign(score=average.fillna(frame.get("eval/accuracy", np.nan)))


def by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each run: start, last and peak score, mean clean reward of the sampled answers, and
    the training metrics of the last span between evaluations."""
    groups = frame.sort_values("update").groupby(["arm", "method", "seed"], sort=False)
    runs = groups.tail(1).set_index(["arm", "method", "seed"])
    score = groups["score"]
    found = {"start": score.first(), "last": score.last(), "peak": score.max()}
    found["evaluations"] = (score.sum() - score.first()) / (score.count() - 1)
    if "reward/clean" in frame:
        found["mean"] = groups["reward/clean"].mean()
    return runs.assign(**found).sort_index()


def ordered(name: str, runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Arms and methods of the experiment that have runs, in its order."""
    e = EXPERIMENTS[name]
    arms, methods = (set(runs.index.get_level_values(level)) for level in ("arm", "method"))
    return [arm for arm in e.arms if arm in arms], [m for m in e.methods if m in methods]


def most_seeds(runs: pd.DataFrame) -> int:
    return int(runs.groupby(["arm", "method"]).size().max())


def values(runs: pd.DataFrame, arm: str, method: str, key: str = "last") -> pd.Series:
    """By seed; empty where there are none."""
    try:
        return runs[key].loc[arm, method].dropna()
    except KeyError:
        return pd.Series(dtype=float)


def difference(
    runs: pd.DataFrame, arm: str, method: str, rival: str, key: str = "last"
) -> np.ndarray:
    """Of the last scores, or of another measure, for the seeds that both have."""
    return (values(runs, arm, method, key) - values(runs, arm, rival, key)).dropna().to_numpy()


def other_of(name: str, method: str) -> str | None:
    """The method that a method of an experiment is compared with; None for those that others are
    compared with."""
    e = EXPERIMENTS[name]
    other = None if e.against is None else e.against.get(method, next(iter(e.methods)))
    return None if other == method else other


# ==== Tables ======================================================================================


def cell(numbers: Numbers, signed: bool = False) -> str:
    if numbers[0] != numbers[0]:
        return ""
    forms = ["+.3f" if signed else ".3f" if abs(x) < 10 else ".1f" for x in numbers]
    middle, low, high = map(format, numbers, forms)
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
    measure, spread = "mean", "range"
    if seeds >= ENOUGH:
        measure, spread = "inter-quartile mean", "its 95 % bootstrap interval"
    return f"{measure if brief else f'{measure} and {spread}'}, {seeds} seed{'s' * (seeds > 1)}"


# arms by the words of all tables and figures, short enough for ten columns
WORDS = {"false positives": "false pos.", "false negatives": "false neg.", "majority vote": "vote"}


def in_words(arm: str) -> str:
    arm = re.sub(r"^symmetric 0\.(\d)(?=$|,)", r"\g<1>0 % flips", arm)
    arm = re.sub(r"^persistent 0\.(\d)$", r"\g<1>0 % persistent", arm)
    return WORDS.get(arm, arm)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def grid_tables(name: str, runs: pd.DataFrame, brief: bool) -> str:
    """Arms as columns: the experiment's score (its middle alone if `brief`), and the last one and
    what was lost since the peak (not if `brief`); then VRPO against its rivals, and all methods over
    all arms."""
    (arms, methods), score = ordered(name, runs), EXPERIMENTS[name].score
    runs = runs.assign(lost=runs["peak"] - runs["last"])
    planned = {(job.arm, job.method, job.seed) for job in jobs_of(name)}
    made, most = len(planned & set(runs.index)), most_seeds(runs)
    parts = [
        f"All {made} runs." if made == len(planned) else f"{made} of {len(planned)} runs so far."
    ]
    titles = {score: TITLES[score].capitalize()}
    if not brief:
        titles |= {"last": "Last score", "lost": "Lost since the peak"}
    for key, title in titles.items():
        cells = {
            m: [cell_of(values(runs, arm, m, key).to_numpy(), most, brief) for arm in arms]
            for m in methods
        }
        rows = [[method, *cells[method]] for method in methods]
        table = markdown(["method", *map(in_words, arms)], rows)
        parts.append(f"{title} ({kind(most, brief)}):\n\n{table}")
    if pairs := [("VRPO", rival) for rival in RIVALS if {"VRPO", rival} <= set(methods)]:
        rows = []
        for arm in arms:
            numbers = [student(difference(runs, arm, *pair, score)) for pair in pairs]
            words = [(cell(x, signed=True), verdict(*x[1:])) for x in numbers]
            rows.append([in_words(arm), *(word for pair in words for word in pair)])
        header = ["arm", *(word for a, b in pairs for word in (f"{a} − {b}", "verdict"))]
        warning = "one comparison in twenty comes out as better or worse by luck"
        about = "Mean differences of runs of the same seed, with 95 % intervals by Student's t"
        parts.append(f"{about} ({warning}):\n\n" + markdown(header, rows))
    apart = told_apart(runs, arms, methods, score)
    return "\n\n".join([*parts, apart, overall(name, runs, methods)])


def told_apart(runs: pd.DataFrame, arms: list[str], methods: list[str], score: str) -> str:
    """In how many of all pairs of methods the interval of the paired difference leaves zero, by
    arm."""
    pairs = list(combinations(methods, 2))
    count = {}
    for arm in arms:
        words = [verdict(*student(difference(runs, arm, *pair, score))[1:]) for pair in pairs]
        count[arm] = sum(word in ("better", "worse") for word in words)
    words = ", ".join(f"{in_words(arm)}: {n}" for arm, n in count.items())
    about = f"Of the {len(pairs)} pairs of methods in an arm, the intervals of so many"
    luck = f"by luck alone about {len(pairs) / 20:.0f} would"
    return f"{about} leave zero ({luck}): {words}.\n"


def overall(name: str, runs: pd.DataFrame, methods: list[str]) -> str:
    """Means over the noisy arms of the experiment's score, and of the last one, for the seeds that
    all methods have in all of them."""
    score = EXPERIMENTS[name].score
    arms = [arm for arm in EXPERIMENTS[name].arms if arm not in CONTROLS]
    title = f"Over the {len(arms)} arms other than {' and '.join(CONTROLS)}"
    cells = [(arm, method) for arm in arms for method in methods]
    table = {key: runs[key].unstack(["arm", "method"]) for key in dict.fromkeys((score, "last"))}
    whole = set(cells) <= set(table[score].columns)
    if not whole or len(seeds := table[score][cells].dropna().index) < 2:
        return f"{title}: not yet, as no two seeds are complete.\n"
    rivals = [rival for rival in RIVALS if rival in methods]
    rows = [[method] for method in methods]
    for frame in table.values():
        means = {m: frame.loc[seeds, [(arm, m) for arm in arms]].mean(axis=1) for m in methods}
        for row in rows:
            x = means[row[0]].to_numpy()
            less = [x - means[rival].to_numpy() for rival in rivals]
            row.append(cell(student(x)))
            row += [cell(student(y), True) if y.any() else "" for y in less]
    words = [
        word for key in table for word in (TITLES[key], *(f"{TITLES[key]}, − {r}" for r in rivals))
    ]
    about = "means and differences, with 95 % intervals by Student's t over seeds"
    return f"{title}, {len(seeds)} seeds ({about}):\n\n" + markdown(["method", *words], rows)


def plain_table(name: str, runs: pd.DataFrame, brief: bool) -> str:
    """A row for each arm and method: the experiment's score, its difference from another method,
    peak (not if `brief`), and the measures that some run has (their middle alone if `brief`)."""
    (arms, methods), most = ordered(name, runs), most_seeds(runs)
    titles, score = TITLES | EXPERIMENTS[name].measures, EXPERIMENTS[name].score
    some = [key for key in titles if key in runs and runs[key].notna().any()]
    hidden = {"mean", "evaluations", score} | ({"peak"} if brief else set())
    some = [score, *(key for key in some if key not in hidden)]
    middle, *others = map(titles.get, some)
    header = ["arm", "method", middle, "difference (95 %, Student's t)", *others]
    rows = []
    for arm in arms:
        for method in methods:
            found = {key: values(runs, arm, method, key).to_numpy() for key in some}
            if not len(found[score]):
                continue
            first, *cells = (cell_of(x, most, brief and key != score) for key, x in found.items())
            less, other = "", other_of(name, method)
            if other:
                less = cell(student(difference(runs, arm, method, other, score)), True)
                less = less and f"{less} from {other}"
            rows.append([in_words(arm), method, first, less, *cells])
    unused = {0} if brief and len(arms) == 1 else set()
    unused |= {3} if EXPERIMENTS[name].against is None else set()
    header, *rows = [[x for i, x in enumerate(row) if i not in unused] for row in [header, *rows]]
    about = kind(most)
    if brief:
        about += f"; of the measures that follow, the {kind(most, True).split(',')[0]} alone"
    return f"Cells: {about}.\n\n" + markdown(header, rows)


def worth_table(runs: pd.DataFrame) -> str:
    """Methods by shares of flips: last score; and under 30 % flips what the values know in the first
    and in the last state of an episode."""
    arms, methods = ordered("critic_worth", runs)
    arms, most = sorted(arms, key=WORTH_RATES.get), most_seeds(runs)
    knows = "critic/explained_variance_"
    more = {f"{knows}first": "first state", f"{knows}last": "last state"}
    more |= {"charts/verifier_calls": "verifier calls an update"}
    rows = [
        [
            method,
            *(cell_of(values(runs, arm, method).to_numpy(), most, True) for arm in arms),
            *(cell_of(values(runs, WORTH, method, key).to_numpy(), most, True) for key in more),
        ]
        for method in methods
    ]
    header = ["method", *(in_words(arm) for arm in arms), *more.values()]
    about = (
        "last accuracy; under 30 % flips the explained variance of clean returns in the first and "
    )
    about += "in the last state of an episode, and verifier calls"
    return f"Cells: {kind(most, True)}: {about}.\n\n" + markdown(header, rows)


def doses(rate: float) -> tuple[str, str]:
    """The arms of `price` with such flips: as many answers as without, and more."""
    return f"symmetric {rate}", f"symmetric {rate}, {BOUGHT[rate]} answers"


def multiplier(clean: np.ndarray, poor: np.ndarray, rich: np.ndarray, dose: float) -> float:
    """How many times the answers give the accuracy of true rewards, from runs with as many (`poor`)
    and with `dose` times as many (`rich`): on the line through both, over the logarithm of the
    answers."""
    gain = rich.mean() - poor.mean()
    return float(dose ** ((clean.mean() - poor.mean()) / gain)) if gain > 0 else float("inf")


def price_table(runs: pd.DataFrame) -> str:
    """By method and rate: what flips cost with as many answers and with more, and the multiplier by
    formula and as measured."""
    methods, score = ordered("price", runs)[1], EXPERIMENTS["price"].score
    rows, most = [], most_seeds(runs)
    for method in methods:
        for rate in sorted(BOUGHT):
            found = [values(runs, arm, method, score) for arm in ("no noise", *doses(rate))]
            found = pd.concat(found, axis=1, keys=("clean", "poor", "rich")).dropna()
            if found.empty:
                continue
            clean, poor, rich = found.to_numpy().T
            success = values(runs, doses(rate)[0], method, "mean").mean()
            rows.append(
                [
                    method,
                    f"{100 * rate:.0f} %",
                    cell(student(poor - clean), True),
                    f"{BOUGHT[rate] / 4:.2f}",
                    cell(student(rich - clean), True),
                    f"{price(success, rate, rate):.1f}",
                    f"{multiplier(clean, poor, rich, BOUGHT[rate] / 4):.1f}",
                    str(len(found)),
                ]
            )
    header = ["method", "flips", "as many answers", "times", "so many times the answers"]
    header += ["the formula asks for", "measured", "seeds"]
    about = (
        f"Differences of the {TITLES[score]} from the same method without noise (95 %, Student's t)"
    )
    return f"{about}, at most {most} seeds:\n\n" + markdown(header, rows)


def holm(p: dict[str, float]) -> dict[str, float]:
    """p values that hold for all of them together (Holm 1979)."""
    found, least = {}, 0.0
    for rank, (key, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        least = max(least, (len(p) - rank) * value)
        found[key] = min(least, 1.0)
    return found


def effects(name: str, runs: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """By arm and method, the differences of the experiment's score from the method that it is
    compared with, of the seeds that both have; three seeds or more."""
    (arms, methods), score = ordered(name, runs), EXPERIMENTS[name].score
    found = {
        (arm, method): difference(runs, arm, method, other, score)
        for arm in arms
        for method in methods
        if (other := other_of(name, method))
    }
    return {key: x for key, x in found.items() if len(x) > 2}


def effects_table(name: str, runs: pd.DataFrame) -> str:
    """A row for each method that another is its parent: the differences in every arm, and in the
    first whether they hold for all rows together."""
    (arms, methods), found = ordered(name, runs), effects(name, runs)
    sure = holm(
        {m: stats.ttest_1samp(x, 0).pvalue for (arm, m), x in found.items() if arm == arms[0]}
    )
    rows = [
        [
            method,
            other_of(name, method),
            *(cell(student(found.get((arm, method), np.array([]))), True) for arm in arms),
            f"{sure[method]:.2f}" if method in sure else "",
        ]
        for method in methods
        if any((arm, method) in found for arm in arms)
    ]
    most = max((len(x) for x in found.values()), default=0)
    header = ["recipe", "parent", *map(in_words, arms), f"{in_words(arms[0])}: p by Holm"]
    title = TITLES[EXPERIMENTS[name].score]
    return f"Differences of the {title} (95 %, Student's t), {most} seeds:\n\n" + markdown(
        header, rows
    )


def tables(name: str, runs: pd.DataFrame, brief: bool = False) -> str:
    """All tables of an experiment, or those for the pages."""
    if brief and name == "recipes":
        return effects_table(name, runs)
    if brief and name == "critic_worth":
        return worth_table(runs)
    if brief and name == "price":
        return price_table(runs)
    return (grid_tables if EXPERIMENTS[name].grid else plain_table)(name, runs, brief)


# ==== Figures =====================================================================================

SCORES = {
    "last": "clean held-out accuracy at the end",
    "evaluations": "clean held-out accuracy, mean of the evaluations",
    "mean": "clean accuracy of the samples, mean of the run",
}
SHORT = {"last": "accuracy at the end", "evaluations": "mean of the evaluations"}
WITHOUT = {"color": "0.3", "ls": ":", "lw": 1, "label": "without training"}


def measure(frame: pd.DataFrame) -> str:
    average = "eval/average" in frame and frame["eval/average"].notna().any()
    return "mean of TCR, ACR and GCR" if average else "clean held-out accuracy"


def looks(name: str, methods: list[str]) -> dict[str, dict]:
    scripts = {method: EXPERIMENTS[name].methods[method].script for method in methods}
    return style.looks({m: style.SCRIPTS.get(script, script) for m, script in scripts.items()})


def spread(axis, points: list[tuple[float, np.ndarray]], look: dict, band: bool = True) -> None:
    """Summaries of the samples at each x, with a band of their intervals or ranges."""
    x, samples = zip(*points, strict=True)
    middle, low, high = zip(*map(summary, samples), strict=True)
    axis.plot(x, middle, **look)
    if band:
        axis.fill_between(x, low, high, color=look["color"], alpha=0.1, lw=0)


def curves(name: str, frame: pd.DataFrame, runs: pd.DataFrame):
    """Score by episodes, a panel for each arm; bands, where there are many methods, for VRPO and
    its rivals alone."""
    arms, methods = ordered(name, runs)
    size = (3.4, 3.0) if len(arms) > 1 else (5, 3.4)
    figure, axes = style.panels(len(arms), 5, size, sharey=True)
    for axis, arm in zip(axes, arms, strict=True):
        for method, look in looks(name, methods).items():
            some = frame[(frame["arm"] == arm) & (frame["method"] == method)]
            points = [(at, x["score"].dropna().to_numpy()) for at, x in some.groupby("episodes")]
            if points:
                band = len(methods) <= 6 or method in ("VRPO", *RIVALS)
                spread(axis, points, look | {"label": method}, band)
        axis.axhline(runs["start"].mean(), **WITHOUT)
        first = axis.get_subplotspec().is_first_col()
        style.name(axis, in_words(arm), "episodes", measure(frame) if first else "")
    style.legend(figure, axes)
    return figure


def by_rate(name: str, runs: pd.DataFrame):
    """The experiment's score by rate of symmetric flips, a panel for each method, with the others in
    grey behind it."""
    arms, methods = ordered(name, runs)
    found = {
        (a, m): values(runs, a, m, EXPERIMENTS[name].score).to_numpy()
        for a in arms
        for m in methods
    }
    points = {
        m: [(RATES[a], found[a, m]) for a in arms if a in RATES and len(found[a, m])]
        for m in methods
    }
    points = {method: found for method, found in points.items() if found}
    figure, axes = style.panels(len(points), 3, (3.2, 2.4), sharey=True)
    grey = {"color": "0.8", "lw": 1, "label": "the other methods"}
    for axis, method in zip(axes, points, strict=True):
        for other in (m for m in points if m != method):
            spread(axis, points[other], grey, band=False)
        spread(axis, points[method], looks(name, methods)[method])
        axis.axhline(runs["start"].mean(), **WITHOUT)
        first = axis.get_subplotspec().is_first_col()
        style.name(axis, method, "share of flipped rewards", measure(runs) if first else "")
    style.legend(figure, axes)
    return figure


def by_arm(name: str, runs: pd.DataFrame):
    """The experiment's score of every method in every arm, with intervals."""
    (arms, methods), score = ordered(name, runs), EXPERIMENTS[name].score
    figure, (axis,) = style.panels(1, 1, (11, 4.5), "y")
    for i, (method, look) in enumerate(looks(name, methods).items()):
        shift = (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        found = {n: values(runs, arm, method, score).to_numpy() for n, arm in enumerate(arms)}
        points = {n + shift: summary(x) for n, x in found.items() if len(x)}
        middle, low, high = np.array(list(points.values())).T
        reach = np.nan_to_num([middle - low, high - middle]).clip(min=0)
        look = look | {"ls": "", "label": method, "lw": 1.2}
        axis.errorbar(list(points), middle, reach, **look)
    axis.axhline(runs["start"].mean(), **WITHOUT)
    for n in range(1, len(arms)):
        axis.axvline(n - 0.5, color="0.9", lw=0.8)
    axis.set_xticks(range(len(arms)), [fill(in_words(arm), 11) for arm in arms])
    style.name(axis, kind(most_seeds(runs)), y=SCORES[score])
    style.legend(figure, [axis])
    return figure


def differences(all_runs: dict[str, pd.DataFrame]):
    """The experiment's score less that of the method compared with, a panel for each experiment but
    the grid: every seed, mean and t interval, filled where it leaves zero."""
    figure, axes = style.panels(len(all_runs), 2, (6.2, 2.6), "y")
    for axis, (name, runs) in zip(axes, all_runs.items(), strict=True):
        arms, methods = ordered(name, runs)
        e, reach, ticks = EXPERIMENTS[name], 0.15, []
        for arm in arms:
            for method, look in looks(name, methods).items():
                other = other_of(name, method)
                found = difference(runs, arm, method, other, e.score) if other else []
                if len(found) < 3:
                    continue
                mean, low, high = student(found)
                face = look["color"] if low > 0 or high < 0 else "white"
                axis.plot(found, [len(ticks) - 0.25] * len(found), "o", color="0.6", ms=3)
                axis.plot([low, high], [len(ticks)] * 2, color=look["color"], lw=1.5)
                axis.plot(mean, len(ticks), **look | {"markersize": 6, "markerfacecolor": face})
                label = f"{method} − {other}" if e.against else method
                ticks.append(f"{label}, {in_words(arm)}" if len(arms) > 1 else label)
                reach = max(reach, 1.1 * abs(np.array([*found, low, high])).max())
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set_yticks(range(len(ticks)), ticks)
        axis.set_ylim(max(len(ticks), 1) - 0.5, -0.6)
        axis.set_xlim(-reach, reach)
        title = name.replace("_", " ") + ("" if e.against else f": difference from {methods[0]}")
        style.name(axis, title, f"difference in {SHORT[e.score]}")
    return figure


def worth(runs: pd.DataFrame):
    """What a critic's knowledge is worth under 30 % flips. Left: last scores, a dot for each seed.
    Right: last score by how much of the clean returns the values explain in an episode's last
    state; a line joins PPO's critic and the oracle's shares, marks are critics as they are."""
    arms, methods = ordered("critic_worth", runs)
    known = "critic/explained_variance_last"
    names = looks("critic_worth", methods)
    start = runs.xs("PPO, lambda 0.5", level="method")["start"].mean()
    figure, (left, right) = style.panels(2, 2, (5.2, 3.9))
    scores = {m: values(runs, WORTH, m).to_numpy() for m in methods}
    ranked = sorted((m for m in methods if len(scores[m])), key=lambda m: summary(scores[m])[0])
    for i, method in enumerate(ranked):
        middle, low, high = summary(scores[method])
        color = names[method]["color"]
        left.plot([low, high], [i, i], color=color, lw=2, alpha=0.5)
        left.plot(scores[method], [i] * len(scores[method]), ".", color=color, markersize=4)
        left.plot(middle, i, **names[method] | {"ls": "", "markersize": 7})
    left.axvline(start, **WITHOUT)
    left.set_yticks(range(len(ranked)), ranked)
    style.name(left, "30 % of the rewards flipped", measure(runs))
    mixed = ["PPO, lambda 0.5", *(f"oracle {x:g}" for x in sorted(SHARES) if x)]
    here = runs.loc[WORTH].groupby("method")[["last", known]].mean().dropna()
    dose = here.reindex(mixed).dropna()
    right.plot(dose[known], dose["last"], ".-", color="0.3")
    for method, (score, x) in here.iterrows():
        if method not in (*mixed, "PPO after imitation") and not method.startswith("reads"):
            right.plot(x, score, **names[method] | {"ls": "", "markersize": 7})
            at = {"xytext": (-7, -3), "ha": "right"} if x > 0.8 else {"xytext": (7, -3)}
            right.annotate(method, (x, score), textcoords="offset points", fontsize=7, **at)
    right.axhline(start, **WITHOUT)
    style.name(right, "line: PPO with more and more of an oracle", "explained variance, last state")
    style.legend(figure, [right])
    return figure


def forest(name: str, runs: pd.DataFrame):
    """Differences of the experiment's score from the method compared with, a row for each method:
    in every arm the seeds, and mean and 95 % interval, filled where it leaves zero."""
    (arms, methods), found = ordered(name, runs), effects(name, runs)
    rows = [m for m in methods if any((arm, m) in found for arm in arms)]
    rows.sort(key=lambda m: found[arms[0], m].mean() if (arms[0], m) in found else -1)
    figure, (axis,) = style.panels(1, 1, (6.5, 1.1 + 0.12 * (len(arms) + 1) * max(len(rows), 1)))
    for n, (arm, color) in enumerate(zip(arms, ("#D55E00", "#0072B2", "#777777"), strict=False)):
        for i, method in enumerate(rows):
            if (arm, method) in found:
                at = i + 0.3 * ((len(arms) - 1) / 2 - n)
                mean, low, high = student(x := found[arm, method])
                face = color if low > 0 or high < 0 else "white"
                axis.plot(x, [at - 0.1] * len(x), ".", color=color, markersize=3, alpha=0.6)
                axis.plot([low, high], [at, at], color=color, lw=1.5)
                axis.plot(mean, at, "o", color=color, markerfacecolor=face, markersize=5)
        axis.plot([], [], "o-", color=color, label=in_words(arm))
    axis.axvline(0, color="0.3", lw=0.8)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    other = "its parent" if EXPERIMENTS[name].against else methods[0]
    style.name(axis, f"difference from {other}", SCORES[EXPERIMENTS[name].score])
    style.legend(figure, [axis])
    return figure


def bought_back(frame: pd.DataFrame, runs: pd.DataFrame):
    """PPO's accuracy without noise and under flips, with as many answers (dashed) and with more: by
    updates, and by episodes divided by what the formula asks for at a success rate of one half."""
    figure, axes = style.panels(2, 2, (5.2, 3.6), sharey=True)
    for n, axis in enumerate(axes):
        for rate, color in ((0.0, "#000000"), (0.1, "#56B4E9"), (0.2, "#0072B2"), (0.3, "#D55E00")):
            arms = doses(rate) if rate else ("no noise",)
            for arm, dash in zip(reversed(arms), ("-", "--"), strict=False):
                some = frame[(frame["arm"] == arm) & (frame["method"] == "PPO")]
                if some.empty:
                    continue
                at = some["update"] if n == 0 else some["episodes"] * (1 - 2 * rate) ** 2
                points = [(x, y["score"].dropna().to_numpy()) for x, y in some.groupby(at)]
                spread(axis, points, {"color": color, "ls": dash, "label": in_words(arm)})
        axis.axhline(runs["start"].mean(), **WITHOUT)
        title = ("PPO, by updates", "PPO, by effective episodes")[n]
        x = ("updates", "episodes times (1 - 2 rate)²")[n]
        style.name(axis, title, x, "" if n else measure(frame))
    axes[0].set_xticks(sorted(set(frame["update"])))
    style.legend(figure, axes)
    return figure


# ==== Main ========================================================================================


def insert(text: str, name: str, table: str) -> str:
    """`text` with what stands between the marks <!-- name --> and <!-- /name --> replaced by the
    table; as it is without marks."""
    marks = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.S)


def pages() -> list[Path]:
    """Where marked tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renew(name: str, table: str) -> None:
    """Put a table in its place in all pages that have marks for it."""
    for page in pages():
        text = page.read_text()
        if (new := insert(text, name, table)) != text:
            write_atomically(page, new)


def text_of(name: str, runs: pd.DataFrame) -> str:
    """The experiment's .md file."""
    return f"{EXPERIMENTS[name].about}\n\n{tables(name, runs)}"


def in_a_forest(name: str) -> bool:
    """Whether the experiment's figure has its differences, and no curves."""
    return name in ("recipes", "price") or EXPERIMENTS[name].score == "mean"


def figures(name: str, frame: pd.DataFrame) -> dict:
    """The experiment's figures, by the names of their files."""
    runs, found = by_run(frame), {}
    if name == "critic_worth":
        return {name: worth(runs)}
    if name == "price":
        return {name: bought_back(frame, runs)}
    if in_a_forest(name):
        return {} if name in NO_CURVES else {name: forest(name, runs)}
    if name not in NO_CURVES:
        found[name] = curves(name, frame, runs)
    if EXPERIMENTS[name].grid:
        found |= {f"{name}_rates": by_rate(name, runs), f"{name}_arms": by_arm(name, runs)}
    return found


def compared() -> dict:
    """The figure of differences of all experiments that compare methods and have none of their own, as
    a dict like `figures`."""
    some = [name for name, e in EXPERIMENTS.items() if not e.grid and not in_a_forest(name)]
    frames = {name: load(name) for name in some}
    frames = {name: frame for name, frame in frames.items() if frame["seed"].nunique() > 2}
    runs = {
        name: by_run(frame)
        for name, frame in frames.items()
        if any(other_of(name, method) for method in EXPERIMENTS[name].methods)
    }
    return {"differences": differences(runs)} if runs else {}


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """names of experiments; default: all that have been run"""


def main(args: Args) -> None:
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        stop(f"{' '.join(sorted(unknown))}: there are {', '.join(EXPERIMENTS)}")
    drawn = compared()
    for name in args.experiments or EXPERIMENTS:
        frame = load(name)
        if others := len(results(name)) - len(frame):
            said = f"{name}: {others} rows were made with other flags than the present ones"
            print(f"{said} and are left out", file=sys.stderr)
        if frame.empty:
            if args.experiments:
                stop(
                    f"{name}: nothing has been run with the present flags (benchmark/run.py {name})"
                )
            continue
        runs = by_run(frame)
        (RESULTS / f"{name}.md").write_text(text_of(name, runs))
        renew(name, tables(name, runs, brief=True))
        drawn |= figures(name, frame)
        print(text_of(name, runs))
    for file, figure in drawn.items():
        style.save(figure, RESULTS / f"{file}.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""One look: a method is drawn the same in every figure, nothing is cut off, and words stand where
keys could."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from benchmark import report
from benchmark.experiments import METHODS
from benchmark.studies import critic_study as study
from tests.conftest import ROOT
from utils.report import style
from utils.report.plot import plot_runs

# Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB
SIGHT = {
    "all cones": np.eye(3),
    "no red ones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green ones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue ones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
WHITE = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, sight: str) -> np.ndarray:
    """CIELAB as somebody sees it: a distance of 2 can just be seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = WHITE @ np.clip(SIGHT[sight] @ linear, 0, 1) / WHITE.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_lines_of_two_methods_are_told_apart_by_everybody(sight):
    for names, least in ((METHODS, 15), (study.CRITICS, 10)):
        looks = {name: style.LOOKS[name] for name in names}
        assert len(set(looks.values())) == len(looks)
        for a, (color, line, _) in looks.items():
            for b, other in looks.items():
                if a < b and line == other[1]:
                    assert np.linalg.norm(lab(color, sight) - lab(other[0], sight)) > least, (a, b)


def test_a_variant_is_a_shade_of_its_method():
    names = ["VRPO, lambda 1", "VRPO", "PPO", "VRPO, lambda 0.5", "bottleneck alone"]
    methods = dict.fromkeys(names, "VRPO") | {"PPO": "PPO"}
    looks = style.looks(methods)
    assert looks["PPO"]["color"] == style.LOOKS["PPO"][0]
    assert looks["bottleneck alone"]["color"] == style.LOOKS["bottleneck alone"][0]
    assert looks["VRPO"]["color"] == style.LOOKS["VRPO"][0]
    assert len({str(look["color"]) for look in looks.values()}) == 5
    assert len({str(look) for look in style.looks(dict.fromkeys("abcdefgh", "VRPO")).values()}) == 8


def test_methods_of_runs():
    assert style.method_of({"script": "vrpo_dialogue"}) == "VRPO"
    assert style.method_of({"script": "grpo_baseline", "advantage": "grpo"}) == "GRPO"
    assert style.method_of({"script": "grpo_baseline", "advantage": "rloo"}) == "RLOO"
    assert style.method_of({"script": "mine"}) == "mine"
    assert set(style.SCRIPTS.values()) <= set(style.LOOKS)
    assert all((ROOT / f"{script}.py").exists() for script in style.SCRIPTS)


def plotted(folders: list, monkeypatch) -> Figure:
    """What utils.plot draws of these runs."""
    kept = []
    monkeypatch.setattr(style, "save", lambda figure, out: kept.append(figure))
    plot_runs(folders, ROOT / "unused.png")
    return kept[0]


def figures(monkeypatch) -> dict[str, Figure]:
    """A figure of every kind of the committed results, and a picture of many runs."""
    found = report.compared()
    for name in ("noise_grid", "critic_worth", "dialogue_methods"):
        found |= report.figures(name, report.load(name))
    rows = study.present(study.results(study.RESULTS / "critic_study.csv"), (1, 2, 3, 4, 5))
    found["critic_study"] = study.draw(rows)
    runs = {
        "dialogue/reward-model": "benchmark/results/dialogue/*-[123]",
        "many": "tests/recorded/*",
    }
    for name, pattern in runs.items():
        found[name] = plotted(sorted(ROOT.glob(pattern)), monkeypatch)
    for figure in found.values():
        figure.draw_without_rendering()  # lays it out
    return found


def outside(figure: Figure) -> list[str]:
    """What reaches over the edge of the figure: a legend, a text of one, or anything else."""
    parts = [part for legend in figure.legends for part in (legend, *legend.get_texts())]
    boxes = {str(part): part.get_window_extent() for part in parts}
    inches = figure.get_tightbbox()
    boxes["the whole"] = Bbox(inches.get_points() * figure.dpi)
    edge = figure.bbox.padded(1)
    return [x for x, b in boxes.items() if not (edge.contains(*b.p0) and edge.contains(*b.p1))]


def test_what_is_cut_off_is_seen():
    figure = Figure((4, 3))
    axis = figure.subplots()
    for x in range(2):
        axis.plot([x], label="a label, too long to stand beside another of this length")
    figure.legend(loc="upper center", ncols=2)
    assert len(outside(figure)) > 1


def test_figures_of_every_kind(monkeypatch):
    """They are committed; nothing is cut off; a legend names every line once; words stand
    in place of keys; and where differences are drawn there is a line at zero."""
    results, found = ROOT / "benchmark" / "results", figures(monkeypatch)
    there = {str(f.relative_to(results).with_suffix("")) for f in results.rglob("*.png")}
    assert found.keys() - {"many"} <= there
    differences = list(found["differences"].axes)
    differences += [a for a in found["critic_study"].axes if "difference" in a.get_title()]
    assert len(differences) > 10
    for axis in differences:
        ends = [(line.get_xdata(), line.get_ydata()) for line in axis.lines]
        assert any(not any(x) or not any(y) for x, y in ends), axis.get_title()
    for name, figure in found.items():
        assert not outside(figure), name
        labels = {x for axis in figure.axes for x in axis.get_legend_handles_labels()[1]}
        words = [" ".join(t.get_text().split()) for legend in figure.legends for t in legend.texts]
        assert sorted(labels) == sorted(words), name
        for axis in figure.axes:
            words = [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
            words += [t.get_text() for t in [*axis.get_xticklabels(), *axis.get_yticklabels()]]
            assert not re.search(r"\w_\w|\w/\w|=", " ".join(words)), (name, words)
            assert axis.get_xlabel() or name == "noise_grid_arms"

"""One look for all figures: a method has its colour, line and marker wherever it is drawn.

Solid lines have a critic, dashed ones none, dash-dotted ones values that are sampled. The colours
are Okabe and Ito's, made for readers who cannot tell red from green, and some of Paul Tol's.
"""

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

# colour, line, marker
LOOKS = {
    "PPO": ("#0072B2", "-", "o"),
    "VRPO": ("#D55E00", "-", "D"),
    "DVPO": ("#009E73", "-", "^"),
    "robust PPO": ("#CC79A7", "-", "v"),
    "GRPO": ("#000000", "--", "s"),
    "Dr.GRPO": ("#E69F00", "--", "P"),
    "forward GRPO": ("#8A5A00", "--", "x"),
    "RLOO": ("#56B4E9", "--", "p"),
    "REINFORCE++": ("#882255", "--", "h"),
    "VinePPO": ("#999933", "-.", "*"),
    # parts of a method, and other critics
    "bottleneck alone": ("#C2A83E", "-", "<"),
    "semantic losses alone": ("#332288", "-", ">"),
    "quantile": ("#66C2A5", "-", "8"),
    "contamination": ("#A65628", "-", "d"),
    "conservative": ("#661100", "-", "H"),
}
LOOKS |= {
    critic: LOOKS[method]
    for critic, method in {
        "plain": "PPO",
        "bottleneck": "bottleneck alone",
        "semantic": "semantic losses alone",
        "ensemble-min": "robust PPO",
    }.items()
}
OTHER = ("#777777", "-", "o")
SCRIPTS = {
    "ppo_baseline": "PPO",
    "grpo_baseline": "GRPO",
    "vrpo_math": "VRPO",
    "vrpo_dialogue": "VRPO",
    "dvpo_math": "DVPO",
    "robust_ppo_baseline": "robust PPO",
    "vine_ppo_baseline": "VinePPO",
}
ADVANTAGES = {
    "dr_grpo": "Dr.GRPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "forward": "forward GRPO",
}
SHADES = (0.0, -0.5, 0.35, 0.6, -0.75)  # towards black below 0, towards white above
MARKERS = "osD^vPX"


def method_of(flags: dict) -> str:
    """The method of a run, from its args.json; the script's own name where it is none of ours."""
    script = flags["script"]
    return ADVANTAGES.get(flags.get("advantage"), SCRIPTS.get(script, script))


def looks(methods: dict[str, str]) -> dict[str, dict]:
    """How to draw each label, for axis.plot; `methods` says what it is a variant of, if it is no
    method itself. The first variant has the method's own look, unless the method is there too, the
    others are shades with other markers."""
    found, met = {}, [label for label in methods if label in LOOKS]
    for label, method in methods.items():
        color, line, marker = LOOKS.get(label, LOOKS.get(method, OTHER))
        base = method if method in LOOKS else "other"
        if label not in LOOKS:
            n = met.count(base)
            met.append(base)
            if n:
                color, marker = shade(color, SHADES[n % len(SHADES)]), MARKERS[n % len(MARKERS)]
                line = line if n < len(SHADES) else "-."
        found[label] = {"color": color, "ls": line, "marker": marker, "markersize": 4}
    return found


def shade(color: str, amount: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    aim = float(amount > 0)
    return tuple(x + abs(amount) * (aim - x) for x in to_rgb(color))


def panels(
    count: int, columns: int, size: tuple[float, float], grid: str = "both", **options
) -> tuple:
    """A figure, and the axes of `count` panels of `size` inches each."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure((size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis=grid)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def name(axis, title: str = "", x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def legend(figure, axes: Iterable) -> None:
    """What the lines of all panels are, once, to their right: the figure grows by its size."""
    entries = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if not entries:
        return
    labels = [fill(label, 40) for label in entries]
    box = figure.legend(
        entries.values(), labels, loc="outside right upper", fontsize=8, frameon=False
    )
    extent, (width, height) = box.get_window_extent(), figure.get_size_inches()
    figure.set_size_inches(
        width + extent.width / figure.dpi, max(height, extent.height / figure.dpi + 0.2)
    )


def save(figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out

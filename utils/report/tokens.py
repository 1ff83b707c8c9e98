"""What a critic sees: sampled answers, token by token, coloured by value, advantage or entropy.

python -m utils.tokens runs/A runs/B --out tokens.html   # the last update that both have
python -m utils.tokens runs/A --update 20 --rows 3 --color advantages
"""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import tyro

from utils.errors import stop

COLORS = {"values": "RdYlGn", "advantages": "PuOr", "entropy": "Blues"}
EXPLAINED = {
    "values": "value: what the critic expects of the rest, from red (0 or lower) to green (1 or higher)",
    "advantages": "whitened advantage: from orange (below) to violet (above)",
    "entropy": "entropy of the policy, in nats",
}


def read_rows(folder: Path) -> dict[int, dict[str, dict]]:
    """{update: {prompt: row of transcripts.jsonl}}, rows with tokens alone; prompts of equal words
    are numbered."""
    try:
        rows = [
            json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()
        ]
    except (OSError, ValueError):
        stop(f"{folder}: no readable transcripts.jsonl there (a run writes it at every evaluation)")
    found: dict[int, dict[str, dict]] = {}
    for row in rows:
        if "tokens" in row:
            rows_of = found.setdefault(row["update"], {})
            words, count = row["messages"][0]["content"], 2
            name = words
            while name in rows_of:
                name, count = f"{words} ({count})", count + 1
            rows_of[name] = row
    if not found:
        stop(f"{folder}: its transcripts have no tokens (they were written by an older version)")
    return found


def pick(
    runs: dict[str, dict], update: int | None, count: int
) -> list[tuple[str, dict[str, dict]]]:
    """For `count` prompts that all runs have at that update, {run: row}: in turn one whose reward
    was wrong in some run, as those tell most, and one where none was."""
    common = set.intersection(*(set(found) for found in runs.values()))
    if not common or (update is not None and update not in common):
        asked = "the runs" if update is None else f"--update {update}: the runs"
        stop(f"{asked} have {sorted(common) or 'no update'} in common")
    chosen = {
        name: found[max(common) if update is None else update] for name, found in runs.items()
    }
    prompts = [q for q in next(iter(chosen.values())) if all(q in rows for rows in chosen.values())]
    if not prompts:
        stop("the runs have no question in common at that update; runs with the same seed do")
    told = [q for q in prompts if any(misjudged(rows[q]) for rows in chosen.values())]
    quiet = [q for q in prompts if q not in told]
    mixed = [q for pair in zip_longest(told, quiet) for q in pair if q is not None]
    return [(q, {name: rows[q] for name, rows in chosen.items()}) for q in mixed[:count]]


def observed(row: dict) -> float:
    """The sum of the rewards, KL penalties included where they are rewards."""
    return sum(row["tokens"]["rewards"])


def clean(row: dict) -> float:
    """The true outcome: accuracy of a question, mean of the three rates of a dialogue."""
    return row["outcome"].get("accuracy", row["outcome"].get("average", float("nan")))


def misjudged(row: dict) -> bool:
    """The reward and the true outcome lie on different sides of 1/2."""
    return (observed(row) > 0.5) != (clean(row) > 0.5)


def ending(row: dict) -> str:
    return f"observed {observed(row):.3g}, true {clean(row):.3g}"


def answer(row: dict) -> list[int]:
    """Positions from the first token that the policy chose to the last (user turns between them
    included)."""
    chosen = [i for i, c in enumerate(row["tokens"]["chosen"]) if c]
    return list(range(chosen[0], chosen[-1] + 1)) if chosen else []


def scale(color: str, groups: list) -> tuple[float, float]:
    """The same colours for all runs of a page: values on [0, 1] or wider, advantages around zero,
    entropies from zero."""
    found = [
        x for _, rows in groups for row in rows.values() for x in row["tokens"].get(color, [])
    ] or [0.0]
    if color == "values":
        return min(0.0, *found), max(1.0, *found)
    top = max(1e-9, *map(abs, found))
    return (-top, top) if color == "advantages" else (0.0, top)


def paint(color: str, low: float, high: float) -> Callable[[float], tuple[float, ...]]:
    """number -> (r, g, b), pale enough for black letters."""
    import matplotlib

    palette = matplotlib.colormaps[COLORS[color]]

    def rgb(x: float) -> tuple[float, ...]:
        return tuple(0.35 + 0.65 * c for c in palette((x - low) / (high - low))[:3])

    return rgb


def page(groups: list, colors: list[str]) -> str:
    """The HTML: for every question, run and colour a line of tokens; their numbers appear under the
    pointer."""
    lines = [
        "<!doctype html><meta charset='utf-8'><title>tokens</title>",
        "<style>body{font:14px sans-serif;margin:2em;max-width:75em}pre{white-space:pre-wrap;margin:2px 0;font:13px monospace}",
        "td{vertical-align:top;padding:2px 10px 2px 0}.end{font-weight:bold}h3{margin-bottom:2px}</style>",
        "<p>" + "<br>".join(f"<b>{c}</b>: {EXPLAINED[c]}" for c in colors),
    ]
    painters = {color: paint(color, *scale(color, groups)) for color in colors}
    for question, rows in groups:
        lines.append(f"<h3>{html.escape(question)}</h3><table>")
        for name, row in rows.items():
            tokens = row["tokens"]
            for color in colors:
                if color not in tokens:
                    continue
                spans = []
                for i in answer(row):
                    text = html.escape(tokens["text"][i]).replace("\n", "⏎\n") or "·"
                    if not tokens["chosen"][i]:
                        spans.append(f"<span style='color:#888'>{text}</span>")
                        continue
                    numbers = ", ".join(
                        f"{key} {tokens[key][i]:.3f}" for key in COLORS if key in tokens
                    )
                    r, g, b = (round(255 * c) for c in painters[color](tokens[color][i]))
                    spans.append(
                        f"<span title='{numbers}' style='background:rgb({r},{g},{b})'>{text}</span>"
                    )
                lines.append(
                    f"<tr><td>{html.escape(name)}<br>{color}<td><pre>{''.join(spans)}</pre><td class='end'>{ending(row)}"
                )
        lines.append("</table>")
    return "\n".join(lines)


def picture(groups: list, color: str, out: Path) -> None:
    """The PNG: one line for each run under each question, `color` alone, the number under each
    token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rgb = paint(color, *scale(color, groups))
    height = sum(1.3 + 1.05 * len(rows) for _, rows in groups)
    longest = max(
        sum(len(shown(row["tokens"]["text"][i])) + 1 for i in answer(row))
        for _, rows in groups
        for row in rows.values()
    )
    margin, right = 16, 24
    width = min(200, margin + longest + right)
    figure = plt.figure(figsize=(width * 0.092, 0.42 * height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    y = 0.7
    font = {"family": "monospace", "fontsize": 8}
    for question, rows in groups:
        axis.text(
            0.5,
            y,
            shown(question if len(question) < width - 4 else question[: int(width) - 5] + "…"),
            fontsize=9,
            weight="bold",
        )
        y += 0.9
        for name, row in rows.items():
            tokens, x = row["tokens"], margin
            axis.text(0.5, y, shown(name[-margin + 1 :]), va="center", fontsize=8)
            for i in answer(row):
                text = shown(tokens["text"][i])
                if x + len(text) > width - right:
                    axis.text(x, y, "…", va="center", **font)
                    x += 2
                    break
                if tokens["chosen"][i] and color in tokens:
                    box = plt.Rectangle(
                        (x, y - 0.38), len(text) + 0.9, 0.56, color=rgb(tokens[color][i]), lw=0
                    )
                    axis.add_patch(box)
                    axis.text(
                        x + 0.3,
                        y + 0.33,
                        f"{tokens[color][i]:.2f}".lstrip("0"),
                        va="center",
                        fontsize=4.5,
                        color="#555",
                    )
                axis.text(x + 0.4, y - 0.1, text, va="center", **font)
                x += len(text) + 1
            axis.text(
                x + 1,
                y,
                ending(row),
                va="center",
                fontsize=8,
                color="C3" if misjudged(row) else "black",
            )
            y += 1.05
        y += 0.4
    figure.savefig(out, dpi=150)
    plt.close(figure)


def short_names(paths: list[str]) -> list[str]:
    """What differs between the paths: of runs/ppo_baseline__none__1 and runs/vrpo_math__none__1 the
    scripts. Of a single one, or of paths of another form, the last part."""
    parts = [path.replace("/", "__").split("__") for path in paths]
    if len(set(paths)) < 2 or len(set(map(len, parts))) > 1:
        return (
            [Path(path).name for path in paths]
            if len({Path(p).name for p in paths}) == len(paths)
            else paths
        )
    varied = [i for i, words in enumerate(zip(*parts, strict=True)) if len(set(words)) > 1]
    return ["__".join(words[i] for i in varied) for words in parts]


def shown(text: str) -> str:
    """A token in one line, dollars escaped: between two of them matplotlib would set
    mathematics."""
    return text.replace("\n", "⏎").replace("$", r"\$") or "·"


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """run directories, with the same seed if they are to be compared"""
    out: Path = Path("tokens.html")
    """page to write; the picture goes beside it as .png"""
    update: int | None = None
    """update of the samples; default: the last that all runs have"""
    rows: int = 8
    """questions; half of them with a wrong reward, where there are such"""
    color: Literal["values", "advantages", "entropy"] = "values"
    """colour of the picture (the page has all three)"""


def main(args: Args) -> None:
    if not args.runs:
        stop("give at least one run directory")
    names = short_names([str(folder) for folder in args.runs])
    groups = pick(
        {name: read_rows(f) for name, f in zip(names, args.runs, strict=True)},
        args.update,
        args.rows,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(groups, list(COLORS)))
    picture(groups, args.color, args.out.with_suffix(".png"))
    print(f"{args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

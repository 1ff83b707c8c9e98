"""What a critic sees: sampled answers, token by token, coloured by value, advantage or entropy.

    python -m utils.tokens runs/A runs/B --out tokens.html   # the last update that both have
    python -m utils.tokens runs/A --update 20 --rows 3 --color advantages
    python -m utils.tokens runs/A --critic runs/B/checkpoints/000040/critic   # and its values of the same tokens

The page goes to --out, in one file that needs no network; the picture beside it.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import tyro

from utils.args import check_ranges, command
from utils.errors import stop, visible
from utils.files import check_file, writing
from utils.files import read_rows as read_jsonl

COLORS = {"values": "RdYlGn", "advantages": "PuOr", "entropy": "Blues"}
EXPLAINED = {
    "values": "value: the reward that the critic expects",
    "advantages": "advantage, whitened: above 0 the token is made more likely, below 0 less",
    "entropy": "entropy of the policy, in nats",
}
STYLE = """
body { margin: 0 auto; max-width: 1100px; padding: 0 14px 60px; }
body { font: 15px/1.45 system-ui, sans-serif; }
header { position: sticky; top: 0; background: #fff; padding: 10px 0; }
header { border-bottom: 1px solid #ddd; }
label { margin-right: 16px; white-space: nowrap; }
.legend { display: none; }
.bar { height: 14px; max-width: 420px; margin-top: 6px; }
.ends { display: flex; justify-content: space-between; max-width: 420px; font-size: 13px; }
h2 { font-size: 15px; margin: 26px 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.run { display: grid; grid-template-columns: 15em 1fr; gap: 4px 14px; margin: 10px 0; }
.name { overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: 0 8px; border: 1px solid #bbb; border-radius: 11px; }
.verdict.wrong { background: #b3261e; border-color: #b3261e; color: #fff; font-weight: bold; }
.verdict, small { font-size: 13px; }
pre { margin: 0; font: 14px/24px ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { color: #777; }
pre i { font-style: normal; padding: 2px 0; border-right: 1px solid #fff; cursor: default; }
pre i:hover, pre i:focus { outline: 2px solid #222; }
pre i:hover::after, pre i:focus::after {
  content: attr(data-numbers); position: fixed; left: 0; right: 0; bottom: 0;
  padding: 10px 14px; background: #222; color: #fff;
}
@media (max-width: 700px) { .run { grid-template-columns: 1fr; } }
"""


def read_rows(folder: Path) -> dict[int, dict[str, dict]]:
    """{update: {prompt: row of transcripts.jsonl}}, rows with tokens alone; prompts of equal words
    are numbered."""
    try:
        rows = read_jsonl(folder / "transcripts.jsonl")
        for row in rows:
            check_row(row)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
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


def check_row(row: dict) -> None:
    """Raise what a row raises, with tokens or without, that no run has written."""
    str.upper(row["messages"][0]["content"] if row["messages"] else "")
    row["update"] + 0
    if "tokens" in row:
        ending(row)
        tokens = row["tokens"]
        numbers = [tokens[key] for key in ("chosen", "rewards", *COLORS) if key in tokens]
        for text, *numbered in zip(tokens["text"], *numbers, strict=True):
            str.upper(text), [abs(x) for x in numbered]


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
    wrong = [q for q in prompts if any(misjudged(rows[q]) for rows in chosen.values())]
    quiet = [q for q in prompts if q not in wrong]
    mixed = [q for pair in zip_longest(wrong, quiet) for q in pair if q is not None]
    return [(q, {name: rows[q] for name, rows in chosen.items()}) for q in mixed[:count]]


def add_critic(groups: list[tuple[str, dict[str, dict]]], folder: Path) -> None:
    """Below every run's line another one, with a kept critic's values of the same tokens."""
    from utils.models import pick_device  # loads transformers, which a page alone does not need
    from utils.report.values import KeptCritic
    from utils.world.environment import Episode
    from utils.world.problems import Problem

    critic = KeptCritic(folder, pick_device("auto"))
    for _, rows in groups:
        lines = list(rows.items())
        rows.clear()
        for name, row in lines:
            table = row["tokens"]
            try:
                known = [critic.chat.tokenizer.decode(i) for i in table["ids"]] == table["text"]
                problem = Problem("", None, list(row["prompt"]))
            except (LookupError, TypeError, ValueError, OverflowError):
                known = False
            if not known:
                stop(
                    f"--critic {folder}: its tokens are not those of {name} (another tokenizer, or "
                    "transcripts of an older version, without the tokens' numbers)"
                )
            nothing = [0.0] * len(table["ids"])
            said = Episode(problem, table["ids"], table["chosen"], nothing, nothing, nothing)
            (values,) = critic.values([said])
            shown = {key: table[key] for key in ("text", "chosen", "rewards")}
            shown["values"] = [round(value, 4) for value in values]
            rows[name] = row
            rows["--critic" if len(lines) == 1 else f"{name} --critic"] = row | {"tokens": shown}


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
    return f"observed {observed(row):.3g}, truth {clean(row):.3g}"


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
        return tuple(0.45 + 0.55 * c for c in palette((x - low) / (high - low))[:3])

    return rgb


def page(groups: list, colors: list[str]) -> str:
    """The HTML: under every question a line of tokens for each run, and a switch between colours;
    the numbers of the token that is pointed at or touched stand at the bottom."""
    painters = {color: paint(color, *scale(color, groups)) for color in colors}
    style, switches, legends, body = [STYLE], [], [], []
    for color, rgb in painters.items():
        low, high = scale(color, groups)
        stops = ",".join(css(rgb(low + k / 8 * (high - low))) for k in range(9))
        ends = f"<span>{low:.2f}</span>{'<span>0</span>' * (low < 0)}<span>{high:.2f}</span>"
        checked = " checked" * (color == colors[0])
        on = f"body:has(#{color}:checked)"
        style.append(f"{on} pre i {{ background: var(--{color}); }}\n")
        style.append(f"{on} .{color} {{ display: block; }}\n")
        switches.append(f"<label><input type=radio name=color id={color}{checked}> {color}</label>")
        legends.append(
            f"<div class='legend {color}'><div class=bar style='background:linear-gradient(90deg,"
            f"{stops})'></div><div class=ends>{ends}</div>{EXPLAINED[color]}</div>"
        )
    for question, rows in groups:
        body.append(f"<h2>{html.escape(question)}</h2>")
        for name, row in rows.items():
            lacks = [color for color in colors if color not in row["tokens"]]
            body.append(
                f"<div class=run><div class=name><b>{html.escape(name)}</b> "
                f"<span class='verdict{' wrong' * misjudged(row)}'>{ending(row)}</span>"
                + "".join(f"<small class='legend {color}'>no {color}</small>" for color in lacks)
                + f"</div><pre>{line(row, painters)}</pre></div>"
            )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>tokens</title>\n"
        "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
        f"<style>{''.join(style)}</style>\n<header>{''.join(switches + legends)}</header>\n"
        + "\n".join(body)
    )


def line(row: dict, painters: dict) -> str:
    """An answer as HTML: for every token that the policy chose a box in all colours at once; the
    user's words have lines of their own."""
    tokens, parts, speaks = row["tokens"], [], True
    for i in answer(row):
        text = html.escape(tokens["text"][i]).replace("\n", "⏎") or "·"
        if tokens["chosen"][i] != speaks:
            parts.append("\n")
        speaks = tokens["chosen"][i]
        known = [color for color in painters if color in tokens]
        numbers = ", ".join(f"{color} {tokens[color][i]:.3f}" for color in known)
        boxes = ";".join(f"--{color}:{css(painters[color](tokens[color][i]))}" for color in known)
        box = f"<i tabindex=-1 data-numbers='{numbers}' style='{boxes}'>{text}</i>"
        parts.append(box if speaks else f"<span>{text}</span>")
    return "".join(parts)


def css(rgb: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


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
    timeless = [i for i in varied if not all(re.fullmatch(r"\d{8}-\d{6}", p[i]) for p in parts)]
    names = ["__".join(words[i] for i in timeless) for words in parts]
    if len(set(names)) == len(names):
        return names
    return ["__".join(words[i] for i in varied) for words in parts]


def shown(text: str) -> str:
    """A token in one line, dollars escaped: between two of them matplotlib would set
    mathematics."""
    return visible(text.replace("\n", "⏎")).replace("$", r"\$") or "·"


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """run directories, with the same seed if they are to be compared"""
    out: Path = Path("tokens.html")
    """page to write; the picture goes beside it as .png"""
    update: int | None = None
    """update of the samples; default: the last that all runs have"""
    critic: Path | None = None
    """a run's checkpoints/<update>/critic: its values of the same tokens, in lines of their own"""
    rows: int = 8
    """questions; half of them with a wrong reward, where there are such"""
    color: Literal["values", "advantages", "entropy"] = "values"
    """colour of the picture, and the one with which the page opens"""


def main(args: Args) -> None:
    if not args.runs:
        stop("give at least one run directory")
    check_ranges(args)
    check_file("--out", args.out, (".html",))
    check_file("--out", args.out.with_suffix(".png"), (".png",))
    names = short_names([str(folder) for folder in args.runs])
    groups = pick(
        {name: read_rows(f) for name, f in zip(names, args.runs, strict=True)},
        args.update,
        args.rows,
    )
    if args.critic:
        add_critic(groups, args.critic)
    colors = sorted(COLORS, key=lambda color: color != args.color)
    with writing(args.out):
        args.out.write_text(page(groups, colors), encoding="utf-8")
        picture(groups, args.color, args.out.with_suffix(".png"))
    print(f"{args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main(command(Args, "python -m utils.tokens", __doc__))

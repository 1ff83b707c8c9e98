"""What a run shows at its end: a problem, two episodes of its training, the curve, what is next."""

from rich.text import Text

from utils.errors import visible
from utils.files import read_rows
from utils.report.diagnose import sentences
from utils.report.plot import plot_runs
from utils.scale.processes import by_first

HEADLINES = {
    "eval/accuracy": "clean held-out accuracy",
    "eval/average": "held-out mean of TCR, ACR and GCR",
}


@by_first
def finish(run) -> None:
    """Close a run: draw its curves, and print what it has done."""
    run.close()
    picture = plot_runs([run.folder], run.folder / "curves.png")
    held_out_problem(run)
    training_episodes(run)
    for key, name in HEADLINES.items():
        curve = {int(row["update"]): float(row[key]) for row in run.rows if key in row}
        if curve:
            print_curve(run, name, curve)
    run.print(f"diagnosis: {sentences(run.folder)}\n")
    run.print(f"curves: {picture}. Go on with", soft_wrap=True)
    script = f"{run.flags['script']}.py"
    child = "vrpo_math.py" if script == "ppo_baseline.py" else script  # PPO's own is not a diff
    parent = "vrpo_math.py" if script == "vrpo_dialogue.py" else "ppo_baseline.py"
    for command, what in (
        (f"python -m utils.tokens {run.folder}", "every token by value, advantage, entropy"),
        (f"python -m utils.plot {run.folder} runs/OTHER", "its curves beside another run's"),
        (f"diff {parent} {child}", "what the method changes"),
    ):
        run.print(Text(f"  {command}  ").append(f"# {what}", style="dim"), soft_wrap=True)


def held_out_problem(run) -> None:
    """A problem that was wrong at the start and is right now, else the first one, with both
    answers."""
    rows = read_rows(run.folder / "samples.jsonl")
    if not rows:  # moved away between two --resume
        return
    first = [row for row in rows if row["update"] == rows[0]["update"]]
    last = [row for row in rows if row["update"] == rows[-1]["update"]]
    pairs = list(zip(first, last, strict=False))
    before, after = next((p for p in pairs if p[0]["right"] < p[1]["right"]), pairs[0])
    asked, said = list(after)[1:3]  # question and completion, or goal and dialogue
    run.print("\nA held-out problem", style="bold")
    run.print(f"  {after[asked]}")
    for name, row in (("at the start", before), ("now", after)):
        verdict = "right" if row["right"] else "wrong"
        said_so = visible(indented(row[said]))
        run.print(Text(f"  {name}, {verdict}: ").append(said_so, style="cyan"))


def training_episodes(run) -> None:
    """Two episodes of the last transcripts, one of them misjudged if there is such a one."""
    rows = read_rows(run.folder / "transcripts.jsonl")
    if not rows:
        return
    rows = [row for row in rows if row["update"] == rows[-1]["update"]]
    for row in rows:
        row["observed"] = sum(row["tokens"]["rewards"])
        row["truth"] = row["outcome"].get("accuracy", row["outcome"].get("average"))
        row["flipped"] = (row["observed"] > 0.5) != (row["truth"] > 0.5)
    chosen = [next((row for row in rows if row["flipped"] == flipped), None) for flipped in (0, 1)]
    run.print(
        Text("\nTraining episodes", style="bold").append(" of the last update", style="not bold")
    )
    for row in filter(None, chosen):
        answer = visible(indented(row["messages"][-1]["content"]))
        verdict = f"observed {row['observed']:.2g}, truth {row['truth']:.2g}"
        verdict = Text(verdict, style="bold red" if row["flipped"] else "green")
        run.print(Text("  ").append(verdict).append(f": {answer}"))


def print_curve(run, name: str, curve: dict[int, float]) -> None:
    """One bar for each evaluation, ten at most."""
    values = list(curve.values())
    run.print(f"\n{name}", style="bold")
    bar = "=" if run.console.options.ascii_only else "━"
    every = -(-len(curve) // 10)
    for i, (update, value) in enumerate(curve.items()):
        if i % every == 0 or i == len(curve) - 1:
            shown = Text(f"  update {update:>4}  {value:.3f} ")
            run.print(shown.append(bar * round(40 * value), style="cyan"))
    run.print(f"  start {values[0]:.3f}, last {values[-1]:.3f}, peak {max(values):.3f}")


def indented(text: str) -> str:
    return text.replace("\n", "\n    ")

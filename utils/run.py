"""A run's directory and everything that is written to it or shown of it: flags, metrics, samples,
progress, W&B."""

import atexit
import csv
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from utils.errors import stop
from utils.report.diagnose import sentences
from utils.report.plot import plot_runs
from utils.world.tasks import DEFAULTS

ArgsType = TypeVar("ArgsType")
MAY_BE_ZERO = ("seed", "critic_warmup", "bottleneck_layers", "lora_rank", "samples")
SHARES = (
    "noise_rate", "false_negative_rate", "false_positive_rate", "assumed_false_negative_rate", "assumed_false_positive_rate",
    "gamma", "gae_lambda", "critic_lambda", "token_ratio", "contamination", "label_noise", "length_bias",
)  # fmt: skip
# a curvature needs three quantiles, the Huber loss is divided by kappa, and tails do not overlap
LIMITS = {
    "quantiles": (3, float("inf")),
    "huber_kappa": (0.001, float("inf")),
    "tail_share": (0, 0.5),
}
HEADLINES = {
    "eval/accuracy": "clean held-out accuracy",
    "eval/average": "held-out mean of TCR, ACR and GCR",
}
SHOWN = {
    "eval/accuracy": "acc {:.3f}",
    "eval/average": "avg {:.3f}",
    "reward/clean": "clean {:.2f}",
    "reward/observed": "observed {:.2f}",
    "critic/explained_variance_clean": "ev {:+.2f}",
}


@dataclasses.dataclass
class TaskFlag:
    task: str | None = None


def parse_args(cls: type[ArgsType], description: str | None) -> ArgsType:
    """The command line as `cls`. The task's own defaults hold, or with --resume the run's saved
    flags; flags given now override them."""
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    task = (
        tyro.cli(TaskFlag, args=words, return_unknown_args=True, add_help=False)[0].task or cls.task
    )
    if task not in DEFAULTS:  # for the parser to say
        task = cls.task
    args = tyro.cli(
        cls,
        default=dataclasses.replace(cls(), task=task, **DEFAULTS[task]),
        description=description,
    )
    if args.resume is None:
        return args
    try:
        saved = json.loads((args.resume / "args.json").read_text())
    except (OSError, ValueError):
        stop(
            f"--resume {args.resume}: no readable args.json there (give a run directory such as runs/<name>)"
        )
    if saved.pop("script") != Path(sys.argv[0]).stem:
        stop(f"--resume {args.resume}: that run was made by another script")
    saved = {f.name: saved[f.name] for f in dataclasses.fields(cls) if f.name in saved}
    saved |= {
        f.name: Path(saved[f.name])
        for f in dataclasses.fields(cls)
        if f.name in saved and f.type is Path
    }
    return dataclasses.replace(tyro.cli(cls, default=cls(**saved)), resume=args.resume)


def check_ranges(args: Any) -> None:
    """Refuse numbers out of range with one sentence that names the flag: counts start at 1, shares
    end at 1, nothing is negative."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_count = (
            isinstance(value, int)
            and type(args).__annotations__[name] is not float
            and name not in MAY_BE_ZERO
        )
        low, high = LIMITS.get(name, (int(is_count), 1 if name in SHARES else float("inf")))
        if not low <= value <= high:
            limits = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
            stop(f"--{name.replace('_', '-')} {value}: must be {limits}")
    if args.temperature == 0:
        stop("--temperature 0: must be above 0 (evaluation is greedy whatever it is)")


def check_flags(args: Any) -> None:
    """`check_ranges` of a script's flags, and what must not be combined."""
    check_ranges(args)
    if args.reward_per == "turn" and not args.reward_model:
        stop("--reward-per turn: only a reward model judges turns; give --reward-model")
    if args.noise == "majority-vote" and (args.task == "dialogue" or args.reward_model):
        stop(
            "--noise majority-vote: votes are on final answers, which neither dialogues nor --reward-model have"
        )


class Run:
    """`runs/<name>/` with args.json, metrics.csv, samples.jsonl and checkpoints/; a progress bar;
    W&B behind --track.

    `Run(args)` starts a fresh directory. With --resume it reopens one; `rewind(update)` then
    forgets what was written after that update."""

    def __init__(self, args: Any):
        script = Path(sys.argv[0]).stem
        name = (
            args.run_name
            or f"{script}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        )
        self.folder = args.resume or Path("runs") / name
        if args.resume is None and (self.folder / "args.json").exists():
            stop(
                f"--run-name {name}: {self.folder} exists; continue it with --resume {self.folder} or choose another name"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "resume"
        }
        write_atomically(
            self.folder / "args.json", json.dumps({"script": script, **flags}, indent=1)
        )
        self.rows: list[dict[str, Any]] = []
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self.bar = self.progress.add_task("", total=args.updates)
        self.shown: dict[str, float] = {}
        self.interrupt: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(
                project=args.wandb_project,
                name=self.folder.name,
                config=flags,
                dir=str(self.folder),
            )
        self.progress.start()
        atexit.register(
            self.stop_progress
        )  # whatever ends the run, the terminal gets its cursor back

    def request_stop(self, number: int, _frame: Any) -> None:
        """The first SIGTERM or Ctrl-C lets the update finish; a second one leaves at once."""
        if self.interrupt is not None:
            raise KeyboardInterrupt
        self.interrupt = number
        self.print(
            f"{signal.Signals(number).name}: this update will finish and be saved (once more to leave at once)"
        )

    def leave(self, number: int, update: int) -> NoReturn:
        """After a saved update: leave with a clear line, as signal `number` has asked."""
        self.close()
        self.print(f"stopped after update {update}, saved; continue with --resume {self.folder}")
        sys.exit(128 + number)

    def rewind(self, update: int) -> None:
        """Forget rows and samples of later updates, and with 0 those of the start too: a resumed
        run writes them anew."""
        update = update or -1
        metrics = self.folder / "metrics.csv"
        if metrics.exists():
            with metrics.open(newline="") as file:
                rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if int(row["update"]) <= update]
        for file in (self.folder / "samples.jsonl", self.folder / "transcripts.jsonl"):
            if file.exists():
                lines = [
                    line
                    for line in file.read_text().splitlines(keepends=True)
                    if line.endswith("\n")
                ]
                write_atomically(
                    file, "".join(line for line in lines if json.loads(line)["update"] <= update)
                )

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Add a row to metrics.csv and to W&B, and move the progress bar. NaN becomes an empty
        cell."""
        metrics = {key: value for key, value in metrics.items() if value == value}
        self.rows.append({"update": update, **metrics})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (self.folder / "metrics.tmp").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(self.folder / "metrics.tmp", self.folder / "metrics.csv")
        self.shown |= metrics
        text = "  ".join(
            form.format(self.shown[key]) for key, form in SHOWN.items() if key in self.shown
        )
        self.progress.update(self.bar, completed=update, description=text)
        if self.wandb:
            self.wandb.log(metrics, step=update)

    def samples(self, update: int, rows: list[dict[str, Any]], table: int = 2) -> None:
        """Append held-out completions to samples.jsonl and show the first few as a table."""
        with (self.folder / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps({"update": update, **row}) + "\n" for row in rows)
        view = Table(
            title=f"held-out completions after update {update}",
            title_justify="left",
            show_lines=True,
        )
        for column in rows[0]:
            view.add_column(column)
        for row in rows[:table]:
            view.add_row(*(Text(str(value)) for value in row.values()))
        self.print(view)

    def transcripts(self, update: int, rows: list[dict[str, Any]]) -> None:
        """Append sampled episodes, with rewards and values, to transcripts.jsonl (`python -m
        utils.tokens` shows them)."""
        with (self.folder / "transcripts.jsonl").open("a") as file:
            file.writelines(json.dumps({"update": update, **row}) + "\n" for row in rows)

    def doing(self, what: str) -> None:
        """Show beside the progress bar what is going on."""
        self.progress.update(self.bar, description=what)

    def print(self, message: Any) -> None:
        self.console.print(message)

    def finish(self) -> None:
        """Draw the run's curves and print the line to remember."""
        self.close()
        self.print(f"curves: {plot_runs([self.folder], self.folder / 'curves.png')}")
        for key, name in HEADLINES.items():
            if curve := [float(row[key]) for row in self.rows if key in row]:
                self.print(
                    f"{name}: start {curve[0]:.3f}, last {curve[-1]:.3f}, peak {max(curve):.3f}"
                )
        self.print(f"diagnosis: {sentences(self.folder)}")

    def stop_progress(self) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def close(self) -> None:
        self.stop_progress()
        if self.wandb:
            self.wandb.finish()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator on a GPU, else of the whole process (resident
    set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )

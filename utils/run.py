"""A run's directory and all that is written to it: flags, metrics, samples, checkpoints; also its
progress bar, W&B, and how it leaves."""

import atexit
import csv
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from utils import ranks
from utils.checkpoints import load_checkpoint, restore_critic, restore_policy, save_checkpoint
from utils.errors import stop
from utils.ranks import RANK, by_first, from_first

SHOWN = {
    "eval/accuracy": "acc {:.3f}",
    "eval/average": "avg {:.3f}",
    "reward/clean": "clean {:.2f}",
    "reward/observed": "observed {:.2f}",
    "critic/explained_variance_clean": "ev {:+.2f}",
}


class Run:
    """`runs/<name>/` with args.json, metrics.csv, samples.jsonl, transcripts.jsonl and checkpoints/;
    a progress bar; W&B behind --track. With --resume an earlier directory is reopened."""

    def __init__(self, args: Any):
        self.args, script = args, Path(sys.argv[0]).stem
        default = f"{script}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        name = from_first(lambda: args.run_name or default)
        self.folder = args.resume or Path("runs") / name
        taken = from_first(lambda: (self.folder / "args.json").exists())
        if args.resume is None and taken:
            stop(
                f"--run-name {name}: {self.folder} exists; continue it with --resume "
                f"{self.folder} or choose another name"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        del flags["resume"]
        saved = json.dumps({"script": script, **flags}, indent=1)
        by_first(write_atomically)(self.folder / "args.json", saved)
        self.rows: list[dict[str, Any]] = []
        self.shown: dict[str, float] = {}
        self.asked_to_stop: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        self.wandb = None
        if args.track and RANK == 0:
            import wandb

            names = {"project": args.wandb_project, "name": self.folder.name}
            self.wandb = wandb.init(**names, config=flags, dir=str(self.folder))
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
        by_first(self.progress.start)()
        # whatever ends the run, the terminal gets its cursor back
        atexit.register(self.stop_progress)

    # ---- files ----

    @by_first
    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Add a row to metrics.csv and to W&B, and move the progress bar. NaN becomes an empty
        cell."""
        metrics = {key: value for key, value in metrics.items() if value == value}
        self.rows.append({"update": update, **metrics})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        temporary = self.folder / "metrics.tmp"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.folder / "metrics.csv")
        self.shown |= metrics
        shown = [form.format(self.shown[key]) for key, form in SHOWN.items() if key in self.shown]
        self.progress.update(self.bar, completed=update, description="  ".join(shown))
        if self.wandb:
            self.wandb.log(metrics, step=update)

    def samples(self, update: int, rows: list[dict[str, Any]]) -> None:
        """Append held-out completions to samples.jsonl."""
        self.append("samples.jsonl", update, rows)

    def transcripts(self, update: int, rows: list[dict[str, Any]]) -> None:
        """Append training episodes to transcripts.jsonl (`python -m utils.tokens` shows them)."""
        self.append("transcripts.jsonl", update, rows)

    @by_first
    def append(self, name: str, update: int, rows: list[dict[str, Any]]) -> None:
        with (self.folder / name).open("a") as file:
            file.writelines(json.dumps({"update": update, **row}) + "\n" for row in rows)

    # ---- checkpoints ----

    def restore(self, policy, critic, optimizer: torch.optim.Optimizer, env) -> int:
        """With --resume, weights, optimizer and reward scale of the newest checkpoint. Returns its
        update, 0 for a fresh run. `critic` is None where there is none."""
        start, folder, state = load_checkpoint(self.args.resume, policy.device, self.print)
        if start:
            restore_policy(policy, folder, state)
            if critic is not None:
                restore_critic(critic, state)
            optimizer.load_state_dict(state["optimizer"])
            env.scale = state["scale"].get(self.args.reward_model)
        self.rewind(start)
        return start

    @by_first
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
                lines = file.read_text().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["update"] <= update]
                write_atomically(file, "".join(kept))

    def checkpoint(self, update: int, policy, critic, optimizer, env) -> None:
        """Save every --save-every updates, at the end, and where a signal asks to leave: then
        leave."""
        last = update == self.args.updates
        leaving = max(ranks.gather(self.asked_to_stop), key=lambda number: number or 0)
        if update % self.args.save_every == 0 or last or leaving:
            state = {"critic": critic} if critic is not None else {}
            state["optimizer"] = optimizer.state_dict()
            state["scale"] = {self.args.reward_model: env.scale}
            ranks.check_equal(policy, critic)
            save_checkpoint(self.folder, update, policy, env.chat.tokenizer, state)
        if leaving and not last:
            self.leave(leaving, update)

    # ---- leaving ----

    def request_stop(self, number: int, _frame: Any) -> None:
        """The first SIGTERM or Ctrl-C lets the update finish; a second one leaves at once."""
        if self.asked_to_stop is not None:
            raise KeyboardInterrupt
        self.asked_to_stop = number
        self.print(
            f"{signal.Signals(number).name}: this update will finish and be saved "
            "(once more to leave at once)"
        )

    def leave(self, number: int, update: int) -> NoReturn:
        """After a saved update: leave with a clear line, as signal `number` has asked."""
        self.close()
        self.print(f"stopped after update {update}, saved; continue with --resume {self.folder}")
        sys.exit(128 + number)

    def close(self) -> None:
        self.stop_progress()
        if self.wandb:
            self.wandb.finish()

    # ---- the terminal ----

    @by_first
    def doing(self, what: str) -> None:
        """Show beside the progress bar what is going on."""
        self.progress.update(self.bar, description=what)

    @by_first
    def print(self, message: Any, **options) -> None:
        self.console.print(message, **options)

    @by_first
    def stop_progress(self) -> None:
        if self.progress.live.is_started:
            self.progress.stop()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""A run's directory and all that is written to it: flags, metrics, samples, checkpoints; also its
progress bar, its tracker, and how it leaves."""

import atexit
import csv
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from utils.card import model_card
from utils.checkpoints import load_checkpoint, restore, save_checkpoint
from utils.errors import first_line, leave, silence, stop, visible
from utils.files import claim, make_folder, read_metrics, read_rows, write_atomically, writing
from utils.scale import processes
from utils.scale.processes import by_first, from_first

SHOWN = {
    "eval/accuracy": "acc {:.3f}",
    "eval/average": "avg {:.3f}",
    "reward/clean": "clean {:.2f}",
    "reward/observed": "observed {:.2f}",
    "critic/explained_variance_clean": "ev {:+.2f}",
}


class Screen(Console):
    """A terminal whose reader may leave and whose disk may be full: the run goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence()


class Run:
    """`runs/<name>/` with args.json, metrics.csv, samples.jsonl, transcripts.jsonl and checkpoints/;
    a progress bar; a tracker behind --track. With --resume an earlier directory is reopened."""

    def __init__(self, args: Any):
        self.args, script = args, Path(sys.argv[0]).stem
        default = f"{script}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        name = from_first(lambda: args.run_name or default)
        self.folder = args.resume or Path("runs") / check_name(name)
        self.advice = f"; what was saved is whole, and --resume {self.folder} goes on from it"
        make_folder("--resume" if args.resume else "--run-name", self.folder)
        self.lock = by_first(claim)(self.folder)
        taken = from_first(lambda: (self.folder / "args.json").exists())
        if args.resume is None and taken:
            stop(
                f"--run-name {name}: {self.folder} exists; continue it with --resume "
                f"{self.folder} or choose another name"
            )
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        del flags["resume"]
        self.flags = {"script": script, **flags}
        self.tracker = by_first(start_tracker)(args, self.folder, flags)
        self.rows: list[dict[str, Any]] = []
        self.shown: dict[str, float] = {}
        self.interrupt: int | None = None
        self.asked = -math.inf  # when
        self.handlers = {
            number: signal.signal(number, self.request_stop)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        self.console = Screen(highlight=False, markup=False, emoji=False)
        self.progress = Progress(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.description}", markup=False),
            console=self.console,
        )
        self.bar = self.progress.add_task("", total=args.updates)
        by_first(self.progress.start)()
        # whatever ends the run, the terminal gets its cursor back
        atexit.register(self.stop_progress)

    # ---- files ----

    @by_first
    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Add a row to metrics.csv and to the tracker, and move the progress bar. NaN becomes an empty
        cell; to the update's episodes those before are added."""
        metrics = {key: value for key, value in metrics.items() if value == value}
        if self.rows:
            metrics["charts/episodes"] += int(float(self.rows[-1]["charts/episodes"]))
        self.rows.append({"update": update, **metrics})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        temporary = self.folder / "metrics.tmp"
        with writing(temporary, self.advice):
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(temporary, self.folder / "metrics.csv")
        self.shown |= metrics
        shown = [form.format(self.shown[key]) for key, form in SHOWN.items() if key in self.shown]
        self.progress.update(self.bar, completed=update, description="  ".join(shown))
        if self.tracker:
            self.tracker.log(metrics, step=update)

    def samples(self, update: int, rows: list[dict[str, Any]]) -> None:
        """Append held-out completions to samples.jsonl."""
        self.append("samples.jsonl", update, rows)

    def transcripts(self, update: int, rows: list[dict[str, Any]]) -> None:
        """Append training episodes to transcripts.jsonl (`python -m utils.tokens` shows them)."""
        self.append("transcripts.jsonl", update, rows)

    @by_first
    def append(self, name: str, update: int, rows: list[dict[str, Any]]) -> None:
        with writing(self.folder / name, self.advice), (self.folder / name).open("a") as file:
            file.writelines(json.dumps({"update": update, **row}) + "\n" for row in rows)

    # ---- checkpoints ----

    def restore(self, policy, critic, optimizer: torch.optim.Optimizer, env) -> int:
        """With --resume, weights, optimizer and reward scale of the newest checkpoint. Returns its
        update, 0 for a fresh run. `critic` is None where there is none."""
        start, folder, state = load_checkpoint(self.args.resume, self.print)
        if start > self.args.updates:
            stop(f"--updates {self.args.updates}: {self.folder} is at update {start} already")
        if start:
            scales, problems = restore(folder, state, policy, critic, optimizer)
            env.scale, env.begun = scales.get(self.args.reward_model), (start, problems)
        if self.args.resume:
            self.rewind(start)
        self.update = self.saved = start
        env.save = lambda: self.save(policy, critic, optimizer, env)
        self.save_flags()  # now that nothing can be refused any more
        return start

    @by_first
    def save_flags(self) -> None:
        with writing(self.folder / "args.json"):
            write_atomically(self.folder / "args.json", json.dumps(self.flags, indent=1))

    @by_first
    def rewind(self, update: int) -> None:
        """Forget rows and samples of later updates, and with 0 those of the start too: a resumed
        run writes them anew."""
        update = update or -1
        kept = {}
        for name in ("metrics.csv", "samples.jsonl", "transcripts.jsonl"):
            try:
                read = read_metrics if name == "metrics.csv" else read_rows
                rows = read(self.folder / name) if (self.folder / name).exists() else []
                kept[name] = [row for row in rows if int(row["update"]) <= update]
            except (OSError, ValueError, KeyError, TypeError) as error:
                stop(
                    f"--resume {self.folder}: {name} is damaged ({first_line(error)}); mend it, or "
                    "move it away to go on without its rows"
                )
        self.rows = kept.pop("metrics.csv")
        for name, rows in kept.items():
            with writing(self.folder / name):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_atomically(self.folder / name, text)

    def checkpoint(self, update: int, policy, critic, optimizer, env) -> None:
        """Save every --save-every updates, at the end, and where a signal asks to leave: then
        leave."""
        self.update, last = update, update == self.args.updates
        leaving = self.asked_to_leave()
        if update % self.args.save_every == 0 or last or leaving:
            self.save(policy, critic, optimizer, env)
        if leaving and not last:
            self.leave(f"after update {update}")

    def save(self, policy, critic, optimizer, env) -> None:
        """A checkpoint of the last update that is whole, unless there is one."""
        update = self.update
        if update == self.saved:
            return
        state = {"optimizer": optimizer.state_dict()}
        state |= {"scale": {self.args.reward_model: env.scale}, "problems": env.drawn(update)}
        processes.check_equal(policy, critic)
        card = model_card(self.args, self.folder.name, update, self.rows, len(env.held_out))
        models = (policy, critic, env.chat.tokenizer)
        save_checkpoint(self.folder, update, *models, state, self.flags, card)
        self.saved = update

    # ---- leaving ----

    def asked_to_leave(self) -> bool:
        """Whether any of the processes has had a signal; all of them ask."""
        self.interrupt = max(processes.gather(self.interrupt), key=lambda number: number or 0)
        return self.interrupt is not None

    def request_stop(self, number: int, _frame: Any) -> None:
        """The first SIGTERM or Ctrl-C lets the update finish; a second one leaves at once."""
        now = time.monotonic()
        if processes.RANKS > 1 and now - self.asked < 5:
            return  # torchrun passes on what a scheduler has sent to its processes as well
        if self.interrupt is not None:
            leave(number)
        self.interrupt, self.asked = number, now
        self.print(
            f"{signal.Signals(number).name}: this update will finish and be saved "
            "(once more to leave at once)"
        )

    def leave(self, when: str) -> NoReturn:
        """Leave with a clear line, as a signal has asked, `when` everything is saved; all processes
        together, as torchrun ends the others with the first that leaves."""
        self.close()
        self.print(f"stopped {when}, saved; continue with --resume {self.folder}")
        processes.gather(None)
        if processes.RANKS > 1:  # threads of the network can abort an interpreter that ends
            sys.stdout.flush()
            os._exit(128 + self.interrupt)
        sys.exit(128 + self.interrupt)

    def close(self) -> None:
        self.stop_progress()
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.tracker:
            self.tracker.finish()
        if self.lock:
            self.lock.close()

    # ---- the terminal ----

    def doing(self, what: str) -> None:
        """Show beside the progress bar what is going on, whatever went before being saved: where a
        signal asks to leave, leave."""
        if self.asked_to_leave():
            self.leave("before the first update")
        by_first(self.progress.update)(self.bar, description=what)

    @by_first
    def print(self, message: Any = "", **options) -> None:
        """Show a text, or something else that rich can show."""
        message = visible(message) if isinstance(message, str) else message
        self.show(lambda: self.console.print(message, **options))

    @by_first
    def stop_progress(self) -> None:
        if self.progress.live.is_started:
            self.show(self.progress.stop)

    def show(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError:
            self.console.on_broken_pipe()


def check_name(name: str) -> str:
    """A run's name; stops where it would lead out of runs/."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or not name.isprintable():
        stop(f"--run-name {name!r}: give the name of a folder below runs/, such as vrpo-1")
    return name


def start_tracker(args: Any, folder: Path, flags: dict[str, Any]) -> Any:
    """A run of wandb, or of trackio, whose calls are the same; None for --track none."""
    if args.track == "none":
        return None
    names = {"project": "vrpo", "name": folder.name, "config": flags, "resume": "allow"}
    begun = sorted((folder / "wandb").glob("*run-*-*"))  # its folders end in the run's id
    own = {
        "wandb": {"dir": str(folder), "id": begun[-1].name.rsplit("-", 1)[1] if begun else None},
        "trackio": {"embed": False},
    }
    advice = {
        "wandb": "WANDB_MODE=offline needs neither account nor network",
        "trackio": "without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL it needs no network",
    }
    try:
        return importlib.import_module(args.track).init(**names, **own[args.track])
    except ImportError as error:
        stop(f"--track {args.track}: {error} (pip install {args.track})")
    except Exception as error:  # no key, no network, a bad mode: it has a class for each
        reason = " ".join(str(error).split())[:300]
        stop(f"--track {args.track}: it did not start ({reason}); {advice[args.track]}")

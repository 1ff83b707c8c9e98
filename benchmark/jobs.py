"""What a row of the results was asked for, and the workers that make rows, for run.py and the
studies."""

import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from utils.args import DEFAULTS
from utils.errors import stop
from utils.files import write_atomically
from utils.recipe import derive

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
CONSOLE = Console(stderr=True)

# ==== What was asked ==============================================================================

PLACES = ("model", "dataset", "reward_model")
# Recipes that were flags of the scripts when the first rows were made, and what a digest counts for
# them: the flag that is no more. Those with {} still have it.
WERE_FLAGS: dict[str, dict[str, str]] = {
    "bottleneck_layers": {},
    "critic_reads": {"critic_reads": "solution"},
    "critic_warmup": {},
    "kl_in_loss": {"kl_in": "loss"},
    "learned_lm_head": {"lm_head": "learned"},
    "linear_schedule": {"lr_schedule": "linear"},
    "shared_backbone": {"critic_backbone": "shared"},
    "value_clip": {},
}


@cache
def module_of(script: str, recipes: tuple[str, ...] = ()) -> ModuleType:
    """A script, or what recipes make of it, as a module."""
    if not recipes:
        return importlib.import_module(script)
    module = ModuleType(script)
    exec(compile(derive(f"{script}.py", recipes), f"{script}.py", "exec"), vars(module))
    return module


def all_flags(script: str, flags: dict, recipes: tuple[str, ...] = ()) -> dict[str, str]:
    """All flags of a run as words, the defaults too; models and data by their names, wherever they
    lie."""
    module = module_of(script, recipes)
    task = flags.get("task", module.Args.task)
    args = vars(module.Args(**DEFAULTS[task] | {"task": task} | flags))
    return {k: str(Path(v).name if v and k in PLACES else v) for k, v in args.items()}


def recorded() -> dict[str, dict[str, str]]:
    """The defaults that digests are counted from, by script and task."""
    file = RESULTS / "defaults.json"
    return json.loads(file.read_text()) if file.exists() else {}


@cache
def digest(script: str, flags: tuple, *more, recipes: tuple[str, ...] = ()) -> str:
    """Of script, task, `more`, recipes with their flags, and the flags that differ from the recorded
    defaults, given or not. So a changed default makes another run, unless the flag was given; a new
    flag, which nobody has recorded, makes another run only where it differs from its own
    default."""
    now = all_flags(script, dict(flags), recipes)
    name = f"{script} {now['task']}"
    defaults = all_flags(script, {"task": now["task"]}) | recorded().get(name, {})
    differing = {key: value for key, value in now.items() if value != defaults.get(key)}
    for recipe in recipes:
        differing |= WERE_FLAGS.get(recipe, {f"recipe {recipe}": "applied"})
    words = json.dumps([name, differing, *more], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:10]


def record(runs: Iterable[tuple[str, str]]) -> None:
    """Add to the recorded defaults those of flags that are new; `runs` are scripts and tasks."""
    known = recorded()
    new = {f"{script} {task}": all_flags(script, {"task": task}) for script, task in runs}
    both = {name: new.get(name, {}) | known.get(name, {}) for name in sorted(new.keys() | known)}
    if both != known:
        lines = [f"{json.dumps(name)}: {json.dumps(flags)}" for name, flags in both.items()]
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULTS / "defaults.json", "{\n" + ",\n".join(lines) + "\n}\n")


# ==== Workers =====================================================================================

# Processes are forked from one that has imported what every job needs, which takes five seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["__main__", "vrpo_math", "transformers.models.llama.modeling_llama", "datasets", "pandas"]
)
LEAVE = (signal.SIGTERM, signal.SIGHUP)


class Task(NamedTuple):
    name: str
    call: tuple
    """a function and its arguments, called in a process of its own"""
    log: Path
    """for what it prints"""
    rows: Callable[[], list[dict]]
    """what it has left on disk; nothing while it has not finished"""
    save: Callable[[list[dict]], None]


def claim(folder: Path) -> TextIO:
    """The open lock of a folder. It is shared with the processes at work there, so that what they
    do is safe even when this one is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else has it
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        stop(f"another command, or a run that it left behind, is busy in {folder}")
    return lock


def work(folder: Path, log: Path, function: Callable, *arguments) -> None:
    """Body of a process: the call, on one thread, its output in `log`."""
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.setsid()  # Ctrl-C in the terminal is for the command alone, which passes it on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEAVE)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    function(*arguments)


def make(tasks: Iterable[Task], folder: Path, workers: int) -> list[str]:
    """Do all tasks, so many at a time, and save the rows of each as it ends; those whose rows are
    on disk are not done again. Returns a line for each that failed. Ctrl-C and SIGTERM reach the
    tasks at work as SIGTERM: a script finishes its update, saves and leaves. The folder is claimed
    before the tasks are asked for."""
    lock, guard, failed = claim(folder), threading.Lock(), []
    tasks = list(tasks)
    running: set[BaseProcess] = set()
    leaving = threading.Event()

    def rows_of(task: Task) -> list[dict]:
        if rows := task.rows():
            return rows
        with guard:
            if leaving.is_set():
                return []
            task.log.unlink(missing_ok=True)
            process = FORKS.Process(target=work, args=(folder, task.log, *task.call))
            process.start()
            running.add(process)
        process.join()
        running.discard(process)
        rows = task.rows()
        if not rows and not leaving.is_set():
            said = task.log.read_text().strip().splitlines() if task.log.exists() else []
            last = said[-1] if said else "nothing said"
            raise RuntimeError(f"{last} (exit code {process.exitcode}, {task.log})")
        return rows

    for number in LEAVE:
        signal.signal(number, signal.default_int_handler)
    # The fork server must outlive a signal to the whole group, or nobody could wait for its
    # children: it is started by a thread that blocks these signals, which is inherited.
    pool = ThreadPoolExecutor(workers, "", signal.pthread_sigmask, (signal.SIG_BLOCK, LEAVE))
    progress = Progress(
        MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=CONSOLE, speed_estimate_period=8 * 3600,
    )  # fmt: skip
    with lock, progress, pool:
        bar = progress.add_task("", total=len(tasks))
        try:
            futures = {pool.submit(rows_of, task): task for task in tasks}
            for future in as_completed(futures):
                task, error = futures[future], future.exception()
                progress.advance(bar)
                if error:
                    failed.append(f"{task.name}: {error}")
                    CONSOLE.print(failed[-1])
                else:
                    task.save(future.result())
        except KeyboardInterrupt:
            stop("stopped; the same command goes on from here")
        finally:  # whatever happened, nothing new starts, and what is at work is told to leave
            if running:
                CONSOLE.print("the runs under way finish their update and save it")
            pool.shutdown(wait=False, cancel_futures=True)
            leaving.set()
            with guard:
                for process in list(running):
                    process.terminate()
    return failed

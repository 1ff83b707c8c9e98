"""Files of a run: written whole or not at all, asked for before the work, read though damaged."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from utils.errors import stop

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None

# ---- writing ----


@contextlib.contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Stop with one sentence where what is done inside cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        stop(f"{path}: could not be written ({reason}){advice}")


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_folder(flag: str, folder: Path) -> None:
    """The folder, made where it is missing. Stops unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("Permission denied, or a read-only disk")
    except OSError as error:
        stop(f"{flag}: {folder} is no folder that can be written ({error.strerror or error})")


def check_file(flag: str, file: Path, endings: tuple[str, ...]) -> None:
    """Stop unless a file of one of these kinds can be written there; its folder is made."""
    if file.suffix.lower() not in endings:
        stop(f"{flag} {file}: give a name that ends in {' or '.join(endings)}")
    make_folder(flag, file.parent)
    try:
        if file.is_dir() or (file.exists() and not os.access(file, os.W_OK)):
            raise PermissionError("a folder, or not yours")
    except OSError as error:
        stop(f"{flag} {file}: no file can be written there ({error.strerror or error})")


def claim(folder: Path) -> TextIO:
    """The open lock of a run's folder: while it is open no other process works there. The system
    frees it whatever ends this one."""
    lock = (folder / ".lock").open("w")
    if fcntl is None:
        return lock
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stop(f"{folder}: another process is at work there; wait for it or choose another name")
    except OSError:  # a file system without locks
        pass
    return lock


# ---- reading: OSError or ValueError, a reason in words, where a file is not what it should be ----


def read_flags(run: Path) -> dict[str, Any]:
    """What args.json says of a run, given by it or by its folder: its flags and its script."""
    file = run if run.is_file() else run / "args.json"
    flags = parse(file.read_text(encoding="utf-8"))
    if not isinstance(flags.get("script"), str):
        raise ValueError("args.json names no script")
    return flags


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, but for a last one that was cut off."""
    *lines, last = file.read_text(encoding="utf-8").split("\n")
    rows = [parse(line) for line in lines]
    with contextlib.suppress(ValueError):
        rows.append(parse(last))
    return rows


def read_metrics(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv as text, without empty cells."""
    with file.open(newline="", encoding="utf-8") as text:
        try:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(text)]
        except csv.Error as error:
            raise ValueError(f"{file.name}: {error}") from error
    for row in rows:
        if None in row or not {"update", "charts/episodes"} <= row.keys():
            raise ValueError(f"{file.name}: a row is cut or too long")
        numbers = {key: float(value) for key, value in row.items()}
        if not (math.isfinite(numbers["charts/episodes"]) and int(row["update"]) >= 0):
            raise ValueError(f"{file.name}: update or episodes are no counts")
    if rows and not file.read_bytes().endswith(b"\n"):
        raise ValueError(f"{file.name}: its last row is cut")
    return rows


def parse(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("a JSON object is wanted")
    return found

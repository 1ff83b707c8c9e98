"""How much of utils/ a reader has to open to follow one update: the functions that a script enters
there, and their lines.

    python benchmark/checks/entered.py                        # PPO at its defaults
    python benchmark/checks/entered.py --script vrpo_math --list

One update without evaluation and checkpoint is followed by `sys.setprofile`. Functions that other
functions define inside themselves count by themselves, their lines once.
"""

import ast
import contextlib
import importlib
import inspect
import os
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SMALL = {"updates": 2, "prompts_per_update": 16, "eval_size": 8, "eval_every": 2, "save_every": 2}


@dataclass
class Args:
    script: str = "ppo_baseline"
    """whose update is followed"""
    list: bool = False
    """name the functions"""


def follow(name: str, **flags) -> dict[tuple[str, str], int]:
    """{(file below utils/, function): lines} of what the first update of a script enters."""
    script = importlib.import_module(name)
    codes, utils = set(), str(ROOT / "utils") + os.sep

    def profile(frame, event, _argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(utils) and code.co_name[0] != "<":
            codes.add(code)

    log = script.Run.log

    def watched(run, update: int, row: dict) -> None:
        sys.setprofile(None)  # the update that ends here is over
        log(run, update, row)
        if update == 0:
            sys.setprofile(profile)

    script.Run.log, arguments = watched, sys.argv
    sys.argv = [f"{name}.py"]
    try:
        script.main(script.Args(**SMALL | flags))
    finally:
        sys.setprofile(None)
        script.Run.log, sys.argv = log, arguments
    found = {}
    for code in codes:
        lines = inspect.getsource(code)
        inner = ast.parse(textwrap.dedent(lines))
        own = sum(
            node.end_lineno - node.lineno + 1
            for node in ast.walk(inner)
            if isinstance(node, ast.FunctionDef) and node.name != code.co_name
        )
        place = Path(code.co_filename).relative_to(utils).as_posix(), code.co_qualname
        found[place] = len(lines.splitlines()) - own
    return found


def main(args: Args) -> None:
    model, data = (str(ROOT / "assets" / place) for place in ("tiny_math", "data/tiny_math"))
    aside = contextlib.redirect_stdout(sys.stderr)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), aside:
        found = follow(args.script, model=model, dataset=data, device="cpu")
    for (file, function), lines in sorted(found.items()) if args.list else ():
        print(f"{file:26} {function:36} {lines:3}")
    files = {file for file, _ in found}
    print(
        f"{args.script}: {len(found)} functions and {sum(found.values())} lines in {len(files)} "
        "files of utils/"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

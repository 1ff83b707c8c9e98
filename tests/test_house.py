"""The shape of the project: which room imports which, and the commands' short names."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("world", "report")


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_is_imported_by_its_full_name():
    """`utils.plot` is a command; imported, it would be a second copy of utils.report.plot."""
    short = {
        f"utils.{file.stem}" for room in ROOMS for file in (ROOT / "utils" / room).glob("*.py")
    }
    short -= {"utils.__init__"}
    for file in ROOT.glob("*/**/*.py"):
        if ".venv" not in file.parts:
            assert not imported(file) & short, file


@pytest.mark.parametrize(
    "name", ["plot", "tokens", "diagnose", "evaluate", "dialogue", "reward_model"]
)
def test_short_names_of_the_commands(name, shell):
    done = shell([sys.executable, "-m", f"utils.{name}", "--help"])
    assert done.returncode == 0 and f"python -m utils.{name}" in done.stdout

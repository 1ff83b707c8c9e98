"""The shape of the project: which room imports which, and the commands' short names."""

import ast
import runpy
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
def test_short_names_of_the_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"utils.{name}", run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    assert not caught.value.code and f"usage: python -m utils.{name} " in said
    assert f"\n    python -m utils.{name}" in said  # examples, each on a line of its own


def room_of(name: str) -> str:
    """Of a module of ours: script, world, report, engine or assets; "" of any other."""
    parts = name.split(".")
    if parts[0] == "utils":
        return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "engine"
    if parts[0] in ("assets", "benchmark", "tests", "docs"):
        return parts[0]
    return "script" if (ROOT / f"{parts[0]}.py").exists() else ""


def test_no_import_runs_upwards():
    """Engine < world < report < scripts: a room imports itself and what lies below it."""
    below = {"engine": {"engine"}, "world": {"engine", "world"}}
    below["report"] = {"engine", "world", "report"}
    below["script"] = below["report"]  # and no script imports another
    below["assets"] = below["report"] | {"assets"}
    files = [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("assets/make/*.py")]
    for file in files:
        own = room_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        rooms = {room_of(name) for name in imported(file)} - {""}
        assert rooms <= below[own], f"{file.name} of {own} imports from {rooms - below[own]}"


def test_no_circle_of_imports():
    graph = {}
    for file in ROOT.glob("utils/**/*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {n for n in imported(file) if (ROOT / f"{n.replace('.', '/')}.py").exists()}
    while graph:
        free = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}

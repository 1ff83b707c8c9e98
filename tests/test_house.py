"""The shape of the project: which room imports which, how deep, what an import costs, and the
commands' short names."""

import ast
import json
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmark.checks import entered
from tests.conftest import ROOT

# what a room may import when its modules are imported; report/ has the programs of both worlds
BELOW = {
    "engine": {"engine", "scale"},
    "scale": {"engine", "scale"},
    "world": {"engine", "scale", "world"},
    "dialogue": {"engine", "scale", "world", "dialogue"},
    "report": {"engine", "scale", "world", "dialogue", "report"},
    "script": {"engine", "scale", "world", "report"},
    "assets": {"engine", "scale", "world", "dialogue", "report", "assets"},
}
ROOMS = ("world", "dialogue", "scale", "report")
LONGEST = 6  # modules in a chain of imports
SHORT = (
    "plot", "tokens", "diagnose", "evaluate", "price", "audit", "exercise", "talk", "reward_model",
    "recipe",
)  # fmt: skip


def imported(file: Path, anywhere: bool = True) -> set[str]:
    """Full names of the modules that a file imports: wherever in it, or when it is imported."""
    tree = ast.parse(file.read_text())
    inside = set()
    for node in ast.walk(tree) if not anywhere else ():
        if isinstance(node, ast.FunctionDef):
            inside |= set(ast.walk(node))
    names = set()
    for node in set(ast.walk(tree)) - inside:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room_of(name: str) -> str:
    """Of a module of ours: script, a room, engine (utils/ itself), assets, ...; "" of any other."""
    parts = name.split(".")
    if parts[0] == "utils":
        return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "engine"
    if parts[0] in ("assets", "benchmark", "tests", "docs"):
        return parts[0]
    return "script" if (ROOT / f"{parts[0]}.py").exists() else ""


def test_every_module_is_imported_by_its_full_name():
    """`utils.plot` is a command; imported, it would be a second copy of utils.report.plot."""
    files = [*(ROOT / "utils" / "report").glob("*.py"), *(ROOT / "utils" / "dialogue").glob("*.py")]
    short = {f"utils.{file.stem}" for file in files} - {"utils.__init__"}
    for folder in ("assets", "benchmark", "docs", "tests", "utils"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not imported(file) & short, file


@pytest.mark.parametrize("name", SHORT)
def test_short_names_of_the_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"utils.{name}", run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    assert not caught.value.code and f"usage: python -m utils.{name} " in said
    assert f"\n    python -m utils.{name}" in said  # examples, each on a line of its own


def test_no_import_runs_upwards():
    """A room imports itself and what lies below it. The engine and scale/ know no task wherever
    they import; no script imports another; no maths imports dialogue/ before a flag asks for it."""
    scripts = [file for file in ROOT.glob("*.py") if file.stem in json.loads(SCRIPTS)]
    files = [*scripts, *ROOT.glob("utils/**/*.py"), *ROOT.glob("assets/make/*.py")]
    for file in files:
        own = room_of(name_of(file))
        rooms = {room_of(x) for x in imported(file, own in ("engine", "scale", "script"))} - {""}
        assert rooms <= BELOW[own], f"{name_of(file)} imports from {rooms - BELOW[own]}"
        if own == "report" and file.stem != "evaluate":
            assert "dialogue" not in rooms, file


def test_chains_of_imports_are_short_and_no_circles():
    modules = {name_of(file): file for file in ROOT.glob("utils/**/*.py")}
    needed = {name: imported(file, False) & modules.keys() for name, file in modules.items()}

    @cache
    def chain(name: str) -> list[str]:  # a circle would never end
        return [name, *max(map(chain, needed[name]), key=len, default=[])]

    longest = max(map(chain, modules), key=len)
    print(" > ".join(longest))
    assert len(longest) <= LONGEST


SCRIPTS = json.dumps([
    "ppo_baseline", "grpo_baseline", "vrpo_math", "vrpo_dialogue", "dvpo_math",
    "robust_ppo_baseline", "vine_ppo_baseline",
])  # fmt: skip
HEAVY = (
    "utils.dialogue", "utils.world.votes", "utils.report.tokens", "utils.scale.engine", "datasets",
    "pyarrow", "peft", "wandb", "trackio", "matplotlib", "pandas", "scipy", "sklearn",
    "transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo",
)  # fmt: skip
CODE = f"""
import contextlib, importlib, io, json, runpy, signal, sys
scripts, out = {SCRIPTS}, io.StringIO()
fields = {{name: list(importlib.import_module(name).Args.__dataclass_fields__) for name in scripts}}
ours = signal.getsignal(2) is not signal.default_int_handler, sys.excepthook is not sys.__excepthook__
sys.argv = ["vrpo_math.py", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
    runpy.run_path("vrpo_math.py", run_name="__main__")
print(json.dumps([list(sys.modules), ours, fields["vrpo_math"], out.getvalue()]))
"""


def test_an_import_and_help_cost_and_change_little(shell, monkeypatch):
    """To import all scripts, and to show the flags of one, loads nothing that only some runs need,
    not even models. Whoever imports, a notebook or a test, keeps Ctrl-C and tracebacks."""
    done = shell([sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r})\n{CODE}"])
    assert done.returncode == 0, done.stderr
    loaded, ours, fields, said = json.loads(done.stdout)
    assert not {x for x in loaded for heavy in HEAVY if x == heavy or x.startswith(f"{heavy}.")}
    assert ours == [False, False]
    assert len(fields) > 50 and all(f"--{name.replace('_', '-')}" in said for name in fields)


def test_an_update_enters_little_of_utils(tmp_path, monkeypatch):
    """As benchmark/checks/entered.py counts for a default update, of fewer episodes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.report.finish.plot_runs", lambda folders, out: out)
    assets = {"model": ROOT / "assets" / "tiny_math", "dataset": ROOT / "assets/data/tiny_math"}
    flags = {name: str(place) for name, place in assets.items()} | {"device": "cpu"}
    found = entered.follow("ppo_baseline", prompts_per_update=2, **flags)
    print(len(found), "functions,", sum(found.values()), "lines")
    assert 50 <= len(found) <= 60 and sum(found.values()) <= 635
    assert not any(file.startswith(("dialogue", "report")) for file, _ in found)

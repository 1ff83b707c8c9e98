"""README and docs: links, named files, sizes, tables that the code knows better."""

import ast
import importlib
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, SCRIPTS
from utils.dialogue.goals import DOMAINS
from utils.dialogue.task import DialogueTask
from utils.recipe import Recipe, hunk, replaced
from utils.world.problems import Problem
from utils.world.tasks import LongTask

FAMILY = (*SCRIPTS, "vrpo_dialogue")
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/results/*.md"))]
FAMILIES = "charts|time|reward|objective|losses|critic|vrpo|dvpo|robust|grpo|vine|eval"
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def prose(text: str) -> str:
    """Without fenced code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", prose(path.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@page
def test_links_and_anchors_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        name, _, anchor = target.partition("#")
        if not re.match(r"https?:", target):
            file = page.parent / name if name else page
            there = file.exists() and (not anchor or anchor in anchors(file))
            broken += [] if there else [target]
    assert not broken


@page
def test_named_files_exist(page):
    """Paths from the root, and scripts by their bare names; not in diffs, nor in the README's tree.
    What begins with my_ is for a reader to make."""
    text = re.sub(r"^```diff.*?^```$", "", page.read_text(), flags=re.S | re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = text.replace(tree(), "") if page == README else text
    named = re.findall(
        r"(?<![\w/.-])((?:utils|tests|benchmark|assets|docs|recipes)/[\w/.-]+\w)", text
    )
    made = ("docs/site/", "recipes/my_", "recipes/NAME")  # by commands, or by a reader
    named = [name for name in named if not name.startswith(made)]
    named += re.findall(r"(?<![\w/.*-])(?!my_)(\w+\.py)\b", text)
    files = {file.name for room in ("utils", "benchmark") for file in ROOT.glob(f"{room}/**/*.py")}
    missing = [name for name in named if not (ROOT / name).exists() and name not in files]
    assert not missing


@page
def test_no_line_is_a_wall(page):
    lines = prose(page.read_text()).splitlines()
    assert not [line[:60] for line in lines if len(line) > 600 and not line.startswith("|")]


def test_size_of_the_readme():
    text = README.read_text()
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*", re.sub(r"\]\([^)]*\)", "]", text))
    assert len(text.splitlines()) < 130 and len(text.split()) <= 1050 and len(numbers) <= 40


def tree() -> str:
    return re.search(r"^```\n(utils/ .*?)^```$", README.read_text(), flags=re.S | re.M)[1]


def test_tree_of_the_readme():
    """The modules of utils/ and its rooms, all and no others."""
    found, room = {}, "."
    for line in tree().split("recipes/")[0].splitlines():
        room = (re.match(r" +(\w+)/ ", line) or [None, room])[1]
        found.setdefault(room, set()).update(re.findall(r"\w+\.py", line))
    for room, names in found.items():
        files = {file.name for file in (ROOT / "utils" / room).glob("*.py")}
        assert names == files - {"__init__.py"}, room
    rooms = {file.parent.name for file in ROOT.glob("utils/*/__init__.py")}
    assert found.keys() == rooms | {"."}


def test_the_scripts_of_the_readme():
    """Each script's row: its length, to ten lines, and a diff against the script read before."""
    row = r"^\| \[(\w+)\.py\]\(\1\.py\) \|.*\| (\d+) \| (?:–|`(\w+)`) \| (.*) \|$"
    rows = re.findall(row, README.read_text(), flags=re.M)
    assert {name for name, *_ in rows} == set(FAMILY)
    for name, lines, parent, difference in rows:
        assert abs(int(lines) - len(source(name).splitlines())) <= 10, name
        assert difference == (f"`diff {parent}.py {name}.py`" if parent else "read it whole")


def test_the_critic_of_the_readme():
    """Its eight lines are the script's, without the docstring."""
    shown = re.search(r"^```python\n(.*?)^```$", README.read_text(), flags=re.S | re.M)[1]
    text = source("vrpo_math")
    critic = next(x for x in ast.parse(text).body if getattr(x, "name", "") == "Critic")
    forward = next(x for x in critic.body if getattr(x, "name", "") == "forward")
    lines = text.splitlines()[forward.lineno - 1 : forward.end_lineno]
    docstring = forward.body[0]
    del lines[docstring.lineno - forward.lineno : docstring.end_lineno - forward.lineno + 1]
    assert shown.splitlines() == textwrap.dedent("\n".join(lines)).splitlines()
    assert len(shown.splitlines()) == 8


def measured() -> set[str]:
    """The names that the tasks' `measure` returns, those of single domains excepted."""
    dialogue = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    chain = LongTask([], [Problem("q", "1", [])], {})
    names = set(dialogue.measure([(p, []) for p in dialogue.test[:6]]))
    names |= set(chain.measure([(chain.test[0], ["1"])]))
    return {name for name in names if not re.search("_(unseen|" + "|".join(DOMAINS) + ")$", name)}


def test_metric_keys_equal_the_tables():
    written = set()
    for name in FAMILY:
        written |= set(re.findall(rf'"((?:{FAMILIES})/\w+)"', source(name)))
        written |= {f"time/{lap}" for lap in re.findall(r'log\.lap\("(\w+)"\)', source(name))}
    for file in ("metrics.py", "world/environment.py"):
        text = (ROOT / "utils" / file).read_text()
        written |= set(re.findall(rf'"((?:{FAMILIES})/\w+)"', text))
    written |= {f"losses/grad_norm_{group}" for group in ("policy", "critic", "head")}
    written |= {f"eval/{name}" for name in measured()}
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(rf"^\| `((?:{FAMILIES})/\w+)` \|", text, flags=re.M)
    assert len(rows) == len(set(rows)) and set(rows) == written
    for family, section in re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M):
        assert {key.split("/")[0] for key in re.findall(r"^\| `(.*?)`", section, flags=re.M)} == {
            family
        }


def test_equations_are_numbered_and_cited_by_their_functions():
    """(1), (2), ... without a gap; a docstring of the scripts that begins with a number is one of
    the functions that the equation names, and every equation is cited by a docstring or, where it
    is a recipe's, in its patch."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    heads = re.findall(r"^\*\*\((\d+)\) [^*]+\*\*, (.*)$", text, flags=re.M)
    assert [int(number) for number, _ in heads] == list(range(1, len(heads) + 1))
    named = {number: set(re.findall(r"`(?:Critic\.)?(\w+)`", line)) for number, line in heads}
    defined, cited = set(), set()
    for file in (*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
                number = re.match(r"\((\d+)\) ", ast.get_docstring(node) or "")
                if number:
                    assert node.name in named[number[1]], f"{file.name}: {node.name} {number[0]}"
                    cited.add(number[1])
    for file in ROOT.glob("recipes/*.patch"):
        cited |= set(re.findall(r"^\+.*# \((\d+)\) ", file.read_text(), flags=re.M))
    assert all(names and names <= defined for names in named.values())
    assert named.keys() - cited <= {"30", "31"}  # the reward model's, in utils/


CHANGE_IT = (ROOT / "docs" / "change-it.md").read_text()
FORKS = re.findall(r"^`my_(\w+)\.py`(.*?)(?=^## )", CHANGE_IT, flags=re.S | re.M)


@pytest.mark.parametrize("name, text", FORKS, ids=[name for name, _ in FORKS])
def test_the_forks_of_the_page_fit_and_run(name, text, monkeypatch, tmp_path, run_main):
    """Each is ppo_baseline.py with the page's lines, and does what the page says."""
    diff = re.search(r"^```diff\n(.*?)^```", text, flags=re.S | re.M)[1]
    hunks = [hunk(part) for part in re.split(r"^@@.*\n", diff, flags=re.M)[1:]]
    script, sought = replaced(source("ppo_baseline"), Recipe({}, [hunks]))
    assert sought is None
    (tmp_path / f"my_{name}.py").write_text(script)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"my_{name}")
    flags = {"noise": name} if name == "fading" else {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M):
        exec(block, {})
        flags["dataset"] = name
    rows = (run_main(f"my_{name}", updates=1, **flags) / "metrics.csv").read_text()
    assert len(rows.splitlines()) == 3
    if name == "fading":
        args, problem = module.Args(noise=name, updates=4, noise_rate=1.0), SimpleNamespace(key="q")
        episodes = [SimpleNamespace(problem=problem)] * 400
        for update in range(5):
            seen = module.observe(args, torch.zeros(400), episodes, update)
            assert seen.mean().item() == pytest.approx(1 - update / 4, abs=0.1)
    if name == "countdown":
        problem = Problem("Use 3, 5 and 9 to make 24.", None, [])
        said = ["3 * 5 + 9 = 24", "9 + 3 * 5 = 24", "3 * 9 - 5 = 22", "3 + 21 = 24", "24", ""]
        assert [module.countdown(problem, [x]) for x in said] == [1, 1, 0, 0, 0, 0]

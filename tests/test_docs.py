"""README and docs: links, named files, sizes, tables that the code knows better."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_scripts_aligned import FAMILY, source
from utils.world.dialogue import DialogueTask
from utils.world.goals import DOMAINS
from utils.world.problems import Problem
from utils.world.tasks import MathTask

README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/results/*.md"))]
FAMILIES = "charts|time|reward|objective|losses|critic|vrpo|dvpo|robust|grpo|vine|eval"
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


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
    """Paths from the root, and scripts by their bare names; not in diffs, nor in the README's tree."""
    text = re.sub(r"^```diff.*?^```$", "", page.read_text(), flags=re.S | re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = text.replace(tree(), "") if page == README else text
    named = re.findall(r"(?<![\w/.-])((?:utils|tests|benchmark|assets|docs)/[\w/.-]+\w)", text)
    named = [name for name in named if not name.startswith("docs/site/")]  # built
    named += re.findall(r"(?<![\w/.*-])(\w+\.py)\b", text)
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
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200 and len(numbers) <= 40


def tree() -> str:
    return re.search(r"^```\n(ppo_baseline\.py .*?)^```$", README.read_text(), flags=re.S | re.M)[1]


def test_tree_of_the_readme():
    """The modules of the scripts' three rooms, all and no others."""
    found, room = {".": set(), "world": set(), "report": set()}, "."
    for line in tree().split("assets/")[0].splitlines():
        room = (re.match(r" +(world|report)/", line) or [None, room])[1]
        found[room] |= set(re.findall(r"\w+\.py", line))
    for room, names in found.items():
        there = {file.name for file in (ROOT / "utils" / room).glob("*.py")} - {"__init__.py"}
        assert names - {f"{name}.py" for name in FAMILY} == there, room


def test_the_scripts_of_the_readme():
    """Each script's row: its length, to ten lines, and a diff against the script read before."""
    row = r"^\| \[(\w+)\.py\]\(\1\.py\) \|.*\| (\d+) \| (?:–|`(\w+)`) \| (.*) \|$"
    rows = re.findall(row, README.read_text(), flags=re.M)
    assert {name for name, *_ in rows} == set(FAMILY)
    for name, lines, parent, difference in rows:
        assert abs(int(lines) - len(source(name).splitlines())) <= 10, name
        assert difference == (f"`diff {parent}.py {name}.py`" if parent else "read it whole")


def test_the_critic_of_the_readme():
    """Its lines are the script's, in its order, whatever the formatter makes of them."""
    shown = re.search(r"^```python\n(.*?)^```$", README.read_text(), flags=re.S | re.M)[1]
    critic = next(
        node
        for node in ast.walk(ast.parse(source("vrpo_math")))
        if isinstance(node, ast.FunctionDef) and node.name == "values"
    )
    wanted = "\n".join(ast.unparse(node) for node in ast.parse(shown).body)
    script = ast.unparse(critic)
    assert all(line.strip() in script for line in wanted.splitlines())
    places = [script.index(line.strip()) for line in wanted.splitlines()]
    assert places == sorted(places)


def measured() -> set[str]:
    """The names that the tasks' `measure` returns, those of single domains excepted."""
    dialogue = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    math = MathTask([], [Problem("q", "1", [])], {})
    names = set(dialogue.measure([(p, []) for p in dialogue.test[:6]]))
    names |= set(math.measure([(math.test[0], ["1"])]))
    return {name for name in names if not re.search("_(unseen|" + "|".join(DOMAINS) + ")$", name)}


def test_metric_keys_equal_the_tables():
    written = set()
    for name in FAMILY:
        written |= set(re.findall(rf'"((?:{FAMILIES})/\w+)"', source(name)))
        written |= {f"time/{lap}" for lap in re.findall(r'clock\.lap\("(\w+)"\)', source(name))}
    for file in ("report/metrics.py", "world/environment.py"):
        text = (ROOT / "utils" / file).read_text()
        written |= set(re.findall(rf'"((?:{FAMILIES})/\w+)"', text))
    written |= {f"losses/grad_norm_{group}" for group in ("policy", "critic", "head", "lm_head")}
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
    the functions that the equation names, and every equation of a script is cited."""
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
    assert all(names and names <= defined for names in named.values())
    elsewhere = {"10", "30", "31"}  # main has no docstring; the reward model's stand in utils/
    assert named.keys() - cited <= elsewhere

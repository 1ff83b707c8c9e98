"""The scripts are copies of one another on purpose; these tests keep the copies equal wherever no
method differs."""

import ast
import difflib
import importlib
import re
from pathlib import Path

import pytest

from utils.world.dialogue import DialogueTask
from utils.world.goals import DOMAINS
from utils.world.problems import Problem
from utils.world.tasks import MathTask

ROOT = Path(__file__).resolve().parent.parent
FAMILY = (
    "ppo_baseline",
    "grpo_baseline",
    "vrpo_math",
    "vrpo_dialogue",
    "dvpo_math",
    "robust_ppo_baseline",
)
# child: its parent, the share of the parent's lines that it keeps at least, its hunks at most
BUDGETS = {
    "vrpo_math": ("ppo_baseline", 0.90, 30),
    "grpo_baseline": ("ppo_baseline", 0.79, 36),  # the critic's functions are a fifth of the parent
    "vrpo_dialogue": ("vrpo_math", 0.93, 20),
    "dvpo_math": ("ppo_baseline", 0.88, 30),
    "robust_ppo_baseline": ("ppo_baseline", 0.88, 30),
}
MARK = {
    "vrpo_math": "VRPO",
    "grpo_baseline": "GRPO",
    "vrpo_dialogue": "dialogue",
    "dvpo_math": "DVPO",
    "robust_ppo_baseline": "robust",
}
# Top-level units that bear the same name in parent and child and differ, with the reason.
INTENDED_DIFFS = {
    ("vrpo_math", "Args"): "the method's own flags",
    ("vrpo_math", "Critic"): "bottleneck and LM head",
    ("vrpo_math", "make_optimizer"): "encoder, decoder and a learned LM head have learning rates",
    ("vrpo_math", "score_tokens"): "the critic's uncertainty about each token",
    ("vrpo_math", "advantages_and_targets"): "the choice of the uncertain tokens",
    ("vrpo_math", "critic_loss"): "three more terms",
    ("vrpo_math", "main"): "the latent samples' seed and the weights of the uncertain tokens",
    ("dvpo_math", "Args"): "the method's own flags, lambda of the targets",
    ("dvpo_math", "Critic"): "heads of quantiles",
    ("dvpo_math", "score_tokens"): "the quantiles",
    ("dvpo_math", "advantages_and_targets"): "GAE for every quantile",
    ("dvpo_math", "critic_loss"): "quantile regression and its companions",
    ("dvpo_math", "main"): "what the ensemble predicts, in the log",
    ("robust_ppo_baseline", "Args"): "the method's own flags, lambda of the targets",
    ("robust_ppo_baseline", "Critic"): "several heads",
    ("robust_ppo_baseline", "score_tokens"): "the lowest head",
    ("robust_ppo_baseline", "gae"): "a contaminated backup",
    ("robust_ppo_baseline", "advantages_and_targets"): "the same",
    ("robust_ppo_baseline", "critic_loss"): "a mean over heads, a conservative term",
    ("robust_ppo_baseline", "main"): "the ensemble's doubt, in the log",
    ("grpo_baseline", "Args"): "the method's own flags in place of the critic's",
    ("grpo_baseline", "token_weights"): "three ways to average over tokens",
    ("grpo_baseline", "make_optimizer"): "no critic",
    ("grpo_baseline", "score_tokens"): "no critic",
    ("vrpo_dialogue", "Args"): "the defaults that go with the task",
    ("grpo_baseline", "main"): "group advantages in place of values and GAE",
}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def units(name: str) -> dict[str, str]:
    """Top-level functions, classes and assignments by name."""
    text, found = source(name), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
    return found


def shared_args(name: str) -> str:
    """The Args class up to the method's own section."""
    return re.split(r"    # --- (?:PPO|GRPO) ---\n", units(name)["Args"])[0]


def hunks(parent: str, child: str) -> list[tuple[list[str], list[str], int]]:
    """Changed blocks: (parent's lines, child's lines, position in the child)."""
    a, b = source(parent).splitlines(), source(child).splitlines()
    matcher = difflib.SequenceMatcher(a=a, b=b, autojunk=False)
    return [
        (a[i1:i2], b[j1:j2], j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
    ]


@pytest.mark.parametrize("child", BUDGETS)
def test_same_named_units_are_identical_unless_intended(child):
    parent, own = units(BUDGETS[child][0]), units(child)
    differing = {name for name in parent.keys() & own.keys() if parent[name] != own[name]}
    intended = {name for script, name in INTENDED_DIFFS if script == child}
    assert differing - intended == set(), "changed in one script only"
    assert intended - differing == set(), "stale entries of INTENDED_DIFFS"


@pytest.mark.parametrize("child", BUDGETS)
def test_same_banners(child):
    def banners(name):
        return re.findall(r"^# ==== (\d\. .*?) =+$", source(name), flags=re.M)

    assert len(banners(child)) == 9
    assert banners(child) == banners(BUDGETS[child][0])


@pytest.mark.parametrize("child", BUDGETS)
def test_same_shared_args(child):
    """But for the defaults of vrpo_dialogue.py, which are those that `--task dialogue` gives to the
    others."""
    from utils.world.tasks import DEFAULTS

    parent = shared_args(BUDGETS[child][0])
    if child == "vrpo_dialogue":
        modules = [importlib.import_module(name) for name in ("vrpo_math", "vrpo_dialogue")]
        plain, own = (vars(module.Args()) for module in modules)
        assert own == plain | {"task": "dialogue"} | DEFAULTS["dialogue"]
        assert plain == plain | DEFAULTS["math"]
        assert all(row.keys() == DEFAULTS["math"].keys() for row in DEFAULTS.values())
        changed = difflib.unified_diff(
            parent.splitlines(), shared_args(child).splitlines(), n=0, lineterm=""
        )
        differing = [
            key for key, value in DEFAULTS["dialogue"].items() if value != DEFAULTS["math"][key]
        ]
        assert len([line for line in changed if line.startswith("+ ")]) == 1 + len(differing)
    else:
        assert shared_args(child) == parent


def test_vrpo_has_every_flag_of_ppo():
    assert units("vrpo_math")["Args"].startswith(units("ppo_baseline")["Args"])


@pytest.mark.parametrize("child", BUDGETS)
def test_diff_budget(child):
    parent, share, most = BUDGETS[child]
    total = len(source(parent).splitlines())
    changed = hunks(parent, child)
    kept = 1 - sum(len(old) for old, _, _ in changed) / total
    print(f"{parent} -> {child}: {kept:.1%} of {total} lines kept, {len(changed)} hunks")
    assert kept >= share and len(changed) <= most


@pytest.mark.parametrize("child", BUDGETS)
def test_every_added_hunk_below_the_args_is_labelled(child):
    """A block that the child adds or changes in banners 4 to 9 carries the child's mark in it or in
    the line above."""
    lines = source(child).splitlines()
    begins = next(i for i, line in enumerate(lines) if line.startswith("# ==== 4."))
    unlabelled = []
    for _, new, position in hunks(BUDGETS[child][0], child):
        new_code = [line for line in new if line.strip()]
        if position > begins and new_code:
            near = "\n".join([*lines[max(0, position - 2) : position], *new])
            if MARK[child] not in near:
                unlabelled.append((position + 1, new[:3]))
    assert not unlabelled


@pytest.mark.parametrize("name", FAMILY)
def test_readable_size(name):
    """A reader can hold the script in mind: its length, its nesting, its share of comments and
    docstrings."""
    text = source(name)
    lines = text.splitlines()
    assert len(lines) <= 1000
    depth = max(
        (len(line) - len(line.lstrip())) // 4
        for line in lines
        if re.match(r"\s*(if|for|while|with|match|def) .*:$", line)
    )
    assert depth <= 5
    prose = {i for i, line in enumerate(lines) if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            prose |= set(range(node.lineno - 1, node.end_lineno))
    assert 0.15 <= len(prose) / len(lines) <= 0.35


def test_utils_import_no_script():
    for file in (ROOT / "utils").glob("*.py"):
        for name in FAMILY:
            assert not re.search(rf"\b(import|from) {name}\b", file.read_text()), (
                f"{file.name} imports {name}"
            )


def measured() -> set[str]:
    """The names that the tasks' `measure` returns, those of single domains excepted."""
    dialogue = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    math = MathTask([], [Problem("q", "1", [])], {})
    names = set(dialogue.measure([(p, []) for p in dialogue.test[:6]])) | set(
        math.measure([(math.test[0], ["1"])])
    )
    return {name for name in names if not re.search("_(unseen|" + "|".join(DOMAINS) + ")$", name)}


def test_metric_keys_equal_the_table_of_the_readme():
    written, families = (
        set(),
        "charts|time|reward|objective|losses|critic|vrpo|dvpo|robust|grpo|eval",
    )
    for name in FAMILY:
        written |= set(re.findall(rf'"((?:{families})/\w+)"', source(name)))
        written |= {
            f"losses/grad_norm_{group}" for group in re.findall(r'"name": "(\w+)"', source(name))
        }
    written |= {f"eval/{name}" for name in measured()}
    table = set(
        re.findall(rf"^\| `((?:{families})/\w+)` \|", (ROOT / "README.md").read_text(), flags=re.M)
    )
    assert written == table


def test_readme_paths_exist():
    """Every file that the README names is there."""
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:utils|tests|benchmark|assets)/[\w/.-]+\w|\w+\.py)\b",
            (ROOT / "README.md").read_text(),
        )
    )
    assert named and not [name for name in named if not (ROOT / name).exists()]

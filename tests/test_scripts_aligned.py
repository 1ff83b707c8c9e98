"""The scripts are copies of one another on purpose; these tests keep the copies equal wherever no
method differs, and each of them readable."""

import ast
import dataclasses
import difflib
import importlib
import re
import subprocess

import pytest

from tests.conftest import ROOT
from utils.args import DEFAULTS, RewardArgs, RunArgs, TaskArgs

# lines at most; child: its parent, lines that it adds, removes, and hunks of `diff`, at most
SIZES = {
    "ppo_baseline": 370, "grpo_baseline": 330, "vrpo_math": 455, "vrpo_dialogue": 495,
    "dvpo_math": 515, "robust_ppo_baseline": 425, "vine_ppo_baseline": 370,
}  # fmt: skip
BUDGETS = {
    "vrpo_math": ("ppo_baseline", 115, 30, 21),
    "grpo_baseline": ("ppo_baseline", 85, 125, 19),  # the critic is a quarter of the parent
    "vrpo_dialogue": ("vrpo_math", 65, 25, 17),
    "dvpo_math": ("ppo_baseline", 176, 35, 14),
    "robust_ppo_baseline": ("ppo_baseline", 90, 35, 17),
    "vine_ppo_baseline": ("ppo_baseline", 110, 110, 22),  # no critic, as in grpo_baseline
}
OWN_FLAGS, SHARED_FLAGS = 27, 40
MARK = {
    "vrpo_math": "VRPO", "grpo_baseline": "GRPO", "vrpo_dialogue": "dialogue", "dvpo_math": "DVPO",
    "robust_ppo_baseline": "robust", "vine_ppo_baseline": "Vine",
}  # fmt: skip
# Top-level units that bear the same name in parent and child and differ, with the reason.
NO_CRITIC = {"make_optimizer": "no critic", "total_loss": "no critic"}
INTENDED_DIFFS = {
    "vrpo_math": {
        "MethodArgs": "the method's own flags",
        "Critic": "bottleneck and LM head",
        "make_optimizer": "encoder and decoder are trained",
        "score_tokens": "the choice of the tokens about which the critic is uncertain",
        "critic_loss": "three more terms",
        "main": "beta, the latent samples' seed, the weights of the uncertain tokens",
    },
    "dvpo_math": {
        "MethodArgs": "the method's own flags",
        "Critic": "heads of quantiles",
        "score_tokens": "the quantiles",
        "advantages_and_targets": "GAE for every quantile",
        "critic_loss": "quantile regression and its companions",
        "main": "what the ensemble predicts, in the log",
    },
    "robust_ppo_baseline": {
        "MethodArgs": "the method's own flags",
        "Critic": "several heads",
        "score_tokens": "the lowest head",
        "gae": "a contaminated backup",
        "advantages_and_targets": "the same",
        "critic_loss": "a mean over heads, a conservative term",
        "main": "the ensemble's doubt, in the log",
    },
    "grpo_baseline": NO_CRITIC | {
        "MethodArgs": "the method's own flags in place of the critic's",
        "token_weights": "three ways to average over tokens",
        "main": "group advantages in place of values and GAE",
    },
    "vine_ppo_baseline": NO_CRITIC | {
        "MethodArgs": "the method's own flags in place of the critic's",
        "gae": "lambda from line to line",
        "main": "sampled values in place of the critic",
    },
    "vrpo_dialogue": {
        "UpdateArgs": "the task's defaults",
        "MethodArgs": "--reward-per",
        "Args": "the task",
        "place_rewards": "a reward at the end of every turn",
        "main": "the gain of each turn",
    },
}  # fmt: skip


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


def hunks(parent: str, child: str) -> list[tuple[list[str], list[str], int]]:
    """Changed blocks: (parent's lines, child's lines, position in the child)."""
    a, b = source(parent).splitlines(), source(child).splitlines()
    matcher = difflib.SequenceMatcher(a=a, b=b, autojunk=False)
    changed = [x for x in matcher.get_opcodes() if x[0] != "equal"]
    return [(a[i1:i2], b[j1:j2], j1) for _, i1, i2, j1, j2 in changed]


@pytest.mark.parametrize("child", BUDGETS)
def test_same_named_units_are_identical_unless_intended(child):
    parent, own = units(BUDGETS[child][0]), units(child)
    differing = {name for name in parent.keys() & own.keys() if parent[name] != own[name]}
    assert differing - INTENDED_DIFFS[child].keys() == set(), "changed in one script only"
    assert INTENDED_DIFFS[child].keys() - differing == set(), "stale entries of INTENDED_DIFFS"


@pytest.mark.parametrize("child", BUDGETS)
def test_same_banners_and_steps(child):
    """The same banners, and steps of main() with the same numbers."""

    def headings(name):
        return re.findall(r"^ *# (?:(?:====) (\d\. .*?) =|--- (\d\.\d) )", source(name), re.M)

    assert headings(child) == headings(BUDGETS[child][0])
    assert [banner[0] for banner, _ in headings(child) if banner] == list("1234567")
    assert [step for _, step in headings(child) if step] == [f"7.{i}" for i in range(1, 7)]


@pytest.mark.parametrize("child", BUDGETS)
def test_diff_budget(child):
    """Of `diff PARENT CHILD`, which is what a reader reads."""
    parent, *most = BUDGETS[child]
    words = ["diff", f"{parent}.py", f"{child}.py"]
    lines = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    found = [sum(x.startswith(mark) for x in lines) for mark in (">", "<", tuple("123456789"))]
    print(f"{parent} -> {child}: {found[0]} lines added, {found[1]} removed, {found[2]} hunks")
    assert all(0 < number <= limit for number, limit in zip(found, most, strict=True))


@pytest.mark.parametrize("child", BUDGETS)
def test_every_added_hunk_below_the_args_is_labelled(child):
    """A block that the child adds or changes behind the flags carries the child's mark, in it or in
    the five lines above."""
    lines, unlabelled = source(child).splitlines(), []
    begins = next(i for i, line in enumerate(lines) if line.startswith("# ==== 2."))
    for _, new, position in hunks(BUDGETS[child][0], child):
        if position > begins and any(line.strip() for line in new):
            near = "\n".join([*lines[max(0, position - 5) : position], *new])
            if MARK[child] not in near:
                unlabelled.append((position + 1, new[:3]))
    assert not unlabelled


def test_defaults_of_the_tasks():
    """They hold for the same flags; those of maths are the scripts' own, those of dialogue
    vrpo_dialogue.py's."""
    assert all(row.keys() == DEFAULTS["math"].keys() for row in DEFAULTS.values())
    for name in SIZES:
        plain = vars(importlib.import_module(name).Args())
        task = "dialogue" if name == "vrpo_dialogue" else "math"
        assert plain == plain | DEFAULTS[task] | {"task": task}


def test_flags_are_few_and_vrpo_has_those_of_ppo():
    groups = (RunArgs, TaskArgs, RewardArgs)
    shared = {field.name for group in groups for field in dataclasses.fields(group)}
    assert len(shared) <= SHARED_FLAGS
    flags = {}
    for name in SIZES:
        fields = dataclasses.fields(importlib.import_module(name).Args)
        flags[name] = [field.name for field in fields if field.name not in shared]
        assert len(flags[name]) <= OWN_FLAGS, name
    for child, more in (("vrpo_math", 7), ("vrpo_dialogue", 8)):
        assert units(child)["MethodArgs"].startswith(units("ppo_baseline")["MethodArgs"])
        assert len(flags[child]) == len(flags["ppo_baseline"]) + more


@pytest.mark.parametrize("name", SIZES)
def test_readable_size(name):
    """A reader can hold the script in mind: its length, its lines' length, its nesting, its share
    of comments and docstrings; and no line is about precision or the layout of tensors."""
    text = source(name)
    lines, tree = text.splitlines(), ast.parse(text)
    written = [line for line in lines if line.strip()]
    mean = sum(map(len, written)) / len(written)
    print(f"{name}: {len(lines)} lines, {mean:.1f} characters in a line that is not empty")
    assert len(lines) <= SIZES[name] and max(map(len, lines)) <= 100 and mean <= 60
    blocks = ast.If | ast.For | ast.While | ast.With | ast.Match | ast.FunctionDef
    assert max(node.col_offset for node in ast.walk(tree) if isinstance(node, blocks)) <= 16
    prose = {i for i, line in enumerate(lines) if line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno - 1, node.end_lineno))
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("autocast", "cells", "nan", "bfloat16"), node.lineno
    assert 0.15 <= len(prose) / len(lines) <= 0.35


def test_the_rollout_is_short():
    """At most fifteen lines behind its docstring, in every script."""
    for name in SIZES:
        node = next(n for n in ast.parse(source(name)).body if getattr(n, "name", "") == "rollout")
        assert node.end_lineno - node.body[1].lineno + 1 <= 15

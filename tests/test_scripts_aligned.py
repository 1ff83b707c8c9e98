"""The scripts are copies of one another on purpose; these tests keep the copies equal wherever no
method differs."""

import ast
import dataclasses
import difflib
import importlib
import re
from pathlib import Path

import pytest

from utils.args import DEFAULTS, RewardArgs, RunArgs, TaskArgs

ROOT = Path(__file__).resolve().parent.parent
# lines at most
SIZES = {
    "ppo_baseline": 540,
    "grpo_baseline": 480,
    "vrpo_math": 650,
    "vrpo_dialogue": 680,
    "dvpo_math": 660,
    "robust_ppo_baseline": 600,
    "vine_ppo_baseline": 500,
}
FAMILY = tuple(SIZES)
# child: its parent, the share of the parent's lines that it keeps at least, its hunks at most
BUDGETS = {
    "vrpo_math": ("ppo_baseline", 0.92, 30),
    "grpo_baseline": ("ppo_baseline", 0.68, 40),  # the critic is a quarter of the parent
    "vrpo_dialogue": ("vrpo_math", 0.92, 20),
    "dvpo_math": ("ppo_baseline", 0.88, 25),
    "robust_ppo_baseline": ("ppo_baseline", 0.90, 25),
    "vine_ppo_baseline": ("ppo_baseline", 0.72, 30),  # no critic, as in grpo_baseline
}
MARK = {
    "vrpo_math": "VRPO",
    "grpo_baseline": "GRPO",
    "vrpo_dialogue": "dialogue",
    "dvpo_math": "DVPO",
    "robust_ppo_baseline": "robust",
    "vine_ppo_baseline": "Vine",
}
# Top-level units that bear the same name in parent and child and differ, with the reason.
INTENDED_DIFFS = {
    ("vrpo_math", "MethodArgs"): "the method's own flags",
    ("vrpo_math", "Critic"): "bottleneck and LM head",
    ("vrpo_math", "make_optimizer"): "encoder, decoder and a learned LM head are trained",
    ("vrpo_math", "schedule"): "the learning rate of a learned LM head",
    ("vrpo_math", "score_tokens"): "the choice of the tokens about which the critic is uncertain",
    ("vrpo_math", "critic_loss"): "three more terms",
    ("vrpo_math", "main"): "beta, the latent samples' seed, the weights of the uncertain tokens",
    ("dvpo_math", "MethodArgs"): "the method's own flags, no clipping of the value",
    ("dvpo_math", "Critic"): "heads of quantiles",
    ("dvpo_math", "score_tokens"): "the quantiles",
    ("dvpo_math", "advantages_and_targets"): "GAE for every quantile",
    ("dvpo_math", "critic_loss"): "quantile regression and its companions",
    ("dvpo_math", "main"): "what the ensemble predicts, in the log",
    ("robust_ppo_baseline", "MethodArgs"): "the method's own flags",
    ("robust_ppo_baseline", "Critic"): "several heads",
    ("robust_ppo_baseline", "score_tokens"): "the lowest head",
    ("robust_ppo_baseline", "gae"): "a contaminated backup",
    ("robust_ppo_baseline", "advantages_and_targets"): "the same",
    ("robust_ppo_baseline", "critic_loss"): "a mean over heads, a conservative term",
    ("robust_ppo_baseline", "main"): "the ensemble's doubt, in the log",
    ("grpo_baseline", "MethodArgs"): "the method's own flags in place of the critic's",
    ("grpo_baseline", "token_weights"): "three ways to average over tokens",
    ("grpo_baseline", "make_optimizer"): "no critic",
    ("grpo_baseline", "schedule"): "no critic",
    ("grpo_baseline", "main"): "group advantages in place of values and GAE",
    ("vine_ppo_baseline", "MethodArgs"): "the method's own flags in place of the critic's",
    ("vine_ppo_baseline", "make_optimizer"): "no critic",
    ("vine_ppo_baseline", "schedule"): "no critic",
    ("vine_ppo_baseline", "gae"): "lambda from line to line",
    ("vine_ppo_baseline", "main"): "sampled values in place of the critic",
    ("vrpo_dialogue", "UpdateArgs"): "the task's defaults",
    ("vrpo_dialogue", "MethodArgs"): "--reward-per",
    ("vrpo_dialogue", "Args"): "the task",
    ("vrpo_dialogue", "place_rewards"): "a reward at the end of every turn",
    ("vrpo_dialogue", "main"): "the gain of each turn",
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
def test_same_banners_and_steps(child):
    def headings(name):
        return re.findall(r"^ *# (?:====|---) (\d\.(?:\d)? .*?):? *(?:=|-|$)", source(name), re.M)

    assert headings(child) == headings(BUDGETS[child][0])
    assert [h[0] for h in headings(child) if h[1:3] == ". "] == list("1234567")


def test_defaults_of_the_tasks():
    """They hold for the same flags; those of maths are the scripts' own, those of dialogue
    vrpo_dialogue.py's."""
    assert all(row.keys() == DEFAULTS["math"].keys() for row in DEFAULTS.values())
    for name in FAMILY:
        plain = vars(importlib.import_module(name).Args())
        task = "dialogue" if name == "vrpo_dialogue" else "math"
        assert plain == plain | DEFAULTS[task] | {"task": task}


@pytest.mark.parametrize("child, more", [("vrpo_math", 10), ("vrpo_dialogue", 11)])
def test_vrpo_has_every_flag_of_ppo(child, more):
    parent, own = units("ppo_baseline")["MethodArgs"], units(child)["MethodArgs"]
    assert own.startswith(parent)
    fields = [dataclasses.fields(importlib.import_module(n).Args) for n in ("ppo_baseline", child)]
    assert len(fields[1]) == len(fields[0]) + more


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
    """A block that the child adds or changes behind the flags carries the child's mark in it or in
    the line above."""
    lines = source(child).splitlines()
    begins = next(i for i, line in enumerate(lines) if line.startswith("# ==== 2."))
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
    """A reader can hold the script in mind: its length, its lines' length, its nesting, its share
    of comments and docstrings, its flags."""
    text = source(name)
    lines = text.splitlines()
    written = [line for line in lines if line.strip()]
    mean = sum(map(len, written)) / len(written)
    print(f"{name}: {len(lines)} lines, {mean:.1f} characters in a line that is not empty")
    assert len(lines) <= SIZES[name] and max(map(len, lines)) <= 100 and mean <= 60
    blocks = re.compile(r"\s*(if|for|while|with|match|def) .*:$")
    depth = max((len(line) - len(line.lstrip())) // 4 for line in lines if blocks.match(line))
    assert depth <= 5
    prose = {i for i, line in enumerate(lines) if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno - 1, node.end_lineno))
    assert 0.15 <= len(prose) / len(lines) <= 0.35
    shared = [
        f.name for group in (RunArgs, TaskArgs, RewardArgs) for f in dataclasses.fields(group)
    ]
    own = [f.name for f in dataclasses.fields(importlib.import_module(name).Args)]
    assert len(set(own) - set(shared)) <= 35


def test_the_rollout_is_short():
    """At most fifteen lines behind its docstring, in every script."""
    for name in FAMILY:
        node = next(n for n in ast.parse(source(name)).body if getattr(n, "name", "") == "rollout")
        assert node.end_lineno - node.body[1].lineno + 1 <= 15

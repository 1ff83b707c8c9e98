"""Recipes: each patch fits its scripts, runs, and does what it says; what cannot be is refused."""

import importlib
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import utils.recipe as recipe
from benchmark import experiments
from tests.conftest import ROOT, assert_same_metrics
from utils.models import load_policy
from utils.report.values import KeptCritic
from utils.tensors import hidden_states, micro_batches, pack
from utils.world.environment import Environment
from utils.world.solutions import worked

CPU = torch.device("cpu")
PPO = ("critic_warmup", "kl_in_loss", "linear_schedule")
CASES = [
    ("ppo_baseline", *PPO, "shared_backbone", "value_clip"),
    ("grpo_baseline", "kl_in_loss", "linear_schedule"),
    ("dvpo_math", "shared_backbone", *PPO),
    ("vrpo_math", "critic_reads", "learned_lm_head", "bottleneck_layers", "value_clip", *PPO),
    ("vrpo_math", *PPO, "shared_backbone", "bottleneck_layers", "critic_reads"),
    ("vrpo_dialogue", "learned_lm_head", "bottleneck_layers", "value_clip", *PPO),
    ("ppo_baseline", "value_probability", "lambda_gate", "clip_higher", "no_whitening",
     "imitate_right_answers", "master_key"),
    ("ppo_baseline", "hl_gauss", "lambda_by_length", "dual_clip", "uncertain_fifth",
     "negative_first", "majority_relabel"),
    ("ppo_baseline", "bounded_values", "prompt_normalised_error", "lambda_by_error",
     "clipped_weights"),
    ("ppo_baseline", "pessimistic_ensemble", "explained_variance_gate", "linear_schedule",
     "critic_warmup"),
    ("ppo_baseline", "huber", "group_baseline", "reads_reference"),
    ("vrpo_math", "target_nats", "huber", "lambda_gate", "clip_higher", "dual_clip",
     "imitate_right_answers"),
    ("grpo_baseline", "informative_groups", "sequence_ratio", "clip_higher", "majority_relabel"),
]  # fmt: skip


@pytest.fixture
def cook(monkeypatch, tmp_path):
    """cook(script, *recipes): the name of a module that is the script with the recipes."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(script: str, *names: str) -> str:
        name = "_".join((script, *names))
        (tmp_path / f"{name}.py").write_text(recipe.derive(f"{script}.py", names))
        made.append(name)
        return name

    made: list[str] = []
    yield make
    for name in made:
        sys.modules.pop(name, None)


def rows(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv")


# ---- the patches ----


@pytest.mark.parametrize("name", recipe.known())
def test_a_patch_fits_every_script_that_it_names(name):
    about, scripts = recipe.read(name).about, recipe.read(name).scripts
    assert len(re.findall(r"[.?](?= |$)", about["Idea"])) <= 2
    assert re.search(r"arXiv \d{4}\.\d{5}|^ours", about["Source"])
    assert max(map(len, (recipe.RECIPES / f"{name}.patch").read_text().splitlines())) <= 101
    for script in scripts:
        text = recipe.derive(script, [name])
        old = (ROOT / script).read_text()
        compile(text, script, "exec")
        assert text.startswith(f'"""{script} with the recipe {name} (python -m utils.recipe).\n\n')
        assert text.splitlines()[2] == old.splitlines()[0][3:]
    first = recipe.RECIPES / f"{name}.patch"
    added = re.split(r"^--- ", first.read_text(), flags=re.M)[1].count("\n+") - 1  # less +++
    assert added <= 15 or name == "bottleneck_layers", f"{added} new lines"
    tried = {script for script, *names in CASES if name in names}
    assert scripts[0][:-3] in tried, f"no case of CASES runs {scripts[0]} with it"
    assert name in experiments.RECIPES or name == "bottleneck_layers", "no experiment has it"
    row = f"| [{name}](../recipes/{name}.patch) | {about['Title']} |"
    assert row in (ROOT / "docs" / "recipes.md").read_text(), f"docs/recipes.md needs {row}"


def test_all_that_a_recipe_names_is_known_in_every_script(tmp_path):
    """Each runs with one script at least, below; with the others it is read."""
    for name in recipe.known():
        for script in recipe.read(name).scripts:
            (tmp_path / f"{name}_{script}").write_text(recipe.derive(script, [name]))
    check = ["ruff", "check", "--isolated", "--select", "F821,F811", "--no-cache", str(tmp_path)]
    found = subprocess.run([sys.executable, "-m", *check], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_recipes_run_together(case, cook, run_main, dialogue_flags):
    script, *names = case
    flags = {"kl_coef": 0.1, "learning_rate": 1e-3, "save_every": 2, "eval_every": 2}
    if script == "vrpo_dialogue":
        flags = dialogue_flags | {"max_turns": 1, "max_new_tokens": 20, "eval_size": 2} | flags
    flags |= {"critic_warmup": 1} if "critic_warmup" in names else {}
    found = rows(run_main(cook(*case), **flags))
    if "kl_in_loss" in names:  # no reward
        assert found["objective/kl_ref"][2] != 0
        total, observed = (found[f"reward/{name}"][1:].tolist() for name in ("total", "observed"))
        assert total == pytest.approx(observed)
    if "linear_schedule" in names:
        assert found["charts/learning_rate"][1:].tolist() == pytest.approx([1e-3, 5e-4])
    if "critic_warmup" in names:
        assert found["losses/grad_norm_policy"][1] == 0 < found["losses/grad_norm_policy"][2]
    assert ("losses/grad_norm_lm_head" in found) == ("learned_lm_head" in names)
    alone = "shared_backbone" in names or script in ("grpo_baseline", "vine_ppo_baseline")
    assert ("losses/grad_norm_critic" in found) == (not alone)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[9]], ids=" ".join)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(case, cook, run_main):
    """Schedules, parts that are shared, layers and heads that are added."""
    name, flags = cook(*case), {"updates": 3, "critic_warmup": 1, "kl_coef": 0.1}
    whole = run_main(name, **flags)
    part = shutil.copytree(whole, whole.with_name("part"))
    shutil.rmtree(part / "checkpoints" / "000003")
    run_main(name, resume=part, **flags)
    assert_same_metrics(whole, part, abs=0)
    head = load_file(part / "checkpoints" / "000003" / "critic" / "head.safetensors")
    assert ("lm_head.weight" in head) == ("learned_lm_head" in case)
    assert (part / "checkpoints" / "000003" / "critic" / "config.json").exists() == (
        "shared_backbone" not in case
    )


def test_without_a_weight_the_kl_divergence_changes_nothing(cook, run_main):
    plain, in_loss = run_main("ppo_baseline"), run_main(cook("ppo_baseline", "kl_in_loss"))
    assert_same_metrics(plain, in_loss, abs=0)


@pytest.mark.parametrize("script", ["ppo_baseline", "grpo_baseline"])
def test_kl_in_loss_by_hand(script, cook, monkeypatch):
    """The policy stands where it sampled, 1 nat above the reference at one token of two: d = -1, and
    exp(-1) - 1 + 1 there."""
    module = importlib.import_module(cook(script, "kl_in_loss"))
    logprobs, nothing = torch.tensor([[-2.0, -3.0]]), torch.zeros(1, 2)
    part = {"logprobs": logprobs, "kl": torch.tensor([[1.0, 0.0]]), "advantages": nothing}
    part["weights"] = torch.full((1, 2), 0.5)
    policy = SimpleNamespace(get_decoder=lambda: None, lm_head=None)
    monkeypatch.setattr(module, "hidden_states", lambda *given: None)
    monkeypatch.setattr(module, "logprobs_and_entropy", lambda *given: (logprobs, nothing))
    monkeypatch.setattr(module, "critic_loss", lambda *given: (0.0, {}), raising=False)
    critic = [None] * (script == "ppo_baseline")
    variance = [torch.ones(())] * (script == "ppo_baseline")
    args = module.Args(kl_coef=0.5)
    loss, terms = module.total_loss(policy, *critic, part, *variance, args)
    assert loss.item() == pytest.approx(0.5 * math.exp(-1) / 2)
    assert terms["losses/policy"] == 0


def test_value_clip_by_hand(cook):
    """Values that were 0 are to be 1. Where one has moved to 0.5, by more than 0.2, the error counts
    that it had at 0.2, and nothing pulls at it any more; nor is it free to move the wrong way."""
    module = importlib.import_module(cook("ppo_baseline", "value_clip"))
    values = torch.tensor([[0.1, 0.5, -0.5]], requires_grad=True)
    part = {"values": torch.zeros(1, 3), "returns": torch.ones(1, 3), "weights": torch.ones(1, 3)}
    loss, _ = module.critic_loss(lambda part: values, part, torch.tensor(2.0), module.Args())
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2) / 2)
    assert torch.autograd.grad(loss, values)[0].tolist() == [pytest.approx([-0.9, 0.0, -1.5])]


def test_bottleneck_layers_from_none_to_two(cook, run_main):
    """None and no semantic losses is PPO; one is VRPO; a second has its price."""
    name, no_words = cook("vrpo_math", "bottleneck_layers"), {"lambda_ent": 0.0, "lambda_ppl": 0.0}
    none = run_main(name, run_name="none", bottleneck_layers=0, **no_words)
    assert_same_metrics(run_main("ppo_baseline"), none, abs=1e-4)
    one, two = (run_main(name, run_name=f"{n}", bottleneck_layers=n) for n in (1, 2))
    assert_same_metrics(run_main("vrpo_math"), one, abs=1e-5)
    kl = [rows(folder)["vrpo/ib_kl"][1] for folder in (none, one, two)]
    assert kl[0] == 0 < kl[1] < kl[2]


def test_a_critic_that_reads(cook, run_main, tiny_model, tiny_data):
    """One more number beside the hidden states goes into the code, and into nothing else."""
    name = cook("vrpo_math", "critic_reads")
    module = importlib.import_module(name)
    args = module.Args(model=str(tiny_model), dataset=str(tiny_data), latent_dim=4)
    policy, chat = load_policy(args.model, CPU)
    episodes = [worked(problem, chat, 9) for problem in Environment(args, chat, CPU).task.train[:2]]
    batch = pack(episodes, chat.pad_id, CPU) | {"seed": torch.tensor([[1], [2]])}
    _, part = next(micro_batches(batch, 2))
    critic = module.Critic(policy, args)
    (_, low, hidden), (_, high, _) = (
        critic(part | {"kept": torch.full_like(part["logprobs"], kept)}, samples=1)
        for kept in (0.0, 1.0)
    )
    assert not torch.allclose(low, high)
    assert torch.equal(hidden[..., :-1], hidden_states(critic.backbone, part))
    for flags in ({"task": "science"}, {"noise": "majority-vote"}):
        with pytest.raises(SystemExit, match="only --task math and long have worked solutions"):
            module.main(module.Args(**flags))


def test_a_kept_critic_that_reads_says_so(cook, run_main, monkeypatch, tmp_path):
    folder = run_main(name := cook("vrpo_math", "critic_reads"), updates=1)
    monkeypatch.setattr("utils.checkpoints.__file__", str(tmp_path / "utils" / "checkpoints.py"))
    kept = KeptCritic(folder / "checkpoints" / "000001" / "critic", CPU)
    assert kept.script is sys.modules[name]
    problem = SimpleNamespace(answer="1", prompt_ids=[1], key="?")
    with pytest.raises(SystemExit, match="reads worked solutions, which this command does not"):
        kept.values([worked(problem, kept.chat, 9)])


# ---- the command ----


@pytest.fixture
def kitchen(monkeypatch, tmp_path):
    """A tree of its own, with the scripts and recipes, to change."""
    (tmp_path / "utils").mkdir()
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "RECIPES", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)

    def write(*names: str, on: str | None = None, out: str | None = "my_ppo.py") -> bytes:
        recipe.main(recipe.Args(names, on=on, out=out and tmp_path / out))
        return (tmp_path / out).read_bytes()

    return write


def test_the_command_writes_a_script(kitchen, monkeypatch, capsys, tmp_path):
    words = ["critic_warmup", "linear_schedule", "--on", "vrpo_math.py", "-o", "my_vrpo.py"]
    monkeypatch.setattr(recipe, "command", lambda *given: command(*given))
    monkeypatch.setattr("utils.args.begin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["", *words])
    command = importlib.import_module("utils.args").command
    recipe.main(recipe.command(recipe.Args, "python -m utils.recipe", None))
    text = (tmp_path / "my_vrpo.py").read_text()
    first = "vrpo_math.py with the recipes critic_warmup, linear_schedule (python -m utils.recipe)."
    assert text.startswith(f'"""{first}\n\nVRPO for language models')
    assert "critic_warmup: int = 5" in text and "run it with `python my_vrpo.py`" in (
        capsys.readouterr().out
    )
    # the default is the first script that all of them name; a checkout with \r\n makes no difference
    plain = kitchen("value_clip", "kl_in_loss", out="one.py")
    for file in (*tmp_path.glob("recipes/*"), *tmp_path.glob("ppo_*.py")):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert kitchen("value_clip", "kl_in_loss", out="two.py") == plain and b"\r" not in plain
    assert plain.startswith(b'"""ppo_baseline.py with')
    assert kitchen("kl_in_loss", "learned_lm_head", out="m.py").startswith(b'"""vrpo_math.py with')
    recipe.main(recipe.Args(list=True))
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{said}" for name in recipe.known())


@pytest.mark.parametrize(
    "names, flags, said",
    [
        ([], {}, "give recipes and -o; there are bottleneck_layers, bounded_values, br"),
        (["value_clip"], {"out": None}, "give recipes and -o"),
        (
            ["value_clap"],
            {},
            "no recipe is called value_clap; did you mean value_clip.* There are bottleneck_layers",
        ),
        (["../recipes/value_clip"], {}, "no recipe is called"),
        (["shared_backbone", "learned_lm_head"], {}, "learned_lm_head collides with shared_backb"),
        (["learned_lm_head", "shared_backbone"], {}, "shared_backbone collides with learned_lm_h"),
        (["value_clip", "value_clip"], {}, "value_clip collides with value_clip.*once$"),
        (["no_whitening", "negative_first"], {}, "no_whitening: .*; name negative_first first"),
        (
            ["value_clip"],
            {"on": "grpo_baseline.py"},
            "--on grpo_baseline.py: the recipe value_clip",
        ),
        (["value_clip"], {"out": "ppo_baseline.py"}, "ppo_baseline.py: it is there already"),
        (["value_clip"], {"out": "docs/my_ppo.py"}, "my_ppo.py: no utils/ lies beside it"),
        (["value_clip"], {"out": "my-ppo.py"}, "give a name such as my_ppo_baseline.py"),
        (["twice"], {}, "twice does not fit ppo_baseline.py: its line `T = part`"),
        (["nowhere"], {}, r"nowhere does not fit ppo_baseline.py: its line `never_written\(\)` is"),
        (["broken"], {}, "ppo_baseline.py with broken would be no Python"),
        (["lost", "learned_lm_head"], {}, "no script that all of lost, learned_lm_head are for"),
        (["lost"], {}, "--on lost.py: it could not be read in .*No such file"),
        (["headless"], {}, "recipes/headless.patch: its header says nothing of Source, Expect"),
        (["shapeless"], {}, "recipes/shapeless.patch: it is no unified diff"),
        (["unindented"], {}, "recipes/unindented.patch: it is no unified diff"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(names, flags, said, kitchen, tmp_path):
    header = "Title: t\nIdea: i\n  goes on\nScripts: ppo_baseline.py\n"
    whole, diff = f"{header}Source: ours\nExpect: e\n", "--- a\n+++ b\n@@ -1 +1 @@\n"
    patches = {
        "twice": f"{whole}{diff} T = part\n+U = 1\n",
        "nowhere": f"{whole}{diff} import torch\n-    never_written()\n",
        "broken": f"{whole}{diff}+if\n import torch\n",
        "lost": f"{whole}{diff}+a\n import torch\n".replace("ppo_baseline", "lost"),
        "headless": f"{header}{diff}+a\n import torch\n",
        "shapeless": f"{whole}{diff}+a\n",
        "unindented": f"{whole}{diff} import torch\nfrom\n+a\n",
    }
    for name, text in patches.items():
        (tmp_path / "recipes" / f"{name}.patch").write_text(text)
    script = tmp_path / "ppo_baseline.py"  # somebody has changed it
    script.write_text(f"{script.read_text()}\n\nT = part\nT = part\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        kitchen(*names, **flags)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before

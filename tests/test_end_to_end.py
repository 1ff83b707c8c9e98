"""Whole runs of every script: two updates, resume after kill -9, signals, NaN, bad input,
multi-turn, plots."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.conftest import ROOT, SCRIPTS, read_metrics, read_samples

# for what needs answers that end: the embedded model
EMBEDDED = {"model": str(ROOT / "assets" / "tiny_math"), "max_new_tokens": 32}


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_updates(name, run_main, capsys):
    folder = run_main(name, plot=True)
    diff = {
        "ppo_baseline": "diff ppo_baseline.py vrpo_math.py",
        "vrpo_dialogue": "diff vrpo_math.py vrpo_dialogue.py",
    }
    assert diff.get(name, f"diff ppo_baseline.py {name}.py") in capsys.readouterr().out
    frame = pd.read_csv(folder / "metrics.csv")
    assert frame["update"].tolist() == [0, 1, 2] and frame["charts/episodes"].tolist() == [0, 8, 16]
    assert frame["eval/accuracy"].notna().all() and frame["losses/policy"][1:].notna().all()
    assert {"update", "question", "completion", "reference", "right"} == set(
        read_samples(folder)[0]
    )
    assert len(read_samples(folder)) == 12
    assert (folder / "curves.png").stat().st_size > 5000
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = folder / "checkpoints" / "000002" / "policy"
    start = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "args.json").read_text())["model"]
    )
    trained = AutoModelForCausalLM.from_pretrained(policy)  # plain transformers loads it
    assert any(
        not torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(policy).chat_template


@pytest.mark.parametrize(
    "name", ["ppo_baseline", "grpo_baseline", "vrpo_math", "vine_ppo_baseline"]
)
def test_kill_9_and_resume_give_the_same_metrics(name, run_main, command, tmp_path):
    """A run killed in mid-update and resumed equals the uninterrupted one, byte for byte apart from
    timing columns."""
    flags = {
        "updates": 6,
        "save_every": 2,
        "eval_every": 2,
        "max_new_tokens": 12,
        "lr_schedule": "linear",
        "kl_coef": 0.01,
    }
    whole = run_main(name, run_name="whole", **flags)
    killed = tmp_path / "runs" / "killed"
    process = subprocess.Popen(
        command(name, run_name="killed", **flags), cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    limit = time.time() + 90
    while (
        time.time() < limit
        and not (killed / "checkpoints" / "000004").exists()
        and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    with (killed / "samples.jsonl").open("a") as file:
        file.write('{"update": 6, "torn')  # a line that was being written
    (killed / "checkpoints" / "tmp-000006").mkdir(exist_ok=True)  # and a checkpoint
    run_main(name, resume=killed, **flags)
    assert read_metrics(killed) == read_metrics(whole)
    assert read_samples(killed) == read_samples(whole)


def test_flags_given_with_resume_override_the_saved_ones(command, shell, run_main, tmp_path):
    """More updates at another learning rate, which the optimizer's saved state must not bring
    back."""
    folder = run_main("ppo_baseline", learning_rate=1e-4)
    words = [sys.executable, str(ROOT / "ppo_baseline.py"), "--resume", str(folder)]
    done = shell([*words, "--updates", "3", "--learning-rate", "5e-5"])
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(folder / "metrics.csv")["charts/learning_rate"].tolist()[1:] == [
        1e-4,
        1e-4,
        5e-5,
    ]


def test_a_saved_policy_stops_at_eos_and_starts_another_run(run_main, tmp_path):
    from transformers import GenerationConfig

    policy = run_main("grpo_baseline") / "checkpoints" / "000002" / "policy"
    assert GenerationConfig.from_pretrained(policy).eos_token_id == [1]
    assert run_main("vrpo_math", model=str(policy), run_name="second").exists()


def test_a_base_model_without_chat_template(run_main, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    frame = pd.read_csv(run_main("vrpo_math", model=str(tmp_path / "base")) / "metrics.csv")
    assert frame["losses/policy"][1:].notna().all()


def test_resume_before_the_first_checkpoint_starts_over(run_main, tmp_path):
    whole = run_main("grpo_baseline")
    import shutil

    shutil.copytree(whole, tmp_path / "runs" / "young")
    shutil.rmtree(tmp_path / "runs" / "young" / "checkpoints")
    again = run_main("grpo_baseline", resume=tmp_path / "runs" / "young")
    assert read_metrics(tmp_path / "runs" / "young") == read_metrics(whole) and again


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_main, capsys):
    folder = run_main("ppo_baseline", updates=3)
    before = read_metrics(folder)
    newest, older = folder / "checkpoints" / "000003", folder / "checkpoints" / "000002"
    weights = newest / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run_main("ppo_baseline", updates=3, resume=folder)
    assert "is damaged" in capsys.readouterr().out
    assert read_metrics(folder) == before
    for checkpoint in (newest, older):
        (checkpoint / "state.pt").write_bytes(b"x")
    with pytest.raises(SystemExit, match="no undamaged checkpoint"):
        run_main("ppo_baseline", updates=3, resume=folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_update_save_and_leave(number, command, shell, tmp_path):
    words = command(
        "grpo_baseline", run_name="stopped", updates=100000, save_every=100000, eval_every=100000
    )
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "stopped" / "metrics.csv"
    limit = time.time() + 90
    while time.time() < limit and not (
        metrics.exists() and len(metrics.read_text().splitlines()) > 2
    ):
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = pd.read_csv(metrics)["update"].max()
    assert f"stopped after update {last}, saved; continue with --resume" in " ".join(output.split())
    assert (metrics.parent / "checkpoints" / f"{last:06d}" / "state.pt").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_nan_stops_the_run_before_the_weights_are_touched(name, run_main, monkeypatch):
    import importlib

    module = importlib.import_module(name)
    original, seen = module.policy_loss, {}

    def poisoned(logprobs, *rest):
        loss, stats = original(logprobs, *rest)
        return loss * float("nan"), stats

    def remember(*args):
        optimizer = make_optimizer(*args)
        seen["params"] = [p for g in optimizer.param_groups for p in g["params"]]
        seen["before"] = [p.detach().clone() for p in seen["params"]]
        return optimizer

    make_optimizer = module.make_optimizer
    monkeypatch.setattr(module, "policy_loss", poisoned)
    monkeypatch.setattr(module, "make_optimizer", remember)
    with pytest.raises(
        SystemExit, match="update 1: not finite, so the weights were not touched: .*nan"
    ):
        run_main(name)
    # the bias of the critic's heads (one, four, or 3 x 200) is set to the first mean return;
    # everything else is as it was
    changed = [
        p.shape
        for a, p in zip(seen["before"], seen["params"], strict=True)
        if not torch.equal(a, p)
    ]
    assert all(shape in ((1,), (4,), (600,)) for shape in changed)


def test_bad_flags_name_themselves(run_main):
    for flags, message in (
        ({"noise_rate": 1.5}, r"--noise-rate 1.5: must be in \[0, 1\]"),
        ({"updates": 0}, "--updates 0: must be at least 1"),
        ({"learning_rate": -1.0}, r"--learning-rate -1.0: must be in \[0, 1\]"),
        ({"temperature": 0.0}, "--temperature 0: must be above 0"),
        ({"model": "./nowhere"}, "--model ./nowhere: no such folder"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere: no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_main("vrpo_math", **flags)
    with pytest.raises(SystemExit, match="--advantage grpo does not read it"):
        run_main("grpo_baseline", assumed_false_negative_rate=0.2)


def test_bad_command_lines_end_with_one_sentence(shell, tmp_path):
    done = shell([sys.executable, str(ROOT / "vrpo_math.py"), "--resume", "runs/nothing"])
    assert done.returncode == 1 and done.stderr.strip().startswith(
        "error: --resume runs/nothing: no readable args.json"
    )
    assert "Traceback" not in done.stderr


def test_a_run_name_is_not_reused(run_main):
    run_main("grpo_baseline", updates=1)
    with pytest.raises(
        SystemExit, match="--run-name grpo_baseline: .* exists; continue it with --resume"
    ):
        run_main("grpo_baseline", updates=1)


def test_help_shows_every_flag_with_its_text(shell):
    import dataclasses

    import vrpo_math

    done = shell([sys.executable, str(ROOT / "vrpo_math.py"), "--help"])
    assert done.returncode == 0
    for field in dataclasses.fields(vrpo_math.Args):
        assert f"--{field.name.replace('_', '-')}" in done.stdout, field.name


@pytest.mark.parametrize("name", ["grpo_baseline", "vrpo_math", "robust_ppo_baseline"])
def test_two_turns(name, run_main):
    """With --max-turns 2 some episodes have a second answer; everything downstream still works."""
    one = pd.read_csv(run_main(name, **EMBEDDED, run_name="one") / "metrics.csv")
    two = pd.read_csv(run_main(name, **EMBEDDED, run_name="two", max_turns=2) / "metrics.csv")
    assert two["losses/policy"][1:].notna().all()
    assert two["charts/response_length"][1] > one["charts/response_length"][1] + 5


@pytest.mark.parametrize("flags", [
    {"advantage": "dr_grpo", "loss_norm": "constant"},
    {"advantage": "forward", "loss_norm": "constant", "assumed_false_negative_rate": 0.2},
    {"advantage": "rloo", "loss_norm": "sequence", "kl_coef": 0.1, "kl_in": "loss"},
    {"advantage": "reinforce_pp", "kl_coef": 0.1, "truncated": "mask", **EMBEDDED},
])  # fmt: skip
def test_grpo_variants_change_the_result(flags, run_main):
    task = {key: flags[key] for key in EMBEDDED if key in flags}
    plain = run_main("grpo_baseline", noise_rate=0.5, run_name="plain", truncated="grade", **task)
    plain = pd.read_csv(plain / "metrics.csv")
    other = pd.read_csv(
        run_main("grpo_baseline", noise_rate=0.5, run_name="other", **flags) / "metrics.csv"
    )
    assert (
        plain["losses/grad_norm_policy"].tolist()[2] != other["losses/grad_norm_policy"].tolist()[2]
    )


def test_every_number_flag_of_vrpo_matters(run_main):
    """Changing a coefficient changes what is measured in update 2."""
    base = {
        "noise_rate": 0.5,
        "eval_every": 2,
        "save_every": 2,
        "truncated": "grade",
        "eval_size": 1,
    }
    plain = read_metrics(run_main("vrpo_math", run_name="base", **base))
    assert plain == read_metrics(run_main("vrpo_math", run_name="again", **base))
    for i, flags in enumerate((
        {"beta_warmup": 1}, {"critic_warmup": 1}, {"critic_backbone": "shared"}, {"critic_reads": "solution"},
        {"beta": 0.5}, {"latent_dim": 8}, {"bottleneck_layers": 2}, {"value_samples": 2}, {"token_ratio": 0.2}, {"lambda_ent": 0.0},
        {"lambda_ppl": 0.0}, {"lm_head": "learned"}, {"gamma": 0.9}, {"gae_lambda": 0.5}, {"critic_lambda": 0.5},
        {"critic_learning_rate": 1e-2}, {"head_learning_rate": 1e-2}, {"value_coef": 0.1}, {"value_clip": 0.01},
        {"entropy_coef": 0.1}, {"kl_coef": 0.5}, {"kl_coef": 0.5, "kl_in": "loss"}, {"clip_range": 0.001}, {"max_grad_norm": 0.01},
        {"epochs": 1}, {"minibatch_size": 2}, {"learning_rate": 1e-3}, {"temperature": 0.5}, {"noise_rate": 0.1}, {"seed": 5},
    )):  # fmt: skip
        assert (
            read_metrics(run_main("vrpo_math", run_name=f"variant{i}", **{**base, **flags}))
            != plain
        ), flags


@pytest.mark.parametrize("name, variants", [
    ("dvpo_math", [
        {"quantile_heads": 2}, {"quantiles": 20}, {"huber_kappa": 0.1}, {"tail_share": 0.3}, {"critic_lambda": 1.0},
        *({f"lambda_{term}": 5.0} for term in ("consistency", "cvar", "gain", "shift", "shape", "curvature")),
    ]),
    ("robust_ppo_baseline", [
        {"value_heads": 2}, {"worst_case": "contamination"}, {"worst_case": "conservative"}, {"critic_lambda": 1.0},
    ]),
    ("robust_ppo_baseline", [{"worst_case": "contamination", "contamination": 0.5}, {"worst_case": "conservative"}]),
    ("robust_ppo_baseline", [{"worst_case": "conservative", "conservative_coef": 0.5}, {"worst_case": "contamination"}]),
])  # fmt: skip
def test_every_flag_of_the_other_critics_matters(name, variants, run_main):
    """All runs differ from the defaults and from one another in the values of update 2."""
    base = {
        "noise_rate": 0.5,
        "eval_every": 2,
        "save_every": 2,
        "truncated": "grade",
        "eval_size": 1,
        "kl_coef": 0.1,
    }
    found = [
        pd.read_csv(run_main(name, run_name=f"variant{i}", **base, **flags) / "metrics.csv")
        for i, flags in enumerate([{}, *variants])
    ]
    seen = [
        (frame["critic/advantage_std"][2], frame["losses/grad_norm_critic"][2]) for frame in found
    ]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("dvpo_math", {"quantiles": 2}, "--quantiles 2: must be at least 3"),
        ("dvpo_math", {"huber_kappa": 0.0}, "--huber-kappa 0.0: must be at least 0.001"),
        ("dvpo_math", {"tail_share": 0.6}, r"--tail-share 0.6: must be in \[0, 0.5\]"),
        (
            "robust_ppo_baseline",
            {"contamination": 2.0},
            r"--contamination 2.0: must be in \[0, 1\]",
        ),
        ("robust_ppo_baseline", {"value_heads": 0}, "--value-heads 0: must be at least 1"),
    ],
)
def test_bad_flags_of_the_other_critics(name, flags, message, run_main):
    with pytest.raises(SystemExit, match=message):
        run_main(name, **flags)


@pytest.mark.parametrize(
    "name, flags", [("dvpo_math", {"quantiles": 20}), ("vrpo_math", {"bottleneck_layers": 0})]
)
def test_a_critic_of_other_sizes_cannot_go_on(name, flags, run_main):
    folder = run_main(name, updates=1)
    with pytest.raises(SystemExit, match="--resume: the run's critic has other parts or sizes"):
        run_main(name, resume=folder, **flags)


def test_majority_vote_and_bfloat16(run_main):
    folder = run_main(
        "ppo_baseline", noise="majority-vote", vote_samples=2, dtype="bfloat16", run_name="votes"
    )
    labels = (folder / "pseudo_labels.jsonl").read_text().splitlines()
    frame = pd.read_csv(folder / "metrics.csv")
    assert len(labels) == 8 and frame["losses/value"][1:].notna().all()


def test_plot_groups_seeds(run_main, shell, tmp_path):
    runs = [run_main("grpo_baseline", seed=s, run_name=f"s{s}") for s in (1, 2)]
    from utils.report.plot import plot_runs, read_run

    picture = plot_runs([*runs, run_main("ppo_baseline")], tmp_path / "all.png")
    assert picture.stat().st_size > 10000
    assert read_run(runs[0])[1]["eval/accuracy"].keys() == {0.0, 8.0, 16.0}
    with pytest.raises(SystemExit, match="not a run directory"):
        plot_runs([Path("nowhere")], tmp_path / "x.png")


# --- dialogue ---


def read_transcripts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]


def test_dialogue_under_a_reward_model(run_main, dialogue_flags, capsys):
    """Two updates each: the field's metrics, rewards that sum to the reward model's score, the same
    dialogues in update 1."""
    first = {}
    for name in ("ppo_baseline", "grpo_baseline", "dvpo_math", "vrpo_dialogue"):
        folder = run_main(name, plot=name == "vrpo_dialogue", **dialogue_flags | {"max_turns": 3})
        frame = pd.read_csv(folder / "metrics.csv")
        assert {
            "eval/tcr",
            "eval/acr",
            "eval/gcr",
            "eval/average",
            "eval/tcr_unseen",
            "sampled/impatient",
        } <= set(frame)
        assert (
            frame["eval/average"].between(0, 1).all() and frame["losses/policy"][1:].notna().all()
        )
        assert frame["charts/turns"][1] > 1
        assert frame["reward/observed"][1] == pytest.approx(0.5, abs=1e-5), (
            "scaled by the first batch"
        )
        assert not any("accuracy" in column for column in frame)
        rows = read_transcripts(folder)
        assert [row["update"] for row in rows] == [1] * 4 + [2] * 4
        for row in rows:
            turns = [m for m in row["messages"] if m["role"] == "assistant"]
            assert len(turns) == len(row["rewards"]) == len(row.get("values", row["rewards"])) <= 3
            assert row["rewards"][:-1] == [0.0] * (len(turns) - 1)
        assert ("values" in rows[0]) == (name != "grpo_baseline")
        first[name] = [(row["messages"], row["rewards"]) for row in rows[:4]]
    assert all(rows == first["ppo_baseline"] for rows in first.values())
    import utils.world.dialogue as viewer

    capsys.readouterr()
    viewer.main(viewer.Args(sample=folder, count=2))
    text = capsys.readouterr().out
    assert text.count("tcr") == 2 and "reward" in text and "value" in text and "call(" in text


def test_a_reward_model_for_every_turn_and_resume(run_main, dialogue_flags, tmp_path):
    """What the turns add sums to the score of the dialogue; the scale of the scores survives a
    resume."""
    import shutil

    flags = {**dialogue_flags, "updates": 3}
    whole = run_main("vrpo_dialogue", reward_per="turn", run_name="whole", **flags)
    final = run_main("vrpo_dialogue", run_name="final", **flags | {"updates": 1})
    for turn, episode in zip(read_transcripts(whole)[:4], read_transcripts(final)[:4], strict=True):
        assert turn["messages"] == episode["messages"]
        assert sum(turn["rewards"]) == pytest.approx(sum(episode["rewards"]), abs=1e-5)
        assert len(turn["rewards"]) == 1 or any(turn["rewards"][:-1])
    part = tmp_path / "runs" / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "000003")
    run_main("vrpo_dialogue", reward_per="turn", resume=part, **flags)
    assert read_metrics(part) == read_metrics(whole)
    assert read_samples(part) == read_samples(whole) and read_transcripts(part) == read_transcripts(
        whole
    )


def test_resume_of_a_dialogue_from_the_command_line(run_main, dialogue_flags, shell):
    """The saved flags come back with their types."""
    folder = run_main("grpo_baseline", **dialogue_flags | {"updates": 1})
    done = shell(
        [sys.executable, str(ROOT / "grpo_baseline.py"), "--resume", str(folder), "--updates", "2"]
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert pd.read_csv(folder / "metrics.csv")["update"].tolist() == [0, 1, 2]


def test_a_reward_model_for_answers_to_questions_with_noise_on_top(run_main, dialogue_flags):
    reward_model = dialogue_flags["reward_model"]
    frame = pd.read_csv(
        run_main("grpo_baseline", reward_model=reward_model, noise="gaussian", **EMBEDDED)
        / "metrics.csv"
    )
    assert frame["eval/accuracy"].notna().all() and frame["reward/observed"][1] != pytest.approx(
        0.5, abs=1e-4
    )


def test_the_true_outcome_as_reward_of_a_dialogue(run_main, dialogue_flags):
    flags = {**dialogue_flags, "reward_model": None}
    frame = pd.read_csv(run_main("ppo_baseline", **flags) / "metrics.csv")
    assert (frame["reward/observed"] == frame["reward/clean"])[1:].all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"reward_per": "turn", "reward_model": None, "script": "vrpo_dialogue"},
            "only a reward model judges turns",
        ),
        ({"noise": "majority-vote"}, "votes are on final answers"),
        ({"schema": Path("nowhere")}, "--schema nowhere: no such folder"),
        ({"train_split": "dev"}, "there is no .*dev"),
        ({"reward_model": "./nowhere"}, "--reward-model ./nowhere: could not be loaded"),
    ],
)
def test_bad_input_of_dialogues(flags, message, run_main, dialogue_flags):
    with pytest.raises(SystemExit, match=message):
        run_main(flags.pop("script", "ppo_baseline"), **{**dialogue_flags, **flags})


def test_the_task_brings_its_defaults(monkeypatch):
    import importlib

    from utils.args import parse_args

    def parse(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        return parse_args(importlib.import_module(name).Args, None)

    dialogue = parse("ppo_baseline", "--task", "dialogue", "--seed", "3")
    assert (
        dialogue.model == "assets/tiny_dialogue" and dialogue.noise == "none" and dialogue.seed == 3
    )
    assert parse("ppo_baseline", "--task=dialogue", "--model", "x").model == "x"
    assert (
        parse("ppo_baseline").model == "assets/tiny_math"
        and parse("ppo_baseline").noise == "symmetric"
    )
    assert parse("vrpo_dialogue") == importlib.import_module("vrpo_dialogue").Args()
    assert parse("vrpo_dialogue", "--task", "math").reward_model is None
    with pytest.raises(SystemExit):
        parse("ppo_baseline", "--task", "chess")

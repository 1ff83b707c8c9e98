"""Whole runs of every script: two updates, the same to the last bit after a kill, a signal or damage;
a NaN, flags that all matter, several turns, dialogues."""

import importlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.conftest import ROOT, SCRIPTS, read_metrics, read_samples
from utils.dialogue import talk
from utils.report.plot import plot_runs, read_run
from utils.run import Run
from utils.world.environment import Environment

# for what needs answers that end: the embedded model
EMBEDDED = {"model": str(ROOT / "assets" / "tiny_math"), "max_new_tokens": 32}


def read_transcripts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]


def results(folder: Path) -> tuple:
    """What a run has found, but for what measures the machine."""
    return read_metrics(folder), read_samples(folder), read_transcripts(folder)


def weights(folder: Path, update: int) -> dict[str, torch.Tensor]:
    """Those of policy and critic in a checkpoint."""
    files = (folder / "checkpoints" / f"{update:06d}").rglob("*.safetensors")
    return {f"{file} {name}": x for file in files for name, x in load_file(file).items()}


def cut(folder: Path, copy: str, keep: int) -> Path:
    """A copy of a run with the checkpoints of its first `keep` updates alone."""
    shutil.copytree(folder, folder.with_name(copy))
    for checkpoint in (folder.with_name(copy) / "checkpoints").iterdir():
        if int(checkpoint.name) > keep:
            shutil.rmtree(checkpoint)
    return folder.with_name(copy)


def losses(folder: Path) -> tuple:
    """All that the last update minimised, as text."""
    frame = pd.read_csv(folder / "metrics.csv", dtype=str)
    return tuple(frame.filter(like="losses/").iloc[-1])


# ---- two updates, and the same again ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_updates_and_the_second_again(name, run_main, capsys):
    """Files and end of a run, a policy that plain transformers loads; and resumed from its first
    checkpoint a run is the same, weights to the last bit."""
    folder = run_main(name, kl_coef=0.01)
    child = name if name != "ppo_baseline" else "vrpo_math"
    assert f"diff ppo_baseline.py {child}.py" in capsys.readouterr().out
    frame = pd.read_csv(folder / "metrics.csv")
    assert frame["update"].tolist() == [0, 1, 2] and frame["charts/episodes"].tolist() == [0, 8, 16]
    assert frame["eval/accuracy"].notna().all() and frame["losses/policy"][1:].notna().all()
    rows = read_samples(folder)
    assert rows[0].keys() == {"update", "question", "completion", "reference", "right"}
    assert len(rows) == 12
    policy = folder / "checkpoints" / "000002" / "policy"
    start = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "args.json").read_text())["model"]
    )
    trained = AutoModelForCausalLM.from_pretrained(policy)
    pairs = zip(start.parameters(), trained.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert AutoTokenizer.from_pretrained(policy).chat_template
    assert GenerationConfig.from_pretrained(policy).eos_token_id == [1]
    found, made = results(folder), weights(folder, 2)
    shutil.rmtree(folder / "checkpoints" / "000002")
    run_main(name, kl_coef=0.01, resume=folder)
    again = weights(folder, 2)
    assert results(folder) == found and again.keys() == made.keys()
    assert all(torch.equal(x, made[key]) for key, x in again.items())


def test_kill_9_and_resume_give_the_same_metrics(run_main, command, tmp_path):
    """A run killed in mid-update and resumed equals the one that was left alone."""
    flags = {"updates": 3, "save_every": 2, "eval_every": 3}
    whole = run_main("vrpo_math", run_name="whole", **flags)
    killed = tmp_path / "runs" / "killed"
    words = command("vrpo_math", run_name="killed", **flags)
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    reached, limit = killed / "checkpoints" / "000002", time.time() + 90
    while time.time() < limit and not reached.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    with (killed / "samples.jsonl").open("a") as file:
        file.write('{"update": 3, "torn')  # a line that was being written
    (killed / "checkpoints" / "tmp-000003").mkdir(exist_ok=True)  # and a checkpoint
    run_main("vrpo_math", resume=killed, **flags)
    assert results(killed) == results(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_update_save_and_leave(number, run_main, monkeypatch, capsys):
    flags = {"updates": 3, "save_every": 10, "eval_every": 10}
    whole = run_main("grpo_baseline", run_name="whole", **flags)
    module, plays = importlib.import_module("grpo_baseline"), []
    play = module.rollout

    def interrupted(*rest, **more):
        plays.append(1)
        if len(plays) == 3:  # the first was the evaluation at the start
            signal.raise_signal(number)
        return play(*rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "rollout", interrupted)
        with pytest.raises(SystemExit) as caught:
            run_main("grpo_baseline", run_name="stopped", **flags)
    assert caught.value.code == 128 + number
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped after update 2, saved; continue with --resume runs/stopped" in said
    stopped = whole.with_name("stopped")
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["000002"]
    run_main("grpo_baseline", resume=stopped, **flags)
    assert results(stopped) == results(whole)


def test_resume_before_the_first_checkpoint_starts_over(run_main):
    whole = run_main("grpo_baseline")
    young = cut(whole, "young", keep=0)
    run_main("grpo_baseline", resume=young)
    assert results(young) == results(whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_main, capsys):
    folder = run_main("ppo_baseline", updates=3)
    found, (older, newest) = results(folder), sorted((folder / "checkpoints").iterdir())
    file = newest / "policy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run_main("ppo_baseline", updates=3, resume=folder)
    assert "000003 is damaged" in " ".join(capsys.readouterr().out.split())
    assert results(folder) == found
    for checkpoint in (newest, older):
        (checkpoint / "state.pt").write_bytes(b"x")
    with pytest.raises(SystemExit, match="no undamaged checkpoint"):
        run_main("ppo_baseline", updates=3, resume=folder)


def test_another_learning_rate_after_resume(run_main, parse):
    """The flags given override the saved ones, and the optimizer goes on with the new rates, not
    with those that its state has: at 0 no weight moves."""
    module = importlib.import_module("ppo_baseline")
    folder = run_main("ppo_baseline", learning_rate=1e-4)
    before = weights(folder, 2)
    for updates, rate in ((3, 5e-5), (4, 0.0)):
        words = ["--updates", updates, "--learning-rate", rate]
        if rate == 0:
            before = weights(folder, 3)
            words += ["--critic-learning-rate", 0.0, "--head-learning-rate", 0.0]
        module.main(parse("ppo_baseline", "--resume", folder, *words))
        after = {
            name.replace(f"{updates:06d}", f"{updates - 1:06d}"): x
            for name, x in weights(folder, updates).items()
        }
        same = [torch.equal(x, before[name]) for name, x in after.items()]
        assert all(same) if rate == 0 else not any(same)
    rates = pd.read_csv(folder / "metrics.csv")["charts/learning_rate"].tolist()[1:]
    assert rates == [1e-4, 1e-4, 5e-5, 0.0]


def test_another_batch_size_after_resume(run_main, monkeypatch):
    """No problem is skipped or met twice, and episodes are those that were sampled."""
    met, problems = [], Environment.problems

    def noticed(env, update):
        found = problems(env, update)
        met.append([problem.key for problem in found[:: env.args.samples_per_prompt]])
        return found

    monkeypatch.setattr(Environment, "problems", noticed)
    folder = run_main("grpo_baseline", prompts_per_update=4, updates=2)
    for updates, prompts in ((3, 7), (5, 2)):
        run_main("grpo_baseline", prompts_per_update=prompts, updates=updates, resume=folder)
    assert [len(keys) for keys in met] == [4, 4, 7, 2, 2]
    assert len(set(sum(met, []))) == 19  # of 40
    assert pd.read_csv(folder / "metrics.csv")["charts/episodes"].tolist() == [0, 8, 16, 30, 34, 38]


@pytest.mark.parametrize("name", ["grpo_baseline", "dvpo_math", "vrpo_dialogue"])
def test_saved_flags_come_back_with_their_types(name, parse, tmp_path):
    """Of every task, and values that look like others."""
    odd = [
        "--system-prompt",
        'None of it\'s "7"\n--seed 3',
        "--thinking",
        "--prompt-template=--seed=4",
    ]
    for task in ("math", "science", "dialogue"):
        args = parse(name, "--task", task, "--reward-model", "None", "--lora-rank", 2, *odd)
        saved = {k: x for k, x in vars(args).items() if k != "resume"} | {"script": name}
        (tmp_path / "args.json").write_text(json.dumps(saved))
        again = parse(name, "--resume", tmp_path, "--seed", 9)
        assert vars(again) == vars(args) | {"resume": tmp_path, "seed": 9}


def test_the_task_brings_its_defaults(parse):
    dialogue = parse("ppo_baseline", "--task", "dialogue", "--seed", "3")
    assert (dialogue.model, dialogue.noise, dialogue.seed) == ("assets/tiny_dialogue", "none", 3)
    assert parse("ppo_baseline", "--task=dialogue", "--model", "x").model == "x"
    plain = parse("ppo_baseline")
    assert (plain.model, plain.noise) == ("assets/tiny_math", "symmetric")
    assert parse("vrpo_dialogue") == importlib.import_module("vrpo_dialogue").Args()
    assert parse("vrpo_dialogue", "--task", "math").reward_model is None
    with pytest.raises(SystemExit):
        parse("ppo_baseline", "--task", "chess")


def test_a_base_model_and_the_policy_of_another_run(run_main, tiny_model, tmp_path):
    """A model without chat template is trained; what a run has saved starts another one."""
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    first = run_main("grpo_baseline", model=str(tmp_path / "base"), updates=1)
    policy = first / "checkpoints" / "000001" / "policy"
    second = run_main("vrpo_math", model=str(policy), updates=1)
    assert pd.read_csv(second / "metrics.csv")["losses/policy"][1:].notna().all()


# ---- what stops a run ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_nan_stops_the_run_before_the_weights_are_touched(name, run_main, monkeypatch):
    module, seen = importlib.import_module(name), {}
    policy_loss, make_optimizer = module.policy_loss, module.make_optimizer

    def poisoned(logprobs, *rest):
        loss, stats = policy_loss(logprobs, *rest)
        return loss * float("nan"), stats

    def remember(*args):
        optimizer = make_optimizer(*args)
        seen["params"] = [p for g in optimizer.param_groups for p in g["params"]]
        seen["before"] = [p.detach().clone() for p in seen["params"]]
        return optimizer

    monkeypatch.setattr(module, "policy_loss", poisoned)
    monkeypatch.setattr(module, "make_optimizer", remember)
    words = "update 1: not finite, so the weights were not touched: .*nan"
    with pytest.raises(SystemExit, match=words):
        run_main(name)
    # the bias of the critic's heads (one, four, or 3 x 200) is set to the first mean return;
    # everything else is as it was
    pairs = zip(seen["before"], seen["params"], strict=True)
    changed = [p.shape for a, p in pairs if not torch.equal(a, p)]
    assert all(shape in ((1,), (4,), (600,)) for shape in changed)


def test_input_that_a_run_refuses(run_main):
    """In one sentence that names the flag; a run's name is not used twice."""
    run_main("vrpo_math", updates=1)
    for flags, message in (
        ({}, "--run-name vrpo_math: .* exists; continue it with --resume"),
        ({"noise_rate": 1.5}, r"--noise-rate 1.5: must be in \[0, 1\]"),
        ({"noise": "salt"}, "--noise salt: there is no such channel"),
        ({"model": "./nowhere"}, "--model ./nowhere: no such folder"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere: no such file"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run_main("vrpo_math", **flags)


def test_a_critic_of_other_sizes_cannot_go_on(run_main):
    folder = run_main("dvpo_math", updates=1)
    with pytest.raises(SystemExit, match="--resume: the run's critic has other parts or sizes"):
        run_main("dvpo_math", resume=folder, quantiles=20)


# ---- flags ----

ROBUST = [
    {"value_heads": 2}, {"worst_case": "contamination"}, {"worst_case": "conservative"},
    {"worst_case": "contamination", "contamination": 0.5},
    {"worst_case": "conservative", "conservative_coef": 0.5},
]  # fmt: skip
UPDATE = [
    {"epochs": 1}, {"minibatch_size": 2}, {"learning_rate": 1e-3}, {"max_grad_norm": 0.01},
    {"clip_range": 0.001}, {"entropy_coef": 0.1}, {"temperature": 0.5}, {"noise_rate": 0.1},
    {"seed": 5}, *({"updates": 2} | x for x in ({}, {"kl_coef": 0.5})),  # of a policy that moved
]  # fmt: skip
CRITIC = [
    {"gamma": 0.9}, {"gae_lambda": 0.5}, {"critic_lambda": 0.5}, {"critic_learning_rate": 1e-2},
    {"head_learning_rate": 1e-2},
]  # fmt: skip
VRPO = [
    {"beta": 0.5}, {"beta_warmup": 1}, {"latent_dim": 8}, {"updates": 2, "value_samples": 2},
    {"token_ratio": 0.2}, {"lambda_ent": 0.0}, {"lambda_ppl": 0.0},
]  # fmt: skip
DVPO = [
    {"quantile_heads": 2}, {"quantiles": 20}, {"huber_kappa": 0.1}, {"tail_share": 0.3},
    *({f"lambda_{x}": 5.0} for x in ("consistency", "cvar", "gain", "shift", "shape", "curvature")),
]  # fmt: skip
GRPO = [
    *({"advantage": x} for x in ("dr_grpo", "rloo", "reinforce_pp", "forward")),
    {"advantage": "forward", "assumed_false_negative_rate": 0.2},
    *({"loss_norm": x} for x in ("sequence", "constant")),
]  # fmt: skip
VINE = [{"gae_lambda": 0.5}, {"vine_samples": 2}, {"vine_judge": "clean"}]


@pytest.mark.parametrize(
    "name, variants",
    {
        "vrpo_math": UPDATE + CRITIC + VRPO, "dvpo_math": [{"critic_lambda": 0.5}, *DVPO],
        "robust_ppo_baseline": [{"critic_lambda": 0.5}, *ROBUST], "grpo_baseline": GRPO,
        "vine_ppo_baseline": VINE,
    }.items(),
)  # fmt: skip
def test_every_flag_matters(name, variants, run_main, monkeypatch):
    """Each setting gives the last update, which is the first but where it shows in the second alone,
    other losses than the defaults and all others do; the defaults give the same ones twice."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "evaluate", lambda *rest, **more: {})
    monkeypatch.setattr(module, "finish", Run.close)
    monkeypatch.setattr(Run, "checkpoint", lambda *rest: None)
    base = {"noise_rate": 0.5, "truncated": "grade", "updates": 1, "micro_batch_size": 4}
    if name in ("grpo_baseline", "vine_ppo_baseline"):
        base |= EMBEDDED | {"epochs": 1}  # lengths and lines count, and no critic learns
    found = {}
    for i, flags in enumerate([{}, *variants]):
        found[str(flags)] = losses(run_main(name, run_name=f"{i}", **base | flags))
    assert losses(run_main(name, run_name="again", **base)) == found["{}"]
    alike = [flags for flags, x in found.items() if list(found.values()).count(x) > 1]
    assert not alike


def test_majority_vote_bfloat16_and_no_truncated_answers(run_main):
    flags = {"noise": "majority-vote", "vote_samples": 2, "dtype": "bfloat16", "updates": 1}
    flags |= {"prompts_per_update": 2, "eval_size": 1, "epochs": 1}
    folder = run_main("ppo_baseline", truncated="mask", **flags, **EMBEDDED)
    assert len((folder / "pseudo_labels.jsonl").read_text().splitlines()) == 2
    assert pd.read_csv(folder / "metrics.csv")["losses/value"][1:].notna().all()


def test_plot_groups_seeds(run_main, tmp_path):
    runs = [run_main("grpo_baseline", seed=s, run_name=f"s{s}", updates=1) for s in (1, 2)]
    picture = plot_runs([*runs, run_main("ppo_baseline", updates=1)], tmp_path / "all.png")
    assert picture.stat().st_size > 10000
    assert read_run(runs[0])[1]["eval/accuracy"].keys() == {0.0, 8.0}
    with pytest.raises(SystemExit, match="not a run directory"):
        plot_runs([Path("nowhere")], tmp_path / "x.png")


# ---- several turns, dialogues ----


def test_two_turns(run_main):
    """With --max-turns 2 some episodes have a second answer; everything downstream still works."""
    flags = EMBEDDED | {"updates": 1, "prompts_per_update": 2, "eval_size": 1, "epochs": 1}
    one, two = (
        pd.read_csv(run_main("vrpo_math", run_name=f"{n}", max_turns=n, **flags) / "metrics.csv")
        for n in (1, 2)
    )
    assert two["losses/policy"][1:].notna().all() and two["charts/turns"][1] > 1
    assert two["charts/response_length"][1] > one["charts/response_length"][1] + 5


def test_dialogue_under_a_reward_model(run_main, dialogue_flags, capsys):
    """The field's metrics, rewards that sum to the reward model's score, and the same dialogues in
    update 1 by every method."""
    first = {}
    flags = dialogue_flags | {"max_turns": 3, "updates": 1, "eval_size": 2, "epochs": 1}
    flags |= {"prompts_per_update": 2}
    for name in ("vrpo_dialogue", "grpo_baseline"):
        folder = run_main(name, **flags)
        frame = pd.read_csv(folder / "metrics.csv")
        measures = {"eval/tcr", "eval/acr", "eval/gcr", "eval/average", "sampled/impatient"}
        assert measures <= set(frame) and not any("accuracy" in column for column in frame)
        assert frame["eval/average"].between(0, 1).all() and frame["losses/policy"].notna()[1]
        assert frame["charts/turns"][1] > 1
        observed = frame["reward/observed"][1]
        assert observed == pytest.approx(0.5, abs=1e-5), "scaled by the first batch"
        rows = read_transcripts(folder)
        assert [row["update"] for row in rows] == [1] * 2
        for row in rows:
            turns = [m for m in row["messages"] if m["role"] == "assistant"]
            assert len(turns) == len(row["rewards"]) == len(row.get("values", row["rewards"])) <= 3
            assert row["rewards"][:-1] == [0.0] * (len(turns) - 1)
        assert ("values" in rows[0]) == (name != "grpo_baseline")
        first[name] = [(row["messages"], row["rewards"]) for row in rows]
    assert first["grpo_baseline"] == first["vrpo_dialogue"]
    folder = folder.with_name("vrpo_dialogue")
    capsys.readouterr()
    talk.main(talk.Args(sample=folder, count=2))
    text = capsys.readouterr().out
    assert text.count("tcr") == 2 and "reward" in text and "value" in text and "call(" in text


def test_a_reward_model_for_every_turn_and_resume(run_main, dialogue_flags):
    """What the turns add sums to the score of the dialogue; the scale of the scores survives a
    resume."""
    flags = dialogue_flags | {"eval_size": 1, "prompts_per_update": 2, "max_turns": 2, "epochs": 1}
    whole = run_main("vrpo_dialogue", reward_per="turn", run_name="whole", **flags)
    final = run_main("vrpo_dialogue", run_name="final", **flags | {"updates": 1})
    for turn, episode in zip(read_transcripts(whole)[:2], read_transcripts(final), strict=True):
        assert turn["messages"] == episode["messages"]
        assert sum(turn["rewards"]) == pytest.approx(sum(episode["rewards"]), abs=1e-5)
        assert len(turn["rewards"]) == 1 or any(turn["rewards"][:-1])
    part = cut(whole, "part", keep=1)
    run_main("vrpo_dialogue", reward_per="turn", resume=part, **flags)
    assert results(part) == results(whole)


def test_other_rewards(run_main, dialogue_flags):
    """A reward model for answers to questions, with noise on top; the true outcome as the reward of
    a dialogue."""
    small = {"updates": 1, "prompts_per_update": 2, "eval_size": 1, "epochs": 1}
    flags = small | {"reward_model": dialogue_flags["reward_model"], "noise": "gaussian"}
    frame = pd.read_csv(run_main("grpo_baseline", **flags, **EMBEDDED) / "metrics.csv")
    assert frame["eval/accuracy"].notna().all()
    assert frame["reward/observed"][1] != pytest.approx(0.5, abs=1e-4)
    flags = dialogue_flags | small | {"reward_model": None, "max_turns": 2}
    frame = pd.read_csv(run_main("ppo_baseline", **flags) / "metrics.csv")
    assert frame["reward/observed"][1] == frame["reward/clean"][1]


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("vrpo_dialogue", {"reward_per": "turn", "reward_model": None}, "--reward-per turn: only a reward model judges turns"),
        ("ppo_baseline", {"noise": "majority-vote"}, "--noise majority-vote: votes are on final answers"),
        ("ppo_baseline", {"dataset": "nowhere"}, "schema nowhere: no such folder"),
        ("ppo_baseline", {"train_split": "dev"}, ".*there is no .*dev"),
        ("ppo_baseline", {"reward_model": "./nowhere"}, "--reward-model ./nowhere: could not be loaded"),
        ("vine_ppo_baseline", {}, "VinePPO samples the rest of one answer: give --max-turns 1"),
    ],
)  # fmt: skip
def test_bad_input_of_dialogues(name, flags, message, run_main, dialogue_flags):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run_main(name, **dialogue_flags | flags)

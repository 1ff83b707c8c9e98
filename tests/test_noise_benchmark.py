"""The noise benchmark: its experiments are what they say, its runs can be stopped, and its report's
numbers are right."""

import csv
import dataclasses
import importlib
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmark import experiments, jobs, report
from benchmark import run as bench
from benchmark.jobs import module_of
from utils.args import DEFAULTS, check_flags
from utils.recipe import derive


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_run_of_an_experiment_has_valid_flags(name):
    jobs = bench.jobs_of(name)
    assert len({job.key for job in jobs}) == len(jobs)
    assert len({job.folder for job in jobs}) == len({job.digest for job in jobs})
    args = []
    for job in jobs:
        flags = DEFAULTS[job.flags.get("task", "math")] | job.flags
        args.append(module_of(job.script, job.recipes).Args(**flags))
    e = experiments.EXPERIMENTS[name]
    for some in args[: len(jobs) // len(e.seeds)]:
        check_flags(some)
    if name == "failures":
        return
    # runs that are compared share everything but what the experiment varies
    varied = [m.flags for m in e.methods.values()] + list(e.arms.values()) + list(e.extra.values())
    args = [vars(some) for some in args]
    shared = set.intersection(*map(set, args)) - {"seed"} - set().union(*varied)
    sizes = {"updates", "prompts_per_update", "samples_per_prompt", "epochs", "eval_size"}
    assert sizes - ({"samples_per_prompt"} if name == "price" else set()) <= shared
    assert "train_split" in shared
    assert all(a[word] == args[0][word] for a in args for word in shared)
    channels = {}
    for job, a in zip(jobs, args, strict=True):
        channel = {k: v for k, v in a.items() if "noise" in k or k.startswith("false_")}
        assert channels.setdefault(job.arm, channel) == channel


def test_the_grid():
    e = experiments.EXPERIMENTS["noise_grid"]
    assert (
        len(e.methods) >= 8
        and len(e.arms) >= 8
        and len(e.seeds) >= 5
        and "coin" in e.arms
        and "no noise" in e.arms
    )
    assert {method.script for method in e.methods.values()} == {
        "ppo_baseline", "grpo_baseline", "vrpo_math", "dvpo_math", "robust_ppo_baseline",
    }  # fmt: skip
    for arm in e.arms:  # methods differ in every arm
        digests = [job.digest for job in bench.jobs_of("noise_grid", (1,)) if job.arm == arm]
        assert len(set(digests)) == len(digests)
    for arm in ("false positives", "false negatives", "symmetric 0.2"):
        flags = e.arms[arm]
        rates = [
            flags.get(f"false_{sign}_rate", flags.get("noise_rate"))
            for sign in ("positive", "negative")
        ]
        assert 1 - sum(rates) == pytest.approx(0.6)  # the same J
    assert not set(experiments.EXPERIMENTS["tuning"].seeds) & set(e.seeds)


@pytest.fixture
def tiny(monkeypatch, tmp_path, small_flags):
    """Two experiments of small runs that share one of them, with folders of their own."""
    flags = small_flags | {"updates": 3, "eval_every": 2}
    method, arms = experiments.Method, {"a": {"noise": "none"}, "b": {"noise_rate": 0.3}}
    both = {
        "one": experiments.Experiment("", flags, {"PPO": method("ppo_baseline")}, arms, (1,)),
        "two": experiments.Experiment("", flags, {"my PPO": method("ppo_baseline")}, arms, (1,)),
        "whole": experiments.Experiment("", flags, {"PPO": method("ppo_baseline")}, arms, (1,)),
    }
    for module in (bench, report):
        monkeypatch.setattr(module, "EXPERIMENTS", both)
    for module in (jobs, bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield flags
    signal.signal(signal.SIGTERM, handler)


def read(file):
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_stopped_experiment_goes_on_and_shares_runs(tiny, monkeypatch, run_main, tmp_path):
    """Interrupted in the middle of a run and continued, its rows are those of one go. A run under
    two names is made once."""
    tiny["updates"] = 10
    job = bench.jobs_of("one")[0]
    saved = job.folder / "checkpoints"

    def interrupt():
        while not saved.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        bench.main(bench.Args(("one",), workers=1))
    thread.join()
    assert not list((tmp_path / "results").glob("*.csv"))
    assert (
        1 < len((job.folder / "metrics.csv").read_text().splitlines()) - 1 < 10
    )  # it had saved and left
    job.commits.write_text("earlier\n")
    bench.main(bench.Args(("one", "two", "one"), arms=("a",)))
    rows = read(tmp_path / "results" / "one.csv")
    assert [(row["arm"], int(row["update"])) for row in rows] == [("a", n) for n in range(0, 11, 2)]
    assert not saved.exists()
    # begun by one, ended by another
    assert {row["commit"] for row in rows} == {f"earlier {bench.commit()}"}
    other = read(tmp_path / "results" / "two.csv")
    assert [{**row, "method": "PPO"} for row in other] == rows
    monkeypatch.setattr(bench, "RUNS", bench.RUNS / "in one go")
    job.commits.parent.mkdir(parents=True)
    job.commits.write_text(f"{rows[0]['commit']}\n")
    whole = run_main("ppo_baseline", **job.flags, run_name=str(job.folder.relative_to("runs")))
    assert whole == tmp_path / job.folder
    bench.save([dataclasses.replace(job, experiment="whole")], bench.read_rows(job))
    assert read(tmp_path / "results" / "whole.csv") == rows
    # all is there: nothing is run, another experiment takes the rows over, and files can be kept
    monkeypatch.setattr(jobs, "FORKS", None)
    (tmp_path / "results" / "whole.csv").unlink()
    bench.main(bench.Args(("whole", "whole"), arms=("a",)))
    assert read(tmp_path / "results" / "whole.csv") == rows
    bench.main(bench.Args(("one", "two"), arms=("a",), keep=tmp_path / "kept"))
    kept = {p.parent.name: p.read_bytes() for p in (tmp_path / "kept").glob("*/metrics.csv")}
    assert (
        set(kept) == {"ppo-a-1", "my-ppo-a-1"}
        and kept["ppo-a-1"] == (whole / "metrics.csv").read_bytes()
    )


def test_a_run_that_fails_is_named_and_the_others_are_made(tiny, monkeypatch, tmp_path, capsys):
    """Here with a recipe: the script's run, but for a script that lies in its folder."""
    changes = {"arms": {"a": {}, "b": {"dataset": "nowhere"}}}
    changes["methods"] = {"PPO": experiments.Method("ppo_baseline", {}, ("critic_warmup",))}
    changed = dataclasses.replace(bench.EXPERIMENTS["one"], **changes)
    monkeypatch.setitem(bench.EXPERIMENTS, "one", changed)
    with pytest.raises(SystemExit, match=r"one: ppo-b-1: error: --dataset nowhere.*\.log"):
        bench.main(bench.Args(("one",)))
    assert {row["arm"] for row in read(tmp_path / "results" / "one.csv")} == {"a"}
    folder = bench.jobs_of("one")[0].folder
    flags = json.loads((folder / "args.json").read_text())
    assert flags["script"] == "ppo_baseline" and flags["critic_warmup"] == 5
    text = (folder / "ppo_baseline.py").read_text()
    assert text == derive("ppo_baseline.py", ["critic_warmup"])
    assert (pd.read_csv(folder / "metrics.csv")["losses/grad_norm_policy"].dropna() == 0).all()
    bench.main(bench.Args(("one",), commands=True))
    own, said = "ppo_baseline_critic_warmup.py", capsys.readouterr().out.splitlines()
    assert said[0] == f"python -m utils.recipe critic_warmup --on ppo_baseline.py -o {own}"
    assert [line.split(" --")[0] for line in said[1:]] == [f"python {own}"] * 2


def test_training_metrics_are_means_since_the_evaluation_before(tiny, tmp_path):
    job = bench.jobs_of("one")[0]
    job.folder.mkdir(parents=True)
    (job.folder / "args.json").write_text('{"updates": 4}')
    lines = [
        "update,charts/episodes,eval/response_length,eval/accuracy,reward/clean,"
        "time/rollout,time/score,time/update"
    ]
    lines += [
        "0,0,9,0.1,,,,",
        "1,8,,,0.2,1,1,1",
        "2,16,,,0.4,1,1,1",
        "3,24,9,0.5,0.6,1,1,2",
        "4,32,8,0.7,0.9,1,1,1",
    ]
    file = job.folder / "metrics.csv"
    file.write_text("\n".join(lines[:-1]))
    assert bench.read_rows(job) == []  # not yet finished
    file.write_text("\n".join(lines))
    rows = bench.read_rows(job)
    assert [row["update"] for row in rows] == [0, 3, 4] and [row["episodes"] for row in rows] == [
        0,
        24,
        32,
    ]
    assert [row["eval/accuracy"] for row in rows] == [0.1, 0.5, 0.7] and [
        row["seconds"] for row in rows
    ] == [0, 10, 3]
    assert rows[1]["reward/clean"] == pytest.approx(0.4) and rows[2]["reward/clean"] == 0.9


def test_a_run_that_died_before_its_first_update_goes_on(tiny):
    job = bench.jobs_of("one")[0]
    job.folder.mkdir(parents=True)
    (job.folder / "args.json").write_text('{"updates": 4}')
    (job.folder / "metrics.csv").write_text(
        "update,charts/episodes,eval/response_length,eval/accuracy\n0,0,9,0.1\n"
    )
    assert bench.read_rows(job) == []


def test_two_at_a_time_are_refused(tiny):
    with jobs.claim(bench.RUNS), pytest.raises(SystemExit, match="another command"):
        bench.main(bench.Args(("one",)))


def test_a_run_that_is_left_behind_keeps_others_out(tiny):
    """Its run.py is gone, it still holds the lock, and SIGTERM reaches it although the process it
    was forked from blocks that."""
    tiny["updates"] = 1000
    job, lock = bench.jobs_of("one")[0], jobs.claim(bench.RUNS)
    log = job.folder.with_suffix(".log")
    call = bench.execute, job.command, job.recipes, job.folder, job.commits
    process = jobs.FORKS.Process(target=jobs.work, args=(bench.RUNS, log, *call))
    signal.pthread_sigmask(signal.SIG_BLOCK, jobs.LEAVE)
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, jobs.LEAVE)
    lock.close()
    while not (job.folder / "metrics.csv").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)
    with pytest.raises(SystemExit, match="or a run that it left behind"):
        jobs.claim(bench.RUNS)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    jobs.claim(bench.RUNS).close()


def test_wrong_names(tiny):
    for args in (bench.Args(), bench.Args(("grid",))):
        with pytest.raises(SystemExit, match="give one of one, two, whole"):
            bench.main(args)
    with pytest.raises(SystemExit, match="--arms 'c': one has a, b"):
        bench.main(bench.Args(("one",), arms=("c",)))
    with pytest.raises(SystemExit, match="nothing has been run"):
        report.main(report.Args(("one",)))


# ---- what was asked ----


@pytest.fixture
def changed(monkeypatch):
    """changed(name=default, ...): the flags of PPO, some of them new or with other defaults."""

    def change(**defaults) -> None:
        fields = [(name, type(value), value) for name, value in defaults.items()]
        module = importlib.import_module("ppo_baseline")
        made = dataclasses.make_dataclass("Args", fields, bases=(module.Args,))
        monkeypatch.setattr(module, "Args", made)
        jobs.digest.cache_clear()

    yield change
    jobs.digest.cache_clear()


def rows_found(name: str, method: str) -> float:
    """Share of the committed rows of a method that are of its present flags."""
    rows, found = (
        frame[frame["method"] == method] for frame in (bench.results(name), report.load(name))
    )
    assert len(rows)
    return len(found) / len(rows)


def test_a_new_flag_orphans_nothing(changed):
    changed(brand_new=3)
    assert rows_found("noise_grid", "PPO") == rows_found("gae_lambda", "PPO, lambda 0.5") == 1


def test_a_changed_default_orphans_the_rows_that_did_not_give_the_flag(changed):
    changed(gae_lambda=0.9)
    assert rows_found("noise_grid", "PPO") == rows_found("long_runs", "PPO") == 0
    assert rows_found("gae_lambda", "PPO, lambda 0.5") == 1 == rows_found("noise_grid", "VRPO")
    changed(gae_lambda=0.95)
    assert rows_found("noise_grid", "PPO") == 1


def test_a_new_flag_is_recorded_and_counts_from_then_on(changed, monkeypatch, tmp_path):
    given = jobs.digest("ppo_baseline", (("seed", 2),))
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    (tmp_path / "defaults.json").write_text('{"ppo_baseline math": {"seed": "1", "gone": "x"}}')
    changed(brand_new=3)
    assert jobs.digest("ppo_baseline", (("seed", 2),)) == given
    assert jobs.digest("ppo_baseline", (("seed", 2), ("brand_new", 4))) != given
    jobs.record([("ppo_baseline", "math")])
    table = json.loads((tmp_path / "defaults.json").read_text())["ppo_baseline math"]
    assert table["brand_new"] == "3" and table["gone"] == "x" and table["gae_lambda"] == "0.95"
    jobs.digest.cache_clear()
    assert jobs.digest("ppo_baseline", (("seed", 2),)) == given
    changed(brand_new=4)
    assert jobs.digest("ppo_baseline", (("seed", 2),)) != given
    assert jobs.digest("ppo_baseline", (("seed", 2), ("brand_new", 3))) == given


def test_model_and_data_are_known_by_name(capsys):
    job, same, other = (
        bench.chosen("word_problems", bench.Args(model=model, data=data))[0]
        for model, data in (
            (None, None),
            ("/x/start", "/y/words"),
            ("/x/Qwen", None),
        )
    )
    assert job.digest == same.digest != other.digest
    bench.main(bench.Args(("word_problems",), commands=True, model="/x/Qwen", seeds=(4,)))
    said = capsys.readouterr().out
    assert " --share-prefixes --" in said  # a flag that is on has no value
    assert said.count(" --model /x/Qwen ") == len(bench.jobs_of("word_problems", (4,)))


def test_every_default_is_recorded():
    for name in experiments.EXPERIMENTS:
        for job in bench.jobs_of(name, (1,)):
            task = jobs.all_flags(job.script, job.flags, job.recipes)["task"]
            flags, known = jobs.all_flags(job.script, {"task": task}), jobs.recorded()
            assert flags.keys() <= known[f"{job.script} {task}"].keys(), "run.py --list records it"


def test_a_recipe_makes_another_run_but_as_the_flag_that_it_was(monkeypatch):
    plain = jobs.digest("vrpo_math", ())
    assert jobs.digest("vrpo_math", (("bottleneck_layers", 1),), recipes=LAYERS) == plain
    assert jobs.digest("vrpo_math", (("bottleneck_layers", 2),), recipes=LAYERS) != plain
    assert jobs.digest("vrpo_math", (), recipes=("critic_reads",)) != plain
    monkeypatch.setattr(jobs, "WERE_FLAGS", {})
    jobs.digest.cache_clear()
    assert jobs.digest("vrpo_math", (), recipes=LAYERS) != plain == jobs.digest("vrpo_math", ())
    jobs.digest.cache_clear()


LAYERS = ("bottleneck_layers",)
# in the rows that carry no claim, or not yet
FEWER_SEEDS = (
    "critic_worth", "critic_lambda_and_error", "long_tuning", "long_answers", "long_parts",
    "long_default", "long_lengths", "long_critics", "recipes", "fresh_flips", "price",
)  # fmt: skip


def test_the_list_finds_every_committed_row(capsys):
    bench.listing(())
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +[\d.]+  ", capsys.readouterr().out, flags=re.M)
    assert [name for name, _, _ in rows] == list(experiments.EXPERIMENTS)
    for name, runs, done in rows:
        committed = set(bench.keys(bench.results(name)))
        assert committed == {job.key for job in bench.jobs_of(name)} & committed, name
        left = [job for job in bench.jobs_of(name) if job.key not in committed]
        assert int(runs) == len(committed) + len(left)
        if name in FEWER_SEEDS:  # and other experiments may have the same runs
            assert int(done) >= len(committed), name
            continue
        assert int(done) == len(committed) > 0, name
        if name not in ("dialogue", "word_problems"):
            assert not left, name


# ---- the report ----


def test_statistics_by_hand():
    assert report.iqm(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == 2.0  # the middle three of five
    middle, low, high = report.summary(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert middle == 3 and 1 <= low < 3 < high <= 5
    assert report.summary(np.array([0.2, 0.9, 0.4])) == pytest.approx(
        (0.5, 0.2, 0.9)
    )  # few: mean and range
    assert report.cell(report.summary(np.array([0.4]))) == "0.400"
    assert report.cell(report.student(np.array([]))) == "" == report.cell_of(np.array([]), 3)
    assert report.cell_of(np.array([0.2, 0.4]), 3) == "0.300 (0.200 to 0.400) of 2"
    mean, low, high = report.student(np.array([1.0, 2.0, 3.0]))  # 2 +- 4.303 / sqrt(3)
    assert mean == 2 and (low, high) == pytest.approx(
        (2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4
    )
    pairs = ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (0.0, 0.0))
    assert [report.verdict(*pair) for pair in pairs] == [
        "better",
        "worse",
        "not told apart",
        "not told apart",
    ]
    for few in (np.array([]), np.array([0.3]), np.array([0.3, 0.31])):
        assert report.verdict(*report.student(few)[1:]) == "too few seeds"


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A grid with made-up results: VRPO gains 0.3, PPO 0.1 but peaks at 0.9 before, GRPO the same
    as VRPO with more noise between seeds."""
    rows = []
    for job in bench.jobs_of("noise_grid", (1, 2, 3)):
        wobble = 0.01 * job.seed
        curve = {"VRPO": (0.45, 0.6, 0.75 + wobble), "PPO": (0.45, 0.9, 0.55 + wobble)}.get(
            job.method, (0.45, 0.6, 0.75 - 0.05 * (-1) ** job.seed)
        )
        for n, accuracy in enumerate(curve):
            rows.append(
                dict(zip(bench.KEY, job.key, strict=True))
                | {"update": 10 * n, "episodes": 1280 * n, "eval/accuracy": accuracy}
            )
    (tmp_path / "results").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "results" / "noise_grid.csv", index=False)
    for module in (bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("no marks\n")
    return tmp_path / "results" / "noise_grid.csv"


def test_report_of_a_grid(made_up, tmp_path):
    page, other = tmp_path / "docs" / "results" / "grid.md", tmp_path / "docs" / "other.md"
    page.parent.mkdir(parents=True)
    page.write_text("above\n<!-- noise_grid -->\nstale\n<!-- /noise_grid -->\nbelow\n")
    other.write_text("<!-- noise_grid -->\n<!-- /noise_grid -->\n")
    report.main(report.Args())
    text = page.read_text()
    assert text == f"above\n{other.read_text()}below\n"
    assert (tmp_path / "README.md").read_text() == "no marks\n"
    assert (
        text.startswith("above\n<!-- noise_grid -->\n")
        and text.endswith("<!-- /noise_grid -->\nbelow\n")
        and "stale" not in text
    )
    rows = {
        line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")
    }
    # after the start: VRPO 0.6 and 0.77 on average, PPO 0.9 and 0.57
    expected = "| 20 % flips | -0.050 (-0.050 to -0.050) | worse | +0.002 (-0.071 to +0.074) |"
    expected += " not told apart |"
    assert rows["20 % flips"] == expected
    assert "Mean of the evaluations (mean, 3 seeds)" in text and "Lost" not in text
    assert rows["VRPO"].startswith("| VRPO | 0.685 (") and "| PPO | 0.735 | 0.735 |" in text
    whole = (tmp_path / "results" / "noise_grid.md").read_text()
    assert (
        "| PPO | 0.570 (0.560 to 0.580) |" in whole.split("Last score (mean and range, 3 seeds)")[1]
        and text.split("Mean differences")[1].split("<!--")[0].strip() in whole
    )
    apart = ", ".join(
        f"{report.in_words(arm)}: 1" for arm in experiments.ARMS
    )  # PPO and VRPO alone, whose seeds differ in the same way
    assert "Of the 28 pairs" in text and f"(by luck alone about 1 would): {apart}." in text
    lost = whole.split("Lost since the peak (mean and range, 3 seeds):")[1]
    assert "| PPO | 0.330" in lost and "| VRPO | 0.000" in lost
    overall = text.split("Over the 8 arms other than no noise and coin, 3 seeds")[1]
    row = next(line for line in overall.splitlines() if line.startswith("| VRPO |")).split(" | ")
    assert row[1:3] == ["0.685 (0.673 to 0.697)", "-0.050 (-0.050 to -0.050)"]
    assert row[4:6] == ["0.770 (0.745 to 0.795)", "+0.200 (+0.200 to +0.200)"]
    for figure in ("noise_grid", "noise_grid_rates", "noise_grid_arms"):
        assert len((tmp_path / "results" / f"{figure}.png").read_bytes()) > 20000
    brief = report.tables("noise_grid", report.by_run(report.load("noise_grid")), brief=True)
    assert report.insert(text, "noise_grid", brief) == text  # made again, the same


def test_rows_of_other_flags_are_left_out(made_up, capsys):
    pd.read_csv(made_up).assign(digest="other").to_csv(made_up, index=False)
    report.main(report.Args())
    assert [f.name for f in made_up.parent.iterdir()] == ["noise_grid.csv"]
    assert "noise_grid: 720 rows were made with other flags" in capsys.readouterr().err


def test_report_of_a_part_of_the_grid(made_up):
    """Three arms of two seeds, one run of them missing: no averages over arms, and the table says
    what it is made of."""
    frame = pd.read_csv(made_up)
    frame = frame[
        frame["arm"].isin(["no noise", "symmetric 0.1", "symmetric 0.2"]) & (frame["seed"] < 3)
    ]
    frame[(frame["arm"] != "no noise") | (frame["method"] != "PPO") | (frame["seed"] < 2)].to_csv(
        made_up, index=False
    )
    frame = report.load("noise_grid")
    text = report.tables("noise_grid", report.by_run(frame))
    assert list(report.figures("noise_grid", frame)) == [
        "noise_grid",
        "noise_grid_rates",
        "noise_grid_arms",
    ]
    assert (
        text.startswith("47 of 400 runs so far.")
        and "Mean of the evaluations (mean and range, 2 seeds)" in text
    )
    assert "| PPO | 0.730 of 1 | 0.733 (0.730 to 0.735) |" in text
    assert "Over the 8 arms other than no noise and coin: not yet" in text
    assert "| no noise | -0.050 | too few seeds |" in text


def test_an_ablation_is_compared_with_the_default_of_its_method(monkeypatch, tmp_path):
    rows = []
    for job in bench.jobs_of("gae_lambda", (1, 2, 3)):
        accuracy = (
            0.5
            + 0.01 * job.seed
            + (0.2 if job.method == "VRPO, lambda 0.5" else 0.1 * job.method.startswith("VRPO"))
        )
        for update, found in enumerate((0.45, accuracy)):
            row = {"update": update, "episodes": 96 * update, "eval/accuracy": found}
            rows.append(dict(zip(bench.KEY, job.key, strict=True)) | row)
    pd.DataFrame(rows).to_csv(tmp_path / "gae_lambda.csv", index=False)
    for module in (bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- gae_lambda -->\n<!-- /gae_lambda -->\n")
    report.main(report.Args())
    assert len((tmp_path / "differences.png").read_bytes()) > 20000
    whole = (tmp_path / "gae_lambda.md").read_text().splitlines()
    # the runs that others are compared with, and no other
    only = pd.read_csv(tmp_path / "gae_lambda.csv")
    only[only["method"] == "PPO, lambda 0.95"].to_csv(tmp_path / "gae_lambda.csv", index=False)
    assert report.compared()["differences"].axes
    lines = {line.split(" | ")[1]: line for line in whole if line.startswith("| 20 %")}
    brief = {
        line.split(" | ")[0].strip("| "): line
        for line in readme.read_text().splitlines()
        if "lambda" in line
    }
    assert (
        brief["VRPO, lambda 0.5"] == "| VRPO, lambda 0.5 | 0.720 (0.710 to 0.730) "
        "| +0.100 (+0.100 to +0.100) from VRPO, lambda 0.95 | 0.720 |"
    )
    assert "+0.100 (+0.100 to +0.100) from VRPO, lambda 0.95" in lines["VRPO, lambda 0.5"]
    assert "+0.100 (+0.100 to +0.100) from PPO, lambda 0.95" in lines["VRPO, lambda 0.95"]
    assert "from" not in lines["PPO, lambda 0.95"] and "+0.000" in lines["PPO, lambda 1"]


def test_long_runs_are_compared_by_the_mean_of_what_they_sampled(monkeypatch, tmp_path):
    """The start has no samples; the last evaluation stands beside it."""
    rows, names = [], ("PPO, lambda 1", "VRPO, lambda 1")
    for job in bench.jobs_of("long_parts", (11, 12, 13)):
        for update, sampled in ((0, None), (8, 0.2), (16, 0.3)) if job.method in names else ():
            more = 0.02 * (job.method == names[1])
            row = dict(zip(bench.KEY, job.key, strict=True)) | {
                "update": update,
                "episodes": update,
            }
            row |= {"eval/accuracy": 0.7, "reward/clean": sampled and sampled + more}
            rows.append(row | {"sampled/right_steps": sampled and 0.8})
    pd.DataFrame(rows).to_csv(tmp_path / "long_parts.csv", index=False)
    for module in (bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    frame = report.load("long_parts")
    lines = report.tables("long_parts", report.by_run(frame), brief=True).splitlines()
    assert lines[2] == (
        "| method | mean of the run | difference (95 %, Student's t) | last | right steps |"
    )
    assert lines[4].startswith("| PPO, lambda 1 | 0.250 (0.250 to 0.250) |  | 0.700 | 0.800 |")
    assert "| +0.020 (+0.020 to +0.020) from PPO, lambda 1 | 0.700 |" in lines[5]
    (figure,) = report.figures("long_parts", frame).values()
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["VRPO, lambda 1"]


def test_effects_of_recipes(monkeypatch, tmp_path):
    """Three seeds, a gain of 0.1 +- 0.01 under flips; its p by hand, times the number of rows."""
    rows, gains = [], {"PPO": 0.0, "huber": 0.1, "dual_clip": 0.0}
    for job in bench.jobs_of("recipes", (1, 2, 3)):
        if job.method in gains and job.arm == "symmetric 0.2":
            gain = gains[job.method] + (job.method != "PPO") * 0.01 * (job.seed - 2)
            for update, accuracy in ((0, 0.9), (5, 0.5 + gain), (10, 0.6 + gain)):
                row = {"update": update, "episodes": update, "eval/accuracy": accuracy}
                rows.append(dict(zip(bench.KEY, job.key, strict=True)) | row)
    pd.DataFrame(rows).to_csv(tmp_path / "recipes.csv", index=False)
    for module in (bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    runs = report.by_run(report.load("recipes"))
    assert report.values(runs, "symmetric 0.2", "PPO", "evaluations").tolist() == [0.55] * 3
    *_, huber, dual = report.tables("recipes", runs, brief=True).splitlines()
    p = stats.t.sf(0.1 / (0.01 / 3**0.5), 2) * 2
    reach = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    interval = f"+0.100 (+{0.1 - reach:.3f} to +{0.1 + reach:.3f})"
    assert huber == f"| huber | PPO | {interval} | {2 * p:.2f} |"
    assert dual.endswith("| 1.00 |")
    assert report.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert list(report.figures("recipes", report.load("recipes"))) == ["recipes"]


def test_what_buys_flips_back(monkeypatch, tmp_path):
    """At 30 % flips 0.6 becomes 0.5 with as many answers and 0.55 with 6.25 times as many: half of
    the loss, so that by the line over the logarithm 6.25^2 times as many would buy all of it."""
    rows = []
    for job in bench.jobs_of("price", (1, 2, 3)):
        found = {"no noise": 0.6, "symmetric 0.3": 0.5, "symmetric 0.3, 25 answers": 0.55}
        for update in (0, 10, 20) if job.method == "PPO" and job.arm in found else ():
            accuracy = found[job.arm] + 0.01 * job.seed if update else 0.3
            episodes = update * 24 * job.flags.get("samples_per_prompt", 4)
            row = {"update": update, "episodes": episodes, "eval/accuracy": accuracy}
            row |= {"reward/clean": 0.5 if update else None}
            rows.append(dict(zip(bench.KEY, job.key, strict=True)) | row)
    pd.DataFrame(rows).to_csv(tmp_path / "price.csv", index=False)
    for module in (bench, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    frame = report.load("price")
    runs = report.by_run(frame)
    *_, line = report.tables("price", runs, brief=True).splitlines()
    less, more = ("-0.100 (-0.100 to -0.100)", "-0.050 (-0.050 to -0.050)")
    assert line == f"| PPO | 30 % | {less} | 6.25 | {more} | 6.3 | 39.1 | 3 |"
    (figure,) = report.figures("price", frame).values()
    by_updates, by_episodes = figure.axes[:2]
    ends = [[line.get_xdata()[-1] for line in axis.lines[:3]] for axis in (by_updates, by_episodes)]
    assert ends[0] == [20, 20, 20]
    assert ends[1] == pytest.approx([1920, 1920, 1920 / 6.25])  # bought, and not bought
    x = np.array([0.5])
    assert report.multiplier(x + 0.1, x, x - 0.01, 6.25) == float("inf")  # more does not help


def test_what_a_method_is_compared_with_is_there_and_is_the_default():
    for name, e in experiments.EXPERIMENTS.items():
        for method, other in (e.against or {}).items():
            assert method in e.methods and other in e.methods and method != other, name
    for name in ("bottleneck_depth", "beta_sweep", "token_ratio", "semantic_head"):
        e = experiments.EXPERIMENTS[name]
        first = next(iter(e.methods.values()))
        default = module_of("vrpo_math", first.recipes).Args()
        assert all(getattr(default, key) == value for key, value in first.flags.items()), name


@pytest.mark.parametrize(
    "name", [name for name in experiments.EXPERIMENTS if len(bench.results(name))]
)
def test_committed_tables_are_those_of_the_committed_rows(name):
    frame = report.load(name)
    assert len(frame) == len(bench.results(name))  # none of other flags
    assert not frame.duplicated([*bench.KEY, "update"]).any()
    runs = report.by_run(frame)
    assert (report.RESULTS / f"{name}.md").read_text() == report.text_of(name, runs)
    brief = report.tables(name, runs, brief=True)
    for page in report.pages():
        assert report.insert(page.read_text(), name, brief) == page.read_text(), page

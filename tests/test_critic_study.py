"""The offline study of critics: its fits are the scripts' own updates, its measures mean what they
say."""

import math
import sys
from collections import Counter

import pandas as pd
import pytest
import torch

from benchmark import report
from benchmark.studies import critic_study as study
from tests.conftest import CRITICS
from utils.checkpoints import kept_weights
from utils.keyed import seed_torch
from utils.models import load_policy
from utils.world.environment import Environment

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CRITICS)
def test_a_fit_is_what_main_does_with_a_policy_that_stands_still(name, run_main, small_flags):
    """Two updates with a policy that does not learn: the study's critic has the checkpoint's
    weights."""
    flags = small_flags | {
        "learning_rate": 0.0,
        "noise_rate": 0.5,
        "truncated": "grade",
        "max_new_tokens": 12,
    }
    folder = run_main(name, **flags | {"eval_size": 1, "eval_every": 10, "save_every": 10})
    module = sys.modules[name]
    args = module.Args(**flags)
    policy, chat = load_policy(args.model, CPU)
    env = Environment(args, chat, CPU)
    seed_torch(args.seed, "critic")
    critic = module.Critic(policy, args)
    optimizer = module.make_optimizer(policy, critic, args)
    for update in (1, 2):
        seed_torch(args.seed, "rollout", update)
        episodes = module.rollout(policy, env, env.problems(update), args, 1.0)
        batch = env.pack(episodes)
        observed = module.observe(args, env.grade(episodes), episodes, update)
        if update == 1:
            torch.nn.init.constant_(critic.head.bias, observed.mean().item())
        rewards = module.place_rewards(observed, batch)
        study.train_update(module, critic, optimizer, batch, rewards, args, update)
    saved = kept_weights(folder / "checkpoints" / "000002" / "critic", critic)
    own = critic.state_dict()
    assert saved.keys() <= own.keys() and any(key.startswith("backbone.") for key in saved)
    for key, weight in saved.items():
        assert torch.equal(weight, own[key]), key


class Saying:
    """A script whose critic says given values (B, T) of all episodes."""

    advantages_and_targets = staticmethod(study.ppo.advantages_and_targets)

    def __init__(self, values):
        self.values = values

    def score_tokens(self, critic, batch, args):
        return {"values": self.values[batch["rows"][:, 0]]}


def measured(values, clean, observed, fresh, fitted):
    count, width = values.shape
    batch = {
        "mask": torch.ones(values.shape, dtype=torch.bool),
        "logprobs": torch.zeros(values.shape),
        "rows": torch.arange(count).unsqueeze(1),
        "last": torch.full((count, 1), width - 1),
    }
    script = Saying(values)
    return study.measure(script, None, batch, clean, observed, fresh, fitted, study.ppo.Args())


def test_measures():
    torch.manual_seed(0)
    clean = torch.randint(2, (400,)).float()
    flips = torch.rand(400) < 0.25
    observed = torch.where(flips, 1 - clean, clean)
    fresh, fitted = torch.arange(200), torch.arange(200, 400)
    grid = torch.ones(1, 3)
    perfect = measured(clean.unsqueeze(1) * grid, clean, observed, fresh, fitted)
    assert perfect["explained_variance"] == perfect["auc"] == 1 and perfect[
        "r_squared"
    ] == pytest.approx(1)
    assert perfect["rmse_flipped"] == perfect["rmse_unflipped"] == 0
    # the best that a critic fitted to noise can be: calibrated to what is observed, and so shrunk
    one, zero = observed[clean == 1].mean(), observed[clean == 0].mean()
    best = measured(
        torch.where(clean == 1, one, zero).unsqueeze(1) * grid, clean, observed, fresh, fitted
    )
    assert best["r_squared"] == pytest.approx(1) and best["auc"] == 1
    assert best["explained_variance"] == pytest.approx(1 - (1 - (one - zero).item()) ** 2, abs=1e-3)
    assert best["calibration_error"] < 1e-6 < perfect["calibration_error"]
    # one that has learnt the flips by heart
    parrot = measured(observed.unsqueeze(1) * grid, clean, observed, fresh, fitted)
    assert parrot["noise_fitted"] == pytest.approx(1, abs=1e-5)
    assert perfect["noise_fitted"] == pytest.approx(0, abs=1e-5) == best["noise_fitted"]
    assert parrot["rmse_flipped"] == 1 and parrot["rmse_unflipped"] == 0
    constant = measured(torch.full((400, 3), 0.4), clean, observed, fresh, fitted)
    assert constant["auc"] == 0.5 and constant["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert constant["r_squared"] < 1e-6

    flipped = clean[fresh], observed[fresh]
    assert constant["advantage_noise"] == pytest.approx(
        1 - torch.corrcoef(torch.stack(flipped))[0, 1].item() ** 2, abs=0.01
    )


def test_noise_fitted():
    """Nothing of the errors is in a constant value, nor in one that knows the outcome, and a
    quarter in one that follows them by a quarter."""
    torch.manual_seed(0)
    clean = torch.randint(2, (400, 1)).float()
    observed = torch.where(torch.rand(400, 1) < 0.25, 1 - clean, clean)
    mask = torch.ones(400, 3, dtype=torch.bool)
    mask[:, 1] = torch.rand(400) < 0.5
    bad = torch.full((400, 3), float("nan"))

    def fitted(values):
        return study.noise_fitted(
            torch.where(mask, values.expand(400, 3), bad), observed, clean, mask
        )

    assert fitted(observed - 0.4) == pytest.approx(1, abs=1e-5)
    assert fitted(clean - 0.4) == pytest.approx(0, abs=1e-5)
    assert fitted(0.25 * observed + clean) == pytest.approx(0.25, abs=1e-5)
    assert fitted(torch.zeros(400, 1)) == 0
    assert math.isnan(study.noise_fitted(observed.expand(400, 3), clean, clean, mask))


def test_every_critic_is_tuned_with_the_same_effort():
    jobs = study.fits((1, 2))
    assert len(set(jobs)) == len(jobs)
    counts = Counter(job.critic for job in jobs if job.part == "tuning")
    assert set(counts) == set(study.CRITICS) and len(set(counts.values())) == 1
    assert not {job.seed for job in jobs if job.part == "tuning"} & {
        job.seed for job in jobs if job.part != "tuning"
    }
    found = {study.key(job, study.WHERE) for job in jobs}  # every flag is one of the script's
    assert len(found) == len(jobs)
    assert study.key(jobs[0], study.WHERE | {"noise": "asymmetric"}) not in found
    tried = {key[-1] for key in found if key[:2] == ("tuning", "VRPO")}
    assert len(tried) == len(study.SEARCH["VRPO"]) + 3  # no two settings are the same


def test_report_is_made_from_the_rows_alone(tmp_path):
    numbers, rows = {key: 0.5 for key in study.MEASURES}, []
    for job in study.fits((1, 2)):
        base = dict(zip(study.KEY, study.key(job, study.WHERE), strict=True)) | {"passes": 1}
        for n in {512, job.rollouts}:
            measured = numbers | {"explained_variance": 0.1 * job.seed}
            rows.append(base | {"rollouts": n} | measured)
    out = tmp_path / "some.csv"
    study.save(out, rows)
    study.main(study.Args(out=out, seeds=(1, 2), report=True))
    text = (tmp_path / "some.md").read_text()
    assert "| plain | 0.15 (-0.49 to 0.79)" in text and "| VRPO | 0.00 | 0.00" in text
    assert (tmp_path / "some.png").stat().st_size > 10000
    # rows of other flags are not reported, and a part of the rows is enough
    pd.DataFrame(rows).assign(digest="other").to_csv(out, index=False)
    with pytest.raises(SystemExit, match="no rows of the present flags"):
        study.main(study.Args(out=out, seeds=(1, 2), report=True))
    some = pd.DataFrame(rows).query("part == 'vrpo' or (critic == 'VRPO' and noise == 0.1)")
    sections = study.report(some)
    assert sections[0].startswith("explained variance, clean returns, by noise rate")
    assert study.draw(some).axes


def test_a_fit_that_is_left_on_disk_is_taken_over(monkeypatch, tmp_path):
    """As after a kill -9 between a fit and its rows; NaN survives."""
    monkeypatch.setattr(study, "CACHE", tmp_path)
    monkeypatch.setattr(study, "fit", lambda job, where: [{"seed": job.seed, "auc": math.nan}])
    job = study.fits((1,))[0]
    task = study.task(job, study.WHERE, tmp_path / "rows.csv")
    assert task.rows() == []
    function, *arguments = task.call
    function(*arguments)
    task.save(task.rows())
    task.save([{"seed": 2, "auc": 0.5}])
    seen = study.results(tmp_path / "rows.csv")[["seed", "auc"]].to_numpy().tolist()
    assert seen[1] == [2, 0.5] and seen[0][0] == 1 and math.isnan(seen[0][1])


def test_committed_tables_are_those_of_the_committed_rows():
    rows = study.results(study.RESULTS / "critic_study.csv")
    frame = study.present(rows, (1, 2, 3, 4, 5))
    assert len(frame) == len(rows)  # none of other flags
    sections = study.report(frame)
    assert (study.RESULTS / "critic_study.md").read_text() == "\n".join(sections)
    for page in report.pages():
        text = page.read_text()
        assert report.insert(text, "critic_study", study.shown(sections)) == text, page

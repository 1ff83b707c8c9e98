"""What a wrong reward costs, and how wrong a verifier is."""

import csv
import json
import random
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.conftest import ROOT
from utils.report import audit, price


@pytest.mark.parametrize(
    ("success", "negatives", "positives", "m"),
    [
        (0.5, 0, 0, 1),
        (0.3, 0, 0, 1),
        (0.5, 0.2, 0.2, 0.6**-2),
        (0.5, 0.3, 0.3, 6.25),
        (0.3, 0.2, 0, 0.24 * 0.76 / (0.21 * 0.64)),
        (0.1, 0.2, 0.2, 0.26 * 0.74 / (0.09 * 0.36)),
        (0.2, 0, 0.25, 0.4 * 0.6 / (0.16 * 0.75**2)),
    ],
)
def test_the_price_by_hand(success, negatives, positives, m):
    assert price.price(success, negatives, positives) == pytest.approx(m)


def test_the_price_is_one_over_the_squared_correlation():
    joint = {(1, 1): 0.3 * 0.8, (0, 1): 0.3 * 0.2, (1, 0): 0.7 * 0.1, (0, 0): 0.7 * 0.9}
    told, right = np.array(list(joint)).T
    r = np.cov(told, right, aweights=list(joint.values()), ddof=0)
    assert price.price(0.3, 0.2, 0.1) == pytest.approx(r[0, 0] * r[1, 1] / r[0, 1] ** 2)


def test_so_many_more_answers_have_the_signal_of_true_rewards():
    """The difference of two policies' mean rewards, in units of its deviation."""
    rng, signals = np.random.default_rng(0), []
    for fn, fp, count in ((0, 0, 400), (0.2, 0.2, round(400 * price.price(0.32, 0.2, 0.2)))):
        means = [rng.binomial(count, fp + (1 - fn - fp) * v, 20_000) / count for v in (0.30, 0.34)]
        gain = means[1] - means[0]
        signals.append(gain.mean() / gain.std())
    assert signals[1] == pytest.approx(signals[0], rel=0.03)


def test_the_table_of_the_page():
    rates = {"10 % of": (0.1, 0.1), "20 % of": (0.2, 0.2), "30 % of": (0.3, 0.3)}
    rates |= {"20 % false n": (0.2, 0), "20 % false p": (0, 0.2)}
    text = (ROOT / "docs" / "verifier.md").read_text()
    for name, errors in rates.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        told = [float(cell) for cell in row.split("|")[2:-1]]
        found = [price.price(v, *errors) for v in (0.1, 0.3, 0.5, 0.7, 0.9)]
        assert told == pytest.approx(found, abs=0.051)


def test_what_the_command_says(capsys):
    price.main(price.Args(false_negatives=0.2, success=0.3))
    said = capsys.readouterr().out
    assert said.startswith("success rate 0.30: 1.36 times") and "J = 0.80" in said
    price.main(price.Args(false_negatives=0.2))
    assert capsys.readouterr().out.count("success rate") == len(price.SHOWN)
    for args, said in (
        ({"false_negatives": 0.6, "false_positives": 0.4}, "no more often"),
        ({"false_positives": -0.1}, "--false-positives -0.1: a share"),
        ({"success": 1.0}, "--success 1.0"),
    ):
        with pytest.raises(SystemExit, match=said):
            price.main(price.Args(**args))


@pytest.mark.parametrize(("found", "count"), [(0, 20), (1, 20), (13, 50), (50, 50)])
def test_intervals_are_those_of_scipy(found, count):
    for level in (0.95, 0.975):
        theirs = binomtest(found, count).proportion_ci(level)
        assert audit.exact(found, count, level) == pytest.approx((theirs.low, theirs.high))


def test_rates_by_hand():
    """Of 100 answers 40 are told right, 30 of them rightly, and of the others 6 are right too."""
    some = audit.Audit(0.4, (60, 40), (6, 30))
    v, fn, fp = some.rates(6 / 60, 30 / 40)
    assert (v, fn, fp) == pytest.approx((0.36, 6 / 36, 10 / 64))
    middle, low, high = some.found()
    assert middle[:4] == pytest.approx([v, fn, fp, 1 - fn - fp])
    assert middle[4] == pytest.approx(price.price(v, fn, fp))
    assert all(low < middle) and all(middle < high)
    judged_more = audit.Audit(0.4, (600, 400), (60, 300)).found()
    assert some.found(times=10)[1] == pytest.approx(judged_more[1])
    assert judged_more[0] == pytest.approx(middle) and judged_more[2][4] < high[4]


def test_intervals_hold_the_truth():
    """Of audits of 60 answers by such a verifier, nineteen in twenty or more."""
    rng, held = random.Random(3), []
    truth = audit.Audit(0.4, (60, 40), (6, 30)).measures(0.1, 0.75)
    for _ in range(100):
        rights = [sum(rng.random() < p for _ in range(30)) for p in (0.1, 0.75)]
        _, low, high = audit.Audit(0.4, (30, 30), tuple(rights)).found()
        held.append((low <= truth).all() and (truth <= high).all())
    assert sum(held) >= 95


def test_how_many_more_are_worth_judging():
    some = audit.Audit(0.5, (50, 50), (5, 45))
    more = some.more(0.25)
    middle, _, high = some.found(1 + more / 100)
    assert more > 0 and high[4] <= 1.25 * middle[4]
    assert some.found(1 + 0.8 * more / 100)[2][4] > 1.25 * middle[4]
    assert audit.Audit(0.5, (5000, 5000), (500, 4500)).more(0.25) == 0
    assert audit.Audit(0.5, (50, 50), (25, 25)).more(0.25) == float("inf")  # it knows nothing


@pytest.fixture
def samples(tmp_path):
    """40 answers of the last update, 8 of them told right, and older ones."""
    rows = [
        {
            "update": u,
            "question": f"q{i}",
            "completion": f"c{i}",
            "reference": "r",
            "right": 1.0 * (i < 8),
        }
        for u in (0, 5)
        for i in range(40)
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def drawn(out) -> list[dict]:
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("count", "told"), [(10, (5, 5)), (30, (22, 8)), (99, (32, 8))])
def test_draw(samples, tmp_path, count, told):
    """Half of them told right, or all that there are; together they stand for the whole file."""
    audit.Draw(samples, tmp_path / "judge.csv", count).run()
    rows = drawn(tmp_path / "judge.csv")
    for word, n, whole in (("0", told[0], 32), ("1", told[1], 8)):
        some = [float(row["weight"]) for row in rows if row["told"] == word]
        assert len(some) == n and sum(some) == pytest.approx(whole, rel=1e-4)
    assert len({row["question"] for row in rows}) == len(rows)
    assert {row["right"] for row in rows} == {""}
    with pytest.raises(SystemExit, match="exists: it may be filled in"):
        audit.Draw(samples, tmp_path / "judge.csv").run()
    audit.Draw(samples, tmp_path / "again.csv", count).run()
    audit.Draw(samples, tmp_path / "other.csv", count, seed=2).run()
    again, other = (drawn(tmp_path / f"{name}.csv") for name in ("again", "other"))
    assert rows == again != other


def test_draw_asks_a_reward_function(samples, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def even(q, a, c):\n    return int(c[-1][1:]) % 2 == 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    audit.Draw(samples, tmp_path / "judge.csv", 12, "mine:even").run()
    for row in drawn(tmp_path / "judge.csv"):
        assert int(row["told"]) == (int(row["completion"][1:]) % 2 == 0)


def test_read(samples, tmp_path, capsys):
    """The verifier is right of what it calls right, and misses every fourth of the others."""
    out = tmp_path / "judge.csv"
    audit.Draw(samples, out, 16).run()
    with pytest.raises(SystemExit, match="answer 1 has no right: put 1 or 0 there"):
        audit.Read(out).run()
    rows = sorted(drawn(out), key=lambda row: row["told"])
    for i, row in enumerate(rows):
        row["right"] = 1 if row["told"] == "1" or i < 2 else 0
    out.write_text(audit.as_csv(rows))
    found = audit.load(out)
    assert (found.told_right, found.counts, found.rights) == (pytest.approx(0.2), (8, 8), (2, 8))
    capsys.readouterr()
    audit.Read(out).run()
    said = capsys.readouterr().out
    assert "right answers    0.400" in said and "false negatives  0.500" in said
    m = price.price(0.4, 0.5, 0)
    assert f"Plan for {m:.1f} times the episodes" in said and "answers more" in said
    audit.Read(out, within=1.0).run()
    counts = [
        int(re.search(r"Some (\d+) answers more", x)[1]) for x in (said, capsys.readouterr().out)
    ]
    assert counts[0] > 2 * counts[1] > 0  # to know it less well takes fewer
    out.write_text(audit.as_csv([row | {"right": 0} for row in rows]))
    audit.Read(out).run()
    assert "All of them are right, or none" in capsys.readouterr().out
    lines = "".join(json.dumps({"told": row["told"], "right": row["right"]}) + "\n" for row in rows)
    (tmp_path / "plain.jsonl").write_text(lines)
    assert audit.load(tmp_path / "plain.jsonl").told_right == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("told,right\n1,1\n", "such that are told wrong"),
        ("told,right\n1,2\n", "answer 1: right is 2, where 0 or 1"),
        ("told,right\n1,yes\n", "answer 1: right is 'yes'"),
        ("told\n1\n", "answer 1 has no right"),
        ("told,right,weight\n1,1,0\n", "a weight of 0"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SystemExit, match=said):
        audit.Read(tmp_path / "a.csv").run()

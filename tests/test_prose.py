"""Numbers that stand in the prose of docs/results are those of the committed rows. A claim is a
sentence of a page with places for numbers, and the numbers: a mean and the ends of its interval."""

import re
from functools import cache

import numpy as np
import pytest

from benchmark import report
from tests.conftest import ROOT

NOISY = [arm for arm in report.ARMS if arm not in report.CONTROLS]
MORE = "symmetric 0.3, 25 answers"
FLIPS, CLEAN, LONG = "symmetric 0.2", "no noise", "PPO, lambda 1"
WORTH, READS = "symmetric 0.3", "VRPO that reads"


@cache
def runs(name: str):
    return report.by_run(report.load(name))


def less(name: str, arms, method: str, rival: str, key: str, rival_arm: str | None = None):
    """By seed, the difference of two methods, averaged over `arms`: one name or a list."""
    arms = [arms] if isinstance(arms, str) else arms
    pairs = [
        report.values(runs(name), arm, method, key)
        - report.values(runs(name), rival_arm or arm, rival, key)
        for arm in arms
    ]
    return (sum(pairs) / len(pairs)).dropna()


def grid(method: str, arms=NOISY, key: str = "evaluations"):
    return less("noise_grid", arms, method, "PPO", key)


def small(name: str, method: str, rival: str, arm: str = FLIPS, key: str = "evaluations"):
    return less(name, arm, method, rival, key)


def worth(method: str, rival: str, arm: str = WORTH, rival_arm: str | None = None):
    return less("critic_worth", arm, method, rival, "last", rival_arm)


def long(method: str, rival: str = LONG, arm: str = FLIPS, name: str = "long_answers"):
    return less(name, arm, method, rival, "mean")


def several(*names: str, arm: str, method: str, rival: str) -> np.ndarray:
    return np.concatenate([long(method, rival, arm, name) for name in names])


def price(arm: str, rival: str, key: str = "evaluations"):
    return less("price", arm, "PPO", "PPO", key, rival)


def parts(method: str):
    """On the five seeds that VRPO's parts were run on."""
    return long(method, name="long_parts").loc[11:15]


# Numbers are written without a sign, but where the claim asks for one: {0:+}, {0:-} (the opposite).
CLAIMS = [
    ("noise-grid", "it lies {0:-} below PPO ({1:+} to {2:+})", lambda: grid("VRPO")),
    ("noise-grid", "REINFORCE++ has none and lies only {0:-} below PPO ({1:+} to {2:+})",
     lambda: grid("REINFORCE++")),
    ("noise-grid", "(GRPO: {0:+}, {1:+} to {2:+})", lambda: grid("GRPO", key="last")),
    ("noise-grid", "DVPO ends {0:-} below PPO ({1:+} to {2:+})", lambda: grid("DVPO", "length", "last")),
    ("noise-grid", "robust PPO {0:-} ({1:+} to {2:+})", lambda: grid("robust PPO", "length", "last")),
    ("noise-grid", "VRPO ends {0:-} below, with an interval that includes zero ({1:+} to {2:+})",
     lambda: grid("VRPO", "length", "last")),
    ("noise-grid", "GRPO is behind PPO by {0:-} ({2:-} to {1:-})",
     lambda: small("long_runs", "GRPO", "PPO")),
    ("noise-grid", "robust PPO by {0:-} ({2:-} to {1:-})", lambda: small("long_runs", "robust PPO", "PPO")),
    ("noise-grid", "GRPO lies {0:-} below PPO ({2:-} to {1:-})",
     lambda: small("science_methods", "GRPO", "PPO")),
    ("noise-grid", "VRPO cannot be distinguished from PPO ({1:+} to {2:+})",
     lambda: small("science_methods", "VRPO", "PPO")),
    ("inside-vrpo", "end {0:-} below PPO ({1:+} to {2:+})",
     lambda: small("length_bias", "semantic losses alone", "PPO", "length", "last")),
    ("inside-vrpo", "and {0:-} in the mean of the evaluations ({1:+} to {2:+})",
     lambda: small("length_bias", "semantic losses alone", "PPO", "length")),
    ("inside-vrpo", "({0:+} at the end, {1:+} to {2:+})",
     lambda: small("length_bias", "VRPO, lambda 1", "PPO, lambda 1", "length", "last")),
    ("price", "cost PPO {0:-}** in the mean of the evaluations ({2:-} to {1:-})",
     lambda: price(WORTH, CLEAN)),
    ("price", "and {0:-} at the end", lambda: price(WORTH, CLEAN, "last")),
    ("price", "give {0} of it back** ({1} to {2})", lambda: price(MORE, WORTH)),
    ("price", "lies {0:-} below true rewards ({1:+} to {2:+})", lambda: price(MORE, CLEAN)),
    ("price", "and {0:-} at the end ({1:+} to {2:+})", lambda: price(MORE, CLEAN, "last")),
    ("critic-worth", "{0} above PPO ({1} to {2})", lambda: worth("oracle 1", "PPO")),
    ("critic-worth", "PPO at λ = 0.5 ends {0:-} below PPO at λ = 0.95 ({2:-} to {1:-})",
     lambda: worth("PPO, lambda 0.5", "PPO")),
    ("critic-worth", "{0:+} ({1:+} to {2:+}) against no noise", lambda: worth(READS, READS, WORTH, CLEAN)),
    ("critic-worth", "it gains **{0} ({1} to {2})**", lambda: worth(READS, "PPO")),
    ("critic-worth", "than PPO without noise too, by {0} ({1} to {2})",
     lambda: worth(READS, "PPO", CLEAN)),
    ("critic-worth", "gains {0} over PPO ({1} to {2})", lambda: worth("PPO that reads", "PPO")),
    ("critic-worth", "VRPO's critic {0} more ({1} to {2})", lambda: worth(READS, "PPO that reads")),
    ("critic-worth", "code and decoder | {0:+} ({1:+} to {2:+})",
     lambda: worth("reads, beta 0", "PPO that reads")),
    ("critic-worth", "code's price | {0:+} ({1:+} to {2:+})",
     lambda: worth("reads, no semantic losses", "reads, beta 0")),
    ("critic-worth", "semantic losses | {0:+} ({1:+} to {2:+})",
     lambda: worth(READS, "reads, no semantic losses")),
    ("critic-worth", "{0:+} over PPO ({1:+} to {2:+})", lambda: worth("Vine 4", "PPO")),
    ("critic-worth", "and {0:+} ({1:+} to {2:+}) where the verdicts are clean",
     lambda: worth("Vine 4, clean", "PPO")),
    ("long-answers", "PPO at 0.95 lies {0:-} ({2:-} to {1:-}) below in seeds 1 to 5",
     lambda: long("PPO, lambda 0.95", arm=CLEAN)),
    ("long-answers", "and {0} ({1} to {2}) in seeds 11 to 15",
     lambda: long(LONG, "PPO, lambda 0.95", CLEAN, "long_default")),
    ("long-answers", "still, {0:-} ({2:-} to {1:-})", lambda: long("mean reward, lambda 0.95", arm=CLEAN)),
    ("long-answers", "it gives back {0} ({1} to {2})",
     lambda: long("PPO, lambda 0.95", "mean reward, lambda 0.95", CLEAN)),
    ("long-answers", "PPO at 0.95 lies {0:-} below ({2:-} to {1:-})", lambda: long("PPO, lambda 0.95")),
    ("long-answers", "lies {0} *above* 1 in the mean of the differences ({1:+} to {2:+})",
     lambda: long("PPO, lambda 0.95", LONG, FLIPS, "long_default")),
    ("long-answers", "from PPO: {0:+} ({1:+} to {2:+})", lambda: long("REINFORCE++")),
    ("long-answers", "Nor can DVPO ({0:+}, {1:+} to {2:+})", lambda: long("DVPO, lambda 1")),
    ("long-answers", "robust PPO ({0:+}, {1:+} to {2:+})", lambda: long("robust PPO, lambda 1")),
    ("long-answers", "RLOO lies {0:-} below PPO ({2:-} to {1:-})", lambda: long("RLOO")),
    ("long-answers", "GRPO {0} ({1:+} to {2:+})", lambda: long(LONG, "GRPO")),
    ("long-answers", "RLOO lies {0:-} below REINFORCE++ too ({2:-} to {1:-})",
     lambda: long("RLOO", "REINFORCE++")),
    ("long-answers", "Over fifteen seeds it gains {0} ({1:+} to {2:+})",
     lambda: several("long_answers", "long_parts", arm=FLIPS, method="VRPO, lambda 1", rival=LONG)),
    ("long-answers", "were run on it gains {0}", lambda: parts("VRPO, lambda 1")),
    ("long-answers", "without its price it gains {0}", lambda: parts("no price")),
    ("long-answers", "without its semantic losses {0}", lambda: parts("no semantic losses")),
    ("long-answers", "without its code {0}", lambda: parts("no code")),
    ("long-answers", "gains {0} over PPO at λ = 1 with answers of 25 tokens ({1} to {2})",
     lambda: long("VRPO that reads, lambda 0.5", LONG, "25 tokens", "long_lengths")),
    ("long-answers", "and {0} with 56 ({1} to {2})",
     lambda: long("VRPO that reads, lambda 0.5", LONG, "56 tokens", "long_lengths")),
]  # fmt: skip


class Said(float):
    """A number as pages write it: three decimals, a true minus."""

    def __format__(self, how: str) -> str:
        x = -self if how == "-" else float(self)
        return f"{x:+.3f}".replace("-", "−") if how == "+" else f"{x:.3f}".replace("-", "−")


@pytest.mark.parametrize("page, sentence, found", CLAIMS, ids=[x[1][:40] for x in CLAIMS])
def test_a_number_in_prose_is_that_of_the_rows(page, sentence, found):
    x = np.asarray(found(), float)
    assert len(x) >= 3
    numbers = report.student(x)
    claim = sentence.format(*map(Said, numbers))
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "results" / f"{page}.md").read_text())
    assert claim in text, f"the rows say: {claim}"


def test_the_check_of_prose_sees_a_wrong_number():
    page, sentence, found = CLAIMS[0]
    with pytest.raises(AssertionError, match="the rows say"):
        test_a_number_in_prose_is_that_of_the_rows(page, sentence, lambda: found() + 0.01)

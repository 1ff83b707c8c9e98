"""What ails a run: reads args.json and metrics.csv and says in plain words which known failures
show, with the evidence and a flag.

    python -m utils.diagnose runs/A runs/B                   # every run ends with this
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import tyro

from utils.args import GROUPED, command
from utils.errors import stop, visible
from utils.report.plot import read_run

Series = dict[int, float]  # update: value
LEAST = 6  # updates; of fewer nothing is said


@dataclass
class Finding:
    """A failure, the numbers that show it, the first update from which on they do, and what to
    try."""

    name: str
    evidence: str
    since: int
    advice: str

    def __str__(self) -> str:
        return f"{self.name} (from update {self.since}): {self.evidence}. Try {self.advice}"


class History:
    """The metrics of a run by update, with the questions that the signatures ask of them."""

    def __init__(self, flags: dict, metrics: dict[str, Series]):
        self.flags, self.metrics = flags, metrics

    def has(self, *keys: str) -> bool:
        """Whether each of them was logged in at least LEAST updates."""
        return all(len(self.metrics.get(key, {})) >= LEAST for key in keys)

    def early(self, key: str) -> float:
        """Mean over the first fifth of the updates."""
        values = list(self.metrics[key].values())
        return fmean(values[: max(1, len(values) // 5)])

    def late(self, key: str) -> float:
        """Mean over the last third of the updates."""
        values = list(self.metrics[key].values())
        return fmean(values[-max(1, len(values) // 3) :])

    def running(self, key: str) -> dict[int, float]:
        """Means of five updates in a row by the last of them; the first of these stands for all
        updates up to it."""
        updates, values = list(self.metrics[key]), list(self.metrics[key].values())
        means = {updates[i]: fmean(values[i - 4 : i + 1]) for i in range(4, len(values))}
        return {updates[0]: means.pop(updates[4])} | means

    def since(self, key: str, holds) -> int:
        """The first update of the last stretch in which the running mean satisfies `holds`; the
        last update if there is none."""
        means = self.running(key)
        held = [update for update, mean in means.items() if holds(mean)] or [max(means)]
        broken = [update for update, mean in means.items() if not holds(mean) and update < held[-1]]
        return min(update for update in held if update > max(broken, default=-1))

    def now(self, flag: str, otherwise: float) -> float:
        """The flag's present value, a number."""
        value = self.flags.get(flag, otherwise)
        if not isinstance(value, int | float):
            stop(f"args.json has {flag} {value!r}, where a number is wanted")
        return value


# what makes the rewards of a noise channel truer
TRUER = {
    "symmetric": "a lower --noise-rate", "persistent": "a lower --noise-rate", "group": "a lower --noise-rate",
    "length": "a lower --noise-rate", "asymmetric": "a lower --false-positive-rate and --false-negative-rate",
    "gaussian": "a lower --noise-rate", "majority-vote": "more --vote-samples or a stronger --model",
    "random": "another --noise, as nothing can be learnt from this control",
}  # fmt: skip


def truer_reward(run: History) -> str:
    for flag in ("reward_model", "reward_fn"):
        if run.flags.get(flag):
            return f"another --{flag.replace('_', '-')}"
    return TRUER.get(
        run.flags.get("noise"), "problems whose answers are checked more surely (--dataset)"
    )


def more_kl(run: History) -> str:
    return f"--kl-coef {max(0.05, 2 * run.now('kl_coef', 0.0)):g}"


def smaller_steps(run: History) -> str:
    return "a lower --learning-rate" + (", fewer --epochs" if run.now("epochs", 1) > 1 else "")


def useless_channel(run: History) -> Finding | None:
    """The observed reward says next to nothing about the true one. (Another judge may be right
    about answers to one prompt and wrong between prompts, which this number does not see.)"""
    judged = run.flags.get("reward_model") or run.flags.get("reward_fn")
    if not run.has("reward/youden_j") or judged:
        return None
    j = fmean(run.metrics["reward/youden_j"].values())
    if j >= 0.2:
        return None
    first = next(iter(run.metrics["reward/youden_j"]))
    text = f"reward/youden_j is {j:.2f} on average, where 1 is a clean channel and 0 a coin"
    return Finding("the reward is nearly useless", text, first, truer_reward(run))


def blind_critic(run: History) -> Finding | None:
    """The critic explains nothing of the returns that it is fitted to. (Values that are sampled are
    fitted to nothing: few samples make them noisy, and right on average all the same.)"""
    key = "critic/explained_variance"
    if "vine_samples" in run.flags:
        return None
    if not run.has(key) or run.late(key) >= 0.02 or useless_channel(run):
        return None
    late = run.late(key)
    says = "misleads" if late < -0.02 else "knows nothing"
    advice = "a higher --critic-learning-rate, the recipe critic_warmup"
    if "beta" in run.flags:
        advice += ", a lower --beta or lower --lambda-ent and --lambda-ppl"
    text = f"{key} is {late:.3f} over the last third of the run"
    losses = list(run.metrics.get("losses/value", {}).values())
    if losses and max(losses) > 10 * median(
        losses
    ):  # it was thrown far off and could not come back
        text += f"; losses/value went up to {max(losses):.0f}, its median is {median(losses):.1f}"
        advice = "a lower --critic-learning-rate and --head-learning-rate"
    return Finding(f"the critic {says}", text, run.since(key, lambda x: x < 0.02), advice)


def collapsed_bottleneck(run: History) -> Finding | None:
    """The latent code is the prior: nothing passes from the hidden states to the value."""
    if not run.has("vrpo/ib_kl") or run.late("vrpo/ib_kl") >= 0.03:
        return None
    text = f"vrpo/ib_kl is {run.late('vrpo/ib_kl'):.4f} nats over the last third of the run"
    advice = "a lower --beta or a longer --beta-warmup"
    return Finding(
        "the bottleneck has collapsed to the prior",
        text,
        run.since("vrpo/ib_kl", lambda x: x < 0.03),
        advice,
    )


def dominating_kl(run: History) -> Finding | None:
    """The price of the code outweighs the error that it is paid for."""
    if not run.has("vrpo/ib_kl", "losses/value") or not run.flags.get("beta"):
        return None
    warmup = max(1, run.now("beta_warmup", 1))
    prices = {
        u: run.now("beta", 0.0) * min(1.0, u / warmup) * kl
        for u, kl in run.metrics["vrpo/ib_kl"].items()
    }
    run = History(run.flags, run.metrics | {"price": prices})
    price, error = run.late("price"), run.late("losses/value")
    if price <= error:
        return None
    text = f"beta L_KL is {price:.2f} over the last third of the run, the value loss {error:.2f}"
    return Finding(
        "the bottleneck's KL dominates",
        text,
        run.since("price", lambda x: x > error),
        "a lower --beta",
    )


def starved_tokens(run: History) -> Finding | None:
    """The semantic losses act on hardly any token, and the critic forgets the language."""
    key, share = "vrpo/perplexity_aux", run.now("token_ratio", 1.0)
    weights = run.now("lambda_ppl", 0.0) + run.now("lambda_ent", 0.0)
    if not run.has(key) or share >= 0.05 or weights == 0:
        return None
    return Finding(
        "the semantic losses act on hardly any token",
        f"--token-ratio is {share:g}; {key} is {run.late(key):.2f} over the last third of the run",
        next(iter(run.metrics[key])),
        "--token-ratio 0.8",
    )


def inflating_length(run: History) -> Finding | None:
    """Answers grow, and the truth does not grow with them."""
    key, truth = "charts/response_length", "reward/clean"
    if not run.has(key, truth):
        return None
    before, after = run.early(key), run.late(key)
    gain = run.late(truth) - run.early(truth)
    if after < 1.25 * before or gain > 0.02:
        return None
    text = f"{key} went from {before:.0f} to {after:.0f} tokens while {truth} went from {run.early(truth):.2f} to {run.late(truth):.2f}"
    advice = f"{more_kl(run)}, {truer_reward(run)}"
    return Finding(
        "answers grow without getting better",
        text,
        run.since(key, lambda x: x >= 1.25 * before),
        advice,
    )


def hacked_reward(run: History) -> Finding | None:
    """What the optimiser sees rises while the truth falls."""
    seen, truth = "reward/observed", "reward/clean"
    if not run.has(seen, truth):
        return None
    up, down = run.late(seen) - run.early(seen), run.late(truth) - run.early(truth)
    prompts = len(run.metrics[truth]) * max(
        1, run.now("prompts_per_update", 1)
    )  # the samples of one may all be right or wrong
    error = (
        0.25 * (5 + 3) / prompts
    ) ** 0.5  # at most, of a share in a third less that in a fifth of the run
    if up < max(0.05, 2 * error) or down > -max(0.03, 2 * error):
        return None
    level = run.early(truth) - 0.03
    text = f"{seen} rose by {up:.2f} while {truth} fell by {-down:.2f}"
    return Finding(
        "the reward is being exploited",
        text,
        run.since(truth, lambda x: x < level),
        f"{more_kl(run)}, fewer --updates",
    )


def collapse(run: History) -> Finding | None:
    """Clean held-out performance was better before."""
    key = next(
        (k for k in ("eval/accuracy", "eval/average") if len(run.metrics.get(k, {})) >= 3), None
    )
    if key is None:
        return None
    values = run.metrics[key]
    best = max(values, key=values.get)
    peak, last = values[best], values[max(values)]
    error = (
        2 * peak * (1 - min(peak, 1)) / max(1, run.now("eval_size", 512))
    ) ** 0.5  # of a difference of two shares
    fallen = max(0.03, 2 * error)
    if peak - last <= fallen:
        return None
    text = f"{key} was {peak:.3f} after update {best} and is {last:.3f} now"
    since = min(update for update, x in values.items() if update > best and peak - x > fallen)
    advice = f"{smaller_steps(run)}, {more_kl(run)}, fewer --updates"
    return Finding("performance fell after a peak", text, since, advice)


def noisy_advantages(run: History) -> Finding | None:
    """Nearly all of the variance of the advantages comes from the errors of the reward, not from
    the outcomes."""
    key = "objective/advantage_noise"
    if not run.has(key) or run.late(key) < 0.9:
        return None
    if (
        run.has("reward/clean") and run.late("reward/clean") > 0.9
    ):  # hardly a wrong answer is left to tell from the right ones
        return None
    text = f"the reward's errors make {run.late(key):.0%} of the variance of the advantages over the last third of the run ({key})"
    advice = f"{truer_reward(run)}; if there is none, more --prompts-per-update"
    if (
        run.now("temperature", 1.0) < 0.7
    ):  # answers to one prompt are all alike, and only the errors tell them apart
        advice = "--temperature 1"
    return Finding(
        "the advantages are mostly noise", text, run.since(key, lambda x: x >= 0.9), advice
    )


def dead_entropy(run: History) -> Finding | None:
    """The policy has stopped exploring before it was right."""
    key = "objective/entropy"
    if not run.has(key) or run.late(key) >= (level := max(0.005, 0.1 * run.early(key))):
        return None
    if run.has("reward/clean") and run.late("reward/clean") > 0.9:
        return None
    text = f"{key} went from {run.early(key):.3f} to {run.late(key):.4f} nats per token"
    advice = "--entropy-coef 0.003, a lower --learning-rate"
    return Finding("exploration is gone", text, run.since(key, lambda x: x < level), advice)


def silent_groups(run: History) -> Finding | None:
    """The answers of a group all get the same reward, so they teach a method that compares them
    nothing."""
    key = "grpo/zero_variance_groups"
    compares = run.flags.get("advantage", "grpo") in GROUPED
    if not compares or not run.has(key) or run.late(key) < 0.8:
        return None
    text = f"{key} is {run.late(key):.2f} over the last third of the run"
    advice = "harder or easier problems, more --samples-per-prompt"
    return Finding("groups teach nothing", text, run.since(key, lambda x: x >= 0.8), advice)


def large_steps(run: History) -> Finding | None:
    """The policy moves, or once moved, far from the one that sampled."""
    for key, limit in (("losses/approx_kl", 0.1), ("losses/clipfrac", 0.3)):
        means = run.running(key) if run.has(key) else {}
        if over := [update for update, x in means.items() if x >= limit]:
            text = f"{key} was up to {max(means.values()):.2f} on average over five updates, where less than {limit} is usual"
            return Finding("the policy's steps are too large", text, over[0], smaller_steps(run))
    return None


def cut_answers(run: History) -> Finding | None:
    """Many answers never end."""
    key = "charts/eos_rate"
    if not run.has(key) or run.late(key) >= 0.7:
        return None
    text = f"{key} is {run.late(key):.2f} over the last third of the run"
    return Finding(
        "answers are cut off", text, run.since(key, lambda x: x < 0.7), "a higher --max-new-tokens"
    )


SIGNATURES = (
    useless_channel, large_steps, blind_critic, collapsed_bottleneck, dominating_kl, starved_tokens, noisy_advantages, silent_groups,
    cut_answers, inflating_length, hacked_reward, dead_entropy, collapse,
)  # fmt: skip


def diagnose(folder: Path) -> list[Finding]:
    """The findings of a run, those first that began first (causes tend to precede); none for a run
    of fewer than LEAST updates."""
    flags, by_episodes = read_run(folder)
    updates = {episodes: int(update) for episodes, update in by_episodes["update"].items()}
    metrics = {
        key: {updates[e]: x for e, x in series.items()} for key, series in by_episodes.items()
    }
    findings = [
        finding for signature in SIGNATURES if (finding := signature(History(flags, metrics)))
    ]
    return sorted(findings, key=lambda finding: finding.since)


def sentences(folder: Path) -> str:
    """The findings as a list, or that there are none."""
    findings = "".join(f"\n- {finding}" for finding in diagnose(folder))
    if not findings and len((folder / "metrics.csv").read_text().splitlines()) < LEAST + 2:
        return f"none, fewer than {LEAST} updates are too few"
    return findings or "no known failure shows"


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """run directories"""


def main(args: Args) -> None:
    if not args.runs:
        stop("give at least one run directory")
    for folder in args.runs:
        print(visible(f"{folder}: {sentences(folder)}"))


if __name__ == "__main__":
    main(command(Args, "python -m utils.diagnose", __doc__))

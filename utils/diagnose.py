"""What ails a run: reads args.json and metrics.csv and says in plain words which known failures show, with the evidence and a flag.

python -m utils.diagnose runs/A runs/B                                  # every run does this for itself at its end
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import tyro

from utils.errors import stop
from utils.plot import read_run

Series = dict[int, float]  # update: value
LEAST = 6  # updates; of fewer nothing is said


@dataclass
class Finding:
    """A failure, the numbers that show it, the first update from which on they do, and what to try."""

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

    def worst(self, key: str) -> float:
        """The largest running mean of five."""
        return max(self.running(key))

    def running(self, key: str) -> list[float]:
        """Means of each update and the four before it."""
        values = list(self.metrics[key].values())
        return [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]

    def since(self, key: str, holds) -> int:
        """The first update from which on a running mean of five satisfies `holds`; the last one if none does."""
        updates, smooth = list(self.metrics[key]), self.running(key)
        start = len(smooth) - 1
        while start > 0 and holds(smooth[start]) and holds(smooth[start - 1]):
            start -= 1
        return updates[start]


def useless_channel(run: History) -> Finding | None:
    """The observed reward says next to nothing about the true one. (A reward model may be right about answers to one prompt and wrong
    between prompts, which this number does not see.)"""
    if not run.has("reward/youden_j") or run.flags.get("reward_model"):
        return None
    j = fmean(run.metrics["reward/youden_j"].values())
    if j >= 0.2:
        return None
    first = next(iter(run.metrics["reward/youden_j"]))
    text = f"reward/youden_j is {j:.2f} on average, where 1 is a clean channel and 0 a coin"
    return Finding("the reward is nearly useless", text, first, "a lower --noise-rate or another --reward-model")


def blind_critic(run: History) -> Finding | None:
    """The critic explains nothing of the returns that it is fitted to."""
    key = "critic/explained_variance"
    if not run.has(key) or run.late(key) >= 0.02 or useless_channel(run):
        return None
    late = run.late(key)
    says = "misleads" if late < -0.02 else "knows nothing"
    advice = "a higher --critic-learning-rate, --critic-warmup 5"
    if "beta" in run.flags and run.flags.get("bottleneck_layers"):
        advice += ", a lower --beta or lower --lambda-ent and --lambda-ppl"
    text = f"{key} is {late:.3f} over the last third of the run"
    losses = list(run.metrics.get("losses/value", {}).values())
    if losses and max(losses) > 10 * median(losses):  # it was thrown far off and could not come back
        text += f"; losses/value went up to {max(losses):.0f}, its median is {median(losses):.1f}"
        advice = "a lower --critic-learning-rate and --head-learning-rate"
    return Finding(f"the critic {says}", text, run.since(key, lambda x: x < 0.02), advice)


def collapsed_bottleneck(run: History) -> Finding | None:
    """The code is the prior: nothing passes from the hidden states to the value."""
    if not run.has("vrpo/ib_kl", "vrpo/latent_std") or not run.flags.get("bottleneck_layers"):
        return None
    kl, sigma = run.late("vrpo/ib_kl"), run.late("vrpo/latent_std")
    if kl >= 0.03 or sigma <= 0.95:
        return None
    text = f"vrpo/ib_kl is {kl:.4f} nats and vrpo/latent_std {sigma:.2f} over the last third of the run"
    advice = "a lower --beta or a longer --beta-warmup"
    return Finding(
        "the bottleneck has collapsed to the prior", text, run.since("vrpo/ib_kl", lambda x: x < 0.03), advice
    )


def dominating_kl(run: History) -> Finding | None:
    """The price of the code outweighs the error that it is paid for."""
    if not run.has("vrpo/ib_kl", "losses/value") or not run.flags.get("beta"):
        return None
    price, error = run.flags["beta"] * run.late("vrpo/ib_kl"), run.late("losses/value")
    if price <= error:
        return None
    text = f"beta L_KL is {price:.2f} over the last third of the run, the value loss {error:.2f}"
    level = error / run.flags["beta"]
    return Finding(
        "the bottleneck's KL dominates", text, run.since("vrpo/ib_kl", lambda x: x > level), "a lower --beta"
    )


def starved_tokens(run: History) -> Finding | None:
    """The semantic losses act on hardly any token, and the critic forgets the language."""
    key = "vrpo/perplexity_aux"
    if not run.has(key, "vrpo/active_tokens") or not (run.flags.get("lambda_ppl") or run.flags.get("lambda_ent")):
        return None
    share = run.late("vrpo/active_tokens")
    if share >= 0.1:
        return None
    text = f"vrpo/active_tokens is {share:.3f} over the last third of the run, {key} {run.late(key):.2f}"
    return Finding(
        "the semantic losses act on hardly any token", text, next(iter(run.metrics[key])), "--token-ratio 0.8"
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
    advice = "--kl-coef 0.05, a reward that does not see the length, --noise none to compare"
    return Finding("answers grow without getting better", text, run.since(key, lambda x: x >= 1.25 * before), advice)


def hacked_reward(run: History) -> Finding | None:
    """What the optimiser sees rises while the truth falls."""
    seen, truth = "reward/observed", "reward/clean"
    if not run.has(seen, truth):
        return None
    up, down = run.late(seen) - run.early(seen), run.late(truth) - run.early(truth)
    episodes = len(run.metrics[truth]) * run.flags["prompts_per_update"] * run.flags["samples_per_prompt"]
    error = (0.25 * (5 + 3) / episodes) ** 0.5  # at most, of a share in a third less that in a fifth of the episodes
    if up < max(0.05, 2 * error) or down > -max(0.03, 2 * error):
        return None
    level = run.early(truth) - 0.03
    text = f"{seen} rose by {up:.2f} while {truth} fell by {-down:.2f}"
    return Finding(
        "the reward is being exploited", text, run.since(truth, lambda x: x < level), "--kl-coef 0.05, fewer --updates"
    )


def collapse(run: History) -> Finding | None:
    """Clean held-out performance was better before."""
    key = next((k for k in ("eval/accuracy", "eval/average") if len(run.metrics.get(k, {})) >= 3), None)
    if key is None:
        return None
    values = run.metrics[key]
    best = max(values, key=values.get)
    peak, last = values[best], values[max(values)]
    error = (2 * peak * (1 - min(peak, 1)) / run.flags.get("eval_size", 512)) ** 0.5  # of a difference of two shares
    if peak - last <= max(0.03, 2 * error):
        return None
    text = f"{key} was {peak:.3f} after update {best} and is {last:.3f} now"
    return Finding(
        "performance fell after a peak", text, best, "a lower --learning-rate, --kl-coef 0.01, fewer --updates"
    )


def noisy_advantages(run: History) -> Finding | None:
    """Nearly all of the variance of the advantages comes from the errors of the reward, not from the outcomes."""
    key = "objective/advantage_noise"
    if not run.has(key) or run.late(key) < 0.9:
        return None
    if (
        run.has("reward/clean") and run.late("reward/clean") > 0.9
    ):  # hardly a wrong answer is left to tell from the right ones
        return None
    text = f"the reward's errors make {run.late(key):.0%} of the variance of the advantages over the last third of the run ({key})"
    advice = "a lower --noise-rate or another --reward-model; if there is none, more --prompts-per-update"
    if (
        run.flags.get("temperature", 1.0) < 0.7
    ):  # answers to one prompt are all alike, and only the errors tell them apart
        advice = "--temperature 1"
    return Finding("the advantages are mostly noise", text, run.since(key, lambda x: x >= 0.9), advice)


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
    """The answers of a group all get the same reward, so they teach nothing."""
    key = "grpo/zero_variance_groups"
    if not run.has(key) or run.late(key) < 0.8:
        return None
    text = f"{key} is {run.late(key):.2f} over the last third of the run"
    advice = "harder or easier problems, more --samples-per-prompt"
    return Finding("groups teach nothing", text, run.since(key, lambda x: x >= 0.8), advice)


def large_steps(run: History) -> Finding | None:
    """The policy moves, or once moved, far from the one that sampled."""
    for key, limit in (("losses/approx_kl", 0.1), ("losses/clipfrac", 0.3)):
        if run.has(key) and run.worst(key) >= limit:
            updates = list(run.metrics[key])
            since = next(update for update, x in zip(updates, run.running(key), strict=True) if x >= limit)
            text = (
                f"{key} was up to {run.worst(key):.2f} on average over five updates, where less than {limit} is usual"
            )
            return Finding("the policy's steps are too large", text, since, "a lower --learning-rate, fewer --epochs")
    return None


def cut_answers(run: History) -> Finding | None:
    """Many answers never end."""
    key = "charts/eos_rate"
    if not run.has(key) or run.late(key) >= 0.7:
        return None
    text = f"{key} is {run.late(key):.2f} over the last third of the run"
    return Finding("answers are cut off", text, run.since(key, lambda x: x < 0.7), "a higher --max-new-tokens")


SIGNATURES = (
    useless_channel, large_steps, blind_critic, collapsed_bottleneck, dominating_kl, starved_tokens, noisy_advantages, silent_groups,
    cut_answers, inflating_length, hacked_reward, dead_entropy, collapse,
)  # fmt: skip


def diagnose(folder: Path) -> list[Finding]:
    """The findings of a run, those first that began first (causes tend to precede); none for a run of fewer than LEAST updates."""
    flags, by_episodes = read_run(folder)
    count = flags["prompts_per_update"] * flags["samples_per_prompt"]
    metrics = {key: {round(e / count): x for e, x in series.items()} for key, series in by_episodes.items()}
    findings = [finding for signature in SIGNATURES if (finding := signature(History(flags, metrics)))]
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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        stop("give at least one run directory")
    for folder in args.runs:
        print(f"{folder}: {sentences(folder)}")

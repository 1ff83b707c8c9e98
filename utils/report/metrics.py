"""What a run says of itself: the logged numbers' definitions (docs/metrics.md) and collection."""

import time
from collections import defaultdict

import torch
from torch import Tensor

from utils.errors import stop
from utils.ranks import RANKS, add_up, full, gather
from utils.run import peak_memory_gb


class Clock:
    """Seconds of an update's stages: `lap(name)` ends the stage `time/<name>`."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}"] = now - self.last
        self.last = now


class Averages:
    """Statistics of an update: micro-batches add up to their minibatch, minibatches are averaged."""

    def __init__(self, device: torch.device):
        self.device, self.minibatches = device, []

    def new_minibatch(self) -> None:
        self.minibatches.append(defaultdict(float))

    def add(self, stats: dict[str, Tensor]) -> None:
        for key, value in stats.items():
            self.minibatches[-1][key] += full(value.detach()).to(self.device)

    def end_minibatch(self) -> None:
        """Sums over the processes, whatever each of them has had of the minibatch."""
        stats = self.minibatches[-1]
        for key in self.names() if RANKS > 1 else ():
            stats[key] = torch.as_tensor(stats[key], device=self.device)
            add_up(stats[key])

    def names(self) -> list[str]:
        """Those of all processes: one that had no micro-batch has none."""
        return sorted({key for keys in gather(list(self.minibatches[-1])) for key in keys})

    def check_finite(self, update: int) -> None:
        """Stop the run if a statistic of this minibatch is not a finite number."""
        stats = self.minibatches[-1]
        if not torch.stack(list(stats.values())).isfinite().all():
            numbers = {key: value.item() for key, value in stats.items()}
            stop(f"update {update}: not finite, so the weights were not touched: {numbers}")

    def mean(self) -> dict[str, float]:
        columns = {key: [m[key] for m in self.minibatches] for key in self.minibatches[-1]}
        means = torch.stack([torch.stack(column).mean() for column in columns.values()])
        return dict(zip(columns, means.tolist(), strict=True))


def check_weights(optimizer: torch.optim.Optimizer, update: int) -> None:
    """Stop the run, with nothing saved of this update, if a step has made a weight no number."""
    for group in optimizer.param_groups:
        if not torch.stack([full(p.isfinite().all()) for p in group["params"]]).all():
            stop(
                f"update {update}: weights of the {group['name']} are no longer finite, so nothing of "
                "it is saved; go on from the last checkpoint with --resume and a lower learning rate"
            )


# ---- definitions ----


def channel(clean: Tensor, observed: Tensor) -> dict[str, float]:
    """Share of flipped rewards, and Youden's J = P(1 | right) - P(1 | wrong): 1 is a clean channel,
    0 a useless one. Episodes whose truth is unknown (NaN) are left out."""
    known = ~clean.isnan()
    right, says_right = clean[known] > 0.5, observed[known] > 0.5
    youden_j = says_right[right].float().mean() - says_right[~right].float().mean()
    flips = (right != says_right).float().mean()
    return {"reward/flip_rate": flips.item(), "reward/youden_j": youden_j.item()}


def engine_gap(episodes: list) -> dict[str, float]:
    """Mean |log pi - log pi_engine| of the tokens and the largest, where another engine drew them."""
    gap = torch.tensor([abs(x) for e in episodes for x in e.gap])
    if not gap.any():
        return {}
    tokens = sum(e.length for e in episodes)
    return {
        "charts/engine_gap": gap.sum().item() / tokens,
        "charts/engine_gap_max": gap.max().item(),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the masked tokens: 1 is a perfect critic, 0 a constant, below 0
    worse than that. NaN where all returns are equal."""
    variance = returns[mask].var()
    if not variance > 0:
        return float("nan")
    return (1 - (returns - values)[mask].var() / variance).item()


def advantage_noise(advantages: Tensor, without_errors: Tensor, mask: Tensor) -> float:
    """1 - max(0, corr(A, A without the reward errors))^2 over the masked tokens: the share of the
    variance of the advantages that does not follow the clean rewards. Both have the same values, so
    a critic's own errors are not seen. NaN where either is constant."""
    pair = torch.stack([advantages[mask], without_errors[mask]])
    correlation = torch.corrcoef(pair)[0, 1].clamp(min=0).item()
    return 1 - correlation**2


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum of gamma^k r_{t+k} (B, T) over the tokens that the policy chose, from each of them on."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = torch.where(mask[:, t], following, 0.0)
    return returns


# ---- collection ----


def of_rollout(env, episodes: list, clean: Tensor, observed: Tensor) -> dict[str, float]:
    """charts/, reward/ and sampled/: lengths, and what the truth and the observed rewards say."""
    count = len(episodes)
    finished = torch.tensor([e.finished for e in episodes])
    return {
        "charts/response_length": sum(e.length for e in episodes) / count,
        **engine_gap(episodes),
        "charts/turns": sum(len(e.completions) for e in episodes) / count,
        "charts/eos_rate": finished.float().mean().item(),
        "charts/verifier_calls": count,
        "reward/observed": observed.mean().item(),
        "reward/clean": clean.mean().item(),
        **channel(clean, observed),
        **{f"sampled/{name}": share for name, share in env.measure(episodes).items()},
    }


def of_critic(
    batch: dict, rewards: Tensor, clean_rewards: Tensor, advantages: Tensor, gamma: float
) -> dict[str, float]:
    """critic/: how well the rollout's values foresaw the observed returns, and the clean ones; these
    also in the first state of every episode, in which a critic can know the problem alone, and in
    the last, in which it has read the answer."""
    values, mask = batch["values"], batch["mask"]
    place = mask.cumsum(1)
    first, last = mask & (place == 1), mask & (place == place[:, -1:])
    returns = discounted_returns(rewards, mask, gamma)
    clean_returns = discounted_returns(clean_rewards, mask, gamma)
    return {
        "critic/explained_variance": explained_variance(values, returns, mask),
        "critic/explained_variance_clean": explained_variance(values, clean_returns, mask),
        "critic/explained_variance_first": explained_variance(values, clean_returns, first),
        "critic/explained_variance_last": explained_variance(values, clean_returns, last),
        "critic/value_mean": values[mask].mean().item(),
        "critic/return_mean": returns[mask].mean().item(),
        "critic/advantage_std": advantages[mask].std().item(),
    }


def of_update(clock: Clock, averages: Averages, optimizer, episodes: list, update: int) -> dict:
    """time/, charts/ and losses/; losses are means over all minibatches of the update, whose
    weights are looked at before anything else is made of them."""
    check_weights(optimizer, update)
    device = optimizer.param_groups[0]["params"][0].device
    return {
        "charts/episodes": update * len(episodes),
        "charts/tokens_per_second": sum(e.length for e in episodes) / sum(clock.laps.values()),
        "charts/learning_rate": optimizer.param_groups[0]["lr"],
        "charts/peak_memory_gb": peak_memory_gb(device),
        **clock.laps,
        **averages.mean(),
    }

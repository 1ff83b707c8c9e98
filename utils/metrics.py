"""What a run logs of its updates: the numbers' definitions (docs/metrics.md) and their collection."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from utils.errors import stop
from utils.scale.processes import RANKS, add_up, full, gather

try:
    import resource
except ImportError:  # Windows
    resource = None


MOST_GAP = 1.0  # nats a token; rounding makes none in float32, 0.05 in bfloat16


class UpdateLog:
    """An update's stages in seconds and its losses: micro-batches add up to their minibatch,
    minibatches are averaged."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()
        self.minibatches, self.open = [], defaultdict(float)
        self.gap = float("nan")  # root mean square of log pi - log pi_old at the start of a run

    def lap(self, name: str) -> None:
        """End the stage `time/<name>`."""
        now = time.perf_counter()
        self.laps[f"time/{name}"], self.last = now - self.last, now

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms of a micro-batch, by their keys."""
        for key, value in terms.items():
            self.open[key] += value.detach()

    def end_minibatch(self, norms: dict[str, Tensor], update: int) -> None:
        """Sums over the processes, whatever each of them has had of the minibatch; `norms` of the
        gradients, which all have. Stops the run, before the weights are touched, where something
        is not a finite number."""
        if RANKS > 1:
            names = sorted({key for keys in gather(list(self.open)) for key in keys})
            for key in names:  # a process that had no micro-batch has none
                self.open[key] = torch.as_tensor(self.open[key], device=self.device)
                add_up(self.open[key])
        for name, norm in norms.items():
            self.open[f"losses/grad_norm_{name}"] = full(norm) if RANKS > 1 else norm
        numbers = {key: value.to(self.device) for key, value in self.open.items()}
        if update == 1 and not self.minibatches:  # nothing has moved since the tokens were drawn
            self.gap = round((2 * numbers["losses/approx_kl"].clamp(min=0)).sqrt().item(), 3)
            if self.gap > MOST_GAP:
                stop(
                    f"decoding and training disagree by {self.gap:.2f} nats a token about what the "
                    "model says: this model does not decode here as it reads; please report it"
                )
        if not torch.stack(list(numbers.values())).isfinite().all():
            said = {key: value.item() for key, value in numbers.items()}
            stop(f"update {update}: not finite, so the weights were not touched: {said}")
        self.minibatches.append(numbers)
        self.open = defaultdict(float)

    def row(self, update: int, optimizer, episodes: list) -> dict[str, float]:
        """time/, charts/ and losses/. Stops the run, with nothing saved of this update, if a step
        has made a weight no number."""
        for group in optimizer.param_groups:
            finite = [p.isfinite().all() for p in group["params"]]
            if not torch.stack([full(x) for x in finite] if RANKS > 1 else finite).all():
                stop(
                    f"update {update}: weights of the {group['name']} are no longer finite, so "
                    "nothing of it is saved; go on from the last checkpoint with --resume and a "
                    "lower learning rate"
                )
        columns = {key: [m[key] for m in self.minibatches] for key in self.minibatches[-1]}
        means = torch.stack([torch.stack(column).mean() for column in columns.values()])
        return {
            "charts/episodes": len(episodes),
            "charts/decoding_gap": self.gap,
            "charts/tokens_per_second": sum(e.length for e in episodes) / sum(self.laps.values()),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/peak_memory_gb": peak_memory_gb(self.device),
            **self.laps,
            **dict(zip(columns, means.tolist(), strict=True)),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator on a GPU, else of the whole process; NaN where the
    system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- episodes and rewards ----


def of_rollout(
    env, episodes: list, batch: dict, rewards: Tensor, clean: Tensor, observed: Tensor
) -> dict[str, float]:
    """charts/, reward/, objective/ and sampled/: lengths, what the truth and the observed rewards
    (B,) say, the sum of the rewards (B, T), and the policy's entropy and KL to the reference."""
    count, tokens = len(episodes), sum(e.length for e in episodes)
    gap = torch.tensor([abs(x) for e in episodes for x in e.gap])
    extra = {}
    if env.args.task in ("dialogue", "long"):  # of others it would be reward/clean once more
        extra |= {f"sampled/{name}": share for name, share in env.measure(episodes).items()}
    if gap.any():  # |log pi - log pi_engine|, where another engine drew the tokens
        extra |= {"charts/engine_gap": gap.sum().item() / tokens}
        extra["charts/engine_gap_max"] = gap.max().item()
    if "kl" in batch:
        extra["objective/kl_ref"] = batch["kl"].sum(1).mean().item()
    return {
        "charts/response_length": tokens / count,
        **extra,
        "charts/turns": sum(len(e.completions) for e in episodes) / count,
        "charts/eos_rate": sum(e.finished for e in episodes) / count,
        "charts/verifier_calls": count,
        "reward/observed": observed.mean().item(),
        "reward/clean": clean.mean().item(),
        **channel(clean, observed),
        "reward/total": rewards.sum(1).mean().item(),
        "objective/entropy": batch["entropy"][batch["mask"]].mean().item(),
    }


def channel(clean: Tensor, observed: Tensor) -> dict[str, float]:
    """Share of flipped rewards, and Youden's J = P(1 | right) - P(1 | wrong): 1 is a clean channel,
    0 a useless one. Episodes whose truth is unknown (NaN) are left out."""
    known = ~clean.isnan()
    right, says_right = clean[known] > 0.5, observed[known] > 0.5
    youden_j = says_right[right].float().mean() - says_right[~right].float().mean()
    flips = (right != says_right).float().mean()
    return {"reward/flip_rate": flips.item(), "reward/youden_j": youden_j.item()}


# ---- critics and advantages ----


def of_critic(batch: dict, rewards: Tensor, errors: Tensor, gamma: float) -> dict[str, float]:
    """critic/: how well the rollout's values foresaw the returns of the observed rewards (B, T), and
    those of the clean ones, from which the observed ones differ by `errors` (B,) on the last token;
    these also in the first state of every episode, in which a critic can know the problem alone,
    and in the last, in which it has read the answer."""
    values, mask = batch["values"], batch["mask"]
    place = mask.cumsum(1)
    first, last = mask & (place == 1), mask & (place == place[:, -1:])
    returns = discounted_returns(rewards, mask, gamma)
    clean = rewards.scatter_add(1, batch["last"], -errors.unsqueeze(1))
    clean = discounted_returns(clean, mask, gamma)
    return {
        "critic/explained_variance": explained_variance(values, returns, mask),
        "critic/explained_variance_clean": explained_variance(values, clean, mask),
        "critic/explained_variance_first": explained_variance(values, clean, first),
        "critic/explained_variance_last": explained_variance(values, clean, last),
        "critic/value_mean": values[mask].mean().item(),
        "critic/return_mean": returns[mask].mean().item(),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the masked tokens: 1 is a perfect critic, 0 a constant, below 0
    worse than that. NaN where all returns are equal."""
    variance = returns[mask].var()
    if not variance > 0:
        return float("nan")
    return (1 - (returns - values)[mask].var() / variance).item()


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum of gamma^k r_{t+k} (B, T) over the tokens that the policy chose, from each of them on."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = torch.where(mask[:, t], following, 0.0)
    return returns


def of_advantages(
    advantages: Tensor, errors: Tensor, mask: Tensor, decay: float, steps: Tensor | None = None
) -> dict[str, float]:
    """objective/advantage_noise and critic/advantage_std, of advantages (B, T) by GAE, before they
    are whitened. GAE is linear in the rewards: an error (B,) on the last token adds itself times
    decay^k to an advantage k steps before. decay is gamma lambda, and a step a chosen token, or
    where the mask `steps` (B, T) says one begins."""
    steps = mask if steps is None else steps
    to_go = steps.sum(1, keepdim=True) - steps.cumsum(1)
    clean = advantages - errors.unsqueeze(1) * decay**to_go
    return {
        "objective/advantage_noise": advantage_noise(advantages, clean, mask),
        "critic/advantage_std": advantages[mask].std().item(),
    }


def of_groups(
    scores: Tensor, clean_scores: Tensor, group_advantages: Callable, mask: Tensor, args
) -> dict[str, float]:
    """objective/advantage_noise of a method whose advantages (B,) are `group_advantages` of scores
    (B,); and the share of groups whose scores are all equal."""
    with_errors, clean = (
        group_advantages(x, args).unsqueeze(1) * mask for x in (scores, clean_scores)
    )
    groups = scores.view(-1, args.samples_per_prompt)
    return {
        "objective/advantage_noise": advantage_noise(with_errors, clean, mask),
        "grpo/zero_variance_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
    }


def advantage_noise(advantages: Tensor, without_errors: Tensor, mask: Tensor) -> float:
    """1 - max(0, corr(A, A without the reward errors))^2 over the masked tokens: the share of the
    variance of the advantages that does not follow the clean rewards. Both have the same values, so
    a critic's own errors are not seen. NaN where either is constant."""
    pair = torch.stack([advantages[mask], without_errors[mask]])
    correlation = torch.corrcoef(pair)[0, 1].clamp(min=0).item()
    return 1 - correlation**2

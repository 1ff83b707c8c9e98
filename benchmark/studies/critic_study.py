"""Which critic absorbs reward noise? Critics are fitted to the same rollouts with the same flips,
without an RL loop in the way.

    python benchmark/studies/critic_study.py              # all parts: hours; stop and go on at will
    python benchmark/studies/critic_study.py --parts noise --seeds 1 2 --critics plain VRPO
    python benchmark/studies/critic_study.py --report     # tables and figure from the CSV alone
    python benchmark/studies/critic_study.py --task long --parts data passes --out long.csv

A fit is what main() of the script does with its critic when the policy stands still, by the
script's own functions: 256 rollouts an update, values and targets of the update, two epochs in
minibatches of 64. Measures are taken on fresh rollouts of other prompts. The parts: `tuning` (the
same number of settings for every critic, a seed of its own), `noise` (rates 0 to 0.4), `vrpo` (what
each part of VRPO contributes), `passes` (eight passes of one epoch over the same rollouts), `data`
(what more rollouts teach about problems and about steps). Writes
benchmark/results/critic_study.csv; a fit whose rows are there is skipped, and so is one that left
its rows in runs/critic_study. The report takes the rows of the present flags alone."""

import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pandas as pd
import torch
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ppo_baseline as ppo  # noqa: E402
from benchmark.jobs import RESULTS, Task, digest, make, module_of  # noqa: E402
from benchmark.report import markdown, renew  # noqa: E402
from utils.args import DEFAULTS  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.files import write_atomically  # noqa: E402
from utils.keyed import permutation, row_seeds, seed_torch  # noqa: E402
from utils.metrics import advantage_noise, explained_variance  # noqa: E402
from utils.models import set_up, start_policy  # noqa: E402
from utils.report import style  # noqa: E402
from utils.tensors import Batch, micro_batches, turn_ends  # noqa: E402
from utils.world.environment import Environment  # noqa: E402

CACHE = Path("runs") / "critic_study"
KEY = ["part", "critic", "setting", "noise", "seed", "digest"]
WHERE = {"noise": "symmetric", "model": "assets/tiny_math", "dataset": "assets/data/tiny_math"}
PARTS = ("tuning", "noise", "vrpo", "passes", "data")
UPDATE = 256  # rollouts
FRESH = 512
NO_TERMS = {
    f"lambda_{name}": 0.0 for name in ("consistency", "cvar", "gain", "shift", "shape", "curvature")
}
NO_WORDS = {"lambda_ent": 0.0, "lambda_ppl": 0.0}
ONCE = (("epochs", 1),)
# name: script, flags; "recipe" is one that is applied to the script
CRITICS = {
    "plain": ("ppo_baseline", {}),
    "bottleneck": ("vrpo_math", NO_WORDS),
    "semantic": ("vrpo_math", {"recipe": "bottleneck_layers", "bottleneck_layers": 0}),
    "VRPO": ("vrpo_math", {}),
    "quantile": ("dvpo_math", NO_TERMS),
    "DVPO": ("dvpo_math", {}),
    "ensemble-min": ("robust_ppo_baseline", {}),
    "contamination": ("robust_ppo_baseline", {"worst_case": "contamination"}),
    "conservative": ("robust_ppo_baseline", {"worst_case": "conservative"}),
}
# Tuning: five settings for each critic, the default, a lower learning rate, another lambda of the
# targets and two of its own.
COMMON = [{}, {"critic_learning_rate": 5e-4}, {"critic_lambda": 1.0}]
SEARCH = {
    "plain": [{"recipe": "value_clip", "value_clip": 0.2}, {"head_learning_rate": 3e-3}],
    "bottleneck": [{"beta": 0.01}, {"beta_warmup": 1}],
    "semantic": [{"lambda_ent": 0.03, "lambda_ppl": 0.03}, {"lambda_ent": 0.0}],
    "VRPO": [{"beta": 0.01}, {"lambda_ent": 0.03, "lambda_ppl": 0.03}],
    "quantile": [{"huber_kappa": 0.3}, {"quantiles": 50}],
    "DVPO": [{"huber_kappa": 0.3}, {"lambda_shift": 0.0}],
    "ensemble-min": [{"value_heads": 8}, {"head_learning_rate": 3e-3}],
    "contamination": [{"contamination": 0.01}, {"contamination": 0.2}],
    "conservative": [{"conservative_coef": 0.01}, {"conservative_coef": 1.0}],
}
# Changes of one part of VRPO; without bottleneck, without semantic losses and without both it is a
# critic of its own above.
VRPO_PARTS = {
    "two bottleneck layers": {"recipe": "bottleneck_layers", "bottleneck_layers": 2},
    "beta 0.0003": {"beta": 0.0003},
    "beta 0.01": {"beta": 0.01},
    "beta 0.1": {"beta": 0.1},
    "no warm-up of beta": {"beta_warmup": 1},
    "1 latent sample": {"value_samples": 1},
    "64 latent samples": {"value_samples": 64},
    "20 % of the tokens": {"token_ratio": 0.2},
    "50 % of the tokens": {"token_ratio": 0.5},
    "100 % of the tokens": {"token_ratio": 1.0},
    "learned LM head": {"recipe": "learned_lm_head"},
    "lambda 0.5 (the paper's)": {"lambda_ent": 0.5, "lambda_ppl": 0.5},
}


@dataclass(frozen=True)
class Fit:
    """One fit: `setting` says what differs from the critic's defaults; `passes` over `rollouts`
    episodes, measured after each and, in the first, after `measured` episodes."""

    part: str
    critic: str
    setting: str
    noise: float
    seed: int
    rollouts: int = 2560
    passes: int = 1
    flags: tuple = ()
    measured: tuple[int, ...] = (512, 1280)


def fits(seeds: tuple[int, ...]) -> list[Fit]:
    """All fits, in the order in which they are made: what answers most comes first."""
    rates = (0.2, 0.4, 0.0, 0.3, 0.1)
    jobs = [
        Fit("noise", critic, "", p, seed)
        for seed in seeds
        for p in rates
        for critic in list(CRITICS)[:7]
    ]
    parts = VRPO_PARTS.items()
    jobs += [
        Fit("vrpo", "VRPO", name, 0.2, seed, flags=tuple(f.items()))
        for seed in seeds[:3]
        for name, f in parts
    ]
    jobs += [
        Fit("passes", critic, "", 0.3, seed, passes=8, flags=ONCE)
        for seed in seeds
        for critic in ("plain", "bottleneck", "VRPO")
    ]
    jobs += [
        Fit("data", "plain", "", p, seed, 8192, flags=ONCE, measured=(1024, 2048, 4096))
        for seed in seeds[:3]
        for p in (0.3, 0.0)
    ]
    jobs += [
        Fit("tuning", critic, text(flags), 0.3, 101, flags=tuple(flags.items()))
        for critic in CRITICS
        for flags in (*COMMON, *SEARCH[critic])
    ]
    jobs += [
        Fit("noise", critic, "", p, seed)
        for seed in seeds[:3]
        for p in rates[:2]
        for critic in list(CRITICS)[7:]
    ]
    return jobs


def asked(job: Fit, where: dict) -> tuple[str, dict, tuple[str, ...]]:
    """Script, flags and recipes of a fit."""
    script, own = CRITICS[job.critic]
    flags = where | {"noise_rate": job.noise, "seed": job.seed} | own | dict(job.flags)
    recipe = flags.pop("recipe", None)
    return script, flags, (recipe,) if recipe else ()


def key(job: Fit, where: dict) -> tuple:
    """What a fit is called, and a digest of all that it depends on but the code."""
    script, flags, recipes = asked(job, where)
    made_by = digest(script, tuple(flags.items()), job.rollouts, job.passes, recipes=recipes)
    return job.part, job.critic, job.setting, job.noise, job.seed, made_by


def text(flags: dict) -> str:
    words = [f"--{k.replace('_', '-')} {v}" for k, v in flags.items() if k != "recipe"]
    return " ".join(words) or "default"


def rollouts(where: dict, seed: int, count: int):
    """The policy, and `count` + FRESH episodes of it, four to a prompt: batch, clean rewards,
    prompt keys. Kept on disk."""
    args = ppo.Args(**where, seed=seed, prompts_per_update=UPDATE // 4, device="cpu")
    model, dataset = args.model, args.dataset
    device = set_up(args)
    policy, chat = start_policy(args, device)
    file = CACHE / f"episodes-{Path(model).name}-{Path(dataset).name}-{seed}-{count}.pt"
    if not file.exists():
        env, episodes = Environment(args, chat, device), []
        for update in range((count + FRESH) // UPDATE):
            seed_torch(seed, "rollout", update)
            episodes += ppo.rollout(policy, env, env.problems(update + 1), args, 1.0)
        keys = [e.problem.key for e in episodes]
        kept = (env.pack(episodes), env.grade(episodes), keys)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file.with_suffix(f".{os.getpid()}"))
        file.with_suffix(f".{os.getpid()}").rename(file)
    return policy, *torch.load(file)


def take(batch: Batch, rows) -> Batch:
    """Those rows of a batch."""
    return {name: x[rows] for name, x in batch.items()}


def observed_rewards(
    args, clean: torch.Tensor, keys: list[str], mask: torch.Tensor
) -> torch.Tensor:
    """The clean rewards through the script's channel, update by update."""
    seen = []
    episodes = [
        SimpleNamespace(problem=SimpleNamespace(key=key), chosen=chosen)
        for key, chosen in zip(keys, mask.tolist(), strict=True)
    ]
    for update, start in enumerate(range(0, len(clean), UPDATE)):
        rows = slice(start, start + UPDATE)
        seen.append(ppo.observe(args, clean[rows], episodes[rows], update + 1))
    return torch.cat(seen)


def fit(job: Fit, where: dict) -> list[dict]:
    """Rows of measures, in the order in which they were taken."""
    script, flags, recipes = asked(job, where)
    module = module_of(script, recipes)
    args = module.Args(**flags)
    count = max(2560, job.rollouts)
    policy, batch, clean, keys = rollouts(where, job.seed, count)
    observed = observed_rewards(args, clean, keys, batch["mask"])
    rewards = ppo.place_rewards(observed, batch)
    fresh = torch.arange(len(clean) - FRESH, len(clean))
    seed_torch(job.seed, "critic")
    critic = module.Critic(policy, args)
    torch.nn.init.constant_(critic.head.bias, observed[:UPDATE].mean().item())
    optimizer = module.make_optimizer(policy, critic, args)
    names = dict(zip(KEY, key(job, where), strict=True))
    rows, update = [], 0
    for once in range(job.passes):
        for start in range(0, job.rollouts, UPDATE):
            update += 1
            chunk = slice(start, start + UPDATE)
            train_update(
                module, critic, optimizer, take(batch, chunk), rewards[chunk], args, update
            )
            seen = start + UPDATE
            if seen == job.rollouts or (once == 0 and seen in job.measured):
                fitted = torch.arange(max(0, seen - FRESH), seen)
                measures = measure(module, critic, batch, clean, observed, fresh, fitted, args)
                rows.append({**names, "rollouts": seen, "passes": once + 1, **measures})
    return rows


def fit_to(file: Path, job: Fit, where: dict) -> None:
    write_atomically(file, json.dumps(fit(job, where)))


def train_update(
    module, critic, optimizer, batch: Batch, rewards: torch.Tensor, args, update: int
) -> None:
    """7.4 and 7.5 of the script's main(), the policy left out."""
    if hasattr(critic, "beta"):
        critic.beta = args.beta * min(1.0, update / args.beta_warmup)
    batch["seed"] = row_seeds(batch["mask"], args.seed, "latent", update)
    batch |= module.score_tokens(critic, batch, args)
    _, targets = module.advantages_and_targets(rewards, batch, args)
    batch |= targets
    unit = batch["returns"][batch["mask"]].var().clamp(min=0.01)
    for epoch in range(args.epochs):
        batch["seed"] = row_seeds(batch["mask"], args.seed, "latent", update, epoch)
        order = permutation(len(rewards), args.seed, "minibatches", update, epoch)
        for rows in order.split(args.minibatch_size):
            minibatch = take(batch, rows)
            minibatch["weights"] = ppo.token_weights(minibatch["mask"])
            for key in ("entropy", "perplexity"):
                if f"{key}_active" in minibatch:
                    minibatch[f"{key}_weights"] = ppo.token_weights(minibatch[f"{key}_active"])
            optimizer.zero_grad()
            for _, part in micro_batches(minibatch, args.micro_batch_size):
                module.critic_loss(critic, part, unit, args)[0].backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            optimizer.step()


def measure(module, critic, batch: Batch, clean, observed, fresh, fitted, args) -> dict[str, float]:
    """On fresh episodes, over tokens: explained variance against clean returns (samples of the
    clean expected ones, so that even those would not reach 1); R^2 of the best line from value to
    clean return, which forgives the shrinking that a symmetric channel asks for; AUC of the last
    token's value for right against wrong; calibration, the mean distance in ten equal bins of the
    values from what the channel makes of the clean rewards on average; the share of the variance of
    the advantages that the reward errors make (1 - squared correlation with the advantages of the
    clean rewards). On the last fitted episodes: the share of their reward errors that the values
    reproduce (right and wrong answers apart), and errors where the reward was flipped or not.
    `_first` and `_last` are of an episode's first state alone, which knows the problem, and of the
    last, which has read the answer."""
    batch = batch | {"seed": row_seeds(batch["mask"], args.seed, "measure")}
    part = take(batch, fresh)
    mask, right = part["mask"], clean[fresh]
    part |= module.score_tokens(critic, part, args)
    values, returns = part["values"], right.unsqueeze(1).expand_as(part["values"])
    rewards = (ppo.place_rewards(x, part) for x in (observed[fresh], right))
    advantages = [module.advantages_and_targets(x, part, args)[0] for x in rewards]
    ends = {"first": mask & (mask.cumsum(1) == 1), "last": turn_ends(mask)}
    last = values[ends["last"]]
    wins = stats.mannwhitneyu(last[right == 1], last[right == 0]).statistic
    v, r = values[mask], returns[mask]
    expected = torch.where(r == 1, observed[clean == 1].mean(), observed[clean == 0].mean())
    bins = [(v[b].mean() - expected[b].mean()).abs() for b in v.argsort().chunk(10)]
    result = {
        "explained_variance": explained_variance(values, returns, mask),
        "r_squared": r_squared(v, r),
        "auc": float(wins / ((right == 1).sum() * (right == 0).sum())),
        "calibration_error": torch.stack(bins).mean().item(),
        "advantage_noise": advantage_noise(*advantages, mask),
    }
    for name, state in ends.items():
        result[f"explained_variance_{name}"] = explained_variance(values, returns, state)
        result[f"r_squared_{name}"] = r_squared(values[state], returns[state])
    part = take(batch, fitted)
    mask, seen, right = part["mask"], observed[fitted].unsqueeze(1), clean[fitted].unsqueeze(1)
    values = module.score_tokens(critic, part, args)["values"]
    errors = (values - right) ** 2
    flipped = mask & ((seen - right).abs() > 0.5)
    result["noise_fitted"] = noise_fitted(values, seen, right, mask)
    result["rmse_flipped"] = errors[flipped].mean().sqrt().item()
    result["rmse_unflipped"] = errors[mask & ~flipped].mean().sqrt().item()
    return result


def r_squared(values: torch.Tensor, returns: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([values, returns]))[0, 1].square().nan_to_num().item()


def noise_fitted(values, observed, clean, mask) -> float:
    """cov(V, e) / var(e) over the masked tokens, e = observed - clean reward (B, 1), right and
    wrong answers apart, as errors go with the outcome: 0 where the values know nothing of the
    errors, 1 where they repeat them. NaN where no reward is wrong."""
    v, e, right = (x.expand_as(values)[mask] for x in (values, observed - clean, clean > 0.5))
    for group in (right, ~right):
        v[group], e[group] = v[group] - v[group].mean(), e[group] - e[group].mean()
    return ((v * e).sum() / (e * e).sum()).item()


MEASURES = {
    "explained_variance": "explained variance, clean returns",
    "r_squared": "R²",
    "auc": "AUC",
    "calibration_error": "calibration error",
    "noise_fitted": "noise fitted",
    "advantage_noise": "noise in the advantages",
    "rmse_flipped": "RMSE, flipped",
    "rmse_unflipped": "RMSE, unflipped",
    "explained_variance_first": "explained variance, first state",
    "explained_variance_last": "explained variance, last state",
    "r_squared_first": "R², first state",
    "r_squared_last": "R², last state",
}


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by Student's t."""
    x = values.dropna().to_numpy()
    if len(x) < 2 or x.std() == 0:
        return (x.mean() if len(x) else float("nan"),) * 3
    return x.mean(), *stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))


def cell(values: pd.Series) -> str:
    mean, low, high = interval(values)
    return f"{mean:.2f}" if low == high or low != low else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def table(title: str, data: pd.DataFrame, columns: str, measure: str) -> str:
    """Mean and interval of a measure over seeds, a row for each critic, a column for each value of
    `columns`."""
    heads = sorted(data[columns].unique())
    rows = [
        [critic, *(cell(group[group[columns] == x][measure]) for x in heads)]
        for critic, group in data.groupby("critic", sort=False)
    ]
    title += f" (seeds {', '.join(map(str, sorted(data['seed'].unique())))})"
    return f"{title}\n\n" + markdown(["critic", *(f"{x:g}" for x in heads)], rows)


def from_plain(data: pd.DataFrame, measure: str, columns: str) -> pd.DataFrame:
    """The other critics' rows, with a measure's difference from the plain critic of that seed."""
    plain = data[data["critic"] == "plain"].set_index([columns, "seed"])[measure]
    others = data[data["critic"] != "plain"].copy()
    others[measure] -= plain.reindex(pd.MultiIndex.from_frame(others[[columns, "seed"]])).to_numpy()
    return others


def parts_of_vrpo(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of part `vrpo`, after those of the critics that are VRPO with a part left out."""
    own = {
        "VRPO": "default",
        "bottleneck": "no semantic losses",
        "semantic": "no bottleneck",
        "plain": "neither",
    }
    parts = frame[frame["part"] == "vrpo"]
    some = frame[(frame["part"] == "noise") & (frame["noise"] == 0.2)]
    some = some[some["critic"].isin(list(own)) & some["seed"].isin(parts["seed"])]
    some = some.assign(part="vrpo", critic="VRPO", setting=some["critic"].map(own))
    both = pd.concat([some, parts])
    return both[both["rollouts"] == 2560]


def report(frame: pd.DataFrame) -> list[str]:
    """All tables, of these rows alone."""
    sections = []
    noise = frame[frame["part"] == "noise"]
    final = noise[noise["rollouts"] == 2560]
    if len(final):
        for measure in list(MEASURES)[:6]:
            title = f"{MEASURES[measure]}, by noise rate, after 2,560 rollouts"
            sections.append(table(title, final, "noise", measure))
        for measure in ("explained_variance", "r_squared", "auc"):
            title = f"{MEASURES[measure]}: difference from the plain critic, paired by seed"
            sections.append(table(title, from_plain(final, measure, "noise"), "noise", measure))
        for rate, some in noise.groupby("noise"):
            title = f"R² by number of rollouts, noise {rate:g}"
            sections.append(table(title, some, "rollouts", "r_squared"))
    keys = ["explained_variance", "r_squared", "auc", "noise_fitted"]
    parts = parts_of_vrpo(frame).set_index(["setting", "seed"])[keys]
    if "default" in parts.index:
        rows = []
        for setting, group in parts.groupby("setting", sort=False):
            change = group.droplevel("setting") - parts.loc["default"]
            means = [f"{group[k].mean():.2f}" for k in keys]
            rows.append([setting, *means, *(cell(change[k]) for k in keys[:3])])
        words = [MEASURES[k] for k in keys]
        header = ["VRPO", *words, *(f"{word}: difference" for word in words[:3])]
        title = "What each part of VRPO contributes: noise 0.2, means over seeds, and differences "
        title += "from the default paired by seed"
        sections.append(f"{title}\n\n" + markdown(header, rows))
    some = frame[(frame["part"] == "tuning") & (frame["rollouts"] == 2560)]
    if len(some):
        cells = some[["critic", "setting", *keys]].to_numpy()
        rows = [[*row[:2], *(f"{x:.2f}" for x in row[2:])] for row in cells]
        header = ["critic", "setting", *(MEASURES[k] for k in keys)]
        title = "Tuning: noise 0.3, one fit each, seed 101"
        sections.append(f"{title}\n\n" + markdown(header, rows))
    some = frame[(frame["part"] == "passes") & (frame["rollouts"] == 2560)]
    for measure in ("r_squared", "explained_variance", "noise_fitted") if len(some) else ():
        title = f"By passes, {MEASURES[measure]}: over the same 2,560 rollouts, noise 0.3"
        sections.append(table(title, some, "passes", measure))
        if measure != "noise_fitted":
            paired = from_plain(some, measure, "passes")
            sections.append(table(f"{title}, difference from plain", paired, "passes", measure))
    some = frame[(frame["part"] == "data") & (frame["passes"] == 1)]
    for rate, group in some.groupby("noise"):
        title = f"By rollouts, noise {rate:g}, one pass of the plain critic: R²"
        both = [
            group.assign(critic=f"{state} state", value=group[f"r_squared_{state}"])
            for state in ("first", "last")
        ]
        sections.append(table(title, pd.concat(both), "rollouts", "value"))
    return sections


def shown(sections: list[str]) -> str:
    """The tables for the pages."""
    passes = "By passes, R²", "By passes, noise fitted"
    begins = "explained", "R²: diff", "AUC: diff", *passes, "By rollouts"
    return "\n".join(x for x in sections if x.startswith(begins))


def draw(frame: pd.DataFrame):
    """Means over seeds with 95 % intervals; seeds differ more than critics do, so the two panels of
    differences are paired by seed."""
    noise = frame[frame["part"] == "noise"]
    passes = frame[(frame["part"] == "passes") & (frame["rollouts"] == 2560)]
    final, early = noise[noise["rollouts"] == 2560], noise[noise["noise"] == 0.2]
    looks = style.looks({name: name for name in CRITICS})
    figure, axes = style.panels(6, 3, (4.6, 3.6))

    def lines(axis, data: pd.DataFrame, x: str, y: str, band: bool = True, **more) -> None:
        for name, group in data.groupby("critic", sort=False):
            spots = [(at, *interval(some[y])) for at, some in group.groupby(x)]
            xs, mean, low, high = zip(*spots, strict=True)
            axis.plot(xs, mean, **{"label": name} | looks[name] | more)
            if band:
                axis.fill_between(xs, low, high, color=looks[name]["color"], alpha=0.06, lw=0)

    def error(axis, x, y, name: str, **reach) -> None:
        look = looks[name] | {"ls": ""}
        axis.errorbar(x, y, **reach, **look, capsize=2, lw=1)

    lines(axes[0], final, "noise", "explained_variance")
    lines(axes[1], final, "noise", "r_squared")
    lines(axes[3], early, "rollouts", "r_squared")
    lines(axes[4], passes, "passes", "r_squared", band=False)
    lines(axes[4], passes, "passes", "noise_fitted", band=False, ls=":", label=None)
    scores = final.set_index(["noise", "seed"])
    plain = scores[scores["critic"] == "plain"]["r_squared"]
    others = [name for name in dict.fromkeys(final["critic"]) if name != "plain"]
    for i, name in enumerate(others):
        change = (scores[scores["critic"] == name]["r_squared"] - plain).dropna()
        for rate, values in change.groupby(level="noise"):
            mean, low, high = interval(values)
            x = rate + 0.009 * (i - (len(others) - 1) / 2)
            error(axes[2], x, mean, name, yerr=[[mean - low], [high - mean]])
    parts = parts_of_vrpo(frame)
    rows = parts.pivot_table(index="setting", columns="seed", values="r_squared", sort=False)
    if "default" in rows.index:
        rows = rows.sub(rows.loc["default"]).drop(index="default")[::-1]
    for i, (_, values) in enumerate(rows.iterrows()):
        mean, low, high = interval(values)
        error(axes[5], mean, i, "VRPO", xerr=[[mean - low], [high - mean]])
    axes[2].axhline(0, color="0.3", lw=0.8)
    axes[5].axvline(0, color="0.3", lw=0.8)
    axes[5].set_yticks(range(len(rows)), list(rows.index))
    flips, passes = "share of flipped rewards", "passes over 2,560 rollouts, 30 % flipped"
    style.name(axes[0], "explained variance of clean returns", flips)
    style.name(axes[1], "R² of clean returns", flips)
    style.name(axes[2], "R²: difference from the plain critic", flips)
    style.name(axes[3], "R² of clean returns", "rollouts, 20 % flipped")
    style.name(axes[4], "R² (solid) and noise fitted (dotted)", passes)
    style.name(axes[5], "parts of VRPO: difference in R² from the default", "20 % flipped")
    style.legend(figure, axes)
    return figure


@dataclass
class Args:
    parts: tuple[Literal["tuning", "noise", "vrpo", "passes", "data"], ...] = PARTS
    """what to do"""
    critics: tuple[str, ...] = field(default_factory=lambda: tuple(CRITICS))
    """of these"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of rollouts, flips, order and initial weights (tuning has its own)"""
    task: Literal["math", "long"] = "math"
    """whose embedded policy and problems"""
    channel: str = WHERE["noise"]
    """--noise of the scripts, at the rates of the part"""
    model: str | None = None
    """policy whose rollouts are valued; default: the task's"""
    dataset: str | None = None
    """its problems; default: the task's"""
    workers: int = 2
    """fits at a time, one thread each"""
    out: Path = RESULTS / "critic_study.csv"
    """one row for each measurement"""
    report: bool = False
    """only make the tables and the figure again"""


def results(out: Path) -> pd.DataFrame:
    if not out.exists():
        return pd.DataFrame(columns=KEY)
    return pd.read_csv(out, dtype={"setting": str, "digest": str}).fillna({"setting": ""})


def save(out: Path, rows: list[dict]) -> None:
    frame = pd.concat([results(out), pd.DataFrame(rows)], ignore_index=True)
    write_atomically(out, frame.to_csv(index=False, float_format="%.5f"))


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text()) if file.exists() else []


def task(job: Fit, where: dict, out: Path) -> Task:
    *names, made_by = key(job, where)
    file = CACHE / f"{job.part}-{job.critic}-{made_by}.json"
    call, log = (fit_to, file, job, where), file.with_suffix(".log")
    return Task(" ".join(map(str, names)), call, log, partial(read, file), partial(save, out))


def present(frame: pd.DataFrame, seeds: tuple[int, ...], where: dict = WHERE) -> pd.DataFrame:
    """The rows of the present flags, by critic."""
    keys = {key(job, where) for job in fits(seeds)}
    frame = frame[[row in keys for row in map(tuple, frame[KEY].to_numpy())]]
    order = frame["critic"].map(list(CRITICS).index)
    return frame.iloc[order.argsort(kind="stable")]


def main(args: Args) -> None:
    os.chdir(ROOT)
    if unknown := set(args.critics) - set(CRITICS):
        stop(f"--critics {' '.join(unknown)}: there are {', '.join(CRITICS)}")
    usual, where = DEFAULTS[args.task], {"noise": args.channel}
    where |= {key: getattr(args, key) or usual[key] for key in ("model", "dataset")}
    if args.task != "math":
        where |= {"task": args.task, "max_new_tokens": usual["max_new_tokens"]}
    done, failed = set(map(tuple, results(args.out)[KEY].to_numpy())), []
    jobs = [job for job in fits(args.seeds) if key(job, where) not in done]
    jobs = [job for job in jobs if job.part in args.parts and job.critic in args.critics]
    if not args.report:
        failed = make([task(job, where, args.out) for job in jobs], CACHE, args.workers)
    frame = present(results(args.out), args.seeds, where)
    if frame.empty:
        stop(f"{args.out}: no rows of the present flags")
    sections = report(frame)
    args.out.with_suffix(".md").write_text("\n".join(sections))
    style.save(draw(frame), args.out.with_suffix(".png"))
    if args.out == RESULTS / "critic_study.csv":
        renew("critic_study", shown(sections))
    print("\n".join(sections))
    if failed:
        stop("\n".join(failed))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

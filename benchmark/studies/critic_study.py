"""Which critic absorbs reward noise? Critics are fitted to the same rollouts with the same flips,
without an RL loop in the way.

    python benchmark/studies/critic_study.py                         # all parts; hours on two cores, stop and continue at will
    python benchmark/studies/critic_study.py --parts noise --seeds 1 2 --critics plain VRPO
    python benchmark/studies/critic_study.py --report                # tables and figure from the CSV alone
    python benchmark/studies/critic_study.py --tokens                # the same answers through the eyes of every critic: runs/critic_study

A fit is what main() of the script does with its critic when the policy stands still, by the
script's own functions: 256 rollouts an update, values and targets of the update, two epochs in
minibatches of 64. Measures are taken on fresh rollouts of other prompts. The parts: `tuning` (the
same number of settings for every critic, a seed of its own), `noise` (rates 0 to 0.4), `vrpo` (what
each part of VRPO contributes), `passes` (further passes over the same rollouts). Writes
benchmark/results/critic_study.csv; a fit whose rows are there, made with the same flags, is
skipped. The report takes the rows of the present flags alone."""

import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from report import insert  # noqa: E402

import dvpo_math as dvpo  # noqa: E402
import ppo_baseline as ppo  # noqa: E402
import robust_ppo_baseline as robust  # noqa: E402
import vrpo_math as vrpo  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.keyed import permutation, seed_torch  # noqa: E402
from utils.models import load_policy, pick_device  # noqa: E402
from utils.report.metrics import advantage_noise, explained_variance  # noqa: E402
from utils.run import write_atomically  # noqa: E402
from utils.tensors import micro_batches, pack, take, turn_ends  # noqa: E402
from utils.world.environment import Environment  # noqa: E402

CPU = torch.device("cpu")
RESULTS, README = ROOT / "benchmark" / "results", ROOT / "README.md"
CACHE = ROOT / "runs" / "critic_study"
UPDATE = 256  # rollouts
FRESH = 512
NO_TERMS = {
    f"lambda_{name}": 0.0 for name in ("consistency", "cvar", "gain", "shift", "shape", "curvature")
}
NO_WORDS = {"lambda_ent": 0.0, "lambda_ppl": 0.0}
# name: script, flags
CRITICS = {
    "plain": (ppo, {}),
    "bottleneck": (vrpo, NO_WORDS),
    "semantic": (vrpo, {"bottleneck_layers": 0}),
    "VRPO": (vrpo, {}),
    "quantile": (dvpo, NO_TERMS),
    "DVPO": (dvpo, {}),
    "ensemble-min": (robust, {}),
    "contamination": (robust, {"worst_case": "contamination"}),
    "conservative": (robust, {"worst_case": "conservative"}),
}
# Tuning: five settings for each critic, the default, a lower learning rate, another lambda of the
# targets and two of its own.
COMMON = [{}, {"critic_learning_rate": 5e-4}, {"critic_lambda": 1.0}]
SEARCH = {
    "plain": [{"value_clip": 0.2}, {"head_learning_rate": 3e-3}],
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
    "two bottleneck layers": {"bottleneck_layers": 2},
    "beta 0.0003": {"beta": 0.0003},
    "beta 0.01": {"beta": 0.01},
    "beta 0.1": {"beta": 0.1},
    "no warm-up of beta": {"beta_warmup": 1},
    "1 latent sample": {"value_samples": 1},
    "64 latent samples": {"value_samples": 64},
    "20 % of the tokens": {"token_ratio": 0.2},
    "50 % of the tokens": {"token_ratio": 0.5},
    "100 % of the tokens": {"token_ratio": 1.0},
    "learned LM head": {"lm_head": "learned"},
    "lambda 0.5 (the paper's)": {"lambda_ent": 0.5, "lambda_ppl": 0.5},
}


@dataclass(frozen=True)
class Fit:
    """One fit: `setting` says what differs from the critic's defaults; `passes` over `rollouts`
    episodes."""

    part: str
    critic: str
    setting: str
    noise: float
    seed: int
    rollouts: int = 2560
    passes: int = 1
    flags: tuple = ()


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
    some = ("plain", "bottleneck", "VRPO", "DVPO")
    jobs += [
        Fit("passes", critic, "", 0.2, seed, rollouts=1280, passes=4)
        for seed in seeds[:3]
        for critic in some
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


def resolved(job: Fit, channel: str):
    """The script's module and its Args for a fit."""
    module, flags = CRITICS[job.critic]
    return module, module.Args(
        noise=channel, noise_rate=job.noise, seed=job.seed, **{**flags, **dict(job.flags)}
    )


def digest(job: Fit, channel: str, model: str, dataset: str) -> str:
    """Of everything that a fit depends on but the code."""
    args = vars(resolved(job, channel)[1])
    flags = {"reward_per": "episode"} | {key: str(value) for key, value in args.items()}
    words = json.dumps([flags, job.rollouts, job.passes, model, dataset], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:10]


def text(flags: dict) -> str:
    return (
        " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items()) or "default"
    )


@lru_cache(maxsize=2)
def rollouts(model: str, dataset: str, seed: int, count: int):
    """The policy, and `count` + FRESH episodes of it, four to a prompt: batch, clean rewards,
    prompt keys. Kept on disk."""
    pick_device("cpu")
    policy, chat = load_policy(model, CPU)
    name = hashlib.sha256(f"{Path(model).resolve()} {dataset}".encode()).hexdigest()[:6]
    file = CACHE / f"{Path(model).name}_{name}_{seed}_{count}.pt"
    if not file.exists():
        args = ppo.Args(model=model, dataset=dataset, seed=seed, prompts_per_update=UPDATE // 4)
        env, episodes = Environment(args, chat, CPU), []
        for update in range((count + FRESH) // UPDATE):
            seed_torch(seed, "rollout", update)
            episodes += ppo.rollout(policy, env, env.problems(update + 1), args, 1.0)
        keys = [e.problem.key for e in episodes]
        kept = (pack(episodes, chat.pad_id, CPU), env.grade(episodes), keys)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file.with_suffix(f".{os.getpid()}"))
        file.with_suffix(f".{os.getpid()}").rename(file)
    return policy, chat, *torch.load(file)


def observed_rewards(
    args, clean: torch.Tensor, keys: list[str], mask: torch.Tensor
) -> torch.Tensor:
    """The clean rewards through the script's channel, update by update."""
    seen, lengths = [], mask.sum(1).tolist()
    episodes = [
        SimpleNamespace(problem=SimpleNamespace(key=key), length=length)
        for key, length in zip(keys, lengths, strict=True)
    ]
    for update, start in enumerate(range(0, len(clean), UPDATE)):
        some = slice(start, start + UPDATE)
        seen.append(ppo.observe(args, clean[some], episodes[some], update + 1))
    return torch.cat(seen)


def fit(job: Fit, channel: str, model: str, dataset: str) -> tuple[object, list[dict]]:
    """The fitted critic, and rows of measures after 512, 1280 and 2560 rollouts and after every
    further pass."""
    torch.set_num_threads(1)
    module, args = resolved(job, channel)
    policy, _, batch, clean, keys = rollouts(model, dataset, job.seed, max(2560, job.rollouts))
    observed = observed_rewards(args, clean, keys, batch["mask"])
    rewards = ppo.place_rewards(observed, batch["mask"])
    fresh = torch.arange(len(clean) - FRESH, len(clean))
    seed_torch(job.seed, "critic")
    critic = module.Critic(policy, args)
    torch.nn.init.constant_(critic.head.bias, observed[:UPDATE].mean().item())
    optimizer = module.make_optimizer(policy, critic, args)
    names = {key: getattr(job, key) for key in ("part", "critic", "setting", "noise", "seed")}
    names["digest"] = digest(job, channel, model, dataset)
    rows, update = [], 0
    for once in range(job.passes):
        for start in range(0, job.rollouts, UPDATE):
            update += 1
            chunk = torch.arange(start, start + UPDATE)
            part = take(batch, chunk)
            train_update(
                module,
                policy,
                critic,
                optimizer,
                part,
                rewards[chunk, : part["mask"].shape[1]],
                args,
                update,
            )
            seen = start + UPDATE
            if seen == job.rollouts or (once == 0 and seen in (512, 1280)):
                fitted = torch.arange(max(0, seen - FRESH), seen)
                measures = measure(
                    module, policy, critic, batch, clean, observed, fresh, fitted, args
                )
                rows.append({**names, "rollouts": seen, "passes": once + 1, **measures})
    return critic, rows


def fit_rows(*arguments) -> list[dict]:
    return fit(*arguments)[1]


def module_schedule(module, optimizer, critic, update: int, args) -> None:
    """What the script's main() sets at the start of an update; the policy is not in it."""
    module.schedule(optimizer, update, args)
    if module is vrpo:
        critic.beta = args.beta * min(1.0, update / args.beta_warmup)


def train_update(
    module, policy, critic, optimizer, batch: dict, rewards: torch.Tensor, args, update: int
) -> None:
    """7.4 and 7.5 of the script's main(), the policy left out."""
    module_schedule(module, optimizer, critic, update, args)
    seed_torch(args.seed, "latent", update)
    batch = batch | module.score_tokens(policy, critic, batch, args)
    _, targets = module.advantages_and_targets(rewards, batch, args)
    batch |= targets
    unit = batch["returns"][batch["mask"]].var().clamp(min=0.01)
    for epoch in range(args.epochs):
        for rows in permutation(len(rewards), args.seed, "minibatches", update, epoch).split(
            args.minibatch_size
        ):
            minibatch = take(batch, rows)
            minibatch["weights"] = ppo.token_weights(minibatch["mask"])
            for key in ("entropy", "perplexity"):
                if f"{key}_active" in minibatch:
                    minibatch[f"{key}_weights"] = ppo.token_weights(minibatch[f"{key}_active"])
            optimizer.zero_grad()
            for _, part in micro_batches(minibatch, args.micro_batch_size):
                features = critic.features(part["inputs"], part["mask"], None)
                module.critic_loss(critic, features, part, unit, args)[0].backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            optimizer.step()


def measure(
    module, policy, critic, batch: dict, clean, observed, fresh, fitted, args
) -> dict[str, float]:
    """On fresh episodes, over tokens: explained variance against clean returns (samples of the
    clean expected ones, so that even those would not reach 1); R^2 of the best line from value to
    clean return, which forgives the shrinking that a symmetric channel asks for; AUC of the last
    token's value for right against wrong; calibration, the mean distance in ten equal bins of the
    values from what the channel makes of the clean rewards on average; the share of the variance of
    the advantages that the reward errors make (1 - squared correlation with the advantages of the
    clean rewards). On the last fitted episodes: the share of their reward errors that the values
    reproduce (right and wrong answers apart), and errors where the reward was flipped or not."""
    seed_torch(args.seed, "measure")
    part = take(batch, fresh)
    mask, right = part["mask"], clean[fresh]
    part |= module.score_tokens(policy, critic, part, args)
    values, returns = part["values"], right.unsqueeze(1).expand_as(part["values"])
    rewards = (ppo.place_rewards(x, mask) for x in (observed[fresh], right))
    advantages = [module.advantages_and_targets(x, part, args)[0] for x in rewards]
    last = values[turn_ends(mask)]
    wins = stats.mannwhitneyu(last[right == 1], last[right == 0]).statistic
    v, r = values[mask], returns[mask]
    expected = torch.where(r == 1, observed[clean == 1].mean(), observed[clean == 0].mean())
    bins = [(v[b].mean() - expected[b].mean()).abs() for b in v.argsort().chunk(10)]
    result = {
        "explained_variance": explained_variance(values, returns, mask),
        "r_squared": torch.corrcoef(torch.stack([v, r]))[0, 1].square().nan_to_num().item(),
        "auc": float(wins / ((right == 1).sum() * (right == 0).sum())),
        "calibration_error": torch.stack(bins).mean().item(),
        "advantage_noise": advantage_noise(*advantages, mask),
    }
    part = take(batch, fitted)
    mask, seen, right = part["mask"], observed[fitted].unsqueeze(1), clean[fitted].unsqueeze(1)
    values = module.score_tokens(policy, critic, part, args)["values"]
    errors = (values - right) ** 2
    flipped = mask & ((seen - right).abs() > 0.5)
    result["noise_fitted"] = noise_fitted(values, seen, right, mask)
    result["rmse_flipped"] = errors[flipped].mean().sqrt().item()
    result["rmse_unflipped"] = errors[mask & ~flipped].mean().sqrt().item()
    return result


def noise_fitted(values, observed, clean, mask) -> float:
    """cov(V, e) / var(e) over the masked tokens, e = observed - clean reward (B, 1), right and
    wrong answers apart, as errors go with the outcome: 0 where the values know nothing of the
    errors, 1 where they repeat them. NaN where no reward is wrong."""
    v, e, right = (x.expand_as(values)[mask] for x in (values, observed - clean, clean > 0.5))
    for group in (right, ~right):
        v[group], e[group] = v[group] - v[group].mean(), e[group] - e[group].mean()
    return ((v * e).sum() / (e * e).sum()).item()


def write_tokens(args: "Args") -> None:
    """The same fresh answers with the values of every critic, in the form of a run's
    transcripts.jsonl."""
    for name in args.critics:
        job = Fit("tokens", name, "", args.tokens_noise, args.seeds[0])
        critic, _ = fit(job, args.channel, args.model, args.dataset)
        policy, chat, batch, clean, keys = rollouts(
            args.model, args.dataset, job.seed, job.rollouts
        )
        module, script = resolved(job, args.channel)
        observed = observed_rewards(script, clean, keys, batch["mask"])
        rows = torch.arange(len(clean) - FRESH, len(clean), 4)
        part = take(batch, rows)
        part |= module.score_tokens(policy, critic, part, script)
        rewards = ppo.place_rewards(observed[rows], part["mask"])
        advantages, _ = module.advantages_and_targets(rewards, part, script)
        part |= {"rewards": rewards, "advantages": ppo.whiten(advantages, part["mask"])}
        folder = CACHE / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(
            json.dumps({"script": name, **{k: str(v) for k, v in vars(script).items()}})
        )
        with (folder / "transcripts.jsonl").open("w") as file:
            for i, row in enumerate(rows.tolist()):
                length = int(part["mask"][i].nonzero().max()) + 1
                tokens = {
                    "text": [chat.tokenizer.decode(t) for t in part["targets"][i, :length].tolist()]
                }
                tokens["chosen"] = part["mask"][i, :length].tolist()
                for key in ("values", "advantages", "entropy", "rewards"):
                    tokens[key] = part[key][i, :length].double().round(decimals=4).tolist()
                record = {
                    "update": 0,
                    "messages": [{"role": "user", "content": keys[row]}],
                    "tokens": tokens,
                }
                file.write(json.dumps(record | {"outcome": {"accuracy": clean[row].item()}}) + "\n")
        print(folder)


MEASURES = {
    "explained_variance": "explained variance, clean returns",
    "r_squared": "R²",
    "auc": "AUC",
    "calibration_error": "calibration error",
    "noise_fitted": "noise fitted",
    "advantage_noise": "noise in the advantages",
    "rmse_flipped": "RMSE, flipped",
    "rmse_unflipped": "RMSE, unflipped",
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


def markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def report(frame: pd.DataFrame, out: Path) -> None:
    """Tables (.md) and figure (.png) beside the CSV, from its rows alone; the first tables and the
    differences go into the README."""
    sections = []

    def table(
        title: str, data: pd.DataFrame, index: str | list[str], columns: str, key: str
    ) -> None:
        """Mean and interval of `key` over seeds, a row for each `index`, a column for each value of
        `columns`."""
        index = [index] if isinstance(index, str) else index
        heads = sorted(data[columns].unique())
        rows = [
            [
                *(name if isinstance(name, tuple) else (name,)),
                *(cell(group[group[columns] == x][key]) for x in heads),
            ]
            for name, group in data.groupby(index, sort=False)
        ]
        seeds = sorted(data["seed"].unique())
        title += f" (seeds {', '.join(map(str, seeds))})"
        sections.append(markdown(title, [*index, *(f"{x:g}" for x in heads)], rows))

    frame = frame.assign(critic=pd.Categorical(frame["critic"], list(CRITICS))).sort_values(
        "critic", kind="stable"
    )
    frame["critic"] = frame["critic"].astype(str)
    noise = frame[frame["part"] == "noise"]
    final = noise[noise["rollouts"] == 2560]
    if len(final):
        for key in (
            "explained_variance",
            "r_squared",
            "auc",
            "calibration_error",
            "noise_fitted",
            "advantage_noise",
        ):
            table(
                f"{MEASURES[key]}, by noise rate, after 2,560 rollouts",
                final,
                "critic",
                "noise",
                key,
            )
        plain = final[final["critic"] == "plain"].set_index(["noise", "seed"])
        for key in ("explained_variance", "r_squared", "auc"):
            paired = final[final["critic"] != "plain"].copy()
            base = (
                plain[key].reindex(pd.MultiIndex.from_frame(paired[["noise", "seed"]])).to_numpy()
            )
            paired[key] = paired[key] - base
            table(
                f"{MEASURES[key]}: difference from the plain critic, paired by seed",
                paired,
                "critic",
                "noise",
                key,
            )
        for rate in sorted(noise["noise"].unique()):
            some = noise[noise["noise"] == rate]
            table(
                f"R² by number of rollouts, noise {rate:g}", some, "critic", "rollouts", "r_squared"
            )
    own = {
        "VRPO": "default",
        "bottleneck": "no semantic losses",
        "semantic": "no bottleneck",
        "plain": "neither",
    }
    parts = frame[frame["part"] == "vrpo"]
    some = noise[
        (noise["noise"] == 0.2)
        & noise["critic"].isin(list(own))
        & noise["seed"].isin(parts["seed"])
    ]
    parts = pd.concat(
        [some.assign(part="vrpo", critic="VRPO", setting=some["critic"].map(own)), parts]
    )
    keys = ("explained_variance", "r_squared", "auc", "noise_fitted")
    some = parts[parts["rollouts"] == 2560].set_index(["setting", "seed"])
    if "default" in some.index:
        rows = []
        for setting, group in some.groupby("setting", sort=False):
            changes = group.droplevel("setting")[list(keys)] - some.loc["default"][list(keys)]
            rows.append(
                [
                    setting,
                    *(f"{group[k].mean():.2f}" for k in keys),
                    *(cell(changes[k]) for k in keys[:3]),
                ]
            )
        header = [
            "VRPO",
            *(MEASURES[k] for k in keys),
            *(f"{MEASURES[k]}: difference" for k in keys[:3]),
        ]
        title = "What each part of VRPO contributes: noise 0.2, means over seeds, and differences from the default paired by seed"
        sections.append(markdown(title, header, rows))
    some = frame[(frame["part"] == "tuning") & (frame["rollouts"] == 2560)]
    rows = [
        [*row[:2], *(f"{x:.2f}" for x in row[2:])]
        for row in some[["critic", "setting", *keys]].to_numpy()
    ]
    header = ["critic", "setting", *(MEASURES[key] for key in keys)]
    sections += (
        [markdown("Tuning: noise 0.3, one fit each, seed 101", header, rows)] if rows else []
    )
    some = frame[(frame["part"] == "passes") & (frame["rollouts"] == 1280)]
    for key in ("r_squared", "noise_fitted") if len(some) else ():
        table(
            f"{MEASURES[key]} by passes over the same 1,280 rollouts, noise 0.2",
            some,
            "critic",
            "passes",
            key,
        )
    out.with_suffix(".md").write_text("\n".join(sections))
    if out == RESULTS / "critic_study.csv":
        shown = [
            text for text in sections if text.startswith(("explained", "R²: diff", "AUC: diff"))
        ]
        write_atomically(README, insert(README.read_text(), "critic_study", "\n".join(shown)))
    passes = frame[(frame["part"] == "passes") & (frame["rollouts"] == 1280)]
    draw(noise, parts[parts["rollouts"] == 2560], passes, out.with_suffix(".png"))
    print("\n".join(sections))


def draw(noise: pd.DataFrame, parts: pd.DataFrame, passes: pd.DataFrame, out: Path) -> None:
    """Means over seeds with 95 % intervals; seeds differ more than critics do, so the two panels of
    differences are paired by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    final, early = noise[noise["rollouts"] == 2560], noise[noise["noise"] == 0.2]
    colors = {name: f"C{i}" for i, name in enumerate(CRITICS)}

    def lines(axis, data: pd.DataFrame, x: str, y: str, band: bool = True, **style) -> None:
        for name in (name for name in CRITICS if name in set(data["critic"])):
            group = data[data["critic"] == name]
            xs = sorted(group[x].unique())
            mean, low, high = zip(
                *(interval(group[group[x] == value][y]) for value in xs), strict=True
            )
            axis.plot(xs, mean, marker="o", markersize=3, color=colors[name], label=name, **style)
            if band:
                axis.fill_between(xs, low, high, color=colors[name], alpha=0.06, lw=0)

    lines(axes[0, 0], final, "noise", "explained_variance")
    lines(axes[0, 1], final, "noise", "r_squared")
    lines(axes[1, 0], early, "rollouts", "r_squared")
    lines(axes[1, 1], passes, "passes", "r_squared", band=False)
    lines(axes[1, 1], passes, "passes", "noise_fitted", band=False, ls="--")
    plain = final[final["critic"] == "plain"].set_index(["noise", "seed"])["r_squared"]
    others = [name for name in CRITICS if name != "plain" and name in set(final["critic"])]
    for i, name in enumerate(others):
        series = final[final["critic"] == name].set_index(["noise", "seed"])["r_squared"]
        for rate, values in (series - plain).dropna().groupby(level="noise"):
            mean, low, high = interval(values)
            x = rate + 0.009 * (i - (len(others) - 1) / 2)
            axes[0, 2].errorbar(
                x,
                mean,
                yerr=[[mean - low], [high - mean]],
                fmt="o",
                ms=3,
                capsize=2,
                color=colors[name],
            )
    axes[0, 2].axhline(0, color="grey", lw=0.8)
    table = parts.pivot_table(index="setting", columns="seed", values="r_squared", sort=False)
    rows = (
        table.sub(table.loc["default"]).drop(index="default") if "default" in table.index else table
    )[::-1]
    for i, (_, values) in enumerate(rows.iterrows()):
        mean, low, high = interval(values)
        axes[1, 2].errorbar(
            mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=colors["VRPO"], capsize=3
        )
    axes[1, 2].axvline(0, color="grey", lw=0.8)
    axes[1, 2].set_yticks(range(len(rows)), list(rows.index), fontsize=8)
    rate, count = "rate of flipped rewards", "rollouts (noise 0.2)"
    titles = [
        ("explained variance of clean returns", rate), ("R², clean returns", rate), ("R²: difference from the plain critic", rate),
        ("R², clean returns", count), ("R² (solid) and noise fitted (dashed)", "passes over 1,280 rollouts (noise 0.2)"),
        ("parts of VRPO: difference in R² from the default", "noise 0.2"),
    ]  # fmt: skip
    for axis, (title, xlabel) in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.grid(alpha=0.3)
    if others:
        axes[0, 0].legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


@dataclass
class Args:
    parts: tuple[Literal["tuning", "noise", "vrpo", "passes"], ...] = (
        "tuning",
        "noise",
        "vrpo",
        "passes",
    )
    """what to do"""
    critics: tuple[str, ...] = field(default_factory=lambda: tuple(CRITICS))
    """of these"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of rollouts, flips, order and initial weights (tuning has its own)"""
    channel: str = "symmetric"
    """--noise of the scripts, at the rates of the part"""
    model: str = "assets/tiny_math"
    """policy whose rollouts are valued"""
    dataset: str = "assets/data/tiny_math"
    """its problems"""
    workers: int = 2
    """fits at a time, one thread each"""
    out: Path = RESULTS / "critic_study.csv"
    """one row for each measurement"""
    report: bool = False
    """only make the tables and the figure again"""
    tokens: bool = False
    """only write the token records of every critic for `python -m utils.tokens`"""
    tokens_noise: float = 0.2
    """rate of flips for --tokens"""


KEY = ["part", "critic", "setting", "noise", "seed", "digest"]


def main(args: Args) -> None:
    os.chdir(ROOT)
    if unknown := set(args.critics) - set(CRITICS):
        stop(f"--critics {' '.join(unknown)}: there are {', '.join(CRITICS)}")
    if args.tokens:
        return write_tokens(args)
    where = (args.channel, args.model, args.dataset)
    keys = {
        (*(getattr(job, key) for key in KEY[:-1]), digest(job, *where)): job
        for job in fits(args.seeds)
    }
    frame = pd.DataFrame(columns=KEY)
    if args.out.exists():
        frame = pd.read_csv(args.out, dtype={"setting": str}).fillna({"setting": ""})
    done = set(map(tuple, frame[KEY].to_numpy()))
    wanted = {
        key: job
        for key, job in keys.items()
        if job.part in args.parts and job.critic in args.critics
    }
    jobs = [job for key, job in wanted.items() if key not in done and not args.report]
    context, failed = multiprocessing.get_context("spawn"), []
    with (
        ProcessPoolExecutor(args.workers, context) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("fits", total=len(jobs))
        futures = {pool.submit(fit_rows, job, *where): job for job in jobs}
        for future in as_completed(futures):
            if future.exception():
                failed.append(f"{futures[future]}: {future.exception()}")
                continue
            frame = pd.concat([frame, pd.DataFrame(future.result())], ignore_index=True)
            write_atomically(args.out, frame.to_csv(index=False, float_format="%.5f"))
            progress.advance(bar)
    present = [key in keys for key in map(tuple, frame[KEY].to_numpy())]
    if not any(present):
        stop(f"{args.out}: no rows of the present flags")
    report(frame[present], args.out)
    if failed:
        stop("\n".join(failed))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

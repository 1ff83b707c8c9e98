"""Which critic absorbs reward noise? Critics are fitted to the same rollouts with the same flips, without an RL loop in the way.

    python benchmark/critic_study.py                         # all parts; hours on two cores, stop and continue at will
    python benchmark/critic_study.py --parts noise --seeds 1 2 --critics plain VRPO
    python benchmark/critic_study.py --report                # tables and figure from the CSV alone
    python benchmark/critic_study.py --tokens                # the same answers through the eyes of every critic: runs/critic_study

A fit is what main() of the script does with its critic when the policy stands still, by the script's own functions: 256 rollouts
an update, values and targets of the update, two epochs in minibatches of 64. Measures are taken on fresh rollouts of other
prompts. The parts: `tuning` (the same number of settings for every critic, separate seeds), `noise` (rates 0 to 0.4), `vrpo`
(what each part of VRPO contributes), `passes` (further passes over the same rollouts). Writes benchmark/results/critic_study.csv;
a fit whose rows are there is skipped.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.progress import Progress
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dvpo_math as dvpo  # noqa: E402
import ppo_baseline as ppo  # noqa: E402
import robust_ppo_baseline as robust  # noqa: E402
import vrpo_math as vrpo  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.keyed import permutation, seed_torch  # noqa: E402
from utils.models import load_policy, pick_device  # noqa: E402
from utils.tasks import load_task  # noqa: E402

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmark" / "results"
CACHE = ROOT / "runs" / "critic_study"
UPDATE = 256  # rollouts
FRESH = 512
NO_TERMS = {f"lambda_{name}": 0.0 for name in ("consistency", "cvar", "gain", "shift", "shape", "curvature")}
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
# Four settings for each: the defaults that the search began with, a higher learning rate, two of its own.
LAMBDA = {"lambda_ent": 0.01, "lambda_ppl": 0.01}
SEARCH = {
    "plain": [{"critic_lambda": 0.95}, {"value_clip": 0.2}],
    "bottleneck": [{"beta": 0.003}, {"loss_samples": 8}],
    "semantic": [LAMBDA, {"lambda_ent": 0.0}],
    "VRPO": [LAMBDA, {**LAMBDA, "loss_samples": 8}],
    "quantile": [{"critic_lambda": 1.0}, {"huber_kappa": 0.3}],
    "DVPO": [{"critic_lambda": 1.0}, {"lambda_shift": 0.0}],
    "ensemble-min": [{"critic_lambda": 1.0}, {"value_heads": 8}],
    "contamination": [{"critic_lambda": 1.0}, {"contamination": 0.01}],
    "conservative": [{"critic_lambda": 1.0}, {"conservative_coef": 0.01}],
}
VRPO_PARTS = {
    "no semantic losses": NO_WORDS,
    "no bottleneck": {"bottleneck_layers": 0},
    "neither (plain)": {"bottleneck_layers": 0, **NO_WORDS},
    "two bottleneck layers": {"bottleneck_layers": 2},
    "beta 0.001": {"beta": 0.001},
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
    """One fit: `setting` says what differs from the critic's defaults; `passes` over `rollouts` episodes."""

    part: str
    critic: str
    setting: str
    noise: float
    seed: int
    rollouts: int = 2560
    passes: int = 1
    flags: tuple = ()


def fits(seeds: tuple[int, ...]) -> list[Fit]:
    """All fits in the order in which they are made."""
    jobs = [
        Fit("tuning", critic, text(flags), 0.2, 101, flags=tuple(flags.items()))
        for critic in CRITICS
        for flags in ({}, {"critic_learning_rate": 1e-3}, *SEARCH[critic])
    ]
    jobs += [
        Fit("noise", critic, "", noise, seed)
        for seed in seeds
        for noise in (0.2, 0.4, 0.0, 0.3, 0.1)
        for critic in CRITICS
    ]
    jobs += [
        Fit("vrpo", "VRPO", name, 0.3, seed, flags=tuple(flags.items()))
        for seed in seeds
        for name, flags in {"VRPO": {}, **VRPO_PARTS}.items()
    ]
    jobs += [
        Fit("passes", critic, "", 0.3, seed, rollouts=1280, passes=6)
        for seed in seeds[:3]
        for critic in ("plain", "bottleneck", "VRPO", "DVPO")
    ]
    return jobs


def text(flags: dict) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items()) or "defaults"


@lru_cache(maxsize=2)
def rollouts(model: str, dataset: str, seed: int, count: int):
    """The policy, and `count` + FRESH episodes of it, four to a prompt: batch, clean rewards, prompt keys. Kept on disk."""
    pick_device("cpu")
    policy, chat = load_policy(model, CPU)
    file = CACHE / f"{Path(model).name}_{seed}_{count}.pt"
    if not file.exists():
        args = ppo.Args(model=model, dataset=dataset)
        task, episodes = load_task(args, chat), []
        for update in range((count + FRESH) // UPDATE):
            problems = [p for p in task.batch(seed, update + 1, UPDATE // 4) for _ in range(4)]
            seed_torch(seed, "rollout", update)
            episodes += ppo.rollout(policy, chat, task, problems, args, 1.0)
        clean = [task.grade(e.problem, ppo.judged(e, args)) for e in episodes]
        kept = (ppo.pack(episodes, chat.pad_id, CPU), torch.tensor(clean), [e.problem.key for e in episodes])
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file.with_suffix(f".{os.getpid()}"))
        file.with_suffix(f".{os.getpid()}").rename(file)
    return policy, chat, *torch.load(file)


def observed_rewards(args, clean: torch.Tensor, keys: list[str], mask: torch.Tensor) -> torch.Tensor:
    """The clean rewards through the script's channel, update by update."""
    seen, lengths = [], mask.sum(1).tolist()
    for update, start in enumerate(range(0, len(clean), UPDATE)):
        some = slice(start, start + UPDATE)
        seen += ppo.observe(args, clean[some].tolist(), keys[some], lengths[some], update + 1)
    return torch.tensor(seen)


def fit(job: Fit, channel: str, model: str, dataset: str, keep: bool = False):
    """Rows of measures after 512, 1280 and 2560 rollouts and after every further pass (or, with `keep`, the critic)."""
    torch.set_num_threads(1)
    module, flags = CRITICS[job.critic]
    args = module.Args(noise=channel, noise_rate=job.noise, seed=job.seed, **{**flags, **dict(job.flags)})
    policy, _, batch, clean, keys = rollouts(model, dataset, job.seed, max(2560, job.rollouts))
    observed = observed_rewards(args, clean, keys, batch["mask"])
    rewards = ppo.place_rewards(observed.unsqueeze(1), batch["mask"])
    fresh = torch.arange(len(clean) - FRESH, len(clean))
    seed_torch(job.seed, "critic")
    critic = module.Critic(policy, args)
    torch.nn.init.constant_(critic.head.bias, observed[:UPDATE].mean().item())
    optimizer = module.make_optimizer(policy, critic, args)
    rows, update = [], 0
    for once in range(job.passes):
        for start in range(0, job.rollouts, UPDATE):
            update += 1
            chunk = torch.arange(start, start + UPDATE)
            part = ppo.take(batch, chunk)
            train_update(module, policy, critic, optimizer, part, rewards[chunk, : part["mask"].shape[1]], args, update)
            seen = start + UPDATE
            if seen == job.rollouts or (once == 0 and seen in (512, 1280)):
                taken = {"rollouts": seen, "passes": once + 1}
                fitted = torch.arange(max(0, seen - FRESH), seen)
                measures = measure(module, policy, critic, batch, clean, observed, fresh, fitted, args)
                rows.append({**vars(job), **taken, **measures})
    return critic if keep else [{k: v for k, v in row.items() if k != "flags"} for row in rows]


def train_update(module, policy, critic, optimizer, batch: dict, rewards: torch.Tensor, args, update: int) -> None:
    """9.3 and 9.4 of the script's main(), the policy left out."""
    seed_torch(args.seed, "latent", update)
    batch = batch | module.score_tokens(policy, None, critic, batch, args)
    _, targets = module.advantages_and_targets(rewards, batch, args)
    batch |= targets
    unit = batch["returns"][batch["mask"]].var().clamp(min=0.01)
    for epoch in range(args.epochs):
        for rows in permutation(len(rewards), args.seed, "minibatches", update, epoch).split(args.minibatch_size):
            minibatch = ppo.take(batch, rows)
            minibatch["weights"] = ppo.token_weights(minibatch["mask"])
            for key in ("entropy", "perplexity"):
                if f"{key}_active" in minibatch:
                    minibatch[f"{key}_weights"] = ppo.token_weights(minibatch[f"{key}_active"])
            optimizer.zero_grad()
            for micro in ppo.by_length(minibatch["mask"]).split(args.micro_batch_size):
                part = ppo.take(minibatch, micro)
                features = critic.features(part["inputs"], part["mask"], None)
                module.critic_loss(critic, features, part, unit, update, args)[0].backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            optimizer.step()


def measure(module, policy, critic, batch: dict, clean, observed, fresh, fitted, args) -> dict[str, float]:
    """On fresh episodes, over tokens: explained variance against clean returns; R^2 of the best line from value to clean return, which
    forgives the shrinking that a symmetric channel asks for; AUC of the last token's value for right against wrong; calibration,
    the mean distance in ten equal bins of the values from what the channel makes of the clean rewards on average. On the last
    fitted episodes: the share of their reward errors that the values reproduce, and errors where the reward was flipped or not."""
    seed_torch(args.seed, "measure")
    part = ppo.take(batch, fresh)
    mask, right = part["mask"], clean[fresh]
    values = module.score_tokens(policy, None, critic, part, args)["values"]
    returns = right.unsqueeze(1).expand_as(values)
    last = values[ppo.turn_ends(mask)]
    wins = stats.mannwhitneyu(last[right == 1], last[right == 0]).statistic
    v, r = values[mask], returns[mask]
    expected = torch.where(r == 1, observed[clean == 1].mean(), observed[clean == 0].mean())
    bins = [(v[b].mean() - expected[b].mean()).abs() for b in v.argsort().chunk(10)]
    result = {
        "explained_variance": ppo.explained_variance(values, returns, mask),
        "r_squared": torch.corrcoef(torch.stack([v, r]))[0, 1].square().nan_to_num().item(),
        "auc": float(wins / ((right == 1).sum() * (right == 0).sum())),
        "calibration_error": torch.stack(bins).mean().item(),
    }
    part = ppo.take(batch, fitted)
    mask, wrong = part["mask"], (observed - clean)[fitted].unsqueeze(1).expand_as(part["mask"])
    values = module.score_tokens(policy, None, critic, part, args)["values"]
    errors = (values - clean[fitted].unsqueeze(1)) ** 2
    flipped = mask & (wrong.abs() > 0.5)
    result["noise_fitted"] = 1 - ppo.noise_absorbed(values, (observed - clean)[fitted].unsqueeze(1), mask)
    result["rmse_flipped"] = errors[flipped].mean().sqrt().item()
    result["rmse_unflipped"] = errors[mask & ~flipped].mean().sqrt().item()
    return result


def write_tokens(args: "Args") -> None:
    """The same fresh answers with the values of every critic, in the form of a run's transcripts.jsonl."""
    import json

    for name, (module, flags) in CRITICS.items():
        if name not in args.critics:
            continue
        job = Fit("tokens", name, "", args.tokens_noise, args.seeds[0])
        critic = fit(job, args.channel, args.model, args.dataset, keep=True)
        policy, chat, batch, clean, keys = rollouts(args.model, args.dataset, job.seed, job.rollouts)
        script = module.Args(noise=args.channel, noise_rate=job.noise, seed=job.seed, **flags)
        observed = observed_rewards(script, clean, keys, batch["mask"])
        rows = torch.arange(len(clean) - FRESH, len(clean), 4)
        part = ppo.take(batch, rows)
        part |= module.score_tokens(policy, None, critic, part, script)
        rewards = ppo.place_rewards(observed[rows].unsqueeze(1), part["mask"])
        advantages, _ = module.advantages_and_targets(rewards, part, script)
        part |= {"rewards": rewards, "advantages": ppo.whiten(advantages, part["mask"])}
        folder = CACHE / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps({"script": name, **{k: str(v) for k, v in vars(script).items()}}))
        with (folder / "transcripts.jsonl").open("w") as file:
            for i, row in enumerate(rows.tolist()):
                length = int(part["mask"][i].nonzero().max()) + 1
                tokens = {"text": [chat.tokenizer.decode(t) for t in part["targets"][i, :length].tolist()]}
                tokens["chosen"] = part["mask"][i, :length].tolist()
                for key in ("values", "advantages", "entropy", "rewards"):
                    tokens[key] = part[key][i, :length].double().round(decimals=4).tolist()
                record = {"update": 0, "messages": [{"role": "user", "content": keys[row]}], "tokens": tokens}
                file.write(json.dumps(record | {"outcome": {"accuracy": clean[row].item()}}) + "\n")
        print(folder)


MEASURES = {
    "explained_variance": "explained variance, clean returns",
    "r_squared": "R²",
    "auc": "AUC",
    "calibration_error": "calibration error",
    "noise_fitted": "noise fitted",
    "rmse_flipped": "RMSE, flipped",
    "rmse_unflipped": "RMSE, unflipped",
}


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean over seeds and its bootstrap 95 % interval."""
    x = values.dropna().to_numpy()
    if len(x) < 2 or x.std() == 0:
        return (x.mean() if len(x) else float("nan"),) * 3
    found = stats.bootstrap((x,), lambda a, axis: a.mean(axis), n_resamples=2000, rng=0, method="percentile")
    return x.mean(), *found.confidence_interval


def cell(values: pd.Series) -> str:
    mean, low, high = interval(values)
    return f"{mean:.2f}" if low == high or low != low else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def report(frame: pd.DataFrame) -> None:
    """benchmark/results/critic_study.md and .png, from the rows alone."""
    sections = []
    noise = frame[frame["part"] == "noise"]
    final = noise[noise["rollouts"] == noise["rollouts"].max()]
    critics = [name for name in CRITICS if name in set(final["critic"])]
    rates = sorted(final["noise"].unique())
    for key in ("explained_variance", "auc"):
        rows = [
            [c, *(cell(final[(final["critic"] == c) & (final["noise"] == p)][key]) for p in rates)] for c in critics
        ]
        sections.append(markdown(f"{MEASURES[key]}, by noise rate", ["critic", *(f"{p:g}" for p in rates)], rows))
    paired = final.pivot_table(index=["noise", "seed"], columns="critic", values="explained_variance")
    rows = [
        [c, *(cell((paired[c] - paired["plain"])[paired.index.get_level_values("noise") == p]) for p in rates)]
        for c in critics
        if c != "plain"
    ]
    header = ["critic", *(f"{p:g}" for p in rates)]
    sections.append(markdown("Explained variance minus the plain critic's, paired by seed", header, rows))
    some = final[final["noise"] == 0.3]
    rows = [[c, *(cell(some[some["critic"] == c][key]) for key in MEASURES)] for c in critics]
    sections.append(markdown("All measures at noise 0.3", ["critic", *MEASURES.values()], rows))
    early = noise[noise["noise"] == 0.3]
    counts = sorted(early["rollouts"].unique())
    rows = [
        [c, *(cell(early[(early["critic"] == c) & (early["rollouts"] == n)]["explained_variance"]) for n in counts)]
        for c in critics
    ]
    header = ["critic", *(str(n) for n in counts)]
    sections.append(markdown("Explained variance at noise 0.3, by number of rollouts", header, rows))
    for part, title in (("vrpo", "What each part of VRPO contributes, noise 0.3"), ("tuning", "Tuning, noise 0.2")):
        some = frame[(frame["part"] == part) & (frame["rollouts"] == 2560)]
        rows = [
            [*name, *(cell(group[key]) for key in ("explained_variance", "r_squared", "auc", "noise_fitted"))]
            for name, group in some.groupby(["critic", "setting"], sort=False)
        ]
        header = [
            "critic",
            "setting",
            *(MEASURES[key] for key in ("explained_variance", "r_squared", "auc", "noise_fitted")),
        ]
        if rows:
            sections.append(markdown(title, header, rows))
    some = frame[frame["part"] == "passes"]
    some = some[some["rollouts"] == some["rollouts"].max()]
    passes = sorted(some["passes"].unique())
    for key in ("explained_variance", "noise_fitted"):
        rows = [
            [c, *(cell(some[(some["critic"] == c) & (some["passes"] == p)][key]) for p in passes)]
            for c in CRITICS
            if c in set(some["critic"])
        ]
        if rows:
            title = f"{MEASURES[key]} by passes over the same 1,280 rollouts, noise 0.3"
            sections.append(markdown(title, ["critic", *(str(p) for p in passes)], rows))
    (RESULTS / "critic_study.md").write_text("\n".join(sections))
    draw(noise, frame[(frame["part"] == "vrpo") & (frame["rollouts"] == 2560)], critics)
    print("\n".join(sections))


def draw(noise: pd.DataFrame, parts: pd.DataFrame, critics: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    final = noise[noise["rollouts"] == noise["rollouts"].max()]
    early = noise[noise["noise"] == 0.3]
    panels = [
        (axes[0], final, "noise", "explained_variance", "rate of flipped rewards", "explained variance, clean returns"),
        (axes[1], final, "noise", "auc", "rate of flipped rewards", "AUC of the last token's value"),
        (axes[2], early, "rollouts", "explained_variance", "rollouts (noise 0.3)", "explained variance, clean returns"),
    ]
    for axis, data, x, y, xlabel, title in panels:
        for i, name in enumerate(critics):
            group = data[data["critic"] == name]
            xs = sorted(group[x].unique())
            mean, low, high = zip(*(interval(group[group[x] == value][y]) for value in xs), strict=True)
            axis.plot(xs, mean, marker="o", markersize=3, color=f"C{i}", label=name)
            axis.fill_between(xs, low, high, color=f"C{i}", alpha=0.12, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].axhline(0, color="grey", lw=0.8)
    axes[0].legend(fontsize=8)
    groups = list(parts.groupby("setting", sort=False)["explained_variance"])[::-1]
    for i, (_, values) in enumerate(groups):
        mean, low, high = interval(values)
        axes[3].errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color="C3", capsize=3)
    axes[3].set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=8)
    axes[3].set_title("parts of VRPO: explained variance, noise 0.3", fontsize=10)
    axes[3].grid(alpha=0.3)
    figure.savefig(RESULTS / "critic_study.png", dpi=130)
    plt.close(figure)


@dataclass
class Args:
    parts: tuple[str, ...] = ("tuning", "noise", "vrpo", "passes")
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
    tokens_noise: float = 0.3
    """rate of flips for --tokens"""


KEY = ["part", "critic", "setting", "noise", "seed"]


def main(args: Args) -> None:
    os.chdir(ROOT)
    if unknown := set(args.critics) - set(CRITICS):
        stop(f"--critics {' '.join(unknown)}: there are {', '.join(CRITICS)}")
    if args.tokens:
        return write_tokens(args)
    frame = pd.read_csv(args.out, keep_default_na=True).fillna({"setting": ""}) if args.out.exists() else pd.DataFrame()
    done = set(map(tuple, frame[KEY].to_numpy())) if len(frame) else set()
    jobs = [job for job in fits(args.seeds) if job.part in args.parts and job.critic in args.critics]
    jobs = [job for job in jobs if tuple(getattr(job, key) for key in KEY) not in done]
    if jobs and not args.report:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, context) as pool, Progress() as progress:
            bar = progress.add_task("fits", total=len(jobs))
            futures = [pool.submit(fit, job, args.channel, args.model, args.dataset) for job in jobs]
            for future in as_completed(futures):
                frame = pd.concat([frame, pd.DataFrame(future.result())], ignore_index=True)
                frame.to_csv(args.out, index=False, float_format="%.5f")
                progress.advance(bar)
    report(frame)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

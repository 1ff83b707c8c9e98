"""How well does a critic fitted to noisy rewards predict clean ones? No RL loop: rollouts of the embedded policy, then a fit.

    python benchmark/critic_fit.py                           # about 20 minutes on one core

Every arm is vrpo_math.py's own critic and losses with other flags (`plain` is ppo_baseline.py's), fitted to the same rollouts
with the same flips; explained variance against clean returns and the AUC of the last token's value for right against wrong are
measured on fresh rollouts. Writes benchmark/results/critic_fit.csv and .md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vrpo_math as vrpo  # noqa: E402
from utils.keyed import coin, permutation, seed_torch  # noqa: E402
from utils.models import load_policy  # noqa: E402
from utils.tasks import load_task  # noqa: E402

PLAIN = {"bottleneck_layers": 0, "lambda_ent": 0.0, "lambda_ppl": 0.0}
ARMS = {
    "plain, no noise": {**PLAIN, "noise_rate": 0.0},
    "plain": PLAIN,
    "bottleneck alone": {"lambda_ent": 0.0, "lambda_ppl": 0.0},
    "bottleneck alone, no beta warm-up": {"lambda_ent": 0.0, "lambda_ppl": 0.0, "beta_warmup": 1},
    "VRPO (lambda 0.05)": {},
    "VRPO (lambda 0.5)": {"lambda_ent": 0.5, "lambda_ppl": 0.5},
}


@dataclass
class Args:
    rollouts: int = 3072
    """episodes to fit"""
    fresh: int = 1024
    """episodes to measure on, other prompts"""
    epochs: int = 2
    """passes over the episodes"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of rollouts, flips, order and initial weights"""


def play(policy, chat, task, args: Args, seed: int) -> list[tuple]:
    """Episodes of the initial policy, four to a prompt, with their clean rewards."""
    flags, episodes = vrpo.Args(), []
    for update in range((args.rollouts + args.fresh) // 256):
        problems = [p for p in task.batch(seed, update + 1, 64) for _ in range(4)]
        seed_torch(seed, "rollout", update)
        episodes += vrpo.rollout(policy, chat, task, problems, flags, 1.0)
    return [(e, task.grade(e.problem, vrpo.judged(e, flags))) for e in episodes]


@torch.no_grad()
def measure(critic, policy, batch: dict, clean: torch.Tensor, flags) -> tuple[float, float]:
    """Explained variance against clean returns, and the AUC of the value at the last token."""
    values = vrpo.score_tokens(policy, None, critic, batch, flags)["values"]
    mask = batch["mask"]
    last = values[vrpo.place_rewards(torch.ones(len(clean), 1), mask) > 0]
    auc = (last[clean == 1].unsqueeze(1) > last[clean == 0]).float().mean().item()
    return vrpo.explained_variance(values, clean.unsqueeze(1).expand_as(values), mask), auc


def fit(policy, chat, played: list[tuple], args: Args, flags, seed: int) -> tuple[float, float]:
    """Train a fresh critic as main() of the script does, 8 minibatches to an "update" for the warm-up of beta."""
    batch = vrpo.pack([e for e, _ in played], chat.pad_id, torch.device("cpu"))
    clean = torch.tensor([r for _, r in played])
    flips = torch.tensor([coin(seed, "flip", i) < flags.noise_rate for i in range(len(played))])
    returns = torch.where(flips, 1 - clean, clean)[: args.rollouts]
    train = {key: value[: args.rollouts] for key, value in batch.items()}
    fresh = {key: value[args.rollouts :] for key, value in batch.items()}
    seed_torch(seed, "critic")
    critic = vrpo.Critic(policy, flags)
    vrpo.nn.init.constant_(critic.head.bias, returns.mean().item())
    optimizer = vrpo.make_optimizer(policy, critic, flags)
    train["returns"] = returns.unsqueeze(1).expand(train["mask"].shape)
    step = 0
    for epoch in range(args.epochs):
        for rows in permutation(args.rollouts, seed, "order", epoch).split(flags.minibatch_size):
            part, step = vrpo.take(train, rows), step + 1
            mask = part["mask"]
            features = critic.features(part["inputs"], mask, None)
            values, kl, _ = critic.values(features, samples=1)
            weights, grid = vrpo.token_weights(mask), vrpo.spread(values, mask)
            loss = vrpo.value_loss(grid, grid, part["returns"], weights, None) / returns.var()
            beta = flags.beta * min(1.0, (1 + step // 8) / flags.beta_warmup)
            loss = loss + beta * vrpo.weighted_sum(vrpo.spread(kl, mask), weights)
            if flags.lambda_ent or flags.lambda_ppl:
                logprobs, entropy = vrpo.logprobs_and_entropy(critic.lm_head, features, part["targets"][mask], 1.0)
                logprobs, entropy = vrpo.spread(logprobs, mask), vrpo.spread(entropy, mask)
                active = [vrpo.most_uncertain(x.detach(), mask, flags.token_ratio) for x in (entropy, -logprobs)]
                ent, ppl = vrpo.semantic_losses(entropy, logprobs, *(vrpo.token_weights(a) for a in active))
                loss = loss + flags.lambda_ent * ent + flags.lambda_ppl * ppl
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], flags.max_grad_norm)
            optimizer.step()
    return measure(critic, policy, fresh, clean[args.rollouts :], flags)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    policy, chat = load_policy(str(ROOT / "assets" / "tiny_math"), torch.device("cpu"))
    task = load_task(vrpo.Args(dataset=str(ROOT / "assets" / "data" / "tiny_math")), chat)
    rows = []
    for seed in args.seeds:
        played = play(policy, chat, task, args, seed)
        for name, changes in track(ARMS.items(), description=f"seed {seed}"):
            variance, auc = fit(policy, chat, played, args, vrpo.Args(**changes), seed)
            rows.append({"arm": name, "seed": seed, "explained_variance_clean": variance, "auc": auc})
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    folder = ROOT / "benchmark" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "critic_fit.csv", index=False)
    lines = ["| critic | explained variance, clean | AUC at the last token |", "|---|---|---|"]
    for name in ARMS:
        cells = [frame[frame["arm"] == name][key] for key in ("explained_variance_clean", "auc")]
        lines.append(
            f"| {name} | " + " | ".join(f"{c.mean():.2f} ({c.min():.2f} to {c.max():.2f})" for c in cells) + " |"
        )
    (folder / "critic_fit.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""PPO with an oracle in the critic's place, or mixed with it: what is a critic worth that knows the
steps of an answer? For the embedded maths world, whose worked solutions are on disk.

    python benchmark/studies/oracle.py --oracle-share 1 --gae-lambda 0.5 --noise-rate 0.3

It is ppo_baseline.py but for the values that the advantages are made of; the learned critic goes on
learning from its own. The oracle knows steps, and of problems nothing: before an answer it says
0.45, which then rises to 0.97 while the answer agrees with the worked solution, and is 0.05 from
the first token on that does not; all on the scale of what the channel makes of it on average."""

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ppo_baseline as ppo  # noqa: E402
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.keyed import coin  # noqa: E402

BEFORE, RIGHT, WRONG = 0.45, 0.97, 0.05
SEAMS = ("rollout", "score_tokens", "advantages_and_targets")
SCRIPT = {name: getattr(ppo, name) for name in SEAMS}


@dataclass
class OracleArgs:
    oracle_share: float = 1.0
    """share of the oracle in the values, from 0 to 1; the rest is the learned critic's"""
    oracle_error: float = 0.0
    """standard deviation of the oracle's error, the same whenever it sees the same state"""
    oracle_knows: Literal["steps", "nothing", "mean"] = "steps"
    """nothing: it says 0.45 in every state; mean: everywhere the mean reward of the update, of which
    the advantages are then made, whatever its share and error"""


@dataclass
class Args(OracleArgs, ppo.MethodArgs, ppo.UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Those of ppo_baseline.py, and the oracle's."""


@cache
def solutions(dataset: str) -> dict[str, str]:
    """The worked solutions of the training problems."""
    rows = map(json.loads, (Path(dataset) / "train.jsonl").read_text().splitlines())
    return {row["question"]: row["answer"] for row in rows}


def value(said: str, solution: str, knows: str = "steps") -> float:
    """The chance that an answer which begins so comes out right."""
    if knows == "nothing":
        return BEFORE
    if not solution.startswith(said):
        return WRONG
    return BEFORE + (RIGHT - BEFORE) * (len(said) / len(solution)) ** 2


def states(episode, chat) -> list[str]:
    """What the policy has said before each of its tokens."""
    chosen = [t for t, mine in zip(episode.tokens, episode.chosen, strict=True) if mine]
    return [chat.decode(chosen[:n]) for n in range(len(chosen))]


def oracle(args: Args, episode, chat) -> list[float]:
    """The oracle's value of the state before every token behind an episode's prompt, 0 where the
    policy did not choose it."""
    key = episode.problem.key
    found = []
    for said in states(episode, chat):
        chance = value(said, solutions(args.dataset)[key], args.oracle_knows)
        rate = args.noise_rate if args.noise == "symmetric" else 0.0
        error = NormalDist(sigma=args.oracle_error or 1.0).inv_cdf(coin(args.seed, key, said))
        found.append(rate + (1 - 2 * rate) * chance + (error if args.oracle_error else 0.0))
    values = iter(found)
    return [next(values) if mine else 0.0 for mine in episode.chosen]


def main(args: Args) -> None:
    if not 0 <= args.oracle_share <= 1:
        stop(f"--oracle-share {args.oracle_share}: must be in [0, 1]")
    if args.noise not in ("none", "symmetric") or args.task not in ("math", "long"):
        stop("the oracle knows the embedded maths problems under --noise none or symmetric")

    said = []  # of the newest episodes that were sampled

    def rollout(policy, env, problems, args, temperature):
        episodes = SCRIPT["rollout"](policy, env, problems, args, temperature)
        if temperature > 0:
            said[:] = [torch.tensor(oracle(args, episode, env.chat)) for episode in episodes]
        return episodes

    def score_tokens(critic, batch, args):
        learned = SCRIPT["score_tokens"](critic, batch, args)["values"]
        if args.oracle_knows == "mean":
            return {"learned": learned, "values": learned}
        known = torch.nn.utils.rnn.pad_sequence(said, batch_first=True).to(learned.device)
        return {"learned": learned, "values": torch.lerp(learned, known, args.oracle_share)}

    def advantages_and_targets(rewards, batch, args):
        find = SCRIPT["advantages_and_targets"]
        everywhere = batch["mask"] * (rewards.sum() / len(rewards))
        advised = batch | ({"values": everywhere} if args.oracle_knows == "mean" else {})
        advantages, _ = find(rewards, advised, args)
        _, targets = find(rewards, batch | {"values": batch["learned"]}, args)
        return advantages, targets

    for seam in (rollout, score_tokens, advantages_and_targets):
        setattr(ppo, seam.__name__, seam)
    ppo.main(args)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))

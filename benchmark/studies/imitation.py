"""PPO after a supervised start on the worked solutions of its own training problems: the control of a
critic that reads them (recipes/critic_reads.patch). What are the solutions worth if they are simply
imitated?

    python benchmark/studies/imitation.py --imitation-epochs 8 --train-split 'train[:120]' --noise-rate 0.3

It is ppo_baseline.py from then on; the accuracy of update 0 is that of the imitation alone."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ppo_baseline as ppo  # noqa: E402
from benchmark.studies.supervised import imitate  # noqa: E402
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.world.solutions import worked  # noqa: E402

SCRIPT = {name: getattr(ppo, name) for name in ("start_policy", "Environment")}


@dataclass
class ImitationArgs:
    imitation_epochs: int = 8
    """passes over the worked solutions of the training problems, in minibatches of 24"""
    imitation_learning_rate: float = 1e-4
    """AdamW"""


@dataclass
class Args(ImitationArgs, ppo.MethodArgs, ppo.UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Those of ppo_baseline.py, and the imitation's."""


def main(args: Args) -> None:
    if args.task not in ("math", "long"):
        stop(f"--task {args.task}: only mathematics has worked solutions to imitate")
    kept = []

    def start_policy(*given):
        kept[:] = SCRIPT["start_policy"](*given)
        return tuple(kept)

    def environment(*given):
        env = SCRIPT["Environment"](*given)
        if not args.resume:
            solutions = [worked(p, env.chat, args.max_new_tokens) for p in env.task.train]
            how = args.imitation_epochs, 24, args.imitation_learning_rate, args.seed
            imitate(kept[0], env.chat, solutions, *how)
        return env

    ppo.start_policy, ppo.Environment = start_policy, environment
    ppo.main(args)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))

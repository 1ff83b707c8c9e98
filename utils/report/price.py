"""What a wrong reward costs, in episodes: how many times as many a run needs for what it would
have learned from true ones.

    python -m utils.price --false-negatives 0.2 --success 0.3
    python -m utils.price --false-negatives 0.2 --false-positives 0.2      # symmetric flips

For errors that are drawn anew for every answer. Those that come back on the same problems, or that a
policy can learn to provoke, no number of episodes buys back (docs/verifier.md).
"""

from dataclasses import dataclass

from utils.args import command
from utils.errors import stop

SHOWN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95)  # success rates of the table


def price(success: float, false_negatives: float, false_positives: float) -> float:
    """The multiplier m = q (1 - q) / (v (1 - v) J^2). `success` v is the policy's share of right
    answers; right ones are told wrong with probability `false_negatives`, wrong ones right with
    `false_positives`; J = 1 - both (Youden's), and q = FP + J v is the share that is told right.
    The mean told reward keeps J of its differences and has the variance q (1 - q), so that a mean
    over m times as many answers has the signal-to-noise ratio that true rewards have. It is one over
    the squared correlation of what is told and what is true. [C]"""
    informed = 1 - false_negatives - false_positives
    told = false_positives + informed * success
    return told * (1 - told) / (success * (1 - success) * informed**2)


def check(false_negatives: float, false_positives: float) -> None:
    """Stops where no number of episodes would do."""
    for name, rate in (("negatives", false_negatives), ("positives", false_positives)):
        if not 0 <= rate <= 1:
            stop(f"--false-{name} {rate}: a share, from 0 to 1")
    if false_negatives + false_positives >= 1:
        stop(
            "right answers are told right no more often than wrong ones: of such rewards nothing "
            "right can be learnt, however many there are"
        )


@dataclass
class Args:
    false_negatives: float = 0.0
    """share of the right answers that the verifier calls wrong"""
    false_positives: float = 0.0
    """share of the wrong answers that it calls right"""
    success: float | None = None
    """share of right answers, between 0 and 1; default: a table of several"""


def main(args: Args) -> None:
    rates = args.false_negatives, args.false_positives
    check(*rates)
    if args.success is not None and not 0 < args.success < 1:
        stop(f"--success {args.success}: between 0 and 1; at the ends there is nothing to learn")
    for success in SHOWN if args.success is None else (args.success,):
        m = price(success, *rates)
        print(f"success rate {success:.2f}: {m:.2f} times the episodes")
    print(f"J = {1 - sum(rates):.2f}: the share of a difference that the rewards keep")


if __name__ == "__main__":
    main(command(Args, "python -m utils.price", __doc__))

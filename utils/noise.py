"""Channels between a score and the reward that the optimiser observes, beyond the scripts' own
`symmetric`. docs/noise.md says what each is for.

Every draw is keyed by the seed and by what it is for, so that all methods meet the same errors.
"""

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from utils.errors import stop
from utils.keyed import coin

CHANNELS = (
    "none", "symmetric", "asymmetric", "gaussian", "persistent", "group", "length", "random",
    "majority-vote",
)  # fmt: skip


def channel(args: Any, scores: Tensor, episodes: list, update: int) -> Tensor:
    """Observed rewards (B,) of scores (B,) under --noise. Stops where no channel has that name."""
    if args.noise not in CHANNELS:
        stop(f"--noise {args.noise}: there is no such channel; give one of {', '.join(CHANNELS)}")
    lengths = sorted((sum(e.chosen) for e in episodes), reverse=True)
    long = lengths[max(1, len(lengths) // 4) - 1] if lengths else 0  # of the longest quarter
    observed = []
    for i, (episode, score) in enumerate(zip(episodes, scores.tolist(), strict=True)):
        key = (episode.problem.key, update, i)  # a coin of its own for every episode
        flip_rate = 0.0
        match args.noise:
            case "asymmetric":  # an imperfect verifier
                right = score > 0.5
                flip_rate = args.false_negative_rate if right else args.false_positive_rate
            case "persistent":  # the same prompts are misjudged in every update
                key, flip_rate = (episode.problem.key,), args.noise_rate
            case "group":  # all episodes of a prompt are misjudged together
                key, flip_rate = (episode.problem.key, update), args.noise_rate
            case "length":  # what is wrong may pass if it is long
                if score <= 0.5 and sum(episode.chosen) >= long:
                    flip_rate = args.noise_rate
            case "random":  # a fair coin, whatever the answer
                flip_rate = 0.5
        draw = coin(args.seed, args.noise, *key)  # uniform in (0, 1)
        if args.noise == "gaussian":  # --noise-rate is the standard deviation
            score += args.noise_rate * NormalDist().inv_cdf(draw)
        observed.append(1.0 - score if draw < flip_rate else score)
    return torch.tensor(observed, device=scores.device)

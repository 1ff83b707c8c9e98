"""What a kept critic says of answers: for `utils.evaluate --critic` and `utils.tokens --critic`."""

from pathlib import Path

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from utils.args import check_ranges
from utils.checkpoints import fill, origin, script_of
from utils.errors import first_line, stop
from utils.keyed import row_seeds
from utils.metrics import explained_variance
from utils.models import load_policy
from utils.tensors import pack
from utils.world.environment import Episode

BINS = 5


class KeptCritic:
    """The critic in a checkpoint, read as GAE does: by the `score_tokens` of the script that made
    it. The policy beside it says what its tokens are, and has its backbone where it is shared."""

    def __init__(self, folder: Path, device: torch.device):
        flag, self.folder = "--critic", folder
        flags = origin(flag, folder)
        self.script = script_of(flag, folder)
        if not (folder.parent / "policy").is_dir():
            stop(f"{flag} {folder}: policy/ is not beside it, as in a checkpoint of a run")
        self.policy, self.chat = load_policy(str(folder.parent / "policy"), device)
        try:
            known = self.script.Args.__dataclass_fields__
            self.args = self.script.Args(**{k: v for k, v in flags.items() if k in known})
            check_ranges(self.args)
            self.critic = self.script.Critic(self.policy, self.args).to(device)
        except Exception as error:  # a foreign file can be anything
            stop(f"{flag} {folder}: critic.json does not fit its script ({first_line(error)})")
        fill(self.critic, flag, folder)

    @torch.no_grad()
    def values(self, episodes: list[Episode]) -> list[list[float]]:
        """For each token behind an episode's prompt the value of the state before it, 0 where the
        policy did not choose it."""
        found, size = [], self.args.rollout_batch_size
        for start in range(0, len(episodes), size):
            some = episodes[start : start + size]
            batch = pack(some, self.chat.pad_id, self.policy.device)
            batch["seed"] = row_seeds(batch["mask"], self.args.seed, "kept critic", start)  # VRPO's
            scores = self.script.score_tokens(self.critic, batch, self.args)
            for row, episode in zip(scores["values"].tolist(), some, strict=True):
                found.append(row[: len(episode.tokens)])
        return found

    def ends(self, episodes: list[Episode]) -> list[tuple[float, float]]:
        """Values of an episode's first state, where nothing is said yet, and of its last."""
        found = []
        for episode, values in zip(episodes, self.values(episodes), strict=True):
            said = [v for v, chosen in zip(values, episode.chosen, strict=True) if chosen]
            found.append((said[0], said[-1]))
        return found


def measures(values: Tensor, right: Tensor) -> dict[str, float]:
    """How well values (N,) predict verdicts (N,) of 0 and 1. AUC: the chance that of a right and a
    wrong answer the right one has the larger value. ECE: the mean distance between value and share
    of right answers over the bins of `calibration`. NaN where all verdicts are equal."""
    good, bad = values[right > 0.5], values[right <= 0.5]
    pairs = len(good) * len(bad)
    everything = torch.ones_like(right, dtype=torch.bool)
    bins = calibration(values, right)
    return {
        "answers": len(values),
        "right": right.mean().item(),
        "value": values.mean().item(),
        "AUC": float(mannwhitneyu(good, bad).statistic) / pairs if pairs else float("nan"),
        "explained variance": explained_variance(values, right, everything),
        "ECE": sum(b["answers"] * abs(b["value"] - b["right"]) for b in bins) / len(values),
    }


def calibration(values: Tensor, right: Tensor) -> list[dict[str, float]]:
    """Means of values and verdicts in bins of equally many answers, from the lowest values up."""
    order = values.argsort(stable=True).tensor_split(min(BINS, len(values)))
    return [
        {
            "answers": len(some),
            "from": values[some].min().item(),
            "to": values[some].max().item(),
            "value": values[some].mean().item(),
            "right": right[some].mean().item(),
        }
        for some in order
    ]

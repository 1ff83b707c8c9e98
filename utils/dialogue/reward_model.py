"""Reward models: loading and scoring, and the training of one on preferences with noise and a
length bias.

    python -m utils.reward_model                              # the embedded one again, about 2 minutes on two cores
    python -m utils.reward_model --policy DIR --schema DIR --out DIR

Dialogues are sampled from the warm-started policy, two for each goal. An annotator prefers the one
with the better true outcome (mean of TCR, ACR and GCR), but errs with `--label-noise`, and with
`--length-bias` just takes the longer one. A reward model, the policy's backbone with a scalar head,
learns from these labels with the Bradley-Terry loss

    -log sigmoid(score(chosen) - score(rejected)).

Its accuracy is reported against the true outcome and against the annotator, on goals held out from
training."""

import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from utils.args import check_ranges, check_temperature, command
from utils.chat import conversation_ids
from utils.dialogue.task import DialogueTask
from utils.dialogue.user import outcome
from utils.errors import first_line, stop
from utils.files import make_folder, writing
from utils.generation import answer
from utils.models import check_whole, load_policy, pick_device
from utils.scale import processes
from utils.tensors import precision
from utils.world.problems import Problem

Conversation = list[dict[str, str]]


class RewardModel:
    """A sequence-classification model with one output, and its own chat format."""

    def __init__(self, model, tokenizer, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        # by what fills the rows the model finds their last tokens, from which it reads the score
        self.config = model.config.get_text_config()
        self.config.pad_token_id = tokenizer.pad_token_id

    def __call__(self, conversations: list[Conversation]) -> Tensor:
        """Scores (B,) of conversations, with gradient."""
        rows = [
            conversation_ids(self.tokenizer, messages, to_be_continued=False)
            for messages in conversations
        ]
        rows = [
            row[-getattr(self.config, "max_position_embeddings", len(row)) :] for row in rows
        ]  # the end counts
        pad = self.tokenizer.pad_token_id
        if pad is None:  # then any token that no row has: EOS would hide a row's own
            used = set().union(*rows)
            pad = next(i for i in range(len(used) + 1) if i not in used)
        rows = [torch.tensor(row) for row in rows]
        inputs = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
        }
        if len(set(map(len, rows))) > 1:  # a mask that hides nothing costs time
            ones = [torch.ones_like(row) for row in rows]
            inputs["attention_mask"] = pad_sequence(ones, batch_first=True)
        self.config.pad_token_id = pad
        device = self.model.device
        with precision(device):
            logits = self.model(**{k: x.to(device) for k, x in inputs.items()}).logits
        self.config.pad_token_id = self.tokenizer.pad_token_id
        return logits.squeeze(-1).float()

    @torch.no_grad()
    def score(self, conversations: list[Conversation]) -> list[float]:
        """Scores of conversations; those of similar length go through the model together. Several
        processes have every so-manieth batch each."""
        order = sorted(
            range(len(conversations)),
            key=lambda i: sum(len(m["content"]) for m in conversations[i]),
        )
        found = torch.zeros(len(order), dtype=torch.float64, device=self.model.device)
        for i, rows in enumerate(torch.tensor(order).split(self.batch_size)):
            if i % processes.RANKS == processes.RANK:
                found[rows] = self([conversations[row] for row in rows]).double()
        processes.add_up(found)
        scores = found.tolist()
        if not all(map(math.isfinite, scores)):
            stop(
                f"--reward-model {self.model.name_or_path}: a score is not finite; are its weights sound?"
            )
        return scores

    def score_episodes(self, task, episodes: list, per: str) -> Tensor:
        """Scores (B, K) of the conversations up to each of their last K turns, the last turn's in
        the last column, NaN where an episode has no such turn. K = 1 for `episode`, the most turns
        of any episode for `turn`."""
        most = max(len(e.completions) for e in episodes) if per == "turn" else 1
        scores = torch.full((len(episodes), most), float("nan"))
        cells = [
            (i, k) for i, e in enumerate(episodes) for k in range(min(most, len(e.completions)))
        ]  # k turns later
        heard = [
            (episodes[i].problem, episodes[i].completions[: len(episodes[i].completions) - k])
            for i, k in cells
        ]
        found = self.score([task.messages(problem, turns) for problem, turns in heard])
        for (i, k), score in zip(cells, found, strict=True):
            scores[i, most - 1 - k] = score
        return scores


def on_reward_scale(
    raw: Tensor, scale: tuple[float, float] | None
) -> tuple[Tensor, tuple[float, float]]:
    """Reward-model scores (B, K), shifted and scaled to a fair coin's mean 1/2 and deviation 1/2,
    so that they are on the scale of the rewards 0 and 1; NaN, where an episode has no such turn,
    becomes 0. `scale`, the mean and deviation of raw final scores, comes from the first batch and
    is kept (None: take it from this one)."""
    mean, deviation = scale or (raw[:, -1].mean().item(), raw[:, -1].std(correction=0).item())
    return (0.5 + 0.5 * (raw - mean) / max(deviation, 1e-6)).nan_to_num(0.0), (mean, deviation)


def load_reward_model(name: str, device: torch.device, batch_size: int) -> RewardModel:
    """A reward model from a Hugging Face folder or the hub. Stops with one sentence if it does not
    load whole, or has more than one output."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the files of others can be broken in any way
        stop(f"--reward-model {name}: could not be loaded ({first_line(error)})")
    if model.config.num_labels != 1:
        stop(
            f"--reward-model {name}: it has {model.config.num_labels} outputs; a reward model has one"
        )
    check_whole(f"--reward-model {name}", model, tokenizer, found)
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, batch_size)


@dataclass
class Args:
    policy: str = "assets/tiny_dialogue"
    """model whose dialogues are ranked, and whose backbone the reward model starts from"""
    schema: Path = Path("assets/data/tiny_dialogue")
    """folder in the format of Schema-Guided Dialogue"""
    train_split: str = "train"
    """split whose goals the pairs are about"""
    test_split: str = "test"
    """split whose goals the held-out pairs are about"""
    out: Path = Path("assets/tiny_reward")
    """folder that receives the reward model"""
    seed: int = 1
    """seed of sampling, labels, head and order"""
    goals: int = 512
    """training goals, each of which gives a pair unless its dialogues have the same outcome"""
    held_out_goals: int = 384
    """held-out goals"""
    label_noise: float = 0.38
    """probability that the annotator errs"""
    length_bias: float = 0.1
    """probability that the annotator takes the longer dialogue, whatever its outcome"""
    temperature: float = 1.0
    """sampling temperature of the dialogues"""
    max_turns: int = 12
    """turns of a dialogue, at most"""
    max_new_tokens: int = 48
    """tokens of a turn, at most"""
    epochs: int = 2
    """passes over the pairs"""
    batch_size: int = 32
    """pairs in a step"""
    learning_rate: float = 3e-4
    """AdamW learning rate, falling to zero linearly"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def sample_dialogues(
    policy, chat, task: DialogueTask, problems: list[Problem], args: Args
) -> list[list[str]]:
    """The policy's turns in one dialogue for each problem."""
    turns: list[list[str]] = [[] for _ in problems]
    live = [
        (i, [{"role": "user", "content": task.first_message(p)}]) for i, p in enumerate(problems)
    ]
    for _ in range(args.max_turns):
        following = []
        for start in range(0, len(live), 256):
            some = live[start : start + 256]
            texts = answer(
                policy,
                chat,
                [messages for _, messages in some],
                args.max_new_tokens,
                args.temperature,
            )
            for (i, messages), text in zip(some, texts, strict=True):
                turns[i].append(text)
                reply = task.reply(problems[i], turns[i])
                if reply is not None:
                    said = [
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": reply},
                    ]
                    following.append((i, messages + said))
        live = following
    return turns


def preference_pairs(
    policy, chat, task, problems: list, args: Args
) -> list[tuple[Conversation, Conversation, bool]]:
    """(better, worse, agreed): two dialogues of a goal by their true outcome, and whether the
    annotator ranks them so."""
    rng, pairs = random.Random(f"annotator {args.seed} {problems[0].key}"), []
    dialogues = sample_dialogues(policy, chat, task, problems * 2, args)
    for i, problem in enumerate(problems):
        both = [dialogues[i], dialogues[i + len(problems)]]
        true = [outcome(problem.answer, turns, task.seed).average for turns in both]
        if true[0] == true[1]:
            continue
        better, worse = both if true[0] > true[1] else both[::-1]
        longer = len(" ".join(better).split()) > len(" ".join(worse).split())
        agreed = longer if rng.random() < args.length_bias else rng.random() >= args.label_noise
        pairs.append((task.messages(problem, better), task.messages(problem, worse), agreed))
    return pairs


def accuracy(
    model: RewardModel, pairs: list[tuple[Conversation, Conversation, bool]]
) -> dict[str, float]:
    """How often the model ranks a pair as the true outcome does, and as the annotator does."""
    margins = [
        b - w
        for b, w in zip(*(model.score([pair[k] for pair in pairs]) for k in (0, 1)), strict=True)
    ]
    return {
        "pairs": len(pairs),
        "annotator_against_truth": sum(agreed for _, _, agreed in pairs) / len(pairs),
        "model_against_truth": sum(m > 0 for m in margins) / len(pairs),
        "model_against_annotator": sum(
            (m > 0) == agreed for m, (_, _, agreed) in zip(margins, pairs, strict=True)
        )
        / len(pairs),
    }


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(s_chosen - s_rejected), the mean over pairs (B,)."""
    return -F.logsigmoid(chosen - rejected).mean()


def train(
    model: RewardModel, pairs: list[tuple[Conversation, Conversation, bool]], args: Args
) -> None:
    """Fit the model to the annotator's labels, in place."""
    steps = args.epochs * -(-len(pairs) // args.batch_size)
    optimizer = torch.optim.AdamW(
        model.model.parameters(), lr=args.learning_rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    rng, order = random.Random(args.seed), []
    for _ in track(range(steps), description="reward model"):
        order = order or rng.sample(range(len(pairs)), len(pairs))
        batch, order = [pairs[i] for i in order[: args.batch_size]], order[args.batch_size :]
        chosen = [better if agreed else worse for better, worse, agreed in batch]
        rejected = [worse if agreed else better for better, worse, agreed in batch]
        optimizer.zero_grad()
        bradley_terry_loss(*model(chosen + rejected).chunk(2)).backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main(args: Args) -> None:
    check_ranges(args)
    check_temperature(args)
    make_folder("--out", args.out)
    start = time.time()
    torch.set_num_threads(
        2
    )  # the order of summation, and so the last bit of every weight, depends on it
    device = pick_device(args.device)
    policy, chat = load_policy(args.policy, device)
    task = DialogueTask.load(args.schema, args.train_split, args.test_split, args.seed)
    torch.manual_seed(args.seed)
    pairs = preference_pairs(policy, chat, task, task.train[-args.goals :], args)
    held_out = preference_pairs(policy, chat, task, task.test[: args.held_out_goals], args)
    if not pairs or not held_out:
        stop(
            f"--policy {args.policy}: the two dialogues of every goal have the same outcome, so there is nothing to rank"
        )
    backbone = AutoModelForSequenceClassification.from_pretrained(
        args.policy, num_labels=1, dtype=torch.float32
    )
    model = RewardModel(backbone.to(device), chat.tokenizer, args.batch_size)
    train(model, pairs, args)
    if not all(parameter.isfinite().all() for parameter in model.model.parameters()):
        stop(
            "the trained weights are no longer finite, so they are not saved; lower --learning-rate"
        )
    model.model.eval()
    found = accuracy(model, held_out)
    flags = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    report = {"held_out": found, "training": accuracy(model, pairs), "flags": flags}
    with writing(args.out):  # an older model is there until the new one is whole
        new = args.out / "new"
        model.model.save_pretrained(new)
        model.tokenizer.save_pretrained(new)
        (new / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        for file in new.iterdir():
            os.replace(file, args.out / file.name)
        new.rmdir()
    print(f"{args.out}: {len(pairs)} pairs, {found['pairs']} held out; {time.time() - start:.0f} s")
    for name, value in list(found.items())[1:]:
        print(f"  held-out {name.replace('_', ' ')}: {value:.3f}")


if __name__ == "__main__":
    main(command(Args, "python -m utils.reward_model", __doc__))

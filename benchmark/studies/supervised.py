"""Supervised fine-tuning (SFT) as a start for a pre-trained model: it learns what answers look like
from some training problems' own, and is saved for the scripts' --model.

    python benchmark/studies/supervised.py --model MODEL --dataset DATA --out runs/start

A problem's answer is its worked solution, the right option with its letter, or what a clerk says
who knows the rules. Prompts and splits are made by the scripts' flags; the problems are the first
of the training split."""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from assets.make.tiny_dialogue import clerk  # noqa: E402
from utils import tensors  # noqa: E402
from utils.args import DEFAULTS, TaskArgs  # noqa: E402
from utils.dialogue.user import play  # noqa: E402
from utils.errors import stop  # noqa: E402
from utils.files import make_folder  # noqa: E402
from utils.generation import Answer  # noqa: E402
from utils.keyed import permutation  # noqa: E402
from utils.models import load_policy, pick_device, save_policy, trainable  # noqa: E402
from utils.tensors import hidden_states, logprobs_and_entropy, pack  # noqa: E402
from utils.world.answers import LETTERS  # noqa: E402
from utils.world.environment import Episode  # noqa: E402
from utils.world.tasks import load_task  # noqa: E402


@dataclass
class Args(TaskArgs):
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """a Hugging Face folder or hub id"""
    dataset: str | None = None
    """a folder or hub id, as for the scripts; default: the task's embedded one"""
    max_turns: int = 12
    """dialogue: what the clerk says, at most so often"""
    out: Path = Path("runs/start")
    """folder for the model"""
    examples: int = 96
    """answers to learn from"""
    epochs: int = 1
    """passes over them"""
    batch_size: int = 16
    """of them in one step"""
    learning_rate: float = 5e-5
    """AdamW"""
    seed: int = 1
    """seed of their order, and of users and clerk"""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward passes (autocast)"""

    # all weights are trained, and nothing is sampled
    lora_rank: tyro.conf.Suppress[int] = 0
    temperature: tyro.conf.Suppress[float] = 1.0
    truncated: tyro.conf.Suppress[str] = "wrong"
    rollout_batch_size: tyro.conf.Suppress[int] = 256

    noise, eval_size = "none", 0  # `load_task` asks for them

    def __post_init__(self):
        self.dataset = self.dataset or DEFAULTS[self.task]["dataset"]


def say(episode: Episode, text: str, chat) -> None:
    tokens = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], min(chat.eos_ids)]
    nothing = [0.0] * len(tokens)
    episode.say(Answer(tokens, nothing, nothing, nothing), chat)


def answered(problem, chat, args: Args) -> Episode:
    """The problem with its own answer."""
    episode = Episode(problem)
    if args.task == "dialogue":
        rng, turns = random.Random(f"{args.seed} clerk {problem.key}"), []
        user, said = play(problem.answer, turns, args.seed)
        while user.ended is None and len(turns) < args.max_turns:
            if turns:
                episode.hear(chat.user_turn_ids(said[-1]))
            turns.append(clerk(user, rng, careful=True))
            say(episode, turns[-1], chat)
            user, said = play(problem.answer, turns, args.seed)
    elif problem.options:
        option = problem.options[LETTERS.index(problem.answer)]
        say(episode, f"{problem.answer}) {option}", chat)
    else:
        say(episode, problem.answer, chat)
    return episode


def imitate(
    policy, chat, episodes: list[Episode], epochs: int, batch_size: int, learning_rate: float,
    seed: int,
) -> float:  # fmt: skip
    """Maximum likelihood of what the episodes say, by AdamW; the mean negative log-likelihood of a
    token, in nats, over the last tenth of the steps."""
    losses = []
    optimizer = torch.optim.AdamW(trainable(policy), learning_rate, weight_decay=0.0, fused=True)
    orders = [permutation(len(episodes), seed, "imitation", epoch) for epoch in range(epochs)]
    steps = [rows for order in orders for rows in order.split(batch_size)]
    for rows in track(steps, "imitation", console=Console(stderr=True)):
        part = pack([episodes[i] for i in rows], chat.pad_id, policy.device)
        part["cells"] = part["mask"].flatten().nonzero().squeeze(1)
        hidden = hidden_states(policy.get_decoder(), part)
        logprobs, _ = logprobs_and_entropy(policy.lm_head, hidden, part, temperature=1.0)
        loss = -logprobs.sum() / len(part["cells"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(policy), 1.0)
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return mean(losses[-(len(losses) // 10 + 1) :])


def main(args: Args) -> None:
    start = time.time()
    for flag in ("examples", "epochs", "batch_size"):
        if getattr(args, flag) < 1:
            stop(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    make_folder("--out", args.out)
    tensors.HALF = args.dtype == "bfloat16"
    policy, chat = load_policy(
        args.model, pick_device(args.device), system=args.system_prompt, thinking=args.thinking
    )
    task = load_task(args, chat)
    episodes = [answered(problem, chat, args) for problem in task.train[: args.examples]]
    print(f"{len(episodes)} answers, such as {' / '.join(episodes[0].completions)!r}")
    settings = {k: getattr(args, k) for k in ("epochs", "batch_size", "learning_rate", "seed")}
    loss = imitate(policy, chat, episodes, **settings)
    save_policy(policy, args.out)
    chat.tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {loss:.3f} nats a token at the end, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

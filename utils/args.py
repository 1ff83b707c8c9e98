"""Flags that the scripts have in common, and how a command line becomes `Args`.

A script's `Args` inherits the groups below and adds its own; each group is a box in `--help`.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from utils.errors import begin, stop
from utils.files import read_flags
from utils.scale.processes import check_sizes

ArgsType = TypeVar("ArgsType")


@dataclass
class RunArgs:
    seed: int = 1
    """seed of everything random: data order, sampling, noise, minibatches"""
    run_name: str | None = None
    """the run is written to runs/<run-name>; default: script, noise, seed and time"""
    resume: Path | None = None
    """run directory to continue from its newest checkpoint; its flags are the defaults"""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward passes (autocast); weights and optimizer stay in float32"""
    deterministic: bool = False
    """on a GPU: the same run twice is the same to the last bit; slower (no TF32)"""
    gradient_checkpointing: bool = False
    """layers are computed again in the backward pass: less memory, a third more time"""
    share_prefixes: bool = False
    """what episodes of a micro-batch begin with, such as their prompt, is read once in training too"""
    rollout_engine: Literal["own", "vllm"] = "own"
    """what samples the answers; vllm is to be installed beside the rest (docs/scaling.md)"""
    shard: bool = False
    """several processes hold a part of every weight each, instead of all (docs/scaling.md)"""
    eval_every: int = 10
    """updates between greedy evaluations on clean held-out problems (also at start and end)"""
    eval_size: int = 512
    """held-out problems, the first of the test split"""
    save_every: int = 10
    """updates between checkpoints (also at the end and on SIGTERM or Ctrl-C)"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """log to a tracker too: Weights & Biases, or trackio, which keeps everything on this machine"""


@dataclass
class TaskArgs:
    task: Literal["math", "science", "long", "dialogue"] = "math"
    """what the policy is asked; the defaults of some flags go with it (utils/args.py, DEFAULTS)"""
    model: str = "assets/tiny_math"
    """policy at the start and frozen reference: a Hugging Face folder or hub id"""
    lora_rank: int = 0
    """rank of LoRA adapters on all linear layers of policy and critic; 0 trains the weights"""
    dataset: str = "assets/data/tiny_math"
    """a folder with <split>.jsonl, .json, .csv, .tsv (.gz too) or .parquet, or a hub id; NAME:CONFIG
    for another than the usual configuration. Dialogue: a folder as of Schema-Guided Dialogue"""
    train_split: str | None = None
    """split to train on; a slice such as train[:90%] is allowed; default: train"""
    test_dataset: str | None = None
    """data set of the held-out problems; default: the same"""
    test_split: str | None = None
    """held-out split; training problems that stand in it too are dropped; default: test"""
    question_column: str | None = None
    """column of the question, a text or a list of messages; default: question, problem, ..."""
    answer_column: str | None = None
    """column of the reference, bare or ending in `#### n` or a box; default: answer, solution, ..."""
    choices_column: str | None = None
    """column with a list of options; the reference is a label, letter, position or text"""
    prompt_template: str = "{question}"
    """the user message around the question"""
    system_prompt: str | None = None
    """system message that opens every conversation"""
    thinking: bool = False
    """let a model think whose chat template knows it (Qwen3); only what follows </think> counts"""
    max_prompt_tokens: int = 128
    """problems with longer prompts are counted and dropped"""
    max_turns: int = 1
    """answers in an episode, at most; in math the user asks to check before every further one"""
    max_new_tokens: int = 48
    """tokens of one answer, EOS included"""
    temperature: float = 1.0
    """of sampling; log-probabilities are those of the tempered distribution"""
    truncated: Literal["wrong", "grade", "mask"] = "wrong"
    """an answer without EOS: wrong, or graded, or graded but with advantage 0 (docs/noise.md)"""
    rollout_batch_size: int = 256
    """episodes decoded at once, in evaluation too (bounds the memory of the KV cache)"""


@dataclass
class RewardArgs:
    reward_model: str | None = None
    """a sequence classifier whose scores replace the truth as reward: a folder or hub id"""
    reward_fn: str | None = None
    """MODULE:FUNCTION that replaces the truth as reward: f(question, answer, completions) -> float"""
    noise: str = "symmetric"
    """what lies between score and observed reward: none, symmetric, asymmetric, gaussian, persistent,
    group, length, random, majority-vote (docs/noise.md)"""
    noise_rate: float = 0.2
    """probability of an error: symmetric, persistent, group, length; gaussian: standard deviation"""
    false_negative_rate: float = 0.2
    """P(0 | right): asymmetric"""
    false_positive_rate: float = 0.2
    """P(1 | wrong): asymmetric"""
    vote_samples: int = 8
    """answers of the initial policy whose majority becomes the label: majority-vote"""


# Defaults that go with --task where it is not the script's own; those of math are the scripts'.
DEFAULTS: dict[str, dict[str, Any]] = {
    "math": {
        "model": "assets/tiny_math", "dataset": "assets/data/tiny_math", "updates": 40,
        "prompts_per_update": 64, "max_turns": 1, "max_new_tokens": 48, "reward_model": None,
        "noise": "symmetric", "kl_coef": 0.0,
    },
    "science": {
        "model": "assets/tiny_science", "dataset": "assets/data/tiny_science", "updates": 30,
        "prompts_per_update": 64, "max_turns": 1, "max_new_tokens": 64, "reward_model": None,
        "noise": "symmetric", "kl_coef": 0.0,
    },
    "long": {
        "model": "assets/tiny_long", "dataset": "assets/data/tiny_long", "updates": 40,
        "prompts_per_update": 64, "max_turns": 1, "max_new_tokens": 112, "reward_model": None,
        "noise": "symmetric", "kl_coef": 0.0,
    },
    "dialogue": {
        "model": "assets/tiny_dialogue", "dataset": "assets/data/tiny_dialogue", "updates": 30,
        "prompts_per_update": 32, "max_turns": 12, "max_new_tokens": 48,
        "reward_model": "assets/tiny_reward", "noise": "none", "kl_coef": 0.05,
    },
}  # fmt: skip

GROUPED = ("grpo", "dr_grpo", "rloo")  # advantages within a prompt's samples
MAY_BE_ZERO = ("seed", "lora_rank", "samples", "critic_warmup", "bottleneck_layers")
SHARES = (
    "false_negative_rate", "false_positive_rate", "gamma", "gae_lambda", "critic_lambda",
    "assumed_false_negative_rate", "token_ratio", "contamination",
    "label_noise", "length_bias", "learning_rate", "critic_learning_rate", "head_learning_rate",
)  # fmt: skip
MOST = 10**6  # of whatever is counted
# a curvature needs three quantiles, the Huber loss is divided by kappa, tails do not overlap
LIMITS = {
    "seed": (0, 2**63 - 1),
    "quantiles": (3, MOST),
    "huber_kappa": (0.001, math.inf),
    "tail_share": (0, 0.5),
}


def parse_args(cls: type[ArgsType], description: str | None) -> ArgsType:
    """The command line as `cls`. The script's defaults hold; those of another --task where it is
    given; with --resume the saved flags of the run. Flags given now override them."""
    begin()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--task", choices=DEFAULTS)
    first.add_argument("--resume", type=Path)
    try:
        known, _ = first.parse_known_args()
    except argparse.ArgumentError:  # tyro refuses it too, and says it better
        known = argparse.Namespace(task=None, resume=None)
    saved = saved_flags(cls, known.resume) if known.resume else {}
    default = cls(**defaults(cls, known.task or cls.task))
    groups = []
    for group in cls.__bases__:  # each a box in --help
        start = group(**{f.name: getattr(default, f.name) for f in dataclasses.fields(group)})
        name = group.__name__.removesuffix("Args").lower()
        groups.append((name, group, field(default_factory=lambda start=start: start)))
    nested = make_dataclass(cls.__name__, groups[::-1])
    given = [*words(saved), *sys.argv[1:]]
    found = tyro.cli(
        nested, args=given, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )
    return cls(**{k: v for part in vars(found).values() for k, v in vars(part).items()})


def command(args: Any, prog: str, description: str | None) -> Any:
    """The command line of one of the programs in utils/, as `args`."""
    begin()
    return tyro.cli(args, prog=prog, description=description)


def defaults(cls: type, task: str) -> dict[str, Any]:
    """What --task changes in a script's defaults: nothing for the script's own task."""
    return {} if task == cls.task else {"task": task, **DEFAULTS[task]}


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command line."""
    found = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):
            found.append(f"--{flag}={value}")
        else:
            found += [f"--{flag}", str(value)]
    return found


def saved_flags(cls: type, path: Path) -> dict[str, Any]:
    """The flags in a run's args.json. Stops where this version does not know them: the run could not
    go on as it began."""
    try:
        saved = read_flags(path)
    except (OSError, ValueError):
        stop(f"--resume {path}: no readable args.json there (give a run, such as runs/<name>)")
    script, own = saved.pop("script"), Path(sys.argv[0]).stem
    if script != own:
        stop(f"--resume {path}: {script}.py made that run, and goes on with it")
    if unknown := sorted(saved.keys() - {f.name for f in dataclasses.fields(cls)}):
        stop(f"--resume {path}: args.json has flags that are no more: {', '.join(unknown)}")
    return saved


def check_ranges(args: Any) -> None:
    """Refuse numbers out of range with one sentence that names the flag: counts start at 1, shares
    end at 1, nothing is negative or infinite."""
    types = {f.name: f.type for f in dataclasses.fields(args)}
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_count = isinstance(value, int) and types[name] is not float and name not in MAY_BE_ZERO
        is_number = isinstance(value, float) or types[name] is float
        most = 1 if name in SHARES else math.inf if is_number else MOST
        low, high = LIMITS.get(name, (int(is_count), most))
        if not low <= value <= high or not math.isfinite(value):
            limits = f"in [{low}, {high}]"
            if high in (MOST, math.inf) and not value > high:
                limits = f"at least {low}" + ", and finite" * (not math.isfinite(value))
            stop(f"--{name.replace('_', '-')} {value}: must be {limits}")
    if getattr(args, "device", "") == "meta":
        stop("--device meta: it holds no numbers; give auto, cpu, cuda, cuda:1, ...")


def check_temperature(args: Any) -> None:
    if args.temperature == 0:
        stop("--temperature 0: must be above 0 (evaluation is greedy whatever it is)")


def check_flags(args: Any) -> None:
    """`check_ranges` of a script's flags, and what must not be combined."""
    check_ranges(args)
    check_sizes(args)
    check_temperature(args)
    if args.rollout_engine == "vllm":
        from utils.scale.engine import check_engine

        check_engine(args)
    if args.noise != "gaussian" and args.noise_rate > 1:
        stop(f"--noise-rate {args.noise_rate}: must be in [0, 1], a probability")
    if (episodes := args.prompts_per_update * args.samples_per_prompt) > MOST:
        stop(
            f"--prompts-per-update {args.prompts_per_update} --samples-per-prompt "
            f"{args.samples_per_prompt}: {episodes} episodes in an update; at most {MOST}"
        )
    if args.samples_per_prompt == 1 and getattr(args, "advantage", "none") in GROUPED:
        stop(
            f"--samples-per-prompt 1: --advantage {args.advantage} compares the samples of a prompt, "
            "so nothing would be learnt; give at least 2, or --advantage reinforce_pp or forward"
        )
    rate = getattr(args, "assumed_false_negative_rate", 0)
    if rate and args.advantage != "forward":
        stop(
            f"--assumed-false-negative-rate {rate}: --advantage {args.advantage} does not read it; "
            "give --advantage forward"
        )
    if args.reward_fn and args.reward_model:
        stop(
            f"--reward-fn {args.reward_fn} and --reward-model {args.reward_model}: one of them gives "
            "the reward: --reward-model None leaves the other out"
        )
    if args.noise == "majority-vote" and (
        args.task == "dialogue" or args.reward_model or args.reward_fn
    ):
        stop(
            "--noise majority-vote: votes are on final answers, which neither dialogues nor "
            "--reward-model nor --reward-fn have"
        )

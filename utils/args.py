"""Flags that the scripts have in common, and how a command line becomes `Args`.

A script's `Args` inherits the groups below and adds its own; each group is a box in `--help`.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import tyro

from utils.engine import check_engine
from utils.errors import say, stop
from utils.files import read_flags
from utils.ranks import by_first, check_sizes

ArgsType = TypeVar("ArgsType")
NOISES = Literal[
    "none", "symmetric", "asymmetric", "gaussian", "persistent", "group", "length", "random", "majority-vote",
]  # fmt: skip


@dataclass
class RunArgs:
    seed: int = 1
    """seed of everything random: data order, sampling, noise, minibatches"""
    run_name: str | None = None
    """the run is written to runs/<run-name>; default: script, noise, seed and time"""
    resume: Path | None = None
    """run directory to continue from its newest checkpoint; its flags are the defaults"""
    config: Path | None = None
    """args.json of an earlier run, whose flags are the defaults of this new one"""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward passes (autocast); weights and optimizer stay in float32"""
    tf32: bool = True
    """on a GPU: products in float32 have mantissas of 10 bits, and take a fraction of the time"""
    deterministic: bool = False
    """on a GPU: the same run twice is the same to the last bit; slower"""
    gradient_checkpointing: bool = False
    """layers are computed again in the backward pass: less memory, a third more time"""
    share_prefixes: bool = False
    """what episodes of a micro-batch begin with, such as their prompt, is read once in training too"""
    rollout_engine: Literal["own", "vllm"] = "own"
    """what samples the answers; vllm is to be installed beside the rest (docs/scaling.md)"""
    rollout_ratio_cap: float = 2.0
    """vllm: most that a token's pi_old / pi_engine weighs in the policy loss; the mean gap is logged"""
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
    track_project: str = "vrpo"
    """the tracker's name for these runs together"""


@dataclass
class TaskArgs:
    task: Literal["math", "science", "dialogue"] = "math"
    """what the policy is asked; the defaults of some flags go with it (utils/args.py, DEFAULTS)"""
    model: str = "assets/tiny_math"
    """policy at the start and frozen reference: a Hugging Face folder or hub id"""
    lora_rank: int = 0
    """rank of LoRA adapters on all linear layers of policy and critic; 0 trains the weights"""
    dataset: str = "assets/data/tiny_math"
    """a folder with <split>.jsonl, .json, .csv, .tsv (.gz too) or .parquet, or a hub id"""
    dataset_config: str | None = None
    """configuration of the data set (a subfolder of a local one); default: the usual one"""
    train_split: str | None = None
    """split to train on; a slice such as train[:90%] is allowed; default: train"""
    test_dataset: str | None = None
    """data set of the held-out problems, NAME or NAME:CONFIG; default: the same"""
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
    schema: Path = Path("assets/data/tiny_dialogue")
    """dialogue: a folder in the format of Schema-Guided Dialogue"""
    max_prompt_tokens: int = 128
    """problems with longer prompts are counted and dropped"""
    max_turns: int = 1
    """answers in an episode, at most; in math the user asks to check before every further one"""
    max_new_tokens: int = 48
    """tokens of one answer, EOS included"""
    temperature: float = 1.0
    """of sampling; log-probabilities are those of the tempered distribution"""
    truncated: Literal["wrong", "grade", "mask"] = "wrong"
    """an answer without EOS is wrong, is graded as it stands, or is graded and left out of losses"""
    rollout_batch_size: int = 256
    """episodes decoded at once, in evaluation too (bounds the memory of the KV cache)"""


@dataclass
class RewardArgs:
    reward_model: str | None = None
    """a sequence classifier whose scores replace the truth as reward: a folder or hub id"""
    reward_fn: str | None = None
    """MODULE:FUNCTION that replaces the truth as reward: f(question, answer, completions) -> float"""
    noise: NOISES = "symmetric"
    """channel between the clean reward, or the score in its place, and the observed one"""
    noise_rate: float = 0.2
    """probability of an error: symmetric, persistent, group, length"""
    false_negative_rate: float = 0.2
    """P(0 | right): asymmetric"""
    false_positive_rate: float = 0.2
    """P(1 | wrong): asymmetric"""
    noise_sigma: float = 0.5
    """standard deviation: gaussian"""
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
    "dialogue": {
        "model": "assets/tiny_dialogue", "dataset": "assets/data/tiny_math", "updates": 30,
        "prompts_per_update": 32, "max_turns": 12, "max_new_tokens": 48,
        "reward_model": "assets/tiny_reward", "noise": "none", "kl_coef": 0.05,
    },
}  # fmt: skip

GROUPED = ("grpo", "dr_grpo", "rloo")  # advantages within a prompt's samples
MAY_BE_ZERO = ("seed", "critic_warmup", "bottleneck_layers", "lora_rank", "samples")
SHARES = (
    "noise_rate", "false_negative_rate", "false_positive_rate", "gamma", "gae_lambda", "critic_lambda",
    "assumed_false_negative_rate", "token_ratio", "contamination",
    "label_noise", "length_bias", "learning_rate", "critic_learning_rate", "head_learning_rate",
)  # fmt: skip
MOST = 10**6  # of whatever is counted
# a curvature needs three quantiles, the Huber loss is divided by kappa, tails do not overlap
LIMITS = {
    "seed": (0, 2**63 - 1),
    "quantiles": (3, MOST),
    "rollout_ratio_cap": (1, math.inf),
    "huber_kappa": (0.001, math.inf),
    "tail_share": (0, 0.5),
}


def parse_args(cls: type[ArgsType], description: str | None) -> ArgsType:
    """The command line as `cls`. The script's defaults hold; those of another --task where it is
    given; with --resume or --config the saved flags of a run. Flags given now override them."""
    given = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    task_flag = make_dataclass("TaskFlag", [("task", str, field(default=""))])
    task = tyro.cli(task_flag, args=given, return_unknown_args=True, add_help=False)[0].task
    if task not in DEFAULTS:  # none given, or one for the parser to refuse
        task = ""
    args = parse_groups(cls, cls(**defaults(cls, task or cls.task)), description)
    if args.resume and args.config:
        stop(f"--config {args.config}: is for a new run; --resume has the flags of its own")
    if args.resume:
        start = cls(**saved_flags(cls, "--resume", args.resume))
        return dataclasses.replace(parse_groups(cls, start), resume=args.resume)
    if args.config:
        saved = saved_flags(cls, "--config", args.config) | {"run_name": None}
        if task and task != saved.get("task"):  # what goes with the other task does not stay
            saved |= defaults(cls, task)
        return parse_groups(cls, cls(**saved))
    return args


def defaults(cls: type, task: str) -> dict[str, Any]:
    """What --task changes in a script's defaults: nothing for the script's own task."""
    return {} if task == cls.task else {"task": task, **DEFAULTS[task]}


def parse_groups(
    cls: type[ArgsType], default: ArgsType, description: str | None = None
) -> ArgsType:
    """The command line as `cls`, each dataclass that it inherits being a group of `--help`."""
    groups = []
    for group in cls.__bases__:
        names = [f.name for f in dataclasses.fields(group)]
        start = group(**{name: getattr(default, name) for name in names})
        name = group.__name__.removesuffix("Args").lower()
        groups.append((name, group, field(default_factory=lambda start=start: start)))
    nested = make_dataclass(cls.__name__, groups[::-1])
    found = tyro.cli(nested, description=description, config=(tyro.conf.OmitArgPrefixes,))
    flat = {k: v for part in vars(found).values() for k, v in vars(part).items()}
    return cls(**flat)


def saved_flags(cls: type, flag: str, path: Path) -> dict[str, Any]:
    """The flags in a run's args.json. Stops where this version does not know them as they are: the
    run could not go on as it began. With --config the run may be another script's: flags that only
    that one has are named and left out."""
    try:
        saved = read_flags(path)
    except (OSError, ValueError):
        stop(f"{flag} {path}: no readable args.json there (give a run, such as runs/<name>)")
    script, own = saved.pop("script"), Path(sys.argv[0]).stem
    if script != own and flag == "--resume":
        stop(f"{flag} {path}: {script}.py made that run, and goes on with it")
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := sorted(saved.keys() - kinds.keys()):
        if script == own:
            stop(f"{flag} {path}: args.json has flags that are no more: {', '.join(unknown)}")
        by_first(say)(f"{flag} {path}: left out, as {own} has no such flags: {', '.join(unknown)}")
        saved = {name: value for name, value in saved.items() if name in kinds}
    for name, value in saved.items():
        if not fits(value, kinds[name]):
            wanted = get_args(kinds[name]) or (kinds[name],)
            wanted = ", ".join(getattr(kind, "__name__", str(kind)) for kind in wanted)
            stop(f"{flag} {path}: args.json has {name} {value!r}, where one fits of: {wanted}")
    return {k: Path(v) if kinds[k] is Path else v for k, v in saved.items()}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of args.json is of a field's type, or one of its choices."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if get_origin(kind) is UnionType:
        return any(fits(value, one) for one in get_args(kind))
    return type(value) in {Path: (str,), float: (int, float)}.get(kind, (kind,))


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
    check_engine(args)
    check_temperature(args)
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
    if getattr(args, "critic_reads", "nothing") == "solution" and (
        args.task != "math" or args.noise == "majority-vote"
    ):
        stop("--critic-reads solution: only --task math has worked solutions, and votes know none")
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

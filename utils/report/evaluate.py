"""Evaluation of any checkpoint or hub model on clean data: greedy accuracy, and with --samples
avg@k, pass@k and maj@k.

    python -m utils.evaluate                                            # the embedded model on the embedded test split
    python -m utils.evaluate --model runs/A/checkpoints/000040/policy --task science
    python -m utils.evaluate --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k HuggingFaceH4/MATH-500 \\
        allenai/ai2_arc:ARC-Challenge --max-new-tokens 512 --dtype bfloat16
    python -m utils.evaluate --model DIR --dataset HuggingFaceH4/aime_2024 --samples 16 --temperature 0.7
    python -m utils.evaluate --critic runs/A/checkpoints/000040/critic  # policy, and what its critic predicts

Prints a table and writes it (results.csv), every completion (completions.jsonl, batch by batch, so
that Ctrl-C loses none) and the flags (args.json) to --out."""

import csv
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, TextIO

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from utils.args import DEFAULTS, check_ranges, check_temperature, command
from utils.chat import Chat
from utils.checkpoints import origin
from utils.dialogue.goals import UNSEEN
from utils.dialogue.task import DialogueTask, load_dialogues
from utils.errors import stop, visible
from utils.files import make_folder, write_atomically, writing
from utils.generation import generate
from utils.keyed import seed_torch
from utils.models import load_policy, pick_device
from utils.world.data import DATASETS, load_split, split_name
from utils.world.environment import Episode
from utils.world.problems import Problem, Task
from utils.world.tasks import QUESTIONS, check_context, prompt

MEASURES = (
    "accuracy",
    "tcr",
    "acr",
    "gcr",
    "average",
    "turns",
)  # of a task's measures, those that make a row


@dataclass
class Args:
    model: str | None = None
    """a Hugging Face folder, such as a run's checkpoints/<update>/policy, or a hub id; default: the
    policy beside --critic, else the task's embedded model"""
    critic: Path | None = None
    """a run's checkpoints/<update>/critic, whose values are compared with the verdicts"""
    task: Literal["math", "science", "long", "dialogue"] | None = None
    """how answers are judged; default: as the table of data sets says, else science where there are
    options, else math"""
    dataset: tuple[str, ...] = ()
    """data sets, NAME, NAME:CONFIG or either with @SPLIT; default: the task's embedded one"""
    question_column: str | None = None
    """column of the question, where the names are not the usual ones"""
    answer_column: str | None = None
    """column of the reference"""
    choices_column: str | None = None
    """column with a list of options"""
    schema: Path = Path("assets/data/tiny_dialogue")
    """dialogue: a folder in the format of Schema-Guided Dialogue"""
    test_split: str = "test"
    """dialogue: the split of the schema whose goals are played"""
    eval_size: int | None = None
    """the first problems only"""
    prompt_template: str = "{question}"
    """the user message around the question"""
    system_prompt: str | None = None
    """system message that opens every conversation"""
    thinking: bool = False
    """let a model think whose chat template knows it (Qwen3)"""
    max_new_tokens: int = 256
    """tokens of one answer, EOS included"""
    max_turns: int = 12
    """dialogue: answers in an episode, at most"""
    truncated: Literal["wrong", "grade"] = "wrong"
    """an answer without EOS is wrong, or is graded as it stands"""
    samples: int = 0
    """answers sampled for each problem, beside the greedy one"""
    pass_at: tuple[int, ...] = ()
    """the k of pass@k, at most --samples; default: --samples"""
    temperature: float = 1.0
    """of those samples"""
    batch_size: int = 64
    """answers decoded at once"""
    seed: int = 1
    """seed of the samples and of the order of options"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the weights"""
    out: Path | None = None
    """folder for the results; default: runs/evaluate__<model>__<time>"""


def load_problems(args: Args, name: str, chat: Chat) -> tuple[Task, list[Problem]]:
    """The task of a data set, and its problems."""
    if args.task == "dialogue":
        settings = dict(
            dataset=args.schema, seed=args.seed, train_split="train", test_split=args.test_split
        )
        rows = load_dialogues(type("Settings", (), settings))[1]["test"]
        task = DialogueTask([], [], {}, args.seed)
    else:
        name, _, split = name.partition("@")
        name, config = split_name(name)
        questions = load_split(args, name, config, split or None, "test", unlabelled=False)
        rows = [
            (q.message, q.conversation, q.answer, q.options)
            for q in questions
            if q.answer is not None
        ]
        known = (
            DATASETS[name].task
            if name in DATASETS
            else "science"
            if any(q.options for q in questions)
            else "math"
        )
        task = QUESTIONS[args.task or known]([], [], {})
    problems = [
        Problem(key, a, prompt(chat, args.prompt_template, q), options)
        for key, q, a, options in rows
    ]
    if not problems:
        stop(f"--dataset {name}: no problem with a reference there")
    return task, problems[: args.eval_size]


@torch.no_grad()
def play(
    policy,
    chat: Chat,
    task: Task,
    problems: list[Problem],
    args: Args,
    temperature: float,
    what: str,
    keep: Callable[[list[Episode]], None],
) -> list[Episode]:
    """One episode of every problem, those with prompts of similar length together; `keep` is given
    every batch as it ends."""
    turns = args.max_turns if isinstance(task, DialogueTask) else 1
    episodes = [Episode(p) for p in problems]
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt_ids))
    what = escape(visible(what))  # a bar's text may have markup
    for start in track(range(0, len(order), args.batch_size), description=what):
        live = some = [episodes[i] for i in order[start : start + args.batch_size]]
        for turn in range(turns):
            prompts = [episode.prompt + episode.tokens for episode in live]
            answers = generate(policy, chat, prompts, args.max_new_tokens, temperature)
            following = []
            for episode, answer in zip(live, answers, strict=True):
                episode.say(answer, chat)
                if turn + 1 < turns and episode.finished:
                    reply = task.reply(episode.problem, episode.completions)
                    if reply is not None:
                        episode.hear(chat.user_turn_ids(reply))
                        following.append(episode)
            live = following
            if not live:
                break
        keep(some)
    return episodes


def write(
    file: TextIO, name: str, task: Task, args: Args, critic, judgements: dict, how: str,
    some: list[Episode],
) -> None:  # fmt: skip
    """Episodes as lines of completions.jsonl; `judgements` collects verdicts, and the values of first
    and last states, by `critic`, a KeptCritic or None."""
    ends = critic.ends(some) if critic else [()] * len(some)
    with writing(Path(file.name)):
        for e, values in zip(some, ends, strict=True):
            line = {"data set": name, "decoding": how, **task.show(e.problem, e.completions)}
            right = task.grade(e.problem, judged(e, args))
            line |= {"finished": e.finished, "right": right}
            line |= dict(zip(("first value", "last value"), values, strict=False))
            judgements.setdefault((name, how), []).append((right, *values))
            file.write(json.dumps(line) + "\n")
        file.flush()


def judged(episode: Episode, args: Args) -> list[str]:
    """The answers as they are judged: one that was cut off is empty under --truncated wrong."""
    cut_off = args.truncated == "wrong" and not episode.finished
    return [*episode.completions[:-1], ""] if cut_off else episode.completions


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, contain a right one: 1 - C(n -
    c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean over problems: Wilson's where all values are 0 or 1,
    else the normal one. NaN for one value that is neither."""
    n, center, z = len(values), mean(values), 1.96
    if set(values) <= {0.0, 1.0}:
        spread = z * math.sqrt(center * (1 - center) / n + z**2 / (4 * n**2))
        return tuple((center + z**2 / (2 * n) + sign * spread) / (1 + z**2 / n) for sign in (-1, 1))
    half = z * stdev(values) / math.sqrt(n) if n > 1 else float("nan")
    return center - half, center + half


def row(name: str, measure: str, values: list[float], episodes: list[Episode]) -> dict:
    low, high = interval(values)
    if name.startswith(("=", "+", "-", "@")):
        name = f"'{name}"  # or a spreadsheet would take it for a formula
    return {
        "data set": name, "measure": measure, "problems": len(values), "value": mean(values), "low": low, "high": high,
        "tokens": mean(e.length for e in episodes), "cut off": mean(not e.finished for e in episodes),
    }  # fmt: skip


def greedy_rows(name: str, task: Task, episodes: list[Episode], args: Args) -> list[dict]:
    """The task's measures; services that the training split of a schema does not have make rows of
    their own."""
    groups = {name: episodes}
    if isinstance(task, DialogueTask):
        unseen = [e for e in episodes if e.problem.answer.group == UNSEEN]
        groups = {
            name: [e for e in episodes if e not in unseen],
            f"{name}, unseen services": unseen,
        }
    rows = []
    for group, members in groups.items():
        measured = [task.measure([(e.problem, judged(e, args))]) for e in members]
        for key in MEASURES:
            if measured and key in measured[0]:
                rows.append(row(group, f"greedy {key}", [float(m[key]) for m in measured], members))
    return rows


def sampled_rows(
    name: str, task: Task, problems: list[Problem], episodes: list[Episode], args: Args
) -> list[dict]:
    """avg@k, pass@k and maj@k of `episodes`, --samples for each problem in turn."""
    if isinstance(task, DialogueTask):  # as in the greedy rows, services known from training
        episodes = [e for e in episodes if e.problem.answer.group != UNSEEN]
        problems = [p for p in problems if p.answer.group != UNSEEN]
    n, what = args.samples, "gcr" if isinstance(task, DialogueTask) else "accuracy"
    groups = [episodes[i * n : (i + 1) * n] for i in range(len(problems))]
    right = [sum(task.grade(e.problem, judged(e, args)) for e in group) for group in groups]
    rows = [row(name, f"{what} avg@{n}", [r / n for r in right], episodes)]
    rows += [
        row(name, f"{what} pass@{k}", [pass_at_k(int(r), n, k) for r in right], episodes)
        for k in args.pass_at or (n,)
    ]
    if not isinstance(task, DialogueTask):
        votes = [
            Counter(task.final_answer(e.problem, judged(e, args)[-1]) for e in group)
            for group in groups
        ]
        chosen = [
            max((a for a in count if a), key=count.__getitem__, default="") for count in votes
        ]
        agreed = [
            task.grade(p, [f"#### {label}"]) for p, label in zip(problems, chosen, strict=True)
        ]
        rows.append(row(name, f"{what} maj@{n}", agreed, episodes))
    return rows


def write_table(file: Path, rows: list[dict]) -> None:
    with writing(file), file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show_critic(out: Path, judgements: dict, console: Console) -> list[str]:
    """Print and write how well the critic's values predict the verdicts; returns the files' names."""
    from utils.report.values import BINS, calibration, measures  # loads scipy

    rows, bins = [], []
    places = [(*key, state) for key in judgements for state in ("last", "first")]
    for name, how, state in places:
        right, first, last = torch.tensor(judgements[name, how]).float().T
        values = last if state == "last" else first
        place = {"data set": name, "decoding": how, "state": state}
        rows.append(place | measures(values, right))
        bins.append([place | part for part in calibration(values, right)])
    for name in dict.fromkeys(name for name, *_ in places):
        scores = Table("decoding", "state", *list(rows[0])[3:])
        scores.title = Text(f"critic, {visible(name)}")
        parts = Table("decoding", "state", *(f"{i + 1} of {BINS}" for i in range(BINS)))
        parts.title = "mean value and share right, from the lowest values to the highest"
        for place, row, some in zip(places, rows, bins, strict=True):
            if place[0] == name:
                numbers = [f"{x:.3f}" if type(x) is float else str(x) for x in row.values()]
                scores.add_row(*numbers[1:])
                parts.add_row(*place[1:], *(f"{b['value']:.2f} {b['right']:.2f}" for b in some))
        for table in (scores, parts):
            table.title_justify, table.box = "left", box.SIMPLE
            for column in table.columns[2:]:
                column.justify = "right"
            console.print(table)
    write_table(out / "critic.csv", rows)
    write_table(out / "calibration.csv", [part for some in bins for part in some])
    return ["critic.csv", "calibration.csv"]


def main(args: Args) -> None:
    check_ranges(args)
    check_temperature(args)
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    if any(not 1 <= k <= args.samples for k in args.pass_at):
        stop(
            f"--pass-at {' '.join(map(str, args.pass_at))}: must be between 1 and --samples ({args.samples})"
        )
    if args.critic:
        known = str(origin("--critic", args.critic).get("task"))
        if known in DEFAULTS and not (args.task or args.dataset):
            args.task = known
    defaults = DEFAULTS[args.task or "math"]
    names = (
        (args.schema.name,) if args.task == "dialogue" else args.dataset or (defaults["dataset"],)
    )
    beside = args.critic and str(args.critic.parent / "policy")
    model = args.model or beside or defaults["model"]
    out = (
        args.out or Path("runs") / f"evaluate__{Path(model).name}__{time.strftime('%Y%m%d-%H%M%S')}"
    )
    make_folder("--out", args.out or out.parent)
    console = Console(highlight=False, markup=False, emoji=False)
    device = pick_device(args.device)
    policy, chat = load_policy(model, device, system=args.system_prompt, thinking=args.thinking)
    policy = policy.to(getattr(torch, args.dtype))
    critic = None
    if args.critic:
        from utils.report.values import KeptCritic

        critic = KeptCritic(args.critic, device)
    if critic and critic.chat.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        stop(f"--critic {args.critic}: its tokens are not those of --model {model}")
    loaded = {
        name: load_problems(args, name, chat) for name in names
    }  # before anything is computed
    for _, problems in loaded.values():
        check_context(chat, problems, args.max_new_tokens)
    flags = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(args).items()
    }
    rows, judgements = [], {}
    with writing(out):
        out.mkdir(exist_ok=True)
        write_atomically(out / "args.json", json.dumps(flags | {"model": model}, indent=1))
        file = (out / "completions.jsonl").open("w")
    with file:
        for name, (task, problems) in loaded.items():
            run = partial(play, policy, chat, task)
            keep = partial(write, file, name, task, args, critic, judgements)
            greedy = run(problems, args, 0.0, f"{name}, greedy", partial(keep, "greedy"))
            rows += greedy_rows(name, task, greedy, args)
            if args.samples:
                seed_torch(args.seed, "evaluate", name)
                repeated = [p for p in problems for _ in range(args.samples)]
                what = f"{name}, {args.samples} samples"
                sampled = run(repeated, args, args.temperature, what, partial(keep, "sampled"))
                rows += sampled_rows(name, task, problems, sampled, args)
    write_table(out / "results.csv", rows)
    table = Table(title=Text(visible(model)), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("measure", "value", "95 % interval", "problems", "tokens", "cut off"):
        table.add_column(
            column,
            justify="left" if column == "measure" else "right",
            overflow="fold",
            no_wrap=column != "measure",
        )
    for before, r in zip([None, *rows], rows, strict=False):
        if before is None or before["data set"] != r["data set"]:
            table.add_row(Text(visible(r["data set"]), style="bold"))
        numbers = (
            f"{r['value']:.3f}",
            f"{r['low']:.3f} - {r['high']:.3f}",
            str(r["problems"]),
            f"{r['tokens']:.0f}",
        )
        table.add_row(f"  {r['measure']}", *numbers, f"{r['cut off']:.2f}")
    console.print(table)
    files = ["results.csv", "completions.jsonl"]
    if critic:
        files += show_critic(out, judgements, console)
    console.print(visible(f"{out}: {', '.join(files)}"))


if __name__ == "__main__":
    main(command(Args, "python -m utils.evaluate", __doc__))

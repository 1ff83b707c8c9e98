"""Dialogues to look at: be the user of an assistant, watch the simulated one, or read a run's.

    python -m utils.talk                             # be the user of the embedded assistant
    python -m utils.talk --play 3                    # watch three dialogues
    python -m utils.talk --sample runs/A             # a run's: rewards, outcome, values

As the user you see your goal first; an empty line ends the dialogue.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from utils.args import check_ranges, command
from utils.dialogue.task import DialogueTask
from utils.dialogue.user import User, first_message, outcome
from utils.errors import stop, visible
from utils.files import read_rows
from utils.generation import answer
from utils.models import load_policy, pick_device
from utils.world.problems import Problem


@dataclass
class Args:
    model: str = "assets/tiny_dialogue"
    """the assistant: a Hugging Face folder or a hub id"""
    play: int | None = None
    """watch so many dialogues with the simulated user, instead of being the user"""
    sample: Path | None = None
    """print dialogues of this run directory instead"""
    count: int = 3
    """how many of them, from the newest evaluation"""
    schema: Path = Path("assets/data/tiny_dialogue")
    """a folder in the format of Schema-Guided Dialogue"""
    train_split: str = "train"
    """its training split"""
    test_split: str = "test"
    """the split whose goals are played"""
    prompt_template: str = "{question}"
    """the user message around the calls and the opening words"""
    seed: int = 1
    """which goals, and in which words the simulated user speaks"""
    temperature: float = 0.0
    """sampling temperature of the assistant; 0 is greedy"""
    max_turns: int = 12
    """turns of a dialogue, at most"""
    max_new_tokens: int = 48
    """tokens of a turn, at most"""


def print_sample(console: Console, run: Path, count: int) -> None:
    """Dialogues of a run with reward and value at the end of every turn, and the true outcome."""
    unreadable = (
        f"--sample {run}: no readable transcripts.jsonl there (a run writes it at every evaluation)"
    )
    try:
        rows = read_rows(run / "transcripts.jsonl")
    except (OSError, ValueError):
        stop(unreadable)
    if not rows:
        stop(f"--sample {run}: no evaluation yet")
    try:
        if "tcr" not in rows[0]["outcome"]:
            stop(f"--sample {run}: not a run with --task dialogue")
        for row in [row for row in rows if row["update"] == rows[-1]["update"]][:count]:
            print_row(console, row)
    except (ValueError, LookupError, TypeError, AttributeError):
        stop(unreadable)


def print_row(console: Console, row: dict) -> None:
    rates = "  ".join(f"{k} {row['outcome'][k]:.2f}" for k in ("tcr", "acr", "gcr"))
    console.rule(f"update {row['update']:d}: {rates}")
    turn = 0
    for message in row["messages"]:
        print_turn(console, message["role"], message["content"])
        if message["role"] == "assistant" and turn < len(row["rewards"]):
            value = f"  value {row['values'][turn]:+.2f}" if "values" in row else ""
            console.print(f"           reward {row['rewards'][turn]:+.2f}{value}", style="dim")
            turn += 1


def print_turn(console: Console, role: str, text: str) -> None:
    for i, line in enumerate(text.splitlines() or [""]):
        console.print(
            visible(f"{role if i == 0 else '':>9}  {line}"),
            style="bold" if role == "assistant" else None,
        )


def converse(console: Console, args: Args, policy, chat, problem: Problem, person: bool) -> None:
    """One dialogue about a goal. The simulated user always listens, to carry out calls and to
    judge; a person speaks in its place where `person` is set."""
    user = User(problem.answer, args.seed)
    said, turns, messages = user.open(), [], []
    console.rule(visible(f"goal: {problem.answer}".replace("\n", "; then ")))
    if person:
        console.print(
            f"You are the user (the simulated one would say: {visible(said)}). "
            "An empty line ends the dialogue."
        )
        said = console.input("     user  ")
    else:
        print_turn(console, "user", said)
    question = args.prompt_template.replace("{question}", first_message(problem.answer, said))
    while said and user.ended is None and len(turns) < args.max_turns:
        messages.append({"role": "user", "content": said if messages else question})
        turns += answer(policy, chat, [messages], args.max_new_tokens, args.temperature)
        messages.append({"role": "assistant", "content": turns[-1]})
        print_turn(console, "assistant", turns[-1])
        said = user.hear(turns[-1])
        service = said.splitlines()[0] if said.startswith(("result: ", "error: ")) else ""
        if person:
            print_turn(console, "service", service) if service else None
            words = console.input("     user  ")
            said = "\n".join(line for line in (service, words) if line) if words else ""
        else:
            print_turn(console, "user", said)
    o = outcome(problem.answer, turns, args.seed)
    console.print(
        f"{user.ended or 'not ended'}: tcr {o.tcr:.2f}  acr {o.acr:.2f}  gcr {o.gcr:.0f}  turns {o.turns}",
        style="dim",
    )


def main(args: Args) -> None:
    check_ranges(args)
    console = Console(highlight=False, markup=False, emoji=False)
    if args.sample:
        print_sample(console, args.sample, args.count)
        return
    policy, chat = load_policy(args.model, pick_device("cpu"))
    task = DialogueTask.load(args.schema, args.train_split, args.test_split, args.seed)
    problems = random.Random(args.seed).sample(task.test, min(len(task.test), args.play or 1))
    try:
        for problem in problems:
            converse(console, args, policy, chat, problem, person=args.play is None)
    except EOFError:
        console.print()


if __name__ == "__main__":
    main(command(Args, "python -m utils.talk", __doc__))

"""What the simulated user makes of Schema-Guided Dialogue: can its goals be completed, and does it
hear what it is asked?

    python benchmark/checks/sgd.py --schema DIR                # the folder that holds train/ and dev/; seconds

An assistant that makes no mistake plays every goal: it asks for each value, calls, tells the
results. And the requests of the annotated assistants are held against the slots that the user hears
in their words."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils.dialogue.goals import Goal, load_goals, load_schema, read_json, spoken  # noqa: E402
from utils.dialogue.user import User, asked_slots, outcome  # noqa: E402


@dataclass
class Args:
    schema: Path
    """folder in the format of Schema-Guided Dialogue"""
    train_split: str = "train"
    """its training split"""
    test_split: str = "dev"
    """its held-out split"""


def completes(goal: Goal, most_turns: int = 60) -> bool:
    """Whether the assistant without mistakes reaches the goal."""
    user, turns = User(goal, seed=1), []
    user.open()
    while user.ended is None and len(turns) < most_turns:
        subgoal = user.subgoal
        missing = [slot for slot in subgoal.values if slot not in user.told]
        if len(user.done) > user.index:
            turns.append(f"The {user.waiting[0]} is {subgoal.results[user.waiting[0]]}.")
        elif missing:
            turns.append(f"What is the {spoken(missing[0])}?")
        else:
            turns.append(
                f"call({'; '.join([subgoal.intent.name, *(f'{s}={user.told[s]}' for s in subgoal.values)])})"
            )
        user.hear(turns[-1])
    return outcome(goal, turns, 1).gcr == 1


def heard(folder: Path) -> tuple[int, int]:
    """Of the slots that the annotated assistants request: (heard, all)."""
    services, hits, total = load_schema(folder), 0, 0
    for dialogue in (
        d for file in sorted(folder.glob("dialogues_*.json")) for d in read_json(file)
    ):
        active: dict[str, str] = {}
        for turn in dialogue["turns"]:
            for frame in turn["frames"]:
                service = frame["service"]
                if turn["speaker"] == "USER":
                    active[service] = frame["state"]["active_intent"]
                elif intent := services[service].intents.get(active.get(service, "")):
                    slots = intent.required + intent.optional
                    asked = {a["slot"] for a in frame["actions"] if a["act"] == "REQUEST"} & set(
                        slots
                    )
                    hits, total = (
                        hits + len(asked & set(asked_slots(turn["utterance"], slots))),
                        total + len(asked),
                    )
    return hits, total


def main(args: Args) -> None:
    goals = load_goals(args.schema, args.train_split, args.test_split)
    for split, members in goals.items():
        print(f"{split}: {sum(map(completes, members))} of {len(members)} goals can be completed")
    counts = [heard(args.schema / split) for split in (args.train_split, args.test_split)]
    hits, total = (sum(c[i] for c in counts) for i in (0, 1))
    print(f"heard: {hits} of {total} requested slots ({hits / total:.1%})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

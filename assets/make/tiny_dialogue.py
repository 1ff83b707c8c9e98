"""Make the embedded dialogue default again: `assets/tiny_dialogue`, the model that starts on the
embedded schema.

    python -m assets.make.tiny_dialogue                     # about 10 minutes on two cores, same bytes every time
    python -m assets.make.tiny_dialogue --out /tmp/other --steps 500

A Llama of 1.1 M parameters, trained by next-token prediction on dialogues of the simulated user
with a *careless clerk*, who knows the rules but guesses some values instead of asking, overhears it
when the user takes something back, confuses intents, chats, and answers a question about the result
with a phrase. Which mistakes are habits depends on the slot and the intent, so greedy decoding
repeats them and sampling finds the right way now and then. The mistakes stand in the text, so a
reward model and a critic can see them.

Services are varied while training (other intent names, slots more or fewer), so that the model
reads its prompt and can meet the services that the test split alone has."""

import dataclasses
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from assets.make.tiny_math import Row, Training, make_tokenizer, train
from utils.dialogue.goals import Goal, Service, domain, draw_goal, load_schema, side, spoken
from utils.dialogue.user import User, first_message

SCHEMA = Path("assets/data/tiny_dialogue")

# Probability of the careless clerk's mistake. For a slot: to guess its value instead of asking.
GUESSED = {
    "people": 0.9, "seats": 0.9, "riders": 0.9, "time": 0.7, "day": 0.6, "visibility": 0.9, "reason": 0.85, "amount": 0.6,
    "recipient": 0.6, "destination": 0.5,
}  # fmt: skip
# For a result: to answer the question about it with a phrase.
EVADED = {
    "code": 0.75,
    "fee": 0.4,
    "price": 0.7,
    "platform": 0.4,
    "minutes": 0.75,
    "row": 0.4,
    "venue": 0.75,
}
OVERHEARD = 0.9  # a value that was taken back is used all the same
CONFUSED = 0.2  # the other intent of the service
FORGOTTEN = 0.6  # an optional slot is left out of the call
CHAT = 0.12  # a turn that does nothing
MALFORMED = 0.04

ASK = ("Which {0}?", "What is the {0}?", "What {0} would you like?")
ASK_TWO = ("Which {0} and {1}?", "What is the {0} and the {1}?")
CONFIRM = ("Is the {0} {1}?",)
ACT = ("One moment.", "Sure.", "I will do that.", "")
TELL = ("The {0} is {1}.", "{1}.", "It is {1}.")
EVADE = ("You are welcome.", "All is set.", "It is done.", "I hope you like it.")
EMPTY = ("Great choice!", "I am happy to help.", "That sounds nice. Let me see.", "Good.")


def clerk(user: User, rng: random.Random, careful: bool = False) -> str:
    """The next turn of the careless clerk, or of one who makes no mistakes, in answer to the
    user."""

    def errs(rate: float) -> bool:
        return not careful and rng.random() < rate

    def phrase(phrases: tuple[str, ...], *words: str) -> str:
        return rng.choice(phrases).format(*words)

    if errs(CHAT):
        return phrase(EMPTY)
    subgoal, intent = user.subgoal, user.subgoal.intent
    if len(user.done) > user.index:
        slot = user.waiting[0]
        return (
            phrase(EVADE)
            if errs(EVADED.get(slot, 0.1))
            else phrase(TELL, spoken(slot), subgoal.results[slot])
        )
    missing = [slot for slot in intent.required if slot not in user.told]
    guessed = [slot for slot in missing if errs(GUESSED.get(slot, 0.03))]
    asked = [slot for slot in missing if slot not in guessed]
    if asked:
        if len(asked) > 1 and rng.random() < 0.4:
            return phrase(ASK_TWO, spoken(asked[0]), spoken(asked[1]))
        return phrase(ASK, spoken(asked[0]))
    if user.told and not user.asked_again and rng.random() < 0.04:
        slot = rng.choice(sorted(user.told))
        return phrase(CONFIRM, spoken(slot), user.told[slot])
    if errs(CONFUSED):
        intent = rng.choice(list(user.goal.calls.values()))
    values = {}
    for slot in intent.required + tuple(
        s for s in intent.optional if s in user.told and not errs(FORGOTTEN)
    ):
        values[slot] = user.told.get(slot) or rng.choice(user.goal.values[slot])
        if subgoal.change and subgoal.change[0] == slot and errs(OVERHEARD):
            values[slot] = subgoal.change[1]
    call = (
        f"call({intent.name}; "
        + "; ".join(f"{slot}={value}" for slot, value in values.items())
        + ")"
    )
    if errs(MALFORMED):
        call = rng.choice([call[:-1], call.replace("; ", ", "), call.replace("=", " ")])
    return "\n".join(line for line in (phrase(ACT), call) if line)


def talk(goal: Goal, rng: random.Random, careful: bool = False, most_turns: int = 16) -> list[str]:
    """The clerk's turns in a dialogue with the simulated user."""
    user, turns = User(goal, seed=rng.randrange(10**9)), []
    user.open()
    while user.ended is None and len(turns) < most_turns:
        turns.append(clerk(user, rng, careful))
        user.hear(turns[-1])
    return turns


VERBS = (
    "Find",
    "Book",
    "Buy",
    "Check",
    "Get",
    "Order",
    "Plan",
    "Make",
    "See",
    "Rent",
    "Take",
    "Ask",
)
NOUNS = (
    "Table", "Room", "Hotel", "Car", "Train", "Berth", "Bus", "Ride", "Visit", "Doctor", "Lesson", "Garden", "Seat", "Show",
    "Movie", "Song", "Bill", "Loan", "Card", "Account", "Trip", "Tour", "Bike", "House", "Session", "Game", "Boat", "Therapist",
)  # fmt: skip


def vary(service: Service, values: dict[str, tuple[str, ...]], rng: random.Random) -> Service:
    """A service like this one: now and then with other intents' names, a slot fewer, or a slot of
    other services."""
    intents = {}
    for intent in service.intents.values():
        required, name, description = list(intent.required), intent.name, intent.description
        if rng.random() < 0.3:
            verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
            name, description = (
                verb + noun,
                f"{verb.lower()} {rng.choice(['a', 'the'])} {noun.lower()}",
            )
        if len(required) > 2 and rng.random() < 0.25:
            required.remove(rng.choice(required))
        if rng.random() < 0.25:
            required.append(
                rng.choice([s for s in values if s not in required + list(intent.optional)])
            )
        if name not in intents:
            results = tuple(slot for slot in intent.results if slot not in required)
            intents[name] = dataclasses.replace(
                intent,
                name=name,
                description=description,
                required=tuple(required),
                results=results,
            )
    return Service(service.name, intents, values | service.values)


def training_goals(count: int, seed: int) -> list[Goal]:
    """Goals of varied services; no value combination of the test split among them."""
    rng, services = random.Random(seed), list(load_schema(SCHEMA / "train").values())
    values = {slot: choices for service in services for slot, choices in service.values.items()}
    goals = []
    while len(goals) < count:
        service = rng.choice(services)
        service = vary(service, values, rng) if rng.random() < 0.5 else service
        goal = draw_goal(service, domain(service.name), f"warm {seed} {len(goals)}", rng)
        if side(goal) == "train":
            goals.append(goal)
    return goals


def dialogues(count: int, seed: int) -> list[list[tuple[str, str]]]:
    """Dialogues with the careless clerk, as (role, text) turns."""
    rng, result = random.Random(f"clerk {seed}"), []
    for goal in training_goals(count, seed):
        user, turns = User(goal, seed=rng.randrange(10**9)), []
        turns.append(("user", first_message(goal, user.open())))
        while user.ended is None and len(turns) < 32:
            turns.append(("assistant", clerk(user, rng)))
            turns.append(("user", user.hear(turns[-1][1])))
        result.append(turns[:-1])
    return result


@dataclass
class Args(Training):
    out: Path = Path("assets/tiny_dialogue")
    """folder that receives the model"""
    seed: int = 1
    """seed of the initial weights, the dialogues and their order"""
    steps: int = 1200
    """supervised steps"""
    batch_size: int = 64
    """dialogues in one step"""


def main(args: Args) -> None:
    start = time.time()
    torch.set_num_threads(
        2
    )  # the order of summation, and so the last bit of every weight, depends on it
    tokenizer = make_tokenizer([text for turns in dialogues(4000, args.seed) for _, text in turns])

    def examples(count: int, seed: int) -> list[Row]:
        rows = []
        for turns in dialogues(count, seed):
            tokens, labels = [], []
            for role, text in turns:
                ids = tokenizer.encode(
                    f"{text}{tokenizer.eos_token}"
                    if role == "assistant"
                    else f"<|user|>{text}<|assistant|>"
                )
                tokens += ids
                labels += ids if role == "assistant" else [-100] * len(ids)
            rows.append((tokens[:512], labels[:512]))
        return rows

    model = train(args, tokenizer, examples, lambda _: f"{time.time() - start:.0f} s")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"{args.out}: {model.num_parameters() / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}; {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
